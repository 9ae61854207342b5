"""Data sets as arrays, with a training, a validation and a test split.

Images are kept as stored (uint8 pixels); ``experiments.data.augment.normalise`` standardizes them inside jit, with the
``mean`` and ``std`` of the data set, in the same units.

    python -m experiments.data prepare cifar100 --data-dir ~/tensorflow_datasets
"""

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import ArrayLike

from experiments.data import cache, image_sets, splits, tables

Selection = Literal["validation", "test"]

# Mean and standard deviation of a channel on a scale of 0 to 1, from the code of the 2022 study.
_MOMENTS = {
    "mnist": ((0.1307,), (0.3081,)),
    "fashion_mnist": ((0.5,), (0.5,)),
    "cifar10": ((0.491, 0.482, 0.447), (0.247, 0.243, 0.262)),
    "cifar100": ((0.507, 0.487, 0.441), (0.267, 0.256, 0.276)),
}
# The fraction of every class that is held out if a data set has no test set.
_TEST_FRACTION = 0.25


class Split(NamedTuple):
    """Examples of one split.

    Attributes:
      images: (examples, height, width, channels) uint8 or float32, or (examples, features) float32.
      labels: (examples,) int32 in 0..num_classes-1.
    """

    images: np.ndarray
    labels: np.ndarray

    def take(self, indices: np.ndarray) -> "Split":
        """Copy the examples at these indices, in that order."""
        return Split(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A data set: three splits, the names of its classes, and the moments that normalize its images.

    Attributes:
      name: as given to ``load``.
      train: examples to train on.
      validation: examples on which an epoch or a hyperparameter is chosen.
      test: examples on which results are reported.
      class_names: one for each class.
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
        """Number of classes."""
        return len(self.class_names)

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one example."""
        return self.train.images.shape[1:]


def load(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    selection: Selection = "validation",
    validation_fraction: float = 0.1,
    imbalance: float | None = None,
    classes: Sequence[int | str] | None = None,
    image_size: tuple[int, int] | None = None,
) -> Dataset:
    """Load a data set.

    | name | data |
    |---|---|
    | ``digits``, ``iris``, ``wine``, ``breast_cancer`` | part of scikit-learn |
    | ``moons`` | part of this package: 85 points to train on; the other 15 validate and test |
    | ``mnist``, ``fashion_mnist``, ``cifar10``, ``cifar100``, ``tfds:NAME`` | prepared by TensorFlow Datasets |
    | ``npz:FILE`` | arrays ``x_train``, ``y_train`` and, if there is a test set, ``x_test``, ``y_test`` |
    | ``table:FILE`` | a CSV or parquet file; the class is in ``label``, ``class``, ``target`` or the last column |
    | ``folder:PATH`` | images ``train/CLASS/IMAGE`` and, if there is a test set, ``test/CLASS/IMAGE`` |

    Images of ``tfds:`` and ``folder:`` are decoded once, into memory-mapped arrays. A data set without a
    test set holds out a quarter of every class, drawn with ``seed``.

    Args:
      name: a name from the table.
      data_dir: TFDS folder; by default that of TFDS.
      cache_dir: folder for decoded images; by default ``jprune`` in the user's cache folder.
      seed: seed of every random choice of examples.
      selection: ``validation`` holds out a fraction of every class of the training set; ``test`` trains on all of it
        and uses the test set for validation too, as the authors of the 2022 study did.
      validation_fraction: the fraction held out.
      imbalance: examples of the first class / examples of the last in the training set, which is subsampled
        exponentially (``splits.long_tailed``); validation and test sets do not change.
      classes: numbers or names of the classes to keep, in the order of their new labels.
      image_size: (height, width) to which images are resized; needed if their sizes differ.

    Returns:
      The data set; arrays that were not subsampled are read-only and memory-mapped.

    Raises:
      tables.Missing: the data is not on this machine; the message says how to get it.
      files.StoreError: the cache cannot be written.
      ImportError: an extra is missing; the message names it.
      ValueError: the name is unknown, a file has unusable content, or an argument does not apply, such as an
        imbalance for which a class has too few examples.

    >>> digits = load("digits")
    >>> [len(split.labels) for split in (digits.train, digits.validation, digits.test)]
    [1211, 136, 450]
    """
    if selection not in ("validation", "test"):
        raise ValueError(f"selection={selection!r} must be 'validation' or 'test'")
    train, test, class_names = _everything(name, data_dir, cache_dir, image_size)
    return _assembled(
        name,
        train,
        test,
        class_names,
        classes=classes,
        seed=seed,
        selection=selection,
        validation_fraction=validation_fraction,
        imbalance=imbalance,
    )


def of_arrays(
    arrays: Mapping[str, ArrayLike],
    name: str = "arrays",
    *,
    class_names: Sequence[str] | None = None,
    seed: int = 0,
    selection: Selection = "validation",
    validation_fraction: float = 0.1,
    imbalance: float | None = None,
    classes: Sequence[int | str] | None = None,
) -> Dataset:
    """Create a data set from arrays.

    Args:
      arrays: ``x_train`` and ``y_train`` and, if there is a test set, ``x_test`` and ``y_test``. Inputs are
        (examples, features), (examples, height, width) or (examples, height, width, channels); labels are
        (examples,) integers from 0.
      name: name of the data set; part of the hash of its stages.
      class_names: one for each class; by default their numbers.
      seed: seed of the choice of held-out examples.
      selection: as in ``load``.
      validation_fraction: the fraction of every class held out for validation.
      imbalance: as in ``load``.
      classes: as in ``load``.

    Raises:
      ValueError: an array is missing or unusable; the message names it.

    >>> x, y = np.ones((40, 3), np.float32), np.arange(40) % 2
    >>> data = of_arrays({"x_train": x, "y_train": y})
    >>> [len(split.labels) for split in (data.train, data.validation, data.test)]
    [26, 4, 10]
    """
    train, test, names = tables.checked(name, arrays, class_names)
    whole = None if test is None else Split(*test)
    return _assembled(
        name,
        Split(*train),
        whole,
        names,
        classes=classes,
        seed=seed,
        selection=selection,
        validation_fraction=validation_fraction,
        imbalance=imbalance,
    )


def fingerprint(dataset: Dataset) -> str:
    """Return a checksum of all examples and of the normalization, without class names: 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for array in (*dataset.train, *dataset.validation, *dataset.test, dataset.mean, dataset.std):
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()[:16]


def _assembled(
    name: str,
    train: Split,
    test: Split | None,
    class_names: tuple[str, ...],
    *,
    classes: Sequence[int | str] | None,
    seed: int,
    selection: Selection,
    validation_fraction: float,
    imbalance: float | None,
) -> Dataset:
    """Choose the classes, split off the missing sets, subsample the training set, and compute its moments."""
    if classes is not None:
        numbers = _numbers(classes, class_names)
        class_names = tuple(class_names[c] for c in numbers)
        train, test = _only(train, numbers), test and _only(test, numbers)
    if test is None:
        train, test = _hold_out(train, _TEST_FRACTION, np.random.default_rng((seed, 0)))
    validation = test
    if selection == "validation" and name != "moons":
        train, validation = _hold_out(train, validation_fraction, np.random.default_rng((seed, 1)))
    if imbalance is not None:
        rng = np.random.default_rng((seed, 2))
        train = train.take(splits.long_tailed(train.labels, len(class_names), imbalance, rng))
        largest = int((train.labels == 0).sum())
        if largest + 1 <= imbalance:  # the last class would keep less than one example
            raise ValueError(
                f"imbalance={imbalance} is more than the {largest} training examples that class {class_names[0]!r} can "
                f"keep, so class {class_names[-1]!r} would have none; use a smaller one"
            )
    return Dataset(name, train, validation, test, class_names, *_moments(name, train.images))


def _everything(
    name: str,
    data_dir: str | os.PathLike[str] | None,
    cache_dir: str | os.PathLike[str] | None,
    image_size: tuple[int, int] | None,
) -> tuple[Split, Split | None, tuple[str, ...]]:
    """Return training examples, test examples or None, and the names of the classes."""
    kind, _, rest = name.partition(":")
    if name in tables.BUNDLED or name == "moons":
        if image_size is not None:
            raise ValueError(f"image_size={image_size} does not apply to {name}, whose examples have one size")
        if name == "moons":
            points = tables.moons()
            return Split(*points["train"]), Split(*points["validation"]), ("0", "1")
        *arrays, class_names = tables.bundled(name)
        return Split(*arrays), None, class_names
    if kind in ("npz", "table") and rest:
        if image_size is not None:
            raise ValueError(f"image_size={image_size} does not apply to {name}; resize the arrays yourself")
        read = tables.npz if kind == "npz" else tables.table
        train, test, class_names = read(Path(rest).expanduser())
        return Split(*train), None if test is None else Split(*test), class_names
    if kind == "folder" and rest:
        decoding = image_sets.folder(Path(rest).expanduser(), image_size)
    elif name in _MOMENTS or (kind == "tfds" and rest):
        decoding = image_sets.tfds(rest or name, None if data_dir is None else Path(data_dir).expanduser(), image_size)
    else:
        known = ", ".join([*tables.BUNDLED, "moons", *_MOMENTS])
        raise ValueError(
            f"dataset={name!r} is not a data set; there are {known}, npz:FILE, table:FILE, folder:PATH and tfds:NAME"
        )
    arrays = cache.cached(_cache_folder(cache_dir), name, decoding.identity, decoding.make)
    train, test = (
        Split(arrays[f"{split}_images"], arrays[f"{split}_labels"]) if f"{split}_images" in arrays else None
        for split in ("train", "test")
    )
    return train, test, decoding.class_names


def _cache_folder(given: str | os.PathLike[str] | None) -> Path:
    if given is not None:
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "jprune"


def _numbers(classes: Sequence[int | str], class_names: tuple[str, ...]) -> tuple[int, ...]:
    """Convert class names to integer indices."""
    numbers = []
    for c in classes:
        number = class_names.index(c) if c in class_names else c
        if not isinstance(number, int) or not 0 <= number < len(class_names):
            known = (
                f"there are {', '.join(class_names)}"
                if isinstance(c, str)
                else f"there are 0 to {len(class_names) - 1}"
            )
            raise ValueError(f"classes={classes!r}: {c!r} is not a class; {known}")
        numbers.append(number)
    if len(set(numbers)) < max(len(numbers), 2):
        raise ValueError(f"classes={classes!r} must be two or more classes, each given once")
    return tuple(numbers)


def _only(split: Split, classes: tuple[int, ...]) -> Split:
    indices, labels = splits.of_classes(split.labels, classes)
    return Split(split.images[indices], labels)


def _hold_out(split: Split, fraction: float, rng: np.random.Generator) -> tuple[Split, Split]:
    kept, out = splits.stratified(split.labels, fraction, rng)
    if len(out) == 0 or len(kept) == 0:
        raise ValueError(
            f"holding out {fraction} of {len(split.labels)} examples, class by class, leaves a split empty; more "
            "examples are needed"
        )
    return split.take(kept), split.take(out)


def _moments(name: str, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and standard deviation of each channel: published constants, or those of the training set."""
    if name == "moons":  # divided by their range already
        return np.zeros(2, np.float32), np.ones(2, np.float32)
    if name in _MOMENTS:
        mean, std = (np.float32(255) * np.array(moment, np.float32) for moment in _MOMENTS[name])
        return mean, std
    count, total, squares, varies = images.size // images.shape[-1], 0.0, 0.0, False
    first = images.reshape(-1, images.shape[-1])[0].astype(np.float64)
    for start in range(0, len(images), 1024):  # float64 of everything at once would take 8 times the memory
        block = images[start : start + 1024].reshape(-1, images.shape[-1]).astype(np.float64)
        total, squares = total + block.sum(0), squares + (block**2).sum(0)
        varies |= (block != first).any(0)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return mean.astype(np.float32), np.where(varies & (std > 0), std, 1).astype(np.float32)  # rounding alone is no std
