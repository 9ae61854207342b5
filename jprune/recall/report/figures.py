"""Figures of an audit: those of the paper, for any models.

Each function takes an ``Audit`` (``alpha_boxes`` takes several) and returns a new matplotlib ``Figure``; ``figures``
returns all of them by name. No global state is used, no window opens, and the background is transparent. The colors are
those of Okabe and Ito, which color-blind readers can distinguish; markers differ too. Class and score names are drawn
literally, never as math. ``jprune.recall.report.panels`` has the elements of panels.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from jprune.recall.report import panels
from jprune.recall.report.panels import FAINT, INK, MUTED
from jprune.recall.report.words import in_number, number, one_compressed
from jprune.recall.tables.frames import UNSTATED, AuditTables

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D


def figures(audit: AuditTables) -> "dict[str, Figure]":
    """Draw every figure for which the audit has data, by name, in reading order.

    Without an alpha only the recalls and their variance are drawn.

    Raises:
      ImportError: matplotlib is not installed.
    """
    defined = bool(audit.summary["alpha"].notna().any())
    wanted = {
        "alpha": (alpha_by_ratio, defined and not audit.named),
        "recall": (recall_by_class, True),
        "null": (alpha_against_null, defined),
        "tradeoff": (accuracy_tradeoff, defined and not audit.named),
        "variance": (balance_variance, not audit.named),
        "boxes": (_boxes_of_one, not audit.named and bool((audit.summary["alpha_models"] > 2).any())),
        "scatter": (balance_scatter, defined),
    }
    return {name: draw(audit) for name, (draw, shown) in wanted.items() if shown}


def _boxes_of_one(audit: AuditTables) -> "Figure":
    return alpha_boxes({"": audit})


def alpha_by_ratio(audit: AuditTables) -> "Figure":
    """Plot mean alpha with its interval against the compression ratio, one line per score."""
    figure, axes = panels.panel()
    positions = panels.ratio_axis(axes, audit)
    drawn = []
    for index, (_, rows) in enumerate(_scores(audit, audit.summary)):
        x = np.array([positions[ratio] for ratio in rows["ratio"]]) + panels.dodge(index, len(audit.scores))
        drawn.append(_with_interval(axes, x, rows, index))
    _reference(axes)
    axes.set_ylabel("alpha" if one_compressed(audit) else f"alpha, mean and {100 * audit.level:g}% interval", color=INK)
    panels.legend(axes, drawn, audit.scores)
    return figure


def alpha_against_null(audit: AuditTables) -> "Figure":
    """Plot alpha of every model against the alpha that its loss of accuracy alone would cause."""
    figure, axes = panels.panel()
    drawn = [
        axes.scatter(rows["alpha_null"], rows["alpha"], **panels.dot_style(index, len(rows)))
        for index, (_, rows) in enumerate(_scores(audit, _healthy(audit)))
    ]
    values = _healthy(audit)[["alpha_null", "alpha"]].dropna().to_numpy()
    ends = [float(values.min()), float(values.max())] if values.size else [0.0, 1.0]
    axes.plot(ends, ends, color=MUTED, linestyle="--", linewidth=1, zorder=1)
    axes.set_xlabel("alpha_null", color=INK)
    axes.set_ylabel(in_number(audit, "alpha{ of each model|}"), color=INK)
    panels.legend(axes, drawn, audit.scores)
    return figure


def recall_by_class(audit: AuditTables) -> "Figure":
    """Plot the mean recall of each class, dense and at every ratio, one panel per score.

    With more than eight classes, those that lost most at the highest ratio have a color and a name; the others are
    gray.
    """
    scores = audit.scores
    columns, lines = min(len(scores), 2), -(-len(scores) // 2)
    figure = panels.empty(4.8 if columns == 1 else 9.4, 3.6 * lines)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axes in grid.ravel()[len(scores) :]:
        axes.set_axis_off()
    for axes, (score, rows) in zip(grid.ravel(), _scores(audit, audit.classes), strict=False):
        panels.plain(axes)
        ratios = [float(ratio) for ratio in rows["ratio"].unique()]
        steps = [rows["recall"][rows["ratio"] == ratio].to_numpy() for ratio in ratios]
        dense = rows["recall_dense"][rows["ratio"] == ratios[0]].to_numpy()
        lines_of = np.stack([dense, *steps], axis=-1)
        change = rows["change"][rows["ratio"] == ratios[-1]].to_numpy()
        most = np.argsort(change, kind="stable")[: np.isfinite(change).sum()]  # a class without examples is last
        for c in most[panels.MOST_LINES :]:
            axes.plot(lines_of[c], color=FAINT, linewidth=0.8)
        drawn = [
            axes.plot(lines_of[c], **panels.line_style(index))[0] for index, c in enumerate(most[: panels.MOST_LINES])
        ]
        axes.set_xticks(range(len(ratios) + 1), ["dense", *(panels.ratio_name(ratio) for ratio in ratios)])
        axes.set_xlabel("" if audit.named else "compression ratio", color=INK)
        for line in axes.lines:
            line.set_clip_on(False)
        if len(scores) > 1:
            axes.set_title(panels.short(score), fontsize=11, color=INK, parse_math=False)
        names = [audit.class_names[c] for c in most[: panels.MOST_LINES]]
        panels.legend(axes, drawn, names, title="class", loc="center left", bbox_to_anchor=(1, 0.5))
    found = audit.classes[["recall_dense", "recall"]].to_numpy()
    low, high = np.nanmin(found), np.nanmax(found)
    margin = 0.05 * (high - low) or 0.05
    grid[0, 0].set_ylim(max(low - margin, 0.0), min(high + margin, 1.0))  # shared by all panels
    for row in grid:
        row[0].set_ylabel(in_number(audit, "recall{, mean over models|}"), color=INK)
    return figure


def accuracy_tradeoff(audit: AuditTables) -> "Figure":
    """Plot mean alpha against mean accuracy, one line per score, with points in order of the ratio.

    A ratio is written above or below its interval, and omitted where it would overlap another; with more than three
    scores only the highest ratio of each is written.
    """
    figure, axes = panels.panel()
    drawn = [
        _with_interval(axes, 100 * rows["accuracy"].to_numpy(), rows, index)
        for index, (_, rows) in enumerate(_scores(audit, audit.summary))
    ]
    _reference(axes)
    axes.margins(x=0.12, y=0.12)  # space for the labels of the outermost points
    low, high = axes.get_xlim()
    axes.set_xlim(min(high, 100.0), max(low, 0.0))
    labelled = audit.summary
    if len(audit.scores) > panels.MOST_INSIDE:
        labelled = labelled.loc[labelled.groupby("score", sort=False)["ratio"].idxmax()]
    _tell_ratios(axes, labelled)
    axes.set_xlabel("accuracy (%), falling", color=INK)
    axes.set_ylabel(in_number(audit, "alpha{, mean over models|}"), color=INK)
    panels.legend(axes, drawn, audit.scores)
    return figure


def balance_variance(audit: AuditTables) -> "Figure":
    """Plot the variance of the recall balance over classes, mean over models, dense and at every ratio."""
    figure, axes = panels.panel()
    positions = panels.ratio_axis(axes, audit, dense=True)
    drawn = []
    for index, (_, rows) in enumerate(_scores(audit, audit.summary)):
        x = [0, *(positions[ratio] for ratio in rows["ratio"])]
        drawn += axes.plot(
            x, [rows["balance_variance_dense"].iloc[0], *rows["balance_variance"]], **panels.line_style(index)
        )
    axes.set_ylim(bottom=0)
    for line in axes.lines:
        line.set_clip_on(False)
    axes.set_ylabel("variance of recall over classes", color=INK)
    panels.legend(axes, drawn, audit.scores)
    return figure


def alpha_boxes(audits: Mapping[str, AuditTables]) -> "Figure":
    """Draw box plots of alpha over models at every ratio, with one panel per audit and one color per score.

    Args:
      audits: audits (of architectures or data sets) by the name of their panel.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure = panels.empty(max(4.8, 3.6 * len(audits)), 3.6)
    row = figure.subplots(1, len(audits), squeeze=False, sharey=True)[0]
    shared = len({audit.scores for audit in audits.values()}) == 1
    for axes, (name, audit) in zip(row, audits.items(), strict=True):
        panels.plain(axes)
        positions = panels.ratio_axis(axes, audit)
        drawn = [
            _boxes(axes, rows.dropna(subset=["alpha"]), positions, index, len(audit.scores))
            for index, (_, rows) in enumerate(_scores(audit, _healthy(audit)))
        ]
        _reference(axes)
        axes.set_title(name, fontsize=11, color=INK, parse_math=False)
        if not shared:
            panels.legend(axes, drawn, audit.scores, loc="upper center", bbox_to_anchor=(0.5, -0.2))
        elif axes is row[0]:
            panels.legend(axes, drawn, audit.scores)
    row[0].set_ylabel("alpha over models", color=INK)
    return figure


def balance_scatter(audit: AuditTables) -> "Figure":
    """Plot compressed against dense normalized recall balance of every class and every model that is not at chance.

    Ratios are in rows and scores in columns; with one score the ratios fill rows of three. The dashed line means no
    change; the solid line is the pooled slope. Titles have the pooled alpha, r2, the mean accuracy and the mark of mean
    alpha's interval.
    """
    stacks = list(zip(audit.summary["score"], audit.summary["ratio"].astype(float), strict=True))
    if len(audit.scores) == 1:
        places = [divmod(place, 3) for place in range(len(stacks))]
    else:
        places = [(audit.ratios.index(ratio), audit.scores.index(score)) for score, ratio in stacks]
    height, width = (1 + max(place[axis] for place in places) for axis in (0, 1))
    figure = panels.empty(0.8 + 2.7 * width, 0.6 + 2.75 * height)
    grid = figure.subplots(height, width, squeeze=False, sharex=True, sharey="row")
    recalls = audit.recalls.merge(_healthy(audit)[["score", "ratio", "model"]], on=["score", "ratio", "model"])
    limit = 1.08 * max(float(recalls["balance_dense"].abs().fillna(0.0).max()), 1e-3)
    for axes in grid.ravel():
        axes.set_axis_off()
    for (_, numbers), (score, ratio), place in zip(audit.summary.iterrows(), stacks, places, strict=True):
        axes = grid[place]
        axes.set_axis_on()
        panels.plain(axes)
        axes.tick_params(labelbottom=True, labelleft=(place[0], place[1] - 1) not in places)
        axes.locator_params(axis="x", nbins=5)
        rows = recalls[(recalls["score"] == score) & (recalls["ratio"] == ratio)]
        axes.plot([-limit, limit], [-limit, limit], color=MUTED, linestyle="--", linewidth=1)
        axes.scatter(rows["balance_dense"], rows["balance"], **panels.dot_style(audit.scores.index(score), len(rows)))
        slope = float(numbers["pooled_alpha"])
        if np.isfinite(slope):
            axes.plot([-limit, limit], [-limit * slope, limit * slope], color=INK, linewidth=1.3)
        axes.set_xlim(-limit, limit)
        alpha = f"alpha {number(slope)} {numbers['alpha_mark']}".strip()
        where = {1.0: "control", UNSTATED: ""}.get(ratio, f"{ratio:g}x")
        named = [panels.short(score)] * (len(audit.scores) > 1 or audit.named)
        title = ", ".join(filter(None, [*named, where])) + f"\n{alpha}"
        title += f", r² {number(numbers['r2'])}, accuracy {numbers['accuracy']:.3f}"
        axes.set_title(title, fontsize=9.5, color=INK, parse_math=False)
    figure.supxlabel("normalized recall balance, dense", color=INK, fontsize=10)
    figure.supylabel("normalized recall balance, after", color=INK, fontsize=10)
    return figure


def _boxes(axes: "Axes", rows: pd.DataFrame, positions: dict[float, int], index: int, count: int) -> "Line2D":
    """Draw the boxes of one score next to those of the others, and return its legend handle."""
    handle = axes.plot([], [], color=panels.color(index), linewidth=2.0)[0]
    ratios = [float(ratio) for ratio in rows["ratio"].unique()]
    if not ratios:  # no model has an alpha
        return handle
    drawn = axes.boxplot(
        [rows["alpha"][rows["ratio"] == ratio].to_numpy() for ratio in ratios],
        positions=[positions[ratio] + panels.dodge(index, count, 0.8) for ratio in ratios],
        widths=0.6 / count,
        manage_ticks=False,
        flierprops={"marker": ".", "markersize": 4, "markeredgecolor": panels.color(index)},
    )
    for part in ("boxes", "whiskers", "caps", "medians"):
        for artist in drawn[part]:
            artist.set(color=panels.color(index), linewidth=2.0 if part == "medians" else 1.2)
    return handle


def _with_interval(axes: "Axes", x: np.ndarray | Sequence[float], rows: pd.DataFrame, index: int) -> "Line2D":
    """Draw mean alphas with their intervals; with one model there is a point without an interval."""
    y = rows["alpha"].to_numpy()
    ends = np.abs(rows[["alpha_low", "alpha_high"]].to_numpy().T - y)
    axes.errorbar(x, y, yerr=np.where(np.isfinite(ends), ends, 0), fmt="none", color=panels.color(index), capsize=3)
    return axes.plot(x, y, **panels.line_style(index))[0]


def _reference(axes: "Axes") -> None:
    axes.axhline(1.0, color=MUTED, linestyle="--", linewidth=1, zorder=1)


def _tell_ratios(axes: "Axes", summary: pd.DataFrame) -> None:
    """Write the ratio of every point above its interval, or below it if that is free, or not at all."""
    letter, line = 5.0, 11.0  # in points, for the font size below
    inches = panels.figure_of(axes).get_size_inches()
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    taken: list[tuple[float, float, float]] = []  # center and width of each label
    for row in summary.to_dict("records"):
        name, x = panels.ratio_name(row["ratio"]), 100 * row["accuracy"]
        width = letter * len(name)
        ends = {5.0: row["alpha_high"], -13.0: row["alpha_low"]}
        if row["ratio"] == 1:  # the control below its interval: its accuracy is often that of the lowest ratio
            ends = dict(reversed(ends.items()))
        for offset, end in ends.items():
            y = end if np.isfinite(end) else row["alpha"]
            if not np.isfinite([x, y]).all():
                continue
            across, up = 72 * inches * ((x - left) / (right - left), (y - bottom) / (top - bottom))
            if all(abs(across - a) > (width + w) / 2 or abs(up + offset - u) > line for a, u, w in taken):
                taken.append((across, up + offset, width))
                look: panels.Style = {"textcoords": "offset points", "ha": "center", "fontsize": 9, "color": MUTED}
                axes.annotate(name, (x, y), (0, offset), **look)
                break


def _healthy(audit: AuditTables) -> pd.DataFrame:
    """The alphas of models that are not at chance, as in the summary."""
    return audit.alphas[~audit.alphas["collapsed"].astype(bool)]


def _scores(audit: AuditTables, frame: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each score; none for one of which all models are at chance, so that the others keep their colors."""
    return [(score, frame[frame["score"] == score]) for score in audit.scores]
