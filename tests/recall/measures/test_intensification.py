import hypothesis.extra.numpy as hnp
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.linear_model
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from jprune import recall
from tests.recall import published

WORKED = ([0.9, 0.7], [0.7, 0.5], 0.8, 0.6)  # (dense recall, pruned recall, dense accuracy, pruned accuracy)
MEASURES = (
    recall.intensification,
    recall.reverse_intensification,
    recall.rma_intensification,
    recall.relative_intensification,
)


few = settings(max_examples=25, suppress_health_check=[HealthCheck.filter_too_much])


@st.composite
def runs(draw, equal_sizes=True, models=3, classes=4):
    """Dense and pruned recalls and accuracies of models whose recalls differ between classes."""
    correct = draw(hnp.arrays(np.int64, (2, models, classes), elements=st.integers(1, 99), fill=st.nothing()))
    sizes = (
        np.full(classes, 100) if equal_sizes else draw(hnp.arrays(np.int64, classes, elements=st.integers(100, 900)))
    )
    accuracies = correct.sum(-1) / sizes.sum()
    recalls = correct / sizes
    assume((np.ptp(recalls, axis=-1) > 0.01).all())
    assume((np.abs(recalls - accuracies[..., None]).max(-1) > 0.01).all())
    return recalls[0], recalls[1], accuracies[0], accuracies[1]


def test_the_worked_example_of_the_paper():
    assert float(recall.intensification(*WORKED)) == pytest.approx(4 / 3)
    np.testing.assert_allclose(recall.class_intensification(*WORKED), [4 / 3, 4 / 3])
    np.testing.assert_allclose(recall.balance([0.9, 0.7], 0.8), [0.1, -0.1])
    np.testing.assert_allclose(recall.normalized_balance([0.9, 0.7], 0.8), [0.125, -0.125])


def test_a_stack_of_models_gives_one_alpha_each():
    dense, pruned = np.array([[0.9, 0.7], [0.9, 0.5]]), np.array([[0.7, 0.5], [0.8, 0.6]])
    alphas = recall.intensification(dense, pruned, np.array([0.8, 0.7]), np.array([0.6, 0.7]))
    np.testing.assert_allclose(alphas, [4 / 3, 1 / 2])
    assert alphas.dtype == np.float64


def test_a_class_whose_dense_recall_is_the_accuracy_has_no_weight():
    args = ([0.9, 0.8, 0.7], [0.7, 0.9, 0.2], 0.8, 0.6)
    # x = (1/8, 0, -1/8), y = (1/6, 1/2, -2/3): alpha = (1/48 + 1/12) / (2/64)
    assert float(recall.intensification(*args)) == pytest.approx(10 / 3)
    np.testing.assert_allclose(recall.class_intensification(*args), [4 / 3, np.nan, 16 / 3])


@few
@given(runs())
def test_alpha_is_the_slope_of_a_regression_without_intercept(run):
    alphas = recall.intensification(*run)
    for m in range(3):
        x, y = (recall.normalized_balance(run[i][m], run[i + 2][m]) for i in (0, 1))
        fit = sklearn.linear_model.LinearRegression(fit_intercept=False).fit(x[:, None], y)
        assert alphas[m] == pytest.approx(fit.coef_[0], rel=1e-9, abs=1e-9)


@few
@given(runs())
def test_a_model_that_did_not_change_has_alpha_one_in_every_form(run):
    same = run[0], run[0], run[2], run[2]
    for measure in MEASURES:
        np.testing.assert_allclose(measure(*same), 1, rtol=1e-12)
    np.testing.assert_allclose(recall.pooled_intensification(*same)[:2], 1, rtol=1e-12)


@few
@given(runs(), st.permutations(range(4)))
def test_the_order_of_the_classes_does_not_matter(run, order):
    permuted = run[0][:, order], run[1][:, order], run[2], run[3]
    for measure in MEASURES:
        np.testing.assert_allclose(measure(*permuted), measure(*run), rtol=1e-9, atol=1e-12)


@few
@given(runs())
def test_alpha_is_the_mean_of_class_ratios_weighted_by_squared_dense_balance(run):
    weights = recall.normalized_balance(run[0], run[2]) ** 2
    ratios = recall.class_intensification(*run)
    np.testing.assert_allclose(
        recall.intensification(*run), np.nansum(weights * ratios, -1) / weights.sum(-1), rtol=1e-9, atol=1e-12
    )


@few
@given(runs(), st.floats(0.2, 1.0))
def test_errors_that_grow_in_proportion_give_alpha_null(run, shrink):
    dense, _, accuracy, _ = run
    factor = (1 + shrink * (1 / (1 - dense.min(-1)) - 1))[:, None]  # no recall falls below 0
    pruned, pruned_accuracy = np.clip(1 - factor * (1 - dense), 0, 1), 1 - factor[:, 0] * (1 - accuracy)
    assume((pruned_accuracy > 0.05).all())
    null = recall.null_intensification(accuracy, pruned_accuracy)
    np.testing.assert_allclose(recall.intensification(dense, pruned, accuracy, pruned_accuracy), null, rtol=1e-6)
    np.testing.assert_allclose(recall.relative_intensification(dense, pruned, accuracy, pruned_accuracy), 1, rtol=1e-6)


def test_alpha_null_by_hand():
    np.testing.assert_allclose(recall.null_intensification([0.8, 0.5], [0.6, 0.5]), [0.4 / 0.2 * 0.8 / 0.6, 1])
    assert float(recall.relative_intensification(*WORKED)) == pytest.approx(1 / 2)


@few
@given(runs(equal_sizes=False))
def test_the_intercept_form_is_ordinary_least_squares(run):
    line = recall.affine_intensification(*run)
    for m in range(3):
        x, y = (recall.normalized_balance(run[i][m], run[i + 2][m]) for i in (0, 1))
        np.testing.assert_allclose([line.slope[m], line.intercept[m]], np.polyfit(x, y, 1), rtol=1e-6, atol=1e-9)


@few
@given(runs())
def test_classes_of_equal_size_need_no_intercept(run):
    line = recall.affine_intensification(*run)
    np.testing.assert_allclose(line.slope, recall.intensification(*run), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(line.intercept, 0, atol=1e-9)


def test_an_offset_common_to_all_classes_is_no_intensification_with_an_intercept():
    dense, accuracy = np.array([0.9, 0.7, 0.5]), 0.85  # most examples are in the first class
    pruned = accuracy * (1 + recall.normalized_balance(dense, accuracy) + 0.05)
    line = recall.affine_intensification(dense, pruned, accuracy, accuracy)
    assert (float(line.slope), float(line.intercept)) == (pytest.approx(1), pytest.approx(0.05))
    assert float(recall.intensification(dense, pruned, accuracy, accuracy)) < 0.9


@few
@given(runs())
def test_the_reverse_slope_is_the_regression_of_dense_on_pruned_in_alphas_direction(run):
    reverse = recall.reverse_intensification(*run)
    swapped = recall.intensification(run[1], run[0], run[3], run[2])
    assume((np.abs(swapped) > 1e-6).all())
    np.testing.assert_allclose(reverse, 1 / swapped, rtol=1e-9)


@few
@given(runs())
def test_the_rma_slope_lies_between_alpha_and_the_reverse_slope(run):
    alpha, reverse = recall.intensification(*run), recall.reverse_intensification(*run)
    rma = recall.rma_intensification(*run)
    assume((np.abs(alpha) > 1e-6).all())
    np.testing.assert_allclose(rma, np.sign(alpha) * np.sqrt(alpha * reverse), rtol=1e-9)
    assert (np.abs(alpha) <= np.abs(rma) * (1 + 1e-12)).all()
    assert (np.abs(rma) <= np.abs(reverse) * (1 + 1e-12)).all()


def test_noise_in_the_dense_recalls_lowers_alpha_and_raises_the_reverse_slope_but_not_rma():
    rng = np.random.default_rng(0)
    truth = 0.8 + rng.uniform(-0.1, 0.1, (2_000, 10))
    dense, pruned = np.clip(truth + 0.05 * rng.normal(size=(2, 2_000, 10)), 0, 1)
    args = dense, pruned, dense.mean(-1), pruned.mean(-1)
    alpha, reverse, rma = (f(*args).mean() for f in MEASURES[:3])
    shrink = (0.2**2 / 12) / (0.2**2 / 12 + 0.05**2)  # reliability of a recall: variance between over total
    assert alpha == pytest.approx(shrink, abs=0.02)
    assert reverse > 1.5
    assert rma == pytest.approx(1, abs=0.05)


def test_pooled_slope_is_one_regression_over_all_models_and_weighs_unequal_models_more():
    dense, pruned = published.recalls()[1], published.recalls()[50]
    args = dense, pruned, dense.mean(-1), pruned.mean(-1)
    x, y = (recall.normalized_balance(r, r.mean(-1)).reshape(-1, 1) for r in (dense, pruned))
    fit = sklearn.linear_model.LinearRegression(fit_intercept=False).fit(x, y)
    pooled = recall.pooled_intensification(*args)
    assert float(pooled.slope) == pytest.approx(fit.coef_[0, 0])
    assert float(pooled.r2) == pytest.approx(fit.score(x, y))
    weights = (recall.normalized_balance(dense, dense.mean(-1)) ** 2).sum(-1)
    assert float(pooled.slope) == pytest.approx(np.average(recall.intensification(*args), weights=weights))


@pytest.mark.parametrize("measure", [recall.precision, recall.f1])
def test_precision_or_f1_may_replace_recall(measure):
    dense, pruned = np.array([[8, 2], [1, 9]]), np.array([[6, 4], [1, 9]])
    x, y = measure(dense) / 0.85 - 1, measure(pruned) / 0.75 - 1
    alpha = recall.intensification(measure(dense), measure(pruned), 0.85, 0.75)
    assert float(alpha) == pytest.approx((x * y).sum() / (x * x).sum())


# undefined results -----------------------------------------------------------------------------------


@few
@given(runs())
def test_a_class_without_examples_is_left_out_of_every_sum(run):
    with_gap = [np.insert(r, 2, np.nan, axis=-1) for r in run[:2]]
    for measure in MEASURES:
        np.testing.assert_allclose(measure(*with_gap, *run[2:]), measure(*run), rtol=1e-12)
    for form in (recall.pooled_intensification, recall.affine_intensification):
        for ours, theirs in zip(form(*with_gap, *run[2:]), form(*run), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    assert np.isnan(recall.class_intensification(*with_gap, *run[2:])[:, 2]).all()


@pytest.mark.parametrize(
    ("dense", "pruned", "accuracy", "pruned_accuracy", "reason"),
    [
        ([1.0, 1.0], [0.7, 0.5], 1.0, 0.6, "the dense model is perfect"),
        ([0.8, 0.8], [0.7, 0.5], 0.8, 0.6, "every class of the dense model matches its accuracy"),
        ([0.0, 0.0], [0.7, 0.5], 0.0, 0.6, "the dense accuracy is 0"),
        ([0.9, 0.7], [0.0, 0.0], 0.8, 0.0, "the pruned accuracy is 0"),
        ([np.nan, 0.7], [0.5, np.nan], 0.8, 0.6, "no class has both rates"),
    ],
)
def test_an_undefined_alpha_is_nan_with_its_reason(dense, pruned, accuracy, pruned_accuracy, reason):
    undefined_run = dense, pruned, accuracy, pruned_accuracy
    stacked = [np.stack([np.asarray(a), np.asarray(b)]) for a, b in zip(undefined_run, WORKED, strict=True)]
    for measure in (*MEASURES, lambda *args: recall.affine_intensification(*args).slope):
        values = measure(*stacked)
        assert np.isnan(values).tolist() == [True, False]
    assert recall.undefined(*stacked).tolist() == [reason, ""]
    pooled = recall.pooled_intensification(*stacked)
    assert (int(pooled.models), int(pooled.left_out)) == (1, 1)
    assert float(pooled.slope) == pytest.approx(4 / 3)


def test_a_pruned_model_that_predicts_one_class_has_an_alpha():
    # Bn_t = (1 - 1/3, -1/3, -1/3) / (1/3) = (2, -1, -1) against Bn_1 = (0.1, 0, -0.1) / 0.8
    alpha = recall.intensification([0.9, 0.8, 0.7], [1.0, 0.0, 0.0], 0.8, 1 / 3)
    assert float(alpha) == pytest.approx((0.125 * 2 + 0.125) / (2 * 0.125**2))


def test_alpha_null_and_the_ratio_to_it_are_nan_only_where_they_have_no_value():
    null = recall.null_intensification([1.0, 0.8, 0.8], [0.5, 0.0, 1.0])
    np.testing.assert_array_equal(null, [np.nan, np.nan, 0.0])
    assert np.isnan(recall.relative_intensification([0.9, 0.7], [1.0, 1.0], 0.8, 1.0))


def test_no_slope_with_an_intercept_where_all_dense_balances_are_equal():
    line = recall.affine_intensification([0.9, 0.9], [0.8, 0.7], 0.8, 0.75)
    assert np.isnan(line.slope)
    assert np.isnan(line.intercept)


def test_no_reverse_slope_where_dense_and_pruned_are_uncorrelated():
    assert np.isnan(recall.reverse_intensification([0.9, 0.7], [0.6, 0.6], 0.8, 0.6))
    assert recall.intensification([0.9, 0.7], [0.6, 0.6], 0.8, 0.6) == 0


def test_pooling_only_undefined_models_is_nan_and_counts_them():
    pooled = recall.pooled_intensification([[1.0, 1.0]], [[0.7, 0.5]], [1.0], [0.6])
    assert (bool(np.isnan(pooled.slope)), bool(np.isnan(pooled.r2))) == (True, True)
    assert (int(pooled.models), int(pooled.left_out)) == (0, 1)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rounding_errors_of_the_given_dtype_are_treated_as_zero(dtype):
    recalls = np.full(3, 0.1, dtype)
    accuracy = recalls.sum(dtype=dtype) / dtype(3)
    nudged = np.nextafter(accuracy, dtype(1))
    assert np.isnan(recall.intensification(recalls, recalls, nudged, accuracy))
    assert recall.undefined(recalls, recalls, nudged, accuracy) == "every class of the dense model matches its accuracy"
    dense = np.array([0.9, 0.8, 0.8], dtype)
    assert recall.intensification(dense, recalls, dtype(0.8), nudged) == 0


def test_an_accuracy_slightly_above_one_by_rounding_is_accepted_as_one():
    assert recall.undefined([1.0, 1.0], [0.9, 0.7], 1 + 1e-7, 0.8) == "the dense model is perfect"
    assert np.isnan(recall.null_intensification(1 + 1e-7, 0.8))
    assert recall.null_intensification(0.8, 1 + 1e-7) == 0


def test_jax_arrays_and_half_precision_are_accepted():
    alpha = recall.intensification(*(jnp.asarray(value) for value in WORKED))
    assert alpha.dtype == np.float64
    assert float(alpha) == pytest.approx(4 / 3, rel=1e-5)
    coarse = recall.intensification(*(jnp.asarray(value, jnp.bfloat16) for value in WORKED))
    assert float(coarse) == pytest.approx(4 / 3, rel=0.1)


# errors ---------------------------------------------------------------------------------------------


def test_one_dense_stack_serves_every_ratio():
    dense, pruned = np.array([[0.9, 0.7], [0.8, 0.5]]), np.array([[[0.7, 0.5], [0.8, 0.4]], [[0.6, 0.4], [0.9, 0.1]]])
    accuracies = dense.mean(-1), pruned.mean(-1)
    together = recall.intensification(dense, pruned, *accuracies)
    for t in range(2):
        alone = recall.intensification(dense, pruned[t], accuracies[0], accuracies[1][t])
        np.testing.assert_array_equal(together[t], alone)


@pytest.mark.parametrize("measure", [*MEASURES, recall.pooled_intensification, recall.undefined])
@pytest.mark.parametrize("models", [1, 29])
def test_dense_and_pruned_stacks_of_different_lengths_are_refused(measure, models):
    dense, pruned = np.full((models, 10), 0.8), np.full((30, 10), 0.7)
    with pytest.raises(ValueError, match=rf"shapes of dense and pruned do not match: .*\({models}, 10\), .*\(30, 10\)"):
        measure(dense, pruned, np.full(models, 0.8), np.full(30, 0.7))


@pytest.mark.parametrize(
    ("position", "value", "message"),
    [
        (0, [90.0, 70.0], r"dense_recall must lie in \[0, 1\], got 90.0 at index \(0,\)"),
        (1, [0.7, -0.1], r"pruned_recall must lie in \[0, 1\], got -0.1 at index \(1,\)"),
        (1, [0.7, np.inf], r"pruned_recall must lie in \[0, 1\], got inf"),
        (2, np.nan, r"dense_accuracy must lie in \[0, 1\], got nan"),
        (3, [0.6], r"pruned_accuracy must have the shape of pruned_recall without its class axis, \(\), got \(1,\)"),
        (0, 0.9, r"dense_recall must have shape \(..., classes\) with a class or more, got \(\)"),
        (0, [[0.9], [0.7, 0.5]], "dense_recall must be a rectangular array"),
        (0, ["high", "low"], "dense_recall must contain real numbers, got dtype <U4"),
    ],
)
def test_invalid_rates_are_refused(position, value, message):
    args = list(WORKED)
    args[position] = value
    with pytest.raises(ValueError, match=message):
        recall.intensification(*args)


def test_pooling_needs_models():
    with pytest.raises(ValueError, match="needs a models axis"):
        recall.pooled_intensification(*WORKED)


def test_accuracies_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match=r"dense_accuracy has shape \(2,\), pruned_accuracy \(3,\)"):
        recall.null_intensification([0.5, 0.5], [0.5, 0.5, 0.5])
