"""Small networks of shapes that are less common: shared weights, gates, shuffles, cross-attention, recurrences.

As in ``models``, every parameter is random, and ``MODELS`` has the builders by name.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from tests.pruning.structured.models import Model, _attend, _batch_norm, _conv, _dense, _Draw, _layer_norm, nnx_function


def two_heads():
    """Two heads on one trunk, one of which has a layer of its own."""
    d = _Draw()
    params = {"trunk": d.dense(5, 8), "one": d.dense(8, 3), "middle": d.dense(8, 6), "two": d.dense(6, 2)}

    def apply(p, x):
        x = jnp.tanh(_dense(p["trunk"], x))
        return {"one": _dense(p["one"], x), "two": _dense(p["two"], jax.nn.relu(_dense(p["middle"], x)))}

    return Model(apply, params, (d(3, 5),))


def siamese():
    """Both branches have the same weights; the head reads their difference and their product."""
    d = _Draw()
    params = {"encoder": d.dense(5, 8), "difference": d.dense(8, 3), "product": d.dense(8, 3)}

    def apply(p, x, y):
        x, y = (jnp.tanh(_dense(p["encoder"], z)) for z in (x, y))
        return _dense(p["difference"], jnp.abs(x - y)) + _dense(p["product"], x * y)

    return Model(apply, params, (d(3, 5), d(3, 5)))


def gated_residual():
    """A highway layer: gate * new + (1 - gate) * old."""
    d = _Draw()
    params = {"stem": d.dense(5, 8), "gate": d.dense(8, 8), "new": d.dense(8, 8), "head": d.dense(8, 3)}

    def apply(p, x):
        x = jnp.tanh(_dense(p["stem"], x))
        gate = jax.nn.sigmoid(_dense(p["gate"], x))
        return _dense(p["head"], gate * jax.nn.relu(_dense(p["new"], x)) + (1 - gate) * x)

    return Model(apply, params, (d(3, 5),))


def dense_skip():
    """Every layer reads the input and all layers before it."""
    d = _Draw()
    params = {"one": d.dense(5, 4), "two": d.dense(9, 4), "three": d.dense(13, 6), "head": d.dense(19, 3)}

    def apply(p, x):
        for name in ("one", "two", "three"):
            x = jnp.concatenate([jax.nn.gelu(_dense(p[name], x)), x], axis=-1)
        return _dense(p["head"], x)

    return Model(apply, params, (d(3, 5),))


def squeeze_excite_reduction():
    """Squeeze-and-excite by 1 x 1 convolutions, reduction 2, hard sigmoid, inside an inverted residual."""
    d = _Draw()
    params = {
        "stem": d.conv(3, 4, bias=True),
        "expand": d.conv(4, 8, 1, bias=True),
        "depthwise": d.conv(1, 8, bias=True),
        "squeeze": d.conv(8, 4, 1, bias=True),
        "excite": d.conv(4, 8, 1, bias=True),
        "project": d.conv(8, 4, 1, bias=True),
        "head": d.dense(4, 3),
    }

    def apply(p, x):
        x = jax.nn.hard_swish(_conv(p["stem"], x))
        y = jax.nn.hard_swish(_conv(p["depthwise"], _conv(p["expand"], x), groups=8))
        gate = jnp.mean(y, axis=(1, 2), keepdims=True)
        y = y * jax.nn.hard_sigmoid(_conv(p["excite"], jax.nn.relu(_conv(p["squeeze"], gate))))
        return _dense(p["head"], jnp.mean(x + _conv(p["project"], y), axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),))


def _shuffled(width):
    d = _Draw()
    params = {
        "stem": d.conv(3, 6, 1, bias=True),
        "first": d.conv(3, width, 1, bias=True),
        "depthwise": d.conv(1, width, bias=True),
        "second": d.conv(width // 2, 6, 1, bias=True),
        "head": d.dense(6, 3),
    }

    def apply(p, x):
        x = jax.nn.relu(_conv(p["stem"], x))
        y = jax.nn.relu(_conv(p["first"], x, groups=2))
        n, h, w, c = y.shape
        y = y.reshape(n, h, w, 2, c // 2).swapaxes(3, 4).reshape(n, h, w, c)
        y = _conv(p["second"], _conv(p["depthwise"], y, groups=width), groups=2)
        return _dense(p["head"], jnp.mean(jax.nn.relu(x + y), axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),))


def shuffle():
    """ShuffleNet: grouped convolution, channel shuffle, depthwise, grouped convolution. 4 channels a group."""
    return _shuffled(8)


def shuffle_of_odd_groups():
    """The same with 3 channels in each of the 2 groups."""
    return _shuffled(6)


def vmapped_convolutions():
    """Three convolutional networks under vmap: jax makes each convolution one in three groups."""
    d = _Draw()
    params = {"one": d(3, 3, 3, 2, 8), "two": d(3, 3, 3, 8, 6), "head": d(3, 6, 2)}

    def network(p, x):
        x = jax.nn.relu(_conv({"kernel": p["two"]}, jax.nn.relu(_conv({"kernel": p["one"]}, x))))
        return jnp.mean(x, axis=(1, 2)) @ p["head"]

    return Model(jax.vmap(network, in_axes=(0, None)), params, (d(2, 4, 4, 2),))


def grouped_inputs():
    """A grouped convolution of the model's inputs: its outputs lose the same positions of both groups."""
    d = _Draw()
    params = {"grouped": d.conv(2, 8, bias=True), "next": d.conv(8, 6, 1, bias=True), "head": d.dense(6, 3)}

    def apply(p, x):
        x = jax.nn.relu(_conv(p["grouped"], x, groups=2))
        return _dense(p["head"], jnp.mean(jnp.tanh(_conv(p["next"], x)), axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 4),))


def pixel_shuffle():
    """Channels become positions: 4 c channels make an image twice as high and wide."""
    d = _Draw()
    params = {"stem": d.conv(3, 4, bias=True), "up": d.conv(4, 16, bias=True), "head": d.conv(4, 2, bias=True)}

    def apply(p, x):
        x = jax.nn.relu(_conv(p["up"], jax.nn.relu(_conv(p["stem"], x))))
        n, h, w, c = x.shape
        x = x.reshape(n, h, w, 2, 2, c // 4).transpose(0, 1, 3, 2, 4, 5).reshape(n, 2 * h, 2 * w, c // 4)
        return _conv(p["head"], x)

    return Model(apply, params, (d(2, 3, 3, 3),))


def pixel_shuffle_channels_outside():
    """The same with torch's order of the channels, c outside of the positions."""
    d = _Draw()
    params = {"stem": d.conv(3, 4, bias=True), "up": d.conv(4, 16, bias=True), "head": d.conv(4, 2, bias=True)}

    def apply(p, x):
        x = jax.nn.relu(_conv(p["up"], jax.nn.relu(_conv(p["stem"], x))))
        n, h, w, c = x.shape
        x = x.reshape(n, h, w, c // 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(n, 2 * h, 2 * w, c // 4)
        return _conv(p["head"], x)

    return Model(apply, params, (d(2, 3, 3, 3),))


def cross_attention():
    """A decoder block: queries of one sequence, keys and values of another, three heads."""
    d = _Draw()
    heads, size, width = 3, 2, 6
    params = {
        "memory": d.dense(4, 5),
        "embed": d.dense(3, width),
        "query": d(width, heads, size),
        "key": d(5, heads, size),
        "value": d(5, heads, size),
        "out": d(heads, size, width),
        "up": d.dense(width, 8),
        "down": d.dense(8, width),
        "head": d.dense(width, 2),
    }

    def apply(p, x, y):
        memory = jnp.tanh(_dense(p["memory"], y))
        x = _dense(p["embed"], x)
        q = jnp.einsum("bld,dhk->blhk", x, p["query"])
        k, v = (jnp.einsum("bld,dhk->blhk", memory, p[name]) for name in ("key", "value"))
        x = x + jnp.einsum("blhk,hkd->bld", _attend(q, k, v), p["out"])
        x = x + _dense(p["down"], jax.nn.gelu(_dense(p["up"], x)))
        return _dense(p["head"], x)

    return Model(apply, params, (d(2, 4, 3), d(2, 5, 4)))


def tied_encoder_decoder():
    """One embedding for the encoder, the decoder and the output layer."""
    d = _Draw()
    width = 6
    params = {
        "embedding": d(7, width),
        "encoder": d.dense(width, width),
        "query": d(width, width),
        "key": d(width, width),
        "value": d(width, width),
        "decoder": d.dense(width, width),
    }

    def apply(p, source, target):
        memory = jnp.tanh(_dense(p["encoder"], p["embedding"][source]))
        x = p["embedding"][target]
        weights = jax.nn.softmax(jnp.einsum("bld,bmd->blm", x @ p["query"], memory @ p["key"]))
        x = x + jnp.einsum("blm,bmd->bld", weights, memory @ p["value"])
        return jnp.tanh(_dense(p["decoder"], x)) @ p["embedding"].T

    tokens = lambda *rows: jnp.asarray(rows, jnp.int32)
    return Model(apply, params, (tokens([1, 2, 3], [4, 5, 6]), tokens([0, 1], [2, 3])))


def normalised_by_channel_mean():
    """Divided by the mean over channels: n is in the program, so a masked channel counts."""
    d = _Draw()
    params = {"one": d.dense(5, 8), "two": d.dense(8, 6), "head": d.dense(6, 3)}

    def apply(p, x):
        x = jnp.exp(_dense(p["one"], x))
        x = x / jnp.mean(x, axis=-1, keepdims=True)
        return _dense(p["head"], jnp.tanh(_dense(p["two"], x)))

    return Model(apply, params, (d(3, 5),))


def layer_norm_between():
    """LayerNorm over hidden units, and over those of another layer."""
    d = _Draw()
    params = {"one": d.dense(5, 8), "norm": d.norm(8), "two": d.dense(8, 6), "head": d.dense(6, 3)}

    def apply(p, x):
        x = jax.nn.relu(_layer_norm(p["norm"], _dense(p["one"], x)))
        return _dense(p["head"], jnp.tanh(_dense(p["two"], x)))

    return Model(apply, params, (d(3, 5),))


def group_norm():
    """GroupNorm in two groups."""
    d = _Draw()
    params = {"one": d.conv(3, 8, bias=True), "norm": d.norm(8), "two": d.conv(8, 4, bias=True), "head": d.dense(4, 3)}

    def apply(p, x):
        y = _conv(p["one"], x)
        groups = y.reshape(*y.shape[:-1], 2, 4)
        mean = jnp.mean(groups, axis=(1, 2, 4), keepdims=True)
        var = jnp.var(groups, axis=(1, 2, 4), keepdims=True)
        y = ((groups - mean) * lax.rsqrt(var + 1e-5)).reshape(y.shape)
        y = jax.nn.relu(y * p["norm"]["scale"] + p["norm"]["bias"])
        return _dense(p["head"], jnp.mean(jax.nn.relu(_conv(p["two"], y)), axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),))


def instance_norm():
    """Statistics over positions, each channel by itself: exact."""
    d = _Draw()
    params = {"one": d.conv(3, 8), "norm": d.norm(8), "head": d.dense(8, 3)}

    def apply(p, x):
        y = _conv(p["one"], x)
        y = (y - jnp.mean(y, axis=(1, 2), keepdims=True)) * lax.rsqrt(jnp.var(y, axis=(1, 2), keepdims=True) + 1e-5)
        y = jax.nn.relu(y * p["norm"]["scale"] + p["norm"]["bias"])
        return _dense(p["head"], jnp.mean(y**2, axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),))


def softmax_over_channels():
    d = _Draw()
    params = {"one": d.dense(5, 8), "two": d.dense(8, 6), "head": d.dense(6, 3)}

    def apply(p, x):
        return _dense(p["head"], jnp.tanh(_dense(p["two"], jax.nn.softmax(_dense(p["one"], x)))))

    return Model(apply, params, (d(3, 5),))


def argmax_over_channels():
    d = _Draw()
    params = {"one": d.dense(5, 8), "two": d.dense(8, 6), "head": d.dense(6, 3)}

    def apply(p, x):
        x = _dense(p["one"], x)
        largest = jnp.argmax(x, axis=-1).astype(x.dtype)
        return _dense(p["head"], jnp.tanh(_dense(p["two"], x))) * largest[:, None]

    return Model(apply, params, (d(3, 5),))


def max_over_channels():
    """Maxout over the channels of one layer, and sorting over those of another."""
    d = _Draw()
    params = {"one": d.dense(5, 8), "two": d.dense(5, 6), "three": d.dense(5, 4), "head": d.dense(4, 3)}

    def apply(p, x):
        scale = jnp.max(_dense(p["one"], x), axis=-1, keepdims=True) + jnp.sort(_dense(p["two"], x))[:, -2:-1]
        return _dense(p["head"], jnp.tanh(_dense(p["three"], x))) * scale

    return Model(apply, params, (d(3, 5),))


def flatten_images():
    """NHWC flattened, then dense: a channel is every c-th input."""
    d = _Draw()
    params = {"conv": d.conv(2, 4, bias=True), "one": d.dense(3 * 2 * 4, 6), "head": d.dense(6, 3)}

    def apply(p, x):
        x = jnp.tanh(_conv(p["conv"], x))
        return _dense(p["head"], jax.nn.relu(_dense(p["one"], x.reshape(x.shape[0], -1))))

    return Model(apply, params, (d(2, 3, 2, 2),))


def flatten_channels_first():
    """NCHW flattened, then dense: a channel is a contiguous block of inputs."""
    d = _Draw()
    params = {"conv": d(4, 2, 3, 3), "one": d.dense(4 * 3 * 2, 6), "head": d.dense(6, 3)}

    def apply(p, x):
        x = jnp.tanh(lax.conv(x, p["conv"], (1, 1), "SAME"))
        return _dense(p["head"], jax.nn.relu(_dense(p["one"], x.reshape(x.shape[0], -1))))

    return Model(apply, params, (d(2, 2, 3, 2),))


def pooled_both_ways():
    """Global average and maximum, concatenated."""
    d = _Draw()
    params = {"conv": d.conv(2, 5, bias=True), "head": d.dense(10, 3)}

    def apply(p, x):
        x = _conv(p["conv"], x)
        return _dense(p["head"], jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1))

    return Model(apply, params, (d(2, 3, 3, 2),))


def transposed_convolution():
    """By gradient: conv_transpose with transpose_kernel, and a dilated convolution."""
    d = _Draw()
    params = {"down": d.conv(2, 6, bias=True), "up": d(3, 3, 4, 6), "last": d.conv(4, 2, bias=True)}

    def apply(p, x):
        x = jax.nn.relu(_conv(p["down"], x, 2))
        x = lax.conv_transpose(
            x, p["up"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), transpose_kernel=True
        )
        return _conv(p["last"], jax.nn.relu(x))

    return Model(apply, params, (d(2, 4, 4, 2),))


def glu():
    """A gated linear unit: half of the outputs gate the other half."""
    d = _Draw()
    params = {"stem": d.dense(5, 6), "wide": d.dense(6, 16), "down": d.dense(8, 6), "head": d.dense(6, 3)}

    def apply(p, x):
        x = jnp.tanh(_dense(p["stem"], x))
        a, b = jnp.split(_dense(p["wide"], x), 2, axis=-1)
        return _dense(p["head"], x + _dense(p["down"], a * jax.nn.sigmoid(b)))

    return Model(apply, params, (d(3, 5),))


def glu_interleaved():
    """Gate and value take turns along the outputs."""
    d = _Draw()
    params = {"wide": d.dense(5, 16), "head": d.dense(8, 3)}

    def apply(p, x):
        y = _dense(p["wide"], x)
        return _dense(p["head"], y[..., ::2] * jax.nn.sigmoid(y[..., 1::2]))

    return Model(apply, params, (d(3, 5),))


def concatenated_with_itself():
    d = _Draw()
    params = {"one": d.dense(5, 6), "two": d.dense(12, 4), "head": d.dense(4, 3)}

    def apply(p, x):
        x = jnp.tanh(_dense(p["one"], x))
        x = jnp.concatenate([x, x[..., ::-1] ** 2], axis=-1)
        return _dense(p["head"], jnp.tanh(_dense(p["two"], x)))

    return Model(apply, params, (d(3, 5),))


def repeated_in_einsum():
    """A Gram matrix, a bilinear form and a diagonal over the same group."""
    d = _Draw()
    params = {"one": d.dense(5, 6), "form": d(3, 6, 6), "scale": d(6), "gram": d(4, 4)}

    def apply(p, x):
        y = jnp.tanh(_dense(p["one"], x))
        gram = jnp.einsum("blc,bmc->blm", y, y)
        return jnp.einsum("blc,ocd,bld->blo", y, p["form"], y) + jnp.einsum("blc,c,blc->bl", y, p["scale"], y)[
            ..., None
        ] * jnp.sum(gram @ p["gram"], axis=-1, keepdims=True)

    return Model(apply, params, (d(2, 4, 5),))


def running_statistics():
    """Batch normalization in training: outputs and the new running statistics."""
    d = _Draw()
    params = {"one": d.conv(2, 6), "norm": d.norm(6), "head": d.dense(6, 3)}
    state = {"norm": d.statistics(6)}

    def apply(p, x, *, state):
        y = _conv(p["one"], x)
        mean, var = jnp.mean(y, axis=(0, 1, 2)), jnp.var(y, axis=(0, 1, 2))
        new = {"mean": 0.9 * state["norm"]["mean"] + 0.1 * mean, "var": 0.9 * state["norm"]["var"] + 0.1 * var}
        y = jax.nn.relu(_batch_norm(p["norm"], {"mean": mean, "var": var}, y))
        return _dense(p["head"], jnp.mean(y, axis=(1, 2))), {"norm": new}

    return Model(apply, params, (d(2, 3, 3, 2),), state)


class _Dropout(nn.Module):
    @nn.compact
    def __call__(self, x, key):
        x = nn.relu(nn.Dense(8)(x))
        keep = jax.random.bernoulli(key, 0.8, (x.shape[0], 1))  # stochastic depth
        x = x + jnp.where(keep, nn.Dense(8)(nn.relu(nn.Dense(6)(x))) / 0.8, 0)
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=True)(x))


def stochastic_depth():
    """Whole residual branches are dropped, one decision an example; dropout is off."""
    module, x = _Dropout(), _Draw(1)(4, 5)
    key = jax.random.key(3)
    params = _Draw(2).like(module.init(jax.random.key(0), x, key)["params"])
    return Model(lambda p, x, key: module.apply({"params": p}, x, key), params, (x, key))


def dropout():
    """One random bit for every unit: fewer units draw other bits, so these units stay."""
    d = _Draw()
    params = {"one": d.dense(5, 8), "two": d.dense(8, 6), "head": d.dense(6, 3)}

    def apply(p, x, key):
        x = jax.nn.relu(_dense(p["one"], x))
        x = jnp.where(jax.random.bernoulli(key, 0.5, x.shape), x / 0.5, 0)
        return _dense(p["head"], jnp.tanh(_dense(p["two"], x)))

    return Model(apply, params, (d(3, 5), jax.random.key(1)))


def learned_positions():
    """Token and position embeddings, a class token, and mean pooling with a mask."""
    d = _Draw()
    width = 6
    params = {
        "tokens": d(9, width),
        "positions": d(8, width),
        "segments": d(2, width),
        "up": d.dense(width, 8),
        "down": d.dense(8, width),
        "head": d.dense(width, 3),
    }

    def apply(p, tokens):
        x = p["tokens"][tokens] + p["positions"][: tokens.shape[1]] + p["segments"][(tokens > 4).astype(jnp.int32)]
        x = x + _dense(p["down"], jax.nn.gelu(_dense(p["up"], x)))
        valid = (tokens > 0)[..., None].astype(x.dtype)
        return _dense(p["head"], jnp.sum(x * valid, axis=1) / jnp.sum(valid, axis=1))

    return Model(apply, params, (jnp.asarray([[1, 2, 3, 0], [4, 5, 6, 7]], jnp.int32),))


def elman():
    """A plain recurrent network over a scan, bidirectional, outputs at every step."""
    d = _Draw()
    params = {way: {"input": d.dense(4, 6), "hidden": d(6, 6)} for way in ("forward", "backward")} | {
        "head": d.dense(12, 3)
    }

    def apply(p, x):
        x = jnp.swapaxes(x, 0, 1)
        hidden = []
        for way in ("forward", "backward"):
            q = p[way]

            def step(h, now, q=q):
                h = jnp.tanh(_dense(q["input"], now) + h @ q["hidden"])
                return h, h

            zeros = jnp.zeros((x.shape[1], 6), jnp.float32)
            hidden.append(lax.scan(step, zeros, x, reverse=way == "backward")[1])
        return _dense(p["head"], jnp.concatenate(hidden, axis=-1))

    return Model(apply, params, (d(2, 3, 4),))


def gru():
    """NNX's GRU under nnx.RNN."""

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.cell = nnx.GRUCell(4, 6, rngs=rngs)
            self.head = nnx.Linear(6, 3, rngs=rngs)

        def __call__(self, x):
            return self.head(nnx.RNN(self.cell, rngs=nnx.Rngs(0))(x)[:, -1])

    apply, params, _ = nnx_function(Net(nnx.Rngs(0)))
    return Model(apply, params, (_Draw(1)(2, 3, 4),))


def mixture_of_experts():
    """Experts as a stacked leaf with a soft gate, and a hard choice of one expert by index."""
    d = _Draw()
    params = {"stem": d.dense(5, 6), "gate": d.dense(6, 3), "up": d(3, 6, 8), "down": d(3, 8, 6), "head": d.dense(6, 2)}

    def apply(p, x):
        x = jnp.tanh(_dense(p["stem"], x))
        gate = jax.nn.softmax(_dense(p["gate"], x))
        y = jnp.einsum("bef,efd->bed", jax.nn.relu(jnp.einsum("bd,edf->bef", x, p["up"])), p["down"])
        return _dense(p["head"], x + jnp.einsum("be,bed->bd", gate, y))

    return Model(apply, params, (d(3, 5),))


def low_rank():
    """A frozen kernel plus a product of two thin ones (LoRA), and weight normalization of another."""
    d = _Draw()
    params = {
        "base": d.dense(5, 8),
        "a": d(5, 2),
        "b": d(2, 8),
        "direction": d(8, 6),
        "length": d(6),
        "head": d.dense(6, 3),
    }

    def apply(p, x):
        x = jax.nn.relu(_dense(p["base"], x) + (x @ p["a"]) @ p["b"])
        norm = jnp.sqrt(jnp.sum(p["direction"] ** 2, axis=0) + 1e-6)
        return _dense(p["head"], jnp.tanh(x @ (p["direction"] * (p["length"] / norm))))

    return Model(apply, params, (d(3, 5),))


def mixer():
    """MLP-Mixer: one MLP over positions, one over channels."""
    d = _Draw()
    params = {
        "embed": d.dense(3, 6),
        "tokens_up": d.dense(4, 5),
        "tokens_down": d.dense(5, 4),
        "up": d.dense(6, 8),
        "down": d.dense(8, 6),
        "head": d.dense(6, 2),
    }

    def apply(p, x):
        x = _dense(p["embed"], x)
        y = jnp.swapaxes(x, 1, 2)
        x = x + jnp.swapaxes(_dense(p["tokens_down"], jax.nn.gelu(_dense(p["tokens_up"], y))), 1, 2)
        x = x + _dense(p["down"], jax.nn.gelu(_dense(p["up"], x)))
        return _dense(p["head"], jnp.mean(x, axis=1))

    return Model(apply, params, (d(2, 4, 3),))


def autoencoder():
    """Decoder with the encoder's weights transposed."""
    d = _Draw()
    params = {"one": d.dense(5, 8), "two": d.dense(8, 4), "bias": d(8), "out": d(5)}

    def apply(p, x):
        code = jnp.tanh(_dense(p["two"], jax.nn.relu(_dense(p["one"], x))))
        y = jax.nn.relu(code @ p["two"]["kernel"].T + p["bias"])
        return y @ p["one"]["kernel"].T + p["out"]

    return Model(apply, params, (d(3, 5),))


def vmapped_ensemble():
    """Three networks stacked in every leaf, under vmap; the same units are removed from all of them."""
    d = _Draw()
    params = {"one": {"kernel": d(3, 5, 8), "bias": d(3, 8)}, "head": {"kernel": d(3, 8, 2), "bias": d(3, 2)}}

    def one(p, x):
        return _dense(p["head"], jnp.tanh(_dense(p["one"], x)))

    def apply(p, x):
        return jnp.mean(jax.vmap(one, in_axes=(0, None))(p, x), axis=0)

    return Model(apply, params, (d(4, 5),))


def fused_heads():
    """One projection for query, key and value, heads inside: (3, heads, size) merged into one axis."""
    d = _Draw()
    width, heads, size = 6, 3, 4
    params = {"qkv": d.dense(width, 3 * heads * size), "out": d.dense(heads * size, width), "head": d.dense(width, 2)}

    def apply(p, x):
        b, n, _ = x.shape
        q, k, v = jnp.moveaxis(_dense(p["qkv"], x).reshape(b, n, 3, heads, size), 2, 0)
        return _dense(p["head"], x + _dense(p["out"], _attend(q, k, v).reshape(b, n, -1)))

    return Model(apply, params, (d(2, 4, width),))


def interleaved_heads():
    """As in GPT-NeoX: (heads, 3 size) merged, query, key and value inside each head."""
    d = _Draw()
    width, heads, size = 6, 3, 4
    params = {"qkv": d.dense(width, 3 * heads * size), "out": d.dense(heads * size, width), "head": d.dense(width, 2)}

    def apply(p, x):
        b, n, _ = x.shape
        y = _dense(p["qkv"], x).reshape(b, n, heads, 3 * size)
        q, k, v = jnp.split(y, 3, axis=-1)
        return _dense(p["head"], x + _dense(p["out"], _attend(q, k, v).reshape(b, n, -1)))

    return Model(apply, params, (d(2, 4, width),))


def identity_products():
    """Products with an identity matrix, by comparison or one-hot, one in a branch chosen by the platform."""
    d = _Draw()
    params = {"one": d.dense(5, 8), "two": d.dense(8, 6), "three": d.dense(6, 4), "head": d.dense(4, 3)}

    def materialized(x):
        by_product = lambda x: (x.reshape(-1, x.shape[-1]) @ jnp.eye(x.shape[-1])).reshape(x.shape)
        return lax.platform_dependent(x, cpu=by_product, default=lambda x: x)

    def apply(p, x):
        h = materialized(_dense(p["one"], x))  # not zero where it is masked, if its bias were not
        h = materialized(jax.nn.sigmoid(_dense(p["two"], h)))
        h = jnp.einsum("oi,bli->blo", jax.nn.one_hot(jnp.arange(4), 4), _dense(p["three"], h))
        return _dense(p["head"], jnp.tanh(h))

    return Model(apply, params, (d(2, 3, 5),))


MODELS = {
    build.__name__: build
    for build in (
        two_heads, siamese, gated_residual, dense_skip, squeeze_excite_reduction, shuffle,
        shuffle_of_odd_groups, vmapped_convolutions, grouped_inputs, pixel_shuffle,
        pixel_shuffle_channels_outside, cross_attention, tied_encoder_decoder, normalised_by_channel_mean,
        layer_norm_between, group_norm, instance_norm, softmax_over_channels, argmax_over_channels, max_over_channels,
        flatten_images, flatten_channels_first, pooled_both_ways, transposed_convolution, glu, glu_interleaved,
        concatenated_with_itself, repeated_in_einsum, running_statistics, stochastic_depth, dropout,
        learned_positions, elman, gru, mixture_of_experts, low_rank, mixer, autoencoder, vmapped_ensemble,
        fused_heads, interleaved_heads, identity_products,
    )
}  # fmt: skip
