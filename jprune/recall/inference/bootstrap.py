"""Bootstrap intervals, which do not assume a normal distribution.

Resampling models estimates the variation over training seeds; resampling test examples estimates the variation over
test sets. ``rng`` is a ``numpy.random.Generator``, a ``SeedSequence`` or an integer seed. The same integer gives the
same resamples; a generator advances.
"""

import itertools
import math
import warnings
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats
from jaxtyping import Float, Int, Shaped

from jprune.recall.inference.intervals import defined_mean
from jprune.recall.inputs.arguments import Numbers, Rng, check_level, check_resamples, one_per_model, stacks
from jprune.recall.measures.counts import class_numbers
from jprune.recall.measures.intensification import intensification

_CELLS = 4_000_000  # of a block of resamples in memory at once: 32 MB in float64


class BootstrapInterval(NamedTuple):
    """An estimate over models with its BCa bootstrap interval; every field has the shape (...).

    Attributes:
      estimate: the statistic of the models themselves.
      standard_error: standard deviation of the resampled statistics, ddof 1.
      low: lower end of the interval.
      high: upper end.
      models: number of models resampled.
      left_out: number of models left out because they are NaN.
      reason: why the interval is NaN; otherwise empty.
    """

    estimate: Float[np.ndarray, "*stacks"]
    standard_error: Float[np.ndarray, "*stacks"]
    low: Float[np.ndarray, "*stacks"]
    high: Float[np.ndarray, "*stacks"]
    models: Int[np.ndarray, "*stacks"]
    left_out: Int[np.ndarray, "*stacks"]
    reason: Shaped[np.ndarray, "*stacks"]


class ExampleBootstrap(NamedTuple):
    """Alpha of the same models on other test sets; the mean is over the models whose alpha is defined.

    Attributes:
      estimate: mean alpha over the models on the test set itself, (...).
      standard_error: standard deviation of the resampled means, ddof 1, (...).
      bias: mean of the resampled means minus the estimate, (...). Resampling adds as much error to the dense recalls as
        the finite test set did, so this estimates the bias of alpha.
      low: lower end of the basic interval 2 estimate - upper quantile, (...), which removes that bias.
      high: upper end.
      alphas: alpha of every model on every resample, (resamples, ..., models).
      left_out: number of resampled alphas left out of the means because they are NaN, (...).
    """

    estimate: Float[np.ndarray, "*ratios"]
    standard_error: Float[np.ndarray, "*ratios"]
    bias: Float[np.ndarray, "*ratios"]
    low: Float[np.ndarray, "*ratios"]
    high: Float[np.ndarray, "*ratios"]
    alphas: Float[np.ndarray, "resamples *ratios models"]
    left_out: Int[np.ndarray, "*ratios"]


def bootstrap_models(values: Numbers, *, rng: Rng, resamples: int = 10_000, level: float = 0.99) -> BootstrapInterval:
    """Bootstrap interval of a mean over models, bias-corrected and accelerated (Efron 1987).

    Args:
      values: one number per model on the last axis, (..., models); NaN is left out and counted. All rows use the same
        resamples, so that ratios stay paired.
      rng: generator, seed sequence or integer seed.
      resamples: number of bootstrap resamples.
      level: confidence level of each interval, strictly between 0 and 1.

    Raises:
      ValueError: ``values`` has no models axis or an infinite entry, or ``level`` or ``resamples`` is out of range.

    >>> interval = bootstrap_models([1.1, 1.3, 0.9, 1.2, 1.4], rng=0, level=0.95)
    >>> float(interval.estimate.round(3)), bool(interval.low < 1.18 < interval.high)
    (1.18, True)
    """
    x = one_per_model("values", values)
    check_level(level)
    check_resamples(resamples)
    *stack, models = x.shape
    seed = int(np.random.default_rng(rng).integers(2**63))  # one for all rows, so that they use the same resamples
    made = ~np.isnan(x)
    rows = zip(*(each.reshape(math.prod(stack), models) for each in (x, made)), strict=True)
    fields = zip(*(_bca(row[present], seed, resamples, level) for row, present in rows), strict=True)
    estimate, error, low, high, reason = (np.array(field).reshape(stack) for field in fields)
    defined = np.asarray(made.sum(-1))
    return BootstrapInterval(estimate, error, low, high, defined, np.asarray(models - defined), reason)


def bootstrap_examples(
    labels: Numbers,
    dense_predictions: Numbers,
    pruned_predictions: Numbers,
    num_classes: int,
    *,
    rng: Rng,
    resamples: int = 1_000,
    level: float = 0.99,
) -> ExampleBootstrap:
    """Bootstrap alpha over the test examples, with the same resample for all models and ratios.

    A class without examples in a resample is left out of the alphas of that resample.

    Args:
      labels: true classes, integers in 0..num_classes-1, (examples,).
      dense_predictions: predicted classes, integers, (models, examples).
      pruned_predictions: predictions of the same models after pruning, (..., models, examples).
      num_classes: number of classes.
      rng: generator, seed sequence or integer seed.
      resamples: number of bootstrap resamples.
      level: confidence level of each interval, strictly between 0 and 1.

    Raises:
      ValueError: a label or prediction is not a class, the shapes do not match, or ``level`` or ``resamples`` is out of
        range.

    >>> labels = np.array([0, 0, 0, 0, 1, 1, 1, 1] * 20)
    >>> dense = np.where(np.arange(160) % 8 == 7, 0, labels)[None]
    >>> pruned = np.where(np.arange(160) % 8 >= 6, 0, labels)[None]
    >>> result = bootstrap_examples(labels, dense, pruned, 2, rng=0, resamples=200)
    >>> float(result.estimate.round(3)), result.alphas.shape
    (2.333, (200, 1))
    """
    check_level(level)
    check_resamples(resamples)
    truth, dense, pruned = (
        class_numbers(name, value, num_classes)
        for name, value in (
            ("labels", labels),
            ("dense_predictions", dense_predictions),
            ("pruned_predictions", pruned_predictions),
        )
    )
    if truth.ndim != 1 or dense.ndim != 2 or dense.shape[-1:] != truth.shape or truth.size == 0:
        raise ValueError(
            "labels must have shape (examples,) and dense_predictions (models, examples), "
            f"got {truth.shape} and {dense.shape}"
        )
    stacks("dense_predictions", dense, "pruned_predictions", pruned)
    correct = np.concatenate([dense, pruned.reshape(-1, truth.size)]) == truth
    generator = np.random.default_rng(rng)
    # One float32 matrix product per class: counts of examples are exact in float32 up to 2^24.
    order = np.argsort(truth, kind="stable")
    sorted_correct = correct[:, order].T.astype(np.float32 if truth.size < 2**24 else np.float64)
    edges = np.searchsorted(truth[order], np.arange(num_classes + 1))
    ones = np.ones((1, truth.size), sorted_correct.dtype)
    estimate = _alphas(ones, sorted_correct, edges, pruned.shape[:-1])[0]
    block = max(1, min(resamples, _CELLS // max(truth.size, correct.shape[0] * num_classes)))
    alphas = np.concatenate(
        [
            _alphas(_weights(generator, size, ones), sorted_correct, edges, pruned.shape[:-1])
            for size in [min(block, resamples - done) for done in range(0, resamples, block)]
        ]
    )
    return _summary(estimate, alphas, level)


def _bca(
    values: npt.NDArray[np.float64], seed: int, resamples: int, level: float
) -> tuple[float, float, float, float, str]:
    nan = float("nan")
    if values.size == 0:
        return nan, nan, nan, nan, "the statistic is undefined for every model"
    estimate = float(values.mean())
    if values.size < 2:
        return estimate, nan, nan, nan, "fewer than two models"
    if np.ptp(values) <= 8 * np.finfo(np.float64).eps * max(np.abs(values).max(), 1):
        return estimate, 0.0, estimate, estimate, ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", scipy.stats.DegenerateDataWarning)  # the reason names it
        result = scipy.stats.bootstrap(
            (values,),
            np.mean,
            vectorized=True,
            n_resamples=resamples,
            confidence_level=level,
            method="BCa",
            rng=np.random.default_rng(seed),
        )
    low, high = (float(end) for end in result.confidence_interval)
    reason = "the resampled statistics are degenerate" if np.isnan([low, high]).any() else ""
    return estimate, float(result.standard_error), low, high, reason


def _weights(generator: np.random.Generator, size: int, ones: npt.NDArray[np.floating]) -> npt.NDArray[np.floating]:
    """Count how often each example occurs in each of ``size`` resamples, (size, examples)."""
    n = ones.shape[-1]
    drawn = generator.integers(n, size=(size, n)) + n * np.arange(size)[:, None]
    return np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(ones.dtype)


def _alphas(
    weights: npt.NDArray[np.floating],
    correct: npt.NDArray[np.floating],
    edges: npt.NDArray[np.integer],
    stack: tuple[int, ...],
) -> npt.NDArray[np.float64]:
    """Alpha of models with ``correct`` (examples, all models), under example weights (resamples, examples)."""
    spans = list(itertools.pairwise(edges))
    hits = np.stack([weights[:, a:b] @ correct[a:b] for a, b in spans], -1).astype(np.float64)
    support = np.stack([weights[:, a:b].sum(-1) for a, b in spans], -1).astype(np.float64)
    recall = hits / np.where(support > 0, support, np.nan)[:, None, :]
    accuracy = hits.sum(-1) / support.sum(-1)[:, None]
    models = stack[-1]

    def pruned(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """The pruned part as (*ratios, resamples, models, ...), so that the dense shape is its last axes."""
        parted = values[:, models:].reshape(len(values), *stack, *values.shape[2:])
        return np.moveaxis(parted, 0, len(stack) - 1)

    alphas = intensification(recall[:, :models], pruned(recall), accuracy[:, :models], pruned(accuracy))
    return np.moveaxis(alphas, len(stack) - 1, 0)


def _summary(estimate: npt.NDArray[np.float64], alphas: npt.NDArray[np.float64], level: float) -> ExampleBootstrap:
    means, centre = defined_mean(alphas), defined_mean(estimate)
    enough = (~np.isnan(means)).sum(0) > 1
    filled = np.where(enough, means, 0)  # all-NaN columns would only warn
    lower, upper = np.where(enough, np.nanquantile(filled, [(1 - level) / 2, (1 + level) / 2], axis=0), np.nan)
    return ExampleBootstrap(
        estimate=centre,
        standard_error=np.where(enough, np.nanstd(filled, axis=0, ddof=1), np.nan),
        bias=np.asarray(np.where(enough, np.nanmean(filled, axis=0), np.nan) - centre),
        low=np.asarray(2 * centre - upper),
        high=np.asarray(2 * centre - lower),
        alphas=alphas,
        left_out=np.asarray(np.isnan(alphas).sum((0, -1))),
    )
