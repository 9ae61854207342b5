"""What a grid of networks is made of: stages that are planned, and the row that each network becomes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from jprune.jumpstart.units import Activity


class Planned(NamedTuple):
    """A stage of a study: cells that one program makes.

    Attributes:
      title: for people.
      settings: everything that decides its numbers, the seeds apart; JSON.
      seeds: of the networks.
      work: what it costs, in the unit that the study's progress is counted in.
    """

    title: str
    settings: Mapping[str, Any]
    seeds: range
    work: int


def split_method(method: str, default: float) -> tuple[str, float]:
    """The name of a method and its coefficient.

    Raises:
      ValueError: what stands behind the colon is no number that is at least 0.

    >>> split_method("norm:0.1", 1e-4), split_method("UP", 1e-4)
    (('norm', 0.1), ('UP', 0.0001))
    """
    name, colon, number = method.partition(":")
    try:
        coefficient = float(number) if colon else default
    except ValueError:
        coefficient = -1.0
    if not coefficient >= 0:
        raise ValueError(f"method {method!r}: what is behind the colon must be a number, at least 0")
    return name, coefficient


def state_columns(activity: Activity) -> dict[str, float]:
    """The columns that say how much of a network works: dead and linear units, dead points, linear cells."""
    return {
        "unit_dead": float(activity.unit_dead_ratio),
        "unit_linear": float(activity.unit_linear_ratio),
        "point_dead": float(activity.point_dead_ratio),
        "linearity": float(activity.linearity),
    }


def floor(labels: np.ndarray) -> float:
    """The accuracy of always answering the most frequent class: a network there did not train.

    >>> floor(np.array([0, 1, 1, 1]))
    0.75
    """
    return float(np.bincount(labels).max() / len(labels))


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Rows -> columns, for ``files.write_table``.

    >>> columns([{"width": 2}, {"width": 4}])
    {'width': [2, 4]}
    """
    return {name: [row[name] for row in rows] for name in rows[0]}
