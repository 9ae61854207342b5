"""Errors of prune and keep_zeros: when they are raised, and their messages."""

import functools
import inspect

import jax
import jax.extend.core
import jax.numpy as jnp
import pytest

import jprune
from jprune.trees import only


@pytest.mark.parametrize(
    ("score", "message"),
    [(jprune.gradient(), "needs grad"), (jprune.undecayed(5e-4), "needs grad"), (jprune.random(), "needs key")],
)
def test_missing_inputs_of_a_score_are_an_error_while_tracing(score, message):
    tx = jprune.prune(score, {1000: 0.5})
    params = {"kernel": jnp.ones((1, 2))}
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(tx.update, params, tx.init(params), params)


@pytest.mark.parametrize("score", [jprune.magnitude, jprune.undecayed, jprune.scores.synflow, lambda params: params])
def test_an_invalid_score_is_refused_before_any_training(score):
    with pytest.raises(TypeError, match=r"argument.*; it must be a score, such as jprune\.magnitude\(\)"):
        jprune.prune(score, {0: 0.5})


def test_names_and_patterns_are_refused_as_score_and_where():
    plain = inspect.unwrap(jprune.prune)  # as users have it, whose types nothing checks
    with pytest.raises(TypeError, match="score='magnitude' is a str; it must be a score, such as"):
        plain("magnitude", {0: 0.5})
    with pytest.raises(TypeError, match=r"where='\^head/' is a str; it must be a predicate"):
        inspect.unwrap(only)({"kernel": jnp.ones((1, 1))}, "^head/")


def test_a_function_with_the_signature_of_a_score_is_accepted():
    params = {"kernel": jnp.array([[1.0, -2.0]])}
    for score in (lambda params, **_: params, lambda params, grad, batch, key: params):
        tx = jprune.prune(score, {0: 0.5})
        assert jprune.masks_of(tx.update(params, tx.init(params), params)[1])["kernel"].tolist() == [[True, False]]


def test_a_grad_without_the_leaf_is_refused_by_name():
    tx = jprune.prune(jprune.gradient(), {0: 0.5})
    params = {"a": {"kernel": jnp.ones((1, 2))}}
    with pytest.raises(ValueError, match="grad has no leaf 'a/kernel'"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, grad={"b": jnp.ones(1)}), params)
    with pytest.raises(ValueError, match=r"grad has shape \(3,\) at 'a/kernel'"):
        jax.eval_shape(lambda p: tx.update(p, tx.init(p), p, grad={"a": {"kernel": jnp.ones(3)}}), params)


@pytest.mark.filterwarnings("ignore:keep_zeros has no zero")
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


@pytest.mark.parametrize("schedule", [jprune.cubic(0.5, begin=0, end=4, every=2), {0: 0.25, 4: 0.5}, {3: 0.5, 5: 0.6}])
@pytest.mark.parametrize(
    "selection",
    [
        jprune.nm_masks,
        functools.partial(jprune.nm_masks, n=2, m=4),
        lambda scores, **options: jprune.nm_masks(jax.tree.map(jnp.square, scores), **options),
    ],
    ids=["function", "partial", "wrapped"],
)
def test_a_gradual_schedule_of_a_fixed_pattern_is_refused_at_init(selection, schedule):
    tx = jprune.prune(jprune.magnitude(), schedule, selection=selection)
    with pytest.raises(
        ValueError, match=r"2:4 keeps 8; pass sparsity=0\.5, .* only sparsity above 0\.0: \{step: 0\.5\}"
    ):
        tx.init({"kernel": jnp.ones((8, 2))})


def test_a_schedule_of_a_fixed_pattern_may_start_with_nothing_pruned():
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(4, 2)}
    tx = jprune.prune(jprune.magnitude(), {0: 0.0, 1: 0.5, 2: 0.5}, selection=jprune.nm_masks)
    state = tx.init(params)
    for kept in (8, 4, 4):
        _, state = tx.update(params, state, params)
        assert int(jprune.masks_of(state)["kernel"].sum()) == kept


def test_bad_schedules_are_refused_before_any_training():
    params = {"kernel": jnp.ones((1, 10))}
    with pytest.raises(ValueError, match=r"schedule\[0\]=1\.5 must be from 0\.0 to 1\.0"):
        jprune.prune(jprune.magnitude(), {0: 1.5})
    with pytest.raises(ValueError, match="keeps 11 weights at step 0; there are only 10"):
        jprune.prune(jprune.magnitude(), {0: jprune.Keep(11)}).init(params)
    with pytest.raises(ValueError, match="more than the 2 at step 0"):
        jprune.prune(jprune.magnitude(), {0: 0.8, 5: 0.5}).init(params)
    # The total falls from 10 to 8, but 'a' would rise from 1 to 5.
    table = {0: {"^a/": 0.9, "^b/": 0.1}, 5: {"^a/": 0.5, "^b/": 0.7}}
    with pytest.raises(ValueError, match=r"keeps 5 weights of 'a/kernel' at step 5, more than the 1 at step 0"):
        jprune.prune(jprune.magnitude(), table, selection=jprune.layer_masks).init({"a": params, "b": params})
    with pytest.raises(ValueError, match="min_keep=3"):
        jprune.prune(jprune.magnitude(), {0: jprune.Keep(2)}, min_keep=3).init(params)


def test_a_where_that_selects_nothing_is_refused_at_init():
    with pytest.raises(ValueError, match="selects no float leaf"):
        jprune.prune(jprune.magnitude(), {0: 0.5}).init({"bias": jnp.ones(3)})
    with pytest.raises(ValueError, match="matches no leaf"):
        jprune.keep_zeros(where=jprune.by_path(include="absent")).init({"kernel": jnp.ones((1, 1))})


def test_a_selection_by_name_is_refused_with_the_functions_to_pass():
    with pytest.raises(TypeError, match=r"selection is a str; .* pass selection=jprune\.global_masks or"):
        inspect.unwrap(jprune.prune)(jprune.magnitude(), {0: 0.5}, selection="layer")


@pytest.mark.parametrize("selection", [jprune.selection.bernoulli_masks, jprune.selection.legacy_signed_masks])
def test_regrowth_with_a_selection_without_an_exact_count_is_refused(selection):
    regrow = jprune.Regrow(jprune.random(), 0.3)
    for given in (selection, functools.partial(selection, min_keep=1)):
        with pytest.raises(ValueError, match=f"{selection.__name__} keeps no exact count"):
            jprune.prune(jprune.random(), {0: 0.5}, selection=given, regrow=regrow, key=jax.random.key(0))


def test_regrowth_with_a_selection_that_ranks_by_absolute_value_is_refused():
    """It would rank the weights that must not be kept, whose score is -inf, first."""
    selection = functools.partial(jprune.layer_masks, magnitude=True)
    with pytest.raises(ValueError, match="which magnitude=True would rank first; leave magnitude=True out"):
        jprune.prune(jprune.magnitude(), {0: 0.5}, selection=selection, regrow=jprune.Regrow(jprune.gradient(), 0.3))
