"""The audit's tidy tables, one builder each: rates in, a pandas frame out.

Rows are sorted by score (in the order given), ratio (ascending), then model or class. Every number
comes from the measures of this wing.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd
import scipy.stats

from jprune.recall.inference.intervals import defined_mean, holm, mark, t_interval
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
from jprune.recall.tables.audited import AuditedModels, difference

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
            "reason": undefined(*given),
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

    Args:
      study: the rates.
      per_model: what ``alphas`` made of them.
      dense: what ``dense_models`` made of them.
    """
    rows = []
    for score, ratio, baseline, pruned in study.stacks():
        of_stack = per_model[(per_model["score"] == score) & (per_model["ratio"] == ratio)]
        of_dense = dense[dense["score"] == score]
        row: dict[str, object] = {"score": score, "ratio": ratio, "models": len(of_stack)}
        row["accuracy_dense"] = float(of_dense["accuracy"].mean())
        change = difference(study.dense[score].accuracy, pruned.accuracy, study)
        row |= {"accuracy": float(pruned.accuracy.mean()), "accuracy_change": float(change.mean)}
        row |= {"accuracy_change_low": float(change.low), "accuracy_change_high": float(change.high)}
        for name in of_stack.columns[of_stack.columns.get_loc("alpha") :]:
            if pd.api.types.is_float_dtype(of_stack[name]):
                row |= _mean(name, of_stack[name], study.level)
        pooled = pooled_intensification(baseline.recall, pruned.recall, baseline.accuracy, pruned.accuracy)
        row |= {"pooled_alpha": float(pooled.slope), "r2": float(pooled.r2), "pooled_left_out": int(pooled.left_out)}
        row["balance_variance_dense"] = float(of_dense["balance_variance"].mean())
        row["worst_recall_dense"] = float(of_dense["worst_recall"].mean())
        rows.append(row)
    return pd.DataFrame(rows)


def classes(study: AuditedModels) -> pd.DataFrame:
    """One row per score, ratio and class: recall before and after, and whether the class lost more than its share.

    ``excess`` is the excess accuracy gap, positive where a class lost more than the accuracy did. Its
    p-value is of a paired t test where models are paired, else of Hooker's Welch test (which stands
    beside it in any case), corrected over the classes by Holm's method.
    """
    return pd.concat(
        [_classes(study, score, ratio, baseline, pruned) for score, ratio, baseline, pruned in study.stacks()],
        ignore_index=True,
    )


def _classes(study: AuditedModels, score: str, ratio: float, baseline: Rates, pruned: Rates) -> pd.DataFrame:
    dense, given = study.dense[score], (baseline.recall, pruned.recall, baseline.accuracy, pruned.accuracy)
    change = difference(dense.recall, pruned.recall, study)
    before, after = balance(dense.recall, dense.accuracy), balance(pruned.recall, pruned.accuracy)
    excess = difference(after, before, study)
    welch = class_tests(dense.recall, pruned.recall, dense.accuracy, pruned.accuracy).p_value
    p = _paired_p(after - before) if study.paired else welch
    return pd.DataFrame(
        {
            "score": score,
            "ratio": ratio,
            "class": list(study.class_names),
            "support": pruned.support,
            "recall_dense": defined_mean(dense.recall.T),
            "recall": defined_mean(pruned.recall.T),
            "change": change.mean,
            "change_low": change.low,
            "change_high": change.high,
            "balance_dense": defined_mean(normalized_balance(dense.recall, dense.accuracy).T),
            "balance": defined_mean(normalized_balance(pruned.recall, pruned.accuracy).T),
            "intensification": class_intensification(*(defined_mean(field.T) for field in given)),
            "normalized_difference": defined_mean(normalized_difference(*given).T),
            "excess": excess.mean,
            "excess_low": excess.low,
            "excess_high": excess.high,
            "p": p,
            "p_holm": holm(p),
            "p_welch": welch,
        }
    )


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
