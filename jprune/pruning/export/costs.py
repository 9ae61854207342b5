"""Table of parameters, nonzeros and multiply-adds of a pruned model, layer by layer.

Multiply-adds are those of ``jprune.trace_model``, so this works for any model that can be traced: dense layers and
convolutions, grouped or not, in a scan or not, and matrices of experts. The effective multiply-adds are those with
nonzero weights; they do not predict the time that a given runtime saves.
"""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Array, PyTree

from jprune._extras import missing
from jprune.graph.axes import Axes, kernel_axes
from jprune.graph.graph import Graph
from jprune.graph.trace import trace_model
from jprune.pruning.selection import kth_largest, uint64
from jprune.pruning.selection.layers import nothing_left
from jprune.trees import flatten, is_float, kernels, match, refuse_statistics

if TYPE_CHECKING:
    import pandas as pd


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
    dense ones times the fraction of nonzero weights. Padding counts as input; biases and normalization are not
    counted.

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
      ``effective_multiply_adds``. A product that reads several leaves counts as in ``print(graph)``: by size for leaves
      joined by ``concatenate``, else for the largest. ``total`` also has the multiply-adds of leaves without a row,
      such as integer kernels; ``frame.attrs["other_multiply_adds"]`` has those of products without an operand made of
      parameters alone, such as attention scores.

    Raises:
      ImportError: the extra ``recall`` is not installed (pandas).
      ValueError: no leaf has a real floating dtype, ``params`` has other arrays than parameters, such as batch
        statistics, a mask fits no leaf, or a weight is used inside a ``while`` loop, whose number of iterations is
        unknown.

    A warning names layers that keep no weight, and leaves whose multiply-adds are not found because a primitive that
    reads them is not supported.

    >>> import jax
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

    refuse_statistics(params)
    paths, leaves, _ = flatten(params)
    kept = [None] * len(leaves) if masks is None else match(params, masks, reference_name="params", name="masks")
    graph = axes if isinstance(axes, Graph) else None
    if apply is not None:
        graph = trace_model(apply, params, *inputs)
    used = None if graph is None else _counted(graph)
    roles = kernel_axes(axes, params)
    names: list[str] = []  # not the keys of a dict: a leaf may be called 'total'
    shapes: list[tuple[int, ...]] = []
    rows: list[dict[str, int]] = []
    without_row = 0  # multiply-adds with leaves that are not parameters, such as quantized kernels
    empty: list[str] = []
    for path, leaf, mask in zip(paths, leaves, kept, strict=True):
        if not is_float(leaf):
            without_row += 0 if used is None else used.get(path, 0)
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
            names.append(name)
            shapes.append(shape)
            rows.append(row)
            may_be_pruned = mask is not None or (masks is None and kernels(path, leaf))
            if may_be_pruned and size and not nonzeros:
                empty.append(name)
    if not rows:
        raise ValueError("params has no array of a real floating dtype; pass the tree of the model's parameters")
    if empty:
        warnings.warn(nothing_left(empty), stacklevel=2)
    more = {"multiply_adds": without_row, "effective_multiply_adds": without_row}
    total = {column: sum(row[column] for row in rows) + more.get(column, 0) for column in rows[0]}
    entries = [{"shape": shape, **row} for shape, row in zip([*shapes, ()], [*rows, total], strict=True)]
    table = pd.DataFrame(entries, index=[*names, "total"])
    if graph is not None:
        table.attrs["other_multiply_adds"] = graph.other_multiply_adds
    table.insert(3, "compression", table["parameters"] / table["nonzeros"].where(table["nonzeros"] > 0))
    return table


def _counted(graph: Graph) -> Mapping[str, int]:
    """Return the multiply-adds of a graph, by path."""
    if graph.in_while_loops:
        raise ValueError(
            f"'{graph.in_while_loops[0]}' is used inside a while loop, whose number of iterations is unknown; use "
            "lax.scan, or a graph of a program without it"
        )
    return graph.multiply_adds


def _nonzeros(array: Array | np.ndarray, stacked: Sequence[int], index: Sequence[int]) -> int:
    """Return the exact number of nonzeros of one layer; arrays of several processes are counted in place."""
    place: list[slice | int] = [slice(None)] * array.ndim
    for axis, i in zip(stacked, index, strict=True):
        place[axis] = i
    if getattr(array, "is_fully_addressable", True):
        return int(np.count_nonzero(np.asarray(array)[tuple(place)]))
    return uint64.number(kth_largest.count_true([array[tuple(place)] != 0]))


def multiply_adds(apply: Callable[..., PyTree], params: PyTree, *inputs: PyTree) -> dict[str, int]:
    """Count the multiply-adds of the products that read each leaf of ``params`` during ``apply(params, *inputs)``.

    A product that reads leaves joined by ``concatenate`` counts for each of them, by size; one that reads a combination
    of leaves, such as a kernel and its scales, counts for the largest.

    Raises:
      ValueError: a weight is used inside a ``while`` loop, or ``params`` has no array.

    >>> import jax
    >>> multiply_adds(lambda p, x: x @ p["w"], {"w": jax.numpy.ones((3, 5))}, jax.numpy.ones((2, 3)))
    {'w': 30}
    """
    return dict(_counted(trace_model(apply, params, *inputs)))
