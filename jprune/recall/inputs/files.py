"""Labels, predictions, groups and images from files: .npy, .npz, .csv, .tsv, .json, .jsonl and .parquet.

All but .parquet may be compressed with gzip (.csv.gz). A file is named ``PATH``, or ``PATH:NAME`` to pick one array of
an .npz, one column of a table or one key of JSON. Pickles are never loaded. A table has one row per example.
"""

import contextlib
import csv
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from jprune._extras import missing
from jprune.recall.inputs.raw import (
    USUAL_MISSING,
    FrameCell,
    InputError,
    Raw,
    cleaned,
    decoded,
    lists_as_columns,
    option,
    plain,
    refuse_two_spellings,
    together,
)
from jprune.recall.inputs.rows import ID_NAMES
from jprune.recall.inputs.text import (
    DECIMAL_COMMA,
    NUMBER,
    content,
    decoded_text,
    read_csv,
    read_json,
    reason,
    refuse_repeated,
    some,
    suffix,
)

_PICKED = re.compile(r"^(?P<path>.+\.(?:(?:npz|csv|tsv|jsonl?)(?:\.gz)?|parquet)):(?P<name>[^/\\]+)$", re.IGNORECASE)
_SUFFIXES = (".npy", ".npz", ".csv", ".tsv", ".json", ".jsonl", ".parquet")
_PICKLED = (".pt", ".pth", ".pkl", ".pickle", ".joblib", ".bin")
_SHEETS = (".xlsx", ".xls", ".ods")
_LABELS = ("label", "labels")
_NOT_PREDICTED = {
    "true classes": {"label", "labels", "target", "targets", "true", "truth", "y_true", "true_label", "ground_truth"},
    "ids": ID_NAMES,
}
_THOUSANDS = re.compile(r"[+-]?[0-9]{1,3}([.,' ][0-9]{3})+([.,][0-9]+)?")
_PERCENT = re.compile(r"[+-]?[0-9]+([.,][0-9]+)? ?%")
_BLANK = "(blank line)"
_FEWEST_ROWS = 20  # in which a column of predictions surely repeats a class


class Table(NamedTuple):
    """A table as read.

    Attributes:
      frame: its columns, without those that identify the rows.
      ids: the identity of every row: the column asked for, or an index that is not a plain numbering.
      named_ids: whether ``ids`` was asked for.
      notes: on the encoding, or what stood in the place of an index.
      keys: columns that are called like ids, or differ in every row and were not picked, where no column was asked for.
    """

    frame: pd.DataFrame
    ids: np.ndarray | None
    named_ids: bool
    notes: tuple[str, ...]
    keys: Mapping[str, np.ndarray]


def read_labels(file: str, class_names: Sequence[str] | None = None, id_column: str | None = None) -> Raw:
    """Read the true classes; of a table with several columns the one called label or labels.

    Args:
      file: ``PATH`` or ``PATH:NAME``.
      class_names: names of classes, which distinguish a header from a first row.
      id_column: name of the column that identifies the examples, or None.

    Raises:
      InputError: the file cannot be read, or it is not clear which column is meant.
    """
    path, name = _split(file)
    if _kind(path) in (".npy", ".npz"):
        return _raw_array(path, name, file, id_column, pick=_LABELS)
    table = _read_table(path, name, class_names, id_column=id_column)
    frame = table.frame
    one_hot = frame.shape[1] > 2 and frame.isin([0, 1]).all(axis=None) and (frame.sum(axis=1) == 1).all()
    if one_hot and not any(str(column).lower() in _LABELS for column in frame.columns):
        columns = tuple(map(str, frame.columns))
        values = frame.to_numpy(np.int64)
        return Raw(file, values, True, columns, table.ids, table.named_ids, table.notes, keys=table.keys)
    if frame.shape[1] > 1:
        called = [column for column in frame.columns if str(column).lower() in _LABELS]
        if len(called) != 1:
            raise InputError(
                f"{path} has {frame.shape[1]} columns ({some(frame.columns)}), and not exactly one called label: "
                f"pick one as {path}:NAME"
            )
        table = _with_keys(table, frame.drop(columns=called), path)
        frame = frame[called]
    return _raw_table(file, path, table._replace(frame=frame), class_names)


def read_predictions(
    file: str, examples: int, class_names: Sequence[str] | None = None, id_column: str | None = None
) -> Raw:
    """Read predictions or logits.

    Args:
      file: ``PATH`` or ``PATH:NAME``.
      examples: number of labels; distinguishes a header of column numbers from a first row.
      class_names: names of classes, which distinguish a header from a first row.
      id_column: name of the column that identifies the examples, or None.

    Raises:
      InputError: the file cannot be read, or a cell is missing.
    """
    path, name = _split(file)
    if _kind(path) in (".npy", ".npz"):
        return _raw_array(path, name, file, id_column, models=True)
    table = _read_table(path, name, class_names, examples, id_column)
    if table.frame.shape[1] > 1:
        _refuse_other_columns(table.frame, path)
    return _raw_table(file, path, table, class_names)


def _refuse_other_columns(frame: pd.DataFrame, path: Path) -> None:
    """Refuse a table of predictions with a column that is called like labels or ids: it would count as a model."""
    never = frozenset().union(*_NOT_PREDICTED.values())
    unique = [not pd.api.types.is_float_dtype(frame[column]) and _is_unique(frame[column]) for column in frame.columns]
    if len(frame) < _FEWEST_ROWS:
        unique = [False] * len(unique)
    others = [str(c) for c, ids in zip(frame.columns, unique, strict=True) if not ids]
    pick = next((name for name in others if name.strip().lower() not in never), "NAME")
    for kind, usual in _NOT_PREDICTED.items():
        for column in frame.columns:
            if str(column).strip().lower() in usual and not pd.api.types.is_float_dtype(frame[column]):
                ids = f", name the ids with --id {column}" if kind == "ids" else ""
                raise InputError(
                    f"{path} has a column {str(column)!r}, which looks like {kind} and not like predictions: pick one "
                    f"column of predictions as {path}:{pick}{ids}, or keep only the columns of predictions"
                )
    if any(unique) and not all(unique):
        column = frame.columns[unique.index(True)]
        raise InputError(
            f"{path} has a different value in every row of column {str(column)!r}, which looks like ids and not like "
            f"predictions: keep only the columns of predictions, or name the columns and give the ids with --id"
        )


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
        column: Raw(file, values, True, (), table.ids, table.named_ids, table.notes, keys=table.keys)
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
      InputError: the text ends in .txt and the file cannot be read.

    >>> read_class_names('cat, "dog, big"')
    ('cat', 'dog, big')
    """
    if not text.lower().endswith(".txt"):
        return tuple(name.strip() for name in next(csv.reader([text], skipinitialspace=True), []))
    path = Path(text)
    try:
        lines = decoded_text(path)[0].splitlines()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read as text: {reason(error)}") from error
    return tuple(line.strip() for line in lines if line.strip())


# Files ------------------------------------------------------------------------------------------------


def _split(file: str) -> tuple[Path, str | None]:
    """Split ``PATH:NAME``; an existing file whose name contains a colon takes precedence."""
    picked = _PICKED.match(file)
    path, name = (Path(picked["path"]), picked["name"]) if picked and not Path(file).exists() else (Path(file), None)
    if not path.is_file():
        raise InputError(f"{path} does not exist; check the path" if not path.exists() else f"{path} is not a file")
    _kind(path)
    return path, name


def _kind(path: Path) -> str:
    kind = suffix(path)
    compressed = path.suffix.lower() == ".gz"
    if kind not in _SUFFIXES or (compressed and kind == ".parquet"):
        advice = "; pickles are never loaded: save the array with numpy.save" if kind in _PICKLED else ""
        advice = "; save the sheet as .csv" if kind in _SHEETS else advice
        shown = kind + path.suffix if compressed else kind
        raise InputError(
            f"{path} has the suffix {shown!r}; use {', '.join(_SUFFIXES[:-1])} (or these with .gz) or .parquet{advice}"
        )
    return kind


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[np.lib.npyio.NpzFile]:
    """Open an .npz without ever unpickling."""
    with path.open("rb") as file:
        try:
            given = io.BytesIO(content(path)) if path.suffix.lower() == ".gz" else file
            archive = np.load(given, allow_pickle=False)
        except Exception as error:  # whatever a decoder stumbles over, the file is what is broken
            raise InputError(f"{path} is not a readable .npz: {reason(error)}") from error
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise InputError(f"{path} is not an .npz: it contains a single array without a name; call it .npy")
        yield archive


def _read_numpy(
    path: Path, name: str | None, pick: Sequence[str] = (), without: str | None = None, *, models: bool = False
) -> np.ndarray:
    if _kind(path) == ".npy":
        try:
            if path.suffix.lower() == ".gz":
                return np.asarray(np.load(io.BytesIO(content(path)), allow_pickle=False))
            return np.lib.format.open_memmap(path, mode="r")
        except Exception as error:  # as above
            if "Python objects" in str(error):
                raise InputError(f"{path} contains Python objects: save names as text, np.array(names, str)") from error
            raise InputError(f"{path} is not a readable .npy: {reason(error)}") from error
    with _opened(path) as archive:
        names = [each for each in archive.files if each != without]
        usual = [each for each in names if each.lower() in pick]
        if name is None and len(names) != 1 and len(usual) == 1:
            name = usual[0]
        if name is None and len(names) != 1:
            advice = (
                f"; if each array is a model, repeat the option for each of them ({path}:{names[0]}, then "
                f"{path}:{names[1]}), or save one array of shape (models, examples, ...) with numpy.stack"
                if models and names
                else ""
            )
            raise InputError(f"{path} has {len(names)} arrays ({some(names)}): pick one as {path}:NAME{advice}")
        if name is not None and name not in archive.files:
            raise InputError(f"{path} has no array {name!r}; it has {some(names)}")
        try:
            return np.asarray(archive[names[0] if name is None else name])
        except Exception as error:  # as above
            raise InputError(f"{path} has an unreadable array {name or names[0]!r}: {reason(error)}") from error


def _raw_array(
    path: Path, name: str | None, file: str, id_column: str | None, pick: Sequence[str] = (), *, models: bool = False
) -> Raw:
    values = _read_numpy(path, name, pick, id_column, models=models)
    ids = None
    if id_column is not None:
        if _kind(path) == ".npy":
            raise InputError(f"{path} is an .npy and has no ids: --id needs tables, or .npz files with an array of ids")
        given = _read_numpy(path, id_column)
        given = given.ravel() if given.ndim == 2 and 1 in given.shape else given
        if given.ndim != 1:
            raise InputError(f"{path} has ids {id_column!r} of shape {given.shape}; expected (examples,)")
        ids = _identities(given.tolist(), path)
    if values.dtype.kind == "S":
        values = decoded(values, file)
    if values.ndim == 0:
        raise InputError(f"{file} contains a single value, {values}; an array with an entry per example is needed")
    if values.dtype.kind == "U":
        values = np.array([cleaned(cell) for cell in values.ravel()], object).reshape(values.shape)
    elif values.dtype.kind not in "iufb":
        # numpy.save writes bfloat16 as two bytes without a type
        advice = "; save bfloat16 as .astype(np.float32)" if values.dtype == np.dtype("V2") else ""
        raise InputError(f"{file} must contain numbers or class names, got dtype {values.dtype}{advice}")
    keys = _keys_of_arrays(path) if id_column is None and _kind(path) == ".npz" else {}
    return Raw(file, values, ids=ids, named_ids=ids is not None, keys=keys)


def _keys_of_arrays(path: Path) -> dict[str, np.ndarray]:
    """The vectors of an .npz that are called like ids or have another value for every example; others are not read."""
    keys: dict[str, np.ndarray] = {}
    with _opened(path) as archive:
        for name in archive.files:
            with contextlib.suppress(Exception):  # nobody asked for it
                assert archive.zip is not None
                with archive.zip.open(f"{name}.npy") as member:
                    np.lib.format.read_magic(member)
                    shape, _, dtype = np.lib.format.read_array_header_1_0(member)
                if len(shape) == 1 and dtype.kind in "USiuf":
                    cells = pd.Series(archive[name])
                    keys |= _keys({name: cells} if _called_ids(name) or _is_unique(cells) else {}, path)
    return keys


def _raw_table(file: str, path: Path, table: Table, class_names: Sequence[str] | None) -> Raw:
    known = frozenset(cleaned(name) for name in class_names or ())
    names = tuple(map(str, table.frame.columns))
    if len(names) == 1:
        rows = lists_as_columns(table.frame.iloc[:, 0], f"{path}, column {names[0]!r}")
        if rows is not None:
            return Raw(file, rows, True, (), table.ids, table.named_ids, table.notes, keys=table.keys)
    columns = [_column(table.frame[name], f"{path}, column {str(name)!r}", known) for name in table.frame.columns]
    pick = f", name a column of ids with --id, or pick a single column with {path}:NAME"
    values = together(columns, names, str(path), pick)
    return Raw(file, values, True, names, table.ids, table.named_ids, table.notes, keys=table.keys)


def _column(cells: pd.Series, where: str, class_names: frozenset[str]) -> np.ndarray:
    """A column as numbers where all cells are, else as text; as text also where only some class names are numbers."""
    missing = cells.isna().to_numpy()
    if missing.any():
        raise InputError(f"{where} has no value at example {int(missing.argmax())}: the cell is missing")
    if not pd.api.types.is_object_dtype(cells) and not pd.api.types.is_string_dtype(cells):
        return plain(cells, where)
    if any(isinstance(cell, dict) for cell in cells):
        raise InputError(f"{where} contains objects: save the predicted class itself")
    if any(isinstance(cell, list | np.ndarray) for cell in cells):
        raise InputError(
            f"{where} contains lists next to other columns; pick this column as PATH:NAME, or save it alone"
        )
    texts = [cleaned(cell, where) for cell in cells.tolist()]
    for example, text in enumerate(texts):
        if text in ("", _BLANK):
            raise InputError(f"{where} contains {text!r} at example {example}; expected a number or a class name")
    if not all(map(NUMBER.fullmatch, class_names)) and class_names >= set(texts):
        return np.array(texts, object)
    if all(NUMBER.fullmatch(text) for text in texts):
        whole = all(re.fullmatch(r"[+-]?[0-9]{1,15}", text) for text in texts)
        if whole:
            refuse_two_spellings(texts, where)
        return np.array([int(t) for t in texts], np.int64) if whole else np.array([float(t) for t in texts])
    if {text.lower() for text in texts} <= {"true", "false"}:
        return np.array([text.lower() == "true" for text in texts])
    _refuse_mixed(texts, where)
    return np.array(texts, object)


def _refuse_mixed(texts: Sequence[str], where: str) -> None:
    """Refuse text of which some is a number, or looks like one."""
    numbers = [bool(NUMBER.fullmatch(text)) for text in texts]
    for pattern, what in ((_THOUSANDS, "thousands separators"), (_PERCENT, "percent signs")):
        at = next((example for example, text in enumerate(texts) if pattern.fullmatch(text)), None)
        if at is not None and all(
            n or pattern.fullmatch(t) or DECIMAL_COMMA.fullmatch(t) for n, t in zip(numbers, texts, strict=True)
        ):
            raise InputError(f"{where} contains {texts[at]!r} at example {at}: save numbers without {what}")
    at = next((example for example, text in enumerate(texts) if DECIMAL_COMMA.fullmatch(text)), None)
    if at is not None and all(n or DECIMAL_COMMA.fullmatch(t) for n, t in zip(numbers, texts, strict=True)):
        raise InputError(
            f"{where} contains {texts[at]!r} at example {at}: save numbers with a decimal point, or separate the "
            "columns by semicolons; the audit takes one label per example, not a list of labels"
        )
    others = [n for n, text in zip(numbers, texts, strict=True) if text.lower() not in USUAL_MISSING]
    if any(numbers) and len(others) < len(texts) and len({*others}) < 2:
        at = next(example for example, text in enumerate(texts) if text.lower() in USUAL_MISSING)
        raise InputError(
            f"{where} contains {texts[at]!r} at example {at}, which marks a missing value: leave the example out of "
            f"all files, or pass {option('class_names')} if it is a class"
        )
    if any(numbers):
        odd = numbers.index(False) if sum(numbers) * 2 > len(numbers) else numbers.index(True)
        kind = "text among numbers" if not numbers[odd] else "a number among class names"
        raise InputError(
            f"{where} contains {texts[odd]!r} at example {odd}, {kind}; expected numbers or names, "
            f"or {option('class_names')} where some names are numbers"
        )


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
            table = _read_parquet(path)
        elif _kind(path) in (".json", ".jsonl"):
            table, notes = read_json(path, name)
            name = None if name is not None and name not in table.columns else name
        else:
            table, notes = read_csv(path, class_names, examples, id_column)
    except InputError:
        raise
    except ImportError as error:
        raise InputError(f"{path}: {missing('parquet needs pyarrow', 'report')}") from error
    except Exception as error:  # as above
        raise InputError(f"{path} is not a readable {_kind(path)}: {reason(error)}") from error
    if table.empty:
        raise InputError(f"{path} contains no example")
    table, ids = _without_ids(table, path, id_column)
    called = [column for column in table.columns if id_column is None and _called_ids(column)]
    keys = _keys({column: table[column] for column in called}, path)
    if name is not None:
        if name not in table.columns:
            raise InputError(f"{path} has no column {name!r}; it has {some(table.columns)}")
        others, table = table.drop(columns=[name]), table[[name]]
    if table.shape[1] == 0:
        raise InputError(f"{path} has no column but the ids")
    read = Table(table.reset_index(drop=True), ids, id_column is not None, notes, keys)
    return read if name is None else _with_keys(read, others, path)


def _read_parquet(path: Path) -> pd.DataFrame:
    import pyarrow.parquet  # noqa: PLC0415 an extra

    refuse_repeated(pyarrow.parquet.read_schema(path).names, path, "column")
    return pd.read_parquet(path, engine="pyarrow")


def _without_ids(table: pd.DataFrame, path: Path, id_column: str | None) -> tuple[pd.DataFrame, np.ndarray | None]:
    """Split off what identifies the rows: the column asked for, or an index."""
    if id_column is not None:
        if id_column in table.columns:
            return table.drop(columns=[id_column]), _identities(table[id_column].tolist(), path)
        if table.index.name == id_column:
            return table, _identities(table.index.tolist(), path)
        raise InputError(f"{path} has no column {id_column!r} for --id; it has {some(table.columns)}")
    first = table.columns[0]
    if table.shape[1] > 1 and str(first).strip() in ("", "Unnamed: 0", "rownames"):
        cells = table[first].tolist()
        if len(set(cells)) == len(cells) and table[first].dtype.kind != "f":
            table = table.drop(columns=[first]).set_axis(pd.Index(cells), axis=0)
    index = _identities(table.index.tolist(), path)
    return table, None if _numbered(index) or len(set(index.tolist())) < len(index) else index


def _with_keys(table: Table, others: pd.DataFrame, path: Path) -> Table:
    """Add the columns that were not picked and differ in every row, where no column of ids was asked for."""
    unique = {name: others[name] for name in others.columns if not table.named_ids and _is_unique(others[name])}
    return table._replace(keys=_keys(unique, path) | dict(table.keys))


def _is_unique(cells: pd.Series) -> bool:
    """Whether all values of a column are different; lists and objects have no hash and are not compared."""
    try:
        return bool(cells.is_unique)
    except TypeError:
        return False


def _keys(columns: Mapping[FrameCell, FrameCell], path: Path) -> dict[str, np.ndarray]:
    """Columns as ids, by name; without those in which a cell is missing or no text."""
    found: dict[str, np.ndarray] = {}
    for name, cells in columns.items():
        with contextlib.suppress(InputError):  # nobody asked for it
            ids = _identities(cells.tolist(), path)
            found[str(name)] = np.arange(len(ids)).astype(str) if _numbered(ids) else ids
    return found


def _called_ids(name: object) -> bool:
    return str(name).strip().lower() in ID_NAMES


def _numbered(ids: np.ndarray) -> bool:
    """Whether ids are the numbers of the rows, from 0 or from 1."""
    start = ids[0] if len(ids) else ""
    return start in ("0", "1") and ids.tolist() == [str(int(start) + n) for n in range(len(ids))]


def _identities(cells: Sequence[FrameCell], path: Path) -> np.ndarray:
    """Ids as text, so that 7, 7.0 and '7' are one id."""
    whole = [int(cell) if isinstance(cell, float) and cell.is_integer() else cell for cell in cells]
    texts = ["" if pd.isna(cell) else cleaned(cell, f"{path}, among the ids,") for cell in whole]
    if "" in texts:
        raise InputError(f"{path} has no id at example {texts.index('')}")
    return np.array(texts, object)
