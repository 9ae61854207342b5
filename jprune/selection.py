"""Selections, which turn scores into masks, and functions of masks: counts, sparsity, compression."""

from jprune.pruning.scores.layer_adaptive import owl_sparsities
from jprune.pruning.scores.model_based import iterated_masks
from jprune.pruning.selection.as_published import bernoulli_masks, legacy_signed_masks
from jprune.pruning.selection.patterns import block_masks, channel_masks, nm_masks, output_masks
from jprune.pruning.selection.unstructured import (
    apply_masks,
    compression,
    erk_counts,
    erk_masks,
    global_masks,
    keep_count,
    layer_counts,
    layer_masks,
    sparsity,
    uniform_masks,
)

__all__ = [
    "apply_masks",
    "bernoulli_masks",
    "block_masks",
    "channel_masks",
    "compression",
    "erk_counts",
    "erk_masks",
    "global_masks",
    "iterated_masks",
    "keep_count",
    "layer_counts",
    "layer_masks",
    "legacy_signed_masks",
    "nm_masks",
    "output_masks",
    "owl_sparsities",
    "sparsity",
    "uniform_masks",
]
