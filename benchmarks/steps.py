"""Training steps of a network on both sides, which are checked against each other before timing."""

import importlib.util
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.recipe import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY
from benchmarks.timing import Side, same
from experiments.models import networks
from jprune import trees
from jprune.jumpstart.capture import call_with_preactivations
from jprune.jumpstart.penalty import jumpstart_penalty

TORCH = importlib.util.find_spec("torch") is not None
if TORCH:  # our side also runs without torch
    from benchmarks import in_torch

PyTree = Any
Step = Callable[[PyTree, jax.Array, jax.Array], tuple[PyTree, jax.Array]]


class DeepDense(nnx.Module):
    """A dense network with scanned layers."""

    def __init__(self, inputs: int, classes: int, depth: int, width: int, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, kernel_init=nnx.initializers.glorot_uniform())
        self.first = linear(inputs, width, rngs=rngs)
        stacked = nnx.vmap(lambda rngs: linear(width, width, rngs=rngs))
        self.hidden = nnx.split_rngs(splits=depth - 1)(stacked)(rngs)
        self.head = linear(width, classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, inputs) -> logits (batch, classes)."""
        through = nnx.scan(lambda layer, x: layer(nnx.relu(x)), in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        return self.head(nnx.relu(through(self.hidden, self.first(x))))


def by_path(params: PyTree) -> dict[str, np.ndarray]:
    """Return the arrays by '/'-joined path."""
    paths, leaves, _ = trees.flatten(params)
    return {path: np.asarray(leaf) for path, leaf in zip(paths, leaves, strict=True)}


def by_layer(params: PyTree) -> dict[str, np.ndarray]:
    """Return the arrays of a ``DeepDense`` by path, with its layers separate and numbered."""
    found = {}
    for path, value in by_path(params).items():
        layer, kind = path.split("/")
        if layer == "hidden":
            found |= {f"hidden/{i}/{kind}": each for i, each in enumerate(value, 1)}
        else:
            found[f"hidden/0/{kind}" if layer == "first" else path] = value
    return found


class Network(NamedTuple):
    """A network to train, and its twin.

    Attributes:
      name: name in the table.
      create: key -> our model.
      twin: () -> the torch module.
      shape: shape of one example, channels last.
      batch: examples per step.
      flattened: shape that our model flattens before ``dense1``, channels last.
      named: function from our parameters to a dict by the twin's paths.
    """

    name: str
    create: Callable[[nnx.Rngs], nnx.Module]
    twin: Callable[[], Any]
    shape: tuple[int, ...]
    batch: int = 128
    flattened: tuple[int, int, int] | None = None
    named: Callable[[PyTree], Mapping[str, np.ndarray]] = by_path


def lenet() -> Network:
    """Return LeNet on images of 28 x 28."""
    return Network(
        "LeNet",
        lambda rngs: networks.create("lenet", num_classes=10, input_shape=(28, 28, 1), rngs=rngs),
        lambda: in_torch.LeNet((28, 28, 1), 10),
        (28, 28, 1),
        flattened=(5, 5, 16),
    )


def conv(depth: int = 10, width: int = 16) -> Network:
    """Return a network of the CIFAR grid."""
    return Network(
        f"conv {depth} x {width}",
        lambda rngs: networks.create(
            "conv", num_classes=10, input_shape=(32, 32, 3), depth=depth, width=width, rngs=rngs
        ),
        lambda: in_torch.Conv(3, 10, depth, width),
        (32, 32, 3),
    )


def dense(depth: int = 60, width: int = 25) -> Network:
    """Return a thin, deep network on the batch of the moons."""
    return Network(
        f"dense {depth} x {width}",
        lambda rngs: DeepDense(2, 10, depth, width, rngs),
        lambda: in_torch.Dense(2, 10, (width,) * depth),
        (2,),
        batch=85,
        named=by_layer,
    )


def resnet(depth: int = 20) -> Network:
    """Return a ResNet for CIFAR."""
    return Network(
        f"ResNet-{depth}",
        lambda rngs: networks.create(f"resnet{depth}", num_classes=10, input_shape=(32, 32, 3), rngs=rngs),
        lambda: in_torch.ResNet(depth, 3, 10),
        (32, 32, 3),
    )


def batch(network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Return images and labels, the same for both sides."""
    rng = np.random.default_rng(0)
    images = rng.standard_normal((network.batch, *network.shape), dtype=np.float32)
    return images, rng.integers(0, 10, network.batch).astype(np.int32)


def chain(*links: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of every step: weight decay, Nesterov momentum, and further links."""
    sgd = optax.sgd(LEARNING_RATE, MOMENTUM, nesterov=True)
    return optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), sgd, *links)


def program(
    network: Network, *links: optax.GradientTransformation, coefficient: float = 0.0, seed: int = 0
) -> tuple[PyTree, Step]:
    """Return our training step, not yet compiled, and its initial state.

    Args:
      network: the network to train.
      *links: links after the optimizer, such as ``jprune.prune(...)``.
      coefficient: coefficient of the jumpstart penalty, from the same forward pass; 0 leaves it out.
      seed: seed of the initial weights.

    Returns:
      (params, statistics, optimizer state), and (state, images, labels) -> (state, loss).
    """
    model = network.create(nnx.Rngs(seed))
    graph, params, stats = nnx.split(model, nnx.Param, ...)
    tx = chain(*links)

    def loss(params: PyTree, stats: PyTree, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, PyTree]:
        # After this map the statistics are variables of this trace, which the model may modify.
        net = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, stats))
        if coefficient:
            logits, preactivations = call_with_preactivations(net, images, stacked=True)
            extra = coefficient * jumpstart_penalty(preactivations)
        else:
            logits, extra = net(images), 0.0
        entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return entropy + extra, nnx.state(net, nnx.Not(nnx.Param))

    def step(state: PyTree, images: jax.Array, labels: jax.Array) -> tuple[PyTree, jax.Array]:
        params, stats, opt_state = state
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, stats, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params, grad=grads)
        return (optax.apply_updates(params, updates), stats, opt_state), value

    return (params, stats, tx.init(params)), step


def repeated(step: Step, state: PyTree, images: np.ndarray, labels: np.ndarray) -> Side:
    """Compile a step and repeat it on the same batch; return (state, loss) of the last."""
    compiled = jax.jit(step, donate_argnums=0)
    state = jax.tree.map(jnp.copy, state)
    images, labels = jnp.asarray(images), jnp.asarray(labels)

    def side() -> tuple[PyTree, jax.Array]:
        nonlocal state
        state, loss = compiled(state, images, labels)
        return jax.block_until_ready((state, loss))

    return side


def pair(network: Network, *, coefficient: float = 0.0, compiled: bool = False) -> tuple[Side, Side]:
    """Return our step and torch's, after one step each with equal losses and weights.

    Raises:
      AssertionError: losses or weights differ.
    """
    images, labels = batch(network)
    state, step = program(network, coefficient=coefficient)
    twin = network.twin()
    in_torch.load(twin, network.named(state[0]), network.flattened)
    ours = repeated(step, state, images, labels)
    theirs = in_torch.stepper(twin, images, labels, coefficient=coefficient, compiled=compiled)
    (after, _, _), loss = ours()
    same(f"loss of {network.name}", loss, theirs(), rtol=1e-4)
    wanted = network.twin()
    in_torch.load(wanted, network.named(after), network.flattened)
    moved = dict(twin.named_parameters())
    for name, weights in wanted.named_parameters():
        same(f"{name} of {network.name}", weights.detach(), moved[name].detach(), rtol=1e-3, atol=2e-5)
    in_torch.use_best_threads(theirs)
    return ours, theirs
