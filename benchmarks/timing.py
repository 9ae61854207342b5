"""Time both sides in one run, alternating, and compare the ratio of medians with a target.

The target of a row is set before it is run. Missed targets are marked "short" and stay in the table.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats

Side = Callable[[], object]  # does the work once and waits for the result
LONG = 2.0  # seconds; a side slower than this is timed once
ROUNDS = 7
CLOSE = 1.2  # a target ratio below this needs pairs and an interval
PAIRS = 50
BRIEF = 0.05  # seconds; a faster side runs once untimed before each timed call


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      what: what was timed.
      against: the other side.
      ours: our median in seconds per unit of work; NaN if it was not run.
      peer: the median of the other side.
      ratio: ours / peer, or the median over pairs if pairs were timed.
      must: the target, the largest ratio that passes.
      passed: whether the ratio, or with an interval its lower bound, meets the target.
      interval: the 95% interval of the paired ratio, if enough pairs were timed.
      goal: a desired ratio below the target.
      note: how it was run, or why it was not run.
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

    @property
    def verdict(self) -> str:
        """The verdict in the table."""
        return "not run" if math.isnan(self.ratio) else "reached" if self.passed else "short"


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
    """Time both sides alternately and compare the ratio of their times with the target.

    Args:
      what: name of the timed work in the table.
      against: name of the other side in the table.
      ours: our side; the caller has checked that both sides compute the same.
      peer: the other side.
      must: the largest ratio ours / peer that passes.
      goal: the desired ratio.
      per: units of work per call of each side; times are per unit.
      pairs: number of alternating pairs; by default 50 if ``must`` is under 1.2, else 7. A side that takes over 2 s is
        timed once, after its warm-up, and the other one then 7 times.
      note: how it was run.
    """
    sides = (ours, peer)
    for side in sides:
        side()  # compiles and loads
    expected = [seconds(side) for side in sides]
    default = PAIRS if must < CLOSE and max(expected) < LONG else ROUNDS
    taken: tuple[list[float], list[float]] = ([], [])
    for i in range(pairs or default):
        for side in (0, 1) if i % 2 == 0 else (1, 0):
            if expected[side] < BRIEF:
                sides[side]()  # meanwhile the other side's threads, which busy-wait for work, go to sleep
            if not taken[side] or expected[side] < LONG:
                taken[side].append(seconds(sides[side]) / per[side])
    return judge(what, against, *taken, must=must, goal=goal, note=note)


def judge(
    what: str,
    against: str,
    ours: Sequence[float],
    peer: Sequence[float],
    *,
    must: float,
    goal: float | None = None,
    note: str = "",
) -> Row:
    """Return the row of two series of seconds; series of equal length are treated as pairs.

    >>> judge("a", "b", [1.0, 2.0, 3.0], [2.0, 2.0, 2.0], must=1.5).ratio
    1.0
    """
    mine, theirs = statistics.median(ours), statistics.median(peer)
    ratio, interval = mine / theirs, None
    if len(ours) == len(peer):
        ratios = np.array(ours) / np.array(peer)
        ratio = float(np.median(ratios))
        if must < CLOSE and len(ratios) >= PAIRS:
            bounds = scipy.stats.quantile_test(ratios, q=must, p=0.5).confidence_interval(0.95)
            interval = (float(bounds.low), float(bounds.high))
    passed = (interval[0] if interval else ratio) <= must
    return Row(what, against, mine, theirs, ratio, must, passed, interval, goal, note)


def not_run(what: str, against: str, *, must: float, why: str) -> Row:
    """Return a row that could not be measured, with the reason."""
    return Row(what, against, math.nan, math.nan, math.nan, must, False, note=f"not run: {why}")


def same(what: str, ours: object, peer: object, *, rtol: float, atol: float = 0.0) -> None:
    """Check that both sides computed the same numbers.

    Raises:
      AssertionError: they differ, or a number is NaN; then no ratio is printed.
    """
    ours, peer = np.asarray(ours, np.float64), np.asarray(peer, np.float64)
    np.testing.assert_allclose(ours, peer, rtol=rtol, atol=atol, equal_nan=False, err_msg=f"the sides differ: {what}")


def duration(value: float) -> str:
    """Format seconds in a suitable unit.

    >>> duration(0.0123), duration(3.2), duration(0.0000042)
    ('12.3 ms', '3.2 s', '4.2 us')
    """
    if math.isnan(value):
        return "-"
    for scale, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= scale:
            return f"{value / scale:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def markdown(rows: Sequence[Row], machine: dict[str, str], *, notes: bool = True) -> str:
    """Format the table of both sides with ratio and target, and the notes of the rows."""
    lines = [
        ", ".join(f"{name} {value}" for name, value in machine.items()) + ".",
        "",
        "| what | against | jprune | baseline | ratio | target ratio | |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for row in rows:
        ratio = "-" if math.isnan(row.ratio) else f"{row.ratio:.3g}"
        if row.interval:
            ratio += f" [{row.interval[0]:.3g}, {row.interval[1]:.3g}]"
        allowed = f"{row.must:.3g}" + (f" (goal {row.goal:.3g})" if row.goal is not None else "")
        verdict = row.verdict if row.passed else f"**{row.verdict}**"
        cells = [row.what, row.against, duration(row.ours), duration(row.peer), ratio, allowed, verdict]
        lines.append("| " + " | ".join(cells) + " |")
    listed = [f"* {row.what}, against {row.against}: {row.note}." for row in rows if row.note and notes]
    return "\n".join([*lines, *(["", *listed] if listed else [])]) + "\n"
