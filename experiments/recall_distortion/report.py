"""Tables, figures and words of a recall-distortion study, from its store alone."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import pandas as pd
import rich.box
import rich.table
from rich.console import Console

import jprune
from experiments.recall_distortion import evidence
from experiments.recall_distortion.evidence import Audit, Evidence
from experiments.recall_distortion.presets import Study
from experiments.storage import files, results
from experiments.storage.files import StoreError
from experiments.storage.results import Truth
from jprune.recall.report import figures
from jprune.recall.report.headline import headline


def write(study: Study, console: Console) -> None:
    """Write tables, figures and page into the study's folder, and tell what was found.

    Args:
      study: its settings; a coefficient of which nothing has gone through every stage is left out.
      console: where to print the table and, in the last lines, the findings.

    Raises:
      StoreError: nothing has gone through every stage yet, or a file is corrupt.
    """
    held, found = _gathered(study)
    across = _across(found)
    each = lambda table: _with_coefficient({jumpstart: table(one) for jumpstart, one in found.items()})
    tables = {
        "summary": each(evidence.summary),
        "alphas": each(lambda one: one.alphas),
        "counts": each(evidence.counts),
        "classes": each(lambda one: one.audit.classes),
        "dense": each(lambda one: one.trained),
        "tests": pd.concat([each(lambda one: one.audit.tests), across]),
        "stopped": pd.concat([one.stopped for one in found.values()]),
    }
    panels = {f"jumpstart {jumpstart:g}": one.audit for jumpstart, one in found.items()}
    pictures = {"alpha": figures.alpha_boxes(panels)}
    for panel, audit in panels.items():
        folder = f"figures/{panel.replace(' ', '-')}"
        pictures |= {f"{folder}/{name}": picture for name, picture in audit.figures().items() if name != "boxes"}
    beside = _beside(study)
    if beside:
        audits = {f"{study.model} on {study.dataset}": next(iter(found.values())).audit, **beside}
        tables["beside"] = jprune.recall.compare(audits)
        pictures["beside"] = figures.alpha_boxes(audits)
    ours = {f"{study.model} on {study.dataset}, {name}": audit for name, audit in panels.items()}
    tables["accuracy"] = _dense_accuracy(ours | beside)
    for name, table in tables.items():
        files.write_bytes(study.folder / f"{name}.csv", table.to_csv(index=False).encode())
    for name, picture in pictures.items():
        files.write_figure(study.folder / f"{name}.png", picture)
    page = study.folder / "report.html"
    title = f"Recall distortion: {study.model} on {study.dataset}"
    with files.naming(page):
        _together(held, found).to_html(page, images=_shown(results.images(study)), title=title)
    console.print(_printed(tables["summary"], study))
    for line in words(study, found, across):
        console.print(line, highlight=False, markup=False)
    console.print(f"The report is {page}", highlight=False, markup=False, soft_wrap=True)


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
        accuracy = trained["accuracy"]
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
        return (
            f"For none of {len(rows)} prunings does the 99 % interval of alpha exclude 1: the evidence is not enough."
        )
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


def _shown(images: np.ndarray | None) -> np.ndarray | None:
    """Images whose range the page finds, where it takes uint8 for 0 to 255: those of digits end at 16."""
    return None if images is None else images.astype(np.int16) if images.dtype == np.uint8 else images


def _together(held: Truth, found: Mapping[float, Evidence]) -> Audit:
    """One audit of all coefficients, each score under a name with its coefficient."""
    if len(found) == 1:
        return next(iter(found.values())).audit
    name = lambda score, jumpstart: f"{score} (jumpstart {jumpstart:g})"
    return jprune.recall.audit(
        held.labels,
        {name(score, c): one.dense for c, one in found.items() for score in one.pruned},
        {name(score, c): ratios for c, one in found.items() for score, ratios in one.pruned.items()},
        class_names=held.class_names,
    )


def _gathered(study: Study) -> tuple[Truth, dict[float, Evidence]]:
    """What a study has, by coefficient; those without evidence are left out unless all are."""
    held, found, refused = results.truth(study), {}, []
    for jumpstart in map(float, study.jumpstart):
        try:
            found[jumpstart] = evidence.gather(study, held, jumpstart)
        except evidence.Incomplete as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return held, found


def _beside(study: Study) -> dict[str, Audit]:
    """The audits of the studies to be set beside this one, at the first coefficient of each, by folder."""
    audits = {}
    for folder in study.beside:
        other = results.recorded(folder)
        if other is None:
            raise StoreError(f"{folder} has no config.json: no study was run there")
        name = f"{other.model} on {other.dataset}, {folder.name}"
        if name in audits:
            raise ValueError(f"beside={study.beside} has two studies that are both called {name!r}; rename a folder")
        _, gathered = _gathered(dataclasses.replace(other, out=folder))
        audits[name] = next(iter(gathered.values())).audit
    return audits


def _dense_accuracy(audits: Mapping[str, Audit]) -> pd.DataFrame:
    """A row for each audit: its dense networks, and the mean and spread of their accuracy."""
    accuracies = {name: audit.dense.drop_duplicates("model")["accuracy"] for name, audit in audits.items()}
    columns = {"networks": "count", "mean": "mean", "standard_deviation": "std", "lowest": "min", "highest": "max"}
    return pd.DataFrame(
        [{"audit": name, **{c: values.agg(how) for c, how in columns.items()}} for name, values in accuracies.items()]
    )


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
