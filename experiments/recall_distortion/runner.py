"""Compute the stages of a recall-distortion study: train dense networks; prune, fine-tune and predict."""

import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

import jprune
from experiments.data import datasets
from experiments.data.augment import augment
from experiments.models.options import is_own, read_options
from experiments.recall_distortion import oneshot, placement, plan
from experiments.recall_distortion.config import Running, Study
from experiments.recall_distortion.plan import Model, PruningTarget
from experiments.storage.checkpoints import Checkpoints
from experiments.training import phases, processes, replicates, tasks
from jprune import trees
from jprune.trees import Where

Weights = dict[str, np.ndarray]
Program = Callable[..., PyTree]
OnEpoch = Callable[[int, Mapping[str, np.ndarray]], None]
_INIT, _DENSE, _GRADIENT, _RANDOM, _FINETUNE = range(5)  # purposes of a replicate's keys
_ACTIVITY_EXAMPLES = 500  # training examples on which dead and linear units are counted


class StageResult(NamedTuple):
    """The result of a stage for a chunk of replicates.

    Attributes:
      weights: arrays by path, with a leading replicate axis, of the epoch with the lowest validation loss.
      summary: columns with one entry for each replicate.
      predictions: (replicates, test examples) int32.
      metrics: a record for each epoch and replicate.
    """

    weights: Weights
    summary: dict[str, np.ndarray]
    predictions: np.ndarray
    metrics: list[dict[str, float]]


class Laboratory(NamedTuple):
    """A study's data on the devices, and its programs, each compiled when first called.

    Attributes:
      study: the settings.
      where: predicate of the prunable leaves.
      placement: where and how replicates run.
      chunk: number of replicates in one program.
      train: training split, on the devices.
      validation: validation split, on the devices.
      test: test split, on the devices.
      template: shapes of (params, stats) of one replicate.
      fresh: index -> (params, stats, key), from which dense training starts.
      dense: phase of dense training by jumpstart coefficient.
      gradient: (params, stats, index) -> gradient for the scores.
      score: from name to (params, gradient, index) -> scores.
      keep: by ratio, the number of prunable weights to keep, or with structure=channels the place of the ratio.
      prune: ((params, scores), keep) -> (params, masks, number kept); True is the legacy form of signed scores.
      finetune: phase of fine-tuning by jumpstart coefficient.
      finetune_key: index -> key of that phase.
      rounded: params -> params with prunable weights rounded to the study's number of bits.
      predict: (params, stats) -> predictions on the test split.
      nonzero: params -> number of prunable weights that are not zero.
      activity: (params, stats, index) -> fractions of the hidden units that are dead and that are linear,
        before any normalization, on the first 500 training examples, in training mode: with the statistics of this
        batch and with dropout.
      step_time: step time of one replicate, if known.
    """

    study: Study
    where: Where
    placement: replicates.Placement
    chunk: int
    train: datasets.Split
    validation: datasets.Split
    test: datasets.Split
    template: tuple[PyTree, PyTree]
    fresh: Program
    dense: Mapping[float, phases.Phase]
    gradient: Program
    score: Mapping[str, Program]
    keep: Mapping[float, np.ndarray]
    prune: Mapping[bool, Program]
    finetune: Mapping[float, phases.Phase]
    finetune_key: Program
    rounded: Program
    predict: Program
    nonzero: Program
    activity: Program
    step_time: placement.StepTime | None


def equip(
    study: Study, dataset: datasets.Dataset, running: Running | None = None, model: Model | None = None
) -> Laboratory:
    """Prepare the programs of a study, without compiling them.

    Args:
      study: the settings.
      dataset: its data.
      running: chunk, memory and form; the defaults if None.
      model: a class used in place of the study's model.

    Raises:
      ValueError: the model is unknown, a batch (or the batches of a score's gradient) is larger than the training
        split, a pattern matches no kernel, or the model cannot reach a compression ratio.
    """
    running = running or Running()
    examples, wanted = len(dataset.train.labels), study.gradient_batches * study.batch
    if wanted > examples and any(map(oneshot.needs_gradient, study.scores)):
        raise ValueError(
            f"gradient_batches={study.gradient_batches} of batch={study.batch} examples are more than the {examples} "
            "of the training split"
        )
    task = tasks.classification(
        dataset,
        model or study.model,
        augment=augment if study.augment else None,
        options=read_options(study.model_options),
    )
    where = oneshot.prunable(study.prunable)
    template = jax.eval_shape(task.init, jax.random.key(0))
    where = _prunable_of(template[0], study, where)
    if study.structure == "channels":
        keep = {float(ratio): place for place, ratio in enumerate(study.ratios)}
    else:
        count = functools.partial(jprune.keep_count, template[0], where=where, counting=study.counting)
        keep = {float(ratio): count(ratio=float(ratio)) for ratio in study.ratios}
        _check_floor(study, template[0], where, keep)
    chunk = processes.agree(placement.chunk_size(study, running, dataset, task, where))
    placed = placement.placement(study, running)
    phase = functools.partial(
        phases.compile_phase,
        task,
        placement=placed,
        examples=examples,
        validation=len(dataset.validation.labels),
    )
    train, validation, test = replicates.share((dataset.train, dataset.validation, dataset.test), placed.mesh)
    return Laboratory(
        study=study,
        where=where,
        placement=placed,
        chunk=chunk,
        train=train,
        validation=validation,
        test=test,
        template=template,
        dense={float(c): phase(plan.dense_recipe(study, c), where=where) for c in study.jumpstart},
        finetune={
            float(c): phase(plan.finetune_recipe(study, c), where=_held(study, where, c))
            for c in study.finetune_jumpstart
        },
        keep={ratio: np.asarray(count, np.int32) for ratio, count in keep.items()},
        predict=phases.compile_predict(task, placed, len(dataset.test.labels)),
        step_time=placement.step_time(study, dataset, task),
        **_programs(study, task, placed, where, prune=_pruning(study, task, dataset, template, where)),
    )


def prunable_paths(lab: Laboratory) -> list[str]:
    """Return the paths of the leaves that are pruned."""
    paths, leaves, _ = trees.flatten(trees.only(lab.template[0], lab.where))
    return [path for path, leaf in zip(paths, leaves, strict=True) if leaf is not None]


def _prunable_of(params: PyTree, study: Study, where: Where) -> Where:
    """Return the predicate for these parameters; without a layer called head, all kernels of a user-defined model."""
    paths, leaves, _ = trees.flatten(params)
    kernels = [path for path, leaf in zip(paths, leaves, strict=True) if jprune.kernels(path, leaf)]
    if not kernels:
        raise ValueError(
            f"model={study.model!r} has no kernel to prune: none of its parameters {', '.join(paths)} is called kernel "
            "or weight and has two or more axes; build it from Flax layers, or rename its kernels"
        )
    if study.prunable is None:
        return where if any(path.startswith("head/") for path in kernels) else jprune.kernels
    if not any(where(path, leaf) for path, leaf in zip(paths, leaves, strict=True)):
        raise ValueError(
            f"prunable={study.prunable!r} matches no kernel of {study.model}; its kernels are {', '.join(kernels)}"
        )
    return where


def _held(study: Study, where: Where, jumpstart: float) -> Where:
    """Return the predicate of the leaves whose pruned weights are set to 0 in every step of fine-tuning.

    A removed channel also has a bias and weights in the head. In the built-in models their gradient is 0 without the
    penalty, and the program stays that of earlier versions.
    """
    every = study.structure == "channels" and (jumpstart or is_own(study.model))
    return (lambda path, leaf: True) if every else where


def _check_floor(study: Study, params: PyTree, where: Where, keep: Mapping[float, int]) -> None:
    """Raise if the minimums of all layers together exceed the total of a ratio."""
    layers = jax.tree.leaves(trees.only(params, where))
    floor = sum(min(layer.size, study.min_keep) for layer in layers)
    for ratio, count in keep.items():
        if count < floor:
            raise ValueError(
                f"min_keep={study.min_keep} in each of {len(layers)} layers is more than the {count} weights of ratio "
                f"{ratio:g}; at most {count // len(layers)} are possible"
            )


def train_dense(
    lab: Laboratory, jumpstart: float, chunk: range, on_epoch: OnEpoch, kept: Checkpoints | None = None
) -> StageResult:
    """Train the dense networks of a chunk of replicates, from the latest checkpoint if there is one."""
    index = _place(lab, chunk)
    return _with_activity(
        lab, chunk, *_train(lab, lab.dense[jumpstart], lab.fresh(index), chunk, on_epoch=on_epoch, kept=kept)
    )


def prune_and_finetune(
    lab: Laboratory,
    target: PruningTarget,
    jumpstart: float,
    chunk: range,
    *,
    dense: Weights,
    on_epoch: OnEpoch,
    kept: Checkpoints | None = None,
) -> StageResult:
    """Prune the dense networks of a chunk by a score to a ratio (the control is not pruned), and fine-tune them.

    Args:
      lab: the programs.
      target: score and ratio, or the control.
      jumpstart: coefficient of the penalty in fine-tuning.
      chunk: indices of the replicates.
      dense: their dense weights, as in ``StageResult``.
      on_epoch: called after each epoch with its number and metrics.
      kept: checkpoints of the stage.
    """
    index = _place(lab, chunk)
    params, stats = replicates.place(_unflatten(lab.template, dense), lab.placement.mesh)
    extra, masks = {}, None
    if target.score != plan.CONTROL:
        needed = oneshot.needs_gradient(target.score)
        grads = lab.gradient((params, stats, index), lab.train) if needed else params
        scores = lab.score[target.score]((params, grads, index))
        prune = lab.prune[target.score == "undecayed-signed"]
        params, masks, number = prune((params, scores), lab.keep[target.ratio])
        extra = {"kept_by_mask": replicates.fetch(number, len(chunk))}
    if lab.study.rounding is not None:
        params = lab.rounded(params)
    start = (params, stats, lab.finetune_key(index), masks)
    result, best = _train(lab, lab.finetune[jumpstart], start, chunk, on_epoch=on_epoch, kept=kept)
    return _with_activity(lab, chunk, result._replace(summary={**result.summary, **extra}), best)


def _with_activity(lab: Laboratory, chunk: range, result: StageResult, best: tuple[PyTree, PyTree]) -> StageResult:
    """Add the fractions of dead and of linear units of the best epoch's networks to the summary."""
    dead, linear = replicates.fetch(lab.activity((*best, _place(lab, chunk)), lab.train), len(chunk))
    return result._replace(summary={**result.summary, "dead_units": dead, "linear_units": linear})


def _pruning(
    study: Study, task: tasks.Task, dataset: datasets.Dataset, template: tuple[PyTree, PyTree], where: Where
) -> Mapping[bool, Program]:
    """Return the functions that prune one replicate, (params, scores, keep) -> (params, masks, number kept)."""
    if study.structure == "weights":
        exact = functools.partial(oneshot.prune, where=where, min_keep=study.min_keep)
        return {signed: functools.partial(exact, signed=signed) for signed in (False, True)}
    images = jax.ShapeDtypeStruct((1, *dataset.input_shape), dataset.train.images.dtype)
    try:
        selection = oneshot.channel_selection(task, template, images)
    except ValueError as error:
        raise ValueError(f"structure='channels' cannot prune {study.model}: {error}") from error
    sparsities = tuple(1 - 1 / ratio for ratio in study.ratios)
    return {False: lambda params, scores, place: oneshot.prune_channels(selection, params, scores, sparsities, place)}


def _programs(
    study: Study, task: tasks.Task, placed: replicates.Placement, where: Where, *, prune: Mapping[bool, Program]
) -> dict[str, Program]:
    """Return the programs other than training and prediction, by field of ``Laboratory``."""
    key = functools.partial(replicates.key, study.seed)
    spread = functools.partial(replicates.spread, placement=placed)

    def fresh(index: jax.Array) -> tuple[PyTree, PyTree, jax.Array]:
        return (*task.init(key(index, _INIT)), key(index, _DENSE))

    def gradient(replicate: tuple[PyTree, PyTree, jax.Array], train: datasets.Split) -> PyTree:
        params, stats, index = replicate
        decay = study.weight_decay if study.gradient_includes_decay else 0.0
        sizes = {"batch": study.batch, "batches": study.gradient_batches}
        inputs = (task, params, stats, key(index, _GRADIENT), train)
        return oneshot.gradient(*inputs, mode=study.gradient_mode, decay=decay, **sizes)

    def scored(name: str, replicate: tuple[PyTree, PyTree, jax.Array]) -> PyTree:
        params, grads, index = replicate
        score = oneshot.score_of(name, study.undecayed_epsilon, where)
        return score(params, grad=grads, key=key(index, _RANDOM))

    def pruned(one: Program, replicate: tuple[PyTree, PyTree], keep: jax.Array) -> tuple[PyTree, PyTree, jax.Array]:
        return one(*replicate, keep)

    def nonzero(params: PyTree) -> jax.Array:
        prunable = jax.tree.leaves(trees.only(params, where))
        return sum(jnp.count_nonzero(kernel).astype(jnp.int32) for kernel in prunable)

    def activity(replicate: tuple[PyTree, PyTree, jax.Array], train: datasets.Split) -> tuple[jax.Array, jax.Array]:
        params, stats, index = replicate
        some = datasets.Split(train.images[:_ACTIVITY_EXAMPLES], train.labels[:_ACTIVITY_EXAMPLES])
        context = tasks.Context(stats, some, key(index, _GRADIENT))
        try:
            statuses = jprune.unit_status(task.preactivations(params, context))
        except (NotImplementedError, ValueError):  # a user-defined model whose layers cannot be captured
            return jnp.float32(jnp.nan), jnp.float32(jnp.nan)
        units = jnp.concatenate(jax.tree.leaves(statuses))
        return (units == -1).mean(dtype=jnp.float32), (units == 0).mean(dtype=jnp.float32)

    return {
        "fresh": spread(fresh),
        "gradient": spread(gradient),
        "score": {name: spread(functools.partial(scored, name)) for name in study.scores},
        "prune": {signed: spread(functools.partial(pruned, one)) for signed, one in prune.items()},
        "rounded": spread(lambda params: oneshot.rounded(params, study.rounding or 16, where)),
        "finetune_key": spread(lambda index: key(index, _FINETUNE)),
        "nonzero": spread(nonzero),
        "activity": spread(activity),
    }


def _train(
    lab: Laboratory,
    phase: phases.Phase,
    entering: tuple[PyTree, ...],
    chunk: range,
    *,
    on_epoch: OnEpoch,
    kept: Checkpoints | None,
) -> tuple[StageResult, tuple[PyTree, PyTree]]:
    """Train through a phase and predict with the weights of the best epoch; return both."""

    def report(epoch: int, measured: phases.EpochMetrics) -> None:
        on_epoch(epoch, replicates.fetch(measured, len(chunk))._asdict())

    state, metrics = phases.fit(phase, entering, lab.train, lab.validation, report, kept=kept)
    best = (state.best_params, state.best_stats)
    found = lab.predict(best, lab.test.images), lab.nonzero(state.best_params)
    ending = _flatten(best), state.stopped, state.best_epoch, state.best_loss
    (predictions, nonzero), (weights, stopped, epoch, loss), curves = replicates.fetch(
        (found, ending, metrics), len(chunk)
    )
    total, prunable = _sizes(lab)
    summary = {
        "replicate": np.array(chunk, np.int32),
        "stopped": stopped,
        "best_epoch": epoch,
        "best_validation_loss": loss,
        "nonzero": nonzero,
        "prunable": np.full(len(chunk), prunable, np.int64),
        "parameters": np.full(len(chunk), total, np.int64),
    }
    records = [
        {"replicate": replicate, "epoch": epoch, **{name: float(column[i]) for name, column in row._asdict().items()}}
        for epoch, row in enumerate(curves, 1)
        for i, replicate in enumerate(chunk)
    ]
    return StageResult(weights, summary, predictions, records), best


def _place(lab: Laboratory, chunk: range) -> jax.Array:
    return replicates.place(np.array(chunk, np.int32), lab.placement.mesh)


def _sizes(lab: Laboratory) -> tuple[int, int]:
    """Return the numbers of parameters and of prunable weights."""
    prunable = trees.only(lab.template[0], lab.where)
    return sum(x.size for x in jax.tree.leaves(lab.template[0])), sum(x.size for x in jax.tree.leaves(prunable))


def _flatten(tree: tuple[PyTree, PyTree]) -> Weights:
    """Name the arrays of (params, stats) by their paths."""
    paths, leaves, _ = trees.flatten(tree)
    return dict(zip(paths, leaves, strict=True))


def _unflatten(template: tuple[PyTree, PyTree], weights: Weights) -> tuple[PyTree, PyTree]:
    """Put named arrays back into (params, stats)."""
    paths, _, treedef = trees.flatten(template)
    return jax.tree.unflatten(treedef, [weights[path] for path in paths])
