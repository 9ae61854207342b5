"""Settings of a jumpstart grid. Settings that affect the results are hashed; those that control the run are not."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from experiments.cli import commands
from experiments.cli.commands import ClusterOptions, Flag, Positional, RunOptions
from experiments.storage.files import JSON

Kind = Literal["moons", "images", "tables"]
Layer = Literal["conv", "dense"]


@dataclasses.dataclass(frozen=True)
class CellOptions:
    """The networks of the grid: a cell is a data set, a method, a width, a depth and a seed."""

    kind: Kind = "moons"
    """moons: thin dense or convolutional networks, many per program. images: 3 x 3 convolutions. tables: dense
    networks on small tables."""
    datasets: tuple[str, ...] = ("moons",)
    """Data sets: moons for kind moons; for the others digits, mnist, cifar10, cifar100, iris, wine, table:FILE, ..."""
    methods: tuple[str, ...] = ("relu", "UP")
    """Methods, each with an optional coefficient after a colon, such as UP:0.1.
    moons: relu, relu-bn (batch normalization), P, U, UP (penalty on points, units, both), UP-zero (dropout too).
    images: relu, relu-bn, UP, norm, mean (aggregates).
    tables: baseline, jumpstart, batchnorm, skip, gelu."""
    widths: tuple[int, ...] = (1, 2, 3, 4, 5, 10, 15, 20, 25)
    """Units, or channels, of each hidden layer."""
    depths: tuple[int, ...] = (1, 10, 60, 120)
    """Hidden layers."""
    shapes: tuple[str, ...] = ()
    """Sizes DEPTHxWIDTH, such as 20x8, instead of every combination of widths and depths."""
    seeds: int = 1
    """Networks of each cell; their seeds are 0, 1, ..."""
    layer: tuple[Layer, ...] = ("conv",)
    """moons: form of the hidden layers. conv: a convolution over the two coordinates, as in the authors'
    notebooks; dense: as in the paper."""
    prune: tuple[float, ...] = ()
    """moons, images: also prune the trained networks by magnitude to these ratios (prunable weights / weights
    kept), without fine-tuning; pruned.csv has their training accuracies."""
    groups: tuple[str, ...] = ("1-5", "10", "15", "20", "25")
    """moons: ranges of widths FROM-TO that share a program, padded to the widest; every other width gets
    its own program."""


@dataclasses.dataclass(frozen=True)
class GridTrainingOptions:
    """Training."""

    epochs: int = 5000
    """Passes over the training examples."""
    lr: tuple[float, ...] = (1e-2,)
    """Learning rates of Adam; kind images accepts several and computes a grid for each."""
    batch: int = 85
    """Training examples per step. moons: always all 85. images, tables: the last step of an epoch uses the
    remaining examples."""
    coefficient: float = 1e-4
    """Coefficient lambda of the penalty, for methods that give none."""


@dataclasses.dataclass(frozen=True)
class Grid(GridTrainingOptions, CellOptions):
    """Everything that determines the results of a grid, and its number of networks."""

    def __post_init__(self):
        """Validate the settings."""
        commands.check_kinds(self)
        commands.check_at_least(self, seeds=1, epochs=1, batch=1)
        for name in ("datasets", "methods", "widths", "depths", "lr", "layer", "shapes", "prune"):
            value = getattr(self, name)
            if not (value or name in ("shapes", "prune")) or len(set(value)) < len(value):
                raise ValueError(f"{name}={value} must be one or more values, each given once")
        for name in ("lr", "prune", "coefficient"):
            value = getattr(self, name)
            if not all(map(math.isfinite, value if isinstance(value, tuple | list) else (value,))):
                raise ValueError(f"{name}={value} must be finite")
        for name in ("widths", "depths", "lr"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if any(ratio <= 1 for ratio in self.prune):
            raise ValueError(f"prune={self.prune} must be ratios above 1, such as 2 to keep half of the weights")
        if self.prune and self.kind == "tables":
            raise ValueError(f"prune={self.prune} is for kind='moons' and kind='images'; kind='tables' does not prune")
        if self.coefficient < 0:
            raise ValueError(f"coefficient={self.coefficient} must not be negative")
        self.sizes  # noqa: B018 refuses a wrong shape

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(depth, width) of every network, shallow ones first.

        Raises:
          ValueError: a shape that is not DEPTHxWIDTH.
        """
        if not self.shapes:
            return tuple((depth, width) for depth in self.depths for width in self.widths)
        sizes = []
        for shape in self.shapes:
            depth, cross, width = shape.partition("x")
            if not (cross and depth.isdecimal() and width.isdecimal() and int(depth) and int(width)):
                raise ValueError(f"shapes={self.shapes}: {shape!r} must be DEPTHxWIDTH, such as 20x8")
            sizes.append((int(depth), int(width)))
        return tuple(sizes)


@dataclasses.dataclass(frozen=True)
class GridRunning(RunOptions):
    """Options that control the run and do not change the results."""

    table: Path | None = None
    """With report: read the cells from this CSV instead of the stored stages."""
    minutes: float | None = None
    """Start no stage after this many minutes."""

    def __post_init__(self):
        """Validate the options."""
        super().__post_init__()
        commands.check_at_least(self, minutes=0)


@dataclasses.dataclass(frozen=True)
class GridCommand:
    """Train a grid of networks, thin and deep, with and without the jumpstart penalty.

    The cells of one compiled program form a stage, which is stored when it is done. To resume a killed run, rerun its
    command. Each processor core or accelerator computes a different stage.

    Examples, after python -m experiments.jumpstart_grid:
      --list                                              presets and their cost
      --preset moons-subset --depths 1 10 --epochs 500    a trial
      --preset moons --shard 0/4              a quarter of the stages, same folder
      status --out runs/moons                 completed stages
      report --preset moons --table moons.csv     tables and figures from a file
    """

    action: Positional = "run"
    """run: compute the missing stages, then report. status: list the completed stages. report: rebuild tables and
    figures from the stored results, or from --table."""
    preset: str = "moons-subset"
    """Preset that sets the defaults of all other options; --list shows the presets."""
    list: Flag = False
    """Print the presets and exit."""
    all: Flag = False
    """With status: list every grid that was run in the folder, not only the last."""
    cells: CellOptions = dataclasses.field(default_factory=CellOptions)
    training: GridTrainingOptions = dataclasses.field(default_factory=GridTrainingOptions)
    running: GridRunning = dataclasses.field(default_factory=GridRunning)
    cluster: ClusterOptions = dataclasses.field(default_factory=ClusterOptions)

    @property
    def grid(self) -> Grid:
        """The settings that determine the results."""
        return commands.joined(Grid, self.cells, self.training)

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return self.running.out or Path("runs") / self.preset


def command_of(grid: Grid, running: GridRunning, **others: object) -> GridCommand:
    """Return a command line with these settings as defaults."""
    groups = {"cells": commands.group(CellOptions, grid), "training": commands.group(GridTrainingOptions, grid)}
    return GridCommand(**groups, running=running, **others)


def grid_from_json(values: Mapping[str, JSON]) -> Grid:
    """Read a grid that ``commands.to_json`` wrote.

    >>> grid_from_json(commands.to_json(Grid(widths=(2, 3)))).widths
    (2, 3)
    """
    return commands.from_json(Grid, values)


def grid_running_from_json(values: Mapping[str, JSON]) -> GridRunning:
    """Read run options that ``commands.to_json`` wrote."""
    return commands.from_json(GridRunning, values, ("out", "data_dir", "table"))
