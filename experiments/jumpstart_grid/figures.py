"""Figures of a jumpstart grid, as matplotlib figures without a window."""

from itertools import cycle

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage

from jprune.jumpstart import figures

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def of_grid(dataset: str, cells: pd.DataFrame, theirs: pd.DataFrame | None, floor: float) -> dict[str, Figure]:
    """Draw the figures of a width x depth grid, as a dict from name to figure.

    Args:
      dataset: name for the titles.
      cells: a row for each network, with a column ``label``.
      theirs: the published grid, or None.
      floor: accuracy of a network that did not train, the lower end of the color scale.
    """
    made = {"train": heat_maps(dataset, cells, theirs, "train_acc", floor)}
    made["val"] = heat_maps(dataset, cells, theirs, "val_acc", min(floor, cells["val_acc"].min()))
    if "parameters" in cells:
        made["parameters"] = accuracy_against_parameters(dataset, cells)
    return made


def heat_maps(dataset: str, cells: pd.DataFrame, theirs: pd.DataFrame | None, column: str, low: float) -> Figure:
    """Draw a row per method, our grid next to the published one, with one color scale; no number is rounded to 1."""
    labels = list(dict.fromkeys(cells["label"]))
    widths, depths = sorted(cells["width"].unique()), sorted(cells["depth"].unique())
    columns = 1 if theirs is None else 2
    size = (1.6 + columns * (0.9 + 0.42 * len(widths)), 0.8 + len(labels) * (0.75 + 0.24 * len(depths)))
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(len(labels), columns, squeeze=False)

    def table(of: pd.DataFrame) -> pd.DataFrame:
        return of.pivot_table(index="depth", columns="width", values=column).reindex(index=depths, columns=widths)

    image = None
    for row, name in enumerate(labels):
        mine = cells[cells["label"] == name]
        image = _heat_map(panels[row, 0], table(mine), low, f"{name}: here")
        if theirs is not None:
            same = theirs[theirs["method"] == mine["method"].iloc[0]]
            _heat_map(panels[row, 1], table(same), low, f"{name}: published")
    words = {"train_acc": "training", "val_acc": "validation"}[column]
    bar = figure.colorbar(image, ax=panels, shrink=min(1, 3 / len(labels)))
    bar.set_label(f"{words} accuracy, maximum over epochs", size=8)
    figure.suptitle(f"{dataset}: {words} accuracy by width and depth", fontsize=10)
    return figure


def accuracy_against_parameters(dataset: str, cells: pd.DataFrame) -> Figure:
    """Plot accuracy against number of parameters, one panel per method, with the other methods in gray.

    Accuracies on few examples coincide, so methods in one panel would hide each other.
    """
    methods = dict(list(cells.groupby("label", sort=False)))
    columns = min(3, len(methods))
    rows = -(-len(methods) // columns)
    figure = Figure(figsize=(1 + 2.6 * columns, 0.8 + 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes, colour, (name, mine) in zip(panels, cycle(COLOURS), methods.items(), strict=False):
        axes.scatter(cells["parameters"], cells["val_acc"], s=8, color="#dddddd", edgecolors="none")
        axes.scatter(mine["parameters"], mine["val_acc"], s=14, alpha=0.7, color=colour, edgecolors="none")
        axes.set_xscale("log")
        axes.set_title(name, fontsize=9)
    for axes in panels[len(methods) :]:
        axes.set_visible(False)
    figure.supxlabel("parameters", fontsize=9)
    figure.supylabel("validation accuracy, maximum over epochs", fontsize=9)
    figure.suptitle(f"{dataset}: accuracy against size, the other methods in gray", fontsize=10)
    return figure


def of_statuses(statuses: pd.DataFrame) -> dict[str, Figure]:
    """Draw maps of the units and points of one network per method: the widest of the deepest ones."""
    made = {}
    first = statuses[statuses["replicate"] == statuses["replicate"].min()]
    for (method, layer), mine in first.groupby(["method", "layer"], sort=False):
        row = mine.sort_values(["depth", "width"]).iloc[-1]
        title = f"{method} ({layer}), depth {row.depth}, width {row.width}"
        stem = f"{method}-{layer}".lower()
        units, points = (np.asarray(row[name], np.int8).reshape(row.depth, -1) for name in ("units", "points"))
        made[f"units-{stem}"] = figures.unit_map(list(units), f"Units: {title}")
        made[f"points-{stem}"] = figures.point_map(list(points), f"Points: {title}")
    return made


def _heat_map(axes: Axes, table: pd.DataFrame, low: float, title: str) -> AxesImage:
    image = axes.imshow(table.to_numpy(), cmap="cividis", vmin=low, vmax=1, origin="lower", aspect="auto")
    for (row, place), value in np.ndenumerate(table.to_numpy()):
        if np.isfinite(value):
            text = f"{np.floor(100 * value + 1e-9) / 100:.2f}".removeprefix("0")
            shade = "black" if value > (1 + low) / 2 else "white"
            axes.text(place, row, text, ha="center", va="center", fontsize=6.5, color=shade)
    axes.set_xticks(range(table.shape[1]), [str(width) for width in table.columns], fontsize=7)
    axes.set_yticks(range(table.shape[0]), [str(depth) for depth in table.index], fontsize=7)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("width", fontsize=8)
    axes.set_ylabel("depth", fontsize=8)
    return image
