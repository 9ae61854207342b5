"""Scores of whole filters: every weight of a filter has the same score.

A filter is all weights of one output channel of a kernel. Use these scores with ``channel_masks``, or with a selection
of channel groups, which averages the scores of a channel over all leaves that have it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from jprune.graph.axes import Axes, KernelAxes, kernel_axes, unknown_axes, where_of
from jprune.pruning.scores.elementwise import Score, working_dtype
from jprune.trees import Leaf, Where, flatten, is_float, map_leaves


def norm_scale(*, where: Where | None = None) -> Score:
    """Score channels by |gamma|, the scale of their normalization layer.

    Args:
      where: predicate on (path, leaf) that selects the scales; by default 1-D leaves named ``scale`` or ``gamma``.

    Source: Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017,
    arXiv 1708.06519; the paper trains with an l1 penalty on gamma: ``soft_threshold(..., where=is_norm_scale)``.

    >>> norm_scale()({"conv": {"kernel": jnp.ones((1, 2))}, "norm": {"scale": jnp.array([-2.0, 1.0])}})
    {'conv': {'kernel': None}, 'norm': {'scale': Array([2., 1.], dtype=float32)}}
    """

    def function(params: PyTree, grad: PyTree, batch: PyTree, key: PRNGKeyArray | None) -> PyTree:
        return map_leaves(lambda scale: jnp.abs(scale.astype(working_dtype(scale))), params)

    return Score(function, "norm_scale", (), where or is_norm_scale)


def is_norm_scale(path: str, leaf: Leaf) -> bool:
    """Whether a leaf is the scale of a normalization layer: 1-D, named ``scale`` or ``gamma``.

    >>> is_norm_scale("norm/scale", jnp.ones(3)), is_norm_scale("dense/kernel", jnp.ones((3, 2)))
    (True, False)
    """
    return path.rpartition("/")[2] in ("scale", "gamma") and is_float(leaf) and leaf.ndim == 1


def geometric_median(*, axes: Axes = None, where: Where | None = None) -> Score:
    """Score filters by the sum of their distances to all filters of the layer: small if others can replace them.

    Filters of a grouped convolution (known from a graph or ``KernelAxes(groups=...)``) are compared within their group,
    because those of other groups read other inputs. If each group has one filter, the kernel has no score.

    Args:
      axes: the roles of the axes of each kernel: a graph, ``{regex: KernelAxes(...)}``, ``"flax"`` or ``"equinox"``.
      where: see ``Score``.

    Raises:
      ValueError: while scoring, the axes of a kernel are unknown; the message names the leaf.

    Source: He et al., "Filter Pruning via Geometric Median for Deep Convolutional Neural Networks Acceleration",
    CVPR 2019, arXiv 1811.00250, equations 5 and 6.

    >>> geometric_median()({"kernel": jnp.array([[0.0, 3.0, 3.0], [0.0, 4.0, 4.0]])})["kernel"]
    Array([[10.,  5.,  5.],
           [10.,  5.,  5.]], dtype=float32)
    """

    def distances(filters: Float[Array, "outputs weights"]) -> Float[Array, " outputs"]:
        sums: Array = lax.map(lambda one: jnp.sum(jnp.sqrt(jnp.sum(jnp.square(filters - one[None]), axis=1))), filters)
        return sums

    def function(params: PyTree, grad: PyTree, batch: PyTree, key: PRNGKeyArray | None) -> PyTree:
        return _by_filter(distances, axes, params, within_groups=True)

    return Score(function, "geometric_median", (), where if axes is None else where_of(where, axes))


def filter_taylor(*, axes: Axes = None, where: Where | None = None) -> Score:
    """Score filters by (sum of w g)^2, the squared first-order change of the loss when the filter is removed.

    Needs ``grad``, the gradient g of the loss. Arguments are those of ``geometric_median``.

    Source: Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, arXiv 1906.10771,
    equations 8 and 9.

    >>> kernel, grad = jnp.array([[1.0, 2.0], [1.0, 2.0]]), jnp.array([[1.0, 1.0], [-1.0, 2.0]])
    >>> filter_taylor()({"kernel": kernel}, grad={"kernel": grad})["kernel"]
    Array([[ 0., 36.],
           [ 0., 36.]], dtype=float32)
    """

    def function(params: PyTree, grad: PyTree, batch: PyTree, key: PRNGKeyArray | None) -> PyTree:
        def product(weight: Leaf, slope: Leaf) -> Leaf:
            dtype = working_dtype(weight, slope)
            return weight.astype(dtype) * slope.astype(dtype)

        products = map_leaves(product, params, grad)
        return _by_filter(lambda filters: jnp.square(jnp.sum(filters, axis=1)), axes, products)

    return Score(function, "filter_taylor", ("grad",), where if axes is None else where_of(where, axes))


def _by_filter(of: Callable[[Array], Array], axes: Axes, tree: PyTree, *, within_groups: bool = False) -> PyTree:
    """Score the filters (outputs, weights) of every kernel; None for leaves that sum over nothing.

    Args:
      of: a function from filters to their scores.
      axes: the roles of the axes of each kernel.
      tree: kernels.
      within_groups: score the filters of each feature group by themselves; None for a group of one filter.
    """
    paths, leaves, treedef = flatten(tree)
    roles = kernel_axes(axes, tree)
    scores = [
        None if leaf is None else _leaf_by_filter(of, path, leaf, roles[path], axes, within_groups=within_groups)
        for path, leaf in zip(paths, leaves, strict=True)
    ]
    return jax.tree.unflatten(treedef, scores)


def _leaf_by_filter(
    of: Callable[[Array], Array],
    path: str,
    leaf: Leaf,
    roles: KernelAxes | None,
    axes: Axes,
    *,
    within_groups: bool,
) -> Float[Array, "..."] | None:
    if roles is None:
        raise ValueError(unknown_axes(path, leaf.shape, "a filter has the weights into one output", axes))
    summed = tuple(axis for axis in range(leaf.ndim) if axis not in (*roles.stacked, *roles.outputs))
    groups = roles.groups if within_groups else 1
    if not summed or (groups > 1 and groups == math.prod(leaf.shape[axis] for axis in roles.outputs)):
        return None
    order = (*roles.stacked, *roles.outputs, *summed)
    sizes = [math.prod(leaf.shape[axis] for axis in part) for part in (roles.stacked, roles.outputs, summed)]
    grouped = (sizes[0] * groups, sizes[1] // groups, sizes[2])  # feature groups are consecutive outputs
    filters = jnp.transpose(leaf.astype(working_dtype(leaf)), order).reshape(grouped)
    scores = jax.vmap(of)(filters)
    kept = [leaf.shape[axis] if axis not in summed else 1 for axis in range(leaf.ndim)]
    # Stacked and output axes are in the order of the roles, which may differ from the order in the leaf.
    given = (*roles.stacked, *roles.outputs)
    arranged = scores.reshape([leaf.shape[axis] for axis in given])
    arranged = jnp.transpose(arranged, sorted(range(len(given)), key=lambda place: given[place]))
    return jnp.broadcast_to(arranged.reshape(kept), leaf.shape)
