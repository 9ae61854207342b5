"""Compute the exact cost of a network as a function of the channels that are removed.

Channels, parameters and multiply-adds are sums of products of axis sizes, and the size of an axis is a linear function
of the numbers of channels removed. So the cost of any choice of channels is known without building the network:
in Python integers or, at run time, in two uint32 limbs.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jprune import jaxprs
from jprune.graph import Graph
from jprune.graph.channels import ChannelGroup
from jprune.graph.values import Program, Step
from jprune.pruning.selection import uint64
from jprune.pruning.selection.uint64 import Count

BUDGETS = ("channels", "parameters", "multiply_adds")


class Cost(NamedTuple):
    """The sum over ``terms`` of a coefficient times the product of the sizes of some axes.

    Attributes:
      classes: the class of every channel; channels of one class have the same cost.
      sizes: the size of every axis with all channels.
      widths: the number of indices of an axis that a channel of each class has.
      coefficients: the coefficient of each term.
      factors: the axes of each term, as indices into ``sizes``.
    """

    classes: Int[np.ndarray, " channels"]
    sizes: Int[np.ndarray, " axes"]
    widths: Int[np.ndarray, "axes classes"]
    coefficients: tuple[int, ...]
    factors: tuple[tuple[int, ...], ...]

    def after(self, removed: np.ndarray) -> int:
        """Return the exact cost after these channels are removed.

        Args:
          removed: bool array (channels,).
        """
        counts = np.bincount(self.classes[removed], minlength=self.widths.shape[1])
        sizes = (self.sizes - self.widths @ counts).tolist()
        terms = zip(self.coefficients, self.factors, strict=True)
        return sum(coefficient * math.prod(sizes[axis] for axis in factors) for coefficient, factors in terms)

    def limbs_after(self, removed: Array) -> Count:
        """Return the exact cost after these channels are removed, as limbs; works on traced arrays.

        Args:
          removed: bool array (channels,), which may be traced.
        """
        counts = jnp.zeros(self.widths.shape[1], jnp.int32).at[self.classes].add(removed.astype(jnp.int32))
        lost = jnp.sum(jnp.asarray(self.widths, jnp.int32) * counts[None, :], axis=1)
        sizes = (jnp.asarray(self.sizes, jnp.int32) - lost).astype(jnp.uint32)
        sizes = jnp.concatenate([sizes, jnp.ones(1, jnp.uint32)])
        most = max(map(len, self.factors), default=0)
        padded = np.full((len(self.factors), most), len(self.sizes))
        for row, factors in zip(padded, self.factors, strict=True):
            row[: len(factors)] = factors
        terms = Count(*(jnp.asarray(limb) for limb in uint64.count_of(self.coefficients)))
        for place in range(most):
            terms = uint64.multiply(terms, sizes[padded[:, place]])
        return uint64.total(terms)


def cost_of(graph: Graph, groups: Sequence[ChannelGroup], budget: str) -> Cost:
    """Return the cost of a traced model as a function of the channels of some of its groups.

    Args:
      graph: made by ``jprune.trace_model``.
      groups: the groups whose channels can be removed, in the order of the channels.
      budget: "channels", "parameters" or "multiply_adds". Multiply-adds are those of all matrix products and
        convolutions for the traced inputs, with all iterations of a scan and the costliest branch of a cond.

    Raises:
      ValueError: ``budget`` is unknown, or there are multiply-adds in a while loop, whose number of iterations is
        unknown.
    """
    if budget not in BUDGETS:
        raise ValueError(f"budget={budget!r} is unknown; use 'channels', 'parameters' or 'multiply_adds'")
    channels = sum(group.size for group in groups)
    channel = np.full(len(graph.roots), -1)
    if groups:
        channel[np.concatenate([group.roots for group in groups])] = np.arange(channels)
    axes = _Axes(channel[graph.roots], channels)
    terms: dict[tuple[int, ...], int]
    if budget == "channels":
        terms = {(axes.add(np.concatenate([group.roots for group in groups])),): 1} if groups else {}
    elif budget == "parameters":
        terms = axes.terms(_leaves(graph))
    else:
        terms = axes.terms(_products(graph.program, 1))
    return axes.cost(terms)


class _Axes:
    """The distinct axes that lose channels."""

    def __init__(self, channel_of_id: np.ndarray, channels: int):
        self._channel_of_id = channel_of_id
        self._channels = channels
        self._found: dict[bytes, int] = {}
        self._counts: list[np.ndarray] = []
        self._sizes: list[int] = []

    def add(self, ids: np.ndarray) -> int:
        """Add an axis and return its number, or -1 for an axis that loses no channels."""
        owners = self._channel_of_id[ids]
        owners = owners[owners >= 0]
        if not owners.size:
            return -1
        key = len(ids).to_bytes(8, "little") + np.sort(owners).tobytes()
        if key not in self._found:
            self._found[key] = len(self._sizes)
            self._counts.append(owners)
            self._sizes.append(len(ids))
        return self._found[key]

    def terms(self, products: Iterator[tuple[int, Sequence[np.ndarray]]]) -> dict[tuple[int, ...], int]:
        """Add up products of axes: {axes that lose channels: coefficient}."""
        terms: dict[tuple[int, ...], int] = {}
        for coefficient, arrays in products:
            constant, factors = coefficient, []
            for ids in arrays:
                axis = self.add(ids)
                if axis < 0:
                    constant *= len(ids)
                else:
                    factors.append(axis)
            key = tuple(sorted(factors))
            terms[key] = terms.get(key, 0) + constant
        return terms

    def cost(self, terms: dict[tuple[int, ...], int]) -> Cost:
        """Group the channels into classes with the same number of indices of every axis."""
        counts = [np.bincount(owners, minlength=self._channels) for owners in self._counts]
        draw = np.random.default_rng(0)
        kinds = np.zeros(self._channels, np.uint64)
        for count in counts:  # channels with equal random sums are in one class
            kinds += count.astype(np.uint64) * draw.integers(1 << 62, dtype=np.uint64)
        _, first, classes = np.unique(kinds, return_index=True, return_inverse=True)
        widths = np.array([count[first] for count in counts]).reshape(len(counts), len(first))
        return Cost(classes, np.array(self._sizes, np.int64), widths, tuple(terms.values()), tuple(terms))


def _leaves(graph: Graph) -> Iterator[tuple[int, Sequence[np.ndarray]]]:
    for value in graph.program.inputs[: len(graph.shapes)]:
        yield 1, value.ids


def _products(program: Program, times: int) -> Iterator[tuple[int, Sequence[np.ndarray]]]:
    """Yield the matrix products and convolutions of a program, each as a product of axes."""
    for step in program.steps:
        name = step.equation.primitive.name
        if name == "dot_general":
            (contracted, _), _ = step.equation.params["dimension_numbers"]
            yield times, [*step.outputs[0].ids, *(step.inputs[0].ids[axis] for axis in contracted)]
        elif name == "conv_general_dilated":
            made = step.equation.params["dimension_numbers"].rhs_spec[0]
            kernel = [ids for axis, ids in enumerate(step.inputs[1].ids) if axis != made]
            yield times, [*step.outputs[0].ids, *kernel]
        elif name in ("ragged_dot", "ragged_dot_general"):
            outputs, contracted = jaxprs.ragged_axes(step.equation)
            yield times, [*(step.outputs[0].ids[p] for p in outputs), *(step.inputs[0].ids[p] for p in contracted)]
        else:
            yield from _inside(step, name, times)


def _inside(step: Step, name: str, times: int) -> Iterator[tuple[int, Sequence[np.ndarray]]]:
    if name == "while":
        if any(True for program in step.inside for _ in _products(program, 1)):
            raise ValueError(
                "there are multiply-adds in a while loop, whose number of iterations is unknown; use lax.scan, or "
                "another budget: 'channels' or 'parameters'"
            )
    elif name == "cond":
        branches = [list(_products(branch, times)) for branch in step.inside]
        yield from max(branches, key=lambda terms: sum(n * math.prod(map(len, ids)) for n, ids in terms))
    else:
        times *= step.equation.params["length"] if name == "scan" else 1
        times *= jaxprs.devices_of(step.equation) if name == "shard_map" else 1
        for program in step.inside:
            yield from _products(program, times)
