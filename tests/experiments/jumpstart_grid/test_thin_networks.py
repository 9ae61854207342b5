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
    return tn.Problem(jnp.asarray(inputs), jnp.asarray(labels), tn.real_units(arch, runs))


def _alone(arch, weights, index, width):
    """The thin network's own kernels and biases: taps (taps, out, in), not matrices."""
    w, stack = arch.width, jax.tree.map(np.asarray, weights.stack)

    def taps(matrix, inputs):
        if arch.positions == 1:
            return matrix[None, :width, :inputs]
        half = matrix.shape[1] // 2
        return np.stack([matrix[:width, :inputs], matrix[:width, half : half + inputs]])

    kernels = [taps(stack.first[index], 2 // arch.positions)]
    kernels += [taps(matrix[index], width) for matrix in stack.hidden]
    norm = None if stack.norm is None else [tuple(x[d, index, :width] for x in stack.norm) for d in range(arch.depth)]
    norm = norm and [tuple(jnp.asarray(x) for x in pair) for pair in norm]
    head = np.asarray(weights.head)[index].reshape(arch.positions, w)[:, :width]
    return {
        "kernels": kernels,
        "biases": [bias[index, :width] for bias in stack.bias],
        "norm": norm,
        "head": head,
        "head_bias": np.asarray(weights.head_bias)[index],
    }


def _plain_loss(arch, inputs, labels, params):
    """The same objective as a textbook network on (examples, positions, channels), autodiff throughout."""
    x = inputs.T[:, :, None] if arch.layer == "conv" else inputs.T[:, None, :]
    preacts = []
    for depth, (kernel, bias) in enumerate(zip(params["kernels"], params["biases"], strict=True)):
        if arch.layer == "conv":
            z = jax.lax.conv_general_dilated(
                x, jnp.transpose(kernel, (0, 2, 1)), (1,), [(0, 1)], dimension_numbers=("NWC", "WIO", "NWC")
            )
        else:
            z = x @ kernel[0].T[None]
        z = z + bias[None, None]
        preacts.append(z[:, :, None])
        if params["norm"] is not None:
            scale, shift = params["norm"][depth]
            mean, variance = z.mean((0, 1), keepdims=True), z.var((0, 1), keepdims=True)
            z = (z - mean) / jnp.sqrt(variance + 1e-3) * scale[None, None] + shift[None, None]
        x = jax.nn.relu(z)
    logits = (x * params["head"][None]).sum((1, 2)) + params["head_bias"]
    entropy = optax.sigmoid_binary_cross_entropy(logits, labels).mean()
    mode = {("unit", "point"): "full", ("unit",): "unit", ("point",): "point"}.get(arch.penalized)
    if mode is None:
        return entropy, 0.0
    return entropy, jumpstart_penalty(preacts, "cpaior_keras", mode=mode, balance=arch.balance)


CASES = [
    (1, {"penalized": ("unit", "point")}),
    (1, {"normalized": True}),
    (4, {"penalized": ("unit", "point"), "balance": 0.51}),
    pytest.param(4, {"penalized": ("unit",)}, marks=pytest.mark.slow),
    pytest.param(4, {"penalized": ("point",)}, marks=pytest.mark.slow),
    pytest.param(4, {}, marks=pytest.mark.slow),
    pytest.param(4, {"normalized": True}, marks=pytest.mark.slow),
    (4, {"penalized": ("unit", "point"), "layer": "dense"}),
]


def _perturbed(arch, weights, rng, real):
    """Biases and norms away from their initial values, padding left at zero."""
    real = 1.0 if real is None else np.asarray(real)

    def shake(x):
        noise = rng.normal(size=(*x.shape[:2], arch.width)).astype(np.float32) * 0.3
        return x + np.concatenate([noise] * arch.positions, -1) * real

    stack = weights.stack
    norm = stack.norm and type(stack.norm)(*(jnp.asarray(shake(np.asarray(x))) for x in stack.norm))
    return weights._replace(stack=stack._replace(bias=jnp.asarray(shake(np.asarray(stack.bias))), norm=norm))


def _assert_equal_trees(thin, plain, **tolerance):
    chex.assert_trees_all_close(thin, plain, **tolerance)


@pytest.mark.parametrize(("depth", "variant"), CASES, ids=str)
def test_value_and_gradient_of_padded_runs_are_those_of_each_thin_network_alone(depth, variant):
    rng = np.random.default_rng(depth)
    arch = Architecture(depth, 5, train=11, coefficient=0.07, **variant)
    problem = _problem(arch, RUNS, rng)
    state = tn.start(arch, tn.ThinRecipe(), RUNS)
    weights = _perturbed(arch, state.weights, rng, problem.real)
    seen = _gradient(arch, weights, problem, state.running)
    for index in range(len(RUNS)):
        _check_run(arch, problem, weights, seen, index)


def _gradient(arch, *args):
    return jax.jit(jax.grad(partial(tn.loss, arch), has_aux=True))(*args)


def _check_run(arch, problem, weights, seen, index):
    (grads, (outcome, _)), run = seen, RUNS[index]
    inputs, labels = problem.inputs[:, : arch.train], problem.labels[: arch.train]

    def objective(params):
        entropy, penalty = _plain_loss(arch, inputs, labels, params)
        return entropy + arch.coefficient * penalty, (entropy, penalty)

    textbook = jax.jit(jax.value_and_grad(objective, has_aux=True))
    (_, (entropy, penalty)), plain = textbook(_alone(arch, weights, index, run.width))
    np.testing.assert_allclose(outcome.loss[index], entropy, rtol=1e-6)
    np.testing.assert_allclose(outcome.penalty[index], penalty, rtol=4e-6, atol=1e-6)
    _assert_equal_trees(_alone(arch, grads, index, run.width), plain, rtol=2e-5, atol=2e-6)


def test_a_network_without_padding_needs_no_mask_and_gives_the_same_gradient_as_one_with_it():
    runs = [tn.ThinRun(5, 0), tn.ThinRun(5, 1)]
    arch = Architecture(3, 5, train=11, penalized=("unit", "point"))
    problem = _problem(arch, runs, np.random.default_rng(0))
    assert problem.real is None
    weights = tn.start(arch, tn.ThinRecipe(), runs).weights
    masked = problem._replace(real=jnp.ones((2, arch.units), bool))
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
        np.testing.assert_allclose(grads.stack.bias[-1, 0], np.full(6, expected), rtol=1e-5, atol=1e-6)


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
            c * v for c, v in zip((1, arch.coefficient), _plain_loss(arch, inputs, labels, p), strict=True)
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
def test_padding_stays_zero_and_shared_taps_stay_equal_through_training():
    arch = Architecture(4, 5, train=11, normalized=True)
    problem = _problem(arch, RUNS, np.random.default_rng(0))
    state = tn.train(arch, tn.ThinRecipe(), 30, tn.start(arch, tn.ThinRecipe(), RUNS), problem)
    hidden = np.asarray(state.weights.stack.hidden)
    width = arch.width
    np.testing.assert_array_equal(hidden[..., :width, :width], hidden[..., width:, width:])
    assert not hidden[..., width:, :width].any()
    real = np.asarray(problem.real)
    assert not hidden[:, ~(real[:, :, None] & real[:, None, :])].any()
    assert not np.asarray(state.weights.stack.bias)[:, ~real].any()
    assert not np.asarray(state.weights.head)[~real].any()


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


@pytest.mark.optax_promotes
def test_dropout_multiplies_before_every_hidden_layer_and_spares_validation():
    """With a given mask the gradient is autodiff's through the masked network."""
    arch = Architecture(3, 4, train=11, penalized=("unit", "point"), coefficient=0.01)
    runs = [tn.ThinRun(4, 0)]
    rng = np.random.default_rng(5)
    problem = _problem(arch, runs, rng)
    state = tn.start(arch, tn.ThinRecipe(dropout=True), runs)
    keep = tn._dropout(arch, state, problem)
    assert all((np.asarray(k)[..., 11:] == 1).all() for k in keep)
    np.testing.assert_allclose(np.unique(np.asarray(keep[1])[..., :11]), [0, 1 / 0.9], rtol=1e-6)

    def plain(stack):
        x = (problem.inputs * keep[0][0])[:, :11]
        penalty = 0.0
        for depth in range(3):
            kernel = stack.first[0] if depth == 0 else stack.hidden[depth - 1, 0]
            z = kernel @ x + stack.bias[depth, 0][:, None]
            places = jnp.moveaxis(z.reshape(2, 4, 11), 2, 0)[:, :, None]
            penalty += jumpstart_penalty([places], "cpaior_keras")
            x = jax.nn.relu(z) * (keep[1][depth, 0][:, :11] if depth < 2 else 1.0)
        logits = state.weights.head[0] @ x + state.weights.head_bias[0]
        return optax.sigmoid_binary_cross_entropy(logits, problem.labels[:11]).mean() + 0.01 * penalty

    grads, _ = _gradient(arch, state.weights, problem, None, keep)
    by_autodiff = jax.jit(jax.grad(plain))(state.weights.stack)
    half = lambda g: g[..., :4] + g[..., 4:]
    np.testing.assert_allclose(grads.stack.bias[..., :4], half(by_autodiff.bias), rtol=1e-4, atol=1e-6)


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
