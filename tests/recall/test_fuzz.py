"""Hundreds of valid, odd and broken input files: a right answer, or a clean error that names the file."""

import contextlib
import csv
import io
import json
import math
import re
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from jprune.cli import main

pytestmark = pytest.mark.slow

ROLES = ("labels", "dense", "pruned")
FORMS = (".npy", ".npz", ".csv", ".parquet")
CELLS = [*'" x', "", "-1", "99", "1.5", "1e2", "nan", "inf", "1_0", "0x1", "\u0661", "True", '"1"', "1,1", "NA", "1\n"]
CELLS += ["1e400", "9" * 30]
KINDS = (np.int8, np.uint64, np.int32, ">i4", np.float64, np.float16, bool, complex, str, object, "datetime64[s]")


class Unreadable(ValueError):
    """The plain reader below finds no predictions in a file."""


# An independent reader, for the expected results -------------------------------------------------------


def number(text):
    if "_" in text or not text.isascii():  # Python's float takes 1_0 and digits of any script
        raise Unreadable(text)
    return float(text)


def is_number(text):
    try:
        number(text)
    except ValueError:
        return False
    return True


def rows_of_csv(path, examples):
    """The cells of a table without its header: a first row with text, or with column numbers and one row too many."""
    content = path.read_bytes()
    try:
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("latin-1")
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if row]
    numbered = len(rows) == examples + 1 and rows[0] == [str(n) for n in range(len(rows[0]))]
    header = numbered or not all(map(is_number, rows[0]))
    if header and len(rows) > 1 and len(rows[1]) == len(rows[0]) + 1:  # R's table: the first cells name the rows
        return [row[1:] for row in rows[1:]]
    return rows[1:] if header else rows


def is_one_hot(cells):
    return cells.ndim == 2 and cells.shape[1] > 1 and np.isin(cells, (0, 1)).all() and (cells.sum(1) == 1).all()


def classes_of(path, examples, role):
    """The classes that the models of a file predict, (models, examples), by the documented rules."""
    if path.suffix in (".npy", ".npz"):
        loaded = np.load(path, allow_pickle=False)
        array = loaded if path.suffix == ".npy" else loaded[loaded.files[0]]
        array = array.astype(int) if array.dtype == bool else array
        if array.ndim == 2 and 1 in array.shape and role == "labels":
            array = array.ravel()
        if array.dtype.kind == "U":
            if not all(re.fullmatch(r"[+-]?[0-9]+(\.0+)?", text.strip()) for text in array.ravel()):
                raise Unreadable("text")
            array = array.astype(float).astype(int)
        whole = array.dtype.kind in "iu"
        if (
            is_one_hot(array)
            and len(array) == examples
            and (role == "labels" or not whole or array.shape[1] != examples)
        ):
            return array.argmax(1)[None]
        if not whole and array.ndim >= 2 and array.shape[-2] == examples:
            if array.ndim == 2 and array.shape[1] > 1 and (array == np.floor(array)).all():
                raise Unreadable("models as floats, or logits without decimals")
            if array.shape[-1] > 1:
                return np.atleast_2d(array.argmax(-1))
            array = array[..., 0]
        return np.atleast_2d(array).astype(float)
    if path.suffix == ".parquet":
        table = pyarrow.parquet.read_table(path)
        cells = np.array([[float(cell) for cell in column.to_pylist()] for column in table.columns]).T
        whole = all(pyarrow.types.is_integer(column.type) for column in table.columns)
    else:
        texts = rows_of_csv(path, examples)
        cells = np.array([[number(text) for text in row] for row in texts])
        whole = all(re.fullmatch(r"[+-]?[0-9]+", text) for row in texts for text in row)
    if is_one_hot(cells):
        return cells.argmax(1)[None]
    if not whole and cells.shape[1] > 1 and (cells == np.floor(cells)).all():
        raise Unreadable("models as decimals, or logits without decimals")
    return cells.T if whole or cells.shape[1] == 1 else cells.argmax(1)[None]


def right_answer(paths, count):
    """Recall of every class (NaN without examples) for every model of the dense and pruned files."""
    labels = classes_of(paths["labels"], count, "labels")[0]

    def recall(predicted, c):
        return float((predicted[labels == c] == c).mean()) if (labels == c).any() else None

    return {
        role: [
            [recall(row, c) for c in range(int(labels.max()) + 1)] for row in classes_of(paths[role], labels.size, role)
        ]
        for role in ("dense", "pruned")
    }


# Files ------------------------------------------------------------------------------------------------


def write(path, array):
    """Write classes (models, examples) or logits (examples, classes) as the file's suffix says."""
    if path.suffix == ".npy":
        np.save(path, array)
    elif path.suffix == ".npz":
        np.savez(path, array)
    else:
        columns = array if array.dtype.kind == "f" else np.atleast_2d(array).T
        frame = pd.DataFrame(columns, columns=[f"c{i}" for i in range(columns.shape[1])])
        frame.to_csv(path, index=False) if path.suffix == ".csv" else frame.to_parquet(path)


@st.composite
def arrays(draw):
    """Labels, dense and pruned predictions of a small study."""
    examples, classes, models = draw(st.integers(4, 10)), draw(st.integers(2, 4)), draw(st.integers(1, 3))
    whole = st.integers(0, classes - 1)
    labels = np.array(draw(st.lists(whole, min_size=examples, max_size=examples)))
    labels[:classes] = np.arange(classes)
    stacks = [np.array(draw(st.lists(whole, min_size=models * examples, max_size=models * examples))) for _ in range(2)]
    stacks = [stack.reshape(models, examples) for stack in stacks]
    if models == 1 and draw(st.booleans()):
        stacks = [np.eye(classes)[stack[0]] * 2.5 + 0.25 for stack in stacks]
    return dict(zip(ROLES, (labels, *stacks), strict=True))


@st.composite
def damages(draw):
    """A way to damage the file of one role: its name and arguments."""
    way = draw(
        st.sampled_from(["none", "none", "cut", "flip", "insert", "noise", "cell", "rows", "kind", "shape", "entry"])
    )
    position = draw(st.floats(0, 1, exclude_max=True))
    return {
        "role": draw(st.sampled_from(ROLES)),
        "way": way,
        "position": position,
        "bytes": draw(st.binary(min_size=1, max_size=6)),
        "text": draw(st.sampled_from(CELLS)),
        "kind": draw(st.sampled_from(KINDS)),
        "entry": draw(st.sampled_from([-1, 5, 99, 10**6, 0.5, np.nan, np.inf])),
        "shape": draw(st.sampled_from(["transpose", "first", "flat", "more", "empty", "scalar"])),
    }


def spoiled_array(array, damage):
    if damage["way"] == "kind":
        return array.astype(damage["kind"])
    if damage["way"] == "entry":
        array = array.astype(np.result_type(array, np.asarray(damage["entry"])))
        array.reshape(-1)[int(damage["position"] * array.size)] = damage["entry"]
        return array
    shapes = {
        "transpose": array.T,
        "first": array[:1],
        "flat": array.ravel(),
        "more": array[None],
        "empty": array[:0],
        "scalar": array.ravel()[0],
    }
    return np.asarray(shapes[damage["shape"]])


def spoil_file(path, damage):
    content = path.read_bytes()
    at = int(damage["position"] * len(content))
    if damage["way"] == "cut":
        content = content[:at]
    elif damage["way"] == "flip":
        content = content[:at] + bytes([content[at] ^ damage["bytes"][0] or 1]) + content[at + 1 :]
    elif damage["way"] == "insert":
        content = content[:at] + damage["bytes"] + content[at:]
    elif damage["way"] == "noise":
        content = damage["bytes"] * (1 + at)
    elif path.suffix == ".csv":
        lines = content.decode().split("\n")
        row = int(damage["position"] * len(lines))
        if damage["way"] == "rows":
            lines = lines[:row] + lines[row + 1 :]
        else:
            cells = lines[row].split(",")
            cells[at % len(cells)] = damage["text"]
            lines[row] = ",".join(cells)
        content = "\n".join(lines).encode()
    path.write_bytes(content)


def run(arguments):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(arguments)
    return status, out.getvalue(), err.getvalue()


@settings(max_examples=300, derandomize=True, suppress_health_check=list(HealthCheck))
@given(arrays(), st.tuples(*[st.sampled_from(FORMS)] * 3), damages())
def test_any_files_give_a_right_answer_or_a_clean_error(data, forms, damage):
    with tempfile.TemporaryDirectory() as folder:
        paths = {role: Path(folder) / f"{role}{form}" for role, form in zip(ROLES, forms, strict=True)}
        spoiled = damage["way"] in ("kind", "shape", "entry")
        for role, path in paths.items():
            if spoiled and role == damage["role"]:
                paths[role] = path.with_suffix(".npz" if path.suffix == ".npz" else ".npy")
                write(paths[role], spoiled_array(data[role], damage))
            else:
                write(path, data[role])
        if not spoiled and damage["way"] != "none":
            spoil_file(paths[damage["role"]], damage)
        before = sorted(path.name for path in Path(folder).iterdir())
        named = ["--labels", str(paths["labels"]), "--dense", str(paths["dense"]), "--pruned", f"2={paths['pruned']}"]
        status, out, err = run(["audit", *named, "--json", "--resamples", "0"])
        event(f"{damage['way']}: exit status {status}")
        assert sorted(path.name for path in Path(folder).iterdir()) == before
        if status == 2:
            assert out == ""
            assert re.fullmatch(r"jprune audit: [^\n]+\n", err), err
            assert any(path.name in err for path in paths.values()), err
            assert damage["way"] != "none", f"refused whole files: {err}"
            return
        assert (status, err) == (0, "")
        found = json.loads(out)
        rows, names = found["tables"]["recalls"], found["class_names"]
        wanted = right_answer(paths, data["labels"].size)
        for role, column in (("dense", "recall_dense"), ("pruned", "recall")):
            models = wanted[role]
            assert len({row["model"] for row in rows}) == len(models)
            for row in rows:
                of_model = models[row["model"]]
                c = names.index(row["class"])
                value = of_model[c] if c < len(of_model) else None
                assert (row[column] is None) == (value is None), (row, value)
                assert value is None or math.isclose(row[column], value, abs_tol=1e-12), (row, value)
