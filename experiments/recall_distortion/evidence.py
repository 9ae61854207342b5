"""Audits over the replicates of a study that have completed every stage."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

import jprune.recall
from experiments.recall_distortion import plan, results
from experiments.recall_distortion.config import Study
from experiments.recall_distortion.plan import CONTROL, Coefficients, StudyStage
from experiments.recall_distortion.results import Truth
from experiments.storage.files import StoreError
from jprune.recall import Audit


class Incomplete(StoreError):
    """No replicate of a study has completed every stage yet."""


class Evidence(NamedTuple):
    """The results for one pair of jumpstart coefficients, over the replicates that have completed every stage.

    Attributes:
      audit: audit of the recalls; the control, which is not pruned, is ratio 1 of every score.
      dense: predictions of the dense networks, (replicates, examples).
      trained: a row for each dense network: accuracy, best epoch, fraction of dead units.
      pruned: predictions of the pruned networks by score and ratio, (replicates, examples) each.
      alphas: a row for each score, ratio and replicate: alpha, its references, weights kept, compression, and
        the fractions of hidden units that are dead and that are linear.
      stopped: a row for each stage and replicate whose training stopped, with the reason.
    """

    audit: Audit
    dense: np.ndarray
    trained: pd.DataFrame
    pruned: dict[str, dict[float, np.ndarray]]
    alphas: pd.DataFrame
    stopped: pd.DataFrame


def gather(folder: Path, study: Study, truth: Truth, penalty: Coefficients) -> Evidence:
    """Audit the stored replicates of a study for one pair of jumpstart coefficients.

    A replicate that stopped in some stage, or lacks a stage that others have, is left out everywhere, so
    that every comparison is between the same dense networks.

    Raises:
      Incomplete: no replicate has completed all stages yet.
      StoreError: a file is corrupt.
    """
    planned = plan.stages(study, results.known(folder, study), penalty)
    tables = [(stage, results.replicates_of(folder, stage)) for stage in planned]
    wanted = [(stage, table[table["replicate"] < study.replicates]) for stage, table in tables]
    stages = [(stage, table) for stage, table in wanted if len(table)]
    healthy = [set(table["replicate"][table["stopped"] < 0]) for _, table in stages]
    common = sorted(set.intersection(*healthy)) if len(stages) > 1 else []
    if not common or stages[0][0].target is not None:
        raise _incomplete(folder, stages, penalty)
    predictions = {}
    for stage, _ in stages:
        stored = results.predictions_of(folder, stage)
        predictions[stage.target] = np.stack([stored[replicate] for replicate in common])
    dense = predictions.pop(None)
    control = {target.ratio: stack for target, stack in predictions.items() if target.score == CONTROL}
    scores = {target.score: {**control} for target in predictions if target.score != CONTROL} or {CONTROL: control}
    for target, stack in predictions.items():
        if target.score != CONTROL:
            scores[target.score][target.ratio] = stack
    audit = jprune.recall.audit(truth.labels, dense, scores, class_names=truth.class_names)
    stopped = pd.concat([_stopped(stage, table) for stage, table in stages], ignore_index=True)
    rows = stages[0][1]
    accuracy = audit.dense.groupby("model")["accuracy"].first().to_numpy()
    trained = rows[rows["replicate"].isin(common)].sort_values("replicate").assign(accuracy=accuracy)
    return Evidence(audit, dense, trained, scores, _alphas(audit, stages, common), stopped)


def _incomplete(folder: Path, stages: list[tuple[StudyStage, pd.DataFrame]], penalty: Coefficients) -> Incomplete:
    """Return the error if no replicate is complete, with the reason and what to do."""
    stopped = pd.concat([_stopped(stage, table) for stage, table in stages]) if stages else ()
    advice = "the action 'status' lists the completed stages, and 'run' computes the others"
    if len(stopped):
        first = stopped.iloc[0]
        advice = (
            f"{len(stopped)} trainings stopped, the first in {first['stage']}, replicate {first['replicate']}: "
            f"{first['reason']}; try a lower learning rate"
        )
    return Incomplete(
        f"{plan.root(folder)} has no replicate that has completed every stage with jumpstart {penalty}; {advice}"
    )


def summary(found: Evidence) -> pd.DataFrame:
    """Return the audit's summary, a row per score and ratio, with the weights kept and the compression achieved."""
    achieved = found.alphas.groupby(["score", "ratio"], sort=False)[["kept", "achieved_ratio"]].mean()
    return found.audit.summary.merge(achieved.reset_index(), on=["score", "ratio"])


def counts(found: Evidence) -> pd.DataFrame:
    """Return a row per score, ratio, replicate and class: test examples of the class, and how many are correct."""
    audit = found.audit
    support = audit.classes.drop_duplicates("class").set_index("class")["support"]
    replicates = found.alphas.drop_duplicates("model").set_index("model")["replicate"]
    table = audit.recalls[["score", "ratio", "class"]].assign(
        replicate=audit.recalls["model"].map(replicates), support=audit.recalls["class"].map(support)
    )
    correct = {"correct_dense": audit.recalls["recall_dense"], "correct": audit.recalls["recall"]}
    return table.assign(
        **{name: (recall * table["support"]).round().fillna(0).astype(int) for name, recall in correct.items()}
    )


def _alphas(audit: Audit, stages: list[tuple[StudyStage, pd.DataFrame]], common: list[int]) -> pd.DataFrame:
    """Return the audit's alphas with the replicate, the weights kept and the compression achieved."""
    sizes = []
    for stage, table in stages:
        if stage.target is not None:
            rows = table[table["replicate"].isin(common)]
            after = rows["parameters"] - rows["prunable"] + rows["nonzero"]
            columns = {"replicate": rows["replicate"], "kept": rows["nonzero"]}
            columns |= {name: rows[name] for name in ("dead_units", "linear_units") if name in rows}
            frame = pd.DataFrame({**columns, "achieved_ratio": rows["parameters"] / after, "ratio": stage.target.ratio})
            shared = audit.scores if stage.target.score == CONTROL else [stage.target.score]
            sizes += [frame.assign(score=score) for score in shared]
    alphas = audit.alphas.assign(replicate=np.array(common)[audit.alphas["model"]])
    return alphas.merge(pd.concat(sizes), on=["score", "ratio", "replicate"], how="left")


def _stopped(stage: StudyStage, table: pd.DataFrame) -> pd.DataFrame:
    """Return the replicates of a stage that stopped, with the reason."""
    rows = table[table["stopped"] >= 0]
    reasons = [f"the loss was not finite at step {step}" for step in rows["stopped"]]
    return pd.DataFrame({"stage": stage.title, "replicate": rows["replicate"].to_numpy(), "reason": reasons})
