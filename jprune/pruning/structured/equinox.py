"""Put smaller parameters back into an Equinox module."""

import warnings
from collections.abc import Iterable, Iterator, Mapping

import equinox as eqx
import jax
from jaxtyping import PyTree

from jprune.pruning.structured.cutting import KeptIndices, feature_groups, warn_of_other_divisors
from jprune.trees import Leaf, flatten


def smaller_module(model: PyTree, params: PyTree = None, kept: Mapping[str, KeptIndices] | None = None) -> PyTree:
    """Return a copy of a module with smaller parameters, and with the sizes of its layers set to match.

    This sets ``in_features``, ``out_features``, ``in_channels``, ``out_channels``, ``groups``, ``num_heads`` and
    similar attributes of the layers of ``equinox.nn``. Sizes in the code of your own modules are not changed;
    ``small.differences`` names them.

    Args:
      model: the module before channels were removed; it is not changed.
      params: smaller parameters, the arrays of the module as returned by ``equinox.partition``, or some of them: others
        stay as they are. None if the arrays of ``model`` are already the smaller ones. The moments of an optimizer
        state are modules too, whose sizes must match those of the parameters:
        ``smaller_module(small.also[0], kept=small.kept)``.
      kept: ``small.kept``, for grouped convolutions and GroupNorm, whose number of remaining groups may not follow from
        the sizes alone, and for normalizations without parameters.

    Returns:
      A module of the same class, or a tree like ``model``.

    Raises:
      ValueError: the parameters have a leaf that the module lacks, or a layer with groups needs ``kept``.

    A warning names the layers (LayerNorm, RMSNorm, GroupNorm) that divide by a number of channels that is
    smaller now, so that the outputs differ from those of ``small.apply``. Another names normalizations without
    parameters whose size does not follow from ``kept``, because axes that had their size have several sizes now.

    >>> import jax.numpy as jnp
    >>> model = eqx.nn.Linear(4, 8, key=jax.random.key(0))
    >>> arrays = eqx.tree_at(lambda m: (m.weight, m.bias), model, (jnp.ones((5, 4)), jnp.ones(5)))
    >>> small = smaller_module(model, arrays)
    >>> small.out_features, small(jnp.ones(4)).shape
    (5, (5,))
    """
    paths, leaves, structure = flatten(model)
    arrays = {path: leaf for path, leaf in zip(*flatten(params)[:2], strict=True) if eqx.is_array(leaf)}
    given = dict(arrays)
    copy = jax.tree.unflatten(structure, [given.pop(path, leaf) for path, leaf in zip(paths, leaves, strict=True)])
    if given:
        raise ValueError(
            f"params has a leaf '{next(iter(given))}' that the module lacks; pass small.params of this module"
        )
    named = jax.tree.unflatten(structure, paths)  # the model with the path of each leaf in its place
    lost = {size for path, leaf in zip(paths, leaves, strict=True) for size in _lost(leaf, arrays.get(path))}
    divisors, unknown = [], []
    for (path, layer), (_, layer_paths) in zip(_layers(copy), _layers(named), strict=True):
        before, declared = _divisor(layer), _declared_alone(layer)
        for name, size in _sizes(layer, layer_paths, kept).items():
            object.__setattr__(layer, name, size)  # modules are frozen; this copy is not in use yet
        if before != _divisor(layer) and isinstance(model, eqx.Module):  # a state of an optimizer is a tuple
            divisors.append((layer, path))
        if any(len(_left(*size, kept)) > 1 or (kept is None and size[0] in lost) for size in declared):
            unknown.append(f"{type(layer).__name__} '{path}'")
    warn_of_other_divisors(divisors)
    if unknown and isinstance(model, eqx.Module):
        how = "pass kept=small.kept" if kept is None else "replace them with layers of the right size (eqx.tree_at)"
        warnings.warn(
            f"{', '.join(unknown)}: these layers have no parameters, so their number of channels is not known and "
            f"stays as it was; {how}",
            stacklevel=2,
        )
    return copy


def _lost(before: Leaf, now: Leaf) -> set[int]:
    """Return the sizes of the axes of an array that are smaller now."""
    if now is None or not eqx.is_array(before):
        return set()
    return {size for size, left in zip(before.shape, now.shape, strict=False) if size != left}


def _declared_alone(layer: eqx.Module) -> tuple[tuple[int, int], ...]:
    """Return the sizes that a normalization without parameters declares, each with its number of groups."""
    match layer:
        case eqx.nn.LayerNorm() | eqx.nn.RMSNorm() if layer.weight is None and layer.bias is None:
            return tuple((size, 1) for size in layer.shape)
        case eqx.nn.GroupNorm() if layer.weight is None and layer.channels is not None:
            return ((layer.channels, layer.groups),)
    return ()


def _left(size: int, groups: int, kept: Mapping[str, KeptIndices] | None) -> set[tuple[int, int]]:
    """Return what is left of the axes of this size, and of their groups; all if no leaf has such an axis."""
    axes = [along for indices in (kept or {}).values() for along in indices if len(along) == size]
    left = {(int(along.sum()), int(along.reshape(groups, -1).any(axis=1).sum())) for along in axes}
    return left or {(size, groups)}  # such as the height of an image


def _divisor(layer: eqx.Module) -> float | tuple[int, ...] | None:
    """Return the number of channels by which the code of a layer divides, or by whose root; None for other layers."""
    match layer:
        case eqx.nn.LayerNorm() | eqx.nn.RMSNorm():
            return layer.shape
        case eqx.nn.GroupNorm():
            return None if layer.channels is None else layer.channels / layer.groups
    return None


def _layers(node: PyTree, path: str = "") -> Iterator[tuple[str, eqx.Module]]:
    """Yield every module of a tree and its path, outermost first."""
    if isinstance(node, eqx.Module):
        yield path, node
        children: Iterable[tuple[object, PyTree]] = vars(node).items()
    elif isinstance(node, dict):
        children = node.items()
    else:
        children = enumerate(node) if isinstance(node, list | tuple) else ()
    for name, child in children:
        yield from _layers(child, f"{path}/{name}".lstrip("/"))


def _sizes(layer: PyTree, paths: PyTree, kept: Mapping[str, KeptIndices] | None) -> dict[str, PyTree]:
    """Return the sizes of a layer by the last axes of its parameters; stacked layers have others before them.

    Args:
      layer: the layer.
      paths: the same layer with paths in place of arrays.
      kept: the kept indices of every axis, by path.
    """
    sizes: dict[str, PyTree] = {}
    match layer:
        case eqx.nn.Linear() if eqx.is_array(layer.weight):
            named = dict(zip(("out_features", "in_features"), layer.weight.shape[-2:], strict=True))
            sizes = {name: size for name, size in named.items() if getattr(layer, name) != "scalar"}
        case eqx.nn.Conv() | eqx.nn.ConvTranspose() if eqx.is_array(layer.weight):
            axis = -2 - layer.num_spatial_dims
            sizes["out_channels"], per_group = layer.weight.shape[axis:][:2]
            if layer.groups > 1:
                before = (layer.groups, layer.out_channels)
                sizes["groups"] = feature_groups(paths.weight, before, sizes["out_channels"], kept, axis)
            sizes["in_channels"] = per_group * sizes.get("groups", 1)
        case eqx.nn.MultiheadAttention() if eqx.is_array(layer.query_proj.weight):
            sizes["num_heads"] = layer.query_proj.weight.shape[-2] // layer.qk_size
            sizes["output_size"] = layer.output_proj.weight.shape[-2]
            for name in ("query", "key", "value"):
                sizes[f"{name}_size"] = getattr(layer, f"{name}_proj").weight.shape[-1]
        case eqx.nn.LayerNorm() | eqx.nn.RMSNorm() | eqx.nn.GroupNorm():
            sizes = _norm_sizes(layer, paths, kept)
        case eqx.nn.BatchNorm() if layer.weight is not None and eqx.is_array(layer.weight):
            sizes["input_size"] = layer.weight.shape[-1]
        case eqx.nn.Embedding() if eqx.is_array(layer.weight):
            sizes["num_embeddings"], sizes["embedding_size"] = layer.weight.shape[-2:]
        case eqx.nn.LSTMCell() | eqx.nn.GRUCell() if eqx.is_array(layer.weight_hh):
            sizes["hidden_size"], sizes["input_size"] = layer.weight_hh.shape[-1], layer.weight_ih.shape[-1]
    return sizes


def _norm_sizes(
    layer: eqx.nn.LayerNorm | eqx.nn.RMSNorm | eqx.nn.GroupNorm, paths: PyTree, kept: Mapping[str, KeptIndices] | None
) -> dict[str, PyTree]:
    """Return the sizes of a normalization.

    Without parameters, its size is that of all axes of parameters that had its size, if they have one size now.
    """
    known = [array for array in (layer.weight, layer.bias) if array is not None and eqx.is_array(array)]
    left = [_left(*size, kept) for size in _declared_alone(layer)]
    if not known and not (left and all(len(counts) == 1 for counts in left)):
        return {}
    if not isinstance(layer, eqx.nn.GroupNorm):
        shape = known[0].shape[-len(layer.shape) :] if known else tuple(count for counts in left for count, _ in counts)
        return {"shape": shape}
    if not known:
        ((channels, groups),) = left[0]
        return {"channels": channels, "groups": groups}
    channels = known[0].shape[-1]
    if layer.channels is None:
        return {"channels": channels}
    before = (layer.groups, layer.channels)
    return {"channels": channels, "groups": feature_groups(paths.weight, before, channels, kept)}
