"""Capture preactivations of a Flax Linen module with a method interceptor."""

from collections.abc import Callable

import flax.linen as nn
import jax
from flax import nnx
from flax.core.scope import DenyList, in_filter, union_filters
from flax.linen.module import InterceptorContext
from jaxtyping import PyTree

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

    def run() -> PyTree:
        with nn.intercept_methods(_tag_layers):
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
    call: Callable[..., PyTree], args: tuple[PyTree, ...], kwargs: dict[str, PyTree], context: InterceptorContext
) -> PyTree:
    layer = context.module
    if isinstance(layer, nnx.bridge.ToLinen):
        raise NotImplementedError(
            f"'{'/'.join(layer.path)}' is an NNX module inside a Linen one, where it cannot be captured; use one kind"
        )
    y = call(*args, **kwargs)
    if context.method_name != "__call__" or not isinstance(layer, _LAYERS):
        return y
    weight = jax.tree.leaves(layer.get_variable("params", "kernel"))[0]
    hidden = not layer.is_mutable_collection("intermediates")
    return tagging.tag(y, weight, "/".join(layer.path), hidden)
