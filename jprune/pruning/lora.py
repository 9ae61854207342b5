"""Merge low-rank adapters (LoRA) into pruned weights."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, PyTree

from jprune.pruning.scores.elementwise import working_dtype
from jprune.trees import Leaf, flatten, is_float, match


def merge_lora(
    params: PyTree,
    adapters: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    scale: ArrayLike = 1.0,
    masks: PyTree = None,
) -> PyTree:
    """Merge adapters into weights, with pruned weights kept at exactly 0: w + scale * mask * (a b).

    Call it in the loss too, so that the adapters are trained for the merged weights:

    >>> params = {"body": {"kernel": jnp.array([[1.0, 0.0], [0.0, 2.0]])}}
    >>> adapters = {"body/kernel": (jnp.ones((2, 1)), jnp.array([[3.0, 5.0]]))}
    >>> merge_lora(params, adapters, scale=0.5)["body"]["kernel"]
    Array([[2.5, 0. ],
           [0. , 4.5]], dtype=float32)

    Args:
      params: tree of arrays, the base model.
      adapters: the two factors for each adapted leaf, by path; their product must have the shape of the leaf:
        (inputs, rank) and (rank, outputs) for a kernel (inputs, outputs), (inputs, rank) and (rank, heads, size) for
        (inputs, heads, size), (layers, inputs, rank) and (layers, rank, outputs) for stacked layers. For a weight
        (outputs, inputs) the first factor is (outputs, rank).
      scale: factor of the product, alpha / rank in the paper.
      masks: bool arrays like ``params``, None where a leaf is dense. By default the weights that are 0 are pruned.

    Returns:
      A tree like ``params``, with its dtypes. Products are computed in float32, or in float64 if the weight or a factor
      is float64.

    Raises:
      ValueError: ``adapters`` is empty or names a leaf that ``params`` lacks; the product has another shape; ``masks``
        does not match. The message names the leaf.

    Source: Hu et al., "LoRA", ICLR 2022, arXiv 2106.09685, equation 3; with the mask: Munoz et al., "SQFT", 2024,
    arXiv 2410.03750, equation 2.
    """
    paths, leaves, treedef = flatten(params)
    _refuse_unknown(adapters, paths, leaves)
    given = [None] * len(paths) if masks is None else match(params, masks, reference_name="params", name="masks")
    for i, (path, base, mask) in enumerate(zip(paths, leaves, given, strict=True)):
        if path not in adapters:
            continue
        leaf, factors = jnp.asarray(base), [jnp.asarray(factor) for factor in adapters[path]]
        dtype = working_dtype(leaf, *factors)
        product = _product(path, leaf.shape, [factor.astype(dtype) for factor in factors])
        merged = (leaf.astype(dtype) + jnp.asarray(scale, dtype) * product).astype(leaf.dtype)
        kept = leaf != 0 if masks is None else mask
        leaves[i] = merged if kept is None else jnp.where(kept, merged, jnp.zeros_like(leaf))
    return jax.tree.unflatten(treedef, leaves)


def _refuse_unknown(adapters: Mapping[str, object], paths: list[str], leaves: list[Leaf]) -> None:
    if not adapters:
        raise ValueError("adapters is empty; pass the two factors of at least one leaf, by its path")
    floats = [path for path, leaf in zip(paths, leaves, strict=True) if is_float(leaf)]
    for path, factors in adapters.items():
        if path not in floats:
            raise ValueError(f"adapters has '{path}', which is not a float leaf of params; use one of {floats}")
        if not isinstance(factors, (tuple, list)) or len(factors) != 2 or not all(map(is_float, factors)):
            raise ValueError(f"adapters has {type(factors).__name__} at '{path}'; it must be two float arrays (a, b)")


def _product(path: str, shape: tuple[int, ...], factors: list[Array]) -> Array:
    """Multiply two factors: over the last axis of the first, or layer by layer."""
    a, b = factors
    if a.ndim and b.ndim and a.shape[-1] == b.shape[0] and a.shape[:-1] + b.shape[1:] == shape:
        return jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
    layered = a.ndim == b.ndim == len(shape) >= 3 and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
    if layered and a.shape[:-1] + b.shape[-1:] == shape:
        return jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)
    raise ValueError(
        f"adapters has factors of shapes {a.shape} and {b.shape} at '{path}' of shape {shape}; their product must have "
        "that shape, as (inputs, rank) and (rank, outputs) have for (inputs, outputs)"
    )
