"""Time a training step with the jumpstart penalty, against a step without it and against PyTorch with it."""

from collections.abc import Iterator

from benchmarks import steps
from benchmarks.timing import PAIRS, Row, Side, compare, not_run

COEFFICIENT = 1e-3


def rows() -> Iterator[Row]:
    """Time LeNet, a CIFAR network and a thin, deep one; loss, gradient and new weights equal those of torch."""
    yield from of(steps.lenet(), without=1.25, torch=1.0)
    yield from of(steps.conv(), without=1.2, torch=1.0, pairs=7)
    yield from of(steps.dense(), without=2.0, goal=1.5, torch=1 / 8)


def of(
    network: steps.Network, *, without: float, torch: float, goal: float | None = None, pairs: int | None = None
) -> list[Row]:
    """Return two rows for a network.

    Args:
      network: the network to train.
      without: target ratio to our step without the penalty.
      torch: target ratio to torch's step with the penalty.
      goal: desired ratio to our step without the penalty.
      pairs: number of pairs against torch; by default as many as the ratio needs.
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
    """Compare our step with the penalty with the same step without it."""
    return compare(
        _named(network),
        "the same step without it",
        ours,
        alone(network, coefficient=0),
        must=must,
        goal=goal,
        pairs=pairs,
    )


def alone(network: steps.Network, coefficient: float = COEFFICIENT) -> Side:
    """Return our step, not checked against another side."""
    state, step = steps.program(network, coefficient=coefficient)
    return steps.repeated(step, state, *steps.batch(network))


def _named(network: steps.Network) -> str:
    return f"{network.name} step with the penalty, batch {network.batch}"
