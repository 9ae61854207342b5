"""Write files atomically: under a temporary name in the same folder, synced to disk, then renamed.

A reader finds the old file or the new one, never a part of it, and a full disk leaves the old file as it was.
"""

import contextlib
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".partial-"
"""Part of the name of every temporary file; a killed process leaves one behind."""


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path to write to; when the block ends, the file there replaces ``path``.

    The temporary file is in the folder of ``path``, which must exist. If the block raises, the temporary
    file is removed and ``path`` stays as it was. A symbolic link stays and its target is replaced; the file keeps its
    permissions.

    Args:
      path: the file to create or replace.

    Raises:
      OSError: the file cannot be written, synced or renamed, or ``path`` is a folder, a device or a pipe.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "numbers.txt"
    >>> with replacing(target) as temporary:
    ...     _ = temporary.write_text("1 2 3")
    ...     target.exists()
    False
    >>> target.read_text()
    '1 2 3'
    """
    target = Path(path).resolve()
    if target.is_dir():
        raise IsADirectoryError(f"{os.fspath(path)} is a folder; pass the path of a file in it")
    if target.exists() and not target.is_file():
        raise OSError(f"{os.fspath(path)} is a device or a pipe, which cannot be replaced; pass the path of a file")
    temporary = target.with_name(f"{target.name}{TEMPORARY}{uuid.uuid4().hex}")
    try:
        yield temporary
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(target, temporary)
        sync(temporary)
        temporary.replace(target)
        sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], content: bytes) -> None:
    """Write a file atomically.

    Args:
      path: the file to create or replace.
      content: all of its bytes.

    Raises:
      OSError: the file cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    r"""Write a text file atomically, as UTF-8 with the line ends as they are in ``text``.

    Args:
      path: the file to create or replace.
      text: all of its characters.

    Raises:
      OSError: the file cannot be written.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "table.csv"
    >>> write_text(target, "a,b\n")
    >>> target.read_bytes()
    b'a,b\n'
    """
    write_bytes(path, text.encode())


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or the entries of a folder, are on the disk.

    Systems that cannot open a folder for reading, such as Windows, keep folders in sync themselves.

    Raises:
      OSError: the file cannot be opened or synced.
    """
    if os.name == "nt" and Path(path).is_dir():
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
