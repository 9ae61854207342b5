"""Sharded weights: the masks are bit for bit the same on any mesh, and only counts move between devices."""

import functools
import math
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jprune

pytestmark = pytest.mark.optax_promotes

SPECS = {
    "one axis": (8, 1, {"a": P("x", None), "b": P(None, "x")}),
    "two axes": (4, 2, {"a": P("x", "y"), "b": P(("x", "y"), None)}),
}


def weights():
    keys = jax.random.split(jax.random.key(0), 2)
    # Rounded, so that many scores are equal and the position decides, across the borders of the shards.
    return {
        "a": {"kernel": jnp.round(jax.random.normal(keys[0], (16, 24)), 1), "bias": jnp.ones(24)},
        "b": {"kernel": jnp.round(jax.random.normal(keys[1], (24, 8)), 1)},
    }


def make():
    return optax.chain(
        optax.add_decayed_weights(1e-2),
        optax.sgd(0.05, momentum=0.9),
        jprune.prune(jprune.gradient(), jprune.cubic(0.9, begin=0, end=3, every=2)),
    )


def step(tx, params, state):
    grad = jax.tree.map(lambda w: 0.5 * w + 0.25, params)
    updates, state = tx.update(grad, state, params, grad=grad)
    return optax.apply_updates(params, updates), state


def run(params, steps=5):
    tx = make()
    state = tx.init(params)
    compiled = jax.jit(functools.partial(step, tx)).lower(params, state).compile()
    for _ in range(steps):
        params, state = compiled(params, state)
    return params, state, compiled


@functools.cache
def unsharded():
    params, state, _ = run(weights())
    return params, jprune.masks_of(state)


@functools.cache
def sharded(axis_type, layout):
    x, y, specs = SPECS[layout]
    mesh = jax.make_mesh((x, y), ("x", "y"), axis_types=(axis_type, axis_type))
    with jax.set_mesh(mesh):
        place = lambda leaf, spec: jax.device_put(leaf, NamedSharding(mesh, spec))
        params = {name: {"kernel": place(leaf["kernel"], specs[name])} for name, leaf in weights().items()}
        params["a"]["bias"] = place(weights()["a"]["bias"], P())
        return run(params)


CASES = pytest.mark.parametrize(
    ("axis_type", "layout"),
    [
        (AxisType.Auto, "one axis"),
        pytest.param(AxisType.Auto, "two axes", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, "one axis", marks=pytest.mark.slow),
        (AxisType.Explicit, "two axes"),
    ],
    ids=["auto-1", "auto-2", "explicit-1", "explicit-2"],
)


@CASES
@pytest.mark.quick(1)
def test_the_masks_are_those_of_unsharded_weights_bit_for_bit(axis_type, layout):
    params, state, _ = sharded(axis_type, layout)
    expected_params, expected = unsharded()
    masks = jprune.masks_of(state)
    for name in expected:
        np.testing.assert_array_equal(masks[name]["kernel"], expected[name]["kernel"])
        np.testing.assert_allclose(params[name]["kernel"], expected_params[name]["kernel"], rtol=1e-6)
    assert sum(int(masks[name]["kernel"].sum()) for name in masks) == round(576 * (1 - 0.9))
    jprune.check_pruned(params, state)


@CASES
def test_masks_and_weights_stay_where_the_weights_were(axis_type, layout):
    params, state, _ = sharded(axis_type, layout)
    masks, specs = jprune.masks_of(state), SPECS[layout][2]
    for name, spec in specs.items():
        for leaf in (params[name]["kernel"], masks[name]["kernel"]):
            assert leaf.sharding.is_equivalent_to(NamedSharding(leaf.sharding.mesh, spec), 2), leaf.sharding


@CASES
def test_the_program_moves_a_few_scalars_a_pass_and_nothing_else(axis_type, layout):
    _, _, compiled = sharded(axis_type, layout)
    text = compiled.as_text()
    for collective in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert not re.search(rf" {collective}(-start)?\(", text), collective
    reductions = re.findall(r"= (.*) all-reduce(?:-start)?\(", text)
    assert reductions
    for result in reductions:
        elements = sum(
            math.prod(map(int, dims.split(","))) if dims else 1 for dims in re.findall(r"\[([\d,]*)\]", result)
        )
        assert elements <= 64, result


def test_replicates_sharded_over_devices_select_for_themselves():
    mesh = jax.make_mesh((8,), ("replicates",), axis_types=(AxisType.Auto,))
    tx = jprune.prune(jprune.magnitude(), {1: jprune.Keep(5)})
    kernels = jax.random.normal(jax.random.key(3), (8, 4, 6))
    params = {"kernel": jax.device_put(kernels, NamedSharding(mesh, P("replicates")))}
    state = jax.vmap(tx.init)(params)
    update = jax.jit(jax.vmap(lambda p, s: tx.update(p, s, p)[1])).lower(params, state).compile()
    for _ in range(2):
        state = update(params, state)
    kept = np.asarray(state.masks["kernel"])
    for r in range(8):
        order = np.argsort(-np.abs(np.asarray(kernels[r]).ravel()), kind="stable")[:5]
        np.testing.assert_array_equal(np.flatnonzero(kept[r]), np.sort(order))
    assert " while(" in update.as_text().split("ENTRY")[1]
    assert not re.search(r" (all-gather|all-to-all|collective-permute)\(", update.as_text())


def test_in_data_parallel_shard_map_all_devices_prune_equally():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = optax.chain(optax.sgd(0.1), jprune.prune(jprune.gradient(), {1: jprune.Keep(10)}))
    params = {"kernel": jax.random.normal(jax.random.key(0), (4, 6))}
    x = jax.random.normal(jax.random.key(1), (16, 4))

    def grad_of(params, x):
        return jax.grad(lambda p: jnp.mean((x @ p["kernel"]) ** 2))(params)

    def local(params, state, x):
        grad = jax.lax.pmean(grad_of(jax.lax.pcast(params, "data", to="varying"), x), "data")
        updates, state = tx.update(grad, state, params, grad=grad)
        return optax.apply_updates(params, updates), state

    step = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=(P(), P())))

    @jax.jit
    def step_alone(params, state, x):
        grad = grad_of(params, x)
        updates, state = tx.update(grad, state, params, grad=grad)
        return optax.apply_updates(params, updates), state

    state, alone, other = tx.init(params), params, tx.init(params)
    for _ in range(3):
        params, state = step(params, state, x)
        alone, other = step_alone(alone, other, x)
    np.testing.assert_array_equal(jprune.masks_of(state)["kernel"], jprune.masks_of(other)["kernel"])
    np.testing.assert_allclose(params["kernel"], alone["kernel"], rtol=1e-5, atol=1e-7)
    assert int(jprune.masks_of(state)["kernel"].sum()) == 10


@pytest.mark.parametrize(
    "axis_type", [AxisType.Auto, pytest.param(AxisType.Explicit, marks=pytest.mark.slow)], ids=["auto", "explicit"]
)
def test_a_compiled_selection_needs_at_most_one_additional_copy_of_the_scores(axis_type):
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(axis_type, axis_type))
    layout = {"a": P("x", "y"), "b": P(("x", "y"), None)}

    def shapes(dtype):
        place = lambda spec: jax.ShapeDtypeStruct((1024, 512), dtype, sharding=NamedSharding(mesh, spec))
        return {name: place(spec) for name, spec in layout.items()}

    with jax.set_mesh(mesh):
        select = jax.jit(lambda scores, among: jprune.global_masks(scores, sparsity=0.9, among=among))
        memory = select.lower(shapes(jnp.float32), shapes(bool)).compile().memory_analysis()
    shard = 2 * 1024 * 512 // 8
    assert memory.output_size_in_bytes == pytest.approx(shard, abs=1024)
    assert memory.temp_size_in_bytes <= 1.02 * 4 * shard


STACKED = {"^stack": jprune.KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
PATTERNS = {
    "2:4": jprune.nm_masks,
    "outputs": functools.partial(jprune.output_masks, sparsity=0.5),
    "blocks": functools.partial(jprune.block_masks, sparsity=0.5),
    "channels": functools.partial(jprune.channel_masks, sparsity=0.5),
    "layers of a stack": functools.partial(jprune.layer_masks, sparsity=0.6),
    "uniform": functools.partial(jprune.uniform_masks, sparsity=0.6),
    "ERK": functools.partial(jprune.erk_masks, sparsity=0.6),
}


@pytest.mark.filterwarnings("ignore:no weight is kept in")
@pytest.mark.parametrize(
    "name",
    [
        name if name in ("2:4", "channels", "uniform") else pytest.param(name, marks=pytest.mark.slow)
        for name in PATTERNS
    ],
)
@pytest.mark.quick(1)
def test_every_selection_works_on_a_mesh_with_explicit_axes(name):
    """``jax.make_mesh`` makes these by default. A shard of 'b' has fewer inputs than a group of 2:4."""
    mesh = jax.make_mesh((4,), ("d",), devices=jax.devices()[:4])
    assert mesh.axis_types == (AxisType.Explicit,)
    shapes = {"a": (32, 8), "b": (8, 4), "stack": (4, 8, 4)}
    scores = {
        key: jnp.abs(jax.random.normal(jax.random.key(i), shape)) for i, (key, shape) in enumerate(shapes.items())
    }
    place = lambda x: jax.device_put(x, NamedSharding(mesh, P("d", *[None] * (x.ndim - 1))))
    placed = jax.tree.map(place, scores)
    select = functools.partial(PATTERNS[name], axes=STACKED)
    select = jax.jit(select)
    expected, found = select(scores), select(placed)
    chex.assert_trees_all_equal(found, expected)
    for key, mask in found.items():
        assert mask.sharding.is_equivalent_to(placed[key].sharding, mask.ndim)


def test_a_pattern_is_pruned_on_schedule_on_a_mesh_with_explicit_axes():
    mesh = jax.make_mesh((4,), ("d",), devices=jax.devices()[:4])
    kernel = jax.random.normal(jax.random.key(0), (8, 4))
    tx = jprune.prune(jprune.magnitude(), {0: 0.25, 1: 0.5}, selection=jprune.output_masks)
    found = []
    for params in ({"kernel": kernel}, {"kernel": jax.device_put(kernel, NamedSharding(mesh, P("d", None)))}):
        state = tx.init(params)
        for _ in range(2):
            _, state = jax.jit(tx.update)(params, state, params)
        found.append(state.masks["kernel"])
    assert int(found[0].sum()) == 16
    np.testing.assert_array_equal(found[1], found[0])
