"""The headline of an audit: the classes that lost most, whether weak classes fell behind, and what cannot be shown."""

import numpy as np
import pandas as pd

from jprune.recall.inference.corrected import TOO_FEW_EXAMPLES, WITHIN_NOISE
from jprune.recall.report.verdicts import (
    described,
    detectable_excess,
    evenness,
    gained_less,
    lost_less,
    lost_more,
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
    dense_models,
    estimate,
    kind,
    listed,
    no_alpha_shown,
    no_class_shown,
    not_shown,
    number,
    one_dense,
    p_value,
    percent,
    sentence,
    size,
    two_models,
    what_a_test_needs,
)
from jprune.recall.tables.frames import AuditTables

FEWEST = 10  # examples; a class with fewer is not what a headline begins with
_WITH_ENOUGH = f"class with {FEWEST} or more test examples"
_MOST_SCORES = 2  # in sentences; the tables have the others
_MOST_CLASSES = 3  # by name
_UNEQUAL = 1.5  # ratio of the largest to the smallest class
_EQUAL = 1e-9  # difference of two changes of recall that are a tie

ALPHA_MEANS = "above 1 weak classes fell further behind strong ones relative to accuracy, below 1 they came closer"


def headline(audit: AuditTables) -> str:
    """The classes that lost most, whether weak classes fell further behind strong ones, and what cannot be shown.

    With several scores there is a group of sentences for each of the two with the largest losses, the worst first.
    """
    last = _worst_first(audit)
    if (audit.summary["agreement"] == 1).all():
        single = len(audit.summary) == 1 and two_models(audit, last[0])
        return (
            "The two models agree on every example."
            if single
            else (f"Dense and {kind(audit)} models agree on every example.")
        )
    sentences = [_of_score(audit, row, first=row is last[0]) for row in last[:_MOST_SCORES]]
    others = [str(row["score"]) for row in last[_MOST_SCORES:]]
    if others:
        named = listed(others[:_MOST_CLASSES]) if len(others) <= _MOST_CLASSES else _and_more(others)
        sentences.append(f"The tables have the other {'sets of models' if audit.named else 'scores'}: {named}.")
    if all(row["models"] == 1 for row in last):
        which = "these two models" if len(audit.summary) == 1 and two_models(audit, last[0]) else "these models"
        sentences.append(f"This holds for {which}; other training runs may differ.")
    elif one_dense(audit):
        sentences.append(
            "This holds for this dense model; with another one the classes that lost most and alpha may differ."
        )
    return " ".join(sentences)


def subject(audit: AuditTables) -> tuple[str, float]:
    """The score and ratio that the headline begins with."""
    row = _worst_first(audit)[0]
    return str(row["score"]), cell(row, "ratio")


def _worst_first(audit: AuditTables) -> list[dict[str, object]]:
    """The last ratio of every score: first those at chance, then by the largest loss of a class that is named.

    Scores without a named class come after these, by their loss of accuracy.
    """
    last = [dict(row) for _, row in audit.summary.groupby("score", sort=False).tail(1).iterrows()]

    def key(row: dict[str, object]) -> tuple[int, float]:
        if verdict_of(row) == "collapsed":
            return 0, cell(row, "accuracy_change")
        named = _named(audit, row)
        return (1, float(named["change"].iloc[0])) if len(named) else (2, cell(row, "accuracy_change"))

    return sorted(last, key=key)


def _of_score(audit: AuditTables, row: dict[str, object], *, first: bool) -> str:
    """The sentences about one score; what could have been missed is said of the first only."""
    where = at_score(audit, row)
    if row["agreement"] == 1:
        agree = "model{} agrees" if row["models"] == 1 else "models{} agree"
        said = f"The {agree.format(where)} with the {dense_models(audit, row['score'])} on every example."
        return f"{said} {_lower_ratio(audit, row) or _lower_accuracy(audit, row)}".strip()
    named = _named(audit, row)
    if verdict_of(row) == "collapsed":
        who, are = ("The model", "is") if row["models"] == 1 else ("All models", "are")
        recall = rows_of(audit.classes, row)["recall"].mean()
        uneven = cell(row, "accuracy") > _UNEQUAL * recall  # right about most examples, of few classes
        why = f" (mean recall over the classes {100 * recall:.1f}%)" if uneven else ""
        said = f"{who}{where} {are} at chance{why}: accuracy {change_of_accuracy(row, audit.level)}."
        lost = f" {_lost_most(audit, row, named)}" if uneven and len(named) else ""
        return said + lost + _dense_at_chance(audit, row)
    are, them = ("is", "it") if row["collapsed"] == 1 else ("are", "them")
    of_all = f"{row['collapsed']} of {row['models']} models{where}"
    parts = [
        f"{of_all} {are} at chance; accuracy and classes below include {them}." if row["collapsed"] else "",
        _lost_most(audit, row, named) + _gained(audit, row) if len(named) else _none_named(audit, row),
        _small_class(audit, row),
        "" if len(named) else _lower_ratio(audit, row),
        _group_hit(audit, row),
        _apart(audit, row, len(named), first=first),
        _limits(audit, row) if first else "",
    ]
    return " ".join(part for part in parts if part)


def _named(audit: AuditTables, row: Row) -> pd.DataFrame:
    """The classes with enough examples that are shown to have lost more than all examples did, the worst first."""
    shown = lost_more(rows_of(audit.classes, row), audit.level)
    return shown[shown["support"] >= FEWEST].sort_values("change", kind="stable")


def _lost_most(audit: AuditTables, row: Row, named: pd.DataFrame) -> str:
    """The class, or the classes in a tie, that lost most, and the others that are shown to have lost more."""
    rest = rows_of(audit.classes, row)
    worst = float(named["change"].iloc[0])
    most = worst <= float(rest["change"][rest["support"] >= FEWEST].min()) + _EQUAL
    tie = named[named["change"] <= worst + _EQUAL]
    lost, where = -cell(row, "accuracy_change"), at_score(audit, row)
    overall = (
        f"significantly more than the overall loss of {size(lost)}{not_shown(row, audit.level)}"
        if lost > _EQUAL
        else f"while all examples together gained {size(-lost)}{not_shown(row, audit.level)}"
        if lost < -_EQUAL
        else "while the overall accuracy is the same"
    )
    verb = "lost most" if most else "lost more than the rest"
    smaller = most and float(rest["change"][rest["support"] < FEWEST].min()) < worst - _EQUAL  # lost even more
    of = f"Of the classes with {FEWEST} or more test examples, " if smaller else ""
    if len(tie) == 1:
        hit = named.iloc[0]
        text = f"{of or 'Class '}{hit['class']} {verb}{where}: {_change_of_recall(hit)}, {overall}."
    else:
        changes = [_change_of_recall(hit) for _, hit in tie.head(_MOST_CLASSES).iterrows()]
        fell = listed([changes[0], *(change.removeprefix("recall fell ") for change in changes[1:])])
        names = _and_more([str(name) for name in tie["class"]])
        text = f"{of or 'Classes '}{names} {verb}, and equally{',' * bool(where)}{where}: {fell}, {overall}."
    return text + _also(named.iloc[len(tie) :], "lost more", len(tie))


def _change_of_recall(hit: "pd.Series[float]") -> str:
    """The recall of a class or group before and after, and the number of its test examples."""
    plural = "" if hit["support"] == 1 else "s"
    before, after = _ends(hit).split(" to ")
    if abs(hit["change"]) <= _EQUAL:
        change = f"stayed at {after}"
    else:
        change = f"{'fell' if hit['change'] < 0 else 'rose'} from {before} to {after}"
    return f"recall {change} ({hit['support']:,} test example{plural})"


def _ends(hit: "pd.Series[float]") -> str:
    """The recall of a class before and after, with enough digits that a change shows."""
    shares = hit["recall_dense"], hit["recall"]
    fewest = 0 if hit["support"] <= 200 else 1

    def rounded(share: float, digits: int) -> str:
        text = f"{100 * share:.{digits}f}"
        return percent(share) if float(text) in (0, 100) and share not in (0, 1) else f"{text}%"

    forms = ([rounded(share, digits) for share in shares] for digits in range(fewest, 10))
    before, after = next(form for form in forms if form[0] != form[1] or abs(shares[0] - shares[1]) <= _EQUAL)
    return f"{before} to {after}"


def _and_more(names: list[str], before: int = 0) -> str:
    """List up to three names, fewer after others but at least one, and count the rest."""
    most = max(1, _MOST_CLASSES - before)
    if len(names) <= most:
        return listed(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"


def _gained(audit: AuditTables, row: Row) -> str:
    """The class that gained most, where one is shown to have gained."""
    shown = lost_less(rows_of(audit.classes, row), audit.level)
    shown = shown[(shown["support"] >= FEWEST) & (shown["change_low"] > 0)].sort_values("change", kind="stable")
    if not len(shown):
        return ""
    hit = shown.iloc[-1]
    return f" Class {hit['class']} gained: {_change_of_recall(hit)}."


def _lower_ratio(audit: AuditTables, row: Row) -> str:
    """The class that lost most at the highest lower ratio at which one is shown to have lost more than the rest."""
    of_score = audit.summary[(audit.summary["score"] == row["score"]) & (audit.summary["ratio"] < cell(row, "ratio"))]
    for _, each in of_score.iloc[::-1].iterrows():
        lower = dict(each)
        named = _named(audit, lower)
        if len(named):
            return _lost_most(audit, lower, named)
    return ""


def _lower_accuracy(audit: AuditTables, row: Row) -> str:
    """The accuracy at the highest lower ratio at which predictions changed."""
    lower = audit.summary[(audit.summary["score"] == row["score"]) & (audit.summary["ratio"] < cell(row, "ratio"))]
    changed = lower[lower["agreement"] != 1]
    if not len(changed):
        return ""
    last = dict(changed.iloc[-1])
    return f"Accuracy{at_score(audit, last)} {change_of_accuracy(last, audit.level)}."


def _dense_at_chance(audit: AuditTables, row: Row) -> str:
    """That the dense models are at chance too, where that is so."""
    recall = rows_of(audit.classes, row)["recall_dense"].dropna()
    if recall.mean() > 1.1 / len(recall):
        return ""
    one = dense_models(audit, row["score"]) == "dense model"
    return f" The {'dense model is' if one else 'dense models are'} at chance too: check the labels and predictions."


def _spared(audit: AuditTables, row: Row) -> str:
    """The classes shown to have gained more or lost less than all examples did, the most different first.

    Without one, the classes shown to have gained less; with one, the others gained less because it gained.
    """
    classes = rows_of(audit.classes, row)
    large = classes[classes["support"] >= FEWEST]
    shown, verb, others = lost_less(large, audit.level), "lost less than the rest", "gained more or lost less"
    shown = shown.sort_values("change", ascending=False, kind="stable")
    if not len(shown):
        shown, verb, others = gained_less(large, audit.level), "gained less than the rest", "gained less"
        shown = shown.sort_values("change", kind="stable")
    elif shown["change"].iloc[0] > 0:
        most = shown["change"].iloc[0] >= float(large["change"].max()) - _EQUAL
        verb = "gained most" if most else "gained more than the rest"
    if not len(shown):
        return ""
    hit = shown.iloc[0]
    text = f"Class {hit['class']} {verb}{at_score(audit, row)}: {_change_of_recall(hit)}."
    text += _also(shown.iloc[1:], others)
    which = _WITH_ENOUGH if _small_class(audit, row) else "class"
    return (
        f"{text} No {which} is shown to have lost more than the rest; accuracy {change_of_accuracy(row, audit.level)}."
    )


def _also(shown: pd.DataFrame, what: str, before: int = 1) -> str:
    """The sentence about further classes that differ from all examples together; empty without a class."""
    if not len(shown):
        return ""
    plural = "class" if len(shown) == 1 else "classes"
    listing = [f"{each['class']} ({_ends(each)} of {each['support']:,})" for _, each in shown.iterrows()]
    return f" Also shown to have {what} than all examples together: {plural} {_and_more(listing, before)}."


def _none_named(audit: AuditTables, row: Row) -> str:
    """That no class is shown to have lost more; whether one gained more, or the loss is uneven all the same."""
    changed, p = change_of_accuracy(row, audit.level), evenness(audit, row)
    classes = rows_of(audit.classes, row)
    if (classes["support"] > 0).sum() < 2:
        return f"Only one class has test examples; accuracy{at_score(audit, row)} {changed}."
    spared = _spared(audit, row)
    if spared:
        return spared
    if not np.isfinite(classes["p_holm"]).any():
        return (
            f"Accuracy{at_score(audit, row)} {changed}. A test of whether a class lost more than the rest needs "
            f"{what_a_test_needs(classes)}."
        )
    if p < 1 - audit.level and not len(lost_more(classes, audit.level)):
        what = "loss" if cell(row, "accuracy_change") < 0 else "change"
        return (
            f"Accuracy{at_score(audit, row)} {changed}. The {what} is not even over the classes ({p_value(p)}), but no "
            f"single class can be named{_few_examples(audit, row)}."
        )
    which = _WITH_ENOUGH if _small_class(audit, row) else "single class"
    return f"No {which} is shown to have lost more than the rest{at_score(audit, row)}; accuracy {changed}."


def _few_examples(audit: AuditTables, row: Row) -> str:
    """The class with a handful of examples that lost most of them, if one did."""
    classes = rows_of(audit.classes, row)
    few = classes[(classes["support"] < FEWEST) & (classes["lost"] >= classes["support"] / 2) & (classes["lost"] > 1)]
    if not len(few):
        return ""
    hit = dict(few.sort_values("change", kind="stable").iloc[0])
    return (
        f"; class {hit['class']} lost {count(cell(hit, 'lost'))} of {hit['support']} test examples, too few to say more"
    )


def _small_class(audit: AuditTables, row: Row) -> str:
    """The class with a handful of examples that lost most, where one is shown to have lost more."""
    shown = lost_more(rows_of(audit.classes, row), audit.level)
    few = shown[shown["support"] < FEWEST].sort_values("change", kind="stable")
    if not len(few):
        return ""
    hit = few.iloc[0]
    known = np.isfinite(hit["lost"])  # not with counts alone
    lost = f", of which it lost {count(hit['lost'])}" if known else f": recall went from {_ends(hit)}"
    examples = "1 test example" if hit["support"] == 1 else f"{hit['support']} test examples"
    return f"Class {hit['class']} is shown to have lost more, but has only {examples}{lost}."


def _group_hit(audit: AuditTables, row: Row) -> str:
    """The group that lost most among those shown to have lost more than all examples did."""
    if not len(audit.groups):
        return ""
    shown = lost_more(rows_of(audit.groups[audit.groups["class"].isna()], row), audit.level)
    if not len(shown):
        return ""
    hit = shown.sort_values("change", kind="stable").iloc[0]
    where = at_score(audit, row) if len(audit.scores) > 1 else ""
    named = str(hit["group"]) if hit["attribute"] == "group" else f"{hit['group']} ({hit['attribute']})"
    return f"Of the groups, {named} lost more than the rest{where}: {_change_of_recall(hit)}."


def _apart(audit: AuditTables, row: Row, named: int, *, first: bool) -> str:
    """Whether weak classes fell further behind strong ones, and how that goes with what was said of single classes."""
    if (rows_of(audit.classes, row)["support"] > 0).sum() < 2:
        return ""
    verdict = verdict_of(row)
    place = f"{at_score(audit, row).strip()}{_shown_alpha(row, explained=first)}"
    text = f"differences between weak and strong classes {described(audit, row, place)}"
    text += f" ({reasons(audit, row)})" if verdict == "undefined" else ""
    if named and first and not verdict.startswith(">"):
        compared = "This compares one class" if named == 1 else "This compares single classes"
        return (
            f"{compared} with all examples; alpha shows whether weak classes in general fell further behind strong "
            f"ones. {sentence(text)}"
        )
    return sentence(text if named and first else f"all classes taken together, {text}")


def _shown_alpha(row: Row, *, explained: bool) -> str:
    for name, words in (("alpha_corrected", "corrected alpha"), ("alpha", "alpha")):
        if np.isfinite(cell(row, name)) and row["alpha_corrected_reason"] not in (WITHIN_NOISE, TOO_FEW_EXAMPLES):
            middle, *ends = estimate(row, name)
            return f" ({words} {middle}{', ' * bool(ends)}{' to '.join(ends)}{f'; {ALPHA_MEANS}' * explained})"
    return ""


def _limits(audit: AuditTables, row: Row) -> str:
    """What the data could have missed."""
    sentences, unseen, alpha = [], [], cell(row, "alpha_corrected_detectable")
    where = at_score(audit, row) if len(audit.scores) > 1 else ""
    first = f"{where.strip()}, " if where else ""
    if verdict_of(row) == "?" and alpha < 1:
        unseen.append(f"growth of alpha by less than {number(alpha)}")
    classes = rows_of(audit.classes, row)
    excess = np.nan if len(lost_more(classes, audit.level)) else detectable_excess(classes)
    if np.isfinite(excess):
        sizes = classes["support"][classes["support"] > 0]
        typical = " of typical size" if sizes.max() > _UNEQUAL * sizes.min() else ""
        unseen.append(f"a class{typical} that lost up to {size(excess)} more than all examples together")
    sentences += [f"The data could have missed {listed(unseen)}{where}."] if unseen else []
    if verdict_of(row) == "?" and 1 <= alpha < np.inf:
        sentences.append(sentence(f"{first}{no_alpha_shown(row, audit)}"))
    if np.isinf(excess):
        sentences.append(sentence(f"{first}{no_class_shown(row, audit, classes)}"))
    return " ".join(sentences)
