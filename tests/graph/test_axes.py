import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from jprune.graph import KernelAxes
from jprune.graph.axes import kernel_axes


def _shapes(**shapes):
    return {path: jax.ShapeDtypeStruct(shape, jnp.float32) for path, shape in shapes.items()}


def _in_out(rank):
    return KernelAxes(inputs=(rank - 2,), outputs=(rank - 1,), spatial=tuple(range(rank - 2)))


def _out_in(rank):
    return KernelAxes(outputs=(0,), inputs=(1,), spatial=tuple(range(2, rank)))


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("kernel", (5, 7), _in_out(2)),
        ("w", (5, 7), _in_out(2)),
        ("weight", (7, 5), _out_in(2)),
        ("weight_hh", (7, 5), _out_in(2)),
        ("kernel", (3, 3, 5, 7), _in_out(4)),
        ("kernel", (1, 7, 5, 7), _in_out(4)),
        ("weight", (7, 5, 3, 3), _out_in(4)),
        ("bias", (7,), KernelAxes(outputs=(0,))),
        ("kernel", (4, 16, 16), None),  # a 1-D convolution, four dense layers or four heads
        ("kernel", (12, 64, 4, 16), None),  # stacked queries, not a window of 12 x 64
        ("w", (3, 3, 5, 7), None),
        ("bias", (4, 16), None),
        ("scale", (4, 16), None),
    ],
)
def test_without_axes_only_unambiguous_names_and_shapes_are_known(name, shape, expected):
    assert kernel_axes(None, {"layer": _shapes(**{name: shape})}) == {f"layer/{name}": expected}


def test_flax_reads_convolutions_and_attention_by_name():
    attention = {
        "query": _shapes(kernel=(8, 2, 4), bias=(2, 4)),
        "key": _shapes(kernel=(8, 2, 4)),
        "value": _shapes(kernel=(8, 2, 4)),
        "out": _shapes(kernel=(2, 4, 8), bias=(8,)),
    }
    tree = {
        "conv": _shapes(kernel=(3, 5, 7)),
        "attention": attention,
        "out": _shapes(kernel=(3, 5, 7), bias=(7,)),
        "embed": _shapes(embedding=(10, 8)),
        "norm": _shapes(scale=(8,), other=(8, 8)),
    }
    assert kernel_axes("flax", tree) == {
        "conv/kernel": _in_out(3),
        "attention/query/kernel": KernelAxes(inputs=(0,), outputs=(1, 2)),
        "attention/query/bias": KernelAxes(outputs=(0, 1)),
        "attention/key/kernel": KernelAxes(inputs=(0,), outputs=(1, 2)),
        "attention/value/kernel": KernelAxes(inputs=(0,), outputs=(1, 2)),
        "attention/out/kernel": KernelAxes(inputs=(0, 1), outputs=(2,)),
        "attention/out/bias": KernelAxes(outputs=(0,)),
        "out/kernel": _in_out(3),  # not part of an attention layer
        "out/bias": KernelAxes(outputs=(0,)),
        "embed/embedding": _in_out(2),
        "norm/scale": KernelAxes(outputs=(0,)),
        "norm/other": None,
    }


def _attention_of(query, out, query_bias, out_bias):
    leaves = {name: _shapes(kernel=query, bias=query_bias) for name in ("query", "key", "value")}
    return {"attn": {**leaves, "out": _shapes(kernel=out, bias=out_bias)}}


def test_flax_reads_scanned_attention_as_stacked_along_the_first_axis_or_not_at_all():
    found = kernel_axes("flax", _attention_of((3, 8, 2, 4), (3, 2, 4, 8), (3, 2, 4), (3, 8)))
    for name in ("query", "key", "value"):
        assert found[f"attn/{name}/kernel"] == KernelAxes(stacked=(0,), inputs=(1,), outputs=(2, 3))
        assert found[f"attn/{name}/bias"] == KernelAxes(stacked=(0,), outputs=(1, 2))
    assert found["attn/out/kernel"] == KernelAxes(stacked=(0,), inputs=(1, 2), outputs=(3,))
    assert found["attn/out/bias"] == KernelAxes(stacked=(0,), outputs=(1,))
    twice = kernel_axes("flax", _attention_of((5, 3, 8, 2, 4), (5, 3, 2, 4, 8), (5, 3, 2, 4), (5, 3, 8)))
    assert twice["attn/out/kernel"] == KernelAxes(stacked=(0, 1), inputs=(2, 3), outputs=(4,))
    # Layers along the second axis, and kernels of which one is missing.
    elsewhere = _attention_of((8, 3, 2, 4), (2, 3, 4, 8), (2, 3, 4), (8, 3))
    assert set(kernel_axes("flax", elsewhere).values()) == {None}
    alone = _attention_of((3, 8, 2, 4), (3, 2, 4, 8), (3, 2, 4), (3, 8))
    alone["attn"]["out"]["kernel"] = None
    assert set(kernel_axes("flax", alone).values()) == {None}


def test_a_bias_that_does_not_fit_the_convention_leaves_the_axes_unknown():
    flax = {
        "scanned": _shapes(kernel=(3, 5, 7), bias=(3, 7)),
        "general": _shapes(kernel=(5, 2, 4), bias=(2, 4)),
        "transposed": _shapes(kernel=(3, 3, 7, 5), bias=(7,)),
        "einsum": _shapes(kernel=(7, 5), bias=(7,)),
        "conv": _shapes(kernel=(3, 3, 5, 7), bias=(7,)),
    }
    found = kernel_axes("flax", flax)
    assert {path for path, axes in found.items() if axes is None and path.endswith("kernel")} == {
        "scanned/kernel",
        "general/kernel",
        "transposed/kernel",
        "einsum/kernel",
    }
    assert found["conv/kernel"] == _in_out(4)
    equinox = {"stacked": _shapes(weight=(3, 7, 5), bias=(3, 7)), "norm": _shapes(weight=(4, 5), bias=(4, 5))}
    equinox |= {"conv": _shapes(weight=(7, 5, 3, 3), bias=(7, 1, 1)), "linear": _shapes(weight=(7, 5), bias=(7,))}
    kernels = {path: axes for path, axes in kernel_axes("equinox", equinox).items() if path.endswith("weight")}
    assert kernels == {
        "stacked/weight": None,
        "norm/weight": None,
        "conv/weight": _out_in(4),
        "linear/weight": _out_in(2),
    }


@pytest.mark.parametrize(
    ("layer", "shape", "known"),
    [
        ("Conv_0", (3, 5, 7), True),
        ("convs/0", (3, 5, 7), True),
        ("convnext/mlp", (4, 16, 16), False),  # dense layers in a model whose name contains "conv"
        ("blocks", (4, 16, 16), False),  # four dense layers, as nn.scan stacks them
        ("q_proj", (64, 4, 16), False),  # DenseGeneral with features (4, 16)
        ("stem", (3, 3, 5, 7), True),
        ("stem", (1, 7, 5, 7), True),
        ("q_proj", (12, 64, 4, 16), False),  # 12 of them
        ("stem", (3, 3, 3, 5, 7), True),
        ("blocks", (4, 3, 3, 5, 7), False),  # four convolutions
    ],
)
def test_kernels_without_a_bias_are_known_only_where_name_or_window_tell(layer, shape, known):
    parents = layer.split("/")[::-1]
    flax = kernel_axes("flax", functools.reduce(lambda tree, name: {name: tree}, parents, _shapes(kernel=shape)))
    assert flax == {f"{layer}/kernel": _in_out(len(shape)) if known else None}
    outputs_first = (shape[-1], shape[-2], *shape[:-2])
    tree = functools.reduce(lambda tree, name: {name: tree}, parents, _shapes(weight=outputs_first))
    equinox = kernel_axes("equinox", tree)
    assert equinox == {f"{layer}/weight": _out_in(len(shape)) if known else None}


def test_stacked_recurrent_kernels_of_equinox_are_unknown():
    assert kernel_axes("equinox", {"conv_lstm": _shapes(weight_ih=(3, 28, 5))}) == {"conv_lstm/weight_ih": None}


def test_equinox_reads_outputs_first():
    tree = _shapes(weight=(7, 5, 3), bias=(7, 1), weight_ih=(28, 5), kernel=(5, 7))
    assert kernel_axes("equinox", tree) == {
        "weight": _out_in(3),
        "bias": KernelAxes(outputs=(0, 1)),
        "weight_ih": _out_in(2),
        "kernel": None,
    }


def test_patterns_come_first_and_other_leaves_follow_the_convention():
    tree = {"blocks": _shapes(kernel=(4, 16, 16)), "head": _shapes(kernel=(16, 10)), "frozen": None}
    found = kernel_axes({"^blocks/": KernelAxes(stacked=(0,), inputs=(-2,), outputs=(-1,))}, tree)
    assert found == {
        "blocks/kernel": KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,)),
        "head/kernel": _in_out(2),
    }


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ({"^encoder/": KernelAxes(inputs=(0,), outputs=(1,))}, "'^encoder/', which matches no leaf; there are 'w'"),
        ({"(": KernelAxes()}, "not a regular expression"),
        ({"w": KernelAxes(inputs=(0,), outputs=(2,))}, "outputs has axis 2; allowed are -2 to 1"),
        ({"w": KernelAxes(inputs=(0, 0), outputs=(1,))}, "inputs names an axis twice"),
        ({"w": KernelAxes(inputs=(0,))}, "leaf 'w' of shape (5, 6): axis 1 has no role"),
        ({"w": KernelAxes(inputs=(0,), outputs=(1,), groups=4)}, "groups=4 must be positive and divide the 6 outputs"),
        (
            {"w": KernelAxes(inputs=(0,), outputs=(1,)), "^w$": KernelAxes(inputs=(1,), outputs=(0,))},
            "axes has the key '^w$', which decides for no leaf: 'w' also matches 'w', and the first key that matches",
        ),
        ("torch", "axes='torch' is not a convention"),
        (SimpleNamespace(axes={}, shapes={}, unknown={}), "it has no leaf 'w'"),
        (
            SimpleNamespace(axes={"w": None}, shapes={"w": (6, 5)}, unknown={}),
            "leaf 'w' has shape (6, 5), this one has (5, 6)",
        ),
    ],
)
def test_axes_that_do_not_fit_are_refused_by_name(axes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        kernel_axes(axes, _shapes(w=(5, 6)))


@pytest.mark.parametrize("axes", [3, {"w": (0, 1)}])
def test_axes_of_another_type_are_refused(axes):
    with pytest.raises(TypeError, match="axes"):
        kernel_axes(axes, _shapes(w=(5, 6)))


def test_a_graph_answers_for_its_leaves():
    shapes = {"w": (5, 6), "v": (2, 3, 4)}
    graph = SimpleNamespace(axes={"w": _in_out(2), "v": None}, shapes=shapes, unknown={"v": "nothing reads it"})
    assert kernel_axes(graph, _shapes(w=(5, 6), v=(2, 3, 4))) == {"w": _in_out(2), "v": None}


def test_an_axis_with_two_roles_is_tied():
    assert KernelAxes(inputs=(0, 1), outputs=(1, 0)).tied
    assert not KernelAxes(inputs=(0,), outputs=(1,)).tied


@pytest.mark.parametrize(
    ("layer", "shapes"),
    [
        ("blocks", {"kernel": (3, 3, 5, 7), "bias": (3, 7)}),  # three 1-D convolutions
        ("blocks", {"weight": (7, 7, 3, 3), "bias": (7, 7, 1)}),
        ("blocks", {"kernel": (7, 1, 5, 7)}),  # seven 1-D convolutions with windows of 1, or one with a window of 7 x 1
        ("blocks", {"weight": (4, 7, 5, 1)}),
        ("dense", {"kernel": (5, 7), "bias": (5,)}),
        ("norm", {"weight": (4, 5), "bias": (4, 5)}),
        ("conv2d_transpose", {"kernel": (3, 3, 7, 5), "bias": (7,)}),  # Keras
        ("ConvTranspose_0", {"kernel": (3, 3, 5, 7)}),
        ("deconv1", {"kernel": (3, 3, 5, 7)}),
        ("depthwise_conv2d_1", {"kernel": (3, 3, 5, 1), "bias": (5,)}),
        ("depthwise_conv2d", {"kernel": (3, 3, 5, 2)}),
        ("einsum_dense", {"kernel": (7, 5)}),
        ("einsum_dense", {"kernel": (7, 7), "bias": (7,)}),
    ],
)
def test_without_axes_a_bias_or_a_name_can_leave_a_kernel_unknown(layer, shapes):
    name = next(name for name in shapes if name != "bias")
    assert kernel_axes(None, {layer: _shapes(**shapes)})[f"{layer}/{name}"] is None


@pytest.mark.parametrize(
    ("layer", "shapes", "expected"),
    [
        ("dense", {"kernel": (5, 7), "bias": (1, 7)}, _in_out(2)),
        ("head", {"kernel": (5, 1), "bias": (1,)}, _in_out(2)),
        ("stem", {"kernel": (7, 1, 5, 7), "bias": (7,)}, _in_out(4)),
        ("stem", {"weight": (7, 5, 3, 3), "bias": (7, 1, 1)}, _out_in(4)),
        ("depthwise", {"kernel": (3, 3, 1, 7), "bias": (7,)}, _in_out(4)),
        ("depthwise", {"weight": (7, 1, 3, 3), "bias": (7, 1, 1)}, _out_in(4)),
        ("einsum_dense", {"kernel": (5, 7), "bias": (7,)}, _in_out(2)),
    ],
)
def test_without_axes_a_bias_that_fits_leaves_a_kernel_known(layer, shapes, expected):
    name = next(name for name in shapes if name != "bias")
    assert kernel_axes(None, {layer: _shapes(**shapes)})[f"{layer}/{name}"] == expected


def test_without_axes_scanned_attention_with_as_many_layers_as_heads_is_unknown():
    scanned = {name: _shapes(kernel=(4, 8, 4, 2)) for name in ("query", "key", "value")}
    scanned["out"] = _shapes(kernel=(4, 4, 2, 8))
    assert set(kernel_axes(None, scanned).values()) == {None}


def test_an_einsum_is_unknown_to_flax_unless_its_bias_tells():
    tree = {
        "Einsum_0": _shapes(kernel=(5, 7)),
        "Einsum_1": _shapes(kernel=(7, 7), bias=(7,)),
        "Einsum_2": _shapes(kernel=(5, 7), bias=(7,)),
    }
    found = kernel_axes("flax", tree)
    assert [found[f"Einsum_{i}/kernel"] for i in range(3)] == [None, None, _in_out(2)]
