"""What the figures of an audit are made of: empty panels, their axes, colors, markers and legends.

What is drawn on them is in ``jprune.recall.report.figures``.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from jprune._extras import missing
from jprune.recall.tables.frames import UNSTATED, AuditTables

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Keyword: TypeAlias = Any  # the value of a keyword argument of a drawing method of matplotlib
Style: TypeAlias = dict[str, Keyword]

INK, MUTED, RULE, FAINT = "#1c1e21", "#5c6166", "#d5d8dc", "#b9bec4"
SERIES = ("#0072b2", "#d55e00", "#009e73", "#c4649b", "#b07c00", "#3d9bd1", "#7a5cc7", "#6d6d6e")
MOST_INSIDE = 3  # scores whose points are labelled with every ratio
MOST_LINES = 8  # classes with a color
_MARKERS = "osD^vPX*"
_MOST_POINTS = 1_500  # per panel, as vectors; beyond it they are drawn as pixels


def empty(width: float, height: float) -> "Figure":
    """Make an empty figure, with inches for units."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415 (an extra)
    except ImportError as error:
        raise ImportError(missing("figures need matplotlib", "report")) from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="none")


def panel() -> "tuple[Figure, Axes]":
    """Make a figure of one panel, small enough to stay legible on a phone."""
    figure = empty(4.8, 3.6)
    axes = figure.subplots()
    plain(axes)
    return figure, axes


def plain(axes: "Axes") -> None:
    """Take away what a panel does not need: background, frame, vertical lines."""
    axes.set_facecolor("none")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(color=FAINT, labelcolor=MUTED, labelsize=10)
    axes.grid(axis="y", color=RULE, linewidth=0.6)
    axes.set_axisbelow(True)


def ratio_axis(axes: "Axes", audit: AuditTables, dense: bool = False) -> dict[float, int]:
    """Give every ratio an equal place on the x axis: the ratios grow by factors."""
    names = ["dense"] * dense + [ratio_name(ratio) for ratio in audit.ratios]
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.5, len(names) - 0.5)
    axes.set_xlabel("" if audit.named else "compression ratio", color=INK)
    return {ratio: place + dense for place, ratio in enumerate(audit.ratios)}


def ratio_name(ratio: float) -> str:
    """The label of a compression ratio at a point or a tick."""
    return "after" if ratio == UNSTATED else "control" if ratio == 1 else f"{ratio:g}"


def color(index: int) -> str:
    """The color of a series."""
    return SERIES[index % len(SERIES)]


def marker(index: int) -> str:
    """A marker that comes with another color each time round."""
    return _MARKERS[(index + index // len(SERIES)) % len(_MARKERS)]


def line_style(index: int) -> Style:
    """How the line of a series looks."""
    return {"color": color(index), "marker": marker(index), "markersize": 4.5, "linewidth": 1.5}


def dot_style(index: int, count: int) -> Style:
    """How the ``count`` points of a series look in a scatter plot."""
    look = {"color": color(index), "marker": marker(index), "s": 12, "alpha": 0.6}
    return {**look, "linewidths": 0, "rasterized": count > _MOST_POINTS}


def dodge(index: int, count: int, width: float = 0.3) -> float:
    """Horizontal offset from a tick of one of ``count`` series, so that they do not overlap."""
    return width * ((index + 0.5) / count - 0.5)


def legend(axes: "Axes", drawn: Sequence["Artist"], names: Sequence[str], **place: Keyword) -> None:
    """Add a legend below the figure where there is more than one name, so that it covers no point.

    The names are put in afterwards: matplotlib reads a leading underscore as "hide this one".
    """
    if len(names) < 2:
        return
    owner: Axes | Figure = axes
    if not place:
        owner = figure_of(axes)
        width, height = owner.get_size_inches()
        columns = max(1, min(len(names), int(width / (0.55 + 0.075 * max(len(short(name)) for name in names)))))
        owner.set_size_inches(width, height + 0.2 * -(-len(names) // columns))
        place = {"loc": "outside lower center", "ncols": columns}
    made = owner.legend(drawn, [str(index) for index in range(len(names))], fontsize=9.5, frameon=False, **place)
    for text, name in zip(made.get_texts(), names, strict=True):
        text.set(text=short(name), parse_math=False, color=INK)


def figure_of(axes: "Axes") -> "Figure":
    """Return the figure that has these axes; no subfigures are used."""
    return cast("Figure", axes.figure)


def short(name: str, most: int = 28) -> str:
    """Return a name, shortened to fit a legend."""
    return name if len(name) <= most else name[: most - 1] + "…"
