"""Files in open formats: JSON, JSON lines, parquet, orbax, PNG.

``write_json``, ``write_bytes`` and ``write_figure`` write a file atomically. The others write in place, into a
folder that ``store.writing`` renames when it is complete.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import ArrayLike

from jprune import files

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The values of a JSON file.
JSON: TypeAlias = bool | int | float | str | Sequence["JSON"] | Mapping[str, "JSON"] | None

SCHEMA = 1
PARTIAL = files.TEMPORARY
_FULL = (errno.ENOSPC, errno.EDQUOT)
_OVERHEAD = 2**16  # size of a checkpoint in addition to its arrays


class StoreError(RuntimeError):
    """A file of the store cannot be written, or its content has changed; the message names it."""


def write_table(path: Path, columns: Mapping[str, ArrayLike | Sequence[object]]) -> None:
    """Write columns of equal length as parquet, with the schema version in the file's metadata.

    Args:
      path: path of the file.
      columns: name -> (rows,) array or list, or (rows, n) array, which becomes one list per row.

    Raises:
      StoreError: it cannot be written; the message names the file.
    """
    arrays = {
        name: pa.array(list(column)) if getattr(column, "ndim", 1) > 1 else pa.array(column)
        for name, column in columns.items()
    }
    table = pa.table(arrays)
    with naming(path):
        pq.write_table(table.replace_schema_metadata({"jprune.schema": str(SCHEMA)}), path)


def write_lines(path: Path, records: Iterable[Mapping[str, JSON]]) -> None:
    """Write records as JSON lines; a float that is not finite becomes null.

    Raises:
      StoreError: it cannot be written; the message names the file.
    """
    with naming(path):
        path.write_text("".join(canonical(record) + "\n" for record in records))


def write_json(path: Path, value: JSON) -> None:
    """Write indented JSON atomically.

    Raises:
      StoreError: it cannot be written; the message names the file.
    """
    write_bytes(path, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file atomically; its folder is created if it is missing.

    Raises:
      StoreError: it cannot be written; the message names the file.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(path, content)


def write_figure(path: Path, figure: "Figure") -> None:
    """Write a matplotlib figure as PNG, on white.

    Raises:
      StoreError: it cannot be written; the message names the file.
    """
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150, facecolor="white")
    write_bytes(path, buffer.getvalue())


def write_weights(path: Path, weights: Mapping[str, np.ndarray]) -> None:
    """Write a dict of arrays as an orbax checkpoint.

    Raises:
      StoreError: the checkpoint cannot be written; the message names its folder.
    """
    _see_that_it_fits(path, sum(array.nbytes for array in weights.values()))
    try:
        _checkpointer().save(path.absolute(), dict(weights))
    except Exception as error:  # tensorstore raises the errors of its backend
        raise StoreError(f"cannot write the weights to {path}: {error}") from error


def read_table(path: Path) -> pd.DataFrame:
    """Read parquet that ``write_table`` wrote.

    Raises:
      StoreError: it has another schema version; the message names it.
    """
    table = pq.read_table(path)
    version = (table.schema.metadata or {}).get(b"jprune.schema", b"none").decode()
    if version != str(SCHEMA):
        raise StoreError(f"{path} has schema version {version}; this version reads {SCHEMA}")
    return table.to_pandas()


def read_weights(path: Path) -> dict[str, np.ndarray]:
    """Read the arrays of an orbax checkpoint that ``write_weights`` wrote."""
    checkpointer = _checkpointer()
    names = checkpointer.metadata(path.absolute()).item_metadata.tree
    as_numpy = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
    return checkpointer.restore(path.absolute(), restore_args=as_numpy)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Convert errors of the operating system to a ``StoreError`` that names the file and says what to do."""
    try:
        yield
    except OSError as error:
        where = error.filename or path
        if error.errno in _FULL:
            raise StoreError(
                f"no space left on the disk while writing {where}; free some space and rerun the same command: "
                "completed stages stay, and partial files are ignored"
            ) from error
        raise StoreError(
            f"cannot write {where}: {error.strerror or error}; remove the cause, or use another folder"
        ) from error


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical(value: JSON) -> str:
    """Format JSON with sorted keys and no spaces; a float that is not finite becomes null."""
    return json.dumps(_finite(value), sort_keys=True, separators=(",", ":"), allow_nan=False)


def _finite(value: JSON) -> JSON:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return value


def _see_that_it_fits(path: Path, size: int) -> None:
    """Reserve the space first, because orbax reports a full disk with a hundred lines of tracebacks."""
    if not hasattr(os, "posix_fallocate"):
        return
    probe = path.with_name(f"{path.name}{PARTIAL}space")
    with naming(path):
        try:
            with probe.open("wb") as file:
                os.posix_fallocate(file.fileno(), 0, size + _OVERHEAD)
        except OSError as error:
            if error.errno in _FULL:  # other errors need not stop orbax
                raise
        finally:
            probe.unlink(missing_ok=True)


def _checkpointer() -> ocp.Checkpointer:
    """Return an orbax checkpointer of this process alone; replicates are on the host before they are stored."""
    me = jax.process_index()
    options = ocp.options.MultiprocessingOptions(
        primary_host=me, active_processes={me}, barrier_sync_key_prefix=f"process{me}"
    )
    handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=options)
    return ocp.Checkpointer(handler, multiprocessing_options=options)
