"""Grids of 3 x 3 convolutions on MNIST and CIFAR.

MNIST, as in the authors' Keras code: pixels / 255, a dense layer on every position, Glorot-uniform kernels,
the penalty of the hidden layers only. CIFAR, as in their PyTorch code: normalized images, a dense layer on
the average and the maximum of each channel, torch's initial weights, the penalty of every weighted layer.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import PyTree

import jprune
from experiments.data import datasets
from experiments.data.augment import normalise
from experiments.jumpstart_grid import pruned
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
from experiments.models import convolution, networks
from experiments.storage import checkpoints
from experiments.storage.checkpoints import Checkpoints
from experiments.storage.files import JSON

UNIT = "epochs"
SMALL_STEPS = False


class ImageMethod(NamedTuple):
    """A method: batch normalization, or a penalty with these options."""

    normalized: bool = False
    penalty: dict[str, object] | None = None
    skip_last: bool = True


NORMALIZED_VERSION = 2  # of methods with normalization, whose units version 1 counted before it
METHODS = {
    "relu": ImageMethod(),
    "relu-bn": ImageMethod(normalized=True),
    "UP": ImageMethod(penalty={"preset": "cpaior_keras"}),
    "norm": ImageMethod(penalty={"preset": "cpaior_torch"}, skip_last=False),
    "mean": ImageMethod(penalty={"preset": "cpaior_torch", "aggregate": "mean"}, skip_last=False),
}


class NormalizedConv(networks.RectangularConv):
    """``models.RectangularConv`` with batch normalization before each ReLU, with the constants of Keras [inferred]."""

    def __init__(self, *args: object, depth: int, width: int, rngs: nnx.Rngs, **options: object):
        super().__init__(*args, depth=depth, width=width, rngs=rngs, **options)
        self.norms = nnx.List(networks.BatchNorm(width, narrow=self.narrow, rngs=rngs) for _ in range(depth))
        for norm in self.norms:
            norm.momentum, norm.epsilon = 0.99, 1e-3

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) -> logits (batch, num_classes)."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = convolution.relu(norm(conv(x)), self.narrow)
        if self.readout == "flatten":
            return self.head(x.reshape(x.shape[0], -1))
        return self.head(jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1))


class ImageState(NamedTuple):
    """A network in training: its parameters, its other state, and Adam's moments."""

    params: PyTree
    stats: PyTree
    adam: optax.OptState


def plan(grid: Grid) -> list[GridStage]:
    """Plan one stage per data set, learning rate, method and size, and on a CPU per seed.

    Raises:
      ValueError: an unknown method.
    """
    planned, penalized = [], {name: bool(method.penalty) for name, method in METHODS.items()}
    apart = jax.default_backend() == "cpu"
    together = [range(s, s + 1) for s in range(grid.seeds)] if apart else [range(grid.seeds)]
    for dataset in grid.datasets:
        fingerprint = fingerprint_of(dataset)
        for lr in grid.lr:
            for depth, width in grid.sizes:
                for method in grid.methods:
                    used = coefficient_of(method, grid.coefficient, penalized)
                    setup = Setup(dataset, method, depth, width, grid.epochs, lr, grid.batch, used, fingerprint)
                    version = NORMALIZED_VERSION if METHODS[setup.technique].normalized else None
                    setup = dataclasses.replace(setup, prune=list(grid.prune) or None, version=version)
                    title = f"{dataset}, {method}, {depth} x {width}, lr {lr:g}"
                    settings = setup.settings()
                    planned += [GridStage(title, settings, seeds, grid.epochs * len(seeds)) for seeds in together]
    return planned


def carry_out(
    running: GridRunning, stage: GridStage, advance: Callable[[int], None], kept: Checkpoints | None = None
) -> dict[str, dict[str, Sequence[object]]]:
    """Train the networks of a stage.

    Args:
      running: run options, with the folder of the data.
      stage: stage of the plan.
      advance: called after each epoch with the number of networks that took it.
      kept: checkpoints of the stage, of which the latest is continued.

    Returns:
      Columns of the table ``cells``, a row for each seed; and, if they are pruned, of ``pruned``, a row for each seed
      and ratio.
    """
    began = time.perf_counter()
    setup, seeds = Setup(**stage.settings), list(stage.seeds)
    dataset = datasets.load(setup.dataset, data_dir=running.data_dir, selection="test")
    started = [start(setup, dataset, seed) for seed in seeds]
    graph = started[0][0]
    programs = Programs(setup, dataset, graph)
    generators = [np.random.default_rng((seed, setup.depth, setup.width)) for seed in seeds]
    orders = [
        np.stack([generator.permutation(len(dataset.train.labels)).astype(np.int32) for generator in generators])
        for _ in range(setup.epochs)
    ]
    train = by_steps if jax.default_backend() == "cpu" else by_epochs
    states, accuracies = train(programs, [state for _, state in started], orders, advance, kept)
    seconds = (time.perf_counter() - began) / len(seeds)
    cells = [
        _cell(programs, graph, state, accuracies[:, i]) | {"replicate": seed, "seconds": seconds}
        for i, (seed, state) in enumerate(zip(seeds, states, strict=True))
    ]
    tables = {"cells": columns(cells)}
    if setup.prune:
        pairs = zip(cells, states, strict=True)
        tables["pruned"] = columns([row for cell, state in pairs for row in _pruned(programs, cell, state)])
    return tables


def _pruned(programs: "Programs", cell: dict[str, JSON], state: "ImageState") -> list[dict[str, JSON]]:
    """Return the rows of a network that is pruned after training, one per ratio."""
    kernels = jprune.trees.only(state.params, jprune.by_path(include=r"^convs/.*kernel"))

    def accuracy(masks: PyTree) -> float:
        params = jprune.apply_masks(state.params, masks)
        return programs.accuracy(state._replace(params=params), programs.dataset.train)

    return pruned.rows(cell, kernels, programs.setup.prune, accuracy)


def _cell(programs: "Programs", graph: nnx.GraphDef, state: "ImageState", accuracies: np.ndarray) -> dict[str, JSON]:
    """Return the row of a trained network; ``accuracies`` are (epochs, 2), of training and validation."""
    setup, dataset = programs.setup, programs.dataset
    network = folded(nnx.merge(graph, state.params, state.stats, copy=True))
    inputs = ((programs.inputs(images),) for images, _ in _batches(dataset.train, 1000))
    plain = networks.RectangularConv.__call__
    activity = jprune.jumpstart.activity_report(network, inputs, method=plain).attrs["activity"]
    best = accuracies.max(axis=0)
    return {
        **{name: getattr(setup, name) for name in ("dataset", "method", "lr", "width", "depth", "epochs")},
        "replicate": 0,
        "floor": floor(dataset.train.labels),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "train_acc": float(best[0]),
        "val_acc": float(best[1]),
        "train_acc_last": float(accuracies[-1][0]),
        "val_acc_last": float(accuracies[-1][1]),
        **state_columns(activity),
        "seconds": 0.0,
    }


def folded(network: networks.RectangularConv) -> networks.RectangularConv:
    """Fold batch normalization, if any, into the convolutions, whose outputs are then the inputs of the ReLUs."""
    for conv, norm in zip(network.convs, getattr(network, "norms", ()), strict=False):
        slope = norm.scale[...] * jax.lax.rsqrt(norm.var[...] + norm.epsilon)
        conv.kernel[...] *= slope.reshape(1, 1, 1, -1)
        conv.bias[...] = (conv.bias[...] - norm.mean[...]) * slope + norm.bias[...]
    return network


def start(setup: Setup, dataset: datasets.Dataset, seed: int) -> tuple[nnx.GraphDef, ImageState]:
    """Return the network in training mode, and its state before the first step.

    Raises:
      ValueError: the examples are not images.
    """
    if len(dataset.input_shape) != 3:
        raise ValueError(
            f"dataset={dataset.name!r} has examples of shape {dataset.input_shape}; kind='images' needs images "
            "(height, width, channels)"
        )
    keras = dataset.name == "mnist"
    make = NormalizedConv if METHODS[setup.technique].normalized else networks.RectangularConv
    network = make(
        dataset.input_shape,
        dataset.num_classes,
        depth=setup.depth,
        width=setup.width,
        readout="flatten" if keras else "average_max",
        init="glorot" if keras else "torch",
        rngs=nnx.Rngs(seed),
    )
    network.train()
    graph, params, stats = nnx.split(network, nnx.Param, ...)
    return graph, ImageState(params, stats, _adam(setup).init(params))


class Programs:
    """The compiled training and evaluation of the networks of a stage."""

    def __init__(self, setup: Setup, dataset: datasets.Dataset, graph: nnx.GraphDef):
        self.setup, self.dataset, self._graph = setup, dataset, graph
        self.step = jax.jit(self._updated, donate_argnums=0)
        self.right = jax.jit(self._count_right)
        self.epoch = jax.jit(jax.vmap(self._epoch, in_axes=(0, 0, None, None)), donate_argnums=0)

    def _epoch(
        self, state: ImageState, order: jax.Array, train: datasets.Split, validation: datasets.Split
    ) -> tuple[ImageState, tuple[jax.Array, jax.Array]]:
        """Train on every example once, then evaluate: (state, numbers of correct predictions of both)."""

        def step(state: ImageState, chosen: jax.Array) -> tuple[ImageState, jax.Array]:
            return self._updated(state, train.images[chosen], train.labels[chosen])

        def check(_: None, batch: datasets.Split) -> tuple[None, jax.Array]:
            return None, self._count_right(state.params, state.stats, *batch)

        batch = self.setup.batch
        full = len(train.labels) // batch
        state, right = jax.lax.scan(step, state, order[: full * batch].reshape(full, batch))
        trained = right.sum()
        if full * batch < len(train.labels):
            state, last = step(state, order[full * batch :])
            trained += last
        full = len(validation.labels) // 1000
        pieces = jax.tree.map(lambda x: x[: full * 1000].reshape(full, 1000, *x.shape[1:]), validation)
        checked = jax.lax.scan(check, None, pieces)[1].sum()
        if full * 1000 < len(validation.labels):
            checked += check(None, jax.tree.map(lambda x: x[full * 1000 :], validation))[1]
        return state, (trained, checked)

    def accuracy(self, state: ImageState, split: datasets.Split) -> float:
        """Fraction of a split classified correctly."""
        hits = [self.right(state.params, state.stats, *batch) for batch in _batches(split, 1000)]
        return float(np.sum(jax.device_get(hits))) / len(split.labels)

    def inputs(self, images: jax.Array) -> jax.Array:
        """Convert images to the inputs of the network."""
        if self.dataset.name == "mnist":
            return jnp.asarray(images, jnp.float32) / 255
        return normalise(jnp.asarray(images), self.dataset.mean, self.dataset.std)

    def loss(self, params: PyTree, stats: PyTree, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, PyTree]:
        """Return cross-entropy plus penalty, and the network's other state with the number of correct predictions."""
        technique = METHODS[self.setup.technique]
        network = nnx.merge(self._graph, params, stats, copy=True)
        call = partial(jprune.jumpstart.call_with_preactivations, network, self.inputs(images))
        logits, preactivations = call(skip_last=technique.skip_last)
        mean = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if self.setup.coefficient:
            mean += self.setup.coefficient * jprune.jumpstart_penalty(preactivations, **technique.penalty)
        return mean, (nnx.state(network, nnx.Not(nnx.Param)), (logits.argmax(-1) == labels).sum())

    def _updated(self, state: ImageState, images: jax.Array, labels: jax.Array) -> tuple[ImageState, jax.Array]:
        grads, (stats, right) = jax.grad(self.loss, has_aux=True)(state.params, state.stats, images, labels)
        updates, adam = _adam(self.setup).update(grads, state.adam, state.params)
        return ImageState(optax.apply_updates(state.params, updates), stats, adam), right

    def _count_right(self, params: PyTree, stats: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        network = nnx.merge(self._graph, params, stats)
        network.eval()
        return (network(self.inputs(images)).argmax(-1) == labels).sum()


Train = tuple[list[ImageState], np.ndarray]  # trained states, and accuracies (epochs, networks, 2)


def by_steps(
    programs: Programs,
    states: list[ImageState],
    orders: Sequence[np.ndarray],
    advance: Callable[[int], None],
    kept: Checkpoints | None = None,
) -> Train:
    """Train one network after the other, with the host calling one step at a time.

    On a CPU a convolution inside ``lax.scan`` is far slower, and a step is long enough to hide the dispatch time. The
    training accuracy is that of each batch before its step, as in Keras.

    Args:
      programs: programs of the stage.
      states: states of the networks.
      orders: for each epoch the order of the examples for each network, (networks, examples).
      advance: called after each epoch of a network.
      kept: checkpoints of the stage, of which the latest is continued.
    """
    train = programs.dataset.train

    def epoch(states: list[ImageState], order: np.ndarray) -> Train:
        trained, accuracies = [], np.zeros((len(states), 2))
        for i, first in enumerate(states):
            state, right = first, []
            for images, labels in _batches(train, programs.setup.batch, order[i]):
                state, hits = programs.step(state, images, labels)
                right.append(hits)
            trained_right = float(np.sum(jax.device_get(right))) / len(train.labels)
            accuracies[i] = trained_right, programs.accuracy(state, programs.dataset.validation)
            trained.append(state)
            advance(1)
        return trained, accuracies

    return _through(epoch, states, orders, kept)


def by_epochs(
    programs: Programs,
    states: list[ImageState],
    orders: Sequence[np.ndarray],
    advance: Callable[[int], None],
    kept: Checkpoints | None = None,
) -> Train:
    """Train all networks together, one epoch per program, with the data on the device; arguments as ``by_steps``.

    Once per epoch, the host sends the orders and reads two numbers of each network.
    """
    data = programs.dataset
    train, validation = jax.tree.map(jnp.asarray, (data.train, data.validation))

    def epoch(state: ImageState, order: np.ndarray) -> tuple[ImageState, np.ndarray]:
        state, (trained, checked) = programs.epoch(state, jnp.asarray(order), train, validation)
        shares = np.asarray(trained) / len(train.labels), np.asarray(checked) / len(validation.labels)
        advance(len(states))
        return state, np.stack(shares, axis=-1)

    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    state, accuracies = _through(epoch, together, orders, kept)
    return [jax.tree.map(lambda leaf, i=i: leaf[i], state) for i in range(len(states))], accuracies


def _through(
    epoch: Callable[[PyTree, np.ndarray], tuple[PyTree, np.ndarray]],
    state: PyTree,
    orders: Sequence[np.ndarray],
    kept: Checkpoints | None,
) -> tuple[PyTree, np.ndarray]:
    """Take all epochs, from the latest checkpoint: (state, accuracies)."""
    done, (state, accuracies) = checkpoints.restored(kept, (state, np.zeros((0, len(orders[0]), 2))))
    for number, order in enumerate(orders[done:], done + 1):
        state, measured = epoch(state, order)
        accuracies = np.append(accuracies, measured[None], axis=0)
        if number < len(orders):
            checkpoints.keep(kept, number, (state, accuracies))
    return state, np.asarray(accuracies)


def _batches(
    split: datasets.Split, size: int, order: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    order = np.arange(len(split.labels)) if order is None else order
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        yield split.images[rows], split.labels[rows]


def _adam(setup: Setup) -> optax.GradientTransformation:
    return optax.adam(setup.lr)
