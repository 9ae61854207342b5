"""Any order of updates, mapped updates and round trips through files, against numpy's stable sort.

Weights and updates are small multiples of 1/4, exact in every dtype used, so that the arithmetic of the
model needs no tolerance and ties are common.
"""

import shutil
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, settings, stateful
from hypothesis import strategies as st

import jprune
from tests.pruning.steps import largest

# Trees of a few weights lose layers, and have leaves of any number of axes; both are said, and are no fault here.
pytestmark = [
    pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning"),
    pytest.mark.filterwarnings("ignore:leaf .* treats it as one layer:UserWarning"),
]
REPLICATES = 2
DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16)
SHAPES = ((), (3,), (2, 3), (1, 2, 2), (0, 2))

arrays = st.tuples(st.sampled_from(SHAPES), st.sampled_from(DTYPES))
passengers = st.sampled_from([None, np.arange(3, dtype=np.int32), np.array(True)])
# A leaf that is an array is pruned; whatever else is in the tree must pass through untouched.
trees = st.recursive(arrays, lambda below: st.lists(below | passengers, min_size=1, max_size=3), max_leaves=4)
sixteenths = st.lists(st.integers(0, 16), min_size=1, max_size=4).map(sorted)


def is_spec(node):
    return isinstance(node, tuple)


class Training(stateful.RuleBasedStateMachine):
    """Replicates of one tree, pruned by magnitude on one schedule, compared with lists of numpy arrays."""

    @stateful.initialize(
        spec=trees.filter(lambda tree: sum(int(np.prod(shape)) for shape, _ in leaves_of(tree)) > 0),
        removed=sixteenths,
        gaps=st.lists(st.integers(0, 2), min_size=4, max_size=4),
        layerwise=st.booleans(),
        min_keep=st.integers(0, 2),
        counts=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def start(self, *, spec, removed, gaps, layerwise, min_keep, counts, seed):
        self.random = np.random.default_rng(seed)
        self.spec, self.shapes = spec, leaves_of(spec)
        self.sizes = [int(np.prod(shape)) for shape, _ in self.shapes]
        total = sum(self.sizes)
        steps = np.cumsum(gaps[: len(removed)]) + np.arange(len(removed))
        fractions = {int(step): part / 16 for step, part in zip(steps, removed, strict=True)}
        if layerwise:
            self.quotas = {
                step: [max(round(n * (1 - part)), min(min_keep, n)) for n in self.sizes]
                for step, part in fractions.items()
            }
            select, table = jprune.layer_masks, fractions
        else:
            min_keep = 0
            self.quotas = {step: round(total * (1 - part)) for step, part in fractions.items()}
            select, table = (
                jprune.global_masks,
                ({step: jprune.Keep(count) for step, count in self.quotas.items()} if counts else fractions),
            )
        self.tx = jprune.prune(
            jprune.magnitude(), table, where=lambda path, leaf: True, selection=select, min_keep=min_keep
        )
        self.weights = [self.draw(16) for _ in range(REPLICATES)]
        self.masks = [[np.ones(shape, bool) for shape, _ in self.shapes] for _ in range(REPLICATES)]
        self.step = 0
        self.params = [self.tree(weights) for weights in self.weights]
        self.states = [self.tx.init(params) for params in self.params]
        self.mapped = jax.jit(jax.vmap(self.advance))
        self.folder = Path(tempfile.mkdtemp())

    def draw(self, most):
        return [np.asarray(self.random.integers(-most, most + 1, s) / 4, dtype) for s, dtype in self.shapes]

    def tree(self, arrays):
        """The tree with these arrays; every other leaf is unchanged."""
        arrays = iter(arrays)
        return jax.tree.map(
            lambda node: jnp.asarray(next(arrays) if is_spec(node) else node), self.spec, is_leaf=is_spec
        )

    def advance(self, params, state, updates):
        updates, state = self.tx.update(updates, state, params)
        return optax.apply_updates(params, updates), state

    def expect(self, updates):
        """One step of the model."""
        quota = self.quotas.get(self.step)
        for r in range(REPLICATES):
            worth = [np.abs(weight.astype(np.float64)) for weight in self.weights[r]]
            if isinstance(quota, int):
                self.masks[r] = largest(worth, quota, self.masks[r])
            elif quota is not None:
                found = zip(worth, quota, self.masks[r], strict=True)
                self.masks[r] = [largest([one], count, [mask])[0] for one, count, mask in found]
            moved = zip(self.masks[r], self.weights[r], updates[r], strict=True)
            self.weights[r] = [np.where(mask, w + u, np.zeros_like(w)) for mask, w, u in moved]
        self.step += 1

    def still(self, updates):
        """The updates as a tree; whole numbers get an update of 0."""
        whole = self.tree(updates)
        return jax.tree.map(lambda u: u if jnp.issubdtype(u.dtype, jnp.floating) else jnp.zeros_like(u), whole)

    @stateful.rule()
    def update(self):
        updates = [self.draw(8) for _ in range(REPLICATES)]
        self.expect(updates)
        for r in range(REPLICATES):
            self.params[r], self.states[r] = self.advance(self.params[r], self.states[r], self.still(updates[r]))

    @stateful.rule()
    def update_under_jit_and_vmap(self):
        updates = [self.draw(8) for _ in range(REPLICATES)]
        self.expect(updates)
        stack = lambda trees: jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
        moves = stack([self.still(update) for update in updates])
        params, states = self.mapped(stack(self.params), stack(self.states), moves)
        for r in range(REPLICATES):
            self.params[r], self.states[r] = jax.tree.map(lambda leaf, r=r: leaf[r], (params, states))

    @stateful.rule(r=st.integers(0, REPLICATES - 1))
    def stop_and_resume_from_files(self, r):
        masks = jprune.masks_of(self.states[r])
        jprune.io.save_pruned(self.folder / "weights", self.params[r], masks)
        jprune.io.save_masks(self.folder / "masks", masks)
        blank = jax.tree.map(jnp.zeros_like, self.params[r])
        count = int(self.states[r].count)
        self.params[r] = jprune.io.load_pruned(self.folder / "weights", blank)
        state = self.tx.init(blank)._replace(count=jnp.asarray(count, jnp.int32))
        self.states[r] = jprune.with_masks(state, jprune.io.load_masks(self.folder / "masks", blank))

    @stateful.rule(r=st.integers(0, REPLICATES - 1))
    def a_revived_weight_is_found(self, r):
        pruned = [i for i, mask in enumerate(self.masks[r]) if not mask.all()]
        if pruned:
            worse = [weight.copy() for weight in self.weights[r]]
            worse[pruned[-1]][~self.masks[r][pruned[-1]]] = 0.25
            with pytest.raises(ValueError, match="pruned weights are not 0"):
                jprune.check_pruned(self.tree(worse), self.states[r])

    @stateful.invariant()
    def weights_and_masks_are_those_of_the_model(self):
        for r in range(REPLICATES):
            jprune.check_pruned(self.params[r], self.states[r])
            assert int(self.states[r].count) == self.step
            masks = jax.tree.leaves(jprune.masks_of(self.states[r]))
            for mask, expected in zip(masks, self.masks[r], strict=True):
                np.testing.assert_array_equal(mask, expected)
            expected = jax.tree.leaves(self.tree(self.weights[r]))
            for leaf, wanted in zip(jax.tree.leaves(self.params[r]), expected, strict=True):
                assert leaf.dtype == wanted.dtype
                np.testing.assert_array_equal(leaf, wanted)

    @stateful.invariant()
    def the_count_is_the_scheduled_one(self):
        due = [self.quotas[step] for step in self.quotas if step < self.step]
        kept = due[-1] if due else sum(self.sizes)
        for state in self.states:
            per_leaf = [int(mask.sum()) for mask in jax.tree.leaves(state.masks)]
            assert (sum(per_leaf) if isinstance(kept, int) else per_leaf) == kept

    def teardown(self):
        shutil.rmtree(getattr(self, "folder", "no such folder"), ignore_errors=True)


def leaves_of(spec):
    """The shapes and dtypes of the arrays of a tree, in the order of its leaves."""
    return [leaf for leaf in jax.tree.leaves(spec, is_leaf=is_spec) if is_spec(leaf)]


def run(examples, steps, *, derandomize=True):
    relaxed = settings(
        max_examples=examples,
        stateful_step_count=steps,
        derandomize=derandomize,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    stateful.run_state_machine_as_test(Training, settings=relaxed)


@pytest.mark.slow
def test_any_order_of_steps_gives_the_masks_of_a_stable_sort():
    run(examples=2, steps=8)


@pytest.mark.slow
def test_many_orders_of_steps_give_the_masks_of_a_stable_sort():
    run(examples=30, steps=12, derandomize=False)
