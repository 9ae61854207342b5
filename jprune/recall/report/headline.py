"""An audit in plain words: what happened to which class, whether classes drifted apart, what cannot be said."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import pandas as pd

from jprune.recall.inference.corrected import WITHIN_NOISE
from jprune.recall.inference.power import replicates_needed
from jprune.recall.tables.frames import UNSTATED, AuditTables

Row = Mapping[str, object]
"""A row of a frame, by column."""

_MOST_MODELS, _ROUNDING = 100_000, 1e-12
_MOST_NAMES = 8
_HANDFUL = 10  # examples; a class with fewer is not what a headline begins with

_VERDICTS = {
    ">": "widened {}",
    "<": "narrowed {}",
    "seed": "narrowed {}, but no more than between two dense training runs",
    "<0": "reversed {}: the weak classes are now the strong ones",
    "=": "stayed the same within the margin {}",
    "?": "are not shown to have changed {}",
    "noise": "cannot be measured by alpha {}: the dense models show no class differences beyond sampling noise",
    "collapsed": "say nothing {} because every model is at chance",
    "": "have no interval {}, with too few models and no predictions",
    "undefined": "cannot be measured by alpha {}, which is undefined",
}


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


def headline(audit: AuditTables) -> str:
    """What happened to which class, whether differences between classes changed, and what cannot be said."""
    last = [dict(row) for _, row in audit.summary.groupby("score", sort=False).tail(1).iterrows()]
    if all(row["agreement"] == 1 for row in last):
        single = all(row["models"] == 1 for row in last) and len(last) == 1
        return (
            "The two models agree on every example."
            if single
            else (f"Dense and {_kind(audit)} models agree on every example.")
        )
    sentences = [_hardest_hit(audit, last), _group_hit(audit, last), _apart(audit, last), _limits(audit, last)]
    return " ".join(sentence for sentence in sentences if sentence)


def findings(audit: AuditTables) -> list[Finding]:
    """Answer, for every score at its highest ratio, what a reader of an audit asks."""
    found = []
    for score in audit.scores:
        rows = audit.summary[audit.summary["score"] == score]
        row = dict(rows.iloc[-1])
        classes = _of(audit.classes, row)
        answers = {
            f"Accuracy {_at(row)}".strip(): _accuracy(row, audit),
            "Classes that lost most": _classes(classes, audit, row),
            "Where the lost examples went": _drift(audit, row),
            "Groups": _groups(audit, row),
            "Differences between classes": _differences(rows, audit),
            "More than the lost accuracy explains?": _beyond_null(row),
            "Confidence": _confidence(audit, row),
            "Examples at risk": _risk(row),
            "Collapsed models": _collapsed(row, audit),
            "Is the evidence enough?": _evidence(rows, audit),
        }
        found += [Finding(score, topic, text) for topic, text in answers.items() if text]
    return found


def subject(audit: AuditTables) -> tuple[str, float]:
    """The score and ratio that the headline begins with."""
    last = [dict(row) for _, row in audit.summary.groupby("score", sort=False).tail(1).iterrows()]
    shown = pd.concat([lost_more(_of(audit.classes, row), audit.level) for row in last])
    shown = shown[shown["support"] >= _HANDFUL]
    row = dict(shown.sort_values("change", kind="stable").iloc[0]) if len(shown) else _lost_most(last)
    return str(row["score"]), _number(row, "ratio")


def _lost_most(last: list[dict[str, object]]) -> dict[str, object]:
    return min(last, key=lambda row: _number(row, "accuracy_change"))


# The headline -----------------------------------------------------------------------------------------


def _hardest_hit(audit: AuditTables, last: list[dict[str, object]]) -> str:
    """The class that lost most among those shown to have lost more than all examples did."""
    collapsed = [row for row in last if _verdict(row) == "collapsed"]
    said = [
        f"All models{_by(audit, row)} are at chance: accuracy {_change_of_accuracy(row)}."
        if row["models"] != 1
        else f"The model{_by(audit, row)} is at chance: accuracy {_change_of_accuracy(row)}."
        for row in collapsed
    ]
    last = [row for row in last if _verdict(row) != "collapsed"]
    if not last:
        return " ".join(said)
    shown = pd.concat([lost_more(_of(audit.classes, row), audit.level) for row in last])
    few, shown = shown[shown["support"] < _HANDFUL], shown[shown["support"] >= _HANDFUL]
    small = [
        f"Class {each['class']} lost {_count(each['lost'])} of {each['support']} test examples, too few to say more."
        for _, each in few.sort_values("change", kind="stable").head(1).iterrows()
        if np.isfinite(each["lost"])
    ]
    return " ".join([*said, _lost_most_class(audit, last, shown), *small])


def _lost_most_class(audit: AuditTables, last: list[dict[str, object]], shown: pd.DataFrame) -> str:
    if not len(shown):
        row = _lost_most(last)
        return (
            f"No class is shown to have lost more than the rest; accuracy {_change_of_accuracy(row)}{_by(audit, row)}."
        )
    hit = dict(shown.sort_values("change", kind="stable").iloc[0])
    row = next(r for r in last if r["score"] == hit["score"])
    rest = _of(audit.classes, row)
    most = float(hit["change"]) <= float(rest["change"][rest["support"] >= _HANDFUL].min())
    lost = -float(str(row["accuracy_change"]))
    overall = (
        f"clearly more than the overall loss of {_size(lost)}"
        if lost > 0
        else f"while all examples together gained {_size(-lost)}"
    )
    digits = 0 if hit["support"] <= 200 else 1
    ends = f"{100 * hit['recall_dense']:.{digits}f} % to {100 * hit['recall']:.{digits}f} %"
    verb = "lost most" if most else "lost more than the rest"
    return f"Class {hit['class']} {verb}{_by(audit, row)}: {ends} of {hit['support']:,} test examples right, {overall}."


def _group_hit(audit: AuditTables, last: list[dict[str, object]]) -> str:
    """The group that lost most among those shown to have lost more than all examples did."""
    if not len(audit.groups):
        return ""
    whole = audit.groups[audit.groups["class"].isna()]
    shown = pd.concat([lost_more(_of(whole, row), audit.level) for row in last])
    if not len(shown):
        return ""
    hit = dict(shown.sort_values("change", kind="stable").iloc[0])
    return (
        f"Of the groups, {hit['attribute']} {hit['group']} lost more than the rest: "
        f"{100 * hit['recall_dense']:.1f} % to {100 * hit['recall']:.1f} % of {hit['support']:,} examples."
    )


def _apart(audit: AuditTables, last: list[dict[str, object]]) -> str:
    """Whether differences between classes changed, scores with one verdict together."""
    parts = []
    last = [row for row in last if _verdict(row) != "collapsed"]
    if not last:
        return ""
    for verdict, verb in _VERDICTS.items():
        rows = [row for row in last if _verdict(row) == verdict]
        if rows:
            named = _listed([f"{_by(audit, row).strip()}{_shown_alpha(row)}".strip() for row in rows])
            parts.append(verb.format(named) + (_reasons(audit, rows) if verdict == "undefined" else ""))
    return f"Differences between classes {'; they '.join(parts)}."


def _reasons(audit: AuditTables, rows: list[dict[str, object]]) -> str:
    found = sorted({str(reason) for row in rows for reason in _of(audit.alphas, row)["reason"]} - {""})
    return f" ({'; '.join(found)})" if found else ""


def _limits(audit: AuditTables, last: list[dict[str, object]]) -> str:
    row = last[0]
    unseen = []
    if _verdict(row) == "?" and np.isfinite(_number(row, "alpha_corrected_detectable")):
        unseen.append(f"a change of alpha by less than {number(_number(row, 'alpha_corrected_detectable'))}")
    classes = _of(audit.classes, row)
    if not len(lost_more(classes, audit.level)) and classes["detectable"].notna().any():
        unseen.append(f"a class that lost {_size(float(classes['detectable'].median()))} more than the rest")
    where = _by(audit, row) if len(last) > 1 else ""
    said = [f"The data could have missed {_listed(unseen)}{where}."] if unseen else []
    if all(row["models"] == 1 for row in last):
        which = "these two models" if len(last) == 1 else "these models"
        said.append(f"This holds for {which}; other training runs may differ.")
    return " ".join(said)


# The answers ------------------------------------------------------------------------------------------


def _accuracy(row: Row, audit: AuditTables) -> str:
    text = _change_of_accuracy(row)
    if np.isfinite(_number(row, "accuracy_change_low")):
        ends = f"{_signed(_number(row, 'accuracy_change_low'))} to {_signed(_number(row, 'accuracy_change_high'))}"
        text += f" ({100 * audit.level:g} % interval over models {ends} points)"
    tests = audit.tests[(audit.tests["test"] == "mcnemar") & (audit.tests["question"] == "accuracy")]
    for test in _of(tests, row).to_dict("records"):
        text += f"; McNemar's test of all examples: {_p(test['p'])}"
    changed = _of(audit.pies, row)
    if len(changed) and row["models"] != 1:
        share = _percent(len(changed) / audit.examples)
        text += f"; {len(changed)} of {audit.examples} examples ({share}) changed the class that most models give them"
    return _sentence(text)


def _change_of_accuracy(row: Row) -> str:
    before, after = _number(row, "accuracy_dense"), _number(row, "accuracy")
    text = f"went from {_percent(before)} to {_percent(after)}"
    change = _number(row, "accuracy_change")
    counts = ""
    if np.isfinite(_number(row, "lost")):
        mean = " (mean over models)" if row["models"] != 1 else ""
        plural = "" if _number(row, "lost") == 1 else "s"
        counts = f", {_count(_number(row, 'lost'))} example{plural} lost and {_count(_number(row, 'won'))} won{mean}"
    return f"{text}, {_points(change)}{counts}"


def _differences(rows: pd.DataFrame, audit: AuditTables) -> str:
    row = dict(rows.iloc[-1])
    verdict = _verdict(row)
    if verdict == "undefined":
        reasons = sorted({str(r) for r in _of(audit.alphas, row)["reason"]} - {""})
        return f"Alpha is undefined: {'; '.join(reasons)}."
    if verdict == "collapsed":
        return "Every model is at chance, so alpha says nothing about classes."
    if verdict == "noise":
        text = f"The dense models show {WITHIN_NOISE}, so there is no corrected alpha"
    elif np.isfinite(_number(row, "alpha_corrected")):
        text = f"corrected alpha {_interval(row, 'alpha_corrected')} {_at(row)}: they {_plain(verdict)}"
        if verdict == "=":
            text += f" (1/{1 + audit.margin:g} to {1 + audit.margin:g})"
        elif verdict == "?":
            text += (
                f"; a change by {number(_number(row, 'alpha_corrected_detectable'))} would be shown nine times in ten"
            )
    else:
        text = f"alpha {_interval(row, 'alpha')} {_at(row)}: they {_plain(verdict)}"
    if np.isfinite(_number(row, "alpha_corrected")) or verdict == "noise":
        text += f". Without the correction for test-set noise alpha is {_interval(row, 'alpha')}"
    if np.isfinite(_number(row, "alpha_seed")):
        text += f"; between two dense training runs it is {_interval(row, 'alpha_seed')}"
    pattern = [
        f"{word} at {_listed([_ratio(ratio) for ratio in rows['ratio'][rows['alpha_mark'] == mark]])}"
        for mark, word in (("<", "below 1"), ("?", "not shown to differ from 1"), (">", "above 1"))
        if (rows["alpha_mark"] == mark).any()
    ]
    if len(rows) > 1 and pattern:
        text += f". Over the ratios alpha is {', '.join(pattern)}"
    if row["alpha_intercept_mark"] != row["alpha_mark"] and np.isfinite(_number(row, "alpha_intercept")):
        text += f". With an intercept, for classes of unequal sizes, it is {_interval(row, 'alpha_intercept')}"
    control = rows[rows["ratio"] == 1]
    if len(control) and row["ratio"] != 1 and control["alpha_mark"].iloc[0] in ("<", ">"):
        text += f". The control, fine-tuned and not pruned, already has {_interval(dict(control.iloc[0]), 'alpha')}"
    return _sentence(text)


def _beyond_null(row: Row) -> str:
    if not np.isfinite(_number(row, "alpha_over_null")):
        return ""
    answer = {
        ">": "yes, more than errors that grow in proportion in every class would bring",
        "<": "no: errors that grow in proportion in every class would bring more",
        "?": "not shown: the data do not separate it from errors that grow in proportion in every class",
        "": "too few models to say, compared with errors that grow in proportion in every class",
    }[str(row["alpha_over_null_mark"])]
    return _sentence(
        f"{answer} (alpha_null {number(_number(row, 'alpha_null'))}, alpha / alpha_null "
        f"{_interval(row, 'alpha_over_null')})"
    )


def _classes(classes: pd.DataFrame, audit: AuditTables, row: Row) -> str:
    present = classes[classes["support"] > 0]
    if len(present) < 2:
        return ""
    most = present[present["change"] < 0].sort_values("change", kind="stable").head(3)
    if not len(most):
        return "No class has a lower recall than before, on average over the models."
    counted = row["models"] == 1 and np.isfinite(present["lost"]).any()
    text = "; ".join(
        f"{each['class']}: {_points(each['change'])} ({_percent(each['recall_dense'])} to {_percent(each['recall'])} "
        f"of {each['support']:,}" + (f", {each['lost']:.0f} lost and {each['won']:.0f} won)" if counted else ")")
        for _, each in most.iterrows()
    )
    if not np.isfinite(present["p_holm"]).any():
        return f"{text}. Whether that is more than the rest lost needs predictions, or models that differ."
    beyond = lost_more(classes, audit.level).sort_values("excess", ascending=False, kind="stable")
    if not len(beyond):
        found = float(present["detectable"].median()) if present["detectable"].notna().any() else float("nan")
        least = f"; a typical class would have had to lose {_size(found)} more" if np.isfinite(found) else ""
        return f"{text}. No class is shown to have lost more than all examples did{least}."
    more = f" and {len(beyond) - _MOST_NAMES} more" if len(beyond) > _MOST_NAMES else ""
    named = _listed([str(name) for name in beyond["class"][:_MOST_NAMES]]) + more
    return f"{text}. Shown to have lost more than all examples did: {named}."


def lost_more(classes: pd.DataFrame, level: float) -> pd.DataFrame:
    """The classes or groups shown to have lost more than all examples did, at 1 - level after Holm's correction."""
    shown: pd.DataFrame = classes[(classes["excess"] > 0) & (classes["change"] < 0) & (classes["p_holm"] < 1 - level)]
    return shown


def _drift(audit: AuditTables, row: Row) -> str:
    rows = _of(audit.drift, row)
    rows = rows[rows["lost"] >= 1].head(3)
    if not len(rows):
        return ""
    return _sentence(
        "; ".join(
            f"{_count(each['lost'])} of class {each['class']} to {each['predicted']} ({_percent(each['share'])} of "
            f"its lost)"
            for _, each in rows.iterrows()
        )
    )


def _groups(audit: AuditTables, row: Row) -> str:
    if not len(audit.groups):
        return ""
    rows = _of(audit.groups[audit.groups["class"].isna()], row)
    shown = lost_more(rows, audit.level)
    if not len(shown):
        return "No group is shown to have lost more than all examples did."
    return _sentence(
        "shown to have lost more than all examples did: "
        + "; ".join(
            f"{each['attribute']} {each['group']} ({_percent(each['recall_dense'])} to {_percent(each['recall'])} "
            f"{each['support']:,} examples, {_size(each['excess'])} more, interval "
            f"{_signed(each['excess_low'])} to {_signed(each['excess_high'])})"
            for _, each in shown.sort_values("excess", ascending=False).iterrows()
        )
    )


def _confidence(audit: AuditTables, row: Row) -> str:
    rows = _of(audit.probabilities, row)
    rows = rows[rows["class"].isna()]
    if not len(rows):
        return ""
    each = dict(rows.iloc[0])
    divergence = f"; KL divergence {each['kl']:.3g} nats an example" if np.isfinite(each["kl"]) else ""
    top = (
        f"; top-{each['k']} recall {_percent(each['top_k_dense'])} to {_percent(each['top_k'])}"
        if each["k"] > 1
        else ""
    )
    return _sentence(
        f"mean confidence {_percent(each['confidence_dense'])} to {_percent(each['confidence'])}, expected calibration "
        f"error {_percent(each['ece_dense'])} to {_percent(each['ece'])}{divergence}{top}"
    )


def _risk(row: Row) -> str:
    if not np.isfinite(float(str(row.get("risk_auc", "nan")))):
        return ""
    return (
        f"The dense models' uncertainty ranks an example that was lost above one that was kept in "
        f"{100 * _number(row, 'risk_auc'):.0f} % of pairs; the most uncertain tenth of the examples that they got "
        f"right holds {100 * _number(row, 'risk_top'):.0f} % of the lost ones."
    )


def _collapsed(row: Row, audit: AuditTables) -> str:
    if not row["collapsed"]:
        return ""
    low, high = _number(row, "collapsed_low"), _number(row, "collapsed_high")
    return (
        f"{row['collapsed']} of {row['models']} models are at chance ({100 * audit.level:g} % interval "
        f"{100 * low:.0f} to {100 * high:.0f} %). Alpha is of the others."
    )


def _evidence(rows: pd.DataFrame, audit: AuditTables) -> str:
    row = dict(rows.iloc[-1])
    models = int(str(row["models"]))
    if models == 1:
        if not np.isfinite(rows["lost"]).all():
            return "No: counts of one model say nothing about other training runs. Train at least 5, better 30."
        return (
            "For these two models yes: intervals and tests are over test examples. Other training runs may differ: to "
            "speak of them, train at least 5 pairs, better 30."
        )
    counts = sorted({int(count) for count in rows["models"]})
    who = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(models)
    column = "alpha_corrected" if np.isfinite(rows["alpha_corrected"]).any() else "alpha"
    name = "corrected alpha" if column == "alpha_corrected" else "alpha"
    marks = rows[f"{column}_mark"]
    open_rows, silent = rows[marks == "?"], rows[marks == ""]
    parts = []
    if len(open_rows):
        named = _listed([f"{_ratio(r['ratio'], r['score'])} ({number(r[column])})" for _, r in open_rows.iterrows()])
        parts.append(f"{who} models do not show that {name} differs from 1 at {named}.")
        if column == "alpha_corrected":
            least = [number(r["alpha_corrected_detectable"]) for _, r in open_rows.iterrows()]
            parts.append(f"Differences of {_listed(least)} from 1 would have been shown nine times in ten.")
        needed = [
            _needed(dict(r), audit)
            for _, r in open_rows.iterrows()
            if abs(r["alpha"] - 1) > _ROUNDING and r["alpha_sd"] > 0
        ]
        if needed:
            parts.append(f"With alpha as far from 1 as measured, showing it would take {_listed(needed)} models.")
    elif not len(silent):
        parts.append(f"{who} models show at every ratio on which side of 1 {name} is.")
    if len(silent):
        named = _listed([_ratio(ratio, score) for ratio, score in zip(silent["ratio"], silent["score"], strict=True)])
        lead = "At" if parts else "No: at"
        parts.append(f"{lead} {named} there is no interval of {name}.")
    return " ".join(parts)


def _needed(row: Row, audit: AuditTables) -> str:
    """How many replicates would show a difference of the size that was seen, nine times in ten."""
    try:
        needed = replicates_needed(
            _number(row, "alpha") - 1, _number(row, "alpha_sd"), alpha=1 - audit.level, most=_MOST_MODELS
        )
    except ValueError:
        return f"more than {_MOST_MODELS:,}"
    return f"about {needed}"


# Words ------------------------------------------------------------------------------------------------


def _of(frame: pd.DataFrame, row: Row) -> pd.DataFrame:
    """The rows of a table about the score and ratio of a row of another."""
    found: pd.DataFrame = frame[(frame["score"] == row["score"]) & (frame["ratio"] == row["ratio"])]
    return found


def _verdict(row: Row) -> str:
    """Which of the verdicts a row of the summary comes to."""
    if row["alpha_corrected_reason"] == "every model has collapsed":
        return "collapsed"
    if row["alpha_corrected_reason"] == WITHIN_NOISE and np.isfinite(_number(row, "alpha")):
        return "noise"
    corrected = np.isfinite(_number(row, "alpha_corrected"))
    if not corrected and not np.isfinite(_number(row, "alpha")):
        return "undefined"
    name = "alpha_corrected" if corrected else "alpha"
    mark = str(row[f"{name}_mark"])
    if _number(row, f"{name}_high") < 0:
        return "<0"
    if mark == "<" and np.isfinite(_number(row, "alpha_seed_low")) and not _below_seeds(row):
        return "seed"
    return "=" if corrected and mark == "?" and row["alpha_corrected_equal"] else mark


def _plain(verdict: str) -> str:
    return _VERDICTS[verdict].replace(" {}", "")


def _below_seeds(row: Row) -> bool:
    """Whether alpha lies below what another training seed has."""
    high = _number(row, "alpha_high")
    return (high if np.isfinite(high) else _number(row, "alpha")) < _number(row, "alpha_seed_low")


def _shown_alpha(row: Row) -> str:
    for name, words in (("alpha_corrected", "corrected alpha"), ("alpha", "alpha")):
        if np.isfinite(_number(row, name)) and row["alpha_corrected_reason"] != WITHIN_NOISE:
            low, high = _number(row, f"{name}_low"), _number(row, f"{name}_high")
            ends = f", {number(low)} to {number(high)}" if np.isfinite(low) else ""
            return f" ({words} {number(_number(row, name))}{ends})"
    return ""


def _kind(audit: AuditTables) -> str:
    """What the models that are compared with the dense ones are called."""
    if not audit.named:
        return "pruned"
    return audit.scores[0] if len(audit.scores) == 1 else "compared"


def _by(audit: AuditTables, row: Row) -> str:
    if row["ratio"] == UNSTATED:
        return f" in {row['score']}"
    if audit.scores == ("pruned",):
        return f" {_at(row)}"
    return f" under {row['score']} {_at(row)}"


def _at(row: Row) -> str:
    if row["ratio"] == UNSTATED:
        return f"of {row['score']}"
    return "at the control's ratio 1" if row["ratio"] == 1 else f"at {row['ratio']:g}x compression"


def _ratio(ratio: float, score: str = "") -> str:
    if ratio == UNSTATED:
        return score
    return "the control" if ratio == 1 else f"{ratio:g}x"


def _interval(row: Row, name: str) -> str:
    low, high = _number(row, f"{name}_low"), _number(row, f"{name}_high")
    ends = f" ({number(low)} to {number(high)})" if np.isfinite(low) else ""
    return number(_number(row, name)) + ends


def _number(row: Row, name: str) -> float:
    return float(row[name])  # type: ignore[arg-type]


def number(value: float) -> str:
    """A number in a sentence; n/a where it is undefined, and more digits where two would be 0."""
    if not np.isfinite(value):
        return "n/a"
    return f"{value:.2f}" if abs(value) >= 0.005 or value == 0 else f"{value:.1g}"


def _percent(value: float) -> str:
    text = f"{100 * value:.1f}"
    if text in ("100.0", "0.0") and value not in (0, 1):  # never a whole where some are missing
        text = f"{100 * value:.2g}" if value < 0.5 else f"{100 * value:.{_digits(1 - value)}f}"
    return f"{text} %"


def _digits(distance: float) -> int:
    return int(min(6, np.ceil(-np.log10(100 * distance))))


def _points(value: float) -> str:
    return "no change" if value == 0 else f"{_signed(value)} points"


def _size(value: float) -> str:
    """A distance in points, with enough digits that it is not 0."""
    points = 100 * value
    return f"{points:.1f} points" if points >= 0.05 or value == 0 else f"{points:.1g} points"


def _signed(value: float) -> str:
    points = 100 * value
    if value == 0:
        return "0"
    return f"{points:+.1f}" if abs(points) >= 0.05 else f"{points:+.1g}"


def _count(value: float) -> str:
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def _p(value: float) -> str:
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.4f}"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
