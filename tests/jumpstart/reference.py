"""Reference for the tests: the penalty and its gradient in plain float64 loops.

It shares no code with the library. Every unit, point or layer is a list of cells, visited in the order in which the
rule 'single' prefers them.
"""

import itertools
from collections.abc import Iterator

import numpy as np

HINGES = {
    "full": {"unit": "+-", "point": "+-"},
    "unit": {"unit": "+-"},
    "point": {"point": "+-"},
    "layer": {"layer": "+-"},
    "unit_positive": {"unit": "+"},
    "point_positive": {"point": "+"},
    "positive": {"unit": "+", "point": "+"},
    "all_but_unit_positive": {"unit": "-", "point": "+-"},
    "all_but_unit_negative": {"unit": "+", "point": "+-"},
    "all_but_point_positive": {"unit": "+-", "point": "-"},
    "all_but_point_negative": {"unit": "+-", "point": "+"},
}
AGGREGATES = ("balanced", "norm", "mean", "sum", "sum_squares")
PRESETS = {
    "cpaior_keras": {"aggregate": "sum_squares", "ties": "average", "spatial": "none"},
    "cpaior_torch": {"aggregate": "norm", "ties": "single", "spatial": "pool"},
    "ieee": {"aggregate": "balanced", "ties": "single", "spatial": "pool"},
}

Cell = tuple[int, ...]


def penalty(
    layers: list[np.ndarray],
    *,
    mode: str = "full",
    aggregate: str = "balanced",
    balance: float = 0.5,
    margin: tuple[float, float] = (1.0, 1.0),
    ties: str = "average",
    spatial: str = "pool",
    positions: np.ndarray | None = None,
) -> tuple[float, list[np.ndarray]]:
    """The penalty and its gradient with respect to every layer; ``positions`` are real (batch, first axis of space)."""
    slacks: dict[str, list[float]] = {axis: [] for axis in HINGES[mode]}
    slopes: dict[str, list[list[tuple[int, Cell, float]]]] = {axis: [] for axis in HINGES[mode]}
    for axis, signs in HINGES[mode].items():
        for number, z in enumerate(layers):
            for cells in _groups(z, axis, spatial):
                real = [cell for cell in cells if positions is None or _is_real(cell, positions)]
                if not real:
                    continue
                value, slope = _slack(z, real, signs, balance=balance, margin=margin, ties=ties)
                slacks[axis].append(value)
                slopes[axis].append([(number, cell, share) for cell, share in slope])
    total, weights = _aggregated(slacks, aggregate)
    gradients = [np.zeros(z.shape) for z in layers]
    for axis, of_axis in slopes.items():
        for weight, slope in zip(weights[axis], of_axis, strict=True):
            for number, cell, share in slope:
                gradients[number][cell] += weight * share
    return total, gradients


def _groups(z: np.ndarray, axis: str, spatial: str) -> Iterator[list[Cell]]:
    """The cells of each unit, point or layer, in the order that 'single' prefers."""
    batch, *space, units = map(range, z.shape)
    places = list(itertools.product(*space))
    if axis == "layer":
        yield list(np.ndindex(z.shape))
    for outer in [places] if spatial == "pool" else [[place] for place in places]:
        if axis == "unit":
            for c in units:
                yield [(b, *place, c) for place in outer for b in batch]
        elif axis == "point":
            for b in batch:
                yield [(b, *place, c) for place in outer for c in units]


def _is_real(cell: Cell, positions: np.ndarray) -> bool:
    return bool(positions[cell[:2]] if len(cell) > 2 else positions[cell[0]].any())


def _slack(z, cells, signs, *, balance, margin, ties):
    """The slack of one group and its derivative at each of its cells."""
    values = [float(z[cell]) for cell in cells]
    slack, slope = 0.0, []
    if "+" in signs:
        hinge = margin[0] - max(values)
        if hinge > 0:
            slack += balance * hinge
            slope += _shared(cells, values, max(values), -balance, ties)
    if "-" in signs:
        hinge = margin[1] + min(values)
        if hinge > 0:
            slack += (1 - balance) * hinge
            slope += _shared(cells, values, min(values), 1 - balance, ties)
    return slack, slope


def _shared(cells, values, extreme, amount, ties):
    tied = [cell for cell, value in zip(cells, values, strict=True) if value == extreme]
    tied = tied[:1] if ties == "single" else tied
    return [(cell, amount / len(tied)) for cell in tied]


def _aggregated(slacks, aggregate):
    """The aggregate of the slacks by axis, and its derivative by each of them."""
    everything = [slack for of_axis in slacks.values() for slack in of_axis]
    norm = sum(slack**2 for slack in everything) ** 0.5
    if aggregate == "balanced":
        total = sum(sum(of_axis) / len(of_axis) for of_axis in slacks.values())
        return total, {axis: [1 / len(of_axis)] * len(of_axis) for axis, of_axis in slacks.items()}
    total, derivative = {
        "mean": (sum(everything) / len(everything), lambda slack: 1 / len(everything)),
        "sum": (sum(everything), lambda slack: 1.0),
        "norm": (norm, lambda slack: slack / norm if norm else 0.0),
        "sum_squares": (norm**2, lambda slack: 2 * slack),
    }[aggregate]
    return total, {axis: [derivative(slack) for slack in of_axis] for axis, of_axis in slacks.items()}
