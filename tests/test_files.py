"""Atomic writing: the whole new file or the old one, and no temporary files left behind."""

import os

import pytest

from jprune import files


def test_a_file_is_created_and_replaced(tmp_path):
    files.write_bytes(tmp_path / "a.bin", b"one")
    files.write_bytes(tmp_path / "a.bin", b"two")
    assert (tmp_path / "a.bin").read_bytes() == b"two"
    assert os.listdir(tmp_path) == ["a.bin"]


@pytest.mark.skipif(os.name == "nt", reason="POSIX links, permissions and pipes")
def test_links_and_permissions_stay_and_pipes_are_refused(tmp_path):
    (tmp_path / "a.txt").touch(0o600)
    (tmp_path / "link").symlink_to("a.txt")
    files.write_text(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "new"
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o600
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="pipe is a device or a pipe, which cannot be replaced"):
        files.write_text(tmp_path / "pipe", "new")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "link", "pipe"]


def test_a_folder_is_refused_by_name(tmp_path):
    with pytest.raises(IsADirectoryError, match=f"{tmp_path.name} is a folder; pass the path of a file in it$"):
        files.write_text(tmp_path, "new")
    assert not list(tmp_path.parent.glob(f"{tmp_path.name}{files.TEMPORARY}*"))


def test_text_is_utf8_with_its_own_line_ends(tmp_path):
    files.write_text(tmp_path / "a.txt", "é\r\nü\n")
    assert (tmp_path / "a.txt").read_bytes() == "é\r\nü\n".encode()


def test_an_error_while_writing_leaves_the_old_file_and_no_temporary_one(tmp_path):
    files.write_bytes(tmp_path / "a.bin", b"old")

    def fail():
        with files.replacing(tmp_path / "a.bin") as temporary:
            temporary.write_bytes(b"half of the n")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_failed_sync_leaves_the_old_file(tmp_path, monkeypatch):
    files.write_bytes(tmp_path / "a.bin", b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(tmp_path / "a.bin", b"new")
    assert (tmp_path / "a.bin").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.bin"]


def test_a_missing_folder_is_an_error_that_names_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        files.write_bytes(tmp_path / "nowhere" / "a.bin", b"")
