"""Dynamic sparse training in one line: RigL and SET, built from ``prune``, ``Regrow`` and ``reset_moments``."""

import dataclasses
from collections.abc import Callable
from typing import Any

import optax
from jaxtyping import PRNGKeyArray, PyTree

from jprune.graph.axes import Axes
from jprune.pruning.amounts import checked, integer
from jprune.pruning.dynamics import Regrow, cosine_fraction, dense_gradient, refuse_no_transformation, reset_moments
from jprune.pruning.scores.elementwise import magnitude, random
from jprune.pruning.selection.unstructured import erk_masks
from jprune.pruning.transform import prune
from jprune.trees import Where


def rigl(
    tx: optax.GradientTransformation,
    sparsity: float,
    *,
    end: int,
    every: int = 100,
    fraction: float = 0.3,
    where: Where | None = None,
    selection: Callable[..., PyTree] = erk_masks,
    axes: Axes = None,
    min_keep: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Train with RigL: drop weights of small magnitude, grow those with the largest gradients, at constant sparsity.

    ``update`` needs ``grad``, the dense gradient: ``tx.update(grads, state, params, grad=grads)``. Step 0 keeps the
    weights with the largest initial magnitudes and exchanges none. Then, every ``every`` steps before ``end``, a part
    of each layer is exchanged: the fraction f / 2 (1 + cos(pi t / end)) at step t, where f is ``fraction``. Moments of
    pruned weights are reset.

    The paper starts from random masks. For these, put them into the state before the first update:
    ``jprune.with_masks(tx.init(params), jprune.selection.erk_masks(jprune.random()(params, key=key), sparsity=0.9))``.

    Args:
      tx: the optimizer.
      sparsity: the fraction of the weights removed.
      end: the first step at which the masks are fixed; the paper uses three quarters of the training.
      every: the number of steps between two exchanges.
      fraction: f, from which the fraction of the kept weights that is exchanged decreases.
      where: predicate on (path, leaf) that selects the leaves to prune; None as for ``prune``.
      selection: how the weights are divided among layers.
      axes: roles of the axes of each leaf; see ``prune``.
      min_keep: minimum number of weights that every layer keeps.

    Returns:
      An optax transformation that replaces ``tx``.

    Raises:
      TypeError, ValueError: an argument has the wrong type or is out of range, or no step exchanges a weight; also what
        ``prune`` raises.

    Source: Evci et al., "Rigging the Lottery", ICML 2020, arXiv 1911.11134, algorithm 1.

    >>> tx = rigl(optax.adam(1e-3), 0.9, end=75_000)
    """
    regrow = Regrow(dense_gradient(), cosine_fraction(fraction, end))
    return _at_constant_sparsity(
        tx, sparsity, end, every, regrow, where=where, selection=selection, axes=axes, min_keep=min_keep
    )


def sparse_evolution(
    tx: optax.GradientTransformation,
    sparsity: float,
    *,
    key: PRNGKeyArray,
    end: int,
    every: int = 100,
    fraction: float = 0.3,
    where: Where | None = None,
    selection: Callable[..., PyTree] = erk_masks,
    axes: Axes = None,
    min_keep: int = 0,
) -> optax.GradientTransformationExtraArgs:
    """Train with SET: drop weights of small magnitude and grow random ones, at constant sparsity.

    Arguments, result and the masks at step 0 are those of ``rigl`` (the paper also starts from random masks), but no
    gradient is needed; ``key`` draws the weights that grow. The same fraction is exchanged every ``every`` steps.

    Source: Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse Connectivity",
    Nature Communications 2018, arXiv 1707.04780, algorithm 1.

    >>> import jax
    >>> tx = sparse_evolution(optax.sgd(0.1, momentum=0.9), 0.9, key=jax.random.key(0), end=1000)
    """
    if key is None:
        raise TypeError("key is None; sparse_evolution draws random weights to grow: pass key=jax.random.key(...)")
    regrow = Regrow(random(), fraction)
    return _at_constant_sparsity(
        tx, sparsity, end, every, regrow, where=where, selection=selection, axes=axes, min_keep=min_keep, key=key
    )


def _at_constant_sparsity(
    tx: optax.GradientTransformation, sparsity: float, end: int, every: int, regrow: Regrow, **options: Any
) -> optax.GradientTransformationExtraArgs:
    """Check the arguments; prune by magnitude at step 0, then exchange weights every ``every`` steps before ``end``."""
    refuse_no_transformation("tx", tx)
    amount = checked("sparsity", sparsity)
    steps = range(0, integer("end", end, least=1), integer("every", every, least=1))
    exchange = dataclasses.replace(regrow, fraction=lambda step: regrow.at(step) if step else 0.0)
    if not any(map(exchange.at, steps)):
        raise ValueError(
            f"end={end}, every={every} and this fraction exchange no weight: exchanges are every {every} steps, "
            "after step 0 and before end; use an end above every and a fraction above 0, or use prune alone"
        )
    return reset_moments(tx, prune(magnitude(), dict.fromkeys(steps, amount), regrow=exchange, **options))
