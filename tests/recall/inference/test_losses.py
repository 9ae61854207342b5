"""Lost and won examples: McNemar and Wilson against statsmodels, and how often a class is named where none differs."""

import itertools
import time

import numpy as np
import pytest
import scipy.stats
import statsmodels.stats.contingency_tables
import statsmodels.stats.proportion

from jprune.recall.inference.evenness import evenness_test
from jprune.recall.inference.losses import _joint, _likely, change_of_all, class_losses, mcnemar, wilson


@pytest.mark.parametrize(("lost", "won"), [(8, 1), (3, 3), (0, 5), (40, 22), (1, 0)])
def test_the_mid_p_is_the_exact_p_less_the_probability_of_the_table(lost, won):
    exact = statsmodels.stats.contingency_tables.mcnemar([[50, lost], [won, 9]], exact=True).pvalue
    if lost == won:
        assert mcnemar(lost, won) == pytest.approx(1)
    else:
        assert mcnemar(lost, won) == pytest.approx(exact - scipy.stats.binom.pmf(min(lost, won), lost + won, 0.5))


def test_no_changed_example_has_a_p_of_1():
    assert mcnemar(0, 0) == 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 30), (11, 30), (30, 30), (1, 1)])
def test_wilsons_interval_is_that_of_statsmodels(successes, trials):
    wanted = statsmodels.stats.proportion.proportion_confint(successes, trials, 0.05, method="wilson")
    np.testing.assert_allclose(wilson(successes, trials, 0.95), wanted, atol=1e-12)
    assert np.isnan(wilson(0, 0)).all()


def test_the_p_of_one_pair_is_that_of_every_possible_choice_of_the_classes_examples():
    labels = np.array([0, 0, 0, 1, 1, 1, 1, 1, 1])
    dense = np.array([[1, 1, 1, 1, 0, 0, 1, 1, 1]], bool)
    after = np.array([[0, 0, 1, 0, 1, 0, 1, 1, 1]], bool)
    net = (dense & ~after).astype(int)[0] - (~dense & after).astype(int)[0]
    sums = np.array([net[list(chosen)].sum() for chosen in itertools.combinations(range(9), 3)])
    seen = net[labels == 0].sum()
    exact = min(1, 2 * min((sums >= seen).mean(), (sums <= seen).mean()))
    found = class_losses(labels, dense, after, 2)
    z = 2 * scipy.stats.norm.sf(abs(found.excess[0]) / (found.excess_high[0] - found.excess[0]))
    assert found.p[0] >= exact - 1e-12
    assert found.p[0] == pytest.approx(exact) or found.p[0] > z
    assert (found.lost.tolist(), found.won.tolist()) == ([2, 1], [0, 1])
    np.testing.assert_allclose(found.change, [-2 / 3, 0])
    np.testing.assert_allclose(found.excess, [2 / 3 - 2 / 9, -2 / 9])


def test_the_p_of_one_pair_of_large_classes_takes_no_minutes():
    """With a call of scipy's distribution for each of a million cells it took 40 s."""
    labels, place = np.repeat([0, 1], 2000), np.tile(np.arange(2000), 2)
    dense, after = place >= 500, (place < 500) | (place >= 1000)
    after[(labels == 0) & (place < 60)] = False  # 60 more of class 0 are lost
    start = time.process_time()
    found = class_losses(labels, dense[None], after[None], 2)
    assert time.process_time() - start < 5
    assert (found.lost.tolist(), found.won.tolist()) == ([500, 500], [440, 500])
    draws = np.random.default_rng(0).multivariate_hypergeometric([1000, 940, 2060], 2000, size=200_000)
    tail = np.mean(draws[:, 0] - draws[:, 1] >= 60)
    assert found.p[0] == pytest.approx(2 * tail, rel=0.05)


@pytest.mark.parametrize(("size", "lost", "won", "every"), [(3, 3, 1, 9), (9, 4, 5, 9), (5, 0, 0, 9), (4, 9, 0, 9)])
def test_lost_and_won_examples_of_a_class_are_a_draw_without_replacement(size, lost, won, every):
    i, j = _likely(size, every, lost), _likely(size, every, won)
    numbers = lost, won, every - lost - won
    for (a, b), found in np.ndenumerate(_joint(size, numbers, i, j)):
        drawn = (i[a], j[b], size - i[a] - j[b])
        wanted = scipy.stats.multivariate_hypergeom.pmf(drawn, numbers, size)
        assert found == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("size", "number", "every"), [(1, 1, 10**6), (500, 5000, 10**5), (2000, 100, 5000), (10**5, 10**5, 10**6)]
)
def test_counts_that_are_left_out_of_an_exact_test_are_impossible_in_practice(size, number, every):
    counts, drawn = _likely(size, every, number), scipy.stats.hypergeom(every, number, size)
    assert drawn.sf(counts[-1]) + drawn.cdf(counts[0] - 1) < 1e-25


@pytest.mark.parametrize(("lost", "won"), [(45, 5), (5, 40)])
def test_a_class_that_loses_the_detectable_excess_has_the_statistic_that_it_was_computed_for(lost, won):
    classes, size = 50, 100  # many classes, so that one hardly changes the variance of all
    place = np.tile(np.arange(size), classes)
    dense, after = place < size - won, (place >= lost) & (place < size)
    labels = np.repeat(np.arange(classes), size)
    found = class_losses(labels, dense[None], after[None], classes)
    more = round(found.detectable[0] / (1 - 1 / classes) * size)
    after[(labels == 0) & (place >= lost) & (place < lost + more)] = False
    worse = class_losses(labels, dense[None], after[None], classes)
    error = (worse.excess_high - worse.excess)[0] / scipy.stats.t.isf(0.005, size)
    wanted = scipy.stats.norm.isf(0.005 / classes) + scipy.stats.norm.isf(0.1)
    assert worse.excess[0] / error == pytest.approx(wanted, rel=0.08)


def test_unpaired_models_lose_what_pairs_of_them_lose_on_average():
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1], 30)
    dense, after = rng.random((3, 60)) < 0.9, rng.random((2, 60)) < 0.6
    lost = np.mean([[(d & ~a)[labels == c].sum() for c in (0, 1)] for d in dense for a in after], axis=0)
    np.testing.assert_allclose(class_losses(labels, dense, after, 2, paired=False).lost, lost)


@pytest.mark.parametrize("paired", [True, False])
def test_a_class_that_lost_as_much_as_it_won_did_not_change(paired):
    """Means over seven models are rounded, and a change of -1e-17 would be listed among the losses."""
    labels = np.repeat([0, 1], 10)
    dense, after = np.ones((2, 7, 20), bool)
    after[:2, 0], dense[2, 1], dense[3, 2], after[:, 15] = False, False, False, False
    assert class_losses(labels, dense, after, 2, paired=paired).change.tolist() == [0, -0.1]


@pytest.mark.slow
@pytest.mark.parametrize("models", [1, 10, 30])
@pytest.mark.parametrize(("classes", "size"), [(10, 90), (50, 20)])
def test_a_class_is_named_in_few_audits_where_no_class_differs(models, classes, size):
    rng = np.random.default_rng([models, classes])
    labels, named = np.repeat(np.arange(classes), size), 0
    for _ in range(200):
        dense = rng.random((models, labels.size)) < 0.95
        common, own = rng.random(labels.size) < 0.09, rng.random((models, labels.size)) < 0.01
        found = class_losses(labels, dense, dense & ~common & ~own, classes, level=0.95)
        named += bool(np.nanmin(found.p_holm) < 0.05)
    assert named / 200 <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize("models", [2, 3, 10])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_class_that_differs_between_seeds_is_not_named_for_it(classes, models):
    rng = np.random.default_rng([models, classes])
    labels, named = np.repeat(np.arange(classes), 90), 0
    for _ in range(200):
        dense = rng.random((models, labels.size)) < 0.95
        of_seed = np.clip(0.2 + 0.1 * rng.standard_normal((models, classes)), 0, 1)[:, labels]
        common, own = rng.random(labels.size), rng.random((models, labels.size))
        lost = np.where(rng.random((models, labels.size)) < 0.5, common, own) < of_seed
        found = class_losses(labels, dense, dense & ~lost, classes, level=0.95)
        named += bool(np.nanmin(found.p_holm) < 0.05)
    assert named / 200 <= 0.08


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "recalls", "seeds", "models"),
    [([20, 1000], [0.9, 0.9], [0.04, 0.04], 2), ([200, 200], [0.97, 0.6], [0.01, 0.055], 3)],
    ids=["large classes among small ones", "weak classes among strong ones"],
)
def test_classes_that_differ_most_between_seeds_are_not_named_for_it(sizes, recalls, seeds, models):
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(10), np.repeat(sizes, 5))
    each, sd = np.repeat(recalls, 5), np.repeat(seeds, 5)
    named = 0
    for _ in range(200):
        dense, after = (
            rng.random((models, labels.size)) < np.clip(each + sd * rng.normal(size=(models, 10)), 0, 1)[:, labels]
            for _ in range(2)
        )
        named += bool(class_losses(labels, dense, after, 10).p_holm.min() < 0.05)
    assert named <= 10


@pytest.mark.parametrize("models", [3, 5])
def test_one_weak_class_among_strong_ones_is_not_named_for_the_seeds(models):
    """What a seed adds to the logits moves the recall of a weak class most: its variance is far above the mean."""
    rng, labels = np.random.default_rng(models), np.repeat(np.arange(10), 500)
    logit = np.log(np.array([0.6, *[0.97] * 9]) / (1 - np.array([0.6, *[0.97] * 9])))
    p = []
    for _ in range(300):
        moved = 1 / (1 + np.exp(-logit - 0.25 * rng.normal(size=(2, models, 10))))
        dense, after = rng.random((2, models, labels.size), np.float32) < moved[:, :, labels]
        p.append(class_losses(labels, dense, after, 10).p)
    shown = np.array(p) < 0.01
    assert shown[:, 0].sum() <= 8  # 3 are expected
    assert shown[:, 1:].mean() <= 0.01


@pytest.mark.parametrize("models", [1, 10])
def test_intervals_of_the_excess_cover(models):
    rng = np.random.default_rng(models)
    labels, covered = np.repeat(np.arange(10), 90), []
    rate = np.where(labels == 8, 0.4, 0.1)
    for _ in range(200):
        dense = rng.random((models, labels.size)) < 0.95
        gone = rng.random(labels.size) < 0.7 * rate
        own = rng.random((models, labels.size)) < 0.3 * rate
        found = class_losses(labels, dense, dense & ~gone & ~own, 10, level=0.95)
        lost = 0.95 * (1 - (1 - 0.7 * rate) * (1 - 0.3 * rate))
        wanted = lost[labels == 8][0] - lost.mean()
        covered.append(found.excess_low[8] <= wanted <= found.excess_high[8])
    assert np.mean(covered) >= 0.9


@pytest.mark.parametrize("models", [2, 3, 5])
def test_a_change_of_accuracy_is_shown_as_rarely_as_its_level_says_if_seeds_differ(models):
    rng = np.random.default_rng(models)
    p = [
        change_of_all(
            rng.random((models, 500)) < 0.85, rng.random((models, 500)) < 0.85 + rng.normal(0, 0.03, (models, 1))
        )
        for _ in range(400)
    ]
    assert 0.02 <= np.mean(np.array(p) < 0.05) <= 0.09  # three standard errors of 400 draws around .05


def test_two_models_that_lose_as_many_examples_by_chance_do_not_show_a_change_of_accuracy():
    rng, dense = np.random.default_rng(0), np.ones((2, 60), bool)
    changes = rng.random((400, 2, 60)) < 0.8
    assert np.mean([change_of_all(changes[i], changes[i - 1]) < 0.01 for i in range(400)]) <= 0.02
    assert change_of_all(dense, np.arange(60) // 5 != np.array([[0], [1]])) > 0.02  # each lost 5, which is exact to 1/2


def test_the_p_of_a_change_of_accuracy_is_that_of_a_paired_t_test_where_only_models_vary():
    dense = np.ones((4, 60), bool)
    after = np.stack([np.arange(60) % 20 >= lost for lost in (1, 2, 2, 4)])
    found = change_of_all(dense, np.stack([np.roll(row, 5 * m) for m, row in enumerate(after)]))
    assert found >= scipy.stats.ttest_1samp(after.mean(1) - 1, 0).pvalue - 1e-12


def unpaired(rng, dense_models, models):
    """Labels, one dense accuracy for all, and compressed models whose recalls differ between seeds around it."""
    labels = np.repeat(np.arange(10), 100)
    recall = np.clip(0.9 + rng.normal(0, 0.05, (models, 10)) + rng.normal(0, 0.03, (models, 1)), 0, 1)
    return labels, rng.random((dense_models, 1000)) < 0.9, rng.random((models, 1000)) < recall[:, labels]


@pytest.mark.parametrize(("dense_models", "models"), [(1, 3), (1, 10), (3, 3)])
def test_unpaired_models_that_differ_between_seeds_show_no_loss(dense_models, models):
    rng, shown = np.random.default_rng([dense_models, models]), np.zeros(4)
    for _ in range(100):
        labels, dense, after = unpaired(rng, dense_models, models)
        found = class_losses(labels, dense, after, 10, paired=False)
        outside = ((found.change_low > 0) | (found.change_high < 0)).mean()
        p = change_of_all(dense, after, paired=False), evenness_test(labels, dense, after, 10, paired=False).p_value
        shown += [np.nanmin(found.p_holm) < 0.01, p[0] < 0.01, p[1] < 0.01, outside]
    assert (shown <= 4).all()


@pytest.mark.parametrize("models", [2, 3, 5])
def test_intervals_of_a_class_cover_if_seeds_differ(models):
    rng, missed = np.random.default_rng(models), []
    labels = np.repeat(np.arange(10), 100)
    for _ in range(60):
        recall = np.clip(0.85 + rng.normal(0, 0.05, (models, 10)) + rng.normal(0, 0.02, (models, 1)), 0, 1)
        dense, after = rng.random((models, 1000)) < 0.85, rng.random((models, 1000)) < recall[:, labels]
        found = class_losses(labels, dense, after, 10)
        missed.append(((found.change_low > 0) | (found.change_high < 0)).mean())
    assert np.mean(missed) <= (0.04 if models == 2 else 0.02)


@pytest.mark.parametrize("models", [3, 5])
def test_the_interval_of_a_class_that_alone_varies_between_seeds_covers(models):
    rng, missed = np.random.default_rng(models), []
    labels = np.repeat(np.arange(10), 500)
    for _ in range(120):
        recall = np.full((models, 10), 0.8)
        recall[:, 3] = np.clip(0.8 + rng.normal(0, 0.1, models), 0, 1)
        dense, after = rng.random((models, 5000)) < 0.8, rng.random((models, 5000)) < recall[:, labels]
        found = class_losses(labels, dense, after, 10)
        missed.append(found.change_low[3] > 0 or found.change_high[3] < 0)
    assert np.mean(missed) <= 0.04


def test_the_p_of_a_large_change_is_not_cut_off():
    p = []
    for lost in (0.02, 0.05):
        after = np.tile(np.arange(2000) % 100 >= 100 * lost, (40, 1))
        after[np.arange(40), np.arange(40)] ^= True
        p.append(change_of_all(np.ones((40, 2000), bool), after))
    assert 1e-300 < p[1] < 1e-17 < p[0] < 1e-4
