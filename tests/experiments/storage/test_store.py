"""Stages of a store: complete or absent, checked when read, whoever else writes."""

import errno
import json
import os
import subprocess
import sys
import time

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from experiments.storage import files, store

SETTINGS = {"seed": 3, "lr": [0.1, 0.01]}


def write(root, replicates, value=1.0, settings=SETTINGS):
    """Store a stage whose weights and table hold a value plus the replicate."""
    stage = store.stage(root, "dense", settings, replicates)
    numbers = value + np.array(replicates, np.float32)
    with store.writing(stage, settings) as folder:
        files.write_weights(folder / "weights", {"layer/kernel": numbers[:, None] * np.ones((1, 4), np.float32)})
        files.write_table(folder / "rows.parquet", {"replicate": np.array(replicates), "value": numbers})
        files.write_lines(folder / "metrics.jsonl", [{"loss": float("nan")}, {"loss": 0.5}])
    return stage


def test_a_stage_comes_back_as_it_was_written(tmp_path):
    stage = write(tmp_path, range(2, 4))
    assert stage.done
    assert stage.path.name == "00002-00004"
    table = store.read_table(stage, "rows.parquet")
    assert table["value"].tolist() == [3.0, 4.0]
    weights = store.read_weights(stage)
    assert list(weights) == ["layer/kernel"]
    np.testing.assert_array_equal(weights["layer/kernel"], [[3.0] * 4, [4.0] * 4])
    assert (stage.path / "metrics.jsonl").read_text() == '{"loss":null}\n{"loss":0.5}\n'
    assert json.loads((stage.path / "manifest.json").read_text())["settings"] == SETTINGS


def test_the_folder_is_named_by_every_setting_and_by_no_order(tmp_path):
    digest = store.digest(SETTINGS)
    assert digest == store.digest(dict(reversed(SETTINGS.items())))
    assert digest != store.digest({**SETTINGS, "seed": 4})
    assert digest != store.digest({**SETTINGS, "lr": [0.1]})
    with pytest.raises(TypeError, match="not JSON serializable"):
        store.digest({"path": tmp_path})


def test_an_exception_while_writing_leaves_nothing(tmp_path):
    stage = store.stage(tmp_path, "dense", SETTINGS, range(1))

    def fail():
        with store.writing(stage, SETTINGS) as folder:
            (folder / "half").write_text("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert not stage.done
    assert list(stage.path.parent.iterdir()) == []


def test_missing_and_find_see_only_complete_stages(tmp_path):
    write(tmp_path, range(3, 5))
    write(tmp_path, range(8, 9))
    (tmp_path / f"dense-{store.digest(SETTINGS)}" / "00005-00008.partial-1").mkdir()
    for other in (".nfs0000000012", ".DS_Store"):  # what file systems leave lying about
        (tmp_path / f"dense-{store.digest(SETTINGS)}" / other).touch()
    assert store.missing(tmp_path, "dense", SETTINGS, range(10)) == [range(3), range(5, 8), range(9, 10)]
    assert store.missing(tmp_path, "dense", {"seed": 9}, range(2)) == [range(2)]
    assert [stage.replicates for stage in store.find(tmp_path, "dense", SETTINGS)] == [range(3, 5), range(8, 9)]


def test_stages_come_in_the_order_of_their_replicates_where_the_names_grow_by_a_digit(tmp_path):
    for replicates in (range(100_000, 100_002), range(99_999, 100_000)):
        write(tmp_path, replicates)
    found = store.find(tmp_path, "dense", SETTINGS)
    assert [stage.replicates for stage in found] == [range(99_999, 100_000), range(100_000, 100_002)]


def test_a_stage_that_others_cover_is_not_read(tmp_path):
    stages = [write(tmp_path, range(3)), write(tmp_path, range(1, 2))]
    (stages[1].path / "rows.parquet").unlink()
    assert store.collect_table(stages, "rows.parquet")["replicate"].tolist() == [0, 1, 2]


def test_overlapping_stages_are_collected_once_from_the_first(tmp_path):
    stages = [write(tmp_path, range(3), value=1.0), write(tmp_path, range(1, 5), value=100.0)]
    table = store.collect_table(stages, "rows.parquet")
    assert table["replicate"].tolist() == [0, 1, 2, 3, 4]
    assert table["value"].tolist() == [1.0, 2.0, 3.0, 103.0, 104.0]
    weights = store.collect_weights(stages, range(2, 5))
    assert weights["layer/kernel"][:, 0].tolist() == [3.0, 103.0, 104.0]
    with pytest.raises(store.StoreError, match="no weights for all of replicates 2 to 5"):
        store.collect_weights(stages, range(2, 6))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
@pytest.mark.parametrize("name", ["rows.parquet", "weights"])
def test_a_damaged_file_is_named(tmp_path, damage, name):
    stage = write(tmp_path, range(2))
    path = stage.path / name
    path = path if path.is_file() else max(path.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    if damage == "remove":
        path.unlink()
    else:
        path.write_bytes(content if damage == "flip" else content[:-1])
    word = "missing" if damage == "remove" else "corrupt"
    with pytest.raises(store.StoreError, match=rf"{path.name} is {word}.*delete .*00000-00002"):
        store.read_table(stage, name) if name == "rows.parquet" else store.read_weights(stage)


def test_a_damaged_manifest_is_named(tmp_path):
    stage = write(tmp_path, range(2))
    manifest = stage.path / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"seed": 3', '"seed": 4'))
    with pytest.raises(store.StoreError, match=r"manifest.json is corrupt: its settings"):
        store.read_table(stage, "rows.parquet")
    for content in ("{", "[]", '{"settings": {}}', "\x00"):
        manifest.write_text(content)
        with pytest.raises(store.StoreError, match=r"manifest.json cannot be read.*delete .*00000-00002"):
            store.read_table(stage, "rows.parquet")


def test_a_table_of_another_schema_version_is_refused(tmp_path):
    stage = store.stage(tmp_path, "dense", SETTINGS, range(1))
    with store.writing(stage, SETTINGS) as folder:
        table = pa.table({"replicate": [0]}).replace_schema_metadata({"jprune.schema": "99"})
        pq.write_table(table, folder / "rows.parquet")
    with pytest.raises(store.StoreError, match=r"rows.parquet has schema version 99; this version reads 1"):
        store.read_table(stage, "rows.parquet")


def test_the_second_of_two_writers_of_one_stage_leaves_the_first_in_place(tmp_path):
    stage = store.stage(tmp_path, "dense", SETTINGS, range(2))
    with store.writing(stage, SETTINGS) as slow:
        files.write_table(slow / "rows.parquet", {"replicate": [0, 1], "value": [9.0, 9.0]})
        write(tmp_path, range(2), value=1.0)
    assert store.read_table(stage, "rows.parquet")["value"].tolist() == [1.0, 2.0]
    assert [path.name for path in stage.path.parent.iterdir()] == ["00000-00002"]


def test_partial_folders_are_swept_once_they_are_stale(tmp_path):
    folder = store.stage(tmp_path, "dense", SETTINGS, range(1)).path.parent
    fresh, stale = folder / "00005-00006.partial-a", folder / "00007-00008.partial-b"
    fresh.mkdir(parents=True)
    stale.mkdir()
    os.utime(stale, (time.time() - 4000,) * 2)
    write(tmp_path, range(1))
    assert fresh.exists()
    assert not stale.exists()


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path, monkeypatch):
    stage = store.stage(tmp_path, "dense", SETTINGS, range(1))

    def fail():
        with store.writing(stage, SETTINGS) as folder:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder / "rows.bin"))

    with pytest.raises(store.StoreError, match=r"no space left .*rows.bin; free some"):
        fail()
    assert not stage.done
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(store.StoreError, match=r"no space left .*config.json"):
        files.write_json(tmp_path / "config.json", {})
    assert list(tmp_path.glob("config*")) == []


def test_weights_that_do_not_fit_the_disk_are_refused_before_they_are_written(tmp_path, monkeypatch):
    asked = []

    def full(descriptor, offset, size):
        asked.append(size)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    monkeypatch.setattr(files, "_checkpointer", None)
    with pytest.raises(store.StoreError, match=r"no space left on the disk while writing .*/weights; free some"):
        files.write_weights(tmp_path / "weights", {"kernel": np.zeros((1000, 100), np.float32)})
    assert asked[0] >= 400_000
    assert list(tmp_path.iterdir()) == []


FILE_SIZE_LIMIT = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from experiments.storage import files, store
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
stage = store.stage(Path(sys.argv[1]), "dense", {}, range(1))
resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))
try:
    with store.writing(stage, {}) as folder:
        noise = np.random.default_rng(0).normal(size=(1, 1_000_000)).astype(np.float32)
        if sys.argv[2] == "weights":
            files.write_weights(folder / "weights", {"w": noise})
        else:
            files.write_table(folder / "rows.parquet", {"w": noise[0]})
except store.StoreError as error:
    print(error)
assert not stage.done and not list(stage.path.parent.iterdir())
"""


@pytest.mark.parametrize("what", ["weights", "rows.parquet"])
@pytest.mark.slow
def test_a_file_that_the_system_will_not_let_grow_is_named(tmp_path, what):
    program = [sys.executable, "-c", FILE_SIZE_LIMIT, str(tmp_path), what]
    done = subprocess.run(program, capture_output=True, text=True, check=True)
    assert f"{what}" in done.stdout
    assert "cannot write" in done.stdout


def test_json_is_replaced_whole(tmp_path):
    path = tmp_path / "a" / "config.json"
    files.write_json(path, {"a": 1})
    files.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 2}
    assert [p.name for p in path.parent.iterdir()] == ["config.json"]


def test_of_two_runs_one_claims_a_stage_until_it_has_ended(tmp_path):
    stage = store.stage(tmp_path, "dense", SETTINGS, range(2))
    with store.claimed(stage) as first, store.claimed(stage) as second:
        assert (first, second) == (True, False)
    with store.claimed(stage) as again:
        assert again
    assert list(stage.path.parent.iterdir()) == []


def claim_of_a_killed_run(stage):
    path = stage.path.with_name(f"{stage.path.name}.claim")
    path.parent.mkdir(parents=True)
    path.touch()
    os.utime(path, (time.time() - 3600,) * 2)
    return path


def test_the_claim_of_a_killed_run_expires(tmp_path):
    stage = store.stage(tmp_path, "dense", SETTINGS, range(2))
    path = claim_of_a_killed_run(stage)
    with store.claimed(stage) as mine:
        assert mine
        assert time.time() - path.stat().st_mtime < 1800
    assert list(stage.path.parent.iterdir()) == []


def test_a_run_that_replaced_the_claim_of_a_killed_run_keeps_its_own(tmp_path, monkeypatch):
    """Two runs find an expired claim. Before one of them removes it, the other has put its own claim in its place."""
    stage = store.stage(tmp_path, "dense", SETTINGS, range(2))
    path = claim_of_a_killed_run(stage)
    rename = os.rename

    def after_the_other_run(source, target):
        monkeypatch.undo()
        path.unlink()
        path.write_text("of the other run")
        rename(source, target)

    monkeypatch.setattr(os, "rename", after_the_other_run)
    with store.claimed(stage) as mine:
        assert not mine
    assert path.read_text() == "of the other run"
    assert list(stage.path.parent.iterdir()) == [path]


def test_replicates_must_be_contiguous(tmp_path):
    with pytest.raises(ValueError, match="must be contiguous"):
        store.stage(tmp_path, "dense", SETTINGS, range(0, 4, 2))
