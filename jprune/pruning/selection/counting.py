"""Lay out arrays for counting, and count exactly where predicates hold.

Arrays that share a threshold form a *group*: either all arrays together, or each array alone. Elements are ordered
within their group by array, then row-major within the array. An array is counted in *rows*. Almost always it is a
single row; an array with too many elements for a uint32 is split along its leading axes, and small arrays of different
groups that are packed into one array are one row each.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, UInt32

from jprune.pruning.selection import uint64
from jprune.pruning.selection.uint64 import AnyArray, Count

_ROW = 2**32  # a uint32 can count fewer elements than this
_AXIS = 2**31
_SMALL = 2**16  # smaller arrays are packed together, because every array costs compile time
_UNKNOWN = 2**8  # assumed number of devices of an unknown mesh
_SHORT = 2**6  # a row of fewer elements than the square of this is one line
_SHORT_LINE = 16  # with lines of so many elements there are still few counts
_LANES = 128  # a TPU stores a vector as a matrix with rows of this length, so dividing it into them copies nothing
_DIGIT = 8  # each iteration of a search in counts finds one digit in this base
_barrier: Callable[[Array], Array] = lax.optimization_barrier


@dataclasses.dataclass(frozen=True)
class Part:
    """One array to be counted.

    Attributes:
      shape: shape of the array.
      lead: number of leading axes that index its rows.
      groups: the group of each row; one entry if all rows have the same group.
    """

    shape: tuple[int, ...]
    lead: int
    groups: tuple[int, ...]

    def spread(self, values: Array) -> Array:
        """Reshape one value per row, or one for all, to broadcast with the array."""
        return values.reshape(()) if values.size == 1 else _spread(values, self.shape, self.lead)

    def before(self, cut: UInt32[Array, "rows"]) -> Bool[Array, "..."]:
        """Whether each element is among the first ``cut`` elements of its row, bool of the array's shape.

        Compares coordinates one by one, the last first, each along its own axis, without computing positions. So it
        works on shards, and XLA cannot hoist an array of positions out of a loop.
        """
        if self.lead == len(self.shape):  # a row is one element
            return self.spread(cut > 0)
        within = jnp.zeros((1,) * len(self.shape), bool)
        for axis in reversed(range(self.lead, len(self.shape))):
            cut, digit = (cut, None) if axis == self.lead else jnp.divmod(cut, np.uint32(max(self.shape[axis], 1)))
            place = _index(self.shape, axis, axis + 1)
            bound = self.spread(cut if digit is None else digit)
            within = (place < bound) | ((place == bound) & within)
        return jnp.broadcast_to(within, self.shape)

    @property
    def is_long_vector(self) -> bool:
        """Whether the array is one row with one axis, and large."""
        return len(self.shape) == 1 and self.lead == 0 and self.width >= _SMALL

    @property
    def rows(self) -> int:
        """The number of rows."""
        return math.prod(self.shape[: self.lead])

    @property
    def width(self) -> int:
        """The number of elements of a row."""
        return math.prod(self.shape[self.lead :])


class Lines(NamedTuple):
    """A division of each row of an array into lines: one axis is divided, and the axes after it are within a line.

    Attributes:
      part: the array.
      axis: the axis that is divided; the number of axes if each row is one line.
      block: the number of indices of that axis within a line.
    """

    part: Part
    axis: int
    block: int

    def end(self, line: Array, place: Array) -> Array:
        """Return the number of elements of a row up to and including a place of a line, uint32 (rows,)."""
        if self.axis == len(self.part.shape):
            return jnp.ones_like(line)
        size, after = self.part.shape[self.axis], math.prod(self.part.shape[self.axis + 1 :])
        outer, block = jnp.divmod(line, np.uint32(max(1, -(-size // max(1, self.block)))))
        return outer * np.uint32(size * after) + block * np.uint32(self.block * after) + place + np.uint32(1)

    def ties(self, reach: Array, above: Array, *, joint: bool) -> Array:
        """Count the elements equal to the threshold in each line: uint32 (*leading axes, *axes of lines)."""
        if not joint:
            divided, split = self._divide(reach & ~above)
            # Without the barrier XLA would sum whole rows in another read, instead of adding up the lines.
            return _barrier(_sum(divided, split))
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
        """Divide the axis of a predicate in two; return it with the first axis that is within a line."""
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


def _lines(part: Part, shards: int, *, tiled: bool, lanes: bool) -> Lines:
    """Divide a row so that a device has about as many lines of it as there are elements in each.

    If arrays are ``tiled``, as on a TPU, a division of an axis copies the array; then lines may be shorter instead.
    With ``lanes`` a long vector is divided into the rows in which a TPU stores it.
    """
    if lanes and part.is_long_vector:
        return Lines(part, 0, _LANES)
    goal, within = math.isqrt(part.width // shards), 1
    if goal <= _SHORT:
        return (
            Lines(part, part.lead, part.shape[part.lead]) if part.lead < len(part.shape) else Lines(part, part.lead, 1)
        )
    for axis in reversed(range(part.lead, len(part.shape))):
        size = part.shape[axis]
        if within * size > 16 * goal:
            block = 1 if tiled and within >= _SHORT_LINE else _block(size, -(-goal // within), shards)
            if block:
                return Lines(part, axis, block)
        if 16 * within * size >= goal or axis == part.lead:
            return Lines(part, axis, size)
        within *= size
    raise AssertionError("a row of many elements has axes")


def _block(size: int, goal: int, shards: int) -> int:
    """Return the length of the blocks of an axis, about ``goal``; 0 for an axis that should not be cut.

    A shard must consist of whole blocks, or the scores would be moved. An axis that cannot be sharded may be padded.
    """
    shard = size // math.gcd(size, shards)  # or a multiple of it
    longer = (block for block in range(goal, min(16 * goal, shard + 1)) if shard % block == 0)
    shorter = (block for block in range(goal, goal // 16, -1) if shard % block == 0)
    return next(longer, goal) if shard == size else next(longer, next(shorter, 0))


@dataclasses.dataclass(frozen=True)
class Layout:
    """All the parts of a selection.

    Attributes:
      parts: one for each array.
      groups: number of groups: one, or the number of rows.
      shards: a multiple of the number of shards of every axis: the size of the mesh; 1 for one device.
      paired: whether counts of sharded arrays are computed two at a time, as halves of one sum of uint64.
    """

    parts: tuple[Part, ...]
    groups: int
    shards: int
    paired: bool = False

    @property
    def one_device(self) -> bool:
        """Whether the program is for one device."""
        return self.shards == 1

    def sizes(self) -> list[int]:
        """The number of elements of each group."""
        sizes = [0] * self.groups
        for part in self.parts:
            for group in part.groups:
                sizes[group] += part.rows * part.width // len(part.groups)
        return sizes

    def values(self, i: int, values: Array) -> Array:
        """Broadcast one value per group, (groups,), with an array."""
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
                row_counts = Count(jnp.zeros_like(low), low)
                rows.append(
                    row_counts
                    if len(part.groups) > 1
                    else jax.tree.map(lambda limb: limb[None], uint64.total(row_counts))
                )
                order += part.groups
        every = Count(*(jnp.concatenate(limb) for limb in zip(*rows, strict=True)))
        if self.groups == 1:
            return Count(*(limb[None] for limb in uint64.total(every)))
        return Count(*(take(limb, np.argsort(order).tolist()) for limb in every))

    def _count_rows(self, part: Part, predicates: Sequence[Array]) -> Sequence[Array]:
        """Count where each predicate holds in each row: uint32 (*leading axes).

        On one device a reduction of many operands computes all counts of an array. In a partitioned program XLA would
        all-gather its partial counts, so there each sum has one operand.
        """
        if self.one_device:
            return _joint_counts(predicates, range(part.lead, len(part.shape)))
        if self.paired:
            return [count for i in range(0, len(predicates), 2) for count in _pair_counts(predicates[i : i + 2], part)]
        return [_sum(predicate, part.lead) for predicate in predicates]

    def cut(
        self,
        reached: Callable[[int, AnyArray], tuple[Array, Array]],
        goal: Count,
        *,
        sliced: bool,
        tiled: bool,
        lanes: bool = False,
    ) -> list[Array]:
        """Find the end of the ties to keep, the first ones of each group, in every row.

        Reads every array once to count the ties in each line of a row, searches these counts, and reads the array once
        more to count at each place of the line that has the last tie to keep.

        Args:
          reached: returns for an array where it reaches the threshold and where it is above it; bool of its shape. Its
            second argument must be computed first, so that XLA keeps no array from the first read for the second.
          goal: the number of ties to keep in each group, limbs (groups,).
          sliced: whether to slice the line instead of reading the array again. Under ``vmap`` the slice is a gather.
          tiled: whether the device may store arrays in tiles, as TPUs do.
          lanes: whether to divide long vectors as one TPU stores them.

        Returns:
          For each array, uint32 (rows,): the number of elements of the row up to and including the last tie to keep; 0
          if there is none, and the place of the last tie if there are too few.
        """
        lines = [_lines(part, self.shards, tiled=tiled, lanes=lanes) for part in self.parts]
        leads = [part.lead for part in self.parts]
        counts = []
        for i, split in enumerate(lines):
            counts.append(split.ties(*reached(i, goal.low), joint=self.one_device and not lanes))
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

    def _share(self, rows: Sequence[Array], goal: Count) -> Sequence[AnyArray]:
        """Divide the number for each group among its rows, the first rows first: uint32 (rows,) for each array."""
        together = self.groups == 1
        shares = []
        for counts, groups in (
            [(jnp.concatenate(list(rows)), (0,))] if together else zip(rows, self._groups(), strict=True)
        ):
            wanted = Count(*(jnp.broadcast_to(take(limb, groups), counts.shape) for limb in goal))
            nothing = jnp.zeros_like(counts)
            if len(groups) == 1 and counts.size > 1:
                before = uint64.subtract(uint64.cumulative(counts), Count(nothing, counts))
                wanted = uint64.subtract_or_zero(wanted, before)
            shares.append(uint64.at_most(wanted, Count(nothing, counts)).low)
        return jnp.split(shares[0], np.cumsum([row.size for row in rows])[:-1]) if together else shares

    def _groups(self) -> list[tuple[int, ...]]:
        return [part.groups for part in self.parts]


# The search for an index, digit by digit: the index so far, the sum of the counts before it, the value of one digit.
_Digits: TypeAlias = tuple[Array, Array, Array]


def _reach(counts: Sequence[Array], leads: Sequence[int], goals: Sequence[AnyArray]) -> list[tuple[Array, Array]]:
    """Find where the running sum of counts first reaches a goal, in each row of each array.

    Sharded counts would have to be gathered for a running sum; sums up to a few indices at a time avoid this.

    Args:
      counts: uint32 arrays, in rows along their leading axes; the sum of a row fits uint32.
      leads: the number of those axes.
      goals: uint32 (rows,), at most the sums.

    Returns:
      For each array the index in row-major order and the sum of the counts before it, uint32 (rows,) both.
    """
    sizes = [math.prod(count.shape[lead:]) for count, lead in zip(counts, leads, strict=True)]
    rounds = [max(0, math.ceil(math.log(max(size, 1), _DIGIT) - 1e-9)) for size in sizes]

    def narrow(_: ArrayLike, state: list[_Digits]) -> list[_Digits]:
        return [_narrow(count, lead, goal, s) for count, lead, goal, s in zip(counts, leads, goals, state, strict=True)]

    start = [
        (goal * np.uint32(0), goal * np.uint32(0), goal * np.uint32(0) + np.uint32(_DIGIT ** max(r - 1, 0)))
        for goal, r in zip(goals, rounds, strict=True)
    ]
    return [state[:2] for state in lax.fori_loop(0, max(rounds), narrow, start)]


@functools.partial(jax.jit, static_argnames="lead", inline=True)  # as in uint64: traced once for each shape
def _narrow(count: Array, lead: int, goal: AnyArray, state: _Digits) -> _Digits:
    """Find one digit of the index that ``_reach`` looks for."""
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


def take(values: AnyArray, indices: Sequence[int]) -> Array:
    """Take entries along the first axis by slices: under ``vmap`` an index would become a gather."""
    runs: list[list[int]] = []
    for index in map(int, indices):
        if runs and index == runs[-1][1]:
            runs[-1][1] += 1
        else:
            runs.append([index, index + 1])
    return jnp.concatenate([lax.slice_in_dim(values, *run) for run in runs])


def _index(shape: tuple[int, ...], start: int, stop: int) -> Array:
    """Return the row-major index over some axes, uint32, with size 1 in the other axes."""
    shape = tuple(size if start <= axis < stop else 1 for axis, size in enumerate(shape))
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(start, stop):
        index = index * np.uint32(shape[axis]) + lax.broadcasted_iota(jnp.uint32, shape, axis)
    return index


def _spread(values: Array, shape: tuple[int, ...], lead: int) -> Array:
    """Reshape one value per row, (rows,), to broadcast with an array."""
    return values.reshape(shape[:lead] + (1,) * (len(shape) - lead))


def _sum(counts: Array, lead: int) -> Array:
    return jnp.sum(counts, axis=tuple(range(lead, counts.ndim)), dtype=jnp.uint32)


def _pair_counts(predicates: Sequence[Array], part: Part) -> list[Array]:
    """Count where one or two predicates hold in each row of an array, in one sum: uint32 (*leading axes) each.

    The counts are the halves of a sum of uint64, which jax allows here also if x64 is off elsewhere.
    """
    if len(predicates) == 1:
        return [_sum(predicates[0], part.lead)]
    with jax.enable_x64(True):
        low, high = (predicate.astype(jnp.uint64) for predicate in predicates)
        half = jnp.uint32(32).astype(jnp.uint64)  # a uint64 constant would be truncated where the program is lowered
        both = jnp.sum(low | (high << half), axis=tuple(range(part.lead, low.ndim)))
        return [both.astype(jnp.uint32), (both >> half).astype(jnp.uint32)]


def _joint_counts(predicates: Sequence[Array], axes: range) -> Sequence[Array]:
    """Count over some axes where predicates hold, uint32, in one read of their shared inputs."""
    counts: Sequence[Array] = lax.reduce(
        tuple(p.astype(jnp.uint32) for p in predicates),
        (np.uint32(0),) * len(predicates),
        lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True)),
        tuple(axes),
    )
    return counts


class Packed(NamedTuple):
    """Arrays, with small ones packed together.

    Attributes:
      arrays: float arrays.
      among: bool arrays of the entries that may be chosen, or ``None`` for all of an array.
      layout: layout for counting.
      alone: layout of the original arrays, each by itself.
      unpack: converts arrays of the packed shapes back to the original shapes.
      cuts: converts cuts of the packed arrays, as ``Layout.cut`` returns them, to cuts of the original arrays.
    """

    arrays: list[Array]
    among: list[Array | None]
    layout: Layout
    alone: Layout
    unpack: Callable[[list[Array]], list[Array]]
    cuts: Callable[[list[Array]], list[Array]]


def pack(
    arrays: Sequence[Array],
    among: Sequence[Array | None],
    *,
    each: bool,
    one_device: bool,
    dtype: DTypeLike | None = None,
) -> Packed:
    """Lay out arrays, with small ones packed together if the program is for one device.

    Neighboring arrays of one group are concatenated. Arrays that are separate groups are padded with entries that may
    not be chosen to a common length, less than twice their own.

    Args:
      arrays: float arrays of any dtypes.
      among: bool arrays of the entries that may be chosen, or ``None`` for all of an array.
      each: whether each array is a group; otherwise all arrays are one group.
      one_device: whether the program is for one device; sharded arrays are never packed.
      dtype: dtype of packed arrays; large arrays keep theirs.

    Raises:
      ValueError: an axis is too long.
    """
    for array in arrays:
        if any(size >= _AXIS for size in array.shape):
            raise ValueError(f"scores of shape {array.shape}: every axis must be shorter than {_AXIS}")
    batches = [[i] for i in range(len(arrays))]
    if one_device:
        batches = _alike(arrays) if each else _neighbors(arrays)
    parts, joined, masks = [], [], []
    for batch in batches:
        if len(batch) == 1:
            array, mask = arrays[batch[0]], among[batch[0]]
            part = _part(array.shape, batch[0] if each else 0)
        else:
            small = [arrays[i] if dtype is None else arrays[i].astype(dtype) for i in batch]
            array, mask = (_stack if each else _join)(small, [among[i] for i in batch])
            part = Part(array.shape, 1, tuple(batch)) if each else _part(array.shape, 0)
        parts.append(part)
        joined.append(array)
        masks.append(mask)

    def unpack(packed: list[Array]) -> list[Array]:
        found: dict[int, Array] = {}
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

    def cuts(found: list[Array]) -> list[Array]:
        split: dict[int, Array] = {}
        for batch, cut in zip(batches, found, strict=True):
            before = 0
            for row, i in enumerate(batch):
                if len(batch) == 1:
                    split[i] = cut
                elif each:
                    split[i] = cut[row : row + 1]
                else:
                    split[i] = jnp.maximum(cut, np.uint32(before)) - np.uint32(before)
                before += arrays[i].size
        return [split[i] for i in range(len(arrays))]

    shards = 1 if one_device else _shards(arrays)
    groups = len(arrays) if each else 1
    alone = tuple(_part(array.shape, i if each else 0) for i, array in enumerate(arrays))
    return Packed(joined, masks, Layout(tuple(parts), groups, shards), Layout(alone, groups, shards), unpack, cuts)


def _shards(arrays: Sequence[Array]) -> int:
    """Return a multiple of the number of shards of every axis; a power of two if no mesh is known while tracing."""
    meshes = [jax.sharding.get_abstract_mesh(), *(jax.typeof(array).sharding.mesh for array in arrays)]
    return math.lcm(2, *([mesh.size for mesh in meshes if not mesh.empty] or [_UNKNOWN]))


def _part(shape: tuple[int, ...], group: int) -> Part:
    lead = 0
    while math.prod(shape[lead:]) >= _ROW:
        lead += 1
    return Part(shape, lead, (group,))


def _neighbors(arrays: Sequence[Array]) -> list[list[int]]:
    """Return runs of consecutive small arrays, and each large array alone."""
    batches: list[list[int]] = []
    for i, array in enumerate(arrays):
        if batches and max(array.size, arrays[batches[-1][-1]].size) < _SMALL:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _alike(arrays: Sequence[Array]) -> list[list[int]]:
    """Group small arrays whose sizes have the same number of bits; each large array is alone."""
    batches: dict[tuple[bool, int], list[int]] = {}
    for i, array in enumerate(arrays):
        small = array.size < _SMALL
        batches.setdefault((small, array.size.bit_length() if small else i), []).append(i)
    return list(batches.values())


def _flat(arrays: Sequence[Array]) -> list[Array]:
    """Flatten arrays, each with the layout that a TPU gives it.

    There a reshape would force the row-major layout on every operation before it, back to the parameters and masks of
    a training step, which would then copy them at every step. A reduction forces no layout on its operand.
    """

    def relaid(arrays: list[Array]) -> list[Array]:
        return [lax.reduce_max(lax.broadcast(array, (2,)), axes=(0,)) for array in arrays]

    own = lax.platform_dependent(list(arrays), tpu=relaid, default=lambda arrays: arrays)
    return [array.reshape(-1) for array in own]


def _join(arrays: list[Array], among: list[Array | None]) -> tuple[Array, Array | None]:
    joined = jnp.concatenate(_flat(arrays))
    if all(mask is None for mask in among):
        return joined, None
    return joined, jnp.concatenate(_flat([_whole(*pair) for pair in zip(arrays, among, strict=True)]))


def _stack(arrays: list[Array], among: list[Array | None]) -> tuple[Array, Array]:
    longest = max(array.size for array in arrays)

    def stack(arrays: Sequence[Array]) -> Array:
        return jnp.stack([jnp.pad(x, (0, longest - x.size)) for x in _flat(arrays)])

    return stack(arrays), stack([_whole(array, mask) for array, mask in zip(arrays, among, strict=True)])


def _whole(array: Array, mask: Array | None) -> Array:
    """Return a mask, or one of all True for None."""
    return jnp.ones(array.shape, bool) if mask is None else mask
