"""What the axes of every parameter mean and which channels belong together, read from a model's traced program."""

from jprune.graph.axes import KernelAxes
from jprune.graph.channels import ChannelGroup
from jprune.graph.graph import Graph
from jprune.graph.trace import trace_model

__all__ = ["ChannelGroup", "Graph", "KernelAxes", "trace_model"]
