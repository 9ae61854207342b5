"""Check and flatten a tree of scores into layers, and select the largest scores.

A layer is a leaf of the tree or, if ``axes=`` says that the leaf stacks several layers (``scan`` or ``vmap`` over
layers, experts), one slice of it.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, ArrayLike, Bool, Float, Int, PyTree

from jprune.graph.axes import Axes, KernelAxes, kernel_axes, unknown_axes
from jprune.pruning.amounts import Amount, Keep, Scheduled, exact_name, part_of
from jprune.pruning.selection import kth_largest, uint64
from jprune.pruning.selection.explicit_axes import with_automatic_axes
from jprune.pruning.selection.uint64 import Count
from jprune.trees import Leaf, flatten, hint_of_injecting, is_float, match


class Quota(NamedTuple):
    """The numbers of scores to keep.

    Attributes:
      each: the number of its largest scores that every layer keeps, or None.
      total: the total number, filled up with the largest of the other scores; None to add none.
    """

    each: Sequence[int] | Count | None
    total: int | Count | None


class Layers(NamedTuple):
    """The leaves of a tree of scores that are not None.

    Attributes:
      paths: paths of the leaves.
      scores: float arrays; with ``shapes_only`` of ``layers_of`` they may be shapes.
      masks: bool arrays of the weights that may be kept, or None for all of a leaf.
      stacked: for each leaf the axes over separate layers.
      slots: positions of the leaves among all leaves of the tree.
      treedef: structure of the tree, with None as a leaf.
      magnitude: whether scores are ranked by absolute value.
    """

    paths: list[str]
    scores: list[Array]
    masks: list[Array | None]
    stacked: list[tuple[int, ...]]
    slots: list[int]
    treedef: jax.tree_util.PyTreeDef
    magnitude: bool = False

    @property
    def leaf_shapes(self) -> list[tuple[int, ...]]:
        """The shape of each leaf."""
        return [tuple(array.shape) for array in self.scores]

    @property
    def stacks(self) -> list[int]:
        """The number of layers in each leaf."""
        return [
            math.prod(shape[axis] for axis in stacked)
            for shape, stacked in zip(self.leaf_shapes, self.stacked, strict=True)
        ]

    @property
    def names(self) -> list[str]:
        """The path of each layer; stacked layers have their index: 'blocks/kernel[2]'."""
        return [
            path + "".join(f"[{i}]" for i in index)
            for path, shape, stacked in zip(self.paths, self.leaf_shapes, self.stacked, strict=True)
            for index in np.ndindex(*(shape[axis] for axis in stacked))
        ]

    @property
    def paths_of_layers(self) -> list[str]:
        """The path of the leaf of each layer."""
        return [path for path, number in zip(self.paths, self.stacks, strict=True) for _ in range(number)]

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        """The shape of each layer."""
        return [
            tuple(size for axis, size in enumerate(shape) if axis not in stacked)
            for shape, stacked, number in zip(self.leaf_shapes, self.stacked, self.stacks, strict=True)
            for _ in range(number)
        ]

    @property
    def sizes(self) -> list[int]:
        """The number of weights of each layer."""
        return [math.prod(shape) for shape in self.shapes]

    @property
    def size(self) -> int:
        """The number of weights of all layers."""
        return sum(math.prod(shape) for shape in self.leaf_shapes)

    def tree(self, arrays: Sequence[Array | jax.ShapeDtypeStruct]) -> PyTree:
        """Put one array for each leaf back into the tree."""
        leaves: list[PyTree] = [None] * self.treedef.num_leaves
        for slot, array in zip(self.slots, arrays, strict=True):
            leaves[slot] = array
        return jax.tree.unflatten(self.treedef, leaves)


def layers_of(
    scores: PyTree,
    among: PyTree = None,
    axes: Axes = None,
    *,
    per_layer: str | None = None,
    shapes_only: bool = False,
    magnitude: bool = False,
) -> Layers:
    """Flatten and check a tree of scores, and ``among`` with it.

    Args:
      scores: tree of float arrays, None where nothing is prunable.
      among: bool tree of the weights that may be kept; None for all.
      axes: roles of the axes, see ``jprune.graph.axes``; stacked axes are over layers.
      per_layer: the function that treats layers separately, for the warning about leaves whose axes are unknown; None
        if leaves need not be divided into layers.
      shapes_only: whether the arrays may be shapes; their values are not checked.
      magnitude: whether to rank by absolute value.

    Raises:
      TypeError: a score is not a float array, or a leaf of ``among`` is not a bool array.
      ValueError: there is no layer, the trees do not match, or (outside jit) a score that may be kept is NaN.
    """
    paths, leaves, treedef = flatten(scores)
    slots = [i for i, leaf in enumerate(leaves) if leaf is not None]
    if not slots:
        raise ValueError("scores has nothing to prune: every leaf is None; check where=")
    for i in slots:
        if not is_float(leaves[i]):
            raise TypeError(
                f"scores has {describe(leaves[i])} at '{paths[i]}'; a score must be a float array, or None for a "
                f"leaf that is not pruned{hint_of_injecting(leaves[i])}"
            )
    masks = [None] * len(leaves) if among is None else match(scores, among, reference_name="scores", name="among")
    for i in slots:
        if masks[i] is not None and not is_mask(masks[i]):
            raise TypeError(f"among has {describe(masks[i])} at '{paths[i]}'; it must be a bool array or None")
    stacked: list[tuple[int, ...]] = [()] * len(leaves)
    if per_layer is not None or axes is not None:
        roles = kernel_axes(axes, scores)
        stacked = [
            () if leaf is None else _stacked(path, leaf, roles[path], per_layer, axes)
            for path, leaf in zip(paths, leaves, strict=True)
        ]
    layers = Layers(
        [paths[i] for i in slots],
        [leaves[i] for i in slots],
        [masks[i] for i in slots],
        [stacked[i] for i in slots],
        slots,
        treedef,
        magnitude,
    )
    if shapes_only:
        return layers
    layers = layers._replace(
        scores=[jnp.asarray(array) for array in layers.scores],
        masks=[None if array is None else jnp.asarray(array) for array in layers.masks],
    )
    if not any(isinstance(array, jax.core.Tracer) for array in [*layers.scores, *layers.masks]):
        with jax.ensure_compile_time_eval():  # scores may be constants of a traced program
            refuse_nan(layers.paths, any_nan(layers.scores, layers.masks))
    return layers


@jax.jit
def any_nan(scores: list[Array], masks: list[Array | None]) -> list[Bool[Array, ""]]:
    """Whether each array has NaN at a weight that may be kept."""
    return [
        jnp.any(jnp.isnan(array) if mask is None else jnp.isnan(array) & mask)
        for array, mask in zip(scores, masks, strict=True)
    ]


def refuse_nan(paths: Sequence[str], nan: Sequence[Bool[Array, ""]]) -> None:
    """Raise if a leaf has NaN scores; ``nan`` is what ``any_nan`` returned for each, outside jit."""
    for path, found in zip(paths, jax.device_get(nan), strict=True):
        if found:
            raise ValueError(f"scores has NaN at '{path}', which cannot be ranked; check the score's inputs")


def scalar(count: Count) -> Count:
    """Return a count for all layers together, given as an array.

    Raises:
      ValueError: it is an array of several counts.
    """
    if count.low.ndim:
        raise ValueError(
            f"keep is an array of shape {count.low.shape}; this selection keeps one number of weights in all layers "
            "together: pass a scalar, or use layer_masks with one count for each layer"
        )
    return count


def quota_of(amount: Amount, quota: Callable[[Amount], Quota]) -> Quota:
    """Return the quota of an amount; for a schedule, look up the quota of the due entry in a table.

    Args:
      amount: the amount to prune.
      quota: returns the quota of one amount, in Python integers or limbs.
    """
    if not isinstance(amount, Scheduled):
        return quota(amount)
    # An amount may be that of hundreds of entries, and a quota in exact arithmetic takes milliseconds.
    known = {exact_name(each): each for each in amount.amounts}
    whole = {name: quota(each) for name, each in known.items()}
    quotas = [_less(whole[exact_name(each)], part) for each, part in zip(amount.amounts, amount.dropped, strict=True)]
    return Quota(
        _entry([quota.each for quota in quotas], amount.index), _entry([quota.total for quota in quotas], amount.index)
    )


def choose(layers: Layers, quota: Quota) -> list[Bool[Array, "..."]]:
    """Mark the largest scores of every layer, then the largest of the others, up to the total.

    Returns:
      One bool array for each leaf.
    """
    chosen = None if quota.each is None else _largest_of_each(layers, _count(quota.each))
    if quota.total is None:
        return chosen or []
    if chosen is None:
        return kth_largest.largest(layers.scores, _count(quota.total), layers.masks, magnitude=layers.magnitude)
    left = [~first if mask is None else mask & ~first for first, mask in zip(chosen, layers.masks, strict=True)]
    rest = uint64.subtract_or_zero(_count(quota.total), kth_largest.count_true(chosen))
    more = kth_largest.largest(layers.scores, rest, left, magnitude=layers.magnitude)
    return [first | second for first, second in zip(chosen, more, strict=True)]


def warn_of_collapse(layers: Layers, kept: Sequence[Array], amount: Amount, *, stacklevel: int = 4) -> None:
    """Warn, outside jit, about layers that keep no weight although not everything is removed.

    Args:
      layers: the layers that were selected from; layers that were already empty are not named again.
      kept: one bool array for each leaf.
      amount: the amount pruned.
      stacklevel: argument of ``warnings.warn``, so that the warning names the caller's line.
    """
    if any(isinstance(mask, jax.core.Tracer) for mask in [*kept, *layers.masks]) or amount in (1.0, Keep(0)):
        return
    names = empty_layers(layers, kept)
    if names and any(mask is not None for mask in layers.masks):
        possible = [
            jnp.ones(array.shape, bool) if mask is None else mask
            for array, mask in zip(layers.scores, layers.masks, strict=True)
        ]
        before = set(empty_layers(layers, possible))
        names = [name for name in names if name not in before]
    if names:
        warnings.warn(nothing_left(names), stacklevel=stacklevel)


def warn_of_counts(layers: Layers, counts: Sequence[int], amount: Amount) -> None:
    """Warn, while tracing, about layers that keep no weight although the amount does not remove everything."""
    if not any(isinstance(array, jax.core.Tracer) for array in layers.scores) or amount in (1.0, Keep(0)):
        return
    names = [name for name, size, count in zip(layers.names, layers.sizes, counts, strict=True) if size and not count]
    if names:
        warnings.warn(nothing_left(names), stacklevel=5)


def nothing_left(names: Sequence[str]) -> str:
    """Return the message about layers that keep no weight.

    >>> nothing_left(["a/kernel", "blocks/kernel[2]"])
    "no weight is kept in 'a/kernel', 'blocks/kernel[2]'; keep more, or pass min_keep=1 to keep a weight in every layer"
    """
    named = [repr(name) if name else "the parameters" for name in names[:8]]  # a single array has no path
    shown = ", ".join(named) + (f" and {len(names) - 8} more layers" if len(names) > 8 else "")
    return f"no weight is kept in {shown}; keep more, or pass min_keep=1 to keep a weight in every layer"


def mask_layers(masks: PyTree, axes: Axes = None) -> Layers:
    """Flatten a tree of masks into layers, with the masks as scores; leaves whose axes are unknown are one layer."""
    paths, leaves, treedef = flatten(masks)
    slots = [i for i, leaf in enumerate(leaves) if leaf is not None]
    roles = kernel_axes(axes, masks)
    stacked = [leaf_roles.stacked if (leaf_roles := roles[paths[i]]) is not None else () for i in slots]
    present = [leaves[i] for i in slots]
    return Layers([paths[i] for i in slots], present, present, stacked, slots, treedef)


def empty_layers(layers: Layers, kept: Sequence[Array]) -> list[str]:
    """Return the names of layers that have weights but keep none; ``kept`` are concrete bool arrays."""
    left = _over_layers(jnp.any, layers, kept)
    return [
        name for name, size, any_left in zip(layers.names, layers.sizes, left, strict=True) if size and not any_left
    ]


def kept_of_layers(layers: Layers) -> list[int]:
    """Return the number of weights that each layer keeps; the scores are concrete bool arrays."""
    return [int(count) for count in _over_layers(_count_true, layers, layers.scores)]


def _gathered(array: ArrayLike) -> ArrayLike:
    """Return an array as it is, or the whole of one that is spread over several processes."""
    if getattr(array, "is_fully_addressable", True) or getattr(array, "is_fully_replicated", True):
        return array
    whole: np.ndarray = multihost_utils.process_allgather(array, tiled=True)
    return whole


def _count_true(mask: Array, axis: tuple[int, ...]) -> ArrayLike:
    """Count the True entries over some axes; a mask that is spread over several processes is counted in place."""
    if getattr(mask, "is_fully_addressable", True):
        counted: ArrayLike = np.count_nonzero(np.asarray(mask), axis=axis)
        return counted
    if len(axis) == mask.ndim:
        return np.int64(uint64.number(kth_largest.count_true([mask])))
    return jnp.sum(mask, axis=axis, dtype=jnp.uint32)


def _over_layers(reduce: Callable[..., ArrayLike], layers: Layers, kept: Sequence[Array]) -> np.ndarray:
    """Reduce one array for each leaf over the axes of each layer."""
    found = []
    with jax.ensure_compile_time_eval():
        for mask, stacked in zip(kept, layers.stacked, strict=True):
            rest = tuple(axis for axis in range(mask.ndim) if axis not in stacked)
            found.append(_gathered(reduce(mask, axis=rest)))
        return np.concatenate([np.ravel(each) for each in jax.device_get(found)])


def is_mask(leaf: object) -> bool:
    """Whether a leaf is a bool array."""
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.bool_))


def describe(leaf: object) -> str:
    """Describe a leaf for an error: dtype and shape, or its value if it is not an array."""
    return f"{leaf.dtype}{list(leaf.shape)}" if hasattr(leaf, "dtype") and hasattr(leaf, "shape") else repr(leaf)


def _stacked(path: str, leaf: Leaf, roles: KernelAxes | None, per_layer: str | None, axes: Axes) -> tuple[int, ...]:
    if roles is None and per_layer is None:
        return ()
    if roles is None:
        why = f"{per_layer} treats it as one layer, which is wrong if it stacks several"
        warnings.warn(unknown_axes(path, tuple(leaf.shape), why, axes), stacklevel=2)
        return ()
    return roles.stacked


def _largest_of_each(layers: Layers, counts: Count) -> list[Array]:
    """Mark the largest scores of every layer; ``counts`` are limbs (layers,), with one mask for each leaf."""
    starts = np.cumsum([0, *layers.stacks])
    plain = [i for i, stacked in enumerate(layers.stacked) if not stacked]
    masks: dict[int, Array] = {}
    if plain:
        counts_of_plain = (
            counts if len(plain) == len(layers.scores) else Count(*(limb[starts[plain]] for limb in counts))
        )
        scores, masks_of_plain = [layers.scores[i] for i in plain], [layers.masks[i] for i in plain]
        found = kth_largest.largest(scores, counts_of_plain, masks_of_plain, each=True, magnitude=layers.magnitude)
        masks.update(zip(plain, found, strict=True))
    for i, stacked in enumerate(layers.stacked):
        if stacked:
            of_stack = Count(*(jnp.asarray(limb)[starts[i] : starts[i + 1]] for limb in counts))
            masks[i] = largest_along(layers.scores[i], layers.masks[i], of_stack, stacked, magnitude=layers.magnitude)
    return [masks[i] for i in range(len(layers.scores))]


def largest_along(
    scores: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None,
    keep: Count,
    axes: tuple[int, ...],
    *,
    magnitude: bool = False,
) -> Bool[Array, "*shape"]:
    """Mark the largest scores of every slice along some axes.

    Args:
      scores: float array.
      mask: bool array of the weights that may be kept; None for all.
      keep: limbs (slices,), the number to mark in each slice.
      axes: the axes that index the slices, in row-major order.
      magnitude: whether to rank by absolute value.
    """

    def mark(operands: tuple[Array, Array | None, Count]) -> PyTree:
        return _largest_along(*operands, axes=axes, magnitude=magnitude)

    marked: Array = with_automatic_axes(mark, (scores, mask, keep), like=scores)
    return marked


def _largest_along(
    scores: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"] | None,
    keep: Count,
    *,
    axes: tuple[int, ...],
    magnitude: bool,
) -> Bool[Array, "*shape"]:
    lead = tuple(range(len(axes)))
    moved = jnp.moveaxis(scores, axes, lead)
    rows = moved.reshape(keep.low.shape[0], *moved.shape[len(axes) :])
    row_masks = jnp.ones_like(rows, bool) if mask is None else jnp.moveaxis(mask, axes, lead).reshape(rows.shape)

    def mark(row: Array, row_mask: Array, number: Count) -> Array:
        return kth_largest.largest([row], number, [row_mask], magnitude=magnitude)[0]

    found = jax.vmap(mark)(rows, row_masks, keep)
    return jnp.moveaxis(found.reshape(moved.shape), lead, axes)


def _count(number: int | Sequence[int] | Count) -> Count:
    return number if isinstance(number, Count) else uint64.count_of(number)


def _less(quota: Quota, part: float) -> Quota:
    """Return the quota reduced by a fraction, each count rounded separately."""
    if not part:
        return quota
    each, total = quota
    if isinstance(each, Count) or isinstance(total, Count):
        raise TypeError("counts given as an array cannot be used to regrow weights; pass numbers")
    return Quota(
        None if each is None else [count - round(part_of(count, part)) for count in each],
        None if total is None else total - round(part_of(total, part)),
    )


def _entry(counts: Sequence[int | Sequence[int] | Count | None], index: Int[Array, ""]) -> Count | None:
    """Look up an entry of a table of counts at run time."""
    if all(count is None for count in counts):
        return None
    # A table may have entries with a total and entries that only have counts of layers.
    table = uint64.count_of([0 if count is None else count for count in counts])
    return Count(*(jnp.asarray(limb)[index] for limb in table))
