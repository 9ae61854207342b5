"""Weights that come back: regrowth (SET, RigL), moments that start fresh, straight-through gradients."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jprune.pruning.scores.elementwise import Score
from jprune.pruning.state import masks_of, trained
from jprune.trees import flatten, map_leaves, match, path_string

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Regrow:
    """Dynamic sparse training: at each step of the schedule some weights are dropped, others come back.

    With k the scheduled count and r = round(fraction k), the k - r kept weights of the best score
    survive; then as many others return, the best by ``score``, that k are kept. A weight that was
    dropped may return at once, and then it keeps its value. Any other starts from 0 at the next step.
    The schedule's entries may hold, lower or raise the sparsity: ``dict.fromkeys(range(0, 1000, 100), 0.9)``.

    SET (Mocanu et al. 2018, arXiv 1707.04780) is ``prune(magnitude(), ..., regrow=Regrow(random(), 0.3), key=key)``.
    RigL (Evci et al. 2020, arXiv 1911.11134) is ``prune(magnitude(), ..., regrow=Regrow(dense_gradient(),
    cosine_fraction(0.3, end)))``, for one count a layer with ``selection=layer_masks`` or ``erk_masks``.
    Put either in ``reset_moments``.

    Attributes:
      score: what a pruned weight is worth; larger returns first.
      fraction: of the scheduled count, how much is exchanged, in [0, 1]; or a function of the step,
        a Python int, that gives it.

    Raises:
      ValueError: the fraction is out of range.
    """

    score: Score | Callable[..., PyTree]
    fraction: float | Callable[[int], float]

    def __post_init__(self) -> None:
        if not callable(self.fraction):
            self.at(0)

    def at(self, step: int) -> float:
        """The fraction exchanged at a step."""
        fraction = float(self.fraction(step) if callable(self.fraction) else self.fraction)
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"the fraction to regrow at step {step} is {fraction}; it must be from 0.0 to 1.0")
        return fraction


def cosine_fraction(fraction: float, end: int) -> Callable[[int], float]:
    """The fraction RigL exchanges: f / 2 (1 + cos(pi t / end)) at step t, and 0 from ``end`` on.

    Source: Evci et al., "Rigging the Lottery", 2020, arXiv 1911.11134, equation 1.

    Args:
      fraction: f, the fraction at step 0.
      end: the step at which nothing is exchanged any more.

    Returns:
      A function of the step for ``Regrow``.

    Raises:
      ValueError: ``end`` is not positive.

    >>> [round(cosine_fraction(0.3, end=100)(step), 4) for step in (0, 50, 100, 150)]
    [0.3, 0.15, 0.0, 0.0]
    """
    if end <= 0:
        raise ValueError(f"end={end} must be positive")
    return lambda step: 0.5 * fraction * (1.0 + math.cos(math.pi * min(step, end) / end))


def dense_gradient() -> Score:
    """The score |g|, for weights that are 0 and may come back; needs ``grad``.

    Source: Evci et al., "Rigging the Lottery", 2020, arXiv 1911.11134, section 3.

    >>> dense_gradient()({"kernel": jnp.zeros((1, 2))}, grad={"kernel": jnp.array([[-2.0, 1.0]])})
    {'kernel': Array([[2., 1.]], dtype=float32)}
    """

    def function(params: PyTree, grad: PyTree, batch: Any, key: Any) -> PyTree:
        return map_leaves(jnp.abs, grad)

    return Score(function, "dense_gradient", ("grad",))


def reset_moments(
    tx: optax.GradientTransformation, pruner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """``optax.chain(tx, pruner)`` in which the optimizer remembers nothing of a pruned weight.

    Wherever in the state of ``tx`` there is an array that belongs to a parameter (the end of its path is the
    parameter's, and its shape ends with the parameter's shape), its entries at pruned weights are what
    ``tx.init`` gives where the weight is 0: no momentum, no second moment. A weight that regrows therefore
    starts afresh, with any optimizer: entries are found by the structure of the state, and no class is named.
    What an optimizer keeps in another shape (the row and column means of adafactor) stays. Updates are those of
    the chain; the reset costs the optimizer's update one more byte a weight where the compiler fuses the two, and
    one more pass over its state where it does not.

    ``optax.contrib.schedule_free`` keeps a second copy of the weights, which this sets to 0 as well: put it in
    ``reset_moments(schedule_free(...), prune(...))`` and the evaluation parameters are pruned exactly.

    Args:
      tx: the optimizer.
      pruner: ``prune(...)`` or ``keep_zeros(...)``.

    Returns:
      An optax transformation whose state is the tuple (state of ``tx``, state of ``pruner``).

    >>> import jprune
    >>> tx = reset_moments(optax.sgd(0.1, momentum=0.9), jprune.prune(jprune.magnitude(), {0: 0.5}))
    >>> params = {"kernel": jnp.array([[3.0, -1.0]])}
    >>> _, state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
    >>> state[0][0].trace["kernel"]
    Array([[1., 0.]], dtype=float32)
    """
    chained = optax.chain(tx, pruner)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: Any) -> tuple[PyTree, PyTree]:
        before = masks_of(state)
        updates, (moments, link) = chained.update(updates, state, params, **extra_args)
        alive = map_leaves(jnp.logical_and, masks_of((moments, link)), before)
        _, weights, treedef = flatten(params)
        masks = match(params, alive, reference_name="params", name="the masks of the optimizer state")
        cleared = [w if mask is None else _masked(w, mask) for w, mask in zip(weights, masks, strict=True)]
        fresh = tx.init(jax.tree.unflatten(treedef, cleared))
        # A lookahead optimizer keeps moments of the fast weights, under their own names.
        paths, own, _ = flatten(trained(jax.tree.unflatten(treedef, masks)))
        return updates, (_reset(moments, fresh, dict(zip(paths, own, strict=True))), link)

    return optax.GradientTransformationExtraArgs(chained.init, update)


def _reset(state: PyTree, fresh: PyTree, masks: dict[str, Any]) -> PyTree:
    """Take the entries of ``fresh`` where the mask of the parameter that a leaf belongs to is False."""

    def leaf(key_path: tuple[Any, ...], old: Any, new: Any) -> Any:
        # The longest end of the path that names a parameter: 'mu/a/kernel' is of 'a/kernel', not of 'kernel'.
        ends = (path_string(key_path[i:]) for i in range(len(key_path) + 1))
        mask = next((masks[end] for end in ends if end in masks), None)
        if mask is None or jnp.shape(old)[max(0, jnp.ndim(old) - mask.ndim) :] != mask.shape:
            return old
        # A history (L-BFGS) has leading axes of its own.
        return jnp.where(mask.reshape((1,) * (old.ndim - mask.ndim) + mask.shape), old, jnp.asarray(new, old.dtype))

    return jax.tree_util.tree_map_with_path(leaf, state, fresh)


def straight_through(params: PyTree, masks: PyTree) -> PyTree:
    """Mask the weights in the forward pass, and hand their gradient to the dense weights as it is.

    Inside the loss, so that dense weights are trained and the pruned ones can come back when the masks
    are taken anew. Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic
    Neurons", 2013, arXiv 1308.3432; as used for masks by Zhou et al., 2021, arXiv 2102.04010.

    Args:
      params: the dense weights.
      masks: bool arrays like ``params``, None where nothing is masked; matched by path.

    Returns:
      A tree like ``params``, 0 where a mask is False. d output / d params is the identity.

    Raises:
      ValueError: ``params`` and ``masks`` do not match; the message names the leaf.

    >>> masks = {"kernel": jnp.array([True, False])}
    >>> loss = lambda params: jnp.sum(straight_through(params, masks)["kernel"] ** 2 + params["kernel"])
    >>> loss({"kernel": jnp.array([3.0, 2.0])}), jax.grad(loss)({"kernel": jnp.array([3.0, 2.0])})
    (Array(14., dtype=float32), {'kernel': Array([7., 1.], dtype=float32)})
    """
    _, weights, treedef = flatten(params)
    matched = match(params, masks, reference_name="params", name="masks")
    through = [w if mask is None else _masked(w, mask) for w, mask in zip(weights, matched, strict=True)]
    return jax.tree.unflatten(treedef, through)


@jax.custom_jvp
def _masked(weight: Any, mask: Any) -> Any:
    return jnp.where(mask, weight, jnp.zeros_like(weight))


@_masked.defjvp
def _(primals: tuple[Any, Any], tangents: tuple[Any, Any]) -> tuple[Any, Any]:
    return _masked(*primals), tangents[0]
