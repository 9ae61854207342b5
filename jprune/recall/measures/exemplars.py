"""Find the examples that pruning changes: those on which pruned and dense models disagree.

Both measures compare K dense with K' pruned models on the same examples, without using the true label. Models need not
be paired, and K' may differ from K.
"""

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

from jprune.recall.inputs.arguments import Numbers


class Exemplars(NamedTuple):
    """Examples whose modal label differs between dense and pruned models; every field is (examples,).

    Attributes:
      exemplar: whether the example is a PIE.
      dense_label: the class that most dense models predict (ties: the smallest).
      pruned_label: the class that most pruned models predict (ties: the smallest).
    """

    exemplar: Bool[np.ndarray, " examples"]
    dense_label: Int[np.ndarray, " examples"]
    pruned_label: Int[np.ndarray, " examples"]


def modal_label(predictions: Numbers) -> Int[np.ndarray, " examples"]:
    """Return the class that most models predict for each example (ties: the smallest).

    Args:
      predictions: predicted classes, integers, (models, examples).

    Raises:
      ValueError: ``predictions`` is not a stack of at least one model's integers.

    >>> modal_label([[0, 2, 1], [1, 2, 1], [1, 0, 2]])
    array([1, 2, 1])
    """
    stack = _stack("predictions", predictions)
    # Use the narrowest dtype: sorting and comparing are limited by memory bandwidth.
    rows = np.sort(
        stack.astype(np.result_type(*map(np.min_scalar_type, (stack.min(initial=0), stack.max(initial=0))))), axis=0
    )
    run = np.ones(rows.shape[1], np.min_scalar_type(len(rows)))
    mode, longest = rows[0].copy(), run.copy()
    for before, row in itertools.pairwise(rows):
        run = run * (row == before) + 1
        np.copyto(mode, row, where=run > longest)
        longest = np.maximum(run, longest)
    return np.asarray(mode, np.int64)


def exemplars(dense_predictions: Numbers, pruned_predictions: Numbers) -> Exemplars:
    """Find pruning-identified exemplars (PIEs): examples whose modal label changes with pruning.

    From Hooker et al., "What Do Compressed Deep Neural Networks Forget?" (arXiv 1911.05248). The modal CIEs of Hooker
    et al., "Characterising Bias in Compressed Models" (arXiv 2010.03058), are the same.

    Args:
      dense_predictions: predicted classes, integers, (dense models, examples).
      pruned_predictions: integers, (pruned models, examples).

    Raises:
      ValueError: the arguments are not stacks of integers, or have different numbers of examples.

    >>> exemplars([[0, 1], [0, 1], [1, 1]], [[1, 1], [1, 1], [0, 0]]).exemplar
    array([ True, False])
    """
    dense, pruned = _stacks(dense_predictions, pruned_predictions)
    labels = modal_label(dense), modal_label(pruned)
    return Exemplars(labels[0] != labels[1], *labels)


def taxicab_distance(dense_predictions: Numbers, pruned_predictions: Numbers) -> Float[np.ndarray, " examples"]:
    """Return the distance sum_c |p_dense(c) - p_pruned(c)| between dense and pruned predictions of each example.

    p(c) is the fraction of the models that predict class c; the distance is 0 for equal distributions and 2 if no class
    is in common. It ranks examples, where ``exemplars`` only separates them. This is the taxicab CIE of Hooker et al.,
    "Characterising Bias in Compressed Models" (arXiv 2010.03058), with fractions of the models, so that the numbers of
    models may differ. Arguments and errors as ``exemplars``.

    >>> taxicab_distance([[0, 1], [0, 1]], [[0, 2], [1, 2]])
    array([1., 2.])
    """
    dense, pruned = _stacks(dense_predictions, pruned_predictions)
    both = np.concatenate([dense, pruned])
    order = np.argsort(both, axis=0, kind="stable")
    rows = np.take_along_axis(both, order, axis=0)
    # In integers, K' per dense and -K per pruned model, so that equal distributions have distance exactly 0.
    votes = np.where(order < len(dense), len(pruned), -len(dense))
    run, distance = votes[0], np.zeros(rows.shape[1], np.int64)
    for before, row, vote in zip(rows[:-1], rows[1:], votes[1:], strict=True):
        same = row == before
        distance = distance + np.where(same, 0, np.abs(run))
        run = np.where(same, run + vote, vote)
    return np.asarray((distance + np.abs(run)) / (len(dense) * len(pruned)))


def _stack(name: str, predictions: Numbers) -> npt.NDArray[np.int64]:
    rows = np.asarray(predictions)
    if rows.ndim != 2 or len(rows) == 0 or not np.issubdtype(rows.dtype, np.integer):
        raise ValueError(f"{name} must be integers of shape (models, examples), got {rows.dtype} {rows.shape}")
    return rows.astype(np.int64)


def _stacks(dense: Numbers, pruned: Numbers) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    first, second = _stack("dense_predictions", dense), _stack("pruned_predictions", pruned)
    if first.shape[1] != second.shape[1]:
        raise ValueError(
            f"dense_predictions have {first.shape[1]} examples, pruned_predictions {second.shape[1]}; "
            "they must be of the same examples"
        )
    return first, second
