"""One-shot pruning of dense checkpoints: gradients, scores, and masks of an exact size."""

import functools

import jax
import jax.numpy as jnp

import jprune
from experiments.data import datasets
from experiments.training.tasks import Context, Mode, PyTree, Task

PRUNABLE = jprune.by_path(exclude=r"^head/")
"""Kernels except the output layer's: what the study prunes."""


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
    """The gradient that a score sees: the mean over training batches drawn without replacement.

    Args:
      task: gives the loss.
      params: of one replicate.
      stats: of the same; they stay as they are.
      key: draws the batches.
      train: the training split.
      batch: examples in a batch.
      batches: how many.
      mode: whether the loss is that of training or of use.
      decay: times every parameter is added, 0 for the gradient of the cross-entropy alone.

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


def score_of(name: str, epsilon: float) -> jprune.scores.Score:
    """The score with this name, over what may be pruned.

    Args:
      name: a ``Score`` of the presets.
      epsilon: the decay that ``undecayed`` gives back.
    """
    undecayed = functools.partial(jprune.undecayed, epsilon, where=PRUNABLE)
    factories = {
        "magnitude": functools.partial(jprune.magnitude, where=PRUNABLE),
        "gradient": functools.partial(jprune.gradient, where=PRUNABLE),
        "undecayed": undecayed,
        "undecayed-signed": functools.partial(undecayed, signed=True),
        "random": functools.partial(jprune.random, where=PRUNABLE),
    }
    return factories[name]()


def prune(params: PyTree, scores: PyTree, keep: jax.Array, *, signed: bool = False) -> tuple[PyTree, jax.Array]:
    """Keep the best weights of one replicate and set the others to zero.

    Args:
      params: of one replicate.
      scores: a tree like it, None where nothing may be pruned.
      keep: int32 scalar, the number of prunable weights to keep.
      signed: keep every weight whose |score| reaches the keep-th largest *signed* score, as the code
        behind the published runs did: more weights than asked, where scores are negative.

    Returns:
      the pruned parameters, and int32 how many prunable weights are kept.
    """
    selection = jprune.selection.legacy_signed_masks if signed else jprune.global_masks
    masks = selection(scores, keep=keep)
    kept = [mask.sum(dtype=jnp.int32) for mask in jax.tree.leaves(masks)]
    return jprune.apply_masks(params, masks), jnp.stack(kept).sum(dtype=jnp.int32)


def needs_gradient(name: str) -> bool:
    """Whether a score reads the gradient.

    >>> needs_gradient("undecayed"), needs_gradient("magnitude")
    (True, False)
    """
    return "grad" in score_of(name, 0.0).needs
