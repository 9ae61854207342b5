"""A test of whether the loss is even over the classes, for cases where no single class can be named.

Tests of single classes are corrected for their number. If many classes with few examples lose more than the rest, none
of them may be shown to, although the loss is clearly uneven. This test is of all classes at once.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats
from jaxtyping import Bool, Int

from jprune.recall.inference.losses import between_models


class EvennessTest(NamedTuple):
    """Whether all classes lost equally much.

    Attributes:
      statistic: the variation between classes, divided by its expectation under an even loss: about 1 if the loss is
        even; infinite if nothing varies within classes.
      p_value: probability of variation at least as large under an even loss; NaN if there is no answer.
      reason: why there is no answer; empty if there is one.
    """

    statistic: float
    p_value: float
    reason: str


def evenness_test(
    classes_of: Int[np.ndarray, " examples"],
    dense_correct: Bool[np.ndarray, "dense_models examples"],
    correct: Bool[np.ndarray, "models examples"],
    classes: int,
    *,
    paired: bool = True,
) -> EvennessTest:
    """Test whether every class lost the same share of its examples, net of those won.

    The statistic is the ANOVA-type statistic of Brunner, Dette and Munk, "Box-Type Approximations in Nonparametric
    Factorial Designs" (Journal of the American Statistical Association 1997), compared with an F distribution: every
    class has its own variance, over its examples and between models. Where hardly anything varies within the classes,
    this p-value is too small, so the result is at least that of a permutation of the examples over the classes, by a
    gamma distribution with the exact mean and variance.

    Args:
      classes_of: the class of every example, 0..classes-1; classes with fewer than two examples are left out.
      dense_correct: whether each dense model is right about each example.
      correct: the same after compression.
      classes: number of classes.
      paired: whether model m was made from dense model m.

    >>> labels = np.repeat(np.arange(10), 40)
    >>> dense, after = np.ones((1, 400), bool), (np.arange(400) % 40 >= np.repeat([0, 9], 200))[None]
    >>> evenness_test(labels, dense, after, 10).p_value < 1e-3
    True
    """
    large = np.bincount(classes_of, minlength=classes) > 1
    if large.sum() < 2:
        return EvennessTest(float("nan"), float("nan"), "fewer than two classes with two examples")
    used = large[classes_of]
    codes = np.searchsorted(np.flatnonzero(large), classes_of[used])
    dense_correct, correct = dense_correct[:, used], correct[:, used]
    losses = dense_correct.mean(0) - correct.mean(0)
    if not losses.any():
        return EvennessTest(0.0, 1.0, "")
    n = np.bincount(codes).astype(np.float64)
    mean = np.bincount(codes, losses) / n
    of_examples = (np.bincount(codes, losses**2) / n - mean**2) / (n - 1)
    models = between_models(codes, dense_correct, correct, n, paired=paired)
    of_models, degrees = models.change, models.degrees
    between = float((n * (mean - losses.mean()) ** 2).sum())
    weight, total = n * (1 - n / n.sum()), n.sum()
    variance = np.maximum(of_examples, 0) + of_models
    expected = weight * variance
    p = permutation_p(between, losses, n)
    if expected.sum() <= 0:
        return EvennessTest(float("inf") if between > 0 else 0.0, p, "")
    statistic = between / expected.sum()
    shared = n**2 * variance / total  # two classes have -n_i n_j / total in common: their means less the overall mean
    freedom = expected.sum() ** 2 / ((expected**2).sum() + shared.sum() ** 2 - (shared**2).sum())
    within = expected.sum() ** 2 / (weight**2 * (of_examples**2 / (n - 1) + of_models**2 / degrees)).sum()
    within = min(within, degrees * (len(n) - 1))  # few models may look alike by chance
    return EvennessTest(statistic, max(p, float(scipy.stats.f.sf(statistic, freedom, within))), "")


def permutation_p(between: float, values: npt.NDArray[np.float64], n: npt.NDArray[np.float64]) -> float:
    """The p-value of the sum of squares between classes if examples were assigned to the classes at random.

    With A the projection on the class means less the overall mean, the sum is y'Ay. Its variance over permutations of
    y is K22 (2 tr(A^2) - 2 tr(A)^2 / (N - 1)) + k4 (sum of A_ii^2 - tr(A)^2 / N), with the k-statistic k4 and the
    unbiased estimate K22 of the squared variance: the law of total variance for independent y has this form, and the
    estimates are the only unbiased symmetric ones.

    Args:
      between: the sum of squares between classes.
      values: one number per example.
      n: number of examples of every class.

    >>> right = np.array([0.0, 0.0, 1.0, 0.0, 1.0, 1.0, 0.0, 1.0])  # means of 1/4 and 3/4
    >>> round(permutation_p(0.5, right, np.array([4.0, 4.0])), 2)
    0.19
    """
    total, groups = n.sum(), len(n)
    if total < 4:
        return 1.0
    y = values - values.mean()
    s2, s4 = float((y**2).sum()), float((y**4).sum())
    k2 = s2 / (total - 1)
    if k2 == 0:
        return 1.0
    k4 = (total * (total + 1) * s4 - 3 * (total - 1) * s2**2) / ((total - 1) * (total - 2) * (total - 3))
    k22 = (k2**2 - k4 / total) * (total - 1) / (total + 1)
    rank = groups - 1
    diagonal = (1 / n).sum() - 2 * groups / total + 1 / total
    mean = rank * k2
    variance = k22 * 2 * rank * (1 - rank / (total - 1)) + k4 * (diagonal - rank**2 / total)
    if variance <= 0:
        return 1.0
    return float(scipy.stats.gamma.sf(between, mean**2 / variance, scale=variance / mean))
