"""Show the progress of a study: a bar in a terminal, plain lines in a log."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import rich.progress
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

_EVERY = 10.0  # seconds between two lines of a log within a stage


class Progress(NamedTuple):
    """Functions that report progress.

    Attributes:
      stage: call it with the name of a stage when the stage starts.
      advance: call it with the number of finished units of work and, if known, of finished training
        steps and examples, from which rates are computed.
    """

    stage: Callable[[str], None]
    advance: Callable[..., None]


class _Meter:
    """Units of work done, and the rates of the current stage, without its first report, which includes compiling."""

    def __init__(self, total: int):
        self.began, self.total, self.done = time.monotonic(), max(total, 1), 0
        self.start_stage()

    def start_stage(self) -> None:
        self.last, self.reports, self.steps, self.examples, self.seconds = time.monotonic(), 0, 0, 0, 0.0

    def advance(self, units: int, steps: int, examples: int) -> None:
        now = time.monotonic()
        self.done += units
        if self.reports:
            self.seconds += now - self.last
            self.steps += steps
            self.examples += examples
        self.last, self.reports = now, self.reports + 1

    def rates(self) -> str:
        """Return steps and examples per second; empty before the second report of a stage."""
        if not self.seconds or not self.steps:
            return ""
        return f"{self.steps / self.seconds:,.0f} steps/s, {self.examples / self.seconds:,.0f} examples/s"

    def remaining(self) -> str:
        """Return the time left at the average pace, including compiling; empty before the first report."""
        if not self.done:
            return ""
        return f"{duration((self.total - self.done) * (time.monotonic() - self.began) / self.done)} left"


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
    """Show the fraction of work done, the current stage, its rates and the time left.

    Args:
      total: units of work.
      unit: name of a unit.
      quiet: whether to suppress the display.
      console: where to print; standard output by default.
    """
    if quiet:
        yield Progress(lambda name: None, lambda units, steps=0, examples=0: None)
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

    yield Progress(stage, advance)


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

    with Display(*columns, TimeRemainingColumn(), console=console) as bar:
        name = bar.add_task("", total=total)

        def stage(text: str) -> None:
            meter.start_stage()
            rates.plain = "compiling; rates follow"
            bar.console.print(text, highlight=False, markup=False)

        def advance(units: int, steps: int = 0, examples: int = 0) -> None:
            meter.advance(units, steps, examples)
            rates.plain = meter.rates()
            bar.advance(name, units)

        yield Progress(stage, advance)
