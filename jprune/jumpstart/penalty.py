"""The jumpstart penalty on units and points that are dead or linear."""

import math
from collections.abc import Hashable, Mapping
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Float

from jprune.jumpstart import extremes, groups, layers

Mode = Literal[
    "full",
    "unit",
    "point",
    "layer",
    "unit_positive",
    "point_positive",
    "positive",
    "all_but_unit_positive",
    "all_but_unit_negative",
    "all_but_point_positive",
    "all_but_point_negative",
]
Aggregate = Literal["balanced", "norm", "mean", "sum", "sum_squares"]
Ties = Literal["average", "single", "random"]
Spatial = Literal["pool", "none"]
Preset = Literal["cpaior_keras", "cpaior_torch", "ieee"]
Option: TypeAlias = Any  # of jumpstart_penalty, passed on by name; it checks the value
Scalar: TypeAlias = float | np.number | np.ndarray | Array

_BOTH, _POSITIVE, _NEGATIVE = (1, -1), (1,), (-1,)
_HINGES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "full": {"unit": _BOTH, "point": _BOTH},
    "unit": {"unit": _BOTH},
    "point": {"point": _BOTH},
    "layer": {"layer": _BOTH},
    "unit_positive": {"unit": _POSITIVE},
    "point_positive": {"point": _POSITIVE},
    "positive": {"unit": _POSITIVE, "point": _POSITIVE},
    "all_but_unit_positive": {"unit": _NEGATIVE, "point": _BOTH},
    "all_but_unit_negative": {"unit": _POSITIVE, "point": _BOTH},
    "all_but_point_positive": {"unit": _BOTH, "point": _NEGATIVE},
    "all_but_point_negative": {"unit": _BOTH, "point": _POSITIVE},
}
_PRESETS: Mapping[str, tuple[Aggregate, Ties, Spatial]] = {
    "cpaior_keras": ("sum_squares", "average", "none"),
    "cpaior_torch": ("norm", "single", "pool"),
    "ieee": ("balanced", "single", "pool"),
}
_DEFAULTS: tuple[Aggregate, Ties, Spatial] = ("balanced", "average", "pool")


def jumpstart_penalty(
    preacts: layers.Preactivations,
    preset: Preset | None = None,
    *,
    mode: Mode = "full",
    aggregate: Aggregate | None = None,
    balance: Scalar = 0.5,
    margin: tuple[Scalar, Scalar] = (1.0, 1.0),
    ties: Ties | None = None,
    spatial: Spatial | None = None,
    units: layers.Masks = None,
    examples: ArrayLike | None = None,
    axis_name: Hashable = None,
    key: Array | None = None,
) -> Float[Array, ""]:
    """Penalize units and points that are dead or linear; the penalty is 0 if all are nonlinear by the margins.

    A unit c (a channel) has maximum M and minimum m over the batch and space; a point b (an example) over units and
    space. Its slack is

        balance * relu(positive - M) + (1 - balance) * relu(negative + m)

    and the penalty aggregates the slacks U of all units and P of all points, over all layers:

        balanced     mean(U) + mean(P)
        mean, sum    over U and P together
        norm         the Euclidean norm of U and P together, with gradient 0 at the zero vector
        sum_squares  the square of the norm

    Multiply it by a coefficient and add it to the loss, or use ``add_jumpstart`` or ``jumpstart_loss``. Sums are in
    float32 or wider. It is differentiable in reverse mode, under jit, vmap, scan and shard_map.

    Args:
      preacts: preactivations before the nonlinearity and before any normalization, channels last:
        (batch, units) or (batch, height, width, units) for each layer, of a real floating dtype; in an
        ``OrderedDict`` or list, which may contain ``Stack``s; an array alone is one layer. Axes between the first and
        the last are space, so flatten several axes of output features, such as (heads, dim), as ``preactivations``
        does.
      preset: the published variant that sets ``aggregate``, ``ties`` and ``spatial`` unless they are
        given: 'cpaior_keras' (sum_squares, average, none), 'cpaior_torch' (norm, single, pool) or
        'ieee' (balanced, single, pool).
      mode: the slacks to use: 'full' (units and points), 'unit', 'point', 'layer' (one maximum and minimum per layer),
        or only some hinges: 'unit_positive', 'point_positive', 'positive', 'all_but_unit_positive',
        'all_but_unit_negative', 'all_but_point_positive', 'all_but_point_negative'. ``balance`` also multiplies a
        hinge that is used alone, and a mean is over all units or points unless the mode drops them entirely.
      aggregate: 'balanced' (default), 'norm', 'mean', 'sum' or 'sum_squares'.
      balance: rho, the weight of the positive hinge, 0 to 1. Use .51 for a network that is initialized to
        zero, where at .5 the two hinges cancel.
      margin: (positive, negative), in the unit of the preactivations.
      ties: the gradient if several cells share an extreme: 'average' (default) splits it evenly; 'single' gives it to
        the first cell along the reduced axis, then to the first of the flattened rest (for a unit, the first position
        in space and there the first example); 'random' gives it to a random cell.
      spatial: 'pool' (default) reduces over space; 'none' takes a unit for every (height, width, channel) and a point
        for every (example, height, width).
      units: mask of the real units, for thin networks padded to wide ones: a bool (units,) for every layer, or a
        sequence or mapping of them like ``preacts``.
      examples: mask of the real examples, for padded batches: bool (batch,); or of the real positions, for padded
        sequences: bool (batch, time), in general (batch, ...) with the first axes of space of every layer that has
        space. Padding does not affect any maximum, minimum, mean or gradient; units and points without a real cell are
        left out.
      axis_name: the mesh axis (or axes) over which shard_map splits the batch. Extremes and means are then over the
        global batch, and the value on every device is the single-device value. The gradient with respect to a device's
        preactivations is its slice of the single-device gradient, so gradients of parameters must be SUMMED over the
        devices. shard_map does this automatically for replicated parameters; with ``check_vma=False``, take the
        gradient inside it and apply psum.
      key: a PRNG key, for random ties only.

    Returns:
      A scalar without the coefficient, in float32 or the preactivations' wider dtype.

    Raises:
      TypeError: preactivations or masks have the wrong type or dtype.
      ValueError: an option is unknown, a margin or the balance is out of range, shapes do not match, or ties are random
        without a key.

    Source: Riera, Rey, Serra, Puertas, Pujol, "Training Thinner and Deeper Neural Networks:
    Jumpstart Regularization", CPAIOR 2022, equations 3 to 7; the balanced aggregate and the modes:
    Riera, Puertas, Pujol, "Unit-Centric Regularization for Efficient Deep Neural Networks", IEEE
    Access 2025.

    >>> z = jnp.array([[2.0, -0.5], [-3.0, -0.5]])  # the second unit is dead, and so is the second point
    >>> [float(jumpstart_penalty([z], mode=mode)) for mode in ("unit", "point", "full")]
    [0.5, 0.5, 1.0]
    """
    options = Options.make(
        preset=preset,
        mode=mode,
        aggregate=aggregate,
        balance=balance,
        margin=margin,
        ties=ties,
        spatial=spatial,
        axis_name=axis_name,
        key=key,
    )
    given = groups.grouped(preacts, units, examples)
    dtype = max((extremes.accumulated(group.z.dtype) for group in given), key=lambda d: d.itemsize)
    parts = [_totals(group, options, position) for position, group in enumerate(given)]
    totals = [_Total.over([part[axis] for part in parts], dtype) for axis in _HINGES[mode]]
    return _aggregate(totals, options.aggregate)


class Options(NamedTuple):
    """The checked options of one penalty; ``aggregate``, ``ties`` and ``spatial`` resolved."""

    mode: str
    aggregate: str
    balance: Scalar
    margin: tuple[Scalar, Scalar]
    ties: str
    spatial: str
    axis_name: Hashable
    key: Array | None

    @classmethod
    def make(
        cls,
        *,
        preset: str | None = None,
        mode: str = "full",
        aggregate: str | None = None,
        balance: Scalar = 0.5,
        margin: tuple[Scalar, Scalar] = (1.0, 1.0),
        ties: str | None = None,
        spatial: str | None = None,
        axis_name: Hashable = None,
        key: Array | None = None,
    ) -> "Options":
        """Resolve a preset and check every option.

        Raises:
          ValueError: an option that is not allowed; the message names it, its value and the allowed values.
        """
        if preset is not None:
            _one_of("preset", preset, get_args(Preset))
        defaults = _DEFAULTS if preset is None else _PRESETS[preset]
        given = (aggregate, ties, spatial)
        aggregate, ties, spatial = (d if g is None else g for d, g in zip(defaults, given, strict=True))
        _one_of("mode", mode, get_args(Mode))
        _one_of("aggregate", aggregate, get_args(Aggregate))
        _one_of("ties", ties, get_args(Ties))
        _one_of("spatial", spatial, get_args(Spatial))
        if not 0 <= number_of(balance) <= 1:
            raise ValueError(f"balance={balance} must be a number from 0 to 1: it is the weight of the positive hinge")
        if not isinstance(margin, tuple | list) or len(margin) != 2:
            raise ValueError(f"margin={margin!r} must be a pair (positive, negative), such as (1.0, 1.0)")
        if not all(math.isfinite(number_of(m)) for m in margin):
            raise ValueError(f"margin={margin!r} must be two finite numbers")
        if ties == "random" and key is None:
            raise ValueError("ties='random' needs a PRNG key: pass key=jax.random.key(seed)")
        return cls(mode, aggregate, balance, (margin[0], margin[1]), ties, spatial, axis_name, key)


def number_of(value: ArrayLike) -> float:
    """Return the value of a real scalar; 0 if it is not known before the program runs; otherwise NaN."""
    if isinstance(value, jax.core.Tracer):
        return math.nan if value.ndim else 0.0
    array = np.asarray(value)
    real = jnp.issubdtype(array.dtype, jnp.floating) or jnp.issubdtype(array.dtype, jnp.integer)
    return float(array) if real and array.ndim == 0 else math.nan


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not allowed; allowed: {', '.join(allowed)}")


class _Total(NamedTuple):
    """The sum, sum of squares and number of some slacks, from which aggregates are computed."""

    slack: Array
    square: Array
    count: ArrayLike  # type: ignore[assignment]

    @classmethod
    def over(cls, parts: list["_Total"], dtype: jnp.dtype) -> "_Total":
        """Join the totals of several groups of slacks."""
        return cls(*(jnp.asarray(sum(jnp.asarray(x, dtype) for x in column)) for column in zip(*parts, strict=True)))


def _totals(group: groups.Group, options: Options, position: int) -> dict[str, _Total]:
    """Return the totals of the slacks of one group, by axis."""
    key = options.key if options.ties == "random" else None
    key = None if key is None else jax.random.fold_in(key, position)
    group = groups.arranged(group)
    axes = _HINGES[options.mode]
    pooled = options.spatial == "pool" or list(axes) == ["layer"]
    wanted = tuple((axis, sign) for axis in axes for sign in axes[axis])
    found = _extremes(group, extremes.Spec(wanted, options.ties, options.axis_name, group.batch_last, pooled), key)
    totals = {}
    for axis in axes:
        cells = groups.real(group, axis, options.axis_name, pooled=pooled)
        slack = _slack(found, axis, cells, options)
        count = math.prod(slack.shape) if cells is None else cells.sum(dtype=slack.dtype)
        sums = (slack.sum(), jnp.square(slack).sum())
        if axis == "point" and options.axis_name is not None:
            sums = (_summed(options.axis_name, sums[0]), _summed(options.axis_name, sums[1]))
            count = lax.psum(count, options.axis_name)  # type: ignore[no-untyped-call]
        totals[axis] = _Total(*sums, count)
    return totals


def _extremes(group: groups.Group, spec: extremes.Spec, key: Array | None) -> extremes.Extremes:
    """Return the wanted extremes of every layer of a group, with a leading axis of layers."""
    depth, _, _ = group.sizes

    def of_layer(z: Array, units: Array | None, key: Array | None) -> extremes.Extremes:
        found: extremes.Extremes = extremes.extremes(spec, z, groups.cells(group, units), key)
        return found

    if depth == 1:
        units = None if group.units is None else group.units[0]
        return {pair: extreme[None] for pair, extreme in of_layer(group.z[0], units, key).items()}
    keys = None if key is None else jax.random.split(key, depth)
    found: extremes.Extremes = jax.vmap(of_layer)(group.z, group.units, keys)
    return found


def _slack(found: extremes.Extremes, axis: str, real: Array | None, options: Options) -> Array:
    """Compute the weighted sum of the hinges of the mode; 0 where no cell is real."""
    total: Array | int = 0
    weights = {1: options.balance, -1: 1 - options.balance}
    margins = dict(zip((1, -1), options.margin, strict=True))
    for sign in _HINGES[options.mode][axis]:
        extreme = found[axis, sign]
        if real is not None:
            extreme = jnp.where(real, extreme, 0)
        margin, weight = (jnp.asarray(x, extreme.dtype) for x in (margins[sign], weights[sign]))
        total = total + weight * jax.nn.relu(margin - sign * extreme)
    slack = jnp.asarray(total)
    return slack if real is None else jnp.where(real, slack, 0)


def _summed(axis_name: Hashable, x: Array) -> Array:
    """Sum over the devices; backwards, each device's term receives the cotangent of its own copy."""

    @jax.custom_vjp
    def total(x: Array) -> Array:
        summed: Array = lax.psum(x, axis_name)  # type: ignore[no-untyped-call]
        return summed

    # Adding zero makes the cotangent vary over the devices like x, which shard_map checks.
    total.defvjp(lambda x: (total(x), x), lambda x, g: (g + jnp.zeros_like(x),))
    result: Array = total(x)
    return result


def _aggregate(totals: list[_Total], aggregate: str) -> Array:
    """Aggregate units and points, given the totals of each axis of the mode."""
    if aggregate == "balanced":
        means = [_mean(total) for total in totals]
        return means[0] if len(means) == 1 else means[0] + means[1]
    joined = _Total.over(totals, totals[0].slack.dtype)
    if aggregate == "mean":
        return _mean(joined)
    if aggregate in ("sum", "sum_squares"):
        return jnp.asarray(joined.slack if aggregate == "sum" else joined.square)
    # The root has an infinite slope at zero, where the norm's gradient is defined as 0.
    zero = joined.square == 0  # False for NaN, which must not become 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, joined.square)))


def _mean(total: _Total) -> Array:
    """Return the mean slack; 0 if there are no slacks."""
    mean: Array = total.slack / jnp.maximum(total.count, 1)
    return mean
