"""A few training steps on a made-up loss, and the expected masks computed with numpy."""

import contextlib
import operator
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax._src import compiler


def slope(params):
    """A gradient that changes every weight, in the dtype of the weight; None for leaves that are not floats."""
    return jax.tree.map(lambda w: jnp.sin(w * 3 + 1).astype(w.dtype), params)


def make_step(tx, jit=True):
    """One update with the gradient passed on, jitted or not."""

    def step(params, state):
        grad = slope(params)
        updates, state = tx.update(grad, state, params, grad=grad)
        return optax.apply_updates(params, updates), state

    return jax.jit(step) if jit else step


def largest(scores, keep, among=None):
    """The masks of the ``keep`` largest scores by a stable sort: lists of numpy arrays in and out."""
    flat = np.concatenate([np.asarray(s, np.float64).ravel() for s in scores])
    if among is not None:
        flat = np.where(np.concatenate([np.asarray(m).ravel() for m in among]), flat, -np.inf)
    order = np.argsort(-flat, kind="stable")
    mask = np.zeros(flat.size, bool)
    mask[order[:keep]] = True
    bounds = np.cumsum([np.size(s) for s in scores])[:-1]
    return [part.reshape(np.shape(s)) for part, s in zip(np.split(mask, bounds), scores, strict=True)]


@contextlib.contextmanager
def compilations():
    """Return a list that gets an entry for every program that is compiled."""
    found, compile_or_get_cached = [], compiler.compile_or_get_cached
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            compiler, "compile_or_get_cached", lambda *a, **k: found.append(a) or compile_or_get_cached(*a, **k)
        )
        yield found


def exact_count(size, sparsity):
    """The number kept of ``size`` weights, in exact arithmetic with the decimal number as it is printed."""
    return round(size * (1 - Fraction(str(sparsity))))


def by_rank(scores, *, sparsity=None, keep=None, among=None, min_keep=0):
    """A global selection for a few weights that compiles quickly: each score counts the larger ones."""
    leaves, treedef = jax.tree.flatten(scores)
    flat = jnp.concatenate([leaf.astype(jnp.float32).ravel() for leaf in leaves])
    if among is not None:
        flat = jnp.where(jnp.concatenate([leaf.ravel() for leaf in jax.tree.leaves(among)]), flat, -jnp.inf)
    n = flat.size
    keep = round(n * (1.0 - sparsity)) if keep is None else operator.index(keep)
    assert min_keep == 0
    one, other = jnp.expand_dims(flat, 1), jnp.expand_dims(flat, 0)
    first = np.arange(n)[None, :] < np.arange(n)[:, None]
    mask = (jnp.sum((other > one) | ((other == one) & first), axis=1) < keep) & (flat > -jnp.inf)
    parts = jnp.split(mask, np.cumsum([leaf.size for leaf in leaves])[:-1])
    return treedef.unflatten([part.reshape(leaf.shape) for part, leaf in zip(parts, leaves, strict=True)])
