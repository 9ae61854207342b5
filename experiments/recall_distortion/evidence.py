"""What the store of a study shows: audits over the replicates that went through every stage."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

import jprune
from experiments.recall_distortion import plan
from experiments.recall_distortion.plan import CONTROL, Planned
from experiments.recall_distortion.presets import Study
from experiments.storage import results
from experiments.storage.files import StoreError
from experiments.storage.results import Truth

Audit = Any  # jprune.recall.Audit


class Incomplete(StoreError):
    """No replicate of a study has gone through every stage yet."""


class Evidence(NamedTuple):
    """What a study has for one jumpstart coefficient, over the replicates that went through every stage.

    Attributes:
      audit: of the recalls; the control, not pruned, is ratio 1 of every score.
      dense: predictions of the dense networks, (replicates, examples).
      trained: a row for each dense replicate: accuracy, epoch, units that are dead.
      pruned: predictions of the pruned networks likewise, by score and ratio.
      alphas: a row for each score, ratio and replicate: alpha, its controls, weights kept, compression, and
        the shares of hidden units that are dead, and that are linear.
      stopped: a row for each stage and replicate whose training stopped, with the reason.
    """

    audit: Audit
    dense: np.ndarray
    trained: pd.DataFrame
    pruned: dict[str, dict[float, np.ndarray]]
    alphas: pd.DataFrame
    stopped: pd.DataFrame


def gather(study: Study, held: Truth, jumpstart: float) -> Evidence:
    """Audit what is stored of the study's replicates for a coefficient of the jumpstart penalty.

    A replicate that stopped in some stage, or lacks one that others have, is left out everywhere, so
    that every comparison is between the same dense checkpoints.

    Raises:
      Incomplete: no replicate went through all stages yet.
      StoreError: a file is corrupt.
    """
    planned = plan.stages(study, held.fingerprint, jumpstart)
    tables = [(stage, results.replicates_of(study, stage)) for stage in planned]
    asked = [(stage, table[table["replicate"] < study.replicates]) for stage, table in tables]
    stages = [(stage, table) for stage, table in asked if len(table)]
    healthy = [set(table["replicate"][table["stopped"] < 0]) for _, table in stages]
    common = sorted(set.intersection(*healthy)) if len(stages) > 1 else []
    if not common or stages[0][0].cell is not None:
        stopped = pd.concat([_stopped(stage, table) for stage, table in stages]) if stages else ()
        told = "the action 'status' says what is done, and 'run' does the rest"
        if len(stopped):
            first = stopped.iloc[0]
            told = (
                f"{len(stopped)} trainings stopped, the first in {first['stage']}, replicate {first['replicate']}: "
                f"{first['reason']}; a lower learning rate may help"
            )
        raise Incomplete(
            f"{plan.root(study)} has no replicate that went through every stage with jumpstart {jumpstart:g}; {told}"
        )
    stacks = {}
    for stage, _ in stages:
        predictions = results.predictions_of(study, stage)
        stacks[stage.cell] = np.stack([predictions[replicate] for replicate in common])
    dense = stacks.pop(None)
    control = {cell.ratio: stack for cell, stack in stacks.items() if cell.score == CONTROL}
    scores = {cell.score: {**control} for cell in stacks if cell.score != CONTROL} or {CONTROL: control}
    for cell, stack in stacks.items():
        if cell.score != CONTROL:
            scores[cell.score][cell.ratio] = stack
    audit = jprune.recall.audit(held.labels, dense, scores, class_names=held.class_names)
    stopped = pd.concat([_stopped(stage, table) for stage, table in stages], ignore_index=True)
    rows = stages[0][1]
    accuracy = audit.dense.groupby("model")["accuracy"].first().to_numpy()
    trained = rows[rows["replicate"].isin(common)].sort_values("replicate").assign(accuracy=accuracy)
    return Evidence(audit, dense, trained, scores, _alphas(audit, stages, common), stopped)


def summary(found: Evidence) -> pd.DataFrame:
    """The audit's summary, a row for each score and ratio, with the weights kept and the compression achieved."""
    achieved = found.alphas.groupby(["score", "ratio"], sort=False)[["kept", "achieved_ratio"]].mean()
    return found.audit.summary.merge(achieved.reset_index(), on=["score", "ratio"])


def counts(found: Evidence) -> pd.DataFrame:
    """A row for each score, ratio, replicate and class: test examples of the class, and how many are right."""
    audit = found.audit
    support = audit.classes.drop_duplicates("class").set_index("class")["support"]
    replicates = found.alphas.drop_duplicates("model").set_index("model")["replicate"]
    table = audit.recalls[["score", "ratio", "class"]].assign(
        replicate=audit.recalls["model"].map(replicates), support=audit.recalls["class"].map(support)
    )
    right = {"correct_dense": audit.recalls["recall_dense"], "correct": audit.recalls["recall"]}
    return table.assign(
        **{name: (recall * table["support"]).round().fillna(0).astype(int) for name, recall in right.items()}
    )


def _alphas(audit: Audit, stages: list[tuple[Planned, pd.DataFrame]], common: list[int]) -> pd.DataFrame:
    """The audit's alphas with the replicate, the weights kept and the compression achieved."""
    sizes = []
    for stage, table in stages:
        if stage.cell is not None:
            rows = table[table["replicate"].isin(common)]
            after = rows["parameters"] - rows["prunable"] + rows["nonzero"]
            columns = {"replicate": rows["replicate"], "kept": rows["nonzero"]}
            columns |= {name: rows[name] for name in ("dead_units", "linear_units") if name in rows}
            frame = pd.DataFrame({**columns, "achieved_ratio": rows["parameters"] / after, "ratio": stage.cell.ratio})
            shared = audit.scores if stage.cell.score == CONTROL else [stage.cell.score]
            sizes += [frame.assign(score=score) for score in shared]
    alphas = audit.alphas.assign(replicate=np.array(common)[audit.alphas["model"]])
    return alphas.merge(pd.concat(sizes), on=["score", "ratio", "replicate"], how="left")


def _stopped(stage: Planned, table: pd.DataFrame) -> pd.DataFrame:
    """Which replicates of a stage stopped, and why."""
    rows = table[table["stopped"] >= 0]
    reasons = [f"the loss was not finite at step {step}" for step in rows["stopped"]]
    return pd.DataFrame({"stage": stage.title, "replicate": rows["replicate"].to_numpy(), "reason": reasons})
