"""Capture preactivations of a Flax Linen module with a method interceptor."""

from collections.abc import Callable, Sequence
from functools import partial

import flax.linen as nn
import jax
import numpy as np
from flax import nnx
from flax.core.scope import DenyList, in_filter, union_filters
from flax.linen.module import InterceptorContext
from jaxtyping import Array, ArrayLike, PyTree

from jprune.jumpstart import tagging

_LAYERS = (nn.Dense, nn.DenseGeneral, nn.Einsum, nn.Conv, nn.ConvLocal, nn.ConvTranspose)

# nn.jit caches traces between applications, with a key that includes the mutable collections. A collection with this
# otherwise unused name distinguishes traces with tags from those without.
_MARK = "jprune"


def capture(
    module: nn.Module, variables: PyTree, args: tuple[PyTree, ...], kwargs: dict[str, PyTree], method: tagging.Method
) -> tuple[PyTree, list[tagging.Tagged]]:
    """Apply a module; return the result of ``module.apply`` and the tagged preactivations.

    A tag is hidden if the layer runs inside a lifted transformation that does not lift 'intermediates', Linen's
    collection for intermediate values.
    """
    options = dict(kwargs)
    mutable = options.pop("mutable", False)
    extended = _extended(mutable)
    under_way: list[tuple[str, ...]] = []

    def run() -> PyTree:
        with nn.intercept_methods(partial(_tag_layers, under_way)):
            return module.apply(variables, *args, method=method, mutable=extended, **options)

    (outputs, changed), found = tagging.collect(run)
    if mutable is False:
        return outputs, found
    return (outputs, {name: value for name, value in changed.items() if in_filter(mutable, name)}), found


def refuse_layers(
    call: Callable[..., PyTree], args: tuple[PyTree, ...], kwargs: dict[str, PyTree], context: InterceptorContext
) -> PyTree:
    """Raise an error if a Linen layer is called inside an NNX model, where it cannot be captured.

    Raises:
      NotImplementedError: a layer is called.
    """
    if isinstance(context.module, _LAYERS):
        name = "/".join(context.module.path) or type(context.module).__name__
        raise NotImplementedError(
            f"'{name}' is a Linen layer inside an NNX model, where it cannot be captured; use layers of one library"
        )
    return call(*args, **kwargs)


def _extended(mutable: PyTree) -> PyTree:
    if mutable is True or isinstance(mutable, DenyList):
        denied = mutable.deny if isinstance(mutable, DenyList) else ()
        return union_filters(DenyList(union_filters(denied, _MARK)), "intermediates")
    return union_filters(mutable, ["intermediates", _MARK])


def _tag_layers(
    under_way: list[tuple[str, ...]],
    call: Callable[..., PyTree],
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
    context: InterceptorContext,
) -> PyTree:
    """Tag the output of a layer; a subclass that calls ``super().__call__``, whose layer is under way, only once."""
    layer = context.module
    if isinstance(layer, nnx.bridge.ToLinen):
        raise NotImplementedError(
            f"'{'/'.join(layer.path)}' is an NNX module inside a Linen module and cannot be captured; use layers of "
            "one library"
        )
    if context.method_name != "__call__" or not isinstance(layer, _LAYERS) or layer.path in under_way:
        return call(*args, **kwargs)
    under_way.append(layer.path)
    y = call(*args, **kwargs)
    under_way.pop()
    weight = jax.tree.leaves(layer.get_variable("params", "kernel"))[0]
    hidden = not layer.is_mutable_collection("intermediates")
    return tagging.tag(y, weight, "/".join(layer.path), hidden, _unit_axes(layer, y, args, kwargs))


def _unit_axes(layer: nn.Module, y: Array, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]) -> tuple[int, ...]:
    """Return the axes of the output at whose indices the layer has separate weights, counted from the end."""
    match layer:
        case nn.DenseGeneral():
            return general_units(y, layer.features, np.size(layer.batch_dims))
        case nn.Einsum():
            return einsum_units(y, layer.einsum_str, args, kwargs)
    return (-1,)


def general_units(y: Array, features: ArrayLike | Sequence[int], batch_axes: int) -> tuple[int, ...]:
    """Return the axes of units of a dense layer with any number of features, whose first axes may have own weights.

    >>> general_units(jax.numpy.ones((5, 2, 4)), (2, 4), batch_axes=0)
    (-2, -1)
    """
    sizes = tuple(np.atleast_1d(features).tolist())
    if not sizes or y.shape[-len(sizes) :] != sizes:  # a subclass with another output
        return (-1,)
    return (*range(-y.ndim, batch_axes - y.ndim), *range(-len(sizes), 0))


def einsum_units(
    y: Array, declared: str | None, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]
) -> tuple[int, ...]:
    """Return the axes of units of an ``Einsum`` layer: the letters of its kernel that its output has too.

    >>> einsum_units(jax.numpy.ones((5, 3, 2, 4)), "btd,hdk->bthk", (), {})
    (-2, -1)
    """
    called = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
    operands, output = (called or declared or "").replace(" ", "").split("->")
    before, dots, after = output.partition("...")
    letters = before + "." * (y.ndim - len(before) - len(after)) * bool(dots) + after
    kernel = operands.partition(",")[2].replace(".", "")
    units = tuple(axis - y.ndim for axis, letter in enumerate(letters) if letter in kernel)
    return units if units and len(letters) == y.ndim else (-1,)
