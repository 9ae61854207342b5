"""Merging of adapters: values computed with numpy, zeros that stay zero, and errors that name the adapter."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("shape", "a", "b", "subscripts"),
    [
        ((6, 4), (6, 2), (2, 4), "ir,ro->io"),
        ((6, 2, 3), (6, 2), (2, 2, 3), "ir,rhd->ihd"),  # heads
        ((2, 3, 6), (2, 3, 2), (2, 6), "hdr,ro->hdo"),
        ((3, 6, 4), (3, 6, 2), (3, 2, 4), "lir,lro->lio"),  # stacked layers
        ((2, 6, 4), (2, 6, 2), (2, 2, 4), "lir,lro->lio"),  # as many layers as the rank
    ],
)
def test_products_of_kernels_heads_and_stacked_layers_are_those_of_einsum(shape, a, b, subscripts):
    kernel, left, right = _random(*shape), _random(*a, seed=1), _random(*b, seed=2)
    kernel[np.abs(kernel) < 0.5] = 0
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.zeros(3)}
    merged = jax.jit(lambda a, b: jprune.merge_lora(params, {"kernel": (a, b)}, scale=0.5))(left, right)
    product = np.einsum(subscripts, left.astype(np.float64), right)
    np.testing.assert_allclose(merged["kernel"], np.where(kernel != 0, kernel + 0.5 * product, 0), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(merged["bias"], np.zeros(3))


def test_masks_determine_the_pruned_weights_and_a_leaf_without_a_mask_is_dense():
    params = {"a": jnp.array([[1.0, 0.0], [2.0, 3.0]]), "b": jnp.array([[0.0]])}
    ones = {"a": (jnp.ones((2, 1)), jnp.ones((1, 2))), "b": (jnp.ones((1, 1)), jnp.ones((1, 1)))}
    masks = {"a": jnp.array([[True, True], [False, True]]), "b": None}
    merged = jprune.merge_lora(params, ones, masks=masks)
    chex.assert_trees_all_equal(merged, {"a": jnp.array([[2.0, 1.0], [0.0, 4.0]]), "b": jnp.array([[1.0]])})


def test_gradients_of_adapters_are_those_of_kept_weights():
    params = {"kernel": jnp.array([[1.0, 0.0], [0.0, 1.0]])}
    loss = lambda a, b: jnp.sum(jprune.merge_lora(params, {"kernel": (a, b)})["kernel"] * jnp.array([[1.0, 9], [9, 2]]))
    slopes = jax.grad(loss, argnums=(0, 1))(jnp.array([[3.0], [5.0]]), jnp.array([[7.0, 11.0]]))
    # d/da_i = sum over kept j of c_ij b_j; only the diagonal is kept.
    chex.assert_trees_all_equal(slopes, (jnp.array([[7.0], [22.0]]), jnp.array([[3.0, 10.0]])))


def test_dtypes_are_those_of_the_base_and_products_are_float32():
    params = {"kernel": jnp.full((2, 2), 256.0, jnp.bfloat16)}
    # In bfloat16 the factors give 1.0078 * 1.0078 = 1.015, and 256 + 1.015 would be rounded after the product was.
    factors = (jnp.full((2, 1), 1.0078125, jnp.float32), jnp.full((1, 2), 1.5, jnp.bfloat16))
    merged = jprune.merge_lora(params, {"kernel": factors}, scale=jnp.float32(1.0))
    assert merged["kernel"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["kernel"], np.full((2, 2), 258.0))  # 257.51 to the nearest even
    with jax.enable_x64(True):
        wide = {"kernel": jnp.ones((2, 2), jnp.float64)}
        merged = jprune.merge_lora(wide, {"kernel": factors})
        assert merged["kernel"].dtype == jnp.float64
        np.testing.assert_array_equal(merged["kernel"], np.full((2, 2), 1 + 1.0078125 * 1.5))


PARAMS = {"body": {"kernel": jnp.ones((2, 3)), "count": jnp.ones(2, jnp.int32)}}


@pytest.mark.parametrize(
    ("adapters", "message"),
    [
        ({}, "adapters is empty"),
        ({"kernel": (jnp.ones((2, 1)), jnp.ones((1, 3)))}, r"'kernel', which is not a float leaf .* \['body/kernel'\]"),
        ({"body/count": (jnp.ones((2, 1)), jnp.ones((1, 3)))}, "'body/count', which is not a float leaf"),
        (
            {"body/kernel": (jnp.ones((2, 1), jnp.int32), jnp.ones((1, 3)))},
            "at 'body/kernel'; it must be two float arrays",
        ),
        ({"body/kernel": (jnp.ones((1, 2)), jnp.ones((3, 1)))}, r"\(1, 2\) and \(3, 1\) at 'body/kernel' of shape"),
        ({"body/kernel": (jnp.ones((2, 2)), jnp.ones((1, 3)))}, "their product must have that shape"),
    ],
)
def test_adapters_that_do_not_fit_are_refused_by_leaf(adapters, message):
    with pytest.raises(ValueError, match=message):
        jprune.merge_lora(PARAMS, adapters)


def test_masks_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="masks has shape"):
        jprune.merge_lora(
            PARAMS,
            {"body/kernel": (jnp.ones((2, 1)), jnp.ones((1, 3)))},
            masks={"body": {"kernel": jnp.ones((3, 2), bool), "count": None}},
        )
