"""The activity report of a model over a data set, against statuses of all its preactivations at once."""

import gc
import weakref

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jprune

RNG = np.random.default_rng(0)
X = RNG.normal(size=(23, 6)).astype(np.float32)


def network(seed=0):
    layers = []
    for width_in, width_out in ((6, 5), (5, 4), (4, 3)):
        layers += [nnx.Linear(width_in, width_out, rngs=nnx.Rngs(seed + width_in)), nnx.relu]
    model = nnx.Sequential(*layers)
    # One unit is dead and one linear for every input, so that no column is trivially zero.
    model.layers[2].bias[...] = jnp.array([-99.0, 99.0, 0.0, 0.0])
    return model


def preacts_in_numpy(model, x):
    found, h = {}, x.astype(np.float64)
    for index in (0, 2, 4):
        layer = model.layers[index]
        z = h @ np.asarray(layer.kernel[...], np.float64) + np.asarray(layer.bias[...])
        found[f"layers/{index}"] = z
        h = np.maximum(z, 0)
    return found


def shares(highest, lowest):
    dead, linear = (highest <= 0).mean(), (lowest > 0).mean()
    return [dead, linear, 1 - dead - linear]


def test_a_row_a_layer_as_if_the_data_set_were_one_batch():
    model = network()
    batches = [X[:8], X[8:16], (X[16:], np.zeros(7))]  # the last is shorter, and comes with labels
    frame = jprune.jumpstart.activity_report(model, batches, skip_last=False)
    expected = preacts_in_numpy(model, X)
    assert list(frame.index) == list(expected)
    for name, z in expected.items():
        row = frame.loc[name]
        assert (row["units"], row["points"]) == (z.shape[1], 23)
        np.testing.assert_allclose(row[["unit_dead", "unit_linear", "unit_nonlinear"]].astype(float),
                                   shares(z.max(0), z.min(0)), atol=1e-7)  # fmt: skip
        np.testing.assert_allclose(row[["point_dead", "point_linear", "point_nonlinear"]].astype(float),
                                   shares(z.max(1), z.min(1)), atol=1e-7)  # fmt: skip
    assert frame.loc["layers/2", "unit_dead"] >= 0.25
    assert frame.loc["layers/2", "unit_linear"] >= 0.25


def test_padding_of_sequences_is_left_out_by_a_mask_of_positions():
    model = network()
    lengths = np.array([3, 1, 4, 0, 2, 5, 5])
    tokens = RNG.normal(size=(7, 5, 6)).astype(np.float32)
    real = np.arange(5) < lengths[:, None]
    tokens[~real] = 99.0
    parts = [slice(0, 3), slice(3, 4), slice(4, 7)]  # the second has no real position
    batches = [{"x": jnp.asarray(tokens[part]), "real": real[part]} for part in parts]
    frame = jprune.jumpstart.activity_report(
        model, batches, inputs=lambda batch: batch["x"], examples=lambda batch: batch["real"], skip_last=False
    )
    for name, z in preacts_in_numpy(model, tokens).items():
        row = frame.loc[name]
        of_points = [z[i][real[i]] for i in range(7) if lengths[i]]
        assert row["points"] == len(of_points) == 6
        flat = z[real]
        np.testing.assert_allclose(row[["unit_dead", "unit_linear", "unit_nonlinear"]].astype(float),
                                   shares(flat.max(0), flat.min(0)), atol=1e-7)  # fmt: skip
        extremes = np.array([[p.max(), p.min()] for p in of_points]).T
        np.testing.assert_allclose(row[["point_dead", "point_linear", "point_nonlinear"]].astype(float),
                                   shares(*extremes), atol=1e-7)  # fmt: skip
    with pytest.raises(ValueError, match=r"examples\(batch\) has shape \(2, 5\); allowed: \(7, 5\)"):
        jprune.jumpstart.activity_report(model, [tokens], examples=lambda batch: real[:2])


def test_the_ratios_of_the_whole_network_are_those_of_its_statuses():
    model = network(seed=3)
    found = jprune.jumpstart.activity_report(model, [X[:8], X[8:16], X[16:]]).attrs["activity"]
    preacts = jprune.preactivations(model, jnp.asarray(X))
    expected = jprune.jumpstart.activity(jprune.unit_status(preacts), jprune.jumpstart.point_status(preacts))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert all(isinstance(share, float) for share in found)


def test_a_linen_module_reports_the_same_rows():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(5, name="one")(x))
            return nn.Dense(4, name="two")(x)

    variables = Net().init(jax.random.key(0), X[:1])
    frame = jprune.jumpstart.activity_report(Net(), [X[:20], X[20:]], variables=variables, skip_last=False)
    one = variables["params"]["one"]
    z = X @ np.asarray(one["kernel"]) + np.asarray(one["bias"])
    np.testing.assert_allclose(frame.loc["one", "unit_dead"], (z.max(0) <= 0).mean(), atol=1e-7)
    np.testing.assert_allclose(frame.loc["one", "point_nonlinear"], ((z.max(1) > 0) & (z.min(1) <= 0)).mean())
    with pytest.raises(TypeError, match="model is a function; it must be an nnx"):
        jprune.jumpstart.activity_report(lambda x: x, [X])
    with pytest.raises(TypeError, match="needs its variables"):
        jprune.jumpstart.activity_report(Net(), [X])


@pytest.mark.slow
def test_memory_does_not_grow_with_the_data_set():
    """No batch, and no array as large as a batch, is alive when the second batch after it is requested."""
    model, seen, arrays = network(), [], []

    def batches():
        for _ in range(12):
            batch = RNG.normal(size=(64, 6)).astype(np.float32)
            seen.append(weakref.ref(batch))
            yield batch
            del batch
            gc.collect()
            assert sum(ref() is not None for ref in seen) <= 1
            arrays.append(sum(array.nbytes for array in jax.live_arrays()))

    jprune.jumpstart.activity_report(model, batches())
    assert len(arrays) == 12
    assert arrays[-1] <= arrays[1]


def test_it_compiles_once_and_alters_nothing():
    traces = []

    class Counting(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(6, 4, rngs=rngs)
            self.norm = nnx.BatchNorm(4, rngs=rngs)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            traces.append(x.shape)
            return self.head(nnx.relu(self.norm(self.body(x))))

    model = Counting(nnx.Rngs(0))
    before = jax.tree.map(np.asarray, nnx.state(model))
    jprune.jumpstart.activity_report(model, [X[:8], X[8:16], X[16:], X[:3]])
    assert traces == [(8, 6)]
    chex.assert_trees_all_equal(before, jax.tree.map(np.asarray, nnx.state(model)))


def test_batches_without_examples_are_left_out():
    model = network()
    frame = jprune.jumpstart.activity_report(model, [X[:0], X[:8], X[8:8], X[8:], jnp.asarray(X[:0])])
    wanted = jprune.jumpstart.activity_report(model, [X])
    assert frame["points"].tolist() == [23, 23]
    np.testing.assert_allclose(frame.to_numpy(float), wanted.to_numpy(float), rtol=1e-12)


def test_batches_that_cannot_be_read_are_refused():
    with pytest.raises(ValueError, match="batches has no examples"):
        jprune.jumpstart.activity_report(network(), [])
    with pytest.raises(TypeError, match="a batch is a dict; pass inputs="):
        jprune.jumpstart.activity_report(network(), [{"x": X}])
    for batch, given in ((X, r"an array of shape \(23, 6\)"), (jnp.asarray(X), "an array of"), ({"x": X}, "a dict")):
        with pytest.raises(TypeError, match=rf"batches is {given}.*one batch; pass a list .*: \[batch\]"):
            jprune.jumpstart.activity_report(network(), batch)
    frame = jprune.jumpstart.activity_report(network(), [{"x": X}], inputs=lambda batch: batch["x"])
    assert frame["points"].tolist() == [23, 23]
