"""Sources of examples: scikit-learn, arrays, tables, TensorFlow Datasets, folders of images."""

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
import zipfile
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
from jaxtyping import ArrayLike

from experiments.cli.progress import progress, standard_output
from experiments.data.cache import Rows
from experiments.storage.files import JSON
from jprune._extras import missing

if TYPE_CHECKING:
    import pandas as pd
    import tensorflow_datasets as tfds

Arrays = Mapping[str, np.ndarray]
Size = tuple[int, int]
Encoded = tuple[str, bytes, int]  # name of an image, content of its file, label
Labelled = tuple[np.ndarray, np.ndarray]  # inputs and labels

BUNDLED = ("digits", "iris", "wine", "breast_cancer")
_IMAGES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_BLOCK = 256


class Examples(Protocol):
    """The examples of a data source of TFDS, read by index."""

    def __len__(self) -> int: ...

    def __getitems__(self, indices: Sequence[int]) -> Sequence[Mapping[str, bytes | int]]: ...


class Missing(FileNotFoundError):
    """The data is not on this machine; the message says how to get it."""


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


def bundled(name: str) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Images or features, labels and class names of a data set of scikit-learn.

    Digits are uint8 (1797, 8, 8, 1), pixels 0 to 16; the tables are float32 (examples, features).
    """
    try:
        import sklearn.datasets  # noqa: PLC0415 an extra
    except ImportError as error:
        raise ImportError(missing(f"the data set {name} needs scikit-learn", "experiments")) from error
    bunch = getattr(sklearn.datasets, f"load_{name}")()
    features = bunch.images.astype(np.uint8)[..., None] if name == "digits" else bunch.data.astype(np.float32)
    return features, bunch.target.astype(np.int32), tuple(map(str, bunch.target_names))


def moons() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The 100 points of the jumpstart study, by split: 85 to train on, 15 to validate.

    ``moons.csv`` has the points that the authors' notebooks split: ``make_moons(100, noise=None)`` of
    scikit-learn, divided by its range, to the last bit of float32.
    """
    path = Path(__file__).with_name("moons.csv")
    table = np.genfromtxt(path, delimiter=",", names=True, dtype=None, encoding="utf-8")
    points = np.stack([table["x0"], table["x1"]], -1).astype(np.float32)
    labels = table["label"].astype(np.int32)
    return {
        split: (points[table["split"] == split], labels[table["split"] == split]) for split in ("train", "validation")
    }


# Arrays and tables ----------------------------------------------------------------------------------


def npz(path: Path) -> tuple[Labelled, Labelled | None, tuple[str, ...]]:
    """Read ``x_train``, ``y_train`` and, if present, ``x_test``, ``y_test``, ``class_names`` from an .npz.

    Raises:
      Missing: the file does not exist.
      ValueError: it is not an .npz, needs unpickling, or lacks an array; or an array is unusable.
    """
    if not path.is_file():
        raise Missing(f"npz:{path} is not a file; check the path")
    if not zipfile.is_zipfile(path):
        raise ValueError(f"npz:{path} is not an .npz file, or only a part of one; write it with numpy.savez")
    try:
        with np.load(path, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except Exception as error:  # whatever numpy stumbles over, the file is what is broken
        raise ValueError(
            f"npz:{path} cannot be read: {_one_line(error)}; write it with numpy.savez, without objects"
        ) from error
    names = arrays.pop("class_names", None)
    return checked(f"npz:{path}", arrays, None if names is None else _texts(f"npz:{path}", names))


def _texts(name: str, class_names: np.ndarray) -> list[str]:
    """The names of the classes in an .npz."""
    if class_names.ndim != 1 or class_names.dtype.kind not in "Uiu":
        raise ValueError(
            f"{name}: class_names has dtype {class_names.dtype} and shape {class_names.shape}; it must be strings of "
            "shape (classes,), as numpy.array(['cat', 'dog'])"
        )
    return list(map(str, class_names))


def table(path: Path) -> tuple[Labelled, None, tuple[str, ...]]:
    """Read a table of numbers and classes from a CSV or parquet file.

    The class is in the column ``label``, ``class`` or ``target``, or else in the last one. All other
    columns must be numbers, except columns of text, which become one column of 0 and 1 for each value.

    Raises:
      Missing: the file does not exist.
      ValueError: it cannot be read, has missing values, or has fewer than two classes.
    """
    import pandas as pd  # noqa: PLC0415

    if not path.is_file():
        raise Missing(f"table:{path} is not a file; check the path")
    frame = _parquet(path) if path.suffix.lower() == ".parquet" else _csv(path)
    if frame.empty:
        raise ValueError(f"table:{path} has no examples; it needs a row for each below the names of the columns")
    if frame.shape[1] < 2:
        raise ValueError(
            f"table:{path} has only the column {', '.join(map(str, frame.columns))!r}; it needs features and a class, "
            "separated by commas"
        )
    if (lacking := frame.columns[frame.isna().any()]).size:
        raise ValueError(f"table:{path} has missing values in {', '.join(map(str, lacking))}; fill or drop these rows")
    named = [name for usual in ("label", "class", "target") for name in frame if str(name).lower() == usual]
    if len(named) > 1:
        raise ValueError(f"table:{path} has the columns {' and '.join(named)}; rename or drop all but the class")
    target = named[0] if named else frame.columns[-1]
    _check_columns(path, frame, target)
    names = sorted(frame[target].unique(), key=lambda value: (isinstance(value, str), value))
    labels = frame[target].map({name: number for number, name in enumerate(names)}).to_numpy(np.int32)
    features = pd.get_dummies(frame.drop(columns=target)).to_numpy(np.float32)
    train, _, named = checked(f"table:{path}", {"x_train": features, "y_train": labels}, list(map(str, names)))
    return train, None, named


def _parquet(path: Path) -> "pd.DataFrame":
    import pandas as pd  # noqa: PLC0415

    with _reading(path):
        import pyarrow.parquet  # noqa: PLC0415

        names = pyarrow.parquet.read_schema(path).names
    _refuse_repeated(path, names)
    with _reading(path):
        return pd.read_parquet(path)


def _csv(path: Path) -> "pd.DataFrame":
    """Read a CSV file whose first row has the names of the columns."""
    import pandas as pd  # noqa: PLC0415

    with _reading(path):  # also refuses a second row with more cells, the first of which would become an index
        first = pd.read_csv(path, header=None, nrows=2, dtype=str, keep_default_na=False)
    header = first.iloc[0].str.strip().tolist()
    _refuse_repeated(path, header)
    if "" in header:
        raise ValueError(
            f"table:{path}: column {header.index('') + 1} has no name; name it, or, if it numbers the rows, write the "
            "table without it (pandas: to_csv(index=False))"
        )
    with _reading(path):
        frame = pd.read_csv(path, low_memory=False)
    numbers = [frame[name] for name in frame if pd.api.types.is_numeric_dtype(frame[name])]
    alike = [_is_number(str(column.name)) and column.min() <= float(column.name) <= column.max() for column in numbers]
    if 2 * sum(alike) > len(numbers) and header != list(map(str, range(len(header)))):
        raise ValueError(
            f"table:{path}: the first row, {', '.join(header[:5])}{', ...' if header[5:] else ''}, looks like an "
            "example; put a row with the names of the columns before it"
        )
    return frame.set_axis(header, axis=1)


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError) as error:
        raise ValueError(f"table:{path} cannot be read as CSV with commas, or parquet: {_one_line(error)}") from error


def _refuse_repeated(path: Path, names: Sequence[str]) -> None:
    """Refuse a table that has several columns of one name."""
    if repeated := sorted({name for name in names if name and names.count(name) > 1}):
        raise ValueError(
            f"table:{path} has several columns called {' and '.join(map(repr, repeated))}; rename or drop all but one"
        )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_columns(path: Path, frame: "pd.DataFrame", target: Hashable) -> None:
    """Refuse columns of a table that would be used in a way that is not meant."""
    import pandas as pd  # noqa: PLC0415

    for name, column in frame.items():
        kinds = {type(value).__name__ for value in column} if column.dtype == object else set()
        if pd.api.types.is_datetime64_any_dtype(column) or kinds & {"date", "datetime"}:
            raise ValueError(f"table:{path}: column {name!r} has dates; replace it by numbers or drop it")
        text = pd.api.types.is_string_dtype(column) or isinstance(column.dtype, pd.CategoricalDtype)
        if kinds - {"str", "bool"} or not (pd.api.types.is_numeric_dtype(column) or text):
            kind = ", ".join(sorted(kinds)) or column.dtype
            raise ValueError(
                f"table:{path}: column {name!r} has values of type {kind}, not numbers or text; convert or drop it"
            )
    classes = frame[target]
    if pd.api.types.is_float_dtype(classes) and (classes % 1 != 0).any():
        raise ValueError(
            f"table:{path}: the class column {target!r} has numbers such as {classes[classes % 1 != 0].iloc[0]}; "
            "classes are text or whole numbers, and a column called label, class or target is used before the last one"
        )
    for name, column in frame.drop(columns=target).items():
        if pd.api.types.is_numeric_dtype(column):
            continue
        values = [str(value) for value in column.unique()]
        texts = [value for value in values if not _is_number(value)]
        if 2 * len(texts) < len(values):
            found = f"and the text {texts[0]!r}; replace it" if texts else "stored as text; convert them"
            raise ValueError(f"table:{path}: column {name!r} has numbers {found}, or drop the column")
        if len(values) > max(20, len(frame) // 4):
            raise ValueError(
                f"table:{path}: column {name!r} has {len(values)} different strings in {len(frame)} rows, each of "
                "which would become a feature; group them or drop the column"
            )


def checked(
    name: str, arrays: Mapping[str, ArrayLike], class_names: Sequence[str] | None = None
) -> tuple[Labelled, Labelled | None, tuple[str, ...]]:
    """Check arrays of inputs and labels, and bring them to the form of a data set.

    Args:
      name: of the data set, for errors.
      arrays: ``x_train``, ``y_train`` and perhaps ``x_test``, ``y_test``.
      class_names: one for each class; by default their numbers.

    Raises:
      ValueError: an array is missing or unusable; the message names it.
    """
    surplus = sorted(set(arrays) - {"x_train", "y_train", "x_test", "y_test"})
    lacking = [one for one in ("x_train", "y_train") if one not in arrays]
    if lacking or ("x_test" in arrays) != ("y_test" in arrays):
        raise ValueError(
            f"{name} has the arrays {', '.join(arrays) or 'none'}; it needs x_train and y_train, and x_test and y_test "
            "if there is a test set"
        )
    if surplus:
        raise ValueError(f"{name} has the array {surplus[0]!r}; only x_train, y_train, x_test and y_test are used")
    found = {}
    for split in ("train", "test"):
        if f"x_{split}" in arrays:
            found[split] = _checked_split(name, split, arrays[f"x_{split}"], arrays[f"y_{split}"])
    train, test = found["train"], found.get("test")
    if test is not None and test[0].shape[1:] != train[0].shape[1:]:
        raise ValueError(
            f"{name}: x_test has examples of shape {test[0].shape[1:]} and x_train of {train[0].shape[1:]}; they must "
            "be the same"
        )
    if test is not None and (test[0].dtype == np.uint8) != (train[0].dtype == np.uint8):
        raise ValueError(
            f"{name}: x_train has {train[0].dtype} pixels and x_test {test[0].dtype}; use one scale and dtype"
        )
    present = set(train[1].tolist())
    if len(present) < 2:
        raise ValueError(f"{name}: y_train has the labels {sorted(present)}; there must be two or more classes")
    count = 1 + max(int(labels.max()) for _, labels in found.values())
    classes = count if class_names is None else len(class_names)
    absent = next((number for number in range(classes) if number not in present), None)
    if absent is not None:
        source = "y_test has labels" if max(present) < count - 1 else "there are labels"
        raise ValueError(
            f"{name}: the classes in y_train must be numbered 0 to {classes - 1} without a gap; {absent} has no "
            + (
                f"example, and {source} up to {count - 1}. Number them with numpy.unique(labels, return_inverse=True)"
                if class_names is None
                else f"example, although class_names has {classes} names; remove the name"
            )
        )
    if classes < count:
        raise ValueError(
            f"{name}: class_names has {classes} names, but there are labels up to {count - 1}; give {count} names"
        )
    names = tuple(map(str, range(count) if class_names is None else class_names))
    for one in names:
        alike = [other for other in names if other.strip() == one.strip()]
        if len(alike) > 1 or not one.strip():
            raise ValueError(f"{name} has the class names {', '.join(map(repr, alike))}; give every class its own name")
    return train, test, names


def _checked_split(name: str, split: str, inputs: ArrayLike, labels: ArrayLike) -> Labelled:
    x, y = np.asarray(inputs), np.asarray(labels)
    if y.ndim != 1 or not np.issubdtype(y.dtype, np.integer):
        raise ValueError(
            f"{name}: y_{split} has dtype {y.dtype} and shape {y.shape}; it must be integers (examples,). Number other "
            "labels with numpy.unique(labels, return_inverse=True)"
        )
    if (y < 0).any():
        raise ValueError(f"{name}: y_{split} has the label {y.min()}; number the classes from 0")
    if y.size and y.max() > np.iinfo(np.int32).max:
        raise ValueError(
            f"{name}: y_{split} has the label {y.max()}; number the classes from 0 with "
            "numpy.unique(labels, return_inverse=True)"
        )
    if x.ndim and len(x) != len(y):
        raise ValueError(
            f"{name}: x_{split} has {len(x)} examples and y_{split} has {len(y)} labels; their numbers must be equal"
        )
    real = x.dtype == bool or (np.issubdtype(x.dtype, np.number) and not np.issubdtype(x.dtype, np.complexfloating))
    if x.ndim not in (2, 3, 4) or not real:
        raise ValueError(
            f"{name}: x_{split} has dtype {x.dtype} and shape {x.shape}; it must be real numbers of shape "
            f"({len(y)}, features), ({len(y)}, height, width) or ({len(y)}, height, width, channels)"
        )
    if x.size == 0:
        raise ValueError(f"{name}: x_{split} has shape {x.shape} and no values; give examples, or leave out the split")
    x = x if x.dtype == np.uint8 and x.ndim > 2 else x.astype(np.float32)
    if not np.isfinite(x).all():
        place = ", ".join(map(str, np.argwhere(~np.isfinite(x))[0]))
        raise ValueError(
            f"{name}: x_{split} has values that are not finite, the first at [{place}]; fill them or drop the rows"
        )
    return x[..., None] if x.ndim == 3 else x, y.astype(np.int32)


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
            "download it, or give another --data-dir"
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
            "once, or give another --data-dir"
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
      ValueError: fewer than two classes, a class without images, a class of the test folder that the
        training folder lacks, an image of more than 8 bits, or images that differ in size where
        ``size`` is None.
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
        images = sorted(file for file in (path / name).glob("*") if file.suffix.lower() in _IMAGES)
        if not images and path.name == "train":
            raise ValueError(f"{path / name} has no images, which end in {', '.join(_IMAGES)}")
        listed += [((i + 0.5) / len(images), file, label) for i, file in enumerate(images)]
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
