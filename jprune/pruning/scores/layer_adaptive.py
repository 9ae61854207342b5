"""Amounts per layer from scores: LAMP scores for a global selection, and the OWL allocation."""

import math
import re
import warnings

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jprune.graph.axes import Axes, kernel_axes, unknown_axes, where_of
from jprune.pruning.amounts import fraction
from jprune.pruning.scores.elementwise import Score, working_dtype
from jprune.trees import Where, flatten


def lamp(*, axes: Axes = None, where: Where | None = None) -> Score:
    """Score weights by w^2 / (sum of the squares of all weights of the layer that are at least as large) (LAMP).

    Use it with ``global_masks``: no amount per layer needs to be chosen. The largest weight of every layer has score 1,
    so no layer is empty before all layers are down to one weight. Ties within a layer are broken by position, as in
    selections.

    Args:
      axes: roles of the axes (see ``prune``); each stacked layer of a leaf is a layer. A leaf whose axes are unknown is
        treated as one layer, with a warning.
      where: see ``Score``.

    Source: Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, arXiv 2010.07611,
    equation 4.

    >>> lamp()({"a": {"kernel": jnp.array([[1.0, 2.0]])}, "b": {"kernel": jnp.array([[3.0], [4.0]])}})
    {'a': {'kernel': Array([[0.2, 1. ]], dtype=float32)}, 'b': {'kernel': Array([[0.36],
           [1.  ]], dtype=float32)}}
    """

    def function(params: PyTree, grad: PyTree, batch: PyTree, key: Array | None) -> PyTree:
        paths, leaves, treedef = flatten(params)
        roles = kernel_axes(axes, params)
        for i, (path, leaf) in enumerate(zip(paths, leaves, strict=True)):
            if leaf is None:
                continue
            found = roles[path]
            if found is None:
                warnings.warn(unknown_axes(path, leaf.shape, "it is treated as one layer", axes), stacklevel=2)
            stacked = () if found is None else found.stacked
            moved = jnp.moveaxis(leaf.astype(working_dtype(leaf)), stacked, range(len(stacked)))
            layers = moved.reshape(math.prod(moved.shape[: len(stacked)]), -1)
            scores = jax.vmap(_lamp)(layers).reshape(moved.shape)
            leaves[i] = jnp.moveaxis(scores, range(len(stacked)), stacked)
        return jax.tree.unflatten(treedef, leaves)

    return Score(function, "lamp", (), where if axes is None else where_of(where, axes))


def _lamp(weights: Float[Array, " weights"]) -> Float[Array, " weights"]:
    largest = jnp.max(jnp.abs(weights), initial=0.0)
    # Scores do not depend on the scale of the weights, but their squares may leave the range of float32.
    squares = jnp.square(weights / jnp.where(largest > 0, largest, jnp.ones_like(largest)))
    order = jnp.argsort(-squares, stable=True)  # largest first; among equal weights the first counts as larger
    ranked = squares[order]
    sums = jnp.cumsum(ranked)
    safe = jnp.where(sums > 0, sums, jnp.ones_like(sums))
    return jnp.zeros_like(squares).at[order].set(ranked / safe)


def owl_sparsities(
    scores: PyTree,
    sparsity: float,
    *,
    threshold: float = 5.0,
    spread: float = 0.08,
    blocks: str | None = None,
) -> dict[str, float]:
    r"""Give layers with many outlying scores a lower sparsity: outlier weighed layerwise sparsity (OWL).

    The outlier ratio D of a layer is the fraction of its scores that exceed ``threshold`` times their mean. Layers keep
    the fraction 1 - sparsity + (x - mean of x), where x is D scaled linearly to [0, 2 spread]. The mean is weighted by
    the sizes of the layers, so the total is as requested. A fraction is clipped to [0, 1], and the other layers
    compensate.

    Args:
      scores: tree of concrete arrays; the paper uses ``wanda`` scores.
      sparsity: the fraction of all weights to remove.
      threshold: M; a score above M times the mean is an outlier. The paper uses 5 or 7.
      spread: lambda, the largest deviation allowed; the paper uses 0.08.
      blocks: regular expression searched for in the path of each leaf; leaves with the same match share one outlier
        ratio and one sparsity, for example ``r"^blocks/\d+/"``: the paper compares transformer blocks. By default, and
        for leaves without a match, each leaf is one layer.

    Returns:
      ``{regex: sparsity}`` for ``layer_masks`` and ``prune``, with one expression for each leaf.

    Raises:
      TypeError: ``sparsity`` or ``spread`` is not a float.
      ValueError: ``sparsity`` or ``spread`` is out of range, the scores are traced, or there is none.

    Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, arXiv 2310.05175, equation 1 and
    section 3.2, with the scaling of the published code.

    >>> scores = {"a": jnp.array([1.0, 1, 1, 1, 1, 1, 1, 13]), "b": jnp.ones(8)}
    >>> owl_sparsities(scores, 0.5, spread=0.1)
    {'^a$': 0.4, '^b$': 0.6}
    """
    sparsity = fraction("sparsity", sparsity)
    spread = fraction("spread", spread, of="the largest deviation from the sparsity")
    paths, leaves, _ = flatten(scores)
    layers: dict[str, list[tuple[str, Array]]] = {}
    for path, leaf in zip(paths, leaves, strict=True):
        if leaf is None:
            continue
        if isinstance(leaf, jax.core.Tracer):
            raise ValueError(f"the scores of '{path}' are traced; sparsities are Python numbers, so call outside jit")
        found = re.search(blocks, path) if blocks is not None else None
        layers.setdefault(f"block {found.group()}" if found else path, []).append((path, leaf))
    if not layers:
        raise ValueError("scores has no array: every leaf is None; check the where= of the score")
    sizes = {name: sum(int(leaf.size) for _, leaf in members) for name, members in layers.items()}
    ratios = {name: _outliers([leaf for _, leaf in members], threshold) for name, members in layers.items()}
    present = [ratio for name, ratio in ratios.items() if sizes[name]] or [0.0]
    low, high = min(present), max(present)
    scaled = {name: 2.0 * spread * (ratio - low) / (high - low or 1.0) for name, ratio in ratios.items()}
    total = sum(sizes.values()) or 1

    def at(shift: float) -> dict[str, float]:
        return {name: min(max(sparsity - scaled[name] + shift, 0.0), 1.0) for name in layers}

    def excess(shift: float) -> float:
        return sum(amount * sizes[name] for name, amount in at(shift).items()) / total - sparsity

    shift = sum(scaled[name] * sizes[name] for name in layers) / total
    if abs(excess(shift)) > 1e-9:  # a sparsity is at 0 or 1, and the others compensate
        below, above = -1.0, 2.0
        for _ in range(60):
            shift = (below + above) / 2
            below, above = (shift, above) if excess(shift) < 0 else (below, shift)
    amounts = at(shift)
    return {f"^{re.escape(path)}$": round(amounts[name], 12) for name, members in layers.items() for path, _ in members}


def _outliers(leaves: list[Array], threshold: float) -> float:
    """Return the fraction of scores above ``threshold`` times their mean."""
    size = sum(int(leaf.size) for leaf in leaves) or 1
    mean = sum(float(jnp.sum(leaf.astype(working_dtype(leaf)))) for leaf in leaves) / size
    count: int = sum(int(jnp.sum(leaf > jnp.asarray(threshold * mean, leaf.dtype))) for leaf in leaves)
    return count / size
