"""The test of an even loss over the classes: worked-out cases, its false-positive rate and its power."""

import itertools

import numpy as np
import pytest
import scipy.stats

from jprune import recall
from jprune.recall.inference import evenness
from jprune.recall.inference.evenness import evenness_test


def test_two_classes_are_compared_by_welchs_t_test():
    # 6 of 10 and 2 of 10 lost: variances .24 / 9 and .16 / 9, so t^2 = .4^2 / (.4 / 9) = 3.6.
    labels = np.repeat([0, 1], 10)
    dense, after = np.ones((1, 20), bool), (np.arange(20) % 10 >= np.repeat([6, 2], 10))[None]
    found = evenness_test(labels, dense, after, 2)
    assert found.statistic == pytest.approx(3.6)
    lost = ~after[0]
    assert found.p_value == pytest.approx(scipy.stats.ttest_ind(lost[:10], lost[10:], equal_var=False).pvalue)


def test_the_permutations_have_the_mean_and_variance_of_all_assignments():
    losses, n = np.array([0.0, 1.0, 0.5, -1.0, 0.25, 0.0]), np.array([1.0, 2.0, 3.0])
    groups = np.repeat([0, 1, 2], [1, 2, 3])
    between = [
        (n * (np.bincount(groups, losses[list(order)]) / n - losses.mean()) ** 2).sum()
        for order in itertools.permutations(range(6))
    ]
    mean, variance = np.mean(between), np.var(between)
    wanted = scipy.stats.gamma.sf(1.5, mean**2 / variance, scale=variance / mean)
    assert evenness.permutation_p(1.5, losses, n) == pytest.approx(wanted)


def test_a_few_examples_without_variation_in_a_class_are_not_certain():
    # Class 0 loses all three examples and class 1 none: 2 of the 20 assignments are as uneven.
    labels = np.repeat([0, 1], 3)
    dense, after = np.ones((1, 6), bool), np.array([[0, 0, 0, 1, 1, 1]], bool)
    found = evenness_test(labels, dense, after, 2)
    assert found.statistic == np.inf
    assert 0.01 < found.p_value < 0.2


def test_an_equal_loss_is_not_rejected_and_no_loss_has_a_p_of_1():
    labels = np.repeat(np.arange(4), 50)
    dense, after = np.ones((1, 200), bool), (np.arange(200) % 50 >= 10)[None]
    assert evenness_test(labels, dense, after, 4).p_value == 1
    assert evenness_test(labels, dense, dense, 4).p_value == 1


def test_one_class_has_no_answer():
    found = evenness_test(np.zeros(9, int), np.ones((1, 9), bool), np.zeros((1, 9), bool), 1)
    assert np.isnan(found.p_value)
    assert found.reason == "fewer than two classes with two examples"


def test_classes_without_examples_change_nothing():
    labels = np.repeat([0, 1, 2], 40)
    dense, after = np.ones((1, 120), bool), (np.arange(120) % 40 >= 3 * labels)[None]
    one, two = evenness_test(labels, dense, after, 3), evenness_test(labels + 2, dense, after, 9)
    assert one == two


def ten_of_a_hundred(seed, models=1):
    """Ten badly hit classes of 100 with 20 examples each: 30% of their examples are lost, 5% of the others."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(100), 20)
    dense = rng.random((models, 2_000)) < 0.9
    common, own = rng.random(2_000), rng.random((models, 2_000))
    lost = np.where(rng.random((models, 2_000)) < 0.5, common, own) < np.where(labels < 10, 0.3, 0.05)
    return labels, dense, dense & ~lost


def test_ten_hit_classes_of_a_hundred_are_said_to_be_uneven_where_none_can_be_named():
    labels, dense, after = ten_of_a_hundred(0)
    wrong = (labels + 1) % 100
    audit = recall.audit(labels, np.where(dense, labels, wrong), {10: np.where(after, labels, wrong)})
    assert audit.classes["p_holm"].min() >= 0.01
    (row,) = audit.tests[audit.tests["question"] == "evenness"].to_dict("records")
    assert (row["test"], row["score"], row["ratio"]) == ("anova", "pruned", 10)
    assert row["p"] == evenness_test(labels, dense, after, 100).p_value < 0.01
    said = f"The loss is not even over the classes (p = {row['p']:.4f}), but no single class can be named."
    assert said in audit.headline
    assert "No single class is shown" not in audit.headline
    assert said in audit.to_json()


def noisy(classes, size, models, seed):
    """Two noisy copies of models of unequal classes: weak classes flip more, both ways, and nothing is lost."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), size)
    skill, hard = np.linspace(0.6, 0.98, classes)[labels], rng.random(labels.size)
    one, two = (np.clip(hard + 0.15 * rng.standard_normal((models, labels.size)), 0, 1) < skill for _ in range(2))
    return labels, one, two


def shared(classes, size, models, seed):
    """Nine in ten lost examples are lost by all models, and no class loses more than another."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), size)
    dense = rng.random((models, labels.size)) < 0.95
    lost = (rng.random(labels.size) < 0.09) | (rng.random((models, labels.size)) < 0.01)
    return labels, dense, dense & ~lost


def seeds(classes, size, models, seed):
    """Every model loses other classes most, and over training seeds no class loses more than another."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), size)
    rate = np.clip(0.1 + 0.1 * rng.standard_normal((models, classes)), 0, 1)[:, labels]
    dense = np.ones(rate.shape, bool)
    return labels, dense, rng.random(rate.shape) >= rate


@pytest.mark.slow
@pytest.mark.parametrize("models", [1, 2, 3, 10])
@pytest.mark.parametrize(("classes", "size"), [(2, 90), (10, 90), (100, 20)])
@pytest.mark.parametrize("make", [noisy, shared, seeds])
def test_an_even_loss_is_rejected_in_few_audits(make, classes, size, models):
    if make is seeds and models == 1:
        pytest.skip("one model does not show what other seeds would do")
    rejected = sum(evenness_test(*make(classes, size, models, [7, i]), classes).p_value < 0.05 for i in range(200))
    assert rejected <= 20  # binomial with 200 draws at .05: more than 20 in 1 of 1,000


@pytest.mark.slow
@pytest.mark.parametrize("models", [1, 2, 3, 10])
def test_ten_hit_classes_of_a_hundred_are_found_in_nearly_all_audits(models):
    found = [evenness_test(*ten_of_a_hundred(i, models), 100).p_value < 0.01 for i in range(200)]
    assert np.mean(found) >= 0.95
