"""Turn a masked network into a smaller dense one by removing the channels that are masked in every layer."""

import dataclasses
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Bool, PyTree

from jprune import jaxprs
from jprune.graph import Graph, trace_model
from jprune.graph.channels import ChannelGroup, Member
from jprune.graph.trace import model_jaxpr
from jprune.graph.values import Program
from jprune.pruning.selection.layers import describe, is_mask
from jprune.pruning.selection.unstructured import apply_masks
from jprune.pruning.structured.budgets import cost_of
from jprune.pruning.structured.comparison import code_differences
from jprune.pruning.structured.cutting import KeptIndices, cut_along, cut_leaves, take
from jprune.pruning.structured.program import Kept, run
from jprune.pruning.structured.selection import check_leaves
from jprune.trees import Leaf, flatten, is_complex, is_inexact, match, with_article

Removed: TypeAlias = tuple[Bool[np.ndarray, " _"], ...]

_MOST_ROUNDING = 0.05  # of the largest output; a thousand roundings of a 16-bit float would allow any difference


class GroupRow(NamedTuple):
    """A row of the table: the channels of a group before and after.

    Attributes:
      member: the first kernel that computes the channels, or else the first leaf that has them, with their axis, as in
        ``print(graph)``.
      before: number of channels.
      after: number of channels kept.
      exact: whether removing these channels is the same as masking them.
      difference: for a group that is not exact, the largest difference of an output between the model without these
        channels and the model with them masked, on the inputs given as ``check``; None if it was not measured.
      why: why the group is not exact, or remarks.
    """

    member: str
    before: int
    after: int
    exact: bool
    difference: float | None
    why: tuple[str, ...]


class LeafRow(NamedTuple):
    """The shape of a leaf before and after."""

    leaf: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class RemovalTable:
    """A summary of the removed channels, which ``print`` shows as a table.

    Attributes:
      groups: every group of channels.
      leaves: every leaf whose shape changed.
      parameters: number of parameters before and after.
      multiply_adds: multiply-adds before and after, for the inputs with which the graph was traced; None if some
        are in a while loop.
      differences: lines where the model's own code would compute something else at the smaller shapes.
        For a Linen module also those that are left with ``smaller_apply``.
    """

    groups: tuple[GroupRow, ...]
    leaves: tuple[LeafRow, ...]
    parameters: tuple[int, int]
    multiply_adds: tuple[int, int] | None
    differences: tuple[str, ...]

    def __str__(self) -> str:
        rows = [("channels of", "before", "after", "")]
        for group in self.groups:
            measured = "" if group.difference is None else f", outputs differ by {group.difference:.2g}"
            remark = (
                "" if group.exact or group.before == group.after else f"not exact{measured}: {'; '.join(group.why)}"
            )
            rows.append((group.member, f"{group.before:,}", f"{group.after:,}", remark))
        for name, counts in (("parameters", self.parameters), ("multiply-adds", self.multiply_adds)):
            if counts is not None:
                fewer = f"{counts[0] / counts[1]:.2f} times fewer" if counts[1] else ""
                rows.append((name, f"{counts[0]:,}", f"{counts[1]:,}", fewer))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
        if self.differences:
            lines.append("the model's own code cannot be used with the smaller parameters:")
            lines.extend(f"  {what}" for what in self.differences)
        else:
            lines.append("the model's own code can be used with the smaller parameters")
        return "\n".join(lines)


class SmallModel(NamedTuple):
    """A model without its masked channels; made by ``remove_channels``.

    Attributes:
      params: the smaller parameters, a tree like those given.
      state: the smaller batch statistics, or None.
      also: the trees given as ``also``, cut with their parameters.
      apply: the traced program at the smaller sizes, called like the function that was traced; it can be
        differentiated, transformed and called with other batch sizes.
      table: the removed channels, and where the model's own code would differ from ``apply``.
      kept: the kept indices of every axis, by path.
      differences: ``differences(apply)`` compares other code, such as a rebuilt module, with ``small.apply``, operation
        by operation and without computing anything. It returns the differences, with the line of code.
    """

    params: PyTree
    state: PyTree
    also: tuple[PyTree, ...]
    apply: Callable[..., PyTree]
    table: RemovalTable
    kept: Mapping[str, KeptIndices]
    differences: Callable[[Callable[..., PyTree]], tuple[str, ...]]


def remove_channels(
    graph: Graph,
    params: PyTree,
    masks: PyTree,
    *,
    state: PyTree = None,
    also: PyTree = (),
    check: PyTree = None,
) -> SmallModel:
    """Remove the masked channels from a model, which gives smaller arrays and the same outputs.

    A channel is removed if it is masked in every member of its group; other masks are applied. Therefore
    ``small.apply(small.params, *inputs)`` equals ``apply(apply_masks(params, masks), *inputs)`` to float tolerance for
    every group that is exact.

    The model's own code is traced at the smaller shapes and compared, without computing anything. If it contains fixed
    sizes (a number of heads, declared features, the n of a mean), ``small.table`` names the line.

    Masks that prune no whole channel, such as unstructured masks, cause a warning, and so do leaves of the state that
    the traced function does not read, such as the ``hidden`` averages of Haiku when it evaluates.

    Args:
      graph: made by ``jprune.trace_model``.
      params: parameters, a tree of arrays.
      masks: bool tree like ``params``, None where nothing is masked; from ``channel_group_masks`` or ``masks_of``.
      state: batch statistics, if the graph was traced with ``state``.
      also: a tuple of other trees to cut: optimizer states, moving averages, batch statistics. Leaves are matched
        by the end of their paths.
      check: inputs, one array or a tuple, on which the outputs of the smaller model are compared with those of the
        masked one.

    Returns:
      The smaller model.

    Raises:
      TypeError: a mask is not a bool array, or ``also`` is not a tuple.
      ValueError: masks remove a channel from only some members of its group; the graph is of another model; a leaf of
        ``also`` cannot be cut; or the outputs on ``check`` differ or are NaN.

    >>> import jprune
    >>> params = {"a": jnp.array([[1.0, 3.0]]), "b": jnp.array([[2.0], [2.0]])}
    >>> graph = jprune.trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 1)))
    >>> small = remove_channels(graph, params, jprune.channel_group_masks(graph, params, sparsity=0.5))
    >>> small.params
    {'a': Array([[3.]], dtype=float32), 'b': Array([[2.]], dtype=float32)}
    >>> print(small.table)
    channels of    before  after
    a[1]                2      1
    parameters          4      2  2.00 times fewer
    multiply-adds       4      2  2.00 times fewer
    the model's own code can be used with the smaller parameters
    """
    if not isinstance(also, tuple):
        raise TypeError(f"also is {with_article(also)}; it must be a tuple of trees: also=(opt_state,)")
    check_leaves(graph, params, name="params")
    state = _state_of(graph, state, also)
    removed = _masked_channels(graph, params, masks)
    _warn_of_no_channel(removed, masks)
    _warn_of_unread_state(graph, removed)
    small = _remove(graph, apply_masks(params, masks), removed, state=state, also=also)
    if check is not None:
        return _checked(graph, small, apply_masks(params, masks), removed, state=state, check=check)
    return small


def remove_dead(
    graph: Graph,
    params: PyTree,
    masks: PyTree = None,
    *,
    dead: Mapping[str, Bool[np.ndarray | Array, " _"]] | None = None,
    state: PyTree = None,
    also: PyTree = (),
    check: PyTree = None,
) -> SmallModel:
    """Remove the channels that are zero in every layer.

    A channel is removed if all its weights are zero, including biases and normalization; each group keeps at least one
    channel. If ``check`` shows that the outputs stay the same, channels whose weights are zero in every layer that
    reads them, and channels named in ``dead``, are removed too. Channels of a group that is not exact, such as those of
    a softmax, affect the outputs even if all their weights are zero, so they need ``check`` as well.

    Args:
      graph: made by ``jprune.trace_model``.
      params: parameters, a tree of arrays.
      masks: bool tree like ``params``, applied first, or None.
      dead: bool arrays (outputs,) by path of a kernel: units that are 0 on the relevant data, such as
        ``{"conv1/kernel": jprune.unit_status(preactivations)["conv1"] == -1}`` for a ReLU network.
      state: batch statistics, if the graph was traced with ``state``.
      also: other trees to cut, as for ``remove_channels``.
      check: inputs on which the outputs are compared with those of the original model.

    Returns:
      The smaller model.

    Raises:
      TypeError: ``dead`` has an array that is not bool.
      ValueError: channels would be removed that are not zero in every layer, or whose group is not exact, and there
        is no ``check``; the outputs on ``check`` differ or are NaN; ``dead`` names no kernel, or has another length;
        or as ``remove_channels``.

    >>> import jprune
    >>> params = {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([[2.0], [0.0]])}
    >>> graph = jprune.trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 1)))
    >>> remove_dead(graph, params).params
    {'a': Array([[1.]], dtype=float32), 'b': Array([[2.]], dtype=float32)}
    """
    check_leaves(graph, params, name="params")
    state = _state_of(graph, state, also)
    masked = params if masks is None else apply_masks(params, masks)
    named = _named_dead(graph, dead or {})
    leaves = dict(zip(*flatten(masked)[:2], strict=True))
    having = dict.fromkeys(member.path for group in graph.channels for member in group.members)
    nonzero = {path: np.asarray(leaves[path]) != 0 for path in having}
    removed, unverified, inexact = [], [], []
    for place, group in enumerate(graph.channels):
        zero = ~np.any([_any_along(nonzero[member.path], member) for member in group.members], axis=0)
        readers = [member for member in group.members if _reads(graph, member)]
        unread = ~np.any([_any_along(nonzero[member.path], member) for member in readers], axis=0)
        gone = zero | named[place] | (unread if readers else False)
        if gone.all():
            gone[0] = False
        removed.append(gone)
        if not group.exact and gone.any():
            inexact.append(f"{int(gone.sum())} of the group of '{group.members[0].path}' ({group.why[0]})")
        elif (gone & ~zero).any():
            unverified.append(f"{int((gone & ~zero).sum())} of the group of '{group.members[0].path}'")
    reasons = {"not zero in every layer that has them": unverified, "in groups that are not exact": inexact}
    found = [f"these channels are {reason}: {', '.join(groups)}" for reason, groups in reasons.items() if groups]
    if found and check is None:
        raise ValueError(
            f"{'; '.join(found)}; pass check=inputs to compare the outputs with and without them, or mask them with "
            "jprune.channel_group_masks and use jprune.remove_channels"
        )
    _warn_of_unread_state(graph, tuple(removed))
    small = _remove(graph, masked, tuple(removed), state=state, also=also)
    if check is not None:
        _compare(graph, small, masked, state, check)
    return small


def _warn_of_no_channel(removed: Removed, masks: PyTree) -> None:
    """Warn if masks prune weights but no whole channel, so that the model is not smaller."""
    if any(channels.any() for channels in removed):
        return
    pruned = sum(int(np.size(mask)) - int(np.count_nonzero(mask)) for mask in jax.tree.leaves(masks))
    if pruned:
        warnings.warn(
            f"masks prune {pruned} weights but no whole channel, so nothing is removed and they stay as zeros; make "
            "masks with jprune.channel_group_masks, or prune with selection=jprune.structured(graph)",
            stacklevel=3,
        )


def _warn_of_unread_state(graph: Graph, removed: Removed) -> None:
    """Warn of leaves of the state that ``apply`` does not read, if leaves of the same shape become smaller."""
    _, kept = _kept_indices(graph, _kept_ids(graph, removed))
    shapes = _array_shapes(graph.model.state)
    values = graph.program.inputs[len(_array_shapes(graph.model.params)) :]
    cut = {shapes[path] for path, indices in kept.items() if not all(part.all() for part in indices)}
    alone = np.bincount(graph.roots) == 1  # an index that no operation relates to another one
    unread = [
        f"'{path}'"
        for (path, shape), value in zip(shapes.items(), values, strict=False)
        if shape in cut and all(alone[graph.roots[ids]].all() for ids in value.ids if len(ids) > 1)
    ]
    if unread:
        warnings.warn(
            f"apply does not read {', '.join(unread)} of the state, so their channels are unknown and they keep their "
            "shapes, although other leaves of these shapes become smaller; trace the model as it is called in training",
            stacklevel=3,
        )


def _masked_channels(graph: Graph, params: PyTree, masks: PyTree) -> Removed:
    """Return the channels of each group that are masked in every member.

    Raises:
      ValueError: a channel is masked in only some members.
    """
    paths, _, _ = flatten(params)
    found = dict(zip(paths, match(params, masks, reference_name="params", name="masks"), strict=True))
    for path, mask in found.items():
        if mask is not None and not is_mask(mask):
            raise TypeError(f"masks has {describe(mask)} at '{path}'; it must be a bool array or None")
    arrays = {path: np.asarray(mask) for path, mask in found.items() if mask is not None}
    # A leaf without any weight left does not show which of its axes has lost channels. A group with only such leaves is
    # removed, unless that is not exact and the leaves have lost all of another group.
    empty = {path for path, mask in arrays.items() if not mask.any()}
    removed = []
    for group in graph.channels:
        left = [_left(member, arrays) for member in group.members if member.path not in empty]
        removed.append(~np.any(left, axis=0) if left else np.full(group.size, group.exact))
    explained = empty & _leaves_without_an_axis(graph, removed)
    for gone, group in zip(removed, graph.channels, strict=True):
        of_group = {member.path for member in group.members}
        if not group.exact and of_group <= empty:
            gone[:] = not of_group <= explained
    explained = empty & _leaves_without_an_axis(graph, removed)
    for group in graph.channels:
        _refuse_parts([member for member in group.members if member.path not in explained], arrays)
    return tuple(removed)


def _left(member: Member, masks: Mapping[str, np.ndarray]) -> Bool[np.ndarray, " channels"]:
    """Whether each channel has a weight left in a leaf."""
    return _any_along(masks[member.path], member) if member.path in masks else np.ones(len(member.indices), bool)


def _leaves_without_an_axis(graph: Graph, removed: Sequence[Bool[np.ndarray, " _"]]) -> set[str]:
    """Return the leaves of which an axis loses all of its indices."""
    lost: dict[tuple[str, int], int] = {}
    for group, gone in zip(graph.channels, removed, strict=True):
        for member in group.members:
            place = (member.path, member.axis)
            lost[place] = lost.get(place, 0) + int(gone.sum()) * member.indices.shape[1]
    return {path for (path, axis), count in lost.items() if count == graph.shapes[path][axis]}


def _refuse_parts(members: Sequence[Member], masks: Mapping[str, np.ndarray]) -> None:
    """Raise a ``ValueError`` if a channel is masked in only some members."""
    if not members:
        return
    left = np.array([_left(member, masks) for member in members])
    partly = left.any(axis=0) & ~left.all(axis=0)
    if partly.any():
        channel = int(np.flatnonzero(partly)[0])
        cut, whole = (
            [
                f"'{member.path}' (axis {member.axis})"
                for member, stays in zip(members, left, strict=True)
                if stays[channel] == side
            ]
            for side in (False, True)
        )
        raise ValueError(
            f"masks remove channel {channel} of a group from {', '.join(cut)} but not from {', '.join(whole)}; a "
            "channel is removed from all of them or none: make masks with jprune.channel_group_masks, or use "
            "jprune.remove_dead"
        )


def _any_along(array: np.ndarray, member: Member) -> Bool[np.ndarray, " channels"]:
    """Whether any entry of each channel in a leaf is True."""
    along: np.ndarray = np.any(array, axis=tuple(axis for axis in range(array.ndim) if axis != member.axis))
    parts: Bool[np.ndarray, " channels"] = along[member.indices].any(axis=1)
    return parts


def _reads(graph: Graph, member: Member) -> bool:
    axes = graph.axes[member.path]
    return axes is not None and member.axis in axes.inputs


def _named_dead(graph: Graph, dead: Mapping[str, ArrayLike]) -> Removed:
    """Return the channels of each group that ``dead`` names by outputs of a kernel."""
    named = tuple(np.zeros(group.size, bool) for group in graph.channels)
    for path, given in dead.items():
        axes = graph.axes.get(path)
        outputs = () if axes is None else axes.outputs
        units = np.asarray(given)
        if len(outputs) != 1 or units.shape != (graph.shapes[path][outputs[0]],):
            raise ValueError(
                f"dead has {units.shape} units for '{path}'; it must name a kernel with one outputs axis, with a bool "
                f"array of that size; kernels: {', '.join(graph.kernels)}"
            )
        if units.dtype != bool:
            raise TypeError(f"dead has {units.dtype} units for '{path}'; they must be bool: unit_status(...) == -1")
        for place, group in enumerate(graph.channels):
            for member in group.members:
                if (member.path, member.axis) == (path, outputs[0]):
                    named[place][units[member.indices].all(axis=1)] = True
    return named


def _state_of(graph: Graph, state: PyTree, also: tuple[PyTree, ...]) -> PyTree:
    """Return the given state, or the one among the other trees; None if there is none.

    Raises:
      ValueError: the state differs in structure from the one with which the graph was traced.
    """
    wanted = _array_shapes(graph.model.state)
    if state is None:
        return next((tree for tree in also if wanted and _array_shapes(tree) == wanted), None)
    if _array_shapes(state) != wanted:
        named = ", ".join(f"'{path}' {shape}" for path, shape in wanted.items()) or "no leaf"
        raise ValueError(f"state differs from the one with which the graph was traced; pass a tree with {named}")
    return state


def _array_shapes(tree: PyTree) -> dict[str, tuple[int, ...]]:
    paths, leaves, _ = flatten(tree)
    return {path: tuple(leaf.shape) for path, leaf in zip(paths, leaves, strict=True) if hasattr(leaf, "shape")}


def _remove(graph: Graph, params: PyTree, removed: Removed, *, state: PyTree, also: tuple[PyTree, ...]) -> SmallModel:
    model, kept = graph.model, _kept_ids(graph, removed)
    kept_params, kept_state = _kept_indices(graph, kept)
    smaller = model._replace(params=cut_leaves(model.params, kept_params), state=cut_leaves(model.state, kept_state))

    def differences(apply: Callable[..., PyTree]) -> tuple[str, ...]:
        return code_differences(lambda: model_jaxpr(smaller._replace(apply=apply)).jaxpr, graph.program, kept)

    is_state = [bool(kept_state) and _array_shapes(tree) == _array_shapes(model.state) for tree in also]
    return SmallModel(
        params=cut_leaves(params, kept_params),
        state=None if state is None else cut_leaves(state, kept_state),
        also=tuple(
            cut_leaves(tree, kept_state) if own else cut_along(tree, kept_state | kept_params, f"also[{place}]")
            for place, (tree, own) in enumerate(zip(also, is_state, strict=True))
        ),
        apply=_small_apply(graph, removed, kept_params),
        table=_table(graph, removed, kept_params, _of_own_code(differences, model.apply, kept_params)),
        kept=kept_params,
        differences=differences,
    )


def _of_own_code(
    differences: Callable[[Callable[..., PyTree]], tuple[str, ...]],
    apply: Callable[..., PyTree],
    kept: Mapping[str, KeptIndices],
) -> tuple[str, ...]:
    """Return where the model's own code differs, for a Linen module also with the sizes that ``smaller_apply`` sets."""
    found = differences(apply)
    if not any("ScopeParamShapeError" in what for what in found):
        return found
    from jprune.pruning.structured.linen import sizes_of_parameters  # noqa: PLC0415 - needs flax

    with sizes_of_parameters(kept):
        left = differences(apply)
    name = "with jprune.pruning.structured.linen.smaller_apply"
    return *found, *((f"{name}: {what}" for what in left) if left else (f"{name} it can be used",))


def _kept_ids(graph: Graph, removed: Removed) -> Kept:
    kept_roots = np.ones(len(graph.roots), bool)
    for group, gone in zip(graph.channels, removed, strict=True):
        kept_roots[group.roots[gone]] = False
    kept: Kept = kept_roots[graph.roots]
    return kept


def _kept_indices(graph: Graph, kept: Kept) -> tuple[dict[str, KeptIndices], dict[str, KeptIndices]]:
    """Return the kept indices of every leaf of the parameters and of the state."""
    values = iter(graph.program.inputs)
    parts = []
    for tree in (graph.model.params, graph.model.state):
        parts.append({path: tuple(kept[ids] for ids in next(values).ids) for path in _array_shapes(tree)})
    return parts[0], parts[1]


def _small_apply(graph: Graph, removed: Removed, kept_params: Mapping[str, KeptIndices]) -> Callable[..., PyTree]:
    """Return the traced program at the smaller sizes; it is traced again for inputs of other shapes."""
    model = graph.model
    programs: dict[Hashable, tuple[Graph, Kept]] = {
        _signature((model.params, model.state, *model.inputs)): (graph, _kept_ids(graph, removed))
    }
    exact = all(group.exact or not gone.any() for group, gone in zip(graph.channels, removed, strict=True))

    def apply(params: PyTree, *inputs: PyTree, state: PyTree = None) -> PyTree:
        if model.state is not None and state is None and not model.state_by_keyword:
            state, inputs = (inputs[0], inputs[1:]) if inputs else (None, ())
        if _array_shapes(state).keys() != _array_shapes(model.state).keys():
            raise TypeError(
                "small.apply takes no state: the model was traced without one"
                if model.state is None
                else "small.apply needs the state of the model: pass state= to remove_channels, and state=small.state"
            )
        _check_small(params, kept_params)
        placed = _placed_like((model.params, model.state), (params, state))
        signature = _signature((*placed, *inputs))
        if signature not in programs:
            again = trace_model(model.apply, placed[0], *_shapes(inputs), state=placed[1])
            programs[signature] = (again, _same_channels(again, kept_params, exact=exact))
        traced, kept = programs[signature]
        arrays = [leaf for leaf in jax.tree.leaves((params, state, tuple(inputs))) if hasattr(leaf, "shape")]
        return jax.tree.unflatten(traced.outputs, run(traced.program, kept, arrays))

    return apply


def _signature(inputs: PyTree) -> Hashable:
    leaves, treedef = jax.tree.flatten(tuple(inputs))
    known = (_known(jaxprs.described(leaf)) if hasattr(leaf, "shape") else (type(leaf), leaf) for leaf in leaves)
    return treedef, tuple(known)


def _known(array: jax.ShapeDtypeStruct) -> Hashable:
    return array.shape, array.dtype, array.weak_type, array.sharding


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jaxprs.described(leaf) if hasattr(leaf, "shape") else leaf, tree)


def _placed_like(tree: PyTree, small: PyTree) -> PyTree:
    """Return the shapes of a tree, on the mesh of the smaller one where that has explicit axes."""
    leaves, treedef = jax.tree.flatten(tree)
    pairs = zip(leaves, jax.tree.leaves(small), strict=True)
    return jax.tree.unflatten(treedef, [jaxprs.described(b, a.shape) if hasattr(a, "shape") else a for a, b in pairs])


def _check_small(params: PyTree, kept: Mapping[str, KeptIndices]) -> None:
    paths, leaves, _ = flatten(params)
    found = dict(zip(paths, leaves, strict=True))
    for path, indices in kept.items():
        shape = tuple(int(along.sum()) for along in indices)
        if path not in found or tuple(found[path].shape) != shape:
            given = f"has shape {found[path].shape}" if path in found else "is missing"
            raise ValueError(f"params are not those of the smaller model: '{path}' {given}; it must have shape {shape}")


def _same_channels(graph: Graph, kept_params: Mapping[str, KeptIndices], *, exact: bool = False) -> Kept:
    """Find the channels to keep in the same model traced with other inputs.

    Code may do something else with inputs of other shapes: ``exact`` asks that removing equals masking there too.
    """
    paths = list(kept_params)
    removed_roots = np.zeros(len(graph.roots), bool)
    for path, value in zip(paths, graph.program.inputs, strict=False):
        for ids, kept in zip(value.ids, kept_params[path], strict=True):
            removed_roots[graph.roots[ids[~kept]]] = True
    for group in graph.channels:
        if exact and not group.exact and removed_roots[group.roots].any():
            raise ValueError(
                f"with inputs of these shapes, removing channels of '{group.members[0].path}' is not the same as "
                f"masking them, unlike with the inputs of the trace: {group.why[0]}; trace the model with inputs like "
                "these"
            )
    kept_ids: Kept = ~removed_roots[graph.roots]
    now, _ = _kept_indices(graph, kept_ids)
    for path in paths:
        if removed_roots[0] or not all(map(np.array_equal, now[path], kept_params[path])):
            raise ValueError(
                f"with inputs of these shapes the model couples the channels of '{path}' differently than with "
                "the inputs it was traced with; trace it with inputs of these shapes"
            )
    return kept_ids


def _checked(
    graph: Graph, small: SmallModel, masked: PyTree, removed: Removed, *, state: PyTree, check: PyTree
) -> SmallModel:
    """Compare outputs: raise if exact groups differ, and measure the difference for each of the others."""
    inexact = [place for place, group in enumerate(graph.channels) if not group.exact and removed[place].any()]
    if not inexact:
        _compare(graph, small, masked, state, check)
        return small

    def without(places: Sequence[int]) -> SmallModel:
        part = tuple(gone if place in places else np.zeros_like(gone) for place, gone in enumerate(removed))
        return _remove(graph, masked, part, state=state, also=())

    _compare(graph, without([place for place in range(len(removed)) if place not in inexact]), masked, state, check)
    rows = list(small.table.groups)
    for place in inexact:
        difference, _ = _difference(graph, without([place]), masked, state, check)
        rows[place] = rows[place]._replace(difference=difference)
    return small._replace(table=dataclasses.replace(small.table, groups=tuple(rows)))


def _compare(graph: Graph, small: SmallModel, masked: PyTree, state: PyTree, check: PyTree) -> None:
    difference, allowed = _difference(graph, small, masked, state, check)
    if not difference <= allowed:
        raise ValueError(
            f"on check, outputs of the smaller model differ by {difference:.3g} from those of the full-size model, and "
            f"{allowed:.3g} is allowed for rounding; the removed channels affect the outputs: keep them"
        )


def _difference(graph: Graph, small: SmallModel, masked: PyTree, state: PyTree, check: PyTree) -> tuple[float, float]:
    """Return the difference of the output that differs most, and the difference that rounding can cause in it.

    A new state among the outputs is compared at the kept channels. Integers are compared if no output is a float.
    """
    inputs = check if isinstance(check, tuple) else (check,)
    if state is None and graph.model.state is not None:
        raise ValueError("check needs the state of the model, such as its batch statistics: pass state=")
    kept_state = {} if state is None else {"state": small.state}
    with jax.default_matmul_precision("highest"):
        before = jax.tree.leaves(jax.jit(graph.model.__call__)(masked, inputs, state))
        after = jax.tree.leaves(jax.jit(small.apply)(small.params, *inputs, **kept_state))
    kept = _same_channels(graph, small.kept)
    left = [take(a, tuple(kept[ids] for ids in v.ids)) for a, v in zip(before, graph.program.outputs, strict=True)]
    pairs = [(a, b) for a, b in zip(left, after, strict=True) if not jnp.issubdtype(a.dtype, jax.dtypes.extended)]
    floats = [(a, b) for a, b in pairs if is_inexact(a)]
    inside = _coarsest(graph.program)
    apart = [_apart(np.asarray(a), np.asarray(b), inside) for a, b in floats or pairs]
    return max(apart, key=lambda pair: pair[0] - pair[1], default=(0.0, 0.0))


def _coarsest(program: Program) -> float:
    """Return the largest eps of the floats that a program computes: bfloat16 inside counts, for outputs of float32."""
    own = [_eps(var.aval) for step in program.steps for var in step.equation.outvars]
    return max([*own, *(_coarsest(inner) for step in program.steps for inner in step.inside)], default=0.0)


def _eps(array: Leaf) -> float:
    finfo: Callable[..., np.finfo[np.floating]] = jnp.finfo
    return float(finfo(array.dtype).eps) if is_inexact(array) else 0.0


def _apart(before: np.ndarray, after: np.ndarray, inside: float) -> tuple[float, float]:
    """Return the largest difference of two outputs, infinite if only one is, and what rounding can cause.

    Args:
      before: output of the full-size model.
      after: output of the smaller model.
      inside: the largest eps of the floats that the model computes.
    """
    rounding = min(1000 * max(_eps(before), inside), _MOST_ROUNDING) if is_inexact(before) else 0.0
    a, b = _wide(before), _wide(after)
    if np.isnan(a).any():
        raise ValueError("on check, outputs of the full-size model are NaN and cannot be compared; pass other inputs")
    with np.errstate(invalid="ignore"):
        differences = np.where(a == b, 0.0, np.abs(a - b))
    largest = float(np.max(np.abs(a[np.isfinite(a)]), initial=1.0))
    return float(np.max(np.nan_to_num(differences, nan=np.inf, posinf=np.inf), initial=0.0)), rounding * largest


def _wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.complex128 if is_complex(array) else np.float64)


def _name(graph: Graph, group: ChannelGroup) -> str:
    """Return the first kernel that computes the channels, or else the first leaf that has them, with their axis."""
    axes = {path: graph.axes[path] for path in graph.kernels}
    computing = (m for m in group.members if (roles := axes.get(m.path)) is not None and m.axis in roles.outputs)
    member = next(computing, group.members[0])
    return f"{member.path}[{member.axis}]"


def _table(
    graph: Graph, removed: Removed, kept: Mapping[str, KeptIndices], differences: tuple[str, ...]
) -> RemovalTable:
    gone = np.concatenate([np.zeros(0, bool), *removed])
    counts = {}
    for budget in ("parameters", "multiply_adds"):
        try:
            cost = cost_of(graph, graph.channels, budget)
        except ValueError:  # multiply-adds in a while loop
            continue
        counts[budget] = (cost.after(np.zeros_like(gone)), cost.after(gone))
    leaves = [
        LeafRow(path, tuple(map(len, indices)), tuple(int(along.sum()) for along in indices))
        for path, indices in kept.items()
    ]
    return RemovalTable(
        groups=tuple(
            GroupRow(
                _name(graph, group),
                group.size,
                group.size - int(lost.sum()),
                group.exact,
                None,
                group.why,
            )
            for group, lost in zip(graph.channels, removed, strict=True)
        ),
        leaves=tuple(row for row in leaves if row.before != row.after),
        parameters=counts["parameters"],
        multiply_adds=counts.get("multiply_adds"),
        differences=differences,
    )
