"""Alpha corrected for test-set noise: the formulas by hand, and simulated bias and coverage."""

import numpy as np
import pytest
import scipy.stats

from jprune import recall
from jprune.recall.inference.corrected import (
    TOO_FEW_EXAMPLES,
    TOO_FEW_MODELS,
    WITHIN_NOISE,
    corrected_intensification,
    seed_null,
    spread_ratio,
)
from jprune.recall.report.findings import findings
from tests.recall import published


def plain(labels, dense, after):
    """(N, D) of one model by the formulas in the module's docstring, one class at a time."""
    k, total = labels.max() + 1, len(labels)
    w, r, s, v, c = (np.zeros(k) for _ in range(5))
    for j in range(k):
        mine = labels == j
        n = mine.sum()
        w[j], r[j], s[j] = n / total, dense[mine].mean(), after[mine].mean()
        v[j] = r[j] * (1 - r[j]) / (n - 1)
        c[j] = ((dense[mine] & after[mine]).mean() - r[j] * s[j]) / (n - 1)
    a, b = dense.mean(), after.mean()
    noise = [((1 - 2 * w) * q).sum() + k * (w**2 * q).sum() for q in (v, c)]
    return (((r - a) * (s - b)).sum() - noise[1]) / (a * b), (((r - a) ** 2).sum() - noise[0]) / a**2


def study(rng, classes, size, models, factor):
    """Labels and the correct examples of dense and compressed models; errors grow by a factor and mostly coincide."""
    labels = np.repeat(np.arange(classes), size)
    error = 1 - np.linspace(0.98, 0.75, classes)[labels]
    draw = rng.random((models, labels.size))
    again = np.where(rng.random(draw.shape) < 0.8, draw, rng.random(draw.shape))
    return labels, draw >= error, again >= factor * error


def truth(classes, factor):
    recalls = [1 - f * (1 - np.linspace(0.98, 0.75, classes)) for f in (1, factor)]
    x, y = (r / r.mean() - 1 for r in recalls)
    return (x @ y) / (x @ x)


def test_the_corrected_slope_is_the_ratio_of_the_formulas_sums():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [300, 200, 150, 400])
    error = np.array([0.02, 0.1, 0.2, 0.3])[labels]
    dense, after = rng.random((3, 1050)) >= error, rng.random((3, 1050)) >= 1.5 * error
    order = rng.permutation(1050)
    found = corrected_intensification(labels[order], dense[:, order], after[:, order])
    sums = np.sum([plain(labels, d, a) for d, a in zip(dense, after, strict=True)], axis=0)
    assert found.alpha == pytest.approx(sums[0] / sums[1], rel=1e-12)
    assert found.low < found.alpha < found.high


def test_the_ratio_of_spreads_is_that_of_the_formulas_sums():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), [300, 200, 150, 400])
    error = np.array([0.02, 0.1, 0.2, 0.3])[labels]
    dense, after = rng.random(1050) >= error, rng.random((3, 1050)) >= 1.5 * error
    found = spread_ratio(labels, dense, after)
    before = plain(labels, dense, dense)[1]
    assert found.ratio == pytest.approx(np.sqrt(np.mean([plain(labels, p, p)[1] for p in after]) / before), rel=1e-12)
    assert found.low < found.ratio < found.high


def test_the_interval_of_the_ratio_of_spreads_covers_it():
    rng, recalls = np.random.default_rng(0), np.linspace(0.98, 0.75, 10)
    after = 0.8 + 0.5 * (recalls - recalls.mean())
    labels = np.repeat(np.arange(10), 200)
    truth = (after.std() / after.mean()) / (recalls.std() / recalls.mean())
    found = [
        spread_ratio(labels, rng.random(2000) < recalls[labels], rng.random((1, 2000)) < after[labels], 0.9)
        for _ in range(100)
    ]
    assert 85 <= sum(each.low <= truth <= each.high for each in found) <= 100


def test_equal_models_have_a_corrected_alpha_of_exactly_1():
    labels, dense, _ = study(np.random.default_rng(1), 10, 200, 2, 1)
    found = corrected_intensification(labels, dense, dense)
    np.testing.assert_allclose([found.alpha, found.low, found.high], 1, atol=1e-9)


@pytest.mark.parametrize(
    ("sizes", "wrong"),
    [([200, 200], [10, 40]), ([10, 20, 100, 1000, 5000], [3, 4, 10, 60, 50])],
    ids=["two classes", "small classes among large ones"],
)
def test_class_differences_that_too_few_examples_measure_are_not_denied(sizes, wrong):
    """Both differ with p < .0001 in a test of homogeneity, and were called differences within sampling noise."""
    labels = np.repeat(np.arange(len(sizes)), sizes)
    place = np.concatenate([np.arange(n) for n in sizes])
    dense = (place >= np.array(wrong)[labels])[None]
    assert scipy.stats.chi2_contingency([wrong, np.subtract(sizes, wrong)]).pvalue < 1e-4
    assert corrected_intensification(labels, dense, dense).reason == TOO_FEW_EXAMPLES
    predicted = np.where(dense, labels, (labels + 1) % len(sizes))
    audit = recall.audit(labels, predicted, {4: np.where(place == 0, labels, predicted)})
    assert "classes cannot be measured by alpha at 4x compression: there are too few test examples" in audit.headline
    assert "beyond sampling noise" not in " ".join(finding.text for finding in findings(audit))


def test_class_differences_within_sampling_noise_are_named_instead_of_a_number():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(100), 20)
    dense, after = rng.random((2, 10, 2000)) < 0.865
    found = corrected_intensification(labels, dense, after, level=0.99)
    assert found.reason == WITHIN_NOISE
    assert np.isnan([found.alpha, found.low, found.high]).all()


def test_classes_of_one_or_two_examples_are_left_out():
    rng = np.random.default_rng(0)
    labels, dense, after = study(rng, 5, 1000, 1, 2)
    more = np.concatenate([labels, [5, 6, 6]])
    wrong = np.zeros((1, 3), bool)
    found = corrected_intensification(more, np.append(dense, wrong, 1), np.append(after, wrong, 1))
    assert found.classes == 5
    assert found.alpha == pytest.approx(corrected_intensification(labels, dense, after).alpha)


def test_the_seed_null_of_the_published_runs():
    counts = published.correct_counts()[1] / 1000
    found = seed_null(counts, counts.mean(1), 0.99)
    np.testing.assert_allclose(found, (0.994, 0.986, 1.003), atol=1.5e-3)


def test_the_seed_null_is_the_mean_over_ordered_pairs():
    r = np.random.default_rng(0).uniform(0.5, 1, (4, 6))
    a = r.mean(1)
    slopes = [float(recall.intensification(r[i], r[j], a[i], a[j])) for i in range(4) for j in range(4) if i != j]
    assert seed_null(r, a).alpha == pytest.approx(np.mean(slopes))


@pytest.mark.slow
@pytest.mark.parametrize("models", [1, 10])
@pytest.mark.parametrize(("classes", "size"), [(10, 90), (10, 1000), (100, 20)])
@pytest.mark.parametrize("factor", [1, 3])
def test_nominal_95_percent_intervals_cover_92_to_98_percent(classes, size, models, factor):
    rng = np.random.default_rng([classes, size, models, factor])
    wanted, covered, alphas = truth(classes, factor), [], []
    for _ in range(200):
        found = corrected_intensification(*study(rng, classes, size, models, factor), level=0.95)
        if found.reason:
            continue
        covered.append(found.low <= wanted <= found.high)
        alphas.append(found.alpha)
    assert len(covered) >= 185
    # 92 to 98%, and two standard errors of 200 draws
    assert 0.92 - 0.03 <= np.mean(covered) <= 0.98 + 0.02
    if models > 1:
        assert np.mean(alphas) == pytest.approx(wanted, rel=0.1)


def test_a_model_right_about_one_example_has_no_corrected_alpha_and_raises_no_warning():
    labels = np.repeat([0, 1], 10)
    dense, once = np.ones((1, 20), bool), (np.arange(20) == 2)[None]
    for before, after in ((dense, once), (once, dense)):
        found = corrected_intensification(labels, before, after)
        assert np.isnan(found.alpha)
        assert found.reason == "a model is right about one example only"


@pytest.mark.parametrize("models", [1, 3])
@pytest.mark.parametrize("wrong", range(12))
def test_one_error_of_the_dense_models_shows_no_class_differences(models, wrong):
    labels = np.repeat(np.arange(6), 41)  # D is 0, and its rounding error has either sign
    dense = np.broadcast_to(np.arange(len(labels)) != 20 * wrong, (models, len(labels)))
    after = np.random.default_rng(wrong).random(dense.shape) < 0.9
    found = corrected_intensification(labels, dense, after)
    assert (found.reason, np.isnan(found.alpha)) == (WITHIN_NOISE, True)


@pytest.mark.parametrize(("right", "reason"), [(0, "an accuracy is 0"), (1, "a model is right about one example only")])
def test_unpaired_dense_models_with_hardly_an_example_right_have_no_corrected_alpha(right, reason):
    labels = np.repeat([0, 1, 2], 20)
    dense = np.arange(60) < np.array([[9], [right]])
    after = np.random.default_rng(0).random((2, 60)) < 0.5
    assert corrected_intensification(labels, dense, after, paired=False).reason == reason


def test_classes_with_a_handful_of_examples_are_left_out():
    labels = np.repeat([0, 1, 2], [40, 40, 9])
    dense = np.arange(89)[None] % 4 > (labels == 0)
    dense[0, 80:] = True
    other = dense.copy()
    other[0, 80:] = False
    found = corrected_intensification(labels, dense, other)
    assert found.classes == 2
    assert found.reason == WITHIN_NOISE or found.alpha == pytest.approx(1.0)
    assert corrected_intensification(labels[:49] // 2, dense[:, :49], dense[:, :49]).reason.startswith("fewer than two")


def test_too_few_models_are_named_where_class_differences_are_clear():
    """Two dense models with recalls from .99 to .5 and to .8: the classes differ, the models too."""
    rng, labels = np.random.default_rng(1), np.repeat(np.arange(10), 1000)
    dense, after = (
        np.stack([rng.random(labels.size) < np.linspace(best, low, 10)[labels] for low in lows])
        for best, lows in ((0.99, (0.5, 0.8)), (0.95, (0.45, 0.7)))
    )
    found = corrected_intensification(labels, dense, after)
    assert found.reason == TOO_FEW_MODELS
    audit = recall.audit(labels, *(
        stack if name == "dense" else {4: stack}
        for name, stack in (("dense", np.where(dense, labels, (labels + 1) % 10)),
                            ("after", np.where(after, labels, (labels + 1) % 10)))
    ))  # fmt: skip
    assert "beyond sampling noise" not in audit.headline


@pytest.mark.parametrize("models", [2, 3])
def test_the_detectable_difference_has_the_quantile_of_the_interval(models):
    rng, labels = np.random.default_rng(models), np.repeat(np.arange(10), 300)
    recalls = np.linspace(0.98, 0.7, 10)
    dense, after = (
        np.stack([rng.random(labels.size) < (recalls + rng.normal(0, sd, 10))[labels] for _ in range(models)])
        for sd in (0.005, 0.01)
    )
    row = recall.audit(
        labels, np.where(dense, labels, (labels + 1) % 10), {4: np.where(after, labels, (labels + 1) % 10)}
    ).summary.iloc[0]
    found = corrected_intensification(labels, dense, after)
    quantiles = scipy.stats.t.isf([0.005, 0.1], found.degrees).sum()
    assert found.degrees <= 9 * (models - 1)
    assert row["alpha_corrected_detectable"] == pytest.approx(quantiles * found.error_at_one)


def test_a_difference_beyond_the_detectable_one_is_shown():
    """The measured slope, 0.4 here, has a smaller standard error than its difference from 1."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(10), 150)
    recalls = np.linspace(0.34, 0.63, 10)[labels]
    for _ in range(20):
        dense, after = rng.random((1, 1500)) < recalls, rng.random((1, 1500)) < 0.45 + 0.6 * recalls - 0.3
        found = corrected_intensification(labels, dense, after)
        if not found.reason:
            half = scipy.stats.norm.isf(0.005) * found.error_at_one
            assert (found.low <= 1 <= found.high) == (abs(found.alpha - 1) <= half)


def test_the_interval_of_unpaired_models_covers_other_dense_models():
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(10), 200)
    recalls, sums, found = np.linspace(0.95, 0.75, 10), [], []
    for _ in range(120):
        one, two = (np.clip(recalls + rng.normal(0, 0.03, (models, 10)), 0, 1) for models in (3, 6))
        x, y = one.mean(0) / one.mean() - 1, two / two.mean(1, keepdims=True) - 1
        sums.append([(x * y).sum(), 6 * (x * x).sum()])
        dense, after = (rng.random((len(r), 2000)) < r[:, labels] for r in (one, two))
        found.append(corrected_intensification(labels, dense, after, paired=False, level=0.95))
    wanted = np.divide(*np.sum(sums, axis=0))
    covered = [each.low <= wanted <= each.high for each in found if not each.reason]
    assert len(covered) > 100
    assert np.mean(covered) >= 0.9


def test_the_mean_of_unpaired_dense_models_is_taken():
    rng = np.random.default_rng(0)
    labels, dense, after = study(rng, 10, 300, 4, 2)
    one = corrected_intensification(labels, dense[:1], after, paired=False)
    same = corrected_intensification(labels, np.repeat(dense[:1], 4, axis=0), after)
    np.testing.assert_allclose(one[:-1], same[:-1])  # a single dense model is taken as given
    copies = corrected_intensification(labels, np.repeat(dense[:1], 3, axis=0), after, paired=False)
    assert copies.alpha == pytest.approx(one.alpha)
    assert corrected_intensification(labels, dense, after, paired=False).standard_error > 0
