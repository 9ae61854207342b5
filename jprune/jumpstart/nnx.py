"""Capture preactivations of a Flax NNX model with a copy whose layers tag their outputs."""

import functools
import types
from collections.abc import Callable

import flax.linen
import jax
from flax import nnx
from jaxtyping import Array, PyTree

from jprune.jumpstart import linen, tagging

# Subclasses are layers too: an nnx.LoRALinear is tagged after its low-rank part is added. nnx.Embed (a lookup) and
# nnx.LoRA (a part of another layer) have no preactivations.
_LAYERS = (nnx.Linear, nnx.LinearGeneral, nnx.Einsum, nnx.Conv, nnx.ConvTranspose)
_PATH = "jprune_path"


def capture(
    model: nnx.Module, args: tuple[PyTree, ...], kwargs: dict[str, PyTree], method: tagging.Method, update: bool
) -> tuple[PyTree, list[tagging.Tagged]]:
    """Call a model and return its outputs and the tagged preactivations of its layers.

    Args:
      model: the model, in its current mode.
      args: positional arguments, which may include graph nodes such as ``nnx.Rngs``.
      kwargs: keyword arguments.
      method: what to call instead of ``__call__``: a name, or a function of the model.
      update: whether to write changed state back into the model and its arguments.
    """
    context = object()  # separates the state of this capture from the user's

    def run() -> PyTree:
        with nnx.merge_context(context, inner=True) as merging:
            copy, copied_args, copied_kwargs = merging.merge(graphdef, state)
        layers = _start_tagging(copy)
        with flax.linen.intercept_methods(linen.refuse_layers):
            outputs = _called(method)(copy, *copied_args, **copied_kwargs)
        _stop_tagging(layers)
        with nnx.split_context(context) as splitting:
            definition, changed = splitting.split((copy, copied_args, copied_kwargs))
        after[:] = [definition]
        return outputs, changed

    after: list[PyTree] = []
    with nnx.update_context(context):
        with nnx.split_context(context) as splitting:
            graphdef, state = splitting.split((model, args, kwargs))
        (outputs, changed), found = tagging.collect(run)
        if update:
            with nnx.merge_context(context, inner=False) as merging:
                merging.merge(after[0], changed)
    return outputs, found


def _called(method: tagging.Method) -> Callable[..., PyTree]:
    if callable(method):
        return method
    return lambda model, *args, **kwargs: getattr(model, method or "__call__")(*args, **kwargs)


def _start_tagging(model: nnx.Module) -> list[nnx.Module]:
    """Give each layer of a copy a class that tags its output with the layer's path."""
    layers: list[nnx.Module] = []
    for path, module in nnx.iter_modules(model):
        if isinstance(module, _LAYERS):
            layers.append(module)
            setattr(module, _PATH, "/".join(map(str, path)))
            object.__setattr__(module, "__class__", _tagging(type(module)))
    return layers


def _stop_tagging(layers: list[nnx.Module]) -> None:
    """Undo ``_start_tagging``, so that none of its changes are written back."""
    for layer in layers:
        object.__setattr__(layer, "__class__", type(layer).__mro__[1])
        delattr(layer, _PATH)


@functools.cache
def _tagging(layer: type[nnx.Module]) -> type[nnx.Module]:
    """Derive a class that tags its output, because transformations inside a model keep a node's class."""

    def call(self: PyTree, *args: PyTree, **kwargs: PyTree) -> PyTree:
        y = layer.__call__(self, *args, **kwargs)
        weight = jax.tree.leaves(self.kernel)[0]
        return tagging.tag(y, weight, getattr(self, _PATH), units=_unit_axes(self, y, args, kwargs))

    def fill(namespace: dict[str, object]) -> None:
        namespace.update(__call__=call, __module__=layer.__module__, __qualname__=layer.__qualname__)

    return types.new_class(layer.__name__, (layer,), {"pytree": layer._pytree__is_pytree}, fill)


def _unit_axes(layer: nnx.Module, y: Array, args: tuple[PyTree, ...], kwargs: dict[str, PyTree]) -> tuple[int, ...]:
    """Return the axes of the output at whose indices the layer has separate weights, counted from the end."""
    match layer:
        case nnx.LinearGeneral():
            return linen.general_units(y, layer.out_features, len(layer.batch_axis))
        case nnx.Einsum():
            return linen.einsum_units(y, layer.einsum_str, args, kwargs)
    return (-1,)
