import hypothesis.extra.numpy as hnp
import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import recall

few = settings(max_examples=50)
shapes = st.tuples(st.integers(1, 7), st.just(12))
stacks = shapes.flatmap(lambda shape: hnp.arrays(np.int64, shape, elements=st.integers(0, 3)))


@few
@given(stacks)
def test_the_modal_label_is_scipys_mode(predictions):
    np.testing.assert_array_equal(recall.modal_label(predictions), scipy.stats.mode(predictions, axis=0).mode)


def test_exemplars_are_examples_whose_majority_prediction_changed():
    found = recall.exemplars([[0, 1, 2], [0, 1, 2], [1, 1, 0]], [[1, 1, 2], [0, 1, 1], [1, 0, 2]])
    assert found.exemplar.tolist() == [True, False, False]
    assert found.dense_label.tolist() == [0, 1, 2]
    assert found.pruned_label.tolist() == [1, 1, 2]


def test_a_tie_goes_to_the_smallest_class():
    assert recall.exemplars([[2], [1]], [[1]]).exemplar.tolist() == [False]


@few
@given(stacks, stacks)
def test_taxicab_distance_is_between_the_distributions_of_the_votes(dense, pruned):
    expected = np.zeros(12)
    for c in range(4):
        expected += np.abs((dense == c).mean(0) - (pruned == c).mean(0))
    distance = recall.taxicab_distance(dense, pruned)
    np.testing.assert_allclose(distance, expected, atol=1e-12)
    np.testing.assert_array_equal(distance, recall.taxicab_distance(pruned, dense))


@few
@given(stacks)
def test_the_same_votes_are_exactly_no_distance_apart_however_often_they_are_repeated(predictions):
    assert (recall.taxicab_distance(predictions, np.tile(predictions, (3, 1))) == 0).all()


@pytest.mark.parametrize("measure", [recall.exemplars, recall.taxicab_distance])
@pytest.mark.parametrize(
    ("dense", "pruned", "message"),
    [
        ([[0, 1]], [[0, 1, 1]], "dense_predictions have 2 examples, pruned_predictions 3"),
        ([0, 1], [[0, 1]], r"dense_predictions must be integers of shape \(models, examples\), got int64 \(2,\)"),
        ([[0, 1]], [[0.2, 0.8]], "pruned_predictions must be integers .* got float64"),
        (np.zeros((0, 2), int), [[0, 1]], r"got int64 \(0, 2\)"),
    ],
)
def test_invalid_stacks_of_predictions_are_refused(measure, dense, pruned, message):
    with pytest.raises(ValueError, match=message):
        measure(dense, pruned)


def test_no_examples_have_no_labels():
    none = np.zeros((3, 0), int)
    assert recall.modal_label(none).shape == recall.exemplars(none, none).exemplar.shape == (0,)
