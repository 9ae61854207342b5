"""jprune: pruning, jumpstart regularization and per-class recall audits for JAX.

The most used names are here; the others are in ``jprune.scores``, ``jprune.selection``, ``jprune.schedules``,
``jprune.io``, ``jprune.jumpstart`` and ``jprune.recall``. ``jprune.recall`` needs the extra ``recall`` (pandas and
scipy). Everything is imported when it is first used, so that ``jprune --help`` does not wait for jax.
"""

import importlib
from typing import TYPE_CHECKING

from jprune._extras import missing as _missing
from jprune._version import __version__ as __version__

if TYPE_CHECKING:  # for type checkers and editors; at run time __getattr__ imports the same names
    from jprune import graph as graph
    from jprune import io as io
    from jprune import jumpstart as jumpstart
    from jprune import pruning as pruning
    from jprune import recall as recall
    from jprune import schedules as schedules
    from jprune import scores as scores
    from jprune import selection as selection
    from jprune import trees as trees
    from jprune.graph.axes import KernelAxes
    from jprune.graph.trace import trace_model
    from jprune.jumpstart import add_jumpstart, jumpstart_penalty, preactivations, unit_status
    from jprune.pruning.amounts import Keep
    from jprune.pruning.dynamic_training import rigl, sparse_evolution
    from jprune.pruning.dynamics import Regrow, reset_moments, straight_through
    from jprune.pruning.export.costs import cost_table
    from jprune.pruning.lora import merge_lora
    from jprune.pruning.nm_training import sr_ste
    from jprune.pruning.proximal import group_soft_threshold, hard_threshold, soft_threshold
    from jprune.pruning.recalibration import recalibrate_batch_norm
    from jprune.pruning.schedules import cubic, geometric, one_shot
    from jprune.pruning.scores.activations import wanda
    from jprune.pruning.scores.calibration import sparsegpt
    from jprune.pruning.scores.elementwise import gradient, magnitude, random, undecayed
    from jprune.pruning.selection.patterns import block_masks, channel_masks, nm_masks, output_masks
    from jprune.pruning.selection.unstructured import (
        apply_masks,
        erk_masks,
        global_masks,
        keep_count,
        layer_masks,
        sparsity,
        uniform_masks,
    )
    from jprune.pruning.state import check_pruned, masks_of, with_masks
    from jprune.pruning.structured.removal import remove_channels, remove_dead
    from jprune.pruning.structured.selection import channel_group_masks, structured
    from jprune.pruning.tickets import lottery_ticket
    from jprune.pruning.transform import keep_zeros, prunable, prune
    from jprune.trees import by_path, kernels

_MODULES = ("graph", "io", "jumpstart", "pruning", "recall", "schedules", "scores", "selection", "trees")
_NAMES = {
    "graph.axes": ["KernelAxes"],
    "graph.trace": ["trace_model"],
    "jumpstart": ["add_jumpstart", "jumpstart_penalty", "preactivations", "unit_status"],
    "pruning.amounts": ["Keep"],
    "pruning.dynamic_training": ["rigl", "sparse_evolution"],
    "pruning.dynamics": ["Regrow", "reset_moments", "straight_through"],
    "pruning.export.costs": ["cost_table"],
    "pruning.lora": ["merge_lora"],
    "pruning.nm_training": ["sr_ste"],
    "pruning.proximal": ["group_soft_threshold", "hard_threshold", "soft_threshold"],
    "pruning.recalibration": ["recalibrate_batch_norm"],
    "pruning.schedules": ["cubic", "geometric", "one_shot"],
    "pruning.scores.activations": ["wanda"],
    "pruning.scores.calibration": ["sparsegpt"],
    "pruning.scores.elementwise": ["gradient", "magnitude", "random", "undecayed"],
    "pruning.selection.patterns": ["block_masks", "channel_masks", "nm_masks", "output_masks"],
    "pruning.selection.unstructured": [
        "apply_masks",
        "erk_masks",
        "global_masks",
        "keep_count",
        "layer_masks",
        "sparsity",
        "uniform_masks",
    ],
    "pruning.state": ["check_pruned", "masks_of", "with_masks"],
    "pruning.structured.removal": ["remove_channels", "remove_dead"],
    "pruning.structured.selection": ["channel_group_masks", "structured"],
    "pruning.tickets": ["lottery_ticket"],
    "pruning.transform": ["keep_zeros", "prunable", "prune"],
    "trees": ["by_path", "kernels"],
}
_MODULE_OF = {name: f"jprune.{module}" for module, names in _NAMES.items() for name in names}
_MOVED = {
    "Compacted": "jprune.pruning.structured.removal.SmallModel",
    "PruneState": "jprune.pruning.state.PruneState",
    "Score": "jprune.scores.Score",
    "Ticket": "jprune.pruning.tickets.Ticket",
    "activity": "jprune.jumpstart.activity",
    "activity_report": "jprune.jumpstart.activity_report",
    "average_gradients": "jprune.scores.average_gradients",
    "bernoulli_masks": "jprune.selection.bernoulli_masks",
    "call_with_preactivations": "jprune.jumpstart.call_with_preactivations",
    "compression": "jprune.selection.compression",
    "cosine_fraction": "jprune.schedules.cosine_fraction",
    "dense_gradient": "jprune.scores.dense_gradient",
    "fisher": "jprune.scores.fisher",
    "iterated_masks": "jprune.selection.iterated_masks",
    "jumpstart_loss": "jprune.jumpstart.jumpstart_loss",
    "legacy_signed_masks": "jprune.selection.legacy_signed_masks",
    "load_masks": "jprune.io.load_masks",
    "load_pruned": "jprune.io.load_pruned",
    "merge_unit_status": "jprune.jumpstart.merge_unit_status",
    "movement": "jprune.scores.movement",
    "multiply_adds": "jprune.pruning.export.costs.multiply_adds",
    "point_status": "jprune.jumpstart.point_status",
    "save_masks": "jprune.io.save_masks",
    "save_pruned": "jprune.io.save_pruned",
    "select": "jprune.by_path(include=..., exclude=...)",
    "snip": "jprune.scores.snip",
    "synflow": "jprune.scores.synflow",
    "to_bcoo": "jprune.io.to_bcoo",
}

if not TYPE_CHECKING:  # hidden from type checkers, which would otherwise accept any name

    def __getattr__(name: str) -> object:
        if name in _MODULE_OF:
            value = globals()[name] = getattr(importlib.import_module(_MODULE_OF[name]), name)
            return value
        if name in _MOVED:
            raise AttributeError(f"jprune.{name} is now {_MOVED[name]}")
        if name not in _MODULES:
            # With ``name`` and ``obj`` Python suggests a similar name.
            raise AttributeError(
                f"module 'jprune' has no attribute {name!r}", name=name, obj=importlib.import_module("jprune")
            )
        try:
            return importlib.import_module(f"jprune.{name}")
        except ModuleNotFoundError as error:
            if name == "recall" and error.name in ("pandas", "scipy"):
                raise ImportError(_missing("jprune.recall needs the extra 'recall'", "recall")) from error
            raise


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES, *_MODULE_OF})


__all__ = [
    "Keep",
    "KernelAxes",
    "Regrow",
    "add_jumpstart",
    "apply_masks",
    "block_masks",
    "by_path",
    "channel_group_masks",
    "channel_masks",
    "check_pruned",
    "cost_table",
    "cubic",
    "erk_masks",
    "geometric",
    "global_masks",
    "gradient",
    "group_soft_threshold",
    "hard_threshold",
    "jumpstart_penalty",
    "keep_count",
    "keep_zeros",
    "kernels",
    "layer_masks",
    "lottery_ticket",
    "magnitude",
    "masks_of",
    "merge_lora",
    "nm_masks",
    "one_shot",
    "output_masks",
    "preactivations",
    "prunable",
    "prune",
    "random",
    "recalibrate_batch_norm",
    "remove_channels",
    "remove_dead",
    "reset_moments",
    "rigl",
    "soft_threshold",
    "sparse_evolution",
    "sparsegpt",
    "sparsity",
    "sr_ste",
    "straight_through",
    "structured",
    "trace_model",
    "undecayed",
    "uniform_masks",
    "unit_status",
    "wanda",
    "with_masks",
]
