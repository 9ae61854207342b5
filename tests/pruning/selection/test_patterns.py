"""Structured and per-layer selections agree with plain numpy loops; sizes that do not divide raise an error."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from tests.pruning.steps import largest

RNG = np.random.default_rng(7)
# Whole numbers, so that there are ties and sums are exact.
CONV = RNG.integers(0, 6, (3, 3, 8, 4)).astype(np.float32)
DENSE = RNG.integers(0, 6, (12, 8)).astype(np.float32)
SCORES = {"conv": {"kernel": jnp.asarray(CONV), "bias": None}, "dense": {"kernel": jnp.asarray(DENSE)}}


INPUTS = {  # the axis that is summed over, as axes=
    -2: None,
    -1: {
        "conv/kernel": jprune.KernelAxes(spatial=(0, 1), outputs=(2,), inputs=(3,)),
        "dense/kernel": jprune.KernelAxes(outputs=(0,), inputs=(1,)),
    },
}


def kernels_of(masks):
    return [np.asarray(masks[name]["kernel"]) for name in ("conv", "dense")]


def best_of_neighbours(scores, n, m, axis):
    """Group by group: the n largest, the smaller index first."""
    lanes = np.moveaxis(scores, axis, -1)
    mask = np.zeros(lanes.shape, bool)
    for place in np.ndindex(lanes.shape[:-1]):
        for start in range(0, lanes.shape[-1], m):
            order = np.argsort(-lanes[place][start : start + m], kind="stable")[:n]
            mask[place][start + order] = True
    return np.moveaxis(mask, -1, axis)


@pytest.mark.parametrize(("n", "m", "axis"), [(2, 4, -2), (1, 4, -1), (1, 2, -2), (0, 2, -1), (4, 4, -2), (1, 1, -1)])
def test_n_of_every_m_neighbours_along_an_axis(n, m, axis):
    found = kernels_of(jax.jit(lambda scores: jprune.nm_masks(scores, n=n, m=m, axes=INPUTS[axis]))(SCORES))
    for mask, scores in zip(found, (CONV, DENSE), strict=True):
        np.testing.assert_array_equal(mask, best_of_neighbours(scores, n, m, axis))


def test_n_of_m_along_the_first_axis_and_only_among_allowed_weights():
    mask = jprune.nm_masks(jnp.asarray(DENSE), 2, 3)
    np.testing.assert_array_equal(mask, best_of_neighbours(DENSE, 2, 3, 0))
    alive = RNG.random(DENSE.shape) < 0.5
    mask = np.asarray(jprune.nm_masks(jnp.asarray(DENSE), n=2, m=4, among=jnp.asarray(alive)))
    expected = best_of_neighbours(np.where(alive, DENSE, -1), 2, 4, -2) & alive
    np.testing.assert_array_equal(mask, expected)
    np.testing.assert_array_equal(mask.reshape(3, 4, 8).sum(1), np.minimum(alive.reshape(3, 4, 8).sum(1), 2))


def test_blocks_with_the_largest_sums_over_the_whole_tree():
    found = kernels_of(jprune.block_masks(SCORES, sparsity=0.7, block=(4, 2)))
    sums = [CONV.reshape(3, 3, 2, 4, 2, 2).sum((3, 5)), DENSE.reshape(3, 4, 4, 2).sum((1, 3))]
    chosen = largest(sums, round((36 + 12) * 0.3))
    for mask, blocks in zip(found, chosen, strict=True):
        np.testing.assert_array_equal(mask, np.repeat(np.repeat(blocks, 4, -2), 2, -1))
    by_weights = kernels_of(jprune.block_masks(SCORES, keep=14 * 8, block=(4, 2)))
    for a, b in zip(found, by_weights, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
@pytest.mark.parametrize("axis", [-1, 0])
def test_whole_channels_with_the_largest_mean_scores(axis):
    sparsity = 1 - 5 / sum(x.shape[axis] for x in (CONV, DENSE))
    axes = (
        None
        if axis == -1
        else {
            "conv/kernel": jprune.KernelAxes(outputs=(0,), spatial=(1, 2), inputs=(3,)),
            "dense/kernel": jprune.KernelAxes(outputs=(0,), inputs=(1,)),
        }
    )
    found = kernels_of(jprune.channel_masks(SCORES, sparsity=sparsity, axes=axes))
    means = [np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1).mean(1) for x in (CONV, DENSE)]
    for mask, channels in zip(found, largest(means, 5), strict=True):
        lanes = np.moveaxis(mask, axis, 0)
        np.testing.assert_array_equal(lanes.reshape(len(channels), -1), np.repeat(channels[:, None], lanes[0].size, 1))


def test_blocks_and_channels_keep_only_allowed_weights():
    alive = np.random.default_rng(3).random(DENSE.shape) < 0.5
    alive[:4, :2] = alive[8:, 4:6] = alive[:, 3] = False
    scores, among = jnp.asarray(np.where(alive, DENSE, 9)), jnp.asarray(alive)
    live = np.array(alive.reshape(3, 4, 4, 2).any((1, 3)))
    (blocks,) = largest([np.asarray(scores).reshape(3, 4, 4, 2).sum((1, 3))], 6, [live])
    mask = jprune.block_masks(scores, sparsity=0.5, block=(4, 2), among=among)
    np.testing.assert_array_equal(mask, np.repeat(np.repeat(blocks & live, 4, 0), 2, 1) & alive)
    (channels,) = largest([np.asarray(scores).mean(0)], 4, [alive.any(0)])
    for layerwise in (False, True):
        mask = jprune.channel_masks(scores, keep=4 * 12, layerwise=layerwise, among=among)
        np.testing.assert_array_equal(mask, channels & alive)


def test_channels_layer_by_layer_and_a_floor_of_weights_rounded_up_to_channels():
    found = kernels_of(jprune.channel_masks(SCORES, sparsity=0.5, layerwise=True))
    assert [mask.reshape(-1, mask.shape[-1]).any(0).sum() for mask in found] == [2, 4]
    low = {"a": jnp.ones((3, 4)), "b": 5 + jnp.ones((3, 4))}
    masks = jprune.channel_masks(low, keep=4 * 3, min_keep=4)  # 4 weights are two channels of 3
    assert [int(masks[name].any(0).sum()) for name in "ab"] == [2, 2]


def test_so_many_into_each_output():
    mask = np.asarray(jprune.output_masks(jnp.asarray(DENSE), sparsity=0.75))
    for unit in range(8):
        (expected,) = largest([DENSE[:, unit]], 3)
        np.testing.assert_array_equal(mask[:, unit], expected)
    rows = np.asarray(
        jprune.output_masks(jnp.asarray(DENSE), keep=26, axes={"": jprune.KernelAxes(outputs=(0,), inputs=(1,))})
    )
    assert rows.sum(1).tolist() == [3, 3] + [2] * 10


def erk_by_hand(shapes, total):
    """Evci's loop: densities e * sum(d) / prod(d), dense where that exceeds 1, then e again for the rest."""
    dense = set()
    while True:
        left = total - sum(np.prod(shapes[i]) for i in dense)
        share = sum(sum(s) for i, s in enumerate(shapes) if i not in dense)
        over = {i for i, s in enumerate(shapes) if i not in dense and left * sum(s) > share * np.prod(s)}
        if not over:
            return [np.prod(s) if i in dense else left * sum(s) / share for i, s in enumerate(shapes)]
        dense |= over


@pytest.mark.parametrize("keep", [10, 100, 300, 340, 384])
def test_erk_is_exact_in_total_and_keeps_dense_the_layers_that_would_exceed_one(keep):
    shapes = [(3, 3, 2, 4), (16, 10), (2, 2), (4, 4, 3, 3), (4,)]
    rng = np.random.default_rng(keep)
    scores = [rng.random(shape).astype(np.float32) for shape in shapes]
    convolutions = {"^[03]$": jprune.KernelAxes(spatial=(0, 1), inputs=(2,), outputs=(3,))}
    masks = jprune.erk_masks([jnp.asarray(s) for s in scores], keep=keep, axes=convolutions)
    counts = [int(mask.sum()) for mask in masks]
    assert sum(counts) == keep
    quotas = erk_by_hand(shapes, keep)
    for mask, score, count, quota in zip(masks, scores, counts, quotas, strict=True):
        assert abs(count - quota) < 1
        np.testing.assert_array_equal(mask, largest([score], count)[0])


def test_a_fraction_for_each_leaf_by_regular_expression():
    masks = jprune.layer_masks(SCORES, sparsity={"^conv": 0.5, "dense": jprune.Keep(17)})
    found = kernels_of(masks)
    np.testing.assert_array_equal(found[0], largest([CONV], 144)[0])
    np.testing.assert_array_equal(found[1], largest([DENSE], 17)[0])
    assert masks["conv"]["bias"] is None


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
@pytest.mark.parametrize("select", [jprune.global_masks, jprune.layer_masks, jprune.uniform_masks, jprune.erk_masks])
@pytest.mark.parametrize("min_keep", [0, 3])
def test_every_total_is_exact_and_every_layer_has_its_floor(select, min_keep):
    scores = {"a": jnp.linspace(5, 6, 40).reshape(8, 5), "b": jnp.linspace(0, 1, 6), "c": jnp.ones(2)}
    for keep in (9, 25, 47):
        masks = select(scores, keep=keep, min_keep=min_keep)
        counts = [int(masks[name].sum()) for name in "abc"]
        assert sum(counts) == keep
        assert all(count >= min(min_keep, scores[name].size) for count, name in zip(counts, "abc", strict=True))


@pytest.mark.slow
def test_without_a_floor_a_layer_may_lose_all():
    scores = {"a": jnp.linspace(5, 6, 40), "b": jnp.linspace(0, 1, 6)}
    with pytest.warns(UserWarning, match="no weight is kept in 'b'; keep more, or pass min_keep=1"):
        assert [int(mask.sum()) for mask in jprune.global_masks(scores, keep=20).values()] == [20, 0]
    assert [int(mask.sum()) for mask in jprune.global_masks(scores, keep=20, min_keep=2).values()] == [18, 2]


def test_bernoulli_keeps_what_lies_above_the_complement_of_its_probability():
    draws = np.random.default_rng(0).random(2000).astype(np.float32)
    mask = np.asarray(jprune.selection.bernoulli_masks(jnp.asarray(draws), sparsity=0.7))
    np.testing.assert_array_equal(mask, draws >= np.float32(0.7))
    np.testing.assert_array_equal(jprune.selection.bernoulli_masks(jnp.asarray(draws), keep=600), mask)


@pytest.mark.parametrize("amount", [{"sparsity": 0.9}, {"keep": 200}])
def test_bernoulli_keeps_the_expected_number_among_the_weights_that_are_left(amount):
    """Of 2,000 weights 200 are to be kept, so each of 500 with probability .4."""
    draws = np.random.default_rng(2).random(2000).astype(np.float32)
    among = np.arange(2000) % 4 == 0
    mask = jprune.selection.bernoulli_masks(jnp.asarray(draws), among=jnp.asarray(among), **amount)
    np.testing.assert_array_equal(mask, (draws >= 0.6) & among)
    few = np.arange(2000) < 150  # all are kept where there are fewer than asked for
    mask = jprune.selection.bernoulli_masks(jnp.asarray(draws), among=jnp.asarray(few), **amount)
    np.testing.assert_array_equal(mask, few)


@pytest.mark.parametrize(
    "schedule", [{0: 0.5, 1: 0.75, 2: 0.9}, {0: 0.5, 1: jprune.Keep(10_000), 2: jprune.Keep(4_000)}]
)
def test_bernoulli_reaches_the_amount_of_every_entry_of_a_schedule(schedule):
    params = {"kernel": jnp.ones((200, 200))}
    tx = jprune.prune(jprune.random(), schedule, selection=jprune.selection.bernoulli_masks, key=jax.random.key(1))
    state = tx.init(params)
    for amount in schedule.values():
        _, state = tx.update(params, state, params)
        density = amount.count / 40_000 if isinstance(amount, jprune.Keep) else 1 - amount
        # Four standard deviations of draws among all weights, which exceed those of draws among the weights left.
        kept = int(jprune.masks_of(state)["kernel"].sum())
        assert abs(kept - 40_000 * density) < 4 * math.sqrt(40_000 * density * (1 - density))


def test_the_legacy_threshold_is_a_signed_quantile_compared_with_magnitudes():
    scores = np.random.default_rng(1).normal(size=50).astype(np.float32)
    for keep in (1, 10, 20):
        threshold = np.sort(scores)[::-1][keep - 1]
        mask = np.asarray(jprune.selection.legacy_signed_masks(jnp.asarray(scores), keep=keep))
        np.testing.assert_array_equal(mask, np.abs(scores) >= threshold)
        assert mask.sum() >= keep


ONES = {"a": jnp.ones((6, 4))}
TIED = jprune.KernelAxes(inputs=(0, 1), outputs=(0, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: jprune.nm_masks(ONES, n=2, m=4),
            r"m=4 must divide the inputs .*leaf 'a' of shape \(6, 4\) has 6; leave it out .*exclude='\^a\$'",
        ),
        (lambda: jprune.nm_masks(ONES, n=3, m=2), "n=3, m=2.* 0 <= n <= m"),
        (
            lambda: jprune.nm_masks({"kernel": jnp.ones((4, 4, 4))}),
            r"leaf 'kernel' of shape \(4, 4, 4\): 2:4 groups run.*axes=",
        ),
        (
            lambda: jprune.nm_masks(ONES, axes={"a": TIED}),
            r"leaf 'a' of shape \(6, 4\) is read in two ways.*; leave it out",
        ),
        (lambda: jprune.nm_masks(ONES, 1, 2, sparsity=0.75), r"sparsity=0\.75 keeps 6 of 24 weights, but 1:2 keeps 12"),
        (
            lambda: jprune.nm_masks(ONES, 1, 2, keep=6),
            r"keep=6 keeps 6 of 24 weights, but 1:2 keeps 12; pass sparsity=0\.5",
        ),
        (lambda: jprune.nm_masks(ONES, n=1, m=2, min_keep=13), "min_keep=13, but 1:2 keeps 12 weights of 'a'"),
        (
            lambda: jprune.block_masks(ONES, sparsity=0.5),
            r"block=\(4, 4\) must divide .*leaf 'a' of shape \(6, 4\) has 6 inputs and 4 outputs",
        ),
        (lambda: jprune.block_masks(ONES, sparsity=0.5, block=()), r"block=\(\) must have two sizes"),
        (lambda: jprune.block_masks(ONES, sparsity=0.5, block=(0, 2)), r"block\[0\] is 0; it must be at least 1"),
        (lambda: jprune.block_masks(ONES, keep=5, block=(2, 2)), "keep=5 weights must be a multiple of 4"),
        (
            lambda: jprune.block_masks(ONES, keep=4, block=(2, 2), min_keep=5),
            "min_keep=5 needs 2 blocks or channels, and only 1 are kept; lower",
        ),
        (
            lambda: jprune.channel_masks(ONES, keep=5 * 6),
            r"keep=30 must lie in 0\.\.24, the number of weights; keep fewer",
        ),
        (
            lambda: jprune.block_masks(ONES, keep=28, block=(2, 2)),
            r"keep=28 must lie in 0\.\.24, the number of weights; keep fewer",
        ),
        (
            lambda: jprune.channel_masks(ONES, keep=5),
            r"keep=5 weights must be a multiple of 6, the number of weights of a",
        ),
        (
            lambda: jprune.channel_masks({**ONES, "b": jnp.ones((3, 2))}, keep=6),
            r"have \[3, 6\] weights each; pass sparsity=",
        ),
        (lambda: jprune.channel_masks(ONES, sparsity=1.5, layerwise=True), r"sparsity=1\.5 must be from 0\.0 to 1\.0"),
        (
            lambda: jprune.channel_masks({"kernel": jnp.ones((2, 3, 4))}, keep=12),
            r"'kernel' of shape \(2, 3, 4\): channels are its",
        ),
        (
            lambda: jprune.output_masks({"kernel": jnp.ones((2, 3, 4))}, keep=12),
            r"'kernel' of shape \(2, 3, 4\): weights into one",
        ),
        (
            lambda: jprune.block_masks({"kernel": jnp.ones((2, 4, 4))}, sparsity=0.5),
            r"'kernel' of shape \(2, 4, 4\): blocks run",
        ),
        (
            lambda: jprune.global_masks(ONES, keep=3, min_keep=4),
            "min_keep=4 in 1 layers needs 4 weights, and only 3 are kept",
        ),
        (
            lambda: jprune.layer_masks({**ONES, "b": jnp.ones(3)}, sparsity={"a": 0.5}),
            "has no key that matches layer 'b'",
        ),
        (
            lambda: jprune.layer_masks(ONES, sparsity={"(": 0.5}),
            r"amounts per layer has the key '\(', which is not a regular expression",
        ),
        (
            lambda: jprune.layer_masks(ONES, keep={"a": 25}),
            r"keep\['a'\]=25 must lie in 0\.\.24, the number of weights of 'a'",
        ),
        (lambda: jprune.global_masks({"a": None}, keep=1), "nothing to prune: every leaf is None"),
    ],
)
def test_what_does_not_fit_is_refused_by_argument_value_and_leaf(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: jprune.global_masks(ONES, keep=True), "keep=True must be an integer"),
        (lambda: jprune.global_masks({"a": jnp.arange(3)}, keep=1), r"int32\[3\] at 'a'; a score must be a float"),
        (lambda: jprune.global_masks(ONES, keep=1, among={"a": jnp.ones((6, 4))}), r"at 'a'; it must be a bool"),
        (lambda: jprune.apply_masks(ONES, {"a": jnp.ones((6, 4))}), r"float32\[6, 4\] at 'a'; it must be a bool"),
        (lambda: jprune.keep_count(ONES, ratio=True), "ratio=True must be a number"),
        (lambda: jprune.nm_masks(ONES, axis=0), "nm_masks has no argument axis=; use axes="),
        (lambda: jprune.output_masks(ONES, sparsity=0.5, axis=0), "output_masks has no argument axis=; use axes="),
    ],
)
def test_invalid_numbers_and_masks_are_refused(call, message):
    with pytest.raises(TypeError, match=message):
        call()


def test_selections_are_the_same_twice_and_in_any_container():
    leaves = [SCORES["conv"]["kernel"], SCORES["dense"]["kernel"]]
    for select in (jprune.global_masks, jprune.erk_masks, jprune.uniform_masks):
        axes = {"^0$": jprune.KernelAxes(spatial=(0, 1), inputs=(2,), outputs=(3,))}
        runs = [select(container(leaves), keep=100, axes=axes) for container in (list, tuple, list)]
        for one, other in itertools.pairwise(runs):
            for a, b in zip(one, other, strict=True):
                np.testing.assert_array_equal(a, b)


def test_leaving_out_a_tied_leaf_as_the_error_says_prunes_the_other_kernels_of_the_graph():
    params = {"embed": jnp.ones((8, 4)), "w": jnp.ones((4, 4))}
    apply = lambda p, x: p["embed"][x] @ p["w"] @ p["embed"].T
    graph = jprune.trace_model(apply, params, jnp.zeros(3, jnp.int32))
    tx = lambda **where: jprune.prune(jprune.magnitude(), {0: 0.5}, selection=jprune.nm_masks, axes=graph, **where)
    with pytest.raises(ValueError, match=r"'embed' .* read in two ways .*where=jprune\.by_path\(exclude='\^embed\$'\)"):
        tx().init(params)
    masks = jprune.masks_of(tx(where=jprune.by_path(exclude="^embed$")).init(params))
    assert masks["embed"] is None
    assert masks["w"].shape == (4, 4)
