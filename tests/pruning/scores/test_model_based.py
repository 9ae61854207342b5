"""Scores that run the model, against numbers worked out in numpy on small networks."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jprune
from tests.pruning.steps import compilations

RNG = np.random.default_rng(3)


def mlp(sizes, bias=True):
    """Weights and biases of a dense network, float32."""
    return {
        f"layer{i}": {
            "kernel": jnp.asarray(RNG.normal(size=(a, b)), jnp.float32),
            "bias": jnp.asarray(RNG.normal(size=b) if bias else np.zeros(b), jnp.float32),
        }
        for i, (a, b) in enumerate(itertools.pairwise(sizes))
    }


def forward(params, x):
    for i, name in enumerate(params):
        x = x @ params[name]["kernel"] + jnp.expand_dims(params[name]["bias"], 0)
        x = jax.nn.relu(x) if i < len(params) - 1 else x
    return x


def in_numpy(params):
    return [(np.asarray(p["kernel"], np.float64), np.asarray(p["bias"], np.float64)) for p in params.values()]


def kernels_of(tree):
    return [np.asarray(layer["kernel"]) for layer in tree.values()]


def test_snip_is_the_share_of_all_sensitivity():
    w = {"a": {"kernel": jnp.array([[-2.0, 1.0]])}, "b": {"kernel": jnp.array([[0.5], [4.0]])}}
    g = {"a": {"kernel": jnp.array([[0.5, 3.0]])}, "b": {"kernel": jnp.array([[-8.0], [0.0]])}}
    scores = jprune.scores.snip()(w, grad=g)  # |w g| = 1, 3, 4, 0
    np.testing.assert_allclose(scores["a"]["kernel"], [[0.125, 0.375]])
    np.testing.assert_allclose(scores["b"]["kernel"], [[0.5], [0.0]])
    nothing = jprune.scores.snip()(w, grad=jax.tree.map(jnp.zeros_like, g))
    np.testing.assert_array_equal(nothing["a"]["kernel"], 0.0)


def test_synflow_is_each_weights_share_of_the_flow():
    params = mlp([4, 5, 3])
    (w1, b1), (w2, _) = [(np.abs(w), np.abs(b)) for w, b in in_numpy(params)]
    scores = kernels_of(jprune.scores.synflow(forward, input_shape=(7, 4))(params))
    np.testing.assert_allclose(scores[0], w1 * w2.sum(1), rtol=1e-5)
    np.testing.assert_allclose(scores[1], (w1.sum(0) + b1)[:, None] * w2, rtol=1e-5)


def test_synflow_is_conserved_from_layer_to_layer():
    params = mlp([6, 9, 4, 5], bias=False)
    total = np.linalg.multi_dot([np.ones((1, 6)), *(np.abs(w) for w, _ in in_numpy(params))]).sum()
    for scores in kernels_of(jprune.scores.synflow(forward, input_shape=(1, 6))(params)):
        np.testing.assert_allclose(scores.sum(), total, rtol=1e-5)


@pytest.mark.parametrize("scale", [1e-18, 1e18])
def test_synflow_ranks_networks_whose_flow_float32_cannot_hold(scale):
    params = mlp([4, 5, 5, 3], bias=False)
    scaled = jax.tree.map(lambda w: w * np.float32(scale), params)
    score = jprune.scores.synflow(forward, input_shape=(1, 4))
    found, plain = kernels_of(score(scaled)), kernels_of(score(params))
    ratio = found[0][0, 0] / plain[0][0, 0]
    for a, b in zip(found, plain, strict=True):
        np.testing.assert_allclose(a, b * ratio, rtol=1e-4)


@pytest.mark.slow
def test_iterated_synflow_loses_no_layer_before_the_maximum_compression():
    """Four layers can carry flow with four weights, one in each, and not with fewer."""
    params = mlp([30, 40, 3, 20, 2], bias=False)
    score = jprune.scores.synflow(forward, input_shape=(1, 30))
    for keep in (200, 20, 4):
        masks = jprune.selection.iterated_masks(score, params, keep=keep)
        counts = [int(mask.sum()) for mask in kernels_of(masks)]
        assert sum(counts) == keep
        assert min(counts) >= 1, counts
        positive = jax.tree.map(jnp.abs, jprune.apply_masks(params, masks))
        assert float(forward(positive, jnp.ones((1, 30))).sum()) > 0
    at_once = jprune.selection.iterated_masks(score, params, keep=4, rounds=1)
    assert min(int(mask.sum()) for mask in kernels_of(at_once)) == 0


def test_rounds_shrink_geometrically_and_score_the_remaining_weights():
    """Two paths; the first round takes the weakest weight, which leaves its partner no flow."""
    params = {
        "a": {"kernel": jnp.array([[3.0, 2.0]]), "bias": jnp.zeros(2)},
        "b": {"kernel": jnp.array([[1.0], [5.0]]), "bias": jnp.zeros(1)},
    }
    score = jprune.scores.synflow(forward, input_shape=(1, 1))  # flows: 3 through the first unit, 10 through the second
    masks = jprune.selection.iterated_masks(score, params, keep=2, rounds=2)
    assert kernels_of(masks)[0].tolist() == [[False, True]]
    assert kernels_of(masks)[1].tolist() == [[False], [True]]
    with pytest.raises(ValueError, match="rounds is 0; it must be at least 1"):
        jprune.selection.iterated_masks(score, params, keep=2, rounds=0)
    with pytest.raises(ValueError, match="the score gradient needs a new gradient in every round"):
        jprune.selection.iterated_masks(jprune.gradient(), params, keep=2)
    with pytest.raises(TypeError, match=r"score=magnitude: .* it must be a score"):
        jprune.selection.iterated_masks(jprune.magnitude, params, keep=2)


def test_a_leaf_without_a_score_is_named_by_iterated_masks():
    """Depthwise filters have no other filters of their group; this was an error of zip."""
    depthwise = jprune.KernelAxes(outputs=(3,), inputs=(2,), spatial=(0, 1), groups=4)
    axes = {"depthwise": depthwise, "": jprune.KernelAxes(inputs=(0,), outputs=(1,))}
    params = {"depthwise": {"kernel": jnp.ones((3, 3, 1, 4))}, "dense": {"kernel": jnp.ones((4, 6))}}
    score = jprune.scores.geometric_median(axes=axes)
    with pytest.raises(ValueError, match="score=geometric_median has no score for 'depthwise/kernel'; leave this leaf"):
        jprune.selection.iterated_masks(score, params, sparsity=0.5, axes=axes)


def test_rounds_take_any_function_as_a_score():
    def score(params, grad=None, batch=None, key=None):
        return jax.tree.map(jnp.abs, params)

    masks = jprune.selection.iterated_masks(score, {"kernel": jnp.array([[3.0, -1.0, -2.0]])}, keep=2, rounds=2)
    assert masks["kernel"].tolist() == [[True, False, True]]


@pytest.mark.parametrize("when", ["first", "last"])
def test_rounds_refuse_nan_scores_outside_jit(when):
    """The score of one leaf is NaN in every round, or in the last one, after three of the six weights are pruned."""
    params = {"a": {"kernel": jnp.array([[1.0, 2.0, 3.0]])}, "b": {"kernel": jnp.array([[4.0, 5.0, 6.0]])}}

    def score(params, grad=None, batch=None, key=None):
        some_pruned = jnp.any(params["a"]["kernel"] == 0)
        wrong = some_pruned if when == "last" else True
        return params | {"b": {"kernel": jnp.where(wrong, jnp.nan, params["b"]["kernel"])}}

    masks = functools.partial(jprune.selection.iterated_masks, score, keep=2, rounds=2)
    with pytest.raises(ValueError, match="scores has NaN at 'b/kernel', which cannot be ranked; check the score's"):
        masks(params)
    assert sum(int(mask.sum()) for mask in kernels_of(jax.jit(masks)(params))) == 2
    # NaN at a weight that is pruned already does not matter.
    late = lambda params, **_: jax.tree.map(lambda w: jnp.where(w == 0, jnp.nan, w), params)
    masks = jprune.selection.iterated_masks(late, params, keep=2, rounds=2)
    assert [mask.tolist() for mask in kernels_of(masks)] == [[[False, False, False]], [[False, True, True]]]


def test_rounds_keep_the_minimum_of_every_layer_of_a_stack():
    """Of the weights 1 to 12 in three layers, 5 stay: the largest of each layer, and the two largest of the others."""
    params = {"kernel": jnp.arange(1.0, 13.0).reshape(3, 2, 2)}
    axes = {"": jprune.KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
    masks = jprune.selection.iterated_masks(lambda params, **_: params, params, keep=5, rounds=3, min_keep=1, axes=axes)
    wanted = [[False] * 3 + [True], [False] * 3 + [True], [False] + [True] * 3]
    np.testing.assert_array_equal(masks["kernel"].reshape(3, 4), wanted)


def logistic(params, batch):
    """The mean loss of a logistic regression; the gradient of one example is (p - y) x."""
    logits = batch["x"] @ params["kernel"]
    return jnp.mean(jax.nn.softplus(logits) - batch["y"] * logits)


@pytest.mark.parametrize("microbatch", [1, 2, 5, 16])
def test_fisher_is_the_mean_of_the_squares_of_single_gradients(microbatch):
    x, y, w = RNG.normal(size=(5, 3)), np.array([[0.0], [1], [1], [0], [1]]), RNG.normal(size=(3, 1))
    each = (1 / (1 + np.exp(-x @ w)) - y) * x  # (examples, weights)
    batch = {"x": jnp.asarray(x, jnp.float32), "y": jnp.asarray(y, jnp.float32)}
    params = {"kernel": jnp.asarray(w, jnp.float32)}
    found = jprune.scores.fisher(logistic, microbatch=microbatch)(params, batch=batch)["kernel"][:, 0]
    np.testing.assert_allclose(found, np.mean(each**2, 0), rtol=1e-5)
    assert (np.mean(each**2, 0) > 1.05 * np.mean(each, 0) ** 2).all()  # it is no square of the mean
    saliency = jprune.scores.fisher(logistic, microbatch=microbatch, saliency=True)(params, batch=batch)["kernel"][:, 0]
    np.testing.assert_allclose(saliency, w[:, 0] ** 2 * np.mean(each**2, 0) / 2, rtol=1e-5)


@pytest.mark.parametrize("scale", [3.0, np.float32(3), jnp.float32(3)], ids=["float", "numpy", "jax"])
@pytest.mark.parametrize("microbatch", [2, 16])
def test_fisher_gives_scalars_of_the_batch_to_every_example(scale, microbatch):
    """The gradient of an example is 3 x, so the mean square over x = 1, 2, 4 is 9 (1 + 4 + 16) / 3 = 63."""
    loss = lambda params, batch: jnp.mean(batch["x"] @ params["kernel"]) * batch["scale"]
    batch = {"x": jnp.array([[1.0], [2.0], [4.0]]), "scale": scale}
    found = jprune.scores.fisher(loss, microbatch=microbatch)({"kernel": jnp.ones((1, 1))}, batch=batch)
    np.testing.assert_allclose(found["kernel"], [[63.0]], rtol=1e-6)


def test_synflow_gives_scalars_of_the_batch_to_the_model():
    apply = lambda params, batch: batch["x"] @ params["kernel"] * batch["scale"]
    batch = {"x": jnp.zeros((5, 2)), "scale": jnp.float32(3)}
    found = jprune.scores.synflow(apply)({"kernel": jnp.array([[1.0], [-2.0]])}, batch=batch)
    np.testing.assert_allclose(found["kernel"], [[3.0], [6.0]])


def test_wanda_is_the_weight_times_the_norm_of_its_input_in_every_layer():
    params, x = mlp([4, 6, 2]), RNG.normal(size=(9, 4))
    (w1, b1), (w2, _) = in_numpy(params)
    hidden = np.maximum(x @ w1 + b1, 0)
    wanted = [np.abs(w1) * np.linalg.norm(x, axis=0)[:, None], np.abs(w2) * np.linalg.norm(hidden, axis=0)[:, None]]
    batch = jnp.asarray(x, jnp.float32)
    given = lambda params, x: {"layer0": x, "layer1/kernel": jnp.asarray(hidden, jnp.float32)}
    for score in (jprune.wanda(forward), jprune.wanda(activations=given)):
        for found, expected in zip(kernels_of(score(params, batch=batch)), wanted, strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_wanda_of_a_convolution_takes_the_norm_over_positions_too():
    model = nnx.Conv(2, 3, (2, 2), padding="VALID", rngs=nnx.Rngs(0))
    graph, params = nnx.split(model)
    x = RNG.normal(size=(3, 4, 5, 2))
    seen = np.zeros((2, 2, 2))
    for dy in range(2):
        for dx in range(2):
            seen[dy, dx] = (x[:, dy : dy + 3, dx : dx + 4] ** 2).sum((0, 1, 2))
    score = jprune.wanda(lambda params, x: nnx.merge(graph, params)(x))
    found = score(params, batch=jnp.asarray(x, jnp.float32))["kernel"].get_value()
    wanted = np.abs(np.asarray(model.kernel[...])) * np.sqrt(seen)[..., None]
    np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_wanda_names_a_weight_without_a_product_and_missing_arguments():
    layers = mlp([4, 6, 2])
    params = layers | {"idle": {"kernel": jnp.ones((2, 2))}}
    score = jprune.wanda(lambda params, x: x @ params["layer0"]["kernel"])
    with pytest.raises(ValueError, match="no matrix product or convolution reads 'idle/kernel'"):
        score(params, batch=jnp.ones((1, 4)))
    with pytest.raises(ValueError, match="the score wanda needs batch"):
        score(params)
    with pytest.raises(ValueError, match="wanda needs either apply or activations"):
        jprune.wanda()
    with pytest.raises(ValueError, match=r"gave shape \(3, 5\) for 'layer0/kernel'; it has shape \(4, 6\)"):
        jprune.wanda(activations=lambda params, x: {"layer0": jnp.ones((3, 5))})(layers, batch=jnp.ones((1, 4)))


@pytest.mark.parametrize("evaluating", [False, True], ids=["train mode", "eval mode"])
def test_gradients_are_averaged_by_example_in_the_mode_of_the_loss(evaluating):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.kernel = nnx.Param(jnp.array([[2.0]]))
            self.norm = nnx.BatchNorm(1, use_scale=False, use_bias=False, epsilon=0.0, rngs=rngs)

        def __call__(self, x):
            return self.norm(x @ self.kernel[...])

    model = Net(nnx.Rngs(0))
    model.norm.mean[...], model.norm.var[...] = jnp.array([1.0]), jnp.array([4.0])
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, x):
        merged = nnx.merge(graph, params, rest, copy=True)
        if evaluating:
            merged = nnx.view(merged, use_running_average=True)
        return jnp.mean(merged(x) ** 2 + merged.kernel[...] * x)

    batches = [np.array([[1.0], [3.0]]), np.array([[2.0], [5.0], [11.0]])]
    found = jprune.scores.average_gradients(loss, params, (jnp.asarray(x, jnp.float32) for x in batches))
    every = np.concatenate(batches)
    # Normalized by its own statistics the batch forgets w; by the running ones it is (w x - 1) / 2.
    wanted = every.mean() + (np.mean(2 * (2 * every - 1) / 2 * every / 2) if evaluating else 0.0)
    np.testing.assert_allclose(found["kernel"].get_value(), [[wanted]], rtol=1e-4)
    np.testing.assert_array_equal(model.norm.mean[...], [1.0])
    np.testing.assert_array_equal(model.norm.var[...], [4.0])


def test_a_batch_without_examples_is_refused():
    batches = [jnp.ones((2, 1)), jnp.ones((0, 1))]
    with pytest.raises(ValueError, match=r"at least one; they have \[0\]"):
        jprune.scores.average_gradients(lambda w, x: jnp.mean(w * x), jnp.array(1.0), batches)
    with pytest.raises(ValueError, match=r"at least one; they have \[0\]"):
        jprune.scores.fisher(lambda w, x: jnp.sum(w * x))(jnp.ones((1, 1)), batch=batches[1])


def test_averaging_drops_the_auxiliary_output_and_needs_a_batch():
    loss = lambda w, x: (jnp.mean(w * x), {"statistics": x})
    mean = jprune.scores.average_gradients(
        loss, jnp.array(1.0), [jnp.array([1.0, 2.0]), jnp.array([6.0])], has_aux=True
    )
    assert mean == 3.0
    with pytest.raises(ValueError, match="batches has no example"):
        jprune.scores.average_gradients(loss, jnp.array(1.0), [], has_aux=True)
    with pytest.raises(ValueError, match=r"loss returned an array of shape \(2,\); it must return a scalar"):
        jprune.scores.average_gradients(lambda w, x: w * x, jnp.array(1.0), [jnp.ones(2)])


def test_synflow_runs_in_the_dtype_of_the_parameters():
    with jax.enable_x64(True):
        kernel = jnp.array([[1.0], [-3.0]], jnp.float64)
        found = jprune.scores.synflow(lambda w, x: x @ w, input_shape=(1, 2))(kernel)
    assert found.dtype == jnp.float64
    np.testing.assert_array_equal(found[:, 0], [1.0, 3.0])


def test_the_gradient_of_a_jitted_loss_is_compiled_once():
    loss = jax.jit(lambda w, x: jnp.mean(w * x))
    batches = [jnp.array([1.0, 2.0]), jnp.array([6.0, 3.0])]
    average = jprune.scores.average_gradients
    first = average(loss, jnp.array(1.0), batches)
    weight, others = jnp.array(2.0), [2 * batch for batch in batches]
    with compilations() as compiled:
        second = average(loss, weight, others)
    assert (float(first), float(second), compiled) == (3.0, 6.0, [])


def test_a_loss_that_is_not_jitted_may_use_values_that_change():
    statistics = {"mean": 1.0}
    loss = lambda w, x: jnp.mean(w * x) * statistics["mean"]
    before = jprune.scores.average_gradients(loss, jnp.array(1.0), [jnp.array([1.0, 2.0])])
    statistics["mean"] = 2.0
    after = jprune.scores.average_gradients(loss, jnp.array(1.0), [jnp.array([1.0, 2.0])])
    assert (float(before), float(after)) == (1.5, 3.0)


def test_a_jitted_score_is_compiled_once():
    score = jax.jit(jprune.scores.fisher(lambda w, batch: jnp.sum(batch @ w), microbatch=1))
    batch = jnp.array([[1.0, 3.0], [3.0, 0.0]])
    weights = jnp.array([[1.0], [1.0]])
    np.testing.assert_allclose(score(weights, batch=batch)[:, 0], [5.0, 4.5])
    weights = weights + 1
    with compilations() as compiled:
        score(weights, batch=batch)
    assert compiled == []
