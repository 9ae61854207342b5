"""Carry out the stages of a recall-distortion study: train densely; prune, fine-tune and predict."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jprune
from experiments.data import datasets
from experiments.data.augment import augment
from experiments.recall_distortion import oneshot, plan
from experiments.recall_distortion.plan import Cell
from experiments.recall_distortion.presets import Study
from experiments.training import phases, replicates, tasks, tuning
from jprune import trees

Weights = dict[str, np.ndarray]
Program = Callable[..., Any]
_INIT, _DENSE, _GRADIENT, _RANDOM, _FINETUNE = range(5)  # what the keys of a replicate are for
_JUDGED = 500  # training examples on which units are judged


class Outcome(NamedTuple):
    """What a stage leaves behind, for a chunk of replicates.

    Attributes:
      weights: arrays by path, the replicate axis first, of the epoch with the lowest validation loss.
      summary: columns, a row for each replicate.
      predictions: (replicates, test examples) int32.
      metrics: a record for each epoch and replicate.
    """

    weights: Weights
    summary: dict[str, np.ndarray]
    predictions: np.ndarray
    metrics: list[dict[str, Any]]


class Laboratory(NamedTuple):
    """A study's data on the devices, and its programs, each compiled when first called.

    Attributes:
      study: the settings.
      layout: where replicates run.
      chunk: how many replicates one program takes.
      train: training split, on the devices; likewise ``validation`` and ``test``.
      template: shapes of (params, stats) of one replicate.
      fresh: index -> (params, stats, key), from which dense training begins.
      dense: a phase for each jumpstart coefficient.
      gradient: (params, stats, index) -> gradient for the scores.
      score: by name, (params, gradient, index) -> scores.
      keep: by ratio, how many prunable weights to keep.
      prune: ((params, scores), keep) -> (params, how many are kept); True is the legacy of signed scores.
      finetune: the phase after pruning.
      finetune_key: index -> key of that phase.
      predict: (params, stats) -> predictions on the test split.
      nonzero: params -> how many prunable weights are not zero.
      activity: (params, stats, index) -> shares of the hidden units that are dead, and that are linear,
        on the first 500 training examples.
    """

    study: Study
    layout: replicates.Layout
    chunk: int
    train: datasets.Split
    validation: datasets.Split
    test: datasets.Split
    template: tuple[Any, Any]
    fresh: Program
    dense: Mapping[float, phases.Phase]
    gradient: Program
    score: Mapping[str, Program]
    keep: Mapping[float, np.ndarray]
    prune: Mapping[bool, Program]
    finetune: phases.Phase
    finetune_key: Program
    predict: Program
    nonzero: Program
    activity: Program


def equip(study: Study, dataset: datasets.Dataset) -> Laboratory:
    """Prepare a study; its programs are not compiled yet, but where the layout is to be measured.

    Raises:
      ValueError: an unknown model, a batch (or the batches of a score's gradient) larger than the training
        split, or a compression ratio that the model cannot reach.
    """
    examples, wanted = len(dataset.train.labels), study.gradient_batches * study.batch
    if wanted > examples and any(map(oneshot.needs_gradient, study.scores)):
        raise ValueError(
            f"gradient_batches={study.gradient_batches} of batch={study.batch} examples are more than the {examples} "
            "of the training split"
        )
    task = tasks.classification(dataset, study.model, augment=augment if study.augment else None)
    template = jax.eval_shape(task.init, jax.random.key(0))
    ratios = map(float, study.ratios)
    keep = {ratio: jprune.keep_count(template[0], ratio=ratio, where=oneshot.PRUNABLE) for ratio in ratios}
    chunk = replicates.agree(tuning.chunk_size(study, dataset, task, jax.device_count()))
    layout = tuning.layout(study, dataset, task, chunk)
    phase = functools.partial(
        phases.compile_phase,
        task,
        where=oneshot.PRUNABLE,
        layout=layout,
        examples=examples,
        validation=len(dataset.validation.labels),
    )
    train, validation, test = replicates.share((dataset.train, dataset.validation, dataset.test), layout.mesh)
    return Laboratory(
        study=study,
        layout=layout,
        chunk=chunk,
        train=train,
        validation=validation,
        test=test,
        template=template,
        dense={float(c): phase(plan.dense_recipe(study, c)) for c in study.jumpstart},
        finetune=phase(plan.finetune_recipe(study)),
        keep={ratio: np.asarray(count, np.int32) for ratio, count in keep.items()},
        predict=phases.compile_predict(task, layout, len(dataset.test.labels)),
        **_programs(study, task, layout),
    )


def train_dense(lab: Laboratory, jumpstart: float, chunk: range, on_epoch: Callable[[], None]) -> Outcome:
    """Train the replicates of a chunk densely."""
    index = _place(lab, chunk)
    return _judged(lab, chunk, *_train(lab, lab.dense[jumpstart], lab.fresh(index), chunk, on_epoch))


def prune_and_finetune(
    lab: Laboratory, cell: Cell, chunk: range, dense: Weights, on_epoch: Callable[[], None]
) -> Outcome:
    """Prune the dense replicates of a chunk by a score to a ratio, or not at all, and fine-tune them.

    Args:
      lab: the programs.
      cell: score and ratio, or the control.
      chunk: indices of the replicates.
      dense: their dense weights, as an ``Outcome`` has them.
      on_epoch: called once an epoch.
    """
    index = _place(lab, chunk)
    params, stats = replicates.place(_unflatten(lab.template, dense), lab.layout.mesh)
    asked = {}
    if cell.score != plan.CONTROL:
        needed = oneshot.needs_gradient(cell.score)
        grads = lab.gradient((params, stats, index), lab.train) if needed else params
        scores = lab.score[cell.score]((params, grads, index))
        params, kept = lab.prune[cell.score == "undecayed-signed"]((params, scores), lab.keep[cell.ratio])
        asked = {"kept_by_mask": replicates.fetch(kept, len(chunk))}
    outcome, best = _train(lab, lab.finetune, (params, stats, lab.finetune_key(index)), chunk, on_epoch)
    return _judged(lab, chunk, outcome._replace(summary={**outcome.summary, **asked}), best)


def _judged(lab: Laboratory, chunk: range, outcome: Outcome, best: tuple[Any, Any]) -> Outcome:
    """Add the shares of units that are dead, and that are linear, in the networks of the chosen epochs."""
    dead, linear = replicates.fetch(lab.activity((*best, _place(lab, chunk)), lab.train), len(chunk))
    return outcome._replace(summary={**outcome.summary, "dead_units": dead, "linear_units": linear})


def _programs(study: Study, task: tasks.Task, layout: replicates.Layout) -> dict[str, Any]:
    """What is done to replicates beside training and predicting; fields of a ``Laboratory``."""
    key = functools.partial(replicates.key, study.seed)
    spread = functools.partial(replicates.spread, layout=layout)

    def fresh(index: jax.Array) -> tuple[Any, Any, jax.Array]:
        return (*task.init(key(index, _INIT)), key(index, _DENSE))

    def gradient(replicate: tuple[Any, Any, jax.Array], train: datasets.Split) -> Any:
        params, stats, index = replicate
        decay = study.weight_decay if study.gradient_includes_decay else 0.0
        sizes = {"batch": study.batch, "batches": study.gradient_batches}
        where = (task, params, stats, key(index, _GRADIENT), train)
        return oneshot.gradient(*where, mode=study.gradient_mode, decay=decay, **sizes)

    def scored(name: str, replicate: tuple[Any, Any, jax.Array]) -> Any:
        params, grads, index = replicate
        return oneshot.score_of(name, study.undecayed_epsilon)(params, grad=grads, key=key(index, _RANDOM))

    def pruned(signed: bool, replicate: tuple[Any, Any], keep: jax.Array) -> tuple[Any, jax.Array]:
        return oneshot.prune(*replicate, keep, signed=signed)

    def nonzero(params: Any) -> jax.Array:
        prunable = jax.tree.leaves(trees.only(params, oneshot.PRUNABLE))
        return sum(jnp.count_nonzero(kernel).astype(jnp.int32) for kernel in prunable)

    def activity(replicate: tuple[Any, Any, jax.Array], train: datasets.Split) -> tuple[jax.Array, jax.Array]:
        params, stats, index = replicate
        some = datasets.Split(train.images[:_JUDGED], train.labels[:_JUDGED])
        statuses = jprune.unit_status(task.preactivations(params, tasks.Context(stats, some, key(index, _GRADIENT))))
        units = jnp.concatenate(jax.tree.leaves(statuses))
        return (units == -1).mean(dtype=jnp.float32), (units == 0).mean(dtype=jnp.float32)

    return {
        "fresh": spread(fresh),
        "gradient": spread(gradient),
        "score": {name: spread(functools.partial(scored, name)) for name in study.scores},
        "prune": {signed: spread(functools.partial(pruned, signed)) for signed in (False, True)},
        "finetune_key": spread(lambda index: key(index, _FINETUNE)),
        "nonzero": spread(nonzero),
        "activity": spread(activity),
    }


def _train(
    lab: Laboratory,
    phase: phases.Phase,
    entering: tuple[Any, Any, jax.Array],
    chunk: range,
    on_epoch: Callable[[], None],
) -> tuple[Outcome, tuple[Any, Any]]:
    """Train through a phase and predict with the best epoch's weights, which are returned too."""
    state, metrics = phases.fit(phase, entering, lab.train, lab.validation, on_epoch)
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
    return Outcome(weights, summary, predictions, records), best


def _place(lab: Laboratory, chunk: range) -> jax.Array:
    return replicates.place(np.array(chunk, np.int32), lab.layout.mesh)


def _sizes(lab: Laboratory) -> tuple[int, int]:
    """Parameters in all, and how many of them may be pruned."""
    prunable = trees.only(lab.template[0], oneshot.PRUNABLE)
    return sum(x.size for x in jax.tree.leaves(lab.template[0])), sum(x.size for x in jax.tree.leaves(prunable))


def _flatten(tree: tuple[Any, Any]) -> Weights:
    """Name the arrays of (params, stats) by their paths."""
    paths, leaves, _ = trees.flatten(tree)
    return dict(zip(paths, leaves, strict=True))


def _unflatten(template: tuple[Any, Any], weights: Weights) -> tuple[Any, Any]:
    """Put arrays back in their places."""
    paths, _, treedef = trees.flatten(template)
    return jax.tree.unflatten(treedef, [weights[path] for path in paths])
