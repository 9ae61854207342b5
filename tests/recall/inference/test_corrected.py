"""Alpha corrected for test-set noise: the formulas by hand, and simulated bias and coverage."""

import numpy as np
import pytest

from jprune import recall
from jprune.recall.inference.corrected import WITHIN_NOISE, corrected_intensification, seed_null
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


def test_equal_models_have_a_corrected_alpha_of_exactly_1():
    labels, dense, _ = study(np.random.default_rng(1), 10, 200, 2, 1)
    found = corrected_intensification(labels, dense, dense)
    np.testing.assert_allclose([found.alpha, found.low, found.high], 1, atol=1e-9)


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
