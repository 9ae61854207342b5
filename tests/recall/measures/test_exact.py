"""Slopes of small counts agree with exact rational arithmetic; an exact 0 is 0 and not a rounding error."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jprune import recall

few = settings(max_examples=200)


@st.composite
def counts(draw):
    """Examples per class, and how many of them a dense and a pruned model have right."""
    support = draw(st.lists(st.integers(1, 12), min_size=2, max_size=8))
    return support, *([draw(st.integers(0, n)) for n in support] for _ in range(2))


def sums(support, dense, pruned):
    """The sums of products xx, xy and yy of the normalized balances, as fractions."""
    balances = []
    for correct in (dense, pruned):
        accuracy = Fraction(sum(correct), sum(support))
        balances.append([(Fraction(k, n) - accuracy) / accuracy for k, n in zip(correct, support, strict=True)])
    x, y = balances
    return [sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((x, x), (x, y), (y, y))]


def rates(support, dense, pruned, dtype=np.float64):
    """The arguments of the measures: recalls and accuracies in a dtype."""
    n = np.array(support)
    recalls = [(np.array(k) / n).astype(dtype) for k in (dense, pruned)]
    return *recalls, *(dtype(sum(k) / n.sum()) for k in (dense, pruned))


@few
@given(counts())
def test_every_slope_is_the_exact_one_rounded(case):
    assume(sum(case[1]) > 0 and sum(case[2]) > 0)
    xx, xy, yy = sums(*case)
    assume(xx > 0)
    given_rates = rates(*case)
    np.testing.assert_allclose(recall.intensification(*given_rates), float(xy / xx), rtol=1e-9)
    rma = np.sign(float(xy)) * float(yy / xx) ** 0.5
    np.testing.assert_allclose(recall.rma_intensification(*given_rates), rma, rtol=1e-9)
    reverse = float(yy / xy) if xy else np.nan
    np.testing.assert_allclose(recall.reverse_intensification(*given_rates), reverse, rtol=1e-9)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize(
    "case",
    [
        ([10, 10, 10], [9, 8, 7], [9, 6, 9]),  # x = (1, 0, -1) / 8, y = (1, -2, 1) / 8
        ([10, 10, 10, 10], [9, 9, 7, 7], [8, 6, 8, 6]),
        ([7, 7, 7, 7, 7, 7], [6, 6, 5, 5, 4, 4], [5, 3, 5, 3, 5, 3]),
    ],
)
def test_uncorrelated_balances_have_an_alpha_of_zero_and_no_reverse_slope(case, dtype):
    xx, xy, yy = sums(*case)
    assert xx > 0 == xy < yy
    given_rates = rates(*case, dtype)
    assert recall.intensification(*given_rates) == 0
    assert recall.rma_intensification(*given_rates) == 0
    assert np.isnan(recall.reverse_intensification(*given_rates))


def test_counts_beyond_the_range_of_int32_add_up():
    matrix = np.array([[2_000_000_000, 1_500_000_000], [1_000_000_000, 2_000_000_000]], np.int32)
    assert recall.support(matrix).tolist() == [3_500_000_000, 3_000_000_000]
    np.testing.assert_allclose(recall.recall(matrix), [4 / 7, 2 / 3], rtol=1e-15)
    np.testing.assert_allclose(recall.precision(matrix), [2 / 3, 4 / 7], rtol=1e-15)
    np.testing.assert_allclose(recall.f1(matrix), [40 / 65, 40 / 65], rtol=1e-15)
    np.testing.assert_allclose(recall.accuracy(matrix), 40 / 65, rtol=1e-15)
    np.testing.assert_allclose(recall.false_positive_rate(matrix), [1 / 3, 3 / 7], rtol=1e-15)
    report = recall.audit_counts(matrix, {2: matrix.astype(np.int64) * 10**6 // 10**6})
    assert report.examples == 6_500_000_000
    assert float(report.alphas["alpha"].iloc[0]) == 1
