"""The jumpstart wing: what to keep alive.

Preactivations of a model go in; a penalty that revives dead and linear units and points comes out, or
a count of them.
"""

from jprune.jumpstart.figures import grid_map, point_map, unit_map
from jprune.jumpstart.layers import Stack
from jprune.jumpstart.penalty import jumpstart_penalty
from jprune.jumpstart.preactivations import call_with_preactivations, preactivations
from jprune.jumpstart.report import activity_report
from jprune.jumpstart.transform import FusedAux, JumpstartState, add_jumpstart, jumpstart_loss
from jprune.jumpstart.units import (
    Activity,
    activity,
    convergence,
    first_dead_layer,
    merge_unit_status,
    point_status,
    trainability,
    unit_status,
)

__all__ = [
    "Activity",
    "FusedAux",
    "JumpstartState",
    "Stack",
    "activity",
    "activity_report",
    "add_jumpstart",
    "call_with_preactivations",
    "convergence",
    "first_dead_layer",
    "grid_map",
    "jumpstart_loss",
    "jumpstart_penalty",
    "merge_unit_status",
    "point_map",
    "point_status",
    "preactivations",
    "trainability",
    "unit_map",
    "unit_status",
]
