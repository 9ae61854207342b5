"""Presets of the jumpstart grids, with their cost and expected results.

Settings follow Riera, Rey, Serra, Puertas, Pujol, "Training Thinner and Deeper Neural Networks: Jumpstart
Regularization", CPAIOR 2022 (arXiv 2201.12795), and Riera, Puertas, Pujol, "Unit-Centric Regularization
for Efficient Deep Neural Networks", IEEE Access 2025. They were fixed before any run.
"""

import dataclasses

from experiments.cli.presets import Presets
from experiments.jumpstart_grid.config import Grid

_PRESETS: Presets[Grid] = Presets()
_PRUNE = (1.5, 2.0, 4.0, 10.0)
preset, names = _PRESETS.preset, _PRESETS.names
describe, listing = _PRESETS.describe, _PRESETS.listing


def get(name: str) -> Grid:
    """The settings of a preset.

    Raises:
      ValueError: no preset has this name.
    """
    if name == "prune-and-jumpstart":
        raise ValueError(
            f"preset={name!r} is now python -m experiments.recall_distortion --preset digits-finetune-jumpstart; "
            "stored results of the old preset are not used"
        )
    return _PRESETS.get(name)


@preset
def moons_subset() -> Grid:
    """Depths 1, 10, 60, 120 x 9 widths x {relu, UP} on moons: 72 cells, one seed.

    Cost: about 8 minutes on 2 CPU cores.
    Expect: a training accuracy of .9 or more in 30 of the 36 cells with UP and in 15 with relu,
    which stays at the floor of .518 from depth 60 on (published).
    """
    return Grid()


@preset
def moons() -> Grid:
    """The whole moons grid of the 2022 study: 9 widths x 13 depths x 6 methods, 702 cells, one seed.

    Cost: about 45 minutes on 2 CPU cores.
    Expect: a training accuracy of .9 or more in 96 of the 117 cells with UP, 76 with UP-zero, 19 with relu (published).
    """
    return Grid(methods=("relu", "relu-bn", "P", "U", "UP", "UP-zero"), depths=(1, *range(10, 121, 10)))


@preset
def moons_seeds() -> Grid:
    """Relu and UP of the moons grid with five seeds, to see how much a single cell varies.

    Cost: about 80 minutes on 2 CPU cores.
    """
    return dataclasses.replace(moons(), methods=("relu", "UP"), seeds=5)


@preset
def moons_layers() -> Grid:
    """Convolutional and dense hidden layers on a sample of the moons grid, five seeds.

    Cost: about 20 minutes on 2 CPU cores.
    """
    return Grid(layer=("conv", "dense"), depths=(10, 60, 120), widths=(2, 5, 25), groups=("2-5", "25"), seeds=5)


@preset
def moons_pruned() -> Grid:
    """Thin, deep networks on moons, pruned after training: 3 methods x depth 20 and 44 x width 2 and 8, five seeds.

    Cost: about 5 minutes on one CPU core.
    Expect: UP trains 17 of 20 networks to .9, 7 of which still reach it at t = 1.5. Beyond the papers: question J5 of
    docs/reproduction.md, whether networks that were trained with jumpstart can be pruned further.
    """
    return Grid(methods=("relu", "relu-bn", "UP"), depths=(20, 44), widths=(2, 8), seeds=5, prune=_PRUNE)


@preset
def mnist_pruned() -> Grid:
    """The networks of moons-pruned on MNIST: 60 networks, 50 epochs each; needs the data.

    Cost: about 45 minutes on one CPU core for a network of depth 20 and width 2, by the measured time of a step; 2
      minutes (depth 20) to 3 minutes (depth 44) on one NVIDIA H200.
    Expect: at depth 20 and width 2, UP trains 5 of 5 networks to .9 and relu-bn 4 of 5; none still reaches it at
      t = 1.5. Beyond the papers: question J5 of docs/reproduction.md.
    """
    return dataclasses.replace(mnist(), depths=(20, 44), widths=(2, 8), seeds=5, prune=_PRUNE)


@preset
def mnist() -> Grid:
    """The MNIST grid: 3 x 3 convolutions, 2, 4 and 8 channels, 10 depths up to 68; needs the data.

    Cost: 90 networks; choose a part of the cells. One of depth 20 and width 2 takes about 45 minutes on one CPU
      core, by the measured time of a step, or 2 minutes on one NVIDIA H200; one of depth 44
      takes 3 minutes on the H200.
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

    Cost: 210 networks of 156,000 steps; not measured. From operations and the measured step of ResNet-20, the one of
      depth 30 and width 192 would take 5,600 hours on 2 CPU cores: use accelerators, and choose a part of the cells.
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
def cifar10_notebook() -> Grid:
    """The 18 published cells of width 10 on CIFAR-10, depths 2 to 75, with the published numbers; needs the data.

    Cost: 21 networks; not measured. Expect more than the 2 minutes (depth 20) to 3 minutes (depth 44) that a network
      of width 2 takes on MNIST on one NVIDIA H200.
    Expect: a training accuracy of .68 with UP at depth 40, where relu is at chance (published).
    The notebook is in Keras. Batch, epochs, learning rate and lambda are those of the MNIST grid [inferred]; the output
    layer is that of the preset cifar10, because the notebook's is not known. Its deepest UP network has depth 40.
    """
    return dataclasses.replace(mnist(), datasets=("cifar10",), widths=(10,), depths=(2, 10, 25, 30, 40, 50, 75))


@preset
def cifar100() -> Grid:
    """The CIFAR-100 networks, thin and deep against wide and shallow; needs the data.

    Cost: 80 networks of 156,000 steps; not measured. From operations and the measured step of ResNet-20, the one of
      depth 20 and width 64 would take 410 hours on 2 CPU cores: use accelerators.
    The claim: 20x8 beats 10x16, and 20x32 beats 10x64. Settings as for cifar10.
    """
    return dataclasses.replace(
        cifar10(),
        datasets=("cifar100",),
        shapes=("20x8", "10x16", "20x32", "10x64", "20x16", "10x32", "20x64", "10x8"),
    )


@preset
def uci() -> Grid:
    """50 dense layers of 4 units on four small tables, five methods, five seeds: wins, draws and losses.

    Cost: about 45 minutes on 2 CPU cores.
    Settings of the 2025 study: learning rate .01, batch 256, lambda .01, aggregate balanced. The tables are those
    of scikit-learn; give the others of the study as files: --datasets table:abalone.csv npz:glass.npz.
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
