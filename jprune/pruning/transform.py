"""Pruning as an optax transformation, the last one of a chain.

It returns ``where(mask, update, -param)``, so that adding the update sets a pruned weight to exactly 0 after any
other transformation, such as momentum, weight decay or a rescaled step. No call is needed after the step.

Flax's Linen ``TrainState`` drops extra arguments. If a score needs ``grad`` or ``batch``, use a subclass that forwards
them:

>>> import optax
>>> from flax.training import train_state
>>> class PrunedTrainState(train_state.TrainState):
...     def apply_gradients(self, *, grads, batch=None, **changes):
...         updates, opt_state = self.tx.update(grads, self.opt_state, self.params, grad=grads, batch=batch)
...         params = optax.apply_updates(self.params, updates)
...         return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **changes)

``flax.nnx.Optimizer.update(model, grads, grad=grads, batch=batch)`` forwards them without a subclass.
"""

import functools
import math
import types
import warnings
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jprune.graph.axes import Axes, KernelAxes, Shapes, kernel_axes, known_shapes, shapes_of, where_of
from jprune.pruning.amounts import Amount, as_keywords, renamed_arguments
from jprune.pruning.dynamics import Regrow
from jprune.pruning.plan import Plan, Progress
from jprune.pruning.schedules import Schedule, entries, unwrapped
from jprune.pruning.scores.elementwise import Score, refuse_no_score
from jprune.pruning.selection.as_published import bernoulli_masks, legacy_signed_masks
from jprune.pruning.selection.unstructured import global_masks
from jprune.pruning.state import PruneState, masked_weights, refuse_restored, trained
from jprune.trees import (
    Where,
    flatten,
    is_float,
    is_placeholder,
    kernels,
    map_leaves,
    match,
    only,
    refuse_arguments,
    refuse_sum,
    with_article,
)


@renamed_arguments(select="selection=")
def prune(
    score: Score | Callable[..., PyTree],
    schedule: Schedule,
    *,
    where: Where | None = None,
    selection: Callable[..., PyTree] = global_masks,
    axes: Axes = None,
    min_keep: int = 0,
    regrow: Regrow | None = None,
    key: PRNGKeyArray | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Prune on a schedule and keep pruned weights at exactly 0; the last transformation of a chain.

    At each step of the schedule the parameters passed to ``update`` are scored, and the masks shrink to the scheduled
    amount. Between those steps it only reads one byte of mask per weight, without recompilation and, on a CPU or
    TPU, without host synchronization. If the count jumped over steps, or a run was resumed with another schedule, the
    next update applies the last entry whose step has been reached.

    Scores with NaN cannot be ranked, so a selection with one is skipped. Outside jit this is an error. Inside jit the
    masks stay as they are, every update tries the entry again until its scores have no NaN, and ``check_pruned`` raises
    an error. Where gradients may overflow, wrap the chain in ``optax.apply_if_finite``, which skips
    updates with NaN altogether.

    It works inside ``optax.partition``, ``masked``, ``MultiSteps`` and ``apply_if_finite``, inside
    ``inject_hyperparams`` if this is given a function that makes the whole chain, and under ``jit``, ``vmap``, ``scan``
    and sharding. After ``optax.lookahead`` the fast and the slow weights have the same masks. After a line search
    (``optax.lbfgs``) compute the value and the gradient with ``jax.value_and_grad``; those that
    ``optax.value_and_grad_from_state`` returns belong to the parameters before masking. Inside
    ``optax.contrib.schedule_free`` pruning is exact at step 0; for later steps see ``reset_moments``.

    ``update`` also takes ``grad``, a tree like the parameters, for scores that need the gradient (under ``MultiSteps``
    that of the last micro-batch); ``batch``, for scores that need data; and ``key``, which replaces the one given here.

    Args:
      score: weight importance score, such as ``magnitude()``, or a function with the signature of a ``Score``.
      schedule: ``{step: sparsity}``, where step s means the update called after s earlier ones. A float is the fraction
        of the selected weights removed; ``jprune.Keep(count)`` is the number kept; ``{regex: sparsity}`` gives an
        amount for each layer (with ``selection=jprune.layer_masks``).
      where: predicate on (path, leaf) that selects the leaves to prune; see ``by_path`` and ``prunable``. None uses the
        ``where`` of the score, if it has one. Otherwise it selects the leaves that ``kernels`` selects, or with a graph
        as ``axes`` the kernels of its matrix products and convolutions, or with a convention as ``axes`` that library's
        kernels: "flax" adds ``lora_a`` and ``lora_b``; "equinox" adds ``weight_ih`` and ``weight_hh`` and leaves out
        ``kernel``.
      selection: function from scores to masks, such as ``global_masks`` or ``layer_masks``, or any callable with the
        signature of ``global_masks``. One that passes its amount to a selection of jprune is compiled once for the
        whole schedule; one that computes with its amount is compiled once per amount. ``min_keep`` and ``axes`` are
        passed to it only if they are given here. ``jprune.structured`` removes whole channels: ``where`` then selects
        the leaves that are scored, and the other leaves with these channels are masked too.
      axes: roles of the axes of the parameters, for selections that depend on layers, inputs or outputs: a graph made
        by ``jprune.trace_model``, ``{regex: KernelAxes(...)}``, "flax" or "equinox".
      min_keep: minimum number of weights that every layer keeps.
      regrow: how to bring weights back at each step of the schedule (dynamic sparse training).
      key: PRNG key for scores that need one; folded with the step (and, to regrow, with 1). To give each replicate
        under ``vmap`` its own key, create the transformation inside the mapped function or pass ``key`` to ``update``.

    Returns:
      An optax transformation with a ``PruneState``: int32 count, bool masks (one byte per weight), key, uint32 checksum
      of the entry applied last.

    Raises:
      TypeError: ``score`` is not a valid score (``jprune.magnitude`` without its parentheses), ``selection`` cannot
        be called as a selection, ``schedule`` is not a dict of amounts, ``regrow`` is not a ``Regrow``, or ``key`` is
        not one PRNG key; at ``init``, ``where`` is not a function.
      ValueError: the schedule is out of range, or ``regrow`` is given with a selection that keeps no exact count or
        ranks by absolute value (``magnitude=True``). At ``init``: ``where`` selects nothing; the number kept, in total
        or in a layer, rises without ``regrow``; the selection does not fit the weights (for example groups that do not
        divide an axis). Outside jit: scores contain NaN. While tracing: ``params`` is missing, ``grad``, ``batch`` or a
        key is missing for a score that needs it, or trees do not match; the message names the leaf.

    >>> import jprune
    >>> tx = optax.chain(optax.sgd(0.1), prune(jprune.magnitude(), {0: 0.5}))
    >>> params = {"kernel": jnp.array([[3.0, -1.0]]), "bias": jnp.array([0.0, 0.0])}
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'bias': Array([-0.1, -0.1], dtype=float32), 'kernel': Array([[2.9, 0. ]], dtype=float32)}
    """
    refuse_no_score(score)
    table = dict(entries(schedule))
    refuse_no_selection(selection, table, {"axes": axes, "min_keep": min_keep or None})
    if regrow is not None and not isinstance(regrow, Regrow):
        raise TypeError(f"regrow={regrow!r} is {with_article(regrow)}; it must be jprune.Regrow(score, fraction)")
    if regrow is not None and (inexact := unwrapped(selection)) in (bernoulli_masks, legacy_signed_masks):
        raise ValueError(
            f"regrow= adds weights until a count is reached, and {inexact.__name__} keeps no exact count; use another "
            "selection, such as global_masks"
        )
    if regrow is not None and isinstance(selection, functools.partial) and selection.keywords.get("magnitude"):
        raise ValueError(
            "regrow= gives weights that must not be kept a score of -inf, which magnitude=True would rank first; leave "
            "magnitude=True out and pass a score that is larger for weights to keep, such as jprune.magnitude()"
        )
    _refuse_no_key(key)
    if where is None and isinstance(score, Score):
        where = score.where
    scored = where_of(where, getattr(selection, "graph", None) if axes is None else axes)
    masked = _masked_leaves(scored, selection)
    plan = Plan(score, table, selection, axes, min_keep, regrow)

    # Outside jit, this avoids tracing and compiling at every update.
    @functools.partial(jax.jit, static_argnums=4)
    def advance(
        progress: Progress, masks: PyTree, weights: PyTree, inputs: dict[str, PyTree], shapes: Shapes
    ) -> tuple[PyTree, Array]:
        with known_shapes(shapes):
            return plan.advance(progress, masks, weights, inputs)

    def init(params: PyTree) -> PruneState:
        if is_placeholder(params):
            return PruneState(jnp.zeros([], jnp.int32), params, key, jnp.zeros([], jnp.uint32))
        with known_shapes(shapes_of(trained(params))):
            plan.check(only(trained(params), scored))
        masks = map_leaves(lambda weight: jnp.ones_like(weight, dtype=bool), only(trained(params), masked))
        own_key = jax.tree.map(jnp.copy, key)
        return PruneState(jnp.zeros([], jnp.int32), _for_all(masks, params), own_key, jnp.zeros([], jnp.uint32))

    def update(
        updates: PyTree,
        state: PruneState,
        params: PyTree = None,
        *,
        grad: PyTree = None,
        batch: PyTree = None,
        key: Array | None = None,
        **_: object,
    ) -> tuple[PyTree, PruneState]:
        if params is None:
            raise ValueError("prune needs params: call update(updates, state, params)")
        refuse_restored(state, "prune")
        _warn_of_old_state(state)
        before = trained(state.masks)
        weights = masked_weights(trained(params), before)
        if masked is not scored:
            weights = _selected(weights, scored)
        inputs = plan.inputs(weights, grad, batch, state.key if key is None else key, trained(params))
        applied = jnp.zeros_like(state.count, jnp.uint32) if state.applied is None else state.applied
        progress = Progress(state.count, applied)
        shapes = shapes_of(trained(params))
        masks, now_applied = advance(progress, before, weights, inputs, shapes)
        with known_shapes(shapes):
            plan.refuse_nan(progress, now_applied, before, weights, inputs)
            plan.warn_of_entry(applied, now_applied, before, masks)
        # A weight that regrows at this step starts from 0: the update for it comes from momentum gathered while
        # it was pruned.
        moving = masks if regrow is None else map_leaves(jnp.logical_and, masks, before)
        updates = _masked_updates(updates, params, _for_all(moving, params))
        count = optax.safe_increment(state.count)
        return updates, PruneState(count, _for_all(masks, params), state.key, now_applied)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_zeros(*, where: Where | None = None) -> optax.GradientTransformationExtraArgs:
    """Keep weights that are 0 at init at exactly 0, to fine-tune pruned weights; the last transformation of a chain.

    Args:
      where: predicate on (path, leaf) that selects the leaves whose zeros are kept; None selects the leaves that
        ``kernels`` selects.

    Returns:
      An optax transformation with a ``PruneState``: int32 count, bool masks (one byte per weight).

    Raises:
      ValueError: ``where`` selects nothing; while tracing, no ``params`` or trees that do not match.

    Outside jit, ``init`` warns if no weight is 0, because nothing would be kept at 0.

    >>> tx = optax.chain(optax.sgd(0.1), keep_zeros())
    >>> params = {"kernel": jnp.array([[0.0, 1.0]])}
    >>> updates, state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[0. , 0.9]], dtype=float32)}
    """

    def init(params: PyTree) -> PruneState:
        if is_placeholder(params):
            return PruneState(jnp.zeros([], jnp.int32), params, None)
        weights = only(trained(params), kernels if where is None else where)
        masks = map_leaves(lambda weight: weight != 0, weights)
        _warn_of_no_zero(masks)
        return PruneState(jnp.zeros([], jnp.int32), _for_all(masks, params), None)

    def update(updates: PyTree, state: PruneState, params: PyTree = None, **_: object) -> tuple[PyTree, PruneState]:
        if params is None:
            raise ValueError("keep_zeros needs params: call update(updates, state, params)")
        refuse_restored(state, "keep_zeros")
        updates = _masked_updates(updates, params, state.masks)
        return updates, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _warn_of_old_state(state: PruneState) -> None:
    """Warn, while tracing, if the state of an earlier version lacks an array that the update adds."""
    if state.applied is not None or not isinstance(state.count, jax.core.Tracer):
        return
    warnings.warn(
        "the state of prune was saved by an earlier version and has no `applied`; this update adds it, which changes "
        "the structure of the state and is an error inside scan and while_loop. Add it before a loop: "
        "state = optax.tree_utils.tree_set(state, applied=jnp.zeros([], jnp.uint32))",
        stacklevel=3,
    )


def _warn_of_no_zero(masks: PyTree) -> None:
    """Warn, outside jit, if masks prune nothing."""
    leaves = [mask for mask in jax.tree.leaves(masks) if mask.size]
    if any(isinstance(mask, jax.core.Tracer) for mask in leaves) or not all(bool(jnp.all(mask)) for mask in leaves):
        return
    warnings.warn(
        "keep_zeros has no zero to keep: the prunable leaves of the parameters given to init have none; pass it pruned "
        "weights: tx.init(jprune.apply_masks(params, masks))",
        stacklevel=3,
    )


def refuse_no_selection(selection: object, table: Mapping[int, Amount], options: Mapping[str, object]) -> None:
    """Raise if ``selection`` cannot be called with scores and the amounts of the schedule.

    Args:
      selection: the argument to check.
      table: the amount of each step.
      options: further keyword arguments; those that are None are not passed.

    Raises:
      TypeError: ``selection`` cannot be called with scores and amounts.
    """
    wanted = (
        "it must be a function from scores to masks with the signature of jprune.global_masks: pass "
        "selection=jprune.global_masks or selection=jprune.layer_masks"
    )
    if not callable(selection):
        raise TypeError(f"selection is {with_article(selection)}; {wanted}")
    given = {name: value for name, value in options.items() if value is not None}
    for amount in table.values():
        refuse_arguments(
            selection, f"selection={selection!r}", wanted, None, **as_keywords(amount), among=None, **given
        )


def _refuse_no_key(key: object) -> None:
    """Raise if ``key`` is not one PRNG key.

    Raises:
      TypeError: ``key`` is a seed, several keys or anything else.
    """
    dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and shape == ()
    raw = dtype is not None and dtype == np.uint32 and shape is not None and len(shape) == 1
    if key is not None and not (typed or raw):
        given = f"{dtype}{list(shape)}" if shape is not None else repr(key)
        raise TypeError(f"key is {given}; it must be one PRNG key: key=jax.random.key(0)")


def _masked_leaves(scored: Where, selection: Callable[..., PyTree]) -> Where:
    """Return a predicate for the leaves with a mask: those scored, and all leaves of channels that are removed."""
    loses_channels = getattr(selection, "loses_channels", None)
    if loses_channels is None:
        return scored
    return lambda path, leaf: scored(path, leaf) or loses_channels(path)


def _selected(weights: PyTree, where: Where) -> PyTree:
    """Return the weights that ``where`` selects; None for the others."""
    paths, leaves, treedef = flatten(weights)
    chosen = [
        leaf if leaf is not None and where(path, leaf) else None for path, leaf in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, chosen)


class PrunableLeaf(NamedTuple):
    """A leaf that ``where`` selects.

    Attributes:
      path: path of the leaf.
      shape: shape of the leaf.
      axes: roles of its axes, or None if they are unknown.
    """

    path: str
    shape: tuple[int, ...]
    axes: KernelAxes | None


class PrunableLeaves(tuple[PrunableLeaf, ...]):
    """The leaves that ``where`` selects; ``print`` shows them as a table.

    As the ``axes=`` of any function it gives the axes of all leaves, which it resolved on all parameters.

    Attributes:
      others: float leaves with two or more axes that ``where`` does not select.
      axes: the axes of each leaf of the parameters, by path, or None if they are unknown.
      shapes: the shape of each leaf, by path.
    """

    others: tuple[PrunableLeaf, ...] = ()
    axes: Mapping[str, KernelAxes | None] = types.MappingProxyType({})
    shapes: Mapping[str, tuple[int, ...]] = types.MappingProxyType({})

    @property
    def kernels(self) -> tuple[str, ...]:
        """The paths of the selected leaves."""
        return tuple(leaf.path for leaf in self)

    @property
    def unknown(self) -> dict[str, str]:
        """Why the axes of a leaf are unknown, by path."""
        return {path: "its name and shape are ambiguous" for path, axes in self.axes.items() if axes is None}

    def __str__(self) -> str:
        rows = [("leaf", "shape", "weights", "axes"), *(_row(leaf) for leaf in self)]
        rows.append(("total", "", f"{sum(math.prod(leaf.shape) for leaf in self):,}", ""))
        rows += [("not selected", "", "", ""), *(_row(leaf) for leaf in self.others)] if self.others else []
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows]
        return "\n".join(lines)


def prunable(params: PyTree, where: Where | None = None, axes: Axes = None) -> PrunableLeaves:
    """List the leaves that ``where`` selects, with shapes and the roles of their axes.

    Without ``where`` and without a graph as ``axes``, leaves are selected by name (see ``kernels`` for the rule). This
    can select a leaf that is not a kernel (``weight`` of an Equinox embedding) or miss one (``weight_ih`` of an Equinox
    LSTM), so the table also lists the matrices that are not selected.

    Args:
      params: tree of arrays, or of their shapes.
      where: predicate on (path, leaf); None as for ``prune``.
      axes: see ``prune``; without it the roles are inferred from names and shapes, or "unknown" if ambiguous.

    Returns:
      A tuple of (path, shape, axes). Its attribute ``others`` has the same for float leaves with two or more axes that
      are not selected. ``print`` shows both as a table.

    Raises:
      TypeError: ``where`` is not a function.
      ValueError: ``where`` selects nothing.

    >>> params = {"body": {"kernel": jnp.ones((3, 8)), "bias": jnp.ones(8)}, "blocks": {"kernel": jnp.ones((4, 8, 8))}}
    >>> params["cell"] = {"weight_hh": jnp.ones((8, 2))}
    >>> print(prunable(params))
    leaf            shape      weights  axes
    blocks/kernel   (4, 8, 8)      256  unknown
    body/kernel     (3, 8)          24  inputs 0, outputs 1
    total                          280
    not selected
    cell/weight_hh  (8, 2)          16  inputs 1, outputs 0
    """
    selected = only(params, where_of(where, axes))
    roles = kernel_axes(axes, params)
    paths, leaves, _ = flatten(params)
    chosen = [leaf is not None for leaf in flatten(selected)[1]]
    rows = [
        (PrunableLeaf(path, tuple(leaf.shape), roles[path]), taken)
        for path, leaf, taken in zip(paths, leaves, chosen, strict=True)
        if taken or (is_float(leaf) and leaf.ndim >= 2)
    ]
    found = PrunableLeaves(row for row, taken in rows if taken)
    found.others = tuple(row for row, taken in rows if not taken)
    found.axes, found.shapes = roles, dict(shapes_of(params))
    return found


def _row(leaf: PrunableLeaf) -> tuple[str, str, str, str]:
    if leaf.axes is None:
        roles = "unknown"
    else:
        named = [(role, getattr(leaf.axes, role)) for role in ("stacked", "inputs", "outputs", "spatial")]
        roles = ", ".join(f"{role} {' '.join(map(str, axes))}" for role, axes in named if axes)
        roles += f", groups {leaf.axes.groups}" if leaf.axes.groups > 1 else ""
    return leaf.path, str(leaf.shape), f"{math.prod(leaf.shape):,}", roles


def _for_all(masks: PyTree, params: PyTree) -> PyTree:
    """Return the masks of all parameters; under ``optax.lookahead`` both the fast and the slow weights."""
    if isinstance(params, optax.LookaheadParams):
        return optax.LookaheadParams(fast=masks, slow=jax.tree.map(jnp.copy, masks))
    return masks


def _masked_updates(updates: PyTree, params: PyTree, masks: PyTree) -> PyTree:
    """Keep the update where the mask is True; elsewhere return the update that sets the weight to exactly 0."""
    paths, given, treedef = flatten(updates)
    param_paths, leaves, _ = flatten(params)
    matched = match(params, masks, reference_name="params", name="the masks of the optimizer state")
    match(params, updates, reference_name="params", name="updates")
    found = {path: pair for path, *pair in zip(param_paths, leaves, matched, strict=True)}
    return jax.tree.unflatten(
        treedef, [_masked_update(path, u, *found.get(path, (None, None))) for path, u in zip(paths, given, strict=True)]
    )


def _masked_update(path: str, update: Array | None, param: Array | None, mask: Array | None) -> Array | None:
    if update is None or param is None or mask is None:
        return update
    refuse_sum(path, param.dtype, update.dtype)
    # The wider of the two dtypes represents both exactly, so that param + (-param) is 0.
    if update.dtype == param.dtype:
        dtype = param.dtype
    elif update.dtype.itemsize == param.dtype.itemsize:
        dtype = np.dtype(np.float32)
    else:
        dtype = max(update.dtype, param.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))
