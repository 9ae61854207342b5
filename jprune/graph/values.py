"""Descriptions of the arrays of a traced program, and the record that the rules write."""

import dataclasses
import enum
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jax.extend import core

from jprune import jaxprs
from jprune.graph.channels import Constraints, Mark


class Source(NamedTuple):
    """An axis of a parameter."""

    path: str
    axis: int


class Kind(enum.IntEnum):
    """What an array is computed from; the result of an operation has the largest kind of its operands.

    A parameter stays a parameter while its entries are only moved, scaled or combined with other parameters. A
    looked-up parameter was indexed by an activation: rows of an embedding, the weights of an expert.
    """

    CONSTANT = 0
    STATE = 1
    PARAMETER = 2
    SCALED = 3  # a parameter, multiplied by a scalar activation
    LOOKED_UP = 4
    ACTIVATION = 5

    @property
    def of_parameters(self) -> bool:
        """Whether the axes of the array are still axes of parameters."""
        return self in (Kind.PARAMETER, Kind.SCALED, Kind.LOOKED_UP)


class Factor(NamedTuple):
    """One of two parameters that are multiplied with each other; their roles follow from what reads the product.

    Attributes:
      contracted: the axes that the product sums over.
      free: the axes that the product has.
      counted: the entry of the record's multiply-adds for the product.
    """

    contracted: tuple[Source, ...]
    free: tuple[Source, ...]
    counted: tuple[str | None, int]


@dataclasses.dataclass(frozen=True, eq=False)
class Axis:
    """One axis of an array.

    Attributes:
      ids: the channel id of every index.
      sources: axes of parameters that it comes from, outermost first, while the array is made of parameters.
      zero: whether the array is 0 at an index whose channel is masked in all parameters.
      parts: the axes that a reshape merged into it, outermost first, until an operation changes it.
      repeated: whether a broadcast made it, so that the array is the same at all its indices.
      scored: whether activations with this axis were summed over channels, as for scores of attention and statistics of
        a normalization, or made by a scan.
      separate: whether the array was made by a product with a kernel for each index.
      gated: whether the array is a sum of hidden units weighted by a number for each index, as by gates of experts.
    """

    ids: np.ndarray
    sources: tuple[Source, ...] = ()
    zero: bool = False
    parts: "tuple[Axis, ...]" = ()
    repeated: bool = False
    scored: bool = False
    separate: bool = False
    gated: bool = False

    @property
    def size(self) -> int:
        """Number of indices."""
        return len(self.ids)

    def with_ids(self, ids: np.ndarray) -> "Axis":
        """Return this axis with other indices."""
        return dataclasses.replace(self, ids=ids, parts=())

    @property
    def merged(self) -> "tuple[Axis, ...]":
        """The axes of which it is made, also where one of them was merged before; the axis alone if it is one."""
        return tuple(axis for part in self.parts for axis in part.merged) or (self,)


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """One array of the program.

    Attributes:
      axes: its axes.
      kind: what it is made of.
      chosen: axes of parameters that were indexed, until their role is known.
      literal: its value if it is a scalar literal of the jaxpr, also if it is broadcast.
      factors: the two parameters of which it is the product, or None.
      numbers: the axis along which it is 0, 1, 2, ... if it is an ``iota``, or None.
      identity: two axes along which it is 1 where the indices are equal and 0 elsewhere, or None.
    """

    axes: tuple[Axis, ...]
    kind: Kind = Kind.ACTIVATION
    chosen: tuple[Source, ...] = ()
    literal: jaxprs.Value = None
    factors: tuple[Factor, Factor] | None = None
    numbers: int | None = None
    identity: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(axis.size for axis in self.axes)

    @property
    def ids(self) -> tuple[np.ndarray, ...]:
        """The channel ids of its axes."""
        return tuple(axis.ids for axis in self.axes)

    def with_axes(self, axes: Sequence[Axis]) -> "Value":
        """Return this value with other axes."""
        return dataclasses.replace(self, axes=tuple(axes), literal=None, numbers=None, identity=None)


class Step(NamedTuple):
    """One equation of a program, with the values of its inputs and outputs.

    Attributes:
      equation: equation of the jaxpr.
      inputs: one value for every input, including literals.
      outputs: one value for every output.
      inside: the programs it calls: one for a call or a scan, condition and body of a while loop, the branches
        of a cond.
    """

    equation: core.JaxprEqn
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    inside: tuple["Program", ...] = ()


class Program(NamedTuple):
    """A jaxpr with the values of its arrays.

    Attributes:
      jaxpr: the jaxpr.
      consts: values of its constants.
      inputs: one value for every input.
      outputs: one value for every output.
      steps: its equations with their values.
    """

    jaxpr: core.Jaxpr
    consts: tuple[jaxprs.Value, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    steps: tuple[Step, ...]


@runtime_checkable
class _List(Protocol):
    """A list of records of any one type."""

    def __len__(self) -> int: ...

    def __delitem__(self, index: slice, /) -> None: ...


class Record:
    """The results that the rules write: channel constraints, roles, multiply-adds and unsupported primitives."""

    def __init__(self) -> None:
        self.channels = Constraints()
        self.roles: list[tuple[Source, str]] = []
        self.groups: list[tuple[str, int]] = []
        self.factors: list[Factor] = []
        self.multiply_adds: list[tuple[str | None, int]] = []
        self.unknown: list[tuple[str, str]] = []
        self.products: list[tuple[str, str]] = []  # parameters whose product is read as one kernel
        self.made_kernels: list[Value] = []  # kernels of convolutions that are computed from data
        self.mixed: list[tuple[Source, str]] = []  # axes of parameters mixed by a sort or a transform, and its name
        self.times = 1  # how often the equations being traced are executed
        self.leaf_sizes: dict[str, int] = {}
        self.uncounted: list[str] = []  # parameters read in loops with an unknown number of iterations
        self.constants = Kind.CONSTANT

    def role(self, sources: Sequence[Source], what: str) -> None:
        """Record that axes of parameters are read as stacked, inputs, outputs or spatial axes."""
        self.roles.extend((source, what) for source in sources)

    def settle(self, value: Value) -> None:
        """Record that parameters are read as data: their axes are outputs, and indexed axes are inputs."""
        self.role(value.chosen, "indexed")
        for axis in value.axes:
            self.role([source for source in axis.sources if source not in value.chosen], "outputs")

    def settle_product(self, data: Factor, kernel: Factor) -> None:
        """Record that, of two parameters that are multiplied, one is data (learned queries) and the other a kernel."""
        self.role([*data.contracted, *data.free, *kernel.free], "outputs")
        self.role(kernel.contracted, "inputs")
        if kernel.counted in self.multiply_adds:  # the product was counted for its left operand
            place, (_, count) = self.multiply_adds.index(kernel.counted), kernel.counted
            self.multiply_adds[place] = (next(s.path for s in (*kernel.contracted, *kernel.free)), count)

    def count(self, kernel: Value | None, multiply_adds: int) -> None:
        """Count the multiply-adds of a contraction for the parameter it reads, if any."""
        paths = (
            dict.fromkeys(source.path for axis in kernel.axes for source in axis.sources) if kernel is not None else {}
        )
        sizes: dict[str, int] = {path: self.leaf_sizes[path] for path in paths}
        shares: Mapping[str, int] | Mapping[None, int]
        if kernel is None or not sizes:
            shares = {None: 1}
        elif sum(sizes.values()) == math.prod(kernel.shape):  # leaves that were concatenated
            shares = sizes
        else:
            shares = {max(sizes, key=lambda path: sizes[path]): 1}
        for path, share in shares.items():
            self.multiply_adds.append((path, self.times * multiply_adds * share // max(1, sum(shares.values()))))

    def mark(self) -> tuple[Mark, tuple[int, ...]]:
        """Return the current position, for ``rewind``."""
        return self.channels.mark(), tuple(map(len, self._lists()))

    def rewind(self, mark: tuple[Mark, tuple[int, ...]]) -> None:
        """Discard all records since ``mark``."""
        self.channels.rewind(mark[0])
        self._forget(mark[1])

    def _lists(self) -> tuple[_List, ...]:
        read = self.roles, self.groups, self.factors, self.multiply_adds, self.unknown
        return *read, self.products, self.made_kernels, self.mixed, self.uncounted

    def _forget(self, sizes: tuple[int, ...]) -> None:
        for events, size in zip(self._lists(), sizes, strict=True):
            del events[size:]
