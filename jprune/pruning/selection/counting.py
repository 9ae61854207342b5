"""The layout of arrays for counting, and exact counts of where predicates hold.

Arrays that share a threshold form a *group*: either all arrays together, or each array alone. Elements are ordered
within their group by array, then row-major within the array. An array is counted in *rows*. Almost always it is a
single row; an array that one uint32 cannot count is split along its leading axes, and small arrays of different groups
that are packed into one array are one row each.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, ArrayLike, Bool, UInt32

from jprune.pruning.selection import uint64
from jprune.pruning.selection.uint64 import Count

_ROW = 2**32  # one uint32 counts fewer elements than this
_AXIS = 2**31
_SMALL = 2**16  # arrays of fewer elements are packed together, because every array costs time to compile
_SHORT = 2**6  # rows of fewer elements than its square are one line
_DIGIT = 8  # a round of a search in counts settles a digit of this base


@dataclasses.dataclass(frozen=True)
class Part:
    """One array to be counted.

    Attributes:
      shape: of the array.
      lead: how many leading axes make its rows.
      groups: the group of each row; one where all rows have the same.
    """

    shape: tuple[int, ...]
    lead: int
    groups: tuple[int, ...]

    def spread(self, values: Array) -> Array:
        """One value for each row, or one for all, to be broadcast with the array."""
        return values.reshape(()) if values.size == 1 else _spread(values, self.shape, self.lead)

    def before(self, cut: UInt32[Array, "rows"]) -> Bool[Array, "..."]:
        """Whether each element is among the first ``cut`` elements of its row, bool of the array's shape.

        Compares coordinates one by one, the last first, without computing positions: so it works on shards, and XLA
        finds nothing to compute before a loop and keep.
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


class Lines(NamedTuple):
    """The elements of each row of an array in lines: one axis is divided, and the axes after it are within a line.

    Attributes:
      part: the array.
      axis: the axis that is divided; the number of axes where each row is one line.
      block: how many indices of that axis are within a line.
    """

    part: Part
    axis: int
    block: int

    def end(self, line: Array, place: Array) -> Array:
        """The number of elements of a row up to and with one of a line, uint32 (rows,)."""
        if self.axis == len(self.part.shape):
            return jnp.ones_like(line)
        size, after = self.part.shape[self.axis], math.prod(self.part.shape[self.axis + 1 :])
        outer, block = jnp.divmod(line, np.uint32(max(1, -(-size // max(1, self.block)))))
        return outer * np.uint32(size * after) + block * np.uint32(self.block * after) + place + np.uint32(1)

    def ties(self, reach: Array, above: Array, one_device: bool) -> Array:
        """Count what reaches a threshold and is not above it in each line: uint32 (*leading axes, *axes of lines)."""
        if not one_device:
            divided, split = self._divide(reach & ~above)
            return _sum(divided, split)
        # The difference of two counts: a reduction with one operand is a plain loop on CPUs.
        (reach, split), (above, _) = self._divide(reach), self._divide(above)
        reached, higher = _joint_counts([reach, above], range(split, reach.ndim))
        return reached - higher

    def places(self, predicate: Array, line: Array, *, sliced: bool) -> Array:
        """Count at each place of one line (rows,) of each row: uint32 (*leading axes, *axes within a line)."""
        divided, split = self._divide(predicate)
        lead = self.part.lead
        if not sliced or lead:
            here = _index(divided.shape, lead, split) == _spread(line, divided.shape, lead)
            return jnp.sum(here & divided, axis=tuple(range(lead, split)), dtype=jnp.uint32)
        start, sizes, rest = [jnp.uint32(0)] * divided.ndim, divided.shape[split:], line[0]
        for axis in reversed(range(split)):
            rest, start[axis] = jnp.divmod(rest, np.uint32(divided.shape[axis]))
        return lax.dynamic_slice(divided, start, (1,) * split + sizes).reshape(sizes).astype(jnp.uint32)

    def _divide(self, predicate: Array) -> tuple[Array, int]:
        """The predicate with its axis divided in two, and the first axis that is within a line."""
        shape, axis, block = self.part.shape, self.axis, self.block
        if axis == len(shape) or block == shape[axis]:
            return predicate, axis
        if block == 1:
            return predicate, axis + 1
        blocks = -(-shape[axis] // block)
        if blocks * block != shape[axis]:
            widths = [(0, 0)] * len(shape)
            widths[axis] = (0, blocks * block - shape[axis])
            predicate = jnp.pad(predicate, widths)
        return predicate.reshape(*shape[:axis], blocks, block, *shape[axis + 1 :]), axis + 1


def _lines(part: Part, one_device: bool) -> Lines:
    """Divide the elements of a row into about as many lines as there are elements in each.

    An axis is cut into blocks only for one device: cutting one that is sharded might move the scores.
    """
    goal, within = math.isqrt(part.width), 1
    if goal <= _SHORT:
        return (
            Lines(part, part.lead, part.shape[part.lead]) if part.lead < len(part.shape) else Lines(part, part.lead, 1)
        )
    for axis in reversed(range(part.lead, len(part.shape))):
        size = part.shape[axis]
        if one_device and within * size > 16 * goal:
            least = -(-goal // within)
            return Lines(part, axis, next((b for b in range(least, min(16 * least, size)) if size % b == 0), least))
        if 16 * within * size >= goal or axis == part.lead:
            return Lines(part, axis, size)
        within *= size
    raise AssertionError("a row of many elements has axes")


@dataclasses.dataclass(frozen=True)
class Layout:
    """All the parts of a selection.

    Attributes:
      parts: one for each array.
      groups: how many groups there are: one, or as many as there are rows.
      one_device: whether the program is for one device. Then all counts of an array are made by one reduction of
        many operands; partitioned, that would all-gather the partial counts.
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

    def values(self, i: int, values: Array) -> Array:
        """One value for each group, (groups,), broadcast with an array."""
        return self.parts[i].spread(take(values, self.parts[i].groups))

    def count(self, predicates: Callable[[int], Sequence[Array]]) -> Count:
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
        return Count(*(take(limb, np.argsort(order).tolist()) for limb in every))

    def _count_rows(self, part: Part, predicates: Sequence[Array]) -> Sequence[Array]:
        """For each predicate, where it holds in each row: uint32 of the leading axes."""
        if self.one_device:
            return _joint_counts(predicates, range(part.lead, len(part.shape)))
        return [_sum(predicate, part.lead) for predicate in predicates]

    def cut(self, reached: Callable[[int, Any], tuple[Array, Array]], goal: Count, *, sliced: bool) -> list[Array]:
        """Find in every row where the ties that are wanted end, the first ones of each group.

        Reads every array once to count the ties in each line of a row, searches these counts, and reads the array once
        more to count at each place of the line that has the last wanted tie.

        Args:
          reached: for an array, where it reaches the threshold, and where it is above it; bool of its shape. Its
            second argument must be computed first, so that XLA keeps no array from the first reading for the second.
          goal: the number of ties wanted in each group, limbs (groups,).
          sliced: whether to slice the line out instead of reading the array again. Under ``vmap`` that is a gather.

        Returns:
          For each array, uint32 (rows,): the number of elements of the row up to and including the last wanted tie; 0
          if there is none, and the place of the last tie if there are too few.
        """
        lines = [_lines(part, self.one_device) for part in self.parts]
        leads = [part.lead for part in self.parts]
        counts = []
        for i, split in enumerate(lines):
            counts.append(split.ties(*reached(i, goal.low), self.one_device))
        rows = [_sum(count, lead).reshape(-1) for count, lead in zip(counts, leads, strict=True)]
        quotas = self._share(rows, goal)
        found = _reach(counts, leads, quotas)
        counts = []
        for i, (split, (line, _)) in enumerate(zip(lines, found, strict=True)):
            reach, above = reached(i, line)
            counts.append(split.places(reach & ~above, line, sliced=sliced))
        left = [quota - before for quota, (_, before) in zip(quotas, found, strict=True)]
        ends = []
        for split, quota, (line, _), (place, _) in zip(lines, quotas, found, _reach(counts, leads, left), strict=True):
            ends.append(jnp.where(quota > 0, split.end(line, place), np.uint32(0)))
        return ends

    def _share(self, rows: Sequence[Array], goal: Count) -> list[Array]:
        """Divide what each group wants among its rows, the first ones first: uint32 (rows,) for each array."""
        together = self.groups == 1
        shares = []
        for own, groups in (
            [(jnp.concatenate(list(rows)), (0,))] if together else zip(rows, self._groups(), strict=True)
        ):
            wanted = Count(*(jnp.broadcast_to(take(limb, groups), own.shape) for limb in goal))
            nothing = jnp.zeros_like(own)
            if len(groups) == 1 and own.size > 1:
                before = uint64.subtract(uint64.cumulative(own), Count(nothing, own))
                wanted = uint64.subtract_or_zero(wanted, before)
            shares.append(uint64.at_most(wanted, Count(nothing, own)).low)
        return jnp.split(shares[0], np.cumsum([row.size for row in rows])[:-1]) if together else shares

    def _groups(self) -> list[tuple[int, ...]]:
        return [part.groups for part in self.parts]


def _reach(counts: Sequence[Array], leads: Sequence[int], goals: Sequence[Array]) -> list[tuple[Array, Array]]:
    """Find where the running sum of counts first reaches a goal, in each row of each array.

    A running sum would have to be gathered where the counts are sharded; sums up to a few indices at a time do not.

    Args:
      counts: uint32 arrays, in rows along their leading axes; the sum of a row fits uint32.
      leads: the number of those axes.
      goals: uint32 (rows,), at most the sums.

    Returns:
      For each array the index in row-major order and the sum of the counts before it, uint32 (rows,) both.
    """
    sizes = [math.prod(count.shape[lead:]) for count, lead in zip(counts, leads, strict=True)]
    rounds = [max(0, math.ceil(math.log(max(size, 1), _DIGIT) - 1e-9)) for size in sizes]

    def narrow(_: ArrayLike, state: Any) -> Any:
        return [_narrow(count, lead, goal, s) for count, lead, goal, s in zip(counts, leads, goals, state, strict=True)]

    start = [
        (goal * np.uint32(0), goal * np.uint32(0), goal * np.uint32(0) + np.uint32(_DIGIT ** max(r - 1, 0)))
        for goal, r in zip(goals, rounds, strict=True)
    ]
    return [state[:2] for state in lax.fori_loop(0, max(rounds), narrow, start)]


def _narrow(count: Array, lead: int, goal: Array, state: tuple[Array, ...]) -> tuple[Array, ...]:
    """Find one digit of the index that ``_reach`` looks for: (index, sum before it, step)."""
    place, before, step = state
    index = _index(count.shape, lead, count.ndim)
    sums = []
    for digit in range(1, _DIGIT):
        end = _spread(place + step * np.uint32(digit), count.shape, lead)
        sums.append(_sum(jnp.where(index < end, count, np.uint32(0)), lead).reshape(-1))
    short = [total < goal for total in sums]
    passed = functools.reduce(jnp.add, [s.astype(jnp.uint32) for s in short])
    best = functools.reduce(jnp.maximum, [jnp.where(s, total, before) for s, total in zip(short, sums, strict=True)])
    return place + step * passed, jnp.maximum(before, best), step // np.uint32(_DIGIT)


def take(values: Array, indices: Sequence[int]) -> Array:
    """Entries along the first axis, by slices: under ``vmap`` an index would become a gather."""
    runs: list[list[int]] = []
    for index in map(int, indices):
        if runs and index == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([index, index + 1])
    return jnp.concatenate([lax.slice_in_dim(values, *run) for run in runs])


def _index(shape: tuple[int, ...], start: int, stop: int) -> Array:
    """The row-major index over some axes, uint32, of ones elsewhere."""
    shape = tuple(size if start <= axis < stop else 1 for axis, size in enumerate(shape))
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(start, stop):
        index = index * np.uint32(shape[axis]) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def _spread(values: Array, shape: tuple[int, ...], lead: int) -> Array:
    """One value for each row, (rows,), to be broadcast with an array."""
    return values.reshape(shape[:lead] + (1,) * (len(shape) - lead))


def _sum(counts: Array, lead: int) -> Array:
    return jnp.sum(counts, axis=tuple(range(lead, counts.ndim)), dtype=jnp.uint32)


def _joint_counts(predicates: Sequence[Array], axes: range) -> Sequence[Array]:
    """Count over some axes where predicates hold, uint32, in one reading of what they share."""
    counts: Sequence[Array] = lax.reduce(
        tuple(p.astype(jnp.uint32) for p in predicates),
        (np.uint32(0),) * len(predicates),
        lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True)),
        tuple(axes),
    )
    return counts


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


def pack(arrays: Sequence[Any], eligible: Sequence[Any], *, each: bool, one_device: bool, dtype: Any = None) -> Packed:
    """Lay out arrays, with the small ones put together if the program is for one device.

    Neighbours in one group are joined end to end. Arrays that are groups of their own are padded to a common
    length, less than twice their own, with what is not eligible.

    Args:
      arrays: float arrays of any dtypes.
      eligible: bool arrays of what may be chosen, or ``None`` for all of an array.
      each: whether each array is a group; else all are one.
      one_device: see ``Layout``; sharded arrays are never joined.
      dtype: of what is put together; large arrays keep their own.

    Raises:
      ValueError: an axis is too long.
    """
    for array in arrays:
        if any(size >= _AXIS for size in array.shape):
            raise ValueError(f"scores of shape {array.shape}: every axis must be shorter than {_AXIS}")
    batches = [[i] for i in range(len(arrays))]
    if one_device:
        batches = _alike(arrays) if each else _neighbours(arrays)
    parts, joined, may = [], [], []
    for batch in batches:
        if len(batch) == 1:
            array, own = arrays[batch[0]], eligible[batch[0]]
            part = _part(array.shape, batch[0] if each else 0)
        else:
            small = [arrays[i] if dtype is None else arrays[i].astype(dtype) for i in batch]
            array, own = (_stack if each else _join)(small, [eligible[i] for i in batch])
            part = Part(array.shape, 1, tuple(batch)) if each else _part(array.shape, 0)
        parts.append(part)
        joined.append(array)
        may.append(own)

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


def _part(shape: tuple[int, ...], group: int) -> Part:
    lead = 0
    while math.prod(shape[lead:]) >= _ROW:
        lead += 1
    return Part(shape, lead, (group,))


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
