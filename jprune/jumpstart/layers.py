"""Containers of preactivations: the names, arrays and masks of layers.

A layer is an array of preactivations, channels last: (batch, units) or (batch, height, width, units) with any number of
spatial axes. Layers are in call order, in an ``OrderedDict`` or a sequence. Layers of equal shape may be one ``Stack``,
as ``lax.scan`` over layers returns them.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from jprune.trees import is_array, with_article

# An OrderedDict or a sequence of arrays (batch, ..., units) and Stacks, or one of these alone.
Preactivations: TypeAlias = PyTree
# The same of bool arrays (units,), one such array for all layers, or None.
Masks: TypeAlias = PyTree
# The same of int8 arrays: the status of each unit or point.
Statuses: TypeAlias = PyTree
# An array or a Stack.
Entry: TypeAlias = PyTree


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Stack:
    """Layers of equal shape in one array with a leading axis of layers, equivalent to the list of its slices.

    A ``Stack`` of (layers, batch, ..., units) can replace its layers, in that order, in a list, as a value of an
    ``OrderedDict``, or alone. Its mask of ``units`` is (units,), the same for each layer, or (layers, units). It
    compiles and runs faster than the list.

    Attributes:
      values: the preactivations (layers, batch, ..., units).

    >>> [name for name, _ in unstack([jnp.zeros((4, 3)), Stack(jnp.zeros((2, 4, 3)))])]
    ['0', '1[0]', '1[1]']
    """

    values: PyTree


def entries(layers: PyTree) -> list[tuple[str, Entry]]:
    """Name the entries of a container of layers: by key, by position, or '' for a single layer.

    Raises:
      TypeError: ``layers`` is not a mapping, sequence, ``Stack`` or array.
      ValueError: there are no layers.
    """
    if isinstance(layers, Stack) or is_array(layers):
        return [("", layers)]
    if isinstance(layers, Mapping):
        named = [(str(key), value) for key, value in layers.items()]
    elif isinstance(layers, Sequence) and not isinstance(layers, str):
        named = [(str(position), value) for position, value in enumerate(layers)]
    else:
        raise TypeError(
            f"layers must be an OrderedDict or a list of arrays, an array or a Stack, not {type(layers).__name__}"
        )
    if not named:
        raise ValueError("preactivations is empty; pass at least one layer")
    return named


def like(layers: PyTree, values: list[Entry]) -> PyTree:
    """Put the values, one per entry, into a container like ``layers``.

    >>> like([1, 2], ["a", "b"]), like({"x": 1}, ["a"])
    (['a', 'b'], {'x': 'a'})
    """
    if isinstance(layers, Stack) or is_array(layers):
        return values[0]
    if isinstance(layers, OrderedDict):
        return OrderedDict(zip(layers, values, strict=True))
    if isinstance(layers, Mapping):
        return dict(zip(layers, values, strict=True))
    return values


def refuse_unordered(layers: PyTree, argument: str) -> None:
    """Raise for a plain dict of several layers, for functions that depend on their order.

    jax sorts the keys of a dict that passes through a transformation, so the call order of the layers is lost under
    jit. An ``OrderedDict`` keeps it.

    Raises:
      TypeError: a mapping of two or more entries that is not an ``OrderedDict``.
    """
    if isinstance(layers, Mapping) and not isinstance(layers, OrderedDict) and len(layers) > 1:
        raise TypeError(
            f"{argument} is {with_article(layers)} of {len(layers)} layers, which loses their order under jit;"
            " pass a collections.OrderedDict or a list, because the order matters here"
        )


def unstack(layers: PyTree) -> list[tuple[str, Array | np.ndarray]]:
    """Name every single layer, the members of a ``Stack`` as name[0], name[1], ..."""
    named = []
    for name, value in entries(layers):
        if isinstance(value, Stack):
            named += [(f"{name}[{i}]", value.values[i]) for i in range(value.values.shape[0])]
        else:
            named.append((name, value))
    return named


def check(layers: Preactivations) -> list[tuple[str, Entry]]:
    """Check that each entry is an array of preactivations, and return the named entries.

    Raises:
      TypeError: an entry is not an array, or its dtype is not a real float.
      ValueError: an entry has too few axes or an axis of size 0.
    """
    named = entries(layers)
    for name, entry in named:
        label = f"preactivations of layer '{name}'" if name else "preactivations"
        array = entry.values if isinstance(entry, Stack) else entry
        least = 3 if isinstance(entry, Stack) else 2
        if not is_array(array):
            raise TypeError(
                f"{label} is {with_article(array)}; pass one array (batch, ..., units) or Stack for each layer, "
                "without nested lists or dicts"
            )
        if not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError(f"{label} have dtype {array.dtype}; allowed: real floating dtypes")
        if len(array.shape) < least:
            wanted = "(layers, batch, ..., units)" if least == 3 else "(batch, ..., units)"
            raise ValueError(f"{label} have shape {array.shape}; allowed: {wanted}")
        if 0 in array.shape:
            raise ValueError(f"{label} have shape {array.shape}; every axis needs at least one entry")
    return named


def unit_masks(units: Masks, layers: PyTree) -> list[ArrayLike | None]:
    """Match ``units`` to the entries of ``layers``: one mask per entry, or None.

    Args:
      units: ``None``; one bool array for every layer; or a mapping or sequence like ``layers``, each
        value a bool (units,), for a ``Stack`` also (layers, units), or ``None``.
      layers: the container of preactivations that the masks belong to.

    Raises:
      TypeError: a mask is not a bool array, or a sequence of masks is given for a plain dict.
      ValueError: a mask has the wrong shape, or the masks are for other layers.
    """
    named = entries(layers)
    if units is None or is_array(units):
        masks = [units] * len(named)
    elif isinstance(units, Mapping):
        if not isinstance(layers, Mapping):
            raise TypeError(f"units is {with_article(units)}, and preactivations has no names to match it to")
        unknown = [str(key) for key in units if key not in layers]
        if unknown:
            raise ValueError(f"units names the layer '{unknown[0]}'; the layers are {[name for name, _ in named]}")
        masks = [units.get(key) for key in layers]
    elif not isinstance(units, Sequence):
        raise TypeError(f"units must be a bool array, or a sequence or mapping of them, not {type(units).__name__}")
    else:
        refuse_unordered(layers, "preactivations, with a list of units,")
        masks = list(units)
        if len(masks) != len(named):
            raise ValueError(f"units has {len(masks)} masks for {len(named)} layers; the numbers must be equal")
    for (name, entry), mask in zip(named, masks, strict=True):
        _check_unit_mask(name, entry, mask)
    return masks


def _check_unit_mask(name: str, entry: Entry, mask: PyTree) -> None:
    if mask is None:
        return
    if isinstance(entry, Stack):
        allowed = [entry.values.shape[-1:], (entry.values.shape[0], entry.values.shape[-1])]
    else:
        allowed = [entry.shape[-1:]]
    check_mask(f"units of layer '{name}'", mask, allowed)


def example_mask(name: str, examples: ArrayLike, shape: tuple[int, ...]) -> Array:
    """Return the mask of the real cells of a layer: bool (batch, *space), with axes of 1 that broadcast.

    Args:
      name: name of the layer, for the message.
      examples: mask of the real examples, bool (batch,), or of the real positions, bool (batch, *positions), where
        positions are the first axes of space. In a layer without space, an example is real if any position is.
      shape: shape of the layer (batch, *space, units).

    Raises:
      TypeError: the mask is not a bool array.
      ValueError: its shape is not allowed.
    """
    batch, *space = shape[:-1]
    allowed = [(batch, *space[:axes]) for axes in range(len(space) + 1)]
    pooled = not space and is_array(examples) and np.shape(examples)[:1] == (batch,)
    check_mask(f"examples (for layer '{name}')", examples, [np.shape(examples)] if pooled else allowed)
    mask = jnp.asarray(examples)
    if pooled:
        return mask.any(axis=tuple(range(1, mask.ndim)))
    return mask.reshape((*mask.shape, *(1,) * (len(space) + 1 - mask.ndim)))


def check_mask(label: str, mask: PyTree, allowed: list[tuple[int, ...]]) -> None:
    """Raise if a mask is not bool or has none of the allowed shapes.

    Raises:
      TypeError: the mask is not a bool array.
      ValueError: its shape is not allowed.
    """
    if not is_array(mask) or mask.dtype != np.bool_:
        given = f"an array of {mask.dtype}" if is_array(mask) else with_article(mask)
        raise TypeError(f"{label} must be a bool array, not {given}")
    if tuple(mask.shape) not in [tuple(shape) for shape in allowed]:
        raise ValueError(f"{label} has shape {tuple(mask.shape)}; allowed: {' or '.join(map(str, allowed))}")
