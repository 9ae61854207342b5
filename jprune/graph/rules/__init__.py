"""Rules that say how each primitive affects channels and the roles of axes.

A rule takes the record, the equation and the values of its inputs, and returns the values of its outputs. ``RULES``
maps the primitive's name to its rule; calls and loops are in ``loops``, since they run programs. A primitive
without a rule freezes every channel it touches, and the axes of the parameters it reads are unknown.
"""

from jprune.graph.rules import contractions, elementwise, indexing, moving, reductions  # each registers its rules
from jprune.graph.rules.constants import passes_numbers, without_numbers
from jprune.graph.rules.registry import RULES, freeze, not_understood, opaque, union

__all__ = [
    "RULES",
    "contractions",
    "elementwise",
    "freeze",
    "indexing",
    "moving",
    "not_understood",
    "opaque",
    "passes_numbers",
    "reductions",
    "union",
    "without_numbers",
]
