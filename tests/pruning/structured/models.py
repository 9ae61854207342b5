"""Small networks of every kind that structured pruning has to handle, as functions, NNX, Linen and Equinox modules.

Parameters are random, biases and normalization parameters included, so that a channel removed wrongly shows in the
outputs. Each builder returns a ``Model``; ``MODELS`` has them all by name, each built once for all tests. Modules are
initialized under jit: one program instead of several for each shape.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax


class Model(NamedTuple):
    """A network as a function.

    Attributes:
      apply: ``apply(params, *inputs)``, or ``apply(params, *inputs, state=state)`` where there is a state.
      params: its parameters.
      inputs: example inputs, a batch of 2 or 3.
      state: batch statistics; None where there are none.
    """

    apply: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    state: Any = None

    def __call__(self, params, *inputs, state=None):
        """Run the network, with its own state unless another is given."""
        if self.state is None:
            return self.apply(params, *inputs)
        return self.apply(params, *inputs, state=self.state if state is None else state)


class _Draw:
    """Random weights, one after the other."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)

    def __call__(self, *shape, mean=0.0, scale=1.0, of=np.asarray):
        """Computed by numpy: jax would compile a program for each shape."""
        fan_in = np.prod(shape[:-1]) if len(shape) > 1 else 1
        return jax.device_put(of(mean + scale * self.rng.normal(size=shape) / np.sqrt(fan_in)).astype(np.float32))

    def dense(self, inputs, outputs):
        return {"kernel": self(inputs, outputs), "bias": self(outputs, scale=0.3)}

    def conv(self, inputs, outputs, window=3, bias=False):
        kernel = {"kernel": self(window, window, inputs, outputs)}
        return kernel | ({"bias": self(outputs, scale=0.3)} if bias else {})

    def norm(self, features):
        return {"scale": self(features, mean=1, scale=0.3), "bias": self(features, scale=0.3)}

    def statistics(self, features):
        return {"mean": self(features, scale=0.1), "var": self(features, scale=0.3, of=np.exp)}

    def like(self, tree):
        """Random values in place of every float leaf of a tree: initializers leave biases at 0."""
        move = lambda x: jax.device_put((np.asarray(x) + 0.3 * self.rng.normal(size=x.shape)).astype(x.dtype))
        return jax.tree.map(lambda x: move(x) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree)


def _dense(p, x):
    y = jnp.einsum("...i,io->...o", x, p["kernel"])
    return y + jnp.broadcast_to(p["bias"], y.shape) if "bias" in p else y


def _conv(p, x, stride=1, groups=1):
    y = lax.conv_general_dilated(
        x,
        p["kernel"],
        (stride, stride),
        "SAME",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=groups,
    )
    return y + jnp.broadcast_to(p["bias"], y.shape) if "bias" in p else y


def _batch_norm(p, s, x):
    factor = lax.rsqrt(s["var"] + 1e-5) * p["scale"]
    spread = lambda v: jnp.broadcast_to(v, x.shape)
    return (x - spread(s["mean"])) * spread(factor) + spread(p["bias"])


def _layer_norm(p, x):
    mean = jnp.mean(x, axis=-1, keepdims=True)
    var = jnp.mean((x - mean) ** 2, axis=-1, keepdims=True)
    y = (x - mean) * lax.rsqrt(var + 1e-5)
    return y * jnp.broadcast_to(p["scale"], y.shape) + jnp.broadcast_to(p["bias"], y.shape)


def _rms_norm(scale, x):
    y = x * lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5)
    return y * jnp.broadcast_to(scale, y.shape)


def _pool(x, size=2):
    window = (1, size, size, 1)
    return lax.reduce_window(x, -jnp.inf, lax.max, window, window, "VALID")


def mlp():
    d = _Draw()
    params = {"one": d.dense(5, 8), "two": d.dense(8, 6), "head": d.dense(6, 3)}

    def apply(p, x):
        return _dense(p["head"], jnp.tanh(_dense(p["two"], jax.nn.relu(_dense(p["one"], x)))))

    return Model(apply, params, (d(3, 5),))


def sigmoid_mlp():
    """f(0) is 0.5: a channel is 0 only after the kernel that reads it."""
    d = _Draw()
    params = {"one": d.dense(5, 8), "two": d.dense(8, 6), "head": d.dense(6, 3)}

    def apply(p, x):
        return _dense(p["head"], jnp.cos(_dense(p["two"], jax.nn.sigmoid(_dense(p["one"], x)))))

    return Model(apply, params, (d(3, 5),))


def lenet():
    d = _Draw()
    params = {
        "conv1": d.conv(1, 4, bias=True),
        "conv2": d.conv(4, 6, bias=True),
        "dense1": d.dense(2 * 2 * 6, 8),
        "head": d.dense(8, 3),
    }

    def apply(p, x):
        x = _pool(jax.nn.relu(_conv(p["conv1"], x)))
        x = _pool(jax.nn.relu(_conv(p["conv2"], x)))
        return _dense(p["head"], jax.nn.relu(_dense(p["dense1"], x.reshape(x.shape[0], -1))))

    return Model(apply, params, (d(2, 8, 8, 1),))


def vgg():
    d = _Draw()
    widths = [3, 4, 6]
    names = ["a", "b"]
    params = {n: {"conv": d.conv(i, o), "norm": d.norm(o)} for n, i, o in zip(names, widths, widths[1:], strict=False)}
    params["head"] = d.dense(6, 3)
    state = {n: d.statistics(o) for n, o in zip(names, widths[1:], strict=True)}

    def apply(p, x, *, state):
        for name in names:
            x = jax.nn.relu(_batch_norm(p[name]["norm"], state[name], _conv(p[name]["conv"], x)))
        return _dense(p["head"], jnp.mean(x, axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),), state)


def resnet20():
    """Option A: shortcuts subsample the image and pad the channels with zeros."""
    d = _Draw()
    widths = (4, 8)
    params = {"stem": {"conv": d.conv(3, 4), "norm": d.norm(4)}, "head": d.dense(8, 3)}
    state = {"stem": d.statistics(4)}
    before = 4
    for i, width in enumerate(widths):
        params[f"block{i}"] = {
            "conv1": d.conv(before, width),
            "norm1": d.norm(width),
            "conv2": d.conv(width, width),
            "norm2": d.norm(width),
        }
        state[f"block{i}"] = {"norm1": d.statistics(width), "norm2": d.statistics(width)}
        before = width

    def apply(p, x, *, state):
        x = jax.nn.relu(_batch_norm(p["stem"]["norm"], state["stem"], _conv(p["stem"]["conv"], x)))
        for i, width in enumerate(widths):
            b, s = p[f"block{i}"], state[f"block{i}"]
            stride = 1 if i == 0 else 2
            y = jax.nn.relu(_batch_norm(b["norm1"], s["norm1"], _conv(b["conv1"], x, stride)))
            y = _batch_norm(b["norm2"], s["norm2"], _conv(b["conv2"], y))
            if i:
                more = width - widths[i - 1]
                x = jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (more // 2, more // 2)))
            x = jax.nn.relu(x + y)
        return _dense(p["head"], jnp.mean(x, axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),), state)


def resnet50():
    """Bottlenecks with a projection."""
    d = _Draw()
    params = {
        "stem": d.conv(3, 4, bias=True),
        "reduce": d.conv(4, 3, 1, bias=True),
        "middle": d.conv(3, 3, bias=True),
        "expand": d.conv(3, 8, 1, bias=True),
        "projection": d.conv(4, 8, 1, bias=True),
        "head": d.dense(8, 3),
    }

    def apply(p, x):
        x = jax.nn.relu(_conv(p["stem"], x))
        y = jax.nn.relu(_conv(p["middle"], jax.nn.relu(_conv(p["reduce"], x)), 2))
        x = jax.nn.relu(_conv(p["expand"], y) + _conv(p["projection"], x, 2))
        return _dense(p["head"], jnp.mean(x, axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),))


def mobilenet():
    """An inverted residual with a depthwise convolution."""
    d = _Draw()
    params = {
        "stem": d.conv(3, 4, bias=True),
        "expand": d.conv(4, 8, 1, bias=True),
        "depthwise": d.conv(1, 8, bias=True),
        "project": d.conv(8, 4, 1, bias=True),
        "head": d.dense(4, 3),
    }

    def apply(p, x):
        x = jax.nn.relu6(_conv(p["stem"], x))
        y = jax.nn.relu6(_conv(p["expand"], x))
        y = jax.nn.relu6(_conv(p["depthwise"], y, groups=8))
        return _dense(p["head"], jnp.mean(x + _conv(p["project"], y), axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),))


def grouped():
    """A convolution in three groups of two channels, as in ResNeXt."""
    d = _Draw()
    params = {
        "stem": d.conv(3, 6, 1, bias=True),
        "grouped": d.conv(2, 6, bias=True),
        "last": d.conv(6, 4, 1, bias=True),
        "head": d.dense(4, 3),
    }

    def apply(p, x):
        x = jax.nn.relu(_conv(p["stem"], x))
        x = jax.nn.relu(_conv(p["grouped"], x, groups=3))
        return _dense(p["head"], jnp.mean(jax.nn.relu(_conv(p["last"], x)), axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),))


def densenet():
    d = _Draw()
    params = {
        "stem": d.conv(3, 4, bias=True),
        "one": d.conv(4, 3, bias=True),
        "two": d.conv(7, 3, bias=True),
        "head": d.dense(10, 3),
    }

    def apply(p, x):
        x = jax.nn.relu(_conv(p["stem"], x))
        for name in ("one", "two"):
            x = jnp.concatenate([x, jax.nn.relu(_conv(p[name], x))], axis=-1)
        return _dense(p["head"], jnp.mean(x, axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),))


def unet():
    d = _Draw()
    params = {
        "down": d.conv(1, 4, bias=True),
        "bottom": d.conv(4, 6, bias=True),
        "up": {"kernel": d(2, 2, 6, 4)},
        "last": d.conv(8, 4, bias=True),
        "head": d.conv(4, 2, 1, bias=True),
    }

    def apply(p, x):
        skip = jax.nn.relu(_conv(p["down"], x))
        y = jax.nn.relu(_conv(p["bottom"], _pool(skip)))
        y = lax.conv_transpose(y, p["up"]["kernel"], (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        y = jnp.concatenate([skip, jax.nn.relu(y)], axis=-1)
        return _conv(p["head"], jax.nn.relu(_conv(p["last"], y)))

    return Model(apply, params, (d(2, 4, 4, 1),))


def squeeze_excite():
    d = _Draw()
    params = {
        "stem": d.conv(3, 6, bias=True),
        "squeeze": d.dense(6, 4),
        "excite": d.dense(4, 6),
        "head": d.dense(6, 3),
    }

    def apply(p, x):
        x = jax.nn.relu(_conv(p["stem"], x))
        gate = jax.nn.sigmoid(_dense(p["excite"], jax.nn.relu(_dense(p["squeeze"], jnp.mean(x, axis=(1, 2))))))
        x = x * jnp.broadcast_to(gate[:, None, None, :], x.shape)
        return _dense(p["head"], jnp.mean(x, axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),))


def _rope(x):
    length, half = x.shape[1], x.shape[-1] // 2
    angle = jnp.arange(length, dtype=jnp.float32)[:, None] * (0.1 ** jnp.arange(half, dtype=jnp.float32))[None, :]
    sin, cos = (jnp.broadcast_to(f(angle)[None, :, None, :], (*x.shape[:-1], half)) for f in (jnp.sin, jnp.cos))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def _attend(q, k, v):
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.float32(np.sqrt(q.shape[-1]))
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)


def transformer():
    """A decoder block: grouped queries, rotary positions, SwiGLU and RMS norm, with tied embeddings."""
    d = _Draw()
    model, heads, shared, size, hidden = 8, 4, 2, 4, 6
    params = {
        "embedding": d(7, model),
        "norm1": 1 + 0.3 * d(model),
        "query": d(model, heads, size),
        "key": d(model, shared, size),
        "value": d(model, shared, size),
        "out": d(heads, size, model),
        "norm2": 1 + 0.3 * d(model),
        "gate": d(model, hidden),
        "up": d(model, hidden),
        "down": d(hidden, model),
    }

    def apply(p, tokens):
        x = p["embedding"][tokens]
        y = _rms_norm(p["norm1"], x)
        q, k, v = (jnp.einsum("bld,dhk->blhk", y, p[name]) for name in ("query", "key", "value"))
        q, k = _rope(q), _rope(k)
        repeats = heads // shared
        k, v = (jnp.repeat(a, repeats, axis=2) for a in (k, v))
        x = x + jnp.einsum("blhk,hkd->bld", _attend(q, k, v), p["out"])
        y = _rms_norm(p["norm2"], x)
        x = x + (jax.nn.silu(y @ p["gate"]) * (y @ p["up"])) @ p["down"]
        return x @ p["embedding"].T

    return Model(apply, params, (jnp.asarray([[1, 2, 3], [4, 5, 6]], jnp.int32),))


def vit():
    """Patches, a class token, positions, one fused query-key-value projection and LayerNorm."""
    d = _Draw()
    model, heads, size, hidden = 8, 2, 4, 6
    params = {
        "patches": {"kernel": d(2, 2, 3, model), "bias": 0.3 * d(model)},
        "token": d(1, 1, model),
        "positions": 0.3 * d(1, 5, model),
        "norm1": d.norm(model),
        "qkv": d.dense(model, 3 * heads * size),
        "out": d.dense(heads * size, model),
        "norm2": d.norm(model),
        "up": d.dense(model, hidden),
        "down": d.dense(hidden, model),
        "head": d.dense(model, 3),
    }

    def apply(p, x):
        dims = ("NHWC", "HWIO", "NHWC")
        x = lax.conv_general_dilated(x, p["patches"]["kernel"], (2, 2), "VALID", dimension_numbers=dims)
        x = x + jnp.broadcast_to(p["patches"]["bias"], x.shape)
        x = x.reshape(x.shape[0], -1, x.shape[-1])
        x = jnp.concatenate([jnp.broadcast_to(p["token"], (x.shape[0], 1, x.shape[-1])), x], axis=1)
        x = x + jnp.broadcast_to(p["positions"], x.shape)
        y = _dense(p["qkv"], _layer_norm(p["norm1"], x))
        q, k, v = (y.reshape(*y.shape[:2], 3, heads, size)[:, :, i] for i in range(3))
        y = _attend(q, k, v)
        x = x + _dense(p["out"], y.reshape(*y.shape[:2], -1))
        x = x + _dense(p["down"], jax.nn.gelu(_dense(p["up"], _layer_norm(p["norm2"], x))))
        return _dense(p["head"], x[:, 0])

    return Model(apply, params, (d(2, 4, 4, 3),))


def lstm():
    d = _Draw()
    hidden = 6
    params = {"input": d(4, 4 * hidden), "hidden": d.dense(hidden, 4 * hidden), "head": d.dense(hidden, 3)}

    def apply(p, x):
        def step(carry, now):
            h, c = carry
            i, f, g, o = jnp.split(now @ p["input"] + _dense(p["hidden"], h), 4, axis=-1)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            return (jax.nn.sigmoid(o) * jnp.tanh(c), c), None

        zeros = jnp.zeros((x.shape[0], hidden), jnp.float32)
        (h, _), _ = lax.scan(step, (zeros, zeros), jnp.swapaxes(x, 0, 1))
        return _dense(p["head"], h)

    return Model(apply, params, (d(2, 3, 4),))


def scanned():
    """Blocks stacked in one leaf: each layer loses the same channels."""
    d = _Draw()
    layers, model, hidden = 3, 5, 6
    params = {
        "stem": d.dense(4, model),
        "blocks": {
            "up": {"kernel": d(layers, model, hidden), "bias": 0.3 * d(layers, hidden)},
            "down": {"kernel": 0.3 * d(layers, hidden, model), "bias": 0.3 * d(layers, model)},
        },
        "head": d.dense(model, 3),
    }

    def apply(p, x):
        @jax.checkpoint
        def block(x, b):
            return x + _dense(b["down"], jax.nn.gelu(_dense(b["up"], x))), None

        return _dense(p["head"], lax.scan(block, _dense(p["stem"], x), p["blocks"])[0])

    return Model(apply, params, (d(2, 4),))


def branches():
    """A cond, a while loop and a function with its own derivative."""
    d = _Draw()
    params = {"one": d.dense(4, 6), "two": d.dense(6, 5), "head": d.dense(5, 3)}

    @jax.custom_vjp
    def steps(x):
        return jnp.sign(x) * jnp.round(jnp.abs(x) * 4) / 4

    steps.defvjp(lambda x: (steps(x), None), lambda _, g: (g,))

    def apply(p, x):
        y = jax.nn.relu(_dense(p["one"], x))
        y = lax.cond(jnp.sum(x) > 0, lambda v: v * 2, lambda v: v * v, y)
        y = lax.fori_loop(0, 3, lambda _, v: jnp.tanh(v), y)
        return _dense(p["head"], steps(jnp.tanh(_dense(p["two"], y))))

    return Model(apply, params, (d(3, 4),))


def nnx_function(model):
    """An NNX module as a function of its parameters, with random values, and its batch statistics."""
    graphdef, params, statistics, rest = nnx.split(model, nnx.Param, nnx.BatchStat, ...)
    params = nnx.to_pure_dict(_Draw().like(params))
    has_statistics = bool(jax.tree.leaves(statistics))
    state = nnx.to_pure_dict(statistics) if has_statistics else None
    template = nnx.state(model, nnx.Param)

    def apply(params, *inputs, state=None):
        own, stats = jax.tree.map(lambda x: x, template), jax.tree.map(lambda x: x, statistics)
        nnx.replace_by_pure_dict(own, params)
        if state is not None:
            nnx.replace_by_pure_dict(stats, state)
        return nnx.merge(graphdef, own, stats, rest)(*inputs)

    return apply, params, state


class _NNXConvNet(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(3, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, use_running_average=True, rngs=rngs)
        self.last = nnx.Conv(6, 4, (3, 3), rngs=rngs)
        self.head = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.last(nnx.relu(self.norm(self.conv(x)))))
        return self.head(jnp.mean(x, axis=(1, 2)))


class _NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(8, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, 8, decode=False, rngs=rngs)
        self.up = nnx.Linear(8, 6, rngs=rngs)
        self.down = nnx.Linear(6, 8, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(nnx.gelu(self.up(x)))


class _LinenRecurrent(nn.Module):
    @nn.compact
    def __call__(self, x):
        y = nn.RNN(nn.OptimizedLSTMCell(6))(x)
        return nn.Dense(3)(y[:, -1])


class _LinenConvNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3))(x)))
        x = nn.relu(nn.Conv(4, (3, 3))(x))
        return nn.Dense(3)(jnp.mean(x, axis=(1, 2)))


def nnx_conv_net_module():
    return nnx.jit(lambda: _NNXConvNet(nnx.Rngs(0)))()


def nnx_conv_net():
    apply, params, state = nnx_function(nnx_conv_net_module())
    return Model(apply, params, (_Draw(1)(2, 4, 4, 3),), state)


def nnx_block_module():
    return nnx.jit(lambda: _NNXBlock(nnx.Rngs(0)))()


def nnx_block():
    apply, params, _ = nnx_function(nnx_block_module())
    return Model(apply, params, (_Draw(1)(2, 3, 8),))


def linen_recurrent_module():
    return _LinenRecurrent()


def linen_recurrent():
    module, x = _LinenRecurrent(), _Draw(1)(2, 3, 4)
    params = _Draw(2).like(jax.jit(module.init)(jax.random.key(0), x)["params"])
    return Model(lambda p, x: module.apply({"params": p}, x), params, (x,))


def linen_conv_net_module():
    return _LinenConvNet()


def linen_conv_net():
    module, x = _LinenConvNet(), _Draw(1)(2, 4, 4, 3)
    variables = jax.jit(module.init)(jax.random.key(0), x)
    params, state = _Draw(2).like(variables["params"]), variables["batch_stats"]

    def apply(p, x, *, state):
        return module.apply({"params": p, "batch_stats": state}, x)

    return Model(apply, params, (x,), state)


def equinox_mlp():
    module = eqx.filter_jit(eqx.nn.MLP)(5, 3, 8, 2, key=jax.random.key(0))
    arrays, static = eqx.partition(module, eqx.is_array)
    params = _Draw(1).like(arrays)
    return Model(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, (_Draw(2)(3, 5),))


class _EquinoxBlock(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear

    def __init__(self, key):
        one, two, three = jax.random.split(key, 3)
        self.attention = eqx.nn.MultiheadAttention(2, 8, key=one)
        self.up = eqx.nn.Linear(8, 6, key=two)
        self.down = eqx.nn.Linear(6, 8, key=three)

    def __call__(self, x):
        x = x + self.attention(x, x, x)
        return x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(x)))


def equinox_block_module():
    return eqx.filter_jit(_EquinoxBlock)(jax.random.key(0))


def equinox_block():
    arrays, static = eqx.partition(equinox_block_module(), eqx.is_array)
    params = _Draw(1).like(arrays)
    return Model(lambda p, x: jax.vmap(eqx.combine(p, static))(x), params, (_Draw(2)(2, 3, 8),))


MODELS = {
    build.__name__: functools.cache(build)
    for build in (
        mlp,
        sigmoid_mlp,
        lenet,
        vgg,
        resnet20,
        resnet50,
        mobilenet,
        grouped,
        densenet,
        unet,
        squeeze_excite,
        transformer,
        vit,
        lstm,
        scanned,
        branches,
        nnx_conv_net,
        nnx_block,
        linen_recurrent,
        linen_conv_net,
        equinox_mlp,
        equinox_block,
    )
}
