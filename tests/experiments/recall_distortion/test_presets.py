"""Presets, the stages that they plan, and the display of progress."""

import dataclasses
import functools
import io
import json
import re
import time
from concurrent import futures
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from rich.console import Console

import jprune
from experiments.cli import commands, progress
from experiments.data import datasets
from experiments.jumpstart_grid import __main__ as jumpstart_grid
from experiments.models import networks
from experiments.recall_distortion import __main__ as recall_distortion
from experiments.recall_distortion import config, oneshot, placement, plan, presets
from experiments.recall_distortion import study as studies
from experiments.recall_distortion.config import Running, Study
from experiments.recall_distortion.plan import Coefficients, Known, PruningTarget
from experiments.storage import store
from experiments.training import tasks

PAPER = ["mnist-lenet", "fashion-lenet", *(f"cifar10-resnet{d}" for d in (20, 32, 44, 56, 110)), "cifar100-resnet56"]
SHORT = "cifar10-resnet20-short"
FASHION = ["fashion-few-weights", "fashion-few-weights-floor", "fashion-changed"]


def test_there_is_a_preset_for_the_demo_and_every_study_of_the_paper():
    assert sorted(presets.names()) == sorted(["demo", "digits-finetune-jumpstart", SHORT, *FASHION, *PAPER])


@pytest.mark.parametrize("name", ["demo", SHORT, *FASHION[:2], *PAPER])
def test_a_preset_says_command_cost_and_what_to_expect(name):
    lines = presets.describe(name).splitlines()
    assert lines[0].endswith(".")
    command = "make demo" if name == "demo" else f"python -m experiments.recall_distortion --preset {name}"
    assert f"Command: {command}" in lines
    assert any(line.startswith("Cost: ") for line in lines)
    assert any(line.startswith("Expect") and re.search(r"\.\d\d", line) for line in lines)


def test_the_list_of_presets_fits_80_columns_and_its_commands_can_be_pasted():
    text = presets.listing(80)
    assert max(map(len, text.splitlines())) <= 80
    pasted = text.replace(" \\\n    ", " ")
    for name in PAPER:
        assert f"\n  Command: python -m experiments.recall_distortion --preset {name}\n  Cost: " in pasted


@pytest.mark.parametrize("name", PAPER)
def test_settings_are_those_of_the_paper(name):
    study = presets.get(name)
    assert study.replicates == 30
    assert set(study.ratios) == {1, 2, 4, 10, 20, 50}
    assert (study.batch, study.momentum, study.nesterov, study.weight_decay) == (128, 0.9, True, 5e-4)
    assert (study.gradient_batches, study.gradient_mode, study.undecayed_epsilon) == (1, "train", 5e-4)
    dense, finetune = plan.dense_recipe(study, 0.0), plan.finetune_recipe(study)
    if "lenet" in name:
        assert (dense.epochs, dense.learning_rates) == ((30,), (0.01,))
        assert (finetune.epochs, finetune.learning_rates) == ((15,), (0.01,))
        assert not study.augment
    else:
        assert list(zip(dense.epochs, dense.learning_rates, strict=True)) == [
            (10, 0.01), (20, 0.1), (10, 0.01), (10, 0.001), (10, 0.0001),
        ]  # fmt: skip
        assert list(zip(finetune.epochs, finetune.learning_rates, strict=True)) == [
            (10, 0.1), (5, 0.01), (5, 0.001), (5, 0.0001),
        ]  # fmt: skip
        assert study.augment


def test_the_short_schedule_of_cifar_is_the_planned_one():
    study = presets.get(SHORT)
    assert (study.dataset, study.model, study.batch, study.augment) == ("cifar10", "resnet20", 128, True)
    assert (study.epochs, study.lr, study.finetune_epochs, study.finetune_lr) == ((15,), (0.1,), (2,), (0.025,))
    assert (study.momentum, study.nesterov, study.weight_decay) == (0.9, True, 5e-4)
    assert study.ratios == (1, 2, 4, 10, 20, 50)
    assert study.scores == ("magnitude", "undecayed")
    assert plan.dense_recipe(study, 0.0).schedule == plan.finetune_recipe(study).schedule == "one-cycle"


def test_few_weights_are_exact_counts_of_lenet():
    study = presets.get("fashion-few-weights")
    params = jax.eval_shape(
        lambda: nnx.state(
            networks.create("lenet", num_classes=10, input_shape=(28, 28, 1), rngs=nnx.Rngs(0)), nnx.Param
        )
    )
    counts = [jprune.keep_count(params, ratio=ratio, where=oneshot.PRUNABLE) for ratio in study.ratios[1:]]
    assert counts == [1200, 600, 350, 250, 125, 60]
    assert presets.get("fashion-few-weights-floor") == dataclasses.replace(study, min_keep=10)


def test_label_noise_changes_a_fraction_of_the_training_labels_and_nothing_else():
    clean, noisy = (plan.load(Study(label_noise=noise)) for noise in (0.0, 0.25))
    changed = clean.train.labels != noisy.train.labels
    assert changed.sum() == round(0.25 * len(changed))
    assert set(noisy.train.labels.tolist()) == set(range(10))
    np.testing.assert_array_equal(clean.validation.labels, noisy.validation.labels)
    np.testing.assert_array_equal(clean.test.labels, noisy.test.labels)


def test_weights_are_rounded_to_a_symmetric_grid():
    """Three bits: 3 steps from 0 to the largest weight, 0.9; the head is not rounded."""
    params = {"a": {"kernel": jnp.array([[0.9, 0.4, -0.5, 0.1]])}, "head": {"kernel": jnp.array([[0.4]])}}
    found = oneshot.rounded(params, 3, oneshot.PRUNABLE)
    np.testing.assert_allclose(found["a"]["kernel"], [[0.9, 0.3, -0.6, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(found["head"]["kernel"], params["head"]["kernel"])


def test_a_name_is_registered_once():
    def demo():
        return Study()

    with pytest.raises(ValueError, match="preset 'demo' is already registered"):
        presets._PRESETS.preset(demo)
    with pytest.raises(ValueError, match="preset='nix' is unknown; known: demo, fashion-lenet"):
        presets.get("nix")


def test_settings_survive_json():
    study = dataclasses.replace(presets.get("demo"), classes=("x",), limit=3, image_size=(8, 9), model_options=("a=1",))
    assert config.study_from_json(json.loads(json.dumps(commands.to_json(study)))) == study
    running = Running(out=Path("a"), data_dir=Path("b"), compare=(Path("c"),), chunk=4, form="map")
    assert config.running_from_json(json.loads(json.dumps(commands.to_json(running)))) == running


def test_the_settings_of_earlier_layouts_are_read():
    """Old files had a single dict, and the form could be measured automatically."""
    earlier = {
        "action": "run",
        "preset": "demo",
        "ratios": [1, 5],
        "form": "auto",
        "chunk": 30,
        "out": "runs/a",
        "list": False,
        "beside": ["runs/b"],
    }
    assert config.study_from_json(earlier) == Study(ratios=(1, 5))
    assert config.running_from_json(earlier) == Running(out=Path("runs/a"), chunk=30, compare=(Path("runs/b"),))


def test_the_earlier_name_of_an_option_is_understood():
    command = recall_distortion.parse(["--out", "a", "--beside", "b", "c"])
    assert command.running.compare == (Path("b"), Path("c"))


def test_the_options_of_a_command_are_a_study_and_a_way_of_running_it():
    command = recall_distortion.parse(["--preset", "mnist-lenet", "--limit", "9", "--chunk", "2", "--shard", "1/3"])
    assert command.study == dataclasses.replace(presets.get("mnist-lenet"), limit=9)
    assert (command.running.chunk, command.cluster.shard, command.folder) == (2, "1/3", Path("runs/mnist-lenet"))
    assert recall_distortion.parse([]).running == presets.running("demo") == Running(chunk=30, form="vmap", loop="scan")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicates": 0}, "replicates=0 must be at least 1"),
        ({"ratios": (0.5, 2)}, "must be 1 or more"),
        ({"ratios": (2, 2)}, r"ratios=\(2, 2\) must be one or more values, each given once"),
        ({"scores": ()}, "must be one or more values, each given once"),
        ({"epochs": (-1,)}, r"epochs=\(-1,\) must not be negative"),
        ({"seed": 2**32}, r"seed=4294967296 must be below 2\^32"),
        ({"jumpstart": (-1.0,)}, "must not be negative"),
        ({"seed": -1}, "seed=-1 must not be negative"),
        ({"lr": (-0.1,)}, r"lr=\(-0\.1,\) must not be negative"),
        ({"lr": (float("nan"),)}, r"lr=\(nan,\) must be finite"),
        ({"lr": [float("nan")]}, r"lr=\[nan\] must be finite"),
        ({"epochs": 3}, r"epochs=3 must be a tuple, such as \(3,\)"),
        ({"scores": "magnitude"}, r"scores='magnitude' must be a tuple, such as \('magnitude',\)"),
        ({"scores": ("magnitdue",)}, r"scores=\('magnitdue',\) must be one of 'magnitude', 'gradient', 'undecayed'"),
        ({"optimizer": "adamw"}, "optimizer='adamw' must be one of 'sgd', 'adam'"),
        ({"weight_decay": float("inf")}, "weight_decay=inf must be finite"),
        ({"model_options": ("depth",)}, "'depth' must be NAME=VALUE"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"rounding": 1}, "rounding=1 must be 2 to 16 bits"),
        ({"label_noise": 1.5}, r"label_noise=1\.5 must lie between 0 and 1"),
        ({"structure": "channels", "min_keep": 3}, "min_keep=3 and counting='exact' are about numbers of weights"),
        ({"min_keep": -1}, "min_keep=-1 must not be negative"),
        ({"min_keep": 1, "scores": ("undecayed-signed",)}, "min_keep=1 does not apply to the score undecayed-signed"),
        ({"momentum": 1.0}, r"momentum=1\.0 must be at least 0 and below 1"),
        ({"image_size": (8, 0)}, r"image_size=\(8, 0\) must be a height and a width of at least 1 pixel"),
        ({"finetune_epochs": (1, 2)}, r"finetune_epochs=\(1, 2\) and finetune_lr=\(0\.01,\) must have the same length"),
    ],
)
def test_invalid_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Study(**changes)
    with pytest.raises(ValueError, match="form='vmp' must be one of 'vmap', 'map', 'unroll'"):
        Running(form="vmp")


def test_the_control_is_planned_once_and_dense_training_first():
    study = Study(ratios=(1, 2, 4), scores=("magnitude", "random"))
    assert [stage.target for stage in plan.stages(study, KNOWN, Coefficients(0.0))] == [
        None,
        PruningTarget("control", 1.0),
        PruningTarget("magnitude", 2.0),
        PruningTarget("random", 2.0),
        PruningTarget("magnitude", 4.0),
        PruningTarget("random", 4.0),
    ]


KNOWN = Known("f", {"model": "mlp"})


def digests(study, known=None):
    known = known or Known("f", plan.model_settings(study))
    return {stage.target: store.digest(stage.settings) for stage in plan.stages(study, known, Coefficients(0.0))}


def test_a_setting_changes_the_stages_whose_numbers_it_decides_and_no_other():
    study = Study(ratios=(1, 2), scores=("magnitude", "undecayed"))
    before = digests(study)
    assert digests(dataclasses.replace(study, replicates=9)) == before
    assert before[None] == "c740f87c5d5b381a02a0", "stores of earlier versions are found"
    changes = {
        "batch": 64,
        "seed": 1,
        "lr": (0.2,),
        "augment": True,
        "model": "lenet",
        "model_options": ("features=(20,)",),
        "prunable": "^hidden/",
        "optimizer": "adam",
        "limit": 9,
        "image_size": (8, 9),
        "schedule": "one-cycle",
        "label_noise": 0.1,
    }
    for change in changes.items():
        after = digests(dataclasses.replace(study, **dict([change])))
        assert all(after[target] != before[target] for target in before)
    other = digests(study, Known("g", {"model": "mlp"}))
    assert all(after != before for after, before in zip(other.values(), before.values(), strict=True))
    finetune = digests(dataclasses.replace(study, finetune_epochs=(1,)))
    assert finetune[None] == before[None]
    control = PruningTarget("control", 1.0)
    assert finetune[control] != before[control]
    pruned = [target for target in before if target not in (None, control)]
    for change in ({"counting": "shrinkbench"}, {"min_keep": 2}):
        after = digests(dataclasses.replace(study, **change))
        assert [target for target in before if after[target] != before[target]] == pruned
    gradient = digests(dataclasses.replace(study, gradient_batches=2))
    assert [target for target in before if gradient[target] != before[target]] == [PruningTarget("undecayed", 2.0)]


def test_coefficients_of_fine_tuning_share_the_dense_networks():
    study = Study(ratios=(1, 2), scores=("magnitude",), jumpstart=(0.0,), finetune_jumpstart=(0.0, 0.01))
    first, second = (plan.stages(study, KNOWN, penalty) for penalty in plan.coefficients(study))
    assert first[0].settings == second[0].settings
    assert first[0].title == second[0].title == "jumpstart 0: dense training"
    assert first[1].settings != second[1].settings
    assert second[1].title == "jumpstart 0, in fine-tuning 0.01: no pruning (control)"


def test_the_fingerprint_sees_every_array_and_the_limit_draws_from_every_split():
    study = Study(limit=50)
    dataset = plan.load(study)
    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)] == [50, 50, 50]
    one = datasets.fingerprint(dataset)
    assert one == datasets.fingerprint(plan.load(study))
    changed = dataset.train.labels.copy()
    changed[3] = (changed[3] + 1) % 10
    assert datasets.fingerprint(dataclasses.replace(dataset, train=dataset.train._replace(labels=changed))) != one
    assert datasets.fingerprint(dataclasses.replace(dataset, mean=dataset.mean + 1)) != one
    whole = datasets.load("digits")
    assert {x.tobytes() for x in dataset.test.images} <= {x.tobytes() for x in whole.test.images}


@pytest.mark.optax_promotes
def test_a_chunk_has_as_many_replicates_as_fit_the_memory(monkeypatch):
    from experiments.training import tasks

    study = Study(batch=64, replicates=1000)
    dataset = plan.load(study)
    task = tasks.classification(dataset, "mlp")
    fits = functools.partial(placement.chunk_size, study, dataset=dataset, task=task, where=oneshot.PRUNABLE)
    monkeypatch.setattr(jax, "device_count", lambda: 1)
    one = fits(Running(memory=1.0))
    assert 50 < one < 1000
    assert fits(Running(memory=0.5)) == pytest.approx(one / 2, abs=1)
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert fits(Running(memory=1.0)) == min(8 * one, 1000)
    assert fits(Running(memory=1e-6)) == 8
    assert fits(Running(chunk=7)) == 7
    penalized = [
        placement.chunk_size(
            dataclasses.replace(study, replicates=10**6, **{name: (0.0, 0.1)}),
            Running(memory=1.0),
            dataset,
            task,
            oneshot.PRUNABLE,
        )
        for name in ("jumpstart", "finetune_jumpstart")
    ]
    assert penalized[0] == penalized[1] < 8 * one


def test_the_form_is_stated_for_each_backend(monkeypatch):
    own, built_in = Study(model="my.module:Net"), Study()
    forms = lambda study, running: (placement.placement(study, running).form, placement.placement(study, running).epoch)
    assert forms(built_in, Running()) == ("map", "scan")
    assert forms(own, Running()) == ("unroll", "steps")
    assert forms(own, Running(form="vmap")) == ("vmap", "steps")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert forms(built_in, Running()) == forms(own, Running()) == ("vmap", "scan")


def test_hours_are_those_of_the_measured_steps():
    study = Study(model="lenet")  # 3.1 ms a step of 128 on a CPU
    rng = np.random.default_rng(0)
    images = {"x_train": rng.random((40, 28, 28, 1), np.float32), "y_train": np.arange(40) % 2}
    data = datasets.of_arrays(images)
    step = placement.step_time(study, data, tasks.classification(data, "lenet"))
    assert step[:2] == (3.1, "by the measured time of a step")
    assert placement.hours(step, study, 30 * 10, 128_000) == pytest.approx(30 * 10 * 1000 * 3.1e-3 / 3600, rel=1e-3)


def test_the_step_of_another_model_is_estimated_from_its_operations(monkeypatch):
    """Dense layers of 64 x 2000 and 2000 x 10: two operations per weight and example, and few others."""
    data, options = datasets.load("digits"), {"depth": 1, "width": 2000}
    task = tasks.classification(data, "dense", options=options)
    study = Study(model="dense", model_options=("depth=1", "width=2000"), batch=256)
    step = placement.step_time(study, data, task)
    products = 2 * 128 * (64 * 2000 + 2000 * 10)
    assert step.milliseconds == pytest.approx(3.1 * products / 5.36e7 * 256 / 128, rel=0.1)
    assert step.source == "estimated from floating-point operations and the measured time of lenet on 28x28x1"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert placement.step_time(study, data, task) is None


def test_the_step_of_a_measured_model_on_other_examples_is_estimated():
    """Dense layers of 3072 x 300, 300 x 100 and 100 x 3; the time was measured with 784 x 300 on MNIST."""
    data = datasets.of_arrays({"x_train": np.zeros((99, 32, 32, 3), np.float32), "y_train": np.arange(99) % 3})
    step = placement.step_time(Study(model="mlp"), data, tasks.classification(data, "mlp"))
    products, measured = 3072 * 300 + 300 * 100 + 100 * 3, 784 * 300 + 300 * 100 + 100 * 10
    assert step.milliseconds == pytest.approx(1.4 * products / measured, rel=0.05)
    assert step.source == "estimated from floating-point operations and the measured time of mlp on 28x28x1"


@pytest.mark.slow
def test_the_hours_of_a_tiny_model_are_within_a_factor_of_three_of_a_real_run(tmp_path):
    """An MLP on digits, by the processor time of its epochs, so that other programs do not matter.

    By the floating-point operations alone the estimate is a fifth of it.
    """
    settings = Study(replicates=8, ratios=(1,), scores=("magnitude",), epochs=(6,), finetune_epochs=(0,), batch=64)
    seconds = []
    evidence = functools.partial(studies.run, study=settings, out=tmp_path, running=Running(form="map", chunk=8))
    evidence(callbacks=[lambda stage, *_: stage.endswith("dense training") and seconds.append(time.process_time())])
    data = datasets.load("digits")
    step = placement.step_time(settings, data, tasks.classification(data, "mlp"))
    assert step.source == "estimated from the measured time of the smallest models"
    measured = np.median(np.diff(seconds)) / 8 / 3600  # an epoch of a replicate; the first one compiles
    estimated = placement.hours(step, dataclasses.replace(settings, replicates=1), 1, len(data.train.labels))
    assert measured / 3 < estimated < 3 * measured


def test_progress_is_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with progress.progress(8, "epochs", console=Console(file=out)) as shown:
        shown.stage("dense training")
        shown.advance(4)
        shown.stage("magnitude, t = 2")
    lines = out.getvalue().splitlines()
    assert [line.split("] ")[1] for line in lines] == ["dense training", "magnitude, t = 2"]
    assert [line.split(", ")[1].split("]")[0] for line in lines] == ["  0%", " 50%"]
    assert "\x1b" not in out.getvalue()


def test_progress_on_a_terminal_names_the_stage():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with progress.progress(8, "epochs", console=console) as shown:
        shown.stage("magnitude, t = 2")
        shown.advance(4)
    assert "magnitude, t = 2" in out.getvalue()
    assert "4/8" in out.getvalue().replace("\x1b[0m", "").replace("\x1b[32m", "")


def test_a_terminal_of_80_columns_shows_the_rates(monkeypatch):
    """Epochs of 10 s, 100 steps and 400 examples each."""
    out = io.StringIO()
    with progress.progress(177_000, "epochs", console=Console(file=out, force_terminal=True, width=80)) as shown:
        shown.stage("magnitude, t = 2")
        now = progress.time.monotonic()
        for epoch in (1, 2):
            monkeypatch.setattr(progress.time, "monotonic", lambda now=now + 10 * epoch: now)
            shown.advance(1, 100, 400)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "\n", out.getvalue()).replace("\r", "\n").splitlines()
    assert "compiling; rates follow" in plain
    assert "10 steps/s, 40 examples/s, 491.7 h left" in plain  # 176,998 epochs
    assert max(map(len, plain)) <= 80


def test_a_log_has_rates_and_the_time_left(monkeypatch):
    """Two epochs of 10 s each after the first, which compiles: 5 steps of 4 examples a second."""
    clock = iter(range(0, 1000, 10))
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    with progress.progress(4, "epochs", console=Console(file=out)) as shown:
        next(clock)
        shown.stage("dense training")
        for _ in range(3):
            now[0] = next(clock) * 2.0
            shown.advance(1, 100, 400)
    lines = out.getvalue().splitlines()
    assert lines[-1].endswith("  5 steps/s, 20 examples/s, 20 s left")
    assert max(map(len, lines)) <= 80


@pytest.fixture
def log(monkeypatch):
    """A function that lets time pass and reports, and one that returns the time left that the log then shows."""
    now, out = [0.0], io.StringIO()
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def after(seconds, report, *given):
        now[0] += seconds
        report(*given)

    return after, lambda: re.findall(r"(\S+ \w+) left$", out.getvalue(), re.MULTILINE), Console(file=out)


def test_the_time_left_excludes_compiling_from_the_second_epoch_on(log):
    """Two stages of 10 epochs at 20 s, the first of which compiles for 10 minutes, the second for 5."""
    after, left, console = log
    with progress.progress(20, "epochs", console=console) as shown:
        after(0, shown.stage, "dense training")
        after(620, shown.advance, 1)
        assert left() == []
        for epoch in range(2, 11):
            after(20, shown.advance, 1)
            assert left()[-1] == progress.duration(20 * (20 - epoch))
        after(0, shown.stage, "magnitude, t = 2")
        after(320, shown.advance, 1)
        assert left()[-1] == "3 min", "9 epochs at 20 s"


def test_the_time_left_counts_the_stages_that_threads_compute_side_by_side_and_those_of_other_runs(log):
    """Two threads, 30 s a unit each: 15 s a unit together."""
    after, left, console = log
    with progress.progress(106, "units", console=console) as shown, futures.ThreadPoolExecutor(1) as pool:
        other = lambda report, *given: pool.submit(report, *given).result()
        shown.stage("one")
        other(shown.stage, "two")
        after(100, shown.advance, 1)
        after(0, other, shown.advance, 1)
        after(30, shown.advance, 1)
        after(0, other, shown.advance, 1)
        after(30, other, shown.advance, 1)
        assert left()[-1] == progress.duration(15 * 101)
        after(0, shown.skip, 100)
        after(30, shown.advance, 1)
        assert left()[-1] == "0 s"


def test_quiet_progress_says_nothing(capsys):
    with progress.progress(8, "epochs", quiet=True) as shown:
        shown.stage("a")
        shown.advance(8)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("action", ["status", "status --all", "report"])
@pytest.mark.parametrize("which", [(recall_distortion, "fashion-lenet"), (jumpstart_grid, "uci")])
def test_a_folder_in_which_nothing_ran_is_an_error_that_gives_the_command(tmp_path, capsys, monkeypatch, which, action):
    study, preset = which
    monkeypatch.chdir(tmp_path)
    for out, folder, given in ([], f"runs/{preset}", ""), (["--out", "my runs"], "my runs", " --out 'my runs'"):
        assert study.main([*action.split(), "--preset", preset, *out]) == 1
        assert capsys.readouterr().err == (
            f"error: nothing has run in {folder}; give the folder of an earlier run with --out, or run the study "
            f"first: {study.PROG} --preset {preset}{given}\n"
        )
    assert not list(tmp_path.iterdir())


def test_a_folder_to_compare_with_is_checked_before_training(tmp_path, capsys):
    assert recall_distortion.main(["--compare", str(tmp_path), "--out", str(tmp_path / "out")]) == 1
    assert f"no study was run in {tmp_path}, which has no config.json; use another" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
