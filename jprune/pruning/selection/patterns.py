"""Selections with a pattern that hardware or a smaller dense network can use: n:m, blocks, channels, outputs.

All have the signature of a selection (see ``jprune.pruning.selection.unstructured``) and further keyword arguments,
which ``functools.partial`` sets for ``prune``:

>>> import functools
>>> selection = functools.partial(nm_masks, n=1, m=4)

The patterns depend on the roles of a leaf's axes, given by ``axes`` (see ``jprune.graph.axes``): a graph made by
``jprune.trace_model``, ``{regex: KernelAxes(...)}``, "flax" or "equinox". Without it 2-D kernels and the usual 2-D
convolutions follow their library's convention. A leaf whose axes are unknown, or that is read in two ways (tied
weights), is an error that names it.
"""

import math
import re
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, PyTree, Shaped

from jprune.graph.axes import Axes, KernelAxes, kernel_axes, unknown_axes
from jprune.pruning.amounts import (
    Amount,
    Counts,
    Keep,
    Scheduled,
    Sparsity,
    amount_by_keyword,
    amount_of,
    integer,
    renamed_arguments,
)
from jprune.pruning.scores.elementwise import working_dtype
from jprune.pruning.selection import allocation, kth_largest, uint64
from jprune.pruning.selection.explicit_axes import automatic_axes
from jprune.pruning.selection.layers import Layers, Quota, choose, largest_along, layers_of, quota_of, warn_of_collapse
from jprune.pruning.selection.uint64 import Count

_AXES = "axes=, such as axes='equinox' or {'': jprune.KernelAxes(outputs=(0,), inputs=(1,))}"


@renamed_arguments(axis=_AXES)
@amount_by_keyword
@automatic_axes
def nm_masks(
    scores: PyTree,
    n: int = 2,
    m: int = 4,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> PyTree:
    """Keep the n largest scores of every m neighboring inputs of an output, such as 2:4.

    Groups run along the axes that the layer sums over (for a convolution along its input features), as sparse tensor
    cores require. Several input axes (heads and head_dim of an attention output) are flattened in row-major order.

    Args:
      scores: tree of float arrays, None where nothing is prunable.
      n: number of weights to keep in every group of m.
      m: number of neighboring weights in a group; it must divide the number of inputs of every layer.
      sparsity: None, or the fraction that the pattern removes: 1 - n / m.
      keep: None, or the number of weights that the pattern keeps.
      among: bool tree of the weights that may be kept; None for all.
      min_keep: minimum number of weights that every layer keeps; an error if the pattern keeps fewer.
      axes: roles of the axes of each leaf: a graph, ``{regex: KernelAxes(...)}``, ``"flax"`` or ``"equinox"``.

    Returns:
      A tree like ``scores`` of bool arrays; ties within a group go to the smaller index.

    Raises:
      TypeError: n or m is not an integer.
      ValueError: n is not in 0..m, m does not divide the inputs of a layer, the axes of a leaf are unknown, or
        ``sparsity``, ``keep`` or ``min_keep`` does not fit the pattern; also as ``global_masks``.

    Source: Mishra et al., "Accelerating Sparse Deep Neural Networks", 2021, arXiv 2104.08378.

    >>> nm_masks(jnp.array([[3.0], [1.0], [2.0], [2.0]]), n=2, m=4)[:, 0]
    Array([ True, False,  True, False], dtype=bool)
    """
    n, m = integer("n", n, least=0), integer("m", m, least=1)
    if n > m:
        raise ValueError(f"n={n}, m={m}: n of every m weights are kept, so 0 <= n <= m and m >= 1")
    layers, restore = _arranged(layers_of(scores, among), axes, f"{n}:{m} groups run along its inputs")
    for path, array in zip(layers.paths, layers.scores, strict=True):
        if array.shape[-2] % m:
            raise ValueError(
                f"m={m} must divide the inputs of every layer; leaf '{path}' of shape {restore.shapes[path]} has "
                f"{array.shape[-2]}; {_leave_out(path)}"
            )
    counts = [size // m * n for size in layers.sizes]
    if sparsity is not None or keep is not None:
        _refuse_other_amounts(amount_of(sparsity, keep), f"{n}:{m}", sum(counts), layers.size)
    for name, count, least in zip(layers.names, counts, allocation.floors(min_keep, layers.sizes, None), strict=True):
        if count < least:
            raise ValueError(f"min_keep={min_keep}, but {n}:{m} keeps {count} weights of '{name}'; lower min_keep")
    masks = [_best_of_neighbors(array, mask, n, m) for array, mask in zip(layers.scores, layers.masks, strict=True)]
    return layers.tree(restore(masks))


@amount_by_keyword
@automatic_axes
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
      block: size of a block (inputs, outputs), which must divide the inputs and outputs of every layer; several input
        axes, and several output axes, are flattened in row-major order.
      among: bool tree of the weights that may be kept. Blocks without such weights are not kept, and in other
        blocks only these weights are.
      min_keep: minimum number of weights that every layer keeps, rounded up to whole blocks.
      axes: roles of the axes of each leaf: a graph, ``{regex: KernelAxes(...)}``, ``"flax"`` or ``"equinox"``.

    Returns:
      A tree like ``scores`` of bool arrays.

    Raises:
      TypeError: a size of ``block`` is not an integer; also as ``global_masks``.
      ValueError: ``block`` is not a pair of positive numbers or does not divide a layer, the axes of a leaf are
        unknown, or ``keep`` is not a multiple of the number of weights in a block; also as ``global_masks``.

    >>> block_masks(jnp.array([[9.0, 0.0, 1.0, 1.0], [0.0, 0.0, 1.0, 1.0]]), sparsity=0.5, block=(2, 2))[0]
    Array([ True,  True, False, False], dtype=bool)
    """
    if not isinstance(block, Sequence) or len(block) != 2:
        raise ValueError(f"block={block!r} must have two sizes, (inputs, outputs), such as (4, 4)")
    block = tuple(integer(f"block[{i}]", size, least=1) for i, size in enumerate(block))
    weights = math.prod(block)
    layers, restore = _arranged(layers_of(scores, among), axes, "blocks run along its inputs and outputs")
    for path, shape in zip(layers.paths, layers.leaf_shapes, strict=True):
        if any(size % b for size, b in zip(shape[-2:], block, strict=True)):
            raise ValueError(
                f"block={block} must divide the inputs and outputs of every layer; leaf '{path}' of shape "
                f"{restore.shapes[path]} has {shape[-2]} inputs and {shape[-1]} outputs; {_leave_out(path)}"
            )
    parts = [_in_blocks(array.astype(working_dtype(array)), block) for array in layers.scores]
    blocks = layers._replace(
        scores=[part.sum((-3, -1)) for part in parts],
        masks=[None if mask is None else _in_blocks(mask, block).any((-3, -1)) for mask in layers.masks],
    )

    def quota(amount: Amount) -> Quota:
        if isinstance(amount, Keep):
            count = allocation.kept(amount, layers.size)
            if count % weights:
                raise ValueError(f"keep={count} weights must be a multiple of {weights}, the size of {block}")
            amount = Keep(count // weights)
        total = allocation.kept(amount, blocks.size, of="blocks")
        return Quota(_unit_floors(blocks, min_keep, [weights] * len(blocks.sizes), total), total)

    chosen = choose(blocks, quota_of(amount_of(sparsity, keep), quota))
    masks = [
        jnp.broadcast_to(jnp.expand_dims(mask, (-3, -1)), part.shape).reshape(shape)
        for mask, part, shape in zip(chosen, parts, layers.leaf_shapes, strict=True)
    ]
    return _restored(layers, restore, _allowed(masks, layers), amount_of(sparsity, keep))


@renamed_arguments(axis=_AXES)
@amount_by_keyword
@automatic_axes
def channel_masks(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    layerwise: bool = False,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> PyTree:
    """Keep the whole output channels with the largest mean scores.

    A channel is one output of one layer; each stacked layer has its own channels.

    Args:
      scores: tree of float arrays, None where nothing is prunable.
      sparsity: the fraction of the channels to remove; the number kept is rounded half to even.
      keep: the number of weights to keep, a multiple of the number in a channel, which must be equal in all layers.
      layerwise: whether to remove the same fraction of every layer (``keep`` is divided among them) instead of the
        channels with the smallest scores over all layers.
      among: bool tree of the weights that may be kept. Channels without such weights are not kept, and in other
        channels only these weights are.
      min_keep: minimum number of weights that every layer keeps, rounded up to whole channels.
      axes: roles of the axes of each leaf: a graph, ``{regex: KernelAxes(...)}``, ``"flax"`` or ``"equinox"``.

    Returns:
      A tree like ``scores`` of bool arrays.

    Raises:
      ValueError: the axes of a leaf are unknown, or ``keep`` does not fill whole channels; also as ``global_masks``.

    Source: Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017, arXiv 1608.08710 (with |w| as the
    score, layer by layer).

    >>> channel_masks(jnp.array([[1.0, 5.0, 2.0], [1.0, 0.0, 2.0]]), keep=4)
    Array([[False,  True,  True],
           [False,  True,  True]], dtype=bool)
    """
    layers, restore = _arranged(layers_of(scores, among), axes, "channels are its outputs")
    summed = [_summed(array, stacked) for array, stacked in zip(layers.scores, layers.stacked, strict=True)]
    channels = layers._replace(
        scores=[x.astype(working_dtype(x)).mean(reduced) for x, reduced in zip(layers.scores, summed, strict=True)],
        masks=[None if x is None else x.any(reduced) for x, reduced in zip(layers.masks, summed, strict=True)],
    )
    fans = [math.prod(shape[:-1]) for shape in layers.shapes]

    def quota(amount: Amount) -> Quota:
        if isinstance(amount, Keep):
            amount = Keep(_whole_channels(allocation.kept(amount, layers.size), fans))
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
        jnp.broadcast_to(jnp.expand_dims(mask, reduced), shape)
        for mask, reduced, shape in zip(chosen, summed, layers.leaf_shapes, strict=True)
    ]
    return _restored(layers, restore, _allowed(masks, layers), amount_of(sparsity, keep))


@renamed_arguments(axis=_AXES)
@amount_by_keyword
@automatic_axes
def output_masks(
    scores: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    among: PyTree = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> PyTree:
    """Keep the largest scores among the weights into each output, the same number for every output of a layer.

    Args:
      scores: tree of float arrays, None where nothing is prunable.
      sparsity: the fraction of the weights into each output to remove; the number kept is rounded half to even.
      keep: the number of weights to keep, divided among layers in proportion to their sizes and then among their
        outputs (the first outputs keep one more where it does not divide evenly).
      among: bool tree of the weights that may be kept; None for all.
      min_keep: minimum number of weights that every layer keeps.
      axes: roles of the axes of each leaf: a graph, ``{regex: KernelAxes(...)}``, ``"flax"`` or ``"equinox"``.

    Returns:
      A tree like ``scores`` of bool arrays; ties go to the smaller index.

    Raises:
      ValueError: the axes of a leaf are unknown; also as ``global_masks``.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    arXiv 2306.11695: the comparison group of Wanda.

    >>> output_masks(jnp.array([[1.0, 5.0], [2.0, 6.0]]), sparsity=0.5)
    Array([[False, False],
           [ True,  True]], dtype=bool)
    """
    layers, restore = _arranged(layers_of(scores, among), axes, "weights into one output are compared")
    fans = [math.prod(shape[:-1]) for shape in layers.shapes]
    outputs = [shape[-1] for shape in layers.shapes]

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
    rows = [
        math.prod(shape[axis] for axis in (*stacked, -1))
        for shape, stacked in zip(layers.leaf_shapes, layers.stacked, strict=True)
    ]
    starts = np.cumsum([0, *rows])
    masks = []
    for i, (array, mask, stacked) in enumerate(zip(layers.scores, layers.masks, layers.stacked, strict=True)):
        counts = Count(*(jnp.asarray(limb)[starts[i] : starts[i + 1]] for limb in limbs))
        masks.append(largest_along(array, mask, counts, (*stacked, array.ndim - 1)))
    return _restored(layers, restore, masks, amount_of(sparsity, keep))


class _Restore:
    """Convert arranged arrays back to the axes of their leaves."""

    def __init__(self, paths: Sequence[str], shapes: Sequence[tuple[int, ...]], axes: Sequence[KernelAxes]):
        self.shapes = dict(zip(paths, shapes, strict=True))
        self._orders = [(*roles.stacked, *roles.spatial, *roles.inputs, *roles.outputs) for roles in axes]

    def __call__(self, arrays: Sequence[Array]) -> list[Array]:
        """Convert arrays of the arranged shapes to the leaves' shapes."""
        return [
            array.reshape([shape[axis] for axis in order]).transpose(np.argsort(order))
            for array, shape, order in zip(arrays, self.shapes.values(), self._orders, strict=True)
        ]


def _arranged(layers: Layers, axes: Axes, why: str) -> tuple[Layers, _Restore]:
    """Arrange arrays as (*stacked, *spatial, inputs, outputs); return the layers and the inverse.

    Raises:
      ValueError: the axes of a leaf are unknown, or it is read in two ways; the message contains ``why``.
    """
    found = kernel_axes(axes, layers.tree(layers.scores))
    roles = [
        _known(found[path], path, shape, why, axes)
        for path, shape in zip(layers.paths, layers.leaf_shapes, strict=True)
    ]

    def arrange(array: Shaped[Array, "..."], leaf_roles: KernelAxes) -> Shaped[Array, "..."]:
        sizes = [array.shape[axis] for axis in (*leaf_roles.stacked, *leaf_roles.spatial)]
        ends = [math.prod(array.shape[axis] for axis in part) for part in (leaf_roles.inputs, leaf_roles.outputs)]
        return array.transpose(
            (*leaf_roles.stacked, *leaf_roles.spatial, *leaf_roles.inputs, *leaf_roles.outputs)
        ).reshape((*sizes, *ends))

    arranged = layers._replace(
        scores=[arrange(array, leaf_roles) for array, leaf_roles in zip(layers.scores, roles, strict=True)],
        masks=[
            None if mask is None else arrange(mask, leaf_roles)
            for mask, leaf_roles in zip(layers.masks, roles, strict=True)
        ],
        stacked=[tuple(range(len(leaf_roles.stacked))) for leaf_roles in roles],
    )
    return arranged, _Restore(layers.paths, layers.leaf_shapes, roles)


def _known(roles: KernelAxes | None, path: str, shape: tuple[int, ...], why: str, axes: Axes) -> KernelAxes:
    if roles is None:
        raise ValueError(unknown_axes(path, shape, why, axes))
    if roles.tied:
        raise ValueError(
            f"leaf '{path}' of shape {shape} is read in two ways (axes={roles}): {why}, which differ; "
            f"{_leave_out(path)}"
        )
    return roles


def _leave_out(path: str) -> str:
    return f"leave it out with where=jprune.by_path(exclude={f'^{re.escape(path)}$'!r})"


def _summed(array: Shaped[Array, "..."], stacked: tuple[int, ...]) -> tuple[int, ...]:
    """Return the axes of an arranged array over the weights into an output."""
    return tuple(range(len(stacked), array.ndim - 1))


def _best_of_neighbors(
    scores: Float[Array, "*lead inputs outputs"], mask: Bool[Array, "*lead inputs outputs"] | None, n: int, m: int
) -> Bool[Array, "*lead inputs outputs"]:
    shape = (*scores.shape[:-2], scores.shape[-2] // m, m, scores.shape[-1])
    keys = kth_largest.keys(scores, mask).reshape(shape)
    place = jnp.arange(m, dtype=np.int32).reshape((1,) * (len(shape) - 2) + (m, 1))
    rank = jnp.zeros(shape, np.int32)
    for i in range(m):
        other = jax.lax.slice_in_dim(keys, i, i + 1, axis=-2)
        rank += ((other > keys) | ((other == keys) & (np.int32(i) < place))).astype(np.int32)
    kept = (rank < n).reshape(scores.shape)
    return kept if mask is None else kept & mask


def _in_blocks(array: Shaped[Array, "*lead inputs outputs"], block: tuple[int, ...]) -> Shaped[Array, "..."]:
    """Reshape (..., inputs, outputs) to (..., inputs / b_1, b_1, outputs / b_2, b_2)."""
    (inputs, outputs), (b1, b2) = array.shape[-2:], block
    return array.reshape((*array.shape[:-2], inputs // b1, b1, outputs // b2, b2))


def _unit_floors(units: Layers, min_keep: int, weights: Sequence[int], total: int | None) -> list[int] | None:
    """Convert ``min_keep`` weights per layer to blocks or channels, rounded up."""
    if not min_keep:
        return None
    allocation.floors(min_keep, units.sizes, None)
    floors = [min(-(-min_keep // max(w, 1)), size) for w, size in zip(weights, units.sizes, strict=True)]
    if total is not None and sum(floors) > total:
        raise ValueError(
            f"min_keep={min_keep} needs {sum(floors)} blocks or channels, and only {total} are kept; lower min_keep or "
            "keep more"
        )
    return floors


def _restored(layers: Layers, restore: _Restore, masks: list[Array], amount: Amount) -> PyTree:
    """Return the masks as a tree like the scores, and warn outside jit about layers that keep no weight."""
    warn_of_collapse(layers, masks, amount, stacklevel=6)
    return layers.tree(restore(masks))


def _allowed(masks: list[Array], layers: Layers) -> list[Array]:
    """Return the masks without the weights that must not be kept."""
    return [mask if allowed is None else mask & allowed for mask, allowed in zip(masks, layers.masks, strict=True)]


def _evenly(total: int, parts: int) -> list[int]:
    """Divide a number into integer parts; the first ones are larger by one if it does not divide evenly."""
    return [total // parts + (i < total % parts) for i in range(parts)]


def _whole_channels(keep: int, fans: Sequence[int]) -> int:
    """Return the number of channels that ``keep`` weights fill."""
    sizes = sorted(set(fans))
    if len(sizes) > 1:
        raise ValueError(
            f"keep={keep} counts weights, and the channels of these layers have {sizes} weights each; pass sparsity=, "
            "the fraction of the channels to remove"
        )
    if keep % sizes[0]:
        raise ValueError(f"keep={keep} weights must be a multiple of {sizes[0]}, the number of weights of a channel")
    return keep // sizes[0]


def _refuse_other_amounts(amount: Amount, pattern: str, kept: int, size: int) -> None:
    """Raise if an amount differs from the number that a pattern keeps."""
    amounts = amount.amounts if isinstance(amount, Scheduled) else (amount,)
    if isinstance(amount, Scheduled) and any(amount.dropped):
        raise ValueError(
            f"{pattern} masks keep a fixed number of every group and cannot be used with regrow; leave regrow= out"
        )
    for each in amounts:
        asked = allocation.kept(each, size)
        if asked != kept:
            named = f"keep={each.count}" if isinstance(each, Keep) else f"sparsity={each}"
            raise ValueError(
                f"{named} keeps {asked} of {size} weights, but {pattern} keeps {kept}; pass "
                f"sparsity={1 - kept / size}, in a schedule as its only sparsity above 0.0: {{step: {1 - kept / size}}}"
            )
