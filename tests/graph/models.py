"""Shapes, and how models of the libraries are described to ``trace_model``."""

import jax
import jax.numpy as jnp

import jprune


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def tokens(*sizes):
    return shape(*sizes, dtype=jnp.int32)


def shapes(tree):
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def trace_nnx(create, *inputs):
    """Trace an NNX module without creating its arrays; every variable that is not a parameter is state."""
    from flax import nnx

    graphdef, params, state = nnx.split(nnx.eval_shape(lambda: create(nnx.Rngs(0))), nnx.Param, ...)

    def apply(params, state, *inputs):
        return nnx.merge(graphdef, params, state)(*inputs)

    return jprune.trace_model(apply, params, *inputs, state=state)


def trace_linen(module, *inputs):
    variables = jax.eval_shape(module.init, jax.random.key(0), *inputs)
    params, state = {"params": variables["params"]}, {k: v for k, v in variables.items() if k != "params"}
    return jprune.trace_model(lambda p, s, *x: module.apply({**p, **s}, *x), params, *inputs, state=state)


def trace_equinox(create, *inputs):
    """Trace an Equinox module over a batch."""
    import equinox as eqx

    model = eqx.filter_eval_shape(create, jax.random.key(0))
    return jprune.trace_model(lambda model, *x: jax.vmap(model)(*x), model, *inputs)


def roles(graph):
    """By path, a letter for every axis: s, i, o or w (spatial); several where a leaf is tied; None if unknown."""

    def letters(axes, rank):
        named = (("s", axes.stacked), ("i", axes.inputs), ("o", axes.outputs), ("w", axes.spatial))
        return " ".join("".join(letter for letter, places in named if axis in places) for axis in range(rank))

    return {path: None if axes is None else letters(axes, len(graph.shapes[path])) for path, axes in graph.axes.items()}


def groups(graph):
    """Each group of channels as (size, {(path, axis): indices a channel}), sorted."""
    found = [(g.size, {(m.path, m.axis): m.indices.shape[1] for m in (*g.members, *g.state)}) for g in graph.channels]
    return sorted(found, key=lambda group: sorted(group[1]))
