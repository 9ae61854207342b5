"""What the tables of an audit show, as the sentences of a report need it."""

import numpy as np
import pandas as pd

from jprune.recall.inference.corrected import TOO_FEW_EXAMPLES, TOO_FEW_MODELS, WITHIN_NOISE
from jprune.recall.report.words import Row, cell
from jprune.recall.tables.frames import AuditTables

VERDICTS = {
    ">": "widened {}",
    ">=": "widened {}, by less than the margin",
    "<": "narrowed {}",
    "<=": "narrowed {}, by less than the margin",
    "below": "cannot be judged {}: noise of the test set alone makes alpha smaller than 1",
    "seed": "are not shown to have narrowed {} more than between two dense training runs",
    "alone": "are not shown to have narrowed {}: alpha is below 1, as it can be between two training runs",
    "apart": "are not shown to have widened {}: alpha is above 1, but recalls are not shown to spread further apart",
    "<0": "are reversed {}: a strong class is now a weak one, or a weak class a strong one",
    "=": "stayed the same within the margin {}",
    "?": "are not shown to have changed {}",
    "spread": f"cannot be judged {{}}: there are {TOO_FEW_MODELS}",
    "noise": "cannot be measured by alpha {}: the dense recalls show no class differences beyond sampling noise",
    "few": f"cannot be measured by alpha {{}}: there are {TOO_FEW_EXAMPLES}",
    "collapsed": "say nothing {} because every model is at chance",
    "": "cannot be judged {}: alpha has no interval",
    "undefined": "cannot be measured by alpha {}, which is undefined",
}


UNMEASURED = ("noise", "few")  # verdicts where the noise of the test set makes alpha meaningless
SHOWN = (">", ">=", "<", "<=", "<0")  # verdicts that say on which side of 1 alpha lies
_IN_POINTS = {">": "widened in points", "<": "narrowed in points"}


def verdict_of(row: Row) -> str:
    """The verdict on a row of the summary."""
    reason = str(row["alpha_corrected_reason"])
    refused = {"every model has collapsed": "collapsed", TOO_FEW_MODELS: "spread"}
    if reason in refused:
        return refused[reason]
    unmeasured = {WITHIN_NOISE: "noise", TOO_FEW_EXAMPLES: "few"}
    if reason in unmeasured and np.isfinite(cell(row, "alpha")):
        return unmeasured[reason]
    corrected = np.isfinite(cell(row, "alpha_corrected"))
    if not corrected and not np.isfinite(cell(row, "alpha")):
        return "undefined"
    name = "alpha_corrected" if corrected else "alpha"
    mark = str(row[f"{name}_mark"])
    if cell(row, f"{name}_high") < 0:
        return "<0"
    equal = corrected and row["alpha_corrected_equal"]
    if mark == "<" and not _narrower(row):
        known = np.isfinite(cell(row, "alpha_seed" if corrected else "alpha_seed_low"))
        return "=" if equal else "seed" if known else "alone" if corrected else "below"
    if mark == ">" and not _wider(row):
        mark = "?" if equal else "apart"
    return {"?": "=", ">": ">=", "<": "<="}[mark] if equal else mark


def described(audit: AuditTables, row: Row, place: str = "") -> str:
    """The verdict on a row in words, with the place where the models are named.

    Alpha compares differences relative to the accuracy. Where differences in points moved another way, as they do if
    every class lost as many points, the words say both.
    """
    verdict = verdict_of(row)
    points = _in_points(row, verdict, _change_of_accuracy(audit, row))
    where = " ".join(filter(None, ["relative to accuracy" if points else "", place]))
    text = VERDICTS[verdict]
    return (text.format(where) if where else text.replace(" {}", "")) + points


def _change_of_accuracy(audit: AuditTables, row: Row) -> float:
    """The accuracy after compression, divided by that before, of the models from which alpha is computed."""
    models = rows_of(audit.alphas, row)
    models = models[~models["collapsed"].astype(bool)]
    before = float(models["accuracy_dense"].mean())
    return float(models["accuracy"].mean()) / before if before > 0 else float("nan")


def _in_points(row: Row, verdict: str, change: float) -> str:
    """How the differences in points changed; empty where that is what the verdict says of alpha.

    Their slope is alpha times ``change``, the accuracy after compression divided by that before.
    """
    side = verdict[:1]
    if verdict not in (*SHOWN, "=", "?") or verdict == "<0" or not np.isfinite(change):
        return ""
    name = "alpha_corrected" if np.isfinite(cell(row, "alpha_corrected")) else "alpha"
    low, high = (cell(row, f"{name}_{end}") * change for end in ("low", "high"))
    points = ">" if low > 1 and _wider(row, change) else "<" if high < 1 and _narrower(row, change) else "?"
    if points == side or (side == "=" and points == "?"):
        return ""
    if points == "?":
        return f", but are not shown to have {_IN_POINTS[side]}"
    return f", but {_IN_POINTS[points]}"


def _narrower(row: Row, change: float = 1.0) -> bool:
    """Whether alpha, times a change of scale, is below 1 by more than another training seed makes it.

    With three or more dense models alpha is compared with that between them; with two, of which there is no interval,
    corrected alpha is. With one the classes have to differ less than before, which another seed does not cause.
    """
    if np.isfinite(cell(row, "alpha_seed_low")):
        high = cell(row, "alpha_high")
        return (high if np.isfinite(high) else cell(row, "alpha")) * change < cell(row, "alpha_seed_low")
    if np.isfinite(cell(row, "alpha_seed")):
        return cell(row, "alpha_corrected_high") * change < cell(row, "alpha_seed")
    return cell(row, "spread_high") * change < 1


def _wider(row: Row, change: float = 1.0) -> bool:
    """Whether the recalls spread further apart too, on the scale of ``change``, where one dense model is compared.

    Its differences between classes are the denominator of alpha and scale its standard error, so a dense model whose
    classes differ little by chance has an alpha that is too large and an interval that is too narrow. The spread
    treats both models alike and is at least alpha. Without its interval, as with several dense models, alpha decides.
    """
    return not cell(row, "spread_low") * change <= 1


def lost_more(classes: pd.DataFrame, level: float) -> pd.DataFrame:
    """The classes or groups shown to have lost more than all examples did, at 1 - level after Holm's correction."""
    shown: pd.DataFrame = classes[(classes["excess"] > 0) & (classes["change"] < 0) & (classes["p_holm"] < 1 - level)]
    return shown


def lost_less(classes: pd.DataFrame, level: float) -> pd.DataFrame:
    """The classes shown to have gained more, or lost less, than all examples did."""
    shown: pd.DataFrame = classes[(classes["excess"] < 0) & (classes["p_holm"] < 1 - level)]
    return shown


def gained_less(classes: pd.DataFrame, level: float) -> pd.DataFrame:
    """The classes shown to have gained less than all examples did, without a loss of their own."""
    shown: pd.DataFrame = classes[(classes["excess"] > 0) & (classes["change"] >= 0) & (classes["p_holm"] < 1 - level)]
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


def reasons(audit: AuditTables, row: Row) -> str:
    """Why alpha is undefined for models of a row of the summary."""
    return "; ".join(sorted({str(reason) for reason in rows_of(audit.alphas, row)["reason"]} - {""}))
