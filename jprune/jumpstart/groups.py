"""Arrange layers for the penalty: stack small ones of the same shape, choose the order of axes, leave out padding.

This module handles shapes and masks; ``extremes.py`` and ``penalty.py`` compute.
"""

import math
from collections.abc import Hashable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, ArrayLike

from jprune.jumpstart import layers

# Layers up to this size are stacked with those of the same shape: one kernel for all of them halves the step time of a
# thin, deep network. Larger layers are not stacked, because stacking copies them.
_STACK_UP_TO = 1 << 16

# Images with fewer channels than this are processed with the batch as the last axis, as are images with exactly this
# many channels if the batch is larger than the image. On a CPU vectors are then as long as the batch, and convolutions
# of few channels compute in the same layout. On other devices the layout makes no difference.
_FEW_CHANNELS = 16


class Group(NamedTuple):
    """Layers of one shape: (layers, batch, *space, units), masks (layers, units) and (batch,) or None.

    With ``batch_last`` they are (layers, units, *space, batch).
    """

    z: Array
    units: Array | None
    examples: Array | None
    batch_last: bool = False

    @property
    def sizes(self) -> tuple[int, int, int]:
        """The numbers of layers, examples and units."""
        depth, first, *_, last = self.z.shape
        return (depth, last, first) if self.batch_last else (depth, first, last)


def grouped(preacts: layers.Preactivations, units: layers.Masks, examples: ArrayLike | None) -> list[Group]:
    """Arrange layers in groups; small layers of equal shape share one."""
    named = layers.check(preacts)
    masks = layers.unit_masks(units, preacts)
    by_shape: dict[Hashable, list[tuple[Array, Array | None]]] = {}
    for (name, entry), given in zip(named, masks, strict=True):
        values = entry.values if isinstance(entry, layers.Stack) else entry[None]
        depth, batch, *_, width = values.shape
        if examples is not None:
            layers.check_mask(f"examples (for layer '{name}')", examples, [(batch,)])
        mask = None if given is None else jnp.broadcast_to(jnp.asarray(given).reshape((-1, width)), (depth, width))
        z = jnp.asarray(values)
        small = math.prod(z.shape[1:]) <= _STACK_UP_TO
        kind = (z.shape[1:], z.dtype, mask is None, None if small else len(by_shape))
        by_shape.setdefault(kind, []).append((z, mask))
    examples = None if examples is None else jnp.asarray(examples)
    return [
        Group(
            _joined([z for z, _ in same]),
            None if same[0][1] is None else _joined([m for _, m in same if m is not None]),
            examples,
        )
        for same in by_shape.values()
    ]


def _joined(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else jnp.concatenate(arrays)


def arranged(group: Group) -> Group:
    """Choose the order of the axes of a group: the batch last for images of few channels."""
    depth, batch, *space, width = group.z.shape
    if not space or width >= _FEW_CHANNELS + (batch > math.prod(space)):
        return group
    # Without the axis of layers the compiler can cancel this with the transposition of a convolution.
    z = group.z[0].swapaxes(0, -1)[None] if depth == 1 else group.z.swapaxes(1, -1)
    return group._replace(z=z, batch_last=True)


def cells(group: Group, units: Array | None) -> Array | None:
    """Return the mask of real cells of a layer, broadcastable to its preactivations; None for all."""
    if units is None and group.examples is None:
        return None
    _, batch, width = group.sizes
    ones = (1,) * (group.z.ndim - 3)
    valid = jnp.ones((1, *ones, 1), bool) if units is None else units.reshape((1, *ones, width))
    if group.examples is not None:
        valid = valid & group.examples.reshape((batch, *ones, 1))
    return valid.swapaxes(0, -1) if group.batch_last else valid


def real(group: Group, axis: str, axis_name: Hashable, *, pooled: bool) -> Array | None:
    """Return which units (L, C), points (L, B) or layers (L,) have a real cell; None for all.

    Without pooling, units and points have the axes of space too, where ``z`` has them.
    """
    if group.units is None and group.examples is None:
        return None
    depth, batch, width = group.sizes
    units = jnp.ones((depth, width), bool) if group.units is None else group.units
    examples = jnp.ones((batch,), bool) if group.examples is None else group.examples
    if axis == "point":
        found = units.any(axis=1)[:, None] & examples[None, :]
    else:
        some = examples.any()
        if axis_name is not None:
            some = lax.pmax(some.astype(jnp.int32), axis_name) > 0  # type: ignore[no-untyped-call]
        found = units & some[None, None] if axis == "unit" else units.any(axis=1) & some[None]
    space = group.z.shape[2:-1]
    if pooled or not space:
        return found
    space_last = (axis == "unit") == group.batch_last
    shape = (*found.shape, *space) if space_last else (depth, *space, found.shape[1])
    return lax.broadcast_in_dim(found, shape, (0, 1 if space_last else len(shape) - 1))
