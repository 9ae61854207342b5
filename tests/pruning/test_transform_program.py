"""The compiled programs of prune: the buffers read, the buffers kept, and the devices used."""

import functools
import re

import chex
import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jprune
from jprune.pruning.selection import kth_largest
from tests.pruning.steps import by_rank, slope


def small():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "conv": {"kernel": jax.random.normal(keys[0], (3, 3, 2)), "bias": jnp.zeros(2)},
        "dense": {"kernel": jax.random.normal(keys[1], (6, 5)), "bias": jnp.ones(5)},
    }


def test_an_update_outside_jit_selects_without_compiling_again():
    tx = jprune.prune(jprune.magnitude(), {0: 0.5, 2: 0.75})
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    state = tx.init(params)
    _, state = tx.update(slope(params), state, params)
    with pytest.MonkeyPatch.context() as patch:
        compiled = []
        patch.setattr("jax._src.compiler.compile_or_get_cached", lambda *a, **k: compiled.append(a))
        for _ in range(2):
            _, state = tx.update(slope(params), state, params)
    assert compiled == []
    np.testing.assert_array_equal(state.masks["kernel"], [[0, 0, 0, 0], [0, 0, 1, 1]])


def test_a_schedule_that_asks_for_no_change_compiles_no_selection():
    params = {"kernel": jnp.ones((2, 2))}
    for schedule in ({0: 0.0}, {0: jprune.Keep(4)}, {0: 0.0, 7: jprune.Keep(4)}):
        tx = jprune.prune(jprune.magnitude(), schedule)
        assert "while" not in str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))


@pytest.mark.parametrize("selection", [jprune.global_masks, jprune.layer_masks])
def test_an_update_uses_the_trace_of_the_selection_that_init_made(selection, monkeypatch):
    traced = []
    mark = kth_largest._mark_largest
    monkeypatch.setattr(kth_largest, "_mark_largest", lambda *a, **k: traced.append(1) or mark(*a, **k))
    params = {"a": {"kernel": jnp.ones((3, 7))}, "b": {"kernel": jnp.ones((7, 11))}}
    tx = jprune.prune(jprune.magnitude(), {0: 0.5, 2: 0.75}, selection=selection)
    state = tx.init(params)
    assert traced
    traced.clear()
    jax.make_jaxpr(tx.update)(params, state, params)
    assert not traced


def test_the_operands_of_the_selection_never_include_the_updates():
    tx = jprune.prune(jprune.gradient(), {3: 0.5})
    params = {"kernel": jnp.ones((2, 2))}
    state = tx.init(params)

    def update(updates, params, grad):
        return tx.update(updates, state, params, grad=grad)

    jaxpr = jax.make_jaxpr(update)(params, params, params).jaxpr
    tainted = {jaxpr.invars[0]}
    inner = [e for e in jaxpr.eqns if "advance" in str(e.params.get("name", ""))]
    assert len(inner) == 1
    assert "while[" in str(inner[0])
    for eqn in jaxpr.eqns:
        if eqn is inner[0]:
            break
        if any(not isinstance(v, jax.extend.core.Literal) and v in tainted for v in eqn.invars):
            tainted.update(eqn.outvars)
    assert not any(v in tainted for v in inner[0].invars if not isinstance(v, jax.extend.core.Literal))


def test_buffers_can_be_donated():
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9), jprune.prune(jprune.random(), {1: 0.5}, selection=by_rank, key=jax.random.key(0))
    )
    key_survives = jprune.prune(jprune.random(), {1: 0.5}, selection=by_rank, key=(key := jax.random.key(1))).init(
        small()
    )

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    params = small()
    state = tx.init(params)
    for _ in range(3):
        given = (params, state)
        with jax.numpy_dtype_promotion("standard"):
            params, state = step(params, state)
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(given))
    assert jprune.sparsity(jprune.masks_of(state)) == 0.5
    jax.block_until_ready((key_survives, jax.random.split(key)))
    params = small()
    step(params, tx.init(params))  # the key handed to prune is not the one that was donated


def test_a_train_step_lowers_for_every_platform():
    def loss(params, batch):
        hidden = jax.nn.relu(batch @ params["a"]["kernel"])
        return jnp.mean((hidden @ params["b"]["kernel"]) ** 2)

    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9), jprune.prune(jprune.gradient(), jprune.cubic(0.5, begin=0, end=9, every=2))
    )

    def step(params, state, batch):
        grad = jax.grad(loss)(params, batch)
        updates, state = tx.update(grad, state, params, grad=grad)
        return optax.apply_updates(params, updates), state

    params = {"a": {"kernel": jnp.ones((4, 8))}, "b": {"kernel": jnp.ones((8, 2))}}
    arguments = (params, tx.init(params), jnp.ones((16, 4)))
    with jax.numpy_dtype_promotion("standard"):
        exported = jax.export.export(jax.jit(step), platforms=("cpu", "cuda", "tpu"))(*arguments)
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert "stablehlo.while" in exported.mlir_module()


def test_nothing_of_a_selection_is_computed_outside_the_loop_that_runs_it():
    """Scores depend on nothing that the loop changes, so XLA would compute them at every step, before the loop."""
    score = lambda params, grad, batch, key: jax.tree.map(jnp.tan, params)
    tx = jprune.prune(score, {3: 0.5}, selection=by_rank)
    params = {"kernel": jnp.ones((40, 50))}
    step = jax.jit(lambda params, state: tx.update(params, state, params), donate_argnums=1)
    blocks = step.lower(params, tx.init(params)).compile().as_text().split("\n\n")
    (entry,) = [text for text in blocks if "ENTRY" in text]
    assert len(re.findall(r" while\(", entry)) == 1
    assert "tan" not in entry
    assert not re.findall(r"pred\[40,50\]\S* copy\(", entry)


SELECTIONS = [jprune.global_masks, jprune.layer_masks, jprune.selection.uniform_masks, jprune.erk_masks]


@pytest.mark.parametrize(
    ("dtype", "selections"),
    [
        (jnp.float32, SELECTIONS[:2]),
        pytest.param(jnp.float32, SELECTIONS[2:], marks=pytest.mark.slow),
        pytest.param(jnp.bfloat16, SELECTIONS, marks=pytest.mark.slow),
    ],
    ids=["float32", "float32, allocated", "bfloat16"],
)
@pytest.mark.slow
def test_magnitudes_compared_by_the_selection_give_the_masks_of_magnitudes_given_to_it(dtype, selections):
    draw = lambda key, shape: jnp.round(4 * jax.random.normal(key, shape)).astype(dtype)  # many ties
    keys = jax.random.split(jax.random.key(3), 2)
    params = {"a": {"kernel": draw(keys[0], (9, 7))}, "b": {"kernel": draw(keys[1], (3, 5, 8))}}
    params["a"]["kernel"] = params["a"]["kernel"].at[0, :3].set(jnp.array([-jnp.inf, -0.0, 0.0], dtype))
    axes = {"^b": jprune.KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,)), "^a": jprune.KernelAxes((), (0,), (1,))}
    scores = jprune.magnitude()(params)
    for selection in selections:
        options = {"axes": axes, "min_keep": 2, "sparsity": 0.7}
        wanted = jax.jit(functools.partial(selection, **options))(scores)
        found = jax.jit(functools.partial(selection, magnitude=True, **options))(params)
        chex.assert_trees_all_equal(found, wanted)


def test_prune_by_magnitude_gives_the_weights_to_the_selections_of_jprune_only():
    params = {"kernel": jnp.arange(-40.0, 40.0).reshape(8, 10)}

    @functools.wraps(jprune.global_masks)
    def normalized(scores, **options):
        seen.append(bool("magnitude" in options))
        return jprune.global_masks(jax.tree.map(lambda score: score / jnp.max(score), scores), **options)

    seen, masks = [], []
    for selection in (jprune.global_masks, functools.partial(jprune.global_masks, min_keep=1), normalized):
        tx = jprune.prune(jprune.magnitude(), {0: 0.75}, selection=selection)
        step = jax.jit(lambda params, state, tx=tx: tx.update(params, state, params)[1])
        masks.append(step(params, tx.init(params)).masks)
    assert seen
    assert not any(seen)
    weights = np.asarray(params["kernel"])
    for own in masks:  # 31 to 39, and by their place -30 before 30
        np.testing.assert_array_equal(own["kernel"], (weights >= 31) | (weights <= -30))
