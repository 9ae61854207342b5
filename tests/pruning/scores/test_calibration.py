"""SparseGPT against its published algorithm in float64 numpy, and on a real layer against Wanda and magnitude."""

import dataclasses
import gc
import itertools
import weakref

import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from sklearn.datasets import load_digits

import jprune
from jprune.graph.axes import KernelAxes
from jprune.pruning.scores import calibration
from jprune.pruning.scores.calibration import Gram, input_grams, sparsegpt
from tests.pruning.steps import compilations


def published(weights, gram, *, sparsity=None, n=None, m=None, mask=None, block=128, damping=0.01):
    """Algorithm 1 of arXiv 2301.00774 on weights (outputs, inputs), column by column, in float64."""
    w = np.array(weights, np.float64)
    rows, columns = w.shape
    hessian = np.array(gram, np.float64)
    hessian += np.eye(columns) * damping * np.mean(np.diag(hessian))
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T  # H^-1 = U^T U
    kept = np.ones((rows, columns), bool)
    done = 0
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        errors = np.zeros((rows, stop - start))
        if mask is not None:
            kept[:, start:stop] = mask[:, start:stop]
        elif sparsity is not None:
            saliency = w[:, start:stop] ** 2 / np.diag(upper)[start:stop] ** 2
            pruned = round(rows * stop * (1 - sparsity)) - done
            done += pruned
            order = np.argsort(-saliency, axis=None, kind="stable")
            chosen = np.zeros(saliency.size, bool)
            chosen[order[:pruned]] = True
            kept[:, start:stop] = chosen.reshape(saliency.shape)
        for j in range(start, stop):
            if n is not None and j % m == 0:
                saliency = w[:, j : j + m] ** 2 / np.diag(upper)[j : j + m] ** 2
                best = np.argsort(-saliency, axis=1, kind="stable")[:, :n]
                kept[:, j : j + m] = False
                np.put_along_axis(kept[:, j : j + m], best, True, axis=1)
            errors[:, j - start] = np.where(kept[:, j], 0.0, w[:, j] / upper[j, j])
            w[:, j:stop] -= np.outer(errors[:, j - start], upper[j, j:stop])
            w[~kept[:, j], j] = 0.0
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return w, kept


def _layer(inputs, outputs, seed=0):
    random = np.random.default_rng(seed)
    mixing = random.normal(size=(inputs, inputs)) / np.sqrt(inputs)
    x = random.normal(size=(4 * inputs, inputs)) @ mixing
    return x.astype(np.float32), random.normal(size=(inputs, outputs)).astype(np.float32)


@pytest.mark.parametrize(
    ("options", "inputs"),
    [
        ({"sparsity": 0.5, "block": 16}, 40),  # two whole blocks and a rest
        pytest.param({"sparsity": 0.7, "block": 128}, 40, marks=pytest.mark.slow),  # one block, smaller than asked for
        ({"n": 2, "m": 4, "block": 16}, 48),
    ],
)
def test_weights_and_masks_are_those_of_the_published_algorithm(options, inputs):
    x, kernel = _layer(inputs, 12)
    wanted, kept = published(kernel.T, x.astype(np.float64).T @ x, **options)
    found = sparsegpt({"kernel": jnp.asarray(kernel)}, {"kernel": jnp.asarray(x)}, **options)
    np.testing.assert_array_equal(found.masks["kernel"], kept.T)
    np.testing.assert_allclose(found.params["kernel"], wanted.T, rtol=2e-3, atol=2e-4)
    assert (np.asarray(found.params["kernel"])[~kept.T] == 0).all()


def test_the_number_kept_is_that_of_other_selections():
    """Of 25 weights 12.5 would be kept: 12, the even number."""
    x, kernel = _layer(5, 5)
    found = sparsegpt({"kernel": jnp.asarray(kernel)}, {"kernel": jnp.asarray(x)}, sparsity=0.5, block=2)
    assert int(found.masks["kernel"].sum()) == 12
    assert jprune.selection.layer_counts({"kernel": kernel}, sparsity=0.5) == [12]


def test_segments_change_nothing(monkeypatch):
    x, kernel = _layer(36, 5)
    wanted, kept = published(kernel.T, x.astype(np.float64).T @ x, n=1, m=4, block=8)
    monkeypatch.setattr(calibration, "_SEGMENTS", 2)
    monkeypatch.setattr(calibration, "_SEGMENT_ROWS", 8)
    found = sparsegpt({"kernel": jnp.asarray(kernel)}, {"kernel": jnp.asarray(x)}, n=1, m=4, block=8)
    np.testing.assert_array_equal(found.masks["kernel"], kept.T)
    np.testing.assert_allclose(found.params["kernel"], wanted.T, rtol=2e-3, atol=2e-4)


def test_given_masks_are_kept_and_only_the_weights_change():
    x, kernel = _layer(24, 6)
    mask = np.random.default_rng(1).random((24, 6)) < 0.5
    wanted, _ = published(kernel.T, x.astype(np.float64).T @ x, mask=mask.T, block=8)
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.ones(6)}
    found = sparsegpt(params, {"": jnp.asarray(x)}, masks={"kernel": jnp.asarray(mask), "bias": None}, block=8)
    np.testing.assert_array_equal(found.masks["kernel"], mask)
    np.testing.assert_allclose(found.params["kernel"], wanted.T, rtol=2e-3, atol=2e-4)
    assert found.params["bias"] is params["bias"]


def test_a_pruned_input_is_taken_over_by_its_duplicate_worked_out_by_hand():
    # x = (a, a, b) with a^2 summing to 5 and b^2 to 9, no damping beyond rounding: 0.5 of the second input moves to
    # the third only if they correlate, and to the first not at all, because earlier inputs are fixed.
    x = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]])
    first = sparsegpt({"kernel": jnp.array([[0.5], [1.0], [1.0]])}, {"kernel": x}, sparsity=1 / 3, damping=1e-5)
    np.testing.assert_allclose(first.params["kernel"][:, 0], [0.0, 1.5, 1.0], atol=1e-3)


def test_an_input_that_is_always_zero_is_pruned_first_and_otherwise_unchanged():
    x, kernel = _layer(6, 4)
    x[:, [1, 4]] = 0
    found = sparsegpt({"kernel": jnp.asarray(kernel)}, {"kernel": jnp.asarray(x)}, sparsity=0.5, damping=0.0)
    assert not found.masks["kernel"][jnp.array([1, 4])].any()
    light = sparsegpt({"kernel": jnp.asarray(kernel)}, {"kernel": jnp.asarray(x)}, sparsity=1 / 24, damping=0.0)
    assert int(light.masks["kernel"].sum()) == 23
    np.testing.assert_array_equal(light.params["kernel"][1], kernel[1])


def test_inputs_that_are_always_zero_do_not_raise_the_damping():
    """They counted as 1 in the mean of the diagonal, so that small activations were damped a million times as much."""
    x, kernel = _layer(6, 4)
    x[:, 1] = 0
    params = {"kernel": jnp.asarray(kernel)}
    large, small = (sparsegpt(params, {"kernel": jnp.asarray(x * scale)}, sparsity=0.5) for scale in (1.0, 1e-3))
    np.testing.assert_array_equal(large.masks["kernel"], small.masks["kernel"])
    np.testing.assert_allclose(large.params["kernel"], small.params["kernel"], rtol=1e-4, atol=1e-5)


def test_stacked_layers_are_pruned_as_single_ones_are():
    layers = [_layer(12, 5, seed) for seed in range(2)]
    axes = {"kernel": KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
    stack = {"kernel": jnp.stack([kernel for _, kernel in layers])}
    x = jnp.stack([x for x, _ in layers])
    found = sparsegpt(stack, {"kernel": x}, sparsity=0.5, axes=axes)
    for i, (own, kernel) in enumerate(layers):
        alone = sparsegpt({"kernel": jnp.asarray(kernel)}, {"kernel": jnp.asarray(own)}, sparsity=0.5)
        np.testing.assert_array_equal(found.masks["kernel"][i], alone.masks["kernel"])
        np.testing.assert_allclose(found.params["kernel"][i], alone.params["kernel"], rtol=1e-4, atol=1e-5)


def test_grams_add_up_over_batches_and_uses_of_a_dense_kernel():
    x, kernel = _layer(6, 6)

    def apply(params, x):
        return jnp.tanh(x @ params["kernel"]) @ params["kernel"]

    grams = input_grams(apply, {"kernel": jnp.asarray(kernel)}, [jnp.asarray(x[:10]), jnp.asarray(x[10:])])
    hidden = np.tanh(x.astype(np.float64) @ kernel)
    np.testing.assert_allclose(grams["kernel"].matrix, x.T @ x + hidden.T @ hidden, rtol=1e-4, atol=1e-3)


def test_grams_of_an_equinox_model_with_a_function_among_its_leaves():
    model = equinox.nn.MLP(3, 2, width_size=4, depth=1, activation=jax.nn.relu, key=jax.random.key(0))
    x, _ = _layer(3, 2)
    grams = input_grams(lambda model, x: jax.vmap(model)(x), model, [x[:2], x[2:]], axes="equinox")
    hidden = np.maximum(x @ np.asarray(model.layers[0].weight).T + np.asarray(model.layers[0].bias), 0)
    np.testing.assert_allclose(grams["layers/0/weight"].matrix, x.T @ x, rtol=1e-5)
    np.testing.assert_allclose(grams["layers/1/weight"].matrix, hidden.T @ hidden, rtol=1e-5, atol=1e-6)


def test_grams_of_transposed_kernels_and_several_input_axes_follow_the_kernel():
    x = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)
    flat = x.reshape(7, 6)
    several = {"out": {"kernel": jnp.ones((2, 3, 4))}}
    axes = {"out/kernel": KernelAxes(inputs=(0, 1), outputs=(2,))}
    einsum = lambda params, x: jnp.einsum("bhd,hdo->bo", x, params["out"]["kernel"])
    grams = input_grams(einsum, several, [jnp.asarray(x)], axes=axes)
    np.testing.assert_allclose(grams["out/kernel"].matrix, flat.T @ flat, rtol=1e-5, atol=1e-5)

    torch_like = {"weight": jnp.ones((4, 6))}
    grams = input_grams(lambda params, x: x @ params["weight"].T, torch_like, [jnp.asarray(flat)])
    np.testing.assert_allclose(grams["weight"].matrix, flat.T @ flat, rtol=1e-5, atol=1e-5)
    pruned = sparsegpt(torch_like, grams, sparsity=0.5)
    np.testing.assert_array_equal(pruned.masks["weight"].sum(), 12)


def test_grams_of_vmapped_layers_are_one_for_each():
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype(np.float32)
    axes = {"kernel": KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
    apply = lambda params, x: jax.vmap(jnp.matmul)(x, params["kernel"])
    grams = input_grams(apply, {"kernel": jnp.ones((3, 4, 2))}, [jnp.asarray(x)], axes=axes)
    np.testing.assert_allclose(grams["kernel"].matrix, np.einsum("lbi,lbj->lij", x, x), rtol=1e-5, atol=1e-5)


def test_experts_that_read_the_same_inputs_have_the_same_gram():
    """The product has experts and outputs as its free axes, in either order."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
    axes = {"": KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
    params = {"kernel": jnp.ones((2, 3, 4))}
    for product in ("bd,edf->ebf", "bd,edf->bfe"):
        apply = lambda p, x, product=product: jnp.einsum(product, x, p["kernel"])
        grams = input_grams(apply, params, [x], axes=axes)["kernel"].matrix
        np.testing.assert_allclose(grams, jnp.stack([x.T @ x] * 2), rtol=1e-5)
    last = {"": KernelAxes(stacked=(2,), inputs=(0,), outputs=(1,))}
    grams = input_grams(
        lambda p, x: jnp.einsum("bd,dfe->ebf", x, p), jnp.ones((3, 4, 2)), [x], where=lambda path, leaf: True, axes=last
    )
    np.testing.assert_allclose(grams[""].matrix, jnp.stack([x.T @ x] * 2), rtol=1e-5)


def test_grams_of_a_convolution_are_those_of_its_patches():
    x = np.random.default_rng(0).normal(size=(2, 6, 5, 3)).astype(np.float32)
    model = nnx.Conv(3, 4, (3, 2), strides=(2, 1), padding="VALID", rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(model)
    grams = input_grams(lambda params, x: nnx.merge(graphdef, params)(x), params, [jnp.asarray(x)], axes="flax")
    patches = np.stack(
        [
            x[:, i : i + 3, j : j + 2].reshape(2, -1)  # (kh, kw, in), the order of the kernel
            for i, j in itertools.product(range(0, 4, 2), range(4))
        ]
    ).reshape(-1, 18)
    np.testing.assert_allclose(grams["kernel"].matrix, patches.T @ patches, rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def digits():
    """The hidden layers of a network that has learnt the digits: parameters and inputs."""
    x, y = load_digits(return_X_y=True)
    x, y = jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)
    random = np.random.default_rng(0)
    sizes = [64, 64, 32, 10]
    params = {
        f"layer{i}": {"kernel": jnp.asarray(random.normal(size=size) * np.sqrt(2 / size[0]), jnp.float32)}
        for i, size in enumerate(itertools.pairwise(sizes))
    }

    def apply(params, x):
        for i in range(2):
            x = jax.nn.relu(x @ params[f"layer{i}"]["kernel"])
        return x @ params["layer2"]["kernel"]

    def loss(params):
        return -jnp.mean(jax.nn.log_softmax(apply(params, x))[jnp.arange(len(y)), y])

    def step(params, _):
        return jax.tree.map(lambda w, g: w - 0.5 * g, params, jax.grad(loss)(params)), None

    params = jax.jit(lambda params: jax.lax.scan(step, params, length=300)[0])(params)
    return apply, params, x, y


@pytest.mark.parametrize(
    ("options", "masks"), [pytest.param({"sparsity": 0.5}, None, marks=pytest.mark.slow), ({"n": 2, "m": 4}, "nm")]
)
@pytest.mark.slow
def test_reconstruction_of_digits_layers_beats_wanda_and_magnitude(digits, options, masks):
    apply, params, x, _ = digits
    grams = input_grams(apply, params, [x[:900]])
    pruned = sparsegpt(params, grams, **options).params
    test, errors = x[900:], {}
    rivals = {"sparsegpt": pruned}
    for name, score in (("magnitude", jprune.magnitude()), ("wanda", jprune.wanda(apply))):
        scores = jax.jit(lambda params, score=score: score(params, batch=x[:900]))(params)
        # As their authors prune: magnitude and Wanda compare the weights into one output.
        choose = (lambda scores: jprune.nm_masks(scores, n=2, m=4)) if masks else _half_of_every_output
        rivals[name] = jax.jit(lambda p, s, choose=choose: jprune.apply_masks(p, choose(s)))(params, scores)
    kernels = [np.asarray(params[f"layer{i}"]["kernel"]) for i in range(3)]
    inputs = [np.asarray(test)]
    for kernel in kernels[:2]:
        inputs.append(np.maximum(inputs[-1] @ kernel, 0))
    for name, own in rivals.items():
        errors[name] = [
            np.mean(np.square(h @ (np.asarray(own[f"layer{i}"]["kernel"]) - kernels[i]))) for i, h in enumerate(inputs)
        ]
    for i in range(3):
        assert errors["sparsegpt"][i] < 0.75 * min(errors["wanda"][i], errors["magnitude"][i]), errors


def _half_of_every_output(scores):
    def half(score):
        order = jnp.argsort(jnp.argsort(-score, axis=0), axis=0)
        return order < score.shape[0] // 2

    return jax.tree.map(half, scores)


KERNEL = {"a": {"kernel": jnp.ones((6, 2))}}
X = jnp.ones((4, 6))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: sparsegpt(KERNEL, {"a": X}), TypeError, "pass exactly one of sparsity="),
        (lambda: sparsegpt(KERNEL, {"a": X}, sparsity=0.5, n=2, m=4), TypeError, "pass exactly one of sparsity="),
        (
            lambda: sparsegpt(KERNEL, {"a": X}, sparsity=2),
            TypeError,
            "sparsity is 2; it must be a float from 0.0 to 1.0",
        ),
        (lambda: sparsegpt(KERNEL, {"a": X}, sparsity=0.5, block=0), ValueError, "block is 0; it must be at least 1"),
        (lambda: sparsegpt(KERNEL, {"a": X}, n=2, m=4), ValueError, "m=4 must divide the inputs .* 'a/kernel'"),
        (lambda: sparsegpt(KERNEL, {"a": X}, n=2), ValueError, "n=2, m=None: n of every m"),
        (lambda: sparsegpt(KERNEL, {"a": X}, n=1, m=3, block=4), ValueError, "block=4 must be .* multiple of m=3"),
        (lambda: sparsegpt(KERNEL, {"a": X}, sparsity=0.5, damping=-1.0), ValueError, "damping=-1.0"),
        (lambda: sparsegpt(KERNEL, {"b": X}, sparsity=0.5), ValueError, "no entry for 'a/kernel', only 'b'"),
        (lambda: sparsegpt(KERNEL, {"a": X.T}, sparsity=0.5), ValueError, r"\(6, 4\) for 'a/kernel' .* \(..., 6\)"),
        (lambda: sparsegpt(KERNEL, {"a": Gram(X)}, sparsity=0.5), ValueError, r"Gram of shape \(4, 6\) .* \(6, 6\)"),
        (
            lambda: sparsegpt({"kernel": jnp.ones((2, 6, 3))}, {"": X}, sparsity=0.5),
            ValueError,
            r"leaf 'kernel' of shape \(2, 6, 3\): its outputs are reconstructed from its inputs",
        ),
        (lambda: input_grams(lambda params, x: x, KERNEL, [X]), ValueError, "no matrix product .* reads 'a/kernel'"),
        (lambda: input_grams(lambda params, x: x, KERNEL, []), ValueError, "batches has no batch"),
        (
            lambda: input_grams(lambda params, x: x @ params["a"]["kernel"].T, KERNEL, [jnp.ones((3, 2))]),
            ValueError,
            r"the product that reads 'a/kernel' .* does not sum over its axes \(0,\)",
        ),
    ],
)
def test_bad_arguments_are_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("x", "damping"), [(jnp.ones((2, 6)), 0.0), (jnp.full((8, 6), jnp.nan), 0.01)], ids=["singular", "NaN"]
)
def test_weights_that_are_not_finite_are_refused_by_leaf(x, damping):
    with pytest.raises(ValueError, match=r"weights of 'a/kernel' became NaN .* not positive definite; pass at least"):
        sparsegpt(KERNEL, {"a": x}, sparsity=0.5, damping=damping)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_a_kernel_without_weights_is_left_as_it_is(shape):
    inputs = {"kernel": jnp.ones((4, shape[0]))}
    pruned = sparsegpt({"kernel": jnp.zeros(shape)}, inputs, sparsity=0.5)
    assert pruned.params["kernel"].shape == pruned.masks["kernel"].shape == shape


def test_a_graph_is_the_default_selection_and_one_batch_is_refused():
    params = {"w": jnp.ones((2, 2)), "table": jnp.ones((1, 2))}
    apply = lambda p, x: x @ p["w"] + p["table"]
    x = jnp.array([[1.0, 2.0]])
    graph = jprune.trace_model(apply, params, x)
    grams = jprune.scores.input_grams(apply, params, [x], axes=graph)
    np.testing.assert_array_equal(grams["w"].matrix, [[1, 2], [2, 4]])
    found = jprune.sparsegpt(params, grams, sparsity=0.5, axes=graph)
    assert found.masks["table"] is None
    assert int(found.masks["w"].sum()) == 2
    with pytest.raises(TypeError, match=r"batches is an array of shape \(1, 2\), which is one batch; pass a list"):
        jprune.scores.input_grams(apply, params, x, axes=graph)


def test_a_stack_that_is_transposed_before_its_scan_is_refused_without_advice_to_trace_it():
    def apply(params, x):
        layers = jnp.moveaxis(params["kernel"], 1, 0)  # as nn.scan with variable_axes={"params": 1}
        return jax.lax.scan(lambda x, kernel: (x @ kernel, None), x, layers)[0]

    params, x = {"kernel": jnp.ones((4, 2, 4))}, jnp.ones((3, 4))
    graph = jprune.trace_model(apply, params, x)
    with pytest.raises(ValueError, match=r"^'kernel' is transposed or reshaped before a scan reads it; exclude it"):
        input_grams(apply, params, [x], axes=graph)


def _jitted(offset):
    """A forward pass of two layers, whose first inputs are moved by an array that it closes over."""
    return jax.jit(lambda params, x: jnp.tanh((x + offset) @ params["one"]["kernel"]) @ params["two"]["kernel"])


def test_the_grams_of_a_jitted_function_are_compiled_once():
    params = {"one": {"kernel": jnp.ones((2, 3))}, "two": {"kernel": jnp.ones((3, 1))}}
    apply, x = _jitted(jnp.zeros((1, 2))), jnp.array([[0.5, 0.0]])
    input_grams(apply, params, [x])
    pruned = jprune.apply_masks(params, {"one": {"kernel": jnp.zeros((2, 3), bool)}, "two": None})
    x = 2 * x
    with compilations() as compiled:
        grams = input_grams(apply, pruned, [x])
    assert compiled == []
    np.testing.assert_array_equal(grams["one/kernel"].matrix, [[1, 0], [0, 0]])
    np.testing.assert_array_equal(grams["two/kernel"].matrix, np.zeros((3, 3)))
    of_one = input_grams(apply, params, [x], where=jprune.by_path(include="^one/"))  # another program
    assert list(of_one) == ["one/kernel"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class _Scaled:
    """A model whose forward pass is a jitted method that reads an array of the model."""

    scale: jax.Array

    @jax.jit
    def apply(self, params, x):
        return (x * self.scale) @ params["kernel"]


def test_the_grams_of_a_jitted_method_follow_its_object():
    """The object is an argument of the method, so a program compiled for its earlier arrays would be wrong."""
    model, params = _Scaled(jnp.float32(1)), {"kernel": jnp.ones((2, 3))}
    apply, x = model.apply, jnp.ones((4, 2))
    np.testing.assert_array_equal(input_grams(apply, params, [x])["kernel"].matrix, np.full((2, 2), 4))
    model.scale = jnp.float32(10)
    np.testing.assert_array_equal(input_grams(apply, params, [x])["kernel"].matrix, np.full((2, 2), 400))


def test_compiled_grams_keep_no_array_alive():
    offset = jnp.ones((1, 2))
    params = {"one": {"kernel": jnp.ones((2, 3))}, "two": {"kernel": jnp.ones((3, 1))}}
    apply = _jitted(offset)
    input_grams(apply, params, [jnp.ones((1, 2))])
    kernel, closed_over = weakref.ref(params["one"]["kernel"]), weakref.ref(offset)
    del params
    gc.collect()
    assert kernel() is None
    del apply, offset
    gc.collect()
    assert closed_over() is None
