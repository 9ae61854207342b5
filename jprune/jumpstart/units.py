"""Compute the status of units and points (dead, linear or nonlinear), and summaries of a network.

A rectified unit is dead on a data set if none of its preactivations is positive, linear if all are, and nonlinear
otherwise. The status of a point (an example) in a layer is defined in the same way over the layer's units.

Source: Riera, Puertas, Pujol, "Unit-Centric Regularization for Efficient Deep Neural Networks",
IEEE Access 2025.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, Float, Int

from jprune.jumpstart import layers

DEAD, LINEAR, NONLINEAR = -1, 0, 1


def unit_status(preacts: layers.Preactivations, examples: ArrayLike | None = None) -> layers.Statuses:
    """Return the status of every unit over a batch: -1 dead (max <= 0), 0 linear (min > 0), 1 nonlinear.

    Args:
      preacts: preactivations of each layer (batch, ..., units), as for ``jumpstart_penalty``. A unit is a channel; its
        status is over the batch and space.
      examples: mask of the real examples or positions, as for ``jumpstart_penalty``, with at least one True.

    Returns:
      A container like ``preacts`` of int8 (units,), or (layers, units) for a ``Stack``. A unit with a NaN is nonlinear.

    Raises:
      TypeError: preactivations or masks have the wrong type or dtype.
      ValueError: shapes do not match; outside jit, all examples are padding.

    >>> unit_status([jnp.array([[-1.0, 0.5, -2.0], [0.0, 1.0, 3.0]])])
    [Array([-1,  0,  1], dtype=int8)]
    """
    statuses = []
    for name, entry in layers.check(preacts):
        z = _spread(entry)
        mask = None if examples is None else _example_mask(name, entry, examples)
        statuses.append(_like(entry, _status(z, mask, (1, 2))))
    return layers.like(preacts, statuses)


def point_status(
    preacts: layers.Preactivations, units: layers.Masks = None, examples: ArrayLike | None = None
) -> layers.Statuses:
    """Return the status of every point in every layer: -1 dead (max <= 0), 0 linear (min > 0), 1 nonlinear.

    Args:
      preacts: preactivations of each layer (batch, ..., units), as for ``jumpstart_penalty``. A point is an example;
        its status is over units and space.
      units: mask of the real units, as for ``jumpstart_penalty``; at least one in each layer.
      examples: mask of the real examples or positions, as for ``jumpstart_penalty``, with at least one True. The status
        of an example without a real position means nothing: leave it out of ``activity`` by its ``examples``.

    Returns:
      A container like ``preacts`` of int8 (batch,), or (layers, batch) for a ``Stack``.

    Raises:
      TypeError: preactivations or masks have the wrong type or dtype.
      ValueError: shapes do not match; outside jit, all units of a layer or all examples are padding.

    >>> point_status([jnp.array([[-1.0, 0.0], [0.5, 2.0], [-1.0, 2.0]])])
    [Array([-1,  0,  1], dtype=int8)]
    """
    statuses = []
    named = layers.check(preacts)
    for (name, entry), given in zip(named, layers.unit_masks(units, preacts), strict=True):
        z = _spread(entry)
        mask = None if given is None else _unit_mask(name, z, given)
        if examples is not None:
            real = _example_mask(name, entry, examples)
            mask = real if mask is None else mask & real
        statuses.append(_like(entry, _status(z, mask, (2, 3))))
    return layers.like(preacts, statuses)


def merge_unit_status(status: layers.Statuses, other: layers.Statuses) -> layers.Statuses:
    """Merge the unit statuses of two parts of a data set; units with different statuses are nonlinear.

    The result is the status over both parts together. For points, concatenate the statuses instead.

    Args:
      status: result of ``unit_status`` for one part.
      other: result for another part.

    Returns:
      The same container, int8.

    Raises:
      ValueError: the two have different layers or numbers of units.

    >>> merge_unit_status([jnp.array([-1, -1, 0], jnp.int8)], [jnp.array([-1, 0, 0], jnp.int8)])
    [Array([-1,  1,  0], dtype=int8)]
    """
    one: object = jax.tree.structure(status)
    two: object = jax.tree.structure(other)
    if one != two:
        raise ValueError(f"the statuses are of different layers: {one} and {two}; merge statuses of one model")

    def merged(a: ArrayLike, b: ArrayLike) -> Array:
        if jnp.shape(a) != jnp.shape(b):
            shapes = f"{jnp.shape(a)} and {jnp.shape(b)}"
            raise ValueError(f"the statuses of a layer have shapes {shapes}; merge statuses of one model")
        return jnp.where(jnp.asarray(a) == jnp.asarray(b), jnp.asarray(a), jnp.asarray(NONLINEAR, jnp.int8))

    return jax.tree.map(merged, status, other)


class Activity(NamedTuple):
    """Fractions of units, points and (point, layer) cells by status, from 0 to 1.

    Attributes:
      unit_dead_ratio: fraction of units that are dead.
      unit_linear_ratio: fraction of units that are linear.
      unit_nonlinear_ratio: fraction of units that are nonlinear.
      point_dead_ratio: fraction of points that are dead in any layer.
      point_linear_ratio: fraction of points that are linear in every layer.
      point_nonlinear_ratio: fraction of points that are nonlinear in every layer.
      deathness: fraction of (point, layer) cells in which the point is dead.
      linearity: fraction of cells in which the point is linear.
      nonlinearity: fraction of cells in which the point is nonlinear.
      point_efficiency: fraction of cells after the point's last dead layer. A layer in which a point is dead loses all
        information about it, so every layer up to that one counts as dead.
    """

    unit_dead_ratio: Array | float
    unit_linear_ratio: Array | float
    unit_nonlinear_ratio: Array | float
    point_dead_ratio: Array | float
    point_linear_ratio: Array | float
    point_nonlinear_ratio: Array | float
    deathness: Array | float
    linearity: Array | float
    nonlinearity: Array | float
    point_efficiency: Array | float


class PointCounts(NamedTuple):
    """Integer counts of points and of (point, layer) cells; the counts of parts of a data set can be added.

    Attributes:
      points: number of points.
      dead: points dead in any layer.
      linear: points linear in every layer.
      nonlinear: points nonlinear in every layer.
      dead_cells: points dead, by layer (layers,).
      linear_cells: points linear, by layer (layers,).
      nonlinear_cells: points nonlinear, by layer (layers,).
      efficient_cells: cells after the point's last dead layer.
    """

    points: Array
    dead: Array
    linear: Array
    nonlinear: Array
    dead_cells: Array
    linear_cells: Array
    nonlinear_cells: Array
    efficient_cells: Array


def activity(
    unit_statuses: layers.Statuses,
    point_statuses: layers.Statuses,
    units: layers.Masks = None,
    examples: ArrayLike | None = None,
) -> Activity:
    """Return the fractions of dead, linear and nonlinear units and points of a network on a data set.

    Args:
      unit_statuses: unit statuses by layer, merged over the data set.
      point_statuses: point statuses by layer (points,), of the whole data set, in call order.
      units: mask of the real units: bool (units,) for every layer, or a container of masks like ``unit_statuses``.
      examples: mask of the real points, bool (points,).

    Returns:
      An ``Activity`` of float32 scalars.

    Raises:
      TypeError: the statuses are a plain dict of several layers, whose order is lost under jit.
      ValueError: the layers have different numbers of points, or the numbers of layers differ.

    >>> unit = [jnp.array([-1, 1], jnp.int8), jnp.array([0, 1], jnp.int8)]
    >>> point = [jnp.array([1, -1], jnp.int8), jnp.array([0, 1], jnp.int8)]
    >>> found = activity(unit, point)
    >>> float(found.unit_dead_ratio), float(found.point_dead_ratio), float(found.point_efficiency)
    (0.25, 0.5, 0.75)
    """
    counts = count_points(point_statuses, examples)
    unit = count_units(unit_statuses, units).sum(axis=1)
    of_units, of_points = len(layers.unstack(unit_statuses)), counts.dead_cells.shape[0]
    if of_units != of_points:
        raise ValueError(
            f"unit_statuses has {of_units} layers and point_statuses {of_points}; pass both for the same layers"
        )
    return ratios(unit, counts)


def count_units(unit_statuses: layers.Statuses, units: layers.Masks = None) -> Int[Array, "status layers"]:
    """Count the dead, linear and nonlinear units of each layer, in these three rows."""
    masks = layers.unit_masks(units, unit_statuses)
    columns = []
    for (_, entry), given in zip(layers.entries(unit_statuses), masks, strict=True):
        status = jnp.atleast_2d(entry.values if isinstance(entry, layers.Stack) else jnp.asarray(entry))
        mask = jnp.ones((1, status.shape[1]), bool) if given is None else jnp.atleast_2d(jnp.asarray(given))
        columns.append(jnp.stack([((status == s) & mask).sum(axis=1) for s in (DEAD, LINEAR, NONLINEAR)]))
    return jnp.concatenate(columns, axis=1)


def count_points(point_statuses: layers.Statuses, examples: ArrayLike | None = None) -> PointCounts:
    """Count points and (point, layer) cells by status; arguments as for ``activity``."""
    table = point_table(point_statuses)
    real = jnp.ones((1, table.shape[1]), bool)
    if examples is not None:
        layers.check_mask("examples", examples, [(table.shape[1],)])
        real = jnp.asarray(examples)[None, :]
    dead, linear, nonlinear = (table == status for status in (DEAD, LINEAR, NONLINEAR))
    blocked = jnp.flip(jnp.cumsum(jnp.flip(dead, axis=0), axis=0), axis=0) > 0  # dead in this layer or a later one
    return PointCounts(
        points=real.sum(),
        dead=(dead.any(axis=0)[None, :] & real).sum(),
        linear=(linear.all(axis=0)[None, :] & real).sum(),
        nonlinear=(nonlinear.all(axis=0)[None, :] & real).sum(),
        dead_cells=(dead & real).sum(axis=1),
        linear_cells=(linear & real).sum(axis=1),
        nonlinear_cells=(nonlinear & real).sum(axis=1),
        efficient_cells=(~blocked & real).sum(),
    )


def ratios(unit: Array | np.ndarray, counts: PointCounts) -> Activity:
    """Convert counts to ratios: (dead, linear, nonlinear) units of all layers, and points."""
    depth = counts.dead_cells.shape[0]
    points = jnp.asarray(counts.points, jnp.float32)
    cells = points * depth
    units = jnp.asarray(unit.sum(), jnp.float32)

    def share(count: ArrayLike, of: Array) -> Array:
        ratio: Array = jnp.asarray(count, jnp.float32) / of
        return ratio

    return Activity(
        unit_dead_ratio=share(unit[0], units),
        unit_linear_ratio=share(unit[1], units),
        unit_nonlinear_ratio=share(unit[2], units),
        point_dead_ratio=share(counts.dead, points),
        point_linear_ratio=share(counts.linear, points),
        point_nonlinear_ratio=share(counts.nonlinear, points),
        deathness=share(counts.dead_cells.sum(), cells),
        linearity=share(counts.linear_cells.sum(), cells),
        nonlinearity=share(counts.nonlinear_cells.sum(), cells),
        point_efficiency=share(counts.efficient_cells, cells),
    )


def point_table(point_statuses: layers.Statuses) -> Int[Array, "layers points"]:
    """Stack the point statuses of all layers.

    Raises:
      TypeError: the statuses are a plain dict of several layers, whose order is lost under jit.
      ValueError: the layers have different numbers of points.
    """
    layers.refuse_unordered(point_statuses, "point_statuses")
    rows = [(name, jnp.asarray(status)) for name, status in layers.unstack(point_statuses)]
    for name, row in rows:
        if row.shape != rows[0][1].shape or row.ndim != 1:
            raise ValueError(
                f"point_statuses have shape {row.shape} in layer '{name}' and {rows[0][1].shape} in layer"
                f" '{rows[0][0]}'; every layer must have the same (points,)"
            )
    return jnp.stack([row for _, row in rows])


def trainability(accuracy: Float[np.ndarray, "techniques datasets"]) -> Float[np.ndarray, " techniques"]:
    """Return the fraction of data sets on which a technique's accuracy is strictly above the worst of all techniques.

    Args:
      accuracy: each technique's best validation accuracy on each data set.

    Returns:
      One fraction per technique, 0 to 1.

    Raises:
      ValueError: an accuracy is NaN, or the array has another shape.

    >>> trainability(np.array([[0.9, 0.8], [0.5, 0.8]]))
    array([0.5, 0. ])
    """
    best = _accuracies(accuracy)
    return np.asarray((best > best.min(axis=0, keepdims=True)).mean(axis=1))


def convergence(accuracy: Float[np.ndarray, "techniques datasets"]) -> Float[np.ndarray, " techniques"]:
    """Return the mean difference between a technique's accuracy and the best of all techniques: 0 or less.

    Args:
      accuracy: each technique's best validation accuracy on each data set.

    Returns:
      One mean difference per technique, in the unit of the accuracies.

    Raises:
      ValueError: an accuracy is NaN, or the array has another shape.

    >>> convergence(np.array([[0.75, 0.5], [0.5, 0.75]]))
    array([-0.125, -0.125])
    """
    best = _accuracies(accuracy)
    return np.asarray((best - best.max(axis=0, keepdims=True)).mean(axis=1))


def _accuracies(accuracy: ArrayLike) -> np.ndarray:
    best = np.asarray(accuracy, np.float64)
    if best.ndim != 2 or 0 in best.shape:
        raise ValueError(f"accuracy must have shape (techniques, datasets) with one or more of each, got {best.shape}")
    if np.isnan(best).any():
        technique, dataset = np.argwhere(np.isnan(best))[0]
        raise ValueError(f"accuracy of technique {technique} on data set {dataset} is NaN; pass every accuracy")
    return best


def _spread(entry: layers.Entry) -> Array:
    """Reshape a layer to (layers, batch, space, units)."""
    z = jnp.asarray(entry.values if isinstance(entry, layers.Stack) else entry[None])
    return z.reshape((*z.shape[:2], -1, z.shape[-1]))


def _like(entry: layers.Entry, status: Array) -> layers.Entry:
    return layers.Stack(status) if isinstance(entry, layers.Stack) else status[0]


def _status(z: Array, mask: Array | None, axes: tuple[int, ...]) -> Array:
    highest = (z if mask is None else jnp.where(mask, z, -jnp.inf)).max(axis=axes)
    lowest = (z if mask is None else jnp.where(mask, z, jnp.inf)).min(axis=axes)
    status = jnp.where(highest <= 0, DEAD, jnp.where(lowest > 0, LINEAR, NONLINEAR))
    return status.astype(jnp.int8)


def _example_mask(name: str, entry: layers.Entry, examples: ArrayLike) -> Array:
    """Return the mask in the axes of ``_spread``."""
    shape = entry.values.shape[1:] if isinstance(entry, layers.Stack) else entry.shape
    mask = layers.example_mask(name, examples, shape)
    if not isinstance(examples, jax.core.Tracer) and not np.any(examples):
        raise ValueError("examples is False everywhere; at least one example must be real")
    return jnp.broadcast_to(mask, shape[:-1]).reshape((1, shape[0], -1, 1))


def _unit_mask(name: str, z: Array, units: ArrayLike) -> Array:
    if not isinstance(units, jax.core.Tracer) and not np.reshape(units, (-1, z.shape[-1])).any(axis=1).all():
        raise ValueError(f"units is False everywhere in layer '{name}'; at least one unit must be real")
    return jnp.asarray(units).reshape((-1, 1, 1, z.shape[-1]))
