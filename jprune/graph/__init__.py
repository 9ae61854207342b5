"""Roles of the axes of each parameter, and groups of coupled channels, found by tracing a model."""

from jprune.graph.axes import KernelAxes
from jprune.graph.channels import ChannelGroup
from jprune.graph.graph import Graph
from jprune.graph.trace import trace_model

__all__ = ["ChannelGroup", "Graph", "KernelAxes", "trace_model"]
