"""Put smaller parameters back into a Flax NNX module."""

import re
from collections.abc import Mapping

import jax
from flax import nnx
from jaxtyping import PyTree

from jprune.pruning.structured.cutting import KeptIndices, feature_groups, warn_of_other_divisors
from jprune.trees import flatten, with_article


def smaller_module(
    model: nnx.Module, params: PyTree, state: PyTree = None, kept: Mapping[str, KeptIndices] | None = None
) -> nnx.Module:
    """Return a copy of a module with smaller parameters, and with the sizes of its layers set to match.

    This sets ``in_features``, ``out_features``, ``num_features``, ``features``, ``feature_group_count``, ``num_heads``,
    ``head_dim`` and similar attributes of the layers of ``flax.nnx``. Sizes in the code of your own modules are not
    changed; ``small.differences`` names them.

    Args:
      model: the module before channels were removed; it is not changed.
      params: smaller parameters with the paths of the module, a ``State`` or a dict.
      state: smaller batch statistics, or None.
      kept: ``small.kept``, for grouped convolutions and GroupNorm, whose number of remaining groups may not follow from
        the sizes alone.

    Returns:
      A module of the same class.

    Raises:
      TypeError: ``model`` is not a module.
      ValueError: the parameters have a leaf that the module lacks; a layer with groups needs ``kept``; a BatchNorm
        needs ``state``; or attention has heads of two sizes, which ``flax.nnx`` cannot compute.

    A warning names the layers (LayerNorm, RMSNorm, GroupNorm, attention) that divide by a number of channels that is
    smaller now, so that the outputs differ from those of ``small.apply``.

    >>> import jax.numpy as jnp
    >>> model = smaller_module(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), {"kernel": jnp.ones((4, 5)), "bias": jnp.ones(5)})
    >>> model.out_features, model(jnp.ones((1, 4))).shape
    (5, (1, 5))
    """
    if not isinstance(model, nnx.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else with_article(model)
        raise TypeError(f"model is {kind}; it must be the nnx.Module before channels were removed")
    graphdef, whole = nnx.split(model)
    paths, leaves, treedef = flatten(whole)
    given = {path: leaf for tree in (params, state) for path, leaf in _leaves(tree)}
    before = {path: tuple(getattr(leaf, "shape", ())) for path, leaf in zip(paths, leaves, strict=True)}
    lost = set()  # the sizes of axes that are smaller now
    for place, path in enumerate(paths):  # also of arrays that are not variables, such as the scales of WeightNorm
        if path in given:
            array = given.pop(path)
            lost |= {size for size, now in zip(leaves[place].shape, array.shape, strict=False) if size != now}
            leaves[place] = array
    if given:
        raise ValueError(
            f"params has a leaf '{next(iter(given))}' that the module lacks; pass small.params of this module"
        )
    # Without copy=True, both modules have the same variables.
    copy = nnx.merge(graphdef, jax.tree.unflatten(treedef, leaves), copy=True)
    divisors = []
    for parts, layer in nnx.iter_modules(copy):
        divisor, path = _divisor(layer), "".join(f"{part}/" for part in parts)
        _set_sizes(layer, path, kept, before)
        _refuse_heads_of_two_sizes(layer, path)
        # A normalization without parameters does not show whether it has lost channels.
        may_have_lost = not _parameters(layer) and getattr(layer, "num_features", None) in lost
        if divisor is not None and (divisor != _divisor(layer) or may_have_lost):
            divisors.append((layer, path[:-1]))
    warn_of_other_divisors(divisors)
    return copy


def _refuse_heads_of_two_sizes(layer: nnx.Module, prefix: str) -> None:
    """Raise if heads have other sizes for values than for queries, and the attention of ``flax.nnx`` needs one size."""
    if not isinstance(layer, nnx.MultiHeadAttention) or layer.dropout_rate:
        return
    queries, values = layer.query.kernel.shape[-1], layer.value.kernel.shape[-1]
    if queries != values and layer.attention_fn is nnx.dot_product_attention:
        raise ValueError(
            f"the heads of {_named(layer, prefix)} have {queries} features for queries and {values} for "
            "values, and flax.nnx needs the same size for both: use small.apply, or remove whole heads, with "
            f"sparsity={{{re.escape(f'{prefix}out/kernel[0]')!r}: fraction}} in channel_group_masks"
        )


def _named(layer: nnx.Module, prefix: str) -> str:
    return f"{type(layer).__name__} '{prefix[:-1]}'" if prefix else type(layer).__name__


def _divisor(layer: nnx.Module) -> int | None:
    """Return the number of channels by which the code of a layer divides, or by whose root; None for other layers."""
    match layer:
        case nnx.LayerNorm() | nnx.RMSNorm():
            return layer.num_features
        case nnx.GroupNorm():
            return layer.group_size
        case nnx.MultiHeadAttention():
            return layer.head_dim
    return None


def _leaves(tree: PyTree) -> list[tuple[str, jax.Array]]:
    paths, leaves, _ = flatten(tree)
    return [(path, leaf) for path, leaf in zip(paths, leaves, strict=True) if leaf is not None]


def _set_sizes(
    layer: nnx.Module,
    prefix: str,
    kept: Mapping[str, KeptIndices] | None,
    before: Mapping[str, tuple[int, ...]],
) -> None:
    """Set the attributes of one layer from the last axes of its parameters; stacked layers have others before them.

    The features of a normalization may be along any axis, because its attributes decide what it computes.

    Args:
      layer: the layer.
      prefix: its path with a last '/'.
      kept: the kept indices of every axis, by path.
      before: the shapes of all leaves before channels were removed, by path.
    """
    match layer:
        case nnx.Linear():
            layer.in_features, layer.out_features = layer.kernel.shape[-2:]
        case nnx.LinearGeneral():
            first = len(layer.kernel.shape) - len(layer.in_features) - len(layer.out_features)
            middle = first + len(layer.in_features)
            layer.in_features, layer.out_features = layer.kernel.shape[first:middle], layer.kernel.shape[middle:]
        case nnx.Conv():
            per_group, outputs = layer.kernel.shape[-2:]
            if layer.feature_group_count > 1:
                groups = (layer.feature_group_count, layer.out_features)
                layer.feature_group_count = feature_groups(f"{prefix}kernel", groups, outputs, kept)
            layer.in_features, layer.out_features = per_group * layer.feature_group_count, outputs
            layer.kernel_shape = layer.kernel.shape[-len(layer.kernel_shape) :]
        case nnx.ConvTranspose():
            inputs, outputs = layer.kernel.shape[-2:]
            layer.in_features, layer.out_features = (outputs, inputs) if layer.transpose_kernel else (inputs, outputs)
            layer.kernel_shape = layer.kernel.shape[-len(layer.kernel_shape) :]
        case nnx.Embed():
            layer.num_embeddings, layer.features = layer.embedding.shape[-2:]
        case nnx.Einsum():
            layer.kernel_shape = layer.kernel.shape[-len(layer.kernel_shape) :]
            layer.bias_shape = None if layer.bias is None else layer.bias.shape[-len(layer.bias_shape or ()) :]
        case nnx.BatchNorm() | nnx.LayerNorm() | nnx.RMSNorm() | nnx.GroupNorm() | nnx.InstanceNorm():
            _set_norm_sizes(layer, prefix, kept, before)
        case nnx.MultiHeadAttention():
            inputs, layer.num_heads, layer.head_dim = layer.query.kernel.shape[-3:]
            layer.in_kv_features, layer.num_kv_heads = layer.key.kernel.shape[-3:-1]
            layer.in_features, layer.qkv_features = inputs, layer.num_heads * layer.head_dim
            layer.out_features = layer.out.kernel.shape[-1]
        case nnx.LSTMCell() | nnx.OptimizedLSTMCell() | nnx.GRUCell() | nnx.SimpleCell():
            _set_cell_sizes(layer)


def _set_norm_sizes(
    layer: nnx.BatchNorm | nnx.LayerNorm | nnx.RMSNorm | nnx.GroupNorm | nnx.InstanceNorm,
    prefix: str,
    kept: Mapping[str, KeptIndices] | None,
    before: Mapping[str, tuple[int, ...]],
) -> None:
    """Set the sizes of a normalization, which are known if it has parameters or statistics."""
    known = _parameters(layer)
    if not known:
        return
    features = layer.num_groups * layer.group_size if isinstance(layer, nnx.GroupNorm) else layer.num_features

    def size_and_axis(name: str) -> tuple[int, int]:
        now = getattr(layer, name).shape
        axis = _feature_axis(before.get(f"{prefix}{name}", now), now, features)  # a shared array has one path only
        return now[axis], axis

    size, axis = size_and_axis(known[0])
    if isinstance(layer, nnx.GroupNorm):
        layer.num_groups = feature_groups(f"{prefix}{known[0]}", (layer.num_groups, features), size, kept, axis)
        layer.group_size = size // layer.num_groups
        return
    layer.num_features = size
    if "mean" in known and (mean := size_and_axis("mean")[0]) != size:
        raise ValueError(
            f"the statistics of {_named(layer, prefix)} have {mean} features and its {known[0]} {size}; pass the "
            "smaller statistics too: smaller_module(model, small.params, small.state)"
        )


def _feature_axis(before: tuple[int, ...], now: tuple[int, ...], features: int) -> int:
    """Return the axis of a parameter over features: the last of that size, or the last of these that is smaller now.

    It counts from the end: the parameter may have more axes now, over stacked layers.
    """
    fitting = [axis for axis in range(-len(before), 0) if before[axis] == features]
    return max(fitting, key=lambda axis: (now[axis] < before[axis], axis), default=-1)


def _parameters(layer: nnx.Module) -> list[str]:
    """Return the names of the parameters or statistics of a normalization, which have its number of channels."""
    return [name for name in ("scale", "bias", "mean") if getattr(layer, name, None) is not None]


def _set_cell_sizes(cell: nnx.LSTMCell | nnx.OptimizedLSTMCell | nnx.GRUCell | nnx.SimpleCell) -> None:
    """Set the sizes of a recurrent cell; the first kernel with its own bias reads the hidden state."""
    kernels = {name: getattr(cell, name).kernel.shape for name in vars(cell) if hasattr(getattr(cell, name), "kernel")}
    hidden = next(shape for name, shape in kernels.items() if name in ("hi", "hg", "dense_h"))
    inputs = next(shape for name, shape in kernels.items() if name in ("ii", "ig", "dense_i"))
    cell.in_features, cell.hidden_features = inputs[-2], hidden[-2]
