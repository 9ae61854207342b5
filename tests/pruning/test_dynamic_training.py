"""The one-line forms of RigL and SET are the same programs as their parts."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune.pruning.dynamic_training import rigl, sparse_evolution
from jprune.pruning.dynamics import cosine_fraction, dense_gradient
from jprune.pruning.selection import allocation

PARAMS = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 5)), jnp.float32)}
GRADS = {"kernel": jnp.asarray(np.random.default_rng(1).normal(size=(6, 5)), jnp.float32)}


def trained(tx, steps=5):
    params, state = PARAMS, tx.init(PARAMS)
    update = jax.jit(lambda grads, state, params: tx.update(grads, state, params, grad=grads))
    for _ in range(steps):
        updates, state = update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    jprune.check_pruned(params, state, sparsity=0.8)
    return params, jprune.masks_of(state)


@pytest.mark.slow
def test_rigl_is_prune_with_a_dense_gradient_to_regrow():
    parts = jprune.prune(
        jprune.magnitude(),
        {0: 0.8, 2: 0.8},
        selection=jprune.selection.erk_masks,
        regrow=jprune.Regrow(dense_gradient(), lambda step: 0.0 if step == 0 else cosine_fraction(0.5, 4)(step)),
    )
    wanted = trained(jprune.reset_moments(optax.sgd(0.1, momentum=0.9), parts))
    found = trained(rigl(optax.sgd(0.1, momentum=0.9), 0.8, end=4, every=2, fraction=0.5))
    chex.assert_trees_all_equal(found, wanted)
    # At step 2 the fraction is .25 (1 + cos(pi / 2)), so 2 of the six kept weights go, and the two with the largest
    # gradients come: by hand.
    weight, slope = (np.abs(np.asarray(tree["kernel"])).ravel() for tree in (PARAMS, GRADS))
    survivors = set(np.argsort(-weight)[:4].tolist())
    grown = [i for i in np.argsort(-slope).tolist() if i not in survivors][:2]
    _, second = trained(rigl(optax.sgd(0.0), 0.8, end=4, every=2, fraction=0.5), steps=3)
    assert set(np.flatnonzero(np.asarray(second["kernel"]).ravel()).tolist()) == survivors | set(grown)


def test_a_long_schedule_of_one_sparsity_divides_it_among_the_layers_once(monkeypatch):
    divided = []
    proportional = allocation.proportional
    monkeypatch.setattr(allocation, "proportional", lambda *a: divided.append(a) or proportional(*a))
    tx = rigl(optax.sgd(0.1), 0.8, end=75_000)
    state = tx.init(PARAMS)
    divided.clear()
    jax.make_jaxpr(lambda grads, state: tx.update(grads, state, PARAMS, grad=grads))(GRADS, state)
    assert len(divided) == 2  # to drop and to regrow


SPARSE_TRAINING = {
    "rigl": rigl,
    "sparse_evolution": functools.partial(sparse_evolution, key=jax.random.key(0)),
}


@pytest.mark.parametrize("method", SPARSE_TRAINING.values(), ids=SPARSE_TRAINING)
def test_the_masks_of_step_0_have_the_largest_weights_or_those_put_into_the_state(method):
    """Of the weights 1 to 30, the 6 largest; the largest gradients are those of the smallest weights."""
    tx = method(optax.sgd(0.1), 0.8, end=101, fraction=0.3)
    params = {"kernel": jnp.arange(1.0, 31.0).reshape(6, 5)}
    grad = {"kernel": 1 / params["kernel"]}
    state = tx.init(params)
    drawn = jprune.selection.erk_masks(jprune.random()(params, key=jax.random.key(1)), sparsity=0.8)
    for masks, given in (
        (np.arange(1, 31).reshape(6, 5) > 24, state),
        (drawn["kernel"], jprune.with_masks(state, drawn)),
    ):
        _, after = tx.update(grad, given, params, grad=grad)
        np.testing.assert_array_equal(jprune.masks_of(after)["kernel"], masks)


@pytest.mark.parametrize("method", SPARSE_TRAINING.values(), ids=SPARSE_TRAINING)
@pytest.mark.parametrize(
    "arguments", [{"end": 50}, {"end": 100}, {"end": 9, "every": 9}, {"end": 200, "fraction": 0.0}]
)
def test_arguments_that_never_exchange_a_weight_are_refused(method, arguments):
    with pytest.raises(ValueError, match=r"end=\d+, every=\d+ and this fraction exchange no weight"):
        method(optax.sgd(0.1), 0.8, **arguments)
    method(optax.sgd(0.1), 0.8, end=101)


def test_sparse_evolution_exchanges_random_weights():
    tx = sparse_evolution(optax.sgd(0.1), 0.8, key=jax.random.key(0), end=4, every=2, fraction=0.5)
    masks = [trained(tx, steps)[1]["kernel"] for steps in (1, 2, 3)]
    assert [int(mask.sum()) for mask in masks] == [6, 6, 6]
    np.testing.assert_array_equal(masks[0], masks[1])
    assert (masks[2] != masks[1]).any()
