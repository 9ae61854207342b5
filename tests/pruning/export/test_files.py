"""Files read back have the same bits, values and dtypes; files that do not match raise an error naming the leaf."""

import functools
import json
import os

import chex
import equinox
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jprune
from jprune.pruning.export import files


def net():
    key = jax.random.split(jax.random.key(3), 3)
    params = {
        "conv": {"kernel": jax.random.normal(key[0], (3, 3, 2, 5)), "bias": jnp.arange(5.0)},
        "head": {"kernel": jax.random.normal(key[1], (7, 3)).astype(jnp.bfloat16), "bias": None},
        "step": jnp.int32(4),
    }
    masks = {
        "conv": {"kernel": jax.random.bernoulli(key[2], 0.3, (3, 3, 2, 5)), "bias": None},
        "head": {"kernel": jnp.arange(21).reshape(7, 3) % 4 == 0, "bias": None},
        "step": None,
    }
    return params, masks


assert_same = functools.partial(chex.assert_trees_all_equal, strict=True)  # shapes and dtypes too


def test_masks_come_back_bit_for_bit_in_an_eighth_of_a_byte_a_weight(tmp_path):
    params, masks = net()
    files.save_masks(tmp_path / "m", masks)
    assert_same(files.load_masks(tmp_path / "m", params), masks)
    stored = safetensors.numpy.load_file(tmp_path / "m")
    assert stored["conv/kernel#bits"].nbytes == 12  # 90 bits
    assert os.listdir(tmp_path) == ["m"]


@settings(max_examples=25)
@given(st.lists(st.integers(0, 5), min_size=0, max_size=3), st.integers(0, 2**32 - 1))
def test_masks_of_any_shape_come_back(tmp_path_factory, shape, seed):
    mask = np.random.default_rng(seed).random(shape) < 0.5
    file = tmp_path_factory.mktemp("masks") / "m"
    files.save_masks(file, {"w": jnp.asarray(mask)})
    np.testing.assert_array_equal(files.load_masks(file, {"w": jnp.zeros(shape)})["w"], mask)


def test_masks_fit_the_same_paths_in_another_kind_of_tree(tmp_path):
    state = nnx.state(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Param)
    mask = jnp.array([[True, False, True], [False, False, True]])
    files.save_masks(tmp_path / "m", {"params": {"kernel": mask}})
    loaded = files.load_masks(tmp_path / "m", state)
    assert isinstance(loaded, nnx.State)
    np.testing.assert_array_equal(jax.tree.leaves(loaded)[0], mask)


@pytest.mark.parametrize("with_masks", [False, True])
def test_weights_come_back_and_pruned_ones_are_zero(tmp_path, with_masks):
    params, masks = net()
    files.save_pruned(tmp_path / "w", params, masks if with_masks else None)
    wanted = params
    if with_masks:
        wanted = jax.tree.map(lambda w: w, params)
        for layer in ("conv", "head"):
            kernel = params[layer]["kernel"]
            wanted[layer]["kernel"] = jnp.where(masks[layer]["kernel"], kernel, jnp.zeros_like(kernel))
    assert_same(files.load_pruned(tmp_path / "w", params), wanted)


def test_dense_weights_are_read_by_any_safetensors_reader(tmp_path):
    params, _ = net()
    files.save_pruned(tmp_path / "w", params)
    plain = safetensors.numpy.load_file(tmp_path / "w")
    np.testing.assert_array_equal(plain["conv/kernel"], params["conv"]["kernel"])


def test_masks_that_do_not_fit_are_refused_by_leaf(tmp_path):
    params, masks = net()
    files.save_masks(tmp_path / "m", masks)
    with pytest.raises(ValueError, match=r"has \['head/kernel'\], which params lacks; params has \['conv/bias'"):
        files.load_masks(tmp_path / "m", {"conv": params["conv"]})
    wide = {**params, "head": {"kernel": jnp.zeros((7, 4)), "bias": None}}
    with pytest.raises(ValueError, match=r"shape \(7, 3\) at 'head/kernel', where params has \(7, 4\)"):
        files.load_masks(tmp_path / "m", wide)
    with pytest.raises(ValueError, match="dtype int32 at 'w'; masks must be boolean"):
        files.save_masks(tmp_path / "n", {"w": jnp.ones(3, jnp.int32)})
    with pytest.raises(ValueError, match="nothing to save"):
        files.save_masks(tmp_path / "n", {"w": None})
    assert not (tmp_path / "n").exists()


def test_weights_that_do_not_fit_are_refused_by_leaf(tmp_path):
    params, masks = net()
    files.save_pruned(tmp_path / "w", params, masks)
    with pytest.raises(ValueError, match="has no leaf 'more'"):
        files.load_pruned(tmp_path / "w", {**params, "more": jnp.ones(1)})
    half = {**params, "step": jnp.float32(4)}
    with pytest.raises(ValueError, match="'step' is int32, where params has float32"):
        files.load_pruned(tmp_path / "w", half)


def test_broken_files_are_named(tmp_path):
    params, masks = net()
    files.save_pruned(tmp_path / "w", params, masks)
    whole = (tmp_path / "w").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-7])
    with pytest.raises(ValueError, match="cut is not a whole safetensors file"):
        files.load_pruned(tmp_path / "cut", params)
    safetensors.numpy.save_file({"a": np.ones(2)}, tmp_path / "foreign")
    with pytest.raises(ValueError, match="foreign was not written by jprune"):
        files.load_masks(tmp_path / "foreign", params)
    safetensors.numpy.save_file(
        {"step#bits": np.zeros(9, np.uint8)},
        tmp_path / "lie",
        metadata={"format": "jprune-1", "shapes": json.dumps({"step": [3]})},
    )
    with pytest.raises(ValueError, match="the mask of 'step' does not have the 3 bits"):
        files.load_masks(tmp_path / "lie", params)


@pytest.mark.parametrize(
    "shapes", ["[]", "3", '{"step": 3}', '{"step": ["3"]}', '{"step": [-3, -1]}', '{"step": [3.0]}']
)
def test_shapes_that_are_no_lists_of_sizes_are_refused(tmp_path, shapes):
    bits, metadata = {"step#bits": np.zeros(1, np.uint8)}, {"format": "jprune-1", "shapes": shapes}
    safetensors.numpy.save_file(bits, tmp_path / "odd", metadata=metadata)
    with pytest.raises(ValueError, match="odd: the shapes of its masks are not lists of sizes"):
        files.load_masks(tmp_path / "odd", net()[0])


@pytest.mark.parametrize("shapes", ["{", "[" * 100_000])
def test_shapes_that_are_no_json_are_refused(tmp_path, shapes):
    bits, metadata = {"step#bits": np.zeros(1, np.uint8)}, {"format": "jprune-1", "shapes": shapes}
    safetensors.numpy.save_file(bits, tmp_path / "odd", metadata=metadata)
    with pytest.raises(ValueError, match="odd is not a whole safetensors file"):
        files.load_masks(tmp_path / "odd", net()[0])


def test_bcoo_holds_exactly_the_kept_weights_and_multiplies_like_the_masked_matrix():
    params, masks = net()
    params["conv"]["kernel"] = params["conv"]["kernel"].at[tuple(np.argwhere(masks["conv"]["kernel"])[0])].set(0.0)
    sparse = files.to_bcoo(params, masks)
    assert sparse["conv"]["kernel"].nse == int(masks["conv"]["kernel"].sum())
    assert sparse["conv"]["bias"] is params["conv"]["bias"]
    matrix = params["conv"]["kernel"].reshape(18, 5)
    mask = masks["conv"]["kernel"].reshape(18, 5)
    product = files.to_bcoo({"w": matrix}, {"w": mask})["w"].T @ jnp.ones(18)
    np.testing.assert_allclose(product, np.where(mask, matrix, 0).sum(0), rtol=1e-6)


@pytest.mark.parametrize("kept", [True, False])
def test_a_masked_scalar_becomes_a_sparse_scalar(kept):
    """It has no axis and so no index, but one value if it is kept; this was an error of jax about shapes."""
    sparse = files.to_bcoo({"scale": jnp.array(2.0)}, {"scale": jnp.array(kept)})["scale"]
    assert sparse.nse == kept
    assert sparse.todense() == (2.0 if kept else 0.0)


def test_keys_and_leaves_that_are_not_arrays_are_skipped_and_come_from_the_template(tmp_path):
    key = jax.random.key(0)
    params = {"kernel": jnp.ones((2, 2)), "rng": key, "activation": jnp.tanh, "depth": 3}
    masks = {"kernel": jnp.eye(2, dtype=bool), "rng": None, "activation": None, "depth": None}
    files.save_pruned(tmp_path / "w", params, masks)
    loaded = files.load_pruned(tmp_path / "w", {**params, "kernel": jnp.zeros((2, 2))})
    np.testing.assert_array_equal(loaded["kernel"], np.eye(2))
    assert loaded["rng"] is key
    assert loaded["activation"] is jnp.tanh
    assert loaded["depth"] == 3
    assert set(safetensors.numpy.load_file(tmp_path / "w")) == {"kernel#bits", "kernel#values"}
    files.save_masks(tmp_path / "m", {**masks, "rng": key})
    assert set(safetensors.numpy.load_file(tmp_path / "m")) == {"kernel#bits"}


def test_modules_are_saved_as_they_are(tmp_path):
    mlp = equinox.nn.MLP(2, 3, 4, 1, key=jax.random.key(0))
    files.save_pruned(tmp_path / "w", mlp)
    loaded = files.load_pruned(tmp_path / "w", mlp)
    assert loaded.activation is mlp.activation
    assert_same(equinox.filter(loaded, equinox.is_array), equinox.filter(mlp, equinox.is_array))
    dropout = nnx.state(nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Dropout(0.5, rngs=nnx.Rngs(1))))
    files.save_pruned(tmp_path / "d", dropout)
    loaded = files.load_pruned(tmp_path / "d", dropout)
    assert jax.tree.structure(loaded) == jax.tree.structure(dropout)
    chex.assert_trees_all_equal(loaded["layers"][0], dropout["layers"][0])


def test_loaded_arrays_have_the_shardings_of_the_template(tmp_path):
    mesh = jax.make_mesh((8,), ("shard",), axis_types=(AxisType.Auto,))
    spread = NamedSharding(mesh, PartitionSpec("shard"))
    params = {"kernel": jax.device_put(jnp.arange(32.0).reshape(8, 4), spread), "bias": jnp.ones(4)}
    masks = {"kernel": params["kernel"] > 7, "bias": None}
    files.save_pruned(tmp_path / "w", params, masks)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), params)
    for template in (params, shapes):
        loaded = files.load_pruned(tmp_path / "w", template)
        assert loaded["kernel"].sharding == spread
        np.testing.assert_array_equal(loaded["kernel"], jprune.apply_masks(params, masks)["kernel"])
        assert files.load_masks(tmp_path / "w", template)["kernel"].sharding == spread


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda file: files.save_pruned(file, {"x": jnp.ones(2, jnp.int4)}), "dtype int4 at 'x', .* cast it"),
        (lambda file: files.save_pruned(file, {"a/b": jnp.ones(1), "a": {"b": jnp.ones(2)}}), "more than .* 'a/b'"),
        (lambda file: files.save_masks(file, {"a/b": jnp.ones(1, bool), "a": {"b": jnp.ones(2, bool)}}), "'a/b'"),
        (lambda file: jax.jit(lambda p: files.save_pruned(file, p))({"x": jnp.ones(2)}), "traced at 'x'; call .* jit"),
        (
            lambda file: files.to_bcoo({"x": jnp.ones(2)}, {"x": jnp.ones(2)}),
            "dtype float32 at 'x'; masks must be bool",
        ),
    ],
)
def test_leaves_that_cannot_be_saved_are_refused_by_name(tmp_path, call, message):
    with pytest.raises(ValueError, match=message):
        call(tmp_path / "w")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["kernel#bits", "kernel#values"])
def test_paths_of_parts_of_masked_leaves_are_refused(tmp_path, path):
    params = {"kernel": jnp.ones(8), path: jnp.zeros(1, jnp.uint8)}
    with pytest.raises(ValueError, match=f"params has a leaf with the path '{path}'; rename it, because a file stores"):
        files.save_pruned(tmp_path / "file", params, {"kernel": jnp.ones(8, bool), path: None})
    with pytest.raises(ValueError, match=f"masks has a leaf with the path '{path}'"):
        files.save_masks(tmp_path / "file", {path: jnp.ones(8, bool)})
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="its folder does not exist; create it first"):
        files.save_pruned(tmp_path / "none" / "w", {"x": jnp.ones(2)})


def test_a_folder_in_place_of_a_file_is_named(tmp_path):
    for read in (files.load_masks, files.load_pruned):
        with pytest.raises(IsADirectoryError, match=f"{tmp_path.name} is a folder; pass the path of a file in it$"):
            read(tmp_path, {"a": jnp.ones(2)})


def test_a_file_without_masks_is_said_to_have_none(tmp_path):
    params = {"kernel": jnp.ones((2, 2))}
    jprune.io.save_pruned(tmp_path / "dense.safetensors", params)
    with pytest.raises(ValueError, match=r"dense.safetensors has no masks, because it was saved without masks=; read"):
        jprune.io.load_masks(tmp_path / "dense.safetensors", params)


def test_a_file_of_masks_has_no_weights_to_load(tmp_path):
    path = tmp_path / "masks.safetensors"
    files.save_masks(path, {"kernel": jnp.array([True, False]), "bias": None})
    with pytest.raises(ValueError, match=r"has only masks; read them with jprune\.io\.load_masks"):
        files.load_pruned(path, {"kernel": jnp.ones(2), "bias": jnp.ones(2)})
