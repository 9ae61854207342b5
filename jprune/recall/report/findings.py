"""The findings of an audit, for every score at its highest ratio."""

from typing import NamedTuple

import numpy as np
import pandas as pd

from jprune.recall.inference.corrected import TOO_FEW_EXAMPLES, WITHIN_NOISE
from jprune.recall.inference.power import replicates_needed
from jprune.recall.report.verdicts import (
    SHOWN,
    UNMEASURED,
    described,
    detectable_excess,
    evenness,
    lost_more,
    rows_of,
    verdict_of,
)
from jprune.recall.report.words import (
    Row,
    at_ratio,
    cell,
    change_of_accuracy,
    count,
    healthy,
    interval,
    listed,
    no_alpha_shown,
    no_class_shown,
    not_shown,
    number,
    p_value,
    percent,
    places,
    points,
    sentence,
    signed,
    size,
    two_models,
    what_a_test_needs,
)
from jprune.recall.tables.frames import AuditTables

_MOST_MODELS, _ROUNDING = 100_000, 1e-12
_MOST_NAMES = 8
_NEGATIVE = (
    "A negative alpha means that classes with a recall above the average before compression tend to have one below it "
    "after, and the reverse."
)
_LARGE = 0.1  # excess loss of a class
_FEWEST_MOVED = 2  # examples that went to one class
_FEWEST_LOST = 5  # examples for which it is said how well they were predicted


class Finding(NamedTuple):
    """One answer of an audit.

    Attributes:
      score: the score it is about.
      topic: the question.
      text: the answer, a sentence or more.
    """

    score: str
    topic: str
    text: str


def findings(audit: AuditTables) -> list[Finding]:
    """Return the findings for every score at its highest ratio; questions without an answer are left out."""
    found = []
    for score in audit.scores:
        rows = audit.summary[audit.summary["score"] == score]
        row = dict(rows.iloc[-1])
        classes = rows_of(audit.classes, row)
        answers = {
            f"Accuracy {at_ratio(row)}".strip(): _accuracy(row, audit),
            "Classes that lost most": _classes(classes, audit, row),
            "Where the lost examples went": _drift(audit, row),
            "Groups": _groups(audit, row),
            "Differences between classes": _differences(rows, audit),
            "More than the lost accuracy explains?": _beyond_null(row, audit),
            "Confidence": _confidence(audit, row),
            "Examples at risk": _risk(row, audit),
            "Collapsed models": _collapsed(row, audit),
            "Is there enough evidence?": _evidence(rows, audit),
        }
        found += [Finding(score, topic, text) for topic, text in answers.items() if text]
    return found


def _accuracy(row: Row, audit: AuditTables) -> str:
    text = f"accuracy {change_of_accuracy(row, audit.level)}"
    if row["agreement"] == 1:
        return sentence(text)
    if np.isfinite(cell(row, "accuracy_change_low")):
        ends = f"{signed(cell(row, 'accuracy_change_low'))} to {signed(cell(row, 'accuracy_change_high'))}"
        text += f"; {100 * audit.level:g}% interval of the change over models {ends} points"
    tests = audit.tests[(audit.tests["test"] == "mcnemar") & (audit.tests["question"] == "accuracy")]
    for test in rows_of(tests, row).to_dict("records"):
        text += f"; McNemar's test of all examples: {p_value(test['p'])}"
    changed = rows_of(audit.pies, row)
    if len(changed) and row["models"] != 1:
        share = percent(len(changed) / audit.examples)
        text += f"; the most frequent prediction of {len(changed):,} of {audit.examples:,} examples ({share}) changed"
    return sentence(text)


def _classes(classes: pd.DataFrame, audit: AuditTables, row: Row) -> str:
    present = classes[classes["support"] > 0]
    if len(present) < 2:
        return ""
    most = present[present["change"] < 0].sort_values("change", kind="stable").head(3)
    if not len(most):
        return f"No class has a lower recall than before{'' if row['models'] == 1 else ', on average over the models'}."
    counted = two_models(audit, row) and np.isfinite(present["lost"]).any()
    text = "; ".join(
        f"class {each['class']}: {points(each['change'])} ({percent(each['recall_dense'])} to "
        f"{percent(each['recall'])} of {each['support']:,}"
        + (f", {each['lost']:.0f} lost and {each['won']:.0f} won)" if counted else ")")
        for _, each in most.iterrows()
    )
    text = text[0].upper() + text[1:]
    if not np.isfinite(present["p_holm"]).any():
        return f"{text}. A test of whether that is more than the rest lost needs {what_a_test_needs(present)}."
    p = evenness(audit, row)
    if np.isfinite(p):
        rejected = f"{'' if p < 1 - audit.level else 'not '}rejected at the {100 * (1 - audit.level):g}% level"
        text += f". The hypothesis that all classes lost equally is {rejected} ({p_value(p)})"
    beyond = lost_more(classes, audit.level).sort_values("excess", ascending=False, kind="stable")
    if not len(beyond):
        return f"{text}. No single class is shown to have lost more than all examples did."
    more = f" and {len(beyond) - _MOST_NAMES} more" if len(beyond) > _MOST_NAMES else ""
    named = listed([str(name) for name in beyond["class"][:_MOST_NAMES]]) + more
    return f"{text}. Shown to have lost more than all examples did: class{'es' * (len(beyond) > 1)} {named}."


def _drift(audit: AuditTables, row: Row) -> str:
    rows = rows_of(audit.drift, row)
    rows = rows[rows["lost"] >= _FEWEST_MOVED].head(3)
    if not len(rows) or len(audit.class_names) == 2:  # with two classes there is nowhere else to go
        return ""
    mean = "" if two_models(audit, row) else "on average over the models, "
    return sentence(
        mean
        + "; ".join(
            f"{count(each['lost'])} of {count(round(each['lost'] / each['share'], 1))} lost examples of class "
            f"{each['class']} went to class {each['predicted']}"
            for _, each in rows.iterrows()
        )
    )


def _groups(audit: AuditTables, row: Row) -> str:
    if not len(audit.groups):
        return ""
    rows = rows_of(audit.groups[audit.groups["class"].isna()], row)
    shown = lost_more(rows, audit.level)
    if not np.isfinite(rows["p_holm"]).any():  # nothing was tested, as with one group
        return ""
    if not len(shown):
        return "No group is shown to have lost more than all examples did."
    return sentence(
        "shown to have lost more than all examples did: "
        + "; ".join(
            f"{each['attribute']} {each['group']} ({percent(each['recall_dense'])} to {percent(each['recall'])} "
            f"of {each['support']:,} examples, {size(each['excess'])} more, interval "
            f"{signed(each['excess_low'])} to {signed(each['excess_high'])})"
            for _, each in shown.sort_values("excess", ascending=False).iterrows()
        )
    )


def _differences(rows: pd.DataFrame, audit: AuditTables) -> str:
    row = dict(rows.iloc[-1])
    verdict = verdict_of(row)
    if verdict == "undefined":
        reasons = sorted({str(r) for r in rows_of(audit.alphas, row)["reason"]} - {""})
        return f"Alpha is undefined: {'; '.join(reasons)}."
    if verdict == "collapsed":
        return "Every model is at chance, so alpha says nothing about classes."
    if verdict in UNMEASURED:
        why = f"The dense recalls show {WITHIN_NOISE}" if verdict == "noise" else f"There are {TOO_FEW_EXAMPLES}"
        text = f"{why}, so there is no corrected alpha"
    elif np.isfinite(cell(row, "alpha_corrected")):
        text = f"corrected alpha {interval(row, 'alpha_corrected')} {at_ratio(row)}"
        text += f"; class differences {described(audit, row)}"
        if verdict == "=":
            text += f"; the margin is {1 / (1 + audit.margin):.2g} to {1 + audit.margin:g}"
        elif verdict == "?":
            least = cell(row, "alpha_corrected_detectable")
            text += f"; growth by {number(least)} would be shown nine times in ten" if least < 1 else ""
            text += f". {sentence(no_alpha_shown(row, audit))[:-1]}" if 1 <= least < np.inf else ""
    else:
        text = f"alpha {interval(row, 'alpha')} {at_ratio(row)}; class differences {described(audit, row)}"
    text += _uncorrected(row, verdict)
    corrected = bool(np.isfinite(rows["alpha_corrected"]).any())
    marks = rows["alpha_corrected_mark" if corrected else "alpha_mark"]
    pattern = [
        f"{word} {places(rows[marks == mark])}"
        for mark, word in (("<", "below 1"), ("?", "not shown to differ from 1"), (">", "above 1"))
        if (marks == mark).any()
    ]
    if len(rows) > 1 and pattern and (corrected or verdict not in UNMEASURED):
        text += f". Over the ratios {'corrected ' * corrected}alpha is {'; '.join(pattern)}"
    if row["alpha_intercept_mark"] != row["alpha_mark"] and np.isfinite(cell(row, "alpha_intercept")):
        text += f". With an intercept, for classes of unequal sizes, it is {interval(row, 'alpha_intercept')}"
    control = rows[rows["ratio"] == 1]
    name = "alpha_corrected" if corrected else "alpha"
    if len(control) and row["ratio"] != 1 and marks.iloc[0] in ("<", ">") and (corrected or verdict not in UNMEASURED):
        text += f". The control, fine-tuned and not pruned, already has {interval(dict(control.iloc[0]), name)}"
    negative = verdict not in UNMEASURED and bool((rows[["alpha", "alpha_corrected"]] < 0).to_numpy().any())
    return sentence(text) + f" {_NEGATIVE}" * negative


def _uncorrected(row: Row, verdict: str) -> str:
    """Alpha without the correction and between dense training runs, and why there is no corrected alpha."""
    corrected = np.isfinite(cell(row, "alpha_corrected"))
    text = ""
    if corrected or verdict in UNMEASURED:
        text += f". Without the correction for test-set noise alpha is {interval(row, 'alpha')}"
    if np.isfinite(cell(row, "alpha_seed")):
        text += f"; between two dense training runs it is {interval(row, 'alpha_seed')}"
    if not corrected and verdict not in UNMEASURED:
        text += f". It is not corrected for test-set noise: {row['alpha_corrected_reason']}"
    return text


def _beyond_null(row: Row, audit: AuditTables) -> str:
    """Whether class differences grew by more than errors that grow in proportion; only where accuracy fell.

    Noise of the test set makes alpha, but not alpha_null, too small. So there is an answer only where the interval of
    corrected alpha is on the same side of alpha_null; without predictions, where it is below alpha between seeds.
    """
    if not np.isfinite(cell(row, "alpha_over_null")) or verdict_of(row) in UNMEASURED:
        return ""
    if cell(row, "accuracy_change") >= 0 or not_shown(row, audit.level):
        return ""
    side, null = str(row["alpha_over_null_mark"]), cell(row, "alpha_null")
    if np.isfinite(cell(row, "alpha_corrected")):
        low, high = cell(row, "alpha_corrected_low"), cell(row, "alpha_corrected_high")
        agrees = {">": low > null, "<": high < null}.get(side, True)
    else:
        agrees = side != "<" or not cell(row, "alpha_over_null_high") >= cell(row, "alpha_seed_low")
    answer = {
        ">": "yes, more than errors that grow in proportion in every class would cause",
        "<": "no: errors that grow in proportion in every class would cause more",
        "?": "not shown: the change cannot be distinguished from errors that grow in proportion in every class",
        "": "too few models to compare it with errors that grow in proportion in every class",
    }[side if agrees else "?"]
    if np.isfinite(cell(row, "alpha_corrected")):
        return sentence(f"{answer} (corrected alpha {interval(row, 'alpha_corrected')}, alpha_null {number(null)})")
    return sentence(f"{answer} (alpha_null {number(null)}, alpha / alpha_null {interval(row, 'alpha_over_null')})")


def _confidence(audit: AuditTables, row: Row) -> str:
    rows = rows_of(audit.probabilities, row)
    rows = rows[rows["class"].isna()]
    if not len(rows):
        return ""
    each = dict(rows.iloc[0])
    divergence = f"; KL divergence {each['kl']:.3g} nats per example" if np.isfinite(each["kl"]) else ""
    top = (
        f"; top-{each['k']} recall {percent(each['top_k_dense'])} to {percent(each['top_k'])}" if each["k"] > 1 else ""
    )
    return sentence(
        f"mean confidence {percent(each['confidence_dense'])} to {percent(each['confidence'])}, expected calibration "
        f"error {percent(each['ece_dense'])} to {percent(each['ece'])}{divergence}{top}"
    )


def _risk(row: Row, audit: AuditTables) -> str:
    if not np.isfinite(float(str(row.get("risk_auc", "nan")))):
        return ""
    lost, found = int(cell(row, "risk_lost")), cell(row, "risk_found")
    one = (audit.dense["score"] == row["score"]).sum() == 1
    whose, they = ("dense model's", "it") if one else ("dense models'", "most of them")
    by = "" if row["models"] == 1 else " by at least half of the models"
    if lost < _FEWEST_LOST:
        were = "1 example was" if lost == 1 else f"{lost} examples were"
        return f"Only {were} lost{by}, too few to say how well the {whose} uncertainty predicts the lost ones."
    return (
        f"The {whose} uncertainty ranks an example that was lost{by} above one that was kept in "
        f"{100 * cell(row, 'risk_auc'):.0f}% of pairs; the most uncertain tenth of the examples that {they} got "
        f"right contains {count(found)} of the {lost:,} lost ones ({percent(found / lost)})."
    )


def _collapsed(row: Row, audit: AuditTables) -> str:
    if not row["collapsed"]:
        return ""
    low, high = cell(row, "collapsed_low"), cell(row, "collapsed_high")
    if row["collapsed"] == row["models"]:
        return f"{'The model is' if row['models'] == 1 else 'All models are'} at chance, so there is no alpha."
    are = "is" if row["collapsed"] == 1 else "are"
    return (
        f"{row['collapsed']} of {row['models']} models {are} at chance ({100 * audit.level:g}% interval "
        f"{100 * low:.0f} to {100 * high:.0f}%). Alpha is computed from the others."
    )


def _evidence(rows: pd.DataFrame, audit: AuditTables) -> str:
    """Whether the data are enough: what they could have missed of a class's loss and of alpha."""
    if (rows["agreement"] == 1).all():  # nothing changed that could have been missed
        return ""
    row = dict(rows.iloc[-1])
    models = int(str(row["models"]))
    parts = [_enough_for_classes(row, audit)]
    if models == 1:
        if not np.isfinite(rows["lost"]).all():
            return "No: counts of one model say nothing about other training runs. Train at least 5, preferably 30."
        parts += [sentence(no_alpha_shown(row, audit))] if _alpha_too_wide(row) else []
        runs = "to say something about other training runs, train at least 5 pairs, preferably 30"
        which = "these two models" if two_models(audit, row) else "these models"
        parts.append(f"Intervals and tests are over test examples of {which}; {runs}.")
        return " ".join(filter(None, parts))
    return " ".join(part for part in [*parts, *_enough_for_alpha(rows, audit)] if part)


def _enough_for_classes(row: Row, audit: AuditTables) -> str:
    """Which loss of a class would have been shown: no, where it is a large one."""
    classes = rows_of(audit.classes, row)
    least = detectable_excess(classes)
    if np.isnan(least) or verdict_of(row) == "collapsed" or row["agreement"] == 1:
        return ""
    if np.isinf(least) and len(lost_more(classes, audit.level)):
        which = "every" if classes["detectable"].isna().all() else "a typical"
        return (
            f"Only for some classes: those named above are shown, but for {which} class the chance of showing a loss "
            "is below nine in ten, even if it lost every example."
        )
    if np.isinf(least):
        return f"No: {no_class_shown(row, audit, classes)}."
    loss = f"{size(least)} more than all examples"
    if least > _LARGE:
        return (
            f"Only for large losses: a typical class would have to lose {loss} for that to be shown nine times in ten."
        )
    return f"For classes yes, if they lost much: a typical class that lost {loss} would be shown nine times in ten."


def _alpha_too_wide(row: Row) -> bool:
    return verdict_of(row) == "?" and bool(1 <= cell(row, "alpha_corrected_detectable") < np.inf)


def _enough_for_alpha(rows: pd.DataFrame, audit: AuditTables) -> list[str]:
    """At which ratios the interval of alpha excludes 1, and what it would take elsewhere."""
    models = sorted({healthy(dict(row)) for _, row in rows.iterrows()} - {0}) or [0]
    one = models == [1]
    who = f"{models[0]} to {models[-1]} models" if len(models) > 1 else f"{models[0]} model{'s' * (not one)}"
    column = "alpha_corrected" if np.isfinite(rows["alpha_corrected"]).any() else "alpha"
    every = len(rows)
    rows = rows[~rows["alpha_corrected_reason"].isin([WITHIN_NOISE, TOO_FEW_EXAMPLES])]  # noise makes alpha too small
    if not len(rows):
        return []
    name = "corrected alpha" if column == "alpha_corrected" else "alpha"
    marks = rows[f"{column}_mark"]
    open_rows, silent = rows[(marks == "?") & (rows["agreement"] != 1)], rows[marks == ""]
    parts = []
    if len(open_rows):
        where = places(open_rows, [number(value) for value in open_rows[column]])
        parts.append(f"{who} {'does' if one else 'do'} not show that {name} differs from 1 {where}.")
        if column == "alpha_corrected":
            least = [r["alpha_corrected_detectable"] for _, r in open_rows.iterrows()]
            shown = listed([number(value) for value in least])
            parts.append(f"Growth by {shown} would have been shown nine times in ten, a fall less often.")
            if max(least) >= 1:
                parts.append("Where this is 1 or more, not even alpha 0 (no class differences left) would be shown.")
        needed = [
            _needed(dict(r), audit)
            for _, r in open_rows.iterrows()
            if column == "alpha" and abs(r["alpha"] - 1) > _ROUNDING and r["alpha_sd"] > 0
        ]
        if needed:
            parts.append(f"With alpha as far from 1 as measured, showing it would take {listed(needed)} models.")
    elif marks.isin(["<", ">"]).all():
        parts.append(_sides(rows, f"{who} show{'s' * one}", name, audit, every=len(rows) == every))
    if len(silent):
        where = places(silent)
        parts.append(f"{where[0].upper() + where[1:] if parts else f'No: {where}'} there is no interval of {name}.")
    return parts


def _sides(rows: pd.DataFrame, who_shows: str, name: str, audit: AuditTables, *, every: bool) -> str:
    """That all these intervals exclude 1, and where something else than compression may be why."""
    other = rows[[verdict_of(dict(row)) not in SHOWN for _, row in rows.iterrows()]]
    where = "at every ratio" if every else places(rows)
    shown = f"{who_shows}{f' {where}' * (not audit.named)} on which side of 1 {name} is"
    if not len(other):
        return f"{shown}."
    why = f"{places(other)} noise of the test set or another training seed may be why"
    return f"No: {why} {name} is not 1." if len(other) == len(rows) else f"{shown}; {why}."


def _needed(row: Row, audit: AuditTables) -> str:
    """How many replicates would show a difference of the size that was seen, nine times in ten."""
    try:
        needed = replicates_needed(
            cell(row, "alpha") - 1, cell(row, "alpha_sd"), alpha=1 - audit.level, most=_MOST_MODELS
        )
    except ValueError:
        return f"more than {_MOST_MODELS:,}"
    return f"about {needed}"
