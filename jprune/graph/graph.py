"""The graph of a model: roles of axes, groups of channels and multiply-adds. It prints as tables."""

import dataclasses
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import PyTree

from jprune.graph.axes import KernelAxes
from jprune.graph.channels import ChannelGroup, Member
from jprune.graph.values import Program
from jprune.trees import Leaf


class Model(NamedTuple):
    """A function and the shapes with which it is traced.

    Attributes:
      apply: the function.
      params: shapes of its parameters.
      inputs: shapes of its inputs.
      state: shapes of its state, or None.
      state_by_keyword: whether it takes the state as ``state=``, not as its second argument.
    """

    apply: Callable[..., PyTree]
    params: PyTree
    inputs: tuple[PyTree, ...]
    state: PyTree
    state_by_keyword: bool

    def __call__(self, params: PyTree, inputs: Sequence[PyTree], state: PyTree) -> PyTree:
        """Call the function."""
        if self.state is None:
            return self.apply(params, *inputs)
        return self.apply(params, *inputs, state=state) if self.state_by_keyword else self.apply(params, state, *inputs)


@dataclasses.dataclass(frozen=True, eq=False)
class Graph:
    """Roles of axes, channel groups and multiply-adds of a traced model; made by ``trace_model``.

    Attributes:
      axes: the role of every axis, by path; None if it is unknown, for the reason in ``unknown``.
      shapes: shapes, by path.
      kernels: paths of the leaves that a matrix product or a convolution reads as its kernel.
      channels: groups of channels that can be removed.
      frozen: why indices of an axis are never removed, and how many, by (path, axis).
      unknown: why the axes are not known, by path.
      multiply_adds: multiply-adds of the contractions that read the leaf, by path; all iterations of a scan count.
      in_while_loops: paths whose multiply-adds are counted for one iteration of a while loop.
      other_multiply_adds: multiply-adds of contractions that read no parameter, such as attention scores.
      program: the traced program with the channel ids of each array; its inputs are the arrays of the
        parameters, of the state and of the inputs, in this order.
      roots: the class of every channel id, 0 if it is never removed; ``roots[value.axes[0].ids]`` gives the channel of
        each index of the first axis.
      outputs: tree structure of the model's outputs.
      model: the function that was traced, and its shapes.
    """

    axes: Mapping[str, KernelAxes | None]
    shapes: Mapping[str, tuple[int, ...]]
    kernels: tuple[str, ...]
    channels: tuple[ChannelGroup, ...]
    frozen: Mapping[tuple[str, int], str]
    unknown: Mapping[str, str]
    multiply_adds: Mapping[str, int]
    in_while_loops: tuple[str, ...]
    other_multiply_adds: int
    program: Program = dataclasses.field(repr=False)
    roots: np.ndarray = dataclasses.field(repr=False)
    outputs: PyTree = dataclasses.field(repr=False)
    model: Model = dataclasses.field(repr=False)

    def __call__(self, path: str, leaf: Leaf) -> bool:
        """Whether a leaf is a kernel of the model, so that a graph can be given as ``where=``."""
        return path in self.kernels

    def __str__(self) -> str:
        return _described(self)


def _described(graph: Graph) -> str:
    """Tables of leaves, of groups of channels and of axes that are never removed."""
    groups: dict[tuple[str, int], list[str]] = {}
    for number, group in enumerate(graph.channels):
        for member in group.members:
            groups.setdefault((member.path, member.axis), []).append(f"#{number}")
    leaves = [
        [
            path,
            str(shape),
            _roles(graph.axes[path], graph.unknown.get(path, "")),
            _marks(groups, path, len(shape)),
            f"{graph.multiply_adds[path]:,}",
        ]
        for path, shape in graph.shapes.items()
    ]
    total = sum(graph.multiply_adds.values())
    leaves.append(["total", "", "", "", f"{total:,}"])
    if graph.other_multiply_adds:
        leaves.append(["without parameters", "", "", "", f"{graph.other_multiply_adds:,}"])
    loops = ", ".join(graph.in_while_loops)
    text = [f"multiply-adds of only one iteration of a while loop: {loops}"] if loops else []
    text += [_aligned([["leaf", "shape", "axes", "channels", "multiply-adds"], *leaves])]
    text += ["\n".join(_group(number, group)) for number, group in enumerate(graph.channels)]
    reasons: dict[tuple[str, str], list[str]] = {}
    for (path, axis), why in graph.frozen.items():
        reasons.setdefault((path, why), []).append(str(axis))
    if reasons:
        frozen = [[path, ", ".join(axes), why] for (path, why), axes in reasons.items()]
        text.append(_aligned([["never removed", "axes", "why"], *frozen]))
    return "\n\n".join(text)


def _group(number: int, group: ChannelGroup) -> list[str]:
    exact = "exact" if group.exact else "not exact"
    members = ", ".join(_member(member) for member in (*group.members, *group.state))
    lines = [f"#{number}: {group.size} {group.kind}, {exact}"]
    for part in (members, *group.why):
        lines += textwrap.wrap(part, 110, initial_indent="    ", subsequent_indent="    ", break_long_words=False)
    return lines


def _member(member: Member) -> str:
    each = member.indices.shape[1]
    return f"{member.path}[{member.axis}]" + (f" ({each} each)" if each > 1 else "")


def _roles(axes: KernelAxes | None, why: str) -> str:
    if axes is None:
        return f"unknown: {why}"
    named = [(role, getattr(axes, role)) for role in ("stacked", "inputs", "outputs", "spatial")]
    shown = [f"{role} {', '.join(map(str, places))}" for role, places in named if places]
    return "; ".join([*shown, *([f"groups {axes.groups}"] if axes.groups > 1 else [])])


def _marks(groups: Mapping[tuple[str, int], list[str]], path: str, rank: int) -> str:
    return " ".join(f"{axis}:{','.join(groups[path, axis])}" for axis in range(rank) if (path, axis) in groups)


def _aligned(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
