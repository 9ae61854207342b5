"""Do thin, deep networks train? Riera et al., CPAIOR 2022 and IEEE Access 2025, again and a little further.

``python -m experiments.jumpstart_grid --preset moons-subset`` trains a grid of widths, depths and methods
and puts it beside the published one; ``--list`` names the other studies, ``--help`` has the options.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import pandas as pd
import tyro
from rich.console import Console

from experiments.cli.commands import exit_status, parse_shard
from experiments.cli.progress import Progress, progress
from experiments.jumpstart_grid import image_grid, moons, presets, prune_jumpstart, uci_tables
from experiments.jumpstart_grid import report as reporting
from experiments.jumpstart_grid.cells import Planned
from experiments.jumpstart_grid.presets import Grid
from experiments.storage import files, provenance, store

_ENGINES: dict[str, ModuleType] = {
    "moons": moons,
    "images": image_grid,
    "tables": uci_tables,
    "pruning": prune_jumpstart,
}


_CONFIG = "config.json"


class _Stopped(Exception):
    """A stage was left because the study ends."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""

    def work() -> None:
        grid = parse(arguments)
        if grid.list:
            print(presets.listing())
        else:
            {"run": run, "status": status, "report": report}[grid.action](grid)

    return exit_status(work)


def parse(arguments: Sequence[str] | None = None) -> Grid:
    """Read the options; those not given have the preset's values.

    For ``status`` and ``report`` those not given have the values of the run whose results lie there.

    Raises:
      ValueError: an unknown preset, or settings that no study can have.
      SystemExit: an unknown option, or a value of the wrong type.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="moons-subset")
    first.add_argument("--out", type=Path)
    known, rest = first.parse_known_args(arguments)
    default = dataclasses.replace(presets.get(known.preset), out=known.out)
    if {"status", "report"} & set(rest) and (recorded := _recorded(default)):
        default = dataclasses.replace(recorded, out=default.out)
    return tyro.cli(Grid, args=arguments, default=default, prog="python -m experiments.jumpstart_grid")


def _recorded(grid: Grid) -> Grid | None:
    """The settings of the grid that was last run in a folder, if any was."""
    path = grid.folder / _CONFIG
    try:
        return presets.from_json(json.loads(path.read_text())) if path.exists() else None
    except (ValueError, TypeError, AttributeError) as error:
        raise files.StoreError(f"{path} cannot be read ({error}); delete it and give all options again") from error


def run(grid: Grid) -> None:
    """Do what is not done yet, then report."""
    engine = _ENGINES[grid.kind]
    devices = _devices(engine)
    i, n = parse_shard(grid.shard)
    work = [
        stage._replace(seeds=gap, work=stage.work * len(gap) // len(stage.seeds))
        for stage in engine.plan(grid)[i::n]
        for gap in store.missing(grid.folder / "store", grid.kind, stage.settings, stage.seeds)
    ]
    files.write_json(grid.folder / _CONFIG, grid.to_json())
    if work:
        provenance.note(grid.folder, "jumpstart_grid")
        carry_out(grid, engine, work, devices)
    report(grid)


def carry_out(grid: Grid, engine: ModuleType, work: Sequence[Planned], devices: Sequence[jax.Device]) -> None:
    """Carry out stages, one a device at a time, and store each as it ends."""
    deadline = time.monotonic() + 60 * grid.minutes if grid.minutes is not None else None
    waiting, taking, stopping = iter(work), threading.Lock(), threading.Event()

    def worker(device: jax.Device, shown: Progress) -> None:
        def advance(units: int) -> None:
            shown.advance(units)
            if stopping.is_set():
                raise _Stopped

        with jax.default_device(device):
            while not stopping.is_set() and (deadline is None or time.monotonic() < deadline):
                with taking:
                    stage = next(waiting, None)
                if stage is None:
                    return
                shown.stage(stage.title)
                keep(grid, stage, engine.carry_out(grid, stage, advance))

    with progress(sum(stage.work for stage in work), engine.UNIT) as shown, ThreadPoolExecutor(len(devices)) as pool:
        try:
            for finished in as_completed([pool.submit(worker, device, shown) for device in devices]):
                finished.result()
        except BaseException:
            stopping.set()  # the others leave their stage at its next report
            raise


def keep(grid: Grid, stage: Planned, made: dict[str, dict[str, Any]]) -> None:
    """Store what a stage made."""
    target = store.stage(grid.folder / "store", grid.kind, stage.settings, stage.seeds)
    with store.writing(target, stage.settings) as folder:
        for name, columns in made.items():
            files.write_table(folder / f"{name}.parquet", columns)


def status(grid: Grid) -> None:
    """Say how many seeds of each stage are done."""
    for stage in _ENGINES[grid.kind].plan(grid):
        absent = store.missing(grid.folder / "store", grid.kind, stage.settings, stage.seeds)
        print(f"{len(stage.seeds) - sum(map(len, absent)):4d} of {len(stage.seeds)}  {stage.title}")


def report(grid: Grid) -> None:
    """Rebuild tables and figures, from what is stored or from a table that was written before."""
    if grid.table is not None:
        cells, maps = pd.read_csv(grid.table), None
    else:
        cells, maps = collect(grid, "cells"), collect(grid, "statuses") if grid.kind == "moons" else None
        files.write_bytes(grid.folder / "cells.csv", cells.to_csv(index=False, float_format="%.6g").encode())
    console = Console(width=None if sys.stdout.isatty() else 180)
    reporting.write(grid, cells, maps, console)


def collect(grid: Grid, name: str) -> pd.DataFrame:
    """A table of every stage that is done, with the seeds that this study asks for.

    Raises:
      ValueError: no stage is done.
    """
    parts = []
    for stage in _ENGINES[grid.kind].plan(grid):
        done = store.find(grid.folder / "store", grid.kind, stage.settings)
        if done:
            table = store.collect_table(done, f"{name}.parquet")
            parts.append(table[table["replicate"].isin(stage.seeds)])
    if not parts:
        raise ValueError(f"no stage of preset {grid.preset!r} is done in {grid.folder}: run it first")
    return pd.concat(parts, ignore_index=True)


def _devices(engine: ModuleType) -> list[jax.Device]:
    """The devices to work on: accelerators, or a CPU device for each core where the engine's steps are small.

    Steps of some milliseconds gain nothing from a second thread, and two stages at once everything.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if engine.SMALL_STEPS:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
        with contextlib.suppress(RuntimeError):  # jax has its devices already
            jax.config.update("jax_num_cpu_devices", cores)
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return devices[: cores if engine.SMALL_STEPS else 1]
    return devices


if __name__ == "__main__":
    sys.exit(main())
