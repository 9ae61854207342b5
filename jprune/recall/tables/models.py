"""The audit's tidy tables, one builder each: rates in, a pandas frame out.

Rows are sorted by score (in the order given), ratio (ascending), then model or class.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats

from jprune.recall.inference.corrected import (
    CorrectedAlpha,
    SeedNull,
    SpreadRatio,
    corrected_intensification,
    seed_null,
    spread_ratio,
)
from jprune.recall.inference.intervals import defined_mean, holm, independent_test, mark, paired_test, t_interval
from jprune.recall.inference.losses import change_of_all, class_losses, wilson
from jprune.recall.measures.disparity import (
    class_tests,
    disparity,
    error_rate_change,
    excess_accuracy_gap,
    normalized_difference,
)
from jprune.recall.measures.intensification import (
    affine_intensification,
    balance,
    class_intensification,
    intensification,
    normalized_balance,
    null_intensification,
    pooled_intensification,
    relative_intensification,
    reverse_intensification,
    rma_intensification,
    undefined,
)
from jprune.recall.measures.rates import Rates
from jprune.recall.tables.audited import AuditedModels, collapsed, difference

_WITH_INTERVAL = ("alpha", "alpha_over_null", "alpha_intercept")


def dense_models(study: AuditedModels) -> pd.DataFrame:
    """One row per score and dense model: accuracy and how unequal its classes are.

    Where the scores share their dense models the rows repeat under every score.
    """
    frames = []
    for score, dense in study.dense.items():
        frames.append(
            pd.DataFrame(
                {
                    "score": score,
                    "model": np.arange(len(dense.accuracy)),
                    "accuracy": dense.accuracy,
                    **_inequality(study, dense),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def alphas(study: AuditedModels) -> pd.DataFrame:
    """One row per score, ratio and model: alpha, its controls and neighbours, and why alpha is NaN where it is."""
    return pd.concat([_alphas(study, *stack) for stack in study.stacks()], ignore_index=True)


def _alphas(study: AuditedModels, score: str, ratio: float, dense: Rates, pruned: Rates) -> pd.DataFrame:
    given = (dense.recall, pruned.recall, dense.accuracy, pruned.accuracy)
    gap = excess_accuracy_gap(*given)
    errors = error_rate_change(
        np.stack([dense.false_positive, 1 - dense.recall], -1), np.stack([pruned.false_positive, 1 - pruned.recall], -1)
    )
    return pd.DataFrame(
        {
            "score": score,
            "ratio": ratio,
            "model": np.arange(len(pruned.accuracy)),
            "accuracy_dense": dense.accuracy,
            "accuracy": pruned.accuracy,
            "alpha": intensification(*given),
            "alpha_null": null_intensification(dense.accuracy, pruned.accuracy),
            "alpha_over_null": relative_intensification(*given),
            "alpha_reverse": reverse_intensification(*given),
            "alpha_rma": rma_intensification(*given),
            "alpha_intercept": affine_intensification(*given).slope,
            "alpha_precision": intensification(dense.precision, pruned.precision, dense.accuracy, pruned.accuracy),
            "alpha_f1": intensification(dense.f1, pruned.f1, dense.accuracy, pruned.accuracy),
            **_inequality(study, pruned),
            "excess_gap": gap.maximum,
            "excess_gap_class": _names(study, gap.worst_class),
            "cev": errors.cev,
            "sde": errors.sde,
            "collapsed": collapsed(pruned),
            "reason": [text.replace("pruned", "compressed") if study.named else text for text in undefined(*given)],
        }
    )


def recalls(study: AuditedModels) -> pd.DataFrame:
    """One row per score, ratio, model and class: recall and normalized recall balance, dense and pruned."""
    frames = []
    for score, ratio, dense, pruned in study.stacks():
        models, classes = pruned.recall.shape
        frames.append(
            pd.DataFrame(
                {
                    "score": score,
                    "ratio": ratio,
                    "model": np.repeat(np.arange(models), classes),
                    "class": np.tile(np.asarray(study.class_names, object), models),
                    "recall_dense": dense.recall.ravel(),
                    "recall": pruned.recall.ravel(),
                    "balance_dense": normalized_balance(dense.recall, dense.accuracy).ravel(),
                    "balance": normalized_balance(pruned.recall, pruned.accuracy).ravel(),
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def summary(study: AuditedModels, per_model: pd.DataFrame, dense: pd.DataFrame) -> pd.DataFrame:
    """One row per score and ratio: means over models, intervals, marks against 1, the pooled slope.

    Collapsed models are counted, and left out of every column about alpha: intervals that mix both describe neither.
    Alpha between seeds leaves out dense models at chance.

    Args:
      study: the rates.
      per_model: what ``alphas`` made of them.
      dense: what ``dense_models`` made of them.
    """
    rows = []
    seeds = {score: _between_seeds(dense, study.level) for score, dense in study.dense.items()}
    for score, ratio, baseline, pruned in study.stacks():
        of_stack = per_model[(per_model["score"] == score) & (per_model["ratio"] == ratio)]
        of_dense = dense[dense["score"] == score]
        row: dict[str, object] = {"score": score, "ratio": ratio, "models": len(of_stack)}
        row["accuracy_dense"] = float(of_dense["accuracy"].mean())
        change = difference(study.dense[score].accuracy, pruned.accuracy, study)
        row |= {"accuracy": float(pruned.accuracy.mean()), "accuracy_change": float(change.mean)}
        row["accuracy_change_low"] = float(np.maximum(change.low, -1))  # of fractions; NaN stays
        row["accuracy_change_high"] = float(np.minimum(change.high, 1))
        row["accuracy_change_p"] = _change_p(study, score, ratio, pruned)
        healthy = ~of_stack["collapsed"].to_numpy()
        row |= _agreement(study, score, ratio)
        for name in of_stack.columns[of_stack.columns.get_loc("alpha") :]:
            if pd.api.types.is_float_dtype(of_stack[name]):
                row |= _mean(name, of_stack[name][healthy] if name.startswith("alpha") else of_stack[name], study.level)
        row |= _corrected(study, score, ratio, healthy)
        row |= dict(zip(("alpha_seed", "alpha_seed_low", "alpha_seed_high"), seeds[score], strict=True))
        pooled = pooled_intensification(
            baseline.recall[healthy], pruned.recall[healthy], baseline.accuracy[healthy], pruned.accuracy[healthy]
        )
        row |= {"pooled_alpha": float(pooled.slope), "r2": float(pooled.r2), "pooled_left_out": int(pooled.left_out)}
        row["balance_variance_dense"] = float(of_dense["balance_variance"].mean())
        row["worst_recall_dense"] = float(of_dense["worst_recall"].mean())
        gone = int((~healthy).sum())
        low, high = wilson(gone, len(healthy), study.level)
        row |= {"collapsed": gone, "collapsed_low": low, "collapsed_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def _between_seeds(dense: Rates, level: float) -> SeedNull:
    """Alpha between the dense models that are not at chance."""
    healthy = ~collapsed(dense)
    return seed_null(dense.recall[healthy], dense.accuracy[healthy], level)


def _change_p(study: AuditedModels, score: str, ratio: float, pruned: Rates) -> float:
    """The p-value of no change of accuracy: over examples and models, or from counts alone over models."""
    if study.examples is not None:
        before, after = study.examples.right(score), study.examples.right(score, ratio)
        return change_of_all(before, after, paired=study.paired)
    dense = study.dense[score].accuracy
    test = paired_test if study.paired else independent_test
    return float(test(dense, pruned.accuracy, "two-sided").p_value)


def _corrected(study: AuditedModels, score: str, ratio: float, healthy: npt.NDArray[np.bool_]) -> dict[str, object]:
    """Alpha corrected for test-set noise, its interval, whether it is within the margin, and what it could show."""
    nan = float("nan")
    found = CorrectedAlpha(nan, nan, nan, nan, nan, nan, 0, "counts alone do not say which examples were lost")
    spread = SpreadRatio(nan, nan, nan)
    if study.examples is not None and healthy.any():
        before, after = study.examples.right(score), study.examples.right(score, ratio)[healthy]
        before = before[healthy] if study.paired else before
        found = corrected_intensification(study.examples.true, before, after, paired=study.paired, level=study.level)
        if len(before) == 1:
            spread = spread_ratio(study.examples.true, before[0], after, study.level)
    elif not healthy.any():
        found = found._replace(reason="every model has collapsed")
    # A difference of that many standard errors is shown nine times in ten.
    critical = scipy.stats.t.isf((1 - study.level) / 2, found.degrees) + scipy.stats.t.isf(0.1, found.degrees)
    inside = 1 / (1 + study.margin) <= found.low and found.high <= 1 + study.margin
    return {
        "alpha_corrected": found.alpha,
        "alpha_corrected_low": found.low,
        "alpha_corrected_high": found.high,
        "alpha_corrected_mark": str(mark(found.low, found.high)),
        "alpha_corrected_equal": bool(inside),
        "alpha_corrected_detectable": critical * found.error_at_one,
        "alpha_corrected_reason": found.reason,
        "spread": spread.ratio,
        "spread_low": spread.low,
        "spread_high": spread.high,
    }


def _agreement(study: AuditedModels, score: str, ratio: float) -> dict[str, object]:
    """Examples that changed from right to wrong and back, and predictions that agree, mean over models."""
    if study.examples is None:
        return {"lost": float("nan"), "won": float("nan"), "agreement": float("nan")}
    before, after = study.examples.right(score), study.examples.right(score, ratio)
    if not study.paired:
        share, other = before.mean(0), after.mean(0)
        lost, won = (share * (1 - other)).sum(), ((1 - share) * other).sum()
        return {"lost": float(lost), "won": float(won), "agreement": float("nan")}
    same = study.examples.dense[score].predicted == study.examples.compressed[score][ratio].predicted
    models = len(before)
    lost, won = (before & ~after).sum() / models, (~before & after).sum() / models
    return {"lost": float(lost), "won": float(won), "agreement": float(same.mean())}


def classes(study: AuditedModels) -> pd.DataFrame:
    """One row per score, ratio and class: recall before and after, and whether the class lost more than all examples.

    ``excess`` is the excess accuracy gap, positive where a class lost more than the accuracy did. Intervals and
    p-values are over test examples and models together; from counts alone they are over models (a paired t test, or
    Hooker's Welch test where models are unpaired). p-values are corrected over the classes by Holm's method.
    """
    return pd.concat(
        [_classes(study, score, ratio, baseline, pruned) for score, ratio, baseline, pruned in study.stacks()],
        ignore_index=True,
    )


def _classes(study: AuditedModels, score: str, ratio: float, baseline: Rates, pruned: Rates) -> pd.DataFrame:
    dense, given = study.dense[score], (baseline.recall, pruned.recall, baseline.accuracy, pruned.accuracy)
    columns: dict[str, object] = {
        "score": score,
        "ratio": ratio,
        "class": list(study.class_names),
        "support": pruned.support,
        "recall_dense": defined_mean(dense.recall.T),
        "recall": defined_mean(pruned.recall.T),
    }
    balances = {
        "balance_dense": defined_mean(normalized_balance(dense.recall, dense.accuracy).T),
        "balance": defined_mean(normalized_balance(pruned.recall, pruned.accuracy).T),
        "intensification": class_intensification(*(defined_mean(field.T) for field in given)),
        "normalized_difference": defined_mean(normalized_difference(*given).T),
    }
    welch = class_tests(dense.recall, pruned.recall, dense.accuracy, pruned.accuracy).p_value
    found = _losses(study, score, ratio, pruned, welch)
    before = ("lost", "won", "change", "change_low", "change_high")
    columns |= {name: found[name] for name in before} | balances
    columns |= {name: values for name, values in found.items() if name not in before}
    return pd.DataFrame(columns | {"p_welch": welch})


def _losses(
    study: AuditedModels, score: str, ratio: float, pruned: Rates, welch: npt.NDArray[np.float64]
) -> dict[str, npt.NDArray[np.float64]]:
    """Changes and excesses of every class with their intervals and tests."""
    if study.examples is not None:
        found = class_losses(
            study.examples.true,
            study.examples.right(score),
            study.examples.right(score, ratio),
            len(study.class_names),
            paired=study.paired,
            level=study.level,
        )
        return {name: values for name, values in found._asdict().items() if name != "support"}
    dense = study.dense[score]
    change = difference(dense.recall, pruned.recall, study)
    before, after = balance(dense.recall, dense.accuracy), balance(pruned.recall, pruned.accuracy)
    excess = difference(after, before, study)
    p = _paired_p(after - before) if study.paired else welch
    unknown = np.full(len(p), np.nan)
    return {
        "lost": unknown,
        "won": unknown,
        "change": change.mean,
        "change_low": change.low,
        "change_high": change.high,
        "excess": excess.mean,
        "excess_low": excess.low,
        "excess_high": excess.high,
        "p": p,
        "p_holm": holm(p),
        "detectable": unknown,
    }


def _paired_p(differences: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Two-sided p-values of paired t tests, one per column; NaN with fewer than two models or no spread."""
    interval = t_interval(differences.T)
    made = (interval.models > 1) & (interval.sd > 16 * np.finfo(np.float64).eps)
    p = np.full(made.shape, np.nan)
    p[made] = scipy.stats.ttest_1samp(differences[:, made], 0.0, axis=0).pvalue
    return p


def _mean(name: str, values: "pd.Series[float]", level: float) -> dict[str, object]:
    """The mean of a column over models, with its interval and mark for the columns that have one."""
    interval = t_interval(values.to_numpy(), level)
    found: dict[str, object] = {name: float(interval.mean)}
    if name in _WITH_INTERVAL:
        found |= {
            f"{name}_sd": float(interval.sd),
            f"{name}_low": float(interval.low),
            f"{name}_high": float(interval.high),
        }
        found |= {f"{name}_models": int(interval.models), f"{name}_mark": str(mark(interval.low, interval.high))}
    return found


def _inequality(study: AuditedModels, rates: Rates) -> dict[str, object]:
    """The columns that say how unequal the classes of each model are."""
    unequal = disparity(rates.recall, rates.accuracy)
    return {
        "balance_variance": unequal.variance,
        "worst_class": _names(study, unequal.worst_class),
        "worst_recall": unequal.worst,
        "recall_difference": unequal.difference,
        "recall_ratio": unequal.ratio,
    }


def _names(study: AuditedModels, index: npt.NDArray[np.int64]) -> list[str]:
    return ["" if c < 0 else study.class_names[c] for c in index]
