"""Time thirty LeNet-300-100 trained on Fashion-MNIST in one program, against thirty PyTorch runs.

``JPRUNE_DATA_DIR`` names the TFDS folder; by default TFDS's own.
"""

import os
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import in_torch, steps
from benchmarks.timing import Row, judge, not_run, same, seconds
from experiments.data import datasets, tables
from experiments.recall_distortion import oneshot
from experiments.training import phases, replicates, tasks
from experiments.training import steps as training
from experiments.training.steps import Recipe

COUNT, RUN_IN_TORCH = 30, 3
RECIPE = Recipe(epochs=(2,), learning_rates=(0.01,))
WHAT = f"{COUNT} LeNet-300-100 in one program, compile included, {RECIPE.total_epochs} epochs of Fashion-MNIST"


class Run(NamedTuple):
    """The inputs of a run, the same for both sides.

    Attributes:
      params: initial parameters by path.
      orders: orders of the training examples, an array per epoch.
    """

    params: dict[str, np.ndarray]
    orders: list[np.ndarray]


def rows() -> list[Row]:
    """Time per run; images are in memory on both sides, and every epoch ends with the validation split."""
    try:
        dataset = datasets.load("fashion_mnist", data_dir=os.environ.get("JPRUNE_DATA_DIR"))
    except (ImportError, tables.Missing) as error:
        return [not_run(WHAT, "torch runs one after another", must=0.25, why=str(error))]
    return against_torch(dataset, RECIPE, COUNT, RUN_IN_TORCH)


def against_torch(dataset: datasets.Dataset, recipe: Recipe, count: int, in_turn: int) -> list[Row]:
    """Train ``count`` replicates in one program and ``in_turn`` of them in torch.

    Epoch by epoch the mean training losses must agree to 2%: rounding differs, and training amplifies it.
    """
    task = tasks.classification(dataset, "lenet-300-100")
    # With one replicate after another, weights and momentum stay in a core's cache between steps.
    form = "map" if jax.default_backend() == "cpu" else "vmap"
    layout = replicates.Placement(replicates.all_devices(), form, "scan")
    entering, runs = _starts(task, dataset, recipe, layout, count)
    metrics: list[Any] = []
    ours = seconds(lambda: metrics.extend(_ours(task, dataset, recipe, layout, entering)))
    runner = _in_torch(dataset, recipe)
    runner(runs[0], most=20)  # warm-up
    in_torch.use_best_threads(lambda: runner(runs[0], most=100), repeats=2)
    plain, loaded = [], []
    for i, run in enumerate(runs[:in_turn]):
        found: list[Any] = []
        plain.append(seconds(lambda run=run, found=found: found.extend(runner(run))))
        for epoch, (train_loss, accuracy) in enumerate(found):
            same(f"loss of run {i}, epoch {epoch}", metrics[epoch].train_loss[i], train_loss, rtol=2e-2)
            same(f"accuracy of run {i}", metrics[epoch].validation_accuracy[i], accuracy, rtol=0, atol=0.03)
        loaded.append(seconds(lambda run=run: runner(run, loader=True)))
    note = f"form {form}; each side ran once, ours all {count}; {in_turn} torch runs were timed, and times are per run"
    made = partial(judge, WHAT, must=0.25)
    return [
        made("torch runs one after another, batches cut from a tensor", [ours / count], plain, note=note),
        made("the same through a DataLoader", [ours / count], loaded, note=note),
    ]


def _starts(
    task: tasks.Task, dataset: datasets.Dataset, recipe: Recipe, layout: replicates.Placement, count: int
) -> tuple[Any, list[Run]]:
    """Return the inputs of our program, and the same for each torch run."""
    init = replicates.spread(lambda i: (*task.init(replicates.key(0, i, 0)), replicates.key(0, i, 1)), layout)
    entering = init(replicates.place(np.arange(count, dtype=np.int32), layout.mesh))
    examples = len(dataset.train.labels)
    tx = training.optimizer(task, recipe, training.steps_per_epoch(recipe, examples), oneshot.PRUNABLE)

    def order(one: Any, epoch: int) -> jax.Array:
        return training.open_epoch(training.begin(tx, *one), epoch, examples).order

    orders = [np.asarray(jax.vmap(partial(order, epoch=epoch))(entering)) for epoch in range(recipe.total_epochs)]
    params = steps.by_path(entering[0])
    return entering, [
        Run({path: leaf[i] for path, leaf in params.items()}, [each[i] for each in orders]) for i in range(count)
    ]


def _ours(
    task: tasks.Task, dataset: datasets.Dataset, recipe: Recipe, layout: replicates.Placement, entering: Any
) -> list[training.EpochMetrics]:
    """Compile and train; return the metrics of every epoch."""
    sizes = {"examples": len(dataset.train.labels), "validation": len(dataset.validation.labels)}
    phase = phases.compile_phase(task, recipe, oneshot.PRUNABLE, layout, **sizes)
    train, validation = replicates.share((dataset.train, dataset.validation), layout.mesh)
    state, metrics = phases.fit(phase, entering, train, validation)
    jax.block_until_ready(state)
    return jax.tree.map(np.asarray, metrics)


def _in_torch(dataset: datasets.Dataset, recipe: Recipe):
    """Return a run in usual torch style, which returns (mean training loss, validation accuracy) of each epoch."""
    tensors = []
    for split in (dataset.train, dataset.validation):
        images = (np.asarray(split.images, np.float32) - dataset.mean) / dataset.std
        tensors.append((torch.from_numpy(images.reshape(len(images), -1)), torch.tensor(split.labels.astype(np.int64))))
    (x, y), (x_held, y_held) = tensors

    def batches(order: np.ndarray, loader: bool):
        full = order[: len(order) // recipe.batch * recipe.batch]
        if loader:
            yield from DataLoader(TensorDataset(x, y), batch_size=recipe.batch, sampler=full.tolist())
        else:
            for chosen in torch.from_numpy(full.astype(np.int64)).split(recipe.batch):
                yield x[chosen], y[chosen]

    def run(start: Run, *, most: int | None = None, loader: bool = False) -> list[tuple[float, float]]:
        net = in_torch.Dense(x.shape[1], dataset.num_classes, (300, 100))
        in_torch.load(net, start.params)
        optimizer = torch.optim.SGD(
            net.parameters(),
            lr=recipe.learning_rates[0],
            momentum=recipe.momentum,
            nesterov=recipe.nesterov,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
        found = []
        for order in start.orders:
            losses = []
            for images, labels in batches(order[: most and most * recipe.batch], loader):
                optimizer.zero_grad()
                loss = F.cross_entropy(net(images)[0], labels)
                loss.backward()
                optimizer.step()
                losses.append(loss.detach())
            with torch.no_grad():
                right = (net(x_held)[0].argmax(1) == y_held).float().mean().item()
            found.append((torch.stack(losses).mean().item(), right))
        return found

    return run
