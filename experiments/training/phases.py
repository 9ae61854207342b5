"""Phases of training as programs over many replicates, and predictions likewise.

The steps of an epoch are scanned in one program or called from the host, whichever is faster; the
numbers are the same. The host never waits for the device within an epoch.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import datasets
from experiments.training import replicates
from experiments.training.steps import (
    EpochMetrics,
    EpochState,
    Recipe,
    TrainState,
    Where,
    begin,
    close_epoch,
    learn,
    open_epoch,
    optimizer,
    steps_per_epoch,
    validate,
)
from experiments.training.tasks import PyTree, Task, predict_slice, slices


class Phase(NamedTuple):
    """A phase compiled for many replicates; every tree has the replicate axis first.

    Attributes:
      recipe: what it trains.
      begin: (params, stats, key) -> TrainState.
      epoch: (TrainState, int32 epoch, train split, validation split) -> (TrainState, EpochMetrics);
        consumes the state.
    """

    recipe: Recipe
    begin: Callable[..., TrainState]
    epoch: Callable[..., tuple[TrainState, EpochMetrics]]


def compile_phase(
    task: Task, recipe: Recipe, where: Where, layout: replicates.Layout, *, examples: int, validation: int
) -> Phase:
    """Spread a phase over replicates; programs are compiled when they are first called.

    Args:
      task: what is learnt.
      recipe: how.
      where: predicate of the prunable leaves, whose zeros at the beginning stay zero.
      layout: where replicates run, and whether an epoch is one program or a host loop of steps.
      examples: of the training split.
      validation: examples of the validation split.
    """
    steps = steps_per_epoch(recipe, examples)
    pieces, size = slices(validation)
    tx = optimizer(task, recipe, steps, where)

    def opening(state: TrainState, epoch: jax.Array) -> EpochState:
        return open_epoch(state, epoch, examples)

    def step(state: EpochState, position: jax.Array, split: datasets.Split) -> EpochState:
        return learn(task, tx, state, position, split, batch=recipe.batch)

    def check(state: EpochState, position: jax.Array, split: datasets.Split) -> EpochState:
        return validate(task, state, position, split, size=size)

    def closing(state: EpochState, epoch: jax.Array) -> tuple[TrainState, EpochMetrics]:
        return close_epoch(state, epoch, steps, validation)

    def scanned(
        state: TrainState, epoch: jax.Array, train: datasets.Split, held: datasets.Split
    ) -> tuple[TrainState, EpochMetrics]:
        inner = opening(state, epoch)
        inner, _ = jax.lax.scan(lambda s, i: (step(s, i, train), None), inner, jnp.arange(steps))
        inner, _ = jax.lax.scan(lambda s, i: (check(s, i, held), None), inner, jnp.arange(pieces))
        return closing(inner, epoch)

    spread = lambda fn, donate=True: replicates.spread(fn, layout, donate=donate)
    opens, stepped, checked, closes = map(spread, (opening, step, check, closing))

    def looped(
        state: TrainState, epoch: jax.Array, train: datasets.Split, held: datasets.Split
    ) -> tuple[TrainState, EpochMetrics]:
        inner = opens(state, epoch)
        for position in range(steps):
            inner = stepped(inner, np.int32(position), train)
        for position in range(pieces):
            inner = checked(inner, np.int32(position), held)
        return closes(inner, epoch)

    begins = spread(lambda entering: begin(tx, *entering), donate=False)
    return Phase(recipe, begins, spread(scanned) if layout.epoch == "scan" else looped)


def fit(
    phase: Phase,
    entering: tuple[PyTree, PyTree, jax.Array],
    train: datasets.Split,
    validation: datasets.Split,
    on_epoch: Callable[[], None] = lambda: None,
) -> tuple[TrainState, list[EpochMetrics]]:
    """Train many replicates through a phase.

    Args:
      phase: compiled.
      entering: params, stats and keys, each with the replicate axis first.
      train: split on the devices.
      validation: split on the devices.
      on_epoch: called once an epoch, when the one before has ended: the device never waits for the host.

    Returns:
      the state after the last epoch, and the metrics of each.
    """
    state = phase.begin(entering)
    metrics: list[EpochMetrics] = []
    for epoch in range(phase.recipe.total_epochs):
        state, measured = phase.epoch(state, np.int32(epoch), train, validation)
        if metrics:
            jax.block_until_ready(metrics[-1])
        on_epoch()
        metrics.append(measured)
    return state, metrics


def compile_predict(task: Task, layout: replicates.Layout, examples: int) -> Callable[..., jax.Array]:
    """Spread predicting a split over replicates.

    Args:
      task: gives the logits.
      layout: as for training.
      examples: of the split.

    Returns:
      ((params, stats), images) -> (replicates, examples) int32.
    """
    pieces, size = slices(examples)
    surplus = pieces * size - examples

    def piece(replicate: tuple[PyTree, PyTree], position: jax.Array, images: jax.Array) -> jax.Array:
        return predict_slice(task, replicate, images, position, size)

    def scanned(replicate: tuple[PyTree, PyTree], images: jax.Array) -> jax.Array:
        return jax.lax.map(lambda i: piece(replicate, i, images), jnp.arange(pieces))

    compiled = replicates.spread(scanned if layout.epoch == "scan" else piece, layout)

    def predict(replicate: tuple[PyTree, PyTree], images: jax.Array) -> jax.Array:
        if layout.epoch == "scan":
            found = compiled(replicate, images)
        else:
            found = jnp.stack([compiled(replicate, np.int32(i), images) for i in range(pieces)], 1)
        return jnp.concatenate([found[:, :-1].reshape(len(found), -1), found[:, -1, surplus:]], 1)

    return predict
