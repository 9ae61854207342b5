"""A table is kept only from the study that was planned for it."""

import dataclasses
import json
from pathlib import Path

import pandas as pd
import pytest

from experiments.cli import commands
from experiments.jumpstart_grid.config import Grid
from experiments.reproduction import __main__ as reproduction
from experiments.reproduction import arms, ledger

STUDIES = [name for name in arms.STUDIES if (ledger.FOLDER / f"{name}.csv").exists()]
GRIDS = [name for name in arms.GRIDS if (ledger.FOLDER / f"{name}.csv").exists()]


def test_every_table_has_a_plan_except_that_of_an_earlier_version():
    names = {*reproduction._RECALLS, *reproduction._EXPLAINING, *reproduction._GRIDS, *reproduction._PRUNED}
    assert names - {"prune-and-jumpstart"} == {*arms.STUDIES, *arms.GRIDS}


@pytest.mark.parametrize("name", STUDIES)
def test_the_committed_networks_have_the_planned_settings(name):
    planned = arms.STUDIES[name]
    known = json.loads((ledger.FOLDER / f"{name}.json").read_text())["settings"]
    found = {
        "dataset": known["data"]["dataset"],
        "selection": known["data"]["selection"],
        "label_noise": known["data"].get("label_noise", 0.0),
        "limit": known["data"]["limit"],
        "model": known["model"],
        "epochs": tuple(known["recipe"]["epochs"]),
        "lr": tuple(known["recipe"]["learning_rates"]),
        "batch": known["recipe"]["batch"],
        "weight_decay": known["recipe"]["weight_decay"],
        "jumpstart": (known["recipe"]["jumpstart"],),
        "finetune_epochs": tuple(known["pruning"]["recipe"]["epochs"]),
        "finetune_lr": tuple(known["pruning"]["recipe"]["learning_rates"]),
        "rounding": known["pruning"].get("rounding"),
        "min_keep": known["pruning"].get("min_keep", 0),
        "counting": known["pruning"].get("counting", "exact"),
        "structure": known["pruning"].get("structure", "weights"),
    }
    assert found == {key: getattr(planned, key) for key in found}
    arms.check_study(name, planned, Path("runs"))
    arms.check_ratios(name, pd.read_csv(ledger.FOLDER / f"{name}.csv"), Path("runs"))


@pytest.mark.parametrize("name", GRIDS)
def test_the_committed_grids_are_parts_of_the_planned_ones(name):
    arms.check_grid(name, pd.read_csv(ledger.FOLDER / f"{name}.csv"), arms.GRIDS[name], Path("runs"))


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("mnist-published-paper", {"weight_decay": 0.0}, "weight_decay is 0.0, planned is 0.0005"),
        ("mnist-published-script", {"selection": "validation"}, "selection is 'validation', planned is 'test'"),
        ("mnist-published-script", {"dataset": "fashion_mnist"}, "dataset is 'fashion_mnist', planned is 'mnist'"),
        ("fashion-few-weights", {"min_keep": 10}, "min_keep is 10, planned is 0"),
        ("fashion-few-weights-gradient", {"min_keep": 10}, "min_keep is 10, planned is 0"),
        ("fashion-few-weights-gradient-floor", {"min_keep": 0}, "min_keep is 0, planned is 10"),
        ("fashion-label-noise-10", {"label_noise": 0.203}, "label_noise is 0.203, planned is 0.019"),
        ("cifar10-resnet20-short", {"epochs": (1,)}, "epochs is (1,), planned is (15,)"),
        ("fashion-lenet", {"limit": 1000}, "limit is 1000, planned is None"),
    ],
)
def test_a_study_with_other_settings_is_refused_by_name(name, change, words, tmp_path):
    study = dataclasses.replace(arms.STUDIES[name], **change)
    content = {"study": commands.to_json(study), "running": {}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is not the study of") as refused:
        reproduction.keep(tmp_path, name)
    assert str(refused.value) == f"{tmp_path} is not the study of {name}.csv: {words}"


def test_more_epochs_on_cifar_are_part_of_the_plan():
    more = dataclasses.replace(arms.STUDIES["cifar10-resnet20-short"], epochs=(20,))
    arms.check_study("cifar10-resnet20-short", more, Path("runs"))


def test_a_study_without_one_of_the_ratios_is_refused():
    networks = pd.read_csv(ledger.FOLDER / "fashion-published-paper.csv")
    with pytest.raises(ValueError, match=r"runs has no network at t = 42.1276, which mnist-published-paper.csv needs"):
        arms.check_ratios("mnist-published-paper", networks[networks["ratio"] < 42], Path("runs"))
    without_control = networks[networks["score"] != "control"]
    with pytest.raises(ValueError, match=r"no network at t = 1, which"):
        arms.check_ratios("mnist-published-paper", without_control, Path("runs"))
    gradient = pd.DataFrame({"score": "gradient", "ratio": [2.0, 4.0, 10.0, 20.0]})
    with pytest.raises(ValueError, match=r"no network at t = 50, which"):
        arms.check_ratios("cifar10-resnet20-gradient", gradient, Path("runs"))
    arms.check_ratios("cifar10-resnet20-gradient", pd.concat([gradient, gradient.assign(ratio=50.0)]), Path("runs"))


@pytest.mark.parametrize(
    ("name", "table", "words"),
    [
        ("moons-seeds-u", "moons-seeds", "method is ['UP', 'relu'], planned is ['U']"),
        ("mnist-grid", "mnist-grid-50", "epochs is [50], planned is [10]"),
        ("mnist-grid-50", "mnist-grid", "epochs is [10], planned is [50]"),
        ("mnist-pruned", "moons-pruned", "dataset is ['moons'], planned is ['mnist']"),
    ],
)
def test_another_grid_is_refused_by_name(name, table, words, tmp_path):
    cells = "pruned.csv" if name.endswith("pruned") else "cells.csv"
    (tmp_path / cells).write_bytes((ledger.FOLDER / f"{table}.csv").read_bytes())
    with pytest.raises(ValueError, match="is not the study of") as refused:
        reproduction.keep(tmp_path, name)
    assert words in str(refused.value)


def test_a_grid_with_another_coefficient_of_the_penalty_is_refused():
    cells = pd.read_csv(ledger.FOLDER / "moons-seeds.csv")
    other: Grid = dataclasses.replace(arms.GRIDS["moons-seeds"], coefficient=1e-3)
    with pytest.raises(ValueError, match=r"coefficient is 0.001, planned is 0.0001$"):
        arms.check_grid("moons-seeds", cells, other, Path("runs"))


def test_pruned_networks_without_one_of_the_ratios_are_refused():
    cells = pd.read_csv(ledger.FOLDER / "moons-pruned.csv")
    with pytest.raises(ValueError, match=r"ratio is \[1.0, 1.5, 2.0, 4.0\], planned is \[1.0, 1.5, 2.0, 4.0, 10.0\]"):
        arms.check_grid("moons-pruned", cells[cells["ratio"] < 10], None, Path("runs"))
