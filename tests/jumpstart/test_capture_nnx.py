"""Preactivations of NNX models: every kind of layer, stacks under scan and vmap, patterns, skip_last, transforms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jprune

X = jax.random.normal(jax.random.key(0), (3, 4, 4, 2))


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


class Every(nnx.Module):
    def __init__(self, rngs):
        self.head = nnx.Linear(4, 3, rngs=rngs)  # made first, called last
        self.conv = nnx.Conv(2, 3, (3, 3), rngs=rngs)
        self.transposed = nnx.ConvTranspose(3, 2, (2, 2), rngs=rngs)
        self.general = nnx.LinearGeneral((4, 4, 2), 6, axis=(1, 2, 3), rngs=rngs)
        self.einsum = nnx.Einsum("...a,ab->...b", (6, 4), (4,), rngs=rngs)

    def __call__(self, x):
        for layer in (self.conv, self.transposed, self.general, self.einsum):
            x = nnx.relu(layer(x))
        return self.head(x)


def test_every_weighted_layer_is_captured_in_call_order():
    model, x = Every(nnx.Rngs(0)), X
    found = jprune.preactivations(model, X, skip_last=False)
    assert list(found) == ["conv", "transposed", "general", "einsum", "head"]
    for name, value in found.items():
        z = getattr(model, name)(x)
        close(value, z)
        x = nnx.relu(z)


def test_axes_of_output_features_are_one_axis_of_units():
    # Head 0 has a bias of -100, so its four units are dead and the penalty of (batch, 8) counts them.
    layer = nnx.LinearGeneral(3, (2, 4), rngs=nnx.Rngs(0))
    layer.bias[...] = jnp.array([[-100.0] * 4, [0.0] * 4])
    x = jax.random.normal(jax.random.key(1), (64, 3))
    found = jprune.preactivations(layer, x, skip_last=False)
    flat = np.asarray(x) @ np.asarray(layer.kernel[...]).reshape(3, 8) + np.asarray(layer.bias[...]).reshape(8)
    close(found[""], flat)
    assert jprune.unit_status(found)[""].tolist() == [-1] * 4 + [1] * 4
    positive, negative = np.maximum(1 - flat.max(0), 0), np.maximum(1 + flat.min(0), 0)  # slacks of the units
    penalty = jprune.jumpstart_penalty(found, mode="unit")
    close(penalty, np.mean((positive + negative) / 2))
    assert penalty > 10
    mask = jnp.arange(8) < 4
    assert jprune.jumpstart.point_status(found, units={"": mask})[""].tolist() == [-1] * 64


class Projections(nnx.Module):
    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 6, decode=False, rngs=rngs)
        self.first = nnx.Einsum("btd,dhk->htbk", (6, 2, 3), rngs=rngs)  # an axis of features before the batch
        self.each = nnx.Einsum("htbk,hkm->bthm", (2, 3, 5), rngs=rngs)  # separate weights for each h
        self.own = nnx.LinearGeneral(5, 3, batch_axis={0: 4}, rngs=rngs)  # separate weights along the first axis
        self.conv = nnx.Conv(3, 2, (3, 3), rngs=rngs)

    def __call__(self, x):
        x = self.each(self.first(self.attention(x)))
        return self.conv(self.own(x))


def test_units_are_the_indices_with_separate_weights_and_the_rest_are_positions():
    x = jax.random.normal(jax.random.key(0), (4, 7, 6))
    found = jprune.preactivations(Projections(nnx.Rngs(0)), x, skip_last=False)
    shapes = {name: value.shape for name, value in found.items()}
    assert {shapes.pop(f"attention/{name}") for name in ("query", "key", "value")} == {(4, 7, 6)}
    # own: (4, 7, 2, 3), with separate weights at each of the first 4 indices, so the second axis is the batch.
    assert shapes == {
        "attention/out": (4, 7, 6),
        "first": (7, 4, 6),
        "each": (4, 7, 10),
        "own": (7, 2, 12),
        "conv": (4, 7, 2, 2),
    }


def test_stacks_and_additional_axes_of_data_keep_their_place_before_the_units():
    layers = [nnx.LinearGeneral(3, (2, 4), rngs=nnx.Rngs(seed)) for seed in range(3)]
    kernels = [np.asarray(layer.kernel[...]).reshape(3, 8) for layer in layers]
    graph, states = nnx.split(layers[0])[0], jax.tree.map(lambda *p: jnp.stack(p), *map(nnx.state, layers))
    stack, x = nnx.merge(graph, states), jax.random.normal(jax.random.key(1), (5, 6, 3))

    class Net(nnx.Module):
        def __init__(self, scanned):
            self.stack, self.scanned = stack, scanned

        def __call__(self, x):
            if self.scanned:
                run = nnx.scan(lambda x, layer: (x, layer(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
                return run(x, self.stack)[1]
            return nnx.vmap(lambda layer, x: layer(x), in_axes=(0, None))(self.stack, x)

    for scanned in (True, False):
        found = jprune.preactivations(Net(scanned), x, stacked=True, skip_last=False)
        close(found["stack"].values, np.stack([np.asarray(x) @ kernel for kernel in kernels]))
        assert jprune.unit_status(found)["stack"].values.shape == (3, 8)
        report = jprune.jumpstart.activity_report(Net(scanned), [x], skip_last=False)
        assert report["units"].tolist() == [8, 8, 8]
    over_examples = nnx.vmap(lambda m, x: m(x), in_axes=(None, 0))
    found = jprune.preactivations(layers[0], x[:, 0], method=over_examples, skip_last=False)
    close(found[""], np.asarray(x[:, 0]) @ kernels[0])


def test_skip_last_leaves_out_every_layer_of_a_stack_that_is_called_last():
    class Ensemble(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(2, 3, rngs=rngs)
            self.members = nnx.split_rngs(splits=4)(nnx.vmap(Block, in_axes=0, out_axes=0))(rngs)

        def __call__(self, x):
            run = nnx.vmap(lambda member, x: member(x), in_axes=(0, None))
            return run(self.members, nnx.relu(self.first(x)))

    model, x = Ensemble(nnx.Rngs(0)), X[:, 0, 0]
    assert list(jprune.preactivations(model, x)) == ["first", *(f"members/up[{i}]" for i in range(4))]
    assert list(jprune.preactivations(model, x, stacked=True)) == ["first", "members/up"]


def test_skip_last_leaves_out_the_layer_called_last_and_not_the_one_made_last():
    assert list(jprune.preactivations(Every(nnx.Rngs(0)), X)) == ["conv", "transposed", "general", "einsum"]


def test_patterns_are_searched_for_in_the_paths():
    found = lambda **options: list(jprune.preactivations(Every(nnx.Rngs(0)), X, **options))
    assert found(include="conv|head", skip_last=False) == ["conv", "head"]
    assert found(exclude="^(conv|transposed)$") == ["general", "einsum"]
    assert found(include="e", exclude="^general$", skip_last=False) == ["transposed", "einsum", "head"]
    for argument in ("include", "exclude"):
        with pytest.raises(
            ValueError, match=f"{argument}='kernel' matches no layer; the model called conv, transposed"
        ):
            found(**{argument: "kernel"})
    with pytest.raises(ValueError, match="skip_last=True leave no layer"):
        found(include="head")


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(3, 4, rngs=rngs)
        self.down = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x):
        return nnx.relu(self.down(nnx.relu(self.up(x))))


class Scanned(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(2, 3, rngs=rngs)
        self.blocks = nnx.split_rngs(splits=3)(nnx.vmap(Block, in_axes=0, out_axes=0))(rngs)
        self.head = nnx.Linear(3, 2, rngs=rngs)

    def __call__(self, x):
        run = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        return self.head(run(nnx.relu(self.first(x)), self.blocks))


def test_a_scanned_stack_counts_as_its_layers_which_take_turns():
    model, x = Scanned(nnx.Rngs(0)), X[:, 0, 0]
    found = jprune.preactivations(model, x)
    turns = [f"blocks/{name}[{step}]" for step in range(3) for name in ("up", "down")]
    assert list(found) == ["first", *turns]
    h = np.maximum(np.asarray(found["first"]), 0)
    for step in range(3):
        for name in ("up", "down"):
            layer = getattr(model.blocks, name)
            z = h @ np.asarray(layer.kernel[...])[step] + np.asarray(layer.bias[...])[step]
            close(found[f"blocks/{name}[{step}]"], z)
            h = np.maximum(z, 0)
    stacked = jprune.preactivations(model, x, stacked=True)
    assert list(stacked) == ["first", "blocks/up", "blocks/down"]
    close(jprune.jumpstart_penalty(stacked), jprune.jumpstart_penalty(found))
    assert len(jprune.jumpstart.activity_report(model, [x])) == 7


def test_capture_works_under_jit_grad_and_vmap_and_leaves_the_model_as_it_was():
    model = Every(nnx.Rngs(0))
    graph, state = nnx.split(model)
    penalty = lambda state, x: jprune.jumpstart_penalty(jprune.preactivations(nnx.merge(graph, state), x))
    value = penalty(state, X)
    close(jax.jit(jax.value_and_grad(penalty))(state, X)[0], value)
    models = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), state)
    both = jax.jit(jax.vmap(penalty, in_axes=(0, None)))(models, X)
    close(both, [value, penalty(jax.tree.map(lambda p: 2 * p, state), X)])


@pytest.mark.slow
def test_the_gradient_through_a_capture_under_jit_is_that_outside():
    graph, state = nnx.split(Every(nnx.Rngs(0)))
    gradient = jax.grad(lambda state: jprune.jumpstart_penalty(jprune.preactivations(nnx.merge(graph, state), X)))
    chex.assert_trees_all_close(jax.jit(gradient)(state), gradient(state), rtol=1e-5, atol=1e-5)


def test_normalization_is_skipped_and_its_statistics_stay_or_move_as_in_a_call():
    class Normed(nnx.Module):
        def __init__(self, rngs):
            self.body = nnx.Linear(2, 3, rngs=rngs)
            self.norm = nnx.BatchNorm(3, rngs=rngs)
            self.drop = nnx.Dropout(0.5, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.drop(nnx.relu(self.norm(self.body(x)))))

    model, twin, x = Normed(nnx.Rngs(0)), Normed(nnx.Rngs(0)), X[:, 0, 0]
    kept = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState))))
    found = jprune.preactivations(model, x, skip_last=False)
    assert list(found) == ["body", "head"]
    close(found["body"], model.body(x))
    after = nnx.to_pure_dict(nnx.state(model, nnx.Not(nnx.RngState)))
    chex.assert_trees_all_equal(kept, jax.tree.map(np.asarray, after))
    for _ in range(2):  # the stream of dropout moves on as well
        outputs, preacts = jprune.jumpstart.call_with_preactivations(model, x, skip_last=False)
        expected = twin(x)
        close(outputs, expected)
        close(preacts["head"], expected)
        close(model.norm.mean[...], twin.norm.mean[...])
        close(model.norm.var[...], twin.norm.var[...])


def test_a_layer_in_a_branch_is_refused_and_never_silently_missing():
    class Branching(nnx.Module):
        def __init__(self, rngs):
            self.one = nnx.Linear(2, 3, rngs=rngs)
            self.head = nnx.Linear(3, 2, rngs=rngs)

        def __call__(self, x):
            x = nnx.cond(x.sum() > 0, lambda m, x: m.one(x), lambda m, x: 2 * m.one(x), self, x)
            return self.head(x)

    with pytest.raises(NotImplementedError, match="layer 'one' is called inside 'cond'"):
        jprune.preactivations(Branching(nnx.Rngs(0)), X[:, 0, 0])
    with pytest.raises(
        TypeError, match=r"model is a function; it must be an nnx\.Module or a Linen module.*add_jumpstart"
    ):
        jprune.preactivations(lambda x: x, X)
