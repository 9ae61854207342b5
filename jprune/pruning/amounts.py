"""How much to prune: a sparsity (the fraction of weights removed) or a count (the number of weights kept).

Selections and schedules follow one convention: a float is always the fraction removed, and the number of
weights kept is always given with ``keep=`` or, in a schedule, ``Keep(count)``.
"""

import dataclasses
import functools
import inspect
import math
import numbers
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import NamedTuple, ParamSpec, TypeAlias, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer

from jprune.pruning.selection.uint64 import Count, count_of
from jprune.trees import hint_of_injecting

P = ParamSpec("P")
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Keep:
    """The number of weights to keep, used in a schedule or a dict of layers in place of a sparsity.

    Attributes:
      count: number of weights kept, a nonnegative integer.

    Raises:
      TypeError: ``count`` is not an integer.
      ValueError: ``count`` is negative.

    >>> import jprune
    >>> schedule = {100: 0.5, 200: jprune.Keep(1000)}
    """

    count: int

    def __post_init__(self) -> None:
        if isinstance(self.count, bool) or not isinstance(self.count, numbers.Integral):
            raise TypeError(not_a_count("Keep(count)", self.count))
        if self.count < 0:
            raise ValueError(f"Keep({self.count}) is negative; pass the number of weights kept, 0 or more")
        object.__setattr__(self, "count", int(self.count))  # a number of numpy could overflow


@dataclasses.dataclass(frozen=True, eq=False)
class Scheduled:
    """The amounts of all entries of a schedule and the index of the one that is due.

    ``prune`` passes it to its selection in place of a number, so that the selection is compiled once for the whole
    schedule. The selections of jprune look up the counts in a table. Any arithmetic or comparison with it raises
    TypeError; ``prune`` then calls the selection with numbers, once for each amount.

    Attributes:
      amounts: the amount of each entry.
      dropped: for each entry the fraction of every count that is left out, to be regrown.
      index: index of the entry that is due.
    """

    amounts: tuple["float | Keep | PerLayer", ...]
    dropped: tuple[float, ...]
    index: Int[Array, ""]

    def __eq__(self, other: object) -> bool:
        raise TypeError("the amount of a schedule is not known while tracing and cannot be compared")

    def __bool__(self) -> bool:
        raise TypeError("the amount of a schedule is not known while tracing and has no truth value")

    __hash__ = None  # type: ignore[assignment]


PerLayer: TypeAlias = Mapping[str, float | Keep]
Amount: TypeAlias = float | Keep | PerLayer | Count | Scheduled


class Kept(NamedTuple):
    """The number that an amount keeps.

    Attributes:
      total: the number in all layers together.
      layers: the number in each layer by name, as far as the amount determines it.
    """

    total: int
    layers: Mapping[str, int]


class Budget(NamedTuple):
    """What the amounts of a schedule count, such as weights, channels or multiply-adds.

    Attributes:
      total: the number there is before pruning.
      unit: name of the unit, a plural.
      kept: returns the number that an amount keeps.
    """

    total: int
    unit: str
    kept: Callable[[float | Keep | PerLayer], Kept]


Sparsity: TypeAlias = float | PerLayer | Scheduled
Counts: TypeAlias = int | Mapping[str, int] | Integer[Array | np.ndarray, "..."] | Scheduled


def amount_of(sparsity: object, keep: object) -> Amount:
    """Check the arguments ``sparsity`` and ``keep`` of a selection; exactly one must be given.

    Args:
      sparsity: the fraction removed, a float; or ``{regex: fraction}``.
      keep: the number of weights kept, an int; or ``{regex: number}``; or an integer array, which may be traced.

    Raises:
      TypeError: neither or both are given, or one has the wrong type.
      ValueError: a number is out of range.

    >>> amount_of(0.9, None), amount_of(None, 1000)
    (0.9, Keep(count=1000))
    """
    if (sparsity is None) == (keep is None):
        given = "neither is" if sparsity is None else "both are"
        raise TypeError(f"pass sparsity= (the fraction removed) or keep= (the number of weights kept); {given} given")
    if isinstance(sparsity, Scheduled):
        return sparsity
    if isinstance(keep, Scheduled):
        return keep
    if sparsity is not None:
        return checked("sparsity", sparsity, instead="keep={}")
    if isinstance(keep, Mapping):
        return {pattern: _keep(f"keep[{pattern!r}]", count) for pattern, count in keep.items()}
    if isinstance(keep, jax.Array | np.ndarray) and jnp.issubdtype(keep.dtype, jnp.integer):
        return _limbs(keep)
    return _keep("keep", keep)


def checked(name: str, value: object, *, instead: str = "jprune.Keep({})") -> "float | Keep | PerLayer":
    """Check a sparsity, a ``Keep`` or a dict of these.

    Args:
      name: the caller's name for the value, for the error.
      value: the value to check.
      instead: how to write an integer, for the error.

    Raises:
      TypeError: it is none of these.
      ValueError: a sparsity is not in [0, 1].

    >>> checked("sparsity", 0.5)
    0.5
    """
    if isinstance(value, Mapping):
        if not value:
            raise ValueError(f"{name} is an empty dict; it must have a sparsity for every layer: {{regex: sparsity}}")
        return {pattern: _number(f"{name}[{pattern!r}]", given, "jprune.Keep({})") for pattern, given in value.items()}
    return _number(name, value, instead)


def as_keywords(amount: Amount) -> dict[str, Amount | int]:
    """Return an amount as the keyword argument of a selection.

    >>> as_keywords(0.9), as_keywords(Keep(3))
    ({'sparsity': 0.9}, {'keep': 3})
    """
    return {"keep": amount.count} if isinstance(amount, Keep) else {"sparsity": amount}


def without(amount: Amount, part: float) -> float | Keep | PerLayer:
    """Return the amount that keeps a fraction ``part`` fewer weights.

    >>> without(0.5, 0.5), without(Keep(10), 0.25)
    (0.75, Keep(count=8))
    """
    if isinstance(amount, Keep):
        return Keep(amount.count - round(part_of(amount.count, part)))
    if isinstance(amount, float):
        return 1.0 - (1.0 - amount) * (1.0 - part)
    if isinstance(amount, Mapping):
        return {pattern: single(without(given, part)) for pattern, given in amount.items()}
    raise TypeError(f"{amount!r} is not a sparsity or a count")


def part_of(number: int, part: float) -> Fraction:
    """Return a fraction of a number, without the rounding errors of floats.

    The counts that follow from a fraction are computed with this function: 15 (1 - 0.9) is 1.4999999999999998 in floats
    and would be rounded to 1, but 15 - part_of(15, 0.9) is 3 / 2.

    Args:
      number: a number of weights, channels or multiply-adds, of any size.
      part: the fraction, a float from 0 to 1; a float32 stands for a decimal number of up to six digits.

    >>> 15 - part_of(15, 0.9), part_of(3 * 2**40, 1 / 3) - 2**40
    (Fraction(3, 2), Fraction(0, 1))
    """
    return to_half(number * Fraction(as_written(part)), number)


def to_half(value: Fraction, scale: int) -> Fraction:
    """Round a number to a multiple of 1/2 if it differs from it by no more than scale / 10^15.

    A number computed from a float, such as ``scale`` times a sparsity, has an error of this size, which would decide
    how a tie is rounded.

    >>> to_half(Fraction(15 * 0.3), 15), to_half(Fraction(4.4999), 15) == Fraction(4.4999)
    (Fraction(9, 2), True)
    """
    nearest = Fraction(round(2 * value), 2)
    return nearest if abs(value - nearest) * 10**15 <= scale else value


def as_written(number: float) -> float:
    """Return the decimal number of up to six digits that a float32 stands for; any other float is returned unchanged.

    >>> as_written(float(np.float32(0.9))), as_written(0.9), as_written(1 - 1 / 1024)
    (0.9, 0.9, 0.9990234375)
    """
    with np.errstate(over="ignore"):
        number = float(number)  # a Fraction cannot be formatted in Python 3.11
        short = float(f"{number:.6g}")  # a float32 represents all decimal numbers of six digits differently
        return short if number == float(np.float32(number)) == float(np.float32(short)) else number


def exact_name(amount: "float | Keep | PerLayer") -> str:
    """Return an amount as text; different amounts have different texts.

    >>> exact_name(0.1), exact_name(Keep(3)), exact_name({"^a": 0.5, "": Keep(2)})
    ('0.1', 'keep 3', "{'^a': 0.5, '': keep 2}")
    """
    if isinstance(amount, Keep):
        return f"keep {amount.count}"
    if isinstance(amount, Mapping):
        return "{" + ", ".join(f"{pattern!r}: {exact_name(part)}" for pattern, part in amount.items()) + "}"
    return repr(float(amount))


def not_a_count(name: str, value: object) -> str:
    """Return the error message for a value that should be a number of weights."""
    wanted = f"{name}={value!r} must be an integer, the number of weights kept"
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return wanted
    if not math.isfinite(value):
        return wanted
    if 0.0 <= float(value) <= 1.0:
        return f"{wanted}; for a fraction pass sparsity={float(f'{1.0 - float(value):.12g}')!r}, the fraction removed"
    return f"{wanted}; write {name}={round(value)}"


def amount_by_keyword(function: Callable[P, T]) -> Callable[P, T]:
    """Make a selection reject amounts given by position; the message shows how to write them."""
    kinds = [parameter.kind for parameter in inspect.signature(function).parameters.values()]
    most = sum(kind is inspect.Parameter.POSITIONAL_OR_KEYWORD for kind in kinds)
    name = getattr(function, "__name__", repr(function))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        if len(args) > most:
            raise TypeError(
                f"{name} takes its amount by keyword, not {args[most]!r} by position: sparsity=0.9 removes nine in ten "
                "weights, keep=1000 keeps a thousand weights"
            )
        sparsity, keep = kwargs.get("sparsity"), kwargs.get("keep")
        if sparsity is not None or keep is not None:
            amount_of(sparsity, keep)
        return function(*args, **kwargs)

    return call


def renamed_arguments(**renamed: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Make a function reject keywords of earlier versions, with a message that shows the current ones.

    Args:
      **renamed: the replacement of each keyword of an earlier version.

    >>> @renamed_arguments(select="selection=")
    ... def prune(selection=None):
    ...     pass
    >>> prune(select=None)
    Traceback (most recent call last):
    ...
    TypeError: prune has no argument select=; use selection=
    """

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        name = getattr(function, "__name__", repr(function))

        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            for old, new in renamed.items():
                if old in kwargs:
                    raise TypeError(f"{name} has no argument {old}=; use {new}")
            return function(*args, **kwargs)

        return call

    return decorate


def single(amount: Amount) -> float | Keep:
    """Return an amount that is one sparsity or one count.

    Raises:
      TypeError: it is a dict, an array of counts or a whole schedule.
    """
    if not isinstance(amount, float | Keep):
        raise TypeError(f"{amount!r} is not a sparsity or a count")
    return amount


def _number(name: str, value: object, instead: str) -> float | Keep:
    if isinstance(value, Keep):
        return value
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        raise TypeError(
            f"{name}={value!r} is an integer; a sparsity is a float from 0.0 to 1.0, the fraction removed. "
            + (f"To remove {'all weights' if value else 'none'}, write {float(value)}; to" if value in (0, 1) else "To")
            + f" keep {value} {'weight' if value == 1 else 'weights'}, write {instead.format(value)}"
            + ("" if value in (0, 1) else _percent(float(value)))
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        array = getattr(value, "shape", None) == ()
        remedy = "; write float(...) around the array, outside jit" if array else ""
        kind = "scalar array" if array else type(value).__name__
        raise TypeError(f"{name}={value!r} is a {kind}; it must be a float, the fraction removed{remedy}")
    number = float(value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(
            f"{name}={number} must be from 0.0 to 1.0: it is the fraction of the weights that is removed"
            f"{_percent(number)}"
        )
    return number


def fraction(name: str, value: object, *, of: str = "the fraction removed") -> float:
    """Check a float from 0.0 to 1.0.

    Args:
      name: the caller's name for the value, for the error.
      value: the value to check.
      of: what the value is, for the error.

    Raises:
      TypeError: it is not a float.
      ValueError: it is out of range.

    >>> fraction("rate", 20.0)
    Traceback (most recent call last):
    ...
    ValueError: rate is 20.0; it must be from 0.0 to 1.0; for 20% write 0.2
    """
    if isinstance(value, numbers.Integral) or not isinstance(value, numbers.Real):
        hint = _percent(float(value)) if isinstance(value, numbers.Integral) else ""
        raise TypeError(f"{name} is {value!r}; it must be a float from 0.0 to 1.0, {of}{hint}")
    number = float(value)
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name} is {number}; it must be from 0.0 to 1.0{_percent(number)}")
    return number


def integer(name: str, value: object, least: int, most: int | None = None) -> int:
    """Check an integer.

    Raises:
      TypeError: it is not an integer.
      ValueError: it is out of range.

    >>> integer("every", 0, least=1)
    Traceback (most recent call last):
    ...
    ValueError: every is 0; it must be at least 1
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; it must be an integer{hint_of_injecting(value)}")
    number = int(value)
    if number < least or (most is not None and number > most):
        allowed = f"at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {number}; it must be {allowed}")
    return number


def _percent(number: float) -> str:
    """Return a hint for a number that may be meant as a percentage."""
    return f"; for {number:g}% write {number / 100:g}" if 1.0 <= number < 100.0 else ""


def _keep(name: str, value: object) -> Keep:
    if isinstance(value, Keep):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(not_a_count(name, value))
    if value < 0:
        raise ValueError(f"{name}={value!r} must not be negative: it is the number of weights kept")
    return Keep(int(value))


def _limbs(counts: Integer[Array | np.ndarray, "..."]) -> Count:
    """Convert integer arrays to two limbs; negative entries of a traced array become 0."""
    if not isinstance(counts, jax.core.Tracer) and np.any(np.asarray(counts) < 0):
        raise ValueError(f"keep={counts!r} must not be negative: it is the number of weights kept")
    if not isinstance(counts, jax.Array):  # jax would truncate 64-bit counts of numpy to 32 bits
        return count_of(np.asarray(counts).tolist())
    array = jnp.maximum(counts, 0)
    wide = array.dtype.itemsize == 8
    high = (array >> jnp.asarray(32, array.dtype)).astype(jnp.uint32) if wide else jnp.zeros(array.shape, jnp.uint32)
    return Count(high, array.astype(jnp.uint32))
