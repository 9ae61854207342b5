"""Compute the rates of a stack of models, from predictions or from counts, for the audit's tables.

The rates of a class need only its two-by-two table against all other classes, so the audit does not need a confusion
matrix: memory and time grow with the number of classes, not with its square.
"""

import warnings
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jprune.recall.inputs.arguments import EmptyClassWarning, first_true
from jprune.recall.inputs.raw import InputError
from jprune.recall.inputs.raw import as_array as array
from jprune.recall.measures.counts import accuracy, f1, false_positive_rate, precision, recall


class Rates(NamedTuple):
    """Rates per class of M models over C classes, float64; NaN where undefined.

    Attributes:
      support: examples per class, int64 (C,).
      recall: (M, C); NaN for a class without examples.
      precision: (M, C); also NaN if only correct counts are known.
      f1: (M, C), likewise.
      false_positive: false positive rate (M, C), likewise.
      accuracy: (M,).
    """

    support: Int[np.ndarray, " classes"]
    recall: Float[np.ndarray, "models classes"]
    precision: Float[np.ndarray, "models classes"]
    f1: Float[np.ndarray, "models classes"]
    false_positive: Float[np.ndarray, "models classes"]
    accuracy: Float[np.ndarray, " models"]


def from_predictions(
    true: Int[np.ndarray, " examples"], predicted: Int[np.ndarray, "models examples"], classes: int
) -> Rates:
    """Compute rates from predictions, which must be in 0..classes-1.

    >>> from_predictions(np.array([0, 0, 1]), np.array([[0, 1, 1]]), 2).recall
    array([[0.5, 1. ]])
    """
    support = np.bincount(true, minlength=classes)
    # Sums of weights 0 and 1 are exact, and three times faster than indexing the hits.
    hits = np.stack([np.bincount(true, row == true, classes) for row in predicted]).astype(np.int64)
    times = np.stack([np.bincount(row, minlength=classes) for row in predicted])
    return _rates(support, hits, times)


def from_counts(given: object, examples: object, name: str) -> Rates:
    """Compute rates from confusion counts (models, classes, classes), or correct counts (models, classes) with support.

    Args:
      given: counts, whole numbers; a single model needs no models axis. The true class is on the
        rows of confusion counts.
      examples: examples per class, (classes,), for correct counts; otherwise None.
      name: the caller's name for the counts, for errors.

    Raises:
      InputError: the shape is wrong, a count is negative, there are more correct examples than examples, or models of
        one stack have different numbers of examples.

    >>> from_counts([9, 7], [10, 10], "dense").accuracy
    array([0.8])
    """
    cells = array(given, name)
    if cells.dtype.kind not in "iu":
        raise InputError(
            f"{name} must contain whole numbers, got dtype {cells.dtype}: convert counts with .astype(int)"
        )
    axes = 2 if examples is None else 1
    cells = (cells[None] if cells.ndim == axes else cells).astype(np.int64)
    if cells.ndim != axes + 1 or cells.size == 0 or (examples is None and cells.shape[1] != cells.shape[2]):
        form = "confusion counts (models, classes, classes)" if examples is None else "correct counts (models, classes)"
        raise InputError(f"{name} must contain {form}, got shape {cells.shape}")
    _refuse_first(cells < 0, cells, name, "a count is 0 or more")
    if examples is not None:
        support = _support(examples, cells.shape[1])
        _refuse_first(cells > support, cells, name, "the class has {} examples", support)
        return _rates(support, cells, None)
    rows = cells.sum(-1)
    _refuse_first(
        rows != rows[0], rows, f"{name}, summed over predictions,", "model 0 saw {} examples of the class", rows[0]
    )
    if not rows.any():
        raise InputError(f"{name} contains no example")
    return _rates(rows[0], np.diagonal(cells, axis1=1, axis2=2), cells.sum(-2))


def refuse_other_examples(
    name: str, support: Int[np.ndarray, " classes"], first_name: str, first: Int[np.ndarray, " others"]
) -> None:
    """Check that two sets of models have the same number of examples of each class.

    Raises:
      InputError: the numbers differ, so the models were not tested on the same examples.

    >>> refuse_other_examples("pruned[2]", np.array([10, 9]), "dense", np.array([10, 10]))
    Traceback (most recent call last):
      ...
    jprune.recall.inputs.raw.InputError: pruned[2] and dense are of different test sets: class 1 has 9 and 10 examples
    """
    if support.shape != first.shape:
        raise InputError(f"{name} and {first_name} are of different test sets: {support.size} and {first.size} classes")
    differs = support != first
    if differs.any():
        (c,) = first_true(differs)
        found = f"class {c} has {support[c]} and {first[c]} examples"
        raise InputError(f"{name} and {first_name} are of different test sets: {found}")


def _rates(
    support: Int[np.ndarray, " classes"],
    hits: Int[np.ndarray, "models classes"],
    times: Int[np.ndarray, "models classes"] | None,
) -> Rates:
    """Compute rates from the number of examples, hits and predictions of each class (None if unknown)."""
    examples = support.sum()
    missed, unknown = support - hits, np.full(hits.shape, np.nan)
    false = np.zeros_like(hits) if times is None else times - hits
    # The two axes of classes come first, so that sums over them run along models and classes.
    one_against_rest = np.moveaxis(np.array([[examples - support - false, false], [missed, hits]]), (0, 1), (-2, -1))
    right = hits.sum(-1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmptyClassWarning)  # the audit names these classes in one warning
        return Rates(
            support,
            recall(one_against_rest)[..., 1],
            unknown if times is None else precision(one_against_rest)[..., 1],
            unknown if times is None else f1(one_against_rest)[..., 1],
            unknown if times is None else false_positive_rate(one_against_rest)[..., 1],
            accuracy(np.stack([np.stack([right, examples - right], -1), np.zeros((len(hits), 2), np.int64)], axis=-2)),
        )


def _support(given: object, classes: int) -> Int[np.ndarray, " classes"]:
    examples = array(given, "support")
    if examples.shape != (classes,) or examples.dtype.kind not in "iu":
        raise InputError(
            f"support must contain {classes} whole numbers, one per class, got {examples.dtype} of shape "
            f"{examples.shape}"
        )
    _refuse_first(examples < 0, examples, "support", "a class has 0 examples or more")
    if not examples.any():
        raise InputError("support is 0 throughout: it contains no example")
    return examples.astype(np.int64)


def _refuse_first(bad: np.ndarray, cells: np.ndarray, name: str, why: str, *of_class: np.ndarray) -> None:
    """Raise for the first bad cell; ``why`` says what is allowed, formatted with a number of its class."""
    if bad.any():
        index = first_true(bad)
        raise InputError(
            f"{name} contains {cells[index]} at index {index}: {why.format(*(n[index[-1]] for n in of_class))}"
        )
