"""Time thin, deep networks on moons: all widths and seeds of a depth in a few programs, against one run after another.

The runs are nine widths by three seeds at depth 60, with both penalties (UP), in the convolutional form of the study.
The torch side is a loop over layers; one of its runs is timed for each bucket.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import in_torch
from benchmarks.timing import Row, judge, same, seconds
from experiments.data import tables
from experiments.jumpstart_grid import thin_networks
from experiments.jumpstart_grid.thin_networks import ThinRecipe, ThinRun, ThinState
from experiments.jumpstart_grid.thin_stack import Architecture

BUCKETS = ((1, 2, 3, 4, 5), (10, 15), (20, 25))  # widths that share a program, padded to the last
SEEDS, DEPTH, EPOCHS = 3, 60, 200
RECIPE = ThinRecipe()


class Points(NamedTuple):
    """The study's points: inputs (2, examples) and labels (examples,), the training examples first."""

    inputs: np.ndarray
    labels: np.ndarray
    train: int


def rows() -> list[Row]:
    """Time all runs, including compilation on our side; the final losses of both sides agree."""
    return at(DEPTH, EPOCHS, BUCKETS, SEEDS)


def at(depth: int, epochs: int, buckets: tuple[tuple[int, ...], ...], seeds: int) -> list[Row]:
    """Time all widths in buckets, and as many runs of the largest width alone."""
    splits = tables.moons()
    joined = [np.concatenate(parts) for parts in zip(splits["train"], splits["validation"], strict=True)]
    points = Points(joined[0].T.copy(), joined[1].astype(np.float32), len(splits["train"][1]))
    count = seeds * sum(map(len, buckets))
    widest = max(map(max, buckets))
    mixed = [[ThinRun(width, seed) for width in bucket for seed in range(seeds)] for bucket in buckets]
    equal = [[ThinRun(widest, seed) for seed in range(count)]]
    _check(points, depth, buckets)
    in_torch.use_best_threads(lambda: in_sequence(points, depth, ThinRun(widest, 0), 10), repeats=2)

    def train_all(programs: list[list[ThinRun]]) -> None:
        # Two programs at a time, as in the study: one compiles while another trains.
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda runs: train(points, depth, runs, epochs), programs))

    ours = {
        name: seconds(lambda programs=programs: train_all(programs))
        for name, programs in (("mixed", mixed), ("equal", equal))
    }
    each = {
        width: seconds(lambda width=width: in_sequence(points, depth, ThinRun(width, 0), epochs))
        for width in map(max, buckets)
    }
    weights = [len(bucket) for bucket in buckets]
    peer = float(np.average(list(each.values()), weights=weights))
    form = f"depth {depth}, {epochs} epochs, UP, compile included"
    timed = f"times are per run; torch's are of {len(each)} runs of widths {', '.join(map(str, each))}"
    return [
        judge(
            f"moons, {count} runs of {sum(weights)} widths, {form}",
            "the same runs one after another in torch",
            [ours["mixed"] / count],
            [peer],
            must=1 / 18,
            note=f"{timed}, weighted by the number of widths that each represents",
        ),
        judge(
            f"moons, {count} runs of width {widest}, {form}",
            f"the same runs one after another in torch, width {widest}",
            [ours["equal"] / count],
            [each[widest]],
            must=1 / 10,
            note="times are per run; torch's is of one run",
        ),
    ]


def architecture(points: Points, depth: int, width: int) -> Architecture:
    """Return the architecture with the penalty UP of the study."""
    return Architecture(depth, width, points.train, penalized=("unit", "point"))


def train(points: Points, depth: int, runs: list[ThinRun], epochs: int) -> ThinState:
    """Compile and train runs in one program."""
    arch = architecture(points, depth, max(run.width for run in runs))
    problem = thin_networks.Problem(
        jnp.asarray(points.inputs), jnp.asarray(points.labels), thin_networks.real_channels(arch, runs)
    )
    state = thin_networks.start(arch, RECIPE, runs)
    return jax.block_until_ready(thin_networks.train(arch, RECIPE, epochs, state, problem))


def in_sequence(points: Points, depth: int, run: ThinRun, epochs: int) -> tuple[float, float]:
    """Train one run in a loop over layers; return the cross-entropy and penalty of the last step.

    Layers are the (2, 1) 'same' convolutions of the study over an input of length 2. Training and validation examples
    pass forward together, as on our side.
    """
    arch = architecture(points, depth, run.width)
    kernels, head = (_trainable(array) for array in _start(arch, run))
    biases, head_bias = _trainable([np.zeros(run.width, np.float32)] * depth), torch.zeros(1, requires_grad=True)
    x = torch.from_numpy(points.inputs.T[:, None, :].copy())  # (examples, 1, 2)
    labels, train = torch.from_numpy(points.labels), points.train
    optimizer = torch.optim.Adam(
        [*kernels, *biases, *head, head_bias], lr=RECIPE.learning_rate, eps=RECIPE.adam_epsilon, fused=True
    )
    entropy = penalty = torch.zeros(())
    for _ in range(epochs):
        optimizer.zero_grad()
        a, slacks = x, []
        for kernel, bias in zip(kernels, biases, strict=True):
            z = F.conv1d(F.pad(a, (0, 1)), kernel, bias)
            slacks += _slacks(z[:train], arch.balance)
            a = F.relu(z)
        logits = a.flatten(1) @ head[0] + head_bias
        penalty = torch.cat(slacks).square().sum()
        entropy = F.binary_cross_entropy_with_logits(logits[:train], labels[:train])
        (entropy + arch.coefficient * penalty).backward()
        optimizer.step()
        ((logits > 0) == (labels > 0.5)).float().mean()  # the accuracy that training reports
    return entropy.item(), penalty.item()


def _slacks(z: torch.Tensor, balance: float) -> list[torch.Tensor]:
    """Return the slacks of every (channel, position) over examples and every (example, position) over channels."""
    pairs = [(z.amax(axis), z.amin(axis)) for axis in (0, 1)]
    return [(balance * F.relu(1 - high) + (1 - balance) * F.relu(1 + low)).flatten() for high, low in pairs]


def _start(arch: Architecture, run: ThinRun) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Convert our initial weights to torch's kernels (out, in, 2) and readout (channels * positions,)."""
    state = thin_networks.start(arch, RECIPE, [run])
    found = thin_networks.kernels_alone(arch, state, 0, run)
    kernels = [np.moveaxis(taps, 0, -1) for taps in (found["first"], *found["hidden"])]
    head = np.asarray(state.weights.head[0])
    return kernels, [head.reshape(2, run.width).T.reshape(-1)]  # flattened channel by channel


def _trainable(arrays: list[np.ndarray]) -> list[torch.Tensor]:
    return [torch.tensor(array, requires_grad=True) for array in arrays]


def _check(points: Points, depth: int, buckets: tuple[tuple[int, ...], ...], epochs: int = 5) -> None:
    """Raise unless both sides' losses agree after a few epochs, for the first run of each bucket."""
    for bucket in buckets:
        run = ThinRun(bucket[0], 0)
        last = train(points, depth, [run, ThinRun(bucket[-1], 0)], epochs).last
        entropy, penalty = in_sequence(points, depth, run, epochs)
        same(f"cross-entropy of width {run.width}", last.loss[0], entropy, rtol=1e-3)
        same(f"penalty of width {run.width}", last.penalty[0], penalty, rtol=1e-3)
