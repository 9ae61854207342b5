"""Tables of a jumpstart grid, compared with the published ones, printed and as Markdown, and figures."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy import stats

import jprune
from experiments.cli import markdown
from experiments.jumpstart_grid import figures
from experiments.jumpstart_grid.config import Grid
from experiments.jumpstart_grid.pruned import TRAINED
from experiments.storage import files
from jprune.jumpstart import units
from jprune.recall.inference import corrected

# The lowest validation accuracy that counts as solved, from the summary of the study.
SOLVED = {"moons": 0.99, "mnist": 0.97}
PUBLISHED_EPOCHS = {"moons": 5000, "mnist": 50}
_PUBLISHED = Path(__file__).parents[1] / "published"


class Printed(NamedTuple):
    """A table as text: its title, a name for each column, and the rows."""

    title: str
    header: list[str]
    rows: list[list[str]]

    def markdown(self) -> str:
        """Format the table as Markdown under its title."""
        return f"**{self.title}**\n\n{markdown.table(self.header, self.rows, right=True)}"


def write(
    folder: Path,
    grid: Grid,
    cells: pd.DataFrame,
    statuses: pd.DataFrame | None,
    console: Console,
    *,
    after: pd.DataFrame | None = None,
) -> None:
    """Print the tables of a grid; write them as Markdown, and its figures.

    Args:
      folder: where to write.
      grid: the settings.
      cells: a row for each network.
      statuses: statuses of their units and points, if known.
      console: where to print.
      after: the table ``pruned``, if the networks were pruned.
    """
    tables = contest(label(cells)) if grid.kind == "tables" else []
    for dataset, mine in cells.groupby("dataset", sort=False):
        theirs = published(dataset)
        labelled = label(mine)
        tables += [shares(dataset, labelled, theirs), *seeds(dataset, labelled, theirs), activity(dataset, labelled)]
        if grid.kind == "tables":
            continue
        tables += by_size(dataset, labelled, theirs)
        tables += best(dataset, labelled) if grid.kind == "images" else []
        for name, figure in figures.of_grid(dataset, labelled, theirs, mine["floor"].iloc[0]).items():
            stem = re.sub(r"[^\w.-]+", "-", dataset)  # of a file, its name has the path
            files.write_figure(folder / f"{stem}-{name}.png", figure)
    if statuses is not None:
        for name, figure in figures.of_statuses(statuses).items():
            files.write_figure(folder / f"{name}.png", figure)
    if after is not None:
        tables.append(still_trained(after))
    show(tables, folder / "report.md", console)


def still_trained(after: pd.DataFrame) -> Printed:
    """Count, by data set, method and size, networks that trained to .9 and those still at .9 at each ratio."""
    ratios = sorted(ratio for ratio in after["ratio"].unique() if ratio > 1)
    rows = []
    for (dataset, name, depth, width), mine in label(after).groupby(["dataset", "label", "depth", "width"], sort=False):
        reached = mine.pivot_table(index="replicate", columns="ratio", values="train_acc") >= TRAINED
        trained = reached[reached[1.0]]
        each = (str(trained[ratio].sum()) for ratio in ratios)
        rows.append([f"{dataset}, {name}, depth {depth}, width {width}", str(len(reached)), str(len(trained)), *each])
    title = "Networks with a training accuracy of .9 after magnitude pruning, by ratio; not fine-tuned"
    return Printed(title, ["", "networks", "before", *(f"t = {ratio:g}" for ratio in ratios)], rows)


def largest_ratio(after: pd.DataFrame) -> pd.Series:
    """Return the largest ratio at which a network that trained to .9 still reaches .9; 1 if there is none.

    Returns:
      A series by (dataset, depth, width, replicate, method), of the networks that trained to .9 before pruning.
    """
    network = ["dataset", "depth", "width", "replicate", "method"]
    reaching = after[after["train_acc"] >= TRAINED]
    before = pd.MultiIndex.from_frame(reaching.loc[reaching["ratio"] == 1, network])
    return reaching.groupby(network)["ratio"].max().reindex(before)


def show(tables: list[Printed], path: Path, console: Console) -> None:
    """Print tables, and write them as Markdown."""
    for table in tables:
        console.print(f"[bold]{escape(table.title)}")  # as a title it would be wrapped to the width of the table
        shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for position, name in enumerate(table.header):
            shown.add_column(name, justify="left" if position == 0 else "right", no_wrap=True)
        for row in table.rows:
            shown.add_row(*row)
        console.print(shown)
    files.write_bytes(path, "\n".join(table.markdown() for table in tables).encode())
    console.print(f"Tables and figures are in {path.parent}")


def published(dataset: str) -> pd.DataFrame | None:
    """Return the published grid of a data set, or None: method, width, depth, train_acc, val_acc."""
    path = _PUBLISHED / f"jumpstart_{dataset}.csv"
    return pd.read_csv(path) if path.is_file() else None


def label(cells: pd.DataFrame) -> pd.DataFrame:
    """Add a label for each cell: the method, and the layer form or learning rate if there are several."""
    labels = cells["method"].astype(str)
    for column, form in (("layer", "{}"), ("lr", "lr {:g}")):
        if column in cells and cells[column].nunique() > 1:
            labels = labels + ", " + cells[column].map(form.format)
    return cells.assign(label=labels)


def shares(dataset: str, cells: pd.DataFrame, theirs: pd.DataFrame | None) -> Printed:
    """Return the fraction of networks that trained, with 95% Wilson intervals, next to the published fraction."""
    floor, solved = cells["floor"].iloc[0], SOLVED.get(dataset, 0.99)
    wanted: list[tuple[str, Callable[[pd.DataFrame], pd.Series]]] = [
        ("train off floor", lambda t: t["train_acc"] > floor + 1e-3),
        ("train >= .9", lambda t: t["train_acc"] >= 0.9),
        ("train >= .99", lambda t: t["train_acc"] >= 0.99),
        ("val >= .9", lambda t: t["val_acc"] >= 0.9),
        (f"val >= {solved:g}".replace("0.", "."), lambda t: t["val_acc"] >= solved),
    ]
    header = [
        "method",
        "networks",
        "mean train / val",
        *(name for name, _ in wanted),
        "last epoch: train / val",
        "val >= .9",
    ]
    rows = []
    for name, mine in cells.groupby("label", sort=False):
        last = mine.rename(columns={"train_acc": "_", "val_acc": "__"}).rename(
            columns={"train_acc_last": "train_acc", "val_acc_last": "val_acc"}
        )
        counts = (_share(test(mine)) for _, test in wanted)
        rows.append([str(name), str(len(mine)), _means(mine), *counts, _means(last), _share(last["val_acc"] >= 0.9)])
        same = _same_cells(mine, theirs)
        if len(same):
            counts = (_number(test(same).mean()) for _, test in wanted)
            rows.append(
                [_published_name(f"{name}, published", dataset, mine), str(len(same)), _means(same), *counts, "", ""]
            )
    return Printed(
        f"{dataset}: share of networks that trained, 95% intervals; accuracies are the maximum over epochs",
        header,
        rows,
    )


def seeds(dataset: str, cells: pd.DataFrame, theirs: pd.DataFrame | None) -> list[Printed]:
    """Count the sizes whose networks disagree, and those where all disagree with the published network."""
    size, rows = ["width", "depth"], []
    for name, mine in cells.groupby("label", sort=False):
        same = _same_cells(mine, theirs)
        if mine["replicate"].nunique() == 1 or not len(same):
            continue
        other = same.set_index(size)["train_acc"] >= 0.9
        reached = mine.assign(reached=mine["train_acc"] >= 0.9).groupby(size)["reached"].agg(["any", "all"])
        split, against = reached["any"] & ~reached["all"], reached["all"].reindex(other.index) != other
        rows.append([str(name), str(len(reached)), str(split.sum()), str((against & ~split[other.index]).sum())])
    header = ["method", "sizes", "seeds disagree", "all disagree with the published network"]
    return [Printed(f"{dataset}: whether a training accuracy of .9 is reached, by size", header, rows)] if rows else []


def activity(dataset: str, cells: pd.DataFrame) -> Printed:
    """Return the fractions of dead and linear units at the end, by method and depth."""
    columns = {"unit_dead": "dead units", "unit_linear": "linear units", "point_dead": "points dead in a layer"}
    depths = sorted(cells["depth"].unique())
    rows = []
    for name, mine in cells.groupby("label", sort=False):
        for column, words in columns.items():
            means = mine.groupby("depth")[column].mean()
            rows.append([f"{name}: {words}", *(_number(means[d]) if d in means else "" for d in depths)])
    return Printed(f"{dataset}: state at the end, mean over widths and seeds, by depth", ["", *map(str, depths)], rows)


def by_size(dataset: str, cells: pd.DataFrame, theirs: pd.DataFrame | None) -> Iterator[Printed]:
    """Yield tables of every cell, mean over seeds, with the published one after a slash."""
    widths, depths = sorted(cells["width"].unique()), sorted(cells["depth"].unique())
    for column, words in (
        ("train_acc", "training"),
        ("val_acc", "validation"),
        ("val_acc_last", "validation, last epoch"),
    ):
        for name, mine in cells.groupby("label", sort=False):
            ours = mine.pivot_table(index="depth", columns="width", values=column)
            same = _same_cells(mine, theirs)
            known = column in same and len(same) > 0
            other = same.pivot_table(index="depth", columns="width", values=column) if known else None
            rows = [[str(d), *(_cell(ours, other, d, w) for w in widths)] for d in depths]
            title = f"{dataset}, {name}: {words} accuracy" + (
                _published_name(", ours / published", dataset, mine) if known else ""
            )
            yield Printed(title, ["depth \\ width", *map(str, widths)], rows)


def best(dataset: str, cells: pd.DataFrame) -> list[Printed]:
    """Return the best method of each size, and how often each method is best, and better than relu.

    Methods are compared by validation accuracy, mean over seeds. A method is compared with relu at the same learning
    rate; methods that share the largest accuracy of a size are all the best.
    """
    if cells["label"].nunique() < 2:
        return []
    score = cells.pivot_table(index=["depth", "width"], columns="label", values="val_acc")
    score = score[list(dict.fromkeys(cells["label"]))]
    highest = score.eq(score.max(axis=1), axis=0)
    rows = []
    for name in score:
        mine = cells[cells["label"] == name].iloc[0]
        same = cells[(cells["method"] == "relu") & (cells["lr"] == mine["lr"] if "lr" in cells else True)]
        baseline = None if mine["method"] == "relu" or same.empty else score[same["label"].iloc[0]]
        pairs = pd.DataFrame() if baseline is None else pd.concat([score[name], baseline], axis=1).dropna()
        better = f"{int((pairs.iloc[:, 0] > pairs.iloc[:, 1]).sum())} of {len(pairs)}" if len(pairs) else ""
        rows.append([str(name), str(score[name].count()), str(highest[name].sum()), better])
    counts = Printed(f"{dataset}: sizes in which a method is the best", ["", "sizes", "best", "better than relu"], rows)
    widths = sorted(cells["width"].unique())
    each = []
    for depth in sorted(cells["depth"].unique()):
        row = [str(depth)]
        for width in widths:
            if (depth, width) not in score.index:
                row.append("")
                continue
            names = ", ".join(map(str, highest.columns[highest.loc[depth, width]]))
            row.append(f"{_number(score.loc[(depth, width)].max())} {names}")
        each.append(row)
    sizes = Printed(
        f"{dataset}: largest validation accuracy and its method", ["depth \\ width", *map(str, widths)], each
    )
    return [counts, sizes]


def contest(cells: pd.DataFrame) -> list[Printed]:
    """Compare methods by validation accuracy: win-draw-loss counts over networks of equal size, and mean accuracies.

    Trainability and convergence are over the data sets on which every method has a network.
    """
    network = ["dataset", "width", "depth", "replicate"]
    score = cells.pivot_table(index=network, columns="label", values="val_acc")[list(dict.fromkeys(cells["label"]))]
    several = len(cells[["width", "depth"]].drop_duplicates()) > 1
    names = list(score.columns)
    rows = []
    for mine in names:
        row = []
        for other in names:
            margin = (score[mine] - score[other]).dropna()
            row.append("" if mine == other else f"{(margin > 0).sum()}-{(margin == 0).sum()}-{(margin < 0).sum()}")
        rows.append([mine, *row])
    over = "data sets x sizes x seeds" if several else "data sets x seeds"
    pairs = Printed(f"Wins-draws-losses of the row against the column, {over}", ["", *names], rows)
    by_dataset = score.groupby("dataset", sort=False).mean()
    complete = by_dataset.dropna().to_numpy().T
    means = [[name, *("" if np.isnan(mean) else _number(mean) for mean in by_dataset[name])] for name in names]
    if complete.size:
        measures = zip(means, units.trainability(complete), units.convergence(complete), strict=True)
        means = [[*row, _number(a), f"{b:.3f}"] for row, a, b in measures]
    means_over = "mean over sizes and seeds" if several else "mean over seeds"
    header = [means_over, *by_dataset.index, *(["trainability", "convergence"] if complete.size else [])]
    return [pairs, Printed("Validation accuracy, maximum over epochs", header, means)]


def pruning(cells: pd.DataFrame) -> list[Printed]:
    """Accuracy, dead units and alpha at each ratio, fine-tuned without and with the penalty.

    The cells are those of the table ``prune-and-jumpstart``, which an earlier version computed.
    """
    tables = []
    for dataset, mine in cells.groupby("dataset", sort=False):
        correct = {key: _counts(part["right"]) for key, part in mine.groupby(["method", "ratio"])}
        methods = [method for method in dict.fromkeys(mine["method"]) if method != "dense"]
        of_method = {m: {ratio: correct[m, ratio] for _, ratio in correct if (m, ratio) in correct} for m in methods}
        audit = jprune.recall.audit_counts(correct["dense", 1.0], of_method, support=_counts(mine["support"])[0])
        alphas = audit.alphas.pivot_table(index="model", columns=["score", "ratio"], values="alpha")
        rows = []
        for (method, ratio), part in mine.groupby(["method", "ratio"], sort=False):
            alpha = alphas.get((method, ratio))
            shown = "" if alpha is None else f"{alpha.mean():.3f} +- {alpha.std():.3f}"
            means = (_number(part[name].mean()) for name in ("unit_dead_before", "unit_dead", "unit_linear"))
            rows.append([method, f"{ratio:g}", f"{part['test_acc'].mean():.4f}", *means, shown])
        header = [
            "fine-tuned",
            "ratio",
            "test accuracy",
            "dead before",
            "dead after",
            "linear after",
            "alpha, mean +- sd",
        ]
        support = _counts(mine["support"])[0]
        null = corrected.seed_null(correct["dense", 1.0] / support, correct["dense", 1.0].sum(1) / support.sum())
        title = f"{dataset}: pruned by magnitude, then fine-tuned; seed null of alpha {null.alpha:.3f}"
        tables.append(Printed(f"{title} [{null.low:.3f}, {null.high:.3f}]", header, rows))
        tables += [_paired(dataset, mine, alphas, methods[0], other) for other in methods[1:]]
    return tables


def _counts(column: pd.Series) -> np.ndarray:
    """Parse counts by class, separated by blanks, to an array (rows, classes)."""
    return np.stack([np.array(text.split(), np.int64) for text in column])


def _paired(dataset: str, mine: pd.DataFrame, alphas: pd.DataFrame, first: str, second: str) -> Printed:
    """Return the second method minus the first, paired by network, with t intervals."""
    dead = mine.pivot_table(index="replicate", columns=["method", "ratio"], values="unit_dead")
    rows = []
    for ratio in sorted({ratio for _, ratio in alphas.columns}):
        row = [f"{ratio:g}"]
        for table in (alphas, dead):
            difference = (table[second, ratio] - table[first, ratio]).dropna()
            interval = jprune.recall.t_interval(difference.to_numpy())
            row.append(f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]")
        rows.append(row)
    header = ["ratio", f"alpha, {second} - {first}", f"dead units, {second} - {first}"]
    return Printed(f"{dataset}: paired differences with 99% intervals", header, rows)


def _published_name(name: str, dataset: str, mine: pd.DataFrame) -> str:
    """Return a name for published numbers, with both numbers of epochs if ours differs."""
    ours, theirs = mine["epochs"].max() if "epochs" in mine else None, PUBLISHED_EPOCHS.get(dataset)
    return f"{name} ({ours:,} / {theirs:,} epochs)" if ours and theirs and ours != theirs else name


def _same_cells(mine: pd.DataFrame, theirs: pd.DataFrame | None) -> pd.DataFrame:
    """Return the published cells with the methods, widths and depths of ours."""
    if theirs is None:
        return pd.DataFrame()
    keys = ["method", "width", "depth"]
    return theirs.merge(mine[keys].drop_duplicates(), on=keys)


def _means(table: pd.DataFrame) -> str:
    return " / ".join(f"{table[column].mean():.3f}".removeprefix("0") for column in ("train_acc", "val_acc"))


def _share(hits: pd.Series) -> str:
    interval = stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(method="wilson")
    return f"{_number(hits.mean())} [{_number(interval.low)}, {_number(interval.high)}]"


def _cell(ours: pd.DataFrame, other: pd.DataFrame | None, depth: int, width: int) -> str:
    values = [
        table.reindex([depth]).reindex(columns=[width]).iloc[0, 0] for table in (ours, other) if table is not None
    ]
    return " / ".join("" if np.isnan(value) else _number(value) for value in values)


def _number(value: float) -> str:
    """Format with two decimals, truncated, so that only 1 is shown as 1.00."""
    return f"{np.floor(100 * value + 1e-6) / 100:.2f}".removeprefix("0")
