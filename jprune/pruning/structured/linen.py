"""Call a Flax Linen module with smaller parameters."""

import functools
from collections.abc import Callable, Mapping

import flax.linen as nn
from jaxtyping import PyTree

from jprune.pruning.structured.cutting import KeptIndices, feature_groups, kept_along


def smaller_apply(module: nn.Module, kept: Mapping[str, KeptIndices] | None = None) -> Callable[..., PyTree]:
    """Return the ``apply`` of a Linen module whose layers take their sizes from the given parameters.

    Linen layers declare ``features`` and raise for parameters of other sizes. While the returned function runs,
    ``features``, ``feature_group_count``, ``num_heads`` and similar attributes of the layers of ``flax.linen`` follow
    the parameters. Sizes in the code of your own modules are not changed; ``small.differences`` names them.

    Args:
      module: the module that was pruned; it is not changed.
      kept: ``small.kept``, for GroupNorm, of which the parameters do not say how many groups are left.

    Returns:
      A function called like ``module.apply``.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.zeros(5)}
    >>> smaller_apply(nn.Dense(8))({"params": params}, jnp.ones((1, 4))).shape
    (1, 5)
    """

    @functools.wraps(module.apply)
    def apply(*args: PyTree, **kwargs: PyTree) -> PyTree:
        with nn.intercept_methods(functools.partial(_with_sizes_of_parameters, kept)):
            return module.apply(*args, **kwargs)

    return apply


def _with_sizes_of_parameters(
    kept: Mapping[str, KeptIndices] | None,
    function: Callable[..., PyTree],
    args: tuple[PyTree, ...],
    kwargs: dict[str, PyTree],
    context: nn.module.InterceptorContext,
) -> PyTree:
    inputs = args[0] if args else kwargs.get("inputs")
    # A recurrent layer gets the carry of its cell without a call that can be intercepted.
    for layer in (context.module, getattr(context.module, "cell", None)):
        if isinstance(layer, nn.Module) and layer.scope is not None:
            for name, size in _sizes(layer, layer.variables.get("params", {}), inputs, kept).items():
                object.__setattr__(layer, name, size)  # modules are frozen; this one exists for the call only
    return function(*args, **kwargs)


def _sizes(
    layer: nn.Module, params: PyTree, inputs: PyTree, kept: Mapping[str, KeptIndices] | None
) -> dict[str, PyTree]:
    """Return the declared sizes of a layer, according to its parameters, its inputs and the kept indices."""
    sizes: dict[str, PyTree] = {}
    match layer:
        case nn.Dense() if "kernel" in params:
            sizes["features"] = params["kernel"].shape[-1]
        case nn.DenseGeneral() if "kernel" in params:
            shape = params["kernel"].shape
            declared = layer.features
            sizes["features"] = shape[-1] if isinstance(declared, int) else shape[len(shape) - len(declared) :]
        case nn.Einsum() if "kernel" in params:
            sizes["shape"] = params["kernel"].shape
        case nn.Conv() | nn.ConvLocal() if "kernel" in params:
            sizes["features"] = params["kernel"].shape[-1]
            if layer.feature_group_count > 1 and hasattr(inputs, "shape"):
                sizes["feature_group_count"] = inputs.shape[-1] // params["kernel"].shape[-2]
        case nn.ConvTranspose() if "kernel" in params:
            sizes["features"] = params["kernel"].shape[-2 if layer.transpose_kernel else -1]
        case nn.Embed() if "embedding" in params:
            sizes["num_embeddings"], sizes["features"] = params["embedding"].shape
        case nn.GroupNorm() if params:
            sizes = _norm_sizes(layer, params, kept)
        case nn.MultiHeadDotProductAttention() if "query" in params:
            _, sizes["num_heads"], size = params["query"]["kernel"].shape
            sizes["qkv_features"] = sizes["num_heads"] * size
            sizes["out_features"] = params["out"]["kernel"].shape[-1]
        case nn.LSTMCell() | nn.OptimizedLSTMCell() | nn.GRUCell() | nn.MGUCell() | nn.SimpleCell() | nn.ConvLSTMCell():
            hidden = next((params[name]["kernel"] for name in ("hi", "hn", "h", "hh") if name in params), None)
            if hidden is not None:
                sizes["features"] = hidden.shape[-2]
    return sizes


def _norm_sizes(layer: nn.GroupNorm, params: PyTree, kept: Mapping[str, KeptIndices] | None) -> dict[str, PyTree]:
    """Return the declared sizes of a GroupNorm if ``kept`` has one of its parameters."""
    path, size = next(("/".join((*layer.path, name)), len(array)) for name, array in params.items())
    along = kept_along(kept or {}, path, -1)
    if along is None:
        return {}
    before = len(along) // layer.group_size if layer.group_size else layer.num_groups or 1
    groups = feature_groups(path, (before, len(along)), size, kept)
    return {"group_size": size // groups} if layer.group_size else {"num_groups": groups}
