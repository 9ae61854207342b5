"""Training that is stopped, saved as packed masks and kept weights, and resumed with the same bits."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import jprune
from tests.pruning.steps import by_rank, make_step

pytestmark = pytest.mark.optax_promotes


def weights():
    return {"a": {"kernel": jax.random.normal(jax.random.key(0), (5, 7)), "bias": jnp.zeros(7), "none": None}}


def link(score, regrow):
    table = {1: 0.5, 3: 0.5, 5: 0.6} if regrow is None else dict.fromkeys(range(1, 8), 0.5)
    return jprune.prune(score, table, selection=by_rank, regrow=regrow, key=jax.random.key(9))


LINKS = {
    "random": link(jprune.random(), None),
    "SET": link(jprune.magnitude(), jprune.Regrow(jprune.random(), 0.3)),
    "RigL": link(jprune.magnitude(), jprune.Regrow(jprune.scores.dense_gradient(), 0.3)),
}


def to_disk_and_back(params, state, folder):
    """Weights and masks through safetensors, the rest of the state as plain arrays."""
    masks = jprune.masks_of(state)
    jprune.io.save_pruned(folder / "weights", params, masks)
    jprune.io.save_masks(folder / "masks", masks)
    leaves, treedef = jax.tree.flatten(state)
    is_key = [jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) for leaf in leaves]
    plain = [jax.random.key_data(leaf) if key else leaf for leaf, key in zip(leaves, is_key, strict=True)]
    np.savez(folder / "state.npz", *[np.zeros(leaf.shape, bool) if leaf.dtype == bool else leaf for leaf in plain])
    with np.load(folder / "state.npz", allow_pickle=False) as stored:
        back = [jnp.asarray(stored[f"arr_{i}"]) for i in range(len(leaves))]
    back = [jax.random.wrap_key_data(leaf) if key else leaf for leaf, key in zip(back, is_key, strict=True)]
    state = jprune.with_masks(jax.tree.unflatten(treedef, back), jprune.io.load_masks(folder / "masks", weights()))
    return jprune.io.load_pruned(folder / "weights", weights()), state


def bits(leaf):
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf).tobytes()


@pytest.mark.parametrize(("name", "stop"), [("random", 4), ("SET", 2), ("RigL", 4)])
def test_resumed_training_gives_the_bits_of_training_that_was_not_interrupted(name, stop, tmp_path):
    tx = jprune.reset_moments(optax.adam(0.05), LINKS[name])
    step = make_step(tx)
    params, whole = weights(), None
    state = tx.init(params)
    for i in range(8):
        if i == stop:
            whole = (params, state)
        params, state = step(params, state)
    resumed = to_disk_and_back(*whole, tmp_path)
    for _ in range(stop, 8):
        resumed = step(*resumed)
    assert jax.tree.structure(resumed) == jax.tree.structure((params, state))
    for a, b in zip(jax.tree.leaves(resumed), jax.tree.leaves((params, state)), strict=True):
        assert bits(a) == bits(b)
    assert int(jprune.masks_of(state)["a"]["kernel"].sum()) == (14 if name == "random" else 18)
    assert (tmp_path / "masks").stat().st_size < 300  # 35 bits and a header


def test_loading_masks_of_another_network_names_the_leaf(tmp_path):
    jprune.io.save_masks(tmp_path / "masks", {"a": {"kernel": jnp.ones((5, 8), bool)}})
    with pytest.raises(ValueError, match=r"shape \(5, 8\) at 'a/kernel', where params has \(5, 7\)"):
        jprune.io.load_masks(tmp_path / "masks", weights())


def train_steps(tx):
    """Return ``run(carry, steps)``, which counts its steps; the carry is (parameters, optimizer state)."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state, i):
        grads = jax.tree.map(lambda w: jnp.sin(3 * w + i), params)
        updates, state = tx.update(grads, state, params, grad=grads)
        return optax.apply_updates(params, updates), state

    def run(carry, steps):
        for i in steps:
            carry = step(*carry, i)
        return carry

    return run


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert all(bits(x) == bits(y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


ACCUMULATED = optax.MultiSteps(jprune.rigl(optax.adam(0.05), 0.5, end=4, every=1), 2)
TRANSFORMATIONS = {
    "cubic": optax.chain(optax.adam(0.05), jprune.prune(jprune.magnitude(), jprune.cubic(0.8, 0, 7, 2))),
    "RigL": jprune.rigl(optax.adam(0.05), 0.5, end=8, every=2),
    "SET": jprune.sparse_evolution(optax.adam(0.05), 0.5, key=jax.random.PRNGKey(1), end=8, every=2),
    "SR-STE": jprune.sr_ste(optax.adam(0.05), 1, 4, every=3),
    "accumulated RigL": optax.GradientTransformationExtraArgs(ACCUMULATED.init, ACCUMULATED.update),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_training_restored_from_msgpack_gives_the_bits_of_training_that_was_not_interrupted(name):
    params = {"kernel": jax.random.normal(jax.random.key(2), (8, 6))}
    tx = TRANSFORMATIONS[name]
    run = train_steps(tx)
    start = (params, tx.init(params))
    whole = run(start, range(10))
    for stop in (1, 4, 5):  # before, at and after a step of the schedule
        saved = serialization.to_bytes(run(start, range(stop)))
        assert_same_bits(run(serialization.from_bytes(start, saved), range(stop, 10)), whole)


def test_lottery_tickets_resume_where_training_saves_its_results():
    params = {"kernel": jax.random.normal(jax.random.key(3), (6, 5))}
    tx = optax.chain(optax.adam(0.1), jprune.keep_zeros())
    run, trained, files = train_steps(tx), [], {}

    def train(params, state, begin, end):
        trained.append(end - begin)
        return run((params, state), range(begin, end))

    def saving():
        calls = itertools.count()

        def load_or_train(params, state, begin, end):
            call = next(calls)
            if call not in files:
                files[call] = serialization.to_bytes(train(params, state, begin, end))
            return serialization.from_bytes((params, state), files[call])

        return load_or_train

    options = {"steps": 6, "rewind": 2, "score": jprune.random(), "key": jax.random.key(4)}
    whole = list(jprune.lottery_ticket(train, tx, params, [0.3, 0.5], **options))
    killed = jprune.lottery_ticket(saving(), tx, params, [0.3, 0.5], **options)
    next(killed), next(killed)
    trained.clear()
    resumed = list(jprune.lottery_ticket(saving(), tx, params, [0.3, 0.5], **options))
    assert trained == [4]  # the last level alone
    assert_same_bits([ticket[1:] for ticket in resumed], [ticket[1:] for ticket in whole])
