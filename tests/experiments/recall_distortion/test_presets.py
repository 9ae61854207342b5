"""Presets, the stages that they plan, and how far they are told to be."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from rich.console import Console

from experiments.cli import progress
from experiments.data import datasets
from experiments.recall_distortion import plan, presets
from experiments.recall_distortion.plan import Cell
from experiments.recall_distortion.presets import Study
from experiments.storage import store
from experiments.training import tuning

PAPER = ["mnist-lenet", "fashion-lenet", *(f"cifar10-resnet{d}" for d in (20, 32, 44, 56, 110)), "cifar100-resnet56"]


def test_there_is_a_preset_for_the_demo_and_every_study_of_the_paper():
    assert sorted(presets.names()) == sorted(["demo", *PAPER])


@pytest.mark.parametrize("name", ["demo", *PAPER])
def test_a_preset_says_command_cost_and_what_to_expect(name):
    lines = presets.describe(name).splitlines()
    assert lines[0].endswith(".")
    command = "make demo" if name == "demo" else f"python -m experiments.recall_distortion --preset {name}"
    assert f"Command: {command}" in lines
    assert any(line.startswith("Cost: ") for line in lines)
    assert any(line.startswith("Expect") and re.search(r"\.\d\d", line) for line in lines)


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


def test_a_name_is_registered_once():
    def demo():
        return Study()

    with pytest.raises(ValueError, match="preset 'demo' is already registered"):
        presets.preset(demo)
    with pytest.raises(ValueError, match="preset='nix' is unknown; known: demo, fashion-lenet"):
        presets.get("nix")


def test_settings_survive_json():
    study = dataclasses.replace(
        presets.get("demo"),
        out=Path("a"),
        data_dir=Path("b"),
        beside=(Path("c"),),
        classes=("x",),
        limit=3,
        image_size=(8, 9),
    )
    assert presets.from_json(json.loads(json.dumps(study.to_json()))) == study


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicates": 0}, "replicates=0 must be at least 1"),
        ({"ratios": (0.5, 2)}, "must be 1 or more"),
        ({"ratios": (2, 2)}, r"ratios=\(2, 2\) must be one or more values, none twice"),
        ({"scores": ()}, "must be one or more values"),
        ({"jumpstart": (-1.0,)}, "must not be negative"),
        ({"shard": "2/2"}, "shard='2/2' must be i/n with 0 <= i < n"),
        ({"limit": 0}, "limit=0 must be at least 1"),
        ({"momentum": 1.0}, r"momentum=1\.0 must be at least 0 and below 1"),
        ({"image_size": (8, 0)}, r"image_size=\(8, 0\) must be a height and a width of at least 1 pixel"),
        ({"finetune_epochs": (1, 2)}, r"finetune_epochs=\(1, 2\) and finetune_lr=\(0\.01,\) must be equally many"),
    ],
)
def test_settings_that_no_study_can_have_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Study(**changes)


def test_the_control_is_planned_once_and_dense_training_first():
    study = Study(ratios=(1, 2, 4), scores=("magnitude", "random"))
    assert [stage.cell for stage in plan.stages(study, "f", 0.0)] == [
        None,
        Cell("control", 1.0),
        Cell("magnitude", 2.0),
        Cell("random", 2.0),
        Cell("magnitude", 4.0),
        Cell("random", 4.0),
    ]


def digests(study, fingerprint="f"):
    return {stage.cell: store.digest(stage.settings) for stage in plan.stages(study, fingerprint, 0.0)}


def test_a_setting_changes_the_stages_whose_numbers_it_decides_and_no_other():
    study = Study(ratios=(1, 2), scores=("magnitude", "undecayed"))
    before = digests(study)
    where = {
        "out": Path("x"),
        "shard": "0/2",
        "chunk": 3,
        "memory": 1.0,
        "form": "map",
        "loop": "steps",
        "replicates": 9,
    }
    assert digests(dataclasses.replace(study, **where, keep_pruned=True)) == before
    assert before[None] == "c740f87c5d5b381a02a0", "stores of earlier versions are found"
    changes = {
        "batch": 64,
        "seed": 1,
        "lr": (0.2,),
        "augment": True,
        "model": "lenet",
        "limit": 9,
        "image_size": (8, 9),
    }
    for change in changes.items():
        after = digests(dataclasses.replace(study, **dict([change])))
        assert all(after[cell] != before[cell] for cell in before)
    assert all(after != before for after, before in zip(digests(study, "g").values(), before.values(), strict=True))
    finetune = digests(dataclasses.replace(study, finetune_epochs=(1,)))
    assert finetune[None] == before[None]
    assert finetune[Cell("control", 1.0)] != before[Cell("control", 1.0)]
    gradient = digests(dataclasses.replace(study, gradient_batches=2))
    assert [cell for cell in before if gradient[cell] != before[cell]] == [Cell("undecayed", 2.0)]


def test_the_fingerprint_sees_every_array_and_the_limit_draws_from_every_split():
    study = Study(limit=50)
    dataset = plan.load(study)
    assert [len(split.labels) for split in (dataset.train, dataset.validation, dataset.test)] == [50, 50, 50]
    one = plan.fingerprint(dataset)
    assert one == plan.fingerprint(plan.load(study))
    changed = dataset.train.labels.copy()
    changed[3] = (changed[3] + 1) % 10
    assert plan.fingerprint(dataclasses.replace(dataset, train=dataset.train._replace(labels=changed))) != one
    assert plan.fingerprint(dataclasses.replace(dataset, mean=dataset.mean + 1)) != one
    whole = datasets.load("digits")
    assert {x.tobytes() for x in dataset.test.images} <= {x.tobytes() for x in whole.test.images}


@pytest.mark.optax_promotes
def test_a_chunk_has_as_many_replicates_as_fit_the_memory():
    from experiments.training import tasks

    study = Study(batch=64, replicates=1000, memory=1.0)
    dataset = plan.load(study)
    task = tasks.classification(dataset, "mlp")
    fits = tuning.chunk_size(study, dataset, task, 1)
    assert 50 < fits < 1000
    assert tuning.chunk_size(dataclasses.replace(study, memory=0.5), dataset, task, 1) == pytest.approx(fits / 2, abs=1)
    assert tuning.chunk_size(study, dataset, task, 2) == min(2 * fits, 1000)
    assert tuning.chunk_size(dataclasses.replace(study, memory=1e-6), dataset, task, 8) == 8
    assert tuning.chunk_size(dataclasses.replace(study, chunk=7), dataset, task, 8) == 7


def test_progress_is_plain_lines_where_there_is_no_terminal():
    out = io.StringIO()
    with progress.progress(8, "epochs", console=Console(file=out)) as shown:
        shown.stage("dense training")
        shown.advance(4)
        shown.stage("magnitude, t = 2")
    lines = out.getvalue().splitlines()
    assert [line.split("] ")[1] for line in lines] == ["dense training", "magnitude, t = 2"]
    assert [line.split(", ")[1].split("]")[0] for line in lines] == ["  0 %", " 50 %"]
    assert "\x1b" not in out.getvalue()


def test_progress_on_a_terminal_names_the_stage():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120)
    with progress.progress(8, "epochs", console=console) as shown:
        shown.stage("magnitude, t = 2")
        shown.advance(4)
    assert "magnitude, t = 2" in out.getvalue()
    assert "4/8 epochs" in out.getvalue().replace("\x1b[0m", "").replace("\x1b[32m", "")


def test_quiet_progress_says_nothing(capsys):
    with progress.progress(8, "epochs", quiet=True) as shown:
        shown.stage("a")
        shown.advance(8)
    assert capsys.readouterr().out == ""
