"""Arrays cached on disk, memory-mapped, each with a checksum.

An entry is a folder with an .npy file for every array and ``contents.json``, which lists them with their SHA-256 and is
written last. An entry whose files do not match it is treated as absent.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.storage import files
from experiments.storage.files import JSON
from jprune.files import replacing

_CONTENTS = "contents.json"


class Rows(NamedTuple):
    """An array that is computed row by row.

    Attributes:
      shape: shape of the whole array; the first axis counts the rows.
      dtype: dtype of an entry.
      blocks: the rows in order, several at a time, each (several, *shape[1:]).
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    blocks: Iterable[np.ndarray]


def cached(
    folder: Path, name: str, identity: Mapping[str, JSON], make: Callable[[], Mapping[str, Rows]]
) -> dict[str, np.ndarray]:
    """Read arrays from the cache; compute and store them if they are missing or a checksum is wrong.

    Args:
      folder: folder of the cache; created if it does not exist.
      name: name of the entry, readable; part of the name of its folder.
      identity: JSON of everything that determines the arrays.
      make: function that computes the arrays.

    Returns:
      A dict of read-only memory-mapped arrays.

    Raises:
      files.StoreError: a file cannot be written; the message names it.
      ValueError: the number of rows differs from the shape.
    """
    digest = hashlib.sha256(files.canonical(identity).encode()).hexdigest()
    entry = folder / f"{re.sub('[^A-Za-z0-9_.-]+', '-', name)}-{digest[:16]}"
    if (found := _read(entry)) is not None:
        return found
    checksums = {array: _write(entry / f"{array}.npy", rows) for array, rows in make().items()}
    files.write_json(entry / _CONTENTS, {"identity": dict(identity), "sha256": checksums})
    made = _read(entry)
    if made is None:
        raise files.StoreError(f"{entry} does not have the content that was just written to it; check the disk")
    return made


def _read(entry: Path) -> dict[str, np.ndarray] | None:
    """Return the arrays of an entry, or None if one is absent or its checksum is wrong."""
    try:
        checksums = json.loads((entry / _CONTENTS).read_bytes())["sha256"]
        if any(files.checksum(entry / f"{array}.npy") != checksum for array, checksum in checksums.items()):
            return None
        return {array: np.load(entry / f"{array}.npy", mmap_mode="r", allow_pickle=False) for array in checksums}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(path: Path, rows: Rows) -> str:
    """Write an array atomically, and return its checksum."""
    with files.naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            with temporary.open("wb") as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(rows.dtype),
                    "fortran_order": False,
                    "shape": rows.shape,
                }
                np.lib.format.write_array_header_1_0(file, header)
                written = 0
                for block in rows.blocks:
                    if block.shape[1:] != rows.shape[1:] or block.dtype != rows.dtype:
                        raise ValueError(
                            f"rows of {path.stem} are {block.dtype}{block.shape[1:]}, not {rows.dtype}{rows.shape[1:]}"
                        )
                    file.write(np.ascontiguousarray(block).data)
                    written += len(block)
                if written != rows.shape[0]:
                    raise ValueError(f"{path.stem} has {written} rows; {rows.shape[0]} were announced")
            checksum = files.checksum(temporary)
    return checksum
