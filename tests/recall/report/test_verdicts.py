"""The words where differences between classes changed in one way relative to accuracy and in another in points."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from jprune import recall
from jprune.recall.inference.corrected import TOO_FEW_MODELS, corrected_intensification, spread_ratio
from jprune.recall.report import verdicts
from jprune.recall.report.findings import findings

RECALLS = np.linspace(0.98, 0.76, 10)
EACH = 1000


def _audit(after, dense=RECALLS):
    """Audit two models with exactly these recalls; every example that the second has right the first has right too."""
    labels = np.repeat(np.arange(len(dense)), EACH)
    place = np.tile(np.arange(EACH), len(dense))

    def predictions(recalls):
        return np.where(place < np.rint(np.repeat(recalls, EACH) * EACH), labels, (labels + 1) % len(dense))

    return recall.audit(labels, predictions(np.asarray(dense)), {4: predictions(np.asarray(after))})


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (
            RECALLS - 0.3,
            "widened relative to accuracy at 4x compression {}, but are not shown to have widened in points",
        ),
        (
            RECALLS * 0.6,
            "are not shown to have changed relative to accuracy at 4x compression {}, but narrowed in points",
        ),
        (0.7 + 0.2 * (RECALLS - 0.87), "narrowed at 4x compression {}"),
        (RECALLS - 2 * (0.99 - RECALLS), "widened at 4x compression {}"),
        (0.4 + 0.7 * (RECALLS - 0.87), "widened relative to accuracy at 4x compression {}, but narrowed in points"),
    ],
    ids=["as many points", "as large a share", "narrower", "wider", "wider relative to accuracy, narrower in points"],
)
def test_differences_relative_to_accuracy_and_in_points_are_told_apart(after, said):
    audit = _audit(after)
    start, end = said.split("{}")
    headline = audit.headline
    assert f"ifferences between weak and strong classes {start}(corrected alpha" in headline
    assert headline.partition("they came closer)")[2].startswith(end + "." if end else ".")
    text = next(finding.text for finding in findings(audit) if finding.topic == "Differences between classes")
    assert f"class differences {said.replace(' at 4x compression {}', '')}" in text


def test_other_weak_classes_with_one_dense_model_are_not_called_narrower():
    audit = _audit(RECALLS[[3, 0, 4, 1, 2, 8, 5, 9, 6, 7]])  # as many points apart as before
    row = dict(audit.summary.iloc[0])
    assert row["alpha_corrected_high"] < 1
    assert row["spread"] == pytest.approx(1)
    said = "are not shown to have narrowed at 4x compression (corrected alpha"
    assert said in audit.headline
    assert "alpha is below 1, as it can be between two training runs." in audit.headline
    assert verdicts.verdict_of(row | {"spread_high": 0.9}) == "<"


def test_a_dense_model_whose_classes_differ_little_by_chance_does_not_widen_the_differences():
    """Independent runs on 1,000 examples per class: the gaps of 11 and 16 points differ by z = 2.2, p = .03."""
    labels, place = np.repeat([0, 1], 1000), np.tile(np.arange(1000), 2)
    dense = np.where(place < np.repeat([900, 790], 1000), labels, 1 - labels)
    after = np.where(place * 387 % 1000 < np.repeat([900, 740], 1000), labels, 1 - labels)
    audit = recall.audit(labels, dense, {4: after})
    row = dict(audit.summary.iloc[0])
    assert row["alpha_corrected_low"] > 1 > row["spread_low"]
    assert "classes are not shown to have widened at 4x compression (corrected alpha" in audit.headline
    assert "but recalls are not shown to spread further apart." in audit.headline
    assert verdicts.verdict_of(row | {"spread_low": 1.01}) == ">"
    assert verdicts.verdict_of(row | {"spread_low": np.nan}) == ">"  # as with several dense models
    assert verdicts.verdict_of(row | {"alpha_corrected_equal": True}) == "="


@pytest.mark.parametrize("agree", [0, 0.9])
def test_two_runs_are_seldom_said_to_have_widened_the_differences(agree):
    """At a level of 95% the nominal rate is 2.5%; alpha alone is shown to exceed 1 in 6% of independent runs."""
    rng, labels = np.random.default_rng(0), np.repeat([0, 1], 400)
    widened = 0
    for _ in range(300):
        draw = rng.random(800)
        again = np.where(rng.random(800) < agree, draw, rng.random(800))
        dense, after = (each < np.array([0.95, 0.8])[labels] for each in (draw, again))
        found = corrected_intensification(labels, dense[None], after[None], level=0.95)
        spread = spread_ratio(labels, dense, after[None], level=0.95)
        numbers = {"alpha_corrected": found.alpha, "alpha_corrected_low": found.low, "alpha_corrected_high": found.high}
        row = numbers | {"alpha_corrected_mark": str(recall.mark(found.low, found.high)), "spread_low": spread.low}
        row |= {"alpha_corrected_reason": "", "alpha_corrected_equal": False, "alpha_seed": np.nan}
        row |= {"alpha": found.alpha, "alpha_seed_low": np.nan, "spread_high": spread.high}
        widened += verdicts.verdict_of(row) == ">"
    assert widened <= 12  # 300 at 2.5% exceed this in 5 of 100 cases


@pytest.mark.parametrize(("spread_high", "verdict"), [(1.02, "="), (0.98, "<=")])
def test_an_alpha_within_the_margin_is_equal_where_a_seed_may_be_why_it_is_below_1(spread_high, verdict):
    corrected = {"alpha_corrected": 0.96, "alpha_corrected_high": 0.99, "alpha_corrected_mark": "<"}
    others = {"alpha_corrected_reason": "", "alpha_corrected_equal": True, "alpha_seed": np.nan}
    row = corrected | others | {"alpha": 0.95, "alpha_seed_low": np.nan, "spread_high": spread_high}
    assert verdicts.verdict_of(row) == verdict


@pytest.mark.parametrize(("seed_low", "said"), [(0.8, ""), (0.95, ", but narrowed in points")])
def test_differences_in_points_narrow_only_below_the_alpha_between_dense_models(seed_low, said):
    numbers = {"alpha": 0.98, "alpha_low": 0.93, "alpha_high": 1.04, "alpha_seed": 0.97, "alpha_seed_low": seed_low}
    corrected = {"alpha_corrected": 1.0, "alpha_corrected_low": 0.95, "alpha_corrected_high": 1.05}
    others = {"alpha_corrected_mark": "?", "alpha_corrected_reason": "", "alpha_corrected_equal": False}
    models = pd.DataFrame(
        {"score": ["a"], "ratio": [2.0], "collapsed": [False], "accuracy_dense": 0.9, "accuracy": 0.81}
    )
    audit = dataclasses.replace(_audit(RECALLS - 0.3), alphas=models)
    row = numbers | corrected | others | {"score": "a", "ratio": 2.0}
    assert verdicts.described(audit, row).removeprefix("are not shown to have changed").endswith(said)
    assert ("in points" in verdicts.described(audit, row)) == bool(said)


def test_models_at_chance_do_not_change_what_is_said_in_points():
    """They are left out of alpha, so they must not lower the accuracy with which it is converted to points."""
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(10), 400)

    def models(recalls):
        return np.where(rng.random((10, 4000)) < np.repeat(recalls, 400), labels, (labels + 1) % 10)

    dense, after = models(RECALLS), models(RECALLS.mean() + 1.5 * (RECALLS - RECALLS.mean()) - 0.05)
    after[:8] = 0
    audit = recall.audit(labels, dense, {10: after})
    assert audit.headline.startswith("8 of 10 models at 10x compression are at chance")
    assert "strong classes widened at 10x compression" in audit.headline
    text = next(finding.text for finding in findings(audit) if finding.topic == "Is there enough evidence?")
    assert text.endswith("2 models show at every ratio on which side of 1 corrected alpha is.")
    assert "in points" not in audit.headline.replace("points lost", "")


def test_the_slope_in_points_is_alpha_times_the_change_of_accuracy():
    row = dict(_audit(RECALLS - 0.3).summary.iloc[0])
    dense, after = RECALLS - RECALLS.mean(), RECALLS - 0.3 - (RECALLS - 0.3).mean()
    in_points = (dense * after).sum() / (dense**2).sum()
    assert row["alpha"] * row["accuracy"] / row["accuracy_dense"] == pytest.approx(in_points)


def test_a_negative_alpha_from_one_class_does_not_say_that_all_classes_changed_sides():
    after = RECALLS - 0.02
    after[0] = 0.05
    assert "are reversed at 4x compression" in _audit(after).headline
    assert "a strong class is now a weak one, or a weak class a strong one" in _audit(after).headline


def test_a_loss_of_nothing_is_not_called_an_overall_loss():
    after = RECALLS.copy()
    after[0], after[1:] = 0.62, RECALLS[1:] + 0.04
    assert "while the overall accuracy is the same" in _audit(after).headline


def test_a_recall_close_to_all_or_nothing_is_not_rounded_to_it():
    after = np.full(10, 0.9)
    after[0] = 0.0
    labels = np.repeat(np.arange(10), 3000)
    dense, pruned = labels.copy(), labels.copy()
    dense[0] = 1  # 2,999 of 3,000
    pruned[1:3000] = 1  # 1 of 3,000
    headline = recall.audit(labels, dense, {4: pruned}).headline
    assert "99.97% to 0.033% (3,000 test examples)" in headline


def test_one_dense_model_and_several_compressed_ones_are_said_to_be_of_this_dense_model():
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(4), 50)

    def models(number):
        return np.where(rng.random((number, 200)) < 0.9, labels, (labels + 1) % 4)

    qualifier = "This holds for this dense model; with another one the classes that lost most and alpha may differ."
    assert qualifier in recall.audit(labels, models(1), {2: models(4)}, paired=False).headline
    assert qualifier not in recall.audit(labels, models(4), {2: models(4)}).headline


def test_an_alpha_without_an_interval_over_examples_is_not_judged_by_that_over_models():
    numbers = {"alpha": 1.29, "alpha_low": 1.17, "alpha_high": 1.42, "alpha_mark": ">", "alpha_corrected": np.nan}
    assert verdicts.verdict_of(numbers | {"alpha_corrected_reason": TOO_FEW_MODELS}) == "spread"


@pytest.mark.parametrize("steeper", [2.0, -1.0], ids=["wider", "reversed"])
def test_evidence_is_claimed_where_every_alpha_is_shown(steeper):
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(4), 500)
    recalls = np.array([0.95, 0.9, 0.85, 0.8])

    def models(recalls):
        return np.where(rng.random((6, 2000)) < np.repeat(recalls, 500), labels, (labels + 1) % 4)

    audit = recall.audit(labels, models(recalls), {4: models(0.7 + steeper * (recalls - 0.875))})
    text = next(finding.text for finding in findings(audit) if finding.topic == "Is there enough evidence?")
    assert "6 models show at every ratio on which side of 1 corrected alpha is." in text


def test_a_negative_alpha_of_noise_is_not_explained_by_classes_that_changed_sides():
    labels, place = np.repeat(np.arange(4), 20), np.tile(np.arange(20), 4)
    dense, after = (
        np.where(place < np.repeat(right, 20), labels, (labels + 1) % 4)
        for right in ([19, 18, 18, 17], [17, 18, 18, 19])
    )
    audit = recall.audit(labels, dense, {4: after})
    text = next(finding.text for finding in findings(audit) if finding.topic == "Differences between classes")
    assert "no class differences beyond sampling noise" in text
    assert "alpha is -1.00." in text
    assert "A negative alpha" not in text


def test_evidence_is_not_claimed_of_an_alpha_that_noise_explains():
    rng = np.random.default_rng(0)
    dense, after = rng.binomial(20, 0.9, (1, 100)), rng.binomial(20, 0.9, (8, 100))
    audit = recall.audit_counts(dense, {4: after}, support=[20] * 100, paired=False)
    assert "cannot be judged" in audit.headline
    said = [finding.text for finding in findings(audit) if finding.topic == "Is there enough evidence?"]
    assert [
        text.startswith("No: at 4x noise of the test set or another training seed may be why alpha is not 1.")
        for text in said
    ] == [True]


def test_p_values_of_groups_are_corrected_over_all_attributes():
    rng, labels = np.random.default_rng(1), np.repeat(np.arange(5), 80)
    dense, after = (np.where(rng.random(400) < 0.85, labels, (labels + 1) % 5) for _ in range(2))
    attributes = {f"a{i}": rng.integers(0, 2, 400).astype(str) for i in range(6)}
    groups = recall.audit(labels, dense, {2: after}, groups=attributes).groups
    whole = groups[groups["class"].isna()].sort_values("p")
    by_hand = np.minimum(np.maximum.accumulate(whole["p"].to_numpy() * np.arange(len(whole), 0, -1)), 1)
    assert len(whole) == 12
    np.testing.assert_allclose(whole["p_holm"].to_numpy(), by_hand)
    pd.testing.assert_series_equal(
        whole["attribute"].drop_duplicates().sort_values().reset_index(drop=True),
        pd.Series(sorted(attributes), name="attribute"),
    )
