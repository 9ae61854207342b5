import sys

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from jprune import recall
from tests.recall import published


def study(models=12, scores=("magnitude", "undecayed"), ratios=(2.0, 4.0, 10.0), seed=0):
    """A balanced study: alpha = 0.9 + 0.02 ratio, 0.1 more for the second score, a model effect and noise."""
    rng = np.random.default_rng(seed)
    effect = 0.1 * rng.normal(size=models)
    rows = [
        (0.9 + 0.02 * ratio + 0.1 * k + effect[model] + 0.03 * rng.normal(), ratio, score, model)
        for k, score in enumerate(scores)
        for ratio in ratios
        for model in range(models)
    ]
    return pd.DataFrame(rows, columns=["alpha", "ratio", "score", "model"])


# mixed model -----------------------------------------------------------------------------------------


def test_the_mixed_model_of_a_balanced_study_has_its_closed_form():
    """Balanced: the fixed effects are least squares, the variances those of the analysis of variance."""
    frame = study()
    fit = recall.mixed_model(frame, level=0.95)
    second = (frame.score == "undecayed").to_numpy(float)
    design = np.stack([np.ones(72), second, frame.ratio, second * frame.ratio], -1)
    beta, *_ = np.linalg.lstsq(design, frame.alpha.to_numpy())
    table = fit.coefficients.set_index("term")
    terms = ["Intercept", "score[T.undecayed]", "ratio", "ratio:score[T.undecayed]"]
    np.testing.assert_allclose(table.estimate[terms], beta, rtol=1e-4)
    residual = frame.alpha - design @ beta
    means = residual.groupby(frame.model).mean()
    within = ((residual - means[frame.model].to_numpy()) ** 2).sum() / (72 - 12 - 3)
    between = 6 * (means**2).sum() / 11
    assert fit.residual_variance == pytest.approx(within, rel=1e-3)
    assert fit.model_variance == pytest.approx((between - within) / 6, rel=1e-2)
    # the slope varies only within models, so its standard error contains only the residual variance
    error = np.sqrt(within * np.linalg.inv(design.T @ design)[2, 2])
    assert table.standard_error["ratio"] == pytest.approx(error, rel=1e-3)
    z = scipy.stats.norm.ppf(0.975)
    np.testing.assert_allclose(table.high - table.estimate, z * table.standard_error, rtol=1e-6)
    np.testing.assert_allclose(table.p_value, 2 * scipy.stats.norm.sf(np.abs(table.z)), rtol=1e-6)
    assert (fit.models, fit.observations, fit.left_out, fit.reason) == (12, 72, 0, "")


def test_the_mixed_model_finds_the_growth_of_alpha_with_the_ratio_in_the_published_runs():
    r = published.recalls()
    pruned = np.stack([r[t] for t in published.RATIOS])
    alphas = recall.intensification(r[1], pruned, r[1].mean(-1), pruned.mean(-1))
    frame = pd.DataFrame(
        {
            "alpha": alphas.ravel(),
            "ratio": np.repeat(published.RATIOS, 30),
            "score": "magnitude",
            "model": np.tile(np.arange(30), 5),
        }
    )
    ratio = recall.mixed_model(frame).coefficients.set_index("term").loc["ratio"]
    slope, _ = np.polyfit(published.RATIOS, alphas.mean(-1), 1)
    assert ratio.estimate == pytest.approx(slope, rel=1e-4)
    assert 0 < ratio.low < ratio.estimate < ratio.high


def test_the_reference_score_can_be_chosen_and_undefined_alphas_are_counted():
    frame = study()
    frame.loc[[3, 5], "alpha"] = np.nan
    fit = recall.mixed_model(frame, reference="undecayed")
    assert fit.coefficients.term.tolist()[1] == "score[T.magnitude]"
    assert (fit.observations, fit.left_out) == (70, 2)


def test_a_model_variance_at_zero_is_noted_and_not_raised():
    frame = study(models=4)
    frame["alpha"] = frame.ratio + np.tile([0.01, -0.01, 0.01, -0.01, -0.01, 0.01, -0.01, 0.01], 3)
    fit = recall.mixed_model(frame)
    assert fit.model_variance == pytest.approx(0, abs=1e-6)
    assert fit.note
    assert fit.coefficients.set_index("term").estimate["ratio"] == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (study(models=1), "fewer than two models"),
        (study(ratios=(2.0,), scores=("magnitude",)), "no model has more than one alpha"),
        (study(ratios=(2.0,)), "a score has fewer than two ratios"),
        (
            study(models=2, ratios=(2.0, 4.0), scores=("a", "b")).iloc[[0, 1, 2, 4, 6]],
            "no more alphas than coefficients",
        ),
        (study().assign(alpha=np.nan), "fewer than two models"),
    ],
)
def test_a_mixed_model_that_cannot_be_fitted_says_why(frame, reason):
    fit = recall.mixed_model(frame)
    assert fit.reason == reason
    assert fit.coefficients.empty
    assert fit.coefficients.columns[0] == "term"
    assert np.isnan([fit.model_variance, fit.residual_variance]).all()


@pytest.mark.parametrize("alpha", [1.0, study().ratio])
def test_alphas_without_any_noise_have_no_standard_errors_and_say_so(alpha):
    fit = recall.mixed_model(study().assign(alpha=alpha))
    assert fit.reason == "the standard errors are undefined, the alphas having no residual variance"
    assert fit.coefficients.empty


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (study().drop(columns="model"), "frame lacks the column 'model'; it has"),
        (study().assign(ratio=np.inf), "ratio must be finite or NaN, got inf in row 0"),
        (study().assign(score=None), "column 'score' must have no missing value, got one in row 0"),
    ],
)
def test_unusable_frames_are_refused(frame, message):
    with pytest.raises(ValueError, match=message):
        recall.mixed_model(frame)


def test_a_reference_that_is_not_a_score_is_refused():
    with pytest.raises(ValueError, match=r"one of the scores \['magnitude', 'undecayed'\], got 'random'"):
        recall.mixed_model(study(), reference="random")


# at equal accuracy -----------------------------------------------------------------------------------


def covariance_study(models=15, gap=0.0):
    """log alpha = .8 * log alpha_null (+ gap for the second score), a model effect and noise."""
    rng = np.random.default_rng(0)
    frame = study(models=models)
    null = 1 + 0.05 * frame.ratio * (1 + 0.3 * rng.random(len(frame)))
    noise = (0.05 * rng.normal(size=models))[frame.model] + 0.02 * rng.normal(size=len(frame))
    log_alpha = 0.8 * np.log(null) + gap * (frame.score == "undecayed") + noise
    return frame.assign(alpha_null=null, alpha=np.exp(log_alpha))


def test_the_difference_at_equal_accuracy_is_least_squares_with_errors_clustered_by_model():
    frame = covariance_study(gap=0.03)
    ours = recall.compare_at_equal_accuracy(frame, "magnitude", "undecayed", level=0.95)
    y, n = np.log(frame.alpha.to_numpy()), len(frame)
    x = np.stack([np.ones(n), np.log(frame.alpha_null), frame.score == "undecayed"], -1).astype(float)
    bread = np.linalg.inv(x.T @ x)
    beta = bread @ x.T @ y
    residual = y - x @ beta
    scores = np.stack([x[frame.model == m].T @ residual[frame.model == m] for m in range(15)])
    small_sample = 15 / 14 * (n - 1) / (n - 3)
    error = np.sqrt((bread @ (scores.T @ scores) @ bread * small_sample)[2, 2])
    assert (ours.difference, ours.slope) == (pytest.approx(beta[2]), pytest.approx(beta[1]))
    half = scipy.stats.t.ppf(0.975, 14) * error
    assert (ours.low, ours.high) == (pytest.approx(beta[2] - half), pytest.approx(beta[2] + half))
    assert ours.p_value == pytest.approx(2 * scipy.stats.t.sf(abs(beta[2]) / error, 14))
    assert ours.r2 == pytest.approx(1 - residual.var() / y.var())
    assert (ours.observations, ours.models, ours.left_out, ours.reason) == (n, 15, 0, "")


def test_scores_that_differ_in_accuracy_alone_do_not_differ_at_equal_accuracy():
    frame = covariance_study()
    second = frame.score == "undecayed"
    frame.loc[second, "alpha"] *= 1.5**0.8  # it loses more accuracy, and alpha follows alpha_null
    frame.loc[second, "alpha_null"] *= 1.5
    ours = recall.compare_at_equal_accuracy(frame, "magnitude", "undecayed")
    assert ours.low < 0 < ours.high
    assert frame[second].alpha.mean() > 1.2 * frame[~second].alpha.mean()


def test_the_comparison_is_antisymmetric():
    frame = covariance_study(gap=0.03)
    forth, back = (
        recall.compare_at_equal_accuracy(frame, *pair)
        for pair in (("magnitude", "undecayed"), ("undecayed", "magnitude"))
    )
    assert forth.difference == pytest.approx(-back.difference)
    assert (forth.low, forth.p_value) == (pytest.approx(-back.high), pytest.approx(back.p_value))


def test_slopes_that_are_not_parallel_are_reported():
    frame = covariance_study(models=30)
    assert recall.compare_at_equal_accuracy(frame, "magnitude", "undecayed").parallel_p_value > 0.01
    second = frame.score == "undecayed"
    frame.loc[second, "alpha"] *= frame.alpha_null[second] ** 0.5
    assert recall.compare_at_equal_accuracy(frame, "magnitude", "undecayed").parallel_p_value < 1e-6


def test_numbers_may_be_compared_without_logarithms_and_must_where_an_alpha_is_not_positive():
    frame = covariance_study()
    frame.loc[0, "alpha"] = -0.5
    with pytest.raises(ValueError, match=r"alpha must be positive for logarithms, got -0\.5; use logarithm=False"):
        recall.compare_at_equal_accuracy(frame, "magnitude", "undecayed")
    zero = frame.assign(alpha=frame.alpha.abs())
    zero.loc[:1, "alpha"] = 0.25, 0.0
    with pytest.raises(ValueError, match=r"alpha must be positive for logarithms, got 0\.0; use logarithm=False"):
        recall.compare_at_equal_accuracy(zero, "magnitude", "undecayed")
    second = (frame.score == "undecayed").to_numpy(float)
    beta, *_ = np.linalg.lstsq(np.stack([np.ones(len(frame)), frame.alpha_null, second], -1), frame.alpha.to_numpy())
    ours = recall.compare_at_equal_accuracy(frame, "magnitude", "undecayed", logarithm=False)
    assert ours.difference == pytest.approx(beta[2])


def test_other_scores_and_undefined_alphas_stay_out_of_the_comparison():
    frame = covariance_study()
    expected = recall.compare_at_equal_accuracy(frame, "magnitude", "undecayed")
    other = frame.assign(score="random", alpha=-1.0)
    gaps = frame.iloc[:2].assign(alpha_null=np.nan)
    ours = recall.compare_at_equal_accuracy(pd.concat([frame, other, gaps]), "magnitude", "undecayed")
    assert ours == expected._replace(left_out=2)


@pytest.mark.parametrize(
    ("frame", "reason"),
    [
        (covariance_study(models=2), "fewer than three models"),
        (covariance_study().assign(alpha_null=1.0), "alpha_null does not vary within a score"),
        (covariance_study().assign(alpha=lambda f: f.alpha.where(f.score == "magnitude")), "a score has no alphas"),
    ],
)
def test_a_comparison_that_cannot_be_made_says_why(frame, reason):
    ours = recall.compare_at_equal_accuracy(frame, "magnitude", "undecayed")
    assert ours.reason == reason
    assert np.isnan([ours.difference, ours.low, ours.high, ours.p_value]).all()


@pytest.mark.parametrize("pair", [("magnitude", "random"), ("magnitude", "magnitude")])
def test_only_two_scores_of_the_frame_can_be_compared(pair):
    with pytest.raises(ValueError, match="a and b must be two scores of the frame"):
        recall.compare_at_equal_accuracy(covariance_study(), *pair)


def test_without_statsmodels_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "statsmodels.formula.api", None)
    for call in (lambda: recall.mixed_model(study()), lambda: recall.compare_at_equal_accuracy(study(), "a", "b")):
        with pytest.raises(ImportError, match=r"pip install 'jprune\[report\]'"):
            call()
