"""Every public transformation, selection and score lowers for cpu, cuda and tpu on any machine."""

import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import jprune

pytestmark = pytest.mark.optax_promotes
PLATFORMS = ("cpu", "cuda", "tpu")


def lowered(function, *arguments):
    """The program for all platforms; ``exported`` raises for custom calls that one of them lacks."""
    exported = jax.export.export(jax.jit(function), platforms=PLATFORMS)(*arguments)
    assert exported.platforms == PLATFORMS
    return exported.mlir_module()


def params():
    return {"a": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}, "b": {"kernel": jnp.ones((4, 4))}}


def forward(params, x):
    return jax.nn.relu(x @ params["a"]["kernel"]) @ params["b"]["kernel"]


def loss(params, x):
    return jnp.mean(forward(params, x) ** 2)


def train_step(tx, params, state, batch):
    grad = jax.grad(loss)(params, batch)
    updates, state = tx.update(grad, state, params, grad=grad, batch=batch)
    return optax.apply_updates(params, updates), state


RIGL = jprune.Regrow(jprune.scores.dense_gradient(), jprune.schedules.cosine_fraction(0.3, end=9))
PRUNE = jprune.prune(jprune.gradient(), {0: 0.5, 3: 0.75})
TRANSFORMATIONS = {
    "layers": optax.chain(optax.adam(0.1), jprune.prune(jprune.magnitude(), {1: 0.5}, selection=jprune.layer_masks)),
    "ERK with a floor": jprune.prune(jprune.undecayed(), {1: 0.5}, selection=jprune.erk_masks, min_keep=2),
    "2:4": jprune.prune(jprune.magnitude(), {1: 0.5}, selection=jprune.nm_masks),
    "blocks": jprune.prune(jprune.magnitude(), {1: 0.5}, selection=functools.partial(jprune.block_masks, block=(2, 2))),
    "channels": jprune.prune(jprune.scores.movement(), {1: 0.5}, selection=jprune.channel_masks),
    "random": jprune.prune(
        jprune.random(), {1: 0.5}, selection=jprune.selection.bernoulli_masks, key=jax.random.key(0)
    ),
    "fisher": jprune.prune(jprune.scores.fisher(loss), {1: 0.5}),
    "wanda": jprune.prune(jprune.wanda(forward), {1: 0.5}, selection=jprune.output_masks),
    "synflow": jprune.prune(jprune.scores.synflow(forward, input_shape=(1, 8)), {1: 0.5}),
    "RigL": jprune.reset_moments(optax.adam(0.1), jprune.prune(jprune.magnitude(), {0: 0.5, 2: 0.5}, regrow=RIGL)),
    "keep_zeros": optax.chain(optax.sgd(0.1, momentum=0.9), jprune.keep_zeros()),
    "partition": optax.partition({"x": PRUNE, "y": optax.adam(0.1)}, {"a": "x", "b": "y"}),
    "MultiSteps": optax.MultiSteps(optax.chain(optax.sgd(0.1), PRUNE), 2).gradient_transformation(),
    "inject_hyperparams": optax.inject_hyperparams(lambda rate: optax.chain(optax.sgd(rate), PRUNE))(rate=0.1),
    "apply_if_finite": optax.apply_if_finite(optax.chain(optax.sgd(0.1), PRUNE), 3),
    "schedule_free": contrib.schedule_free(optax.chain(optax.sgd(0.1), PRUNE), 0.1),
}


# Each of these lowers parts that others lower too.
SLOW = {"layers", "blocks", "fisher", "MultiSteps", "inject_hyperparams", "apply_if_finite", "schedule_free"}


@pytest.mark.filterwarnings("ignore:keep_zeros has no zero")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TRANSFORMATIONS]
)
@pytest.mark.quick(4)
def test_a_train_step_with_every_transformation(name):
    tx = TRANSFORMATIONS[name]
    text = lowered(functools.partial(train_step, tx), params(), tx.init(params()), jnp.ones((3, 8)))
    if name != "keep_zeros":
        assert "stablehlo.case" in text or "stablehlo.if" in text


def test_replicates_under_vmap_keep_their_conditional():
    tx = optax.chain(optax.sgd(0.1), PRUNE)
    many = jax.tree.map(lambda x: jnp.stack([x, x]), params())
    step = jax.vmap(functools.partial(train_step, tx), in_axes=(0, 0, None))
    text = lowered(step, many, jax.vmap(tx.init)(many), jnp.ones((3, 8)))
    assert "stablehlo.case" in text or "stablehlo.if" in text


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
def test_masks_straight_through_rounds_of_scoring_and_sparse_products():
    masks = jprune.global_masks(jprune.magnitude()(params()), sparsity=0.5)
    lowered(lambda p: loss(jprune.straight_through(p, masks), jnp.ones((3, 8))), params())
    lowered(lambda p: jprune.apply_masks(p, masks), params())
    score = jprune.scores.synflow(forward, input_shape=(1, 8))
    lowered(lambda p: jprune.selection.iterated_masks(score, p, keep=9, rounds=3, min_keep=1), params())
    lowered(
        lambda p, x: jprune.scores.snip()(p, grad=jprune.scores.average_gradients(loss, p, [x])),
        params(),
        jnp.ones((3, 8)),
    )
    lowered(lambda p: jprune.selection.legacy_signed_masks(jprune.undecayed(signed=True)(p, grad=p), keep=5), params())
    lowered(lambda p: jprune.uniform_masks(jprune.magnitude()(p), keep=5), params())
