"""Filter scores and layer-adaptive amounts against their formulas in float64 numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from jprune.graph.axes import KernelAxes
from jprune.pruning.scores.filters import filter_taylor, geometric_median, norm_scale
from jprune.pruning.scores.layer_adaptive import lamp, owl_sparsities


def _random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def _distances(filters):
    """Equation 6: the sum of the distances of each row to all rows."""
    return np.array([sum(np.linalg.norm(a - b) for b in filters) for a in filters.astype(np.float64)])


def test_geometric_median_of_convolutions_dense_and_stacked_kernels():
    conv, dense, stacked = _random(3, 3, 2, 5), _random(4, 6), _random(2, 4, 3)
    params = {name: {"kernel": jnp.asarray(k)} for name, k in (("conv", conv), ("dense", dense), ("stack", stacked))}
    axes = {"^stack": KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
    scores = geometric_median(axes=axes)(params)
    wanted = _distances(conv.reshape(-1, 5).T)
    np.testing.assert_allclose(scores["conv"]["kernel"], np.broadcast_to(wanted, conv.shape), rtol=1e-5)
    np.testing.assert_allclose(scores["dense"]["kernel"][0], _distances(dense.T), rtol=1e-5)
    for i in range(2):
        np.testing.assert_allclose(scores["stack"]["kernel"][i, 1], _distances(stacked[i].T), rtol=1e-5)


def test_geometric_median_of_outputs_first_and_of_several_output_axes():
    weight, heads = _random(5, 3), _random(3, 2, 4)
    params = {"weight": jnp.asarray(weight), "kernel": jnp.asarray(heads)}
    scores = geometric_median(axes={"kernel": KernelAxes(inputs=(0,), outputs=(2, 1))})(params)
    np.testing.assert_allclose(scores["weight"][:, 0], _distances(weight), rtol=1e-5)
    wanted = _distances(heads.reshape(3, 8).T).reshape(2, 4)
    np.testing.assert_allclose(scores["kernel"][1], wanted, rtol=1e-5)


def test_geometric_median_compares_filters_of_one_feature_group_only():
    # Filters 1, 9 read other inputs than 1.01, 5.
    groups = {"": KernelAxes(inputs=(0,), outputs=(1,), groups=2)}
    scores = geometric_median(axes=groups)({"kernel": jnp.array([[1.0, 9.0, 1.01, 5.0]])})
    np.testing.assert_allclose(scores["kernel"], [[8.0, 8.0, 3.99, 3.99]], rtol=1e-5)
    conv = _random(2, 3, 3, 2, 6)
    roles = {"": KernelAxes(stacked=(0,), spatial=(1, 2), inputs=(3,), outputs=(4,), groups=2)}
    scores = geometric_median(axes=roles)({"kernel": jnp.asarray(conv)})["kernel"]
    for layer in range(2):
        filters = conv[layer].reshape(-1, 6).T
        wanted = np.concatenate([_distances(filters[:3]), _distances(filters[3:])])
        np.testing.assert_allclose(scores[layer, 1, 2, 0], wanted, rtol=1e-5)
    depthwise = {"": KernelAxes(spatial=(0, 1), inputs=(2,), outputs=(3,), groups=4)}
    params = {"kernel": jnp.ones((3, 3, 1, 4))}
    assert geometric_median(axes=depthwise)(params)["kernel"] is None
    tx = jprune.prune(geometric_median(axes=depthwise), {0: 0.5}, axes=depthwise)
    with pytest.raises(ValueError, match="has no score for 'kernel'; leave this leaf out with"):
        tx.update(params, tx.init(params), params)


def test_a_filter_with_a_duplicate_goes_before_an_equal_one_without():
    kernel = jnp.array([[1.0, 1.0, 0.0, -1.0], [0.0, 0.0, 1.0, -1.0]])
    masks = jprune.channel_masks(geometric_median()({"kernel": kernel}), keep=6)
    np.testing.assert_array_equal(masks["kernel"][0], [True, False, True, True])


def test_filter_taylor_squares_the_sum_over_each_filter():
    kernel, grad = _random(3, 3, 2, 4), _random(3, 3, 2, 4, seed=1)
    params = {"kernel": jnp.asarray(kernel), "bias": jnp.ones(4)}
    scores = filter_taylor()(params, grad={"kernel": jnp.asarray(grad), "bias": jnp.ones(4)})
    wanted = (kernel.astype(np.float64) * grad).sum((0, 1, 2)) ** 2
    np.testing.assert_allclose(scores["kernel"], np.broadcast_to(wanted, kernel.shape), rtol=1e-4)
    assert scores["bias"] is None


def test_norm_scales_score_nothing_else():
    params = {"norm": {"scale": jnp.array([0.5, -2.0]), "bias": jnp.ones(2)}, "dense": {"kernel": jnp.ones((2, 2))}}
    scores = norm_scale()(params)
    np.testing.assert_array_equal(scores["norm"]["scale"], [0.5, 2.0])
    assert scores["norm"]["bias"] is None
    assert scores["dense"]["kernel"] is None


def _lamp(weights):
    flat = np.abs(weights.astype(np.float64)).ravel()
    return np.array([w**2 / (flat[flat >= w] ** 2).sum() for w in flat]).reshape(weights.shape)


def test_lamp_is_its_formula_for_each_layer():
    one, two = _random(6, 5), 100 * _random(2, 3, 4, seed=1)
    axes = {"^two": KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
    params = {"one": {"kernel": jnp.asarray(one)}, "two": {"kernel": jnp.asarray(two)}}
    scores = lamp(axes=axes)(params)
    np.testing.assert_allclose(scores["one"]["kernel"], _lamp(one), rtol=1e-5)
    for i in range(2):
        np.testing.assert_allclose(scores["two"]["kernel"][i], _lamp(two[i]), rtol=1e-5)


@pytest.mark.filterwarnings("ignore:no weight is kept in:UserWarning")
def test_lamp_leaves_every_layer_a_weight_where_magnitude_empties_one():
    params = {"large": {"kernel": jnp.asarray(_random(10, 10))}, "small": {"kernel": jnp.asarray(_random(4, 4)) / 100}}
    lamp_masks = jprune.global_masks(lamp()(params), keep=10)
    assert int(lamp_masks["small"]["kernel"].sum()) >= 1
    with pytest.warns(UserWarning, match="small/kernel"):
        magnitude_masks = jprune.global_masks(jprune.magnitude()(params), keep=10)
    assert int(magnitude_masks["small"]["kernel"].sum()) == 0


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_lamp_does_not_depend_on_the_scale_of_the_weights(scale):
    scores = lamp()({"kernel": scale * jnp.array([[1.0, 2.0]])})["kernel"]
    np.testing.assert_allclose(scores, [[0.2, 1.0]], rtol=1e-6)


def test_lamp_of_zeros_and_ties():
    scores = lamp()({"kernel": jnp.array([[0.0, 1.0], [1.0, 0.0]])})["kernel"]
    np.testing.assert_allclose(scores, [[0.0, 1.0], [0.5, 0.0]])


def test_lamp_warns_of_a_leaf_whose_layers_it_cannot_tell():
    with pytest.warns(UserWarning, match=r"leaf 'kernel' of shape \(2, 3, 4\): it is treated as one layer"):
        lamp()({"kernel": jnp.ones((2, 3, 4))})


def test_owl_is_the_published_scaling_for_blocks_of_equal_size():
    random = np.random.default_rng(0)
    scores = {f"blocks/{i}/{name}": np.abs(random.standard_t(2 + i, size=50)) for i in range(4) for name in "ab"}
    found = owl_sparsities(jax.tree.map(jnp.asarray, scores), 0.7, spread=0.08, blocks=r"^blocks/\d+/")
    ratios = []
    for i in range(4):  # the published code: outliers in percent, scaled to [0, 2 lambda], centred on the mean
        block = np.concatenate([scores[f"blocks/{i}/a"], scores[f"blocks/{i}/b"]]).astype(np.float32)
        ratios.append((block > 5 * block.mean()).mean() * 100)
    ratios = np.array(ratios)
    scaled = (ratios - ratios.min()) * (1 / (ratios.max() - ratios.min()) * 0.08 * 2)
    keep = scaled - scaled.mean() + 0.3
    for i in range(4):
        for name in "ab":
            assert found[f"^blocks/{i}/{name}$"] == pytest.approx(1 - keep[i], abs=1e-9)


def test_owl_keeps_the_total_where_layers_differ_in_size():
    scores = {"a.b": jnp.asarray(np.abs(_random(30, 30)) ** 5), "b": jnp.asarray(np.abs(_random(10))), "c": None}
    found = owl_sparsities(scores, 0.5, spread=0.3)
    assert sorted(found) == ["^a\\.b$", "^b$"]
    assert 900 * found["^a\\.b$"] + 10 * found["^b$"] == pytest.approx(455)
    assert found["^b$"] == 1.0  # .5 + .6 is more than all of it
    empty = owl_sparsities(scores | {"empty": jnp.ones((0, 3))}, 0.5, spread=0.3)
    assert {name: empty[name] for name in found} == found


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: owl_sparsities({"a": jnp.ones(3)}, 1.5), r"sparsity is 1\.5; it must be from 0\.0 to 1\.0"),
        (lambda: owl_sparsities({"a": jnp.ones(3)}, 0.5, spread=2.0), r"spread is 2\.0; it must be from 0\.0 to 1\.0"),
        (lambda: owl_sparsities({"a": None}, 0.5), "every leaf is None"),
        (lambda: jax.jit(lambda a: owl_sparsities({"a": a}, 0.5))(jnp.ones(3)), "the scores of 'a' are traced"),
        (
            lambda: geometric_median()({"kernel": jnp.ones((2, 3, 4))}),
            r"leaf 'kernel' of shape \(2, 3, 4\): a filter has the weights into one output",
        ),
        (lambda: filter_taylor()({"kernel": jnp.ones((2, 3))}), "the score filter_taylor needs grad"),
    ],
)
def test_bad_arguments_are_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_integer_is_no_sparsity():
    with pytest.raises(TypeError, match="sparsity is 1; it must be a float"):
        owl_sparsities({"a": jnp.ones(3)}, 1)
