"""The penalty in training: as a link of a chain and fused into the loss, the same updates."""

import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune

PARAMS = {"a": jax.random.normal(jax.random.key(0), (3, 4)), "b": jax.random.normal(jax.random.key(1), (4, 2))}
X = jax.random.normal(jax.random.key(2), (6, 3))
OPTIONS = {"preset": "ieee", "balance": 0.51}


def forward(params, x):
    h = x @ params["a"]
    return jax.nn.relu(h) @ params["b"], [h]


def preacts(params, x):
    return forward(params, x)[1]


def loss(params, x):
    y, layers = forward(params, x)
    return jnp.mean(y**2), layers


GRADS = jax.jit(jax.grad(lambda params: loss(params, X)[0]))(PARAMS)
penalty_of = jax.jit(lambda params: jprune.jumpstart_penalty(preacts(params, X), **OPTIONS))
PENALTY, SLOPE = jax.jit(jax.value_and_grad(penalty_of))(PARAMS)


def close(a, b, tolerance=1e-6):
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=tolerance)


def moved(scale):
    """The gradient of the loss plus ``scale`` times that of the penalty."""
    return jax.tree.map(lambda g, s: np.asarray(g) + np.float32(scale) * np.asarray(s), GRADS, SLOPE)


def test_the_updates_are_coefficient_times_the_gradient_and_the_state_shows_the_last_penalty():
    link = jprune.add_jumpstart(preacts, 0.3, **OPTIONS)
    state = link.init(PARAMS)
    assert (int(state.count), float(state.penalty)) == (0, 0.0)
    update = jax.jit(link.update)
    updates, state = update(GRADS, state, PARAMS, batch=X)
    close(updates, moved(0.3))
    assert (int(state.count), state.penalty.dtype) == (1, jnp.float32)
    np.testing.assert_allclose(state.penalty, PENALTY, rtol=1e-6)
    elsewhere = jax.tree.map(lambda p: 2 * p, PARAMS)
    _, state = update(GRADS, state, elsewhere, batch=X)
    np.testing.assert_allclose(state.penalty, penalty_of(elsewhere), rtol=1e-6)


def test_a_schedule_gives_the_coefficient_of_the_step():
    steps = jnp.array([0.5, 0.0, 2.0])
    schedule = lambda count: steps[count]
    link = jprune.add_jumpstart(preacts, schedule, **OPTIONS)
    fused = jax.grad(jprune.jumpstart.jumpstart_loss(loss, schedule, **OPTIONS))
    update, fused_jit = jax.jit(link.update), jax.jit(fused)
    state = link.init(PARAMS)
    for step, coefficient in enumerate([0.5, 0.0, 2.0]):
        updates, state = update(GRADS, state, PARAMS, batch=X)
        close(updates, moved(coefficient))
        close(fused_jit(PARAMS, X, step=step), updates)
    with pytest.raises(ValueError, match="need the step: call the loss with step=step"):
        fused(PARAMS, X)


@pytest.mark.optax_promotes
def test_an_optax_schedule_under_jit_over_a_run():
    """Twenty steps of link and fused loss end at the same weights, the coefficient decaying to a tenth."""
    schedule = optax.exponential_decay(1.0, transition_steps=20, decay_rate=0.1)
    chain = optax.chain(jprune.add_jumpstart(preacts, schedule, **OPTIONS), optax.sgd(0.1, momentum=0.9))
    plain = optax.sgd(0.1, momentum=0.9)
    fused = jprune.jumpstart.jumpstart_loss(loss, schedule, **OPTIONS)

    @jax.jit
    def linked(carry, _):
        params, state = carry
        grads = jax.grad(lambda p: loss(p, X)[0])(params)
        updates, state = chain.update(grads, state, params, batch=X)
        return (optax.apply_updates(params, updates), state), state[0].penalty

    @jax.jit
    def in_one(carry, step):
        params, state = carry
        updates, state = plain.update(jax.grad(fused)(params, X, step=step), state, params)
        return (optax.apply_updates(params, updates), state), None

    (one, _), penalties = jax.lax.scan(linked, (PARAMS, chain.init(PARAMS)), None, length=20)
    (two, _), _ = jax.lax.scan(in_one, (PARAMS, plain.init(PARAMS)), jnp.arange(20))
    close(one, two, 1e-5)
    np.testing.assert_allclose(penalties[0], PENALTY, rtol=1e-6)


def test_a_coefficient_of_zero_computes_nothing():
    def refuse(params, batch):
        raise AssertionError("called")

    link = jprune.add_jumpstart(refuse, 0.0)
    updates, state = link.update(GRADS, link.init(PARAMS), PARAMS, batch=X)
    assert updates is GRADS
    assert (int(state.count), float(state.penalty)) == (1, 0.0)


def test_the_auxiliary_output_separates_loss_and_penalty():
    def with_aux(params, x):
        value, layers = loss(params, x)
        return value, (layers, {"batch": x.shape[0]})

    total, aux = jprune.jumpstart.jumpstart_loss(with_aux, 0.3, has_aux=True, **OPTIONS)(PARAMS, X)
    np.testing.assert_allclose(aux.loss, loss(PARAMS, X)[0], rtol=1e-6)
    np.testing.assert_allclose(aux.penalty, PENALTY, rtol=1e-6)
    np.testing.assert_allclose(total, aux.loss + 0.3 * aux.penalty, rtol=1e-6)
    assert aux.aux == {"batch": 6}


def test_a_loss_of_the_number_zero_leaves_the_penalty_whole():
    fused = jprune.jumpstart.jumpstart_loss(lambda params, x: (0, preacts(params, x)), 0.3, **OPTIONS)
    np.testing.assert_allclose(fused(PARAMS, X), 0.3 * PENALTY, rtol=1e-6)
    close(jax.jit(jax.grad(fused))(PARAMS, X), jax.tree.map(lambda s: np.float32(0.3) * np.asarray(s), SLOPE))


def test_padding_of_a_batch_is_left_out_by_both_forms():
    padded, real = jnp.concatenate([X, jnp.full((2, 3), 50.0)]), jnp.arange(8) < 6

    def masked(params, x):
        y, layers = forward(params, x)
        return jnp.where(real[:, None], y**2, 0).sum() / (6 * 2), layers

    wanted = moved(0.3)
    fused = jprune.jumpstart.jumpstart_loss(masked, 0.3, **OPTIONS, examples=lambda params, x: real)
    close(jax.jit(jax.grad(fused))(PARAMS, padded), wanted)
    link = jprune.add_jumpstart(preacts, 0.3, **OPTIONS, examples=lambda x: real)
    close(jax.jit(link.update)(GRADS, link.init(PARAMS), PARAMS, batch=padded)[0], wanted)


def test_random_ties_differ_at_every_step_and_repeat_with_the_same_key():
    """All four examples tie: the gradient of the kernel shows which one was selected."""
    x, params = jnp.eye(4), {"kernel": jnp.zeros((4, 1))}
    options = {"mode": "unit_positive", "aggregate": "sum", "ties": "random", "key": jax.random.key(3)}
    link = jprune.add_jumpstart(lambda params, x: [x @ params["kernel"]], 1.0, **options)
    fused = jprune.jumpstart.jumpstart_loss(lambda params, x: (jnp.zeros(()), [x @ params["kernel"]]), 1.0, **options)
    update, slope_of = jax.jit(link.update), jax.jit(jax.grad(fused))

    def run():
        state, chosen = link.init(params), []
        for step in range(12):
            updates, state = update(jax.tree.map(jnp.zeros_like, params), state, params, batch=x)
            slope = np.asarray(updates["kernel"]).ravel()
            assert sorted(slope) == [-0.5, 0.0, 0.0, 0.0]
            close(slope_of(params, x, step=step)["kernel"], updates["kernel"])
            chosen.append(int(slope.argmin()))
        return chosen

    first = run()
    assert len(set(first)) > 1
    assert run() == first


def test_updates_keep_their_dtype_and_other_leaves_do_not_change():
    params = {"kernel": jnp.zeros((1, 1), jnp.bfloat16), "steps": jnp.zeros((), jnp.int32), "none": None}
    grads = {"kernel": jnp.ones((1, 1), jnp.bfloat16), "steps": jnp.ones((), jnp.int32), "none": None}
    link = jprune.add_jumpstart(lambda p, x: [x @ p["kernel"].astype(jnp.float32)], 1.0, mode="unit", balance=0.75)
    updates, state = jax.jit(link.update)(grads, link.init(params), params, batch=jnp.array([[3.0], [1.0]]))
    assert updates["kernel"].dtype == jnp.bfloat16
    assert float(updates["kernel"][0, 0]) == 0.0  # 1 - (.75 - .25) * 2, the mean input
    assert (int(updates["steps"]), updates["none"], float(state.penalty)) == (1, None, 1.0)


@pytest.mark.optax_promotes
def test_a_nan_of_the_penalty_alone_is_skipped_by_apply_if_finite_after_it():
    tx = optax.chain(jprune.add_jumpstart(preacts, 0.3, **OPTIONS), optax.apply_if_finite(optax.adam(0.1), 5))
    update = jax.jit(tx.update)
    first = update(GRADS, tx.init(PARAMS), PARAMS, batch=X)[1]
    updates, state = update(GRADS, first, PARAMS, batch=X.at[0, 0].set(jnp.nan))
    close(updates, jax.tree.map(jnp.zeros_like, PARAMS))
    assert bool(jnp.isnan(state[0].penalty))
    assert int(state[1].total_notfinite) == 1
    close(state[1].inner_state, first[1].inner_state)


@pytest.mark.optax_promotes
def test_before_lookahead_the_penalty_is_that_of_the_fast_weights():
    tx = optax.chain(jprune.add_jumpstart(preacts, 0.3, **OPTIONS), optax.lookahead(optax.sgd(0.1), 5, 0.5))
    params = optax.LookaheadParams(fast=PARAMS, slow=jax.tree.map(jnp.zeros_like, PARAMS))
    updates, state = tx.update(GRADS, tx.init(params), params, batch=X)
    np.testing.assert_allclose(state[0].penalty, PENALTY, rtol=1e-6)
    close(updates.fast, jax.tree.map(lambda g: -0.1 * g, moved(0.3)))
    close(updates.slow, jax.tree.map(jnp.zeros_like, PARAMS))


def test_in_double_precision_the_coefficient_is_not_rounded_to_single():
    with jax.enable_x64(True):
        params = jax.tree.map(lambda p: jnp.asarray(p, jnp.float64), PARAMS)
        x = jnp.asarray(X, jnp.float64)
        value, slope = jax.value_and_grad(lambda p: jprune.jumpstart_penalty(preacts(p, x), **OPTIONS))(params)
        expected = jax.tree.map(lambda s: 1e-3 * np.asarray(s), slope)
        for coefficient in (1e-3, lambda step: 1e-3):
            link = jprune.add_jumpstart(preacts, coefficient, **OPTIONS)
            updates, _ = link.update(jax.tree.map(jnp.zeros_like, params), link.init(params), params, batch=x)
            chex.assert_trees_all_close(updates, expected, rtol=1e-12)
            fused = jprune.jumpstart.jumpstart_loss(lambda p, x: (jnp.zeros([]), preacts(p, x)), coefficient, **OPTIONS)
            step = {"step": 0} if callable(coefficient) else {}
            np.testing.assert_allclose(fused(params, x, **step), 1e-3 * float(value), rtol=1e-12)


def test_an_option_that_the_penalty_lacks_is_refused_by_name():
    with pytest.raises(TypeError, match="agregate= is not an option of jumpstart_penalty; options: preset, mode, agg"):
        jprune.add_jumpstart(preacts, 1e-3, agregate="norm")


@pytest.mark.parametrize("coefficient", [-1.0, float("inf"), float("nan"), jnp.float32(-1), jnp.full(3, 0.1)])
def test_coefficients_that_no_penalty_can_have_are_refused(coefficient):
    for make in (jprune.add_jumpstart, jprune.jumpstart.jumpstart_loss):
        with pytest.raises(ValueError, match="must be a finite number, 0 or more"):
            make(preacts, coefficient)


def test_missing_arguments_are_named():
    link = jprune.add_jumpstart(preacts, 1.0)
    with pytest.raises(ValueError, match="needs batch"):
        link.update(GRADS, link.init(PARAMS), PARAMS)
    with pytest.raises(ValueError, match="needs params"):
        link.update(GRADS, link.init(PARAMS), batch=X)
    with pytest.raises(ValueError, match="'a'"):
        link.update({"b": GRADS["b"]}, link.init(PARAMS), PARAMS, batch=X)
    with pytest.raises(TypeError, match=r"must return \(loss, preactivations\)"):
        jprune.jumpstart.jumpstart_loss(lambda params: jnp.zeros(()), 1.0)(PARAMS)
    with pytest.raises(ValueError, match="mode='units' is not allowed"):
        jprune.add_jumpstart(preacts, 1.0, mode="units")


def test_after_the_optimizer_it_says_where_it_belongs():
    ascending = jax.tree.map(jnp.ones_like, PARAMS)
    for links, warned in (
        ((jprune.add_jumpstart(preacts, 0.1), optax.sgd(1.0)), False),
        ((optax.sgd(1.0), None), True),
    ):
        tx = optax.chain(*(jprune.add_jumpstart(preacts, 0.1) if link is None else link for link in links))
        state = tx.init(PARAMS)
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            tx.update(ascending, state, PARAMS, batch=X, grad=ascending)
        assert [("put it before the optimizer" in str(w.message)) for w in found] == [True] * warned


def test_on_one_group_of_parameters_it_says_where_it_belongs():
    tx = optax.masked(jprune.add_jumpstart(lambda params, x: [forward(params, x)[0]], 0.1), {"a": True, "b": False})
    with pytest.raises(TypeError, match="MaskedNode") as error:
        tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=X)
    assert "apply add_jumpstart to all parameters" in error.value.__notes__[0]


def test_on_one_group_that_its_preactivations_need_it_adds_the_same_gradient():
    tx = optax.masked(
        jprune.add_jumpstart(lambda params, x: [x @ params["a"]], 2.0, **OPTIONS), {"a": True, "b": False}
    )
    updates, _ = tx.update(GRADS, tx.init(PARAMS), PARAMS, batch=X)
    close(updates, moved(2.0) | {"b": np.asarray(GRADS["b"])})
