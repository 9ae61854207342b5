"""An audit on the terminal."""

from pathlib import Path
from typing import Any

import numpy as np

from jprune.recall.report.headline import findings, headline, number
from jprune.recall.tables.frames import AuditTables


def print_summary(audit: AuditTables, report: Path | None = None) -> None:
    """Print the headline, the answers, the table of ratios and the warnings.

    Args:
      audit: what to tell.
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
        raise ImportError("the summary needs rich: pip install 'jprune[report]'") from error
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(Text(headline(audit), style="bold"))
    score = ""
    for finding in findings(audit):
        if finding.score != score and len(audit.scores) > 1:
            console.print(Text(f"\n{finding.score}", style="bold"))
        score = finding.score
        console.print(Text(f"\n{finding.topic}", style="cyan"))
        console.print(Padding(Text(finding.text), (0, 0, 0, 2)))
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for name in _COLUMNS:
        # Where the terminal is narrow, names and intervals go on in a second line, and numbers stay whole.
        table.add_column(
            Text(name),
            justify="left" if name in ("score", "mark") else "right",
            no_wrap=name not in ("score", "interval"),
            overflow="fold",
        )
    for row in audit.summary.to_dict("records"):
        table.add_row(*(Text(cell) for cell in _cells(row)))
    console.print(table)
    for warning in audit.warnings:
        console.print(Text(f"Note: {warning}", style="yellow"))
    if report is not None:
        console.print(Text(f"Report: {report}"))


_COLUMNS = ("score", "ratio", "models", "accuracy", "alpha", "interval", "mark", "null", "alpha/null")


def _cells(row: dict[Any, Any]) -> list[str]:
    """What stands in the columns of the table."""
    interval = f"{row['alpha_low']:.2f} to {row['alpha_high']:.2f}" if np.isfinite(row["alpha_low"]) else "n/a"
    return [
        row["score"],
        f"{row['ratio']:g}",
        str(row["models"]),
        f"{100 * row['accuracy']:.1f} %",
        number(row["alpha"]),
        interval,
        row["alpha_mark"],
        number(row["alpha_null"]),
        number(row["alpha_over_null"]),
    ]
