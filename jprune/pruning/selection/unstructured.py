"""Unstructured selections, which turn scores into masks with exact counts, and measures of masks.

A selection is a function ``f(scores, *, sparsity=None, keep=None, among=None, min_keep=0, axes=None) -> masks``.
Scores and masks are trees like the parameters, None where nothing is prunable; larger scores are kept. In every
selection

* ``sparsity`` is the fraction removed, a float in [0, 1]: n (1 - sparsity) weights are kept, rounded half to even,
  with n the number of all weights that have a score. Rounding errors of floats do not count: 0.9 keeps 1.5 of 15
  weights, rounded to 2;
* ``keep`` is the number of weights kept, an int. Exactly one of ``sparsity`` and ``keep`` must be given;
* ``among`` is a tree of bool masks, None for all: only weights where it is True can be kept. It does not change n,
  so that a sparsity means the same at every step of a schedule;
* ``min_keep`` is the minimum number of weights that every layer keeps, within the exact total, to avoid layer
  collapse (a smaller layer keeps all its weights);
* ``axes`` gives the roles of the axes of every leaf: a graph made by ``jprune.trace_model``, ``{regex: KernelAxes}``,
  "flax" or "equinox". With one of the last two, pass ``axes=jprune.prunable(params, axes="flax")`` to a selection that
  you call on scores, which lack the biases. A layer is a leaf, or one slice of a leaf that stacks several layers;
* ``magnitude`` (of the selections below) ranks by absolute value: with the weights themselves as scores this is
  magnitude pruning, and no array of absolute values is written.

The number of weights kept is exact, provided that ``among`` has enough of them. Ties are broken by position: leaf order
in the tree, then row-major index. NaN scores raise an error outside jit and rank lowest inside jit.

``global_masks`` and ``layer_masks`` also accept ``keep`` as an integer array that may be traced, so that one compiled
program serves many ratios: a scalar, or for ``layer_masks`` one count for each layer, as returned by ``layer_counts``
and ``erk_counts``.
"""

import functools
import math
import numbers
from collections.abc import Callable, Mapping
from fractions import Fraction

import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from jprune.graph.axes import Axes, kernel_axes, where_of
from jprune.pruning.amounts import Amount, Counts, Keep, Sparsity, amount_by_keyword, amount_of, as_written, to_half
from jprune.pruning.selection import allocation, kth_largest, uint64
from jprune.pruning.selection.layers import (
    Layers,
    Quota,
    choose,
    describe,
    is_mask,
    layers_of,
    quota_of,
    scalar,
    warn_of_collapse,
    warn_of_counts,
)
from jprune.pruning.selection.uint64 import AnyArray, Count
from jprune.trees import Leaf, Where, flatten, is_float, match, only, path_string, refuse_statistics


@amount_by_keyword
def global_masks(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
    magnitude: bool = False,
) -> PyTree:
    """Keep the largest scores of the whole tree.

    Args:
      scores: tree of float arrays, None where nothing is prunable; the largest are kept, so for magnitudes pass
        ``jprune.magnitude()(params)``, not the signed weights.
      sparsity: the fraction of all weights to remove, in [0, 1].
      keep: the number of weights to keep; an int, or an integer scalar array, which may be traced.
      among: bool tree of the weights that may be kept; None for all.
      min_keep: minimum number of weights that every layer keeps: first the largest scores of each layer are kept, then
        the largest of the rest of the tree. If a traced ``keep`` is smaller than this, more weights are kept.
      axes: roles of the axes of each leaf, see ``prune``; only ``min_keep`` depends on it.
      magnitude: rank by absolute value; ``scores`` may then be the weights.

    Returns:
      A tree like ``scores`` of bool arrays.

    Raises:
      TypeError: not exactly one of ``sparsity`` and ``keep`` is given, or one has the wrong type.
      ValueError: a number is out of range, ``min_keep`` exceeds the total, the trees do not match, there is
        nothing to prune, or a score is NaN (outside jit); the message names the leaf.

    >>> global_masks({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 2.0]), "c": None}, sparsity=0.5)
    {'a': Array([ True, False], dtype=bool), 'b': Array([ True, False], dtype=bool), 'c': None}
    """
    layers = layers_of(scores, among, axes, per_layer="min_keep" if min_keep else None, magnitude=magnitude)

    def quota(amount: Amount) -> Quota:
        total = scalar(amount) if isinstance(amount, Count) else allocation.kept(amount, layers.size)
        floors = allocation.floors(min_keep, layers.sizes, _known(total))
        return Quota(floors if min_keep else None, total)

    return _chosen(layers, amount_of(sparsity, keep), quota)


@amount_by_keyword
def layer_masks(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
    magnitude: bool = False,
) -> PyTree:
    """Keep the largest scores of every layer, each layer separately.

    Args:
      scores: tree of float arrays, None where nothing is prunable.
      sparsity: the fraction of each layer to remove, rounded layer by layer; or ``{regex: sparsity}``, where the first
        expression found in a layer's path applies and every layer must match one ('' matches all others).
      keep: the number of weights to keep, divided among the layers in proportion to their sizes (exact in
        total); or ``{regex: number}``, the number for each layer; or an integer array (layers,), which may be traced.
      among: bool tree of the weights that may be kept; None for all. A layer with fewer than its number keeps
        them all; other layers compensate only if ``keep`` is an int.
      min_keep: minimum number of weights that every layer keeps.
      axes: roles of the axes of each leaf, see ``prune``; stacked axes are over layers.
      magnitude: rank by absolute value; ``scores`` may then be the weights.

    Returns:
      A tree like ``scores`` of bool arrays.

    Raises:
      TypeError, ValueError: as ``global_masks``; an expression matches no layer, or a layer matches none.

    >>> layer_masks({"a": jnp.array([3.0, 1.0]), "b": jnp.array([2.0, 2.0])}, sparsity=0.5)
    {'a': Array([ True, False], dtype=bool), 'b': Array([ True, False], dtype=bool)}
    """
    layers = layers_of(scores, among, axes, per_layer="layer_masks", magnitude=magnitude)

    def quota(amount: Amount) -> Quota:
        if isinstance(amount, Count):
            floors = allocation.floors(min_keep, layers.sizes, None)
            return Quota(uint64.at_least(_per_layer(amount, layers), uint64.count_of(floors)), None)
        counts = counts_of_layers(layers, amount, min_keep)
        warn_of_counts(layers, counts, amount)
        return Quota(counts, sum(counts) if isinstance(amount, Keep) and among is not None else None)

    return _chosen(layers, amount_of(sparsity, keep), quota)


@amount_by_keyword
def uniform_masks(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
    magnitude: bool = False,
) -> PyTree:
    """Keep the same fraction of every layer; the total is exact, because fractions are rounded jointly.

    Each layer keeps its largest scores. Arguments, result and errors are those of ``global_masks``.

    >>> uniform_masks({"a": jnp.array([3.0, 1.0, 2.0]), "b": jnp.array([2.0, 5.0, 4.0])}, sparsity=0.5)
    {'a': Array([ True, False,  True], dtype=bool), 'b': Array([False,  True, False], dtype=bool)}
    """
    layers = layers_of(scores, among, axes, per_layer="uniform_masks", magnitude=magnitude)

    def counts_of(total: int) -> list[int]:
        return counts_of_layers(layers, Keep(total), min_keep)

    return _exact_in_total(layers, amount_of(sparsity, keep), counts_of)


@amount_by_keyword
def erk_masks(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
    magnitude: bool = False,
) -> PyTree:
    """Divide the weights kept among layers by the Erdos-Renyi-kernel rule (ERK); the total is exact.

    A layer keeps the fraction e * (d_1 + ... + d_k) / (d_1 * ... * d_k) of its weights. d_1, ..., d_k are its numbers
    of inputs and outputs and the sizes of its window (height, width, in, out for a convolution; in, heads * head_dim
    for an attention query), and e is the scale that makes the total exact. A layer whose fraction would exceed 1 is
    kept dense and e is raised for the rest; counts are rounded by largest remainders.

    Arguments, result and errors are those of ``global_masks``.

    Source: Evci et al., "Rigging the Lottery", ICML 2020, arXiv 1911.11134, section 3 (1).

    >>> masks = erk_masks({"a": jnp.ones((2, 2)), "b": jnp.ones((4, 8))}, keep=12)
    >>> masks["a"].sum().item(), masks["b"].sum().item()
    (3, 9)
    """
    layers = layers_of(scores, among, axes, per_layer="erk_masks", magnitude=magnitude)
    shares = _erk_shares(layers, axes)

    def counts_of(total: int) -> list[int]:
        return _erk_counts(layers, shares, total, min_keep)

    return _exact_in_total(layers, amount_of(sparsity, keep), counts_of)


@amount_by_keyword
def layer_counts(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> list[int]:
    """Return the number of weights that ``layer_masks`` keeps in each layer, from arrays or their shapes.

    Arguments and errors are those of ``layer_masks``.

    >>> layer_counts({"a": jnp.ones(4), "b": jnp.ones(10)}, sparsity=0.5, min_keep=3)
    [3, 5]
    """
    layers = layers_of(scores, None, axes, per_layer="layer_counts", shapes_only=True)
    return counts_of_layers(layers, amount_of(sparsity, keep), min_keep)


@amount_by_keyword
def erk_counts(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> list[int]:
    """Return the number of weights that ``erk_masks`` keeps in each layer, from arrays or their shapes.

    Arguments and errors are those of ``erk_masks``.

    >>> erk_counts({"a": jnp.ones((2, 2)), "b": jnp.ones((4, 8))}, keep=12)
    [3, 9]
    """
    layers = layers_of(scores, None, axes, per_layer="erk_counts", shapes_only=True)
    total = allocation.kept(amount_of(sparsity, keep), layers.size)
    return _erk_counts(layers, _erk_shares(layers, axes), total, min_keep)


def apply_masks(params: PyTree, masks: PyTree) -> PyTree:
    """Set pruned weights to zero.

    Args:
      params: tree of arrays.
      masks: bool tree with the same paths, True where a weight is kept; None in place of a leaf or a subtree keeps it
        whole.

    Returns:
      A tree like ``params``, with the same dtypes.

    Raises:
      TypeError: a mask is not a bool array.
      ValueError: the trees do not match; the message names the leaf.

    >>> apply_masks({"w": jnp.array([1.0, 2.0]), "b": jnp.array([3.0])}, {"w": jnp.array([True, False]), "b": None})
    {'b': Array([3.], dtype=float32), 'w': Array([1., 0.], dtype=float32)}
    """
    _, leaves, treedef = flatten(params)
    matched = _mask_leaves(params, masks)
    return jax.tree.unflatten(
        treedef,
        [leaf if mask is None else _where(mask, leaf) for leaf, mask in zip(leaves, matched, strict=True)],
    )


@functools.partial(jax.jit, inline=True)  # eagerly, each operation would be compiled for each shape
def _where(mask: AnyArray, leaf: AnyArray) -> AnyArray:
    return jnp.where(mask, leaf, jnp.zeros_like(leaf))


def sparsity(masks: PyTree) -> float:
    """Return the fraction of the prunable weights that are pruned, from exact counts.

    Args:
      masks: tree of bool arrays, or integer arrays of zeros and ones, None where nothing is prunable; concrete arrays.
        Those of an optimizer state are ``jprune.masks_of(state)``.

    Raises:
      TypeError: a leaf is not a mask, as in parameters or an optimizer state; the message names it.
      ValueError: there is no mask, or a mask is traced.

    >>> sparsity({"w": jnp.array([True, False, False, False]), "b": None})
    0.75
    """
    kept, size = _kept_of(jax.tree.map_with_path(_as_bool, masks))
    return (size - kept) / size


def _as_bool(key_path: tuple[jax.tree_util.KeyEntry, ...], mask: Leaf) -> Leaf:
    """Return a mask as a bool array.

    Raises:
      TypeError: it is neither a bool array nor an integer array of zeros and ones.
    """
    if is_mask(mask):
        return mask
    wanted = (
        f"masks has {describe(mask)} at '{path_string(key_path)}'; sparsity counts masks, bool arrays that are True "
        "where a weight is kept: pass jprune.masks_of(state) of an optimizer state, or "
        "jax.tree.map(lambda weight: weight != 0, params) to count zeros"
    )
    # The count of an optimizer state is an integer scalar.
    if not hasattr(mask, "dtype") or not jnp.issubdtype(mask.dtype, jnp.integer) or not mask.ndim:
        raise TypeError(wanted)
    if not isinstance(mask, jax.core.Tracer) and bool(jnp.any((mask != 0) & (mask != 1))):
        raise TypeError(f"{wanted}; an integer mask has only zeros and ones")
    return mask != 0


def compression(params: PyTree, masks: PyTree) -> float:
    """Return the compression ratio of the whole model: all parameters over those that remain.

    Args:
      params: tree of arrays (or of their shapes); its float leaves are the parameters.
      masks: bool tree with the same paths, None where nothing is prunable; concrete arrays.

    Returns:
      The ratio of two exact counts; infinity if no parameter remains.

    Raises:
      TypeError: a mask is not a bool array.
      ValueError: the trees do not match, there is no mask, a mask is traced, or ``params`` has other arrays than
        parameters, such as batch statistics.

    >>> compression({"w": jnp.ones(3), "b": jnp.ones(1)}, {"w": jnp.array([True, False, False]), "b": None})
    2.0
    """
    refuse_statistics(params)
    _mask_leaves(params, masks)
    kept, size = _kept_of(masks)
    total = _parameters(params)
    left = total - size + kept
    return total / left if left else math.inf


def keep_count(
    params: PyTree,
    *,
    ratio: float,
    where: Where | None = None,
    axes: Axes = None,
    counting: str = "exact",
) -> int:
    """Return the number of prunable weights to keep for a compression ratio of the whole model.

    With N parameters in all (every float leaf) of which D are not prunable, the number of weights to keep is
    N / ratio - D, computed exactly and rounded half to even. The model then has N / ratio parameters.

    ``counting="shrinkbench"`` reproduces the counts of the published code, which also counts the B biases of prunable
    layers as prunable, but prunes only weights. It keeps the fraction (N / ratio - (D - B)) / (N - (D - B)) of the
    weights, which is more than exact counting keeps. Models without biases in their prunable layers are unaffected.

    Args:
      params: tree of arrays, or of their shapes.
      ratio: parameters before over parameters after; 1 keeps all.
      where: predicate on (path, leaf) that selects the prunable leaves; None as for ``prune``.
      axes: a graph or a convention, for ``where=None``; see ``prune``.
      counting: ``"exact"``, or ``"shrinkbench"`` for the counts of the published code. A leaf named ``bias`` or
        ``b`` counts as prunable there if it has the same parent as a prunable leaf.

    Raises:
      TypeError: ``ratio`` is not a number.
      ValueError: ``where`` selects nothing; ``params`` has other arrays than parameters, such as batch statistics;
        ``counting`` is unknown; ``ratio`` is below 1, or above the largest reachable ratio, which the message gives.

    Source: Good et al., "Recall Distortion in Neural Network Pruning and the Undecayed Pruning Algorithm",
    NeurIPS 2022, arXiv 2206.02976, where t is the ratio; ``fraction_to_keep`` in the code of Blalock et al., "What
    is the State of Neural Network Pruning?", MLSys 2020, arXiv 2003.03033.

    >>> params = {"kernel": jnp.ones((10, 9)), "bias": jnp.ones(10)}
    >>> keep_count(params, ratio=4), keep_count(params, ratio=4, counting="shrinkbench")
    (15, 22)
    """
    if isinstance(ratio, bool) or not isinstance(ratio, numbers.Real):
        named = isinstance(ratio, str) and ratio in ("exact", "shrinkbench")
        instead = f"; write counting={ratio!r}, with a number as ratio" if named else ""
        raise TypeError(f"ratio={ratio!r} must be a number: parameters before over parameters after pruning{instead}")
    if counting not in ("exact", "shrinkbench"):
        raise ValueError(f"counting={counting!r} is unknown; use 'exact' or 'shrinkbench'")
    refuse_statistics(params)
    selected = only(params, where_of(where, axes))
    total = _parameters(params)
    prunable = _parameters(selected)
    biases = _biases(params, selected) if counting == "shrinkbench" else 0
    dense = total - prunable - biases
    most = f"{total}/{dense} = {total / dense:.6g}" if dense else "infinity"
    exact = Fraction(as_written(ratio)) if 1 <= ratio < math.inf else Fraction(0)
    left = to_half(total / exact - dense, total) if exact else Fraction(-1)  # of weights and biases
    if left < 0:
        raise ValueError(
            f"ratio={ratio!r} must lie between 1 and {most}: {dense} of the {total} parameters are not prunable; "
            "use a smaller ratio, or make more leaves prunable"
        )
    return round(to_half(left * Fraction(prunable, prunable + biases), total))


def _chosen(layers: Layers, amount: Amount, quota: Callable[[Amount], Quota]) -> PyTree:
    """Return the masks of the quota for an amount, and warn outside jit about layers that keep no weight."""
    masks = choose(layers, quota_of(amount, quota))
    warn_of_collapse(layers, masks, amount, stacklevel=5)
    return layers.tree(masks)


def _exact_in_total(layers: Layers, amount: Amount, counts_of: Callable[[int], list[int]]) -> PyTree:
    """Return the masks for a total amount that ``counts_of`` divides among the layers.

    If some weights must not be kept, a layer may not reach its count, and the other layers compensate.
    """
    restricted = any(mask is not None for mask in layers.masks)

    def quota(amount: Amount) -> Quota:
        total = allocation.kept(amount, layers.size)
        counts = counts_of(total)
        warn_of_counts(layers, counts, amount)
        return Quota(counts, total if restricted else None)

    return _chosen(layers, amount, quota)


def _known(total: int | Count) -> int | None:
    """Return a total as an int, or None if it is traced."""
    if isinstance(total, Count):
        return None if isinstance(total.low, jax.core.Tracer) else uint64.number(total)
    return total


def _per_layer(counts: Count, layers: Layers) -> Count:
    if counts.low.shape != (len(layers.names),):
        raise ValueError(
            f"keep is an array of shape {counts.low.shape}; layer_masks takes one count for each of the "
            f"{len(layers.names)} layers: {', '.join(layers.names)}"
        )
    return counts


def counts_of_layers(layers: Layers, amount: Amount, min_keep: int) -> list[int]:
    """Return the number of weights that ``layer_masks`` keeps in each layer; see ``layer_counts``."""
    sizes = layers.sizes
    if isinstance(amount, Mapping):
        counts = allocation.by_pattern(amount, layers.paths_of_layers, sizes)
    elif isinstance(amount, Keep):
        total = allocation.kept(amount, layers.size)
        return allocation.proportional(sizes, allocation.floors(min_keep, sizes, total), sizes, total)
    else:
        counts = [allocation.kept(amount, size) for size in sizes]
    return [max(pair) for pair in zip(counts, allocation.floors(min_keep, sizes, None), strict=True)]


def _erk_counts(layers: Layers, shares: list[int], total: int, min_keep: int) -> list[int]:
    floors = allocation.floors(min_keep, layers.sizes, total)
    return allocation.proportional(shares, floors, layers.sizes, total)


def _erk_shares(layers: Layers, axes: Axes) -> list[int]:
    """Return the share of each layer, with its input axes as one dimension and its output axes as another."""
    found = kernel_axes(axes, layers.tree(layers.scores))
    shapes = []
    for path, shape, number in zip(layers.paths, layers.leaf_shapes, layers.stacks, strict=True):
        roles = found[path]
        if roles is None or roles.tied:
            shapes += [shape] * number
        else:
            ends = [math.prod(shape[axis] for axis in part) for part in (roles.inputs, roles.outputs) if part]
            shapes += [(*ends, *(shape[axis] for axis in roles.spatial))] * number
    return allocation.erk_shares(shapes)


def _parameters(params: PyTree) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params) if is_float(leaf))


def _biases(params: PyTree, selected: PyTree) -> int:
    """Return the number of biases in the layers of the selected leaves, which have the same parent."""
    paths, leaves, _ = flatten(params)
    _, chosen, _ = flatten(selected)
    parents = {path.rpartition("/")[0] for path, leaf in zip(paths, chosen, strict=True) if leaf is not None}
    found = 0
    for path, leaf, selected_leaf in zip(paths, leaves, chosen, strict=True):
        parent, _, name = path.rpartition("/")
        if selected_leaf is None and is_float(leaf) and name in ("bias", "b") and parent in parents:
            found += math.prod(leaf.shape)
    return found


def _mask_leaves(params: PyTree, masks: PyTree) -> list[AnyArray | None]:
    """Return the masks in the order of the leaves of ``params``."""
    paths, _, _ = flatten(params)
    matched = match(params, masks, reference_name="params", name="masks")
    for path, mask in zip(paths, matched, strict=True):
        if mask is not None and not is_mask(mask):
            raise TypeError(f"masks has {describe(mask)} at '{path}'; it must be a bool array or None")
    return matched


def _kept_of(masks: PyTree) -> tuple[int, int]:
    """Return the number of True entries of concrete masks and the number of all entries."""
    present = jax.tree.leaves(masks)
    size = sum(mask.size for mask in present)
    if not size:
        raise ValueError("masks has no weight: every leaf is None or empty; pass the masks of at least one leaf")
    if any(isinstance(mask, jax.core.Tracer) for mask in present):
        raise ValueError("masks are traced; call this outside jit, because the exact count is a Python number")
    return uint64.number(kth_largest.count_true(present)), size
