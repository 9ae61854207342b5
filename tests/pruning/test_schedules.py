"""Schedules: tables computed by hand, exact targets, and errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st

import jprune
from jprune.pruning import schedules
from jprune.pruning.amounts import Keep
from tests.pruning.steps import exact_count


def sizes(selection=jprune.global_masks, /, **leaves):
    """The budget of vectors of these sizes."""
    vectors = {name: jax.ShapeDtypeStruct((size,), jnp.float32) for name, size in leaves.items()}
    return schedules.budget_of(selection, vectors)


def test_one_shot_is_one_entry():
    assert schedules.one_shot(0.98, step=7) == {7: 0.98}
    assert schedules.one_shot(keep=1000, step=0) == {0: Keep(1000)}


def test_cubic_follows_zhu_and_gupta_in_float64():
    table = schedules.cubic(0.9, begin=1000, end=5000, every=100)
    steps = np.arange(1000, 5001, 100)
    expected = 0.9 + (0.0 - 0.9) * (1 - (steps - 1000) / (40 * 100)) ** 3
    assert list(table) == steps.tolist()
    np.testing.assert_allclose(list(table.values()), expected, rtol=0, atol=1e-15)


def test_cubic_worked_by_hand():
    assert schedules.cubic(0.8, begin=0, end=4, every=1) == pytest.approx({0: 0, 1: 0.4625, 2: 0.7, 3: 0.7875, 4: 0.8})


@pytest.mark.parametrize(("end", "every"), [(5000, 100), (5001, 100), (4999, 999), (1001, 5000)])
def test_cubic_reaches_its_target_exactly_also_off_its_grid(end, every):
    table = schedules.cubic(0.7, begin=1000, end=end, every=every)
    assert max(table) == end
    assert table[end] == 0.7


@given(st.floats(0, 1), st.integers(0, 1000), st.integers(1, 3000), st.integers(1, 500))
def test_cubic_never_falls(sparsity, begin, span, every):
    values = list(schedules.cubic(sparsity, begin, begin + span, every).values())
    assert values == sorted(values)
    assert values[0] == 0.0
    assert values[-1] == sparsity


def test_geometric_removes_a_fraction_of_what_remains():
    table = schedules.geometric(0.2, every=10, times=4)
    assert list(table) == [10, 20, 30, 40]
    np.testing.assert_allclose(list(table.values()), [0.2, 0.36, 0.488, 0.5904], rtol=1e-15)


decimals = st.integers(0, 10**9).map(lambda digits: digits / 10**9)


def test_keep_counts_round_half_to_even():
    assert schedules.keep_counts({0: 0.5, 5: 0.75}, sizes(w=5)) == ((0, 2), (5, 1))
    assert schedules.keep_counts({0: 0.5}, sizes(w=7)) == ((0, 4),)


def test_keep_counts_of_a_resnet_50_at_98_percent():
    assert schedules.keep_counts({0: 0.98}, sizes(w=25_557_032)) == ((0, 511_141),)


def test_keep_counts_beyond_two_to_the_31():
    assert schedules.keep_counts({0: 0.5}, sizes(w=2**33 + 2)) == ((0, 2**32 + 1),)


@given(st.dictionaries(st.integers(0, 10**6), decimals, min_size=1), st.integers(0, 2**40))
def test_keep_counts_are_those_of_exact_arithmetic(table, total):
    counts = schedules.keep_counts(table, sizes(w=total), regrowing=True)
    assert counts == tuple((step, exact_count(total, table[step])) for step in sorted(table))


def test_counts_and_fractions_mix_and_numpy_scalars_are_numbers():
    table = {np.int64(3): np.float64(0.5), 9: Keep(2)}
    assert schedules.keep_counts(table, sizes(w=10)) == ((3, 5), (9, 2))


def test_a_rising_count_needs_regrowth():
    with pytest.raises(ValueError, match=r"keeps 8 weights at step 5, more than the 5 at step 1.*regrow"):
        schedules.keep_counts({1: 0.5, 5: 0.2}, sizes(w=10))
    assert schedules.keep_counts({1: 0.5, 5: 0.2}, sizes(w=10), regrowing=True) == ((1, 5), (5, 8))


def test_a_count_may_stay_the_same():
    assert schedules.keep_counts({1: 0.5, 5: Keep(5), 9: 0.5}, sizes(w=10)) == ((1, 5), (5, 5), (9, 5))


def test_amounts_per_layer_are_counted_leaf_by_leaf():
    schedule = {0: {"^a$": 0.5, "": 0.25}, 9: {"^a$": Keep(1), "b": 0.75}}
    assert schedules.keep_counts(schedule, sizes(a=5, b=8)) == ((0, 2 + 6), (9, 1 + 2))
    with pytest.raises(
        ValueError, match="amounts per layer has the key 'c', which matches no layer; there are 'a', 'b'"
    ):
        schedules.keep_counts({0: {"c": 0.5, "": 0.5}}, sizes(a=5, b=8))


@pytest.mark.parametrize(
    ("schedule", "selection", "message"),
    [
        # The totals fall, 100 to 80, but the first layer would rise from 10 weights.
        (
            {0: {"a": 0.9, "b": 0.1}, 1: {"a": 0.5, "b": 0.7}},
            jprune.global_masks,
            "50 weights of 'a' at step 1, more than the 10 at",
        ),
        ({0: {"a": 0.9, "b": 0.0}, 1: 0.5}, jprune.layer_masks, "50 weights of 'a' at step 1, more than the 10 at"),
        ({0: {"a": 0.9, "b": 0.0}, 1: 0.5}, functools.partial(jprune.layer_masks), "50 weights of 'a'"),
        ({0: 0.5, 1: {"a": 0.9, "b": 0.4}}, jprune.layer_masks, "60 weights of 'b' at step 1, more than the 50 at"),
        ({0: Keep(100), 1: {"a": 0.4, "b": 0.9}}, jprune.layer_masks, "60 weights of 'a' at step 1, more than the 50"),
        ({0: {"a": 0.9, "b": 0.0}, 1: Keep(110), 2: {"a": 0.8, "b": 0.9}}, jprune.layer_masks, "20 weights of 'a' at"),
    ],
)
def test_a_rising_count_of_one_layer_needs_regrowth_too(schedule, selection, message):
    with pytest.raises(ValueError, match=f"keeps {message}"):
        schedules.keep_counts(schedule, sizes(selection, a=100, b=100))
    schedules.keep_counts(schedule, sizes(selection, a=100, b=100), regrowing=True)


def test_counts_of_all_layers_may_be_divided_otherwise_than_before():
    # The first layer has only 10 weights left, so the second keeps 70.
    table = {0: {"a": 0.9, "b": 0.0}, 1: Keep(80), 2: {"a": 0.95, "b": 0.5}}
    assert schedules.keep_counts(table, sizes(jprune.layer_masks, a=100, b=100)) == ((0, 110), (1, 80), (2, 55))
    # A global selection may have kept any 50 of a layer.
    assert schedules.keep_counts({0: 0.5, 1: {"a": 0.2, "b": 0.9}}, sizes(a=100, b=100)) == ((0, 100), (1, 90))


def test_counts_of_stacked_layers_are_those_of_each():
    stack = {"blocks": jax.ShapeDtypeStruct((2, 3, 5), jnp.float32)}
    axes = {"": jprune.KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
    budget = functools.partial(schedules.budget_of, jprune.layer_masks, stack, axes)
    # Half of 15 weights is 8, rounded half to even, in each of two layers.
    assert schedules.keep_counts({0: 0.5, 1: {"": Keep(6)}}, budget()) == ((0, 16), (1, 12))
    assert schedules.keep_counts({0: 0.9}, budget(min_keep=3)) == ((0, 6),)
    with pytest.raises(ValueError, match=r"keeps 9 weights of 'blocks\[0\]' at step 1, more than the 8 at step 0"):
        schedules.keep_counts({0: 0.5, 1: {"": Keep(9)}}, budget())


def test_a_count_above_the_total_is_refused():
    with pytest.raises(ValueError, match="keeps 11 weights at step 4; there are only 10"):
        schedules.keep_counts({4: Keep(11)}, sizes(w=10))


@pytest.mark.parametrize(
    ("schedule", "error", "message"),
    [
        (0.9, TypeError, "must be a dict"),
        ({}, ValueError, "empty"),
        ({-1: 0.5}, ValueError, "a step of the schedule is -1; it must be from 0"),
        ({2**31: 0.5}, ValueError, "a step of the schedule is 2147483648"),
        ({1.5: 0.5}, TypeError, "a step of the schedule is 1.5"),
        ({True: 0.5}, TypeError, "a step of the schedule is True"),
        ({0: 1.5}, ValueError, r"schedule\[0\]=1\.5 must be from 0\.0 to 1\.0"),
        ({0: -0.1}, ValueError, r"schedule\[0\]=-0\.1"),
        ({0: float("nan")}, ValueError, r"schedule\[0\]=nan"),
        ({0: 1000}, TypeError, r"schedule\[0\]=1000 is an integer.* write jprune\.Keep\(1000\)"),
        ({0: np.int32(7)}, TypeError, r"write jprune\.Keep\(7\)"),
        ({0: {}}, ValueError, r"schedule\[0\] is an empty dict"),
        ({0: {"a": 3}}, TypeError, r"schedule\[0\]\['a'\]=3 is an integer.* write jprune\.Keep\(3\)"),
        ({0: True}, TypeError, r"schedule\[0\]=True"),
        ({0: "0.5"}, TypeError, r"schedule\[0\]='0\.5'"),
    ],
)
def test_a_bad_table_is_refused(schedule, error, message):
    with pytest.raises(error, match=message):
        schedules.entries(schedule)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: schedules.one_shot(1.1, 0), ValueError, "1.1"),
        (lambda: schedules.one_shot(0.5, -2), ValueError, "-2"),
        (lambda: schedules.one_shot(1000, step=0), TypeError, "sparsity=1000 is an integer.* write keep=1000"),
        (lambda: schedules.one_shot(keep=0.1, step=0), TypeError, r"keep=0\.1 must be an integer.*sparsity=0\.9"),
        (lambda: schedules.one_shot(0.5), TypeError, "one_shot needs step="),
        (lambda: schedules.one_shot(step=3), TypeError, "neither is given"),
        (lambda: Keep(-3), ValueError, r"Keep\(-3\)"),
        (lambda: schedules.cubic(1, 0, 10, 1), TypeError, "sparsity is 1; it must be a float"),
        (lambda: schedules.cubic(0.5, 10, 10, 1), ValueError, "end=10 must come after begin=10"),
        (lambda: schedules.cubic(0.5, 0, 10, 0), ValueError, "every is 0; it must be at least 1"),
        (lambda: schedules.cubic(0.5, -1, 10, 1), ValueError, "begin is -1"),
        (lambda: schedules.geometric(1.2, 1, 1), ValueError, r"rate is 1\.2"),
        (lambda: schedules.geometric(0.2, 1, 0), ValueError, "times is 0"),
    ],
)
def test_bad_arguments_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_describe_says_where_the_amount_falls_and_what_is_not_quite_all():
    assert schedules.describe({0: 0.9, 5: 0.5}, steps=9).endswith(
        "ends with sparsity 0.5\nthe amount falls at step 5: pruned weights come back only with regrow="
    )
    assert "falls" in schedules.describe({0: Keep(3), 2: Keep(4)}, steps=9)
    assert "falls" in schedules.describe({0: {"^a": 0.5, "": 0.1}, 2: {"^a": 0.5, "": 0.0}}, steps=9)
    assert "falls" not in schedules.describe({0: 0.5, 2: Keep(4), 5: 0.5}, steps=9)
    assert schedules.describe({0: 0.9999999}, steps=1).endswith("ends with sparsity 0.9999999")
    assert schedules.describe({0: {"^a": 0.5, "": 1.0}}, steps=1).endswith(
        "ends with ^a: sparsity 0.5, others: sparsity 1"
    )


def test_describe_shows_which_entries_are_reached():
    table = {0: Keep(500), 4: {"^a": 0.5, "": 0.25}}
    reached = schedules.describe(table, steps=5).splitlines()
    assert reached[1].split() == ["0", "keep", "500", "yes"]
    assert reached[-1] == "ends with ^a: sparsity 0.5, others: sparsity 0.25"
    missed = schedules.describe(table, steps=4).splitlines()
    assert missed[2].endswith("no: the run has 4 updates, this needs 5")
    assert missed[-1].startswith("ends with keep 500; the schedule's last amount, ^a: sparsity 0.5")
    assert schedules.describe({3: 0.5}, steps=0).endswith(
        "ends with all weights; the schedule's last amount, sparsity 0.5, is not reached"
    )


def test_an_empty_schedule_is_refused_and_points_to_keep_zeros():
    with pytest.raises(ValueError, match=r"schedule is empty; .* use jprune.keep_zeros\(\)"):
        schedules.entries({})


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (
            optax.linear_schedule(0.0, 0.9, 10),
            r"of a function of the step, make one: \{step: round\(float\(schedule\(step\)\), 6\)",
        ),
        ({1: 1}, r"To remove all weights, write 1\.0; to keep 1 weight, write jprune\.Keep\(1\)$"),
        ({1: 0}, r"To remove none, write 0\.0; to keep 0 weights"),
        ({1: jnp.float32(0.5)}, r"is a scalar array; it must be a float.* write float\(\.\.\.\) around the array"),
    ],
)
def test_likely_mistakes_are_refused_with_what_to_write(schedule, message):
    with pytest.raises(TypeError, match=message):
        schedules.entries(schedule)
