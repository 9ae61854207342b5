"""Selections, scores and tables with the graph of a real model: by hand, on NNX, Linen and Equinox modules."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jprune
from tests.graph.models import shapes

KEY = jax.random.key(0)
STACK = jnp.abs(jax.random.normal(KEY, (4, 16, 16))) * jnp.array([1, 0.1, 0.01, 0.001])[:, None, None]
X = jnp.ones((2, 16))


def _nnx_stack():
    @nnx.split_rngs(splits=4)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(rngs):
        return nnx.Linear(16, 16, rngs=rngs)

    graphdef, params = nnx.split(create(nnx.Rngs(0)))
    params["kernel"].set_value(STACK)

    def apply(params, x):
        step = nnx.scan(lambda x, layer: layer(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return step(x, nnx.merge(graphdef, params))

    return apply, params, "kernel", "bias"


def _linen_stack():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(16, name="dense")(x), None

    stack = nn.scan(nn.remat(Layer), variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()
    params = stack.init(KEY, X, None)["params"]
    params["dense"]["kernel"] = STACK
    return lambda params, x: stack.apply({"params": params}, x, None)[0], params, "dense/kernel", "dense/bias"


def _equinox_stack():
    layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(16, 16, key=key))(jax.random.split(KEY, 4))
    layers = eqx.tree_at(lambda layer: layer.weight, layers, STACK)

    def apply(layers, x):
        return jax.lax.scan(lambda x, layer: (jax.vmap(layer)(x), None), x, layers)[0]

    return apply, layers, "weight", "bias"


STACKS = pytest.mark.parametrize(
    "create", [_nnx_stack, pytest.param(_linen_stack, marks=pytest.mark.slow), _equinox_stack]
)


def _graph(apply, params, *inputs):
    return jprune.trace_model(apply, shapes(params), *shapes(inputs))


def _scores(params, path):
    return jprune.magnitude(where=lambda leaf, _: leaf == path)(params)


def _only(masks):
    (mask,) = jax.tree.leaves(masks)
    return np.asarray(mask)


@pytest.mark.parametrize("create", [_nnx_stack, _linen_stack, _equinox_stack])
def test_each_layer_of_a_stack_keeps_its_share_its_floor_and_its_row_of_the_table(create):
    apply, params, path, bias = create()
    graph = _graph(apply, params, X)
    scores = _scores(params, path)
    for select in (jprune.layer_masks, jprune.erk_masks, jprune.uniform_masks):
        assert _only(select(scores, keep=256, axes=graph)).sum((1, 2)).tolist() == [64] * 4
    pooled = _only(jprune.global_masks(scores, keep=256)).sum((1, 2))
    assert pooled.tolist() == [225, 31, 0, 0]
    floored = _only(jprune.global_masks(scores, keep=256, min_keep=16, axes=graph)).sum((1, 2))
    assert floored.sum() == 256
    assert floored[2:].tolist() == [16, 16]
    masks = jprune.layer_masks(scores, keep=256, axes=graph)
    table = jprune.cost_table(params, masks, axes=graph)
    assert table.index.tolist() == [name for leaf in graph.shapes for name in [f"{leaf}[{i}]" for i in range(4)]] + [
        "total"
    ]
    assert table.loc[[f"{path}[{i}]" for i in range(4)], "nonzeros"].tolist() == [64] * 4
    assert table.loc[f"{path}[0]", "multiply_adds"] == 2 * 16 * 16  # two examples
    assert table.loc[f"{path}[0]", "effective_multiply_adds"] == 2 * 64
    assert table.loc[f"{bias}[0]", "multiply_adds"] == 0


@STACKS
def test_channels_and_outputs_are_those_of_each_layer(create):
    apply, params, path, _ = create()
    graph = _graph(apply, params, X)
    (outputs,), (inputs,) = graph.axes[path].outputs, graph.axes[path].inputs
    assert (inputs, outputs) == ((2, 1) if path == "weight" else (1, 2))
    masks = _only(jprune.output_masks(_scores(params, path), sparsity=0.75, axes=graph))
    assert (masks.sum(inputs) == 4).all()
    masks = _only(jprune.channel_masks(_scores(params, path), sparsity=0.5, layerwise=True, axes=graph))
    per_channel = masks.sum(inputs)  # (layers, outputs)
    assert set(per_channel.ravel().tolist()) == {0, 16}
    assert (per_channel > 0).sum(1).tolist() == [8] * 4
    means = np.asarray(STACK).mean(inputs)
    for layer in range(4):
        np.testing.assert_array_equal(np.flatnonzero(per_channel[layer]), np.sort(np.argsort(means[layer])[8:]))
    assert len({tuple(np.flatnonzero(row)) for row in per_channel}) > 1  # layers choose their own channels


def _attention_nnx():
    graphdef, params, rest = nnx.split(nnx.MultiHeadAttention(5, 20, decode=False, rngs=nnx.Rngs(0)), nnx.Param, ...)
    return lambda params, x: nnx.merge(graphdef, params, rest)(x), params


def _attention_linen():
    module = nn.MultiHeadDotProductAttention(5, qkv_features=20)
    x = jnp.ones((2, 3, 20))
    return lambda params, x: module.apply({"params": params}, x), module.init(KEY, x)["params"]


def _attention_equinox():
    module = eqx.nn.MultiheadAttention(5, 20, key=KEY)
    params, static = eqx.partition(module, eqx.is_array)
    return lambda params, x: jax.vmap(lambda x: eqx.combine(params, static)(x, x, x))(x), params


def _rows(mask, axes):
    """One row for each true output, its inputs in row-major order."""
    order = (*axes.stacked, *axes.outputs, *axes.spatial, *axes.inputs)
    inputs = int(np.prod([mask.shape[axis] for axis in (*axes.spatial, *axes.inputs)]))
    return np.asarray(mask).transpose(order).reshape(-1, inputs)


@pytest.mark.parametrize(
    "create", [_attention_nnx, pytest.param(_attention_linen, marks=pytest.mark.slow), _attention_equinox]
)
def test_two_of_four_and_outputs_of_attention(create):
    apply, params = create()
    graph = _graph(apply, params, jnp.ones((2, 3, 20)))
    assert len(graph.kernels) == 4
    where = lambda path, _: path in graph.kernels
    scores = jprune.magnitude(where=where)(params)
    for masks, each in (
        (jax.jit(lambda scores: jprune.nm_masks(scores, n=2, m=4, axes=graph))(scores), {2}),
        (jax.jit(lambda scores: jprune.output_masks(scores, sparsity=0.4, axes=graph))(scores), {12}),
    ):
        paths = [path for path in graph.shapes if path in graph.kernels]
        for path, mask in zip(paths, jax.tree.leaves(masks), strict=True):
            rows = _rows(mask, graph.axes[path])
            assert rows.shape == (20, 20)
            grouped = rows.reshape(20, 5, 4) if each == {2} else rows[:, None]
            assert set(grouped.sum(-1).ravel().tolist()) == each, path


def test_without_a_divisor_init_names_the_leaf_and_where():
    params = {"w": jnp.ones((6, 3))}
    graph = jprune.trace_model(lambda p, x: x @ p["w"], params, jnp.ones((1, 6)))
    tx = jprune.prune(jprune.magnitude(), {0: 0.5}, selection=jprune.nm_masks, axes=graph)
    with pytest.raises(ValueError, match=r"leaf 'w' of shape \(6, 3\) has 6; .*where="):
        tx.init(params)


def test_two_of_four_of_convolutions_and_einsum():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.grouped = nnx.Conv(8, 6, (3,), feature_group_count=2, use_bias=False, rngs=rngs)
            self.up = nnx.ConvTranspose(6, 8, (3,), transpose_kernel=True, use_bias=False, rngs=rngs)
            self.einsum = nnx.Einsum("btc,dce->btde", (3, 8, 2), rngs=rngs)
            self.general = nnx.LinearGeneral((3, 2), 4, axis=(-2, -1), use_bias=False, rngs=rngs)

        def __call__(self, x):
            return self.general(self.einsum(self.up(self.grouped(x))))

    graphdef, params = nnx.split(Net(nnx.Rngs(0)))
    graph = _graph(lambda params, x: nnx.merge(graphdef, params)(x), params, jnp.ones((1, 5, 8)))
    fans = {"grouped/kernel": (6, 12), "up/kernel": (8, 18), "einsum/kernel": (6, 8), "general/kernel": (4, 6)}
    m = {"grouped/kernel": 4, "up/kernel": 2, "einsum/kernel": 4, "general/kernel": 2}
    for path, (outputs, inputs) in fans.items():
        scores = _scores(params, path)
        mask = _only(jax.jit(lambda scores, m=m[path]: jprune.nm_masks(scores, n=1, m=m, axes=graph))(scores))
        rows = _rows(mask, graph.axes[path])
        assert rows.shape == (outputs, inputs)
        assert set(rows.reshape(outputs, -1, m[path]).sum(-1).ravel().tolist()) == {1}, path


def test_erk_counts_the_inputs_and_outputs_of_each_layer():
    # Densities in proportion to (in + out) / (in * out), all inputs as one and all outputs as one.
    params = {"q": jnp.abs(jax.random.normal(KEY, (3, 24, 4, 6))), "w": jnp.abs(jax.random.normal(KEY, (24, 96)))}

    def apply(p, x):
        x, _ = jax.lax.scan(lambda x, q: (jnp.einsum("bi,ihd->bhd", x, q).reshape(-1, 24), None), x, p["q"])
        return x @ p["w"]

    graph = jprune.trace_model(apply, params, jnp.ones((2, 24)))
    masks = jprune.erk_masks(jprune.magnitude(where=lambda *_: True)(params), keep=264 * 2, axes=graph)
    # Shares: 24 + 24 for each of the three layers of q, 24 + 96 for w: 48 : 48 : 48 : 120 of 528.
    assert masks["q"].sum((1, 2, 3)).tolist() == [96, 96, 96]
    assert int(masks["w"].sum()) == 240


@STACKS
def test_wanda_has_norms_for_each_layer(create):
    apply, params, path, _ = create()
    graph = _graph(apply, params, X)
    inputs = {path: jnp.stack([jnp.ones((5, 16)) * scale for scale in (1.0, 100.0, 1.0, 1.0)])}
    score = jprune.wanda(activations=lambda *_: inputs, where=lambda leaf, _: leaf == path, axes=graph)
    norms = np.asarray(_leaf(score(params, batch=X)) / STACK)
    # The norm of five ones, and of five hundreds.
    np.testing.assert_allclose(norms[0], 2.236068, rtol=1e-5)
    np.testing.assert_allclose(norms[1], 223.6068, rtol=1e-5)
    seen = jprune.wanda(apply, where=lambda leaf, _: leaf == path, axes=graph)(params, batch=X)
    norms = np.asarray(_leaf(seen) / STACK)
    bias = next(leaf for p, leaf in zip(*_flat(params), strict=True) if p != path)
    x, (summed,) = np.asarray(X, np.float64), graph.axes[path].inputs
    for layer in range(4):
        expected = np.sqrt((x**2).sum(0))
        np.testing.assert_allclose(
            norms[layer], np.broadcast_to(expected[:, None] if summed == 1 else expected, (16, 16)), rtol=1e-4
        )
        kernel = np.asarray(STACK[layer], np.float64)
        x = x @ (kernel if summed == 1 else kernel.T) + np.asarray(bias[layer], np.float64)


@STACKS
def test_grams_are_those_of_each_layer(create):
    apply, params, path, _ = create()
    batch = jax.random.normal(jax.random.key(1), (5, 16))
    graph = _graph(apply, params, batch)
    grams = jprune.scores.input_grams(apply, params, [batch, batch], where=lambda leaf, _: leaf == path, axes=graph)
    bias = next(leaf for p, leaf in zip(*_flat(params), strict=True) if p != path)
    x, (summed,) = np.asarray(batch, np.float64), graph.axes[path].inputs
    for layer in range(4):
        np.testing.assert_allclose(grams[path].matrix[layer], 2 * x.T @ x, rtol=1e-3, atol=1e-3)
        kernel = np.asarray(STACK[layer], np.float64)
        x = x @ (kernel if summed == 1 else kernel.T) + np.asarray(bias[layer], np.float64)
    pruned = jprune.scores.sparsegpt(params, grams, sparsity=0.5, where=lambda leaf, _: leaf == path, axes=graph)
    assert _only(pruned.masks).sum((1, 2)).tolist() == [128] * 4


def _flat(tree):
    return jprune.trees.flatten(tree)[:2]


def _leaf(tree):
    (leaf,) = jax.tree.leaves(tree)
    return leaf


def test_experts_that_no_example_reached_are_named():
    def apply(p, x):
        chosen = jax.nn.one_hot(jnp.zeros(len(x), int), 2)  # all examples go to the first expert
        return jnp.einsum("eti,eio->eto", jnp.einsum("te,ti->eti", chosen, x), p["experts"]).sum(0)

    params = {"experts": jnp.ones((2, 4, 3))}
    x = 2 * jnp.ones((9, 4))
    graph = jprune.trace_model(apply, params, x)
    with pytest.warns(UserWarning, match=r"no example of the batch reached 'experts\[1\]'"):
        scores = jprune.wanda(apply, where=lambda *_: True, axes=graph)(params, batch=x)
    np.testing.assert_allclose(scores["experts"], np.full((2, 4, 3), 6.0), rtol=1e-6)  # sqrt(9 * 4)


def test_the_default_is_what_products_read():
    class Net(eqx.Module):
        embed: eqx.nn.Embedding
        norm: eqx.nn.LayerNorm
        cell: eqx.nn.LSTMCell
        head: eqx.nn.Linear

        def __init__(self, key):
            self.embed, self.norm = eqx.nn.Embedding(11, 8, key=key), eqx.nn.LayerNorm((5, 8))
            self.cell, self.head = eqx.nn.LSTMCell(8, 6, key=key), eqx.nn.Linear(6, 3, key=key)

        def __call__(self, t):
            x = self.norm(jax.vmap(self.embed)(t))
            (h, _), _ = jax.lax.scan(lambda s, x: (self.cell(x, s), None), (jnp.zeros(6), jnp.zeros(6)), x)
            return self.head(h)

    net = Net(KEY)
    graph = _graph(lambda net, t: jax.vmap(net)(t), net, jnp.zeros((2, 5), int))
    listed = [leaf.path for leaf in jprune.prunable(net, axes=graph)]
    assert listed == ["cell/weight_ih", "cell/weight_hh", "head/weight"]
    by_name = [leaf.path for leaf in jprune.prunable(net)]
    assert by_name == ["embed/weight", "norm/weight", "head/weight"]


def test_the_graph_adds_nothing_to_the_training_step():
    apply, params, path, _ = _linen_stack()
    graph = _graph(apply, params, X)

    def program(axes):
        tx = jprune.prune(jprune.magnitude(where=lambda leaf, _: leaf == path), {2: 0.5}, axes=axes)
        state = tx.init(params)
        return str(jax.make_jaxpr(tx.update)(params, state, params))

    assert program(graph) == program(None)


def test_a_leaf_that_the_graph_does_not_know_is_refused_with_the_graphs_reason():
    params = {"w": jnp.arange(16.0).reshape(4, 4), "v": jnp.ones((4, 2))}
    with pytest.warns(UserWarning, match="primitive 'qr' is not supported"):
        graph = jprune.trace_model(lambda p, x: x @ jnp.linalg.qr(p["w"])[0] @ p["v"], params, jnp.ones((5, 4)))
    quoted = r"the graph does not say which axes these are \('qr' reads it and is not supported\); leave the leaf out"
    with pytest.raises(ValueError, match=r"leaf 'w' of shape \(4, 4\): 2:4 groups .*" + quoted):
        jprune.nm_masks(params, 2, 4, axes=graph)
    with pytest.warns(UserWarning, match=quoted):
        jprune.layer_masks(params, sparsity=0.5, axes=graph)
