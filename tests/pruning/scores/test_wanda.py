"""Wanda's norms layer by layer: in scans, in remat, in recurrent cells, for experts and for given activations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune

RNG = np.random.default_rng(0)
WEIGHTS = RNG.normal(size=(2, 3, 3)).astype(np.float32)
X = RNG.normal(size=(5, 3)).astype(np.float32)
UNREAD = (
    r"reads 'kernel' itself; .* scaled, flipped, sliced or concatenated .*WeightNorm, SpectralNorm, .*transpose_kernel"
    r"=True\)\), or are inside while and cond, are not found; .*activations="
)
STACKED = {"kernel": jprune.KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}


def scanned(params, x, wrap=lambda body: body, turned=False):
    def body(hidden, kernel):
        return jnp.tanh(hidden @ (kernel.T if turned else kernel)), None

    return jax.lax.scan(wrap(body), x, params["kernel"])[0]


def by_numpy(weights, x):
    """|w| ||x|| of every layer of a chain."""
    scores = []
    for w in weights:
        scores.append(np.abs(w) * np.linalg.norm(x, axis=0)[:, None])
        x = np.tanh(x @ w)
    return np.stack(scores)


@pytest.mark.parametrize(
    "apply",
    [
        scanned,
        lambda params, x: scanned(params, x, jax.checkpoint),
        jax.checkpoint(scanned),
        lambda params, x: scanned({"kernel": jnp.swapaxes(params["kernel"], 1, 2)}, x, turned=True),
        lambda params, x: jax.lax.scan(lambda h, _: (scanned(params, h * 0 + x), None), x, length=1)[0],
    ],
    ids=["scan", "remat in scan", "scan in remat", "transposed", "scan in scan"],
)
def test_every_layer_of_a_scan_has_its_own_norms(apply):
    found = jprune.wanda(apply)({"kernel": jnp.asarray(WEIGHTS)}, batch=jnp.asarray(X))["kernel"]
    np.testing.assert_allclose(found, by_numpy(WEIGHTS, X), rtol=1e-5)


def test_squares_are_summed_in_full_precision_whatever_that_of_the_model():
    def score(weights, x):
        return jprune.wanda(lambda w, x: jax.nn.relu(jnp.matmul(x, w, precision="default")))(weights, batch=x)

    program = str(jax.make_jaxpr(score)(jnp.ones((3, 2)), jnp.ones((4, 3))))
    assert program.count("(Precision.DEFAULT, Precision.DEFAULT)") == 1  # the model's own
    assert program.count("(Precision.HIGHEST, Precision.HIGHEST)") == program.count("dot_general") - 1 >= 1


def test_the_weights_of_a_recurrent_cell_add_up_over_the_steps():
    def apply(params, xs):
        def cell(hidden, x):
            return jnp.tanh(x @ params["x/kernel"] + hidden @ params["h/kernel"]), None

        return jax.lax.scan(cell, jnp.zeros((5, 3)), xs)[0]

    xs, (wx, wh) = RNG.normal(size=(4, 5, 3)).astype(np.float32), WEIGHTS
    hidden = [np.zeros((5, 3), np.float32)]
    for x in xs:
        hidden.append(np.tanh(x @ wx + hidden[-1] @ wh))
    params = {"x/kernel": jnp.asarray(wx), "h/kernel": jnp.asarray(wh)}
    found = jprune.wanda(apply)(params, batch=jnp.asarray(xs))
    for name, weight, inputs in (("x/kernel", wx, xs), ("h/kernel", wh, np.stack(hidden[:-1]))):
        norm = np.sqrt((inputs**2).sum((0, 1)))
        np.testing.assert_allclose(found[name], np.abs(weight) * norm[:, None], rtol=1e-5)


def test_given_activations_of_stacked_layers_have_a_norm_for_each_layer():
    x = jnp.stack([jnp.ones((5, 3)), jnp.full((5, 3), 100.0)])
    score = jprune.wanda(activations=lambda params, batch: {"kernel": x}, axes=STACKED)
    found = score({"kernel": jnp.ones((2, 3, 4))}, batch=0)["kernel"]
    np.testing.assert_allclose(found[:, 0, 0], [2.236, 223.6], rtol=1e-4)
    assert found.shape == (2, 3, 4)
    guessed = jprune.wanda(activations=lambda params, batch: {"kernel": x})
    with pytest.warns(UserWarning, match=r"leaf 'kernel' of shape \(2, 3, 4\): wanda treats it as stacked layers"):
        np.testing.assert_array_equal(guessed({"kernel": jnp.ones((2, 3, 4))}, batch=0)["kernel"], found)
    with pytest.raises(ValueError, match=r"leaf 'kernel' of shape \(3, 3, 4\): activations are matched to its inputs"):
        guessed({"kernel": jnp.ones((3, 3, 4))}, batch=0)
    with pytest.raises(ValueError, match=r"gave shape \(2, 5, 3\) for 'kernel'.* must have shape \(3, ..., 3\)"):
        score({"kernel": jnp.ones((3, 3, 4))}, batch=0)


def test_given_activations_fit_the_axes_of_projections_and_convolutions():
    heads = jnp.asarray(RNG.normal(size=(5, 2, 3)), jnp.float32)
    axes = {
        "out": jprune.KernelAxes(inputs=(0, 1), outputs=(2,)),
        "conv": jprune.KernelAxes(spatial=(0,), inputs=(1,), outputs=(2,)),
    }
    score = jprune.wanda(
        activations=lambda params, batch: {"out": heads, "conv": heads}, axes=axes, where=lambda *_: True
    )
    found = score({"out": jnp.ones((2, 3, 4)), "conv": jnp.ones((7, 3, 4))}, batch=0)
    norm = np.sqrt((np.asarray(heads) ** 2).sum(0))
    np.testing.assert_allclose(found["out"], np.broadcast_to(norm[..., None], (2, 3, 4)), rtol=1e-6)
    over_positions = np.sqrt((np.asarray(heads) ** 2).sum((0, 1)))
    np.testing.assert_allclose(found["conv"], np.broadcast_to(over_positions[None, :, None], (7, 3, 4)), rtol=1e-6)


def test_experts_without_examples_are_named_and_not_scored_zero():
    def mixture(params, batch):
        x, expert = batch
        dispatched = jnp.einsum("ne,ni->eni", jax.nn.one_hot(expert, 3), x)
        return jnp.einsum("eni,eio->eno", dispatched, params["kernel"])

    x, weights = jnp.asarray(X), jnp.asarray(RNG.normal(size=(3, 3, 2)), jnp.float32)
    batch = (x, jnp.array([0, 2, 2, 0, 0]))
    score = jprune.wanda(mixture, axes=STACKED)
    with pytest.warns(UserWarning, match=r"no example of the batch reached 'kernel\[1\]'; they get the mean norm of"):
        found = score({"kernel": weights}, batch=batch)["kernel"]
    squares = np.stack([(X[[0, 3, 4]] ** 2).sum(0), np.zeros(3), (X[[1, 2]] ** 2).sum(0)])
    squares[1] = (squares[0] + squares[2]) / 2
    np.testing.assert_allclose(found, np.abs(weights) * np.sqrt(squares)[..., None], rtol=1e-5)
    with pytest.warns(UserWarning, match=r"reached 'kernel\[1\]'; their scores are 0; .*axes= if these are experts"):
        assert (jprune.wanda(mixture)({"kernel": weights}, batch=batch)["kernel"][1] == 0).all()


def test_rows_of_a_convolution_that_see_only_padding_are_not_taken_for_experts():
    def apply(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, params["kernel"], (1, 1), "SAME", dimension_numbers=numbers)

    found = jprune.wanda(apply)({"kernel": jnp.ones((3, 5, 2, 2))}, batch=jnp.ones((1, 1, 8, 2)))["kernel"]
    # Images of height 1: only the middle row reads them, at 6, 7, 8, 7 and 6 of 8 positions.
    np.testing.assert_allclose(found[1, :, 0, 0], np.sqrt([6.0, 7.0, 8.0, 7.0, 6.0]), rtol=1e-6)
    assert not np.any(found[0::2])


def test_inputs_that_are_zero_are_not_taken_for_experts_but_layers_of_a_scan_are_named():
    x = jnp.asarray(X).at[:, 0].set(0.0)
    heads = lambda params, batch: jnp.einsum("ni,iho->nho", batch, params["kernel"])  # the first axis has the inputs
    assert not np.any(jprune.wanda(heads)({"kernel": jnp.ones((3, 2, 4))}, batch=x)["kernel"][0])
    turned = lambda params, batch: scanned({"kernel": jnp.swapaxes(params["kernel"], 0, 1)}, batch)  # (in, layers, out)
    assert not np.any(jprune.wanda(turned)({"kernel": jnp.ones((3, 2, 3))}, batch=x)["kernel"][0, 0])
    dead = jnp.ones((2, 3, 3)).at[0].set(0.0)  # the second layer has no input but zeros
    with pytest.warns(UserWarning, match=r"reached 'kernel\[1\]'; their scores are 0; .*axes= if these are experts"):
        jprune.wanda(scanned)({"kernel": dead}, batch=jnp.asarray(X))


def test_a_product_inside_a_while_loop_is_an_error_that_says_so():
    def apply(params, x):
        return jax.lax.while_loop(lambda c: c[0] < 2, lambda c: (c[0] + 1, c[1] @ params["kernel"]), (0, x))[1]

    with pytest.raises(ValueError, match=UNREAD):
        jprune.wanda(apply)({"kernel": jnp.ones((3, 3))}, batch=jnp.ones((1, 3)))


@pytest.mark.parametrize(
    "read",
    [
        lambda kernel: 2 * kernel,
        lambda kernel: kernel / jnp.linalg.norm(kernel, axis=0, keepdims=True),
        lambda kernel: kernel[::-1],
        lambda kernel: kernel[:, :2],
        lambda kernel: jnp.concatenate([kernel, jnp.ones((3, 1))], axis=1),
    ],
    ids=["scaled", "normalized", "flipped", "sliced", "concatenated"],
)
def test_a_product_that_reads_a_changed_kernel_is_an_error_that_names_the_change(read):
    with pytest.raises(ValueError, match=UNREAD):
        jprune.wanda(lambda params, x: x @ read(params["kernel"]))({"kernel": jnp.ones((3, 3))}, batch=jnp.ones((1, 3)))


def power_iteration(params, x):
    """Spectral normalization: products with the kernel itself compute the number by which it is divided."""
    kernel, u = params["kernel"], jnp.ones((1, 4))
    v = u @ kernel.T
    sigma = (v / jnp.linalg.norm(v)) @ kernel @ u.T
    return x @ (kernel / sigma)


@pytest.mark.parametrize(
    "apply",
    [
        power_iteration,
        lambda params, x: jax.lax.scan(lambda x, _: (x + power_iteration(params, x)[:, :1], 0), x, length=2)[0],
        lambda params, x: (x @ params["kernel"]) @ (2 * params["kernel"]).T,
        lambda params, x: (
            x @ params["kernel"] + jax.lax.cond(x[0, 0] > 0, lambda k: x @ k, lambda k: -x @ k, params["kernel"])
        ),
    ],
    ids=["divided", "divided in a scan", "scaled", "in a cond"],
)
def test_a_kernel_that_is_read_by_products_that_are_not_found_too_is_an_error(apply):
    """The vectors of the power iteration of SpectralNorm were taken for the inputs of the layer."""
    params, x = {"kernel": jnp.ones((3, 4))}, jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"not every matrix product .* reads 'kernel' itself; .*SpectralNorm"):
        jprune.wanda(apply)(params, batch=x)
    with pytest.raises(ValueError, match=r"not every matrix product .* reads 'kernel' itself|not sum over its axes"):
        jprune.scores.input_grams(apply, params, [x])


def test_data_to_which_a_weight_is_added_do_not_hide_the_kernel_that_reads_them():
    def apply(params, x):
        return (x + params["positions"]) @ params["kernel"]

    params, x = {"positions": jnp.ones((5, 3)), "kernel": jnp.asarray(WEIGHTS[0])}, jnp.asarray(X)
    found = jprune.wanda(apply)(params, batch=x)["kernel"]
    np.testing.assert_allclose(found, by_numpy(WEIGHTS[:1], X + 1)[0], rtol=1e-5)


def test_experts_that_ragged_dot_reads_are_an_error_that_names_it():
    apply = lambda params, x: jax.lax.ragged_dot(x, params["kernel"], jnp.array([2, 3]))
    with pytest.raises(ValueError, match=r"no matrix product .* reads 'kernel' itself; ragged_dot and "):
        jprune.wanda(apply)({"kernel": jnp.asarray(WEIGHTS)}, batch=jnp.asarray(X))
