"""Data sets as arrays: a split each for training, validation and test.

Images stay in the units they are stored in (uint8 pixels, mostly); ``normalise`` brings them to zero
mean and unit deviation inside jit, with the ``mean`` and ``std`` that the data set carries in those
same units.
"""

import dataclasses
from typing import Literal, NamedTuple

import numpy as np

Selection = Literal["validation", "test"]


class Split(NamedTuple):
    """Examples of one split.

    Attributes:
      images: (examples, height, width, channels) uint8 or float32, or (examples, features) float32.
      labels: (examples,) int32 in 0..num_classes-1.
    """

    images: np.ndarray
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> "Split":
        """The examples at these indices, in that order."""
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set: three splits, the names of its classes, and what normalises its images.

    Attributes:
      name: as it was given to ``load``.
      train: what a model is trained on.
      validation: what an epoch or a hyperparameter is chosen on.
      test: what is reported.
      class_names: one per class.
      mean: (channels,) or (features,) float32, in the units of the images as stored.
      std: the same for the standard deviation; never 0.
    """

    name: str
    train: Split
    validation: Split
    test: Split
    class_names: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray

    @property
    def num_classes(self) -> int:
        """How many classes there are."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.train.images.shape[1:]


def load(name: str, *, seed: int = 0, selection: Selection = "validation") -> Dataset:
    """Load a data set by name.

    Args:
      name: ``digits``.
      seed: decides the split.
      selection: ``validation`` holds a validation set out of the training set; ``test`` trains on all
        of it and selects on the test set, as the authors of the 2022 study did.

    Raises:
      ValueError: an unknown name or selection.
    """
    if selection not in ("validation", "test"):
        raise ValueError(f"selection={selection!r} must be 'validation' or 'test'")
    if name != "digits":
        raise ValueError(f"name={name!r} is unknown; known: digits")
    import sklearn.datasets  # noqa: PLC0415 an extra

    bunch = sklearn.datasets.load_digits()
    everything = Split(bunch.images.astype(np.uint8)[..., None], bunch.target.astype(np.int32))
    rest, test = _stratified(everything.labels, 0.25, np.random.default_rng((seed, 0)))
    train, validation = rest, test
    if selection == "validation":
        a, b = _stratified(everything.labels[rest], 0.15, np.random.default_rng((seed, 1)))
        train, validation = rest[a], rest[b]
    split = everything.take(train)
    return Dataset(
        name,
        split,
        everything.take(validation),
        everything.take(test),
        tuple(str(c) for c in bunch.target_names),
        split.images.mean((0, 1, 2), dtype=np.float64).astype(np.float32),
        split.images.std((0, 1, 2), dtype=np.float64).astype(np.float32),
    )


def _stratified(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Split indices in two, the second with this fraction of every class, rounded half to even."""
    held = np.zeros(len(labels), bool)
    for c in np.unique(labels):
        members = np.flatnonzero(labels == c)
        held[rng.permutation(members)[: round(fraction * len(members))]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)
