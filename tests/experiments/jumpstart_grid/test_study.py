"""The command line of the jumpstart studies: plans, stages that resume, and the thin engine behind it."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pandas as pd
import pytest

from experiments.jumpstart_grid import __main__ as jumpstart_grid
from experiments.jumpstart_grid import cells, moons, presets, runner, thin_networks
from experiments.jumpstart_grid.config import Grid, GridRunning
from experiments.jumpstart_grid.thin_stack import Architecture
from experiments.storage import provenance, store

TINY = ("--epochs", "6", "--depths", "2", "--widths", "2", "3", "--groups", "2-3")
TRAINS = pytest.mark.optax_promotes


def _run(out, *options):
    return jumpstart_grid.main([*options, "--out", str(out)])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The results of a tiny grid that has been run to its end."""
    folder = tmp_path_factory.mktemp("grid") / "whole"
    assert _run(folder, *TINY) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "networks"), [("moons", 702), ("moons-subset", 72), ("moons-seeds", 1170), ("moons-layers", 180)]
)
def test_the_moons_presets_plan_every_cell_once(name, networks):
    planned = moons.plan(presets.get(name))
    each = [
        (stage.settings["layer"], stage.settings["method"], stage.settings["depth"], width, seed)
        for stage in planned
        for width in stage.settings["widths"]
        for seed in stage.seeds
    ]
    assert len(each) == len(set(each)) == networks


@pytest.mark.parametrize(
    ("name", "stages"), [("mnist", 90), ("cifar10", 210), ("cifar10-notebook", 21), ("cifar100", 80), ("uci", 20)]
)
def test_the_other_presets_plan_every_network(name, stages):
    grid = presets.get(name)
    planned = runner.ENGINES[grid.kind].plan(grid)
    assert len(planned) == len({(cells.GridStage(*stage).title, stage.seeds.start) for stage in planned}) == stages


def test_every_preset_is_described():
    text = presets.listing()
    assert all(f"{name}\n" in text for name in presets.names())
    assert max(map(len, presets.listing(80).splitlines())) <= 80


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"seeds": 0}, "seeds=0 must be at least 1"),
        ({"kind": "moon"}, "kind='moon' must be one of 'moons', 'images', 'tables'"),
        ({"lr": [float("nan")]}, r"lr=\[nan\] must be finite"),
        ({"widths": ()}, r"widths=\(\) must be one or more values, each given once"),
        ({"depths": (0,)}, r"depths=\(0,\) must be positive"),
        ({"coefficient": -1.0}, "coefficient=-1.0 must not be negative"),
        ({"lr": (float("nan"),)}, r"lr=\(nan,\) must be finite"),
        ({"prune": (1.0, 2.0)}, r"prune=\(1.0, 2.0\) must be ratios above 1"),
        ({"prune": (2.0, 2.0)}, "must be one or more values, each given once"),
        ({"prune": (2.0,), "kind": "tables"}, "kind='tables' does not prune"),
        ({"shapes": ("20",)}, "'20' must be DEPTHxWIDTH"),
        ({"shapes": ("20x8", "20x8")}, "must be one or more values, each given once"),
    ],
)
def test_invalid_settings_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        Grid(**options)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"methods": ("gelu",)}, "'gelu' must be one of relu"),
        ({"methods": ("UP:x",)}, "the coefficient after the colon must be a finite number"),
        ({"methods": ("UP:inf",)}, "the coefficient after the colon must be a finite number"),
        ({"methods": ("relu:0.1",)}, "'relu' has no penalty and takes no coefficient"),
        ({"groups": ("1-5", "5-9")}, "width 5 is in 2 of them"),
        ({"groups": ("a-b",)}, "'a-b' must be WIDTH or FROM-TO"),
        ({"groups": ("5-1",)}, "'5-1' must be WIDTH or FROM-TO, such as 2-5"),
        ({"lr": (0.1, 0.2)}, "must be one value"),
        ({"datasets": ("digits",)}, r"datasets=\('digits',\) must be moons"),
    ],
)
def test_moons_settings_that_cannot_be_planned_are_refused(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        moons.plan(Grid(**options))


def test_an_unknown_preset_ends_with_an_error_and_not_a_traceback(capsys):
    assert jumpstart_grid.main(["--preset", "nothing"]) == 1
    assert "preset='nothing' is unknown; known: moons-subset" in capsys.readouterr().err


def test_a_preset_that_moved_names_its_successor(capsys):
    assert jumpstart_grid.main(["status", "--preset", "prune-and-jumpstart"]) == 1
    assert "--preset digits-finetune-jumpstart" in capsys.readouterr().err


def test_a_network_without_penalty_is_the_same_stage_whatever_lambda_is():
    settings = [moons.plan(Grid(methods=("relu",), coefficient=c))[0].settings for c in (0.1, 0.2)]
    assert settings[0] == settings[1]
    assert moons.plan(Grid(methods=("UP:0.5",)))[0].settings["coefficient"] == 0.5


def test_stages_of_another_version_of_the_program_are_other_stages(tmp_path, monkeypatch):
    grid = Grid(methods=("UP",), widths=(2,), depths=(2,))
    (stage,) = moons.plan(grid)
    runner.keep(tmp_path, grid, stage, {"cells": {"replicate": [0]}})
    assert runner.missing(tmp_path, grid, moons.plan(grid)) == []
    monkeypatch.setattr(moons, "VERSION", moons.VERSION + 1)
    assert len(runner.missing(tmp_path, grid, moons.plan(grid))) == 1


def test_the_count_of_parameters_is_the_size_of_the_thin_arrays():
    for layer in ("conv", "dense"):
        arch = Architecture(3, 4, train=85, layer=layer)
        runs = [thin_networks.ThinRun(4, 0)]
        weights = jax.tree.leaves(thin_networks.start(arch, thin_networks.ThinRecipe(), runs).weights)
        assert moons.parameters(arch, 4) == sum(weight.size for weight in weights)


def test_the_help_names_every_method_of_every_kind(capsys):
    with pytest.raises(SystemExit):
        jumpstart_grid.main(["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for kind, engine in runner.ENGINES.items():
        listed = shown.split("Methods, each ")[1].split(f"{kind}: ")[1].split(". ")[0]
        names = set(re.sub(r"\(.*?\)", "", listed).replace(",", " ").split())
        assert names == set(engine.METHODS)


@TRAINS
def test_a_run_stores_and_reports_every_cell(tmp_path, capsys):
    (tmp_path / "pruned.csv").write_text("of another grid")
    assert _run(tmp_path, *TINY) == 0
    assert not (tmp_path / "pruned.csv").exists()
    printed = capsys.readouterr().out
    assert "moons, UP: training accuracy" in printed
    assert "ours / published" not in printed  # the published grid has no network of depth 2
    table = pd.read_csv(tmp_path / "cells.csv")
    assert set(zip(table["method"], table["width"], strict=True)) == {("relu", 2), ("relu", 3), ("UP", 2), ("UP", 3)}
    accuracies = table[["train_acc", "val_acc", "train_acc_last", "val_acc_last"]]
    assert ((accuracies >= 0) & (accuracies <= 1)).to_numpy().all()
    assert (table["train_acc"] >= table["train_acc_last"]).all()
    assert (table["val_acc"] >= table["val_acc_last"]).all()
    np.testing.assert_allclose(table["floor"], 44 / 85, atol=1e-6)
    assert {path.name for path in tmp_path.glob("*.png")} >= {"moons-train.png", "moons-val.png", "units-up-conv.png"}
    (made,) = provenance.notes(tmp_path)
    assert made["command"].startswith("experiments.jumpstart_grid, called from Python")
    capsys.readouterr()
    assert _run(tmp_path, "status", *TINY) == 0
    assert capsys.readouterr().out.count("1 of 1  ") == 2
    assert jumpstart_grid.main(["status", "--out", str(tmp_path)]) == 0  # the options are those of the run
    assert capsys.readouterr().out.count("1 of 1  ") == 2
    assert jumpstart_grid.main(["status", "--all", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.startswith("grid 0: moons, methods relu, UP, 6 epochs")
    (tmp_path / "config.json").unlink()
    shutil.rmtree(tmp_path / "studies")
    assert _run(tmp_path, "status", "--all", *TINY) == 0
    assert capsys.readouterr().out.count("1 of 1  ") == 2
    (tmp_path / "config.json").write_text("[]")
    assert jumpstart_grid.main(["report", "--out", str(tmp_path)]) == 1
    assert "config.json cannot be read" in capsys.readouterr().err


@TRAINS
@pytest.mark.slow
def test_trained_networks_are_pruned_and_those_of_a_grid_without_pruning_are_other_stages(tmp_path, capsys):
    small = ("--epochs", "6", "--depths", "2", "--widths", "2", "--methods", "relu-bn", "UP")
    assert _run(tmp_path, *small, "--prune", "1.5", "10") == 0
    assert "Networks with a training accuracy of .9 after magnitude pruning" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "pruned.csv")
    assert table["ratio"].tolist() == [1, 1.5, 10] * 2
    assert set(table["prunable"]) == {2 * 2 * 1 + 2 * 2 * 2}, "two taps of 2 x 1 weights, then of 2 x 2"
    assert table["kept"].tolist() == [12, 8, 1] * 2
    assert table["train_acc"].between(0.3, 1).all()
    settings = [moons.plan(Grid(prune=ratios))[0].settings for ratios in ((), (2.0,))]
    assert "prune" not in settings[0], "the stages that are stored keep their names"
    assert settings[1]["prune"] == [2.0]


@pytest.mark.parametrize("name", ["moons-pruned", "mnist-pruned"])
def test_the_pruned_presets_have_three_methods_four_sizes_and_five_seeds(name):
    grid = presets.get(name)
    planned = runner.ENGINES[grid.kind].plan(grid)
    count = sum(len(stage.seeds) * len(stage.settings.get("widths", [1])) for stage in planned)
    assert count == 3 * 4 * 5
    assert {tuple(stage.settings["prune"]) for stage in planned} == {(1.5, 2, 4, 10)}
    assert {stage.settings["method"] for stage in planned} == {"relu", "relu-bn", "UP"}


@TRAINS
@pytest.mark.slow
def test_a_report_from_the_written_table_says_the_same_as_one_from_the_store(whole, tmp_path):
    assert _run(tmp_path, "report", *TINY, "--table", str(whole / "cells.csv")) == 0
    assert (whole / "report.md").read_bytes() == (tmp_path / "report.md").read_bytes()


@TRAINS
def test_a_stopped_run_resumes_and_gives_the_same_numbers(whole, tmp_path, monkeypatch, capsys):
    def once(grid, stage, advance, kept, carry_out=moons.carry_out):
        if stage.settings["method"] == "UP":
            raise RuntimeError("the power is gone")
        return carry_out(grid, stage, advance, kept)

    monkeypatch.setattr(moons, "carry_out", once)
    assert _run(tmp_path / "parts", *TINY) == 1
    assert "the power is gone" in capsys.readouterr().err
    monkeypatch.undo()
    command, again = jumpstart_grid.parse([*TINY, "--out", str(tmp_path / "parts")]), []
    lost = {
        stage.title
        for stage in moons.plan(command.grid)
        if store.missing(command.folder / "store", "moons", stage.settings, stage.seeds)
    }
    monkeypatch.setattr(moons, "carry_out", functools.partial(_noting, again, moons.carry_out))
    assert _run(tmp_path / "parts", *TINY) == 0
    assert set(again) == lost
    assert len(again) == len(lost)
    one, other = (pd.read_csv(f / "cells.csv").drop(columns="seconds") for f in (whole, tmp_path / "parts"))
    pd.testing.assert_frame_equal(one, other)


def _noting(titles, carry_out, grid, stage, *rest):
    titles.append(stage.title)
    return carry_out(grid, stage, *rest)


def test_shards_share_the_stages_out(tmp_path, monkeypatch):
    done = []

    def noted(grid, stage, advance, kept):
        done.append(stage.title)
        columns = {"dataset": "moons", "method": "relu", "replicate": 0, "width": 2, "depth": 2, "layer": "conv"}
        return {"cells": {k: [v] for k, v in columns.items()}, "statuses": {k: [v] for k, v in columns.items()}}

    monkeypatch.setattr(moons, "carry_out", noted)
    monkeypatch.setattr(runner, "report", lambda *_: None)
    for shard in ("0/3", "1/3", "2/3"):
        assert _run(tmp_path / shard[0], "--shard", shard) == 0
    assert sorted(done) == sorted(stage.title for stage in moons.plan(presets.get("moons-subset")))


def test_no_stage_begins_when_the_minutes_are_over(tmp_path, capsys):
    assert _run(tmp_path, *TINY, "--minutes", "0") == 1
    assert "2 of 2 stages" in capsys.readouterr().err


@TRAINS
def test_dropout_ends_where_its_rate_is_zero(monkeypatch):
    """UP-zero trains in two phases, with dropout and without, for the requested number of epochs."""
    monkeypatch.setattr(moons, "DROPOUT_EPOCHS", 3)
    phases = []
    lower = thin_networks.train.lower

    class Noting:
        def lower(self, arch, recipe, epochs, state, problem):
            phases.append((recipe.dropout, epochs))
            return lower(arch, recipe, epochs, state, problem)

    monkeypatch.setattr(thin_networks, "train", Noting())
    grid = Grid(methods=("UP-zero",), widths=(2,), depths=(2,), epochs=5)
    worked = []
    tables = moons.carry_out(GridRunning(), moons.plan(grid)[0], worked.append)
    assert phases == [(True, 3), (False, 2)]
    assert sum(worked) == moons.plan(grid)[0].work == 10
    assert np.isfinite(tables["cells"]["loss_last"]).all()
    assert np.asarray(tables["statuses"]["units"]).shape == (1, 4)


def test_only_methods_with_dropout_have_a_new_version():
    """Their networks depended on the other networks of the program; those of the other methods did not change."""
    versions = {s.settings["method"]: s.settings["version"] for s in moons.plan(Grid(methods=tuple(moons.METHODS)))}
    assert versions == {**dict.fromkeys(moons.METHODS, 3), "UP-zero": 4}


@TRAINS
def test_the_train_step_lowers_for_accelerators():
    arch = Architecture(3, 3, train=85, penalized=("unit", "point"))
    runs = [thin_networks.ThinRun(3, 0), thin_networks.ThinRun(2, 0)]
    problem = thin_networks.Problem(*moons.points(), thin_networks.real_channels(arch, runs))
    recipe = thin_networks.ThinRecipe(dropout=True)
    step = functools.partial(thin_networks.train, arch, recipe, 2)
    state = thin_networks.start(arch, recipe, runs)
    exported = jax.export.export(jax.jit(step), platforms=["cpu", "cuda", "tpu"])(state, problem)
    assert exported.platforms == ("cpu", "cuda", "tpu")


KILLED = """
import os, signal, sys
from experiments.jumpstart_grid import __main__ as jumpstart_grid
from experiments.jumpstart_grid import runner
keep = runner.keep

def keep_and_die(*stage):
    keep(*stage)
    os.kill(os.getpid(), signal.SIGKILL)

runner.keep = keep_and_die
jumpstart_grid.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_a_killed_process_resumes_and_gives_the_same_numbers(tmp_path):
    """It is killed when the first of four stages is stored; on another core, a second one is computed at that time."""
    options = ("--epochs", "400", "--depths", "2", "4", "--widths", "2", "3", "5")
    command = [sys.executable, "-m", "experiments.jumpstart_grid", *options, "--out"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": {**os.environ, "XLA_FLAGS": ""}}
    subprocess.run([*command, str(tmp_path / "whole")], check=True, **quiet)
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, *options, "--out", str(tmp_path / "parts")], check=False, **quiet
    )
    assert killed.returncode == -signal.SIGKILL
    stored = len(list(tmp_path.glob("parts/store/*/00000-00001")))
    assert 0 < stored < 4
    subprocess.run([*command, str(tmp_path / "parts")], check=True, **quiet)
    whole, parts = (pd.read_csv(tmp_path / name / "cells.csv").drop(columns="seconds") for name in ("whole", "parts"))
    pd.testing.assert_frame_equal(whole, parts)


def test_a_run_says_once_that_it_waits_for_stages_of_another_run(whole, tmp_path, monkeypatch, capsys):
    """Another run has claimed the last two stages, and stores them when this run has looked several times."""
    shutil.copytree(whole, tmp_path / "run")
    absent = sorted(path.parent for path in (tmp_path / "run" / "store").rglob("manifest.json"))[:2]
    for number, path in enumerate(absent):
        shutil.move(path, tmp_path / f"elsewhere-{number}")
        claim = path.with_name(f"{path.name}.claim")
        claim.touch()
        os.utime(claim, (time.time() + 86_400,) * 2)  # it does not expire
    looks = []

    def other_run(seconds):
        looks.append(seconds)
        if len(looks) == 6:
            for number, path in enumerate(absent):
                shutil.move(tmp_path / f"elsewhere-{number}", path)

    monkeypatch.setattr(runner, "time", types.SimpleNamespace(sleep=other_run, monotonic=time.monotonic))
    assert _run(tmp_path / "run", *TINY) == 0
    assert capsys.readouterr().out.count("waiting for another run, which computes ") == 1
    assert len(looks) >= 6
