"""Dynamic sparse training: regrowth (SET, RigL), reset of optimizer moments, straight-through gradients."""

import dataclasses
import math
import numbers
from collections import Counter
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, ArrayLike, Bool, PyTree, Shaped

from jprune.pruning.amounts import integer
from jprune.pruning.scores.elementwise import Score, refuse_no_score, working_dtype
from jprune.pruning.state import masks_of, trained
from jprune.trees import Leaf, flatten, is_placeholder, map_leaves, match, path_string, with_article


@dataclasses.dataclass(frozen=True)
class Regrow:
    """Drop some weights and regrow others at each step of the schedule (dynamic sparse training).

    With k the scheduled number and r = round(fraction k), the k - r kept weights with the largest scores survive.
    Then the weights with the largest regrowth ``score`` are added until k are kept. A weight that was dropped may be
    regrown at once and then keeps its value; any other starts from 0 at the next step. The schedule may keep, lower
    or raise the sparsity: ``dict.fromkeys(range(0, 1000, 100), 0.9)``.

    SET (Mocanu et al. 2018, arXiv 1707.04780) is ``prune(magnitude(), ..., regrow=Regrow(random(), 0.3), key=key)``.
    RigL (Evci et al. 2020, arXiv 1911.11134) is ``prune(magnitude(), ..., regrow=Regrow(dense_gradient(),
    cosine_fraction(0.3, end)))``, for one count per layer with ``selection=layer_masks`` or ``erk_masks``.
    Wrap either in ``reset_moments``.

    Attributes:
      score: importance of a pruned weight; weights with larger scores are regrown first.
      fraction: fraction of the scheduled number that is exchanged, in [0, 1]; or a function from the step (an int) to
        the fraction.

    Raises:
      TypeError: ``score`` is not a valid score, or ``fraction`` is neither a number nor a function.
      ValueError: the fraction is out of range.
    """

    score: Score | Callable[..., PyTree]
    fraction: float | Callable[[int], float]

    def __post_init__(self) -> None:
        refuse_no_score(self.score)
        if not callable(self.fraction):
            if not isinstance(self.fraction, numbers.Real):
                raise TypeError(
                    f"fraction={self.fraction!r} must be a number from 0.0 to 1.0 or a function of the step"
                )
            self.at(0)

    def at(self, step: int) -> float:
        """Return the fraction exchanged at a step."""
        fraction = float(self.fraction(step) if callable(self.fraction) else self.fraction)
        if not 0.0 <= fraction <= 1.0:
            raise ValueError(f"the fraction to regrow at step {step} is {fraction}; it must be from 0.0 to 1.0")
        return fraction


def cosine_fraction(fraction: float, end: int) -> Callable[[int], float]:
    """Return RigL's schedule of the fraction exchanged: f / 2 (1 + cos(pi t / end)) at step t, and 0 from ``end`` on.

    Source: Evci et al., "Rigging the Lottery", 2020, arXiv 1911.11134, equation 1.

    Args:
      fraction: f, the fraction at step 0.
      end: the first step at which nothing is exchanged.

    Returns:
      A function of the step, for ``Regrow``.

    Raises:
      TypeError, ValueError: ``fraction`` is not a number from 0 to 1, or ``end`` not a positive integer.

    >>> [round(cosine_fraction(0.3, end=100)(step), 4) for step in (0, 50, 100, 150)]
    [0.3, 0.15, 0.0, 0.0]
    """
    integer("end", end, least=1)
    if not isinstance(fraction, numbers.Real) or not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction={fraction!r} must be a number from 0.0 to 1.0, the part of the weights exchanged")
    return lambda step: 0.5 * fraction * (1.0 + math.cos(math.pi * min(step, end) / end))


def dense_gradient() -> Score:
    """Score pruned weights by |g|, the regrowth score of RigL; needs ``grad``.

    Source: Evci et al., "Rigging the Lottery", 2020, arXiv 1911.11134, section 3.

    >>> dense_gradient()({"kernel": jnp.zeros((1, 2))}, grad={"kernel": jnp.array([[-2.0, 1.0]])})
    {'kernel': Array([[2., 1.]], dtype=float32)}
    """

    def function(params: PyTree, grad: PyTree, batch: PyTree, key: Array | None) -> PyTree:
        return map_leaves(lambda slope: jnp.abs(slope.astype(working_dtype(slope))), grad)

    return Score(function, "dense_gradient", ("grad",))


def reset_moments(
    tx: optax.GradientTransformation, pruner: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Chain an optimizer and ``prune``, and reset the optimizer's moments of pruned weights.

    An array in the state of ``tx`` belongs to a parameter if its path ends with the parameter's path and its shape with
    the parameter's shape. In these arrays the entries at pruned weights are set to what ``tx.init`` returns for a
    weight of 0: no momentum, no second moment. Regrown weights therefore start without history, with any optimizer.
    Arrays of other shapes (the row and column means of adafactor) are not changed. Updates are those of
    ``optax.chain(tx, pruner)``. The reset reads one more byte per weight if the compiler fuses it with the optimizer's
    update; otherwise it takes one more pass over the state.

    ``optax.contrib.schedule_free`` has a second copy of the weights, which is set to 0 as well: with
    ``reset_moments(schedule_free(...), prune(...))`` the evaluation parameters are pruned exactly.

    Args:
      tx: the optimizer.
      pruner: ``prune(...)`` or ``keep_zeros(...)``.

    Returns:
      An optax transformation whose state is the tuple (state of ``tx``, state of ``pruner``).

    Raises:
      TypeError: ``tx`` or ``pruner`` is not an optax transformation.
      ValueError: at ``init``, as ``masks_of``: ``pruner`` contains no ``prune``, or the order is wrong.

    >>> import jprune
    >>> tx = reset_moments(optax.sgd(0.1, momentum=0.9), jprune.prune(jprune.magnitude(), {0: 0.5}))
    >>> params = {"kernel": jnp.array([[3.0, -1.0]])}
    >>> _, state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
    >>> state[0][0].trace["kernel"]
    Array([[1., 0.]], dtype=float32)
    """
    refuse_no_transformation("tx", tx)
    refuse_no_transformation("pruner", pruner)
    chained = optax.chain(tx, pruner)

    def init(params: PyTree) -> PyTree:
        state = chained.init(params)
        if not is_placeholder(params):
            masks_of(state)  # raises if the order is wrong
        return state

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra_args: object) -> tuple[PyTree, PyTree]:
        before = masks_of(state)
        updates, (moments, pruned) = chained.update(updates, state, params, **extra_args)
        kept = map_leaves(jnp.logical_and, masks_of((moments, pruned)), before)
        _, weights, treedef = flatten(params)
        masks = match(params, kept, reference_name="params", name="the masks of the optimizer state")
        cleared = [w if mask is None else _masked(w, mask) for w, mask in zip(weights, masks, strict=True)]
        fresh = tx.init(jax.tree.unflatten(treedef, cleared))
        # A lookahead optimizer has moments of the fast weights, under their own paths.
        paths, matched, _ = flatten(trained(jax.tree.unflatten(treedef, masks)))
        return updates, (_reset(moments, fresh, dict(zip(paths, matched, strict=True))), pruned)

    return optax.GradientTransformationExtraArgs(init, update)


def refuse_no_transformation(name: str, tx: object) -> None:
    """Raise if an argument is not an optax transformation.

    Raises:
      TypeError: it has no ``init`` and ``update``.
    """
    if not callable(getattr(tx, "init", None)) or not callable(getattr(tx, "update", None)):
        raise TypeError(f"{name}={tx!r} is {with_article(tx)}; it must be an optax transformation: optax.adam(1e-3)")


def _reset(state: PyTree, fresh: PyTree, masks: dict[str, Leaf]) -> PyTree:
    """Take the entries of ``fresh`` where the mask of a leaf's parameter is False."""

    def parameters(key_path: tuple[jax.tree_util.KeyEntry, ...]) -> list[tuple[PyTree, str]]:
        """Return the ends of a path that name a parameter, the longest first, each after what precedes it."""
        ends = ((key_path[:i], path_string(key_path[i:])) for i in range(len(key_path) + 1))
        return [(before, end) for before, end in ends if end in masks]

    named = [pair for key_path, _ in jax.tree.leaves_with_path(state) for pair in parameters(key_path)]
    times = Counter(before for before, _ in named)

    def leaf(key_path: tuple[jax.tree_util.KeyEntry, ...], old: PyTree, new: PyTree) -> PyTree:
        # The name after which the state has the most parameters: the array 'mu/a/kernel' belongs to 'a/kernel', not to
        # 'kernel', and the array 'mu/kernel' to 'kernel', even if a parameter is called 'mu/kernel'.
        found = max(parameters(key_path), key=lambda pair: times[pair[0]], default=None)
        mask = None if found is None else masks[found[1]]
        if mask is None or jnp.shape(old)[max(0, jnp.ndim(old) - mask.ndim) :] != mask.shape:
            return old
        # A history (L-BFGS) has additional leading axes.
        return jnp.where(mask.reshape((1,) * (old.ndim - mask.ndim) + mask.shape), old, jnp.asarray(new, old.dtype))

    return jax.tree_util.tree_map_with_path(leaf, state, fresh)


def straight_through(params: PyTree, masks: PyTree) -> PyTree:
    """Mask the weights in the forward pass; pass the gradient unchanged to the dense weights in the backward pass.

    Use it inside the loss: the dense weights are trained, and pruned ones can return when the masks are recomputed.
    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic
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
def _masked(weight: Shaped[ArrayLike, "..."], mask: Bool[ArrayLike, "..."]) -> Shaped[Array, "..."]:
    return jnp.where(mask, weight, jnp.zeros_like(weight))


@_masked.defjvp
def _(primals: tuple[ArrayLike, ArrayLike], tangents: tuple[Array, object]) -> tuple[Array, Array]:
    return _masked(*primals), tangents[0]
