"""Find the exact k-th largest value over a whole pytree by counting, without sorting or gathering.

Floats are ordered, so they can be numbered: *place* 1 is -inf, the last place +inf. The k-th largest score is the float
at the largest place that at least k scores reach. The search counts how many scores reach a few candidates, the
*probes*, and continues between two of them. A pass reads the scores, writes no array of their size and needs only
counts, so sharded arrays are not moved: a pass all-reduces a few scalars. Ties are broken by position (leaf order in
the tree, then row-major index): they are counted in each line of an array, then at each place of the line that contains
the cut.

A *group* is a set of arrays that share one threshold: all arrays together, or each array alone.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, ArrayLike, Bool, Float, Int, UInt32

from jprune.pruning.selection import counting, uint64
from jprune.pruning.selection.counting import Layout, Packed
from jprune.pruning.selection.uint64 import AnyArray, Count

T = TypeVar("T")

# On an accelerator a pass costs as much as reading the scores, and ending a loop early makes a GPU synchronize with the
# host, so there is a fixed number of passes with evenly spaced probes: 8 passes. For sharded scores every count is a
# separate sum. A TPU computes 15 sums in one read, a GPU at most 8, so it computes two counts in each sum.
_EVEN = 15
# On a CPU the probes are placed around a guess: the point where a straight line between the counts at both ends reaches
# the goal. The offsets below are fractions of the interval. The search ends when every group has its count. For sharded
# scores each probe needs a copy of the scores, so there is only one, on the side that leaves the smaller interval.
_AROUND = (-(2.0**-3), -(2.0**-6), -(2.0**-9), 0.0, 2.0**-9, 2.0**-6, 2.0**-3)
_ONE = (2.0**-5,)
_barrier: Callable[[T], T] = lax.optimization_barrier
_ALL = np.uint32(2**32 - 1)  # a cut after the last element of a row


class Bounds(NamedTuple):
    """Bounds of the selected scores: those that reach ``above``, and the first of the others that reach ``tied``.

    Attributes:
      above: the next float after the threshold, (groups,).
      tied: the threshold, (groups,); a bound that no score reaches if nothing is selected.
      lowest: whether all scores that do not reach ``above`` are ties, including NaN, (groups,).
      cuts: for each array the number of leading elements of each row that may be selected as ties, uint32 (rows,).
    """

    above: Array
    tied: Array
    lowest: Array
    cuts: list[Array]


class _Found(NamedTuple):
    """A threshold: its place, the number of scores that reach it, and the number that reach the next float."""

    place: Count
    at: Count
    after: Count


class _Interval(NamedTuple):
    """The places among which the threshold of each group is searched, and the probes of the next pass.

    Attributes:
      found: the first place, and the counts there and at the end.
      width: the number of places, limbs (groups,).
      failures: the number of guesses that were worse than even spacing, int32 (groups,).
      guess: whether the probes are around a guess, bool (groups,).
      offsets: distances of the probes from the first place, limbs (groups, probes).
      places: places of the probes, limbs (groups, probes).
    """

    found: _Found
    width: Count
    failures: AnyArray
    guess: AnyArray
    offsets: Count
    places: Count


def keys(scores: Float[Array, "*shape"], among: Bool[Array, "*shape"] | None = None) -> Int[Array, "*shape"]:
    """Map floats to integers of the same order: not ``among`` < NaN < -inf < ... < -0 == +0 < ... < +inf.

    Args:
      scores: floats of any shape and dtype.
      among: bool, of the same shape, where a score may be selected; ``None`` for all.

    Returns:
      int32, or int64 for float64 scores; the smallest integer marks scores that may not be selected.

    >>> keys(jnp.array([-jnp.inf, -0.0, 0.0, 1.0])).tolist()
    [-2139095041, 0, 0, 1065353216]
    """
    wide = scores.dtype == jnp.float64
    integer, scores = (np.int64, scores) if wide else (np.int32, scores.astype(jnp.float32))
    least, most = np.iinfo(integer).min, np.iinfo(integer).max
    bits = lax.bitcast_convert_type(scores, integer)
    bits = jnp.where(bits == integer(least), integer(0), bits)  # -0.0 ties with +0.0
    order = jnp.where(bits < 0, bits ^ integer(most), bits)
    order = jnp.where(jnp.isnan(scores), integer(least + 1), order)
    return order if among is None else jnp.where(among, order, integer(least))


def largest(
    scores: Sequence[Array],
    keep: Count,
    among: Sequence[Array | None],
    *,
    each: bool = False,
    one_device: bool | None = None,
    magnitude: bool = False,
) -> list[Array]:
    """Mark the ``keep`` largest scores, exactly that many, ties broken by position.

    NaN is the lowest score, -0.0 equals +0.0. On devices that flush denormals to zero (TPUs), denormals equal 0.

    Args:
      scores: float arrays of any shapes and dtypes.
      keep: the number to mark: scalar limbs, or limbs (arrays,) with ``each``. If fewer may be marked, all of them are.
      among: for each array a bool array of the scores that may be marked, or ``None`` for all.
      each: whether ``keep`` is a number for each array; otherwise it is for all arrays together.
      one_device: whether the program is for one device, which allows faster counts; the result is the same. ``None``
        infers it from the arrays' shardings and the mesh in context.
      magnitude: rank by absolute value, without writing an array of absolute values.

    Returns:
      One bool array for each of ``scores``.

    Raises:
      ValueError: an axis has 2**31 elements or more.

    >>> mask, = largest([jnp.array([1.0, 3.0, 3.0, 2.0])], uint64.count_of(1), [None])
    >>> mask.tolist()
    [False, True, False, False]
    """
    one_device = on_one_device(scores) if one_device is None else one_device
    keep = Count(*(jnp.asarray(limb, jnp.uint32).reshape(-1) for limb in keep))
    marked: list[Array] = _largest(
        list(scores), keep, list(among), each=each, one_device=one_device, magnitude=magnitude
    )
    return marked


def count_true(masks: Sequence[Array], *, one_device: bool | None = None) -> Count:
    """Count the True entries of all arrays together, exactly; return scalar limbs.

    >>> [int(limb) for limb in count_true([jnp.array([True, False]), jnp.array(True)])]
    [0, 2]
    """
    one_device = on_one_device(masks) if one_device is None else one_device
    counted: Count = _count_true(list(masks), one_device=one_device)
    return counted


def on_one_device(arrays: Sequence[Array]) -> bool:
    """Whether arrays are on one device, as far as their shardings and the mesh in context show.

    Traced arrays have the mesh over which they are sharded; inside ``shard_map`` each device has its own arrays.
    Shardings given only to ``jit(..., in_shardings=...)`` are not visible: the masks are then the same, but counts are
    gathered.
    """
    shardings = [jax.typeof(array).sharding for array in arrays if isinstance(array, jax.core.Tracer)]
    meshes = [jax.sharding.get_abstract_mesh(), *(sharding.mesh for sharding in shardings)]
    if any(mesh.size > 1 and not mesh.are_all_axes_manual for mesh in meshes if not mesh.empty):
        return False
    return all(isinstance(a, jax.core.Tracer) or len(jnp.asarray(a).sharding.device_set) == 1 for a in arrays)


@functools.partial(jax.jit, static_argnames="one_device")
def _count_true(masks: list[Array], *, one_device: bool) -> Count:
    packed = counting.pack(masks, [None] * len(masks), each=False, one_device=one_device)
    return Count(*(limb[0, 0] for limb in packed.layout.count(lambda i: [packed.arrays[i]])))


@functools.partial(jax.jit, static_argnames=("each", "one_device", "magnitude"))
def _largest(
    scores: list[Array], keep: Count, among: list[Array | None], *, each: bool, one_device: bool, magnitude: bool
) -> list[Array]:
    dtype = jnp.float64 if any(array.dtype == jnp.float64 for array in scores) else jnp.float32
    scores = [lax.stop_gradient(array) for array in scores]
    packed = counting.pack(scores, among, each=each, one_device=one_device, dtype=dtype)
    mark = functools.partial(_mark_largest, packed=packed, dtype=dtype, magnitude=magnitude)
    platforms: dict[str, Callable[..., list[Array]]] = {"cpu": functools.partial(mark, integers=True)}
    default: Callable[..., list[Array]] = mark
    if not one_device:
        platforms["tpu"] = mark
        default = functools.partial(mark, paired=True)
    marked: list[Array] = lax.platform_dependent(
        (scores, among), (packed.arrays, packed.among), keep, **platforms, default=default
    )
    return marked


def _mark_largest(
    whole: tuple[list[Array], list[Array | None]],
    joined: tuple[list[Array], list[Array | None]],
    keep: Count,
    *,
    packed: Packed,
    dtype: DTypeLike,
    magnitude: bool,
    integers: bool = False,
    paired: bool = False,
) -> list[Array]:
    """Find the threshold in packed arrays, then how many of its ties to keep, then compare.

    A CPU compares the packed arrays, which is faster. Other devices compare each original array: a TPU may store a
    small matrix transposed, and masks sliced from a packed array would be copied to its layout.
    """
    values = _Values(*joined, dataclasses.replace(packed.layout, paired=paired), dtype, magnitude, integers)
    bounds = _find_cut(values, keep, _find_threshold(values, keep))
    if integers:
        marked = [_mark(values, i, bounds) for i in range(len(values.arrays))]
        # Without the barrier XLA would repeat the comparison for every array that is sliced from a packed one.
        return packed.unpack(marked if len(marked) == len(whole[0]) else _barrier(marked))
    values = _Values(*whole, packed.alone, dtype, magnitude, integers)
    bounds = bounds._replace(cuts=packed.cuts(bounds.cuts))
    return [_mark(values, i, bounds) for i in range(len(whole[0]))]


class _Values(NamedTuple):
    """The packed arrays that are searched.

    Attributes:
      arrays: floats of any dtypes.
      among: bool arrays of the scores that may be marked, or ``None`` for all.
      layout: layout of the arrays.
      dtype: dtype of the comparisons.
      magnitude: whether to compare absolute values.
      integers: whether to compare integers of the same order, in as many passes as needed: on CPUs, which flush
        denormals to zero. On other devices floats are compared, in a fixed number of passes.
    """

    arrays: list[Array]
    among: list[Array | None]
    layout: Layout
    dtype: DTypeLike
    magnitude: bool
    integers: bool

    def after(self, given: T) -> tuple["_Values", T]:
        """Return these values with a barrier after ``given``, so that XLA does not compute comparisons early."""
        arrays, among, given = _barrier((self.arrays, self.among, given))
        return self._replace(arrays=arrays, among=among), given

    def bound(self, place: Count) -> Array:
        """Return the numbers to compare with at places."""
        return _order_of(place, self.dtype) if self.integers else _float_of(place, self.dtype)

    def reach(self, i: int, *bounds: Array) -> list[Array]:
        """Return where a score of an array that may be marked is at least each bound, (groups,)."""
        value = self.arrays[i].astype(self.dtype)
        value, mask = jnp.abs(value) if self.magnitude else value, self.among[i]
        if self.integers:
            value, mask = keys(value, mask), None
        reached = [value >= self.layout.values(i, bound) for bound in bounds]
        return reached if mask is None else [r & mask for r in reached]

    def reached_and_above(self, i: int, bounds: Bounds) -> tuple[Array, Array]:
        """Return where a score of an array that may be marked reaches the threshold, and where it is above it."""
        above, reached = self.reach(i, bounds.above, bounds.tied)
        lowest: Array = self.layout.values(i, bounds.lowest)
        mask = self.among[i]
        return reached | (lowest if mask is None else lowest & mask), above

    def counts(self, places: Count, *, ahead: bool) -> Count:
        """Count the scores of every group that reach the floats at places: limbs (groups, probes), as the places.

        Args:
          places: limbs (groups, probes).
          ahead: whether XLA may compute what does not depend on the places once, ahead of all passes: integers make a
            pass on one CPU a third shorter, at the cost of a copy of the scores.
        """
        bounds = self.bound(places)
        here, bounds = (self, bounds) if ahead else self.after(bounds)
        return self.layout.count(lambda i: here.reach(i, *(bounds[:, j] for j in range(bounds.shape[1]))))


def _find_threshold(values: _Values, keep: Count) -> _Found:
    """Find for every group the largest float that ``keep`` scores reach; on CPUs any that exactly ``keep`` reach."""
    layout = values.layout
    # Zero with the varying axes of the scores inside shard_map, which a loop's initial carry must have.
    anchor = functools.reduce(jnp.bitwise_or, [jnp.any(x > 0) for x in values.arrays]) & False
    zero = Count(*[keep.low * 0 + anchor.astype(jnp.uint32)] * 2)
    goal = uint64.at_least_one(keep)  # so that the threshold is never above every score
    start = _Found(zero, uint64.add(zero, Count(*map(jnp.asarray, uint64.count_of(layout.sizes())))), zero)

    as_stored = not values.magnitude and all(array.dtype == values.dtype for array in values.arrays)
    ahead = layout.one_device if values.integers else as_stored
    count = functools.partial(values.counts, ahead=ahead)
    width = _places(values.dtype)
    if values.integers:
        return _search_around(count, width, start, goal, probes=_AROUND if layout.one_device else _ONE)
    return _search_evenly(count, width, start, goal)


def _find_cut(values: _Values, keep: Count, found: _Found) -> Bounds:
    """Find how many of the scores at the threshold are selected, if some are and some are not."""
    layout = values.layout
    none = (keep.high == 0) & (keep.low == 0)
    whole = none | uint64.equal(found.at, keep)
    unreached = uint64.fill(_places(values.dtype), found.place.low)
    above, tied = (
        values.bound(uint64.where(none, unreached, place))
        for place in (uint64.add(found.place, uint64.fill(1, found.place.low)), found.place)
    )
    everything = [jnp.full_like(found.at.low, _ALL, shape=(part.rows,)) for part in layout.parts]
    bounds = Bounds(above, tied, ~none & (found.place.high == 0) & (found.place.low == 0), everything)
    missing = uint64.where(whole, Count(*2 * [jnp.zeros_like(keep.low)]), uint64.subtract(keep, found.after))

    cut = functools.partial(_cut_ties, values, bounds, missing, whole)
    return bounds._replace(cuts=lax.cond(jnp.all(whole), lambda: everything, cut))


def _cut_ties(values: _Values, bounds: Bounds, missing: Count, whole: Bool[Array, "groups"]) -> list[Array]:
    """Return the cuts of every array that select the first ``missing`` ties of each group, or all if ``whole``."""
    layout = values.layout

    def reached(i: int, first: AnyArray) -> tuple[Array, Array]:
        here, (bounds_here, _) = values.after((bounds, first))
        return here.reached_and_above(i, bounds_here)

    on_cpu = values.integers
    cut = functools.partial(layout.cut, reached, sliced=layout.one_device and on_cpu, tiled=not on_cpu)
    if layout.one_device and not on_cpu and any(part.is_long_vector for part in layout.parts):
        cuts = lax.platform_dependent(missing, tpu=functools.partial(cut, lanes=True), default=cut)
    else:
        cuts = cut(missing)
    return [
        jnp.where(counting.take(whole, part.groups), _ALL, part_cuts)
        for part, part_cuts in zip(layout.parts, cuts, strict=True)
    ]


def _mark(values: _Values, i: int, bounds: Bounds) -> Bool[Array, "..."]:
    """Mark the selected scores of an array."""
    reached, above = values.reached_and_above(i, bounds)
    return above | (reached & values.layout.parts[i].before(bounds.cuts[i]))


def _search_evenly(count: Callable[[Count], Count], width: int, start: _Found, goal: Count) -> _Found:
    """Search with evenly spaced probes, in a static number of passes."""
    steps = [width]
    while steps[-1] > 1:
        steps.append(-(-steps[-1] // (_EVEN + 1)))
    table = uint64.count_of([[step * j for j in range(1, _EVEN + 1)] for step in steps[1:]])

    def narrow(i: ArrayLike, found: _Found) -> _Found:
        offsets = Count(*(lax.dynamic_index_in_dim(jnp.asarray(limb), i) for limb in table))
        places = uint64.add(uint64.column(found.place), offsets)
        counts = count(uint64.at_most(places, uint64.fill(width, places.low)))
        passed = _passed(counts, goal)
        nothing = jax.tree.map(jnp.zeros_like, found.place)
        step = _entry(nothing, offsets, nothing, passed)
        return _Found(uint64.add(found.place, step), *_ends(found, counts, passed))

    found: _Found = lax.fori_loop(0, len(steps) - 1, narrow, start)
    return found


def _search_around(
    count: Callable[[Count], Count], width: int, start: _Found, goal: Count, *, probes: tuple[float, ...]
) -> _Found:
    """Search with probes around a guess, until every group has its count or its threshold is found.

    A pass narrows the interval to the part between two of its probes. Seven evenly spaced probes determine three bits
    of the threshold. Within an octave, where counts are smooth, the probes are placed around the point where a straight
    line through the counts at both ends reaches the goal, which determines up to eight bits. If the guess was worse
    than even spacing twice, the group uses even spacing from then on, so the number of passes is bounded for any
    scores.

    Args:
      count: returns how many scores reach the floats at places (groups, probes).
      width: the number of places.
      start: place 0 and the counts at both ends, (groups,).
      goal: the count to find, (groups,).
      probes: offsets of the probes from the guess, as fractions of the interval.
    """
    octave = np.float32(2**52 if width > 2**32 else 2**23)

    def unsettled(interval: _Interval) -> Array:
        return jnp.any((uint64.to_float(interval.width) > 1) & ~uint64.equal(interval.found.at, goal))

    def narrow(interval: _Interval) -> _Interval:
        return _narrowed(interval, count(interval.places), goal, probes, octave)

    whole = uint64.add(start.place, uint64.fill(width, start.place.low))
    never = start.place.low.astype(jnp.int32)
    first = _probed(start, whole, failures=never, guess=never != 0, goal=goal, probes=probes)
    interval: _Interval = lax.while_loop(unsettled, narrow, first)
    return interval.found


def _narrowed(
    interval: _Interval, counts: Count, goal: Count, probes: tuple[float, ...], octave: np.float32
) -> _Interval:
    """Return the part of an interval between two of its probes that contains the threshold, with its own probes."""
    passed = _passed(counts, goal)
    nothing = jax.tree.map(jnp.zeros_like, interval.width)
    step = _entry(nothing, interval.offsets, interval.width, passed)
    width = uint64.subtract(_entry(nothing, interval.offsets, interval.width, passed + np.uint32(1)), step)
    failed = interval.guess & (uint64.to_float(width) * max(len(probes), 2) > uint64.to_float(interval.width))
    failures = interval.failures + failed.astype(jnp.int32)
    guess = (uint64.to_float(width) < octave) & (failures < 2) & ~failed
    found = _Found(uint64.add(interval.found.place, step), *_ends(interval.found, counts, passed))
    return _probed(found, width, failures=failures, guess=guess, goal=goal, probes=probes)


def _probed(
    found: _Found, width: Count, *, failures: AnyArray, guess: AnyArray, goal: Count, probes: tuple[float, ...]
) -> _Interval:
    """Return an interval with its probes."""
    offsets = _offsets(found, width, guess, goal, probes)
    # Inside ``count`` XLA would recompute the places for every array.
    return _Interval(found, width, failures, guess, offsets, uint64.add(uint64.column(found.place), offsets))


def _offsets(found: _Found, width: Count, guess: AnyArray, goal: Count, probes: tuple[float, ...]) -> Count:
    """Return the distances of the probes from the first place, from 1 to the width minus 1: limbs (groups, probes)."""
    even = np.arange(1, len(probes) + 1, dtype=np.float32)[None] / np.float32(len(probes) + 1)
    wide = uint64.to_float(width)
    line = uint64.to_float(uint64.distance(found.at, goal)) / jnp.maximum(
        uint64.to_float(uint64.subtract(found.at, found.after)), 1.0
    )
    near = line[:, None] + np.array(probes, np.float32)[None]
    if len(probes) == 1:
        near = jnp.where(line < 0.5, jnp.minimum(line + probes[0], 0.5), jnp.maximum(line - probes[0], 0.5))
        near = near[:, None]
    fractions = jnp.where(guess[:, None], jnp.clip(near, 0.0, 1.0), even)
    steps = uint64.from_float(jnp.floor(wide[:, None] * fractions))
    return uint64.at_least_one(uint64.at_most(steps, uint64.column(uint64.subtract(width, uint64.fill(1, wide)))))


def _passed(counts: Count, goal: Count) -> UInt32[Array, "groups"]:
    """Return the number of probes of each group that at least ``goal`` scores reach."""
    return jnp.sum(uint64.not_below(counts, uint64.column(goal)), axis=1, dtype=jnp.uint32)


def _places(dtype: DTypeLike) -> int:
    """Return the number of places: the floats from -inf to +inf, and place 0, which is lower than all of them."""
    return 0xFF000003 if dtype == jnp.float32 else 0xFFE0000000000003


def _order_of(place: Count, dtype: DTypeLike) -> Array:
    """Return a place as a signed integer of the same order; for floats >= +0 these are the bits of the float."""
    if dtype == jnp.float32:
        return lax.bitcast_convert_type(place.low + np.uint32(0x807FFFFE), jnp.int32)
    whole = (place.high.astype(jnp.uint64) << np.uint64(32)) | place.low.astype(jnp.uint64)
    return lax.bitcast_convert_type(whole + np.uint64(0x800FFFFFFFFFFFFE), jnp.int64)


def _float_of(place: Count, dtype: DTypeLike) -> Array:
    """Return the float at a place; NaN, which no score reaches, at place 0 and after +inf."""
    order = _order_of(place, dtype)
    bits = jnp.where(order < 0, order ^ order.dtype.type(np.iinfo(order.dtype).max), order)
    return lax.bitcast_convert_type(bits, dtype)


def _ends(found: _Found, counts: Count, passed: UInt32[Array, "groups"]) -> tuple[Count, Count]:
    """Return the counts at both ends of the interval after the probes that passed."""
    return (
        _entry(found.at, counts, found.after, passed),
        _entry(found.at, counts, found.after, passed + np.uint32(1)),
    )


def _entry(first: Count, middle: Count, last: Count, index: UInt32[Array, "groups"]) -> Count:
    """Return entry index[group] of (first, *middle, last) of every group: (groups,), (groups, n), (groups,)."""
    column = lax.broadcasted_iota(jnp.uint32, (1, middle.low.shape[1]), 1) + np.uint32(1)
    chosen = column == index[:, None]
    zero, end = np.uint32(0), np.uint32(middle.low.shape[1] + 1)
    limbs = []
    for a, b, c in zip(first, middle, last, strict=True):
        inside = jnp.sum(jnp.where(chosen, b, zero), axis=1, dtype=jnp.uint32)
        limbs.append(jnp.where(index == zero, a, jnp.where(index == end, c, inside)))
    return Count(*limbs)
