"""The smaller network computes what the masked one computes, for networks of every kind."""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest

import jprune
from jprune.graph import trace_model
from jprune.pruning.structured import removal, selection
from tests.pruning.structured.models import MODELS


def graph_of(model):
    return trace_model(model.apply, model.params, *model.inputs, state=model.state)


def half_of(graph, *, exact=True):
    """Masks without a random half of the channels of every group that is exact, or not."""
    rng = np.random.default_rng(0)
    removed = []
    for group in graph.channels:
        gone = np.zeros(group.size, bool)
        if group.exact == exact:
            gone[rng.choice(group.size, group.size // 2, replace=False)] = True
        removed.append((group, jnp.asarray(gone)))
    tree = dict.fromkeys(graph.shapes, 0.0)
    return jax.jit(lambda: selection.masks_without(graph, tree, removed, {}))(), removed


def masks_like(params, masks):
    paths, _, treedef = jprune.trees.flatten(params)
    return jax.tree.unflatten(treedef, [masks.get(path) for path in paths])


apply_masks = jax.jit(jprune.apply_masks)  # one program instead of one for each shape


def compiled(model):
    return jax.jit(functools.partial(model))  # jit holds a weak reference, which a NamedTuple cannot have


def run_small(model, small):
    return lambda params, *inputs: small.apply(
        params, *inputs, **({} if model.state is None else {"state": small.state})
    )


QUICK = {"mlp", "resnet20", "transformer", "scanned", "nnx_block", "linen_conv_net", "equinox_mlp", "lstm"}


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_outputs_and_gradients_equal_those_of_the_masked_network(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = MODELS[name]()
        graph = graph_of(model)
        by_path, removed = half_of(graph)
        masks = masks_like(model.params, by_path)
        small = jprune.remove_channels(graph, model.params, masks, state=model.state)
        masked = apply_masks(model.params, masks)

        def loss(apply, params):
            out = jax.tree.leaves(apply(params, *model.inputs))[0]
            return jnp.sum(out * jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)), out

        both = jax.jit(
            lambda one, two: (
                jax.value_and_grad(lambda p: loss(model, p), has_aux=True, allow_int=True)(one),
                jax.value_and_grad(lambda p: loss(run_small(model, small), p), has_aux=True, allow_int=True)(two),
            )
        )
        ((_, out), grad), ((_, small_out), small_grad) = both(masked, small.params)
        full = jax.tree.leaves(compiled(model)(model.params, *model.inputs))[0]
    np.testing.assert_allclose(small_out, out, atol=1e-5)
    assert np.abs(np.asarray(full) - np.asarray(out)).max() > 1e-3  # removing the channels does change the model
    cut = removal.cut_leaves(grad, small.kept)
    chex.assert_trees_all_close(small_grad, cut, atol=1e-4)
    assert sum(x.size for x in jax.tree.leaves(small.params)) < sum(x.size for x in jax.tree.leaves(model.params))
    assert any(gone.any() for _, gone in removed)


def test_channels_of_a_tiled_number_can_be_removed():
    draw = np.random.default_rng(0)
    params = {"w": draw.normal(size=(5, 6)), "scale": draw.normal(size=(1, 1)), "v": draw.normal(size=(12, 3))}
    x = draw.normal(size=(4, 5))

    def apply(p, x):
        return jnp.tile(jnp.tanh((x @ p["w"]) * jnp.tile(p["scale"], (1, 6))), (1, 2)) @ p["v"]

    graph = trace_model(apply, params, x)
    masks = {"w": jnp.ones((5, 6), bool).at[:, [1, 4]].set(False), "scale": None}
    masks["v"] = jnp.ones((12, 3), bool).at[jnp.array([1, 4, 7, 10])].set(False)
    small = jprune.remove_channels(graph, params, masks, check=x)
    assert small.params["w"].shape == (5, 4)
    assert small.params["v"].shape == (8, 3)


def test_channels_that_a_shortcut_pads_can_be_removed():
    """A shortcut of option A pads 4 channels to 8: two zeros at each end, which the other branch fills."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = MODELS["resnet20"]()
        graph = graph_of(model)
        (padded,) = [g for g in graph.channels if ("head/kernel", 0) in {(m.path, m.axis) for m in g.members}
                     and ("stem/conv/kernel", 3) not in {(m.path, m.axis) for m in g.members}]  # fmt: skip
        np.testing.assert_array_equal(
            next(m.indices[:, 0] for m in padded.members if m.path == "head/kernel"), [0, 1, 6, 7]
        )
        gone = [(padded, jnp.asarray([True, True, False, True]))]
        masks = masks_like(model.params, selection.masks_without(graph, dict.fromkeys(graph.shapes, 0.0), gone, {}))
        small = jprune.remove_channels(graph, model.params, masks, state=model.state, check=model.inputs)
    assert small.params["head"]["kernel"].shape == (5, 3)
    (difference,) = small.table.differences  # the code pads as many zeros at one end as at the other
    assert "add got incompatible shapes for broadcasting: (2, 2, 2, 8), (2, 2, 2, 5)" in difference


SERVES = {
    "mlp", "sigmoid_mlp", "lenet", "vgg", "resnet50", "densenet", "unet", "squeeze_excite", "scanned", "branches",
    "nnx_conv_net", "equinox_mlp",
}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    [
        *("mlp", "lenet", "transformer", "nnx_block", "lstm", "linen_conv_net", "equinox_mlp"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("vgg", "resnet50", "mobilenet", "equinox_block")),
    ],
)
def test_the_models_own_code_is_named_where_it_cannot_serve(name):
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = MODELS[name]()
        graph = graph_of(model)
        masks = masks_like(model.params, half_of(graph)[0])
        differences = jprune.remove_channels(graph, model.params, masks).table.differences
    print(name, differences)
    assert (not differences) == (name in SERVES)


def mlp_and_masks():
    model = MODELS["mlp"]()
    graph = graph_of(model)
    return model, graph, half_by_magnitude(graph, model.params)


def half_by_magnitude(graph, params):
    return jax.jit(lambda p: jprune.channel_group_masks(graph, jax.tree.map(jnp.abs, p), sparsity=0.5))(params)


def test_the_smaller_program_takes_any_batch_size():
    for name in ("vgg", "equinox_mlp"):
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            model = MODELS[name]()
            graph = graph_of(model)
            masks = masks_like(model.params, half_of(graph)[0])
            small = jprune.remove_channels(graph, model.params, masks, state=model.state)
            (x,) = model.inputs
            more = jnp.concatenate([x, x, -x])
            out = jax.jit(run_small(model, small))(small.params, more)
            np.testing.assert_allclose(out, compiled(model)(apply_masks(model.params, masks), more), atol=1e-5)


def test_code_that_does_something_inexact_with_other_shapes_is_refused():
    """Two rows are squashed one by one; with more, a softmax over the channels would count those that are masked."""

    def apply(p, x):
        return (jnp.tanh if len(x) < 4 else jax.nn.softmax)(x @ p["one"]) @ p["two"]

    params = {"one": jnp.arange(1.0, 5.0).reshape(2, 2), "two": jnp.ones((2, 1))}
    graph = trace_model(apply, params, jnp.ones((2, 2)))
    small = jprune.remove_channels(graph, params, jprune.channel_group_masks(graph, params, sparsity=0.5))
    assert small.apply(small.params, jnp.ones((3, 2))).shape == (3, 1)
    with pytest.raises(ValueError, match=r"removing channels of 'one' is not the same as masking them.*'reduce_max'"):
        small.apply(small.params, jnp.ones((4, 2)))


def test_half_a_group_is_refused_by_the_names_of_its_members():
    model, graph, masks = mlp_and_masks()
    masks["one"]["bias"] = None
    with pytest.raises(
        ValueError, match=r"from 'one/kernel' \(axis 1\), 'two/kernel' \(axis 0\) but not from 'one/bias' "
    ):
        jprune.remove_channels(graph, model.params, masks)


def without(model, graph, groups):
    """Masks without all channels of some groups."""
    gone = [(group, jnp.full(group.size, place in groups)) for place, group in enumerate(graph.channels)]
    return masks_like(model.params, selection.masks_without(graph, dict.fromkeys(graph.shapes, 0.0), gone, {}))


@pytest.mark.parametrize("name", ["mlp", "resnet20", "mobilenet", "lstm"])
def test_a_group_without_any_channel_contributes_nothing(name):
    """Both sides of a kernel may lose all channels: the network then has only what its biases and shortcuts give."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = MODELS[name]()
        graph = graph_of(model)
        exact = [place for place, group in enumerate(graph.channels) if group.exact]
        for groups in ([exact[0]], exact):
            masks = without(model, graph, groups)
            small = jprune.remove_channels(graph, model.params, masks, state=model.state, check=model.inputs)
            assert [row.after == 0 for row in small.table.groups] == [k in groups for k in range(len(graph.channels))]
            assert "parameters" in str(small.table)
            jprune.trace_model(run_small(model, small), small.params, *model.inputs)  # to prune it further
            run = jax.grad(
                lambda p, small=small: jnp.sum(jax.tree.leaves(run_small(model, small)(p, *model.inputs))[0])
            )
            chex.assert_tree_all_finite(jax.jit(run)(small.params))


def test_a_kernel_without_weights_does_not_hide_that_its_channels_stay_elsewhere():
    model = MODELS["mlp"]()
    masks = {name: {leaf: jnp.ones(x.shape, bool) for leaf, x in part.items()} for name, part in model.params.items()}
    masks["two"]["kernel"] = jnp.zeros_like(masks["two"]["kernel"])
    with pytest.raises(ValueError, match=r"from 'two/kernel' \(axis 1\) but not from 'head/kernel' \(axis 0\)"):
        jprune.remove_channels(graph_of(model), model.params, masks)


def test_a_graph_of_another_model_names_the_first_leaf():
    model, graph, masks = mlp_and_masks()
    with pytest.raises(ValueError, match=r"its leaf 'head/kernel' has shape \(6, 3\), but \(6, 4\) in params"):
        jprune.remove_channels(graph, model.params | {"head": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(3)}}, masks)
    with pytest.raises(ValueError, match="params has no leaf 'head/bias'"):
        jprune.remove_channels(graph, {name: model.params[name] for name in ("one", "two")}, masks)
    with pytest.raises(TypeError, match="also is a dict; it must be a tuple of trees"):
        jprune.remove_channels(graph, model.params, masks, also=model.params)
    with pytest.raises(ValueError, match="params are not those of the smaller model: 'head/kernel' has"):
        jprune.remove_channels(graph, model.params, masks).apply(model.params, *model.inputs)


OPTIMIZERS = {
    "adamw": optax.adamw(1e-2),
    "adam of injected": optax.inject_hyperparams(optax.adam)(learning_rate=1e-2),
    "momentum of steps": optax.MultiSteps(optax.sgd(1e-2, momentum=0.9), 2),
    "masked": optax.masked(optax.adam(1e-2), {"one": True, "two": False, "head": True}),
    "partition": optax.partition(
        {"a": optax.adam(1e-2), "b": optax.sgd(1e-2, momentum=0.9)}, {"one": "a", "two": "b", "head": "a"}
    ),
    "lbfgs": optax.scale_by_lbfgs(memory_size=3),
    "adafactor": optax.adafactor(1e-2, min_dim_size_to_factor=2),
    "sm3": optax.sm3(1e-2),
    "flatten": optax.flatten(optax.adam(1e-2)),
    "lion and average": optax.chain(optax.lion(1e-3), optax.ema(0.9)),
    "schedule-free": optax.contrib.schedule_free(optax.sgd(1e-2), learning_rate=1e-2, b1=0.9),
    "accumulated in a mask": optax.MultiSteps(
        optax.masked(optax.adam(1e-2), {"one": True, "two": False, "head": True}), 2
    ),
    "injected partition": optax.partition(
        {"a": optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2), "b": optax.set_to_zero()},
        {"one": "a", "two": "b", "head": "a"},
    ),
}


@pytest.mark.optax_promotes
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in ("adamw", "adafactor", "sm3", "partition") else pytest.mark.slow)
        for name in OPTIMIZERS
    ],
)
@pytest.mark.quick(1)
def test_training_continues_with_the_cut_optimizer_state(name):
    """A step of the smaller network from the cut state is the cut step of the masked network."""
    tx = OPTIMIZERS[name]
    model, graph, masks = mlp_and_masks()
    if name == "adafactor":  # the larger axis of each kernel stays the larger one
        scores = jax.tree.map(jnp.abs, model.params)
        masks = jprune.channel_group_masks(graph, scores, sparsity={"^one/": 1 / 8, "^head/": 1 / 6})
    mask = lambda tree: jprune.apply_masks(tree, masks)
    params = mask(model.params)
    loss = lambda apply: lambda p: jnp.sum(apply(p, *model.inputs) ** 2)

    def step(apply, only, params, state):
        grads = only(jax.grad(loss(apply))(params))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, only(updates)), state

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        state = tx.init(params)
        masked_step = jax.jit(functools.partial(step, model.apply, mask))
        for _ in range(2):
            params, state = masked_step(params, state)
        small = jprune.remove_channels(graph, params, masks, also=(state, params))
        after, _ = masked_step(params, state)
        small_after, _ = jax.jit(functools.partial(step, small.apply, lambda tree: tree))(small.params, small.also[0])
    chex.assert_trees_all_equal_shapes_and_dtypes(small.also[0], tx.init(small.params))
    chex.assert_trees_all_equal(small.also[1], small.params)
    if name != "adafactor":  # its factors are means over rows and columns, zeros included
        chex.assert_trees_all_close(small_after, removal.cut_leaves(after, small.kept), atol=1e-6)


@pytest.mark.optax_promotes
def test_lookahead_averages_and_arrays_of_another_form():
    """The slow weights of lookahead and a separate average are trees of parameters; Shampoo's statistics are not."""
    model, graph, masks = mlp_and_masks()
    params = apply_masks(model.params, masks)
    both = optax.LookaheadParams.init_synced(params)
    tx = optax.lookahead(optax.adam(1e-2), sync_period=2, slow_step_size=0.5)
    average = {"decay": jnp.float32(0.9), "ema": jax.tree.map(lambda x: 0.5 * x, params)}
    small = jprune.remove_channels(graph, params, masks, also=(tx.init(both), both, average))
    state, small_both, small_average = small.also
    expected = optax.LookaheadParams.init_synced(small.params)
    chex.assert_trees_all_equal(small_both, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(expected))
    chex.assert_trees_all_close(small_average["ema"], jax.tree.map(lambda x: 0.5 * x, small.params))
    statistics = {"left": jax.tree.map(lambda x: jnp.ones((x.shape[0], x.shape[0], 2)), params)}
    with pytest.raises(
        ValueError, match=r"also\[0\] has shape .* at 'left/.*initialize that part of the state again with tx\.init"
    ):
        jprune.remove_channels(graph, params, masks, also=(statistics,))


@pytest.mark.usefixtures("usual_promotion")
def test_leaves_of_the_state_that_the_model_does_not_read_are_named():
    """As the averages of Haiku's batch normalization without their correction, which only training reads."""
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones((4, 2))}
    state = {"average": jnp.ones((1, 4)), "hidden": jnp.zeros((1, 4)), "counter": jnp.zeros((), jnp.int32)}

    def evaluate(params, x, state):
        return jax.nn.relu(x @ params["a"] / state["average"]) @ params["b"]

    def train(params, x, state):
        h = x @ params["a"]
        hidden = 0.9 * state["hidden"] + 0.1 * h.mean(0, keepdims=True)
        new = {"average": hidden / 0.1, "hidden": hidden, "counter": state["counter"] + 1}
        return jax.nn.relu(h / new["average"]) @ params["b"], new

    graph = trace_model(jax.jit(evaluate), params, jnp.ones((5, 3)), state=state)
    masks = jprune.channel_group_masks(graph, params, sparsity=0.5)
    with pytest.warns(UserWarning, match=r"apply does not read 'hidden' of the state, so .* called in training$"):
        small = jprune.remove_channels(graph, params, masks, state=state)
    assert {name: leaf.shape for name, leaf in small.state.items()} == {
        "average": (1, 2),
        "hidden": (1, 4),
        "counter": (),
    }
    graph = trace_model(train, params, jnp.ones((5, 3)), state=state)
    small = jprune.remove_channels(graph, params, masks, state=state)
    assert {name: leaf.shape for name, leaf in small.state.items()} == {
        "average": (1, 2),
        "hidden": (1, 2),
        "counter": (),
    }


@pytest.mark.optax_promotes
@pytest.mark.parametrize("library", ["safetensors", "orbax"])
def test_the_smaller_model_is_saved_and_loaded(library, tmp_path):
    """Parameters, batch statistics and the optimizer state are restored and belong to the smaller model."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = MODELS["vgg"]()
        graph = graph_of(model)
        masks = masks_like(model.params, half_of(graph)[0])
        tx = optax.adam(1e-2)
        opt_state = jax.jit(lambda p: tx.update(jax.tree.map(jnp.cos, p), tx.init(p), p)[1])(model.params)
        small = jprune.remove_channels(graph, model.params, masks, state=model.state, also=(opt_state,))
        saved = {"params": small.params, "state": small.state, "opt_state": small.also[0]}
        like = {"params": small.params, "state": small.state, "opt_state": tx.init(small.params)}
        described = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), like)
        if library == "safetensors":
            jprune.io.save_pruned(tmp_path / "small.safetensors", saved)
            loaded = jprune.io.load_pruned(tmp_path / "small.safetensors", described)
        else:
            with orbax.checkpoint.StandardCheckpointer() as checkpointer:
                checkpointer.save(tmp_path / "small", saved)
                checkpointer.wait_until_finished()
                one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
                placed = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=one), described)
                loaded = checkpointer.restore(tmp_path / "small", placed)
        chex.assert_trees_all_equal(loaded, saved)
        outputs = jax.jit(small.apply)(loaded["params"], *model.inputs, state=loaded["state"])
        masked = apply_masks(model.params, masks)
        np.testing.assert_allclose(outputs, compiled(model)(masked, *model.inputs), atol=1e-5)


def test_factors_that_would_be_read_along_other_axes_are_refused():
    params = {"a": jnp.ones((4, 6)), "b": jnp.ones((6, 3))}
    graph = trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 4)))
    state = optax.scale_by_factored_rms(min_dim_size_to_factor=2).init(params)
    masks = jprune.channel_group_masks(graph, params, sparsity=0.5)
    with pytest.raises(
        ValueError, match=r"factored second moments at 'v_row/a'.*initialize that part of the state again"
    ):
        jprune.remove_channels(graph, params, masks, also=(state,))


def test_batch_statistics_are_cut_with_their_channels():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = MODELS["vgg"]()
        graph = graph_of(model)
        masks = half_by_magnitude(graph, model.params)
        small = jprune.remove_channels(graph, model.params, masks, also=(model.state,), check=model.inputs)
        with pytest.raises(TypeError, match=r"small\.apply needs the state of the model"):
            small.apply(small.params, *model.inputs)
        with pytest.raises(ValueError, match="check needs the state of the model"):
            jprune.remove_channels(graph, model.params, masks, check=model.inputs)
        with pytest.raises(ValueError, match=r"state differs from the one .*; pass a tree with 'a/mean' \(4,\)"):
            jprune.remove_channels(graph, model.params, masks, state={"a": 1})
    kept = np.asarray(masks["a"]["norm"]["scale"])
    np.testing.assert_array_equal(small.state["a"]["mean"], model.state["a"]["mean"][kept])
    np.testing.assert_array_equal(small.also[0]["a"]["var"], model.state["a"]["var"][kept])


def test_a_new_state_among_the_outputs_is_checked_at_the_channels_that_are_left():
    """Batch normalization in training returns its statistics, which have lost the same channels."""
    params = {"a": jnp.asarray(np.random.default_rng(0).normal(size=(4, 6)), jnp.float32), "b": jnp.ones((6, 2))}
    state = {"mean": jnp.arange(6.0)}

    def apply(p, x, *, state):
        y = x @ p["a"]
        mean = jnp.mean(y, axis=0)
        return jnp.tanh(y - jnp.broadcast_to(mean, y.shape)) @ p["b"], {"mean": 0.9 * state["mean"] + 0.1 * mean}

    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)), jnp.float32)
    graph = trace_model(apply, params, x, state=state)
    masks = half_by_magnitude(graph, params)
    small = jprune.remove_channels(graph, params, masks, state=state, check=x[:3])
    _, new = small.apply(small.params, x, state=small.state)
    assert new["mean"].shape == small.state["mean"].shape == (3,)


def test_the_difference_of_groups_that_are_not_exact_is_measured():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = MODELS["vit"]()
        graph = graph_of(model)
        masks = masks_like(model.params, half_of(graph, exact=False)[0])
        small = jprune.remove_channels(graph, model.params, masks, check=model.inputs)
        masked = apply_masks(model.params, masks)
        out = np.abs(jax.jit(small.apply)(small.params, *model.inputs) - compiled(model)(masked, *model.inputs))
    (row,) = [group for group in small.table.groups if not group.exact]
    assert row.difference == pytest.approx(float(out.max()), rel=1e-3)
    assert row.difference > 1e-2
    assert f"not exact, outputs differ by {row.difference:.2g}" in str(small.table)


def residual():
    """A chain of two layers with a residual connection around it: the first layer's units stay coupled."""
    rng = np.random.default_rng(0)
    params = {
        name: {"kernel": jnp.asarray(rng.normal(size=shape), jnp.float32), "bias": jnp.zeros(shape[1], jnp.float32)}
        for name, shape in {"a": (4, 8), "b": (8, 8), "c": (8, 3)}.items()
    }

    def dense(p, x):
        y = x @ p["kernel"]
        return y + jnp.broadcast_to(p["bias"], y.shape)

    def apply(p, x):
        x = jax.nn.relu(dense(p["a"], x))
        return dense(p["c"], x + jax.nn.relu(dense(p["b"], x)))

    return apply, params, jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)


def test_dead_units_inside_a_residual_connection_are_not_removed():
    """With zero weights into it, b's unit 0 is dead in b alone; the residual connection adds a's unit 0."""
    apply, params, x = residual()
    params["b"]["kernel"] = params["b"]["kernel"].at[:, 0].set(0.0)
    graph = trace_model(apply, params, x)
    small = jprune.remove_dead(graph, params, check=x)
    assert small.params["b"]["kernel"].shape == (8, 8)
    params["a"]["kernel"] = params["a"]["kernel"].at[:, 0].set(0.0)
    for name in "bc":
        params[name]["kernel"] = params[name]["kernel"].at[0].set(0.0)
    small = jprune.remove_dead(graph, params, check=x)
    assert small.params["b"]["kernel"].shape == (7, 7)
    np.testing.assert_allclose(small.apply(small.params, x), apply(params, x), atol=1e-5)


def test_dead_channels_are_taken_out_of_batch_normalization_too():
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        model = MODELS["vgg"]()
        graph = graph_of(model)
        masks = masks_like(model.params, half_of(graph)[0])
        small = jprune.remove_dead(graph, model.params, masks, state=model.state, check=model.inputs)
    assert small.params["a"]["norm"]["scale"].shape == small.state["a"]["mean"].shape == (2,)


def test_channels_that_nothing_reads_are_removed_only_after_a_check():
    apply, params, x = residual()
    graph = trace_model(apply, params, x)
    for name in "bc":
        params[name]["kernel"] = params[name]["kernel"].at[3].set(0.0)
    with pytest.raises(
        ValueError, match=r"not zero in every layer that has them: 1 of the group of .*pass check=inputs"
    ):
        jprune.remove_dead(graph, params)
    small = jprune.remove_dead(graph, params, check=x)
    assert small.params["a"]["kernel"].shape == (4, 7)
    assert [(row.member, row.before, row.after) for row in small.table.groups] == [("a/kernel[1]", 8, 7)]


def test_zero_channels_of_a_group_that_is_not_exact_are_removed_only_after_a_check():
    # A zero logit adds e^0 to the sum of a softmax: (2 e + e^.5) / (e + e^.5 + 1), and without it / (e + e^.5).
    params = {"a": jnp.array([[1.0, 0.5, 0.0]]), "b": jnp.array([[2.0], [1.0], [0.0]])}
    apply = lambda p, x: jax.nn.softmax(x @ p["a"]) @ p["b"]
    x = jnp.ones((1, 1))
    graph = trace_model(apply, params, x)
    with pytest.raises(ValueError, match=r"in groups that are not exact: 1 of the group of 'a' \(.*pass check=inputs"):
        jprune.remove_dead(graph, params)
    e = np.exp([1.0, 0.5])
    changed = (2 * e[0] + e[1]) / e.sum() - (2 * e[0] + e[1]) / (e.sum() + 1)
    with pytest.raises(ValueError, match=f"on check, outputs of the smaller model differ by {changed:.3g}"):
        jprune.remove_dead(graph, params, check=x)
    # A reader that is zero for every channel does not see the difference.
    unread = {"a": params["a"], "b": jnp.zeros((3, 1))}
    assert jprune.remove_dead(graph, unread, check=x).params["a"].shape == (1, 1)


@pytest.mark.parametrize(
    "outputs",
    [
        lambda y: (y, jnp.where(jnp.arange(3) < 2, y, -jnp.inf)),  # masked logits
        lambda y: (y, 1e8 + 0 * y),
        lambda y: (0 * y, jnp.log(y - 0.5)),  # NaN without the unit
        lambda y: jnp.argmax(y + jnp.array([[0.0, 0.5, 0.0]]), axis=-1),
    ],
    ids=["infinite", "large", "nan", "integer"],
)
def test_no_other_output_hides_a_difference_on_check(outputs):
    def apply(params, x):
        return outputs(jax.nn.relu(x @ params["a"]) @ params["b"])

    params = {"a": jnp.ones((1, 2)), "b": jnp.array([[0.4, 0.4, 0.4], [1.0, 0.2, 0.2]])}
    x = jnp.ones((1, 1))
    with pytest.raises(ValueError, match="on check, outputs of the smaller model differ by"):
        jprune.remove_dead(trace_model(apply, params, x), params, dead={"a": np.arange(2) == 1}, check=x)
    params["b"] = params["b"].at[1].set(0.0).at[0].set(0.75)  # nothing reads the unit
    small = jprune.remove_dead(trace_model(apply, params, x), params, dead={"a": np.arange(2) == 1}, check=x)
    assert small.params["a"].shape == (1, 1)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_a_check_of_outputs_of_16_bits_finds_units_that_count(dtype):
    """Their outputs are 1 + 1/8, and 1 without a unit; a thousand times eps would be more than 0.9."""
    params = {"a": jnp.ones((1, 2), dtype), "b": jnp.array([[1.0], [0.125]], dtype)}
    x = jnp.ones((1, 1), dtype)
    graph = trace_model(lambda p, x: jax.nn.relu(x @ p["a"]) @ p["b"], params, x)
    with pytest.raises(ValueError, match=r"differ by 0\.125 .* and 0\.0563 is allowed"):
        jprune.remove_dead(graph, params, dead={"a": np.arange(2) == 1}, check=x)


def test_a_check_allows_the_rounding_of_16_bits_inside_a_model_with_float32_outputs():
    """The carry is rounded to float16: the outputs differ by .0039, and 1.2e-4 of the largest was allowed."""
    keys = jax.random.split(jax.random.key(3), 4)
    sizes = {"a": (6, 128, 512), "b": (6, 512, 128), "o": (128, 10)}
    named = zip(keys, sizes.items(), strict=False)
    params = {name: jax.random.normal(key, size) / 128**0.5 for key, (name, size) in named}

    def apply(params, x):
        a, b, o = (params[name].astype(jnp.float16) for name in "abo")
        step = lambda h, w: ((h + jax.nn.gelu(h @ w[0]) @ w[1]) * jnp.float16(0.7), None)
        return (jax.lax.scan(step, x.astype(jnp.float16), (a, b))[0] @ o).astype(jnp.float32)

    x = jax.random.normal(keys[3], (32, 128))
    graph = trace_model(apply, params, x)
    masks = jprune.channel_group_masks(graph, jprune.magnitude(where=graph)(params), sparsity=0.5)
    assert jprune.remove_channels(graph, params, masks, check=x).params["a"].shape == (6, 128, 256)


def test_outputs_that_are_nan_on_check_are_not_blamed_on_the_channels():
    params, x = {"a": jnp.full((1, 2), 1e30), "b": jnp.full((2, 1), 1e30)}, jnp.ones((1, 1))
    graph = trace_model(lambda p, x: jnp.sin(x @ p["a"] @ p["b"]), params, x)
    masks = jprune.channel_group_masks(graph, params, sparsity=0.5)
    with pytest.raises(ValueError, match="outputs of the full-size model are NaN and cannot be compared"):
        jprune.remove_channels(graph, params, masks, check=x)


def test_units_named_dead_are_removed_if_the_outputs_stay():
    apply, params, x = residual()
    graph = trace_model(apply, params, x)
    params["a"]["bias"] = params["a"]["bias"].at[2].set(-100.0)
    params["b"]["bias"] = params["b"]["bias"].at[2].set(-100.0)
    dead = np.arange(8) == 2
    small = jprune.remove_dead(graph, params, dead={"a/kernel": dead}, check=x)
    assert small.params["c"]["kernel"].shape == (7, 3)
    with pytest.raises(ValueError, match="on check, outputs of the smaller model differ by"):
        jprune.remove_dead(graph, params, dead={"a/kernel": np.arange(8) == 1}, check=x)
    with pytest.raises(ValueError, match=r"dead has \(7,\) units for 'a/kernel'"):
        jprune.remove_dead(graph, params, dead={"a/kernel": np.ones(7, bool)}, check=x)
    with pytest.raises(ValueError, match="dead has"):
        jprune.remove_dead(graph, params, dead={"d/kernel": np.ones(7, bool)}, check=x)
    with pytest.raises(TypeError, match="dead has int64 units for 'a/kernel'; they must be bool: unit_status"):
        inspect.unwrap(jprune.remove_dead)(graph, params, dead={"a/kernel": np.where(dead, -1, 1)})  # 1 is linear


def test_keys_among_the_parameters_do_not_hide_dead_channels():
    params = {"a": jnp.array([[1.0, 0.0]]), "b": jnp.array([[2.0], [0.0]]), "key": jax.random.key(0)}
    graph = trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 1)))
    assert jprune.remove_dead(graph, params).params["a"].shape == (1, 1)


def test_a_state_that_is_not_given_is_asked_for_by_name():
    params, state = {"a": jnp.ones((1, 2)), "b": jnp.ones((2, 1))}, {"mean": jnp.ones(2)}
    x = jnp.ones((1, 1))
    graph = trace_model(lambda p, s, x: (x @ p["a"] * s["mean"][None]) @ p["b"], params, x, state=state)
    small = jprune.remove_channels(graph, params, jprune.channel_group_masks(graph, params, sparsity=0.5))
    for inputs in ((), (x,), (small.state, x)):
        with pytest.raises(
            TypeError, match=r"small\.apply needs the state of the model: pass state= to remove_channels"
        ):
            small.apply(small.params, *inputs)


def test_masks_without_a_whole_channel_are_named():
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones((2, 1))}
    graph = trace_model(lambda p, x: jnp.tanh(x @ p["a"]) @ p["b"], params, jnp.ones((1, 2)))
    masks = {"a": jnp.array([[True, False], [True, True]]), "b": None}
    with pytest.warns(UserWarning, match="masks prune 1 weights but no whole channel"):
        jprune.remove_channels(graph, params, masks)
