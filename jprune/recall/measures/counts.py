"""Rates of confusion counts: the recall, precision and F1 of every class, and the accuracy.

The functions convert integer counts (..., classes, classes) to numpy float64. The audit does not use a confusion
matrix: ``jprune.recall.measures.rates`` computes its rates directly from predictions.
"""

import warnings
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from jaxtyping import Float, Int

from jprune.recall.inputs.arguments import EmptyClassWarning, Numbers, first_true
from jprune.recall.inputs.text import some
from jprune.recall.measures.intensification import quotient

Integers: TypeAlias = Any  # a numpy or jax array; jax is not imported here


def support(counts: Numbers) -> Int[np.ndarray, "*models classes"]:
    """Return the number of examples of each true class: the row sums of the counts.

    >>> support([[1, 1], [0, 1]])
    array([2, 1])
    """
    return np.asarray(_checked(counts).sum(-1, dtype=np.int64))


def recall(counts: Numbers) -> Float[np.ndarray, "*models classes"]:
    """Return the recall R^c of each class: the fraction of its examples that are predicted as that class.

    NaN for a class without examples; an ``EmptyClassWarning`` names them.

    Args:
      counts: confusion counts (*models, classes, classes), the true class on the rows.

    Returns:
      float64 (*models, classes).

    Raises:
      ValueError: ``counts`` is not a stack of square count matrices, or has no example.

    >>> recall([[3, 1], [0, 2]])
    array([0.75, 1.  ])
    """
    matrix = _checked(counts)
    examples = matrix.sum(-1, dtype=np.int64)
    _warn_empty("recall", "without examples", examples == 0)
    return _ratio(_diagonal(matrix), examples)


def precision(counts: Numbers) -> Float[np.ndarray, "*models classes"]:
    """Return the precision of each class: the fraction of the examples predicted as it that belong to it.

    NaN for a class that a model never predicts or that has no examples; an ``EmptyClassWarning``
    names them. Arguments and errors as ``recall``.

    >>> precision([[3, 1], [0, 2]]).round(4)
    array([1.    , 0.6667])
    """
    matrix = _checked(counts)
    predicted = np.where(matrix.sum(-1, dtype=np.int64) == 0, 0, matrix.sum(-2, dtype=np.int64))
    _warn_empty("precision", "never predicted or without examples", predicted == 0)
    return _ratio(_diagonal(matrix), predicted)


def f1(counts: Numbers) -> Float[np.ndarray, "*models classes"]:
    """Return the F1 score of each class, the harmonic mean of precision and recall: 2 TP / (2 TP + FP + FN).

    0 for a class with examples that is never predicted; NaN for a class without examples, which an
    ``EmptyClassWarning`` names. Arguments and errors as ``recall``.

    >>> f1([[3, 1], [0, 2]]).round(4)
    array([0.8571, 0.8   ])
    """
    matrix = _checked(counts)
    examples = matrix.sum(-1, dtype=np.int64)
    _warn_empty("f1", "without examples", examples == 0)
    return _ratio(2 * _diagonal(matrix), np.where(examples == 0, 0, examples + matrix.sum(-2, dtype=np.int64)))


def accuracy(counts: Numbers) -> Float[np.ndarray, "*models"]:
    """Return the accuracy A: the fraction of all examples predicted correctly. Arguments and errors as ``recall``.

    >>> float(accuracy([[3, 1], [0, 1]]))
    0.8
    """
    matrix = _checked(counts)
    return np.asarray(_diagonal(matrix).sum(-1, dtype=np.int64) / matrix.sum((-2, -1), dtype=np.int64))


def false_positive_rate(counts: Numbers) -> Float[np.ndarray, "*models classes"]:
    """Return the false positive rate of each class: the fraction of the other classes' examples predicted as it.

    NaN if no other class has examples. Arguments and errors as ``recall``.

    >>> false_positive_rate([[3, 1], [0, 2]])
    array([0.  , 0.25])
    """
    matrix = _checked(counts)
    others = matrix.sum((-2, -1), dtype=np.int64)[..., None] - matrix.sum(-1, dtype=np.int64)
    return _ratio(matrix.sum(-2, dtype=np.int64) - _diagonal(matrix), others)


def false_negative_rate(counts: Numbers) -> Float[np.ndarray, "*models classes"]:
    """Return the false negative rate of each class: 1 - recall.

    NaN for a class without examples, which an ``EmptyClassWarning`` names. Arguments and errors as
    ``recall``.

    >>> false_negative_rate([[3, 1], [0, 2]])
    array([0.25, 0.  ])
    """
    return 1 - recall(counts)


def class_numbers(name: str, value: Numbers, num_classes: int) -> Int[np.ndarray, "..."]:
    """Check that an argument contains only class indices and convert it to numpy int64.

    Raises:
      ValueError: an entry is outside 0..num_classes-1, or not an integer.

    >>> class_numbers("labels", [0, 3], 3)
    Traceback (most recent call last):
      ...
    ValueError: labels must lie in 0..2, got 3 at index 1
    """
    array = np.asarray(value)
    if array.dtype.kind not in "iub":
        raise ValueError(f"{name} must be integers in 0..{num_classes - 1}, got dtype {array.dtype}")
    wrong = outside(array, num_classes)
    if wrong.any():
        at = first_true(wrong)
        raise ValueError(
            f"{name} must lie in 0..{num_classes - 1}, got {array[at]} at index {at if len(at) > 1 else at[0]}"
        )
    return array.astype(np.int64)


def outside(array: Integers, num_classes: int) -> Integers:
    """Return where integers of a numpy or jax array are outside 0..num_classes-1.

    They are compared in their own dtype, which may be narrow or unsigned.

    >>> outside(np.array([0, 3, -1]), 3)
    array([False,  True,  True])
    """
    if array.dtype == bool:
        return array & (num_classes == 1)
    return (array < 0) | (array > min(num_classes - 1, int(np.iinfo(array.dtype).max)))


def _checked(counts: Numbers) -> npt.NDArray[np.integer]:
    matrix = np.asarray(counts)
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or not np.issubdtype(matrix.dtype, np.integer):
        raise ValueError(
            "counts must be integers of shape (*models, classes, classes), as jprune.recall.counts gives; "
            f"got {matrix.dtype} of shape {matrix.shape}"
        )
    if matrix.size and matrix.min() < 0:
        index = first_true(matrix < 0)
        raise ValueError(f"counts must not be negative, got {matrix[index]} at index {index}")
    empty = ~matrix.any((-2, -1))
    if empty.any():
        raise ValueError(f"counts of model {first_true(empty)} contain no example")
    return matrix


def _diagonal(matrix: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    return np.diagonal(matrix, axis1=-2, axis2=-1).astype(np.int64)


def _ratio(numerator: npt.NDArray[np.integer], denominator: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    return quotient(numerator, denominator, denominator > 0)


def _warn_empty(measure: str, what: str, empty: npt.NDArray[np.bool_]) -> None:
    """Warn about classes for which a measure is undefined, with the number of models of a stack."""
    models = empty.reshape(-1, empty.shape[-1])
    times = models.sum(0)
    if times.any():
        named = [
            str(c) if times[c] == len(models) else f"{c} (in {times[c]} of {len(models)} models)"
            for c in np.flatnonzero(times)
        ]
        warnings.warn(
            f"{measure} is NaN for classes {what}: {some(named, 20)}; they are left out of every sum",
            EmptyClassWarning,
            stacklevel=3,
        )
