"""The pruning wing: what a weight is worth, which weights stay, when, and how the rest is kept at zero."""

from jprune.pruning.limbs import Count
from jprune.pruning.masks import (
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
from jprune.pruning.scores import Score, gradient, magnitude, movement, random, score_selected, undecayed

__all__ = [
    "Count",
    "Score",
    "apply_masks",
    "compression",
    "erk_counts",
    "erk_masks",
    "global_masks",
    "gradient",
    "keep_count",
    "layer_counts",
    "layer_masks",
    "magnitude",
    "movement",
    "random",
    "score_selected",
    "sparsity",
    "undecayed",
    "uniform_masks",
]
