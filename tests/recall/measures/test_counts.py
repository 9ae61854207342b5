import time

import hypothesis.extra.numpy as hnp
import jax
import jax.export
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import sklearn.metrics
from fairlearn.metrics import false_negative_rate, false_positive_rate
from hypothesis import given, settings
from hypothesis import strategies as st

from jprune import recall

few = settings(max_examples=30)  # every new shape compiles


@st.composite
def classified(draw, models=(1, 3)):
    """(labels, predictions (models, examples), num_classes) in which every class has an example."""
    classes, extra, stack = (draw(st.sampled_from(sizes)) for sizes in ((2, 5), (0, 20), models))
    number = st.integers(0, classes - 1)
    labels = np.concatenate([np.arange(classes), draw(hnp.arrays(np.int64, extra, elements=number))])
    return labels, draw(hnp.arrays(np.int64, (stack, len(labels)), elements=number)), classes


@few
@given(classified())
def test_counts_are_the_confusion_matrix_of_every_model(case):
    labels, predictions, classes = case
    counted = recall.counts(labels, predictions, classes)
    assert counted.dtype == jnp.int32
    for model, predicted in zip(np.asarray(counted), predictions, strict=True):
        expected = sklearn.metrics.confusion_matrix(labels, predicted, labels=range(classes))
        np.testing.assert_array_equal(model, expected)


def test_leading_axes_are_models_and_one_model_needs_none():
    labels, predictions = np.array([0, 1, 2]), np.array([[[0, 1, 1], [2, 1, 0]]])
    stacked = recall.counts(labels, predictions, 3)
    assert stacked.shape == (1, 2, 3, 3)
    np.testing.assert_array_equal(recall.counts(labels, predictions[0, 1], 3), stacked[0, 1])
    np.testing.assert_array_equal(stacked[0, 1], [[0, 0, 1], [0, 1, 0], [1, 0, 0]])


def test_the_true_class_is_on_the_rows():
    np.testing.assert_array_equal(recall.counts([0, 0, 1], [1, 1, 1], 2), [[0, 2], [0, 1]])


@few
@given(classified(), st.sampled_from((0, 1, 25)))
def test_counts_of_batches_add_up(case, cut):
    labels, predictions, classes = case
    first = recall.counts(labels[:cut], predictions[:, :cut], classes)
    second = recall.counts(labels[cut:], predictions[:, cut:], classes)
    np.testing.assert_array_equal(first + second, recall.counts(labels, predictions, classes))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
@pytest.mark.parametrize("library", [np.asarray, jnp.asarray])
def test_logits_count_as_their_largest_and_the_first_among_equals(dtype, library):
    logits = library(np.array([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0], [-np.inf, -1.0, -np.inf]], dtype))
    np.testing.assert_array_equal(recall.counts([1, 0, 2], logits, 3), [[1, 0, 0], [0, 1, 0], [0, 1, 0]])


def test_float64_logits_are_not_rounded_before_they_are_compared():
    np.testing.assert_array_equal(recall.counts([1], np.array([[1.0, 1.0 + 1e-12]]), 2), [[0, 0], [0, 1]])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32, np.uint32, np.int64, np.uint64])
def test_all_integer_dtypes_give_the_same_counts(dtype):
    labels, predictions = np.array([0, 1, 2], dtype), np.array([[0, 1, 1]], dtype)
    np.testing.assert_array_equal(recall.counts(labels, predictions, 1000).sum(), 3)
    np.testing.assert_array_equal(
        recall.counts(jnp.asarray(labels.astype(np.int8)), predictions, 3), [[[1, 0, 0], [0, 1, 0], [0, 1, 0]]]
    )


def test_binary_answers_may_be_booleans():
    np.testing.assert_array_equal(recall.counts([False, True, True], [True, True, False], 2), [[0, 1], [1, 1]])


def test_counts_run_inside_jit():
    counted = jax.jit(lambda labels, predictions: recall.counts(labels, predictions, 3))
    labels, predictions = jnp.array([0, 1, 2]), jnp.array([[0, 1, 1]])
    np.testing.assert_array_equal(counted(labels, predictions), recall.counts(labels, predictions, 3))


def test_an_example_out_of_range_is_counted_nowhere_inside_jit():
    counted = jax.jit(lambda labels, predictions: recall.counts(labels, predictions, 2))
    labels, predictions = jnp.array([0, -1, 1, 2, 1, 0]), jnp.array([0, 1, -1, 0, 2, 1])
    np.testing.assert_array_equal(counted(labels, predictions), [[1, 1], [0, 0]])


def test_an_example_whose_logits_hold_a_nan_is_counted_nowhere_inside_jit():
    counted = jax.jit(lambda labels, logits: recall.counts(labels, logits, 2))
    logits = jnp.array([[0.0, jnp.nan], [0.0, 1.0]])
    np.testing.assert_array_equal(counted(jnp.array([0, 1]), logits), [[0, 0], [0, 1]])


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_counts_lower_for_every_platform(platform):
    counted = jax.jit(lambda labels, predictions: recall.counts(labels, predictions, 10))
    shapes = jax.ShapeDtypeStruct((50,), jnp.int32), jax.ShapeDtypeStruct((3, 50), jnp.int32)
    assert jax.export.export(counted, platforms=[platform])(*shapes).out_avals[0].shape == (3, 10, 10)


@pytest.mark.parametrize(
    ("labels", "predictions", "classes", "message"),
    [
        ([0, 3, 1], [0, 1, 1], 3, r"labels must lie in 0\.\.2, got 3 at index 1"),
        ([0, 1], [[0, 1], [0, -1]], 2, r"predictions must lie in 0\.\.1, got -1 at index \(1, 1\)"),
        ([0, 2**32], [0, 1], 2, r"labels must lie in 0\.\.1, got 4294967296 at index 1"),
        ([0, 1], [[0.1, 0.2], [np.nan, 0.3]], 2, r"predictions must not be NaN, got nan at index \(1, 0\)"),
        ([0, 1], [0, 1, 1], 2, r"integer predictions must have shape .* ending in \(2,\).* got \(3,\)"),
        ([0, 1], [0.5, 0.5], 2, r"logits \(float predictions\) must have shape .* ending in \(2, 2\).* got \(2,\)"),
        ([0, 1], [[[0.5, 0.5, 0.5]] * 2], 2, r"ending in \(2, 2\) .* got \(1, 2, 3\)"),
        ([[0, 1]], [[0, 1]], 2, r"labels must have shape \(examples,\), got \(1, 2\)"),
        ([0.0, 1.0], [0, 1], 2, r"labels must be integers in 0\.\.1, got dtype float64"),
        (["cat", "dog"], [0, 1], 2, r"labels must be integers, got dtype <U3"),
        ([0, 1], ["cat", "dog"], 2, r"predictions must be integers or logits, got dtype <U3"),
        ([0], [0], 0, r"num_classes must lie in 1\.\.46340 .*, got 0"),
    ],
)
@pytest.mark.parametrize("library", [np.asarray, lambda x: x])
def test_values_that_are_not_classes_are_refused_with_their_index_and_value(
    labels, predictions, classes, message, library
):
    with pytest.raises(ValueError, match=message):
        recall.counts(library(labels), library(predictions), classes)


def test_jax_arrays_are_refused_in_the_same_way():
    with pytest.raises(ValueError, match=r"predictions must lie in 0\.\.1, got 2 at index \(0, 1\)"):
        recall.counts(jnp.array([0, 1]), jnp.array([[0, 2]]), 2)
    with pytest.raises(ValueError, match=r"must not be NaN, got nan at index \(0, 1\)"):
        recall.counts(jnp.array([0]), jnp.array([[0.0, jnp.nan]]), 2)


def test_thirty_models_on_fifty_thousand_examples_of_a_thousand_classes_take_seconds():
    rng = np.random.default_rng(0)
    labels, predictions = rng.integers(1000, size=50_000), rng.integers(1000, size=(30, 50_000))
    recall.counts(labels, predictions, 1000).block_until_ready()
    start = time.process_time()  # of all threads; unlike the time on the clock, it does not depend on other processes
    counted = recall.counts(labels, predictions, 1000).block_until_ready()
    assert time.process_time() - start < 5  # a tenth of a second on idle cores
    expected = np.bincount(labels * 1000 + predictions[17], minlength=1_000_000).reshape(1000, 1000)
    np.testing.assert_array_equal(counted[17], expected)


# rates ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::jprune.recall.EmptyClassWarning")
@few
@given(classified())
def test_rates_agree_with_scikit_learn(case):
    labels, predictions, classes = case
    counted = recall.counts(labels, predictions, classes)
    options = {"average": None, "labels": range(classes)}
    for m, predicted in enumerate(predictions):
        np.testing.assert_allclose(
            recall.recall(counted)[m], sklearn.metrics.recall_score(labels, predicted, **options), rtol=1e-15
        )
        precision = sklearn.metrics.precision_score(labels, predicted, zero_division=np.nan, **options)
        np.testing.assert_allclose(recall.precision(counted)[m], precision, rtol=1e-15)
        np.testing.assert_allclose(
            recall.f1(counted)[m], sklearn.metrics.f1_score(labels, predicted, **options), rtol=1e-14
        )
        assert recall.accuracy(counted)[m] == sklearn.metrics.accuracy_score(labels, predicted)


@few
@given(classified(models=(1,)))
def test_error_rates_agree_with_fairlearn(case):
    labels, predictions, classes = case
    counted = recall.counts(labels, predictions[0], classes)
    for c in range(classes):
        of_class, said = (labels == c).astype(int), (predictions[0] == c).astype(int)
        assert recall.false_positive_rate(counted)[c] == pytest.approx(false_positive_rate(of_class, said, pos_label=1))
        assert recall.false_negative_rate(counted)[c] == pytest.approx(false_negative_rate(of_class, said, pos_label=1))


def test_rates_are_float64_and_support_integer():
    counted = recall.counts([0, 0, 1], [[0, 1, 1]], 2)
    assert {f(counted).dtype for f in (recall.recall, recall.precision, recall.f1, recall.accuracy)} == {
        np.dtype("float64")
    }
    np.testing.assert_array_equal(recall.support(counted), [[2, 1]])


def test_a_class_without_examples_is_nan_and_named_and_leaves_the_others_alone():
    counted = recall.counts([0, 0, 2, 2], [0, 1, 2, 2], 4)
    for measure, others in ((recall.recall, (0.5, 1.0)), (recall.f1, (2 / 3, 1.0))):
        with pytest.warns(recall.EmptyClassWarning, match=r"NaN for classes without examples: 1, 3; .*left out"):
            values = measure(counted)
        np.testing.assert_allclose(values, [others[0], np.nan, others[1], np.nan])
    assert recall.accuracy(counted) == 0.75


def test_a_class_that_only_some_models_never_predict_is_named_with_how_many():
    counted = recall.counts([0, 1, 1], [[0, 0, 0], [0, 1, 0]], 2)
    with pytest.warns(recall.EmptyClassWarning, match=r"precision is NaN for classes .*: 1 \(in 1 of 2 models\);"):
        values = recall.precision(counted)
    np.testing.assert_allclose(values, [[1 / 3, np.nan], [1 / 2, 1.0]])


def test_a_long_list_of_empty_classes_is_cut_short():
    with pytest.warns(recall.EmptyClassWarning, match=r": 1, 2, .*, 20 and 979 more;"):
        recall.recall(recall.counts([0], [0], 1000))


def test_a_model_that_predicts_one_class_has_recall_one_there_and_zero_elsewhere():
    counted = recall.counts([0, 1, 2, 2], [2, 2, 2, 2], 3)
    np.testing.assert_array_equal(recall.recall(counted), [0, 0, 1])
    np.testing.assert_allclose(recall.f1(counted), [0, 0, 2 / 3])
    assert recall.accuracy(counted) == 0.5


@pytest.mark.parametrize(
    ("counted", "message"),
    [
        ([[1, 2, 3], [4, 5, 6]], r"of shape \(\*models, classes, classes\).* of shape \(2, 3\)"),
        ([[0.5, 0.5], [0.5, 0.5]], "counts must be integers .* got float64"),
        ([[1, -2], [0, 1]], r"counts must not be negative, got -2 at index \(0, 1\)"),
        ([[[1, 0], [0, 1]], [[0, 0], [0, 0]]], r"counts of model \(1,\) contain no example"),
    ],
)
def test_invalid_counts_are_refused(counted, message):
    for measure in (recall.recall, recall.accuracy, recall.support):
        with pytest.raises(ValueError, match=message):
            measure(counted)
