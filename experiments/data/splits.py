"""Choose examples: stratified splits, class subsets and long tails. Every function returns indices."""

import numpy as np


def stratified(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Split examples in two at random, class by class.

    Args:
      labels: (examples,) int.
      fraction: the fraction of every class in the second split; the count is rounded half to even.
      rng: generator that draws these examples.

    Returns:
      Two sorted, disjoint arrays of indices; together they have every example.

    Raises:
      ValueError: ``fraction`` is not between 0 and 1.

    >>> first, second = stratified(np.array([0, 0, 0, 0, 1, 1]), 0.5, np.random.default_rng(0))
    >>> len(first), len(second)
    (3, 3)
    """
    if not 0 < fraction < 1:
        raise ValueError(f"fraction={fraction} must lie between 0 and 1")
    second = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = np.flatnonzero(labels == label)
        second[rng.permutation(members)[: round(fraction * len(members))]] = True
    return np.flatnonzero(~second), np.flatnonzero(second)


def long_tailed(labels: np.ndarray, num_classes: int, imbalance: float, rng: np.random.Generator) -> np.ndarray:
    """Subsample the classes so that their sizes decrease exponentially from class 0 to the last.

    Class c keeps floor(n imbalance^(-c / (C - 1))) examples (Cui et al. 2019, "Class-balanced loss"), at least one. n
    is the largest size of class 0 for which every class has enough examples.

    Args:
      labels: (examples,) int in 0..C-1.
      num_classes: C.
      imbalance: size of the first class / size of the last.
      rng: generator that draws the examples to keep.

    Returns:
      Sorted indices of the examples to keep.

    Raises:
      ValueError: ``imbalance`` is below 1, or there are fewer than two classes.

    >>> kept = long_tailed(np.repeat(np.arange(3), 100), 3, 100.0, np.random.default_rng(0))
    >>> len(kept)
    111
    """
    if not imbalance >= 1:
        raise ValueError(f"imbalance={imbalance} must be at least 1")
    if num_classes < 2:
        raise ValueError(f"num_classes={num_classes} must be at least 2")
    profile = imbalance ** (-np.arange(num_classes) / (num_classes - 1))
    have = np.bincount(labels, minlength=num_classes)
    # The tolerance keeps 100 * 0.01 from becoming 0 examples.
    sizes = np.floor((have / profile).min() * profile + 1e-6).astype(int).clip(1)
    kept = [rng.permutation(np.flatnonzero(labels == c))[:size] for c, size in enumerate(sizes)]
    return np.sort(np.concatenate(kept))


def of_classes(labels: np.ndarray, classes: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices of the examples of some classes, and their labels, renumbered in the order given.

    >>> of_classes(np.array([0, 1, 2, 1]), (2, 1))
    (array([1, 2, 3]), array([1, 0, 1], dtype=int32))
    """
    number = np.full(max(labels.max(initial=0), *classes) + 1, -1, np.int32)
    number[list(classes)] = np.arange(len(classes))
    indices = np.flatnonzero(number[labels] >= 0)
    return indices, number[labels[indices]]
