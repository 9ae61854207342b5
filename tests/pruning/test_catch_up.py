"""Schedule entries at a step that was skipped: each is applied once, at the next update."""

import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune.pruning.state import PruneState
from tests.pruning.steps import by_rank

pytestmark = pytest.mark.optax_promotes

PARAMS = {
    "a": {"kernel": jnp.array([[1.0, -2.0, 3.0, 4.0], [5.0, 6.0, 7.0, -8.0], [9.0, 10.0, 11.0, 30.0]])},
    "b": {"kernel": jnp.array([[13.0, 14.0, -15.0, 16.0], [17.0, 18.0, 19.0, 20.0]])},
}


class Selections:
    """The magnitude score, with a count of its calls."""

    def __init__(self):
        self.count = 0

    def __call__(self, params, grad=None, batch=None, key=None):
        jax.debug.callback(self.add)
        return jax.tree.map(jnp.abs, params)

    def add(self):
        self.count += 1


def make(schedule, score=None, **options):
    score = jprune.magnitude() if score is None else score
    tx = jprune.prune(score, schedule, selection=options.pop("selection", by_rank), **options)
    return tx, jax.jit(lambda params, state: tx.update(jax.tree.map(jnp.zeros_like, params), state, params))


def run(update, params, state, steps):
    """The parameters and the state after some steps, and the number of weights kept after each."""
    kept = []
    for _ in range(steps):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
        kept.append(sum(int(mask.sum()) for mask in jax.tree.leaves(state.masks)))
    return params, state, kept


def test_a_count_that_jumps_over_steps_has_only_the_last_entry_applied_and_once():
    score = Selections()
    tx, update = make({2: 0.25, 5: 0.5, 20: 0.75}, score)
    state = tx.init(PARAMS)
    params, state, kept = run(update, PARAMS, state, 2)
    assert kept == [20, 20]
    params, state, kept = run(update, params, state._replace(count=jnp.int32(9)), 12)
    jax.effects_barrier()
    assert kept == [10] * 11 + [5]
    assert score.count == 2
    jprune.check_pruned(params, state, sparsity=0.75)


def test_entries_on_time_are_applied_once_each():
    score = Selections()
    tx, update = make(jprune.cubic(0.8, begin=0, end=10, every=5), score)
    chex.clear_trace_counter()
    update = jax.jit(chex.assert_max_traces(update.__wrapped__, n=1))
    _, _, kept = run(update, PARAMS, tx.init(PARAMS), 14)
    jax.effects_barrier()
    # 20 (1 - .8 (1 - (5 / 10)^3)) = 6 weights are kept after step 5.
    assert kept == [20] * 5 + [6] * 5 + [4] * 4
    assert score.count == 2


@pytest.mark.parametrize(
    ("first", "then", "kept"),
    [
        ({0: 0.5}, {0: 0.9}, 2),
        ({0: jprune.Keep(10)}, {0: jprune.Keep(3)}, 3),
        ({0: 0.25, 3: 0.5}, {1: 0.25, 2: 0.75}, 5),
        ({0: 0.25}, {2: 0.25, 3: 0.6, 50: 0.9}, 8),
        ({0: 0.5}, {0: 0.25}, 10),
    ],
    ids=["raised", "raised count", "other steps", "earlier steps", "lowered"],
)
def test_a_schedule_changed_at_a_resume_is_followed_from_the_next_update_on(first, then, kept):
    tx, update = make(first)
    params, state, _ = run(update, PARAMS, tx.init(PARAMS), 5)
    score = Selections()
    _, again = make(then, score)
    _, _, found = run(again, params, state, 3)
    jax.effects_barrier()
    assert found == [kept] * 3
    assert score.count == 1


def test_a_target_raised_for_one_layer_is_followed():
    amounts = {"^a/": 0.5, "^b/": 0.25}
    tx, update = make({0: amounts}, selection=jprune.layer_masks)
    params, state, kept = run(update, PARAMS, tx.init(PARAMS), 2)
    assert kept == [12, 12]
    _, raised = make({0: amounts | {"^b/": 0.5}}, selection=jprune.layer_masks)
    _, state, kept = run(raised, params, state, 1)
    assert [int(mask.sum()) for mask in jax.tree.leaves(state.masks)] == [6, 4]


def test_a_resumed_schedule_that_is_unchanged_selects_nothing():
    score = Selections()
    tx, update = make({1: 0.5}, score)
    params, state, _ = run(update, PARAMS, tx.init(PARAMS), 3)
    jax.effects_barrier()
    assert score.count == 1
    _, again = make({1: 0.5, 90: 0.9}, score)
    run(again, params, state, 3)
    jax.effects_barrier()
    assert score.count == 1


@pytest.mark.parametrize("between", [{}, {1: 0.8}], ids=["neighbors", "with another between"])
def test_amounts_whose_checksums_collide_are_both_applied(between):
    """Two amounts of cubic(0.9, 0, 100000, 1), of which 20 weights keep 20 (1 - .6954) = 6 and 20 (1 - .886) = 2."""
    first, second = 0.6954054939964881, 0.8859880642743
    assert zlib.crc32(repr(first).encode()) % 2**31 == zlib.crc32(repr(second).encode()) % 2**31
    tx, update = make({0: first, **between, 2: second, 3: second})
    assert run(update, PARAMS, tx.init(PARAMS), 4)[2] == [6, 4 if between else 6, 2, 2]
    tx, _ = make({0: first, **between, 2: second})
    state = tx.init(PARAMS)
    for kept in (6, 4 if between else 6, 2):  # outside jit, where the applied entry is looked up
        _, state = tx.update(PARAMS, state, PARAMS)
        assert sum(int(mask.sum()) for mask in jax.tree.leaves(state.masks)) == kept


def test_regrowth_exchanges_once_for_each_entry_also_at_one_amount():
    score = Selections()
    options = {"regrow": jprune.Regrow(jprune.random(), 0.5), "key": jax.random.key(0)}
    tx, update = make(dict.fromkeys((0, 2, 4, 6), 0.5), score, **options)
    params, state, _ = run(update, PARAMS, tx.init(PARAMS), 4)
    jax.effects_barrier()
    assert score.count == 2
    before = state.masks
    params, state, kept = run(update, params, state._replace(count=jnp.int32(7)), 3)
    jax.effects_barrier()
    assert (score.count, kept) == (3, [10] * 3)
    assert not all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (before, state.masks)), strict=True))


def test_replicates_catch_up_each_at_its_own_count():
    tx, _ = make({1: 0.5, 3: jprune.Keep(5)})
    stack = lambda leaf: jnp.stack([leaf] * 4)
    params, state = jax.tree.map(stack, PARAMS), jax.vmap(tx.init)(jax.tree.map(stack, PARAMS))
    state = state._replace(count=jnp.array([0, 1, 2, 30], jnp.int32))
    update = jax.jit(jax.vmap(lambda p, s: tx.update(p, s, p)[1]))
    kept = []
    for _ in range(3):
        state = update(params, state)
        kept.append(np.sum([mask.sum(axis=(1, 2)) for mask in jax.tree.leaves(state.masks)], axis=0).tolist())
    assert kept == [[20, 10, 10, 5], [10, 10, 5, 5], [10, 5, 5, 5]]


def test_a_step_that_apply_if_finite_rejects_is_applied_by_the_next_accepted_one():
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.1), make({1: 0.5})[0]), 5)
    params, state, kept = PARAMS, tx.init(PARAMS), []
    for slope in (0.0, jnp.nan, jnp.nan, 0.0):
        grads = jax.tree.map(lambda leaf, slope=slope: jnp.full_like(leaf, slope), params)
        updates, state = jax.jit(tx.update)(grads, state, params)
        params = optax.apply_updates(params, updates)
        kept.append(sum(int(mask.sum()) for mask in jax.tree.leaves(jprune.masks_of(state))))
    assert kept == [20, 20, 20, 10]


@pytest.mark.parametrize("regrow", [None, jprune.Regrow(jprune.magnitude(), 0.0)], ids=["prune", "regrow"])
def test_a_state_that_an_earlier_version_saved_can_be_resumed(regrow):
    tx, update = make({0: 0.5, 3: 0.75}, regrow=regrow)
    params, state, _ = run(update, PARAMS, tx.init(PARAMS), 1)
    old = PruneState(state.count, state.masks, state.key)  # three fields, as they were
    with pytest.warns(UserWarning, match="saved by an earlier version and has no `applied`; .* Add it before a loop"):
        _, state, kept = run(update, params, old, 4)
    assert kept == [10, 10, 5, 5]
    assert state.applied.dtype == jnp.uint32
    # In a loop, with what the warning says.
    old = optax.tree_utils.tree_set(old, applied=jnp.zeros([], jnp.uint32))
    step = lambda carry, _: (tx.update(carry[0], carry[1], carry[0]), None)
    (_, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=3))((params, old))
    assert sum(int(mask.sum()) for mask in jax.tree.leaves(state.masks)) == 5


def test_a_target_lowered_at_a_resume_is_named_outside_jit_and_by_the_check():
    _, update = make({0: 0.9})
    params, state, kept = run(update, PARAMS, make({0: 0.9})[0].init(PARAMS), 1)
    assert kept == [2]
    lowered, _ = make({0: 0.5})
    with pytest.warns(UserWarning, match="keeps 10 weights from step 0 on, but only 2 are left.* do not come back"):
        _, state = lowered.update(params, state, params)
    lowered.update(params, state, params)  # the entry is applied, and nothing is said again
    with pytest.warns(UserWarning, match=r"2 of 20 prunable weights are kept \(sparsity 0\.9\), fewer than the 10"):
        jprune.check_pruned(params, state, sparsity=0.5)
    jprune.check_pruned(params, state, keep=3)  # two layers: as much as rounding explains


def test_a_selection_changed_at_a_resume_is_used_from_the_next_entry_on():
    _, update = make({0: 0.5})
    params, state, _ = run(update, PARAMS, make({0: 0.5})[0].init(PARAMS), 1)
    _, update = make({0: 0.5, 2: 0.75}, selection=jprune.layer_masks)
    before = [int(mask.sum()) for mask in jax.tree.leaves(state.masks)]
    _, state, kept = run(update, params, state, 2)
    assert (before, kept) == ([2, 8], [10, 4])
    # A quarter of each layer would be 3 and 2; pruned weights of the first one stay pruned.
    assert [int(mask.sum()) for mask in jax.tree.leaves(state.masks)] == [2, 2]


def test_masks_that_bring_weights_back_are_pruned_to_the_amount_in_force():
    tx, update = make({0: 0.5})
    _, state, _ = run(update, PARAMS, tx.init(PARAMS), 2)
    same = jprune.with_masks(state, state.masks)
    assert int(same.applied) == int(state.applied) != 0
    dense = jprune.with_masks(state, jax.tree.map(jnp.ones_like, state.masks))
    assert int(dense.applied) == 0
    assert run(update, PARAMS, dense, 1)[2] == [10]
    # Two replicates, of which the second gets its weights back.
    both = jax.tree.map(lambda leaf: jnp.stack([leaf] * 2), state)
    masks = jax.tree.map(lambda mask: mask.at[1].set(True), both.masks)
    assert (jprune.with_masks(both, masks).applied != 0).tolist() == [True, False]


def test_loaded_masks_go_on_to_a_higher_sparsity():
    tx, update = make({0: 0.8})
    masks = jprune.global_masks(jprune.magnitude()(PARAMS), sparsity=0.5)
    state = jprune.with_masks(tx.init(PARAMS), masks)._replace(count=jnp.int32(100))
    assert run(update, PARAMS, state, 2)[2] == [4, 4]


def test_a_layer_that_a_late_entry_empties_is_named():
    tx, _ = make({3: 0.7})
    state = tx.init(PARAMS)._replace(count=jnp.int32(7))
    params = {"a": {"kernel": PARAMS["a"]["kernel"] / 100}, "b": PARAMS["b"]}
    with pytest.warns(UserWarning, match="no weight is kept in 'a/kernel'"):
        _, state = tx.update(params, state, params)
    tx.update(params, state, params)  # nothing is due, and nothing is said again
