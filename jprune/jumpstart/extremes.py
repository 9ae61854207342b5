"""Maxima and minima over units, points and layers, with a gradient that follows a tie rule.

The preactivations of a layer are (batch, *space, units). Pooled space is reduced first, and only once. The extremes of
these blocks, (batch, units), are then used for units, points and the whole layer. So a convolution's output is read
once forward for each of maximum and minimum, and twice backward, for any combination. Without pooling, a unit or point
has a position in space, and each cell of z is a block.

The gradient rule is custom because ``lax.pmax`` has no gradient and ``jnp.max`` has only one tie rule. On several
devices, every device differentiates its own copy of a replicated result, and receives the gradient of that result with
respect to its own slice of z.
"""

import math
from collections.abc import Callable, Hashable
from functools import partial
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array

Axis = str  # "unit", "point" or "layer"
Sign = int  # 1 for the maximum, -1 for the minimum
Extremes = dict[tuple[Axis, Sign], Array]
_Residuals: TypeAlias = tuple[Array, Array | None, Array | None, dict[Sign, Array], Extremes]


class Spec(NamedTuple):
    """The extremes to compute; static under jit.

    Attributes:
      wanted: the (axis, sign) pairs.
      ties: 'average', 'single' or 'random'.
      axis_name: the mesh axes that the batch is sharded over, or None.
      batch_last: whether z is (units, *space, batch) instead.
      pooled: whether units and points are reduced over space; if not, there is one for each position.
    """

    wanted: tuple[tuple[Axis, Sign], ...]
    ties: str
    axis_name: Hashable
    batch_last: bool
    pooled: bool = True

    @property
    def signs(self) -> list[Sign]:
        """The signs of the wanted pairs."""
        return sorted({sign for _, sign in self.wanted}, reverse=True)

    def space(self, z: Array) -> tuple[int, ...]:
        """Return the axes of z that a block is reduced over."""
        return tuple(range(1, z.ndim - 1)) if self.pooled else ()

    def reduced(self, axis: Axis, ndim: int) -> tuple[int, ...]:
        """Return the axes of the blocks over which a unit, a point or a layer is reduced."""
        batch, units = (ndim - 1, 0) if self.batch_last else (0, ndim - 1)
        return {"unit": (batch,), "point": (units,), "layer": tuple(range(ndim))}[axis]

    def devices(self, axis: Axis) -> Hashable:
        """Return the mesh axes of this reduction; none for a point, which is on one device."""
        return None if axis == "point" else self.axis_name


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def extremes(spec: Spec, z: Array, valid: Array | None, key: Array | None) -> Extremes:
    """Compute the wanted maxima and minima of z, in float32 or wider.

    Args:
      spec: what to compute.
      z: preactivations (batch, *space, units) of a real floating dtype, or with batch and units
        exchanged as ``spec`` says.
      valid: bool, broadcastable to z: the cells to include; None for all.
      key: a PRNG key for random ties.

    Returns:
      A dict from (axis, sign) to an array: (units,), (batch,) for points, or a scalar for the layer; without pooling,
      units and points have the shape of z without the reduced axis. It is infinite if no cell is included. With
      'average' the gradient is split evenly over tied cells. With 'single' the gradient of a unit goes to the first
      position in space and there to the first example, that of a point to the first position and there to the first
      unit, that of a layer to the first cell. With 'random' it goes to a random tied cell.
    """
    return _forward(spec, z, valid, key)[0]


def _forward(spec: Spec, z: Array, valid: Array | None, key: Array | None) -> tuple[Extremes, _Residuals]:
    space = spec.space(z)
    blocks = {sign: _extreme(_filled(z, valid, sign), sign, space) for sign in spec.signs}
    if space:  # otherwise XLA merges nested reductions, and reads z once more for each
        blocks = lax.optimization_barrier(blocks)  # type: ignore[no-untyped-call]
    found = {}
    for axis, sign in spec.wanted:
        extreme = _extreme(blocks[sign], sign, spec.reduced(axis, blocks[sign].ndim))
        found[axis, sign] = _over_devices(extreme, lax.pmax if sign > 0 else lax.pmin, spec.devices(axis))
    return found, (z, valid, key, blocks, found)


def _backward(spec: Spec, residuals: _Residuals, cotangents: Extremes) -> tuple[Array, None, None]:
    z, valid, key, blocks, found = residuals
    space = spec.space(z)
    tied = {sign: _filled(z, valid, sign) == jnp.expand_dims(blocks[sign], space) for sign in spec.signs}
    chosen, ranks = _chosen(spec, tied, space, key)
    known = _Blocks(blocks, ranks, found)
    wanted = {sign: [axis for axis, s in spec.wanted if s == sign] for sign in chosen}

    def shares() -> list[Array | int]:
        return [
            sum(_share(spec, axis, sign, known, cotangents[axis, sign]) for axis in wanted[sign]) for sign in wanted
        ]

    def in_a_branch() -> list[Array | int]:
        least = min(found.values(), key=lambda extreme: extreme.size)
        always = ~(least.max() > jnp.inf)  # always true, also for NaN, but not known at compile time
        otherwise = lambda: [jnp.where(blocks[s] > jnp.inf, blocks[s], 0) for s in wanted]
        branched: list[Array | int] = lax.cond(always, shares, otherwise)
        return branched

    # A branch is compiled separately; else XLA's CPU compiler would recompute a block's share for each of its cells.
    by_sign = lax.platform_dependent(cpu=in_a_branch, default=shares) if space else shares()
    gradient: Array | int = 0
    for share, cells in zip(by_sign, chosen.values(), strict=True):
        # Without space to reduce, a block is its only cell.
        gradient = gradient + (jnp.where(cells, jnp.expand_dims(share, space), 0) if space else share)
    if valid is not None:  # a masked cell equals the extreme if a whole unit or point is masked
        gradient = jnp.where(valid, gradient, 0)
    return jnp.asarray(gradient, z.dtype), None, None


extremes.defvjp(_forward, _backward)


def accumulated(dtype: DTypeLike) -> np.dtype:
    """Return the dtype to compute in: float32 for narrower dtypes, otherwise the dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def _filled(z: Array, valid: Array | None, sign: Sign) -> Array:
    """Replace excluded cells of z by the infinity that this extreme ignores."""
    x = z.astype(accumulated(z.dtype))
    if valid is None:
        return x
    # A scan stores constants in the shape of x; this depends on the mask.
    fill = jnp.where(valid, 0, jnp.asarray(-sign * jnp.inf, x.dtype))
    return jnp.where(valid, x, fill)


def _extreme(x: Array, sign: Sign, axes: tuple[int, ...]) -> Array:
    if not axes:
        return x
    return x.max(axis=axes) if sign > 0 else x.min(axis=axes)


def _over_devices(x: Array, reduce: Callable[[Array, Hashable], Array], names: Hashable) -> Array:
    reduced: Array = x if names is None else reduce(x, names)
    return reduced


def _chosen(
    spec: Spec, tied: dict[Sign, Array], space: tuple[int, ...], key: Array | None
) -> tuple[dict[Sign, Array], dict[Sign, Array | None]]:
    """Return the cells of each block that receive the gradient, and a rank that decides between blocks.

    The rank, shaped like the blocks, is the number of tied cells with 'average' (None: one), the position of the first
    one in space with 'single', and the largest random number among them with 'random'.
    """
    if spec.ties == "average":
        counts = _count_cells(list(tied.values()), space) if space else [None] * len(tied)
        return tied, dict(zip(tied, counts, strict=True))
    chosen: dict[Sign, Array] = {}
    ranks: dict[Sign, Array | None] = {}
    for sign, cells in tied.items():
        if spec.ties == "single":
            order = _position(cells.shape, space)
            rank = _extreme(jnp.where(cells, order, np.iinfo(np.int32).max), -1, space)
        else:
            assert key is not None
            draw = jax.random.fold_in(key, sign + 1)
            if spec.axis_name is not None:
                draw = jax.random.fold_in(draw, lax.axis_index(spec.axis_name))
            # With probability k^2 / 2^33, two of k tied cells draw the same 32 bits, and both receive the gradient.
            order = jax.random.bits(draw, cells.shape, jnp.uint32)
            rank = _extreme(jnp.where(cells, order, 0), 1, space)
        ranks[sign] = rank
        chosen[sign] = cells & (order == jnp.expand_dims(rank, space))
    return chosen, ranks


def _position(shape: tuple[int, ...], space: tuple[int, ...]) -> Array:
    """Return the row-major position of each cell in space."""
    position = jnp.zeros(shape, jnp.int32)
    for axis in space:
        position = position * shape[axis] + lax.broadcasted_iota(jnp.int32, shape, axis)
    return position


def _count_cells(masks: list[Array], space: tuple[int, ...]) -> list[Array]:
    """Count True over space; as floats if that is exact, because a CPU sums floats twice as fast."""
    cells = math.prod(masks[0].shape[axis] for axis in space)
    if len(masks) == 2 and cells < 1 << 12:
        both = _packed(masks, np.float32(1 << 12)).sum(axis=space)
        second = jnp.floor(both / (1 << 12))
        return [both - second * (1 << 12), second]
    return [mask.sum(axis=space, dtype=jnp.float32 if cells <= 1 << 24 else jnp.int32) for mask in masks]


def _count_blocks(masks: list[Array], axes: tuple[int, ...]) -> list[Array]:
    """Count True over the axes; two masks in one pass, as floats or in the halves of an int32, if they fit."""
    cells = math.prod(masks[0].shape[axis] for axis in axes)
    if cells < 1 << 12:
        return _count_cells(masks, axes)
    if len(masks) == 2 and cells < 1 << 15:
        both = _packed(masks, np.int32(1 << 16)).sum(axis=axes, dtype=jnp.int32)
        return [both & 0xFFFF, both >> 16]
    return [mask.sum(axis=axes, dtype=jnp.int32) for mask in masks]


def _packed(masks: list[Array], second: np.number) -> Array:
    """Return 1 for the first mask plus ``second`` for the second, by selects, because XLA would not fuse a sum."""
    first, none = type(second)(1), type(second)(0)
    return jnp.where(masks[0], jnp.where(masks[1], first + second, first), jnp.where(masks[1], second, none))


class _Blocks(NamedTuple):
    """Extremes and ranks of the blocks, by sign, and the results."""

    extremes: dict[Sign, Array]
    ranks: dict[Sign, Array | None]
    found: Extremes


def _share(spec: Spec, axis: Axis, sign: Sign, known: _Blocks, cotangent: Array) -> Array:
    """Return the part of a cotangent that the chosen cells of each block receive."""
    over, names = spec.reduced(axis, known.extremes[sign].ndim), spec.devices(axis)
    tied = {s: known.extremes[s] == jnp.expand_dims(known.found[axis, s], over) for a, s in spec.wanted if a == axis}
    mine, rank = tied[sign], known.ranks[sign]
    g = jnp.expand_dims(cotangent, over)
    if spec.ties == "average":
        if rank is None:
            count = dict(zip(tied, _count_blocks(list(tied.values()), over), strict=True))[sign]
        else:
            count = jnp.where(mine, rank, 0).sum(axis=over)
        count = _over_devices(count, lax.psum, names).astype(g.dtype)
        return jnp.where(mine, g / jnp.expand_dims(count, over), 0)
    assert rank is not None
    if spec.ties == "single":
        for key in _order(spec, axis, rank):
            first = jnp.where(mine, key, np.iinfo(np.int32).max).min(axis=over)
            mine &= key == jnp.expand_dims(_over_devices(first, lax.pmin, names), over)
        return jnp.where(mine, g, 0)
    winner = _over_devices(jnp.where(mine, rank, 0).max(axis=over), lax.pmax, names)
    return jnp.where(mine & (rank == jnp.expand_dims(winner, over)), g, 0)


def _order(spec: Spec, axis: Axis, position: Array) -> list[Array]:
    """Return the keys, in order, that decide which block is first under 'single', from the first tied position in each.

    They are several numbers because one number would exceed 2^31 for large batches of large images.
    """
    (batch,), (width,) = spec.reduced("unit", position.ndim), spec.reduced("point", position.ndim)
    example = lax.broadcasted_iota(jnp.int32, position.shape, batch)
    unit = lax.broadcasted_iota(jnp.int32, position.shape, width)
    if spec.axis_name is not None:
        example = example + position.shape[batch] * lax.axis_index(spec.axis_name)
    return {"unit": [position, example], "point": [position, unit], "layer": [example, position, unit]}[axis]
