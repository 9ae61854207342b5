"""Planned stages, methods, and table rows of networks, shared by the grids.

Training is in the module of each grid.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from experiments.data import datasets
from experiments.storage.files import JSON
from jprune.jumpstart.units import Activity


class GridStage(NamedTuple):
    """A stage of a grid: cells that one program computes.

    Attributes:
      title: title to print.
      settings: everything that determines its results except the seeds; JSON.
      seeds: seeds of the networks.
      work: its cost, in units of the progress display.
    """

    title: str
    settings: Mapping[str, JSON]
    seeds: range
    work: int


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that determines the results of a stage of a grid on images or tables, except the seeds.

    Attributes:
      dataset: a name of ``experiments.data.datasets``.
      method: a method of the grid, followed by a colon and its coefficient if that is not the grid's.
      depth: hidden layers, or convolutions.
      width: units, or channels, of each.
      epochs: passes over the training examples.
      lr: learning rate of Adam.
      batch: examples per step; the last step of an epoch uses the remaining examples.
      coefficient: lambda.
      fingerprint: fingerprint of the content of a data set from a file or folder; None for named data sets.
      prune: ratios to which the trained network is pruned, or None.
      version: number of the program, where an earlier one computed other numbers; otherwise None.
    """

    dataset: str
    method: str
    depth: int
    width: int
    epochs: int
    lr: float
    batch: int
    coefficient: float
    fingerprint: str | None = None
    prune: Sequence[float] | None = None
    version: int | None = None

    @property
    def technique(self) -> str:
        """The method without its coefficient."""
        return technique_of(self.method)

    def settings(self) -> dict[str, JSON]:
        """Return the fields as JSON, for the hash of a stage; those that are None are left out."""
        return {name: value for name, value in dataclasses.asdict(self).items() if value is not None}


def fingerprint_of(dataset: str) -> str | None:
    """Return a checksum of a data set from a file or folder, whose content can change; None for named data sets.

    Raises:
      ValueError: the data cannot be read.
    """
    if dataset.partition(":")[0] not in ("npz", "table", "folder"):
        return None
    return datasets.fingerprint(datasets.load(dataset, selection="test"))


def technique_of(method: str) -> str:
    """Return the name of a method without its coefficient."""
    return method.partition(":")[0]


def coefficient_of(method: str, default: float, penalized: Mapping[str, bool]) -> float:
    """Return lambda of a method: the number after its colon, or the default; 0 without a penalty.

    Args:
      method: a method, such as ``norm:0.1``.
      default: default of the grid.
      penalized: whether each method has a penalty.

    Raises:
      ValueError: the method is unknown, its coefficient is not a finite number of at least 0, or it has a
        coefficient but no penalty.

    >>> [coefficient_of(method, 1e-4, {"UP": True, "relu": False}) for method in ("UP:0.1", "UP", "relu")]
    [0.1, 0.0001, 0.0]
    """
    name, colon, number = method.partition(":")
    if name not in penalized:
        raise ValueError(f"method {method!r}: {name!r} must be one of {', '.join(penalized)}")
    if colon and not penalized[name]:
        raise ValueError(f"method {method!r}: {name!r} has no penalty and takes no coefficient")
    try:
        own = float(number) if colon else default
    except ValueError:
        own = -1.0
    if not 0 <= own < math.inf:
        raise ValueError(f"method {method!r}: the coefficient after the colon must be a finite number, at least 0")
    return own if penalized[name] else 0.0


def state_columns(activity: Activity) -> dict[str, float]:
    """Return the columns about activity: fractions of dead and linear units, dead points and linear cells."""
    return {
        "unit_dead": float(activity.unit_dead_ratio),
        "unit_linear": float(activity.unit_linear_ratio),
        "point_dead": float(activity.point_dead_ratio),
        "linearity": float(activity.linearity),
    }


def floor(labels: np.ndarray) -> float:
    """Return the accuracy of always predicting the most frequent class; a network at this accuracy did not train.

    >>> floor(np.array([0, 1, 1, 1]))
    0.75
    """
    return float(np.bincount(labels).max() / len(labels))


def columns(rows: Sequence[Mapping[str, object]]) -> dict[str, list[object]]:
    """Convert rows to columns, for ``files.write_table``.

    >>> columns([{"width": 2}, {"width": 4}])
    {'width': [2, 4]}
    """
    return {name: [row[name] for row in rows] for name in rows[0]}
