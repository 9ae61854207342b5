"""Results on an accelerator agree with those on a CPU and, where numpy has an equivalent, with numpy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jprune
from experiments.data import datasets
from experiments.models import convolution
from experiments.recall_distortion import oneshot
from experiments.training import phases, replicates, tasks
from experiments.training.steps import Recipe
from tests.pruning.steps import largest

pytestmark = [pytest.mark.gpu, pytest.mark.optax_promotes]

RNG = np.random.default_rng(0)
SHAPES = {"conv": (3, 3, 8, 16), "dense": (400, 120), "wide": (300, 257), "head": (84, 10)}


@pytest.fixture(autouse=True)
def _full_precision():
    """Products of float32 in float32: an accelerator's default may round the factors first."""
    with jax.default_matmul_precision("highest"):
        yield


def on_cpu(function, *args):
    """The result of a function on the CPU, as numpy arrays."""
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return jax.tree.map(np.asarray, jax.jit(function)(*jax.device_put(args, cpu)))


def agree(function, *args, rtol=1e-5, atol=1e-6):
    """Check that a function of arrays gives the same result on both devices; the tolerance applies only to floats."""
    here = jax.tree.map(np.asarray, jax.jit(function)(*args))
    for a, b in zip(jax.tree.leaves(here), jax.tree.leaves(on_cpu(function, *args)), strict=True):
        assert a.dtype == b.dtype
        if np.issubdtype(a.dtype, np.inexact):
            np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)
        else:
            np.testing.assert_array_equal(a, b)


def tree(kind="normal", dtype=np.float32):
    draw = {
        "normal": RNG.standard_normal,
        "ties": lambda shape: RNG.integers(-3, 4, shape) / 2,
        "spread": lambda shape: RNG.standard_normal(shape) * 10.0 ** RNG.integers(-4, 4, shape),
    }[kind]
    return {name: {"kernel": jnp.asarray(draw(shape), dtype)} for name, shape in SHAPES.items()}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=lambda dtype: dtype.__name__)
@pytest.mark.parametrize("kind", ["normal", "ties", "spread"])
def test_a_selection_is_that_of_a_stable_sort(kind, dtype):
    scores = tree(kind, dtype)
    size = sum(leaf.size for leaf in jax.tree.leaves(scores))
    for keep in (1, size // 50, size // 2, size - 1):
        found = jax.jit(lambda s, keep=keep: jprune.global_masks(s, keep=keep))(scores)
        wanted = largest([np.asarray(leaf, np.float32) for leaf in jax.tree.leaves(scores)], keep)
        for mask, expected in zip(jax.tree.leaves(found), wanted, strict=True):
            np.testing.assert_array_equal(mask, expected)


def test_a_selection_of_a_hundred_million_scores_keeps_the_largest():
    scores = RNG.standard_normal(10**8, dtype=np.float32)
    keep = len(scores) // 20
    found = np.asarray(jax.jit(lambda s: jprune.global_masks({"kernel": s}, keep=keep))(jnp.asarray(scores))["kernel"])
    assert found.sum() == keep
    assert scores[found].min() >= scores[~found].max()


@pytest.mark.parametrize("masks", [
    partial(jprune.layer_masks, sparsity=0.75), partial(jprune.uniform_masks, sparsity=0.75),
    partial(jprune.erk_masks, sparsity=0.75), partial(jprune.nm_masks, n=2, m=4),
], ids=lambda masks: masks.func.__name__)  # fmt: skip
def test_masks_of_every_kind_are_those_of_a_cpu(masks):
    agree(masks, tree("ties"))


def test_scores_are_those_of_a_cpu():
    params, grads = tree(), tree()
    for score in (jprune.magnitude(), jprune.gradient(), jprune.undecayed(5e-4)):
        agree(lambda p, g, score=score: score(p, grad=g), params, grads, rtol=1e-6)
    agree(lambda p: jprune.random()(p, key=jax.random.key(3)), params)


def test_a_chain_that_prunes_while_training_ends_with_the_weights_of_a_cpu():
    params = tree()
    tx = optax.chain(
        optax.add_decayed_weights(5e-4), optax.sgd(0.05, 0.9, nesterov=True),
        jprune.prune(jprune.undecayed(5e-4), {3: 0.5, 6: 0.75, 9: 0.95}, where=jprune.by_path(exclude=r"^head/")),
    )  # fmt: skip

    def train(params):
        def step(carry, _):
            params, state = carry
            grads = jax.tree.map(lambda w: jnp.sin(3 * w + 1), params)
            updates, state = tx.update(grads, state, params, grad=grads)
            return (optax.apply_updates(params, updates), state), None

        (params, state), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=12)
        return params, jprune.masks_of(state)

    agree(train, params, rtol=1e-4, atol=1e-5)
    trained, masks = jax.jit(train)(params)
    assert int(jnp.count_nonzero(trained["dense"]["kernel"])) == int(masks["dense"]["kernel"].sum())


@pytest.mark.parametrize("preset", ["cpaior_keras", "cpaior_torch", None])
def test_the_penalty_and_its_gradient_are_those_of_a_cpu(preset):
    layers = [jnp.asarray(RNG.standard_normal(shape), jnp.float32) for shape in ((64, 50), (64, 9, 9, 6), (64, 10))]
    options = {} if preset is None else {"preset": preset}
    agree(jax.value_and_grad(lambda layers: jprune.jumpstart_penalty(layers, **options)), layers)


class Deep(nnx.Module):
    """Thin dense layers."""

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(20)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


def test_units_and_points_have_the_statuses_they_have_on_a_cpu():
    graph, params = nnx.split(Deep(nnx.Rngs(0)))
    x = jnp.asarray(RNG.standard_normal((32, 4)), jnp.float32)

    def statuses(params, x):
        found = jprune.preactivations(nnx.merge(graph, params), x)
        return jprune.unit_status(found), jprune.jumpstart.point_status(found)

    agree(statuses, params, x)


@pytest.mark.parametrize("form", [convolution.batch_last, convolution.channels_last])
@pytest.mark.parametrize("replicated", [False, True])
def test_a_convolution_and_its_gradients_are_those_of_a_cpu(form, replicated):
    x = jnp.asarray(RNG.standard_normal((3, 6, 9, 8, 3)), jnp.float32)
    kernel = jnp.asarray(RNG.standard_normal((3, 3, 3, 3, 8)), jnp.float32)
    conv = lambda x, w: convolution.max_pool(convolution.relu(form(x, w, (1, 1), "SAME"), True), True)
    loss = jax.value_and_grad(lambda x, w: (conv(x, w) ** 2).sum(), (0, 1))
    if replicated:
        agree(jax.vmap(loss), x, kernel, rtol=1e-4, atol=1e-4)
    else:
        agree(loss, x[0], kernel[0], rtol=1e-4, atol=1e-4)


def test_counts_are_those_of_numpy():
    labels, found = RNG.integers(0, 10, 1000), RNG.integers(0, 10, (7, 1000))
    wanted = np.zeros((7, 10, 10), int)
    for model, predictions in enumerate(found):
        np.add.at(wanted[model], (labels, predictions), 1)
    np.testing.assert_array_equal(jprune.recall.counts(jnp.asarray(labels), jnp.asarray(found), 10), wanted)


@pytest.mark.parametrize("form", ["vmap", "map"])
def test_replicates_in_one_program_train_as_they_do_on_a_cpu(form):
    images = RNG.integers(0, 256, (96, 28, 28, 1)).astype(np.uint8)
    split = datasets.Split(images, (np.arange(96) % 10).astype(np.int32))
    dataset = datasets.Dataset("noise", split, split, split, tuple("abcdefghij"), np.float32([128]), np.float32([70]))
    task = tasks.classification(dataset, "lenet")
    recipe = Recipe((2,), (0.01,), batch=32, jumpstart=0.1)

    def losses(mesh):
        layout = replicates.Placement(mesh, form, "scan")
        phase = phases.compile_phase(task, recipe, oneshot.PRUNABLE, layout, examples=96, validation=96)
        init = lambda i: (*task.init(replicates.key(0, i, 0)), replicates.key(0, i, 1))
        entering = replicates.spread(init, layout)(replicates.place(np.arange(3, dtype=np.int32), mesh))
        _, metrics = phases.fit(phase, entering, *replicates.share((split, split), mesh))
        return np.array([m.validation_loss for m in metrics])

    cpu = jax.sharding.Mesh(np.array(jax.devices("cpu")[:1]), (replicates.AXIS,))
    one = jax.sharding.Mesh(np.array(jax.devices()[:1]), (replicates.AXIS,))
    np.testing.assert_allclose(losses(one), losses(cpu), rtol=1e-3)
