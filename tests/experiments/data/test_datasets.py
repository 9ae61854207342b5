import os
import re
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets

from experiments.data import __main__ as command
from experiments.data import datasets, image_sets, tables
from experiments.jumpstart_grid import uci_tables

TFDS = Path(os.environ.get("JPRUNE_TFDS_DIR") or Path(__file__).parents[4] / "shared" / "data" / "tfds")


def counts(split, classes):
    return np.bincount(split.labels, minlength=classes)


def rows(split):
    return {image.tobytes() + bytes([label]) for image, label in zip(split.images, split.labels, strict=True)}


# Bundled --------------------------------------------------------------------------------------------


def test_a_feature_that_is_constant_in_training_is_divided_by_1_and_not_by_the_rounding_of_its_moments(tmp_path):
    x, y = np.stack([np.arange(1400), np.full(1400, 5.1)], 1).astype(np.float32), np.arange(1400) % 2
    arrays = {"x_train": x, "y_train": y, "x_test": x + 1, "y_test": y}
    assert datasets.of_arrays(arrays).std[1] == 1
    np.savez(tmp_path / "constant.npz", **arrays)
    _, test, _ = uci_tables.splits(f"npz:{tmp_path / 'constant.npz'}")
    np.testing.assert_allclose(test.features[:, 1], 1, atol=1e-4)


def test_digits_are_scikit_learns_and_no_example_is_in_two_splits():
    digits = datasets.load("digits")
    bunch = sklearn.datasets.load_digits()
    assert digits.train.images.dtype == np.uint8
    assert digits.train.labels.dtype == np.int32
    assert digits.input_shape == (8, 8, 1)
    assert digits.num_classes == 10
    splits = (digits.train, digits.validation, digits.test)
    found = [rows(split) for split in splits]
    everything = rows(datasets.Split(bunch.images.astype(np.uint8), bunch.target))
    # As images with their labels, of which the data set holds none twice.
    assert len(everything) == 1797 == sum(map(len, found))
    assert set.union(*found) == everything


def test_every_split_of_digits_is_stratified():
    digits = datasets.load("digits")
    whole = np.bincount(sklearn.datasets.load_digits().target)
    test = np.array([round(0.25 * n) for n in whole])
    validation = np.array([round(0.1 * n) for n in whole - test])
    np.testing.assert_array_equal(counts(digits.test, 10), test)
    np.testing.assert_array_equal(counts(digits.validation, 10), validation)
    np.testing.assert_array_equal(counts(digits.train, 10), whole - test - validation)


def test_the_seed_decides_the_split():
    a, b, c = (datasets.load("digits", seed=seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(a.train.images, b.train.images)
    assert rows(a.test) != rows(c.test)


def test_selection_on_the_test_set_trains_on_all_the_rest():
    honest, original = (datasets.load("digits", selection=selection) for selection in ("validation", "test"))
    assert rows(honest.test) == rows(original.test) == rows(original.validation)
    assert rows(original.train) == rows(honest.train) | rows(honest.validation)


def test_moments_are_those_of_the_training_set():
    digits = datasets.load("digits")
    np.testing.assert_allclose(digits.mean, [digits.train.images.mean()], rtol=1e-6)
    np.testing.assert_allclose(digits.std, [digits.train.images.std()], rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "shape", "classes"), [("iris", (150, 4), 3), ("wine", (178, 13), 3), ("breast_cancer", (569, 30), 2)]
)
def test_tables_come_whole(name, shape, classes):
    table = datasets.load(name, selection="test")
    images = np.concatenate([table.train.images, table.test.images])
    assert images.shape == shape
    assert images.dtype == np.float32
    assert table.num_classes == classes
    np.testing.assert_allclose(table.std, table.train.images.std(0, dtype=np.float64), rtol=1e-4)
    whole = getattr(sklearn.datasets, f"load_{name}")().data.astype(np.float32)
    np.testing.assert_array_equal(np.sort(images, 0), np.sort(whole, 0))


def test_moons_are_the_points_of_the_study():
    moons = datasets.load("moons")
    assert (len(moons.train.labels), len(moons.validation.labels)) == (85, 15)
    assert moons.test is moons.validation
    points, labels = sklearn.datasets.make_moons(100, noise=None)
    expected = np.column_stack([points / np.ptp(points), labels])
    found = np.concatenate([np.column_stack(split) for split in (moons.train, moons.validation)])
    order = lambda table: table[np.lexsort(np.round(table, 4).T)]
    np.testing.assert_allclose(order(found), order(expected), atol=1e-6)
    # The first and the last point of the authors' split.
    assert moons.train.images[0].tolist() == [np.float32(0.16053581), np.float32(-0.11838092)]
    assert moons.mean.tolist() == [0, 0]
    assert moons.std.tolist() == [1, 1]


# Variants -------------------------------------------------------------------------------------------


def test_a_long_tail_thins_the_training_set_alone():
    whole, tailed = datasets.load("digits"), datasets.load("digits", imbalance=10)
    sizes = counts(tailed.train, 10)
    profile = 10.0 ** (-np.arange(10) / 9)
    largest = (counts(whole.train, 10) / profile).min()
    np.testing.assert_array_equal(sizes, np.floor(largest * profile + 1e-6))
    assert rows(tailed.train) < rows(whole.train)
    assert rows(tailed.validation) == rows(whole.validation)
    assert rows(tailed.test) == rows(whole.test)


def test_a_subset_of_classes_is_labelled_in_the_order_given():
    whole, subset = (
        datasets.load("iris", selection="test"),
        datasets.load("iris", selection="test", classes=("virginica", 0)),
    )
    assert subset.class_names == ("virginica", "setosa")
    images = np.concatenate([subset.train.images, subset.test.images])
    labels = np.concatenate([subset.train.labels, subset.test.labels])
    everything = np.concatenate([whole.train.images, whole.test.images])
    truth = np.concatenate([whole.train.labels, whole.test.labels])
    for new, old in ((0, 2), (1, 0)):
        np.testing.assert_array_equal(np.sort(images[labels == new], 0), np.sort(everything[truth == old], 0))
    assert len(labels) == 100


@pytest.mark.parametrize(("arguments", "message"), [
    ({"name": "digit"}, "dataset='digit' is not a data set; there are digits, iris.*folder:PATH"),
    ({"selection": "train"}, "selection='train' must be 'validation' or 'test'"),
    ({"classes": (1, 10)}, "10 is not a class; there are 0 to 9"),
    ({"classes": (1, 1)}, "must be two or more classes, each given once"),
    ({"classes": ("3",)}, "must be two or more classes, each given once"),
    ({"classes": ("3", "three")}, "'three' is not a class; there are 0, 1, 2, 3, 4, 5, 6, 7, 8, 9$"),
    ({"imbalance": 0.1}, r"imbalance=0\.1 must be at least 1"),
    ({"imbalance": 200}, "imbalance=200 is more than the 121 training examples that class '0' can keep, so class '9"),
    ({"validation_fraction": 0}, "fraction=0 must lie between 0 and 1"),
    ({"validation_fraction": 1e-3}, "leaves a split empty"),
    ({"image_size": (4, 4)}, r"image_size=\(4, 4\) does not apply to digits"),
])  # fmt: skip
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(**{"name": "digits", **arguments})


# TensorFlow Datasets --------------------------------------------------------------------------------


def test_data_that_is_missing_names_the_command_that_prepares_it(tmp_path):
    with pytest.raises(tables.Missing, match=r"python -m experiments\.data prepare cifar100 --data-dir") as caught:
        datasets.load("cifar100", data_dir=tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_name_that_tfds_lacks_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'no_such_set' is not a data set of TFDS"):
        datasets.load("tfds:no_such_set", data_dir=tmp_path)


def test_data_without_a_training_split_is_refused(monkeypatch):
    info = types.SimpleNamespace(splits={"test": None}, file_format=types.SimpleNamespace(value="array_record"))
    monkeypatch.setattr(image_sets, "_builder", lambda *_: types.SimpleNamespace(info=info, data_dir="here"))
    with pytest.raises(ValueError, match="cifar10_corrupted has no split 'train'; it has test"):
        datasets.load("tfds:cifar10_corrupted")


def test_preparing_without_tensorflow_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(image_sets.importlib.util, "find_spec", lambda name: None)
    assert command.main(["prepare", "cifar100", "--data-dir", str(tmp_path)]) == 1
    assert "pip install 'jprune[prepare]'" in capsys.readouterr().err


needs_tfds = pytest.mark.skipif(
    not TFDS.is_dir(), reason=f"needs prepared TFDS data in {TFDS}; set JPRUNE_TFDS_DIR to where it is"
)


@pytest.fixture(scope="module")
def decoded(tmp_path_factory):
    """A cache folder for the tests of one file, so that MNIST is decoded once."""
    return tmp_path_factory.mktemp("cache")


@needs_tfds
@pytest.mark.slow  # decodes 70,000 images
def test_reading_needs_no_tensorflow_and_says_nothing(decoded):
    code = (
        "import sys\n"
        "from experiments.data import datasets\n"
        f"d = datasets.load('mnist', data_dir={str(TFDS)!r}, cache_dir={str(decoded)!r})\n"
        "print(d.class_names[0], len(d.test.labels), 'tensorflow' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[0] == "0 10000 False"
    assert all(re.match(r"\[ *[\d.]+ s, +\d+%\] ", line) for line in result.stderr.splitlines()), "progress alone"


@needs_tfds
@pytest.mark.slow
def test_mnist_is_read_from_tfds(decoded):
    read = lambda **arguments: datasets.load("mnist", data_dir=TFDS, cache_dir=decoded, **arguments)
    mnist = read(selection="test")
    assert mnist.train.images.shape == (60000, 28, 28, 1)
    # Published counts of the digits 0 to 9.
    assert counts(mnist.train, 10).tolist() == [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert counts(mnist.test, 10).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    # The published constants are those of the training images.
    np.testing.assert_allclose(mnist.mean / 255, [0.1307], rtol=1e-6)
    np.testing.assert_allclose(mnist.train.images.mean() / 255, 0.1307, atol=5e-5)
    np.testing.assert_allclose(mnist.train.images.std() / 255, mnist.std[0] / 255, atol=5e-5)
    honest = read()
    np.testing.assert_array_equal(counts(honest.train, 10) + counts(honest.validation, 10), counts(mnist.train, 10))


@needs_tfds
def test_any_name_of_tfds_is_taken_with_its_classes_and_splits(decoded, monkeypatch):
    found = {}

    def cached(folder, name, identity, make):
        found.update({**identity, "entry": name})
        images, labels = np.zeros((20, 28, 28, 1), np.uint8), np.arange(20, dtype=np.int32) % 10
        return {"train_images": images, "train_labels": labels, "test_images": images, "test_labels": labels}

    monkeypatch.setattr(datasets.cache, "cached", cached)
    fashion = datasets.load("tfds:fashion_mnist", data_dir=TFDS, cache_dir=decoded, selection="test")
    assert fashion.class_names[:3] == ("T-shirt/top", "Trouser", "Pullover")
    assert (found["entry"], found["name"], found["shape"]) == ("tfds:fashion_mnist", "fashion_mnist/3.0.1", (28, 28, 1))
    splits = {split: tuple(found_split[:2]) for split, found_split in found["splits"].items()}
    assert splits == {"train": ("train", 60_000), "test": ("test", 10_000)}


@pytest.mark.slow
@needs_tfds
def test_cifar10_is_read_from_tfds(tmp_path):
    cifar = datasets.load("cifar10", data_dir=TFDS, cache_dir=tmp_path, selection="test", imbalance=100)
    assert counts(cifar.train, 10).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert counts(cifar.test, 10).tolist() == [1000] * 10
    assert cifar.class_names[3] == "cat"
    assert cifar.input_shape == (32, 32, 3)
    np.testing.assert_allclose(cifar.test.images.mean((0, 1, 2)), cifar.mean, atol=2)
