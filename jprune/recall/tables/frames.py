"""The tables of an audit, as the report reads them."""

import dataclasses
import math
from typing import Any, TypeAlias

import pandas as pd

from jprune.recall.inputs.raw import FrameCell

FrameRow: TypeAlias = Any  # a row of a pandas frame as a Series or a dict: cells by column
Row: TypeAlias = dict[str, FrameCell]  # a new row of a table, by column

UNSTATED = 0.0
"""The ratio of models that were given by name, without a ratio."""

TABLES = (
    "summary", "alphas", "classes", "tests", "recalls", "dense", "pies", "groups", "probabilities", "drift", "at_risk",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class AuditTables:
    """The tables and settings of an audit.

    Every table is a pandas frame with a ``score`` column and, where it depends on it, a ``ratio`` column.
    ``docs/audit.md`` explains every column.

    Attributes:
      summary: a row per score and ratio: means, intervals and marks of alpha and its controls.
      alphas: a row per score, ratio and model.
      classes: a row per score, ratio and class.
      tests: a row per test.
      recalls: a row per score, ratio, model and class.
      dense: a row per score and dense model.
      pies: a row per score, ratio and example whose modal label changed.
      groups: a row per score, ratio, attribute, group and class.
      probabilities: a row per score, ratio and class: confidence, calibration and KL divergence; only with logits.
      drift: a row per score, ratio, class and predicted class: where the lost examples of a class went.
      at_risk: a row per score and example with the highest risk, according to the dense models alone.
      warnings: sentences to read before the results.
      class_names: the name of every class.
      examples: number of test examples.
      level: confidence level of every interval.
      margin: the distance of alpha from 1 within which differences between classes count as equal.
      paired: whether compressed models are compared with the dense model of the same index.
      shared: whether all scores start from the same dense models.
      named: whether models were given by name, without a compression ratio.
    """

    summary: pd.DataFrame
    alphas: pd.DataFrame
    classes: pd.DataFrame
    tests: pd.DataFrame
    recalls: pd.DataFrame
    dense: pd.DataFrame
    pies: pd.DataFrame
    groups: pd.DataFrame
    probabilities: pd.DataFrame
    drift: pd.DataFrame
    at_risk: pd.DataFrame
    warnings: tuple[str, ...]
    class_names: tuple[str, ...]
    examples: int
    level: float
    margin: float
    paired: bool
    shared: bool
    named: bool

    @property
    def scores(self) -> tuple[str, ...]:
        """The scores, in the order given."""
        return tuple(str(score) for score in self.summary["score"].unique())

    @property
    def ratios(self) -> tuple[float, ...]:
        """The compression ratios of all scores, ascending."""
        return tuple(sorted(float(ratio) for ratio in self.summary["ratio"].unique()))

    def tables(self) -> dict[str, pd.DataFrame]:
        """Return every table by its name."""
        return {name: getattr(self, name) for name in TABLES}


def records(table: pd.DataFrame) -> list[Row]:
    """Return the rows of a table as dicts that JSON can represent; undefined values are None.

    >>> records(pd.DataFrame({"score": ["random"], "alpha": [float("nan")]}))
    [{'score': 'random', 'alpha': None}]
    """
    columns = [
        [None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in table[name].tolist()]
        for name in table.columns
    ]
    return [dict(zip(table.columns, row, strict=True)) for row in zip(*columns, strict=True)]
