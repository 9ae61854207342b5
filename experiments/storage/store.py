"""Store stages of a study on disk. A stage is complete or absent, even if a writer is killed or several write.

A stage is the result of one program for a contiguous range of replicates. Its folder is named by the kind of stage, a
hash of every setting that determines its results, and the range::

    ROOT/dense-3f2a.../00000-00030/  manifest.json  weights/  *.parquet  *.jsonl

It is written under another name, synced to disk, and renamed, so a folder with this name is complete.
The manifest has the settings and a checksum of every file, which is verified whenever a file is read.

A run that computes a stage claims it with a file ``00000-00030.claim``, which it touches every few seconds.
The claim of a killed run is no longer touched, and expires after a minute.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.storage import files
from experiments.storage.files import JSON, PARTIAL, SCHEMA, StoreError, canonical, checksum, naming
from jprune.files import sync

_MANIFEST = "manifest.json"
_STALE_SECONDS = 3600  # writing a stage takes seconds
_LEASE_SECONDS = 60.0  # after which an untouched claim expires


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a store, complete or absent; made by ``stage`` and ``find``.

    Attributes:
      root: folder of the store.
      kind: kind of stage, such as ``dense``.
      digest: hash of the settings.
      replicates: contiguous range of replicates.
    """

    root: Path
    kind: str
    digest: str
    replicates: range

    @property
    def path(self) -> Path:
        """The folder that exists if and only if the stage is complete."""
        return self.root / f"{self.kind}-{self.digest}" / f"{self.replicates.start:05d}-{self.replicates.stop:05d}"

    @property
    def done(self) -> bool:
        """Whether the stage is complete."""
        return self.path.is_dir()


def digest(settings: Mapping[str, JSON]) -> str:
    """Hash settings, independent of their order: 20 hexadecimal digits.

    Raises:
      TypeError: a setting is not JSON.

    >>> digest({"a": 1, "b": [0.5]}) == digest({"b": [0.5], "a": 1})
    True
    """
    return hashlib.sha256(canonical({"schema": SCHEMA, **settings}).encode()).hexdigest()[:20]


def stage(root: Path, kind: str, settings: Mapping[str, JSON], replicates: range) -> Stage:
    """Name a stage.

    Args:
      root: folder of the store.
      kind: kind of stage; letters, digits and underscores.
      settings: everything that determines the results except the replicates; JSON.
      replicates: contiguous and not empty.

    Raises:
      ValueError: replicates that are not contiguous.
    """
    if len(replicates) == 0 or replicates.step != 1:
        raise ValueError(f"replicates={replicates} must be contiguous and not empty")
    return Stage(root, kind, digest(settings), replicates)


def find(root: Path, kind: str, settings: Mapping[str, JSON]) -> list[Stage]:
    """Return the complete stages with these settings, in the order of their replicates."""
    folder = stage(root, kind, settings, range(1)).path.parent
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    ends = sorted(tuple(map(int, name.split("-"))) for name in names if re.fullmatch(r"\d{5,}-\d{5,}", name))
    return [stage(root, kind, settings, range(*pair)) for pair in ends]


def missing(root: Path, kind: str, settings: Mapping[str, JSON], replicates: range) -> list[range]:
    """Return the replicates that are in no complete stage, as contiguous ranges."""
    present = {replicate for done in find(root, kind, settings) for replicate in done.replicates}
    absent = [replicate for replicate in replicates if replicate not in present]
    starts = [replicate for replicate in absent if replicate - 1 not in absent]
    ends = [replicate + 1 for replicate in absent if replicate + 1 not in absent]
    return [range(start, end) for start, end in zip(starts, ends, strict=True)]


@contextlib.contextmanager
def claimed(target: Stage) -> Iterator[bool]:
    """Claim a stage, so that other runs on the same folder compute other stages.

    A claim only saves work: if two runs compute the same stage, the first result is kept.

    Yields:
      Whether the claim succeeded; False while the claim of another run is touched regularly.

    Raises:
      StoreError: the claim cannot be written.
    """
    path = target.path.with_name(f"{target.path.name}.claim")
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        mine = _take(path)
    if not mine:
        yield False
        return
    ended = threading.Event()
    thread = threading.Thread(target=_touch, args=(path, ended), daemon=True)
    thread.start()
    try:
        yield True
    finally:
        ended.set()
        thread.join()
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def unclaimed() -> Iterator[bool]:
    """Stand-in for ``claimed`` in the processes of a program other than the first, which makes the claims."""
    yield True


def _take(path: Path) -> bool:
    """Create a claim, after removing an expired one; False if another run has it."""
    probe = path.with_name(f"{path.name}{PARTIAL}{uuid.uuid4().hex}")
    probe.touch()
    try:
        now = probe.stat().st_mtime  # time of the file system, which may be on another machine
        with contextlib.suppress(FileNotFoundError):
            if now - path.stat().st_mtime > _LEASE_SECONDS:
                os.rename(path, probe)  # only one of two runs can rename an expired claim
                if now - probe.stat().st_mtime <= _LEASE_SECONDS:  # it is the new claim of a run that was faster
                    os.rename(probe, path)
                    return False
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True
    finally:
        probe.unlink(missing_ok=True)


def _touch(path: Path, ended: threading.Event) -> None:
    """Keep a claim alive until its stage has ended."""
    while not ended.wait(_LEASE_SECONDS / 6):
        with contextlib.suppress(OSError):
            os.utime(path)


@contextlib.contextmanager
def writing(target: Stage, settings: Mapping[str, JSON]) -> Iterator[Path]:
    """Yield a folder for the stage's files; when the block ends, rename it to the stage.

    If another process has completed the same stage in the meantime, its files are kept and these are dropped. After an
    exception in the block the partial folder is deleted; if the process is killed, a later writer of this kind of stage
    deletes it.

    Raises:
      StoreError: the disk is full or a file cannot be written; the message names it.
    """
    partial = target.path.with_name(f"{target.path.name}{PARTIAL}{uuid.uuid4().hex}")
    try:
        with naming(partial):
            _create(partial)
            _sweep(partial.parent)
            yield partial
            written = sorted(path for path in partial.rglob("*") if path.is_file())
            sums = {str(path.relative_to(partial)): checksum(path) for path in written}
            manifest = {"schema": SCHEMA, "kind": target.kind, "settings": settings, "sha256": sums}
            files.write_json(partial / _MANIFEST, manifest)
            for path in (*partial.rglob("*"), partial):
                sync(path)
            _publish(partial, target.path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def read_table(done: Stage, name: str) -> pd.DataFrame:
    """Read a parquet file of a stage.

    Raises:
      StoreError: the file is missing, altered, or has another schema version; the message names it.
    """
    return files.read_table(verified(done, name))


def read_weights(done: Stage, name: str = "weights") -> dict[str, np.ndarray]:
    """Read the arrays of a stage's orbax checkpoint.

    Raises:
      StoreError: a file of it is missing or altered; the message names it.
    """
    for file in _manifest(done)["sha256"]:
        if Path(file).parts[0] == name:
            verified(done, file)
    return files.read_weights(done.path / name)


def verified(done: Stage, name: str) -> Path:
    """Verify the checksum of a file of a stage and return its path.

    Raises:
      StoreError: it is missing or altered; the message names it.
    """
    path, sums = done.path / name, _manifest(done)["sha256"]
    if name not in sums or not path.is_file():
        raise StoreError(f"{path} is missing; {_remedy(done)}")
    if checksum(path) != sums[name]:
        raise StoreError(f"{path} is corrupt: its checksum differs from the manifest; {_remedy(done)}")
    return path


def collect_table(stages: Sequence[Stage], name: str) -> pd.DataFrame:
    """Read a parquet file of several stages as one table; each replicate comes from the first stage that has it.

    Args:
      stages: complete; at least one.
      name: name of the file; it has a column ``replicate``.

    Raises:
      StoreError: as ``read_table``.
    """
    parts = []
    for done, replicates in _parts(stages):
        if replicates:
            table = read_table(done, name)
            parts.append(table[table["replicate"].isin(replicates)])
    return pd.concat(parts, ignore_index=True)


def collect_weights(stages: Sequence[Stage], replicates: range) -> dict[str, np.ndarray]:
    """Read the weights of these replicates, in order, from the stages that have them.

    Raises:
      StoreError: as ``read_weights``, or no stage has one of the replicates.
    """
    parts = []
    for done, taken in _parts(stages):
        wanted = [replicate - done.replicates.start for replicate in taken if replicate in replicates]
        if wanted:
            parts.append({path: array[wanted] for path, array in read_weights(done).items()})
    weights = {path: np.concatenate([part[path] for part in parts]) for path in (parts[0] if parts else {})}
    if not weights or any(len(array) != len(replicates) for array in weights.values()):
        raise StoreError(f"the store has no weights for all of replicates {replicates.start} to {replicates.stop - 1}")
    return weights


def _parts(stages: Sequence[Stage]) -> list[tuple[Stage, list[int]]]:
    """Return which replicates to take from each stage, each only once."""
    seen: set[int] = set()
    parts = []
    for done in stages:
        parts.append((done, [replicate for replicate in done.replicates if replicate not in seen]))
        seen.update(done.replicates)
    return parts


def _manifest(done: Stage) -> dict[str, JSON]:
    """Read the manifest of a stage."""
    path = done.path / _MANIFEST
    try:
        manifest: dict[str, JSON] = json.loads(path.read_text())
        named, _ = digest(manifest["settings"]), dict(manifest["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} cannot be read ({error!r}); {_remedy(done)}") from error
    if named != done.digest:
        raise StoreError(f"{path} is corrupt: its settings are not those that name its folder; {_remedy(done)}")
    return manifest


def _remedy(done: Stage) -> str:
    return f"delete {done.path} and rerun the same command, which computes the stage again"


def _create(folder: Path) -> None:
    """Create a folder within one that other runs remove when it is empty, as those of checkpoints."""
    for attempt in range(1, 11):
        try:
            folder.mkdir(parents=True)
            return
        except FileNotFoundError:
            if attempt == 10:
                raise


def _sweep(folder: Path) -> None:
    """Remove partial folders of killed writers."""
    for path in folder.glob(f"*{PARTIAL}*"):
        with contextlib.suppress(OSError):
            if time.time() - path.stat().st_mtime > _STALE_SECONDS:
                shutil.rmtree(path, ignore_errors=True)


def _publish(partial: Path, final: Path) -> None:
    """Rename a complete folder to the stage's name, unless another process was first."""
    try:
        partial.rename(final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    sync(final.parent)
