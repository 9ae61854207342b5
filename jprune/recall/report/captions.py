"""The title, caption and alternative text of each figure."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from jprune.recall.report.words import kind, number
from jprune.recall.tables.frames import UNSTATED, AuditTables


class Caption(NamedTuple):
    """Title, caption and alternative text of a figure.

    Attributes:
      title: the title, a few words.
      text: the caption, which says how to read the figure.
      alternative: a description of the contents, with the numbers.
    """

    title: str
    text: str
    alternative: str


def captions(audit: AuditTables) -> dict[str, Caption]:
    """Captions, by name, of all figures that ``jprune.recall.report.figures.figures`` can draw."""
    level, after = f"{100 * audit.level:g}%", kind(audit)
    across = "for each set of models" if audit.named else "against the compression ratio"
    highest = "" if audit.named else " at the highest ratio"
    points = "" if audit.named else " The number at a point is its ratio; with many scores only the highest is shown."
    alphas = _by_score(audit, lambda row: f"{number(row['alpha'])}{_ends(row)} at {_ratio(row)}")
    return {
        "alpha": Caption(
            f"Alpha {across}",
            f"Mean over models with its {level} interval. Above the dashed line differences between classes grew.",
            f"Line chart of mean alpha {across}. {alphas}",
        ),
        "null": Caption(
            "Alpha against alpha_null",
            "One point per model. On the dashed line alpha is what errors that grow in proportion would cause.",
            "Scatter plot of alpha against alpha_null, with the line of equality. Means: "
            + _by_score(
                audit, lambda row: f"{number(row['alpha'])} against {number(row['alpha_null'])} at {_ratio(row)}"
            ),
        ),
        "recall": Caption(
            "Recall of each class",
            f"Mean over models. With more than eight classes, those that lost most{highest} are in colour.",
            f"Line charts of the recall of each class, before and after. {_losses(audit)}",
        ),
        "tradeoff": Caption(
            "Alpha against accuracy",
            f"Compare sets of models at the same accuracy.{points}",
            "Line chart of mean alpha against mean accuracy. "
            + _by_score(
                audit, lambda r: f"accuracy {100 * r['accuracy']:.1f}%, alpha {number(r['alpha'])} at {_ratio(r)}"
            ),
        ),
        "variance": Caption(
            "Variance of recall over the classes",
            "Mean over models. It grows with any loss of accuracy that differs between classes.",
            "Line chart of the variance of recall over classes. "
            + _by_score(audit, lambda row: f"{row['balance_variance']:.5f} at {_ratio(row)}"),
        ),
        "boxes": Caption(
            "Alpha over models",
            "Boxes span the quartiles, the bold line is the median, whiskers reach 1.5 times the box.",
            f"Box plots of alpha over models. {_medians(audit)}",
        ),
        "scatter": Caption(
            f"Recall balance, dense and {after}",
            "One point per class and model. Dashed: no change. Full: the pooled slope, printed as alpha with the mark "
            "of the mean alpha's interval against 1.",
            f"Scatter plots of the {after} models' normalized recall balance against the dense models'. Pooled slopes: "
            + _by_score(audit, lambda row: f"{number(row['pooled_alpha'])} (r² {number(row['r2'])}) at {_ratio(row)}"),
        ),
    }


def _by_score(audit: AuditTables, describe: Callable[[Any], str]) -> str:
    """Describe every row of the summary, score by score."""
    sentences = []
    for score in audit.scores:
        rows = audit.summary[audit.summary["score"] == score]
        sentences.append(f"{score}: {', '.join(describe(row) for _, row in rows.iterrows())}.")
    return " ".join(sentences)


def _losses(audit: AuditTables) -> str:
    """Describe the three largest losses of recall at the highest ratio of each score."""
    sentences = []
    for score in audit.scores:
        rows = audit.classes[(audit.classes["score"] == score) & (audit.classes["support"] > 0)]
        last = rows[rows["ratio"] == rows["ratio"].max()].sort_values("change", kind="stable").head(3)
        lost = (
            f"{row['class']} from {100 * row['recall_dense']:.1f} to {100 * row['recall']:.1f}%"
            for _, row in last.iterrows()
        )
        sentences.append(f"{score}, largest losses: {', '.join(lost)}.")
    return " ".join(sentences)


def _medians(audit: AuditTables) -> str:
    medians = audit.alphas.groupby(["score", "ratio"], sort=False)["alpha"].median().reset_index()
    sentences = []
    for score in audit.scores:
        rows = medians[medians["score"] == score]
        listed = ", ".join(f"{number(row['alpha'])} at {_ratio(row)}" for _, row in rows.iterrows())
        sentences.append(f"{score}, medians: {listed}.")
    return " ".join(sentences)


def _ends(row: Any) -> str:
    return f" ({row['alpha_low']:.2f} to {row['alpha_high']:.2f})" if np.isfinite(row["alpha_low"]) else ""


def _ratio(row: Any) -> str:
    return str(row["score"]) if row["ratio"] == UNSTATED else f"{row['ratio']:g}"
