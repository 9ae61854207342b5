"""Masks in an optimizer state that belong to other parameters than those at hand."""

import jax.numpy as jnp
import optax
import pytest
from optax import contrib

import jprune
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
    ],
)
def test_a_link_whose_zeros_would_not_hold_is_told_where_to_go(tx, why):
    state = tx.init(optax.LookaheadParams(PARAMS, PARAMS) if "lookahead" in why else PARAMS)
    place = "" if "chain" in why else "; chain prune after it"
    with pytest.raises(ValueError, match=f"{why}{place}, so pruned weights would not stay 0$"):
        jprune.masks_of(state)
