"""An audit on the terminal."""

from pathlib import Path

from jprune._extras import missing
from jprune.recall.report.findings import findings
from jprune.recall.report.headline import ALPHA_MEANS, headline, subject
from jprune.recall.report.verdicts import rows_of
from jprune.recall.report.words import estimate, number, percent, points, ratio_or_name
from jprune.recall.tables.frames import AuditTables, FrameRow

_LEGEND = {
    "alpha": f"how class differences changed: {ALPHA_MEANS}",
    "corrected": "alpha without the noise of the test set, and its interval",
    "seeds": "alpha between two dense training runs",
    "null": "alpha if the errors of every class had grown in proportion",
}
_MOST_CLASSES = 20
_COLUMNS = ("score", "ratio", "models", "accuracy", "corrected", "interval", *(n for n in _LEGEND if n != "corrected"))


def print_summary(audit: AuditTables, report: Path | None = None) -> None:
    """Print the headline, the answers, the tables of classes and of ratios, and the warnings.

    The classes are those of the score and ratio of the headline, if there are few.

    Args:
      audit: what to print.
      report: where the page was written, or None.

    Raises:
      ImportError: rich is not installed.
    """
    try:
        from rich.box import SIMPLE  # noqa: PLC0415 (an extra)
        from rich.console import Console  # noqa: PLC0415
        from rich.padding import Padding  # noqa: PLC0415
        from rich.table import Table  # noqa: PLC0415
        from rich.text import Text  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(missing("the summary needs rich", "report")) from error
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(Text(headline(audit), style="bold"))
    score = ""
    for finding in findings(audit):
        if finding.score != score and len(audit.scores) > 1:
            console.print(Text(f"\n{finding.score}", style="bold"))
        score = finding.score
        console.print(Text(f"\n{finding.topic}", style="cyan"))
        console.print(Padding(Text(finding.text), (0, 0, 0, 2)))
    if 1 < len(audit.class_names) <= _MOST_CLASSES:
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
        header, *lines = _classes(audit)
        for column, name in enumerate(header):
            table.add_column(Text(name), justify="right" if column else "left", overflow="fold")
        for line in lines:
            table.add_row(*map(Text, line))
        console.print(table)
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0), pad_edge=False)
    rows = [_cells(row) for row in audit.summary.to_dict("records")]
    columns = [name for name in _COLUMNS if _shown(name, rows, audit)]
    for name in columns:
        # Long names of scores go on in a second line; numbers stay whole.
        table.add_column(
            Text("name" if audit.named and name == "score" else name),
            justify="left" if name == "score" else "right",
            no_wrap=name != "score",
            overflow="fold",
        )
    for row in rows:
        table.add_row(*(Text(row[name]) for name in columns))
    console.print(table)
    for name in columns:
        if name in _LEGEND:
            console.print(Padding(Text(f"{name}: {_LEGEND[name]}"), (0, 0, 0, 2)))
    for warning in audit.warnings:
        console.print(Text(f"Note: {warning}", style="yellow"))
    if report is not None:
        console.print(Text(f"Report: {report}"))


def _classes(audit: AuditTables) -> list[tuple[str, ...]]:
    """The header and the rows of the table of classes."""
    score, ratio = subject(audit)
    models = ratio_or_name(ratio, score) if audit.named or len(audit.scores) == 1 else f"{score} {ratio_or_name(ratio)}"
    classes = rows_of(audit.classes, {"score": score, "ratio": ratio})
    rows = [
        (
            str(row["class"]),
            f"{row['support']:,}",
            percent(row["recall_dense"]),
            percent(row["recall"]),
            points(row["change"]),
        )
        for row in classes[classes["support"] > 0].to_dict("records")
    ]
    return [("class", "examples", "recall, dense", f"recall, {models}", "change"), *rows]


def _shown(name: str, rows: list[dict[str, str]], audit: AuditTables) -> bool:
    """Whether a column says something: not the ratio of named models, the only score, or n/a throughout."""
    if name == "ratio":
        return not audit.named
    if name == "score":
        return audit.named or audit.scores != ("pruned",)
    return any(row[name] != "n/a" for row in rows)


def _cells(row: FrameRow) -> dict[str, str]:
    """The cells of a row of the table, by column."""
    corrected, *ends = estimate(row, "alpha_corrected")
    return {
        "score": str(row["score"]),
        "ratio": f"{row['ratio']:g}",
        "models": str(row["models"]),
        "accuracy": percent(row["accuracy"]),
        "corrected": corrected,
        "interval": " to ".join(ends) or "n/a",
        "alpha": number(row["alpha"]),
        "seeds": number(row["alpha_seed"]),
        "null": number(row["alpha_null"]),
    }
