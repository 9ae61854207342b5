"""Format the audit's tables for the page: columns with headings and meanings, cells as text."""

from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import pandas as pd

from jprune.recall.report.verdicts import lost_more
from jprune.recall.tables.frames import UNSTATED, AuditTables

_MOST_ROWS, _LEAST_ROWS = 1_500, 10  # rows of a table, and of one score and ratio in it; the CSV files have all rows
_MOST_DESTINATIONS = 3  # predicted classes shown for the lost examples of a class
# Tables that the page shows for one score and ratio at a time, with the column whose smallest (True) or largest numbers
# are kept if there are too many rows.
_FILTERED = {
    "classes": ("change", True),
    "groups": ("change", True),
    "pies": ("pies", False),
    "drift": ("lost", False),
    "probabilities": ("support", False),
}


class Column(NamedTuple):
    """A column of a table on the page.

    Attributes:
      name: name of the frame's column.
      label: its heading.
      meaning: its meaning, in a sentence.
      show: function from a value to text; None for names, which are shown unchanged.
    """

    name: str
    label: str
    meaning: str
    show: Callable[[float], str] | None = None

    @property
    def text(self) -> bool:
        """Whether the column has names instead of numbers."""
        return self.show is None


class Cell(NamedTuple):
    """The text of a cell, and the number by which it is sorted (None for names, "" for undefined)."""

    text: str
    value: str | None


class Row(NamedTuple):
    """A row: its cells, its score and ratio, and whether it is emphasized."""

    cells: tuple[Cell, ...]
    stack: str
    strong: bool


class Table(NamedTuple):
    """A table of the page.

    Attributes:
      name: its id on the page.
      caption: its heading.
      columns: its columns.
      rows: its rows.
      sortable: whether its headers sort it.
      filtered: whether the page shows the rows of one score and ratio at a time.
      note: note on rows that were left out.
    """

    name: str
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    sortable: bool
    filtered: bool
    note: str = ""


def _fixed(digits: int, scale: float = 1.0, sign: str = "") -> Callable[[float], str]:
    return lambda value: f"{scale * value:{sign}.{digits}f}"


def _mean_count(value: float) -> str:
    """Format a number of examples, which may be fractional as a mean over models."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


_RATIO = Column("ratio", "ratio", "Compression ratio: parameters before / after; 1 is the control", lambda v: f"{v:g}")
_SCORE = Column("score", "score", "The pruning score, or the name of the compared models")
_PERCENT, _CHANGE = _fixed(1, 100.0), _fixed(1, 100.0, "+")

_SUMMARY = (
    _SCORE,
    _RATIO,
    Column("models", "models", "Number of compressed models", _fixed(0)),
    Column(
        "collapsed", "at chance", "Models with a mean recall at chance; alpha is computed from the others", _fixed(0)
    ),
    Column("accuracy", "accuracy %", "Mean accuracy over models", _PERCENT),
    Column("accuracy_change", "change", "Mean accuracy minus that of the dense models, in points", _CHANGE),
    Column("alpha", "alpha", "Mean over models of the model-level intensification ratio", _fixed(2)),
    Column("alpha_low", "low", "Lower end of the interval of mean alpha", _fixed(2)),
    Column("alpha_high", "high", "Upper end of the interval of mean alpha", _fixed(2)),
    Column("alpha_mark", "mark", "Where the interval lies against 1: < below, > above, ? across"),
    Column("alpha_corrected", "corrected", "Alpha without the noise of the test set", _fixed(2)),
    Column("alpha_corrected_low", "low", "Lower end of its interval, over examples and models", _fixed(2)),
    Column("alpha_corrected_high", "high", "Upper end of its interval", _fixed(2)),
    Column("alpha_seed", "seeds", "Alpha between two dense training runs: the second reference next to 1", _fixed(2)),
    Column("alpha_seed_low", "low", "Lower end of its interval, a jackknife over models", _fixed(2)),
    Column("alpha_seed_high", "high", "Upper end of its interval", _fixed(2)),
    Column("alpha_null", "alpha_null", "Alpha if every class's errors grew in the same proportion", _fixed(2)),
    Column("alpha_over_null", "alpha / null", "Mean of alpha / alpha_null", _fixed(2)),
    Column("alpha_over_null_mark", "mark", "Where the interval of alpha / alpha_null lies against 1"),
)
_NEIGHBOURS = (
    _SCORE,
    _RATIO,
    Column("alpha_sd", "sd", "Standard deviation of alpha over models", _fixed(2)),
    Column("alpha_intercept", "intercept", "Mean slope of a line with an intercept, for unequal classes", _fixed(2)),
    Column("alpha_reverse", "reverse", "Mean slope from regressing dense on compressed balances", _fixed(2)),
    Column("alpha_rma", "RMA", "Mean reduced-major-axis slope", _fixed(2)),
    Column("pooled_alpha", "pooled", "One slope over all models and classes", _fixed(2)),
    Column("r2", "r²", "r² of the pooled slope", _fixed(2)),
    Column("worst_recall", "worst %", "Mean recall of each model's worst class", _PERCENT),
    Column("excess_gap", "max gap", "Mean over models of the largest excess accuracy gap, in points", _PERCENT),
    Column("balance_variance", "variance", "Variance of recall over classes, mean over models", _fixed(5)),
    Column("cev", "CEV", "Combined error variance", _fixed(3)),
    Column("sde", "SDE", "Symmetric distance error", _fixed(3)),
)
_CLASSES = (
    _SCORE,
    _RATIO,
    Column("class", "class", "The class"),
    Column("change", "change", "Recall after minus before, in points", _CHANGE),
    Column("recall_dense", "dense %", "Mean recall of the dense models", _PERCENT),
    Column("recall", "after %", "Mean recall of the compressed models", _PERCENT),
    Column("support", "examples", "Number of test examples", _fixed(0)),
    Column("lost", "lost", "Examples right before and wrong after, mean over models", _mean_count),
    Column("won", "won", "Examples wrong before and right after, mean over models", _mean_count),
    Column("change_low", "low", "Lower end of the change's interval, over examples and models", _CHANGE),
    Column("change_high", "high", "Upper end of the change's interval", _CHANGE),
    Column("excess", "excess", "Points lost beyond what all examples lost", _CHANGE),
    Column("p_holm", "p", "Test of no excess, corrected over the classes by Holm's method", _p),
    Column(
        "detectable",
        "detectable",
        "Smallest excess that would be shown nine times in ten, in points; n/a where no possible loss would be",
        _PERCENT,
    ),
    Column("intensification", "balance ratio", "Class ratio of mean normalized balances, after / dense", _fixed(2)),
)
_GROUPS = (
    *_CLASSES[:2],
    Column("attribute", "attribute", "The second label"),
    Column("group", "group", "Its value"),
    *_CLASSES[2:12],
    Column("excess_low", "low", "Lower end of the excess's interval", _CHANGE),
    Column("excess_high", "high", "Upper end of the excess's interval", _CHANGE),
    Column("p_holm", "p", "Test of no excess, corrected over the groups of the attribute by Holm's method", _p),
)
_TESTS = (
    Column("question", "question", "What is compared"),
    *_CLASSES[:2],
    Column("class", "class", "The class of a McNemar test"),
    Column("other_score", "against", "The score compared with"),
    Column("other_ratio", "ratio", "The ratio compared with", lambda v: f"{v:g}"),
    Column("test", "test", "Which test"),
    Column("alternative", "alternative", "The alternative hypothesis"),
    Column(
        "difference",
        "difference",
        "Difference of mean alphas; of recall, in McNemar's test; the correlation, of a pairing",
        _fixed(3, 1.0, "+"),
    ),
    Column("lost", "lost", "Examples right before and wrong after", _fixed(0)),
    Column("won", "won", "Examples wrong before and right after", _fixed(0)),
    Column("p", "p", "Uncorrected", _p),
    Column("p_bonferroni", "Bonferroni", "Corrected by Bonferroni's method", _p),
    Column("p_holm", "Holm", "Corrected by Holm's method", _p),
    Column("models", "models", "Pairs, or models of both samples together", _fixed(0)),
    Column(
        "left_out", "left out", "Pairs or models left out because alpha is undefined; negative ones stay in", _fixed(0)
    ),
    Column("reason", "why not", "Why there is no result"),
)
_PIES = (
    *_CLASSES[:2],
    Column("class", "labelled", "The true class"),
    Column("support", "examples", "Number of test examples", _fixed(0)),
    Column("pies", "changed", "Number of examples whose most frequent prediction changed", _fixed(0)),
    Column("share", "%", "Their share of the class", _PERCENT),
)
_EQUAL = (
    Column("score", "score", "The score compared with"),
    Column("other_score", "other", "The score compared"),
    Column(
        "difference",
        "difference",
        "Log alpha of the other minus that of the first, at equal alpha_null",
        _fixed(3, 1.0, "+"),
    ),
    Column("low", "low", "Lower end of its interval", _fixed(3, 1.0, "+")),
    Column("high", "high", "Upper end of its interval", _fixed(3, 1.0, "+")),
    Column("p", "p", "Test of no difference", _p),
    Column("slope", "slope", "Slope of log alpha on log alpha_null, common to both", _fixed(2)),
    Column(
        "parallel_p", "parallel p", "Test of equal slopes; when small, one difference does not describe the two", _p
    ),
    Column("observations", "alphas", "Number of alphas in the fit", _fixed(0)),
    Column("left_out", "left out", "Alphas left out: undefined, 0 or negative, so without a logarithm", _fixed(0)),
    Column("reason", "why not", "Why there is no result"),
)


_PROBABILITIES = (
    _SCORE,
    _RATIO,
    Column("class", "class", "The class"),
    Column("support", "examples", "Number of test examples", _fixed(0)),
    Column(
        "confidence_dense", "confidence before %", "Mean probability of the predicted class, dense models", _PERCENT
    ),
    Column("confidence", "after %", "The same, compressed models", _PERCENT),
    Column("ece_dense", "calibration error before %", "Expected calibration error of 15 bins, dense models", _PERCENT),
    Column("ece", "after %", "The same, compressed models", _PERCENT),
    Column("kl", "KL", "Kullback-Leibler divergence of the compressed from the dense probabilities, nats", _fixed(3)),
    Column("k", "k", "k of the top-k recall", _fixed(0)),
    Column(
        "top_k_dense",
        "top-k before %",
        "Share of examples whose class is among the k most probable, dense models",
        _PERCENT,
    ),
    Column("top_k", "after %", "The same, compressed models", _PERCENT),
)
_DRIFT = (
    _SCORE,
    _RATIO,
    Column("class", "class", "The true class"),
    Column("predicted", "predicted", "The class predicted instead"),
    Column("lost", "lost", "Examples that dense models get right, mean over models", _mean_count),
    Column("share", "share %", "Their share of the lost examples of the class", _PERCENT),
    Column("before", "all before", "All examples of the class predicted so by dense models, mean", _mean_count),
    Column("after", "all after", "The same, by compressed models", _mean_count),
)
_RISK = (
    _SCORE,
    Column("example", "example", "Number of the test example, from 0", _fixed(0)),
    Column("name", "class", "Its true class"),
    Column("risk", "risk", "Uncertainty of the dense models, from 0 to 1", _fixed(3)),
    Column("lost", "lost %", "Share of the models that lost it at the last ratio", _PERCENT),
)


_NEUTRAL = {
    "score": ("name", "The name of the models that are compared with the dense ones"),
    "other_score": ("against", "The name of the models compared with"),
}  # headings where models have a name and no ratio, so that nothing says that they were pruned


def tables(audit: AuditTables, equal: pd.DataFrame) -> dict[str, Table | None]:
    """Make every table of the page; None if there is nothing to show.

    Args:
      audit: the audit.
      equal: the comparisons at equal accuracy; without rows if there is nothing to compare.
    """
    strong = set(lost_more(audit.classes, audit.level).index)
    groups = audit.groups.assign(**{"class": audit.groups["class"].fillna("all classes")})
    made = {
        "summary": _table("summary", "Scores and ratios", _SUMMARY, audit.summary),
        "neighbours": _table("neighbours", "Other measures", _NEIGHBOURS, audit.summary),
        "classes": _table("classes", "Recall of each class", _CLASSES, audit.classes, strong=strong),
        "groups": _table("groups", "Recall within groups", _GROUPS, groups),
        "pies": _table("pies", "Changed examples by class", _PIES, _pies_by_class(audit)),
        "drift": _table(
            "drift",
            "Where lost examples went",
            _DRIFT,
            audit.drift[audit.drift.groupby(["score", "ratio", "class"], sort=False).cumcount() < _MOST_DESTINATIONS],
            every=len(audit.drift),
        ),
        "probabilities": _table(
            "probabilities",
            "Confidence and calibration",
            _PROBABILITIES,
            audit.probabilities.assign(**{"class": audit.probabilities["class"].fillna("all classes")}),
        ),
        "at_risk": _table(
            "at_risk",
            "Examples on which the dense models are least certain",
            _RISK,
            audit.at_risk.assign(name=[audit.class_names[int(c)] for c in audit.at_risk["label"]]),
        ),
        "tests": _table("tests", "Tests", _TESTS, audit.tests),
        "equal": _table("equal", "At equal loss of accuracy", _EQUAL, equal, sortable=False),
    }
    return {name: _neutral(table) if audit.named and table else table for name, table in made.items()}


def _neutral(table: Table) -> Table:
    """Return a table with neutral headings instead of the word score."""
    renamed = [
        column._replace(label=_NEUTRAL[column.name][0], meaning=_NEUTRAL[column.name][1])
        if column.name in _NEUTRAL
        else column
        for column in table.columns
    ]
    return table._replace(columns=tuple(renamed))


def _table(
    name: str,
    caption: str,
    columns: Sequence[Column],
    frame: pd.DataFrame,
    *,
    sortable: bool = True,
    strong: Container[object] = (),
    every: int | None = None,
) -> Table | None:
    """Convert a frame to a table, without columns that are missing or undefined throughout."""
    if not len(frame):
        return None
    every = len(frame) if every is None else every
    if name in _FILTERED:
        frame = _most(frame, *_FILTERED[name])
    note = "" if len(frame) == every else f"{len(frame)} of {every} rows are shown; Audit.to_csv writes everything."

    def absent(c: str) -> bool:
        empty = (frame[c].isna() | (frame[c] == "")).all()
        return bool(empty or (c == "ratio" and (frame[c] == UNSTATED).all()))

    kept = tuple(c for c in columns if c.name in frame and not absent(c.name))
    kept = tuple(c for c in kept if c.name != "collapsed" or frame["collapsed"].any())
    texts = [[_cell(column, value) for value in frame[column.name]] for column in kept]
    stacks = _stacks(frame)
    rows = zip(zip(*texts, strict=True), stacks, (index in strong for index in frame.index), strict=True)
    return Table(name, caption, kept, tuple(Row(*row) for row in rows), sortable, name in _FILTERED, note)


def stack_key(score: str, ratio: float) -> str:
    """Return the key of a score and ratio, for the filter of the page."""
    return f"{ratio:g} {score}"


def _stacks(frame: pd.DataFrame) -> list[str]:
    if "ratio" not in frame:
        return [""] * len(frame)
    return [stack_key(score, ratio) for score, ratio in zip(frame["score"], frame["ratio"], strict=True)]


def _cell(column: Column, value: Any) -> Cell:
    if column.show is None:
        return Cell("" if pd.isna(value) else str(value), None)
    if pd.isna(value):
        return Cell("n/a", "")
    return Cell(_never_minus_zero(column.show(value), value), repr(float(value)))


def _never_minus_zero(text: str, value: float) -> str:
    """Return the text of a number; 0 has no sign, and a nonzero number is not shown as 0."""
    if value == 0 or float(value) == 0:
        return text.replace("-", "").replace("+", "")
    if text[:2] in ("-0", "+0") and not text.strip("+-0.,"):
        return f"{'<' if value > 0 else '>'} {text[0]}{text[1:-1]}1" if "." in text else text
    return text


def _most(frame: pd.DataFrame, by: str, ascending: bool) -> pd.DataFrame:
    """Return the first rows by a column of each score and ratio, up to the limit of the page, in table order."""
    if len(frame) <= _MOST_ROWS:
        return frame
    stacks = frame.sort_values(by, ascending=ascending, kind="stable").groupby(["score", "ratio"], sort=False)
    return frame[frame.index.isin(stacks.head(max(_LEAST_ROWS, _MOST_ROWS // stacks.ngroups)).index)]


def _pies_by_class(audit: AuditTables) -> pd.DataFrame:
    """Count the examples of each class whose modal label changed, for every score and ratio."""
    if not len(audit.pies):
        return pd.DataFrame(columns=["score", "ratio", "class", "support", "pies", "share"])
    counted = audit.pies.groupby(["score", "ratio", "label"], sort=False).size().rename("pies").reset_index()
    counted["class"] = [audit.class_names[label] for label in counted["label"]]
    frame = counted.merge(audit.classes[["score", "ratio", "class", "support"]], on=["score", "ratio", "class"])
    frame["share"] = frame["pies"] / frame["support"]
    return frame.sort_values(["score", "ratio", "pies"], ascending=[True, True, False], kind="stable")
