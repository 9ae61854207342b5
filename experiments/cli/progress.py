"""Say how far a study is: a bar on a terminal, plain lines anywhere else."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import rich.progress
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Progress(NamedTuple):
    """Where to say what happens.

    Attributes:
      stage: called with a name where a stage begins.
      advance: called with the units of work that got done.
    """

    stage: Callable[[str], None]
    advance: Callable[[int], None]


@contextlib.contextmanager
def progress(total: int, unit: str, *, quiet: bool = False, console: Console | None = None) -> Iterator[Progress]:
    """Show how much of the work is done, and in which stage it is.

    Args:
      total: units of work.
      unit: what they are called.
      quiet: show nothing.
      console: where to; standard output by default.
    """
    if quiet:
        yield Progress(lambda name: None, lambda units: None)
        return
    console = console or Console(file=sys.stdout)
    if console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        with rich.progress.Progress(*columns, console=console) as bar:
            task = bar.add_task("", total=total)
            yield Progress(lambda name: bar.update(task, description=name), lambda units: bar.advance(task, units))
        return
    began, done = time.monotonic(), 0

    def stage(name: str) -> None:
        percent = 100 * done // max(total, 1)
        console.file.write(f"[{time.monotonic() - began:6.1f} s, {percent:3d} %] {name}\n")
        console.file.flush()

    def advance(units: int) -> None:
        nonlocal done
        done += units

    yield Progress(stage, advance)
