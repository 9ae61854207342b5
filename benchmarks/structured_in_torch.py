"""Prune the same networks with the same budget by Torch-Pruning (Fang et al. 2023, DepGraph) in PyTorch.

This measures the time to find the groups of channels, and ResNet-20 on Fashion-MNIST: trained in PyTorch, halved by
both libraries from the same weights, and fine-tuned by each in its own framework on the same batches. Accuracy is that
of the first test images, normalized by the statistics of their batch on both sides.
"""

import copy
import os
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
import torch.nn.functional as F
import torch_pruning
from torch import nn

import jprune
from benchmarks import in_torch, structured
from benchmarks.timing import Row, Side, compare, same
from experiments.data import datasets
from jprune.pruning.structured.removal import SmallModel

BATCH, RATE, FINE_RATE = 128, 0.1, 0.02
TEST = 2000
Batches = list[tuple[np.ndarray, np.ndarray]]


def rows(steps: int = 468, fine_tuning: int = 234) -> Iterator[Row]:
    """Time the search for the groups of both networks; the notes have the channels kept and the accuracies.

    Args:
      steps: number of steps of dense training.
      fine_tuning: number of steps after pruning.
    """
    yield compare(
        "groups of ResNet-20 found",
        "Torch-Pruning",
        _traced(structured.resnet(batch=1, shape=(28, 28, 1))),
        _dependencies(in_torch.ResNet(20, 1, 10), torch.zeros(1, 1, 28, 28)),
        must=10.0,
        note=accuracies(steps, fine_tuning),
    )
    block = structured.transformer_block(batch=1)
    yield compare(
        f"groups of a {block.name} found",
        "Torch-Pruning",
        _traced(block),
        _dependencies(TransformerBlock(), torch.zeros(1, 128, 64)),
        must=10.0,
        note=_transformer_kept(),
    )


class RMSNorm(nn.Module):
    """RMS norm of any width; the declared size of ``nn.RMSNorm`` does not follow its weight."""

    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


class TransformerBlock(nn.Module):
    """``structured.transformer_block``."""

    def __init__(self, width: int = 512, heads: int = 8):
        super().__init__()
        linear = lambda inputs, outputs: nn.Linear(inputs, outputs, bias=False)
        self.embed, self.head, self.heads = linear(64, width), linear(width, 64), heads
        self.norm1, self.norm2 = RMSNorm(width), RMSNorm(width)
        self.query, self.key, self.value, self.out = (linear(width, width) for _ in range(4))
        self.gate, self.up, self.down = linear(width, 4 * width), linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        y = self.norm1(x)
        split = lambda z: z.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = F.scaled_dot_product_attention(split(self.query(y)), split(self.key(y)), split(self.value(y)))
        x = x + self.out(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return self.head(x + self.down(F.silu(self.gate(y)) * self.up(y)))


def _traced(model: structured.Model) -> Side:
    return lambda: jprune.trace_model(model.apply, model.params, model.inputs, state=model.state).channels


def _dependencies(net: nn.Module, inputs: torch.Tensor) -> Side:
    def find() -> object:
        graph = torch_pruning.DependencyGraph().build_dependency(net.eval(), example_inputs=inputs)
        return list(graph.get_all_groups(root_module_types=[nn.Conv2d, nn.Linear]))

    return find


def _halved(net: nn.Module, inputs: torch.Tensor, ignored: list[nn.Module]) -> tuple[nn.Module, float]:
    """Prune by mean magnitude in steps of one percent until half of the multiply-adds are left."""
    multiply_adds = lambda: torch_pruning.utils.count_ops_and_params(net, inputs)[0]
    whole = multiply_adds()
    importance = torch_pruning.importance.GroupMagnitudeImportance(p=1)
    pruner = torch_pruning.pruner.BasePruner(
        net, inputs, importance, pruning_ratio=0.99, iterative_steps=99, ignored_layers=ignored
    )
    while multiply_adds() > whole / 2:
        pruner.step()
    return net, multiply_adds() / whole


def _transformer_kept() -> str:
    net, left = _halved(*_with_head_kept(TransformerBlock()))
    small = structured.halved(structured.transformer_block(batch=8))
    before, after = small.table.multiply_adds or (1, 1)
    widths = f"{net.embed.out_features}, {net.query.out_features} and {net.up.out_features}"
    return f"multiply-adds left {after / before:.3f} {_kept(small)}; Torch-Pruning {left:.3f}, widths {widths}"


def _with_head_kept(net: Any) -> tuple[nn.Module, torch.Tensor, list[nn.Module]]:
    net.eval()
    return net, torch.zeros(1, 128, 64), [net.head, net.query, net.key, net.value]  # the number of heads is fixed


def _kept(small: SmallModel) -> str:
    return "(channels " + ", ".join(f"{row.after} of {row.before}" for row in small.table.groups) + ")"


def accuracies(steps: int = 468, fine_tuning: int = 234, *, all_branches: bool = False) -> str:
    """Train ResNet-20, halve it by both libraries, fine-tune, and describe the result.

    Args:
      steps: number of steps of dense training.
      fine_tuning: number of steps after pruning.
      all_branches: whether to also halve it by jprune without removing residual branches, in widths of multiples of 4.
    """
    data = datasets.load("fashion_mnist", data_dir=os.environ.get("JPRUNE_DATA_DIR"))
    torch.manual_seed(0)
    net = in_torch.ResNet(20, 1, 10)
    net.head = nn.Linear(64, 10, bias=False)  # as in ``structured.resnet``
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    batches = list(_batches(data, steps + fine_tuning))
    _train_torch(net, batches[:steps], RATE)
    test = _prepared(data, data.test.images[:TEST]), data.test.labels[:TEST]
    theirs = copy.deepcopy(net).eval()
    # Torch-Pruning cannot follow the channels through the padding of the shortcuts, so the residual stream stays whole.
    stream = [theirs.head, theirs.stem, *(block.conv2 for block in theirs.blocks)]
    theirs, left = _halved(theirs, torch.zeros(1, 1, 28, 28), stream)
    widths = [block.conv1.out_channels for block in theirs.blocks]

    model = _in_jax(net)
    logits, _ = model.apply(model.params, jnp.asarray(test[0][:8]), state=model.state)
    same("logits of the dense network", logits, _logits_torch(net, test[0][:8]), rtol=1e-3, atol=1e-3)
    smaller = {"jprune": structured.halved(model)}
    if all_branches:
        smaller["jprune with all branches"] = structured.halved(model._replace(branches=None), round_to=4)
    shares = []
    for name, small in smaller.items():
        before, after = small.table.multiply_adds or (1, 1)
        cut = _accuracy_jax(small, small.params, test)
        tuned = _accuracy_jax(small, _train_jax(small, batches[steps:], FINE_RATE), test)
        shares.append(f"{name} leaves {after / before:.3f} of the multiply-adds {_kept(small)}, {_after(cut, tuned)}")
    dense, cut = _accuracy_torch(net, test), _accuracy_torch(theirs, test)
    _train_torch(theirs, batches[steps:], FINE_RATE)
    shares.append(
        f"Torch-Pruning leaves {left:.3f}, widths inside the blocks {widths}, "
        f"{_after(cut, _accuracy_torch(theirs, test))}"
    )
    trained = f"Fashion-MNIST, dense accuracy {dense:.3f} after {steps} steps, fine-tuned for {fine_tuning}"
    return f"{trained}: {'; '.join(shares)}"


def _after(cut: float, tuned: float) -> str:
    return f"accuracy {cut:.3f}, after fine-tuning {tuned:.3f}"


def _prepared(data: datasets.Dataset, images: np.ndarray) -> np.ndarray:
    return ((np.asarray(images, np.float32) / 255 - 0.286) / 0.353).reshape(-1, 28, 28, 1)


def _batches(data: datasets.Dataset, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    for _ in range(count):
        rows = rng.integers(0, len(data.train.labels), BATCH)
        yield _prepared(data, np.asarray(data.train.images)[rows]), np.asarray(data.train.labels)[rows]


def _train_torch(net: nn.Module, batches: Batches, rate: float) -> None:
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), rate, momentum=0.9)
    for images, labels in batches:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(_channels_first(images))[0], torch.tensor(labels, dtype=torch.int64))
        loss.backward()
        optimizer.step()


def _accuracy_torch(net: nn.Module, test: tuple[np.ndarray, np.ndarray]) -> float:
    logits = [_logits_torch(net, test[0][i : i + 500]) for i in range(0, len(test[0]), 500)]
    return float((np.concatenate(logits).argmax(1) == test[1]).mean())


def _logits_torch(net: nn.Module, images: np.ndarray) -> np.ndarray:
    """Return the logits with the statistics of this batch."""
    with torch.no_grad():
        return copy.deepcopy(net).train()(_channels_first(images))[0].numpy()


def _channels_first(images: np.ndarray) -> torch.Tensor:
    return torch.tensor(images.transpose(0, 3, 1, 2).copy())


def _in_jax(net: Any) -> structured.Model:
    """Copy the weights of the dense network to ``structured.resnet``."""
    model = structured.resnet(batch=8, shape=(28, 28, 1))
    array = lambda tensor: jnp.asarray(tensor.detach().numpy())

    def layer(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> dict[str, jax.Array]:
        kernel = array(conv.weight).transpose(2, 3, 1, 0)
        return {"kernel": kernel, "scale": array(norm.weight), "bias": array(norm.bias)}

    params = {"stem": layer(net.stem, net.norm), "head": array(net.head.weight).T}
    for i, block in enumerate(net.blocks):
        params[f"block{i}"] = {"one": layer(block.conv1, block.norm1), "two": layer(block.conv2, block.norm2)}
    return model._replace(params=params)


def _train_jax(small: SmallModel, batches: Batches, rate: float) -> Any:
    tx = optax.sgd(rate, momentum=0.9)

    @jax.jit
    def step(params: Any, moments: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss(params: Any) -> jax.Array:
            logits, _ = small.apply(params, images, state=small.state)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        updates, moments = tx.update(jax.grad(loss)(params), moments, params)
        return optax.apply_updates(params, updates), moments

    params, moments = small.params, tx.init(small.params)
    for images, labels in batches:
        params, moments = step(params, moments, images, labels.astype(np.int32))
    return params


def _accuracy_jax(small: SmallModel, params: Any, test: tuple[np.ndarray, np.ndarray]) -> float:
    run: Callable[..., Any] = jax.jit(lambda params, x: small.apply(params, x, state=small.state)[0].argmax(-1))
    found = [run(params, test[0][i : i + 500]) for i in range(0, len(test[0]), 500)]
    return float((np.concatenate(found) == test[1]).mean())
