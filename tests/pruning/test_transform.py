"""prune and keep_zeros by themselves: counts, exact zeros, states, and what is refused."""

import functools
import itertools

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from jprune.pruning.masks import erk_counts, layer_counts
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
    """(params before, masks after, params after) of 12 steps of a cubic schedule with momentum and decay."""
    schedule = jprune.cubic(0.9, begin=2, end=10, every=3)
    tx = optax.chain(
        optax.add_decayed_weights(1e-3), optax.sgd(0.05, momentum=0.9), jprune.prune(jprune.magnitude(), schedule)
    )
    params, step = small(), make_step(tx)
    state = tx.init(params)
    record = []
    with jax.numpy_dtype_promotion("standard"):
        for _ in range(12):
            after, state = step(params, state)
            record.append((params, jprune.masks_of(state), after))
            params = after
    return schedule, record, state, step._cache_size()


def test_masks_are_those_of_a_stable_sort_at_every_step():
    schedule, record, _, _ = cubic_run()
    alive = [np.ones(w.shape, bool) for w in kernels_of(small())]
    for s, (before, masks, _) in enumerate(record):
        if s in schedule:
            keep = round(48 * (1 - schedule[s]))
            alive = largest([np.abs(w) for w in kernels_of(before)], keep, alive)
        for got, expected in zip(kernels_of(masks), alive, strict=True):
            np.testing.assert_array_equal(got, expected)


def test_pruned_weights_are_exactly_zero_after_every_step_and_the_others_are_not():
    _, record, _, _ = cubic_run()
    for _, masks, after in record:
        for mask, weight in zip(kernels_of(masks), kernels_of(after), strict=True):
            np.testing.assert_array_equal(weight != 0, mask)
            assert not np.signbit(weight[~mask]).any()


def test_masks_shrink_monotonically():
    _, record, _, _ = cubic_run()
    for (_, earlier, _), (_, later, _) in itertools.pairwise(record):
        for a, b in zip(kernels_of(earlier), kernels_of(later), strict=True):
            assert not (b & ~a).any()


def test_kept_weights_and_biases_get_the_update_they_would_get_without_prune():
    tx = optax.chain(optax.sgd(0.5), jprune.prune(jprune.magnitude(), {0: 0.5}, select=by_rank))
    params = small()
    updates, state = tx.update(slope(params), tx.init(params), params)
    plain, _ = optax.sgd(0.5).update(slope(params), optax.sgd(0.5).init(params), params)
    for name in params:
        np.testing.assert_array_equal(updates[name]["bias"], plain[name]["bias"])
        mask = np.asarray(jprune.masks_of(state)[name]["kernel"])
        expected = np.where(mask, plain[name]["kernel"], -params[name]["kernel"])
        np.testing.assert_array_equal(updates[name]["kernel"], expected)


def test_one_program_serves_every_step():
    _, _, state, programs = cubic_run()
    assert programs == 1
    assert int(state[-1].count) == 12


def test_an_update_outside_jit_selects_without_compiling_again():
    tx = jprune.prune(jprune.magnitude(), {0: 0.5, 2: 0.75})
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    state = tx.init(params)
    _, state = tx.update(slope(params), state, params)
    with pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr("jax._src.compiler.compile_or_get_cached", lambda *a, **k: compiled.append(a))
        for _ in range(2):
            _, state = tx.update(slope(params), state, params)
    assert compiled == []
    np.testing.assert_array_equal(state.masks["kernel"], [[0, 0, 0, 0], [0, 0, 1, 1]])


def test_the_state_is_an_int32_count_and_one_byte_a_weight():
    params = small()
    state = jprune.prune(jprune.magnitude(), {5: 0.5}).init(params)
    assert isinstance(state, jprune.pruning.PruneState)
    assert state.count.dtype == jnp.int32
    assert state.key is None
    assert jax.tree.structure(state.masks) == jax.tree.structure({k: {"bias": None, "kernel": 0} for k in params})
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.masks)) == 48
    assert all(leaf.dtype == bool for leaf in jax.tree.leaves(state.masks))


def test_step_s_is_the_update_after_s_earlier_ones():
    tx = jprune.prune(jprune.magnitude(), {2: 1}, select=by_rank)
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0]])}
    state, kept = tx.init(params), []
    for _ in range(4):
        _, state = tx.update(slope(params), state, params)
        kept.append(int(state.masks["kernel"].sum()))
    assert kept == [3, 3, 1, 1]


def test_an_integer_keeps_exactly_that_many_also_with_ties():
    tx = jprune.prune(jprune.magnitude(), {0: 7, 1: 3, 2: 0})
    params = {"kernel": jnp.ones((4, 3))}
    state, kept = tx.init(params), []
    for _ in range(3):
        _, state = tx.update(params, state, params)
        kept.append(np.flatnonzero(state.masks["kernel"]).tolist())
    assert kept == [[0, 1, 2, 3, 4, 5, 6], [0, 1, 2], []]


def test_scores_see_the_params_handed_to_update_and_the_grad_taken_there():
    tx = optax.chain(optax.sgd(100.0), jprune.prune(jprune.gradient(), {0: 2}, select=by_rank))
    params = {"kernel": jnp.array([[1.0, -2.0, 3.0, 4.0]])}
    grad = {"kernel": jnp.array([[5.0, 1.0, -2.0, 0.1]])}
    updates, state = tx.update(jax.tree.map(jnp.zeros_like, grad), tx.init(params), params, grad=grad)
    np.testing.assert_array_equal(state[-1].masks["kernel"], [[True, False, True, False]])
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["kernel"], [[1.0, 0.0, 3.0, 0.0]])


def test_grad_is_matched_by_path_whatever_else_it_holds():
    tx = jprune.prune(jprune.gradient(), {0: 1}, where=jprune.select(include="^b/"), select=by_rank)
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
            lambda s, keep, **floor: layer_counts(s, round(48 * keep), **floor),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_unstructured_selection_keeps_its_counts_at_every_step(select, counts):
    schedule = {0: 0.4, 1: 0.7, 2: 0.7, 3: 0.85}
    tx = jprune.prune(jprune.magnitude(), schedule, select=select, min_keep=3)
    params = small()
    state, weights = tx.init(params), {"conv": params["conv"]["kernel"], "dense": params["dense"]["kernel"]}
    for step in range(4):
        _, state = tx.update(params, state, params)
        each = counts(weights, 1.0 - schedule[step], min_keep=3)
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
    tx = jprune.prune(jprune.magnitude(), schedule, select=select)
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
    score = jprune.fisher(loss)
    tx = jprune.prune(score, {0: 2}, select=by_rank)
    _, state = jax.jit(lambda p, b: tx.update(p, tx.init(p), p, batch=b))(params, batch)
    values = score(params, batch=batch)["a"]["kernel"]
    np.testing.assert_array_equal(state.masks["a"]["kernel"], largest([values], 2)[0])
    with pytest.raises(ValueError, match="needs batch"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p), params)


def test_any_selection_function_will_do_and_gets_the_fraction_kept():
    def above(scores, keep, *, among=None, min_keep=0):
        return jax.tree.map(lambda s, a: a & (s > keep), scores, among)

    tx = jprune.prune(jprune.magnitude(), {0: 0.75, 2: 0.8}, select=above)
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
    tx = jprune.prune(jprune.magnitude(), {0: 0}, select=by_rank)
    held, _ = tx.update(updates, tx.init(params), params)
    after = optax.apply_updates(params, held)["kernel"]
    assert after.dtype == params_dtype
    np.testing.assert_array_equal(np.asarray(after, np.float64), 0.0)
    assert not np.signbit(np.asarray(after, np.float64)).any()


DTYPES = [jnp.float32, jnp.bfloat16, jnp.float16]


@pytest.mark.optax_promotes
@pytest.mark.parametrize("params_dtype", DTYPES)
@pytest.mark.parametrize("updates_dtype", DTYPES)
def test_a_pruned_weight_is_exactly_zero_whatever_the_dtypes(params_dtype, updates_dtype):
    info = jnp.finfo(params_dtype)
    weights = [1 / 3, -1 / 3, 1e-4, float(info.max), -float(info.max), float(info.tiny), 0.0, -0.0, 65504.0, 1234.567]
    exact_zero(params_dtype, updates_dtype, weights)


def test_a_pruned_weight_that_is_not_finite_stays_visible():
    params = {"kernel": jnp.array([[jnp.inf, -jnp.inf, jnp.nan, 1.0]])}
    tx = jprune.prune(jprune.random(), {0: 0}, select=by_rank, key=jax.random.key(0))
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    np.testing.assert_array_equal(optax.apply_updates(params, updates)["kernel"], [[np.nan, np.nan, np.nan, 0.0]])


def test_a_random_score_draws_from_the_key_folded_with_the_step():
    key, params = jax.random.key(3), {"kernel": jnp.ones((5, 8))}
    tx = jprune.prune(jprune.random(), {1: 11}, select=by_rank, key=key)
    state = tx.init(params)
    for _ in range(2):
        _, state = tx.update(params, state, params)
    scores = jprune.random()(params, key=jax.random.fold_in(key, 1))
    np.testing.assert_array_equal(state.masks["kernel"], jprune.global_masks(scores, 11)["kernel"])
    assert jnp.array_equal(jax.random.key_data(state.key), jax.random.key_data(key))


def test_a_key_passed_to_update_takes_the_place_of_the_first():
    params = {"kernel": jnp.ones((5, 8))}
    tx = jprune.prune(jprune.random(), {0: 11}, select=by_rank)
    _, state = tx.update(params, tx.init(params), params, key=jax.random.key(3))
    other = jprune.prune(jprune.random(), {0: 11}, select=by_rank, key=jax.random.key(3))
    _, expected = other.update(params, other.init(params), params)
    np.testing.assert_array_equal(state.masks["kernel"], expected.masks["kernel"])


@pytest.mark.parametrize(
    ("score", "message"),
    [(jprune.gradient(), "needs grad"), (jprune.undecayed(5e-4), "needs grad"), (jprune.random(), "needs key")],
)
def test_what_a_score_needs_is_asked_for_while_tracing(score, message):
    tx = jprune.prune(score, {1000: 0.5})
    params = {"kernel": jnp.ones((1, 2))}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_a_grad_without_the_leaf_is_refused_by_name():
    tx = jprune.prune(jprune.gradient(), {0: 0.5})
    params = {"a": {"kernel": jnp.ones((1, 2))}}
    with pytest.raises(ValueError, match="grad has no leaf 'a/kernel'"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, grad={"b": jnp.ones(1)}), params)
    with pytest.raises(ValueError, match=r"grad has shape \(3,\) at 'a/kernel'"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, grad={"a": {"kernel": jnp.ones(3)}}), params)


@pytest.mark.parametrize("link", [jprune.prune(jprune.magnitude(), {0: 0.5}), jprune.keep_zeros()])
def test_update_needs_params_and_trees_that_match(link):
    params = {"kernel": jnp.ones((1, 2))}
    state = link.init(params)
    with pytest.raises(ValueError, match="needs params"):
        link.update(params, state)
    with pytest.raises(ValueError, match="the masks of the optimizer state has shape"):
        link.update({"kernel": jnp.ones((2, 2))}, state, {"kernel": jnp.ones((2, 2))})
    with pytest.raises(ValueError, match="updates has no leaf 'kernel'"):
        link.update({"other": jnp.ones((1, 2))}, state, params)


def test_bad_schedules_are_refused_before_any_training():
    params = {"kernel": jnp.ones((1, 10))}
    with pytest.raises(ValueError, match=r"sparsity at step 0 is 1\.5"):
        jprune.prune(jprune.magnitude(), {0: 1.5})
    with pytest.raises(ValueError, match="keeps 11 weights at step 0; only 10"):
        jprune.prune(jprune.magnitude(), {0: 11}).init(params)
    with pytest.raises(ValueError, match="more than the 2 at step 0"):
        jprune.prune(jprune.magnitude(), {0: 0.8, 5: 0.5}).init(params)
    with pytest.raises(ValueError, match="min_keep=3"):
        jprune.prune(jprune.magnitude(), {0: 2}, min_keep=3).init(params)


def test_a_where_that_selects_nothing_is_refused_at_init():
    with pytest.raises(ValueError, match="selects no float leaf"):
        jprune.prune(jprune.magnitude(), {0: 0.5}).init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="matches no leaf"):
        jprune.keep_zeros(where=jprune.select(include="absent")).init({"kernel": jnp.ones((1, 1))})


@pytest.mark.optax_promotes
def test_keep_zeros_holds_what_is_zero_at_init():
    tx = optax.chain(optax.adam(0.1), jprune.keep_zeros())
    params = {"kernel": jnp.array([[0.0, 1.0, -0.0, 2.0]]), "bias": jnp.zeros(2)}
    state, step = tx.init(params), make_step(tx)
    for _ in range(5):
        params, state = step(params, state)
        np.testing.assert_array_equal(params["kernel"] == 0, [[True, False, True, False]])
    assert (np.asarray(params["bias"]) != 0).all()
    np.testing.assert_array_equal(jprune.masks_of(state)["kernel"], [[False, True, False, True]])


def test_a_schedule_that_asks_for_no_change_compiles_no_selection():
    params = {"kernel": jnp.ones((2, 2))}
    for schedule in ({0: 0.0}, {0: 4}, {0: 0.0, 7: 4}):
        tx = jprune.prune(jprune.magnitude(), schedule)
        assert "cond" not in str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))


def test_the_operands_of_the_conditional_never_include_the_updates():
    tx = jprune.prune(jprune.gradient(), {3: 0.5})
    params = {"kernel": jnp.ones((2, 2))}
    state = tx.init(params)

    def update(updates, params, grad):
        return tx.update(updates, state, params, grad=grad)

    jaxpr = jax.make_jaxpr(update)(params, params, params).jaxpr
    tainted = {jaxpr.invars[0]}
    inner = [e for e in jaxpr.eqns if "advance" in str(e.params.get("name", ""))]
    assert len(inner) == 1
    assert "cond[" in str(inner[0])
    for eqn in jaxpr.eqns:
        if eqn is inner[0]:
            break
        if any(not isinstance(v, jax.extend.core.Literal) and v in tainted for v in eqn.invars):
            tainted.update(eqn.outvars)
    assert not any(v in tainted for v in inner[0].invars if not isinstance(v, jax.extend.core.Literal))


def test_buffers_can_be_donated():
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9), jprune.prune(jprune.random(), {1: 0.5}, select=by_rank, key=jax.random.key(0))
    )
    key_survives = jprune.prune(jprune.random(), {1: 0.5}, select=by_rank, key=(key := jax.random.key(1))).init(small())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = small()
    state = tx.init(params)
    for _ in range(3):
        given = (params, state)
        with jax.numpy_dtype_promotion("standard"):
            params, state = step(params, state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert jprune.sparsity(jprune.masks_of(state)) == 0.5
    jax.block_until_ready((key_survives, jax.random.split(key)))
    params = small()
    step(params, tx.init(params))  # the key handed to prune is not the one that was donated


def test_a_train_step_lowers_for_every_platform():
    def loss(params, batch):
        hidden = jax.nn.relu(batch @ params["a"]["kernel"])
        return jnp.mean((hidden @ params["b"]["kernel"]) ** 2)

    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9), jprune.prune(jprune.gradient(), jprune.cubic(0.5, begin=0, end=9, every=2))
    )

    def step(params, state, batch):
        grad = jax.grad(loss)(params, batch)
        updates, state = tx.update(grad, state, params, grad=grad)
        return optax.apply_updates(params, updates), state

    params = {"a": {"kernel": jnp.ones((4, 8))}, "b": {"kernel": jnp.ones((8, 2))}}
    arguments = (params, tx.init(params), jnp.ones((16, 4)))
    with jax.numpy_dtype_promotion("standard"):
        exported = jax.export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(*arguments)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert "stablehlo.case" in exported.mlir_module() or "stablehlo.if" in exported.mlir_module()


schedules = st.dictionaries(st.integers(0, 5), st.floats(0, 1) | st.integers(0, 12), min_size=1, max_size=4)


def follows_its_schedule(shapes, table, seed):
    total = sum(int(np.prod(shape)) for shape in shapes)
    counts = {s: v if isinstance(v, int) else round(total * (1 - v)) for s, v in table.items()}
    ordered = [counts[s] for s in sorted(counts)]
    falling = ordered == sorted(ordered, reverse=True) and max(ordered) <= total
    # Weights from few values, so that ties are common.
    values = np.random.default_rng(seed).integers(-3, 4, size=total).astype(np.float32)
    leaves = np.split(values, np.cumsum([int(np.prod(shape)) for shape in shapes])[:-1])
    params = tuple(jnp.asarray(v.reshape(shape)) for v, shape in zip(leaves, shapes, strict=True))
    tx = jprune.prune(jprune.magnitude(), table, where=lambda path, leaf: True)
    if not falling:
        with pytest.raises(ValueError, match="schedule keeps"):
            tx.init(params)
        return
    state, kept, before = tx.init(params), total, None
    for step in range(7):
        updates, state = tx.update(tuple(jnp.ones_like(w) for w in params), state, params)
        params = optax.apply_updates(params, updates)
        kept = counts.get(step, kept)
        masks = jax.tree.leaves(state.masks)
        assert sum(int(mask.sum()) for mask in masks) == kept
        assert before is None or not any(bool((mask & ~old).any()) for mask, old in zip(masks, before, strict=True))
        assert all(bool((weight[~mask] == 0).all()) for mask, weight in zip(masks, params, strict=True))
        before = masks


shapes = st.lists(st.sampled_from([(3,), (2, 3), (1, 1), (4, 2, 1)]), min_size=1, max_size=2)


@settings(max_examples=6, deadline=None)
@given(shapes, schedules, st.integers(0, 1000))
def test_any_tree_follows_any_schedule_exactly_and_monotonically(shapes, table, seed):
    follows_its_schedule(shapes, table, seed)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(shapes, schedules, st.integers(0, 1000))
def test_many_trees_follow_many_schedules_exactly_and_monotonically(shapes, table, seed):
    follows_its_schedule(shapes, table, seed)
