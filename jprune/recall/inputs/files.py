"""Labels, predictions, groups and images from files: .npy, .npz, .csv, .tsv, .jsonl and .parquet.

A file is named ``PATH``, or ``PATH:NAME`` to pick one array of an .npz, one column of a table or one key of a
.jsonl. No pickle is ever loaded. A table has one row per example.
"""

import contextlib
import csv
import io
import json
import math
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from jprune.recall.inputs.raw import InputError, Raw, plain, together

_NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf(?:inity)?|nan)", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+(?:e[+-]?[0-9]+)?", re.IGNORECASE)
_PICKED = re.compile(r"^(?P<path>.+\.(?:npz|csv|tsv|jsonl|parquet)):(?P<name>[^/\\]+)$", re.IGNORECASE)
_SUFFIXES = (".npy", ".npz", ".csv", ".tsv", ".jsonl", ".parquet")
_LABELS = ("label", "labels")
_BLANK = "(blank line)"


class Table(NamedTuple):
    """A table as read.

    Attributes:
      frame: its columns, without those that identify the rows.
      ids: the identity of every row: the column asked for, or an index that is not a plain numbering.
      named_ids: whether ``ids`` was asked for.
      notes: on the encoding, or what stood in the place of an index.
    """

    frame: pd.DataFrame
    ids: np.ndarray | None
    named_ids: bool
    notes: tuple[str, ...]


def read_labels(file: str, class_names: Sequence[str] | None = None, id_column: str | None = None) -> Raw:
    """Read the true classes; of a table with several columns the one called label or labels.

    Args:
      file: ``PATH`` or ``PATH:NAME``.
      class_names: names of classes, which tell a header from a first row.
      id_column: name of the column that identifies the examples, or None.

    Raises:
      InputError: the file cannot be read, or it is not clear which column is meant.
    """
    path, name = _split(file)
    if _kind(path) in (".npy", ".npz"):
        return _raw_array(path, name, file, id_column, pick=_LABELS)
    table = _read_table(path, name, class_names, id_column=id_column)
    frame = table.frame
    if frame.shape[1] > 1:
        called = [column for column in frame.columns if str(column).lower() in _LABELS]
        if len(called) != 1:
            raise InputError(
                f"{path} has {frame.shape[1]} columns ({_some(frame.columns)}) and none or several called label: "
                f"say which one as {path}:NAME"
            )
        frame = frame[called]
    return _raw_table(file, path, table._replace(frame=frame))


def read_predictions(
    file: str, examples: int, class_names: Sequence[str] | None = None, id_column: str | None = None
) -> Raw:
    """Read predictions or logits.

    Args:
      file: ``PATH`` or ``PATH:NAME``.
      examples: number of labels; tells a header of column numbers from a first row.
      class_names: names of classes, which tell a header from a first row.
      id_column: name of the column that identifies the examples, or None.

    Raises:
      InputError: the file cannot be read, or a cell is missing.
    """
    path, name = _split(file)
    if _kind(path) in (".npy", ".npz"):
        return _raw_array(path, name, file, id_column)
    return _raw_table(file, path, _read_table(path, name, class_names, examples, id_column))


def read_groups(file: str, id_column: str | None = None) -> dict[str, Raw]:
    """Read attributes of the examples: the columns of a table, or the arrays of an .npz, by name.

    Missing cells stay missing; what they mean is decided where groups are made.

    Raises:
      InputError: the file cannot be read.
    """
    path, name = _split(file)
    if _kind(path) == ".npz" and name is None:
        with _opened(path) as archive:
            names = [each for each in archive.files if each != id_column]
        return {each: _raw_array(path, each, file, id_column) for each in names}
    if _kind(path) in (".npy", ".npz"):
        return {name or path.stem: _raw_array(path, name, file, id_column)}
    table = _read_table(path, name, id_column=id_column)
    cells = {str(column): table.frame[column].to_numpy(dtype=object) for column in table.frame.columns}
    return {
        column: Raw(file, values, by_row=True, ids=table.ids, named_ids=table.named_ids, notes=table.notes)
        for column, values in cells.items()
    }


def read_images(file: str) -> np.ndarray:
    """Read the images of the examples, (examples, height, width) or (examples, height, width, channels).

    Raises:
      InputError: the file cannot be read, or it is a table.
    """
    path, name = _split(file)
    if _kind(path) not in (".npy", ".npz"):
        raise InputError(f"{path}: images are read from .npy or .npz only")
    return _read_numpy(path, name)


def read_class_names(text: str) -> tuple[str, ...]:
    """Read class names: a comma-separated list (quote a name with a comma), or a text file with one name per line.

    Raises:
      InputError: the text ends in .txt and no such file can be read.

    >>> read_class_names('cat, "dog, big"')
    ('cat', 'dog, big')
    """
    if not text.lower().endswith(".txt"):
        return tuple(name.strip() for name in next(csv.reader([text], skipinitialspace=True), []))
    path = Path(text)
    try:
        lines = _decoded(path)[0].splitlines()
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


# Files ------------------------------------------------------------------------------------------------


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
    if suffix not in _SUFFIXES:
        raise InputError(f"{path} has the suffix {suffix!r}; use {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}")
    return suffix


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open an .npz without ever unpickling."""
    with path.open("rb") as file:
        try:
            archive = np.load(file, allow_pickle=False)
        except Exception as error:  # whatever a decoder stumbles over, the file is what is broken
            raise InputError(f"{path} is not a readable .npz: {_reason(error)}") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path} is not an .npz: it holds a single array without a name; call it .npy")
        yield archive


def _read_numpy(path: Path, name: str | None, pick: Sequence[str] = (), without: str | None = None) -> np.ndarray:
    if _kind(path) == ".npy":
        try:
            return np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # as above
            raise InputError(f"{path} is not a readable .npy: {_reason(error)}") from error
    with _opened(path) as archive:
        names = [each for each in archive.files if each != without]
        usual = [each for each in names if each.lower() in pick]
        if name is None and len(names) != 1 and len(usual) == 1:
            name = usual[0]
        if name is None and len(names) != 1:
            raise InputError(f"{path} has {len(names)} arrays ({_some(names)}): say which one as {path}:NAME")
        if name is not None and name not in archive.files:
            raise InputError(f"{path} has no array {name!r}; it has {_some(names)}")
        try:
            return np.asarray(archive[names[0] if name is None else name])
        except Exception as error:  # as above
            raise InputError(f"{path} has an unreadable array {name or names[0]!r}: {_reason(error)}") from error


def _raw_array(path: Path, name: str | None, file: str, id_column: str | None, pick: Sequence[str] = ()) -> Raw:
    values = _read_numpy(path, name, pick, id_column)
    ids = None
    if id_column is not None:
        if _kind(path) == ".npy":
            raise InputError(f"{path} is an .npy and has no ids: --id needs tables, or .npz files with an array of ids")
        ids = _identities(_read_numpy(path, id_column).tolist())
    if values.dtype.kind == "U":
        values = np.array([str(cell).strip() for cell in values.ravel()], object).reshape(values.shape)
    elif values.dtype.kind not in "iufb" and values.dtype.name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        raise InputError(f"{file} must hold numbers or class names, got dtype {values.dtype}")
    return Raw(file, values, ids=ids, named_ids=ids is not None)


def _raw_table(file: str, path: Path, table: Table) -> Raw:
    columns = [_column(table.frame[name], f"{path}, column {str(name)!r}") for name in table.frame.columns]
    names = tuple(map(str, table.frame.columns))
    return Raw(file, together(columns, names, str(path)), True, names, table.ids, table.named_ids, table.notes)


def _column(cells: "pd.Series[Any]", where: str) -> np.ndarray:
    """A column as numbers where all cells are, else as text."""
    missing = cells.isna().to_numpy()
    if missing.any():
        raise InputError(f"{where} has no number at example {int(missing.argmax())}: the cell is missing")
    if not pd.api.types.is_object_dtype(cells) and not pd.api.types.is_string_dtype(cells):
        return plain(cells, where)
    if any(isinstance(cell, list | dict) for cell in cells):
        raise InputError(f"{where} holds lists; give each its own column, or one list of numbers per line in a .jsonl")
    texts = [str(cell).strip() for cell in cells.tolist()]
    for example, text in enumerate(texts):
        if text in ("", _BLANK):
            raise InputError(f"{where} holds {text!r} at example {example}; wanted a number or a class name")
    if all(_NUMBER.fullmatch(text) for text in texts):
        whole = all(re.fullmatch(r"[+-]?[0-9]{1,15}", text) for text in texts)
        return np.array([int(t) for t in texts], np.int64) if whole else np.array([float(t) for t in texts])
    if {text.lower() for text in texts} <= {"true", "false"}:
        return np.array([text.lower() == "true" for text in texts])
    numbers = [bool(_NUMBER.fullmatch(text)) for text in texts]
    if any(numbers):
        odd = numbers.index(False) if sum(numbers) * 2 > len(numbers) else numbers.index(True)
        kind = "text among numbers" if not numbers[odd] else "a number among class names"
        raise InputError(f"{where} holds {texts[odd]!r} at example {odd}, {kind}; wanted numbers, or names throughout")
    return np.array(texts, object)


# Tables -----------------------------------------------------------------------------------------------


def _read_table(
    path: Path,
    name: str | None,
    class_names: Sequence[str] | None = None,
    examples: int | None = None,
    id_column: str | None = None,
) -> Table:
    notes: tuple[str, ...] = ()
    try:
        if _kind(path) == ".parquet":
            table = pd.read_parquet(path, engine="pyarrow")
        elif _kind(path) == ".jsonl":
            table, notes = _read_jsonl(path, name)
            name = None if name is not None and name not in table.columns else name
        else:
            table, notes = _read_csv(path, class_names, examples)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{path}: parquet needs pyarrow: pip install 'jprune[report]'") from error
    except Exception as error:  # as above
        raise InputError(f"{path} is not a readable {_kind(path)}: {_reason(error)}") from error
    if table.empty:
        raise InputError(f"{path} holds no example")
    table, ids = _without_ids(table, path, id_column)
    if name is not None:
        if name not in table.columns:
            raise InputError(f"{path} has no column {name!r}; it has {_some(table.columns)}")
        table = table[[name]]
    if table.shape[1] == 0:
        raise InputError(f"{path} has no column but the ids")
    return Table(table.reset_index(drop=True), ids, id_column is not None, notes)


def _without_ids(table: pd.DataFrame, path: Path, id_column: str | None) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Split off what identifies the rows: the column asked for, or an index."""
    if id_column is not None:
        if id_column in table.columns:
            return table.drop(columns=[id_column]), _identities(table[id_column].tolist())
        if table.index.name == id_column:
            return table, _identities(table.index.tolist())
        raise InputError(f"{path} has no column {id_column!r} for --id; it has {_some(table.columns)}")
    first = table.columns[0]
    if table.shape[1] > 1 and str(first).strip() in ("", "Unnamed: 0", "rownames"):
        cells = table[first].tolist()
        if len(set(cells)) == len(cells) and table[first].dtype.kind != "f":
            table = table.drop(columns=[first]).set_axis(pd.Index(cells), axis=0)
    index = _identities(table.index.tolist())
    start = index[0] if len(index) else ""
    numbered = start in ("0", "1") and index.tolist() == [str(int(start) + n) for n in range(len(index))]
    return table, None if numbered or len(set(index.tolist())) < len(index) else index


def _identities(cells: Sequence[Any]) -> np.ndarray:
    """Ids as text, so that 7, 7.0 and '7' are one id."""
    whole = [int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in cells]
    return np.array([str(cell).strip() for cell in whole], object)


def _read_jsonl(path: Path, name: str | None) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Read one JSON value per line: a number or text, a list, or an object of them."""
    rows, notes = _json_lines(path)
    if all(isinstance(row, dict) for row in rows):
        keys = list(rows[0])
        odd = next((n for n, row in enumerate(rows) if set(row) != set(keys)), None)
        if odd is not None:
            raise InputError(f"{path} has other keys in line {odd + 1} than in line 1: {_some(list(rows[odd]))}")
        chosen = keys if name is None else [name]
        if name is not None and name not in keys:
            raise InputError(f"{path} has no key {name!r}; it has {_some(keys)}")
        if len(chosen) == 1 and isinstance(rows[0][chosen[0]], list):
            rows = [row[chosen[0]] for row in rows]
        else:
            return pd.DataFrame({key: [row[key] for row in rows] for key in keys}), notes
    if all(isinstance(row, list) for row in rows):
        odd = next((n for n, row in enumerate(rows) if len(row) != len(rows[0])), None)
        if odd is not None:
            raise InputError(f"{path} has {len(rows[odd])} values in line {odd + 1} and {len(rows[0])} in line 1")
        return pd.DataFrame(rows).rename(columns=str), notes
    if any(isinstance(row, dict | list) or row is None for row in rows):
        raise InputError(f"{path} mixes numbers, lists and objects among its lines, or has a null")
    return pd.DataFrame({"values": rows}), notes


def _json_lines(path: Path) -> tuple[list[Any], tuple[str, ...]]:
    text, notes = _decoded(path)
    lines = text.rstrip().splitlines()
    rows = []
    for number, line in enumerate(lines):
        if not line.strip():
            raise InputError(f"{path} has a blank line {number + 1} between examples")
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise InputError(f"{path} is not a readable .jsonl: line {number + 1}: {_reason(error)}") from error
    if not rows:
        raise InputError(f"{path} holds no example")
    return rows, notes


def _decoded(path: Path) -> tuple[str, tuple[str, ...]]:
    """The text of a file, and a note where it is not UTF-8."""
    content = path.read_bytes()
    encoding, notes = _encoding(content, path)
    return content.decode(encoding), notes


def _encoding(content: bytes, path: Path) -> tuple[str, tuple[str, ...]]:
    """How a file is encoded: UTF-8, UTF-16 by its mark, else Latin-1, which is named."""
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        content.decode("utf-16")
        return "utf-16", (f"{path} was read as UTF-16",)
    if b"\0" in content:
        raise InputError(f"{path} holds NUL bytes: it is not text, or UTF-16 without a mark; save it as UTF-8")
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if not any(part.isalpha() for part in content.decode("latin-1")):
            raise InputError(f"{path} is not text in UTF-8, UTF-16 or Latin-1") from None
        return "latin-1", (f"{path} is not UTF-8 and was read as Latin-1: check the letters with accents",)
    return "utf-8-sig", ()


def _read_csv(
    path: Path, class_names: Sequence[str] | None, examples: int | None
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Read a delimited table; its first row is a header where a cell is neither a number nor a class name.

    A first row 0, 1, 2, ... may be a header of column numbers: it is one where there is a row too many. A header
    with one name fewer than the rows have cells is R's: the first column has the names of the rows.
    """
    text, notes = _decoded(path)
    text = text.rstrip("\r\n") + "\n" if text.strip() else ""
    if text[:1] in "\r\n" and text:
        raise InputError(f"{path} begins with a blank line; wanted a header or the first example")
    if not text:
        raise InputError(f"{path} is not a readable {path.suffix.lower()}: it is empty")
    delimiter = _delimiter(text, path)
    space = delimiter == " "
    sample = _sample(text, delimiter)
    first, second = sample[0], sample[1] if len(sample) > 1 else None
    comma = (
        not space
        and delimiter != ","
        and any(_DECIMAL_COMMA.fullmatch(cell) for row in sample[1:] or sample for cell in row)
    )
    number = (lambda cell: bool(_DECIMAL_COMMA.fullmatch(cell)) or _is_number(cell)) if comma else _is_number
    header = not all(number(cell) or cell in (class_names or ()) for cell in first)
    if header and second is not None and len(first) == len(second):
        below = {cell for row in sample[1:] for cell in row}
        header = not all(number(cell) or cell in below for cell in first)  # names of classes, not of columns
    repeated = [cell for cell in first if first.count(cell) > 1] if header else []
    if repeated:
        raise InputError(f"{path} has the column {repeated[0]!r} twice")
    names = list(first) if header else [str(n) for n in range(len(first))]
    row_names = header and second is not None and len(second) == len(first) + 1
    if row_names:
        names = ["", *names]
    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            table = pd.read_csv(
                io.StringIO(text),
                sep=r"\s+" if space else delimiter,
                header=0 if header else None,
                names=names,
                index_col=False,
                keep_default_na=False,
                skipinitialspace=True,
                skip_blank_lines=False,
                decimal="," if comma else ".",
                low_memory=False,
            )
        except pd.errors.ParserWarning as error:
            raise InputError(
                f"{path} is not a readable {path.suffix.lower()}: a row has more cells than the header has "
                f"names ({len(first)})"
            ) from error
    blank = (table.isna() | (table == "")).all(axis=1).to_numpy() if table.shape[1] else np.zeros(0, bool)
    if blank.any():
        row = int(blank.argmax())
        label = names[0] if table.shape[1] == 1 else ""
        where = f"{path}, column {label!r}" if label else str(path)
        raise InputError(f"{where} holds '' at example {row}: the line is blank; wanted a number or a class name")
    if not header and examples is not None and len(first) > 1 and first == [str(n) for n in range(len(first))]:
        if len(table) == examples + 1:
            return table.iloc[1:].reset_index(drop=True), notes
        if len(first) > 2:
            raise InputError(
                f"{path} begins with the row 0, 1, ... {len(first) - 1}: a header of column numbers, or predictions? "
                f"Give the columns names, or save them without a header"
            )
    if row_names and table[""].duplicated().any():
        raise InputError(
            f"{path} has {len(first)} names in its header and {len(first) + 1} cells in its rows, and the "
            f"first column is not a list of row names"
        )
    return table, notes


def _delimiter(text: str, path: Path) -> str:
    """Tab, semicolon, comma or blanks, by the first row (outside quotes)."""
    lines = text.split("\n", 2)[:2]
    bare = re.sub(r'"[^"]*"', "", lines[0])
    if path.suffix.lower() == ".tsv" or "\t" in bare:
        return "\t"
    if ";" in bare:
        return ";"
    if "," in bare:
        return ","
    below = lines[1].split() if len(lines) > 1 else []
    if len(below) > 1 and all(map(_is_number, below[1:])) and len(bare.split() or lines[0].split()) + 1 >= len(below):
        return " "
    return ","


def _sample(text: str, delimiter: str, most: int = 200) -> list[list[str]]:
    """The cells of the first rows, without the blanks around them."""
    lines = io.StringIO(text)
    if delimiter == " ":
        return [line.replace('"', "").split() for line, _ in zip(lines, range(most), strict=False)]
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    return [[cell.strip() for cell in row] for row, _ in zip(rows, range(most), strict=False)]


def _is_number(cell: str) -> bool:
    """Whether a cell is a number as files write it; Python's float also takes 1_0 and digits of other scripts."""
    return _NUMBER.fullmatch(cell.strip()) is not None


def _some(names: Any, most: int = 8) -> str:
    shown = [str(name) for name in list(names)[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def _reason(error: BaseException) -> str:
    """An error in one line; a foreign decoder's message may be long or empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
