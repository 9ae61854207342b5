"""The hidden layers of many thin, deep networks in one program: widths padded, runs batched, layers scanned.

A network thinner than its program is padded with units that are and stay zero, so its outputs, gradients and trajectory
are those of the thin network. Layers are scanned, so compile time does not grow with depth.

A hidden layer has one of two forms. ``dense``: z = k x + b. ``conv``: the (2, 1) 'same' convolution over
an input of length 2, as in the notebooks of the CPAIOR study: with taps k0 and k1,

    z0 = k0 x0 + k1 x1 + b        [z0]   [k0 k1] [x0]
    z1 =         k0 x1 + b        [z1] = [ 0 k0] [x1] + b

so it is a dense layer of 2 * width units whose matrix has shared blocks. The gradient is summed over the entries that
share a tap, and an elementwise optimizer then keeps them equal.

Examples are on the last axis, so the inner loops run over examples at any width, which makes thin layers fast. Training
and validation examples pass forward together, training examples first; only the training examples have a backward pass.
It is written by hand (``jax.custom_vjp``): it stores one array per layer, the preactivations, and computes the gradient
of the penalty by comparing them with the extremes.

It is written by hand because a step is then faster. ``python -m benchmarks.moons_penalty`` measures the value and
gradient of the penalty alone, with this rule and with ``jprune.jumpstart_penalty``. The best version of the step with
jax's gradient and ``jprune.jumpstart_penalty(..., units=...)`` took 1.27 times the CPU time for widths 5 to 15 at depth
44, 1.18 for 20 to 25 at depth 60, 1.24 for 1 to 5 at depth 60 and 1.41 for width 4 alone (medians of 9 interleaved runs
on one shared core). In it units and points are exchanged, so that examples stay last, and training and validation
examples pass forward together. What remains is mostly the backward pass of the shifted tap. A change of rounding also
changes what is trained: after 100 epochs at widths 20 to 25, 11 of 12 networks had other accuracies. Tests compare
values and gradients of both.
"""

import dataclasses
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from experiments.jumpstart_grid.config import Layer

Axis = Literal["unit", "point"]

BN_EPSILON = 1e-3  # Keras' default [inferred]


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The static properties shared by the networks of one program.

    The penalty is that of ``jprune.jumpstart_penalty`` with the preset ``cpaior_keras``.

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
    """Scale and shift of batch normalization, (depth, runs, units) each."""

    scale: jax.Array
    shift: jax.Array


class Moments(NamedTuple):
    """Mean and variance of each channel, (depth, runs, width) each."""

    mean: jax.Array
    variance: jax.Array


class HiddenLayers(NamedTuple):
    """Weights of the hidden layers; a weight that a convolution shares is repeated wherever it is used.

    Attributes:
      first: (runs, units, 2).
      hidden: (depth - 1, runs, units, units), rows are outputs.
      bias: (depth, runs, units).
      norm: scale and shift of batch normalization, or None.
    """

    first: jax.Array
    hidden: jax.Array
    bias: jax.Array
    norm: Norm | None


class LayerContext(NamedTuple):
    """Inputs of the layers that have no gradient.

    Attributes:
      real: mask of the units that are not padding, (runs, units) bool; None if all are real.
      running: the moments that normalize validation examples; None without normalization.
      keep: factors of dropout for the outputs of all hidden layers but the last, (depth - 1,
        runs, units, examples): 0 or 1 / (1 - rate), 1 for validation examples; None without dropout.
    """

    real: jax.Array | None = None
    running: Moments | None = None
    keep: jax.Array | None = None


class _Extremes(NamedTuple):
    """Largest and smallest preactivation of a layer; None for an axis that the penalty does not use.

    Units: (runs, units) over training examples. Points: (runs, positions, examples) over channels.
    """

    unit: tuple[jax.Array, jax.Array] | None
    point: tuple[jax.Array, jax.Array] | None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def run_stack(
    arch: Architecture, weights: HiddenLayers, context: LayerContext, inputs: jax.Array
) -> tuple[jax.Array, jax.Array, Moments | None]:
    """Pass inputs through the hidden layers; differentiable with respect to the weights.

    Args:
      arch: architecture of the program.
      weights: weights of all runs.
      context: padding, running moments, dropout.
      inputs: (runs, 2, examples), training examples first.

    Returns:
      The outputs (runs, units, examples), the sum of squared slacks (runs,), and the moments of the
      training examples where there is normalization.
    """
    return _forward(arch, weights, context, inputs)[0]


def _forward(arch, weights, context, inputs):
    real = context.real
    z = _affine(weights.first, weights.bias[0], inputs)

    def layer(carry, xs):
        z, total = carry
        kernel, bias, norm, running, keep = xs
        extremes = _extremes(arch, z, real)
        a, moments = _activate(arch, z, norm, running, keep)
        carry = _affine(kernel, bias, a), total + _squared_slacks(arch, real, extremes)
        return carry, (z[..., : arch.train], extremes, moments)

    xs = (weights.hidden, weights.bias[1:], _but_last(weights.norm), _but_last(context.running), context.keep)
    (z, total), (saved, extremes, moments) = lax.scan(layer, (z, jnp.zeros(len(inputs))), xs)
    last = _extremes(arch, z, real)
    outputs, last_moments = _activate(arch, z, _last(weights.norm), _last(context.running), None)
    out = (outputs, total + _squared_slacks(arch, real, last), _appended(moments, last_moments))
    return out, (weights, context, inputs[..., : arch.train], (saved, extremes), (z[..., : arch.train], last))


def _backward(arch, residuals, cotangents):
    weights, context, inputs, below, top = residuals
    d_outputs, d_penalty, _ = cotangents
    real, keep = context.real, None if context.keep is None else context.keep[..., : arch.train]

    def through(z, extremes, norm, keep, da):
        """Compute the gradients of a layer's preactivations and normalization from those of its outputs."""
        _, pull = jax.vjp(lambda z, norm: _activate(arch, z, norm, None, keep)[0], z, norm)
        dz, d_norm = pull(da)
        return dz + _penalty_gradient(arch, z, real, extremes, d_penalty), d_norm

    def layer(dz, xs):
        kernel, z, extremes, norm, keep = xs
        a, _ = _activate(arch, z, norm, None, keep)
        d_kernel = _tied(arch, jnp.einsum("ron,rin->roi", dz, a))
        if real is not None:
            d_kernel = jnp.where(real[:, :, None] & real[:, None, :], d_kernel, 0.0)
        below, d_norm = through(z, extremes, norm, keep, jnp.einsum("roi,ron->rin", kernel, dz))
        return below, (d_kernel, dz.sum(2), d_norm)

    dz, d_top = through(*top, _last(weights.norm), None, d_outputs[..., : arch.train])
    xs = (weights.hidden, *below, _but_last(weights.norm), keep)
    dz, (d_hidden, d_bias, d_norm) = lax.scan(layer, dz, xs, reverse=True)
    d_first = _tied(arch, jnp.einsum("ron,rin->roi", dz, inputs))
    if real is not None:
        d_first = jnp.where(real[:, :, None], d_first, 0.0)
    d_bias = jnp.concatenate([dz.sum(2)[None], d_bias])
    each = partial(_tied_channels, arch, real)
    return HiddenLayers(d_first, d_hidden, each(d_bias), jax.tree.map(each, _appended(d_norm, d_top))), None, None


run_stack.defvjp(_forward, _backward)


def _affine(kernel, bias, inputs):
    return jnp.einsum("roi,rin->ron", kernel, inputs) + bias[:, :, None]


def _activate(arch, z, norm, running, keep):
    """Apply normalization (if any), ReLU and dropout; also return the moments of the training examples."""
    moments = None
    if norm is not None:
        batch = z[..., : arch.train]
        places = _places(arch, batch)
        moments = Moments(places.mean((1, 3)), places.var((1, 3)))
        z_train = _normalize(arch, batch, norm, moments)
        if running is None:  # only training examples go backward
            z = z_train
        else:
            z = jnp.concatenate([z_train, _normalize(arch, z[..., arch.train :], norm, running)], -1)
    a = jax.nn.relu(z)
    return (a if keep is None else a * keep), moments


def _normalize(arch, z, norm, moments):
    mean, variance = (jnp.tile(moment, (1, arch.positions)) for moment in moments)
    scale = norm.scale * lax.rsqrt(variance + BN_EPSILON)
    return (z - mean[:, :, None]) * scale[:, :, None] + norm.shift[:, :, None]


def _extremes(arch, z, real):
    z = z[..., : arch.train]
    places, real = _places(arch, z), _real_places(arch, real)
    unit = point = None
    if "unit" in arch.penalized:
        unit = z.max(2), z.min(2)
    if "point" in arch.penalized:
        point = places.max(2, where=real, initial=-jnp.inf), places.min(2, where=real, initial=jnp.inf)
    return _Extremes(unit, point)


def _squared_slacks(arch, real, extremes):
    """Return the sum of squared slacks over units and points of a layer, (runs,)."""
    total = jnp.zeros(())
    for pair in extremes:
        if pair is not None:
            slack = arch.balance * jax.nn.relu(1 - pair[0]) + (1 - arch.balance) * jax.nn.relu(1 + pair[1])
            if real is not None and slack.ndim == 2:  # not for padding; points have three axes
                slack = jnp.where(real, slack, 0.0)
            total += jnp.square(slack).reshape(len(slack), -1).sum(1)
    return total


def _penalty_gradient(arch, z, real, extremes, d_penalty):
    """Return the gradient of the slacks of a layer: nonzero at its extremes, split evenly among ties."""
    if not arch.penalized:
        return jnp.zeros((), z.dtype)
    _, pull = jax.vjp(partial(_squared_slacks, arch, real), extremes)
    (slopes,) = pull(d_penalty)
    places, real = _places(arch, z), _real_places(arch, real)
    dz = jnp.zeros((), z.dtype)
    for extreme, slope in zip(extremes.unit or (), slopes.unit or (), strict=True):
        here = z == extreme[:, :, None]
        dz += jnp.where(here, (slope / here.sum(2, dtype=z.dtype))[:, :, None], 0.0)
    for extreme, slope in zip(extremes.point or (), slopes.point or (), strict=True):
        here = places == extreme[:, :, None]
        here = here if real is None else here & real
        dz += jnp.where(here, (slope / here.sum(2, dtype=z.dtype))[:, :, None], 0.0).reshape(z.shape)
    return dz


def _places(arch, z):
    """Reshape (runs, units, examples) to (runs, positions, width, examples)."""
    return z.reshape(len(z), arch.positions, arch.width, z.shape[-1])


def _real_places(arch, real):
    return None if real is None else _places(arch, real[:, :, None])


def _tied(arch, gradient):
    """Sum the gradient of a matrix (runs, units, inputs) over the entries that share a tap."""
    if arch.positions == 1:
        return gradient
    out, inputs = arch.width, gradient.shape[-1] // 2
    d0 = gradient[:, :out, :inputs] + gradient[:, out:, inputs:]
    top = jnp.concatenate([d0, gradient[:, :out, inputs:]], -1)
    return jnp.concatenate([top, jnp.concatenate([jnp.zeros_like(d0), d0], -1)], -2)


def _tied_channels(arch, real, gradient):
    """Sum the gradient of a parameter of each channel, (depth, runs, units), over the positions."""
    summed = gradient.reshape(*gradient.shape[:-1], arch.positions, arch.width).sum(-2)
    tied = jnp.concatenate([summed] * arch.positions, -1)
    return tied if real is None else jnp.where(real[None], tied, 0.0)


def _appended(some, one):
    """Append the tree of the last layer to that of the others, (depth - 1, ...); return (depth, ...)."""
    return jax.tree.map(lambda some, one: jnp.concatenate([some, one[None]]), some, one)


def _but_last(tree):
    return jax.tree.map(lambda x: x[:-1], tree)


def _last(tree):
    return jax.tree.map(lambda x: x[-1], tree)
