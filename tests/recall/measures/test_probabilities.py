"""Confidence, calibration, divergence and top-k recall against scipy and scikit-learn."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
import sklearn.metrics

from jprune.recall.measures.probabilities import BINS, area_under_curve, divergence, margins, outlook

RNG = np.random.default_rng(0)
TRUE = RNG.integers(0, 4, 300)
LOGITS = RNG.normal(size=(300, 4)) + 2 * np.eye(4)[TRUE]


def test_logits_and_probabilities_give_the_same_margins():
    p = scipy.special.softmax(LOGITS, axis=1)
    wanted = np.diff(np.sort(p), axis=1)[:, -1]
    np.testing.assert_allclose(margins(LOGITS), wanted, atol=1e-12)
    np.testing.assert_allclose(margins(p), wanted, atol=1e-12)
    rows = np.array([[-np.inf, -np.inf], [0.0, -np.inf], [np.inf, 0.0]])
    np.testing.assert_allclose(margins(rows), [0, 1, 1])


def test_calibration_confidence_and_top_k_of_every_class():
    found, p = outlook(TRUE, LOGITS, 2), scipy.special.softmax(LOGITS, axis=1)
    for place, mine in enumerate([*(c == TRUE for c in range(4)), np.ones(300, bool)]):
        confidence, right = p[mine].max(1), p[mine].argmax(1) == TRUE[mine]
        assert found.confidence[place] == pytest.approx(confidence.mean())
        bins = np.minimum(np.floor(confidence * BINS), BINS - 1)
        gaps = [abs(right[bins == b].mean() - confidence[bins == b].mean()) * (bins == b).mean() for b in set(bins)]
        assert found.calibration_error[place] == pytest.approx(sum(gaps))
        top = sklearn.metrics.top_k_accuracy_score(TRUE[mine], LOGITS[mine], k=2, labels=range(4))
        assert found.top_k[place] == pytest.approx(top)


def test_divergence_is_the_mean_relative_entropy():
    other = LOGITS + RNG.normal(size=LOGITS.shape)
    found = divergence(TRUE, LOGITS, other)
    each = scipy.stats.entropy(scipy.special.softmax(LOGITS, 1), scipy.special.softmax(other, 1), axis=1)
    np.testing.assert_allclose(found, [*(each[c == TRUE].mean() for c in range(4)), each.mean()])


def test_the_area_under_the_curve_is_scikit_learns_with_ties():
    risk, lost = RNG.integers(0, 5, 200) / 4, RNG.random(200) < 0.3
    assert area_under_curve(risk, lost) == pytest.approx(sklearn.metrics.roc_auc_score(lost, risk))
    assert np.isnan(area_under_curve(risk, np.zeros(200, bool)))
