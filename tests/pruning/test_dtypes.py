"""Half, single, double precision and mixtures of them under strict promotion; complex weights are refused by name."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune import scores

KERNEL = np.random.default_rng(0).normal(size=(8, 8))
HEAD = np.random.default_rng(1).normal(size=(8, 4))
INPUTS = np.random.default_rng(2).normal(size=(16, 8))
DTYPES = {
    "bfloat16": (jnp.bfloat16, jnp.bfloat16, jnp.float32, 0.05),
    "float16": (jnp.float16, jnp.float16, jnp.float32, 0.005),
    "float32": (jnp.float32, jnp.float32, jnp.float32, 1e-4),
    "float64": (jnp.float64, jnp.float64, jnp.float64, 1e-9),
    "mixed": (jnp.float64, jnp.bfloat16, None, 0.05),
}


@pytest.fixture(params=DTYPES)
def case(request):
    """Parameters, inputs, and the dtype and tolerance of the results."""
    body, head, working, rtol = DTYPES[request.param]
    with jax.enable_x64(request.param in ("float64", "mixed")):
        params = {"body": {"kernel": jnp.asarray(KERNEL, body)}, "head": {"kernel": jnp.asarray(HEAD, head)}}
        yield params, jnp.asarray(INPUTS, body), working, rtol


def apply(params, x):
    # Casts to the dtype of the weights, as a module does; where all have one dtype, the inputs must have it.
    hidden = x @ params["body"]["kernel"]
    head = params["head"]["kernel"]
    return (hidden if hidden.dtype == head.dtype else hidden.astype(head.dtype)) @ head


def wide(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def check(found, expected, working, rtol):
    for name, (body, head) in {"body": (found["body"], expected[0]), "head": (found["head"], expected[1])}.items():
        assert working is None or body["kernel"].dtype == working, name
        np.testing.assert_allclose(
            np.asarray(body["kernel"], np.float64), head, rtol=rtol, atol=rtol * np.abs(head).max()
        )


def test_synflow_runs_the_model_in_its_own_dtype(case):
    params, _, working, rtol = case
    body, head = np.abs(KERNEL), np.abs(HEAD)
    expected = body * head.sum(1), head * body.sum(0)[:, None]
    check(jax.jit(scores.synflow(apply, input_shape=(3, 8)))(params), expected, working, rtol)


def test_wanda_and_the_gradient_scores(case):
    params, x, working, rtol = case
    hidden = INPUTS @ KERNEL
    norms = [np.sqrt((inputs**2).sum(0))[:, None] for inputs in (INPUTS, hidden)]
    expected = np.abs(KERNEL) * norms[0], np.abs(HEAD) * norms[1]
    check(jax.jit(jprune.wanda(apply))(params, batch=x), expected, working, rtol)
    given = jprune.wanda(activations=lambda params, x: {"body": x, "head": x})(params, batch=x)
    check(given, (expected[0], np.abs(HEAD) * norms[0]), working, rtol)
    products = np.abs(KERNEL), np.abs(HEAD)
    total = products[0].sum() + products[1].sum()
    ones = jax.tree.map(lambda w: np.ones(w.shape, w.dtype), params)
    check(jax.jit(scores.snip())(params, ones), [p / total for p in products], working, rtol)


def test_fisher_and_averaged_gradients(case):
    params, x, working, rtol = case
    loss = lambda params, x: jnp.sum(apply(params, x).astype(jnp.float32)) / jnp.float32(len(x))
    slopes = INPUTS[:, :, None] * HEAD.sum(1), np.repeat((INPUTS @ KERNEL)[:, :, None], 4, 2)
    check(jax.jit(scores.fisher(loss))(params, batch=x), [(s**2).mean(0) for s in slopes], working, 4 * rtol)
    check(scores.average_gradients(loss, params, [x]), [s.mean(0) for s in slopes], working, 4 * rtol)


@pytest.fixture(scope="module")
def error_in_single_precision():
    exact = jprune.sparsegpt(
        {"kernel": jnp.asarray(KERNEL, jnp.float32)}, {"": jnp.asarray(INPUTS, jnp.float32)}, sparsity=0.5
    )
    return np.square(INPUTS @ (np.asarray(exact.params["kernel"], np.float64) - KERNEL)).mean()


@pytest.mark.parametrize(
    "case",
    [name if name == "bfloat16" else pytest.param(name, marks=pytest.mark.slow) for name in DTYPES],
    indirect=True,
)
@pytest.mark.slow
def test_sparsegpt_computes_in_single_precision_at_least_and_gives_back_the_dtype(case, error_in_single_precision):
    params, x, _, rtol = case
    pruned = jprune.sparsegpt(params, scores.input_grams(apply, params, [x, x]), sparsity=0.5)
    chex.assert_trees_all_equal_shapes_and_dtypes(pruned.params, params)
    assert int(pruned.masks["body"]["kernel"].sum()) == 32
    # Half precision may choose other weights; the outputs are reconstructed as well.
    error = np.square(INPUTS @ (np.asarray(pruned.params["body"]["kernel"], np.float64) - KERNEL)).mean()
    assert error == pytest.approx(error_in_single_precision, rel=max(0.05, 4 * rtol))


@pytest.mark.optax_promotes  # apply_updates adds float32 to half precision
@pytest.mark.parametrize("threshold", [0.5, pytest.param(1, marks=pytest.mark.slow), optax.constant_schedule(0.5)])
@pytest.mark.quick(4)
def test_proximal_links_give_what_float64_gives(case, threshold):
    params, _, _, rtol = case
    limit = threshold(0) if callable(threshold) else threshold
    groups = [[("body/kernel", 1), ("head/kernel", 0)]]
    body, head = (np.asarray(params[name]["kernel"], np.float64) for name in ("body", "head"))
    norm = np.sqrt((body**2).sum(0) + (head**2).sum(1))
    factor = np.maximum(1 - limit / norm, 0)
    expected = {
        jprune.soft_threshold: [np.sign(w) * np.maximum(np.abs(w) - limit, 0) for w in (body, head)],
        jprune.hard_threshold: [np.where(np.abs(w) > limit, w, 0) for w in (body, head)],
        jprune.group_soft_threshold: [body * factor, head * factor[:, None]],
    }
    for link, wanted in expected.items():
        options = {"groups": groups, "by_size": False} if link is jprune.group_soft_threshold else {}
        tx = link(threshold, **options)

        @jax.jit
        def step(params, tx=tx):
            updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
            return optax.apply_updates(params, updates)

        new = step(params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, params)
        check(new, wanted, None, rtol)
        assert all((np.asarray(n["kernel"])[w == 0] == 0).all() for n, w in zip(new.values(), wanted, strict=True))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
def test_statistics_are_averaged_in_single_precision_at_least(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        x = jnp.asarray(INPUTS, dtype)

        def update(statistics, batch):
            batch = batch.astype(statistics["mean"].dtype)
            near = lambda old, new: jnp.asarray(0.99, old.dtype) * old + jnp.asarray(0.01, old.dtype) * new
            return {"mean": near(statistics["mean"], batch.mean(0)), "var": near(statistics["var"], batch.var(0))}

        start = {"mean": jnp.zeros(8, dtype), "var": jnp.ones(8, dtype)}
        found = jprune.recalibrate_batch_norm(update, start, [x[:4], x[4:]])
        chex.assert_trees_all_equal_shapes_and_dtypes(found, start)
        rounded = np.asarray(x, np.float64)
        rtol = {jnp.bfloat16: 2**-8, jnp.float16: 2**-10, jnp.float64: 1e-5}[dtype]
        np.testing.assert_allclose(np.asarray(found["mean"], np.float64), rounded.mean(0), rtol=rtol, atol=1e-5)
        np.testing.assert_allclose(np.asarray(found["var"], np.float64), rounded.var(0), rtol=rtol)


@pytest.mark.parametrize(
    "use",
    [
        jprune.magnitude(),
        lambda params: jprune.prune(jprune.magnitude(), {0: 0.5}).init(params),
        lambda params: jprune.prune(jprune.magnitude(), {0: 0.5}, where=lambda path, leaf: True).init(params),
        lambda params: jprune.keep_zeros().init(params),
        lambda params: jprune.soft_threshold(0.1).init(params),
        lambda params: jprune.sparsegpt(params, {}, sparsity=0.5),
        jprune.prunable,
    ],
)
def test_complex_weights_are_refused_by_name(use):
    params = {"body": {"kernel": jnp.ones((2, 2))}, "fourier": {"kernel": jnp.ones((2, 2), jnp.complex64)}}
    with pytest.raises(
        ValueError, match=r"selects 'fourier/kernel', which is complex64; .*exclude='\^fourier/kernel\$'"
    ):
        use(params)


def test_complex_weights_that_are_not_selected_are_left_alone():
    params = {"body": {"kernel": jnp.ones((2, 2))}, "fourier": {"weight": jnp.ones(3, jnp.complex64)}}
    assert jprune.magnitude()(params)["fourier"]["weight"] is None


def test_float64_arrays_of_numpy_are_computed_in_single_precision_without_a_warning():
    params = {"body": {"kernel": KERNEL}, "head": {"kernel": HEAD}}
    single = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    for compute in (
        scores.synflow(apply, input_shape=(3, 8)),
        lambda params: jprune.wanda(apply)(params, batch=INPUTS),
        lambda params: scores.average_gradients(lambda params, x: jnp.sum(apply(params, x)), params, [INPUTS]),
    ):
        chex.assert_trees_all_close(compute(params), compute(single), rtol=1e-5)
    link = jprune.soft_threshold(0.5)
    updates, _ = link.update(params, link.init(params), params)
    chex.assert_trees_all_close(updates, link.update(single, link.init(single), single)[0], rtol=1e-5)
    average = lambda old, batch: {"mean": 0.5 * old["mean"] + 0.5 * batch.mean(0)}
    found = jprune.recalibrate_batch_norm(average, {"mean": np.zeros(8)}, [jnp.asarray(INPUTS, jnp.float32)])
    np.testing.assert_allclose(found["mean"], INPUTS.mean(0), rtol=1e-5, atol=1e-6)


@pytest.mark.optax_promotes
def test_rigl_keeps_the_largest_weights_in_eight_bits():
    """A dtype without infinities: the weights that survive must still rank first."""
    params = {"kernel": jnp.asarray([[0, 1, -2, 3], [-4, 5, 0, -7]], jnp.float8_e4m3fn)}
    tx = jprune.rigl(optax.sgd(0.5), 0.5, end=4, every=1)
    grad = jax.tree.map(jnp.ones_like, params)
    _, state = tx.update(grad, tx.init(params), params, grad=grad)
    np.testing.assert_array_equal(jprune.masks_of(state)["kernel"], [[0, 0, 0, 1], [1, 1, 0, 1]])
    assert scores.dense_gradient()(params, grad=grad)["kernel"].dtype == jnp.float32


@pytest.mark.parametrize(
    ("link", "slopes"),
    [
        (jprune.prune(jprune.magnitude(), {0: 0.5}), jnp.float32),
        (jprune.keep_zeros(), jnp.bfloat16),
        (jprune.soft_threshold(0.1), jnp.float8_e5m2),
    ],
)
def test_an_update_that_jax_does_not_add_to_eight_bits_is_refused_by_leaf(link, slopes):
    params = {"kernel": jnp.asarray([[0, 1]], jnp.float8_e5m2)}
    with pytest.raises(
        TypeError, match=r"the parameter 'kernel' is float8_e5m2 and its update is .* cast them in the loss"
    ):
        link.update({"kernel": jnp.ones((1, 2), slopes)}, link.init(params), params)
