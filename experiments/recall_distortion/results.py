"""Store and read the results of the stages of a study."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

import jprune
from experiments.cli import commands
from experiments.data import datasets
from experiments.models.options import is_own
from experiments.recall_distortion import plan
from experiments.recall_distortion.config import Running, Study, running_from_json, study_from_json
from experiments.recall_distortion.plan import Known, StudyStage
from experiments.recall_distortion.runner import StageResult, Weights
from experiments.storage import files, settings, store
from experiments.storage.files import JSON

_MOST_BYTES = 2**26  # maximum size of the test images stored for the report


class Truth(NamedTuple):
    """The reference for the predictions of a study.

    Attributes:
      labels: labels of the test split, (examples,) int32.
      class_names: one for each class.
      fingerprint: fingerprint of the data set.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str


def record(folder: Path, study: Study, running: Running, known: Known) -> list[str]:
    """Write the settings, the package versions and the command into the study's folder.

    Returns:
      The options in which the last study of this folder differed.

    Raises:
      StoreError: they cannot be written.
    """
    settings_of_both = commands.to_json(study), commands.to_json(running)
    return settings.record(folder, "recall_distortion", *settings_of_both, model=known.model)


def recorded(folder: Path) -> tuple[Study, Running] | None:
    """Return the settings of the last study in a folder, or None.

    Raises:
      StoreError: the file cannot be read; the message names it.
    """
    found = settings.recorded(folder)
    return None if found is None else _restored(folder, found)


def all_recorded(folder: Path) -> list[Study]:
    """Return the settings of every study that was run in a folder."""
    return [_restored(folder, found)[0] for found in settings.all_recorded(folder)]


def _restored(folder: Path, found: Mapping[str, Mapping[str, JSON]]) -> tuple[Study, Running]:
    try:
        return study_from_json(found["study"]), running_from_json(found["running"])
    except (ValueError, TypeError) as error:
        raise files.StoreError(
            f"{folder / 'config.json'} has no settings of a recall distortion study ({error}): for another study, such "
            "as a jumpstart grid, use its own command; otherwise delete the file and pass all options again"
        ) from error


def known(folder: Path, study: Study) -> Known:
    """Read from the store the inputs of the hashes of the study's stages.

    Raises:
      StoreError: no result of the study is stored, or a file is corrupt.
    """
    model = plan.model_settings(study)
    if is_own(study.model):
        found = settings.of_study(folder, commands.to_json(study))
        model = found["model"] if found else model
    return Known(truth(folder, study).fingerprint, model)


def store_data(folder: Path, study: Study, dataset: datasets.Dataset) -> None:
    """Store the test labels and class names, or check that they are those that are stored.

    Raises:
      StoreError: the data set or a class name has changed since the study began.
    """
    where, described, fingerprint = (
        plan.data_stage(folder, study),
        plan.data_settings(study),
        datasets.fingerprint(dataset),
    )
    if not where.done:
        with store.writing(where, described) as writing:
            files.write_table(writing / "labels.parquet", {"label": dataset.test.labels})
            if dataset.test.images.ndim == 4 and dataset.test.images.nbytes <= _MOST_BYTES:
                np.save(writing / "images.npy", dataset.test.images, allow_pickle=False)
            files.write_json(
                writing / "data.json", {"fingerprint": fingerprint, "class_names": list(dataset.class_names)}
            )
    stored = truth(folder, study)
    if stored.fingerprint != fingerprint:
        raise store.StoreError(
            f"{where.path} was made from a data set with fingerprint {stored.fingerprint}, but {study.dataset} now has "
            f"{fingerprint}; restore the old data or use another --out"
        )
    if stored.class_names != tuple(dataset.class_names):  # not part of the fingerprint, as in earlier versions
        raise store.StoreError(
            f"{where.path} has the class names {', '.join(stored.class_names)}, but {study.dataset} now has "
            f"{', '.join(dataset.class_names)}; restore the old names or use another --out"
        )


def truth(folder: Path, study: Study) -> Truth:
    """Read the test labels of a study.

    Raises:
      StoreError: no result of the study is stored, or a file is corrupt.
    """
    where = plan.data_stage(folder, study)
    if not where.done:
        raise store.StoreError(
            f"no stage of this study has run in {folder}: {where.path} is missing; run it first, or give its folder "
            "with --out"
        )
    data = json.loads(store.verified(where, "data.json").read_text())
    labels = store.read_table(where, "labels.parquet")["label"].to_numpy()
    return Truth(labels, tuple(data["class_names"]), data["fingerprint"])


def images(folder: Path, study: Study) -> np.ndarray | None:
    """Read the stored test images of a study; None if the examples are not images, or too large to store.

    Raises:
      StoreError: the file is corrupt.
    """
    where = plan.data_stage(folder, study)
    if not (where.path / "images.npy").exists():
        return None
    return np.load(store.verified(where, "images.npy"), allow_pickle=False)


def save(
    folder: Path, study: Study, stage: StudyStage, mine: range, result: StageResult, *, weights: bool = False
) -> None:
    """Store the result of a stage.

    Args:
      folder: folder of the study.
      study: its settings.
      stage: stage of its plan.
      mine: the replicates.
      result: result of these replicates.
      weights: whether to store the weights of pruned networks.

    Raises:
      StoreError: it cannot be written; the message names the file.
    """
    test = truth(folder, study)
    counts = np.asarray(jprune.recall.counts(test.labels, result.predictions, len(test.class_names)))
    model, true, predicted = np.nonzero(counts)
    where = store.stage(plan.root(folder), stage.kind, stage.settings, mine)
    with store.writing(where, stage.settings) as writing:
        files.write_table(writing / "replicates.parquet", result.summary)
        files.write_table(
            writing / "predictions.parquet",
            {"replicate": np.array(mine, np.int32), "prediction": result.predictions.astype(np.int16)},
        )
        files.write_table(
            writing / "counts.parquet",
            {
                "replicate": np.array(mine, np.int32)[model],
                "true": true.astype(np.int16),
                "predicted": predicted.astype(np.int16),
                "count": counts[model, true, predicted],
            },
        )
        files.write_lines(writing / "metrics.jsonl", result.metrics)
        if stage.target is None or weights:
            files.write_weights(writing / "weights", result.weights)


def dense_weights(folder: Path, settings: Mapping[str, JSON], mine: range) -> Weights:
    """Read the weights of dense networks trained with these settings.

    Raises:
      StoreError: they are not all stored, or a file is corrupt.
    """
    return store.collect_weights(store.find(plan.root(folder), "dense", settings), mine)


def replicates_of(folder: Path, stage: StudyStage) -> pd.DataFrame:
    """Return a row per stored replicate of a stage; possibly empty."""
    found = store.find(plan.root(folder), stage.kind, stage.settings)
    return store.collect_table(found, "replicates.parquet") if found else pd.DataFrame({"replicate": []})


def predictions_of(folder: Path, stage: StudyStage) -> Mapping[int, np.ndarray]:
    """Return stored predictions on the test split by replicate, each (examples,) int16."""
    found = store.find(plan.root(folder), stage.kind, stage.settings)
    if not found:
        return {}
    table = store.collect_table(found, "predictions.parquet")
    return dict(zip(table["replicate"], table["prediction"], strict=True))
