"""Arrays laid out to be counted, and counted: by one threshold for all of them, or by one for each.

Arrays that share a threshold are a *group*: all of them, or each by itself. Elements have positions in their
group: the arrays in order, and row-major within an array. An array is counted in *rows*, which are almost
always one: leading axes make rows of their own where an array is too large for one uint32, and small arrays of
different groups that were packed together are one row each.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune.pruning.selection import uint64
from jprune.pruning.selection.uint64 import Count

_ROW = 2**32  # one uint32 counts fewer elements than this
_AXIS = 2**31
_SMALL = 2**16  # arrays of fewer elements are packed together, because every array costs time to compile


@dataclasses.dataclass(frozen=True)
class Part:
    """One array to be counted.

    Attributes:
      shape: of the array.
      lead: how many leading axes make its rows.
      groups: the group of each row; one where all rows have the same.
      start: the position in the group of the first element of the first row.
      stride: the distance between the positions of two rows.
    """

    shape: tuple[int, ...]
    lead: int
    groups: tuple[int, ...]
    start: int
    stride: int

    def spread(self, values: Any) -> Any:
        """One value for each row, or one for all, to be broadcast with the array."""
        return (
            values.reshape(self.shape[: self.lead] + (1,) * (len(self.shape) - self.lead))
            if values.size > 1
            else values.reshape(())
        )

    def before(self, cut: Any) -> Any:
        """Whether each element is among the first so many of its row, uint32 (rows): bool of the array's shape.

        Compares coordinates one by one, the last first: no position is ever written down, so this shards, and a
        loop has nothing to compute ahead and keep.
        """
        if self.lead == len(self.shape):  # a row is one element
            return self.spread(cut > 0)
        within = jnp.zeros(self.shape, bool)
        for axis in reversed(range(self.lead, len(self.shape))):
            cut, digit = (cut, None) if axis == self.lead else jnp.divmod(cut, np.uint32(max(self.shape[axis], 1)))
            place = lax.broadcasted_iota(jnp.uint32, self.shape, axis)
            bound = self.spread(cut if digit is None else digit)
            within = (place < bound) | ((place == bound) & within)
        return within

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return math.prod(self.shape[: self.lead])

    @property
    def width(self) -> int:
        """The number of elements of a row."""
        return math.prod(self.shape[self.lead :])


@dataclasses.dataclass(frozen=True)
class Layout:
    """All the parts of a selection.

    Attributes:
      parts: one for each array.
      groups: how many groups there are: one, or as many as there are rows.
      one_device: whether the program is for one device. Then all counts of an array are made in one pass over
        memory, by one reduction of many operands; partitioned, that would all-gather the partial counts.
    """

    parts: tuple[Part, ...]
    groups: int
    one_device: bool

    def sizes(self) -> list[int]:
        """The number of elements of each group."""
        sizes = [0] * self.groups
        for part in self.parts:
            for group in part.groups:
                sizes[group] += part.rows * part.width // len(part.groups)
        return sizes

    def count(self, predicates: Callable[[int], Sequence[Any]]) -> Count:
        """Count for every group where each predicate of its arrays holds: limbs (groups, predicates)."""
        counts = [self._count_rows(part, predicates(i)) for i, part in enumerate(self.parts)]
        order, rows = [], []
        single = [i for i, part in enumerate(self.parts) if part.rows == 1]
        if single:
            low = jnp.stack([count.reshape(()) for i in single for count in counts[i]]).reshape(len(single), -1)
            rows.append(Count(jnp.zeros_like(low), low))
            order += [self.parts[i].groups[0] for i in single]
        for part, count in zip(self.parts, counts, strict=True):
            if part.rows > 1:
                low = jnp.stack([rows.reshape(-1) for rows in count], axis=1)
                own = Count(jnp.zeros_like(low), low)
                rows.append(own if len(part.groups) > 1 else jax.tree.map(lambda limb: limb[None], uint64.total(own)))
                order += part.groups
        every = Count(*(jnp.concatenate(limb) for limb in zip(*rows, strict=True)))
        if self.groups == 1:
            return Count(*(limb[None] for limb in uint64.total(every)))
        places = np.argsort(order)
        return Count(every.high[places], every.low[places])

    def _count_rows(self, part: Part, predicates: Sequence[Any]) -> Sequence[Any]:
        """For each predicate, where it holds in each row: uint32 (rows)."""
        if not self.one_device:
            axes = tuple(range(part.lead, len(part.shape)))
            return [jnp.sum(p, axis=axes, dtype=jnp.uint32) for p in predicates]
        counts: Sequence[Any] = lax.reduce(
            tuple(p.astype(jnp.uint32).reshape(*part.shape[: part.lead], part.width) for p in predicates),
            (np.uint32(0),) * len(predicates),
            lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True)),
            (part.lead,),
        )
        return counts

    def cuts(self, places: Count) -> "Cuts":
        """Find how many elements of each row lie before positions of its group: limbs (groups, positions)."""
        single = [part for part in self.parts if part.rows == 1]
        together = None
        if single:
            starts = uint64.count_of([[part.start] for part in single])
            together = _within(places, [part.groups[0] for part in single], starts, [part.width for part in single])
        apart = []
        for part in self.parts:
            if part.rows > 1:
                starts = uint64.times(jnp.arange(part.rows, dtype=jnp.uint32)[:, None], part.stride)
                starts = uint64.add(starts, uint64.fill(part.start, starts.low))
                apart.append(_within(places, part.groups, starts, [part.width]))
        return Cuts(together, apart)

    def before(self, i: int, cuts: "Cuts") -> list[Any]:
        """For each position of ``cuts``, whether the elements of an array lie before it: bool of its shape."""
        part = self.parts[i]
        earlier = sum((other.rows == 1) == (part.rows == 1) for other in self.parts[:i])
        own = cuts.together[earlier : earlier + 1] if part.rows == 1 else cuts.apart[earlier]
        return [part.before(own[:, j]) for j in range(own.shape[1])]


class Cuts(NamedTuple):
    """Positions, as the number of elements before them in each row.

    Attributes:
      together: of the arrays of one row, uint32 (arrays, positions); ``None`` where there is none.
      apart: of each of the others, uint32 (rows, positions).
    """

    together: Any
    apart: list[Any]


def _within(cuts: Count, groups: Sequence[int], starts: Count, widths: Sequence[int]) -> Any:
    """How many elements of each row lie before positions: from limbs (groups, n) to uint32 (rows, n)."""
    own = Count(*(limb[np.asarray(groups)] for limb in cuts))
    own, starts = (Count(*pair) for pair in zip(*map(jnp.broadcast_arrays, own, starts), strict=True))
    room = uint64.subtract_or_zero(own, starts)
    width = jnp.broadcast_to(np.asarray(widths, np.uint32)[:, None], room.low.shape)
    return uint64.at_most(room, Count(jnp.zeros_like(width), width)).low


class Packed(NamedTuple):
    """Arrays with the small ones put together.

    Attributes:
      arrays: float arrays.
      eligible: bool arrays of what may be chosen, or ``None`` for all of an array.
      layout: how they are counted.
      unpack: takes arrays of the packed shapes back to the shapes that were packed.
    """

    arrays: list[Any]
    eligible: list[Any]
    layout: Layout
    unpack: Callable[[list[Any]], list[Any]]


def pack(arrays: Sequence[Any], eligible: Sequence[Any], *, each: bool, one_device: bool) -> Packed:
    """Lay out arrays, with the small ones put together if the program is for one device.

    Neighbours in one group are joined end to end. Arrays that are groups of their own are padded to a common
    length, less than twice their own, with what is not eligible.

    Args:
      arrays: float arrays of one dtype.
      eligible: bool arrays of what may be chosen, or ``None`` for all of an array.
      each: whether each array is a group; else all are one.
      one_device: see ``Layout``; sharded arrays are never joined.

    Raises:
      ValueError: an axis is too long.
    """
    for array in arrays:
        if any(size >= _AXIS for size in array.shape):
            raise ValueError(f"scores of shape {array.shape}: every axis must be shorter than {_AXIS}")
    batches = [[i] for i in range(len(arrays))]
    if one_device:
        batches = _alike(arrays) if each else _neighbours(arrays)
    parts, joined, may, start = [], [], [], 0
    for batch in batches:
        if len(batch) == 1:
            array, own = arrays[batch[0]], eligible[batch[0]]
            part = _part(array.shape, batch[0] if each else 0, start)
        elif each:
            array, own = _stack([arrays[i] for i in batch], [eligible[i] for i in batch])
            part = Part(array.shape, 1, tuple(batch), 0, 0)
        else:
            array, own = _join([arrays[i] for i in batch], [eligible[i] for i in batch])
            part = _part(array.shape, 0, start)
        parts.append(part)
        joined.append(array)
        may.append(own)
        start += 0 if each else array.size

    def unpack(packed: list[Any]) -> list[Any]:
        found: dict[int, Any] = {}
        for batch, array in zip(batches, packed, strict=True):
            flat = 0
            for row, i in enumerate(batch):
                shape, size = arrays[i].shape, arrays[i].size
                if len(batch) == 1:
                    found[i] = array
                elif each:
                    found[i] = array[row, :size].reshape(shape)
                else:
                    found[i] = array[flat : flat + size].reshape(shape)
                flat += size
        return [found[i] for i in range(len(arrays))]

    return Packed(joined, may, Layout(tuple(parts), len(arrays) if each else 1, one_device), unpack)


def _part(shape: tuple[int, ...], group: int, start: int) -> Part:
    lead = 0
    while math.prod(shape[lead:]) >= _ROW:
        lead += 1
    return Part(shape, lead, (group,), start, math.prod(shape[lead:]))


def _neighbours(arrays: Sequence[Any]) -> list[list[int]]:
    """Runs of small arrays; each of the others by itself."""
    batches: list[list[int]] = []
    for i, array in enumerate(arrays):
        if batches and max(array.size, arrays[batches[-1][-1]].size) < _SMALL:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _alike(arrays: Sequence[Any]) -> list[list[int]]:
    """Small arrays whose sizes have the same number of bits; each of the others by itself."""
    batches: dict[tuple[bool, int], list[int]] = {}
    for i, array in enumerate(arrays):
        small = array.size < _SMALL
        batches.setdefault((small, array.size.bit_length() if small else i), []).append(i)
    return list(batches.values())


def _join(arrays: list[Any], eligible: list[Any]) -> tuple[Any, Any]:
    joined = jnp.concatenate([array.reshape(-1) for array in arrays])
    if all(own is None for own in eligible):
        return joined, None
    return joined, jnp.concatenate([_whole(*pair).reshape(-1) for pair in zip(arrays, eligible, strict=True)])


def _stack(arrays: list[Any], eligible: list[Any]) -> tuple[Any, Any]:
    longest = max(array.size for array in arrays)

    def pad(x: Any) -> Any:
        return jnp.pad(x.reshape(-1), (0, longest - x.size))

    may = [_whole(array, own) for array, own in zip(arrays, eligible, strict=True)]
    return jnp.stack([pad(array) for array in arrays]), jnp.stack([pad(own) for own in may])


def _whole(array: Any, own: Any) -> Any:
    return jnp.ones(array.shape, bool) if own is None else own
