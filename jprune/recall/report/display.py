"""Format the audit's tables for the page: columns with headings and meanings, cells as text."""

from collections.abc import Callable, Container, Sequence
from typing import NamedTuple

import pandas as pd

from jprune.recall.inputs.raw import FrameCell
from jprune.recall.report.verdicts import lost_more
from jprune.recall.report.words import in_number, percent
from jprune.recall.tables.frames import UNSTATED, AuditTables

_MOST_ROWS, _LEAST_ROWS = 1_500, 10  # rows of a table, and of one score and ratio in it; the CSV files have all rows
_MOST_DESTINATIONS = 3  # predicted classes shown for the lost examples of a class
_MOST_AT_RISK = 20  # examples of a score
_ROUNDED = 10  # decimals; a mean that is 0 but for rounding error is 0
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
    def show(value: float) -> str:
        scaled = scale * value
        if round(scaled, _ROUNDED) == 0:
            return f"{0.0:.{digits}f}"
        text = f"{scaled:{sign}.{digits}f}"
        return text if text.strip("+-0.") else f"{scaled:{sign}.1g}"  # a number that is not 0 is not shown as 0

    return show


def _percent(value: float) -> str:
    """Format a fraction in percent, with as many digits as keep it from being shown as 0 or 100 where it is not."""
    text = _fixed(1, 100.0)(value)
    return percent(value).removesuffix("%") if text == "100.0" and value < 1 else text


def _mean_count(value: float) -> str:
    """Format a number of examples; the others of its column may be fractional, as means over models."""
    return f"{value:.0f}" if float(value).is_integer() else f"{value:.1f}"


def _p(value: float) -> str:
    return "< 0.0001" if value < 1e-4 else f"{value:.4f}"


_RATIO = Column("ratio", "ratio", "Compression ratio: parameters before / after; 1 is the control", lambda v: f"{v:g}")
_SCORE = Column("score", "score", "The pruning score")
_CHANGE = _fixed(1, 100.0, "+")

_SUMMARY = (
    _SCORE,
    _RATIO,
    Column("models", "models", "Number of compressed models", _fixed(0)),
    Column(
        "collapsed", "at chance", "Number of models with a mean recall at chance; they are left out of alpha", _fixed(0)
    ),
    Column("accuracy", "accuracy %", "{Mean accuracy over models|Share of the test examples that are right}", _percent),
    Column("accuracy_change", "change", "Accuracy minus that of the [dense models|dense model], in points", _CHANGE),
    Column("alpha", "alpha", "Model-level intensification ratio{, mean over models|}", _fixed(2)),
    Column("alpha_low", "low", "Lower end of the interval of mean alpha", _fixed(2)),
    Column("alpha_high", "high", "Upper end of the interval of mean alpha", _fixed(2)),
    Column("alpha_mark", "mark", "Whether this interval lies below 1 (<), above 1 (>) or includes 1 (?)"),
    Column("alpha_corrected", "corrected", "Alpha without the noise of the test set", _fixed(2)),
    Column(
        "alpha_corrected_low",
        "low",
        "Lower end of the interval of corrected alpha, over examples{ and models|}",
        _fixed(2),
    ),
    Column("alpha_corrected_high", "high", "Upper end of the interval of corrected alpha", _fixed(2)),
    Column("alpha_seed", "seeds", "Alpha between two dense training runs: the second reference next to 1", _fixed(2)),
    Column(
        "alpha_seed_low",
        "low",
        "Lower end of the interval of the alpha between seeds, a jackknife over models",
        _fixed(2),
    ),
    Column("alpha_seed_high", "high", "Upper end of the interval of the alpha between seeds", _fixed(2)),
    Column("alpha_null", "alpha_null", "Alpha if every class's errors grew in the same proportion", _fixed(2)),
    Column("alpha_over_null", "alpha / null", "Alpha divided by alpha_null{, mean over models|}", _fixed(2)),
    Column("alpha_over_null_mark", "mark", "The same for the interval of alpha / alpha_null"),
)
_NEIGHBOURS = (
    _SCORE,
    _RATIO,
    Column("alpha_sd", "sd", "Standard deviation of alpha over models", _fixed(2)),
    Column(
        "alpha_intercept",
        "intercept",
        "Slope of a line with an intercept, for classes of unequal sizes{, mean over models|}",
        _fixed(2),
    ),
    Column(
        "alpha_reverse", "reverse", "Reciprocal slope of dense on compressed balances{, mean over models|}", _fixed(2)
    ),
    Column("alpha_rma", "RMA", "Slope by reduced major axis{, mean over models|}", _fixed(2)),
    Column("pooled_alpha", "pooled", "One slope over all {models and |}classes", _fixed(2)),
    Column("r2", "r²", "R squared of the pooled slope, a line through the origin", _fixed(2)),
    Column("worst_recall", "worst %", "Lowest recall of a class{, mean over models|}", _percent),
    Column("excess_gap", "max gap", "Largest excess accuracy gap, in points{, mean over models|}", _percent),
    Column("balance_variance", "variance", "Variance of recall over classes{, mean over models|}", _fixed(5)),
    Column("cev", "CEV", "Combined error variance", _fixed(3)),
    Column("sde", "SDE", "Symmetric distance error", _fixed(3)),
)
_CLASSES = (
    _SCORE,
    _RATIO,
    Column("class", "class", "The class"),
    Column("change", "change", "Recall after minus before, in points", _CHANGE),
    Column("recall_dense", "dense %", "Recall of the [dense models, mean|dense model]", _percent),
    Column("recall", "after %", "Recall of the compressed {models, mean|model}", _percent),
    Column("support", "examples", "Number of test examples", _fixed(0)),
    Column(
        "lost", "lost", "Examples right before and wrong after{, mean over models|[, mean over models|]}", _mean_count
    ),
    Column(
        "won", "won", "Examples wrong before and right after{, mean over models|[, mean over models|]}", _mean_count
    ),
    Column("change_low", "low", "Lower end of the interval of the change", _CHANGE),
    Column("change_high", "high", "Upper end of the interval of the change", _CHANGE),
    Column("excess", "excess", "Points lost beyond what all examples lost", _CHANGE),
    Column("p_holm", "p", "Test of no excess, corrected over the classes by Holm's method", _p),
    Column(
        "detectable",
        "detectable",
        "Smallest excess that would be shown nine times in ten, in points; n/a where even the loss of every example "
        "would not be",
        _percent,
    ),
    Column(
        "intensification",
        "balance ratio",
        "Normalized recall balance after / dense; large where the dense recall is close to the accuracy",
        _fixed(2),
    ),
)
_GROUPS = (
    *_CLASSES[:2],
    Column("attribute", "attribute", "The attribute that groups the examples"),
    Column("group", "group", "Its value"),
    *_CLASSES[2:12],
    Column("excess_low", "low", "Lower end of the interval of the excess", _CHANGE),
    Column("excess_high", "high", "Upper end of the interval of the excess", _CHANGE),
    Column("p_holm", "p", "Test of no excess, corrected over the groups of all attributes by Holm's method", _p),
)
_TESTS = (
    Column(
        "question",
        "question",
        "ratio: does alpha grow from the ratio before; control: does it differ from that of the control; score: do two "
        "scores or sets of models differ; evenness: do classes differ in their loss; accuracy, class: do the numbers "
        "of lost and won examples differ; pairing: do models with the same index belong together",
    ),
    *_CLASSES[:2],
    Column("class", "class", "The class that is tested"),
    Column("other_score", "against", "The models compared with"),
    Column("other_ratio", "ratio", "The ratio compared with", lambda v: f"{v:g}"),
    Column("test", "test", "The kind of test"),
    Column("alternative", "alternative", "The alternative hypothesis"),
    Column(
        "difference",
        "difference",
        "Difference of mean alphas; McNemar: of recall; pairing: the correlation",
        _fixed(3, 1.0, "+"),
    ),
    Column("lost", "lost", "Examples right before and wrong after", _fixed(0)),
    Column("won", "won", "Examples wrong before and right after", _fixed(0)),
    Column("p", "p", "p-value without correction", _p),
    Column("p_bonferroni", "Bonferroni", "Corrected by Bonferroni's method", _p),
    Column("p_holm", "Holm", "Corrected by Holm's method", _p),
    Column("models", "models", "Number of pairs, or of models of both samples together", _fixed(0)),
    Column(
        "left_out", "left out", "Pairs or models left out because alpha is undefined or a model is at chance", _fixed(0)
    ),
    Column("reason", "why not", "Why there is no result"),
)
_PIES = (
    *_CLASSES[:2],
    Column("class", "labeled", "The true class"),
    Column("support", "examples", "Number of test examples", _fixed(0)),
    Column("pies", "changed", "Number of examples whose {most frequent |}prediction changed", _fixed(0)),
    Column("share", "%", "Their share of the class", _percent),
)
_EQUAL = (
    Column("score", "first", "The first of the two"),
    Column("other_score", "other", "The other of the two"),
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
        "confidence_dense",
        "confidence before %",
        "Mean probability of the predicted class, dense [models|model]",
        _percent,
    ),
    Column("confidence", "after %", "The same, compressed {models|model}", _percent),
    Column(
        "ece_dense",
        "calibration error before %",
        "Expected calibration error of 15 bins, dense [models|model]",
        _percent,
    ),
    Column("ece", "after %", "The same, compressed {models|model}", _percent),
    Column("kl", "KL", "Kullback-Leibler divergence of the compressed from the dense probabilities, nats", _fixed(3)),
    Column("k", "k", "k of the top-k recall", _fixed(0)),
    Column(
        "top_k_dense",
        "top-k before %",
        "Share of examples whose class is among the k most probable, dense [models|model]",
        _percent,
    ),
    Column("top_k", "after %", "The same, compressed {models|model}", _percent),
)
_DRIFT = (
    _SCORE,
    _RATIO,
    Column("class", "class", "The true class"),
    Column("predicted", "predicted", "The class predicted instead"),
    Column(
        "lost",
        "lost",
        "Lost examples of the class that are predicted as the other class{, mean over models|[, mean over models|]}",
        _mean_count,
    ),
    Column("share", "share %", "Their share of the lost examples of the class", _percent),
    Column(
        "before",
        "all before",
        "All examples of the class that the [dense models predict|dense model predicts] as the other class[, mean|]",
        _mean_count,
    ),
    Column("after", "all after", "The same, compressed {models|model}", _mean_count),
)
_RISK = (
    _SCORE,
    Column("example", "example", "Index of the test example, from 0", _fixed(0)),
    Column("name", "class", "Its true class"),
    Column("risk", "risk", "Uncertainty of the dense [models|model], from 0 to 1", _fixed(3)),
    Column("lost", "lost %", "Share of the compressed models that lost it", _percent),
)


_NEUTRAL = {
    "score": ("name", "The name of the models that are compared with the dense ones"),
    "other_score": ("against", "The models compared with"),
}  # headings where models have a name and no ratio, so that nothing says that they were pruned


def tables(audit: AuditTables, equal: pd.DataFrame) -> dict[str, Table | None]:
    """Make every table of the page; None if there is nothing to show.

    Args:
      audit: the audit.
      equal: the comparisons at equal accuracy; without rows if there is nothing to compare.
    """
    strong = set(lost_more(audit.classes, audit.level).index)
    single = audit.scores == ("pruned",)
    risky = audit.at_risk.groupby("score", sort=False).head(_MOST_AT_RISK)
    groups = audit.groups.assign(**{"class": audit.groups["class"].fillna("all classes")})
    made = {
        "summary": _table(
            "summary",
            "Sets of models" if audit.named else "Ratios" if single else "Scores and ratios",
            _SUMMARY,
            audit.summary,
        ),
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
            in_number(audit, "Examples about which the [dense models are|dense model is] least certain"),
            _RISK,
            risky.assign(name=[audit.class_names[int(c)] for c in risky["label"]]),
            every=len(audit.at_risk),
        ),
        "tests": _table("tests", "Tests", _TESTS, audit.tests),
        "equal": _table("equal", "At equal loss of accuracy", _EQUAL, equal, sortable=False),
    }
    return {name: table and _worded(table, audit) for name, table in made.items()}


def _worded(table: Table, audit: AuditTables) -> Table:
    """Return a table with headings for several models or one, and without the word score where models have names."""
    columns = [column._replace(meaning=in_number(audit, column.meaning)) for column in table.columns]
    if audit.named and table.name != "equal":
        columns = [
            column._replace(label=_NEUTRAL[column.name][0], meaning=_NEUTRAL[column.name][1])
            if column.name in _NEUTRAL
            else column
            for column in columns
        ]
    return table._replace(columns=tuple(columns))


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
    note = "" if len(frame) == every else f"{len(frame)} of {every} rows are shown; Audit.to_csv (--csv) writes all."

    def absent(c: str) -> bool:
        empty = (frame[c].isna() | (frame[c] == "")).all()
        alone = (
            c == "score" and name not in _FILTERED and (frame[c] == "pruned").all()
        )  # the only score, without a name
        unstated = c in ("ratio", "other_ratio") and (frame[c].isna() | (frame[c] == UNSTATED)).all()
        return bool(empty or alone or unstated)

    kept = tuple(c for c in columns if c.name in frame and not absent(c.name))
    kept = tuple(c for c in kept if c.name != "collapsed" or frame["collapsed"].any())
    kept = tuple(_counts(column, frame[column.name]) for column in kept)
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


def _cell(column: Column, value: FrameCell) -> Cell:
    if column.show is None:
        return Cell("" if pd.isna(value) else str(value), None)
    if pd.isna(value):
        return Cell("n/a", "")
    return Cell(column.show(value), repr(float(value)).replace("inf", "Infinity"))  # as the page's script reads it


def _counts(column: Column, values: "pd.Series[float]") -> Column:
    """Show every number of examples of a column with one decimal if one of them is fractional."""
    fractional = column.show is _mean_count and not (values.dropna() % 1 == 0).all()
    return column._replace(show=_fixed(1)) if fractional else column


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
