"""Classification of a data set by a model, as pure functions of one replicate."""

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen, nnx
from jaxtyping import PyTree

import jprune
from experiments.data import datasets
from experiments.data.augment import normalise
from experiments.models import networks, own
from experiments.models.options import is_own

Mode = Literal["train", "eval"]
Augment = Callable[[jax.Array, jax.Array], jax.Array]


class Context(NamedTuple):
    """Inputs of a forward pass in training mode, other than the parameters.

    Attributes:
      stats: the model's state that is not trained, such as running means.
      batch: images as stored, and labels.
      key: key of the augmentation and of dropout, the same for every pass over this batch.
    """

    stats: PyTree
    batch: datasets.Split
    key: jax.Array


@dataclasses.dataclass(frozen=True)
class Task:
    """Pure functions of one replicate.

    Attributes:
      init: key -> (params, stats); ``stats`` is the model's state that is not trained.
      loss: (params, context, mode) -> (mean loss of the batch, stats). ``train`` augments, normalizes
        by the batch and updates ``stats``; ``eval`` does neither.
      logits: (params, stats, images as stored) -> (batch, classes), in evaluation mode.
      preactivations: (params, context) -> preactivations by layer, of the forward pass of ``loss`` in
        training mode.
    """

    init: Callable[[jax.Array], tuple[PyTree, PyTree]]
    loss: Callable[[PyTree, Context, Mode], tuple[jax.Array, PyTree]]
    logits: Callable[[PyTree, PyTree, jax.Array], jax.Array]
    preactivations: Callable[[PyTree, Context], PyTree]


def classification(
    dataset: datasets.Dataset,
    model: str | Callable[..., object],
    *,
    augment: Augment | None = None,
    options: Mapping[str, object] | None = None,
) -> Task:
    """Return the task of classifying a data set with a model and cross-entropy.

    Args:
      dataset: data set, which determines the input shape, the classes and the normalization.
      model: a name that ``networks.create`` knows, ``package.module:Class``, or a class: an NNX module with
        (inputs) -> logits that takes ``rngs``, or a Linen module with (inputs) -> logits, whose argument
        ``train``, if it has one, is True in training.
      augment: (key, images as stored) -> images, for training batches; None for no augmentation.
      options: keyword arguments of the model.

    Raises:
      ValueError: the model or an option is unknown, or logits do not have shape (batch, classes).
    """
    shape, classes, given = dataset.input_shape, dataset.num_classes, dict(options or {})
    cls = own.load(model) if isinstance(model, str) and is_own(model) else model
    make = networks.create if isinstance(cls, str) else own.create
    create = lambda rngs: make(cls, num_classes=classes, input_shape=shape, rngs=rngs, **given)
    if own.is_linen(cls):
        task = _linen_task(dataset, create(nnx.Rngs(0)), augment)
    else:
        task = _nnx_task(dataset, create, augment)
    _check_logits(task, dataset, model)
    return task


def _check_logits(task: Task, dataset: datasets.Dataset, model: str | Callable[..., object]) -> None:
    images = jax.ShapeDtypeStruct((2, *dataset.input_shape), dataset.train.images.dtype)
    name = model if isinstance(model, str) else own.spec(model)
    try:
        found = jax.eval_shape(lambda key, x: task.logits(*task.init(key), x), jax.random.key(0), images)
    except Exception as error:  # the model may be the user's, and raise anything
        cls = own.load(model) if isinstance(model, str) and is_own(model) else model
        why = str(error) if isinstance(cls, str) else own.described(error, cls)
        raise ValueError(f"model={name!r} cannot be called on images of shape {images.shape}: {why}") from error
    wanted = (2, dataset.num_classes)
    if getattr(found, "shape", None) != wanted:
        shapes = jax.tree.map(lambda leaf: f"{leaf.dtype}{list(leaf.shape)}", found)
        raise ValueError(
            f"model={name!r} returns {shapes} for two examples of {dataset.name}; it must return logits of shape "
            f"{wanted}, one for each class"
        )


def _nnx_task(dataset: datasets.Dataset, create: Callable[[nnx.Rngs], nnx.Module], augment: Augment | None) -> Task:
    abstract = nnx.eval_shape(lambda: create(nnx.Rngs(jax.random.key(0))))
    abstract.train()
    training = nnx.graphdef(abstract)
    abstract.eval()
    evaluation = nnx.graphdef(abstract)
    streams = nnx.state(abstract, nnx.RngState)  # the streams of dropout

    def keys(key: jax.Array) -> PyTree:
        """Return new random streams for one pass; empty for a model without dropout."""
        leaves, treedef = jax.tree.flatten(streams)
        fresh = [
            jax.random.fold_in(key, i)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else jnp.zeros(leaf.shape, leaf.dtype)
            for i, leaf in enumerate(leaves)
        ]
        return jax.tree.unflatten(treedef, fresh)

    def network(graph: nnx.GraphDef, params: PyTree, stats: PyTree, key: jax.Array) -> nnx.Module:
        # Make a copy, because the variables of ``stats`` belong to the caller, possibly to another trace.
        return nnx.merge(graph, params, keys(key), stats, copy=True)

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        _, params, _, stats = nnx.split(create(nnx.Rngs(key)), nnx.Param, nnx.RngState, ...)
        return params, stats

    def loss(params: PyTree, context: Context, mode: Mode) -> tuple[jax.Array, PyTree]:
        called = network(training if mode == "train" else evaluation, params, context.stats, context.key)
        images = _inputs(dataset, context, augment if mode == "train" else None)
        mean = cross_entropy(called(images), context.batch.labels).mean()
        return mean, nnx.state(called, nnx.Not(nnx.Any(nnx.Param, nnx.RngState)))

    def logits(params: PyTree, stats: PyTree, images: jax.Array) -> jax.Array:
        return network(evaluation, params, stats, jax.random.key(0))(normalise(images, dataset.mean, dataset.std))

    def preactivations(params: PyTree, context: Context) -> PyTree:
        return jprune.preactivations(
            network(training, params, context.stats, context.key), _inputs(dataset, context, augment)
        )

    return Task(init, loss, logits, preactivations)


def _linen_task(dataset: datasets.Dataset, module: linen.Module, augment: Augment | None) -> Task:
    takes_train = "train" in inspect.signature(type(module).__call__).parameters
    flag = lambda train: {"train": train} if takes_train else {}
    in_training = lambda context: {**flag(True), "rngs": {"dropout": context.key}, "mutable": list(context.stats)}

    def init(key: jax.Array) -> tuple[PyTree, PyTree]:
        example = jnp.zeros((1, *dataset.input_shape), jnp.float32)
        variables = dict(module.init({"params": key, "dropout": key}, example, **flag(False)))
        return variables.pop("params"), variables

    def loss(params: PyTree, context: Context, mode: Mode) -> tuple[jax.Array, PyTree]:
        variables = {"params": params, **context.stats}
        images = _inputs(dataset, context, augment if mode == "train" else None)
        if mode == "eval":
            outputs, stats = module.apply(variables, images, **flag(False)), context.stats
        else:
            outputs, stats = module.apply(variables, images, **in_training(context))
        return cross_entropy(outputs, context.batch.labels).mean(), dict(stats)

    def logits(params: PyTree, stats: PyTree, images: jax.Array) -> jax.Array:
        return module.apply({"params": params, **stats}, normalise(images, dataset.mean, dataset.std), **flag(False))

    def preactivations(params: PyTree, context: Context) -> PyTree:
        variables = {"params": params, **context.stats}
        return jprune.preactivations(module, variables, _inputs(dataset, context, augment), **in_training(context))

    return Task(init, loss, logits, preactivations)


def _inputs(dataset: datasets.Dataset, context: Context, augment: Augment | None) -> jax.Array:
    """Return the images of a batch, augmented and normalized."""
    images = context.batch.images if augment is None else augment(context.key, context.batch.images)
    return normalise(images, dataset.mean, dataset.std)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the cross-entropy of each example, in nats.

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
    """Divide a split into slices of equal size for evaluation; returns (number of slices, examples in a slice).

    The last slice ends with the split, so its first examples may be in the slice before it too.

    >>> slices(450), slices(1001)
    ((1, 450), (3, 500))
    """
    size = min(examples, most)
    return -(-examples // size), size


def evaluate_slice(
    task: Task, weights: tuple[PyTree, PyTree], split: datasets.Split, position: jax.Array, size: int
) -> tuple[jax.Array, jax.Array]:
    """Sum cross-entropy and correct predictions over the examples of a slice that are in no earlier slice.

    Args:
      task: task that computes the logits.
      weights: (params, stats) of one replicate.
      split: examples, always in the same order.
      position: position of the slice.
      size: size of a slice.

    Returns:
      float32 scalars.
    """
    start = jnp.minimum(position * size, split.labels.shape[0] - size)
    images, labels = (jax.lax.dynamic_slice_in_dim(array, start, size) for array in split)
    new = start + jnp.arange(size) >= position * size
    logits = task.logits(*weights, images)
    correct = (jnp.argmax(logits, -1) == labels) & new
    return jnp.where(new, cross_entropy(logits, labels), 0).sum(), correct.astype(jnp.float32).sum()


def predict_slice(
    task: Task, weights: tuple[PyTree, PyTree], images: jax.Array, position: jax.Array, size: int
) -> jax.Array:
    """Return the class of the largest logit for each example of a slice, (size,) int32.

    Args:
      task: task that computes the logits.
      weights: (params, stats) of one replicate.
      images: (examples, ...) as stored.
      position: position of the slice.
      size: size of a slice.
    """
    start = jnp.minimum(position * size, images.shape[0] - size)
    logits = task.logits(*weights, jax.lax.dynamic_slice_in_dim(images, start, size))
    return jnp.argmax(logits, -1).astype(jnp.int32)
