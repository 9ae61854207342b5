"""Call a Flax Linen module with smaller parameters."""

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping

import flax.linen as nn
import numpy as np
from flax.errors import ScopeParamShapeError
from jaxtyping import Bool, PyTree

from jprune.pruning.structured.cutting import KeptIndices, groups_left, kept_along, warn_of_other_divisors
from jprune.trees import with_article

_DIVIDE = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.MultiHeadDotProductAttention)


def smaller_apply(module: nn.Module, kept: Mapping[str, KeptIndices] | None = None) -> Callable[..., PyTree]:
    """Return the ``apply`` of a Linen module whose layers take their sizes from the given parameters.

    Linen layers declare ``features`` and raise for parameters of other sizes. While the returned function runs,
    ``features``, ``feature_group_count``, ``num_heads`` and similar attributes of the layers of ``flax.linen`` follow
    the parameters. Sizes in the code of your own modules are not changed; ``small.differences`` names them.

    Args:
      module: the module that was pruned; it is not changed.
      kept: ``small.kept``, which determines the groups of a GroupNorm and the layers whose outputs differ. Without it,
        a warning names the layers whose outputs may differ.

    Returns:
      A function called like ``module.apply``. When it is called, a warning names the layers (LayerNorm, RMSNorm,
      GroupNorm, attention) that divide by a number of channels that is smaller now, so that the outputs differ from
      those of ``small.apply``. It raises a ``ValueError`` if the code of your own module declares the original
      shape of a parameter that is smaller now.

    Raises:
      TypeError: ``module`` is not a Linen module.

    >>> import jax.numpy as jnp
    >>> params = {"kernel": jnp.ones((4, 5)), "bias": jnp.zeros(5)}
    >>> smaller_apply(nn.Dense(8))({"params": params}, jnp.ones((1, 4))).shape
    (1, 5)
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module is {with_article(module)}; it must be a Linen module, not its apply or its parameters")

    @functools.wraps(module.apply)
    def apply(*args: PyTree, **kwargs: PyTree) -> PyTree:
        with sizes_of_parameters(kept) as divisors:
            try:
                outputs = module.apply(*args, **kwargs)
            except ScopeParamShapeError as error:
                raise ValueError(
                    f"{str(error).partition(' (http')[0]} smaller_apply changes the sizes of the layers of flax.linen "
                    "only: make this size an argument of your module and change it, use small.apply, or keep the "
                    "channels of this parameter"
                ).with_traceback(error.__traceback__) from error
        if kept is not None:
            warn_of_other_divisors(divisors)
        elif divisors:
            named = ", ".join(dict.fromkeys(f"'{path}'" for _, path in divisors))
            warnings.warn(
                f"the code of {named} divides by its number of channels; if that is smaller now, the outputs differ "
                "from those of small.apply: pass kept=small.kept to find out",
                stacklevel=2,
            )
        return outputs

    return apply


@contextlib.contextmanager
def sizes_of_parameters(kept: Mapping[str, KeptIndices] | None) -> Iterator[list[tuple[nn.Module, str]]]:
    """Let the layers of Linen modules that are called take their sizes from their parameters.

    Args:
      kept: the kept indices of every axis, by path; None if they are not known.

    Yields:
      The layers that were called and their paths, of those that divide by a number of channels that is smaller now.
    """
    divisors: list[tuple[nn.Module, str]] = []

    def call(
        function: Callable[..., PyTree],
        args: tuple[PyTree, ...],
        kwargs: dict[str, PyTree],
        context: nn.module.InterceptorContext,
    ) -> PyTree:
        inputs = args[0] if args else kwargs.get("inputs", kwargs.get("x"))
        divisors.extend(_set_sizes_of_parameters(context.module, inputs, kept))
        return function(*args, **kwargs)

    with nn.intercept_methods(call):
        yield divisors


def _set_sizes_of_parameters(
    module: nn.Module, inputs: PyTree, kept: Mapping[str, KeptIndices] | None
) -> Iterator[tuple[nn.Module, str]]:
    """Set the sizes of a layer that is called; yield it and its path if it divides by a number that is smaller now."""
    # A recurrent layer gets the carry of its cell without a call that can be intercepted.
    for layer in (module, getattr(module, "cell", None)):
        if isinstance(layer, nn.Module) and layer.scope is not None:
            params = layer.variables.get("params", {})
            if isinstance(layer, _DIVIDE) if kept is None else _divides_by_fewer(layer, params, inputs, kept):
                yield layer, "/".join(layer.path)
            for name, size in _sizes(layer, params, inputs, kept or {}).items():
                object.__setattr__(layer, name, size)  # modules are frozen; this one exists for the call only


def _sizes(layer: nn.Module, params: PyTree, inputs: PyTree, kept: Mapping[str, KeptIndices]) -> dict[str, PyTree]:
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


def _divides_by_fewer(layer: nn.Module, params: PyTree, inputs: PyTree, kept: Mapping[str, KeptIndices]) -> bool:
    """Whether the code of a layer divides by a number of channels, or by its root, that is smaller now."""
    match layer:
        case nn.LayerNorm() | nn.RMSNorm() | nn.GroupNorm() if not params:  # which do not show what they have lost
            return hasattr(inputs, "shape") and inputs.shape[-1] in {
                int(a.sum()) for axes in kept.values() for a in axes if not a.all()
            }
        case nn.GroupNorm():
            along = _kept_of_norm(layer, params, kept)
            if along is None:
                return False
            left = along.reshape(_groups(layer, len(along)), -1).sum(axis=1)
            return bool(left.max() < len(along) // len(left))
        case nn.LayerNorm() | nn.RMSNorm():
            along = _kept_of_norm(layer, params, kept)
            return along is not None and not along.all()
        case nn.MultiHeadDotProductAttention() if "query" in params:
            shape = params["query"]["kernel"].shape
            along = kept_along(kept, "/".join((*layer.path, "query/kernel")), -1, shape)
            return along is not None and not along.all()
    return False


def _norm_sizes(layer: nn.GroupNorm, params: PyTree, kept: Mapping[str, KeptIndices]) -> dict[str, PyTree]:
    """Return the declared sizes of a GroupNorm if ``kept`` has one of its parameters."""
    along = _kept_of_norm(layer, params, kept)
    if along is None:
        return {}
    groups = groups_left(along, _groups(layer, len(along)))
    return {"group_size": int(along.sum()) // groups} if layer.group_size else {"num_groups": groups}


def _kept_of_norm(
    layer: nn.Module, params: PyTree, kept: Mapping[str, KeptIndices]
) -> Bool[np.ndarray, " channels"] | None:
    name, array = next(iter(params.items()))
    return kept_along(kept, "/".join((*layer.path, name)), -1, array.shape)


def _groups(layer: nn.GroupNorm, size: int) -> int:
    """Return the number of groups of a GroupNorm of ``size`` channels, as declared."""
    declared = vars(layer).setdefault("_declared", (layer.group_size, layer.num_groups))  # a layer may be called twice
    return size // declared[0] if declared[0] else declared[1] or 1
