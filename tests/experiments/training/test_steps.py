"""One replicate in training, against numpy in float64, and many against one."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import jprune
from experiments.data import datasets
from experiments.storage import checkpoints, store
from experiments.training import phases, replicates, steps, tasks
from experiments.training.replicates import Placement
from experiments.training.steps import Recipe
from experiments.training.tasks import Task

pytestmark = pytest.mark.optax_promotes

ONE = Mesh(np.array(jax.devices()[:1]), ("replicate",))
ALL = replicates.all_devices()
RNG = np.random.default_rng(0)
X = RNG.normal(size=(12, 3)).astype(np.float32)
Y = RNG.integers(0, 2, 12).astype(np.int32)
SPLIT = datasets.Split(X, Y)


def init(key):
    """A linear model whose stats count the batches it has seen."""
    return {"kernel": jax.random.normal(key, (3, 2))}, {"seen": jnp.int32(0)}


def loss(params, context, mode):
    logits = context.batch.images @ params["kernel"]
    return tasks.cross_entropy(logits, context.batch.labels).mean(), {"seen": context.stats["seen"] + 1}


LINEAR = Task(init, loss, lambda params, stats, images: images @ params["kernel"], lambda params, context: [])


def on_device(split, mesh=ONE):
    return replicates.share(split, mesh)


@functools.cache
def compiled(task, recipe, placement, validation):
    """The inputs of training and the phase, compiled once for all tests that share them."""
    opening = replicates.spread(lambda i: (*task.init(replicates.key(0, i, 0)), replicates.key(0, i, 1)), placement)
    phase = phases.compile_phase(task, recipe, jprune.kernels, placement, examples=12, validation=validation)
    return opening, phase


def entering(task, indices):
    opening, _ = compiled(task, Recipe((0,), (0.1,), batch=6), Placement(ONE), 12)
    return opening(replicates.place(np.array(indices, np.int32), ONE))


def train(task, recipe, indices=(0,), placement=None, validation=SPLIT):
    """Train and return the state and the metrics (epochs, replicates)."""
    placement = placement or Placement(ONE)
    opening, phase = compiled(task, recipe, placement, len(validation.labels))
    begun = opening(replicates.place(np.array(indices, np.int32), placement.mesh))
    state, metrics = phases.fit(phase, begun, *(on_device(split, placement.mesh) for split in (SPLIT, validation)))
    return replicates.fetch(state._replace(key=0 * state.step), len(indices)), replicates.fetch(metrics, len(indices))


def test_a_host_loop_reports_an_epoch_when_the_first_steps_of_the_next_are_dispatched():
    """Reported after all steps of the next epoch, it would seem to have taken the time of two."""
    events = []
    noted = lambda name, call: lambda *inputs: events.append(name) or call(*inputs)
    opening, phase = compiled(LINEAR, Recipe((2,), (0.1,), batch=6), Placement(ONE, epoch="steps"), 12)
    phase = phase._replace(epoch=noted("first steps", phase.epoch), rest=noted("other steps", phase.rest))
    begun = opening(replicates.place(np.array([0], np.int32), ONE))
    phases.fit(phase, begun, on_device(SPLIT), on_device(SPLIT), lambda epoch, _: events.append(epoch))
    assert events == ["first steps", "other steps", "first steps", 1, "other steps", 2]


@pytest.mark.parametrize("loop", ["scan", "steps"])
def test_from_a_checkpoint_a_phase_ends_with_the_same_bits_on_another_number_of_devices(tmp_path, loop):
    """Three replicates: on one device, then from the checkpoint after the first of three epochs on two, padded to 4."""
    recipe, two = Recipe((3,), (0.1,), batch=6), Mesh(np.array(jax.devices()[:2]), (replicates.AXIS,))
    target = store.stage(tmp_path, "dense", {}, range(3))

    class Killed(Exception):
        """The run ends after its second epoch."""

    def run(mesh, kept=None, on_epoch=lambda epoch, _: None):
        placement = Placement(mesh, "map", loop)
        opening, phase = compiled(LINEAR, recipe, placement, 12)
        begun = opening(replicates.place(np.arange(3, dtype=np.int32), mesh))
        splits = on_device(SPLIT, mesh), on_device(SPLIT, mesh)
        state, metrics = phases.fit(phase, begun, *splits, on_epoch, kept=kept)
        return replicates.fetch(checkpoints.plain((state, metrics)), 3)

    def die(epoch, _):
        if epoch == 2:
            raise Killed

    whole = run(ONE)
    with pytest.raises(Killed):
        run(ONE, checkpoints.Checkpoints(target, {}, 0), die)
    reported = []
    kept = checkpoints.Checkpoints(target, {}, 1000)
    assert kept.done == 2
    again = run(two, kept, lambda epoch, _: reported.append(epoch))
    assert reported == [3]
    chex.assert_trees_all_equal(again, whole)


def numpy_sgd(weights, recipe, order):
    """The kernel and the losses after the steps of some epochs, in float64."""
    w, trace, losses = weights.astype(np.float64), np.zeros(weights.shape), []
    rates = np.repeat(recipe.learning_rates, recipe.epochs)
    for rate, permutation in zip(rates, order, strict=True):
        for i in range(len(permutation) // recipe.batch):
            chosen = permutation[i * recipe.batch : (i + 1) * recipe.batch]
            x, y = X[chosen].astype(np.float64), Y[chosen]
            z = x @ w
            p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
            losses.append(-np.log(p[np.arange(len(y)), y]).mean())
            g = x.T @ (p - np.eye(2)[y]) / len(y) + recipe.weight_decay * w
            trace = g + recipe.momentum * trace
            w = w - rate * (g + recipe.momentum * trace if recipe.nesterov else trace)
    return w, losses


@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_are_those_of_sgd_with_momentum_and_decay_worked_out_by_numpy(nesterov):
    recipe = Recipe((1, 2), (0.5, 0.05), batch=5, nesterov=nesterov, weight_decay=0.1)
    state, metrics = train(LINEAR, recipe)
    weights, _, key = entering(LINEAR, [0])
    begun = steps.begin(jprune.keep_zeros(), {"kernel": jnp.zeros((3, 2))}, {}, key[0])
    orders = [np.asarray(steps.open_epoch(begun, e, 12).order) for e in range(3)]
    expected, losses = numpy_sgd(np.asarray(weights["kernel"][0]), recipe, orders)
    np.testing.assert_allclose(state.params["kernel"][0], expected, rtol=2e-5)
    np.testing.assert_allclose([m.train_loss[0] for m in metrics], np.reshape(losses, (3, 2)).mean(1), rtol=1e-5)
    assert state.step.tolist() == [6]
    assert state.stats["seen"].tolist() == [6]


def test_one_cycle_rises_to_the_peak_and_falls_to_nothing_in_every_piece():
    """Two pieces of 10 and 20 steps, from the formula of a half cosine between 1/25, 1 and 1/250,000 of the peak."""
    recipe = Recipe((1, 2), (0.4, 0.1), schedule="one-cycle")
    found = [float(recipe.learning_rate(10)(step)) for step in range(30)]

    def between(start, stop, fraction):
        return stop + (start - stop) * (1 + np.cos(np.pi * fraction)) / 2

    expected = []
    for peak, length in ((0.4, 10), (0.1, 20)):
        rise = int(0.3 * length)
        expected += [between(peak / 25, peak, step / rise) for step in range(rise)]
        expected += [between(peak, peak / 250_000, step / (length - rise)) for step in range(length - rise)]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)
    assert found[3] == pytest.approx(0.4)
    assert found[16] == pytest.approx(0.1)


def test_a_constant_schedule_is_not_part_of_the_settings_of_a_recipe():
    assert "schedule" not in Recipe((1,), (0.1,)).settings()
    assert Recipe((1,), (0.1,), schedule="one-cycle").settings()["schedule"] == "one-cycle"


def test_an_epoch_sees_every_example_once_and_the_next_in_another_order():
    state = steps.begin(jprune.keep_zeros(), {"kernel": jnp.zeros((2, 2))}, {}, jax.random.key(1))
    orders = [np.asarray(steps.open_epoch(state, jnp.int32(e), 12).order) for e in range(2)]
    assert [sorted(order) for order in orders] == [list(range(12))] * 2
    assert orders[0].tolist() != orders[1].tolist()


def test_the_epoch_of_lowest_validation_loss_is_kept_with_its_weights():
    good = Recipe((1,), (0.5,), batch=6, weight_decay=0.0)
    first, _ = train(LINEAR, good)
    ruined = dataclasses.replace(good, epochs=(1, 2), learning_rates=(0.5, 500.0))
    state, metrics = train(LINEAR, ruined)
    losses = [float(m.validation_loss[0]) for m in metrics]
    assert losses[0] < min(losses[1:])
    assert state.best_epoch.tolist() == [1]
    assert state.best_loss[0] == np.float32(losses[0])
    np.testing.assert_allclose(state.best_params["kernel"], first.params["kernel"], rtol=1e-6)
    assert state.best_stats["seen"].tolist() == [2]
    assert state.stats["seen"].tolist() == [6]


def test_no_epoch_leaves_the_weights_that_entered():
    state, metrics = train(LINEAR, Recipe((0,), (0.1,), batch=6))
    np.testing.assert_array_equal(state.best_params["kernel"], entering(LINEAR, [0])[0]["kernel"])
    assert metrics == []
    assert state.best_epoch.tolist() == [0]


@pytest.mark.parametrize("epoch", ["scan", pytest.param("steps", marks=pytest.mark.slow)])
def test_a_loss_that_is_not_finite_stops_its_replicate_alone(epoch):
    def breaks(params, context, mode):
        value, stats = loss(params, context, mode)
        return jnp.where((params["bias"] == 2) & (stats["seen"] > 3), jnp.nan, value), stats

    def numbered(key):
        params, stats = init(key)
        return {**params, "bias": stats["seen"] + jax.random.randint(key, (), 0, 4).astype(jnp.float32)}, stats

    task = dataclasses.replace(LINEAR, init=numbered, loss=breaks)
    number = np.asarray(entering(task, range(6))[0]["bias"]) == 2
    assert 0 < number.sum() < 6, "the draw must have both kinds"
    recipe = Recipe((3,), (0.1,), batch=6, weight_decay=0.0)
    state, metrics = train(task, recipe, range(6), Placement(ONE, epoch=epoch))
    calm, _ = train(dataclasses.replace(task, loss=loss), recipe, range(6))
    assert state.stopped.tolist() == [3 if n else -1 for n in number]
    np.testing.assert_allclose(state.params["kernel"][~number], calm.params["kernel"][~number], rtol=1e-6)
    assert np.isfinite(state.params["kernel"]).all()
    assert (state.stats["seen"] == np.where(number, 3, 6)).all()
    assert (state.best_epoch[number] == 1).all()
    assert np.isnan(metrics[1].train_loss).tolist() == number.tolist()


@pytest.fixture(scope="module")
def nine_at_once():
    return train(LINEAR, Recipe((2,), (0.3,), batch=5), range(9))


LAYOUTS = [
    (ONE, "vmap", "steps"),
    (ONE, "map", "scan"),
    (ONE, "unroll", "steps"),
    (ALL, "vmap", "scan"),
    (ALL, "map", "steps"),
]


@pytest.mark.parametrize(("mesh", "form", "epoch"), LAYOUTS, ids=lambda x: str(getattr(x, "size", x)))
@pytest.mark.quick(2)
def test_numbers_do_not_depend_on_placement_block_or_number_of_replicates(nine_at_once, mesh, form, epoch):
    expected, metrics = nine_at_once
    state, found = train(LINEAR, Recipe((2,), (0.3,), batch=5), range(3, 6), Placement(mesh, form, epoch))
    np.testing.assert_allclose(state.best_params["kernel"], expected.best_params["kernel"][3:6], rtol=1e-5)
    np.testing.assert_allclose(found[1].validation_loss, metrics[1].validation_loss[3:6], rtol=1e-5)


def test_numbers_are_exactly_the_same_on_the_same_placement():
    recipe = Recipe((2,), (0.3,), batch=5)
    runs = [train(LINEAR, recipe, range(9), Placement(ALL))[0] for _ in range(2)]
    np.testing.assert_array_equal(runs[0].params["kernel"], runs[1].params["kernel"])


def test_a_weight_stays_zero_if_its_mask_is_false_and_not_because_it_starts_at_zero():
    """The first row of the kernel starts at zero; the mask removes the second row."""
    _, phase = compiled(LINEAR, Recipe((3,), (0.5,), batch=6), Placement(ONE), 12)
    weights = jnp.ones((1, 3, 2)).at[0, :2].set(0.0)
    key = replicates.place(np.zeros(1, np.int32), ONE)
    entering = {"kernel": weights}, {"seen": jnp.zeros(1, jnp.int32)}, jax.vmap(jax.random.key)(key)
    for masks, rows in (
        (None, [True, True]),
        ({"kernel": jnp.ones((1, 3, 2), bool).at[0, 1].set(False)}, [True, False]),
    ):
        state, _ = phases.fit(phase, (*entering, masks), on_device(SPLIT), on_device(SPLIT))
        assert (np.asarray(state.params["kernel"])[0, :2] != 0).all(1).tolist() == rows


@pytest.mark.parametrize("epoch", [pytest.param("scan", marks=pytest.mark.slow), "steps"])
def test_a_split_is_evaluated_whole_when_its_last_slice_overlaps(epoch):
    assert tasks.slices(1201) == (3, 500)
    x = RNG.normal(size=(1201, 3)).astype(np.float32)
    y = RNG.integers(0, 2, 1201).astype(np.int32)
    placement = Placement(ONE, epoch=epoch)
    state, metrics = train(LINEAR, Recipe((1,), (0.3,), batch=6), range(2), placement, datasets.Split(x, y))
    z = x.astype(np.float64) @ state.params["kernel"].astype(np.float64)
    p = np.exp(z) / np.exp(z).sum(-1, keepdims=True)
    expected = -np.log(p[:, np.arange(1201), y]).mean(1)
    np.testing.assert_allclose(metrics[0].validation_loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics[0].validation_accuracy, (z.argmax(-1) == y).mean(1), rtol=1e-6)
    predict = phases.compile_predict(LINEAR, placement, 1201)
    assert np.asarray(predict((state.params, state.stats), on_device(x))).tolist() == z.argmax(-1).tolist()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"epochs": (1, 2), "learning_rates": (0.1,)}, "must have the same length"),
        ({"epochs": (1,), "learning_rates": (0.1,), "batch": 0}, "batch=0 must be at least 1"),
        ({"epochs": (-1,), "learning_rates": (0.1,)}, r"every entry of epochs=\(-1,\) at least 0"),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Recipe(**arguments)


def test_a_batch_larger_than_the_split_is_refused():
    with pytest.raises(ValueError, match="batch=13 is more than the 12 examples"):
        train(LINEAR, Recipe((1,), (0.1,), batch=13))
