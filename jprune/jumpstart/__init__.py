"""Jumpstart regularization: a penalty on dead and linear units and points, and reports that count them."""

from jprune.jumpstart.capture import call_with_preactivations, preactivations
from jprune.jumpstart.figures import point_map, unit_map
from jprune.jumpstart.layers import Stack
from jprune.jumpstart.penalty import jumpstart_penalty
from jprune.jumpstart.report import activity_report
from jprune.jumpstart.transform import FusedAux, JumpstartState, add_jumpstart, jumpstart_loss
from jprune.jumpstart.units import (
    Activity,
    activity,
    convergence,
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
