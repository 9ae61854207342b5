"""Large models, described by shapes alone, are traced in seconds."""

import time

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jprune
from tests.graph.models import roles, shape, tokens, trace_nnx
from tests.graph.test_flax import rotate

pytestmark = pytest.mark.slow


class EncoderBlock(nnx.Module):
    def __init__(self, rngs, width=768, heads=12):
        self.norm, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(self.norm2(x))))


class VisionTransformer(nnx.Module):
    """ViT-B/16 at 224 x 224."""

    def __init__(self, rngs, width=768):
        self.patches = nnx.Conv(3, width, (16, 16), strides=16, padding="VALID", rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, width)))
        self.positions = nnx.Param(jnp.zeros((1, 197, width)))
        self.blocks = nnx.List([EncoderBlock(rngs) for _ in range(12)])
        self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, 1000, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, x.shape[-1]))
        x = jnp.concatenate([token, x], axis=1) + self.positions[...]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


def test_a_vision_transformer():
    start = time.process_time()
    graph = trace_nnx(VisionTransformer, shape(1, 224, 224, 3))
    assert time.process_time() - start < 10
    assert sum(jnp.prod(jnp.array(s)).item() for s in graph.shapes.values()) == 86_567_656
    assert len(graph.kernels) == 2 + 12 * 6
    assert graph.multiply_adds["patches/kernel"] == 196 * 768 * 768
    assert graph.multiply_adds["blocks/0/up/kernel"] == 197 * 768 * 3072
    widths = sorted({group.size for group in graph.channels})
    assert widths == [12, 64, 768, 3072]  # heads, their entries, the residual stream, feed-forward widths


def test_a_decoder_of_a_billion_parameters():
    layers, width, heads, groups, size, hidden, vocabulary = 16, 2048, 32, 8, 64, 8192, 128_256
    block = {
        "q": shape(width, heads * size),
        "k": shape(width, groups * size),
        "v": shape(width, groups * size),
        "o": shape(heads * size, width),
        "gate": shape(width, hidden),
        "up": shape(width, hidden),
        "down": shape(hidden, width),
        "norm": shape(width),
        "norm2": shape(width),
    }
    params = {"embed": shape(vocabulary, width), "blocks": [block] * layers, "norm": shape(width)}

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * scale

    def apply(p, t):
        x = p["embed"][t]
        for w in p["blocks"]:
            h = norm(x, w["norm"])
            q = rotate((h @ w["q"]).reshape(*t.shape, heads, size))
            k = rotate((h @ w["k"]).reshape(*t.shape, groups, size))
            v = (h @ w["v"]).reshape(*t.shape, groups, size)
            x = x + jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(*t.shape, -1) @ w["o"]
            h = norm(x, w["norm2"])
            x = x + (jax.nn.silu(h @ w["gate"]) * (h @ w["up"])) @ w["down"]
        return norm(x, p["norm"]) @ p["embed"].T

    start = time.process_time()
    graph = jprune.trace_model(apply, params, tokens(1, 512))
    assert time.process_time() - start < 10
    assert sum(jnp.prod(jnp.array(s)).item() for s in graph.shapes.values()) == 1_235_814_400
    found = roles(graph)
    assert found.pop("embed") == "io io"
    assert {found[path] for path in graph.kernels if path in found} == {"i o"}
    sizes = sorted(group.size for group in graph.channels)
    assert sizes == [groups] * layers + [width] + [hidden] * layers
