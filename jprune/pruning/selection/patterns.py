"""Masks with a pattern that hardware or a smaller dense network can use: n:m, blocks, channels, outputs.

All have the signature of a selection (see ``jprune.pruning.selection.unstructured``) and keyword options of their
own; set those with ``functools.partial`` to pass one to ``prune``:

>>> import functools
>>> selection = functools.partial(nm_masks, n=1, m=4)
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree

from jprune.graph.axes import Axes
from jprune.pruning.amounts import Amount, Counts, Keep, Scheduled, Sparsity, amount_by_keyword, amount_of
from jprune.pruning.scores.elementwise import working_dtype
from jprune.pruning.selection import allocation, kth_largest, uint64
from jprune.pruning.selection.layers import Layers, Quota, choose, largest_along, layers_of, quota_of
from jprune.pruning.selection.uint64 import Count


@amount_by_keyword
def nm_masks(
    scores: PyTree,
    n: int = 2,
    m: int = 4,
    *,
    axis: int = -2,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> PyTree:
    """Keep the n largest scores of every m neighbors along an axis, such as 2:4.

    Args:
      scores: tree of float arrays, None where nothing is prunable.
      n: how many of every m weights to keep.
      m: how many neighboring weights form a group; it must divide the axis of every layer.
      axis: the axis along which groups run; -2 is the input axis of Flax kernels (..., in, out), which a matrix
        product sums over, as sparse tensor cores require.
      sparsity: None, or what the pattern removes: 1 - n / m.
      keep: None, or the number of weights that the pattern keeps.
      among: bool tree of the weights that may be kept; None for all.
      min_keep: minimum number of weights that every layer keeps; the pattern must keep as many.
      axes: not used.

    Returns:
      A tree like ``scores`` of bool arrays; ties within a group go to the smaller index.

    Raises:
      TypeError: n or m is not an integer.
      ValueError: n is not in 0..m, m does not divide the axis of a layer or a layer has no such axis, or
        ``sparsity``, ``keep`` or ``min_keep`` is not what the pattern gives. Also what ``global_masks`` raises.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv 2104.08378.

    >>> nm_masks(jnp.array([[3.0], [1.0], [2.0], [2.0]]), n=2, m=4)[:, 0]
    Array([ True, False,  True, False], dtype=bool)
    """
    layers = layers_of(scores, among)
    if not (m >= 1 and 0 <= n <= m):
        raise ValueError(f"n={n}, m={m}: n of every m weights are kept, so 0 <= n <= m and m >= 1")
    for path, shape in zip(layers.paths, layers.leaf_shapes, strict=True):
        if not -len(shape) <= axis < len(shape) or shape[axis] % m:
            raise ValueError(f"m={m} must divide axis {axis} of every layer; '{path}' has shape {shape}")
    counts = [size // m * n for size in layers.sizes]
    if sparsity is not None or keep is not None:
        _refuse_other_amounts(amount_of(sparsity, keep), f"{n}:{m}", sum(counts), layers.size)
    for path, count, least in zip(layers.paths, counts, allocation.floors(min_keep, layers.sizes, None), strict=True):
        if count < least:
            raise ValueError(f"min_keep={min_keep}, but {n}:{m} keeps {count} weights of '{path}'; lower min_keep")
    return layers.tree(
        [_best_of_neighbors(array, mask, n, m, axis) for array, mask in zip(layers.scores, layers.masks, strict=True)]
    )


@amount_by_keyword
def block_masks(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    block: Sequence[int] = (4, 4),
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> PyTree:
    """Keep the blocks of weights with the largest sums of scores, over the whole tree.

    Args:
      scores: tree of float arrays, None where nothing is prunable.
      sparsity: the fraction of the blocks to remove; the number kept is rounded half to even.
      keep: the number of weights to keep, a multiple of the number in a block.
      block: sizes along the last axes; they must divide those of every layer.
      among: bool tree of the weights that may be kept. Blocks without such weights are not kept, and in other
        blocks only these weights are.
      min_keep: minimum number of weights that every layer keeps, rounded up to whole blocks.
      axes: see ``global_masks``; only ``min_keep`` depends on it.

    Returns:
      A tree like ``scores`` of bool arrays.

    Raises:
      ValueError: ``block`` does not divide a layer, or ``keep`` is not a multiple of the block's weights. Also
        what ``global_masks`` raises.

    >>> block_masks(jnp.array([[9.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]), sparsity=0.5, block=(2, 2))[0]
    Array([ True,  True, False, False], dtype=bool)
    """
    block = tuple(block)
    weights = math.prod(block)
    if not block or any(size < 1 for size in block):
        raise ValueError(f"block={block} must have at least one size, each 1 or more")
    layers = layers_of(scores, among)
    for path, shape in zip(layers.paths, layers.leaf_shapes, strict=True):
        ends = shape[-len(block) :]
        if len(shape) < len(block) or any(size % b for size, b in zip(ends, block, strict=True)):
            raise ValueError(
                f"block={block} must divide the last axes of every layer; '{path}' has shape {shape}; leave the leaf "
                "out with where=jprune.by_path(exclude=...)"
            )
    inner = [tuple(range(len(shape) - len(block) + 1, len(shape) + len(block), 2)) for shape in layers.leaf_shapes]
    parts = [_in_blocks(array.astype(working_dtype(array)), block) for array in layers.scores]
    blocks = layers._replace(
        scores=[part.sum(axes_) for part, axes_ in zip(parts, inner, strict=True)],
        masks=[
            None if mask is None else _in_blocks(mask, block).any(axes_)
            for mask, axes_ in zip(layers.masks, inner, strict=True)
        ],
    )

    def quota(amount: Amount) -> Quota:
        if isinstance(amount, Keep):
            if amount.count % weights:
                raise ValueError(f"keep={amount.count} weights must be a multiple of {weights}, the size of {block}")
            amount = Keep(amount.count // weights)
        total = allocation.kept(amount, blocks.size, of="blocks")
        return Quota(_unit_floors(blocks, min_keep, [weights] * len(blocks.sizes), total), total)

    chosen = choose(blocks, quota_of(amount_of(sparsity, keep), quota))
    masks = [
        jnp.broadcast_to(jnp.expand_dims(mask, axes_), part.shape).reshape(shape)
        for mask, axes_, part, shape in zip(chosen, inner, parts, layers.leaf_shapes, strict=True)
    ]
    return layers.tree(_allowed(masks, layers))


@amount_by_keyword
def channel_masks(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    axis: int = -1,
    layerwise: bool = False,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> PyTree:
    """Keep the whole output channels with the largest mean scores.

    Args:
      scores: tree of float arrays, None where nothing is prunable.
      sparsity: the fraction of the channels to remove; the number kept is rounded half to even.
      keep: the number of weights to keep, a multiple of the number in a channel, which must be equal in all layers.
      axis: the axis of output channels: -1 in Flax kernels (..., in, out), 0 in (out, in, ...).
      layerwise: whether to remove the same fraction of every layer (a number is divided among them) instead of
        the channels with the smallest scores of all layers.
      among: bool tree of the weights that may be kept. Channels without such weights are not kept, and in other
        channels only these weights are.
      min_keep: minimum number of weights that every layer keeps, rounded up to whole channels.
      axes: not used.

    Returns:
      A tree like ``scores`` of bool arrays.

    Raises:
      ValueError: a layer has no such axis; or ``keep`` is not a number of whole channels. Also what
        ``global_masks`` raises.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710 (with |w| as the
    score, layer by layer).

    >>> channel_masks(jnp.array([[1.0, 5.0, 2.0], [1.0, 0.0, 2.0]]), keep=4)
    Array([[False,  True,  True],
           [False,  True,  True]], dtype=bool)
    """
    layers = layers_of(scores, among)
    others = [_other_axes(path, shape, axis) for path, shape in zip(layers.paths, layers.leaf_shapes, strict=True)]
    channels = layers._replace(
        scores=[x.astype(working_dtype(x)).mean(axes_) for x, axes_ in zip(layers.scores, others, strict=True)],
        masks=[None if x is None else x.any(axes_) for x, axes_ in zip(layers.masks, others, strict=True)],
    )
    fans = [math.prod(shape[a] for a in axes_) for shape, axes_ in zip(layers.leaf_shapes, others, strict=True)]

    def quota(amount: Amount) -> Quota:
        if isinstance(amount, Keep):
            amount = Keep(_whole_channels(amount.count, fans))
        elif layerwise:
            floors = _unit_floors(channels, min_keep, fans, None) or [0] * len(fans)
            sizes = zip(channels.sizes, floors, strict=True)
            return Quota([max(allocation.kept(amount, size, of="channels"), least) for size, least in sizes], None)
        total = allocation.kept(amount, channels.size, of="channels")
        each = _unit_floors(channels, min_keep, fans, total)
        if layerwise:
            each = allocation.proportional(channels.sizes, each or [0] * len(fans), channels.sizes, total)
        return Quota(each, total)

    chosen = choose(channels, quota_of(amount_of(sparsity, keep), quota))
    masks = [
        jnp.broadcast_to(jnp.expand_dims(mask, axes_), shape)
        for mask, axes_, shape in zip(chosen, others, layers.leaf_shapes, strict=True)
    ]
    return layers.tree(_allowed(masks, layers))


@amount_by_keyword
def output_masks(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    axis: int = -1,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> PyTree:
    """Keep the largest scores among the weights into each output, the same number for every output.

    Args:
      scores: tree of float arrays, None where nothing is prunable.
      sparsity: the fraction of the weights into each output to remove; the number kept is rounded half to even.
      keep: the number of weights to keep, divided among layers in proportion to their sizes and then among their
        outputs (the first outputs keep one more where it does not divide evenly).
      axis: the axis of outputs: -1 in Flax kernels (..., in, out), 0 in (out, in, ...).
      among: bool tree of the weights that may be kept; None for all.
      min_keep: minimum number of weights that every layer keeps.
      axes: not used.

    Returns:
      A tree like ``scores`` of bool arrays; ties go to the smaller index.

    Raises:
      ValueError: a layer has no such axis. Also what ``global_masks`` raises.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    arXiv 2306.11695: the comparison group of Wanda.

    >>> output_masks(jnp.array([[1.0, 5.0], [2.0, 6.0]]), sparsity=0.5)
    Array([[False, False],
           [ True,  True]], dtype=bool)
    """
    layers = layers_of(scores, among)
    others = [_other_axes(path, shape, axis) for path, shape in zip(layers.paths, layers.leaf_shapes, strict=True)]
    fans = [math.prod(shape[a] for a in axes_) for shape, axes_ in zip(layers.leaf_shapes, others, strict=True)]
    outputs = [shape[axis] for shape in layers.leaf_shapes]

    def quota(amount: Amount) -> Quota:
        if isinstance(amount, Keep):
            total = allocation.kept(amount, layers.size)
            floors = allocation.floors(min_keep, layers.sizes, total)
            counts = allocation.proportional(layers.sizes, floors, layers.sizes, total)
        else:
            floors = allocation.floors(min_keep, layers.sizes, None)
            parts = zip(fans, outputs, floors, strict=True)
            counts = [max(allocation.kept(amount, fan) * output, least) for fan, output, least in parts]
        return Quota([n for pair in zip(counts, outputs, strict=True) for n in _evenly(*pair)], None)

    each = quota_of(amount_of(sparsity, keep), quota).each
    limbs = each if isinstance(each, Count) else uint64.count_of(each or [])
    starts = np.cumsum([0, *outputs])
    masks = []
    for i, (array, mask) in enumerate(zip(layers.scores, layers.masks, strict=True)):
        own = Count(*(jnp.asarray(limb)[starts[i] : starts[i + 1]] for limb in limbs))
        masks.append(largest_along(array, mask, own, (axis % array.ndim,)))
    return layers.tree(masks)


def _best_of_neighbors(
    scores: Float[Array, "*shape"], mask: Bool[Array, "*shape"] | None, n: int, m: int, axis: int
) -> Bool[Array, "*shape"]:
    axis %= scores.ndim
    shape = (*scores.shape[:axis], scores.shape[axis] // m, m, *scores.shape[axis + 1 :])
    keys = kth_largest.keys(scores, mask).reshape(shape)
    place = jnp.arange(m, dtype=np.int32).reshape((1,) * (axis + 1) + (m,) + (1,) * (len(shape) - axis - 2))
    rank = jnp.zeros(shape, np.int32)
    for i in range(m):
        other = jax.lax.slice_in_dim(keys, i, i + 1, axis=axis + 1)
        rank += ((other > keys) | ((other == keys) & (np.int32(i) < place))).astype(np.int32)
    kept = (rank < n).reshape(scores.shape)
    return kept if mask is None else kept & mask


def _in_blocks(array: Any, block: tuple[int, ...]) -> Any:
    """(..., d_1, d_2) -> (..., d_1 / b_1, b_1, d_2 / b_2, b_2)."""
    lead = array.ndim - len(block)
    split = [part for size, b in zip(array.shape[lead:], block, strict=True) for part in (size // b, b)]
    return array.reshape((*array.shape[:lead], *split))


def _unit_floors(units: Layers, min_keep: int, weights: Sequence[int], total: int | None) -> list[int] | None:
    """``min_keep`` weights of every layer in blocks or channels, rounded up."""
    if not min_keep:
        return None
    allocation.floors(min_keep, units.sizes, None)
    floors = [min(-(-min_keep // w), size) for w, size in zip(weights, units.sizes, strict=True)]
    if total is not None and sum(floors) > total:
        raise ValueError(f"min_keep={min_keep} needs {sum(floors)} blocks or channels; keep gives {total}")
    return floors


def _other_axes(path: str, shape: tuple[int, ...], axis: int) -> tuple[int, ...]:
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis={axis}, but '{path}' has shape {shape}")
    return tuple(a for a in range(len(shape)) if a != axis % len(shape))


def _allowed(masks: list[Any], layers: Layers) -> list[Any]:
    """The masks without the weights that may not be kept."""
    return [mask if own is None else mask & own for mask, own in zip(masks, layers.masks, strict=True)]


def _evenly(total: int, parts: int) -> list[int]:
    """Divide a number into whole parts, the first ones one larger where it does not divide evenly."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _whole_channels(keep: int, fans: Sequence[int]) -> int:
    """The number of channels that have so many weights."""
    sizes = sorted(set(fans))
    if len(sizes) > 1:
        raise ValueError(
            f"keep={keep} counts weights, and the channels of these layers have {sizes} weights each; give sparsity=, "
            "the fraction of the channels to remove"
        )
    if keep % sizes[0]:
        raise ValueError(f"keep={keep} weights must be a multiple of {sizes[0]}, the number of weights of a channel")
    return keep // sizes[0]


def _refuse_other_amounts(amount: Amount, pattern: str, kept: int, size: int) -> None:
    """Refuse an amount that is not what a pattern keeps."""
    amounts = amount.amounts if isinstance(amount, Scheduled) else (amount,)
    if isinstance(amount, Scheduled) and any(amount.dropped):
        raise ValueError(f"{pattern} masks keep a fixed number of every group and cannot be used with regrow")
    for each in amounts:
        asked = allocation.kept(each, size)
        if asked != kept:
            named = f"keep={each.count}" if isinstance(each, Keep) else f"sparsity={each}"
            raise ValueError(
                f"{named} keeps {asked} of {size} weights, but {pattern} keeps {kept}; give sparsity={1 - kept / size}"
            )
