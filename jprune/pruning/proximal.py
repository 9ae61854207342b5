"""Proximal transformations: penalties on weights whose minimizers have exact zeros.

A proximal gradient step moves the parameters with the gradient of the loss and then applies the proximal operator
of the penalty, prox(v) = argmin over w of (1/2) |w - v|^2 + threshold * penalty(w). The transformations here return
prox(p + u) - p for the update u of the optimizer before them (an approximation of it for groups that overlap), so they
come last in a chain:

>>> import jprune
>>> rate, penalty = 0.1, 5.0
>>> tx = optax.chain(optax.sgd(rate), soft_threshold(rate * penalty))
>>> params = {"kernel": jnp.array([[3.0, -0.4]])}
>>> updates, state = tx.update({"kernel": jnp.ones((1, 2))}, tx.init(params), params)
>>> optax.apply_updates(params, updates)
{'kernel': Array([[2.4, 0. ]], dtype=float32)}

For plain gradient descent with learning rate r and a penalty weighted by lambda the threshold is r lambda, and
the iterates converge to the minimizer of loss + lambda * penalty (Parikh & Boyd, "Proximal Algorithms", 2014,
section 4.2). With a schedule of learning rates pass their product: ``lambda step: penalty * rate(step)``. Momentum
and preconditioned optimizers (Adam) work too, with the threshold in the same units for all weights (Yun et al.,
"Adaptive Proximal Gradient Methods", 2021, arXiv 1910.10094, discuss the choice). To continue training with the zeros
fixed, use ``jprune.keep_zeros``. To change a threshold during training, use
``optax.inject_hyperparams(soft_threshold)(threshold=...)``, with ``static_args="where"`` if you pass one.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, ArrayLike, Float, Int32, PyTree

from jprune.graph.axes import Axes, KernelAxes, kernel_axes, known_shapes, shapes_of, unknown_axes, where_of
from jprune.graph.channels import ChannelGroup
from jprune.pruning.scores.elementwise import working_dtype
from jprune.trees import Where, flatten, is_float, is_placeholder, kernels, match, only, refuse_sum, with_article

Threshold = ArrayLike | Callable[[Array], ArrayLike]
ChannelMembers = Sequence[tuple[str, int]] | ChannelGroup
_Arrays = dict[str, Array]


class ProximalState(NamedTuple):
    """The state of a proximal transformation.

    Attributes:
      count: int32 scalar, the number of earlier updates.
    """

    count: Array  # type: ignore[assignment]


def soft_threshold(threshold: Threshold, *, where: Where | None = None) -> optax.GradientTransformationExtraArgs:
    """Apply the proximal operator of the l1 penalty to every weight: sign(v) max(|v| - threshold, 0).

    Args:
      threshold: learning rate times penalty weight, 0 or more; or a function of the step.
      where: predicate on (path, leaf): which leaves have the penalty; None selects what ``kernels`` does.

    Returns:
      An optax transformation, the last one of its chain.

    Raises:
      TypeError: ``threshold`` is not a number or a function of the step.
      ValueError: ``threshold`` is negative or infinite; at ``init``, ``where`` selects nothing; while tracing, no
        ``params`` or trees that do not match.

    Source: Beck & Teboulle, "A Fast Iterative Shrinkage-Thresholding Algorithm", 2009, equations 1.4 and 1.5.

    >>> params = (jnp.array([3.0, -2.0, 0.5]),)
    >>> tx = soft_threshold(1.0, where=lambda path, leaf: True)
    >>> updates, _ = tx.update((jnp.zeros(3),), tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    (Array([ 2., -1.,  0.], dtype=float32),)
    """

    def shrink(value: Array, limit: Array) -> Array:
        return jnp.sign(value) * jnp.maximum(jnp.abs(value) - limit, jnp.zeros_like(value))

    return _proximal("soft_threshold", threshold, where, _each(shrink))


def hard_threshold(threshold: Threshold, *, where: Where | None = None) -> optax.GradientTransformationExtraArgs:
    """Apply the proximal operator of the l0 penalty to every weight: v where |v| > threshold, else 0.

    For learning rate r and penalty lambda times the number of nonzero weights, the threshold is sqrt(2 r lambda).

    Arguments, result and errors are those of ``soft_threshold``.

    Source: Blumensath & Davies, "Iterative Thresholding for Sparse Approximations", 2008, equation 2.2.

    >>> params = (jnp.array([3.0, -2.0, 0.5]),)
    >>> tx = hard_threshold(1.0, where=lambda path, leaf: True)
    >>> updates, _ = tx.update((jnp.zeros(3),), tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    (Array([ 3., -2.,  0.], dtype=float32),)
    """

    def cut(value: Array, limit: Array) -> Array:
        return jnp.where(jnp.abs(value) > limit, value, jnp.zeros_like(value))

    return _proximal("hard_threshold", threshold, where, _each(cut))


def group_soft_threshold(
    threshold: Threshold,
    *,
    where: Where | None = None,
    over: str = "outputs",
    axes: Axes = None,
    groups: Sequence[ChannelMembers] | None = None,
    by_size: bool | Array = True,
) -> optax.GradientTransformationExtraArgs:
    """Apply the proximal operator of the group lasso: v_g max(1 - threshold sqrt(size_g) / |v_g|, 0) for every group g.

    A group becomes zero as a whole. By default a group is all weights of one output of a kernel; with ``groups``, all
    weights of one channel in several leaves.

    The sets in ``groups`` may overlap: a kernel between two hidden layers has the channels of both. Each weight is then
    multiplied by the factors of all its groups, which come from the norms before any of them is applied. This is a
    heuristic: groups with a norm at most the threshold still become exactly zero, but the other weights differ from
    those of the proximal operator of the sum of the norms, for which overlapping groups have no closed form (Yuan, Liu
    & Ye, "Efficient Methods for Overlapping Group Lasso", NeurIPS 2011).

    Args:
      threshold: learning rate times penalty weight, 0 or more; or a function of the step.
      where: predicate on (path, leaf) that selects the leaves with the penalty; None as for ``prune``. Cannot be
        combined with ``groups``.
      over: ``"outputs"`` for one group per output of a kernel, ``"inputs"`` for one per input; the inputs of each
        feature group of a grouped convolution are separate.
      axes: the roles of the axes of each kernel: a graph, ``{regex: KernelAxes(...)}``, ``"flax"`` or ``"equinox"``.
      groups: sets of channels, each a sequence of (path, axis): weights with the same index along these axes form a
        group, for example ``[[("conv1/kernel", -1), ("conv1/bias", 0), ("conv2/kernel", -2)]]``; or the channels of a
        traced network, ``jprune.trace_model(apply, params, *inputs).channels``.
      by_size: multiply the threshold by sqrt(number of weights in the group).

    Returns:
      An optax transformation, the last one of its chain.

    Raises:
      TypeError: as ``soft_threshold``; ``groups`` has the wrong type, or ``where`` is given as well.
      ValueError: as ``soft_threshold``; ``over`` is unknown; the axes of a kernel are unknown, or it is read in two
        ways; ``groups`` is empty, names a leaf that the parameters lack, names one axis twice, or its sizes differ.

    Source: Yuan & Lin, "Model Selection and Estimation in Regression with Grouped Variables", 2006, equation 2.4;
    for channels, Wen et al., "Learning Structured Sparsity in Deep Neural Networks", 2016, arXiv 1608.03665 (without
    the factor sqrt(size_g): ``by_size=False``).

    >>> params = {"kernel": jnp.array([[3.0, 0.3], [4.0, 0.4]])}
    >>> tx = group_soft_threshold(1.0, by_size=False)
    >>> updates, _ = tx.update({"kernel": jnp.zeros((2, 2))}, tx.init(params), params)
    >>> optax.apply_updates(params, updates)
    {'kernel': Array([[2.4, 0. ],
           [3.2, 0. ]], dtype=float32)}
    """
    if not isinstance(by_size, bool | np.bool_) and not hasattr(by_size, "dtype"):
        raise TypeError(f"by_size={by_size!r} must be a bool")
    if groups is not None:
        if where is not None:
            raise TypeError("groups and where are both given; groups already names its leaves: leave where out")
        members = [_members(group) for group in _checked_groups(groups)]
        named = {member.path for group in members for member in group}
        prox = functools.partial(_shrink_channels, members, by_size)
        in_groups: Where = lambda path, leaf: path in named
        in_groups.__name__ = "groups"  # named in the error if it selects no leaf
        return _proximal("group_soft_threshold", threshold, in_groups, prox)
    if over not in ("outputs", "inputs"):
        raise ValueError(f"over={over!r} is unknown; use 'outputs' or 'inputs'")

    def shrink(arrays: _Arrays, limit: Array) -> _Arrays:
        roles, shrunk = kernel_axes(axes, arrays), {}
        for path, array in arrays.items():
            found = roles[path]
            if found is None:
                raise ValueError(unknown_axes(path, array.shape, f"a group has the weights of one of its {over}", axes))
            if found.tied:
                raise ValueError(
                    f"leaf '{path}' is read in two ways (tied weights), so its {over} are not separate groups; leave "
                    f"it out with where=jprune.by_path(exclude={f'^{re.escape(path)}$'!r}), or pass the channels of "
                    "the traced network as groups=graph.channels"
                )
            shrunk[path] = _shrink_kernel(array, found, over, limit, by_size)
        return shrunk

    return _proximal("group_soft_threshold", threshold, where_of(where, axes), shrink)


def _shrink_kernel(array: Array, roles: KernelAxes, over: str, limit: Array, by_size: bool | Array) -> Array:
    """Shrink the weights of each output or input of a kernel; inputs of different feature groups are different."""
    order = (*roles.stacked, *(roles.outputs if over == "outputs" else roles.inputs))
    if over == "inputs" and roles.groups > 1:
        # Feature groups are consecutive outputs: split the outputs into (groups, outputs of a group).
        rest = tuple(axis for axis in range(array.ndim) if axis not in (*order, *roles.outputs))
        arranged = jnp.transpose(array, (*order, *roles.outputs, *rest))
        lead, tail = [array.shape[axis] for axis in order], [array.shape[axis] for axis in rest]
        split = arranged.reshape(*lead, roles.groups, -1, *tail)
        others = tuple(range(len(lead) + 1, split.ndim))
        shrunk = _shrink_over(split, others, limit, by_size).reshape(arranged.shape)
        return jnp.transpose(shrunk, np.argsort((*order, *roles.outputs, *rest)).tolist())
    return _shrink_over(array, tuple(axis for axis in range(array.ndim) if axis not in order), limit, by_size)


def _shrink_over(array: Array, others: tuple[int, ...], limit: Array, by_size: bool | Array) -> Array:
    squares = jnp.sum(jnp.square(array), axis=others, keepdims=True)
    return array * _factor(squares, limit, math.prod(array.shape[axis] for axis in others), by_size)


class _Part(NamedTuple):
    """An axis of a leaf; ``indices`` (channels, indices) has those of each channel, None if each channel has one."""

    path: str
    axis: int
    indices: Int32[np.ndarray, "channels indices"] | None


def _checked_groups(groups: object) -> Sequence[ChannelMembers]:
    wanted = "it must be graph.channels, or for each group a list of (path, axis)"
    if isinstance(groups, str) or not isinstance(groups, Sequence):
        raise TypeError(f"groups={groups!r} is {with_article(groups)}; {wanted}")
    if not groups:
        raise ValueError(f"groups is empty; {wanted}")
    for group in groups:
        pairs = isinstance(group, list | tuple) and all(
            isinstance(pair, list | tuple) and len(pair) == 2 for pair in group
        )
        if not isinstance(group, ChannelGroup) and not pairs:
            raise TypeError(f"groups has {group!r}; {wanted}")
    return groups


def _members(group: ChannelMembers) -> list[_Part]:
    if isinstance(group, ChannelGroup):
        return [_Part(member.path, member.axis, member.indices) for member in group.members]
    return [_Part(path, axis, None) for path, axis in group]


def _shrink_channels(
    members: Sequence[Sequence[_Part]], by_size: bool | Array, arrays: _Arrays, limit: Array
) -> _Arrays:
    shrunk = dict(arrays)
    for group in members:
        used = _checked(group, arrays)
        dtype = working_dtype(limit, *(arrays[path] for path, _, _ in used))
        squares, size = [], 0
        for path, axis, indices in used:
            others = tuple(a for a in range(arrays[path].ndim) if a != axis)
            along = jnp.sum(jnp.square(arrays[path].astype(dtype)), axis=others)
            squares.append(jnp.sum(along[indices], axis=1))
            size += math.prod(arrays[path].shape[a] for a in others) * indices.shape[1]
        factor = _factor(functools.reduce(jnp.add, squares), limit, size, by_size)
        # The additional entry is for indices that belong to no channel of the group.
        factors = jnp.concatenate([factor, jnp.ones_like(factor, shape=(1,))])
        for path, axis, indices in used:
            shape = [1] * arrays[path].ndim
            shape[axis] = arrays[path].shape[axis]
            channel = np.full(shape[axis], len(indices))
            channel[indices] = np.arange(len(indices))[:, None]
            shrunk[path] = shrunk[path] * factors[channel].reshape(shape).astype(shrunk[path].dtype)
    return shrunk


def _checked(
    group: Sequence[_Part], arrays: Mapping[str, Array]
) -> list[tuple[str, int, Int32[np.ndarray, "channels indices"]]]:
    """Check the members; return them with nonnegative axes and the indices of every channel."""
    used: dict[tuple[str, int], Int32[np.ndarray, "channels indices"]] = {}
    for path, axis, indices in group:
        if path not in arrays:
            raise ValueError(
                f"groups names '{path}', which is not a float leaf; use one of {', '.join(map(repr, arrays))}"
            )
        shape = arrays[path].shape
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"groups has axis {axis} of '{path}', which has shape {shape}")
        place = path, axis % len(shape)
        if place in used:
            raise ValueError(f"groups names axis {axis} of '{path}' twice; name it once")
        used[place] = np.arange(shape[axis], dtype=np.int32)[:, None] if indices is None else np.asarray(indices)
        if np.any(used[place] >= shape[axis]):
            raise ValueError(
                f"groups has index {used[place].max()} of axis {axis} of '{path}', which has shape {shape}"
            )
    if len({len(indices) for indices in used.values()}) > 1:
        sizes = ", ".join(f"{len(indices)} ('{path}', axis {axis})" for (path, axis), indices in used.items())
        raise ValueError(f"groups has a set of channels whose sizes differ: {sizes}; they must be equal")
    return [(path, axis, indices) for (path, axis), indices in used.items()]


def _factor(
    squares: Float[Array, "..."], limit: Float[Array, ""], size: int, by_size: bool | Array
) -> Float[Array, "..."]:
    """Return max(1 - limit sqrt(size) / norm, 0), exactly 0 where the norm is 0; without ``by_size`` the size is 1."""
    norm = jnp.sqrt(squares)
    limit = limit.astype(norm.dtype) * jnp.where(by_size, math.sqrt(size), 1.0).astype(norm.dtype)
    safe = jnp.where(norm > limit, norm, jnp.ones_like(norm))
    return jnp.where(norm > limit, 1 - limit / safe, jnp.zeros_like(norm))


def _each(prox: Callable[[Array, Array], Array]) -> Callable[[_Arrays, Array], _Arrays]:
    return lambda arrays, limit: {path: prox(array, limit.astype(array.dtype)) for path, array in arrays.items()}


def _check_threshold(name: str, value: object) -> None:
    """Raise unless the value is one nonnegative number; the value of a traced number is not checked."""
    wanted = "must be one number, 0 or more (learning rate times penalty weight), or a function of the step"
    number = isinstance(value, int | float) or hasattr(value, "dtype")
    if isinstance(value, bool) or not number or getattr(value, "ndim", 0) > 0:
        raise TypeError(f"{name}={value!r} {wanted}")
    if not isinstance(value, jax.core.Tracer) and not 0 <= float(np.asarray(value)) < math.inf:
        raise ValueError(f"{name}={value!r} {wanted}")


def _proximal(
    name: str, threshold: Threshold, where: Where | None, prox: Callable[[_Arrays, Array], _Arrays]
) -> optax.GradientTransformationExtraArgs:
    """Return the transformation that computes prox(p + u) - p for the leaves that ``where`` selects."""
    if not callable(threshold):
        _check_threshold("threshold", threshold)
    chosen = kernels if where is None else where

    def init(params: PyTree) -> ProximalState:
        if is_placeholder(params):
            return ProximalState(jnp.zeros([], jnp.int32))
        if callable(threshold):
            _check_threshold("threshold(step=0)", threshold(jnp.zeros([], jnp.int32)))
        paths, leaves, _ = flatten(only(params, chosen))
        for path, leaf in zip(paths, leaves, strict=True):
            if leaf is not None:
                refuse_sum(path, leaf.dtype, working_dtype(leaf))
        shapes = {path: leaf for path, leaf in zip(paths, leaves, strict=True) if leaf is not None}
        with known_shapes(shapes_of(params)):
            jax.eval_shape(prox, shapes, jnp.zeros([], jnp.float32))  # raises for groups that do not fit
        return ProximalState(jnp.zeros([], jnp.int32))

    def update(
        updates: PyTree, state: ProximalState, params: PyTree = None, **_: object
    ) -> tuple[PyTree, ProximalState]:
        if params is None:
            raise ValueError(f"{name} needs params: call update(updates, state, params)")
        limit = jnp.asarray(threshold(state.count) if callable(threshold) else threshold)
        limit = limit.astype(working_dtype(limit))
        paths, given, treedef = flatten(updates)
        weights = match(updates, params, reference_name="updates", name="params")
        moved, old = {}, {}
        for path, step, weight in zip(paths, given, weights, strict=True):
            if step is not None and is_float(weight) and chosen(path, weight):
                dtype = working_dtype(step, weight)
                old[path] = jnp.asarray(weight, dtype)
                moved[path] = old[path] + jnp.asarray(step, dtype)
        with known_shapes(shapes_of(params)):
            shrunk = prox(moved, limit)
        changed = {path: jnp.where(value == 0, -old[path], value - old[path]) for path, value in shrunk.items()}
        steps = [changed.get(path, step) for path, step in zip(paths, given, strict=True)]
        return jax.tree.unflatten(treedef, steps), ProximalState(optax.safe_increment(state.count))

    return optax.GradientTransformationExtraArgs(init, update)
