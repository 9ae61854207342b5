"""Time of ``jprune.trace_model`` against ``jax.make_jaxpr`` of the same function, by depth and by parameters.

Models are described by shapes, so nothing is allocated. Decoders have grouped queries, SwiGLU and a tied head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

import jprune
from benchmarks.timing import Row, compare

Shapes = Any  # a tree of jax.ShapeDtypeStruct


class Decoder(NamedTuple):
    """Sizes of a decoder; the defaults have 1.2e9 parameters."""

    layers: int = 16
    width: int = 2048
    heads: int = 32
    groups: int = 8
    size: int = 64
    hidden: int = 8192
    vocabulary: int = 128_256


class Encoder(NamedTuple):
    """Sizes of a vision transformer; the defaults are those of ViT-B/16 at 224 x 224."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    patch: int = 16
    image: int = 224
    classes: int = 1000


Model = tuple[Callable[..., Array], Shapes, jax.ShapeDtypeStruct]  # a function, and shapes of its arguments

SMALL = Decoder(width=256, heads=4, groups=2, size=64, hidden=1024, vocabulary=1000)
BILLION = Decoder()
VIT_B = Encoder()


def rows(
    depths: tuple[int, ...] = (2, 12, 48), small: Decoder = SMALL, large: Decoder = BILLION, encoder: Encoder = VIT_B
) -> list[Row]:
    """Time decoders by depth, unrolled and scanned, a vision transformer, and a large decoder."""
    table = []
    for scanned, how in ((False, "unrolled"), (True, "scanned")):
        for layers in depths:
            sizes = small._replace(layers=layers)
            table.append(_row(f"{how} decoder, {layers} layers", functools.partial(decoder, sizes, scanned=scanned)))
    name = f"vision transformer, {encoder.layers} layers"
    table.append(_row(name, functools.partial(vision_transformer, encoder)))
    name = f"unrolled decoder, {large.layers} layers"
    table.append(_row(name, functools.partial(decoder, large, scanned=False)))
    return table


def _row(name: str, create: Callable[[], Model]) -> Row:
    """Time the graph of a model against its jaxpr, from which the graph is computed."""

    def graph() -> object:
        apply, params, x = create()  # a new function, whose trace is not cached
        return jprune.trace_model(apply, params, x)

    def jaxpr() -> object:
        apply, params, x = create()
        return jax.make_jaxpr(apply)(params, x)

    count = sum(leaf.size for leaf in jax.tree.leaves(create()[1]))
    return compare(
        f"trace_model, {name}, {count:.2g} parameters",
        "jax.make_jaxpr of the same function",
        graph,
        jaxpr,
        must=10.0,
        pairs=3,
        note="both trace a new function from shapes",
    )


def decoder(sizes: Decoder, *, scanned: bool) -> Model:
    """Return the function, the shapes of its parameters, and 512 tokens."""
    layers, width, heads, groups, size, hidden, vocabulary = sizes
    block = {
        "q": _shape(width, heads, size),
        "k": _shape(width, groups, size),
        "v": _shape(width, groups, size),
        "out": _shape(heads, size, width),
        "gate": _shape(width, hidden),
        "up": _shape(width, hidden),
        "down": _shape(hidden, width),
        "scale": _shape(width),
        "scale2": _shape(width),
    }

    def step(x: Array, w: Shapes) -> tuple[Array, None]:
        h = _normed(x, w["scale"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", h, w[name]) for name in ("q", "k", "v"))
        x = x + jnp.einsum("bthk,hkd->btd", jax.nn.dot_product_attention(q, k, v, is_causal=True), w["out"])
        h = _normed(x, w["scale2"])
        return x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"], None

    def apply(p: Shapes, tokens: Array) -> Array:
        x = p["embed"][tokens]
        if scanned:
            x, _ = jax.lax.scan(step, x, p["blocks"])
        else:
            for w in p["blocks"]:
                x, _ = step(x, w)
        return _normed(x, p["scale"]) @ p["embed"].T

    blocks = jax.tree.map(lambda leaf: _shape(layers, *leaf.shape), block) if scanned else [block] * layers
    params = {"embed": _shape(vocabulary, width), "blocks": blocks, "scale": _shape(width)}
    return apply, params, jax.ShapeDtypeStruct((1, 512), jnp.int32)


def vision_transformer(sizes: Encoder) -> Model:
    """Return the function, the shapes of its parameters, and one image."""
    layers, width, heads, patch, image, classes = sizes
    tokens, size = (image // patch) ** 2, width // heads
    linears = {"up": (width, 4 * width), "down": (4 * width, width), "out": (heads, size, width)}
    linears |= dict.fromkeys(("q", "k", "v"), (width, heads, size))
    block = {name: _shape(*ends) for name, ends in linears.items()}
    block |= {"bias_" + name: _shape(*ends[1:]) for name, ends in linears.items() if name != "out"}
    block |= {"bias_out": _shape(width)} | {name: _shape(width) for name in ("scale", "shift", "scale2", "shift2")}
    params = {"patches": _shape(patch * patch * 3, width), "bias": _shape(width), "token": _shape(1, width)}
    params |= {"positions": _shape(tokens + 1, width), "blocks": [block] * layers}
    params |= {"scale": _shape(width), "shift": _shape(width)}
    params |= {"head": _shape(width, classes), "head_bias": _shape(classes)}

    def step(x: Array, w: Shapes) -> Array:
        h = _normed(x - x.mean(-1, keepdims=True), w["scale"]) + w["shift"]
        q, k, v = (jnp.einsum("btd,dhk->bthk", h, w[name]) + w["bias_" + name] for name in ("q", "k", "v"))
        x = x + jnp.einsum("bthk,hkd->btd", jax.nn.dot_product_attention(q, k, v), w["out"]) + w["bias_out"]
        h = _normed(x - x.mean(-1, keepdims=True), w["scale2"]) + w["shift2"]
        return x + jax.nn.gelu(h @ w["up"] + w["bias_up"]) @ w["down"] + w["bias_down"]

    def apply(p: Shapes, images: Array) -> Array:
        side = image // patch
        x = (
            images.reshape(-1, side, patch, side, patch, 3)
            .transpose(0, 1, 3, 2, 4, 5)
            .reshape(-1, tokens, patch**2 * 3)
        )
        x = x @ p["patches"] + p["bias"]
        x = jnp.concatenate([jnp.broadcast_to(p["token"], (len(x), 1, width)), x], axis=1) + p["positions"]
        for w in p["blocks"]:
            x = step(x, w)
        x = _normed(x - x.mean(-1, keepdims=True), p["scale"]) + p["shift"]
        return x[:, 0] @ p["head"] + p["head_bias"]

    return apply, params, _shape(1, image, image, 3)


def _shape(*sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def _normed(x: Array, scale: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale
