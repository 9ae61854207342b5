"""Roles and channels of plain functions, each worked out by hand."""

import inspect
import re

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jprune
from tests.graph.models import groups, roles, shape, tokens


def _trace(apply, *inputs, **params):
    return jprune.trace_model(apply, params, *inputs)


def test_a_multilayer_perceptron():
    graph = _trace(
        lambda p, x: jax.nn.relu(x @ p["a"] + p["bias"]) @ p["b"],
        shape(5, 3),
        a=shape(3, 8),
        bias=shape(8),
        b=shape(8, 2),
    )
    assert roles(graph) == {"a": "i o", "bias": "o", "b": "i o"}
    assert groups(graph) == [(8, {("a", 1): 1, ("bias", 0): 1, ("b", 0): 1})]
    assert graph.channels[0].exact
    assert graph.kernels == ("a", "b")
    assert graph.multiply_adds == {"a": 5 * 3 * 8, "b": 5 * 8 * 2, "bias": 0}
    assert graph.frozen == {("a", 0): "an axis of the model's inputs", ("b", 1): "an axis of the model's outputs"}


def test_nothing_is_computed_or_allocated():
    size = 1 << 18  # a kernel of 256 GB
    graph = _trace(lambda p, x: x @ p["w"], shape(1, size), w=shape(size, size))
    assert graph.axes["w"] == jprune.KernelAxes(inputs=(0,), outputs=(1,))


@pytest.mark.parametrize(
    ("product", "expected"),
    [
        (lambda w, x: x @ w, "i o"),
        (lambda w, x: x @ w.T, "o i"),
        (lambda w, x: jnp.einsum("oi,bi->bo", w, x), "o i"),
        (lambda w, x: x @ (w * 0.5), "i o"),
        (lambda w, x: x @ (w / jnp.sqrt(jnp.sum(w * w, axis=0) + 1e-6)), "i o"),
        (lambda w, x: x @ ((w - w.mean(0, keepdims=True)) / (w.std(0, keepdims=True) + 1e-6)), "i o"),
        (lambda w, x: x @ w.astype(jnp.bfloat16).astype(jnp.float32), "i o"),
        (lambda w, x: x.astype(jnp.bfloat16) @ w.astype(jnp.bfloat16), "i o"),
        (lambda w, x: x @ jnp.where(jnp.abs(w) > 0.1, w, 0), "i o"),
        (lambda w, x: x @ (w + jax.lax.stop_gradient(jnp.round(w) - w)), "i o"),
        (lambda w, x: x @ jnp.where(x.T > 0, w, 0), "i o"),
        (lambda w, x: (x * jnp.linalg.norm(x)) @ (w * jnp.linalg.norm(x)), "i o"),
        (lambda w, x: jax.checkpoint(lambda x: jax.jit(jnp.matmul)(x, w))(x), "i o"),
        (lambda w, x: x @ w @ w.T, "io io"),
        (
            lambda w, x: jax.lax.dot_general(
                x.astype(jnp.bfloat16),
                w.astype(jnp.bfloat16),
                (((1,), (0,)), ((), ())),
                preferred_element_type=jnp.float32,
            ),
            "i o",
        ),
    ],
)
def test_a_kernel_is_followed_to_the_product_that_reads_it(product, expected):
    sizes = (6, 4) if expected != "o i" else (4, 6)
    graph = _trace(lambda p, x: product(p["w"], x), shape(1, 6), w=shape(*sizes))
    assert roles(graph) == {"w": expected}
    assert graph.kernels == ("w",)


def test_stacked_layers_in_a_scan_a_loop_and_a_fori_loop():
    def scan(p, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"])[0]

    def loop(p, x):
        for layer in range(3):
            x = jnp.tanh(x @ p["w"][layer])
        return x

    def unpacked(p, x):
        for w in p["w"]:
            x = jnp.tanh(x @ w)
        return x

    def fori(p, x):
        return jax.lax.fori_loop(0, 3, lambda layer, x: jnp.tanh(x @ p["w"][layer]), x)

    def chosen(p, x):
        return jnp.tanh(x @ p["w"][jnp.argmax(x)])

    for apply in (scan, loop, unpacked, fori, chosen):
        assert roles(_trace(apply, shape(5, 4), w=shape(3, 4, 4))) == {"w": "s i o"}, apply.__name__
    assert _trace(scan, shape(5, 4), w=shape(3, 4, 4)).multiply_adds == {"w": 3 * 5 * 4 * 4}


def test_an_embedding_and_its_tied_head():
    embed = _trace(lambda p, t: p["e"][t] @ p["w"], tokens(5), e=shape(11, 4), w=shape(4, 2))
    assert roles(embed) == {"e": "i o", "w": "i o"}
    assert embed.kernels == ("w",)  # rows of an embedding are looked up, not summed over
    tied = _trace(lambda p, t: jnp.tanh(p["e"][t] * 2) @ p["e"].T, tokens(5), e=shape(11, 4))
    assert roles(tied) == {"e": "io io"}
    assert tied.axes["e"].tied
    assert groups(tied) == [(4, {("e", 1): 1})]


def test_low_rank_updates():
    graph = _trace(
        lambda p, x: x @ (p["w"] + 2.0 * p["a"] @ p["b"]), shape(5, 6), w=shape(6, 4), a=shape(6, 2), b=shape(2, 4)
    )
    assert roles(graph) == {"w": "i o", "a": "i o", "b": "i o"}
    assert groups(graph) == [(2, {("a", 1): 1, ("b", 0): 1})]
    outputs_first = _trace(
        lambda p, x: x @ (p["w"] + p["b"] @ p["a"]).T, shape(5, 6), w=shape(4, 6), b=shape(4, 2), a=shape(2, 6)
    )
    assert roles(outputs_first) == {"w": "o i", "b": "o i", "a": "o i"}


def test_an_unknown_primitive_is_named_with_the_leaf():
    def apply(p, x):
        return x @ jnp.linalg.qr(p["w"])[0] @ p["v"]

    with pytest.warns(UserWarning, match="primitive 'qr' is not supported.*'w'"):
        graph = _trace(apply, shape(5, 4), w=shape(4, 4), v=shape(4, 2))
    assert roles(graph) == {"w": None, "v": "i o"}
    assert "qr" in graph.unknown["w"]


def test_unread_parameters_and_axes_are_unknown():
    graph = _trace(lambda p, x: x + p["b"].mean(0), shape(5, 4), a=shape(3, 4), b=shape(7, 4))
    assert roles(graph) == {"a": None, "b": None}
    assert graph.unknown == {"a": "nothing reads it", "b": "nothing reads its axis 0"}


def test_attention_heads():
    def apply(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k) / 2.0)
        return jnp.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, v), p["out"])

    graph = _trace(apply, shape(2, 3, 8), **{name: shape(8, 2, 4) for name in "qkv"}, out=shape(2, 4, 8))
    assert roles(graph) == {"q": "i o o", "k": "i o o", "v": "i o o", "out": "i i o"}
    assert groups(graph) == [
        (2, {("k", 1): 1, ("out", 0): 1, ("q", 1): 1, ("v", 1): 1}),
        (4, {("k", 2): 1, ("q", 2): 1}),
        (4, {("out", 1): 1, ("v", 2): 1}),
    ]
    assert graph.other_multiply_adds == 2 * (2 * 2 * 3 * 3 * 4)


def test_fused_projections_split_into_whole_heads():
    def apply(p, x):
        q, k, v = jnp.split((x @ p["qkv"]).reshape(2, 3, 6, 4), 3, axis=2)
        weights = jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k))
        return jnp.einsum("bhts,bshk->bthk", weights, v).reshape(2, 3, 8) @ p["out"]

    graph = _trace(apply, shape(2, 3, 8), qkv=shape(8, 24), out=shape(8, 8))
    assert roles(graph) == {"qkv": "i o", "out": "i o"}
    assert groups(graph) == [(2, {("out", 0): 4, ("qkv", 1): 12})]
    member = next(member for member in graph.channels[0].members if member.path == "qkv")
    # Heads 0 and 1 of queries, keys and values, each four columns wide.
    assert member.indices[1].tolist() == [4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]


def test_concatenated_inputs_are_separate_channels():
    def apply(p, x):
        return jnp.concatenate([jnp.tanh(x @ p["a"]), jnp.tanh(x @ p["b"])], axis=-1) @ p["c"]

    graph = _trace(apply, shape(5, 3), a=shape(3, 4), b=shape(3, 6), c=shape(10, 2))
    assert groups(graph) == [(4, {("a", 1): 1, ("c", 0): 1}), (6, {("b", 1): 1, ("c", 0): 1})]
    by_size = {group.size: group for group in graph.channels}
    assert {m.path: m.indices[:, 0].tolist() for m in by_size[6].members}["c"] == [4, 5, 6, 7, 8, 9]


def test_an_axis_that_is_summed_over_without_being_zero_is_not_exact():
    softmax = _trace(lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"], shape(5, 3), a=shape(3, 4), b=shape(4, 2))
    (group,) = softmax.channels
    assert not group.exact
    assert any("reduce_max" in why for why in group.why)
    (summed,) = _trace(lambda p, x: jnp.tanh(x @ p["a"]).sum(-1), shape(5, 3), a=shape(3, 4)).channels
    assert summed.exact


def test_state_is_cut_with_its_channels():
    def apply(p, state, x):
        h = x @ p["a"]
        new = {"mean": 0.9 * state["mean"] + 0.1 * h.mean(0)}
        return jax.nn.relu((h - state["mean"]) * p["scale"]) @ p["b"], new

    params = {"a": shape(3, 8), "scale": shape(8), "b": shape(8, 2)}
    graph = jprune.trace_model(apply, params, shape(5, 3), state={"mean": shape(8)})
    assert groups(graph) == [(8, {("a", 1): 1, ("b", 0): 1, ("scale", 0): 1, ("mean", 0): 1})]
    (group,) = graph.channels
    assert [member.path for member in group.state] == ["mean"]
    assert group.exact

    def by_keyword(p, x, *, state):
        return apply(p, state, x)

    again = jprune.trace_model(by_keyword, params, shape(5, 3), state={"mean": shape(8)})
    assert groups(again) == groups(graph)
    numbered = lambda p, state, x: (apply(p, state, x)[0], {"mean": jnp.arange(8.0)})
    assert jprune.trace_model(numbered, params, shape(5, 3), state={"mean": shape(8)}).channels == ()


def test_roots_find_the_channels_of_every_array():
    graph = _trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], shape(5, 3), a=shape(3, 8), b=shape(8, 2))
    (group,) = graph.channels
    kernel, head = graph.program.inputs[:2]
    chex.assert_trees_all_equal(graph.roots[kernel.axes[1].ids], group.roots)
    chex.assert_trees_all_equal(graph.roots[head.axes[0].ids], group.roots)
    assert not graph.roots[kernel.axes[0].ids].any()
    assert [step.equation.primitive.name for step in graph.program.steps][-1] == "dot_general"


def test_the_table_names_every_leaf_and_says_why_axes_stay():
    graph = _trace(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], shape(5, 3), a=shape(3, 8), b=shape(8, 2))
    table = str(graph)
    assert re.search(r"^a +\(3, 8\) +inputs 0; outputs 1 +1:#0 +120$", table, re.MULTILINE)
    assert re.search(r"^#0: 8 channels, exact\n +a\[1\], b\[0\]$", table, re.MULTILINE)
    assert re.search(r"^b +1 +an axis of the model's outputs$", table, re.MULTILINE)


def test_axes_that_dropout_or_arrays_of_the_code_keep_say_what_to_do():
    params = {"a": jnp.ones((3, 8)), "b": jnp.ones((8, 2))}

    def trace(change):
        return jprune.trace_model(lambda p, x: change(x @ p["a"]) @ p["b"], params, jnp.ones((5, 3))).frozen["a", 1]

    dropout = lambda h: jnp.where(jax.random.bernoulli(jax.random.key(0), 0.5, h.shape), h, 0)
    assert trace(dropout).endswith("trace the model in evaluation mode")
    assert trace(lambda h: h * np.arange(8.0)).endswith("pass it in params or as state=")


def test_a_model_that_is_not_a_function_is_refused_with_the_order_of_the_arguments():
    with pytest.raises(TypeError, match=r"apply is a dict; it must be a function apply\(params, \*inputs\); the model"):
        inspect.unwrap(jprune.trace_model)({"w": jnp.ones((2, 2))}, lambda p, x: x @ p["w"], jnp.ones((1, 2)))


class Encoder(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(3)(x)


@pytest.mark.parametrize("bound", [False, True])
def test_a_linen_module_is_refused_with_the_function_to_give(bound):
    module, x = Encoder(), jnp.ones((2, 4))
    variables = module.init(jax.random.key(0), x)
    given = module.bind(variables) if bound else module
    with pytest.raises(
        TypeError, match=r"apply is the Linen module Encoder; .*lambda p, x: module\.apply\(\{'params': p"
    ):
        jprune.trace_model(given, variables["params"], x)


@pytest.mark.parametrize(
    "model",
    [
        lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0)),
        lambda: nnx.Linear(4, 3, rngs=nnx.Rngs(0)).__call__,
        lambda: eqx.nn.Linear(4, 3, key=jax.random.key(0)),
        lambda: eqx.filter_jit(eqx.nn.Linear(4, 3, key=jax.random.key(0))),
    ],
    ids=["nnx", "method", "equinox", "jitted"],
)
def test_a_model_with_its_own_arrays_is_refused_with_the_function_to_give(model):
    with pytest.raises(
        TypeError, match=r"apply is the model .*constants; pass a function of its parameters.*nnx\.merge"
    ):
        jprune.trace_model(model(), jnp.ones(4))


def test_a_partial_with_arrays_is_traced():
    def apply(scale, params, x):
        return x @ params["kernel"] * scale

    partial = jax.tree_util.Partial(apply, jnp.ones((2, 3)))
    assert jprune.trace_model(partial, {"kernel": jnp.ones((4, 3))}, jnp.ones((2, 4))).kernels == ("kernel",)


def test_a_group_of_channels_has_a_short_repr():
    params = {"a": jnp.ones((2, 300)), "b": jnp.ones((300, 1))}
    graph = jprune.trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 2)))
    assert len(repr(graph.channels[0])) < 250
    assert "Member(path='a', axis=1, indices=int32[300, 1])" in repr(graph.channels[0])
