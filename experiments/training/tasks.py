"""What is learnt: the classification of a data set by a model, as pure functions of one replicate."""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

import jprune
from experiments.data import datasets
from experiments.data.augment import normalise
from experiments.models import networks

PyTree = Any
Mode = Literal["train", "eval"]
Augment = Callable[[jax.Array, jax.Array], jax.Array]


class Context(NamedTuple):
    """What a forward pass in training mode needs beside the parameters.

    Attributes:
      stats: the model's state that is no parameter.
      batch: images as stored, and labels.
      key: of the augmentation, the same for every pass over this batch.
    """

    stats: PyTree
    batch: datasets.Split
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
    """Pure functions of one replicate.

    Attributes:
      init: key -> (params, stats); ``stats`` is every other state of the model, such as running means.
      loss: (params, context, mode) -> (mean loss of the batch, stats). ``train`` augments, normalizes
        by the batch and updates ``stats``; ``eval`` does neither.
      logits: (params, stats, images as stored) -> (batch, classes), in evaluation mode.
      preactivations: (params, context) -> preactivations by layer, of the forward pass that ``loss``
        makes in training mode.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, Context, Mode], tuple[jax.Array, PyTree]]
    logits: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    preactivations: Callable[[PyTree, Context], PyTree]


def classification(dataset: datasets.Dataset, model: str, *, augment: Augment | None = None, **options: Any) -> Task:
    """The task of classifying a data set with a registered model and cross-entropy.

    Args:
      dataset: decides the input shape, the classes and the normalisation.
      model: a name that ``models.create`` knows.
      augment: (key, images as stored) -> images, for training batches; None for none.
      **options: of the model.

    Raises:
      ValueError: an unknown model.
    """

    def create(key: jax.Array) -> nnx.Module:
        shape, classes = dataset.input_shape, dataset.num_classes
        return networks.create(model, num_classes=classes, input_shape=shape, rngs=nnx.Rngs(key), **options)

    abstract = nnx.eval_shape(lambda: create(jax.random.key(0)))
    abstract.train()
    training = nnx.graphdef(abstract)
    abstract.eval()
    evaluation = nnx.graphdef(abstract)

    def augmented(context: Context) -> jax.Array:
        images = context.batch.images if augment is None else augment(context.key, context.batch.images)
        return normalise(images, dataset.mean, dataset.std)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        _, params, stats = nnx.split(create(key), nnx.Param, ...)
        return params, stats

    def loss(params: PyTree, context: Context, mode: Mode) -> tuple[jax.Array, PyTree]:
        # A copy: the variables of ``context.stats`` are the caller's, perhaps of another trace.
        network = nnx.merge(training if mode == "train" else evaluation, params, context.stats, copy=True)
        images = augmented(context) if mode == "train" else normalise(context.batch.images, dataset.mean, dataset.std)
        mean = cross_entropy(network(images), context.batch.labels).mean()
        return mean, nnx.state(network, nnx.Not(nnx.Param))

    def logits(params: PyTree, stats: PyTree, images: jax.Array) -> jax.Array:
        return nnx.merge(evaluation, params, stats)(normalise(images, dataset.mean, dataset.std))

    def preactivations(params: PyTree, context: Context) -> PyTree:
        return jprune.preactivations(nnx.merge(training, params, context.stats), augmented(context))

    return Task(init, loss, logits, preactivations)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of each example, in nats.

    Args:
      logits: (batch, classes) float32.
      labels: (batch,) int32.

    Returns:
      (batch,) float32.

    >>> bool(jnp.allclose(cross_entropy(jnp.zeros((1, 4)), jnp.array([2])), jnp.log(4.0)))
    True
    """
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def slices(examples: int, most: int = 500) -> tuple[int, int]:
    """Cut a split into equal slices for evaluation: how many, and of how many examples each.

    The last slice begins where it still fits, so its first examples may be in the one before too.

    >>> slices(450), slices(1001)
    ((1, 450), (3, 500))
    """
    size = min(examples, most)
    return -(-examples // size), size


def evaluate_slice(
    task: Task, weights: tuple[PyTree, PyTree], split: datasets.Split, position: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy and right answers, summed over the examples of a slice that no earlier one has.

    Args:
      task: gives the logits.
      weights: (params, stats) of one replicate.
      split: examples in an order that stays.
      position: of the slice.
      size: of a slice.

    Returns:
      float32 scalars.
    """
    start = jnp.minimum(position * size, split.labels.shape[0] - size)
    images, labels = (jax.lax.dynamic_slice_in_dim(array, start, size) for array in split)
    new = start + jnp.arange(size) >= position * size
    logits = task.logits(*weights, images)
    right = (jnp.argmax(logits, -1) == labels) & new
    return jnp.where(new, cross_entropy(logits, labels), 0).sum(), right.astype(jnp.float32).sum()


def predict_slice(
    task: Task, weights: tuple[PyTree, PyTree], images: jax.Array, position: jax.Array, size: int
) -> jax.Array:
    """The class of the highest logit for each example of a slice, (size,) int32.

    Args:
      task: gives the logits.
      weights: (params, stats) of one replicate.
      images: (examples, ...) as stored.
      position: of the slice.
      size: of a slice.
    """
    start = jnp.minimum(position * size, images.shape[0] - size)
    logits = task.logits(*weights, jax.lax.dynamic_slice_in_dim(images, start, size))
    return jnp.argmax(logits, -1).astype(jnp.int32)
