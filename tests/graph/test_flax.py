"""Roles and channels of Flax models, each worked out by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jprune
from tests.graph.models import groups, roles, shape, tokens, trace_linen, trace_nnx


def kernel_roles(graph):
    return {path: letters for path, letters in roles(graph).items() if path in graph.kernels}


@pytest.mark.parametrize(
    ("create", "x", "expected", "count"),
    [
        (lambda r: nnx.Linear(3, 4, rngs=r), (2, 3), "i o", 1),
        (lambda r: nnx.LinearGeneral(3, (2, 5), rngs=r), (2, 3), "i o o", 1),
        (lambda r: nnx.LinearGeneral((3, 4), 5, axis=(-2, -1), rngs=r), (2, 3, 4), "i i o", 1),
        (lambda r: nnx.LinearGeneral(3, 5, axis=-1, batch_axis={0: 2}, rngs=r), (2, 7, 3), "s i o", 1),
        (lambda r: nnx.Einsum("abc,cde->abde", (3, 2, 5), rngs=r), (2, 7, 3), "i o o", 1),
        (lambda r: nnx.Einsum("etc,ecd->etd", (2, 3, 5), rngs=r), (2, 7, 3), "s i o", 1),
        (lambda r: nnx.Conv(3, 6, (5,), rngs=r), (2, 9, 3), "w i o", 1),
        (lambda r: nnx.Conv(3, 6, (3, 3), strides=2, rngs=r), (2, 8, 8, 3), "w w i o", 1),
        (lambda r: nnx.Conv(3, 6, (3, 3), kernel_dilation=2, rngs=r), (2, 8, 8, 3), "w w i o", 1),
        (lambda r: nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=r), (2, 8, 8, 4), "w w i o", 2),
        (lambda r: nnx.Conv(4, 4, (3, 3), feature_group_count=4, rngs=r), (2, 8, 8, 4), "w w i o", 4),
        (lambda r: nnx.ConvTranspose(4, 6, (2, 2), strides=(2, 2), rngs=r), (2, 8, 8, 4), "w w i o", 1),
        (lambda r: nnx.ConvTranspose(4, 6, (3,), transpose_kernel=True, rngs=r), (2, 8, 4), "w o i", 1),
    ],
)
def test_nnx_layers(create, x, expected, count):
    graph = trace_nnx(create, shape(*x))
    (path,) = graph.kernels
    assert roles(graph)[path] == expected
    assert graph.axes[path].groups == count
    rank = len(graph.shapes.get("bias", ()))
    stacked = expected.startswith("s") and rank == 2
    assert roles(graph).get("bias", "") == ("s o" if stacked else " ".join("o" * rank))


@pytest.mark.parametrize(
    ("module", "x", "expected"),
    [
        (nn.Dense(4), (2, 3), "i o"),
        (nn.DenseGeneral((2, 5)), (2, 3), "i o o"),
        (nn.DenseGeneral(5, axis=(-2, -1)), (2, 3, 4), "i i o"),
        (nn.Einsum((3, 2, 5), "abc,cde->abde"), (2, 7, 3), "i o o"),
        (nn.Conv(6, (5,)), (2, 9, 3), "w i o"),
        (nn.Conv(6, (3, 3), strides=2), (2, 8, 8, 3), "w w i o"),
        (nn.Conv(6, (3, 3), feature_group_count=2), (2, 8, 8, 4), "w w i o"),
        (nn.ConvTranspose(6, (2, 2), strides=(2, 2)), (2, 8, 8, 4), "w w i o"),
    ],
)
def test_linen_layers(module, x, expected):
    graph = trace_linen(module, shape(*x))
    assert roles(graph)["kernel"] == expected
    assert graph.kernels == ("kernel",)


@pytest.mark.parametrize(
    "create",
    [
        lambda r: nnx.BatchNorm(8, use_running_average=True, rngs=r),
        lambda r: nnx.LayerNorm(8, rngs=r),
        lambda r: nnx.RMSNorm(8, rngs=r),
        lambda r: nnx.GroupNorm(8, num_groups=2, rngs=r),
    ],
)
def test_normalization_is_no_kernel(create):
    graph = trace_nnx(create, shape(2, 5, 8))
    assert set(roles(graph).values()) == {"o"}
    assert graph.kernels == ()


ATTENTION = {
    "query/kernel": "i o o",
    "key/kernel": "i o o",
    "value/kernel": "i o o",
    "out/kernel": "i i o",
    "query/bias": "o o",
    "key/bias": "o o",
    "value/bias": "o o",
    "out/bias": "o",
}


def test_multi_head_attention():
    graph = trace_nnx(lambda r: nnx.MultiHeadAttention(2, 8, decode=False, rngs=r), shape(2, 5, 8))
    assert roles(graph) == ATTENTION
    heads = {("out/kernel", 0): 1}
    for name in ("query", "key", "value"):
        heads |= {(f"{name}/kernel", 1): 1, (f"{name}/bias", 0): 1}
    assert (2, heads) in groups(graph)
    linen = trace_linen(nn.MultiHeadDotProductAttention(2, qkv_features=8), shape(2, 5, 8))
    assert roles(linen) == ATTENTION


class Decoder(nnx.Module):
    """A block with grouped queries, rotary positions, RMS norm and SwiGLU, and a tied head."""

    def __init__(self, rngs, *, heads=4, groups=2, size=8, width=16, hidden=24, vocabulary=11):
        def linear(*sizes):
            return nnx.LinearGeneral(*sizes, use_bias=False, rngs=rngs)

        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.norm, self.norm2 = nnx.RMSNorm(width, rngs=rngs), nnx.RMSNorm(width, rngs=rngs)
        self.q = linear(width, (heads, size))
        self.k, self.v = linear(width, (groups, size)), linear(width, (groups, size))
        self.o = nnx.LinearGeneral((heads, size), width, axis=(-2, -1), use_bias=False, rngs=rngs)
        self.gate, self.up, self.down = linear(width, hidden), linear(width, hidden), linear(hidden, width)

    def __call__(self, t):
        x = self.embed(t)
        h = self.norm(x)
        q, k, v = rotate(self.q(h)), rotate(self.k(h)), self.v(h)
        q = q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3])
        logits = jnp.einsum("btgrd,bsgd->bgrts", q, k) / jnp.sqrt(q.shape[-1])
        mask = jnp.tril(jnp.ones((t.shape[1], t.shape[1]), bool))
        weights = jax.nn.softmax(jnp.where(mask, logits, -1e9))
        mixed = jnp.einsum("bgrts,bsgd->btgrd", weights, v).reshape(*t.shape, -1, q.shape[-1])
        x = x + self.o(mixed)
        h = self.norm2(x)
        return self.embed.attend(x + self.down(jax.nn.silu(self.gate(h)) * self.up(h)))


def rotate(x):
    half = x.shape[-1] // 2
    angles = jnp.arange(x.shape[1])[:, None] / 10000 ** (jnp.arange(half) / half)
    sin, cos = jnp.sin(angles)[:, None], jnp.cos(angles)[:, None]
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def test_a_decoder_with_grouped_queries():
    graph = trace_nnx(Decoder, tokens(2, 5))
    assert roles(graph) == {
        "embed/embedding": "io io",
        "norm/scale": "o",
        "norm2/scale": "o",
        "q/kernel": "i o o",
        "k/kernel": "i o o",
        "v/kernel": "i o o",
        "o/kernel": "i i o",
        "gate/kernel": "i o",
        "up/kernel": "i o",
        "down/kernel": "i o",
    }
    found = groups(graph)
    assert (24, {("gate/kernel", 1): 1, ("up/kernel", 1): 1, ("down/kernel", 0): 1}) in found
    # A key and value head goes with the two query heads that use it.
    assert (2, {("q/kernel", 1): 2, ("k/kernel", 1): 1, ("v/kernel", 1): 1, ("o/kernel", 0): 2}) in found
    assert (8, {("v/kernel", 2): 1, ("o/kernel", 1): 1}) in found
    stream = {("embed/embedding", 1): 1, ("norm/scale", 0): 1, ("norm2/scale", 0): 1}
    stream |= {(f"{name}/kernel", 0): 1 for name in ("q", "k", "v", "gate", "up")}
    stream |= {("o/kernel", 2): 1, ("down/kernel", 1): 1}
    assert (16, stream) in found
    assert len(found) == 4  # rotary positions number the entries of queries and keys
    assert "numbered" in graph.frozen["q/kernel", 2]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up, self.down = nnx.Linear(8, 16, rngs=rngs), nnx.Linear(16, 8, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jax.nn.gelu(self.up(x)))


class Scanned(nnx.Module):
    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def create(rngs):
            return Block(rngs)

        self.blocks = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat
        def forward(x, block):
            return block(x)

        return forward(x, self.blocks)


def test_scanned_and_rematerialized_blocks():
    expected = {
        "blocks/up/kernel": "s i o",
        "blocks/up/bias": "s o",
        "blocks/down/kernel": "s i o",
        "blocks/down/bias": "s o",
    }
    graph = trace_nnx(Scanned, shape(2, 8))
    assert roles(graph) == expected
    assert groups(graph) == [(16, {("blocks/up/kernel", 2): 1, ("blocks/up/bias", 1): 1, ("blocks/down/kernel", 1): 1})]
    assert "every layer of blocks/" in " ".join(graph.channels[0].why)
    assert graph.multiply_adds["blocks/up/kernel"] == 3 * 2 * 8 * 16

    class LinenBlock(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(8, name="down")(jax.nn.gelu(nn.Dense(16, name="up")(x))), None

    class LinenStack(nn.Module):
        @nn.compact
        def __call__(self, x):
            stack = nn.scan(nn.remat(LinenBlock), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
            return stack(name="blocks")(x, None)[0]

    assert roles(trace_linen(LinenStack(), shape(2, 8))) == expected


@pytest.mark.parametrize("cell", [nn.LSTMCell, nn.OptimizedLSTMCell, nn.GRUCell, nn.SimpleCell])
def test_recurrent_cells_in_a_scan(cell):
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(3, name="head")(nn.RNN(cell(6, name="cell"))(x)[:, -1])

    graph = trace_linen(Recurrent(), shape(2, 7, 4))
    assert set(kernel_roles(graph).values()) == {"i o"}
    assert {letters for path, letters in roles(graph).items() if path not in graph.kernels} == {"o"}
    (group,) = graph.channels  # the hidden state: carried round, so one group
    assert group.size == 6
    gate = {nn.SimpleCell: "h", nn.GRUCell: "hn"}.get(cell, "hi")
    recurrent = {member.axis for member in group.members if member.path == f"cell/{gate}/kernel"}
    assert recurrent == {0, 1}
    assert ("head/kernel", 0) in [(m.path, m.axis) for m in group.members]
    # Every kernel is used once a step, whether or not the cell concatenates its gates.
    assert all(
        graph.multiply_adds[path] == 2 * 7 * graph.shapes[path][0] * graph.shapes[path][1]
        for path in graph.kernels
        if path.startswith("cell/")
    )


def test_nnx_recurrent_cells():
    lstm = trace_nnx(lambda r: nnx.RNN(nnx.LSTMCell(4, 6, rngs=r)), shape(2, 7, 4))
    assert set(kernel_roles(lstm).values()) == {"i o"}
    assert len(lstm.kernels) == 8
    gru = trace_nnx(lambda r: nnx.RNN(nnx.GRUCell(4, 6, rngs=r)), shape(2, 7, 4))
    assert set(kernel_roles(gru).values()) == {"i o"}


class Experts(nnx.Module):
    def __init__(self, rngs):
        self.router = nnx.Linear(8, 4, use_bias=False, rngs=rngs)
        self.up = nnx.Param(jnp.ones((4, 8, 16)))
        self.down = nnx.Param(jnp.ones((4, 16, 8)))

    def __call__(self, x):
        gates = jax.nn.softmax(self.router(x))
        h = jax.nn.relu(jnp.einsum("td,edf->tef", x, self.up[...]))
        return jnp.einsum("te,ted->td", gates, jnp.einsum("tef,efd->ted", h, self.down[...]))


class Dispatched(Experts):
    def __call__(self, x):
        gates, chosen = jax.lax.top_k(jax.nn.softmax(self.router(x)), 2)
        dispatch = jax.nn.one_hot(chosen, 4)
        h = jax.nn.relu(jnp.einsum("ecd,edf->ecf", jnp.einsum("td,tke->etd", x, dispatch), self.up[...]))
        return jnp.einsum("ecd,tke,tk->td", jnp.einsum("ecf,efd->ecd", h, self.down[...]), dispatch, gates)


def test_mixture_of_experts():
    dense = trace_nnx(Experts, shape(5, 8))
    # Every expert gets every example and passes its outputs to its own second kernel: experts are separate layers.
    assert roles(dense) == {"router/kernel": "i o", "up": "s i o", "down": "s i o"}
    assert (16, {("up", 2): 1, ("down", 1): 1}) in groups(dense)

    def headwise(p, x):  # a product for each head: heads of one projection, not experts
        return jnp.einsum("bhk,hkm->bhm", jnp.einsum("bd,dhk->bhk", x, p["q"]), p["w"])

    heads = jprune.trace_model(headwise, {"q": shape(8, 2, 4), "w": shape(2, 4, 3)}, shape(5, 8))
    assert roles(heads) == {"q": "i o o", "w": "s i o"}
    dispatched = trace_nnx(Dispatched, shape(5, 8))
    assert roles(dispatched) == {"router/kernel": "i o", "up": "s i o", "down": "s i o"}


class SqueezeAndExcite(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 8, (3, 3), rngs=rngs)
        self.down, self.up = nnx.Linear(8, 2, rngs=rngs), nnx.Linear(2, 8, rngs=rngs)
        self.head = nnx.Linear(8, 5, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.conv(x))
        gate = jax.nn.sigmoid(self.up(jax.nn.relu(self.down(x.mean((1, 2))))))
        return self.head((x * gate[:, None, None]).mean((1, 2)))


def test_squeeze_and_excite():
    graph = trace_nnx(SqueezeAndExcite, shape(2, 8, 8, 3))
    channels = {("conv/kernel", 3): 1, ("conv/bias", 0): 1, ("down/kernel", 0): 1, ("up/kernel", 1): 1}
    channels |= {("up/bias", 0): 1, ("head/kernel", 0): 1}
    assert (8, channels) in groups(graph)
    assert (2, {("down/kernel", 1): 1, ("down/bias", 0): 1, ("up/kernel", 0): 1}) in groups(graph)
    assert all(group.exact for group in graph.channels)


class Patches(nnx.Module):
    """A vision transformer's embedding: patches by reshape, a class token and positions."""

    def __init__(self, rngs):
        self.embed = nnx.Linear(4 * 4 * 3, 16, rngs=rngs)
        self.token = nnx.Param(jnp.zeros((1, 1, 16)))
        self.positions = nnx.Param(jnp.zeros((1, 5, 16)))
        self.head = nnx.Linear(16, 10, rngs=rngs)

    def __call__(self, x):
        x = x.reshape(-1, 2, 4, 2, 4, 3).transpose(0, 1, 3, 2, 4, 5).reshape(-1, 4, 48)
        x = self.embed(x)
        token = jnp.broadcast_to(self.token[...], (x.shape[0], 1, 16))
        return self.head((jnp.concatenate([token, x], axis=1) + self.positions[...])[:, 0])


def test_patch_embedding_by_reshape():
    graph = trace_nnx(Patches, shape(2, 8, 8, 3))
    assert roles(graph)["embed/kernel"] == "i o"
    assert graph.kernels == ("embed/kernel", "head/kernel")
    (group,) = graph.channels
    assert {(m.path, m.axis) for m in group.members} == {
        ("embed/kernel", 1),
        ("embed/bias", 0),
        ("token", 2),
        ("positions", 2),
        ("head/kernel", 0),
    }


class UNet(nnx.Module):
    def __init__(self, rngs):
        self.a = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.b = nnx.Conv(4, 6, (3, 3), strides=2, rngs=rngs)
        self.up = nnx.ConvTranspose(6, 5, (2, 2), strides=(2, 2), rngs=rngs)
        self.c = nnx.Conv(9, 2, (3, 3), rngs=rngs)

    def __call__(self, x):
        a = jax.nn.relu(self.a(x))
        up = jax.nn.relu(self.up(jax.nn.relu(self.b(a))))
        return self.c(jnp.concatenate([a, up], axis=-1))


def test_a_u_net_concatenates_channels():
    graph = trace_nnx(UNet, shape(2, 8, 8, 3))
    assert groups(graph) == [
        (4, {("a/bias", 0): 1, ("a/kernel", 3): 1, ("b/kernel", 2): 1, ("c/kernel", 2): 1}),
        (6, {("b/bias", 0): 1, ("b/kernel", 3): 1, ("up/kernel", 2): 1}),
        (5, {("c/kernel", 2): 1, ("up/bias", 0): 1, ("up/kernel", 3): 1}),
    ]
    by_size = {group.size: {m.path: m.indices[:, 0].tolist() for m in group.members} for group in graph.channels}
    assert by_size[4]["c/kernel"] == [0, 1, 2, 3]
    assert by_size[5]["c/kernel"] == [4, 5, 6, 7, 8]


def test_lora_of_nnx():
    graph = trace_nnx(lambda r: nnx.LoRALinear(6, 4, lora_rank=2, rngs=r), shape(5, 6))
    found = roles(graph)
    assert {found[path] for path in graph.kernels} == {"i o"}
    assert [path.rsplit("/", 1)[-1] for path in sorted(graph.kernels)] == ["kernel", "lora_a", "lora_b"]


def test_dot_product_attention_of_nnx():
    def apply(p, x):
        q, k, v = (jnp.einsum("btd,dhk->bthk", x, p[name]) for name in "qkv")
        return jnp.einsum("bthk,hkd->btd", nnx.dot_product_attention(q, k, v), p["o"])

    params = {**{name: shape(8, 2, 4) for name in "qkv"}, "o": shape(2, 4, 8)}
    graph = jprune.trace_model(apply, params, shape(2, 5, 8))
    assert roles(graph) == {"q": "i o o", "k": "i o o", "v": "i o o", "o": "i i o"}
