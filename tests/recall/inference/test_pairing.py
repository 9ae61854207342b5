import itertools

import numpy as np
import pytest
import scipy.stats

from jprune import recall
from tests.recall import published


def test_all_pairings_are_tried_where_they_are_few():
    a, b = [0.3, 1.2, 0.7, 1.9, 1.1], [0.5, 0.9, 1.0, 1.6, 1.4]
    test = recall.pairing_test(a, b, rng=0)
    observed = np.corrcoef(a, b)[0, 1]
    null = [np.corrcoef(a, order)[0, 1] for order in itertools.permutations(b)]
    assert test.correlation == pytest.approx(observed)
    assert test.p_value == pytest.approx(np.mean(np.array(null) >= observed - 1e-12))


def test_the_statistic_on_single_values_is_pearsons():
    a, b = np.random.default_rng(0).normal(size=(2, 30))
    test = recall.pairing_test(a, b, rng=0)
    expected = scipy.stats.pearsonr(a, b, alternative="greater")
    assert test.correlation == pytest.approx(expected.statistic)
    assert test.p_value == pytest.approx(expected.pvalue, abs=0.02)


def test_the_published_ratios_are_paired_with_their_dense_models():
    r = published.recalls()
    test = recall.pairing_test(r[1], r[2], rng=0)
    assert test.p_value == pytest.approx(1 / 10_001)
    assert test.correlation > 0.5


def test_a_broken_pairing_is_not_found():
    r = published.recalls()
    assert recall.pairing_test(r[1], np.roll(r[2], 1, axis=0), rng=0).p_value > 0.05


def test_p_values_are_uniform_without_pairing():
    draws = np.random.default_rng(0).normal(size=(200, 2, 8, 3))
    p = [recall.pairing_test(a, b, rng=0, resamples=199).p_value for a, b in draws]
    assert np.mean(np.array(p) <= 0.2) == pytest.approx(0.2, abs=0.085)  # three standard errors


def test_models_and_classes_without_values_are_left_out():
    a, b = np.random.default_rng(0).normal(size=(2, 6, 3))
    whole = recall.pairing_test(a, b, rng=0)
    with_gaps = [np.insert(np.vstack([x, np.full(3, np.nan)]), 1, np.nan, axis=1) for x in (a, b)]
    assert recall.pairing_test(*with_gaps, rng=0) == whole._replace(left_out=1)


@pytest.mark.parametrize(
    ("a", "b", "reason"),
    [
        ([], [], "fewer than three pairs"),
        ([1.0, 2.0], [1.0, 2.0], "fewer than three pairs"),
        ([1.0, 2.0, 3.0, np.nan], [1.0, 2.0, np.nan, 4.0], "fewer than three pairs"),
        ([np.nan] * 4, [1.0, 2.0, 3.0, 4.0], "fewer than three pairs"),
        ([0.1, 0.1, 0.1], [1.0, 2.0, 3.0], "no spread over the models in a stack"),
        ([0.0, 0.0, 0.0], [1.0, 2.0, 3.0], "no spread over the models in a stack"),
    ],
)
def test_no_answer_has_its_reason(a, b, reason):
    test = recall.pairing_test(a, b, rng=0)
    assert test.reason == reason
    assert np.isnan([test.correlation, test.p_value]).all()


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([1.0, 2.0], [1.0], r"a and b must have the same shape, got \(2,\) and \(1,\)"),
        (1.0, 1.0, r"a must have shape \(models,\) or \(models, columns\), got \(\)"),
        ([1.0, np.inf], [1.0, 2.0], "a must be finite or NaN, got inf"),
    ],
)
def test_stacks_that_cannot_be_paired_are_refused(a, b, message):
    with pytest.raises(ValueError, match=message):
        recall.pairing_test(a, b, rng=0)


def test_an_invalid_number_of_random_pairings_is_refused():
    with pytest.raises(ValueError, match="resamples must be at least 2, got 1"):
        recall.pairing_test([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], rng=0, resamples=1)
