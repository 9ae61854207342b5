"""Warnings and reports name the layers that have no weights left."""

import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

import jprune

STACKED = {"^blocks/kernel$": jprune.KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
PARAMS = {
    "blocks": {"kernel": jnp.stack([jnp.full((2, 3), 5.0), jnp.full((2, 3), 0.1)])},
    "head": {"kernel": jnp.full((3, 2), 0.2)},
    "tail": {"kernel": jnp.full((3, 2), 9.0)},
}
BOTH = r"no weight is kept in 'blocks/kernel\[1\]', 'head/kernel'; keep more, or pass min_keep=1"


@pytest.fixture(autouse=True)
def _other_warnings_are_errors():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.mark.slow
def test_a_selection_outside_jit_names_the_layers_it_emptied():
    scores = jprune.magnitude()(PARAMS)
    with pytest.warns(UserWarning, match=BOTH):
        jprune.global_masks(scores, keep=12, axes=STACKED)
    with pytest.warns(UserWarning, match=r"no weight is kept in 'head/kernel'; keep"):  # the stack as one layer keeps 6
        jprune.global_masks(scores, keep=12)
    with pytest.warns(UserWarning, match=BOTH):
        jprune.channel_masks(scores, sparsity=0.5, axes=STACKED)
    with pytest.warns(UserWarning, match=BOTH):
        jprune.block_masks(scores, sparsity=0.5, block=(1, 1), axes=STACKED)
    with pytest.warns(UserWarning, match=BOTH):
        jprune.selection.legacy_signed_masks(scores, keep=12, axes=STACKED)
    jprune.global_masks(scores, keep=12, min_keep=1, axes=STACKED)
    jprune.global_masks(scores, sparsity=1.0)
    jprune.global_masks(scores, keep=0)


def test_sparsegpt_names_the_layers_it_emptied():
    inputs = {"head": jnp.eye(3), "tail": jnp.eye(3)}
    params = {name: PARAMS[name] for name in inputs}
    with pytest.warns(UserWarning, match="no weight is kept in 'head/kernel', 'tail/kernel'; lower sparsity="):
        jprune.sparsegpt(params, inputs, sparsity=0.95)  # .3 of 6 weights


def test_a_layer_that_was_empty_before_is_not_named_again():
    scores = jprune.magnitude()(PARAMS)
    among = jax.tree.map(lambda s: s > 0.15, scores)
    with pytest.warns(UserWarning, match=r"no weight is kept in 'head/kernel'; keep"):
        jprune.global_masks(scores, keep=12, among=among, axes=STACKED)


def test_a_ratio_that_must_empty_a_layer_is_named_at_init_with_the_floor_that_avoids_it():
    tx = jprune.prune(jprune.magnitude(), {9: 0.95}, selection=jprune.layer_masks, axes=STACKED)
    with pytest.warns(
        UserWarning, match=r"no weight is kept in 'blocks/kernel\[0\]', 'blocks/kernel\[1\]', 'head/kernel', "
    ):
        tx.init(PARAMS)
    jprune.prune(jprune.magnitude(), {9: 0.95}, selection=jprune.layer_masks, axes=STACKED, min_keep=1).init(PARAMS)
    jprune.prune(jprune.magnitude(), {9: 1.0}, selection=jprune.layer_masks, axes=STACKED).init(PARAMS)


def test_prune_outside_jit_and_check_pruned_name_the_layers_that_are_empty():
    tx = optax.chain(optax.sgd(0.0), jprune.prune(jprune.magnitude(), {1: 0.5}, axes=STACKED))
    state, params = tx.init(PARAMS), PARAMS
    updates, state = tx.update(params, state, params)
    with pytest.warns(UserWarning, match=BOTH):
        updates, state = tx.update(params, state, params)
    params = optax.apply_updates(params, updates)
    _, after = tx.update(params, state, params)
    with pytest.warns(UserWarning, match=BOTH):
        jprune.check_pruned(params, after, axes=STACKED)
    with pytest.warns(UserWarning, match=r"no weight is kept in 'head/kernel'; keep"):
        jprune.check_pruned(params, after)
    jax.jit(tx.update)(params, state, params)  # nothing can be seen there


def test_cost_table_names_empty_layers_and_has_a_row_for_each():
    masks = jax.tree.map(lambda w: w > 1.0, PARAMS)
    with pytest.warns(UserWarning, match=BOTH):
        table = jprune.cost_table(PARAMS, masks, axes=STACKED)
    assert table["nonzeros"].to_dict() == {
        "blocks/kernel[0]": 6,
        "blocks/kernel[1]": 0,
        "head/kernel": 0,
        "tail/kernel": 6,
        "total": 12,
    }
    assert table.loc["blocks/kernel[1]", "shape"] == (2, 3)
    pruned = jprune.apply_masks(PARAMS, masks) | {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
    with pytest.warns(UserWarning, match=r"no weight is kept in 'blocks/kernel\[1\]'; keep"):  # a bias may be zero
        jprune.cost_table(pruned, axes=STACKED)


def test_cost_table_divides_the_multiply_adds_of_a_scan_among_its_layers():
    params = {"blocks": {"kernel": jnp.ones((2, 3, 3))}}

    def apply(params, x):
        return jax.lax.scan(lambda h, kernel: (h @ kernel, None), x, params["blocks"]["kernel"])[0]

    masks = {"blocks": {"kernel": jnp.ones((2, 3, 3), bool).at[1, :, 1:].set(False)}}
    table = jprune.cost_table(params, masks, apply=apply, inputs=[jnp.ones((5, 3))], axes=STACKED)
    assert table["multiply_adds"].tolist() == [45, 45, 90]
    assert table["effective_multiply_adds"].tolist() == [45, 15, 60]


def test_check_pruned_says_whether_the_amount_is_reached():
    tx = jprune.prune(jprune.magnitude(), {0: 0.5, 5: 0.75})
    params = {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    jprune.check_pruned(params, state, sparsity=0.5)
    jprune.check_pruned(params, state, keep=4)
    message = r"4 of 8 prunable weights are kept \(sparsity 0\.5\), more than the 2 requested; check that the schedule"
    with pytest.raises(ValueError, match=message):
        jprune.check_pruned(params, state, sparsity=0.75)


def test_check_pruned_says_which_layer_does_not_reach_its_amount():
    params = {"a": {"kernel": jnp.arange(1.0, 9.0).reshape(2, 4)}, "b": {"kernel": jnp.arange(1.0, 5.0).reshape(2, 2)}}
    tx = jprune.prune(jprune.magnitude(), {0: {"^a": 0.75, "": 0.25}}, selection=jprune.layer_masks)
    updates, state = tx.update(params, tx.init(params), params)
    params = optax.apply_updates(params, updates)
    jprune.check_pruned(params, state, sparsity={"^a": 0.75, "": 0.25})
    jprune.check_pruned(params, state, keep={"^a": 2, "^b": 3})
    with pytest.raises(
        ValueError, match=r"3 of 4 prunable weights of 'b/kernel' are kept .* more than the 2 requested"
    ):
        jprune.check_pruned(params, state, sparsity={"": 0.5})  # 5 of all 12 are kept, fewer than 6
    with pytest.warns(
        UserWarning, match="2 of 8 prunable weights of 'a/kernel' are kept .* fewer than the 4 requested"
    ):
        jprune.check_pruned(params, state, sparsity={"^a": 0.5, "": 0.25})
    stack = {"blocks": {"kernel": jnp.ones((2, 2, 2), bool).at[1].set(False)}}
    state = jprune.keep_zeros().init(stack := {"blocks": {"kernel": stack["blocks"]["kernel"].astype(jnp.float32)}})
    with pytest.raises(ValueError, match=r"4 of 4 prunable weights of 'blocks/kernel\[0\]' are kept"):
        jprune.check_pruned(stack, state, sparsity={"": 0.5}, axes=STACKED)
