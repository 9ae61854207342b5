"""Exactly as many weights as asked, the same ones as a stable numpy sort, and errors that name the leaf."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune


def largest_by_numpy(arrays, keep):
    """The stable order: by score, then by position in the flattened tree."""
    flat = np.concatenate([np.asarray(a, np.float64).reshape(-1) for a in arrays])
    chosen = np.zeros(flat.size, bool)
    chosen[np.argsort(-flat, kind="stable")[:keep]] = True
    return chosen


def flat_masks(masks):
    return np.concatenate([np.asarray(mask).reshape(-1) for mask in masks])


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
@settings(max_examples=15)
@given(st.data())
def test_global_masks_keep_what_a_stable_sort_keeps_on_any_tree_with_ties(data):
    shapes = data.draw(st.sampled_from([[(3,)], [(2, 3), (4,)], [(5, 2), (1, 3), (2, 2)]]))
    seed, values = data.draw(st.integers(0, 10**6)), data.draw(st.sampled_from([1, 2, 3, 100]))
    rng = np.random.default_rng(seed)
    arrays = [jnp.asarray(rng.integers(0, values, shape) - 1, jnp.float32) for shape in shapes]
    total = sum(a.size for a in arrays)
    keep = data.draw(st.integers(0, total))
    np.testing.assert_array_equal(flat_masks(jprune.global_masks(arrays, keep=keep)), largest_by_numpy(arrays, keep))


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
@pytest.mark.parametrize("keep", [0, 1, 7, 11, 12])
def test_all_equal_scores_are_cut_by_position(keep):
    masks = jprune.global_masks([jnp.ones((2, 3)), jnp.ones(6)], keep=keep)
    assert flat_masks(masks).tolist() == [i < keep for i in range(12)]


@pytest.mark.slow
def test_a_resnet_50_pruned_to_98_percent_keeps_exactly_511141():
    rng = np.random.default_rng(0)
    sizes = [25_557_032 - 9_408 - 2_048_000, 9_408, 2_048_000]
    scores = [rng.random(size, dtype=np.float32) for size in sizes]
    masks = jprune.global_masks([jnp.asarray(s) for s in scores], keep=round(25_557_032 * (1 - 0.98)))
    chosen = flat_masks(masks)
    assert int(chosen.sum()) == 511_141
    flat = np.concatenate(scores)
    assert flat[chosen].min() >= flat[~chosen].max()


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
@pytest.mark.parametrize(("keep", "kept"), [(0.5, 2), (0.3, 2), (0.1, 0), (1.0, 5), (0.0, 0)])
def test_a_fraction_rounds_half_to_even(keep, kept):
    assert int(jprune.global_masks([jnp.arange(5.0)], sparsity=1.0 - keep)[0].sum()) == kept == round(5 * keep)


def test_layer_masks_keep_the_largest_of_each_layer():
    scores = {"a": jnp.array([5.0, 6.0, 7.0, 8.0]), "b": jnp.array([1.0, 4.0, 2.0, 3.0]), "c": None}
    masks = jprune.layer_masks(scores, sparsity=0.5)
    assert masks["a"].tolist() == [False, False, True, True]
    assert masks["b"].tolist() == [False, True, False, True]
    assert masks["c"] is None


@pytest.mark.parametrize(
    ("select", "amount", "kept"),
    [
        (jprune.layer_masks, {"keep": 4}, [1, 3]),
        (jprune.layer_masks, {"sparsity": 0.5}, [1, 2]),
        (jprune.layer_masks, {"keep": {"": 2}}, [1, 2]),
        (jprune.uniform_masks, {"keep": 4}, [1, 3]),
        (jprune.uniform_masks, {"sparsity": 0.5}, [1, 3]),
        (jprune.erk_masks, {"keep": 4}, [1, 3]),
    ],
)
def test_other_layers_compensate_for_a_short_layer_if_a_total_is_given(select, amount, kept):
    scores = {"a": jnp.array([4.0, 3.0, 2.0, 1.0]), "b": jnp.array([5.0, 6.0, 7.0, 8.0])}
    masks = select(scores, **amount, among={"a": jnp.array([False, False, True, False]), "b": None})
    assert masks["a"].tolist() == [False, False, True, False]
    assert masks["b"].tolist() == [i >= 4 - kept[1] for i in range(4)]


def test_one_program_selects_by_any_counts_that_are_traced():
    rng = np.random.default_rng(4)
    arrays = [rng.integers(0, 4, (3, 4)).astype(np.float32), 5 + rng.integers(0, 4, 5).astype(np.float32)]
    by_layer = jax.jit(lambda scores, keep: jprune.layer_masks(scores, keep=keep))
    whole = jax.jit(lambda scores, keep: jprune.global_masks(scores, keep=keep, min_keep=2))
    for each in ([3, 2], [0, 5], [12, 1]):
        masks = by_layer([jnp.asarray(a) for a in arrays], jnp.asarray(each))
        for mask, array, keep in zip(masks, arrays, each, strict=True):
            np.testing.assert_array_equal(np.ravel(mask), largest_by_numpy([array], keep))
    for keep, kept in ((4, [2, 2]), (6, [2, 4]), (9, [4, 5])):  # the second array has the larger scores
        masks = whole([jnp.asarray(a) for a in arrays], jnp.asarray(keep, jnp.uint8))
        for mask, array, number in zip(masks, arrays, kept, strict=True):
            np.testing.assert_array_equal(np.ravel(mask), largest_by_numpy([array], number))


def test_a_numpy_count_of_more_than_32_bits_is_not_truncated():
    masks = jprune.global_masks({"a": jnp.array([3.0, 1.0, 2.0])}, keep=np.array(2**32 + 1))  # its low 32 bits are 1
    assert masks["a"].tolist() == [True, True, True]
    masks = jprune.layer_masks([jnp.ones(2), jnp.array([1.0, 2.0])], keep=np.array([2**32, 1]))  # its low 32 bits are 0
    assert [mask.tolist() for mask in masks] == [[True, True], [False, True]]


def test_two_of_four_keeps_two_of_every_four_inputs():
    scores = {"kernel": jnp.asarray(np.random.default_rng(1).random((8, 3)), jnp.float32)}
    mask = np.asarray(jprune.nm_masks(scores, n=2, m=4)["kernel"])
    groups, values = mask.reshape(2, 4, 3), np.asarray(scores["kernel"]).reshape(2, 4, 3)
    assert (groups.sum(1) == 2).all()
    kept_least = np.where(groups, values, np.inf).min(1)
    assert (kept_least >= np.where(groups, -np.inf, values).max(1)).all()


def test_achieved_sparsity_and_compression_are_exact():
    params = {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5), "step": jnp.int32(3)}
    masks = {"kernel": jnp.arange(20).reshape(4, 5) < 5, "bias": None, "step": None}
    assert jprune.sparsity(masks) == 0.75
    assert jprune.selection.compression(params, masks) == 25 / 10
    pruned = jprune.apply_masks(params, masks)
    assert int((pruned["kernel"] != 0).sum()) == 5
    assert pruned["bias"] is params["bias"]


def test_keep_count_reaches_the_ratio_of_the_whole_model_or_says_which_it_can():
    params = {"kernel": jnp.ones((30, 30)), "bias": jnp.ones(100)}
    assert jprune.keep_count(params, ratio=4.0, where=jprune.kernels) == 150
    with pytest.raises(ValueError, match=r"ratio=11.* 1000/100 = 10"):
        jprune.keep_count(params, ratio=11.0, where=jprune.kernels)


def _convolution(inputs, outputs, bias=True):
    kernel = {"kernel": jax.ShapeDtypeStruct((3, 3, inputs, outputs), jnp.float32)}
    return kernel | ({"bias": jax.ShapeDtypeStruct((outputs,), jnp.float32)} if bias else {})


def _dense(inputs, outputs):
    kernel, bias = ((inputs, outputs), (outputs,))
    return {
        "kernel": jax.ShapeDtypeStruct(kernel, jnp.float32),
        "bias": jax.ShapeDtypeStruct(bias, jnp.float32),
    }


LENET = {
    "conv1": _convolution(1, 6),
    "conv2": _convolution(6, 16),
    "dense1": _dense(400, 120),
    "dense2": _dense(120, 84),
    "head": _dense(84, 10),
}
HIDDEN = jprune.by_path(exclude="^head/")


@pytest.mark.parametrize(("ratio", "kept"), [(2, 29_076), (4, 14_114), (10, 5_138), (20, 2_145), (50, 350)])
def test_keep_count_by_shrinkbench_keeps_what_the_published_code_keeps_of_a_lenet(ratio, kept):
    assert sum(leaf.size for leaf in jax.tree.leaves(LENET)) == 60_074
    assert jprune.keep_count(LENET, ratio=ratio, where=HIDDEN, counting="shrinkbench") == kept


def test_keep_count_takes_the_largest_ratio_although_its_float_exceeds_it():
    """111 / 11 in floats is above 111/11, and the message gave this ratio as the largest one."""
    assert jprune.keep_count({"kernel": jnp.ones((10, 10)), "bias": jnp.ones(11)}, ratio=111 / 11) == 0


def test_keep_count_by_shrinkbench_reaches_70_on_a_lenet_where_the_exact_count_reaches_55():
    assert jprune.keep_count(LENET, ratio=50, where=HIDDEN) == 125
    assert jprune.keep_count(LENET, ratio=1, where=HIDDEN, counting="shrinkbench") == 58_998
    with pytest.raises(ValueError, match=r"60074/1076 = 55\.83"):
        jprune.keep_count(LENET, ratio=56, where=HIDDEN)
    with pytest.raises(ValueError, match=r"60074/850 = 70\.67"):
        jprune.keep_count(LENET, ratio=71, where=HIDDEN, counting="shrinkbench")


def test_keep_count_by_shrinkbench_changes_nothing_without_biases_in_prunable_layers():
    norm = {"scale": jax.ShapeDtypeStruct((16,), jnp.float32), "bias": jax.ShapeDtypeStruct((16,), jnp.float32)}
    model = {"conv": _convolution(3, 16, bias=False), "norm": norm, "head": _dense(16, 10)}
    for ratio in (1, 2, 2.5):
        exact = jprune.keep_count(model, ratio=ratio, where=HIDDEN)
        assert jprune.keep_count(model, ratio=ratio, where=HIDDEN, counting="shrinkbench") == exact


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jprune.global_masks({"a": jnp.ones(3)}, keep=4), r"keep=4 must lie in 0\.\.3"),
        (lambda: jprune.global_masks({"a": jnp.ones(3)}, keep=-1), "keep=-1"),
        (lambda: jprune.global_masks({"a": jnp.ones(3)}, keep=jnp.array(1), min_keep=2), "and only 1 are kept"),
        (lambda: jprune.erk_masks({"a": jnp.ones(3)}, keep=jnp.array(2)), "keep is an array; .* pass an int"),
        (
            lambda: jprune.selection.erk_counts({"a/b": jnp.ones((4, 8)), "a": {"b": jnp.ones((3, 3, 8, 2))}}, keep=40),
            "two leaves with the path 'a/b'",
        ),
        *(
            (
                functools.partial(select, {"a": jnp.ones(3), "b": jnp.ones(4)}, keep=keep),
                rf"shape \({keep.size},\); .* scalar",
            )
            for select in (jprune.global_masks, jprune.selection.legacy_signed_masks)
            for keep in (np.array([2, 3]), jnp.array([2]))
        ),
        (lambda: jprune.global_masks({"a": jnp.ones(3)}, sparsity=1.5), r"sparsity=1\.5 must be from 0\.0 to 1\.0"),
        (lambda: jprune.global_masks({"a": jnp.array([1.0, jnp.nan])}, keep=1), "NaN at 'a'"),
        (
            lambda: jprune.apply_masks({"a": jnp.ones(3)}, {"b": jnp.ones(3, bool)}),
            "masks has no leaf 'a', which params has",
        ),
        (lambda: jprune.apply_masks({"a": jnp.ones(3)}, {"a": jnp.ones(4, bool)}), r"\(4,\) at 'a'"),
        (
            lambda: jprune.layer_masks({"a": jnp.ones(3)}, sparsity={"nothing": 0.5}),
            "key 'nothing', which matches no layer",
        ),
        (
            lambda: jprune.keep_count({"kernel": jnp.ones((3, 2))}, ratio=math.inf),
            "ratio=inf must lie between 1 and inf",
        ),
        (
            lambda: jprune.keep_count({"kernel": jnp.ones((3, 2))}, ratio=math.nan),
            "ratio=nan must lie between 1 and inf",
        ),
        (
            lambda: jprune.keep_count({"kernel": jnp.ones((3, 2))}, ratio=0.99),
            r"ratio=0\.99 must lie between 1 and inf",
        ),
        (lambda: jprune.keep_count(LENET, ratio=2, counting="nominal"), "counting='nominal' is unknown; use 'exact'"),
        (lambda: jprune.sparsity({"a": None, "b": jnp.ones(0, bool)}), "every leaf is None or empty"),
        (
            lambda: jax.jit(lambda mask: jprune.sparsity([mask, np.ones(2, bool)]))(jnp.ones(2, bool)),
            "masks are traced",
        ),
    ],
)
def test_bad_input_is_refused_by_value_and_leaf(call, message):
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"kernel": jnp.array([0.5, 0.0])}}, r"masks has float32\[2\] at 'a/kernel'; .* count zeros"),
        ({"kernel": jnp.array([2, 0])}, r"masks has int32\[2\] at 'kernel'; .* only zeros and ones"),
        (
            jprune.prune(jprune.magnitude(), {0: 0.5}).init({"kernel": jnp.ones((1, 2))}),
            r"int32\[\] at 'count'.*masks_of",
        ),
        ({"kernel": 0.5}, "masks has 0.5 at 'kernel'"),
    ],
    ids=["weights", "integers", "state", "number"],
)
def test_the_sparsity_of_anything_but_masks_is_refused_by_leaf(tree, message):
    with pytest.raises(TypeError, match=message):
        jprune.sparsity(tree)


def test_masks_of_zeros_and_ones_count_as_bools():
    assert jprune.sparsity({"kernel": jnp.array([1, 0, 0, 0]), "bias": None}) == 0.75


def test_the_first_expression_that_matches_a_layer_decides_and_one_that_never_does_is_refused():
    scores = {"body": {"kernel": jnp.arange(10.0)}, "head": {"kernel": jnp.arange(10.0)}}
    masks = jprune.layer_masks(scores, sparsity={"^body/": 0.9, "kernel": 0.5, "": 0.0})
    assert [int(masks[name]["kernel"].sum()) for name in ("body", "head")] == [1, 5]
    with pytest.raises(
        ValueError, match="key '\\^body/', which decides for no layer: 'body/kernel' also matches 'kernel'"
    ):
        jprune.layer_masks(scores, sparsity={"kernel": 0.5, "^body/": 0.9})


def _normalized(last):
    return nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), last, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))


@pytest.mark.parametrize(
    ("params", "instead"),
    [
        (
            lambda: _normalized(nnx.BatchNorm(8, rngs=nnx.Rngs(2))),
            r"\(BatchStat\): pass nnx\.state\(model, nnx\.Param\)",
        ),
        (lambda: nnx.state(_normalized(nnx.BatchNorm(8, rngs=nnx.Rngs(2)))), r"\(BatchStat\): pass nnx\.state"),
        (
            lambda: {"params": {"one": {"kernel": jnp.ones((4, 8))}}, "batch_stats": {"norm": {"mean": jnp.ones(8)}}},
            r"has 'batch_stats', .*pass variables\['params'\]",
        ),
    ],
    ids=["module", "state", "linen"],
)
def test_batch_statistics_are_not_counted_as_parameters(params, instead):
    tree = params()
    masks = jprune.global_masks(jprune.magnitude()(tree), sparsity=0.5)
    for count in (
        lambda: jprune.keep_count(tree, ratio=1.5),
        lambda: jprune.selection.compression(tree, masks),
        lambda: jprune.cost_table(tree, masks),
    ):
        with pytest.raises(ValueError, match=instead):
            count()


def test_the_random_stream_of_a_module_is_no_obstacle_to_counting():
    module = _normalized(nnx.Dropout(0.5, rngs=nnx.Rngs(2)))
    assert jprune.keep_count(module, ratio=2) == 58 // 2 - 10  # 48 weights, 10 biases
    assert jprune.cost_table(module).loc["total", "parameters"] == 58


def test_the_kernels_of_a_graph_are_those_that_a_compression_ratio_counts():
    params = {"w": jnp.ones((4, 4)), "table": jnp.ones((4, 4))}
    graph = jprune.trace_model(lambda p, x: x @ p["w"] + p["table"], params, jnp.ones((4, 4)))
    assert jprune.keep_count(params, ratio=1.6, axes=graph) == 32 / 1.6 - 16
