"""Proximal transformations: steps computed by hand, and convex problems with known minimizers."""

import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import optax
import pytest
from sklearn.linear_model import Lasso

import jprune
from jprune.graph.axes import KernelAxes
from jprune.pruning import proximal

EVERY = lambda path, leaf: True


def stepped(tx, params, updates):
    changed, state = tx.update(updates, tx.init(params), params)
    return optax.apply_updates(params, changed), state


def test_soft_and_hard_thresholds_of_a_step_worked_out_by_hand():
    params = {"kernel": jnp.array([[1.0, -1.0, 0.25, 0.0]]), "bias": jnp.array([0.25])}
    updates = {"kernel": jnp.array([[0.5, 0.75, 0.125, 2.0]]), "bias": jnp.array([0.25])}
    soft, _ = stepped(proximal.soft_threshold(0.5), params, updates)  # of 1.5, -.25, .375, 2
    np.testing.assert_array_equal(soft["kernel"], [[1.0, 0.0, 0.0, 1.5]])
    np.testing.assert_array_equal(soft["bias"], [0.5])  # where= selects kernels
    hard, _ = stepped(proximal.hard_threshold(0.25), params, updates)
    np.testing.assert_array_equal(hard["kernel"], [[1.5, 0.0, 0.375, 2.0]])


def test_groups_of_outputs_and_inputs_worked_out_by_hand():
    params = {"kernel": jnp.array([[3.0, 0.0], [4.0, 1.0]])}
    still = {"kernel": jnp.zeros((2, 2))}
    outputs, _ = stepped(proximal.group_soft_threshold(1.0, by_size=False), params, still)
    np.testing.assert_allclose(outputs["kernel"], [[2.4, 0.0], [3.2, 0.0]], rtol=1e-6)  # norms 5 and 1
    inputs, _ = stepped(proximal.group_soft_threshold(2.0, over="inputs"), params, still)
    shrink = [1 - 2 * 2**0.5 / 3, 1 - 2 * 2**0.5 / 17**0.5]  # norms 3 and sqrt(17), sizes 2
    np.testing.assert_allclose(inputs["kernel"], [[3 * shrink[0], 0], [4 * shrink[1], shrink[1]]], rtol=1e-5)


def test_a_channel_in_several_leaves_is_one_group():
    params = {
        "one": {"kernel": jnp.array([[3.0, 0.1]]), "bias": jnp.array([0.0, 0.1])},
        "two": {"kernel": jnp.array([[4.0], [0.1]])},
        "norm": {"scale": jnp.array([7.0])},
    }
    groups = [[("one/kernel", -1), ("one/bias", 0), ("two/kernel", 0)]]
    tx = proximal.group_soft_threshold(1.0, groups=groups, by_size=False)
    new, _ = stepped(tx, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(new["one"]["kernel"], [[2.4, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(new["one"]["bias"], [0.0, 0.0])
    np.testing.assert_allclose(new["two"]["kernel"], [[3.2], [0.0]], rtol=1e-6)
    np.testing.assert_array_equal(new["norm"]["scale"], [7.0])


def test_stacked_layers_have_separate_groups():
    params = {"kernel": jnp.array([[[3.0], [4.0]], [[0.3], [0.4]]])}
    axes = {"kernel": KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
    tx = proximal.group_soft_threshold(1.0, axes=axes, by_size=False)
    new, _ = stepped(tx, params, {"kernel": jnp.zeros((2, 2, 1))})
    np.testing.assert_allclose(new["kernel"], [[[2.4], [3.2]], [[0.0], [0.0]]], rtol=1e-6)


def test_the_inputs_of_each_feature_group_are_separate_groups():
    filters = jnp.array([5.0, 0.01, 5.0, 0.01])
    kernel = jnp.broadcast_to(filters.reshape(1, 1, 1, 4), (3, 3, 1, 4))
    depthwise = KernelAxes(spatial=(0, 1), inputs=(2,), outputs=(3,), groups=4)
    tx = proximal.group_soft_threshold(0.1, over="inputs", by_size=False, axes={"": depthwise})
    new, _ = stepped(tx, {"kernel": kernel}, {"kernel": jnp.zeros_like(kernel)})
    # Each filter has norm 3 |w|: 15 and .03.
    np.testing.assert_allclose(new["kernel"][1, 2, 0], [5 * (1 - 0.1 / 15), 0, 5 * (1 - 0.1 / 15), 0], rtol=1e-6)

    dense = jnp.array([[3.0, 4.0, 0.3, 0.4], [0.3, 0.4, 6.0, 8.0]])  # norms 5 and .5, .5 and 10
    wanted = np.array([[2.4, 3.2, 0.0, 0.0], [0.0, 0.0, 5.4, 7.2]])
    for stack, roles in (
        (dense, KernelAxes(inputs=(0,), outputs=(1,), groups=2)),
        (dense.T, KernelAxes(inputs=(1,), outputs=(0,), groups=2)),
        (jnp.stack([dense, 0.1 * dense]), KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,), groups=2)),
    ):
        tx = proximal.group_soft_threshold(1.0, over="inputs", by_size=False, axes={"": roles})
        new, _ = stepped(tx, {"kernel": stack}, {"kernel": jnp.zeros_like(stack)})
        expected = {2: wanted if stack.shape == (2, 4) else wanted.T, 3: np.stack([wanted, 0 * wanted])}[stack.ndim]
        np.testing.assert_allclose(new["kernel"], expected, rtol=1e-6)
    tx = proximal.group_soft_threshold(1.0, over="inputs", axes={"": KernelAxes(inputs=(0,), outputs=(1,), groups=2)})
    new, _ = stepped(tx, {"kernel": dense}, {"kernel": jnp.zeros_like(dense)})
    shrink = [1 - 2**0.5 / 5, 1 - 2**0.5 / 10]  # two weights in each group
    np.testing.assert_allclose(new["kernel"][0, :2], np.array([3.0, 4.0]) * shrink[0], rtol=1e-6)
    np.testing.assert_allclose(new["kernel"][1, 2:], np.array([6.0, 8.0]) * shrink[1], rtol=1e-6)


def test_a_weight_in_overlapping_groups_has_the_factors_of_both():
    kernel = np.array([[3.0, 1.0, 0.5], [1.0, 0.5, 0.1], [0.1, 0.2, 0.3]])
    row, column = np.linalg.norm(kernel, axis=1, keepdims=True), np.linalg.norm(kernel, axis=0, keepdims=True)
    wanted = kernel * np.maximum(1 - 0.7 / row, 0) * np.maximum(1 - 0.7 / column, 0)
    tx = proximal.group_soft_threshold(0.7, groups=[[("w", 0)], [("w", 1)]], by_size=False)
    params = {"w": jnp.asarray(kernel, jnp.float32)}
    new, _ = stepped(tx, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(new["w"], wanted, rtol=1e-5)
    # The groups of norm at most .7, the last row and the last column, are exactly zero.
    np.testing.assert_array_equal(np.asarray(new["w"]) == 0, [[False] * 2 + [True]] * 2 + [[True] * 3])


def test_a_threshold_may_be_a_schedule():
    params = (jnp.array([2.0]),)
    tx = proximal.soft_threshold(lambda step: 0.5 * step.astype(jnp.float32), where=EVERY)
    state = tx.init(params)
    for wanted in (2.0, 1.5, 0.5, 0.0):
        updates, state = jax.jit(tx.update)((jnp.zeros(1),), state, params)
        params = optax.apply_updates(params, updates)
        np.testing.assert_array_equal(params[0], [wanted])


@pytest.mark.optax_promotes
@pytest.mark.parametrize("name", ["sgd", "momentum", "adam", "adafactor", "lion"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_zeros_are_exact_after_any_optimizer(name, dtype):
    base = {
        "sgd": optax.sgd(0.1),
        "momentum": optax.sgd(0.1, momentum=0.9),
        "adam": optax.adam(0.1),
        "adafactor": optax.adafactor(0.1),
        "lion": optax.lion(0.1),
    }[name]
    tx = optax.chain(base, proximal.soft_threshold(0.07))
    random = np.random.default_rng(0)
    params = {"kernel": jnp.asarray(random.normal(size=(4, 8)), dtype)}
    gradients = {"kernel": jnp.asarray(random.normal(size=(4, 8)), dtype)}
    state = tx.init(params)
    base_updates, _ = base.update(gradients, base.init(params), params)
    moved = jax.tree.map(lambda p, u: p.astype(jnp.float32) + u.astype(jnp.float32), params, base_updates)
    updates, state = tx.update(gradients, state, params)
    new = optax.apply_updates(params, updates)
    assert new["kernel"].dtype == dtype
    zero = np.abs(np.asarray(moved["kernel"])) <= np.float32(0.07)
    np.testing.assert_array_equal(np.asarray(new["kernel"] == 0), zero)


@pytest.fixture(scope="module")
def regression():
    random = np.random.default_rng(0)
    x = random.normal(size=(60, 12))
    y = x @ np.where(np.arange(12) < 4, random.normal(size=12), 0) + 0.3 * random.normal(size=60)
    return x.astype(np.float32), y.astype(np.float32)


def minimized(tx, x, y, steps=3000):
    loss = lambda params: jnp.mean(jnp.square(x @ params["kernel"][:, 0] - y)) / 2

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    params = {"kernel": jnp.zeros((x.shape[1], 1))}
    (params, _), _ = jax.jit(functools.partial(jax.lax.scan, step, length=steps))((params, tx.init(params)))
    return np.asarray(params["kernel"][:, 0])


def test_gradient_descent_with_soft_thresholds_solves_the_lasso_as_scikit_learn_does(regression):
    x, y = regression
    wanted = Lasso(alpha=0.2, fit_intercept=False, tol=1e-10, max_iter=100_000).fit(x, y).coef_
    found = minimized(optax.chain(optax.sgd(0.2), proximal.soft_threshold(0.2 * 0.2)), x, y)
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    np.testing.assert_array_equal(found == 0, wanted == 0)
    assert 2 < (found == 0).sum() < 12
    momentum = optax.chain(optax.sgd(0.02, momentum=0.9), proximal.soft_threshold(0.02 * 0.2))
    assert (minimized(momentum, x, y) == 0).any()


def test_the_group_lasso_of_an_orthonormal_design_is_the_thresholded_least_squares_solution(regression):
    x, y = regression
    orthonormal = np.linalg.qr(x)[0].astype(np.float32) * np.float32(len(x) ** 0.5)
    least_squares = orthonormal.T @ y / len(x)
    sets = least_squares.reshape(4, 3)
    norms = np.linalg.norm(sets, axis=1, keepdims=True)
    penalty = 0.25
    wanted = sets * np.maximum(1 - penalty * 3**0.5 / norms, 0)
    assert 0 < (norms < penalty * 3**0.5).sum() < 4
    # The twelve weights of the one output, seen as a kernel of four outputs with three inputs each.
    loss = lambda params: jnp.mean(jnp.square(orthonormal @ params["kernel"].T.reshape(-1) - y)) / 2
    tx = optax.chain(optax.sgd(0.5), proximal.group_soft_threshold(0.5 * penalty))
    params = {"kernel": jnp.zeros((3, 4))}
    state = tx.init(params)
    step = jax.jit(lambda params, state: tx.update(jax.grad(loss)(params), state, params))
    for _ in range(60):
        updates, state = step(params, state)
        params = optax.apply_updates(params, updates)
    np.testing.assert_allclose(params["kernel"].T, wanted, atol=1e-5)
    np.testing.assert_array_equal(np.asarray(params["kernel"].T) == 0, wanted == 0)


def test_keep_zeros_trains_on_with_the_zeros_that_a_penalty_made(regression):
    x, y = regression
    found = minimized(optax.chain(optax.sgd(0.2), proximal.soft_threshold(0.04)), x, y, steps=300)
    params = {"kernel": jnp.asarray(found)[:, None]}
    tx = optax.chain(optax.sgd(0.1), jprune.keep_zeros())
    updates, _ = tx.update({"kernel": jnp.ones((12, 1))}, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(np.asarray(new["kernel"] == 0)[:, 0], found == 0)


def _without_params(tx):
    return tx.update(KERNEL, tx.init(KERNEL))


KERNEL = {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
TIED = KernelAxes(inputs=(0, 1), outputs=(0, 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: proximal.soft_threshold(-1.0), r"threshold=-1.0 must be one number, 0 or more"),
        (lambda: _without_params(proximal.hard_threshold(1.0)), "hard_threshold needs params"),
        (lambda: proximal.soft_threshold(1.0).init({"a": jnp.ones(3)}), "where=kernels selects no float leaf"),
        (lambda: proximal.group_soft_threshold(1.0, over="rows"), "over='rows' is unknown"),
        (
            lambda: proximal.group_soft_threshold(1.0).init({"kernel": jnp.ones((2, 3, 4))}),
            r"leaf 'kernel' of shape \(2, 3, 4\): a group has the weights of one of its outputs",
        ),
        (
            lambda: proximal.group_soft_threshold(1.0, groups=[[("kernel", -1), ("norm", 0)]]).init(KERNEL),
            "groups names 'norm', which is not a float leaf",
        ),
        (
            lambda: proximal.group_soft_threshold(1.0, groups=[[("kernel", 0), ("bias", 0)]]).init(KERNEL),
            r"sizes differ: 2 \('kernel', axis 0\), 3 \('bias', axis 0\)",
        ),
        (
            lambda: proximal.group_soft_threshold(1.0, groups=[[("kernel", 1), ("kernel", -1)]]).init(KERNEL),
            "names axis -1 of 'kernel' twice",
        ),
        (
            lambda: proximal.group_soft_threshold(1.0, axes={"": TIED}).init(KERNEL),
            r"leaf 'kernel' is read in two ways .*, so its outputs are not separate groups; leave it out with where=",
        ),
        (
            lambda: proximal.group_soft_threshold(1.0, groups=[[("kernel", 2)]]).init(KERNEL),
            r"axis 2 of 'kernel', which has shape \(2, 3\)",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.optax_promotes
@pytest.mark.parametrize("link", [jprune.soft_threshold, jprune.hard_threshold, jprune.group_soft_threshold])
def test_a_threshold_can_be_injected_and_changed(link):
    params = {"kernel": jnp.array([[3.0, -0.5], [4.0, 0.0]])}
    tx = optax.inject_hyperparams(link)(threshold=0.1)
    state = tx.init(params)
    plain = link(2.0)
    state.hyperparams["threshold"] = jnp.float32(2.0)
    for update in (tx.update, jax.jit(tx.update)):
        updates, _ = update(jax.tree.map(jnp.zeros_like, params), state, params)
        wanted, _ = plain.update(jax.tree.map(jnp.zeros_like, params), plain.init(params), params)
        np.testing.assert_allclose(updates["kernel"], wanted["kernel"], rtol=1e-6)


def test_parameters_in_the_state_can_be_mapped():
    tx = optax.chain(optax.trace(0.9), jprune.soft_threshold(0.1))
    state = tx.init({"kernel": jnp.ones((2, 2))})
    doubled = optax.tree.map_params(tx, lambda leaf: leaf + 2.0, state)
    np.testing.assert_array_equal(doubled[0].trace["kernel"], np.full((2, 2), 2.0))
    assert int(doubled[1].count) == 0


def test_a_threshold_that_is_not_a_number_is_refused():
    with pytest.raises((TypeError, jaxtyping.TypeCheckError), match="threshold"):
        jprune.soft_threshold("0.1")


def test_a_graph_selects_the_kernels_that_have_the_penalty():
    params = {"w": jnp.array([[3.0, 0.3], [4.0, 0.4]]), "kernel": jnp.ones((2, 2))}
    graph = jprune.trace_model(lambda p, x: x @ p["w"] + p["kernel"], params, jax.ShapeDtypeStruct((2, 2), jnp.float32))
    tx = proximal.group_soft_threshold(1.0, by_size=False, axes=graph)
    new, _ = stepped(tx, params, jax.tree.map(jnp.zeros_like, params))
    np.testing.assert_allclose(new["w"], [[2.4, 0.0], [3.2, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(new["kernel"], params["kernel"])


def test_the_channels_of_a_traced_network_are_groups():
    """Two heads of three units: a channel is a head, three columns of the first kernel and three rows of the second."""
    random = np.random.default_rng(3)
    first, second = random.normal(size=(4, 6)), random.normal(size=(6, 2))
    first[:, :3], second[:3] = 0.1 * first[:, :3], 0.1 * second[:3]
    params = {"first": jnp.asarray(first, jnp.float32), "second": jnp.asarray(second, jnp.float32)}

    def apply(params, x):
        heads = (x @ params["first"]).reshape(-1, 2, 3)
        heads = heads / (1 + jnp.sum(heads * heads, axis=2, keepdims=True))
        return heads.reshape(-1, 6) @ params["second"]

    graph = jprune.trace_model(apply, params, jax.ShapeDtypeStruct((5, 4), jnp.float32))
    limit = 0.3
    groups = {(g.size, tuple((m.path, m.axis, m.indices.shape) for m in g.members)) for g in graph.channels}
    assert groups == {(2, (("first", 1, (2, 3)), ("second", 0, (2, 3))))}
    tx = proximal.group_soft_threshold(limit, groups=graph.channels)
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
    new = optax.apply_updates(params, updates)
    for head in range(2):
        own = slice(3 * head, 3 * head + 3)
        norm = np.sqrt((first[:, own] ** 2).sum() + (second[own] ** 2).sum())
        factor = max(1 - limit * np.sqrt(18) / norm, 0)  # (4 + 2) * 3 weights
        np.testing.assert_allclose(new["first"][:, own], factor * first[:, own], rtol=1e-5)
        np.testing.assert_allclose(new["second"][own], factor * second[own], rtol=1e-5)
    assert (np.asarray(new["first"]) == 0).all(0).tolist() == [True] * 3 + [False] * 3
