"""Public functions give the same results with and without jit and on a device, and a training step is traced once."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune

PARAMS = {"a": {"kernel": jnp.array([[4.0, -1.0], [2.0, 3.0]])}, "b": {"kernel": jnp.array([[0.5, -6.0]])}}


class Variants(chex.TestCase):
    """The sizes of the weights are 4, 1, 2, 3 and 0.5, 6; the expected masks are by hand."""

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_global_masks_of_magnitudes(self):
        select = self.variant(lambda params: jprune.global_masks(jprune.magnitude()(params), keep=3))
        expected = {"a": {"kernel": np.array([[1, 0], [0, 1]], bool)}, "b": {"kernel": np.array([[0, 1]], bool)}}
        chex.assert_trees_all_equal(select(PARAMS), expected)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_layer_masks_of_magnitudes(self):
        select = self.variant(lambda params: jprune.layer_masks(jprune.magnitude()(params), sparsity=0.5))
        expected = {"a": {"kernel": np.array([[1, 0], [0, 1]], bool)}, "b": {"kernel": np.array([[0, 1]], bool)}}
        chex.assert_trees_all_equal(select(PARAMS), expected)

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_jumpstart_penalty_and_gradient(self):
        # Unit 0: max 2, min -3, no slack. Unit 1: max -0.5, min -0.5, slack .5 (1.5) + .5 (0.5) = 1; the mean is .5.
        # The two examples tie for both extremes of unit 1; of its slope -.25 and .25 nothing is left.
        z = jnp.array([[2.0, -0.5], [-3.0, -0.5]])
        penalty = self.variant(jax.value_and_grad(lambda z: jprune.jumpstart_penalty([z], mode="unit")))
        chex.assert_trees_all_close(penalty(z), (jnp.float32(0.5), jnp.zeros((2, 2))))

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_unit_status(self):
        status = self.variant(lambda z: jprune.unit_status([z]))
        z = jnp.array([[-1.0, 0.5, -2.0], [0.0, 1.0, 3.0]])
        chex.assert_trees_all_equal(status(z), [jnp.array([-1, 0, 1], jnp.int8)])

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_nm_masks(self):
        # The larger of each two neighbors along the inputs, which are the rows.
        kernel = jnp.array([[4.0, 1.0], [2.0, 3.0], [0.0, -5.0], [0.0, -6.0]])
        select = self.variant(lambda scores: jprune.nm_masks(scores, n=1, m=2))
        chex.assert_trees_all_equal(select(kernel), jnp.array([[1, 0], [0, 1], [1, 1], [0, 0]], bool))

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_masked_parameters_and_their_straight_through_gradient(self):
        masks = {"a": {"kernel": jnp.array([[True, False], [False, True]])}, "b": {"kernel": None}}
        masked = {"a": {"kernel": jnp.array([[4.0, 0.0], [0.0, 3.0]])}, "b": PARAMS["b"]}
        chex.assert_trees_all_equal(self.variant(jprune.apply_masks)(PARAMS, masks), masked)

        def squares(params):
            return sum(jnp.sum(w**2) for w in jax.tree.leaves(jprune.straight_through(params, masks)))

        # 16 + 9 + 0.25 + 36; the gradient is twice the masked weights, also at weights that are masked.
        value, gradient = self.variant(jax.value_and_grad(squares))(PARAMS)
        chex.assert_trees_all_close((value, gradient), (jnp.float32(61.25), jax.tree.map(lambda w: 2 * w, masked)))

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_point_status(self):
        status = self.variant(lambda z: jprune.jumpstart.point_status([z]))
        z = jnp.array([[-1.0, 0.0], [0.5, 2.0], [-1.0, 2.0]])
        chex.assert_trees_all_equal(status(z), [jnp.array([-1, 0, 1], jnp.int8)])

    @chex.variants(with_jit=True, without_jit=True, with_device=True, without_device=True)
    def test_confusion_counts(self):
        counts = self.variant(lambda labels, predictions: jprune.recall.counts(labels, predictions, 2))
        chex.assert_trees_all_equal(
            counts(jnp.array([0, 0, 1]), jnp.array([[0, 1, 1]])), jnp.array([[[1, 1], [0, 1]]], jnp.int32)
        )


def test_one_program_selects_for_every_number_of_weights():
    chex.clear_trace_counter()
    scores = jnp.array([4.0, 1.0, 2.0, 3.0])
    select = jax.jit(chex.assert_max_traces(lambda keep: jprune.global_masks(scores, keep=keep), n=1))
    kept = [np.flatnonzero(select(jnp.int32(keep))).tolist() for keep in range(5)]
    assert kept == [[], [0], [0, 3], [0, 2, 3], [0, 1, 2, 3]]


def test_a_scheduled_penalty_is_traced_once():
    # For the inputs 1 and 3 and a weight above 1/3, only the smallest preactivation, w, has a slack: (1 + w) / 2.
    chex.clear_trace_counter()
    schedule = optax.linear_schedule(0.0, 1.0, transition_steps=2)
    tx = optax.chain(jprune.add_jumpstart(lambda w, x: [x @ w], schedule, mode="unit"), optax.sgd(1.0))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(weight, state):
        updates, state = tx.update(jnp.zeros_like(weight), state, weight, batch=jnp.array([[1.0], [3.0]]))
        return optax.apply_updates(weight, updates), state

    weight, state = jnp.array([[2.0]]), tx.init(jnp.array([[2.0]]))
    weights = []
    for _ in range(3):
        weight, state = step(weight, state)
        weights.append(float(weight[0, 0]))
    assert weights == [2.0, 1.75, 1.25]


def wrapped(scores, **options):
    return jprune.global_masks(scores, **options)


@pytest.mark.optax_promotes
@pytest.mark.parametrize(
    ("selection", "kept"),
    [
        pytest.param(jprune.global_masks, 4, id="named"),  # 4.5, rounded half to even
        pytest.param(wrapped, 4, id="wrapped"),
        pytest.param(functools.partial(jprune.layer_masks, min_keep=1), 3 + 2, id="partial"),  # 3 and 1.5
    ],
)
def test_a_step_is_traced_once_for_the_whole_schedule(selection, kept):
    chex.clear_trace_counter()
    tx = optax.chain(optax.sgd(0.1), jprune.prune(jprune.magnitude(), {1: 0.25, 3: 0.5}, selection=selection))

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(params, state):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, params)
        return optax.apply_updates(params, updates), state

    params, state = PARAMS, tx.init(PARAMS)
    nonzeros = []
    for _ in range(5):
        params, state = step(params, state)
        nonzeros.append(sum(int((w != 0).sum()) for w in jax.tree.leaves(params)))
    chex.assert_tree_all_finite(params)
    chex.assert_trees_all_equal_shapes_and_dtypes(params, PARAMS)
    assert nonzeros == [6, kept, kept, 3, 3]
