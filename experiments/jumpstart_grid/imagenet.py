"""ResNet-50 on ImageNet without batch normalization and shortcuts, with the jumpstart penalty (IEEE Access 2025).

``python -m experiments.jumpstart_grid.imagenet --data-dir DIR --out runs/imagenet`` streams imagenet2012 from
prepared TensorFlow Datasets, splits each batch over all devices of the processes that a launcher starts, and appends
accuracy and dead units to ``metrics.csv`` after each epoch. To continue a killed run after its last checkpoint, rerun
its command; an epoch that is repeated has two rows; use the last. Expect a top-1 accuracy near .67 with
``--method jumpstart`` (published).

Cost: not measured; 90 epochs are 450,000 steps of batch 256, for a node of GPUs. The paper specifies the network and
the penalty (``balanced``, lambda .01). The optimizer is inferred: SGD with momentum .9, a learning rate of .1 with five
epochs of warm-up and cosine decay, weight decay 1e-4.
"""

import dataclasses
import io
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import ArrayLike, PyTree

import jprune
from experiments.cli import commands, metrics
from experiments.data import image_sets
from experiments.data.augment import normalise
from experiments.models.resnet50 import ResNet50
from experiments.storage import checkpoints, files, store
from experiments.storage import settings as recorded
from experiments.storage.checkpoints import Checkpoints
from experiments.storage.files import JSON
from experiments.training import processes, replicates

_MEAN, _STD = np.array([123.675, 116.28, 103.53], np.float32), np.array([58.395, 57.12, 57.375], np.float32)
Batch = tuple[ArrayLike, ArrayLike]  # images (batch, height, width, 3) uint8 and labels (batch,) int32


@dataclasses.dataclass(frozen=True)
class ImageNet:
    """Train ResNet-50 on ImageNet, each batch split over all devices."""

    data_dir: Path | None = None
    """Folder of prepared TensorFlow Datasets; ~/tensorflow_datasets by default."""
    out: Path = Path("runs/imagenet")
    """Folder of the results."""
    method: Literal["jumpstart", "plain", "resnet"] = "jumpstart"
    """jumpstart: no normalization, no shortcuts, with the penalty. plain: the same without the penalty. resnet:
    with normalization and shortcuts."""
    epochs: int = 90
    """Passes over the training images."""
    batch: int = 256
    """Images per step, a multiple of the number of devices."""
    lr: float = 0.1
    """Peak learning rate."""
    coefficient: float = 0.01
    """Coefficient lambda of the penalty."""
    size: int = 224
    """Height and width of an image."""
    seed: int = 0
    """Seed of weights, order and crops."""

    def __post_init__(self):
        """Validate the options."""
        commands.check_kinds(self)
        commands.check_at_least(self, epochs=1, batch=1, lr=0, coefficient=0, size=1, seed=0)


class ImageNetState(NamedTuple):
    """The network in training: parameters, other state and the state of the optimizer."""

    params: PyTree
    stats: PyTree
    opt_state: optax.OptState


class Trainer(NamedTuple):
    """Compiled functions of a network.

    Attributes:
      init: key -> state.
      step: (state, batch) -> (state, loss); donates the state.
      correct: (state, batch) -> number of correct predictions; an image with the label -1 is never counted.
      dead: (state, batch) -> fraction of hidden units that are dead on the batch, before any normalization.
    """

    init: Callable[[jax.Array], ImageNetState]
    step: Callable[[ImageNetState, Batch], tuple[ImageNetState, jax.Array]]
    correct: Callable[[ImageNetState, Batch], jax.Array]
    dead: Callable[[ImageNetState, Batch], jax.Array]


def trainer(settings: ImageNet, steps: int, mesh: Mesh, **model: object) -> Trainer:
    """Build the training functions; parameters are replicated and batches split over the mesh.

    Under jit, means and the extremes of the penalty are over the whole batch.

    Args:
      settings: method, learning rate and coefficient.
      steps: number of steps in an epoch.
      mesh: one axis over all devices.
      **model: options of ``ResNet50``.

    Raises:
      ValueError: the batch is not a multiple of the number of devices.
    """
    if settings.batch % mesh.size:
        raise ValueError(f"batch={settings.batch} must be a multiple of the {mesh.size} devices")
    whole = settings.method == "resnet"
    create = lambda key: ResNet50(**{"normalized": whole, "shortcut": whole, **model}, rngs=nnx.Rngs(key))
    abstract = nnx.eval_shape(lambda: create(jax.random.key(0)))
    abstract.train()
    training = nnx.graphdef(abstract)
    abstract.eval()
    evaluation = nnx.graphdef(abstract)
    total, warm = settings.epochs * steps, 5 * steps
    schedule = optax.warmup_cosine_decay_schedule(0.0, settings.lr, min(warm, total // 2), total)
    tx = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(schedule, 0.9, nesterov=True))
    coefficient = settings.coefficient if settings.method == "jumpstart" else 0.0

    def init(key: jax.Array) -> ImageNetState:
        _, params, stats = nnx.split(create(key), nnx.Param, ...)
        return ImageNetState(params, stats, tx.init(params))

    def loss(params: PyTree, stats: PyTree, batch: Batch) -> tuple[jax.Array, PyTree]:
        network = nnx.merge(training, params, stats, copy=True)
        logits, preactivations = jprune.jumpstart.call_with_preactivations(network, _scaled(batch[0]))
        value = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()
        if coefficient:
            value += coefficient * jprune.jumpstart_penalty(preactivations, "ieee")
        return value, nnx.state(network, nnx.Not(nnx.Param))

    def step(state: ImageNetState, batch: Batch) -> tuple[ImageNetState, jax.Array]:
        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(state.params, state.stats, batch)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        return ImageNetState(optax.apply_updates(state.params, updates), stats, opt_state), value

    def correct(state: ImageNetState, batch: Batch) -> jax.Array:
        logits = nnx.merge(evaluation, state.params, state.stats)(_scaled(batch[0]))
        return (logits.argmax(-1) == batch[1]).sum()

    def dead(state: ImageNetState, batch: Batch) -> jax.Array:
        network = nnx.merge(evaluation, state.params, state.stats)
        statuses = jprune.unit_status(jprune.preactivations(network, _scaled(batch[0])))
        return (jnp.concatenate(jax.tree.leaves(statuses)) == -1).mean()

    same, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    return Trainer(
        jax.jit(init, out_shardings=same),
        jax.jit(step, in_shardings=(same, split), out_shardings=same, donate_argnums=0),
        jax.jit(correct, in_shardings=(same, split), out_shardings=same),
        jax.jit(dead, in_shardings=(same, split), out_shardings=same),
    )


def _scaled(images: jax.Array) -> jax.Array:
    return normalise(images, _MEAN, _STD)


def batches(
    source: image_sets.Examples, settings: ImageNet, rng: np.random.Generator | None, part: tuple[int, int] = (0, 1)
) -> Iterator[Batch]:
    """Stream decoded batches of a data source.

    In training the last partial batch is dropped. In evaluation it is filled with the first images, with the label -1.

    Args:
      source: a TFDS data source with the features ``image`` (an encoded file) and ``label``.
      settings: batch and size.
      rng: generator of the order, crops and flips of training; None for the order of the source and central crops.
      part: (i, n): this process decodes the i-th of n equal parts of every batch.

    Yields:
      Images (batch / n, size, size, 3) uint8, and labels (batch / n,) int32.
    """
    i, n = part
    share = settings.batch // n
    full = len(source) // settings.batch * settings.batch
    if rng is None:
        full += settings.batch * (full < len(source))
        order = np.resize(np.arange(len(source)), full)
    else:
        order = rng.permutation(len(source))
    for start in range(0, full, settings.batch):
        place = np.arange(start + i * share, start + (i + 1) * share)
        mine = order[place].tolist()
        seeds = [None] * share if rng is None else rng.integers(2**63, size=settings.batch)[i * share : (i + 1) * share]
        examples = source.__getitems__(mine)
        images = [crop(one["image"], settings.size, seed) for one, seed in zip(examples, seeds, strict=True)]
        labels = np.array([int(one["label"]) for one in examples], np.int32)
        yield np.stack(images), np.where(place < len(source), labels, -1).astype(np.int32)


def crop(encoded: bytes, size: int, seed: int | None) -> np.ndarray:
    """Decode an image and crop it to a square.

    Args:
      encoded: content of an image file.
      size: height and width of the result.
      seed: seed of a crop of 8 to 100% of the area with a ratio of 3/4 to 4/3, and a flip; None for the central
        crop of 7/8 of the shorter side.

    Returns:
      (size, size, 3) uint8.
    """
    from PIL import Image  # noqa: PLC0415 an extra

    with Image.open(io.BytesIO(encoded)) as file:
        image = file.convert("RGB")
        width, height = image.size
        if seed is None:
            side = 0.875 * min(width, height)
            box = ((width - side) / 2, (height - side) / 2, (width + side) / 2, (height + side) / 2)
        else:
            rng = np.random.default_rng(seed)
            area, ratio = rng.uniform(0.08, 1) * width * height, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
            w, h = min(width, np.sqrt(area * ratio)), min(height, np.sqrt(area / ratio))
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = (left, top, left + w, top + h)
            if rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return np.asarray(image.resize((size, size), Image.Resampling.BILINEAR, box=box))


def train(
    settings: ImageNet,
    source: image_sets.Examples,
    validation: image_sets.Examples,
    callbacks: Sequence[metrics.Callback] = (),
) -> np.ndarray:
    """Train for all epochs, after those of the checkpoint in the output folder; ``weights_of`` has the last weights.

    Returns:
      The validation accuracy of each epoch.

    Raises:
      ValueError: a batch is larger than a split, or not a multiple of the number of devices.
    """
    for name, examples in (("training", source), ("validation", validation)):
        if settings.batch > len(examples):
            raise ValueError(
                f"batch={settings.batch} is more than the {len(examples)} {name} images; use a smaller one"
            )
    mesh = Mesh(np.array(jax.devices()), ("batch",))
    compiled = trainer(settings, len(source) // settings.batch, mesh, num_classes=1000)
    split = NamedSharding(mesh, PartitionSpec("batch"))
    place = lambda batch: tuple(jax.make_array_from_process_local_data(split, array) for array in batch)
    part = (jax.process_index(), jax.process_count())
    state, accuracies = compiled.init(jax.random.key(settings.seed)), []
    options, first = _options(settings), processes.is_first()
    target = store.stage(settings.out / "store", "imagenet", options, range(1))
    kept = Checkpoints(target, options, 0, agree=processes.agree, writes=first)
    if kept.done:
        stored, done = checkpoints.unpack(kept.load(), (state, 0))
        state, accuracies = checkpoints.with_keys(replicates.share(stored, mesh), state), done.tolist()
        if first:
            print(f"continues after epoch {kept.done} of {settings.epochs}", flush=True)
    for epoch in range(kept.done + 1, settings.epochs + 1):
        rng = np.random.default_rng((settings.seed, epoch))
        losses = []
        for batch in batches(source, settings, rng, part):
            state, loss = compiled.step(state, place(batch))
            losses.append(loss)
        correct, full = 0, None
        for number, batch in enumerate(batches(validation, settings, None, part), 1):
            placed = place(batch)
            correct += compiled.correct(state, placed)
            full = placed if number * settings.batch <= len(validation) else full
        accuracies.append(float(correct) / len(validation))
        measured = {"train_loss": float(np.mean(losses)), "validation_accuracy": accuracies[-1]}
        measured["dead_units"] = float(compiled.dead(state, full))
        for callback in callbacks:
            callback(settings.method, range(1), epoch, {name: np.array([x]) for name, x in measured.items()})
        kept.save(epoch, checkpoints.pack((state, np.array(accuracies))))  # after its row, so that a kill loses none
        if first:
            print(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4f}" for name, value in measured.items()), flush=True)
    if first and not weights_of(settings).exists():
        paths, leaves, _ = jprune.trees.flatten(state.params)
        files.write_weights(weights_of(settings), dict(zip(paths, map(np.asarray, leaves), strict=True)))
    return np.array(accuracies)


def weights_of(settings: ImageNet) -> Path:
    """Return the folder of the last weights, which is another for every combination of options."""
    return settings.out / f"weights-{store.digest(_options(settings))}"


def _options(settings: ImageNet) -> dict[str, JSON]:
    """Return the settings that determine the results."""
    return {name: value for name, value in commands.to_json(settings).items() if name not in ("out", "data_dir")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""

    def work() -> None:
        settings = commands.parse(ImageNet, ImageNet(), arguments, "python -m experiments.jumpstart_grid.imagenet")
        processes.start()
        processes.watch_peers()
        try:
            run(settings)
        except BaseException:
            processes.give_up()
            raise
        processes.leave()

    def run(settings: ImageNet) -> None:
        stream = lambda split: image_sets.stream("imagenet2012", split, settings.data_dir)
        source, validation = stream("train"), stream("validation")
        callbacks = []
        if processes.is_first():
            print(
                f"results go to {settings.out}; {settings.epochs} epochs of ResNet-50 ({settings.method})", flush=True
            )
            running = {"out": str(settings.out), "data_dir": settings.data_dir and str(settings.data_dir)}
            recorded.record(settings.out, "jumpstart_grid.imagenet", _options(settings), running)
            writers = [metrics.to_csv(settings.out), metrics.to_tensorboard(settings.out / "tensorboard")]
            digest = store.digest(_options(settings))
            callbacks = [partial(writer, digest=digest) for writer in writers if writer is not None]
        train(settings, source, validation, callbacks)

    return commands.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
