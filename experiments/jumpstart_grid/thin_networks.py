"""Train many thin, deep networks of one depth and several widths and seeds in one compiled program.

``train`` is the program: a number of epochs of full-batch Adam on binary cross-entropy plus the jumpstart penalty, for
all runs, on arrays made by ``start``. ``forward_alone`` is the forward pass of one thin network in numpy, without
padding. ``experiments.jumpstart_grid.thin_stack`` describes layers and shapes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import ArrayLike

from experiments.jumpstart_grid.thin_stack import (
    BN_EPSILON,
    Architecture,
    HiddenLayers,
    LayerContext,
    Moments,
    Norm,
    run_stack,
)

BN_MOMENTUM = 0.99  # Keras' default [inferred]


class ThinRun(NamedTuple):
    """One network: its width, and the seed of its initial weights."""

    width: int
    seed: int


class Weights(NamedTuple):
    """Weights of all runs.

    Attributes:
      stack: the hidden layers.
      head: (runs, units).
      head_bias: (runs,).
    """

    stack: HiddenLayers
    head: jax.Array
    head_bias: jax.Array


class Problem(NamedTuple):
    """The training problem.

    Attributes:
      inputs: (2, examples) float32, training examples first.
      labels: (examples,) float32, 0 or 1.
      real: mask of the channels that are not padding, from ``real_channels``.
    """

    inputs: jax.Array
    labels: jax.Array
    real: jax.Array | None


class ThinMetrics(NamedTuple):
    """Metrics of a step before its update, (runs,) each.

    Attributes:
      loss: mean cross-entropy over the training examples, in nats.
      penalty: sum of squared slacks, without the coefficient.
      train_accuracy: fraction of training examples classified correctly, in training mode as Keras reports it.
      val_accuracy: the same for the validation examples, without dropout and with running moments.
    """

    loss: jax.Array
    penalty: jax.Array
    train_accuracy: jax.Array
    val_accuracy: jax.Array


@dataclasses.dataclass(frozen=True)
class ThinRecipe:
    """The training recipe of the networks.

    Attributes:
      learning_rate: learning rate of Adam.
      zero: whether hidden kernels start at zero instead of Glorot uniform.
      dropout: whether dropout with a falling rate precedes every hidden layer (``dropout_rate``).
      adam_epsilon: Keras' default [inferred].
    """

    learning_rate: float = 1e-2
    zero: bool = False
    dropout: bool = False
    adam_epsilon: float = 1e-7


class ThinState(NamedTuple):
    """The state that training updates.

    Attributes:
      weights: weights of all runs.
      adam: state of the optimizer.
      running: moments of batch normalization, or None.
      epoch: number of finished epochs.
      best: (2, runs): largest training and validation accuracy so far.
      last: metrics of the last step.
      key: (runs,) PRNG keys for dropout, each from the seed, depth and width of its run; without dropout one key,
        which is not used, as in the checkpoints of earlier versions.
    """

    weights: Weights
    adam: optax.OptState
    running: Moments | None
    epoch: jax.Array
    best: jax.Array
    last: ThinMetrics
    key: jax.Array


def start(arch: Architecture, recipe: ThinRecipe, runs: Sequence[ThinRun]) -> ThinState:
    """Return the initial state: Glorot-uniform kernels with the fan-in and fan-out of the THIN network, zero biases.

    Args:
      arch: architecture of the program.
      recipe: recipe of the training.
      runs: widths and seeds; a run has the same weights and random numbers in every program.

    Raises:
      ValueError: a width is not in 1..arch.width.
    """
    taps = arch.positions  # a kernel as long as its input
    inputs = 2 // arch.positions
    first = np.zeros((taps, len(runs), arch.width, inputs), np.float32)
    hidden = np.zeros((taps, arch.depth - 1, len(runs), arch.width, arch.width), np.float32)
    head = np.zeros((len(runs), arch.positions, arch.width), np.float32)
    for i, (width, seed) in enumerate(runs):
        if not 1 <= width <= arch.width:
            raise ValueError(f"runs[{i}].width={width} must be in 1..{arch.width}, the width of the program")
        rng = np.random.default_rng((seed, arch.depth, width, taps))
        head[i, :, :width] = _glorot(rng, (arch.positions, width), arch.positions * width, 1)
        if not recipe.zero:
            first[:, i, :width] = _glorot(rng, (taps, width, inputs), taps * inputs, taps * width)
            each = _glorot(rng, (arch.depth - 1, taps, width, width), taps * width, taps * width)
            hidden[:, :, i, :width, :width] = each.swapaxes(0, 1)
    bias = np.zeros((arch.depth, len(runs), arch.width), np.float32)
    norm = Norm(np.ones_like(bias), np.zeros_like(bias)) if arch.normalized else None
    stack = HiddenLayers(tuple(first), tuple(hidden), bias, norm)
    weights = Weights(stack, head.reshape(len(runs), arch.units), np.zeros(len(runs), np.float32))
    weights = jax.tree.map(jnp.asarray, weights)
    running = Moments(jnp.zeros(bias.shape), jnp.ones(bias.shape)) if arch.normalized else None
    last = ThinMetrics(*(jnp.zeros(len(runs)) for _ in ThinMetrics._fields))  # separate arrays, because each is donated
    adam, epoch, best = _adam(recipe).init(weights), jnp.zeros((), jnp.int32), jnp.zeros((2, len(runs)))
    key = _keys(arch, runs) if recipe.dropout else jax.random.key(runs[0].seed)
    return ThinState(weights, adam, running, epoch, best, last, key)


def real_channels(arch: Architecture, runs: Sequence[ThinRun]) -> jax.Array | None:
    """Return the mask of channels that are not padding, (runs, width); None if all are real."""
    widths = np.array([run.width for run in runs])
    if (widths == arch.width).all():
        return None
    return jnp.asarray(np.arange(arch.width) < widths[:, None])


def loss(
    arch: Architecture,
    weights: Weights,
    problem: Problem,
    running: Moments | None = None,
    keep: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, tuple[ThinMetrics, Moments | None]]:
    """Compute the objective of all runs.

    Args:
      arch: architecture of the program.
      weights: weights of all runs.
      problem: the data and the mask of real channels.
      running: the moments that normalize validation examples.
      keep: factors of dropout for the training examples: for the inputs, (runs, 2, train), and for the outputs of all
        hidden layers but the last, (depth - 1, runs, units, train): 0 or 1 / (1 - rate).

    Returns:
      The sum over runs of cross-entropy + coefficient * penalty, whose gradient is that of each run; the
      metrics, and the moments of the batch.
    """
    inputs = jnp.broadcast_to(problem.inputs[None], (len(weights.head), *problem.inputs.shape))
    inputs, others = inputs[..., : arch.train], inputs[..., arch.train :]
    labels, other_labels = problem.labels[None, : arch.train], problem.labels[None, arch.train :]
    context = LayerContext(problem.real, running)
    if keep is not None:
        inputs, context = inputs * keep[0], context._replace(keep=keep[1])
    outputs, other_outputs, slack, moments = run_stack(arch, weights.stack, context, inputs, others)
    logits, other_logits = _logits(weights, outputs), _logits(weights, other_outputs)
    entropy = (jnp.logaddexp(0.0, logits) - labels * logits).mean(1)
    outcome = ThinMetrics(entropy, slack, _share_right(logits, labels), _share_right(other_logits, other_labels))
    return (entropy + arch.coefficient * slack).sum(), (outcome, moments)


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def train(arch: Architecture, recipe: ThinRecipe, epochs: int, state: ThinState, problem: Problem) -> ThinState:
    """Train all runs for some more epochs; an epoch is one step on all training examples.

    Args:
      arch: architecture of the program.
      recipe: recipe of the training.
      epochs: number of epochs.
      state: state to continue from; its buffers are donated.
      problem: the data and the mask of real channels.

    Returns:
      The state after these epochs. The validation accuracy of an epoch is measured after its step, so the next step
      records it, and ``forward_alone`` computes the last one.
    """
    optimizer = _adam(recipe)

    def epoch(state, _):
        keep = _dropout(arch, state) if recipe.dropout else None
        value = partial(loss, arch)
        grads, (outcome, moments) = jax.grad(value, has_aux=True)(state.weights, problem, state.running, keep)
        updates, adam = optimizer.update(grads, state.adam, state.weights)
        weights = optax.apply_updates(state.weights, updates)
        running = jax.tree.map(lambda old, new: BN_MOMENTUM * old + (1 - BN_MOMENTUM) * new, state.running, moments)
        val = jnp.where(state.epoch > 0, outcome.val_accuracy, 0.0)
        best = jnp.maximum(state.best, jnp.stack([outcome.train_accuracy, val]))
        return ThinState(weights, adam, running, state.epoch + 1, best, outcome, state.key), None

    return lax.scan(epoch, state, None, length=epochs)[0]


def kernels_alone(arch: Architecture, state: ThinState, index: int, run: ThinRun) -> dict[str, np.ndarray]:
    """Return the hidden kernels of one thin network, without padding, with each shared weight once.

    Args:
      arch: architecture of the program that trained it.
      state: state of all runs.
      index: index of the run among them.
      run: its width.

    Returns:
      ``first`` (taps, width, inputs) and, for more than one layer, ``hidden`` (depth - 1, taps, width, width).
    """
    stack, width = state.weights.stack, run.width
    kernels = {"first": np.stack([tap[index, :width] for tap in stack.first])}
    if arch.depth > 1:
        kernels["hidden"] = np.stack([tap[:, index, :width, :width] for tap in stack.hidden], 1)
    return kernels


def forward_alone(
    arch: Architecture,
    state: ThinState,
    index: int,
    run: ThinRun,
    inputs: np.ndarray,
    *,
    masks: Mapping[str, ArrayLike] | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Pass inputs through one thin network, without padding, dropout or batch moments, in numpy.

    Args:
      arch: architecture of the program that trained it.
      state: state of all runs.
      index: index of the run among them.
      run: its width.
      inputs: (2, examples).
      masks: masks of the weights of ``kernels_alone`` to keep; all by default.

    Returns:
      The inputs of the ReLUs, channels last: (depth, examples, positions, 1, width); and the logits
      (examples,).
    """
    weights, running = jax.tree.map(np.asarray, (state.weights, state.running))
    stack, positions, width = weights.stack, arch.positions, run.width
    kernels = kernels_alone(arch, state, index, run)
    for name, mask in (masks or {}).items():
        kernels[name] = kernels[name] * np.asarray(mask)
    a, preactivations = inputs.reshape(positions, -1, inputs.shape[-1]), []
    for depth in range(arch.depth):
        taps = kernels["hidden"][depth - 1] if depth else kernels["first"]
        z = taps[0] @ a + stack.bias[depth, index, :width, None]
        if positions == 2:
            z[0] += taps[1] @ a[1]
        if stack.norm is not None:
            mean, variance, scale, shift = (x[depth, index, :width, None] for x in (*running, *stack.norm))
            z = (z - mean) * (scale / np.sqrt(variance + BN_EPSILON)) + shift
        preactivations.append(np.moveaxis(z, 2, 0)[:, :, None])
        a = np.maximum(z, 0)
    head = weights.head[index].reshape(positions, arch.width)[:, :width]
    return np.stack(preactivations), np.tensordot(head, a) + weights.head_bias[index]


def dropout_rate(epoch: ArrayLike) -> ArrayLike:
    """Return the dropout rate of an epoch, counted from 0: .1 in the first, then from .9 down to 0 at the 1000th.

    >>> [round(float(dropout_rate(epoch)), 4) for epoch in (0, 1, 500, 1000, 2000)]
    [0.1, 0.8991, 0.45, 0.0, 0.0]
    """
    return jnp.where(epoch == 0, 0.1, jnp.maximum(0.0, 0.9 - 0.9 * epoch / 1000))


def _logits(weights, outputs):
    return jnp.einsum("ru,run->rn", weights.head, outputs) + weights.head_bias[:, None]


def _share_right(logits, labels):
    return ((logits > 0) == (labels > 0.5)).astype(jnp.float32).mean(1)


def _dropout(arch, state):
    """Return the factors of dropout for the inputs and for the outputs of all hidden layers except the last."""
    keep_rate = 1 - dropout_rate(state.epoch.astype(jnp.float32))

    def factors(key, *shape):
        return jax.random.bernoulli(key, keep_rate, (*shape, arch.train)).astype(jnp.float32) / keep_rate

    def of_run(key):
        """Draw each channel from its own key, so that a run does not depend on the width of the program."""
        key_inputs, key_hidden = jax.random.split(jax.random.fold_in(key, state.epoch))
        keys = jax.vmap(partial(jax.random.fold_in, key_hidden))(jnp.arange(arch.width))
        hidden = jax.vmap(lambda key: factors(key, arch.depth - 1, arch.positions), out_axes=2)(keys)
        return factors(key_inputs, 2), hidden.reshape(arch.depth - 1, arch.units, arch.train)

    return jax.vmap(of_run, out_axes=(0, 1))(state.key)


def _keys(arch, runs):
    """Return a key for each run, which does not depend on the other runs of the program."""
    widths, seeds = np.transpose(runs)
    fold = lambda seed, width: jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), arch.depth), width)
    return jax.vmap(fold)(seeds, widths)


def _adam(recipe):
    return optax.adam(recipe.learning_rate, eps=recipe.adam_epsilon)


def _glorot(rng, shape, fan_in, fan_out):
    limit = np.sqrt(6 / (fan_in + fan_out))
    return rng.uniform(-limit, limit, shape).astype(np.float32)
