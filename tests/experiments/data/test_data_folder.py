"""A folder of images as a data set: the files read, their order, and the errors."""

import dataclasses
import os

import numpy as np
import pytest
from PIL import Image

from experiments.data import datasets, image_sets, tables
from experiments.recall_distortion import __main__ as recall_distortion
from experiments.recall_distortion import plan
from experiments.storage import files


@pytest.fixture
def pictures(tmp_path):
    """Twelve grey images of 6 x 4 pixels in two classes; the pixel values identify the image."""
    for split, each in (("train", 4), ("test", 2)):
        for c, name in enumerate(("cat", "dog")):
            folder = tmp_path / "pictures" / split / name
            folder.mkdir(parents=True)
            for i in range(each):
                Image.fromarray(np.full((6, 4), 10 * c + i, np.uint8)).save(folder / f"{i}.png")
    return tmp_path / "pictures"


def load_pictures(path, **arguments):
    return datasets.load(f"folder:{path}", cache_dir=path.parent / "cache", selection="test", **arguments)


def test_a_folder_of_images_is_read(pictures):
    found = load_pictures(pictures)
    assert found.class_names == ("cat", "dog")
    assert found.input_shape == (6, 4, 1)
    assert found.train.images[:, 0, 0, 0].tolist() == [0, 10, 1, 11, 2, 12, 3, 13]
    assert found.train.labels.tolist() == [0, 1, 0, 1, 0, 1, 0, 1]
    assert found.test.images[:, 5, 3, 0].tolist() == [0, 10, 1, 11]
    assert isinstance(found.train.images, np.memmap)


def test_the_first_images_of_a_folder_are_of_all_classes_as_often_as_those_occur(pictures):
    for i in range(4, 12):
        Image.fromarray(np.full((6, 4), i, np.uint8)).save(pictures / "train" / "cat" / f"{i:02d}.png")
    labels = load_pictures(pictures).train.labels  # twelve cats, four dogs
    assert [int(labels[start : start + 4].sum()) for start in range(0, 16, 4)] == [1, 1, 1, 1]


def test_a_test_folder_without_images_is_refused(pictures):
    """An empty test split divided by zero when it was evaluated."""
    for file in (pictures / "test").glob("*/*.png"):
        file.unlink()
    with pytest.raises(ValueError, match=r"test has no images in subfolders of the classes cat, dog; add them or remo"):
        load_pictures(pictures)


def test_an_image_that_cannot_be_decoded_is_named(pictures):
    path = pictures / "train" / "dog" / "0.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 4), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[:-25])  # its header is whole
    with pytest.raises(ValueError, match=r"dog/0\.png of the train split cannot be decoded: .*; replace or remove it"):
        load_pictures(pictures)
    path.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"dog/0\.png is not an image that can be read .*; replace or remove it"):
        load_pictures(pictures)


def test_a_folder_is_decoded_again_only_if_it_changed(pictures, monkeypatch):
    calls = []
    decode = image_sets._decode
    monkeypatch.setattr(image_sets, "_decode", lambda *arguments: calls.append(1) or decode(*arguments))
    for expected in (12, 12):
        load_pictures(pictures)
        assert len(calls) == expected
    Image.fromarray(np.full((6, 4), 99, np.uint8)).save(pictures / "train" / "cat" / "more.png")
    assert 99 in load_pictures(pictures).train.images
    assert len(calls) == 12 + 13


def test_a_damaged_cache_is_decoded_again(pictures):
    load_pictures(pictures)
    cached = next(pictures.parent.glob("cache/*/train_images.npy"))
    os.truncate(cached, cached.stat().st_size - 5)
    assert load_pictures(pictures).train.images[7, 0, 0, 0] == 13


def test_one_colour_image_makes_all_of_them_colour(pictures):
    colour = np.zeros((6, 4, 3), np.uint8)
    colour[..., 1] = 7
    Image.fromarray(colour).save(pictures / "train" / "dog" / "0.png")
    found = load_pictures(pictures)
    assert found.input_shape == (6, 4, 3)
    assert found.train.images[1, 0, 0].tolist() == [0, 7, 0]
    assert found.train.images[6, 0, 0].tolist() == [3, 3, 3]
    assert found.mean.shape == (3,)


def test_images_of_two_sizes_are_refused_unless_resized(pictures):
    Image.fromarray(np.full((12, 8), 50, np.uint8)).save(pictures / "test" / "dog" / "z.png")
    with pytest.raises(ValueError, match=r"z\.png is 12 x 8 pixels and .* is 6 x 4; give image_size"):
        load_pictures(pictures)
    found = load_pictures(pictures, image_size=(3, 2))
    assert found.test.images[-1].tolist() == [[[50]] * 2] * 3


def test_the_recall_study_reads_images_that_differ_at_the_size_that_is_given(pictures, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(pictures.parent))
    Image.fromarray(np.full((12, 8), 50, np.uint8)).save(pictures / "train" / "dog" / "z.png")
    given = ["--dataset", f"folder:{pictures}", "--selection", "test", "--image-size", "3", "2"]
    study = recall_distortion.parse(given).study
    assert plan.load(study).input_shape == (3, 2, 1)
    with pytest.raises(ValueError, match=r"z\.png is 12 x 8 pixels .* give image_size, a height and a width"):
        plan.load(dataclasses.replace(study, image_size=None))


def test_a_folder_without_test_images_gives_a_quarter_of_every_class(tmp_path, pictures):
    (pictures / "test").rename(tmp_path / "elsewhere")
    found = load_pictures(pictures)
    assert np.bincount(found.train.labels).tolist() == [3, 3]
    assert np.bincount(found.test.labels).tolist() == [1, 1]


def empty_class(pictures):
    (pictures / "train" / "eel").mkdir()
    return r"eel has no images, which end in \.png"


def surplus_class(pictures):
    (pictures / "test" / "eel").mkdir()
    return r"test has a class 'eel' that the training folder lacks; its classes are cat, dog"


def one_class(pictures):
    (pictures / "train" / "dog").rename(pictures / "dog")
    return "has 1 subfolders; there must be one for each of two or more classes"


def deep_image(pictures):
    Image.fromarray(np.full((6, 4), 999, np.uint16)).save(pictures / "train" / "cat" / "deep.png")
    return "deep.png has more than 8 bits a channel"


@pytest.mark.parametrize("spoil", [empty_class, surplus_class, one_class, deep_image], ids=lambda f: f.__name__)
def test_a_folder_that_is_not_a_data_set_is_refused(pictures, spoil):
    message = spoil(pictures)
    with pytest.raises(ValueError, match=message):
        load_pictures(pictures)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(tables.Missing, match=r"nowhere has no folder train/"):
        datasets.load(f"folder:{tmp_path / 'nowhere'}")


def test_a_cache_that_cannot_be_written_is_named(pictures):
    (pictures.parent / "cache").write_text("a file where the folder should be")
    with pytest.raises(files.StoreError, match=r"cannot write .*cache"):
        load_pictures(pictures)
