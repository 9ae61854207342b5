"""Training curves while a study runs: callbacks that write CSV and TensorBoard files."""

import contextlib
import importlib.util
import os
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
import pandas as pd

from experiments.storage import files

Callback = Callable[[str, range, int, Mapping[str, np.ndarray]], None]
"""Called after each epoch with the stage's title, its replicates, the epoch counted from 1, and a dict from metric to
float32 values, one for each replicate. docs/how-to/reproduce.md shows a callback for another tracker."""


class Writer(Protocol):
    """A ``Callback`` that also takes the digest of the stage, by which studies in one folder differ."""

    def __call__(
        self, stage: str, replicates: range, epoch: int, metrics: Mapping[str, np.ndarray], digest: str = ""
    ) -> None:
        """Write the metrics of an epoch."""


def to_csv(folder: Path) -> Writer:
    """Return a callback that appends a row per replicate and epoch to ``metrics.csv`` in a folder.

    Several runs may write to one file at the same time: rows are appended in one piece, below one header. The column
    ``digest`` is left out if no digest is given, and in a file of an earlier version, whose header lacks it.

    Raises (when called):
      StoreError: the file cannot be written; the message names it.
    """
    path = folder / "metrics.csv"

    def write(stage: str, replicates: range, epoch: int, metrics: Mapping[str, np.ndarray], digest: str = "") -> None:
        rows = pd.DataFrame({"stage": stage, "replicate": np.array(replicates), "epoch": epoch, **metrics})
        rows = rows.assign(digest=digest) if digest else rows
        with files.naming(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                _create(path, rows.head(0).to_csv(index=False).encode())
            with path.open("rb") as file:
                rows = rows if b"digest" in file.readline() else rows.drop(columns="digest", errors="ignore")
            with path.open("ab", buffering=0) as file:
                file.write(rows.to_csv(header=False, index=False, float_format="%.6g").encode())

    return write


def to_tensorboard(folder: Path) -> Writer | None:
    """Return a callback that writes the mean of each metric to TensorBoard; None without the extra ``tensorboard``.

    Every stage is a separate run, with the first digits of its digest in its name. A loss that is not finite is left
    out of the mean.
    """
    if importlib.util.find_spec("tensorboardX") is None:
        return None
    import tensorboardX  # noqa: PLC0415 an extra

    boards: dict[str, tensorboardX.SummaryWriter] = {}

    def write(stage: str, replicates: range, epoch: int, metrics: Mapping[str, np.ndarray], digest: str = "") -> None:
        name = f"{stage}, {replicates.start}-{replicates.stop - 1}" + (f", {digest[:8]}" if digest else "")
        with files.naming(folder):
            if name not in boards:
                for board in boards.values():
                    board.close()
                boards.clear()
                boards[name] = tensorboardX.SummaryWriter(str(folder / name), flush_secs=5)
            for metric, values in metrics.items():
                finite = np.asarray(values)[np.isfinite(values)]
                if len(finite):
                    boards[name].add_scalar(metric, float(finite.mean()), epoch)

    return write


def _create(path: Path, header: bytes) -> None:
    """Create a file that holds the header from the start, unless another run has created it.

    A file that is opened first and gets its header later would lose the row that another run appends in between.
    """
    temporary = path.with_name(f"{path.name}{files.PARTIAL}{uuid.uuid4().hex}")
    try:
        temporary.write_bytes(header)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links: the header is appended, so that no row is lost
            with contextlib.suppress(FileExistsError):
                descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_APPEND, 0o666)
                with os.fdopen(descriptor, "ab", buffering=0) as file:
                    file.write(header)
    finally:
        temporary.unlink(missing_ok=True)
