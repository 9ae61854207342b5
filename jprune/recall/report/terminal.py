"""An audit on the terminal."""

from pathlib import Path
from typing import Any

import numpy as np

from jprune.recall.report.findings import findings
from jprune.recall.report.headline import headline
from jprune.recall.report.words import number
from jprune.recall.tables.frames import AuditTables


def print_summary(audit: AuditTables, report: Path | None = None) -> None:
    """Print the headline, the answers, the table of ratios and the warnings.

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
    columns = [name for name in _COLUMNS if not (audit.named and name == "ratio")]
    for name in columns:
        # Where the terminal is narrow, names and intervals go on in a second line, and numbers stay whole.
        table.add_column(
            Text("name" if audit.named and name == "score" else name),
            justify="left" if name == "score" else "right",
            no_wrap=name not in ("score", "interval", "corrected alpha"),
            overflow="fold",
        )
    for row in audit.summary.to_dict("records"):
        table.add_row(*(Text(cell) for name, cell in zip(_COLUMNS, _cells(row), strict=True) if name in columns))
    console.print(table)
    for warning in audit.warnings:
        console.print(Text(f"Note: {warning}", style="yellow"))
    if report is not None:
        console.print(Text(f"Report: {report}"))


_COLUMNS = ("score", "ratio", "models", "accuracy", "corrected alpha", "interval", "alpha", "seeds", "null")


def _cells(row: dict[Any, Any]) -> list[str]:
    """The cells of a row of the table."""
    low, high = row["alpha_corrected_low"], row["alpha_corrected_high"]
    interval = f"{low:.2f} to {high:.2f}" if np.isfinite(low) else "n/a"
    return [
        row["score"],
        f"{row['ratio']:g}",
        str(row["models"]),
        f"{100 * row['accuracy']:.1f} %",
        number(row["alpha_corrected"]),
        interval,
        number(row["alpha"]),
        number(row["alpha_seed"]),
        number(row["alpha_null"]),
    ]
