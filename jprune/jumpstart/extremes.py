"""Maxima and minima over units, points and layers, with a gradient that obeys a tie rule.

A preactivation array is (layers, batch, space, units), L B S C, with S = 1 for dense layers. Space is
reduced first and once: the block maxima (L, B, C) then serve units, points and whole layers, so a
convolution is read twice forward (maximum and minimum) and twice backward, whatever is asked for. A
minimum is the maximum of -z, so every rule is written once, for maxima.

``lax.pmax`` has no gradient and ``jnp.max`` knows one tie rule, hence the custom rule. Its convention
over devices: every device differentiates its own copy of a replicated result, and receives the
gradient of that result with respect to the device's own slice of z.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

Axis = str  # "unit", "point" or "layer"
Sign = int  # 1 for the maximum, -1 for the minimum
_REDUCED = {"unit": (1,), "point": (2,), "layer": (1, 2)}  # axes of the blocks (L, B, C)


class Spec(NamedTuple):
    """What to compute: static under jit.

    Attributes:
      wanted: the (axis, sign) pairs.
      ties: 'average', 'single' or 'random'.
      axis_name: the mesh axes that the batch is sharded over, or None.
    """

    wanted: tuple[tuple[Axis, Sign], ...]
    ties: str
    axis_name: Any

    @property
    def signs(self) -> list[Sign]:
        """The signs that any pair asks for."""
        return sorted({sign for _, sign in self.wanted}, reverse=True)

    def over_devices(self, axis: Axis) -> Any:
        """The mesh axes that this reduction crosses: a point lies on one device."""
        return None if axis == "point" else self.axis_name


Peaks = dict[tuple[Axis, Sign], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def peaks(spec: Spec, z: jax.Array, valid: jax.Array | None, key: jax.Array | None) -> Peaks:
    """The maximum of sign * z for every wanted (axis, sign), in float32 or better.

    Args:
      spec: what to compute.
      z: preactivations (L, B, S, C) of a real floating dtype.
      valid: bool, broadcastable to (L, B, 1, C): the cells that count; ``None`` for all.
      key: a PRNG key for random ties.

    Returns:
      {(axis, sign): (L, C) for units, (L, B) for points, (L,) for layers}; -inf where no cell counts.
      With 'average' the gradient is split evenly over tied cells. With 'single' a unit's goes to the
      first position in space and there to the first example, a point's to the first position and
      there to the first unit, a layer's to the first cell. With 'random' it goes to a random one.
    """
    return _forward(spec, z, valid, key)[0]


def _forward(spec: Spec, z: Any, valid: Any, key: Any) -> tuple[Peaks, tuple[Any, ...]]:
    blocks = {sign: _signed(z, valid, sign).max(axis=2) for sign in spec.signs}
    found = {}
    for axis, sign in spec.wanted:
        peak = blocks[sign].max(axis=_REDUCED[axis])
        names = spec.over_devices(axis)
        found[axis, sign] = peak if names is None else lax.pmax(peak, names)  # type: ignore[no-untyped-call]
    return found, (z, valid, key, blocks, found)


def _backward(spec: Spec, residuals: tuple[Any, ...], cotangents: Peaks) -> tuple[Any, None, None]:
    z, valid, key, blocks, found = residuals
    gradient: Any = 0
    for sign in spec.signs:
        x = _signed(z, valid, sign)
        within = _Ties.of(spec, x, blocks[sign], key, sign)
        share = sum(
            within.share(spec, axis, jnp.expand_dims(found[axis, sign], _REDUCED[axis]), cotangents[axis, sign])
            for axis, s in spec.wanted
            if s == sign
        )
        gradient = gradient + jnp.where(within.cells, jnp.expand_dims(sign * share, 2), 0)
    if valid is not None:  # a masked cell equals the maximum where a whole unit or point is masked
        gradient = jnp.where(valid, gradient, 0)
    return gradient.astype(z.dtype), None, None


peaks.defvjp(_forward, _backward)


def accumulated(dtype: Any) -> Any:
    """The dtype to compute in: float32 for the shorter ones, otherwise their own."""
    return jnp.dtype(jnp.float32) if jnp.dtype(dtype).itemsize < 4 else jnp.dtype(dtype)


def _signed(z: jax.Array, valid: jax.Array | None, sign: Sign) -> jax.Array:
    x = z.astype(accumulated(z.dtype))
    x = x if sign > 0 else -x
    return x if valid is None else jnp.where(valid, x, -jnp.inf)


class _Ties(NamedTuple):
    """Which cells share a block's maximum, and what decides between blocks.

    Attributes:
      block: the block maxima (L, B, C).
      cells: bool (L, B, S, C), the cells that a gradient reaching their block goes to.
      rank: (L, B, C): how many cells are tied ('average'), the position of the first in space
        ('single'), or the highest lot among them ('random').
    """

    block: jax.Array
    cells: jax.Array
    rank: jax.Array

    @classmethod
    def of(cls, spec: Spec, x: jax.Array, block: jax.Array, key: jax.Array | None, sign: Sign) -> "_Ties":
        tied = x == jnp.expand_dims(block, 2)
        if spec.ties == "average":
            return cls(block, tied, tied.sum(axis=2, dtype=jnp.int32))
        if spec.ties == "single":
            position = lax.broadcasted_iota(jnp.int32, x.shape, 2)
            first = jnp.where(tied, position, x.shape[2]).min(axis=2)
            return cls(block, position == jnp.expand_dims(first, 2), first)
        key = jax.random.fold_in(jnp.asarray(key), sign + 1)
        if spec.axis_name is not None:
            key = jax.random.fold_in(key, lax.axis_index(spec.axis_name))
        # Two of k tied cells draw the same 32 bits, and both receive the gradient, once in 2^33 / k^2.
        lots = jnp.where(tied, jax.random.bits(key, x.shape, jnp.uint32), 0)
        highest = lots.max(axis=2)
        return cls(block, tied & (lots == jnp.expand_dims(highest, 2)), highest)

    def share(self, spec: Spec, axis: Axis, peak: jax.Array, cotangent: jax.Array) -> jax.Array:
        """What of the cotangent each cell in ``cells`` receives, by block (L, B, C)."""
        over, names = _REDUCED[axis], spec.over_devices(axis)
        tied = self.block == peak
        g = jnp.expand_dims(cotangent, over)
        if spec.ties == "average":
            count = jnp.where(tied, self.rank, 0).sum(axis=over, keepdims=True)
            count = count if names is None else lax.psum(count, names)  # type: ignore[no-untyped-call]
            return jnp.where(tied, g / count.astype(g.dtype), 0)
        if spec.ties == "single":
            rank = self._order(axis, spec)
            last = np.iinfo(np.int32).max
            winner = jnp.where(tied, rank, last).min(axis=over, keepdims=True)
            winner = winner if names is None else lax.pmin(winner, names)  # type: ignore[no-untyped-call]
        else:
            rank = self.rank
            winner = jnp.where(tied, rank, 0).max(axis=over, keepdims=True)
            winner = winner if names is None else lax.pmax(winner, names)  # type: ignore[no-untyped-call]
        return jnp.where(tied & (rank == winner), g, 0)

    def _order(self, axis: Axis, spec: Spec) -> jax.Array:
        """Where the first tied cell of each block comes in the order of rule 'single'."""
        _, batch, units = self.block.shape
        example = lax.broadcasted_iota(jnp.int32, self.block.shape, 1)
        unit = lax.broadcasted_iota(jnp.int32, self.block.shape, 2)
        devices = 1
        if spec.axis_name is not None:
            devices = lax.axis_size(spec.axis_name)
            example = example + batch * lax.axis_index(spec.axis_name)
        if axis == "unit":
            return self.rank * (devices * batch) + example
        if axis == "point":
            return self.rank * units + unit
        space = self.cells.shape[2]
        return (example * space + self.rank) * units + unit
