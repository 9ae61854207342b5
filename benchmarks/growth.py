"""Measure how cost grows with size: one figure and one CSV file per curve, with the expected order of growth as a line.

`python -m benchmarks growth` draws all curves; `--largest N` ends the curve of the selection at N scores, `--curve
NAME` draws only one. Together they take longer than all other benchmarks, so `make bench` does not run them.
"""

import csv
import pathlib
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jprune
from benchmarks import audit, networks, steps
from benchmarks.timing import LONG, seconds
from jprune import recall

Point = tuple[float, float]


class Curve(NamedTuple):
    """One figure.

    Attributes:
      name: name of the files.
      title: title of the figure.
      x: label of the x axis, with its unit.
      y: label of the y axis, with its unit.
      series: the measured points, by name.
      expected: 'constant', 'linear', or 'linear with a start' for a cost with an offset.
    """

    name: str
    title: str
    x: str
    y: str
    series: dict[str, list[Point]]
    expected: Literal["constant", "linear", "linear with a start"]


CURVES: dict[str, Callable[[int], Sequence[Curve]]] = {
    "selection": lambda largest: selection(_powers(10**5, largest)),
    "step": lambda _: [step(steps.lenet(), (1, 2, 4, 8, 16, 32))],
    "depth": lambda _: [compile_by_depth((10, 25, 50, 100, 200))],
    "leaves": lambda _: [compile_by_leaves((10, 30, 100, 300, 1000, 2000))],
    "audit": lambda _: audits((10, 30, 100, 300, 1000), (2, 5, 10, 20, 40), examples=20_000),
}


def draw(folder: pathlib.Path, largest: int, names: Sequence[str] = ()) -> None:
    """Measure the named curves, or all, and write a CSV and a PNG for each."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names or CURVES:
        for curve in CURVES[name](largest):
            write(curve, folder)
            print(f"{curve.title}: {folder / curve.name}.png", flush=True)


def selection(sizes: Sequence[int]) -> list[Curve]:
    """Measure time and memory of the exact global selection that keeps half of the scores."""
    time, memory = [], []
    choose = jax.jit(lambda x: jprune.global_masks({"kernel": x}, keep=x.size // 2)["kernel"])
    for n in sizes:
        scores = jax.random.normal(jax.random.key(0), (n,))
        compiled = choose.lower(scores).compile()
        time.append((n, _least(lambda c=compiled, x=scores: c(x).block_until_ready())))
        memory.append((n, max(1, compiled.memory_analysis().temp_size_in_bytes) / 2**20))
        del scores
    scores_themselves = [(n, 4 * n / 2**20) for n in sizes]
    return [
        Curve("selection_time", "Exact global selection", "scores", "seconds", {"selection": time}, "linear"),
        Curve(
            "selection_memory",
            "Memory of the selection without scores and masks",
            "scores",
            "MiB",
            {"the compiled program's own": memory, "the scores": scores_themselves},
            "linear",
        ),
    ]


def step(network: steps.Network, counts: Sequence[int]) -> Curve:
    """Measure the time of a training step of many replicates in one program, by form."""
    series: dict[str, list[Point]] = {"vmap": [], "map": []}
    for count in counts:
        for form, points in series.items():
            _, side = networks.replicated(network, count, forms=(form,))
            points.append((count, _least(side) / networks.STEPS))
    title = f"{network.name} step of many replicates, batch {network.batch}"
    return Curve("step_by_replicates", title, "replicates", "seconds a step", series, "linear")


def compile_by_depth(depths: Sequence[int]) -> Curve:
    """Measure the time to compile a training step of a dense network with scanned layers, with and without penalty."""
    series: dict[str, list[Point]] = {"without penalty": [], "with penalty": []}
    for depth in depths:
        network = steps.dense(depth)
        for points, coefficient in zip(series.values(), (0.0, 1e-3), strict=True):
            state, train = steps.program(network, coefficient=coefficient)
            points.append((depth, _compile_seconds(train, state, *steps.batch(network))))
    title = "Compiling the step of a scanned dense net"
    return Curve("compile_by_depth", title, "layers", "seconds", series, "constant")


def compile_by_leaves(counts: Sequence[int]) -> Curve:
    """Measure the time to compile an optimizer update, against the number of leaves in the tree."""
    series: dict[str, list[Point]] = {"with prune": [], "without": []}
    for count in counts:
        params = {f"layer{i}": {"kernel": jnp.ones((16, 16))} for i in range(count)}
        schedule = jprune.cubic(0.9, begin=100, end=1000, every=100)
        for points, links in zip(series.values(), ([jprune.prune(jprune.magnitude(), schedule)], []), strict=True):
            tx = steps.chain(*links)
            state = tx.init(params)
            points.append((count, _compile_seconds(tx.update, params, state, params)))
    return Curve(
        "compile_by_leaves", "Compiling an optimizer update", "leaves", "seconds", series, "linear with a start"
    )


def audits(classes: Sequence[int], models: Sequence[int], *, examples: int) -> list[Curve]:
    """Measure the time of an audit without resampling, against classes and against models."""

    def cost(count: int, of_models: int) -> float:
        made = audit.made_up(count, models=of_models, examples=examples)
        return _least(lambda: recall.audit(made.labels, made.dense, made.pruned, num_classes=count))

    return [
        Curve(
            "audit_by_classes",
            f"Audit of 10 models, 5 ratios, {examples:,} examples",
            "classes",
            "seconds",
            {"audit": [(count, cost(count, 10)) for count in classes]},
            "linear with a start",
        ),
        Curve(
            "audit_by_models",
            f"Audit of 5 ratios, 100 classes, {examples:,} examples",
            "models",
            "seconds",
            {"audit": [(count, cost(100, count)) for count in models]},
            "linear with a start",
        ),
    ]


def write(curve: Curve, folder: pathlib.Path) -> None:
    """Write the points as CSV and draw them, with the line of the expected order through the last point."""
    import matplotlib  # noqa: PLC0415 (only this benchmark draws)

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt  # noqa: PLC0415

    with (folder / f"{curve.name}.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["series", curve.x, curve.y])
        writer.writerows([name, x, y] for name, points in curve.series.items() for x, y in points)
    figure, axes = plt.subplots(figsize=(5.2, 3.6), layout="constrained")
    for name, points in curve.series.items():
        axes.loglog(*zip(*points, strict=True), marker="o", label=name)
    x, y = np.array(next(iter(curve.series.values()))).T
    axes.loglog(x, _line(curve.expected, x, y), "--", color="0.5", label=f"expected: {curve.expected}")
    if x[-1] / x[0] < 100:  # no room for the tick labels of decades
        axes.set_xticks(x, [f"{count:g}" for count in x], minor=False)
        axes.set_xticks([], minor=True)
    axes.set(title=curve.title, xlabel=curve.x, ylabel=curve.y)
    axes.grid(True, which="major", alpha=0.3)
    axes.legend()
    figure.savefig(folder / f"{curve.name}.png", dpi=150, metadata={"Software": None})
    plt.close(figure)


def _line(expected: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the expected line through the last point, and also through the first one if there is an offset."""
    if expected == "constant":
        return np.full(len(x), y[-1])
    slope = (y[-1] - y[0]) / (x[-1] - x[0]) if expected == "linear with a start" else y[-1] / x[-1]
    return y[-1] + slope * (x - x[-1])


def _powers(first: int, last: int) -> list[int]:
    """Return 1, 3, 10, 30, ... times the first, up to the last."""
    sizes = [first * 10**i * factor for i in range(12) for factor in (1, 3)]
    return [n for n in sizes if n <= last]


def _least(side: Callable[[], object], repeats: int = 5) -> float:
    """Return the shortest time of several calls after the first, or of one long call."""
    once = (side(), seconds(side))[1]
    return once if once > LONG else min(once, *(seconds(side) for _ in range(repeats)))


def _compile_seconds(function: Callable[..., object], *args: object) -> float:
    """Return the time to trace, lower and compile, without caches."""
    jax.clear_caches()
    return seconds(lambda: jax.jit(function).lower(*args).compile())
