"""Power of t tests and the number of replicates that they need, from the noncentral t distribution."""

from typing import Literal

import numpy as np
import scipy.stats

from jprune.recall.inference.intervals import Alternative, check_alternative

Design = Literal["paired", "independent"]


def power(
    models: int,
    difference: float,
    sd: float,
    *,
    alpha: float = 0.01,
    design: Design = "paired",
    alternative: Alternative = "two-sided",
) -> float:
    """Probability that a t test at level ``alpha`` detects a true difference of means.

    Args:
      models: models, or pairs, in each sample; at least 2.
      difference: true mean of ``a`` minus that of ``b`` (paired), or distance of E[alpha] from 1, in
        the unit of ``sd``.
      sd: standard deviation over models of the paired differences ("paired"), or of the values in
        each sample ("independent"), positive.
      alpha: level of the test; divide by the number of tests for Bonferroni.
      design: "paired" (or one sample against a constant), or "independent" samples of equal size.
      alternative: "two-sided", "greater" or "less".

    Returns:
      A probability.

    Raises:
      ValueError: an argument is out of range or not among the choices.

    >>> round(power(30, difference=0.05, sd=0.09), 3)
    0.615
    """
    _check(models, sd, alpha, design, alternative)
    samples = 1 if design == "paired" else 2
    df = samples * (models - 1)
    noncentrality = difference / (sd * np.sqrt(samples / models))
    if alternative == "two-sided":
        critical = scipy.stats.t.isf(alpha / 2, df)
        return _tail(critical, df, noncentrality) + _tail(critical, df, -noncentrality)
    critical = scipy.stats.t.isf(alpha, df)
    return _tail(critical, df, noncentrality if alternative == "greater" else -noncentrality)


def replicates_needed(
    difference: float,
    sd: float,
    *,
    alpha: float = 0.01,
    chance: float = 0.9,
    design: Design = "paired",
    alternative: Alternative = "two-sided",
    most: int = 1_000_000,
) -> int:
    """Smallest number of replicates with which a t test detects a true difference with a given probability.

    Args:
      difference: as in ``power``.
      sd: as in ``power``; from a pilot study.
      alpha: level of the test.
      chance: the required power, strictly between ``alpha`` and 1.
      design: as in ``power``; the result is the number of pairs, or of models in each sample.
      alternative: as in ``power``.
      most: largest number of replicates to try.

    Raises:
      ValueError: as in ``power``; or the difference is 0 or in the wrong direction, so that no number of replicates is
        enough; or more than ``most`` replicates are needed.

    >>> replicates_needed(difference=0.05, sd=0.09)
    52
    """
    _check(2, sd, alpha, design, alternative)
    if not alpha < chance < 1:
        raise ValueError(f"chance must lie strictly between alpha={alpha} and 1, got {chance}")
    if difference == 0 or (alternative == "greater" and difference < 0) or (alternative == "less" and difference > 0):
        raise ValueError(
            f"no number of replicates can show a difference of {difference} with alternative={alternative!r}"
        )

    def enough(models: int) -> bool:
        return power(models, difference, sd, alpha=alpha, design=design, alternative=alternative) >= chance

    high = 2
    while not enough(high):
        high *= 2
        if high > 2 * most:
            raise ValueError(
                f"more than most={most} replicates are needed to show a difference of {difference} at sd={sd}"
            )
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    if high > most:
        raise ValueError(
            f"{high} replicates are needed to show a difference of {difference} at sd={sd}, more than most={most}"
        )
    return high


def _tail(critical: float, df: int, noncentrality: float) -> float:
    """P(T > critical) for a noncentral t."""
    return float(scipy.stats.nct.sf(critical, df, noncentrality))


def _check(models: int, sd: float, alpha: float, design: str, alternative: str) -> None:
    if models < 2:
        raise ValueError(f"models must be at least 2, got {models}")
    if not sd > 0:
        raise ValueError(f"sd must be positive, got {sd}")
    if not 0 < alpha < 1:
        raise ValueError(f"alpha must lie strictly between 0 and 1, got {alpha}")
    if design not in ("paired", "independent"):
        raise ValueError(f"design must be 'paired' or 'independent', got {design!r}")
    check_alternative(alternative)
