"""TensorBoard files, read back with the reader of the package that writes them."""

import struct

import pytest

from experiments.cli import boards

RECORDS = [
    {"replicate": 0, "epoch": 1, "loss": 2.0},
    {"replicate": 1, "epoch": 1, "loss": 1.0},
    {"replicate": 0, "epoch": 2, "loss": float("nan")},
    {"replicate": 2, "epoch": 2, "loss": float("inf")},
    {"replicate": 1, "epoch": 2, "loss": 0.5},
]


def scalars(path):
    """(tag, step, value) of every scalar: a file is records of length, its checksum, an event, its checksum."""
    from tensorboardX.proto import event_pb2

    content, found = path.read_bytes(), []
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
        content = content[16 + length :]
    return found


def test_the_mean_over_replicates_is_written_for_each_epoch(tmp_path):
    pytest.importorskip("tensorboardX", reason="needs the extra tensorboard")
    assert boards.write(tmp_path / "jumpstart 0: dense", RECORDS)
    (path,) = (tmp_path / "jumpstart 0: dense").iterdir()
    assert scalars(path) == [("loss", 1, 1.5), ("loss", 2, 0.5)]


def test_without_the_extra_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr(boards.importlib.util, "find_spec", lambda name: None)
    assert not boards.write(tmp_path / "board", RECORDS)
    assert list(tmp_path.iterdir()) == []
