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
    """Layers of one shape: (layers, batch, *space, units), masks (layers, units) and (batch, *space) or None.

    The axes of space of the mask ``examples`` may be 1. With ``batch_last``, ``z`` is (layers, units, *space, batch).
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
    by_shape: dict[Hashable, list[tuple[Array, Array | None, Array | None]]] = {}
    for (name, entry), given in zip(named, masks, strict=True):
        values = entry.values if isinstance(entry, layers.Stack) else entry[None]
        depth, *shape = values.shape
        width = shape[-1]
        real = None if examples is None else layers.example_mask(name, examples, tuple(shape))
        mask = None if given is None else jnp.broadcast_to(jnp.asarray(given).reshape((-1, width)), (depth, width))
        z = jnp.asarray(values)
        small = math.prod(z.shape[1:]) <= _STACK_UP_TO
        kind = (z.shape[1:], z.dtype, mask is None, None if small else len(by_shape))
        by_shape.setdefault(kind, []).append((z, mask, real))
    return [
        Group(
            _joined([z for z, _, _ in same]),
            None if same[0][1] is None else _joined([m for _, m, _ in same if m is not None]),
            same[0][2],
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
    ones = (1,) * (group.z.ndim - 2)
    valid = jnp.ones((*ones, 1), bool) if units is None else units.reshape((*ones, -1))
    if group.examples is not None:
        valid = valid & group.examples[..., None]
    return valid.swapaxes(0, -1) if group.batch_last else valid


def real(group: Group, axis: str, axis_name: Hashable, *, pooled: bool) -> Array | None:
    """Return which units (L, C), points (L, B) or layers (L,) have a real cell; None for all.

    Without pooling, units and points have the axes of space too, where ``z`` has them.
    """
    if group.units is None and group.examples is None:
        return None
    depth, batch, width = group.sizes
    space = () if pooled else group.z.shape[2:-1]
    units = jnp.ones((depth, width), bool) if group.units is None else group.units
    examples = jnp.ones((batch, *(1,) * len(space)), bool) if group.examples is None else group.examples
    if pooled:
        examples = examples.any(axis=tuple(range(1, examples.ndim)))
    examples = jnp.broadcast_to(examples, (batch, *space))
    ones = (1,) * len(space)
    if axis == "point":
        found = units.any(axis=1).reshape((depth, 1, *ones)) & examples[None]
        return jnp.moveaxis(found, 1, -1) if group.batch_last else found
    some = examples.any(axis=0)
    if axis_name is not None:
        some = lax.pmax(some.astype(jnp.int32), axis_name) > 0  # type: ignore[no-untyped-call]
    if axis == "layer":
        return units.any(axis=1) & some[None]
    found = units.reshape((depth, *ones, width)) & some[None, ..., None]
    return jnp.moveaxis(found, -1, 1) if group.batch_last else found
