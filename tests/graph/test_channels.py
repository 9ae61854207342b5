"""Groups of channels of usual architectures, and the axes that are never removed, each worked out by hand.

Models are plain functions of small shapes and are only traced. Convolutions have kernels (height, width, in, out).
"""

import jax
import jax.numpy as jnp

import jprune
from tests.graph.models import groups, roles, shape

IMAGES = shape(2, 8, 8, 3)
INPUTS, OUTPUTS = "an axis of the model's inputs", "an axis of the model's outputs"
WINDOW = "a convolution's window moves over it"


def windows(*paths):
    """The entries of ``frozen`` of the window axes of these kernels."""
    return {(path, axis): WINDOW for path in paths for axis in (0, 1)}


def indices(graph, size, path):
    """By axis, which indices of a leaf belong to each channel of the groups of this size."""
    return [m.indices.tolist() for g in graph.channels if g.size == size for m in g.members if m.path == path]


def in_order(*expected):
    return sorted(expected, key=lambda group: sorted(group[1]))


def conv(x, kernel, stride=1, groups=1):
    return jax.lax.conv_general_dilated(
        x, kernel, (stride, stride), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
    )


def normed(x, scale):
    """Normalize each channel over the batch and the image, and scale it."""
    return (x - x.mean((0, 1, 2))) * jax.lax.rsqrt(x.var((0, 1, 2)) + 1e-5) * scale


def resnet(p, x, shortcut):
    x = jax.nn.relu(normed(conv(x, p["stem"]), p["stem_scale"]))
    x = jax.nn.relu(x + conv(jax.nn.relu(conv(x, p["a1"])), p["a2"]))
    x = jax.nn.relu(shortcut(p, x) + conv(jax.nn.relu(conv(x, p["b1"], stride=2)), p["b2"]))
    return x.mean((1, 2)) @ p["head"]


RESNET = {
    "stem": shape(3, 3, 3, 4),
    "stem_scale": shape(4),
    "a1": shape(3, 3, 4, 5),
    "a2": shape(3, 3, 5, 4),
    "b1": shape(3, 3, 4, 6),
    "b2": shape(3, 3, 6, 8),
    "head": shape(8, 10),
}


def zero_padded(_, x):
    """Option A of He et al. (2016): every second pixel, with channels of zeros on both sides."""
    return jnp.pad(x[:, ::2, ::2], ((0, 0), (0, 0), (0, 0), (2, 2)))


def test_a_resnet_with_projections():
    graph = jprune.trace_model(
        lambda p, x: resnet(p, x, lambda p, x: conv(x, p["projection"], stride=2)),
        {**RESNET, "projection": shape(1, 1, 4, 8)},
        IMAGES,
    )
    before = {("stem", 3): 1, ("stem_scale", 0): 1, ("a1", 2): 1, ("a2", 3): 1, ("b1", 2): 1, ("projection", 2): 1}
    assert groups(graph) == in_order(
        (5, {("a1", 3): 1, ("a2", 2): 1}),
        (4, before),
        (6, {("b1", 3): 1, ("b2", 2): 1}),
        (8, {("b2", 3): 1, ("projection", 3): 1, ("head", 0): 1}),
    )
    assert all(group.exact for group in graph.channels)
    # The window of a 1 x 1 kernel has one place, which needs no reason to stay.
    assert graph.frozen == {
        **windows("stem", "a1", "a2", "b1", "b2"),
        ("stem", 2): INPUTS,
        ("head", 1): OUTPUTS,
    }


def test_a_resnet_with_zero_padded_shortcuts():
    """The stem's channels 0 to 3 are added to channels 2 to 5 of the second block; 0, 1, 6 and 7 are its own."""
    graph = jprune.trace_model(lambda p, x: resnet(p, x, zero_padded), RESNET, IMAGES)
    through = {("stem", 3): 1, ("stem_scale", 0): 1, ("a1", 2): 1, ("a2", 3): 1, ("b1", 2): 1}
    assert groups(graph) == in_order(
        (5, {("a1", 3): 1, ("a2", 2): 1}),
        (6, {("b1", 3): 1, ("b2", 2): 1}),
        (4, {**through, ("b2", 3): 1, ("head", 0): 1}),
        (4, {("b2", 3): 1, ("head", 0): 1}),
    )
    shared, own = [[2], [3], [4], [5]], [[0], [1], [6], [7]]
    assert indices(graph, 4, "b2") == indices(graph, 4, "head") == [shared, own]
    assert indices(graph, 4, "stem") == [[[0], [1], [2], [3]]]
    assert all(group.exact for group in graph.channels)
    assert graph.frozen == {
        **windows("stem", "a1", "a2", "b1", "b2"),
        ("stem", 2): INPUTS,
        ("head", 1): OUTPUTS,
    }


def test_inverted_residuals_of_mobilenet():
    """Expand, filter each channel by itself, project; the projection is added to the input."""
    params = {
        "stem": shape(3, 3, 3, 4),
        "expand": shape(1, 1, 4, 12),
        "depthwise": shape(3, 3, 1, 12),
        "depthwise_scale": shape(12),
        "project": shape(1, 1, 12, 4),
        "head": shape(4, 10),
    }

    def apply(p, x):
        x = conv(x, p["stem"])
        h = jax.nn.relu6(conv(x, p["expand"]))
        h = jax.nn.relu6(conv(h, p["depthwise"], groups=12) * p["depthwise_scale"])
        return (x + conv(h, p["project"])).mean((1, 2)) @ p["head"]

    graph = jprune.trace_model(apply, params, IMAGES)
    assert graph.axes["depthwise"] == jprune.KernelAxes(inputs=(2,), outputs=(3,), spatial=(0, 1), groups=12)
    # The depthwise kernel's axis of inputs has one entry, so a channel is an index of its outputs alone.
    filtered = {("expand", 3): 1, ("depthwise", 3): 1, ("depthwise_scale", 0): 1, ("project", 2): 1}
    assert groups(graph) == in_order(
        (12, filtered), (4, {("stem", 3): 1, ("expand", 2): 1, ("project", 3): 1, ("head", 0): 1})
    )
    assert all(group.exact for group in graph.channels)
    assert graph.frozen == {**windows("stem", "depthwise"), ("stem", 2): INPUTS, ("head", 1): OUTPUTS}


def test_dense_blocks_of_densenet():
    """Each layer reads the stem and all layers before it."""
    params = {
        "stem": shape(3, 3, 3, 4),
        "a": shape(3, 3, 4, 2),
        "b": shape(3, 3, 6, 3),
        "transition": shape(1, 1, 9, 5),
        "head": shape(5, 10),
    }

    def apply(p, x):
        x = conv(x, p["stem"])
        for name in ("a", "b"):
            x = jnp.concatenate([x, conv(jax.nn.relu(x), p[name])], axis=-1)
        return jax.nn.relu(conv(x, p["transition"])).mean((1, 2)) @ p["head"]

    graph = jprune.trace_model(apply, params, IMAGES)
    assert groups(graph) == in_order(
        (4, {("stem", 3): 1, ("a", 2): 1, ("b", 2): 1, ("transition", 2): 1}),
        (2, {("a", 3): 1, ("b", 2): 1, ("transition", 2): 1}),
        (3, {("b", 3): 1, ("transition", 2): 1}),
        (5, {("transition", 3): 1, ("head", 0): 1}),
    )
    assert indices(graph, 4, "transition") == [[[0], [1], [2], [3]]]
    assert indices(graph, 2, "b") == indices(graph, 2, "transition") == [[[4], [5]]]
    assert indices(graph, 3, "transition") == [[[6], [7], [8]]]
    assert all(group.exact for group in graph.channels)
    assert graph.frozen == {**windows("stem", "a", "b"), ("stem", 2): INPUTS, ("head", 1): OUTPUTS}


def test_vgg_with_batch_statistics_as_state():
    params = {"conv": shape(3, 3, 3, 4), "scale": shape(4), "shift": shape(4), "conv2": shape(3, 3, 4, 6)}
    params |= {"dense": shape(4 * 4 * 6, 5), "head": shape(5, 10)}

    def apply(p, state, x):
        h = conv(x, p["conv"])
        new = {
            "mean": 0.9 * state["mean"] + 0.1 * h.mean((0, 1, 2)),
            "var": 0.9 * state["var"] + 0.1 * h.var((0, 1, 2)),
        }
        h = (h - state["mean"]) * jax.lax.rsqrt(state["var"] + 1e-5) * p["scale"] + p["shift"]
        h = jax.nn.relu(conv(jax.nn.relu(h), p["conv2"]))
        h = jax.lax.reduce_window(h, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return jax.nn.relu(h.reshape(len(x), -1) @ p["dense"]) @ p["head"], new

    graph = jprune.trace_model(apply, params, IMAGES, state={"mean": shape(4), "var": shape(4)})
    statistics = {("scale", 0): 1, ("shift", 0): 1, ("mean", 0): 1, ("var", 0): 1}
    assert groups(graph) == in_order(
        (4, {("conv", 3): 1, **statistics, ("conv2", 2): 1}),
        (6, {("conv2", 3): 1, ("dense", 0): 16}),  # of the flattened 4 x 4 image
        (5, {("dense", 1): 1, ("head", 0): 1}),
    )
    assert [[member.path for member in group.state] for group in graph.channels] == [["mean", "var"], [], []]
    assert [group.kind for group in graph.channels] == ["channels", "blocks", "channels"]
    assert indices(graph, 6, "dense") == [[list(range(channel, 96, 6)) for channel in range(6)]]
    assert all(group.exact for group in graph.channels)
    assert graph.frozen == {**windows("conv", "conv2"), ("conv", 2): INPUTS, ("head", 1): OUTPUTS}


def test_a_vision_transformer():
    """Heads, entries of values, the feed-forward width and the model's width."""
    width, heads, size, hidden = 8, 2, 4, 12
    params = {
        "patches": shape(4, 4, 3, width),
        "token": shape(1, 1, width),
        "positions": shape(1, 5, width),
        "scale": shape(width),
        "query": shape(width, heads, size),
        "key": shape(width, heads, size),
        "value": shape(width, heads, size),
        "out": shape(heads, size, width),
        "up": shape(width, hidden),
        "down": shape(hidden, width),
        "head": shape(width, 10),
    }

    def layer_norm(x, scale):
        return (x - x.mean(-1, keepdims=True)) * jax.lax.rsqrt(x.var(-1, keepdims=True) + 1e-6) * scale

    def apply(p, x):
        x = jax.lax.conv_general_dilated(x, p["patches"], (4, 4), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = x.reshape(len(x), 4, width)
        x = jnp.concatenate([jnp.broadcast_to(p["token"], (len(x), 1, width)), x], axis=1) + p["positions"]
        h = layer_norm(x, p["scale"])
        q, k, v = (jnp.einsum("btd,dhk->bthk", h, p[name]) for name in ("query", "key", "value"))
        x = x + jnp.einsum("bthk,hkd->btd", jax.nn.dot_product_attention(q, k, v), p["out"])
        x = x + jax.nn.gelu(x @ p["up"]) @ p["down"]
        return x[:, 0] @ p["head"]

    graph = jprune.trace_model(apply, params, IMAGES)
    assert roles(graph) == {
        "patches": "w w i o",
        "token": "s o o",
        "positions": "o o o",
        "scale": "o",
        "query": "i o o",
        "key": "i o o",
        "value": "i o o",
        "out": "i i o",
        "up": "i o",
        "down": "i o",
        "head": "i o",
    }
    stream = {("patches", 3): 1, ("token", 2): 1, ("positions", 2): 1, ("scale", 0): 1, ("out", 2): 1, ("down", 1): 1}
    stream |= {(name, 0): 1 for name in ("query", "key", "value", "up", "head")}
    assert groups(graph) == in_order(
        (width, stream),
        (heads, {("query", 1): 1, ("key", 1): 1, ("value", 1): 1, ("out", 0): 1}),
        (size, {("query", 2): 1, ("key", 2): 1}),
        (size, {("value", 2): 1, ("out", 1): 1}),
        (hidden, {("up", 1): 1, ("down", 0): 1}),
    )
    # A layer norm's mean and variance count the masked channels of the stream; those of the other groups are zero.
    inexact = [group for group in graph.channels if not group.exact]
    assert [(group.size, group.why) for group in inexact] == [
        (
            width,
            ("'reduce_sum' over these channels (a normalization or a mean) counts masked ones, not zero there",),
        )
    ]
    assert graph.frozen == {
        **windows("patches"),
        ("patches", 2): INPUTS,
        ("head", 1): OUTPUTS,
        ("positions", 1): "its size is one; single indices of it are taken",
    }
