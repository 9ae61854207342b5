"""The moons grid: thin, deep networks on 85 points, all widths of a depth in a few programs.

The settings are those of the authors' notebooks: full-batch Adam, binary cross-entropy, Glorot-uniform kernels, zero
biases, and the penalty of the hidden layers only. Inferred settings are marked in ``thin_stack`` and ``thin_networks``.
"""

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jprune
from experiments.data import datasets
from experiments.jumpstart_grid import pruned, thin_networks
from experiments.jumpstart_grid.cells import GridStage, coefficient_of, columns, floor, state_columns, technique_of
from experiments.jumpstart_grid.config import Grid, GridRunning
from experiments.jumpstart_grid.thin_networks import Problem, ThinRecipe, ThinRun, ThinState
from experiments.jumpstart_grid.thin_stack import Architecture, Axis
from experiments.storage import checkpoints
from experiments.storage.checkpoints import Checkpoints
from experiments.storage.files import JSON
from jprune.jumpstart.layers import Stack

UNIT = "layer-epochs"
SMALL_STEPS = True
DROPOUT_EPOCHS = 1000  # the rate of thin_networks.dropout_rate is 0 from here on
VERSION = 3  # of the program; another rounding trains other networks, whose stages must not be mixed with these
DROPOUT_VERSION = 4  # of methods with dropout; in version 3 a network depended on the others of its program
_CHUNK = 250


class MoonsMethod(NamedTuple):
    """The changes of a method to the architecture and the recipe."""

    penalized: tuple[Axis, ...] = ()
    balance: float = 0.5
    normalized: bool = False
    zero: bool = False
    dropout: bool = False


METHODS = {
    "relu": MoonsMethod(),
    "relu-bn": MoonsMethod(normalized=True),
    "P": MoonsMethod(("point",)),
    "U": MoonsMethod(("unit",)),
    "UP": MoonsMethod(("unit", "point")),
    "UP-zero": MoonsMethod(("unit", "point"), balance=0.51, zero=True, dropout=True),
}


def plan(grid: Grid) -> list[GridStage]:
    """Plan one stage per layer form, method, depth and group of widths, shallow networks first.

    Raises:
      ValueError: a method is unknown, several learning rates or another data set are given, or groups overlap.
    """
    if len(grid.lr) != 1:
        raise ValueError(f"lr={grid.lr} must be one value for kind='moons'")
    if grid.datasets != ("moons",):
        raise ValueError(f"datasets={grid.datasets} must be moons for kind='moons'")
    planned = []
    for layer in grid.layer:
        for method in grid.methods:
            for depth in sorted({depth for depth, _ in grid.sizes}):
                for widths in _grouped(grid, sorted(width for d, width in grid.sizes if d == depth)):
                    settings = _settings(grid, layer, method, depth, widths)
                    work = depth * grid.epochs * len(widths) * grid.seeds
                    title = f"{method} ({layer}), depth {depth}, widths {', '.join(map(str, widths))}"
                    planned.append(GridStage(title, settings, range(grid.seeds), work))
    return sorted(planned, key=lambda stage: stage.settings["depth"])


def carry_out(
    running: GridRunning, stage: GridStage, advance: Callable[[int], None], kept: Checkpoints | None = None
) -> dict[str, dict[str, Sequence[object]]]:
    """Train the networks of a stage.

    Args:
      running: not used; the points are part of this package.
      stage: stage of the plan.
      advance: called with the amount of finished work.
      kept: checkpoints of the stage, of which the latest is continued.

    Returns:
      Columns of the tables ``cells``, a row for each network; ``statuses``, the status of each of its units
      (depth * width, layer by layer) and points (depth * 85) as int8; and, if it prunes, ``pruned``, a row for each
      network and ratio.
    """
    began = time.perf_counter()
    settings = stage.settings
    arch, recipe = design(settings)
    runs = [ThinRun(width, seed) for seed in stage.seeds for width in settings["widths"]]
    problem = Problem(*points(), thin_networks.real_channels(arch, runs))
    done, state = checkpoints.restored(kept, thin_networks.start(arch, recipe, runs))
    programs: dict[tuple[ThinRecipe, int], jax.stages.Compiled] = {}
    while done < settings["epochs"]:
        dropping = recipe.dropout and done < DROPOUT_EPOCHS
        epochs = min(_CHUNK, (DROPOUT_EPOCHS if dropping else settings["epochs"]) - done, settings["epochs"] - done)
        phase = ThinRecipe(recipe.learning_rate, recipe.zero, dropping, recipe.adam_epsilon)
        if (phase, epochs) not in programs:  # compiled here, so that the program is freed with the stage
            lowered = thin_networks.train.lower(arch, phase, epochs, state, problem)
            programs[phase, epochs] = lowered.compile()
        state = jax.block_until_ready(programs[phase, epochs](state, problem))
        done += epochs
        advance(epochs * arch.depth * len(runs))
        if done < settings["epochs"]:
            checkpoints.keep(kept, done, state)
    tables = _tables(settings, arch, state, problem, runs)
    tables["cells"]["seconds"] = [(time.perf_counter() - began) / len(runs)] * len(runs)
    return tables


def design(settings: Mapping[str, JSON]) -> tuple[Architecture, ThinRecipe]:
    """Return the architecture and the recipe of a stage."""
    method = METHODS[technique_of(settings["method"])]
    arch = Architecture(
        depth=settings["depth"],
        width=max(settings["widths"]),
        train=len(datasets.load("moons").train.labels),
        layer=settings["layer"],
        normalized=method.normalized,
        penalized=method.penalized,
        balance=method.balance,
        coefficient=settings["coefficient"],
    )
    return arch, ThinRecipe(settings["lr"], method.zero, method.dropout)


def parameters(arch: Architecture, width: int) -> int:
    """Return the number of parameters of a thin network.

    >>> parameters(Architecture(depth=2, width=3, train=85, layer="dense"), 3)
    25
    """
    places = arch.positions
    hidden = places * (2 // places) * width + (arch.depth - 1) * places * width**2 + arch.depth * width
    return hidden + (2 * arch.depth * width if arch.normalized else 0) + places * width + 1


def points() -> tuple[jax.Array, jax.Array]:
    """Return the inputs (2, 100) and labels (100,), with the 85 training points first."""
    moons = datasets.load("moons")
    inputs = np.concatenate([moons.train.images, moons.validation.images]).T
    labels = np.concatenate([moons.train.labels, moons.validation.labels]).astype(np.float32)
    return jnp.asarray(inputs), jnp.asarray(labels)


def _tables(settings, arch, state: ThinState, problem, runs):
    """Return the tables of trained networks; the last validation accuracy is that of the final weights."""
    inputs, labels = np.asarray(problem.inputs), np.asarray(problem.labels)
    best, last = np.asarray(state.best), jax.tree.map(np.asarray, state.last)
    cells, statuses, after = [], [], []
    for index, run in enumerate(runs):
        preactivations, logits = thin_networks.forward_alone(arch, state, index, run, inputs)
        val_last = float(((logits > 0) == (labels > 0.5))[arch.train :].mean())
        layers = Stack(preactivations[:, : arch.train])
        units, in_points = jprune.unit_status(layers), jprune.jumpstart.point_status(layers)
        activity = jprune.jumpstart.activity(units, in_points)
        cells.append(
            {
                "dataset": "moons",
                "method": settings["method"],
                "layer": settings["layer"],
                "width": run.width,
                "depth": arch.depth,
                "replicate": run.seed,
                "floor": floor(labels[: arch.train].astype(np.int32)),
                "parameters": parameters(arch, run.width),
                "epochs": settings["epochs"],
                "train_acc": float(best[0, index]),
                "val_acc": max(float(best[1, index]), val_last),
                "train_acc_last": float(last.train_accuracy[index]),
                "val_acc_last": val_last,
                "loss_last": float(last.loss[index]),
                "penalty_last": float(last.penalty[index]),
                **state_columns(activity),
            }
        )
        statuses.append(
            {
                "method": settings["method"],
                "replicate": run.seed,
                "layer": settings["layer"],
                "width": run.width,
                "depth": arch.depth,
                "units": np.asarray(units.values).ravel(),
                "points": np.asarray(in_points.values).ravel(),
            }
        )
        if "prune" in settings:
            kernels = thin_networks.kernels_alone(arch, state, index, run)
            alone = partial(thin_networks.forward_alone, arch, state, index, run, inputs[:, : arch.train])
            accuracy = partial(_accuracy, alone, labels[: arch.train])
            after += pruned.rows(cells[-1], kernels, settings["prune"], accuracy)
    tables = {"cells": columns(cells), "statuses": columns(statuses)}
    return {**tables, "pruned": columns(after)} if after else tables


def _accuracy(alone, labels, masks) -> float:
    """Return the fraction of labels that a network with these masks predicts correctly."""
    _, logits = alone(masks=masks)
    return float(((logits > 0) == (labels > 0.5)).mean())


def _settings(grid: Grid, layer: str, method: str, depth: int, widths: list[int]) -> dict[str, JSON]:
    coefficient = coefficient_of(method, grid.coefficient, {n: bool(m.penalized) for n, m in METHODS.items()})
    settings = {
        "dataset": "moons",
        "version": DROPOUT_VERSION if METHODS[technique_of(method)].dropout else VERSION,
        "method": method,
        "layer": layer,
        "depth": depth,
        "widths": widths,
        "epochs": grid.epochs,
        "lr": grid.lr[0],
        "coefficient": coefficient,
    }
    return {**settings, "prune": list(grid.prune)} if grid.prune else settings


def _grouped(grid: Grid, widths: list[int]) -> list[list[int]]:
    """Split widths into those that share a program."""
    spans = []
    for group in grid.groups:
        low, _, high = group.partition("-")
        if not (low.isdecimal() and (high or low).isdecimal() and int(low) <= int(high or low)):
            raise ValueError(f"groups={grid.groups}: {group!r} must be WIDTH or FROM-TO, such as 2-5")
        spans.append(range(int(low), int(high or low) + 1))
    groups: dict[Hashable, list[int]] = {}
    for width in widths:
        containing = [i for i, span in enumerate(spans) if width in span]
        if len(containing) > 1:
            raise ValueError(f"groups={grid.groups} overlap: width {width} is in {len(containing)} of them")
        groups.setdefault(containing[0] if containing else f"width {width}", []).append(width)
    return list(groups.values())
