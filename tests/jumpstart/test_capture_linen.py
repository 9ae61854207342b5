"""Preactivations of Linen modules: every kind of layer, scans with and without 'intermediates', names, state."""

import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune.jumpstart import linen

X = jax.random.normal(jax.random.key(0), (3, 5, 5, 2))
KEY = jax.random.key(1)


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


class Every(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        x = nn.relu(nn.ConvTranspose(2, (2, 2), name="transposed")(x))
        x = nn.relu(nn.ConvLocal(2, (5, 5), padding="VALID", name="local")(x))
        x = nn.relu(nn.DenseGeneral(6, axis=(1, 2, 3), name="general")(x))
        x = nn.relu(nn.Einsum((6, 4), "...a,ab->...b", name="einsum")(x))
        return nn.Dense(3, name="head")(x)


def test_every_weighted_layer_is_captured_in_call_order():
    variables = jax.jit(Every().init)(KEY, X)
    found = jax.jit(lambda variables: jprune.preactivations(Every(), variables, X, skip_last=False))(variables)
    assert list(found) == ["conv", "transposed", "local", "general", "einsum", "head"]
    _, captured = Every().apply(variables, X, capture_intermediates=True, mutable=["intermediates"])
    for name, value in found.items():
        close(value, captured["intermediates"][name]["__call__"][0])


class Projections(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.MultiHeadDotProductAttention(2, name="attention")(x)
        x = nn.DenseGeneral((2, 3), name="general")(x)
        x = nn.Einsum((2, 3, 5), name="each")(x, "...hk,hkm->...hm")
        return nn.DenseGeneral(3, batch_dims=(0,), name="own")(x)


def test_axes_of_output_features_are_one_axis_of_units():
    x = jax.random.normal(KEY, (4, 7, 6))
    variables = Projections().init(KEY, x)
    variables["params"]["general"]["bias"] = jnp.array([[-100.0] * 3, [0.0] * 3])
    found = jprune.preactivations(Projections(), variables, x, skip_last=False)
    shapes = {name: value.shape for name, value in found.items()}
    assert {shapes.pop(f"attention/{name}") for name in ("query", "key", "value")} == {(4, 7, 6)}
    # own: (4, 7, 2, 3), with separate weights at each of the first 4 indices, so the second axis is the batch.
    assert shapes == {"attention/out": (4, 7, 6), "general": (4, 7, 6), "each": (4, 7, 10), "own": (7, 2, 12)}
    general = variables["params"]["general"]
    z = np.einsum("btd,dhk->bthk", np.asarray(found["attention/out"]), general["kernel"]) + np.asarray(general["bias"])
    close(found["general"], z.reshape(4, 7, 6))
    assert jprune.unit_status(found)["general"].tolist()[:3] == [-1, -1, -1]


class Block(nn.Module):
    width: int = 4

    @nn.compact
    def __call__(self, x, _=None):
        return nn.relu(nn.Dense(self.width, name="body")(x)), None


def scanned(axes):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.Dense(4, name="first")(x)
            stack = nn.scan(Block, variable_axes=axes, split_rngs={"params": True}, length=3)
            x, _ = stack(name="stack")(x, None)
            return nn.Dense(2, name="head")(x)

    return Net()


def test_a_scanned_stack_counts_as_its_layers():
    net, x = scanned({"params": 0, "intermediates": 0}), X.reshape(3, -1)
    variables = jax.jit(net.init)(KEY, x)
    found = jprune.preactivations(net, variables, x)
    assert list(found) == ["first", "stack/body[0]", "stack/body[1]", "stack/body[2]"]
    weights = jax.tree.map(np.asarray, variables["params"])
    h = np.asarray(x) @ weights["first"]["kernel"] + weights["first"]["bias"]
    close(found["first"], h)
    for step in range(3):
        z = h @ weights["stack"]["body"]["kernel"][step] + weights["stack"]["body"]["bias"][step]
        close(found[f"stack/body[{step}]"], z)
        h = np.maximum(z, 0)
    stacked = jprune.preactivations(net, variables, x, stacked=True)
    assert stacked["stack/body"].values.shape == (3, 3, 4)
    assert float(jprune.jumpstart_penalty(stacked)) == pytest.approx(float(jprune.jumpstart_penalty(found)), rel=1e-6)


def test_a_scanned_stack_that_does_not_lift_intermediates_is_an_error_that_says_what_to_add():
    net, x = scanned({"params": 0}), X.reshape(3, -1)
    variables = net.init(KEY, x)
    for call in (jprune.preactivations, jprune.jumpstart.call_with_preactivations):
        with pytest.raises(ValueError, match=r"layer 'stack/body.*variable_axes=\{\.\.\., 'intermediates': 0\}"):
            call(net, variables, x)
    assert list(jprune.preactivations(net, variables, x, exclude="^stack")) == ["first"]


def test_a_layer_in_weight_norm_is_refused_with_the_exclude_that_leaves_it_out():
    class Normed(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = nn.relu(nn.Dense(4, name="first")(x))
            x = nn.relu(nn.WeightNorm(nn.Dense(4, name="normed"))(x))
            return nn.Dense(2, name="head")(x)

    x = X.reshape(3, -1)
    variables = Normed().init(KEY, x)
    with pytest.raises(ValueError, match="WeightNorm cannot lift it: leave") as raised:
        jprune.preactivations(Normed(), variables, x)
    exclude = re.search("exclude='(.*)'", str(raised.value))[1]
    assert list(jprune.preactivations(Normed(), variables, x, exclude=exclude)) == ["first"]


def test_a_module_called_several_times_is_numbered():
    class Reused(nn.Module):
        @nn.compact
        def __call__(self, x):
            body = nn.Dense(50, name="body")
            return nn.Dense(2, name="head")(nn.relu(body(nn.relu(body(x)))))

    x = X.reshape(3, -1)
    variables = Reused().init(KEY, x)
    found = jprune.preactivations(Reused(), variables, x)
    assert list(found) == ["body#0", "body#1"]
    body = variables["params"]["body"]
    again = jnp.maximum(found["body#0"], 0) @ body["kernel"] + body["bias"].reshape(1, -1)
    close(found["body#1"], again)


def test_a_subclass_that_calls_the_layer_it_extends_is_one_layer():
    class Doubled(nn.Dense):
        @nn.compact
        def __call__(self, x):
            return 2 * super().__call__(x)

    net, x = nn.Sequential([Doubled(3), nn.relu, Doubled(2)]), X.reshape(3, -1)
    variables = net.init(KEY, x)
    found = jprune.preactivations(net, variables, x)
    assert list(found) == ["layers_0"]
    close(found["layers_0"], 2 * x @ variables["params"]["layers_0"]["kernel"])


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train=True):
        x = nn.Conv(3, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.relu(x))
        return nn.Dense(2, name="head")(x.mean((1, 2)))


def test_batch_statistics_move_as_in_apply_and_only_where_they_are_mutable():
    net = Normed()
    variables = jax.jit(net.init)({"params": KEY, "dropout": KEY}, X)
    before = jax.tree.map(np.asarray, variables)
    options = {"mutable": ["batch_stats"], "rngs": {"dropout": jax.random.key(7)}}
    found = jprune.preactivations(net, variables, X, skip_last=False, **options)
    conv = variables["params"]["conv"]
    bare = nn.Conv(3, (3, 3)).apply({"params": conv}, X)
    close(found["conv"], bare)  # before the normalization
    (outputs, changed), preacts = jprune.jumpstart.call_with_preactivations(
        net, variables, X, skip_last=False, **options
    )
    expected, expected_changed = net.apply(variables, X, **options)
    close(outputs, expected)
    close(preacts["head"], expected)
    assert list(changed) == ["batch_stats"]
    jax.tree.map(close, changed["batch_stats"], expected_changed["batch_stats"])
    chex.assert_trees_all_equal(before, jax.tree.map(np.asarray, variables))


def test_without_mutable_it_returns_what_apply_returns():
    net = Normed()
    variables = jax.jit(net.init)({"params": KEY, "dropout": KEY}, X)
    outputs, preacts = jprune.jumpstart.call_with_preactivations(net, variables, X, train=False)
    close(outputs, net.apply(variables, X, train=False))
    assert list(preacts) == ["conv"]


def test_the_gradient_through_a_scanned_stack_is_that_of_the_layers_written_out():
    net, x = scanned({"params": 0, "intermediates": 0}), X.reshape(3, -1)
    variables = jax.jit(net.init)(KEY, x)

    def captured(params):
        return jprune.jumpstart_penalty(jprune.preactivations(net, {"params": params}, x, stacked=True))

    def written_out(params):
        h = x @ params["first"]["kernel"] + params["first"]["bias"].reshape(1, -1)
        layers = [h]
        for step in range(3):
            body = jax.tree.map(lambda p, step=step: p[step], params["stack"]["body"])
            layers.append(h @ body["kernel"] + body["bias"].reshape(1, -1))
            h = jax.nn.relu(layers[-1])
        return jprune.jumpstart_penalty(layers)

    both = jax.jit(lambda params: [jax.value_and_grad(f)(params) for f in (captured, written_out)])
    chex.assert_trees_all_close(*both(variables["params"]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip_last", [False, True])
def test_a_stack_that_runs_backwards_is_stacked_in_the_order_it_ran(skip_last):
    class Body(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return jax.nn.relu(nn.Dense(4, name="dense")(x)), None

    lifted = {"variable_axes": {"params": 0, "intermediates": 0}, "split_rngs": {"params": True}}
    net, x = nn.scan(Body, length=3, reverse=True, **lifted)(), jax.random.normal(KEY, (5, 4))
    variables = net.init(KEY, x, None)
    dense, h, ran = variables["params"]["dense"], np.asarray(x), []
    for step in (2, 1, 0):
        ran.append(h @ np.asarray(dense["kernel"][step]) + np.asarray(dense["bias"][step]))
        h = np.maximum(ran[-1], 0)
    ran = ran[: 3 - skip_last]
    (stacked,) = jprune.preactivations(net, variables, x, None, stacked=True, skip_last=skip_last).values()
    np.testing.assert_allclose(stacked.values, np.stack(ran), rtol=1e-5, atol=1e-6)
    singles = jprune.preactivations(net, variables, x, None, skip_last=skip_last)
    assert list(singles) == [f"dense[{step}]" for step in (2, 1, 0)][: len(ran)]
    np.testing.assert_allclose(np.stack(list(singles.values())), np.stack(ran), rtol=1e-5, atol=1e-6)


def test_models_that_cannot_be_called_are_refused():
    variables = Every().init(KEY, X)
    with pytest.raises(ValueError, match="include='dense' matches no layer; the model called conv, transposed"):
        jprune.preactivations(Every(), variables, X, include="dense")
    with pytest.raises(ValueError, match="exclude='dense' matches no layer"):
        jprune.preactivations(Every(), variables, X, exclude="dense")
    with pytest.raises(ValueError, match=r"include='\(' is not a regular expression"):
        jprune.preactivations(Every(), variables, X, include="(")
    with pytest.raises(TypeError, match="must be followed by its variables"):
        jprune.preactivations(Every())
    with pytest.raises(ValueError, match="Identity called no layer"):
        jprune.preactivations(type("Identity", (nn.Module,), {"__call__": lambda self, x: x})(), {}, X)


@pytest.mark.parametrize("features", [np.int64(4), np.array([2, 2]), [2, 2]])
def test_features_of_a_dense_layer_may_be_integers_of_numpy_and_lists(features):
    layer = nn.DenseGeneral(features)
    assert linen.general_units(jnp.ones((5, *np.atleast_1d(features))), layer.features, 0)[-1] == -1
