"""What the stages of a study leave in its store, and what comes back out of it."""

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import jprune
from experiments.data import datasets
from experiments.recall_distortion import plan
from experiments.recall_distortion.plan import Planned
from experiments.recall_distortion.presets import Study, from_json
from experiments.recall_distortion.runner import Outcome, Weights
from experiments.storage import files, provenance, store

_CONFIG = "config.json"
_MOST_BYTES = 2**26  # of test images that are kept for the report


class Truth(NamedTuple):
    """What every prediction of a study is held against.

    Attributes:
      labels: of the test split, (examples,) int32.
      class_names: one per class.
      fingerprint: of the data set.
    """

    labels: np.ndarray
    class_names: tuple[str, ...]
    fingerprint: str


def record(study: Study) -> None:
    """Write the settings, the versions of what runs them, and what runs them, into the study's folder.

    Raises:
      StoreError: they cannot be written.
    """
    versions = {name: metadata.version(name) for name in ("jprune", "jax", "jaxlib", "flax", "optax", "numpy")}
    files.write_json(study.folder / _CONFIG, {"study": study.to_json(), "versions": versions})
    provenance.note(study.folder, "recall_distortion")


def recorded(folder: Path) -> Study | None:
    """The settings of the study that was last run in a folder, if any was.

    Raises:
      StoreError: the file cannot be read; the message names it.
    """
    path = folder / _CONFIG
    if not path.exists():
        return None
    try:
        return from_json(json.loads(path.read_text())["study"])
    except (ValueError, KeyError, TypeError) as error:
        raise files.StoreError(f"{path} cannot be read ({error}); delete it and give all options again") from error


def settle(study: Study, dataset: datasets.Dataset) -> None:
    """Store the test labels, or see that the data set is the one whose labels are stored.

    Raises:
      StoreError: the data set has changed since the study began.
    """
    where, settings, fingerprint = plan.settled(study), plan.data_settings(study), plan.fingerprint(dataset)
    if not where.done:
        with store.writing(where, settings) as folder:
            files.write_table(folder / "labels.parquet", {"label": dataset.test.labels})
            if dataset.test.images.ndim == 4 and dataset.test.images.nbytes <= _MOST_BYTES:
                np.save(folder / "images.npy", dataset.test.images, allow_pickle=False)
            files.write_json(
                folder / "data.json", {"fingerprint": fingerprint, "class_names": list(dataset.class_names)}
            )
    known = truth(study).fingerprint
    if known != fingerprint:
        raise store.StoreError(
            f"{where.path} was made from a data set with fingerprint {known}, but {study.dataset} now has "
            f"{fingerprint}; bring the old data back or give another --out"
        )


def truth(study: Study) -> Truth:
    """Read the test labels of a study.

    Raises:
      StoreError: nothing of the study is stored, or a file is corrupt.
    """
    where = plan.settled(study)
    if not where.done:
        raise store.StoreError(f"{where.path} is missing: nothing of this study has been run yet")
    known = json.loads(store.verified(where, "data.json").read_text())
    labels = store.read_table(where, "labels.parquet")["label"].to_numpy()
    return Truth(labels, tuple(known["class_names"]), known["fingerprint"])


def images(study: Study) -> np.ndarray | None:
    """Read the test images of a study, as they are stored in the data set; None where there are none, or too many.

    Raises:
      StoreError: the file is corrupt.
    """
    where = plan.settled(study)
    if not (where.path / "images.npy").exists():
        return None
    return np.load(store.verified(where, "images.npy"), allow_pickle=False)


def save(study: Study, stage: Planned, mine: range, outcome: Outcome) -> None:
    """Store what a stage left behind.

    Raises:
      StoreError: it cannot be written; the message names the file.
    """
    held = truth(study)
    classes = len(held.class_names)
    counts = np.asarray(jprune.recall.counts(held.labels, outcome.predictions, classes))
    model, true, predicted = np.nonzero(counts)
    where = store.stage(plan.root(study), stage.kind, stage.settings, mine)
    with store.writing(where, stage.settings) as folder:
        files.write_table(folder / "replicates.parquet", outcome.summary)
        files.write_table(
            folder / "predictions.parquet",
            {"replicate": np.array(mine, np.int32), "prediction": outcome.predictions.astype(np.int16)},
        )
        files.write_table(
            folder / "counts.parquet",
            {
                "replicate": np.array(mine, np.int32)[model],
                "true": true.astype(np.int16),
                "predicted": predicted.astype(np.int16),
                "count": counts[model, true, predicted],
            },
        )
        files.write_lines(folder / "metrics.jsonl", outcome.metrics)
        if stage.cell is None or study.keep_pruned:
            files.write_weights(folder / "weights", outcome.weights)


def dense_weights(study: Study, settings: Mapping[str, Any], mine: range) -> Weights:
    """Read the weights of dense networks trained with these settings.

    Raises:
      StoreError: they are not all stored, or a file is corrupt.
    """
    return store.collect_weights(store.find(plan.root(study), "dense", settings), mine)


def replicates_of(study: Study, stage: Planned) -> pd.DataFrame:
    """The stored replicates of a stage, a row each; empty where there is none."""
    found = store.find(plan.root(study), stage.kind, stage.settings)
    return store.collect_table(found, "replicates.parquet") if found else pd.DataFrame({"replicate": []})


def predictions_of(study: Study, stage: Planned) -> Mapping[int, np.ndarray]:
    """Stored predictions on the test split by replicate, each (examples,) int16."""
    found = store.find(plan.root(study), stage.kind, stage.settings)
    if not found:
        return {}
    table = store.collect_table(found, "predictions.parquet")
    return dict(zip(table["replicate"], table["prediction"], strict=True))
