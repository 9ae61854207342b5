"""Measures that need logits: confidence, calibration, divergence, top-k recall, risk."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

_CELLS = 1 << 18  # entries of a block of examples and classes: 2 MB in float64
_ROUNDED = 0.05  # tolerance for the sum of a row of rounded probabilities
BINS = 15  # of equal width, as in Guo et al. 2017
_Floats = npt.NDArray[np.float64]


class Outlook(NamedTuple):
    """Measures of one model's probabilities, by class; every field has the shape (classes + 1,), with all classes last.

    Attributes:
      confidence: mean probability of the predicted class.
      calibration_error: expected calibration error, 15 bins.
      top_k: fraction of the examples whose class is among the k most probable.
    """

    confidence: Float[np.ndarray, " classes_and_all"]
    calibration_error: Float[np.ndarray, " classes_and_all"]
    top_k: Float[np.ndarray, " classes_and_all"]


def _blocks(logits: npt.NDArray[np.floating]) -> Iterator[tuple[slice, Float[np.ndarray, "rows classes"]]]:
    """Yield log probabilities in blocks of examples that fit the processor's cache.

    The logits may be probabilities: rows in [0, 1] that sum to 1 up to rounding.
    """
    probabilities = are_probabilities(logits)
    rows = max(1, _CELLS // logits.shape[-1])
    for start in range(0, len(logits), rows):
        given = logits[start : start + rows].astype(np.float64)
        yield slice(start, start + rows), _normalized(given, probabilities=probabilities)


def _normalized(given: Float[np.ndarray, "rows classes"], *, probabilities: bool) -> Float[np.ndarray, "rows classes"]:
    if probabilities:
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(given / given.sum(-1, keepdims=True)))
    best = given.max(-1, keepdims=True)
    if np.isfinite(best).all():
        shifted = given - best
    else:
        finite = np.where(np.isfinite(best), best, 0.0)
        with np.errstate(invalid="ignore"):
            below = np.where(np.isposinf(best), -np.inf, given - finite)
        shifted = np.where(given == best, 0.0, below)  # avoids inf - inf if the largest is infinite
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def outlook(
    true: Int[np.ndarray, " examples"],
    logits: Float[np.ndarray, "examples classes"],
    k: int,
) -> Outlook:
    """Compute confidence, calibration error and top-k recall of every class, and of all examples.

    The calibration error is that of Naeini et al. 2015: the mean over bins of confidence, weighted by their examples,
    of the distance between accuracy and mean confidence. For a class it is over the examples of that class. Ties of
    probabilities go to the lower class index, as for the predicted class.

    >>> found = outlook(np.array([0, 1]), np.log([[0.9, 0.1], [0.8, 0.2]]), 1)
    >>> found.confidence.round(2).tolist(), found.calibration_error.round(2).tolist(), found.top_k.tolist()
    ([0.9, 0.8, 0.85], [0.1, 0.8, 0.45], [1.0, 0.0, 0.5])
    """
    classes = logits.shape[1]
    confidence, right, ahead = np.empty(len(true)), np.empty(len(true)), np.empty(len(true))
    for block, log_p in _blocks(logits):
        row, label, predicted = np.arange(len(log_p)), true[block], log_p.argmax(1)
        confidence[block], right[block] = np.exp(log_p[row, predicted]), predicted == label
        own = log_p[row, label][:, None]
        ahead[block] = (log_p > own).sum(1) + ((log_p == own) & (np.arange(classes) < label[:, None])).sum(1)
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)
    cells = true * BINS + bins
    gaps = np.bincount(cells, right - confidence, classes * BINS).reshape(classes, BINS)
    whole = np.bincount(bins, right - confidence, BINS)
    support = np.bincount(true, minlength=classes)
    n = np.append(np.where(support > 0, support, np.nan), float(len(true)))
    errors = np.append(np.abs(gaps).sum(1), np.abs(whole).sum()) / n
    return Outlook(_by_class(confidence, true, n), errors, _by_class((ahead < k).astype(np.float64), true, n))


def divergence(
    true: Int[np.ndarray, " examples"],
    dense: Float[np.ndarray, "examples classes"],
    after: Float[np.ndarray, "examples classes"],
) -> Float[np.ndarray, " classes_and_all"]:
    """Compute the mean Kullback-Leibler divergence, in nats, of compressed from dense probabilities, by class.

    It is sum_k p_dense(k) log(p_dense(k) / p_compressed(k)), infinite if a class has probability 0 only after
    compression. Both are given as logits or probabilities.

    >>> divergence(np.array([0]), np.log([[0.5, 0.5]]), np.log([[0.9, 0.1]])).round(4).tolist()
    [0.5108, nan, 0.5108]
    """
    each = np.empty(len(true))
    for (block, one), (_, other) in zip(_blocks(dense), _blocks(after), strict=True):
        p = np.exp(one)
        with np.errstate(invalid="ignore"):
            each[block] = np.where(p > 0, p * (one - other), 0.0).sum(1)
    support = np.bincount(true, minlength=dense.shape[1])
    return _by_class(each, true, np.append(np.where(support > 0, support, np.nan), float(len(true))))


def margins(logits: Float[np.ndarray, "examples classes"]) -> Float[np.ndarray, " examples"]:
    """Return the difference between the two largest probabilities of each example.

    >>> margins(np.array([[0.7, 0.2, 0.1]])).round(2).tolist()
    [0.5]
    """
    found = np.empty(len(logits))
    for block, log_p in _blocks(logits):
        two = np.exp(np.partition(log_p, -2, axis=-1)[:, -2:])
        found[block] = two[:, 1] - two[:, 0]
    return found


def area_under_curve(risk: Float[np.ndarray, " examples"], lost: npt.NDArray[np.bool_]) -> float:
    """Return the area under the ROC curve of a risk as a predictor of lost examples; NaN without both kinds.

    >>> area_under_curve(np.array([0.9, 0.2, 0.2, 0.1]), np.array([True, False, True, False]))
    0.875
    """
    positives = int(lost.sum())
    negatives = len(lost) - positives
    if not positives or not negatives:
        return float("nan")
    _, place, times = np.unique(risk, return_inverse=True, return_counts=True)
    last = np.cumsum(times)
    ranks = (last - (times - 1) / 2)[place]
    return float((ranks[lost].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def are_probabilities(given: npt.NDArray[np.floating]) -> bool:
    """Whether all rows are numbers in [0, 1] that sum to 1; they may be rounded to two decimals.

    >>> are_probabilities(np.array([[0.33, 0.33, 0.33]])), are_probabilities(np.array([[0.9, 0.8, 0.1]]))
    (True, False)
    """
    if given[:1].min() < 0 or given.min() < 0 or given.max() > 1:  # mostly decided by the first row
        return False
    return bool((np.abs(given.sum(-1, dtype=np.float64) - 1) <= _ROUNDED).all())


def _by_class(values: _Floats, true: Int[np.ndarray, " examples"], n: _Floats) -> _Floats:
    classes = len(n) - 1
    return np.append(np.bincount(true, values, classes), values.sum()) / n
