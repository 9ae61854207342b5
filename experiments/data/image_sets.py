"""Data sets of images, decoded once: TensorFlow Datasets and folders of files."""

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import io
import logging
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from experiments.cli.progress import progress, standard_output
from experiments.data.cache import Rows
from experiments.data.tables import Missing
from experiments.storage.files import JSON
from jprune._extras import missing

if TYPE_CHECKING:
    import tensorflow_datasets as tfds

Size = tuple[int, int]
Encoded = tuple[str, bytes, int]  # name of an image, content of its file, label

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_BLOCK = 256


class Examples(Protocol):
    """The examples of a data source of TFDS, read by index."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Mapping[str, bytes | int]]: ...


class Decoding(NamedTuple):
    """Images to decode, and the settings that decide the result.

    Attributes:
      identity: JSON that changes whenever the arrays would.
      class_names: in the order of the labels.
      make: makes the arrays ``train_images``, ``train_labels`` and, if there is a test set,
        ``test_images`` and ``test_labels``.
    """

    identity: dict[str, JSON]
    class_names: tuple[str, ...]
    make: Callable[[], dict[str, Rows]]


# TensorFlow Datasets --------------------------------------------------------------------------------


def tfds(name: str, data_dir: Path | None, size: Size | None) -> Decoding:
    """An image classification data set that TFDS has prepared as ArrayRecord; reading needs no TensorFlow.

    Args:
      name: as TFDS knows it, such as ``cifar10`` or ``oxford_flowers102``.
      data_dir: TFDS folder; None for that of TFDS.
      size: (height, width) to resize images to; None if all have the same size.

    Raises:
      Missing: it has not been prepared there.
      ValueError: TFDS does not know it, it is not an image classification with a split ``train``, or its
        images differ in size and ``size`` is None.
    """
    builder = _builder(name, data_dir)
    where = "" if data_dir is None else f" --data-dir {data_dir}"
    if not builder.info.splits:
        raise Missing(
            f"{name} is not in {builder.data_dir}; run python -m experiments.data prepare {name}{where} once to "
            "download it, or use another --data-dir"
        )
    if builder.info.file_format.value != "array_record":
        raise Missing(
            f"{builder.data_dir} has {name} as {builder.info.file_format.value}, which only TensorFlow reads; "
            f"python -m experiments.data prepare {name} --data-dir FOLDER writes it as array_record to another folder"
        )
    if "train" not in builder.info.splits:
        raise ValueError(f"{name} has no split 'train'; it has {', '.join(builder.info.splits)}")
    features, keys = builder.info.features, builder.info.supervised_keys
    kinds = [type(features[key]).__name__ for key in keys] if keys and len(keys) == 2 else []
    if kinds != ["Image", "ClassLabel"] or features[keys[0]].np_dtype != np.uint8:
        raise ValueError(f"{name} is not a classification of 8-bit images; its examples are {features}")
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


def stream(name: str, split: str, data_dir: Path | None) -> Examples:
    """A random-access source of examples with encoded images, for data sets too large for the memory.

    Args:
      name: as TFDS knows it, prepared as ArrayRecord.
      split: such as ``train``.
      data_dir: TFDS folder; None for that of TFDS.

    Raises:
      Missing: it has not been prepared there.
      ValueError: TFDS does not know it.
    """
    builder = _builder(name, data_dir)
    if split not in builder.info.splits:
        raise Missing(
            f"{name} has no split {split!r} in {builder.data_dir}; run python -m experiments.data prepare {name} "
            "once, or use another --data-dir"
        )
    with _quiet():
        return builder.as_data_source(split, decoders={"image": _undecoded()})


def prepare(name: str, data_dir: Path | None, *, attempts: int = 3, pause: float = 10.0) -> Path:
    """Download a data set with TFDS and write it as ArrayRecord; needs TensorFlow, once.

    Args:
      name: as TFDS knows it.
      data_dir: TFDS folder; None for that of TFDS.
      attempts: how often a download is tried. TFDS keeps the files that are complete.
      pause: seconds before the second attempt; doubled for each further one.

    Returns:
      The folder of the data set.

    Raises:
      ImportError: TensorFlow is not installed.
      Missing: the download failed every time; the message says what to do.
      ValueError: TFDS does not know the name.
    """
    if importlib.util.find_spec("tensorflow") is None:
        raise ImportError(missing("preparing a data set of TFDS needs TensorFlow (reading does not)", "prepare"))
    builder = _builder(name, data_dir)
    for attempt in range(1, attempts + 1):
        try:
            builder.download_and_prepare(file_format="array_record")
            return Path(builder.data_dir)
        except (OSError, ConnectionError, TimeoutError, RuntimeError) as error:
            if attempt == attempts:
                raise Missing(
                    f"{name} could not be downloaded in {attempts} attempts: {error}. Check the connection and the "
                    f"proxy (https_proxy), or prepare it on a machine with access and copy {builder.data_dir} to the "
                    "same place under --data-dir; a data set that TFDS does not download by itself says in its "
                    "documentation which files to put into downloads/manual"
                ) from error
            print(f"attempt {attempt} failed: {error}; trying again", file=sys.stderr)
            time.sleep(pause * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def _builder(name: str, data_dir: Path | None) -> "tfds.core.DatasetBuilder":
    module, _, name = name.rpartition(":")
    with _quiet():
        try:
            import tensorflow_datasets  # noqa: PLC0415 an extra, and slow to import

            if module:
                importlib.import_module(module)  # registers a user-defined builder
        except ImportError as error:
            raise ImportError(missing(f"the data set {name} needs tensorflow-datasets", "experiments")) from error
        try:
            return tensorflow_datasets.builder(name, data_dir=data_dir)
        except tensorflow_datasets.core.registered.DatasetNotFoundError as error:
            raise ValueError(
                f"{name!r} is not a data set of TFDS {tensorflow_datasets.__version__}; for your own builder, "
                "import its module first: tfds:package.module:NAME"
            ) from error


def _undecoded() -> "tfds.decode.SkipDecoding":
    import tensorflow_datasets  # noqa: PLC0415

    return tensorflow_datasets.decode.SkipDecoding()


def _records(source: Examples, keys: tuple[str, str]) -> Iterator[Encoded]:
    for start in range(0, len(source), _BLOCK):
        for i, example in enumerate(source.__getitems__(list(range(start, min(start + _BLOCK, len(source))))), start):
            yield f"example {i}", example[keys[0]], int(example[keys[1]])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log messages and warnings of TFDS and its imports."""
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

    Classes are numbered in the order of their names. Images are read as gray if all of them are gray, and
    otherwise as color.

    Args:
      path: the folder.
      size: (height, width) to resize images to; None if all have the same size.

    Raises:
      Missing: there is no ``train`` folder.
      ValueError: fewer than two classes, a class or a test folder without images, a class of the test folder that
        the training folder lacks, an image of more than 8 bits, or images that differ in size where ``size`` is None.
    """
    if not (path / "train").is_dir():
        raise Missing(f"folder:{path} has no folder train/; it must have one, with a subfolder for each class")
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
    """Every image of a split with its label, classes interleaved evenly."""
    surplus = sorted(entry.name for entry in path.iterdir() if entry.is_dir() and entry.name not in names)
    if surplus:
        raise ValueError(
            f"{path} has a class {surplus[0]!r} that the training folder lacks; its classes are {', '.join(names)}"
        )
    listed = []
    for label, name in enumerate(names):
        images = sorted(file for file in (path / name).glob("*") if file.suffix.lower() in _SUFFIXES)
        if not images and path.name == "train":
            raise ValueError(f"{path / name} has no images, which end in {', '.join(_SUFFIXES)}")
        listed += [((i + 0.5) / len(images), file, label) for i, file in enumerate(images)]
    if not listed:
        raise ValueError(f"{path} has no images in subfolders of the classes {', '.join(names)}; add them or remove it")
    return [(file, label) for _, file, label in sorted(listed, key=lambda one: one[0])]


def _one_shape(images: list[Path], size: Size | None) -> tuple[int, int, int]:
    """(height, width, channels) of all images, read from their headers."""
    from PIL import Image  # noqa: PLC0415 an extra

    channels, first = 1, None
    for file in images:
        try:
            opened = Image.open(file)
        except OSError as error:
            raise ValueError(f"{file} is not an image that can be read ({error}); replace or remove it") from error
        with opened as image:
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
    """The images of a split, decoded while they are written, then its labels, which are collected during decoding."""
    labels = np.zeros(count, np.int32)

    def blocks() -> Iterator[np.ndarray]:
        block = []
        with progress(count, "images", console=standard_output(stderr=True)) as shown:
            shown.stage(f"Decoding {split} images, once")
            for i, (name, encoded, label) in enumerate(read()):
                labels[i] = label
                try:
                    block.append(_decode(encoded, shape))
                except (OSError, SyntaxError) as error:  # from PIL, not from the file that is being written
                    raise ValueError(
                        f"{name} of the {split} split cannot be decoded: {error}; replace or remove it"
                    ) from error
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
    """Decode an image to uint8 of this shape, always with PIL: other decoders differ in the last bit of JPEG."""
    from PIL import Image  # noqa: PLC0415 an extra

    with Image.open(io.BytesIO(encoded)) as image:
        decoded = image.convert("L" if shape[2] == 1 else "RGB")
        if (decoded.height, decoded.width) != shape[:2]:
            decoded = decoded.resize((shape[1], shape[0]), Image.Resampling.BILINEAR)
        return np.asarray(decoded).reshape(shape)
