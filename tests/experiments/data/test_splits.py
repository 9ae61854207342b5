import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.data import splits


def rng():
    return np.random.default_rng(0)


@given(st.lists(st.integers(0, 4), min_size=1, max_size=60), st.floats(0.05, 0.95), st.integers(0, 9))
def test_stratified_splits_every_class_and_loses_nothing(labels, fraction, seed):
    labels = np.array(labels)
    first, second = splits.stratified(labels, fraction, np.random.default_rng(seed))
    assert sorted([*first, *second]) == list(range(len(labels)))
    for c in range(5):
        assert (labels[second] == c).sum() == round(fraction * (labels == c).sum())


def test_stratified_depends_on_the_generator_alone():
    labels = np.arange(100) % 10
    one, two = (splits.stratified(labels, 0.3, rng())[1] for _ in range(2))
    np.testing.assert_array_equal(one, two)
    assert (one != splits.stratified(labels, 0.3, np.random.default_rng(1))[1]).any()


def test_long_tail_of_cifar10_has_the_published_counts():
    """Imbalance 100 as in Cui et al. (2019) and every long-tailed CIFAR-10 since."""
    labels = np.repeat(np.arange(10), 5000)
    kept = splits.long_tailed(labels, 10, 100.0, rng())
    assert np.bincount(labels[kept]).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]


def test_long_tail_of_unequal_classes_keeps_the_profile():
    """The 20 examples of class 1 limit class 0 to 20 * 2, since 4^(1/2) = 2."""
    labels = np.repeat(np.arange(3), [100, 20, 100])
    kept = splits.long_tailed(labels, 3, 4.0, rng())
    assert np.bincount(labels[kept]).tolist() == [40, 20, 10]


@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.floats(1, 200))
def test_long_tail_never_rises_and_never_exceeds_a_class(sizes, imbalance):
    labels = np.repeat(np.arange(len(sizes)), sizes)
    kept = splits.long_tailed(labels, len(sizes), imbalance, rng())
    counts = np.bincount(labels[kept], minlength=len(sizes))
    assert (np.diff(counts) <= 0).all()
    assert (counts >= 1).all()
    assert (counts <= sizes).all()
    assert len(np.unique(kept)) == len(kept)


@pytest.mark.parametrize("call", [
    lambda: splits.stratified(np.zeros(3, int), 1.0, rng()),
    lambda: splits.long_tailed(np.zeros(3, int), 2, 0.5, rng()),
    lambda: splits.long_tailed(np.zeros(3, int), 1, 2.0, rng()),
])  # fmt: skip
def test_invalid_splits_are_refused(call):
    with pytest.raises(ValueError, match="must"):
        call()
