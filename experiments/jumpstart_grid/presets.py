"""The jumpstart studies by name: a frozen dataclass of settings, and what to expect of each.

Settings follow Riera, Rey, Serra, Puertas, Pujol, "Training Thinner and Deeper Neural Networks: Jumpstart
Regularization", CPAIOR 2022 (arXiv 2201.12795), and Riera, Puertas, Pujol, "Unit-Centric Regularization
for Efficient Deep Neural Networks", IEEE Access 2025. They were fixed before any result was seen.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.cli.commands import parse_shard
from experiments.cli.registry import Registry
from experiments.jumpstart_grid.thin_stack import Layer

Kind = Literal["moons", "images", "tables", "pruning"]
Action = Literal["run", "status", "report"]


@dataclasses.dataclass(frozen=True)
class Grid:
    """Train a grid of networks, thin and deep ones among them, with and without the jumpstart penalty.

    A cell is a data set, a method, a width, a depth and a seed. Cells that fit in one compiled program are
    a stage, stored when it is done: a killed run continues with the next stage when given the same
    command. Each processor core, or accelerator, works on a stage of its own.

    After -m experiments.jumpstart_grid, for example:
      --list                                              what studies there are, what to expect
      --preset moons-subset --depths 1 10 --epochs 500    a trial
      --preset moons --shard 0/4                          a quarter of the stages, into the same folder
      status --preset moons                               how far that is
      report --preset moons --table moons.csv             tables and figures of cells that others trained
    """

    action: Annotated[Action, tyro.conf.Positional] = "run"
    """run: do what is not done yet, then report. status: say what is done. report: rebuild tables and
    figures from what is stored, or from --table."""
    preset: str = "moons-subset"
    """Settings that are the defaults of all the other options; --list names them."""
    kind: Kind = "moons"
    """What is trained. moons: thin dense or convolutional networks, many in a program. images: 3 x 3
    convolutions. tables: dense networks on small tables. pruning: an MLP that is pruned."""
    datasets: tuple[str, ...] = ("moons",)
    """Data sets: moons for kind moons; for the others digits, mnist, cifar10, cifar100, iris, wine, ..."""
    methods: tuple[str, ...] = ("relu", "UP")
    """Techniques, a coefficient of its own behind a colon, such as UP:0.1.
    moons: relu, relu-bn (batch normalization), P, U, UP (slacks of points, units, both), UP-zero (dropout too).
    images: relu, relu-bn, UP, norm, mean (aggregates).
    tables: baseline, jumpstart, batchnorm, skip, gelu.
    pruning: baseline, jumpstart."""
    widths: tuple[int, ...] = (1, 2, 3, 4, 5, 10, 15, 20, 25)
    """Units, or channels, of each hidden layer."""
    depths: tuple[int, ...] = (1, 10, 60, 120)
    """Hidden layers."""
    shapes: tuple[str, ...] = ()
    """DEPTHxWIDTH, such as 20x8: these instead of every width with every depth."""
    seeds: int = 1
    """Networks of each cell; their seeds are 0, 1, ..."""
    epochs: int = 5000
    """Passes over the training examples."""
    lr: tuple[float, ...] = (1e-2,)
    """Learning rates of Adam; of several, for images alone, a grid each."""
    batch: int = 85
    """Training examples a step; moons: all 85, whatever is given.
    images, tables: the last step of an epoch takes what is left.
    pruning: what fills no batch sits the epoch out."""
    coefficient: float = 1e-4
    """Lambda of the penalty, where the method does not carry its own."""
    layer: tuple[Layer, ...] = ("conv",)
    """moons: form of the hidden layers. conv: a convolution over the two coordinates, as in the notebooks
    of the study; dense: as in its text."""
    groups: tuple[str, ...] = ("1-5", "10", "15", "20", "25")
    """moons: widths FROM-TO that share a program, padded to the widest; other widths have programs of their own."""
    ratios: tuple[float, ...] = (1, 2, 5, 10, 20, 30)
    """pruning: compression ratios, parameters before / after."""
    finetune_epochs: int = 10
    """pruning: epochs after pruning."""
    data_dir: Path | None = None
    """Folder of prepared TensorFlow Datasets; by default its own."""
    out: Path | None = None
    """Folder of the results; runs/PRESET by default."""
    table: Path | None = None
    """report: read the cells from this CSV instead of the stored stages."""
    shard: str = "0/1"
    """i/n: this process takes the i-th (from 0) of n parts of the stages."""
    minutes: float | None = None
    """Begin no stage after this many minutes."""
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List the presets and end."""

    def __post_init__(self):
        """Refuse settings that no study can have."""
        for name in ("seeds", "epochs", "batch", "finetune_epochs"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name in ("datasets", "methods", "widths", "depths", "lr", "layer", "ratios", "shapes"):
            value = getattr(self, name)
            if not (value or name == "shapes") or len(set(value)) < len(value):
                raise ValueError(f"{name}={value} must be one or more values, none twice")
        for name in ("widths", "depths", "lr"):
            if min(getattr(self, name)) <= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if min(self.ratios) < 1:
            raise ValueError(f"ratios={self.ratios} must be 1 or more: parameters before / parameters after")
        if self.coefficient < 0:
            raise ValueError(f"coefficient={self.coefficient} must not be negative")
        parse_shard(self.shard)
        self.sizes  # noqa: B018 refuses what is no shape

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("runs") / self.preset

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in dataclasses.asdict(self).items()}

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


def from_json(values: Mapping[str, Any]) -> Grid:
    """The settings that ``Grid.to_json`` wrote.

    Raises:
      TypeError: a setting that there is not.

    >>> import json
    >>> from_json(json.loads(json.dumps(Grid().to_json()))) == Grid()
    True
    """
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Grid(**{**typed, **{name: Path(typed[name]) for name in ("data_dir", "out", "table") if typed.get(name)}})


_PRESETS: Registry[Grid] = Registry()
preset, names, get = _PRESETS.preset, _PRESETS.names, _PRESETS.get
describe, listing = _PRESETS.describe, _PRESETS.listing


@preset
def moons_subset() -> Grid:
    """Depths 1, 10, 60, 120 x 9 widths x {relu, UP} on moons: 72 cells, one seed.

    Cost: about 8 minutes on two cores.
    Expect: a training accuracy of .9 or more in 30 of the 36 cells with UP and in 15 with relu,
    which stays at the floor of .518 from depth 60 on (published).
    """
    return Grid()


@preset
def moons() -> Grid:
    """The whole moons grid of the 2022 study: 9 widths x 13 depths x 6 methods, 702 cells, one seed.

    Cost: about 45 minutes on two cores.
    Expect: a training accuracy of .9 or more in 96 of the 117 cells with UP, 76 with UP-zero, 19 with relu (published).
    """
    return Grid(methods=("relu", "relu-bn", "P", "U", "UP", "UP-zero"), depths=(1, *range(10, 121, 10)))


@preset
def moons_seeds() -> Grid:
    """Relu and UP of the moons grid with five seeds: how much a single cell of it means.

    Cost: about 80 minutes on two cores.
    """
    return dataclasses.replace(moons(), methods=("relu", "UP"), seeds=5)


@preset
def moons_layers() -> Grid:
    """Both forms of the hidden layer on a sample of the moons grid, five seeds."""
    return Grid(layer=("conv", "dense"), depths=(10, 60, 120), widths=(2, 5, 25), groups=("2-5", "25"), seeds=5)


@preset
def mnist() -> Grid:
    """The MNIST grid: 3 x 3 convolutions, 2, 4 and 8 channels, 10 depths up to 68; needs the data.

    Cost: days on two cores; choose cells.
    As published: Adam 1e-3, batch 1,024, 50 epochs, lambda 1e-8.
    """
    return Grid(
        kind="images",
        datasets=("mnist",),
        methods=("relu", "relu-bn", "UP"),
        widths=(2, 4, 8),
        depths=(2, 4, 12, 20, 28, 36, 44, 52, 60, 68),
        epochs=50,
        lr=(1e-3,),
        batch=1024,
        coefficient=1e-8,
    )


@preset
def cifar10() -> Grid:
    """The CIFAR-10 grid: depths 10, 20, 30 x 7 widths, two learning rates, four penalties; needs the data.

    Cost: an accelerator's work.
    As published: batch 128, 400 epochs, Adam, no augmentation, every weighted layer penalized.
    """
    return Grid(
        kind="images",
        datasets=("cifar10",),
        methods=("relu", "norm:0.001", "norm:0.1", "mean:0.1", "mean:1"),
        widths=(2, 8, 16, 32, 64, 96, 192),
        depths=(10, 20, 30),
        epochs=400,
        lr=(1e-3, 1e-4),
        batch=128,
    )


@preset
def cifar100() -> Grid:
    """The CIFAR-100 networks, thin and deep against wide and shallow; needs the data.

    The claim: 20x8 beats 10x16, and 20x32 beats 10x64. Settings as for cifar10.
    """
    return dataclasses.replace(
        cifar10(),
        datasets=("cifar100",),
        shapes=("20x8", "10x16", "20x32", "10x64", "20x16", "10x32", "20x64", "10x8"),
    )


@preset
def uci() -> Grid:
    """50 dense layers of 4 units on four small tables, five techniques, five seeds: who wins.

    Cost: about 45 minutes on two cores.
    Settings of the 2025 study: learning rate .01, batch 256, lambda .01, aggregate ``balanced``.
    """
    return Grid(
        kind="tables",
        datasets=("iris", "wine", "breast_cancer", "digits"),
        methods=("baseline", "jumpstart", "batchnorm", "skip", "gelu"),
        widths=(4,),
        depths=(50,),
        seeds=5,
        epochs=4000,
        batch=256,
        coefficient=1e-2,
    )


@preset
def prune_and_jumpstart() -> Grid:
    """An MLP on digits, pruned and fine-tuned with and without the penalty: dead units, alpha.

    Cost: about two minutes on one core.
    Beyond the papers: does the penalty in fine-tuning keep units alive, and does that lower alpha?
    """
    return Grid(
        kind="pruning",
        datasets=("digits",),
        methods=("baseline", "jumpstart"),
        widths=(300,),
        depths=(2,),
        seeds=10,
        epochs=20,
        batch=64,
        lr=(1e-3,),
        coefficient=1e-2,
    )
