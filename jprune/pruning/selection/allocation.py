"""How many weights each layer keeps: whole numbers from shapes alone, worked out in exact arithmetic.

A layer is a leaf of a tree of scores. Nothing here looks at a score, so every count is a Python integer
known before anything is traced.
"""

import math
import numbers
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction


def kept(keep: float, size: int, *, name: str = "keep", of: str = "weights") -> int:
    """How many of ``size`` an argument ``keep`` asks for.

    Args:
      keep: an int, that many; a float in [0, 1], that fraction, rounded half to even.
      size: how many there are.
      name: what the caller calls ``keep``, for the error.
      of: what is counted, for the error.

    Raises:
      TypeError: ``keep`` is not a number.
      ValueError: ``keep`` is an int outside 0..size or a float outside [0, 1].

    >>> kept(3, 10), kept(0.25, 10), kept(0.02, 25_557_032)
    (3, 2, 511141)
    """
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise TypeError(f"{name}={keep!r} must be an int (a count) or a float (a fraction)")
    if isinstance(keep, numbers.Integral):
        if not 0 <= keep <= size:
            raise ValueError(f"{name}={keep!r} must lie in 0..{size}, the number of {of}")
        return int(keep)
    if not 0.0 <= keep <= 1.0:
        raise ValueError(f"{name}={keep!r} must lie in [0, 1]; an int would be a count of {of}")
    return round(size * float(keep))


def floors(min_keep: int, sizes: Sequence[int], total: int | None) -> list[int]:
    """The least that each layer keeps: ``min_keep``, or all of a layer that is smaller.

    Raises:
      TypeError: ``min_keep`` is not an int.
      ValueError: it is negative, or the floors together exceed ``total`` (unless that is ``None``).

    >>> floors(5, [3, 10], 9)
    [3, 5]
    """
    if isinstance(min_keep, bool) or not isinstance(min_keep, numbers.Integral):
        raise TypeError(f"min_keep={min_keep!r} must be an int: the weights that every layer keeps")
    if min_keep < 0:
        raise ValueError(f"min_keep={min_keep!r} must not be negative")
    lowest = [min(int(min_keep), size) for size in sizes]
    if total is not None and sum(lowest) > total:
        raise ValueError(f"min_keep={min_keep} in {len(sizes)} layers needs {sum(lowest)} weights; keep gives {total}")
    return lowest


def proportional(shares: Sequence[int], low: Sequence[int], high: Sequence[int], total: int) -> list[int]:
    """Divide ``total`` among layers in proportion to shares, within bounds, to whole numbers.

    The exact quota of layer l is min(max(e * shares_l, low_l), high_l), with the one scale e for which the
    quotas sum to the total: layers that would exceed their bound are set to it and the rest rescaled. Each
    quota is rounded down and what is left goes one each to the largest remainders (ties: the earlier layer).

    Args:
      shares: integers of 0 or more; without a share a layer keeps its least.
      low: the least of each layer.
      high: the most of each layer.
      total: between the sums of ``low`` and of ``high``.

    >>> proportional([1, 1, 2], [0, 0, 0], [10, 1, 10], 8)
    [2, 1, 5]
    """
    quotas = _quotas(shares, low, high, total)
    counts = [math.floor(quota) for quota in quotas]
    remainders = sorted(range(len(quotas)), key=lambda i: (counts[i] - quotas[i], i))
    for i in remainders[: total - sum(counts)]:
        counts[i] += 1
    return counts


def _quotas(shares: Sequence[int], low: Sequence[int], high: Sequence[int], total: int) -> list[Fraction]:
    def at(scale: Fraction) -> list[Fraction]:
        return [
            min(max(scale * share, Fraction(least)), Fraction(most))
            for share, least, most in zip(shares, low, high, strict=True)
        ]

    # The sum of the quotas grows with the scale and is linear between the scales at which a layer meets a bound.
    corners = sorted(
        {Fraction(0)}
        | {Fraction(bound, share) for share, *ends in zip(shares, low, high, strict=True) if share for bound in ends}
    )
    below = max(scale for scale in corners if sum(at(scale)) <= total)
    above = min(scale for scale in corners if sum(at(scale)) >= total)
    start, end = sum(at(below)), sum(at(above))
    scale = below if start == end else below + (above - below) * Fraction(total - start, end - start)
    return at(scale)


def erk_shares(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """The Erdos-Renyi-kernel share of each layer: the sum of its kernel's dimensions.

    ERK gives a layer the density e * (d_1 + ... + d_k) / (d_1 * ... * d_k), where d_1, ..., d_k are all the
    dimensions of its kernel: (in, out) of a dense layer, (height, width, in, out) of a convolution, in any
    order. Times its d_1 * ... * d_k weights, that is e * (d_1 + ... + d_k) weights, so the sum of the
    dimensions is the layer's share of what is kept. A layer whose density would exceed 1 is kept dense
    and e raised for the others.

    Source: Evci et al., "Rigging the Lottery", ICML 2020, arXiv 1911.11134, section 3 (1).

    >>> erk_shares([(784, 300), (3, 3, 16, 32)])
    [1084, 54]
    """
    return [max(1, sum(shape)) for shape in shapes]


def by_pattern(keep: Mapping[str, float], paths: Sequence[str], sizes: Sequence[int]) -> list[int]:
    """The count of each layer from a mapping of regular expressions to fractions or counts.

    The first expression found in a layer's path decides.

    Raises:
      ValueError: an expression matches no layer or is none, a layer matches no expression, or a number is
        out of range.

    >>> by_pattern({"^conv": 0.5, "": 1.0}, ["conv1/kernel", "dense/kernel"], [10, 20])
    [5, 20]
    """
    for pattern in keep:
        try:
            matched = any(re.search(pattern, path) for path in paths)
        except re.error as error:
            raise ValueError(f"keep[{pattern!r}]: not a regular expression: {error}") from error
        if not matched:
            raise ValueError(f"keep[{pattern!r}] matches no layer; the layers are {', '.join(map(repr, paths))}")
    counts = []
    for path, size in zip(paths, sizes, strict=True):
        first = next((pattern for pattern in keep if re.search(pattern, path)), None)
        if first is None:
            raise ValueError(f"keep has no pattern for layer '{path}'; '' as the last one would take the rest")
        counts.append(kept(keep[first], size, name=f"keep[{first!r}]", of=f"weights of '{path}'"))
    return counts
