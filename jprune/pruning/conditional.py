"""A conditional that stays one under ``vmap``.

``jax.vmap`` of a ``lax.cond`` whose predicate is batched is a ``select``: both branches run at every
step. A selection over every weight that is due once in a hundred steps must not, so here the batched
conditional asks whether any replicate is due, and only then computes for all and picks for each.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

PyTree = Any
_Flat = Callable[[list[Any], list[Any]], list[Any]]


def where_due(due: Bool[Array, ""], compute: Callable[..., PyTree], current: PyTree, *operands: PyTree) -> PyTree:
    """``compute(current, *operands)`` where ``due``, else ``current``; computed only where some are due.

    Args:
      due: whether to compute, a scalar; under ``vmap`` one for each replicate.
      compute: gives a tree with the structure, shapes and dtypes of ``current``. It may close over
        arrays and tracers.
      current: the tree to replace.
      *operands: what else ``compute`` reads.

    Returns:
      A tree like ``current``. No gradient flows through it.

    >>> where_due(jnp.array(False), lambda x: -x, jnp.array([1, 2]))
    Array([1, 2], dtype=int32)
    """
    arguments = jax.lax.stop_gradient((current, operands))
    # A custom_vmap function may not close over a batched tracer, so whatever ``compute`` closes over
    # (a traced weight decay, a replicate's data) is turned into an argument.
    closed = jax.make_jaxpr(lambda arguments: compute(arguments[0], *arguments[1]))(arguments)
    leaves, treedef = jax.tree.flatten(current)

    def flat(current_leaves: list[Any], others: list[Any]) -> list[Any]:
        consts, rest = others[: len(closed.consts)], others[len(closed.consts) :]
        fresh: list[Any] = jax.core.eval_jaxpr(closed.jaxpr, consts, *current_leaves, *rest)
        return fresh

    others = [*closed.consts, *jax.tree.leaves(arguments[1])]
    return jax.tree.unflatten(treedef, _conditional(flat)(due, leaves, others))


def _conditional(compute: _Flat) -> Callable[..., list[Any]]:
    """The conditional for a ``compute`` whose arrays all have the leading axes of ``due``."""

    @jax.custom_batching.custom_vmap
    def conditional(due: Any, current: list[Any], others: list[Any]) -> list[Any]:
        def replace() -> list[Any]:
            fresh = compute(current, others)
            return [_pick(due, new, old) for new, old in zip(fresh, current, strict=True)]

        chosen: list[Any] = jax.lax.cond(jnp.any(due), replace, lambda: current)
        return chosen

    @conditional.def_vmap
    def batched(size: int, in_batched: Any, due: Any, current: list[Any], others: list[Any]) -> tuple[Any, Any]:
        due_batched, current_batched, others_batched = in_batched
        due = due if due_batched else _repeat(due, size)
        current = [x if b else _repeat(x, size) for x, b in zip(current, current_batched, strict=True)]
        each = jax.vmap(compute, in_axes=(0, [0 if b else None for b in others_batched]), axis_size=size)
        return _conditional(each)(due, current, others), [True] * len(current)

    return conditional


def _repeat(x: Any, size: int) -> Any:
    return jnp.broadcast_to(jnp.expand_dims(x, 0), (size, *x.shape))


def _pick(due: Any, new: Any, old: Any) -> Any:
    if due.ndim == 0:
        return new
    return jnp.where(due.reshape(due.shape + (1,) * (new.ndim - due.ndim)), new, old)
