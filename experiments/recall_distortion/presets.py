"""Presets of the recall-distortion studies, with their cost and expected results.

Settings follow Good et al., "Recall Distortion in Neural Network Pruning and the Undecayed Pruning
Algorithm", NeurIPS 2022 (arXiv 2206.02976), and the code of its 30-replicate runs. They were fixed before any run.
"""

import dataclasses
import functools

from experiments.cli.presets import Presets
from experiments.recall_distortion.config import Running, Study

_LENET = Study(
    model="lenet",
    ratios=(1, 2, 4, 10, 20, 50),
    scores=("magnitude", "undecayed", "random", "gradient", "undecayed-signed"),
    epochs=(30,),
    lr=(0.01,),
    finetune_epochs=(15,),
    finetune_lr=(0.01,),
)
_RESNET = dataclasses.replace(
    _LENET,
    epochs=(10, 20, 10, 10, 10),
    lr=(0.01, 0.1, 0.01, 0.001, 0.0001),
    finetune_epochs=(10, 5, 5, 5),
    finetune_lr=(0.1, 0.01, 0.001, 0.0001),
    augment=True,
)

_PRESETS: Presets[Study] = Presets()
names, get, describe, listing = _PRESETS.names, _PRESETS.get, _PRESETS.describe, _PRESETS.listing

_RUNNING = {"demo": Running(chunk=30, form="vmap", loop="scan")}


def running(name: str) -> Running:
    """Return the default run options of a preset: for ``demo`` one batch of 30 networks, the fastest form measured."""
    return _RUNNING.get(name, Running())


@_PRESETS.preset
def demo() -> Study:
    """Thirty small networks on scikit-learn's digits, with and without the jumpstart penalty.

    Command: make demo
    Cost: under two minutes on 2 CPU cores; no download.
    Expect: dense accuracy near .973; with 450 test images most intervals of alpha contain 1.

    The learning rate is the best of .03, .1 and .3 by the validation loss of dense training; fine-tuning
    takes half the epochs, as in the paper. The coefficient is the smallest power of ten that leaves under
    .1% of the hidden units dead, chosen without looking at alpha.
    """
    return Study(jumpstart=(0.0, 0.1), epochs=(12,), lr=(0.1,), finetune_epochs=(6,), finetune_lr=(0.1,), batch=64)


@_PRESETS.preset
def fashion_lenet() -> Study:
    """LeNet (60,074 parameters) on Fashion-MNIST.

    Command: python -m experiments.recall_distortion --preset fashion-lenet
    Cost: 177,000 steps per replicate (30 epochs, then 26 times 15): .15 hours per replicate on 2 CPU cores,
    about .1 hours for all 30 on one NVIDIA H200.
    Expect, for magnitude: median alpha .96, .97, .99, 1.08 at t = 2, 4, 10, 20 (published .95, .96, .98, 1.05); at
    t = 50, 24 of 30 networks at chance (published median 1.89, with 350 weights instead of 125).
    """
    return dataclasses.replace(_LENET, dataset="fashion_mnist")


@_PRESETS.preset
def mnist_lenet() -> Study:
    """LeNet (60,074 parameters) on MNIST.

    Command: python -m experiments.recall_distortion --preset mnist-lenet
    Cost: 177,000 steps per replicate (30 epochs, then 26 times 15): .15 hours per replicate on 2 CPU cores,
    about .1 hours for all 30 on one NVIDIA H200.
    Expect, for magnitude: median alpha .69, .72, .65, .87 at t = 2, 4, 10, 20 (published .47, .50, .60, .80); at
    t = 50, 29 of 30 networks at chance (published median 5.29, with 350 weights instead of 125).
    """
    return dataclasses.replace(_LENET, dataset="mnist")


_FEW = (60, 125, 250, 350, 600, 1200)  # weights kept, of 58,998
_LENET_SIZES = (60_074, 58_998)  # parameters, prunable weights


@_PRESETS.preset
def fashion_few_weights() -> Study:
    """LeNet on Fashion-MNIST, pruned to 60, 125, 250, 350, 600 and 1,200 of 58,998 weights.

    Command: python -m experiments.recall_distortion --preset fashion-few-weights
    Cost: 133,000 steps per replicate (30 epochs, then 19 times 15): .1 hours per replicate on 2 CPU cores. The dense
    networks are those of fashion-lenet: with --out runs/fashion-lenet they are not trained again.
    Expect: dense accuracy .899; with 125 weights 28 of 30 networks at chance after magnitude and 17 after undecayed
    pruning (24 and 11 of the networks of fashion-lenet, which were trained on other processors).

    Question R14 of docs/reproduction.md. With --min-keep 10, which fashion-few-weights-floor sets, no layer is
    emptied.
    """
    total, prunable = _LENET_SIZES
    ratios = [total / (total - prunable + keep) for keep in reversed(_FEW)]
    return dataclasses.replace(
        _LENET, dataset="fashion_mnist", scores=("magnitude", "undecayed", "gradient"), ratios=(1, *ratios)
    )


@_PRESETS.preset
def fashion_few_weights_floor() -> Study:
    """LeNet on Fashion-MNIST, pruned to 60 to 1,200 weights, with at least 10 in every layer.

    Command: python -m experiments.recall_distortion --preset fashion-few-weights-floor
    Cost: 133,000 steps per replicate, as fashion-few-weights: .1 hours per replicate on 2 CPU cores.
    Expect: dense accuracy .899; after magnitude and undecayed pruning 19 and 13 of 30 networks at chance with 60
    weights, 13 and 5 with 125, none with 250 or more.
    """
    return dataclasses.replace(fashion_few_weights(), min_keep=10)


@_PRESETS.preset
def fashion_changed() -> Study:
    """LeNet on Fashion-MNIST, with changes other than pruning, and not fine-tuned.

    Command: python -m experiments.recall_distortion --preset fashion-changed --rounding 4
    Cost: 12,600 steps per replicate (30 epochs): .01 hours per replicate on 2 CPU cores; with --rounding and --out
    runs/fashion-lenet the dense networks are those of fashion-lenet.
    Expect: dense accuracy .898.

    Question R13 of docs/reproduction.md: run it with --rounding 8, with --rounding 4, with fewer --epochs and with
    --label-noise, the last two at the levels whose validation accuracy is that of magnitude pruning at t = 10 and 20.
    """
    return dataclasses.replace(
        _LENET, dataset="fashion_mnist", scores=("magnitude",), ratios=(1,), finetune_epochs=(0,)
    )


_CIFAR = {
    "cifar10-resnet20": (
        "ResNet-20 (269,722 parameters) on CIFAR-10",
        ".95, 1.02, 1.22, 1.57, 2.56",
        ".93, .97, 1.16, 1.44, 2.27",
    ),
    "cifar10-resnet32": ("ResNet-32 on CIFAR-10", ".97, 1.00, 1.16, 1.44, 2.11", ".94, .98, 1.11, 1.31, 1.95"),
    "cifar10-resnet44": ("ResNet-44 on CIFAR-10", ".98, .99, 1.12, 1.34, 1.95", ".92, .96, 1.07, 1.25, 1.77"),
    "cifar10-resnet56": (
        "ResNet-56 (853,018 parameters) on CIFAR-10; dense accuracy .8925, standard deviation .0095",
        ".93, .96, 1.06, 1.25, 1.85",
        ".93, .93, 1.00, 1.16, 1.56",
    ),
    "cifar10-resnet110": ("ResNet-110 on CIFAR-10", ".94, .95, 1.03, 1.22, 1.66", ".88, .90, .98, 1.08, 1.33"),
    "cifar100-resnet56": ("ResNet-56 on CIFAR-100", ".95, .99, 1.11, 1.30, 1.91", ""),
}  # preset: title, published median alpha of magnitude, of undecayed


def _cifar(name: str) -> Study:
    """Return the settings of a preset DATASET-MODEL."""
    dataset, model = name.split("-")
    return dataclasses.replace(_RESNET, dataset=dataset, model=model)


# Hours of a replicate on 2 CPU cores: the measured step of ResNet-20, times the operations of the forward pass.
_CPU_HOURS = {"resnet20": 36, "resnet32": 61, "resnet44": 84, "resnet56": 109, "resnet110": 218}

for _name, (_title, _magnitude, _undecayed) in _CIFAR.items():
    _PRESETS.add(
        _name,
        functools.partial(_cifar, _name),
        f"""{_title}.

Command: python -m experiments.recall_distortion --preset {_name}
Cost: 249,000 steps per replicate (60 epochs, then 26 times 25); by the measured step of ResNet-20 about
{_CPU_HOURS[_name.partition("-")[2]]} hours per replicate on 2 CPU cores, so use an accelerator.
Expect (published): for magnitude, median alpha {_magnitude}"""
        + (f"; for undecayed\n{_undecayed}," if _undecayed else "")
        + " at a nominal t of 2, 4, 10, 20, 50;\nits code keeps more weights there (--counting shrinkbench).",
    )


@_PRESETS.preset
def cifar10_resnet20_short() -> Study:
    """ResNet-20 (269,722 parameters) on CIFAR-10 with a short schedule: one learning-rate cycle of 15 epochs.

    Command: python -m experiments.recall_distortion --preset cifar10-resnet20-short
    Cost: 12,987 steps per replicate (15 epochs, then 11 times 2): by the measured step of ResNet-20, 1.9 hours per
    replicate on 2 CPU cores (.52 s per step) and 3 hours on one core of another machine (.84 s).
    Expect: dense test accuracy .843, and for magnitude mean alpha .99, 1.09, 1.15, 1.50, 2.39 at t = 2, 4, 10, 20, 50
    (three networks). Published, with ResNet-56 and a longer schedule: .8925 (standard deviation .0095), and median
    alpha .95, 1.02, 1.22, 1.57, 2.56. For gradient, with three other networks: 1.02, 1.06, 1.41, 1.87, 2.66.

    The networks were trained on JPEG copies of the images; the originals may give a higher accuracy and other
    alphas. --epochs 45 may come closer to the published accuracy (not yet measured) and costs 1.8 times as much.

    Decay, and peak in proportion to the batch, are those of fast CIFAR-10 training (Page, "How to train your
    ResNet", 2018). His batch of 512 gave the same validation accuracy (.846). Add the other scores with
    --scores magnitude undecayed random gradient.
    """
    return dataclasses.replace(
        _cifar("cifar10-resnet20"),
        scores=("magnitude", "undecayed"),
        schedule="one-cycle",
        epochs=(15,),
        lr=(0.1,),
        finetune_epochs=(2,),
        finetune_lr=(0.025,),
    )


@_PRESETS.preset
def digits_finetune_jumpstart() -> Study:
    """An MLP on digits, pruned by magnitude and fine-tuned without and with the jumpstart penalty.

    Command: python -m experiments.recall_distortion --preset digits-finetune-jumpstart
    Cost: about three minutes on 2 CPU cores; no download.
    Expect: dense accuracy near .97. With the similar former preset prune-and-jumpstart (docs/reproduction.md), the
    penalty in fine-tuning removed the dead units, .05 of all, up to t = 5 and none from t = 10 on, and was not shown
    to change alpha.
    """
    return Study(
        ratios=(1, 2, 5, 10, 20, 30),
        scores=("magnitude",),
        model="dense",
        model_options=("depth=2", "width=300"),
        finetune_jumpstart=(0.0, 1e-2),
        replicates=10,
        epochs=(20,),
        lr=(1e-3,),
        finetune_epochs=(10,),
        finetune_lr=(1e-3,),
        optimizer="adam",
        weight_decay=0.0,
        batch=64,
    )
