"""Tables, figures and findings of a recall-distortion study, from its stored results."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import rich.box
import rich.table
from rich.console import Console

import jprune
from experiments.recall_distortion import evidence, plan, results
from experiments.recall_distortion.config import Study
from experiments.recall_distortion.evidence import Evidence
from experiments.recall_distortion.plan import Coefficients
from experiments.recall_distortion.results import Truth
from experiments.storage import files
from experiments.storage.files import StoreError
from jprune.recall import Audit
from jprune.recall.report import figures
from jprune.recall.report.headline import headline
from jprune.recall.report.words import estimate, number


def write(folder: Path, study: Study, console: Console, compare: Sequence[Path] = ()) -> dict[Coefficients, Evidence]:
    """Write tables, figures and the HTML page into the study's folder, and print the findings.

    Args:
      folder: folder of the study.
      study: its settings; coefficients for which no replicate has completed every stage are left out.
      console: console for the table and, in the last lines, the findings.
      compare: folders of other studies to compare with.

    Returns:
      The evidence by coefficients.

    Raises:
      StoreError: no replicate has completed every stage yet, or a file is corrupt.
    """
    truth, found = _gathered(folder, study)
    across = _across(found)
    each = lambda table: _with_coefficients({penalty: table(one) for penalty, one in found.items()})
    tables = {
        "summary": each(evidence.summary),
        "alphas": each(lambda one: one.alphas),
        "counts": each(evidence.counts),
        "classes": each(lambda one: one.audit.classes),
        "dense": each(lambda one: one.trained),
        "tests": pd.concat([each(lambda one: one.audit.tests), across]),
        "stopped": pd.concat([one.stopped for one in found.values()]),
    }
    panels = {f"jumpstart {penalty}": one.audit for penalty, one in found.items()}
    pictures = {"alpha": figures.alpha_boxes(panels)}
    for panel, audit in panels.items():
        place = f"figures/{panel.replace(', ', '-').replace(' ', '-')}"
        pictures |= {f"{place}/{name}": picture for name, picture in audit.figures().items() if name != "boxes"}
    others = _other_audits(compare)
    if others:
        audits = {f"{study.model} on {study.dataset}": next(iter(found.values())).audit, **others}
        tables["comparison"] = jprune.recall.compare(audits)
        pictures["comparison"] = figures.alpha_boxes(audits)
    ours = {f"{study.model} on {study.dataset}, {name}": audit for name, audit in panels.items()}
    tables["accuracy"] = _dense_accuracy(ours | others)
    for name, table in tables.items():
        files.write_bytes(folder / f"{name}.csv", table.to_csv(index=False).encode())
    for name, picture in pictures.items():
        files.write_figure(folder / f"{name}.png", picture)
    if not others:
        for name in ("comparison.csv", "comparison.png"):  # of an earlier report
            (folder / name).unlink(missing_ok=True)
    page = folder / "report.html"
    title = f"Recall distortion: {study.model} on {study.dataset}"
    with files.naming(page):
        _together(truth, found).to_html(page, images=_shown(results.images(folder, study)), title=title)
    console.print(_printed(tables["summary"], study))
    for line in findings(study, found, across):
        console.print(line, highlight=False, markup=False)
    console.print(f"The report is {page}", highlight=False, markup=False, soft_wrap=True)
    return found


def findings(study: Study, found: Mapping[Coefficients, Evidence], across: pd.DataFrame) -> list[str]:
    """Describe the measurements, the findings and what remains open, in sentences.

    Args:
      study: its settings.
      found: by coefficients.
      across: tests of alpha between coefficients.
    """
    lines = []
    for penalty, one in found.items():
        audit, trained = one.audit, one.trained
        accuracy = trained["accuracy"]
        spread = f" (standard deviation {accuracy.std():.4f})" if len(accuracy) > 1 else ""
        dead = trained["dead_units"].mean()
        units = "" if np.isnan(dead) else f", {100 * dead:.1f}% of the hidden units dead"
        lines.append(
            f"Jumpstart {penalty}: {len(accuracy)} of {study.replicates} networks ({study.model}) on "
            f"{study.dataset}, {audit.examples} test examples; dense accuracy {accuracy.mean():.4f}{spread}{units}. "
            f"{' '.join(filter(None, [_alpha_sentence(audit), headline(audit)]))}"
        )
        if len(one.stopped):
            lines.append(f"{len(one.stopped)} trainings stopped; stopped.csv lists them with the reason.")
    return lines + ([_jumpstart_sentence(across)] if len(across) else [])


def _alpha_sentence(audit: Audit) -> str:
    """Name the scores and ratios at which the interval of alpha excludes 1, in a sentence."""
    rows = audit.summary[(audit.summary["ratio"] != 1) & (audit.summary["alpha_mark"] != "")]
    if not len(rows):  # only the control, or no interval
        return ""
    signs = {"above": rows[rows["alpha_mark"] == ">"], "below": rows[rows["alpha_mark"] == "<"]}
    named = [
        f"{sign} 1 for {', '.join(f'{s} at {r:g}' for s, r in zip(those['score'], those['ratio'], strict=True))}"
        for sign, those in signs.items()
        if len(those)
    ]
    clear = sum(map(len, signs.values()))
    if not clear:
        which = "The 99% interval" if len(rows) == 1 else f"Each of the {len(rows)} 99% intervals"
        return f"{which} of alpha contains 1."
    rest = "" if clear == len(rows) else f" The other {len(rows) - clear} intervals contain 1."
    return f"The 99% interval of alpha lies {'; '.join(named)} ({clear} of {_count(len(rows), 'interval')}).{rest}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _jumpstart_sentence(across: pd.DataFrame) -> str:
    """Describe the comparisons of alpha between coefficients of the penalty, in a sentence."""
    significant = [
        f"{row['score']} at {row['ratio']:g} ({row['audit']}: alpha {abs(row['difference']):.2f} "
        f"{'higher' if row['difference'] > 0 else 'lower'} than {row['other_audit']})"
        for _, row in across[across["p_bonferroni"] < 0.01].iterrows()
    ]
    tests = f"{_count(len(across), 'comparison')} of alpha between coefficients"
    level = "Welch's t, Bonferroni over the ratios, p < .01"
    if not significant:
        return (
            f"Does the jumpstart penalty change alpha? No significant difference in {tests} ({level}); this does not "
            "show equality."
        )
    return (
        f"Does the jumpstart penalty change alpha? Significant differences in {len(significant)} of {tests} ({level}): "
        f"{'; '.join(significant)}."
    )


def _across(found: Mapping[Coefficients, Evidence]) -> pd.DataFrame:
    """Test whether alpha differs between coefficients: Welch's t, two-sided."""
    audits = {f"jumpstart {penalty}": one.audit for penalty, one in found.items()}
    tests = jprune.recall.compare(audits, alternative="two-sided") if len(audits) > 1 else pd.DataFrame()
    return tests[tests["ratio"] != 1] if len(tests) else tests


def _shown(images: np.ndarray | None) -> np.ndarray | None:
    """Convert images to a dtype whose range the page detects: for uint8 it assumes 0 to 255, but digits are 0 to 16."""
    return None if images is None else images.astype(np.int16) if images.dtype == np.uint8 else images


def _together(truth: Truth, found: Mapping[Coefficients, Evidence]) -> Audit:
    """Return one audit of all coefficients; the name of each score includes its coefficients."""
    if len(found) == 1:
        return next(iter(found.values())).audit
    name = lambda score, penalty: f"{score} (jumpstart {penalty})"
    return jprune.recall.audit(
        truth.labels,
        {name(score, c): one.dense for c, one in found.items() for score in one.pruned},
        {name(score, c): ratios for c, one in found.items() for score, ratios in one.pruned.items()},
        class_names=truth.class_names,
    )


def _gathered(folder: Path, study: Study) -> tuple[Truth, dict[Coefficients, Evidence]]:
    """Return the evidence of a study by coefficients; raise only if no coefficients have evidence."""
    truth, found, refused = results.truth(folder, study), {}, []
    for penalty in plan.coefficients(study):
        try:
            found[penalty] = evidence.gather(folder, study, truth, penalty)
        except evidence.Incomplete as error:
            refused.append(error)
    if not found:
        raise refused[0]
    return truth, found


def check_compared(folders: Sequence[Path]) -> None:
    """Raise if no study was run in one of the folders to compare with.

    Raises:
      StoreError: the message names the folder.
    """
    for folder in folders:
        if results.recorded(folder) is None:
            raise StoreError(f"compare: no study was run in {folder}, which has no config.json; use another folder")


def _other_audits(folders: Sequence[Path]) -> dict[str, Audit]:
    """Return the audits of other studies, at the first coefficients of each, as a dict from name to audit."""
    check_compared(folders)
    audits = {}
    for folder in folders:
        other, _ = results.recorded(folder)
        name = f"{other.model} on {other.dataset}, {folder.name}"
        if name in audits:
            raise ValueError(f"compare={tuple(folders)}: two studies are both called {name!r}; rename a folder")
        _, gathered = _gathered(folder, other)
        audits[name] = next(iter(gathered.values())).audit
    return audits


def _dense_accuracy(audits: Mapping[str, Audit]) -> pd.DataFrame:
    """Return a row per audit: its number of dense networks, and the mean and spread of their accuracy."""
    accuracies = {name: audit.dense.drop_duplicates("model")["accuracy"] for name, audit in audits.items()}
    columns = {"networks": "count", "mean": "mean", "standard_deviation": "std", "lowest": "min", "highest": "max"}
    return pd.DataFrame(
        [{"audit": name, **{c: values.agg(how) for c, how in columns.items()}} for name, values in accuracies.items()]
    )


def _with_coefficients(tables: Mapping[Coefficients, pd.DataFrame]) -> pd.DataFrame:
    """Join tables with a column ``jumpstart``, and ``finetune_jumpstart`` if any of these is not 0."""
    second = any(penalty.finetune for penalty in tables)
    parts = []
    for penalty, table in tables.items():
        columns = {"jumpstart": penalty.dense} | ({"finetune_jumpstart": penalty.finetune} if second else {})
        parts.append(table.assign(**columns)[[*columns, *table.columns]])
    return pd.concat(parts)


def _printed(table: pd.DataFrame, study: Study) -> rich.table.Table:
    """Format the summary for a terminal."""
    caption = "t: compression ratio. ?: the interval of alpha contains 1; <: it is below 1; >: above 1."
    shown = rich.table.Table(box=rich.box.SIMPLE, title=f"{study.model} on {study.dataset}", caption=caption)
    second = ("fine-tuning",) if "finetune_jumpstart" in table else ()
    headings = ("jumpstart", *second, "score", "t", "achieved", "accuracy", "alpha", "99% interval", "", "alpha_null")
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == "score" else "right")
    for _, row in table.iterrows():
        alpha, *ends = estimate(dict(row), "alpha")
        numbers = alpha, " to ".join(ends) or "n/a", row["alpha_mark"], number(row["alpha_null"])
        achieved, accuracy = f"{row['achieved_ratio']:.2f}", f"{row['accuracy']:.4f}"
        penalties = [f"{row[name]:g}" for name in ("jumpstart", "finetune_jumpstart") if name in row]
        shown.add_row(*penalties, row["score"], f"{row['ratio']:g}", achieved, accuracy, *numbers)
    return shown
