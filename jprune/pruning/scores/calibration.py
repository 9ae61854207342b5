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
import inspect
import itertools
import math
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array, ArrayLike, Bool, Float, PyTree, Shaped

from jprune import jaxprs
from jprune.graph.axes import Axes, HasAxes, KernelAxes, kernel_axes, unknown_axes, where_of
from jprune.pruning.amounts import fraction, integer
from jprune.pruning.scores.activations import View, Visitor, collect_products, refuse_unread
from jprune.pruning.scores.elementwise import working_dtype
from jprune.pruning.selection import allocation, kth_largest, uint64
from jprune.pruning.selection.layers import empty_layers, mask_layers
from jprune.pruning.selection.uint64 import Count
from jprune.trees import Subset, Where, flatten, is_array, match, only, refuse_one_batch

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
      sparsity: fraction of each kernel to remove; the number kept is rounded half to even.
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
                "exclude it with where=, or pass axes= if these are not its inputs"
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
    if any(isinstance(mask, jax.core.Tracer) for mask in layers.scores):
        return
    if empty := empty_layers(layers, layers.scores):
        named = ", ".join(map(repr, empty))
        warnings.warn(f"no weight is kept in {named}; lower sparsity=, or leave it out with where=", stacklevel=3)


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
    all uses of a kernel and all positions, padding included; pass sequences without padding. Each stacked layer of a
    scan has its own matrix. The memory is inputs^2 numbers per layer, for any number of batches.

    Args:
      apply: ``apply(params, batch)``, the forward pass. If it is made by ``jax.jit``, the sum is compiled once for all
        calls with these shapes, also after its weights were pruned; any other function is compiled at every call,
        because it may use values that have changed.
      params: tree of arrays.
      batches: any number of batches.
      where: predicate on (path, leaf) that selects the kernels; None as for ``prune``.
      axes: see ``sparsegpt``.

    Returns:
      A dict from path to ``Gram``, at least float32.

    Raises:
      TypeError: ``batches`` is one batch.
      ValueError: ``batches`` is empty; no matrix product or convolution reads a kernel itself, or others read it too
        that are not found, as for ``wanda``; one with feature groups reads it; the axes of a kernel are unknown.

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
    instead = "exclude it with where=, or capture its inputs and pass them to sparsegpt"

    arrays_of_model = Subset.of(params, is_array)
    # The program must not keep arrays alive.
    others = tuple(None if is_array(leaf) else leaf for leaf in arrays_of_model.every)
    without_arrays = arrays_of_model._replace(leaves=[], every=list(others))
    shapes = {path: tuple(leaf.shape) for path, leaf in wanted.items()}
    of_graph = isinstance(axes, HasAxes)

    def arranged(path: str) -> str:
        return f"'{path}' is transposed or reshaped before a scan reads it; {instead}"

    def run(apply: Callable[[PyTree, PyTree], PyTree], arrays: list[Array], batch: PyTree) -> dict[str, Array]:
        def visit(equation: core.JaxprEqn, other: jaxprs.Value, view: View, side: int) -> PyTree:
            if view.path not in summed:
                return None
            axes_of_kernel, shape = summed[view.path], shapes[view.path]
            steps = len(shape) - len(view.shape)
            if axes_of_kernel.stacked[:steps] != tuple(range(steps)):
                if of_graph:
                    raise ValueError(arranged(view.path))
                raise ValueError(
                    f"'{view.path}' of shape {shape} is read in a scan over its first {steps} axes, which are not "
                    f"stacked: {roles[view.path]}; pass axes=jprune.trace_model(apply, params, *inputs)"
                )
            parts = (tuple(axis - steps for axis in part if axis >= steps) for part in axes_of_kernel)
            return _product_gram(equation, other, view, side, _Roles(*parts))

        def join(view: View, grams: PyTree) -> PyTree:
            if view.arranged:
                raise ValueError(arranged(view.path))
            return grams

        products = collect_products(apply, without_arrays.whole(arrays), batch, Visitor(visit, join))
        refuse_unread(summed, products, instead)
        return products.sums

    # Of the arrays alone: Equinox modules have functions among their leaves.
    one = _compiled(
        apply,
        run,
        (
            without_arrays.treedef,
            tuple(without_arrays.slots),
            others,
            tuple(map(type, others)),  # 1, 1.0 and True are equal
            *summed.items(),
            *shapes.items(),
            of_graph,
        ),
    )
    total: dict[str, Array] | None = None
    for batch in batches:
        found = one(arrays_of_model.leaves, batch)
        total = found if total is None else jax.tree.map(jnp.add, total, found)
    if total is None:
        raise ValueError("batches has no batch; pass at least one")
    return {path: Gram(total[path]) for path in wanted}


# Programs of functions made by jax.jit, deleted with the function.
_PROGRAMS: weakref.WeakKeyDictionary[Callable[..., PyTree], dict[Hashable, Callable[..., PyTree]]] = (
    weakref.WeakKeyDictionary()
)


def _compiled(
    apply: Callable[[PyTree, PyTree], PyTree], run: Callable[..., PyTree], key: Hashable
) -> Callable[..., PyTree]:
    """Compile ``run(apply, ...)``; if ``apply`` is made by ``jax.jit``, once for each key.

    Any other function may use values that change, which a program that was compiled before would not read. So may a
    method made by ``jax.jit``: its object is an argument of the compiled function.
    """
    if not isinstance(apply, jax.stages.Wrapped) or inspect.ismethod(apply):
        return jax.jit(functools.partial(run, apply))
    programs = _PROGRAMS.setdefault(apply, {})
    try:
        known = programs.get(key)
    except TypeError:  # a leaf or the structure cannot be hashed
        return jax.jit(functools.partial(run, apply))
    if known is None:
        reference = weakref.ref(apply)  # the dict would keep a function alive that its values refer to
        known = programs[key] = jax.jit(lambda arrays, batch: run(reference(), arrays, batch))
    return known


def _check_amount(
    sparsity: float | None, n: int | None, m: int | None, masks: PyTree, *, block: int, damping: float
) -> None:
    ways = [sparsity is not None, n is not None or m is not None, masks is not None]
    if sum(ways) != 1:
        raise TypeError("pass exactly one of sparsity= (the fraction removed), n= with m=, and masks=")
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
        raise ValueError(f"damping={damping} is negative; pass a number of 0 or more")


def _refuse_nan(path: str, rows: Array, damping: float) -> None:
    if isinstance(rows, jax.core.Tracer) or bool(jnp.all(jnp.isfinite(rows))):
        return
    raise ValueError(
        f"the weights of '{path}' became NaN or infinite: the weights or activations are not finite, or X^T X with "
        f"damping={damping} is not positive definite; pass at least as many examples as the kernel has inputs, or more "
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
            f"activations has no entry for '{path}', only {', '.join(map(repr, activations)) or 'none'}; pass "
            "input_grams and sparsegpt the same where= and axes=, or leave the leaf out with where="
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
    return jax.vmap(_outer_sum)(given.reshape(math.prod(stacked), math.prod(shape[first:last]), inputs))


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
    def index(axes: tuple[int, ...]) -> np.ndarray:
        if not axes:
            return np.zeros(places.shape, int)
        where = np.unravel_index(places, view.shape)
        return np.ravel_multi_index([where[axis] for axis in axes], _sizes(view.shape, axes))

    layer = index(roles.stacked)
    if len(places) == 1 and (layer != layer[:, :1]).any():  # the product sums over experts too
        order = np.argsort(layer[0, :, 0], kind="stable").reshape(int(layer.max()) + 1, -1)
        inputs, places = jnp.moveaxis(inputs[0][:, order], 1, 0), places[0][order]
        layer = index(roles.stacked)
    elif len(places) == 1 and (layer != layer[:, :, :1]).any():  # experts that read the same inputs
        order = np.argsort(layer[0, 0], kind="stable").reshape(int(layer.max()) + 1, -1)
        places = places[0].T[order].transpose(0, 2, 1)
        layer = index(roles.stacked)
    row = index(roles.summed)
    if (layer != layer[:, :1, :1]).any() or (row != row[:1, :, :1]).any():
        raise ValueError(
            f"the product that reads '{view.path}' of shape {view.shape} does not sum over its axes {roles.summed}; "
            "pass axes= with the inputs of this kernel"
        )
    grams = jax.vmap(_outer_sum)(inputs)
    grams = jnp.broadcast_to(grams, (len(places), *grams.shape[1:]))
    order = np.argsort(row[0, :, 0])
    grams = grams[np.argsort(layer[:, 0, 0])][:, order][:, :, order]
    return grams.reshape(*_sizes(view.shape, roles.stacked), *grams.shape[1:])


def _places(view: View) -> np.ndarray:
    """Return the flat index of every weight, arranged as the product reads it."""
    with jax.ensure_compile_time_eval():
        return np.asarray(view.of(jnp.arange(math.prod(view.shape)).reshape(view.shape)))


def _dot_inputs(params: jaxprs.Parameters, other: jaxprs.Value, view: View, side: int) -> tuple[Array, np.ndarray]:
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


def _convolution_inputs(
    params: jaxprs.Parameters, other: jaxprs.Value, view: View, side: int
) -> tuple[Array, np.ndarray]:
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
    kept = [0, *(allocation.kept(float(sparsity), end) for end in ends)]
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
    factor, scale = _factor(gram, damping)
    table = None if counts is None else Count(*map(jnp.asarray, uint64.count_of(list(counts))))
    layer = _Layer(weights, factor, scale, mask, table, n, m)
    # The change of a kept weight, w_j - v_j = -(sum over i < j of R_ij (w_i - v_i)) / R_jj, needs only the changes so
    # far.
    changes, kept = jnp.zeros_like(weights), jnp.zeros(weights.shape, bool)
    for segment in _segments(weights.shape[0], block):
        rows = slice(segment.start, segment.start + segment.blocks * segment.size)
        own_changes, own_kept = _prune_segment(layer, segment, changes, kept[rows])
        changes, kept = changes.at[rows].set(own_changes), kept.at[rows].set(own_kept)
    return jnp.where(kept, weights - changes, jnp.zeros_like(weights)), kept


class _Layer(NamedTuple):
    """A layer to prune, and how its weights are chosen: by a mask, by counts of blocks, or n of every m.

    Attributes:
      weights: (inputs, outputs).
      factor: R of H = R R^T, (inputs, inputs), upper triangular.
      scale: diagonal of R, 0 where an input is always 0, (inputs,).
      mask: bool (inputs, outputs) of the weights to keep, or None.
      counts: the number of weights to keep in each block, limbs (blocks,), or None.
      n: number of weights to keep of every ``m`` of an output, or None.
      m: see ``n``.
    """

    weights: Array
    factor: Array
    scale: Array
    mask: Array | None
    counts: Count | None
    n: int | None
    m: int | None


class _Segment(NamedTuple):
    """Blocks of inputs of the same size that are pruned in one loop: first block, first input, blocks, their size."""

    first: int
    start: int
    blocks: int
    size: int


def _segments(inputs: int, block: int) -> list[_Segment]:
    """Divide the inputs of a layer into segments of static size; a smaller last block is a segment of its own."""
    whole = inputs // block
    each = max(-(-whole // _SEGMENTS), -(-_SEGMENT_ROWS // block))
    segments = [_Segment(i, i * block, min(each, whole - i), block) for i in range(0, whole, each)]
    return segments + ([_Segment(whole, whole * block, 1, inputs % block)] if inputs % block else [])


def _prune_segment(
    layer: _Layer, segment: _Segment, changes: Float[Array, "inputs outputs"], kept: Bool[Array, "rows outputs"]
) -> tuple[Float[Array, "rows outputs"], Bool[Array, "rows outputs"]]:
    """Return the changes of the weights of a segment and its mask, given the changes of all earlier inputs.

    Args:
      layer: the layer.
      segment: the segment, of ``rows`` inputs.
      changes: changes of all weights of the layer so far.
      kept: mask of the segment before it is pruned, all False.
    """
    first, start, blocks, size = segment
    stop = start + blocks * size
    past = _product(layer.factor[:start, start:stop].T, changes[:start])
    factor = layer.factor[start:stop, start:stop]

    def step(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        own_changes, own_kept = carry
        at = i * size
        block = _Block(
            weights=_rows(layer.weights, start + at, size),
            sums=_rows(past, at, size) + _product(_columns(factor, at, size).T, own_changes),
            factor=lax.dynamic_slice(factor, (at, at), (size, size)),
            scale=_rows(layer.scale, start + at, size),
            mask=None if layer.mask is None else _rows(layer.mask, start + at, size),
        )
        count = None if layer.counts is None else Count(*(jnp.asarray(limb)[first + i] for limb in layer.counts))
        delta, keep = _prune_block(block, count, layer.n, layer.m)
        return _with_rows(own_changes, delta, at), _with_rows(own_kept, keep, at)

    empty = (jnp.zeros((stop - start, layer.weights.shape[1]), layer.weights.dtype), kept)
    pruned: tuple[Array, Array] = lax.fori_loop(0, blocks, step, empty)
    return pruned


def _factor(
    gram: Float[Array, "inputs inputs"], damping: float
) -> tuple[Float[Array, "inputs inputs"], Float[Array, " inputs"]]:
    """Return R, upper triangular with H = R R^T, and its diagonal, 0 where an input is always 0."""
    diagonal = jnp.diagonal(gram)
    dead = diagonal == 0
    shift = jnp.where(dead, jnp.ones_like(diagonal), damping * jnp.mean(diagonal))
    # With rows and columns reversed, the lower Cholesky factor becomes the upper one needed here.
    lower = jnp.linalg.cholesky((gram + jnp.diag(shift))[::-1, ::-1])
    factor = lower[::-1, ::-1]
    return factor, jnp.where(dead, jnp.zeros_like(diagonal), jnp.diagonal(factor))


class _Block(NamedTuple):
    """Consecutive inputs of a layer whose weights are compared with each other.

    Attributes:
      weights: (rows, outputs).
      sums: R^T times the changes of all earlier inputs, (rows, outputs).
      factor: the square of R on the diagonal, (rows, rows).
      scale: diagonal of R, 0 where an input is always 0, (rows,).
      mask: bool (rows, outputs) of the weights to keep; None to choose n of every m.
    """

    weights: Array
    sums: Array
    factor: Array
    scale: Array
    mask: Array | None


def _prune_block(
    block: _Block, count: Count | None, n: int | None, m: int | None
) -> tuple[Float[Array, "rows outputs"], Bool[Array, "rows outputs"]]:
    """Return the changes of the weights of a block and its mask, ``count`` weights if that is given."""
    size = block.weights.shape[0]
    inverse = jax.scipy.linalg.solve_triangular(block.factor, jnp.eye(size, dtype=block.factor.dtype))  # U of the block
    if count is not None:
        updated = block.weights + _product(inverse.T, block.sums)
        importance = jnp.square(updated * block.scale[:, None])
        block = block._replace(mask=kth_largest.largest([importance], count, [None], one_device=None)[0])
    together = m or math.gcd(size, _ROWS)
    group = functools.partial(_prune_group, block, inverse, together=together, n=n or 0)
    start = (jnp.zeros_like(block.weights), jnp.zeros(block.weights.shape, bool))
    pruned: tuple[Array, Array] = lax.fori_loop(0, size // together, group, start)
    return pruned


def _prune_group(
    block: _Block,
    inverse: Float[Array, "rows rows"],
    i: ArrayLike,
    carry: tuple[Float[Array, "rows outputs"], Bool[Array, "rows outputs"]],
    *,
    together: int,
    n: int,
) -> tuple[Float[Array, "rows outputs"], Bool[Array, "rows outputs"]]:
    """Prune ``together`` rows of a block, group ``i``: keep those of the mask, or the ``n`` best of each output."""
    changes, kept = carry
    at = i * together
    sums, weights = _rows(block.sums, at, together), _rows(block.weights, at, together)
    sums = sums + _product(_columns(block.factor, at, together).T, changes)
    factor = lax.dynamic_slice(block.factor, (at, at), (together, together))
    if block.mask is None:
        u = lax.dynamic_slice(inverse, (at, at), (together, together))
        updated = weights + _product(u.T, sums)
        keep = _best(jnp.square(updated * _rows(block.scale, at, together)[:, None]), n)
    else:
        keep = _rows(block.mask, at, together)
    row = functools.partial(_prune_row, weights=weights, sums=sums, factor=factor, keep=keep)
    deltas = lax.fori_loop(0, together, row, jnp.zeros_like(weights))
    return _with_rows(changes, deltas, at), _with_rows(kept, keep, at)


def _prune_row(
    j: ArrayLike,
    deltas: Float[Array, "rows outputs"],
    *,
    weights: Float[Array, "rows outputs"],
    sums: Float[Array, "rows outputs"],
    factor: Float[Array, "rows rows"],
    keep: Bool[Array, "rows outputs"],
) -> Float[Array, "rows outputs"]:
    """Add the changes of row ``j`` of a group to those of the rows before it; later changes are still 0."""
    before = _columns(factor, j, 1)  # R_ij of the group's rows
    total = _rows(sums, j, 1) + jnp.sum(before * deltas, axis=0, keepdims=True)
    delta = jnp.where(_rows(keep, j, 1), -total / _rows(before, j, 1), _rows(weights, j, 1))
    return _with_rows(deltas, delta, j)


def _best(scores: Float[Array, "rows outputs"], count: int) -> Bool[Array, "rows outputs"]:
    """Mark the ``count`` largest entries of each column; ties go to the smaller index."""
    place = jnp.arange(scores.shape[0])
    larger = scores[None, :, :] > scores[:, None, :]
    ties = (scores[None, :, :] == scores[:, None, :]) & (place[None, :] < place[:, None])[:, :, None]
    return jnp.sum(larger | ties, axis=1) < count


def _rows(array: Shaped[Array, "all ..."], start: ArrayLike, size: int) -> Shaped[Array, "rows ..."]:
    return lax.dynamic_slice_in_dim(array, start, size, 0)


def _columns(array: Float[Array, "rows all"], start: ArrayLike, size: int) -> Float[Array, "rows columns"]:
    return lax.dynamic_slice_in_dim(array, start, size, 1)


def _with_rows(array: Shaped[Array, "all ..."], rows: Shaped[Array, "rows ..."], at: ArrayLike) -> Array:
    return lax.dynamic_update_slice_in_dim(array, rows, at, 0)


def _product(a: Float[Array, "rows inner"], b: Float[Array, "inner columns"]) -> Float[Array, "rows columns"]:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
