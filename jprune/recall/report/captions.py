"""The title, caption and alternative text of each figure."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from jprune.recall.report.panels import MOST_INSIDE, MOST_LINES
from jprune.recall.report.words import in_number, kind, number, one_compressed, percent
from jprune.recall.tables.frames import UNSTATED, AuditTables, FrameRow


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
    level, after, one = f"{100 * audit.level:g}%", kind(audit), one_compressed(audit)
    mean = "" if one else "mean "
    across = "for each set of models" if audit.named else "against the compression ratio"
    highest = "" if audit.named else " at the highest ratio"
    many = "; with many scores only the highest is shown" if len(audit.scores) > MOST_INSIDE else ""
    points = "" if audit.named else f" The number at a point is its ratio{many}."
    named = f" The eight that lost most{highest} are in color." if len(audit.class_names) > MOST_LINES else ""
    left_out = " Models at chance are left out." if audit.summary["collapsed"].any() else ""
    alphas = _by_score(audit, lambda row: f"{number(row['alpha'])}{_ends(row)} at {_ratio(row)}")
    return {
        "alpha": Caption(
            f"Alpha {across}",
            ("One model, so there is no interval" if one else f"Mean over models with its {level} interval")
            + f". Above the dashed line differences between classes grew relative to the accuracy.{left_out}",
            f"Line chart of {mean}alpha {across}. {alphas}",
        ),
        "null": Caption(
            "Alpha against alpha_null",
            "One point per model. On the dashed line alpha is what errors that grow in proportion would cause."
            + left_out,
            f"Scatter plot of alpha against alpha_null, with the line of equality.{'' if one else ' Means:'} "
            + _by_score(
                audit, lambda row: f"{number(row['alpha'])} against {number(row['alpha_null'])} at {_ratio(row)}"
            ),
        ),
        "recall": Caption(
            "Recall of each class",
            in_number(audit, "{Mean over models.|Before and after compression.}") + named,
            f"Line charts of the recall of each class, before and after. {_losses(audit)}",
        ),
        "tradeoff": Caption(
            "Alpha against accuracy",
            f"Compare sets of models at the same accuracy.{points}",
            f"Line chart of {mean}alpha against {mean}accuracy. "
            + _by_score(
                audit, lambda r: f"accuracy {percent(r['accuracy'])}, alpha {number(r['alpha'])} at {_ratio(r)}"
            ),
        ),
        "variance": Caption(
            "Variance of recall over the classes",
            in_number(audit, "{Mean over models. |}It grows with any loss of accuracy that differs between classes."),
            "Line chart of the variance of recall over classes. "
            + _by_score(audit, lambda row: f"{row['balance_variance']:.5f} at {_ratio(row)}"),
        ),
        "boxes": Caption(
            "Alpha over models",
            "Boxes span the quartiles, the bold line is the median, and whiskers end at the last model within 1.5 "
            f"times the height of the box.{left_out}",
            f"Box plots of alpha over models. {_medians(audit)}",
        ),
        "scatter": Caption(
            f"Recall balance, dense and {after}",
            in_number(
                audit,
                "One point per class{ and model|}. Dashed: no change. Solid: {the pooled slope, printed as alpha. The "
                "mark after it is that of the interval of mean alpha: < below 1, > above 1, ? includes 1|alpha}.",
            )
            + left_out,
            f"Scatter plots of normalized recall balance, {after} against dense. "
            + in_number(audit, "{Pooled slopes|Slopes}: ")
            + _by_score(audit, lambda row: f"{number(row['pooled_alpha'])} (r² {number(row['r2'])}) at {_ratio(row)}"),
        ),
    }


def _by_score(audit: AuditTables, describe: Callable[[FrameRow], str]) -> str:
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
        last = rows[(rows["ratio"] == rows["ratio"].max()) & (rows["change"] < 0)]
        last = last.sort_values("change", kind="stable").head(3)
        lost = (
            f"{row['class']} from {percent(row['recall_dense'])} to {percent(row['recall'])}"
            for _, row in last.iterrows()
        )
        sentences.append(f"{score}, largest losses: {', '.join(lost) or 'none'}.")
    return " ".join(sentences)


def _medians(audit: AuditTables) -> str:
    medians = (
        audit.alphas[~audit.alphas["collapsed"].astype(bool)]
        .groupby(["score", "ratio"], sort=False)["alpha"]
        .median()
        .reset_index()
    )
    sentences = []
    for score in audit.scores:
        rows = medians[medians["score"] == score]
        listed = ", ".join(f"{number(row['alpha'])} at {_ratio(row)}" for _, row in rows.iterrows())
        sentences.append(f"{score}, medians: {listed}.")
    return " ".join(sentences)


def _ends(row: FrameRow) -> str:
    return f" ({row['alpha_low']:.2f} to {row['alpha_high']:.2f})" if np.isfinite(row["alpha_low"]) else ""


def _ratio(row: FrameRow) -> str:
    return str(row["score"]) if row["ratio"] == UNSTATED else f"{row['ratio']:g}"
