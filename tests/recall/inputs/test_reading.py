"""Files and objects as users bring them: read right, or refused by name."""

import gzip
import json
import warnings
from pathlib import Path

import ml_dtypes
import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

from jprune import recall
from jprune.cli import main
from jprune.recall import InputError
from jprune.recall.inputs.files import read_predictions
from jprune.recall.inputs.order import about_order, about_quantities, about_ratings
from jprune.recall.inputs.predictions import Predictions, predictions
from jprune.recall.inputs.prepare import prepare
from jprune.recall.inputs.raw import Raw, in_pandas
from jprune.recall.inputs.rows import align
from jprune.recall.inputs.text import read_csv

NAMES = ("ant", "bee", "cat")
N = 60


LABELS = np.random.default_rng(7).permutation(np.repeat([0, 1, 2], N // 3))


def made(seed, rate):
    rng = np.random.default_rng(seed)
    return np.where(rng.random(N) < rate, rng.integers(0, 3, N), LABELS)


DENSE, TWO = made(0, 0.1), made(1, 0.4)
LOGITS = 2.25 * np.eye(3)[TWO] + np.linspace(0, 1, N * 3).reshape(N, 3)
PROBABILITIES = np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True)
ACCURACY = (float((DENSE == LABELS).mean()), float((TWO == LABELS).mean()))


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("labels.npy", LABELS)
    np.save("dense.npy", DENSE)
    np.save("two.npy", TWO)
    return tmp_path


def run(capsys, *arguments):
    """Exit status, the audit as JSON (or None), and standard error."""
    given = ["audit", *arguments]
    for option, file in (("--labels", "labels.npy"), ("--dense", "dense.npy"), ("--pruned", "2=two.npy")):
        if option not in given:
            given += [option, file]
    status = main([*given, "--json", "--resamples", "0"])
    out, err = capsys.readouterr()
    return status, json.loads(out) if status == 0 else None, err


def accuracies(found):
    row = found["tables"]["summary"][0]
    return row["accuracy_dense"], row["accuracy"]


def read(capsys, *arguments):
    status, found, err = run(capsys, *arguments)
    assert status == 0, err
    assert accuracies(found) == pytest.approx(ACCURACY)
    return found


def refused(capsys, *arguments):
    status, found, err = run(capsys, *arguments)
    assert (status, found) == (2, None)
    return err


# Tables -----------------------------------------------------------------------------------------------


def text(rows, delimiter=",", end="\n"):
    return end.join(delimiter.join(map(str, row)) for row in rows) + end


TABLES = {
    "plain.csv": text([["p"], *([c] for c in TWO)]),
    "bare.csv": text([[c] for c in TWO]),
    "r.csv": text([["p"], *([i + 1, c] for i, c in enumerate(TWO))]),
    "rownames.csv": text([["p"], *([f"row{i}", c] for i, c in enumerate(TWO))]),
    "r_space.csv": '"p"\n' + text([[f'"{i + 1}"', c] for i, c in enumerate(TWO)], " "),
    "semicolon.csv": text([["a", "b", "c"], *LOGITS.round(3)], ";"),
    "comma.csv": text([["a", "b", "c"], *LOGITS.round(3)], ";").replace(".", ","),
    "comma_bare.csv": text(LOGITS.round(3), ";").replace(".", ","),
    "tab.tsv": text([["a", "b", "c"], *LOGITS.round(3)], "\t"),
    "bar.csv": text([["a", "b", "c"], *LOGITS.round(3)], "|"),
    "tab.csv": text([["a", "b", "c"], *LOGITS.round(3)], "\t"),
    "blanks.csv": text([["a", "b", "c"], *LOGITS.round(3)], " "),
    "sep.csv": "sep=;\r\n" + text([["a", "b", "c"], *LOGITS.round(3)], ";", "\r\n").replace(".", ","),
    "numbered.csv": text([[2, 0, 1], *LOGITS[:, [2, 0, 1]].round(3)]),
    "crlf.csv": text([["p"], *([c] for c in TWO)], end="\r\n"),
    "onehot.csv": text([["a", "b", "c"], *np.eye(3, dtype=int)[TWO]]),
    "lines.jsonl": text([[c] for c in TWO]),
    "objects.jsonl": "\n".join(json.dumps({"pred": int(c)}) for c in TWO),
    "lists.jsonl": "\n".join(json.dumps(row) for row in LOGITS.tolist()) + "\n",
    "logits.jsonl": "\n".join(json.dumps({"logits": row}) for row in LOGITS.tolist()),
    "list.json": json.dumps(TWO.tolist()),
    "columns.json": json.dumps({"pred": TWO.tolist()}),
    "records.json": pd.DataFrame({"pred": TWO}).to_json(orient="records"),
    "pandas.json": pd.DataFrame({"pred": TWO}).to_json(),
    "logits.json": json.dumps(LOGITS.tolist()),
    "empty_columns.csv": "p,,\n" + text([[c, "", ""] for c in TWO]),
    "percentages.csv": "0,1,2\n" + text((100 * PROBABILITIES).round(3)),
}


@pytest.mark.parametrize("name", sorted(TABLES))
def test_tables_in_many_dialects_are_read_right(folder, capsys, name):
    (folder / name).write_bytes(TABLES[name].encode())
    read(capsys, "--pruned", f"2={name}")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "latin-1"])
def test_encodings_are_recognized_and_named(folder, capsys, encoding):
    names = np.array(["Ähre", "bee", "çat"])
    (folder / "names.csv").write_bytes(text([["label"], *([name] for name in names[LABELS])]).encode(encoding))
    for file, codes in (("d.csv", DENSE), ("t.csv", TWO)):
        (folder / file).write_bytes(text([["p"], *([name] for name in names[codes])]).encode(encoding))
    found = read(capsys, "--labels", "names.csv", "--dense", "d.csv", "--pruned", "2=t.csv")
    assert set(found["class_names"]) == set(names)
    said = {"utf-16": "UTF-16", "latin-1": "Latin-1"}.get(encoding)
    assert said is None or any(said in warning for warning in found["warnings"])


def test_columns_of_other_tables_than_those_of_pandas_are_put_in_the_order_of_the_classes():
    """An array of a pyarrow table has its columns as they stand: every prediction was of another class."""
    order = ["cat", "ant", "bee"]
    table = pyarrow.table({name: PROBABILITIES[:, NAMES.index(name)] for name in order})
    classes = pyarrow.table({"first": TWO, "second": DENSE})
    found = recall.audit(LABELS, table, {2: table}, class_names=NAMES)
    assert found.summary["accuracy_dense"].tolist() == [pytest.approx(np.mean(PROBABILITIES.argmax(1) == LABELS))]
    assert recall.audit(LABELS, classes, {2: classes}).dense["accuracy"].tolist() == pytest.approx(ACCURACY[::-1])


def test_groups_may_be_a_table_of_pyarrow():
    """Its columns counted as one attribute of shape (examples, attributes), and the table was refused."""
    columns = {"eye": np.array(["left", "right"])[LABELS % 2], "site": DENSE % 2}
    found = recall.audit(LABELS, DENSE, {2: TWO}, groups=pyarrow.table(columns)).groups
    pd.testing.assert_frame_equal(found, recall.audit(LABELS, DENSE, {2: TWO}, groups=columns).groups)


def test_a_column_of_names_may_precede_columns_of_numbers(folder, capsys):
    """Names of classes occur in many rows, so they were not read as names of rows, and the table had one column."""
    rows = [["label", "dense", "two"], *([NAMES[c], a, b] for c, a, b in zip(LABELS, DENSE, TWO, strict=True))]
    (folder / "all.csv").write_text(text(rows, " "))
    given = ("--labels", "all.csv:label", "--dense", "all.csv:dense", "--pruned", "2=all.csv:two")
    read(capsys, *given, "--class-names", ",".join(NAMES))


@pytest.mark.parametrize("header", ["label\n", "true label\n", ""])
def test_names_of_classes_that_end_with_a_number_are_no_columns(folder, capsys, header):
    """A second cell that is a number made a blank the delimiter, as in tables of R with names of rows."""
    for file, codes in (("l.csv", LABELS), ("d.csv", DENSE), ("t.csv", TWO)):
        (folder / file).write_text(header + "".join(f"type {c + 1}\n" for c in codes))
    found = read(capsys, "--labels", "l.csv", "--dense", "d.csv", "--pruned", "2=t.csv")
    assert found["class_names"] == ["type 1", "type 2", "type 3"]


def test_names_in_the_code_of_windows_match_those_in_utf_8(folder, capsys):
    """In Latin-1 their first letters are control characters, so that predictions of two classes were always wrong."""
    names = np.array(["Škoda", "Žuk", "café"])
    for file, codes, encoding in (("l.csv", LABELS, "utf-8"), ("d.csv", DENSE, "cp1252"), ("t.csv", TWO, "cp1252")):
        (folder / file).write_bytes(text([["p"], *([name] for name in names[codes])]).encode(encoding))
    found = read(capsys, "--labels", "l.csv", "--dense", "d.csv", "--pruned", "2=t.csv")
    assert found["class_names"] == sorted(names)
    assert found["tables"]["summary"][0]["accuracy_dense"] == pytest.approx(np.mean(DENSE == LABELS))


BROKEN = {
    "gap.csv": ("p\n" + "\n".join(["", *map(str, TWO[1:])]) + "\n", "'' at example 0"),
    "middle.csv": ("p\n" + "\n".join([*map(str, TWO[:9]), "", *map(str, TWO[10:])]) + "\n", "'' at example 9"),
    "blank_bare.csv": ("\n".join([*map(str, TWO[:9]), "", *map(str, TWO[10:])]) + "\n", "'' at example 9"),
    "short.csv": ("a,b\n" + text([[c, c] for c in TWO[:5]]) + "1\n" + text([[c, c] for c in TWO[6:]]), "example 5"),
    "long.csv": ("p\n" + text([[c] for c in TWO[:5]]) + "1,2\n" + text([[c] for c in TWO[6:]]), "long.csv"),
    "wide.csv": ("p\n" + text([[c, c] for c in TWO]), "not a list of row names"),
    "whole.csv": ("a,b\n" + text([[float(c), float(c)] for c in TWO]), "whole numbers as decimals"),
    "mixed.csv": ("p\n" + text([[NAMES[c]] if i else [c] for i, c in enumerate(TWO)]), "among"),
    "semicolons.csv": ("p\n" + text([[f'"{c};{c}"'] for c in TWO]), "semicolons.csv"),
    "null.jsonl": ("\n".join(["null", *map(str, TWO[1:])]), "null"),
    "keys.jsonl": ('{"a": 1}\n' + '{"b": 1}\n' * (N - 1), "other keys in line 2"),
    "ragged.jsonl": ("[1.5, 2]\n" + "[1.5]\n" * (N - 1), "line 2"),
    "zero.csv": ("p\0\n1\n", "NUL"),
    "named_late.csv": ("p,\n" + text([[c, ""] for c in TWO[:-1]]) + f"{TWO[-1]},x\n", "column '' contains ''"),
    "comment.csv": ("# by me\np\n" + text([[c] for c in TWO]), "remove the lines above the header"),
    "percent.csv": ("a,b,c\n" + text([[f"{100 * p:.1f}%" for p in row] for row in PROBABILITIES]), "percent signs"),
    "german.csv": ("a;b\n" + text([[f"{c}.000,5", "7,25"] for c in TWO], ";"), "thousands separators"),
    "lists.csv": ("0|0\nx|y\n" + text([["x|y"] for _ in TWO[1:]]), "x|y"),
    "objects.jsonl": ("\n".join(json.dumps({"p": {"class": int(c)}}) for c in TWO), "contains objects"),
    "lengths.json": ('{"a": [1, 2], "b": [1]}', "lists of different lengths: a 2, b 1"),
    "number.json": ("3", "must contain a list"),
    "lines.json": ("1\n2\n", "with a value per line call it .jsonl"),
}


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_tables_that_may_be_misread_are_refused_by_name(folder, capsys, name):
    content, said = BROKEN[name]
    (folder / name).write_text(content)
    err = refused(capsys, "--pruned", f"2={name}")
    assert said in err
    assert name in err


@pytest.mark.parametrize("name", ["two.npy", "two.npz", "two.csv", "two.tsv", "two.jsonl", "two.json"])
def test_files_compressed_with_gzip_are_read(folder, capsys, name):
    np.savez("two.npz", TWO)
    for file in ("two.csv", "two.tsv"):
        (folder / file).write_text("p\n" + text([[c] for c in TWO]))
    (folder / "two.jsonl").write_text(text([[c] for c in TWO]))
    (folder / "two.json").write_text(json.dumps(TWO.tolist()))
    (folder / f"{name}.gz").write_bytes(gzip.compress((folder / name).read_bytes()))
    read(capsys, "--pruned", f"2={name}.gz")
    (folder / f"{name}.gz").write_bytes(b"not compressed")
    assert f"{name}.gz is not a readable" in refused(capsys, "--pruned", f"2={name}.gz")


def test_a_late_value_in_a_column_without_a_name_is_refused(folder):
    (folder / "long.csv").write_text("p,\n" + "1,\n" * 300 + "1,x\n")
    with pytest.raises(InputError, match=r"long\.csv has a value in a column without a name"):
        read_csv(folder / "long.csv", None, None)


def test_other_suffixes_are_refused_with_what_to_do(folder, capsys):
    for name, said in (("a.xlsx", "save the sheet as .csv"), ("a.pt", "numpy.save"), ("a.parquet.gz", "'.parquet.gz'")):
        (folder / name).write_bytes(b"x")
        assert said in refused(capsys, "--pruned", f"2={name}")


def test_arrays_with_examples_on_the_last_axis_are_refused(capsys):
    one_hot = np.eye(3, dtype=int)[TWO].T
    for values in (LOGITS.T, PROBABILITIES.T, one_hot):
        np.save("other.npy", values)
        err = refused(capsys, "--dense", "other.npy", "--pruned", "2=other.npy", "--threshold", "0.5")
        assert "transpose them" in err


def test_one_hot_labels_in_a_table_are_read(folder, capsys):
    (folder / "y.csv").write_text("a,b,c\n" + text(np.eye(3, dtype=int)[LABELS]))
    found = read(capsys, "--labels", "y.csv")
    assert any("read as one-hot labels" in warning for warning in found["warnings"])


def test_text_that_is_numbers_is_read_as_in_a_table():
    audit = recall.audit([f"{c}.0" for c in LABELS], [str(c) for c in DENSE], {2: pd.Series(TWO).astype(str)})
    assert audit.class_names == ("0", "1", "2")
    assert tuple(audit.summary[["accuracy_dense", "accuracy"]].iloc[0]) == pytest.approx(ACCURACY)


def test_missing_predictions_among_names_are_refused_and_missing_labels_named():
    names = np.array(NAMES, object)
    missing = names[TWO]
    missing[7] = "NA"
    with pytest.raises(InputError, match=r"pruned\[2\] contains 'NA' at example 7: every example needs a prediction"):
        recall.audit(names[LABELS], names[DENSE], {2: missing})
    labels = names[LABELS]
    labels[3] = "NA"
    audit = recall.audit(labels, names[DENSE], {2: names[TWO]})
    assert any(warning.startswith("the label 'NA' was read as a class") for warning in audit.warnings)


def test_labels_in_two_spellings_are_named_where_one_is_never_predicted():
    names = np.array(NAMES, object)
    labels = names[LABELS]
    labels[np.flatnonzero(LABELS == 0)[:4]] = "Ant"
    audit = recall.audit(labels, names[DENSE], {2: names[TWO]})
    assert "the labels 'ant' and 'Ant' were read as two classes, and 'Ant' is never predicted" in audit.warnings


def test_accented_letters_and_bytes_are_matched_however_they_are_coded():
    one, two = (np.array([name, "b", "c"], object) for name in ("caf\u00e9", "cafe\u0301"))
    audit = recall.audit(
        one[LABELS], two[DENSE], {2: pd.Series([name.encode() for name in two[TWO]])}, class_names=[*two]
    )
    assert tuple(audit.summary[["accuracy_dense", "accuracy"]].iloc[0]) == pytest.approx(ACCURACY)


def test_zeros_and_ones_that_say_whether_models_are_right_are_noticed():
    audit = recall.audit(LABELS, (DENSE == LABELS).astype(int), {2: TWO})
    assert any(
        "if 1 means that a prediction is right, pass the predicted classes instead" in warning
        for warning in audit.warnings
    )


def test_percentages_have_the_confidence_of_probabilities():
    audit, same = (recall.audit(LABELS, x * PROBABILITIES, {2: x * PROBABILITIES}) for x in (100, 1))
    np.testing.assert_allclose(audit.probabilities["confidence"], same.probabilities["confidence"])
    assert any(warning.startswith("dense contains percentages") for warning in audit.warnings)


LIKE_OTHERS = {
    "label.csv": ("label,p\n" + text(zip(LABELS, TWO, strict=True)), "looks like true classes"),
    "id.csv": ("id,p\n" + text([[i % 3, c] for i, c in enumerate(TWO)]), "name the ids with --id id"),
    "confidence.csv": (
        "p,confidence\n" + text([[c, 0.75] for c in TWO]),
        "whole numbers and other columns contain dec",
    ),
    "numbers.csv": (
        text([[i, *row] for i, row in enumerate(LOGITS.round(3))]),
        "a different value in every row of column '0'",
    ),
    "with_class.csv": (
        text([[*row, c] for row, c in zip(LOGITS.round(3), TWO, strict=True)]),
        "column '3' contains whole",
    ),
    "thousands.csv": (
        "a,b\n" + text([[f'"{1000.5 * (c + 1):,}"', 0.5] for c in TWO]),
        "without thousands separators",
    ),
    "swiss.csv": (
        "a;b\n" + text([[f"{1000.5 * (c + 1):,}".replace(",", "'"), 0.5] for c in TWO], ";"),
        "thousands separators",
    ),
    "rows.csv": (text([[i, c] for i, c in enumerate(TWO)]), "a different value in every row of column '0'"),
    "names.csv": (text([["image", "p"], *([f"i{i}", NAMES[c]] for i, c in enumerate(TWO))]), "row of column 'image'"),
    "ids.jsonl": ("\n".join(f'{{"id": {i % 3}, "p": {c}}}' for i, c in enumerate(TWO)), "looks like ids"),
    "both.csv": ("id,label,p\n" + text([[i % 3, c, c] for i, c in enumerate(TWO)]), "predictions as both.csv:p,"),
    "image.csv": (
        "image,label,p\n" + text([[f"i{i}", c, c] for i, c in enumerate(TWO)]),
        "predictions as image.csv:p,",
    ),
}


@pytest.mark.parametrize("name", sorted(LIKE_OTHERS))
def test_columns_that_are_not_predictions_do_not_become_models_or_logits(folder, capsys, name):
    content, said = LIKE_OTHERS[name]
    (folder / name).write_text(content)
    err = refused(capsys, "--dense", name, "--pruned", f"2={name}")
    assert said in err
    assert name in err


@pytest.mark.parametrize(
    ("name", "other", "said"),
    [
        ("gt", lambda _: LABELS, "d.csv, column 'gt' equals the labels in every row"),
        ("hit", lambda codes: (codes == LABELS).astype(int), "column 'hit' is 1 where column 'p' is right"),
        ("hit", lambda codes: codes == LABELS, "column 'hit' is 1 where column 'p' is right"),
        ("top2", lambda codes: (codes + 1) % 3, "d.csv: models 0 and 1 agree on no example"),
    ],
)
def test_labels_correctness_and_second_choices_among_predictions_are_refused_whatever_their_name(
    folder, capsys, name, other, said
):
    for file, codes in (("d.csv", DENSE), ("t.csv", TWO)):
        pd.DataFrame({"p": codes, name: other(codes)}).to_csv(file, index=False)
    assert said in refused(capsys, "--dense", "d.csv", "--pruned", "2=t.csv")
    read(capsys, "--dense", "d.csv:p", "--pruned", "2=t.csv:p")


def test_a_model_that_is_always_right_is_read_next_to_models_that_are_almost_always_right():
    good = LABELS.copy()
    good[0] = (good[0] + 1) % 3
    table = pd.DataFrame({"a": good, "b": LABELS})
    report = recall.audit(LABELS, table, {2: table})
    assert report.dense["accuracy"].tolist() == [1 - 1 / N, 1.0]


def test_tables_of_one_hot_predictions_of_a_perfect_model_are_read():
    table = pd.DataFrame({"a": LABELS == 0, "b": LABELS > 0}).astype(int)
    report = recall.audit((LABELS > 0).astype(int), table, {2: table})
    assert report.summary["accuracy"].tolist() == [1.0]


@pytest.mark.parametrize("name", ["Id", "ImageId", "uuid"])
def test_rows_in_another_order_are_noticed_by_any_column_that_differs_in_every_row(folder, capsys, name):
    ids, order = [f"x{i}" for i in range(N)], np.random.default_rng(3).permutation(N)
    pd.DataFrame({name: ids, "label": LABELS}).to_csv("y.csv", index=False)
    table = pd.DataFrame({name: ids, "p": TWO, "confidence": np.random.default_rng(1).random(N)})
    table.to_csv("t.csv", index=False)
    read(capsys, "--labels", "y.csv", "--pruned", "2=t.csv:p")
    table.iloc[order].to_csv("t.csv", index=False)
    err = refused(capsys, "--labels", "y.csv", "--pruned", "2=t.csv:p")
    assert f"t.csv:p and y.csv have a column {name!r} with different ids" in err
    assert f"join the files with --id {name}," in err
    np.savez("y.npz", label=LABELS, **{name: ids})
    np.savez("t.npz", p=TWO[order], **{name: np.array(ids)[order]})
    assert f"column {name!r} with different ids" in refused(capsys, "--labels", "y.npz", "--pruned", "2=t.npz:p")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("p\n" + text([[f'"{c},00"'] for c in TWO]), "save numbers with a decimal point"),
        ("p\n" + text([[f"{c},0"] for c in TWO], ";"), "1 name in its header and 2 cells in its rows"),
        (text([["p"], [-1], *([c] for c in TWO[1:])]), "for abstentions add a class after the others"),
        (text([["p"], *([c + 0.5] for c in TWO)]), "for scores whose sign decides, pass the classes, scores > 0"),
    ],
)
def test_what_to_do_is_said_where_a_table_cannot_be_read(folder, capsys, content, said):
    (folder / "t.csv").write_text(content)
    assert said in refused(capsys, "--pruned", "2=t.csv")


def test_a_table_with_one_row_too_few_is_asked_about_its_header():
    with pytest.raises(InputError, match=r"59 rows for 60 labels.*was its first row read as a header"):
        predictions(Raw("t.csv", TWO[1:, None], by_row=True), "t.csv", N)


def test_columns_of_logits_may_be_called_like_labels_and_may_be_constant(folder, capsys):
    pd.DataFrame(LOGITS, columns=["true", "id", "file"]).to_csv("two.csv", index=False)
    read(capsys, "--pruned", "2=two.csv")
    reference = LOGITS - LOGITS[:, :1]
    (folder / "zero.csv").write_text("a,b,c\n" + text([[0, *row[1:]] for row in reference]))
    read(capsys, "--pruned", "2=zero.csv")


@pytest.mark.parametrize("encoding", ["utf-32", "utf-32-le", "utf-16-le"])
def test_other_unicode_encodings_are_read_or_refused(folder, capsys, encoding):
    (folder / "two.csv").write_bytes(text([["p"], *([c] for c in TWO)]).encode(encoding))
    if encoding == "utf-32":
        assert any("UTF-32" in warning for warning in read(capsys, "--pruned", "2=two.csv")["warnings"])
    else:
        assert "NUL" in refused(capsys, "--pruned", "2=two.csv")


def test_lines_that_end_in_carriage_returns_alone_are_read(folder, capsys):
    (folder / "two.csv").write_bytes(text([["p"], *([c] for c in TWO)], end="\r").encode())
    read(capsys, "--pruned", "2=two.csv")


def test_arrays_of_bytes_are_text_and_arrays_of_objects_are_refused_with_a_remedy(capsys):
    for file, codes in (("labels.npy", LABELS), ("dense.npy", DENSE), ("two.npy", TWO)):
        np.save(file, np.array(NAMES)[codes].astype("S"))
    assert read(capsys)["class_names"] == list(NAMES)
    np.save("two.npy", np.array(NAMES)[TWO].astype(object))
    assert "save names as text" in refused(capsys)
    np.save("two.npy", np.int64(1))
    assert "two.npy contains a single value, 1" in refused(capsys)
    np.save("labels.npy", np.int64(1))
    assert "labels.npy contains a single value, 1" in refused(capsys)


def test_whole_floats_of_models_are_not_taken_for_logits(capsys):
    np.save("models.npy", np.stack([TWO, DENSE], 1).astype(float))
    assert "whole numbers as floats, of shape (60, 2)" in refused(capsys, "--pruned", "2=models.npy")
    np.save("one_hot.npy", np.eye(3)[TWO])
    read(capsys, "--pruned", "2=one_hot.npy")


# Ids and order ----------------------------------------------------------------------------------------


def ids(order, values, column="p", **more):
    return pd.DataFrame({"key": order + 100, column: values[order], **more})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", "m,m\n" + "1,2\n" * N, "p.csv has the column 'm' twice; rename or drop all but one"),
        ("p.json", '{"m": [1], "m": [2]}', "p.json has the key 'm' twice; rename or drop all but one"),
        ("p.jsonl", '{"m": 1, "m": 2}\n' * N, "p.jsonl has the key 'm' twice; rename or drop all but one"),
        ("p.parquet", None, "p.parquet has the column 'm' twice; rename or drop all but one"),
    ],
)
def test_predictions_with_a_repeated_name_are_refused(capsys, name, content, said):
    np.save("y.npy", LABELS)
    np.save("d.npy", DENSE)
    if content is None:
        pyarrow.parquet.write_table(pyarrow.table([pyarrow.array(TWO)] * 2, names=["m", "m"]), name)
    else:
        Path(name).write_text(content)
    assert said in refused(capsys, "--labels", "y.npy", "--dense", "d.npy", "--pruned", f"2={name}")


def test_an_id_column_joins_labels_predictions_and_groups(capsys):
    rng = np.random.default_rng(3)
    one, two, three, four = (rng.permutation(N) for _ in range(4))
    ids(one, LABELS, "label").to_csv("y.csv", index=False)
    ids(two, DENSE).to_csv("d.csv", index=False)
    ids(three, TWO).set_index("key").to_parquet("t.parquet")
    sex = np.where(np.arange(N) % 2, "f", "m")
    ids(four, sex, "sex").to_csv("g.csv", index=False)
    found = read(
        capsys, "--labels", "y.csv", "--dense", "d.csv", "--pruned", "2=t.parquet", "--groups", "g.csv", "--id", "key"
    )
    of_group = {row["group"]: row for row in found["tables"]["groups"] if row["class"] is None}
    assert of_group["f"]["recall"] == pytest.approx((TWO == LABELS)[sex == "f"].mean())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.iloc[1:], "no row for the id '"),
        (lambda t: pd.concat([t, t.iloc[:1]]), "twice, in rows 0 and 60"),
        (lambda t: t.rename(columns={"key": "other"}), "no column 'key' for --id"),
    ],
)
def test_missing_and_doubled_ids_are_named(capsys, change, said):
    order = np.arange(N)
    ids(order, LABELS, "label").to_csv("y.csv", index=False)
    ids(order, DENSE).to_csv("d.csv", index=False)
    change(ids(order, TWO)).to_csv("t.csv", index=False)
    assert said in refused(capsys, "--labels", "y.csv", "--dense", "d.csv", "--pruned", "2=t.csv", "--id", "key")


def test_rows_without_a_label_are_left_out_with_a_note(capsys):
    order = np.arange(N)
    ids(order, LABELS, "label").to_csv("y.csv", index=False)
    pd.concat([ids(order, DENSE), pd.DataFrame({"key": [7], "p": [0]})]).to_csv("d.csv", index=False)
    ids(order, TWO).to_csv("t.csv", index=False)
    found = read(capsys, "--labels", "y.csv", "--dense", "d.csv", "--pruned", "2=t.csv", "--id", "key")
    assert any("left out" in warning and "'7'" in warning for warning in found["warnings"])


@pytest.mark.parametrize("kind", [str, int, float])
def test_ids_with_leading_zeros_join_ids_that_are_text_or_numbers(capsys, kind):
    order = np.random.default_rng(0).permutation(N)
    named = np.array([f"{n:03d}" for n in range(N)])
    pd.DataFrame({"key": named, "label": LABELS}).to_csv("y.csv", index=False)
    pd.DataFrame({"key": named[order], "p": DENSE[order]}).to_csv("d.csv", index=False)
    pd.DataFrame({"key": named[order].astype(kind), "p": TWO[order]}).to_parquet("t.parquet")
    found = read(capsys, "--labels", "y.csv", "--dense", "d.csv", "--pruned", "2=t.parquet", "--id", "key")
    assert any("as numbers, as 007 with 7" in warning for warning in found["warnings"]) == (kind is not str)


def test_ids_that_differ_in_leading_zeros_alone_are_two_ids(capsys):
    keys = np.array(["7", "007", *(f"x{n}" for n in range(N - 2))])
    order = np.arange(N)[::-1]
    for file, column, codes in (("y.csv", "label", LABELS), ("d.csv", "p", DENSE), ("t.csv", "p", TWO)):
        pd.DataFrame({"key": keys[order], column: codes[order]}).to_csv(file, index=False)
        order = order[::-1]
    read(capsys, "--labels", "y.csv", "--dense", "d.csv", "--pruned", "2=t.csv", "--id", "key")


@pytest.mark.parametrize("models", [1, None])
@pytest.mark.parametrize("encode", [np.asarray, np.char.encode, lambda names: names[:, None]])
def test_ids_in_an_npz_sort_the_examples_of_logits(capsys, models, encode):
    names, order = np.array([f"i{n}" for n in range(N)]), np.random.default_rng(0).permutation(N)
    pd.DataFrame({"key": names, "label": LABELS}).to_csv("y.csv", index=False)
    for file, codes in (("d.npz", DENSE), ("t.npz", TWO)):
        logits = np.eye(3)[codes[order]] + 0.5
        np.savez(file, logits=logits if models is None else logits[None], key=encode(names[order]))
    read(capsys, "--labels", "y.csv", "--dense", "d.npz:logits", "--pruned", "2=t.npz:logits", "--id", "key")


def test_logits_with_fewer_examples_than_classes_are_sorted_along_the_examples():
    ids, order = np.array(["a", "b"], object), [1, 0]
    labels = Raw("y.csv", np.array([0, 1]), ids=ids, named_ids=True)
    logits = np.arange(6.0).reshape(2, 3)
    found = align(Raw("d.npz", logits[order], ids=ids[order], named_ids=True), labels)
    np.testing.assert_array_equal(found.values, logits)


ORDER = np.roll(np.arange(N), 7)
IDS = np.array([f"{n}.png" for n in range(N)])


def _with_ids(path, values, order, key="id"):
    if path.endswith(".npz"):
        np.savez(path, **{key: IDS[order], "p": values[order]})
    elif path.endswith(".jsonl"):
        rows = zip(IDS[order].tolist(), values[order].tolist(), strict=True)
        Path(path).write_text("".join(json.dumps({key: one, "p": value}) + "\n" for one, value in rows))
    else:
        pd.DataFrame({key: IDS[order], "p": values[order]}).to_csv(path, index=False)


@pytest.mark.parametrize(
    ("kind", "values"), [("csv", TWO), ("npz", LOGITS), ("jsonl", LOGITS)], ids=["csv", "npz", "jsonl"]
)
def test_picked_columns_of_files_with_other_ids_in_a_row_are_refused(capsys, kind, values):
    _with_ids("d.csv", DENSE, np.arange(N))
    _with_ids(f"t.{kind}", values, ORDER)
    given = ["--dense", "d.csv:p", "--pruned", f"2=t.{kind}:p"]
    said = f"t.{kind}:p and d.csv:p have a column 'id' with different ids: {N - 7}.png and 0.png in row 0; join the "
    assert said + "files with --id id" in refused(capsys, *given)
    _with_ids("labels.csv", LABELS, np.arange(N))
    read(capsys, "--labels", "labels.csv:p", *given, "--id", "id")
    _with_ids(f"t.{kind}", values, np.arange(N))
    read(capsys, *given)
    _with_ids(f"t.{kind}", values, np.arange(N), "other")
    read(capsys, *given)


def test_rows_that_are_numbered_from_0_and_from_1_are_the_same_rows(capsys):
    pd.DataFrame({"index": np.arange(N), "label": LABELS}).to_csv("y.csv", index=False)
    pd.DataFrame({"index": np.arange(N) + 1, "p": TWO}).to_csv("t.csv", index=False)
    read(capsys, "--labels", "y.csv", "--pruned", "2=t.csv:p")


def test_labels_and_groups_with_other_ids_in_a_row_are_refused(capsys):
    _with_ids("d.csv", DENSE, np.arange(N))
    pd.DataFrame({"id": IDS[ORDER], "label": LABELS[ORDER]}).to_csv("y.csv", index=False)
    assert "d.csv:p and y.csv have a column 'id'" in refused(capsys, "--labels", "y.csv", "--dense", "d.csv:p")
    pd.DataFrame({"id": IDS[ORDER], "sex": np.where(ORDER % 2, "f", "m")}).to_csv("g.csv", index=False)
    assert "g.csv:sex and d.csv:p have" in refused(capsys, "--dense", "d.csv:p", "--groups", "g.csv:sex")


def _of_text(path, names):
    frame = pd.DataFrame({"label": names})
    np.save(path, names) if path.endswith("npy") else frame.to_csv(path, index=False)


@pytest.mark.parametrize("kind", ["csv", "npy"])
def test_some_of_the_class_names_may_be_numbers(capsys, kind):
    names = np.array(["7", "x", "0"])
    for stem, codes in (("y", LABELS), ("d", DENSE), ("t", TWO)):
        _of_text(f"{stem}.{kind}", names[codes])
    given = ["--labels", f"y.{kind}", "--dense", f"d.{kind}", "--pruned", f"2=t.{kind}"]
    read(capsys, *given, "--class-names", "7,x,0")
    assert "(--class-names)" in refused(capsys, *given)


def test_numbers_that_are_the_name_of_one_class_and_the_index_of_another_are_refused(capsys):
    names = np.array(["1", "x", "0"])
    for stem, codes in (("y", LABELS), ("d", DENSE), ("t", 2 * (TWO // 2))):
        _of_text(f"{stem}.csv", names[codes])
    given = ["--labels", "y.csv", "--dense", "d.csv", "--pruned", "2=t.csv", "--class-names", "1,x,0"]
    said = "t.csv contains only numbers, and 0 is the name of one class and the index of another"
    assert said in refused(capsys, *given)
    read(capsys, "--class-names", "1,x,0")  # indices in all files


@pytest.mark.parametrize("kind", ["csv", "npy", "parquet"])
def test_codes_that_differ_in_leading_zeros_alone_are_not_merged(capsys, kind):
    codes = np.array(["001", "010", "1"])[LABELS]
    if kind == "npy":
        np.save("y.npy", codes)
    else:
        frame = pd.DataFrame({"label": codes})
        frame.to_csv("y.csv", index=False) if kind == "csv" else frame.to_parquet("y.parquet")
    said = refused(capsys, "--labels", f"y.{kind}")
    assert (
        "contains '001' and '1', which are one number" in said or "contains '1' and '001', which are one number" in said
    )


@pytest.mark.parametrize(
    ("labels", "ids", "said"),
    [
        (N, np.arange(N + 1), f"d.npz:p has shape ({N},) and {N + 1} ids: pass one id per example"),
        (N, np.arange(N - 1), f"d.npz:p has shape ({N},) and {N - 1} ids: pass one id per example"),
        (N - 1, np.arange(N), f"y.npz has shape ({N - 1},) and {N} ids: pass one id per example"),
        (N, np.arange(2 * N).reshape(N, 2), f"d.npz has ids 'key' of shape ({N}, 2); expected (examples,)"),
    ],
)
def test_ids_of_another_number_than_the_examples_are_refused(capsys, labels, ids, said):
    np.savez("y.npz", label=LABELS[:labels], key=np.arange(N))
    np.savez("d.npz", p=DENSE, key=ids)
    np.savez("t.npz", p=TWO, key=np.arange(N))
    assert said in refused(capsys, "--labels", "y.npz", "--dense", "d.npz:p", "--pruned", "2=t.npz:p", "--id", "key")


def test_lists_of_labels_with_scores_are_refused(capsys):
    row = json.dumps([{"label": name, "score": 0.5} for name in NAMES])  # of a Hugging Face pipeline with top_k=None
    Path("t.jsonl").write_text(f"{row}\n" * N)
    said = "t.jsonl, column '0' contains objects: save the predicted class itself"
    assert said in refused(capsys, "--labels", "labels.npy", "--dense", "dense.npy", "--pruned", "2=t.jsonl")


def test_columns_of_several_files_are_paired_by_name():
    models = np.stack([made(seed, rate) for seed, rate in ((0, 0.1), (1, 0.2), (2, 0.3), (3, 0.4))])
    columns = [f"seed{m}" for m in range(4)]
    for name, part in (("a", slice(0, 2)), ("b", slice(2, 4))):
        pd.DataFrame(models.T[:, part], columns=columns[part]).to_csv(f"{name}.csv", index=False)
    sets = {"dense": ["a.csv", "b.csv"], "two": ["b.csv", "a.csv"]}
    raws = {name: [read_predictions(file, N) for file in files] for name, files in sets.items()}
    found = prepare(Raw("labels", LABELS), raws).sets
    np.testing.assert_array_equal(found["two"].predicted, models)
    assert found["two"].notes == (
        "b.csv, a.csv: the models were put in the order seed0, seed1, seed2, seed3, because models are paired by the "
        "names of their columns",
    )


def test_names_in_bytes_that_are_no_text_are_refused(capsys):
    pd.DataFrame({"label": [b"\xff"] * N}).to_parquet("y.parquet")
    assert "column 'label' contains b'\\xff', bytes that are not UTF-8" in refused(capsys, "--labels", "y.parquet")


def test_a_line_of_jsonl_may_contain_other_line_separators(capsys):
    rows = [{"text": "a\u2028b\x85c", "p": int(code)} for code in TWO]
    Path("t.jsonl").write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    read(capsys, "--labels", "labels.npy", "--dense", "dense.npy", "--pruned", "2=t.jsonl:p")


def test_a_probability_of_one_half_is_class_1_in_every_measure():
    score = np.round(np.random.default_rng(0).random(N), 1).astype(np.float32)
    found = recall.audit(LABELS > 0, score, {2: score}, threshold=0.5)
    np.testing.assert_array_equal(found.probabilities["top_k"][:2], found.classes["recall"])


def test_a_missing_id_is_an_error(capsys):
    pd.DataFrame({"key": np.arange(N), "label": LABELS}).to_csv("y.csv", index=False)
    pd.DataFrame({"key": [None, *range(1, N)], "p": DENSE}).to_csv("d.csv", index=False)
    assert "--dense: d.csv has no id at example 0" in refused(
        capsys, "--labels", "y.csv", "--dense", "d.csv", "--id", "key"
    )


def test_an_index_that_differs_is_an_error(capsys):
    order = np.random.default_rng(0).permutation(N)
    labels = pd.Series(LABELS[order], index=order)
    predicted = pd.DataFrame({"m": TWO}, index=np.arange(N)[::-1])
    with pytest.raises(InputError, match="different row indices"):
        recall.audit(labels, pd.Series(DENSE[order], index=order), {2: predicted})
    pd.DataFrame({"label": LABELS[order]}, index=order).to_parquet("y.parquet")
    predicted.to_csv("t.csv")
    status, _, err = run(capsys, "--labels", "y.parquet", "--pruned", "2=t.csv")
    assert status == 2
    assert "different row indices" in err


def test_an_index_that_differs_in_json_of_pandas_is_an_error(capsys):
    order = np.random.default_rng(0).permutation(N)
    pd.DataFrame({"label": LABELS}, index=np.arange(N) + 100).iloc[order].to_json("y.json")
    for name, predicted in (("d.json", DENSE), ("t.json", TWO)):
        pd.DataFrame({"m": predicted}, index=np.arange(N) + 100).to_json(name)
    given = ("--labels", "y.json", "--dense", "d.json", "--pruned", "2=t.json")
    assert "d.json and y.json have different row indices: 100 and 116 in row 0" in refused(capsys, *given)
    pd.DataFrame({"label": LABELS}, index=np.arange(N) + 100).to_json("y.json")
    read(capsys, *given)


def test_files_that_all_begin_with_the_header_of_a_series_are_asked_about(capsys):
    for name, values in (("y.csv", LABELS), ("d.csv", DENSE), ("t.csv", TWO)):
        pd.Series(values).to_csv(name, index=False)  # under the header 0
    given = ("--labels", "y.csv", "--dense", "d.csv", "--pruned", "2=t.csv")
    said = "every file begins with 0, like a header of column numbers, and has 61 rows"
    assert any(said in warning for warning in run(capsys, *given)[1]["warnings"])
    for name, values in (("y.csv", LABELS), ("d.csv", DENSE), ("t.csv", TWO)):
        pd.Series(values).to_csv(name, index=False, header=False)
    assert not any("begins with 0" in warning for warning in read(capsys, *given)["warnings"])


@pytest.mark.parametrize(
    ("cells", "mark"), [((*map(str, DENSE[:-1]), "NA"), "NA"), ((*(NAMES[c] for c in DENSE[:-1]), "nan"), "nan")]
)
def test_a_mark_of_a_missing_value_is_called_so(capsys, cells, mark):
    Path("d.csv").write_text("\n".join(["m", *cells]))
    said = f"d.csv, column 'm' contains '{mark}' at example 59, which marks a missing value: leave the example out"
    assert said in refused(capsys, "--dense", "d.csv")


def test_bfloat16_in_a_file_is_refused_with_what_to_save(capsys):
    np.save("two.npy", LOGITS.astype(ml_dtypes.bfloat16))
    assert "got dtype |V2; save bfloat16 as .astype(np.float32)" in refused(capsys)


def test_a_key_of_json_without_keys_is_refused(capsys):
    Path("two.json").write_text(json.dumps(TWO.tolist()))
    said = "two.json has no key 'pred', because its entries are not objects"
    assert said in refused(capsys, "--pruned", "2=two.json:pred")


def test_an_index_in_another_order_is_an_error_also_where_labels_have_none():
    shuffled = pd.Series(TWO).sample(frac=1, random_state=0)
    for labels in (LABELS, pd.Series(LABELS)):
        with pytest.raises(
            InputError, match=r"row indices in another order \(26, 35, 59, ...\) and labels has no index"
        ):
            recall.audit(labels, DENSE, {2: shuffled})
        with pytest.raises(InputError, match="row indices in another order"):
            recall.audit(labels, DENSE, {2: TWO}, groups=pd.DataFrame({"g": LABELS}).sample(frac=1, random_state=0))
    subset = pd.Series(LABELS, index=np.arange(N) * 7)  # of a train-test split; predictions are in its order
    assert recall.audit(subset, DENSE, {2: pd.Series(TWO)}).summary["accuracy"][0] == pytest.approx(ACCURACY[1])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda d: (d + 1) % 3, "numbered in another order"),
        (lambda d: d[::-1], "reverse them"),
        (np.sort, "sort the labels"),
        (lambda d: np.random.default_rng(5).permutation(d), "are not shown to depend on the labels. Are the rows"),
    ],
)
def test_accuracy_at_chance_warns_and_names_the_correction(change, said):
    report = recall.audit(LABELS, change(DENSE), {2: TWO})
    assert any("chance (" in warning and said in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("compressed", "said"),
    [
        (TWO[::-1], "reverse them"),
        (-LOGITS, "the smallest number marks the class"),
        (np.random.default_rng(5).permutation(TWO), "Are the rows in another order, or are the models"),
        (np.zeros(N, int), None),
    ],
)
def test_compressed_models_in_another_order_cause_a_warning_and_collapsed_ones_do_not(compressed, said):
    found = [warning for warning in recall.audit(LABELS, DENSE, {2: compressed}).warnings if "chance (" in warning]
    assert len(found) == (said is not None)
    assert said is None or (said in found[0] and found[0].startswith("pruned[2]: "))


def test_classes_that_are_swapped_are_noticed_although_accuracy_is_above_chance():
    labels = np.repeat(np.arange(6), 50)
    right = np.where(np.random.default_rng(0).random(300) < 0.1, 0, labels)
    swapped = np.array([0, 1, 2, 3, 5, 4])[right]
    names = ["ant", "bee", "cat", "dog", "elk", "fox"]
    warnings = recall.audit(labels, swapped, {2: right}, class_names=names).warnings
    accuracy, corrected = 100 * (swapped == labels).mean(), 100 * (right == labels).mean()
    assert [w for w in warnings if "another order" in w] == [
        f"dense: accuracy {accuracy:.1f}% would be {corrected:.1f}% if the classes are numbered in another order "
        f"(predicted elk for fox, fox for elk)"
    ]


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_shuffled_rows_are_noticed_and_models_in_order_are_not(classes):
    rng = np.random.default_rng(classes)
    for _ in range(20):
        labels = rng.integers(0, classes, 400)
        said = np.where(rng.random(400) < 0.4, rng.integers(0, classes, 400), labels)
        assert about_order(labels, Predictions("p", said[None], None), [*map(str, range(classes))]) == []
        (warning,) = about_order(
            labels, Predictions("p", rng.permutation(said)[None], None), [*map(str, range(classes))]
        )
        assert "not shown to depend on the labels. Are the rows in another order?" in warning


def test_an_accuracy_above_chance_on_few_examples_is_not_called_chance():
    labels, predicted = np.repeat([0, 1], 10), np.repeat([0, 1], [6, 14])
    (warning,) = about_order(labels, Predictions("p", predicted[None], None), ["a", "b"])
    assert warning.startswith("p: accuracy 80.0% is not clearly above chance (50.0%): predictions are not shown to")


def test_a_collapsed_network_or_a_test_set_of_one_class_gives_no_alarm_about_order():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 400)
    few = np.where(rng.random(400) < 0.9, 3, rng.integers(0, 10, 400))
    assert about_order(labels, Predictions("pruned", few[None], None), [*"0123456789"], dense=False) == []
    (warning,) = about_order(labels, Predictions("dense", np.full((1, 400), 3), None), [*"0123456789"])
    assert warning.endswith("one class is predicted for every example")
    assert about_order(np.zeros(400, int), Predictions("dense", few[None], None), [*"0123456789"]) == []


def test_predictions_that_depend_on_the_labels_but_are_wrong_ask_about_the_classes():
    labels = np.arange(400) % 10
    said = np.where(labels < 5, 7, 2)
    (warning,) = about_order(labels, Predictions("dense", said[None], None), [*"0123456789"])
    assert warning == (
        "dense: accuracy 0.0% is no more than chance (10.0%), although predictions depend on the labels. Are the "
        "classes in the order of the labels?"
    )


def test_quantities_are_noticed_and_classes_are_not():
    rng = np.random.default_rng(0)
    for low, high, error in ((0, 60, 3), (1, 10, 1)):
        ages = rng.integers(low, high + 1, 400)
        said = np.clip(ages + rng.integers(-error, error + 1, 400), low, high)
        (warning,) = about_quantities(ages, Predictions("dense", said[None], None))
        assert "close to the label" in warning
    labels = rng.integers(0, 100, 400)
    wrong = np.where(rng.random(400) < 0.5, rng.integers(0, 100, 400), labels)
    assert about_quantities(labels, Predictions("dense", wrong[None], None)) == []


@pytest.mark.parametrize("grades", [5, 7, 10])
def test_ratings_are_noticed_as_numbers_and_by_their_names(grades):
    rng = np.random.default_rng(grades)
    stars = rng.integers(1, grades + 1, 800)
    said = np.clip(stars + rng.choice([-2, -1, 0, 1, 2], 800, p=[0.02, 0.15, 0.66, 0.15, 0.02]), 1, grades)
    names = [str(i + 1) for i in range(grades)]
    for labels, predicted, given in ((stars, said, None), (stars - 1, said - 1, names)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", recall.EmptyClassWarning)  # whole numbers from 1 leave class 0 empty
            found = recall.audit(labels, predicted, {2: predicted}, class_names=given).warnings
        assert not any("close to the label" in warning for warning in found)
        found = [warning for warning in found if "look like ratings" in warning]
        assert len(found) == 2
        assert found[0].startswith(f"dense: the labels 1 to {grades} look like ratings")
        assert "ignores the order of classes" in found[0]


def test_class_ids_are_not_taken_for_ratings():
    names = {start: [str(i + start) for i in range(10)] for start in (0, 1)}
    alike = np.array([8, 9, 4, 5, 7, 3, 3, 4, 0, 1])  # CIFAR-10: airplane as ship, cat as dog, ...
    for seed in range(20):
        rng = np.random.default_rng(seed)
        true = rng.integers(0, 10, 2000)
        wrong = np.where(rng.random(2000) < 0.7, alike[true], rng.integers(0, 10, 2000))
        said = Predictions("dense", np.where(rng.random(2000) < 0.3, wrong, true)[None], None)
        assert about_ratings(true, said, names[1]) == []
        near = Predictions("dense", np.clip(true + rng.integers(-1, 2, 2000), 0, 9)[None], None)
        assert about_ratings(true, near, names[0]) == []  # digits from 0
        assert about_ratings(true, near, [*"abcdefghij"]) == []
        few = true % 5
        uniform = Predictions("dense", np.where(rng.random(2000) < 0.3, rng.integers(0, 5, 2000), few)[None], None)
        assert about_ratings(few, uniform, names[1][:5]) == []


@pytest.mark.parametrize("of", ["dense", "pruned"])
def test_labels_given_as_predictions_are_noticed(of):
    given = {"dense": DENSE, "pruned": {2: TWO}} | {of: LABELS if of == "dense" else {2: LABELS}}
    assert any("every prediction equals the label" in w for w in recall.audit(LABELS, **given).warnings)


def test_labels_among_the_models_are_noticed():
    report = recall.audit(LABELS, np.stack([DENSE, LABELS]), {2: np.stack([TWO, TWO])})
    assert any("dense: model 1 is right about every example" in warning for warning in report.warnings)


def test_predictions_numbered_from_1_are_asked_about(capsys):
    np.save("two.npy", TWO + 1)
    assert "numbered from 1?" in refused(capsys)


def test_labels_numbered_from_1_are_noticed():
    with pytest.warns(recall.EmptyClassWarning):
        report = recall.audit(LABELS + 1, DENSE, {2: TWO}, num_classes=4)
    assert any("add 1 to them" in warning for warning in report.warnings)
    assert not any("chance" in warning for warning in recall.audit(LABELS, DENSE, {2: TWO}).warnings)


# Names and kinds --------------------------------------------------------------------------------------


def test_text_labels_give_the_class_names():
    names = np.array(NAMES)
    report = recall.audit(names[LABELS], names[DENSE], {2: pd.Series(names[TWO], dtype="category")})
    assert report.class_names == NAMES
    assert report.summary["accuracy"][0] == pytest.approx(ACCURACY[1])
    assert any("sorted order" in warning for warning in report.warnings)


def test_names_without_a_header_do_not_lose_the_first_example(folder, capsys):
    for file, codes in (("y.csv", LABELS), ("d.csv", DENSE), ("t.csv", TWO)):
        (folder / file).write_text("\n".join(np.array(NAMES)[codes]) + "\n")
    found = read(capsys, "--labels", "y.csv", "--dense", "d.csv", "--pruned", "2=t.csv")
    assert found["examples"] == N


@pytest.mark.parametrize("heading", ["{}", "prob_{}", "p({})"])
@pytest.mark.parametrize("labels", [LABELS, np.array(NAMES)[LABELS]])
def test_columns_of_logits_are_put_in_the_order_of_the_class_names(labels, heading):
    other = pd.DataFrame(LOGITS[:, [2, 0, 1]], columns=[heading.format(NAMES[place]) for place in (2, 0, 1)])
    for dense in (np.array(NAMES)[DENSE], pd.DataFrame(np.eye(3)[DENSE] * 2.5, columns=NAMES)):
        report = recall.audit(labels, dense, {2: other}, class_names=NAMES)
        assert (report.summary["accuracy_dense"][0], report.summary["accuracy"][0]) == pytest.approx(ACCURACY)
        assert any("put in the order of the classes" in warning for warning in report.warnings)
    numbered = pd.DataFrame(LOGITS[:, ::-1], columns=[2, 1, 0])
    assert recall.audit(LABELS, DENSE, {2: numbered}).summary["accuracy"][0] == pytest.approx(ACCURACY[1])


def test_columns_of_logits_with_class_names_are_in_their_own_order():
    frame = pd.DataFrame(LOGITS[:, ::-1], columns=NAMES[::-1])
    report = recall.audit(pd.Series(np.array(NAMES)[LABELS]), np.array(NAMES)[DENSE], {2: frame})
    assert report.class_names == NAMES[::-1]
    assert report.summary["accuracy"][0] == pytest.approx(ACCURACY[1])


def test_class_names_that_are_numbers_are_matched_by_value(folder, capsys):
    for file, codes in (("y.csv", LABELS), ("d.csv", DENSE), ("t.csv", TWO)):
        pd.DataFrame({"label": codes + 1}).to_csv(folder / file, index=False)
    found = read(capsys, "--labels", "y.csv", "--dense", "d.csv", "--pruned", "2=t.csv", "--class-names", "1,2,3")
    assert found["class_names"] == ["1", "2", "3"]
    found = read(capsys, "--class-names", "0,1,2")
    np.save("labels.npy", LABELS * 10)
    np.save("dense.npy", DENSE * 10)
    np.save("two.npy", TWO * 10)
    assert read(capsys, "--class-names", "20,10,0")["class_names"] == ["20", "10", "0"]


def test_a_quoted_name_may_hold_a_comma(folder, capsys):
    names = np.array(["ant", "bee, big", "cat"])
    for file, codes in (("y.csv", LABELS), ("d.csv", DENSE), ("t.csv", TWO)):
        pd.DataFrame({"label": names[codes]}).to_csv(folder / file, index=False)
    files = ("--labels", "y.csv", "--dense", "d.csv", "--pruned", "2=t.csv")
    assert read(capsys, *files, "--class-names", 'ant,"bee, big",cat')["class_names"] == list(names)
    assert read(capsys, *files)["class_names"] == list(names)


def test_booleans_sigmoids_and_ignored_labels(capsys):
    truth, rng = np.arange(N) % 2 == 1, np.random.default_rng(0)
    score = np.clip(truth * 0.4 + 0.3 + rng.normal(size=N) * 0.3, 0.01, 0.99)
    report = recall.audit(truth, truth ^ (rng.random(N) < 0.1), {2: score}, threshold=0.5)
    assert report.class_names == ("False", "True")
    assert report.summary["accuracy"][0] == pytest.approx(((score >= 0.5) == truth).mean())
    with pytest.raises(InputError, match=r"--threshold 0\.5"):
        recall.audit(truth, truth, {2: score})
    some = LABELS.copy()
    some[::7] = -1
    kept = some >= 0
    report = recall.audit(some, DENSE, {2: LOGITS}, ignore_label=-1, groups=np.where(DENSE, "x", "y"))
    assert report.examples == kept.sum()
    assert report.summary["accuracy"][0] == pytest.approx((TWO == LABELS)[kept].mean())
    with pytest.raises(InputError, match="--ignore-label -1"):
        recall.audit(some, DENSE, {2: TWO})
    np.save("labels.npy", some)
    status, found, _ = run(capsys, "--ignore-label", "-1")
    assert (status, found["examples"]) == (0, kept.sum())


def test_pandas_hugging_face_and_batches_are_read():
    output = type("PredictionOutput", (), {})()
    output.predictions, output.label_ids = LOGITS, LABELS
    columns = {"__getitem__": lambda self, key: LABELS.tolist(), "column_names": ["text", "label"], "features": {}}
    dataset = type("Dataset", (), columns)()
    batches = [LOGITS[:25], LOGITS[25:50], LOGITS[50:]]
    frame = pd.DataFrame({"one": TWO})
    for labels, pruned in (
        (pd.Series(LABELS), frame),
        (output, output),
        (dataset, batches),
        ([LABELS[:40], LABELS[40:]], pd.DataFrame(LOGITS)),
        (LABELS, [LOGITS[:20], LOGITS[20:40], LOGITS[40:]]),
        (LABELS, [TWO[:30], TWO[30:]]),
    ):
        report = recall.audit(labels, [DENSE], {2: pruned})
        assert report.summary["accuracy"][0] == pytest.approx(ACCURACY[1])


def test_ties_and_empty_logits_are_counted():
    logits = LOGITS.copy()
    logits[3], logits[4], logits[5] = [1, 1, 0], [-np.inf] * 3, [2, 2, 2]
    said = " ".join(recall.audit(LABELS, DENSE, {2: logits}).warnings)
    assert "1 of 60 predictions has several largest logits" in said
    assert "2 of 60 predictions have equal logits (or -inf)" in said


@pytest.mark.parametrize("missing", [None, np.nan, "", pd.NA])
def test_missing_groups_are_one_group(missing, capsys):
    values = pd.Series(["x", "y"] * (N // 2), dtype=object)
    values[[0, 5]] = missing
    for given in (values.to_numpy(), pd.DataFrame({"g": values})):
        report = recall.audit(LABELS, DENSE, {2: TWO}, groups=given)
        whole = report.groups[report.groups["class"].isna()].set_index("group")["support"]
        assert whole["(missing)"] == 2
        assert any("2 of 60 examples have no g" in warning for warning in report.warnings)
    values.to_csv("g.csv", index=False, header=["g"])
    status, found, _ = run(capsys, "--groups", "g.csv")
    assert status in (0, 2)  # a blank line of a one-column table is refused, as everywhere
    assert status == 2 or any(row["group"] == "(missing)" for row in found["tables"]["groups"])


def test_groups_that_may_be_subjects_cause_a_warning_that_examples_are_not_independent():
    noted = [recall.audit(LABELS, DENSE, {2: TWO}, groups=np.arange(N) % each).warnings for each in (N // 3, 2)]
    said = "groups: group has 20 groups for 60 examples: if a group has the images of one subject"
    assert [any(warning.startswith(said) for warning in warnings) for warnings in noted] == [True, False]


def test_as_many_groups_as_examples_are_refused():
    with pytest.raises(InputError, match="60 groups for 60 examples"):
        recall.audit(LABELS, DENSE, {2: TWO}, groups=np.arange(N))


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (np.eye(3, dtype=int)[LABELS] | np.eye(3, dtype=int)[DENSE], "multi-label"),
        (np.random.default_rng(0).random((N, 4)), "one true class per example"),
        (np.random.default_rng(0).random(N), "not for regression"),
        (2 * (LABELS == 0) - 1, r"class_names=\['-1', '1'\] \(--class-names=-1,1\)"),
    ],
)
def test_other_tasks_than_single_label_classification_are_refused(labels, said):
    with pytest.raises(InputError, match=said):
        recall.audit(labels, DENSE, {2: TWO})


def test_whether_models_are_right_is_not_taken_for_their_predictions():
    with pytest.raises(
        InputError, match=r"pruned\[2\] contains booleans and labels contains 2: pass the predicted classes"
    ):
        recall.audit(LABELS, DENSE, {2: TWO == LABELS})


def test_lists_of_logits_in_a_column_are_read(capsys):
    pd.DataFrame({"logits": list(LOGITS)}).to_parquet("two.parquet")
    read(capsys, "--pruned", "2=two.parquet")
    assert recall.audit(LABELS, DENSE, {2: pd.Series(list(LOGITS))}).summary["accuracy"][0] == ACCURACY[1]
    with pytest.raises(InputError, match="3 numbers at example 0 and 2 at example 59"):
        recall.audit(LABELS, DENSE, {2: pd.Series([*LOGITS[:-1], LOGITS[-1, :2]])})


def test_rounded_probabilities_are_probabilities_and_sigmoids_are_named():
    rounded = np.round(np.exp(LOGITS) / np.exp(LOGITS).sum(1, keepdims=True), 2)
    report = recall.audit(LABELS, rounded, {2: rounded})
    whole = report.probabilities[report.probabilities["class"].isna()]
    assert whole["confidence"].iloc[0] == pytest.approx((rounded.max(1) / rounded.sum(1)).mean())
    assert not any("do not sum to 1" in warning for warning in report.warnings)
    report = recall.audit(LABELS, rounded, {2: np.clip(rounded + 0.1, 0, 1)})
    assert any("pruned[2] contains numbers from 0 to 1 whose rows do not" in w for w in report.warnings)


def test_missing_groups_in_a_list_are_not_converted_to_text():
    report = recall.audit(LABELS, DENSE, {2: TWO}, groups={"g": ["x", np.nan] * (N // 2)})
    assert set(report.groups["group"]) == {"x", "(missing)"}


@pytest.mark.parametrize("kind", [np.int64, np.bool_, np.str_])
def test_groups_may_be_numpy_scalars_among_missing_values(kind):
    values = [None if n == 0 else kind(n % 2) for n in range(N)]
    for given in (values, np.array(values, object)):
        report = recall.audit(LABELS, DENSE, {2: TWO}, groups=given)
        names = {"(missing)", str(kind(0)), str(kind(1))}
        assert set(report.groups["group"]) == names


@pytest.mark.parametrize("kind", [np.array, pd.Index, pd.Series])
def test_class_names_may_be_an_array(kind):
    report = recall.audit(np.eye(3, dtype=int)[LABELS], DENSE, {2: TWO}, class_names=kind(NAMES))
    assert report.class_names == NAMES


def test_a_group_called_na_is_asked_about():
    report = recall.audit(LABELS, DENSE, {2: TWO}, groups={"sex": np.where(LABELS == 0, "NA", "f")})
    assert any("the sex 'NA' is read as the name of a group" in warning for warning in report.warnings)


@pytest.mark.parametrize("option", ["--labels", "--dense", "--pruned", "--groups"])
def test_a_file_that_is_missing_is_named_with_its_option(capsys, option):
    value = "2=none.npy" if option == "--pruned" else "none.npy"
    assert f"jprune audit: {option}: none.npy does not exist" in refused(capsys, option, value)


def test_several_labels_in_one_cell_and_marks_for_no_class_cause_a_warning():
    names = np.array(["cat|dog", "cat", "dog"])
    warnings = recall.audit(names[LABELS], names[DENSE], {2: names[TWO]}).warnings
    assert any("'cat|dog' looks like several labels" in warning for warning in warnings)
    names = np.array(["tench, Tinca tinca", "cat", "dog"])
    assert not any("several" in w for w in recall.audit(names[LABELS], names[DENSE], {2: names[TWO]}).warnings)
    marked = np.where(np.arange(N) % 6, LABELS, 255)
    with pytest.warns(recall.EmptyClassWarning):
        report = recall.audit(marked, DENSE, {2: TWO})
    assert any("contains 255, and otherwise 0 to 2" in w and "--ignore-label 255" in w for w in report.warnings)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("two.npy", "is the text 'two.npy'; read the file first"),
        (np.ma.masked_array(TWO, np.arange(N) < 3), "masked entries"),
        (1, "is a single value, 1"),
        (
            np.where(np.arange(N) == 7, np.nan, TWO),
            "contains NaN at model 0, example 7; every example needs a prediction",
        ),
        (pd.DataFrame({"m": pd.array([None, *TWO[1:]], dtype="Int64")}), "column 'm' has no number at example 0"),
        ([{"p": int(c)} for c in TWO], "got {'p': "),
        (None, "dtype object"),
    ],
)
def test_objects_that_hold_no_predictions_are_refused(given, said):
    with pytest.raises(InputError) as error:
        recall.audit(LABELS, DENSE, {2: given})
    assert said in str(error.value)
    assert "pruned[2]" in str(error.value)


def test_options_out_of_range_are_input_errors():
    with pytest.raises(InputError, match=r"level must lie strictly between 0 and 1 .* got 99"):
        recall.audit(LABELS, DENSE, {2: TWO}, level=99)


def test_many_distinct_labels_are_warned_of():
    ages = np.random.default_rng(0).permutation(N) % 50
    assert any("if they are quantities" in warning for warning in recall.audit(ages, ages, {2: ages}).warnings)


def test_models_may_be_compared_by_name(capsys):
    assert "not both" in refused(capsys, "--compare", "int8=two.npy")
    status = main(["audit", "--labels", "labels.npy", "--dense", "dense.npy", "--compare", "int8=two.npy", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == 0
    assert found["tables"]["summary"][0]["ratio"] is None
    assert "int8" in found["headline"]
    assert "pruned" not in found["headline"]
    assert not any("no control" in warning for warning in found["warnings"])


def test_numbers_may_name_models_and_their_dense_models():
    report = recall.audit(LABELS, {8: DENSE, 4: TWO}, compare={8: TWO, 4: TWO})
    assert report.scores == ("8", "4")
    assert report.summary["accuracy_dense"].tolist() == pytest.approx(ACCURACY)


@pytest.mark.parametrize("change", [str.upper, "'{}'".format, '"{}"'.format, lambda name: f"{name}."])
def test_predicted_names_that_differ_from_the_labels_only_in_case_or_quotes_are_refused(change):
    other = np.array([change(name) for name in NAMES])[TWO]
    with pytest.raises(InputError, match="write every class in one way"):
        recall.audit(np.array(NAMES)[LABELS], np.array(NAMES)[DENSE], {2: other})


def test_classes_that_are_letters_of_both_cases_are_two_classes():
    letters = np.array(["a", "A", "b"])
    report = recall.audit(letters[LABELS], letters[DENSE], {2: letters[TWO]})
    assert (report.summary["accuracy_dense"][0], report.summary["accuracy"][0]) == pytest.approx(ACCURACY)


@pytest.mark.parametrize("heading", ["c{}", "prob_{}", "P({})", "{}"])
@pytest.mark.parametrize("first", [0, 1])
def test_columns_of_logits_that_are_numbered_in_another_order_are_put_in_order(heading, first):
    order = [2, 0, 1]
    other = pd.DataFrame(LOGITS[:, order], columns=[heading.format(n + first) for n in order])
    report = recall.audit(LABELS, DENSE, {2: other})
    assert report.summary["accuracy"][0] == pytest.approx(ACCURACY[1])
    assert any("put in the order of the classes" in warning for warning in report.warnings)


@pytest.mark.parametrize("names", [["seed0", "seed1", "seed2"], ["ada", "bob", "eve"]])
def test_models_in_columns_are_paired_by_their_names(names):
    dense = np.stack([DENSE, made(5, 0.2), made(6, 0.3)], axis=1)
    after = np.where(np.arange(N)[:, None] % 9 == 0, (LABELS[:, None] + 1) % 3, dense)
    order = [2, 0, 1]
    for texts in (lambda codes: codes, lambda codes: np.array(NAMES)[codes]):
        frames = [pd.DataFrame(texts(codes), columns=names) for codes in (dense, after)]
        labels, wanted = texts(LABELS), recall.audit(texts(LABELS), frames[0], {2: frames[1]})
        found = recall.audit(labels, frames[0], {2: frames[1][[names[n] for n in order]]})
        pd.testing.assert_frame_equal(found.summary, wanted.summary)
        assert any("models are paired by their names" in warning for warning in found.warnings)
        assert not any("paired by" in warning for warning in wanted.warnings)
    other = recall.audit(
        LABELS, pd.DataFrame(dense, columns=names), {2: pd.DataFrame(after, columns=[*names[1:], "x"])}
    )
    assert any("has a column 'x', dense has none: models are paired by index" in warning for warning in other.warnings)


def test_columns_of_logits_in_two_orders_need_class_names_where_labels_are_numbers():
    dense = pd.DataFrame(np.eye(3)[DENSE] * 2.5, columns=NAMES)
    other = pd.DataFrame(LOGITS[:, [2, 0, 1]], columns=[NAMES[2], NAMES[0], NAMES[1]])
    with pytest.raises(InputError, match=r"columns of dense are ant, bee, cat and those of pruned.* are cat, ant, bee"):
        recall.audit(LABELS, dense, {2: other})
    report = recall.audit(LABELS, dense, {2: other[list(NAMES)]})
    assert report.summary["accuracy"][0] == pytest.approx(ACCURACY[1])


ONE, TWO_FROM_1 = DENSE + 1, TWO + 1  # numbered from 1, with class names that are numbers


@pytest.mark.filterwarnings("ignore::jprune.recall.EmptyClassWarning")
@pytest.mark.parametrize("ignored", [1, 3, -1])
def test_the_label_to_leave_out_is_that_of_the_given_labels(ignored):
    given = np.where(np.arange(N) < 5, -1, LABELS + 1)
    report = recall.audit(
        np.where(given == -1, ignored, given), ONE, {2: TWO_FROM_1}, class_names=["1", "2", "3"], ignore_label=ignored
    )
    kept = (given != ignored) & (given != -1)
    support = dict(zip(report.classes["class"], report.classes["support"], strict=True))
    assert support == {str(c): int((given[kept] == c).sum()) for c in (1, 2, 3)}
    left_out = f"{N - kept.sum()} examples with the label {ignored} are left out"
    assert f"{left_out}; the indices of examples do not count them" in report.warnings


def test_a_label_to_leave_out_that_is_not_a_whole_number_is_refused():
    with pytest.raises(InputError, match="ignore_label must be a whole number, got True"):
        recall.audit(LABELS, DENSE, {2: TWO}, ignore_label=True)  # the tests check the types of other values


def test_a_label_to_leave_out_that_no_example_has_is_reported():
    report = recall.audit(LABELS, DENSE, {2: TWO}, ignore_label=-100)
    assert "no example has the label -100, so none is left out" in report.warnings


@pytest.mark.filterwarnings("ignore::jprune.recall.EmptyClassWarning")
def test_one_hot_labels_with_a_class_to_leave_out():
    report = recall.audit(np.eye(3, dtype=int)[LABELS], DENSE, {2: TWO}, ignore_label=2, num_classes=3)
    assert report.examples == (LABELS != 2).sum()


@pytest.mark.parametrize("shape", [(N,), (1, N), (N, 1)])
@pytest.mark.parametrize("missing", [False, True])
def test_decimal_classes_are_matched_with_class_names_that_are_numbers(shape, missing):
    """If a class is never predicted, the numbers would also be valid indices."""
    one, two = (np.where(given == 3, 2, given) if missing else given for given in (ONE, TWO_FROM_1))
    given = [array.astype(float).reshape(shape) for array in (one, two)]
    report = recall.audit(LABELS + 1, given[0], {2: given[1]}, class_names=["1", "2", "3"])
    accuracy = [(array == LABELS + 1).mean() for array in (one, two)]
    assert report.summary[["accuracy_dense", "accuracy"]].iloc[0].tolist() == pytest.approx(accuracy)


def test_boolean_one_hot_labels_are_classes():
    report = recall.audit(np.eye(3, dtype=bool)[LABELS], LOGITS, {2: LOGITS})
    assert report.class_names == ("0", "1", "2")
    assert report.summary["accuracy"].item() == pytest.approx(ACCURACY[1])


def test_a_list_of_one_hot_vectors_is_labels_and_not_batches():
    report = recall.audit([np.eye(3)[c] for c in LABELS], DENSE, {2: TWO})
    assert report.examples == N
    assert report.summary["accuracy"].item() == pytest.approx(ACCURACY[1])


def test_columns_of_one_hot_labels_are_in_the_order_of_the_class_names():
    one_hot = pd.DataFrame(np.eye(3, dtype=int)[LABELS], columns=NAMES)
    order = [2, 0, 1]
    index = np.argsort(order)
    report = recall.audit(one_hot, index[DENSE], {2: index[TWO]}, class_names=[NAMES[c] for c in order])
    assert report.summary[["accuracy_dense", "accuracy"]].iloc[0].tolist() == pytest.approx(ACCURACY)


def test_batches_of_one_size_are_joined_before_examples_are_left_out():
    labels = np.where(np.arange(N) < 7, -1, LABELS)
    batches = [LOGITS[start : start + 20] for start in (0, 20, 40)]
    report = recall.audit(labels, DENSE, {2: batches}, ignore_label=-1)
    assert report.summary["accuracy"].item() == pytest.approx((TWO == LABELS)[7:].mean())


def test_errors_about_an_example_say_that_those_left_out_are_not_counted():
    labels, nan = np.where(np.arange(N) < 7, -1, LABELS), LOGITS.copy()
    nan[9] = np.nan
    message = "example 2, .*counted from 0 without the 7 that ignore_label=-1 .--ignore-label -1. leaves out"
    with pytest.raises(recall.InputError, match=message):
        recall.audit(labels, DENSE, {2: nan}, ignore_label=-1)
    with pytest.raises(recall.InputError, match=r"example 9, class 0$"):
        recall.audit(LABELS, DENSE, {2: nan}, ignore_label=-1)


@pytest.mark.parametrize("kind", [int, float, bool])
def test_one_hot_predictions_have_no_confidence(kind):
    report = recall.audit(LABELS, LOGITS, {2: np.eye(3, dtype=kind)[TWO]})
    assert report.summary["accuracy"].item() == pytest.approx(ACCURACY[1])
    assert len(report.probabilities) == 0
    assert any("was read as one-hot predictions" in warning for warning in report.warnings)


@pytest.mark.parametrize("given", [np.asarray, pd.DataFrame])
def test_a_threshold_for_probabilities_of_both_classes_is_refused(given):
    both = given(np.stack([1 - PROBABILITIES[:, 0], PROBABILITIES[:, 0]], axis=-1))
    with pytest.raises(InputError, match=r"2 numbers per example; threshold=0\.3 .* is for one"):
        recall.audit(LABELS > 0, LABELS > 0, {2: both}, threshold=0.3)


@pytest.mark.parametrize("threshold", [0, 1, 50, -0.5])
def test_a_threshold_that_is_not_a_probability_is_refused(threshold):
    with pytest.raises(InputError, match="threshold must lie between 0 and 1"):
        recall.audit(LABELS > 0, LABELS > 0, {2: PROBABILITIES[:, 0]}, threshold=threshold)


@pytest.mark.parametrize(
    ("names", "message"), [((1, "1"), "'1' twice"), (("",), "printable"), (("a\nb",), "printable")]
)
def test_names_of_compared_models_are_printable_and_different(names, message):
    with pytest.raises(InputError, match=message):
        recall.audit(LABELS, DENSE, compare=dict.fromkeys(names, TWO))


@pytest.mark.parametrize("text", [("dense",), ("dense", "pruned"), ("labels", "dense", "pruned")])
@pytest.mark.filterwarnings("ignore::jprune.recall.EmptyClassWarning")
def test_numbers_in_text_are_matched_with_class_names_as_numbers_are(text):
    """With the classes 1 and 2 alone, the numbers would also be valid indices."""
    given = {"labels": np.minimum(LABELS, 1) + 1, "dense": np.minimum(DENSE, 1) + 1, "pruned": np.minimum(TWO, 1) + 1}
    labels, dense, pruned = (array.astype(str) if name in text else array for name, array in given.items())
    report = recall.audit(labels, dense, {2: pruned}, class_names=["1", "2", "3"], num_classes=3)
    accuracy = [(given[name] == given["labels"]).mean() for name in ("dense", "pruned")]
    assert report.summary[["accuracy_dense", "accuracy"]].iloc[0].tolist() == pytest.approx(accuracy)
    assert report.classes["support"].tolist() == [(given["labels"] == c).sum() for c in (1, 2, 3)]


@pytest.mark.parametrize("names", [("1", "2", "3"), ("2", "1", "0")])
def test_one_hot_predictions_are_in_the_order_of_class_names_that_are_numbers(names):
    one_hot = np.eye(3, dtype=int)[TWO]
    labels = np.array(names, int)[LABELS]
    for given in (one_hot, pd.DataFrame(one_hot), one_hot.astype(float)):
        report = recall.audit(labels, given, {2: given}, class_names=names)
        assert report.summary["accuracy"][0] == pytest.approx(ACCURACY[1])


@pytest.mark.parametrize("names", [("1", "2", "3"), ("01", "02", "03"), ("2", "1", "0")])
def test_integer_predictions_with_labels_in_text_are_indices_of_the_class_names(names):
    report = recall.audit(np.array(names)[LABELS], DENSE, {2: TWO}, class_names=list(names))
    assert report.summary[["accuracy_dense", "accuracy"]].iloc[0].tolist() == pytest.approx(ACCURACY)
    warned = [warning for warning in report.warnings if "was read as indices of the class names" in warning]
    assert len(warned) == (2 if names == ("2", "1", "0") else 0)


def test_tables_of_polars_need_no_pyarrow():
    def to_pandas(self):
        raise ModuleNotFoundError("No module named 'pyarrow'")

    def of(kind, **methods):
        return type(kind, (), {"__module__": "polars.frame", "to_pandas": to_pandas, **methods})()

    table = of("DataFrame", to_dict=lambda self, as_series: {"b": [0.1], "a": [0.9]})
    assert in_pandas(table).to_dict("list") == {"b": [0.1], "a": [0.9]}
    column = of("Series", to_list=lambda self: [1, 2], name="label")
    assert (in_pandas(column).name, in_pandas(column).tolist()) == ("label", [1, 2])
