import errno
import json
import os

import numpy as np
import pytest

from experiments.data import cache
from experiments.storage import files
from jprune import files as atomic

ARRAY = np.arange(24, dtype=np.uint8).reshape(6, 2, 2)


class Maker:
    """Makes an array in blocks of four rows and counts the calls."""

    def __init__(self, rows=6):
        self.calls = 0
        self.rows = rows

    def __call__(self):
        self.calls += 1
        blocks = (ARRAY[start : start + 4] for start in (0, 4))
        return {"images": cache.Rows((self.rows, 2, 2), ARRAY.dtype, blocks)}


def entry(folder):
    return next(path for path in folder.iterdir() if path.is_dir())


def test_cached_arrays_are_computed_once_and_memory_mapped(tmp_path):
    make = Maker()
    for _ in range(2):
        found = cache.cached(tmp_path, "a set/of:images", {"version": 1}, make)["images"]
        np.testing.assert_array_equal(found, ARRAY)
        assert isinstance(found, np.memmap)
        assert not found.flags.writeable
    assert make.calls == 1


def test_another_identity_is_another_entry(tmp_path):
    make = Maker()
    for version in (1, 2, 1):
        cache.cached(tmp_path, "images", {"version": version}, make)
    assert make.calls == 2
    assert len(list(tmp_path.iterdir())) == 2


def truncate(folder):
    os.truncate(entry(folder) / "images.npy", (entry(folder) / "images.npy").stat().st_size - 1)


def alter(folder):
    path = entry(folder) / "images.npy"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def empty(folder):
    (entry(folder) / "images.npy").write_bytes(b"")


def lose(folder):
    (entry(folder) / "images.npy").unlink()


def lose_contents(folder):
    (entry(folder) / "contents.json").unlink()


def truncate_contents(folder):
    os.truncate(entry(folder) / "contents.json", 20)


def swap_contents(folder):
    (entry(folder) / "contents.json").write_text("[1, 2]")


@pytest.mark.parametrize(
    "damage", [truncate, alter, empty, lose, lose_contents, truncate_contents, swap_contents], ids=lambda f: f.__name__
)
def test_damage_is_detected_and_repaired(tmp_path, damage):
    make = Maker()
    cache.cached(tmp_path, "images", {}, make)
    damage(tmp_path)
    np.testing.assert_array_equal(cache.cached(tmp_path, "images", {}, make)["images"], ARRAY)
    assert make.calls == 2


def test_an_interrupted_decoding_leaves_nothing_that_counts(tmp_path):
    def interrupted():
        def blocks():
            yield ARRAY[:4]
            raise KeyboardInterrupt

        return {"images": cache.Rows((6, 2, 2), ARRAY.dtype, blocks())}

    with pytest.raises(KeyboardInterrupt):
        cache.cached(tmp_path, "images", {}, interrupted)
    assert list(entry(tmp_path).iterdir()) == []
    make = Maker()
    np.testing.assert_array_equal(cache.cached(tmp_path, "images", {}, make)["images"], ARRAY)


def test_contents_name_the_identity(tmp_path):
    cache.cached(tmp_path, "images", {"source": "x"}, Maker())
    contents = json.loads((entry(tmp_path) / "contents.json").read_text())
    assert contents["identity"] == {"source": "x"}
    assert contents["sha256"] == {"images": files.checksum(entry(tmp_path) / "images.npy")}


@pytest.mark.parametrize("rows", [5, 7])
def test_a_wrong_number_of_rows_is_refused(tmp_path, rows):
    with pytest.raises(ValueError, match=f"images has 6 rows; {rows} were announced"):
        cache.cached(tmp_path, "images", {}, Maker(rows))


def test_rows_of_another_dtype_are_refused(tmp_path):
    make = lambda: {"images": cache.Rows((6, 2, 2), np.dtype(np.uint8), [ARRAY.astype(np.int32)])}
    with pytest.raises(ValueError, match="rows of images are int32"):
        cache.cached(tmp_path, "images", {}, make)


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    def sync(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic, "sync", sync)
    with pytest.raises(files.StoreError, match=r"no space left on the disk while writing .*images\.npy"):
        cache.cached(tmp_path, "images", {}, Maker())
    assert list(entry(tmp_path).iterdir()) == []
