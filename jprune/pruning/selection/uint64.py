"""Counts beyond 32 bits without x64 mode: nonnegative integers below 2**64 as two uint32 limbs."""

from collections.abc import Callable, Sequence
from typing import NamedTuple, ParamSpec, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

P = ParamSpec("P")
R = TypeVar("R")

AnyArray: TypeAlias = Array | np.ndarray  # counts that are constants are numpy arrays


def inlined(function: Callable[P, R]) -> Callable[P, R]:
    """Keep the traces of a function that selections call many times with the same shapes; the program is unchanged."""
    jitted: Callable[P, R] = jax.jit(function, inline=True)
    return jitted


class Count(NamedTuple):
    """Nonnegative integers below 2**64 as two uint32 limbs, because x64 is off by default.

    Attributes:
      high: the upper 32 bits, uint32, of any shape.
      low: the lower 32 bits, of the same shape.
    """

    high: AnyArray
    low: AnyArray


def count_of(number: int | Sequence[int | Sequence[int] | Count]) -> Count:
    """Convert Python integers (a number or a list) to limbs.

    Raises:
      ValueError: a number is negative or does not fit 64 bits.

    >>> [int(limb) for limb in count_of(2**32 + 5)]
    [1, 5]
    """
    numbers = np.asarray(np.frompyfunc(int, 1, 1)(np.asarray(number, dtype=object)), dtype=object)
    if any(not 0 <= entry < 2**64 for entry in numbers.flat):
        raise ValueError(f"number={number!r} must lie in 0..2**64 - 1")
    return Count(np.asarray(numbers >> 32, np.uint32), np.asarray(numbers & (2**32 - 1), np.uint32))


def number(x: Count) -> int:
    """Convert concrete scalar limbs to a Python integer.

    >>> number(count_of(2**40 + 1)) - 2**40
    1
    """
    return (int(x.high) << 32) + int(x.low)


def column(x: Count) -> Count:
    """Add an axis: (groups,) -> (groups, 1)."""
    return Count(x.high[:, None], x.low[:, None])


def fill(number: int, like: AnyArray) -> Count:
    """Return limbs of the shape of ``like``, filled with a Python integer."""
    return Count(*(jnp.full_like(like, limb, dtype=jnp.uint32) for limb in count_of(number)))


@inlined
def where(condition: AnyArray, x: Count, y: Count) -> Count:
    """Choose, elementwise."""
    return Count(jnp.where(condition, x.high, y.high), jnp.where(condition, x.low, y.low))


@inlined
def equal(x: Count, y: Count) -> AnyArray:
    """Whether x = y."""
    return (x.high == y.high) & (x.low == y.low)


@inlined
def not_below(x: Count, y: Count) -> AnyArray:
    """Whether x >= y."""
    return (x.high > y.high) | ((x.high == y.high) & (x.low >= y.low))


@inlined
def add(x: Count, y: Count) -> Count:
    """The sum x + y, modulo 2**64."""
    low = x.low + y.low
    return Count(x.high + y.high + (low < x.low).astype(jnp.uint32), low)


@inlined
def subtract(x: Count, y: Count) -> Count:
    """The difference x - y, modulo 2**64."""
    return Count(x.high - y.high - (x.low < y.low).astype(jnp.uint32), x.low - y.low)


@inlined
def subtract_or_zero(x: Count, y: Count) -> Count:
    """The difference x - y, or 0 where y is larger."""
    difference = subtract(x, y)
    return where(not_below(x, y), difference, Count(*(jnp.zeros_like(limb) for limb in difference)))


@inlined
def distance(x: Count, y: Count) -> Count:
    """The absolute difference."""
    return where(not_below(x, y), subtract(x, y), subtract(y, x))


@inlined
def at_most(x: Count, bound: Count) -> Count:
    """The minimum of x and a bound."""
    return where(not_below(x, bound), bound, x)


@inlined
def at_least(x: Count, bound: Count) -> Count:
    """The maximum of x and a bound."""
    return where(not_below(x, bound), x, bound)


@inlined
def at_least_one(x: Count) -> Count:
    """The maximum of x and 1."""
    return Count(x.high, jnp.where((x.high == 0) & (x.low == 0), np.uint32(1), x.low))


@inlined
def to_float(x: Count) -> AnyArray:
    """The nearest float32, or a neighbor of it."""
    return x.high.astype(jnp.float32) * np.float32(2**32) + x.low.astype(jnp.float32)


@inlined
def from_float(x: AnyArray) -> Count:
    """Convert float32 integers in 0..2**64 - 1 to limbs; larger values become the largest count."""
    high = jnp.floor(x * np.float32(2.0**-32))
    low = x - high * np.float32(2**32)
    limbs = Count(high.astype(jnp.uint32), low.astype(jnp.uint32))
    return where(x >= np.float32(2**64), fill(2**64 - 1, limbs.low), limbs)


def times(number: AnyArray, factor: AnyArray | int) -> Count:
    """Multiply uint32 numbers by a Python integer below 2**32, or by uint32 numbers, in halves of 16 bits."""
    other = np.uint32(factor) if isinstance(factor, int) else factor
    upper, lower = number >> np.uint32(16), number & np.uint32(0xFFFF)
    high, low = other >> np.uint32(16), other & np.uint32(0xFFFF)
    product = Count(upper * high, lower * low)
    for middle in (upper * low, lower * high):
        product = add(product, Count(middle >> np.uint32(16), middle << np.uint32(16)))
    return product


def multiply(x: Count, factor: AnyArray) -> Count:
    """The product of x and uint32 numbers, modulo 2**64.

    >>> number(multiply(count_of(2**33 + 3), jnp.uint32(5))) - 5 * 2**33
    15
    """
    product = times(x.low, factor)
    return Count(product.high + x.high * factor, product.low)


@inlined
def total(x: Count) -> Count:
    """Sum limbs over the first axis; exact, because every partial sum of pieces of the low limb fits 32 bits."""
    width = 32 - (x.low.shape[0] - 1).bit_length()
    total = Count(jnp.sum(x.high, axis=0, dtype=jnp.uint32), jnp.zeros(x.low.shape[1:], jnp.uint32))
    for shift in range(0, 32, width):
        piece = (x.low >> np.uint32(shift)) & np.uint32(2**width - 1)
        part = jnp.sum(piece, axis=0, dtype=jnp.uint32)
        carried = part >> np.uint32(32 - shift) if shift else jnp.zeros_like(part)
        total = add(total, Count(carried, part << np.uint32(shift)))
    return total


@inlined
def cumulative(x: Array) -> Count:
    """The inclusive running sum of a vector of uint32, as limbs; exact for up to 2**31 entries."""
    width = 32 - (x.size - 1).bit_length()
    sums = Count(jnp.zeros_like(x), jnp.zeros_like(x))
    for shift in range(0, 32, width):
        part = jnp.cumsum((x >> np.uint32(shift)) & np.uint32(2**width - 1), dtype=jnp.uint32)
        carried = part >> np.uint32(32 - shift) if shift else jnp.zeros_like(part)
        sums = add(sums, Count(carried, part << np.uint32(shift)))
    return sums
