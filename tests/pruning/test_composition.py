"""prune inside and around optax's wrappers, NNX's Optimizer and Linen's TrainState."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state
from optax import contrib

import jprune
from jprune.pruning.amounts import integer
from tests.pruning.steps import by_rank, largest, make_step, slope

pytestmark = pytest.mark.optax_promotes
MAGNITUDE = jprune.magnitude()


def prune(score, schedule):
    return jprune.prune(score, schedule, selection=by_rank)


def tree():
    return {
        "a": {"kernel": jnp.array([[0.9, -0.2, 0.4, 0.1], [0.7, 0.3, -0.8, 0.6]]), "bias": jnp.ones(4)},
        "b": {"kernel": jnp.array([[0.5, -0.05], [0.25, 1.1]]), "bias": jnp.zeros(2)},
    }


LINK = prune(MAGNITUDE, {0: 0.5})


def train(tx, params, steps):
    """Train and check that after every step exactly the pruned weights of the kernels are 0."""
    state, step, kept = tx.init(params), make_step(tx), []
    for _ in range(steps):
        params, state = step(params, state)
        masks = jprune.masks_of(state)
        jprune.check_pruned(params, state)
        kept.append(sum(int(mask.sum()) for mask in jax.tree.leaves(masks)))
        zeros = sum(int((params[name]["kernel"] == 0).sum()) for name in params)
        assert zeros == sum(mask.size for mask in jax.tree.leaves(masks)) - kept[-1]
    return params, state, kept


@pytest.mark.parametrize(
    "before",
    [
        optax.clip_by_global_norm(0.1),
        optax.chain(optax.clip(0.1), optax.add_decayed_weights(1e-2), optax.adam(0.1)),
        optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9, nesterov=True)),
    ],
    ids=["clip", "adamw with clipping", "momentum with decay"],
)
def test_last_link_of_a_chain(before):
    _, _, kept = train(optax.chain(before, prune(MAGNITUDE, {1: 0.5, 3: jprune.Keep(3)})), tree(), 5)
    assert kept == [12, 6, 6, 3, 3]


def test_last_link_of_the_last_link_and_of_a_named_chain():
    link = prune(MAGNITUDE, {0: jprune.Keep(4)})
    nested = optax.chain(optax.clip(1.0), optax.chain(optax.sgd(0.1), link))
    named = optax.named_chain(("sgd", optax.sgd(0.1)), ("a name that sorts first", link))
    for tx in (nested, named):
        assert train(tx, tree(), 2)[2] == [4, 4]


def test_no_hook_is_needed_after_the_step():
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), prune(MAGNITUDE, {0: 0.75}))
    params = tree()
    state = tx.init(params)
    for _ in range(3):
        updates, state = tx.update(slope(params), state, params)
        params = optax.apply_updates(params, updates)
    assert sum(int((params[k]["kernel"] != 0).sum()) for k in params) == 3


def test_inside_partition_with_a_schedule_for_each_group():
    groups = {
        "a": optax.chain(optax.adam(0.1), prune(jprune.gradient(), {1: jprune.Keep(2)})),
        "b": optax.chain(optax.sgd(0.1), prune(MAGNITUDE, {2: 0.25})),
    }
    labels = {name: {"kernel": name, "bias": name} for name in groups}
    _, state, kept = train(optax.partition(groups, labels), tree(), 4)
    assert kept == [12, 6, 5, 5]
    masks = jprune.masks_of(state)
    assert [int(masks[name]["kernel"].sum()) for name in groups] == [2, 3]
    assert [masks[name]["bias"] for name in groups] == [None, None]


def test_inside_partition_by_a_prefix_of_the_tree_with_one_group_unpruned():
    groups = {"pruned": optax.chain(optax.sgd(0.1), prune(MAGNITUDE, {0: jprune.Keep(3)})), "dense": optax.adam(0.1)}
    _, state, kept = train(optax.partition(groups, {"a": "pruned", "b": "dense"}), tree(), 2)
    assert kept == [3, 3]
    assert jprune.masks_of(state)["b"] is None


def test_inside_masked():
    tx = optax.chain(optax.sgd(0.1), optax.masked(prune(MAGNITUDE, {0: 0.5}), {"a": False, "b": True}))
    params, _, kept = train(tx, tree(), 2)
    assert kept == [2, 2]
    assert (params["a"]["kernel"] != 0).all()


def test_inside_inject_hyperparams():
    def make(learning_rate):
        return optax.chain(optax.sgd(learning_rate, momentum=0.9), prune(jprune.gradient(), {1: 0.5}))

    tx = optax.inject_hyperparams(make)(learning_rate=optax.cosine_decay_schedule(0.1, 10))
    assert train(tx, tree(), 3)[2] == [12, 6, 6]


@pytest.mark.parametrize(
    ("factory", "static", "arguments"),
    [
        (jprune.prune, (), (MAGNITUDE, {0: 0.5})),
        (jprune.prune, "score", (MAGNITUDE, {0: 0.5})),
        (lambda every: integer("every", every, least=1), (), (1,)),
        (jprune.add_jumpstart, "preactivations", (lambda params, batch: [params], 1e-3)),
    ],
)
def test_injecting_hyperparameters_of_one_link_says_to_inject_the_whole_chain(factory, static, arguments):
    tx = optax.inject_hyperparams(factory, static_args=static)(*arguments)
    with pytest.raises(TypeError, match=r"pass it a function that makes the whole chain: optax.inject_hyperparams\("):
        tx.init(tree())


def test_check_pruned_says_that_flattening_hides_the_leaves():
    tx = optax.flatten(optax.chain(optax.sgd(0.1), jprune.prune(MAGNITUDE, {0: 0.5}, where=lambda path, leaf: True)))
    with pytest.raises(
        ValueError, match=r"prune is inside optax\.flatten.*: optax\.chain\(optax\.flatten\(\.\.\.\), jprune"
    ):
        jprune.check_pruned(tree(), tx.init(tree()))
    with pytest.raises(ValueError, match=r"one array without a name.*inside optax\.flatten apply prune after it"):
        optax.flatten(LINK).init(tree())
    after = optax.chain(optax.flatten(optax.adam(0.1)), prune(MAGNITUDE, {0: 0.5}))
    assert train(after, tree(), 2)[2] == [6, 6]


def test_inside_apply_if_finite_a_rejected_step_does_not_count():
    tx = optax.apply_if_finite(optax.chain(optax.sgd(0.1), prune(MAGNITUDE, {1: 0.5})), 5)
    params = {"kernel": jnp.array([[1.0, 2.0, 3.0, 4.0]])}
    state, update = tx.init(params), jax.jit(tx.update)
    kept = []
    for grad in (0.1, jnp.nan, 0.1, 0.1):
        updates, state = update({"kernel": jnp.full((1, 4), grad)}, state, params)
        params = optax.apply_updates(params, updates)
        kept.append(int(jprune.masks_of(state)["kernel"].sum()))
    assert kept == [4, 4, 2, 2]
    jprune.check_pruned(params, state)


@pytest.mark.parametrize("inner", [prune, lambda *a: optax.chain(optax.sgd(0.1), prune(*a))])
def test_inside_multi_steps_a_step_is_a_full_accumulation(inner):
    tx = optax.MultiSteps(inner(MAGNITUDE, {1: jprune.Keep(3)}), every_k_schedule=2).gradient_transformation()
    assert train(tx, tree(), 6)[2] == [12, 12, 12, 3, 3, 3]


def test_inside_multi_steps_grad_is_that_of_the_last_micro_batch():
    tx = optax.MultiSteps(optax.chain(optax.sgd(0.0), prune(jprune.gradient(), {0: jprune.Keep(1)})), 2)
    params = {"kernel": jnp.ones((1, 3))}
    state = tx.init(params)
    for values in ([100.0, 1.0, 2.0], [0.1, 0.3, 0.2]):  # their mean is largest at the first weight
        grad = {"kernel": jnp.array([values])}
        _, state = tx.update(grad, state, params, grad=grad)
    np.testing.assert_array_equal(jprune.masks_of(state)["kernel"], [[False, True, False]])


def test_multi_steps_inside_the_chain():
    accumulated = optax.MultiSteps(optax.adam(0.1), 2).gradient_transformation()
    assert train(optax.chain(accumulated, prune(MAGNITUDE, {1: jprune.Keep(3)})), tree(), 4)[2] == [12, 3, 3, 3]


def schedule_free_run(tx, steps, state_of):
    params = tree()
    state, step = tx.init(params), make_step(tx)
    for _ in range(steps):
        params, state = step(params, state)
        jprune.check_pruned(params, state)
        jprune.check_pruned(contrib.schedule_free_eval_params(state_of(state), params), state)
    return jprune.sparsity(jprune.masks_of(state))


def test_inside_schedule_free_evaluation_parameters_are_pruned_too():
    pruned = optax.chain(optax.sgd(0.1), prune(MAGNITUDE, {0: 0.5}))
    assert schedule_free_run(contrib.schedule_free(pruned, 0.1), 4, lambda state: state) == 0.5


def test_keep_zeros_inside_schedule_free():
    params = jprune.apply_masks(tree(), jprune.global_masks(MAGNITUDE(tree()), keep=4))
    tx = contrib.schedule_free(optax.chain(optax.adam(0.1, b1=0.0), jprune.keep_zeros()), 0.1)
    state, step = tx.init(params), make_step(tx)
    for _ in range(3):
        params, state = step(params, state)
        jprune.check_pruned(contrib.schedule_free_eval_params(state, params), state)
    assert sum(int(m.sum()) for m in jax.tree.leaves(jprune.masks_of(state))) == 4


def test_schedule_free_pruned_at_any_step_in_reset_moments():
    tx = jprune.reset_moments(
        contrib.schedule_free_adamw(0.1), prune(MAGNITUDE, jprune.cubic(0.75, begin=0, end=4, every=2))
    )
    assert schedule_free_run(tx, 6, lambda state: state[0]) == 0.75


def test_pruned_late_inside_schedule_free_check_pruned_says_so():
    """The average in schedule_free still holds the pruned weights; only reset_moments can clear it."""
    pruned = optax.chain(optax.sgd(0.1), prune(MAGNITUDE, {2: 0.5}))
    with pytest.raises(ValueError, match="pruned weights are not 0"):
        schedule_free_run(contrib.schedule_free(pruned, 0.1), 4, lambda state: state)


def kept_of(masks):
    return sum(int(mask.sum()) for mask in jax.tree.leaves(masks))


def test_after_lookahead_fast_and_slow_weights_share_one_mask():
    lookahead = optax.lookahead(optax.sgd(0.1, momentum=0.9), sync_period=3, slow_step_size=0.5)
    tx = optax.chain(lookahead, prune(jprune.gradient(), {1: 0.5, 4: jprune.Keep(3)}))
    params = optax.LookaheadParams.init_synced(tree())
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        grad = slope(params.fast)
        updates, state = tx.update(grad, state, params, grad=grad)
        return optax.apply_updates(params, updates), state

    kept = []
    for _ in range(7):
        params, state = step(params, state)
        masks = jprune.masks_of(state)
        jprune.check_pruned(params, state)
        assert jax.tree.all(jax.tree.map(jnp.array_equal, masks.fast, masks.slow))
        kept.append(kept_of(masks.fast))
    assert kept == [12, 6, 6, 6, 3, 3, 3]
    jprune.check_pruned(params, state, keep=3, axes="flax")
    jprune.check_pruned(params.fast, state, keep={"^a/": kept_of(masks.fast["a"]), "": kept_of(masks.fast["b"])})
    with pytest.raises(ValueError, match=r"^3 of 12 prunable weights are kept"):
        jprune.check_pruned(params, state, keep=2)
    assert sum(int((params.slow[k]["kernel"] != 0).sum()) for k in "ab") == 3


def test_lookahead_states_can_be_donated():
    tx = optax.chain(optax.lookahead(optax.sgd(0.1), 2, 0.5), prune(MAGNITUDE, {1: 0.5}))
    params = optax.LookaheadParams(tree(), tree())
    step = jax.jit(lambda p, s: tx.update(slope(p.fast), s, p), donate_argnums=1)
    state = tx.init(params)
    for _ in range(3):
        _, state = step(params, state)
    assert jprune.sparsity(jprune.masks_of(state)) == 0.5


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(nnx.relu(self.norm(self.first(x))))


def test_nnx_optimizer_forwards_grad_and_holds_the_masks():
    model = Net(nnx.Rngs(0))
    schedule = {1: 0.5, 3: jprune.Keep(4)}
    tx = optax.chain(optax.adam(0.1), prune(jprune.gradient(), schedule))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        grads = nnx.grad(lambda model: jnp.mean((model(x) - 1) ** 2))(model)
        optimizer.update(model, grads, grad=grads)
        return grads

    kept, alive = [], None
    for i in range(5):
        before = [np.asarray(layer.kernel[...]) for layer in (model.first, model.last)]
        grads = step(model, optimizer, jax.random.normal(jax.random.key(i), (8, 3)))
        if i in schedule:
            keep = round(20 * 0.5) if i == 1 else 4
            slopes = [np.asarray(grads[name]["kernel"][...]) for name in ("first", "last")]
            alive = largest([np.abs(w * g) for w, g in zip(before, slopes, strict=True)], keep, alive)
        after = [np.asarray(layer.kernel[...]) for layer in (model.first, model.last)]
        kept.append(sum(int((w != 0).sum()) for w in after))
        if alive is not None:
            for weight, mask in zip(after, alive, strict=True):
                np.testing.assert_array_equal(weight != 0, mask)
        jprune.check_pruned(nnx.state(model, nnx.Param), optimizer.opt_state)
    assert kept == [20, 10, 10, 4, 4]
    masks = jprune.masks_of(optimizer.opt_state)
    assert jprune.sparsity(masks) == 0.8
    assert jprune.selection.compression(nnx.state(model, nnx.Param), masks) == (20 + 4 + 2 + 8) / (4 + 4 + 2 + 8)

    fewer = jax.tree.map(lambda mask: mask.at[:, 0].set(False), nnx.to_pure_dict(masks))
    optimizer.opt_state = jprune.with_masks(optimizer.opt_state, fewer)
    step(model, optimizer, jnp.ones((8, 3)))
    assert not model.first.kernel[:, 0].any()
    assert not model.last.kernel[:, 0].any()
    with pytest.raises(ValueError, match=r"it is the nnx\.State of an nnx\.Optimizer; pass optimizer\.opt_state"):
        jprune.masks_of(nnx.state(optimizer))


def test_nnx_optimizer_with_a_link_that_is_not_last_is_refused():
    optimizer = nnx.Optimizer(Net(nnx.Rngs(0)), optax.chain(LINK, optax.scale(0.5)), wrt=nnx.Param)
    with pytest.raises(ValueError, match="is not the last of its chain"):
        jprune.masks_of(optimizer.opt_state)


def test_check_pruned_of_an_nnx_optimizer_of_some_variables_says_to_give_the_same():
    model, wrt = Net(nnx.Rngs(0)), nnx.All(nnx.Param, nnx.PathContains("first"))
    optimizer = nnx.Optimizer(model, optax.chain(optax.sgd(0.1), LINK), wrt=wrt)
    with pytest.raises(ValueError, match=r"initialized with these leaves alone: .*nnx\.state\(model, wrt\)"):
        jprune.check_pruned(nnx.state(model, nnx.Param), optimizer.opt_state)
    jprune.check_pruned(nnx.state(model, wrt), optimizer.opt_state)


class PrunedTrainState(train_state.TrainState):
    """The subclass of the docs: it forwards what the scores need."""

    def apply_gradients(self, *, grads, batch=None, **changes):
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, grad=grads, batch=batch)
        params = optax.apply_updates(self.params, updates)
        return self.replace(step=self.step + 1, params=params, opt_state=opt_state, **changes)


def test_linen_train_state_with_the_documented_subclass():
    model = linen.Dense(5)
    x = jnp.ones((2, 4))
    variables = model.init(jax.random.key(0), x)
    tx = optax.chain(optax.sgd(0.1, momentum=0.9), prune(jprune.gradient(), {1: jprune.Keep(7)}))
    state = PrunedTrainState.create(apply_fn=model.apply, params=variables, tx=tx)

    @jax.jit
    def step(state):
        grads = jax.grad(lambda variables: jnp.sum(jnp.sin(state.apply_fn(variables, x))))(state.params)
        return state.apply_gradients(grads=grads)

    kept = []
    for _ in range(3):
        state = step(state)
        jprune.check_pruned(state.params, state.opt_state)
        kept.append(int((state.params["params"]["kernel"] != 0).sum()))
    assert kept == [20, 7, 7]
    assert int(state.step) == 3


def test_linen_train_state_itself_drops_grad_and_the_error_says_what_to_pass():
    tx = prune(jprune.gradient(), {1: jprune.Keep(7)})
    state = train_state.TrainState.create(apply_fn=None, params={"kernel": jnp.ones((4, 5))}, tx=tx)
    with pytest.raises(ValueError, match=r"needs grad.*update\(updates, state, params, grad"):
        state.apply_gradients(grads=state.params)


@pytest.mark.filterwarnings("ignore:keep_zeros has no zero")
@pytest.mark.parametrize(
    ("tx", "message"),
    [
        (optax.chain(LINK, optax.scale(0.5)), r"state\[0\] is not the last of its chain"),
        (optax.chain(optax.sgd(0.1), LINK, optax.identity()), r"state\[1\] is not the last"),
        (optax.chain(optax.chain(optax.sgd(0.1), LINK), optax.scale(0.5)), r"state\[0\]\[1\] is not the last"),
        (optax.chain(optax.masked(LINK, True), optax.scale(0.5)), r"state\[0\]\.inner_state is not the last"),
        (optax.chain(LINK, LINK), r"state\[0\] is not the last"),
        (optax.named_chain(("prune", LINK), ("sgd", optax.sgd(0.1))), r"state\['prune'\] is not the last"),
        (optax.chain(jprune.keep_zeros(), optax.sgd(0.1)), "is not the last"),
        (optax.lookahead(optax.chain(optax.sgd(0.1), LINK), 2, 0.5), "inside optax.lookahead"),
        (contrib.mechanize(optax.chain(optax.sgd(0.1), LINK)), "inside optax.contrib.mechanize"),
        (contrib.sam(optax.chain(optax.sgd(0.1), LINK), optax.sgd(0.1)), "inside optax.contrib.sam"),
        (optax.sgd(0.1), "no prune or keep_zeros transformation"),
    ],
)
def test_masks_of_refuses_a_link_whose_zeros_would_not_hold(tx, message):
    params = tree()
    state = tx.init(optax.LookaheadParams(params, params) if "lookahead" in message else params)
    with pytest.raises(ValueError, match=message):
        jprune.masks_of(state)


def test_masks_of_refuses_two_links_that_hold_a_mask_of_the_same_leaf():
    labels = {"a": "one", "b": "two"}
    both = optax.chain(optax.sgd(0.1), LINK)
    merged = jprune.masks_of(optax.partition({"one": both, "two": both}, labels).init(tree()))
    assert jax.tree.map(lambda mask: mask.shape, merged) == {
        "a": {"kernel": (2, 4), "bias": None},
        "b": {"kernel": (2, 2), "bias": None},
    }
    with pytest.raises(ValueError, match=r"same leaf \['a'\]\['kernel'\]"):
        jprune.masks_of([both.init(tree()), both.init(tree())])


def test_with_masks_replaces_masks_anywhere_and_refuses_other_trees():
    one = optax.chain(optax.sgd(0.1), LINK)
    tx = optax.partition({"one": one, "two": one}, {"a": "one", "b": "two"})
    state = tx.init(tree())
    masks = jprune.global_masks(MAGNITUDE(tree()), keep=5)
    found = jprune.masks_of(jprune.with_masks(state, masks))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, found, masks))
    with pytest.raises(ValueError, match="masks has no leaf 'a/kernel', which the masks of the optimizer state has"):
        jprune.with_masks(state, {"b": masks["b"]})
    with pytest.raises(ValueError, match=r"masks has shape \(2, 2\) at 'a/kernel'"):
        jprune.with_masks(state, masks | {"a": masks["b"]})
    with pytest.raises(ValueError, match="at 'a/kernel'; it must be a bool array"):
        jprune.with_masks(state, masks | {"a": tree()["a"]})


def test_a_donated_step_does_not_delete_the_masks_given_to_with_masks():
    tx = optax.chain(optax.sgd(0.1), LINK)
    masks = jprune.global_masks(MAGNITUDE(tree()), keep=5)
    step = jax.jit(lambda params, state: tx.update(slope(params), state, params), donate_argnums=1)
    _, state = step(tree(), jprune.with_masks(tx.init(tree()), masks))
    assert jax.tree.all(jax.tree.map(jnp.array_equal, jprune.masks_of(state), masks))


@pytest.mark.parametrize("score", [jprune.wanda, jprune.scores.fisher, jprune.scores.synflow])
def test_a_score_that_runs_the_model_on_one_group_of_parameters_says_where_it_belongs(score):
    run = lambda params, x: x @ params["a"]["kernel"][:, :2] @ params["b"]["kernel"]
    link = jprune.prune(score(run), {0: 0.5})
    tx = optax.partition({"one": link, "two": optax.identity()}, {"a": "one", "b": "two"})
    with pytest.raises(TypeError, match="not str") as error:
        tx.update(tree(), tx.init(tree()), tree(), batch=jnp.ones((3, 2)))
    assert "only the parameters of one group" in error.value.__notes__[0]


def test_check_pruned_names_the_leaves_that_revived_and_how_much():
    tx = optax.chain(optax.sgd(0.1), prune(MAGNITUDE, {0: 0.5}))
    params, state, _ = train(tx, tree(), 1)
    params["a"]["kernel"] = params["a"]["kernel"] + jnp.array([[0, 1.0, 0, 0], [0, 0, 0, 0]])
    with pytest.raises(ValueError, match=r"not 0: 1 of 4 in 'a/kernel'; apply the masks"):
        jprune.check_pruned(params, state)
    params["b"]["kernel"] = jnp.full((2, 2), jnp.nan)
    with pytest.raises(ValueError, match=r"1 of 4 in 'a/kernel', 2 of 2 in 'b/kernel'"):
        jprune.check_pruned(params, state)


def chained_after(first, second, order):
    return optax.chain(optax.sgd(0.1), *((first, second) if order == "as given" else (second, first)))


OTHER = {"a": False, "b": True}
FIRST = {"a": True, "b": False}


@pytest.mark.filterwarnings("ignore:keep_zeros has no zero")
@pytest.mark.parametrize("order", ["as given", "reversed"])
@pytest.mark.parametrize(
    ("first", "second", "kept"),
    [
        (
            jprune.prune(MAGNITUDE, {0: 0.5}, where=jprune.by_path("^a/kernel"), selection=by_rank),
            jprune.prune(MAGNITUDE, {1: 0.75}, where=jprune.by_path("^b/kernel"), selection=by_rank),
            [8, 5],
        ),
        (optax.masked(LINK, FIRST), optax.masked(prune(MAGNITUDE, {1: 0.75}), OTHER), [8, 5]),
        (optax.masked(LINK, FIRST), optax.masked(jprune.keep_zeros(), OTHER), [8, 8]),
        (optax.masked(LINK, FIRST), optax.masked(optax.set_to_zero(), OTHER), [4, 4]),
        (optax.masked(LINK, FIRST), optax.masked(optax.scale(0.5), OTHER), [4, 4]),
        (optax.masked(LINK, FIRST), optax.masked(optax.trace(0.9), OTHER), [4, 4]),
        (optax.masked(LINK, FIRST), optax.masked(optax.adam(0.1), OTHER), [4, 4]),
    ],
    ids=["prune prune", "masked prune", "keep_zeros", "set_to_zero", "scale", "trace", "adam"],
)
def test_links_that_change_other_leaves_may_come_after_prune(first, second, kept, order):
    tx = chained_after(first, second, order)
    params, state, step, found = tree(), None, None, []
    state, step = tx.init(params), make_step(tx)
    for _ in range(2):
        params, state = step(params, state)
        jprune.check_pruned(params, state)
        found.append(sum(int(mask.sum()) for mask in jax.tree.leaves(jprune.masks_of(state))))
    assert found == kept


@pytest.mark.parametrize(
    "after",
    [
        optax.masked(optax.adam(0.1), FIRST),
        optax.masked(optax.trace(0.9), {"a": True, "b": True}),
        optax.chain(optax.masked(optax.set_to_zero(), OTHER), optax.scale(0.5)),
        optax.masked(LINK, {"a": {"kernel": True, "bias": True}, "b": True}),
        optax.masked(optax.chain(optax.identity(), optax.adam(0.1)), FIRST),
    ],
    ids=["adam", "trace", "a chain", "prune", "a masked chain"],
)
def test_links_that_change_the_same_leaves_are_refused_after_prune(after):
    state = optax.chain(optax.masked(LINK, FIRST), after).init(tree())
    with pytest.raises(
        ValueError, match=r"state\[0\]\.inner_state is not the last of its chain \(a state of 2, at 0\)"
    ):
        jprune.masks_of(state)


def test_a_masked_link_after_prune_of_every_leaf_is_refused():
    link = jprune.prune(MAGNITUDE, {0: 0.5}, where=lambda path, leaf: True, selection=by_rank)
    with pytest.raises(ValueError, match="is not the last of its chain"):
        jprune.masks_of(optax.chain(link, optax.masked(optax.scale(0.5), FIRST)).init(tree()))


def test_check_pruned_finds_weights_that_a_masked_link_without_state_changed():
    tx = optax.chain(optax.sgd(0.1), optax.masked(LINK, FIRST), optax.masked(optax.scale(0.5), FIRST))
    params, state = make_step(tx)(tree(), tx.init(tree()))
    with pytest.raises(ValueError, match="pruned weights are not 0: 4 of 4 in 'a/kernel'"):
        jprune.check_pruned(params, state)
