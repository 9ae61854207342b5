"""Training phases and predictions as programs over many replicates.

The steps of an epoch are scanned in one program or called from the host, with the same results. The host waits for the
device only for the metrics of an epoch, when it has already dispatched the next epoch or its first steps.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import PyTree

from experiments.data import datasets
from experiments.storage import checkpoints
from experiments.storage.checkpoints import Checkpoints
from experiments.training import replicates
from experiments.training.steps import (
    EpochMetrics,
    EpochState,
    Recipe,
    TrainState,
    begin,
    close_epoch,
    learn,
    open_epoch,
    optimizer,
    steps_per_epoch,
    validate,
)
from experiments.training.tasks import Task, predict_slice, slices
from jprune.trees import Where

_AHEAD = 8  # steps of a host loop that the device has left to do while the host reports the epoch before


class Phase(NamedTuple):
    """A training phase over many replicates; every tree has a leading replicate axis.

    Attributes:
      recipe: training recipe.
      begin: (params, stats, key) or (params, stats, key, masks) -> TrainState.
      epoch: (TrainState, int32 epoch, train split, validation split) -> (TrainState, EpochMetrics);
        donates the state. In a host loop, it calls only the first steps and returns their state.
      mesh: devices of the replicates.
      rest: in a host loop, the rest of the epoch, with the same arguments; otherwise None.
    """

    recipe: Recipe
    begin: Callable[..., TrainState]
    epoch: Callable[..., tuple[TrainState, EpochMetrics] | EpochState]
    mesh: Mesh
    rest: Callable[..., tuple[TrainState, EpochMetrics]] | None = None


def compile_phase(
    task: Task, recipe: Recipe, where: Where, placement: replicates.Placement, *, examples: int, validation: int
) -> Phase:
    """Build the programs of a phase; they are compiled when they are first called.

    Args:
      task: task that computes loss and logits.
      recipe: recipe of the phase.
      where: predicate of the leaves that have a mask.
      placement: where replicates run, and whether an epoch is one program or a host loop of steps.
      examples: number of training examples.
      validation: number of validation examples.
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
        state: TrainState, epoch: jax.Array, train: datasets.Split, validation_split: datasets.Split
    ) -> tuple[TrainState, EpochMetrics]:
        inner = opening(state, epoch)
        inner, _ = jax.lax.scan(lambda s, i: (step(s, i, train), None), inner, jnp.arange(steps))
        inner, _ = jax.lax.scan(lambda s, i: (check(s, i, validation_split), None), inner, jnp.arange(pieces))
        return closing(inner, epoch)

    spread = lambda fn, donate=True: replicates.spread(fn, placement, donate=donate)
    opens, stepped, checked, closes = map(spread, (opening, step, check, closing))

    def first_steps(
        state: TrainState, epoch: jax.Array, train: datasets.Split, validation_split: datasets.Split
    ) -> EpochState:
        inner = opens(state, epoch)
        for position in range(min(_AHEAD, steps)):
            inner = stepped(inner, np.int32(position), train)
        return inner

    def other_steps(
        inner: EpochState, epoch: jax.Array, train: datasets.Split, validation_split: datasets.Split
    ) -> tuple[TrainState, EpochMetrics]:
        for position in range(_AHEAD, steps):
            inner = stepped(inner, np.int32(position), train)
        for position in range(pieces):
            inner = checked(inner, np.int32(position), validation_split)
        return closes(inner, epoch)

    begins = spread(lambda entering: begin(tx, *entering), donate=False)
    if placement.epoch == "scan":
        return Phase(recipe, begins, spread(scanned), placement.mesh)
    return Phase(recipe, begins, first_steps, placement.mesh, other_steps)


def fit(
    phase: Phase,
    entering: tuple[PyTree, ...],
    train: datasets.Split,
    validation: datasets.Split,
    on_epoch: Callable[[int, EpochMetrics], None] = lambda epoch, metrics: None,
    *,
    kept: Checkpoints | None = None,
) -> tuple[TrainState, list[EpochMetrics]]:
    """Train many replicates through a phase, from its latest checkpoint if there is one.

    Args:
      phase: its programs.
      entering: params, stats, keys and, after pruning, masks, each with a leading replicate axis.
      train: training split, on the devices.
      validation: validation split, on the devices.
      on_epoch: called after each epoch with its number, counted from 1, and its metrics. It is called when
        the next epoch, or its first steps, have been dispatched, so that the device does not wait for the host.
      kept: where checkpoints are written and read; None for no checkpoints. The device waits while one is written.

    Returns:
      The state after the last epoch, and the metrics of each epoch.
    """
    state = phase.begin(entering)
    metrics: list[EpochMetrics] = []
    if kept is not None and kept.done:
        state, metrics = _resumed(kept, state, phase.mesh)
    first, last = len(metrics), phase.recipe.total_epochs
    for epoch in range(first, last):
        found = phase.epoch(state, np.int32(epoch), train, validation)
        if epoch > first:
            on_epoch(epoch, jax.block_until_ready(metrics[-1]))
        state, measured = found if phase.rest is None else phase.rest(found, np.int32(epoch), train, validation)
        metrics.append(measured)
        if kept is not None and epoch + 1 < last and kept.due():
            everything = checkpoints.plain((state, metrics))
            kept.save(epoch + 1, checkpoints.pack(replicates.fetch(everything, len(measured.train_loss))))
    if last > first:
        on_epoch(last, jax.block_until_ready(metrics[-1]))
    return state, metrics


def _resumed(kept: Checkpoints, state: TrainState, mesh: Mesh) -> tuple[TrainState, list[EpochMetrics]]:
    """Return the state and the metrics of the latest checkpoint, on the devices; ``state`` has their structure."""
    like = state, [EpochMetrics(*EpochMetrics._fields)] * kept.done
    count = len(state.step)  # with the copies that fill the devices, of which there may have been another number
    stored = jax.tree.map(lambda x: x[:count], checkpoints.unpack(kept.load(), like))
    state_then, metrics = replicates.place(stored, mesh)
    return checkpoints.with_keys(state_then, state), metrics


def compile_predict(task: Task, placement: replicates.Placement, examples: int) -> Callable[..., jax.Array]:
    """Build the program that predicts a split with many replicates.

    Args:
      task: task that computes the logits.
      placement: as for training.
      examples: number of examples in the split.

    Returns:
      ((params, stats), images) -> (replicates, examples) int32.
    """
    pieces, size = slices(examples)
    surplus = pieces * size - examples

    def piece(replicate: tuple[PyTree, PyTree], position: jax.Array, images: jax.Array) -> jax.Array:
        return predict_slice(task, replicate, images, position, size)

    def scanned(replicate: tuple[PyTree, PyTree], images: jax.Array) -> jax.Array:
        return jax.lax.map(lambda i: piece(replicate, i, images), jnp.arange(pieces))

    compiled = replicates.spread(scanned if placement.epoch == "scan" else piece, placement)

    def predict(replicate: tuple[PyTree, PyTree], images: jax.Array) -> jax.Array:
        if placement.epoch == "scan":
            found = compiled(replicate, images)
        else:
            found = jnp.stack([compiled(replicate, np.int32(i), images) for i in range(pieces)], 1)
        return jnp.concatenate([found[:, :-1].reshape(len(found), -1), found[:, -1, surplus:]], 1)

    return predict
