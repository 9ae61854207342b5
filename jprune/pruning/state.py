"""Find, check and replace the masks in the state of any optimizer.

An optax state is a tree of tuples: a plain tuple (or an OrderedDict) for a chain, a NamedTuple for anything else. This
shows whether a prune transformation is the last of its chain, without knowledge of the optimizer.
"""

import functools
import math
import operator
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, PRNGKeyArray, PyTree, UInt32
from optax.contrib import MechanicState, SAMState

from jprune.graph.axes import Axes, kernel_axes, known_shapes, shapes_of
from jprune.pruning.amounts import Amount, PerLayer, amount_of, as_keywords
from jprune.pruning.selection import allocation, kth_largest, uint64
from jprune.pruning.selection.layers import (
    Layers,
    describe,
    empty_layers,
    is_mask,
    kept_of_layers,
    mask_layers,
    nothing_left,
)
from jprune.trees import Leaf, flatten, match, only_parameters, path_string, with_article

SKIPPED = np.uint32(1 << 31)
"""The bit of ``PruneState.applied`` that is set while a selection is skipped because its scores contain NaN."""


class PruneState(NamedTuple):
    """The state of ``prune`` and ``keep_zeros``.

    Attributes:
      count: int32 scalar, the number of earlier updates.
      masks: bool arrays like the parameters, True where a weight is kept, None where nothing is prunable.
      key: the key given to ``prune``, or None.
      applied: uint32 scalar, a checksum of the entry of the schedule that was applied last, 0 before the first one.
        None (in the state of ``keep_zeros``, or saved by an earlier version) counts as 0: the next update of ``prune``
        applies the current entry, which changes nothing if the masks already follow it. The bit ``SKIPPED`` is set
        while the current entry is not applied because its scores contained NaN.
    """

    count: Array  # type: ignore[assignment] # int32; a tuple has a method of this name
    masks: PyTree
    key: PRNGKeyArray | None
    applied: UInt32[Array, ""] | None = None


def masks_of(state: PyTree) -> PyTree:
    """Return the masks in an optimizer state, wherever its prune transformations are.

    A prune transformation may be followed by prune transformations with masks of other leaves, and by transformations
    inside ``optax.masked`` that change other leaves. If the state of a masked transformation has no array per leaf
    (``masked(set_to_zero(), ...)``, ``masked(scale(...), ...)``), it does not show which leaves the transformation
    changes; ``check_pruned`` then finds pruned weights that were changed.

    Args:
      state: the state of an optax transformation that contains a prune transformation: a chain, or ``partition``,
        ``masked``, ``inject_hyperparams``, ``MultiSteps``, ``apply_if_finite``, ... around one.

    Returns:
      A tree like the parameters: bool arrays, None where nothing is prunable. The masks of several
      prune transformations, for example one for each group of a ``partition``, are merged leaf by leaf.

    Raises:
      TypeError: the state was converted to another dtype: its masks are not bool, or its numbers not integers.
      ValueError: there is no prune transformation; pruned weights would not stay 0, because a later transformation may
        change their leaves or a wrapper changes the updates of the prune transformation; or two prune transformations
        have a mask of the same leaf.

    >>> import jprune, optax
    >>> tx = optax.chain(optax.adam(1e-3), jprune.prune(jprune.magnitude(), {0: 0.5}))
    >>> masks_of(tx.init({"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}))
    {'bias': None, 'kernel': Array([[ True,  True]], dtype=bool)}
    """
    found = list(_prune_states(state, "", None))
    if not found:
        hint = _hint_of_sr_ste(state) or _hint_of_nnx_state(state) or _hint_of_restoring(state)
        hint = hint or "; end the chain of the optimizer with jprune.prune(...) or jprune.keep_zeros()"
        raise ValueError(f"there is no prune or keep_zeros transformation in this optimizer state{hint}")
    (_, first), *rest = found
    masks = first.masks
    for _, other in rest:
        masks = _merge(masks, other.masks, "")
    return jax.tree.map(lambda leaf: None if _absent(leaf) else leaf, masks, is_leaf=_absent)


def refuse_restored(state: object, name: str) -> None:
    """Raise if a state is not a ``PruneState`` with bool masks and integers.

    Args:
      state: the state that a transformation was given.
      name: name of the transformation.

    Raises:
      TypeError: the state is a dict, a list or anything else, or its masks are numbers or its numbers floats; the
        message gives the likely cause.
    """
    if not isinstance(state, PruneState):
        raise TypeError(
            f"{name} was given a state of type {type(state).__name__}, not a PruneState{_hint_of_restoring(state)}"
        )
    _refuse_converted(state, f"{name} was given a state whose")


def _refuse_converted(state: PruneState, subject: str) -> None:
    """Raise if the arrays of a state have other dtypes than ``init`` gives them.

    Raises:
      TypeError: a mask is not bool, or a number is not an integer; the message starts with ``subject``.
    """
    paths, masks, _ = flatten(state.masks)
    for path, mask in zip(paths, masks, strict=True):
        dtype = getattr(mask, "dtype", np.bool_)
        if not _absent(mask) and dtype != np.bool_:
            raise TypeError(
                f"{subject} mask at '{path}' has dtype {dtype}, not bool: either the state was converted (convert only "
                "arrays of floats), or the optimizer that wraps prune computes with the state inside, as "
                "optax.contrib.sam does; apply prune after it: optax.chain(optax.contrib.sam(...), jprune.prune(...))"
            )
    for number in ("count", "applied"):
        for leaf in jax.tree.leaves(getattr(state, number)):
            if jnp.issubdtype(getattr(leaf, "dtype", np.int32), np.inexact):
                raise TypeError(
                    f"{subject} {number} has dtype {leaf.dtype}, which cannot represent every integer: the state was "
                    "converted; convert only arrays of floats"
                )


def _hint_of_sr_ste(state: PyTree) -> str:
    """Return a hint if a state is that of ``sr_ste``, whose module imports this one."""
    is_sr_ste: Callable[[PyTree], bool] = lambda node: type(node).__name__ == "SrSteState"
    if not any(map(is_sr_ste, jax.tree.leaves(state, is_leaf=is_sr_ste))):
        return ""
    return '; sr_ste trains dense weights: evaluate and save jprune.apply_masks(params, optax.tree.get(state, "masks"))'


def _hint_of_nnx_state(state: PyTree) -> str:
    """Return a hint if a state is the NNX ``State`` of an ``nnx.Optimizer``, which has no NamedTuples."""
    if type(state).__module__.startswith("flax.nnx") and "opt_state" in state:
        return ": it is the nnx.State of an nnx.Optimizer; pass optimizer.opt_state"
    return ""


def _hint_of_restoring(state: PyTree) -> str:
    """Return a hint if a state looks like a checkpoint that was restored without a target."""
    arrays = jax.tree.leaves(state)
    named = any(
        getattr(entry, "key", None) == "masks" for path, _ in jax.tree.leaves_with_path(state) for entry in path
    )
    plain = type(state) in (dict, list)
    nodes = jax.tree.leaves(state, is_leaf=lambda node: hasattr(node, "_fields"))
    of_optax = any(hasattr(node, "_fields") for node in nodes)  # a dict of states is not restored without a target
    if not arrays or of_optax or not (named or plain):
        return ""
    return (
        f": it is {with_article(state)}, as a checkpoint restored without a target is; restore it with "
        "the state of tx.init(params) as the target"
    )


def with_masks(state: PyTree, masks: PyTree) -> PyTree:
    """Replace the masks in an optimizer state, for example with loaded ones.

    Args:
      state: the state of an optax transformation that contains a prune transformation.
      masks: bool arrays like the parameters, matched by path.

    Returns:
      A state of the same structure with copies of the masks; all other arrays are the same. If the masks bring a
      pruned weight back, the next update of ``prune`` applies the current entry of the schedule again.

    Raises:
      ValueError: as ``masks_of``; or the masks do not fit those in the state, or prune weights of a leaf that has none.

    >>> import jprune, optax
    >>> tx = optax.chain(optax.sgd(0.1), jprune.keep_zeros())
    >>> state = tx.init({"kernel": jnp.array([[0.0, 1.0]])})
    >>> masks_of(with_masks(state, {"kernel": jnp.array([[True, False]])}))
    {'kernel': Array([[ True, False]], dtype=bool)}
    """
    current = masks_of(state)
    matched = match(current, masks, reference_name="the masks of the optimizer state", name="masks")
    given = dict(zip(flatten(current)[0], matched, strict=True))
    for path, mask in zip(*flatten(current)[:2], strict=True):
        if mask is None and _prunes(given[path]):
            raise ValueError(
                f"masks prune weights of '{path}', and the optimizer state has no mask for this leaf, so they would "
                "not stay 0; include it with where=, such as keep_zeros(where=lambda path, leaf: True)"
            )

    def replace(node: PyTree) -> PyTree:
        if not isinstance(node, PruneState):
            return node
        node_paths, node_masks, treedef = flatten(node.masks)
        for path, mask in zip(node_paths, node_masks, strict=True):
            if mask is not None and getattr(given[path], "dtype", None) != np.bool_:
                raise ValueError(f"masks has {describe(given[path])} at '{path}'; it must be a bool array")
        # A step that donates the state must not delete the masks of the caller.
        copied = {path: _copy(mask) for path, mask in given.items()}
        fitted = [None if mask is None else copied[path] for path, mask in zip(node_paths, node_masks, strict=True)]
        pairs = [(given[path], mask) for path, mask in zip(node_paths, node_masks, strict=True) if mask is not None]
        # In the state of an nnx.Optimizer ``applied`` is a variable; the map keeps its class.
        applied = jax.tree.map(lambda applied: _still_applied(applied, pairs), node.applied)
        return node._replace(masks=jax.tree.unflatten(treedef, fitted), applied=applied)

    return jax.tree.map(replace, state, is_leaf=lambda node: isinstance(node, PruneState))


def _prunes(mask: Leaf) -> bool:
    """Whether a mask is concrete and has an entry that is False."""
    return is_mask(mask) and not isinstance(mask, jax.core.Tracer) and not bool(jnp.all(mask))


def _copy(mask: Leaf) -> Leaf:
    if isinstance(mask, np.ndarray):
        return mask.copy()
    return jnp.copy(mask) if isinstance(mask, jax.Array) else mask


def _still_applied(
    applied: UInt32[Array, "*replicates"], masks: list[tuple[Bool[Array, "..."], Bool[Array, "..."]]]
) -> UInt32[Array, "*replicates"]:
    """Return ``applied``, or 0 for replicates in which the first masks keep a weight that the second ones prune."""
    lead = jnp.ndim(applied)
    revived = [jnp.any(new & ~old, axis=tuple(range(min(lead, jnp.ndim(old)), jnp.ndim(old)))) for new, old in masks]
    anywhere = functools.reduce(jnp.logical_or, revived, jnp.zeros_like(applied, dtype=bool))
    return jnp.where(anywhere, jnp.zeros_like(applied), applied)


def check_pruned(
    params: PyTree,
    state: PyTree,
    *,
    sparsity: float | PerLayer | None = None,
    keep: int | Mapping[str, int] | None = None,
    axes: Axes = None,
    selection: Callable[..., PyTree] | None = None,
) -> None:
    """Check, outside jit, that every pruned weight is exactly 0, and that the requested amount is pruned.

    It also checks that the prunable weights are finite and that no selection was skipped because of NaN scores.

    One warning names layers that keep no weight; another says if more weights are pruned than requested, beyond
    rounding in each layer. If ``vmap`` made the state, amounts apply to each replicate.

    The state does not show how its masks were selected. A sparsity is met if the number of all weights kept is at most
    the one requested, or if every layer, or every output, keeps the number to which ``layer_masks`` or ``output_masks``
    rounds. Selections of blocks and channels round the number of these instead: pass ``selection``.

    Args:
      params: the parameters; with ``optax.lookahead`` both copies, or the fast weights. Amounts count one of them.
      state: the optimizer state whose prune transformations have the masks of these parameters.
      sparsity: the fraction of the prunable weights that must be pruned, or ``{regex: sparsity}`` for each layer; None
        to check no amount.
      keep: the number of weights that may be kept, or ``{regex: number}``, in place of ``sparsity``.
      axes: roles of the axes of the parameters (see ``prune``), to name single layers of a stack.
      selection: the selection that made the masks, to compare with exactly the number that it keeps of these shapes:
        ``functools.partial(jprune.selection.block_masks, block=(4, 4))``.

    Raises:
      TypeError: ``selection`` is given without an amount, or an argument has the wrong type.
      ValueError: a pruned weight is not 0, or a prunable weight is not finite; the message names the leaves and counts
        the weights. Or the latest selection was skipped because of NaN, more weights are kept than requested, an array
        is traced, the masks do not fit the parameters, or as ``masks_of``.

    >>> import jprune, optax
    >>> state = jprune.keep_zeros().init({"kernel": jnp.zeros((1, 2))})
    >>> check_pruned({"kernel": jnp.array([[0.0, 0.3]])}, state)
    Traceback (most recent call last):
    ...
    ValueError: pruned weights are not 0: 1 of 2 in 'kernel'; apply the masks ...
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, state))):
        raise ValueError(
            "check_pruned was given traced arrays; call it outside jit, with the parameters and the state that the "
            "step returned, because it reads their values"
        )
    amount = _given_amount(sparsity, keep, selection)
    paths, weights, _ = flatten(params)
    masks = _masks_of_all(params, state)
    _refuse_skipped(state)
    revived, infinite, diverged = [], [], ""
    for path, weight, mask in zip(paths, weights, masks, strict=True):
        if mask is not None:
            any_revived, any_infinite, any_pruned_infinite = _any_wrong(weight, mask)
            if any_revived:
                revived.append(f"{_count(_revived(weight, mask))} of {_count(~mask)} in '{path}'")
            if any_infinite:
                infinite.append(f"{_count(_infinite(weight, mask))} of {_count(mask)} in '{path}'")
            if any_pruned_infinite:
                diverged = "; some are NaN or infinite, as where training diverged before they were pruned"
    if revived:
        raise ValueError(
            f"pruned weights are not 0: {', '.join(revived)}{diverged}; apply the masks with "
            "jprune.apply_masks(params, jprune.masks_of(state)), and change the parameters only by updates whose last "
            "transformation is prune"
        )
    if infinite:
        raise ValueError(
            f"kept weights are NaN or infinite: {', '.join(infinite)}; the training diverged: continue from an earlier "
            "checkpoint, with a smaller step or optax.apply_if_finite(tx, 10)"
        )
    masks_of_all, replicates = trained(masks_of(state)), _replicates(state)
    empty: dict[str, list[str]] = {}
    with known_shapes(tuple((path, shape[len(replicates) :]) for path, shape in shapes_of(trained(params)))):
        for index in np.ndindex(*replicates):
            replicate = f"replicate {', '.join(map(str, index))}" if index else ""
            layers = mask_layers(
                jax.tree.map(operator.itemgetter(index), masks_of_all) if index else masks_of_all, axes
            )
            if amount is not None:
                _check_amount(layers, amount, axes, selection, of=replicate and f" of {replicate}")
            if names := empty_layers(layers, layers.scores):
                empty[replicate] = names
    if empty:
        (replicate, names), *others = empty.items()
        others_too = f" and {len(others)} more" if others else ""
        warnings.warn((replicate and f"in {replicate}{others_too}, ") + nothing_left(names), stacklevel=2)


def _given_amount(sparsity: object, keep: object, selection: object) -> Amount | None:
    """Return the amount to check, or None to check none.

    Raises:
      TypeError: ``selection`` is given without an amount; also as ``amount_of``.
    """
    if sparsity is None and keep is None:
        if selection is None:
            return None
        raise TypeError(
            "selection= says how an amount was rounded, and no amount is given: pass sparsity= or keep= too"
        )
    return amount_of(sparsity, keep)


def _replicates(state: PyTree) -> tuple[int, ...]:
    """Return the sizes of the axes over replicates, which all arrays of the state have after ``vmap(tx.init)``."""
    first = next(found for _, found in _prune_states(state, "", None))
    return np.shape(jax.tree.leaves(first.count)[0])


def _masks_of_all(params: PyTree, state: PyTree) -> list[Array | None]:
    """Return the masks of all leaves of the parameters.

    Raises:
      ValueError: as ``masks_of``; the masks do not fit the parameters, with the reason where it is known.
    """
    masks = masks_of(state)
    if not isinstance(params, optax.LookaheadParams):
        masks = trained(masks)
    try:
        return match(params, masks, reference_name="params", name="the masks of the optimizer state")
    except ValueError as error:
        given, masked = flatten(params)[0], flatten(masks)[0]
        if masked == [""] != given:
            hint = (
                "; prune is inside optax.flatten, which makes one array of all parameters; apply it after: "
                "optax.chain(optax.flatten(...), jprune.prune(...))"
            )
        elif set(masked) < set(given) and not only_parameters(params, "params"):
            hint = (
                "; the optimizer was initialized with these leaves alone: pass the same leaves as params, "
                "nnx.state(model, wrt) for nnx.Optimizer(model, tx, wrt=wrt)"
            )
        else:
            raise
        raise ValueError(f"{error}{hint}") from None


def _revived(weight: Array, mask: Bool[Array, "..."]) -> Bool[Array, "..."]:
    return ~mask & (weight != 0)


def _infinite(weight: Array, mask: Bool[Array, "..."]) -> Bool[Array, "..."]:
    return mask & ~jnp.isfinite(weight)


@jax.jit  # eagerly, each operation would be compiled for each shape; one program for all leaves compiles more slowly
def _any_wrong(weight: Array, mask: Bool[Array, "..."]) -> tuple[Array, Array, Array]:
    return jnp.any(_revived(weight, mask)), jnp.any(_infinite(weight, mask)), jnp.any(_infinite(weight, ~mask))


def _count(flags: Bool[Array, "..."]) -> int:
    """Count the True entries, also more than an int32 can."""
    return uint64.number(kth_largest.count_true([flags]))


def _refuse_skipped(state: PyTree) -> None:
    """Raise if the latest selection of a prune transformation was skipped because its scores contained NaN."""
    for _, found in _prune_states(state, "", None):
        skipped = np.ravel(np.asarray(0 if found.applied is None else found.applied)) & SKIPPED
        if not skipped.any():
            continue
        first = int(np.flatnonzero(skipped)[0])
        step = int(np.ravel(np.asarray(found.count))[first]) - 1
        replicate = f" of replicate {first}" if skipped.size > 1 else ""
        raise ValueError(
            f"the scores of the latest selection{replicate} contained NaN, last at step {step}, so the masks did not "
            "change; check the gradients and the score, or skip updates with NaN by optax.apply_if_finite(tx, 10)"
        )


def _check_amount(
    layers: Layers, amount: Amount, axes: Axes, selection: Callable[..., PyTree] | None, *, of: str
) -> None:
    """Raise if more weights are kept than requested; ``of`` names the replicate in the message."""
    kept = uint64.number(kth_largest.count_true(layers.scores))
    if selection is not None:
        chosen = _chosen_again(layers, amount, axes, selection)
        _compare_counts(kept, uint64.number(kth_largest.count_true(chosen)), layers.size, 0, of)
    elif not isinstance(amount, Mapping):
        wanted, rounding = allocation.kept(amount, layers.size), len(layers.sizes)
        as_asked = wanted - rounding <= kept <= wanted
        if not as_asked and not (isinstance(amount, float) and _rounds_apart(layers, amount, axes)):
            _compare_counts(kept, wanted, layers.size, rounding, of)
    else:
        sizes = layers.sizes
        by_layer = allocation.by_pattern(amount, layers.paths_of_layers, sizes)
        rows = zip(layers.names, kept_of_layers(layers), by_layer, sizes, strict=True)
        for name, count, most, size in sorted(rows, key=lambda row: row[1] <= row[2]):  # errors before warnings
            _compare_counts(count, most, size, 1, f" of '{name}'{of}")


def _rounds_apart(layers: Layers, sparsity: float, axes: Axes) -> bool:
    """Whether every layer, or every output, keeps the number to which ``layer_masks`` or ``output_masks`` rounds."""
    if kept_of_layers(layers) == [allocation.kept(sparsity, size) for size in layers.sizes]:
        return True
    found = kernel_axes(axes, layers.tree(layers.scores))
    for path, mask in zip(layers.paths, layers.scores, strict=True):
        roles = found[path]
        if roles is None or roles.tied:  # output_masks refuses these
            return False
        of_output = (*roles.inputs, *roles.spatial)
        fan = math.prod(mask.shape[axis] for axis in of_output)
        # On the device, because a mask may be spread over several processes.
        if (jnp.sum(mask, of_output, dtype=jnp.int32) != allocation.kept(sparsity, fan)).any():
            return False
    return True


def _chosen_again(layers: Layers, amount: Amount, axes: Axes, selection: Callable[..., PyTree]) -> list[Array]:
    """Select with the masks as scores, so that weights that are kept come first."""
    scores = layers.tree([mask.astype(jnp.float32) for mask in layers.scores])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about layers of unknown axes or without weights
        masks = selection(scores, **as_keywords(amount), **({} if axes is None else {"axes": axes}))
    chosen = match(scores, masks, reference_name="the masks", name="what selection= returned")
    return [mask for mask in chosen if mask is not None]


def _compare_counts(kept: int, wanted: int, size: int, rounding: int, of: str) -> None:
    """Raise if more weights are kept than wanted, and warn if fewer are, beyond rounding."""
    said = f"{kept} of {size} prunable weights{of} are kept (sparsity {(size - kept) / max(size, 1):.6g})"
    if kept > wanted:
        raise ValueError(
            f"{said}, more than the {wanted} requested; check that the schedule's last step was reached, and pass "
            "selection= if its selection rounds blocks or channels"
        )
    if kept < wanted - rounding:
        warnings.warn(
            f"{said}, fewer than the {wanted} requested; pruned weights stay pruned when a target is lowered, unless "
            "regrow= is given",
            stacklevel=4,
        )


def trained(params: PyTree) -> PyTree:
    """Return the weights that the gradient belongs to: the fast ones of ``optax.lookahead``, else all."""
    return params.fast if isinstance(params, optax.LookaheadParams) else params


def masked_weights(params: PyTree, masks: PyTree) -> PyTree:
    """Return the parameters that have a mask, in the tree of the masks; None for the others."""
    paths, leaves, _ = flatten(params)
    found = dict(zip(paths, leaves, strict=True))
    mask_paths, present, treedef = flatten(masks)
    match(params, masks, reference_name="params", name="the masks of the optimizer state")
    weights = [None if mask is None else found[path] for path, mask in zip(mask_paths, present, strict=True)]
    return jax.tree.unflatten(treedef, weights)


def _prune_states(
    node: PyTree, path: str, fault: str | None, later: tuple[tuple[str, PyTree], ...] = ()
) -> Iterator[tuple[str, PruneState]]:
    """Return every prune state below a node.

    ``fault`` says why there must be none. ``later`` has the states of later transformations in the chain, which must
    not change the masked leaves, each with the message if it does.
    """
    if isinstance(node, PruneState):
        fault = fault or next((why for why, other in later if _may_change(other, node)), None)
        if fault is not None:
            raise ValueError(f"the prune state at state{path} {fault}, so pruned weights would not stay 0")
        _refuse_converted(node, f"in the prune state at state{path} the")
        yield path, node
        return
    children = _children(node)
    for i, (key, child) in enumerate(children):
        below, after = fault, later
        if type(node) in (tuple, OrderedDict):
            why = f"is not the last of its chain (a state of {len(children)}, at {i})"
            after = (*later, *((why, other) for _, other in children[i + 1 :]))
        elif isinstance(node, optax.LookaheadState):
            below = "is inside optax.lookahead, which mixes slow weights into its updates; chain prune after it"
        elif isinstance(node, MechanicState):
            below = "is inside optax.contrib.mechanize, which scales its updates; chain prune after it"
        elif isinstance(node, optax.ConditionallyTransformState):
            below = "is inside optax.conditionally_transform, which skips it at some steps; chain prune after it"
        elif isinstance(node, SAMState) and node.cache is not None:
            below = "is inside optax.contrib.sam, which moves its updates; chain prune after it"
        yield from _prune_states(child, path + key, below, after)


def _may_change(node: PyTree, earlier: PruneState) -> bool:
    """Whether the transformation with this state may change leaves that an earlier prune transformation masks.

    A prune transformation changes the leaves that it masks. A transformation inside ``optax.masked`` changes some
    leaves, and its state shows which if it has an array for each; if it has none, it is assumed to change other leaves,
    if there are any.
    """
    if type(node) in (tuple, OrderedDict):
        return any(_may_change(child, earlier) for _, child in _children(node))
    if not isinstance(node, PruneState | optax.MaskedState):
        return True
    entries, _ = jax.tree_util.tree_flatten_with_path(earlier.masks, is_leaf=_absent)
    masked = {path_string(key_path): not _absent(mask) for key_path, mask in entries}
    if isinstance(node, optax.MaskedState) and all(masked.values()):
        return True
    for key_path, leaf in jax.tree_util.tree_flatten_with_path(node, is_leaf=_absent)[0]:
        # The longest end of the path that names a parameter: 'mu/a/kernel' belongs to 'a/kernel', not to 'kernel'.
        ends = (path_string(key_path[i:]) for i in range(len(key_path)))
        parameter = next((end for end in ends if end in masked), None)
        if parameter is not None and masked[parameter] and not _absent(leaf):
            return True
    return False


def _children(node: PyTree) -> list[tuple[str, PyTree]]:
    """Return the children of a node with their names; a leaf has none."""
    below: Callable[[PyTree], bool] = lambda child: child is not node
    entries, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=below)
    return [(jax.tree_util.keystr(key_path), child) for key_path, child in entries if key_path]


def _absent(mask: PyTree) -> bool:
    return mask is None or isinstance(mask, optax.MaskedNode)


def _merge(a: PyTree, b: PyTree, path: str) -> PyTree:
    """Merge two trees of masks that have no leaf in common."""
    if _absent(a) or _absent(b):
        return b if _absent(a) else a
    below, others = _children(a), _children(b)
    if not below or [key for key, _ in below] != [key for key, _ in others]:
        raise ValueError(
            f"two prune transformations have a mask of the same leaf {path or '(the only one)'}; "
            "give them disjoint where="
        )
    merged = [_merge(x, y, path + key) for (key, x), (_, y) in zip(below, others, strict=True)]
    return jax.tree.unflatten(jax.tree.structure(a, is_leaf=lambda child: child is not a), merged)
