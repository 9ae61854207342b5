"""What the axes of every parameter mean, read from a model's traced program."""

from jprune.graph.axes import KernelAxes

__all__ = ["KernelAxes"]
