"""Pruning: scores, selections, schedules and the optax transformations that apply them.

<<<<<<< HEAD
The public names are in ``jprune``, ``jprune.scores``, ``jprune.selection``, ``jprune.schedules`` and ``jprune.io``.
"""
=======
from jprune.pruning.dynamics import Regrow, cosine_fraction, dense_gradient, reset_moments, straight_through
from jprune.pruning.export.costs import cost_table, multiply_adds
from jprune.pruning.export.files import load_masks, load_pruned, save_masks, save_pruned, to_bcoo
from jprune.pruning.nm_training import SrSteState, sr_ste
from jprune.pruning.proximal import group_soft_threshold, hard_threshold, soft_threshold
from jprune.pruning.recalibration import recalibrate_batch_norm
from jprune.pruning.schedules import cubic, geometric, one_shot
from jprune.pruning.scores.activations import wanda
from jprune.pruning.scores.calibration import Gram, Reconstructed, input_grams, sparsegpt
from jprune.pruning.scores.elementwise import Score, gradient, magnitude, movement, random, score_selected, undecayed
from jprune.pruning.scores.filters import filter_taylor, geometric_median, norm_scale
from jprune.pruning.scores.layer_adaptive import lamp, owl_sparsities
from jprune.pruning.scores.model_based import average_gradients, fisher, iterated_masks, snip, synflow
from jprune.pruning.selection.as_published import bernoulli_masks, legacy_signed_masks
from jprune.pruning.selection.patterns import block_masks, channel_masks, nm_masks, output_masks
from jprune.pruning.selection.uint64 import Count
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
from jprune.pruning.state import PruneState, check_pruned, masks_of, with_masks
from jprune.pruning.structured.removal import Compacted, remove_dead
from jprune.pruning.tickets import Ticket, lottery_ticket
from jprune.pruning.transform import keep_zeros, prune

__all__ = [
    "Compacted",
    "Count",
    "Gram",
    "PruneState",
    "Reconstructed",
    "Regrow",
    "Score",
    "SrSteState",
    "Ticket",
    "apply_masks",
    "average_gradients",
    "bernoulli_masks",
    "block_masks",
    "channel_masks",
    "check_pruned",
    "compression",
    "cosine_fraction",
    "cost_table",
    "cubic",
    "dense_gradient",
    "erk_counts",
    "erk_masks",
    "filter_taylor",
    "fisher",
    "geometric",
    "geometric_median",
    "global_masks",
    "gradient",
    "group_soft_threshold",
    "hard_threshold",
    "input_grams",
    "iterated_masks",
    "keep_count",
    "keep_zeros",
    "lamp",
    "layer_counts",
    "layer_masks",
    "legacy_signed_masks",
    "load_masks",
    "load_pruned",
    "lottery_ticket",
    "magnitude",
    "masks_of",
    "movement",
    "multiply_adds",
    "nm_masks",
    "norm_scale",
    "one_shot",
    "output_masks",
    "owl_sparsities",
    "prune",
    "random",
    "recalibrate_batch_norm",
    "remove_dead",
    "reset_moments",
    "save_masks",
    "save_pruned",
    "score_selected",
    "snip",
    "soft_threshold",
    "sparsegpt",
    "sparsity",
    "sr_ste",
    "straight_through",
    "synflow",
    "to_bcoo",
    "undecayed",
    "uniform_masks",
    "wanda",
    "with_masks",
]
>>>>>>> 2185c10 (Score whole filters, LAMP and the OWL allocation)
