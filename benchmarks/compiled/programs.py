"""The programs that are compiled, and a lower bound of the bytes that each must move."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import jprune
from benchmarks.compiled.devices import Target, mesh, on_one, sharded

PyTree = Any
NEVER = {2**30: 0.5}  # a schedule whose selection is compiled in and not due
FLOAT, MASK = 4, 1  # bytes


class Case(NamedTuple):
    """A program to compile for a target.

    Attributes:
      name: name in the table.
      function: function to compile.
      arguments: described arrays.
      donated: arguments that the program may overwrite.
      floor: lower bound of the bytes that a device must move.
    """

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    donated: tuple[int, ...]
    floor: int


def selection(
    target: Target,
    shape: tuple[int, ...] = (25_000, 4_000),
    dtype: Any = jnp.float32,
    spec: tuple[str | tuple[str, ...] | None, ...] = ("x", "y"),
) -> Case:
    """Return a global selection of a tenth of the scores; it must read them once and write the masks."""
    size = math.prod(shape)
    if len(target.devices) == 1:
        scores = on_one(target, {"kernel": jax.ShapeDtypeStruct(shape, dtype)})
    else:
        over = mesh(target, 2, len(target.devices) // 2)
        scores = {"kernel": sharded(shape, dtype, over, *spec)}
    select = functools.partial(jprune.global_masks, keep=size // 10)
    floor = size * (jnp.dtype(dtype).itemsize + MASK) // len(target.devices)
    return Case(f"selection, {size:.0e} {jnp.dtype(dtype).name}", select, (scores,), (), floor)


def dense_step(target: Target, link: str, *, replicates: int = 0) -> Case:
    """Return a LeNet-300-100 training step: plain, with ``keep_zeros``, or with ``prune`` and nothing due."""
    links = {
        "plain": [],
        "keep_zeros": [jprune.keep_zeros()],
        "prune": [jprune.prune(jprune.magnitude(), NEVER)],
    }[link]
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.01, 0.9, nesterov=True), *links)

    def init(key: jax.Array) -> PyTree:
        sizes = ((784, 300), (300, 100), (100, 10))
        draw = lambda key, size: {"kernel": jax.random.normal(key, size) / 30, "bias": jnp.zeros(size[1])}
        params = {f"dense{i}": draw(k, s) for i, (k, s) in enumerate(zip(jax.random.split(key, 3), sizes, strict=True))}
        return params, tx.init(params)

    def loss(params: PyTree, images: jax.Array, labels: jax.Array) -> jax.Array:
        x = images
        for i in range(3):
            x = (x if i == 0 else jax.nn.relu(x)) @ params[f"dense{i}"]["kernel"] + params[f"dense{i}"]["bias"][None]
        return optax.softmax_cross_entropy_with_integer_labels(x, labels).mean()

    def step(params: PyTree, state: PyTree, images: jax.Array, labels: jax.Array) -> tuple[PyTree, PyTree]:
        grads = jax.grad(loss)(params, images, labels)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    name = f"LeNet-300-100 step, {link}"
    run, start = step, init
    if replicates:
        name += f", {replicates} replicates"
        run = jax.vmap(step, in_axes=(0, 0, None, None))
        start = lambda key: jax.vmap(init)(jax.random.split(key, replicates))
    params, state = jax.eval_shape(start, jax.random.key(0))
    batch = (jax.ShapeDtypeStruct((128, 784), jnp.float32), jax.ShapeDtypeStruct((128,), jnp.int32))
    weights = 266_610 * max(replicates, 1)
    floor = 5 * FLOAT * weights + (0 if link == "plain" else MASK * weights)  # weight, momentum and gradient
    return Case(name, run, on_one(target, (params, state, *batch)), (0, 1), floor)


def decoder_sizes(layers: int = 20, width: int = 2048, vocabulary: int = 32_768) -> dict[str, tuple[int, ...]]:
    """Return the kernels of a decoder of 1.07e9 parameters with stacked layers."""
    return {
        "embedding": (vocabulary, width),
        "attention_in": (layers, width, 3 * width),
        "attention_out": (layers, width, width),
        "mlp_in": (layers, width, 4 * width),
        "mlp_out": (layers, 4 * width, width),
    }


def decoder(target: Target, what: str) -> Case:
    """Return the selection, or the training step with ``prune``, of a decoder that is sharded over all devices."""
    rows = {256: 16, 16: 4}[len(target.devices)]
    over = mesh(target, rows, len(target.devices) // rows)
    specs = {"embedding": ("x", "y"), "attention_in": (None, "x", "y"), "mlp_in": (None, "x", "y")}
    specs |= {"attention_out": (None, "y", "x"), "mlp_out": (None, "y", "x")}
    shapes = decoder_sizes()
    params = {name: sharded(shape, jnp.float32, over, *specs[name]) for name, shape in shapes.items()}
    size = sum(map(math.prod, shapes.values()))
    share = size // len(target.devices)
    if what == "selection":
        select = functools.partial(jprune.global_masks, keep=size // 10)
        return Case(f"selection, decoder of {size:.1e}", select, (params,), (), share * (FLOAT + MASK))
    # Select every float leaf, because the kernels have other names here.
    tx = optax.chain(optax.adam(1e-4), jprune.prune(jprune.magnitude(), NEVER, where=lambda path, leaf: True))
    shapes_of_state = jax.eval_shape(tx.init, params)
    state = jax.tree.map(
        lambda leaf: sharded(leaf.shape, leaf.dtype, over, *_spec(leaf.shape, shapes, specs)), shapes_of_state
    )
    tokens = sharded((len(target.devices), 1024), jnp.int32, over, ("x", "y"), None)

    def step(params: PyTree, state: PyTree, tokens: jax.Array) -> tuple[PyTree, PyTree]:
        grads = jax.grad(_decoder_loss)(params, tokens)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    floor = share * (7 * FLOAT + MASK)  # weight and two moments read and written, the gradient read, the mask read
    return Case(f"training step, decoder of {size:.1e}", step, (params, state, tokens), (0, 1), floor)


def _spec(shape: tuple[int, ...], shapes: dict[str, tuple[int, ...]], specs: dict[str, tuple[Any, ...]]) -> Any:
    return next((specs[name] for name, own in shapes.items() if own == shape), ())


def _decoder_loss(params: PyTree, tokens: jax.Array, heads: int = 16) -> jax.Array:
    """Compute the next-token cross-entropy of a decoder without biases and with the embedding as its head."""
    x = params["embedding"].astype(jnp.bfloat16)[tokens]

    def normal(x: jax.Array) -> jax.Array:
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6).astype(x.dtype)

    @jax.checkpoint
    def layer(x: jax.Array, kernels: PyTree) -> tuple[jax.Array, None]:
        kernels = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), kernels)
        split = lambda part: part.reshape(*part.shape[:2], heads, -1)
        query, key, value = map(split, jnp.split(normal(x) @ kernels["attention_in"], 3, axis=-1))
        attended = jax.nn.dot_product_attention(query, key, value, is_causal=True)
        x = x + attended.reshape(x.shape) @ kernels["attention_out"]
        return x + jax.nn.gelu(normal(x) @ kernels["mlp_in"]) @ kernels["mlp_out"], None

    x, _ = jax.lax.scan(layer, x, {name: leaf for name, leaf in params.items() if name != "embedding"})
    logits = (normal(x) @ params["embedding"].astype(jnp.bfloat16).T).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()
