"""Provenance of the results in a folder: command, commit, time, version and device of each run."""

import json
import re
import shlex
import subprocess
import sys
import time
import uuid
from pathlib import Path

import jax

from experiments.storage import files

_FOLDER = "made"  # one file per run, so that concurrent runs lose no entry


def note(folder: Path, module: str) -> None:
    """Add this run to the notes of a folder, unless the same command at the same commit is already there.

    Raises:
      StoreError: they cannot be written; the message names the file.
    """
    commit = _git("rev-parse", "HEAD") or "unknown"
    if _git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    device = jax.devices()[0].device_kind
    entry = {"command": _command(module), "commit": commit, "jax": jax.__version__, "device": device}
    earlier = notes(folder)
    if entry not in [{name: old.get(name) for name in entry} for old in earlier]:
        path = folder / _FOLDER / f"{time.time_ns()}-{uuid.uuid4().hex[:8]}.json"
        files.write_json(path, {**entry, "began": time.strftime("%Y-%m-%d %H:%M %z")})


def _command(module: str) -> str:
    """Return the command of this process, with DIR for the folder of the data; or that Python code called the study."""
    program, *given = sys.argv
    if Path(__file__).resolve().parents[1] not in Path(program).resolve().parents:
        return f"experiments.{module}, called from Python with the settings in studies/"
    shown = [
        "DIR" if before in ("--data-dir", "--data_dir") else re.sub("^(--data[-_]dir=).*", r"\1DIR", argument)
        for before, argument in zip(["", *given], given, strict=False)
    ]
    return shlex.join(["python", "-m", f"experiments.{module}", *shown])


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def notes(folder: Path) -> list[dict[str, str]]:
    """Return the notes of a folder, earliest first."""
    return [json.loads(path.read_text()) for path in sorted((folder / _FOLDER).glob("*.json"))]


def portable(entries: list[dict[str, str]]) -> list[dict[str, str]]:
    """Replace every absolute path in the commands by ``runs/NAME``, for published tables.

    >>> portable([{"command": "python -m experiments.jumpstart_grid --out /tmp/me/moons --shard 0/2"}])
    [{'command': 'python -m experiments.jumpstart_grid --out runs/moons --shard 0/2'}]
    >>> portable([{"command": "python -m experiments.recall_distortion --dataset npz:/home/me/data.npz"}])
    [{'command': 'python -m experiments.recall_distortion --dataset npz:runs/data.npz'}]
    """
    return [
        {**entry, "command": re.sub(r"(?<=[ =:])/\S*/([^/\s]+)", r"runs/\1", entry["command"])} for entry in entries
    ]
