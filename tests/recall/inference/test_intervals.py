from unittest import mock

import numpy as np
import pytest
import scipy.stats
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from statsmodels.stats.multitest import multipletests

from jprune import recall

few = settings(max_examples=50)
values = st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=3, max_size=12).filter(
    lambda x: np.ptp(x) > 0.01
)
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=8)


@st.composite
def two_samples(draw):
    """Samples of equal size, so that they can be paired, with some spread where a test needs it."""
    a = draw(values)
    b = draw(st.lists(st.integers(-500, 500).map(lambda x: x / 100), min_size=len(a), max_size=len(a)))
    assume(np.ptp(b[1:]) > 0.01)
    assume(np.ptp(np.subtract(a, b)) > 0.01)
    return a, b


alternatives = st.sampled_from(["two-sided", "greater", "less"])


# intervals -------------------------------------------------------------------------------------------


def test_an_interval_by_hand():
    # mean 2, sd 1, t(0.975, 2) = 4.302653
    interval = recall.t_interval([1.0, 2.0, 3.0], level=0.95)
    np.testing.assert_allclose(interval, [2, 1, 2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5, 3, 0], rtol=1e-6)


@few
@given(values, st.sampled_from([0.5, 0.9, 0.95, 0.99, 0.999]))
def test_an_interval_agrees_with_scipy(x, level):
    interval = recall.t_interval(x, level)
    expected = scipy.stats.ttest_1samp(x, 0.0).confidence_interval(level)
    np.testing.assert_allclose([interval.low, interval.high], expected, rtol=1e-9, atol=1e-9)
    assert float(interval.sd) == pytest.approx(np.std(x, ddof=1))


def test_intervals_of_a_stack_leave_out_nan_and_say_how_many():
    interval = recall.t_interval([[1.0, 2.0, 3.0, np.nan], [1.0, np.nan, np.nan, np.nan], [np.nan] * 4], level=0.95)
    assert interval.models.tolist() == [3, 1, 0]
    assert interval.left_out.tolist() == [1, 3, 4]
    np.testing.assert_array_equal(interval.mean, [2, 1, np.nan])
    np.testing.assert_allclose(interval.low, [2 - 4.302653 / 3**0.5, np.nan, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(np.isnan(interval.sd), [False, True, True])


def test_one_replicate_has_a_mean_and_neither_spread_nor_interval_nor_mark():
    interval = recall.t_interval([[1.2]])
    assert interval.mean.tolist() == [1.2]
    assert np.isnan([interval.sd, interval.low, interval.high]).all()
    assert recall.mark(interval.low, interval.high).tolist() == [""]


def test_equal_values_have_an_interval_of_no_width():
    interval = recall.t_interval([1.5, 1.5, 1.5])
    assert (float(interval.sd), float(interval.low), float(interval.high)) == (0, 1.5, 1.5)


def test_intervals_have_their_nominal_coverage():
    draws = 1.1 + 0.2 * np.random.default_rng(0).normal(size=(4_000, 8))
    interval = recall.t_interval(draws, level=0.9)
    covered = ((interval.low <= 1.1) & (interval.high >= 1.1)).mean()
    assert covered == pytest.approx(0.9, abs=0.015)  # three standard errors of 4,000 draws


@pytest.mark.parametrize(
    ("x", "level", "message"),
    [
        ([1.0, 2.0], 1.0, r"level must lie strictly between 0 and 1 .*, got 1.0"),
        ([1.0, 2.0], 95.0, r"level must lie strictly between 0 and 1 .*, got 95.0"),
        (1.0, 0.99, "values must have a models axis"),
        ([1.0, np.inf], 0.99, r"values must be finite or NaN, got inf at index \(1,\)"),
    ],
)
def test_a_wrong_level_or_values_are_refused(x, level, message):
    with pytest.raises(ValueError, match=message):
        recall.t_interval(x, level)


def test_an_end_on_the_reference_overlaps_it():
    assert recall.mark([0.9, 1.0, 0.8], [1.0, 1.1, 0.9999]).tolist() == ["?", "?", "<"]
    assert recall.mark(0.1, 0.2, reference=0.0) == ">"


@pytest.mark.parametrize(
    ("low", "high", "message"),
    [([1.0], [1.0, 2.0], "must have the same shape"), ([1.0, 2.0], [1.5, 1.9], r"got 2.0 and 1.9 at index \(1,\)")],
)
def test_invalid_interval_ends_are_refused(low, high, message):
    with pytest.raises(ValueError, match=message):
        recall.mark(low, high)


# corrections -----------------------------------------------------------------------------------------


@few
@given(p_values)
def test_corrections_agree_with_statsmodels(p):
    with mock.patch("gc.collect"):  # statsmodels calls it each time: a second late in a run
        expected = {method: multipletests(p, method=method)[1] for method in ("bonferroni", "holm")}
    np.testing.assert_allclose(recall.bonferroni(p), expected["bonferroni"])
    np.testing.assert_allclose(recall.holm(p), expected["holm"])


@few
@given(p_values)
def test_holm_is_never_larger_than_bonferroni_nor_smaller_than_the_p_value(p):
    assert (recall.holm(p) <= recall.bonferroni(p)).all()
    assert (recall.holm(p) >= p).all()


def test_a_test_that_was_not_made_stays_nan_and_does_not_count():
    np.testing.assert_allclose(recall.bonferroni([[0.01, np.nan], [0.02, 0.5]]), [[0.03, np.nan], [0.06, 1]])
    np.testing.assert_allclose(recall.holm([[0.01, np.nan], [0.02, 0.5]]), [[0.03, np.nan], [0.04, 0.5]])


def test_a_family_may_be_larger_than_the_number_of_p_values():
    np.testing.assert_allclose(recall.bonferroni([0.01, 0.02], family=4), [0.04, 0.08])
    np.testing.assert_allclose(recall.holm([0.01, 0.02], family=4), [0.04, 0.06])


@pytest.mark.parametrize("correct", [recall.bonferroni, recall.holm])
def test_invalid_p_values_are_refused(correct):
    with pytest.raises(ValueError, match=r"p_values must lie in \[0, 1\], got 1.5 at index \(1,\)"):
        correct([0.1, 1.5])
    with pytest.raises(ValueError, match="family must be at least the 3 p-values given, got 2"):
        correct([0.1, 0.2, 0.3], family=2)


# tests -----------------------------------------------------------------------------------------------


def test_a_paired_test_by_hand():
    # differences 0.2, 0.1, 0.4: mean 0.2333, sd 0.152753, t = 0.2333 / (0.152753 / sqrt 3) = 2.645751
    test = recall.paired_test([1.2, 1.3, 1.5], [1.0, 1.2, 1.1], "greater")
    assert (test.difference, test.statistic) == (pytest.approx(0.7 / 3), pytest.approx(7**0.5))
    assert (test.df, test.models, test.left_out, test.reason) == (2, 3, 0, "")


@few
@given(two_samples(), alternatives)
def test_tests_agree_with_scipy(samples, alternative):
    a, b = samples
    paired, independent = recall.paired_test(a, b, alternative), recall.independent_test(a, b[1:], alternative)
    expected = scipy.stats.ttest_rel(a, b, alternative=alternative)
    assert (paired.statistic, paired.p_value, paired.df) == pytest.approx(
        (expected.statistic, expected.pvalue, expected.df)
    )
    expected = scipy.stats.ttest_ind(a, b[1:], equal_var=False, alternative=alternative)
    assert (independent.statistic, independent.p_value, independent.df) == pytest.approx(
        (expected.statistic, expected.pvalue, expected.df)
    )
    student = recall.independent_test(a, b[1:], alternative, equal_variances=True)
    expected = scipy.stats.ttest_ind(a, b[1:], equal_var=True, alternative=alternative)
    assert (student.p_value, student.df) == pytest.approx((expected.pvalue, expected.df))


@few
@given(two_samples())
def test_the_two_directions_of_a_test_share_the_certainty(samples):
    a, b = samples
    for test in (recall.paired_test, recall.independent_test):
        assert test(a, b, "greater").p_value + test(a, b, "less").p_value == pytest.approx(1)
        assert test(a, b, "greater").p_value == pytest.approx(test(b, a, "less").p_value)


def test_pairs_and_values_with_a_nan_are_left_out_and_counted():
    a, b = [1.2, 1.3, 1.5, np.nan, 2.0], [1.0, 1.2, 1.1, 1.0, np.nan]
    assert recall.paired_test(a, b) == recall.paired_test(a[:3], b[:3])._replace(left_out=2)
    expected = recall.independent_test([1.2, 1.3, 1.5, 2.0], b[:4])
    assert recall.independent_test(a, b) == expected._replace(left_out=2)


def test_models_of_independent_samples_may_differ_in_number():
    test = recall.independent_test([1.2, 1.3, 1.5], [1.0, 1.2])
    assert (test.models, test.left_out) == (5, 0)
    assert test.p_value == pytest.approx(scipy.stats.ttest_ind([1.2, 1.3, 1.5], [1.0, 1.2], equal_var=False).pvalue)


@pytest.mark.parametrize(
    ("test", "reason"),
    [
        (recall.paired_test([1.2], [1.0]), "fewer than two pairs"),
        (recall.paired_test([1.2, np.nan], [1.0, 1.0]), "fewer than two pairs"),
        (recall.paired_test([], []), "fewer than two pairs"),
        (recall.paired_test([1.2, 1.3], [1.2, 1.3]), "every pair differs by the same"),
        (recall.paired_test([0.3, 1.3, 2.3], [0.2, 1.2, 2.2]), "every pair differs by the same"),
        (recall.independent_test([1.2], [1.0, 1.1]), "fewer than two values in a sample"),
        (recall.independent_test([1.2, 1.2], [1.0, 1.0]), "no spread in either sample"),
    ],
)
def test_a_test_that_cannot_be_made_says_why(test, reason):
    assert test.reason == reason
    assert np.isnan([test.statistic, test.p_value, test.df]).all()


def test_a_sample_without_spread_can_be_compared_with_one_that_has_some():
    test = recall.independent_test([1.0, 1.2], [1.0, 1.0])
    # mean difference 0.1, standard error sqrt(0.02 / 2 + 0) = 0.1, one degree of freedom
    assert (test.statistic, test.df) == (pytest.approx(1), pytest.approx(1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall.paired_test([1.0, 2.0], [1.0]), "a has 2 models and b 1; a paired test"),
        (lambda: recall.paired_test([[1.0, 2.0]], [[1.0, 2.0]]), r"a must have shape \(models,\), got \(1, 2\)"),
        (lambda: recall.independent_test([1.0, np.inf], [1.0, 2.0]), "a must be finite or NaN, got inf"),
    ],
)
def test_samples_that_cannot_be_tested_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
