"""What a prune link does at each step of its schedule: score, select, regrow.

Every count is a Python integer, worked out from the schedule and the shapes of the weights while
tracing. Where counts say all of a selection (the unstructured ones), they make a table, and one
compiled selection serves every step; else there is one branch for each entry of the schedule.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jprune.pruning.conditional import where_due
from jprune.pruning.dynamics import Regrow
from jprune.pruning.schedules import keep_values
from jprune.pruning.scores.elementwise import Score, beside, score_selected
from jprune.pruning.selection import allocation
from jprune.pruning.selection.layers import Layers, choose, layers_of
from jprune.pruning.selection.uint64 import Count, count_of
from jprune.pruning.selection.unstructured import (
    erk_counts,
    erk_masks,
    global_masks,
    layer_counts,
    layer_masks,
    uniform_masks,
)
from jprune.trees import map_leaves

PyTree = Any


class _Event(NamedTuple):
    """An entry of the schedule that changes something."""

    step: int
    keep: float | int
    exchanged: float  # the fraction of the count that is dropped so that others can regrow


class _Quota(NamedTuple):
    """How many to keep: so many of each layer, then the best of the rest up to the total."""

    each: list[int] | None
    total: int | None


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The static side of a prune link; the attributes are the arguments of ``prune``."""

    score: Score | Callable[..., PyTree]
    schedule: dict[int, float | int]
    select: Callable[..., PyTree]
    min_keep: int
    regrow: Regrow | None

    def check(self, weights: PyTree) -> None:
        """Refuse a schedule that does not fit the weights.

        Raises:
          ValueError: a count exceeds the number of weights, rises without regrowth, or is less than the
            floors together.
        """
        layers = layers_of(weights, None, shapes_only=True)
        for event in self._events(weights):
            self._quota(layers, event.keep)

    def evidence(self, weights: PyTree, grad: PyTree, batch: Any, key: Any, whole: PyTree) -> dict[str, Any]:
        """What the scores read beside the weights, and nothing else, because it must outlive the forward pass."""
        needs = _needs(self.score) | (set() if self.regrow is None else _needs(self.regrow.score))
        given = {"grad": grad, "batch": batch, "key": key, "whole": whole}
        read = {name: value for name, value in given.items() if name in needs and value is not None}
        if "grad" in read:
            read["grad"] = beside(weights, grad, name="grad")
        return read

    def advance(self, count: Any, masks: PyTree, weights: PyTree, evidence: dict[str, Any]) -> PyTree:
        """The masks after the update with this count; the selection runs only where one is due."""
        events = self._events(weights)
        if not events:
            return masks
        hits = count == np.asarray([event.step for event in events], np.int32)
        if "key" in evidence:
            evidence = evidence | {"key": jax.random.fold_in(evidence["key"], count)}
        choose = functools.partial(self._choose, events)
        return where_due(jnp.any(hits), choose, masks, jnp.argmax(hits), weights, evidence)

    def _events(self, weights: PyTree) -> list[_Event]:
        total = sum(leaf.size for leaf in jax.tree.leaves(weights))
        events: list[_Event] = []
        kept: float | int = total
        for step, keep in keep_values(self.schedule, total, regrowing=self.regrow is not None):
            # An int and a float of one value mean different things, except where both keep everything.
            asked = total if isinstance(keep, float) and keep == 1.0 else keep
            if self.regrow is not None:
                events.append(_Event(step, keep, self.regrow.at(step)))
            elif (type(asked), asked) != (type(kept), kept):  # one that asks for no change would cost a selection
                events.append(_Event(step, keep, 0.0))
            kept = asked
        return events

    def _choose(
        self, events: list[_Event], masks: PyTree, event: Any, weights: PyTree, evidence: dict[str, Any]
    ) -> PyTree:
        scores = score_selected(self.score, weights, **evidence)
        if self.regrow is None:
            return self._pick(scores, events, event, masks)
        survivors = self._pick(scores, events, event, masks, surviving=True)
        if "key" in evidence:  # what is drawn to drop weights must not decide which ones come back
            evidence = evidence | {"key": jax.random.fold_in(evidence["key"], 1)}
        worth = score_selected(self.regrow.score, weights, **evidence)
        # Survivors come first and the best of the others fill up the count, whatever the selection is.
        return self._pick(map_leaves(_first, worth, survivors), events, event, None)

    def _pick(
        self, scores: PyTree, events: list[_Event], event: Any, among: PyTree, *, surviving: bool = False
    ) -> PyTree:
        """Select what the entry that is due keeps; or what of it survives before others regrow."""
        layers = layers_of(scores, among)
        dropped = [e.exchanged * surviving for e in events]
        quotas = [_less(self._quota(layers, e.keep), part) for e, part in zip(events, dropped, strict=True)]
        if any(quota is None for quota in quotas):
            keeps = [_remaining(e.keep, part) for e, part in zip(events, dropped, strict=True)]
            branches = [functools.partial(self._selected, keep) for keep in keeps]
            return jax.lax.switch(event, branches, scores, among)
        each = _entry([quota.each for quota in quotas if quota], event)
        total = _entry([quota.total for quota in quotas if quota], event)
        return layers.tree(choose(layers, each, total))

    def _selected(self, keep: float | int, scores: PyTree, among: PyTree) -> PyTree:
        return self.select(scores, keep, among=among, min_keep=self.min_keep)

    def _quota(self, layers: Layers, keep: float | int) -> _Quota | None:
        """How many an unstructured selection keeps; None for any other selection."""
        if self.select not in (global_masks, layer_masks, uniform_masks, erk_masks):
            return None
        scores = layers.tree(layers.scores)
        if self.select is layer_masks:
            each = layer_counts(scores, keep, min_keep=self.min_keep)
            return _Quota(each, sum(each) if isinstance(keep, int) else None)
        total = allocation.kept(keep, sum(layers.sizes))
        if self.select is global_masks:
            floors = allocation.floors(self.min_keep, layers.sizes, total)
            return _Quota(floors if self.min_keep else None, total)
        counts = erk_counts if self.select is erk_masks else layer_counts
        return _Quota(counts(scores, total, min_keep=self.min_keep), total)


def _less(quota: _Quota | None, part: float) -> _Quota | None:
    """The quota without a fraction of it, each count rounded by itself."""
    if quota is None:
        return None
    each = None if quota.each is None else [count - round(count * part) for count in quota.each]
    return _Quota(each, None if quota.total is None else quota.total - round(quota.total * part))


def _remaining(keep: float | int, part: float) -> float | int:
    return keep - round(keep * part) if isinstance(keep, int) else keep * (1.0 - part)


def _entry(counts: Sequence[Any], event: Any) -> Count | None:
    """The entry of a table of counts, looked up while the program runs."""
    if all(count is None for count in counts):
        return None
    # A table may mix entries that have a total and ones that add nothing to the counts of the layers.
    table = count_of([0 if count is None else count for count in counts])
    return Count(*(jnp.asarray(limb)[event] for limb in table))


def _first(worth: Any, survivor: Any) -> Any:
    finite = jnp.nan_to_num(worth, nan=-jnp.inf, posinf=None, neginf=-jnp.inf)
    return jnp.where(survivor, jnp.inf, finite)


def _needs(score: Score | Callable[..., PyTree]) -> set[str]:
    return set(score.needs) if isinstance(score, Score) else {"grad", "batch", "key"}
