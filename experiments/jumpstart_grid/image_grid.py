"""Grids of 3 x 3 convolutions on MNIST and CIFAR, one network after the other.

MNIST, as in the authors' Keras code: pixels / 255, a dense layer on every position, Glorot-uniform kernels,
the penalty of the hidden layers only. CIFAR, as in their PyTorch code: normalized images, a dense layer on
the average and the maximum of each channel, torch's initial weights, the penalty of every weighted layer.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

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

UNIT = "epochs"
SMALL_STEPS = False


class ImageMethod(NamedTuple):
    """A technique: batch normalization, or a penalty with these options."""

    normalized: bool = False
    penalty: dict[str, Any] | None = None
    skip_last: bool = True


METHODS = {
    "relu": ImageMethod(),
    "relu-bn": ImageMethod(normalized=True),
    "UP": ImageMethod(penalty={"preset": "cpaior_keras"}),
    "norm": ImageMethod(penalty={"preset": "cpaior_torch"}, skip_last=False),
    "mean": ImageMethod(penalty={"preset": "cpaior_torch", "aggregate": "mean"}, skip_last=False),
}


class NormalizedConv(networks.RectangularConv):
    """``models.RectangularConv`` with batch normalization before each ReLU, with the constants of Keras [inferred]."""

    def __init__(self, *args: Any, depth: int, width: int, rngs: nnx.Rngs, **options: Any):
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

    params: Any
    stats: Any
    adam: optax.OptState


def plan(grid: Grid) -> list[GridStage]:
    """A stage for each data set, learning rate, method, size and seed.

    Raises:
      ValueError: an unknown method.
    """
    planned, penalized = [], {name: bool(method.penalty) for name, method in METHODS.items()}
    for dataset in grid.datasets:
        fingerprint = fingerprint_of(dataset)
        for lr in grid.lr:
            for depth, width in grid.sizes:
                for method in grid.methods:
                    used = coefficient_of(method, grid.coefficient, penalized)
                    setup = Setup(dataset, method, depth, width, grid.epochs, lr, grid.batch, used, fingerprint)
                    setup = dataclasses.replace(setup, prune=list(grid.prune) or None)
                    title = f"{dataset}, {method}, {depth} x {width}, lr {lr:g}"
                    settings = setup.settings()
                    planned += [GridStage(title, settings, range(s, s + 1), grid.epochs) for s in range(grid.seeds)]
    return planned


def carry_out(running: GridRunning, stage: GridStage, advance: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """Train the network of a stage.

    Args:
      running: says where the data is.
      stage: of the plan.
      advance: called after each epoch.

    Returns:
      Columns of the table ``cells``, its one row; and, if it is pruned, of ``pruned``, a row for each ratio.
    """
    began = time.perf_counter()
    setup, (seed,) = Setup(**stage.settings), stage.seeds
    dataset = datasets.load(setup.dataset, data_dir=running.data_dir, selection="test")
    graph, state = start(setup, dataset, seed)
    programs = Programs(setup, dataset, graph)
    rng = np.random.default_rng((seed, setup.depth, setup.width))
    accuracies = []
    for _ in range(setup.epochs):
        state, train_acc = programs.epoch(state, rng.permutation(len(dataset.train.labels)))
        accuracies.append((train_acc, programs.accuracy(state, dataset.validation)))
        advance(1)
    network = nnx.merge(graph, state.params, state.stats)
    network.eval()
    inputs = ((programs.inputs(images),) for images, _ in _batches(dataset.train, 1000))
    activity = jprune.jumpstart.activity_report(network, inputs).attrs["activity"]
    best = np.max(accuracies, axis=0)
    cell = {
        **{name: getattr(setup, name) for name in ("dataset", "method", "lr", "width", "depth", "epochs")},
        "replicate": seed,
        "floor": floor(dataset.train.labels),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "train_acc": float(best[0]),
        "val_acc": float(best[1]),
        "train_acc_last": float(accuracies[-1][0]),
        "val_acc_last": float(accuracies[-1][1]),
        **state_columns(activity),
        "seconds": time.perf_counter() - began,
    }
    tables = {"cells": columns([cell])}
    if setup.prune:
        kernels = jprune.trees.only(state.params, jprune.by_path(include=r"^convs/.*kernel"))

        def accuracy(masks: PyTree) -> float:
            return programs.accuracy(state._replace(params=jprune.apply_masks(state.params, masks)), dataset.train)

        tables["pruned"] = columns(pruned.rows(cell, kernels, setup.prune, accuracy))
    return tables


def start(setup: Setup, dataset: datasets.Dataset, seed: int) -> tuple[nnx.GraphDef, ImageState]:
    """The network in training mode, and its state before the first step.

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
    """The compiled step and the compiled evaluation of one network.

    The host calls one step at a time: on a CPU a convolution inside ``lax.scan`` is far slower, and a step is
    long enough to hide the time of the call.
    """

    def __init__(self, setup: Setup, dataset: datasets.Dataset, graph: nnx.GraphDef):
        self._setup, self._dataset, self._graph = setup, dataset, graph
        self._step = jax.jit(self._updated, donate_argnums=0)
        self._right = jax.jit(self._count_right)

    def epoch(self, state: ImageState, order: np.ndarray) -> tuple[ImageState, float]:
        """Train on every example once; the accuracy is that of each batch before its step, as Keras reports it."""
        right = []
        for images, labels in _batches(self._dataset.train, self._setup.batch, order):
            state, hits = self._step(state, images, labels)
            right.append(hits)
        return state, float(np.sum(jax.device_get(right))) / len(order)

    def accuracy(self, state: ImageState, split: datasets.Split) -> float:
        """Fraction of a split classified correctly."""
        hits = [self._right(state.params, state.stats, *batch) for batch in _batches(split, 1000)]
        return float(np.sum(jax.device_get(hits))) / len(split.labels)

    def inputs(self, images: jax.Array) -> jax.Array:
        """Images as the network reads them."""
        if self._dataset.name == "mnist":
            return jnp.asarray(images, jnp.float32) / 255
        return normalise(jnp.asarray(images), self._dataset.mean, self._dataset.std)

    def loss(self, params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        """Cross-entropy and penalty; also the network's other state, and the number of correct predictions."""
        technique = METHODS[self._setup.technique]
        network = nnx.merge(self._graph, params, stats, copy=True)
        call = partial(jprune.jumpstart.call_with_preactivations, network, self.inputs(images))
        logits, preactivations = call(skip_last=technique.skip_last)
        mean = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        if self._setup.coefficient:
            mean += self._setup.coefficient * jprune.jumpstart_penalty(preactivations, **technique.penalty)
        return mean, (nnx.state(network, nnx.Not(nnx.Param)), (logits.argmax(-1) == labels).sum())

    def _updated(self, state: ImageState, images: jax.Array, labels: jax.Array) -> tuple[ImageState, jax.Array]:
        grads, (stats, right) = jax.grad(self.loss, has_aux=True)(state.params, state.stats, images, labels)
        updates, adam = _adam(self._setup).update(grads, state.adam, state.params)
        return ImageState(optax.apply_updates(state.params, updates), stats, adam), right

    def _count_right(self, params: Any, stats: Any, images: jax.Array, labels: jax.Array) -> jax.Array:
        network = nnx.merge(self._graph, params, stats)
        network.eval()
        return (network(self.inputs(images)).argmax(-1) == labels).sum()


def _batches(
    split: datasets.Split, size: int, order: np.ndarray | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    order = np.arange(len(split.labels)) if order is None else order
    for first in range(0, len(order), size):
        rows = order[first : first + size]
        yield split.images[rows], split.labels[rows]


def _adam(setup: Setup) -> optax.GradientTransformation:
    return optax.adam(setup.lr)
