"""The smaller network computes what the masked one computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from jprune.pruning.structured import removal


def conv(x, layer, padding):
    y = lax.conv_general_dilated(x, layer["kernel"], (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    return y + layer["bias"].reshape(1, 1, 1, -1)


def dense(x, layer):
    return x @ layer["kernel"] + layer["bias"].reshape(1, -1)


def forward(params, x, padding, activation):
    h = activation(conv(x, params["conv1"], padding))
    h = activation(conv(h, params["conv2"], padding))
    h = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    h = activation(dense(h.reshape(h.shape[0], -1), params["dense"]))
    return dense(h, params["head"])


LAYERS = ["conv1", "conv2", "dense", "head"]


def random_net(seed, padding):
    side = 2 if padding == "VALID" else 4
    shapes = {"conv1": (3, 3, 2, 6), "conv2": (3, 3, 6, 5), "dense": (side * side * 5, 8), "head": (8, 3)}
    rng = np.random.default_rng(seed)
    params = {
        name: {
            "kernel": jnp.asarray(rng.normal(size=shape), jnp.float32),
            "bias": jnp.asarray(rng.normal(size=shape[-1]), jnp.float32),
        }
        for name, shape in shapes.items()
    }
    masks = {name: {"kernel": rng.random(shape) < 0.7, "bias": None} for name, shape in shapes.items()}
    for name in LAYERS[:-1]:
        masks[name]["kernel"][..., rng.random(shapes[name][-1]) < 0.4] = False  # without weights into them
    masks["head"]["kernel"][rng.random(8) < 0.4] = False  # without weights out of them
    return params, masks


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["SAME", "VALID"]), st.sampled_from(["relu", "tanh"]))
def test_outputs_equal_those_of_the_masked_network(seed, padding, activation):
    act = {"relu": jax.nn.relu, "tanh": jnp.tanh}[activation]
    params, masks = random_net(seed, padding)
    small = removal.remove_dead(params, masks, layers=LAYERS, activation=act, padding=padding)
    masked = {
        name: {
            "kernel": params[name]["kernel"] * masks[name]["kernel"].astype(np.float32),
            "bias": params[name]["bias"],
        }
        for name in LAYERS
    }
    x = jnp.asarray(np.random.default_rng(seed).normal(size=(3, 8, 8, 2)), jnp.float32)
    np.testing.assert_allclose(
        forward(small.params, x, padding, act), forward(masked, x, padding, act), rtol=2e-4, atol=2e-4
    )
    for name in LAYERS:
        assert small.params[name]["kernel"].shape[-1] == small.units[name].sum()
        assert small.params[name]["bias"].shape == (small.units[name].sum(),)
    assert small.units["head"].all()
    if padding == "VALID":  # every constant moves on, so what has no weights into it is gone
        for name in LAYERS[:-1]:
            unfed = ~masks[name]["kernel"].reshape(-1, masks[name]["kernel"].shape[-1]).any(0)
            assert not small.units[name][unfed].any() or small.units[name].sum() == 1


def test_a_constant_before_a_padded_convolution_stays_unless_it_is_zero():
    params, _ = random_net(0, "SAME")
    params["conv1"]["kernel"] = params["conv1"]["kernel"].at[..., :2].set(0.0)
    params["conv1"]["bias"] = params["conv1"]["bias"].at[0].set(-1.0).at[1].set(1.0)
    units = removal.remove_dead(params, layers=LAYERS).units["conv1"]
    assert units.tolist() == [False, True, True, True, True, True]


def test_removal_travels_back_through_layers_that_only_fed_what_went():
    params = {
        "a": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
        "b": {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]]), "bias": jnp.zeros(2)},
        "c": {"kernel": jnp.array([[0.0], [2.0]]), "bias": jnp.zeros(1)},
    }
    small = removal.remove_dead(params, layers=["a", "b", "c"])
    assert small.units["b"].tolist() == [False, True]
    assert small.units["a"].tolist() == [False, True]
    assert small.params["b"]["kernel"].tolist() == [[1.0]]


def test_units_known_to_be_dead_on_the_data_go():
    params, _ = random_net(1, "VALID")
    params["dense"]["bias"] = params["dense"]["bias"].at[3].set(-1e6)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 8, 2)), jnp.float32)
    dead = {"dense": np.arange(8) == 3}
    small = removal.remove_dead(params, layers=LAYERS, dead=dead, padding="VALID")
    assert small.units["dense"].tolist() == [i != 3 for i in range(8)]
    np.testing.assert_allclose(
        forward(small.params, x, "VALID", jax.nn.relu), forward(params, x, "VALID", jax.nn.relu), rtol=1e-4, atol=1e-4
    )


def test_one_unit_of_a_layer_always_stays():
    params, _ = random_net(2, "VALID")
    params["dense"]["kernel"] = jnp.zeros_like(params["dense"]["kernel"])
    small = removal.remove_dead(params, layers=LAYERS, padding="VALID")
    assert small.units["dense"].sum() == 1
    x = jnp.ones((1, 8, 8, 2))
    np.testing.assert_allclose(
        forward(small.params, x, "VALID", jax.nn.relu), forward(params, x, "VALID", jax.nn.relu), rtol=1e-4
    )


def test_an_nnx_model_takes_its_smaller_state():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(4, 6, rngs=rngs)
            self.head = nnx.Linear(6, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(jax.nn.relu(self.body(x)))

    model = Net(nnx.Rngs(0))
    state = nnx.state(model, nnx.Param)
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), state)
    masks["body"]["kernel"].set_value(masks["body"]["kernel"].get_value().at[:, 2:5].set(False))
    small = removal.remove_dead(state, masks, layers=["body", "head"])
    x = jnp.ones((3, 4))
    kernel = state["body"]["kernel"].get_value()
    nnx.update(model, {"body": {"kernel": kernel.at[:, 2:5].set(0.0)}})
    wanted = model(x)
    nnx.update(model, small.params)
    assert model.body.kernel.get_value().shape == (4, 3)
    np.testing.assert_allclose(model(x), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": ["conv1", "nope"]}, "layers names 'nope', which has no kernel"),
        ({"layers": ["conv2", "conv1", "head"]}, "'conv2' has 5 units and the next layer 2 inputs"),
        ({"layers": LAYERS, "dead": {"conv1": np.ones(5, bool)}}, r"dead names 'conv1' with shape \(5,\)"),
        ({"layers": LAYERS, "padding": "same"}, "padding='same'; it is 'SAME' or 'VALID'"),
    ],
)
def test_what_is_no_plain_chain_is_refused(options, message):
    params, _ = random_net(0, "SAME")
    with pytest.raises(ValueError, match=message):
        removal.remove_dead(params, **options)
