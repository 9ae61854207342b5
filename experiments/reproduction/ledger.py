"""Committed results of finished runs: small tables, from which every published number is rebuilt.

A study's store is gigabytes and is not committed. ``experiments/results/`` has a CSV file with a row per network and a
JSON file with their columns and origin.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, get_args

import numpy as np
import pandas as pd

import jprune
from experiments.recall_distortion import plan, presets, results
from experiments.recall_distortion.config import Score, Study
from experiments.recall_distortion.plan import CONTROL
from experiments.reproduction import arms
from experiments.storage import files, provenance, store

FOLDER = Path(__file__).parents[1] / "results"
DENSE = "dense"
_KEY = ["score", "ratio", "replicate"]
_DIGITS = ".6g"  # of the numbers in a table, so of its ratios too


class Recalls(NamedTuple):
    """The networks of one recall-distortion study.

    Attributes:
      networks: a row each: score (``dense`` before pruning, ``control`` fine-tuned only), ratio, replicate,
        parameters, prunable, nonzero, dead_units, linear_units, and correct_0, correct_1, ...: test examples
        of each class that are classified correctly.
      support: (classes,) test examples of each class.
      class_names: one per class.
    """

    networks: pd.DataFrame
    support: np.ndarray
    class_names: tuple[str, ...]

    def correct(self, score: str, ratio: float, replicates: Sequence[int]) -> np.ndarray:
        """Return correct counts of some replicates, (replicates, classes)."""
        rows = self._rows(score, ratio).loc[list(replicates)]
        return rows[[f"correct_{c}" for c in range(len(self.support))]].to_numpy(np.int64)

    def column(self, name: str, score: str, ratio: float, replicates: Sequence[int]) -> np.ndarray:
        """Return another column of some replicates, (replicates,)."""
        return self._rows(score, ratio).loc[list(replicates), name].to_numpy(np.float64)

    def ratios(self, score: str) -> list[float]:
        """Return the ratios at which a score was run."""
        return sorted(self.networks.loc[self.networks["score"] == score, "ratio"].unique())

    def complete(self, scores: Sequence[str]) -> list[int]:
        """Return the replicates that have the dense network and every ratio of each of the scores.

        They also have the control if any replicate has it; a study can be run without one.
        """
        pruned = [(score, ratio) for score in scores for ratio in self.ratios(score)]
        wanted = [(DENSE, 1.0), *((CONTROL, ratio) for ratio in self.ratios(CONTROL)), *pruned]
        complete = [set(self._rows(score, ratio).index) for score, ratio in wanted]
        return sorted(set.intersection(*complete))

    def audit(self, scores: Sequence[str], replicates: Sequence[int]) -> jprune.recall.Audit:
        """Audit some scores, all from the same dense networks; the control, if there is one, is ratio 1 of each."""
        control = {ratio: self.correct(CONTROL, ratio, replicates) for ratio in self.ratios(CONTROL)}
        pruned = {
            score: control | {ratio: self.correct(score, ratio, replicates) for ratio in self.ratios(score)}
            for score in scores
        }
        dense = self.correct(DENSE, 1.0, replicates)
        return jprune.recall.audit_counts(dense, pruned, support=self.support, class_names=self.class_names)

    def working(self, alphas: pd.DataFrame) -> pd.DataFrame:
        """Return the rows of an audit's alphas whose network has not collapsed to chance."""
        return alphas[alphas["accuracy"] > self._collapse_accuracy]

    def collapsed(self, score: str, ratio: float, replicates: Sequence[int]) -> np.ndarray:
        """Whether each network has collapsed: accuracy at most 1.1 times the share of the largest class."""
        return self.correct(score, ratio, replicates).sum(1) / self.support.sum() <= self._collapse_accuracy

    @property
    def _collapse_accuracy(self) -> float:
        return float(1.1 * self.support.max() / self.support.sum())

    def at_nominal(self, ratios: Sequence[float]) -> "Recalls":
        """Return the same networks with every ratio replaced by the nearest nominal one, on a log scale."""
        nominal = np.asarray(ratios, np.float64)
        distance = np.abs(np.log(self.networks["ratio"].to_numpy()[:, None] / nominal))
        return self._replace(networks=self.networks.assign(ratio=nominal[distance.argmin(1)]))

    def _rows(self, score: str, ratio: float) -> pd.DataFrame:
        table = self.networks
        return table[(table["score"] == score) & (table["ratio"] == ratio)].set_index("replicate")


def recalls(name: str, folder: Path = FOLDER) -> Recalls:
    """Read the committed table of a recall-distortion study.

    Raises:
      FileNotFoundError: there is no table of that name.
    """
    known = json.loads((folder / f"{name}.json").read_text())
    networks = pd.read_csv(folder / f"{name}.csv")
    return Recalls(networks, np.array(known["support"]), tuple(known["class_names"]))


def published_counts(path: Path) -> Recalls:
    """Read published counts: a row per network and ratio (1 is the dense network), with 1,000 examples per class.

    The published networks have no fine-tuned control; the dense network takes its place in ``complete``.
    """
    table = pd.read_csv(path).rename(columns={"model_index": "replicate"})
    dense = table[table["ratio"] == 1]
    parts = [
        dense.assign(score=DENSE),
        dense.assign(score=CONTROL),
        table[table["ratio"] != 1].assign(score="magnitude"),
    ]
    networks = pd.concat(parts, ignore_index=True)
    classes = sum(name.startswith("correct_") for name in networks)
    return Recalls(networks, np.full(classes, 1000), tuple(map(str, range(classes))))


def keep(stored: Path, study: Study, name: str, folder: Path = FOLDER) -> int:
    """Add the stored networks of a study to a table; networks already in the table do not change.

    Args:
      stored: folder of the study's results.
      study: its settings, with one pair of coefficients of the penalty; every score is added, at every ratio
        of this study, of the presets and of the other studies in the folder.
      name: name of the table's files.
      folder: folder of these files.

    Returns:
      The number of networks in the table.

    Raises:
      ValueError: there are several coefficients, the table was made with other settings, or a planned ratio is
        missing.
      StoreError: no result is stored, or a file is corrupt.
    """
    if len(plan.coefficients(study)) > 1:
        raise ValueError(f"jumpstart={study.jumpstart}: keep one coefficient at a time")
    others = [study, *results.all_recorded(stored), *map(presets.get, presets.names())]
    ratios = dict.fromkeys(ratio for one in others for ratio in one.ratios)
    study = dataclasses.replace(study, scores=_possible_scores(study), ratios=tuple(ratios))
    truth, hashed = results.truth(stored, study), results.known(stored, study)
    (penalty,) = plan.coefficients(study)
    pruned = plan.pruned_settings(study, hashed, penalty, plan.PruningTarget("undecayed", 2.0))
    decisive = ("gradient", "recipe", "counting", "min_keep", "rounding", "structure")
    settings = pruned["dense"] | {"pruning": {name: pruned[name] for name in decisive if name in pruned}}
    classes = len(truth.class_names)
    known = {
        "settings": json.loads(json.dumps(settings)),
        "class_names": list(truth.class_names),
        "support": np.bincount(truth.labels, minlength=classes).tolist(),
        "made": provenance.portable(provenance.notes(stored)),
    }
    described, parts = folder / f"{name}.json", []
    if described.exists():
        before = json.loads(described.read_text())
        other = [name for name, value in known["settings"].items() if before["settings"].get(name, value) != value]
        if other:
            raise ValueError(f"{described} was made with other settings ({', '.join(other)}); use another name")
        parts.append(pd.read_csv(folder / f"{name}.csv"))
        known["made"] = before["made"] + [entry for entry in known["made"] if entry not in before["made"]]
    added = [_networks(stored, stage, truth) for stage in plan.stages(study, hashed, penalty)]
    added = [part for part in added if len(part)]
    if parts and added:
        _refuse_other_dense(parts[0], pd.concat(added), stored, name)
    parts += added
    if not parts:
        raise files.StoreError(f"{plan.root(stored)} has no network of this study: run it first")
    table = pd.concat(parts, ignore_index=True).drop_duplicates(_KEY).sort_values(_KEY, kind="stable")
    arms.check_ratios(name, table, stored)
    folder.mkdir(parents=True, exist_ok=True)
    files.write_bytes(folder / f"{name}.csv", table.to_csv(index=False, float_format=f"%{_DIGITS}").encode())
    files.write_json(described, known)
    return len(table)


def _refuse_other_dense(before: pd.DataFrame, added: pd.DataFrame, stored: Path, name: str) -> None:
    """Refuse new rows of a replicate whose dense network is not that of the table: alpha would compare two networks.

    Raises:
      ValueError: there are such rows.
    """
    right = [column for column in before if column.startswith("correct_")]
    kept, found = (
        part[part["score"] == DENSE].drop_duplicates("replicate").set_index("replicate")[right]
        for part in (before, added)
    )
    both = kept.index.intersection(found.index)
    others = both[(kept.loc[both] != found.loc[both]).any(axis=1)]
    new = ~pd.MultiIndex.from_frame(added[_KEY]).isin(pd.MultiIndex.from_frame(before[_KEY]))
    mixed = sorted(set(added.loc[new, "replicate"]) & set(others))
    if mixed:
        raise ValueError(
            f"{stored} has new networks of the replicates {', '.join(map(str, mixed))}, whose dense networks are not "
            f"those of {name}.csv (another processor rounds differently, and training then diverges); use another name"
        )


def _possible_scores(study: Study) -> tuple[Score, ...]:
    """The scores that a study with these settings can have; undecayed-signed selects single weights by its own rule.

    >>> settings = {}, {"structure": "channels"}, {"min_keep": 1}
    >>> [len(_possible_scores(Study(dataset="digits", **given))) for given in settings]
    [5, 4, 4]
    """
    signed = not study.min_keep and study.structure != "channels"
    return tuple(score for score in get_args(Score) if signed or score != "undecayed-signed")


def _networks(stored: Path, stage: plan.StudyStage, truth: results.Truth) -> pd.DataFrame:
    """Return a row per stored network of a stage whose training was not stopped."""
    rows = results.replicates_of(stored, stage)
    if not len(rows):
        return rows
    done = store.find(plan.root(stored), stage.kind, stage.settings)
    counts = store.collect_table(done, "counts.parquet")
    right = counts[counts["true"] == counts["predicted"]].pivot_table(
        index="replicate", columns="true", values="count", fill_value=0
    )
    right = right.reindex(columns=range(len(truth.class_names)), fill_value=0).astype(int).add_prefix("correct_")
    score, ratio = (DENSE, 1.0) if stage.target is None else stage.target
    columns = ["replicate", "parameters", "prunable", "nonzero", "dead_units", "linear_units"]
    healthy = rows[rows["stopped"] < 0].reindex(columns=columns)
    table = healthy.merge(right.reset_index(), on="replicate")
    return table.assign(score=score, ratio=float(f"{ratio:{_DIGITS}}"))[["score", "ratio", *columns, *right.columns]]
