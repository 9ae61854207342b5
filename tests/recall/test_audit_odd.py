"""Unusual audits have a defined result and the notes that a reader needs."""

import numpy as np
import pytest

from jprune import recall
from jprune.recall import EmptyClassWarning, InputError
from tests.recall import study
from tests.recall.study import CLASSES, predictions, row


@pytest.fixture
def data():
    return study.data()


def test_a_class_without_examples_is_left_out_and_named(data):
    labels, dense, pruned = data
    names = ["ant", "bee", "cat", "dog", "elk"]
    with pytest.warns(EmptyClassWarning, match="elk"):
        report = recall.audit(labels, dense, pruned["magnitude"], class_names=names)
    whole = recall.audit(labels, dense, pruned["magnitude"])
    np.testing.assert_allclose(report.alphas["alpha"], whole.alphas["alpha"])
    assert np.isnan(row(report.classes, ratio=10.0, **{"class": "elk"})["recall"])
    assert any("without test examples: elk" in warning for warning in report.warnings)
    numbers = report.summary[
        ["alpha", "alpha_low", "alpha_high", "alpha_seed", "accuracy_change", "cev", "lost", "won"]
    ]
    assert numbers.notna().all(axis=None)


def test_one_model_has_an_alpha_and_no_interval(data):
    labels, dense, pruned = data
    report = recall.audit(labels, dense[0], {10.0: pruned["magnitude"][10.0][0]})
    summary = report.summary.iloc[0]
    assert np.isfinite(summary["alpha"])
    assert np.isnan(summary[["alpha_sd", "alpha_low", "alpha_high"]].astype(float)).all()
    assert summary["alpha_mark"] == ""
    assert any("one model only" in warning for warning in report.warnings)


def test_a_perfect_dense_model_has_no_alpha_and_says_why(data):
    labels, dense, pruned = data
    perfect = dense.copy()
    perfect[2] = labels
    report = recall.audit(labels, perfect, {10.0: pruned["magnitude"][10.0]})
    of_model = row(report.alphas, model=2)
    assert np.isnan(of_model["alpha"])
    assert of_model["reason"] == "the dense model is perfect"
    assert report.summary["alpha_models"].tolist() == [4]
    assert np.isfinite(report.summary["alpha"]).all()
    assert any("undefined for 1 of 5 models: the dense model is perfect" in warning for warning in report.warnings)


def test_a_model_that_predicts_one_class_is_named_and_counted(data):
    labels, dense, pruned = data
    collapsed = pruned["magnitude"][10.0].copy()
    collapsed[1] = 3
    report = recall.audit(labels, dense, {10.0: collapsed})
    assert np.isfinite(report.alphas["alpha"]).all()
    assert any("1 of 5 models predicts class 3 for every example" in warning for warning in report.warnings)


def test_warnings_name_copies_unequal_classes_few_models_and_the_missing_control(data):
    labels, dense, pruned = data
    few = labels.copy()
    few[:40] = 1
    copies = dense[[0, 1, 1]]
    warnings = " ".join(recall.audit(few, copies, {2.0: pruned["magnitude"][2.0][:3]}).warnings)
    assert "dense: models 1 and 2 made identical predictions" in warnings
    assert "between 10 and 90 test examples" in warnings
    assert "fewer than five models" in warnings
    assert "no control" in warnings


def test_a_sound_audit_has_no_warning(data):
    labels, dense, _ = data
    rng = np.random.default_rng(1)
    control, pruned = predictions(rng, labels, 0.04), predictions(rng, labels, 0.1)
    assert recall.audit(labels, dense, {1: control, 4: pruned}).warnings == ()


def test_a_model_that_only_mistakes_classes_for_one_another_is_not_said_to_predict_one_class(data):
    labels, dense, pruned = data
    turned = pruned["magnitude"][10.0].copy()
    turned[1] = np.where(labels == 0, 0, 1 + labels % (CLASSES - 1))  # class 0 right, of the others none
    report = recall.audit(labels, dense, {10.0: turned})
    assert not any("predict one class" in warning for warning in report.warnings)
    collapsed = np.where(np.arange(len(turned))[:, None] == 1, 0, turned)
    assert any(
        "1 of 5 models predicts class 0 for" in w for w in recall.audit(labels, dense, {10.0: collapsed}).warnings
    )


def test_unpaired_models_that_are_all_right_about_a_class_have_a_change_of_zero_without_a_warning(data):
    labels, dense, pruned = data
    stacks = [np.where(labels == 2, 2, stack) for stack in (dense, pruned["magnitude"][10.0][:3])]
    report = recall.audit(labels, stacks[0], {10.0: stacks[1]}, paired=False)
    change = row(report.classes, **{"class": "2"})
    assert change[["recall_dense", "recall", "change", "lost", "won"]].tolist() == [1, 1, 0, 0, 0]
    assert change["change_low"] < 0 < change["change_high"]  # a few examples do not show that none would be lost


def test_audits_that_are_not_compared_give_a_table_without_rows(data):
    labels, dense, pruned = data
    one = recall.audit(labels, dense, pruned["magnitude"])
    for table in (recall.compare({"one": one}), recall.compare({"one": one, "two": one}, [])):
        assert len(table) == 0
        assert list(table.columns) == ["audit", "other_audit", *one.tests.columns]


def test_labels_with_gaps_name_the_classes_between_and_leave_them_out():
    dense, pruned = np.array([[0, 0, 5, 0, 7, 7]]), np.array([[0, 5, 5, 5, 7, 0]])
    with pytest.warns(EmptyClassWarning, match="classes without test examples: 1, 2, 3, 4, 6"):
        report = recall.audit([0, 0, 5, 5, 7, 7], dense, {2: pruned})
    r, t = np.array([1, 0.5, 1]), np.array([0.5, 1, 0.5])  # of classes 0, 5 and 7
    x, y = r / r.mean() - 1, t / t.mean() - 1
    assert report.alphas["alpha"].iloc[0] == pytest.approx((x @ y) / (x @ x))
    assert report.classes.loc[report.classes["support"] > 0, "class"].tolist() == ["0", "5", "7"]


def test_correct_counts_of_a_class_without_examples_leave_it_out():
    with pytest.warns(EmptyClassWarning, match="class without test examples: 1"):
        report = recall.audit_counts([[9, 0, 7]], {2: [[8, 0, 7]]}, support=[10, 0, 10])
    r, t = np.array([0.9, 0.7]), np.array([0.8, 0.7])
    x, y = r / r.mean() - 1, t / t.mean() - 1
    assert report.alphas["alpha"].iloc[0] == pytest.approx((x @ y) / (x @ x), abs=1e-12)


def test_names_in_an_array_are_refused_with_what_to_give():
    with pytest.raises(InputError, match="labels contains class names, dense contains numbers: pass class_names"):
        recall.audit(np.array(["cat", "dog"]), np.array([[0, 1]]), {2: np.array([[0, 1]])})


def test_correct_counts_of_one_class_alone_are_not_said_to_be_predictions_of_it():
    report = recall.audit_counts([[9, 8, 7], [8, 8, 9]], {2: [[0, 10, 0], [9, 9, 9]]}, support=[10, 10, 10])
    assert "pruned at 2: 1 of 2 models is right about one class and no other" in report.warnings


def test_counts_of_a_class_that_lost_as_much_as_it_won_have_a_change_of_exactly_0():
    of_class = np.array([[8, 7, 6, 4, 5, 3, 3], [5, 3, 7, 6, 8, 4, 3]])
    dense, after = np.stack([of_class, np.full((2, 7), 8)], -1)
    for paired in (True, False):
        report = recall.audit_counts(dense, {2: after}, support=[10, 10], paired=paired)
        assert report.classes["change"].tolist() == [0, 0]
        assert report.summary["accuracy_change"].item() == 0


def test_a_dense_model_at_chance_is_left_out_of_alpha_between_seeds(data):
    labels, dense, pruned = data
    chance = [*dense, np.zeros_like(labels)]
    report = recall.audit(labels, chance, {10: pruned["magnitude"][10.0]}, paired=False)
    expected = recall.audit(labels, dense, {10: pruned["magnitude"][10.0]}, paired=False)
    columns = ["alpha_seed", "alpha_seed_low", "alpha_seed_high"]
    assert report.summary[columns].equals(expected.summary[columns])
    (said,) = set(report.warnings) - set(expected.warnings)
    assert said.startswith("1 of 6 dense models is at chance: accuracy, classes and alpha include it,")
