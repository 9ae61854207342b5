"""What a weight is worth: factories of score functions.

A score is called as ``score(params, grad=None, batch=None, key=None)`` and gives a tree like ``params``, ``None``
where nothing may be pruned; larger is worth more. It is computed in the dtype of the weight and the
gradient, and at least in float32. Each factory takes ``where``, a predicate on (path, leaf) that says what
to score when the score is called by itself: by default what ``jprune.kernels`` selects or, in a tree where
that selects nothing (a bare tuple of arrays), every float leaf. ``prune`` decides by its own ``where`` and
calls ``score_selected``.

A function with the same signature may stand in the place of a ``Score``. Scores that need data (SynFlow,
Fisher, Wanda) are in ``jprune.pruning.scores.model_based``.
"""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jprune.trees import Where, flatten, is_float, kernels, map_leaves, match, only

PyTree = Any
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
      function: (params, grad, batch, key) -> scores, where ``params`` has ``None`` at every leaf that is not
        to be scored and ``grad`` is matched to it.
      name: for errors.
      needs: which of "grad", "batch", "key" and "whole" it cannot do without; one that needs "whole" gets
        (params, grad, batch, key, whole), with all the parameters last.
      where: predicate on (path, leaf): what to score when it is called by itself.
    """

    function: Callable[..., PyTree]
    name: str
    needs: tuple[str, ...] = ()
    where: Where | None = None

    def __call__(self, params: PyTree, grad: PyTree = None, batch: Any = None, key: Any = None) -> PyTree:
        """Score the weights of ``params``.

        Args:
          params: tree of arrays.
          grad: tree of gradients that has at least the scored leaves; they are matched by path.
          batch: examples, for a score that reads them.
          key: PRNG key, for a score that draws.

        Returns:
          A tree like ``params`` of float arrays, ``None`` where nothing is scored.

        Raises:
          ValueError: something it needs is missing, or nothing is selected.
        """
        return score_selected(self, selected_by(self.where, params), grad, batch, key, whole=params)


def score_selected(
    score: Score | Callable[..., PyTree],
    selected: PyTree,
    grad: PyTree = None,
    batch: Any = None,
    key: Any = None,
    *,
    whole: PyTree = None,
) -> PyTree:
    """Score the leaves of ``selected`` that are not ``None``, whatever ``where`` the score has.

    Args:
      score: a ``Score``, or a function ``f(params, grad=..., batch=..., key=...)``.
      selected: tree like the parameters, ``None`` where nothing is to be scored.
      grad: tree that has at least the selected leaves; they are matched by path.
      batch: examples, for a score that reads them.
      key: PRNG key, for a score that draws.
      whole: all the parameters, for a score that runs the model.

    Raises:
      ValueError: something the score needs is missing, or ``grad`` does not match.
    """
    if not isinstance(score, Score):
        return score(selected, grad=grad, batch=batch, key=key)
    given = {"grad": grad, "batch": batch, "key": key, "whole": whole}
    for need in score.needs:
        if given[need] is None:
            raise ValueError(f"the score {score.name} needs {need}: pass {_HOW[need]}")
    if "grad" in score.needs:
        grad = beside(selected, grad, name="grad")
    extra = (whole,) if "whole" in score.needs else ()
    return score.function(selected, grad, batch, key, *extra)


def refuse_no_score(score: Any) -> None:
    """Refuse what cannot be called as a score: a name, or a factory without its parentheses.

    Raises:
      TypeError: it cannot.
    """
    if isinstance(score, Score):
        return
    wanted = "it must be a score, such as jprune.magnitude(), or a function score(params, grad=..., batch=..., key=...)"
    if not callable(score):
        raise TypeError(f"score={score!r} is a {type(score).__name__}; {wanted}")
    try:
        inspect.signature(score).bind(None, grad=None, batch=None, key=None)
    except TypeError as error:
        raise TypeError(f"score={score!r}: {error}; {wanted}") from error
    except ValueError:  # a callable that does not tell its signature
        return


def magnitude(*, where: Where | None = None) -> Score:
    """|w|.

    Source: Han et al., "Learning both Weights and Connections", NeurIPS 2015, arXiv 1506.02626.

    >>> magnitude()({"kernel": jnp.array([[-2.0, 1.0]]), "bias": jnp.ones(2)})
    {'bias': None, 'kernel': Array([[2., 1.]], dtype=float32)}
    """
    return _elementwise("magnitude", jnp.abs, where)


def gradient(*, where: Where | None = None) -> Score:
    """|w g|, the first-order change of the loss when w is removed.

    Needs ``grad``: the gradient g of the loss, of one batch or averaged over several
    (``average_gradients``).

    Source: Molchanov et al., "Pruning Convolutional Neural Networks for Resource Efficient Inference",
    ICLR 2017, arXiv 1611.06440; |-w g| in arXiv 2206.02976.

    >>> gradient()((jnp.array([-2.0, 1.0]),), grad=(jnp.array([0.5, 3.0]),))
    (Array([1., 3.], dtype=float32),)
    """
    return _with_gradient("gradient", lambda w, g: jnp.abs(w * g), where)


def movement(*, where: Where | None = None) -> Score:
    """-w g: large for a weight that the next gradient step moves away from zero.

    This is one term of the published score, which sums it over the steps of training; the caller sums.
    Needs ``grad``.

    Source: Sanh et al., "Movement Pruning", NeurIPS 2020, arXiv 2005.07683, equation 2 without its step size.

    >>> movement()((jnp.array([-2.0, 1.0]),), grad=(jnp.array([0.5, 3.0]),))
    (Array([ 1., -3.], dtype=float32),)
    """
    return _with_gradient("movement", lambda w, g: -(w * g), where)


def undecayed(
    weight_decay: float = 5e-4,
    *,
    gradient_includes_decay: bool = False,
    signed: bool = False,
    where: Where | None = None,
) -> Score:
    """|-w g + eps w^2|: the gradient score with the pull of weight decay taken off.

    g is the gradient of the loss without the decay term (eps / 2) w^2, and eps is ``weight_decay``: this is
    the score of the published code. Hand it the gradient of the bare loss, or say with
    ``gradient_includes_decay`` that the handed gradient is g + eps w; eps w is then subtracted first and
    the score is the same.

    What becomes of the scores where training has converged under decay, that is where g = -eps w:

    * undecayed, as here and in the published code: 2 eps w^2, which ranks as the magnitude does;
    * gradient on the bare loss: eps w^2, which ranks so too. The paper derives this one: it writes
      -w g' + eps w^2 with g' = g + eps w, which is -w g, plain gradient pruning on the bare loss (hand this
      score g' and leave ``gradient_includes_decay`` False to compute it);
    * gradient on the loss with decay: 0 everywhere, which ranks nothing.

    Args:
      weight_decay: eps, the coefficient of ``optax.add_decayed_weights``.
      gradient_includes_decay: whether the handed gradient contains eps w.
      signed: leave the sign on; for ``legacy_signed_masks``.
      where: see ``Score``.

    Source: Good et al., "Recall Distortion in Neural Network Pruning and the Undecayed Pruning Algorithm",
    NeurIPS 2022, arXiv 2206.02976, section 5.

    >>> undecayed(0.5)((jnp.array([2.0]),), grad=(jnp.array([3.0]),))
    (Array([4.], dtype=float32),)
    """

    def score(w: Any, g: Any) -> Any:
        eps = jnp.asarray(weight_decay, w.dtype)
        g = g - eps * w if gradient_includes_decay else g
        value = eps * w * w - w * g
        return value if signed else jnp.abs(value)

    return _with_gradient("undecayed", score, where)


def random(*, where: Where | None = None) -> Score:
    """Uniform in [0, 1), float32, independent for every weight. Needs ``key``.

    Through ``global_masks`` the number kept is exact; through ``bernoulli_masks`` every weight is kept with
    the same probability, as in arXiv 2206.02976.

    >>> scores, = random()((jnp.ones(3),), key=jax.random.key(0))
    >>> bool(((scores >= 0) & (scores < 1)).all())
    True
    """

    def function(params: PyTree, grad: PyTree, batch: Any, key: Any) -> PyTree:
        leaves, treedef = jax.tree.flatten(params)
        keys = jax.random.split(key, max(len(leaves), 1))
        draws = [jax.random.uniform(k, leaf.shape, jnp.float32) for k, leaf in zip(keys, leaves, strict=False)]
        return jax.tree.unflatten(treedef, draws)

    return Score(function, "random", ("key",), where)


def _elementwise(name: str, f: Callable[[Any], Any], where: Where | None) -> Score:
    def function(params: PyTree, grad: PyTree, batch: Any, key: Any) -> PyTree:
        return map_leaves(lambda w: f(w.astype(working_dtype(w))), params)

    return Score(function, name, (), where)


def _with_gradient(name: str, f: Callable[[Any, Any], Any], where: Where | None) -> Score:
    def function(params: PyTree, grad: PyTree, batch: Any, key: Any) -> PyTree:
        def score(w: Any, g: Any) -> Any:
            dtype = working_dtype(w, g)
            return f(w.astype(dtype), g.astype(dtype))

        return map_leaves(score, params, grad)

    return Score(function, name, ("grad",), where)


def working_dtype(*leaves: Any) -> Any:
    """The dtype to score in: float32, or float64 where a leaf has it."""
    return jnp.float64 if any(leaf.dtype == jnp.float64 for leaf in leaves) else jnp.float32


def selected_by(where: Where | None, params: PyTree) -> PyTree:
    """What a score called by itself scores: what ``where`` selects, ``None`` at every other leaf.

    ``None`` selects what ``jprune.kernels`` does or, in a tree where that is nothing, every float leaf.
    """
    if where is None:
        paths, leaves, _ = flatten(params)
        named = any(kernels(path, leaf) for path, leaf in zip(paths, leaves, strict=True))
        where = kernels if named else lambda path, leaf: is_float(leaf)
    return only(params, where)


def beside(selected: PyTree, tree: PyTree, *, name: str) -> PyTree:
    """The leaves of a tree that belong to the selected ones, in their tree; what else it has is dropped.

    ``optax.partition`` and ``masked`` hand on the whole tree of gradients, for one.

    Raises:
      ValueError: a selected leaf is missing, no float array, or of another shape; the message names it.
    """
    paths, leaves, treedef = flatten(selected)
    wanted = {path for path, leaf in zip(paths, leaves, strict=True) if leaf is not None}
    other_paths, others, _ = flatten(tree)
    near = {path: leaf for path, leaf in zip(other_paths, others, strict=True) if path in wanted}
    for path, leaf in near.items():
        if not is_float(leaf):
            raise ValueError(f"{name} holds {leaf!r} at '{path}'; it must be a float array")
    return jax.tree.unflatten(treedef, match(selected, near, reference_name="params", name=name))
