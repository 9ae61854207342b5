"""Tables and figures of the jumpstart studies, against counts made by hand and the notes' summary."""

import io
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from rich.console import Console

from experiments.jumpstart_grid import __main__ as jumpstart_grid
from experiments.jumpstart_grid import figures, report
from experiments.jumpstart_grid.config import Grid


def _cells(**columns):
    table = pd.DataFrame(columns)
    count = len(table)
    filled = {
        "dataset": "moons", "method": "relu", "width": 2, "depth": 10, "replicate": np.arange(count), "floor": 44 / 85,
        "train_acc": 0.5, "val_acc": 0.5, "train_acc_last": 0.5, "val_acc_last": 0.5,
        "unit_dead": 0.0, "unit_linear": 0.0, "point_dead": 0.0,
    }  # fmt: skip
    return table.assign(**{name: value for name, value in filled.items() if name not in table})


@pytest.mark.parametrize(
    ("method", "means", "val_90", "val_solved"),
    [
        ("relu", ".596 / .497", 14, 14),
        ("relu-bn", ".816 / .757", 24, 12),
        ("P", ".748 / .685", 26, 21),
        ("U", ".931 / .818", 32, 23),
        ("UP", ".923 / .843", 49, 38),
        ("UP-zero", ".859 / .765", 33, 25),
    ],
)
def test_shares_of_the_published_grid_are_those_of_its_summary(method, means, val_90, val_solved):
    """The paper's table: mean training / validation, and how many of 117 cells reach .9 and .99."""
    theirs = report.published("moons")
    same = theirs[theirs["method"] == method]
    ours = _cells(**{name: same[name].to_numpy() for name in ("method", "width", "depth", "train_acc", "val_acc")})
    printed = report.shares("moons", report.label(ours), theirs)
    mine, published = (dict(zip(printed.header[:-1], row[:-1], strict=True)) for row in printed.rows)
    assert mine["mean train / val"] == published["mean train / val"] == means
    assert mine["networks"] == published["networks"] == "117"
    cut = lambda count: f"{np.floor(100 * count / 117) / 100:.2f}"[1:]
    assert mine["val >= .9"].split(" ")[0] == cut(val_90)
    assert mine["val >= .99"].split(" ")[0] == cut(val_solved)


def test_sizes_on_which_seeds_disagree_are_counted_and_those_against_the_published_network():
    """Two of four sizes differ between seeds, one agrees with the published network and one does not."""
    accuracies = [0.95, 0.5, 0.5, 0.9, 0.99, 0.99, 0.6, 0.6]
    ours = _cells(
        method=["UP"] * 8, width=[1, 1, 2, 2, 3, 3, 4, 4], depth=[1] * 8, replicate=[0, 1] * 4,
        train_acc=accuracies, val_acc=accuracies,
    )  # fmt: skip
    theirs = pd.DataFrame({"method": "UP", "width": [4, 3, 2, 1], "depth": 1, "train_acc": [0.95, 0.92, 1.0, 0.5]})
    (printed,) = report.seeds("moons", report.label(ours), theirs)
    assert printed.rows == [["UP", "4", "2", "1"]]
    one = ours[ours["replicate"] == 0]
    assert report.seeds("moons", report.label(one), theirs) == []
    assert report.seeds("moons", report.label(ours), None) == []


def test_intervals_are_wilson_s():
    """5 of 10: (.5 +- 1.96 sqrt(.25 / 10 + 1.96^2 / 400)) / (1 + 1.96^2 / 10), the centre kept at .5."""
    half = 1.959964 * np.sqrt(0.25 / 10 + 1.959964**2 / 400) / (1 + 1.959964**2 / 10)
    low, high = (f"{np.floor(100 * x) / 100:.2f}"[1:] for x in (0.5 - half, 0.5 + half))
    assert report._share(pd.Series([True, False] * 5)) == f".50 [{low}, {high}]"


@pytest.mark.parametrize(("value", "text"), [(0.999, ".99"), (1.0, "1.00"), (0.7, ".70"), (0.29, ".29"), (0.0, ".00")])
def test_numbers_are_cut_so_that_only_one_reads_as_one(value, text):
    assert report._number(value) == text


def test_published_cells_follow_ours_and_gaps_stay_blank():
    ours = _cells(method=["UP", "UP"], width=[2, 7], depth=[60, 10], train_acc=[0.75, 0.25])
    first = next(report.by_size("moons", report.label(ours), report.published("moons")))
    assert first.header == ["depth \\ width", "2", "7"]
    theirs = report.published("moons").query("method == 'UP' and width == 2 and depth == 60")
    assert theirs["train_acc"].item() == 1.0
    assert first.rows == [["10", " / ", ".25 / "], ["60", ".75 / 1.00", " / "]]


def test_methods_are_labeled_by_form_and_rate_if_there_are_several():
    table = _cells(layer=["conv", "dense"], lr=[0.1, 0.1])
    assert list(report.label(table)["label"]) == ["relu, conv", "relu, dense"]


def test_wins_draws_and_losses_are_counted_over_data_sets_and_seeds():
    table = _cells(
        dataset=["iris"] * 4 + ["wine"] * 2,
        method=["baseline", "skip"] * 3,
        replicate=[0, 0, 1, 1, 0, 0],
        val_acc=[0.5, 0.9, 0.6, 0.6, 0.4, 0.8],
    )
    pairs, means = report.contest(report.label(table))
    assert pairs.rows == [["baseline", "", "0-1-2"], ["skip", "2-1-0", ""]]
    # Convergence: mean over data sets of own minus best: ((.55 - .75) + (.4 - .8)) / 2.
    assert means.rows == [["baseline", ".55", ".40", ".00", "-0.300"], ["skip", ".75", ".80", "1.00", "0.000"]]


def test_networks_of_several_sizes_are_compared_size_by_size():
    table = _cells(
        method=["baseline", "skip"] * 3,
        replicate=[0] * 6,
        depth=[10, 10, 20, 20, 30, 30],
        val_acc=[0.9, 0.8, 0.9, 0.8, 0.2, 0.8],  # by its mean skip would win
    )
    pairs, means = report.contest(report.label(table))
    assert pairs.title == "Wins-draws-losses of the row against the column, data sets x sizes x seeds"
    assert pairs.rows == [["baseline", "", "2-0-1"], ["skip", "1-0-2", ""]]
    assert means.header[0] == "mean over sizes and seeds"
    assert [row[1] for row in means.rows] == [".66", ".80"]


@pytest.mark.parametrize(
    ("datasets", "measured"), [(["iris", "iris", "wine"], True), (["iris", "wine", "wine"], False)]
)
def test_a_technique_may_lack_a_data_set_while_a_run_is_incomplete(datasets, measured):
    table = _cells(
        dataset=datasets, method=["baseline", "skip", "skip"], replicate=[0, 0, 1], val_acc=[0.5, 0.75, 0.25]
    )
    _, means = report.contest(report.label(table))
    more = [[".00", "-0.250"], ["1.00", "0.000"]] if measured else [[], []]
    skip = [".75", ".25"] if measured else ["", ".50"]
    assert means.rows == [["baseline", ".50", "", *more[0]], ["skip", *skip, *more[1]]]
    assert len(means.header) == len(means.rows[0])


def test_the_best_method_of_each_size_is_found_and_counted_against_relu_at_its_rate():
    """Two sizes. At (10, 2) norm wins at .1; at (10, 4) relu at .1 and norm at .01 tie, and norm at .1 has not run."""
    names = [("relu", 0.1), ("norm:1", 0.1), ("relu", 0.01), ("norm:1", 0.01)]
    accuracies = {2: [0.5, 0.75, 0.5, 0.25], 4: [0.75, None, 0.5, 0.75]}
    rows = [(m, lr, w, a) for w, row in accuracies.items() for (m, lr), a in zip(names, row, strict=True) if a]
    table = _cells(
        **{
            name: list(column)
            for name, column in zip(["method", "lr", "width", "val_acc"], zip(*rows, strict=True), strict=True)
        }
    )
    counts, sizes = report.best("cifar10", report.label(table.assign(replicate=0)))
    assert counts.rows == [
        ["relu, lr 0.1", "2", "1", ""],
        ["norm:1, lr 0.1", "1", "1", "1 of 1"],
        ["relu, lr 0.01", "2", "0", ""],
        ["norm:1, lr 0.01", "2", "1", "1 of 2"],
    ]
    assert sizes.rows == [["10", ".75 norm:1, lr 0.1", ".75 relu, lr 0.1, norm:1, lr 0.01"]]
    assert report.best("cifar10", report.label(table[table["method"] == "none"])) == []


def test_the_published_cifar_cells_are_compared_with_ours():
    theirs = report.published("cifar10")
    assert len(theirs) == 18
    ours = _cells(dataset="cifar10", method=["UP"], width=[10], depth=[40], train_acc=[0.7], val_acc=[0.5])
    train, val, _ = report.by_size("cifar10", report.label(ours), theirs)
    assert (train.title, train.rows) == ("cifar10, UP: training accuracy, ours / published", [["40", ".70 / .68"]])
    assert val.rows == [["40", ".50 / .53"]]


def test_alpha_of_pruned_networks_is_the_audit_s():
    """Dense networks classify 9 and 7 of 10 correctly, pruned ones 7 and 5: jprune.recall gives alpha 4/3."""
    rows = [("dense", 1.0, "9 7", 0.0), ("baseline", 2.0, "7 5", 0.25), ("jumpstart", 2.0, "7 5", 0.5)]
    table = pd.DataFrame(
        [
            {"dataset": "digits", "method": m, "ratio": r, "replicate": seed, "right": right, "support": "10 10",
             "test_acc": 0.6, "unit_dead": dead, "unit_dead_before": 0.0, "unit_linear": 0.0}
            for m, r, right, dead in rows for seed in (0, 1, 2)
        ]
    )  # fmt: skip
    summary, paired = report.pruning(table)
    assert [row[-1] for row in summary.rows] == ["", "1.333 +- 0.000", "1.333 +- 0.000"]
    assert paired.rows[0][2].startswith("+0.250")
    (alone,) = report.pruning(table[table["method"] != "jumpstart"])
    assert alone.rows == summary.rows[:2]


def test_everything_that_is_printed_is_written_as_markdown(tmp_path):
    table = _cells(method=["relu", "UP"], train_acc=[0.6, 0.9])
    out = io.StringIO()
    report.write(tmp_path, Grid(), table, None, Console(file=out, width=200))
    text = (tmp_path / "report.md").read_text()
    assert "| UP |" in text
    assert text.count("**moons") == out.getvalue().count("moons")
    assert (tmp_path / "moons-train.png").stat().st_size > 10_000


def test_figures_of_a_data_set_from_a_file_are_in_the_folder(tmp_path):
    table = _cells(method=["relu"], dataset="npz:../../data/my.npz")
    report.write(tmp_path / "out", Grid(), table, None, Console(file=io.StringIO()))
    names = ["npz-..-..-data-my.npz-train.png", "npz-..-..-data-my.npz-val.png", "report.md"]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == names
    assert {path.parent.name for path in tmp_path.rglob("*.*") if path.is_file()} == {"out"}


def test_heat_maps_have_a_panel_for_ours_and_one_for_the_published_grid():
    table = report.label(_cells(method=["relu", "UP"], train_acc=[0.599, 1.0]))
    figure = figures.heat_maps("moons", table, report.published("moons"), "train_acc", 0.5)
    panels = [axes for axes in figure.axes if axes.get_title()]
    assert [axes.get_title() for axes in panels] == ["relu: here", "relu: published", "UP: here", "UP: published"]
    assert [text.get_text() for text in panels[0].texts] == [".59"]
    assert [text.get_text() for text in panels[2].texts] == ["1.00"]


def test_accuracy_against_parameters_has_a_panel_a_method_with_its_networks_before_the_others():
    table = _cells(method=["relu", "UP", "UP"], parameters=[10, 20, 40], val_acc=[0.5, 0.75, 1.0])
    figure = figures.accuracy_against_parameters("moons", report.label(table))
    drawn = {axes.get_title(): axes.collections[-1].get_offsets().tolist() for axes in figure.axes}
    assert drawn == {"relu": [[10, 0.5]], "UP": [[20, 0.75], [40, 1.0]]}


def test_status_maps_are_of_the_deepest_and_widest_network():
    table = pd.DataFrame(
        {
            "method": ["UP"] * 2, "layer": ["conv"] * 2, "replicate": [0, 0], "width": [2, 3], "depth": [2, 2],
            "units": [[1] * 4, [-1, 0, 1, 1, 1, 1]], "points": [[1] * 6, [1] * 6],
        }
    )  # fmt: skip
    made = figures.of_statuses(table)
    assert set(made) == {"units-up-conv", "points-up-conv"}
    assert made["units-up-conv"].axes[0].get_title(loc="left") == "Units: UP (conv), depth 2, width 3"


def test_pruned_networks_are_counted_and_their_largest_ratio_is_found():
    """The first reaches .9 at 2 and, after a drop, at 4; the second only before pruning; the third never."""
    accuracies = {0: [0.95, 0.92, 0.8, 0.9], 1: [0.99, 0.8, 0.8, 0.8], 2: [0.89, 0.95, 0.95, 0.95]}
    after = pd.DataFrame(
        {"dataset": "moons", "method": "UP", "depth": 20, "width": 2, "replicate": seed, "ratio": ratio, "train_acc": a}
        for seed, row in accuracies.items()
        for ratio, a in zip((1.0, 2.0, 3.0, 4.0), row, strict=True)
    )
    largest = report.largest_ratio(after)
    assert largest.to_dict() == {("moons", 20, 2, 0, "UP"): 4.0, ("moons", 20, 2, 1, "UP"): 1.0}
    table = report.still_trained(after)
    assert table.header == ["", "networks", "before", "t = 2", "t = 3", "t = 4"]
    assert table.rows == [["moons, UP, depth 20, width 2", "3", "2", "1", "0", "1"]]
    both = pd.concat([after.assign(layer="conv"), after.assign(layer="dense", train_acc=0.0)])
    assert report.still_trained(both).rows == [
        ["moons, UP, conv, depth 20, width 2", "3", "2", "1", "0", "1"],
        ["moons, UP, dense, depth 20, width 2", "3", "0", "0", "0", "0"],
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "table=cells.csv is not a file; check the path"),
        ("", "table=cells.csv cannot be read as CSV: No columns to parse from file; give the cells.csv of a grid"),
        ("a,b\n1,2\n1,2,3\n", r"cannot be read as CSV: Error tokenizing data\. C error: Expected 2 fields in line 3"),
        ("dataset,method,width\nmoons,UP,2\n", "no column depth, epochs, replicate, floor, train_acc, val_acc, tra"),
        (
            "dataset,method,width,depth,epochs,replicate,floor,train_acc,val_acc\nmoons,UP,2,10,5000,0,.52,.9,.8\n",
            "no column train_acc_last, val_acc_last, unit_dead, unit_linear, point_dead; give the cells.csv of a grid",
        ),
    ],
)
def test_a_table_that_is_not_one_of_cells_is_refused(tmp_path, monkeypatch, capsys, content, message):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("cells.csv").write_text(content)
    assert jumpstart_grid.main(["report", "--table", "cells.csv", "--out", "out"]) == 1
    assert re.search(message, capsys.readouterr().err)
    assert jumpstart_grid.main(["--table", "cells.csv", "--out", "out"]) == 1
    assert "table=cells.csv is for the action report; put report before" in capsys.readouterr().err
    assert not Path("out").exists()
