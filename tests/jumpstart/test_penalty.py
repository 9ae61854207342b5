"""The penalty and its gradient: the authors' numbers, hand-worked cases, and the degenerate ones."""

import functools
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune

FIXTURES = pathlib.Path(__file__).parent / "fixtures"
CASES = json.loads((FIXTURES / "jumpstart_cases.json").read_text())["cases"]
ARRAYS = dict(np.load(FIXTURES / "jumpstart_cases.npz"))


def options(case):
    chosen = {name: case[name] for name in ("mode", "aggregate", "balance", "ties")}
    return chosen | {"margin": tuple(case["margin"]), "spatial": "pool"}


@pytest.mark.parametrize(
    ("cases", "precision", "tolerance"),
    [
        (CASES[::9], np.float64, 1e-9),  # every mode and both inputs
        pytest.param(CASES, np.float64, 1e-9, marks=pytest.mark.slow),
        pytest.param(CASES, np.float32, 1e-5, marks=pytest.mark.slow),
    ],
    ids=["some-float64", "all-float64", "all-float32"],
)
def test_values_and_gradients_are_those_of_the_authors_code(cases, precision, tolerance):
    with jax.enable_x64(precision is np.float64):
        for case in cases:
            z = jnp.asarray(ARRAYS[f"input/{case['input']}"].astype(precision))
            penalty = functools.partial(jprune.jumpstart_penalty, **options(case))
            value, gradient = jax.jit(jax.value_and_grad(penalty))(z)
            np.testing.assert_allclose(value, case["loss"], rtol=tolerance, atol=tolerance, err_msg=case["id"])
            wanted = ARRAYS[f"gradient/{case['id']}"]
            np.testing.assert_allclose(gradient, wanted, rtol=tolerance, atol=tolerance, err_msg=case["id"])


def test_a_small_layer_by_hand():
    z = jnp.array([[0.5, -2.0], [-0.5, 3.0]])
    # units: (max, min) = (.5, -.5), (3, -2): slacks .5 * (.5 + .5) = .5 and 0
    # points: (.5, -2), (3, -.5): slacks .5 * (.5 + 0) = .25 and .5 * (0 + .5) = .25
    assert float(jprune.jumpstart_penalty([z], aggregate="balanced")) == 0.25 + 0.25
    assert float(jprune.jumpstart_penalty([z], aggregate="mean")) == 0.25
    assert float(jprune.jumpstart_penalty([z], aggregate="sum")) == 1.0
    assert float(jprune.jumpstart_penalty([z], aggregate="sum_squares")) == 0.25 + 2 * 0.0625
    np.testing.assert_allclose(jprune.jumpstart_penalty([z], aggregate="norm"), np.sqrt(0.375), rtol=1e-6)
    assert float(jprune.jumpstart_penalty([z], mode="unit", aggregate="sum")) == 0.5
    assert float(jprune.jumpstart_penalty([z], mode="point", aggregate="sum")) == 0.5
    assert float(jprune.jumpstart_penalty([z], mode="layer", aggregate="sum")) == 0.0


@functools.cache
def gradients_of_every_mode(aggregate):
    """The gradients as one program for each shape."""
    penalties = [
        functools.partial(jprune.jumpstart_penalty, mode=mode, aggregate=aggregate)
        for mode in ("full", "unit", "point", "layer")
    ]
    return jax.jit(lambda z: [jax.grad(lambda z, of=of: of([z]))(z) for of in penalties])


@pytest.mark.parametrize("aggregate", ["balanced", "norm", "mean", "sum", "sum_squares"])
@pytest.mark.parametrize("z", [np.zeros((4, 3)), np.full((1, 1), 5.0), np.full((4, 3), [-4.0, 4.0, -4.0])], ids=str)
def test_no_gradient_is_nan_at_zero_slack_zero_preactivations_or_a_single_entry(aggregate, z):
    chex.assert_tree_all_finite(gradients_of_every_mode(aggregate)(jnp.asarray(z, jnp.float32)))


def test_a_nan_preactivation_gives_a_nan_with_every_aggregate():
    """The norm was 0, and so was its gradient for every layer."""
    z = jnp.array([[jnp.nan, 1.0], [0.0, -0.5]])
    for aggregate in ("balanced", "norm", "mean", "sum", "sum_squares"):
        assert np.isnan(jprune.jumpstart_penalty([z], aggregate=aggregate)), aggregate


def test_padding_of_units_and_examples_changes_neither_value_nor_gradient():
    thin = jax.random.normal(jax.random.key(0), (5, 3))
    wide = jnp.full((8, 6), 7.0).at[:5, :3].set(thin)
    units, examples = jnp.arange(6) < 3, jnp.arange(8) < 5
    for aggregate in ("balanced", "norm", "mean", "sum_squares"):
        fn = lambda z, aggregate=aggregate, **masks: jprune.jumpstart_penalty([z], aggregate=aggregate, **masks)
        value, gradient = jax.jit(jax.value_and_grad(fn))(thin)
        padded, spread = jax.jit(jax.value_and_grad(lambda z, fn=fn: fn(z, units=[units], examples=examples)))(wide)
        np.testing.assert_allclose(padded, value, rtol=1e-6)
        np.testing.assert_allclose(spread[:5, :3], gradient, rtol=1e-6, atol=1e-9)
        assert not np.asarray(spread).copy()[5:].any()
        assert not np.asarray(spread)[:, 3:].any()


def test_the_link_and_the_fused_loss_give_the_same_updates():
    params = {"a": jax.random.normal(jax.random.key(0), (3, 4)), "b": jax.random.normal(jax.random.key(1), (4, 2))}
    x = jax.random.normal(jax.random.key(2), (6, 3))

    def forward(params, x):
        h = x @ params["a"]
        return jax.nn.relu(h) @ params["b"], [h]

    loss = lambda params, x: (jnp.mean(forward(params, x)[0] ** 2), forward(params, x)[1])
    fused = jax.jit(jax.grad(jprune.jumpstart.jumpstart_loss(loss, coefficient=0.3)))(params, x)
    link = jprune.add_jumpstart(lambda params, x: forward(params, x)[1], coefficient=0.3)
    grads = jax.jit(jax.grad(lambda params: loss(params, x)[0]))(params)
    updates, state = jax.jit(link.update)(grads, link.init(params), params, batch=x)
    chex.assert_trees_all_close(updates, fused, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(state.penalty, jprune.jumpstart_penalty([x @ params["a"]]), rtol=1e-6)


def test_presets_set_aggregate_ties_and_space_and_explicit_arguments_override():
    z = jax.random.normal(jax.random.key(3), (4, 2, 2, 3))
    choices = [
        *({"preset": "cpaior_keras"}, {"aggregate": "sum_squares", "ties": "average", "spatial": "none"}),
        *({"preset": "cpaior_torch", "aggregate": "mean"}, {"aggregate": "mean", "ties": "single"}),
        *({"preset": "ieee"}, {"aggregate": "balanced"}),
    ]
    penalties = jax.jit(lambda z: [jprune.jumpstart_penalty([z], **choice) for choice in choices])(z)
    keras, like_keras, torch, like_torch, ieee, like_ieee = penalties
    np.testing.assert_allclose(keras, like_keras, rtol=1e-6)
    flat = np.asarray(z, np.float64)
    hinge = lambda top, bottom: 0.5 * np.maximum(1 - top, 0) + 0.5 * np.maximum(1 + bottom, 0)
    by_hand = (hinge(flat.max(0), flat.min(0)) ** 2).sum() + (hinge(flat.max(-1), flat.min(-1)) ** 2).sum()
    np.testing.assert_allclose(keras, by_hand, rtol=1e-6)
    np.testing.assert_allclose(torch, like_torch, rtol=1e-6)
    np.testing.assert_allclose(ieee, like_ieee, rtol=1e-6)


def test_status_of_units_and_points_by_hand_and_merged_over_batches():
    z = jnp.array([[1.0, -1.0, 2.0, 0.0], [3.0, -2.0, -2.0, -1.0]])
    assert [s.tolist() for s in _values(jprune.unit_status([z]))] == [[0, -1, 1, -1]]
    assert [s.tolist() for s in _values(jprune.jumpstart.point_status([z]))] == [[1, 1]]
    merged = jprune.jumpstart.merge_unit_status(jprune.unit_status([z]), jprune.unit_status([-z]))
    assert [s.tolist() for s in _values(merged)] == [[1, 1, 1, 1]]


def _values(statuses):
    return list(statuses.values()) if hasattr(statuses, "values") else list(statuses)


def test_only_the_program_for_a_cpu_has_a_branch():
    z = jax.ShapeDtypeStruct((4, 3, 3, 2), jnp.float32)
    gradient = jax.jit(jax.grad(functools.partial(jprune.jumpstart_penalty, spatial="pool"))).trace(z)
    cases = {p: gradient.lower(lowering_platforms=(p,)).as_text().count("stablehlo.case") for p in ("cpu", "tpu")}
    assert cases["cpu"] == cases["tpu"] + 1  # the others choose the platform, which is known when they are compiled
