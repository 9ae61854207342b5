"""The audit's tables that need the examples themselves: which changed, and the recalls of subgroups."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from jprune.recall.inference.bootstrap import bootstrap_examples
from jprune.recall.inference.pairing import pairing_test
from jprune.recall.inputs.arguments import Rng
from jprune.recall.inputs.predictions import Groups
from jprune.recall.measures.exemplars import modal_label, taxicab_distance
from jprune.recall.measures.rates import Rates, from_predictions
from jprune.recall.tables.audited import AuditedModels, difference
from jprune.recall.tables.comparisons import pairing_row

Stacks = Mapping[str, Mapping[float, npt.NDArray[np.int64]]]
GROUP_COLUMNS = (
    "score", "ratio", "attribute", "group", "class", "support", "recall_dense", "recall", "change", "change_low",
    "change_high", "excess",
)  # fmt: skip


def pies(dense: Mapping[str, npt.NDArray[np.int64]], pruned: Stacks, true: npt.NDArray[np.int64]) -> pd.DataFrame:
    """One row per score, ratio and example whose modal label changed, the furthest apart first.

    Args:
      dense: predicted classes of each score's dense models, (models, examples).
      pruned: predicted classes of each score and ratio, (models, examples).
      true: the labels, (examples,).
    """
    frames = []
    for score, ratios in pruned.items():
        before = modal_label(dense[score])
        for ratio, predicted in ratios.items():
            after = modal_label(predicted)
            examples = np.flatnonzero(before != after)
            # The distance ranks these few; of all examples it would take half the time of the whole audit.
            distance = taxicab_distance(dense[score][:, examples], predicted[:, examples])
            order = np.argsort(-distance, kind="stable")
            examples = examples[order]
            frames.append(
                pd.DataFrame(
                    {
                        "score": score,
                        "ratio": ratio,
                        "example": examples,
                        "label": true[examples],
                        "dense": before[examples],
                        "pruned": after[examples],
                        "distance": distance[order],
                    }
                )
            )
    columns = ["score", "ratio", "example", "label", "dense", "pruned", "distance"]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=columns)


def subgroups(
    study: AuditedModels,
    groups: Groups,
    dense: Mapping[str, npt.NDArray[np.int64]],
    pruned: Stacks,
    true: npt.NDArray[np.int64],
) -> pd.DataFrame:
    """One row per score, ratio, attribute, group and class (and for all classes together, class ``None``).

    ``excess`` is what the group lost beyond what all examples lost.
    """
    rows = []
    count = len(study.class_names)
    for attribute, (codes, kinds) in groups.items():
        for code, kind in enumerate(kinds):
            member = codes == code
            before = {score: from_predictions(true[member], stack[:, member], count) for score, stack in dense.items()}
            for score, ratios in pruned.items():
                for ratio, stack in ratios.items():
                    after = from_predictions(true[member], stack[:, member], count)
                    lost = study.dense[score].accuracy.mean() - study.pruned[score][ratio].accuracy.mean()
                    frame = _subgroup(study, before[score], after, float(lost))
                    rows.append(frame.assign(score=score, ratio=ratio, attribute=attribute, group=kind))
    return (
        pd.concat(rows, ignore_index=True)[list(GROUP_COLUMNS)] if rows else pd.DataFrame(columns=list(GROUP_COLUMNS))
    )


def resampling(
    study: AuditedModels,
    true: npt.NDArray[np.int64],
    dense: Mapping[str, npt.NDArray[np.int64]],
    pruned: Stacks,
    *,
    rng: Rng,
    resamples: int,
) -> tuple[pd.DataFrame, list[dict[str, Any]]]:
    """Intervals of mean alpha over test examples, a row per row of the summary; and a test of the pairing for each.

    Args:
      study: the rates; paired.
      true: the labels, (examples,).
      dense: predicted classes of each score's dense models, (models, examples).
      pruned: predicted classes of each score and ratio, (models, examples).
      rng: generator or seed; a seed draws the same examples for every score.
      resamples: how often the examples are drawn anew, and at most how many pairings are tried.
    """
    intervals, tests = [], []
    for score, ratios in pruned.items():
        stack = np.stack(list(ratios.values()))
        drawn = bootstrap_examples(
            true, dense[score], stack, len(study.class_names), rng=rng, resamples=resamples, level=study.level
        )
        ends = (drawn.low, drawn.high, drawn.bias)
        names = ("alpha_examples_low", "alpha_examples_high", "alpha_examples_bias")
        intervals.append(pd.DataFrame(dict(zip(names, ends, strict=True))))
        for ratio, rates in study.pruned[score].items():
            found = pairing_test(study.dense[score].recall, rates.recall, rng=rng, resamples=resamples)
            tests.append(pairing_row(score, ratio, found))
    return pd.concat(intervals, ignore_index=True), tests


def _subgroup(study: AuditedModels, dense: Rates, pruned: Rates, lost: float) -> pd.DataFrame:
    present = np.flatnonzero(pruned.support)
    before = np.column_stack([dense.accuracy, dense.recall[:, present]])
    after = np.column_stack([pruned.accuracy, pruned.recall[:, present]])
    change = difference(before, after, study)
    return pd.DataFrame(
        {
            "class": [None, *(study.class_names[c] for c in present)],
            "support": [int(pruned.support.sum()), *pruned.support[present].tolist()],
            "recall_dense": before.mean(0),
            "recall": after.mean(0),
            "change": change.mean,
            "change_low": change.low,
            "change_high": change.high,
            "excess": -change.mean - lost,
        }
    )
