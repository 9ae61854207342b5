"""jprune: pruning, jumpstart regularization and per-class recall audits for JAX.

Only the public names live here; each wing has a folder of its own. ``jprune.recall`` needs scipy and
pandas and is loaded when it is first used.
"""

import importlib
from typing import Any

from jprune.jumpstart import (
    activity,
    activity_report,
    add_jumpstart,
    call_with_preactivations,
    jumpstart_loss,
    jumpstart_penalty,
    merge_unit_status,
    point_status,
    preactivations,
    unit_status,
)
from jprune.pruning.dynamics import Regrow, cosine_fraction, dense_gradient, reset_moments, straight_through
from jprune.pruning.export.costs import cost_table, multiply_adds
from jprune.pruning.export.files import load_masks, load_pruned, save_masks, save_pruned, to_bcoo
from jprune.pruning.nm_training import SrSteState, sr_ste
from jprune.pruning.proximal import group_soft_threshold, hard_threshold, soft_threshold
from jprune.pruning.recalibration import recalibrate_batch_norm
from jprune.pruning.schedules import cubic, geometric, one_shot
from jprune.pruning.scores.activations import wanda
from jprune.pruning.scores.calibration import Gram, Reconstructed, input_grams, sparsegpt
from jprune.pruning.scores.elementwise import Score, gradient, magnitude, movement, random, undecayed
from jprune.pruning.scores.model_based import average_gradients, fisher, iterated_masks, snip, synflow
from jprune.pruning.selection.as_published import bernoulli_masks, legacy_signed_masks
from jprune.pruning.selection.patterns import block_masks, channel_masks, nm_masks, output_masks
from jprune.pruning.selection.unstructured import (
    apply_masks,
    compression,
    erk_masks,
    global_masks,
    keep_count,
    layer_masks,
    sparsity,
    uniform_masks,
)
from jprune.pruning.state import PruneState, check_pruned, masks_of, with_masks
from jprune.pruning.structured.removal import Compacted, remove_dead
from jprune.pruning.tickets import Ticket, lottery_ticket
from jprune.pruning.transform import keep_zeros, prune
from jprune.trees import kernels, select

__version__ = "0.1.0"  # pyproject.toml says the same


def __getattr__(name: str) -> Any:
    if name == "recall":
        return importlib.import_module("jprune.recall")
    raise AttributeError(f"module 'jprune' has no attribute {name!r}")


__all__ = [
    "Compacted",
    "Gram",
    "PruneState",
    "Reconstructed",
    "Regrow",
    "Score",
    "SrSteState",
    "Ticket",
    "activity",
    "activity_report",
    "add_jumpstart",
    "apply_masks",
    "average_gradients",
    "bernoulli_masks",
    "block_masks",
    "call_with_preactivations",
    "channel_masks",
    "check_pruned",
    "compression",
    "cosine_fraction",
    "cost_table",
    "cubic",
    "dense_gradient",
    "erk_masks",
    "fisher",
    "geometric",
    "global_masks",
    "gradient",
    "group_soft_threshold",
    "hard_threshold",
    "input_grams",
    "iterated_masks",
    "jumpstart_loss",
    "jumpstart_penalty",
    "keep_count",
    "keep_zeros",
    "kernels",
    "layer_masks",
    "legacy_signed_masks",
    "load_masks",
    "load_pruned",
    "lottery_ticket",
    "magnitude",
    "masks_of",
    "merge_unit_status",
    "movement",
    "multiply_adds",
    "nm_masks",
    "one_shot",
    "output_masks",
    "point_status",
    "preactivations",
    "prune",
    "random",
    "recalibrate_batch_norm",
    "remove_dead",
    "reset_moments",
    "save_masks",
    "save_pruned",
    "select",
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
    "unit_status",
    "wanda",
    "with_masks",
]
