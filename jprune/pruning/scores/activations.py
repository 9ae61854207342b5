"""Wanda: a weight times the norm of what it multiplies, found in the forward pass of any model."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend import core

from jprune import jaxprs
from jprune.pruning.scores.elementwise import Score, working_dtype
from jprune.trees import Where, flatten

PyTree = Any
_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint"}
)
_VIEWS = frozenset({"transpose", "reshape", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p"})
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})


class View(NamedTuple):
    """A value of the program that is a weight, transposed or reshaped: how to get it from the weight."""

    path: str
    shape: tuple[int, ...]
    of: Callable[[Any], Any]


Visit = Callable[[Any, Any, View, int], None]


def wanda(
    apply: Callable[[PyTree, Any], Any] | None = None,
    *,
    activations: Callable[[PyTree, Any], Mapping[str, Any]] | None = None,
    where: Where | None = None,
) -> Score:
    """|w| ||x||_2, where x is what w multiplies: the norm is over the examples (and positions) of the batch.

    Needs ``batch``. The paper compares the weights into one output with each other, which is what
    ``output_masks`` does with these scores.

    Args:
      apply: ``apply(params, batch)`` is the forward pass. The matrix products and convolutions that read a
        weight are found in it, whatever library wrote them; the weight may be transposed or reshaped first,
        and where it is used several times the squares add up. What happens inside ``scan``, ``while`` or
        ``cond`` is not seen.
      activations: in place of ``apply``: ``activations(params, batch)`` gives, by the path of each weight or of
        what holds it, the inputs (..., in) of its layer, for kernels (..., in, out).
      where: see ``Score``.

    Raises:
      ValueError: not one of ``apply`` and ``activations`` is given; while scoring, a weight is in no product.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    arXiv 2306.11695, equation 1.

    >>> score = wanda(lambda w, x: x @ w)
    >>> score(jnp.array([[1.0, -2.0], [1.0, 1.0]]), batch=jnp.array([[3.0, 1.0], [4.0, 0.0]]))
    Array([[ 5., 10.],
           [ 1.,  1.]], dtype=float32)
    """
    norms: Callable[[list[str], list[Any], PyTree, Any], list[Any]]
    if apply is not None and activations is None:
        norms = functools.partial(_seen, apply)
    elif activations is not None and apply is None:
        norms = functools.partial(_given, activations)
    else:
        raise ValueError("wanda needs apply or activations, and not both")

    def function(params: PyTree, grad: PyTree, batch: Any, key: Any, whole: PyTree) -> PyTree:
        paths, leaves, treedef = flatten(params)
        slots = [i for i, leaf in enumerate(leaves) if leaf is not None]
        weights = [leaves[i] for i in slots]
        sizes = norms([paths[i] for i in slots], weights, whole, batch)
        for slot, weight, norm in zip(slots, weights, sizes, strict=True):
            leaves[slot] = jnp.abs(weight.astype(working_dtype(weight))) * norm
        return jax.tree.unflatten(treedef, leaves)

    return Score(function, "wanda", ("batch", "whole"), where)


def _given(
    activations: Callable[[PyTree, Any], Mapping[str, Any]],
    paths: list[str],
    weights: list[Any],
    whole: PyTree,
    batch: Any,
) -> list[Any]:
    """The norm of the handed input of each weight, to be broadcast with it."""
    inputs, norms = activations(whole, batch), []
    for path, weight in zip(paths, weights, strict=True):
        x = inputs.get(path, inputs.get(path.rpartition("/")[0]))
        if x is None or x.shape[-1] != weight.shape[-2]:
            got = "nothing" if x is None else f"shape {x.shape}"
            raise ValueError(f"activations gave {got} for '{path}'; it has shape {weight.shape}: (..., in, out)")
        x = jnp.square(x.astype(working_dtype(x)))
        norm = jnp.sqrt(jnp.sum(x, axis=tuple(range(x.ndim - 1))))
        norms.append(jnp.broadcast_to(norm.reshape((1,) * (weight.ndim - 2) + (-1, 1)), weight.shape))
    return norms


def visit_products(apply: Callable[[PyTree, Any], Any], params: PyTree, batch: Any, visit: Visit) -> None:
    """Run a forward pass and call ``visit`` at every matrix product and convolution that reads a weight.

    Args:
      apply: ``apply(params, batch)``, the forward pass.
      params: tree of arrays.
      batch: what ``apply`` reads.
      visit: called with the equation, the value of the other operand, the weight's ``View`` and the side (0 or 1)
        that the weight is on.
    """
    paths, leaves, treedef = flatten(params)
    slots = [i for i, leaf in enumerate(leaves) if hasattr(leaf, "dtype")]

    def run(arrays: list[Any]) -> Any:
        full = list(leaves)
        for slot, array in zip(slots, arrays, strict=True):
            full[slot] = array
        return apply(jax.tree.unflatten(treedef, full), batch)

    arrays = [leaves[i] for i in slots]
    closed = jax.make_jaxpr(run)(arrays)
    views: list[View | None] = [View(paths[i], leaves[i].shape, lambda w: w) for i in slots]
    _run(closed, arrays, views, visit)


def _seen(
    apply: Callable[[PyTree, Any], Any], paths: list[str], weights: list[Any], whole: PyTree, batch: Any
) -> list[Any]:
    """For each weight the norm of what it multiplies in the forward pass; of its shape."""
    squares: dict[str, Any] = {}
    visit_products(apply, whole, batch, functools.partial(_add, squares))
    for path in paths:
        if path not in squares:
            raise ValueError(f"wanda sees no matrix product or convolution that reads '{path}'")
    return [jnp.sqrt(squares[path]) for path in paths]


def _run(
    program: Any, values: list[Any], views: list[View | None], visit: Visit
) -> tuple[list[Any], list[View | None]]:
    """Evaluate a program, calling ``visit`` at every product that reads a weight."""
    jaxpr = jaxprs.opened(program)
    value = jaxprs.known(program, values)
    view = dict(zip(jaxpr.invars, views, strict=True))

    def read(atom: Any) -> tuple[Any, View | None]:
        return (atom.val, None) if isinstance(atom, core.Literal) else (value[atom], view.get(atom))

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        inputs, seen = [x for x, _ in given], [v for _, v in given]
        inner = _inner(equation)
        results: list[Any]
        through: list[View | None]
        if inner is not None:
            results, through = _run(inner, inputs, seen, visit)
        else:
            if equation.primitive.name in _PRODUCTS:
                for side, own in enumerate(seen):
                    if own is not None and seen[1 - side] is None:
                        visit(equation, inputs[1 - side], own, side)
            results = jaxprs.bound(equation, inputs)
            source = seen[0] if equation.primitive.name in _VIEWS else None
            through = [None if source is None else _viewed(equation, source)] * len(results)
        value.update(zip(equation.outvars, results, strict=True))
        view.update(zip(equation.outvars, through, strict=True))
    pairs = [read(atom) for atom in jaxpr.outvars]
    return [x for x, _ in pairs], [v for _, v in pairs]


def _inner(equation: Any) -> Any:
    """The program that a call holds; None for any other equation."""
    if equation.primitive.name not in _CALLS:
        return None
    return next((p for p in jaxprs.held(equation) if len(jaxprs.opened(p).invars) == len(equation.invars)), None)


def _viewed(equation: Any, source: View) -> View:
    # Only the arrangement matters, so a change of dtype is left out.
    if equation.primitive.name == "convert_element_type":
        return source
    return View(source.path, source.shape, lambda w: equation.primitive.bind(source.of(w), **equation.params))


def _add(found: dict[str, Any], equation: Any, other: Any, own: View, side: int) -> None:
    """Add the squares at one product of a weight (on one side) and something else.

    The product is linear in the weight. With the other operand squared, the derivative of the sum of its
    results by a weight is therefore the sum of the squares of what that weight multiplies.
    """
    squared = jnp.square(other.astype(working_dtype(other)))
    params = equation.params | {"preferred_element_type": squared.dtype}

    def total(weight: Any) -> Any:
        operands = [own.of(weight), squared] if side == 0 else [squared, own.of(weight)]
        return jnp.sum(equation.primitive.bind(*operands, **params))

    squares = jax.grad(total)(jnp.zeros(own.shape, squared.dtype))
    found[own.path] = found[own.path] + squares if own.path in found else squares
