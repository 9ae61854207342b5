"""Conditional in-place updates that also skip the computation under ``vmap``.

A ``lax.cond`` copies an operand that one branch returns unchanged, and under ``vmap`` with a batched predicate it
becomes a ``select`` that runs both branches at every step. A loop of at most one iteration avoids both: its carry is
updated in place, and a batched loop runs while any replicate needs it.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

import jax
from jaxtyping import Array, Bool, PyTree

T = TypeVar("T")
_barrier: Callable[[T], T] = jax.lax.optimization_barrier


def where_due(due: Bool[Array, ""], compute: Callable[..., PyTree], current: PyTree, *operands: PyTree) -> PyTree:
    """Return ``compute(current, *operands)`` if ``due``, else ``current``, without computing it needlessly.

    Args:
      due: whether to compute, a scalar; under ``vmap`` one for each replicate.
      compute: returns a tree with the structure, shapes and dtypes of ``current``. It may close over arrays and
        tracers.
      current: the tree to replace.
      *operands: further arguments of ``compute``.

    Returns:
      A tree like ``current``. No gradient flows through it.

    >>> import jax.numpy as jnp
    >>> where_due(jnp.array(False), lambda x: -x, jnp.array([1, 2]))
    Array([1, 2], dtype=int32)
    """

    def once(carry: tuple[Array, PyTree], *operands: PyTree) -> tuple[Array, PyTree]:
        return carry[0] & False, compute(carry[1], *operands)

    return while_due(lambda carry: carry[0], once, (due, current), *operands)[1]


def while_due(due: Callable[[T], Array], compute: Callable[..., T], current: T, *operands: PyTree) -> T:
    """Return ``compute(current, *operands)`` if ``due(current)``, else ``current``; see ``where_due``.

    The result of ``compute`` must not be due, or it is computed again without end. ``due`` is part of the loop, so what
    it compares costs no operation before it.

    >>> import jax.numpy as jnp
    >>> int(while_due(lambda x: x < 3, lambda x, y: x + y, jnp.array(2), jnp.array(10)))
    12
    """
    arguments = jax.lax.stop_gradient((current, operands))
    # Arrays that ``compute`` closes over (a traced weight decay, a replicate's data) need the barrier too.
    closed = jax.make_jaxpr(lambda arguments: compute(arguments[0], *arguments[1]))(arguments)
    treedef = jax.tree.structure(current)
    others = jax.lax.stop_gradient([*closed.consts, *jax.tree.leaves(arguments[1])])

    def once(leaves: Iterable[Array]) -> list[Array]:
        # The loop does not change the others. Without the barrier XLA would hoist computations that depend only on
        # them, such as scores, out of the loop, and they would run at every step.
        leaves, read = _barrier((leaves, others))
        consts, rest = read[: len(closed.consts)], read[len(closed.consts) :]
        fresh: list[Array] = jax.core.eval_jaxpr(closed.jaxpr, consts, *leaves, *rest)
        return fresh

    def unfinished(leaves: Iterable[Array]) -> Array:
        return due(jax.tree.unflatten(treedef, leaves))

    result: T = jax.tree.unflatten(treedef, jax.lax.while_loop(unfinished, once, jax.tree.leaves(arguments[0])))
    return result
