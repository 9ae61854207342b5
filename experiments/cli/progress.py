"""Show the progress of a study: a bar in a terminal, plain lines in a log."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import rich.progress
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

_EVERY = 10.0  # seconds between two lines of a log within a stage


class Progress(NamedTuple):
    """Functions that report progress. Threads that compute stages side by side call them, each for its own stage.

    Attributes:
      stage: call it with the name of a stage when the stage starts.
      advance: call it with the number of finished units of work and, if known, of finished training
        steps and examples, from which rates are computed.
      skip: call it with the number of units of work that another run has done.
    """

    stage: Callable[[str], None]
    advance: Callable[..., None]
    skip: Callable[[int], None]


class _Current(threading.local):
    """The stage of a thread: when it last reported, how often, and what it has done since its first report."""

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.last, self.reports, self.steps, self.examples, self.seconds = time.monotonic(), 0, 0, 0, 0.0


class _Meter:
    """Units of work done, the rates of each stage, and the time left.

    The time before the first report of a stage includes compiling, so neither the rates nor the time left use it.
    """

    def __init__(self, total: int):
        self.began, self.total, self.done = time.monotonic(), max(total, 1), 0
        self.current, self.threads, self.lock = _Current(), set[int](), threading.Lock()
        self.timed_units, self.timed_seconds = 0, 0.0

    def start_stage(self) -> None:
        self.current.start()
        with self.lock:
            self.threads.add(threading.get_ident())

    def advance(self, units: int, steps: int, examples: int) -> None:
        now, current = time.monotonic(), self.current
        with self.lock:
            self.done += units
            if current.reports:
                self.timed_units += units
                self.timed_seconds += now - current.last
        if current.reports:
            current.seconds += now - current.last
            current.steps += steps
            current.examples += examples
        current.last, current.reports = now, current.reports + 1

    def skip(self, units: int) -> None:
        with self.lock:
            self.done += units

    def rates(self) -> str:
        """Return steps and examples per second; empty before the second report of a stage."""
        current = self.current
        if not current.seconds or not current.steps:
            return ""
        return f"{current.steps / current.seconds:,.0f} steps/s, {current.examples / current.seconds:,.0f} examples/s"

    def remaining(self) -> str:
        """Return the time left at the average pace, without compiling; empty before the second report of a stage."""
        with self.lock:
            if not self.timed_seconds:
                return ""
            pace = self.timed_seconds / self.timed_units / max(1, len(self.threads))
            return f"{duration((self.total - self.done) * pace)} left"


def duration(seconds: float) -> str:
    """Format a duration in a suitable unit.

    >>> duration(42), duration(600), duration(7200)
    ('42 s', '10 min', '2.0 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def standard_output(columns: int = 80, *, stderr: bool = False) -> Console:
    """Return a console that is as wide as the terminal, or, in a log, prints plain text of this width.

    Under mpirun the output of a process looks like a terminal, but mpirun may write it to a log.

    Args:
      columns: width of a log.
      stderr: whether to print to standard error instead.
    """
    file = sys.stderr if stderr else sys.stdout
    terminal = file.isatty() and "OMPI_COMM_WORLD_RANK" not in os.environ
    return Console(file=file) if terminal else Console(file=file, width=columns, force_terminal=False)


@contextlib.contextmanager
def progress(total: int, unit: str, *, quiet: bool = False, console: Console | None = None) -> Iterator[Progress]:
    """Show the fraction of work done, the current stage, its rates and the time left, which excludes compiling.

    Args:
      total: units of work.
      unit: name of a unit.
      quiet: whether to suppress the display.
      console: where to print; standard output by default.
    """
    if quiet:
        yield Progress(lambda name: None, lambda units, steps=0, examples=0: None, lambda units: None)
        return
    console = console or standard_output()
    if console.is_terminal:
        with _bar(total, unit, console) as shown:
            yield shown
        return
    meter, printed, current = _Meter(total), time.monotonic(), ""

    def line(text: str) -> None:
        nonlocal printed
        printed = time.monotonic()
        percent = 100 * meter.done // meter.total
        console.file.write(f"[{printed - meter.began:6.1f} s, {percent:3d}%] {text}\n")
        console.file.flush()

    def stage(name: str) -> None:
        nonlocal current
        current = name
        meter.start_stage()
        line(name)

    def advance(units: int, steps: int = 0, examples: int = 0) -> None:
        meter.advance(units, steps, examples)
        shown = [part for part in (meter.rates(), meter.remaining()) if part]
        if shown and time.monotonic() - printed > _EVERY:
            line(f"  {', '.join(shown)}")

    yield Progress(stage, advance, meter.skip)


@contextlib.contextmanager
def _bar(total: int, unit: str, console: Console) -> Iterator[Progress]:
    """Show a bar in a terminal, with the stage and the rates on separate lines, so that 80 columns suffice."""
    columns = (BarColumn(bar_width=None), MofNCompleteColumn(), TextColumn(unit), TimeElapsedColumn())
    meter = _Meter(total)
    rates = Text(no_wrap=True)

    class Display(rich.progress.Progress):
        """A bar with the rates of the current stage below it."""

        def get_renderables(self) -> Iterator[RenderableType]:
            yield from super().get_renderables()
            yield rates

    with Display(*columns, console=console) as bar:
        name = bar.add_task("", total=total)

        def stage(text: str) -> None:
            meter.start_stage()
            rates.plain = "compiling; rates follow"
            bar.console.print(text, highlight=False, markup=False)

        def advance(units: int, steps: int = 0, examples: int = 0) -> None:
            meter.advance(units, steps, examples)
            rates.plain = ", ".join(filter(None, [meter.rates(), meter.remaining()]))
            bar.advance(name, units)

        def skip(units: int) -> None:
            meter.skip(units)
            bar.advance(name, units)

        yield Progress(stage, advance, skip)
