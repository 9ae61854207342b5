"""Modules rebuilt with the smaller parameters compute the same as the smaller program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jprune
from jprune.pruning.structured import equinox, linen
from jprune.pruning.structured import nnx as structured_nnx
from jprune.pruning.structured.selection import masks_without
from tests.pruning.structured import models
from tests.pruning.structured.test_removal import graph_of, half_of, masks_like, run_small


def remove_half(name):
    model = models.MODELS[name]()
    graph = graph_of(model)
    small = jprune.remove_channels(graph, model.params, masks_like(model.params, half_of(graph)[0]), state=model.state)
    return model, small, jax.jit(run_small(model, small))(small.params, *model.inputs)


call = nnx.jit(lambda module, *inputs: module(*inputs))


@pytest.fixture(autouse=True)
def _standard_promotion():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


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


@pytest.mark.parametrize("name", ["linen_conv_net", "linen_recurrent"])
def test_linen_modules_take_their_sizes_from_the_parameters(name):
    model, small, expected = remove_half(name)
    module = getattr(models, f"{name}_module")()
    variables = {"params": small.params} | ({} if small.state is None else {"batch_stats": small.state})
    fitted = linen.smaller_apply(module)
    np.testing.assert_allclose(jax.jit(fitted)(variables, *model.inputs), expected, atol=1e-6)
    if small.state is None:
        assert small.differences(lambda p, x: fitted({"params": p}, x)) == ()
    else:
        assert small.differences(lambda p, x, *, state: fitted({"params": p, "batch_stats": state}, x)) == ()


def test_equinox_attention_and_dense_layers():
    model, small, _ = remove_half("equinox_block")
    expected = run_small(model, small)(small.params, *model.inputs)
    module = equinox.smaller_module(models.equinox_block_module(), small.params)
    assert (module.attention.num_heads, module.up.out_features, module.down.in_features) == (1, 3, 3)
    np.testing.assert_allclose(jax.vmap(module)(*model.inputs), expected, atol=1e-6)
    assert small.table.differences
    full = models.equinox_block_module()
    assert small.differences(lambda p, x: jax.vmap(equinox.smaller_module(full, p))(x)) == ()
