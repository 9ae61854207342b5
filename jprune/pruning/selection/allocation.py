"""Compute the number of weights that each layer keeps, from shapes alone, in exact arithmetic.

Every count is a Python integer, known before tracing.
"""

import bisect
import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction

from jprune.pruning.amounts import Amount, Keep, PerLayer, part_of
from jprune.trees import first_matches


def kept(amount: Amount, size: int, *, name: str = "keep", of: str = "weights") -> int:
    """Return the number kept of ``size`` weights (or blocks, or channels).

    Args:
      amount: a sparsity s, which keeps size (1 - s), computed by ``part_of`` and rounded half to even; or a ``Keep``.
      size: the total number.
      name: the caller's name for a count, for the error.
      of: the unit that is counted, for the error.

    Raises:
      TypeError: the amount is a dict of layers or an array.
      ValueError: more would be kept than there are.

    >>> kept(Keep(3), 10), kept(0.75, 10), kept(0.9, 15), kept(0.98, 25_557_032)
    (3, 2, 2, 511141)
    """
    if isinstance(amount, Keep):
        if amount.count > size:
            raise ValueError(
                f"{name}={amount.count} must lie in 0..{size}, the number of {of}; keep fewer, or pass sparsity=, the "
                "fraction removed"
            )
        return amount.count
    if isinstance(amount, float):
        return round(size - part_of(size, amount))
    if isinstance(amount, Mapping):
        raise TypeError(
            f"{dict(amount)!r} gives an amount for each layer, which only layer_masks takes; in prune, set "
            "selection=jprune.layer_masks"
        )
    raise TypeError(f"{name} is an array; only global_masks, layer_masks and legacy_signed_masks take one: pass an int")


def floors(min_keep: int, sizes: Sequence[int], total: int | None) -> list[int]:
    """Return the minimum for each layer: ``min_keep``, or its size if that is smaller.

    Raises:
      TypeError: ``min_keep`` is not an int.
      ValueError: it is negative, or the floors together exceed ``total`` (unless that is ``None``).

    >>> floors(5, [3, 10], 9)
    [3, 5]
    """
    if isinstance(min_keep, bool) or not isinstance(min_keep, numbers.Integral):
        raise TypeError(f"min_keep={min_keep!r} must be an int, the number of weights that every layer keeps")
    if min_keep < 0:
        raise ValueError(f"min_keep={min_keep!r} must not be negative")
    lowest = [min(int(min_keep), size) for size in sizes]
    if total is not None and sum(lowest) > total:
        raise ValueError(
            f"min_keep={min_keep} in {len(sizes)} layers needs {sum(lowest)} weights, and only {total} are kept; "
            "lower min_keep or keep more"
        )
    return lowest


def proportional(shares: Sequence[int], low: Sequence[int], high: Sequence[int], total: int) -> list[int]:
    """Divide ``total`` among layers into integers in proportion to shares, within bounds.

    The exact quota of layer l is min(max(e * shares_l, low_l), high_l), with the scale e for which the quotas sum to
    the total: layers that would exceed a bound are set to it and the rest rescaled. Each quota is rounded down, and the
    layers with the largest remainders get one more each (ties: the earlier layer).

    Args:
      shares: nonnegative integers; a layer whose share is 0 keeps its minimum.
      low: minimum of each layer.
      high: maximum of each layer.
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
    reached: Callable[[Fraction], Fraction] = lambda scale: sum(at(scale), Fraction(0))
    below = corners[bisect.bisect_right(corners, Fraction(total), key=reached) - 1]
    above = corners[bisect.bisect_left(corners, Fraction(total), key=reached)]
    start, end = reached(below), reached(above)
    scale = below if start == end else below + (above - below) * Fraction(total - start, end - start)
    return at(scale)


def erk_shares(shapes: Sequence[tuple[int, ...]]) -> list[int]:
    """Return the Erdos-Renyi-kernel share of each layer: the sum of its dimensions.

    ERK gives a layer the density e * (d_1 + ... + d_k) / (d_1 * ... * d_k), where d_1, ..., d_k are its dimensions:
    (in, out) of a dense layer, (height, width, in, out) of a convolution, in any order. The layer has d_1 * ... * d_k
    weights and keeps e * (d_1 + ... + d_k) of them, so the sum of the dimensions is the layer's share of the weights
    kept. A layer whose density would exceed 1 is kept dense and e is raised for the others.

    Source: Evci et al., "Rigging the Lottery", ICML 2020, arXiv 1911.11134, section 3 (1).

    >>> erk_shares([(784, 300), (3, 3, 16, 32)])
    [1084, 54]
    """
    return [max(1, sum(shape)) for shape in shapes]


def by_pattern(amounts: PerLayer, paths: Sequence[str], sizes: Sequence[int]) -> list[int]:
    """Return the number of weights that each layer keeps, from a dict of regular expressions.

    The first expression found in a layer's path applies; see ``first_matches``.

    Args:
      amounts: ``{regex: sparsity}``, or a ``Keep`` in place of a sparsity.
      paths: paths of the layers.
      sizes: number of weights of each layer.

    Raises:
      ValueError: a key is not a regular expression or decides for no layer, a layer matches no expression, or more
        weights would be kept than a layer has.

    >>> by_pattern({"^conv": 0.5, "": 0.0}, ["conv1/kernel", "dense/kernel"], [10, 20])
    [5, 20]
    """
    first = first_matches(
        list(amounts), {path: [path] for path in paths}, name="the dict of amounts per layer", of="layer"
    )
    counts = []
    for path, size in zip(paths, sizes, strict=True):
        pattern = first[path]
        if pattern is None:
            raise ValueError(
                f"the dict of amounts per layer has no key that matches layer '{path}'; add one, or '' at the end for "
                "all others"
            )
        counts.append(kept(amounts[pattern], size, name=f"keep[{pattern!r}]", of=f"weights of '{path}'"))
    return counts
