"""Masks with a pattern that hardware or a smaller dense network can use: n:m, blocks, channels, outputs.

All have the signature of a selection (see ``jprune.pruning.selection.unstructured``) and keyword options of their
own; set those with ``functools.partial`` to pass one to ``prune``:

>>> import functools
>>> select = functools.partial(nm_masks, n=2, m=4)
"""

import math
import numbers
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from jprune.pruning.scores.elementwise import working_dtype
from jprune.pruning.selection import allocation, kth_largest, uint64
from jprune.pruning.selection.layers import Layers, choose, layers_of
from jprune.pruning.selection.uint64 import Count

PyTree = Any


def nm_masks(
    scores: PyTree,
    keep: float | None = None,
    *,
    n: int = 2,
    m: int = 4,
    axis: int = -2,
    among: PyTree = None,
    min_keep: int = 0,
) -> PyTree:
    """Keep the n largest scores of every m neighbours along an axis, such as 2:4.

    Args:
      scores: tree of float arrays, ``None`` where nothing may be pruned.
      keep: ``None``, or what the pattern keeps: n / m, or that many weights.
      n: how many of every m weights to keep.
      m: how many weights compete; it divides the axis of every layer.
      axis: along which they are neighbours; -2 is the input axis of Flax kernels (..., in, out), the axis that
        a matrix product sums over, which is what sparse tensor cores want.
      among: bool tree of the weights that may be chosen; ``None`` for all.
      min_keep: the least that every layer keeps; the pattern must keep as many.

    Returns:
      A tree like ``scores`` of bool arrays; ties within a group go to the smaller index.

    Raises:
      ValueError: n is not in 0..m, m does not divide the axis of a layer or a layer has no such axis, or
        ``keep`` or ``min_keep`` is not what the pattern gives. Also what ``global_masks`` raises.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv 2104.08378.

    >>> nm_masks(jnp.array([[3.0], [1.0], [2.0], [2.0]]), n=2, m=4)[:, 0]
    Array([ True, False,  True, False], dtype=bool)
    """
    layers = layers_of(scores, among)
    if not (m >= 1 and 0 <= n <= m):
        raise ValueError(f"n={n}, m={m}: n of every m weights are kept, so 0 <= n <= m and m >= 1")
    for path, shape in zip(layers.paths, layers.shapes, strict=True):
        if not -len(shape) <= axis < len(shape) or shape[axis] % m:
            raise ValueError(f"m={m} must divide axis {axis} of every layer; '{path}' has shape {shape}")
    counts = [size // m * n for size in layers.sizes]
    if keep is not None and allocation.kept(keep, sum(layers.sizes)) != sum(counts):
        raise ValueError(f"keep={keep!r}, but {n}:{m} keeps {sum(counts)} of {sum(layers.sizes)} weights")
    for path, count, least in zip(layers.paths, counts, allocation.floors(min_keep, layers.sizes, None), strict=True):
        if count < least:
            raise ValueError(f"min_keep={min_keep}, but {n}:{m} keeps {count} weights of '{path}'")
    return layers.tree(
        [
            _best_of_neighbours(array, alive, n, m, axis)
            for array, alive in zip(layers.scores, layers.alive, strict=True)
        ]
    )


def block_masks(
    scores: PyTree, keep: float, *, block: Sequence[int] = (4, 4), among: PyTree = None, min_keep: int = 0
) -> PyTree:
    """Keep the blocks of weights with the largest sums of scores, over the whole tree.

    Args:
      scores: tree of float arrays, ``None`` where nothing may be pruned.
      keep: a float is the fraction of the blocks, rounded half to even; an int is the number of weights, a
        multiple of the block's.
      block: its sizes along the last axes; they divide those of every layer.
      among: bool tree of the weights that may be chosen; a block with none of them is not, and what is not
        among them is not kept.
      min_keep: the least number of weights that every layer keeps, rounded up to whole blocks.

    Returns:
      A tree like ``scores`` of bool arrays.

    Raises:
      ValueError: ``block`` does not divide a layer, or ``keep`` not a block. Also what ``global_masks`` raises.

    >>> block_masks(jnp.array([[9.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]), 0.5, block=(2, 2))[0]
    Array([ True,  True, False, False], dtype=bool)
    """
    block = tuple(block)
    weights = math.prod(block)
    if not block or any(size < 1 for size in block):
        raise ValueError(f"block={block} must hold at least one size, each 1 or more")
    layers = layers_of(scores, among)
    for path, shape in zip(layers.paths, layers.shapes, strict=True):
        ends = shape[-len(block) :]
        if len(shape) < len(block) or any(size % b for size, b in zip(ends, block, strict=True)):
            raise ValueError(f"block={block} must divide the last axes of every layer; '{path}' has shape {shape}")
    number = sum(layers.sizes) // weights
    if isinstance(keep, numbers.Integral) and keep % weights:
        raise ValueError(f"keep={keep!r} weights must be a multiple of {weights}, the weights of a block of {block}")
    total = allocation.kept(keep // weights if isinstance(keep, numbers.Integral) else keep, number, of="blocks")
    inner = [tuple(range(len(shape) - len(block) + 1, len(shape) + len(block), 2)) for shape in layers.shapes]
    parts = [_in_blocks(array.astype(working_dtype(array)), block) for array in layers.scores]
    whole = layers._replace(
        scores=[part.sum(axes) for part, axes in zip(parts, inner, strict=True)],
        alive=[
            None if alive is None else _in_blocks(alive, block).any(axes)
            for alive, axes in zip(layers.alive, inner, strict=True)
        ],
    )
    chosen = choose(whole, _unit_floors(whole, min_keep, [weights] * len(whole.sizes), total), total)
    masks = [
        jnp.broadcast_to(jnp.expand_dims(mask, axes), part.shape).reshape(shape)
        for mask, axes, part, shape in zip(chosen, inner, parts, layers.shapes, strict=True)
    ]
    return layers.tree(_alive_of(masks, layers))


def channel_masks(
    scores: PyTree,
    keep: float,
    *,
    axis: int = -1,
    layerwise: bool = False,
    among: PyTree = None,
    min_keep: int = 0,
) -> PyTree:
    """Keep the whole output channels with the largest mean scores.

    Channels of different layers have different numbers of weights, so here ``keep`` counts channels.

    Args:
      scores: tree of float arrays, ``None`` where nothing may be pruned.
      keep: a float is the fraction of the channels, rounded half to even; an int is how many channels.
      axis: the axis of output channels: -1 in Flax kernels (..., in, out), 0 in (out, in, ...).
      layerwise: keep the same fraction of every layer (an int is divided among them), not the best of all.
      among: bool tree of the weights that may be chosen; a channel with none of them is not, and what is not
        among them is not kept.
      min_keep: the least number of weights that every layer keeps, rounded up to whole channels.

    Returns:
      A tree like ``scores`` of bool arrays.

    Raises:
      ValueError: a layer has no such axis. Also what ``global_masks`` raises.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710 (with |w| as the
    score, layer by layer).

    >>> channel_masks(jnp.array([[1.0, 5.0, 2.0], [1.0, 0.0, 2.0]]), keep=2)
    Array([[False,  True,  True],
           [False,  True,  True]], dtype=bool)
    """
    layers = layers_of(scores, among)
    others = [_other_axes(path, shape, axis) for path, shape in zip(layers.paths, layers.shapes, strict=True)]
    units = layers._replace(
        scores=[x.astype(working_dtype(x)).mean(axes) for x, axes in zip(layers.scores, others, strict=True)],
        alive=[None if x is None else x.any(axes) for x, axes in zip(layers.alive, others, strict=True)],
    )
    fans = [math.prod(shape[a] for a in axes) for shape, axes in zip(layers.shapes, others, strict=True)]
    each: list[int] | None
    if layerwise and not isinstance(keep, numbers.Integral):
        floors = _unit_floors(units, min_keep, fans, None) or [0] * len(fans)
        each = [
            max(allocation.kept(keep, size, of="channels"), least)
            for size, least in zip(units.sizes, floors, strict=True)
        ]
        total = None
    else:
        total = allocation.kept(keep, sum(units.sizes), of="channels")
        each = _unit_floors(units, min_keep, fans, total)
        if layerwise:
            each = allocation.proportional(units.sizes, each or [0] * len(fans), units.sizes, total)
    chosen = choose(units, each, total)
    masks = [
        jnp.broadcast_to(jnp.expand_dims(mask, axes), shape)
        for mask, axes, shape in zip(chosen, others, layers.shapes, strict=True)
    ]
    return layers.tree(_alive_of(masks, layers))


def output_masks(scores: PyTree, keep: float, *, axis: int = -1, among: PyTree = None, min_keep: int = 0) -> PyTree:
    """Keep the largest scores among the weights into each output, the same number for every output.

    Args:
      scores: tree of float arrays, ``None`` where nothing may be pruned.
      keep: a float is the fraction of the weights into each output, rounded half to even; an int is how many
        weights in all, divided among layers in proportion to their sizes and then among their outputs (the
        first ones get one more where it does not come out even).
      axis: the axis of outputs: -1 in Flax kernels (..., in, out), 0 in (out, in, ...).
      among: bool tree of the weights that may be chosen; ``None`` for all.
      min_keep: the least that every layer keeps.

    Returns:
      A tree like ``scores`` of bool arrays; ties go to the smaller index.

    Raises:
      ValueError: a layer has no such axis. Also what ``global_masks`` raises.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    arXiv 2306.11695: the comparison group of Wanda.

    >>> output_masks(jnp.array([[1.0, 5.0], [2.0, 6.0]]), keep=0.5)
    Array([[False, False],
           [ True,  True]], dtype=bool)
    """
    layers = layers_of(scores, among)
    others = [_other_axes(path, shape, axis) for path, shape in zip(layers.paths, layers.shapes, strict=True)]
    fans = [math.prod(shape[a] for a in axes) for shape, axes in zip(layers.shapes, others, strict=True)]
    outputs = [shape[axis] for shape in layers.shapes]
    if isinstance(keep, numbers.Integral):
        total = allocation.kept(keep, sum(layers.sizes))
        floors = allocation.floors(min_keep, layers.sizes, total)
        counts = allocation.proportional(layers.sizes, floors, layers.sizes, total)
    else:
        floors = allocation.floors(min_keep, layers.sizes, None)
        parts = zip(fans, outputs, floors, strict=True)
        counts = [max(allocation.kept(keep, fan) * output, least) for fan, output, least in parts]
    masks = []
    for array, alive, count, output in zip(layers.scores, layers.alive, counts, outputs, strict=True):
        each = uint64.count_of([count // output + (i < count % output) for i in range(output)])
        masks.append(_best_into_outputs(array, alive, Count(*map(jnp.asarray, each)), axis))
    return layers.tree(masks)


def _best_of_neighbours(
    scores: Float[Array, "*shape"], alive: Bool[Array, "*shape"] | None, n: int, m: int, axis: int
) -> Bool[Array, "*shape"]:
    axis %= scores.ndim
    shape = (*scores.shape[:axis], scores.shape[axis] // m, m, *scores.shape[axis + 1 :])
    keys = kth_largest.keys(scores, alive).reshape(shape)
    place = jnp.arange(m, dtype=np.int32).reshape((1,) * (axis + 1) + (m,) + (1,) * (len(shape) - axis - 2))
    rank = jnp.zeros(shape, np.int32)
    for i in range(m):
        other = jax.lax.slice_in_dim(keys, i, i + 1, axis=axis + 1)
        rank += ((other > keys) | ((other == keys) & (np.int32(i) < place))).astype(np.int32)
    mask = (rank < n).reshape(scores.shape)
    return mask if alive is None else mask & alive


def _best_into_outputs(
    scores: Float[Array, "*shape"], alive: Bool[Array, "*shape"] | None, keep: Count, axis: int
) -> Bool[Array, "*shape"]:
    rows = jnp.moveaxis(scores, axis, 0)
    among = jnp.ones_like(rows, bool) if alive is None else jnp.moveaxis(alive, axis, 0)
    masks = jax.vmap(lambda row, may, k: kth_largest.largest([row], k, [may])[0])(rows, among, keep)
    return jnp.moveaxis(masks, 0, axis)


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


def _alive_of(masks: list[Any], layers: Layers) -> list[Any]:
    return [mask if alive is None else mask & alive for mask, alive in zip(masks, layers.alive, strict=True)]
