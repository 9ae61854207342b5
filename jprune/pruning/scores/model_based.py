"""Scores that run the model (SNIP, SynFlow, Fisher), iterated pruning, and averaged gradients.

The functions given, ``apply(params, inputs)`` and ``loss(params, batch)``, must be pure. They run the model in train or
in eval mode, and discard updated statistics. With Flax NNX:

>>> from flax import nnx
>>> class Net(nnx.Module):
...     def __init__(self, rngs):
...         self.dense, self.norm = nnx.Linear(3, 2, rngs=rngs), nnx.BatchNorm(2, rngs=rngs)
...     def __call__(self, x):
...         return self.norm(self.dense(x))
>>> graphdef, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)
>>> def loss(params, batch):  # train mode; write nnx.view(model, use_running_average=True) for eval mode
...     return jnp.mean(nnx.merge(graphdef, params, rest, copy=True)(batch) ** 2)
>>> grad = average_gradients(loss, params, [jnp.ones((4, 3)), jnp.zeros((4, 3))])
>>> grad["dense"]["kernel"].shape
(3, 2)

A function may use values that change between calls, such as ``rest`` here, so it is traced and compiled again whenever
a score is called outside ``jit``. To compile once, call ``jax.jit(score)``, and give ``average_gradients`` a loss made
by ``jax.jit``, which must then get all that changes as arguments.
"""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, PRNGKeyArray, PyTree

from jprune.graph.axes import Axes, known_shapes, shapes_of, where_of
from jprune.pruning.amounts import Counts, Sparsity, amount_by_keyword, amount_of, integer
from jprune.pruning.scores.elementwise import (
    Score,
    has_examples,
    matching,
    name_of,
    number_of_examples,
    refuse_no_score,
    score_selected,
    selected_by,
    working_dtype,
)
from jprune.pruning.selection import allocation, uint64
from jprune.pruning.selection.layers import Quota, any_nan, choose, layers_of, refuse_nan
from jprune.pruning.selection.uint64 import Count
from jprune.pruning.selection.unstructured import apply_masks
from jprune.trees import Subset, Where, is_float, map_leaves, refuse_one_batch


def snip(*, where: Where | None = None) -> Score:
    """Score weights by connection sensitivity (SNIP): |w g| / sum of |w g|.

    g is the gradient of the loss at initialization, of one batch or averaged (``average_gradients``). The
    sum is over all scored weights, so that the scores sum to 1 (or are all 0). Needs ``grad``.

    Args:
      where: predicate on (path, leaf) that selects the leaves to score; see ``Score``.

    Source: Lee et al., "SNIP: Single-shot Network Pruning based on Connection Sensitivity", ICLR 2019,
    arXiv 1810.02340, equations 4 to 6.

    >>> snip()(jnp.array([-2.0, 1.0]), grad=jnp.array([0.5, 3.0]))
    Array([0.25, 0.75], dtype=float32)
    """

    def function(params: PyTree, grad: PyTree, batch: PyTree, key: PRNGKeyArray | None) -> PyTree:
        def sensitivity(w: Array | np.ndarray, g: Array | np.ndarray) -> Array:
            dtype = working_dtype(w, g)
            return jnp.abs(w.astype(dtype) * g.astype(dtype))

        sizes = map_leaves(sensitivity, params, grad)
        each = jax.tree.leaves(sizes)
        total = sum(jnp.sum(x).astype(working_dtype(*each)) for x in each)
        scale = jnp.where(total > 0, total, jnp.ones_like(total))
        return map_leaves(lambda x: x / scale.astype(x.dtype), sizes)

    return Score(function, "snip", ("grad",), where)


def synflow(
    apply: Callable[[PyTree, PyTree], PyTree], *, input_shape: tuple[int, ...] | None = None, where: Where | None = None
) -> Score:
    """Score weights by synaptic flow (SynFlow): |w dR/dw|.

    R is the sum of the outputs for an input of ones, with the absolute values of all parameters. Needs no data. Score
    and prune in rounds (``iterated_masks``), so that no layer loses all its weights unless that is unavoidable. If R or
    a score exceeds float32, or R underflows to 0, every kernel (two axes or more) is first divided by the mean over its
    outputs of the sum of their weights. In a chain of layers this multiplies all scores by one number; with skip
    connections, the scores are those of the rescaled network.

    Args:
      apply: ``apply(params, inputs)`` returns the outputs, a tree of arrays; without dropout, and with normalization in
        eval mode.
      input_shape: the shape of ``inputs`` including the batch axis, which becomes 1; their dtype is the widest float
        dtype of the parameters. None takes shapes and dtypes from ``batch``, an array or a tree of arrays, whose values
        are not used, except for those of scalars.
      where: see ``Score``.

    Source: Tanaka et al., "Pruning neural networks without any data by iteratively conserving synaptic flow",
    NeurIPS 2020, arXiv 2006.05467, equation 2 and algorithm 1.

    >>> synflow(lambda w, x: x @ w, input_shape=(1, 2))(jnp.array([[1.0], [-3.0]]))[:, 0]
    Array([1., 3.], dtype=float32)
    """

    def function(params: PyTree, grad: PyTree, batch: PyTree, key: PRNGKeyArray | None, whole: PyTree) -> PyTree:
        floats = _floats(whole)
        dtype = np.dtype(working_dtype(*floats.leaves))
        # The model's own dtype, so that the model promotes nothing.
        dtypes = [jax.dtypes.canonicalize_dtype(leaf.dtype) for leaf in floats.leaves]
        widest = max(dtypes, key=lambda dtype: dtype.itemsize)
        like = batch if input_shape is None else np.broadcast_to(np.ones((), widest), input_shape)
        inputs = jax.tree.map(lambda x: jnp.ones((1, *x.shape[1:]), x.dtype) if has_examples(x) else x, like)
        positive = [jnp.abs(leaf.astype(working_dtype(leaf))) for leaf in floats.leaves]

        def flow(weights: list[Array]) -> Array:
            cast = [w.astype(dtype) for w, dtype in zip(weights, dtypes, strict=True)]
            outputs = apply(floats.whole(cast), inputs)
            return jnp.asarray(sum(jnp.sum(y).astype(dtype) for y in jax.tree.leaves(outputs)))

        def scored(weights: list[Array]) -> tuple[Array, list[Array]]:
            total, slopes = jax.value_and_grad(flow)(weights)
            return total, [jnp.abs(w * slope) for w, slope in zip(weights, slopes, strict=True)]

        total, plain = scored(positive)
        sound = (total != 0) & jnp.isfinite(total)
        for x in plain:
            sound &= jnp.all(jnp.isfinite(x))
        scores = lax.cond(sound, lambda: plain, lambda: scored([_unit_gain(w) for w in positive])[1])
        return matching(params, floats.alone(scores), name="scores")

    return Score(function, "synflow", ("batch", "whole") if input_shape is None else ("whole",), where)


def fisher(
    loss: Callable[[PyTree, PyTree], PyTree],
    *,
    microbatch: int = 16,
    saliency: bool = False,
    where: Where | None = None,
) -> Score:
    """Score weights by diagonal Fisher information: the mean over examples of the squared gradient of the loss.

    Needs ``batch``, a tree of arrays (examples, ...) and scalars, which ``loss`` gets unchanged. Its labels give the
    empirical Fisher information; labels drawn from the model's predictions give the true one.

    Args:
      loss: ``loss(params, batch)`` returns a scalar. It is called with batches of one example (leading axis 1), so a
        loss that averages over a batch can be used unchanged.
      microbatch: number of examples differentiated at once; memory is needed for as many gradients.
      saliency: return w^2 F / 2 instead, the increase of the loss expected from removing w.
      where: see ``Score``.

    Source: Theis et al., "Faster gaze prediction with dense networks and Fisher pruning", 2018, arXiv 1801.05787,
    equation 6 (with ``saliency``).

    >>> loss = lambda w, batch: jnp.sum(batch @ w)
    >>> fisher(loss)(jnp.array([[1.0], [1.0]]), batch=jnp.array([[1.0, 3.0], [3.0, 0.0]]))[:, 0]
    Array([5. , 4.5], dtype=float32)
    """
    integer("microbatch", microbatch, least=1)

    def function(params: PyTree, grad: PyTree, batch: PyTree, key: PRNGKeyArray | None, whole: PyTree) -> PyTree:
        examples = number_of_examples(batch)
        floats = _floats(whole)
        leaves, treedef = jax.tree.flatten(batch)
        arrays = [leaf for leaf in leaves if has_examples(leaf)]

        def squares(example: list[Array]) -> list[Array]:
            rest = iter(example)
            alone = jax.tree.unflatten(treedef, [next(rest)[None] if has_examples(leaf) else leaf for leaf in leaves])
            slopes = jax.grad(lambda weights: _scalar(loss(floats.whole(weights), alone)))(floats.leaves)
            return [jnp.square(g.astype(working_dtype(g))) for g in slopes]

        def add(total: list[Array], part: list[Array]) -> tuple[list[Array], None]:
            return [t + s.sum(0) for t, s in zip(total, jax.vmap(squares)(part), strict=True)], None

        total = [jnp.zeros(leaf.shape, working_dtype(leaf)) for leaf in floats.leaves]
        rounds = examples // microbatch
        cut = rounds * microbatch
        if rounds:
            parts = [x[:cut].reshape(rounds, microbatch, *x.shape[1:]) for x in arrays]
            total, _ = lax.scan(add, total, parts)
        if cut < examples:
            total, _ = add(total, [x[cut:] for x in arrays])
        means = matching(params, floats.alone([t / examples for t in total]), name="scores")
        if not saliency:
            return means
        return map_leaves(lambda w, f: 0.5 * jnp.square(w.astype(f.dtype)) * f, params, means)

    return Score(function, "fisher", ("batch", "whole"), where)


@amount_by_keyword
def iterated_masks(
    score: Score | Callable[..., PyTree],
    params: PyTree,
    *,
    sparsity: Sparsity | None = None,
    keep: Counts | None = None,
    rounds: int = 100,
    batch: PyTree = None,
    key: PRNGKeyArray | None = None,
    min_keep: int = 0,
    axes: Axes = None,
) -> PyTree:
    """Score and prune in rounds, keeping n (keep / n)^(k / rounds) of n weights after round k.

    Use SynFlow in this way: ``iterated_masks(synflow(apply, input_shape=...), params, sparsity=0.99)``.
    Weights pruned in one round are 0 in the next, and pruned weights never come back.

    Args:
      score: a score that needs no gradient, or a function with the signature of a ``Score``.
      params: tree of arrays; the leaves that the ``where`` of the score selects are pruned, or by default those that
        ``prune`` selects with these ``axes``.
      sparsity: the fraction of the weights to remove in the end.
      keep: the number of weights to keep in the end.
      rounds: number of rounds.
      batch: batch for the score.
      key: PRNG key for the score, folded with the round.
      min_keep: minimum number of weights that every layer keeps.
      axes: see ``global_masks``; only ``min_keep`` and the leaves pruned by default depend on it.

    Returns:
      Masks like ``params``, None where nothing is prunable; exactly ``keep`` weights are kept.

    Raises:
      TypeError, ValueError: as ``global_masks``; ``score`` is not a valid score, needs a gradient or has no score for a
        leaf; ``rounds`` is not a positive integer.

    Source: Tanaka et al., 2020, arXiv 2006.05467, algorithm 1.

    >>> iterated_masks(synflow(lambda w, x: x @ w, input_shape=(1, 3)), jnp.array([[1.0], [-3.0], [2.0]]), keep=2)[:, 0]
    Array([False,  True,  True], dtype=bool)
    """
    refuse_no_score(score)
    if isinstance(score, Score) and "grad" in score.needs:
        raise ValueError(f"the score {score.name} needs a new gradient in every round; write your own loop instead")
    integer("rounds", rounds, least=1)
    selected = selected_by(where_of(score.where if isinstance(score, Score) else None, axes), params)
    shapes = shapes_of(params)
    with known_shapes(shapes):
        like = layers_of(selected, None, axes, per_layer="min_keep" if min_keep else None, shapes_only=True)
    sizes = like.sizes
    size, total = sum(sizes), allocation.kept(amount_of(sparsity, keep), sum(sizes))
    floors = allocation.floors(min_keep, sizes, total) if min_keep else None
    counts = [max(total, round(size * (total / max(size, 1)) ** (k / rounds))) for k in range(1, rounds)] + [total]
    table = Count(*(jnp.asarray(limb) for limb in uint64.count_of(counts)))

    def prune(k: Array, carry: tuple[PyTree, list[Array]]) -> tuple[PyTree, list[Array]]:
        masks, nan = carry
        with known_shapes(shapes):
            scores = score_selected(
                score,
                apply_masks(selected, masks),
                batch=batch,
                key=None if key is None else jax.random.fold_in(key, k),
                whole=apply_masks(params, masks),
            )
        layers = layers_of(scores, masks)
        if missing := [path for path in like.paths if path not in layers.paths]:
            raise ValueError(
                f"score={score.name if isinstance(score, Score) else name_of(score)} has no score for '{missing[0]}'; "
                "leave this leaf out with the where= of the score"
            )
        layers = layers._replace(stacked=like.stacked)
        nan = [before | now for before, now in zip(nan, any_nan(layers.scores, layers.masks), strict=True)]
        return layers.tree(choose(layers, Quota(floors, Count(table.high[k], table.low[k])))), nan

    dense = map_leaves(lambda w: jnp.ones_like(w, dtype=bool), selected)
    masks, nan = lax.fori_loop(0, rounds, prune, (dense, [jnp.zeros([], bool)] * len(like.paths)))
    if not any(isinstance(flag, jax.core.Tracer) for flag in nan):
        refuse_nan(like.paths, nan)
    return masks


def average_gradients(
    loss: Callable[..., PyTree], params: PyTree, batches: Iterable[PyTree], *, has_aux: bool = False
) -> PyTree:
    """Return the gradient of a loss averaged over batches, with the same weight for every example.

    Args:
      loss: ``loss(params, batch)``, a pure function that returns the mean over the batch's examples, a scalar. It sets
        train or eval mode; see the module for a model with batch normalization. If it is made by ``jax.jit``, its
        gradient is compiled once for all calls with these shapes; any other function is compiled at every call.
      params: tree of arrays; the gradient is taken with respect to its float leaves.
      batches: a list or a generator of trees of arrays (examples, ...). Batches with more examples have more weight.
      has_aux: whether ``loss`` returns (scalar, aux); aux, such as new running statistics, is dropped.

    Returns:
      A tree like ``params``, at least float32, None at leaves that are not float arrays.

    Raises:
      TypeError: ``batches`` is one batch.
      ValueError: there is no batch, or ``loss`` does not return a scalar.

    >>> average_gradients(lambda w, x: jnp.mean(w * x), jnp.array(1.0), [jnp.array([1.0, 2.0]), jnp.array([6.0])])
    Array(3., dtype=float32)
    """
    refuse_one_batch(batches)
    floats = _floats(params)

    def add(total: list[Array], weights: list[Array], batch: PyTree) -> list[Array]:
        def value(weights: list[Array]) -> Array:
            result = loss(floats.whole(weights), batch)
            return _scalar(result[0] if has_aux else result)

        slopes = jax.grad(value)(weights)
        return [t + g.astype(t.dtype) * number_of_examples(batch) for t, g in zip(total, slopes, strict=True)]

    # The gradient of a function made by jax.jit is compiled once.
    added: Callable[..., list[Array]] = add if isinstance(loss, jax.stages.Wrapped) else jax.jit(add)
    total, number = [jnp.zeros(leaf.shape, working_dtype(leaf)) for leaf in floats.leaves], 0
    for batch in batches:
        total, number = added(total, floats.leaves, batch), number + number_of_examples(batch)
    if not number:
        raise ValueError("batches has no example; pass at least one batch")
    return floats.alone([t / number for t in total])


def _floats(tree: PyTree) -> Subset:
    """Return the float leaves of a tree, which are differentiated."""
    subset = Subset.of(tree, is_float)
    if not subset.leaves:
        raise ValueError("params has no float array; pass the tree of the model's parameters")
    return subset


def _scalar(value: PyTree) -> Array:
    if jnp.size(value) != 1:
        raise ValueError(f"loss returned an array of shape {jnp.shape(value)}; it must return a scalar")
    return jnp.reshape(value, ())


def _unit_gain(weights: Array) -> Array:
    """Divide positive weights (..., in, out) by the mean over outputs of their sum."""
    if weights.ndim < 2:
        return weights
    gain = jnp.sum(weights) / weights.shape[-1]
    return weights / jnp.where(gain > 0, gain, jnp.ones_like(gain))
