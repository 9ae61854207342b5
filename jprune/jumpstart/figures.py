"""Figures of the status of units and points, made without pyplot, so they need not be closed."""

from typing import TYPE_CHECKING

import numpy as np

from jprune._extras import missing
from jprune.jumpstart import layers, units

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Dead, linear, nonlinear: dark to light, so that they differ in grayscale and for color-blind readers.
_COLORS = ("#222255", "#cc6677", "#eeddaa")
_NAMES = ("dead", "linear", "nonlinear")
_STATUSES = (units.DEAD, units.LINEAR, units.NONLINEAR)


def unit_map(unit_statuses: layers.Statuses, title: str = "Units") -> "Figure":
    """Draw the status of every unit: one column per layer, in call order, and one row per unit.

    Args:
      unit_statuses: int8 (units,) by layer, as ``unit_status`` returns; layers may differ in width,
        and the missing cells of narrower layers are blank.
      title: the title.

    Returns:
      A ``matplotlib.figure.Figure``; save it with ``figure.savefig(path)``.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: the statuses are a plain dict of several layers, whose order is lost under jit.

    >>> unit_map([np.array([-1, 0, 1], np.int8), np.array([1], np.int8)]).axes[0].get_xlabel()
    'layer'
    """
    layers.refuse_unordered(unit_statuses, "unit_statuses")
    return _status_map(unit_statuses, title, "unit")


def point_map(point_statuses: layers.Statuses, title: str = "Points") -> "Figure":
    """Draw the status of every point in every layer: one column per layer, in call order, and one row per point.

    Points are sorted by the first layer in which they are dead, then by the number of layers in which they are linear.

    Args:
      point_statuses: int8 (points,) by layer, as ``point_status`` returns.
      title: the title.

    Returns:
      A ``matplotlib.figure.Figure``.

    Raises:
      ImportError: matplotlib is not installed.
      TypeError: the statuses are a plain dict of several layers, whose order is lost under jit.
      ValueError: the layers have different numbers of points.

    >>> point_map([np.array([-1, 0, 1], np.int8)]).axes[0].get_ylabel()
    'point'
    """
    table = np.asarray(units.point_table(point_statuses))
    dead, linear = table == units.DEAD, table == units.LINEAR
    first_dead = np.where(dead.any(axis=0), dead.argmax(axis=0), len(table))
    order = np.lexsort((linear.sum(axis=0), first_dead))
    names = [name for name, _ in layers.unstack(point_statuses)]
    return _status_map(dict(zip(names, table[:, order], strict=True)), title, "point")


def _status_map(statuses: layers.Statuses, title: str, row: str) -> "Figure":
    columns = [(name, np.asarray(status)) for name, status in layers.unstack(statuses)]
    height = max(len(status) for _, status in columns)
    table = np.full((height, len(columns)), np.nan)
    for column, (_, status) in enumerate(columns):
        table[: len(status), column] = status
    figure = _figure(min(max(2 + 0.25 * len(columns), 5), 14), min(1.5 + 0.08 * height, 8))
    axes = figure.add_subplot()
    _draw_statuses(axes, table)
    axes.set(xlabel="layer", ylabel=row)
    axes.set_title(title, loc="left", fontsize=10)  # a centered title would not fit the figure of a shallow network
    step = max(1, len(columns) // 12)
    axes.set_xticks(range(0, len(columns), step), [name for name, _ in columns[::step]], rotation=90, fontsize=7)
    return figure


def _draw_statuses(axes: "Axes", table: np.ndarray) -> None:
    from matplotlib.colors import BoundaryNorm, ListedColormap  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    norm = BoundaryNorm([-1.5, -0.5, 0.5, 1.5], 3)
    axes.imshow(table, cmap=ListedColormap(_COLORS), norm=norm, aspect="auto", interpolation="nearest")
    shares = [np.nanmean(np.where(np.isnan(table), np.nan, table == status)) for status in _STATUSES]
    handles = [
        Patch(facecolor=color, label=f"{name} {share:.0%}")
        for color, name, share in zip(_COLORS, _NAMES, shares, strict=True)
    ]
    axes.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)


def _figure(width: float, height: float) -> "Figure":
    """Make a figure without pyplot, so that it is not registered and need not be closed."""
    try:
        from matplotlib.figure import Figure  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(missing("figures need matplotlib", "report")) from error
    return Figure(figsize=(width, height), layout="constrained")
