"""Wanda scores: the magnitude of a weight times the norm of its input, found in the forward pass of any model."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jprune import jaxprs
from jprune.graph.axes import Axes, KernelAxes, kernel_axes, unknown_axes, where_of
from jprune.pruning.scores.elementwise import Score, working_dtype
from jprune.trees import Subset, Where, flatten, is_array

_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "remat2", "checkpoint"}
)
_VIEWS = frozenset({"transpose", "reshape", "squeeze", "expand_dims", "convert_element_type", "copy", "copy_p"})
_PRODUCTS = frozenset({"dot_general", "conv_general_dilated"})
_NOT_FOUND = frozenset({"while", "cond", "ragged_dot", "ragged_dot_general"})  # products that are left out


class View(NamedTuple):
    """A value of the program that is a weight, possibly transposed or reshaped.

    Attributes:
      path: path of the leaf.
      shape: shape of the weight; in the body of a scan, of the slice that one step reads.
      of: function from the weight to the value.
      slot: in the body of a scan, the index of the operand of the scan; else None.
      arranged: whether it is transposed or reshaped.
      changed: whether it is scaled or otherwise changed, so that ``of`` is not the function.
    """

    path: str
    shape: tuple[int, ...]
    of: Callable[[Array], Array]
    slot: int | None = None
    arranged: bool = False
    changed: bool = False


class Visitor(NamedTuple):
    """Functions that compute the sum over the products that read a weight.

    Attributes:
      visit: called with the equation, the value of the other operand, the weight's ``View`` and the position (0 or 1)
        of the weight among the operands; returns an array to add, or None.
      join: called with the view of an operand of a scan and the result of its body: summed over the steps if each step
        reads the whole weight, stacked along a first axis if it reads a slice. Returns the array to add.
    """

    visit: Callable[[core.JaxprEqn, jaxprs.Value, View, int], PyTree]
    join: Callable[[View, PyTree], PyTree]


_Sums: TypeAlias = dict[tuple[str, int | None], PyTree]


class _Found(NamedTuple):
    """Sums by path and slot, and the paths of weights that other products read; both are added to."""

    sums: _Sums
    others: set[str]


class Products(NamedTuple):
    """What ``collect_products`` found, by the path of a weight.

    Attributes:
      sums: the sum over the products that read the weight itself.
      others: the weights that other products read too: scaled or otherwise changed, by ragged_dot, or inside ``while``
        and ``cond``.
    """

    sums: dict[str, PyTree]
    others: frozenset[str]


def wanda(
    apply: Callable[[PyTree, PyTree], PyTree] | None = None,
    *,
    activations: Callable[[PyTree, PyTree], Mapping[str, Array | np.ndarray]] | None = None,
    where: Where | None = None,
    axes: Axes = None,
) -> Score:
    """Score weights by |w| ||x||_2 (Wanda), where x is the input that w multiplies.

    The norm is over examples and all positions of the batch, including padding. Needs ``batch``. The paper compares the
    weights of each output with each other; ``output_masks`` does the same with these scores.

    Args:
      apply: ``apply(params, batch)``, the forward pass. The matrix products and convolutions that read a weight are
        found in it for any library, including those inside ``remat`` and ``scan``, where every layer of a stack has its
        own norms. The weight may be transposed or reshaped first; if it is used several times, the squares are added.
        Products inside ``while`` and ``cond``, of ``ragged_dot``, and of a weight that is changed first are not found.
      activations: used instead of ``apply``: ``activations(params, batch)`` returns the inputs of each layer by the
        path of the weight or of its module: (..., in) for kernels (in, out), (layers, ..., in) for stacked kernels
        (layers, in, out); in general (*stacked, ..., *inputs) in the order of the kernel's axes.
      where: see ``Score``.
      axes: roles of the axes of the kernels (see ``prune``), for ``activations`` of kernels with more than two axes,
        and for experts: a warning (outside jit) names experts that no example of the batch reached; they get the root
        mean square of the norms of the others instead of 0.

    Raises:
      ValueError: not exactly one of ``apply`` and ``activations`` is given; while scoring, no product reads a weight
        itself, or others read it too that are not found, or the given inputs do not fit it.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
    arXiv 2306.11695, equation 1.

    >>> score = wanda(lambda w, x: x @ w)
    >>> score(jnp.array([[1.0, -2.0], [1.0, 1.0]]), batch=jnp.array([[3.0, 1.0], [4.0, 0.0]]))
    Array([[ 5., 10.],
           [ 1.,  1.]], dtype=float32)
    """
    if (apply is None) == (activations is None):
        raise ValueError("wanda needs either apply or activations; pass exactly one of them")

    def function(params: PyTree, grad: PyTree, batch: PyTree, key: PRNGKeyArray | None, whole: PyTree) -> PyTree:
        paths, leaves, treedef = flatten(params)
        slots = [i for i, leaf in enumerate(leaves) if leaf is not None]
        weights = {paths[i]: leaves[i] for i in slots}
        roles = kernel_axes(axes, params)
        if apply is not None:
            squares, stacked = _squares_in_forward_pass(apply, weights, whole, batch)
        else:
            assert activations is not None
            squares, stacked = _squares_of(activations(whole, batch), weights, roles, axes), {}
        for slot, square in zip(slots, squares, strict=True):
            path, weight = paths[slot], leaves[slot]
            norm = jnp.sqrt(_of_unreached(square, path, roles[path], stacked.get(path, ())))
            dtype = working_dtype(weight, norm)
            leaves[slot] = jnp.abs(weight.astype(dtype)) * norm.astype(dtype)
        return jax.tree.unflatten(treedef, leaves)

    return Score(function, "wanda", ("batch", "whole"), where if axes is None else where_of(where, axes))


def collect_products(
    apply: Callable[[PyTree, PyTree], PyTree], params: PyTree, batch: PyTree, visitor: Visitor
) -> Products:
    """Run a forward pass and sum the arrays that ``visitor.visit`` returns at every product that reads a weight.

    Products inside ``while`` and ``cond``, and those of ragged_dot, are left out.

    Args:
      apply: ``apply(params, batch)``, the forward pass.
      params: tree of arrays.
      batch: second argument of ``apply``.
      visitor: computes the arrays to sum.
    """
    closed, arrays, views = _program(apply, params, batch)
    found = _Found({}, set())
    _run(closed, arrays, views, visitor, found)
    return Products({path: value for (path, _), value in found.sums.items()}, frozenset(found.others))


def refuse_unread(paths: Iterable[str], products: Products, remedy: str) -> None:
    """Raise a ``ValueError`` for the first weight that no product reads, or that products read that are not found.

    Args:
      paths: paths of the weights.
      products: result of ``collect_products``.
      remedy: what to do, the end of the message.
    """
    for path in paths:
        if path in products.sums and path not in products.others:
            continue
        which = "not every" if path in products.sums else "no"
        raise ValueError(
            f"{which} matrix product or convolution reads '{path}' itself; ragged_dot and those that read a kernel "
            "that is scaled, flipped, sliced or concatenated first (WeightNorm, SpectralNorm, "
            f"ConvTranspose(transpose_kernel=True)), or are inside while and cond, are not found; {remedy}"
        )


def _program(
    apply: Callable[[PyTree, PyTree], PyTree], params: PyTree, batch: PyTree
) -> tuple[jaxprs.Program, list[Array | np.ndarray], list[View | None]]:
    """Return the forward pass as a function of the arrays of ``params``, these arrays, and their views."""
    subset = Subset.of(params, is_array)
    program = jax.make_jaxpr(lambda arrays: apply(subset.whole(arrays), batch))(subset.leaves)
    views: list[View | None] = [
        View(path, leaf.shape, lambda w: w) for path, leaf in zip(subset.paths, subset.leaves, strict=True)
    ]
    return program, subset.leaves, views


def _squares_in_forward_pass(
    apply: Callable[[PyTree, PyTree], PyTree], weights: Mapping[str, Array | np.ndarray], whole: PyTree, batch: PyTree
) -> tuple[list[Array], dict[str, tuple[int, ...]]]:
    """Return the sum of squares of the inputs of each weight in the forward pass, and its stacked axes by path.

    Stacked are the axes along which a scan or the batch dimensions of a product take one matrix after the other, if the
    weight is neither transposed nor reshaped before.
    """
    stacked: dict[str, tuple[int, ...]] = {}

    def visit(equation: core.JaxprEqn, other: jaxprs.Value, view: View, side: int) -> Array:
        batched = equation.params["dimension_numbers"][1][side] if equation.primitive.name == "dot_general" else ()
        scanned = weights[view.path].ndim - len(view.shape) if view.path in weights else 0
        places = (*range(scanned), *(scanned + axis for axis in batched))
        stacked[view.path] = () if view.arranged else tuple(sorted(places))
        return _squares(equation, other, view, side)

    def join(view: View, squares: Array) -> Array:
        if view.arranged:
            stacked[view.path] = ()
        return _pulled_back(view, squares)

    products = collect_products(apply, whole, batch, Visitor(visit, join))
    refuse_unread(weights, products, "leave it out with where=, or pass its inputs as activations=")
    return [products.sums[path] for path in weights], stacked


def _squares_of(
    inputs: Mapping[str, Array | np.ndarray],
    weights: Mapping[str, Array | np.ndarray],
    roles: Mapping[str, KernelAxes | None],
    axes: Axes,
) -> list[Array]:
    """Return the sum of squares of the given inputs of each weight, to be broadcast with it."""
    squares = []
    for path, weight in weights.items():
        x = inputs.get(path, inputs.get(path.rpartition("/")[0]))
        kernel = roles[path]
        if kernel is None:
            kernel = _stacked_like(x, path, weight.shape, axes)
        lead = tuple(weight.shape[axis] for axis in kernel.stacked)
        ends = tuple(weight.shape[axis] for axis in kernel.inputs)
        if x is None or x.shape[: len(lead)] != lead or x.shape[x.ndim - len(ends) :] != ends:
            got = "nothing" if x is None else f"shape {x.shape}"
            wanted = ", ".join(map(str, (*lead, "...", *ends)))
            raise ValueError(
                f"activations gave {got} for '{path}'; it has shape {weight.shape}, so its inputs must have shape "
                f"({wanted})"
            )
        between = tuple(range(len(lead), x.ndim - len(ends)))
        total = jnp.sum(jnp.square(x.astype(working_dtype(x))), axis=between)
        order = (*kernel.stacked, *kernel.inputs)
        others = tuple(axis for axis in range(weight.ndim) if axis not in order)
        squares.append(jnp.expand_dims(total.transpose(np.argsort(order)), others))
    return squares


def _stacked_like(x: Array | np.ndarray | None, path: str, shape: tuple[int, ...], axes: Axes) -> KernelAxes:
    """Return the axes of stacked kernels (layers, in, out) if the given inputs are (layers, ..., in)."""
    if x is None or len(shape) != 3 or x.ndim < 3 or (x.shape[0], x.shape[-1]) != shape[:2]:
        raise ValueError(unknown_axes(path, shape, "activations are matched to its inputs", axes))
    why = "wanda treats it as stacked layers, because its activations are stacked"
    warnings.warn(unknown_axes(path, shape, why, axes), stacklevel=2)
    return KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))


def _of_unreached(
    squares: Float[Array, "..."], path: str, axes: KernelAxes | None, found: tuple[int, ...]
) -> Float[Array, "..."]:
    """Replace the sums of squares of stacked layers that no example reached by the mean of the others.

    Without ``axes`` this only warns, about the stacked axes found in the program.
    """
    stacked = found if axes is None else axes.stacked
    if not stacked:
        return squares
    rest = tuple(axis for axis in range(squares.ndim) if axis not in stacked)
    reached = jnp.any(squares > 0, axis=rest, keepdims=True)
    if not isinstance(reached, jax.core.Tracer):
        flags = np.asarray(reached).reshape([squares.shape[axis] for axis in stacked])
        if flags.any() and not flags.all():
            missing = ", ".join(f"'{path}{''.join(f'[{i}]' for i in index)}'" for index in np.argwhere(~flags))
            remedy = "they get the mean norm of the others" if axes is not None else "their scores are 0"
            more = "" if axes is not None else ", and axes= if these are experts"
            warnings.warn(
                f"no example of the batch reached {missing}; {remedy}; pass more examples{more}", stacklevel=2
            )
    if axes is None:
        return squares
    number = jnp.maximum(jnp.sum(reached, axis=stacked, keepdims=True), 1).astype(squares.dtype)
    return jnp.where(reached, squares, jnp.sum(squares, axis=stacked, keepdims=True) / number)


def _run(
    program: jaxprs.Program,
    values: list[jaxprs.Value],
    views: list[View | None],
    visitor: Visitor,
    found: _Found,
) -> tuple[list[jaxprs.Value], list[View | None]]:
    """Evaluate a program and sum in ``found`` the arrays that the visitor returns at products that read a weight."""
    jaxpr = jaxprs.opened(program)
    value = jaxprs.known(program, values)
    view = dict(zip(jaxpr.invars, views, strict=True))

    def read(atom: core.Var | core.Literal) -> tuple[jaxprs.Value, View | None]:
        return (atom.val, None) if isinstance(atom, core.Literal) else (value[atom], view.get(atom))

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        inputs, seen = [x for x, _ in given], [v for _, v in given]
        inner = _inner(equation)
        results: list[jaxprs.Value]
        through: list[View | None]
        if inner is not None:
            results, through = _run(inner, inputs, seen, visitor, found)
        elif equation.primitive.name == "scan" and any(seen):
            results = _scan(equation, inputs, seen, visitor, found)
            through = [None] * len(results)
        else:
            if equation.primitive.name in _PRODUCTS:
                for side, weight in enumerate(seen):
                    other = seen[1 - side]
                    if weight is None or not (other is None or other.changed):
                        continue
                    if weight.changed:
                        found.others.add(weight.path)
                    else:
                        _add(found, weight, visitor.visit(equation, inputs[1 - side], weight, side))
            elif equation.primitive.name in _NOT_FOUND:
                found.others.update(weight.path for weight in seen if weight is not None)
            results = jaxprs.bound(equation, inputs)
            through = [_view_of_result(equation, seen)] * len(results)
        value.update(zip(equation.outvars, results, strict=True))
        view.update(zip(equation.outvars, through, strict=True))
    pairs = [read(atom) for atom in jaxpr.outvars]
    return [x for x, _ in pairs], [v for _, v in pairs]


def _scan(
    equation: core.JaxprEqn,
    inputs: list[jaxprs.Value],
    views: list[View | None],
    visitor: Visitor,
    found: _Found,
) -> list[jaxprs.Value]:
    """Run a scan whose body reads weights: stacked ones step by step, or the same ones at every step."""
    body, (fixed, carried) = equation.params["jaxpr"], jaxprs.scan_parts(equation)
    same, start, stacks = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
    inner: list[View | None] = [None] * len(inputs)
    for i, weight in enumerate(views):
        if weight is not None and not fixed <= i < fixed + carried:  # a carried weight may change
            inner[i] = View(weight.path, inputs[i].shape[i >= fixed :], lambda w: w, i, changed=weight.changed)

    def step(carry: tuple[list[Array], _Sums], slices: list[Array]) -> tuple[tuple[list[Array], _Sums], PyTree]:
        values, total = carry
        here: _Sums = {}
        results, _ = _run(body, [*same, *values, *slices], inner, visitor, _Found(here, found.others))
        repeated = {key: here[key] for key in here if _slot(key) < fixed}
        total = {key: total[key] + square for key, square in repeated.items()} if total else repeated
        each = {key: square for key, square in here.items() if key not in repeated}
        return (results[:carried], total), (results[carried:], each)

    first = [stack[0] for stack in stacks]
    (_, shapes), _ = jax.eval_shape(step, (start, {}), first)
    zeros = {key: jnp.zeros(shape.shape, shape.dtype) for key, shape in shapes.items()}
    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    (end, total), (stacked, each) = lax.scan(step, (start, zeros), stacks, **options)
    for key, square in {**total, **each}.items():
        weight = views[_slot(key)]
        assert weight is not None
        _add(found, weight, visitor.join(weight, square))
    return [*end, *stacked]


def _pulled_back(view: View, squares: Array) -> Array:
    """Rearrange the result for a view of a weight to the axes of the weight."""
    _, back = jax.vjp(view.of, jnp.zeros(view.shape, squares.dtype))
    weight: Array = back(squares)[0]
    return weight


def _slot(key: tuple[str, int | None]) -> int:
    assert key[1] is not None
    return key[1]


def _add(found: _Found, view: View, value: PyTree) -> None:
    if value is not None:
        key = view.path, view.slot
        found.sums[key] = found.sums[key] + value if key in found.sums else value


def _inner(equation: core.JaxprEqn) -> jaxprs.Program | None:
    """Return the program of a call; None for any other equation."""
    if equation.primitive.name not in _CALLS:
        return None
    return next((p for p in jaxprs.subjaxprs(equation) if len(jaxprs.opened(p).invars) == len(equation.invars)), None)


def _view_of_result(equation: core.JaxprEqn, seen: list[View | None]) -> View | None:
    """Return what the result of an equation is of the weights among its operands; None if it is no weight."""
    name, source = equation.primitive.name, seen[0] if seen else None
    if name in _VIEWS:
        return None if source is None else _viewed(equation, source)
    if not any(seen) or name in _PRODUCTS | _NOT_FOUND or name == "gather" or len(equation.outvars) != 1:
        return None
    shapes = [jaxprs.shape_of(atom) for atom in (*equation.outvars, *equation.invars)]
    alike = (view for view, shape in zip(seen, shapes[1:], strict=True) if view is not None and shape == shapes[0])
    source = next(alike, None)
    return None if source is None else source._replace(changed=True)


def _viewed(equation: core.JaxprEqn, source: View) -> View:
    # Only the arrangement matters, so changes of dtype are skipped.
    if equation.primitive.name == "convert_element_type":
        return source
    return source._replace(of=lambda w: equation.primitive.bind(source.of(w), **equation.params), arranged=True)  # type: ignore[no-untyped-call]


def _squares(equation: core.JaxprEqn, other: jaxprs.Value, view: View, side: int) -> Array:
    """Return the sum of squares of the inputs of each weight in one product, with the weight's shape.

    The product is linear in the weight. With the other operand squared, the derivative of the sum of its results with
    respect to a weight is therefore the sum of the squares of that weight's inputs.
    """
    squared = jnp.square(other.astype(working_dtype(other)))
    exact = {"precision": (lax.Precision.HIGHEST, lax.Precision.HIGHEST), "preferred_element_type": squared.dtype}
    params = equation.params | exact

    def total(weight: Array) -> Array:
        operands = [view.of(weight), squared] if side == 0 else [squared, view.of(weight)]
        return jnp.sum(equation.primitive.bind(*operands, **params))  # type: ignore[no-untyped-call]

    squares: Array = jax.grad(total)(jnp.zeros(view.shape, squared.dtype))
    return squares
