"""The rules by the primitive's name, what happens without one, and what several of them need."""

import math
from collections.abc import Callable, Sequence

import numpy as np
from jax.extend import core

from jprune.graph.channels import is_frozen
from jprune.graph.values import Axis, Kind, Record, Source, Value
from jprune.jaxprs import shape_of

Rule = Callable[[Record, core.JaxprEqn, list[Value]], list[Value]]
RULES: dict[str, Rule] = {}


def rule(*primitives: str) -> Callable[[Rule], Rule]:
    """Register a rule for the primitives of these names."""

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(primitives, function))
        return function

    return register


def names(text: str) -> frozenset[str]:
    """Return the words of a text."""
    return frozenset(text.split())


def opaque(record: Record, shape: Sequence[int], why: str, kind: Kind = Kind.ACTIVATION) -> Value:
    """Return an array whose channels are never removed, for the given reason."""
    return Value(tuple(Axis(record.channels.frozen(size, why)) for size in shape), kind)


def freeze(record: Record, value: Value, why: str) -> None:
    """Freeze all channels of the array."""
    for axis in value.axes:
        record.channels.freeze(axis.ids, why)


def not_understood(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Freeze everything that a primitive without a rule touches; the axes of parameters it reads are unknown."""
    name = equation.primitive.name
    for value in inputs:
        freeze(record, value, f"'{name}' is not supported")
        sources = [*value.chosen, *(source for axis in value.axes for source in axis.sources)]
        record.unknown.extend((path, name) for path in dict.fromkeys(source.path for source in sources))
    kind = max((value.kind for value in inputs), default=Kind.CONSTANT)
    kind = Kind.ACTIVATION if kind.of_parameters else kind
    return [opaque(record, shape_of(var), f"'{name}' is not supported", kind) for var in equation.outvars]


def union(*sources: Sequence[Source]) -> tuple[Source, ...]:
    """Return the sources in order, without duplicates."""
    return tuple(dict.fromkeys(source for group in sources for source in group))


def pick(record: Record, axes: Sequence[Axis]) -> np.ndarray:
    """Tie axes of one size, and return the ids of one that can lose channels if there is one."""
    picked = next((axis.ids for axis in axes if not is_frozen(axis.ids)), axes[0].ids)
    for axis in axes:
        record.channels.tie(picked, axis.ids)
    return picked


def is_zero(value: Value) -> bool:
    """Whether a value is a literal that is zero everywhere."""
    return value.literal is not None and not np.any(value.literal)


def combined_kind(record: Record, values: list[Value]) -> Kind:
    """Return the kind of an elementwise result; parameters combined with data count as read here."""
    kinds = {value.kind for value in values if math.prod(value.shape) > 1} or {value.kind for value in values}
    scalars = {value.kind for value in values}
    kind = max(kinds)
    if kind is Kind.LOOKED_UP and kinds & {Kind.PARAMETER, Kind.SCALED}:
        kind = Kind.ACTIVATION
    elif kind is Kind.PARAMETER and max(scalars) > kind:
        kind = Kind.SCALED
    elif not kind.of_parameters:
        kind = max(scalars)
    if not kind.of_parameters:
        for value in values:
            if value.kind.of_parameters:
                record.settle(value)
    return kind
