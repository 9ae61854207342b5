"""Errors for an optimizer state whose masks belong to other parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

import jprune
from jprune.pruning.selection import kth_largest, uint64
from jprune.pruning.state import refuse_restored
from tests.pruning.steps import by_rank

pytestmark = pytest.mark.optax_promotes

LINK = jprune.prune(jprune.magnitude(), {0: 0.5}, selection=by_rank)
PARAMS = {"kernel": jnp.array([[0.0, 1.0], [2.0, 0.0]]), "bias": jnp.ones(2)}


@pytest.mark.parametrize("link", [LINK, jprune.keep_zeros()], ids=["prune", "keep_zeros"])
@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"kernel": jnp.ones((2, 3))}, r"state has shape \(2, 2\) at 'kernel', where params has shape \(2, 3\);"),
        (PARAMS | {"other": jnp.ones((1, 2))}, "state has no leaf 'other', which params has;"),
        ({"bias": jnp.ones(2)}, "state has a leaf 'kernel', which params lacks: 'bias'"),
    ],
)
def test_masks_of_other_parameters_are_refused_by_leaf(link, params, message):
    state = link.init(PARAMS)
    for call in (lambda: link.update(params, state, params), lambda: jprune.check_pruned(params, state)):
        with pytest.raises(ValueError, match="^the masks of the optimizer " + message):
            call()


@pytest.mark.parametrize(
    ("tx", "why"),
    [
        (optax.chain(LINK, optax.identity()), r"the prune state at state\[0\] is not the last of its chain \(.* 0\)"),
        (
            optax.lookahead(LINK, 2, 0.5),
            r"at state\.fast_state is inside optax\.lookahead, which mixes slow weights into its updates",
        ),
        (contrib.mechanize(LINK), r"is inside optax\.contrib\.mechanize, which scales its updates"),
        (contrib.sam(LINK, optax.sgd(0.1)), r"is inside optax\.contrib\.sam, which moves its updates"),
        (
            optax.conditionally_transform(LINK, lambda step: step < 3),
            r"is inside optax\.conditionally_transform, which skips it at some steps",
        ),
    ],
)
def test_a_link_whose_zeros_would_not_stay_is_an_error_that_names_the_right_place(tx, why):
    state = tx.init(optax.LookaheadParams(PARAMS, PARAMS) if "lookahead" in why else PARAMS)
    place = "" if "chain" in why else "; chain prune after it"
    with pytest.raises(ValueError, match=f"{why}{place}, so pruned weights would not stay 0$"):
        jprune.masks_of(state)


class TestRestoredWithoutATarget:
    """A checkpoint restored without a target has dicts and lists where the state has named tuples."""

    @pytest.mark.parametrize(
        "restored",
        [
            {"0": {}, "1": {"count": np.zeros(()), "masks": {"kernel": np.ones((1, 2), bool)}, "key": None}},
            [[], [np.zeros(()), {"kernel": np.ones((1, 2), bool)}]],
        ],
        ids=["dict", "list"],
    )
    def test_masks_of_says_so(self, restored):
        with pytest.raises(ValueError, match=r"restored without a target is; restore it with the state of tx\.init"):
            jprune.masks_of(restored)

    def test_a_link_says_so(self):
        with pytest.raises(TypeError, match="prune was given a state of type dict, not a PruneState: it is a dict, as"):
            refuse_restored({"count": 0, "masks": {"kernel": np.ones((1, 2), bool)}}, "prune")


class TestConverted:
    """A state whose arrays were all cast, as in ``jax.tree.map(lambda leaf: leaf.astype(dtype), state)``."""

    STATE = optax.chain(optax.sgd(0.1), LINK).init(PARAMS)

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (
                jax.tree.map(lambda leaf: leaf.astype(jnp.float32), STATE),
                "mask at 'kernel' has dtype float32, not bool",
            ),
            (
                optax.tree.set(STATE, count=jnp.bfloat16(300)),
                "count has dtype bfloat16, which cannot represent every int",
            ),
            (
                optax.tree.set(STATE, applied=jnp.float32(7)),
                "applied has dtype float32, which cannot represent every int",
            ),
        ],
    )
    def test_is_refused_by_every_reader(self, state, message):
        for call in (
            lambda: jprune.masks_of(state),
            lambda: jprune.check_pruned(PARAMS, state),
            lambda: jprune.with_masks(state, {"kernel": jnp.ones((2, 2), bool)}),
        ):
            with pytest.raises(TypeError, match=r"in the prune state at state\[1\] the " + message):
                call()
        with pytest.raises(TypeError, match="prune was given a state whose " + message):
            LINK.update(PARAMS, state[1], PARAMS)


def test_masks_of_numpy_are_copied_into_the_state():
    given = np.array([[False, True], [True, False]])
    state = jprune.with_masks(jprune.keep_zeros().init(PARAMS), {"kernel": given})
    given[:] = False
    np.testing.assert_array_equal(jprune.masks_of(state)["kernel"], [[False, True], [True, False]])


@pytest.mark.filterwarnings("ignore:keep_zeros has no zero")
@pytest.mark.parametrize(
    "link",
    [jprune.prune(jprune.magnitude(), {0: 0.5}), jprune.keep_zeros(), jprune.sr_ste(optax.sgd(0.1), 1, 2)],
    ids=["prune", "keep_zeros", "sr_ste"],
)
def test_optax_maps_the_masks_like_the_parameters(link):
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    shapes = optax.tree.map_params(link, lambda leaf: leaf.shape, link.init(params))
    assert shapes.masks["kernel"] == (2, 2)
    assert shapes.count == 0


def test_a_dict_of_optimizer_states_is_not_called_a_restored_one():
    with pytest.raises(ValueError, match=r"no prune or keep_zeros transformation in this optimizer state; end"):
        jprune.masks_of({"encoder": optax.adam(0.1).init(PARAMS)})


def test_masks_of_less_than_the_masked_leaves_are_refused_by_leaf():
    state = jprune.keep_zeros().init({"a": {"kernel": jnp.array([[0.0, 1.0]])}})
    for masks in ({"a": None}, {"a": {"kernel": None}}):
        with pytest.raises(ValueError, match="masks has None at 'a/kernel'; it must be a bool array"):
            jprune.with_masks(state, masks)


def test_check_pruned_reports_counts_beyond_int32(monkeypatch):
    monkeypatch.setattr(kth_largest, "count_true", lambda masks: uint64.count_of(2**31 + 5))  # no test has that many
    state = jprune.keep_zeros().init({"kernel": jnp.array([[0.0, 1.0]])})
    with pytest.raises(ValueError, match="not 0: 2147483653 of 2147483653 in 'kernel'"):
        jprune.check_pruned({"kernel": jnp.array([[0.5, 1.0]])}, state)
    with pytest.raises(ValueError, match="infinite: 2147483653 of 2147483653 in 'kernel'"):
        jprune.check_pruned({"kernel": jnp.array([[0.0, jnp.nan]])}, state)


class Normalized(nnx.Module):
    def __init__(self, rngs):
        self.layer = nnx.Linear(2, 3, rngs=rngs)
        self.norm = nnx.BatchNorm(3, rngs=rngs)


@pytest.mark.parametrize(
    ("tree", "advice"),
    [
        (lambda model: model, "params is an nnx module"),
        (nnx.state, r"params has variables that are not parameters \(BatchStat\)"),
    ],
)
def test_an_nnx_module_or_its_whole_state_in_place_of_the_parameters_is_explained(tmp_path, tree, advice):
    model = Normalized(nnx.Rngs(0))
    params = nnx.state(model, nnx.Param)
    state = LINK.init(params)
    masks, given = jprune.masks_of(state), tree(model)
    jprune.io.save_pruned(tmp_path / "saved", params, masks)
    for call in (
        lambda: jprune.check_pruned(given, state),
        lambda: jprune.apply_masks(given, masks),
        lambda: jprune.io.save_pruned(tmp_path / "other", given, masks),
        lambda: jprune.io.load_pruned(tmp_path / "saved", given),
        lambda: jprune.io.to_bcoo(given, masks),
    ):
        with pytest.raises(ValueError, match=rf"{advice}: pass nnx\.state\(model, nnx\.Param\)$"):
            call()


def test_masks_that_prune_a_leaf_without_a_mask_are_refused():
    """They were left out, so that the pruned biases were trained."""
    params = {"kernel": jnp.ones((1, 2)), "bias": jnp.ones(2)}
    state = jprune.prune(jprune.magnitude(), {0: 0.5}).init(params)
    kept = {"kernel": jnp.array([[True, False]]), "bias": jnp.array([True, True])}
    assert jprune.masks_of(jprune.with_masks(state, kept))["bias"] is None
    with pytest.raises(ValueError, match="masks prune weights of 'bias', and the optimizer state has no mask for this"):
        jprune.with_masks(state, kept | {"bias": jnp.array([True, False])})
