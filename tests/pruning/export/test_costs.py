"""Parameters, nonzeros and multiply-adds against hand counts and the compiler's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

import jprune
from jprune.pruning.export import costs


class Net(nnx.Module):
    def __init__(self, rngs):
        self.conv = nnx.Conv(2, 6, (3, 3), rngs=rngs)
        self.grouped = nnx.Conv(6, 6, (3, 3), padding="VALID", feature_group_count=3, rngs=rngs)
        self.head = nnx.Linear(6, 10, rngs=rngs)

    def __call__(self, x):
        x = jax.nn.relu(self.grouped(jax.nn.relu(self.conv(x))))
        return self.head(x.mean((1, 2)))


def split_net():
    graphdef, params = nnx.split(Net(nnx.Rngs(0)))
    return params, lambda p, x: nnx.merge(graphdef, p)(x)


def test_convolutions_and_dense_layers_count_as_by_hand():
    params, apply = split_net()
    found = costs.multiply_adds(apply, params, jnp.ones((1, 8, 8, 2)))
    assert found == {
        "conv/bias": 0,
        "conv/kernel": 8 * 8 * 6 * (3 * 3 * 2),
        "grouped/bias": 0,
        "grouped/kernel": 6 * 6 * 6 * (3 * 3 * 2),  # two input channels a group
        "head/bias": 0,
        "head/kernel": 60,
    }


def test_multiply_adds_grow_with_the_batch_and_shapes_are_enough():
    params, apply = split_net()
    abstract = jax.eval_shape(lambda: params)
    one = costs.multiply_adds(apply, abstract, jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32))
    five = costs.multiply_adds(apply, abstract, jax.ShapeDtypeStruct((5, 8, 8, 2), jnp.float32))
    assert five == {path: 5 * count for path, count in one.items()}


def test_a_dense_net_agrees_with_the_compilers_count():
    weights = [jnp.ones((30, 20)), jnp.ones((20, 50)), jnp.ones((50, 7))]

    def apply(params, x):
        for w in params:
            x = x @ w
        return x

    x = jnp.ones((4, 30))
    compiled = jax.jit(apply).lower(weights, x).compile().cost_analysis()
    assert 2 * sum(costs.multiply_adds(apply, weights, x).values()) == compiled["flops"]


def test_layers_in_a_scan_a_remat_a_jit_and_a_cond_are_counted():
    params = {"stack": jnp.ones((7, 5, 5)), "shared": jnp.ones((5, 5)), "either": jnp.ones((5, 3))}

    def apply(p, x):
        def layer(h, w):
            return jax.checkpoint(lambda h: jax.nn.relu(h @ w + h @ p["shared"]))(h), None

        h = jax.jit(lambda h: lax.scan(layer, h, p["stack"])[0])(x)
        return lax.cond(h.sum() > 0, lambda h: h @ p["either"], lambda h: h[:, :3], h)

    found = costs.multiply_adds(apply, params, jnp.ones((2, 5)))
    assert found == {"stack": 2 * 7 * 25, "shared": 2 * 7 * 25, "either": 2 * 15}


def test_a_weight_passed_through_the_carry_is_not_counted_twice():
    def apply(p, x):
        def step(carry, _):
            h, w = carry
            return (h @ w, w), None

        return lax.scan(step, (x, p["w"]), None, length=4)[0][0]

    assert costs.multiply_adds(apply, {"w": jnp.ones((3, 3))}, jnp.ones((2, 3))) == {"w": 4 * 2 * 9}


def test_masked_and_transposed_weights_are_followed():
    params = {"w": jnp.ones((3, 5))}
    mask = np.eye(3, 5)
    found = costs.multiply_adds(lambda p, x: x @ (p["w"] * mask).T.reshape(5, 3), params, jnp.ones((2, 5)))
    assert found == {"w": 30}


def counts(params, apply, *shapes):
    """The column of multiply-adds, whose total is compared with that of the graph."""
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    table = costs.cost_table(params, apply=apply, inputs=inputs)
    graph = jprune.trace_model(apply, params, *inputs)
    assert table.loc["total", "multiply_adds"] == sum(graph.multiply_adds.values())
    assert table.attrs["other_multiply_adds"] == graph.other_multiply_adds
    return table["multiply_adds"].to_dict()


def test_products_of_combined_leaves_are_counted_once():
    joined = {"q": jnp.ones((4, 4)), "k": jnp.ones((4, 2))}
    assert counts(joined, lambda p, x: x @ jnp.concatenate([p["q"], p["k"]], 1), (1, 4)) == {
        "k": 8,
        "q": 16,
        "total": 24,
    }
    scaled = {"v": jnp.ones((4, 4)), "g": jnp.ones((1, 4))}
    weight_norm = lambda p, x: x @ (p["v"] / jnp.sqrt((p["v"] ** 2).sum(0, keepdims=True)) * p["g"])
    assert counts(scaled, weight_norm, (1, 4)) == {"g": 0, "v": 16, "total": 16}
    low_rank = {"w": jnp.ones((4, 4)), "a": jnp.ones((4, 1)), "b": jnp.ones((1, 4))}
    assert counts(low_rank, lambda p, x: x @ (p["w"] + p["a"] @ p["b"]), (1, 4)) == {
        "a": 4 * 1 * 4,  # a @ b
        "b": 0,
        "w": 4 * 4,
        "total": 32,
    }


def test_matrices_of_experts_are_counted_for_every_row():
    apply = lambda p, x: lax.ragged_dot(x, p["e"], jnp.array([3, 3]))
    params, inputs = {"e": jnp.ones((2, 4, 4))}, [jnp.ones((6, 4))]
    axes = {"": jprune.KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))}
    table = costs.cost_table(params, apply=apply, inputs=inputs, axes=axes)
    assert table["multiply_adds"].to_dict() == {"e[0]": 48, "e[1]": 48, "total": 6 * 4 * 4}


def test_products_of_leaves_without_a_row_are_in_the_total():
    quantized = {"kernel": jnp.ones((4, 4), jnp.int8), "scale": jnp.ones((1, 4))}
    apply = lambda p, x: x @ (p["kernel"].astype(jnp.float32) * p["scale"])
    assert counts(quantized, apply, (1, 4)) == {"scale": 0, "total": 16}


def test_products_that_read_no_parameter_are_in_the_attributes():
    params = {"q": jnp.ones((4, 2)), "k": jnp.ones((4, 2))}
    apply = lambda p, x: (x @ p["q"]) @ (x @ p["k"]).T
    table = costs.cost_table(params, apply=apply, inputs=[jnp.ones((3, 4))])
    assert table["multiply_adds"].to_dict() == {"k": 24, "q": 24, "total": 48}
    assert table.attrs["other_multiply_adds"] == 3 * 3 * 2


def test_products_that_cannot_be_attributed_are_named_in_a_warning():
    apply = lambda p, x: x @ lax.linalg.cholesky(p["w"])
    with pytest.warns(UserWarning, match=r"'cholesky'.* products that read its result are not counted for them: 'w'"):
        table = costs.cost_table({"w": jnp.eye(4)}, apply=apply, inputs=[jnp.ones((1, 4))])
    assert table.loc["total", "multiply_adds"] == 0
    assert table.attrs["other_multiply_adds"] == 16


def test_a_weight_in_a_while_loop_is_refused():
    def apply(p, x):
        return lax.while_loop(lambda h: h.sum() < 9, lambda h: h @ p["w"], x)

    with pytest.raises(ValueError, match="inside a while loop"):
        costs.multiply_adds(apply, {"w": jnp.ones((2, 2))}, jnp.ones((1, 2)))


def test_the_table_adds_up_and_counts_masks_or_zeros():
    params, apply = split_net()
    masks = jax.tree.map(lambda w: None, params)
    kernel = masks["conv"]["kernel"]
    masks["conv"]["kernel"] = kernel.replace(jnp.arange(108).reshape(3, 3, 2, 6) < 27)
    table = costs.cost_table(params, masks, apply=apply, inputs=[jnp.ones((1, 8, 8, 2))])
    assert list(table.index) == [*costs.multiply_adds(apply, params, jnp.ones((1, 8, 8, 2))), "total"]
    row = table.loc["conv/kernel"]
    assert (row["parameters"], row["nonzeros"], row["compression"]) == (108, 27, 4.0)
    assert row["effective_multiply_adds"] == 8 * 8 * 27
    total = table.loc["total"]
    assert total["parameters"] == 108 + 6 + 108 + 6 + 60 + 10
    assert total["nonzeros"] == total["parameters"] - 81
    assert total["effective_multiply_adds"] == 8 * 8 * 27 + 6 * 6 * 108 + 60

    zeroed = costs.cost_table({"w": jnp.array([0.0, 1.0]), "step": jnp.int32(1), "none": None})
    assert zeroed.loc["w", "nonzeros"] == 1
    assert list(zeroed.index) == ["w", "total"]
    assert "multiply_adds" not in zeroed


def test_a_leaf_called_total_has_a_row_of_its_own():
    """The row of all layers replaced it."""
    table = costs.cost_table({"total": jnp.ones((2, 3)), "w": jnp.ones((3, 1))})
    assert table.index.tolist() == ["total", "w", "total"]
    assert table["parameters"].tolist() == [6, 3, 9]


def test_a_wholly_pruned_leaf_has_no_compression_rather_than_an_infinite_one():
    table = costs.cost_table({"w": jnp.zeros((2, 2))})
    assert np.isnan(table.loc["w", "compression"])
