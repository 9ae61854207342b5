"""A computation that runs only where it is due, in place, also under ``vmap``.

A ``lax.cond`` whose other branch hands its operand through copies that operand, and ``jax.vmap`` of one with a
batched predicate is a ``select`` that runs both branches at every step. A loop that runs at most once does
neither: what a loop carries is updated in place, and a batched loop runs while any replicate has to.
"""

from collections.abc import Callable
from typing import TypeVar

import jax
from jaxtyping import Array, Bool, PyTree

T = TypeVar("T")
_barrier: Callable[[T], T] = jax.lax.optimization_barrier


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

    >>> import jax.numpy as jnp
    >>> where_due(jnp.array(False), lambda x: -x, jnp.array([1, 2]))
    Array([1, 2], dtype=int32)
    """
    arguments = jax.lax.stop_gradient((current, operands))
    # What ``compute`` closes over (a traced weight decay, a replicate's data) must be behind the barrier too.
    closed = jax.make_jaxpr(lambda arguments: compute(arguments[0], *arguments[1]))(arguments)
    treedef = jax.tree.structure(current)
    others = jax.lax.stop_gradient([*closed.consts, *jax.tree.leaves(arguments[1])])

    def once(carry: tuple[Array, list[Array]]) -> tuple[Array, list[Array]]:
        due, leaves = carry
        # The loop changes none of the others. Without the barrier XLA would move what depends on them alone (scores,
        # say) to before the loop, where it runs at every step.
        leaves, read = _barrier((leaves, others))
        consts, rest = read[: len(closed.consts)], read[len(closed.consts) :]
        fresh: list[Array] = jax.core.eval_jaxpr(closed.jaxpr, consts, *leaves, *rest)
        return due & False, fresh

    _, leaves = jax.lax.while_loop(lambda carry: carry[0], once, (due, jax.tree.leaves(arguments[0])))
    return jax.tree.unflatten(treedef, leaves)
