"""The stages of a recall-distortion study, and the settings that determine their results.

These settings are part of the hash that names a stage; the number of replicates and where they run are not.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from experiments.data import datasets
from experiments.models import own
from experiments.models.options import is_own, read_options
from experiments.recall_distortion.config import Study
from experiments.recall_distortion.oneshot import needs_gradient
from experiments.storage import store
from experiments.storage.files import JSON
from experiments.training import tasks
from experiments.training.steps import Recipe
from jprune import trees

CONTROL = "control"
_OWN_VERSION = 2  # of the training of own models; version 1, which has no number, did not train kernels of zeros
Model = str | Callable[..., object]


class Coefficients(NamedTuple):
    """Coefficients of the jumpstart penalty in dense training and in fine-tuning."""

    dense: float
    finetune: float = 0.0

    def __str__(self) -> str:
        """Readable text, with the second coefficient if it is not 0."""
        return f"{self.dense:g}" + (f", in fine-tuning {self.finetune:g}" if self.finetune else "")


class PruningTarget(NamedTuple):
    """A score and a compression ratio, or the control, which is not pruned and belongs to every score.

    Attributes:
      score: name of the score, or ``control``.
      ratio: parameters before / after; 1 for the control.
    """

    score: str
    ratio: float


class StudyStage(NamedTuple):
    """A stage of a study, for any replicates.

    Attributes:
      name: name to print.
      kind: kind in the store: ``dense`` or ``pruned``.
      settings: everything that determines its results except the replicates.
      coefficients: coefficients of the jumpstart penalty.
      target: score and ratio; None for dense training.
    """

    name: str
    kind: str
    settings: dict[str, JSON]
    coefficients: Coefficients
    target: PruningTarget | None

    @property
    def title(self) -> str:
        """The name with the coefficients."""
        shown = self.coefficients if self.target else Coefficients(self.coefficients.dense)
        return f"jumpstart {shown}: {self.name}"


def coefficients(study: Study) -> list[Coefficients]:
    """Return the pairs of coefficients of the study; there is a report for each."""
    return [Coefficients(float(c), float(f)) for c in study.jumpstart for f in study.finetune_jumpstart]


def targets(study: Study) -> list[PruningTarget]:
    """Return the scores and ratios to which each dense network is pruned, with the control first.

    >>> targets(Study(ratios=(1, 2), scores=("magnitude",)))
    [PruningTarget(score='control', ratio=1.0), PruningTarget(score='magnitude', ratio=2.0)]
    """
    control = [PruningTarget(CONTROL, 1.0)] if 1 in study.ratios else []
    return control + [
        PruningTarget(score, float(ratio)) for ratio in study.ratios if ratio != 1 for score in study.scores
    ]


def load(study: Study, data_dir: Path | None = None) -> datasets.Dataset:
    """Load the data set of a study.

    Raises:
      ValueError: as ``datasets.load``, as when the data or an extra is missing.
    """
    dataset = datasets.load(
        study.dataset,
        data_dir=data_dir,
        seed=study.seed,
        selection=study.selection,
        classes=study.classes or None,
        imbalance=study.imbalance,
        image_size=study.image_size,
    )
    return with_noise(study, limited(study, dataset))


def with_noise(study: Study, dataset: datasets.Dataset) -> datasets.Dataset:
    """Replace a fraction ``study.label_noise`` of the training labels by another class, drawn with the seed."""
    if not study.label_noise:
        return dataset
    rng = np.random.default_rng((study.seed, 4))
    labels = dataset.train.labels.copy()
    noisy = rng.permutation(len(labels))[: round(study.label_noise * len(labels))]
    labels[noisy] = (labels[noisy] + rng.integers(1, dataset.num_classes, len(noisy))) % dataset.num_classes
    return dataclasses.replace(dataset, train=dataset.train._replace(labels=labels))


def limited(study: Study, dataset: datasets.Dataset) -> datasets.Dataset:
    """Take at most ``study.limit`` examples of each split, drawn with the seed."""
    if study.limit is None:
        return dataset
    rng = np.random.default_rng((study.seed, 3))
    same = dataset.validation is dataset.test  # selection="test"
    some = [split.take(np.sort(rng.permutation(len(split.labels))[: study.limit])) for split in _splits(dataset)]
    train, validation, test = some
    return dataclasses.replace(dataset, train=train, validation=test if same else validation, test=test)


def dense_recipe(study: Study, jumpstart: float) -> Recipe:
    """Return the recipe of dense training."""
    return _recipe(study, study.epochs, study.lr, jumpstart)


def finetune_recipe(study: Study, jumpstart: float = 0.0) -> Recipe:
    """Return the recipe of fine-tuning."""
    return _recipe(study, study.finetune_epochs, study.finetune_lr, jumpstart)


def root(folder: Path) -> Path:
    """Return the store in a folder of results."""
    return folder / "store"


def data_settings(study: Study) -> dict[str, JSON]:
    """Return the settings that determine the data set and its split."""
    later: dict[str, JSON] = {}  # options that were added later are left out at their defaults
    if study.image_size is not None:
        later["image_size"] = list(study.image_size)
    if study.label_noise:
        later["label_noise"] = study.label_noise
    return later | {
        "dataset": study.dataset,
        "selection": study.selection,
        "classes": list(study.classes),
        "imbalance": study.imbalance,
        "limit": study.limit,
        "seed": study.seed,
    }


def model_settings(
    study: Study, dataset: datasets.Dataset | None = None, model: Model | None = None
) -> dict[str, JSON]:
    """Return the settings that determine the network; for built-in models with default options only the name.

    For your own model the settings contain its options, the shapes of its parameters and a hash of the source
    code of its module (``own.source_digest``), so that results of code that has changed are not used again.

    Args:
      study: settings, with the name of the model.
      dataset: data set, which determines the shapes; needed only for a user-defined model.
      model: a class that is used instead of the named model.
    """
    settings: dict[str, JSON] = {"model": study.model}
    options = read_options(study.model_options)
    if options:
        settings["model_options"] = {name: repr(value) for name, value in options.items()}
    if study.prunable is not None:
        settings["prunable"] = study.prunable
    if dataset is not None and (model is not None or is_own(study.model)):
        task = tasks.classification(dataset, model or study.model, options=options)
        paths, leaves, _ = trees.flatten(jax.eval_shape(task.init, jax.random.key(0))[0])
        settings["version"] = _OWN_VERSION
        settings["parameters"] = {path: list(leaf.shape) for path, leaf in zip(paths, leaves, strict=True)}
        settings["source"] = own.source_digest(own.load(study.model) if model is None else model)
    return settings


def dense_settings(study: Study, known: "Known", jumpstart: float) -> dict[str, JSON]:
    """Return the settings that determine a dense network, except the index of the replicate."""
    return {
        "data": {**data_settings(study), "fingerprint": known.fingerprint},
        **known.model,
        "augment": study.augment,
        "recipe": dense_recipe(study, jumpstart).settings(),
        "seed": study.seed,
    }


def pruned_settings(study: Study, known: "Known", penalty: Coefficients, target: PruningTarget) -> dict[str, JSON]:
    """Return the settings that determine a pruned and fine-tuned network, except the index of the replicate."""
    gradient = {
        "batch": study.batch,
        "batches": study.gradient_batches,
        "mode": study.gradient_mode,
        "includes_decay": study.gradient_includes_decay,
        "epsilon": float(study.undecayed_epsilon),
    }
    later: dict[str, JSON] = {}  # options that were added later are left out at their defaults
    if study.rounding is not None:
        later["rounding"] = study.rounding
    if target.score != CONTROL and study.counting != "exact":
        later["counting"] = study.counting
    if target.score != CONTROL and study.min_keep:
        later["min_keep"] = study.min_keep
    rounded = study.rounding is not None and any(study.finetune_epochs)
    if rounded or (penalty.finetune and _of_channels(study, target)):
        later["masks"] = 2  # version: earlier ones fixed weights that were rounded to 0, and not the biases of channels
    return (
        later
        | {
            "dense": dense_settings(study, known, penalty.dense),
            "score": target.score,
            "ratio": target.ratio,
            "gradient": gradient if target.score != CONTROL and needs_gradient(target.score) else None,
            "recipe": finetune_recipe(study, penalty.finetune).settings(),
        }
        | ({"structure": study.structure} if _of_channels(study, target) else {})
    )


def _of_channels(study: Study, target: PruningTarget) -> bool:
    """Whether channels are removed; settings of single weights omit the structure, as in earlier versions."""
    return study.structure == "channels" and target.score != CONTROL


class Known(NamedTuple):
    """Inputs of a stage's hash that are not settings of the study.

    Attributes:
      fingerprint: fingerprint of the data set.
      model: result of ``model_settings``.
    """

    fingerprint: str
    model: dict[str, JSON]


def known(study: Study, dataset: datasets.Dataset, model: Model | None = None) -> Known:
    """Fingerprint the data and describe the model, for the hash of a stage."""
    return Known(datasets.fingerprint(dataset), model_settings(study, dataset, model))


def stages(study: Study, known: Known, penalty: Coefficients) -> list[StudyStage]:
    """Return the stages of a study with these coefficients, each before those that start from it."""
    dense = StudyStage("dense training", "dense", dense_settings(study, known, penalty.dense), penalty, None)
    names = {
        target: "no pruning (control)"
        if target.score == CONTROL
        else f"{target.score}{', channels' if _of_channels(study, target) else ''}, t = {target.ratio:g}"
        for target in targets(study)
    }
    pruned = [
        StudyStage(name, "pruned", pruned_settings(study, known, penalty, target), penalty, target)
        for target, name in names.items()
    ]
    return [dense, *pruned]


def data_stage(folder: Path, study: Study) -> store.Stage:
    """Return the stage with the test labels, the names of the classes and the fingerprint of the data set."""
    return store.stage(root(folder), "data", data_settings(study), range(1))


def _splits(dataset: datasets.Dataset) -> tuple[datasets.Split, ...]:
    return dataset.train, dataset.validation, dataset.test


def _recipe(study: Study, epochs: tuple[int, ...], rates: tuple[float, ...], jumpstart: float) -> Recipe:
    return Recipe(
        epochs=epochs,
        learning_rates=tuple(map(float, rates)),
        batch=study.batch,
        momentum=float(study.momentum),
        nesterov=study.nesterov,
        weight_decay=float(study.weight_decay),
        jumpstart=float(jumpstart),
        optimizer=study.optimizer,
        schedule=study.schedule,
    )
