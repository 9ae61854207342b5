"""Any callable with the signature of global_masks is a selection; wrapping one compiles no further program."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from tests.pruning.steps import largest

PARAMS = {
    "a": {"kernel": jax.random.normal(jax.random.key(0), (5, 4))},
    "b": {"kernel": jax.random.normal(jax.random.key(1), (4, 3))},
}
SCHEDULE = jprune.cubic(0.8, begin=0, end=9, every=1)


def wrapped(scores, **options):
    return jprune.layer_masks(scores, **options)


def computing(scores, *, sparsity, among):
    """A selection that removes half of the requested weights."""
    return jprune.layer_masks(scores, sparsity=sparsity / 2, among=among)


def selections_in(tx):
    """The number of selections in the update, counted by their loops."""
    text = str(jax.make_jaxpr(lambda p, s: tx.update(p, s, p))(PARAMS, tx.init(PARAMS)))
    return text.count("while[")


def masks_at(tx, steps):
    state, update = tx.init(PARAMS), jax.jit(lambda s: tx.update(PARAMS, s, PARAMS)[1])
    for _ in range(steps):
        state = update(state)
    return [np.asarray(state.masks[name]["kernel"]) for name in "ab"]


@pytest.mark.parametrize(
    "selection",
    [jprune.layer_masks, wrapped, functools.partial(jprune.layer_masks), functools.partial(wrapped, min_keep=1)],
    ids=["named", "wrapped", "partial", "partial of a wrapped one"],
)
def test_a_long_schedule_needs_one_selection_however_it_is_wrapped(selection):
    one = jprune.prune(jprune.magnitude(), {0: 0.5}, selection=jprune.layer_masks)
    many = jprune.prune(jprune.magnitude(), SCHEDULE, selection=selection)
    assert selections_in(many) == selections_in(one) > 0
    for mask, name, kept in zip(masks_at(many, 10), "ab", (4, 2), strict=True):
        np.testing.assert_array_equal(mask, largest([np.abs(PARAMS[name]["kernel"])], kept)[0])


def asserting(scores, *, sparsity, among):
    assert isinstance(sparsity, float)
    return computing(scores, sparsity=sparsity, among=among)


def computing_each(scores, *, sparsity, among):
    halves = {pattern: amount / 2 for pattern, amount in sparsity.items()}
    return jprune.layer_masks(scores, sparsity=halves, among=among)


@pytest.mark.parametrize(
    ("selection", "schedule"),
    [
        (computing, {0: 0.5, 2: 0.8}),
        (asserting, {0: 0.5, 2: 0.8}),
        (computing_each, {0: {"": 0.5}, 2: {"": 0.8}}),
    ],
)
def test_a_selection_that_computes_with_its_amount_gets_numbers(selection, schedule):
    tx = jprune.prune(jprune.magnitude(), schedule, selection=selection)
    assert [int(mask.sum()) for mask in masks_at(tx, 1)] == [15, 9]
    assert [int(mask.sum()) for mask in masks_at(tx, 3)] == [12, 7]


def test_a_selection_that_computes_with_its_amount_is_traced_once_for_each_amount():
    seen = []

    def selection(scores, *, sparsity, among):
        seen.append(float(sparsity))
        return jprune.layer_masks(scores, sparsity=sparsity, among=among)

    regrow = jprune.Regrow(jprune.random(), 0.5)
    schedule = {0: 0.5, 1: 0.5, 2: 0.5, 3: 0.75}
    tx = jprune.prune(jprune.magnitude(), schedule, selection=selection, regrow=regrow, key=jax.random.key(0))
    state = tx.init(PARAMS)
    seen.clear()
    jax.make_jaxpr(tx.update)(PARAMS, state, PARAMS)
    assert seen == [0.75, 0.875, 0.5, 0.75]  # the survivors of each amount, then the weights kept
    assert [int(mask.sum()) for mask in masks_at(tx, 3)] == [10, 6]
    assert [int(mask.sum()) for mask in masks_at(tx, 4)] == [5, 3]


def test_two_entries_with_the_same_expressions_in_another_order_are_different():
    params = {name: {"kernel": jax.random.normal(jax.random.key(0), (4, 4))} for name in "abc"}
    last, first = "^(b|c)/", "^(a|b)/"
    schedule = {0: {last: 0.5, first: 0.75}, 1: {first: 0.75, last: 0.5}}
    tx = jprune.prune(jprune.magnitude(), schedule, selection=jprune.layer_masks)
    state = tx.init(params)
    kept = []
    for _ in range(2):
        _, state = tx.update(params, state, params)
        kept.append([int(state.masks[name]["kernel"].sum()) for name in "abc"])
    assert kept == [[4, 8, 8], [4, 4, 8]]


def test_a_selection_gets_counts_by_keyword_and_no_option_that_was_not_given():
    seen = []

    def selection(scores, **options):
        seen.append({name: value for name, value in options.items() if name != "among"})
        return jprune.global_masks(scores, keep=options["keep"], among=options["among"])

    tx = jprune.prune(jprune.magnitude(), jprune.one_shot(keep=7, step=0), selection=selection)
    assert sum(int(mask.sum()) for mask in masks_at(tx, 1)) == 7
    assert seen[-1] == {"keep": 7}
    tx = jprune.prune(jprune.magnitude(), {0: jprune.Keep(7)}, selection=selection, min_keep=2, axes="flax")
    tx.init(PARAMS)
    assert seen[-1] == {"keep": 7, "min_keep": 2, "axes": "flax"}


def test_a_schedule_has_amounts_for_each_layer():
    schedule = {0: {"^a/": 0.5, "": 0.25}, 1: {"^a/": 0.75, "^b/": jprune.Keep(5)}}
    tx = jprune.prune(jprune.magnitude(), schedule, selection=jprune.layer_masks)
    assert [int(mask.sum()) for mask in masks_at(tx, 1)] == [10, 9]
    assert [int(mask.sum()) for mask in masks_at(tx, 2)] == [5, 5]
    with pytest.raises(TypeError, match=r"which only layer_masks takes; in prune, set selection=jprune\.layer_masks"):
        jprune.prune(jprune.magnitude(), schedule).init(PARAMS)
    with pytest.raises(ValueError, match="15 weights of 'a/kernel' at step 1, more than the 10 at step 0"):
        jprune.prune(jprune.magnitude(), {0: {"^a/": 0.5, "": 0.25}, 1: 0.25}, selection=jprune.layer_masks).init(
            PARAMS
        )


def test_an_error_of_a_selection_is_raised_as_it_is():
    def broken(scores, **options):
        raise ValueError("no such layer")

    with pytest.raises(ValueError, match="no such layer"):
        jprune.prune(jprune.magnitude(), SCHEDULE, selection=broken).init(PARAMS)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (lambda: jprune.prune(jprune.magnitude(), {0: 0.5}, select=jprune.layer_masks), "use selection="),
        (lambda: jprune.prune(jprune.magnitude(), {0: 1000}), r"write jprune\.Keep\(1000\)"),
        (lambda: jprune.one_shot(1000, step=0), "write keep=1000"),
        (lambda: jprune.one_shot(keep=0.1, step=0), r"sparsity=0\.9"),
        (lambda: jprune.global_masks(PARAMS, 0.1), r"sparsity=0\.9 removes nine in ten weights"),
        (lambda: jprune.lottery_ticket(None, optax.sgd(0.1), PARAMS, [0.5], steps=1, select=None), "use selection="),
        (lambda: jprune.lottery_ticket(print, jprune.keep_zeros(), PARAMS, [10], steps=1), r"jprune\.Keep\(10\)"),
        (lambda: jprune.nm_masks(PARAMS, axis=0), "use axes="),
    ],
)
def test_old_spellings_are_refused_with_the_new_ones(old, new):
    with pytest.raises(TypeError, match=new):
        old()


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("select", r"jprune\.by_path\("),
        ("snip", r"jprune\.scores\.snip"),
        ("bernoulli_masks", r"jprune\.selection\.bernoulli_masks"),
        ("cosine_fraction", r"jprune\.schedules\.cosine_fraction"),
        ("save_masks", r"jprune\.io\.save_masks"),
        ("point_status", r"jprune\.jumpstart\.point_status"),
    ],
)
def test_a_name_that_moved_says_where_it_is(name, place):
    with pytest.raises(AttributeError, match=f"jprune.{name} is now {place}"):
        getattr(jprune, name)


def test_every_place_that_a_moved_name_points_to_exists():
    for name, place in jprune._MOVED.items():
        if name != "select":
            module, _, attribute = place.rpartition(".")
            assert callable(getattr(__import__(module, fromlist=[attribute]), attribute)), place
    with pytest.raises(AttributeError, match="module 'jprune' has no attribute 'nothing'"):
        _ = jprune.nothing


def test_prunable_is_a_table_of_paths_shapes_and_roles():
    params = {
        "attention": {"query": {"kernel": jnp.ones((8, 2, 4))}},
        "dense": {"kernel": jnp.ones((8, 16)), "bias": jnp.ones(16)},
    }
    leaves = jprune.prunable(params, axes={"query": jprune.KernelAxes(inputs=(0,), outputs=(1, 2))})
    assert [(leaf.path, leaf.shape) for leaf in leaves] == [
        ("attention/query/kernel", (8, 2, 4)),
        ("dense/kernel", (8, 16)),
    ]
    assert leaves[0].axes == jprune.KernelAxes(inputs=(0,), outputs=(1, 2))
    assert str(leaves).splitlines() == [
        "leaf                    shape      weights  axes",
        "attention/query/kernel  (8, 2, 4)       64  inputs 0, outputs 1 2",
        "dense/kernel            (8, 16)        128  inputs 0, outputs 1",
        "total                                  192",
    ]
    (only_dense,) = leaves = jprune.prunable(params, jprune.by_path(include="^dense/.*kernel"))
    assert only_dense.path == "dense/kernel"
    assert [leaf.path for leaf in leaves.others] == ["attention/query/kernel"]
    assert str(leaves).splitlines()[-2:] == ["not selected", "attention/query/kernel  (8, 2, 4)       64  unknown"]


@pytest.mark.parametrize(
    ("axes", "selected"),
    [
        (None, ["dense/kernel", "dense/weight"]),
        ("flax", ["dense/kernel", "dense/lora_a"]),
        ("equinox", ["cell/weight_hh", "dense/weight"]),
    ],
)
def test_the_default_selection_is_what_the_convention_calls_a_kernel(axes, selected):
    matrix, vector = jnp.ones((4, 4)), jnp.ones(4)
    params = {
        "cell": {"weight_hh": matrix, "bias": vector},
        "dense": {"kernel": matrix, "weight": matrix, "lora_a": matrix, "embedding": matrix},
        "norm": {"weight": vector, "scale": vector},
    }
    leaves = jprune.prunable(params, axes=axes)
    assert [leaf.path for leaf in leaves] == selected
    assert len(leaves) + len(leaves.others) == 5
    state = jprune.prune(jprune.magnitude(), {0: 0.5}, axes=axes).init(params)
    assert [
        path for path, mask in zip(*jprune.trees.flatten(state.masks)[:2], strict=True) if mask is not None
    ] == selected
