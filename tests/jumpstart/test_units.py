"""Units and points by hand and by plain loops: statuses, merging, every ratio, trainability, convergence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from jprune.jumpstart import Stack, units

DEAD, LINEAR, NONLINEAR = -1, 0, 1


def judged(values):
    """The definition: nothing positive, everything positive, or neither."""
    values = [float(v) for v in np.ravel(values)]
    if all(v <= 0 for v in values):
        return DEAD
    return LINEAR if all(v > 0 for v in values) else NONLINEAR


def lists(statuses):
    return [np.asarray(status).tolist() for status in statuses]


def test_zero_is_dead_and_not_linear():
    z = jnp.array([[0.0, 0.0, 0.5, -0.5], [0.0, 1.0, 0.5, -0.5]])
    assert lists(jprune.unit_status([z])) == [[DEAD, NONLINEAR, LINEAR, DEAD]]
    assert lists(jprune.jumpstart.point_status([z])) == [[NONLINEAR, NONLINEAR]]
    assert lists(jprune.jumpstart.point_status([jnp.array([[0.0, -1.0], [0.1, 2.0], [0.0, 2.0]])])) == [
        [DEAD, LINEAR, NONLINEAR]
    ]


SHAPES = [(4, 3), (4, 2, 2, 3), (4, 1)]


@settings(max_examples=25)
@given(st.integers(0, 2**31))
def test_statuses_are_those_of_the_definition_over_batch_and_space(seed):
    rng = np.random.default_rng(seed)
    shifts = rng.integers(-1, 2, 3)
    layers = [(rng.integers(-1, 2, shape) + s).astype(np.float32) for shape, s in zip(SHAPES, shifts, strict=True)]
    given_layers = [jnp.asarray(z) for z in layers]
    assert lists(jprune.unit_status(given_layers)) == [[judged(z[..., c]) for c in range(z.shape[-1])] for z in layers]
    assert lists(jprune.jumpstart.point_status(given_layers)) == [[judged(z[b]) for b in range(4)] for z in layers]


@settings(max_examples=25)
@given(st.integers(0, 2**31), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_merging_over_batches_gives_the_status_over_all_of_them(seed, sizes):
    rng = np.random.default_rng(seed)
    batches = [(rng.integers(-1, 2, (size, 5)) + np.array([[-1, 0, 0, 1, 2]])).astype(np.float32) for size in sizes]
    merged = jprune.unit_status([jnp.asarray(batches[0])])
    for batch in batches[1:]:
        merged = jprune.jumpstart.merge_unit_status(merged, jprune.unit_status([jnp.asarray(batch)]))
    whole = np.concatenate(batches)
    assert lists(merged) == [[judged(whole[:, c]) for c in range(5)]]
    assert merged[0].dtype == jnp.int8


def test_any_disagreement_between_batches_is_nonlinear():
    every = jnp.array([[a, b] for a in (-1, 0, 1) for b in (-1, 0, 1)], jnp.int8)
    merged = jprune.jumpstart.merge_unit_status([every[:, 0]], [every[:, 1]])
    assert lists(merged) == [[-1, 1, 1, 1, 0, 1, 1, 1, 1]]


def test_statuses_of_other_networks_cannot_be_merged():
    one, two = [jnp.zeros(2, jnp.int8)], [jnp.zeros(2, jnp.int8)] * 2
    with pytest.raises(ValueError, match="of different layers"):
        jprune.jumpstart.merge_unit_status(one, two)
    with pytest.raises(ValueError, match=r"shapes \(2,\) and \(3,\)"):
        jprune.jumpstart.merge_unit_status(one, [jnp.zeros(3, jnp.int8)])


# Four points through three layers:    dead once    linear     mixed     dead twice
POINTS = np.array([[-1, 0, 1, -1], [1, 0, 0, -1], [1, 0, 1, 1]], np.int8)
UNITS = [np.array([-1, -1, 0], np.int8), np.array([1, 1], np.int8), np.array([0, 1, 1, -1, 1], np.int8)]


def test_every_ratio_by_hand():
    found = jprune.jumpstart.activity([jnp.asarray(u) for u in UNITS], [jnp.asarray(p) for p in POINTS])
    expected = {
        "unit_dead_ratio": 3 / 10,
        "unit_linear_ratio": 2 / 10,
        "unit_nonlinear_ratio": 5 / 10,
        "point_dead_ratio": 2 / 4,  # the first and the last
        "point_linear_ratio": 1 / 4,  # the second alone is linear in every layer
        "point_nonlinear_ratio": 0 / 4,
        "deathness": 3 / 12,
        "linearity": 4 / 12,
        "nonlinearity": 5 / 12,
        "point_efficiency": (2 + 3 + 3 + 1) / 12,  # what is behind the last dead layer
    }
    for name, value in expected.items():
        np.testing.assert_allclose(getattr(found, name), value, rtol=1e-6, err_msg=name)


def by_loops(unit, point):
    """Section 2 of the definitions, cell by cell."""
    everything, points = np.concatenate(unit), list(zip(*point, strict=True))
    cells = [status for statuses in points for status in statuses]
    efficient = 0
    for statuses in points:
        last = max([layer for layer, status in enumerate(statuses) if status == DEAD], default=-1)
        efficient += len(statuses) - 1 - last
    return units.Activity(
        *(np.mean(everything == status) for status in (DEAD, LINEAR, NONLINEAR)),
        np.mean([DEAD in statuses for statuses in points]),
        *(np.mean([set(statuses) == {status} for statuses in points]) for status in (LINEAR, NONLINEAR)),
        *(np.mean([cell == status for cell in cells]) for status in (DEAD, LINEAR, NONLINEAR)),
        efficient / len(cells),
    )


@settings(max_examples=25)
@given(st.integers(0, 2**31))
def test_every_ratio_by_loops_with_and_without_padding(seed):
    rng = np.random.default_rng(seed)
    unit = [rng.integers(-1, 2, width).astype(np.int8) for width in (3, 1, 4)]
    point = [rng.integers(-1, 2, 5).astype(np.int8) for _ in unit]
    expected = by_loops(unit, point)
    found = jprune.jumpstart.activity([jnp.asarray(u) for u in unit], [jnp.asarray(p) for p in point])
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    real = [np.arange(6) < len(u) for u in unit]
    padded = jprune.jumpstart.activity(
        [jnp.asarray(np.pad(u, (0, 6 - len(u)), constant_values=-1)) for u in unit],
        [jnp.asarray(np.pad(p, (0, 2), constant_values=-1)) for p in point],
        units=[jnp.asarray(r) for r in real],
        examples=jnp.arange(7) < 5,
    )
    np.testing.assert_allclose(padded, expected, rtol=1e-6)


def test_padding_is_left_out_of_the_statuses():
    z = jnp.array([[1.0, 2.0, -9.0], [1.0, -2.0, -9.0], [-5.0, 7.0, 9.0]])
    assert lists(jprune.unit_status([z], examples=jnp.array([True, True, False]))) == [[LINEAR, NONLINEAR, DEAD]]
    assert lists(jprune.jumpstart.point_status([z], units=jnp.array([True, True, False]))) == [
        [LINEAR, NONLINEAR, NONLINEAR]
    ]
    sequences = jnp.array(
        [[[1.0, -1.0], [-9.0, 9.0]], [[2.0, -1.0], [3.0, -1.0]]]
    )  # the second position is padding once
    positions = jnp.array([[True, False], [True, True]])
    assert lists(jprune.unit_status([sequences, sequences[:, 0]], examples=positions)) == [[LINEAR, DEAD]] * 2
    first = jprune.jumpstart.point_status([sequences], units=jnp.array([True, False]), examples=positions)
    assert lists(first) == [[LINEAR, LINEAR]]
    with pytest.raises(ValueError, match="units is False everywhere in layer '0'"):
        jprune.jumpstart.point_status([z], units=jnp.zeros(3, bool))
    with pytest.raises(ValueError, match="examples is False everywhere"):
        jprune.unit_status([z], examples=jnp.zeros(3, bool))


def test_a_stack_has_the_statuses_of_its_layers():
    values = jax.random.normal(jax.random.key(0), (3, 4, 2, 5)) + jnp.linspace(-1, 1, 3)[:, None, None, None]
    for judge in (jprune.unit_status, jprune.jumpstart.point_status):
        assert np.asarray(judge(Stack(values)).values).tolist() == lists(judge(list(values)))
    whole = jprune.jumpstart.activity(jprune.unit_status(Stack(values)), jprune.jumpstart.point_status(Stack(values)))
    apart = jprune.jumpstart.activity(jprune.unit_status(list(values)), jprune.jumpstart.point_status(list(values)))
    np.testing.assert_allclose(whole, apart, rtol=1e-6)


def test_layers_that_lose_their_order_or_their_points_are_refused():
    p = jnp.zeros(2, jnp.int8)
    with pytest.raises(TypeError, match="loses their order under jit"):
        jprune.jumpstart.activity([p, p], {"a": p, "b": p})
    with pytest.raises(ValueError, match="every layer must have the same"):
        jprune.jumpstart.activity([p, p], [p, jnp.zeros(3, jnp.int8)])
    with pytest.raises(ValueError, match="unit_statuses has 1 layers and point_statuses 2"):
        jprune.jumpstart.activity([p], [p, p])


def test_trainability_and_convergence_by_hand():
    #                    data set  1    2    3    4
    accuracy = np.array([[0.9, 0.5, 0.7, 0.6], [0.8, 0.5, 0.9, 0.6], [0.7, 0.4, 0.9, 0.6]])
    # Strictly above the worst (.7, .4, .7, .6): where all tie, no technique trains.
    np.testing.assert_allclose(units.trainability(accuracy), [2 / 4, 3 / 4, 1 / 4], rtol=1e-12)
    # Behind the best (.9, .5, .9, .6).
    np.testing.assert_allclose(units.convergence(accuracy), [-0.2 / 4, -0.1 / 4, (-0.2 - 0.1) / 4], rtol=1e-12)
    with pytest.raises(ValueError, match="technique 1 on data set 2 is NaN"):
        units.trainability(np.array([[0.0, 0.0, 0.0], [0.0, 0.0, np.nan]]))


def test_statuses_and_ratios_are_the_same_under_jit_and_vmap():
    z = jax.random.normal(jax.random.key(1), (6, 4, 3)) + jnp.array([[[-1.0, 0.0, 1.0]]])

    def ratios(z):
        layers = [z, 1 - z]
        return jprune.jumpstart.activity(jprune.unit_status(layers), jprune.jumpstart.point_status(layers))

    mapped = jax.jit(jax.vmap(ratios))(z)
    for index in range(6):
        np.testing.assert_allclose([column[index] for column in mapped], ratios(z[index]), rtol=1e-6)


def test_no_technique_at_all_is_refused():
    for measure in (units.trainability, units.convergence):
        with pytest.raises(ValueError, match=r"accuracy must have shape \(techniques, datasets\) .* got \(0, 2\)"):
            measure(np.ones((0, 2)))


def test_units_that_are_not_masks_are_refused():
    with pytest.raises(TypeError, match="units must be a bool array, or a sequence or mapping of them, not bool"):
        jprune.jumpstart.point_status([jnp.ones((2, 3))], units=True)
