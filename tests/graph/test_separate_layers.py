"""Axes over separate layers, told from axes of one layer: ensembles, depthwise kernels and experts."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from tests.graph.models import groups, roles, shape


def conv(x, w, groups=1):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=numbers, feature_group_count=groups)


def depthwise(x, w):
    """Convolve with a kernel (height, width, channels, outputs for each channel), as Keras stores it."""
    return conv(x, w.reshape(*w.shape[:2], 1, -1), groups=w.shape[2])


def channels_first(x, w):
    """Convolve with a depthwise kernel (channels, outputs for each channel, width)."""
    numbers, channels = ("NCH", "OIH", "NCH"), w.shape[0]
    w = w.reshape(-1, 1, w.shape[2])
    return jax.lax.conv_general_dilated(x, w, (1,), "SAME", dimension_numbers=numbers, feature_group_count=channels)


def split_and_merged(x, w):
    """Convolve with a depthwise kernel of Flax's layout, (height, width, 1, channels * outputs)."""
    channels = x.shape[-1]
    return depthwise(x, (2 * w).reshape(*w.shape[:2], channels, -1))


@pytest.mark.parametrize(
    ("apply", "data", "kernel", "expected"),
    [
        (depthwise, (2, 5, 5, 6), (3, 3, 6, 2), "w w o o"),
        (depthwise, (2, 5, 5, 6), (1, 1, 6, 6), "w w o o"),
        (depthwise, (2, 5, 5, 2), (3, 1, 2, 3), "w w o o"),
        (depthwise, (2, 5, 5, 6), (3, 3, 6, 1), "w w o i"),
        (channels_first, (2, 6, 5), (6, 2, 3), "o o w"),
        (split_and_merged, (2, 5, 5, 6), (3, 3, 1, 12), "w w s o"),  # its axis of size one is dropped
    ],
)
def test_a_depthwise_kernel_is_one_layer(apply, data, kernel, expected):
    channels = data[1] if apply is channels_first else data[-1]
    graph = jprune.trace_model(lambda p, x: apply(x, p["w"]), {"w": shape(*kernel)}, shape(*data))
    assert roles(graph) == {"w": expected}
    assert graph.axes["w"].groups == channels
    assert graph.kernels == ("w",)


@pytest.mark.parametrize("place", [0, 2, 4])
@pytest.mark.parametrize("outputs", [1, 3])
def test_vmapped_depthwise_kernels_are_a_layer_each(place, outputs):
    """Four kernels (3, 3, 6, outputs), stacked along any axis; they read the same data or data of their own."""
    sizes = [3, 3, 6, outputs]
    sizes.insert(place, 4)
    expected = ["w", "w", "o", "i" if outputs == 1 else "o"]
    expected.insert(place, "s")
    for data, in_axes in (((4, 2, 5, 5, 6), 0), ((2, 5, 5, 4, 6), 3)):
        apply = jax.vmap(depthwise, in_axes=(in_axes, place))
        graph = jprune.trace_model(lambda p, x, f=apply: f(x, p["w"]), {"w": shape(*sizes)}, shape(*data))
        assert roles(graph) == {"w": " ".join(expected)}
        assert graph.axes["w"].groups == 6


def network(p, x):
    x = jax.nn.relu(conv(x, p["first"]) + p["bias"])
    x = jax.nn.relu(conv(x, p["grouped"], groups=2))
    return conv(x, p["last"]).mean((1, 2)) @ p["head"]


NETWORK = {  # the shape of each leaf of one network, and its roles
    "first": ((3, 3, 2, 4), "w w i o"),
    "bias": ((1, 1, 1, 4), "o o o o"),
    "grouped": ((3, 3, 2, 6), "w w i o"),
    "last": ((1, 1, 6, 3), "w w i o"),
    "head": ((3, 5), "i o"),
}


@pytest.mark.parametrize("members", [2, 3, 4])
@pytest.mark.parametrize("own_data", [False, True])
@pytest.mark.parametrize(("data", "outputs"), [(2, 3), (1, 3), (2, 1)])
def test_a_vmapped_convolutional_network_is_stacked_in_every_leaf(members, own_data, data, outputs):
    shapes = {path: list(sizes) for path, (sizes, _) in NETWORK.items()}
    shapes["first"][2], shapes["last"][3], shapes["head"][0] = data, outputs, outputs
    params = {path: shape(members, *sizes) for path, sizes in shapes.items()}
    x = (members, 2, 5, 5, data) if own_data else (2, 5, 5, data)
    graph = jprune.trace_model(jax.vmap(network, in_axes=(0, 0 if own_data else None)), params, shape(*x))
    assert roles(graph) == {path: f"s {letters}" for path, (_, letters) in NETWORK.items()}
    assert {path: graph.axes[path].groups for path in graph.kernels} == {"first": 1, "grouped": 2, "last": 1, "head": 1}


def test_vmapped_grouped_convolutions_of_shared_data_are_stacked():
    params = {"grouped": shape(3, 3, 3, 1, 8), "last": shape(3, 1, 1, 8, 5)}
    apply = jax.vmap(lambda p, x: conv(jax.nn.relu(conv(x, p["grouped"], groups=4)), p["last"]), in_axes=(0, None))
    graph = jprune.trace_model(apply, params, shape(2, 5, 5, 4))
    assert roles(graph) == {"grouped": "s w w i o", "last": "s w w i o"}
    assert graph.axes["grouped"].groups == 4


def test_outputs_and_data_that_are_merged_by_the_model_are_not_separate_layers():
    """A plain convolution of merged heads with a kernel that has as many axes of outputs is one layer."""

    def apply(p, x):
        heads = jnp.einsum("bthi,hio->btho", x, p["heads"]).reshape(2, 1, 5, 12)
        return conv(heads, p["w"].reshape(1, 3, 12, 8))

    graph = jprune.trace_model(apply, {"heads": shape(4, 6, 3), "w": shape(1, 3, 12, 4, 2)}, shape(2, 5, 4, 6))
    assert roles(graph) == {"heads": "s i o", "w": "w w i o o"}


def mixed_kernels(p, x):
    """A convolution for each example, with a sum of kernels that the example weights."""
    weights = jax.nn.sigmoid(x.mean((1, 2)) @ p["router"])
    return jax.vmap(lambda x, weights: conv(x[None], jnp.tensordot(weights, p["w"], 1))[0])(x, weights)


def modulated(p, x):
    """A convolution for each example, with a kernel whose inputs the example scales, normalized."""
    scales = x.mean((1, 2)) @ p["router"]
    kernels = p["w"] * scales[:, None, None, :, None]
    kernels = kernels * jax.lax.rsqrt((kernels**2).sum((1, 2, 3), keepdims=True) + 1e-6)
    return jax.vmap(lambda x, kernel: conv(x[None], kernel)[0])(x, kernels)


@pytest.mark.parametrize(
    ("apply", "router", "kernel"),
    [
        (mixed_kernels, (2, 3), (3, 3, 3, 2, 8)),
        (mixed_kernels, (2, 3), (3, 1, 1, 2, 8)),
        (modulated, (2, 2), (3, 3, 2, 8)),
    ],
)
def test_kernels_that_data_mix_or_scale_before_a_convolution_are_unknown(apply, router, kernel):
    graph = jprune.trace_model(apply, {"router": shape(*router), "w": shape(*kernel)}, shape(4, 5, 5, 2))
    assert roles(graph) == {"router": "i o", "w": None}
    assert graph.unknown == {"w": "data multiply it, and the result is the kernel of a convolution"}


def test_layers_of_features_that_are_correlated_are_known():
    def apply(p, x, template):
        return conv(conv(x, p["w"]), jnp.moveaxis(conv(template, p["w"]), 0, -1))

    graph = jprune.trace_model(apply, {"w": shape(3, 3, 2, 8)}, shape(4, 9, 9, 2), shape(1, 3, 3, 2))
    assert roles(graph) == {"w": "w w i o"}


def experts(merged):
    def apply(p, x):
        gates = jax.nn.softmax(x @ p["router"])
        h = jax.nn.silu(jnp.einsum("bd,edf->ebf", x, p["gate"])) * jnp.einsum("bd,edf->ebf", x, p["up"])
        return merged(h, p["down"], gates)

    return apply


SIZES = [(4, 8, 10, 5), (4, 8, 16, 5), (8, 64, 128, 4), (64, 2048, 1408, 16), (128, 2048, 768, 4096), (2, 3, 7, 1)]


@pytest.mark.parametrize(("number", "features", "hidden", "batch"), SIZES)
@pytest.mark.parametrize(
    "merged",
    [
        lambda h, down, gates: jnp.einsum("ebf,efd,be->bd", h, down, gates),
        lambda h, down, gates: jnp.einsum("be,ebf,efd->bd", gates, h, down),
        lambda h, down, gates: jnp.einsum("ebf,be,efd->bd", h, gates, down, optimize=False),
        lambda h, down, gates: jnp.einsum("be,ebd->bd", gates, jnp.einsum("ebf,efd->ebd", h, down)),
    ],
    ids=["gates last", "gates first", "in order", "two products"],
)
def test_roles_of_experts_do_not_depend_on_the_order_of_the_contraction(merged, number, features, hidden, batch):
    up, down = shape(number, features, hidden), shape(number, hidden, features)
    params = {"router": shape(features, number), "gate": up, "up": up, "down": down}
    graph = jprune.trace_model(experts(merged), params, shape(batch, features))
    assert roles(graph) == {"router": "i o", "gate": "s i o", "up": "s i o", "down": "s i o"}
    assert (hidden, {("gate", 2): 1, ("up", 2): 1, ("down", 1): 1}) in groups(graph)


@pytest.mark.parametrize(
    "merged",
    [
        lambda h, down, gates: jnp.einsum("bef,efd->bd", gates[..., None] * h, down),
        lambda h, down, gates: jnp.tensordot((gates[..., None] * h).astype(jnp.bfloat16), down, ((1, 2), (0, 1))),
        lambda h, down, gates: (h * gates[..., None]).reshape(len(h), -1) @ down.reshape(-1, down.shape[2]),
        lambda h, down, gates: (gates[..., None] * jnp.einsum("bef,efd->bed", h, down)).sum(1),
        lambda h, down, gates: jnp.einsum("be,bef,efd->bd", gates, h, down),
        lambda h, down, gates: jnp.einsum("bef,efd->bd", jnp.where(gates[..., None] > 0, h, 0), down),
        lambda h, down, gates: jnp.einsum("bef,efd->bd", normalized(h) * gates[..., None], down),
    ],
    ids=["product", "tensordot", "one matrix", "sum", "einsum", "mask", "normalized"],
)
def test_experts_whose_hidden_units_are_multiplied_by_gates_are_separate_layers(merged):
    """The gates are those of the best two experts, put in place by one-hot vectors."""

    def apply(p, x):
        weights, best = jax.lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
        gates = (weights[..., None] * jax.nn.one_hot(best, 4)).sum(1)
        return merged(jax.nn.relu(jnp.einsum("bd,edf->bef", x, p["up"]) + p["bias"]), p["down"], gates)

    params = {"router": shape(8, 4), "up": shape(4, 8, 10), "bias": shape(4, 10), "down": shape(4, 10, 8)}
    graph = jprune.trace_model(apply, params, shape(5, 8))
    assert roles(graph) == {"router": "i o", "up": "s i o", "bias": "s o", "down": "s i o"}


@pytest.mark.parametrize("order", ["nec,ecf,efd->nd", "in two products"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("sizes", [(9, 3, 8, 10), (3, 5, 8, 300), (200, 2, 64, 6)])
def test_experts_whose_outputs_a_tensor_combines_are_separate_layers(order, soft, sizes):
    """Each expert has a number of slots, which dispatched tokens fill: one each, or with weights (soft experts)."""
    tokens, capacity, features, hidden = sizes

    def apply(p, x):
        logits = jnp.einsum("nd,edc->nec", x, p["slots"])
        dispatch = jax.nn.softmax(logits, 0)
        combine = jax.nn.softmax(logits, (1, 2))
        if not soft:
            dispatch = (logits == logits.max(0)).astype(x.dtype)
            combine = dispatch * jax.nn.softmax(x @ p["router"])[..., None]
        h = jax.nn.gelu(jnp.einsum("ecd,edf->ecf", jnp.einsum("nec,nd->ecd", dispatch, x), p["up"]))
        if order == "in two products":
            return jnp.einsum("nef,efd->nd", jnp.einsum("nec,ecf->nef", combine, h), p["down"])
        return jnp.einsum(order, combine, h, p["down"])

    up, down = shape(4, features, hidden), shape(4, hidden, features)
    params = {"slots": shape(4, features, capacity), "router": shape(features, 4), "up": up, "down": down}
    graph = jprune.trace_model(apply, params, shape(tokens, features))
    assert {path: roles(graph)[path] for path in ("up", "down")} == {"up": "s i o", "down": "s i o"}


def attention(p, x, v):
    q, k = (jnp.einsum("btd,hdk->bthk", x, p[name]) for name in "qk")
    weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
    return jnp.einsum("bhts,bshk->bthk", weights, v)


def linear_attention(p, x, v):
    q, k = (jnp.einsum("btd,hdk->bthk", x, p[name]) for name in "qk")
    return jnp.einsum("bthk,bhkv->bthv", q, jnp.einsum("bshk,bshv->bhkv", k, v))


def recurrence(p, x, v):
    """A moving average of each head, with a rate for each head and step."""

    def step(state, inputs):
        value, rate = inputs
        state = rate * state + (1 - rate) * value
        return state, state

    rates = jax.nn.sigmoid(x @ p["gate"])[..., None]
    _, states = jax.lax.scan(step, jnp.zeros_like(v[:, 0]), (jnp.moveaxis(v, 1, 0), jnp.moveaxis(rates, 1, 0)))
    return jnp.moveaxis(states, 0, 1)


def nothing(p, x, v):
    return v


def normalized(h):
    return h * jax.lax.rsqrt((h * h).mean(-1, keepdims=True) + 1e-6)


@pytest.mark.parametrize(
    ("mixed", "gated"),
    [
        *itertools.product([attention, linear_attention, recurrence], ["product", "einsum", "no"]),
        (nothing, "no"),
    ],
)
@pytest.mark.parametrize("norm", [False, True])
def test_heads_that_are_mixed_and_then_gated_or_normalized_are_not_experts(mixed, gated, norm):
    def apply(p, x):
        h = mixed(p, x, jnp.einsum("btd,hdk->bthk", x, p["v"]))
        h = normalized(h) if norm else h
        gates = jax.nn.sigmoid(x @ p["gate"])
        if gated == "einsum":
            return jnp.einsum("bth,bthk,hkd->btd", gates, h, p["out"])
        return jnp.einsum("bthk,hkd->btd", h * gates[..., None] if gated == "product" else h, p["out"])

    params = {name: shape(4, 8, 6) for name in "qkv"} | {"gate": shape(8, 4), "out": shape(4, 6, 8)}
    graph = jprune.trace_model(apply, params, shape(2, 5, 8))
    assert {path: roles(graph)[path] for path in ("v", "out")} == {"v": "o i o", "out": "i i o"}


def test_heads_after_the_inputs_that_are_gated_are_not_experts():
    def apply(p, x):
        h = jax.nn.relu(jnp.einsum("bd,dhk->bhk", x, p["up"])) * jax.nn.sigmoid(x @ p["gate"])[..., None]
        return jnp.einsum("bhk,hkd->bd", h, p["out"])

    graph = jprune.trace_model(apply, {"up": shape(8, 4, 6), "gate": shape(8, 4), "out": shape(4, 6, 8)}, shape(5, 8))
    assert roles(graph) == {"up": "i o o", "gate": "i o", "out": "i i o"}


def test_channels_and_positions_that_are_gated_are_not_experts():
    """Channels weighted as by squeeze and excitation, and positions by a mask, before a product over both."""

    def apply(p, x, mask):
        h = jax.nn.relu(conv(x, p["conv"]))
        h = h * jax.nn.sigmoid(h.mean((1, 2)) @ p["excite"])[:, None, None] * mask[..., None]
        return jnp.einsum("bhwc,hwcd->bd", h, p["head"])

    params = {"conv": shape(3, 3, 2, 6), "excite": shape(6, 6), "head": shape(5, 4, 6, 3)}
    graph = jprune.trace_model(apply, params, shape(2, 5, 4, 2), shape(2, 5, 4))
    assert roles(graph) == {"conv": "w w i o", "excite": "i o", "head": "i i i o"}


def test_experts_along_the_last_axis_are_separate_layers_of_every_leaf():
    def expert(p, x):
        return jax.nn.relu(x @ p["up"] + p["bias"]) @ p["down"]

    def apply(p, x):
        outputs = jax.vmap(expert, in_axes=(-1, None), out_axes=-1)(
            {name: p[name] for name in ("up", "bias", "down")}, x
        )
        return (outputs * jax.nn.softmax(x @ p["router"])[:, None]).sum(-1)

    params = {"router": shape(8, 4), "up": shape(8, 10, 4), "bias": shape(1, 10, 4), "down": shape(10, 8, 4)}
    graph = jprune.trace_model(apply, params, shape(5, 8))
    assert roles(graph) == {"router": "i o", "up": "i o s", "bias": "o o s", "down": "i o s"}


def test_channels_of_mixed_tokens_that_are_gated_are_not_experts():
    def apply(p, x):
        h = jnp.einsum("bsd,st->btd", jnp.tanh(x @ p["embed"]), p["tokens"])
        return jnp.einsum("btd,tdo->bo", h * jax.nn.sigmoid(x.mean(1) @ p["gate"])[:, None], p["head"])

    params = {"embed": shape(8, 6), "tokens": shape(5, 7), "gate": shape(8, 6), "head": shape(7, 6, 2)}
    graph = jprune.trace_model(apply, params, shape(3, 5, 8))
    assert roles(graph) == {"embed": "i o", "tokens": "i o", "gate": "i o", "head": "i i o"}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("heads", "features", "size", "length"), [(2, 8, 4, 3), (8, 16, 2, 5), (4, 512, 64, 128)])
def test_heads_of_attention_are_inputs_of_the_projection_after_it(heads, features, size, length, gated):
    """Also with heads first, as Gemma stores them, and with a gate for each head."""

    def apply(p, x):
        q, k, v = (jnp.einsum("btd,hdk->bthk", x, p[name]) for name in "qkv")
        h = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v)
        if gated:
            h = h * jax.nn.sigmoid(x @ p["gate"])[..., None]
        return jnp.einsum("bthk,hkd->btd", h, p["out"])

    params = {name: shape(heads, features, size) for name in "qkv"} | {"out": shape(heads, size, features)}
    params["gate"] = shape(features, heads)
    graph = jprune.trace_model(apply, params, shape(2, length, features))
    assert {path: roles(graph)[path] for path in "qkv"} == dict.fromkeys("qkv", "o i o")
    assert roles(graph)["out"] == "i i o"


def test_experts_of_one_product_keep_the_same_number_of_weights():
    draw = np.random.default_rng(0)
    scale = np.arange(1.0, 5.0)[:, None, None]
    up, down = scale * draw.normal(size=(4, 8, 10)), scale * draw.normal(size=(4, 10, 8))
    params = {"router": draw.normal(size=(8, 4)), "gate": up, "up": up, "down": down}
    apply = experts(lambda h, down, gates: jnp.einsum("ebf,efd,be->bd", h, down, gates))
    graph = jprune.trace_model(apply, params, shape(5, 8))
    masks = jprune.layer_masks(jprune.magnitude(where=graph)(params), sparsity=0.5, axes=graph)
    np.testing.assert_array_equal(masks["up"].sum((1, 2)), [40] * 4)
    np.testing.assert_array_equal(masks["down"].sum((1, 2)), [40] * 4)


def test_grams_of_experts_of_one_product_are_those_of_each_expert():
    draw = np.random.default_rng(0)
    h, gates = draw.normal(size=(3, 5, 10)).astype(np.float32), draw.random((5, 3)).astype(np.float32)
    apply = lambda p, batch: jnp.einsum("ebf,edf,be->bd", batch[0], p["down"], batch[1])  # the hidden units are last
    params = {"down": jnp.asarray(draw.normal(size=(3, 8, 10)), jnp.float32)}
    graph = jprune.trace_model(apply, params, (h, gates))
    assert roles(graph) == {"down": "s o i"}
    gated = h * gates.T[:, :, None]
    grams = jprune.scores.input_grams(apply, params, [(h, gates)], axes=graph)
    np.testing.assert_allclose(grams["down"].matrix, np.swapaxes(gated, 1, 2) @ gated, rtol=1e-5, atol=1e-6)
    scores = jprune.wanda(apply, axes=graph)(params, batch=(h, gates))
    expected = np.abs(params["down"]) * np.linalg.norm(gated, axis=1)[:, None]
    np.testing.assert_allclose(scores["down"], expected, rtol=1e-5)
