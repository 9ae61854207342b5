"""The penalty on eight devices has the value and gradient of one device, also with ties and padding."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jprune
from jprune.jumpstart import Stack

MESH, EXPLICIT = (jax.make_mesh((8,), ("data",), axis_types=(kind,)) for kind in (AxisType.Auto, AxisType.Explicit))
RNG = np.random.default_rng(0)
BATCH = 16


def tied(*shape):
    """Few values, so that units and points tie across devices and within one."""
    return jnp.asarray(RNG.integers(-2, 2, (BATCH, *shape)) / 2, jnp.float32)


LAYERS = [tied(3), tied(2, 2, 5), tied(3)]
UNITS = [jnp.array([True, True, False]), None, jnp.array([False, True, True])]
EXAMPLES = jnp.arange(BATCH) < 11  # the padding fills the last two devices and part of a third


def sharded(function):
    """A function (layers, examples) -> penalty on all devices, each with its slice of the batch."""
    spec = (P("data"), P("data"))
    return jax.shard_map(function, mesh=MESH, in_specs=spec, out_specs=P())


close = partial(chex.assert_trees_all_close, rtol=1e-6, atol=1e-6)
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    ("ties", "padded", "options"),
    [
        ("average", True, {"aggregate": "balanced"}),
        slow("single", True, {"aggregate": "balanced"}),
        slow("single", False, {"aggregate": "norm", "mode": "all_but_point_positive"}),
        slow("average", True, {"aggregate": "sum_squares", "spatial": "none"}),
        ("single", True, {"aggregate": "mean", "spatial": "none"}),
        slow("average", True, {"aggregate": "mean", "mode": "layer"}),
        slow("single", True, {"aggregate": "mean", "mode": "layer"}),
    ],
    ids=str,
)
def test_value_and_gradient_over_devices_are_those_of_one(ties, options, padded):
    options = {**options, "ties": ties, "balance": 0.51, "units": UNITS if padded else None}

    def penalty(layers, examples, **more):
        return jprune.jumpstart_penalty(layers, examples=examples if padded else None, **options, **more)

    alone = jax.jit(jax.value_and_grad(penalty))(LAYERS, EXAMPLES)
    over = jax.jit(jax.value_and_grad(sharded(partial(penalty, axis_name="data"))))(LAYERS, EXAMPLES)
    close(over, alone)


@pytest.mark.parametrize("spatial", ["none", slow("pool")])
def test_padded_positions_over_devices_are_left_out_as_on_one(spatial):
    layers, positions = [tied(2, 3), tied(2, 2, 17), tied(3)], jnp.asarray(RNG.random((BATCH, 2)) < 0.4)
    positions = positions.at[:4].set(False)  # the first two devices have only padding

    def penalty(layers, positions, **more):
        return jprune.jumpstart_penalty(layers, examples=positions, ties="single", spatial=spatial, **more)

    alone = jax.jit(jax.value_and_grad(penalty))(layers, positions)
    close(jax.jit(jax.value_and_grad(sharded(partial(penalty, axis_name="data"))))(layers, positions), alone)
    placed = jax.device_put((layers, positions), NamedSharding(EXPLICIT, P("data")))
    close(jax.jit(jax.value_and_grad(penalty))(*placed), alone)


def test_a_random_tie_gives_the_whole_gradient_to_one_of_the_tied_cells_of_all_devices():
    z = jnp.zeros((BATCH, 1))
    options = {"mode": "unit_positive", "aggregate": "sum", "ties": "random", "axis_name": "data"}
    chosen = []

    @jax.jit
    def gradient(z, key):
        of = lambda z, _: jprune.jumpstart_penalty([z], key=key, **options)
        return jax.grad(sharded(of))(z, EXAMPLES)

    for seed in range(12):
        slope = np.asarray(gradient(z, jax.random.key(seed))).ravel()
        assert sorted(slope) == [-0.5] + [0.0] * (BATCH - 1)
        chosen.append(int(slope.argmin()))
    assert len(set(chosen)) > 4


def test_a_stack_of_layers_over_devices():
    values = jnp.stack([tied(4) for _ in range(3)])
    in_spec = P(None, "data")

    def penalty(values, **more):
        return jprune.jumpstart_penalty(Stack(values), ties="single", **more)

    over = jax.shard_map(partial(penalty, axis_name="data"), mesh=MESH, in_specs=in_spec, out_specs=P())
    close(jax.jit(jax.value_and_grad(over))(values), jax.jit(jax.value_and_grad(penalty))(values))


@pytest.mark.parametrize("ties", ["average", slow("single")])
def test_the_gradient_of_replicated_parameters_is_the_single_device_one(ties):
    kernel, x = jnp.asarray(RNG.integers(-1, 2, (4, 3)), jnp.float32), tied(4)

    def penalty(kernel, x, **more):
        return jprune.jumpstart_penalty([x @ kernel], ties=ties, aggregate="norm", **more)

    alone = jax.jit(jax.value_and_grad(penalty))(kernel, x)
    specs = {"mesh": MESH, "in_specs": (P(), P("data")), "out_specs": P()}
    over = jax.jit(jax.shard_map(jax.value_and_grad(partial(penalty, axis_name="data")), **specs))(kernel, x)
    close(over, alone)

    def summed(kernel, x):
        value, gradient = jax.value_and_grad(partial(penalty, axis_name="data"))(kernel, x)
        return value, jax.lax.psum(gradient, "data")

    close(jax.jit(jax.shard_map(summed, **specs, check_vma=False))(kernel, x), alone)


@pytest.mark.parametrize(
    ("ties", "mesh"),
    [
        pytest.param(
            ties, mesh, id=f"{ties}-{name}", marks=[] if f"{ties}-{name}" == "single-explicit" else [pytest.mark.slow]
        )
        for ties in ("average", "single", "random")
        for name, mesh in (("auto", MESH), ("explicit", EXPLICIT))
    ],
)
def test_automatic_and_explicit_sharding_need_no_axis_name(ties, mesh):
    def penalty(layers, examples):
        key = jax.random.key(5) if ties == "random" else None
        return jprune.jumpstart_penalty(layers, units=UNITS, examples=examples, ties=ties, key=key)

    over_batch = NamedSharding(mesh, P("data"))
    placed = jax.device_put(LAYERS, over_batch), jax.device_put(EXAMPLES, over_batch)
    program = jax.jit(jax.value_and_grad(penalty))
    close(program(*placed), program(LAYERS, EXAMPLES))


@pytest.mark.parametrize("check_vma", [True, slow(False)])
@pytest.mark.optax_promotes
def test_the_link_adds_the_global_gradient_on_every_device(check_vma):
    params, x = {"kernel": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)}, tied(4)
    link = lambda **more: optax.chain(
        jprune.add_jumpstart(lambda params, x: [x @ params["kernel"]], 0.3, ties="single", **more), optax.sgd(1.0)
    )

    def step(params, x, tx):
        updates, state = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params, batch=x)
        return updates, state[0].penalty

    alone = jax.jit(partial(step, tx=link()))(params, x)
    over = jax.shard_map(
        partial(step, tx=link(axis_name="data")),
        mesh=MESH,
        in_specs=(P(), P("data")),
        out_specs=(P(), P()),
        check_vma=check_vma,
    )
    close(jax.jit(over)(params, x), alone)
