"""The audit: right numbers in every table."""

import json
import pathlib
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from sklearn.metrics import accuracy_score, recall_score

from jprune import recall
from jprune.recall.report import display
from tests.recall import published, study
from tests.recall.study import CLASSES, EXAMPLES, MODELS, row


@pytest.fixture
def data():
    return study.data()


@pytest.fixture(scope="module")
def report():
    return recall.audit(*study.data())


@pytest.fixture(scope="module")
def golden():
    counts = published.correct_counts()
    return recall.audit_counts(counts[1], {"magnitude": {t: counts[t] for t in published.RATIOS}}, support=[1000] * 10)


# The published runs -----------------------------------------------------------------------------------


def test_summary_has_the_published_means_spreads_intervals_and_marks(golden):
    table = golden.summary
    np.testing.assert_allclose(table["alpha"], (0.933, 0.959, 1.065, 1.247, 1.802), atol=5e-4)
    np.testing.assert_allclose(table["alpha_sd"], (0.050, 0.055, 0.058, 0.093, 0.151), atol=5e-4)
    np.testing.assert_allclose(table["alpha_low"], (0.907, 0.932, 1.036, 1.201, 1.726), atol=5e-4)
    np.testing.assert_allclose(table["alpha_high"], (0.958, 0.987, 1.094, 1.294, 1.878), atol=5e-4)
    np.testing.assert_allclose(table["pooled_alpha"], (0.928, 0.953, 1.057, 1.239, 1.791), atol=5e-4)
    np.testing.assert_allclose(table["accuracy_dense"], 0.8925, atol=5e-5)
    variances = [table["balance_variance_dense"][0], *table["balance_variance"]]
    np.testing.assert_allclose(variances, (0.00317, 0.00282, 0.00296, 0.00357, 0.00471, 0.00900), atol=5e-6)
    assert table["alpha_mark"].tolist() == ["<", "<", ">", ">", ">"]


def test_tests_have_the_published_p_values(golden):
    assert golden.tests["question"].tolist() == ["ratio"] * 4
    np.testing.assert_allclose(golden.tests["p_bonferroni"], (0.036, 6.9e-11, 1.3e-14, 2.4e-22), rtol=0.03)


def test_counts_without_predictions_leave_out_unknown_tables(golden):
    assert golden.alphas[["alpha_precision", "alpha_f1", "cev", "sde"]].isna().all(axis=None)
    assert len(golden.pies) == len(golden.groups) == 0
    assert golden.examples == 10_000


# The tables -------------------------------------------------------------------------------------------


def test_every_column_is_documented():
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(3), 40)
    models = [3 * np.eye(3)[labels] + rng.normal(size=(2, 120, 3)) for _ in range(4)]
    scores = {"a": dict(zip((1, 2), models[:2], strict=True)), "b": {2: models[2]}}
    audit = recall.audit(labels, models[3], scores, groups={"sex": labels % 2}, rng=0, resamples=10)
    page = (pathlib.Path(__file__).parents[2] / "docs" / "audit.md").read_text(encoding="utf-8")
    columns = {name for table in audit.tables().values() for name in table.columns}
    ends = re.compile("(_low|_high|_sd|_mark|_models|_dense|_change|_equal|_detectable|_reason)+$")
    unknown = {name for name in columns if f"`{name}`" not in page and f"`{ends.sub('', name)}`" not in page}
    assert len(audit.groups) > 0 < len(audit.probabilities)
    assert not unknown


def test_alphas_equal_those_worked_out_with_scikit_learn(data, report):
    labels, dense, pruned = data
    for score, ratios in pruned.items():
        for ratio, stack in ratios.items():
            for model in range(MODELS):
                balances = []
                for predicted in (dense[model], stack[model]):
                    a = accuracy_score(labels, predicted)
                    balances.append((recall_score(labels, predicted, average=None) - a) / a)
                x, y = balances
                got = row(report.alphas, score=score, ratio=ratio, model=model)
                assert got["alpha"] == pytest.approx((x @ y) / (x @ x))
                assert got["accuracy"] == pytest.approx(accuracy_score(labels, stack[model]))


def test_rows_are_sorted_by_score_then_ratio_in_any_given_order(data):
    labels, dense, pruned = data
    given = {"magnitude": dict(reversed(pruned["magnitude"].items()))}
    assert recall.audit(labels, dense, given).summary["ratio"].tolist() == [2.0, 10.0]


def test_confusion_counts_give_the_same_rates_and_alphas_as_predictions(data, report):
    labels, dense, pruned = data
    counted = recall.audit_counts(
        recall.counts(labels, dense, CLASSES),
        {s: {t: recall.counts(labels, stack, CLASSES) for t, stack in ratios.items()} for s, ratios in pruned.items()},
    )
    for name in ("alphas", "recalls", "dense"):
        pd.testing.assert_frame_equal(getattr(counted, name), getattr(report, name))
    same = ["score", "ratio", "accuracy", "alpha", "alpha_low", "alpha_high", "alpha_seed", "pooled_alpha", "cev"]
    pd.testing.assert_frame_equal(counted.summary[same], report.summary[same])
    of_alpha = report.tests[report.tests["question"] != "evenness"]  # which takes predictions
    pd.testing.assert_series_equal(counted.tests["p"], of_alpha["p"].astype(float), check_index=False)
    of_class = ["class", "support", "recall_dense", "recall", "change", "excess", "intensification", "p_welch"]
    pd.testing.assert_frame_equal(counted.classes[of_class], report.classes[of_class])
    assert any("counts alone" in warning for warning in counted.warnings)


def test_logits_integers_lists_and_jax_arrays_give_the_same_audit(data, report):
    import jax.numpy as jnp

    labels, dense, pruned = data
    logits = {s: {t: np.eye(CLASSES)[stack] for t, stack in ratios.items()} for s, ratios in pruned.items()}
    for given in (
        (labels.tolist(), dense.tolist(), pruned),
        (jnp.asarray(labels, jnp.int32), jnp.asarray(dense, jnp.int32), logits),
        (labels.astype(np.uint8), np.eye(CLASSES, dtype=np.float16)[dense], logits),
    ):
        pd.testing.assert_frame_equal(recall.audit(*given).alphas, report.alphas)


def test_classes_give_the_change_and_the_excess_of_the_models_with_intervals_and_a_test(data, report):
    labels, dense, pruned = data
    correct = {name: stack == labels for name, stack in (("dense", dense), ("pruned", pruned["magnitude"][10.0]))}
    of_class = {name: right[:, labels == 3].mean(1) for name, right in correct.items()}
    got = row(report.classes, score="magnitude", ratio=10.0, **{"class": "3"})
    change = of_class["pruned"] - of_class["dense"]
    assert got["change"] == pytest.approx(change.mean())
    excess = -change - (correct["dense"].mean(1) - correct["pruned"].mean(1))
    assert got["excess"] == pytest.approx(excess.mean())
    assert got["change_low"] < got["change"] < got["change_high"]
    lost = (correct["dense"] & ~correct["pruned"])[:, labels == 3].sum(1).mean()
    assert got["lost"] == pytest.approx(lost)
    rows = report.classes[(report.classes["score"] == "magnitude") & (report.classes["ratio"] == 10.0)]
    np.testing.assert_allclose(rows["p_holm"], recall.holm(rows["p"].to_numpy()))


def test_tests_compare_ratios_the_control_and_scores_in_the_right_direction(report):
    assert report.tests["question"].value_counts().to_dict() == {"ratio": 2, "control": 1, "score": 1, "evenness": 4}
    at = {s: {t: g["alpha"].to_numpy() for t, g in rows.groupby("ratio")} for s, rows in report.alphas.groupby("score")}
    ratio = row(report.tests, question="ratio", score="magnitude")
    assert (ratio["ratio"], ratio["other_ratio"], ratio["alternative"], ratio["test"]) == (10, 2, "greater", "paired t")
    assert ratio["p"] == pytest.approx(
        scipy.stats.ttest_rel(at["magnitude"][10.0], at["magnitude"][2.0], alternative="greater").pvalue
    )
    score = row(report.tests, question="score")
    assert (score["score"], score["other_score"], score["ratio"]) == ("magnitude", "random", 10)
    assert score["p"] == pytest.approx(scipy.stats.ttest_rel(at["magnitude"][10.0], at["random"][10.0]).pvalue)
    assert row(report.tests, question="control")["other_ratio"] == 1


def test_pies_are_the_examples_whose_modal_label_changes(data, report):
    labels, dense, pruned = data
    modes = [scipy.stats.mode(stack, axis=0).mode for stack in (dense, pruned["random"][10.0])]
    rows = report.pies[(report.pies["score"] == "random") & (report.pies["ratio"] == 10.0)]
    assert sorted(rows["example"]) == np.flatnonzero(modes[0] != modes[1]).tolist()
    assert (rows["label"] == labels[rows["example"]]).all()
    assert (np.diff(rows["distance"]) <= 0).all()


def test_subgroups_are_audited_by_attribute_group_and_class(data):
    labels, dense, pruned = data
    sex = np.where(np.arange(EXAMPLES) % 2, "f", "m")
    report = recall.audit(labels, dense, pruned["magnitude"], groups={"sex": sex, "old": np.arange(EXAMPLES) % 3})
    assert report.groups.groupby("attribute")["group"].unique().map(sorted).to_dict() == {
        "sex": ["f", "m"],
        "old": ["0", "1", "2"],
    }
    member = (sex == "f") & (labels == 2)
    got = row(report.groups, ratio=10.0, attribute="sex", group="f", **{"class": "2"})
    assert got["support"] == member.sum()
    assert got["recall"] == pytest.approx((pruned["magnitude"][10.0] == labels)[:, member].mean())
    whole = row(report.groups[report.groups["class"].isna()], ratio=10.0, attribute="sex", group="f")
    lost = {
        name: (dense == labels)[:, m].mean() - (pruned["magnitude"][10.0] == labels)[:, m].mean()
        for name, m in (("group", sex == "f"), ("all", np.ones(EXAMPLES, bool)))
    }
    assert whole["excess"] == pytest.approx(lost["group"] - lost["all"])


def test_three_models_are_too_few_to_suspect_their_pairing(data):
    labels, dense, pruned = data
    report = recall.audit(labels, dense[:3], {10: pruned["magnitude"][10.0][2::-1]}, rng=0, resamples=50)
    assert row(report.tests, question="pairing")["p"] >= 1 / 6
    assert not [warning for warning in report.warnings if "same order" in warning]


def test_a_seed_adds_a_test_of_the_pairing(data):
    labels, dense, pruned = data
    report = recall.audit(labels, dense, pruned, rng=0, resamples=200)
    assert (report.tests["question"] == "pairing").sum() == 4
    assert any("may not be paired" in warning for warning in report.warnings)


def test_models_that_are_paired_are_not_suspected():
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), 100)
    wrong = rng.random((8, labels.size)) < rng.uniform(0.05, 0.5, (8, CLASSES))[:, labels]
    dense = np.where(wrong, (labels + 1) % CLASSES, labels)
    pruned = np.where(rng.random(wrong.shape) < 0.05, (labels + 2) % CLASSES, dense)
    lost = rng.integers(0, CLASSES, wrong.shape)
    report = recall.audit(labels, dense, {2: pruned, 50: lost}, rng=0, resamples=200)
    assert not [warning for warning in report.warnings if "same order" in warning]
    shuffled = recall.audit(labels, dense, {2: pruned[::-1]}, rng=0, resamples=200)
    assert [warning for warning in shuffled.warnings if "same order" in warning]


# Models that do not pair ------------------------------------------------------------------------------


def test_unpaired_models_are_set_against_the_mean_dense_model(data):
    labels, dense, pruned = data
    stack = pruned["magnitude"][10.0][:3]
    report = recall.audit(labels, dense, {10.0: stack}, paired=False)
    right = dense == labels
    r, a = np.stack([right[:, labels == c].mean(1) for c in range(CLASSES)], -1).mean(0), right.mean()
    x = (r - a) / a
    for model, predicted in enumerate(stack):
        a_t = accuracy_score(labels, predicted)
        y = (recall_score(labels, predicted, average=None) - a_t) / a_t
        assert row(report.alphas, model=model)["alpha"] == pytest.approx((x @ y) / (x @ x))
    change = row(report.classes, **{"class": "1"})
    assert change["change"] == pytest.approx((stack == labels)[:, labels == 1].mean() - right[:, labels == 1].mean())
    assert change["change_low"] < change["change"] < change["change_high"]


def test_each_score_may_have_its_own_dense_models(data):
    labels, dense, pruned = data
    report = recall.audit(labels, {"magnitude": dense, "random": dense[:3]}, {
        "magnitude": {10.0: pruned["magnitude"][10.0]}, "random": {10.0: pruned["random"][10.0][:3]},
    })  # fmt: skip
    assert report.summary["models"].tolist() == [5, 3]
    assert row(report.tests, question="score")["test"] == "Welch t"
    assert not report.shared


def test_compare_tests_audits_against_each_other(report, golden):
    other = recall.audit_counts(
        published.correct_counts()[1], {"magnitude": {10: published.correct_counts()[20]}}, support=[1000] * 10
    )
    table = recall.compare({"twenty": other, "paper": golden})
    at = [audit.alphas["alpha"][audit.alphas["ratio"] == 10] for audit in (other, golden)]
    assert row(table, audit="twenty", other_audit="paper")["p"] == pytest.approx(
        scipy.stats.ttest_ind(*at, equal_var=False, alternative="greater").pvalue
    )
    with pytest.raises(ValueError, match="pairs name the audit 'none'"):
        recall.compare({"paper": golden}, [("paper", "none")])


def test_scores_is_pruned_by_another_name(data, report):
    labels, dense, pruned = data
    pd.testing.assert_frame_equal(recall.audit(labels, dense, scores=pruned).alphas, report.alphas)


# Out --------------------------------------------------------------------------------------------------


def test_csv_files_read_back_as_the_tables(report, tmp_path):
    report.to_csv(tmp_path / "tables")
    for name, table in report.tables().items():
        # As text, which float() reads exactly: how pandas itself does differs between its versions.
        back = pd.read_csv(tmp_path / "tables" / f"{name}.csv", dtype=str)
        assert list(back.columns) == list(table.columns)
        assert len(back) == len(table)
        numbers = table.select_dtypes("number").columns
        np.testing.assert_array_equal(back[numbers].map(float).to_numpy(float), table[numbers].to_numpy(float))


def test_json_has_every_table_and_null_for_undefined_values(data, tmp_path):
    labels, dense, pruned = data
    report = recall.audit(labels, dense[0], {10.0: pruned["magnitude"][10.0][0]})
    text = report.to_json(tmp_path / "audit.json")
    assert (tmp_path / "audit.json").read_text(encoding="utf-8") == text
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert found["tables"]["summary"][0]["alpha_low"] is None
    assert found["tables"]["alphas"][0]["alpha"] == report.alphas["alpha"][0]
    assert set(found["tables"]) == set(report.tables())
    assert report.to_json() == text


# At full size -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_thirty_models_five_ratios_and_ten_thousand_examples_page_included(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.tile(np.arange(10), 1_000)

    def models(rate):
        wrong = rng.random((30, labels.size)) < rate * (1 + labels / 5)
        return np.where(wrong, rng.integers(0, 10, wrong.shape), labels)

    dense, pruned = models(0.05), {ratio: models(0.05 * (1 + ratio / 20)) for ratio in published.RATIOS}
    report = recall.audit(labels, dense, pruned, rng=0)
    report.to_html(tmp_path / "report.html")
    recalls = {ratio: (stack == labels).reshape(30, 1_000, 10).mean(1) for ratio, stack in {1: dense, **pruned}.items()}
    balances = {ratio: r / r.mean(1, keepdims=True) - 1 for ratio, r in recalls.items()}
    x = balances.pop(1)
    wanted = np.concatenate([(x * y).sum(1) / (x * x).sum(1) for y in balances.values()])
    np.testing.assert_allclose(report.alphas["alpha"], wanted)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") == len(report.figures())
    assert len(page) < 1_000_000


@pytest.mark.slow
def test_a_thousand_classes_stay_within_a_page(tmp_path):
    rng = np.random.default_rng(0)
    dense = rng.integers(20, 50, (10, 1_000))
    pruned = {ratio: np.maximum(dense - rng.integers(0, ratio, dense.shape), 0) for ratio in (2, 10, 20)}
    report = recall.audit_counts(dense, pruned, support=[50] * 1_000)
    report.to_html(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "1500 of 3000 rows are shown" in page
    assert len(page) < 3_000_000


def test_comparisons_of_named_models_have_no_ratio():
    labels = np.repeat([0, 1, 2], 20)
    first, second = (np.where(np.arange(60) % 20 < [[3], [n]], (labels + 1) % 3, labels) for n in (5, 9))
    report = recall.audit(labels, first, compare={"int8": second, "kd": (second + 1) % 3})
    (tested,) = [row for row in json.loads(report.to_json())["tables"]["tests"] if row["question"] == "score"]
    assert (tested["ratio"], tested["other_score"], tested["other_ratio"]) == (None, "kd", None)
    shown = display.tables(report, pd.DataFrame())["tests"]
    assert not {"ratio", "other_ratio"} & {column.name for column in shown.columns}


def test_csv_files_of_named_models_have_a_name_and_no_ratio(tmp_path):
    report = recall.audit([0, 0, 1, 1], [0, 0, 1, 0], compare={"int8": [0, 1, 1, 0]})
    report.to_csv(tmp_path)
    table = pd.read_csv(tmp_path / "summary.csv")
    assert list(table.columns[:2]) == ["name", "models"]
    assert table["name"].tolist() == ["int8"]
    assert "ratio" not in pd.read_csv(tmp_path / "tests.csv")
