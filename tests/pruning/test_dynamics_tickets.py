"""Lottery tickets: rewinding restores the bits of weights and optimizer state, and the masks are kept."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune.pruning.state import PruneState
from tests.pruning.steps import by_rank, largest, slope

pytestmark = pytest.mark.optax_promotes

TX = optax.chain(optax.adam(0.05), jprune.keep_zeros())


def initial():
    kernel = jax.random.normal(jax.random.key(4), (6, 10))
    return {"dense": {"kernel": kernel, "bias": jnp.zeros(10)}, "zero": {"kernel": jnp.zeros((2, 5))}}


@functools.partial(jax.jit, donate_argnums=(0, 1))
def update(params, state):
    """The step donates its arguments, as a real training step does: the stored weights must be a copy."""
    updates, state = TX.update(slope(params), state, params)
    return optax.apply_updates(params, updates), state


def train(params, state, begin, end):
    for _ in range(begin, end):
        params, state = update(params, state)
    return params, state


def dense_state(params):
    return jprune.with_masks(
        TX.init(params), {name: {"kernel": jnp.ones_like(leaf["kernel"], bool)} for name, leaf in params.items()}
    )


def without_masks(state):
    return jax.tree.map(
        lambda node: node._replace(masks=None) if isinstance(node, PruneState) else node,
        state,
        is_leaf=lambda node: isinstance(node, PruneState),
    )


def same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


@functools.cache
def tickets(rewind):
    sparsities = jprune.geometric(0.2, every=1, times=3).values()
    found = jprune.lottery_ticket(train, TX, initial(), sparsities, steps=7, rewind=rewind, selection=by_rank)
    return list(found)


@pytest.mark.parametrize("rewind", [0, 3])
def test_every_level_starts_from_the_very_weights_and_optimizer_state_of_the_rewinding_step(rewind):
    params, state = train(initial(), dense_state(initial()), 0, rewind)
    for ticket in tickets(rewind):
        same_bits(ticket.start[0], jprune.apply_masks(params, ticket.masks))
        same_bits(without_masks(ticket.start[1]), without_masks(state))
        same_bits(jprune.masks_of(ticket.start[1]), ticket.masks)
        assert int(ticket.start[1][-1].count) == rewind


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
@pytest.mark.parametrize("rewind", [0, 3])
def test_every_level_equals_training_from_its_start_with_fixed_masks(rewind):
    for ticket in tickets(rewind):
        again = train(*jax.tree.map(jnp.copy, ticket.start), rewind, 7)
        same_bits(again, ticket.end)
        same_bits(jprune.masks_of(ticket.end[1]), ticket.masks)
        jprune.check_pruned(*ticket.end)


def test_masks_are_the_largest_trained_weights_of_the_level_before():
    found = tickets(3)
    assert [ticket.level for ticket in found] == [0, 1, 2, 3]
    assert jprune.sparsity(found[0].masks) == 0.0  # what is 0 at init is not taken for pruned
    alive = [np.ones((6, 10), bool), np.ones((2, 5), bool)]
    for before, ticket, remains in zip(found, found[1:], (0.8, 0.64, 0.512), strict=False):
        trained = [np.abs(before.end[0][name]["kernel"]) for name in ("dense", "zero")]
        alive = largest(trained, round(70 * remains), alive)
        for mask, name in zip(alive, ("dense", "zero"), strict=True):
            np.testing.assert_array_equal(ticket.masks[name]["kernel"], mask)


def test_levels_are_computed_as_they_are_asked_for():
    calls = []

    def counting(params, state, begin, end):
        calls.append((begin, end))
        return params, state

    found = jprune.lottery_ticket(counting, TX, initial(), [0.5, 0.75], steps=5, rewind=2, selection=by_rank)
    assert calls == []
    next(found)
    assert calls == [(0, 2), (2, 5)]
    next(found)
    assert calls == [(0, 2), (2, 5), (2, 5)]


def test_scores_get_the_gradient_at_the_trained_weights_and_a_key_for_each_level():
    still = lambda params, state, begin, end: (params, state)
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    tx = jprune.keep_zeros()
    grad = lambda params: {"kernel": jnp.array([[9.0, 4.0, 3.0, 1.0]])}  # |w g| = 9, 8, 9, 4
    arguments = {"steps": 1, "selection": by_rank}
    _, one = jprune.lottery_ticket(still, tx, params, [jprune.Keep(2)], score=jprune.gradient(), grad=grad, **arguments)
    np.testing.assert_array_equal(one.masks["kernel"], [[True, False, True, False]])
    key = jax.random.key(0)
    _, one, two = jprune.lottery_ticket(
        still, tx, params, [jprune.Keep(3), jprune.Keep(1)], score=jprune.random(), key=key, **arguments
    )
    alive = [np.ones((1, 4), bool)]
    for level, ticket, keep in ((1, one, 3), (2, two, 1)):
        draws = jprune.random()(params, key=jax.random.fold_in(key, level))["kernel"]
        alive = largest([draws], keep, alive)
        np.testing.assert_array_equal(ticket.masks["kernel"], alive[0])


def test_a_pruned_weight_stays_pruned_however_it_scores_and_every_leaf_keeps_its_floor():
    still = lambda params, state, begin, end: (params, state)
    params = {"a": {"kernel": jnp.array([[4.0, 3.0, 2.0, 1.0]])}, "b": {"kernel": jnp.array([[9.0, 8.0]])}}
    levels = iter([jnp.array([[4.0, 3.0, 2.0, 1.0]]), jnp.array([[1.0, 2.0, 3.0, 7.0]])])

    def score(params, grad, batch, key):
        return {"a": {"kernel": next(levels)}, "b": {"kernel": jnp.array([[9.0, 8.0]])}}

    levels_of = functools.partial(
        jprune.lottery_ticket,
        still,
        jprune.keep_zeros(),
        params,
        [jprune.Keep(5), jprune.Keep(2)],
        steps=1,
        score=score,
    )
    _, one, two = levels_of(min_keep=1)
    assert [one.masks[name]["kernel"].tolist() for name in "ab"] == [[[True, True, True, False]], [[True, True]]]
    assert [two.masks[name]["kernel"].tolist() for name in "ab"] == [[[False, False, True, False]], [[True, False]]]


def test_a_score_that_runs_the_model_gets_the_batch_and_all_the_trained_parameters():
    def function(params, grad, batch, key, whole):
        return {"kernel": jnp.abs(params["kernel"]) * whole["bias"] * batch, "bias": None}

    def train(params, state, begin, end):
        return params | {"bias": jnp.array([[1.0, 4.0, 3.0, 2.0]])}, state

    score = jprune.scores.Score(function, "by the bias", needs=("batch", "whole"))
    params, batch = {"kernel": jnp.full((1, 4), -1.0), "bias": jnp.ones((1, 4))}, jnp.array([[1.0, 1.0, 2.0, 1.0]])
    where = lambda path, leaf: path == "kernel"
    call = {"score": score, "steps": 1, "selection": by_rank}
    _, one = jprune.lottery_ticket(train, jprune.keep_zeros(where=where), params, [jprune.Keep(2)], batch=batch, **call)
    np.testing.assert_array_equal(one.masks["kernel"], [[False, True, True, False]])  # of 1, 4, 6, 2
    with pytest.raises(ValueError, match="by the bias needs batch"):
        list(jprune.lottery_ticket(train, jprune.keep_zeros(where=where), params, [jprune.Keep(2)], **call))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rewind": 7}, "rewind is 7; it must be from 0 to 6"),
        ({"rewind": -1}, "rewind is -1; it must be from 0 to 6"),
        ({"score": jprune.gradient()}, "the score gradient needs grad: pass grad="),
        ({"score": jprune.random()}, "the score random needs key: pass key="),
        ({"sparsities": [0.5, 0.2]}, "must not rise"),
        ({"sparsities": [0.5, 1.5]}, r"sparsities\[1\]=1\.5"),
        ({"sparsities": []}, "empty"),
        ({"tx": optax.sgd(0.1)}, "no prune or keep_zeros transformation"),
        ({"tx": optax.chain(jprune.keep_zeros(), optax.sgd(0.1))}, "not the last of its chain"),
    ],
)
def test_bad_arguments_are_refused_before_any_training(arguments, message):
    def never(*_):
        raise AssertionError("it trained")

    call = {"tx": TX, "params": initial(), "sparsities": [0.5], "steps": 7} | arguments
    with pytest.raises(ValueError, match=message):
        jprune.lottery_ticket(never, **call)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"score": jprune.magnitude}, "score=magnitude: .* it must be a score, such as jprune.magnitude"),
        ({"selection": 3}, "selection is an int; it must be a function from scores to masks"),
        ({"sparsities": 0.5}, "sparsities=0.5 is a float; it must be a list with one sparsity for each level"),
        ({"sparsities": jprune.geometric(0.2, every=1, times=2)}, "is a dict; it must be a list .*values"),
        ({"sparsities": [90]}, r"sparsities\[0\]=90 is an integer; .* for 90% write 0.9"),
        ({"rewind": 0.5}, "rewind is 0.5; it must be an integer"),
    ],
)
def test_arguments_of_another_type_are_refused_before_any_training(arguments, message):
    def never(*_):
        raise AssertionError("it trained")

    call = {"tx": TX, "params": initial(), "sparsities": [0.5], "steps": 7} | arguments
    with pytest.raises(TypeError, match=message):
        inspect.unwrap(jprune.lottery_ticket)(never, **call)  # without the type checker of the tests


def test_channels_stay_zero_in_biases_too_or_are_refused_before_any_training():
    """keep_zeros has masks of kernels alone, so the biases of removed channels were trained although masked."""
    params = {"a": {"kernel": jnp.array([[1.0, 3.0]]), "bias": jnp.ones(2)}, "b": {"kernel": jnp.ones((2, 1))}}
    apply = lambda p, x: jnp.tanh(x @ p["a"]["kernel"] + p["a"]["bias"][None]) @ p["b"]["kernel"]
    selection = jprune.structured(jprune.trace_model(apply, params, jnp.ones((1, 1))))

    def tickets(**options):
        tx = optax.chain(optax.sgd(0.1), jprune.keep_zeros(**options))

        def train(params, state, begin, end):
            for _ in range(begin, end):
                updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
                params = optax.apply_updates(params, updates)
            return params, state

        return jprune.lottery_ticket(train, tx, params, [0.5], steps=1, selection=selection)

    with pytest.raises(ValueError, match="selection masks the channels of 'a/bias' too, for which tx has no mask"):
        tickets()
    *_, last = tickets(where=lambda path, leaf: selection.loses_channels(path))
    np.testing.assert_allclose(last.end[0]["a"]["bias"], [0.0, 0.9])
