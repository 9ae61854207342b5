"""What the tables of an audit show, as the sentences of a report need it."""

import numpy as np
import pandas as pd

from jprune.recall.inference.corrected import WITHIN_NOISE
from jprune.recall.report.words import Row, cell
from jprune.recall.tables.frames import AuditTables

VERDICTS = {
    ">": "widened {}",
    ">=": "widened {}, by less than the margin",
    "<": "narrowed {}",
    "<=": "narrowed {}, by less than the margin",
    "below": "cannot be judged {}: noise of the test set alone makes alpha smaller than 1",
    "seed": "narrowed {}, but no more than between two dense training runs",
    "<0": "reversed {}: the weak classes are now the strong ones",
    "=": "stayed the same within the margin {}",
    "?": "are not shown to have changed {}",
    "noise": "cannot be measured by alpha {}: the dense recalls show no class differences beyond sampling noise",
    "collapsed": "say nothing {} because every model is at chance",
    "": "cannot be judged {}: alpha has no interval",
    "undefined": "cannot be measured by alpha {}, which is undefined",
}


def verdict_of(row: Row) -> str:
    """The verdict on a row of the summary."""
    if row["alpha_corrected_reason"] == "every model has collapsed":
        return "collapsed"
    if row["alpha_corrected_reason"] == WITHIN_NOISE and np.isfinite(cell(row, "alpha")):
        return "noise"
    corrected = np.isfinite(cell(row, "alpha_corrected"))
    if not corrected and not np.isfinite(cell(row, "alpha")):
        return "undefined"
    name = "alpha_corrected" if corrected else "alpha"
    mark = str(row[f"{name}_mark"])
    if cell(row, f"{name}_high") < 0:
        return "<0"
    known = np.isfinite(cell(row, "alpha_seed" if corrected else "alpha_seed_low"))
    if mark == "<" and ((known and not _below_seeds(row)) or not (known or corrected)):
        return "seed" if known else "below"
    return {"?": "=", ">": ">=", "<": "<="}[mark] if corrected and row["alpha_corrected_equal"] else mark


def plain(verdict: str) -> str:
    """A verdict without the place where the models are named."""
    return VERDICTS[verdict].replace(" {}", "")


def _below_seeds(row: Row) -> bool:
    """Whether alpha lies below what another training seed has."""
    seed, high = cell(row, "alpha_seed_low"), cell(row, "alpha_high")
    if not np.isfinite(seed):  # of two dense models there is no interval
        seed, high = cell(row, "alpha_seed"), cell(row, "alpha")
    return (high if np.isfinite(high) else cell(row, "alpha")) < seed


def lost_more(classes: pd.DataFrame, level: float) -> pd.DataFrame:
    """The classes or groups shown to have lost more than all examples did, at 1 - level after Holm's correction."""
    shown: pd.DataFrame = classes[(classes["excess"] > 0) & (classes["change"] < 0) & (classes["p_holm"] < 1 - level)]
    return shown


def lost_less(classes: pd.DataFrame, level: float) -> pd.DataFrame:
    """The classes shown to have gained more, or lost less, than all examples did."""
    shown: pd.DataFrame = classes[(classes["excess"] < 0) & (classes["p_holm"] < 1 - level)]
    return shown


def evenness(audit: AuditTables, row: Row) -> float:
    """The p-value of an even loss over the classes; NaN without a test."""
    tests = rows_of(audit.tests[audit.tests["question"] == "evenness"], row)
    return float(tests["p"].iloc[0]) if len(tests) and pd.notna(tests["p"].iloc[0]) else float("nan")


def detectable_excess(classes: pd.DataFrame) -> float:
    """The excess loss that would have been shown in a typical class; infinite where no loss would have been.

    NaN where it is unknown, because there are no tests over examples.
    """
    tested = classes[classes["p_holm"].notna()]
    if not len(tested) or classes["lost"].isna().all():
        return float("nan")
    found = tested["detectable"].fillna(np.inf)
    # Where exactly half of the classes have a limit, the largest of these holds for half, not the mean with infinity.
    half = np.isinf(found).mean() == 0.5
    return float(np.quantile(found, 0.5, method="lower") if half else np.median(found))


def rows_of(frame: pd.DataFrame, row: Row) -> pd.DataFrame:
    """The rows of a table about the score and ratio of a row of another."""
    found: pd.DataFrame = frame[(frame["score"] == row["score"]) & (frame["ratio"] == row["ratio"])]
    return found


def reasons(audit: AuditTables, rows: list[dict[str, object]]) -> str:
    """Why alpha is undefined for models of some rows of the summary, in parentheses."""
    found = sorted({str(reason) for row in rows for reason in rows_of(audit.alphas, row)["reason"]} - {""})
    return f" ({'; '.join(found)})" if found else ""
