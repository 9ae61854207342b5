"""Arrays that a program makes itself: numbered indices, identity matrices and random numbers."""

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jprune.graph.rules.registry import freeze, is_zero, opaque, rule
from jprune.graph.values import Axis, Kind, Record, Value
from jprune.jaxprs import shape_of

_LARGEST_IDENTITY = 1 << 16  # longer iotas are not treated as part of an identity matrix


@rule("iota", "empty", "axis_index")
def _constant(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    axes, numbers = [], None
    for place, size in enumerate(shape_of(equation.outvars[0])):
        counted = equation.primitive.name != "empty" and place == equation.params.get("dimension", place)
        if counted and equation.primitive.name == "iota" and size <= _LARGEST_IDENTITY and can_number(equation, size):
            counted, numbers = False, place
        ids = record.channels.frozen(size, "its indices are numbered") if counted else record.channels.fresh(size)
        axes.append(Axis(ids))
    return [Value(tuple(axes), Kind.CONSTANT, numbers=numbers)]


@rule(
    "random_seed",
    "random_wrap",
    "random_unwrap",
    "random_fold_in",
    "random_split",
    "random_bits",
    "random_gamma",
    "rng_uniform",
    "rng_bit_generator",
    "threefry2x32",
    "random_clone",
)
def _random(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    why = "random numbers are drawn for it; to avoid dropout, trace the model in evaluation mode"
    for value in inputs:  # keys and the parameters of a distribution, such as that of random_gamma
        freeze(record, value, why)
    return [opaque(record, shape_of(var), why, Kind.CONSTANT) for var in equation.outvars]


@rule("debug_callback", "debug_print", "check", "inspect_sharding", "dce_sink")
def _no_output(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    return [opaque(record, shape_of(var), "constant", Kind.CONSTANT) for var in equation.outvars]


def passes_numbers(equation: core.JaxprEqn, inputs: list[Value]) -> bool:
    """Whether an array of consecutive numbers (an iota) remains one after an equation, or becomes an identity matrix.

    Channels numbered by an iota cannot be removed, because the later ones would get other numbers. An identity matrix
    is an exception: with channels removed it is again an identity matrix.
    """
    match equation.primitive.name:
        case "convert_element_type" | "broadcast_in_dim":
            place, shape = inputs[0].numbers, inputs[0].shape
            return place is None or (shape[place] > 1 and can_number(equation, shape[place]))
        case "add":
            return is_zero(inputs[1])
        case "eq":
            return identity_axes(inputs) is not None
    return False


def can_number(equation: core.JaxprEqn, size: int) -> bool:
    """Whether the dtype of an equation's output can represent the integers below ``size``."""
    dtype = getattr(equation.outvars[0].aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.number):
        return False
    numbers = np.arange(size)
    return bool((numbers.astype(dtype).astype(np.int64) == numbers).all())


def identity_axes(inputs: list[Value]) -> tuple[int, int] | None:
    """Return the axes along which the two operands are iotas, if these are different axes of one size."""
    left, right = inputs
    if left.numbers is None or right.numbers is None or left.numbers == right.numbers:
        return None
    same_size = left.axes[left.numbers].size == right.axes[right.numbers].size
    return (left.numbers, right.numbers) if same_size else None


def without_numbers(record: Record, value: Value) -> Value:
    """Freeze an iota whose numbers are used as numbers."""
    if value.numbers is None:
        return value
    axes, why = list(value.axes), "its indices are numbered"
    record.channels.freeze(axes[value.numbers].ids, why)
    axes[value.numbers] = Axis(record.channels.frozen(axes[value.numbers].size, why))
    return value.with_axes(axes)
