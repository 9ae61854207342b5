"""Every number of the re-analysis of the published magnitude runs, from their per-class correct counts."""

import itertools

import numpy as np
import pytest

from jprune import recall
from tests.recall import published

MEANS = (0.933, 0.959, 1.065, 1.247, 1.802)
SDS = (0.050, 0.055, 0.058, 0.093, 0.151)
INTERVALS = ((0.907, 0.958), (0.932, 0.987), (1.036, 1.094), (1.201, 1.294), (1.726, 1.878))


@pytest.fixture(scope="module")
def measured():
    """(dense recall, pruned recall (ratios, models, classes), dense accuracy, pruned accuracy)."""
    r, a = published.recalls(), published.accuracies()
    return r[1], np.stack([r[t] for t in published.RATIOS]), a[1], np.stack([a[t] for t in published.RATIOS])


@pytest.fixture(scope="module")
def alphas(measured):
    return recall.intensification(*measured)


def test_the_fixture_has_thirty_models_at_every_ratio():
    assert {t: correct.shape for t, correct in published.correct_counts().items()} == dict.fromkeys(
        (1, *published.RATIOS), (30, 10)
    )


def test_pooled_alpha_and_r2(measured):
    pooled = recall.pooled_intensification(*measured)
    np.testing.assert_allclose(pooled.slope, (0.928, 0.953, 1.057, 1.239, 1.791), atol=5e-4)
    np.testing.assert_allclose(pooled.r2, (0.978, 0.975, 0.967, 0.953, 0.873), atol=6e-4)
    assert pooled.models.tolist() == [30] * 5
    assert pooled.left_out.tolist() == [0] * 5


def test_mean_alpha_with_its_spread_and_interval(alphas):
    interval = recall.t_interval(alphas, level=0.99)
    np.testing.assert_allclose(interval.mean, MEANS, atol=5e-4)
    np.testing.assert_allclose(interval.sd, SDS, atol=5e-4)
    np.testing.assert_allclose(np.stack([interval.low, interval.high], -1), INTERVALS, atol=5e-4)
    assert interval.models.tolist() == [30] * 5


def test_marks(alphas):
    interval = recall.t_interval(alphas, level=0.99)
    assert recall.mark(interval.low, interval.high).tolist() == ["<", "<", ">", ">", ">"]


def test_consecutive_ratios_corrected_by_four(alphas):
    p = recall.bonferroni([recall.paired_test(b, a, "greater").p_value for a, b in itertools.pairwise(alphas)])
    np.testing.assert_allclose(p, (0.036, 6.9e-11, 1.3e-14, 2.4e-22), rtol=0.03)


def test_dense_accuracy(measured):
    assert measured[2].mean() == pytest.approx(0.8925, abs=5e-5)
    assert measured[2].std(ddof=1) == pytest.approx(0.0095, abs=5e-5)


def test_variance_of_recall_balance_over_classes(measured):
    dense, pruned, dense_accuracy, pruned_accuracy = measured
    balances = recall.balance(
        np.concatenate([dense[None], pruned]), np.concatenate([dense_accuracy[None], pruned_accuracy])
    )
    expected = (0.00317, 0.00282, 0.00296, 0.00357, 0.00471, 0.00900)
    np.testing.assert_allclose(balances.var(-1, ddof=0).mean(-1), expected, atol=5e-6)


def test_accuracy_after_pruning(measured):
    np.testing.assert_allclose(measured[3].mean(-1), (0.897, 0.893, 0.881, 0.858, 0.787), atol=5e-4)


def test_box_plots_of_alpha(alphas):
    """Whiskers, quartiles and medians drawn in the paper's figures 1 and 3, by pgfplots' own quantiles."""
    ends = np.quantile(alphas, (0, 0.25, 0.5, 0.75, 1), axis=-1, method="interpolated_inverted_cdf").T
    drawn = (
        (0.817, 0.901, 0.934, 0.959, 1.033),
        (0.880, 0.913, 0.957, 0.999, 1.089),
        (0.971, 1.009, 1.064, 1.112, 1.164),
        (1.078, 1.155, 1.247, 1.314, 1.374),
        (1.560, 1.648, 1.845, 1.904, 2.053),
    )
    np.testing.assert_allclose(ends, drawn, atol=1e-3)
