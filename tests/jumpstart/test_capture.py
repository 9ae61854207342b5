"""The preactivations of every layer in call order, captured without changing the model."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jprune


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(1, 2, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(2, rngs=rngs)
        self.body = nnx.Linear(32, 32, rngs=rngs)
        self.head = nnx.Linear(32, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm(self.conv(x)))
        x = nnx.relu(self.body(x.reshape(x.shape[0], -1)))
        return self.head(nnx.relu(self.body(x)))


X = jax.random.normal(jax.random.key(0), (5, 4, 4, 1))


def frozen(model):
    return jax.tree.map(np.asarray, nnx.state(model))


def test_layers_come_in_call_order_before_normalization_and_reused_ones_are_numbered():
    model = Net(nnx.Rngs(0))
    found = jprune.preactivations(model, X, skip_last=False)
    assert list(found) == ["conv", "body#0", "body#1", "head"]
    np.testing.assert_allclose(found["conv"], model.conv(X), rtol=1e-6)
    assert list(jprune.preactivations(model, X)) == ["conv", "body#0", "body#1"]
    assert list(jprune.preactivations(model, X, include="^body", exclude="#1$")) == ["body#0"]


def test_the_model_stays_as_it_was_and_call_with_preactivations_updates_it_as_a_call_does():
    model, twin = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    before = frozen(model)
    captured = jprune.preactivations(model, X, skip_last=False)
    chex.assert_trees_all_equal(before, frozen(model))
    outputs, preacts = jprune.jumpstart.call_with_preactivations(model, X, skip_last=False)
    np.testing.assert_allclose(outputs, twin(X), rtol=1e-5, atol=1e-6)
    chex.assert_trees_all_close(frozen(model), frozen(twin), rtol=1e-6)
    for name, value in captured.items():
        np.testing.assert_allclose(preacts[name], value, rtol=1e-6)


def test_linen_layers_come_under_the_same_names():
    class LinenNet(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.relu(nn.Dense(8, name="body")(x)))

    net, x = LinenNet(), X.reshape(5, 16)
    variables = net.init(jax.random.key(1), x)
    found = jprune.preactivations(net, variables, x, skip_last=False)
    assert list(found) == ["body", "head"]
    body = variables["params"]["body"]
    np.testing.assert_allclose(found["body"], x @ body["kernel"] + body["bias"].reshape(1, -1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found["head"], net.apply(variables, x), rtol=1e-5, atol=1e-6)


def test_the_penalty_of_captured_layers_has_a_gradient_under_jit():
    graph, params, rest = nnx.split(Net(nnx.Rngs(0)), nnx.Param, ...)

    @jax.jit
    def gradient(params):
        return jax.grad(
            lambda params: jprune.jumpstart_penalty(jprune.preactivations(nnx.merge(graph, params, rest), X))
        )(params)

    found = gradient(params)
    assert float(jnp.abs(found["body"]["kernel"].get_value()).max()) > 0
    assert not np.asarray(found["head"]["kernel"].get_value()).any()


def test_a_pattern_that_matches_no_layer_names_those_there_are():
    with pytest.raises(ValueError, match="include='dense' matches no layer; the model called conv, body#0"):
        jprune.preactivations(Net(nnx.Rngs(0)), X, include="dense")
