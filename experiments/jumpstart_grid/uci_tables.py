"""Dense networks of 50 layers of 4 units on small tables, trained with five methods.

Settings of the 2025 study: learning rate .01, batch 256, lambda .01, aggregate ``balanced``, 4,000 epochs.
Settings that its text does not give are inferred: Adam; torch's initial weights and batch normalization; a
skip connection around every layer of equal sizes; features with zero mean and unit deviation. All seeds of a
method train in one program; layers are scanned.
"""

import operator
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import PyTree

import jprune
from experiments.data import datasets
from experiments.jumpstart_grid.cells import (
    GridStage,
    Setup,
    coefficient_of,
    columns,
    fingerprint_of,
    floor,
    state_columns,
)
from experiments.jumpstart_grid.config import Grid, GridRunning
from experiments.storage import checkpoints
from experiments.storage.checkpoints import Checkpoints
from jprune.jumpstart.layers import Stack

UNIT = "layer-epochs"
SMALL_STEPS = True
METHODS = {"baseline": False, "jumpstart": True, "batchnorm": False, "skip": False, "gelu": False}  # penalized?
_CHUNK = 100
_BN_EPSILON, _BN_MOMENTUM = 1e-5, 0.9

Params = dict[str, PyTree]


class TableState(NamedTuple):
    """One network in training.

    Attributes:
      params: kernels and biases; the hidden layers after the first are stacked.
      adam: state of the optimizer.
      running: mean and variance of each unit, (depth, 2, width).
      key: key of the order of the examples.
      best: largest training and validation accuracy of an epoch so far, (2,).
      last: accuracies of the last epoch, (2,).
    """

    params: Params
    adam: optax.OptState
    running: jax.Array
    key: jax.Array
    best: jax.Array
    last: jax.Array


class Examples(NamedTuple):
    """Standardized features (examples, features) and labels (examples,)."""

    features: jax.Array
    labels: jax.Array


def plan(grid: Grid) -> list[GridStage]:
    """Plan one stage per data set, method and size.

    Raises:
      ValueError: an unknown method, or several learning rates.
    """
    if len(grid.lr) != 1:
        raise ValueError(f"lr={grid.lr} must be one value for kind='tables'")
    planned = []
    for dataset in grid.datasets:
        fingerprint = fingerprint_of(dataset)
        for method in grid.methods:
            used = coefficient_of(method, grid.coefficient, METHODS)
            for depth, width in grid.sizes:
                setup = Setup(dataset, method, depth, width, grid.epochs, grid.lr[0], grid.batch, used, fingerprint)
                title = f"{dataset}, {method}, {depth} x {width}"
                work = depth * grid.epochs * grid.seeds
                planned.append(GridStage(title, setup.settings(), range(grid.seeds), work))
    return planned


def carry_out(
    running: GridRunning, stage: GridStage, advance: Callable[[int], None], kept: Checkpoints | None = None
) -> dict[str, dict[str, Sequence[object]]]:
    """Train the networks of a stage, all seeds in one program.

    Args:
      running: run options, with the folder of the data.
      stage: stage of the plan.
      advance: called with the amount of finished work.
      kept: checkpoints of the stage, of which the latest is continued.

    Returns:
      Columns of the table ``cells``, a row for each network.
    """
    began = time.perf_counter()
    setup = Setup(**stage.settings)
    train, val, classes = splits(setup.dataset, running.data_dir)
    keys = jax.vmap(jax.random.key)(np.array(stage.seeds))
    state = jax.jit(jax.vmap(partial(start, setup, train.features.shape[1], classes)))(keys)
    done, state = checkpoints.restored(kept, state)
    while done < setup.epochs:
        epochs = min(_CHUNK, setup.epochs - done)
        state = jax.block_until_ready(_train(setup, epochs, state, train, val))
        done += epochs
        advance(epochs * setup.depth * len(stage.seeds))
        if done < setup.epochs:
            checkpoints.keep(kept, done, state)
    cells = []
    for index, seed in enumerate(stage.seeds):
        mine = jax.tree.map(operator.itemgetter(index), state)
        _, preactivations, _ = forward(setup, mine.params, train.features, None, mine.running)
        layers = Stack(preactivations)
        found = jprune.jumpstart.activity(jprune.unit_status(layers), jprune.jumpstart.point_status(layers))
        cells.append(
            {
                **{name: stage.settings[name] for name in ("dataset", "method", "width", "depth", "epochs")},
                "replicate": seed,
                "floor": floor(np.asarray(train.labels)),
                "train_acc": float(mine.best[0]),
                "val_acc": float(mine.best[1]),
                "train_acc_last": float(mine.last[0]),
                "val_acc_last": float(mine.last[1]),
                **state_columns(found),
                "seconds": (time.perf_counter() - began) / len(stage.seeds),
            }
        )
    return {"cells": columns(cells)}


def splits(dataset: str, data_dir: Path | None = None) -> tuple[Examples, Examples, int]:
    """Return training and validation examples, standardized by the training split, and the number of classes."""
    table = datasets.load(dataset, data_dir=data_dir, selection="test")

    def standardized(split: datasets.Split) -> Examples:
        features = split.images.reshape(len(split.labels), -1).astype(np.float32)
        return Examples(jnp.asarray((features - mean) / std), jnp.asarray(split.labels))

    flat = table.train.images.reshape(len(table.train.labels), -1).astype(np.float32)
    mean, std = flat.mean(0), flat.std(0)
    std = np.where((flat != flat[0]).any(0) & (std > 0), std, np.float32(1))  # rounding alone is no deviation
    return standardized(table.train), standardized(table.validation), table.num_classes


def start(setup: Setup, inputs: int, classes: int, key: jax.Array) -> TableState:
    """Return the initial state: kernels and biases uniform in +-1 / sqrt(fan_in), as in torch."""
    key, *keys = jax.random.split(key, 7)
    width, deep = setup.width, setup.depth - 1

    def uniform(key: jax.Array, shape: tuple[int, ...], fan_in: int) -> jax.Array:
        return jax.random.uniform(key, shape, minval=-1, maxval=1) / np.float32(np.sqrt(fan_in))

    params = {
        "first": {"kernel": uniform(keys[0], (inputs, width), inputs), "bias": uniform(keys[1], (width,), inputs)},
        "hidden": {
            "kernel": uniform(keys[2], (deep, width, width), width),
            "bias": uniform(keys[3], (deep, width), width),
        },
        "head": {"kernel": uniform(keys[4], (width, classes), width), "bias": uniform(keys[5], (classes,), width)},
    }
    if setup.technique == "batchnorm":
        params["norm"] = {"scale": jnp.ones((setup.depth, width)), "shift": jnp.zeros((setup.depth, width))}
    running = jnp.stack([jnp.zeros((setup.depth, width)), jnp.ones((setup.depth, width))], 1)
    return TableState(params, _adam(setup).init(params), running, key, jnp.zeros(2), jnp.zeros(2))


def forward(
    setup: Setup, params: Params, features: jax.Array, real: jax.Array | None, running: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Pass examples through a network.

    Args:
      setup: the method and the sizes.
      params: parameters of one network.
      features: (batch, features).
      real: mask of the examples that are not padding, (batch,), in training; None in evaluation, which uses the running
        moments.
      running: (depth, 2, width).

    Returns:
      The logits; the preactivations (depth, batch, width), in training before any normalization, in
      evaluation as they enter the nonlinearity; and the moments (depth, 2, width) of this batch.
    """
    norm = params.get("norm")

    def activate(z: jax.Array, norm: Params | None, running: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        moments, seen = running, z
        if norm is not None:
            if real is not None:
                moments = _moments(z, real)
            normal = (z - moments[:1]) * lax.rsqrt(moments[1:] + _BN_EPSILON)
            z = normal * norm["scale"][None] + norm["shift"][None]
            seen = seen if real is not None else z
        return jax.nn.gelu(z) if setup.technique == "gelu" else jax.nn.relu(z), seen, moments

    def layer(x: jax.Array, xs: tuple[PyTree, ...]) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        hidden, norm, running = xs
        a, seen, moments = activate(x @ hidden["kernel"] + hidden["bias"][None], norm, running)
        return (x + a if setup.technique == "skip" else a), (seen, moments)

    first = features @ params["first"]["kernel"] + params["first"]["bias"][None]
    x, seen, moments = activate(first, jax.tree.map(lambda p: p[0], norm), running[0])
    rest = (params["hidden"], jax.tree.map(lambda p: p[1:], norm), running[1:])
    x, (more_seen, more_moments) = lax.scan(layer, x, rest)
    logits = x @ params["head"]["kernel"] + params["head"]["bias"][None]
    return logits, jnp.concatenate([seen[None], more_seen]), jnp.concatenate([moments[None], more_moments])


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _train(setup: Setup, epochs: int, states: TableState, train: Examples, val: Examples) -> TableState:
    """Train every network for some more epochs."""

    def one(state: TableState) -> TableState:
        return lax.scan(lambda state, _: (_epoch(setup, state, train, val), None), state, None, length=epochs)[0]

    return jax.vmap(one)(states)


def _epoch(setup: Setup, state: TableState, train: Examples, val: Examples) -> TableState:
    count = len(train.labels)
    steps = -(-count // setup.batch)
    key, order_key = jax.random.split(state.key)
    padding = jnp.zeros(steps * setup.batch - count, jnp.int32)
    order = jnp.concatenate([jax.random.permutation(order_key, count).astype(jnp.int32), padding])
    real = jnp.arange(steps * setup.batch) < count

    def step(carry: tuple[PyTree, ...], xs: tuple[jax.Array, jax.Array]) -> tuple[tuple[PyTree, ...], jax.Array]:
        params, adam, running = carry
        rows, real = xs
        batch = Examples(train.features[rows], train.labels[rows])
        grads, (moments, right) = jax.grad(partial(_loss, setup), has_aux=True)(params, batch, real, running)
        updates, adam = _adam(setup).update(grads, adam, params)
        running = _BN_MOMENTUM * running + (1 - _BN_MOMENTUM) * moments
        return (optax.apply_updates(params, updates), adam, running), right

    batches = (order.reshape(steps, -1), real.reshape(steps, -1))
    (params, adam, running), right = lax.scan(step, (state.params, state.adam, state.running), batches)
    logits, _, _ = forward(setup, params, val.features, None, running)
    last = jnp.stack([right.sum() / count, (logits.argmax(-1) == val.labels).mean()])
    return TableState(params, adam, running, key, jnp.maximum(state.best, last), last)


def _loss(
    setup: Setup, params: Params, batch: Examples, real: jax.Array, running: jax.Array
) -> tuple[jax.Array, PyTree]:
    """Return cross-entropy plus penalty of the real examples, the moments and the number of correct predictions."""
    logits, preactivations, moments = forward(setup, params, batch.features, real, running)
    each = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    loss = jnp.where(real, each, 0.0).sum() / real.sum()
    if setup.coefficient:
        loss += setup.coefficient * jprune.jumpstart_penalty(Stack(preactivations), "ieee", examples=real)
    return loss, (moments, (real & (logits.argmax(-1) == batch.labels)).sum())


def _moments(z: jax.Array, real: jax.Array) -> jax.Array:
    """Return mean and variance (2, width) over the real examples."""
    count = real.sum()
    mean = jnp.where(real[:, None], z, 0.0).sum(0) / count
    variance = jnp.where(real[:, None], jnp.square(z - mean[None]), 0.0).sum(0) / count
    return jnp.stack([mean, variance])


def _adam(setup: Setup) -> optax.GradientTransformation:
    return optax.adam(setup.lr)
