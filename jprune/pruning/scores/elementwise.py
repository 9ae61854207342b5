"""Weight importance scores that are computed weight by weight.

A score is called as ``score(params, grad=None, batch=None, key=None)`` and returns a tree like ``params``, None
where nothing is prunable; weights with larger scores are kept. It is computed in the dtype of the weight and the
gradient, and at least in float32. Each factory takes ``where``, a predicate on (path, leaf) that selects the leaves to
score when the score is called directly. By default these are the leaves that ``jprune.kernels`` selects; a single array
that is not in a tree is scored whatever its shape. ``prune`` uses the same predicate, unless it has its own ``where``.

A function with the same signature can be used in place of a ``Score``. Scores that need data (SynFlow, Fisher,
Wanda) are in ``jprune.pruning.scores.model_based`` and ``.activations``.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray, PyTree

from jprune.graph.axes import known_shapes, shapes_of
from jprune.pruning.selection.layers import describe
from jprune.trees import (
    Leaf,
    Where,
    explain_left_out,
    flatten,
    hint_of_injecting,
    is_float,
    kernels,
    map_leaves,
    match,
    only,
    refuse_arguments,
    with_article,
)

_HOW = {
    "grad": "grad=gradients (in an optax update: update(updates, state, params, grad=gradients))",
    "batch": "batch=examples (in an optax update: update(updates, state, params, batch=examples))",
    "key": "key=jax.random.key(...) (for prune: prune(..., key=key), or to its update)",
    "whole": "the whole tree of parameters, not the selected leaves alone",
}


@dataclasses.dataclass(frozen=True)
class Score:
    """A score function and what it needs.

    Attributes:
      function: (params, grad, batch, key) -> scores, where ``params`` has None at every leaf that is not scored and
        ``grad`` has the same structure.
      name: name for errors.
      needs: which of "grad", "batch", "key" and "whole" it requires; a function that needs "whole" is called with
        (params, grad, batch, key, whole), with all parameters last.
      where: predicate on (path, leaf) that selects the leaves to score, used when the score is called directly and in a
        ``prune`` without ``where``.
    """

    function: Callable[..., PyTree]
    name: str
    needs: tuple[str, ...] = ()
    where: Where | None = None

    def __call__(
        self, params: PyTree, grad: PyTree = None, batch: PyTree = None, key: PRNGKeyArray | None = None
    ) -> PyTree:
        """Score the weights of ``params``.

        Args:
          params: tree of arrays.
          grad: tree of gradients of at least the scored leaves, matched by path.
          batch: examples, for scores that use data.
          key: PRNG key, for random scores.

        Returns:
          A tree like ``params`` of float arrays, None where nothing is scored.

        Raises:
          TypeError: ``params`` is an integer, as ``optax.inject_hyperparams`` gives.
          ValueError: an argument that the score needs is missing, or nothing is selected.
        """
        if hint := hint_of_injecting(params):
            raise TypeError(f"{self.name} was called with {params!r}; it needs a tree of parameters{hint}")
        with known_shapes(shapes_of(params)):
            return score_selected(self, selected_by(self.where, params), grad, batch, key, whole=params)


def score_selected(
    score: Score | Callable[..., PyTree],
    selected: PyTree,
    grad: PyTree = None,
    batch: PyTree = None,
    key: PRNGKeyArray | None = None,
    *,
    whole: PyTree = None,
) -> PyTree:
    """Score the leaves of ``selected`` that are not None; the score's own ``where`` is not used.

    Args:
      score: a ``Score``, or a function ``f(params, grad=..., batch=..., key=...)``.
      selected: tree like the parameters, None at leaves that are not scored.
      grad: tree of gradients of at least the selected leaves, matched by path.
      batch: examples, for scores that use data.
      key: PRNG key, for random scores.
      whole: all parameters, for scores that run the model.

    Raises:
      ValueError: an argument that the score needs is missing, or ``grad`` does not match.

    >>> score_selected(magnitude(), {"kernel": jnp.array([-2.0, 1.0]), "bias": None})
    {'bias': None, 'kernel': Array([2., 1.], dtype=float32)}
    """
    if not isinstance(score, Score):
        return score(selected, grad=grad, batch=batch, key=key)
    refuse_missing_inputs(score, {"grad": grad, "batch": batch, "key": key, "whole": whole})
    if "grad" in score.needs:
        grad = matching(selected, grad, name="grad")
    if "whole" not in score.needs:
        return score.function(selected, grad, batch, key)
    with explain_left_out(whole, score.name):
        return score.function(selected, grad, batch, key, whole)


def refuse_missing_inputs(score: Score | Callable[..., PyTree], given: Mapping[str, object]) -> None:
    """Raise if an input that a score needs is None.

    Args:
      score: a ``Score``; any other function is assumed to need nothing.
      given: "grad", "batch", "key" and "whole", None where there is none.

    Raises:
      ValueError: an input is missing; the message says how to pass it.
    """
    if not isinstance(score, Score):
        return
    for need in score.needs:
        if given[need] is None:
            raise ValueError(f"the score {score.name} needs {need}: pass {_HOW[need]}")


def refuse_no_score(score: object) -> None:
    """Raise if ``score`` cannot be called as a score, such as a name or a factory without its parentheses.

    Raises:
      TypeError: ``score`` cannot be called as ``score(params, grad=..., batch=..., key=...)``.
    """
    if isinstance(score, Score):
        return
    wanted = "it must be a score, such as jprune.magnitude(), or a function score(params, grad=..., batch=..., key=...)"
    if not callable(score):
        raise TypeError(f"score={score!r} is {with_article(score)}; {wanted}")
    refuse_arguments(score, f"score={name_of(score)}", wanted, None, grad=None, batch=None, key=None)


def name_of(function: Callable[..., PyTree]) -> str:
    """Return the name of a function for an error: its own, that of the function in a partial, or its class."""
    while isinstance(function, functools.partial):
        function = function.func
    return getattr(function, "__name__", type(function).__name__)


def magnitude(*, where: Where | None = None) -> Score:
    """Score weights by magnitude: |w|.

    Args:
      where: predicate on (path, leaf) that selects the leaves to score; see ``Score``.

    Source: Han et al., "Learning both Weights and Connections", NeurIPS 2015, arXiv 1506.02626.

    >>> magnitude()({"kernel": jnp.array([[-2.0, 1.0]]), "bias": jnp.ones(2)})
    {'bias': None, 'kernel': Array([[2., 1.]], dtype=float32)}
    """
    return Score(_magnitude, "magnitude", (), where)


def ranks_by_magnitude(score: "Score | Callable[..., PyTree]") -> bool:
    """Whether a score is ``magnitude()``, so that a selection can compare the weights themselves.

    >>> ranks_by_magnitude(magnitude()), ranks_by_magnitude(gradient())
    (True, False)
    """
    return isinstance(score, Score) and score.function is _magnitude


def gradient(*, where: Where | None = None) -> Score:
    """Score weights by |w g|, the first-order change of the loss when w is removed.

    Needs ``grad``, the gradient g of the loss, of one batch or averaged over several (``average_gradients``).

    Args:
      where: predicate on (path, leaf) that selects the leaves to score; see ``Score``.

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    ICLR 2017, arXiv 1611.06440; |-w g| in arXiv 2206.02976.

    >>> gradient()(jnp.array([-2.0, 1.0]), grad=jnp.array([0.5, 3.0]))
    Array([1., 3.], dtype=float32)
    """
    return _with_gradient("gradient", lambda w, g: jnp.abs(w * g), where)


def movement(*, where: Where | None = None) -> Score:
    """Score weights by movement: -w g, large for weights that the next gradient step moves away from zero.

    The published score is the sum of this over training steps, which the caller computes. Needs ``grad``.

    Args:
      where: predicate on (path, leaf) that selects the leaves to score; see ``Score``.

    Source: Sanh et al., "Movement Pruning", NeurIPS 2020, arXiv 2005.07683, equation 2 without its step size.

    >>> movement()(jnp.array([-2.0, 1.0]), grad=jnp.array([0.5, 3.0]))
    Array([ 1., -3.], dtype=float32)
    """
    return _with_gradient("movement", lambda w, g: -(w * g), where)


def undecayed(
    weight_decay: float = 5e-4,
    *,
    gradient_includes_decay: bool = False,
    signed: bool = False,
    where: Where | None = None,
) -> Score:
    """Score weights by |-w g + eps w^2|, the gradient score corrected for weight decay (undecayed).

    g is the gradient of the loss without the decay term (eps / 2) w^2, and eps is ``weight_decay``: this is
    the score of the published code. Pass the gradient of the loss without decay, or set
    ``gradient_includes_decay`` if the gradient is g + eps w; eps w is then subtracted first, and the score is the same.

    If training has converged under weight decay, g = -eps w, and the scores become:

    * undecayed, as here and in the published code: 2 eps w^2, the same ranking as magnitude;
    * gradient of the loss without decay: eps w^2, also the ranking of magnitude. This is the score that the paper
      derives: it writes -w g' + eps w^2 with g' = g + eps w, which is -w g (to compute it, pass g' and leave
      ``gradient_includes_decay`` False);
    * gradient of the loss with decay: 0 everywhere, so it ranks nothing.

    Args:
      weight_decay: eps, the coefficient of ``optax.add_decayed_weights``.
      gradient_includes_decay: whether the given gradient contains eps w.
      signed: return the signed value, for ``legacy_signed_masks``.
      where: see ``Score``.

    Raises:
      ValueError: ``weight_decay`` is negative or infinite.

    Source: Good et al., "Recall Distortion in Neural Network Pruning and the Undecayed Pruning Algorithm",
    NeurIPS 2022, arXiv 2206.02976, section 5.

    >>> undecayed(0.5)(jnp.array([2.0]), grad=jnp.array([3.0]))
    Array([4.], dtype=float32)
    """
    if isinstance(weight_decay, int | float) and not 0 <= weight_decay < math.inf:
        raise ValueError(f"weight_decay={weight_decay} must be finite and 0 or more: the coefficient of the decay term")

    def score(w: Leaf, g: Leaf) -> Leaf:
        eps = jnp.asarray(weight_decay, w.dtype)
        g = g - eps * w if gradient_includes_decay else g
        value = eps * w * w - w * g
        return value if signed else jnp.abs(value)

    return _with_gradient("undecayed", score, where)


def random(*, where: Where | None = None) -> Score:
    """Score weights at random: uniform in [0, 1), float32, independent for every weight; needs ``key``.

    With ``global_masks`` the number kept is exact; with ``bernoulli_masks`` every weight is kept with the same
    probability, as in arXiv 2206.02976.

    Args:
      where: predicate on (path, leaf) that selects the leaves to score; see ``Score``.

    >>> scores = random()(jnp.ones(3), key=jax.random.key(0))
    >>> bool(((scores >= 0) & (scores < 1)).all())
    True
    """

    def function(params: PyTree, grad: PyTree, batch: PyTree, key: PRNGKeyArray | None) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        assert key is not None
        keys = jax.random.split(key, max(len(leaves), 1))
        draws = [jax.random.uniform(k, leaf.shape, jnp.float32) for k, leaf in zip(keys, leaves, strict=False)]
        return jax.tree.unflatten(treedef, draws)

    return Score(function, "random", ("key",), where)


def _magnitude(params: PyTree, grad: PyTree, batch: PyTree, key: PRNGKeyArray | None) -> PyTree:
    return map_leaves(lambda w: jnp.abs(w.astype(working_dtype(w))), params)


def _with_gradient(name: str, f: Callable[[Leaf, Leaf], Leaf], where: Where | None) -> Score:
    def function(params: PyTree, grad: PyTree, batch: PyTree, key: PRNGKeyArray | None) -> PyTree:
        def score(w: Leaf, g: Leaf) -> Leaf:
            dtype = working_dtype(w, g)
            return f(w.astype(dtype), g.astype(dtype))

        return map_leaves(score, params, grad)

    return Score(function, name, ("grad",), where)


def working_dtype(*leaves: Leaf) -> jnp.dtype:
    """Return the dtype of scores: float32, or float64 if a leaf is float64 and jax has x64 enabled."""
    return jax.dtypes.canonicalize_dtype(np.float64 if any(leaf.dtype == np.float64 for leaf in leaves) else np.float32)


def selected_by(where: Where | None, params: PyTree) -> PyTree:
    """Return the leaves that are scored when a score is called directly, None at every other leaf.

    ``where=None`` selects the leaves that ``jprune.kernels`` selects; a single array that is not in a tree is scored.
    """
    if where is None or where is kernels:
        paths, leaves, _ = flatten(params)
        where = _every_float if paths == [""] and is_float(leaves[0]) else kernels
    return only(params, where)


def _every_float(path: str, leaf: Leaf) -> bool:
    return is_float(leaf)


def number_of_examples(batch: PyTree) -> int:
    """Return the length of the leading axis of the arrays of a batch; scalars belong to all examples.

    Raises:
      ValueError: the arrays have different numbers of examples or none, or there is no array.
    """
    lengths = {leaf.shape[0] for leaf in jax.tree.leaves(batch) if has_examples(leaf)}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "the arrays of a batch must have the same number of examples, at least one; they have "
            f"{sorted(lengths) or 'no axis over examples'}"
        )
    return int(lengths.pop())


def has_examples(leaf: Leaf) -> bool:
    """Whether a leaf of a batch is an array with an axis over examples, and not a scalar."""
    return getattr(leaf, "ndim", 0) > 0


def matching(selected: PyTree, tree: PyTree, *, name: str) -> PyTree:
    """Return the leaves of ``tree`` at the paths of the selected leaves, in the structure of ``selected``.

    Other leaves are dropped: for example ``optax.partition`` and ``masked`` pass the whole tree of gradients.

    Raises:
      ValueError: a selected leaf is missing, is not a float array, or has another shape; the message names it.
    """
    paths, leaves, treedef = flatten(selected)
    matched = match(selected, tree, reference_name="params", name=name, surplus=True)
    found = [None if leaf is None else other for leaf, other in zip(leaves, matched, strict=True)]
    for path, leaf, other in zip(paths, leaves, found, strict=True):
        if leaf is not None and other is not None and not is_float(other):
            raise ValueError(f"{name} has {describe(other)} at '{path}'; it must be a float array")
    return jax.tree.unflatten(treedef, found)
