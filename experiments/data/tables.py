"""Data sets from arrays and tables: scikit-learn, the moons of the jumpstart study, .npz, CSV and parquet."""

import contextlib
import zipfile
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import ArrayLike

from jprune._extras import missing

if TYPE_CHECKING:
    import pandas as pd

Labelled = tuple[np.ndarray, np.ndarray]  # inputs and labels

BUNDLED = ("digits", "iris", "wine", "breast_cancer")


class Missing(FileNotFoundError):
    """The data is not on this machine; the message says how to get it."""


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
