"""Training curves while a study runs; TensorBoard files are read with the package that writes them."""

import os
import struct
import threading
from concurrent import futures

import numpy as np
import pandas as pd
import pytest

from experiments.cli import metrics

LOSSES = {1: [2.0, 1.0, 0.0], 2: [float("nan"), 0.5, float("inf")]}


def scalars(path):
    """(tag, step, value) of every scalar; a record is a length, its checksum, an event and its checksum."""
    from tensorboardX.proto import event_pb2

    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_the_mean_over_replicates_is_written_after_each_epoch(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    write = metrics.to_tensorboard(tmp_path)
    for epoch, losses in LOSSES.items():
        write("jumpstart 0: dense", range(3), epoch, {"loss": np.array(losses, np.float32)})
    write("jumpstart 0: control", range(3), 1, {"loss": np.zeros(3, np.float32)})  # ends the run before it
    (path,) = (tmp_path / "jumpstart 0: dense, 0-2").iterdir()
    assert scalars(path) == [("loss", 1, 1.0), ("loss", 2, 0.5)]


def test_without_the_extra_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: None)
    assert metrics.to_tensorboard(tmp_path / "board") is None


def test_every_epoch_and_replicate_is_a_row_of_the_csv(tmp_path):
    write = metrics.to_csv(tmp_path / "new")
    for epoch, losses in LOSSES.items():
        write("dense", range(4, 7), epoch, {"loss": np.array(losses, np.float32)})
    table = pd.read_csv(tmp_path / "new" / "metrics.csv")
    assert table["replicate"].tolist() == [4, 5, 6, 4, 5, 6]
    assert table["epoch"].tolist() == [1, 1, 1, 2, 2, 2]
    np.testing.assert_array_equal(table["loss"], [2, 1, 0, np.nan, 0.5, np.inf])


def test_the_digest_tells_studies_of_one_folder_apart(tmp_path):
    """In a file of an earlier version, whose header has no such column, rows stay as they were."""
    loss = {"loss": np.array([0.5], np.float32)}
    for digest in ("aaaa", "bbbb"):
        metrics.to_csv(tmp_path)("t = 4", range(1), 1, loss, digest=digest)
    assert pd.read_csv(tmp_path / "metrics.csv")["digest"].tolist() == ["aaaa", "bbbb"]
    (tmp_path / "metrics.csv").write_text("stage,replicate,epoch,loss\nt = 4,0,1,0.5\n")
    metrics.to_csv(tmp_path)("t = 4", range(1), 2, loss, digest="aaaa")
    assert pd.read_csv(tmp_path / "metrics.csv")["epoch"].tolist() == [1, 2]


def test_a_run_of_tensorboard_is_named_by_stage_replicates_and_digest(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    loss = {"loss": np.array([0.5], np.float32)}
    metrics.to_tensorboard(tmp_path / "board")("t = 4", range(1), 1, loss, digest="aaaabbbbcccc")
    assert [path.name for path in (tmp_path / "board").iterdir()] == ["t = 4, 0-0, aaaabbbb"]


def test_a_file_that_another_run_creates_first_keeps_its_header_and_row(tmp_path, monkeypatch):
    path, link = tmp_path / "metrics.csv", os.link

    def link_after_the_other_run(source, target):
        path.write_text("stage,replicate,epoch,loss\ndense,0,1,0.5\n")
        link(source, target)

    monkeypatch.setattr(metrics.os, "link", link_after_the_other_run)
    metrics.to_csv(tmp_path)("dense", range(1, 2), 1, {"loss": np.array([0.25], np.float32)})
    assert path.read_text().split() == ["stage,replicate,epoch,loss", "dense,0,1,0.5", "dense,1,1,0.25"]
    assert list(tmp_path.iterdir()) == [path]


def test_the_csv_needs_no_hard_links(tmp_path, monkeypatch):
    monkeypatch.setattr(metrics.os, "link", lambda *paths: os.open(tmp_path / "none" / "none", os.O_RDONLY))
    metrics.to_csv(tmp_path)("dense", range(1, 2), 1, {"loss": np.array([0.25], np.float32)})
    assert (tmp_path / "metrics.csv").read_text().split() == ["stage,replicate,epoch,loss", "dense,1,1,0.25"]


def test_runs_that_write_to_one_file_at_the_same_time_make_one_table(tmp_path):
    """Six runs of 300 replicates, 20 epochs each: some 8 kB a write, and one header."""
    meeting = threading.Barrier(6, timeout=600)  # of a thread that fails the others must not wait for ever

    def one_run(number):
        write = metrics.to_csv(tmp_path)
        mine = range(300 * number, 300 * number + 300)
        for epoch in range(1, 21):
            meeting.wait()
            write("dense", mine, epoch, {"train_loss": np.full(300, 0.125 * epoch, np.float32)})

    with futures.ThreadPoolExecutor(6) as pool:
        list(pool.map(one_run, range(6)))
    table = pd.read_csv(tmp_path / "metrics.csv")
    assert len(table) == 6 * 300 * 20
    assert len(table.drop_duplicates(["replicate", "epoch"])) == len(table)
    np.testing.assert_array_equal(table["train_loss"], 0.125 * table["epoch"])
