"""Remove channels from trees: parameters, batch statistics, averages, optimizer states."""

import itertools
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, PyTree

from jprune.pruning.structured.selection import replicated
from jprune.trees import Leaf, flatten

KeptIndices: TypeAlias = tuple[Bool[np.ndarray, " _"], ...]

_FACTORED = 128  # optax factors second moments only of matrices with this many rows and columns, unless set otherwise


def cut_leaves(tree: PyTree, kept: Mapping[str, KeptIndices]) -> PyTree:
    """Cut the leaves of a tree that have a path in ``kept``; other leaves are unchanged.

    Args:
      tree: tree of arrays, or of their shapes.
      kept: the kept indices of every axis, by path.
    """
    paths, leaves, treedef = flatten(tree)
    return jax.tree.unflatten(
        treedef,
        [take(leaf, kept[path]) if path in kept else leaf for path, leaf in zip(paths, leaves, strict=True)],
    )


def cut_along(tree: PyTree, kept: Mapping[str, KeptIndices], name: str) -> PyTree:
    """Cut every leaf of a tree that belongs to a parameter or a statistic, anywhere in the tree.

    A leaf belongs to the parameter whose path is the end of its own path: ``0/mu/dense/kernel`` to ``dense/kernel``. It
    may have additional leading axes (the memory of L-BFGS), lack one axis (Adafactor's factors) or be a scalar. Vectors
    along single axes, such as ``0/mu/dense/kernel/1`` of ``optax.sm3``, and a vector with one entry for each parameter
    (``optax.flatten``) are cut too.

    Args:
      tree: an optimizer state, batch statistics, an average of the parameters, or any other tree.
      kept: the kept indices of every axis, by path of a parameter or a statistic.
      name: the caller's name for the tree, for errors.

    Returns:
      A tree of the same structure.

    Raises:
      ValueError: a leaf belongs to a parameter but has an unexpected shape.
    """
    paths, leaves, treedef = flatten(tree)
    known = frozenset(paths)
    owners = [_owner(path, leaf, kept, known) for path, leaf in zip(paths, leaves, strict=True)]
    companions: dict[str, int] = {}
    for owner in owners:
        if owner is not None:
            companions[owner.prefix] = companions.get(owner.prefix, 0) + 1
    raveled = _raveled(kept)
    out = []
    for path, leaf, owner in zip(paths, leaves, owners, strict=True):
        if owner is None:
            indices = _along_one_axis(path, leaf, kept, known)
            if indices is None and getattr(leaf, "shape", None) == raveled.shape:
                indices = raveled
            out.append(leaf if indices is None else take(leaf, (indices,)))
        else:
            alone = companions[owner.prefix] == 1 and len(kept) > 1
            out.append(_cut(path, leaf, owner, kept[owner.path], name, alone=alone))
    return jax.tree.unflatten(treedef, out)


def take(leaf: Leaf, kept: KeptIndices) -> Leaf:
    """Take the kept indices of an array or a shape; an array on a mesh with explicit axes is replicated first.

    An array on one device is cut by numpy: jax would compile a program for every shape, axis and number of indices.
    """
    if isinstance(leaf, jax.ShapeDtypeStruct):
        described: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct
        return described(tuple(int(indices.sum()) for indices in kept), leaf.dtype, weak_type=leaf.weak_type)
    if all(indices.all() for indices in kept):
        return leaf
    if _on_one_device(leaf):
        cut = np.asarray(leaf)[np.ix_(*map(np.flatnonzero, kept))]
        return jax.device_put(cut, leaf.sharding if leaf.committed else None)
    if isinstance(leaf, jax.Array):
        leaf = replicated(leaf)
    for axis, indices in enumerate(kept):
        if not indices.all():
            leaf = jnp.take(leaf, np.flatnonzero(indices), axis=axis)
    return leaf


def feature_groups(
    path: str, before: tuple[int, int], outputs: int, kept: Mapping[str, KeptIndices] | None, axis: int = -1
) -> int:
    """Return the number of feature groups of a layer that has lost whole groups, or positions of every group.

    Args:
      path: path of its kernel or scale.
      before: number of its groups and of its outputs before.
      outputs: number of its outputs now.
      kept: the kept indices of every axis, by path; the path of the layer may have a prefix, or lack one.
      axis: the axis of outputs.

    Raises:
      ValueError: the sizes allow both, and ``kept`` is None or has no such path.

    >>> feature_groups("conv/kernel", (4, 8), 6, None)
    3
    """
    groups, whole = before
    along = kept_along(kept or {}, path, axis)
    if along is not None and len(along) == whole:
        return groups_left(along, groups)
    possible = {groups} if outputs % groups == 0 else set()
    if outputs * groups % whole == 0:
        possible.add(outputs * groups // whole)
    if len(possible) != 1:
        raise ValueError(
            f"'{path}' has {outputs} of {whole} outputs in {groups} groups, and may have lost whole groups or the same "
            "positions of every group; pass kept=small.kept"
        )
    return possible.pop()


def groups_left(along: Bool[np.ndarray, " features"], groups: int) -> int:
    """Return how many of the groups of an axis of features are left, given its kept indices."""
    return int(along.reshape(groups, -1).any(axis=1).sum())


def kept_along(
    kept: Mapping[str, KeptIndices], path: str, axis: int, shape: tuple[int, ...] | None = None
) -> Bool[np.ndarray, " indices"] | None:
    """Return the kept indices of an axis of a leaf, matched by the end of its path or of theirs; None if not found.

    Args:
      kept: the kept indices of every axis, by path.
      path: path of the leaf.
      axis: the axis.
      shape: shape of the leaf now, as its layer sees it. If the layer is stacked, the leaf has more axes, of which
        ``axis`` is not one; ``scan`` and ``vmap`` put them anywhere.

    >>> one, two = (np.array([True]),), (np.array([False]),)
    >>> kept_along({"a/conv/kernel": one, "b/conv/kernel": two}, "params/b/conv/kernel", 0)
    array([False])
    >>> kept_along({"a/conv/kernel": one, "b/conv/kernel": two}, "conv/kernel", 0) is None  # either
    True
    """
    found = [one for one in kept if path == one or path.endswith(f"/{one}")]
    longer = [one for one in kept if one.endswith(f"/{path}")]
    if not found and len(longer) != 1:
        return None
    axes = kept[max(found, key=len) if found else longer[0]]
    return axes[axis] if shape is None else _of_one_layer(axes, shape)[axis]


def _of_one_layer(axes: KeptIndices, shape: tuple[int, ...]) -> KeptIndices:
    """Return the axes of a leaf that one of its stacked layers has: of those that fit, such that the others are whole.

    If several do, they are the last ones.
    """
    fitting = [
        own
        for own in itertools.combinations(range(len(axes)), len(shape))
        if tuple(int(axes[place].sum()) for place in own) == shape
    ]

    def others_lost(own: tuple[int, ...]) -> int:
        return sum(not along.all() for place, along in enumerate(axes) if place not in own)

    own = min(reversed(fitting), key=others_lost, default=tuple(range(len(axes) - len(shape), len(axes))))
    return tuple(axes[place] for place in own)


def warn_of_other_divisors(layers: Iterable[tuple[object, str]]) -> None:
    """Warn of layers whose own code divides by a number of channels that is smaller now.

    Args:
      layers: the layers and their paths.
    """
    names = (f"{type(layer).__name__} '{path}'" if path else type(layer).__name__ for layer, path in layers)
    if named := ", ".join(dict.fromkeys(names)):
        warnings.warn(
            f"the code of {named} divides by its number of channels, which is smaller now; small.apply and the masked "
            "model divide by the original number, so the outputs differ: use small.apply, fine-tune the module, or "
            "keep these channels by choosing other groups in channel_group_masks (groups=, or sparsity={regex: "
            "fraction})",
            stacklevel=3,
        )


def _on_one_device(leaf: Leaf) -> bool:
    """Whether a leaf is a concrete array of numbers on one device of this process."""
    return (
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        and leaf.is_fully_addressable
        and not leaf.weak_type  # which numpy does not keep
        and len(leaf.sharding.device_set) == 1
    )


class _Owner(NamedTuple):
    """The parameter that a leaf belongs to, and the rest of the leaf's path."""

    path: str
    prefix: str


def _owner(path: str, leaf: Leaf, kept: Mapping[str, KeptIndices], paths: frozenset[str]) -> _Owner | None:
    """Return the parameter whose path is the end of a leaf's path.

    Where several are, as for the moment ``mu/kernel`` of a ``kernel`` where there is a layer ``mu`` too, it is the one
    whose companions the tree has most of: the others are at ``mu/...`` as well.
    """
    if not hasattr(leaf, "shape") or jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return None
    parts = path.split("/")
    ends = [("/".join(parts[start:]), "/".join(parts[:start])) for start in range(len(parts))]
    found = [_Owner(end, prefix) for end, prefix in ends if end in kept]
    if len(found) > 1:
        return max(found, key=lambda owner: sum(f"{owner.prefix}/{one}".lstrip("/") in paths for one in kept))
    return found[0] if found else None


def _along_one_axis(
    path: str, leaf: Leaf, kept: Mapping[str, KeptIndices], paths: frozenset[str]
) -> Bool[np.ndarray, " _"] | None:
    """Return the kept indices of the axis of a parameter that a leaf below it belongs to: ``kernel/1`` to axis 1."""
    parent, _, axis = path.rpartition("/")
    owner = _owner(parent, leaf, kept, paths) if axis.isdecimal() else None
    along = () if owner is None else kept[owner.path][int(axis) :][:1]
    return along[0] if along and leaf.shape == along[0].shape else None


def _cut(path: str, leaf: Leaf, owner: _Owner, kept: KeptIndices, name: str, *, alone: bool) -> Leaf:
    shape, full = tuple(leaf.shape), tuple(len(indices) for indices in kept)
    if shape == full:
        return take(leaf, kept)
    if len(shape) > len(full) and shape[len(shape) - len(full) :] == full:
        more = tuple(np.ones(size, bool) for size in shape[: len(shape) - len(full)])
        return take(leaf, (*more, *kept))
    if int(np.prod(shape)) <= 1 or all(indices.all() for indices in kept):
        return leaf
    missing = _axis_left_out(path, owner, full)
    if missing is not None and shape == full[:missing] + full[missing + 1 :]:
        _check_factors(path, full, tuple(int(indices.sum()) for indices in kept), name)
        return take(leaf, kept[:missing] + kept[missing + 1 :])
    if alone:  # has the name of a parameter by coincidence
        return leaf
    raise ValueError(
        f"{name} has shape {shape} at '{path}', and the parameter '{owner.path}' has shape {full}; it cannot be "
        "cut: initialize that part of the state again with tx.init(small.params)"
    )


def _axis_left_out(path: str, owner: _Owner, shape: Sequence[int]) -> int | None:
    """Return the axis over which a factored second moment (optax.scale_by_factored_rms) is averaged."""
    if len(shape) < 2:
        return None
    order = np.argsort(shape)
    factor = owner.prefix.rpartition("/")[2]
    return {"v_row": int(order[-1]), "v_col": int(order[-2])}.get(factor)


def _check_factors(path: str, full: Sequence[int], small: Sequence[int], name: str) -> None:
    """Raise for factors that the optimizer would interpret differently at the smaller shape."""
    before, after = np.argsort(full)[-2:], np.argsort(small)[-2:]
    shrunk = min(full[axis] for axis in before) >= _FACTORED > min(small[axis] for axis in after)
    if tuple(before) != tuple(after) or shrunk:
        raise ValueError(
            f"{name} has factored second moments at '{path}', of a parameter of shape {tuple(full)}; at the smaller "
            f"shape {tuple(small)} the optimizer factors along other axes or not at all: initialize that part of the "
            "state again with tx.init(small.params)"
        )


def _raveled(kept: Mapping[str, KeptIndices]) -> np.ndarray:
    """Return the kept entries of the vector of all parameters."""
    flat = [np.ones((), bool)] * len(kept)
    for place, indices in enumerate(kept.values()):
        for axis, along in enumerate(indices):
            flat[place] = flat[place][..., None] & along if axis else along
    return np.concatenate([part.reshape(-1) for part in flat]) if flat else np.zeros(0, bool)
