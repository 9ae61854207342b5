"""Recall balance, intensification ratios and their controls.

The notation is that of Good et al., "Recall Distortion in Neural Network Pruning and the Undecayed Pruning Algorithm",
NeurIPS 2022 (arXiv 2206.02976), with subscript 1 for the dense model, t for the model pruned at compression ratio t,
and superscript c for a class:

* R^c is ``recall``, A is ``accuracy``, B^c = R^c - A the ``balance``, Bn^c = B^c / A the
  ``normalized_balance``;
* I^c_t = Bn^c_t / Bn^c_1 is ``class_intensification``;
* alpha_t = sum_c Bn^c_1 Bn^c_t / sum_c (Bn^c_1)^2 is ``intensification``: above 1 the differences
  between classes grew, below 1 they shrank.

All functions accept any array and compute in numpy float64. Precision or F1 may replace recall throughout. A class
whose rate is NaN is left out of every sum; a model whose alpha is undefined gets NaN, and ``undefined`` returns the
reason. The baseline is always the dense checkpoint; a model that was fine-tuned but not pruned is one of the pruned
models, at ratio 1.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int, Shaped

from jprune.recall.inputs.arguments import Numbers, Pair, pair, rates, recalls_and_accuracy, stacks


class Line(NamedTuple):
    """Least-squares lines of pruned on dense normalized balance, one for every model of a stack.

    Attributes:
      slope: float64 (...).
      intercept: float64 (...).
    """

    slope: Float[np.ndarray, "*models"]
    intercept: Float[np.ndarray, "*models"]


class Pooled(NamedTuple):
    """One slope over the classes of all models of a stack.

    Attributes:
      slope: float64 (...), the models axis reduced.
      r2: 1 - residual / total sum of squares about 0, as for any line without intercept.
      models: number of models in the fit.
      left_out: number of models left out because their normalized balance is undefined.
    """

    slope: Float[np.ndarray, "*stacks"]
    r2: Float[np.ndarray, "*stacks"]
    models: Int[np.ndarray, "*stacks"]
    left_out: Int[np.ndarray, "*stacks"]


class Sums(NamedTuple):
    """Sums over the classes of every model, of x = Bn_1 and y = Bn_t; every field has the shape (...).

    Attributes:
      classes: number of classes with both.
      x: sum of x.
      y: sum of y.
      xx: sum of the square of x; remainders of rounding are set to 0, here and in the other fields.
      xy: sum of the products.
      yy: sum of the square of y.
      reason: why alpha, xy / xx, is undefined; empty where it is defined.
    """

    classes: npt.NDArray[np.float64]
    x: npt.NDArray[np.float64]
    y: npt.NDArray[np.float64]
    xx: npt.NDArray[np.float64]
    xy: npt.NDArray[np.float64]
    yy: npt.NDArray[np.float64]
    reason: npt.NDArray[np.str_]


def balance(recall: Numbers, accuracy: Numbers) -> Float[np.ndarray, "*models classes"]:
    """Compute the recall balance B^c = R^c - A (Good et al. 2022, section 3).

    It sums to 0 over the classes if all have the same number of examples.

    Args:
      recall: (..., classes), fractions; NaN if undefined, which stays NaN.
      accuracy: (...), fractions.

    Raises:
      ValueError: a fraction is outside [0, 1], or shapes do not match.

    >>> balance([0.9, 0.7], 0.8).round(3)
    array([ 0.1, -0.1])
    """
    per_class, overall = recalls_and_accuracy(recall, accuracy)
    return per_class - overall[..., None]


def normalized_balance(recall: Numbers, accuracy: Numbers) -> Float[np.ndarray, "*models classes"]:
    """Compute the normalized recall balance Bn^c = (R^c - A) / A (Good et al. 2022, section 3).

    NaN for a model of accuracy 0. Arguments and errors as ``balance``.

    >>> normalized_balance([0.9, 0.7], 0.8)
    array([ 0.125, -0.125])
    """
    per_class, overall = recalls_and_accuracy(recall, accuracy)
    return _normalized(per_class, overall)


def class_intensification(
    dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers
) -> Float[np.ndarray, "*models classes"]:
    """Compute the class-level intensification ratio I^c_t = Bn^c_t / Bn^c_1 (Good et al. 2022, section 3).

    NaN for a class whose dense recall equals the dense accuracy. Arguments and errors as
    ``intensification``; returns float64 (..., classes).

    >>> class_intensification([0.9, 0.7], [0.7, 0.5], 0.8, 0.6).round(4)
    array([1.3333, 1.3333])
    """
    x, y = _balances(pair(dense_recall, pruned_recall, dense_accuracy, pruned_accuracy))
    return quotient(y, x, x != 0)


def intensification(
    dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers
) -> Float[np.ndarray, "*models"]:
    """Compute the model-level intensification ratio alpha_t = sum_c Bn^c_1 Bn^c_t / sum_c (Bn^c_1)^2.

    This is the least-squares slope without intercept over the classes of one model (Good et al. 2022, section 3), so a
    class whose dense recall equals the accuracy has weight 0. It is computed in numpy float64; rounding errors of the
    given dtypes in a balance or the sum are treated as 0.

    Args:
      dense_recall: recall of the dense models, (..., classes), fractions; NaN leaves a class out.
      pruned_recall: recall of the same models pruned, (..., classes). The dense shape must equal
        it or its last axes: dense (models, classes) matches pruned (ratios, models, classes).
      dense_accuracy: accuracy of the dense models, the shape of ``dense_recall`` without classes.
      pruned_accuracy: accuracy of the pruned models, likewise.

    Returns:
      alpha, float64 (...); NaN if it is undefined, for the reason that ``undefined`` returns.

    Raises:
      ValueError: a fraction is outside [0, 1], accuracies do not match their recalls, or the shapes
        of dense and pruned do not match.

    >>> float(intensification([0.9, 0.7], [0.7, 0.5], 0.8, 0.6).round(4))
    1.3333
    """
    sums = sums_over_classes(dense_recall, pruned_recall, dense_accuracy, pruned_accuracy)
    return quotient(sums.xy, sums.xx, sums.reason == "")


def undefined(
    dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers
) -> Shaped[np.ndarray, "*models"]:
    """Return why alpha is undefined: an array of strings (...), empty where it is defined.

    Arguments and errors as ``intensification``.

    >>> undefined([[1.0, 1.0], [0.9, 0.7]], [[0.9, 0.7], [0.7, 0.5]], [1.0, 0.8], [0.8, 0.6])
    array(['the dense model is perfect', ''], dtype='<U51')
    """
    return sums_over_classes(dense_recall, pruned_recall, dense_accuracy, pruned_accuracy).reason


def affine_intensification(
    dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers
) -> Line:
    """Compute alpha with an intercept, for classes of unequal sizes.

    With unequal sizes the balances do not sum to 0 over the classes, and a line through the origin mistakes their
    common offset for intensification. With equal sizes the intercept is 0 and the slope is alpha. The line is the
    ordinary least squares fit of Bn_t on Bn_1 over the classes of each model. Arguments and errors as
    ``intensification``; the slope is also NaN if all dense balances are equal.

    >>> line = affine_intensification([0.9, 0.8, 0.4], [0.9, 0.7, 0.2], 0.8, 0.7)
    >>> round(float(line.slope), 4), round(float(line.intercept), 4)
    (1.551, 0.051)
    """
    sums = sums_over_classes(dense_recall, pruned_recall, dense_accuracy, pruned_accuracy)
    defined = sums.reason == ""
    n = np.where(defined, sums.classes, 1)
    spread = sums.xx - sums.x**2 / n
    slope = quotient(sums.xy - sums.x * sums.y / n, spread, defined & (spread > 1e-14 * sums.xx))
    return Line(slope, np.asarray((sums.y - slope * sums.x) / n))


def reverse_intensification(
    dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers
) -> Float[np.ndarray, "*models"]:
    """Compute the slope from regressing dense on pruned, in alpha's direction: sum_c (Bn^c_t)^2 / sum_c Bn^c_1 Bn^c_t.

    Regression to the mean lowers alpha, because the dense balances are measured with error; it raises this slope for
    the same reason, so the two bracket the slope between the true balances. The coefficient of dense on pruned itself
    is the reciprocal. Arguments and errors as ``intensification``; also NaN if dense and pruned balances are
    uncorrelated.

    >>> float(reverse_intensification([0.9, 0.7], [0.7, 0.5], 0.8, 0.6).round(4))
    1.3333
    """
    sums = sums_over_classes(dense_recall, pruned_recall, dense_accuracy, pruned_accuracy)
    return quotient(sums.yy, sums.xy, (sums.reason == "") & (sums.xy != 0))


def rma_intensification(
    dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers
) -> Float[np.ndarray, "*models"]:
    """Compute the reduced-major-axis slope: sign * sqrt(sum_c (Bn^c_t)^2 / sum_c (Bn^c_1)^2).

    It treats dense and pruned symmetrically, so regression to the mean does not affect it. It is the geometric mean of
    ``intensification`` and ``reverse_intensification``, with the sign of alpha. Arguments and errors
    as ``intensification``.

    >>> float(rma_intensification([0.9, 0.7], [0.7, 0.5], 0.8, 0.6).round(4))
    1.3333
    """
    sums = sums_over_classes(dense_recall, pruned_recall, dense_accuracy, pruned_accuracy)
    return np.asarray(np.sign(sums.xy) * np.sqrt(quotient(sums.yy, sums.xx, sums.reason == "")))


def null_intensification(dense_accuracy: Numbers, pruned_accuracy: Numbers) -> Float[np.ndarray, "*models"]:
    """Compute the alpha that loss of accuracy alone causes: alpha_null = (1 - A_t) / (1 - A_1) * A_1 / A_t.

    This is alpha if the error of every class grows in the same proportion: R^c_t = 1 - k (1 - R^c_1). NaN if the dense
    model is perfect or the pruned accuracy is 0.

    Args:
      dense_accuracy: (...), fractions.
      pruned_accuracy: (...); the dense shape must equal it or its last axes.

    Raises:
      ValueError: a fraction is outside [0, 1], or the shapes of dense and pruned do not match.

    >>> float(null_intensification(0.8, 0.6).round(4))
    2.6667
    """
    dense = rates("dense_accuracy", dense_accuracy, nan=False)
    pruned = rates("pruned_accuracy", pruned_accuracy, nan=False)
    stacks("dense_accuracy", dense, "pruned_accuracy", pruned)
    numerator, denominator = (1 - pruned) * dense, (1 - dense) * pruned
    return quotient(numerator, np.broadcast_to(denominator, pruned.shape), denominator > 0)


def relative_intensification(
    dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers
) -> Float[np.ndarray, "*models"]:
    """Compute alpha relative to the alpha that loss of accuracy alone causes: alpha / alpha_null.

    NaN if either is undefined, or the pruned model is perfect (alpha_null is 0). Arguments and
    errors as ``intensification``.

    >>> float(relative_intensification([0.9, 0.7], [0.7, 0.5], 0.8, 0.6).round(4))
    0.5
    """
    alpha = intensification(dense_recall, pruned_recall, dense_accuracy, pruned_accuracy)
    null = null_intensification(dense_accuracy, pruned_accuracy)
    return quotient(alpha, null, ~np.isnan(null) & (null != 0))


def pooled_intensification(
    dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers
) -> Pooled:
    """Compute one alpha over all classes of all models: the line in the paper's scatter figure.

    It is not the mean of the models' alphas: a model whose classes differ more has more weight. The models are the axis
    before the classes. Arguments and errors as ``intensification``.

    Args:
      dense_recall: (..., models, classes); here a models axis is required.
      pruned_recall: (..., models, classes).
      dense_accuracy: (..., models).
      pruned_accuracy: (..., models).

    >>> pooled = pooled_intensification([[0.9, 0.7], [0.8, 0.6]], [[0.7, 0.5], [0.7, 0.5]], [0.8, 0.7], [0.6, 0.6])
    >>> round(float(pooled.slope), 4), int(pooled.models), int(pooled.left_out)
    (1.2389, 2, 0)
    """
    sums = sums_over_classes(dense_recall, pruned_recall, dense_accuracy, pruned_accuracy)
    if sums.xx.ndim == 0:
        raise ValueError("pooled_intensification needs a models axis: recalls of shape (..., models, classes)")
    defined = sums.reason == ""
    xx, xy, yy = (np.asarray(np.where(defined, value, 0).sum(-1)) for value in (sums.xx, sums.xy, sums.yy))
    models = np.asarray(defined.sum(-1))
    r2 = quotient(xy**2, xx * yy, (models > 0) & (yy > 0))
    return Pooled(quotient(xy, xx, models > 0), r2, models, np.asarray((~defined).sum(-1)))


def _normalized(per_class: npt.NDArray[np.float64], overall: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    a = np.broadcast_to(overall[..., None], per_class.shape)
    return quotient(per_class - a, a, a > 0)


def _balances(given: Pair) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return normalized balances x (dense) and y (pruned) of one shape; if one is NaN, so is the other."""
    x, y = _normalized(given.dense, given.dense_accuracy), _normalized(given.pruned, given.pruned_accuracy)
    x = np.where(np.abs(given.dense - given.dense_accuracy[..., None]) <= given.zero, 0 * x, x)
    y = np.where(np.abs(given.pruned - given.pruned_accuracy[..., None]) <= given.zero, 0 * y, y)
    either = np.isnan(x) | np.isnan(y)
    return np.where(either, np.nan, x), np.where(either, np.nan, y)


def sums_over_classes(
    dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers
) -> Sums:
    """Compute the sums from which every slope is computed. Arguments and errors as ``intensification``."""
    given = pair(dense_recall, pruned_recall, dense_accuracy, pruned_accuracy)
    x, y = _balances(given)
    usable = ~np.isnan(x)
    x, y = np.where(usable, x, 0), np.where(usable, y, 0)
    n, sum_x, sum_y, xx, xy, yy = (np.asarray(product.sum(-1)) for product in (usable * 1.0, x, y, x * x, x * y, y * y))
    # The error of a balance is below half of given.zero; this bounds the error of the sum of products.
    a, b = (np.where(accuracy > 0, accuracy, 1) for accuracy in (given.dense_accuracy, given.pruned_accuracy))
    rounding = given.zero / 2 * (np.abs(x).sum(-1) / b + np.abs(y).sum(-1) / a)
    xy = np.where(np.abs(xy) <= rounding, 0, xy)
    reason = np.select(
        [
            given.dense_accuracy == 0,
            given.pruned_accuracy == 0,
            n == 0,
            (xx == 0) & (given.dense_accuracy == 1),
            xx == 0,
        ],
        [
            "the dense accuracy is 0",
            "the pruned accuracy is 0",
            "no class has both rates",
            "the dense model is perfect",
            "every class of the dense model matches its accuracy",
        ],
        "",
    )
    return Sums(n, sum_x, sum_y, xx, xy, yy, np.asarray(reason))


def quotient(
    numerator: Numbers, denominator: Numbers, where: npt.NDArray[np.bool_] | np.bool_
) -> npt.NDArray[np.float64]:
    """Return the quotient where it is defined, and NaN elsewhere.

    >>> quotient([1.0, 2.0], [2.0, 0.0], np.array([True, False]))
    array([0.5, nan])
    """
    out = np.full(np.shape(numerator), np.nan)
    np.divide(numerator, denominator, out=out, where=where)
    return out
