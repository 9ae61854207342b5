"""Labels, predictions and images from the files of any framework: .npy, .npz, .csv, .parquet.

A file is named ``PATH``, or ``PATH:NAME`` to pick one array of an .npz or one column of a table.
No pickle is ever loaded. A table has one row per example: whole numbers are classes, one column per
model; other numbers are the logits of one model, one column per class; text is a class name.
"""

import contextlib
import csv
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from jprune.recall.inputs.predictions import InputError

_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf(?:inity)?|nan)", re.IGNORECASE)
_PICKED = re.compile(r"^(?P<path>.+\.(?:npz|csv|parquet)):(?P<name>[^/\\]+)$", re.IGNORECASE)


def read_labels(file: str, class_names: Sequence[str] | None = None) -> Any:
    """Read the true classes; of a table with several columns the one called label or labels.

    Args:
      file: ``PATH`` or ``PATH:NAME``.
      class_names: names that may stand for classes in a table.

    Raises:
      InputError: the file cannot be read, or it is not clear which column is meant.
    """
    path, name = _split(file)
    if _kind(path) in (".npy", ".npz"):
        return _read_numpy(path, name)
    table = _read_table(path, name, class_names)
    if table.shape[1] > 1:
        called = [column for column in table.columns if str(column).lower() in ("label", "labels")]
        if len(called) != 1:
            raise InputError(
                f"{path} has {table.shape[1]} columns ({_some(table.columns)}) and none or several called label: "
                f"say which one as {path}:NAME"
            )
        table = table[called]
    return _numbers(table, path, class_names)[:, 0]


def read_predictions(file: str, examples: int, class_names: Sequence[str] | None = None) -> Any:
    """Read predictions or logits, in the layout that ``jprune.recall.audit`` takes.

    Args:
      file: ``PATH`` or ``PATH:NAME``.
      examples: how many labels there are; only to tell a header of column numbers from an example.
      class_names: names that may stand for classes in a table.

    Returns:
      What an .npy or .npz holds, as it is; of a table classes (models, examples) or logits
      (examples, classes).

    Raises:
      InputError: the file cannot be read, a cell is no number and no class name, or whole numbers
        stored as decimals leave open whether they are classes or logits.
    """
    path, name = _split(file)
    if _kind(path) in (".npy", ".npz"):
        return _read_numpy(path, name)
    cells = _numbers(_read_table(path, name, class_names, examples), path, class_names)
    if cells.dtype.kind == "i":
        return cells.T
    if cells.shape[1] == 1:
        return cells[:, 0]
    one_hot = np.isin(cells, (0, 1)).all() and (cells.sum(axis=1) == 1).all()
    if (cells == np.floor(cells)).all() and not one_hot:
        raise InputError(
            f"{path} holds whole numbers as decimals (such as {cells[0, 0]}): save classes as integers, one column "
            f"per model; of logits save the largest one's index"
        )
    return cells


def read_groups(file: str) -> dict[str, Any]:
    """Read attributes of the examples: the columns of a table, or the arrays of an .npz, by name.

    Raises:
      InputError: the file cannot be read.
    """
    path, name = _split(file)
    if _kind(path) == ".npz" and name is None:
        with _opened(path) as archive:
            names = list(archive.files)
        return {each: _read_numpy(path, each) for each in names}
    if _kind(path) in (".npy", ".npz"):
        return {name or path.stem: _read_numpy(path, name)}
    table = _read_table(path, name)
    return {str(column): table[column].to_numpy(dtype=object) for column in table.columns}


def read_images(file: str) -> Any:
    """Read the images of the examples, (examples, height, width) or (examples, height, width, channels).

    Raises:
      InputError: the file cannot be read, or it is a table.
    """
    path, name = _split(file)
    if _kind(path) not in (".npy", ".npz"):
        raise InputError(f"{path}: images are read from .npy or .npz only")
    return _read_numpy(path, name)


def read_class_names(text: str) -> tuple[str, ...]:
    """Read class names: a comma-separated list, or a text file with one name per line.

    Raises:
      InputError: the text ends in .txt and no such file can be read.

    >>> read_class_names("cat, dog")
    ('cat', 'dog')
    """
    if not text.lower().endswith(".txt"):
        return tuple(name.strip() for name in text.split(","))
    path = Path(text)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text: {_reason(error)}") from error
    return tuple(line.strip() for line in lines if line.strip())


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as dicts that JSON can hold: what is undefined is None.

    >>> records(pd.DataFrame({"score": ["random"], "alpha": [np.nan]}))
    [{'score': 'random', 'alpha': None}]
    """
    columns = [
        [None if isinstance(cell, float) and not math.isfinite(cell) else cell for cell in table[name].tolist()]
        for name in table.columns
    ]
    return [dict(zip(table.columns, row, strict=True)) for row in zip(*columns, strict=True)]


def _split(file: str) -> tuple[Path, str | None]:
    """Tell ``PATH:NAME`` from ``PATH``; a file that has such a name wins."""
    picked = _PICKED.match(file)
    path, name = (Path(picked["path"]), picked["name"]) if picked and not Path(file).exists() else (Path(file), None)
    if not path.is_file():
        raise InputError(f"{path} is not there" if not path.exists() else f"{path} is not a file")
    _kind(path)
    return path, name


def _kind(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix not in (".npy", ".npz", ".csv", ".parquet"):
        raise InputError(f"{path} has the suffix {suffix!r}; read are .npy, .npz, .csv and .parquet")
    return suffix


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open an .npz without ever unpickling."""
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except Exception as error:  # whatever a decoder stumbles over, the file is what is broken
            raise InputError(f"{path} is no readable .npz: {_reason(error)}") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path} is no .npz: it holds a single array without a name; call it .npy")
        yield archive


def _read_numpy(path: Path, name: str | None) -> Any:
    if _kind(path) == ".npy":
        try:
            return np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # as above
            raise InputError(f"{path} is no readable .npy: {_reason(error)}") from error
    with _opened(path) as archive:
        names = list(archive.files)
        if name is None and len(names) != 1:
            raise InputError(f"{path} has {len(names)} arrays ({_some(names)}): say which one as {path}:NAME")
        if name is not None and name not in names:
            raise InputError(f"{path} has no array {name!r}; it has {_some(names)}")
        try:
            return archive[names[0] if name is None else name]
        except Exception as error:  # as above
            raise InputError(f"{path} has an unreadable array {name or names[0]!r}: {_reason(error)}") from error


def _read_table(
    path: Path, name: str | None, class_names: Sequence[str] | None = None, examples: int | None = None
) -> pd.DataFrame:
    try:
        csv_file = _kind(path) == ".csv"
        table = _read_csv(path, class_names, examples) if csv_file else pd.read_parquet(path, engine="pyarrow")
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{path}: parquet needs pyarrow: pip install 'jprune[report]'") from error
    except Exception as error:  # as above
        raise InputError(f"{path} is no readable {_kind(path)}: {_reason(error)}") from error
    first = table.columns[0] if table.shape[1] else None
    if table.shape[1] > 1 and first == "" and table[first].tolist() == list(range(len(table))):
        table = table.drop(columns=[first])  # the index that pandas writes unless told not to
    if table.empty:
        raise InputError(f"{path} holds no example")
    if name is None:
        return table
    if name not in table.columns:
        raise InputError(f"{path} has no column {name!r}; it has {_some(table.columns)}")
    return table[[name]]


def _read_csv(path: Path, class_names: Sequence[str] | None, examples: int | None) -> pd.DataFrame:
    """Read a comma-separated table; its first row is a header where a cell is no number and no class name.

    A first row 0, 1, 2, ... may be a header of column numbers: it is one where there is a row too many.
    """
    with path.open(newline="", encoding="utf-8-sig") as text:
        first = [cell.strip() for cell in next(csv.reader(text), [])]
    header = not all(_is_number(cell) or cell in (class_names or ()) for cell in first)
    repeated = [cell for cell in first if first.count(cell) > 1] if header else []
    if repeated:
        raise InputError(f"{path} has the column {repeated[0]!r} twice")
    table = pd.read_csv(
        path,
        header=0 if header else None,
        names=first if header else None,
        index_col=False,
        keep_default_na=False,
        skipinitialspace=True,
        encoding="utf-8-sig",
        low_memory=False,
    )
    table.columns = table.columns.map(str)
    if not header and examples is not None and len(first) > 1 and first == [str(n) for n in range(len(first))]:
        if len(table) == examples + 1:
            return table.iloc[1:]
        if len(first) > 2:
            raise InputError(
                f"{path} begins with the row 0, 1, ... {len(first) - 1}: a header of column numbers, or predictions? "
                f"Give the columns names, or save them without a header"
            )
    return table


def _numbers(table: pd.DataFrame, path: Path, class_names: Sequence[str] | None) -> np.ndarray:
    """Return the cells (examples, columns) as int64 where all are whole, else as float64."""
    columns = []
    for name in table.columns:
        try:
            columns.append(_column(table[name], f"{path}, column {str(name)!r}", class_names))
        except InputError as error:
            if table.shape[1] == 1:
                raise
            raise InputError(f"{error} (a single column is picked with {path}:NAME)") from error
    return np.column_stack(columns)


def _column(cells: "pd.Series[Any]", where: str, class_names: Sequence[str] | None) -> np.ndarray:
    missing = cells.isna().to_numpy()
    if missing.any():
        raise InputError(f"{where} has no number at example {int(missing.argmax())}")
    if pd.api.types.is_bool_dtype(cells):
        raise InputError(f"{where} holds {cells.iloc[0]} at example 0; wanted numbers")
    if pd.api.types.is_integer_dtype(cells) and cells.abs().max() < 2**53:
        return cells.to_numpy(dtype=np.int64)
    if pd.api.types.is_numeric_dtype(cells):
        return cells.to_numpy(dtype=np.float64)
    return _named(cells, where, {name: c for c, name in enumerate(class_names or ())})


def _named(cells: "pd.Series[Any]", where: str, index: dict[str, int]) -> np.ndarray:
    """Read a column of text: class names throughout, or numbers too long for an integer."""
    texts = [str(cell).strip() for cell in cells.tolist()]
    for example, text in enumerate(texts):
        if text not in index and not _is_number(text):
            listed = f" or one of the class names {_some(list(index))}" if index else ""
            hint = " or a name that --class-names gives" if text and not index else ""
            raise InputError(f"{where} holds {text!r} at example {example}; wanted a number{listed}{hint}")
    names = [text in index for text in texts]
    if not any(names):
        return np.array([float(text) for text in texts])
    if not all(names):
        example = names.index(False)
        raise InputError(f"{where} holds {texts[example]!r} at example {example}, a number among class names")
    return np.array([index[text] for text in texts], np.int64)


def _is_number(cell: str) -> bool:
    """Whether a cell is a number as files write it; Python's float also takes 1_0 and digits of other scripts."""
    return _NUMBER.fullmatch(cell.strip()) is not None


def _some(names: Any, most: int = 8) -> str:
    shown = [str(name) for name in list(names)[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def _reason(error: BaseException) -> str:
    """Say an error in one line; a foreign decoder's message may be long or empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
