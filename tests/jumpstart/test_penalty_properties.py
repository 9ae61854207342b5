"""Properties of the penalty for arbitrary numbers: ties, precision, vmap, masks, containers and errors."""

import functools
from collections import Counter, OrderedDict

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from jprune.jumpstart import Stack
from tests.jumpstart import reference

KEYS = jax.random.split(jax.random.key(0), 600)


def slopes_of_random_ties(z, **options):
    """The gradients under 600 keys."""
    of = lambda z, key: jprune.jumpstart_penalty([z], aggregate="sum", ties="random", key=key, **options)
    return np.asarray(jax.jit(jax.vmap(jax.grad(of), (None, 0)))(z, KEYS))


@pytest.mark.parametrize(("mode", "line"), [("unit_positive", np.s_[:, 0]), ("point_positive", np.s_[0])])
def test_a_random_tie_goes_to_each_tied_cell_equally_often_and_to_no_other(mode, line):
    z = jnp.zeros((4, 4)).at[line].set(jnp.array([0.5, 0.5, -3.0, 0.5]))
    slopes = slopes_of_random_ties(z, mode=mode)[(slice(None), *(line if isinstance(line, tuple) else (line,)))]
    chosen = Counter(int(slope.argmin()) for slope in slopes)
    assert all(sorted(slope) == [-0.5, 0.0, 0.0, 0.0] for slope in slopes)
    assert set(chosen) == {0, 1, 3}
    # 600 draws of 3: 200 each, and a deviation of 60 is more than 5 standard deviations.
    assert max(abs(count - 200) for count in chosen.values()) < 60


def test_a_random_tie_over_space_and_batch_is_uniform_over_both():
    z = jnp.zeros((2, 2, 1, 1)).at[1, 1].set(-1.0)
    slopes = slopes_of_random_ties(z, mode="unit_positive").reshape(600, 4)
    chosen = Counter(int(slope.argmin()) for slope in slopes)
    assert set(chosen) == {0, 1, 2}
    assert max(abs(count - 200) for count in chosen.values()) < 60


def test_random_ties_have_the_value_of_the_others_and_average_to_their_gradient():
    z = jnp.asarray(np.random.default_rng(2).integers(-1, 2, (4, 3)) / 2, jnp.float32)
    value, (gradient,) = reference.penalty([np.asarray(z, np.float64)], aggregate="sum")
    random = jax.jit(lambda z: jprune.jumpstart_penalty([z], aggregate="sum", ties="random", key=KEYS[0]))(z)
    np.testing.assert_allclose(random, value, rtol=1e-6)
    # Slopes lie within +-2; the mean of 600 is within .25 of its expectation but once in millions.
    np.testing.assert_allclose(slopes_of_random_ties(z).mean(0), gradient, atol=0.25)


def test_random_ties_need_a_key_and_layers_of_one_shape_draw_apart():
    with pytest.raises(ValueError, match="needs a PRNG key"):
        jprune.jumpstart_penalty([jnp.zeros((2, 2))], ties="random")
    of = lambda layers, key: jprune.jumpstart_penalty(layers, mode="unit_positive", ties="random", key=key)
    one, two = jax.jit(jax.vmap(jax.grad(of), (None, 0)))([jnp.zeros((4, 1))] * 2, KEYS[:64])
    agree = (np.asarray(one).argmin(1) == np.asarray(two).argmin(1)).mean()
    assert 0.02 < agree < 0.6  # a quarter, drawn 64 times


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_short_floats_are_summed_in_float32(dtype):
    """A sum of 4,096 slacks of 1 / 8 in bfloat16 would stop growing at 32."""
    z = jnp.full((1, 4096), 0.75, dtype)
    total = lambda z: jprune.jumpstart_penalty([z], mode="unit_positive", aggregate="sum")
    value, gradient = jax.jit(jax.value_and_grad(total))(z)
    assert (value.dtype, float(value)) == (jnp.float32, 4096 / 8)
    assert gradient.dtype == dtype
    assert (np.asarray(gradient, np.float32) == -0.5).all()
    mixed = jprune.jumpstart_penalty([z, z.astype(jnp.float32)], mode="unit_positive", aggregate="sum")
    assert float(mixed) == 4096 / 4


def test_a_tie_among_ten_thousand_cells_is_counted_exactly_in_bfloat16():
    slope_of = lambda z, **options: jax.jit(jax.grad(lambda z: jprune.jumpstart_penalty([z], mode="layer", **options)))(
        z
    )
    slope = slope_of(jnp.zeros((100, 100, 4), jnp.bfloat16))
    assert not np.asarray(slope, np.float32).any()  # the hinges cancel
    slope = slope_of(jnp.zeros((100, 100, 4)), balance=1.0)
    np.testing.assert_allclose(slope, np.full((100, 100, 4), -1 / 40000), rtol=1e-6)


@pytest.mark.parametrize("cells", [4095, 4096])  # two counts of up to 4,095 share a float32
@pytest.mark.parametrize("low", [0, 95, 4000])  # cells of the minimum; with 0, each is minimum and maximum
def test_ties_of_both_extremes_over_a_large_image_are_counted_exactly(cells, low):
    image = np.where(np.arange(cells) < low, -0.5, 0.5)
    z = jnp.asarray(np.broadcast_to(image[None, :, None], (2, cells, 3)), jnp.float32)
    penalty = functools.partial(jprune.jumpstart_penalty, aggregate="sum", balance=0.75)
    # Each of 3 units and 2 points hands -.75 to its maxima and .25 to its minima, in equal shares.
    above, below = -0.75 * 5 / (6 * (cells - low)), 0.25 * 5 / (6 * (low or cells))
    wanted = np.where(image > 0, above, below) if low else np.full(cells, above + below)
    gradient = jax.jit(jax.grad(lambda z: penalty([z])))(z)
    np.testing.assert_allclose(gradient, np.broadcast_to(wanted[None, :, None], z.shape), rtol=1e-5)


@pytest.mark.parametrize(
    ("aggregate", "ties"),
    [
        ("balanced", "average"),
        pytest.param("balanced", "single", marks=pytest.mark.slow),
        ("norm", "single"),
        pytest.param("mean", "average", marks=pytest.mark.slow),
    ],
)
def test_vmap_is_a_loop(aggregate, ties):
    z = jnp.asarray(np.random.default_rng(0).integers(-2, 3, (3, 4, 2, 2, 3)) / 2, jnp.float32)
    real = jnp.array([[True, True, True, True], [True, True, False, False], [True, False, True, True]])
    of = lambda z, real: jprune.jumpstart_penalty([z, z[:, 0, 0]], aggregate=aggregate, ties=ties, examples=real)
    one = jax.jit(jax.value_and_grad(of))
    values, slopes = jax.jit(jax.vmap(jax.value_and_grad(of)))(z, real)
    for index in range(3):
        chex.assert_trees_all_close((values[index], slopes[index]), one(z[index], real[index]), rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@settings(max_examples=8, derandomize=False)
@given(
    st.integers(0, 2**31),
    st.sampled_from(reference.AGGREGATES),
    st.sampled_from(["full", "unit", "layer", "all_but_point_positive"]),
    st.sampled_from(["average", "single"]),
    st.sampled_from(["pool", "none"]),
)
def test_a_padded_wide_network_and_batch_have_the_thin_ones_value_and_gradient(seed, aggregate, mode, ties, spatial):
    rng = np.random.default_rng(seed)
    thin = [rng.integers(-2, 3, shape) / 2 for shape in ((5, 3), (5, 2, 2, 2))]
    options = {"aggregate": aggregate, "mode": mode, "ties": ties, "spatial": spatial}
    value, gradients = reference.penalty(thin, **options)
    padding = [[(0, 3), *[(0, 0)] * (z.ndim - 2), (0, 4 - z.shape[-1])] for z in thin]
    wide = [np.pad(z, pad, constant_values=rng.integers(-9, 9)) for z, pad in zip(thin, padding, strict=True)]
    units = [jnp.arange(4) < z.shape[-1] for z in thin]
    with jax.enable_x64(True):
        of = lambda z: jprune.jumpstart_penalty(z, units=units, examples=jnp.arange(8) < 5, **options)
        found, slopes = jax.jit(jax.value_and_grad(of))([jnp.asarray(z, jnp.float64) for z in wide])
    np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-12)
    for slope, gradient, pad in zip(slopes, gradients, padding, strict=True):
        np.testing.assert_allclose(slope, np.pad(gradient, pad), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("aggregate", reference.AGGREGATES)
def test_where_all_is_padding_value_and_gradient_are_zero(aggregate):
    for masks in ({"examples": jnp.zeros(3, bool)}, {"units": jnp.zeros(2, bool)}):
        for mode in ("full", "layer"):
            of = lambda z, masks=masks, mode=mode: jprune.jumpstart_penalty(
                [z], mode=mode, aggregate=aggregate, **masks
            )
            value, slope = jax.jit(jax.value_and_grad(of))(jnp.ones((3, 2)))
            assert float(value) == 0.0
            assert not np.asarray(slope).any()


@pytest.mark.parametrize(("balance", "push"), [(0.5, 0.0), (0.51, 0.02)])
def test_a_zero_network_has_no_gradient_at_balance_one_half_and_one_at_51_percent(balance, push):
    of = lambda z: jprune.jumpstart_penalty([z], mode="unit", aggregate="sum", balance=balance)
    np.testing.assert_allclose(
        jax.jit(jax.grad(of))(jnp.zeros((4, 2))), np.full((4, 2), -push / 4), rtol=1e-5, atol=1e-9
    )


def test_a_stack_a_list_an_ordered_dict_and_an_array_are_the_same_layers():
    values = jax.random.normal(jax.random.key(1), (3, 4, 5))
    wanted = reference.penalty(list(np.asarray(values, np.float64)))[0]
    named = OrderedDict((name, z) for name, z in zip("zyx", values, strict=True))
    for layers in (Stack(values), list(values), named, [values[0], Stack(values[1:])]):
        np.testing.assert_allclose(jax.jit(jprune.jumpstart_penalty)(layers), wanted, rtol=1e-6)
    one = reference.penalty([np.asarray(values[0], np.float64)])[0]
    np.testing.assert_allclose(jprune.jumpstart_penalty(values[0]), one, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"mode": "units"}, "mode='units' is not allowed; allowed: full, unit"),
        ({"aggregate": "max"}, "aggregate='max' is not allowed"),
        ({"ties": "first"}, "ties='first' is not allowed"),
        ({"spatial": "mean"}, "spatial='mean' is not allowed"),
        ({"preset": "keras"}, "preset='keras' is not allowed; allowed: cpaior_keras, cpaior_torch, ieee"),
        ({"balance": 1.5}, "balance=1.5 must be a number from 0 to 1"),
        ({"balance": jnp.float32(1.5)}, "balance=1.5 must be a number from 0 to 1"),
        ({"balance": np.array([0.5, 0.25])}, "must be a number from 0 to 1"),
        ({"margin": (1.0, np.inf)}, "must be two finite numbers"),
        ({"margin": (np.array(np.nan), 1.0)}, "must be two finite numbers"),
    ],
)
def test_options_that_are_not_allowed_are_refused_with_those_that_are(options, complaint):
    """Raised before tracing; the penalty has the same check, which the type checker of these tests hides."""
    for make in (jprune.add_jumpstart, jprune.jumpstart.jumpstart_loss):
        with pytest.raises(ValueError, match=complaint):
            make(lambda params, batch: params, 1.0, **options)


@pytest.mark.parametrize(
    ("masks", "complaint"),
    [
        ({"units": jnp.ones(3, bool)}, r"units of layer '0' has shape \(3,\); allowed: \(2,\)"),
        ({"units": [jnp.ones(2, bool)] * 2}, "units has 2 masks for 1 layers"),
        ({"examples": jnp.ones(2, bool)}, r"has shape \(2,\); allowed: \(4,\)"),
        ({"examples": jnp.ones((3, 7), bool)}, r"has shape \(3, 7\); allowed: \(4,\)"),
    ],
)
def test_masks_that_do_not_match_are_refused(masks, complaint):
    with pytest.raises(ValueError, match=complaint):
        jprune.jumpstart_penalty([jnp.ones((4, 2))], **masks)


def test_a_mask_of_positions_that_a_layer_does_not_have_is_refused():
    words = r"examples \(for layer '1'\) has shape \(4, 6\); allowed: \(4,\) or \(4, 3\) or \(4, 3, 5\)"
    with pytest.raises(ValueError, match=words):
        jprune.jumpstart_penalty([jnp.ones((4, 6, 2)), jnp.ones((4, 3, 5, 2))], examples=jnp.ones((4, 6), bool))


def test_invalid_preactivations_are_refused_by_name():
    with pytest.raises(TypeError, match="layer 'b' have dtype int32"):
        jprune.jumpstart_penalty(OrderedDict(a=jnp.ones((2, 2)), b=jnp.ones((2, 2), jnp.int32)))
    with pytest.raises(ValueError, match=r"layer '0' have shape \(3,\)"):
        jprune.jumpstart_penalty([jnp.ones(3)])
    with pytest.raises(ValueError, match="every axis needs at least one entry"):
        jprune.jumpstart_penalty([jnp.ones((0, 3))])
    with pytest.raises(ValueError, match="preactivations is empty"):
        jprune.jumpstart_penalty([])
