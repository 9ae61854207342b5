"""Compute the stages of a jumpstart grid, one at a time on each device, and report."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from types import ModuleType

import jax
import pandas as pd

from experiments.cli import commands
from experiments.cli.commands import ClusterOptions
from experiments.cli.progress import Progress, progress, standard_output
from experiments.jumpstart_grid import image_grid, moons, uci_tables
from experiments.jumpstart_grid import report as reporting
from experiments.jumpstart_grid.cells import GridStage
from experiments.jumpstart_grid.config import Grid, GridRunning, grid_from_json
from experiments.storage import files, settings, store
from experiments.storage.checkpoints import Checkpoints
from experiments.training import launchers

ENGINES: dict[str, ModuleType] = {"moons": moons, "images": image_grid, "tables": uci_tables}
# Columns of the cells of every kind that the report reads.
_CELL_COLUMNS = (
    *("dataset", "method", "width", "depth", "epochs", "replicate", "floor", "train_acc", "val_acc"),
    *("train_acc_last", "val_acc_last", "unit_dead", "unit_linear", "point_dead"),
)
_POLL = 2.0  # seconds between looks at stages that another run is computing


class _Stopped(Exception):
    """A stage was left because the run ends."""


def run(folder: Path, grid: Grid, running: GridRunning, cluster: ClusterOptions | None = None) -> None:
    """Compute the missing stages of a grid, or of this run's part of it, then report.

    Raises:
      StoreError: the results cannot be written, or stages are missing at the end.
      ValueError: processes of one program are named, or the part is not valid.
    """
    cluster = cluster or ClusterOptions()
    if cluster.coordinator or cluster.process_id is not None or cluster.num_processes is not None:
        raise ValueError(
            "coordinator, process_id and num_processes join processes to one program, which a grid does not need: its "
            "stages are independent. Remove them and give every process a part with --shard i/n"
        )
    engine = ENGINES[grid.kind]
    (i, n), source = launchers.shard_of(cluster.shard, os.environ, one_program=False)
    devices = _devices(engine)
    mine = engine.plan(grid)[i::n]
    work = missing(folder, grid, mine)
    if source:
        print(source if mine else f"{source} is empty: nothing to compute", flush=True)
    changed = settings.record(
        folder, "jumpstart_grid", commands.to_json(grid), commands.to_json(running), note=bool(work)
    )
    for difference in changed:
        print(
            f"warning: the last run in {folder} had other options ({difference}); its results stay, and "
            "'status --all' lists them",
            file=sys.stderr,
        )
    if work:
        carry_out(folder, grid, running, work, devices)
    left = missing(folder, grid, mine)
    if len(left) < len(mine):
        report(folder, grid, running)
    if left:
        raise store.StoreError(
            f"{len(left)} of {len(mine)} stages of {folder} are missing, such as {left[0].title}; rerun the same "
            "command to compute them"
        )


def missing(folder: Path, grid: Grid, stages: Sequence[GridStage]) -> list[GridStage]:
    """The seeds of these stages that are not stored, as stages."""
    return [
        stage._replace(seeds=gap, work=stage.work * len(gap) // len(stage.seeds))
        for stage in stages
        for gap in store.missing(folder / "store", grid.kind, stage.settings, stage.seeds)
    ]


def carry_out(
    folder: Path, grid: Grid, running: GridRunning, work: Sequence[GridStage], devices: Sequence[jax.Device]
) -> None:
    """Compute stages, one at a time on each device, and store each as it ends; skip stages of other runs."""
    engine = ENGINES[grid.kind]
    deadline = time.monotonic() + 60 * running.minutes if running.minutes is not None else None
    waiting, lock, stopping, told = list(work), threading.Lock(), threading.Event(), threading.Event()

    def compute(stage: GridStage, target: store.Stage, shown: Progress, advance: Callable[[int], None]) -> None:
        kept = Checkpoints(target, stage.settings, running.checkpoint_minutes)
        shown.stage(stage.title + (f", after epoch {kept.done} of a killed run" if kept.done else ""))
        shown.skip(stage.work * kept.done // stage.settings["epochs"])
        keep(folder, grid, stage, engine.carry_out(running, stage, advance, kept))
        kept.clear()

    def worker(device: jax.Device, shown: Progress) -> None:
        def advance(units: int) -> None:
            shown.advance(units)
            if stopping.is_set():
                raise _Stopped

        refused = 0  # stages in a row that other runs are computing
        with jax.default_device(device):
            while not stopping.is_set() and (deadline is None or time.monotonic() < deadline):
                with lock:
                    stage = waiting.pop(0) if waiting else None
                if stage is None:
                    return
                target = store.stage(folder / "store", grid.kind, stage.settings, stage.seeds)
                with store.claimed(target) as mine:
                    if not store.missing(folder / "store", grid.kind, stage.settings, stage.seeds):
                        shown.skip(stage.work)
                    elif mine:
                        compute(stage, target, shown, advance)
                    else:
                        with lock:
                            waiting.append(stage)
                refused = 0 if mine else refused + 1
                if mine:
                    told.clear()
                else:
                    with lock:
                        tell = refused >= len(waiting) and not told.is_set()  # once, when all have been tried
                        if tell:
                            told.set()
                    if tell:
                        shown.stage(f"waiting for another run, which computes {stage.title}")
                    time.sleep(_POLL)

    with progress(sum(stage.work for stage in work), engine.UNIT) as shown, ThreadPoolExecutor(len(devices)) as pool:
        try:
            for finished in as_completed([pool.submit(worker, device, shown) for device in devices]):
                finished.result()
        except BaseException:
            stopping.set()  # the others leave their stages at the next report of progress
            raise


def keep(folder: Path, grid: Grid, stage: GridStage, made: dict[str, dict[str, Sequence[object]]]) -> None:
    """Store the tables of a stage."""
    target = store.stage(folder / "store", grid.kind, stage.settings, stage.seeds)
    with store.writing(target, stage.settings) as writing:
        for name, columns in made.items():
            files.write_table(writing / f"{name}.parquet", columns)


def status(folder: Path, grid: Grid, *, every: bool = False) -> None:
    """Print how many seeds of each stage are done, of one grid or of every grid in the folder."""
    grids = [grid_from_json(found["study"]) for found in settings.all_recorded(folder) if every] or [grid]
    for number, (one, different) in enumerate(zip(grids, commands.differences(grids), strict=True)):
        if every:
            print(f"grid {number}: {one.kind}, methods {', '.join(one.methods)}, {one.epochs} epochs{different}")
        for stage in ENGINES[one.kind].plan(one):
            absent = store.missing(folder / "store", one.kind, stage.settings, stage.seeds)
            print(f"{len(stage.seeds) - sum(map(len, absent)):4d} of {len(stage.seeds)}  {stage.title}")


def report(folder: Path, grid: Grid, running: GridRunning) -> None:
    """Rebuild tables and figures from the stored results, or from a table of cells."""
    partial = running.table is None and missing(folder, grid, ENGINES[grid.kind].plan(grid))
    _report(folder, grid, running)
    if partial and not missing(folder, grid, ENGINES[grid.kind].plan(grid)):
        # Another run has completed the grid meanwhile. Some of its tables may have been overwritten.
        _report(folder, grid, running)


def _report(folder: Path, grid: Grid, running: GridRunning) -> None:
    """Write and print the tables and figures of what is stored now."""
    if running.table is not None:
        cells, maps = _read_cells(running.table), None
    else:
        cells = collect(folder, grid, "cells")
        maps = collect(folder, grid, "statuses") if grid.kind == "moons" else None
        files.write_bytes(folder / "cells.csv", cells.to_csv(index=False, float_format="%.6g").encode())
    after = None
    if grid.prune and running.table is None:
        after = collect(folder, grid, "pruned")
        files.write_bytes(folder / "pruned.csv", after.to_csv(index=False, float_format="%.6g").encode())
    elif running.table is None:
        (folder / "pruned.csv").unlink(missing_ok=True)  # of another grid in this folder
    console = standard_output(180)
    reporting.write(folder, grid, cells, maps, console, after=after)


def _read_cells(path: Path) -> pd.DataFrame:
    """Read a table of cells.

    Raises:
      ValueError: it is not a CSV file with the columns of ``cells.csv``.
    """
    if not path.is_file():
        raise ValueError(f"table={path} is not a file; check the path")
    try:
        cells = pd.read_csv(path)
    except ValueError as error:
        raise ValueError(f"table={path} cannot be read as CSV: {error}; give the cells.csv of a grid") from error
    if lacking := [name for name in _CELL_COLUMNS if name not in cells]:
        raise ValueError(f"table={path} has no column {', '.join(lacking)}; give the cells.csv of a grid")
    return cells


def collect(folder: Path, grid: Grid, name: str) -> pd.DataFrame:
    """A table of every completed stage, with the seeds of this grid.

    Raises:
      ValueError: no stage is complete.
    """
    parts = []
    for stage in ENGINES[grid.kind].plan(grid):
        done = store.find(folder / "store", grid.kind, stage.settings)
        if done:
            table = store.collect_table(done, f"{name}.parquet")
            parts.append(table[table["replicate"].isin(stage.seeds)])
    if not parts:
        raise ValueError(f"no stage of this grid is done in {folder}; run it first, or give its folder with --out")
    return pd.concat(parts, ignore_index=True)


def _devices(engine: ModuleType) -> list[jax.Device]:
    """The devices to compute on: accelerators, or a CPU device for each core if the engine's steps are small.

    Processes that a launcher started on one node divide its GPUs. Steps of some milliseconds are not faster with
    a second thread, but two stages at once are.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if engine.SMALL_STEPS:
        flags = os.environ.get("XLA_FLAGS", "")
        if "--xla_cpu_multi_thread_eigen" not in flags:
            os.environ["XLA_FLAGS"] = f"{flags} --xla_cpu_multi_thread_eigen=false".strip()
        with contextlib.suppress(RuntimeError):  # jax has its devices already
            jax.config.update("jax_num_cpu_devices", cores)
    gpus = launchers.local_gpus(os.environ, launchers.gpus_of_node())
    if gpus is not None and launchers.launched(os.environ) > 1:
        jax.config.update("jax_cuda_visible_devices", ",".join(map(str, gpus)))
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return devices[: cores if engine.SMALL_STEPS else 1]
    return devices
