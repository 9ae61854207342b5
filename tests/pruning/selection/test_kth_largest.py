"""The exact selection by counting agrees with a stable numpy sort, on packed and unpacked trees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from jprune.pruning.selection import counting, kth_largest, uint64

SMALL = [(3,), (), (0,), (2, 3), (7,), (1, 1, 4), (5, 2)]
MIXED = [(5,), (257, 256), (2, 2), (1,), (3, 3)]  # the second is too large to be packed with its neighbours


def draw(rng, shape, kind):
    """Float32 scores: few values, spread over all magnitudes, and every special value."""
    if kind == "ties":
        return rng.integers(-2, 3, shape).astype(np.float32)
    values = (rng.normal(size=shape) * 10.0 ** rng.integers(-38, 38, shape)).astype(np.float32)
    if kind == "special":
        special = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, 1e-42, -1e-42, 3.4e38], np.float32)
        values = np.where(rng.random(shape) < 0.7, rng.choice(special, shape), values).astype(np.float32)
    return values


def sorted_by_numpy(arrays, keep, among):
    """The ``keep`` largest of the scores ``among``: NaN is below -inf, -0 equals 0, and ties go by position."""
    flat = np.concatenate([np.asarray(x, np.float64).ravel() for x in arrays])
    may = np.concatenate(
        [(np.ones(x.shape, bool) if e is None else e).ravel() for x, e in zip(arrays, among, strict=True)]
    )
    nan = np.isnan(flat)
    order = np.lexsort((-np.where(nan, 0.0, flat), nan))
    chosen = np.zeros(flat.size, bool)
    chosen[order[may[order]][:keep]] = True
    return np.split(chosen, np.cumsum([x.size for x in arrays])[:-1])


def same(found, wanted):
    for mask, expected in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(np.asarray(mask).ravel(), expected)


@pytest.mark.parametrize(
    ("shapes", "one_device"),
    [
        pytest.param(SMALL, True, id="small-one device"),
        pytest.param(SMALL, False, id="small-many"),
        pytest.param(MIXED, True, id="mixed-one device"),
        pytest.param(MIXED, False, id="mixed-many", marks=pytest.mark.slow),  # nothing is packed for many devices
    ],
)
def test_of_all_arrays_together_those_of_a_stable_sort(shapes, one_device):
    size = sum(int(np.prod(shape)) for shape in shapes)

    @settings(max_examples=8)
    @given(st.integers(0, 2**32 - 1), st.sampled_from(["ties", "spread", "special"]), st.floats(0, 1))
    def check(seed, kind, part):
        rng = np.random.default_rng(seed)
        arrays = [draw(rng, shape, kind) for shape in shapes]
        # Every second array may be marked as a whole; of the others sometimes fewer scores than are wanted.
        among = [None if i % 2 else rng.random(shape) < 0.6 for i, shape in enumerate(shapes)]
        keep = round(part * size)
        found = kth_largest.largest(
            [jnp.asarray(x) for x in arrays],
            uint64.count_of(keep),
            [None if e is None else jnp.asarray(e) for e in among],
            one_device=one_device,
        )
        assert [mask.shape for mask in found] == shapes
        same(found, sorted_by_numpy(arrays, keep, among))

    check()


@pytest.mark.parametrize("one_device", [True, False], ids=["one device", "many"])
def test_of_each_array_those_of_its_own_stable_sort(one_device):
    @settings(max_examples=8)
    @given(st.integers(0, 2**32 - 1), st.sampled_from(["ties", "spread", "special"]))
    def check(seed, kind):
        rng = np.random.default_rng(seed)
        arrays = [draw(rng, shape, kind) for shape in SMALL]
        among = [None if i % 2 else rng.random(shape) < 0.6 for i, shape in enumerate(SMALL)]
        keep = [int(rng.integers(0, x.size + 1)) for x in arrays]
        found = kth_largest.largest(
            [jnp.asarray(x) for x in arrays],
            uint64.count_of(keep),
            [None if e is None else jnp.asarray(e) for e in among],
            each=True,
            one_device=one_device,
        )
        same(found, [sorted_by_numpy([x], k, [e])[0] for x, k, e in zip(arrays, keep, among, strict=True)])

    check()


@pytest.fixture(params=["cuda", "tpu"])
def form(request, monkeypatch):
    """The form of the search for an accelerator, run on the CPU."""
    choose = lambda *args, default, **platforms: platforms.get(request.param, default)(*args)
    monkeypatch.setattr(jax.lax, "platform_dependent", choose)
    kth_largest._largest.clear_cache()
    yield request.param
    kth_largest._largest.clear_cache()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ties", "spread", "special"])
@pytest.mark.parametrize("one_device", [True, False], ids=["one device", "many"])
def test_the_forms_for_accelerators_choose_those_of_a_stable_sort(form, one_device, kind):
    """Numbers below the smallest normal one equal 0, as on a TPU."""
    for shapes in (SMALL, MIXED):
        for part, rng in zip((0, 0.1, 0.5, 1), map(np.random.default_rng, range(4)), strict=True):
            arrays = [draw(rng, shape, kind) for shape in shapes]
            arrays = [np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x) for x in arrays]
            among = [None if i % 2 else rng.random(shape) < 0.6 for i, shape in enumerate(shapes)]
            keep = round(part * sum(x.size for x in arrays))
            given = [None if mask is None else jnp.asarray(mask) for mask in among]
            found = kth_largest.largest(
                [jnp.asarray(x) for x in arrays], uint64.count_of(keep), given, one_device=one_device
            )
            same(found, sorted_by_numpy(arrays, keep, among))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ties", "special"])
@pytest.mark.parametrize("one_device", [True, False], ids=["one device", "many"])
def test_the_forms_for_accelerators_choose_in_each_array_those_of_its_stable_sort(form, one_device, kind):
    for shapes in (SMALL, MIXED):
        for rng in map(np.random.default_rng, range(3)):
            arrays = [draw(rng, shape, kind) for shape in shapes]
            arrays = [np.where(np.abs(x) < np.finfo(np.float32).tiny, np.float32(0), x) for x in arrays]
            keep = [int(rng.integers(0, x.size + 1)) for x in arrays]
            found = kth_largest.largest(
                [jnp.asarray(x) for x in arrays],
                uint64.count_of(keep),
                [None] * len(arrays),
                each=True,
                one_device=one_device,
            )
            same(found, [sorted_by_numpy([x], k, [None])[0] for x, k in zip(arrays, keep, strict=True)])


@pytest.mark.parametrize("size", [2**16, 70_001])
@pytest.mark.parametrize("each", [False, True], ids=["together", "each"])
def test_ties_of_a_long_vector_are_cut_in_the_lines_of_an_accelerator(form, size, each):
    """On one TPU the lines have 128 elements; 70,001 elements do not fill the last line."""
    rng = np.random.default_rng(0)
    arrays = [draw(rng, shape, "ties") for shape in (size, (5, 7))]
    among = [rng.random(size) < 0.6, None]
    keep = [size // 7, 11]
    given = [jnp.asarray(array) for array in arrays], [jnp.asarray(among[0]), None]
    if each:
        found = kth_largest.largest(given[0], uint64.count_of(keep), given[1], each=True, one_device=True)
        same(found, [sorted_by_numpy([x], k, [e])[0] for x, k, e in zip(arrays, keep, among, strict=True)])
    else:
        found = kth_largest.largest(given[0], uint64.count_of(sum(keep)), given[1], one_device=True)
        same(found, sorted_by_numpy(arrays, sum(keep), among))


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [99_999_989, 10**8, 3 * 2**20, 2**27, 2 * 49_999_991])
def test_blocks_of_a_sharded_axis_are_within_a_shard(size, shards):
    """99,999,989 and 49,999,991 are prime: the first cannot be divided evenly, the second has no blocks."""
    block = counting._block(size, 5_000, shards)
    if size % shards == 0:
        assert block == 0 if size == 2 * 49_999_991 else (size // shards) % block == 0 < block
    if size == 99_999_989:
        assert block == 5_000


@pytest.mark.parametrize(
    "one_device",
    [pytest.param(True, id="one device"), pytest.param(False, id="many", marks=pytest.mark.slow)],
)
def test_a_leaf_without_axes_has_a_position_like_any_other(one_device):
    arrays = [jnp.float32(1.0), jnp.ones(2), jnp.float32(1.0)]
    found = kth_largest.largest(arrays, uint64.count_of(2), [None] * 3, one_device=one_device)
    assert [mask.tolist() for mask in found] == [True, [True, False], False]
    found = kth_largest.largest(arrays, uint64.count_of([1, 1, 0]), [None] * 3, each=True, one_device=one_device)
    assert [mask.tolist() for mask in found] == [True, [True, False], False]


def test_float64_scores_are_distinguished_beyond_float32():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        arrays = [1.0 + rng.integers(0, 50, (6, 7)) * 1e-15, 1.0 + rng.integers(0, 50, 30) * 1e-15]
        for keep in (1, 20, 71):
            found = kth_largest.largest([jnp.asarray(x) for x in arrays], uint64.count_of(keep), [None, None])
            same(found, sorted_by_numpy(arrays, keep, [None, None]))


def test_scores_of_different_precision_are_compared_by_value():
    values = np.linspace(-2, 2, 12)
    arrays = [jnp.asarray(values[i::3], dtype) for i, dtype in enumerate((jnp.float32, jnp.bfloat16, jnp.float16))]
    found = kth_largest.largest(arrays, uint64.count_of(5), [None] * 3)
    same(found, sorted_by_numpy([np.asarray(x, np.float64) for x in arrays], 5, [None] * 3))


@pytest.mark.parametrize("one_device", [True, False], ids=["one device", "many"])
def test_arrays_too_large_for_one_count_are_counted_in_rows(one_device, monkeypatch):
    """With the limit of a uint32 count set to 10, the leading axes become rows."""
    monkeypatch.setattr(counting, "_ROW", 10)
    monkeypatch.setattr(counting, "_SMALL", 0)
    rng = np.random.default_rng(1)
    arrays = [rng.integers(0, 3, shape).astype(np.float32) for shape in [(4, 3, 3), (5,), (2, 7), (3, 2, 2, 2)]]
    kth_largest._largest.clear_cache()
    for keep in (0, 1, 30, 50, 78, 79):
        found = kth_largest.largest(
            [jnp.asarray(x) for x in arrays], uint64.count_of(keep), [None] * 4, one_device=one_device
        )
        same(found, sorted_by_numpy(arrays, keep, [None] * 4))
    kth_largest._largest.clear_cache()  # it was compiled with rows of 10


@pytest.mark.slow
def test_no_search_takes_more_passes_than_its_bound(monkeypatch):
    """32 passes halve 2**32 keys, two guesses may fail, and the rest are for the positions of 4,000 weights."""
    passes, count = [0], counting.Layout.count

    def counted(self, predicates):
        passes[0] += 1
        return count(self, predicates)

    monkeypatch.setattr(counting.Layout, "count", counted)
    rng = np.random.default_rng(0)
    ulps = np.float32(1) + np.repeat(np.arange(2, dtype=np.float32), 2000) * np.float32(2**-23)
    spread = (rng.normal(size=4000) * 10.0 ** rng.integers(-38, 38, 4000)).astype(np.float32)
    for scores, one_device in ((ulps, False), (spread, True)):
        passes[0] = 0
        with jax.disable_jit():
            (mask,) = kth_largest.largest([jnp.asarray(scores)], uint64.count_of(999), [None], one_device=one_device)
        same([mask], sorted_by_numpy([scores], 999, [None]))
        assert passes[0] <= (32 + 2) + (12 + 2)


def test_inside_jit_nan_counts_as_the_lowest_and_outside_it_is_refused():
    scores = {"a": jnp.array([jnp.nan, 1.0, -jnp.inf, jnp.nan])}
    select = jax.jit(lambda scores: jprune.global_masks(scores, keep=3))
    assert select(scores)["a"].tolist() == [True, True, True, False]
    with pytest.raises(ValueError, match="scores has NaN at 'a'"):
        jprune.global_masks(scores, keep=3)
    among = {"a": jnp.array([False, True, True, False])}  # what may not be chosen may be NaN
    assert jprune.global_masks(scores, keep=1, among=among)["a"].tolist() == [False, True, False, False]


def test_two_limbs_compute_as_python_does():
    rng = np.random.default_rng(0)
    x, y = ([int(v) >> int(rng.integers(0, 64)) for v in rng.integers(0, 2**64, 300, np.uint64)] for _ in range(2))
    x, y = [0, 0, 2**64 - 1, 2**32, *x], [0, 1, 2**64 - 1, 2**32 - 1, *y]
    a, b = (uint64.Count(*map(jnp.asarray, uint64.count_of(numbers))) for numbers in (x, y))

    def same_numbers(found, function):
        numbers = [(int(high) << 32) + int(low) for high, low in zip(*map(np.asarray, found), strict=True)]
        assert numbers == [function(*pair) for pair in zip(x, y, strict=True)]

    same_numbers(uint64.add(a, b), lambda x, y: (x + y) % 2**64)
    same_numbers(uint64.subtract(a, b), lambda x, y: (x - y) % 2**64)
    same_numbers(uint64.subtract_or_zero(a, b), lambda x, y: max(x - y, 0))
    same_numbers(uint64.distance(a, b), lambda x, y: abs(x - y))
    same_numbers(uint64.at_most(a, b), min)
    same_numbers(uint64.times(a.low, 2**32 - 5), lambda x, y: x % 2**32 * (2**32 - 5))
    assert uint64.not_below(a, b).tolist() == [p >= q for p, q in zip(x, y, strict=True)]
    assert uint64.equal(a, b).tolist() == [p == q for p, q in zip(x, y, strict=True)]
    for width in (1, 2, 7, 300):
        assert uint64.number(uint64.total(jax.tree.map(lambda limb, w=width: limb[:w], a))) == sum(x[:width]) % 2**64


def test_an_axis_too_long_to_be_numbered_is_refused():
    long = jax.ShapeDtypeStruct((2**31,), jnp.float32)
    with pytest.raises(ValueError, match=r"shape \(2147483648,\): every axis must be shorter than 2147483648"):
        jax.eval_shape(lambda x: jprune.global_masks([x], keep=1), long)
