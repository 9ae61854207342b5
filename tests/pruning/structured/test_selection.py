"""Budgets are met exactly by removing the channels with the lowest scores; errors name the channels that must stay."""

import functools
import re
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType

import jprune
from jprune.graph import trace_model
from jprune.pruning.structured import budgets
from jprune.pruning.structured.selection import refuse_no_graph
from tests.pruning.structured.models import MODELS
from tests.pruning.structured.test_removal import graph_of, masks_like

WIDTHS = (5, 8, 6, 3)


def select(graph, scores, **options):
    """The selection as one program; errors, and the order of the mean scores, are tested outside jit too."""
    return jax.jit(lambda scores: jprune.channel_group_masks(graph, scores, **options))(scores)


def chain():
    """Dense layers of 5, 8, 6 and 3 units without biases: 5 * 8 + 8 * 6 + 6 * 3 = 106 weights."""
    rng = np.random.default_rng(0)
    shapes = zip("abc", WIDTHS, WIDTHS[1:], strict=False)
    params = {name: jnp.asarray(rng.normal(size=(i, o)), jnp.float32) for name, i, o in shapes}
    apply = lambda p, x: jnp.tanh(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
    return params, trace_model(apply, params, jax.ShapeDtypeStruct((2, 5), jnp.float32))


def kept_widths(masks):
    """How many of the 8 and of the 6 units are left, after a check that masks are those of whole units."""
    a, b, c = (np.asarray(masks[name]) for name in "abc")
    first, second = a[0], c[:, 0]
    np.testing.assert_array_equal(a, np.broadcast_to(first, a.shape))
    np.testing.assert_array_equal(b, first[:, None] & second[None, :])
    np.testing.assert_array_equal(c, np.broadcast_to(second[:, None], c.shape))
    return int(first.sum()), int(second.sum())


def cost(first, second):
    return 5 * first + first * second + 3 * second


def test_channels_are_removed_in_the_order_of_their_mean_scores():
    params, graph = chain()
    scores = jax.tree.map(jnp.abs, params)
    means = [("a", i, (np.abs(params["a"])[:, i].sum() + np.abs(params["b"])[i].sum()) / 11) for i in range(8)] + [
        ("b", i, (np.abs(params["b"])[:, i].sum() + np.abs(params["c"])[i].sum()) / 11) for i in range(6)
    ]
    worst = {(name, i) for name, i, _ in sorted(means, key=lambda entry: entry[2])[:5]}
    masks = jprune.channel_group_masks(graph, scores, keep=9)
    kept_widths(masks)
    gone = {("a", i) for i in range(8) if not masks["a"][0, i]} | {("b", i) for i in range(6) if not masks["c"][i, 0]}
    assert gone == worst


@pytest.mark.parametrize("reduce", ["sum", "l2"])
def test_scores_are_reduced_as_asked(reduce):
    params, graph = chain()
    scores = jax.tree.map(jnp.abs, params)
    power = {"sum": 1, "l2": 2}[reduce]
    total = (np.abs(params["a"]) ** power).sum(0) + (np.abs(params["b"]) ** power).sum(1)
    masks = select(graph, scores, sparsity=0.5, reduce=reduce, groups="^a$")
    np.testing.assert_array_equal(np.asarray(masks["a"][0]), total >= np.sort(total)[4])


@pytest.mark.parametrize("amount", [0.1, 0.25, 0.5, 0.77])
@pytest.mark.parametrize("budget", ["parameters", "multiply_adds"])
def test_the_cost_is_met_and_one_channel_more_would_exceed_it(budget, amount):
    params, graph = chain()
    scores = jax.tree.map(jnp.abs, params)
    first, second = kept_widths(select(graph, scores, **{budget: amount}))
    assert cost(first, second) <= (1 - amount) * cost(8, 6)
    assert cost(first + 1, second) > (1 - amount) * cost(8, 6) or cost(first, second + 1) > (1 - amount) * cost(8, 6)


def test_a_target_that_a_choice_meets_exactly_is_not_overshot():
    """Half of one group of 8: 5 * 4 + 4 * 3 = 32 of 64 multiply-adds, although 0.5 is rounded nowhere."""
    params = {"a": jnp.arange(40.0).reshape(5, 8), "b": jnp.ones((8, 3))}
    graph = trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jax.ShapeDtypeStruct((7, 5), jnp.float32))
    masks = select(graph, params, multiply_adds=0.5)
    np.testing.assert_array_equal(masks["b"][:, 0], [False] * 4 + [True] * 4)


def test_a_number_of_multiply_adds_to_keep():
    """Of 2 x (5 a + a b + 3 b) for a batch of 2; one channel more would exceed it."""
    params, graph = chain()
    select = jprune.structured(graph, budget="multiply_adds", min_channels={"^a$": 4})
    first, second = kept_widths(select(jax.tree.map(jnp.abs, params), keep=130))
    assert first >= 4
    assert 2 * cost(first, second) <= 130 < 2 * max(cost(first + 1, second), cost(first, second + 1))
    with pytest.raises(ValueError, match="keep=213 is more than the total of 212 multiply-adds"):
        select(jax.tree.map(jnp.abs, params), keep=213)
    with pytest.raises(
        ValueError, match=r"cannot be combined with budget='multiply_adds': use budget='channels', or one"
    ):
        select(jax.tree.map(jnp.abs, params), sparsity={"^a$": 0.5})


def of_4_8_2(batch):
    """Weights that grow with the channel, and the selection: a kept channel has 6 weights and 6 multiply-adds."""
    params = {"a": jnp.ones((4, 8)) * jnp.arange(1.0, 9.0)[None, :], "b": jnp.ones((8, 2))}
    graph = trace_model(
        lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jax.ShapeDtypeStruct((batch, 4), jnp.float32)
    )
    return params, functools.partial(jprune.structured, graph)


@pytest.mark.parametrize(
    ("batch", "budget", "schedule", "kept"),
    [
        (8, "multiply_adds", {0: jprune.Keep(192)}, [4]),  # of 384; there are only 48 weights
        (2, "multiply_adds", {0: jprune.Keep(48)}, [4]),  # of 96; as many as there are weights
        (2, "multiply_adds", {0: jprune.Keep(96), 1: jprune.Keep(71)}, [8, 5]),
        (2, "parameters", {0: 0.25, 1: jprune.Keep(30), 2: 0.5}, [6, 5, 4]),
        (2, "channels", {0: jprune.Keep(6), 1: 0.5, 2: jprune.Keep(3)}, [6, 4, 3]),
        (2, "channels", {0: 0.0, 1: {"^a$": 0.25}, 2: jprune.Keep(6), 3: {"^a$": jprune.Keep(2)}}, [8, 6, 6, 2]),
    ],
)
def test_a_count_in_a_schedule_has_the_unit_of_the_budget(batch, budget, schedule, kept):
    params, structured = of_4_8_2(batch)
    tx = jprune.prune(jprune.magnitude(), schedule, selection=structured(budget=budget))
    state = tx.init(params)
    for channels in kept:
        _, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        masks = jprune.masks_of(state)
        np.testing.assert_array_equal(masks["a"], np.broadcast_to(np.arange(8) >= 8 - channels, (4, 8)))


@pytest.mark.parametrize(
    ("budget", "schedule", "message"),
    [
        ("multiply_adds", {3: jprune.Keep(97)}, "keeps 97 multiply-adds at step 3; there are only 96$"),
        ("channels", {3: jprune.Keep(9)}, "keeps 9 channels at step 3; there are only 8$"),
        ("parameters", {0: jprune.Keep(20), 3: 0.5}, "keeps 24 parameters at step 3, more than the 20 at step 0"),
        ("channels", {0: 0.5, 3: jprune.Keep(5)}, "keeps 5 channels at step 3, more than the 4 at step 0"),
        (
            "channels",
            {0: {"^a$": 0.5}, 3: {"^a$": 0.25}},
            r"keeps 6 channels of 'a\[1\]' at step 3, more than the 4 at step 0",
        ),
    ],
)
def test_a_schedule_that_does_not_fit_the_budget_is_refused_in_its_unit(budget, schedule, message):
    params, structured = of_4_8_2(2)
    tx = jprune.prune(jprune.magnitude(), schedule, selection=structured(budget=budget))
    with pytest.raises(ValueError, match=f"the schedule {message}"):
        tx.init(params)


def test_a_sparsity_of_nine_tenths_leaves_one_of_ten():
    params = {"a": jnp.arange(20.0).reshape(2, 10), "b": jnp.ones((10, 3))}
    graph = trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jax.ShapeDtypeStruct((7, 2), jnp.float32))
    assert int(select(graph, params, sparsity=0.9)["a"][0].sum()) == 1


@pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("resnet20", "mobilenet", "unet", "lstm")),
        "transformer",
        "scanned",
    ],
)
def test_costs_of_a_choice_are_those_of_the_smaller_program(name):
    model = MODELS[name]()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        graph = graph_of(model)
        scores = jax.tree.map(jnp.abs, model.params)
        masks = select(graph, scores, multiply_adds=0.5)
        small = jprune.remove_channels(graph, model.params, masks, state=model.state)
        inside = lambda p, *x: small.apply(p, *x, **({} if model.state is None else {"state": small.state}))
        counted = trace_model(inside, small.params, *model.inputs)
    assert small.table.parameters[1] == sum(leaf.size for leaf in jax.tree.leaves(small.params))
    assert small.table.multiply_adds[1] == sum(counted.multiply_adds.values()) + counted.other_multiply_adds
    assert small.table.multiply_adds[0] == sum(graph.multiply_adds.values()) + graph.other_multiply_adds
    assert small.table.multiply_adds[1] <= small.table.multiply_adds[0] / 2


@pytest.mark.parametrize(
    ("numbers", "left", "right", "expected"),
    [
        ((((1,), (1,)), ((), ())), (10, 3), (2, 3, 5), 10 * 3 * 5),
        ((((0,), (0,)), ((), ())), (10, 3), (10, 5), 10 * 3 * 5),  # sums over the rows of each expert
        ((((2,), (2,)), ((0,), (1,))), (2, 10, 3), (2, 2, 3, 5), 2 * 10 * 3 * 5),
    ],
)
def test_every_row_of_a_product_with_experts_counts_once(numbers, left, right, expected):
    """In other modes than that of ragged_dot the graph's table left the product out, unlike its budget."""
    summed, batched = numbers
    described = jax.lax.RaggedDotDimensionNumbers(
        dot_dimension_numbers=numbers,
        lhs_ragged_dimensions=[len(batched[0])],
        rhs_group_dimensions=[] if 0 in summed[0] else [0],
    )
    sizes = jnp.full((*left[: len(batched[0])], 2), 5, jnp.int32)
    apply = lambda p, x: jax.lax.ragged_dot_general(x, p["w"], sizes, described)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "the primitive 'ragged_dot_general' is not supported")
        graph = trace_model(apply, {"w": jnp.ones(right)}, jnp.ones(left))
    assert budgets.cost_of(graph, (), "multiply_adds").after(np.zeros(0, bool)) == expected
    assert graph.multiply_adds["w"] == expected


def test_the_cost_is_the_same_in_limbs_for_numbers_beyond_32_bits():
    params = {"a": jax.ShapeDtypeStruct((3000, 8), jnp.float32), "b": jax.ShapeDtypeStruct((8, 500), jnp.float32)}
    inputs = jax.ShapeDtypeStruct((700_000, 3000), jnp.float32)
    graph = trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, inputs)
    found = budgets.cost_of(graph, graph.channels, "multiply_adds")
    removed = np.array([True, False, True] + [False] * 5)
    assert found.after(removed) == 700_000 * 6 * 3500
    limbs = jax.jit(found.limbs_after)(jnp.asarray(removed))
    assert (int(limbs.high) << 32) + int(limbs.low) == 700_000 * 6 * 3500


def test_widths_are_multiples_of_round_to_and_not_below_the_minimum():
    params, graph = chain()
    scores = jax.tree.map(jnp.abs, params)
    masks = select(graph, scores, sparsity=0.4, round_to=4)
    assert kept_widths(masks) in [(8, 4), (4, 4), (4, 6)]
    masks = jprune.channel_group_masks(graph, scores, keep=8, min_channels={"^c$": 5})
    assert kept_widths(masks)[1] >= 5
    assert sum(kept_widths(masks)) == 8


def test_every_group_loses_the_same_fraction_if_asked():
    params, graph = chain()
    scores = {"a": 100 * jnp.abs(params["a"]), "b": jnp.abs(params["b"]), "c": jnp.abs(params["c"])}
    assert kept_widths(jprune.channel_group_masks(graph, scores, keep=7, per_group=True)) == (4, 3)
    assert kept_widths(jprune.channel_group_masks(graph, scores, keep=7)) != (4, 3)


def test_amounts_of_single_groups():
    params, graph = chain()
    scores = jax.tree.map(jnp.abs, params)
    assert kept_widths(jprune.channel_group_masks(graph, scores, sparsity={"^a$": 0.5, "^c$": 1 / 3})) == (4, 4)
    assert kept_widths(jprune.channel_group_masks(graph, scores, sparsity={"^a$": 0.25})) == (6, 6)


def test_a_group_is_named_by_path_and_axis_as_it_is_printed():
    """Both groups have a part of b; only one has its axis 0."""
    params, graph = chain()
    scores = jax.tree.map(jnp.abs, params)
    assert kept_widths(jprune.channel_group_masks(graph, scores, sparsity=0.5, groups=r"^b\[0\]$")) == (4, 6)
    assert "b[0]" in str(graph)


@pytest.mark.parametrize(("name", "members"), [
    ("vit", {("qkv/kernel", 1): [[0, 8, 16], [4, 12, 20]], ("out/kernel", 0): [[0], [4]]}),
    ("transformer", {("query", 1): [[0], [2]], ("key", 1): [[0], [1]], ("out", 0): [[0], [2]]}),
])  # fmt: skip
def test_heads_are_removed_whole_where_they_are_fused_or_share_keys(name, members):
    """Query, key and value of 2 heads of 4 in one projection; 4 query heads on 2 keys; where each part begins."""
    model = MODELS[name]()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        graph = graph_of(model)
    wide = {"vit": 4, "transformer": 1}[name]
    (group,) = [g for g in graph.channels if set(members) <= {(m.path, m.axis) for m in g.members}]
    assert (group.size, group.exact, group.kind) == (2, True, "blocks")
    for member in group.members:
        if (member.path, member.axis) in members:
            starts = np.array(members[member.path, member.axis])
            each = wide if name == "vit" else {"query": 2, "key": 1, "out": 2}[member.path]
            expected = (starts[:, :, None] + np.arange(each)).reshape(2, -1)
            np.testing.assert_array_equal(member.indices, expected)
    scores = jax.tree.map(jnp.abs, model.params)
    pattern = {"vit": r"^qkv/kernel\[1\]$", "transformer": r"^key\[1\]$"}[name]
    masks = select(graph, scores, sparsity={pattern: 0.5})
    kernel = masks["qkv"]["kernel"] if name == "vit" else masks["key"]
    assert int(np.asarray(kernel).any((0, *range(2, kernel.ndim))).sum()) == {"vit": 12, "transformer": 1}[name]


def test_a_sparsity_that_a_floor_stops_in_one_group_is_named():
    params, graph = chain()
    scores = jax.tree.map(jnp.abs, params)
    with pytest.raises(
        ValueError, match=r"sparsity of 0\.75 cannot be reached in the group of 'a': of 8 channels at least 4"
    ):
        jprune.channel_group_masks(graph, scores, sparsity={"^a$": 0.75}, min_channels={r"^b\[0\]$": 4})


def test_a_number_above_that_of_a_group_is_refused():
    """It was taken for all channels of the group."""
    params = {"a": jnp.ones((1, 3)), "b": jnp.ones((3, 1))}
    graph = trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 1)))
    selection = jprune.structured(graph)
    with pytest.raises(
        ValueError, match=r"Keep\(count=4\) is more than the 3 channels of the group of 'a'; keep fewer"
    ):
        selection(jprune.magnitude(where=graph)(params), sparsity={"a": jprune.Keep(4)})
    with pytest.raises(ValueError, match="is more than the 3 channels"):
        jprune.prune(jprune.magnitude(where=graph), {0: {"a": jprune.Keep(4)}}, selection=selection).init(params)


def test_a_head_is_rounded_as_the_indices_it_has():
    model = MODELS["equinox_block"]()
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        graph = graph_of(model)
    scores = jax.tree.map(jnp.abs, model.params)
    masks = select(graph, scores, sparsity=0.5, round_to=4, groups="attention")
    assert int(jprune.trees.flatten(masks)[1][0][:, 0].sum()) == 4


def test_budgets_that_cannot_be_met_name_the_floor():
    params, graph = chain()
    scores = jax.tree.map(jnp.abs, params)
    with pytest.raises(ValueError, match=r"at most 0\.6886 can be removed; min_channels stops the group of 'a', the gr"
                       r"oup of 'b' \(without it: 0\.915\)"):  # fmt: skip
        jprune.channel_group_masks(graph, scores, multiply_adds=0.95, min_channels=3)
    with pytest.raises(ValueError, match="round_to stops"):
        jprune.channel_group_masks(graph, scores, parameters=0.8, round_to=4)
    with pytest.raises(ValueError, match="every group is down to one channel"):
        jprune.channel_group_masks(graph, scores, sparsity=0.99)
    normalized = lambda p, x: jax.nn.softmax(jnp.tanh(x @ p["a"]) @ p["b"]) @ p["c"]
    graph = trace_model(normalized, params, jax.ShapeDtypeStruct((2, 5), jnp.float32))
    with pytest.raises(
        ValueError, match=r"the group of 'b' stays whole, because it is not exact \(inexact=True prunes it too"
    ):
        jprune.channel_group_masks(graph, scores, parameters=0.9)


def test_bad_arguments_are_named():
    params, graph = chain()
    scores = jax.tree.map(jnp.abs, params)
    with pytest.raises(TypeError, match="pass one of sparsity=, keep=, parameters= or multiply_adds=; given: none"):
        jprune.channel_group_masks(graph, scores)
    with pytest.raises(ValueError, match="budget='flops' is unknown"):
        jprune.structured(graph, budget="flops")
    with pytest.raises(ValueError, match="reduce='median' is unknown"):
        jprune.structured(graph, reduce="median")
    with pytest.raises(ValueError, match="groups='conv' matches"):
        jprune.structured(graph, groups="conv")
    with pytest.raises(ValueError, match="its leaf 'b' has shape \\(8, 6\\), but \\(8, 7\\) in scores"):
        jprune.channel_group_masks(graph, scores | {"b": jnp.ones((8, 7))}, sparsity=0.5)
    with pytest.raises(ValueError, match="scores has no leaf 'c'"):
        jprune.channel_group_masks(graph, {"a": scores["a"], "b": scores["b"]}, sparsity=0.5)
    with pytest.raises(ValueError, match="min_keep=3 counts weights"):
        jprune.structured(graph)(scores, sparsity=0.5, min_keep=3)
    with pytest.raises(TypeError, match=r"multiply_adds is 2; it must be a float .*; for 2% write 0\.02"):
        jprune.channel_group_masks(graph, scores, multiply_adds=2)
    with pytest.raises(ValueError, match=r"parameters is 1\.5; it must be from 0\.0 to 1\.0"):
        jprune.channel_group_masks(graph, scores, parameters=1.5)


def test_expressions_that_match_no_group_say_how_to_write_them():
    params, graph = chain()
    scores, literal = jax.tree.map(jnp.abs, params), re.escape(r"to match the text 'a[1]', write 'a\\[1\\]'")
    with pytest.raises(ValueError, match=r"sparsity has the key 'a\[1\]', which matches no group .*" + literal):
        jprune.channel_group_masks(graph, scores, sparsity={"a[1]": 0.5})
    with pytest.raises(ValueError, match=r"groups='a\[1\]' matches none of the group of 'a', .*" + literal):
        jprune.structured(graph, groups="a[1]")
    with pytest.raises(ValueError, match=r"groups='a\[' is not a regular expression: unterminated"):
        jprune.structured(graph, groups="a[")
    with pytest.raises(ValueError, match=r"min_channels has the key '\^c\$', which matches only .* groups= does not"):
        jprune.structured(graph, groups=r"^a\[1\]$", min_channels={"^c$": 2, "": 1})


class TestInTheChain:
    """Whole channels are zero in training with any optimizer before the link."""

    def setup_method(self):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            self.model = MODELS["vgg"]()
            self.graph = graph_of(self.model)
        self.selection = jprune.structured(self.graph, budget="multiply_adds")

    def train(self, tx, steps, params=None):
        params = self.model.params if params is None else params
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return jax.jit(self.training(tx, steps))(params)

    def training(self, tx, steps):
        model = self.model

        def step(carry, _):
            params, state = carry
            grads = jax.grad(lambda p: jnp.mean(model(p, *model.inputs) ** 2))(params)
            updates, state = tx.update(grads, state, params, grad=grads)
            return (optax.apply_updates(params, updates), state), None

        return lambda params: jax.lax.scan(step, (params, tx.init(params)), None, length=steps)[0]

    def dead(self, params):
        """Channels that are zero in every member, by group."""
        leaves = dict(zip(*jprune.trees.flatten(params)[:2], strict=True))
        found = []
        for group in self.graph.channels:
            zero = np.ones(group.size, bool)
            for member in group.members:
                others = tuple(axis for axis in range(leaves[member.path].ndim) if axis != member.axis)
                zero &= (np.abs(leaves[member.path]).sum(others)[member.indices] == 0).all(1)
            found.append(int(zero.sum()))
        return found

    @pytest.mark.optax_promotes
    @pytest.mark.parametrize(
        "optimizer",
        [
            optax.adamw(1e-2),
            pytest.param(optax.sgd(1e-2, momentum=0.9), marks=pytest.mark.slow),
            pytest.param(optax.lion(1e-3), marks=pytest.mark.slow),
        ],
    )
    def test_members_are_zero_together(self, optimizer):
        tx = optax.chain(optimizer, jprune.prune(jprune.magnitude(), {1: 0.3, 3: 0.6}, selection=self.selection))
        params, state = self.train(tx, 5)
        masks = jprune.masks_of(state)
        jprune.check_pruned(params, state)
        assert masks["a"]["norm"]["bias"] is not None
        assert sum(self.dead(params)) == sum(int((~masks[n]["norm"]["scale"]).sum()) for n in "ab") > 0
        small = jprune.remove_channels(self.graph, params, masks, state=self.model.state, also=(state,))
        assert small.table.multiply_adds[1] <= 0.4 * small.table.multiply_adds[0]
        assert [group.after for group in small.table.groups] == [
            group.size - dead for group, dead in zip(self.graph.channels, self.dead(params), strict=True)
        ]
        jax.tree.map(lambda mask: np.testing.assert_array_equal(mask, True), jprune.masks_of(small.also[0]))

    @pytest.mark.optax_promotes
    def test_a_group_named_by_axis_loses_its_own_amount(self):
        """The norm of b has 6 channels; a schedule names its group, here all of it, as the selection does."""
        pattern = r"^b/conv/kernel\[3\]$"
        selection = jprune.structured(self.graph, min_channels={pattern: 0})
        tx = optax.chain(optax.sgd(1e-2), jprune.prune(jprune.magnitude(), {0: {pattern: 1.0}}, selection=selection))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            state = tx.init(self.model.params)
            _, state = jax.jit(tx.update)(self.model.params, state, self.model.params)
        masks = jprune.masks_of(state)
        assert not masks["b"]["conv"]["kernel"].any()
        assert not masks["b"]["norm"]["scale"].any()
        assert masks["a"]["norm"]["scale"].all()

    @pytest.mark.optax_promotes
    def test_replicates_select_their_own_channels(self):
        tx = optax.chain(optax.adam(1e-2), jprune.prune(jprune.magnitude(), {0: 0.5}, selection=self.selection))
        noise = lambda x: np.stack([x, x * np.cos(np.arange(x.size, dtype=x.dtype)).reshape(x.shape)])
        both = jax.tree.map(noise, self.model.params)
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            of_one = jax.jit(self.training(tx, 2))
            params, _ = jax.jit(jax.vmap(self.training(tx, 2)))(both)
        for replicate in range(2):
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                alone, _ = of_one(jax.tree.map(lambda x, r=replicate: x[r], both))
            one = jax.tree.map(lambda x, r=replicate: np.asarray(x[r]), params)
            assert self.dead(one) == self.dead(alone)
            jax.tree.map(lambda x, y: np.testing.assert_array_equal(x == 0, y == 0), one, alone)

    def test_scores_of_batch_normalization_alone_decide(self):
        """Network slimming: the scores are the scales of batch normalization."""
        where = jprune.by_path(include="norm/scale$")
        tx = jprune.prune(jprune.magnitude(), {0: 0.5}, where=where, selection=jprune.structured(self.graph))
        state = tx.init(self.model.params)
        _, state = tx.update(jax.tree.map(jnp.zeros_like, self.model.params), state, self.model.params)
        scales = np.concatenate([np.abs(self.model.params[name]["norm"]["scale"]) for name in "ab"])
        masks = jprune.masks_of(state)
        kept = np.concatenate([masks[name]["norm"]["scale"] for name in "ab"])
        np.testing.assert_array_equal(kept, scales >= np.sort(scales)[5])
        assert masks["a"]["conv"]["kernel"].shape == (3, 3, 3, 4)

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
    @pytest.mark.quick(1)
    def test_sharded_parameters_lose_the_same_channels(self, axis_type):
        mesh = jax.make_mesh((2,), ("d",), axis_types=(axis_type,))
        params, graph = chain()
        params = {"a": params["a"], "b": params["b"], "c": params["c"]}
        scores = jax.tree.map(jnp.abs, params)
        expected = jprune.channel_group_masks(graph, scores, multiply_adds=0.5)
        place = lambda spec: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec))
        sharded = {
            "a": jax.device_put(scores["a"], place((None, "d"))),
            "b": jax.device_put(scores["b"], place(("d", None))),
            "c": jax.device_put(scores["c"], place(())),
        }
        with jax.set_mesh(mesh):
            masks = jax.jit(lambda s: jprune.channel_group_masks(graph, s, multiply_adds=0.5))(sharded)
        chex.assert_trees_all_equal(masks, expected)
        if axis_type == AxisType.Explicit:
            assert masks["a"].sharding.spec == sharded["a"].sharding.spec
        weights = jax.tree.map(lambda w, s: jax.device_put(w, s.sharding), params, sharded)
        x = np.ones((2, 5), np.float32)
        with jax.set_mesh(mesh):
            small = jprune.remove_channels(graph, weights, masks, also=(weights,))
            out = small.apply(small.params, x)
        alone = jprune.remove_channels(graph, params, expected)
        chex.assert_trees_all_equal(small.params, alone.params)
        chex.assert_trees_all_equal(small.also[0], alone.params)
        np.testing.assert_allclose(out, alone.apply(alone.params, x), atol=1e-5)


def test_masks_of_another_tree_class_fit():
    params, graph = chain()
    masks = jprune.channel_group_masks(graph, jax.tree.map(jnp.abs, params), sparsity=0.5)
    assert masks_like(params, masks).keys() == params.keys()


def test_a_function_in_place_of_the_graph_is_refused():
    with pytest.raises(TypeError, match=r"graph is of type function; it must be made by jprune\.trace_model"):
        refuse_no_graph(lambda p, x: x)


def test_a_group_loses_all_channels_only_where_the_minimum_is_0():
    params, graph = chain()
    scores = jax.tree.map(jnp.abs, params)
    with pytest.raises(ValueError, match=r"1\.0 cannot be reached in the group of 'a': of 8 channels at least 1 stay"):
        jprune.channel_group_masks(graph, scores, sparsity={"^a$": 1.0})
    emptied = jprune.channel_group_masks(graph, scores, sparsity={"^a$": 1.0}, min_channels={"^a$": 0})
    assert [int(emptied[name].sum()) for name in "abc"] == [0, 0, 18]
    assert not jprune.channel_group_masks(graph, scores, keep=0, min_channels=0)["c"].any()
    with pytest.raises(ValueError, match=r"min_channels=-1 must be an integer of 0 or more"):
        jprune.channel_group_masks(graph, scores, sparsity=0.5, min_channels=-1)
    with pytest.raises(ValueError, match=r"round_to=0 must be an integer of 1 or more"):
        jprune.channel_group_masks(graph, scores, sparsity=0.5, round_to=0)


def test_channels_that_are_already_masked_go_first_also_where_groups_lose_the_same_fraction():
    """Of 14 channels 6 stay: 2 of the 8 in the first group, where 6 are masked, before any of the second."""
    params, graph = chain()
    scores = jax.tree.map(jnp.abs, params)
    masked = jprune.channel_group_masks(graph, scores, sparsity={"^a$": 0.75})
    assert kept_widths(jprune.channel_group_masks(graph, scores, keep=8, per_group=True, among=masked)) == (2, 6)
    emptied = jprune.channel_group_masks(graph, scores, sparsity={"^a$": 1.0}, min_channels={"^a$": 0})
    both = jprune.channel_group_masks(graph, scores, keep=3, per_group=True, among=emptied, min_channels={"^a$": 0})
    assert [int(both[name].sum()) for name in "abc"] == [0, 0, 9]
