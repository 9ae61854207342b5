"""Any tree under any schedule: the scheduled count exactly, and monotonically."""

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jprune
from tests.pruning.steps import exact_count

schedules = st.dictionaries(
    st.integers(0, 5),
    st.integers(0, 100).map(lambda percent: percent / 100) | st.integers(0, 12).map(jprune.Keep),
    min_size=1,
    max_size=4,
)


def follows_its_schedule(shapes, table, seed):
    total = sum(int(np.prod(shape)) for shape in shapes)
    counts = {s: v.count if isinstance(v, jprune.Keep) else exact_count(total, v) for s, v in table.items()}
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


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
@settings(max_examples=3)
@given(shapes, schedules, st.integers(0, 1000))
def test_any_tree_follows_any_schedule_exactly_and_monotonically(shapes, table, seed):
    follows_its_schedule(shapes, table, seed)


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
@pytest.mark.slow
@settings(max_examples=40, derandomize=False)
@given(shapes, schedules, st.integers(0, 1000))
def test_many_trees_follow_many_schedules_exactly_and_monotonically(shapes, table, seed):
    follows_its_schedule(shapes, table, seed)
