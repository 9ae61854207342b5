"""Confusion counts of one model or a stack of models, and the rates they define.

``counts`` is jitted jax and stays on the device; the rates turn its (..., classes, classes) integers
into numpy float64. The audit tallies predictions without a confusion matrix, in ``jprune.recall.measures.rates``.
"""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jaxtyping import Array, Bool, Float, Int

from jprune.recall.inputs.arguments import EmptyClassWarning, Numbers, first_true
from jprune.recall.inputs.predictions import MOST_CLASSES


def counts(labels: Numbers, predictions: Numbers, num_classes: int) -> Int[Array, "*models classes classes"]:
    """Count how often each model predicts each class for the examples of each class.

    Counts of batches add up: the sum over batches is the count of the whole data set; add them in numpy
    int64 where a cell may pass 2^31 - 1. Inside ``jax.jit`` values cannot be checked; an example whose
    label or prediction is out of range, or whose logits hold a NaN, is then counted nowhere.

    Args:
      labels: true classes, integers in 0..num_classes-1, (examples,).
      predictions: predicted classes, integers, (*models, examples); or logits, floats, (*models,
        examples, num_classes), of which the largest counts (the first among equals).
      num_classes: how many classes there are.

    Returns:
      int32 counts (*models, classes, classes); the true class on the rows, the predicted one on
      the columns.

    Raises:
      ValueError: a label or prediction is not a class, a logit is NaN, a dtype is neither integer nor
        (for predictions) float, or shapes do not match; the message has the index and the value.

    >>> counts([0, 0, 1], [[0, 1, 1], [0, 0, 0]], 2)
    Array([[[1, 1],
            [0, 1]],
           [[2, 0],
            [1, 0]]], dtype=int32)
    """
    if not 1 <= num_classes <= MOST_CLASSES:
        raise ValueError(f"num_classes must lie in 1..{MOST_CLASSES} (its square fits int32), got {num_classes}")
    labels_array, predictions_array = _as_array("labels", labels), _as_array("predictions", predictions)
    if labels_array.ndim != 1:
        raise ValueError(f"labels must have shape (examples,), got {labels_array.shape}")
    _refuse_floats("labels", labels_array, num_classes)
    logits = jnp.issubdtype(predictions_array.dtype, jnp.floating)
    wanted = (labels_array.shape[0], num_classes) if logits else labels_array.shape
    if predictions_array.shape[-len(wanted) :] != wanted:
        kind = "logits (float predictions)" if logits else "integer predictions"
        form = "(*models, examples, num_classes)" if logits else "(*models, examples)"
        raise ValueError(
            f"{kind} must have shape {form} ending in {wanted} to match labels and num_classes, "
            f"got {predictions_array.shape}"
        )
    _refuse("labels", labels_array, num_classes)
    _refuse("predictions", predictions_array, num_classes)
    if logits:
        predictions_array = _largest(predictions_array)
    tally: Int[Array, "*models classes classes"]
    tally = _tally(_narrow(labels_array), _narrow(predictions_array), num_classes)
    return tally


def support(counts: Numbers) -> Int[np.ndarray, "*models classes"]:
    """How many examples each true class has: the row sums of the counts.

    >>> support([[1, 1], [0, 1]])
    array([2, 1])
    """
    return np.asarray(_checked(counts).sum(-1, dtype=np.int64))


def recall(counts: Numbers) -> Float[np.ndarray, "*models classes"]:
    """The fraction of each class's examples that are predicted as that class: R^c.

    NaN for a class without examples; an ``EmptyClassWarning`` names such classes.

    Args:
      counts: confusion counts (*models, classes, classes), the true class on the rows.

    Returns:
      float64 (*models, classes).

    Raises:
      ValueError: ``counts`` is not a stack of square count matrices, or holds no example.

    >>> recall([[3, 1], [0, 2]])
    array([0.75, 1.  ])
    """
    matrix = _checked(counts)
    examples = matrix.sum(-1, dtype=np.int64)
    _warn_empty("recall", "without examples", examples == 0)
    return _ratio(_diagonal(matrix), examples)


def precision(counts: Numbers) -> Float[np.ndarray, "*models classes"]:
    """The fraction of the examples predicted as each class that are of that class.

    NaN for a class that a model never predicts or that has no examples; an ``EmptyClassWarning``
    names such classes. Arguments and errors as ``recall``.

    >>> precision([[3, 1], [0, 2]]).round(4)
    array([1.    , 0.6667])
    """
    matrix = _checked(counts)
    predicted = np.where(matrix.sum(-1, dtype=np.int64) == 0, 0, matrix.sum(-2, dtype=np.int64))
    _warn_empty("precision", "never predicted or without examples", predicted == 0)
    return _ratio(_diagonal(matrix), predicted)


def f1(counts: Numbers) -> Float[np.ndarray, "*models classes"]:
    """The harmonic mean of precision and recall of each class: 2 TP / (2 TP + FP + FN).

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
    """The fraction of all examples that are predicted correctly: A. Arguments and errors as ``recall``.

    >>> float(accuracy([[3, 1], [0, 1]]))
    0.8
    """
    matrix = _checked(counts)
    return np.asarray(_diagonal(matrix).sum(-1, dtype=np.int64) / matrix.sum((-2, -1), dtype=np.int64))


def false_positive_rate(counts: Numbers) -> Float[np.ndarray, "*models classes"]:
    """The fraction of the examples of other classes that are predicted as each class.

    NaN where no other class has examples. Arguments and errors as ``recall``.

    >>> false_positive_rate([[3, 1], [0, 2]])
    array([0.  , 0.25])
    """
    matrix = _checked(counts)
    others = matrix.sum((-2, -1), dtype=np.int64)[..., None] - matrix.sum(-1, dtype=np.int64)
    return _ratio(matrix.sum(-2, dtype=np.int64) - _diagonal(matrix), others)


def false_negative_rate(counts: Numbers) -> Float[np.ndarray, "*models classes"]:
    """The fraction of each class's examples that are predicted as another class: 1 - recall.

    NaN for a class without examples, which an ``EmptyClassWarning`` names. Arguments and errors as
    ``recall``.

    >>> false_negative_rate([[3, 1], [0, 2]])
    array([0.25, 0.  ])
    """
    return 1 - recall(counts)


def class_numbers(name: str, value: Numbers, num_classes: int) -> Int[np.ndarray, "..."]:
    """Check that an argument holds nothing but classes and convert it to numpy int64.

    Raises:
      ValueError: an entry is outside 0..num_classes-1, or no integer.

    >>> class_numbers("labels", [0, 3], 3)
    Traceback (most recent call last):
      ...
    ValueError: labels must lie in 0..2, got 3 at index 1
    """
    array = _as_array(name, value)
    _refuse_floats(name, array, num_classes)
    _refuse(name, array, num_classes)
    return np.asarray(array).astype(np.int64)


@functools.partial(jax.jit, static_argnums=2)
def _tally(
    labels: Int[Array, " examples"] | Bool[Array, " examples"],
    predictions: Int[Array, "*models examples"] | Bool[Array, "*models examples"],
    num_classes: int,
) -> Int[Array, "*models classes classes"]:
    *models, examples = predictions.shape
    stack, rows = predictions.reshape(math.prod(models), examples), labels[None, :]
    valid = ~(_no_class(rows, num_classes) | _no_class(stack, num_classes))
    # Past the end and not -1: `mode="drop"` would still wrap a negative index around.
    cell = jnp.where(valid, rows.astype(jnp.int32) * num_classes + stack.astype(jnp.int32), num_classes**2)
    model = jnp.broadcast_to(jnp.arange(stack.shape[0])[:, None], cell.shape)
    tally = jnp.zeros((stack.shape[0], num_classes**2), jnp.int32).at[model, cell].add(1, mode="drop")
    return tally.reshape(*models, num_classes, num_classes)


def _as_array(name: str, value: Numbers) -> Any:
    """Leave jax and numpy arrays as they are, so that nothing is copied or narrowed before it is checked."""
    array = value if isinstance(value, jax.Array | np.ndarray) else np.asarray(value)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.integer, jnp.bool_, jnp.floating)):
        raise ValueError(f"{name} must be integers{' or logits' * (name != 'labels')}, got dtype {array.dtype}")
    return array


def _refuse_floats(name: str, array: Any, num_classes: int) -> None:
    if jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be integers in 0..{num_classes - 1}, got dtype {array.dtype}")


def _refuse(name: str, array: Any, num_classes: int) -> None:
    """Raise for the first entry that is not a class, or NaN among logits; a tracer has no values to check."""
    if isinstance(array, jax.core.Tracer) or array.size == 0:
        return
    xp = jnp if isinstance(array, jax.Array) else np
    if jnp.issubdtype(array.dtype, jnp.floating):
        wrong, allowed = xp.isnan(array), "must not be NaN"
    else:
        wrong, allowed = _no_class(array, num_classes), f"must lie in 0..{num_classes - 1}"
    if wrong.any():
        at = first_true(wrong)
        raise ValueError(f"{name} {allowed}, got {array[at]} at index {at if len(at) > 1 else at[0]}")


def _no_class(array: Any, num_classes: int) -> Any:
    """Where integers are outside 0..num_classes-1, compared in their own dtype, which may be narrow or unsigned."""
    if array.dtype == bool:
        return array & (num_classes == 1)
    return (array < 0) | (array > min(num_classes - 1, int(np.iinfo(array.dtype).max)))


def _largest(logits: Any) -> Any:
    """The class of the largest logit; -1, which is none, where one is NaN and a trace could not refuse it."""
    if isinstance(logits, np.ndarray):  # jax would round float64 to float32 first
        return logits.argmax(-1)
    return jnp.where(jnp.isnan(logits).any(-1), -1, jnp.argmax(logits, -1))


def _narrow(array: Any) -> Int[Array, "..."] | Bool[Array, "..."]:
    """Move to the device; numpy's int64 is already known to fit int32."""
    return jnp.asarray(array.astype(np.int32)) if isinstance(array, np.ndarray) else array


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
        raise ValueError(f"counts of model {first_true(empty)} hold no example")
    return matrix


def _diagonal(matrix: npt.NDArray[np.integer]) -> npt.NDArray[np.integer]:
    return np.diagonal(matrix, axis1=-2, axis2=-1).astype(np.int64)


def _ratio(numerator: npt.NDArray[np.integer], denominator: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    out = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=out, where=denominator > 0)
    return out


def _warn_empty(measure: str, what: str, empty: npt.NDArray[np.bool_]) -> None:
    """Name the classes for which a measure is undefined, and in how many models of a stack."""
    models = empty.reshape(-1, empty.shape[-1])
    times = models.sum(0)
    if times.any():
        named = [
            str(c) if times[c] == len(models) else f"{c} (in {times[c]} of {len(models)} models)"
            for c in np.flatnonzero(times)
        ]
        more = f" and {len(named) - 20} more" if len(named) > 20 else ""
        warnings.warn(
            f"{measure} is NaN for classes {what}: {', '.join(named[:20])}{more}; they are left out of every sum",
            EmptyClassWarning,
            stacklevel=3,
        )
