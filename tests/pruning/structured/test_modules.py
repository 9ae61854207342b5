"""Modules rebuilt with the smaller parameters compute the same as the smaller program."""

import inspect
import re
import warnings

import chex
import equinox as eqx
import flax.linen as linen_nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jprune
from jprune.pruning.structured import equinox as structured_equinox
from jprune.pruning.structured import linen
from jprune.pruning.structured import nnx as structured_nnx
from jprune.pruning.structured.cutting import feature_groups
from jprune.pruning.structured.selection import masks_without
from tests.pruning.structured import models
from tests.pruning.structured.test_removal import graph_of, half_of, masks_like, run_small


def remove_half(name):
    model = models.MODELS[name]()
    graph = graph_of(model)
    small = jprune.remove_channels(graph, model.params, masks_like(model.params, half_of(graph)[0]), state=model.state)
    return model, small, jax.jit(run_small(model, small))(small.params, *model.inputs)


call = nnx.jit(lambda module, *inputs: module(*inputs))

pytestmark = pytest.mark.usefixtures("usual_promotion")


def test_nnx_convolutions_and_batch_normalization():
    model, small, expected = remove_half("nnx_conv_net")
    module = structured_nnx.smaller_module(models.nnx_conv_net_module(), small.params, small.state)
    np.testing.assert_allclose(call(module, *model.inputs), expected, atol=1e-6)
    assert (module.conv.out_features, module.norm.num_features, module.last.in_features) == (3, 3, 3)
    assert models.nnx_conv_net_module().conv.out_features == 6


def test_nnx_attention_loses_heads_and_their_sizes():
    model = models.MODELS["nnx_block"]()
    graph = graph_of(model)
    removed = [  # heads and hidden units; half of a head is in the scale of the softmax
        (group, jnp.arange(group.size) < group.size // 2)
        for group in graph.channels
        if any(
            (member.path, member.axis) in (("attention/out/kernel", 0), ("up/kernel", 1)) for member in group.members
        )
    ]
    masks = masks_like(model.params, masks_without(graph, dict.fromkeys(graph.shapes, 0.0), removed, {}))
    small = jprune.remove_channels(graph, model.params, masks)
    assert "reshape" in small.table.differences[0]
    module = structured_nnx.smaller_module(models.nnx_block_module(), small.params)
    assert (module.attention.num_heads, module.attention.query.out_features, module.up.out_features) == (1, (1, 4), 3)
    expected = jax.jit(small.apply)(small.params, *model.inputs)
    np.testing.assert_allclose(call(module, *model.inputs), expected, atol=1e-6)
    assert small.differences(models.nnx_function(module)[0]) == ()


def test_nnx_parameters_of_another_module_are_refused():
    with pytest.raises(ValueError, match="params has a leaf 'kernels' that the module lacks"):
        structured_nnx.smaller_module(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), {"kernels": jnp.ones((2, 1))})


def test_what_is_not_a_module_is_refused():
    smaller_module = inspect.unwrap(structured_nnx.smaller_module)
    with pytest.raises(TypeError, match=r"model is the class Linear; it must be the nnx\.Module before"):
        smaller_module(nnx.Linear, {})
    with pytest.raises(TypeError, match=r"model is a dict; it must be the nnx\.Module before"):
        smaller_module({}, nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    with pytest.raises(TypeError, match="module is a dict; it must be a Linen module, not its apply"):
        inspect.unwrap(linen.smaller_apply)({})


class NNXNormalizedWeights(nnx.Module):
    def __init__(self, rngs):
        self.weight = nnx.WeightNorm(nnx.Linear(4, 8, rngs=rngs), rngs=rngs)
        self.spectral = nnx.SpectralNorm(nnx.Linear(8, 6, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.spectral(nnx.relu(self.weight(x)), update_stats=False)))


def test_nnx_wrappers_keep_arrays_that_are_not_variables():
    model = NNXNormalizedWeights(nnx.Rngs(0))  # WeightNorm has its scales in a dict of arrays, by paths
    graphdef, params, statistics = nnx.split(model, nnx.Param, ...)
    scores, x = jax.tree.map(jnp.abs, params), jnp.linspace(-1, 1, 20).reshape(5, 4)
    graph = jprune.trace_model(lambda p, s, x: nnx.merge(graphdef, p, s)(x), params, x, state=statistics)
    masks = jprune.channel_group_masks(graph, scores, sparsity=0.5, per_group=True)
    small = jprune.remove_channels(graph, params, masks, state=statistics)
    module = structured_nnx.smaller_module(model, small.params, small.state)
    np.testing.assert_allclose(module(x), small.apply(small.params, x, state=small.state), atol=1e-6)
    (scale,) = module.weight.scales.values()
    assert (scale.shape, module.weight.layer_instance.out_features, module.spectral.layer_instance.in_features) == (
        (4,),
        4,
        4,
    )
    assert model(x).shape == (5, 3)


def test_nnx_attention_with_heads_of_two_sizes_is_refused_where_flax_refuses_it():
    attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
    params = {
        "value": {"kernel": jnp.ones((8, 2, 3)), "bias": jnp.ones((2, 3))},
        "out": {"kernel": jnp.ones((2, 3, 8))},
    }
    message = r"heads of MultiHeadAttention 'a' have 4 features for queries and 3 for values, .* small\.apply.*"
    with pytest.raises(ValueError, match=message + re.escape(r"sparsity={'a/out/kernel\\[0\\]': fraction}")):
        structured_nnx.smaller_module(nnx.Dict(a=attention), {"a": params})
    attention.dropout_rate = 0.1  # with dropout, flax computes the weights itself
    assert structured_nnx.smaller_module(attention, params).out.kernel.shape == (2, 3, 8)


def test_nnx_attention_with_grouped_queries_has_a_cache_of_the_heads_that_are_left():
    attention = nnx.MultiHeadAttention(4, 8, in_kv_features=6, num_kv_heads=2, decode=False, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(attention)
    apply = lambda p, x, y: nnx.merge(graphdef, p)(x, y)
    x, y = jnp.linspace(-1, 1, 24).reshape(1, 3, 8), jnp.linspace(-1, 1, 12).reshape(1, 2, 6)
    graph = jprune.trace_model(apply, params, x, y)
    scores = jax.tree.map(jnp.abs, params)
    masks = jprune.channel_group_masks(graph, scores, sparsity={r"^out/kernel\[0\]": 0.5})
    small = jprune.remove_channels(graph, params, masks)
    module = structured_nnx.smaller_module(attention, small.params)
    assert (module.num_heads, module.num_kv_heads, module.in_kv_features) == (2, 1, 6)
    np.testing.assert_allclose(module(x, y), small.apply(small.params, x, y), atol=1e-6)
    module.init_cache((1, 3, 8))
    assert module.cached_key.shape == (1, 3, 1, 2)


def test_nnx_batch_normalization_without_its_smaller_statistics_is_refused():
    norm = nnx.BatchNorm(6, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"statistics of BatchNorm have 6 features and its scale 3; .* small\.state"):
        structured_nnx.smaller_module(norm, {"scale": jnp.ones(3), "bias": jnp.ones(3)})


def test_equinox_arrays_that_are_not_given_stay_and_unknown_ones_are_refused():
    class Model(eqx.Module):
        order: jax.Array
        layer: eqx.nn.Linear

    model = Model(jnp.arange(4), eqx.nn.Linear(4, 8, key=jax.random.key(0)))
    trained, _ = eqx.partition(model, eqx.is_inexact_array)
    small = eqx.tree_at(lambda m: (m.layer.weight, m.layer.bias), trained, (jnp.ones((5, 4)), jnp.ones(5)))
    module = structured_equinox.smaller_module(model, small)
    assert (module.layer.out_features, module.order.tolist()) == (5, [0, 1, 2, 3])
    with pytest.raises(ValueError, match="params has a leaf 'head/weight' that the module lacks"):
        structured_equinox.smaller_module(model, {"head": {"weight": jnp.ones((2, 2))}})


@pytest.mark.parametrize("name", ["linen_conv_net", "linen_recurrent"])
def test_linen_modules_take_their_sizes_from_the_parameters(name):
    model, small, expected = remove_half(name)
    module = getattr(models, f"{name}_module")()
    variables = {"params": small.params} | ({} if small.state is None else {"batch_stats": small.state})
    fitted = linen.smaller_apply(module, small.kept)
    np.testing.assert_allclose(jax.jit(fitted)(variables, *model.inputs), expected, atol=1e-6)
    if small.state is None:
        assert small.differences(lambda p, x: fitted({"params": p}, x)) == ()
    else:
        assert small.differences(lambda p, x, *, state: fitted({"params": p, "batch_stats": state}, x)) == ()


@pytest.mark.slow
def test_equinox_attention_and_dense_layers():
    model, small, _ = remove_half("equinox_block")
    expected = run_small(model, small)(small.params, *model.inputs)
    module = structured_equinox.smaller_module(models.equinox_block_module(), small.params)
    assert (module.attention.num_heads, module.up.out_features, module.down.in_features) == (1, 3, 3)
    np.testing.assert_allclose(jax.vmap(module)(*model.inputs), expected, atol=1e-6)
    assert small.table.differences
    full = models.equinox_block_module()
    assert small.differences(lambda p, x: jax.vmap(structured_equinox.smaller_module(full, p))(x)) == ()


X = jax.random.normal(jax.random.key(0), (2, 4, 8))


class LinenGroups(linen_nn.Module):
    """A grouped convolution of the inputs, which loses positions, and one of hidden channels, which loses groups."""

    @linen_nn.compact
    def __call__(self, x):
        x = linen_nn.relu(linen_nn.Conv(16, (1,), feature_group_count=2, name="inputs")(x))
        x = linen_nn.relu(linen_nn.Dense(8, name="hidden")(x))
        x = linen_nn.GroupNorm(num_groups=4, name="norm")(x)
        x = linen_nn.Conv(12, (3,), feature_group_count=4, name="groups")(x)
        return linen_nn.Dense(3, name="head")(linen_nn.relu(x))


class NnxGroups(nnx.Module):
    def __init__(self, rngs):
        self.inputs = nnx.Conv(8, 16, (1,), feature_group_count=2, rngs=rngs)
        self.hidden = nnx.Linear(16, 8, rngs=rngs)
        self.norm = nnx.GroupNorm(8, 4, rngs=rngs)
        self.groups = nnx.Conv(8, 12, (3,), feature_group_count=4, rngs=rngs)
        self.head = nnx.Linear(12, 3, rngs=rngs)

    def __call__(self, x):
        x = self.norm(nnx.relu(self.hidden(nnx.relu(self.inputs(x)))))
        return self.head(nnx.relu(self.groups(x)))


class EquinoxGroups(eqx.Module):
    inputs: eqx.nn.Conv1d
    hidden: eqx.nn.Conv1d
    norm: eqx.nn.GroupNorm
    groups: eqx.nn.Conv1d
    head: eqx.nn.Conv1d

    def __init__(self):
        key = jax.random.key(0)
        self.inputs = eqx.nn.Conv1d(8, 16, 1, groups=2, key=key)
        self.hidden = eqx.nn.Conv1d(16, 8, 1, key=key)
        self.norm = eqx.nn.GroupNorm(4, 8)
        self.groups = eqx.nn.Conv1d(8, 12, 3, padding=1, groups=4, key=key)
        self.head = eqx.nn.Conv1d(12, 3, 1, key=key)

    def __call__(self, x):
        x = self.norm(jax.nn.relu(self.hidden(jax.nn.relu(self.inputs(x)))))
        return self.head(jax.nn.relu(self.groups(x)))


def without_half(apply, params, x):
    """The model without 4 of 8 outputs of each group of ``inputs`` and without 2 of 4 groups of the rest."""
    graph = jprune.trace_model(apply, params, x)
    small = jprune.remove_channels(graph, params, masks_like(params, half_of(graph)[0]))
    return small, small.apply(small.params, x)


def test_nnx_grouped_layers_keep_their_groups_where_these_lose_positions():
    model = NnxGroups(nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    small, expected = without_half(lambda p, x: nnx.merge(graphdef, p)(x), params, X)
    assert small.params["inputs"]["kernel"].shape == (1, 4, 8)
    module = structured_nnx.smaller_module(model, small.params, kept=small.kept)
    assert (module.inputs.feature_group_count, module.inputs.in_features, module.inputs.out_features) == (2, 8, 8)
    assert (module.groups.feature_group_count, module.groups.in_features, module.groups.out_features) == (2, 4, 6)
    assert (module.norm.num_groups, module.norm.group_size) == (2, 2)
    np.testing.assert_allclose(module(X), expected, atol=1e-6)
    with pytest.raises(ValueError, match=r"'inputs/kernel' has 8 of 16 outputs in 2 groups.*pass kept=small\.kept"):
        structured_nnx.smaller_module(model, small.params)


class NnxStatistics(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 6, rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


class NnxShared(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(8, 6, rngs=rngs)
        self.one = nnx.Linear(6, 6, rngs=rngs)
        self.last = nnx.Linear(6, 3, rngs=rngs)
        self.two = self.one

    def __call__(self, x):
        x = nnx.relu(self.first(x))
        return self.last(x + nnx.relu(self.two(nnx.relu(self.one(x)))))


@pytest.mark.parametrize("kind", [NnxStatistics, NnxShared, NnxGroups])
def test_the_nnx_module_and_its_states_stay_as_they_are(kind):
    model = kind(nnx.Rngs(0))
    model.eval()
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    graph = jprune.trace_model(lambda p, x: nnx.merge(graphdef, p, rest)(x), params, X)
    small = jprune.remove_channels(graph, params, masks_like(params, half_of(graph)[0]), check=X)
    state = nnx.state(model)
    before, sizes, outputs = nnx.to_pure_dict(nnx.clone(state)), repr(graphdef), model(X)
    module = structured_nnx.smaller_module(model, small.params, rest, small.kept)
    np.testing.assert_allclose(module(X), small.apply(small.params, X), atol=1e-6)
    for kept in (state, nnx.state(model), nnx.merge_state(params, rest)):
        chex.assert_trees_all_equal(nnx.to_pure_dict(kept), before)
    assert repr(nnx.split(model)[0]) == sizes
    chex.assert_trees_all_equal(model(X), outputs)
    module.train()
    module(X)  # draws from the streams of the copy, and updates its statistics
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(model)), before)


def test_linen_grouped_layers_keep_their_groups_where_these_lose_positions():
    module = LinenGroups()
    variables = module.init(jax.random.key(1), X)
    small, expected = without_half(lambda p, x: module.apply({"params": p}, x), variables["params"], X)
    fitted = linen.smaller_apply(module, small.kept)
    np.testing.assert_allclose(fitted({"params": small.params}, X), expected, atol=1e-6)
    assert small.differences(lambda p, x: fitted({"params": p}, x)) == ()


def test_equinox_grouped_layers_keep_their_groups_where_these_lose_positions():
    model, x = EquinoxGroups(), X[0].T
    arrays, static = eqx.partition(model, eqx.is_array)
    small, expected = without_half(lambda p, x: eqx.combine(p, static)(x), arrays, x)
    module = structured_equinox.smaller_module(model, small.params, small.kept)
    assert (module.inputs.groups, module.inputs.in_channels, module.inputs.out_channels) == (2, 8, 8)
    assert (module.groups.groups, module.groups.in_channels, module.groups.out_channels) == (2, 4, 6)
    assert (module.norm.groups, module.norm.channels) == (2, 4)
    np.testing.assert_allclose(module(x), expected, atol=1e-6)
    moments = structured_equinox.smaller_module({"mu": model}, {"mu": small.params}, small.kept)["mu"]
    assert jax.tree.structure(moments) == jax.tree.structure(module)
    with pytest.raises(ValueError, match=r"'inputs/weight' has 8 of 16 outputs in 2 groups.*pass kept=small\.kept"):
        structured_equinox.smaller_module(model, small.params)


class LinenSequence(linen_nn.Module):
    layer: linen_nn.Module

    @linen_nn.compact
    def __call__(self, x):
        return linen_nn.Dense(2)(linen_nn.relu(self.layer(x)))


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (linen_nn.Einsum((4, 6), "btc,ch->bth"), (2, 5, 4)),
        (linen_nn.ConvLocal(6, (3,)), (2, 5, 4)),
        (linen_nn.RNN(linen_nn.MGUCell(6)), (2, 5, 4)),
        (linen_nn.RNN(linen_nn.ConvLSTMCell(6, (3,))), (2, 3, 4, 1)),
    ],
)
def test_less_common_linen_layers_take_their_sizes_from_the_parameters(layer, x):
    module, x = LinenSequence(layer), jax.random.normal(jax.random.key(0), x)
    params = module.init(jax.random.key(1), x)["params"]
    small, expected = without_half(lambda p, x: module.apply({"params": p}, x), params, x)
    assert small.params["Dense_0"]["kernel"].shape == (3, 2)
    fitted = linen.smaller_apply(module, small.kept)
    np.testing.assert_allclose(fitted({"params": small.params}, x), expected, atol=1e-6)
    assert small.differences(lambda p, x: fitted({"params": p}, x)) == ()


def test_an_equinox_transposed_convolution_takes_its_sizes_from_the_parameters():
    keys = jax.random.split(jax.random.key(0), 3)
    first, last = eqx.nn.Conv1d(3, 8, 1, key=keys[0]), eqx.nn.Conv1d(4, 2, 1, key=keys[2])
    model = eqx.nn.Sequential([first, eqx.nn.ConvTranspose1d(8, 4, 1, groups=4, key=keys[1]), last])
    x = jax.random.normal(jax.random.key(3), (3, 5))
    arrays, static = eqx.partition(model, eqx.is_array)
    small, expected = without_half(lambda p, x: eqx.combine(p, static)(x), arrays, x)
    module = structured_equinox.smaller_module(model, small.params, small.kept)
    assert (module[1].groups, module[1].in_channels, module[1].out_channels) == (2, 4, 2)
    np.testing.assert_allclose(module(x), expected, atol=1e-6)


class LinenNorms(linen_nn.Module):
    norm: linen_nn.Module

    @linen_nn.compact
    def __call__(self, x):
        x = linen_nn.Dense(8, name="embed")(x)
        x = x + linen_nn.Dense(8, name="down")(linen_nn.relu(linen_nn.Dense(6, name="up")(self.norm(x))))
        return linen_nn.Dense(3, name="head")(self.norm(x))


class NnxNorms(nnx.Module):
    def __init__(self, norm):
        rngs = nnx.Rngs(0)
        self.embed, self.norm = nnx.Linear(8, 8, rngs=rngs), norm
        self.up, self.down = nnx.Linear(8, 6, rngs=rngs), nnx.Linear(6, 8, rngs=rngs)
        self.head = nnx.Linear(8, 3, rngs=rngs)

    def __call__(self, x):
        x = self.embed(x)
        return self.head(self.norm(x + self.down(nnx.relu(self.up(self.norm(x))))))


class EquinoxNorms(eqx.Module):
    embed: eqx.nn.Linear
    norm: eqx.Module
    head: eqx.nn.Linear

    def __call__(self, x):
        return jax.vmap(lambda x: self.head(self.norm(self.embed(x))))(x)


def cut(apply, params, x, removed, *members):
    """The model without some channels of the groups that have these members."""
    graph = jprune.trace_model(apply, params, x)
    found = [g for g in graph.channels if any((m.path, m.axis) in members for m in g.members)]
    gone = [(group, jnp.asarray(removed(group.size))) for group in found]
    masks = masks_without(graph, dict.fromkeys(graph.shapes, 0.0), gone, {})
    return jprune.remove_channels(graph, params, masks_like(params, masks), check=x)


def first_half(size):
    return np.arange(size) < size // 2


def check_against_small(small, outputs, x, expected):
    """The warnings name what differs, and nothing differs without them."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        own = outputs()
    difference = float(jnp.abs(own - small.apply(small.params, x)).max())
    assert (difference < 1e-5) == (expected is None), difference
    messages = [str(one.message) for one in found]
    assert len(messages) == (expected is not None)
    assert all(f"the code of {expected} divides by its number of channels" in message for message in messages)


NORMS = {  # the norm, which channels of the stream go, and the layer that is named
    "layer": ("LayerNorm", {}, first_half, "LayerNorm 'norm'"),
    "rms": ("RMSNorm", {}, first_half, "RMSNorm 'norm'"),
    "no parameters": ("LayerNorm", {"use_scale": False, "use_bias": False}, first_half, "LayerNorm 'norm'"),
    "whole groups": ("GroupNorm", {"num_groups": 4}, first_half, None),
    "no channel of the stream": ("LayerNorm", {}, None, None),
}


@pytest.mark.parametrize("case", NORMS.values(), ids=NORMS)
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_layers_that_divide_by_fewer_channels_than_before_are_named(library, case):
    name, options, removed, expected = case
    group = ("embed/kernel", 1) if removed else ("up/kernel", 1)
    if library == "linen":
        module = LinenNorms(getattr(linen_nn, name)(**options))
        params = module.init(jax.random.key(1), X)["params"]
        small = cut(lambda p, x: module.apply({"params": p}, x), params, X, removed or first_half, group)
        outputs = lambda: linen.smaller_apply(module, small.kept)({"params": small.params}, X)
        declared, *left = small.table.differences
        assert "ScopeParamShapeError" in declared
        assert [("smaller_apply it can be used" in what, "div: the number 8" in what) for what in left] == [
            (not expected, bool(expected))
        ] * (2 if expected else 1)
    else:
        model = NnxNorms(getattr(nnx, name)(8, **options, rngs=nnx.Rngs(0)))
        graphdef, params = nnx.split(model)
        small = cut(lambda p, x: nnx.merge(graphdef, p)(x), params, X, removed or first_half, group)
        outputs = lambda: structured_nnx.smaller_module(model, small.params, kept=small.kept)(X)
    check_against_small(small, outputs, X, expected)


class LinenBlock(linen_nn.Module):
    norm: str
    options: dict

    @linen_nn.compact
    def __call__(self, x, _):
        y = getattr(linen_nn, self.norm)(**self.options, name="norm")(linen_nn.Dense(8, name="up")(x))
        return x + linen_nn.Dense(8, name="down")(linen_nn.relu(y)), None


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("norm", "options", "expected"),
    [("LayerNorm", {}, "LayerNorm 'blocks/norm'"), ("GroupNorm", {"num_groups": 4}, None)],
)
def test_linen_norms_are_read_along_their_channels_wherever_the_axis_of_layers_is(norm, options, expected, place):
    """The last axis of a scale was read, which is that of the layers if they are scanned along axis 1."""

    class Stack(linen_nn.Module):
        @linen_nn.compact
        def __call__(self, x):
            stack = linen_nn.scan(
                LinenBlock, variable_axes={"params": place}, split_rngs={"params": True}, length=4
            )  # as many layers as channels are left
            return stack(norm, options, name="blocks")(x, None)[0]

    module = Stack()
    params = module.init(jax.random.key(1), X)["params"]
    assert params["blocks"]["norm"]["scale"].shape == ((4, 8), (8, 4))[place]
    small = cut(lambda p, x: module.apply({"params": p}, x), params, X, first_half, ("blocks/up/kernel", 2))
    outputs = lambda: linen.smaller_apply(module, small.kept)({"params": small.params}, X)
    check_against_small(small, outputs, X, expected)


class NnxBlock(nnx.Module):
    def __init__(self, norm, options, rngs):
        self.up, self.down = nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)
        self.norm = getattr(nnx, norm)(8, **options, rngs=rngs)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.norm(self.up(x))))


@pytest.mark.parametrize("layers", [8, 3])
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("norm", "options", "expected"),
    [("LayerNorm", {}, "LayerNorm 'blocks/norm'"), ("GroupNorm", {"num_groups": 4}, None)],
)
def test_nnx_norms_are_read_along_their_channels_wherever_the_axis_of_layers_is(norm, options, expected, place, layers):
    """The last axis of a scale was read, which is that of the layers if they are stacked along axis 1."""
    axes = nnx.StateAxes({nnx.Param: place, ...: 0})

    class Stack(nnx.Module):
        def __init__(self, rngs):
            create = nnx.vmap(lambda rngs: NnxBlock(norm, options, rngs), in_axes=0, out_axes=axes)
            self.blocks = nnx.split_rngs(splits=layers)(create)(rngs)

        def __call__(self, x):
            return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, axes), out_axes=nnx.Carry)(x, self.blocks)

    model = Stack(nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    group = ("blocks/down/kernel", 1 - place)
    small = cut(lambda p, x: nnx.merge(graphdef, p)(x), params, X, first_half, group)
    outputs = lambda: structured_nnx.smaller_module(model, small.params, kept=small.kept)(X)
    check_against_small(small, outputs, X, expected)


def equinox_norms(norm, inputs):
    keys = jax.random.split(jax.random.key(0))
    model = EquinoxNorms(eqx.nn.Linear(inputs, 8, key=keys[0]), norm, eqx.nn.Linear(8, 3, key=keys[1]))
    arrays, static = eqx.partition(model, eqx.is_array)
    x = X[0, :, :inputs]
    return model, cut(lambda p, x: eqx.combine(p, static)(x), arrays, x, first_half, ("embed/weight", 0)), x


@pytest.mark.filterwarnings("ignore:the code of .* divides by its number of channels")
@pytest.mark.parametrize(
    ("norm", "left"),
    [
        (eqx.nn.LayerNorm(8, use_weight=False, use_bias=False), {"shape": (4,)}),
        (eqx.nn.RMSNorm(8, use_weight=False, use_bias=False), {"shape": (4,)}),
        (eqx.nn.GroupNorm(4, 8, channelwise_affine=False), {"channels": 4, "groups": 2}),
    ],
)
def test_an_equinox_norm_without_parameters_takes_its_size_from_the_kept_indices(norm, left):
    """It kept its size: Equinox refused the smaller inputs, and a GroupNorm normalized over other groups."""
    model, small, x = equinox_norms(norm, 5)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        module = structured_equinox.smaller_module(model, small.params, small.kept)
    assert not any("no parameters" in str(one.message) for one in found)
    assert {name: getattr(module.norm, name) for name in left} == left
    if "groups" in left:  # it divides by the size of a group, as before
        np.testing.assert_allclose(module(x), small.apply(small.params, x), atol=1e-5)


@pytest.mark.filterwarnings("ignore:the code of .* divides by its number of channels")
def test_an_equinox_norm_over_channels_and_an_image_takes_its_channels_from_the_kept_indices():
    """No parameter has an axis of the height of the image, and it kept all its channels, without a warning."""
    convolution = eqx.nn.Conv2d(3, 8, 3, padding=1, key=jax.random.key(0))
    model = eqx.nn.Sequential([convolution, eqx.nn.LayerNorm((8, 5, 6), use_weight=False, use_bias=False)])
    small = eqx.tree_at(lambda m: (m[0].weight, m[0].bias), model, (jnp.ones((4, 3, 3, 3)), jnp.ones((4, 1, 1))))
    outputs = np.arange(8) < 4
    kept = {
        "layers/0/weight": (outputs, *(np.ones(3, bool),) * 3),
        "layers/0/bias": (outputs, *(np.ones(1, bool),) * 2),
    }
    module = structured_equinox.smaller_module(model, eqx.filter(small, eqx.is_array), kept)
    assert module[1].shape == (4, 5, 6)
    assert module(jnp.ones((3, 5, 6))).shape == (4, 5, 6)


def test_an_equinox_norm_without_parameters_is_named_where_its_size_is_not_known():
    """Its inputs have as many channels as the model's inputs, which keep theirs."""
    model, small, _ = equinox_norms(eqx.nn.LayerNorm(8, use_weight=False, use_bias=False), 8)
    for kept, how in ((small.kept, "replace them"), (None, "pass kept=small.kept")):
        with pytest.warns(UserWarning, match=f"LayerNorm 'norm': these layers have no parameters.*{how}"):
            structured_equinox.smaller_module(model, small.params, kept)


@pytest.mark.parametrize("norm", [eqx.nn.LayerNorm(8), eqx.nn.RMSNorm(8), eqx.nn.GroupNorm(4, 8)])
def test_equinox_layers_that_divide_by_fewer_channels_than_before_are_named(norm):
    model, small, _ = equinox_norms(norm, 8)
    outputs = lambda: structured_equinox.smaller_module(model, small.params, small.kept)(X[0])
    expected = None if isinstance(norm, eqx.nn.GroupNorm) else f"{type(norm).__name__} 'norm'"
    check_against_small(small, outputs, X[0], expected)
    # The moments of an optimizer are modules too, but they are not called.
    structured_equinox.smaller_module((model,), (small.params,), small.kept)


@pytest.mark.parametrize("axis", [1, 2], ids=["whole heads", "part of every head"])
@pytest.mark.parametrize("library", ["linen", "nnx"])
def test_attention_is_named_if_its_heads_are_smaller_and_not_if_they_are_fewer(library, axis):
    if library == "linen":
        module = linen_nn.MultiHeadDotProductAttention(2, qkv_features=8)
        params, name = module.init(jax.random.key(1), X)["params"], "MultiHeadDotProductAttention"
        apply = lambda p, x: module.apply({"params": p}, x)
        own = lambda small: linen.smaller_apply(module, small.kept)({"params": small.params}, X)
    else:
        model = nnx.MultiHeadAttention(2, 8, decode=False, rngs=nnx.Rngs(0))
        (graphdef, params), name = nnx.split(model), "MultiHeadAttention"
        apply = lambda p, x: nnx.merge(graphdef, p)(x)
        own = lambda small: structured_nnx.smaller_module(model, small.params, kept=small.kept)(X)
    small = cut(apply, params, X, first_half, ("query/kernel", axis), ("value/kernel", axis))
    check_against_small(small, lambda: own(small), X, name if axis == 2 else None)


def test_without_kept_indices_the_layers_whose_outputs_may_differ_are_named():
    module = LinenNorms(linen_nn.LayerNorm())
    params = module.init(jax.random.key(1), X)["params"]
    with pytest.warns(UserWarning, match=r"the code of 'norm' divides .* pass kept=small\.kept to find out"):
        outputs = linen.smaller_apply(module)({"params": params}, X)
    np.testing.assert_array_equal(outputs, module.apply({"params": params}, X))


class LinenOwnParameter(linen_nn.Module):
    @linen_nn.compact
    def __call__(self, x):
        x = linen_nn.Dense(8, name="embed")(x) + self.param("pos", linen_nn.initializers.ones, (8,))
        return linen_nn.Dense(3, name="head")(x)


def test_the_error_for_a_size_in_the_code_of_a_linen_module_names_the_parameter():
    module = LinenOwnParameter()
    params = module.init(jax.random.key(1), X)["params"]
    small = cut(lambda p, x: module.apply({"params": p}, x), params, X, first_half, ("embed/kernel", 1))
    fitted = linen.smaller_apply(module, small.kept)
    with pytest.raises(
        ValueError, match=r'parameter "pos" in "/".* \(8,\).* \(4,\)\. smaller_apply changes .*small\.apply'
    ):
        fitted({"params": small.params}, X)
    (difference,) = small.differences(lambda p, x: fitted({"params": p}, x))
    assert 'self.param("pos"' in difference


def test_the_groups_left_are_counted_in_the_kept_indices_or_follow_from_the_sizes():
    positions, whole = np.tile([True, True, False, False], 2), np.arange(8) < 4
    for along, groups in ((positions, 2), (whole, 1)):
        kept = {"conv/kernel": (np.ones(3, bool), np.ones(5, bool), along)}
        for path in ("conv/kernel", "0/mu/conv/kernel"):
            assert feature_groups(path, (2, 8), 4, kept) == groups
        assert feature_groups("conv/kernel", (2, 8), 4, {f"params/{path}": v for path, v in kept.items()}) == groups
    # 6 of 8 in 4 groups: 3 groups of 2. 6 of 9 in 3 groups: 2 groups of 3, or 3 groups of 2.
    assert feature_groups("conv/kernel", (4, 8), 6, None) == 3
    with pytest.raises(ValueError, match="6 of 9 outputs in 3 groups"):
        feature_groups("conv/kernel", (3, 9), 6, None)


@pytest.mark.filterwarnings("ignore:the code of LayerNorm divides")
def test_nnx_layers_that_are_stacked_or_normalize_groups_take_their_sizes_from_the_last_axes():
    rngs = nnx.Rngs(0)
    layers = {
        "linear": nnx.Linear(4, 6, rngs=rngs),
        "conv": nnx.Conv(4, 6, (3,), rngs=rngs),
        "embed": nnx.Embed(5, 6, rngs=rngs),
        "norm": nnx.LayerNorm(6, rngs=rngs),
        "groups": nnx.GroupNorm(6, 3, rngs=rngs),
        "einsum": nnx.Einsum("ni,ihd->nhd", (4, 3, 2), (3, 2), rngs=rngs),
    }
    shapes = {
        "linear": {"kernel": (7, 4, 5)},
        "conv": {"kernel": (7, 3, 4, 5)},
        "embed": {"embedding": (7, 5, 3)},
        "norm": {"scale": (7, 3), "bias": (7, 3)},
        "groups": {"scale": (4,)},
        "einsum": {"kernel": (4, 2, 2), "bias": (2, 2)},
    }
    zeros = {name: {leaf: jnp.zeros(shape) for leaf, shape in leaves.items()} for name, leaves in shapes.items()}
    small = {name: structured_nnx.smaller_module(layer, zeros[name]) for name, layer in layers.items()}
    assert (small["linear"].in_features, small["linear"].out_features) == (4, 5)
    assert (small["conv"].kernel_shape, small["conv"].out_features) == ((3, 4, 5), 5)
    assert (small["embed"].num_embeddings, small["embed"].features) == (5, 3)
    assert (small["norm"].num_features, small["groups"].num_groups) == (3, 2)
    assert (small["einsum"].kernel_shape, small["einsum"].bias_shape) == ((4, 2, 2), (2, 2))


@pytest.mark.filterwarnings("ignore:the code of .* divides by its number of channels")
@pytest.mark.parametrize("kind", [eqx.nn.LayerNorm, eqx.nn.RMSNorm])
def test_an_equinox_norm_with_a_bias_alone_takes_its_size_from_it(kind):
    """It kept its shape, and Equinox refused the smaller inputs."""
    norm = kind(8, use_weight=False)
    small = structured_equinox.smaller_module(norm, eqx.tree_at(lambda layer: layer.bias, norm, jnp.ones(5)))
    assert small(jnp.arange(5.0)).shape == (5,)


def test_an_nnx_instance_norm_declares_its_smaller_size():
    norm = structured_nnx.smaller_module(
        nnx.InstanceNorm(8, rngs=nnx.Rngs(0)), dict.fromkeys(("scale", "bias"), jnp.ones(5))
    )
    assert norm.num_features == 5


@pytest.mark.filterwarnings("ignore:the code of LayerNorm divides")
def test_equinox_layers_that_are_stacked_or_normalize_groups_take_their_sizes_from_the_last_axes():
    key = jax.random.key(0)
    layers = {
        "linear": (eqx.nn.Linear(4, 6, use_bias=False, key=key), (7, 5, 4)),
        "conv": (eqx.nn.Conv1d(4, 6, 3, use_bias=False, key=key), (7, 5, 4, 3)),
        "norm": (eqx.nn.LayerNorm(6, use_bias=False), (7, 3)),
        "groups": (eqx.nn.GroupNorm(3, 6), (4,)),
        "batch": (eqx.nn.make_with_state(eqx.nn.BatchNorm)(6, "batch", mode="batch")[0], (4,)),
    }
    small = {
        name: structured_equinox.smaller_module(eqx.tree_at(lambda m: m.weight, layer, jnp.zeros(shape)))
        for name, (layer, shape) in layers.items()
    }
    assert (small["linear"].in_features, small["linear"].out_features) == (4, 5)
    assert (small["conv"].in_channels, small["conv"].out_channels) == (4, 5)
    assert (small["norm"].shape, small["groups"].groups, small["groups"].channels) == ((3,), 2, 4)
    assert small["batch"].input_size == 4
