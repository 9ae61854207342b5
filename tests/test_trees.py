"""Leaves have the same names in every kind of tree, are selected by pattern and matched by path."""

import inspect
from typing import NamedTuple

import equinox as eqx
import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jprune import trees


class Pair(NamedTuple):
    left: object
    right: object


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(2, name="head")(nn.Dense(3, name="body")(x))


class NnxNet(nnx.Module):
    def __init__(self, rngs):
        self.body = nnx.Linear(4, 3, rngs=rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)


PATHS = ["body/bias", "body/kernel", "head/bias", "head/kernel"]


def nnx_state():
    return nnx.state(NnxNet(nnx.Rngs(0)), nnx.Param)


def linen_variables():
    return LinenNet().init(jax.random.key(0), jnp.ones((1, 4)))


def test_nnx_and_linen_leaves_have_the_same_paths():
    variables = linen_variables()
    for tree in (nnx_state(), variables, variables["params"], flax.core.freeze(variables)):
        assert trees.flatten(tree)[0] == PATHS


def test_a_dict_key_called_value_and_a_lone_params_are_kept():
    assert trees.flatten({"a": {"value": 1}})[0] == ["a/value"]
    assert trees.flatten({"params": 1})[0] == ["params"]


def test_paths_of_tuples_named_tuples_and_equinox_modules():
    assert trees.flatten((1, [2, Pair(3, 4)]))[0] == ["0", "1/0", "1/1/left", "1/1/right"]
    linear = eqx.nn.Linear(2, 3, key=jax.random.key(0))
    assert trees.flatten(linear)[0] == ["weight", "bias"]


def test_map_leaves_skips_none_and_keeps_the_class_of_the_tree():
    state = nnx_state()
    kernels_only = trees.only(state, trees.kernels)
    doubled = trees.map_leaves(lambda x: 2 * x, kernels_only)
    assert isinstance(doubled, nnx.State)
    np.testing.assert_array_equal(doubled["head"]["kernel"].get_value(), 2 * state["head"]["kernel"].get_value())
    assert len(jax.tree.leaves(doubled)) == 2


def test_kernels_takes_float_matrices_named_kernel_or_weight_and_nothing_else():
    float_matrix, int_matrix, vector = jnp.ones((2, 2)), jnp.ones((2, 2), jnp.int32), jnp.ones(2)
    assert trees.kernels("a/kernel", float_matrix)
    assert trees.kernels("weight", float_matrix.astype(jnp.bfloat16))
    assert not trees.kernels("a/kernel", int_matrix)
    assert not trees.kernels("a/kernel", vector)
    assert not trees.kernels("kernel/a", float_matrix)
    assert not trees.kernels("kernel", None)


def test_only_selects_by_pattern_and_by_default_what_kernels_selects():
    state = nnx_state()

    def chosen(where):
        paths, leaves, _ = trees.flatten(trees.only(state, where))
        return [path for path, leaf in zip(paths, leaves, strict=True) if leaf is not None]

    assert chosen(trees.by_path()) == ["body/kernel", "head/kernel"]
    assert chosen(trees.by_path(exclude=r"^head/")) == ["body/kernel"]
    assert chosen(trees.by_path(include=r"bias$", exclude=r"^head/")) == ["body/bias"]


def test_only_never_selects_a_leaf_that_is_not_float():
    tree = {"step": jnp.int32(3), "w": jnp.ones(2), "key": jax.random.key(0), "none": None}
    kept = trees.only(tree, lambda path, leaf: True)
    assert {k for k, v in kept.items() if v is not None} == {"w"}


@pytest.mark.parametrize(
    ("where", "message"),
    [
        (trees.by_path(include="kernal$"), r"include='kernal\$' matches no leaf; the tree has 'body/bias'"),
        (trees.by_path(exclude="^tail/"), r"exclude='\^tail/' matches no leaf"),
        (lambda path, leaf: False, "selects no float leaf; the tree has 'body/bias', 'body/kernel'"),
    ],
)
def test_a_selection_of_nothing_names_the_paths_there_are(where, message):
    with pytest.raises(ValueError, match=message):
        trees.only(nnx_state(), where)


def test_a_broken_pattern_is_refused_when_it_is_given():
    with pytest.raises(ValueError, match=r"include='\(' is not a regular expression"):
        trees.by_path(include="(")
    with pytest.raises(TypeError, match="exclude=5 is an int; it must be a regular expression"):
        inspect.unwrap(trees.by_path)(exclude=5)  # without the type checker of the tests
    with pytest.raises(TypeError, match="sparsity has the key 5, which is an int; it must be a regular expression"):
        inspect.unwrap(trees.first_matches)([5], {"a": ["a"]}, name="sparsity")


def test_match_pairs_leaves_by_path_across_classes_of_tree():
    state, variables = nnx_state(), linen_variables()
    matched = trees.match(state, variables, reference_name="params", name="grad")
    for leaf, path in zip(matched, PATHS, strict=True):
        layer, kind = path.split("/")
        assert leaf is variables["params"][layer][kind]


def test_match_names_the_leaf_that_is_missing_surplus_or_misshapen():
    ones = jnp.ones((2, 3))
    with pytest.raises(ValueError, match=r"masks has no leaf 'a/b', which params has; masks has 'a/c'"):
        trees.match({"a": {"b": ones}}, {"a": {"c": ones}}, reference_name="params", name="masks")
    with pytest.raises(ValueError, match=r"masks has a leaf 'c', which params lacks: 'b'"):
        trees.match({"b": ones}, {"b": ones, "c": ones}, reference_name="params", name="masks")
    with pytest.raises(ValueError, match=r"shape \(3, 2\) at 'b', where params has shape \(2, 3\)"):
        trees.match({"b": ones}, {"b": ones.T}, reference_name="params", name="masks")


def test_match_takes_none_for_a_leaf_and_empty_nodes_for_nothing():
    ones = jnp.ones(2)
    assert trees.match({"a": ones, "b": ones}, {"a": None, "b": ones}, reference_name="p", name="m") == [None, ones]
    masked = {"a": optax.MaskedNode(), "b": ones}
    assert trees.flatten(masked)[0] == ["b"]


def test_a_leaf_that_is_selected_but_not_float_is_named_with_its_dtype():
    with pytest.raises(ValueError, match="where selects 'kernel', which is int32; only float arrays can be pruned"):
        trees.only({"kernel": jnp.ones((2, 2), jnp.int32)}, trees.kernels)
