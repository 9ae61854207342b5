"""Scores with NaN: refused outside jit, and inside jit never a reason to change good masks."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from tests.pruning.steps import by_rank

PARAMS = {"body": {"kernel": jnp.array([[4.0, -1.0], [2.0, 3.0]])}, "head": {"kernel": jnp.array([[5.0, 6.0]])}}
ONES = jax.tree.map(jnp.ones_like, PARAMS)
NAN = {**ONES, "head": {"kernel": jnp.array([[1.0, jnp.nan]])}}
DENSE = jax.tree.map(lambda w: np.ones(w.shape, bool), PARAMS)
HALF = {"body": {"kernel": np.array([[1, 0], [0, 0]], bool)}, "head": {"kernel": np.array([[1, 1]], bool)}}


def still(tx, state, grad, *, jit=True):
    """One update that moves no weight."""
    update = jax.jit(tx.update) if jit else tx.update
    return update(jax.tree.map(jnp.zeros_like, PARAMS), state, PARAMS, grad=grad)[1]


def pruned(schedule, **options):
    return jprune.prune(jprune.gradient(), schedule, selection=by_rank, **options)


def test_outside_jit_the_leaf_and_the_step_are_named():
    tx = pruned({0: 0.5})
    with pytest.raises(
        ValueError, match="scores of the selection at step 0 contain NaN at 'head/kernel', which cannot"
    ):
        still(tx, tx.init(PARAMS), NAN, jit=False)


def test_a_selection_with_nan_leaves_the_masks_and_is_done_by_the_next_update_without():
    tx = pruned({1: 0.5})
    state = still(tx, tx.init(PARAMS), ONES)
    for step in (1, 2):
        state = still(tx, state, NAN)
        chex.assert_trees_all_equal(state.masks, DENSE)
        with pytest.raises(ValueError, match=f"scores of the latest selection contained NaN, last at step {step}, so"):
            jprune.check_pruned(PARAMS, state)
    state = still(tx, state, ONES)
    chex.assert_trees_all_equal(state.masks, HALF)
    jprune.check_pruned(jprune.apply_masks(PARAMS, state.masks), state, sparsity=0.5)
    chex.assert_trees_all_equal(still(tx, state, NAN).masks, HALF)  # nothing is due


def test_the_score_of_a_weight_that_is_pruned_already_may_be_nan():
    tx = pruned({0: 0.5, 1: jprune.Keep(2)})
    state = still(tx, tx.init(PARAMS), ONES)
    state = still(tx, state, {**ONES, "body": {"kernel": jnp.array([[1.0, 1.0], [jnp.nan, 1.0]])}})
    chex.assert_trees_all_equal(state.masks, {**HALF, "body": {"kernel": np.zeros((2, 2), bool)}})


def test_a_weight_that_is_nan_stops_magnitude_pruning_too():
    tx = jprune.prune(jprune.magnitude(), {0: 0.5})
    broken = {**PARAMS, "head": NAN["head"]}
    _, state = jax.jit(tx.update)(ONES, tx.init(broken), broken)
    chex.assert_trees_all_equal(state.masks, DENSE)
    with pytest.raises(ValueError, match="the latest selection contained NaN, last at step 0"):
        jprune.check_pruned(broken, state)


def test_scores_of_regrowth_are_looked_at_where_weights_may_return():
    tx = pruned({0: 0.5, 1: 0.5}, regrow=jprune.Regrow(jprune.scores.dense_gradient(), 0.5))
    state = still(tx, tx.init(PARAMS), ONES)
    after = still(tx, state, {**ONES, "body": {"kernel": jnp.full((2, 2), jnp.nan)}})
    chex.assert_trees_all_equal(after.masks, state.masks)
    with pytest.raises(ValueError, match="the latest selection contained NaN, last at step 1"):
        jprune.check_pruned(jprune.apply_masks(PARAMS, after.masks), after)


@pytest.mark.parametrize("grad", [ONES, NAN])
def test_a_skip_before_a_resume_is_not_blamed_on_an_update_before_the_new_schedule(grad):
    """Nothing is due until step 5, and the scores of regrowth were said to contain NaN."""
    regrow = jprune.Regrow(jprune.scores.dense_gradient(), 0.5)
    tx = pruned({0: 0.5}, regrow=regrow)
    state = still(tx, tx.init(PARAMS), NAN)
    later = pruned({5: 0.5}, regrow=regrow)
    after = still(later, state, grad, jit=False)
    chex.assert_trees_all_equal(after.masks, DENSE)
    assert int(after.applied) == int(state.applied)


def test_each_replicate_is_skipped_by_itself():
    tx = pruned({0: 0.5})
    params = jax.tree.map(lambda w: jnp.stack([w, w]), PARAMS)
    grads = jax.tree.map(lambda a, b: jnp.stack([a, b]), ONES, NAN)
    update = jax.jit(jax.vmap(lambda p, s, g: tx.update(p, s, p, grad=g)[1]))
    state = update(params, jax.vmap(tx.init)(params), grads)
    for replicate, masks in enumerate((HALF, DENSE)):
        chex.assert_trees_all_equal(jax.tree.map(lambda x, r=replicate: x[r], state.masks), masks)
    with pytest.raises(ValueError, match="the latest selection of replicate 1 contained NaN, last at step 0"):
        jprune.check_pruned(params, state)


def test_apply_if_finite_skips_the_update_with_nan():
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.1), pruned({0: 0.5})), 3)
    step = jax.jit(lambda grad, state: tx.update(grad, state, PARAMS, grad=grad)[1])
    state = step(NAN, tx.init(PARAMS))
    jprune.check_pruned(PARAMS, state)
    chex.assert_trees_all_equal(jprune.masks_of(step(ONES, state)), HALF)


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_check_pruned_names_kept_weights_that_are_not_finite(value):
    state = jprune.prune(jprune.magnitude(), {0: 0.5}).init(PARAMS)
    params = {**PARAMS, "body": {"kernel": jnp.array([[1.0, value], [value, 1.0]])}}
    with pytest.raises(ValueError, match="kept weights are NaN or infinite: 2 of 4 in 'body/kernel'"):
        jprune.check_pruned(params, state)


def test_check_pruned_says_that_an_infinite_weight_was_pruned():
    smallest = lambda params, grad=None, batch=None, key=None: jax.tree.map(lambda w: -jnp.abs(w), params)
    tx = optax.chain(optax.sgd(0.1), jprune.prune(smallest, {0: 0.5}))
    params = {"kernel": jnp.array([[1.0, jnp.inf], [2.0, 3.0]])}
    updates, state = tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    with pytest.raises(
        ValueError, match="not 0: 1 of 2 in 'kernel'; some are NaN or infinite, as where training diverg"
    ):
        jprune.check_pruned(optax.apply_updates(params, updates), state)


def test_check_pruned_says_to_be_called_outside_jit():
    state = jprune.prune(jprune.magnitude(), {0: 0.5}).init(PARAMS)
    with pytest.raises(ValueError, match="check_pruned was given traced arrays; call it outside jit"):
        jax.jit(jprune.check_pruned)(PARAMS, state)


def _floats(scores, **_):
    return jax.tree.map(lambda s: (s > 1).astype(jnp.float32), scores)


def _turned(scores, **_):
    return jax.tree.map(lambda s: (s > 1).T, scores)


def _partly(scores, **_):
    return {"body": {"kernel": scores["body"]["kernel"] > 1}}


@pytest.mark.parametrize(
    ("selection", "error", "message"),
    [
        (_floats, TypeError, r"selection=_floats returned float32\[2, 2\] at 'body/kernel'; .* a bool array of shape"),
        (functools.partial(_turned), ValueError, r"selection=_turned returned has shape \(2, 1\) at 'head/kernel'"),
        (_partly, ValueError, "selection=_partly returned has no leaf 'head/kernel', which scores has"),
    ],
)
def test_what_a_selection_of_ones_own_returns_is_checked_at_init(selection, error, message):
    with pytest.raises(error, match=message):
        jprune.prune(jprune.magnitude(), {0: 0.5}, selection=selection).init(PARAMS)


def _mean(params, **_):
    return jax.tree.map(lambda w: jnp.abs(w).mean(), params)


def _integers(params, **_):
    return jax.tree.map(lambda w: w.astype(jnp.int32), params)


def _none(params, **_):
    return {**params, "head": {"kernel": None}}


@pytest.mark.parametrize(
    ("score", "error", "message"),
    [
        (
            _mean,
            ValueError,
            r"what score=_mean returned has shape \(\) at 'body/kernel', where params has shape \(2, 2\)",
        ),
        (_integers, TypeError, r"score=_integers returned int32\[2, 2\] at 'body/kernel'; .* a float array of shape"),
        (_none, TypeError, "score=_none returned None at 'head/kernel'; it must return a tree like its first"),
    ],
)
def test_what_a_score_of_ones_own_returns_is_checked(score, error, message):
    tx = jprune.prune(score, {0: 0.5}, selection=by_rank)
    with pytest.raises(error, match=message):
        jax.eval_shape(tx.update, ONES, tx.init(PARAMS), PARAMS)


def test_what_a_score_object_of_ones_own_returns_is_checked_too():
    params = {"kernel": jnp.array([[3.0, 1.0]]), "bias": jnp.ones(2)}

    def pruned(score):
        tx = jprune.prune(jprune.scores.Score(score, "mine"), {0: 0.5}, selection=by_rank)
        return tx.update(params, tx.init(params), params)[1].masks

    kernel_alone = lambda params, *_: {"kernel": jnp.abs(params["kernel"]).astype(jnp.bfloat16)}
    np.testing.assert_array_equal(pruned(kernel_alone)["kernel"], [[True, False]])
    with pytest.raises(ValueError, match=r"what score=mine returned has shape \(2,\) at 'kernel'"):
        pruned(lambda params, *_: {"kernel": params["kernel"][0]})
    with pytest.raises(TypeError, match=r"score=mine returned int32\[1, 2\] at 'kernel'"):
        pruned(lambda params, *_: {"kernel": params["kernel"].astype(jnp.int32)})


def test_a_skipped_selection_is_no_error_of_a_later_update_in_which_nothing_is_due():
    state = still(pruned({0: 0.5}), pruned({0: 0.5}).init(PARAMS), NAN)
    later = pruned({9: 0.5})  # resumed with a schedule whose first step is still to come
    chex.assert_trees_all_equal(still(later, state, ONES, jit=False).masks, DENSE)
