"""User data from .npz files and tables: the arrays read, and the errors for files that cannot be used."""

import numpy as np
import pandas as pd
import pyarrow.parquet
import pytest

from experiments.data import datasets, image_sets, tables

X = np.arange(240, dtype=np.float64).reshape(60, 4)
Y = np.arange(60) % 3


def test_an_npz_file_has_its_splits_and_names(tmp_path):
    path = tmp_path / "mine.npz"
    np.savez(path, x_train=X, y_train=Y, x_test=X[:6], y_test=Y[:6], class_names=np.array(["a", "b", "c"]))
    data = datasets.load(f"npz:{path}", validation_fraction=0.1)
    assert [len(split.labels) for split in (data.train, data.validation, data.test)] == [54, 6, 6]
    assert data.class_names == ("a", "b", "c")
    assert data.train.images.dtype == np.float32
    np.testing.assert_allclose(data.mean, data.train.images.mean(0), rtol=1e-6)
    np.testing.assert_array_equal(data.test.images, X[:6])


def test_images_stay_uint8_and_get_a_channel(tmp_path):
    path = tmp_path / "images.npz"
    np.savez(path, x_train=np.zeros((60, 5, 6), np.uint8), y_train=Y)
    data = datasets.load(f"npz:{path}")
    assert data.input_shape == (5, 6, 1)
    assert data.train.images.dtype == np.uint8
    assert len(data.test.labels) == 15  # a quarter of every class


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_has_its_class_in_the_column_label_or_the_last_one(tmp_path, suffix):
    frame = pd.DataFrame({"label": np.array(["no", "yes"])[np.arange(40) % 2], "size": np.arange(40.0)})
    frame["color"] = np.array(["red", "blue"])[np.arange(40) // 20]
    path = tmp_path / f"table.{suffix}"
    write = {"csv": lambda table: table.to_csv(path, index=False), "parquet": lambda table: table.to_parquet(path)}
    write[suffix](frame)
    (features, labels), test, names = tables.table(path)
    assert (test, names) == (None, ("no", "yes"))
    np.testing.assert_array_equal(labels, np.arange(40) % 2)
    np.testing.assert_array_equal(features[19:21], [[19, 0, 1], [20, 1, 0]])  # size, blue, red
    write[suffix](frame.rename(columns={"label": "x"})[["size", "x"]])
    (features, labels), _, names = tables.table(path)
    assert features.shape == (40, 1)
    assert names == ("no", "yes")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x_train": X}, "has the arrays x_train; it needs x_train and y_train"),
        ({"x_train": X, "y_train": Y, "x_test": X}, "x_test and y_test if there is a test set"),
        ({"x_train": X, "y_train": Y, "z": Y}, "has the array 'z'"),
        ({"x_train": X, "y_train": Y[:5]}, "x_train has 60 examples and y_train has 5 labels"),
        ({"x_train": X, "y_train": Y.astype(float)}, r"y_train has dtype float64 and shape \(60,\)"),
        ({"x_train": X, "y_train": Y - 1}, "y_train has the label -1; number the classes from 0"),
        ({"x_train": X, "y_train": 2 * Y}, "numbered 0 to 4 without a gap; 1 has no example"),
        (
            {"x_train": X, "y_train": Y + 1},
            r"0 to 3 .* 0 has no example, and there are labels up to 3\. Number them with",
        ),
        ({"x_train": X, "y_train": Y, "x_test": X, "y_test": Y + 5}, "3 has no example, and y_test has labels up to 7"),
        ({"x_train": X, "y_train": 0 * Y}, r"y_train has the labels \[0\]; there must be two or more classes"),
        ({"x_train": X.astype(complex), "y_train": Y}, "x_train has dtype complex128 .* must be real numbers"),
        (
            {"x_train": X, "y_train": Y.astype(str)},
            r"y_train has dtype <U\d+ .* Number other labels with numpy\.unique",
        ),
        ({"x_train": np.where(X == 7, np.nan, X), "y_train": Y}, r"not finite, the first at \[1, 3\]; fill them"),
        ({"x_train": X, "y_train": Y, "x_test": X[:, :2], "y_test": Y}, r"x_test has examples of shape \(2,\)"),
        ({"x_train": X, "y_train": Y, "x_test": X[:0], "y_test": Y[:0]}, r"x_test has shape \(0, 4\) and no values"),
        ({"x_train": X[:, :0], "y_train": Y}, r"x_train has shape \(60, 0\) and no values"),
        (
            {"x_train": X, "y_train": np.where(Y == 2, 2**40, Y)},
            "y_train has the label 1099511627776; number the classes",
        ),
        ({"x_train": X, "y_train": np.where(Y == 2, 2**31 - 1, Y)}, "numbered 0 to 2147483647 without a gap; 2 has no"),
        (
            {"x_train": np.ones((60, 2, 2), np.uint8), "y_train": Y, "x_test": np.ones((6, 2, 2)), "y_test": Y[:6]},
            "x_train has uint8 pixels and x_test float32",
        ),
    ],
)
def test_arrays_that_cannot_be_used_are_refused_by_name(arrays, message):
    with pytest.raises(ValueError, match=message):
        datasets.of_arrays(arrays)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "b", "a "], "has the class names 'a', 'a '; give every class its own name"),
        (["a", "", "c"], "has the class names ''; give every class its own name"),
        ("a", r"class_names has dtype <U1 and shape \(\); it must be strings of shape \(classes,\)"),
        ([b"a", b"b", b"c"], r"class_names has dtype \|S1 and shape \(3,\)"),
    ],
)
def test_class_names_that_do_not_name_the_classes_are_refused(tmp_path, names, message):
    np.savez(tmp_path / "mine.npz", x_train=X, y_train=Y, class_names=np.array(names))
    with pytest.raises(ValueError, match=message):
        datasets.load(f"npz:{tmp_path / 'mine.npz'}")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"a": range(40), "y": [0.5 * i for i in range(40)]},
            r"the class column 'y' has numbers such as 0\.5; classes are",
        ),
        ({"a": range(40), "class": range(40), "label": [0, 1] * 20}, "has the columns label and class; rename or drop"),
        (
            {"a": range(40), "id": [f"p{i}" for i in range(40)], "y": [0, 1] * 20},
            "column 'id' has 40 different strings",
        ),
        ({"a;b": range(40)}, "has only the column 'a;b'; it needs features and a class, separated by commas"),
        ({"a": ["?", *range(39)], "y": [0, 1] * 20}, r"column 'a' has numbers and the text '\?'; replace it"),
        (
            {"": range(40), "a": range(40), "y": [0, 1] * 20},
            "column 1 has no name; name it, or, if it numbers the rows",
        ),
        ({"a": range(40), "y": ["b", "b "] * 20}, "has the class names 'b', 'b '; give every class its own name"),
        ({"a": [], "y": []}, "has no examples; it needs a row for each"),
    ],
)
def test_a_table_whose_columns_would_be_misread_is_refused(tmp_path, columns, message):
    pd.DataFrame(columns).to_csv(tmp_path / "mine.csv", index=False)
    with pytest.raises(ValueError, match=message):
        datasets.load(f"table:{tmp_path / 'mine.csv'}")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("a,b, a,y", r"has several columns called 'a'; rename or drop all but one"),
        ("3.5,8,2.5,x", r"the first row, 3\.5, 8, 2\.5, x, looks like an example; put a row with the names of the col"),
        ("a,b,y", "cannot be read as CSV with commas.*Expected 3 fields in line 2, saw 4"),
    ],
)
def test_a_header_that_does_not_name_every_column_once_is_refused(tmp_path, header, message):
    path = tmp_path / "mine.csv"
    path.write_text(header + "".join(f"\n{i % 9},{2 * i},{5 - i % 7},{'xy'[i % 2]}" for i in range(40)))
    with pytest.raises(ValueError, match=message):
        datasets.load(f"table:{path}")


def test_repeated_columns_of_parquet_are_refused(tmp_path):
    columns = [pyarrow.array([1, 2]), pyarrow.array([3, 4]), pyarrow.array([0, 1])]
    pyarrow.parquet.write_table(pyarrow.table(columns, names=["a", "a", "y"]), tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match="has several columns called 'a'; rename or drop all but one"):
        datasets.load(f"table:{tmp_path / 'mine.parquet'}")


@pytest.mark.parametrize("values", [[[1, 2]], [{"a": 1}], [b"a"], [pd.Timedelta("1s")]])
def test_a_column_of_parquet_that_is_neither_numbers_nor_text_is_refused(tmp_path, values):
    pd.DataFrame({"a": values * 40, "y": [0, 1] * 20}).to_parquet(tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match=r"column 'a' has values of type .*, not numbers or text; convert or drop it"):
        datasets.load(f"table:{tmp_path / 'mine.parquet'}")


def test_the_name_of_the_class_column_may_have_capitals_and_blanks(tmp_path):
    (tmp_path / "mine.csv").write_text("a, Class,b" + "".join(f"\n{i},{'xy'[i % 2]},2" for i in range(40)))
    assert tables.table(tmp_path / "mine.csv")[2] == ("x", "y")


def test_a_column_of_dates_is_refused(tmp_path):
    dates = pd.date_range("2020-01-01", periods=40)
    pd.DataFrame({"when": dates, "y": [0, 1] * 20}).to_parquet(tmp_path / "mine.parquet")
    with pytest.raises(ValueError, match="column 'when' has dates; replace it by numbers or drop it"):
        datasets.load(f"table:{tmp_path / 'mine.parquet'}")


def test_a_file_that_is_not_there_or_not_readable_is_named(tmp_path):
    with pytest.raises(tables.Missing, match=r"npz:.*none\.npz is not a file"):
        datasets.load(f"npz:{tmp_path / 'none.npz'}")
    (tmp_path / "bad.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"bad\.npz is not an \.npz file"):
        datasets.load(f"npz:{tmp_path / 'bad.npz'}")
    np.savez_compressed(tmp_path / "flipped.npz", x_train=X, y_train=Y)
    content = bytearray((tmp_path / "flipped.npz").read_bytes())
    content[200:220] = bytes(20)
    (tmp_path / "flipped.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"flipped\.npz cannot be read: .*; write it with numpy\.savez"):
        datasets.load(f"npz:{tmp_path / 'flipped.npz'}")
    np.savez(tmp_path / "objects.npz", x_train=np.array([{}, []], object))
    with pytest.raises(ValueError, match="without objects"):
        datasets.load(f"npz:{tmp_path / 'objects.npz'}")
    (tmp_path / "gap.csv").write_text("a,label\n1,x\n,y\n")
    with pytest.raises(ValueError, match="has missing values in a"):
        datasets.load(f"table:{tmp_path / 'gap.csv'}")


def test_a_download_is_tried_again_and_then_says_what_to_do(monkeypatch, tmp_path):
    tries = []

    class Builder:
        data_dir = str(tmp_path)

        def download_and_prepare(self, file_format):
            tries.append(file_format)
            if len(tries) < 3:
                raise ConnectionError("reset by peer")

    monkeypatch.setattr(image_sets.importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(image_sets, "_builder", lambda name, data_dir: Builder())
    assert image_sets.prepare("mine", None, pause=0) == tmp_path
    assert tries == ["array_record"] * 3
    tries.clear()
    with pytest.raises(tables.Missing, match=r"could not be downloaded in 2 attempts: reset by peer\. Check the conn"):
        image_sets.prepare("mine", None, attempts=2, pause=0)
