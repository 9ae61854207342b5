"""Small networks after published architectures: windows, latents, caches, experts, state spaces, graphs.

As in ``models``, every parameter is random, and ``MODELS`` has the builders by name.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from tests.pruning.structured.models import Model, _attend, _conv, _dense, _Draw, _layer_norm, _rms_norm


def swin():
    """Attention in shifted windows with a table of relative positions, and merged patches (Liu et al., 2021)."""
    d = _Draw()
    window, width, heads, size = 2, 8, 2, 4
    params = {
        "embed": d.dense(3, width),
        "norm": d.norm(width),
        "qkv": d.dense(width, 3 * heads * size),
        "table": d((2 * window - 1) ** 2, heads),
        "out": d.dense(heads * size, width),
        "merge": d.dense(4 * width, 6),
        "head": d.dense(6, 3),
    }
    places = np.stack(np.meshgrid(np.arange(window), np.arange(window), indexing="ij"), -1).reshape(-1, 2)
    apart = places[:, None] - places[None] + window - 1
    index = (apart[..., 0] * (2 * window - 1) + apart[..., 1]).reshape(-1)

    def apply(p, x):
        x = _dense(p["embed"], x)
        b, h, w, _ = x.shape
        y = jnp.roll(_layer_norm(p["norm"], x), (-1, -1), axis=(1, 2))
        y = y.reshape(b, h // window, window, w // window, window, width).transpose(0, 1, 3, 2, 4, 5)
        y = _dense(p["qkv"], y.reshape(-1, window**2, width))
        q, k, v = y.reshape(-1, window**2, 3, heads, size).transpose(2, 0, 3, 1, 4)
        scores = q @ jnp.swapaxes(k, -1, -2) / 2 + p["table"][index].reshape(window**2, -1, heads).transpose(2, 0, 1)
        y = jnp.swapaxes(jax.nn.softmax(scores) @ v, 1, 2).reshape(-1, window**2, heads * size)
        y = _dense(p["out"], y).reshape(b, h // window, w // window, window, window, width)
        x = x + jnp.roll(y.transpose(0, 1, 3, 2, 4, 5).reshape(b, h, w, width), (1, 1), axis=(1, 2))
        x = x.reshape(b, h // 2, 2, w // 2, 2, width).transpose(0, 1, 3, 2, 4, 5).reshape(b, h // 2, w // 2, -1)
        return _dense(p["head"], jnp.mean(jax.nn.gelu(_dense(p["merge"], x)), axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),))


def perceiver():
    """Latents that read the inputs twice with the same weights, and queries that read the latents."""
    d = _Draw()
    latents, width, inner = 4, 8, 6
    params = {
        "latents": d(latents, width),
        "embed": d.dense(3, inner),
        "key_value": d.dense(inner, 2 * width),
        "query": d.dense(width, width),
        "out": d.dense(width, width),
        "up": d.dense(width, 10),
        "down": d.dense(10, width),
        "queries": d(2, 6),
        "read": {"query": d.dense(6, width), "key": d.dense(width, width), "value": d.dense(width, 7)},
        "head": d.dense(7, 3),
    }

    def apply(p, x):
        x = jax.nn.gelu(_dense(p["embed"], x))
        z = jnp.broadcast_to(p["latents"], (x.shape[0], latents, width))
        for _ in range(2):
            k, v = jnp.split(_dense(p["key_value"], x), 2, axis=-1)
            z = z + _dense(p["out"], jax.nn.softmax(jnp.einsum("blc,bnc->bln", _dense(p["query"], z), k)) @ v)
            z = z + _dense(p["down"], jax.nn.gelu(_dense(p["up"], z)))
        read = p["read"]
        scores = jnp.einsum("qc,blc->bql", _dense(read["query"], p["queries"]), _dense(read["key"], z))
        return _dense(p["head"], jnp.mean(jax.nn.softmax(scores) @ _dense(read["value"], z), axis=1))

    return Model(apply, params, (d(2, 5, 3),))


def decoding_step():
    """One token, grouped queries, rotary position, and a cache of keys and values as the state."""
    d = _Draw()
    width, heads, shared, size, length = 8, 4, 2, 4, 6
    params = {
        "embedding": d(7, width),
        "norm": d(width, mean=1, scale=0.3),
        "query": d(width, heads * size),
        "key": d(width, shared * size),
        "value": d(width, shared * size),
        "out": d(heads * size, width),
        "gate_up": d(width, 12),
        "down": d(6, width),
        "head": d(width, 7),
    }
    state = {"key": d(2, length, shared, size), "value": d(2, length, shared, size)}

    def rotated(x, angle):
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * jnp.cos(angle) - b * jnp.sin(angle), b * jnp.cos(angle) + a * jnp.sin(angle)], -1)

    def apply(p, token, place, *, state):
        x = p["embedding"][token]
        y = _rms_norm(p["norm"], x)
        angle = place * 0.1 ** jnp.arange(size // 2, dtype=jnp.float32)
        query = rotated((y @ p["query"]).reshape(-1, heads, size), angle)
        new = {
            "key": rotated((y @ p["key"]).reshape(-1, shared, size), angle),
            "value": (y @ p["value"]).reshape(-1, shared, size),
        }
        cache = {name: lax.dynamic_update_slice(state[name], new[name][:, None], (0, place, 0, 0)) for name in new}
        scores = jnp.einsum("bkgs,bnks->bkgn", query.reshape(-1, shared, heads // shared, size), cache["key"]) / 2
        weights = jax.nn.softmax(jnp.where(jnp.arange(length) <= place, scores, -1e9))
        x = x + jnp.einsum("bkgn,bnks->bkgs", weights, cache["value"]).reshape(-1, heads * size) @ p["out"]
        gate, up = jnp.split(x @ p["gate_up"], 2, axis=-1)
        return (x + (jax.nn.silu(gate) * up) @ p["down"]) @ p["head"], cache

    return Model(apply, params, (jnp.array([1, 2]), jnp.int32(3)), state)


def experts_with_a_capacity():
    """Each token goes to its two best experts, by one-hot matrices of dispatch and of combination."""
    d = _Draw()
    count, width, hidden = 3, 6, 8
    params = {"stem": d.dense(5, width), "gate": d(width, count), "head": d.dense(width, 2)}
    params |= {"up": d(count, width, hidden), "down": d(count, hidden, width)}

    def apply(p, x):
        x = jnp.tanh(_dense(p["stem"], x))
        weights, best = lax.top_k(jax.nn.softmax(x @ p["gate"]), 2)
        chosen = jax.nn.one_hot(best, count)
        place = jnp.cumsum(chosen.reshape(-1, count), axis=0).reshape(chosen.shape) - chosen
        dispatch = chosen[..., None] * jax.nn.one_hot(place.astype(jnp.int32), len(x))
        y = jnp.einsum("nkec,nd->ecd", dispatch, x)
        y = jnp.einsum("ecf,efd->ecd", jax.nn.relu(jnp.einsum("ecd,edf->ecf", y, p["up"])), p["down"])
        return _dense(p["head"], x + jnp.einsum("nk,nkec,ecd->nd", weights, dispatch, y))

    return Model(apply, params, (d(4, 5),))


def wavenet():
    """Gated causal convolutions, dilated, with a residual stream and a sum of skips (van den Oord et al., 2016)."""
    d = _Draw()
    width, gated, skipped = 6, 8, 5
    layer = lambda: {
        "kernel": d(2, width, 2 * gated),
        "residual": d.dense(gated, width),
        "skip": d.dense(gated, skipped),
    }
    params = {"stem": d(1, width), "layers": [layer() for _ in range(2)], "head": d.dense(skipped, 3)}

    def apply(p, x):
        x, skips = x @ p["stem"], jnp.zeros(())
        for i, layer in enumerate(p["layers"]):
            y = lax.conv_general_dilated(
                x, layer["kernel"], (1,), [(2**i, 0)], rhs_dilation=(2**i,), dimension_numbers=("NWC", "WIO", "NWC")
            )
            a, b = jnp.split(y, 2, axis=-1)
            y = jnp.tanh(a) * jax.nn.sigmoid(b)
            x, skips = x + _dense(layer["residual"], y), skips + _dense(layer["skip"], y)
        return _dense(p["head"], jax.nn.relu(skips))

    return Model(apply, params, (d(2, 6, 1),))


def diffusion_unet():
    """Scale and shift by an embedded time, group norm, attention over pixels, a skip by concatenation."""
    d = _Draw()
    width, inner = 8, 12
    params = {
        "time": [d.dense(4, 10), d.dense(10, 2 * width)],
        "stem": d.conv(3, width, bias=True),
        "norm": [d.norm(width), d.norm(2 * width)],
        "same": d.conv(width, width, bias=True),
        "down": d.conv(width, inner, bias=True),
        "qkv": d.dense(inner, 3 * inner),
        "out": d.dense(inner, inner),
        "up": d.conv(inner, width, bias=True),
        "head": d.conv(2 * width, 3, bias=True),
    }

    def group_norm(p, x):
        y = x.reshape(*x.shape[:3], 4, -1)
        mean = y.mean((1, 2, 4), keepdims=True)
        var = ((y - mean) ** 2).mean((1, 2, 4), keepdims=True)
        return ((y - mean) * lax.rsqrt(var + 1e-5)).reshape(x.shape) * p["scale"] + p["bias"]

    def apply(p, x, time):
        angle = time[:, None] * 0.3 ** jnp.arange(2.0)
        embedded = jax.nn.silu(_dense(p["time"][0], jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)))
        scale, shift = jnp.split(_dense(p["time"][1], embedded)[:, None, None], 2, axis=-1)
        x = _conv(p["stem"], x)
        x = x + _conv(p["same"], jax.nn.silu(group_norm(p["norm"][0], x) * (1 + scale) + shift))
        z = _conv(p["down"], x, stride=2)
        b, h, w, c = z.shape
        q, k, v = jnp.split(_dense(p["qkv"], z.reshape(b, h * w, c)), 3, axis=-1)
        z = z + _dense(p["out"], jax.nn.softmax(jnp.einsum("bqc,bkc->bqk", q, k)) @ v).reshape(z.shape)
        z = jax.image.resize(z, (b, 2 * h, 2 * w, c), "nearest")
        z = jnp.concatenate([_conv(p["up"], z), x], axis=-1)
        return _conv(p["head"], jax.nn.silu(group_norm(p["norm"][1], z)))

    return Model(apply, params, (d(2, 4, 4, 3), d(2)))


def albert():
    """One block three times, in a loop, with a factored embedding that is the head too (Lan et al., 2020)."""
    d = _Draw()
    width, heads, size = 8, 2, 4
    block = {"qkv": d(width, 3, heads, size), "out": d(heads, size, width)}
    block |= {"up": d.dense(width, 10), "down": d.dense(10, width), "norm": d(width, mean=1, scale=0.3)}
    params = {"embedding": d(9, 5), "project": d.dense(5, width), "block": block, "head": d.dense(width, 5)}

    def apply(p, tokens):
        def once(_, x):
            b = p["block"]
            q, k, v = jnp.einsum("blm,mahs->ablhs", _rms_norm(b["norm"], x), b["qkv"])
            x = x + jnp.einsum("blhs,hsm->blm", _attend(q, k, v), b["out"])
            return x + _dense(b["down"], jax.nn.gelu(_dense(b["up"], x)))

        x = lax.fori_loop(0, 3, once, _dense(p["project"], p["embedding"][tokens]))
        return _dense(p["head"], x) @ p["embedding"].T

    return Model(apply, params, (jnp.array([[1, 2, 3], [4, 5, 8]]),))


def parallel_block():
    """Attention with one key and feed-forward side by side, each from a part of one fused kernel (PaLM)."""
    d = _Draw()
    width, heads, size, hidden = 8, 3, 4, 6
    parts = np.cumsum([heads * size, size, size, hidden])
    params = {"embedding": d(9, width), "norm": d(width, mean=1, scale=0.3)}
    params |= {"fused": d(width, int(parts[-1]) + hidden), "out": d(heads * size + hidden, width)}

    def apply(p, tokens):
        x = p["embedding"][tokens]
        query, key, value, gate, up = jnp.split(_rms_norm(p["norm"], x) @ p["fused"], parts, axis=-1)
        query = query.reshape(*query.shape[:2], heads, size)
        weights = jax.nn.softmax(jnp.einsum("bqhs,bks->bhqk", query, key) / 2)
        attended = jnp.einsum("bhqk,bks->bqhs", weights, value).reshape(*x.shape[:2], -1)
        return (x + jnp.concatenate([attended, jax.nn.silu(gate) * up], axis=-1) @ p["out"]) @ p["embedding"].T

    return Model(apply, params, (jnp.array([[1, 2, 3], [4, 5, 8]]),))


def shuffle_of_halves():
    """ShuffleNet V2: half of the channels pass, the others are convolved, then all are shuffled."""
    d = _Draw()
    width = 8
    unit = lambda: {
        "one": d.conv(width // 2, width // 2, 1, bias=True),
        "depthwise": d.conv(1, width // 2, bias=True),
        "two": d.conv(width // 2, width // 2, 1, bias=True),
    }
    params = {"stem": d.conv(3, width, bias=True), "units": [unit() for _ in range(2)], "head": d.dense(width, 3)}

    def apply(p, x):
        x = jax.nn.relu(_conv(p["stem"], x))
        for unit in p["units"]:
            passed, y = jnp.split(x, 2, axis=-1)
            y = _conv(unit["depthwise"], jax.nn.relu(_conv(unit["one"], y)), groups=width // 2)
            x = jnp.concatenate([passed, jax.nn.relu(_conv(unit["two"], y))], axis=-1)
            x = x.reshape(*x.shape[:3], 2, -1).swapaxes(3, 4).reshape(x.shape)
        return _dense(p["head"], jnp.mean(x, axis=(1, 2)))

    return Model(apply, params, (d(2, 4, 4, 3),))


def graph_attention():
    """Attention over the edges of a graph that is an input, by sums over segments (Velickovic et al., 2018)."""
    d = _Draw()
    heads, size, width = 2, 4, 6
    params = {"kernel": d(5, heads, size), "sender": d(heads, size), "receiver": d(heads, size)}
    params |= {"merge": d.dense(heads * size, width), "head": d.dense(width, 3)}

    def apply(p, x, senders, receivers):
        nodes = len(x)
        h = jnp.einsum("nf,fhs->nhs", x, p["kernel"])
        score = lambda name: jnp.einsum("nhs,hs->nh", h, p[name])
        edges = jnp.exp(jax.nn.leaky_relu(score("sender")[senders] + score("receiver")[receivers]))
        weights = edges / jax.ops.segment_sum(edges, receivers, nodes)[receivers]
        h = jax.ops.segment_sum(h[senders] * weights[..., None], receivers, nodes).reshape(nodes, -1)
        h = jax.nn.elu(_dense(p["merge"], h))
        return _dense(p["head"], h + jax.ops.segment_sum(h[senders], receivers, nodes))

    return Model(apply, params, (d(4, 5), jnp.array([0, 1, 2, 3, 3, 1]), jnp.array([1, 2, 0, 0, 2, 3])))


def mamba():
    """A selective state space: causal depthwise convolution, and an associative scan over time."""
    d = _Draw()
    width, inner, states, rank = 6, 8, 3, 2
    params = {
        "stem": d.dense(4, width),
        "in": d.dense(width, 2 * inner),
        "conv": {"kernel": d(4, 1, inner), "bias": d(inner)},
        "select": d(inner, rank + 2 * states),
        "step": d.dense(rank, inner),
        "decay": d(inner, states),
        "skip": d(inner),
        "out": d.dense(inner, width),
        "head": d.dense(width, 3),
    }

    def apply(p, x):
        stream = _dense(p["stem"], x)
        x, gate = jnp.split(_dense(p["in"], stream), 2, axis=-1)
        x = lax.conv_general_dilated(
            x, p["conv"]["kernel"], (1,), [(3, 0)], dimension_numbers=("NWC", "WIO", "NWC"), feature_group_count=inner
        )
        x = jax.nn.silu(x + p["conv"]["bias"])
        step, read, write = jnp.split(x @ p["select"], [rank, rank + states], axis=-1)
        step = jax.nn.softplus(_dense(p["step"], step))
        kept = jnp.exp(-step[..., None] * jnp.exp(p["decay"]))
        added = step[..., None] * read[:, :, None] * x[..., None]
        _, h = lax.associative_scan(lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1]), (kept, added), axis=1)
        y = jnp.einsum("blin,bln->bli", h, write) + x * p["skip"]
        return _dense(p["head"], stream + _dense(p["out"], y * jax.nn.silu(gate)))

    return Model(apply, params, (d(2, 4, 4),))


def linear_attention():
    """Keys and values are summed before the queries read them; the feature map elu + 1 is 1 where a key is masked."""
    d = _Draw()
    width, heads, size, value = 6, 2, 4, 3
    params = {"stem": d.dense(4, width), "query": d(width, heads, size), "key": d(width, heads, size)}
    params |= {"value": d(width, heads, value), "out": d(heads, value, width), "head": d.dense(width, 3)}

    def apply(p, x):
        x = _dense(p["stem"], x)
        query, key, values = (jnp.einsum("bld,dhk->blhk", x, p[name]) for name in ("query", "key", "value"))
        query, key = jax.nn.elu(query) + 1, jax.nn.elu(key) + 1
        total = jnp.einsum("blhk,bhk->blh", query, key.sum(1))
        y = jnp.einsum("blhk,bhkv->blhv", query, jnp.einsum("blhk,blhv->bhkv", key, values)) / total[..., None]
        return _dense(p["head"], x + jnp.einsum("blhv,hvm->blm", y, p["out"]))

    return Model(apply, params, (d(2, 5, 4),))


def quantized_code():
    """A code is replaced by the nearest row of a code book, with a straight-through gradient (VQ-VAE)."""
    d = _Draw()
    params = {
        "one": d.dense(5, 8),
        "two": d.dense(8, 4),
        "book": d(6, 4),
        "three": d.dense(4, 7),
        "head": d.dense(7, 3),
    }

    def apply(p, x):
        z = _dense(p["two"], jax.nn.relu(_dense(p["one"], x)))
        distance = jnp.sum(z * z, -1, keepdims=True) - 2 * z @ p["book"].T + jnp.sum(p["book"] ** 2, -1)
        z = z + lax.stop_gradient(p["book"][jnp.argmin(distance, -1)] - z)
        return _dense(p["head"], jax.nn.relu(_dense(p["three"], z)))

    return Model(apply, params, (d(3, 5),))


def hypernetwork():
    """A network computes the kernel of another."""
    d = _Draw()
    params = {"one": d.dense(3, 6), "two": d.dense(6, 4 * 5), "stem": d.dense(5, 4), "head": d.dense(5, 2)}

    def apply(p, x, task):
        kernel = _dense(p["two"], jnp.tanh(_dense(p["one"], task))).reshape(-1, 4, 5)
        x = jax.nn.relu(_dense(p["stem"], x))
        return _dense(p["head"], jnp.tanh(jnp.einsum("bi,bio->bo", x, kernel)))

    return Model(apply, params, (d(3, 5), d(3, 3)))


def force_field():
    """The output is the gradient of a scalar network with respect to its input."""
    d = _Draw()
    params = {"one": d.dense(3, 8), "two": d.dense(8, 6), "out": d.dense(6, 1)}

    def apply(p, x):
        energy = lambda x: jnp.sum(_dense(p["out"], jnp.tanh(_dense(p["two"], jnp.sin(_dense(p["one"], x))))))
        return jax.grad(energy)(x)

    return Model(apply, params, (d(3, 3),))


MODELS = {
    build.__name__: build
    for build in (
        swin, perceiver, decoding_step, experts_with_a_capacity, wavenet, diffusion_unet, albert, parallel_block,
        shuffle_of_halves, graph_attention, mamba, linear_attention, quantized_code, hypernetwork, force_field,
    )
}  # fmt: skip
