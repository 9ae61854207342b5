"""Convert arrays, tables and containers to numpy, before they are interpreted as classes or logits."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd

FrameCell: TypeAlias = Any  # a cell of a pandas object: a number, a text, None, NaN, a date
Dataset: TypeAlias = Any  # a ``datasets.Dataset``, whose package need not be installed

USUAL_MISSING = ("na", "n/a", "nan", "none", "null", "<na>")  # in lower case
WHOLE_NUMBER = re.compile(r"[+-]?[0-9]+(?:\.0+)?")
_TABLES = ("polars", "pyarrow")  # libraries other than pandas
SCOPE = "the audit is for single-label classification: one true class per example"


class InputError(ValueError):
    """An argument or a file cannot be audited; the message says which one, where in it, and why."""


def option(name: str, value: object = "") -> str:
    """Describe how to give an option, in Python and on the command line.

    >>> option("threshold", 0.5), option("class_names")
    ('threshold=0.5 (--threshold 0.5)', 'class_names (--class-names)')
    """
    flag = f"--{name.replace('_', '-')}"
    return f"{name} ({flag})" if value == "" else f"{name}={value} ({flag} {value})"


class Raw(NamedTuple):
    """One argument or file, not yet interpreted as classes or logits.

    Attributes:
      name: the caller's name for it, for errors.
      values: integers, floats, booleans or text (dtype object).
      by_row: whether rows are examples, as in a table; arrays have models first.
      columns: names of a table's columns; empty for arrays.
      ids: id of every row: a column that the user named, or a table's index; or None.
      named_ids: whether ``ids`` is a column that the user named.
      notes: notes for the reader of the audit on how it was read.
      listed: whether it was a list of arrays, which may be the batches of one model.
      keys: other columns of the file that are called like ids or differ in every row; they are compared, not joined.
    """

    name: str
    values: np.ndarray
    by_row: bool = False
    columns: tuple[str, ...] = ()
    ids: np.ndarray | None = None
    named_ids: bool = False
    notes: tuple[str, ...] = ()
    listed: bool = False
    keys: Mapping[str, np.ndarray] = MappingProxyType({})


def of_object(value: object, name: str) -> Raw:
    """Read an argument: an array, a list, batches, a table of pandas or another library, or what a trainer returns.

    Raises:
      InputError: it cannot be converted to an array of numbers or text.

    >>> of_object([True, False], "labels").values
    array([ True, False])
    """
    if isinstance(value, Raw):
        return value
    if isinstance(value, str | Path):
        raise InputError(f"{name} is the text {str(value)!r}; read the file first (np.load, pandas.read_csv)")
    if isinstance(value, np.ma.MaskedArray) and np.ma.is_masked(value):
        raise InputError(f"{name} is an array with masked entries; leave these examples out of all arguments")
    if hasattr(value, "__next__"):
        raise InputError(f"{name} is an iterator, which can be read only once; pass list(...) of it")
    if type(value).__name__ in ("PredictionOutput", "EvalPrediction", "EvalLoopOutput"):
        value = getattr(value, "label_ids" if name == "labels" else "predictions")
        value = value[0] if isinstance(value, tuple) else value
    elif hasattr(value, "column_names") and hasattr(value, "features"):
        value = _column_of_dataset(value, name)
    value = in_pandas(value)
    if isinstance(value, pd.DataFrame):
        return _of_frame(value, name)
    if isinstance(value, pd.Series | pd.Index):
        index = value.index if isinstance(value, pd.Series) else None
        rows = lists_as_columns(pd.Series(value), name)
        return Raw(name, plain(pd.Series(value), name) if rows is None else rows, ids=_ids(index))
    batches = _batches(value, name)
    listed = isinstance(value, list | tuple) and all(hasattr(part, "shape") for part in value)
    return Raw(name, as_array(value if batches is None else batches, name), listed=listed)


def in_pandas(value: object) -> object:
    """Convert a table or column of polars or pyarrow; an array of it would lose the names of its columns."""
    if type(value).__module__.partition(".")[0] not in _TABLES or not hasattr(value, "to_pandas"):
        return value
    try:
        return value.to_pandas()
    except ModuleNotFoundError:  # polars converts with pyarrow, which the extra "recall" does not install
        if hasattr(value, "to_dict"):
            return pd.DataFrame(value.to_dict(as_series=False))
        return pd.Series(value.to_list(), name=value.name)  # type: ignore[attr-defined]


def plain(column: pd.Series, where: str) -> np.ndarray:
    """Convert a column to int64, float64, bool or text (object).

    Raises:
      InputError: a cell is missing, or the column has neither numbers nor text.

    >>> plain(pd.Series(["a", "b"], dtype="category"), "labels")
    array(['a', 'b'], dtype=object)
    """
    missing = column.isna().to_numpy()
    if missing.any():
        raise InputError(f"{where} has no number at example {int(missing.argmax())}")
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if pd.api.types.is_bool_dtype(column):
        return column.to_numpy(dtype=bool)
    if pd.api.types.is_integer_dtype(column) and (column.abs() < 2**53).all():
        return column.to_numpy(dtype=np.int64)
    if pd.api.types.is_complex_dtype(column) or pd.api.types.is_datetime64_any_dtype(column):
        raise InputError(f"{where} must contain numbers or class names, got dtype {column.dtype}")
    if pd.api.types.is_numeric_dtype(column):
        return column.to_numpy(dtype=np.float64)
    cells = column.tolist()
    if all(isinstance(cell, bool | np.bool_) for cell in cells):
        return np.array(cells, bool)
    for example, cell in enumerate(cells):
        if not isinstance(cell, str | bytes | int | float | np.integer | np.floating) or isinstance(cell, bool):
            raise InputError(f"{where} must contain numbers or class names, got {cell!r} at example {example}")
    if not any(isinstance(cell, str | bytes) for cell in cells):
        return np.array(cells)
    return np.array([cleaned(cell, where) for cell in cells], object)


def as_array(values: object, name: str) -> np.ndarray:
    """Convert to a numpy array of integers, floats, booleans or text.

    Raises:
      InputError: it cannot be converted, is ragged, or has another dtype.

    >>> as_array([1 + 2j], "labels")
    Traceback (most recent call last):
      ...
    jprune.recall.inputs.raw.InputError: labels must contain numbers or class names, got dtype complex128
    """
    try:
        converted = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} does not convert to a numpy array: {error}") from error
    if converted.dtype.kind == "S":
        converted = decoded(converted, name)
    if converted.dtype.kind == "O" and converted.size and converted.ndim == 1:
        return plain(pd.Series(converted), name)
    if converted.dtype.kind == "U":
        return np.array([cleaned(cell) for cell in converted.ravel()], object).reshape(converted.shape)
    small = converted.dtype.name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    if converted.dtype.kind not in "iufb" and not small:
        raise InputError(f"{name} must contain numbers or class names, got dtype {converted.dtype}")
    return converted.astype(np.float32) if small else converted


def cleaned(cell: object, where: str = "the table") -> str:
    """Return a cell as text without blanks around it, with one code for each accented letter; bytes are UTF-8.

    Raises:
      InputError: bytes are not UTF-8.

    >>> cleaned(b"cat "), len(cleaned("e\u0301"))
    ('cat', 1)
    """
    try:
        text = cell.decode() if isinstance(cell, bytes) else str(cell)
    except UnicodeDecodeError as error:
        raise InputError(f"{where} contains {cell!r}, bytes that are not UTF-8; save names as text") from error
    return unicodedata.normalize("NFC", text).strip()


def refuse_two_spellings(texts: Iterable[str], where: str) -> None:
    """Refuse whole numbers of which two differ in leading zeros alone, such as the codes 007 and 7.

    Raises:
      InputError: it names both.

    >>> refuse_two_spellings(["007", "7.0"], "labels")
    Traceback (most recent call last):
      ...
    jprune.recall.inputs.raw.InputError: labels contains '007' and '7.0', which are one number: write every class in one
    way, or give the classes names that are not numbers
    """
    first: dict[int, str] = {}
    for text in dict.fromkeys(texts):
        whole = text.partition(".")[0]
        other = first.setdefault(int(whole), text)
        if other.partition(".")[0].lstrip("+") != whole.lstrip("+"):
            raise InputError(
                f"{where} contains {other!r} and {text!r}, which are one number: write every class in one way, or give "
                "the classes names that are not numbers"
            )


def decoded(texts: np.ndarray, name: str) -> np.ndarray:
    """Decode bytes as text.

    Raises:
      InputError: they are not UTF-8.

    >>> decoded(np.array([b"cat"]), "labels")
    array(['cat'], dtype='<U3')
    """
    try:
        return np.char.decode(texts, "utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} contains bytes that are not UTF-8: {error}") from error


def _of_frame(frame: pd.DataFrame, name: str) -> Raw:
    if frame.shape[1] == 0 or not len(frame):
        raise InputError(f"{name} is an empty table")
    columns = [plain(frame[column], f"{name}, column {str(column)!r}") for column in frame.columns]
    names = tuple(map(str, frame.columns))
    if isinstance(frame.columns, pd.RangeIndex):
        names = ()
    return Raw(name, together(columns, names, name), by_row=True, columns=names, ids=_ids(frame.index))


def lists_as_columns(column: pd.Series, where: str) -> np.ndarray | None:
    """Convert a column of lists of numbers of equal length to (rows, length); return None for other columns.

    Raises:
      InputError: some cells are lists and some are not, or they differ in length.

    >>> lists_as_columns(pd.Series([[0.1, 0.9], [0.5, 0.5]]), "logits").shape
    (2, 2)
    """
    if not pd.api.types.is_object_dtype(column):
        return None
    lists = [isinstance(cell, list | tuple | np.ndarray) for cell in column]
    if not any(lists):
        return None
    sizes = [np.size(cell) if listed else 0 for cell, listed in zip(column, lists, strict=True)]
    if len(set(sizes)) > 1:
        odd = next(row for row, size in enumerate(sizes) if size != sizes[0])
        raise InputError(f"{where} contains {sizes[0]} numbers at example 0 and {sizes[odd]} at example {odd}")
    return as_array(np.stack([np.asarray(cell) for cell in column]), where)


def together(columns: Sequence[np.ndarray], names: Sequence[str], name: str, pick: str = "") -> np.ndarray:
    """Stack columns to (rows, columns): all text, or all numbers.

    Args:
      columns: the columns, (rows,) each.
      names: their names; may be empty.
      name: the caller's name for the table, for errors.
      pick: how to pick a single column of it, for errors.

    Raises:
      InputError: text and numbers are mixed, or whole numbers and decimals.

    >>> together([np.array([0.1, 2.5]), np.array([0.5, 1.0])], "ab", "logits").dtype
    dtype('float64')
    """
    texts = [column.dtype == object for column in columns]
    if any(texts) and not all(texts):
        odd = texts.index(True)
        label = repr(names[odd]) if names else str(odd)
        raise InputError(
            f"{name}, column {label} contains {columns[odd][0]!r} at example 0, text among columns of numbers; keep "
            f"only the columns of predictions{pick}"
        )
    whole = [column.dtype.kind in "iu" and len(np.unique(column)) > 1 for column in columns]
    if any(whole) and any(column.dtype.kind == "f" for column in columns):
        odd = whole.index(True)
        label = repr(names[odd]) if names else str(odd)
        raise InputError(
            f"{name}, column {label} contains whole numbers and other columns contain decimals: is it an id, a label "
            f"or a prediction? Keep only the columns of logits{pick}"
        )
    return np.column_stack(columns)


def _ids(index: pd.Index | None) -> np.ndarray | None:
    """Return the ids in a pandas index; None for a default index."""
    if index is None or (isinstance(index, pd.RangeIndex) and index.start == 0 and index.step == 1):
        return None
    values = np.array([str(cell) for cell in index.tolist()], object)
    numbered = values.tolist() == [str(n) for n in range(len(values))]
    return None if numbered or len(set(values.tolist())) < len(values) else values


def _column_of_dataset(dataset: Dataset, name: str) -> np.ndarray:
    """Return the labels or predictions of a Hugging Face ``Dataset``, by the usual names of their columns."""
    usual = ("label", "labels") if name == "labels" else ("predictions", "prediction", "pred", "logits")
    found = [column for column in dataset.column_names if column in usual]
    if len(found) != 1:
        raise InputError(
            f"{name} is a Dataset with the columns {', '.join(dataset.column_names)}; pass one of them, as "
            f"dataset[{usual[0]!r}]"
        )
    return np.asarray(dataset[found[0]])


def _batches(value: object, name: str) -> np.ndarray | None:
    """Join the batches of one model to one array; return None if the value is not a list of batches.

    Arrays of equal length are models, or rows of one-hot labels; batches differ in length, at least the last.
    """
    if not isinstance(value, list | tuple) or len(value) < 2:
        return None
    if not all(hasattr(part, "shape") and hasattr(part, "dtype") and getattr(part, "ndim", 0) >= 1 for part in value):
        return None
    shapes = [tuple(part.shape) for part in value]
    if len({shape[1:] for shape in shapes}) != 1:
        return None
    alike = len(set(shapes)) == 1
    if alike and (name != "labels" or len(shapes[0]) > 1):
        return None
    batches = [as_array(part, f"{name}, batch {index}") for index, part in enumerate(value)]
    return None if alike and _one_hot_rows(np.stack(batches)) else np.concatenate(batches)


def _one_hot_rows(rows: np.ndarray) -> bool:
    """Whether labels of one length are one-hot rows; batches are fewer, or do not all have exactly one 1.

    >>> _one_hot_rows(np.array([[0, 1], [1, 0], [1, 0]])), _one_hot_rows(np.array([[0, 1], [1, 0]]))
    (True, False)
    """
    enough = len(rows) > rows.shape[1] and rows.dtype.kind in "iufb"
    return enough and bool(np.isin(rows, (0, 1)).all() and (rows.sum(1) == 1).all())
