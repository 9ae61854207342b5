"""Batch-norm statistics after pruning, exact against numpy; test_examples.py tests the accuracy with them."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jprune.pruning.recalibration import recalibrate_batch_norm


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(5)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.97)(x))
        x = nn.Dense(4)(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.5)(x)


def test_statistics_of_a_linen_model_are_those_of_all_examples():
    random = np.random.default_rng(0)
    x = (random.normal(size=(24, 3)) * [1, 30, 5] + [0, 100, 3]).astype(np.float32)
    model = LinenNet()
    variables = model.init(jax.random.key(0), x, train=False)
    params = variables["params"]
    one, two = (jax.tree.map(np.asarray, params[name]) for name in ("Dense_0", "Dense_1"))

    def update(statistics, batch):
        given = {"params": params, "batch_stats": statistics}
        return model.apply(given, batch, train=True, mutable=["batch_stats"])[1]["batch_stats"]

    batches = [x[:8], x[8:12], x[12:]]  # of different sizes
    found = recalibrate_batch_norm(update, variables["batch_stats"], batches)
    first = x.astype(np.float64) @ one["kernel"] + one["bias"]
    np.testing.assert_allclose(found["BatchNorm_0"]["mean"], first.mean(0), rtol=1e-4)
    np.testing.assert_allclose(found["BatchNorm_0"]["var"], first.var(0), rtol=1e-3)
    # Deeper layers see activations normalized batch by batch.
    normalized = np.concatenate(
        [(part - part.mean(0)) / np.sqrt(part.var(0) + 1e-5) for part in np.split(first, [8, 12])]
    )
    second = np.maximum(normalized, 0) @ two["kernel"] + two["bias"]
    np.testing.assert_allclose(found["BatchNorm_1"]["mean"], second.mean(0), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(found["BatchNorm_1"]["var"], second.var(0), rtol=1e-3, atol=1e-4)


def _averaged(statistics, x):
    batch = {"mean": x.mean(0), "var": x.var(0)}
    return {name: 0.9 * value + 0.1 * batch[name] for name, value in statistics.items()}


def test_a_variance_much_smaller_than_the_mean_keeps_its_digits():
    """Second moments of values near 300 have a spacing of .008 in float32."""
    x = 300.0 + 0.05 * np.random.default_rng(0).normal(size=(24, 3)).astype(np.float32)
    statistics = {"mean": jnp.zeros(3), "var": jnp.ones(3)}
    found = recalibrate_batch_norm(_averaged, statistics, [x[:8], x[8:12], x[12:]])
    np.testing.assert_allclose(found["var"], x.astype(np.float64).var(0), rtol=1e-2)
    np.testing.assert_allclose(found["mean"], x.astype(np.float64).mean(0), rtol=1e-6)


def test_a_single_array_of_statistics_is_averaged():
    x = np.array([[1.0, 2.0], [3.0, 4.0], [5.0, 9.0]], np.float32)
    found = recalibrate_batch_norm(lambda s, x: 0.5 * s + 0.5 * x.mean(0), jnp.zeros(2), [x[:1], x[1:]])
    np.testing.assert_allclose(found, [3.0, 5.0], rtol=1e-6)


def _still(statistics, batch):
    return statistics


@pytest.mark.parametrize(
    ("update", "batches", "message"),
    [
        (_still, [jnp.ones((2, 3))], "leaves the statistic 'mean' unchanged; run the model in train mode"),
        (_still, [], "batches has no example"),
        (lambda s, x: {"mean": 2.0 * s["mean"]}, [jnp.ones((2, 3))], "does not average the statistic 'mean'"),
        (lambda s, x: {}, [jnp.ones((2, 3))], "what update returned has no leaf 'mean'"),
    ],
)
def test_bad_updates_are_refused_by_name(update, batches, message):
    with pytest.raises(ValueError, match=message):
        recalibrate_batch_norm(update, {"mean": jnp.ones(3)}, batches)
