"""Score, select and regrow at each step of a schedule.

A selection that passes its amount to a selection of jprune (directly, wrapped or as a ``functools.partial``) is
compiled once for the whole schedule: counts are Python integers that are computed while tracing, put in a table, and
looked up at run time. A selection that computes with its amount is compiled once for each amount.

The current entry at a count is the last one whose step is not after the count. The state has a checksum of the entry
that was applied last, and an update applies the current entry if its checksum differs. So an entry is applied once,
whether the count reaches its step, jumps over it, or the schedule was changed before a resume. An update without
anything to apply compares two numbers. An entry whose scores contain NaN is not applied: the masks stay and the
checksum gets the bit ``SKIPPED``, so that the next update tries the entry again.
"""

import dataclasses
import functools
import warnings
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, PyTree, UInt32

from jprune.graph.axes import Axes
from jprune.pruning.amounts import (
    Amount,
    Budget,
    Keep,
    PerLayer,
    Scheduled,
    as_keywords,
    exact_name,
    part_of,
    without,
)
from jprune.pruning.conditional import while_due
from jprune.pruning.dynamics import Regrow
from jprune.pruning.schedules import budget_of, entries, keep_counts, unwrapped
from jprune.pruning.scores.elementwise import (
    Score,
    matching,
    name_of,
    ranks_by_magnitude,
    score_selected,
    working_dtype,
)
from jprune.pruning.selection import uint64
from jprune.pruning.selection.kth_largest import count_true
from jprune.pruning.selection.layers import describe, is_mask, mask_layers, warn_of_collapse
from jprune.pruning.selection.unstructured import erk_masks, global_masks, layer_masks, uniform_masks
from jprune.pruning.state import SKIPPED
from jprune.trees import flatten, is_float, map_leaves, match

_BY_MAGNITUDE = (global_masks, layer_masks, uniform_masks, erk_masks)


class _Event(NamedTuple):
    """An entry of the schedule that changes something."""

    step: int
    amount: float | Keep | PerLayer
    exchanged: float  # the fraction of the count that is dropped, so that others can regrow
    checksum: int  # 31 bits, not 0; the state has the checksum of the entry that was applied last


class Progress(NamedTuple):
    """Where a prune transformation is in its schedule: ``count`` and ``applied`` of its ``PruneState``."""

    count: Array  # type: ignore[assignment] # int32; a tuple has a method of this name
    applied: UInt32[Array, ""]


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The static part of a prune transformation; the attributes are the arguments of ``prune``."""

    score: Score | Callable[..., PyTree]
    schedule: dict[int, float | Keep | PerLayer]
    selection: Callable[..., PyTree]
    axes: Axes
    min_keep: int
    regrow: Regrow | None

    def check(self, weights: PyTree) -> None:
        """Check that the schedule and the selection fit the weights, by tracing the selection.

        Raises:
          TypeError: a mask that the selection returns is not a bool array.
          ValueError: a count exceeds the number of weights, rises without regrowth, or is less than the minimum of all
            layers; or the selection raises it for these weights.
        """
        events = self._events(weights)
        if not events:
            return

        def probe(weights: PyTree) -> PyTree:
            # As an update calls it, which then finds it traced.
            folded = self._reads_weights()
            scores = weights if folded else map_leaves(lambda w: w.astype(working_dtype(w)), weights)
            masks = map_leaves(lambda weight: jnp.ones_like(weight, bool), weights)
            among = masks if self.regrow is None else None
            chosen = self._select(scores, events, jnp.int32(0), among, magnitude=folded, probe=True)
            # A selection of channels also returns masks of leaves without scores.
            return chosen if self._of_channels() else self._checked_masks(chosen, masks)

        jax.eval_shape(probe, weights)

    def inputs(
        self, weights: PyTree, grad: PyTree, batch: PyTree, key: Array | None, whole: PyTree
    ) -> dict[str, PyTree]:
        """Return the inputs that the scores use in addition to the weights; the others can be freed."""
        needs = _needs(self.score) | (set() if self.regrow is None else _needs(self.regrow.score))
        given = {"grad": grad, "batch": batch, "key": key, "whole": whole}
        read = {name: value for name, value in given.items() if name in needs and value is not None}
        if "grad" in read:
            read["grad"] = matching(weights, grad, name="grad")
        return read

    def advance(
        self, progress: Progress, masks: PyTree, weights: PyTree, inputs: dict[str, PyTree]
    ) -> tuple[PyTree, UInt32[Array, ""]]:
        """Return the masks after the update with this count, and the checksum of the entry applied last.

        The selection runs only if the current entry is not the one that was applied last. If its scores contain NaN,
        the masks stay and the checksum gets the bit ``SKIPPED``, so that the entry counts as not applied.
        """
        count, applied = progress
        events = self._events(weights)
        if not events:
            return masks, applied
        current = _current_entry(events, count, applied)
        now = count if "key" in inputs else None  # a loop copies what it reads

        def choose(carry: PyTree, count: PyTree, weights: PyTree, inputs: dict[str, PyTree]) -> PyTree:
            current, applied, masks = carry
            chosen, nan = self._choose(events, masks, (current, count), weights, inputs)
            kept = map_leaves(lambda old, new: jnp.where(nan, old, new), masks, chosen)
            applied = jnp.where(nan, applied | SKIPPED, current)
            return applied, applied, kept

        # Where nothing is due, the loop passes on what it carries: not even the checksum costs an operation.
        due = lambda carry: carry[0] != carry[1]
        _, applied, masks = while_due(due, choose, (current, applied, masks), now, weights, inputs)
        return masks, applied

    def refuse_nan(
        self,
        before: Progress,
        applied: UInt32[Array, ""],
        masks: PyTree,
        weights: PyTree,
        inputs: dict[str, PyTree],
    ) -> None:
        """Raise, outside jit, if a selection was skipped because its scores contain NaN.

        Args:
          before: the progress before the update.
          applied: the checksum after it.
          masks: the masks before the update.
          weights: as for ``advance``.
          inputs: as for ``advance``.

        Raises:
          ValueError: a selection was skipped; the message names the leaves.
        """
        if isinstance(applied, jax.core.Tracer) or jnp.ndim(applied) or not int(applied) & SKIPPED:
            return
        events = self._events(weights)
        if not events or int(_current_entry(events, *before)) == int(before.applied):
            return  # skipped by an earlier update; nothing was due in this one
        if "key" in inputs:
            inputs = inputs | {"key": jax.random.fold_in(inputs["key"], before.count)}
        paths, scores, _ = flatten(self._scores(self.score, weights, inputs))
        present = flatten(masks)
        mask_of = dict(zip(present[0], present[1], strict=True))
        found = [
            path
            for path, score in zip(paths, scores, strict=True)
            if score is not None and bool(jnp.any(jnp.isnan(score) & mask_of[path]))
        ]
        regrown = "" if self.regrow is None else ", of the weights to regrow"
        where = f" at {', '.join(map(repr, found))}" if found else regrown
        raise ValueError(
            f"the scores of the selection at step {int(before.count)} contain NaN{where}, which cannot be ranked; "
            "check the parameters, grad= and batch= given to update, or skip updates with NaN by "
            "optax.apply_if_finite(tx, 10)"
        )

    def warn_of_entry(self, applied: UInt32[Array, ""], now: UInt32[Array, ""], before: PyTree, after: PyTree) -> None:
        """Warn, outside jit, if the applied entry of the schedule leaves a layer empty or too few weights.

        Args:
          applied: the checksum of the entry applied last before the update.
          now: the checksum of the entry applied last after it.
          before: the masks before the update.
          after: the masks after it.
        """
        traced = any(isinstance(leaf, jax.core.Tracer) for leaf in (now, *jax.tree.leaves(after)))
        if traced or jnp.ndim(now) or int(now) == int(applied) or self._of_channels():
            return  # a group of channels is only empty where min_channels=0 asks for it
        step, amount = next(each for each in entries(self.schedule) if self._checksums[each[0]] == int(now))
        layers = mask_layers(before, self.axes)
        warn_of_collapse(layers, jax.tree.leaves(after), amount)
        if self.regrow is None:
            wanted = self._budget(before).kept(amount).total
            left = [uint64.number(count_true(jax.tree.leaves(masks))) for masks in (before, after)]
            if left[0] == left[1] < wanted:
                warnings.warn(
                    f"the schedule keeps {wanted} weights from step {step} on, but only {left[1]} are left, "
                    "because an earlier schedule pruned more; pruned weights do not come back: pass regrow=, or start "
                    "again from dense weights and larger masks (jprune.with_masks)",
                    stacklevel=3,
                )

    def _of_channels(self) -> bool:
        return hasattr(self.selection, "loses_channels")

    @functools.cached_property
    def _checksums(self) -> dict[int, int]:
        """The number of each entry by step, the same in every process and version of Python.

        Without regrowth masks only shrink, so the same amount at another step has the same number. Entries that differ
        have different numbers: where two checksums collide, the later entry takes the next number that is free.
        """
        checksums: dict[int, int] = {}
        owners: dict[int, str] = {}
        for step, amount in entries(self.schedule):
            name = exact_name(amount) if self.regrow is None else f"{step}: {exact_name(amount)}"
            number = zlib.crc32(name.encode()) & ~int(SKIPPED)
            while not number or owners.setdefault(number, name) != name:
                number = (number + 1) & ~int(SKIPPED)
            checksums[step] = number
        return checksums

    def _events(self, weights: PyTree) -> list[_Event]:
        budget = self._budget(weights)
        keep_counts(self.schedule, budget, regrowing=self.regrow is not None)
        events: list[_Event] = []
        kept = exact_name(Keep(budget.total))
        for step, amount in entries(self.schedule):
            # By name, because dicts are equal in any order, and here the first expression that matches decides.
            asked = exact_name(Keep(budget.total) if amount == 0.0 else amount)
            if self.regrow is not None:
                events.append(_Event(step, amount, self.regrow.at(step), self._checksums[step]))
            elif asked != kept:  # an entry without a change would cost a selection
                events.append(_Event(step, amount, 0.0, self._checksums[step]))
            kept = asked
        return events

    def _budget(self, weights: PyTree) -> Budget:
        return budget_of(self.selection, weights, self.axes, self.min_keep)

    def _choose(
        self,
        events: list[_Event],
        masks: PyTree,
        now: tuple[UInt32[Array, ""], Int[Array, ""] | None],
        weights: PyTree,
        inputs: dict[str, PyTree],
    ) -> tuple[PyTree, Bool[Array, ""]]:
        """Return the masks of the current entry, and whether a score that is ranked is NaN."""
        current, count = now
        # Entries with the same checksum have the same amount, so any of them can be used.
        event = jnp.argmax(np.asarray([event.checksum for event in events], np.uint32) == current).astype(jnp.int32)
        if count is not None:
            inputs = inputs | {"key": jax.random.fold_in(inputs["key"], count)}
        folded = self._reads_weights()
        scores = weights if folded else self._scores(self.score, weights, inputs)
        nan = _any_nan(scores, masks)
        if self.regrow is None:
            chosen = self._select(scores, events, event, masks, magnitude=folded)
            return self._checked_masks(chosen, masks), nan
        among = masks
        if self._compares_magnitudes():
            # With ``among`` other layers would exceed their counts in place of one that has too few weights left.
            scores, among = map_leaves(lambda score, mask: jnp.where(mask, score, -jnp.inf), scores, masks), None
        survivors = self._select(scores, events, event, among, surviving=True)
        survivors = map_leaves(jnp.logical_and, self._checked_masks(survivors, masks), masks)
        if "key" in inputs:  # regrowth must be independent of the random numbers that dropped weights
            inputs = inputs | {"key": jax.random.fold_in(inputs["key"], 1)}
        regrown = self._scores(self.regrow.score, weights, inputs)
        nan |= _any_nan(regrown, map_leaves(jnp.logical_not, survivors))
        # Survivors rank first, so that any selection keeps them and adds the best of the others.
        chosen = self._select(map_leaves(_with_survivors_first, regrown, survivors), events, event, None)
        return self._checked_masks(chosen, masks), nan

    def _scores(self, score: Score | Callable[..., PyTree], weights: PyTree, inputs: dict[str, PyTree]) -> PyTree:
        """Return the scores of the weights, in the structure of the weights.

        Raises:
          TypeError: a score is not a float array.
          ValueError: the score lacks a leaf, or has another shape, or has no value for a leaf.
        """
        given = score_selected(score, weights, **inputs)
        paths, leaves, treedef = flatten(weights)
        own = score.name if isinstance(score, Score) else name_of(score)
        found = match(weights, given, reference_name="params", name=f"what score={own} returned")
        for path, weight, returned in zip(paths, leaves, found, strict=True):
            if weight is None or (returned is None and isinstance(score, Score) and self._of_channels()):
                continue
            if returned is None and isinstance(score, Score):
                raise ValueError(
                    f"score={own} has no score for '{path}'; leave this leaf out with "
                    "where=jprune.by_path(exclude=...), or use jprune.structured as the selection"
                )
            if not is_float(returned) or returned.shape != weight.shape:
                raise TypeError(
                    f"score={own} returned {describe(returned)} at '{path}'; it must return a tree like its "
                    f"first argument, with a float array of shape {weight.shape} there, larger for weights to keep"
                )
        # In single precision at least, as scores of jprune: some 8-bit dtypes have no infinity, which regrowth uses.
        ranked = [
            None if w is None or returned is None else returned.astype(working_dtype(returned))
            for w, returned in zip(leaves, found, strict=True)
        ]
        return jax.tree.unflatten(treedef, ranked)

    def _checked_masks(self, masks: PyTree, reference: PyTree) -> PyTree:
        """Return the masks that the selection returned, in the structure of ``reference``.

        Raises:
          TypeError: a mask is not a bool array.
          ValueError: the selection returned no mask for a leaf, or one of a different shape.
        """
        paths, leaves, treedef = flatten(reference)
        name = f"what selection={name_of(self.selection)} returned"
        found = match(reference, masks, reference_name="scores", name=name)
        for path, leaf, mask in zip(paths, leaves, found, strict=True):
            if leaf is not None and not is_mask(mask):
                raise TypeError(
                    f"selection={name_of(self.selection)} returned {describe(mask)} at '{path}'; it must return a tree "
                    f"like its first argument, with a bool array of shape {leaf.shape} there, True for weights to keep"
                )
        return jax.tree.unflatten(treedef, [None if x is None else mask for x, mask in zip(leaves, found, strict=True)])

    def _reads_weights(self) -> bool:
        """Whether the selection ranks the weights themselves by absolute value, so that no scores are written."""
        return ranks_by_magnitude(self.score) and self._compares_magnitudes() and self.regrow is None

    def _compares_magnitudes(self) -> bool:
        """Whether the selection is one of jprune that can rank by absolute value, or a partial of one.

        A function that wraps a selection may compute with the scores, so it gets the scores.
        """
        return unwrapped(self.selection) in _BY_MAGNITUDE

    def _select(
        self,
        scores: PyTree,
        events: list[_Event],
        event: Int[Array, ""],
        among: PyTree,
        *,
        surviving: bool = False,
        magnitude: bool = False,
        probe: bool = False,
    ) -> PyTree:
        """Select the weights that the due entry keeps; or those that survive before others regrow.

        With ``probe`` only the last entry is traced if the selection needs one program per entry, or all entries if
        the selection refuses amounts of the schedule.
        """
        dropped = tuple(entry.exchanged if surviving else 0.0 for entry in events)
        options: dict[str, object] = {"among": among}
        if self.min_keep:
            options["min_keep"] = self.min_keep
        if self.axes is not None:
            options["axes"] = self.axes
        if magnitude:
            options["magnitude"] = True
        amounts = Scheduled(tuple(entry.amount for entry in events), dropped, event)
        refused = False
        if len(events) > 1 or surviving:
            # A selection that computes with its amount raises, because the entry is not known while tracing. Any other
            # error is raised again below.
            try:
                return self.selection(scores, **_keyword(amounts), **options)
            except Exception as error:
                refused = isinstance(error, ValueError)
        plain = [self._less(entry.amount, part, scores) for entry, part in zip(events, dropped, strict=True)]
        names = [exact_name(amount) for amount in plain]
        distinct = dict(zip(names, plain, strict=True))
        branches = [functools.partial(self._selected, amount, options) for amount in distinct.values()]
        if probe or len(branches) == 1:
            return [branch(scores, among) for branch in branches[0 if refused else -1 :]][-1]
        places = {name: place for place, name in enumerate(distinct)}
        branch_of = jnp.asarray([places[name] for name in names], jnp.int32)
        return jax.lax.switch(branch_of[event], branches, scores, among)

    def _less(self, amount: float | Keep | PerLayer, part: float, scores: PyTree) -> float | Keep | PerLayer:
        """Return the amount that keeps a fraction ``part`` fewer weights, of a total rounded as by ``Regrow``."""
        if not part:
            return amount
        if not isinstance(amount, float):
            return without(amount, part)
        budget = self._budget(scores)
        kept = budget.kept(amount).total
        survivors = kept - round(part_of(kept, part))
        return 1.0 - survivors / max(budget.total, 1)

    def _selected(self, amount: Amount, options: dict[str, object], scores: PyTree, among: PyTree) -> PyTree:
        return self.selection(scores, **as_keywords(amount), **(options | {"among": among}))


def _current_entry(events: list[_Event], count: Int[Array, ""], applied: UInt32[Array, ""]) -> UInt32[Array, ""]:
    """Return the checksum of the last entry whose step is not after the count; ``applied`` before the first step.

    Every training step computes this, so it is a sum of differences (modulo 2^32) instead of a lookup.
    """
    steps = np.asarray([event.step for event in events], np.int32)
    checksums = np.asarray([event.checksum for event in events], np.uint32)
    later = jnp.sum(jnp.where(steps[1:] <= count, np.diff(checksums), np.uint32(0)), dtype=jnp.uint32)
    return jnp.where(count >= steps[0], checksums[0] + later, applied)


def _any_nan(scores: PyTree, masks: PyTree) -> Bool[Array, ""]:
    """Whether a score is NaN at a weight that may be kept."""
    flags = jax.tree.leaves(map_leaves(lambda score, mask: jnp.any(jnp.isnan(score) & mask), scores, masks))
    found: Array = functools.reduce(jnp.logical_or, flags)
    return found


def _keyword(amounts: Scheduled) -> dict[str, Scheduled]:
    return {"keep" if all(isinstance(amount, Keep) for amount in amounts.amounts) else "sparsity": amounts}


def _with_survivors_first(score: Array, survivor: Array) -> Array:
    """Return scores in which survivors rank above all others, and NaN ranks last."""
    finite = jnp.nan_to_num(score, nan=-jnp.inf, posinf=None, neginf=-jnp.inf)
    return jnp.where(survivor, jnp.inf, finite)


def _needs(score: Score | Callable[..., PyTree]) -> set[str]:
    return set(score.needs) if isinstance(score, Score) else {"grad", "batch", "key"}
