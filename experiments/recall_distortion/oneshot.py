"""Prune trained networks once with ``jprune.prune``: gradients, scores, and exact numbers of weights."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PyTree

import jprune
from experiments.data import datasets
from experiments.training.tasks import Context, Mode, Task
from jprune import trees
from jprune.pruning.amounts import Scheduled
from jprune.pruning.structured.selection import ChannelSelection
from jprune.trees import Where

PRUNABLE = jprune.by_path(exclude=r"^head/")
"""All kernels except those of the output layer, which the built-in models call head."""


def gradient(
    task: Task,
    params: PyTree,
    stats: PyTree,
    key: jax.Array,
    train: datasets.Split,
    *,
    batch: int,
    batches: int,
    mode: Mode,
    decay: float,
) -> PyTree:
    """Return the gradient for a score: the mean over training batches drawn without replacement.

    Args:
      task: computes the loss.
      params: parameters of one replicate.
      stats: its other state, which does not change.
      key: PRNG key that draws the batches.
      train: the training split.
      batch: examples in a batch.
      batches: number of batches.
      mode: whether the loss is computed in training or in evaluation mode.
      decay: coefficient of weight decay in the gradient; 0 for the gradient of the cross-entropy alone.

    Returns:
      A tree like ``params``.
    """
    examples = train.labels.shape[0]
    order = jax.random.permutation(jax.random.fold_in(key, 0), examples)[: batch * batches]

    def add(total: PyTree, part: tuple[jax.Array, jax.Array]) -> tuple[PyTree, None]:
        chosen, i = part
        one = datasets.Split(train.images[chosen], train.labels[chosen])
        context = Context(stats, one, jax.random.fold_in(jax.random.fold_in(key, 1), i))
        grads, _ = jax.grad(task.loss, has_aux=True)(params, context, mode)
        return jax.tree.map(jnp.add, total, grads), None

    zeros = jax.tree.map(jnp.zeros_like, params)
    total, _ = jax.lax.scan(add, zeros, (order.reshape(batches, batch), jnp.arange(batches)))
    return jax.tree.map(lambda g, w: g / batches + decay * w, total, params)


def prunable(pattern: str | None) -> Where:
    """Return the predicate of the prunable leaves: kernels whose path matches, or all except those of ``head``.

    Raises:
      ValueError: the pattern is not a regular expression.

    >>> where = prunable("^(one|two)/")
    >>> where("one/kernel", jnp.ones((2, 2))), where("three/kernel", jnp.ones((2, 2)))
    (True, False)
    """
    if pattern is None:
        return PRUNABLE
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"prunable={pattern!r} is not a regular expression: {error}") from error
    return lambda path, leaf: jprune.kernels(path, leaf) and compiled.search(path) is not None


def score_of(name: str, epsilon: float, where: Where = PRUNABLE) -> jprune.scores.Score:
    """Return the score with this name.

    Args:
      name: a ``Score`` of ``config``.
      epsilon: epsilon of ``undecayed``.
      where: predicate of the prunable leaves.
    """
    undecayed = functools.partial(jprune.undecayed, epsilon, where=where)
    factories = {
        "magnitude": functools.partial(jprune.magnitude, where=where),
        "gradient": functools.partial(jprune.gradient, where=where),
        "undecayed": undecayed,
        "undecayed-signed": functools.partial(undecayed, signed=True),
        "random": functools.partial(jprune.random, where=where),
    }
    return factories[name]()


def prune(
    params: PyTree,
    scores: PyTree,
    keep: jax.Array,
    *,
    where: Where = jprune.kernels,
    signed: bool = False,
    min_keep: int = 0,
) -> tuple[PyTree, PyTree, jax.Array]:
    """Keep the weights with the largest scores and set the others to zero.

    Args:
      params: parameters of one replicate.
      scores: a tree like ``params``, None in place of leaves that are not prunable.
      keep: int32 scalar, number of prunable weights to keep; traced, so that one program serves all ratios.
      where: predicate of the prunable leaves.
      signed: whether to keep every weight whose |score| is at least the keep-th largest *signed* score, as in the code
        of the published runs. This keeps more than ``keep`` weights if scores are negative.
      min_keep: minimum number of weights that every layer keeps.

    Returns:
      The pruned parameters, the masks, and the number of prunable weights kept, int32.
    """
    masks_of = jprune.selection.legacy_signed_masks if signed else jprune.global_masks

    def selection(
        scores: PyTree, sparsity: float, **options: object
    ) -> PyTree:  # the traced count replaces the sparsity
        return masks_of(scores, keep=keep, **options)

    tx = jprune.prune(lambda weights, **_: scores, {0: 0.5}, where=where, selection=selection, min_keep=min_keep)
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    kept = [mask.sum(dtype=jnp.int32) for mask in jax.tree.leaves(state.masks)]
    return optax.apply_updates(params, updates), state.masks, jnp.stack(kept).sum(dtype=jnp.int32)


def rounded(params: PyTree, bits: int, where: Where) -> PyTree:
    """Round the prunable weights to a symmetric grid: 2^(bits - 1) - 1 steps from 0 to the largest |w| of each leaf.

    >>> rounded({"kernel": jnp.array([[1.0, 0.3, -0.1]])}, 2, jprune.kernels)["kernel"].tolist()
    [[1.0, 0.0, -0.0]]
    """
    levels = 2 ** (bits - 1) - 1

    def leaf(weights: jax.Array) -> jax.Array:
        step = jnp.abs(weights).max() / levels
        return jnp.where(step > 0, jnp.round(weights / jnp.where(step > 0, step, 1)) * step, 0)

    paths, leaves, treedef = trees.flatten(params)
    return jax.tree.unflatten(
        treedef, [leaf(w) if where(path, w) else w for path, w in zip(paths, leaves, strict=True)]
    )


def channel_selection(task: Task, template: tuple[PyTree, PyTree], images: jax.ShapeDtypeStruct) -> ChannelSelection:
    """Return the selection of whole channels of a model, by a fraction of its multiply-adds.

    Args:
      task: the task, with the model.
      template: shapes of (params, stats) of one replicate.
      images: shape and dtype of a batch of stored images.

    Raises:
      ValueError: the model has no channels that can be removed.
    """
    params, stats = template
    if jax.tree.leaves(stats):
        graph = jprune.trace_model(lambda p, x, *, state: task.logits(p, state, x), params, images, state=stats)
    else:
        graph = jprune.trace_model(lambda p, x: task.logits(p, stats, x), params, images)
    return jprune.structured(graph, budget="multiply_adds")


def prune_channels(
    selection: ChannelSelection, params: PyTree, scores: PyTree, sparsities: tuple[float, ...], index: jax.Array
) -> tuple[PyTree, PyTree, jax.Array]:
    """Remove the channels with the lowest mean scores: all their kernel, bias and normalization weights become zero.

    Args:
      selection: result of ``channel_selection``.
      params: parameters of one replicate.
      scores: a tree like ``params``, None in place of leaves that are not prunable.
      sparsities: the fractions of the multiply-adds of all ratios.
      index: int32 scalar, position in ``sparsities``.

    Returns:
      The pruned parameters, masks of all leaves, and the number of prunable weights kept, int32. Fine-tuning needs the
      masks of biases too: the jumpstart penalty has a gradient for a channel without inputs.
    """
    masks = selection(scores, sparsity=Scheduled(sparsities, (0.0,) * len(sparsities), index))
    kept = jax.tree.map(lambda score, mask: None if score is None else mask.sum(dtype=jnp.int32), scores, masks,
                        is_leaf=lambda leaf: leaf is None)  # fmt: skip
    masks = jax.tree.map(lambda leaf, mask: jnp.ones(leaf.shape, bool) if mask is None else mask, params, masks)
    return jprune.apply_masks(params, masks), masks, jnp.stack(jax.tree.leaves(kept)).sum(dtype=jnp.int32)


def needs_gradient(name: str) -> bool:
    """Whether a score needs the gradient.

    >>> needs_gradient("undecayed"), needs_gradient("magnitude")
    (True, False)
    """
    return "grad" in score_of(name, 0.0).needs
