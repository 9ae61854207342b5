"""Selections that know the axes: stacked layers, attention projections and Equinox kernels, by hand."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune.selection import erk_counts, layer_counts
from tests.pruning.steps import largest

RNG = np.random.default_rng(11)
KEY = jax.random.key(0)
# Four layers in one leaf, as nn.scan and nnx.scan make them; each ten times smaller than the one before.
STACK = jnp.abs(jax.random.normal(KEY, (4, 16, 16))) * jnp.array([1, 0.1, 0.01, 0.001])[:, None, None]
BLOCKS = {"blocks": {"kernel": STACK}}
STACKED = {"^blocks/kernel$": jprune.KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
ATTENTION = {
    "query": jprune.KernelAxes(inputs=(0,), outputs=(1, 2)),
    "out": jprune.KernelAxes(inputs=(0, 1), outputs=(2,)),
    "equinox": jprune.KernelAxes(outputs=(0,), inputs=(1,)),
    "grouped": jprune.KernelAxes(spatial=(0,), inputs=(1,), outputs=(2,), groups=2),
    "scanned": jprune.KernelAxes(stacked=(0,), inputs=(1,), outputs=(2, 3)),
}
SHAPES = {"query": (24, 3, 4), "out": (3, 8, 10), "equinox": (5, 12), "grouped": (3, 4, 6), "scanned": (2, 8, 3, 2)}
PROJECTIONS = {name: jnp.asarray(RNG.integers(0, 9, shape), jnp.float32) for name, shape in SHAPES.items()}


def per_layer(masks):
    return masks["blocks"]["kernel"].sum((1, 2)).tolist()


def rows(name, array):
    """One row for each true output of each layer, its inputs in row-major order: by numpy."""
    own, array = ATTENTION[name], np.asarray(array)
    order = (*own.stacked, *own.outputs, *own.spatial, *own.inputs)
    return array.transpose(order).reshape(-1, int(np.prod([array.shape[a] for a in (*own.spatial, *own.inputs)])))


@pytest.mark.parametrize(
    "select",
    [
        jprune.layer_masks,
        jprune.erk_masks,
        jprune.uniform_masks,
    ],
)
def test_each_layer_of_a_stack_keeps_its_own_share(select):
    assert per_layer(select(BLOCKS, keep=256, axes=STACKED)) == [64, 64, 64, 64]
    assert per_layer(select(BLOCKS, sparsity=0.75, axes=STACKED)) == [64, 64, 64, 64]
    masks = select(BLOCKS, keep=256, axes=STACKED)["blocks"]["kernel"]
    for mask, scores in zip(masks, STACK, strict=True):
        np.testing.assert_array_equal(mask, largest([scores], 64)[0])


def test_without_axes_a_stack_is_pooled_and_a_warning_says_so():
    message = (
        r"leaf 'blocks/kernel' of shape \(4, 16, 16\): layer_masks treats it as one layer.*axes=jprune.trace_model"
    )
    with pytest.warns(UserWarning, match=message):
        assert per_layer(jprune.layer_masks(BLOCKS, keep=256)) == [225, 31, 0, 0]


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
def test_a_floor_holds_in_every_layer_of_a_stack():
    assert per_layer(jprune.global_masks(BLOCKS, keep=256, axes=STACKED)) == [225, 31, 0, 0]
    floored = per_layer(jprune.global_masks(BLOCKS, keep=256, min_keep=16, axes=STACKED))
    assert sum(floored) == 256
    assert floored[2:] == [16, 16]
    with pytest.raises(ValueError, match="min_keep=65 in 4 layers needs 260 weights, and only 256 are kept"):
        jprune.global_masks(BLOCKS, keep=256, min_keep=65, axes=STACKED)
    with pytest.warns(UserWarning, match="min_keep treats it as one layer"):
        jprune.global_masks(BLOCKS, keep=256, min_keep=16)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "among"])
def test_a_layer_of_a_stack_that_is_short_is_compensated_by_the_others(masked):
    among = {"blocks": {"kernel": jnp.ones((4, 16, 16), bool).at[1, :, 2:].set(False)}} if masked else None
    counts = per_layer(jprune.layer_masks(BLOCKS, keep=256, among=among, axes=STACKED))
    assert sum(counts) == 256
    assert counts[1] == (32 if masked else 64)
    assert per_layer(jprune.layer_masks(BLOCKS, sparsity=0.75, among=among, axes=STACKED))[1] == (32 if masked else 64)


def test_amounts_by_pattern_and_traced_counts_are_for_each_layer_of_a_stack():
    tree = BLOCKS | {"head": {"kernel": STACK[0]}}
    masks = jprune.layer_masks(tree, sparsity={"^blocks/kernel$": 0.75, "head": 0.5}, axes=STACKED)
    assert per_layer(masks) == [64] * 4
    assert int(masks["head"]["kernel"].sum()) == 128
    select = jax.jit(lambda keep: jprune.layer_masks(tree, keep=keep, axes=STACKED))
    masks = select(jnp.array([1, 2, 3, 4, 5]))
    assert per_layer(masks) == [1, 2, 3, 4]
    assert int(masks["head"]["kernel"].sum()) == 5
    with pytest.raises(ValueError, match=r"one count for each of the 5 layers: blocks/kernel\[0\], .*head/kernel"):
        select(jnp.array([1, 2]))


def test_a_schedule_prunes_each_layer_of_a_stack_in_one_program():
    tx = optax.chain(
        optax.sgd(0.0), jprune.prune(jprune.magnitude(), {0: 0.5, 1: 0.75}, selection=jprune.layer_masks, axes=STACKED)
    )
    state, step = tx.init(BLOCKS), jax.jit(tx.update)
    for kept in (128, 64):
        _, state = step(BLOCKS, state, BLOCKS)
        assert per_layer(jprune.masks_of(state)) == [kept] * 4


def test_erk_counts_all_inputs_and_all_outputs_of_a_projection_as_one_dimension():
    shapes = {
        "query": jax.ShapeDtypeStruct((24, 3, 4), jnp.float32),  # 24 + 12
        "conv": jax.ShapeDtypeStruct((3, 24, 12), jnp.float32),  # 3 + 24 + 12
        "blocks": jax.ShapeDtypeStruct((2, 24, 12), jnp.float32),  # 24 + 12 each
    }
    axes = {
        "query": jprune.KernelAxes(inputs=(0,), outputs=(1, 2)),
        "conv": jprune.KernelAxes(spatial=(0,), inputs=(1,), outputs=(2,)),
        "blocks": jprune.KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,)),
    }
    # Leaves in the order of their names; shares 36, 36, 39, 36 of 147.
    assert erk_counts(shapes, keep=147, axes=axes) == [36, 36, 39, 36]
    assert layer_counts(shapes, sparsity=0.5, axes=axes) == [144, 144, 432, 144]


@pytest.mark.parametrize("name", SHAPES)
def test_two_of_four_run_along_the_axes_that_are_summed_over(name):
    select = jax.jit(lambda scores: jprune.nm_masks({name: scores}, axes={name: ATTENTION[name]})[name])
    mask = select(PROJECTIONS[name])
    found, scores = rows(name, mask), rows(name, PROJECTIONS[name])
    groups = found.reshape(-1, 4)
    assert set(groups.sum(1).tolist()) == {2}
    for group, score in zip(groups, scores.reshape(-1, 4), strict=True):
        np.testing.assert_array_equal(group, largest([score], 2)[0])


def test_the_conventions_of_flax_attention_and_equinox_layers_need_no_graph():
    flax = {"attention": {k: {"kernel": PROJECTIONS["query"]} for k in ("query", "key", "value")}}
    flax["attention"]["out"] = {"kernel": PROJECTIONS["out"]}
    masks = jprune.nm_masks(flax, axes="flax")["attention"]
    assert set(rows("query", masks["key"]["kernel"]).reshape(-1, 4).sum(1).tolist()) == {2}
    assert set(rows("out", masks["out"]["kernel"]).reshape(-1, 4).sum(1).tolist()) == {2}
    weight = jprune.nm_masks({"linear": {"weight": PROJECTIONS["equinox"]}})["linear"]["weight"]
    assert set(weight.reshape(-1, 4).sum(1).tolist()) == {2}


@pytest.mark.parametrize(
    "name", [pytest.param("query", marks=pytest.mark.slow), "out", "equinox", "grouped", "scanned"]
)
def test_every_true_output_keeps_the_same_number(name):
    axes = {name: ATTENTION[name]}
    mask = jax.jit(lambda scores: jprune.output_masks({name: scores}, sparsity=0.5, axes=axes)[name])(PROJECTIONS[name])
    found, scores = rows(name, mask), rows(name, PROJECTIONS[name])
    for row, score in zip(found, scores, strict=True):
        np.testing.assert_array_equal(row, largest([score], score.size // 2)[0])


def test_half_of_a_query_keeps_twelve_of_its_24_inputs_for_every_output():
    mask = jprune.output_masks({"query": PROJECTIONS["query"]}, sparsity=0.5, axes={"query": ATTENTION["query"]})[
        "query"
    ]
    assert mask.sum(0).tolist() == [[12] * 4] * 3


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
def test_channels_and_outputs_of_a_stack_belong_to_its_layers():
    masks = jprune.channel_masks(BLOCKS, sparsity=0.5, layerwise=True, axes=STACKED)["blocks"]["kernel"]
    assert masks.any(1).sum(1).tolist() == [8, 8, 8, 8]
    for mask, layer in zip(masks, np.asarray(STACK), strict=True):
        np.testing.assert_array_equal(mask, np.broadcast_to(largest([layer.mean(0)], 8)[0], (16, 16)))
    pooled = jprune.channel_masks(BLOCKS, sparsity=0.5, axes=STACKED)["blocks"]["kernel"].any(1)
    (expected,) = largest([np.asarray(STACK).mean(1)], 32)
    np.testing.assert_array_equal(pooled, expected)
    assert jprune.output_masks(BLOCKS, keep=256, axes=STACKED)["blocks"]["kernel"].sum(1).tolist() == [[4] * 16] * 4


def test_blocks_are_of_inputs_and_outputs_for_any_order_of_the_axes():
    scores = jnp.asarray(RNG.random((8, 6)), jnp.float32)
    plain = jprune.block_masks({"kernel": scores}, sparsity=0.5, block=(4, 2))["kernel"]
    turned = jprune.block_masks({"weight": scores.T}, sparsity=0.5, block=(4, 2))["weight"]
    np.testing.assert_array_equal(turned, plain.T)
    masks = jprune.block_masks(BLOCKS, keep=16 * 16, axes=STACKED, min_keep=16)["blocks"]["kernel"]
    counts = masks.reshape(4, 4, 4, 4, 4).sum((2, 4))
    assert set(counts.ravel().tolist()) == {0, 16}
    assert (counts.sum((1, 2)) >= 16).all()


@pytest.mark.parametrize(
    ("select", "shape", "message"),
    [
        (
            jprune.nm_masks,
            (6, 4),
            r"m=4 must divide the inputs .*leaf 'a/kernel' of shape \(6, 4\).*where=jprune.by_path",
        ),
        (jprune.nm_masks, (4, 4, 4), r"leaf 'a/kernel' of shape \(4, 4, 4\): 2:4 groups run along its inputs.*axes="),
        (jprune.output_masks, (4, 4, 4), r"leaf 'a/kernel' of shape \(4, 4, 4\): weights into one output.*axes="),
        (
            functools.partial(jprune.block_masks, block=(4, 4)),
            (6, 4),
            r"leaf 'a/kernel' of shape \(6, 4\) has 6 inputs",
        ),
    ],
)
def test_what_does_not_fit_is_refused_at_init(select, shape, message):
    tx = jprune.prune(jprune.magnitude(), {100: 0.5}, selection=select)
    with pytest.raises(ValueError, match=message):
        tx.init({"a": {"kernel": jnp.ones(shape)}})


def test_per_layer_selections_warn_at_init_where_axes_are_unknown():
    tx = jprune.prune(jprune.magnitude(), {100: 0.5}, selection=jprune.layer_masks)
    with pytest.warns(UserWarning, match=r"leaf 'a/kernel' of shape \(4, 4, 4\): layer_masks treats it as one layer"):
        tx.init({"a": {"kernel": jnp.ones((4, 4, 4))}})


# What prune reads of a graph: the axes and shapes of all leaves, and which of them are kernels.
GRAPH = types.SimpleNamespace(
    axes={
        "cell/weight_hh": jprune.KernelAxes(outputs=(0,), inputs=(1,)),
        "norm/weight": jprune.KernelAxes(outputs=(0, 1)),
        "blocks/lora_a": jprune.KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,)),
    },
    shapes={"cell/weight_hh": (8, 4), "norm/weight": (4, 4), "blocks/lora_a": (2, 4, 3)},
    unknown={},
    kernels=("cell/weight_hh", "blocks/lora_a"),
)


def test_with_a_graph_the_default_prunes_the_kernels_of_its_products():
    params = {path.split("/")[0]: {path.split("/")[1]: jnp.ones(shape)} for path, shape in GRAPH.shapes.items()}
    assert [leaf.path for leaf in jprune.prunable(params)] == ["norm/weight"]  # by names and shapes alone
    assert [leaf.path for leaf in jprune.prunable(params, axes=GRAPH)] == ["blocks/lora_a", "cell/weight_hh"]
    tx = jprune.prune(jprune.magnitude(), {0: 0.5}, selection=jprune.nm_masks, axes=GRAPH)
    _, state = tx.update(params, tx.init(params), params)
    assert state.masks["norm"]["weight"] is None
    assert set(state.masks["cell"]["weight_hh"].sum(1).tolist()) == {2}
    assert set(state.masks["blocks"]["lora_a"].sum(1).ravel().tolist()) == {2}
    with pytest.raises(ValueError, match="axes is the graph of another model: it has no leaf 'other/kernel'"):
        jprune.layer_masks({"other": {"kernel": jnp.ones((4, 4))}}, sparsity=0.5, axes=GRAPH)
