"""Tables, figures and words of a recall-distortion study, from its store alone."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import rich.box
import rich.table
from rich.console import Console

import jprune
from experiments import files, plan, results
from experiments.files import StoreError
from experiments.plan import CONTROL, Planned
from experiments.presets import Study
from experiments.results import Truth
from jprune.recall.headline import headline

Audit = Any  # jprune.recall.Audit


class Evidence(NamedTuple):
    """What a study has for one jumpstart coefficient, over the replicates that went through every stage.

    Attributes:
      audit: of the recalls; the control, not pruned, is ratio 1 of every score.
      dense: predictions of the dense networks, (replicates, examples).
      trained: a row for each dense replicate, as its stage summed it up.
      pruned: the same by score and ratio.
      alphas: a row for each score, ratio and replicate: alpha, its controls, weights kept, compression.
      stopped: a row for each stage and replicate whose training stopped, with the reason.
    """

    audit: Audit
    dense: np.ndarray
    trained: pd.DataFrame
    pruned: dict[str, dict[float, np.ndarray]]
    alphas: pd.DataFrame
    stopped: pd.DataFrame


def write(study: Study, console: Console) -> None:
    """Write tables, figure and page into the study's folder, and tell what was found.

    Args:
      study: its settings.
      console: where to print the table and, in the last lines, the findings.

    Raises:
      StoreError: for some coefficient no replicate went through all stages yet, or a file is corrupt.
    """
    held = results.truth(study)
    found = {float(jumpstart): evidence(study, held, float(jumpstart)) for jumpstart in study.jumpstart}
    folder = study.folder
    across = _across(found)
    tables = {
        "summary": _with_coefficient({c: summary(of) for c, of in found.items()}),
        "alphas": _with_coefficient({c: one.alphas for c, one in found.items()}),
        "counts": _with_coefficient({c: counts(one) for c, one in found.items()}),
        "classes": _with_coefficient({c: one.audit.classes for c, one in found.items()}),
        "tests": pd.concat([_with_coefficient({c: one.audit.tests for c, one in found.items()}), across]),
        "stopped": pd.concat([one.stopped for one in found.values()]),
    }
    for name, table in tables.items():
        files.write_bytes(folder / f"{name}.csv", table.to_csv(index=False).encode())
    for name, figure in _figures(found).items():
        files.write_figure(folder / f"{name}.png", figure)
    page = folder / "report.html"
    title = f"Recall distortion: {study.model} on {study.dataset}"
    _together(held, found).to_html(page, images=results.images(study), title=title)
    console.print(_printed(tables["summary"], study))
    for line in words(study, found, across):
        console.print(line, highlight=False, markup=False)
    console.print(f"The report is {page}", highlight=False, markup=False, soft_wrap=True)


def evidence(study: Study, held: Truth, jumpstart: float) -> Evidence:
    """Audit what is stored for a coefficient of the jumpstart penalty.

    A replicate that stopped in some stage, or lacks one that others have, is left out everywhere, so
    that every comparison is between the same dense checkpoints.

    Raises:
      StoreError: no replicate went through all stages yet, or a file is corrupt.
    """
    stages = [
        (stage, table)
        for stage in plan.stages(study, held.fingerprint, jumpstart)
        if len(table := results.replicates_of(study, stage))
    ]
    healthy = [set(table["replicate"][table["stopped"] < 0]) for _, table in stages]
    common = sorted(set.intersection(*healthy)) if len(stages) > 1 else []
    if not common or stages[0][0].cell is not None:
        raise StoreError(
            f"{plan.root(study)} has no replicate that went through every stage with jumpstart {jumpstart:g}; "
            f"the action 'status' says what is done, and 'run' does the rest"
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
    trained = stages[0][1]
    trained = trained[trained["replicate"].isin(common)]
    return Evidence(audit, dense, trained, scores, _alphas(audit, stages, common), stopped)


def summary(found: Evidence) -> pd.DataFrame:
    """A row for each score and ratio: accuracy, compression achieved, alpha with its interval and mark, alpha_null."""
    achieved = found.alphas.groupby(["score", "ratio"], sort=False)[["kept", "achieved_ratio"]].mean()
    columns = ["accuracy", "accuracy_change", "alpha", "alpha_low", "alpha_high", "alpha_mark", "alpha_null"]
    table = found.audit.summary[["score", "ratio", "models", *columns, "alpha_over_null"]]
    return table.merge(achieved.reset_index(), on=["score", "ratio"])


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


def words(study: Study, found: Mapping[float, Evidence], across: pd.DataFrame) -> list[str]:
    """Say in plain words what was measured, what was found, and what the evidence leaves open.

    Args:
      study: its settings.
      found: by coefficient.
      across: tests of alpha between coefficients.
    """
    lines = []
    for jumpstart, one in found.items():
        audit, trained = one.audit, one.trained
        accuracy = audit.dense.groupby("model")["accuracy"].first()
        spread = f" (standard deviation {accuracy.std():.4f})" if len(accuracy) > 1 else ""
        lines.append(
            f"Jumpstart {jumpstart:g}: {len(accuracy)} of {study.replicates} networks ({study.model}) on "
            f"{study.dataset}, {audit.examples} test examples; dense accuracy {accuracy.mean():.4f}{spread}, "
            f"{100 * trained['dead_units'].mean():.1f} % of the hidden units dead. {_evidence_told(audit)} "
            f"{headline(audit)}"
        )
        if len(one.stopped):
            lines.append(f"{len(one.stopped)} trainings stopped; stopped.csv says which and why.")
    return lines + ([_jumpstart_told(across)] if len(across) else [])


def _alphas(audit: Audit, stages: list[tuple[Planned, pd.DataFrame]], common: list[int]) -> pd.DataFrame:
    """The audit's alphas with the replicate, the weights kept and the compression achieved."""
    sizes = []
    for stage, table in stages:
        if stage.cell is not None:
            rows = table[table["replicate"].isin(common)]
            after = rows["parameters"] - rows["prunable"] + rows["nonzero"]
            columns = {"replicate": rows["replicate"], "kept": rows["nonzero"]}
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


def _evidence_told(audit: Audit) -> str:
    """Say for how many scores and ratios the replicates tell alpha from 1."""
    rows = audit.summary[audit.summary["ratio"] != 1]
    signs = {"above": rows[rows["alpha_mark"] == ">"], "below": rows[rows["alpha_mark"] == "<"]}
    named = [
        f"{sign} 1 for {', '.join(f'{s} at {r:g}' for s, r in zip(told['score'], told['ratio'], strict=True))}"
        for sign, told in signs.items()
        if len(told)
    ]
    clear = sum(map(len, signs.values()))
    if not clear:
        return f"Too little evidence: for none of {len(rows)} prunings does the 99 % interval of alpha exclude 1."
    rest = "" if clear == len(rows) else f" The evidence leaves the other {len(rows) - clear} open."
    return f"The 99 % interval of alpha lies {'; '.join(named)} ({clear} of {len(rows)} prunings).{rest}"


def _jumpstart_told(across: pd.DataFrame) -> str:
    """Say whether the penalty in dense training changes alpha."""
    told = [
        f"{row['score']} at {row['ratio']:g} ({row['audit']}: alpha {abs(row['difference']):.2f} "
        f"{'higher' if row['difference'] > 0 else 'lower'} than {row['other_audit']})"
        for _, row in across[across["p_bonferroni"] < 0.01].iterrows()
    ]
    test = f"{len(across)} comparisons of alpha between coefficients (Welch's t, Bonferroni over the ratios, p < .01)"
    if not told:
        return (
            f"Does the jumpstart penalty change alpha? None of {test} shows it, which does not prove that it does not."
        )
    return f"Does the jumpstart penalty change alpha? {len(told)} of {test} show it: {'; '.join(told)}."


def _across(found: Mapping[float, Evidence]) -> pd.DataFrame:
    """Test whether alpha differs between coefficients: Welch's t, two-sided."""
    audits = {f"jumpstart {jumpstart:g}": one.audit for jumpstart, one in found.items()}
    tests = jprune.recall.compare(audits, alternative="two-sided") if len(audits) > 1 else pd.DataFrame()
    return tests[tests["ratio"] != 1] if len(tests) else tests


def _together(held: Truth, found: Mapping[float, Evidence]) -> Audit:
    """One audit of all coefficients, each score under a name with its coefficient."""
    if len(found) == 1:
        return next(iter(found.values())).audit
    name = lambda score, jumpstart: f"{score}, jumpstart {jumpstart:g}"
    return jprune.recall.audit(
        held.labels,
        {name(score, c): one.dense for c, one in found.items() for score in one.pruned},
        {name(score, c): ratios for c, one in found.items() for score, ratios in one.pruned.items()},
        class_names=held.class_names,
    )


def _figures(found: Mapping[float, Evidence]) -> dict[str, Any]:
    """Box plots of alpha, a panel for each coefficient."""
    from jprune.recall import figures  # noqa: PLC0415 matplotlib is slow to load

    panels = {f"jumpstart {jumpstart:g}": one.audit for jumpstart, one in found.items()}
    return {"alpha": figures.alpha_boxes(panels)}


def _with_coefficient(tables: Mapping[float, pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([table.assign(jumpstart=c)[["jumpstart", *table.columns]] for c, table in tables.items()])


def _printed(table: pd.DataFrame, study: Study) -> rich.table.Table:
    """The summary for a terminal."""
    shown = rich.table.Table(box=rich.box.SIMPLE, title=f"{study.model} on {study.dataset}")
    headings = ("jumpstart", "score", "t", "achieved", "accuracy", "alpha", "99 % interval", "", "alpha_null")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "score" else "right")
    for _, row in table.iterrows():
        interval = f"{row['alpha_low']:.2f} to {row['alpha_high']:.2f}"
        numbers = f"{row['alpha']:.2f}", interval, row["alpha_mark"], f"{row['alpha_null']:.2f}"
        achieved, accuracy = f"{row['achieved_ratio']:.2f}", f"{row['accuracy']:.4f}"
        shown.add_row(f"{row['jumpstart']:g}", row["score"], f"{row['ratio']:g}", achieved, accuracy, *numbers)
    return shown
