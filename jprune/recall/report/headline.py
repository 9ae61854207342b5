"""The headline of an audit: the class that lost most, whether class differences grew, and what cannot be shown."""

import numpy as np
import pandas as pd

from jprune.recall.inference.corrected import WITHIN_NOISE
from jprune.recall.report.verdicts import (
    VERDICTS,
    detectable_excess,
    lost_more,
    lost_most,
    reasons,
    rows_of,
    verdict_of,
)
from jprune.recall.report.words import (
    Row,
    at_score,
    cell,
    change_of_accuracy,
    count,
    kind,
    listed,
    no_alpha_shown,
    no_class_shown,
    number,
    sentence,
    size,
)
from jprune.recall.tables.frames import AuditTables

FEWEST = 10  # examples; a class with fewer is not what a headline begins with


def headline(audit: AuditTables) -> str:
    """The class that lost most, whether differences between classes changed, and what cannot be shown."""
    last = [dict(row) for _, row in audit.summary.groupby("score", sort=False).tail(1).iterrows()]
    if all(row["agreement"] == 1 for row in last):
        single = all(row["models"] == 1 for row in last) and len(last) == 1
        return (
            "The two models agree on every example."
            if single
            else (f"Dense and {kind(audit)} models agree on every example.")
        )
    sentences = [_hardest_hit(audit, last), _group_hit(audit, last), _apart(audit, last), _limits(audit, last)]
    return " ".join(sentence for sentence in sentences if sentence)


def subject(audit: AuditTables) -> tuple[str, float]:
    """The score and ratio that the headline begins with."""
    last = [dict(row) for _, row in audit.summary.groupby("score", sort=False).tail(1).iterrows()]
    shown = pd.concat([lost_more(rows_of(audit.classes, row), audit.level) for row in last])
    shown = shown[shown["support"] >= FEWEST]
    row = dict(shown.sort_values("change", kind="stable").iloc[0]) if len(shown) else lost_most(last)
    return str(row["score"]), cell(row, "ratio")


def _hardest_hit(audit: AuditTables, last: list[dict[str, object]]) -> str:
    """The class that lost most among those shown to have lost more than all examples did."""
    collapsed = [row for row in last if verdict_of(row) == "collapsed"]
    sentences = [
        f"All models{at_score(audit, row)} are at chance: accuracy {change_of_accuracy(row)}."
        if row["models"] != 1
        else f"The model{at_score(audit, row)} is at chance: accuracy {change_of_accuracy(row)}."
        for row in collapsed
    ]
    sentences += [
        f"{row['collapsed']} of {row['models']} models{at_score(audit, row)} are at chance; accuracy and classes "
        f"below include them."
        for row in last
        if row not in collapsed and row["collapsed"]
    ]
    last = [row for row in last if verdict_of(row) != "collapsed"]
    if not last:
        return " ".join(sentences)
    shown = pd.concat([lost_more(rows_of(audit.classes, row), audit.level) for row in last])
    few, shown = shown[shown["support"] < FEWEST], shown[shown["support"] >= FEWEST]
    small = [
        f"Class {each['class']} lost {count(each['lost'])} of {each['support']} test examples, too few to say more."
        for _, each in few.sort_values("change", kind="stable").head(1).iterrows()
        if np.isfinite(each["lost"])
    ]
    return " ".join([*sentences, _lost_most_class(audit, last, shown), *small])


def _lost_most_class(audit: AuditTables, last: list[dict[str, object]], shown: pd.DataFrame) -> str:
    if not len(shown):
        row = lost_most(last)
        models = at_score(audit, row)
        return f"No single class is shown to have lost more than the rest{models}; accuracy {change_of_accuracy(row)}."
    hit = dict(shown.sort_values("change", kind="stable").iloc[0])
    row = next(r for r in last if r["score"] == hit["score"])
    rest = rows_of(audit.classes, row)
    most = float(hit["change"]) <= float(rest["change"][rest["support"] >= FEWEST].min())
    lost = -float(str(row["accuracy_change"]))
    overall = (
        f"clearly more than the overall loss of {size(lost)}"
        if lost > 0
        else f"while all examples together gained {size(-lost)}"
    )
    digits = 0 if hit["support"] <= 200 else 1
    ends = f"{100 * hit['recall_dense']:.{digits}f} % to {100 * hit['recall']:.{digits}f} %"
    verb = "lost most" if most else "lost more than the rest"
    models = at_score(audit, row)
    return f"Class {hit['class']} {verb}{models}: {ends} of {hit['support']:,} test examples right, {overall}."


def _group_hit(audit: AuditTables, last: list[dict[str, object]]) -> str:
    """The group that lost most among those shown to have lost more than all examples did."""
    if not len(audit.groups):
        return ""
    whole = audit.groups[audit.groups["class"].isna()]
    shown = pd.concat([lost_more(rows_of(whole, row), audit.level) for row in last])
    if not len(shown):
        return ""
    hit = dict(shown.sort_values("change", kind="stable").iloc[0])
    named = str(hit["group"]) if hit["attribute"] == "group" else f"{hit['group']} ({hit['attribute']})"
    return (
        f"Of the groups, {named} lost more than the rest: {100 * hit['recall_dense']:.1f} % to "
        f"{100 * hit['recall']:.1f} % of {hit['support']:,} test examples right."
    )


def _apart(audit: AuditTables, last: list[dict[str, object]]) -> str:
    """Whether differences between classes changed, scores with one verdict together."""
    parts = []
    last = [row for row in last if verdict_of(row) != "collapsed"]
    if not last:
        return ""
    for verdict, verb in VERDICTS.items():
        rows = [row for row in last if verdict_of(row) == verdict]
        if rows:
            named = listed([f"{at_score(audit, row).strip()}{_shown_alpha(row)}".strip() for row in rows])
            parts.append(verb.format(named) + (reasons(audit, rows) if verdict == "undefined" else ""))
    return f"Differences between classes {'; they '.join(parts)}."


def _shown_alpha(row: Row) -> str:
    for name, words in (("alpha_corrected", "corrected alpha"), ("alpha", "alpha")):
        if np.isfinite(cell(row, name)) and row["alpha_corrected_reason"] != WITHIN_NOISE:
            low, high = cell(row, f"{name}_low"), cell(row, f"{name}_high")
            ends = f", {number(low)} to {number(high)}" if np.isfinite(low) else ""
            return f" ({words} {number(cell(row, name))}{ends})"
    return ""


def _limits(audit: AuditTables, last: list[dict[str, object]]) -> str:
    """What the data could have missed under the first score that is not at chance, and which models it is about."""
    sentences = []
    for row in [row for row in last if verdict_of(row) != "collapsed"][:1]:
        unseen, alpha = [], cell(row, "alpha_corrected_detectable")
        where = at_score(audit, row) if len(last) > 1 else ""
        first = f"{where.strip()}, " if where else ""
        if verdict_of(row) == "?" and alpha < 1:
            unseen.append(f"a change of alpha by less than {number(alpha)}")
        classes = rows_of(audit.classes, row)
        excess = np.nan if len(lost_more(classes, audit.level)) else detectable_excess(classes)
        if np.isfinite(excess):
            unseen.append(f"a class that lost up to {size(excess)} more than the overall loss")
        sentences += [f"The data could have missed {listed(unseen)}{where}."] if unseen else []
        if verdict_of(row) == "?" and 1 <= alpha < np.inf:
            sentences.append(sentence(f"{first}{no_alpha_shown(row, audit)}"))
        if np.isinf(excess):
            sentences.append(sentence(f"{first}{no_class_shown(row, audit, classes)}"))
    if all(row["models"] == 1 for row in last):
        which = "these two models" if len(last) == 1 else "these models"
        sentences.append(f"This holds for {which}; other training runs may differ.")
    return " ".join(sentences)
