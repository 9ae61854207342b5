"""An audit in plain words: which classes lost most, is it more than their share, is the evidence enough."""

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jprune.recall.inference.power import replicates_needed
from jprune.recall.tables.frames import AuditTables

_Row = Any  # a row of a frame, by column
_MOST_MODELS, _ROUNDING = 100_000, 1e-12


_VERDICTS = {
    ">": "grew",
    "<": "shrank",
    "<0": "turned around, the weak classes now being the strong ones,",
    "?": "are not shown to have changed",
    "": "were measured on too few models to judge",
    "undefined": "cannot be compared, alpha being undefined,",
}


class Finding(NamedTuple):
    """One answer of an audit.

    Attributes:
      score: which score it is about.
      topic: what it answers.
      text: the answer, a sentence or two.
    """

    score: str
    topic: str
    text: str


def headline(audit: AuditTables) -> str:
    """Say in two sentences what happened to the differences between classes at the highest ratio."""
    last = audit.summary.groupby("score", sort=False).tail(1)
    told = []
    for verdict, verb in _VERDICTS.items():
        rows = [row for _, row in last.iterrows() if _verdict(row) == verdict]
        if rows:
            alphas = [f" (alpha {number(row['alpha'])})" if np.isfinite(row["alpha"]) else "" for row in rows]
            named = _listed([_by(audit, row) + alpha for row, alpha in zip(rows, alphas, strict=True)])
            told.append(f"{verb} {named}")
    sentence = f"Differences between classes {'; they '.join(told)}."
    worst = _hardest_hit(audit, last)
    return f"{sentence} {worst}" if worst else sentence


def findings(audit: AuditTables) -> list[Finding]:
    """Answer, for every score at its highest ratio, what a reader of an audit asks."""
    found = []
    for score in audit.scores:
        rows = audit.summary[audit.summary["score"] == score]
        row = rows.iloc[-1]
        classes = audit.classes[(audit.classes["score"] == score) & (audit.classes["ratio"] == row["ratio"])]
        answers = {
            f"Accuracy at {_times(row)}": _accuracy(row, audit),
            "Differences between classes": _differences(rows, audit),
            "More than the lost accuracy explains?": _beyond_null(row, audit),
            "Classes that lost most": _classes(classes, audit),
            "Is the evidence enough?": _evidence(rows, audit),
        }
        found += [Finding(score, topic, text) for topic, text in answers.items() if text]
    return found


def _accuracy(row: _Row, audit: AuditTables) -> str:
    text = f"from {_percent(row['accuracy_dense'])} to {_percent(row['accuracy'])}, {_points(row['accuracy_change'])}"
    if np.isfinite(row["accuracy_change_low"]):
        ends = f"{100 * row['accuracy_change_low']:+.1f} to {100 * row['accuracy_change_high']:+.1f}"
        text += f" ({100 * audit.level:g} % interval {ends})"
    changed = audit.pies[(audit.pies["score"] == row["score"]) & (audit.pies["ratio"] == row["ratio"])]
    if len(changed):
        share = _percent(len(changed) / audit.examples)
        text += f"; {len(changed)} of {audit.examples} examples ({share}) changed the class that most models give them"
    return _sentence(text)


def _differences(rows: pd.DataFrame, audit: AuditTables) -> str:
    row = rows.iloc[-1]
    if not np.isfinite(row["alpha"]):
        return (
            "Alpha is undefined: " + "; ".join(sorted({str(r) for r in _of(audit.alphas, row)["reason"]} - {""})) + "."
        )
    meaning = {
        ">": "they grew",
        "<": "they shrank",
        "<0": "they turned around, the weak classes now being the strong ones",
        "?": "no change is shown",
        "": "no interval, too few models",
    }
    text = f"alpha {_interval(row, 'alpha')} at {_times(row)}: {meaning[_verdict(row)]}"
    pattern = [
        f"{word} at {_listed([_ratio(ratio) for ratio in rows['ratio'][rows['alpha_mark'] == mark]])}"
        for mark, word in (("<", "below 1"), ("?", "not told from 1"), (">", "above 1"))
        if (rows["alpha_mark"] == mark).any()
    ]
    if len(rows) > 1 and pattern:
        text += f". Over the ratios it is {', '.join(pattern)}"
    if row["alpha_intercept_mark"] != row["alpha_mark"] and np.isfinite(row["alpha_intercept"]):
        text += f". With an intercept, for classes of unequal sizes, it is {_interval(row, 'alpha_intercept')}"
    control = rows[rows["ratio"] == 1]
    if len(control) and control["alpha_mark"].iloc[0] in ("<", ">"):
        text += f". The control, fine-tuned and not pruned, has {_interval(control.iloc[0], 'alpha')} already"
    return _sentence(text)


def _beyond_null(row: _Row, audit: AuditTables) -> str:
    if not np.isfinite(row["alpha_over_null"]):
        return ""
    answer = {
        ">": "yes, by more than errors that grow in proportion in every class would bring",
        "<": "no: errors that grow in proportion in every class would bring more",
        "?": "not shown: it is in line with errors that grow in proportion in every class",
        "": "too few models to say; set against errors that grow in proportion in every class",
    }[row["alpha_over_null_mark"]]
    return _sentence(
        f"{answer} (alpha_null {number(row['alpha_null'])}, alpha / alpha_null {_interval(row, 'alpha_over_null')})"
    )


def _classes(classes: pd.DataFrame, audit: AuditTables) -> str:
    present = classes[classes["support"] > 0]
    if len(present) < 2:
        return ""
    most = present[present["change"] < 0].sort_values("change", kind="stable").head(3)
    if not len(most):
        return "No class has a lower recall after pruning, on average over the models."
    text = "; ".join(
        f"{row['class']}: {_points(row['change'])} ({_percent(row['recall_dense'])} to {_percent(row['recall'])})"
        for _, row in most.iterrows()
    )
    if not np.isfinite(present["p_holm"]).any():
        return f"{text}. Whether that is more than their share cannot be told without replicates that differ."
    beyond = lost_more(classes, audit.level).sort_values("excess", ascending=False, kind="stable")
    if not len(beyond):
        return f"{text}. No class is shown to have lost more than its share."
    named = _listed([str(name) for name in beyond["class"][:8]]) + (" and more" if len(beyond) > 8 else "")
    return f"{text}. Shown to have lost more than {'its' if len(beyond) == 1 else 'their'} share: {named}."


def lost_more(classes: pd.DataFrame, level: float) -> pd.DataFrame:
    """The classes shown to have lost more than the accuracy did, at 1 - level after Holm's correction."""
    return classes[(classes["excess"] > 0) & (classes["p_holm"] < 1 - level)]


def _evidence(rows: pd.DataFrame, audit: AuditTables) -> str:
    row = rows.iloc[-1]
    models = int(row["models"])
    from_examples = ""
    if "alpha_examples_low" in rows and np.isfinite(row["alpha_examples_low"]):
        low, high = number(row["alpha_examples_low"]), number(row["alpha_examples_high"])
        from_examples = f" Another test set like this one would put alpha at {_times(row)} between {low} and {high}."
    if models == 1:
        return f"No: one model says nothing about other training seeds. Train at least 5, better 30.{from_examples}"
    counts = sorted({int(count) for count in rows["models"]})
    who = f"{counts[0]} to {counts[-1]}" if len(counts) > 1 else str(models)
    open_rows, silent = rows[rows["alpha_mark"] == "?"], rows[rows["alpha_mark"] == ""]
    told = []
    if len(open_rows):
        named = _listed([f"{_ratio(r['ratio'])} ({number(r['alpha'])})" for _, r in open_rows.iterrows()])
        told.append(f"{who} models do not tell alpha from 1 at {named}.")
        needed = [_needed(r, audit) for _, r in open_rows.iterrows() if abs(r["alpha"] - 1) > _ROUNDING]
        if needed:
            told.append(f"If those were the true values, showing it would take {_listed(needed)} models.")
    elif not len(silent):
        told.append(f"{who} models tell alpha from 1 at every ratio.")
    if len(silent):
        named = _listed([_ratio(ratio) for ratio in silent["ratio"]])
        lead = "At" if told else "No: at"
        told.append(f"{lead} {named} fewer than two models have an alpha, so that there is no interval.")
    return " ".join(told) + from_examples


def _needed(row: _Row, audit: AuditTables) -> str:
    """How many replicates would show a difference of the size that was seen, nine times in ten."""
    try:
        needed = replicates_needed(row["alpha"] - 1, row["alpha_sd"], alpha=1 - audit.level, most=_MOST_MODELS)
    except ValueError:
        return f"more than {_MOST_MODELS}"
    return f"about {needed}"


def _hardest_hit(audit: AuditTables, last: pd.DataFrame) -> str:
    found = pd.concat([lost_more(_of(audit.classes, row), audit.level) for _, row in last.iterrows()])
    if not len(found):
        return ""
    row = found.sort_values("excess", kind="stable").iloc[-1]
    return (
        f"Hardest hit: class {row['class']}, from {_percent(row['recall_dense'])} to {_percent(row['recall'])} recall "
        f"{_by(audit, row)}."
    )


def _of(frame: pd.DataFrame, row: _Row) -> pd.DataFrame:
    """The rows of a table about the score and ratio of a row of another."""
    found: pd.DataFrame = frame[(frame["score"] == row["score"]) & (frame["ratio"] == row["ratio"])]
    return found


def _verdict(row: _Row) -> str:
    """Which of the verdicts a row of the summary comes to."""
    if not np.isfinite(row["alpha"]):
        return "undefined"
    return "<0" if row["alpha_high"] < 0 else str(row["alpha_mark"])


def _by(audit: AuditTables, row: _Row) -> str:
    if audit.scores == ("pruned",):
        return f"at {_times(row)}"
    return f"under {row['score']} at {_times(row)}"


def _times(row: _Row) -> str:
    return "the control's ratio 1" if row["ratio"] == 1 else f"{row['ratio']:g}x compression"


def _ratio(ratio: float) -> str:
    return "the control" if ratio == 1 else f"{ratio:g}x"


def _interval(row: _Row, name: str) -> str:
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    ends = f" ({number(low)} to {number(high)})" if np.isfinite(low) else ""
    return number(row[name]) + ends


def number(value: float) -> str:
    """A number as the words tell it; n/a where it is undefined."""
    return f"{value:.2f}" if np.isfinite(value) else "n/a"


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


def _points(value: float) -> str:
    return f"{100 * value:+.1f} points"


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."
