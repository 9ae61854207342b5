"""Count confusions of one or several models on the device.

``counts`` is compiled by jax. The other measures work on its result in numpy.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jprune.recall.inputs.arguments import Numbers, first_true
from jprune.recall.inputs.predictions import MOST_CLASSES
from jprune.recall.measures.counts import outside


def counts(labels: Numbers, predictions: Numbers, num_classes: int) -> Int[Array, "*models classes classes"]:
    """Count how often each model predicts each class for the examples of each class.

    The counts of a data set are the sum of the counts of its batches; add them in numpy int64 if a cell may exceed 2^31
    - 1. Inside ``jax.jit`` values cannot be checked; an example whose label or prediction is out of range, or whose
    logits have a NaN, is then not counted.

    Args:
      labels: true classes, integers in 0..num_classes-1, (examples,).
      predictions: predicted classes, integers, (*models, examples); or logits, floats, (*models, examples,
        num_classes), of which the largest is the prediction (ties: the first).
      num_classes: number of classes.

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


@functools.partial(jax.jit, static_argnums=2)
def _tally(
    labels: Int[Array, " examples"] | Bool[Array, " examples"],
    predictions: Int[Array, "*models examples"] | Bool[Array, "*models examples"],
    num_classes: int,
) -> Int[Array, "*models classes classes"]:
    *models, examples = predictions.shape
    stack, rows = predictions.reshape(math.prod(models), examples), labels[None, :]
    valid = ~(outside(rows, num_classes) | outside(stack, num_classes))
    # An index past the end instead of -1, because `mode="drop"` wraps negative indices around.
    cell = jnp.where(valid, rows.astype(jnp.int32) * num_classes + stack.astype(jnp.int32), num_classes**2)
    model = jnp.broadcast_to(jnp.arange(stack.shape[0])[:, None], cell.shape)
    tally = jnp.zeros((stack.shape[0], num_classes**2), jnp.int32).at[model, cell].add(1, mode="drop")
    return tally.reshape(*models, num_classes, num_classes)


def _as_array(name: str, value: Numbers) -> Array | np.ndarray:
    """Convert to an array; jax and numpy arrays are unchanged, so that nothing is narrowed before it is checked."""
    array = value if isinstance(value, jax.Array | np.ndarray) else np.asarray(value)
    if not any(jnp.issubdtype(array.dtype, kind) for kind in (jnp.integer, jnp.bool_, jnp.floating)):
        raise ValueError(f"{name} must be integers{' or logits' * (name != 'labels')}, got dtype {array.dtype}")
    return array


def _refuse_floats(name: str, array: Array | np.ndarray, num_classes: int) -> None:
    if jnp.issubdtype(array.dtype, jnp.floating):
        raise ValueError(f"{name} must be integers in 0..{num_classes - 1}, got dtype {array.dtype}")


def _refuse(name: str, array: Array | np.ndarray, num_classes: int) -> None:
    """Raise for the first entry that is not a class, or NaN among logits; a tracer has no values to check."""
    if isinstance(array, jax.core.Tracer) or array.size == 0:
        return
    xp = jnp if isinstance(array, jax.Array) else np
    if jnp.issubdtype(array.dtype, jnp.floating):
        wrong, allowed = xp.isnan(array), "must not be NaN"
    else:
        wrong, allowed = outside(array, num_classes), f"must lie in 0..{num_classes - 1}"
    if wrong.any():
        at = first_true(wrong)
        raise ValueError(f"{name} {allowed}, got {array[at]} at index {at if len(at) > 1 else at[0]}")


def _largest(logits: Array | np.ndarray) -> Array | np.ndarray:
    """Return the class of the largest logit; -1, which is not a class, if one is NaN and the function is traced."""
    if isinstance(logits, np.ndarray):  # jax would round float64 to float32 first
        largest: np.ndarray = logits.argmax(-1)
        return largest
    return jnp.where(jnp.isnan(logits).any(-1), -1, jnp.argmax(logits, -1))


def _narrow(array: Array | np.ndarray) -> Int[Array, "..."] | Bool[Array, "..."]:
    """Move to the device; the values of numpy's int64 are already known to fit int32."""
    return jnp.asarray(array.astype(np.int32)) if isinstance(array, np.ndarray) else array
