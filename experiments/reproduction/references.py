"""References for alpha: the seed null and the slope of the mean class profile.

With noisy class recalls and different training seeds, alpha is below 1 even without pruning: the recalls of another
dense network, regressed on those of this one, have a slope below 1 (regression to the mean).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from jprune.recall import normalized_balance
from jprune.recall.inference import corrected

_CONFIDENCE = 0.99  # of every interval


class Estimate(NamedTuple):
    """A value with its interval.

    Attributes:
      value: the estimate.
      low: lower end of its interval.
      high: upper end.
    """

    value: float
    low: float
    high: float


def balances(
    correct: Int[np.ndarray, "networks classes"], support: Int[np.ndarray, " classes"]
) -> Float[np.ndarray, "networks classes"]:
    """Return the normalized recall balance of every class, (recall - accuracy) / accuracy.

    >>> balances(np.array([[9, 7]]), np.array([10, 10])).round(4).tolist()
    [[0.125, -0.125]]
    """
    accuracy = correct.sum(1) / support.sum()
    return normalized_balance(correct / support, accuracy)


def seed_null(correct: Int[np.ndarray, "networks classes"], support: Int[np.ndarray, " classes"]) -> Estimate:
    """Return the mean slope of one dense network's balances on another's, over ordered pairs.

    The interval is from a delete-one-network jackknife.

    Args:
      correct: correctly classified test examples of every class, of 3 or more dense networks with different seeds.
      support: test examples of every class.

    >>> round(seed_null(np.array([[9, 7], [9, 7], [9, 7]]), np.array([10, 10])).value, 6)
    1.0
    """
    return Estimate(*corrected.seed_null(correct / support, correct.sum(1) / support.sum(), _CONFIDENCE))


def above_seed_null(
    dense: Int[np.ndarray, "networks classes"],
    pruned: Int[np.ndarray, "networks classes"],
    support: Int[np.ndarray, " classes"],
) -> Estimate:
    """Return the mean alpha of pruned networks minus the seed null, with a delete-one-network jackknife.

    Args:
      dense: correctly classified test examples of every class, of dense networks.
      pruned: correctly classified test examples of the same networks after pruning, in the same order.
      support: test examples of every class.
    """
    x, y = balances(dense, support), balances(pruned, support)
    alphas = (x * y).sum(1) / (x**2).sum(1)
    networks = len(alphas)
    whole = alphas.mean() - seed_null(dense, support).value
    parts = np.array(
        [np.delete(alphas, i).mean() - seed_null(np.delete(dense, i, axis=0), support).value for i in range(networks)]
    )
    error = np.sqrt((networks - 1) / networks * ((parts - parts.mean()) ** 2).sum())
    margin = stats.t.ppf((1 + _CONFIDENCE) / 2, networks - 1) * error
    return Estimate(float(whole), float(whole - margin), float(whole + margin))


def profile_slope(dense: Float[np.ndarray, "networks classes"], pruned: Float[np.ndarray, "networks classes"]) -> float:
    """Return the slope of the mean pruned profile on the mean dense profile: the systematic effect on classes.

    >>> dense = np.array([[0.2, -0.2], [0.1, -0.1]])
    >>> profile_slope(dense, 2 * dense)
    2.0
    """
    x, y = dense.mean(0), pruned.mean(0)
    return float(x @ y / (x @ x))


def corrected_bounds(
    dense: Int[np.ndarray, "networks classes"],
    pruned: Int[np.ndarray, "networks classes"],
    support: Int[np.ndarray, " classes"],
) -> tuple[float, float]:
    """Return bounds of alpha corrected for test-set noise, pooled over networks, from counts alone.

    The correction (``jprune.recall.corrected_intensification``) needs the share of a class that both networks classify
    correctly, which counts do not contain. The lower bound assumes the largest possible share (the errors of one
    network are among those of the other), the upper bound independent errors.

    Args:
      dense: correctly classified test examples of every class, of dense networks.
      pruned: correctly classified test examples of the same networks after pruning, in the same order.
      support: test examples of every class, at least 2 each.

    >>> low, high = corrected_bounds(np.array([[90, 70]]), np.array([[80, 70]]), np.array([100, 100]))
    >>> round(low, 4), round(high, 4)
    (0.4925, 0.577)
    """
    share, classes = support / support.sum(), len(support)
    r, s = dense / support, pruned / support
    a, b = dense.sum(1) / support.sum(), pruned.sum(1) / support.sum()

    def noise(terms: Float[np.ndarray, "networks classes"]) -> Float[np.ndarray, " networks"]:
        return ((1 - 2 * share) * terms).sum(1) + classes * (share**2 * terms).sum(1)

    spread = (((r - a[:, None]) ** 2).sum(1) - noise(r * (1 - r) / (support - 1))) / a**2
    product = ((r - a[:, None]) * (s - b[:, None])).sum(1)
    nested = noise((np.minimum(r, s) - r * s) / (support - 1))
    total = spread.sum()
    return float(((product - nested) / (a * b)).sum() / total), float((product / (a * b)).sum() / total)
