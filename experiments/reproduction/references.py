"""References for alpha: the seed null and the slope of the mean class profile.

Alpha of an unchanged network is not 1 where class recalls are noisy and training seeds vary: the recalls of another
dense network, regressed on those of this one, have a slope below 1 (regression to the mean).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int
from scipy import stats

from jprune.recall import normalized_balance


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
    """Normalized recall balance of every class, (recall - accuracy) / accuracy.

    >>> balances(np.array([[9, 7]]), np.array([10, 10])).round(4).tolist()
    [[0.125, -0.125]]
    """
    accuracy = correct.sum(1) / support.sum()
    return normalized_balance(correct / support, accuracy)


def seed_null(dense: Float[np.ndarray, "networks classes"], confidence: float = 0.99) -> Estimate:
    """Mean slope of one dense network's balances on another's, over ordered pairs.

    Args:
      dense: normalized recall balances of dense networks that differ in their seed; at least 3.
      confidence: of the interval, from a delete-one-network jackknife.

    Returns:
      The mean over ordered pairs, and its interval.

    >>> same = np.array([[0.1, -0.1], [0.1, -0.1], [0.1, -0.1]])
    >>> round(float(seed_null(same).value), 6)
    1.0
    """
    return _jackknife(_pair_mean(dense), np.array([_pair_mean(rest) for rest in _deleted(dense)]), confidence)


def above_seed_null(
    dense: Float[np.ndarray, "networks classes"],
    pruned: Float[np.ndarray, "networks classes"],
    confidence: float = 0.99,
) -> Estimate:
    """Mean alpha of pruned networks minus the seed null, jackknifed over networks.

    Args:
      dense: normalized recall balances of dense networks.
      pruned: those of the same networks after pruning, in the same order.
      confidence: of the interval.
    """
    alphas = (dense * pruned).sum(1) / (dense**2).sum(1)
    each = np.array([_pair_mean(rest) for rest in _deleted(dense)])
    rest = (alphas.sum() - alphas) / (len(alphas) - 1)
    return _jackknife(alphas.mean() - _pair_mean(dense), rest - each, confidence)


def profile_slope(dense: Float[np.ndarray, "networks classes"], pruned: Float[np.ndarray, "networks classes"]) -> float:
    """Slope of the mean pruned profile on the mean dense profile: the systematic effect on classes.

    >>> dense = np.array([[0.2, -0.2], [0.1, -0.1]])
    >>> profile_slope(dense, 2 * dense)
    2.0
    """
    x, y = dense.mean(0), pruned.mean(0)
    return float(x @ y / (x @ x))


def _pair_mean(dense: np.ndarray) -> float:
    products = dense @ dense.T
    slopes = products / np.diag(products)[:, None]
    networks = len(dense)
    return float((slopes.sum() - networks) / (networks * (networks - 1)))


def _deleted(rows: np.ndarray) -> list[np.ndarray]:
    return [np.delete(rows, i, axis=0) for i in range(len(rows))]


def _jackknife(whole: float, parts: np.ndarray, confidence: float) -> Estimate:
    networks = len(parts)
    error = np.sqrt((networks - 1) / networks * ((parts - parts.mean()) ** 2).sum())
    margin = stats.t.ppf((1 + confidence) / 2, networks - 1) * error
    return Estimate(whole, whole - margin, whole + margin)
