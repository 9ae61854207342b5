"""Read delimited text, .json and .jsonl as tables; encodings, delimiters, decimal commas and headers are detected."""

import collections
import csv
import functools
import gzip
import io
import json
import re
import warnings
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

from jprune.recall.inputs.raw import InputError, refuse_two_spellings

Json: TypeAlias = Any  # a value read from JSON: None, a bool, a number, a text, a list or a dict

_EMPTY = "(empty column)"
NUMBER = re.compile(r"[+-]?(?:(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?|inf(?:inity)?|nan)", re.IGNORECASE)
_LEADING_ZERO = re.compile(r'(?:^|[,;|\s"])[+-]?0[0-9]', re.MULTILINE)
_SAMPLED = 200  # rows by which the delimiter and the header are recognized
DECIMAL_COMMA = re.compile(r"[+-]?[0-9]+,[0-9]+(?:e[+-]?[0-9]+)?", re.IGNORECASE)


def suffix(path: Path) -> str:
    """Return the suffix in lower case, without ``.gz``.

    >>> suffix(Path("labels.CSV.gz"))
    '.csv'
    """
    return (path.with_suffix("") if path.suffix.lower() == ".gz" else path).suffix.lower()


def content(path: Path) -> bytes:
    """Return the bytes of a file, decompressed if it ends in ``.gz``."""
    compressed = path.read_bytes()
    return gzip.decompress(compressed) if path.suffix.lower() == ".gz" else compressed


def read_json(path: Path, name: str | None) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Read JSON values, one per line or (.json) in one list: a number or text, a list, or an object of them."""
    rows, notes = _json_list(path) if suffix(path) == ".json" else _json_lines(path)
    where = "line" if suffix(path) == ".jsonl" else "entry"
    if all(isinstance(row, dict) for row in rows):
        keys = list(rows[0])
        odd = next((n for n, row in enumerate(rows) if set(row) != set(keys)), None)
        if odd is not None:
            raise InputError(f"{path} has other keys in {where} {odd + 1} than in {where} 1: {some(list(rows[odd]))}")
        if name is not None and name not in keys:
            raise InputError(f"{path} has no key {name!r}; it has {some(keys)}")
        if len(keys) == 1 and isinstance(rows[0][keys[0]], list):
            rows = [row[keys[0]] for row in rows]
        else:
            return pd.DataFrame({key: [row[key] for row in rows] for key in keys}), notes
    elif name is not None:
        raise InputError(f"{path} has no key {name!r}, because its entries are not objects; leave the name out")
    if all(isinstance(row, list) for row in rows):
        odd = next((n for n, row in enumerate(rows) if len(row) != len(rows[0])), None)
        if odd is not None:
            raise InputError(f"{path} has {len(rows[odd])} values in {where} {odd + 1} and {len(rows[0])} in {where} 1")
        return pd.DataFrame(rows).rename(columns=str), notes
    if any(isinstance(row, dict | list) or row is None for row in rows):
        raise InputError(f"{path} mixes numbers, lists and objects among its entries, or has a null")
    return pd.DataFrame({"values": rows}), notes


def refuse_repeated(names: Sequence[str], path: Path, kind: str) -> None:
    """Raise InputError if a name is repeated; ``kind`` is what the names are of."""
    repeated = [name for name, count in collections.Counter(names).items() if count > 1]
    if repeated:
        raise InputError(f"{path} has the {kind} {repeated[0]!r} twice; rename or drop all but one")


def _json_list(path: Path) -> tuple[list[Json], tuple[str, ...]]:
    text, notes = decoded_text(path)
    try:
        rows = json.loads(text, object_pairs_hook=functools.partial(_object, path))
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"{path} is not a readable .json: {reason(error)}; with a value per line call it .jsonl"
        ) from error
    if isinstance(rows, dict):
        rows = _columns_of_pandas(rows)
    if isinstance(rows, dict) and all(isinstance(column, list) for column in rows.values()) and rows:
        sizes = {key: len(column) for key, column in rows.items()}
        if len(set(sizes.values())) > 1:
            raise InputError(f"{path} has lists of different lengths: {some([f'{k} {n}' for k, n in sizes.items()])}")
        rows = [dict(zip(rows, values, strict=True)) for values in zip(*rows.values(), strict=True)]
    if not isinstance(rows, list):
        raise InputError(f"{path} must contain a list with an entry per example, or an object of lists")
    if not rows:
        raise InputError(f"{path} contains no example")
    return rows, notes


def _object(path: Path, pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    """A JSON object whose keys differ; Python's reader keeps the last of several values of a key."""
    refuse_repeated([key for key, _ in pairs], path, "key")
    return dict(pairs)


def _columns_of_pandas(columns: dict[str, Json]) -> dict[str, Json]:
    """Return lists by name for what ``DataFrame.to_json`` writes, {name: {index: value}}, if all have one index.

    An index that is not 0, 1, 2, ... is a first column without a name, as in a table.
    """
    values = list(columns.values())
    if not values or not all(isinstance(each, dict) and list(each) == list(values[0]) for each in values):
        return columns
    index, lists = list(values[0]), {name: list(each.values()) for name, each in columns.items()}
    return lists if index == [str(n) for n in range(len(index))] else {"": index, **lists}


def _json_lines(path: Path) -> tuple[list[Json], tuple[str, ...]]:
    text, notes = decoded_text(path)
    lines = text.rstrip().split("\n") if text.strip() else []  # not splitlines: a text may contain U+2028
    rows = []
    for number, line in enumerate(lines):
        if not line.strip():
            raise InputError(f"{path} has a blank line {number + 1} between examples")
        try:
            rows.append(json.loads(line, object_pairs_hook=functools.partial(_object, path)))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{path} is not a readable .jsonl: line {number + 1}: {reason(error)}") from error
    if not rows:
        raise InputError(f"{path} contains no example")
    return rows, notes


def decoded_text(path: Path) -> tuple[str, tuple[str, ...]]:
    """Return the text of a file, and a note if it is not UTF-8."""
    given = content(path)
    encoding, notes = _encoding(given, path)
    return given.decode(encoding), notes


def _encoding(content: bytes, path: Path) -> tuple[str, tuple[str, ...]]:
    """Detect the encoding: UTF-8, UTF-16 or UTF-32 by byte order mark, else Windows-1252; note any but UTF-8.

    Windows-1252 is Latin-1 with letters and quotes in place of control characters. A file that has one of the five
    bytes without a meaning in it is read as Latin-1.
    """
    if content[:4] in (b"\xff\xfe\0\0", b"\0\0\xfe\xff"):
        content.decode("utf-32")
        return "utf-32", (f"{path} was read as UTF-32",)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        content.decode("utf-16")
        return "utf-16", (f"{path} was read as UTF-16",)
    if b"\0" in content:
        raise InputError(f"{path} contains NUL bytes: it is not text, or UTF-16 without a mark; save it as UTF-8")
    try:
        content.decode("utf-8-sig")
    except UnicodeDecodeError:
        if not any(part.isalpha() for part in content.decode("latin-1")):
            raise InputError(f"{path} is not text in UTF-8, UTF-16 or Latin-1") from None
        unassigned = any(byte in content for byte in (b"\x81", b"\x8d", b"\x8f", b"\x90", b"\x9d"))
        encoding, called = ("latin-1", "Latin-1") if unassigned else ("cp1252", "Windows-1252 (Latin-1)")
        return encoding, (f"{path} is not UTF-8 and was read as {called}: check the letters with accents",)
    return "utf-8-sig", ()


def read_csv(
    path: Path, class_names: Sequence[str] | None, examples: int | None, id_column: str | None = None
) -> tuple[pd.DataFrame, tuple[str, ...]]:
    """Read a delimited table; its first row is a header if a cell is neither a number nor a class name.

    A first row 0, 1, 2, ... is a header of column numbers if there is one row too many. If the header has one name
    fewer than the rows have cells, as written by R, the first column has the names of the rows.
    """
    text, notes = decoded_text(path)
    if "\n" not in text:
        text = text.replace("\r", "\n")  # line ends of old spreadsheets
    text = text.rstrip("\r\n") + "\n" if text.strip() else ""
    if text[:1] in "\r\n" and text:
        raise InputError(f"{path} begins with a blank line; expected a header or the first example")
    if not text:
        raise InputError(f"{path} is not a readable {suffix(path)}: it is empty")
    announced = re.match(r"sep=(.)\r?\n", text)  # the line that gives Excel the delimiter
    text = text[announced.end() :] if announced else text
    delimiter = announced[1] if announced else _delimiter(text, path)
    sample = _sample(text, delimiter)
    comma = delimiter not in ", " and any(DECIMAL_COMMA.fullmatch(c) for row in sample[1:] or sample for c in row)
    header = _has_header(sample, class_names, comma=comma)
    first = sample[0]
    if first[0].startswith("#") and first[0] != "#":
        raise InputError(f"{path} begins with the comment {first[0]!r}; remove the lines above the header")
    while header and len(first) > 1 and not first[-1] and not any(any(row[len(first) - 1 :]) for row in sample):
        first = first[:-1]  # a spreadsheet's empty columns
    if header:
        refuse_repeated(first, path, "column")
    empty = [f"{_EMPTY}{n}" for n in range(len(sample[0]) - len(first))]
    names = [*first, *empty] if header else [str(n) for n in range(len(first))]
    row_names = header and not empty and len(sample) > 1 and len(sample[1]) == len(first) + 1
    if row_names:
        names = ["", *names]
    table = _parsed(text, path, names, delimiter, header=header, comma=comma, id_column=id_column)
    filled = [name for name in empty if not (table[name].isna() | (table[name] == "")).all()]
    if filled:
        raise InputError(f"{path} has a value in a column without a name; name the column or remove it")
    table = table.drop(columns=empty)
    if row_names and table[""].duplicated().any():
        raise InputError(
            f"{path} has {len(first)} name{'s' * (len(first) > 1)} in its header and {len(first) + 1} cells in its "
            "rows, and the first column is not a list of row names: name every column, and save numbers with a decimal "
            "point"
        )
    if not header and examples is not None and len(first) > 1:
        table = _without_numbers_of_columns(table, first, path, examples)
    return table, notes


def _has_header(sample: list[list[str]], class_names: Sequence[str] | None, *, comma: bool) -> bool:
    """Whether the first row names the columns."""

    def number(cell: str) -> bool:
        return _is_number(cell) or (comma and DECIMAL_COMMA.fullmatch(cell) is not None)

    first, rest = sample[0], [cell for row in sample[1:] for cell in row]
    if all(map(number, first)):
        return False
    if rest and all(map(number, rest)):
        return True  # also if the columns of logits are named after the classes
    if len(sample) > 1 and len(first) == len(sample[1]):
        known = {*rest, *(class_names or ())}
        return not all(number(cell) or cell in known for cell in first)  # names of classes, not of columns
    return not all(number(cell) or cell in (class_names or ()) for cell in first)


def _parsed(
    text: str,
    path: Path,
    names: list[str],
    delimiter: str,
    *,
    header: bool,
    comma: bool,
    id_column: str | None,
) -> pd.DataFrame:
    """Parse the rows of delimited text; raise for a blank line or a row with too many cells."""

    def parse(dtype: type | dict[str, type] | None) -> pd.DataFrame:
        return pd.read_csv(
            io.StringIO(text),
            sep=r"\s+" if delimiter == " " else delimiter,
            header=0 if header else None,
            names=names,
            index_col=False,
            dtype=dtype,
            keep_default_na=False,
            skipinitialspace=True,
            skip_blank_lines=False,
            decimal="," if comma else ".",
            low_memory=False,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("error", pd.errors.ParserWarning)
        try:
            table = parse({id_column: str} if id_column is not None and id_column in names else None)
        except pd.errors.ParserWarning as error:
            raise InputError(
                f"{path} is not a readable {suffix(path)}: a row has more cells than the first row has ({len(names)})"
            ) from error
    blank = (table.isna() | (table == "")).all(axis=1).to_numpy() if table.shape[1] else np.zeros(0, bool)
    if blank.any():
        row = int(blank.argmax())
        label = names[0] if table.shape[1] == 1 else ""
        where = f"{path}, column {label!r}" if label else str(path)
        raise InputError(f"{where} contains '' at example {row}: the line is blank; expected a number or a class name")
    if _LEADING_ZERO.search(text):
        for name, cells in parse(str).items():
            if pd.api.types.is_integer_dtype(table[name]):
                refuse_two_spellings(cells.str.strip(), f"{path}, column {str(name)!r}")
    return table


def _without_numbers_of_columns(table: pd.DataFrame, first: list[str], path: Path, examples: int) -> pd.DataFrame:
    """Drop the first row of a table if it has the column numbers 0, 1, 2, ... in any order."""
    numbers = [str(n) for n in range(len(first))]
    if sorted(first) == sorted(numbers) and len(table) == examples + 1:
        return table.iloc[1:].reset_index(drop=True).set_axis(first, axis=1)
    if first == numbers and len(first) > 2:
        raise InputError(
            f"{path} begins with the row 0, 1, ... {len(first) - 1}: a header of column numbers, or predictions? "
            f"Give the columns names, or save them without a header"
        )
    return table


def _delimiter(text: str, path: Path) -> str:
    """Detect the delimiter in the first row, outside quotes: tab, semicolon, comma, vertical bar or blanks."""
    lines = text.split("\n", 2)[:2]
    bare = re.sub(r'"[^"]*"', "", lines[0])
    if suffix(path) == ".tsv" or "\t" in bare:
        return "\t"
    if ";" in bare:
        return ";"
    if "," in bare:
        return ","
    cells = lines[1].split("|") if len(lines) > 1 else []
    if len(cells) > 1 and len(cells) == len(bare.split("|")) and all(map(_is_number, cells)):
        return "|"  # text with bars may be a list of labels
    below = lines[1].split() if len(lines) > 1 else []
    above = len(bare.split() or lines[0].split())
    if len(below) > 1 and all(map(_is_number, below[1:])) and above + 1 >= len(below):
        # Of two cells, with text or under one name, the first is the name of the row, not of a class (type 1).
        named = len(below) == 2 and (above < 2 or not _is_number(below[0]))
        firsts = [line.split(maxsplit=1)[0] for line in text.split("\n", _SAMPLED)[1:_SAMPLED] if line.strip()]
        return " " if not named or len({*firsts}) == len(firsts) else ","
    return ","


def _sample(text: str, delimiter: str, most: int = _SAMPLED) -> list[list[str]]:
    """Return the stripped cells of the first rows."""
    lines = io.StringIO(text)
    if delimiter == " ":
        return [line.replace('"', "").split() for line, _ in zip(lines, range(most), strict=False)]
    rows = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    return [[cell.strip() for cell in row] for row, _ in zip(rows, range(most), strict=False)]


def _is_number(cell: str) -> bool:
    """Whether a cell is a plain number; Python's float also accepts 1_0 and digits of other scripts."""
    return NUMBER.fullmatch(cell.strip()) is not None


def some(names: Collection[object], most: int = 8) -> str:
    """Format the first of many names for an error message.

    >>> some(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    shown = [str(name) for name in list(names)[:most]]
    return ", ".join(shown) + (f" and {len(names) - most} more" if len(names) > most else "")


def reason(error: BaseException) -> str:
    """Return an error in one line; messages of other libraries may be long or empty."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:200] + " ..."
