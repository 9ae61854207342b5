"""prune and keep_zeros on their own: counts, exact zeros, states and errors."""

import functools
import itertools

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune.pruning.state import PruneState
from jprune.selection import erk_counts, layer_counts
from tests.pruning.steps import by_rank, largest, make_step, slope


def small():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 2)), "bias": jnp.zeros(2)},
        "dense": {"kernel": jax.random.normal(keys[1], (6, 5)), "bias": jnp.ones(5)},
    }


def kernels_of(tree):
    return [np.asarray(tree[name]["kernel"]) for name in ("conv", "dense")]


@functools.cache
def cubic_run():
    """(params before, masks after, params after) of 12 steps of a cubic schedule with momentum and decay.

    One program serves every step: it is traced once.
    """
    chex.clear_trace_counter()
    schedule = jprune.cubic(0.9, begin=2, end=10, every=3)
    tx = optax.chain(
        optax.add_decayed_weights(1e-3), optax.sgd(0.05, momentum=0.9), jprune.prune(jprune.magnitude(), schedule)
    )
    params, step = small(), jax.jit(chex.assert_max_traces(make_step(tx, jit=False), n=1))
    state = tx.init(params)
    record = []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(12):
            after, state = step(params, state)
            record.append((params, jprune.masks_of(state), after))
            params = after
    return schedule, record, state


def test_masks_are_those_of_a_stable_sort_at_every_step():
    schedule, record, _ = cubic_run()
    alive = [np.ones(w.shape, bool) for w in kernels_of(small())]
    for s, (before, masks, _) in enumerate(record):
        if s in schedule:
            keep = round(48 * (1 - schedule[s]))
            alive = largest([np.abs(w) for w in kernels_of(before)], keep, alive)
        for got, expected in zip(kernels_of(masks), alive, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_pruned_weights_are_exactly_zero_after_every_step_and_the_others_are_not():
    _, record, _ = cubic_run()
    for _, masks, after in record:
        for mask, weight in zip(kernels_of(masks), kernels_of(after), strict=True):
            np.testing.assert_array_equal(weight != 0, mask)
            assert not np.signbit(weight[~mask]).any()


def test_masks_shrink_monotonically():
    _, record, _ = cubic_run()
    for (_, earlier, _), (_, later, _) in itertools.pairwise(record):
        for a, b in zip(kernels_of(earlier), kernels_of(later), strict=True):
            assert not (b & ~a).any()


def test_kept_weights_and_biases_get_the_update_they_would_get_without_prune():
    tx = optax.chain(optax.sgd(0.5), jprune.prune(jprune.magnitude(), {0: 0.5}, selection=by_rank))
    params = small()
    updates, state = tx.update(slope(params), tx.init(params), params)
    plain, _ = optax.sgd(0.5).update(slope(params), optax.sgd(0.5).init(params), params)
    for name in params:
        np.testing.assert_array_equal(updates[name]["bias"], plain[name]["bias"])
        mask = np.asarray(jprune.masks_of(state)[name]["kernel"])
        expected = np.where(mask, plain[name]["kernel"], -params[name]["kernel"])
        np.testing.assert_array_equal(updates[name]["kernel"], expected)


def test_one_program_serves_every_step():
    _, _, state = cubic_run()
    assert int(state[-1].count) == 12


def test_the_state_is_an_int32_count_and_one_byte_a_weight():
    params = small()
    state = jprune.prune(jprune.magnitude(), {5: 0.5}).init(params)
    assert isinstance(state, PruneState)
    assert state.count.dtype == jnp.int32
    assert state.key is None
    assert jax.tree.structure(state.masks) == jax.tree.structure({k: {"bias": None, "kernel": 0} for k in params})
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.masks)) == 48
    assert all(leaf.dtype == bool for leaf in jax.tree.leaves(state.masks))


def test_step_s_is_the_update_after_s_earlier_ones():
    tx = jprune.prune(jprune.magnitude(), {2: jprune.Keep(1)}, selection=by_rank)
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0]])}
    state, kept = tx.init(params), []
    for _ in range(4):
        _, state = tx.update(slope(params), state, params)
        kept.append(int(state.masks["kernel"].sum()))
    assert kept == [3, 3, 1, 1]


def test_an_integer_keeps_exactly_that_many_also_with_ties():
    tx = jprune.prune(jprune.magnitude(), {0: jprune.Keep(7), 1: jprune.Keep(3), 2: jprune.Keep(0)})
    params = {"kernel": jnp.ones((4, 3))}
    state, kept = tx.init(params), []
    for _ in range(3):
        _, state = tx.update(params, state, params)
        kept.append(np.flatnonzero(state.masks["kernel"]).tolist())
    assert kept == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2], []]


def test_scores_see_the_params_handed_to_update_and_the_grad_taken_there():
    tx = optax.chain(optax.sgd(100.0), jprune.prune(jprune.gradient(), {0: jprune.Keep(2)}, selection=by_rank))
    params = {"kernel": jnp.array([[1.0, -2.0, 3.0, 4.0]])}
    grad = {"kernel": jnp.array([[5.0, 1.0, -2.0, 0.1]])}
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, grad), tx.init(params), params, grad=grad)
    np.testing.assert_array_equal(state[-1].masks["kernel"], [[True, False, True, False]])
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["kernel"], [[1.0, 0.0, 3.0, 0.0]])


def test_grad_is_matched_by_path_and_may_have_other_leaves():
    tx = jprune.prune(jprune.gradient(), {0: jprune.Keep(1)}, where=jprune.by_path(include="^b/"), selection=by_rank)
    params = {"a": {"kernel": jnp.ones((1, 2))}, "b": {"kernel": jnp.ones((1, 2))}}
    grad = {"b": {"kernel": jnp.array([[1.0, 2.0]])}, "a": {"kernel": jnp.ones((1, 2))}, "c": jnp.ones(7)}
    _, state = tx.update(params, tx.init(params), params, grad=grad)
    assert state.masks["a"]["kernel"] is None
    np.testing.assert_array_equal(state.masks["b"]["kernel"], [[False, True]])


@pytest.mark.parametrize(
    ("select", "counts"),
    [
        (jprune.layer_masks, layer_counts),
        (jprune.erk_masks, erk_counts),
        pytest.param(
            jprune.uniform_masks,
            lambda s, sparsity, **other: layer_counts(s, keep=round(48 * (1 - sparsity)), **other),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_unstructured_selection_keeps_its_counts_at_every_step(select, counts):
    schedule = {0: 0.4, 1: 0.7, 2: 0.7, 3: 0.85}
    tx = jprune.prune(jprune.magnitude(), schedule, selection=select, min_keep=3, axes="flax")
    params = small()
    state, weights = tx.init(params), {name: {"kernel": params[name]["kernel"]} for name in params}
    for step in range(4):
        _, state = tx.update(params, state, params)
        each = counts(weights, sparsity=schedule[step], min_keep=3, axes="flax")
        for mask, weight, keep in zip(kernels_of(state.masks), kernels_of(params), each, strict=True):
            np.testing.assert_array_equal(mask, largest([np.abs(weight)], keep)[0])


@pytest.mark.parametrize(
    ("select", "schedule", "expected"),
    [
        (jprune.nm_masks, {1: 0.5}, [[1, 0], [0, 1], [0, 0], [1, 1]]),
        (functools.partial(jprune.block_masks, block=(2, 1)), {0: 0.25, 1: 0.5}, [[1, 0], [1, 0], [0, 1], [0, 1]]),
        (jprune.channel_masks, {1: 0.5}, [[1, 0], [1, 0], [1, 0], [1, 0]]),
    ],
    ids=["2:4", "blocks", "channels"],
)
def test_structured_selections_prune_on_a_schedule(select, schedule, expected):
    tx = jprune.prune(jprune.magnitude(), schedule, selection=select)
    params = {"kernel": jnp.array([[9.0, 0.1], [2.0, 0.4], [3.0, 0.2], [4.0, 7.1]])}
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    np.testing.assert_array_equal(state.masks["kernel"], np.array(expected, bool))


def test_a_score_that_runs_the_model_gets_the_batch_and_all_parameters():
    def loss(params, batch):
        return jnp.mean((batch @ params["a"]["kernel"] + jnp.expand_dims(params["a"]["bias"], 0)) ** 2)

    params = {"a": {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.1, 0.2])}}
    batch = jnp.array([[1.0, 0.5], [0.2, -1.0], [0.3, 0.3]])
    score = jprune.scores.fisher(loss)
    tx = jprune.prune(score, {0: jprune.Keep(2)}, selection=by_rank)
    _, state = jax.jit(lambda p, b: tx.update(p, tx.init(p), p, batch=b))(params, batch)
    values = score(params, batch=batch)["a"]["kernel"]
    np.testing.assert_array_equal(state.masks["a"]["kernel"], largest([values], 2)[0])
    with pytest.raises(ValueError, match="needs batch"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)


def test_any_selection_function_will_do_and_gets_the_sparsity():
    def above(scores, *, sparsity, among):
        return jax.tree.map(lambda s, a: a & (s > 1.0 - sparsity), scores, among)

    tx = jprune.prune(jprune.magnitude(), {0: 0.75, 2: 0.8}, selection=above)
    params = {"kernel": jnp.array([[0.1, 0.22, 0.7, 0.9]])}
    state, kept = tx.init(params), []
    for _ in range(3):
        _, state = tx.update(params, state, params)
        kept.append(np.flatnonzero(state.masks["kernel"]).tolist())
    assert kept == [[2, 3], [2, 3], [2, 3]]


def test_min_keep_saves_every_layer():
    tx = jprune.prune(jprune.magnitude(), {0: 0.9}, min_keep=2)
    params = {"a": {"kernel": jnp.full((2, 3), 1e-3)}, "b": {"kernel": jnp.ones((4, 11))}}
    _, state = tx.update(params, tx.init(params), params)
    assert [int(state.masks[k]["kernel"].sum()) for k in "ab"] == [2, 3]


def exact_zero(params_dtype, updates_dtype, weights):
    params = {"kernel": jnp.asarray(weights, params_dtype).reshape(1, -1)}
    updates = {"kernel": jnp.full(params["kernel"].shape, 0.3, updates_dtype)}
    tx = jprune.prune(jprune.magnitude(), {0: jprune.Keep(0)}, selection=by_rank)
    kept, _ = tx.update(updates, tx.init(params), params)
    after = optax.apply_updates(params, kept)["kernel"]
    assert after.dtype == params_dtype
    np.testing.assert_array_equal(np.asarray(after, np.float64), 0.0)
    assert not np.signbit(np.asarray(after, np.float64)).any()


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.optax_promotes
@pytest.mark.parametrize("params_dtype", DTYPES)
@pytest.mark.parametrize("updates_dtype", DTYPES)
def test_a_pruned_weight_is_exactly_zero_for_all_dtypes(params_dtype, updates_dtype):
    info = jnp.finfo(params_dtype)
    weights = [1 / 3, -1 / 3, 1e-4, float(info.max), -float(info.max), float(info.tiny), 0.0, -0.0, 65504.0, 1234.567]
    exact_zero(params_dtype, updates_dtype, weights)


def test_a_pruned_weight_that_is_not_finite_stays_visible():
    params = {"kernel": jnp.array([[jnp.inf, -jnp.inf, jnp.nan, 1.0]])}
    tx = jprune.prune(jprune.random(), {0: jprune.Keep(0)}, selection=by_rank, key=jax.random.key(0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["kernel"], [[np.nan, np.nan, np.nan, 0.0]])


def test_a_random_score_draws_from_the_key_folded_with_the_step():
    key, params = jax.random.key(3), {"kernel": jnp.ones((5, 8))}
    tx = jprune.prune(jprune.random(), {1: jprune.Keep(11)}, selection=by_rank, key=key)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    scores = jprune.random()(params, key=jax.random.fold_in(key, 1))
    np.testing.assert_array_equal(state.masks["kernel"], jprune.global_masks(scores, keep=11)["kernel"])
    assert jnp.array_equal(jax.random.key_data(state.key), jax.random.key_data(key))


def test_a_key_passed_to_update_takes_the_place_of_the_first():
    params = {"kernel": jnp.ones((5, 8))}
    tx = jprune.prune(jprune.random(), {0: jprune.Keep(11)}, selection=by_rank)
    _, state = tx.update(params, tx.init(params), params, key=jax.random.key(3))
    other = jprune.prune(jprune.random(), {0: jprune.Keep(11)}, selection=by_rank, key=jax.random.key(3))
    _, expected = other.update(params, other.init(params), params)
    np.testing.assert_array_equal(state.masks["kernel"], expected.masks["kernel"])


@pytest.mark.optax_promotes
def test_keep_zeros_keeps_weights_that_are_zero_at_init():
    tx = optax.chain(optax.adam(0.1), jprune.keep_zeros())
    params = {"kernel": jnp.array([[0.0, 1.0, -0.0, 2.0]]), "bias": jnp.zeros(2)}
    state, step = tx.init(params), make_step(tx)
    for _ in range(5):
        params, state = step(params, state)
        np.testing.assert_array_equal(params["kernel"] == 0, [[True, False, True, False]])
    assert (np.asarray(params["bias"]) != 0).all()
    np.testing.assert_array_equal(jprune.masks_of(state)["kernel"], [[False, True, False, True]])


def test_keep_zeros_says_at_init_that_there_is_no_zero_to_keep():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.zeros(2)}
    with pytest.warns(UserWarning, match="keep_zeros has no zero to keep"):
        jprune.keep_zeros().init(params)
    jax.jit(jprune.keep_zeros().init)(params)
