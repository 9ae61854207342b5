"""Prune trained networks once by magnitude, without fine-tuning, and measure the training accuracy at each ratio.

This answers question J5 of docs/reproduction.md. The ratio t is the number of prunable weights over the number kept.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
from jaxtyping import ArrayLike, PyTree

import jprune
from experiments.storage.files import JSON

TRAINED = 0.9  # the training accuracy that counts as trained
_NAMES = ("dataset", "method", "layer", "lr", "width", "depth", "epochs", "replicate")


def rows(
    cell: Mapping[str, JSON], kernels: PyTree, ratios: Sequence[float], accuracy: Callable[[PyTree], float]
) -> list[dict[str, JSON]]:
    """Prune one trained network at every ratio, and measure its training accuracy.

    Args:
      cell: the row of the network in the table ``cells``; its columns are copied.
      kernels: the prunable weights, None in place of other leaves.
      ratios: prunable weights over weights kept; 1, the network before pruning, is added.
      accuracy: function that returns the training accuracy of the network with masks, a tree like ``kernels``.

    Returns:
      A row for each ratio, with ``prunable``, ``kept`` and ``train_acc``.

    >>> rows({"method": "UP"}, {"kernel": jax.numpy.array([3.0, 1.0, -2.0])}, [1.5], lambda masks: 1.0)[1]
    {'method': 'UP', 'ratio': 1.5, 'prunable': 3, 'kept': 2, 'train_acc': 1.0}
    """
    names = {name: cell[name] for name in _NAMES if name in cell}
    size = sum(leaf.size for leaf in jax.tree.leaves(kernels))
    found = []
    for ratio in (1.0, *ratios):
        keep = round(size / ratio)
        found.append(
            {**names, "ratio": ratio, "prunable": size, "kept": keep, "train_acc": accuracy(_masks(kernels, keep))}
        )
    return found


@jax.jit
def _masks(kernels: PyTree, keep: ArrayLike) -> PyTree:
    """Select masks under jit, where an empty layer, which is part of the result, causes no warning."""
    return jprune.global_masks(kernels, keep=keep, magnitude=True)
