"""Related measures of how pruning affects classes, each from its own paper.

They take rates per class (..., classes) with the overall accuracies (...), confusion counts, or losses per example, and
return numpy float64 for every model of a stack. A class whose rate is NaN is left out.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats
from jaxtyping import Float, Int, Shaped

from jprune.recall.inference.intervals import Alternative, check_alternative, defined_mean, t_interval
from jprune.recall.inputs.arguments import Numbers, pair, rates, recalls_and_accuracy, stacks
from jprune.recall.measures.intensification import balance, normalized_balance, quotient


class Disparity(NamedTuple):
    """Measures of the inequality of classes of each model; every field has the shape (...).

    Attributes:
      worst_class: the class of lowest recall (ties: the first); -1 without any class.
      worst: its recall (fairlearn's ``group_min``).
      difference: largest minus smallest recall.
      ratio: smallest over largest recall; NaN where every recall is 0.
      difference_to_overall: largest distance between a recall and the accuracy.
      ratio_to_overall: smallest of R/A and A/R over the classes; NaN where the accuracy is 0.
      variance: variance of recall over the classes, ddof 0.
      classes: number of classes with a recall.
    """

    worst_class: Int[np.ndarray, "*models"]
    worst: Float[np.ndarray, "*models"]
    difference: Float[np.ndarray, "*models"]
    ratio: Float[np.ndarray, "*models"]
    difference_to_overall: Float[np.ndarray, "*models"]
    ratio_to_overall: Float[np.ndarray, "*models"]
    variance: Float[np.ndarray, "*models"]
    classes: Int[np.ndarray, "*models"]


class ExcessGap(NamedTuple):
    """The accuracy that each class lost in excess of the overall loss.

    Attributes:
      per_class: (R^c_1 - R^c_t) - (A_1 - A_t), float64 (..., classes); positive for classes that lost more.
      maximum: the maximum over the classes (...), which the paper bounds.
      worst_class: the class of the maximum (ties: the first); -1 without any class.
    """

    per_class: Float[np.ndarray, "*models classes"]
    maximum: Float[np.ndarray, "*models"]
    worst_class: Int[np.ndarray, "*models"]


class ErrorChange(NamedTuple):
    """Measures of how unevenly the error rates of the classes changed.

    Attributes:
      per_class: relative change of (FPR, FNR), (..., classes, 2); NaN where undefined.
      cev: combined error variance (...).
      sde: symmetric distance error (...).
      classes: number of classes from which both are computed.
      left_out: number of classes left out because a dense rate is 0 or undefined.
    """

    per_class: Float[np.ndarray, "*models classes 2"]
    cev: Float[np.ndarray, "*models"]
    sde: Float[np.ndarray, "*models"]
    classes: Int[np.ndarray, "*models"]
    left_out: Int[np.ndarray, "*models"]


class ClassTests(NamedTuple):
    """One Welch test per class; every field has the shape (classes,).

    Attributes:
      difference: mean balance of the pruned models minus that of the dense ones.
      statistic: Welch's t.
      p_value: uncorrected.
      reason: why there is no test result; empty if there is one.
    """

    difference: Float[np.ndarray, " classes"]
    statistic: Float[np.ndarray, " classes"]
    p_value: Float[np.ndarray, " classes"]
    reason: Shaped[np.ndarray, " classes"]


def disparity(recall: Numbers, accuracy: Numbers) -> Disparity:
    """Compute the worst class, spread and variance of recall, as defined by fairlearn's ``MetricFrame``.

    Args:
      recall: (..., classes), fractions; NaN leaves a class out.
      accuracy: (...), fractions.

    Raises:
      ValueError: a fraction is outside [0, 1], or shapes do not match.

    >>> d = disparity([0.9, 0.6, 0.9], 0.8)
    >>> int(d.worst_class), float(d.worst), float(d.difference.round(3)), float(d.ratio.round(3))
    (1, 0.6, 0.3, 0.667)
    """
    r, a = recalls_and_accuracy(recall, accuracy)
    overall = np.broadcast_to(a[..., None], r.shape)
    present = ~np.isnan(r)
    low, high = _lowest(r), _highest(r)
    larger, smaller = np.fmax(r, overall), np.fmin(r, overall)
    return Disparity(
        worst_class=_where_equal(r, low),
        worst=low,
        difference=np.asarray(high - low),
        ratio=quotient(low, high, high > 0),
        difference_to_overall=_highest(np.abs(r - overall)),
        ratio_to_overall=_lowest(quotient(smaller, larger, present & (overall > 0))),
        variance=defined_mean((r - defined_mean(r)[..., None]) ** 2),
        classes=np.asarray(present.sum(-1)),
    )


def excess_accuracy_gap(
    dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers
) -> ExcessGap:
    """Compute the excess accuracy gap (R^c_1 - R^c_t) - (A_1 - A_t), and its maximum over the classes.

    From Hashemizadeh et al., "Balancing Act: Constraining Disparate Impact in Sparse Models", ICLR
    2024 (arXiv 2310.20673). Arguments and errors as ``intensification``.

    >>> gap = excess_accuracy_gap([0.9, 0.7], [0.8, 0.4], 0.8, 0.6)
    >>> gap.per_class.round(3), float(gap.maximum.round(3)), int(gap.worst_class)
    (array([-0.1,  0.1]), 0.1, 1)
    """
    given = pair(dense_recall, pruned_recall, dense_accuracy, pruned_accuracy)
    gap = (given.dense - given.pruned) - (given.dense_accuracy - given.pruned_accuracy)[..., None]
    maximum = _highest(gap)
    return ExcessGap(gap, maximum, _where_equal(gap, maximum))


def normalized_difference(
    dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers
) -> Float[np.ndarray, "*models classes"]:
    """Compute the normalized recall difference (R^c_1 - A_1) / A_1 - (R^c_t - A_t) / A_t, positive for a loss.

    From Hooker et al., "What Do Compressed Deep Neural Networks Forget?" (arXiv 1911.05248).
    Arguments and errors as ``intensification``; NaN for a model of accuracy 0.

    >>> normalized_difference([0.9, 0.7], [0.7, 0.5], 0.8, 0.6).round(4)
    array([-0.0417,  0.0417])
    """
    given = pair(dense_recall, pruned_recall, dense_accuracy, pruned_accuracy)
    dense = normalized_balance(given.dense, given.dense_accuracy)
    return np.asarray(dense - normalized_balance(given.pruned, given.pruned_accuracy))


def class_tests(
    dense_recall: Numbers,
    pruned_recall: Numbers,
    dense_accuracy: Numbers,
    pruned_accuracy: Numbers,
    alternative: Alternative = "two-sided",
) -> ClassTests:
    """Test for each class whether pruning moved its recall relative to the accuracy.

    Welch's t test, for every class, between R^c_t - A_t of the pruned models and R^c_1 - A_1 of the
    dense ones; the pairing of models is not used. From Hooker et al., "What Do Compressed Deep
    Neural Networks Forget?" (arXiv 1911.05248), section 2.

    Args:
      dense_recall: (dense models, classes), fractions.
      pruned_recall: (pruned models, classes); there may be more or fewer of them.
      dense_accuracy: (dense models,).
      pruned_accuracy: (pruned models,).
      alternative: "less" to show that a class lost, "greater", or "two-sided".

    Raises:
      ValueError: a fraction is outside [0, 1], shapes do not match, or the alternative is unknown.

    >>> tests = class_tests([[0.9, 0.7], [0.8, 0.7]], [[0.9, 0.3], [0.9, 0.2]], [0.8, 0.75], [0.6, 0.55])
    >>> tests.difference.round(3), tests.p_value.round(4)
    (array([ 0.25, -0.25]), array([0.0194, 0.0194]))
    """
    check_alternative(alternative)
    pruned, dense = balance(pruned_recall, pruned_accuracy), balance(dense_recall, dense_accuracy)
    for name, given in (("dense_recall", dense), ("pruned_recall", pruned)):
        if given.ndim != 2 or given.shape[-1] != dense.shape[-1]:
            raise ValueError(f"{name} must have shape (models, {dense.shape[-1]} classes), got {given.shape}")
    after, before = t_interval(pruned.T), t_interval(dense.T)
    rounding = 16 * np.finfo(np.float64).eps
    reason = np.select(
        [(after.models < 2) | (before.models < 2), (after.sd <= rounding) & (before.sd <= rounding)],
        ["fewer than two models with a recall", "no spread over the models"],
        "",
    )
    made = reason == ""
    statistic, p_value = np.full(made.shape, np.nan), np.full(made.shape, np.nan)
    statistic[made], p_value[made] = scipy.stats.ttest_ind_from_stats(
        after.mean[made],
        after.sd[made],
        after.models[made],
        before.mean[made],
        before.sd[made],
        before.models[made],
        equal_var=False,
        alternative=alternative,
    )
    return ClassTests(after.mean - before.mean, statistic, p_value, np.asarray(reason))


def error_rate_change(dense_rates: Numbers, pruned_rates: Numbers) -> ErrorChange:
    """Compute the combined error variance and symmetric distance error of the false positive and negative rates.

    With e_c the relative changes (FPR^c_t / FPR^c_1 - 1, FNR^c_t / FNR^c_1 - 1), CEV = mean_c
    ||e_c - mean e||^2 and SDE = mean_c |e_c,FPR - e_c,FNR|. A class whose dense FPR or FNR is 0 has
    no relative change and is left out. From Blakeney et al., "Simon Says: Evaluating and Mitigating
    Bias in Pruned Neural Networks with Knowledge Distillation" (arXiv 2106.07849).

    Args:
      dense_rates: (FPR, FNR) of every class, (..., classes, 2), fractions; NaN where undefined.
      pruned_rates: the same for the pruned models; the dense shape must equal this shape or its last axes.

    Raises:
      ValueError: a fraction is outside [0, 1], a shape is wrong, or the shapes of dense and pruned do not match.

    >>> change = error_rate_change([[0.4, 0.2], [0.2, 0.4]], [[0.4, 0.4], [0.4, 0.4]])
    >>> float(change.cev.round(3)), float(change.sde.round(3))
    (0.5, 1.0)
    """
    dense, pruned = rates("dense_rates", dense_rates, nan=True), rates("pruned_rates", pruned_rates, nan=True)
    for name, given in (("dense_rates", dense), ("pruned_rates", pruned)):
        if given.ndim < 2 or given.shape[-1] != 2:
            raise ValueError(
                f"{name} must contain (FPR, FNR) of every class, (..., classes, 2), got shape {given.shape}"
            )
    stacks("dense_rates", dense, "pruned_rates", pruned)
    dense = np.broadcast_to(dense, pruned.shape)
    change = quotient(pruned, dense, dense > 0) - 1
    usable = np.asarray(~np.isnan(change).any(-1))
    per_class = np.where(usable[..., None], change, np.nan)
    centre = defined_mean(per_class.swapaxes(-1, -2))
    return ErrorChange(
        per_class,
        cev=defined_mean(((per_class - centre[..., None, :]) ** 2).sum(-1)),
        sde=defined_mean(np.abs(per_class[..., 0] - per_class[..., 1])),
        classes=np.asarray(usable.sum(-1)),
        left_out=np.asarray((~usable).sum(-1)),
    )


def _lowest(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the minimum over the last axis without NaN; NaN if nothing is left."""
    return np.asarray(np.fmin.reduce(values, axis=-1))


def _highest(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.asarray(np.fmax.reduce(values, axis=-1))


def _where_equal(values: npt.NDArray[np.float64], extreme: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """Return the first class with the extreme value; -1 if the extreme is NaN."""
    return np.asarray(np.where(np.isnan(extreme), -1, (values == extreme[..., None]).argmax(-1)))
