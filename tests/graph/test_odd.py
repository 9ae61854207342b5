"""Odd but ordinary programs: roles worked out by hand, each channel group of the size expected."""

import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

import jprune
from tests.graph.models import roles, shape, tokens

X = shape(5, 6)
KEY = jax.eval_shape(lambda: jax.random.key(0))


@jax.custom_vjp
def straight_through(w):
    return jnp.round(w * 8) / 8


straight_through.defvjp(lambda w: (straight_through(w), None), lambda _, g: (g,))


def int8(w):
    scale = jnp.max(jnp.abs(w), axis=0, keepdims=True) / 127
    return jnp.round(w / scale).astype(jnp.int8).astype(jnp.float32) * scale


def conv(x, w):
    return jax.lax.conv_general_dilated(x, w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def learned_queries(p, x, batch=()):
    queries = jnp.broadcast_to(p["l"], (*batch, *p["l"].shape)) @ p["q"]
    queries = queries + p["b"] if "b" in p else queries
    return jax.nn.softmax(queries @ jnp.swapaxes(x @ p["k"], -1, -2)) @ (x @ p["v"])


def latent_queries(p, x):
    """Attention of learned queries, which every example has, with two heads and normalized queries."""
    q = jnp.einsum("qd,dhk->qhk", p["l"], p["q"]) / 2
    q = jnp.concatenate([-q[..., 1:], q[..., :1]], -1) * jax.lax.rsqrt((q * q).mean(-1, keepdims=True)) * p["s"]
    k, v = (jnp.einsum("bsd,dhk->bshk", x, p[name]) for name in "kv")
    return jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(jnp.einsum("qhk,bshk->bhqs", q, k)), v)


def tiled_query(p, x):
    """Pooling by attention, with one learned query (1, 1, features) that is tiled over the batch."""
    q = jnp.einsum("bqd,dhk->bqhk", jnp.tile(p["l"], (len(x), 1, 1)), p["q"])
    k, v = (jnp.einsum("bsd,dhk->bshk", x, p[name]) for name in "kv")
    return jnp.einsum("bhqs,bshk->bqhk", jax.nn.softmax(jnp.einsum("bqhk,bshk->bhqs", q, k)), v)


def latent_memory(p, x):
    """Attention to learned tokens, with projections stored as (heads * size, inputs) and vmapped over heads."""

    def project(w, x):
        return jnp.moveaxis((x @ w.T).reshape(*x.shape[:-1], 2, -1), -2, 0)

    def head(q, k, v):
        return jax.nn.softmax(q @ k.T) @ v

    k, v = project(p["k"], p["l"]), project(p["v"], p["l"])
    return jax.vmap(lambda x: jax.vmap(head)(project(p["q"], x), k, v))(x)


def relative_bias(p, x):
    return x + jax.nn.gelu(jnp.arange(5.0)[:, None] @ p["a"]) @ p["b"]


def learned_start(p, x):
    def step(h, x):
        return jnp.tanh(h @ p["w"] + x @ p["u"]), None

    return jax.lax.scan(step, jnp.broadcast_to(p["h"], (2, 4)), x)[0] @ p["o"]


def sharded(p, x):
    mesh = jax.make_mesh((1,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    one = jax.shard_map(lambda w, x: jax.nn.relu(x @ w), mesh=mesh, in_specs=(P(), P("d")), out_specs=P("d"))
    return one(p["w"], x) @ p["v"]


def over_devices(one, in_specs, out_specs):
    axis_types = (jax.sharding.AxisType.Auto,) * 2
    return jax.shard_map(
        one, mesh=jax.make_mesh((2, 2), ("d", "m"), axis_types=axis_types), in_specs=in_specs, out_specs=out_specs
    )


def normalized_rows(p, t):
    rows = p["e"] / jnp.linalg.norm(p["e"], axis=-1, keepdims=True)
    return rows[t] @ p["w"]


PROGRAMS = {
    "straight-through quantization": (
        lambda p, x: jax.nn.relu(x @ straight_through(p["w"])) @ p["v"],
        {"w": ((6, 4), "i o"), "v": ((4, 3), "i o")},
        [X],
        [4],
    ),
    "quantization to int8": (
        lambda p, x: jax.nn.relu(x @ int8(p["w"])) @ p["v"],
        {"w": ((6, 4), "i o"), "v": ((4, 3), "i o")},
        [X],
        [4],
    ),
    "tied autoencoder": (lambda p, x: jax.nn.relu(x @ p["w"]) @ p["w"].T, {"w": ((6, 4), "io io")}, [X], [4]),
    "ensemble": (
        jax.vmap(lambda p, x: jax.nn.relu(x @ p["w"]) @ p["v"]),
        {"w": ((3, 6, 4), "s i o"), "v": ((3, 4, 2), "s i o")},
        [shape(3, 5, 6)],
        [4],
    ),
    "ensemble of convolutions": (
        jax.vmap(lambda p, x: conv(x, p["w"])),
        {"w": ((3, 3, 3, 4, 5), "s w w i o")},
        [shape(3, 2, 8, 8, 4)],
        [],
    ),
    "ensemble of convolutions of one input": (  # one convolution with more outputs
        lambda p, x: jax.vmap(conv, (None, 0))(x, p["w"]),
        {"w": ((3, 3, 3, 4, 5), "o w w i o")},
        [shape(2, 8, 8, 4)],
        [],
    ),
    "weight standardization": (
        lambda p, x: conv(x, (p["w"] - p["w"].mean((0, 1, 2))) / (p["w"].std((0, 1, 2)) + 1e-5) * p["g"]),
        {"w": ((3, 3, 4, 5), "w w i o"), "g": ((5,), "o")},
        [shape(2, 8, 8, 4)],
        [],
    ),
    "dropconnect": (
        lambda p, key, x: x @ (p["w"] * jax.random.bernoulli(key, 0.5, (6, 4))),
        {"w": ((6, 4), "i o")},
        [KEY, X],
        [],
    ),
    "patches by einsum": (
        lambda p, x: jnp.einsum("bhpwqc,pqcd->bhwd", x.reshape(2, 2, 4, 2, 4, 3), p["w"]),
        {"w": ((4, 4, 3, 7), "i i i o")},
        [shape(2, 8, 8, 3)],
        [],
    ),
    "learned queries, repeated over the batch": (
        lambda p, x: learned_queries(p, x, (2,)),
        {"l": ((3, 6), "o o"), "q": ((6, 4), "i o"), "k": ((6, 4), "i o"), "v": ((6, 4), "i o")},
        [shape(2, 5, 6)],
        [4, 6],
    ),
    "learned queries, with a bias": (
        learned_queries,
        {"l": ((3, 6), "o o"), "q": ((6, 4), "i o"), "b": ((4,), "o"), "k": ((6, 4), "i o"), "v": ((6, 4), "i o")},
        [X],
        [4, 6],
    ),
    "learned queries of all examples, with heads": (
        latent_queries,
        {
            "l": ((3, 6), "o o"),
            "q": ((6, 2, 4), "i o o"),
            "s": ((4,), "o"),
            "k": ((6, 2, 4), "i o o"),
            "v": ((6, 2, 4), "i o o"),
        },
        [shape(7, 5, 6)],
        [4, 6],
    ),
    "a learned query, tiled over the batch": (
        tiled_query,
        {
            "l": ((1, 1, 6), "s o o"),
            "q": ((6, 2, 4), "i o o"),
            "k": ((6, 2, 4), "i o o"),
            "v": ((6, 2, 4), "i o o"),
        },
        [shape(7, 5, 6)],
        [4, 6],
    ),
    "learned tokens of all examples, with heads": (
        latent_memory,
        {"l": ((3, 6), "o o"), "q": ((4, 6), "o i"), "k": ((4, 6), "o i"), "v": ((4, 6), "o i")},
        [shape(7, 5, 6)],
        [2, 3, 6],
    ),
    "learned start of a recurrence": (
        learned_start,
        {"h": ((4,), "o"), "w": ((4, 4), "i o"), "u": ((6, 4), "i o"), "o": ((4, 3), "i o")},
        [shape(7, 2, 6)],
        [4],
    ),
    "while": (
        lambda p, x: jax.lax.while_loop(lambda x: (x**2).sum() < 9, lambda x: jnp.tanh(x @ p["w"]), x),
        {"w": ((6, 6), "i o")},
        [X],
        [],
    ),
    "cond": (
        lambda p, x: jax.lax.cond(x.sum() > 0, lambda: x @ p["a"], lambda: x @ p["b"]) @ p["c"],
        {"a": ((6, 4), "i o"), "b": ((6, 4), "i o"), "c": ((4, 2), "i o")},
        [X],
        [4],
    ),
    "a table of positions": (
        lambda p, x: (x + jnp.take(p["t"], jnp.arange(5), axis=0)) @ p["w"],
        {"t": ((9, 6), "i o"), "w": ((6, 3), "i o")},
        [X],
        [],
    ),
    "a network of constant coordinates": (relative_bias, {"a": ((1, 4), "i o"), "b": ((4, 6), "i o")}, [X], [4]),
    "a scalar input": (
        lambda p, t: jnp.cos(t * p["w"]) @ p["v"],
        {"w": ((8,), "o"), "v": ((8, 3), "i o")},
        [shape()],
        [8],
    ),
    "permuted columns": (lambda p, x: x @ p["w"][:, jnp.array([3, 1, 0, 2])], {"w": ((6, 4), "i o")}, [X], []),
    "one vector of all parameters": (
        lambda p, x: x @ p["all"][:24].reshape(6, 4) + p["all"][24:],
        {"all": ((28,), "io")},
        [X],
        [],
    ),
    "normalized embedding": (normalized_rows, {"e": ((11, 6), "i o"), "w": ((6, 2), "i o")}, [tokens(5)], [6]),
    "sums of embeddings": (
        lambda p, t: jax.ops.segment_sum(p["e"][t], jnp.arange(6) // 2, 3) @ p["w"],
        {"e": ((11, 6), "i o"), "w": ((6, 2), "i o")},
        [tokens(6)],
        [6],
    ),
    "one-hot embedding": (
        lambda p, t: jax.nn.one_hot(t, 11) @ p["e"] @ p["w"],
        {"e": ((11, 6), "i o"), "w": ((6, 2), "i o")},
        [tokens(5)],
        [6],
    ),
    "an expert chosen for every row": (
        lambda p, x: jnp.einsum("bi,bio->bo", x, p["w"][jnp.argmax(x @ p["r"], -1)]),
        {"w": ((3, 6, 4), "s i o"), "r": ((6, 3), "i o")},
        [X],
        [],
    ),
    "rows sorted by expert": (
        lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([2, 2, 1])),
        {"w": ((3, 6, 4), "s i o")},
        [X],
        [],
    ),
    "read twice": (lambda p, x: jnp.tanh(x @ p["w"]) * jax.nn.sigmoid(x @ p["w"]), {"w": ((6, 6), "i o")}, [X], []),
    "scaled by an activation": (lambda p, x: x @ (p["w"] * jax.nn.sigmoid(x.mean())), {"w": ((6, 4), "i o")}, [X], []),
    "a graph network": (
        lambda p, x, e: jax.ops.segment_sum((x @ p["w"])[e[0]], e[1], 5) @ p["v"],
        {"w": ((6, 4), "i o"), "v": ((4, 2), "i o")},
        [X, tokens(2, 8)],
        [4],
    ),
    "channel shuffle": (  # whole groups of four are removed
        lambda p, x: (x @ p["w"]).reshape(5, 2, 4).swapaxes(1, 2).reshape(5, 8) @ p["v"],
        {"w": ((6, 8), "i o"), "v": ((8, 2), "i o")},
        [X],
        [2],
    ),
    "gated linear unit of one kernel": (
        lambda p, x: jax.nn.glu(x @ p["w"]) @ p["v"],
        {"w": ((6, 8), "i o"), "v": ((4, 2), "i o")},
        [X],
        [4],
    ),
    "a kernel chosen by cond": (
        lambda p, x: x @ jax.lax.cond(x.sum() > 0, lambda: p["a"], lambda: p["b"]),
        {"a": ((6, 4), "i o"), "b": ((6, 4), "i o")},
        [X],
        [],
    ),
    "a kernel or its transpose, by cond": (
        lambda p, x: x @ jax.lax.cond(x.sum() > 0, lambda: p["w"], lambda: p["w"].T),
        {"w": ((6, 6), "io io")},
        [X],
        [],
    ),
    "a kernel changed in a loop": (
        lambda p, x: x @ jax.lax.fori_loop(0, 3, lambda i, w: 1.5 * w - 0.5 * w @ w.T @ w, p["w"]),
        {"w": ((6, 4), "i o")},
        [X],
        [],
    ),
    "kernels added up in a scan": (
        lambda p, x: x @ jax.lax.scan(lambda total, w: (total + w, None), jnp.zeros((6, 4)), p["w"])[0],
        {"w": ((3, 6, 4), "s i o")},
        [X],
        [],
    ),
    "masked below a sorted threshold": (
        lambda p, x: x @ jnp.where(jnp.abs(p["w"]) >= jnp.sort(jnp.abs(p["w"]).ravel())[12], p["w"], 0),
        {"w": ((6, 4), "i o")},
        [X],
        [],
    ),
    "a circulant kernel": (
        lambda p, x: x @ p["w"][(jnp.arange(6)[:, None] - jnp.arange(6)) % 6],
        {"w": ((6,), "io")},
        [X],
        [],
    ),
    "columns chosen by data": (
        lambda p, x: x @ jax.lax.dynamic_slice_in_dim(p["w"], jnp.argmax(x[0]), 2, axis=1),
        {"w": ((6, 4), "i o")},
        [X],
        [],
    ),
    "one table for each codebook": (
        lambda p, t: jax.vmap(lambda e, t: e[t])(p["e"], t.T).sum(0) @ p["w"],
        {"e": ((3, 7, 4), "s i o"), "w": ((4, 2), "i o")},
        [tokens(5, 3)],
        [4],
    ),
    "a convolution's kernel stored as a matrix": (
        lambda p, x: conv(x, p["w"].reshape(3, 3, 4, 6)),
        {"w": ((36, 6), "i o")},
        [shape(2, 8, 8, 4)],
        [],
    ),
    "a convolution with groups in its batch": (
        lambda p, x: jax.lax.conv_general_dilated(
            x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), batch_group_count=2
        ),
        {"w": ((3, 3, 4, 6), "w w i o")},
        [shape(2, 8, 8, 4)],
        [],
    ),
    "queries and keys multiplied with each other first": (  # latent attention, absorbed
        lambda p, x: jnp.einsum("bi,ihr->bhr", x, jnp.einsum("ihk,rhk->ihr", p["q"], p["k"])),
        {"q": ((6, 2, 4), "i o o"), "k": ((3, 2, 4), "o o i")},
        [X],
        [4],
    ),
    "a sum over vmap's axis": (
        lambda p, x: jax.vmap(lambda x: jax.lax.psum(x @ p["w"], "batch"), axis_name="batch")(x),
        {"w": ((6, 4), "i o")},
        [X],
        [],
    ),
    "complex kernels of frequencies": (
        lambda p, x: jnp.einsum("bfi,fio->bfo", jnp.fft.rfft(x, axis=1), jax.lax.complex(p["re"], p["im"])).real,
        {"re": ((5, 6, 4), "s i o"), "im": ((5, 6, 4), "s i o")},
        [shape(2, 8, 6)],
        [],
    ),
    "tensor parallel": (
        lambda p, x: over_devices(
            lambda a, b, x: jax.lax.psum(jax.nn.relu(x @ a) @ b, "m"), (P(None, "m"), P("m"), P("d")), P("d")
        )(p["a"], p["b"], x),
        {"a": ((6, 8), "i o"), "b": ((8, 3), "i o")},
        [shape(4, 6)],
        [],
    ),
    "a kernel gathered from devices": (
        lambda p, x: over_devices(
            lambda w, x: x @ jax.lax.all_gather(w, "d", axis=0, tiled=True), (P("d"), P("d")), P("d")
        )(p["w"], x),
        {"w": ((6, 8), "i o")},
        [shape(4, 6)],
        [],
    ),
    "experts on devices": (
        lambda p, x: over_devices(lambda w, x: jnp.einsum("ecd,edf->ecf", x, w), (P("m"), P("m")), P("m"))(p["w"], x),
        {"w": ((4, 5, 7), "s i o")},
        [shape(4, 6, 5)],
        [],
    ),
    "a kernel times an identity matrix": (
        lambda p, x: jax.nn.relu(x @ (jnp.eye(6) @ p["w"] @ jnp.eye(4))) @ p["v"],
        {"w": ((6, 4), "i o"), "v": ((4, 2), "i o")},
        [X],
        [4],
    ),
    "numbers of channels as data": (  # not removed: the channels behind would get other numbers
        lambda p, x: (x @ p["w"] + jnp.arange(4.0)) @ p["v"],
        {"w": ((6, 4), "i o"), "v": ((4, 2), "i o")},
        [X],
        [],
    ),
    "numbers of channels that a branch returns": (
        lambda p, x: (x @ p["w"] * jax.lax.cond(x[0, 0] > 0, lambda: jnp.arange(4.0), lambda: jnp.ones(4))) @ p["v"],
        {"w": ((6, 4), "i o"), "v": ((4, 2), "i o")},
        [X],
        [],
    ),
    "numbers of channels that a scan stacks": (
        lambda p, x: (x @ p["w"] * jax.lax.scan(lambda c, _: (c, jnp.arange(4.0)), 0, None, 5)[1]) @ p["v"],
        {"w": ((6, 4), "i o"), "v": ((4, 2), "i o")},
        [X],
        [],
    ),
    "channels written into a part of an array": (
        lambda p, x: jnp.zeros((5, 8)).at[:, :4].set(x @ p["w"]) @ p["v"] + (x @ p["w"]).sum(),
        {"w": ((6, 4), "i o"), "v": ((8, 2), "i o")},
        [X],
        [],
    ),
    "a kernel written into a part of an array": (
        lambda p, x: x @ jnp.zeros((6, 8)).at[:, :4].set(p["w"]).at[jnp.array([2, 0])].add(p["v"]),
        {"w": ((6, 4), "i o"), "v": ((2, 8), "i o")},
        [X],
        [],
    ),
    "channels behind an empty array": (
        lambda p, x: jnp.concatenate([x[:, :0], x, x @ p["w"]], axis=1) @ p["v"],
        {"w": ((6, 4), "i o"), "v": ((10, 2), "i o")},
        [X],
        [4],
    ),
    "data behind an empty array": (
        lambda p, x: jnp.concatenate([x[:, :0], x], axis=1) @ p["w"],
        {"w": ((6, 4), "i o")},
        [X],
        [],
    ),
    "a triangle of a kernel": (
        lambda p, x: x @ jnp.zeros((6, 6)).at[jnp.triu_indices(6)].set(p["w"]),
        {"w": ((21,), "io")},
        [X],
        [],
    ),
    "numbers in a type that has not all of them": (  # ones beyond the diagonal
        lambda p, x: (
            (x @ p["w"] @ (jnp.arange(300, dtype="bfloat16")[:, None] == jnp.arange(300, dtype="bfloat16"))) @ p["v"]
        ),
        {"w": ((6, 300), "i o"), "v": ((300, 2), "i o")},
        [X],
        [],
    ),
    "a diagonal next to the main one": (
        lambda p, x: (x @ p["w"] @ jnp.eye(4, k=1)) @ p["v"],
        {"w": ((6, 4), "i o"), "v": ((4, 2), "i o")},
        [X],
        [],
    ),
    "shard_map": (sharded, {"w": ((6, 4), "i o"), "v": ((4, 2), "i o")}, [X], [4]),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_roles_of_odd_programs(name):
    apply, expected, inputs, sizes = PROGRAMS[name]
    graph = jprune.trace_model(apply, {path: shape(*size) for path, (size, _) in expected.items()}, *inputs)
    assert roles(graph) == {path: letters for path, (_, letters) in expected.items()}
    assert sorted(group.size for group in graph.channels) == sizes


def test_multiply_adds_of_learned_queries_are_those_of_their_projection():
    params = {"l": shape(3, 6), "q": shape(6, 2, 4), "s": shape(4), "k": shape(6, 2, 4), "v": shape(6, 2, 4)}
    graph = jprune.trace_model(latent_queries, params, shape(7, 5, 6))
    assert graph.multiply_adds == {"l": 0, "q": 3 * 6 * 8, "s": 0, "k": 7 * 5 * 6 * 8, "v": 7 * 5 * 6 * 8}
    assert graph.kernels == ("k", "q", "v")


def test_a_product_of_parameters_that_may_be_learned_queries_is_named_in_a_warning():
    """A product with one head is that of a kernel of low rank, unless it is added to a kernel, which tells."""
    params = {"a": shape(4, 2), "b": shape(2, 6)}
    with pytest.warns(UserWarning, match="the product of 'a' and 'b' is read as one kernel; if one of the two is data"):
        graph = jprune.trace_model(lambda p, x: x @ (p["a"] @ p["b"]).T, params, X)
    assert roles(graph) == {"a": "o i", "b": "o i"}
    learned = {"l": shape(5, 4), "a": shape(4, 6), "b": shape(6, 6)}  # tokens and a network of them
    with pytest.warns(UserWarning, match="the product of 'l' and 'a' is read as one kernel"):
        jprune.trace_model(lambda p, x: x + jnp.tanh(p["l"] @ p["a"]) @ p["b"], learned, X)
    basis = {"a": shape(5, 2), "b": shape(2, 6, 4)}  # a kernel for each of 5 relations
    with pytest.warns(UserWarning, match="the product of 'a' and 'b' is read as one kernel"):
        jprune.trace_model(
            lambda p, x: jnp.einsum("rx,rxo->ro", x, jnp.tensordot(p["a"], p["b"], 1)), basis, shape(5, 6)
        )
    params["w"] = shape(4, 6)
    graph = jprune.trace_model(lambda p, x: x @ (p["w"] + 2 * (p["a"] @ p["b"])).T, params, X)
    assert roles(graph) == {"a": "o i", "b": "o i", "w": "o i"}


def test_a_learned_first_state_is_not_taken_for_a_kernel_in_later_rounds(recwarn):
    """Only in the first of the rounds that are traced is the state a parameter."""

    def apply(p, x):
        step = lambda h, u: (h @ p["down"] @ p["up"] + u @ p["in"], None)
        return jax.lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, step(c[1], x)[0]), (3, p["first"]))[1]

    params = {"first": shape(5), "down": shape(5, 3), "up": shape(3, 5), "in": shape(4, 5)}
    graph = jprune.trace_model(apply, params, shape(4))
    assert [str(warning.message) for warning in recwarn] == []
    assert graph.in_while_loops == ("down", "in", "up")


def test_masks_given_as_state_do_not_change_the_kernels():
    params, masks = {"w": shape(6, 4)}, {"w": shape(6, 4)}
    graph = jprune.trace_model(lambda p, masks, x: x @ (p["w"] * masks["w"]), params, X, state=masks)
    assert roles(graph) == {"w": "i o"}


@pytest.mark.parametrize(
    ("inner", "exact"),
    [
        (lambda h: h**0.5, True),
        (lambda h: h**-0.5, False),  # 0 ** -0.5 is infinite
        (lambda h: jnp.cumsum(h, axis=0), True),
        (lambda h: jax.lax.cumlogsumexp(h, axis=0), False),  # log(exp(0) + exp(0)) is not 0
        (lambda h: jax.lax.scan(lambda c, _: (c * h, None), jnp.ones_like(h), length=2)[0], True),
        (lambda h: jax.lax.scan(lambda c, _: (c * h, None), jnp.ones_like(h), length=0)[0], False),  # 1
        (
            lambda h: jax.lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] * h), (0, jnp.ones_like(h)))[1],
            False,
        ),
        (lambda h: jax.lax.while_loop(lambda c: c[0] > 0, lambda c: (c[0] - 1, c[1] * h), (0, h))[1], True),
        (lambda h: jax.lax.bitcast_convert_type(-h, jnp.int32), False),  # the sign bit of -0.0
        (lambda h: h.at[jnp.array([0, 9])].get(mode="fill", fill_value=0), True),
        (lambda h: h.at[jnp.array([0, 9])].get(mode="fill", fill_value=1), False),  # 9 is out of bounds
    ],
)
def test_a_sum_over_masked_channels_is_exact_only_where_they_are_zero(inner, exact):
    graph = jprune.trace_model(lambda p, x: inner(x @ p["w"]).sum(1), {"w": shape(6, 4)}, X)
    (group,) = graph.channels
    assert group.exact == exact


def test_a_trace_by_an_identity_matrix_is_not_exact():
    """The diagonal of a masked channel would have to be zero."""
    graph = jprune.trace_model(
        lambda p, x: jnp.sum(jax.nn.sigmoid(x @ p["w"]) * jnp.eye(4)), {"w": shape(6, 4)}, shape(4, 6)
    )
    assert [group.exact for group in graph.channels] in ([], [False])


def test_a_masked_channel_that_is_divided_by_is_not_exact():
    def apply(p, x):
        return jax.nn.relu(x @ (p["g"] * p["v"] / jnp.linalg.norm(p["v"], axis=0))) @ p["o"]

    graph = jprune.trace_model(apply, {"g": shape(4), "v": shape(6, 4), "o": shape(4, 2)}, X)
    (group,) = graph.channels
    assert not group.exact
    assert "not finite" in group.why[0]


def test_a_masked_channel_that_is_divided_by_its_standard_deviation_is_not_exact():
    """jnp.std selects NaN where there are too few examples, which does not hide that it is zero otherwise."""

    def apply(p, x, least=0.0):
        y = x @ p["v"]
        return (y / (jnp.std(y, axis=0) + least)) @ p["o"]

    params = {"v": shape(6, 4), "o": shape(4, 2)}
    (group,) = jprune.trace_model(apply, params, X).channels
    assert not group.exact
    assert "not finite" in group.why[0]
    (group,) = jprune.trace_model(lambda p, x: apply(p, x, 1e-6), params, X).channels
    assert group.exact


def test_multiply_adds_after_a_scan_without_iterations():
    def apply(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["a"], p["layers"])[0] @ p["b"]

    params = {"a": shape(6, 4), "layers": shape(0, 4, 4), "b": shape(4, 2)}
    assert jprune.trace_model(apply, params, X).multiply_adds == {"a": 5 * 6 * 4, "layers": 0, "b": 5 * 4 * 2}


def test_a_branch_of_convolutions_that_has_lost_all_channels():
    params = {"a": shape(1, 3, 2, 0), "b": shape(1, 3, 0, 2)}
    graph = jprune.trace_model(lambda p, x: conv(jax.nn.relu(conv(x, p["a"])), p["b"]) + x, params, shape(1, 1, 4, 2))
    assert graph.multiply_adds == {"a": 0, "b": 0}


def test_multiply_adds_of_a_while_loop_are_of_one_round():
    graph = jprune.trace_model(PROGRAMS["while"][0], {"w": shape(6, 6)}, X)
    assert graph.multiply_adds == {"w": 5 * 6 * 6}
    assert graph.in_while_loops == ("w",)
    assert "one iteration of a while loop" in str(graph)


@pytest.mark.parametrize(
    ("apply", "size", "name"),
    [
        (lambda w, x: jnp.linalg.solve(w, x.T), (6, 6), "custom_linear_solve"),
        (lambda w, x: x @ jnp.linalg.svd(w, full_matrices=False)[0], (6, 4), "svd"),
        (lambda w, x: conv(w[None], x.reshape(1, 1, 5, 6)), (3, 3, 5), "conv_general_dilated"),
    ],
)
def test_a_primitive_that_is_not_supported_is_named_in_a_warning(apply, size, name):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph = jprune.trace_model(lambda p, x: apply(p["w"], x), {"w": shape(*size)}, X)
    assert any(f"'{name}'" in str(warning.message) and "'w'" in str(warning.message) for warning in caught)
    assert graph.axes == {"w": None}
    with pytest.raises(ValueError, match=r"'w'.*axes="):
        jprune.output_masks({"w": jnp.ones(size)}, sparsity=0.5, axes=graph)


@pytest.mark.parametrize(
    ("apply", "why"),
    [
        (lambda w, x: x @ jnp.sort(w, axis=0), "nothing reads its axis 0 but 'sort'"),
        (lambda w, x: x @ jnp.fft.irfft(w, n=4, axis=1), "nothing reads its axis 1 but 'fft'"),
        (lambda w, x: x @ w.sum(1, keepdims=True), "nothing reads its axis 1"),
    ],
)
def test_axes_that_are_mixed_before_a_product_are_unknown(apply, why):
    graph = jprune.trace_model(lambda p, x: apply(p["w"], x), {"w": shape(6, 4)}, X)
    assert graph.axes == {"w": None}
    assert graph.unknown["w"] == why
