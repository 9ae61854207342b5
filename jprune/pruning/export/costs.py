"""Table of parameters, nonzeros and multiply-adds of a pruned model, layer by layer.

Multiply-adds are counted in the jaxpr of the forward pass, so this works for any model that can be traced: dense layers
and convolutions, grouped or not, in a scan or not. The effective multiply-adds are those with nonzero weights; they do
not predict the time that a given runtime saves.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.extend import core
from jaxtyping import Array, PyTree

from jprune import jaxprs
from jprune._extras import missing
from jprune.graph.axes import Axes, kernel_axes
from jprune.graph.graph import Graph
from jprune.pruning.selection import kth_largest, uint64
from jprune.pruning.selection.layers import nothing_left
from jprune.trees import flatten, is_float, kernels, match

if TYPE_CHECKING:
    import pandas as pd

_INPUT = -1
Sources = frozenset[int]  # the leaves of params that a value depends on; _INPUT for other inputs
_NOTHING: Sources = frozenset()


def cost_table(
    params: PyTree,
    masks: PyTree | None = None,
    *,
    apply: Callable[..., PyTree] | None = None,
    inputs: Sequence[PyTree] = (),
    axes: Axes = None,
) -> "pd.DataFrame":
    """Count parameters, nonzeros and multiply-adds of every layer and of the whole model.

    Matrix products and convolutions use all weights of a leaf equally often, so the effective multiply-adds are the
    dense ones times the fraction of nonzero weights. Padding counts as input, as is usual; biases and normalization are
    not counted.

    Args:
      params: float arrays; other leaves are not parameters and are left out.
      masks: bool arrays like ``params``, None where a leaf is dense; without masks the nonzeros of the weights are
        counted.
      apply: the forward pass, called as ``apply(params, *inputs)``; it is traced, not run. Without it the table has no
        multiply-adds, unless ``axes`` is a graph, which has them for the inputs with which it was traced.
      inputs: arrays or ``jax.ShapeDtypeStruct``; a batch of 1 gives multiply-adds per example.
      axes: roles of the axes of each leaf (see ``prune``); a leaf that stacks several layers has a row for each layer,
        such as 'blocks/kernel[2]'.

    Returns:
      A pandas frame, one row per layer and a last row ``total``, with the columns ``shape``,
      ``parameters``, ``nonzeros``, ``compression`` (parameters / nonzeros), ``multiply_adds`` and
      ``effective_multiply_adds``.

    Raises:
      ImportError: the extra ``recall`` is not installed (pandas).
      ValueError: no leaf has a real floating dtype, a mask fits no leaf, or a weight is used inside a ``while``
        loop, whose number of iterations is unknown.

    A warning names layers that keep no weight.

    >>> params = {"a": jax.numpy.ones((4, 3)), "b": jax.numpy.ones((3, 2))}
    >>> masks = {"a": jax.numpy.eye(4, 3, dtype=bool), "b": None}
    >>> table = cost_table(params, masks, apply=lambda p, x: x @ p["a"] @ p["b"], inputs=[jax.numpy.ones((1, 4))])
    >>> table[["parameters", "nonzeros", "multiply_adds", "effective_multiply_adds"]].to_dict("split")["data"]
    [[12, 3, 12, 3], [6, 6, 6, 6], [18, 9, 18, 9]]
    """
    try:
        import pandas as pd  # noqa: PLC0415 - slow to import, and pruning itself does not need it
    except ImportError as error:
        raise ImportError(missing("cost_table needs the extra 'recall'", "recall")) from error

    paths, leaves, _ = flatten(params)
    kept = [None] * len(leaves) if masks is None else match(params, masks, reference_name="params", name="masks")
    used = multiply_adds(apply, params, *inputs) if apply is not None else _of_graph(axes)
    roles = kernel_axes(axes, params)
    shapes: dict[str, tuple[int, ...]] = {}
    rows: dict[str, dict[str, int]] = {}
    masked: list[str] = []  # the layers that may be pruned
    for path, leaf, mask in zip(paths, leaves, kept, strict=True):
        if not is_float(leaf):
            continue
        kernel = roles[path]
        stacked = () if kernel is None else kernel.stacked
        shape = tuple(size for axis, size in enumerate(leaf.shape) if axis not in stacked)
        size = math.prod(shape)
        for index in np.ndindex(*(leaf.shape[axis] for axis in stacked)):
            dense = masks is not None and mask is None
            nonzeros = size if dense else _nonzeros(leaf if mask is None else mask, stacked, index)
            row = {"parameters": size, "nonzeros": nonzeros}
            if used is not None:
                layer = used.get(path, 0) * size // max(1, leaf.size)
                row |= {"multiply_adds": layer, "effective_multiply_adds": layer * nonzeros // max(1, size)}
            name = path + "".join(f"[{i}]" for i in index)
            shapes[name], rows[name] = shape, row
            if mask is not None or (masks is None and kernels(path, leaf)):
                masked.append(name)
    if not rows:
        raise ValueError("params has no array of a real floating dtype; give the tree of the model's parameters")
    empty = [name for name in masked if rows[name]["parameters"] and not rows[name]["nonzeros"]]
    if empty:
        warnings.warn(nothing_left(empty), stacklevel=2)
    shapes["total"] = ()
    rows["total"] = {name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values()))}
    table = pd.DataFrame.from_dict({name: {"shape": shapes[name], **rows[name]} for name in rows}, orient="index")
    table.insert(3, "compression", table["parameters"] / table["nonzeros"].where(table["nonzeros"] > 0))
    return table


def _of_graph(axes: Axes) -> Mapping[str, int] | None:
    """Return the multiply-adds of a graph, by path; None if ``axes`` is not a graph."""
    if not isinstance(axes, Graph):
        return None
    if axes.in_while_loops:
        raise ValueError(
            f"'{axes.in_while_loops[0]}' is used inside a while loop, whose number of iterations is unknown; use "
            "lax.scan, or a graph of a program without it"
        )
    return axes.multiply_adds


def _nonzeros(array: Array | np.ndarray, stacked: Sequence[int], index: Sequence[int]) -> int:
    """Return the exact number of nonzeros of one layer; arrays of several processes are counted in place."""
    place: list[slice | int] = [slice(None)] * array.ndim
    for axis, i in zip(stacked, index, strict=True):
        place[axis] = i
    if getattr(array, "is_fully_addressable", True):
        return int(np.count_nonzero(np.asarray(array)[tuple(place)]))
    return uint64.number(kth_largest.count_true([array[tuple(place)] != 0]))


def multiply_adds(apply: Callable[..., PyTree], params: PyTree, *inputs: PyTree) -> dict[str, int]:
    """Count the multiply-adds that each leaf of ``params`` takes part in during ``apply(params, *inputs)``.

    Raises:
      ValueError: a weight is used inside a ``while`` loop.

    >>> multiply_adds(lambda p, x: x @ p["w"], {"w": jax.numpy.ones((3, 5))}, jax.numpy.ones((2, 3)))
    {'w': 30}
    """
    paths, _, _ = flatten(params)
    closed = jax.make_jaxpr(apply)(params, *inputs)
    arrays = [index for index, leaf in enumerate(flatten(params)[1]) if leaf is not None]
    rest = len(jaxprs.opened(closed).invars) - len(arrays)
    sources = [frozenset({index}) for index in arrays] + [frozenset({_INPUT})] * rest
    counts = [0] * len(paths)
    _walk(jaxprs.opened(closed), sources, counts, times=1)
    return dict(zip(paths, counts, strict=True))


def _walk(jaxpr: core.Jaxpr, sources: Sequence[Sources], counts: list[int], times: int) -> list[Sources]:
    """Follow the leaves through a jaxpr, adding to ``counts``; return which leaves each output depends on."""
    made_of = dict(zip(jaxpr.invars, sources, strict=True))

    def read(atom: core.Var | core.Literal) -> Sources:
        return _NOTHING if isinstance(atom, core.Literal) else made_of.get(atom, _NOTHING)

    for equation in jaxpr.eqns:
        given = [read(atom) for atom in equation.invars]
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            leaf = next((min(s) for s in given if len(s) == 1 and _INPUT not in s), None)
            if leaf is not None:
                counts[leaf] += times * _products(equation)
            results = [_NOTHING.union(*given)]
        else:
            results = _call(equation, given, counts, times)
        made_of.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _call(equation: core.JaxprEqn, given: list[Sources], counts: list[int], times: int) -> list[Sources]:
    """Step into the jaxprs of an equation; the outputs of one without jaxprs depend on all its inputs."""
    name, options = equation.primitive.name, equation.params
    if name == "scan":
        return _scan(equation, given, counts, times)
    if name == "while":
        inside = [0] * len(counts)
        body = jaxprs.opened(options["body_jaxpr"])
        results = _walk(body, given[options["cond_nconsts"] :], inside, times=1)
        if any(inside):
            raise ValueError(
                "a weight is used inside a while loop, whose number of iterations is unknown; use lax.scan"
            )
        return results
    if name == "cond":
        return _cond(options["branches"], given[1:], counts, times)
    for inner in map(jaxprs.opened, jaxprs.subjaxprs(equation)):
        if len(inner.invars) == len(given):
            return _walk(inner, given, counts, times)
    return [_NOTHING.union(*given)] * len(equation.outvars)


def _scan(equation: core.JaxprEqn, given: list[Sources], counts: list[int], times: int) -> list[Sources]:
    """Walk the body until the set of leaves that the carry depends on is stable, then count every iteration."""
    body, (fixed, carried) = jaxprs.opened(equation.params["jaxpr"]), jaxprs.scan_parts(equation)
    while True:
        results = _walk(body, given, [0] * len(counts), times=0)
        grown = [a | b for a, b in zip(given[fixed : fixed + carried], results[:carried], strict=True)]
        if grown == given[fixed : fixed + carried]:
            return _walk(body, given, counts, times * equation.params["length"])
        given = [*given[:fixed], *grown, *given[fixed + carried :]]


def _cond(branches: Sequence[jaxprs.Program], given: list[Sources], counts: list[int], times: int) -> list[Sources]:
    """Count the costliest branch."""
    tried = []
    for branch in branches:
        inside = [0] * len(counts)
        tried.append((inside, _walk(jaxprs.opened(branch), given, inside, times)))
    costliest = max((inside for inside, _ in tried), key=sum)
    counts[:] = [a + b for a, b in zip(counts, costliest, strict=True)]
    return [_NOTHING.union(*results) for results in zip(*(results for _, results in tried), strict=True)]


def _products(equation: core.JaxprEqn) -> int:
    """Return the multiply-adds of one matrix product or convolution, from its shapes."""
    left, right = map(jaxprs.shape_of, equation.invars)
    made = math.prod(jaxprs.shape_of(equation.outvars[0]))
    if equation.primitive.name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        return made * int(math.prod(left[axis] for axis in contracted))
    features = equation.params["dimension_numbers"].rhs_spec[0]
    return made * int(math.prod(size for axis, size in enumerate(right) if axis != features))
