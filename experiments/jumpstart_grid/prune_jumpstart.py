"""Prune AND jumpstart: does the penalty, while a pruned network is fine-tuned, keep its units alive?

Dense networks are trained without the penalty. Each is pruned by magnitude to every ratio, from the same
weights, and fine-tuned twice: without the penalty and with it. What is kept is how many units are dead right
after pruning and after fine-tuning, and the right answers of each class, from which alpha follows.
All seeds train in one program.
"""

import dataclasses
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

import jprune
from experiments.data import datasets
from experiments.data.augment import normalise
from experiments.jumpstart_grid.cells import Planned, coefficient_of, columns, state_columns
from experiments.jumpstart_grid.presets import Grid
from experiments.models import networks

UNIT = "epochs"
SMALL_STEPS = True
METHODS = {"baseline": False, "jumpstart": True}  # whether fine-tuning has the penalty
WHERE = jprune.by_path(exclude=r"^head/")


@dataclasses.dataclass(frozen=True)
class Setup:
    """Everything that decides the numbers of a stage, its seeds apart.

    Attributes:
      dataset: as ``experiments.data.datasets`` names it.
      methods: ``baseline`` and ``jumpstart``, with its coefficient behind a colon if it has one.
      depth: hidden layers.
      width: units of each.
      epochs: of dense training.
      finetune_epochs: of fine-tuning.
      lr: learning rate of Adam, in both phases.
      batch: examples a step; those that fill no batch at the end of an epoch sit it out.
      ratios: parameters before / after pruning.
      coefficient: lambda.
    """

    dataset: str
    methods: tuple[str, ...]
    depth: int
    width: int
    epochs: int
    finetune_epochs: int
    lr: float
    batch: int
    ratios: tuple[float, ...]
    coefficient: float


class Task(NamedTuple):
    """A data set, flattened and normalised, the structure of the network that learns it, and how."""

    setup: Setup
    graph: Any
    features: jax.Array
    labels: jax.Array
    test_features: jax.Array
    test_labels: np.ndarray
    classes: int


def plan(grid: Grid) -> list[Planned]:
    """A stage a data set and size: dense training, and everything that starts from it.

    Raises:
      ValueError: a method that there is not, or several learning rates.
    """
    if len(grid.lr) != 1:
        raise ValueError(f"lr={grid.lr} must be one value for kind='pruning'")
    for method in grid.methods:
        coefficient_of(method, grid.coefficient, METHODS)  # refused before training
    planned = []
    for dataset in grid.datasets:
        for depth, width in grid.sizes:
            setup = Setup(
                dataset, grid.methods, depth, width, grid.epochs, grid.finetune_epochs, grid.lr[0], grid.batch,
                tuple(map(float, grid.ratios)), grid.coefficient,
            )  # fmt: skip
            settings = dataclasses.asdict(setup)
            each = grid.epochs + len(grid.ratios) * len(grid.methods) * grid.finetune_epochs
            planned.append(Planned(f"{dataset}, {depth} x {width}", settings, range(grid.seeds), each * grid.seeds))
    return planned


def carry_out(grid: Grid, stage: Planned, advance: Callable[[int], None]) -> dict[str, dict[str, Any]]:
    """Train, prune and fine-tune the networks of a stage, all seeds at once.

    Args:
      grid: the study; it says where the data is.
      stage: of its plan.
      advance: told of every phase that is done.

    Returns:
      Columns of the table ``cells``: a row a seed for the dense network, and a row a seed, method and
      ratio. ``right`` has the right answers of each class on the test set, ``support`` its examples.
    """
    began = time.perf_counter()
    setup = Setup(**stage.settings)
    task = load(setup, datasets.load(setup.dataset, data_dir=grid.data_dir))
    keys = jax.vmap(jax.random.key)(np.array(stage.seeds))
    dense = jax.jit(jax.vmap(partial(_initial, setup, task.classes, task.features.shape[1])))(keys)
    shapes = jax.tree.map(lambda leaf: leaf[0], dense)
    kept = [jprune.keep_count(shapes, ratio=ratio, where=WHERE) for ratio in setup.ratios]  # refused before training
    dense = _train(task, 0.0, setup.epochs, dense, keys)
    advance(setup.epochs * len(stage.seeds))
    rows = _rows(task, ("dense", 1.0), stage.seeds, dense, _dead_units(task, dense))
    for ratio, keep in zip(setup.ratios, kept, strict=True):
        pruned = jax.jit(jax.vmap(partial(prune, keep)))(dense)
        before = _dead_units(task, pruned)
        for method in setup.methods:
            tuned = _train(
                task, coefficient_of(method, setup.coefficient, METHODS), setup.finetune_epochs, pruned, keys
            )
            advance(setup.finetune_epochs * len(stage.seeds))
            rows += _rows(task, (method, ratio), stage.seeds, tuned, before)
    seconds = (time.perf_counter() - began) / len(rows)
    return {"cells": columns([{**row, "seconds": seconds} for row in rows])}


def load(setup: Setup, dataset: datasets.Dataset) -> Task:
    """The task of classifying a data set, on its training and test splits."""
    make = partial(_network, setup, dataset.num_classes, int(np.prod(dataset.input_shape)))
    graph = nnx.graphdef(nnx.eval_shape(lambda: make(jax.random.key(0))))

    def flat(split: datasets.Split) -> jax.Array:
        images = normalise(jnp.asarray(split.images), dataset.mean, dataset.std)
        return images.reshape(len(split.labels), -1)

    labels = jnp.asarray(dataset.train.labels)
    return Task(setup, graph, flat(dataset.train), labels, flat(dataset.test), dataset.test.labels, dataset.num_classes)


def prune(keep: int, params: Any) -> Any:
    """Keep that many weights of largest magnitude, the output layer apart."""
    scores = jprune.magnitude(where=WHERE)(params)
    return jprune.apply_masks(params, jprune.global_masks(scores, keep=keep))


def _network(setup: Setup, classes: int, inputs: int, key: jax.Array) -> nnx.Module:
    shape = (inputs,)
    sizes = {"depth": setup.depth, "width": setup.width}
    return networks.create("dense", num_classes=classes, input_shape=shape, rngs=nnx.Rngs(key), **sizes)


def _initial(setup: Setup, classes: int, inputs: int, key: jax.Array) -> Any:
    return nnx.state(_network(setup, classes, inputs, key), nnx.Param)


def _train(task: Task, coefficient: float, epochs: int, params: Any, keys: jax.Array) -> Any:
    """Train every network for some epochs; what is zero stays zero."""
    setup, count = task.setup, len(task.labels)
    steps = count // setup.batch
    if steps == 0:
        raise ValueError(f"batch={setup.batch} is more than the {count} training examples of {setup.dataset}")
    optimizer = optax.chain(optax.adam(setup.lr), jprune.keep_zeros(where=WHERE))

    def loss(params: Any, features: jax.Array, labels: jax.Array) -> tuple[jax.Array, Any]:
        logits, preactivations = jprune.jumpstart.call_with_preactivations(nnx.merge(task.graph, params), features)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), preactivations

    objective = jprune.jumpstart.jumpstart_loss(loss, coefficient=coefficient)

    def step(carry: tuple[Any, Any], rows: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, state = carry
        grads = jax.grad(objective)(params, task.features[rows], task.labels[rows])
        updates, state = optimizer.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    @jax.vmap
    def phase(params: Any, key: jax.Array) -> Any:
        def epoch(carry: tuple[Any, Any], number: jax.Array) -> tuple[tuple[Any, Any], None]:
            order = jax.random.permutation(jax.random.fold_in(key, number), count)[: steps * setup.batch]
            return lax.scan(step, carry, order.reshape(steps, setup.batch))

        return lax.scan(epoch, (params, optimizer.init(params)), jnp.arange(epochs))[0][0]

    return jax.block_until_ready(phase(params, keys))


def _dead_units(task: Task, params: Any) -> np.ndarray:
    """Share of hidden units that are dead on the training examples, (seeds,)."""
    return np.asarray(jax.jit(jax.vmap(lambda one: _activity(task, one).unit_dead_ratio))(params))


def _activity(task: Task, params: Any) -> Any:
    preactivations = jprune.preactivations(nnx.merge(task.graph, params), task.features)
    return jprune.jumpstart.activity(jprune.unit_status(preactivations), jprune.jumpstart.point_status(preactivations))


def _rows(task: Task, cell: tuple[str, float], seeds: range, params: Any, before: np.ndarray) -> list[dict[str, Any]]:
    """A row for each network: what it gets right, and how much of it works."""
    logits = jax.vmap(lambda one: nnx.merge(task.graph, one)(task.test_features))(params)
    right = np.asarray(logits.argmax(-1)) == task.test_labels[None]
    activity = jax.jit(jax.vmap(partial(_activity, task)))(params)
    rows = []
    for index, seed in enumerate(seeds):
        rows.append(
            {
                "dataset": task.setup.dataset,
                "method": cell[0],
                "ratio": cell[1],
                "width": task.setup.width,
                "depth": task.setup.depth,
                "replicate": seed,
                "test_acc": float(right[index].mean()),
                "unit_dead_before": float(before[index]),
                **state_columns(jax.tree.map(lambda share, index=index: share[index], activity)),
                "right": _text(np.bincount(task.test_labels[right[index]], minlength=task.classes)),
                "support": _text(np.bincount(task.test_labels, minlength=task.classes)),
            }
        )
    return rows


def _text(counts: np.ndarray) -> str:
    """One count a class, blanks between them: a column that CSV can hold."""
    return " ".join(map(str, counts))
