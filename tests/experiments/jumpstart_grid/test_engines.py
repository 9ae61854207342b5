"""The engines of the jumpstart studies on tables and images: their steps, and a short run of each."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from flax import nnx

import jprune
from experiments.data import datasets
from experiments.jumpstart_grid import image_grid, moons, presets, uci_tables
from experiments.jumpstart_grid.config import Grid, GridRunning
from experiments.storage import checkpoints, files, store

TRAINS = pytest.mark.optax_promotes


def _setup(method, **changes):
    values = {"dataset": "iris", "method": method, "depth": 3, "width": 4, "epochs": 1, "lr": 0.01, "batch": 8}
    return uci_tables.Setup(**{**values, "coefficient": 0.0, **changes})


@TRAINS
@pytest.mark.parametrize("method", ["jumpstart", "batchnorm"])
def test_padding_of_the_last_batch_changes_neither_loss_nor_gradient(method):
    setup = _setup(method, coefficient=0.5 * (method == "jumpstart"))
    state = uci_tables.start(setup, 2, 3, jax.random.key(0))
    features = jax.random.normal(jax.random.key(1), (5, 2))
    labels = jnp.array([0, 1, 2, 0, 1])
    padded = uci_tables.Examples(
        jnp.concatenate([features, 99 * jnp.ones((3, 2))]), jnp.concatenate([labels, jnp.zeros(3, labels.dtype)])
    )
    grad = jax.jit(jax.value_and_grad(lambda *args: uci_tables._loss(setup, *args), has_aux=True))
    short = grad(state.params, uci_tables.Examples(features, labels), jnp.ones(5, bool), state.running)
    long = grad(state.params, padded, jnp.arange(8) < 5, state.running)
    chex.assert_trees_all_close(short, long, rtol=2e-5, atol=1e-6)


@TRAINS
@pytest.mark.parametrize("method", uci_tables.METHODS)
def test_a_dense_network_equals_numpy_with_the_same_weights(method):
    setup = _setup(method)
    state = uci_tables.start(setup, 2, 3, jax.random.key(0))
    x = np.asarray(jax.random.normal(jax.random.key(1), (6, 2)))
    logits, preactivations, _ = uci_tables.forward(
        setup, state.params, jnp.asarray(x), jnp.ones(6, bool), state.running
    )
    params = jax.tree.map(np.asarray, state.params)
    layers = [params["first"], *({n: p[i] for n, p in params["hidden"].items()} for i in range(2))]
    h = x
    for depth, layer in enumerate(layers):
        z = h @ layer["kernel"] + layer["bias"]
        np.testing.assert_allclose(preactivations[depth], z, rtol=1e-4, atol=1e-6)
        if method == "batchnorm":
            z = (z - z.mean(0)) / np.sqrt(z.var(0) + 1e-5)
        a = np.asarray(jax.nn.gelu(z)) if method == "gelu" else np.maximum(z, 0)
        h = h + a if method == "skip" and depth else a
    np.testing.assert_allclose(logits, h @ params["head"]["kernel"] + params["head"]["bias"], rtol=1e-4, atol=1e-5)


@TRAINS
@pytest.mark.slow
def test_a_shallow_network_learns_iris():
    grid = Grid(
        kind="tables",
        datasets=("iris",),
        methods=("jumpstart",),
        depths=(2,),
        widths=(8,),
        seeds=2,
        epochs=150,
        batch=64,
    )
    done = []
    made = uci_tables.carry_out(GridRunning(), uci_tables.plan(grid)[0], done.append)["cells"]
    assert sum(done) == uci_tables.plan(grid)[0].work
    assert made["replicate"] == [0, 1]
    assert min(made["val_acc"]) > 0.9
    assert min(made["train_acc"]) > 0.9


def test_features_have_zero_mean_and_unit_deviation():
    train, val, classes = uci_tables.splits("wine")
    np.testing.assert_allclose(train.features.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(train.features.std(0), 1, atol=1e-5)
    assert (len(val.labels) / (len(val.labels) + len(train.labels)), classes) == (pytest.approx(0.25, abs=0.01), 3)


@TRAINS
@pytest.mark.parametrize(
    "method", ["UP:0.01", *(pytest.param(other, marks=pytest.mark.slow) for other in ("relu-bn", "norm:0.1"))]
)
@pytest.mark.slow
def test_an_image_network_trains_a_few_steps(method):
    grid = Grid(
        kind="images",
        datasets=("digits",),
        methods=(method,),
        depths=(2,),
        widths=(2,),
        epochs=2,
        batch=404,
        lr=(0.01,),
        prune=(2.0,),
    )
    (stage,) = image_grid.plan(grid)
    done = []
    tables = image_grid.carry_out(GridRunning(), stage, done.append)
    made, pruned = tables["cells"], tables["pruned"]
    assert done == [1, 1]
    assert 0.05 < made["train_acc_last"][0] <= made["train_acc"][0] < 1
    # Two convolutions of 2 channels; the head reads the average and the maximum of each.
    expected = (9 + 1) * 2 + (18 + 1) * 2 + (4 + 1) * 10 + (8 if method == "relu-bn" else 0)
    assert made["parameters"] == [expected]
    kernels = 9 * 2 + 18 * 2  # of the convolutions, without those of the head
    assert pruned["prunable"] == [kernels] * 2
    assert pruned["kept"] == [kernels, kernels // 2]
    assert all(0 < accuracy < 1 for accuracy in pruned["train_acc"])


@TRAINS
@pytest.mark.parametrize(
    ("name", "classes", "shape"),
    [
        ("mnist", 10, (28, 28, 1)),
        pytest.param("cifar10", 10, (32, 32, 3), marks=pytest.mark.slow),
        pytest.param("cifar100", 100, (32, 32, 3), marks=pytest.mark.slow),
    ],
)
def test_an_image_preset_takes_its_steps_on_images_of_its_shape(monkeypatch, name, classes, shape):
    """Noise in place of the images, so that the test needs no data."""
    images = np.random.default_rng(0).integers(0, 256, (24, *shape), dtype=np.uint8)
    split = datasets.Split(images, np.arange(24, dtype=np.int32) % classes)
    colours = np.full(shape[-1], 127.5, np.float32), np.full(shape[-1], 73.9, np.float32)
    dataset = datasets.Dataset(name, split, split, split, tuple(map(str, range(classes))), *colours)
    monkeypatch.setattr(datasets, "load", lambda *_, **__: dataset)
    grid = dataclasses.replace(presets.get(name), epochs=1, batch=8)
    stages = [stage for stage in image_grid.plan(grid) if stage.settings["coefficient"]]
    smallest = min(stages, key=lambda stage: stage.settings["depth"] * stage.settings["width"])
    (cell,) = pd.DataFrame(image_grid.carry_out(GridRunning(), smallest, lambda _: None)["cells"]).to_dict("records")
    assert (cell["dataset"], cell["parameters"] > 0) == (name, True)
    assert 0 <= cell["train_acc"] <= 1
    assert 0 <= cell["val_acc"] <= 1


def test_units_of_a_normalized_network_are_the_inputs_of_its_relus():
    network = image_grid.NormalizedConv((4, 4, 1), 2, depth=2, width=3, rngs=nnx.Rngs(0))
    network.eval()
    for norm in network.norms:
        norm.mean[...], norm.var[...] = jnp.array([-1.0, 0.0, 9.0]), jnp.full(3, 0.5)
        norm.scale[...], norm.bias[...] = jnp.full(3, 2.0), jnp.array([9.0, 0.0, 0.0])
    x, expected = jax.random.normal(jax.random.key(0), (5, 4, 4, 1)), []
    z = x
    for conv, norm in zip(network.convs, network.norms, strict=True):
        expected.append(norm(conv(z)))
        z = jax.nn.relu(expected[-1])
    folded, plain = image_grid.folded(network), image_grid.networks.RectangularConv.__call__
    found = jprune.preactivations(folded, x, method=plain)
    chex.assert_trees_all_close(list(found.values()), expected, rtol=1e-4, atol=1e-5)
    assert jprune.unit_status(found)["convs/0"].tolist() == [0, 1, -1]


@TRAINS
@pytest.mark.parametrize("method", ["relu-bn", pytest.param("UP", marks=pytest.mark.slow)])
def test_epochs_of_several_seeds_in_one_program_train_as_single_steps_do(method):
    """The program for accelerators on a CPU: the same predictions in every epoch, the same weights to rounding."""
    dataset = datasets.load("digits", selection="test")
    setup = image_grid.Setup("digits", method, 2, 2, 2, 0.01, 400, 1e-3 if method == "UP" else 0.0)
    rng = np.random.default_rng(0)
    orders = [np.stack([rng.permutation(len(dataset.train.labels)) for _ in range(2)]) for _ in range(2)]
    found = {}
    for train in (image_grid.by_steps, image_grid.by_epochs):
        started = [image_grid.start(setup, dataset, seed) for seed in (0, 1)]
        programs, done = image_grid.Programs(setup, dataset, started[0][0]), []
        found[train] = train(programs, [state for _, state in started], orders, done.append)
        assert sum(done) == 4
    (stepped, accuracies), (scanned, others) = found.values()
    assert accuracies.shape == (2, 2, 2)
    np.testing.assert_array_equal(accuracies, others)
    for one, other in zip(stepped, scanned, strict=True):
        chex.assert_trees_all_close(one.params, other.params, rtol=1e-4, atol=1e-6)


class _Killed(Exception):
    """The run ends within a stage."""


@TRAINS
@pytest.mark.parametrize("kind", ["images", "moons", "tables"])
def test_a_stage_continues_from_its_checkpoint_with_the_same_bits(tmp_path, monkeypatch, kind):
    engine, data = {"images": (image_grid, "digits"), "moons": (moons, "moons"), "tables": (uci_tables, "iris")}[kind]
    methods = {"images": "relu-bn", "moons": "UP-zero", "tables": "jumpstart"}
    if kind != "images":
        monkeypatch.setattr(engine, "_CHUNK", 2)
    grid = Grid(kind=kind, datasets=(data,), methods=(methods[kind],), depths=(2,), widths=(2,), epochs=5, batch=404)
    stage = engine.plan(dataclasses.replace(grid, lr=(0.01,)))[0]
    target = store.stage(tmp_path, kind, stage.settings, stage.seeds)
    whole = engine.carry_out(GridRunning(), stage, lambda _: None)
    done = []

    def die(units):
        done.append(units)
        if len(done) == 2:
            raise _Killed

    with pytest.raises(_Killed):
        engine.carry_out(GridRunning(), stage, die, checkpoints.Checkpoints(target, stage.settings, 0))
    kept, rest = checkpoints.Checkpoints(target, stage.settings, 1000), []
    assert kept.done > 0
    again = engine.carry_out(GridRunning(), stage, rest.append, kept)
    assert done[0] + sum(rest) == stage.work
    for name, table in whole.items():
        left = [pd.DataFrame({key: list(values) for key, values in each.items()}) for each in (table, again[name])]
        pd.testing.assert_frame_equal(*(frame.drop(columns="seconds", errors="ignore") for frame in left))


def test_on_an_accelerator_a_stage_has_all_seeds(monkeypatch):
    grid = Grid(kind="images", datasets=("digits",), methods=("relu",), depths=(2,), widths=(2,), seeds=3, epochs=2)
    assert [stage.seeds for stage in image_grid.plan(grid)] == [range(1), range(1, 2), range(2, 3)]
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    (stage,) = image_grid.plan(grid)
    assert (stage.seeds, stage.work) == (range(3), 6)


def test_cells_of_normalized_networks_are_those_of_the_program_that_counts_at_the_relus():
    grid = Grid(kind="images", datasets=("digits",), methods=("relu", "relu-bn"), depths=(2,), widths=(2,), seeds=1)
    assert [stage.settings.get("version") for stage in image_grid.plan(grid)] == [None, 2]


def test_a_checkpoint_of_a_cpu_is_refused_on_an_accelerator(tmp_path, monkeypatch):
    """There the states of the networks are stacked in one array."""
    sizes = {"depths": (1,), "widths": (2,), "epochs": 2, "batch": 404, "lr": (0.01,)}
    (stage,) = image_grid.plan(Grid(kind="images", datasets=("digits",), methods=("relu",), **sizes))
    setup, dataset = image_grid.Setup(**stage.settings), datasets.load("digits", selection="test")
    target = store.stage(tmp_path, "images", stage.settings, stage.seeds)
    _, state = image_grid.start(setup, dataset, 0)
    kept = checkpoints.Checkpoints(target, stage.settings, 0)
    kept.save(1, checkpoints.pack(([state], np.zeros((1, 1, 2)))))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    with pytest.raises(files.StoreError, match="or another kind of device; continue it there, or delete the folder"):
        image_grid.carry_out(GridRunning(), stage, lambda _: None, kept)


def test_a_table_is_refused_as_data_set_for_convolutions():
    setup = image_grid.Setup("iris", "relu", 2, 2, 1, 0.01, 64, 0.0)
    with pytest.raises(ValueError, match=r"dataset='iris' has examples of shape \(4,\); kind='images' needs images"):
        image_grid.start(setup, datasets.load("iris"), 0)


@TRAINS
def test_the_gradient_of_an_image_network_holds_the_penalty_of_every_weighted_layer():
    """The CIFAR penalty includes the output layer: with cross-entropy switched off, the head still moves."""
    dataset = datasets.load("digits", selection="test")
    moved = {}
    for method in ("UP", "norm"):
        setup = image_grid.Setup("digits", method, 2, 2, 1, 0.01, 64, 1e6)
        graph, state = image_grid.start(setup, dataset, 0)
        batch = dataset.train.images[:8], dataset.train.labels[:8]
        loss = image_grid.Programs(setup, dataset, graph).loss
        grads, _ = jax.jit(jax.grad(loss, has_aux=True))(state.params, state.stats, *batch)
        moved[method] = float(jnp.abs(grads["head"]["kernel"][...]).max())
    assert moved["norm"] > 1e3 > moved["UP"]


def test_a_table_from_a_file_is_another_stage_when_its_content_changes(tmp_path):
    frame = pd.DataFrame({"size": np.arange(40.0), "label": np.arange(40) % 2})
    grid = Grid(kind="tables", datasets=(f"table:{tmp_path / 'mine.csv'}",), methods=("baseline",), lr=(0.01,))
    frame.to_csv(tmp_path / "mine.csv", index=False)
    before = uci_tables.plan(grid)[0].settings
    assert uci_tables.plan(grid)[0].settings == before
    frame.assign(size=frame["size"] ** 2).to_csv(tmp_path / "mine.csv", index=False)
    assert uci_tables.plan(grid)[0].settings["fingerprint"] != before["fingerprint"]
    named = uci_tables.plan(Grid(kind="tables", datasets=("iris",), methods=("baseline",)))[0].settings
    assert "fingerprint" not in named
