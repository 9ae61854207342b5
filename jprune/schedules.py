"""Pruning schedules: dicts ``{step: amount}``, and the fraction that RigL exchanges at each step."""

from jprune.pruning.amounts import Keep
from jprune.pruning.dynamics import cosine_fraction
from jprune.pruning.schedules import cubic, describe, geometric, one_shot

__all__ = ["Keep", "cosine_fraction", "cubic", "describe", "geometric", "one_shot"]
