"""What a study of recall distortion consists of: its stages, and every setting that decides their numbers.

A setting that is here is in the hash that names a stage; how many replicates run, and where, is not.
"""

import dataclasses
import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments.data import datasets
from experiments.recall_distortion.oneshot import needs_gradient
from experiments.recall_distortion.presets import Study
from experiments.storage import store
from experiments.training.steps import Recipe

CONTROL = "control"


class Cell(NamedTuple):
    """A score and a ratio; the control, which is not pruned, belongs to every score.

    Attributes:
      score: its name, or ``control``.
      ratio: parameters before / after; 1 for the control.
    """

    score: str
    ratio: float


class Planned(NamedTuple):
    """A stage of a study, for whichever replicates.

    Attributes:
      name: for people.
      kind: in the store: ``dense`` or ``pruned``.
      settings: all that decides its numbers, the replicates apart.
      jumpstart: coefficient in dense training.
      cell: score and ratio; None for dense training.
    """

    name: str
    kind: str
    settings: dict[str, Any]
    jumpstart: float
    cell: Cell | None

    @property
    def title(self) -> str:
        """The name with the coefficient."""
        return f"jumpstart {self.jumpstart:g}: {self.name}"


def cells(study: Study) -> list[Cell]:
    """What becomes of each dense checkpoint, the control first.

    >>> cells(Study(ratios=(1, 2), scores=("magnitude",)))
    [Cell(score='control', ratio=1.0), Cell(score='magnitude', ratio=2.0)]
    """
    control = [Cell(CONTROL, 1.0)] if 1 in study.ratios else []
    return control + [Cell(score, float(ratio)) for ratio in study.ratios if ratio != 1 for score in study.scores]


def load(study: Study) -> datasets.Dataset:
    """Load the data set of a study.

    Raises:
      ValueError: as ``data.load``; likewise when the data is missing or an extra is.
    """
    dataset = datasets.load(
        study.dataset,
        data_dir=study.data_dir,
        seed=study.seed,
        selection=study.selection,
        classes=study.classes or None,
        imbalance=study.imbalance,
        image_size=study.image_size,
    )
    if study.limit is None:
        return dataset
    rng = np.random.default_rng((study.seed, 3))
    some = [split.take(np.sort(rng.permutation(len(split.labels))[: study.limit])) for split in _splits(dataset)]
    return dataclasses.replace(dataset, train=some[0], validation=some[1], test=some[2])


def dense_recipe(study: Study, jumpstart: float) -> Recipe:
    """How dense networks are trained."""
    return _recipe(study, study.epochs, study.lr, jumpstart)


def finetune_recipe(study: Study) -> Recipe:
    """How pruned networks are fine-tuned: without the jumpstart penalty."""
    return _recipe(study, study.finetune_epochs, study.finetune_lr, 0.0)


def root(study: Study) -> Path:
    """Folder of the study's store."""
    return study.folder / "store"


def data_settings(study: Study) -> dict[str, Any]:
    """What decides the data set and its split."""
    resized = {} if study.image_size is None else {"image_size": list(study.image_size)}
    return resized | {
        "dataset": study.dataset,
        "selection": study.selection,
        "classes": list(study.classes),
        "imbalance": study.imbalance,
        "limit": study.limit,
        "seed": study.seed,
    }


def dense_settings(study: Study, fingerprint: str, jumpstart: float) -> dict[str, Any]:
    """What decides a dense network, its replicate index apart."""
    return {
        "data": {**data_settings(study), "fingerprint": fingerprint},
        "model": study.model,
        "augment": study.augment,
        "recipe": dataclasses.asdict(dense_recipe(study, jumpstart)),
        "seed": study.seed,
    }


def pruned_settings(study: Study, fingerprint: str, jumpstart: float, cell: Cell) -> dict[str, Any]:
    """What decides a pruned and fine-tuned network, its replicate index apart."""
    gradient = {
        "batch": study.batch,
        "batches": study.gradient_batches,
        "mode": study.gradient_mode,
        "includes_decay": study.gradient_includes_decay,
        "epsilon": float(study.undecayed_epsilon),
    }
    return {
        "dense": dense_settings(study, fingerprint, jumpstart),
        "score": cell.score,
        "ratio": cell.ratio,
        "gradient": gradient if cell.score != CONTROL and needs_gradient(cell.score) else None,
        "recipe": dataclasses.asdict(finetune_recipe(study)),
    }


def stages(study: Study, fingerprint: str, jumpstart: float) -> list[Planned]:
    """The stages of a study with this coefficient, each before those that start from it."""
    dense = Planned("dense training", "dense", dense_settings(study, fingerprint, jumpstart), jumpstart, None)
    names = {
        cell: "no pruning (control)" if cell.score == CONTROL else f"{cell.score}, t = {cell.ratio:g}"
        for cell in cells(study)
    }
    pruned = [
        Planned(name, "pruned", pruned_settings(study, fingerprint, jumpstart, cell), jumpstart, cell)
        for cell, name in names.items()
    ]
    return [dense, *pruned]


def fingerprint(dataset: datasets.Dataset) -> str:
    """A checksum over everything of a data set that training and test see: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for array in (*(array for split in _splits(dataset) for array in split), dataset.mean, dataset.std):
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]


def settled(study: Study) -> store.Stage:
    """The stage that holds the test labels, the names of the classes, and the data's fingerprint."""
    return store.stage(root(study), "data", data_settings(study), range(1))


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
    )
