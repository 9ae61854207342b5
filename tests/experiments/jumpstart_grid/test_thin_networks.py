"""Padded, batched, scanned thin networks against plain ones, one at a time, layer by layer."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments.jumpstart_grid import thin_networks as tn
from experiments.jumpstart_grid.thin_stack import Architecture
from jprune.jumpstart.penalty import jumpstart_penalty

RUNS = [tn.ThinRun(2, 0), tn.ThinRun(5, 2)]


def _problem(arch, runs, rng, examples=14):
    inputs = rng.normal(size=(2, examples)).astype(np.float32)
    labels = (rng.random(examples) > 0.5).astype(np.float32)
    return tn.Problem(jnp.asarray(inputs), jnp.asarray(labels), tn.real_channels(arch, runs))


def _alone(arch, weights, index, width):
    """The thin network's own weights; the kernel of a layer is (taps, out, in)."""
    stack = jax.tree.map(np.asarray, weights.stack)
    kernels = [np.stack([tap[index, :width] for tap in stack.first])]
    kernels += [
        np.stack([tap[depth, index, :width, :width] for tap in stack.hidden]) for depth in range(arch.depth - 1)
    ]
    each = range(arch.depth)
    return {
        "kernels": kernels,
        "biases": [stack.bias[depth, index, :width] for depth in each],
        "norm": stack.norm and [tuple(x[depth, index, :width] for x in stack.norm) for depth in each],
        "head": np.asarray(weights.head)[index].reshape(arch.positions, arch.width)[:, :width],
        "head_bias": np.asarray(weights.head_bias)[index],
    }


def _padding(arch, weights, index, width):
    """What must be zero in all weights of a run."""
    stack = jax.tree.map(np.asarray, weights.stack)
    hidden = [x for tap in stack.hidden for x in (tap[:, index, width:], tap[:, index, :, width:])]
    channels = [x[:, index, width:] for x in (stack.bias, *(stack.norm or ()))]
    head = np.asarray(weights.head)[index].reshape(arch.positions, arch.width)[:, width:]
    return [*(tap[index, width:] for tap in stack.first), *hidden, *channels, head]


def _numpy_loss(arch, inputs, labels, params, keep=None):
    """The objective of one network in numpy: cross-entropy, penalty and the mean and variance of each layer.

    Layers are sums over positions and channels as the formulas say them, (positions, channels, examples).
    """
    a = inputs.reshape(arch.positions, -1, inputs.shape[1])
    penalty, moments = 0.0, []
    for depth, (kernel, bias) in enumerate(zip(params["kernels"], params["biases"], strict=True)):
        a = a if keep is None else a * keep[depth].reshape(a.shape)
        z = np.stack(
            [sum(kernel[q - p] @ a[q] for q in range(p, len(a))) + bias[:, None] for p in range(arch.positions)]
        )
        for axis, reduced in (("unit", 2), ("point", 1)):
            if axis in arch.penalized:
                high, low = z.max(reduced), z.min(reduced)
                slack = arch.balance * np.maximum(1 - high, 0) + (1 - arch.balance) * np.maximum(1 + low, 0)
                penalty += np.square(slack).sum()
        if params["norm"]:
            scale, shift = (x[None, :, None] for x in params["norm"][depth])
            mean, variance = z.mean((0, 2), keepdims=True), z.var((0, 2), keepdims=True)
            moments.append((mean.ravel(), variance.ravel()))
            z = (z - mean) / np.sqrt(variance + 1e-3) * scale + shift
        a = np.maximum(z, 0)
    logits = np.tensordot(params["head"], a) + params["head_bias"]
    return (np.logaddexp(0, logits) - labels * logits).mean(), penalty, moments


def _differences(value, params, step=1e-6):
    """The gradient of a function of a tree of float64 arrays by central differences."""
    leaves, treedef = jax.tree.flatten(params)
    slopes = [np.zeros_like(leaf) for leaf in leaves]
    for slope, leaf in zip(slopes, leaves, strict=True):
        for at in np.ndindex(leaf.shape):
            middle, ends = leaf[at], []
            for shift in (step, -step):
                leaf[at] = middle + shift
                ends.append(value(jax.tree.unflatten(treedef, leaves)))
            leaf[at], slope[at] = middle, (ends[0] - ends[1]) / (2 * step)
    return jax.tree.unflatten(treedef, slopes)


def _autodiff_loss(arch, inputs, labels, params):
    """The same objective with jax's convolution, on (examples, positions, channels)."""
    x = inputs.T[:, :, None] if arch.layer == "conv" else inputs.T[:, None, :]
    preacts = []
    for kernel, bias in zip(params["kernels"], params["biases"], strict=True):
        if arch.layer == "conv":
            z = jax.lax.conv_general_dilated(
                x, jnp.transpose(kernel, (0, 2, 1)), (1,), [(0, 1)], dimension_numbers=("NWC", "WIO", "NWC")
            )
        else:
            z = x @ kernel[0].T[None]
        z = z + bias[None, None]
        preacts.append(z[:, :, None])
        x = jax.nn.relu(z)
    logits = (x * params["head"][None]).sum((1, 2)) + params["head_bias"]
    entropy = optax.sigmoid_binary_cross_entropy(logits, labels).mean()
    return entropy, jumpstart_penalty(preacts, "cpaior_keras", balance=arch.balance)


BOTH = {"penalized": ("unit", "point")}
CASES = [
    (1, BOTH, False),
    (1, {"normalized": True}, False),
    (3, {**BOTH, "balance": 0.51}, False),
    (3, {**BOTH, "balance": 0.51}, True),
    (3, {"penalized": ("unit",)}, False),
    (3, {"penalized": ("point",)}, False),
    (3, {}, False),
    (3, {"normalized": True}, False),
    (3, {**BOTH, "layer": "dense"}, False),
    (3, {**BOTH, "layer": "dense", "normalized": True}, True),
]


def _perturbed(weights, rng, real):
    """Biases and norms away from their initial values, padding left at zero."""
    real = 1.0 if real is None else np.asarray(real)
    shake = lambda x: jnp.asarray(x + rng.normal(size=x.shape).astype(np.float32) * 0.3 * real)
    stack = weights.stack
    return weights._replace(stack=stack._replace(bias=shake(stack.bias), norm=jax.tree.map(shake, stack.norm)))


def _assert_equal_trees(thin, plain, **tolerance):
    chex.assert_trees_all_close(thin, plain, **tolerance)


@pytest.mark.parametrize(("depth", "variant", "dropout"), CASES, ids=str)
def test_value_and_gradient_of_padded_runs_are_those_of_each_thin_network_alone(depth, variant, dropout):
    rng = np.random.default_rng(depth)
    arch = Architecture(depth, 5, train=11, coefficient=0.07, **variant)
    problem = _problem(arch, RUNS, rng)
    state = tn.start(arch, tn.ThinRecipe(dropout=dropout), RUNS)
    weights = _perturbed(state.weights, rng, problem.real)
    keep = tn._dropout(arch, state._replace(epoch=jnp.int32(600))) if dropout else None
    grads, (outcome, moments) = _gradient(arch, weights, problem, state.running, keep)
    inputs, labels = (np.asarray(x, float)[..., : arch.train] for x in (problem.inputs, problem.labels))
    for index, (width, _) in enumerate(RUNS):
        alone = jax.tree.map(partial(np.array, dtype=float), _alone(arch, weights, index, width))
        real = np.tile(np.arange(arch.width) < width, arch.positions)
        factors = keep and [keep[0][index], *(x[index][real] for x in keep[1])]
        factors = jax.tree.map(partial(np.asarray, dtype=float), factors)
        plain = partial(_numpy_loss, arch, inputs, labels, keep=factors)
        entropy, penalty, each = plain(alone)
        np.testing.assert_allclose(outcome.loss[index], entropy, rtol=1e-6)
        np.testing.assert_allclose(outcome.penalty[index], penalty, rtol=4e-6, atol=1e-6)
        slopes = _differences(lambda params, plain=plain: np.dot(plain(params)[:2], (1, arch.coefficient)), alone)
        _assert_equal_trees(_alone(arch, grads, index, width), slopes, rtol=2e-5, atol=2e-6)
        assert not any(x.any() for x in _padding(arch, grads, index, width))
        for found, moment in zip(moments or (), zip(*each, strict=True), strict=True):
            np.testing.assert_allclose(found[:, index, :width], moment, rtol=1e-5, atol=1e-6)


def _gradient(arch, *args):
    return jax.jit(jax.grad(partial(tn.loss, arch), has_aux=True))(*args)


def test_a_network_without_padding_needs_no_mask_and_gives_the_same_gradient_as_one_with_it():
    runs = [tn.ThinRun(5, 0), tn.ThinRun(5, 1)]
    arch = Architecture(3, 5, train=11, penalized=("unit", "point"))
    problem = _problem(arch, runs, np.random.default_rng(0))
    assert problem.real is None
    weights = tn.start(arch, tn.ThinRecipe(), runs).weights
    masked = problem._replace(real=jnp.ones((2, arch.width), bool))
    grads = [_gradient(arch, weights, p)[0] for p in (problem, masked)]
    _assert_equal_trees(*grads, rtol=1e-6, atol=1e-7)


def test_a_zero_network_splits_the_gradient_over_all_tied_cells():
    """All preactivations are 0: at rho = .5 the two hinges cancel exactly, .51 leaves a push."""
    examples, width = 11, 3
    for balance, pull in ((0.5, 0.0), (0.51, 0.02)):
        arch = Architecture(2, width, examples, penalized=("unit", "point"), balance=balance, coefficient=1.0)
        state = tn.start(arch, tn.ThinRecipe(zero=True), [tn.ThinRun(3, 0)])
        problem = _problem(arch, [tn.ThinRun(3, 0)], np.random.default_rng(0))
        grads, _ = _gradient(arch, state.weights, problem)
        # Each of a channel's 2 units, and a third of each of the 22 points: d slack^2 = 2 (balance - (1 - balance)).
        expected = -2 * pull * (2 + 2 * examples / width)
        np.testing.assert_allclose(grads.stack.bias[-1, 0], np.full(3, expected), rtol=1e-5, atol=1e-6)


@pytest.mark.optax_promotes
@pytest.mark.parametrize("layer", [pytest.param("conv", marks=pytest.mark.slow), "dense"])
def test_training_follows_adam_on_each_thin_network_alone(layer):
    rng = np.random.default_rng(3)
    arch = Architecture(6, 5, train=11, layer=layer, penalized=("unit", "point"), coefficient=1e-2)
    recipe = tn.ThinRecipe()
    problem = _problem(arch, RUNS, rng)
    initial = tn.start(arch, recipe, RUNS)
    alone = [_alone(arch, initial.weights, i, run.width) for i, run in enumerate(RUNS)]
    state = tn.train(arch, recipe, 12, initial, problem)
    inputs, labels = problem.inputs[:, : arch.train], problem.labels[: arch.train]

    @jax.jit
    def step(params, adam):
        value = lambda p: sum(
            c * v for c, v in zip((1, arch.coefficient), _autodiff_loss(arch, inputs, labels, p), strict=True)
        )
        updates, adam = optimizer.update(jax.grad(value)(params), adam)
        return optax.apply_updates(params, updates), adam

    optimizer = optax.adam(1e-2, eps=1e-7)
    for index, run in enumerate(RUNS):
        params = jax.tree.map(jnp.asarray, alone[index])
        adam = optimizer.init(params)
        for _ in range(12):
            params, adam = step(params, adam)
        _assert_equal_trees(_alone(arch, state.weights, index, run.width), params, rtol=1e-4, atol=2e-5)


@pytest.mark.optax_promotes
@pytest.mark.parametrize("variant", [{"normalized": True}, {"penalized": ("unit", "point"), "layer": "dense"}], ids=str)
def test_padding_stays_zero_through_training(variant):
    arch = Architecture(4, 5, train=11, **variant)
    problem = _problem(arch, RUNS, np.random.default_rng(0))
    recipe = tn.ThinRecipe(dropout=True)
    weights = tn.train(arch, recipe, 30, tn.start(arch, recipe, RUNS), problem).weights
    scales = weights.stack.norm
    if scales is not None:  # the scale of padding stays 1
        weights = weights._replace(stack=weights.stack._replace(norm=scales._replace(scale=scales.scale - 1)))
    for index, run in enumerate(RUNS):
        assert not any(x.any() for x in _padding(arch, weights, index, run.width))


@pytest.mark.optax_promotes
@pytest.mark.parametrize("normalized", [pytest.param(False, marks=pytest.mark.slow), True])
def test_forward_alone_sees_what_the_padded_program_sees(normalized):
    arch = Architecture(5, 5, train=11, normalized=normalized)
    problem = _problem(arch, RUNS, np.random.default_rng(1))
    state = tn.train(arch, tn.ThinRecipe(), 20, tn.start(arch, tn.ThinRecipe(), RUNS), problem)
    _, (outcome, _) = tn.loss(arch, state.weights, problem, state.running)
    inputs, labels = np.asarray(problem.inputs), np.asarray(problem.labels)
    for index, run in enumerate(RUNS):
        preactivations, logits = tn.forward_alone(arch, state, index, run, inputs)
        assert preactivations.shape == (5, 14, 2, 1, run.width)
        np.testing.assert_allclose(((logits > 0) == (labels > 0.5))[11:].mean(), outcome.val_accuracy[index], rtol=1e-6)
        if not normalized:
            entropy = (np.logaddexp(0, logits) - labels * logits)[:11].mean()
            np.testing.assert_allclose(entropy, outcome.loss[index], rtol=1e-5)


@pytest.mark.optax_promotes
def test_running_moments_follow_the_batch_with_momentum():
    arch = Architecture(3, 4, train=11, normalized=True)
    runs = [tn.ThinRun(4, 0)]
    problem = _problem(arch, runs, np.random.default_rng(2))
    initial = tn.start(arch, tn.ThinRecipe(), runs)
    _, (_, moments) = tn.loss(arch, initial.weights, problem, initial.running)
    state = tn.train(arch, tn.ThinRecipe(), 1, initial, problem)
    np.testing.assert_allclose(state.running.mean, 0.01 * moments.mean, rtol=1e-5, atol=1e-8)
    np.testing.assert_allclose(state.running.variance, 0.99 + 0.01 * moments.variance, rtol=1e-6)


@pytest.mark.parametrize("layer", ["conv", "dense"])
def test_dropout_of_a_run_does_not_depend_on_the_other_runs_of_its_program(layer):
    """A run of width 2 alone, and second in a program of width 3: the same factors for its own units."""
    alone, padded = (Architecture(3, width, train=11, layer=layer) for width in (2, 3))
    run, others = tn.ThinRun(2, 1), [tn.ThinRun(3, 0), tn.ThinRun(2, 0)]
    one, two = (
        tn._dropout(arch, tn.start(arch, tn.ThinRecipe(dropout=True), runs)._replace(epoch=jnp.int32(500)))
        for arch, runs in ((alone, [run]), (padded, [others[0], run, others[1]]))
    )
    np.testing.assert_array_equal(one[0][0], two[0][1])
    own = np.asarray(two[1][:, 1]).reshape(2, padded.positions, 3, 11)[:, :, :2]
    np.testing.assert_array_equal(np.asarray(one[1][:, 0]).reshape(own.shape), own)
    assert len(np.unique(np.asarray(two[0]).reshape(3, -1), axis=0)) == 3, "every run draws its own"


def test_dropout_spares_validation_examples():
    arch = Architecture(3, 4, train=11)
    runs = [tn.ThinRun(4, seed) for seed in range(20)]
    problem = _problem(arch, runs, np.random.default_rng(5), examples=40)
    state = tn.start(arch, tn.ThinRecipe(dropout=True), runs)
    keep = tn._dropout(arch, state)
    np.testing.assert_allclose(np.unique(np.asarray(keep[1])), [0, 1 / 0.9], rtol=1e-6)
    (with_dropout, _), (without, _) = (_gradient(arch, state.weights, problem, None, k)[1] for k in (keep, None))
    np.testing.assert_array_equal(with_dropout.val_accuracy, without.val_accuracy)
    assert (with_dropout.loss != without.loss).all()


@pytest.mark.optax_promotes
def test_the_program_does_not_grow_with_depth():
    def size(depth):
        arch = Architecture(depth, 5, train=11, penalized=("unit", "point"))
        state = tn.start(arch, tn.ThinRecipe(), RUNS)
        problem = _problem(arch, RUNS, np.random.default_rng(0))
        return len(tn.train.lower(arch, tn.ThinRecipe(), 2, state, problem).as_text().splitlines())

    assert size(5) == size(60)


def test_a_run_wider_than_its_program_is_refused():
    with pytest.raises(ValueError, match=r"runs\[1\].width=6 must be in 1..5"):
        tn.start(Architecture(2, 5, train=11), tn.ThinRecipe(), [tn.ThinRun(5, 0), tn.ThinRun(6, 0)])


def test_a_run_starts_from_the_same_weights_in_every_program():
    narrow, wide = (tn.start(Architecture(3, w, train=11), tn.ThinRecipe(), [tn.ThinRun(3, 7)]) for w in (3, 5))
    a, b = (_alone(Architecture(3, w, train=11), s.weights, 0, 3) for w, s in ((3, narrow), (5, wide)))
    _assert_equal_trees(a, b, rtol=0)


@pytest.mark.parametrize("layer", ["conv", "dense"])
def test_masks_of_a_thin_network_remove_a_shared_weight_wherever_it_is_used(layer):
    """Width 1, depth 2: z = k x + b by hand, with the second layer's first tap removed."""
    arch, runs = Architecture(2, 3, train=3, layer=layer), [tn.ThinRun(3, 0), tn.ThinRun(1, 1)]
    state = tn.start(arch, tn.ThinRecipe(), runs)
    kernels = tn.kernels_alone(arch, state, 1, runs[1])
    taps = 2 if layer == "conv" else 1
    assert {name: kernel.shape for name, kernel in kernels.items()} == {
        "first": (taps, 1, 2 // taps),
        "hidden": (1, taps, 1, 1),
    }
    inputs = np.array([[0.5, -1.0, 2.0], [1.0, 3.0, -0.5]], np.float32)
    masks = {"first": np.ones((taps, 1, 2 // taps), bool), "hidden": np.ones((1, taps, 1, 1), bool)}
    masks["hidden"][0, 0] = False
    preactivations, logits = tn.forward_alone(arch, state, 1, runs[1], inputs, masks=masks)
    first, head = kernels["first"], np.asarray(state.weights.head)[1].reshape(taps, 3)[:, 0]
    if layer == "conv":
        k0, k1 = first.ravel()
        a = np.maximum(np.stack([k0 * inputs[0] + k1 * inputs[1], k0 * inputs[1]]), 0)
        z = np.stack([kernels["hidden"][0, 1, 0, 0] * a[1], 0 * a[1]])
    else:
        z = np.zeros((1, 3))
    np.testing.assert_allclose(preactivations[1][..., 0, 0], z.T, rtol=1e-6)
    np.testing.assert_allclose(logits, head @ np.maximum(z, 0), rtol=1e-6)
