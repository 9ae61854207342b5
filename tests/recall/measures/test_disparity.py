import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from fairlearn.metrics import MetricFrame
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import recall
from tests.recall import published

few = settings(max_examples=15)


# inequality within a model ---------------------------------------------------------------------------


def test_disparity_by_hand():
    d = recall.disparity([[0.9, 0.6, 0.9], [0.5, 0.5, 0.5]], [0.8, 0.5])
    assert d.worst_class.tolist() == [1, 0]
    np.testing.assert_allclose(d.worst, [0.6, 0.5])
    np.testing.assert_allclose(d.difference, [0.3, 0], atol=1e-15)
    np.testing.assert_allclose(d.ratio, [2 / 3, 1])
    np.testing.assert_allclose(d.difference_to_overall, [0.2, 0], atol=1e-15)
    np.testing.assert_allclose(d.ratio_to_overall, [0.75, 1])
    np.testing.assert_allclose(d.variance, [0.02, 0], atol=1e-15)  # ddof 0: (0.01 + 0.04 + 0.01) / 3
    assert d.classes.tolist() == [3, 3]


@few
@given(st.integers(0, 10_000))
def test_disparity_is_that_of_a_fairlearn_metric_frame_over_the_true_classes(seed):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(5), rng.integers(5, size=60)])
    predictions = np.where(rng.random(65) < 0.7, labels, rng.integers(5, size=65))
    predictions[:5] = np.arange(5)  # no recall of 0, for which fairlearn has its own ratio
    frame = MetricFrame(
        metrics=sklearn.metrics.accuracy_score, y_true=labels, y_pred=predictions, sensitive_features=labels
    )
    counted = recall.counts(labels, predictions, 5)
    d = recall.disparity(recall.recall(counted), recall.accuracy(counted))
    assert float(d.worst) == pytest.approx(frame.group_min())
    assert float(d.difference) == pytest.approx(frame.difference(method="between_groups"))
    assert float(d.ratio) == pytest.approx(frame.ratio(method="between_groups"))
    assert float(d.difference_to_overall) == pytest.approx(frame.difference(method="to_overall"))
    assert float(d.ratio_to_overall) == pytest.approx(frame.ratio(method="to_overall"))
    assert float(d.variance) == pytest.approx(np.var(frame.by_group, ddof=0))


def test_a_class_without_examples_is_never_the_worst_class():
    d = recall.disparity([np.nan, 0.9, 0.6], 0.8)
    assert (int(d.worst_class), float(d.worst), int(d.classes)) == (2, 0.6, 2)
    assert float(d.variance) == pytest.approx(0.0225)


def test_a_model_without_any_recall_has_no_disparity():
    d = recall.disparity([np.nan, np.nan], 0.8)
    assert (int(d.worst_class), int(d.classes)) == (-1, 0)
    assert np.isnan([d.worst, d.difference, d.ratio, d.difference_to_overall, d.ratio_to_overall, d.variance]).all()


def test_ratios_are_nan_where_nothing_is_right():
    d = recall.disparity([0.0, 0.0], 0.0)
    assert np.isnan([d.ratio, d.ratio_to_overall]).all()
    assert (float(d.difference), float(d.variance)) == (0, 0)


# change between dense and pruned ---------------------------------------------------------------------


def test_excess_accuracy_gap_by_hand():
    gap = recall.excess_accuracy_gap([[0.9, 0.7, np.nan]], [[0.8, 0.4, np.nan]], [0.8], [0.6])
    np.testing.assert_allclose(gap.per_class, [[-0.1, 0.1, np.nan]])
    assert (gap.maximum.tolist(), gap.worst_class.tolist()) == ([pytest.approx(0.1)], [1])


def test_excess_accuracy_gaps_of_classes_of_equal_size_sum_to_zero():
    r = published.recalls()
    gap = recall.excess_accuracy_gap(r[1], r[50], r[1].mean(-1), r[50].mean(-1))
    np.testing.assert_allclose(gap.per_class.sum(-1), 0, atol=1e-12)
    np.testing.assert_array_equal(gap.per_class.argmax(-1), gap.worst_class)


def test_normalized_difference_by_hand():
    # (0.9 - 0.8) / 0.8 - (0.7 - 0.6) / 0.6 = 1/8 - 1/6
    difference = recall.normalized_difference([0.9, 0.7], [0.7, 0.5], 0.8, 0.6)
    np.testing.assert_allclose(difference, [1 / 8 - 1 / 6, 1 / 6 - 1 / 8])


def test_class_tests_are_welch_tests_of_recall_minus_accuracy():
    r = published.recalls()
    dense, pruned = r[1], r[20][:25]
    tests = recall.class_tests(dense, pruned, dense.mean(-1), pruned.mean(-1))
    before, after = (x - x.mean(-1, keepdims=True) for x in (dense, pruned))
    expected = scipy.stats.ttest_ind(after, before, axis=0, equal_var=False)
    np.testing.assert_allclose(tests.statistic, expected.statistic)
    np.testing.assert_allclose(tests.p_value, expected.pvalue)
    np.testing.assert_allclose(tests.difference, after.mean(0) - before.mean(0))
    assert tests.reason.tolist() == [""] * 10


def test_class_tests_have_directions():
    args = [[0.9, 0.7], [0.8, 0.7]], [[0.9, 0.3], [0.9, 0.2]], [0.8, 0.75], [0.6, 0.55]
    less, greater = (recall.class_tests(*args, alternative=way).p_value for way in ("less", "greater"))
    np.testing.assert_allclose(less + greater, 1)
    assert less[1] < 0.05 < less[0]


def test_a_class_that_cannot_be_tested_says_why_and_leaves_the_others_alone():
    dense = np.array([[0.9, 0.7, np.nan], [0.8, 0.7, np.nan]])
    pruned = np.array([[0.9, 0.6, np.nan], [0.9, 0.6, np.nan]])
    tests = recall.class_tests(dense, pruned, [0.8, 0.8], [0.7, 0.7])
    assert tests.reason.tolist() == ["", "no spread over the models", "fewer than two models with a recall"]
    assert np.isnan(tests.p_value).tolist() == [False, True, True]


def test_class_tests_want_the_same_classes():
    with pytest.raises(ValueError, match=r"pruned_recall must have shape \(models, 2 classes\), got \(1, 3\)"):
        recall.class_tests([[0.9, 0.7]], [[0.9, 0.7, 0.5]], [0.8], [0.7])


def error_change(dense, pruned):
    """Relative changes of the error rates that confusion counts have."""
    rates = (np.stack([recall.false_positive_rate(c), recall.false_negative_rate(c)], -1) for c in (dense, pruned))
    return recall.error_rate_change(*rates)


def test_error_change_by_hand():
    # class 0: FPR 4/10 -> 4/10, FNR 2/10 -> 4/10; class 1: FPR 2/10 -> 4/10, FNR 4/10 -> 4/10
    change = error_change([[8, 2], [4, 6]], [[6, 4], [4, 6]])
    np.testing.assert_allclose(change.per_class, [[0, 1], [1, 0]], atol=1e-12)
    assert float(change.cev) == pytest.approx(0.5)  # both are (0.5, 0.5) from the mean
    assert float(change.sde) == pytest.approx(1)


def test_error_change_agrees_with_its_definition_on_a_stack():
    rng = np.random.default_rng(0)
    dense, pruned = rng.integers(1, 50, (2, 3, 5, 5))
    change = error_change(dense, pruned)
    for m in range(3):
        e = np.empty((5, 2))
        for c in range(5):
            rates = []
            for matrix in (dense[m], pruned[m]):
                positive, said = matrix[c].sum(), matrix[:, c].sum()
                rates.append(((said - matrix[c, c]) / (matrix.sum() - positive), 1 - matrix[c, c] / positive))
            e[c] = [after / before - 1 for before, after in zip(*rates, strict=True)]
        assert change.cev[m] == pytest.approx(np.mean([np.linalg.norm(row - e.mean(0)) ** 2 for row in e]))
        assert change.sde[m] == pytest.approx(np.mean(np.abs(e[:, 0] - e[:, 1])))


def test_equal_relative_growth_of_all_errors_has_no_combined_variance():
    dense = np.array([[8, 1, 1], [1, 8, 1], [1, 1, 8]])
    pruned = np.array([[6, 2, 2], [2, 6, 2], [2, 2, 6]])
    change = error_change(dense, pruned)
    assert (float(change.cev), float(change.sde)) == (pytest.approx(0), pytest.approx(0))


def test_a_class_without_dense_errors_has_no_relative_change_and_is_counted():
    change = error_change([[8, 2, 0], [4, 6, 0], [0, 0, 9]], [[6, 4, 0], [4, 6, 0], [1, 0, 8]])
    assert np.isnan(change.per_class).all(-1).tolist() == [False, False, True]
    assert (int(change.classes), int(change.left_out)) == (2, 1)
    no_errors = np.diag([8, 6, 9])
    stack = error_change(np.stack([no_errors, [[8, 2, 0], [4, 6, 0], [0, 0, 9]]]), np.stack([no_errors] * 2))
    assert (stack.classes.tolist(), stack.left_out.tolist()) == ([0, 2], [3, 1])
    with pytest.raises(ValueError, match="shapes of dense and pruned do not match"):
        error_change(np.ones((2, 3, 3), int), np.ones((3, 3, 3), int))


@pytest.mark.parametrize("shape", [(2,), (2, 3)])
def test_error_rates_that_are_not_pairs_are_refused(shape):
    with pytest.raises(ValueError, match=r"dense_rates must contain \(FPR, FNR\) of every class, .* got shape \(2,"):
        recall.error_rate_change(np.full(shape, 0.1), np.full(shape, 0.1))
