"""Schedules: dicts ``{step: sparsity}`` that determine when and how much to prune.

A schedule is a plain dict, so every count is known before tracing. Step s means the update called after s earlier ones.
An amount is a sparsity (a float, the fraction of the prunable weights removed), ``jprune.Keep(count)`` (the number of
weights kept), or ``{regex: sparsity}`` for selections that take an amount for each layer.
"""

import functools
import itertools
from collections.abc import Mapping

from jaxtyping import PyTree

from jprune.graph.axes import Axes
from jprune.pruning.amounts import (
    Budget,
    Keep,
    Kept,
    PerLayer,
    amount_by_keyword,
    amount_of,
    checked,
    fraction,
    integer,
)
from jprune.pruning.selection import allocation
from jprune.pruning.selection.layers import mask_layers
from jprune.pruning.selection.unstructured import counts_of_layers, layer_masks
from jprune.trees import with_article

# {int: amount}; numpy's integer and real types are accepted, and ``entries`` checks them.
Schedule = Mapping[int, float | Keep | PerLayer]

# The step counter is an int32 that saturates, so a later step would never be reached.
_LAST_STEP = 2**31 - 2


@amount_by_keyword
def one_shot(
    sparsity: float | PerLayer | None = None, step: int | None = None, *, keep: int | None = None
) -> dict[int, float | Keep | PerLayer]:
    """Return a schedule that prunes once.

    Args:
      sparsity: the fraction of the prunable weights to remove, in [0, 1]; or ``{regex: sparsity}`` for each layer.
      step: the number of updates before the one that prunes.
      keep: the number of weights to keep, instead of ``sparsity``.

    Returns:
      A schedule with one entry.

    Raises:
      TypeError: an argument has the wrong type, or not exactly one of ``sparsity`` and ``keep`` is given.
      ValueError: an argument is out of range.

    >>> one_shot(0.9, step=1000), one_shot(keep=500, step=1000)
    ({1000: 0.9}, {1000: Keep(count=500)})
    """
    if step is None:
        raise TypeError("one_shot needs step=, the number of updates before the one that prunes")
    amount = amount_of(sparsity, keep)
    return dict(entries({step: amount}))


def cubic(sparsity: float, begin: int, end: int, every: int) -> dict[int, float]:
    """Return a schedule whose sparsity increases fast at first and slowly towards the end.

    At step t between ``begin`` and ``end`` the sparsity is s (1 - (1 - (t - begin) / (end - begin))^3),
    with s the final sparsity. The entry at ``end`` is exactly s, even if ``every`` does not
    divide the span.

    Args:
      sparsity: the final fraction of the prunable weights that is removed, in [0, 1].
      begin: the first step of the schedule; its sparsity is 0.
      end: the last step of the schedule.
      every: the number of steps between two entries.

    Returns:
      A schedule with entries at begin, begin + every, ... before ``end``, and at ``end``.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range, or ``end`` is not after ``begin``.

    Source: Zhu & Gupta, "To prune, or not to prune", 2017, arXiv 1710.01878, equation 1 with initial
    sparsity 0.

    >>> cubic(0.8, begin=0, end=10, every=4)
    {0: 0.0, 4: 0.627..., 8: 0.793..., 10: 0.8}
    """
    target = fraction("sparsity", sparsity)
    begin, end, every = integer("begin", begin, 0), integer("end", end, 0), integer("every", every, 1)
    if end <= begin:
        raise ValueError(f"end={end} must come after begin={begin}")
    table: dict[int, float] = {}
    for step in range(begin, end, every):
        left = (end - step) / (end - begin)
        table[step] = target * (1.0 - left * left * left)
    table[end] = target
    entries(table)
    return table


def geometric(rate: float, every: int, times: int) -> dict[int, float]:
    """Return a schedule that repeatedly removes the same fraction of the remaining weights.

    After the k-th pruning the sparsity is 1 - (1 - rate)^k.

    Args:
      rate: the fraction of the remaining weights to remove each time, in [0, 1].
      every: the number of steps before the first pruning and between two prunings.
      times: how many times to prune.

    Returns:
      A schedule with entries at every, 2 every, ..., times every.

    Raises:
      TypeError: an argument has the wrong type.
      ValueError: an argument is out of range.

    Source: Frankle & Carbin, "The Lottery Ticket Hypothesis", 2019, arXiv 1803.03635, section 2, with
    rate 0.2.

    >>> geometric(0.5, every=100, times=3)
    {100: 0.5, 200: 0.75, 300: 0.875}
    """
    rate = fraction("rate", rate)
    every, times = integer("every", every, 1), integer("times", times, 1)
    table = {k * every: 1.0 - (1.0 - rate) ** k for k in range(1, times + 1)}
    entries(table)
    return table


def describe(schedule: Schedule, steps: int) -> str:
    """Return a table of the entries of a schedule that a training run of ``steps`` updates applies.

    An entry at step s is applied by the update that comes after s earlier ones, so ``steps`` updates apply the entries
    before ``steps``.

    Args:
      schedule: ``{step: amount}``.
      steps: number of updates of the training run.

    Returns:
      A table with one line per entry and a last line with the final amount.

    Raises:
      TypeError, ValueError: as ``entries``; ``steps`` is not an integer of 0 or more.

    >>> print(describe(cubic(0.8, begin=0, end=10, every=5), steps=10))
    step  amount           applied
       0  sparsity 0       yes
       5  sparsity 0.7     yes
      10  sparsity 0.8     no: the run has 10 updates, this needs 11
    ends with sparsity 0.7; the schedule's last amount, sparsity 0.8, is not reached
    """
    count = integer("steps", steps, 0)
    table = entries(schedule)
    names = [_amount_name(amount) for _, amount in table]
    wide = max(map(len, ["amount", *names])) + 5
    lines = [f"{'step':>4}  {'amount':<{wide}}applied"]
    for (step, _), name in zip(table, names, strict=True):
        reached = "yes" if step < count else f"no: the run has {count} updates, this needs {step + 1}"
        lines.append(f"{step:>4}  {name:<{wide}}{reached}")
    applied = [name for (step, _), name in zip(table, names, strict=True) if step < count]
    ends = applied[-1] if applied else "all weights"
    lacks = "" if len(applied) == len(table) else f"; the schedule's last amount, {names[-1]}, is not reached"
    falls = [
        f"the amount falls at step {step}: pruned weights come back only with regrow="
        for (_, before), (step, after) in itertools.pairwise(table)
        if _falls(before, after)
    ]
    return "\n".join([*lines, f"ends with {ends}{lacks}", *falls[:1]])


def _falls(before: float | Keep | PerLayer, after: float | Keep | PerLayer) -> bool:
    """Whether the second of two amounts of one kind removes less."""
    if isinstance(before, Keep) and isinstance(after, Keep):
        return after.count > before.count
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        return any(pattern in after and _falls(part, after[pattern]) for pattern, part in before.items())
    return isinstance(before, float) and isinstance(after, float) and after < before


def _amount_name(amount: float | Keep | PerLayer) -> str:
    if isinstance(amount, Keep):
        return f"keep {amount.count}"
    if isinstance(amount, Mapping):
        return ", ".join(f"{pattern or 'others'}: {_amount_name(part)}" for pattern, part in amount.items())
    rounded = f"{amount:.6g}"
    return f"sparsity {amount!r}" if rounded == "1" and amount < 1 else f"sparsity {rounded}"


def entries(schedule: object) -> tuple[tuple[int, float | Keep | PerLayer], ...]:
    """Check a table and return its (step, amount) pairs in the order of the steps.

    Raises:
      TypeError: it is not a mapping from integer steps to amounts.
      ValueError: it is empty, or a step or an amount is out of range.

    >>> entries({200: Keep(1000), 100: 0.5})
    ((100, 0.5), (200, Keep(count=1000)))
    """
    if not isinstance(schedule, Mapping):
        remedy = ""
        if callable(schedule):
            remedy = (
                "; of a function of the step, make one: {step: round(float(schedule(step)), 6) for step in "
                "range(begin, end + 1, every)}"
            )
        raise TypeError(
            f"schedule={schedule!r} is {with_article(schedule)}; it must be a dict {{step: sparsity}}{remedy}"
        )
    if not schedule:
        raise ValueError(
            "schedule is empty; it must have at least one entry {step: sparsity}. To keep the zeros that the "
            "parameters have already, use jprune.keep_zeros()"
        )
    table = {}
    for key, amount in schedule.items():
        step = integer("a step of the schedule", key, 0, _LAST_STEP)
        table[step] = checked(f"schedule[{step}]", amount)
    return tuple(sorted(table.items(), key=lambda entry: entry[0]))


def keep_counts(schedule: object, budget: Budget, *, regrowing: bool = False) -> tuple[tuple[int, int], ...]:
    """Turn a table into (step, number kept) pairs of Python integers, in the order of the steps.

    Args:
      schedule: the table.
      budget: what the amounts count, made by ``budget_of``.
      regrowing: whether the number kept may rise from one entry to the next.

    Raises:
      TypeError: as ``entries``.
      ValueError: as ``entries``; or more would be kept than there is; or the number kept, in total or in a layer, rises
        without regrowth; or an expression of ``{regex: sparsity}`` matches no layer.

    >>> import jax.numpy as jnp
    >>> keep_counts({0: 0.5, 10: Keep(3)}, budget_of(layer_masks, {"kernel": jnp.ones(11)}))
    ((0, 6), (10, 3))
    """
    counts: list[tuple[int, int]] = []
    lowest: dict[str | None, tuple[int, int]] = {}  # the number kept and its step, by layer; None for all together
    for step, amount in entries(schedule):
        if isinstance(amount, Keep) and amount.count > budget.total:
            raise ValueError(
                f"the schedule keeps {amount.count} {budget.unit} at step {step}; there are only {budget.total}"
            )
        kept = budget.kept(amount)
        rising = [name for name, count in kept.layers.items() if count > lowest.get(name, (count, step))[0]]
        # A count of all layers is exact even if some layers have too few weights left: the others keep more.
        of_layers = {} if rising and isinstance(amount, Keep) else kept.layers
        found: list[tuple[str | None, int]] = [*of_layers.items(), (None, kept.total)]
        for name, count in found:
            most, since = lowest.get(name, (count, step))
            if count > most and not regrowing:
                of = "" if name is None else f" of '{name}'"
                raise ValueError(
                    f"the schedule keeps {count} {budget.unit}{of} at step {step}, more than the {most} at step "
                    f"{since}; without regrow the number kept must not rise"
                )
            lowest[name] = (count, step)
        counts.append((step, kept.total))
    return tuple(counts)


def budget_of(selection: object, weights: PyTree, axes: Axes = None, min_keep: int = 0) -> Budget:
    """Return what the amounts of a selection count.

    A selection of channels has a method of this name. The others count weights: ``layer_masks`` determines the number
    of every layer, other selections only the total, except for ``{regex: sparsity}``.

    Args:
      selection: the selection.
      weights: tree of the prunable weights, or of their shapes; None for other leaves.
      axes: roles of the axes of the weights; see ``prune``.
      min_keep: minimum number of weights that every layer keeps.
    """
    own = getattr(selection, "budget_of", None)
    if own is not None:
        found: Budget = own(weights)
        return found
    layers = mask_layers(weights, axes)
    names = layers.names
    by_layer = unwrapped(selection) is layer_masks

    def kept(amount: float | Keep | PerLayer) -> Kept:
        if not isinstance(amount, Mapping) and not by_layer:
            return Kept(allocation.kept(amount, layers.size), {})
        counts = counts_of_layers(layers, amount, min_keep)
        return Kept(sum(counts), dict(zip(names, counts, strict=True)))

    return Budget(layers.size, "weights", kept)


def unwrapped(selection: object) -> object:
    """Return the function that a ``functools.partial`` calls; anything else is returned unchanged."""
    while isinstance(selection, functools.partial):
        selection = selection.func
    return selection
