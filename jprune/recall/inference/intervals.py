"""Inference on the expected alpha from a few training seeds.

The target is E[alpha_t] over training seeds. The alphas of different models are independent and the classes of one
model are not, so every function takes one number per model. A model whose alpha is NaN is left out and counted in
``left_out``. A result that does not exist, as with one model or without spread, is NaN, and ``reason`` says why.

The tests and their directions follow section 4 of Good et al. 2022 (arXiv 2206.02976): ``paired_test`` one-sided for
consecutive ratios, ``independent_test`` one-sided for depth and data sets, and ``paired_test`` two-sided for
algorithms, with p-values corrected by the number of rows.
"""

from typing import Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt
import scipy.stats
from jaxtyping import Float, Int, Shaped

from jprune.recall.inputs.arguments import Numbers, check_level, first_true, one_per_model, real

Alternative = Literal["two-sided", "greater", "less"]


class Interval(NamedTuple):
    """A mean over models with its t-based confidence interval; every field has the shape (...).

    Attributes:
      mean: float64; NaN without any defined value.
      sd: standard deviation over models, ddof 1; NaN with fewer than two.
      low: lower end of the interval; NaN with fewer than two models.
      high: upper end.
      models: number of values in the mean.
      left_out: number of values left out because they are NaN.
    """

    mean: Float[np.ndarray, "*stacks"]
    sd: Float[np.ndarray, "*stacks"]
    low: Float[np.ndarray, "*stacks"]
    high: Float[np.ndarray, "*stacks"]
    models: Int[np.ndarray, "*stacks"]
    left_out: Int[np.ndarray, "*stacks"]


class TTest(NamedTuple):
    """The outcome of one t test.

    Attributes:
      difference: mean of ``a`` minus mean of ``b``.
      statistic: Student's or Welch's t.
      df: its degrees of freedom.
      p_value: for the given alternative, uncorrected.
      models: number of pairs, or number of values in both samples together.
      left_out: number of pairs or values left out because they are NaN.
      reason: why ``statistic`` and ``p_value`` are NaN; otherwise empty.
    """

    difference: float
    statistic: float
    df: float
    p_value: float
    models: int
    left_out: int
    reason: str


def t_interval(values: Numbers, level: float = 0.99) -> Interval:
    """Mean over models with a t-based confidence interval: mean ± t_{df} sd / sqrt(models).

    With five ratios at level 0.99 the family is covered at 0.95 (Bonferroni), as in the paper.

    Args:
      values: one number per model on the last axis, (..., models), alphas for instance; NaN is
        left out and counted.
      level: confidence level of each interval, strictly between 0 and 1.

    Returns:
      An ``Interval`` of arrays (...). With one model, sd, low and high are NaN.

    Raises:
      ValueError: ``values`` has no models axis or an infinite entry, or ``level`` is out of range.

    >>> interval = t_interval([1.0, 2.0, 3.0], level=0.95)
    >>> [round(float(end), 3) for end in (interval.low, interval.high)]
    [-0.484, 4.484]
    """
    check_level(level)
    x = one_per_model("values", values)
    defined = ~np.isnan(x)
    n = np.asarray(defined.sum(-1))
    mean = defined_mean(x)
    deviations = np.where(defined, x - mean[..., None], 0)
    df = np.where(n > 1, n - 1, np.nan)
    sd = np.sqrt((deviations**2).sum(-1) / df)
    half = _quantile(level, df) * sd / np.sqrt(np.where(n > 0, n, np.nan))
    return Interval(*(np.asarray(field) for field in (mean, sd, mean - half, mean + half, n, x.shape[-1] - n)))


def welch_interval(before: Interval, after: Interval, level: float) -> Interval:
    """Welch's interval for the mean of ``after`` minus the mean of ``before``, for independent sets of models.

    ``models`` and ``left_out`` are the sums over both sets; ``sd`` is NaN, because there are no pairs.

    >>> interval = welch_interval(t_interval([1.0, 1.2, 1.1]), t_interval([1.2, 1.3, 1.5]), 0.95)
    >>> [round(float(end), 3) for end in (interval.low, interval.high)]
    [-0.079, 0.545]
    """
    error, df = _welch(before.sd, before.models, after.sd, after.models)
    half = np.where(error == 0, 0, _quantile(level, df) * error)
    mean, models = after.mean - before.mean, after.models + before.models
    fields = mean, half * np.nan, mean - half, mean + half, models, after.left_out + before.left_out
    return Interval(*map(np.asarray, fields))


def defined_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Mean over the last axis without its NaN entries; NaN if all are NaN.

    >>> defined_mean(np.array([[1.0, np.nan, 3.0], [np.nan] * 3]))
    array([ 2., nan])
    """
    defined = ~np.isnan(values)
    return np.asarray(np.where(defined, values, 0).sum(-1) / np.where(defined.any(-1), defined.sum(-1), np.nan))


def mark(low: Numbers, high: Numbers, reference: float = 1.0) -> Shaped[np.ndarray, "*stacks"]:
    """Mark intervals against 1 as the paper's figures do: '<' below, '>' above, '?' overlapping.

    Args:
      low: lower ends (...).
      high: upper ends (...).
      reference: the value to compare with; 1 means no intensification.

    Returns:
      Strings (...); empty for an interval that is NaN.

    Raises:
      ValueError: the shapes differ, or a lower end is above its upper end.

    >>> mark([0.91, 0.97, 1.04, np.nan], [0.96, 1.02, 1.09, np.nan])
    array(['<', '?', '>', ''], dtype='<U1')
    """
    lows, highs = real("low", low), real("high", high)
    if lows.shape != highs.shape:
        raise ValueError(f"low and high must have the same shape, got {lows.shape} and {highs.shape}")
    if (lows > highs).any():
        index = first_true(lows > highs)
        raise ValueError(f"low must not exceed high, got {lows[index]} and {highs[index]} at index {index}")
    absent = np.isnan(lows) | np.isnan(highs)
    return np.asarray(np.select([absent, highs < reference, lows > reference], ["", "<", ">"], "?"))


def bonferroni(p_values: Numbers, family: int | None = None) -> Float[np.ndarray, "*tests"]:
    """Correct p-values for the number of tests by Bonferroni's method: min(1, p * family) (Dunn 1961).

    Args:
      p_values: any shape; NaN (a test that could not be made) stays NaN and does not count.
      family: number of tests; by default the number of p-values that are not NaN.

    Raises:
      ValueError: a p-value is outside [0, 1], or ``family`` is smaller than the number of p-values.

    >>> bonferroni([0.01, 0.04, 0.6])
    array([0.03, 0.12, 1.  ])
    """
    p, size = _family(p_values, family)
    return np.asarray(np.minimum(p * size, 1))


def holm(p_values: Numbers, family: int | None = None) -> Float[np.ndarray, "*tests"]:
    """Correct p-values by Holm's step-down method (Holm 1979).

    The results are never larger than Bonferroni's and have the same guarantee. Arguments and errors are those of
    ``bonferroni``; tests of the family that are not given count as having larger p-values.

    >>> holm([0.01, 0.04, 0.6])
    array([0.03, 0.08, 0.6 ])
    """
    p, size = _family(p_values, family)
    flat = p.ravel()
    order = np.argsort(flat)  # NaN sorts last, so it never takes the place of a test that was made
    stepped = flat[order] * (size - np.arange(flat.size))
    corrected = np.empty_like(flat)
    corrected[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return corrected.reshape(p.shape)


def paired_test(a: Numbers, b: Numbers, alternative: Alternative = "two-sided") -> TTest:
    """Student's t test on the differences of the same models: is E[a] - E[b] zero?

    Args:
      a: one value per model, (models,).
      b: the values of the same models in the same order, (models,). A pair with a NaN is left out.
      alternative: "greater" to show that E[a] > E[b], "less", or "two-sided".

    Raises:
      ValueError: the lengths differ, a value is infinite, there is more than one axis, or the alternative is unknown.

    >>> round(paired_test([1.2, 1.3, 1.5], [1.0, 1.2, 1.1], "greater").p_value, 4)
    0.059
    """
    check_alternative(alternative)
    first, second = _sample("a", a), _sample("b", b)
    if first.shape != second.shape:
        raise ValueError(
            f"a has {first.size} models and b {second.size}; a paired test needs a value in both for every model"
        )
    differences = first - second
    made = differences[~np.isnan(differences)]
    out = TTest(_mean(made), np.nan, made.size - 1.0, np.nan, made.size, differences.size - made.size, "")
    if made.size < 2 or _no_spread(made):
        reason = "fewer than two pairs" if made.size < 2 else "every pair differs by the same"
        return out._replace(reason=reason, df=np.nan)
    result = scipy.stats.ttest_1samp(made, 0.0, alternative=alternative)
    return out._replace(statistic=float(result.statistic), p_value=float(result.pvalue))


def independent_test(
    a: Numbers, b: Numbers, alternative: Alternative = "two-sided", *, equal_variances: bool = False
) -> TTest:
    """Welch's t test between independent models: is E[a] - E[b] zero?

    Args:
      a: one value per model, (models_a,); NaN is left out.
      b: one value per model, (models_b,).
      alternative: "greater" to show that E[a] > E[b], "less", or "two-sided".
      equal_variances: whether to use Student's test with a common variance instead of Welch's.

    Raises:
      ValueError: a value is infinite, there is more than one axis, or the alternative is unknown.

    >>> round(independent_test([1.2, 1.3, 1.5], [1.0, 1.2, 1.1], "greater").p_value, 4)
    0.051
    """
    check_alternative(alternative)
    samples = [sample[~np.isnan(sample)] for sample in (_sample("a", a), _sample("b", b))]
    used = samples[0].size + samples[1].size
    left_out = np.size(a) + np.size(b) - used
    out = TTest(_mean(samples[0]) - _mean(samples[1]), np.nan, np.nan, np.nan, used, left_out, "")
    if min(sample.size for sample in samples) < 2:
        return out._replace(reason="fewer than two values in a sample")
    if all(_no_spread(sample) for sample in samples):
        return out._replace(reason="no spread in either sample")
    # From moments: scipy's test of samples warns of a sample without spread, which is valid if the other has some.
    (mean_a, sd_a, n_a), (mean_b, sd_b, n_b) = ((sample.mean(), sample.std(ddof=1), sample.size) for sample in samples)
    result = scipy.stats.ttest_ind_from_stats(
        mean_a, sd_a, n_a, mean_b, sd_b, n_b, equal_var=equal_variances, alternative=alternative
    )
    df = n_a + n_b - 2 if equal_variances else _welch(sd_a, n_a, sd_b, n_b)[1]
    return out._replace(statistic=float(result.statistic), df=float(df), p_value=float(result.pvalue))


def check_alternative(alternative: str) -> None:
    """Check the direction of a test.

    Raises:
      ValueError: it is not "two-sided", "greater" or "less".

    >>> check_alternative("larger")
    Traceback (most recent call last):
      ...
    ValueError: alternative must be one of two-sided, greater, less; got 'larger'
    """
    if alternative not in get_args(Alternative):
        raise ValueError(f"alternative must be one of {', '.join(get_args(Alternative))}; got {alternative!r}")


def _sample(name: str, value: Numbers) -> npt.NDArray[np.float64]:
    array = one_per_model(name, value)
    if array.ndim != 1:
        raise ValueError(f"{name} must have shape (models,), got {array.shape}")
    return array


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if values.size else float("nan")


def _no_spread(values: npt.NDArray[np.float64]) -> bool:
    """Whether the values differ only by rounding, which would determine a t statistic."""
    return bool(np.ptp(values) <= 32 * np.finfo(np.float64).eps * max(np.abs(values).max(), 1))


def _quantile(level: float, df: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Student's quantile for an interval, computed once for each number of degrees because it is slow."""
    distinct, position = np.unique(df, return_inverse=True)
    return np.asarray(np.asarray(scipy.stats.t.ppf((1 + level) / 2, distinct))[position]).reshape(df.shape)


def _welch(
    sd_a: Numbers, n_a: npt.ArrayLike, sd_b: Numbers, n_b: npt.ArrayLike
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Standard error of a difference of means, and its degrees of freedom (Satterthwaite); NaN without spread."""
    (a, m), (b, n) = ((np.square(sd) / np.maximum(n, 1), np.maximum(n, 2) - 1) for sd, n in ((sd_a, n_a), (sd_b, n_b)))
    squares = a**2 / m + b**2 / n
    return np.asarray(np.sqrt(a + b)), np.asarray((a + b) ** 2 / np.where(squares > 0, squares, np.nan))


def _family(p_values: Numbers, family: int | None) -> tuple[npt.NDArray[np.float64], int]:
    p = real("p_values", p_values)
    outside = (p < 0) | (p > 1)
    if outside.any():
        index = first_true(outside)
        raise ValueError(f"p_values must lie in [0, 1], got {p[index]} at index {index}")
    made = int((~np.isnan(p)).sum())
    if family is not None and family < made:
        raise ValueError(f"family must be at least the {made} p-values given, got {family}")
    return p, made if family is None else family
