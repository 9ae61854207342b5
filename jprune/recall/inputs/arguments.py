"""Validation of the arguments of the measures.

Every measure except ``counts`` works on small arrays in numpy float64 and accepts lists, numpy and jax arrays. The
checks here convert an argument to float64, or raise an error that names the argument, the index and the value.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

Numbers = npt.ArrayLike | float | int
"""A number, a nested list of numbers, or a numpy or jax array; converted to numpy."""

Rng = np.random.Generator | np.random.SeedSequence | int
"""A source of randomness: an argument of ``numpy.random.default_rng``, but not None."""


class EmptyClassWarning(UserWarning):
    """A measure is undefined for some classes (no examples, never predicted); the message names them."""


class Pair(NamedTuple):
    """Checked rates of dense and pruned models, of the same shape.

    Attributes:
      dense: rates of the dense models, float64 (..., classes); NaN where undefined.
      pruned: rates of the pruned models, the same shape.
      dense_accuracy: accuracies of the dense models, float64 (...).
      pruned_accuracy: accuracies of the pruned models, the same shape.
      zero: a recall balance up to this size is treated as 0, because it is rounding error of the given dtypes.
    """

    dense: npt.NDArray[np.float64]
    pruned: npt.NDArray[np.float64]
    dense_accuracy: npt.NDArray[np.float64]
    pruned_accuracy: npt.NDArray[np.float64]
    zero: float


def real(name: str, value: Numbers) -> npt.NDArray[np.float64]:
    """Convert an argument to a float64 array.

    Raises:
      ValueError: it is ragged or complex, or not numeric.

    >>> real("alphas", [1, 2])
    array([1., 2.])
    """
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise ValueError(f"{name} must be a rectangular array of numbers: {error}") from error
    if np.iscomplexobj(array) or not (np.issubdtype(array.dtype, np.number) or _is_small_float(array.dtype)):
        raise ValueError(f"{name} must contain real numbers, got dtype {array.dtype}")
    return array.astype(np.float64)


def one_per_model(name: str, value: Numbers) -> npt.NDArray[np.float64]:
    """Convert an argument with one number per model on its last axis to float64; NaN is allowed.

    Raises:
      ValueError: there is no models axis, or an entry is infinite.

    >>> one_per_model("alphas", 1.0)
    Traceback (most recent call last):
      ...
    ValueError: alphas must have a models axis: shape (..., models), got a single number 1.0
    """
    array = real(name, value)
    if array.ndim == 0:
        raise ValueError(f"{name} must have a models axis: shape (..., models), got a single number {array}")
    refuse_infinite(name, array)
    return array


def first_true(bad: npt.ArrayLike) -> tuple[int, ...]:
    """Return the index of the first True of a numpy or jax array, which must have one.

    >>> first_true(np.array([[False, False], [True, True]]))
    (1, 0)
    """
    flags = np.asarray(bad)
    return tuple(int(i) for i in np.unravel_index(int(flags.argmax()), flags.shape))


def refuse_infinite(name: str, array: npt.NDArray[np.float64]) -> None:
    """Raise if an entry is infinite.

    Raises:
      ValueError: an entry is infinite.

    >>> refuse_infinite("alphas", np.array([1.0, np.inf]))
    Traceback (most recent call last):
      ...
    ValueError: alphas must be finite or NaN, got inf at index (1,)
    """
    if np.isinf(array).any():
        index = first_true(np.isinf(array))
        raise ValueError(f"{name} must be finite or NaN, got {array[index]} at index {index}")


def rates(name: str, value: Numbers, *, nan: bool) -> npt.NDArray[np.float64]:
    """Convert an argument whose entries are fractions in [0, 1] to float64.

    Args:
      name: the caller's name for it, for the error.
      value: the argument.
      nan: whether NaN (undefined) is allowed among the entries.

    Raises:
      ValueError: an entry is outside [0, 1], or NaN where that is not allowed.

    >>> rates("accuracy", [0.5, 93.1], nan=False)
    Traceback (most recent call last):
      ...
    ValueError: accuracy must lie in [0, 1], got 93.1 at index (1,)
    """
    array = real(name, value)
    bad = ~((array >= 0) & (array <= 1 + 1e-6))  # a float32 mean can be slightly above 1
    if nan:
        bad &= ~np.isnan(array)
    if bad.any():
        index = first_true(bad)
        raise ValueError(f"{name} must lie in [0, 1], got {array[index]} at index {index}")
    return np.asarray(np.minimum(array, 1))


def recalls_and_accuracy(
    recall: Numbers, accuracy: Numbers, *, recall_name: str = "recall", accuracy_name: str = "accuracy"
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Check rates per class (..., classes) and the corresponding accuracies (...).

    Raises:
      ValueError: an entry is outside [0, 1], an accuracy is NaN, there is no class axis, or the shapes do not match.

    >>> recalls_and_accuracy([0.9, 0.7], 0.8)
    (array([0.9, 0.7]), array(0.8))
    """
    per_class = rates(recall_name, recall, nan=True)
    overall = rates(accuracy_name, accuracy, nan=False)
    if per_class.ndim == 0 or per_class.shape[-1] == 0:
        raise ValueError(f"{recall_name} must have shape (..., classes) with a class or more, got {per_class.shape}")
    if overall.shape != per_class.shape[:-1]:
        raise ValueError(
            f"{accuracy_name} must have the shape of {recall_name} without its class axis, {per_class.shape[:-1]}, "
            f"got {overall.shape}"
        )
    return per_class, overall


def pair(dense_recall: Numbers, pruned_recall: Numbers, dense_accuracy: Numbers, pruned_accuracy: Numbers) -> Pair:
    """Check the four arguments of every measure that compares pruned with dense models.

    The dense stack must have the shape of the pruned one, or of its last axes: dense (models, classes) matches pruned
    (ratios, models, classes). An axis of length 1 is not broadcast.

    Raises:
      ValueError: as ``recalls_and_accuracy``, or the shapes of dense and pruned do not match.

    >>> pair([0.9, 0.7], [[0.7, 0.5], [0.6, 0.4]], 0.8, [0.6, 0.5]).dense.shape
    (2, 2)
    """
    dense, dense_overall = recalls_and_accuracy(
        dense_recall, dense_accuracy, recall_name="dense_recall", accuracy_name="dense_accuracy"
    )
    pruned, pruned_overall = recalls_and_accuracy(
        pruned_recall, pruned_accuracy, recall_name="pruned_recall", accuracy_name="pruned_accuracy"
    )
    stacks("dense_recall", dense, "pruned_recall", pruned)
    coarsest = max(_epsilon(value) for value in (dense_recall, pruned_recall, dense_accuracy, pruned_accuracy))
    return Pair(
        np.broadcast_to(dense, pruned.shape),
        pruned,
        np.broadcast_to(dense_overall, pruned_overall.shape),
        pruned_overall,
        4 * coarsest,
    )


def stacks(dense_name: str, dense: np.ndarray, pruned_name: str, pruned: np.ndarray) -> None:
    """Check that a dense stack has the shape of the pruned one, or of its last axes.

    Raises:
      ValueError: it has another shape.

    >>> stacks("dense", np.ones((30, 10)), "pruned", np.ones((29, 10)))
    Traceback (most recent call last):
      ...
    ValueError: shapes of dense and pruned do not match: dense has shape (30, 10), pruned (29, 10); ...
    """
    if dense.ndim > pruned.ndim or dense.shape != pruned.shape[pruned.ndim - dense.ndim :]:
        raise ValueError(
            f"shapes of dense and pruned do not match: {dense_name} has shape {dense.shape}, {pruned_name} "
            f"{pruned.shape}; the dense shape must equal the pruned shape or its last axes"
        )


def check_level(level: float) -> None:
    """Check a confidence level.

    Raises:
      ValueError: it is not a number strictly between 0 and 1.

    >>> check_level(99.0)
    Traceback (most recent call last):
      ...
    ValueError: level must lie strictly between 0 and 1 (0.99 for 99%), got 99.0
    """
    _check_number("level", level)
    if not 0 < level < 1:
        raise ValueError(f"level must lie strictly between 0 and 1 (0.99 for 99%), got {level}")


def check_margin(margin: float) -> None:
    """Check the margin within which alpha counts as equal to 1.

    Raises:
      ValueError: it is not a number between 0 and 10.

    >>> check_margin(0.1)
    """
    _check_number("margin", margin)
    if not 0 < margin < 10:
        raise ValueError(f"margin must lie between 0 and 10 (0.1 for alpha within 0.91 to 1.1), got {margin}")


def check_threshold(threshold: float | None) -> None:
    """Check the probability from which one sigmoid output means class 1; None means that there is none.

    Raises:
      ValueError: it is not a number strictly between 0 and 1.

    >>> check_threshold(50)
    Traceback (most recent call last):
      ...
    ValueError: threshold must lie between 0 and 1, got 50
    """
    if threshold is not None:
        _check_number("threshold", threshold)
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {threshold}")


def check_top_k(top_k: int | None) -> None:
    """Check the k of the top-k recall; None means the default.

    Raises:
      ValueError: it is not a whole number of at least 1.

    >>> check_top_k(None)
    """
    if top_k is not None:
        _check_number("top_k", top_k, whole=True)
        if top_k < 1:
            raise ValueError(f"top_k must be at least 1, got {top_k}")


def check_resamples(resamples: int) -> None:
    """Check how often to resample.

    Raises:
      ValueError: it is not a whole number of at least 2.

    >>> check_resamples(1)
    Traceback (most recent call last):
      ...
    ValueError: resamples must be at least 2, got 1
    """
    _check_number("resamples", resamples, whole=True)
    if resamples < 2:
        raise ValueError(f"resamples must be at least 2, got {resamples}")


def _check_number(name: str, value: object, *, whole: bool = False) -> None:
    """Check that a setting is a number, or a whole number, of Python, numpy or jax.

    >>> _check_number("level", "0.99")
    Traceback (most recent call last):
      ...
    ValueError: level must be a number, got '0.99'
    """
    if np.ndim(value) > 0 or np.asarray(value).dtype.kind not in ("iu" if whole else "iuf"):  # type: ignore[arg-type]
        raise ValueError(f"{name} must be a {'whole ' * whole}number, got {value!r}")


def _is_small_float(dtype: np.dtype) -> bool:
    """Whether a dtype is a float that numpy itself does not know, as bfloat16."""
    return dtype.kind == "V" and dtype.names is None and dtype.name.startswith(("bfloat", "float"))


def _epsilon(value: Numbers) -> float:
    """The spacing of floats at 1 in the dtype of an argument; that of float64 for lists and integers."""
    dtype = np.asarray(value).dtype
    if np.issubdtype(dtype, np.floating):
        return float(np.finfo(dtype).eps)
    return 2.0**-7 if _is_small_float(dtype) else float(np.finfo(np.float64).eps)
