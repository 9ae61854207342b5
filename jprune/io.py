"""Masks and pruned weights as files and as sparse arrays."""

from jprune.pruning.export.files import load_masks, load_pruned, save_masks, save_pruned, to_bcoo

__all__ = ["load_masks", "load_pruned", "save_masks", "save_pruned", "to_bcoo"]
