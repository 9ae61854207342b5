"""The exact k-th largest value over a whole pytree, found by counting; nothing is sorted or gathered.

A float's bits, read as an integer, keep its order. So the k-th largest of any number of arrays is found by
bisection on an integer: count how many keys lie at or above a few probes, keep the interval that holds the
answer, repeat. Each pass reads the scores once and needs nothing but counts, so arrays sharded over any mesh
are never moved: a pass all-reduces a few scalars. Beside the scores a selection holds at most one copy of
them. Equal keys are told apart by their position (leaf order in the tree, then row-major index), and the
position to cut at is found in the same way.

Names used below: a *group* is a set of arrays that share one threshold (all of them, or each by itself); a
*probe* is a candidate threshold, of which a pass tries several (sharded: one).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jprune.pruning.selection import counting, uint64
from jprune.pruning.selection.uint64 import Count

# Where probes stand around the place where a straight line meets the goal, in parts of the interval. Reading the
# scores costs more than comparing them with seven probes. Sharded, every probe would read them anew and hold a copy
# of them on the CPU; there is one, and it stands a little to that side of the place which leaves less if it is right.
_MANY = (-(2.0**-3), -(2.0**-6), -(2.0**-9), 0.0, 2.0**-9, 2.0**-6, 2.0**-3)
_ONE = (2.0**-5,)


def keys(scores: Float[Array, "*shape"], eligible: Bool[Array, "*shape"] | None = None) -> Int[Array, "*shape"]:
    """Map floats to integers of the same order: not eligible < NaN < -inf < ... < -0 == +0 < ... < +inf.

    Args:
      scores: floats of any shape and dtype.
      eligible: bool, of the same shape, or ``None`` for all.

    Returns:
      int32, or int64 for float64 scores; the smallest integer marks what is not eligible.

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
    return order if eligible is None else jnp.where(eligible, order, integer(least))


def largest(
    scores: Sequence[Any],
    keep: Count,
    eligible: Sequence[Any],
    *,
    each: bool = False,
    one_device: bool | None = None,
) -> list[Any]:
    """Mark the ``keep`` largest scores, exactly that many, ties broken by position.

    Args:
      scores: float arrays of any shapes and dtypes.
      keep: how many to mark: scalar limbs, or limbs (arrays,) with ``each``. Where fewer are eligible, all of
        those are marked.
      eligible: for each array the bool array of what may be marked, or ``None`` for all of it.
      each: whether to mark so many of each array; else of all together.
      one_device: whether the program is for one device, for which counts are made faster; the result is the
        same. ``None`` finds out where it can: from concrete arrays, else from the number of devices.

    Returns:
      One bool array for each of ``scores``.

    Raises:
      ValueError: an axis has 2**31 elements or more.

    >>> mask, = largest([jnp.array([1.0, 3.0, 3.0, 2.0])], limbs.count_of(1), [None])
    >>> mask.tolist()
    [False, True, False, False]
    """
    one_device = on_one_device(scores) if one_device is None else one_device
    keep = Count(*(jnp.asarray(limb, jnp.uint32).reshape(-1) for limb in keep))
    marked: list[Any] = _largest(list(scores), keep, list(eligible), each=each, one_device=one_device)
    return marked


def count_true(masks: Sequence[Any], *, one_device: bool | None = None) -> Count:
    """Count what is True in bool arrays together, exactly; scalar limbs.

    >>> [int(limb) for limb in count_true([jnp.array([True, False]), jnp.array(True)])]
    [0, 2]
    """
    one_device = on_one_device(masks) if one_device is None else one_device
    counted: Count = _count_true(list(masks), one_device=one_device)
    return counted


def on_one_device(arrays: Sequence[Any]) -> bool:
    """Whether arrays are on one device; of traced ones, whether there is only one."""
    if jax.device_count() == 1:
        return True
    traced = any(isinstance(array, jax.core.Tracer) for array in arrays)
    return not traced and all(len(jnp.asarray(array).sharding.device_set) == 1 for array in arrays)


@functools.partial(jax.jit, static_argnames="one_device")
def _count_true(masks: list[Any], *, one_device: bool) -> Count:
    packed = counting.pack(masks, [None] * len(masks), each=False, one_device=one_device)
    return Count(*(limb[0, 0] for limb in packed.layout.count(lambda i: [packed.arrays[i]])))


@functools.partial(jax.jit, static_argnames=("each", "one_device"))
def _largest(scores: list[Any], keep: Count, eligible: list[Any], *, each: bool, one_device: bool) -> list[Any]:
    bits = 64 if any(array.dtype == jnp.float64 for array in scores) else 32
    dtype = jnp.float64 if bits == 64 else jnp.float32
    scores = [lax.stop_gradient(array.astype(dtype)) for array in scores]
    arrays, eligible, layout, unpack = counting.pack(scores, eligible, each=each, one_device=one_device)
    # Zero, but as varying as the scores are inside shard_map: a loop's carry must be so from the start.
    anchor = functools.reduce(jnp.bitwise_or, [jnp.any(x > 0) for x in arrays]) & False
    zero = Count(*[keep.low * 0 + anchor.astype(jnp.uint32)] * 2)

    def rows(i: int, values: Any) -> Any:
        return layout.parts[i].spread(values[np.asarray(layout.parts[i].groups)])

    def anew(given: Any) -> tuple[list[Any], list[Any], Any]:
        # Without the barrier XLA computes all keys ahead of the loop and holds them, a copy of the scores.
        barrier: Any = lax.optimization_barrier
        held: tuple[list[Any], list[Any], Any] = (arrays, eligible, given)
        return held if one_device else barrier(held)

    def reached(candidates: Any) -> Count:
        arrays, eligible, candidates = anew(candidates)

        def at_least(i: int) -> list[Any]:
            key = keys(arrays[i], eligible[i])
            return [key >= rows(i, candidates[:, j]) for j in range(candidates.shape[1])]

        return layout.count(at_least)

    none = uint64.equal(keep, zero)
    wanted = uint64.where(none, uint64.fill(1, zero.low), keep)  # so that the threshold is never above every key
    place, least_reached, above = _search(
        lambda places: _key_of(places, bits),
        reached,
        lambda counts: uint64.not_below(counts, uint64.column(wanted)),
        ends=(uint64.add(zero, Count(*map(jnp.asarray, uint64.count_of(layout.sizes())))), zero),
        goal=wanted,
        settled=lambda count: none | uint64.equal(count, keep),
        width=2**bits - 1,
        smooth=2**52 if bits == 64 else 2**23,  # an octave
        probes=_MANY if one_device else _ONE,
    )
    threshold = _key_of(place, bits)
    whole = uint64.equal(least_reached, keep)  # every key at the threshold is kept
    least = uint64.equal(place, zero)  # the key of what is not eligible: all that is eligible is kept
    missing = uint64.where(none | whole | least, zero, uint64.subtract(keep, above))

    def ties_before(cuts: counting.Cuts) -> Count:
        arrays, eligible, cuts = anew(cuts)

        def tied_before(i: int) -> list[Any]:
            tied = keys(arrays[i], eligible[i]) == rows(i, threshold)
            return [tied & early for early in layout.before(i, cuts)]

        return layout.count(tied_before)

    cut, _, _ = _search(
        layout.cuts,
        ties_before,
        lambda counts: uint64.not_below(uint64.column(missing), counts),
        ends=(zero, uint64.subtract(least_reached, above)),
        goal=missing,
        settled=lambda count: uint64.equal(count, missing),
        width=max(layout.sizes()) + 1,
        smooth=2**64,
        probes=_MANY if one_device else _ONE,
    )
    cut = uint64.where(none | least, zero, uint64.where(whole, uint64.fill(2**64 - 1, zero.low), cut))
    cuts = layout.cuts(uint64.column(cut))

    def mark(i: int) -> Any:
        key, bound = keys(arrays[i], eligible[i]), rows(i, threshold)
        (early,) = layout.before(i, cuts)
        return rows(i, ~none) & (key > bound) | ((key == bound) & early)

    def mark_all() -> list[Any]:
        return [mark(i) for i in range(len(arrays))]

    if len(arrays) == len(scores):
        return unpack(mark_all())
    # Arrays were packed. XLA would fuse the comparisons anew into every piece that ``unpack`` cuts off and take
    # twice as long to compile; a branch of a conditional is compiled apart.
    marked = lax.cond(
        jnp.all(none | uint64.equal(least_reached, zero)), lambda: [array > jnp.inf for array in arrays], mark_all
    )
    return unpack(marked)


def _search(
    prepare: Callable[[Count], Any],
    measure: Callable[[Any], Count],
    enough: Callable[[Count], Any],
    *,
    ends: tuple[Count, Count],
    goal: Count,
    settled: Callable[[Count], Any],
    width: int,
    smooth: int,
    probes: tuple[float, ...],
) -> tuple[Count, Count, Count]:
    """Find in every group the largest place in 0..width - 1 whose measure is enough.

    A pass narrows the interval to that between two of its probes. Evenly spaced, seven settle three bits.
    Where the measure is smooth they stand around the place where a straight line through the measures of
    the ends meets the goal, ever closer to it, which settles up to eight. A group where that has done worse
    than even spacing twice is left to even spacing, so the number of passes stays bounded for any scores.

    Args:
      prepare: turns places (groups, probes) into what ``measure`` takes. It runs once a pass; inside ``measure``
        XLA would fuse it anew into what is done with every array.
      measure: counts at places so prepared, (groups, probes), monotone in the place.
      enough: whether counts (groups, probes) are enough; true of place 0, false of place ``width``.
      ends: the measures of place 0 and of place ``width``, (groups,).
      goal: the measure looked for, (groups,).
      settled: whether a place of this measure, (groups,), will do; the search ends once all groups have one.
      width: the number of places.
      smooth: the width of intervals in which the measure may be taken to be smooth.
      probes: where they stand around that place there, in parts of the interval.

    Returns:
      The place, its measure, and the measure of the end of the interval: of place + 1 if not settled early.
    """
    even = jnp.arange(1, len(probes) + 1, dtype=jnp.float32)[None] / np.float32(len(probes) + 1)
    around = jnp.array(probes, jnp.float32)[None]

    def unsettled(state: Any) -> Any:
        _, width, at, *_ = state
        return jnp.any((uint64.to_float(width) > 1) & ~settled(at))

    def steps_of(width: Count, at: Count, after: Count, guess: Any) -> Count:
        wide = uint64.to_float(width)
        line = uint64.to_float(uint64.distance(at, goal)) / jnp.maximum(
            uint64.to_float(uint64.distance(at, after)), 1.0
        )
        near = line[:, None] + around
        if len(probes) == 1:
            near = jnp.where(line < 0.5, jnp.minimum(line + probes[0], 0.5), jnp.maximum(line - probes[0], 0.5))[
                :, None
            ]
        fractions = jnp.where(guess[:, None], jnp.clip(near, 0.0, 1.0), even)
        steps = uint64.from_float(jnp.floor(wide[:, None] * fractions))
        return uint64.at_least_one(uint64.at_most(steps, uint64.column(uint64.subtract(width, uint64.fill(1, wide)))))

    def narrow(state: Any) -> Any:
        place, width, at, after, failures, guess, steps, prepared = state
        counts = measure(prepared)
        passed = jnp.sum(enough(counts), axis=1, dtype=jnp.uint32)
        nothing = jax.tree.map(jnp.zeros_like, width)
        edges, measures = _between(nothing, steps, width), _between(at, counts, after)
        step = _pick(edges, passed)
        narrower = uint64.subtract(_pick(edges, passed + np.uint32(1)), step)
        failed = guess & (uint64.to_float(narrower) * max(len(probes), 2) > uint64.to_float(width))
        failures += failed.astype(jnp.int32)
        guess = (uint64.to_float(narrower) < np.float32(smooth)) & (failures < 2) & ~failed
        place, at, after = uint64.add(place, step), _pick(measures, passed), _pick(measures, passed + np.uint32(1))
        steps = steps_of(narrower, at, after, guess)
        return place, narrower, at, after, failures, guess, steps, prepare(uint64.add(uint64.column(place), steps))

    at, after = ends
    zero = jax.tree.map(lambda limb: limb * np.uint32(0), at)
    whole = uint64.add(zero, uint64.fill(width, zero.low))
    never = zero.low.astype(jnp.int32)
    after = uint64.add(zero, after)
    guess = (never == 0) & (width < smooth)
    steps = steps_of(whole, at, after, guess)
    start = (zero, whole, at, after, never, guess, steps, prepare(uint64.add(uint64.column(zero), steps)))
    place, _, at, after, *_ = lax.while_loop(unsettled, narrow, start)
    return place, at, after


def _between(first: Count, middle: Count, last: Count) -> Count:
    """A row (groups, probes) with a column before and a column after it."""
    return Count(
        *(jnp.concatenate([a[:, None], b, c[:, None]], axis=1) for a, b, c in zip(first, middle, last, strict=True))
    )


def _key_of(place: Count, bits: int) -> Any:
    """The key at a place counted from the smallest integer of so many bits."""
    if bits == 32:
        return lax.bitcast_convert_type(place.low ^ np.uint32(2**31), jnp.int32)
    together = (place.high.astype(jnp.uint64) << np.uint64(32)) | place.low.astype(jnp.uint64)
    return lax.bitcast_convert_type(together ^ np.uint64(2**63), jnp.int64)


def _pick(series: Count, index: Any) -> Count:
    """Entry index[group] of every group's row, (groups, entries) -> (groups,)."""
    entries = lax.broadcasted_iota(jnp.uint32, series.low.shape, 1)
    chosen = entries == index[:, None]
    return Count(*(jnp.sum(jnp.where(chosen, limb, np.uint32(0)), axis=1, dtype=jnp.uint32) for limb in series))
