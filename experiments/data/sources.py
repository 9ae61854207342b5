"""Where examples come from: scikit-learn, a table of moons, TensorFlow Datasets, a folder of images."""

import contextlib
import functools
import hashlib
import importlib.util
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console

from experiments.cli.progress import progress
from experiments.data.cache import Rows

Arrays = Mapping[str, np.ndarray]
Size = tuple[int, int]
Encoded = tuple[str, bytes, int]  # what an image is called, its file, its label

BUNDLED = ("digits", "iris", "wine", "breast_cancer")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_BLOCK = 256


class Missing(FileNotFoundError):
    """Data that is not on this machine; the message says how to get it."""


class Decoding(NamedTuple):
    """Images that have to be decoded, and what decides the outcome.

    Attributes:
      identity: JSON that changes where the arrays would.
      class_names: in the order of the labels.
      make: makes the arrays ``train_images``, ``train_labels`` and, where there is a test set,
        ``test_images`` and ``test_labels``.
    """

    identity: dict[str, Any]
    class_names: tuple[str, ...]
    make: Callable[[], dict[str, Rows]]


def bundled(name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images or features, labels and class names of a data set that comes with scikit-learn.

    Digits are uint8 (1797, 8, 8, 1), pixels 0 to 16; the tables are float32 (examples, features).
    """
    try:
        import sklearn.datasets  # noqa: PLC0415 an extra
    except ImportError as error:
        raise ImportError(f"{name} comes with scikit-learn: pip install 'jprune[experiments]'") from error
    bunch = getattr(sklearn.datasets, f"load_{name}")()
    features = bunch.images.astype(np.uint8)[..., None] if name == "digits" else bunch.data.astype(np.float32)
    return features, bunch.target.astype(np.int32), tuple(map(str, bunch.target_names))


def moons() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The 100 points of the jumpstart study, by split: 85 to train on, 15 to validate.

    ``moons.csv`` holds what the authors' notebooks split: ``make_moons(100, noise=None)`` of
    scikit-learn, divided by its range, to the last bit of float32.
    """
    path = Path(__file__).with_name("moons.csv")
    table = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8")
    points = np.stack([table["x0"], table["x1"]], -1).astype(np.float32)
    labels = table["label"].astype(np.int32)
    return {
        split: (points[table["split"] == split], labels[table["split"] == split]) for split in ("train", "validation")
    }


# TensorFlow Datasets --------------------------------------------------------------------------------


def tfds(name: str, data_dir: Path | None, size: Size | None) -> Decoding:
    """An image classification data set that TFDS has prepared as ArrayRecord; TensorFlow is not needed.

    Args:
      name: as TFDS knows it, such as ``cifar10`` or ``oxford_flowers102``.
      data_dir: TFDS folder; None for TFDS's own.
      size: (height, width) to resize images to; None where they are of one size already.

    Raises:
      Missing: it has not been prepared there.
      ValueError: TFDS does not know it, or it is no image classification with a split ``train``, or its
        images differ in size and ``size`` is None.
    """
    builder = _builder(name, data_dir)
    where = "" if data_dir is None else f" --data-dir {data_dir}"
    if not builder.info.splits:
        raise Missing(
            f"{name} is not in {builder.data_dir}; python -m experiments.data prepare {name}{where} puts it there, or "
            "give another --data-dir"
        )
    if builder.info.file_format.value != "array_record":
        raise Missing(
            f"{builder.data_dir} holds {name} as {builder.info.file_format.value}, which TensorFlow alone reads; "
            f"python -m experiments.data prepare {name} --data-dir FOLDER writes it as array_record to another folder"
        )
    if "train" not in builder.info.splits:
        raise ValueError(f"{name} has no split 'train' to learn from; it has {', '.join(builder.info.splits)}")
    features, keys = builder.info.features, builder.info.supervised_keys
    kinds = [type(features[key]).__name__ for key in keys] if keys and len(keys) == 2 else []
    if kinds != ["Image", "ClassLabel"] or features[keys[0]].np_dtype != np.uint8:
        raise ValueError(f"{name} is no classification of 8-bit images; TFDS says its examples are {features}")
    shape = (*(size or features[keys[0]].shape[:2]), features[keys[0]].shape[2])
    if None in shape:
        raise ValueError(f"the images of {name} have shape {shape}, not one size; give image_size")
    splits = {"train": "train", "test": next((s for s in ("test", "validation") if s in builder.info.splits), None)}
    infos = {ours: builder.info.splits[theirs] for ours, theirs in splits.items() if theirs}
    identity = {
        "source": "tfds",
        "name": builder.info.full_name,
        "shape": shape,
        "splits": {ours: [info.name, info.num_examples, info.num_bytes] for ours, info in infos.items()},
    }

    def make() -> dict[str, Rows]:
        rows = {}
        for ours, info in infos.items():
            with _quiet():
                source = builder.as_data_source(info.name, decoders={keys[0]: _undecoded()})
            rows |= _rows(ours, info.num_examples, shape, functools.partial(_records, source, keys))
        return rows

    return Decoding(identity, tuple(features[keys[1]].names), make)


def prepare(name: str, data_dir: Path | None) -> Path:
    """Have TFDS download a data set and write it as ArrayRecord; needs TensorFlow, once.

    Returns:
      The folder it lies in.

    Raises:
      ImportError: TensorFlow is not installed.
      ValueError: TFDS does not know the name.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError("TFDS prepares data with TensorFlow (reading needs none): pip install 'jprune[prepare]'")
    builder = _builder(name, data_dir)
    builder.download_and_prepare(file_format="array_record")
    return Path(builder.data_dir)


def _builder(name: str, data_dir: Path | None) -> Any:
    with _quiet():
        try:
            import tensorflow_datasets  # noqa: PLC0415 an extra, and slow to import
        except ImportError as error:
            raise ImportError(f"{name} is read with tensorflow-datasets: pip install 'jprune[experiments]'") from error
        try:
            return tensorflow_datasets.builder(name, data_dir=data_dir)
        except tensorflow_datasets.core.registered.DatasetNotFoundError as error:
            raise ValueError(f"{name!r} is no data set of TFDS {tensorflow_datasets.__version__}") from error


def _undecoded() -> Any:
    import tensorflow_datasets  # noqa: PLC0415

    return tensorflow_datasets.decode.SkipDecoding()


def _records(source: Sequence[Any], keys: tuple[str, str]) -> Iterator[Encoded]:
    for start in range(0, len(source), _BLOCK):
        for i, example in enumerate(source.__getitems__(list(range(start, min(start + _BLOCK, len(source))))), start):
            yield f"example {i}", example[keys[0]], int(example[keys[1]])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep TFDS from logging, and what it imports from warning, about what is no concern here."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# A folder of images ---------------------------------------------------------------------------------


def folder(path: Path, size: Size | None) -> Decoding:
    """Images in ``path/train/CLASS/`` and ``path/test/CLASS/``; the test folder may be absent.

    Classes are numbered in the order of their names. Images are read as grey where every one is grey,
    else as colour.

    Args:
      path: the folder.
      size: (height, width) to resize images to; None where they are of one size already.

    Raises:
      Missing: there is no ``train`` folder.
      ValueError: fewer than two classes, a class without images, a class of the test folder that the
        training folder lacks, an image of more than 8 bits, or images that differ in size where
        ``size`` is None.
    """
    if not (path / "train").is_dir():
        raise Missing(f"folder:{path} has no folder train/ with a subfolder for each class")
    splits = [split for split in ("train", "test") if (path / split).is_dir()]
    names = tuple(sorted(entry.name for entry in (path / "train").iterdir() if entry.is_dir()))
    if len(names) < 2:
        raise ValueError(
            f"{path / 'train'} has {len(names)} subfolders; there must be one for each of two or more classes"
        )
    found = {split: _listing(path / split, names) for split in splits}
    shape = _one_shape([file for listed in found.values() for file, _ in listed], size)
    listing = [
        [str(file.relative_to(path)), file.stat().st_size, file.stat().st_mtime_ns]
        for listed in found.values()
        for file, _ in listed
    ]
    digest = hashlib.sha256(repr(listing).encode()).hexdigest()
    identity = {"source": "folder", "path": str(path.absolute()), "shape": shape, "listing": digest}

    def make() -> dict[str, Rows]:
        rows = {}
        for split, listed in found.items():
            read = lambda listed=listed: ((str(file), file.read_bytes(), label) for file, label in listed)
            rows |= _rows(split, len(listed), shape, read)
        return rows

    return Decoding(identity, names, make)


def _listing(path: Path, names: tuple[str, ...]) -> list[tuple[Path, int]]:
    """Every image of a split with its label, the classes mixed evenly: the first examples are of all of them."""
    surplus = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name not in names)
    if surplus:
        raise ValueError(
            f"{path} has a class {surplus[0]!r} that the training folder lacks; that has {', '.join(names)}"
        )
    listed = []
    for label, name in enumerate(names):
        images = sorted(file for file in (path / name).glob("*") if file.suffix.lower() in _IMAGES)
        if not images and path.name == "train":
            raise ValueError(f"{path / name} has no images; they end in {', '.join(_IMAGES)}")
        listed += [((i + 0.5) / len(images), file, label) for i, file in enumerate(images)]
    return [(file, label) for _, file, label in sorted(listed, key=lambda one: one[0])]


def _one_shape(images: list[Path], size: Size | None) -> tuple[int, int, int]:
    """(height, width, channels) of all images, from their headers alone."""
    from PIL import Image  # noqa: PLC0415 an extra

    channels, first = 1, None
    for file in images:
        with Image.open(file) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"{file} has more than 8 bits a channel (mode {image.mode}); convert it first")
            channels = channels if image.mode in ("1", "L") else 3
            found = size or (image.height, image.width)
        first = first or found
        if found != first:
            raise ValueError(
                f"{file} is {found[0]} x {found[1]} pixels and {images[0]} is {first[0]} x {first[1]}; give "
                "image_size, a height and a width, to resize them"
            )
    return (*first, channels)


# Decoding -------------------------------------------------------------------------------------------


def _rows(
    split: str, count: int, shape: tuple[int, int, int], read: Callable[[], Iterator[Encoded]]
) -> dict[str, Rows]:
    """The images of a split, decoded as they are written, and then its labels, gathered on the way."""
    labels = np.zeros(count, np.int32)

    def blocks() -> Iterator[np.ndarray]:
        block = []
        with progress(count, "images", console=Console(stderr=True)) as shown:
            shown.stage(f"Decoding {split} images, once")
            for i, (name, encoded, label) in enumerate(read()):
                labels[i] = label
                try:
                    block.append(_decode(encoded, shape))
                except (OSError, SyntaxError) as error:  # PIL's, and not of the file that is being written
                    raise ValueError(f"{name} of the {split} split cannot be decoded: {error}") from error
                if len(block) == _BLOCK or i + 1 == count:
                    yield np.stack(block)
                    shown.advance(len(block))
                    block = []
        if labels.min(initial=0) < 0:
            raise ValueError(f"the {split} split has examples without a label")

    return {
        f"{split}_images": Rows((count, *shape), np.dtype(np.uint8), blocks()),
        f"{split}_labels": Rows((count,), np.dtype(np.int32), iter([labels])),
    }


def _decode(encoded: bytes, shape: tuple[int, int, int]) -> np.ndarray:
    """An image as uint8 of this shape, always by PIL: other decoders differ in the last bit of JPEG."""
    from PIL import Image  # noqa: PLC0415 an extra

    with Image.open(io.BytesIO(encoded)) as image:
        decoded = image.convert("L" if shape[2] == 1 else "RGB")
        if (decoded.height, decoded.width) != shape[:2]:
            decoded = decoded.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
        return np.asarray(decoded).reshape(shape)
