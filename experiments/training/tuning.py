"""How many replicates go into one program, and in which form they run: settled before a study begins."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments.data import datasets
from experiments.recall_distortion import oneshot, plan
from experiments.recall_distortion.presets import Study
from experiments.training import phases, replicates, steps
from experiments.training.tasks import Task

_STEPS = 4  # of the epochs that are timed


def chunk_size(study: Study, dataset: datasets.Dataset, task: Task, devices: int) -> int:
    """How many replicates fit the memory of the devices, at least one each, at most as many as there are.

    Args:
      study: says the number itself, or the memory of a device.
      dataset: gives the shape of a batch.
      task: what is learnt.
      devices: over which a chunk is spread.
    """
    if study.chunk is not None:
        return study.chunk
    recipe = plan.dense_recipe(study, max(study.jumpstart))
    tx = steps.optimizer(task, recipe, 1, oneshot.PRUNABLE)
    batch = datasets.Split(*(jax.ShapeDtypeStruct((study.batch, *x.shape[1:]), x.dtype) for x in dataset.train))
    state = jax.eval_shape(lambda: steps.begin(tx, *task.init(jax.random.key(0)), jax.random.key(0)))
    needed = replicates.bytes_of(lambda s, b: steps.train_step(task, tx, s, b), state, batch)
    each = max(1, int(_memory(study)) // needed)
    return min(each * devices, study.replicates)


def layout(study: Study, dataset: datasets.Dataset, task: Task, chunk: int) -> replicates.Layout:
    """The layout that the study asks for, or the fastest, measured once and remembered in its folder.

    Args:
      study: its form and loop; ``auto`` is measured.
      dataset: of which a few batches are trained on.
      task: what is learnt.
      chunk: replicates in one program.
    """
    mesh = replicates.all_devices()
    forms = ("vmap", "map", "unroll") if study.form == "auto" else (study.form,)
    loops = ("scan", "steps") if study.loop == "auto" else (study.loop,)
    # Written out, a scan of many replicates takes minutes to compile and runs no faster than steps.
    pairs = [pair for pair in itertools.product(forms, loops) if pair != ("unroll", "scan")] or [(forms[0], loops[0])]
    layouts = {f"{form}, {loop}": replicates.Layout(mesh, form, loop) for form, loop in pairs}
    if len(layouts) == 1:
        return next(iter(layouts.values()))
    candidates = {name: _epoch(study, dataset, task, candidate, chunk) for name, candidate in layouts.items()}
    identity = f"{study.model} on {dataset.input_shape}, batch {study.batch}, {chunk} replicates"
    return layouts[replicates.fastest(candidates, study.folder / "layout.json", identity)]


def _memory(study: Study) -> float:
    """Bytes for one program on one device."""
    if study.memory is not None:
        return study.memory * 2**30
    held = jax.local_devices()[0].memory_stats() or {}
    return 0.7 * held["bytes_limit"] if "bytes_limit" in held else 4 * 2**30


def _epoch(
    study: Study, dataset: datasets.Dataset, task: Task, layout: replicates.Layout, chunk: int
) -> Callable[[], Any]:
    """A call that trains an epoch of a few steps."""
    recipe = dataclasses.replace(plan.dense_recipe(study, 0.0), epochs=(1,), learning_rates=(0.0,))
    count = min(_STEPS * recipe.batch, len(dataset.train.labels))
    train = replicates.share(dataset.train.take(np.arange(count)), layout.mesh)
    phase = phases.compile_phase(task, recipe, oneshot.PRUNABLE, layout, examples=count, validation=count)
    init = replicates.spread(lambda i: (*task.init(replicates.key(study.seed, i, 0)), replicates.key(0, i, 0)), layout)
    entering = init(replicates.place(np.arange(chunk, dtype=np.int32), layout.mesh))
    return lambda: phases.fit(phase, entering, train, train)
