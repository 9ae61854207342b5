"""The exact k-th largest value over a whole pytree, found by counting; nothing is sorted or gathered.

A float's bits, read as an integer, keep its order. So the k-th largest of any number of arrays is found by
bisection on an integer: count how many keys lie at or above a few probes, keep the interval that holds the
answer, repeat. Each pass reads the scores once, makes no copy of them, and needs nothing but counts, so
arrays sharded over any mesh are never moved: a pass all-reduces a few scalars. Equal keys are told apart by
their position (leaf order in the tree, then row-major index), and the position to cut at is found in the
same way.

Names used below: a *group* is a set of leaves that share one threshold (the whole tree for a global
selection, one leaf each for a per-layer one); a *probe* is a candidate threshold, seven a pass, which
settles three bits of the answer.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jprune.pruning import limbs
from jprune.pruning.limbs import Count

_PROBES = 7  # in one pass; reading the scores costs more than comparing them with so many
_ROW = 2**32  # what one uint32 counts has fewer elements than this
_AXIS = 2**31


def keys(scores: Any, eligible: Any = None) -> Any:
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
    groups: Sequence[int] | None = None,
    one_device: bool | None = None,
) -> list[Any]:
    """Mark the ``keep`` largest scores of every group, exactly that many, ties broken by position.

    Args:
      scores: float arrays of any shapes and dtypes.
      keep: how many to mark in each group: limbs of shape (groups,), or () where there is one group.
        Where fewer are eligible, all of those are marked.
      eligible: for each array the bool array of what may be marked, or ``None`` for all of it.
      groups: the group of each array, numbered from 0; ``None`` puts all arrays in one group.
      one_device: whether to count in the form that is fastest in a program for one device; ``None`` asks
        whether the process has only one. The result is the same.

    Returns:
      One bool array for each of ``scores``.

    >>> mask, = largest([jnp.array([1.0, 3.0, 3.0, 2.0])], limbs.count_of(1), [None])
    >>> mask.tolist()
    [False, True, False, False]
    """
    groups = (0,) * len(scores) if groups is None else tuple(groups)
    for array in scores:
        if any(size >= _AXIS for size in array.shape):
            raise ValueError(f"scores of shape {array.shape}: every axis must be shorter than {_AXIS}")
    one_device = jax.device_count() == 1 if one_device is None else one_device
    wide = any(array.dtype == jnp.float64 for array in scores)
    scores = [lax.stop_gradient(array.astype(jnp.float64) if wide else array) for array in scores]
    number = max(groups, default=0) + 1
    keep = Count(*(jnp.broadcast_to(jnp.asarray(limb, jnp.uint32), (number,)) for limb in keep))
    marked: list[Any] = _largest(scores, keep, list(eligible), groups=groups, one_device=one_device)
    return marked


def count_true(masks: Sequence[Any], *, one_device: bool | None = None) -> Count:
    """Count what is True in bool arrays together, exactly; scalar limbs.

    >>> [int(limb) for limb in count_true([jnp.array([True, False]), jnp.array(True)])]
    [0, 2]
    """
    one_device = jax.device_count() == 1 if one_device is None else one_device
    layout = _Layout(tuple(mask.shape for mask in masks), (0,) * len(masks), one_device)
    return Count(*(limb[0, 0] for limb in layout.count(lambda i: [masks[i]])))


@functools.partial(jax.jit, static_argnames=("groups", "one_device"))
def _largest(scores: list[Any], keep: Count, eligible: list[Any], *, groups: tuple[int, ...], one_device: bool) -> Any:
    layout = _Layout(tuple(array.shape for array in scores), groups, one_device)
    bits = 64 if any(array.dtype == jnp.float64 for array in scores) else 32
    # Zero, but as varying as the scores are inside shard_map: a loop's carry must be so from the start.
    nothing = sum((jnp.sum(keys(x), dtype=jnp.int32).astype(jnp.uint32) * jnp.uint32(0) for x in scores), keep.low * 0)
    zero = Count(nothing, nothing)

    def at_least(probes: Count) -> Count:
        candidates = _key_of(probes, bits)
        return layout.count(lambda i: [keys(scores[i], eligible[i]) >= probe for probe in candidates[groups[i]]])

    none = limbs.equal(keep, zero)
    wanted = limbs.where(none, limbs.fill(1, zero.low), keep)  # so that the threshold is never above every key
    place, reached, above = _search(
        at_least,
        lambda counts: limbs.not_below(counts, limbs.column(wanted)),
        ends=(limbs.add(zero, layout.sizes()), zero),
        goal=wanted,
        settled=lambda reached: none | limbs.equal(reached, keep),
        width=2**bits - 1,
        smooth=2**52 if bits == 64 else 2**23,  # an octave
    )
    threshold = _key_of(place, bits)
    whole = limbs.equal(reached, keep)  # every key at the threshold is kept
    least = limbs.equal(place, zero)  # the key of what is not eligible: all that is eligible is kept
    missing = limbs.where(none | whole | least, zero, limbs.subtract(keep, above))

    def ties_before(cuts: Count) -> Count:
        def before(i: int) -> list[Any]:
            tied = keys(scores[i], eligible[i]) == threshold[groups[i]]
            return [
                tied & layout.before(i, Count(*cut))
                for cut in zip(cuts.high[groups[i]], cuts.low[groups[i]], strict=True)
            ]

        return layout.count(before)

    cut, _, _ = _search(
        ties_before,
        lambda counts: limbs.not_below(limbs.column(missing), counts),
        ends=(zero, limbs.subtract(reached, above)),
        goal=missing,
        settled=lambda before: limbs.equal(before, missing),
        width=layout.largest_group() + 1,
        smooth=2**64,
    )
    cut = limbs.where(none | least, zero, limbs.where(whole, limbs.fill(2**64 - 1, zero.low), cut))

    def mark(i: int) -> Any:
        key, bound = keys(scores[i], eligible[i]), threshold[groups[i]]
        return ~none[groups[i]] & (key > bound) | (
            (key == bound) & layout.before(i, Count(cut.high[groups[i]], cut.low[groups[i]]))
        )

    return [mark(i) for i in range(len(scores))]


def _search(
    measure: Callable[[Count], Count],
    enough: Callable[[Count], Any],
    *,
    ends: tuple[Count, Count],
    goal: Count,
    settled: Callable[[Count], Any],
    width: int,
    smooth: int,
) -> tuple[Count, Count, Count]:
    """Find in every group the largest place in 0..width - 1 whose measure is enough.

    A pass narrows the interval to that between two of seven probes. Evenly spaced they settle three bits.
    Where the measure is smooth they stand around the place where a straight line through the measures of
    the ends meets the goal, ever closer to it, which settles up to eight. A group where that has done worse
    than even spacing twice is left to even spacing, so the number of passes stays bounded for any scores.

    Args:
      measure: counts at places (groups, probes), monotone in the place.
      enough: whether counts (groups, probes) are enough; true of place 0, false of place ``width``.
      ends: the measures of place 0 and of place ``width``, (groups,).
      goal: the measure looked for, (groups,).
      settled: whether a place of this measure, (groups,), will do; the search ends once all groups have one.
      width: the number of places.
      smooth: the width of intervals in which the measure may be taken to be smooth.

    Returns:
      The place, its measure, and the measure of the end of the interval: of place + 1 if not settled early.
    """
    even = jnp.arange(1, _PROBES + 1, dtype=jnp.float32)[None] / np.float32(_PROBES + 1)
    around = jnp.array([-(2.0**-3), -(2.0**-6), -(2.0**-9), 0.0, 2.0**-9, 2.0**-6, 2.0**-3], jnp.float32)[None]

    def unsettled(state: Any) -> Any:
        _, width, at, _, _, _ = state
        return jnp.any((limbs.to_float(width) > 1) & ~settled(at))

    def narrow(state: Any) -> Any:
        place, width, at, after, failures, even_next = state
        wide = limbs.to_float(width)
        line = limbs.to_float(limbs.distance(at, goal)) / jnp.maximum(limbs.to_float(limbs.distance(at, after)), 1.0)
        guess = (wide < np.float32(smooth)) & (failures < 2) & ~even_next
        fractions = jnp.where(guess[:, None], jnp.clip(line[:, None] + around, 0.0, 1.0), even)
        probes = limbs.from_float(jnp.floor(wide[:, None] * fractions))
        probes = limbs.at_least_one(limbs.at_most(probes, limbs.column(limbs.subtract(width, limbs.fill(1, wide)))))
        counts = measure(limbs.add(limbs.column(place), probes))
        passed = jnp.sum(enough(counts), axis=1, dtype=jnp.uint32)
        nothing = jax.tree.map(jnp.zeros_like, width)
        steps, measures = _between(nothing, probes, width), _between(at, counts, after)
        step = _pick(steps, passed)
        narrower = limbs.subtract(_pick(steps, passed + np.uint32(1)), step)
        failed = guess & (limbs.to_float(narrower) * _PROBES > wide)
        return (
            limbs.add(place, step),
            narrower,
            _pick(measures, passed),
            _pick(measures, passed + np.uint32(1)),
            failures + failed.astype(jnp.int32),
            failed,
        )

    at, after = ends
    zero = jax.tree.map(lambda limb: limb * np.uint32(0), at)
    never = zero.low.astype(jnp.int32)
    start = (zero, limbs.add(zero, limbs.fill(width, zero.low)), at, limbs.add(zero, after), never, never > 0)
    place, _, at, after, _, _ = lax.while_loop(unsettled, narrow, start)
    return place, at, after


def _between(first: Count, middle: Count, last: Count) -> Count:
    """A row (groups, probes) with a column before and a column after it."""
    return Count(
        *(jnp.concatenate([a[:, None], b, c[:, None]], axis=1) for a, b, c in zip(first, middle, last, strict=True))
    )


@dataclasses.dataclass(frozen=True)
class _Layout:
    """The static side of a selection: shapes, which group each array is in, how counts are written."""

    shapes: tuple[tuple[int, ...], ...]
    groups: tuple[int, ...]
    one_device: bool

    def members(self) -> list[list[int]]:
        return [[i for i, g in enumerate(self.groups) if g == group] for group in range(max(self.groups) + 1)]

    def sizes(self) -> Count:
        return Count(
            *map(jnp.asarray, limbs.count_of([sum(math.prod(self.shapes[i]) for i in m) for m in self.members()]))
        )

    def largest_group(self) -> int:
        return max(sum(math.prod(self.shapes[i]) for i in members) for members in self.members())

    def offset(self, i: int) -> int:
        """The position in its group of an array's first element."""
        return sum(math.prod(self.shapes[j]) for j in range(i) if self.groups[j] == self.groups[i])

    def rows(self, i: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Split a shape into leading axes (almost always none) and trailing ones of fewer than 2**32 elements."""
        shape, split = self.shapes[i], 0
        while math.prod(shape[split:]) >= _ROW:
            split += 1
        return shape[:split], shape[split:]

    def count(self, predicates: Callable[[int], list[Any]]) -> Count:
        """Sum each array's predicates, and then the arrays of each group: (groups, probes)."""
        counts = [self._count_array(i, predicates(i)) for i in range(len(self.shapes))]
        totals = [limbs.total(jax.tree.map(lambda *x: jnp.stack(x), *[counts[i] for i in m])) for m in self.members()]
        return Count(jnp.stack([total.high for total in totals]), jnp.stack([total.low for total in totals]))

    def _count_array(self, i: int, predicates: list[Any]) -> Count:
        lead, trail = self.rows(i)
        axes = tuple(range(len(lead), len(lead) + len(trail)))
        if self.one_device:
            # One pass over memory for all probes. Partitioned, this form would all-gather the partial counts.
            shape = (*lead, math.prod(trail))
            counts = lax.reduce(
                tuple(p.astype(jnp.uint32).reshape(shape) for p in predicates),
                (np.uint32(0),) * len(predicates),
                lambda x, y: tuple(a + b for a, b in zip(x, y, strict=True)),
                (len(lead),),
            )
        else:
            counts = tuple(jnp.sum(p, axis=axes, dtype=jnp.uint32) for p in predicates)
        rows = jnp.stack([count.reshape(-1) for count in counts], axis=1)
        return limbs.total(Count(jnp.zeros_like(rows), rows))

    def before(self, i: int, cut: Count) -> Any:
        """Whether the elements of an array lie before a position (scalar limbs) of its group: bool, of its shape."""
        lead, trail = self.rows(i)
        width, zero = math.prod(trail), jnp.zeros(lead, jnp.uint32)
        start = limbs.add(limbs.times(_index(lead, len(lead)), width), limbs.fill(self.offset(i), zero))
        cut = Count(*(jnp.broadcast_to(limb, lead) for limb in cut))
        room = limbs.where(limbs.not_below(cut, start), limbs.subtract(cut, start), Count(zero, zero))
        local = jnp.where((room.high > 0) | (room.low > np.uint32(width)), np.uint32(width), room.low)
        return _index(self.shapes[i], len(trail)) < local.reshape(lead + (1,) * len(trail) if lead else ())


def _index(shape: tuple[int, ...], trailing: int) -> Any:
    """The row-major index of every element over the trailing axes, uint32; built from iotas, so that it shards."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape) - trailing, len(shape)):
        index += lax.broadcasted_iota(jnp.uint32, shape, axis) * np.uint32(math.prod(shape[axis + 1 :]))
    return index


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
