"""Roles and channels of Equinox models, each worked out by hand: weights are (out, in, ...)."""

import equinox as eqx
import jax
import jax.numpy as jnp
import pytest

import jprune
from tests.graph.models import groups, roles, shape, tokens, trace_equinox


@pytest.mark.parametrize(
    ("create", "x", "expected", "count"),
    [
        (lambda k: eqx.nn.Linear(3, 4, key=k), (2, 3), "o i", 1),
        (lambda k: eqx.nn.Conv1d(3, 6, 5, key=k), (2, 3, 9), "o i w", 1),
        (lambda k: eqx.nn.Conv2d(3, 6, 3, stride=2, key=k), (2, 3, 8, 8), "o i w w", 1),
        (lambda k: eqx.nn.Conv2d(3, 6, 3, dilation=2, key=k), (2, 3, 8, 8), "o i w w", 1),
        (lambda k: eqx.nn.Conv2d(4, 6, 3, groups=2, key=k), (2, 4, 8, 8), "o i w w", 2),
        (lambda k: eqx.nn.Conv2d(4, 4, 3, groups=4, key=k), (2, 4, 8, 8), "o i w w", 4),
        (lambda k: eqx.nn.ConvTranspose2d(4, 6, 2, stride=2, key=k), (2, 4, 8, 8), "o i w w", 1),
    ],
)
def test_layers(create, x, expected, count):
    graph = trace_equinox(create, shape(*x))
    assert graph.kernels == ("weight",)
    assert roles(graph)["weight"] == expected
    assert graph.axes["weight"].groups == count


@pytest.mark.parametrize(
    "create",
    [lambda k: eqx.nn.LayerNorm(8), lambda k: eqx.nn.RMSNorm(8), lambda k: eqx.nn.GroupNorm(2, 8)],
)
def test_normalization_is_no_kernel(create):
    graph = trace_equinox(create, shape(2, 8))
    assert set(roles(graph).values()) == {"o"}
    assert graph.kernels == ()


def test_an_embedding_is_looked_up():
    class Tagger(eqx.Module):
        embed: eqx.nn.Embedding
        head: eqx.nn.Linear

        def __init__(self, key):
            self.embed, self.head = eqx.nn.Embedding(11, 8, key=key), eqx.nn.Linear(8, 3, key=key)

        def __call__(self, t):
            return jax.vmap(self.head)(jax.vmap(self.embed)(t))

    graph = trace_equinox(Tagger, tokens(2, 5))
    assert roles(graph)["embed/weight"] == "i o"
    assert graph.kernels == ("head/weight",)
    assert groups(graph) == [(8, {("embed/weight", 1): 1, ("head/weight", 1): 1})]


@pytest.mark.parametrize(("cell", "gates"), [(eqx.nn.LSTMCell, 4), (eqx.nn.GRUCell, 3)])
def test_recurrent_cells_in_a_scan(cell, gates):
    class Recurrent(eqx.Module):
        cell: eqx.Module
        head: eqx.nn.Linear

        def __init__(self, key):
            self.cell, self.head = cell(4, 6, key=key), eqx.nn.Linear(6, 3, key=key)

        def __call__(self, x):
            start = (jnp.zeros(6), jnp.zeros(6)) if gates == 4 else jnp.zeros(6)
            state, _ = jax.lax.scan(lambda state, x: (self.cell(x, state), None), start, x)
            return self.head(state[0] if gates == 4 else state)

    graph = trace_equinox(Recurrent, shape(2, 7, 4))
    assert graph.kernels == ("cell/weight_ih", "cell/weight_hh", "head/weight")
    assert {roles(graph)[path] for path in graph.kernels} == {"o i"}
    (group,) = graph.channels
    assert group.size == 6
    members = {(m.path, m.axis): m.indices.shape[1] for m in group.members}
    assert members["cell/weight_hh", 0] == gates
    assert members["cell/weight_hh", 1] == 1


def test_attention_is_cut_by_whole_heads():
    def create(key):
        return eqx.nn.MultiheadAttention(2, 8, key=key)

    class Attention(eqx.Module):
        inner: eqx.nn.MultiheadAttention

        def __init__(self, key):
            self.inner = create(key)

        def __call__(self, x):
            return self.inner(x, x, x)

    graph = trace_equinox(Attention, shape(2, 5, 8))
    assert set(roles(graph).values()) == {"o i"}
    projections = {(f"inner/{name}_proj/weight", 0): 4 for name in ("query", "key", "value")}
    assert groups(graph) == [(2, {**projections, ("inner/output_proj/weight", 1): 4})]


def test_stacked_layers():
    class Stack(eqx.Module):
        layers: eqx.nn.Linear

        def __init__(self, key):
            self.layers = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(jax.random.split(key, 3))

        def __call__(self, x):
            arrays, static = eqx.partition(self.layers, eqx.is_array_like)

            def step(x, layer):
                return jax.nn.relu(eqx.combine(layer, static)(x)), None

            return jax.lax.scan(step, x, arrays)[0]

    assert roles(trace_equinox(Stack, shape(2, 8))) == {"layers/weight": "s o i", "layers/bias": "s o"}


class DecoderBlock(eqx.Module):
    """RMS norm, grouped queries with rotary positions, SwiGLU."""

    norm: eqx.nn.RMSNorm
    rope: eqx.nn.RotaryPositionalEmbedding
    q: eqx.nn.Linear
    k: eqx.nn.Linear
    v: eqx.nn.Linear
    o: eqx.nn.Linear
    gate: eqx.nn.Linear
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        width, heads, shared, size, hidden = 16, 4, 2, 4, 24
        sizes = {"q": (width, heads * size), "k": (width, shared * size), "v": (width, shared * size)}
        sizes |= {"o": (heads * size, width), "gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
        for name, ends in sizes.items():
            setattr(self, name, eqx.nn.Linear(*ends, use_bias=False, key=key))
        self.norm, self.rope = eqx.nn.RMSNorm(width, use_bias=False), eqx.nn.RotaryPositionalEmbedding(size)

    def __call__(self, x):
        h = jax.vmap(self.norm)(x)
        q, k, v = (jax.vmap(layer)(h).reshape(len(x), -1, 4) for layer in (self.q, self.k, self.v))
        q, k = (jax.vmap(self.rope, in_axes=1, out_axes=1)(heads) for heads in (q, k))
        logits = jnp.einsum("tgrd,sgd->grts", q.reshape(len(x), 2, 2, 4), k)
        mixed = jnp.einsum("grts,sgd->tgrd", jax.nn.softmax(logits), v).reshape(len(x), -1)
        x = x + jax.vmap(self.o)(mixed)
        return x + jax.vmap(self.down)(jax.nn.silu(jax.vmap(self.gate)(x)) * jax.vmap(self.up)(x))


def test_a_decoder_with_grouped_queries():
    class Decoder(eqx.Module):
        embed: eqx.nn.Embedding
        block: DecoderBlock

        def __init__(self, key):
            self.embed, self.block = eqx.nn.Embedding(11, 16, key=key), DecoderBlock(key)

        def __call__(self, t):
            return self.block(jax.vmap(self.embed)(t)) @ self.embed.weight.T

    graph = trace_equinox(Decoder, tokens(2, 5))
    found = roles(graph)
    assert found.pop("embed/weight") == "io io"
    assert found.pop("block/norm/weight") == "o"
    assert set(found.values()) == {"o i"}
    assert len(found) == 7
    gated = {("block/gate/weight", 0): 1, ("block/up/weight", 0): 1, ("block/down/weight", 1): 1}
    assert (24, gated) in groups(graph)
    # A key and value head of four entries goes with the two query heads that use it.
    heads = {("block/q/weight", 0): 8, ("block/k/weight", 0): 4, ("block/v/weight", 0): 4, ("block/o/weight", 1): 8}
    assert (2, heads) in groups(graph)


def test_convolutional_networks():
    class UNet(eqx.Module):
        a: eqx.nn.Conv2d
        norm: eqx.nn.GroupNorm
        b: eqx.nn.Conv2d
        up: eqx.nn.ConvTranspose2d
        c: eqx.nn.Conv2d

        def __init__(self, key):
            self.a, self.norm = eqx.nn.Conv2d(3, 4, 3, padding=1, key=key), eqx.nn.GroupNorm(2, 4)
            self.b = eqx.nn.Conv2d(4, 6, 3, stride=2, padding=1, key=key)
            self.up, self.c = eqx.nn.ConvTranspose2d(6, 5, 2, stride=2, key=key), eqx.nn.Conv2d(9, 2, 1, key=key)

        def __call__(self, x):
            a = jax.nn.relu(self.norm(self.a(x)))
            return self.c(jnp.concatenate([a, jax.nn.relu(self.up(jax.nn.relu(self.b(a))))]))

    graph = trace_equinox(UNet, shape(2, 3, 8, 8))
    assert {roles(graph)[path] for path in graph.kernels} == {"o i w w"}
    assert len(graph.kernels) == 4
    assert roles(graph)["norm/weight"] == "o"
    sized = {group.size: {m.path: m.indices[:, 0].tolist() for m in group.members} for group in graph.channels}
    assert sized[5]["c/weight"] == [4, 5, 6, 7, 8]
    assert set(sized[6]) == {"b/weight", "b/bias", "up/weight"}


def test_experts():
    class Experts(eqx.Module):
        router: eqx.nn.Linear
        up: jax.Array
        down: jax.Array

        def __init__(self, key):
            self.router = eqx.nn.Linear(8, 4, use_bias=False, key=key)
            self.up, self.down = jnp.ones((4, 8, 16)), jnp.ones((4, 16, 8))

        def __call__(self, x):
            h = jax.nn.relu(jnp.einsum("d,edf->ef", x, self.up))
            return jnp.einsum("e,ed->d", jax.nn.softmax(self.router(x)), jnp.einsum("ef,efd->ed", h, self.down))

    assert roles(trace_equinox(Experts, shape(5, 8))) == {"router/weight": "o i", "up": "s i o", "down": "s i o"}


def test_batch_norm_loses_its_state_with_its_channels():
    class Normalized(eqx.Module):
        conv: eqx.nn.Conv2d
        norm: eqx.nn.BatchNorm
        head: eqx.nn.Linear

        def __init__(self, key):
            self.conv, self.norm = eqx.nn.Conv2d(3, 4, 3, key=key), eqx.nn.BatchNorm(4, "batch", mode="batch")
            self.head = eqx.nn.Linear(4, 2, key=key)

        def __call__(self, x, state):
            x, state = self.norm(self.conv(x), state)
            return self.head(jax.nn.relu(x).mean((1, 2))), state

    model, state = eqx.filter_eval_shape(eqx.nn.make_with_state(Normalized), jax.random.key(0))

    def apply(model, state, x):
        return jax.vmap(model, axis_name="batch", in_axes=(0, None), out_axes=(0, None))(x, state)

    graph = jprune.trace_model(apply, model, shape(2, 3, 8, 8), state=state)
    assert roles(graph) == {
        "conv/weight": "o i w w",
        "conv/bias": "o o o",
        "norm/weight": "o",
        "norm/bias": "o",
        "head/weight": "o i",
        "head/bias": "o",
    }
    assert graph.kernels == ("conv/weight", "head/weight")
    members = {("conv/weight", 0): 1, ("conv/bias", 0): 1, ("norm/weight", 0): 1, ("norm/bias", 0): 1}
    running = {("1/0", 0): 1, ("1/1", 0): 1}  # mean and variance, after the counter of batches
    assert groups(graph) == [(4, {**members, **running, ("head/weight", 1): 1})]
    assert [member.path for member in graph.channels[0].state] == ["1/0", "1/1"]
    assert graph.channels[0].exact


def test_squeeze_and_excite():
    class SqueezeAndExcite(eqx.Module):
        conv: eqx.nn.Conv2d
        down: eqx.nn.Linear
        up: eqx.nn.Linear
        head: eqx.nn.Linear

        def __init__(self, key):
            self.conv = eqx.nn.Conv2d(3, 8, 3, key=key)
            self.down, self.up = eqx.nn.Linear(8, 2, key=key), eqx.nn.Linear(2, 8, key=key)
            self.head = eqx.nn.Linear(8, 5, key=key)

        def __call__(self, x):
            x = jax.nn.relu(self.conv(x))
            gate = jax.nn.sigmoid(self.up(jax.nn.relu(self.down(x.mean((1, 2))))))
            return self.head((x * gate[:, None, None]).mean((1, 2)))

    graph = trace_equinox(SqueezeAndExcite, shape(2, 3, 8, 8))
    assert {path: roles(graph)[path] for path in graph.kernels} == {
        "conv/weight": "o i w w",
        "down/weight": "o i",
        "up/weight": "o i",
        "head/weight": "o i",
    }
    channels = {("conv/weight", 0): 1, ("conv/bias", 0): 1, ("down/weight", 1): 1, ("up/weight", 0): 1}
    channels |= {("up/bias", 0): 1, ("head/weight", 1): 1}
    squeezed = {("down/weight", 0): 1, ("down/bias", 0): 1, ("up/weight", 1): 1}
    assert groups(graph) == [(8, channels), (2, squeezed)]
    assert all(group.exact for group in graph.channels)


def test_patch_embedding_by_reshape():
    class Patches(eqx.Module):
        embed: eqx.nn.Linear
        token: jax.Array
        positions: jax.Array
        head: eqx.nn.Linear

        def __init__(self, key):
            self.embed, self.head = eqx.nn.Linear(4 * 4 * 3, 16, key=key), eqx.nn.Linear(16, 10, key=key)
            self.token, self.positions = jnp.zeros((1, 16)), jnp.zeros((5, 16))

        def __call__(self, x):
            x = x.reshape(3, 2, 4, 2, 4).transpose(1, 3, 0, 2, 4).reshape(4, 48)
            x = jnp.concatenate([self.token, jax.vmap(self.embed)(x)]) + self.positions
            return self.head(x[0])

    graph = trace_equinox(Patches, shape(2, 3, 8, 8))
    assert {path: roles(graph)[path] for path in graph.kernels} == {"embed/weight": "o i", "head/weight": "o i"}
    stream = {("embed/weight", 0): 1, ("embed/bias", 0): 1, ("token", 1): 1, ("positions", 1): 1, ("head/weight", 1): 1}
    assert groups(graph) == [(16, stream)]
    assert graph.frozen["embed/weight", 1] == "an axis of the model's inputs"


def test_scanned_and_rematerialized_blocks():
    class Block(eqx.Module):
        up: eqx.nn.Linear
        down: eqx.nn.Linear

        def __init__(self, key):
            self.up, self.down = eqx.nn.Linear(8, 16, key=key), eqx.nn.Linear(16, 8, key=key)

        def __call__(self, x):
            return x + self.down(jax.nn.gelu(self.up(x)))

    class Stack(eqx.Module):
        blocks: Block

        def __init__(self, key):
            self.blocks = eqx.filter_vmap(Block)(jax.random.split(key, 3))

        def __call__(self, x):
            arrays, static = eqx.partition(self.blocks, eqx.is_array_like)

            @eqx.filter_checkpoint
            def step(x, block):
                return eqx.combine(block, static)(x), None

            return jax.lax.scan(step, x, arrays)[0]

    graph = trace_equinox(Stack, shape(2, 8))
    assert roles(graph) == {
        "blocks/up/weight": "s o i",
        "blocks/up/bias": "s o",
        "blocks/down/weight": "s o i",
        "blocks/down/bias": "s o",
    }
    hidden = {("blocks/up/weight", 1): 1, ("blocks/up/bias", 1): 1, ("blocks/down/weight", 2): 1}
    assert groups(graph) == [(16, hidden)]
    assert graph.multiply_adds["blocks/up/weight"] == 3 * 2 * 8 * 16
