"""The examples that pruning changes: those on which pruned models and dense models disagree.

Both measures compare K dense with K' pruned models on the same examples, without looking at the
true label; no pairing of models is needed, and K' need not be K.
"""

import itertools
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Float, Int

from jprune.recall.inputs.arguments import Numbers


class Exemplars(NamedTuple):
    """Where the modal label of pruned models differs from that of dense ones; every field is (examples,).

    Attributes:
      exemplar: whether the example is a PIE.
      dense_label: the class most dense models predict, the smallest among equals.
      pruned_label: the class most pruned models predict, the smallest among equals.
    """

    exemplar: Bool[np.ndarray, " examples"]
    dense_label: Int[np.ndarray, " examples"]
    pruned_label: Int[np.ndarray, " examples"]


def modal_label(predictions: Numbers) -> Int[np.ndarray, " examples"]:
    """The class that most models predict for each example, the smallest among equals.

    Args:
      predictions: predicted classes, integers, (models, examples).

    Raises:
      ValueError: ``predictions`` is not a stack of at least one model's integers.

    >>> modal_label([[0, 2, 1], [1, 2, 1], [1, 0, 2]])
    array([1, 2, 1])
    """
    stack = _stack("predictions", predictions)
    # As narrow as the classes allow: sorting and comparing are bound by the bytes they move.
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
    """Pruning-identified exemplars: examples whose modal label changes with pruning.

    From Hooker et al., "What Do Compressed Deep Neural Networks Forget?" (arXiv 1911.05248), where
    they are PIEs; the modal CIEs of Hooker et al., "Characterising Bias in Compressed Models" (arXiv
    2010.03058), are the same.

    Args:
      dense_predictions: predicted classes, integers, (dense models, examples).
      pruned_predictions: integers, (pruned models, examples).

    Raises:
      ValueError: not stacks of integers, or the examples differ in number.

    >>> exemplars([[0, 1], [0, 1], [1, 1]], [[1, 1], [1, 1], [0, 0]]).exemplar
    array([ True, False])
    """
    dense, pruned = _stacks(dense_predictions, pruned_predictions)
    labels = modal_label(dense), modal_label(pruned)
    return Exemplars(labels[0] != labels[1], *labels)


def taxicab_distance(dense_predictions: Numbers, pruned_predictions: Numbers) -> Float[np.ndarray, " examples"]:
    """How far apart the predictions of dense and pruned models lie for each example: sum_c |p_dense(c) - p_pruned(c)|.

    p(c) is the fraction of the models that predict class c; 0 is the same distribution, 2 no class
    in common. Ranks examples where ``exemplars`` only tells them apart: the taxicab CIE of Hooker et
    al., "Characterising Bias in Compressed Models" (arXiv 2010.03058), as fractions of the models so
    that the populations may differ in size. Arguments and errors as ``exemplars``.

    >>> taxicab_distance([[0, 1], [0, 1]], [[0, 2], [1, 2]])
    array([1., 2.])
    """
    dense, pruned = _stacks(dense_predictions, pruned_predictions)
    both = np.concatenate([dense, pruned])
    order = np.argsort(both, axis=0, kind="stable")
    rows = np.take_along_axis(both, order, axis=0)
    # In whole numbers, K' per dense and -K per pruned model, so that equal distributions are exactly 0 apart.
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
