"""Every option of the penalty against plain loops in float64: values and gradients, ties and zeros included."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from tests.jumpstart import reference

# Dense and convolutional layers mixed, a single example, a single unit, and a layer of one cell.
NETWORKS = {
    "mixed": [(4, 3), (4, 2, 3, 2), (4, 5)],
    "one example": [(1, 4), (1, 2, 2, 3)],
    "one unit": [(5, 1), (5, 3, 1)],
    "one cell": [(1, 1)],
    "equal": [(3, 2), (3, 2), (3, 1, 2, 2)],
}
# Multiples of a half, so that cells tie and hinges are met exactly; or all alike, zeros among them.
VALUES = {
    "ties": lambda rng, shape: rng.integers(-4, 5, shape) / 2,
    "few": lambda rng, shape: rng.integers(-1, 2, shape).astype(float),
    "constant": lambda rng, shape: np.full(shape, rng.integers(-4, 5) / 2),
    "zeros": lambda rng, shape: np.zeros(shape),
    "any": lambda rng, shape: 2 * rng.normal(size=shape),
    "satisfied": lambda rng, shape: np.where(rng.random(shape) < 0.5, 1.0, -1.0) * rng.integers(1, 3, shape),
}


def drawn(network, kind, seed):
    rng = np.random.default_rng(seed)
    return [VALUES[kind](rng, shape) for shape in NETWORKS[network]]


@functools.cache
def compiled(**options):
    """The penalty and its gradient in one program, instead of one for each operation."""
    return jax.jit(jax.value_and_grad(lambda z: jprune.jumpstart_penalty(z, **options)))


def agrees(layers, options, wanted=None):
    value, gradients = reference.penalty(layers, **(wanted or options))
    with jax.enable_x64(True):
        found, slopes = compiled(**options)([jnp.asarray(z, jnp.float64) for z in layers])
    np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-10, err_msg=str(options))
    for slope, gradient in zip(slopes, gradients, strict=True):
        np.testing.assert_allclose(slope, gradient, rtol=1e-10, atol=1e-10, err_msg=str(options))


OPTIONS = st.fixed_dictionaries(
    {
        "mode": st.sampled_from(list(reference.HINGES)),
        "aggregate": st.sampled_from(reference.AGGREGATES),
        "balance": st.sampled_from([0.0, 0.25, 0.5, 0.51, 1.0]),
        "margin": st.sampled_from([(1.0, 1.0), (1.0, 0.0), (0.0, 1.0), (0.5, 2.0), (0.0, 0.0), (-0.5, 0.25)]),
        "ties": st.sampled_from(["average", "single"]),
        "spatial": st.sampled_from(["pool", "none"]),
    }
)
INPUTS = st.tuples(st.sampled_from(list(NETWORKS)), st.sampled_from(list(VALUES)), st.integers(0, 2**31))


@settings(max_examples=4)
@given(INPUTS, OPTIONS)
def test_values_and_gradients_are_those_of_plain_loops(inputs, options):
    agrees(drawn(*inputs), options)


@pytest.mark.slow
@settings(max_examples=600, derandomize=False)
@given(INPUTS, OPTIONS)
def test_values_and_gradients_are_those_of_plain_loops_in_many_more_cases(inputs, options):
    agrees(drawn(*inputs), options)


CHOICES = list(itertools.product(["average", "single"], ["pool", "none"]))


@pytest.mark.parametrize("choices", [CHOICES[1:3], pytest.param(CHOICES, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("mode", reference.HINGES)
@pytest.mark.quick(4)
def test_every_mode_with_every_tie_rule_and_reduction_on_a_mixed_network(mode, choices):
    for seed, (ties, spatial) in enumerate(choices):
        aggregate = reference.AGGREGATES[(seed + len(mode)) % 5]
        options = {"mode": mode, "aggregate": aggregate, "ties": ties, "spatial": spatial, "balance": 0.51}
        agrees(drawn("mixed", "few", seed), options)


MODES = ("full", "layer", "unit", "point", "all_but_unit_positive")


@pytest.mark.parametrize("modes", [MODES[:2], pytest.param(MODES, marks=pytest.mark.slow)], ids=["some", "all"])
@pytest.mark.parametrize("aggregate", reference.AGGREGATES)
@pytest.mark.quick(2)
def test_every_aggregate_of_units_points_both_and_layers(aggregate, modes):
    for seed, mode in enumerate(modes):
        agrees(drawn("mixed", "ties", seed), {"mode": mode, "aggregate": aggregate, "ties": "single"})


@pytest.mark.parametrize("preset", reference.PRESETS)
@pytest.mark.parametrize("kind", ["any", "ties", "zeros"])
def test_each_preset_is_its_published_variant(preset, kind):
    layers = drawn("mixed", kind, 3)
    for mode, balance in (("full", 0.5), ("unit", 0.51), ("layer", 0.5)):
        options = {"mode": mode, "balance": balance}
        agrees(layers, {"preset": preset, **options}, {**reference.PRESETS[preset], **options})
    agrees(layers, {"preset": preset, "aggregate": "mean"}, {**reference.PRESETS[preset], "aggregate": "mean"})


@pytest.mark.parametrize(
    ("mode", "ties"),
    [
        pytest.param("full", "average", marks=pytest.mark.slow),
        ("full", "single"),
        pytest.param("layer", "single", marks=pytest.mark.slow),
    ],
)
def test_images_of_many_channels_too(mode, ties):
    """Images of 16 channels and more are read in another memory order."""
    rng = np.random.default_rng(1)
    layers = [rng.integers(-2, 3, (3, 2, 2, 17)) / 2, rng.integers(-2, 3, (3, 2, 2, 15)) / 2]
    agrees(layers, {"mode": mode, "ties": ties, "aggregate": "sum_squares"})


@pytest.mark.slow
def test_float32_is_right_to_its_own_precision():
    for number, kind in enumerate(VALUES):
        layers = drawn("mixed", kind, number)
        for aggregate in reference.AGGREGATES:
            options = {"aggregate": aggregate, "ties": "single"}
            value, gradients = reference.penalty(layers, **options)
            found, slopes = compiled(**options)([jnp.asarray(z, jnp.float32) for z in layers])
            assert found.dtype == jnp.float32
            np.testing.assert_allclose(found, value, rtol=1e-5, atol=1e-6)
            for slope, gradient in zip(slopes, gradients, strict=True):
                np.testing.assert_allclose(slope, gradient, rtol=1e-5, atol=1e-6)


def test_the_ablation_of_the_negative_margin_moves_the_negative_hinge_alone():
    layers = drawn("mixed", "any", 5)
    for negative in (0.0, 1.0):
        agrees(layers, {"preset": "cpaior_torch", "margin": (1.0, negative)},
               {**reference.PRESETS["cpaior_torch"], "margin": (1.0, negative)})  # fmt: skip


@pytest.mark.parametrize("spatial", ["none", "pool"])
@pytest.mark.parametrize(
    ("mode", "aggregate", "ties"),
    [("full", "balanced", "average"), ("full", "norm", "single"), ("layer", "mean", "average")],
)
@pytest.mark.parametrize("batch", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_a_mask_of_positions_leaves_out_the_padding_of_sequences(batch, mode, aggregate, ties, spatial):
    """The layers are sequences, images whose rows are positions, and pooled; a batch of 40 has another memory order."""
    rng = np.random.default_rng(batch)
    layers = [rng.integers(-2, 3, shape) / 2 for shape in ((batch, 3, 4), (batch, 3, 2, 17), (batch, 3, 4), (batch, 4))]
    positions = np.arange(3) < rng.integers(0, 4, batch)[:, None]
    positions[0], positions[:, 2] = False, False  # an example and a position that are padding everywhere
    for z in layers[:3]:
        z[~positions] *= 9  # would be the extremes
    options = {"mode": mode, "aggregate": aggregate, "ties": ties, "spatial": spatial}
    value, gradients = reference.penalty(layers, **options, positions=positions)
    with jax.enable_x64(True):
        of = lambda z: jprune.jumpstart_penalty(z, examples=jnp.asarray(positions), **options)
        found, slopes = jax.jit(jax.value_and_grad(of))([jnp.asarray(z, jnp.float64) for z in layers])
    np.testing.assert_allclose(found, value, rtol=1e-10, atol=1e-12)
    for slope, gradient in zip(slopes, gradients, strict=True):
        np.testing.assert_allclose(slope, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("spatial", ["none", "pool"])
@pytest.mark.parametrize(
    "shape", [(5, 3, 3, 20), *(pytest.param(shape, marks=pytest.mark.slow) for shape in [(40, 3, 3, 4), (3, 4, 5, 4)])]
)
@pytest.mark.parametrize("mode", ["full", "point_positive"])
def test_padding_of_images_changes_nothing_whichever_way_they_are_looked_at(mode, shape, spatial):
    z = jnp.asarray(np.random.default_rng(0).integers(-3, 4, shape), jnp.float32)
    units, examples = np.arange(shape[-1]) % 3 != 1, np.arange(shape[0]) % 3 != 0
    options = {"mode": mode, "spatial": spatial, "margin": (2.5, 1.5), "balance": 0.3}
    padded = lambda z: jprune.jumpstart_penalty([z], **options, units=units, examples=examples)
    real = lambda z: jprune.jumpstart_penalty([z[examples][..., units]], **options)
    chex.assert_trees_all_close(
        jax.jit(jax.value_and_grad(padded))(z), jax.jit(jax.value_and_grad(real))(z), rtol=1e-5, atol=1e-7
    )
