"""The lottery-ticket study: the sizes of the levels, and training that agrees with the library's rewinding."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.data import datasets
from experiments.recall_distortion import tickets
from experiments.recall_distortion.tickets import Tickets
from experiments.training.tasks import Task

pytestmark = pytest.mark.optax_promotes

RNG = np.random.default_rng(0)
CENTERS = RNG.normal(size=(3, 4))
LABELS = np.arange(120) % 3
DATA = datasets.of_arrays(
    {"x_train": (CENTERS[LABELS] + 0.1 * RNG.normal(size=(120, 4))).astype(np.float32), "y_train": LABELS}, "toy"
)
TOY = Tickets(
    model="dense",
    model_options=("depth=2", "width=8"),
    levels=2,
    fraction=0.5,
    epochs=20,
    batch=16,
    replicates=2,
    rewind=4,
)


def test_each_level_removes_its_fraction_and_the_tickets_still_learn():
    """Of 139 parameters 96 are prunable; 48 and then 72 of them are removed."""
    found = list(tickets.predictions(TOY, DATA))
    assert len(found) == 2
    for levels in found:
        assert [ratio for ratio, _ in levels] == pytest.approx([1.0, 139 / (139 - 48), 139 / (139 - 72)])
        accuracies = [(predicted == DATA.test.labels).mean() for _, predicted in levels]
        assert min(accuracies) > 0.9


def test_every_epoch_takes_each_example_once_and_a_rewound_run_takes_the_same_batches():
    """The loss is the sum of the weights of the examples of a batch, so its gradient says which were taken."""
    images, key = np.arange(20, dtype=np.float32)[:, None], jax.random.key(0)
    task = Task(
        init=lambda key: ({}, {}),
        loss=lambda params, context, mode: ((params["seen"][context.batch.images[:, 0].astype(int)]).sum(), {}),
        logits=lambda *_: None,
        preactivations=lambda *_: None,
    )
    tx = optax.sgd(-1.0)  # adds 1 to the weight of each example that is taken
    train = tickets._compiled(task, tx, datasets.Split(images, np.zeros(20, np.int32)), batch=5)
    params = {"seen": jnp.zeros(20)}
    seen = lambda begin, end: np.asarray(train((key, {}), params, tx.init(params), begin, end)[0]["seen"])
    np.testing.assert_array_equal(seen(0, 4), 1)
    np.testing.assert_array_equal(seen(4, 12), 2)
    assert (seen(0, 1) != seen(4, 5)).any()
    np.testing.assert_array_equal(seen(0, 6) - seen(0, 2), seen(2, 6))  # as after rewinding to step 2


def test_a_model_with_statistics_is_refused():
    settings = Tickets(model="resnet20", epochs=1, replicates=1, levels=1)
    images = RNG.integers(0, 256, (130, 8, 8, 3)).astype(np.uint8)
    data = datasets.of_arrays({"x_train": images, "y_train": np.arange(130) % 2}, "noise")
    with pytest.raises(ValueError, match="model='resnet20' has statistics, which this study does not rewind"):
        next(tickets.predictions(Tickets(**{**vars(settings), "batch": 16}), data))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--levels 0", "levels=0 must be at least 1"),
        ("--fraction 1", "fraction=1.0 must lie between 0 and 1"),
        ("--fraction nan", "fraction=nan must lie between 0 and 1"),
        ("--batch 0", "batch=0 must be at least 1"),
        ("--replicates 0", "replicates=0 must be at least 1"),
        ("--lr inf", "lr=inf must be finite"),
        ("--rewind -1", "rewind=-1 must be at least 0"),
    ],
)
def test_wrong_options_are_refused_before_anything_is_written(capsys, tmp_path, given, message):
    assert tickets.main([*given.split(), "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")
    assert not list(tmp_path.iterdir())


def test_several_processes_are_refused_before_anything_is_written(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    assert tickets.main(["--out", str(tmp_path / "out")]) == 1
    assert "4 or more processes, but recall_distortion.tickets runs in one" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_batch_larger_than_the_training_split_is_refused():
    with pytest.raises(ValueError, match="batch=1000 is more than the 81 training examples"):
        next(tickets.predictions(dataclasses.replace(TOY, batch=1000), DATA))


def test_a_level_that_removes_no_weight_is_refused_before_training():
    """Of 12 weights, .7 of those left are 8.4, 5.88, 4.116, 2.8812, 2.01684, 1.411788, .98825: 1 twice."""
    data = datasets.of_arrays({"x_train": np.zeros((40, 4), np.float32), "y_train": np.arange(40) % 2}, "zeros")
    options = {"model": "dense", "model_options": ("depth=1", "width=3"), "batch": 8, "fraction": 0.3, "levels": 10}
    with pytest.raises(ValueError, match="level 7 would remove none of the 1 weights left; give at most 6 levels"):
        next(tickets.predictions(Tickets(**options), data))
