"""Any tree of arrays: containers of every library, None, integers and half precision among the leaves."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import FrozenDict

import jprune
from jprune.trees import flatten
from tests.pruning.steps import by_rank

pytestmark = pytest.mark.optax_promotes

FIRST = jnp.array([[0.9, -0.2, 0.4], [0.1, -0.7, 0.3]])
SECOND = jnp.array([[0.5, -0.05], [0.25, 1.1], [-0.6, 0.15]])


class Layer(NamedTuple):
    kernel: Any
    bias: Any


class Net(nnx.Module):
    def __init__(self):
        self.first = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        self.second = nnx.Linear(3, 2, use_bias=False, rngs=nnx.Rngs(0))
        self.first.kernel[...] = FIRST
        self.second.kernel[...] = SECOND


class Perceptron(eqx.Module):
    first: eqx.nn.Linear
    second: eqx.nn.Linear
    name: str = eqx.field(static=True)

    def __init__(self):
        self.first = eqx.nn.Linear(3, 2, key=jax.random.key(0))
        self.second = eqx.nn.Linear(2, 3, use_bias=False, key=jax.random.key(1))
        self.name = "perceptron"
        self.first = eqx.tree_at(lambda layer: layer.weight, self.first, FIRST)
        self.second = eqx.tree_at(lambda layer: layer.weight, self.second, SECOND)


TREES = {
    "dict": {"first": {"kernel": FIRST, "bias": jnp.ones(3)}, "second": {"kernel": SECOND}},
    "linen variables": {"params": {"first": {"kernel": FIRST, "bias": jnp.ones(3)}, "second": {"kernel": SECOND}}},
    "FrozenDict": FrozenDict({"first": {"kernel": FIRST, "bias": jnp.ones(3)}, "second": {"kernel": SECOND}}),
    "tuple": ({"kernel": FIRST}, {"kernel": SECOND, "bias": jnp.ones(2)}),
    "list": [{"kernel": FIRST}, {"kernel": SECOND, "bias": jnp.ones(2)}],
    "NamedTuple": Layer(Layer(FIRST, jnp.ones(3)), {"kernel": SECOND}),
    "None and integers": {"a": {"kernel": FIRST, "bias": None}, "b": {"kernel": SECOND, "steps": jnp.arange(3)}},
    "NNX State": nnx.state(Net(), nnx.Param),
    "NNX pure dict": nnx.to_pure_dict(nnx.state(Net(), nnx.Param)),
    "Equinox module": eqx.filter(Perceptron(), eqx.is_inexact_array),
    "half precision": {
        "a": {"kernel": FIRST.astype(jnp.bfloat16), "bias": jnp.ones(3, jnp.float16)},
        "b": {"kernel": SECOND.astype(jnp.float16), "bias": jnp.ones(2, jnp.bfloat16)},
    },
}


def ones(params):
    return jax.tree.map(jnp.ones_like, params)


SLOW = {"linen variables", "list", "NNX pure dict"}  # other dicts and sequences


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TREES]
)
@pytest.mark.quick(4)
def test_masks_have_the_tree_of_the_parameters_and_hold(name):
    params = TREES[name]
    tx = optax.chain(optax.adam(0.01), jprune.prune(jprune.gradient(), {1: 0.5}, selection=by_rank))
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(ones(params), state, params, grad=ones(params))
        params = optax.apply_updates(params, updates)
        assert jax.tree.structure(params) == jax.tree.structure(TREES[name])
    jprune.check_pruned(params, state)
    masks = jprune.masks_of(state)
    assert jprune.sparsity(masks) == 0.5
    paths, before, _ = flatten(TREES[name])
    assert flatten(masks)[0] == paths
    # The first step moves every weight by 0.01 towards less; half of 12 is cut at the step after.
    expected = [[[1, 0, 1], [0, 1, 0]], [[1, 0], [0, 1], [1, 0]]]
    prunable = [
        (m, w, v) for m, w, v in zip(flatten(masks)[1], flatten(params)[1], before, strict=True) if m is not None
    ]
    assert len(prunable) == 2
    for (mask, weight, first), right in zip(prunable, expected, strict=True):
        np.testing.assert_array_equal(mask, np.array(right, bool))
        np.testing.assert_array_equal(np.asarray(weight) != 0, mask)
        assert weight.dtype == first.dtype
    for leaf, path in zip(flatten(masks)[1], paths, strict=True):
        assert (leaf is not None) == path.endswith(("kernel", "weight"))


def test_a_single_array_is_a_tree():
    params = jnp.array([3.0, -1.0, 2.0])
    tx = optax.chain(
        optax.sgd(0.1), jprune.prune(jprune.magnitude(), {0: jprune.Keep(1)}, where=lambda path, leaf: True)
    )
    updates, state = tx.update(params, tx.init(params), params)
    np.testing.assert_array_equal(jprune.masks_of(state), [True, False, False])
    np.testing.assert_allclose(optax.apply_updates(params, updates), [2.7, 0, 0], rtol=1e-6)


def test_leaves_without_a_mask_get_their_update_as_it_is():
    params = {"kernel": FIRST, "bias": jnp.ones(3), "frozen": None, "steps": jnp.arange(3)}
    tx = jprune.prune(jprune.magnitude(), {0: 0.5}, selection=by_rank)
    updates = {"kernel": FIRST, "bias": jnp.full(3, 2.0), "frozen": None, "steps": jnp.ones(3, jnp.int32)}
    kept, _ = tx.update(updates, tx.init(params), params)
    assert kept["bias"] is updates["bias"]
    assert kept["steps"] is updates["steps"]
    assert kept["frozen"] is None


def test_an_equinox_model_is_trained_with_its_static_half_left_out():
    model = Perceptron()
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9), jprune.prune(jprune.gradient(), {0: jprune.Keep(3)}, selection=by_rank)
    )
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(model, state, x):
        loss = lambda model: jnp.sum(jax.vmap(lambda x: model.second(model.first(x)))(x) ** 2)
        grads = eqx.filter_grad(loss)(model)
        params = eqx.filter(model, eqx.is_inexact_array)
        updates, state = tx.update(grads, state, params, grad=grads)
        return eqx.apply_updates(model, updates), state

    for _ in range(2):
        model, state = step(model, state, jnp.ones((4, 3)))
    assert int((model.first.weight != 0).sum() + (model.second.weight != 0).sum()) == 3
    jprune.check_pruned(eqx.filter(model, eqx.is_inexact_array), state)


def test_an_equinox_model_with_functions_among_its_leaves_needs_no_filter():
    model = eqx.nn.MLP(2, 3, width_size=4, depth=1, key=jax.random.key(0))
    assert jprune.prunable(model).kernels == ("layers/0/weight", "layers/1/weight")
    masks = jprune.global_masks(jprune.magnitude()(model), keep=5)
    assert jprune.cost_table(model, masks).loc["total", "nonzeros"] == 5 + 4 + 3
