"""Less common networks: their groups, and a smaller network that computes the same as the masked one."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune.pruning.structured import removal
from tests.pruning.structured import architectures, odd_models
from tests.pruning.structured.test_removal import graph_of, half_of, masks_like, run_small

MODELS = odd_models.MODELS | architectures.MODELS
GROUPS = {  # sizes of the groups that are exact, and of those that are not
    "two_heads": ([6, 8], []),
    "siamese": ([8], []),
    "gated_residual": ([8], []),
    "dense_skip": ([4, 4, 6], []),
    "squeeze_excite_reduction": ([4, 4, 8], []),
    "shuffle": ([2, 3], []),
    "shuffle_of_odd_groups": ([1, 3], []),
    "vmapped_convolutions": ([6, 8], []),
    "grouped_inputs": ([4, 6], []),
    "pixel_shuffle": ([4, 4], []),
    "pixel_shuffle_channels_outside": ([4, 4], []),
    "cross_attention": ([2, 2, 3, 5, 6, 8], []),
    "tied_encoder_decoder": ([6, 6, 6], []),
    "normalised_by_channel_mean": ([6], [8]),
    "layer_norm_between": ([6], [8]),
    "group_norm": ([2, 4], []),
    "instance_norm": ([8], []),
    "softmax_over_channels": ([6], [8]),
    "argmax_over_channels": ([6], []),
    "max_over_channels": ([4], [8]),
    "flatten_images": ([4, 6], []),
    "flatten_channels_first": ([4, 6], []),
    "pooled_both_ways": ([5], []),
    "transposed_convolution": ([4, 6], []),
    "glu": ([6, 8], []),
    "glu_interleaved": ([8], []),
    "concatenated_with_itself": ([4, 6], []),
    "repeated_in_einsum": ([4, 6], []),
    "running_statistics": ([6], []),
    "stochastic_depth": ([6, 8], []),
    "dropout": ([6], []),
    "learned_positions": ([6, 8], []),
    "elman": ([6, 6], []),
    "gru": ([6], []),
    "mixture_of_experts": ([6, 8], [3]),
    "low_rank": ([2, 6, 8], []),
    "mixer": ([5, 6, 8], []),
    "autoencoder": ([4, 8], []),
    "vmapped_ensemble": ([3, 8], []),
    "fused_heads": ([3], []),
    "interleaved_heads": ([3], []),
    "identity_products": ([4, 6, 8], []),
    # Indices that are not removed exactly: positions inside a window, latents and heads that a softmax runs over.
    "swin": ([2, 6], [8]),
    "perceiver": ([6, 6, 7, 8, 8, 8, 8, 10], [2, 4]),
    "decoding_step": ([2, 6, 8], []),
    "experts_with_a_capacity": ([6, 8], []),
    "wavenet": ([5, 6, 8, 8], []),
    "diffusion_unet": ([2, 2, 10, 12, 12, 12], []),
    "albert": ([2, 4, 5, 8, 10], []),
    "parallel_block": ([3, 6, 8], []),
    "shuffle_of_halves": ([1, 1, 4, 4, 4], []),
    "graph_attention": ([2, 6], []),
    "mamba": ([2, 3, 6, 8], []),
    "linear_attention": ([2, 3, 6], [4]),
    "quantized_code": ([4, 7, 8], []),
    "hypernetwork": ([4, 6], []),
    "force_field": ([6, 8], []),
}


QUICK = {"identity_products", "decoding_step"}

pytestmark = pytest.mark.usefixtures("usual_promotion")


@pytest.mark.parametrize("name", GROUPS)
def test_the_groups_are_those_of_the_network(name):
    graph = graph_of(MODELS[name]())
    sizes = lambda exact: sorted(group.size for group in graph.channels if group.exact == exact)
    assert (sizes(True), sizes(False)) == GROUPS[name]
    assert all(group.why for group in graph.channels if not group.exact)


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in GROUPS]
)
def test_outputs_and_gradients_equal_those_of_the_masked_network(name):
    model = MODELS[name]()
    graph = graph_of(model)
    masks = masks_like(model.params, half_of(graph)[0])
    small = jprune.remove_channels(graph, model.params, masks, state=model.state)
    masked = jprune.apply_masks(model.params, masks)

    def loss(apply, params):
        outputs = apply(params, *model.inputs)
        if model.state is not None:
            outputs = outputs[0]
        weigh = lambda x: jnp.sum(x * jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape))
        return sum(map(weigh, jax.tree.leaves(outputs))), outputs

    differentiate = lambda apply: jax.jit(jax.value_and_grad(lambda p: loss(apply, p), has_aux=True))
    (_, outputs), grads = differentiate(model)(masked)
    (_, small_outputs), small_grads = differentiate(run_small(model, small))(small.params)
    chex.assert_trees_all_close(small_outputs, outputs, atol=1e-5)
    chex.assert_trees_all_close(small_grads, removal.cut_leaves(grads, small.kept), atol=1e-4)


def test_a_shuffle_leaves_the_positions_of_a_group_that_both_convolutions_can_lose():
    """After the shuffle of 2 groups of 4, channel 2 j + g comes from position j of group g.

    The first convolution loses j from both groups, so 2 j and 2 j + 1; the second loses position i of both groups, so i
    and i + 4. Together these are the channels 0, 1, 4, 5 and the channels 2, 3, 6, 7.
    """
    graph = graph_of(MODELS["shuffle"]())
    (group,) = (group for group in graph.channels if any(member.path == "depthwise/bias" for member in group.members))
    found = {(member.path, member.axis): member.indices.tolist() for member in group.members}
    assert found["depthwise/bias", 0] == found["depthwise/kernel", 3] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert found["first/bias", 0] == found["first/kernel", 3] == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert found["second/kernel", 2] == [[0, 1], [2, 3]]


def test_fully_coupled_channels_are_reported_to_stay():
    """A shuffle of 2 groups of 3 channels couples all of them: none can be removed without the others."""
    model = MODELS["shuffle_of_odd_groups"]()
    graph = graph_of(model)
    assert "it stays unless min_channels is 0" in str(graph)
    scores = jax.tree.map(jnp.abs, model.params)
    with pytest.raises(
        ValueError, match="at most 0 can be removed; the group of 'depthwise/bias' stays whole, because all"
    ):
        jprune.channel_group_masks(graph, scores, multiply_adds=0.1, groups="^depthwise/")


def test_the_models_own_code_serves_with_smaller_identities_in_branches():
    model = MODELS["identity_products"]()
    graph = graph_of(model)
    masks = masks_like(model.params, half_of(graph)[0])
    (difference,) = jprune.remove_channels(graph, model.params, masks).table.differences
    assert "one_hot(jnp.arange(4), 4)" in difference  # the only size that is written out


def test_a_lookup_that_fills_with_nan_is_code_that_serves():
    def apply(p, x):
        h = jnp.tanh(x @ p["one"])
        rows = jnp.broadcast_to(jnp.argsort(x[:, 0])[:, None], h.shape)
        return jnp.take_along_axis(h, rows, axis=0) @ p["two"]

    params = {"one": jnp.ones((3, 4)), "two": jnp.ones((4, 2))}
    graph = jprune.trace_model(apply, params, jnp.ones((2, 3)))
    masks = jprune.channel_group_masks(graph, params, sparsity=0.5)
    assert jprune.remove_channels(graph, params, masks).table.differences == ()


def test_random_keys_and_nan_among_the_constants_are_code_that_serves():
    key, missing = jax.random.key(0), np.array([np.nan, 1.0], np.float32)

    def apply(p, x):
        return jnp.tanh(x @ p["one"]) @ p["two"] + jax.random.normal(key, (2,)) + missing

    params = {"one": jnp.ones((3, 4)), "two": jnp.ones((4, 2))}
    graph = jprune.trace_model(apply, params, jnp.ones((2, 3)))
    masks = jprune.channel_group_masks(graph, params, sparsity=0.5)
    assert jprune.remove_channels(graph, params, masks).table.differences == ()


def test_random_keys_are_inputs_like_others():
    model = MODELS["stochastic_depth"]()
    graph = graph_of(model)
    masks = masks_like(model.params, half_of(graph)[0])
    small = jprune.remove_channels(graph, model.params, masks, check=model.inputs)
    x, key = model.inputs
    more = (jnp.concatenate([x, -x]), jax.random.fold_in(key, 1))
    expected = model(jprune.apply_masks(model.params, masks), *more)
    np.testing.assert_allclose(small.apply(small.params, *more), expected, atol=1e-5)
