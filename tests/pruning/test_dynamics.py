"""Regrowth as in SET and RigL, moments that start fresh under any optimizer, straight-through gradients."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

import jprune
from tests.pruning.steps import by_rank, largest, make_step, slope

pytestmark = pytest.mark.optax_promotes


def kernels(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(5), 2)
    return {
        "a": {"kernel": jax.random.normal(keys[0], (5, 7), dtype), "bias": jnp.zeros(7, dtype), "none": None},
        "b": {"kernel": jax.random.normal(keys[1], (7, 3), dtype)},
    }


def arrays(tree):
    return [np.asarray(tree[name]["kernel"]) for name in ("a", "b")]


def rigl_by_numpy(weights, grads, alive, keep, fraction):
    """One exchange over lists of arrays that share one count."""
    survivors = largest([np.abs(w) for w in weights], keep - round(fraction * keep), alive)
    worth = [np.where(s, np.inf, np.abs(g)) for s, g in zip(survivors, grads, strict=True)]
    return largest(worth, keep)


RIGL = jprune.Regrow(jprune.scores.dense_gradient(), jprune.schedules.cosine_fraction(0.4, end=6))
SCHEDULE = dict.fromkeys(range(0, 8, 2), 0.75)


@pytest.mark.parametrize(
    "select",
    [
        pytest.param(by_rank, id="global, a branch for each entry"),
        pytest.param(jprune.global_masks, id="global", marks=pytest.mark.slow),
        pytest.param(jprune.layer_masks, id="per layer", marks=pytest.mark.slow),
    ],
)
def test_rigl_drops_the_smallest_weights_and_regrows_the_largest_gradients(select):
    tx = optax.chain(optax.sgd(0.1), jprune.prune(jprune.magnitude(), SCHEDULE, selection=select, regrow=RIGL))
    params, alive = kernels(), [np.ones((5, 7), bool), np.ones((7, 3), bool)]
    state, exchanged = tx.init(params), []
    for step in range(8):
        grads, before = slope(params), alive
        if step in SCHEDULE:
            fraction, w, g = RIGL.at(step), arrays(params), arrays(grads)
            if select is not jprune.layer_masks:
                alive = rigl_by_numpy(w, g, alive, 14, fraction)
            else:
                each = [rigl_by_numpy([w[i]], [g[i]], [alive[i]], (9, 5)[i], fraction) for i in range(2)]
                alive = [masks[0] for masks in each]
        updates, state = tx.update(grads, state, params, grad=grads)
        params = optax.apply_updates(params, updates)
        for mask, expected in zip(arrays(jprune.masks_of(state)), alive, strict=True):
            np.testing.assert_array_equal(mask, expected)
        jprune.check_pruned(params, state)
        regrown = [now & ~old for now, old in zip(alive, before, strict=True)]
        exchanged.append(sum(int(r.sum()) for r in regrown))
        for weight, new in zip(arrays(params), regrown, strict=True):
            assert (weight[new] == 0).all()  # it starts from 0, whatever update it was handed
    assert exchanged[2] > 0
    assert exchanged[6] == 0  # the cosine has reached its end
    assert sum(int(mask.sum()) for mask in alive) == 14


def test_what_survives_in_a_layer_is_largest_also_if_another_layer_has_too_few_weights():
    """Half of each layer is kept: 2 of `a`, which starts with none, and the 4 largest of the 6 of `b`."""
    params = {"a": {"kernel": jnp.zeros((2, 2))}, "b": {"kernel": jnp.array([[3.0, 4, 5, 6], [7, 8, 1, 2]])}}
    tx = jprune.rigl(optax.sgd(0.0), 0.5, end=2, every=1, selection=jprune.uniform_masks)
    masks = {"a": {"kernel": jnp.zeros((2, 2), bool)}, "b": {"kernel": params["b"]["kernel"] > 2}}
    grad = {"a": {"kernel": jnp.arange(4.0).reshape(2, 2)}, "b": {"kernel": jnp.ones((2, 4))}}
    _, state = tx.update(grad, jprune.with_masks(tx.init(params), masks), params, grad=grad)
    after = jprune.masks_of(state)
    np.testing.assert_array_equal(after["a"]["kernel"], [[False, False], [True, True]])
    np.testing.assert_array_equal(after["b"]["kernel"], params["b"]["kernel"] > 4)


def test_set_regrows_at_random_and_keeps_the_count():
    regrow = jprune.Regrow(jprune.random(), 0.5)
    key, params = jax.random.key(2), {"kernel": jnp.arange(1.0, 21.0).reshape(4, 5)}
    tx = jprune.prune(
        jprune.magnitude(), {0: jprune.Keep(10), 1: jprune.Keep(10)}, selection=by_rank, regrow=regrow, key=key
    )
    state, alive = tx.init(params), np.ones((4, 5), bool)
    for step in range(2):
        _, state = tx.update(params, state, params)
        draws = jprune.random()(params, key=jax.random.fold_in(jax.random.fold_in(key, step), 1))["kernel"]
        (survivors,) = largest([params["kernel"]], 5, [alive])
        (alive,) = largest([np.where(survivors, np.inf, draws)], 10)
        np.testing.assert_array_equal(state.masks["kernel"], alive)


def test_with_regrowth_the_sparsity_may_fall_and_without_it_may_not():
    params = {"kernel": jnp.arange(1.0, 11.0).reshape(2, 5)}
    table = {0: 0.8, 1: 0.5}
    tx = jprune.prune(
        jprune.magnitude(), table, selection=by_rank, regrow=jprune.Regrow(jprune.scores.dense_gradient(), 0.0)
    )
    state = tx.init(params)
    grad = {"kernel": params["kernel"][::-1]}
    for kept in (2, 5):
        _, state = tx.update(params, state, params, grad=grad)
        assert int(state.masks["kernel"].sum()) == kept
    # The two largest weights survive, and of the rest the three largest gradients come back.
    np.testing.assert_array_equal(state.masks["kernel"], [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]])
    with pytest.raises(ValueError, match="without regrow"):
        jprune.prune(jprune.magnitude(), table).init(params)


def test_regrowth_needs_the_inputs_of_its_score():
    tx = jprune.prune(jprune.magnitude(), {0: 0.5}, regrow=RIGL)
    params = {"kernel": jnp.ones((1, 4))}
    with pytest.raises(ValueError, match="dense_gradient needs grad"):
        jax.eval_shape(tx.update, params, tx.init(params), params)


def test_a_fraction_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"at step 0 is 1\.5; it must be from 0\.0 to 1\.0"):
        jprune.Regrow(jprune.random(), 1.5)
    regrow = jprune.Regrow(jprune.random(), lambda step: step / 10)
    with pytest.raises(ValueError, match=r"at step 20 is 2\.0"):
        jprune.prune(jprune.magnitude(), {20: 0.5}, regrow=regrow).init(kernels())
    with pytest.raises(ValueError, match="end is 0; it must be at least 1"):
        jprune.schedules.cosine_fraction(0.3, end=0)


def test_the_fraction_follows_the_cosine_of_the_paper():
    steps = np.arange(0, 100, 7)
    expected = 0.3 / 2 * (1 + np.cos(steps * np.pi / 100))
    np.testing.assert_allclose(
        [jprune.schedules.cosine_fraction(0.3, 100)(int(s)) for s in steps], expected, rtol=1e-12
    )


# One transformation for all: its selection is compiled once.
EXCHANGE = jprune.prune(
    jprune.magnitude(),
    {0: 0.5, 3: 0.5},
    selection=by_rank,
    regrow=jprune.Regrow(jprune.random(), 0.5),
    key=jax.random.key(11),
)
HALVE = jprune.prune(jprune.magnitude(), {0: 0.5}, selection=by_rank)


def dynamic(optimizer):
    return jprune.reset_moments(optimizer, EXCHANGE)


OPTIMIZERS = {
    "momentum": lambda: optax.sgd(0.05, momentum=0.9),
    "adam": lambda: optax.adam(0.05),
    "adamw in a chain": lambda: optax.chain(optax.clip(1.0), optax.adamw(0.05)),
    "amsgrad": lambda: optax.amsgrad(0.05),
    "adagrad": lambda: optax.adagrad(0.05),
    "rmsprop": lambda: optax.rmsprop(0.05, centered=True, momentum=0.9),
    "lion": lambda: optax.lion(0.05),
    "adafactor": lambda: optax.adafactor(0.05),
    "adafactor, factored": lambda: optax.adafactor(0.05, min_dim_size_to_factor=2, momentum=0.9),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.05),
    "muon": lambda: contrib.muon(0.05),
    "prodigy": lambda: contrib.prodigy(0.05),
    "partition": lambda: optax.partition(
        {"x": optax.adam(0.05), "y": optax.sgd(0.05, momentum=0.9)}, {"a": "x", "b": "y"}
    ),
    "masked": lambda: optax.masked(optax.adam(0.05), {"a": True, "b": False}),
    "multi_steps": lambda: optax.MultiSteps(optax.adam(0.05), 2).gradient_transformation(),
}


# Their states consist of the moments of the others, or of one more of the same kind.
SLOW = {"adamw in a chain", "amsgrad", "rmsprop", "prodigy"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in OPTIMIZERS]
)
@pytest.mark.quick(4)
def test_moments_of_a_regrown_weight_equal_those_at_init(name):
    """No other parameter has the shapes of the two kernels, so a leaf of one of these shapes belongs to them."""
    optimizer = OPTIMIZERS[name]()
    tx, params = dynamic(optimizer), kernels()
    state = tx.init(params)
    fresh = jax.tree.leaves(optimizer.init(jax.tree.map(jnp.zeros_like, params)))
    step = make_step(tx, jit=name in ("muon", "multi_steps"))
    for _ in range(4):
        before = arrays(jprune.masks_of(state))
        params, state = step(params, state)
    after = arrays(jprune.masks_of(state))
    regrown = {m.shape: ~old & m for old, m in zip(before, after, strict=True)}
    pruned = {m.shape: ~m for m in after}
    assert sum(int(mask.sum()) for mask in regrown.values()) > 3
    seen, moved = 0, 0
    for leaf, start in zip(jax.tree.leaves(state[0]), fresh, strict=True):
        if leaf.shape in regrown:
            seen += 1
            reset = regrown[leaf.shape] | pruned[leaf.shape]
            np.testing.assert_array_equal(np.asarray(leaf)[reset], np.asarray(start)[reset])
            moved += not np.array_equal(leaf, start)
    assert seen >= (1 if name == "masked" else 2)
    assert moved, "what is kept has no moments either"


@pytest.mark.parametrize("name", ["adam", "lion", "adafactor, factored", "muon"])
def test_moments_of_kept_weights_do_not_change(name):
    optimizer, params = OPTIMIZERS[name](), kernels()
    tx, plain = jprune.reset_moments(optimizer, HALVE), optax.chain(optimizer, HALVE)
    state, expected = (make_step(t, jit=name == "muon")(params, t.init(params))[1] for t in (tx, plain))
    assert jax.tree.structure(state) == jax.tree.structure(expected)
    masks = {m.shape: m for m in arrays(jprune.masks_of(state))}
    for leaf, other in zip(jax.tree.leaves(state), jax.tree.leaves(expected), strict=True):
        kept = masks.get(leaf.shape, np.ones(leaf.shape, bool))
        np.testing.assert_array_equal(np.asarray(leaf)[kept], np.asarray(other)[kept])


def test_the_history_of_lbfgs_is_reset_too():
    optimizer = optax.chain(optax.scale_by_lbfgs(memory_size=3), optax.scale(-0.1))
    tx, params = dynamic(optimizer), kernels()
    state, step = tx.init(params), make_step(tx)
    for _ in range(4):
        params, state = step(params, state)
    for mask, name in zip(arrays(jprune.masks_of(state)), "ab", strict=True):
        history = np.asarray(state[0][0].diff_params_memory[name]["kernel"])
        assert history.shape == (3, *mask.shape)
        assert (history[:, ~mask] == 0).all()
        assert (history[:, mask] != 0).any()


def test_a_leaf_of_the_state_belongs_to_the_parameter_of_the_longest_name():
    params = {"kernel": jnp.ones((2, 2)), "a": {"kernel": jnp.ones((2, 2))}}
    link = jprune.prune(jprune.magnitude(), {0: jprune.Keep(0)}, where=jprune.by_path(include="^kernel$"))
    tx = jprune.reset_moments(optax.sgd(0.1, momentum=0.9), link)
    _, state = tx.update(params, tx.init(params), params)
    trace = state[0][0].trace
    np.testing.assert_array_equal(trace["kernel"], 0.0)
    np.testing.assert_array_equal(trace["a"]["kernel"], 1.0)


def test_a_layer_may_have_the_name_of_a_moment():
    params = {"kernel": jnp.ones((2, 2)), "mu": {"kernel": jnp.ones((2, 2))}}
    link = jprune.prune(jprune.magnitude(), {0: jprune.Keep(0)}, where=jprune.by_path(include="^mu/"))
    tx = jprune.reset_moments(optax.adam(0.1, b1=0.5), link)
    _, state = tx.update(params, tx.init(params), params)
    moments = state[0][0].mu
    np.testing.assert_array_equal(moments["kernel"], 0.5)
    np.testing.assert_array_equal(moments["mu"]["kernel"], 0.0)


def test_a_regrown_weight_moves_as_a_new_one_would():
    """Momentum from before or during the time a weight was pruned must not change it."""
    params = {"kernel": jnp.array([[1.0, 0.1]])}
    link = jprune.prune(
        jprune.magnitude(),
        {1: jprune.Keep(1), 4: jprune.Keep(2)},
        selection=by_rank,
        regrow=jprune.Regrow(jprune.scores.dense_gradient(), 0.0),
    )
    tx = jprune.reset_moments(optax.sgd(0.1, momentum=0.9), link)
    state, path = tx.init(params), []
    grad = {"kernel": jnp.array([[0.0, -1.0]])}
    for _ in range(7):
        updates, state = tx.update(grad, state, params, grad=grad)
        params = optax.apply_updates(params, updates)
        path.append(float(params["kernel"][0, 1]))
    np.testing.assert_allclose(path, [0.2, 0, 0, 0, 0, 0.1, 0.1 + 0.19], rtol=1e-6)


def test_dynamic_training_under_vmap_and_scan():
    tx = dynamic(optax.adam(0.05))
    params = jax.vmap(lambda scale: jax.tree.map(lambda w: w * scale, kernels()))(jnp.array([1.0, 2.0, 3.0]))
    state = jax.vmap(tx.init)(params)

    def step(carry, _):
        params, state = carry
        grads = slope(params)
        updates, state = jax.vmap(lambda g, s, p: tx.update(g, s, p, grad=g))(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=5))((params, state))
    jprune.check_pruned(params, state)
    masks = jprune.masks_of(state)
    kept = masks["a"]["kernel"].sum(axis=(1, 2)) + masks["b"]["kernel"].sum(axis=(1, 2))
    assert kept.tolist() == [28, 28, 28]


def test_straight_through_masks_the_values_and_not_the_gradient():
    params = {"kernel": jnp.array([[1.0, -2.0], [3.0, 4.0]]), "bias": jnp.array([0.5])}
    masks = {"kernel": jnp.array([[True, False], [False, True]]), "bias": None}

    def loss(params):
        masked = jprune.straight_through(params, masks)
        return jnp.sum(masked["kernel"] ** 2 * jnp.array([[1.0, 2.0], [3.0, 4.0]]) + params["kernel"]) + jnp.sum(
            masked["bias"] ** 3
        )

    value, grad = jax.value_and_grad(loss)(params)
    assert value == 1 * 1 + 4 * 16 + 6 + 0.125
    # d/dw of c w^2 at the masked value, which is 0 where masked, plus 1.
    np.testing.assert_array_equal(grad["kernel"], [[2 + 1, 1], [1, 32 + 1]])
    np.testing.assert_allclose(grad["bias"], [0.75])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_straight_through_hands_on_the_gradient_bit_for_bit(dtype):
    weights, mask = jnp.arange(1, 7, dtype=dtype), jnp.arange(6) % 2 == 0
    slopes = jnp.linspace(0.1, 1, 6, dtype=dtype)
    masked, pull = jax.vjp(lambda w: jprune.straight_through({"kernel": w}, {"kernel": mask})["kernel"], weights)
    np.testing.assert_array_equal(masked, [1, 0, 3, 0, 5, 0])
    np.testing.assert_array_equal(pull(slopes)[0], slopes)
    _, pushed = jax.jvp(lambda w: jprune.straight_through({"k": w}, {"k": mask})["k"], (weights,), (slopes,))
    np.testing.assert_array_equal(pushed, slopes)


def test_straight_through_training_brings_a_masked_weight_back():
    target, params = jnp.array([[0.0, 3.0]]), {"kernel": jnp.array([[1.0, 0.5]])}

    def loss(params, masks):
        return jnp.sum((jprune.straight_through(params, masks)["kernel"] - target) ** 2)

    history = []
    for _ in range(4):
        masks = jprune.global_masks(jprune.magnitude()(params), sparsity=0.5)
        history.append(np.asarray(masks["kernel"])[0].tolist())
        grad = jax.grad(loss)(params, masks)
        params = jax.tree.map(lambda w, g: w - 0.1 * g, params, grad)
    assert history == [[True, False], [False, True], [False, True], [False, True]]
    assert (np.asarray(params["kernel"]) != 0).all()


def test_straight_through_refuses_masks_that_do_not_fit():
    with pytest.raises(ValueError, match="masks has no leaf 'kernel'"):
        jprune.straight_through({"kernel": jnp.ones(2)}, {"other": jnp.ones(2, bool)})


def test_one_program_serves_dynamic_training():
    tx = dynamic(optax.adam(0.05))

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    @chex.assert_max_traces(n=1)
    def step(params, state):
        grads = slope(params)
        updates, state = tx.update(grads, state, params, grad=grads)
        return optax.apply_updates(params, updates), state

    params = kernels()
    state = tx.init(params)
    for _ in range(5):
        params, state = step(params, state)
    assert sum(int(m.sum()) for m in jax.tree.leaves(jprune.masks_of(state))) == 28


@pytest.mark.parametrize("fraction", [0.3, 0.7])
def test_a_selection_that_computes_with_its_amount_drops_as_many_weights_as_one_that_does_not(fraction):
    # 8 of 15 weights (7.5, rounded) are kept, and round(8 fraction) of them are dropped before others regrow.
    params = {"kernel": jnp.arange(1.0, 16.0).reshape(3, 5)}
    grad = {"kernel": jnp.arange(15.0, 0.0, -1.0).reshape(3, 5)}

    def own(scores, *, sparsity, among=None):
        return jprune.global_masks(scores, sparsity=sparsity + 0.0, among=among)

    masks = []
    for selection in (jprune.global_masks, own):
        regrow = jprune.Regrow(jprune.scores.dense_gradient(), fraction)
        tx = jprune.prune(jprune.magnitude(), {0: 0.5, 1: 0.5}, selection=selection, regrow=regrow)
        weights, state = params, tx.init(params)
        for _ in range(2):
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), state, weights, grad=grad)
            weights = optax.apply_updates(weights, updates)
        masks.append(np.asarray(state.masks["kernel"]).ravel())
    np.testing.assert_array_equal(masks[1], masks[0])
    assert masks[0].sum() == 8
