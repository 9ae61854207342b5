"""Run a recall-distortion study: compute the missing stages, store each as it ends, report."""

import dataclasses
import functools
import os
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jaxtyping import ArrayLike

from experiments.cli import metrics
from experiments.cli.commands import ClusterOptions
from experiments.cli.progress import Progress, duration, progress, standard_output
from experiments.data import datasets
from experiments.models import own
from experiments.models.options import written_options
from experiments.recall_distortion import placement, plan, presets, results, runner
from experiments.recall_distortion import report as reporting
from experiments.recall_distortion.config import Running, Study
from experiments.recall_distortion.evidence import Evidence
from experiments.recall_distortion.plan import Coefficients, Known, Model, StudyStage
from experiments.recall_distortion.runner import Laboratory, Weights
from experiments.storage import store
from experiments.storage.checkpoints import Checkpoints
from experiments.training import launchers, processes, replicates

_POLL = 5.0  # seconds between looks at stages that another run is computing


def run(
    model: Model | None = None,
    data: str | datasets.Dataset | Mapping[str, ArrayLike] | None = None,
    study: str | Study | None = None,
    *,
    model_options: Mapping[str, object] | None = None,
    prunable: str | None = None,
    out: str | os.PathLike[str] | None = None,
    running: Running | None = None,
    callbacks: Sequence[metrics.Callback] = (),
) -> dict[Coefficients, Evidence]:
    """Train, prune, fine-tune and audit a model; the same as the command line, from Python.

    Args:
      model: the name of a built-in model, ``package.module:Class``, or a class: an NNX module class that
        takes ``rngs``, or a Linen module class, from inputs to logits. By default the study's.
      data: a name as for ``--dataset``, a ``Dataset``, or a mapping with the arrays ``x_train``, ``y_train``
        and, if there is a test set, ``x_test``, ``y_test``. By default the study's. The splits of a ``Dataset``
        are used as they are, except for the study's ``limit`` and ``label_noise``.
      study: settings, or the name of a preset; by default ``demo``.
      model_options: keyword arguments of the model: Python numbers, strings, booleans, None, and tuples, lists and
        dicts of them.
      prunable: regular expression of the kernels to prune; by default all but those of a layer ``head``.
      out: folder of the results; by default ``runs/NAME`` with the name of the preset or the model.
      running: memory, form and other options that do not change the numbers.
      callbacks: each called after every epoch with the stage, its replicates, the epoch and the metrics.

    Returns:
      The evidence, with its audit, by (jumpstart coefficient in dense training, in fine-tuning).

    Raises:
      ValueError: settings, a model or data that cannot be used.
      StoreError: the results cannot be written.
    """
    if study is None and model is None and data is None:
        study = "demo"
    settings = presets.get(study or "demo") if not isinstance(study, Study) else study
    running = running or (presets.running(study) if isinstance(study, str) else Running())
    changes: dict[str, object] = {}
    if model is not None:
        changes["model"] = model if isinstance(model, str) else own.spec(model)
    if model_options is not None:
        changes["model_options"] = written_options(model_options)
    if prunable is not None:
        changes["prunable"] = prunable
    dataset = None
    if isinstance(data, str):
        changes["dataset"] = data
    elif data is not None:
        dataset = data
        _check_data_options(settings, data)
        if not isinstance(data, datasets.Dataset):
            dataset = datasets.of_arrays(
                data,
                seed=settings.seed,
                selection=settings.selection,
                classes=settings.classes or None,
                imbalance=settings.imbalance,
            )
        changes["dataset"] = dataset.name
    settings = dataclasses.replace(settings, **changes)
    name = study if isinstance(study, str) else settings.model.rpartition(":")[2]
    folder = Path(out) if out is not None else running.out or Path("runs") / name
    cls = None if model is None or isinstance(model, str) else model
    dataset = None if dataset is None else plan.with_noise(settings, plan.limited(settings, dataset))
    return compute(folder, settings, running, model=cls, dataset=dataset, callbacks=callbacks)


def _check_data_options(study: Study, data: datasets.Dataset | Mapping[str, ArrayLike]) -> None:
    """Raise if a setting, which is part of the hash, does not apply to data given from Python."""
    whole = isinstance(data, datasets.Dataset)
    for name in ("image_size", *(("classes", "imbalance", "selection") if whole else ())):
        default, value = getattr(Study(), name), getattr(study, name)
        if value != default:
            kind = "a Dataset, whose splits are used as they are" if whole else "arrays, whose images have one size"
            raise ValueError(f"{name}={value!r} does not apply to data given as {kind}; leave it at {default!r}")


def compute(
    folder: Path,
    study: Study,
    running: Running,
    cluster: ClusterOptions | None = None,
    *,
    model: Model | None = None,
    dataset: datasets.Dataset | None = None,
    callbacks: Sequence[metrics.Callback] = (),
) -> dict[Coefficients, Evidence]:
    """Compute the missing stages of a study, or of this run's part of it, then report.

    Args:
      folder: of the results.
      study: the settings.
      running: how to run.
      cluster: the part of this run, and the other processes of its program.
      model: a class used in place of the study's model.
      dataset: used in place of the study's data set.
      callbacks: called after every epoch.

    Returns:
      The evidence by coefficients; empty in all processes of a program but the first.

    Raises:
      StoreError: the results cannot be written, replicates are missing at the end, or no study was run in a folder to
        compare with.
    """
    cluster = cluster or ClusterOptions()
    reporting.check_compared(running.compare)
    part, source = launchers.shard_of(cluster.shard, os.environ)
    separate = cluster.shard is not None
    processes.start(cluster.coordinator, cluster.process_id, cluster.num_processes, separate=separate)
    processes.watch_peers(cluster.coordinator)
    try:
        processes.check_shard(cluster.shard)
        return _compute_part(folder, study, running, part, source, model=model, dataset=dataset, callbacks=callbacks)
    except BaseException:
        processes.give_up()
        raise


def _compute_part(
    folder: Path,
    study: Study,
    running: Running,
    part: tuple[int, int],
    source: str,
    *,
    model: Model | None,
    dataset: datasets.Dataset | None,
    callbacks: Sequence[metrics.Callback],
) -> dict[Coefficients, Evidence]:
    """Compute the missing stages of a part of a study, and report what is stored."""
    first = processes.is_first()
    dataset = plan.load(study, running.data_dir) if dataset is None else dataset
    known = plan.known(study, dataset, model)
    lab = runner.equip(study, dataset, running, model)
    if first:
        for difference in results.record(folder, study, running, known):
            print(
                f"warning: the last run in {folder} had other options ({difference}); its results stay, and "
                "'status --all' lists them",
                file=sys.stderr,
            )
        results.store_data(folder, study, dataset)
    work = todo(folder, study, known, lab.chunk, part)
    if first:
        print(_introduction(lab, study, dataset, source, work), flush=True)
    carry_out(folder, lab, work, running, callbacks)
    if missing := todo(folder, study, known, lab.chunk, part):
        raise store.StoreError(f"{len(missing)} stages are missing in {folder}; rerun the same command")
    processes.leave()
    if not replicates.of_shard(study.replicates, part):
        print(f"part {part[0]}/{part[1]} of {study.replicates} replicates is empty: nothing to compute", flush=True)
        return {}
    return report(folder, study, running) if first else {}


def todo(
    folder: Path, study: Study, known: Known, chunk: int, part: tuple[int, int] = (0, 1)
) -> list[tuple[StudyStage, range]]:
    """The missing stages of a part of the study with the replicates they lack, each before what starts from it."""
    mine = replicates.of_shard(study.replicates, part)
    planned: dict[tuple[str, str, range], tuple[StudyStage, range]] = {}
    for penalty in plan.coefficients(study):
        for one_chunk in replicates.chunks(mine, chunk):
            for stage in plan.stages(study, known, penalty):  # coefficients of fine-tuning share dense stages
                planned.setdefault((stage.kind, store.digest(stage.settings), one_chunk), (stage, one_chunk))
    root, listed = plan.root(folder), list(planned.values())
    gaps = [
        [number, gap.start, gap.stop]
        for number, (stage, one_chunk) in enumerate(listed)
        for gap in store.missing(root, stage.kind, stage.settings, one_chunk)
    ]
    return [(listed[number][0], range(start, stop)) for number, start, stop in processes.agree(gaps)]


def carry_out(
    folder: Path,
    lab: Laboratory,
    work: Sequence[tuple[StudyStage, range]],
    running: Running,
    callbacks: Sequence[metrics.Callback] = (),
) -> None:
    """Compute stages and store each as it ends; stages that another run is computing are skipped."""
    study = lab.study
    total = sum(_epochs(study, stage) * len(mine) for stage, mine in work)
    opened = [metrics.to_csv(folder), metrics.to_tensorboard(folder / "tensorboard")] if work else []
    writers = [writer for writer in opened if writer is not None]

    def callbacks_of(digest: str) -> list[metrics.Callback]:
        """Return what is called after an epoch of the stage with this digest, in the first process."""
        return [*(functools.partial(w, digest=digest) for w in writers), *callbacks] if processes.is_first() else []

    cached: dict[str, Weights] = {}
    with progress(total, "epochs", quiet=not processes.is_first()) as shown:
        waiting, told = list(work), False
        while waiting:
            left = []
            for stage, mine in waiting:
                if not _attempt(
                    folder, lab, stage, mine, running=running, shown=shown, callbacks=callbacks_of, cached=cached
                ):
                    left.append((stage, mine))
            if len(left) == len(waiting):
                if not told:
                    shown.stage(f"waiting for another run; next: {left[0][0].title}")
                time.sleep(_POLL)
            waiting, told = left, len(left) == len(waiting)


def _epochs(study: Study, stage: StudyStage) -> int:
    """Epochs of each replicate in a stage."""
    return sum(study.epochs if stage.target is None else study.finetune_epochs)


def _attempt(
    folder: Path,
    lab: Laboratory,
    stage: StudyStage,
    mine: range,
    *,
    running: Running,
    shown: Progress,
    callbacks: Callable[[str], Sequence[metrics.Callback]],
    cached: dict[str, Weights],
) -> bool:
    """Compute a stage unless another run does, or has yet to finish the one it starts from; whether it is done."""
    root = plan.root(folder)
    target = store.stage(root, stage.kind, stage.settings, mine)
    with store.claimed(target) if processes.is_first() else store.unclaimed() as mine_now:
        start = stage.settings.get("dense")
        done = not store.missing(root, stage.kind, stage.settings, mine)
        ready = start is None or not store.missing(root, "dense", start, mine)
        state = processes.agree("done" if done else "go" if mine_now and ready else "wait")
        if state == "done":
            shown.skip(len(mine) * _epochs(lab.study, stage))
        if state != "go":
            return bool(state == "done")
        first = processes.is_first()
        kept = Checkpoints(target, stage.settings, running.checkpoint_minutes, agree=processes.agree, writes=first)
        after = f", after epoch {kept.done} of a killed run" if kept.done else ""
        shown.stage(f"{stage.title}, replicates {mine.start} to {mine.stop - 1}{after}")
        shown.skip(len(mine) * kept.done)
        on_epoch = _on_epoch(lab, stage, mine, shown, callbacks(target.digest))
        if stage.target is None:
            result = runner.train_dense(lab, stage.coefficients.dense, mine, on_epoch, kept)
            cached.update(settings=stage.settings, replicates=mine, weights=result.weights)
        else:
            weights = _dense_weights(folder, stage, mine, cached)
            penalty = stage.coefficients.finetune
            result = runner.prune_and_finetune(
                lab, stage.target, penalty, mine, dense=weights, on_epoch=on_epoch, kept=kept
            )
        if first:
            results.save(folder, lab.study, stage, mine, result, weights=running.keep_pruned)
            kept.clear()
        processes.agree(None)  # the others must not read files that are still being written
        return True


def _dense_weights(folder: Path, stage: StudyStage, mine: range, cached: dict[str, Weights]) -> Weights:
    """The dense weights that a stage starts from, read once for all stages that start from them."""
    start = stage.settings["dense"]
    if (cached.get("settings"), cached.get("replicates")) != (start, mine):
        weights = results.dense_weights(folder, start, mine)
        cached.update(settings=start, replicates=mine, weights=weights)
    return cached["weights"]


def _on_epoch(
    lab: Laboratory, stage: StudyStage, mine: range, shown: Progress, callbacks: Sequence[metrics.Callback]
) -> Callable[[int, Mapping[str, ArrayLike]], None]:
    """Report an epoch of a stage: to the progress display and to the callbacks."""
    examples = len(lab.train.labels) // lab.study.batch * lab.study.batch
    steps = len(mine) * (examples // lab.study.batch)
    advance = functools.partial(shown.advance, len(mine), steps, len(mine) * examples)

    def report(epoch: int, measured: Mapping[str, ArrayLike]) -> None:
        advance()
        for callback in callbacks:
            callback(stage.title, mine, epoch, measured)

    return report


def status(folder: Path, study: Study) -> None:
    """Print how many replicates of each stage are done."""
    for stage, absent in _missing(folder, study):
        print(f"{study.replicates - sum(map(len, absent)):4d} of {study.replicates}  {stage.title}")


def _missing(folder: Path, study: Study) -> list[tuple[StudyStage, list[range]]]:
    """Each stage of a study, once, with the replicates that it lacks."""
    known = results.known(folder, study)
    stages = {
        stage.title: stage for penalty in plan.coefficients(study) for stage in plan.stages(study, known, penalty)
    }
    wanted = range(study.replicates)
    return [(one, store.missing(plan.root(folder), one.kind, one.settings, wanted)) for one in stages.values()]


def report(folder: Path, study: Study, running: Running) -> dict[Coefficients, Evidence]:
    """Rebuild tables and figures from the stored results, and print the findings in the last lines."""
    console = standard_output(120)
    partial = any(absent for _, absent in _missing(folder, study))
    found = reporting.write(folder, study, console, running.compare)
    if partial and not any(absent for _, absent in _missing(folder, study)):
        # Another run has completed the study meanwhile. Some of its tables may have been overwritten.
        found = reporting.write(folder, study, console, running.compare)
    return found


def _introduction(
    lab: Laboratory, study: Study, dataset: datasets.Dataset, source: str, work: Sequence[tuple[StudyStage, range]]
) -> str:
    """A summary before the run: data, replicates, devices and an estimate of the time of the missing stages."""
    examples = len(dataset.train.labels)
    arms = len(study.jumpstart) * len(study.finetune_jumpstart) * len(plan.targets(study))
    epochs = len(study.jumpstart) * sum(study.epochs) + arms * sum(study.finetune_epochs)
    devices = lab.placement.mesh.devices
    lines = [
        f"{study.model} on {study.dataset}: {examples} training, {len(dataset.validation.labels)} validation, "
        f"{len(dataset.test.labels)} test examples of shape {'x'.join(map(str, dataset.input_shape))}",
        f"{study.replicates} replicates, each trained for {epochs} epochs in all, "
        f"{min(lab.chunk, study.replicates)} in a program ({lab.placement.form}, {lab.placement.epoch}) "
        f"on {devices.size} x {devices.flat[0].device_kind}" + (f"; {source}" if source else ""),
        f"pruned: {', '.join(runner.prunable_paths(lab))}",
    ]
    left = sum(_epochs(study, stage) * len(mine) for stage, mine in work)
    estimate = 0.0 if lab.step_time is None else placement.hours(lab.step_time, study, left, examples)
    if lab.step_time is not None and estimate > 1 / 60:
        lines.append(f"about {duration(3600 * estimate)} for this run, {lab.step_time.source}")
    lines.append("the first epoch of each stage includes compiling it; the time left does not")
    width = standard_output().width
    return "\n".join(
        textwrap.fill(line, width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in lines
    )
