"""The same networks, penalty and steps in plain eager PyTorch, from the same weights.

Attributes of a module have the names of its twin in ``experiments.models.networks``, so that ``load`` can copy the
twin's parameters; images are channels-first, as in torch.
"""

import itertools
import os
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.recipe import LEARNING_RATE, MOMENTUM, WEIGHT_DECAY
from benchmarks.timing import seconds

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Dense(nn.Module):
    """``experiments.models.networks.MLP``."""

    def __init__(self, inputs: int, classes: int, features: Sequence[int]):
        super().__init__()
        sizes = [inputs, *features]
        self.hidden = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(sizes))
        self.head = nn.Linear(sizes[-1], classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x, preactivations = x.flatten(1), []
        for layer in self.hidden:
            z = layer(x)
            preactivations.append(z)
            x = F.relu(z)
        return self.head(x), preactivations


class LeNet(nn.Module):
    """``experiments.models.networks.LeNet``."""

    def __init__(self, shape: tuple[int, int, int], classes: int):
        super().__init__()
        height, width = (((n - 2) // 2 - 2) // 2 for n in shape[:2])
        self.conv1, self.conv2 = nn.Conv2d(shape[2], 6, 3), nn.Conv2d(6, 16, 3)
        self.dense1, self.dense2 = nn.Linear(16 * height * width, 120), nn.Linear(120, 84)
        self.head = nn.Linear(84, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        preactivations = []
        for conv in (self.conv1, self.conv2):
            z = conv(x)
            preactivations.append(z)
            x = F.max_pool2d(F.relu(z), 2)
        x = x.flatten(1)
        for dense in (self.dense1, self.dense2):
            z = dense(x)
            preactivations.append(z)
            x = F.relu(z)
        return self.head(x), preactivations


class Conv(nn.Module):
    """``experiments.models.networks.RectangularConv`` with its average and maximum readout."""

    def __init__(self, channels: int, classes: int, depth: int, width: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(channels if i == 0 else width, width, 3, padding=1) for i in range(depth))
        self.head = nn.Linear(2 * width, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        preactivations = []
        for conv in self.convs:
            z = conv(x)
            preactivations.append(z)
            x = F.relu(z)
        return self.head(torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)), preactivations


class Block(nn.Module):
    """``experiments.models.networks.Block``."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.stride, self.more = stride, outputs - inputs

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        if self.more:
            x = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.more // 2, self.more - self.more // 2))
        return F.relu(x + y)


class ResNet(nn.Module):
    """``experiments.models.networks.ResNet``."""

    def __init__(self, depth: int, channels: int, classes: int):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(channels, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.blocks, inputs = nn.ModuleList(), 16
        for outputs in (16, 32, 64):
            for _ in range(depth // 6):
                self.blocks.append(Block(inputs, outputs, outputs // inputs))
                inputs = outputs
        self.head = nn.Linear(64, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        x = F.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3))), []


def load(module: nn.Module, params: Mapping[str, np.ndarray], flattened: tuple[int, int, int] | None = None) -> None:
    """Copy the parameters of the twin.

    Args:
      module: module whose parameters are all set.
      params: parameters of the twin, by '/'-joined path.
      flattened: (height, width, channels) that the twin flattens before ``dense1``, channels last.
    """
    state, left = module.state_dict(), {name for name, _ in module.named_parameters()}
    for path, given in params.items():
        layer, _, kind = path.rpartition("/")
        value = np.asarray(given)
        if kind == "kernel" and value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif kind == "kernel":
            if flattened is not None and layer == "dense1":
                value = value.reshape(*flattened, -1).transpose(2, 0, 1, 3).reshape(value.shape)
            value = value.T
        name = f"{layer.replace('/', '.')}.{'weight' if kind in ('kernel', 'scale') else 'bias'}"
        if state[name].shape != value.shape:
            raise ValueError(f"{path} has shape {value.shape} and {name} {tuple(state[name].shape)}")
        state[name] = torch.tensor(value.copy())
        left -= {name}
    if left:
        raise ValueError(f"no parameters for {sorted(left)}")
    module.load_state_dict(state)


def penalty(preactivations: Sequence[torch.Tensor], balance: float = 0.5) -> torch.Tensor:
    """``jprune.jumpstart_penalty`` with its defaults: balanced, ties averaged, pooled over space."""
    units, points = [], []
    for given in preactivations:
        z = given.flatten(2) if given.ndim == 4 else given[..., None]
        for slacks, axes in ((units, (0, 2)), (points, (1, 2))):
            positive, negative = F.relu(1 - z.amax(axes)), F.relu(1 + z.amin(axes))
            slacks.append(balance * positive + (1 - balance) * negative)
    return torch.cat(units).mean() + torch.cat(points).mean()


def stepper(
    module: nn.Module, images: np.ndarray, labels: np.ndarray, *, coefficient: float = 0.0, compiled: bool = False
) -> Callable[[], float]:
    """Return an SGD step that is repeated on the same batch, in usual torch style.

    Args:
      module: module that is trained in place.
      images: channels last, or (batch, features).
      labels: (batch,).
      coefficient: coefficient of the jumpstart penalty; 0 leaves it out.
      compiled: whether forward and backward pass go through ``torch.compile``.

    Returns:
      A function that takes a step and returns the loss before it, including the penalty.
    """
    x = torch.from_numpy(np.ascontiguousarray(np.moveaxis(images, -1, 1) if images.ndim == 4 else images))
    y = torch.from_numpy(labels.astype(np.int64))
    optimizer = torch.optim.SGD(
        module.parameters(), lr=LEARNING_RATE, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY, fused=True
    )

    def objective(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        logits, preactivations = module(x)
        entropy = F.cross_entropy(logits, y)
        return entropy + coefficient * penalty(preactivations) if coefficient else entropy

    compute: Loss = torch.compile(objective) if compiled else objective

    def step() -> float:
        optimizer.zero_grad()
        loss = compute(x, y)
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def use_best_threads(side: Callable[[], object], repeats: int = 5) -> int:
    """Set torch to the number of threads with which a side is fastest, by the best of several calls."""
    most = os.cpu_count() or 1
    taken = {}
    for threads in sorted({1, 2, most // 2, most} - {0}):
        if threads > most:
            continue
        torch.set_num_threads(threads)
        side()
        taken[threads] = min(seconds(side) for _ in range(repeats))
    best = min(taken, key=lambda threads: taken[threads])
    torch.set_num_threads(best)
    return best
