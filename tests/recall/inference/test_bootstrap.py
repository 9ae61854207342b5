import time

import numpy as np
import pytest
import scipy.stats

from jprune import recall
from tests.recall import published


def noisy(labels, rate, shape, rng):
    """Predictions that are wrong more often in classes of higher number."""
    predictions = np.broadcast_to(labels, (*shape, labels.size)).copy()
    wrong = rng.random(predictions.shape) < rate * (1 + labels / labels.max())
    predictions[wrong] = rng.integers(labels.max() + 1, size=wrong.sum())
    return predictions


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(0)
    labels = rng.integers(5, size=300)
    return labels, noisy(labels, 0.15, (4,), rng), noisy(labels, 0.3, (2, 4), rng)


# over models -----------------------------------------------------------------------------------------


def test_the_bootstrap_over_models_is_scipys_bca():
    r = published.recalls()
    alphas = recall.intensification(r[1], r[10], r[1].mean(-1), r[10].mean(-1))
    ours = recall.bootstrap_models(alphas, rng=0, level=0.95)
    theirs = scipy.stats.bootstrap((alphas,), np.mean, confidence_level=0.95, n_resamples=10_000, rng=1)
    interval = theirs.confidence_interval
    np.testing.assert_allclose([ours.low, ours.high], [interval.low, interval.high], atol=0.003)
    assert float(ours.standard_error) == pytest.approx(alphas.std(ddof=1) / 30**0.5, rel=0.05)
    assert float(ours.estimate) == pytest.approx(alphas.mean())


def test_the_bootstrap_agrees_with_the_t_interval_on_the_published_runs():
    r = published.recalls()
    pruned = np.stack([r[t] for t in published.RATIOS])
    alphas = recall.intensification(r[1], pruned, r[1].mean(-1), pruned.mean(-1))
    ours, t = recall.bootstrap_models(alphas, rng=0), recall.t_interval(alphas)
    np.testing.assert_allclose(ours.low, t.low, atol=0.02)
    np.testing.assert_allclose(ours.high, t.high, atol=0.02)
    assert recall.mark(ours.low, ours.high).tolist() == ["<", "<", ">", ">", ">"]


def test_all_rows_use_the_same_resamples_so_that_ratios_stay_paired():
    row = np.random.default_rng(0).normal(size=12)
    ours = recall.bootstrap_models([row, row + 1], rng=0, resamples=200)
    assert ours.low[1] == pytest.approx(ours.low[0] + 1)
    assert ours.high[1] == pytest.approx(ours.high[0] + 1)


def test_undefined_models_are_left_out_and_too_few_give_a_reason():
    ours = recall.bootstrap_models(
        [[1.0, 1.2, 1.1, np.nan], [1.0, np.nan, np.nan, np.nan], [np.nan] * 4, [2.0, 2.0, 2.0, 2.0]], rng=0
    )
    assert ours.models.tolist() == [3, 1, 0, 4]
    assert ours.left_out.tolist() == [1, 3, 4, 0]
    assert ours.reason.tolist() == ["", "fewer than two models", "the statistic is undefined for every model", ""]
    np.testing.assert_allclose(ours.estimate, [1.1, 1.0, np.nan, 2.0])
    assert np.isnan(ours.low).tolist() == [False, True, True, False]
    assert (ours.low[3], ours.high[3], ours.standard_error[3]) == (2, 2, 0)


@pytest.mark.parametrize("values", [[1.0, 2.0], [1.0, 1.0, 1.0, 5.0]])
def test_a_handful_of_models_has_an_interval_within_their_range(values):
    ours = recall.bootstrap_models(values, rng=0)
    assert min(values) <= ours.low < ours.estimate < ours.high <= max(values)


def test_no_model_gives_a_reason():
    ours = recall.bootstrap_models([], rng=0)
    assert (ours.reason, int(ours.models), int(ours.left_out)) == ("the statistic is undefined for every model", 0, 0)


# over test examples ----------------------------------------------------------------------------------


def test_the_bootstrap_over_examples_gathers_the_same_examples_for_every_model(case):
    by_class = np.argsort(case[0], kind="stable")  # the order in which examples are numbered
    labels, dense, pruned = (value[..., by_class] for value in case)
    ours = recall.bootstrap_examples(*case, 5, rng=7, resamples=20)
    assert ours.alphas.shape == (20, 2, 4)
    for b, drawn in enumerate(np.random.default_rng(7).integers(300, size=(20, 300))):
        counted = [recall.counts(labels[drawn], predictions[..., drawn], 5) for predictions in (dense, pruned)]
        recalls, accuracies = ([measure(c) for c in counted] for measure in (recall.recall, recall.accuracy))
        np.testing.assert_allclose(ours.alphas[b], recall.intensification(*recalls, *accuracies), rtol=1e-12)


def test_its_summary_follows_from_its_resamples(case):
    ours = recall.bootstrap_examples(*case, 5, rng=7, resamples=200, level=0.9)
    counted = [recall.counts(case[0], predictions, 5) for predictions in case[1:]]
    alphas = recall.intensification(*map(recall.recall, counted), *map(recall.accuracy, counted))
    means = ours.alphas.mean(-1)
    np.testing.assert_allclose(ours.estimate, alphas.mean(-1))
    np.testing.assert_allclose(ours.standard_error, means.std(0, ddof=1))
    np.testing.assert_allclose(ours.bias, means.mean(0) - alphas.mean(-1))
    np.testing.assert_allclose(ours.low, 2 * alphas.mean(-1) - np.quantile(means, 0.95, axis=0))
    np.testing.assert_allclose(ours.high, 2 * alphas.mean(-1) - np.quantile(means, 0.05, axis=0))
    assert ours.left_out.tolist() == [0, 0]


def test_blocks_of_resamples_do_not_change_them(case, monkeypatch):
    whole = recall.bootstrap_examples(*case, 5, rng=3, resamples=25)
    monkeypatch.setattr("jprune.recall.inference.bootstrap._CELLS", 300 * 4)
    np.testing.assert_allclose(recall.bootstrap_examples(*case, 5, rng=3, resamples=25).alphas, whole.alphas)


def test_a_resample_without_a_class_leaves_it_out():
    labels = np.array([0] * 30 + [1] * 30 + [2])  # class 2 is missing from about a third of the resamples
    rng = np.random.default_rng(0)
    ours = recall.bootstrap_examples(labels, noisy(labels, 0.2, (2,), rng), noisy(labels, 0.4, (2,), rng), 3, rng=0)
    assert ours.alphas.shape == (1_000, 2)
    assert int(ours.left_out) == np.isnan(ours.alphas).sum() == 0


def test_a_resample_on_which_alpha_is_undefined_is_counted():
    labels = np.array([0, 0, 1, 1])
    dense = np.array([[0, 0, 1, 0]])  # perfect whenever the last example is not drawn: about (3/4)^4
    ours = recall.bootstrap_examples(labels, dense, dense, 2, rng=0)
    undefined = np.isnan(ours.alphas).mean()
    assert undefined == int(ours.left_out) / 1_000
    assert 0.3 < undefined < 0.6
    assert np.isfinite([ours.low, ours.high, ours.standard_error]).all()


def test_the_basic_interval_removes_the_attenuation_that_few_examples_bring():
    """Replicates differ by seed only; with an endless test set alpha would be the ratio of the error rates."""
    rng = np.random.default_rng(0)
    labels = np.arange(4_000) % 5
    rates = 0.1 * (1 + labels / 4)
    wrong = rng.random((2, 20, labels.size)) < np.stack([rates, 2 * rates])[:, None]
    dense, pruned = np.where(wrong, (labels + 1) % 5, labels)
    truth = float(recall.null_intensification(1 - rates.mean(), 1 - 2 * rates.mean()))
    ours = recall.bootstrap_examples(labels, dense, pruned, 5, rng=1, resamples=300, level=0.99)
    assert ours.bias < 0
    assert ours.estimate < truth
    assert ours.low < truth < ours.high


def test_thirty_models_at_five_ratios_on_ten_thousand_examples_take_seconds():
    rng = np.random.default_rng(0)
    labels = np.arange(10_000) % 10
    dense, pruned = noisy(labels, 0.1, (30,), rng), noisy(labels, 0.2, (5, 30), rng)
    start = time.process_time()  # does not depend on other processes
    ours = recall.bootstrap_examples(labels, dense, pruned, 10, rng=0)
    assert time.process_time() - start < 20  # less than one on two idle cores
    assert ours.alphas.shape == (1_000, 5, 30)
    start = time.process_time()
    recall.bootstrap_models(ours.alphas[0], rng=0)
    assert time.process_time() - start < 10


# randomness and errors -------------------------------------------------------------------------------


def test_a_seed_repeats_itself_and_a_generator_moves_on():
    values = np.random.default_rng(0).normal(size=10)
    first, again, other = (recall.bootstrap_models(values, rng=seed, resamples=50).low for seed in (1, 1, 2))
    assert first == again != other
    generator = np.random.default_rng(1)
    moved = [float(recall.bootstrap_models(values, rng=generator, resamples=50).low) for _ in range(2)]
    assert moved[0] == first
    assert moved[0] != moved[1]
    assert recall.bootstrap_models(values, rng=np.random.SeedSequence(1), resamples=50).low == first


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall.bootstrap_models(1.0, rng=0), "values must have a models axis"),
        (
            lambda: recall.bootstrap_models([1.0, np.inf], rng=0),
            r"values must be finite or NaN, got inf at index \(1,\)",
        ),
        (lambda: recall.bootstrap_models([1.0, 2.0], rng=0, resamples=1), "resamples must be at least 2, got 1"),
        (lambda: recall.bootstrap_models([1.0, 2.0], rng=0, level=1.5), "level must lie strictly between 0 and 1"),
        (lambda: recall.bootstrap_examples([0, 2], [[0, 1]], [[0, 1]], 2, rng=0), "labels must lie in 0..1, got 2 at"),
        (
            lambda: recall.bootstrap_examples([0, 1], [[0, 1]] * 2, [[0, 1]] * 3, 2, rng=0),
            "shapes of dense and pruned do not match: dense_predictions",
        ),
        (
            lambda: recall.bootstrap_examples([0, 1], [0, 1], [0, 1], 2, rng=0),
            r"dense_predictions \(models, examples\)",
        ),
        (
            lambda: recall.bootstrap_examples([0, 1], [[0.5, 0.5]], [[0, 1]], 2, rng=0),
            "dense_predictions must be integers in 0..1, got dtype float64",
        ),
    ],
)
def test_samples_that_cannot_be_resampled_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
