"""A classification task with batch normalization, whose statistics are passed in and returned as state."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh

import jprune
from experiments.data import datasets
from experiments.data.augment import normalise
from experiments.models import networks
from experiments.training import phases, replicates, tasks
from experiments.training.replicates import Placement
from experiments.training.steps import Recipe
from experiments.training.tasks import Context

pytestmark = pytest.mark.optax_promotes

RNG = np.random.default_rng(0)
SPLIT = datasets.Split(RNG.integers(0, 256, (16, 8, 8, 3)).astype(np.uint8), (np.arange(16) % 4).astype(np.int32))
MEAN, STD = np.full(3, 128, np.float32), np.full(3, 70, np.float32)
DATASET = datasets.Dataset("noise", SPLIT, SPLIT, SPLIT, tuple("abcd"), MEAN, STD)
ONE = Mesh(np.array(jax.devices()[:1]), ("replicate",))


class Small(nnx.Module):
    """A dense layer, batch normalization, and the head: quick to compile."""

    def __init__(self, input_shape, num_classes, *, rngs):
        self.dense = nnx.Linear(192, 5, rngs=rngs)
        self.norm = networks.BatchNorm(5, rngs=rngs)
        self.head = nnx.Linear(5, num_classes, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.norm(self.dense(x.reshape(len(x), -1)))))


@pytest.fixture(scope="module")
def task():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(networks._MODELS, "small", Small)
        yield tasks.classification(DATASET, "small")


def arrays(tree):
    paths, leaves, _ = jprune.trees.flatten(tree)
    return dict(zip(paths, map(np.array, leaves), strict=True))


def assert_close(found, expected, **tolerance):
    found, expected = arrays(found), arrays(expected)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, **tolerance, err_msg=path)


def test_loss_gradient_and_statistics_are_those_of_the_model_called_as_flax_calls_it(task):
    params, stats = task.init(jax.random.key(3))
    before = arrays(stats)
    context = Context(stats, SPLIT, jax.random.key(0))
    step = jax.jit(lambda params, context: jax.value_and_grad(task.loss, has_aux=True)(params, context, "train"))
    (loss, moved), grads = step(params, context)
    assert_close(stats, before, rtol=0)  # what the caller handed in stays as it was

    model = Small((8, 8, 3), 4, rngs=nnx.Rngs(jax.random.key(3)))

    def mean(model, images):
        return optax.softmax_cross_entropy_with_integer_labels(model(images), SPLIT.labels).mean()

    model.train()
    expected, slope = nnx.jit(nnx.value_and_grad(mean))(model, normalise(SPLIT.images, MEAN, STD))
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert_close(grads, slope, rtol=1e-3, atol=1e-5)
    assert_close(moved, nnx.state(model, nnx.BatchStat), rtol=1e-4, atol=1e-6)
    assert (arrays(moved)["norm/mean"] != before["norm/mean"]).all()


def test_in_use_the_statistics_are_read_and_stay(task):
    params, stats = task.init(jax.random.key(3))
    loss, after = jax.jit(task.loss, static_argnums=2)(params, Context(stats, SPLIT, jax.random.key(0)), "eval")
    assert_close(after, stats, rtol=0)
    z = np.asarray(task.logits(params, stats, SPLIT.images), np.float64)
    expected = np.log(np.exp(z).sum(1)) - z[np.arange(16), SPLIT.labels]
    np.testing.assert_allclose(loss, expected.mean(), rtol=1e-5)


def test_preactivations_leave_the_statistics_alone(task):
    params, stats = task.init(jax.random.key(3))
    before = arrays(stats)
    found = jax.jit(task.preactivations)(params, Context(stats, SPLIT, jax.random.key(0)))
    x = (SPLIT.images.reshape(16, 192).astype(np.float64) - 128) / 70
    kernel, bias = (arrays(params)[f"dense/{name}"] for name in ("kernel", "bias"))
    (hidden,) = found.values()
    np.testing.assert_allclose(hidden, x @ kernel + bias, rtol=1e-4, atol=1e-5)
    assert_close(stats, before, rtol=0)


@pytest.mark.slow
def test_each_replicate_trains_with_statistics_of_its_own_in_every_placement(task):
    recipe = Recipe((2,), (0.05,), batch=8)
    fresh = lambda i: (*task.init(replicates.key(0, i, 0)), replicates.key(0, i, 1))

    def train(placement, indices):
        index = replicates.place(np.array(indices, np.int32), ONE)
        phase = phases.compile_phase(task, recipe, jprune.kernels, placement, examples=16, validation=16)
        split = replicates.share(SPLIT, ONE)
        state, metrics = phases.fit(phase, replicates.spread(fresh, placement)(index), split, split)
        assert state.step.tolist() == [4] * len(indices)
        return arrays((state.params, state.stats)), np.array([m.validation_loss for m in metrics])

    both, losses = train(Placement(ONE, "vmap", "scan"), [0, 1])
    means = both["1/norm/mean"]
    assert (np.abs(means[0] - means[1]) > 1e-3).any()
    alone, alone_losses = train(Placement(ONE, "map", "steps"), [1])
    np.testing.assert_allclose(losses[:, 1:], alone_losses, rtol=1e-3)
    for path, leaf in alone.items():
        np.testing.assert_allclose(both[path][1:], leaf, rtol=2e-3, atol=2e-4, err_msg=path)
    assert jnp.isfinite(losses).all()
