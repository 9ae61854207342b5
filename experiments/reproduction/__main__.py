"""Rebuild the reproduction page from the tables in experiments/results/, in under a minute.

"python -m experiments.reproduction" rewrites the tables of docs/reproduction.md and its figures.
"python -m experiments.reproduction keep FOLDER NAME" first adds the results of the study in FOLDER to those
tables, as NAME: fashion-lenet, fashion-jumpstart, fashion-no-decay, fashion-by-weights, mnist-lenet,
cifar10-resnet20, cifar10-resnet20-short, cifar10-resnet20-gradient, fashion-channels;
fashion-published-paper, -script, mnist-published-paper, -script;
fashion-few-weights, fashion-few-weights-floor, -floor-others, -gradient, -gradient-floor;
fashion-round-8, -4, fashion-fewer-epochs-10, -20, fashion-label-noise-10, -20;
moons, moons-seeds, moons-seeds-u, moons-layers, uci, mnist-grid, mnist-grid-50, prune-and-jumpstart;
moons-pruned, moons-pruned-seeds, mnist-pruned. A study whose settings are not those planned for NAME is refused.
"""

import argparse
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.cli import markdown
from experiments.cli.commands import exit_status
from experiments.jumpstart_grid import figures
from experiments.jumpstart_grid import report as reporting
from experiments.jumpstart_grid.config import grid_from_json
from experiments.recall_distortion import results
from experiments.reproduction import arms, explanations, hypotheses, jumpstart, ledger, references, summary
from experiments.reproduction.ledger import FOLDER, Recalls
from experiments.reproduction.verdicts import Verdict, wilson
from experiments.storage import files, provenance, settings
from jprune.cli import wrapped
from jprune.recall import mark, t_interval

PAGE = Path(__file__).parents[2] / "docs" / "reproduction.md"
README = PAGE.parents[1] / "README.md"
PUBLISHED = Path(__file__).parents[1] / "published"
_RECALLS = {
    "fashion-lenet": (("fashion_mnist", "lenet"), "Fashion-MNIST, LeNet"),
    "fashion-jumpstart": (None, "Fashion-MNIST, LeNet, jumpstart .1 in dense training"),
    "mnist-lenet": (("mnist", "lenet"), "MNIST, LeNet"),
    "fashion-no-decay": (None, "Fashion-MNIST, LeNet, weight decay 0"),
    "fashion-by-weights": (None, "Fashion-MNIST, LeNet, as many weights as if the ratio counted prunable ones alone"),
    "fashion-published-paper": (
        ("fashion_mnist", "lenet"),
        "Fashion-MNIST, LeNet, published counts, paper's setting",
    ),
    "fashion-published-script": (
        ("fashion_mnist", "lenet"),
        "Fashion-MNIST, LeNet, published counts, script's setting",
    ),
    "mnist-published-paper": (("mnist", "lenet"), "MNIST, LeNet, published counts, paper's setting"),
    "mnist-published-script": (("mnist", "lenet"), "MNIST, LeNet, published counts, script's setting"),
    "fashion-channels": (None, "Fashion-MNIST, LeNet, channels removed, t in multiply-adds"),
    "fashion-few-weights-gradient": (
        None,
        "Fashion-MNIST, LeNet, few weights, gradient pruning of other dense networks",
    ),
    "fashion-few-weights-gradient-floor": (
        None,
        "Fashion-MNIST, LeNet, few weights, at least 10 in every layer, gradient pruning of other dense networks",
    ),
    hypotheses.CIFAR: (("cifar10", "resnet20"), "CIFAR-10, ResNet-20, short schedule"),
    "cifar10-resnet20-gradient": (
        None,
        "CIFAR-10, ResNet-20, short schedule, gradient pruning of other dense networks",
    ),
    "cifar10-resnet20": (None, "CIFAR-10, ResNet-20, one network of one epoch: pipeline check only"),
}  # table: data set and model of the published quartiles, title
_EXPLAINING = (explanations.FEW_WEIGHTS, *explanations.WITH_FLOOR, *explanations.CHANGES)
_GRIDS = (
    "moons",
    "moons-seeds",
    "moons-seeds-u",
    "moons-layers",
    "uci",
    "mnist-grid",
    "mnist-grid-50",
    "prune-and-jumpstart",
)
_PRUNED = ("moons-pruned", "mnist-pruned", summary.NEW_SEEDS)
_MAPS = """![Heat maps of training accuracy by width and depth, ours and the published ones, one row per method](
images/reproduction-moons-train.png)

![The same of validation accuracy](images/reproduction-moons-val.png)

![Validation accuracy against the number of parameters, a panel a method](images/reproduction-moons-parameters.png)

""".replace("](\n", "](")
_BEFORE = """For relu-bn, dead and linear units and points were counted before normalization, not at the ReLUs.

"""
_NOTES = {"moons": _MAPS, "mnist-grid": _BEFORE, "mnist-grid-50": _BEFORE}
_BOXES = """![Box plots of alpha over networks at each compression ratio: ours by score, and the published ones](
images/reproduction-alpha.png)

Networks that collapsed to chance are in the tables and not in the figure. The gray band is the seed null, the alpha of
another dense seed, with its 99% interval; it is given above every table. The mark after an interval of alpha says
whether it lies below 1 (<), above 1 (>) or includes 1 (?).
""".replace("](\n", "](")
_SEEDS = 3  # networks that the interval of a seed null needs
_SHOWN = 10  # networks that a panel of the figure of the README needs
_SHARD = re.compile(r" --shard (\d+/\d+)")
_SCORES = ("magnitude", "undecayed", "random", "gradient", "undecayed-signed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.reproduction",
        description=wrapped(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("action", nargs="?", choices=("report", "keep"), default="report", help="default: report")
    parser.add_argument(
        "folder", nargs="?", type=Path, metavar="FOLDER", help="with keep: results of the study, such as runs/moons"
    )
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        choices=(*_RECALLS, *_EXPLAINING, *_GRIDS, *_PRUNED),
        help="with keep: name of the table, one of those above",
    )

    def work() -> None:
        given = parser.parse_args(arguments)
        if given.action == "keep":
            if given.name is None:
                parser.error("keep needs FOLDER and NAME")
            keep(given.folder, given.name)
        elif given.folder is not None:
            parser.error(f"report takes no FOLDER, such as {given.folder}; it reads experiments/results/")
        report()

    return exit_status(work)


def keep(folder: Path, name: str) -> None:
    """Add the results of a study to the tables.

    Raises:
      ValueError: no study was run in the folder, its settings or ratios are not those of the table, or it has some
        networks of the existing table and lacks others.
    """
    if name in (*_GRIDS, *_PRUNED):
        cells = folder / ("pruned.csv" if name in _PRUNED else "cells.csv")
        if not cells.exists():
            raise ValueError(f"{cells} is missing: run the study, or its action 'report', first")
        found = settings.recorded(folder)
        arms.check_grid(name, pd.read_csv(cells), grid_from_json(found["study"]) if found else None, folder)
        table, made = _as_text(cells), provenance.portable(provenance.notes(folder))
        if (FOLDER / f"{name}.csv").exists():
            table, made = _with_kept(table, made, name, cells)
        files.write_bytes(FOLDER / f"{name}.csv", table.to_csv(index=False).encode())
        files.write_json(FOLDER / f"{name}.json", {"made": made})
        return
    recorded = results.recorded(folder)
    if recorded is None:
        raise ValueError(f"{folder} has no config.json: no study was run there")
    arms.check_study(name, recorded[0], folder)
    ledger.keep(folder, recorded[0], name)


def _with_kept(
    cells: pd.DataFrame, made: list[dict[str, str]], name: str, path: Path
) -> tuple[pd.DataFrame, list[dict[str, str]]]:
    """Replace the networks of a table if all have been trained again, or add others to them.

    Args:
      cells: the new networks.
      made: their origin.
      name: name of the table.
      path: file of the new networks, for the message.

    Returns:
      All networks, and their origin.

    Raises:
      ValueError: some networks of the table were trained again and others were not.
    """
    before = _as_text(FOLDER / f"{name}.csv")
    kept, fresh = _identities(before), _identities(cells)
    if kept <= fresh:
        return cells, made
    lost = kept - fresh
    if kept & fresh:
        raise ValueError(
            f"{path} lacks {len(lost)} of the {len(kept)} networks that {name}.csv keeps, such as "
            f"{' '.join(min(lost))}: run the whole study into {path.parent} first, or only networks that are not in "
            "the table"
        )
    earlier = json.loads((FOLDER / f"{name}.json").read_text())["made"]
    return pd.concat([before, cells], ignore_index=True), earlier + [entry for entry in made if entry not in earlier]


def _identities(cells: pd.DataFrame) -> set[tuple[str, ...]]:
    """The columns that identify the networks of a grid, as a set of rows."""
    names = ["dataset", "method", "layer", "ratio", "depth", "width", "lr", "epochs", "replicate"]
    return set(cells[[name for name in names if name in cells]].itertuples(index=False, name=None))


def _as_text(path: Path) -> pd.DataFrame:
    """Read a table without changing how its numbers are written."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def _more_seeds(grids: Mapping[str, pd.DataFrame]) -> pd.DataFrame | None:
    """The moons cells that were trained with five seeds."""
    found = [grids[name] for name in ("moons-seeds", "moons-seeds-u") if name in grids]
    return pd.concat(found) if found else None


def report() -> None:
    """Rewrite the tables of the page, between their markers, and its figures."""
    studies, explaining = _kept(_RECALLS), _kept(_EXPLAINING)
    for name in studies.keys() & hypotheses.PUBLISHED_COUNTS.keys():
        studies[name] = studies[name].at_nominal((1, 2, 4, 10, 20, 50))
    grids = {name: pd.read_csv(FOLDER / f"{name}.csv") for name in _GRIDS if (FOLDER / f"{name}.csv").exists()}
    pruned = {name: pd.read_csv(FOLDER / f"{name}.csv") for name in _PRUNED if (FOLDER / f"{name}.csv").exists()}
    shown = jumpstart.planned_to_be_read(pruned)
    published = pd.read_csv(PUBLISHED / "jumpstart_moons.csv")
    boxes = pd.read_csv(PUBLISHED / "recall_alpha_boxplots.csv")
    known = {**studies, "cifar10-published": ledger.published_counts(PUBLISHED / "recall_cifar10_resnet56_counts.csv")}
    found = [
        *jumpstart.of_moons(grids.get("moons"), grids.get("moons-layers"), published, _more_seeds(grids)),
        jumpstart.of_tables(grids.get("uci")),
        *jumpstart.of_pruned(
            [shown[name] for name in shown if name != summary.NEW_SEEDS], shown.get(summary.NEW_SEEDS)
        ),
        *hypotheses.of_recalls(known, boxes),
        *explanations.of_explanations(studies | explaining),
    ]
    everything = summary.Tables(known | explaining, grids, pruned, published, boxes)
    blocks = {
        "summary": summary.bullets(everything),
        "seeds": summary.of_seeds(everything),
        "verdicts": _verdicts(found),
    }
    parts = [_recall(name, study) for name, study in studies.items() if _usable(study)]
    blocks["recall"] = "\n".join([_BOXES, *parts] if parts else [])
    on_grids = [_grid(name, cells) for name, cells in grids.items()]
    on_grids += [_titled(name, [reporting.still_trained(after)]) for name, after in shown.items()]
    blocks["jumpstart"] = "\n".join(on_grids)
    blocks["made"] = _made([*studies, *explaining, *grids, *pruned])
    pictures = {}
    if parts:
        pictures["reproduction-alpha"] = alpha_figure(studies)
        pictures["reproduction-references"] = references_figure(known)
    if "moons" in grids:
        cells = reporting.label(grids["moons"])
        floor = cells["floor"].iloc[0]
        for name, figure in figures.of_grid("moons", cells, published, floor).items():
            pictures[f"reproduction-moons-{name}"] = figure
        both = cells[cells["method"].isin(["relu", "UP"])]
        short = figures.heat_maps("moons", both, published, "train_acc", floor)
        pictures["reproduction-moons-short"] = short  # for the README
    for name, figure in pictures.items():
        files.write_figure(PAGE.parent / "images" / f"{name}.png", figure)
    files.write_bytes(PAGE, filled(PAGE.read_text(), blocks).encode())
    files.write_bytes(README, filled(README.read_text(), {"results": summary.short(everything)}).encode())
    print(f"{PAGE} and {len(pictures)} figures are rebuilt")


def _kept(names: Iterable[str]) -> dict[str, Recalls]:
    """Return the existing tables, as a dict from name to study."""
    return {name: ledger.recalls(name) for name in names if (FOLDER / f"{name}.csv").exists()}


def filled(page: str, blocks: dict[str, str]) -> str:
    """Replace the text between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` in a page.

    Raises:
      ValueError: a marker is missing.

    >>> filled("<!-- begin a -->old<!-- end a -->", {"a": "new"}).split()
    ['<!--', 'begin', 'a', '-->', 'new', '<!--', 'end', 'a', '-->']
    """
    for name, text in blocks.items():
        between = re.compile(f"(<!-- begin {name} -->).*?(<!-- end {name} -->)", re.DOTALL)
        if not between.search(page):
            raise ValueError(f"the page has no '<!-- begin {name} -->' with its end")
        page = between.sub(lambda match, text=text: f"{match[1]}\n{text.strip()}\n{match[2]}", page)
    return page


def alpha_figure(studies: dict[str, Recalls]) -> Figure:
    """Draw box plots of alpha over networks at each ratio, with the published boxes of magnitude pruning."""
    shown = {name: study for name, study in studies.items() if _RECALLS[name][0] and study.complete(["magnitude"])}
    theirs = pd.read_csv(PUBLISHED / "recall_alpha_boxplots.csv")
    columns = min(3, max(1, len(shown)))
    lines = -(-max(1, len(shown)) // columns)
    figure = Figure(figsize=(5.6 * columns, 3.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flat
    for (name, study), axes in zip(shown.items(), panels, strict=False):
        of_published, title = _RECALLS[name]
        boxes = []
        for score in _usable(study):
            replicates = study.complete([score])
            alphas = study.audit([score], replicates).alphas
            working = study.working(alphas)
            series = [working.loc[working["ratio"] == ratio, "alpha"] for ratio in _ratios(study)]
            boxes.append((f"{score}, {len(replicates)} networks", [_box(values) for values in series]))
        rows = _published_rows(theirs, of_published, "magnitude")
        printed = [_published_box(rows, ratio) for ratio in _ratios(study)]
        boxes.append(("magnitude, published, 30 networks", printed))
        _draw(axes, boxes, _ratios(study))
        replicates = study.complete(["magnitude"])
        if len(replicates) >= _SEEDS:
            null = references.seed_null(study.correct(ledger.DENSE, 1.0, replicates), study.support)
            axes.axhspan(null.low, null.high, color="0.85", zorder=0)
        axes.set_title(title, fontsize=10)
    for axes in panels:
        axes.remove()
    return figure


def references_figure(studies: dict[str, Recalls]) -> Figure:
    """Plot mean alpha at each ratio with the seed null of the same dense networks, one panel per data set."""
    shown = {name: studies[name] for name in hypotheses.REFERENCES if name in studies}
    shown = {name: study for name, study in shown.items() if len(study.complete(["magnitude"])) >= _SHOWN}
    figure = Figure(figsize=(3.7 * len(shown), 3.4), layout="constrained")
    for axes, (name, study) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown.items(), strict=True):
        replicates = study.complete(["magnitude"])
        null = references.seed_null(study.correct(ledger.DENSE, 1.0, replicates), study.support)
        ratios = [ratio for ratio in study.ratios("magnitude") if ratio <= 20]
        alphas = study.audit(["magnitude"], replicates).alphas.set_index(["ratio", "model"])["alpha"]
        means = [t_interval(alphas[ratio]) for ratio in ratios]
        axes.axhspan(null.low, null.high, color="0.85", zorder=0)
        axes.axhline(null.value, color="0.45", linewidth=1, zorder=1, label="another dense seed")
        axes.axhline(1, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
        axes.errorbar(
            range(len(ratios)),
            [interval.mean for interval in means],
            yerr=[
                [interval.mean - interval.low for interval in means],
                [interval.high - interval.mean for interval in means],
            ],
            fmt="o",
            color=figures.COLOURS[0],
            capsize=3,
            label="magnitude pruning",
        )
        axes.set_xticks(range(len(ratios)), [f"{ratio:g}" for ratio in ratios])
        axes.set(xlabel="compression ratio t", ylabel="mean alpha, 99% interval")
        axes.set_title(f"{hypotheses.REFERENCES[name]}\n{len(replicates)} networks", fontsize=9)
        axes.legend(fontsize=7, frameon=False, loc="upper left")
    return figure


def _draw(axes, boxes, ratios) -> None:
    width = 0.8 / len(boxes)
    handles = []
    for index, (_, series) in enumerate(boxes):
        last = index == len(boxes) - 1
        colour = "0.45" if last else figures.COLOURS[index % len(figures.COLOURS)]
        drawable = [(place, box) for place, box in enumerate(series) if box is not None]
        drawn = axes.bxp(
            [box for _, box in drawable],
            positions=[place + (index - (len(boxes) - 1) / 2) * width for place, _ in drawable],
            widths=0.85 * width,
            showfliers=False,
            patch_artist=True,
            boxprops={"facecolor": "white" if last else colour, "edgecolor": colour, "alpha": 0.75},
            medianprops={"color": "black"},
            whiskerprops={"color": colour},
            capprops={"color": colour},
        )
        handles.append(drawn["boxes"][0])
    axes.axhline(1, color="0.6", linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yscale("log")
    ticks = [
        tick for tick in (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20) if axes.get_ylim()[0] <= tick <= axes.get_ylim()[1]
    ]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set_xticks(range(len(ratios)), ["control" if ratio == 1 else f"{ratio:g}" for ratio in ratios])
    axes.set(xlabel="compression ratio t", ylabel="alpha, log scale")
    axes.legend(handles, [name for name, _ in boxes], loc="best", fontsize=7, frameon=False)


def _box(values: pd.Series) -> dict[str, float] | None:
    if not len(values):
        return None
    q1, median, q3 = np.quantile(values, [0.25, 0.5, 0.75])
    inside = values[(values >= q1 - 1.5 * (q3 - q1)) & (values <= q3 + 1.5 * (q3 - q1))]
    return {"med": median, "q1": q1, "q3": q3, "whislo": inside.min(), "whishi": inside.max()}


def _published_rows(boxes: pd.DataFrame, of_published: tuple[str, str] | None, score: str) -> pd.DataFrame:
    """Return the published quartiles of a score by ratio; a network that several figures show is taken once."""
    dataset, model = of_published or ("", "")
    same = (boxes["dataset"] == dataset) & (boxes["model"] == model) & (boxes["score"] == score)
    return boxes[same].drop_duplicates("ratio").set_index("ratio")


def _published_box(rows: pd.DataFrame, ratio: float) -> dict[str, float] | None:
    if ratio not in rows.index:
        return None
    row = rows.loc[ratio]
    names = {"med": "median", "q1": "q1", "q3": "q3", "whislo": "whisker_low", "whishi": "whisker_high"}
    return {ours: float(row[theirs]) for ours, theirs in names.items()}


def _ratios(study: Recalls) -> list[float]:
    return [1.0, *study.ratios("magnitude")]


def _usable(study: Recalls) -> list[str]:
    return [score for score in _SCORES if study.ratios(score) and study.complete([score])]


def _recall(name: str, study: Recalls) -> str:
    """Format the table of one study: every score and ratio, with the published quartiles."""
    of_published, title = _RECALLS[name]
    theirs = pd.read_csv(PUBLISHED / "recall_alpha_boxplots.csv")
    rows = []
    for score in _usable(study):
        replicates = study.complete([score])
        alphas = study.audit([score], replicates).alphas
        same = _published_rows(theirs, of_published, score)
        for ratio, networks in alphas.groupby("ratio", sort=True):
            if ratio != 1 or score == "magnitude":
                rows.append(_row(study, (score, float(ratio)), networks, same, replicates))
    header = [
        "score",
        "t",
        "achieved",
        "networks",
        "collapsed, 95% interval",
        "accuracy",
        "mean alpha, 99% interval",
        "quartiles of alpha",
        "published",
        "alpha_null",
        "alpha / alpha_null",
        "reverse / RMA slope",
        "corrected for test noise",
        "profile slope",
    ]
    replicates = study.complete(_usable(study)[:1])
    correct = study.correct(ledger.DENSE, 1.0, replicates)
    dense = correct.sum(1) / study.support.sum()
    spread = f", standard deviation {dense.std(ddof=1):.4f}" if len(dense) > 1 else ""
    networks = f"{len(dense)} network{'s' if len(dense) > 1 else ''}"
    null = ""
    if len(dense) >= _SEEDS:
        estimate = references.seed_null(correct, study.support)
        null = f" Seed null {estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}], 99% interval."
    about = f"Dense accuracy {dense.mean():.4f}{spread}, {networks}.{null}"
    return f"### {title}\n\n{about}\n\n{_setting(name)}\n\n{_table(header, rows)}"


def _setting(name: str) -> str:
    """Describe how the networks of a table were trained, on which devices and with which version of JAX."""
    known = json.loads((FOLDER / f"{name}.json").read_text())
    described = known["settings"]
    dense, fine = described["recipe"], described["pruning"]["recipe"]
    rates = [_many(recipe["learning_rates"]) for recipe in (dense, fine)]
    epochs = [f"{_many(recipe['epochs'])} epoch{'' if recipe['epochs'] == [1] else 's'}" for recipe in (dense, fine)]
    cycle = ", one-cycle schedule (peak rates)" if dense.get("schedule") == "one-cycle" else ""
    chosen = {"validation": "a validation split", "test": "the test set"}.get(described["data"]["selection"])
    words = [
        f"SGD, learning rate {rates[0]}, {epochs[0]}{cycle}, batch {dense['batch']}",
        f"weight decay {dense['weight_decay']:g}",
        f"fine-tuning {epochs[1]} at {rates[1]}",
        f"epoch chosen on {chosen}" if chosen else "last epoch",
    ]
    if dense.get("jumpstart"):
        words.append(f"jumpstart coefficient {dense['jumpstart']:g}")
    return f"Setting: {', '.join(words)}. {_ran(known['made'])}"


def _many(values: Sequence[float]) -> str:
    return " + ".join(f"{value:g}" for value in values)


def _ran(made: Sequence[Mapping[str, str]]) -> str:
    """Say on which devices, with which version of JAX, a table was made.

    >>> _ran([{"jax": "0.10.2"}, {"device": "NVIDIA H200", "jax": "0.11.2"}])
    'Run on CPU (JAX 0.10.2), NVIDIA H200 (JAX 0.11.2); the commands are [at the end](#runs-behind-the-tables).'
    """
    versions: dict[str, set[str]] = {}
    for entry in made:
        device = entry.get("device", "cpu")
        versions.setdefault("CPU" if device == "cpu" else device, set()).add(entry.get("jax", "unknown"))
    named = ", ".join(f"{device} (JAX {', '.join(sorted(each))})" for device, each in sorted(versions.items()))
    return f"Run on {named}; the commands are [at the end](#runs-behind-the-tables)."


def _row(
    study: Recalls,
    cell: tuple[str, float],
    alphas: pd.DataFrame,
    published: pd.DataFrame,
    replicates: Sequence[int],
) -> list[str]:
    """Format the row of one score and ratio: the number of collapsed networks, then alpha of the others."""
    score, ratio = cell
    label = "control" if ratio == 1 else score
    sizes = study.networks[(study.networks["score"] == label) & (study.networks["ratio"] == ratio)]
    sizes = sizes[sizes["replicate"].isin(replicates)]
    kept = sizes["parameters"] - sizes["prunable"] + sizes["nonzero"]
    working = study.working(alphas)
    collapsed = len(alphas) - len(working)
    low, high = wilson(collapsed, len(alphas))
    box = _published_box(published, ratio)
    quartiles = "" if box is None else f"{box['q1']:.2f} / {box['med']:.2f} / {box['q3']:.2f}"
    cells = [
        label,
        f"{ratio:g}",
        f"{(sizes['parameters'] / kept).mean():.2f}",
        str(len(alphas)),
        f"{collapsed} [{low:.2f}, {high:.2f}]" if collapsed else "0",
        f"{alphas['accuracy'].mean():.4f}",
    ]
    if not len(working):
        return [*cells, "", "", quartiles, "", "", "", "", ""]
    here = working["model"].map(dict(enumerate(replicates)))
    dense, pruned = study.correct(ledger.DENSE, 1.0, here), study.correct(label, ratio, here)
    low, high = references.corrected_bounds(dense, pruned, study.support)
    slope = references.profile_slope(*(references.balances(each, study.support) for each in (dense, pruned)))
    mean = working[["alpha", "alpha_null", "alpha_reverse", "alpha_rma", "alpha_over_null"]].mean()
    return [
        *cells,
        f"{mean['alpha']:.2f}{_interval(working['alpha'])}",
        " / ".join(f"{q:.2f}" for q in np.quantile(working["alpha"], [0.25, 0.5, 0.75])),
        quartiles,
        f"{mean['alpha_null']:.2f}",
        f"{mean['alpha_over_null']:.2f}",
        f"{mean['alpha_reverse']:.2f} / {mean['alpha_rma']:.2f}",
        f"{low:.2f} to {high:.2f}",
        f"{slope:.2f}",
    ]


def _interval(alphas: pd.Series) -> str:
    """Format the 99% interval of mean alpha and its mark; empty for a single network."""
    if len(alphas) < 2:
        return ""
    interval = t_interval(alphas)
    return f" [{interval.low:.2f}, {interval.high:.2f}] {mark(interval.low, interval.high)}"


def _grid(name: str, cells: pd.DataFrame) -> str:
    """Format the tables of a jumpstart study."""
    if name == "prune-and-jumpstart":
        return _titled(name, reporting.pruning(cells))
    tables = list(reporting.contest(cells.assign(label=cells["method"]))) if name == "uci" else []
    for dataset, mine in cells.groupby("dataset", sort=False):
        labelled = reporting.label(mine)
        theirs = reporting.published(dataset)
        tables += [reporting.shares(dataset, labelled, theirs)]
        tables += reporting.seeds(dataset, labelled, theirs)
        tables += [reporting.activity(dataset, labelled)]
        if theirs is not None:
            tables += [each for each in reporting.by_size(dataset, labelled, theirs) if "published" in each.title]
    return _titled(name, tables, _NOTES.get(name, ""))


def _titled(name: str, tables: Iterable[reporting.Printed], maps: str = "") -> str:
    """Format the tables of a jumpstart study under its name."""
    parts = [f"**{table.title}**\n\n{_table(table.header, table.rows)}" for table in tables]
    ran = _ran(json.loads((FOLDER / f"{name}.json").read_text())["made"])
    return f"### {name}\n\n{ran}\n\n{maps}" + "\n".join(parts)


def _verdicts(found: Iterable[Verdict]) -> str:
    found = sorted(found, key=lambda each: (each.name[0], int(each.name[1:].partition(",")[0]), each.name))
    rows = [[each.name, each.question, each.found, f"**{each.verdict}**"] for each in found]
    return _table(["", "question", "found", "verdict"], rows)


def _made(names: Iterable[str]) -> str:
    """Format the runs behind each table: a row for each command, device and version of JAX."""
    rows = []
    for name in names:
        runs: dict[tuple[object, ...], list[dict[str, str]]] = {}
        for entry in json.loads((FOLDER / f"{name}.json").read_text())["made"]:
            device, version = entry.get("device", "cpu"), entry.get("jax", "unknown")
            runs.setdefault((_options(entry["command"]), device, version), []).append(entry)
        for (_, device, version), entries in runs.items():
            command, parts = _SHARD.sub("", entries[0]["command"]), [_SHARD.findall(e["command"]) for e in entries]
            shards = ", ".join(sorted({part for found in parts for part in found}, key=_part))
            commits = dict.fromkeys(f"`{entry['commit'][:7]}{entry['commit'][40:]}`" for entry in entries)
            began = sorted(entry["began"].removesuffix(" +0000") for entry in entries)
            dates = " to ".join(dict.fromkeys([began[0], began[-1]]))
            rows.append([f"`{name}.csv`", f"`{command}`", shards, ", ".join(commits), device, version, dates])
    return _table(["table", "command", "shards", "commits", "on", "JAX", "began (UTC)"], rows)


def _options(command: str) -> frozenset[str]:
    """Return the options of a command without its shard, to recognize the same command in another order.

    >>> _options("python -m x --epochs 1 2 --shard 0/2 --seed 3") == _options("python -m x --seed 3 --epochs 1 2")
    True
    """
    return frozenset(option.strip() for option in _SHARD.sub("", command).split(" --"))


def _part(shard: str) -> tuple[int, int]:
    part, whole = shard.split("/")
    return int(whole), int(part)


_table = markdown.table


if __name__ == "__main__":
    sys.exit(main())
