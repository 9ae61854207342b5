"""How many weights each layer keeps: from shapes alone, for layers without weights, and for scores that are NaN."""

import functools
from fractions import Fraction

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

import jprune
from jprune.pruning.selection import allocation, uint64
from jprune.selection import erk_counts, layer_counts

SELECTIONS = pytest.mark.parametrize(
    "select",
    [jprune.global_masks, jprune.layer_masks, jprune.uniform_masks, jprune.erk_masks, jprune.output_masks],
)


@pytest.fixture
def _unchecked():
    """Turn off the type checker of the tests, which would raise before jprune's own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@SELECTIONS
@pytest.mark.parametrize("amount", [{"keep": 3}, {"sparsity": 0.5}])
@pytest.mark.quick(4)
def test_a_layer_without_weights_keeps_none_and_leaves_the_others_theirs(select, amount):
    masks = select({"a": jnp.zeros((0, 3)), "b": jnp.arange(6.0).reshape(6, 1), "c": jnp.zeros((2, 0))}, **amount)
    assert [masks[name].shape for name in "ac"] == [(0, 3), (2, 0)]
    np.testing.assert_array_equal(masks["b"][:, 0], [False] * 3 + [True] * 3)


def test_layers_without_weights_change_no_other_layer():
    nothing, some = jnp.zeros((0, 2)), jnp.arange(1.0, 7.0).reshape(3, 2)
    masks = jprune.channel_masks({"a": nothing, "b": some}, sparsity=0.5, min_keep=1)
    np.testing.assert_array_equal(masks["b"], [[False, True]] * 3)
    for empty in (
        jprune.selection.bernoulli_masks({"a": nothing}, keep=0),
        jprune.selection.iterated_masks(jprune.magnitude(where=lambda path, leaf: True), {"a": nothing}, sparsity=0.5),
    ):
        assert empty["a"].shape == (0, 2)


@SELECTIONS
@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("keep", [True, "2", None, 1j, float("nan"), float("inf")])
def test_a_keep_that_is_not_a_number_is_refused(select, keep):
    message = "neither is given" if keep is None else r"keep=.* must be an integer, the number of weights kept$"
    with pytest.raises(TypeError, match=message):
        select({"a": jnp.ones((3, 2))}, keep=keep)


@SELECTIONS
@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize(
    ("amount", "message"),
    [
        ({"keep": 0.1}, r"keep=0\.1 must be an integer.*; for a fraction pass sparsity=0\.9, the fraction removed"),
        ({"keep": 4.0}, r"keep=4\.0 must be an integer.*; write keep=4$"),
        ({"keep": {"a": 0.25}}, r"keep\['a'\]=0\.25 must be an integer.*sparsity=0\.75"),
        ({"sparsity": 3}, "sparsity=3 is an integer.*To keep 3 weights, write keep=3"),
        ({"sparsity": 1}, "sparsity=1 is an integer"),
        ({"sparsity": "0.5"}, "sparsity='0.5' is a str"),
        ({"sparsity": 0.5, "keep": 3}, "both are given"),
        ({}, "neither is given"),
    ],
)
def test_amounts_of_the_wrong_kind_are_refused_with_the_right_spelling(select, amount, message):
    with pytest.raises(TypeError, match=message):
        select({"a": jnp.ones((3, 2))}, **amount)


@SELECTIONS
def test_an_amount_by_position_is_refused_with_the_right_spelling(select):
    with pytest.raises(TypeError, match=r"takes its amount by keyword, not 0\.1 by position: sparsity=0\.9"):
        select({"a": jnp.ones((3, 2))}, 0.1)


EVERY = pytest.mark.parametrize(
    "select",
    [
        *SELECTIONS.args[1],
        functools.partial(jprune.nm_masks, n=1, m=1),
        functools.partial(jprune.block_masks, block=(3, 1)),
        jprune.channel_masks,
    ],
)


@EVERY
@pytest.mark.usefixtures("_unchecked")
@pytest.mark.parametrize("min_keep", [True, 1.5, "1"])
def test_a_floor_that_is_no_count_is_refused(select, min_keep):
    with pytest.raises(
        TypeError, match=f"min_keep={min_keep!r} must be an int, the number of weights that every layer keeps"
    ):
        select({"a": jnp.ones((3, 2))}, sparsity=0.0, min_keep=min_keep)


@EVERY
def test_a_floor_below_zero_is_refused(select):
    with pytest.raises(ValueError, match="min_keep=-1 must not be negative"):
        select({"a": jnp.ones((3, 2))}, sparsity=0.0, min_keep=-1)


def test_an_error_names_the_unit_of_a_count():
    with pytest.raises(ValueError, match=r"keep=4 must lie in 0\.\.3, the number of weights; keep fewer"):
        jprune.global_masks({"a": jnp.ones(3)}, keep=4)
    with pytest.raises(ValueError, match=r"sparsity=1\.5 must be from 0\.0 to 1\.0: it is the fraction of the weights"):
        jprune.global_masks({"a": jnp.ones(3)}, sparsity=1.5)


def test_counts_come_from_shapes_alone():
    shapes = {"a": jax.ShapeDtypeStruct((4,), jnp.float32), "b": jax.ShapeDtypeStruct((5, 2), jnp.float32)}
    assert layer_counts(shapes, sparsity=0.5, min_keep=3) == [3, 5]
    assert layer_counts(shapes, sparsity={"a": jprune.Keep(1), "b": 0.75}) == [1, 2]
    # ERK: 8 * 4 / 11 = 2.91 and 8 * 7 / 11 = 5.09; of 13 the first layer, dense, keeps all its 4.
    assert erk_counts(shapes, keep=8) == [3, 5]
    assert erk_counts(shapes, keep=13) == [4, 9]
    params = {"kernel": jax.ShapeDtypeStruct((10, 9), jnp.float32), "bias": jax.ShapeDtypeStruct((10,), jnp.float32)}
    assert jprune.keep_count(params, ratio=4) == 15
    assert jprune.selection.compression(params, {"kernel": jnp.arange(90).reshape(10, 9) < 15, "bias": None}) == 4.0


@pytest.mark.usefixtures("_unchecked")
def test_a_way_of_counting_given_as_the_ratio_is_pointed_to_its_argument():
    with pytest.raises(TypeError, match=r"ratio='shrinkbench' must be a number: .*; .* counting='shrinkbench', with"):
        jprune.selection.keep_count({"kernel": jnp.ones((2, 2))}, ratio="shrinkbench")


def test_dividing_a_total_among_many_layers_takes_few_products(monkeypatch):
    """Every amount of a schedule is divided; with 400 layers of different shapes each took 640,000 products (1.5 s)."""
    products = []
    multiply = Fraction.__mul__
    monkeypatch.setattr(Fraction, "__mul__", lambda a, b: products.append(1) or multiply(a, b))
    sizes = [(i + 2) ** 2 for i in range(100)]
    counts = allocation.proportional([i + 2 for i in range(100)], [1] * 100, sizes, sum(sizes) // 2)
    assert sum(counts) == sum(sizes) // 2
    assert 0 < len(products) < 5_000


@pytest.mark.usefixtures("_unchecked")
def test_a_count_of_numpy_is_converted_and_not_searched():
    """A frame of costs has counts of int64; a billion of them was looked for in a range, for two minutes."""
    count = jprune.Keep(np.int64(2**31 + 1)).count
    assert type(count) is int
    searched = type("Searched", (int,), {"__eq__": lambda self, other: pytest.fail("searched"), "__hash__": None})
    assert [limb.tolist() for limb in uint64.count_of([searched(3), np.int32(5)])] == [[0, 0], [3, 5]]


@pytest.mark.parametrize("size", [15, 45, 1005, 2**31 + 7, 2**33 + 3, 10**13 + 5])
@pytest.mark.parametrize("percent", [10, 30, 70, 90, 99])
def test_counts_are_those_of_the_decimal_number_that_was_written(size, percent):
    # 15 (1 - 0.9) is 1.4999999999999998 in floats and 3/2 in exact arithmetic, which rounds to 2.
    exact = round(Fraction(size * (100 - percent), 100))
    for sparsity in (percent / 100, 1 - (100 - percent) / 100, float(np.float32(percent / 100))):
        assert allocation.kept(sparsity, size) == exact


def test_sparsities_that_are_no_decimal_numbers_keep_exact_counts():
    assert allocation.kept(1 / 6, 3) == 2  # 5/2
    assert allocation.kept(1 / 3, 3 * 2**40) == 2**41
    assert allocation.kept(1 - 2**-30, 2**40) == 2**10
    assert allocation.kept(float(np.float32(1 - 1 / 1024)), 2**31) == 2**21


def test_selections_agree_on_ties_that_floats_cannot_represent():
    params = {"kernel": jnp.arange(1.0, 16.0).reshape(15, 1)}
    shapes = jax.eval_shape(lambda: params)
    assert layer_counts(shapes, sparsity=0.9) == erk_counts(shapes, sparsity=0.9) == [2]
    for select in (jprune.global_masks, jprune.layer_masks, jprune.uniform_masks, jprune.output_masks):
        assert int(select(params, sparsity=0.9)["kernel"].sum()) == 2
        # A schedule of two entries looks up its counts at run time.
        tx = jprune.prune(jprune.magnitude(), {0: 0.3, 1: 0.9}, selection=select)
        state, update = tx.init(params), jax.jit(tx.update)
        for kept in (10, 2):  # 10.5 and 1.5
            _, state = update(params, state, params)
            assert int(state.masks["kernel"].sum()) == kept


def test_a_ratio_keeps_the_exact_count():
    params = {"kernel": jnp.ones((3, 4))}
    assert jprune.keep_count(params, ratio=1.6) == 8  # 12 / 1.6 = 7.5
    assert jprune.keep_count({"kernel": jnp.ones((5, 5))}, ratio=1 / (1 - 0.9)) == 2  # 2.5


def test_counts_given_as_an_array_keep_the_minimum_of_every_layer():
    scores = {"a": jnp.arange(32.0).reshape(8, 4), "b": jnp.ones((2, 1)), "c": jnp.arange(16.0).reshape(4, 4)}
    select = functools.partial(jprune.layer_masks, scores, min_keep=5)
    for counts in (select(keep=jnp.array([2, 1, 7])), jax.jit(lambda keep: select(keep=keep))(jnp.array([2, 1, 7]))):
        assert {name: int(mask.sum()) for name, mask in counts.items()} == {"a": 5, "b": 2, "c": 7}
