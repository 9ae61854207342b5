"""The training steps of the studies: replicates of the recall study, and the penalty of the jumpstart grid."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import steps
from benchmarks.compiled.devices import Target, on_one
from benchmarks.compiled.programs import FLOAT, MASK, Case
from experiments.data import datasets
from experiments.jumpstart_grid import image_grid
from experiments.recall_distortion import oneshot
from experiments.training import phases, replicates, tasks
from experiments.training import steps as training

PyTree = Any
MNIST, CIFAR = (28, 28, 1), (32, 32, 3)
EXAMPLES, VALIDATION = 45_000, 5_000
RECIPE = training.Recipe((1,), (0.1,))


def replicated_step(target: Target, model: str, shape: tuple[int, int, int], count: int) -> Case:
    """Return a step of replicates of the recall study, each on its own batch of 128 images."""
    task, placement = tasks.classification(_dataset(shape), model), _placement(target)
    tx = training.optimizer(task, RECIPE, training.steps_per_epoch(RECIPE, EXAMPLES), oneshot.PRUNABLE)
    state = _states(task, tx, count)
    stack = lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape), leaf.dtype)
    batch = jax.tree.map(stack, _split(shape, RECIPE.batch))

    def step(replicate: tuple[training.TrainState, datasets.Split]) -> training.TrainState:
        return training.train_step(task, tx, *replicate)[0]

    program = replicates.spread(step, placement).program
    each = count // len(target.devices)
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.params)) // count
    floor = each * ((5 * FLOAT + MASK) * weights + RECIPE.batch * math.prod(shape))
    name = f"{model} step, {count} replicates" if count > 1 else f"{model} step"
    return Case(name, program, (_over(target, (state, batch)), ()), (0,), floor)


def epoch(target: Target, model: str, shape: tuple[int, int, int], count: int) -> Case:
    """Return an epoch of the recall study as one program: order, steps, validation, best weights."""
    task, placement = tasks.classification(_dataset(shape), model), _placement(target)
    phase = phases.compile_phase(task, RECIPE, oneshot.PRUNABLE, placement, examples=EXAMPLES, validation=VALIDATION)
    tx = training.optimizer(task, RECIPE, training.steps_per_epoch(RECIPE, EXAMPLES), oneshot.PRUNABLE)
    state = _states(task, tx, count)
    shared = (jax.ShapeDtypeStruct((), jnp.int32), _split(shape, EXAMPLES), _split(shape, VALIDATION))
    program = phase.epoch.program  # type: ignore[attr-defined]
    return Case(f"{model} epoch", program, (_over(target, state), _everywhere(target, shared)), (0,), 0)


def grid_epoch(target: Target, seeds: int = 3, depth: int = 10, width: int = 16) -> Case:
    """Return an epoch of the networks of a stage of the CIFAR grid as one program, with the penalty."""
    dataset = _dataset(CIFAR, "cifar10")
    setup = image_grid.Setup("cifar10", "norm", depth, width, 1, 1e-3, 128, 1e-4)
    graph, state = image_grid.start(setup, dataset, 0)
    program = image_grid.Programs(setup, dataset, graph).epoch
    stacked = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((seeds, *leaf.shape), leaf.dtype), state)
    order = jax.ShapeDtypeStruct((seeds, EXAMPLES), jnp.int32)
    arguments = (stacked, order, _split(CIFAR, EXAMPLES), _split(CIFAR, VALIDATION))
    return Case(f"conv {depth} x {width} epoch, {seeds} replicates", program, on_one(target, arguments), (0,), 0)


def penalty_step(target: Target, network: steps.Network, coefficient: float) -> Case:
    """Return a step with the jumpstart penalty, or without it if the coefficient is 0."""
    state, step = steps.program(network, coefficient=coefficient)
    state = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), state)
    images = jax.ShapeDtypeStruct((network.batch, *network.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((network.batch,), jnp.int32)
    weights = sum(leaf.size for leaf in jax.tree.leaves(state[0]))
    floor = 5 * FLOAT * weights + FLOAT * math.prod(images.shape)
    name = f"{network.name} step, {'jumpstart penalty' if coefficient else 'plain'}"
    return Case(name, step, on_one(target, (state, images, labels)), (0,), floor)


def _dataset(shape: tuple[int, int, int], name: str = "noise") -> datasets.Dataset:
    """Return a few black images; only their shape matters."""
    images = np.zeros((2, *shape), np.uint8)
    split = datasets.Split(images, np.zeros(2, np.int32))
    moments = np.full(shape[-1], 127.5, np.float32), np.full(shape[-1], 73.9, np.float32)
    return datasets.Dataset(name, split, split, split, tuple("0123456789"), *moments)


def _placement(target: Target) -> replicates.Placement:
    return replicates.Placement(Mesh(np.array(target.devices), (replicates.AXIS,)), "vmap", "scan")


def _states(task: tasks.Task, tx: Any, count: int) -> training.TrainState:
    def begin(index: jax.Array) -> training.TrainState:
        params, stats = task.init(replicates.key(0, index, 0))
        return training.begin(tx, params, stats, replicates.key(0, index, 1))

    return jax.eval_shape(jax.vmap(begin), jax.ShapeDtypeStruct((count,), jnp.int32))


def _split(shape: tuple[int, int, int], examples: int) -> datasets.Split:
    return datasets.Split(
        jax.ShapeDtypeStruct((examples, *shape), jnp.uint8), jax.ShapeDtypeStruct((examples,), jnp.int32)
    )


def _over(target: Target, tree: PyTree) -> PyTree:
    """Describe replicates that are divided among the devices."""
    return _placed(target, tree, PartitionSpec(replicates.AXIS))


def _everywhere(target: Target, tree: PyTree) -> PyTree:
    return _placed(target, tree, PartitionSpec())


def _placed(target: Target, tree: PyTree, spec: PartitionSpec) -> PyTree:
    place = NamedSharding(_placement(target).mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree)
