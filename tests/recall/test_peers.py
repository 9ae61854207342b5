"""The class table and the tables of examples agree with fairlearn, scikit-learn and counts made by hand."""

import numpy as np
import pytest
import scipy.special
import sklearn.metrics
from fairlearn.metrics import MetricFrame, count

from jprune import recall
from tests.recall.study import row

CLASSES, EXAMPLES = 5, 400
NAMES = ("ant", "bee", "cat", "dog", "elk")


@pytest.fixture(scope="module")
def case():
    """Labels of unequal classes, logits of a dense and a compressed model, and a group of every example."""
    rng = np.random.default_rng(11)
    labels = rng.choice(CLASSES, EXAMPLES, p=[0.4, 0.3, 0.15, 0.1, 0.05])
    dense = 3 * np.eye(CLASSES)[labels] + rng.normal(size=(EXAMPLES, CLASSES))
    compressed = dense + 1.5 * rng.normal(size=dense.shape)
    return labels, dense, compressed, rng.choice(["day", "night"], EXAMPLES)


@pytest.fixture(scope="module")
def report(case):
    labels, dense, compressed, light = case
    return recall.audit(labels, dense, compare={"int8": compressed}, class_names=NAMES, groups={"light": light})


def test_the_class_table_agrees_with_scikit_learns_report(case, report):
    labels, dense, compressed, _ = case
    for logits, column in ((dense, "recall_dense"), (compressed, "recall")):
        found = sklearn.metrics.classification_report(labels, logits.argmax(1), target_names=NAMES, output_dict=True)
        for name in NAMES:
            of_class = row(report.classes, **{"class": name})
            assert of_class[column] == pytest.approx(found[name]["recall"], abs=1e-12)
            assert of_class["support"] == found[name]["support"]
        whole = {"recall_dense": "accuracy_dense", "recall": "accuracy"}[column]
        assert report.summary[whole].item() == pytest.approx(found["accuracy"], abs=1e-12)
    each = sklearn.metrics.recall_score(labels, compressed.argmax(1), average=None)
    np.testing.assert_allclose(report.classes["recall"], each, atol=1e-12)


def test_the_class_table_and_the_groups_agree_with_fairlearns_metric_frame(case, report):
    labels, dense, compressed, light = case
    metrics = {"accuracy": sklearn.metrics.accuracy_score, "count": count}
    for logits, column in ((dense, "recall_dense"), (compressed, "recall")):
        given = {"y_true": labels, "y_pred": logits.argmax(1)}
        of_class = MetricFrame(metrics=metrics, sensitive_features=labels, **given).by_group
        np.testing.assert_allclose(report.classes[column], of_class["accuracy"].sort_index(), atol=1e-12)
        np.testing.assert_array_equal(report.classes["support"], of_class["count"].sort_index())
        of_group = MetricFrame(metrics=metrics, sensitive_features=light, **given).by_group
        whole = report.groups[report.groups["class"].isna()].set_index("group")
        for group in ("day", "night"):
            assert whole.loc[group, column] == pytest.approx(of_group.loc[group, "accuracy"], abs=1e-12)
            assert whole.loc[group, "support"] == of_group.loc[group, "count"]
        within = MetricFrame(metrics=metrics, sensitive_features=light, control_features=labels, **given).by_group
        for (c, group), wanted in within.iterrows():
            cell = row(report.groups, **{"class": NAMES[c], "group": group})
            assert cell[column] == pytest.approx(wanted["accuracy"], abs=1e-12)


def test_top_k_recall_agrees_with_scikit_learn(case):
    labels, dense, compressed, _ = case
    found = recall.audit(labels, dense, compare={"int8": compressed}, top_k=2).probabilities
    whole = found[found["class"].isna()].iloc[0]
    for logits, column in ((dense, "top_k_dense"), (compressed, "top_k")):
        assert whole[column] == pytest.approx(sklearn.metrics.top_k_accuracy_score(labels, logits, k=2), abs=1e-12)


def test_drift_says_where_the_lost_examples_of_a_class_went():
    labels = np.array([0, 0, 0, 0, 1, 1, 2, 2])
    dense = np.array([[0, 0, 0, 1, 1, 1, 2, 0], [0, 0, 0, 0, 1, 1, 2, 2]])
    after = np.array([[1, 1, 2, 1, 1, 0, 2, 0], [0, 1, 0, 0, 1, 1, 0, 2]])
    found = recall.audit(labels, dense, {4: after}).drift
    # Model 0 loses three of class 0 (to 1, 1 and 2) and one of class 1 (to 0); model 1 one of class 0 (to 1) and one
    # of class 2 (to 0). The last example of model 0 was wrong before.
    wanted = {("0", "1"): (1.5, 0.75), ("0", "2"): (0.5, 0.25), ("1", "0"): (0.5, 1.0), ("2", "0"): (0.5, 1.0)}
    assert {(r["class"], r["predicted"]): (r["lost"], r["share"]) for _, r in found.iterrows()} == wanted
    first = row(found, **{"class": "0", "predicted": "1"})
    assert (first["before"], first["after"]) == (0.5, 2.0)
    assert found["lost"].is_monotonic_decreasing
    last = row(found, **{"class": "2", "predicted": "0"})
    assert (last["before"], last["after"]) == (0.5, 1.0)


def test_drift_of_unpaired_models_weighs_by_the_share_of_dense_models_that_were_right():
    labels = np.array([0, 0, 1, 1])
    dense = np.array([[0, 0, 1, 1], [0, 1, 1, 1]])
    after = np.array([[1, 1, 1, 1]])
    found = recall.audit(labels, dense, {4: after}, paired=False).drift
    assert found[["class", "predicted", "lost"]].to_numpy().tolist() == [["0", "1", 1.5]]


def test_drift_agrees_with_the_difference_of_confusion_matrices(case, report):
    labels, dense, compressed, _ = case
    matrices = [sklearn.metrics.confusion_matrix(labels, logits.argmax(1)) for logits in (dense, compressed)]
    for _, cell in report.drift.iterrows():
        at = NAMES.index(cell["class"]), NAMES.index(cell["predicted"])
        assert (cell["before"], cell["after"]) == tuple(matrix[at] for matrix in matrices)
    lost = report.drift.groupby("class")["lost"].sum()
    for name in lost.index:
        assert lost[name] == row(report.classes, **{"class": name})["lost"]


def test_examples_at_risk_are_those_whose_two_largest_probabilities_are_closest(case, report):
    labels, dense, compressed, _ = case
    two = np.sort(scipy.special.softmax(dense, axis=1), axis=1)[:, -2:]
    risk = 1 - (two[:, 1] - two[:, 0])
    order = np.argsort(-risk, kind="stable")[:100]
    np.testing.assert_array_equal(report.at_risk["example"], order)
    np.testing.assert_allclose(report.at_risk["risk"], risk[order], atol=1e-12)
    np.testing.assert_array_equal(report.at_risk["label"], labels[order])
    right = dense.argmax(1) == labels
    lost = right & (compressed.argmax(1) != labels)
    np.testing.assert_array_equal(report.at_risk["lost"], lost[order].astype(float))
    summary = report.summary.iloc[0]
    assert summary["risk_auc"] == pytest.approx(sklearn.metrics.roc_auc_score(lost[right], risk[right]), abs=1e-12)
    tenth = np.argsort(-risk[right], kind="stable")[: -(-right.sum() // 10)]
    assert summary["risk_top"] == pytest.approx(lost[right][tenth].sum() / lost.sum(), abs=1e-12)


def test_risk_without_logits_is_the_disagreement_of_dense_models_and_undefined_for_one():
    labels = np.array([0, 0, 1, 1])
    dense = np.array([[0, 0, 1, 1], [0, 1, 1, 1], [0, 0, 1, 0]])
    after = np.array([[0, 1, 1, 1], [0, 1, 1, 0], [0, 1, 1, 1]])
    report = recall.audit(labels, dense, {4: after})
    assert report.at_risk["example"].tolist() == [1, 3]
    np.testing.assert_allclose(report.at_risk["risk"], 1 / 3)
    np.testing.assert_allclose(report.at_risk["lost"], [2 / 3, 1 / 3])  # one model lost example 3, another won it
    assert report.summary["risk_auc"].item() == pytest.approx(2.5 / 3)  # example 1 was lost; 3 ties, 0 and 2 are below
    alone = recall.audit(labels, dense[0], {4: after[0]})
    assert len(alone.at_risk) == 0
    assert np.isnan(alone.summary["risk_auc"].item())
