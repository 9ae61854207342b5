"""Choose how many replicates one program computes and in which form, and estimate the time."""

import math
from typing import NamedTuple

import jax

from experiments.data import datasets
from experiments.models.options import is_own
from experiments.recall_distortion import plan
from experiments.recall_distortion.config import Running, Study
from experiments.training import replicates, steps
from experiments.training.replicates import Placement
from experiments.training.tasks import Task
from jprune.trees import Where

# Milliseconds per step of batch 128 for one replicate: of the studies' programs on two CPU cores (x86_64, AVX-512,
# 2026-11-29; other machines were half as fast and twice as fast), and on an NVIDIA H200 with twenty replicates in one
# program (docs/performance.md).
_STEP = {"lenet": {"cpu": 3.1, "gpu": 0.022}, "mlp": {"cpu": 1.4}, "resnet20": {"cpu": 515.0}}
# Shapes of the examples on which they were measured: MNIST and CIFAR.
_SHAPE = {"lenet": (28, 28, 1), "mlp": (28, 28, 1), "resnet20": (32, 32, 3)}
# Floating-point operations of their forward pass of 128 of these examples, from which other step times are estimated.
_FORWARD = {"lenet": 5.36e7, "mlp": 6.86e7, "resnet20": 1.082e10}
# Least milliseconds of a step and of an epoch of one replicate on one CPU core, however small the model. Measured with
# networks of 300 to 50,000 weights and batches of 8 to 512, on machines of which one is twice as fast as another.
_LEAST_STEP = {"cpu": (0.1, 0.004)}  # and per example of the batch
_LEAST_EPOCH = {"cpu": 1.0}
_MOST_UNROLLED = 4


class StepTime(NamedTuple):
    """Milliseconds per training step of one replicate, and the source of this number, in words.

    Attributes:
      milliseconds: of a step.
      source: in words.
      epoch: milliseconds of an epoch in addition to its steps.
    """

    milliseconds: float
    source: str
    epoch: float = 0.0


def chunk_size(study: Study, running: Running, dataset: datasets.Dataset, task: Task, where: Where) -> int:
    """Return how many replicates fit the memory of the devices: at least one per device, at most all.

    Args:
      study: settings, which determine the size of a step.
      running: run options, with this number or the memory of a device.
      dataset: data set, which determines the shape of a batch.
      task: the model.
      where: predicate of the prunable leaves.
    """
    devices = jax.device_count()
    if running.chunk is not None:
        return running.chunk
    recipe = plan.dense_recipe(study, max(*study.jumpstart, *study.finetune_jumpstart))
    tx = steps.optimizer(task, recipe, 1, where)
    batch = datasets.Split(*(jax.ShapeDtypeStruct((study.batch, *x.shape[1:]), x.dtype) for x in dataset.train))
    state = jax.eval_shape(lambda: steps.begin(tx, *task.init(jax.random.key(0)), jax.random.key(0)))
    needed = replicates.bytes_of(lambda s, b: steps.train_step(task, tx, s, b), state, batch)
    each = max(1, int(_memory(running)) // needed)
    if placement(study, running).form == "unroll":
        each = min(each, _MOST_UNROLLED)  # each adds compile time
    return min(each * devices, study.replicates)


def placement(study: Study, running: Running) -> Placement:
    """Return the form in which replicates run: the one in ``running``, or the fastest measured for the backend.

    Measurements are in docs/performance.md: on a CPU one replicate after another is 1.3 to 2.4 times faster than a
    batch of them, because their weights fit the cache; on an accelerator a batch is up to 20 times faster. The steps of
    a user-defined model are not put into a loop, because it may have convolutions, which XLA's CPU backend runs up to a
    hundred times slower inside a loop.
    """
    on_cpu = jax.default_backend() == "cpu"
    form, loop = ("map", "scan") if on_cpu else ("vmap", "scan")
    if on_cpu and is_own(study.model):
        form, loop = "unroll", "steps"
    return Placement(replicates.all_devices(), running.form or form, running.loop or loop)


def step_time(study: Study, dataset: datasets.Dataset, task: Task) -> StepTime | None:
    """Return the time of a step, measured or estimated; None on a device on which no model was measured.

    A measured time holds for a model without options and for examples of the shape on which it was measured. Otherwise
    the estimate scales a measured time by the floating-point operations of the forward pass, as XLA counts them. It
    starts from the time of the same model, or of the model whose number of operations is closest. Either is at least
    the time that the smallest models take.

    Args:
      study: settings, with model and batch.
      dataset: data set, which determines the shape of an example.
      task: the model.
    """
    device = jax.default_backend()
    measured = {model: times[device] for model, times in _STEP.items() if device in times}
    batches = study.batch / 128
    fixed, per_example = _LEAST_STEP.get(device, (0.0, 0.0))
    least, epoch = fixed + per_example * study.batch, _LEAST_EPOCH.get(device, 0.0)
    if study.model in measured and dataset.input_shape == _SHAPE[study.model] and not study.model_options:
        return StepTime(max(least, measured[study.model] * batches), "by the measured time of a step", epoch)
    images = jax.ShapeDtypeStruct((128, *dataset.input_shape), dataset.train.images.dtype)
    shapes = jax.eval_shape(task.init, jax.random.key(0))
    operations = (jax.jit(task.logits).lower(*shapes, images).cost_analysis() or {}).get("flops", 0.0)
    if not (measured and operations > 0):
        return None
    distance = lambda model: abs(math.log(operations / _FORWARD[model]))
    closest = study.model if study.model in measured else min(measured, key=distance)
    milliseconds = measured[closest] * operations / _FORWARD[closest] * batches
    where = "x".join(map(str, _SHAPE[closest]))
    source = f"estimated from floating-point operations and the measured time of {closest} on {where}"
    if milliseconds < least:
        source = "estimated from the measured time of the smallest models"
    return StepTime(max(least, milliseconds), source, epoch)


def hours(step: StepTime, study: Study, epochs: float, examples: int) -> float:
    """Return the hours of a number of epochs.

    Args:
      step: time of a step.
      study: settings, with the batch.
      epochs: epochs of all networks together.
      examples: examples of an epoch.
    """
    each = (examples // study.batch) * step.milliseconds + step.epoch
    return epochs * each / 3.6e6


def _memory(running: Running) -> float:
    """Return the bytes for one program on one device."""
    if running.memory is not None:
        return running.memory * 2**30
    stats = jax.local_devices()[0].memory_stats() or {}
    return 0.7 * stats["bytes_limit"] if "bytes_limit" in stats else 4 * 2**30
