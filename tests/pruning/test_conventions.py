"""Conventions are resolved on all parameters, also where a score or selection sees the kernels alone."""

import warnings

import jax
import numpy as np
import optax
import pytest

import jprune
from jprune.pruning.selection.patterns import output_masks
from jprune.scores import geometric_median, lamp


def _layer(key=0, **shapes):
    keys = jax.random.split(jax.random.key(key), len(shapes))
    return {"layer": {name: jax.random.normal(k, shape) for k, (name, shape) in zip(keys, shapes.items(), strict=True)}}


UNKNOWN = {
    "einsum, outputs first": ("flax", _layer(kernel=(12, 8), bias=(12,))),
    "transposed convolution": ("flax", _layer(kernel=(3, 3, 12, 8), bias=(12,))),
    "three 1-D convolutions": ("flax", _layer(kernel=(3, 3, 8, 8), bias=(3, 8))),
    "four 1-D convolutions": ("equinox", _layer(weight=(4, 8, 8, 1), bias=(4, 8, 1))),
    "three 1-D convolutions, no convention": (None, _layer(kernel=(3, 3, 8, 8), bias=(3, 8))),
}


@pytest.mark.parametrize(("axes", "params"), UNKNOWN.values(), ids=UNKNOWN)
@pytest.mark.parametrize("selection", [jprune.nm_masks, output_masks], ids=["n:m", "outputs"])
def test_prune_reads_the_bias_that_tells_the_axes(axes, params, selection):
    tx = jprune.prune(jprune.magnitude(), {0: 0.5}, selection=selection, axes=axes)
    with pytest.raises(ValueError, match=r"'layer/(kernel|weight)'.*do not say which axes these are"):
        tx.init(params)


@pytest.mark.parametrize(("axes", "params"), [case for case in UNKNOWN.values() if case[0]])
def test_scores_and_their_selections_refuse_or_warn(axes, params):
    with pytest.raises(ValueError, match="which axes these are"):
        geometric_median(axes=axes)(params)
    with pytest.warns(UserWarning, match="it is treated as one layer"):
        lamp(axes=axes)(params)
    scores = jprune.magnitude()(params)
    with pytest.raises(ValueError, match=r"'layer/(kernel|weight)'.*its name and shape are ambiguous"):
        jprune.nm_masks(scores, axes=jprune.prunable(params, axes=axes))


@pytest.mark.parametrize(("axes", "params"), [case for case in UNKNOWN.values() if case[0]])
def test_transformations_that_need_axes_refuse(axes, params):
    with pytest.raises(ValueError, match="which axes these are"):
        jprune.sr_ste(optax.sgd(0.1), n=2, m=4, axes=axes).init(params)
    with pytest.raises(ValueError, match="which axes these are"):
        jprune.group_soft_threshold(0.1, axes=axes).init(params)


def _scanned_attention():
    shapes = dict.fromkeys(("query", "key", "value"), (3, 8, 2, 4)) | {"out": (3, 2, 4, 8)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return {"attn": {n: {"kernel": jax.random.normal(k, s)} for k, (n, s) in zip(keys, shapes.items(), strict=True)}}


def test_a_selection_of_scores_says_how_to_read_the_biases():
    scores = jprune.magnitude(where=jprune.by_path(include="query/kernel"))(_scanned_attention())
    with pytest.raises(
        ValueError, match=r"or axes=jprune.prunable\(params, axes='flax'\), which also reads the biases$"
    ):
        jprune.nm_masks(scores, axes="flax")


@pytest.mark.parametrize("where", [jprune.by_path(include="query/kernel"), jprune.by_path(exclude="/out/")])
def test_a_part_of_scanned_attention_is_read_as_the_whole_is(where):
    params = _scanned_attention()
    by_output = jprune.prune(jprune.magnitude(), {0: 0.5}, selection=output_masks, axes="flax", where=where)
    _, state = by_output.update(params, by_output.init(params), params)
    assert np.asarray(state.masks["attn"]["query"]["kernel"].sum(1) == 4).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = lamp(axes="flax", where=where)(params)
    layers = [np.abs(np.ravel(layer)) for layer in params["attn"]["query"]["kernel"]]
    smallest = [min(layer) ** 2 / (layer**2).sum() for layer in layers]
    np.testing.assert_allclose(scores["attn"]["query"]["kernel"].min((1, 2, 3)), smallest, rtol=1e-5)
    found = jprune.layer_masks(scores, sparsity=0.5, axes=jprune.prunable(params, where, axes="flax"))
    assert found["attn"]["query"]["kernel"].sum((1, 2, 3)).tolist() == [32, 32, 32]
    jprune.check_pruned(optax.apply_updates(params, by_output.update(params, state, params)[0]), state, axes="flax")


def test_a_transformation_tells_parameters_apart_whose_kernels_have_the_same_shapes():
    tx = jprune.prune(jprune.magnitude(), {0: 0.5}, selection=jprune.nm_masks, axes="flax")
    dense, einsum = _layer(kernel=(8, 8), bias=(8,)), _layer(kernel=(8, 8), bias=(2, 4))
    state = tx.init(dense)
    tx.update(dense, state, dense)
    with pytest.raises(ValueError, match="which axes these are"):
        tx.update(einsum, state, einsum)


def test_every_function_takes_the_axes_that_prunable_shows():
    params = {
        "conv": _layer(kernel=(3, 3, 4, 8), bias=(8,))["layer"],
        "head": _layer(kernel=(8, 4), bias=(4,))["layer"],
    }
    axes = jprune.prunable(params, axes="flax")
    tx = jprune.prune(jprune.magnitude(), {0: 0.5}, selection=output_masks, axes=axes)
    updates, state = tx.update(params, tx.init(params), params)
    pruned = optax.apply_updates(params, updates)
    jprune.check_pruned(pruned, state, sparsity=0.5, axes=axes)
    assert {row.path for row in jprune.prunable(params, axes=axes)} == {"conv/kernel", "head/kernel"}
    table = jprune.cost_table(params, jprune.masks_of(state), axes=axes)
    assert table.loc["head/kernel", "nonzeros"] == 16


def test_a_convention_that_selects_nothing_names_the_leaves_it_looks_for():
    params = {"linear": {"w": np.ones((2, 3), np.float32)}}  # as in Haiku
    with pytest.raises(
        ValueError, match=r"where=\(leaves called kernel, lora_a, lora_b, of two or more axes\) selects no"
    ):
        jprune.prunable(params, axes="flax")
