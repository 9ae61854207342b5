"""The layers of a tree of scores, checked; and how a choice is made among them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jprune.pruning.selection import kth_largest, uint64
from jprune.pruning.selection.uint64 import Count
from jprune.trees import flatten, is_float, match

PyTree = Any


class Layers(NamedTuple):
    """The leaves of a tree of scores that are not ``None``.

    Attributes:
      paths: their names.
      scores: float arrays.
      alive: bool arrays of what may be chosen, or ``None`` for all of a layer.
      slots: their places among all the leaves of the tree.
      treedef: of the tree, ``None`` counting as a leaf.
    """

    paths: list[str]
    scores: list[Any]
    alive: list[Any]
    slots: list[int]
    treedef: Any

    @property
    def sizes(self) -> list[int]:
        """The number of weights of each layer."""
        return [int(array.size) for array in self.scores]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each layer."""
        return [tuple(array.shape) for array in self.scores]

    def tree(self, masks: Sequence[Any]) -> PyTree:
        """Put one array for each layer back into the tree."""
        leaves: list[Any] = [None] * self.treedef.num_leaves
        for slot, mask in zip(self.slots, masks, strict=True):
            leaves[slot] = mask
        return jax.tree.unflatten(self.treedef, leaves)


def layers_of(scores: PyTree, among: PyTree, *, shapes_only: bool = False) -> Layers:
    """Flatten scores and check them, and ``among`` with them.

    Raises:
      TypeError: a score is not a float array, or a leaf of ``among`` not a bool array.
      ValueError: there is no layer, the trees do not match, or (outside jit) a score that may be chosen is NaN.
    """
    paths, leaves, treedef = flatten(scores)
    slots = [i for i, leaf in enumerate(leaves) if leaf is not None]
    if not slots:
        raise ValueError("scores has nothing to prune: every leaf is None")
    for i in slots:
        if not is_float(leaves[i]):
            raise TypeError(
                f"scores holds {describe(leaves[i])} at '{paths[i]}'; a score must be a float array or None"
            )
    alive = [None] * len(leaves) if among is None else match(scores, among, reference_name="scores", name="among")
    for i in slots:
        if alive[i] is not None and not is_mask(alive[i]):
            raise TypeError(f"among holds {describe(alive[i])} at '{paths[i]}'; it must be a bool array or None")
    layers = Layers([paths[i] for i in slots], [leaves[i] for i in slots], [alive[i] for i in slots], slots, treedef)
    if shapes_only:
        return layers
    layers = layers._replace(
        scores=[jnp.asarray(array) for array in layers.scores],
        alive=[None if array is None else jnp.asarray(array) for array in layers.alive],
    )
    if not any(isinstance(array, jax.core.Tracer) for array in [*layers.scores, *layers.alive]):
        for path, found in zip(layers.paths, jax.device_get(_nan(layers.scores, layers.alive)), strict=True):
            if found:
                raise ValueError(f"scores is NaN at '{path}'; a score that is no number cannot be ranked")
    return layers


def choose(layers: Layers, each: Sequence[int] | Count | None, total: int | Count | None) -> list[Any]:
    """Mark the largest ``each`` of every layer, then the largest of what is left, up to ``total`` in all.

    Args:
      layers: what to choose from.
      each: one count for each layer; ``None`` for none.
      total: the count in all; ``None`` for no more than ``each``.

    Returns:
      One bool array for each layer.
    """
    chosen = None
    if each is not None:
        chosen = kth_largest.largest(layers.scores, _count(each), layers.alive, each=True)
    if total is None:
        return chosen or []
    if chosen is None:
        return kth_largest.largest(layers.scores, _count(total), layers.alive)
    left = [~own if alive is None else alive & ~own for own, alive in zip(chosen, layers.alive, strict=True)]
    rest = uint64.subtract_or_zero(_count(total), kth_largest.count_true(chosen))
    more = kth_largest.largest(layers.scores, rest, left)
    return [own | other for own, other in zip(chosen, more, strict=True)]


def _count(number: int | Sequence[int] | Count) -> Count:
    return number if isinstance(number, Count) else uint64.count_of(number)


@jax.jit
def _nan(scores: list[Any], alive: list[Any]) -> list[Any]:
    return [
        jnp.any(jnp.isnan(array) if mask is None else jnp.isnan(array) & mask)
        for array, mask in zip(scores, alive, strict=True)
    ]


def is_mask(leaf: Any) -> bool:
    """Whether a leaf is a bool array."""
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.bool_))


def describe(leaf: Any) -> str:
    """Name what a leaf is, for an error."""
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") else repr(leaf)
