"""Time networks with half their multiply-adds removed, against the dense ones, forward and in training.

``python -m benchmarks structured`` runs it. Both sides are compiled JAX programs of the same code at different sizes.
The smaller network is first checked against the masked one.
"""

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jprune
from benchmarks.timing import Row, Side, compare, not_run

MUST = 1 / 1.6  # of the dense network's time
ROUND_TO = 8  # on a CPU a convolution of 12 channels takes as long as one of 16


class Model(NamedTuple):
    """A network as a function: ``apply(params, x, state=state)`` returns outputs and the new state.

    ``branches`` is a regex of the groups inside residual branches that lose all of their channels first, None for no
    branch; the other groups then lose the same share.
    """

    name: str
    apply: Callable[..., tuple[jax.Array, Any]]
    params: Any
    state: Any
    inputs: jax.Array
    branches: str | None = None


def rows() -> Iterator[Row]:
    """Time ResNet-20 on CIFAR images and a transformer block with 50% of their multiply-adds, and Torch-Pruning."""
    for model in (resnet(), transformer_block()):
        yield from of_model(model)
    if any(importlib.util.find_spec(name) is None for name in ("torch", "torch_pruning")):
        why = "PyTorch and Torch-Pruning are not installed"
        yield not_run("groups of ResNet-20 found", "Torch-Pruning", must=1.0, why=why)
    else:
        yield from importlib.import_module("benchmarks.structured_in_torch").rows()


def of_model(model: Model) -> list[Row]:
    """Time the forward pass and training step of one network, pruned and dense."""
    small = halved(model)
    dense = (model.apply, model.params, model.state)
    pruned = (small.apply, small.params, small.state)
    before, after = small.table.multiply_adds or (0, 0)
    note = f"{before:,} and {after:,} multiply-adds; widths are multiples of {ROUND_TO}, the same share of every group"
    note += f", but all of {model.branches}" if model.branches else ""
    return [
        compare(
            f"{model.name}, {what}, batch {model.inputs.shape[0]}, half the multiply-adds",
            "dense",
            side(*pruned, model.inputs),
            side(*dense, model.inputs),
            must=MUST,
            note=note,
        )
        for what, side in (("forward", _forward), ("training step", _step))
    ]


def halved(model: Model, round_to: int = ROUND_TO) -> Any:
    """Return the smaller network by magnitude, checked against the masked one."""
    graph = jprune.trace_model(model.apply, model.params, model.inputs, state=model.state)
    scores = jax.tree.map(jnp.abs, model.params)
    select = functools.partial(jprune.channel_group_masks, graph, scores)
    masks, floors = None, None
    if model.branches is not None:
        floors = {model.branches: 0}
        masks = select(sparsity={model.branches: 1.0}, min_channels=floors)
    masks = select(multiply_adds=0.5, round_to=round_to, per_group=True, min_channels=floors or 1, among=masks)
    return jprune.remove_channels(graph, model.params, masks, state=model.state, check=model.inputs[:8])


def resnet(blocks: int = 3, batch: int = 128, shape: tuple[int, int, int] = (32, 32, 3)) -> Model:
    """Return ResNet-20 for CIFAR in training mode: He et al. 2016, shortcuts of option A, batch normalization."""
    rng = np.random.default_rng(0)

    def layer(inputs: int, outputs: int) -> dict[str, jax.Array]:
        kernel = rng.normal(size=(3, 3, inputs, outputs)) * np.sqrt(2 / (9 * inputs))
        return {"kernel": jnp.asarray(kernel, jnp.float32), "scale": jnp.ones(outputs), "bias": jnp.zeros(outputs)}

    widths = [width for width in (16, 32, 64) for _ in range(blocks)]
    params: dict[str, Any] = {
        "stem": layer(shape[2], 16),
        "head": jnp.asarray(rng.normal(size=(64, 10)) / 8, jnp.float32),
    }
    for i, (inputs, outputs) in enumerate(zip([16, *widths], widths, strict=False)):
        params[f"block{i}"] = {"one": layer(inputs, outputs), "two": layer(outputs, outputs)}
    statistics = lambda p: {"mean": jnp.zeros_like(p["bias"]), "var": jnp.ones_like(p["bias"])}
    state = {"stem": statistics(params["stem"])}
    for i in range(len(widths)):
        state[f"block{i}"] = {half: statistics(params[f"block{i}"][half]) for half in ("one", "two")}

    def normalized(p: Any, s: Any, x: jax.Array, stride: int = 1) -> tuple[jax.Array, Any]:
        dimensions, pads = ("NHWC", "HWIO", "NHWC"), ((1, 1), (1, 1))  # "SAME" shifts strided ones by a pixel
        x = jax.lax.conv_general_dilated(x, p["kernel"], (stride, stride), pads, dimension_numbers=dimensions)
        mean, var = jnp.mean(x, axis=(0, 1, 2)), jnp.var(x, axis=(0, 1, 2))
        new = {"mean": 0.9 * s["mean"] + 0.1 * mean, "var": 0.9 * s["var"] + 0.1 * var}
        return (x - mean) * jax.lax.rsqrt(var + 1e-5) * p["scale"] + p["bias"], new

    def apply(p: Any, x: jax.Array, *, state: Any) -> tuple[jax.Array, Any]:
        new: dict[str, Any] = {}
        x, new["stem"] = normalized(p["stem"], state["stem"], x)
        x, before = jax.nn.relu(x), 16
        for i, width in enumerate(widths):
            block, s = p[f"block{i}"], state[f"block{i}"]
            stride, more = width // before, width - before
            y, one = normalized(block["one"], s["one"], x, stride)
            y, two = normalized(block["two"], s["two"], jax.nn.relu(y))
            x = jnp.pad(x[:, ::stride, ::stride], ((0, 0), (0, 0), (0, 0), (more // 2, more // 2)))
            x, before, new[f"block{i}"] = jax.nn.relu(x + y), width, {"one": one, "two": two}
        return jnp.mean(x, axis=(1, 2)) @ p["head"], new

    images = jnp.asarray(rng.normal(size=(batch, *shape)), jnp.float32)
    # The first stage takes half the time and a third of the multiply-adds, so all its blocks but the first lose their
    # branches. Removing channels of its convolutions saves less: with 16 or fewer, copying patches takes the time.
    branches = rf"^block({'|'.join(map(str, range(1, blocks)))})/one/kernel\[3\]$"
    return Model(f"ResNet-{6 * blocks + 2}", apply, params, state, images, branches)


def transformer_block(batch: int = 8, length: int = 128, width: int = 512, heads: int = 8) -> Model:
    """Return a block with RMS norm, attention and SwiGLU, between two projections that keep their outer widths."""
    rng = np.random.default_rng(0)
    hidden, size = 4 * width, width // heads
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape) / np.sqrt(width), jnp.float32)
    params = {"norm1": jnp.ones(width), "norm2": jnp.ones(width), "embed": draw(64, width), "head": draw(width, 64)}
    params |= {name: draw(width, heads, size) for name in ("query", "key", "value")} | {"out": draw(heads, size, width)}
    params |= {"gate": draw(width, hidden), "up": draw(width, hidden), "down": draw(hidden, width)}

    def norm(scale: jax.Array, x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale

    def apply(p: Any, x: jax.Array, *, state: Any) -> tuple[jax.Array, Any]:
        x = x @ p["embed"]
        y = norm(p["norm1"], x)
        q, k, v = (jnp.einsum("bld,dhk->blhk", y, p[name]) for name in ("query", "key", "value"))
        attention = jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k) / np.float32(np.sqrt(size)))
        x = x + jnp.einsum("blhk,hkd->bld", jnp.einsum("bhqs,bshk->bqhk", attention, v), p["out"])
        y = norm(p["norm2"], x)
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return x @ p["head"], state

    inputs = jnp.asarray(rng.normal(size=(batch, length, 64)), jnp.float32)
    return Model(f"transformer block, width {width}", apply, params, {}, inputs)


def _forward(apply: Callable[..., Any], params: Any, state: Any, inputs: jax.Array) -> Side:
    run = jax.jit(lambda params, state, x: apply(params, x, state=state)[0])
    return lambda: jax.block_until_ready(run(params, state, inputs))


def _step(apply: Callable[..., Any], params: Any, state: Any, inputs: jax.Array) -> Side:
    tx = optax.sgd(1e-3, momentum=0.9)

    @jax.jit
    def step(params: Any, state: Any, moments: Any) -> Any:
        def loss(params: Any) -> tuple[jax.Array, Any]:
            outputs, new = apply(params, inputs, state=state)
            return jnp.mean(outputs**2), new

        grads, new = jax.grad(loss, has_aux=True)(params)
        updates, moments = tx.update(grads, moments, params)
        return optax.apply_updates(params, updates), new, moments

    carry = (params, state, tx.init(params))

    def side() -> object:
        nonlocal carry
        carry = jax.block_until_ready(step(*carry))
        return carry

    return side
