"""When to prune and how much: finite tables ``{step: sparsity}``.

A schedule is a plain dict, so that every count it asks for is known before anything is traced. Step
s means the update called after s earlier ones. A float is the fraction of the prunable weights that
are removed; an int is the number of weights that are kept.
"""

import numbers
from collections.abc import Mapping
from typing import Any

# {int: float | int}; any integer and real type of numpy will do, and ``entries`` says what will not.
Schedule = Mapping[Any, Any]

# The step counter is an int32 that saturates, so a later step would never come.
_LAST_STEP = 2**31 - 2


def one_shot(sparsity: float | int, step: int) -> dict[int, float | int]:
    """Prune once.

    Args:
      sparsity: the fraction of the prunable weights to remove, in [0, 1]; an int is the number kept.
      step: the number of updates before the one that prunes.

    Returns:
      A table with one entry.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

    >>> one_shot(0.9, step=1000)
    {1000: 0.9}
    """
    return dict(entries({step: sparsity}))


def cubic(sparsity: float, begin: int, end: int, every: int) -> dict[int, float | int]:
    """Prune fast at first and slower towards the end.

    At step t between ``begin`` and ``end`` the sparsity is s (1 - (1 - (t - begin) / (end - begin))^3),
    with s the final sparsity. The entry at ``end`` is exactly s, also where ``every`` does not
    divide the span.

    Args:
      sparsity: the final fraction of the prunable weights that is removed, in [0, 1].
      begin: the first step of the table; its sparsity is 0.
      end: the last step of the table.
      every: the number of steps between two entries.

    Returns:
      A table with entries at begin, begin + every, ... before ``end``, and at ``end``.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range, or ``end`` is not after ``begin``.

    Source: Zhu & Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878, equation 1 with initial
    sparsity 0.

    >>> cubic(0.8, begin=0, end=10, every=4)
    {0: 0.0, 4: 0.627..., 8: 0.793..., 10: 0.8}
    """
    target = _fraction("sparsity", sparsity)
    begin, end, every = _integer("begin", begin, 0), _integer("end", end, 0), _integer("every", every, 1)
    if end <= begin:
        raise ValueError(f"end={end} must come after begin={begin}")
    table: dict[int, float | int] = {}
    for step in range(begin, end, every):
        left = (end - step) / (end - begin)
        table[step] = target * (1.0 - left * left * left)
    table[end] = target
    return dict(entries(table))


def geometric(rate: float, every: int, times: int) -> dict[int, float | int]:
    """Remove the same fraction of what remains, again and again.

    After the k-th pruning the sparsity is 1 - (1 - rate)^k.

    Args:
      rate: the fraction of the remaining weights to remove each time, in [0, 1].
      every: the number of steps before the first pruning, and between two of them.
      times: how many times to prune.

    Returns:
      A table with entries at every, 2 every, ..., times every.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

    Source: Frankle & Carbin, "The Lottery Ticket Hypothesis", 2019, arXiv 1803.03635, section 2, with
    rate 0.2.

    >>> geometric(0.5, every=100, times=3)
    {100: 0.5, 200: 0.75, 300: 0.875}
    """
    rate = _fraction("rate", rate)
    every, times = _integer("every", every, 1), _integer("times", times, 1)
    return dict(entries({k * every: 1.0 - (1.0 - rate) ** k for k in range(1, times + 1)}))


def entries(schedule: Any) -> tuple[tuple[int, float | int], ...]:
    """Check a table and give its (step, sparsity) pairs in the order of the steps.

    Raises:
      TypeError: it is no mapping of integer steps to floats and ints.
      ValueError: it is empty, or a step or a sparsity is out of range.

    >>> entries({200: 1000, 100: 0.5})
    ((100, 0.5), (200, 1000))
    """
    if not isinstance(schedule, Mapping):
        raise TypeError(f"schedule={schedule!r} is a {type(schedule).__name__}; it must be a dict {{step: sparsity}}")
    if not schedule:
        raise ValueError("schedule is empty; it must hold at least one {step: sparsity}")
    table = {}
    for key, sparsity in schedule.items():
        step = _integer("a step of the schedule", key, 0, _LAST_STEP)
        table[step] = _sparsity(f"the sparsity at step {step}", sparsity)
    return tuple(sorted(table.items()))


def keep_counts(schedule: Any, total: int, *, regrowing: bool = False) -> tuple[tuple[int, int], ...]:
    """Turn a table into (step, number kept) pairs of Python integers, in the order of the steps.

    A sparsity s of ``total`` weights keeps round-half-even(total (1 - s)).

    Args:
      schedule: the table.
      total: the number of prunable weights.
      regrowing: whether the number kept may rise from one entry to the next.

    Raises:
      TypeError: as ``entries``.
      ValueError: as ``entries``; or a keep count exceeds ``total``; or the number kept rises though
        nothing regrows.

    >>> keep_counts({0: 0.5, 10: 3}, total=11)
    ((0, 6), (10, 3))
    """
    counts: list[tuple[int, int]] = []
    for step, sparsity in entries(schedule):
        keep = sparsity if isinstance(sparsity, int) else round(total * (1.0 - sparsity))
        if keep > total:
            raise ValueError(f"the schedule keeps {keep} weights at step {step}; only {total} are prunable")
        if counts and keep > counts[-1][1] and not regrowing:
            raise ValueError(
                f"the schedule keeps {keep} weights at step {step}, more than the {counts[-1][1]} at step "
                f"{counts[-1][0]}; without regrow the number kept must not rise"
            )
        counts.append((step, keep))
    return tuple(counts)


def keep_values(schedule: Any, total: int, *, regrowing: bool = False) -> tuple[tuple[int, float | int], ...]:
    """Turn a table into (step, keep) pairs for a selection: a count as it is, a sparsity s as 1 - s.

    A selection rounds the fraction over its own groups (all weights, or those of each layer).

    Args:
      schedule: the table.
      total: the number of prunable weights.
      regrowing: whether the number kept may rise from one entry to the next.

    Raises:
      TypeError: as ``entries``.
      ValueError: as ``keep_counts``.

    >>> keep_values({0: 0.5, 10: 3}, total=11)
    ((0, 0.5), (10, 3))
    """
    keep_counts(schedule, total, regrowing=regrowing)
    return tuple((step, keep if isinstance(keep, int) else 1.0 - keep) for step, keep in entries(schedule))


def _integer(name: str, value: Any, least: int, most: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; it must be an integer")
    number = int(value)
    if number < least or (most is not None and number > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {number}; it must be {allowed}")
    return number


def _fraction(name: str, value: Any) -> float:
    if isinstance(value, numbers.Integral) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; it must be a float from 0.0 to 1.0")
    number = float(value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} is {number}; it must be from 0.0 to 1.0")
    return number


def _sparsity(name: str, value: Any) -> float | int:
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return _integer(f"{name}, an int and so a keep count,", value, 0)
    return _fraction(name, value)
