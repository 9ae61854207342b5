"""Selections whose count is not exact, kept because published results were made with them.

Report what they achieve: ``sparsity(masks)`` and ``compression(params, masks)``.
"""

import numbers
from typing import Any

import jax.numpy as jnp

from jprune.pruning.scores.elementwise import working_dtype
from jprune.pruning.selection import allocation
from jprune.pruning.selection.layers import choose, layers_of

PyTree = Any


def bernoulli_masks(scores: PyTree, keep: float, *, among: PyTree = None, min_keep: int = 0) -> PyTree:
    """Keep every weight with the same probability, independently: random pruning as published.

    Args:
      scores: what ``random`` gives: independent and uniform in [0, 1).
      keep: the probability, or an int: the expected number of weights.
      among: bool tree of the weights that may be chosen; ``None`` for all.
      min_keep: the least that every layer keeps: its largest scores.

    Returns:
      A tree like ``scores`` of bool arrays.

    Raises:
      TypeError, ValueError: as ``global_masks``.

    Source: Good et al., NeurIPS 2022, arXiv 2206.02976.

    >>> bernoulli_masks(jnp.array([0.1, 0.95, 0.6, 0.3]), keep=0.5)
    Array([False,  True,  True, False], dtype=bool)
    """
    layers = layers_of(scores, among)
    expected = allocation.kept(keep, sum(layers.sizes))
    probability = expected / sum(layers.sizes) if isinstance(keep, numbers.Integral) else float(keep)
    floors = choose(layers, allocation.floors(min_keep, layers.sizes, None), None)
    return layers.tree(_at_least(layers.scores, 1.0 - probability, layers.alive, floors))


def legacy_signed_masks(scores: PyTree, keep: float, *, among: PyTree = None, min_keep: int = 0) -> PyTree:
    """Keep every weight whose |score| reaches the ``keep``-th largest *signed* score: more than asked.

    The code behind the published 30-replicate runs of undecayed pruning does this: the threshold is a
    quantile of the scores with their signs on, the mask compares their magnitudes, so negative scores of
    large magnitude are kept on top. Use ``undecayed(..., signed=True)`` and report what is achieved. With
    scores that are never negative it is ``global_masks``, ties at the threshold all kept.

    Args:
      scores: tree of signed float arrays, ``None`` where nothing may be pruned.
      keep: how many weights, or which fraction, the threshold is placed for.
      among: bool tree of the weights that may be chosen; ``None`` for all.
      min_keep: the least that every layer keeps, by magnitude.

    Returns:
      A tree like ``scores`` of bool arrays, at least ``keep`` of them True.

    Raises:
      TypeError, ValueError: as ``global_masks``.

    Source: the code of Good et al., NeurIPS 2022, arXiv 2206.02976.

    >>> legacy_signed_masks(jnp.array([3.0, -5.0, 1.0, -2.0]), keep=2)
    Array([ True,  True,  True,  True], dtype=bool)
    """
    layers = layers_of(scores, among)
    total = allocation.kept(keep, sum(layers.sizes))
    signed = [x.astype(working_dtype(*layers.scores)) for x in layers.scores]
    above = choose(layers, None, total)
    lowest = [jnp.min(x, where=mask, initial=jnp.inf) for mask, x in zip(above, signed, strict=True)]
    threshold = jnp.min(jnp.stack(lowest))
    sizes = [jnp.abs(x) for x in signed]
    floors = choose(layers._replace(scores=sizes), allocation.floors(min_keep, layers.sizes, None), None)
    return layers.tree(_at_least(sizes, threshold, layers.alive, floors))


def _at_least(scores: list[Any], threshold: Any, alive: list[Any], floors: list[Any]) -> list[Any]:
    reached = [x >= threshold for x in scores]
    may = [mask if own is None else mask & own for mask, own in zip(reached, alive, strict=True)]
    return [mask | floor for mask, floor in zip(may, floors, strict=True)]
