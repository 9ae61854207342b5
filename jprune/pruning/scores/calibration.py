"""SparseGPT: prune a layer and adjust the remaining weights so that its outputs on calibration data change little.

It takes two steps: ``input_grams`` runs the model on calibration batches and sums X^T X for every kernel, where X are
the inputs of its layer; ``sparsegpt`` then prunes kernel by kernel:

>>> params = {"kernel": jnp.array([[1.0], [0.5], [1.0]])}
>>> apply = lambda params, x: x @ params["kernel"]
>>> x = jnp.array([[1.0, 1.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 3.0]])  # the first two inputs are equal
>>> pruned = sparsegpt(params, input_grams(apply, params, [x]), sparsity=1 / 3, damping=0.0001)
>>> pruned.params["kernel"].round(2)[:, 0]  # the second input carries the weight of the first
Array([0. , 1.5, 1. ], dtype=float32)

The inputs of a layer depend on the layers before it, so the paper prunes in the order of the forward pass and
recomputes the inputs from the weights pruned so far. To do this, call the two functions once per layer, with ``where``.
"""

import functools
import itertools
import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from jprune import jaxprs
from jprune.graph.axes import Axes, KernelAxes, kernel_axes, unknown_axes, where_of
from jprune.pruning.amounts import fraction, integer
from jprune.pruning.scores.activations import View, Visitor, collect_products
from jprune.pruning.scores.elementwise import refuse_one_batch, working_dtype
from jprune.pruning.selection import kth_largest, uint64
from jprune.pruning.selection.layers import empty_layers, mask_layers
from jprune.pruning.selection.uint64 import Count
from jprune.trees import Where, flatten, match, only

# A layer is pruned in segments of static size. The blocks of a segment share a loop, in which every product covers all
# rows of the segment.
_SEGMENTS, _SEGMENT_ROWS = 8, 512
_ROWS = 16  # rows of a block that are updated together


class Gram(NamedTuple):
    """Second moments of the inputs of a layer.

    Attributes:
      matrix: sum over examples and positions of x x^T; its rows are the kernel's summed axes, flattened in the order of
        the kernel's axes, after axes of stacked layers.
    """

    matrix: Float[Array, "*stacked inputs inputs"]


class Reconstructed(NamedTuple):
    """Pruned weights and their masks.

    Attributes:
      params: tree like the parameters; pruned weights are exactly 0 and the others are updated.
      masks: bool tree, None where nothing was pruned.
    """

    params: PyTree
    masks: PyTree


def sparsegpt(
    params: PyTree,
    activations: Mapping[str, Gram | Float[Array, "..."]],
    *,
    sparsity: float | None = None,
    n: int | None = None,
    m: int | None = None,
    masks: PyTree = None,
    block: int = 128,
    damping: float = 0.01,
    where: Where | None = None,
    axes: Axes = None,
) -> Reconstructed:
    """Prune every kernel with the weight update of optimal brain surgeon, one input after another.

    With H = X^T X + damping * mean(diag(X^T X)) I and U the upper Cholesky factor of its inverse, H^-1 = U^T U,
    the weights of input i are pruned where w_i^2 / U_ii^2 is smallest, and the weights of every later input j
    change by -U_ij w_i / U_ii: the least-squares solution for the outputs, given that the weights of earlier inputs
    are fixed. The weights to prune are chosen ``block`` inputs at a time, so that each block of a kernel has the
    same sparsity; those of an n:m group are chosen when the group is reached.

    This implementation gets the same numbers from one Cholesky factorization H = R R^T, with R = U^-1 upper triangular:
    w_j + sum over i < j of R_ij (w_i - v_i) / R_jj, where v are the weights after pruning. No inverse of H is
    needed.

    Args:
      params: tree of arrays.
      activations: for each kernel, by its path or the path of its module, the result of ``input_grams`` or the captured
        inputs: (..., inputs) for a kernel (inputs, outputs); in general (*stacked, ..., *summed axes of the kernel).
      sparsity: fraction of each kernel to remove; exact, rounded half to even.
      n: keep n of every m weights along the inputs, instead of ``sparsity``.
      m: see ``n``; it must divide ``block`` and the number of inputs.
      masks: bool tree of the weights to keep, instead of ``sparsity``: only the weight update is computed.
      block: the number of inputs whose weights are compared with each other.
      damping: added to the diagonal of H, as a fraction of its mean.
      where: predicate on (path, leaf) that selects the leaves to prune; None as for ``prune``.
      axes: the roles of the axes of each kernel: a graph, ``{regex: KernelAxes(...)}``, ``"flax"`` or ``"equinox"``.

    Returns:
      ``Reconstructed(params, masks)``. Weights whose input is always 0 are pruned first; those that are kept are not
      changed.

    Raises:
      TypeError: not exactly one of ``sparsity``, ``n`` with ``m``, and ``masks`` is given; or one has the wrong type.
      ValueError: an argument is out of range; ``m`` does not divide the inputs; a kernel has no activations, or they
        have another shape; the axes of a kernel are unknown; H is not positive definite (found outside jit only). The
        message names the leaf.

    Source: Frantar & Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot", ICML 2023,
    arXiv 2301.00774, algorithm 1.

    >>> x, kernel = jnp.eye(4), jnp.array([[3.0], [1.0], [2.0], [4.0]])
    >>> sparsegpt({"kernel": kernel}, {"kernel": x}, sparsity=0.5).params["kernel"][:, 0]
    Array([3., 0., 0., 4.], dtype=float32)
    """
    _check_amount(sparsity, n, m, masks, block=block, damping=damping)
    paths, leaves, treedef = flatten(params)
    _, chosen, _ = flatten(only(params, where_of(where, axes)))
    roles = kernel_axes(axes, params)
    given: list[Array | None] = [None] * len(paths)
    if masks is not None:
        given = match(params, masks, reference_name="params", name="masks")
        chosen = [leaf if mask is not None else None for leaf, mask in zip(chosen, given, strict=True)]
    kept: list[Array | None] = [None] * len(paths)
    for i, (path, leaf) in enumerate(zip(paths, chosen, strict=True)):
        if leaf is None:
            continue
        summing = _summing(roles[path], path, leaf.shape, axes)
        gram = _gram_of(activations, path, leaf, summing)
        stacked = _stacked_rows(leaf, summing)
        inputs, outputs = stacked.shape[1:]
        if m is not None and inputs % m:
            raise ValueError(
                f"m={m} must divide the inputs of every kernel; '{path}' of shape {leaf.shape} sums over {inputs}; "
                "exclude it with where=, or give axes= if these are not its inputs"
            )
        counts = None if sparsity is None else _block_counts(sparsity, inputs, outputs, block)
        fixed = given[i]
        mask = None if fixed is None else _stacked_rows(fixed, summing)
        solve = functools.partial(_prune_rows, counts=counts, n=n, m=m, block=block, damping=damping)
        dtype = working_dtype(leaf)
        rows, kept_rows = jax.vmap(solve)(stacked.astype(dtype), gram.astype(dtype), mask)
        _refuse_nan(path, rows, damping)
        leaves[i] = _unstacked_rows(rows.astype(jax.dtypes.canonicalize_dtype(leaf.dtype)), leaf.shape, summing)
        kept[i] = _unstacked_rows(kept_rows, leaf.shape, summing)
    chosen_masks = jax.tree.unflatten(treedef, kept)
    if sparsity != 1.0 and masks is None:
        _warn_of_collapse(chosen_masks, axes)
    return Reconstructed(jax.tree.unflatten(treedef, leaves), chosen_masks)


def _warn_of_collapse(masks: PyTree, axes: Axes) -> None:
    """Warn, outside jit, about layers that keep no weight."""
    layers = mask_layers(masks, axes)
    if any(isinstance(mask, jax.core.Tracer) for mask in layers.masks):
        return
    if empty := empty_layers(layers, layers.masks):
        named = ", ".join(map(repr, empty))
        warnings.warn(f"nothing is left of {named}; lower sparsity=, or leave it out with where=", stacklevel=3)


def input_grams(
    apply: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    *,
    where: Where | None = None,
    axes: Axes = None,
) -> dict[str, Gram]:
    """Sum x x^T over batches, where x are the inputs of each kernel in the forward pass.

    The matrix products and convolutions that read a kernel are found in the program, as for ``wanda``. The sum is over
    all uses of a kernel; each stacked layer of a scan has its own matrix. The memory is inputs^2 numbers per layer, for
    any number of batches.

    Args:
      apply: ``apply(params, batch)``, the forward pass.
      params: tree of arrays.
      batches: any number of batches.
      where: predicate on (path, leaf) that selects the kernels; None as for ``prune``.
      axes: see ``sparsegpt``.

    Returns:
      A dict from path to ``Gram``, at least float32.

    Raises:
      TypeError: ``batches`` is one batch.
      ValueError: ``batches`` is empty; no matrix product or convolution reads a kernel (those inside ``while`` and
        ``cond`` are not found), or one with feature groups does; the axes of a kernel are unknown.

    >>> grams = input_grams(lambda w, x: x @ w, jnp.ones((2, 1)), [jnp.array([[1.0, 2.0]]), jnp.array([[1.0, 0.0]])],
    ...     where=lambda path, leaf: True)
    >>> grams[""].matrix
    Array([[2., 2.],
           [2., 4.]], dtype=float32)
    """
    refuse_one_batch(batches)
    paths, chosen, _ = flatten(only(params, where_of(where, axes)))
    wanted = {path: leaf for path, leaf in zip(paths, chosen, strict=True) if leaf is not None}
    roles = kernel_axes(axes, params)
    summed = {path: _summing(roles[path], path, leaf.shape, axes) for path, leaf in wanted.items()}

    @jax.jit
    def one(params: PyTree, batch: PyTree) -> dict[str, Array]:
        def visit(equation: core.JaxprEqn, other: jaxprs.Value, view: View, side: int) -> PyTree:
            if view.path not in wanted:
                return None
            axes_of_kernel, steps = summed[view.path], wanted[view.path].ndim - len(view.shape)
            if axes_of_kernel.stacked[:steps] != tuple(range(steps)):
                raise ValueError(
                    f"'{view.path}' of shape {wanted[view.path].shape} is read in a scan over its first {steps} axes, "
                    f"which are not stacked: {roles[view.path]}; give axes=jprune.trace_model(apply, params, *inputs)"
                )
            parts = (tuple(axis - steps for axis in part if axis >= steps) for part in axes_of_kernel)
            return _product_gram(equation, other, view, side, _Roles(*parts))

        def join(view: View, grams: PyTree) -> PyTree:
            if view.arranged:
                raise ValueError(
                    f"'{view.path}' is transposed or reshaped before a scan reads it; exclude it with where=, or "
                    "capture its inputs and pass them to sparsegpt"
                )
            return grams

        found = collect_products(apply, params, batch, Visitor(visit, join))
        for path in wanted:
            if path not in found:
                raise ValueError(
                    f"no matrix product or convolution reads '{path}' (those inside while and cond are not found); "
                    "exclude it with where=, or capture its inputs and pass them to sparsegpt"
                )
        return found

    total: dict[str, Array] | None = None
    for batch in batches:
        found = one(params, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("batches has no batch; give at least one")
    return {path: Gram(total[path]) for path in wanted}


def _check_amount(
    sparsity: float | None, n: int | None, m: int | None, masks: PyTree, *, block: int, damping: float
) -> None:
    ways = [sparsity is not None, n is not None or m is not None, masks is not None]
    if sum(ways) != 1:
        raise TypeError("give exactly one of sparsity= (the fraction removed), n= with m=, and masks=")
    if sparsity is not None:
        fraction("sparsity", sparsity, of="the fraction of each kernel to remove")
    for name, number in (("n", n), ("m", m), ("block", block)):
        if number is not None:
            integer(name, number, least=0 if name == "n" else 1)
    if ways[1] and (n is None or m is None or n > m):
        raise ValueError(f"n={n}, m={m}: n of every m weights are kept, so 0 <= n <= m and m >= 1")
    if m is not None and block % m:
        raise ValueError(f"block={block} must be a multiple of m={m}")
    if not damping >= 0.0:
        raise ValueError(f"damping={damping} is negative; give a number of 0 or more")


def _refuse_nan(path: str, rows: Array, damping: float) -> None:
    if isinstance(rows, jax.core.Tracer) or bool(jnp.all(jnp.isfinite(rows))):
        return
    raise ValueError(
        f"the weights of '{path}' became NaN or infinite: the weights or activations are not finite, or X^T X with "
        f"damping={damping} is not positive definite; give at least as many examples as the kernel has inputs, or more "
        "damping"
    )


class _Roles(NamedTuple):
    """The axes of a kernel: those of separate layers, those that are summed over, the others; in ascending order."""

    stacked: tuple[int, ...]
    summed: tuple[int, ...]
    outputs: tuple[int, ...]


def _summing(kernel: KernelAxes | None, path: str, shape: tuple[int, ...], axes: Axes) -> _Roles:
    if kernel is None:
        raise ValueError(unknown_axes(path, shape, "its outputs are reconstructed from its inputs", axes))
    if kernel.tied or kernel.groups != 1:
        problem = (
            "is read in more than one way (tied weights)" if kernel.tied else f"has {kernel.groups} feature groups"
        )
        raise ValueError(f"leaf '{path}' {problem}, so it has no single set of inputs; exclude it with where=")
    return _Roles(kernel.stacked, tuple(sorted(kernel.inputs + kernel.spatial)), kernel.outputs)


def _sizes(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[axis] for axis in axes)


def _stacked_rows(array: Shaped[Array, "..."], roles: _Roles) -> Shaped[Array, "layers inputs outputs"]:
    moved = jnp.transpose(array, roles.stacked + roles.summed + roles.outputs)
    return moved.reshape([math.prod(_sizes(array.shape, axes)) for axes in roles])


def _unstacked_rows(
    rows: Shaped[Array, "layers inputs outputs"], shape: tuple[int, ...], roles: _Roles
) -> Shaped[Array, "..."]:
    order = roles.stacked + roles.summed + roles.outputs
    return jnp.transpose(rows.reshape(_sizes(shape, order)), np.argsort(order).tolist())


def _gram_of(
    activations: Mapping[str, Gram | Float[Array, "..."]], path: str, leaf: Float[Array, "..."], roles: _Roles
) -> Float[Array, "layers inputs inputs"]:
    given = activations.get(path, activations.get(path.rpartition("/")[0]))
    if given is None:
        raise ValueError(
            f"activations has no entry for '{path}'; add one, or leave the leaf out with where=; it has "
            f"{', '.join(map(repr, activations)) or 'none'}"
        )
    stacked, summed = _sizes(leaf.shape, roles.stacked), _sizes(leaf.shape, roles.summed)
    inputs = math.prod(summed)
    if isinstance(given, Gram):
        if given.matrix.shape != (*stacked, inputs, inputs):
            raise ValueError(
                f"activations has a Gram of shape {given.matrix.shape} for '{path}' of shape {leaf.shape}; it must be "
                f"{(*stacked, inputs, inputs)}"
            )
        return given.matrix.reshape(-1, inputs, inputs)
    shape = given.shape
    first, last = len(stacked), len(shape) - len(summed)
    if last < first or shape[:first] != stacked or shape[last:] != summed:
        sizes = ", ".join([*map(str, stacked), "...", *map(str, summed)])
        raise ValueError(f"activations has shape {shape} for '{path}' of shape {leaf.shape}; it must be ({sizes})")
    return jax.vmap(_outer_sum)(given.reshape(math.prod(stacked), -1, inputs))


def _outer_sum(x: Float[Array, "examples inputs"]) -> Float[Array, "inputs inputs"]:
    x = x.astype(working_dtype(x))
    return jnp.matmul(x.T, x, precision=lax.Precision.HIGHEST)


def _product_gram(equation: core.JaxprEqn, other: jaxprs.Value, view: View, side: int, roles: _Roles) -> Array | None:
    """Return X^T X of one product, with rows in the order of the kernel's summed axes."""
    if equation.primitive.name == "dot_general":
        inputs, places = _dot_inputs(equation.params, other, view, side)
    else:
        inputs, places = _convolution_inputs(equation.params, other, view, side)
    # places[b, i, o] is the flat index in the kernel of the weight at (batch b, input i, output o) of the product.
    where = np.unravel_index(places, view.shape)

    def index(axes: tuple[int, ...]) -> np.ndarray:
        if not axes:
            return np.zeros(places.shape, int)
        return np.ravel_multi_index([where[axis] for axis in axes], _sizes(view.shape, axes))

    layer, row = index(roles.stacked), index(roles.summed)
    if (layer != layer[:, :1, :1]).any() or (row != row[:1, :, :1]).any():
        raise ValueError(
            f"the product that reads '{view.path}' of shape {view.shape} does not sum over its axes {roles.summed}; "
            "give axes= with the inputs of this kernel"
        )
    grams = jax.vmap(_outer_sum)(inputs)
    order = np.argsort(row[0, :, 0])
    grams = grams[np.argsort(layer[:, 0, 0])][:, order][:, :, order]
    return grams.reshape(*_sizes(view.shape, roles.stacked), *grams.shape[1:])


def _places(view: View) -> np.ndarray:
    """Return the flat index of every weight, arranged as the product reads it."""
    with jax.ensure_compile_time_eval():
        return np.asarray(view.of(jnp.arange(math.prod(view.shape)).reshape(view.shape)))


def _dot_inputs(params: dict[str, Any], other: jaxprs.Value, view: View, side: int) -> tuple[Array, np.ndarray]:
    """Return the other operand (batch, examples, inputs) and the indices of the weights (batch, inputs, outputs)."""
    contracted, batched = params["dimension_numbers"]
    arrays: list[PyTree] = []
    for array, summed, layers in (
        (other, contracted[1 - side], batched[1 - side]),
        (_places(view), contracted[side], batched[side]),
    ):
        rest = [axis for axis in range(array.ndim) if axis not in (*summed, *layers)]
        sizes = [math.prod(_sizes(array.shape, tuple(part))) for part in (layers, rest, summed)]
        arrays.append(array.transpose([*layers, *rest, *summed]).reshape(sizes))
    return arrays[0], arrays[1].transpose(0, 2, 1)


def _convolution_inputs(params: dict[str, Any], other: jaxprs.Value, view: View, side: int) -> tuple[Array, np.ndarray]:
    """Return the patches (1, examples, inputs) and the indices of the weights (1, inputs, outputs)."""
    if side != 1 or params["feature_group_count"] != 1 or params["batch_group_count"] != 1:
        raise ValueError(
            f"the convolution that reads '{view.path}' has feature or batch groups; exclude it with where="
        )
    numbers, places = params["dimension_numbers"], _places(view)
    spec = numbers.rhs_spec  # (out, in, *spatial) of the kernel as the convolution reads it
    patches = lax.conv_general_dilated_patches(
        other,
        _sizes(places.shape, spec[2:]),
        params["window_strides"],
        params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
        dimension_numbers=numbers,
        precision=lax.Precision.HIGHEST,
    )
    features = numbers.out_spec[1]
    inputs = jnp.moveaxis(patches, features, -1)
    places = places.transpose([*spec[1:], spec[0]])  # patches are ordered (in, *spatial)
    return inputs.reshape(1, -1, inputs.shape[-1]), places.reshape(1, -1, places.shape[-1])


def _block_counts(sparsity: float, inputs: int, outputs: int, block: int) -> tuple[int, ...]:
    """Return the number of weights that each block keeps; the sum is the exact count of the kernel."""
    ends = [min(end, inputs) * outputs for end in range(block, inputs + block, block)]
    kept = [0, *(end - round(end * sparsity) for end in ends)]
    return tuple(b - a for a, b in itertools.pairwise(kept))


@functools.partial(jax.jit, static_argnames=("counts", "n", "m", "block", "damping"))
def _prune_rows(
    weights: Float[Array, "inputs outputs"],
    gram: Float[Array, "inputs inputs"],
    mask: Bool[Array, "inputs outputs"] | None,
    *,
    counts: tuple[int, ...] | None,
    n: int | None,
    m: int | None,
    block: int,
    damping: float,
) -> tuple[Float[Array, "inputs outputs"], Bool[Array, "inputs outputs"]]:
    """Return the weights after pruning and the mask."""
    inputs = weights.shape[0]
    factor, scale = _factor(gram, damping)
    # The change of a kept weight, w_j - v_j = -(sum over i < j of R_ij (w_i - v_i)) / R_jj, needs only the changes so
    # far. Segments have static sizes; the blocks of a segment share a loop.
    changes, kept = jnp.zeros_like(weights), jnp.zeros(weights.shape, bool)
    table = None if counts is None else Count(*map(jnp.asarray, uint64.count_of(list(counts))))
    whole = inputs // block
    each = max(-(-whole // _SEGMENTS), -(-_SEGMENT_ROWS // block))
    spans = [(first * block, min(each, whole - first), block) for first in range(0, whole, each)]
    if inputs % block:
        spans.append((whole * block, 1, inputs % block))
    for start, blocks, size in spans:
        stop = start + blocks * size
        past = _product(factor[:start, start:stop].T, changes[:start])
        segment = factor[start:stop, start:stop]

        def step(
            i: ArrayLike,
            carry: tuple[Array, Array],
            *,
            start: int = start,
            size: int = size,
            past: Array = past,
            r: Array = segment,
        ) -> tuple[Array, Array]:
            own_changes, chosen = carry
            at = i * size
            sums = _rows(past, at, size) + _product(lax.dynamic_slice_in_dim(r, at, size, 1).T, own_changes)
            square = lax.dynamic_slice(r, (at, at), (size, size))
            rows = _rows(weights, start + at, size)
            given = None if mask is None else _rows(mask, start + at, size)
            count = None if table is None else Count(*(limb[start // block + i] for limb in table))
            own_scale = _rows(scale, start + at, size)
            delta, keep = _prune_block(rows, sums, square, own_scale, mask=given, count=count, n=n, m=m)
            return lax.dynamic_update_slice_in_dim(own_changes, delta, at, 0), lax.dynamic_update_slice_in_dim(
                chosen, keep, at, 0
            )

        empty = (jnp.zeros((stop - start, weights.shape[1]), weights.dtype), kept[start:stop])
        own_changes, chosen = lax.fori_loop(0, blocks, step, empty)
        changes, kept = changes.at[start:stop].set(own_changes), kept.at[start:stop].set(chosen)
    return jnp.where(kept, weights - changes, jnp.zeros_like(weights)), kept


def _factor(
    gram: Float[Array, "inputs inputs"], damping: float
) -> tuple[Float[Array, "inputs inputs"], Float[Array, " inputs"]]:
    """Return R, upper triangular with H = R R^T, and its diagonal, 0 where an input is always 0."""
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    size = jnp.mean(jnp.where(dead, jnp.ones_like(diagonal), diagonal))
    shift = jnp.where(dead, jnp.ones_like(diagonal), damping * size)
    # With rows and columns reversed, the lower Cholesky factor becomes the upper one needed here.
    lower = jnp.linalg.cholesky((gram + jnp.diag(shift))[::-1, ::-1])
    factor = lower[::-1, ::-1]
    return factor, jnp.where(dead, jnp.zeros_like(diagonal), jnp.diagonal(factor))


def _prune_block(
    weights: Float[Array, "rows outputs"],
    sums: Float[Array, "rows outputs"],
    factor: Float[Array, "rows rows"],
    scale: Float[Array, " rows"],
    *,
    mask: Bool[Array, "rows outputs"] | None,
    count: Count | None,
    n: int | None,
    m: int | None,
) -> tuple[Float[Array, "rows outputs"], Bool[Array, "rows outputs"]]:
    """Return the changes of the weights of one block and the mask; ``sums`` is R^T times earlier changes."""
    size = weights.shape[0]
    inverse = jax.scipy.linalg.solve_triangular(factor, jnp.eye(size, dtype=factor.dtype))  # U of this block
    if count is not None:
        updated = weights + _product(inverse.T, sums)
        mask = kth_largest.largest([jnp.square(updated * scale[:, None])], count, [None], one_device=None)[0]
    together = m or math.gcd(size, _ROWS)

    def group(i: ArrayLike, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        changes, kept = carry
        at = i * together
        rows, weight = _rows(sums, at, together), _rows(weights, at, together)
        rows = rows + _product(lax.dynamic_slice_in_dim(factor, at, together, 1).T, changes)
        square = lax.dynamic_slice(factor, (at, at), (together, together))
        if mask is None:
            u = lax.dynamic_slice(inverse, (at, at), (together, together))
            updated = weight + _product(u.T, rows)
            keep = _best(jnp.square(updated * _rows(scale, at, together)[:, None]), n or 0)
        else:
            keep = _rows(mask, at, together)

        def row(j: ArrayLike, deltas: Array) -> Array:
            before = lax.dynamic_slice_in_dim(square, j, 1, 1)  # R_ij of the group's rows; later changes are still 0
            total = _rows(rows, j, 1) + jnp.sum(before * deltas, axis=0, keepdims=True)
            delta = jnp.where(_rows(keep, j, 1), -total / _rows(before, j, 1), _rows(weight, j, 1))
            return lax.dynamic_update_slice_in_dim(deltas, delta, j, 0)

        deltas = lax.fori_loop(0, together, row, jnp.zeros_like(weight))
        return lax.dynamic_update_slice_in_dim(changes, deltas, at, 0), lax.dynamic_update_slice_in_dim(
            kept, keep, at, 0
        )

    start = (jnp.zeros_like(weights), jnp.zeros(weights.shape, bool))
    changes, kept = lax.fori_loop(0, size // together, group, start)
    return changes, kept


def _best(scores: Float[Array, "rows outputs"], count: int) -> Bool[Array, "rows outputs"]:
    """Mark the ``count`` largest entries of each column; ties go to the smaller index."""
    place = jnp.arange(scores.shape[0])
    larger = scores[None, :, :] > scores[:, None, :]
    ties = (scores[None, :, :] == scores[:, None, :]) & (place[None, :] < place[:, None])[:, :, None]
    return jnp.sum(larger | ties, axis=1) < count


def _rows(array: Shaped[Array, "all ..."], start: ArrayLike, size: int) -> Shaped[Array, "rows ..."]:
    return lax.dynamic_slice_in_dim(array, start, size, 0)


def _product(a: Float[Array, "rows inner"], b: Float[Array, "inner columns"]) -> Float[Array, "rows columns"]:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
