"""Numbers, ratios and lists in words, as the sentences of a report use them."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from jprune.recall.tables.frames import UNSTATED, AuditTables

Row = Mapping[str, object]
"""A row of a frame, by column."""

_ROUNDED = 10  # decimals; a mean that is 0 but for rounding error is 0


def cell(row: Row, name: str) -> float:
    """The number in a column of a row."""
    return float(row[name])  # type: ignore[arg-type]


def number(value: float) -> str:
    """A number in a sentence; n/a where it is undefined, and more digits where two would be 0."""
    if not np.isfinite(value):
        return "n/a"
    return f"{value:.2f}" if abs(value) >= 0.005 or value == 0 else f"{value:.1g}"


def interval(row: Row, name: str) -> str:
    """A number with the ends of its interval, where it has one."""
    middle, *ends = estimate(row, name)
    return f"{middle} ({' to '.join(ends)})" if ends else middle


def estimate(row: Row, name: str) -> list[str]:
    """An alpha and the ends of its interval, if it has one.

    With as many digits (up to six) as keep an end that is not 1 from being printed as 1.
    """
    values = [cell(row, name), cell(row, f"{name}_low"), cell(row, f"{name}_high")]
    if not np.isfinite(values[1]):
        return [number(values[0])]
    apart = (n for n in range(2, 6) if all(end == 1 or float(f"{end:.{n}f}") != 1 for end in values[1:]))
    digits = next(apart, 6)
    return [number(value) if digits == 2 else f"{value:.{digits}f}" for value in values]


def percent(value: float) -> str:
    """A fraction in percent; not 100% or 0% where it is only close to it."""
    text = f"{100 * value:.1f}"
    if text in ("100.0", "0.0") and round(value, _ROUNDED) not in (0, 1):  # never a whole where some are missing
        text = f"{100 * value:.2g}" if value < 0.5 else f"{100 * value:.{_digits(1 - value)}f}"
    return f"{text}%"


def _digits(distance: float) -> int:
    return int(min(6, np.ceil(-np.log10(100 * distance))))


def points(value: float) -> str:
    """A change in percentage points."""
    return f"{signed(value)} points"


def size(value: float) -> str:
    """A distance in points, with enough digits that it is not 0."""
    points = 100 * value
    return f"{points:.1f} points" if points >= 0.05 or round(points, _ROUNDED) == 0 else f"{points:.1g} points"


def signed(value: float) -> str:
    """A change in points without the word, with its sign and enough digits that it is not 0."""
    points = 100 * value
    if round(points, _ROUNDED) == 0:
        return "0"
    return f"{points:+.1f}" if abs(points) >= 0.05 else f"{points:+.1g}"


def count(value: float) -> str:
    """A number of examples; a mean over models may be fractional."""
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:,.1f}"


def p_value(value: float) -> str:
    """A p-value."""
    return "p < 0.0001" if value < 1e-4 else f"p = {value:.4f}"


def change_of_accuracy(row: Row, level: float) -> str:
    """Accuracy before and after, the change, whether it is shown, and how many examples were lost and won."""
    if row["agreement"] == 1:
        return f"is {percent(cell(row, 'accuracy'))} before and after: the predictions agree on every example"
    before, after = cell(row, "accuracy_dense"), cell(row, "accuracy")
    text = f"went from {percent(before)} to {percent(after)}, {points(cell(row, 'accuracy_change'))}"
    text += not_shown(row, level)
    if np.isfinite(cell(row, "lost")):
        whole = cell(row, "lost").is_integer() and cell(row, "won").is_integer()
        mean = "" if row["models"] == 1 and whole else "on average over the models "
        plural = "" if cell(row, "lost") == 1 else "s"
        text += f"; {mean}{count(cell(row, 'lost'))} example{plural} lost and {count(cell(row, 'won'))} won"
    return text


def not_shown(row: Row, level: float) -> str:
    """In parentheses that the change of accuracy is not shown to differ from 0, where that is so."""
    p = cell(row, "accuracy_change_p")
    low, high = cell(row, "accuracy_change_low"), cell(row, "accuracy_change_high")  # over the models alone
    equal = np.isnan(p) and np.isfinite(low)  # counts of models that all changed by as much, so there is no test
    return " (not shown to differ from 0)" if low <= 0 <= high or equal or p >= 1 - level else ""


def no_class_shown(row: Row, audit: AuditTables, classes: pd.DataFrame) -> str:
    """That not even the largest possible loss of a class would have been shown, in every class or in most."""
    every = classes["detectable"].isna().all()
    which = (
        "that a class lost more than the rest, even if it"
        if every
        else ("for most classes that they lost more than the rest, even if they")
    )
    return f"{_so_few(int(cell(row, 'models')), audit)} cannot show {which} lost every example"


def what_a_test_needs(classes: pd.DataFrame) -> str:
    """What a test of the classes needs, where there is none."""
    if classes["lost"].isna().all():
        return "predictions, or models that differ"
    return "two or more test examples of a class"


def no_alpha_shown(row: Row, audit: AuditTables) -> str:
    """How far class differences would have to grow to be shown, where not even their disappearance would be."""
    most = number(1 + cell(row, "alpha_corrected_detectable"))
    return (
        f"{_so_few(healthy(row), audit)} are too few to judge whether class differences changed: growth would be "
        f"noticed only if alpha were above {most}"
    )


def _so_few(models: int, audit: AuditTables) -> str:
    return f"{'one model' if models == 1 else f'{models} models'} and {audit.examples:,} test examples"


def healthy(row: Row) -> int:
    """The number of models from which alpha is computed: those that are not at chance."""
    return int(cell(row, "models") - cell(row, "collapsed"))


def one_dense(audit: AuditTables) -> bool:
    """Whether every score has a single dense model."""
    return bool((audit.dense.groupby("score").size() == 1).all())


def one_compressed(audit: AuditTables) -> bool:
    """Whether there is a single model at every score and ratio."""
    return bool((audit.summary["models"] == 1).all())


def dense_models(audit: AuditTables, score: object) -> str:
    """The words dense model, or dense models where a score has several."""
    return "dense model" if (audit.dense["score"] == score).sum() == 1 else "dense models"


def two_models(audit: AuditTables, row: Row) -> bool:
    """Whether a row compares one dense model with one compressed model."""
    return bool(row["models"] == 1) and dense_models(audit, row["score"]) == "dense model"


def in_number(audit: AuditTables, text: str) -> str:
    """Choose the words for several models or for one: ``{several|one}`` compressed, ``[several|one]`` dense models."""
    for pattern, one in ((r"\{(.*?)\|(.*?)\}", one_compressed(audit)), (r"\[(.*?)\|(.*?)\]", one_dense(audit))):
        text = re.sub(pattern, r"\2" if one else r"\1", text)
    return text


def kind(audit: AuditTables) -> str:
    """What the models that are compared with the dense ones are called."""
    if not audit.named:
        return "fine-tuned" if audit.ratios == (1,) else "pruned"
    return audit.scores[0] if len(audit.scores) == 1 else "compared"


def at_score(audit: AuditTables, row: Row) -> str:
    """The models of a row: by the name, or by score and ratio."""
    if row["ratio"] == UNSTATED:
        return f" in {row['score']}"
    if audit.scores == ("pruned",) or (row["ratio"] == 1 and row["score"] == "control"):
        return f" {at_ratio(row)}"
    return f" under {row['score']} {at_ratio(row)}"


def at_ratio(row: Row) -> str:
    """The models of a row, by their ratio or name."""
    if row["ratio"] == UNSTATED:
        return f"of {row['score']}"
    return "in the control (not pruned)" if row["ratio"] == 1 else f"at {row['ratio']:g}x compression"


def ratio_or_name(ratio: float, score: str = "") -> str:
    """A ratio, or the name of models without one."""
    if ratio == UNSTATED:
        return score
    return "the control" if ratio == 1 else f"{ratio:g}x"


def places(rows: pd.DataFrame, notes: Sequence[str] = ()) -> str:
    """The models of some rows, by ratio or name, with a preposition; each with a note in parentheses, if there are any.

    >>> places(pd.DataFrame({"score": "pruned", "ratio": [1.0, 2.0, 4.0]}))
    'in the control and at 2x and 4x'
    """
    found: dict[str, list[str]] = {"in": [], "at": []}
    for score, ratio, note in zip(rows["score"], rows["ratio"], notes or [""] * len(rows), strict=True):
        name = ratio_or_name(ratio, score)
        found["in" if ratio in (UNSTATED, 1) else "at"].append(f"{name} ({note})" if note else name)
    return " and ".join(f"{preposition} {listed(names)}" for preposition, names in found.items() if names)


def listed(names: list[str]) -> str:
    """Names with commas and an "and"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def sentence(text: str) -> str:
    """A text with a capital and a full stop."""
    return text[0].upper() + text[1:] + "."
