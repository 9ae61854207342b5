"""check_pruned compares amounts as the selection rounds them: in total, in each layer, each output or each block."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune

LINK = jprune.prune(jprune.magnitude(), {0: 0.5})
RNG = np.random.default_rng(5)
SHAPES = {"a": (8, 12), "b": (12, 20)}


def kept_by(**masks):
    """Parameters of zeros and ones, and a state whose masks keep the ones."""
    params = {name: {"kernel": jnp.asarray(mask, jnp.float32)} for name, mask in masks.items()}
    return params, jprune.keep_zeros().init(params)


def first(shape, *, of_outputs=None, of_all=None):
    """A mask of the first weights into each output, or of the first of all."""
    mask = np.zeros(shape, bool)
    if of_outputs is None:
        mask.reshape(-1)[:of_all] = True
    else:
        mask[:of_outputs] = True
    return mask


def test_check_pruned_accepts_what_is_rounded_in_each_layer_or_output():
    """A tenth of 256, 416 and 156 weights is 25.6, 41.6 and 15.6, rounded 84 in all; of all 828 weights 82.8."""
    shapes = {"a": (16, 16), "b": (16, 26), "c": (26, 6)}
    masks = lambda *counts: {name: first(shapes[name], of_all=n) for name, n in zip(shapes, counts, strict=True)}
    jprune.check_pruned(*kept_by(**masks(26, 42, 16)), sparsity=0.9)
    jprune.check_pruned(*kept_by(**masks(40, 20, 23)), sparsity=0.9)  # 83 over all layers
    for counts in ((27, 41, 16), (26, 42, 17)):
        with pytest.raises(ValueError, match=f"{sum(counts)} of 828 prunable weights .* more than the 83 requested"):
            jprune.check_pruned(*kept_by(**masks(*counts)), sparsity=0.9)
    with pytest.raises(ValueError, match=r"84 of 828 .* more than the 83 requested"):
        jprune.check_pruned(*kept_by(**masks(26, 42, 16)), keep=83)
    # A tenth of 16 weights into each of 20 outputs is 2, rounded up, and of 14 weights 1, rounded down.
    jprune.check_pruned(*kept_by(a=first((16, 20), of_outputs=2)), sparsity=0.9)
    jprune.check_pruned(*kept_by(a=first((14, 20), of_outputs=1)), sparsity=0.9)
    with pytest.raises(ValueError, match=r"41 of 320 prunable weights .* more than the 32 requested"):
        jprune.check_pruned(*kept_by(a=first((16, 20), of_all=41)), sparsity=0.9)
    with pytest.warns(UserWarning, match=r"19 of 280 prunable weights .* fewer than the 28 requested"):
        jprune.check_pruned(*kept_by(a=first((14, 20), of_all=19)), sparsity=0.9)


def test_check_pruned_compares_each_replicate():
    """A fifth of 13 weights is 2.6, rounded to 3; of two replicates together it would be 5, not 6."""
    masks = jnp.stack([first((13, 1), of_all=3), first((13, 1), of_all=3)])
    params = {"kernel": masks.astype(jnp.float32)}
    state = jax.vmap(jprune.keep_zeros().init)(params)
    jprune.check_pruned(params, state, sparsity=0.8, axes="flax")
    jprune.check_pruned(params, state, keep=3)
    jprune.check_pruned(params, state, keep={"": 3}, selection=None)
    jprune.check_pruned(params, state, sparsity=0.8, selection=jprune.global_masks)
    four = jprune.with_masks(state, {"kernel": masks.at[1, 3].set(True)})
    with pytest.raises(ValueError, match=r"^4 of 13 prunable weights of replicate 1 are kept .* than the 3 requested"):
        jprune.check_pruned(params, four, keep=3)
    with pytest.raises(ValueError, match=r"^4 of 13 prunable weights of 'kernel' of replicate 1 are kept"):
        jprune.check_pruned(params, four, keep={"": 3})
    none = {"kernel": jnp.zeros_like(params["kernel"]).at[0].set(1.0)}
    with pytest.warns(UserWarning, match="^in replicate 1, no weight is kept in 'kernel'"):
        jprune.check_pruned(none, jax.vmap(jprune.keep_zeros().init)(none))


BLOCKS = functools.partial(jprune.selection.block_masks, block=(4, 4))
SELECTIONS = {
    "global": jprune.global_masks,
    "layer": jprune.layer_masks,
    "layer with a floor": functools.partial(jprune.layer_masks, min_keep=9),
    "uniform": jprune.selection.uniform_masks,
    "ERK": jprune.selection.erk_masks,
    "2:4": jprune.nm_masks,
    "blocks": BLOCKS,
    "channels": jprune.selection.channel_masks,
    "outputs": jprune.selection.output_masks,
}


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS)
def test_check_pruned_compares_with_exactly_what_a_given_selection_keeps(selection):
    params = {name: {"kernel": jnp.asarray(RNG.normal(size=shape), jnp.float32)} for name, shape in SHAPES.items()}
    params["b"]["bias"] = jnp.zeros(20)
    masks = selection(jprune.magnitude()(params), sparsity=0.5)
    state = jprune.with_masks(LINK.init(params), masks)
    check = functools.partial(jprune.check_pruned, sparsity=0.5, selection=selection)
    check(jprune.apply_masks(params, masks), state)
    kept = sum(int(mask.sum()) for mask in jax.tree.leaves(masks))
    mask = np.array(masks["a"]["kernel"])
    for more, error in (
        (True, pytest.raises(ValueError, match=f"{kept + 1} of .* more than the {kept} requested")),
        (False, pytest.warns(UserWarning, match=f"{kept - 1} of .* fewer than the {kept} requested")),
    ):
        other = mask.copy()
        other[tuple(np.argwhere(mask != more)[0])] = more
        changed = masks | {"a": {"kernel": jnp.asarray(other)}}
        with error:
            check(jprune.apply_masks(params, changed), jprune.with_masks(state, changed))


def test_check_pruned_knows_rounded_blocks_only_with_their_selection():
    """Half of 7 blocks of 16 weights is 4 blocks; half of the weights is 56."""
    params, state = kept_by(a=first((4, 28), of_outputs=4) & (np.arange(28) < 16)[None, :])
    jprune.check_pruned(params, state, sparsity=0.5, selection=BLOCKS)
    with pytest.raises(ValueError, match=r"64 of 112 .* more than the 56 requested; .* pass selection= if"):
        jprune.check_pruned(params, state, sparsity=0.5)


def test_check_pruned_refuses_a_selection_without_an_amount():
    # Without an amount nothing would be compared with what the selection keeps.
    params, state = kept_by(a=first((2, 2), of_all=2))
    with pytest.raises(TypeError, match=r"selection= says how an amount was rounded.*pass sparsity= or keep= too"):
        jprune.check_pruned(params, state, selection=jprune.layer_masks)
