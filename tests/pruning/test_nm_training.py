"""SR-STE against its equation in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune.pruning.nm_training import sr_ste


def pattern(w):
    """Masks of the 2 largest of every 4 rows."""
    groups = np.abs(w).reshape(-1, 4, w.shape[1])
    order = np.argsort(np.argsort(-groups, axis=1, kind="stable"), axis=1, kind="stable")
    return (order < 2).reshape(w.shape)


@pytest.fixture(scope="module")
def problem():
    random = np.random.default_rng(0)
    return random.normal(size=(20, 8)), random.normal(size=(20, 3)), random.normal(size=(8, 3))


@pytest.mark.parametrize("every", [1, 3])
def test_steps_are_those_of_the_published_equation(problem, every):
    x, y, start = problem
    rate, decay, steps = 0.05, 0.3, 12
    w, mask, changed = start.copy(), pattern(start), 0
    for t in range(steps):
        gradient = x.T @ (x @ (mask * w) - y) / len(x)
        w = w - rate * (gradient + decay * ~mask * w)
        if (t + 1) % every == 0:
            changed += int((pattern(w) != mask).sum())
            mask = pattern(w)
    assert changed > 0

    inputs, targets = jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32)

    def loss(params, masks):
        kernel = jprune.straight_through(params, masks)["kernel"]
        return jnp.sum(jnp.square(inputs @ kernel - targets)) / (2 * len(x))

    tx = sr_ste(optax.sgd(rate), n=2, m=4, decay=decay, every=every)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, state.masks), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"kernel": jnp.asarray(start, jnp.float32)}
    carry = (params, tx.init(params))
    (params, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(carry)
    np.testing.assert_allclose(params["kernel"], w, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.masks["kernel"], mask)
    sparse = jprune.apply_masks(params, state.masks)["kernel"]
    assert ((np.asarray(sparse) != 0).reshape(2, 4, 3).sum(1) == 2).all()


@pytest.mark.optax_promotes
def test_with_lookahead_masks_and_decay_are_those_of_the_fast_weights(problem):
    x, y, start = problem
    rate, decay = 0.05, 0.3
    fast, slow, mask = start.copy(), start.copy(), pattern(start)
    for t in range(6):
        gradient = x.T @ (x @ (mask * fast) - y) / len(x)
        fast = fast - rate * (gradient + decay * ~mask * fast)
        if t % 2 == 1:
            slow = slow + 0.5 * (fast - slow)
            fast = slow
        mask = pattern(fast)

    def loss(params, masks):
        kernel = jprune.straight_through(params, masks)["kernel"]
        return jnp.sum(jnp.square(jnp.asarray(x, jnp.float32) @ kernel - jnp.asarray(y, jnp.float32))) / (2 * len(x))

    tx = sr_ste(optax.lookahead(optax.sgd(rate), sync_period=2, slow_step_size=0.5), decay=decay)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params.fast, state.masks), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = optax.LookaheadParams.init_synced({"kernel": jnp.asarray(start, jnp.float32)})
    carry = (params, tx.init(params))
    (params, state), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=6))(carry)
    np.testing.assert_allclose(params.fast["kernel"], fast, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(params.slow["kernel"], slow, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(state.masks["kernel"], mask)


def test_masks_are_found_in_any_wrapper_and_other_leaves_have_none():
    params = {"kernel": jnp.array([[1.0], [2.0], [3.0], [0.5]]), "bias": jnp.ones(1)}
    tx = optax.MultiSteps(sr_ste(optax.adam(0.1), n=1, m=2), every_k_schedule=2)
    masks = optax.tree.get(tx.init(params), "masks")
    np.testing.assert_array_equal(masks["kernel"][:, 0], [False, True, True, False])
    assert masks["bias"] is None
    with pytest.raises(ValueError, match="sr_ste trains dense weights: evaluate and save jprune"):
        jprune.masks_of(tx.init(params))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: sr_ste(optax.sgd(0.1), every=0), "every is 0; it must be at least 1"),
        (lambda: sr_ste(optax.sgd(0.1), decay=-1.0), r"decay=-1\.0 is negative; pass a number of 0 or more"),
        (lambda: sr_ste(optax.sgd(0.1), 2, 4).init({"kernel": jnp.ones((6, 2))}), "'kernel'"),
        (lambda: sr_ste(optax.sgd(0.1), 2, 4).init({"bias": jnp.ones(8)}), "selects no float leaf"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_axes_say_along_which_axis_weights_compete():
    """An Equinox weight (outputs, inputs), which keeps the two largest of every four inputs."""
    weight = {"layer": {"weight": jnp.array([[4.0, -3.0, 2.0, 1.0], [1.0, 2.0, -3.0, 4.0], [1.0, 4.0, 3.0, -2.0]])}}
    wanted = [[1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]
    roles = {"weight$": jprune.KernelAxes(inputs=(1,), outputs=(0,))}
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    graph = jprune.trace_model(lambda params, x: x @ params["layer"]["weight"].T, weight, x)
    for axes in ("equinox", roles, graph):
        state = sr_ste(optax.sgd(0.1), axes=axes).init(weight)
        np.testing.assert_array_equal(state.masks["layer"]["weight"], np.array(wanted, bool))
    # The masks follow the weights along the same axis: after the step the first row is -1, -8, -3, -4 (rate 1).
    tx = sr_ste(optax.sgd(1.0), decay=0.0, axes=roles)
    grads = {"layer": {"weight": jnp.zeros((3, 4)).at[0].set(5.0)}}
    _, state = tx.update(grads, tx.init(weight), weight)
    np.testing.assert_array_equal(state.masks["layer"]["weight"], np.array([[0, 1, 0, 1], *wanted[1:]], bool))
    with pytest.raises(ValueError, match=r"3 inputs|divide"):
        sr_ste(optax.sgd(0.1), axes={"weight$": jprune.KernelAxes(inputs=(0,), outputs=(1,))}).init(weight)


def test_the_decay_can_be_injected():
    make = optax.inject_hyperparams(sr_ste, static_args=("tx", "n", "m", "every"))
    params = {"kernel": jnp.array([[1.0], [0.5]])}
    tx = make(optax.sgd(0.1), n=1, m=2, decay=0.5)
    updates, _ = tx.update({"kernel": jnp.zeros((2, 1))}, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"][:, 0], [0.0, -0.1 * 0.5 * 0.5], rtol=1e-6)
