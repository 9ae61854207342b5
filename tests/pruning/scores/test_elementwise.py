"""Scores against numbers worked out by hand, and the undecayed score's three limits."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jprune

W = np.array([[-2.0, 1.0, 0.5], [3.0, -0.25, 0.0]], np.float32)
G = np.array([[0.5, -3.0, 1.0], [0.0, 2.0, 4.0]], np.float32)
EPS = 0.25


@pytest.mark.parametrize(
    ("score", "wanted"),
    [
        (jprune.magnitude(), np.abs(W)),
        (jprune.gradient(), np.abs(W * G)),
        (jprune.scores.movement(), -W * G),
        (jprune.undecayed(EPS), np.abs(-W * G + EPS * W**2)),
        (jprune.undecayed(EPS, gradient_includes_decay=True), np.abs(-W * (G - EPS * W) + EPS * W**2)),
    ],
    ids=["magnitude", "gradient", "movement", "undecayed", "undecayed of a decayed gradient"],
)
def test_a_score_is_its_formula_and_none_where_nothing_is_prunable(score, wanted):
    params = {"dense": {"kernel": jnp.asarray(W), "bias": jnp.ones(3)}, "step": jnp.int32(1)}
    grad = {"dense": {"kernel": jnp.asarray(G), "bias": jnp.ones(3)}, "step": None}
    scores = score(params, grad=grad)
    np.testing.assert_allclose(scores["dense"]["kernel"], wanted, rtol=1e-6)
    assert scores["dense"]["bias"] is None
    assert scores["step"] is None


def test_the_three_limits_at_a_stationary_point_of_loss_and_decay():
    params, loss_gradient = {"kernel": jnp.asarray(W)}, {"kernel": jnp.asarray(-EPS * W)}
    coded = jprune.undecayed(EPS)(params, grad=loss_gradient)["kernel"]
    np.testing.assert_allclose(coded, 2 * EPS * W**2, rtol=1e-6)
    bare = jprune.gradient()(params, grad=loss_gradient)["kernel"]
    np.testing.assert_allclose(bare, EPS * W**2, rtol=1e-6)
    decayed = jprune.gradient()(params, grad={"kernel": jnp.asarray(-EPS * W + EPS * W)})["kernel"]
    assert not np.asarray(decayed).any()
    for ranked in (coded, bare):
        np.testing.assert_array_equal(
            jprune.global_masks({"kernel": ranked}, keep=3)["kernel"],
            jprune.global_masks(jprune.magnitude()(params), keep=3)["kernel"],
        )


def test_undecayed_ranks_as_the_magnitude_where_the_gradient_is_zero():
    params = {"kernel": jnp.asarray(W)}
    scores = jprune.undecayed(EPS)(params, grad={"kernel": jnp.zeros_like(params["kernel"])})
    np.testing.assert_allclose(scores["kernel"], EPS * W**2, rtol=1e-6)


def test_half_precision_weights_are_scored_in_float32():
    params, grad = {"kernel": jnp.asarray(W, jnp.bfloat16)}, {"kernel": jnp.asarray(G, jnp.bfloat16)}
    scores = jprune.gradient()(params, grad=grad)["kernel"]
    assert scores.dtype == jnp.float32
    np.testing.assert_array_equal(scores, np.abs(W * G))


def test_random_scores_come_from_the_key_alone():
    params = {"kernel": jnp.ones((50, 40))}
    score = jprune.random()
    first, again, other = (score(params, key=jax.random.key(k))["kernel"] for k in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.99
    assert int(jprune.global_masks({"kernel": first}, keep=123)["kernel"].sum()) == 123


@pytest.mark.parametrize(
    "score", [jprune.gradient(), jprune.undecayed(), jprune.scores.movement()], ids=lambda s: s.name
)
def test_a_missing_gradient_is_named_at_trace_time(score):
    with pytest.raises(ValueError, match=rf"{score.name} needs grad"):
        jax.eval_shape(score, {"kernel": jnp.ones((2, 2))})


def test_gradients_averaged_over_batches_leave_running_statistics_alone():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.body, self.norm = nnx.Linear(3, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)

        def __call__(self, x):
            return self.norm(self.body(x))

    model = Net(nnx.Rngs(0))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    before = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    batches = [jax.random.normal(jax.random.key(i), (6, 3)) for i in range(3)]

    def loss(params, x):
        fresh = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))
        return jnp.mean(jnp.square(fresh(x) - 1.0))

    averaged = jprune.scores.average_gradients(loss, params, batches)
    each = [jax.grad(loss)(params, x) for x in batches]
    wanted = jax.tree.map(lambda *g: sum(np.asarray(x, np.float64) for x in g) / 3, *each)
    chex.assert_trees_all_close(averaged, wanted, rtol=1e-4, atol=1e-6)
    after = jax.tree.map(np.asarray, nnx.state(model, nnx.BatchStat))
    chex.assert_trees_all_equal(before, after)


UNNAMED = {"w1": jnp.ones((2, 3)), "b1": jnp.zeros(3)}
SCORES = {
    "magnitude": jprune.magnitude(),
    "gradient": jprune.gradient(),
    "movement": jprune.scores.movement(),
    "undecayed": jprune.undecayed(),
    "random": jprune.random(),
    "snip": jprune.scores.snip(),
    "synflow": jprune.scores.synflow(lambda p, x: x @ p["w1"], input_shape=(1, 2)),
    "fisher": jprune.scores.fisher(lambda p, x: jnp.sum(x @ p["w1"])),
    "wanda": jprune.wanda(lambda p, x: x @ p["w1"]),
    "lamp": jprune.scores.lamp(),
    "geometric_median": jprune.scores.geometric_median(),
    "filter_taylor": jprune.scores.filter_taylor(),
}


@pytest.mark.parametrize("name", SCORES)
def test_without_where_every_score_refuses_a_tree_without_kernels_as_prune_does(name):
    message = (
        "where=kernels selects no float leaf, because none is called kernel or weight .* the tree has 'b1', 'w1'; "
    )
    with pytest.raises(ValueError, match=message):
        SCORES[name](UNNAMED, grad=UNNAMED, batch=jnp.ones((1, 2)), key=jax.random.key(0))
    with pytest.raises(ValueError, match=message):
        jprune.prune(SCORES[name], {0: 0.5}, key=jax.random.key(0)).init(UNNAMED)


def test_a_where_that_only_excludes_says_what_it_selects_from():
    message = r"where=by_path\(exclude='b'\) selects no float leaf, because none is called kernel .* and not excluded;"
    with pytest.raises(ValueError, match=message):
        jprune.magnitude(where=jprune.by_path(exclude="b"))(UNNAMED)


@pytest.mark.parametrize("make", ["wanda", "lamp", "geometric_median", "filter_taylor"])
def test_a_graph_is_the_default_selection_of_the_scores_that_take_one(make):
    apply = lambda p, x: x @ p["w1"] + p["b1"][None]
    graph = jprune.trace_model(apply, UNNAMED, jnp.ones((1, 2)))
    score = jprune.wanda(apply, axes=graph) if make == "wanda" else getattr(jprune.scores, make)(axes=graph)
    found = score(UNNAMED, grad=UNNAMED, batch=jnp.ones((1, 2)))
    assert found["b1"] is None
    assert found["w1"].shape == (2, 3)
    assert jprune.magnitude(where=graph)(UNNAMED)["b1"] is None


def test_a_negative_weight_decay_is_refused():
    with pytest.raises(ValueError, match="weight_decay=-1 must be finite and 0 or more"):
        jprune.undecayed(weight_decay=-1)


def test_a_gradient_of_integers_is_named_by_dtype_and_shape():
    with pytest.raises(ValueError, match=r"grad has int32\[2, 2\] at 'kernel'; it must be a float array"):
        jprune.gradient()({"kernel": jnp.ones((2, 2))}, grad={"kernel": jnp.ones((2, 2), jnp.int32)})
