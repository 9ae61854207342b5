"""How everything here is timed: both sides in one run, taking turns, medians, and a verdict.

A row says what it must reach before it is run. A row that falls short says "short" and stays.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable

import numpy as np
import scipy.stats

Side = Callable[[], object]  # does the work once and waits until it is done
LONG = 2.0  # seconds; a side slower than this is timed once
ROUNDS = 7
CLOSE = 1.2  # a ratio that must be under this needs pairs and an interval
PAIRS = 50


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      what: what was timed.
      against: the other side.
      ours: our median, in seconds (of one run where ``note`` says that many were run).
      peer: the other side's median, in seconds.
      ratio: ours / peer, the median over pairs where pairs were taken.
      interval: the 95 % interval of the paired ratio, where pairs were taken.
      must: the ratio must be at most this.
      goal: what we would like it to be, at most.
      passed: whether it is; with an interval, whether the interval's lower bound is.
      note: how it was run, where that needs saying.
    """

    what: str
    against: str
    ours: float
    peer: float
    ratio: float
    must: float
    passed: bool
    interval: tuple[float, float] | None = None
    goal: float | None = None
    note: str = ""


def seconds(side: Side) -> float:
    """Time one call."""
    start = time.perf_counter()
    side()
    return time.perf_counter() - start


def compare(
    what: str,
    against: str,
    ours: Side,
    peer: Side,
    *,
    must: float,
    goal: float | None = None,
    per: tuple[float, float] = (1, 1),
    pairs: int | None = None,
    note: str = "",
) -> Row:
    """Time both sides in turns and hold the ratio of their times against what it must reach.

    Args:
      what: what is timed, for the table.
      against: the other side, for the table.
      ours: our side; it has checked, before this is called, that both compute the same.
      peer: the other side.
      must: the largest ratio ours / peer that passes.
      goal: the ratio we would like.
      per: how many units of work one call of each side does; times are per unit.
      pairs: how many alternating pairs; by default 50 where ``must`` is under 1.2, else 7, and one of
        a side that takes over 2 s.
      note: how it was run.
    """
    warm = seconds(ours), seconds(peer)
    warm = (
        min(warm[0], seconds(ours) if warm[0] < LONG else warm[0]),
        min(warm[1], seconds(peer) if warm[1] < LONG else warm[1]),
    )
    rounds = pairs or (PAIRS if must < CLOSE else ROUNDS)
    mine: list[float] = []
    theirs: list[float] = []
    for i in range(rounds):
        order = [(mine, ours, warm[0]), (theirs, peer, warm[1])]
        for taken, side, expected in order if i % 2 == 0 else reversed(order):
            if not taken or expected < LONG:
                taken.append(seconds(side) / per[0 if taken is mine else 1])
    if len(mine) == len(theirs) and len(mine) > 1:
        ratios = np.array(mine) / np.array(theirs)
        ratio = float(np.median(ratios))
    else:
        ratio = statistics.median(mine) / statistics.median(theirs)
    interval = None
    if must < CLOSE:
        bounds = scipy.stats.quantile_test(ratios, q=must, p=0.5).confidence_interval(0.95)
        interval = (float(bounds.low), float(bounds.high))
    return Row(
        what,
        against,
        statistics.median(mine),
        statistics.median(theirs),
        ratio,
        must,
        passed=(interval[0] if interval else ratio) <= must,
        interval=interval,
        goal=goal,
        note=note,
    )


def duration(value: float) -> str:
    """Write seconds for a reader.

    >>> duration(0.0123), duration(3.2), duration(0.0000042)
    ('12.3 ms', '3.2 s', '4.2 us')
    """
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def markdown(rows: list[Row], machine: dict[str, str]) -> str:
    """The table, ours and the peer's, with what must be reached beside each ratio."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "",
        "| what | against | ours | theirs | ours / theirs | must be at most | |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        ratio = f"{row.ratio:.3g}"
        if row.interval:
            ratio += f" [{row.interval[0]:.3f}, {row.interval[1]:.3f}]"
        allowed = f"{row.must:.3g}" + (f" (goal {row.goal:.3g})" if row.goal is not None else "")
        verdict = "reached" if row.passed else "**short**"
        cells = [row.what, row.against, duration(row.ours), duration(row.peer), ratio, allowed, verdict]
        lines.append("| " + " | ".join(cells) + " |")
    notes = [f"* {row.what}: {row.note}" for row in rows if row.note]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"
