"""Pruning as an optax transformation, the last link of a chain.

The link hands on ``where(mask, update, -param)``, so that adding the update leaves a pruned weight at
exactly 0 whatever came before it: momentum, decay, a rescaled step. There is no hook to call after
the step.

Flax's Linen ``TrainState`` drops extra arguments. Where a score needs ``grad`` or ``batch``, use a
subclass that forwards them:

>>> import optax
>>> from flax.training import train_state
>>> class PrunedTrainState(train_state.TrainState):
...     def apply_gradients(self, *, grads, batch=None, **changes):
...         updates, opt_state = self.tx.update(grads, self.opt_state, self.params, grad=grads, batch=batch)
...         params = optax.apply_updates(self.params, updates)
...         return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **changes)

``flax.nnx.Optimizer.update(model, grads, grad=grads, batch=batch)`` forwards them as it is.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jprune.pruning.dynamics import Regrow
from jprune.pruning.plan import Plan
from jprune.pruning.schedules import Schedule, entries
from jprune.pruning.scores.elementwise import Score, refuse_no_score
from jprune.pruning.selection.unstructured import global_masks
from jprune.pruning.state import PruneState, prunable, trained
from jprune.trees import Where, flatten, kernels, map_leaves, match, only

PyTree = Any


def prune(
    score: Score | Callable[..., PyTree],
    schedule: Schedule,
    *,
    where: Where = kernels,
    select: Callable[..., PyTree] = global_masks,
    min_keep: int = 0,
    regrow: Regrow | None = None,
    key: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Prune on a schedule and keep what is pruned at exactly 0; always the last link of its chain.

    At each step of the schedule the weights are scored, with the parameters as they are handed to
    ``update`` (where the gradient was taken), and the masks shrink to the scheduled count. Between
    those steps the link reads one byte of mask a weight and does nothing else: no recompilation, no
    word with the host. It works inside ``optax.partition``, ``masked``, ``inject_hyperparams``,
    ``MultiSteps`` and ``apply_if_finite`` and under ``jit``, ``vmap``, ``scan`` and sharding.
    After ``optax.lookahead`` it gives the fast and the slow weights the same masks. Inside
    ``optax.contrib.schedule_free`` it is exact for what is pruned at step 0; for a later step see
    ``reset_moments``.

    Its update takes, beside the usual ones, these arguments: ``grad``, a tree like the parameters, the
    gradient for scores that need one (under ``MultiSteps`` that of the last micro-batch); ``batch``,
    for scores that need data; ``key``, in place of the one given here.

    Args:
      score: what a weight is worth, such as ``magnitude()``, or a function with the signature of a ``Score``.
      schedule: ``{step: sparsity}``, where step s means the update called after s earlier ones. A float
        is the fraction removed of the selected weights, an int the number kept.
      where: predicate on (path, leaf): which leaves to prune.
      select: how scores become masks, such as ``global_masks`` or ``layer_masks``.
      min_keep: the least number of weights that every leaf keeps.
      regrow: which weights to bring back at each step of the schedule (dynamic sparse training).
      key: PRNG key for scores that need one; folded with the step (and, to regrow, with 1). Replicates under
        ``vmap`` have keys of their own if each makes its transformation inside the mapped function, or passes
        ``key`` to update.

    Returns:
      An optax transformation with a ``PruneState``: int32 count, bool masks (one byte a weight), key.

    Raises:
      TypeError: the score is none (``jprune.magnitude`` without its parentheses), or the schedule is no table of
        numbers; at ``init``, ``where`` is no function.
      ValueError: the schedule is out of range; ``where`` selects nothing; the number kept rises without
        ``regrow``. While tracing: no ``params``, no ``grad``, ``batch`` or key for a score that
        needs it, or trees that do not match; the message names the leaf.

    >>> import jprune
    >>> tx = optax.chain(optax.sgd(0.1), prune(jprune.magnitude(), {0: 0.5}))
    >>> params = {"kernel": jnp.array([[3.0, -1.0]]), "bias": jnp.array([0.0, 0.0])}
    >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'bias': Array([-0.1, -0.1], dtype=float32), 'kernel': Array([[2.9, 0. ]], dtype=float32)}
    """
    refuse_no_score(score)
    plan = Plan(score, dict(entries(schedule)), select, min_keep, regrow)
    # Inside jit this is nothing; an eager update it saves from tracing and compiling every time.
    advance = jax.jit(plan.advance)

    def init(params: PyTree) -> PruneState:
        weights = only(trained(params), where)
        plan.check(weights)
        masks = map_leaves(lambda weight: jnp.ones_like(weight, dtype=bool), weights)
        return PruneState(jnp.zeros([], jnp.int32), _spread(masks, params), jax.tree.map(jnp.copy, key))

    def update(
        updates: PyTree,
        state: PruneState,
        params: PyTree = None,
        *,
        grad: PyTree = None,
        batch: Any = None,
        key: Any = None,
        **_: Any,
    ) -> tuple[PyTree, PruneState]:
        if params is None:
            raise ValueError("prune needs params: call update(updates, state, params)")
        old = trained(state.masks)
        weights = prunable(trained(params), old)
        evidence = plan.evidence(weights, grad, batch, state.key if key is None else key, trained(params))
        masks = advance(state.count, old, weights, evidence)
        # A weight that regrows at this step starts from 0: the update it was handed is made of momentum
        # that it gathered while it was pruned.
        alive = masks if regrow is None else map_leaves(jnp.logical_and, masks, old)
        held = _hold(updates, params, _spread(alive, params))
        return held, PruneState(optax.safe_increment(state.count), _spread(masks, params), state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def keep_zeros(*, where: Where = kernels) -> optax.GradientTransformationExtraArgs:
    """Keep at exactly 0 what is 0 at init: fine-tuning of pruned weights; the last link of its chain.

    Args:
      where: predicate on (path, leaf): in which leaves.

    Returns:
      An optax transformation with a ``PruneState``: int32 count, bool masks (one byte a weight).

    Raises:
      ValueError: ``where`` selects nothing; while tracing, no ``params`` or trees that do not match.

    >>> tx = optax.chain(optax.sgd(0.1), keep_zeros())
    >>> params = {"kernel": jnp.array([[0.0, 1.0]])}
    >>> updates, state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[0. , 0.9]], dtype=float32)}
    """

    def init(params: PyTree) -> PruneState:
        weights = only(trained(params), where)
        masks = map_leaves(lambda weight: weight != 0, weights)
        return PruneState(jnp.zeros([], jnp.int32), _spread(masks, params), None)

    def update(updates: PyTree, state: PruneState, params: PyTree = None, **_: Any) -> tuple[PyTree, PruneState]:
        if params is None:
            raise ValueError("keep_zeros needs params: call update(updates, state, params)")
        held = _hold(updates, params, state.masks)
        return held, state._replace(count=optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)


def _spread(masks: PyTree, params: PyTree) -> PyTree:
    """The masks of all parameters, which under ``optax.lookahead`` are the fast and the slow weights."""
    if isinstance(params, optax.LookaheadParams):
        return optax.LookaheadParams(fast=masks, slow=jax.tree.map(jnp.copy, masks))
    return masks


def _hold(updates: PyTree, params: PyTree, masks: PyTree) -> PyTree:
    """The update where the mask is True, and elsewhere the one that leads to exactly 0."""
    paths, given, treedef = flatten(updates)
    own, leaves, _ = flatten(params)
    matched = match(params, masks, reference_name="params", name="the masks of the optimizer state")
    match(params, updates, reference_name="params", name="updates")
    found = {path: pair for path, *pair in zip(own, leaves, matched, strict=True)}
    return jax.tree.unflatten(
        treedef, [_held(u, *found.get(path, (None, None))) for path, u in zip(paths, given, strict=True)]
    )


def _held(update: Any, param: Any, mask: Any) -> Any:
    if update is None or mask is None:
        return update
    # The wider of the two dtypes represents both, so that -param is the exact opposite of param.
    if update.dtype == param.dtype:
        dtype = param.dtype
    elif update.dtype.itemsize == param.dtype.itemsize:
        dtype = np.dtype(np.float32)
    else:
        dtype = max(update.dtype, param.dtype, key=lambda dtype: dtype.itemsize)
    return jnp.where(mask, update.astype(dtype), -param.astype(dtype))
