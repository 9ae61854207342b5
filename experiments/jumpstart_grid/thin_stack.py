"""The hidden layers of many thin, deep networks in one program: widths padded, runs batched, layers scanned.

A network thinner than its program is padded with units that are and stay zero, so its outputs, gradients and trajectory
are those of the thin network. Layers are scanned, so compile time does not grow with depth.

A hidden layer has one of two forms. ``dense``: z = k x + b. ``conv``: the (2, 1) 'same' convolution over
an input of length 2, as in the notebooks of the CPAIOR study: with taps k0 and k1,

    z0 = k0 x0 + k1 x1 + b        [z0]   [k0 k1] [x0]
    z1 =         k0 x1 + b        [z1] = [ 0 k0] [x1] + b

so it is a dense layer of 2 * width units whose matrix has shared blocks. The matrices of all layers are made from the
taps at once, before the scan.

Examples are on the last axis, so the inner loops run over examples at any width, which makes thin layers fast.
Training and validation examples pass forward together, and only training examples have tangents. Gradients are jax's
own. Between the passes, a layer keeps its preactivations and their extremes; the rest is computed again. A step takes
.81, 1.00 and .98 times the CPU time of the hand-written backward pass of earlier versions for the widths 1 to 5, 5 to
15 and 20 to 25 together, .94 with batch normalization, .77 with dropout, and 1.10 to 1.14 times for one network of
width 4 (medians of 9 to 15 interleaved measurements on one core that other programs shared).
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import jprune
from experiments.jumpstart_grid.config import Layer
from jprune.jumpstart.layers import Stack

Axis = Literal["unit", "point"]

BN_EPSILON = 1e-3  # Keras' default [inferred]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The static properties shared by the networks of one program.

    The penalty is ``jprune.jumpstart_penalty`` with the preset ``cpaior_keras``.

    Attributes:
      depth: number of hidden layers.
      width: channels of a hidden layer, including padding.
      train: number of training examples, which come first; the rest are validation examples.
      layer: form of the hidden layers.
      normalized: whether there is batch normalization between a hidden layer and its ReLU.
      penalized: whether units, points, both or none have slacks in the penalty.
      balance: rho of the penalty.
      coefficient: lambda of the penalty.
    """

    depth: int
    width: int
    train: int
    layer: Layer = "conv"
    normalized: bool = False
    penalized: tuple[Axis, ...] = ()
    balance: float = 0.5
    coefficient: float = 1e-4

    @property
    def positions(self) -> int:
        """Positions in space: 2 for the convolution, 1 for the dense form."""
        return 2 if self.layer == "conv" else 1

    @property
    def units(self) -> int:
        """Rows of a hidden layer's matrix."""
        return self.positions * self.width


class Norm(NamedTuple):
    """Scale and shift of batch normalization, (depth, runs, width) each."""

    scale: jax.Array
    shift: jax.Array


class Moments(NamedTuple):
    """Mean and variance of each channel, (depth, runs, width) each."""

    mean: jax.Array
    variance: jax.Array


class HiddenLayers(NamedTuple):
    """Weights of the hidden layers.

    Attributes:
      first: a tap for each position, (runs, width, inputs) each; the dense form has 2 inputs, the convolution 1.
      hidden: the same of the other layers, (depth - 1, runs, width, width) each, rows are outputs.
      bias: (depth, runs, width).
      norm: scale and shift of batch normalization, or None.
    """

    first: tuple[jax.Array, ...]
    hidden: tuple[jax.Array, ...]
    bias: jax.Array
    norm: Norm | None


class LayerContext(NamedTuple):
    """Inputs of the layers that have no gradient.

    Attributes:
      real: mask of the channels that are not padding, (runs, width) bool; None if all are real.
      running: the moments that normalize validation examples; None for their own, and without normalization.
      keep: factors of dropout for the outputs of all hidden layers but the last, (depth - 1, runs, units, train):
        0 or 1 / (1 - rate); None without dropout. Validation examples have none.
    """

    real: jax.Array | None = None
    running: Moments | None = None
    keep: jax.Array | None = None


def run_stack(
    arch: Architecture, weights: HiddenLayers, context: LayerContext, inputs: jax.Array, others: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, Moments | None]:
    """Pass training and validation examples through the hidden layers.

    Args:
      arch: architecture of the program.
      weights: weights of all runs.
      context: padding, running moments, dropout.
      inputs: training examples, (runs, 2, train).
      others: validation examples, (runs, 2, others); their outputs have no gradient.

    Returns:
      The outputs of both, (runs, units, train) and (runs, units, others); the sum of squared slacks of the training
      examples (runs,); and their moments where there is normalization.
    """
    first, hidden = _matrix(weights.first), _matrix(weights.hidden)
    bias = jnp.tile(weights.bias, arch.positions)

    def layer(preactivations, xs):
        z, other = preactivations
        kernel, bias, norm, running, keep, real = xs
        a, moments = _activate(arch, z, norm)
        a = a if keep is None else a * keep
        other, _ = _activate(arch, other, norm, running)
        return _affine(kernel, bias, a, other), (_penalty(arch, real, z), moments)

    last = lambda tree: jax.tree.map(lambda x: x[-1], tree)
    but_last = lambda tree: jax.tree.map(lambda x: x[:-1], tree)
    # One mask a layer: scan would store what depends on constants alone in the shape of the preactivations.
    real = jax.tree.map(lambda x: jnp.broadcast_to(x, (arch.depth - 1, *x.shape)), context.real)
    xs = (hidden, bias[1:], but_last(weights.norm), but_last(context.running), context.keep, real)
    storing = jax.checkpoint(layer, policy=_is_extreme, prevent_cse=False)
    (z, other), (penalties, moments) = lax.scan(storing, _affine(first, bias[0], inputs, others), xs)
    a, last_moments = _activate(arch, z, last(weights.norm))
    other, _ = _activate(arch, other, last(weights.norm), last(context.running))
    moments = jax.tree.map(lambda some, one: jnp.concatenate([some, one[None]]), moments, last_moments)
    return a, other, penalties.sum(0) + _penalty(arch, context.real, z), moments


def _is_extreme(primitive, *_, **__):
    return primitive.name in ("reduce_max", "reduce_min")


def _matrix(taps):
    """Convert the taps of kernels, (..., out, in) each, to the matrices of their layers."""
    if len(taps) == 1:
        return taps[0]
    k0, k1 = taps
    return jnp.concatenate([jnp.concatenate([k0, k1], -1), jnp.concatenate([jnp.zeros_like(k0), k0], -1)], -2)


def _affine(kernel, bias, inputs, others):
    z, other = _both(kernel, bias, inputs, others)
    return z, lax.stop_gradient(other)


@jax.custom_jvp
def _both(kernel, bias, inputs, others):
    """Apply a layer to training and validation examples in one product, little slower than that of the first."""
    z = _product(kernel, jnp.concatenate([inputs, others], -1)) + bias[:, :, None]
    return z[..., : inputs.shape[-1]], z[..., inputs.shape[-1] :]


@_both.defjvp
def _tangents(primals, tangents):
    kernel, _, inputs, _ = primals
    d_kernel, d_bias, d_inputs, _ = tangents
    z, other = _both(*primals)
    # XLA's CPU compiler has a faster product for a kernel that is transposed already.
    transposed = lax.optimization_barrier(kernel.swapaxes(1, 2)).swapaxes(1, 2)
    dz = _product(d_kernel, inputs) + _product(transposed, d_inputs) + d_bias[:, :, None]
    return (z, other), (dz, jnp.zeros_like(other))


def _product(kernel, inputs):
    return jnp.einsum("roi,rin->ron", kernel, inputs)


def _activate(arch, z, norm, running=None):
    """Apply normalization, if any, and ReLU; also return the moments of the examples."""
    if norm is None:
        return jax.nn.relu(z), None
    places = _places(arch, z)
    moments = Moments(places.mean((1, 3)), places.var((1, 3)))
    mean, variance = moments if running is None else running
    scale = norm.scale * lax.rsqrt(variance + BN_EPSILON)
    normalized = (places - mean[:, None, :, None]) * scale[:, None, :, None] + norm.shift[:, None, :, None]
    return jax.nn.relu(normalized).reshape(z.shape), moments


def _penalty(arch, real, z):
    """Return the sum of squared slacks of a layer, (runs,).

    Slacks of units and of points have the same formula, so exchanging the two keeps examples on the last axis.
    """
    if not arch.penalized:
        return jnp.zeros(len(z))
    mode = {("unit",): "point", ("point",): "unit"}.get(arch.penalized, "full")

    def of_run(places, real):
        return jprune.jumpstart_penalty(Stack(places), "cpaior_keras", mode=mode, balance=arch.balance, examples=real)

    return jax.vmap(of_run)(_places(arch, z), real)


def _places(arch, z):
    """Reshape (runs, units, examples) to (runs, positions, width, examples)."""
    return z.reshape(len(z), arch.positions, arch.width, z.shape[-1])
