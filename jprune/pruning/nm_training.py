"""Train n:m sparse networks from scratch by sparse-refined straight-through estimation (SR-STE)."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, PyTree

from jprune.graph.axes import Axes, Shapes, known_shapes, shapes_of, where_of
from jprune.pruning.amounts import integer
from jprune.pruning.conditional import where_due
from jprune.pruning.dynamics import refuse_no_transformation
from jprune.pruning.selection.patterns import nm_masks
from jprune.pruning.state import trained
from jprune.trees import Leaf, Where, flatten, is_placeholder, map_leaves, match, only


class SrSteState(NamedTuple):
    """The state of ``sr_ste``.

    Attributes:
      count: int32 scalar, the number of earlier updates.
      masks: bool arrays like the parameters, True where a weight is used; None for leaves without a pattern.
      inner: the state of the optimizer.
    """

    count: Array  # type: ignore[assignment]
    masks: PyTree
    inner: PyTree


def sr_ste(
    tx: optax.GradientTransformation,
    n: int = 2,
    m: int = 4,
    *,
    decay: float | Float[Array, ""] = 2e-4,
    every: int = 1,
    where: Where | None = None,
    axes: Axes = None,
) -> optax.GradientTransformationExtraArgs:
    """Train an n:m sparse network: the model uses the n largest of every m dense weights (SR-STE).

    One step, for weights w, masks E of the n:m pattern of |w| and the loss's gradient g at the masked weights:

        w <- w - rate (g(E w) + decay (1 - E) w)

    The gradient reaches every weight unchanged (straight-through), so masked weights can return; the decay term
    pulls them to 0, which keeps the masks from changing back and forth. The loss takes the masked weights with
    ``straight_through``:

    >>> import jprune
    >>> tx = sr_ste(optax.sgd(0.1), n=1, m=2, decay=0.5)
    >>> params = {"kernel": jnp.array([[1.0], [0.5]])}
    >>> state = tx.init(params)
    >>> loss = lambda params, masks: jnp.sum(jprune.straight_through(params, masks)["kernel"])
    >>> updates, state = tx.update(jax.grad(loss)(params, state.masks), state, params)
    >>> params = optax.apply_updates(params, updates)
    >>> params["kernel"][:, 0]  # 1 - .1 * 1, .5 - .1 (1 + .5 * .5)
    Array([0.9  , 0.375], dtype=float32)
    >>> sparse = jprune.apply_masks(params, state.masks)  # what to evaluate and to keep

    Args:
      tx: the optimizer; the decay term is added to the gradients that it receives. With ``optax.lookahead`` the masks
        are those of the fast weights.
      n: number of weights in each group that the model uses.
      m: number of weights in a group.
      decay: coefficient of the decay term on masked weights.
      every: number of updates between two updates of the masks.
      where: predicate on (path, leaf) that selects the leaves with the pattern; None as for ``prune``.
      axes: roles of the axes of the parameters, as for ``nm_masks``; groups run along the inputs.

    Returns:
      An optax transformation with an ``SrSteState``; ``state.masks`` are the masks for the next loss (inside other
      wrappers, ``optax.tree.get(state, "masks")``).

    Raises:
      TypeError: ``tx`` is not an optax transformation, or a number has the wrong type.
      ValueError: ``n``, ``m``, ``every`` or ``decay`` is out of range; at ``init``, m does not divide the axis of a
        kernel or ``where`` selects nothing; while tracing, no ``params`` or trees that do not match.

    Source: Zhou et al., "Learning N:M Fine-grained Structured Sparse Neural Networks From Scratch", ICLR 2021,
    arXiv 2102.04010, equation 9.
    """
    refuse_no_transformation("tx", tx)
    integer("every", every, least=1)
    integer("n", n, least=1, most=integer("m", m, least=1))
    if not isinstance(decay, int | float) and not hasattr(decay, "dtype"):  # an array: optax.inject_hyperparams
        raise TypeError(f"decay={decay!r} is not a number; pass a number of 0 or more")
    if isinstance(decay, int | float) and not decay >= 0.0:
        raise ValueError(f"decay={decay} is negative; pass a number of 0 or more")
    inner = optax.with_extra_args_support(tx)

    def pattern_of(weights: PyTree, shapes: Shapes) -> PyTree:
        with known_shapes(shapes):
            return nm_masks(map_leaves(jnp.abs, weights), n=n, m=m, axes=axes)

    def init(params: PyTree) -> SrSteState:
        if is_placeholder(params):
            return SrSteState(jnp.zeros([], jnp.int32), params, inner.init(params))
        weights = trained(params)
        chosen = only(weights, where_of(where, axes))
        return SrSteState(jnp.zeros([], jnp.int32), pattern_of(chosen, shapes_of(weights)), inner.init(params))

    def update(
        updates: PyTree, state: SrSteState, params: PyTree = None, **extra_args: object
    ) -> tuple[PyTree, SrSteState]:
        if params is None:
            raise ValueError("sr_ste needs params: call update(updates, state, params)")
        decayed = _with_decay(updates, trained(params), state.masks, decay)
        updates, inner_state = inner.update(decayed, state.inner, params, **extra_args)
        count = optax.safe_increment(state.count)
        new = trained(optax.apply_updates(params, updates))
        weights = map_leaves(lambda weight, mask: None if mask is None else weight, new, state.masks)
        due = count % jnp.asarray(every, count.dtype) == 0
        refresh: Callable[..., PyTree] = lambda masks, weights: pattern_of(weights, shapes_of(new))
        masks = where_due(due, refresh, state.masks, weights)
        return updates, SrSteState(count, masks, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def _with_decay(updates: PyTree, params: PyTree, masks: PyTree, decay: float | Float[Array, ""]) -> PyTree:
    _, given, treedef = flatten(updates)
    weights = match(updates, params, reference_name="updates", name="params")
    matched = match(updates, masks, reference_name="updates", name="the masks of the optimizer state")

    def pulled(step: Leaf, weight: Leaf, mask: Leaf) -> Leaf:
        if step is None or mask is None:
            return step
        return step + jnp.where(mask, jnp.zeros_like(step), jnp.asarray(decay, step.dtype) * weight.astype(step.dtype))

    return jax.tree.unflatten(treedef, [pulled(*leaf) for leaf in zip(given, weights, matched, strict=True)])
