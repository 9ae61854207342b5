"""Selections as in published papers and their code; the number kept is not exact.

Report the amounts that they reach: ``sparsity(masks)`` and ``compression(params, masks)``.
"""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from jprune.graph.axes import Axes
from jprune.pruning.amounts import Amount, Counts, Scheduled, Sparsity, amount_by_keyword, amount_of, without
from jprune.pruning.scores.elementwise import working_dtype
from jprune.pruning.selection import allocation, uint64
from jprune.pruning.selection.kth_largest import count_true
from jprune.pruning.selection.layers import Layers, Quota, choose, layers_of, quota_of, scalar, warn_of_collapse
from jprune.pruning.selection.uint64 import Count


@amount_by_keyword
def bernoulli_masks(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> PyTree:
    """Keep every weight with the same probability, independently: random pruning as published.

    Args:
      scores: scores of ``random``: independent and uniform in [0, 1), drawn independently of ``among``.
      sparsity: the expected fraction of all weights that is removed; without ``among``, the probability with which a
        weight is removed.
      keep: the expected number of weights kept.
      among: bool tree of the weights that may be kept; None for all. Each is kept with the expected number divided by
        their number as probability, or 1 if that is larger.
      min_keep: minimum number of weights that every layer keeps: its largest scores.
      axes: see ``global_masks``; only ``min_keep`` depends on it.

    Returns:
      A tree like ``scores`` of bool arrays.

    Raises:
      TypeError, ValueError: as ``global_masks``.

    Source: Good et al., NeurIPS 2022, arXiv 2206.02976.

    >>> bernoulli_masks(jnp.array([0.1, 0.95, 0.6, 0.3]), sparsity=0.5)
    Array([False,  True,  True, False], dtype=bool)
    """
    layers = layers_of(scores, among, axes, per_layer="min_keep" if min_keep else None)
    amount = amount_of(sparsity, keep)
    if isinstance(amount, Scheduled):
        each = zip(amount.amounts, amount.dropped, strict=True)
        fractions = [_removed(without(one, part), layers.size) for one, part in each]
        removed: ArrayLike = jnp.asarray(fractions, jnp.float32)[amount.index]
    else:
        removed = _removed(amount, layers.size)
    bound = _bound_among(layers, removed)
    masks = _at_least(layers, [jnp.asarray(bound, x.dtype) for x in layers.scores], min_keep)
    warn_of_collapse(layers, masks, amount)
    return layers.tree(masks)


@amount_by_keyword
def legacy_signed_masks(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> PyTree:
    """Keep every weight whose |score| reaches the ``keep``-th largest *signed* score: possibly more than ``keep``.

    This is the rule of the code of the published 30-replicate runs of undecayed pruning: the threshold is a quantile of
    the signed scores, but the mask compares absolute scores with it, so negative scores of large magnitude are kept
    too. Use it with ``undecayed(..., signed=True)`` and report the sparsity reached. If no score is negative it equals
    ``global_masks``, except that all ties at the threshold are kept.

    Args:
      scores: tree of signed float arrays, None where nothing is prunable.
      sparsity: the fraction of the weights removed that sets the threshold.
      keep: the number of weights kept that sets the threshold; an int, or an integer scalar array, which may be traced.
      among: bool tree of the weights that may be kept; None for all.
      min_keep: minimum number of weights that every layer keeps, by magnitude.
      axes: see ``global_masks``; only ``min_keep`` depends on it.

    Returns:
      A tree like ``scores`` of bool arrays; at least the given number of weights are kept.

    Raises:
      TypeError, ValueError: as ``global_masks``.

    Source: the code of Good et al., NeurIPS 2022, arXiv 2206.02976.

    >>> legacy_signed_masks(jnp.array([3.0, -5.0, 1.0, -2.0]), keep=2)
    Array([ True,  True,  True,  True], dtype=bool)
    """
    layers = layers_of(scores, among, axes, per_layer="min_keep" if min_keep else None)

    def quota(amount: Amount) -> Quota:
        return Quota(None, scalar(amount) if isinstance(amount, Count) else allocation.kept(amount, layers.size))

    signed = [x.astype(working_dtype(*layers.scores)) for x in layers.scores]
    amount = amount_of(sparsity, keep)
    above = choose(layers, quota_of(amount, quota))
    lowest = [jnp.min(x, where=mask, initial=jnp.inf) for mask, x in zip(above, signed, strict=True)]
    threshold = jnp.min(jnp.stack(lowest))
    magnitudes = [jnp.abs(x) for x in signed]
    masks = _at_least(layers._replace(scores=magnitudes), [threshold] * len(magnitudes), min_keep)
    warn_of_collapse(layers, masks, amount)
    return layers.tree(masks)


def _removed(amount: Amount, size: int) -> float:
    """Return the probability with which a weight is removed."""
    return amount if isinstance(amount, float) else 1.0 - allocation.kept(amount, size) / max(size, 1)


def _bound_among(layers: Layers, removed: ArrayLike) -> ArrayLike:
    """Return the bound for the scores of the weights that may be kept, if ``removed`` is the one for all weights."""
    if all(among is None for among in layers.masks):
        return removed
    present = [
        jnp.ones_like(x, dtype=bool) if among is None else among
        for x, among in zip(layers.scores, layers.masks, strict=True)
    ]
    left = uint64.to_float(uint64.at_least_one(count_true(present)))
    return 1.0 - (1.0 - removed) * (np.float32(layers.size) / left)


def _at_least(layers: Layers, bounds: Sequence[ArrayLike], min_keep: int) -> list[Array]:
    """Mark the weights whose scores reach a bound, and at least ``min_keep`` in each layer."""
    floors = allocation.floors(min_keep, layers.sizes, None)
    reached = [x >= bound for x, bound in zip(layers.scores, bounds, strict=True)]
    allowed = [mask if among is None else mask & among for mask, among in zip(reached, layers.masks, strict=True)]
    if not min_keep:
        return allowed
    return [mask | floor for mask, floor in zip(allowed, choose(layers, Quota(floors, None)), strict=True)]
