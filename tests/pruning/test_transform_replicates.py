"""Replicates: prune under vmap, nested vmap and scan is right, and its selection runs only where it is due."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from tests.pruning.steps import by_rank, largest, slope

pytestmark = pytest.mark.optax_promotes

CUBIC = jprune.cubic(0.8, begin=1, end=6, every=2)


def make(selection=jprune.global_masks):
    return optax.chain(optax.sgd(0.05, momentum=0.9), jprune.prune(jprune.gradient(), CUBIC, selection=selection))


def step(tx, params, state):
    grad = slope(params)
    updates, state = tx.update(grad, state, params, grad=grad)
    return optax.apply_updates(params, updates), state


def weights(*replicates):
    return {"kernel": jax.random.normal(jax.random.key(1), (*replicates, 5, 8)), "bias": jnp.ones((*replicates, 8))}


def alone(params, steps):
    """The masks and weights of one replicate, with numpy's sort for the selection."""
    kernel, velocity, alive = np.asarray(params["kernel"]), np.zeros((5, 8), np.float32), np.ones((5, 8), bool)
    for s in range(steps):
        grad = np.asarray(slope({"kernel": jnp.asarray(kernel)})["kernel"])
        if s in CUBIC:
            (alive,) = largest([np.abs(kernel * grad)], round(40 * (1 - CUBIC[s])), [alive])
        velocity = grad + np.float32(0.9) * velocity
        kernel = np.where(alive, kernel - np.float32(0.05) * velocity, 0)
    return alive, kernel


def loops(compiled):
    """The number of loops in the entry of a compiled program, and in the bodies of those loops."""
    blocks = {}
    for text in re.split(r"\n\n", compiled.as_text()):
        if head := re.match(r"\s*(ENTRY )?%?([\w.\-]+) ", text):
            blocks["ENTRY" if head[1] else head[2]] = re.findall(r" while\(.*body=%?([\w.\-]+)", text)
    return len(blocks["ENTRY"]), sum(len(blocks[body]) for body in blocks["ENTRY"])


def test_eight_replicates_each_follow_the_schedule_and_select_in_one_loop():
    tx, params = make(), weights(8)
    state = jax.vmap(tx.init)(params)
    update = jax.jit(jax.vmap(functools.partial(step, tx))).lower(params, state).compile()
    initial = params
    for _ in range(8):
        params, state = update(params, state)
    masks = jprune.masks_of(state)["kernel"]
    for r in range(8):
        expected, kernel = alone(jax.tree.map(lambda x, r=r: x[r], initial), 8)
        np.testing.assert_array_equal(masks[r], expected)
        np.testing.assert_allclose(params["kernel"][r], kernel, rtol=1e-5, atol=1e-6)
    assert loops(update)[0] == 1  # runs once where a selection is due; the search for the threshold is within it
    jprune.check_pruned(params, state)


@pytest.mark.slow
def test_a_nested_vmap_inside_a_scan_selects_in_one_loop_too():
    tx, params = make(by_rank), weights(2, 3)
    state = jax.vmap(jax.vmap(tx.init))(params)

    @jax.jit
    def run(params, state):
        one = jax.vmap(jax.vmap(functools.partial(step, tx)))
        return jax.lax.scan(lambda carry, _: (one(*carry), None), (params, state), length=8)[0]

    compiled = run.lower(params, state).compile()
    after, state = compiled(params, state)
    for i, j in np.ndindex(2, 3):
        expected, _ = alone(jax.tree.map(lambda x, i=i, j=j: x[i, j], params), 8)
        np.testing.assert_array_equal(jprune.masks_of(state)["kernel"][i, j], expected)
    jprune.check_pruned(after, state)
    assert loops(compiled) == (1, 1)


@pytest.mark.parametrize(
    "select", [jprune.global_masks, by_rank], ids=["one table of counts", "a branch for each entry"]
)
def test_replicates_at_different_steps_select_at_different_times(select):
    tx = jprune.prune(jprune.magnitude(), {1: 0.5, 3: jprune.Keep(5)}, selection=select)
    params = {"kernel": weights(4)["kernel"]}
    state = jax.vmap(tx.init)(params)
    state = state._replace(count=jnp.array([0, 1, 2, 3], jnp.int32))
    update = jax.jit(jax.vmap(lambda p, s: tx.update(p, s, p)[1]))
    kept = []
    for _ in range(4):
        state = update(params, state)
        kept.append(state.masks["kernel"].sum(axis=(1, 2)).tolist())
    assert kept == [[40, 20, 20, 5], [20, 20, 5, 5], [20, 5, 5, 5], [5, 5, 5, 5]]
    (expected,) = largest([np.abs(params["kernel"][1])], 5)
    np.testing.assert_array_equal(state.masks["kernel"][1], expected)


@pytest.mark.slow
def test_axes_that_are_not_mapped_are_not_copied_into_every_replicate():
    """Weights shared by the replicates, a gradient for each: their masks differ."""
    tx = jprune.prune(jprune.gradient(), {0: jprune.Keep(6)}, selection=by_rank)
    params = {"kernel": weights()["kernel"]}
    grads = {"kernel": weights(3)["kernel"]}
    state = tx.init(params)
    masks = jax.vmap(lambda grad: tx.update(grad, state, params, grad=grad)[1].masks["kernel"])(grads)
    for r in range(3):
        np.testing.assert_array_equal(masks[r], largest([np.abs(params["kernel"] * grads["kernel"][r])], 6)[0])


def test_a_score_may_close_over_what_differs_between_replicates():
    params = {"kernel": weights()["kernel"]}
    powers = weights(3)["kernel"]

    def masks(power):
        score = lambda params, grad, batch, key: {"kernel": params["kernel"] * power}
        tx = jprune.prune(score, {0: jprune.Keep(6)}, selection=by_rank)
        return tx.update(params, tx.init(params), params)[1].masks["kernel"]

    found = jax.jit(jax.vmap(masks))(powers)
    for r in range(3):
        np.testing.assert_array_equal(found[r], largest([params["kernel"] * powers[r]], 6)[0])


def test_every_replicate_draws_with_its_own_key():
    keys = jax.random.split(jax.random.key(7), 3)
    params = {"kernel": jnp.ones((5, 8))}

    def made_inside(key):
        tx = jprune.prune(jprune.random(), {0: jprune.Keep(10)}, selection=by_rank, key=key)
        return tx.update(params, tx.init(params), params)[1].masks["kernel"]

    tx = jprune.prune(jprune.random(), {0: jprune.Keep(10)}, selection=by_rank)
    handed = jax.vmap(lambda key: tx.update(params, tx.init(params), params, key=key)[1].masks["kernel"])(keys)
    made = jax.vmap(made_inside)(keys)
    for r in range(3):
        draws = jprune.random()(params, key=jax.random.fold_in(keys[r], 0))["kernel"]
        np.testing.assert_array_equal(made[r], largest([draws], 10)[0])
    np.testing.assert_array_equal(made, handed)
    assert not jnp.array_equal(made[0], made[1])


@pytest.mark.slow
def test_no_gradient_flows_through_a_selection_so_a_step_can_be_differentiated():
    tx = optax.chain(optax.sgd(0.1), jprune.prune(jprune.magnitude(), {0: 0.5}, selection=by_rank))
    params = {"kernel": jnp.array([[1.0, -2.0, 3.0, 0.5]])}
    state = tx.init(params)

    def after(scale):
        updates, _ = tx.update({"kernel": scale * params["kernel"]}, state, params)
        return jnp.sum(optax.apply_updates(params, updates)["kernel"])

    # Kept are -2 and 3: d/dscale of sum(w - 0.1 scale w) over them.
    np.testing.assert_allclose(jax.grad(after)(1.0), -0.1 * (3 - 2), rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(after))(jnp.array([1.0, 2.0])), [-0.1, -0.1], rtol=1e-6)
