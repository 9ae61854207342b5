"""A permutation test of whether models are paired as stated."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats

from jprune.recall.inputs.arguments import Numbers, Rng, check_resamples, real, refuse_infinite


class PairingTest(NamedTuple):
    """Result of a permutation test of the pairing of two stacks of models.

    Attributes:
      correlation: between the paired models, in [-1, 1].
      p_value: fraction of random pairings with at least this correlation; NaN if it is undefined.
      models: number of pairs.
      left_out: number of pairs left out because of a NaN.
      reason: why ``p_value`` is NaN; otherwise empty.
    """

    correlation: float
    p_value: float
    models: int
    left_out: int
    reason: str


def pairing_test(a: Numbers, b: Numbers, *, rng: Rng, resamples: int = 10_000) -> PairingTest:
    """Test by permutation whether the models of two stacks are paired by index.

    Models pruned from the same dense checkpoint are correlated. Stacks without such a correlation should not be
    compared by a paired test. The statistic is the correlation over models of the centered values, over all columns
    together if there are several. The null distribution is its value under random pairings, or under all pairings if
    there are at most ``resamples``.

    Args:
      a: one value, or one row of values such as recalls, per model: (models,) or (models, columns).
      b: the same of the other stack, of the same shape. A model with a NaN in either is left out;
        a column that is NaN for every model (a class without examples) is dropped.
      rng: generator, seed sequence or integer seed.
      resamples: largest number of random pairings.

    Raises:
      ValueError: the shapes differ, or a value is infinite.

    >>> pairing_test([1.0, 2.0, 3.0, 4.0, 5.0], [1.1, 2.0, 3.2, 3.9, 5.0], rng=0).p_value < 0.05
    True
    """
    first, second = _rows("a", a), _rows("b", b)
    if first.shape != second.shape:
        raise ValueError(f"a and b must have the same shape, got {np.shape(a)} and {np.shape(b)}")
    check_resamples(resamples)
    column = ~(np.isnan(first).all(0) | np.isnan(second).all(0))
    first, second = first[:, column], second[:, column]
    whole = column.any() & ~(np.isnan(first).any(-1) | np.isnan(second).any(-1))
    x, y = (rows[whole] - rows[whole].mean(0) if whole.any() else rows[whole] for rows in (first, second))
    out = PairingTest(float("nan"), float("nan"), int(whole.sum()), int((~whole).sum()), "")
    if out.models < 3:
        return out._replace(reason="fewer than three pairs")
    scale = np.sqrt((x**2).sum() * (y**2).sum())
    if scale <= 1e-14 * (first[whole] ** 2).sum() ** 0.5 * (second[whole] ** 2).sum() ** 0.5:
        return out._replace(reason="no spread over the models in a stack")
    gram = x @ y.T / scale
    result = scipy.stats.permutation_test(
        (np.arange(out.models),),
        lambda partner, axis: gram[np.arange(out.models), np.moveaxis(partner, axis, -1)].sum(-1),
        permutation_type="pairings",
        vectorized=True,
        n_resamples=resamples,
        alternative="greater",
        rng=np.random.default_rng(rng),
    )
    return out._replace(correlation=float(np.trace(gram)), p_value=float(result.pvalue))


def _rows(name: str, value: Numbers) -> npt.NDArray[np.float64]:
    array = real(name, value)
    if array.ndim not in (1, 2):
        raise ValueError(f"{name} must have shape (models,) or (models, columns), got {array.shape}")
    refuse_infinite(name, array)
    return array[:, None] if array.ndim == 1 else array
