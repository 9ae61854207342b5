"""The jumpstart penalty: a training step with it against one without, and against PyTorch's with it."""

from collections.abc import Iterator

from benchmarks import steps
from benchmarks.timing import PAIRS, Row, Side, compare, not_run

COEFFICIENT = 1e-3


def rows() -> Iterator[Row]:
    """LeNet, a CIFAR net and a thin deep one; the loss, its gradient and the new weights equal torch's."""
    yield from of(steps.lenet(), without=1.25, torch=1.0)
    yield from of(steps.conv(), without=1.2, torch=1.0, pairs=7)
    yield from of(steps.dense(), without=2.0, goal=1.5, torch=1 / 8)


def of(
    network: steps.Network, *, without: float, torch: float, goal: float | None = None, pairs: int | None = None
) -> list[Row]:
    """Two rows for a network.

    Args:
      network: what is trained.
      without: what our step with the penalty may cost, in steps without it.
      torch: what it may cost, in steps of torch with it.
      goal: what we would like it to cost, in steps without it.
      pairs: against torch; by default as many as the ratio needs.
    """
    against = "torch eager with the same penalty"
    if not steps.TORCH:
        alone_row = overhead(network, alone(network), must=without, goal=goal, pairs=pairs or PAIRS)
        return [alone_row, not_run(_named(network), against, must=torch, why="PyTorch is not installed")]
    ours, theirs = steps.pair(network, coefficient=COEFFICIENT)
    return [
        overhead(network, ours, must=without, goal=goal, pairs=pairs or PAIRS),
        compare(_named(network), against, ours, theirs, must=torch, pairs=pairs),
    ]


def overhead(network: steps.Network, ours: Side, *, must: float, goal: float | None = None, pairs: int = PAIRS) -> Row:
    """Our step with the penalty against our step without it."""
    return compare(
        _named(network), "our step without it", ours, alone(network, coefficient=0), must=must, goal=goal, pairs=pairs
    )


def alone(network: steps.Network, coefficient: float = COEFFICIENT) -> Side:
    """Our step, not checked against another."""
    state, step = steps.program(network, coefficient=coefficient)
    return steps.repeated(step, state, *steps.batch(network))


def _named(network: steps.Network) -> str:
    return f"{network.name} step with the penalty, batch {network.batch}"
