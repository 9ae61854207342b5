"""Elementwise operations: the axes of the operands correspond, and zeros may stay zeros."""

import dataclasses
import itertools
import operator
from collections.abc import Callable

import numpy as np
from jax.extend import core

from jprune import jaxprs
from jprune.graph.channels import is_frozen
from jprune.graph.rules.constants import identity_axes, passes_numbers
from jprune.graph.rules.registry import (
    RULES,
    combined_kind,
    is_zero,
    names,
    not_understood,
    pick,
    rule,
    union,
)
from jprune.graph.values import Axis, Factor, Kind, Record, Value
from jprune.jaxprs import shape_of

_ZERO_AT_ZERO = names(
    "neg tanh sin tan asin atan sinh asinh atanh sqrt cbrt abs sign erf erf_inv expm1 log1p square real imag conj copy "
    "copy_p floor ceil round convert_element_type reduce_precision integer_pow bessel_i1e population_count "
    "stop_gradient"
)
_NOT_ZERO_AT_ZERO = names(
    "exp exp2 logistic cos cosh acos acosh erfc bessel_i0e is_finite not clz log rsqrt reciprocal lgamma digamma"
)
_ZERO_WHERE_ALL_ARE = names("add sub or xor add_any complex")
_ZERO_WHERE_ANY_IS = names("mul and mulhi")
_ZERO_WHERE_FIRST_IS = names("div rem pow shift_left shift_right_logical shift_right_arithmetic")
_EVALUATED: dict[str, Callable[..., jaxprs.Value]] = {  # on zeros and literals
    "min": min,
    "max": max,
    "clamp": lambda low, x, high: min(max(low, x), high),  # relu6 is min(max(x, 0), 6)
    "eq": operator.eq,
    "ne": operator.ne,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}
_OTHER_ELEMENTWISE = names(
    "atan2 nextafter "  # the angle of (0, -0) is pi, and the number next to 0 is not 0
    "eq_to lt_to le_to igamma igammac igamma_grad_a random_gamma_grad regularized_incomplete_beta "
    "polygamma zeta"
)
_KEEPS_GATES = names("mul div neg convert_element_type copy copy_p reduce_precision stop_gradient select_n")
_INFINITE_AT_ZERO = names("log rsqrt reciprocal lgamma digamma acosh")  # or NaN
_INFINITE_WHERE_ANY_IS_ZERO = names("igamma igammac regularized_incomplete_beta polygamma zeta")


@rule(
    *_ZERO_AT_ZERO,
    *_NOT_ZERO_AT_ZERO,
    *_ZERO_WHERE_ALL_ARE,
    *_ZERO_WHERE_ANY_IS,
    *_ZERO_WHERE_FIRST_IS,
    *_OTHER_ELEMENTWISE,
    *_EVALUATED,
    "select_n",
)
def _elementwise(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    name, shape = equation.primitive.name, shape_of(equation.outvars[0])
    parts = inputs[1:] if name == "select_n" else inputs  # without the predicate, which is not part of the result
    if name == "add":
        parts = inputs = _biased(record, inputs)
    kind = combined_kind(record, parts)
    axes = []
    for place, size in enumerate(shape):
        full = [value for value in inputs if value.axes and value.axes[place].size == size]
        ids = pick(record, [value.axes[place] for value in full])
        sources = union(*(value.axes[place].sources for value in full if value in parts)) if kind.of_parameters else ()
        for value in inputs:  # an axis of size one is broadcast by the operation itself
            if value.axes and value.axes[place].size != size:
                record.channels.freeze(value.axes[place].ids, "a single index of it is broadcast")
        zeros = [value.axes[place].zero and value in full if value.axes else is_zero(value) for value in inputs]
        if name == "select_n" and not inputs[0].axes:  # a variance of too few examples is NaN, for all channels or none
            zeros = [zero or _is_nan(value.literal) for zero, value in zip(zeros, inputs, strict=True)]
        if _is_infinite(equation, zeros, inputs):
            record.channels.note(ids, f"'{name}' of a masked channel is not finite")
        zero = _zero_after(name, zeros, [value.literal for value in inputs]) and equation.params.get("y") != 0
        flags = _flags(name, inputs, place, size)
        axes.append(dataclasses.replace(flags, ids=ids, sources=sources, zero=zero))
    chosen = union(*(value.chosen for value in parts)) if kind.of_parameters else ()
    literal = inputs[0].literal if name == "convert_element_type" else None
    same = inputs[0] if name != "eq" and passes_numbers(equation, inputs) else Value(())
    identity = identity_axes(inputs) if name == "eq" else same.identity
    if name == "eq" and identity is not None:
        record.channels.tie(axes[identity[0]].ids, axes[identity[1]].ids)
    factors = _factors(inputs) if kind.of_parameters else None
    made = Value(tuple(axes), kind, chosen, literal, factors=factors, numbers=same.numbers, identity=identity)
    return [made for _ in equation.outvars]


def _factors(inputs: list[Value]) -> tuple[Factor, Factor] | None:
    """Return the factors of a product of parameters that is scaled or normalized.

    A parameter that is added to it or multiplied with it, and has the axes of both factors, is a kernel of its own.
    """
    product = next((value for value in inputs if value.factors is not None), None)
    if product is None or product.factors is None:
        return None
    for other in (value for value in inputs if value.axes and value.factors is not product.factors):
        shared = [own.sources for own, axis in zip(product.axes, other.axes, strict=True) if axis.sources]
        if all(set(factor.free).intersection(union(*shared)) for factor in product.factors):
            return None
    return product.factors


def _flags(name: str, inputs: list[Value], place: int, size: int) -> Axis:
    """Return an axis that says what remains true of the operands', for ``repeated`` and the attributes after it."""
    arrays = [value for value in inputs if value.axes]
    axes = [value.axes[place] for value in arrays]
    pairs = {"mul": itertools.permutations(inputs), "select_n": itertools.product(inputs[:1], inputs[1:])}.get(name, ())
    gates = any(_are_gates(one, other, place) for one, other in pairs)
    units = [value for value in arrays if not any(_has_no_units(value, other) for other in arrays)]
    return Axis(
        axes[0].ids,
        repeated=all(axis.repeated for axis in axes if axis.size == size),
        scored=any(value.axes[place].scored for value in units),
        separate=any(axis.separate for axis in axes),
        gated=gates or (name in _KEEPS_GATES and any(axis.gated for axis in axes)),
    )


def _are_gates(gates: Value, hidden: Value, place: int) -> bool:
    """Whether one operand has a number for each index of an axis and the other has units there."""
    if not gates.axes or not hidden.axes or not gates.kind is hidden.kind is Kind.ACTIVATION:
        return False
    own, other = gates.axes[place], hidden.axes[place]
    if own.size != other.size or own.repeated or other.repeated or own.scored or other.scored or is_frozen(other.ids):
        return False
    return _has_no_units(gates, hidden)


def _has_no_units(value: Value, other: Value) -> bool:
    """Whether an array is the same along an axis of channels of another: gates, or statistics of a normalization."""
    return any(
        (own.repeated or own.size < axis.size) and not axis.repeated and not is_frozen(axis.ids)
        for own, axis in zip(value.axes, other.axes, strict=True)
    )


def _biased(record: Record, inputs: list[Value]) -> list[Value]:
    """Assign the roles of two parameters whose product gets a bias: one is data (learned queries), the other a kernel.

    The bias has only the axes of the kernel's outputs; the other axes come from the data.
    """
    found = []
    for value, other in zip(inputs, reversed(inputs), strict=True):
        if value.factors is not None and other.axes and other.kind.of_parameters:
            repeated = [
                axis.sources
                for axis, one in zip(value.axes, other.axes, strict=True)
                if axis.size > 1 and axis.sources and not one.sources
            ]
            left, right = (set(factor.free) for factor in value.factors)
            missing = set(union(*repeated))
            if missing and missing in (left, right):
                data, kernel = value.factors if missing == left else value.factors[::-1]
                record.settle_product(data, kernel)
                found.append(Value(tuple(Axis(axis.ids, zero=axis.zero) for axis in value.axes)))
                continue
        found.append(value)
    return found


def _is_infinite(equation: core.JaxprEqn, zeros: list[bool], inputs: list[Value]) -> bool:
    """Whether the operation divides by a masked channel, or raises it to a power that may not be positive."""
    name = equation.primitive.name
    other_power = (name == "integer_pow" and equation.params["y"] < 0) or (
        name == "pow" and not _is_positive(inputs[1].literal)
    )
    if name in _INFINITE_WHERE_ANY_IS_ZERO:
        return any(zeros)
    return (zeros[0] and (name in _INFINITE_AT_ZERO or other_power)) or (name in ("div", "rem") and zeros[1])


def _is_nan(literal: jaxprs.Value) -> bool:
    return literal is not None and bool(np.all(np.not_equal(literal, literal)))


def _is_positive(literal: jaxprs.Value) -> bool:
    return literal is not None and bool(np.all(literal > 0))


def _zero_after(name: str, zeros: list[bool], literals: list[jaxprs.Value]) -> bool:
    """Whether the result is zero where the operands in ``zeros`` are."""
    if name in _ZERO_AT_ZERO or name in _ZERO_WHERE_FIRST_IS:
        return zeros[0] and (name != "pow" or _is_positive(literals[1]))
    if name in _EVALUATED:
        known = [0 if zero else literal for zero, literal in zip(zeros, literals, strict=True)]
        return all(value is not None for value in known) and not _EVALUATED[name](*known)
    if name in _ZERO_WHERE_ALL_ARE:
        return all(zeros)
    if name in _ZERO_WHERE_ANY_IS:
        return any(zeros)
    return name == "select_n" and zeros[1] and (zeros[0] or all(zeros[2:]))  # a predicate of zero selects the first


@rule("bitcast_convert_type")
def _bitcast(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    if inputs[0].shape != shape_of(equation.outvars[0]):
        return not_understood(record, equation, inputs)
    axes = [dataclasses.replace(axis, zero=False) for axis in inputs[0].axes]  # the bits of -0.0 are not zero
    return [inputs[0].with_axes(axes)]


@rule("optimization_barrier", "sharding_constraint", "mesh_cast", "reshard", "layout_constraint", "name", "device_put")
def _identity(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    return [dataclasses.replace(value, literal=None) for value in inputs]


RULES.update(dict.fromkeys(names("pvary ppermute pbroadcast pin unpin"), _identity))
