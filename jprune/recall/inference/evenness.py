"""A permutation test of whether the loss is even over the classes, for cases where no single class can be named.

Tests of single classes are corrected for their number. Where many classes are hit and each has few examples, none of
them may be shown although together they leave no doubt. This test asks one question of all classes at once.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Int

from jprune.recall.inference.losses import own_noise
from jprune.recall.inputs.arguments import Rng

_Floats = npt.NDArray[np.float64]

_BLOCK = 50  # draws between two looks at whether more are needed
_ENOUGH = 20  # draws at least as uneven as the data, after which the p-value is known well enough


class EvennessTest(NamedTuple):
    """Whether all classes lost equally much.

    Attributes:
      statistic: sum over classes of the squared excess loss divided by its variance; about the number of classes or
        less where the loss is even.
      p_value: how often an even loss is at least as uneven; NaN where there is no answer.
      draws: number of random draws.
      reason: why there is no answer; empty where there is one.
    """

    statistic: float
    p_value: float
    draws: int
    reason: str


def evenness_test(
    classes_of: Int[np.ndarray, " examples"],
    dense_correct: Bool[np.ndarray, "dense_models examples"],
    correct: Bool[np.ndarray, "models examples"],
    classes: int,
    *,
    paired: bool = True,
    rng: Rng = 0,
    draws: int = 999,
) -> EvennessTest:
    """Test that every class lost the same share of its examples, net of those won.

    The losses of the examples (mean over models) are assigned to the examples of the classes at random. Each class's
    excess is divided by its own variance, so that classes in which more examples change without a net loss are not
    taken for classes that lost more (Chung and Romano, "Exact and asymptotically robust permutation tests", Annals of
    Statistics 2013). With several models the differences between them that test noise does not explain are added to
    every draw as a random combination of the models, so that the answer covers other training seeds too.

    Drawing ends early (Besag and Clifford 1991) once 20 draws are at least as uneven as the data, or once the data lie
    so far out that Cantelli's inequality alone gives a p-value below 1 / (draws + 1).

    Args:
      classes_of: the class of every example, 0..classes-1.
      dense_correct: whether each dense model is right about each example.
      correct: the same after compression.
      classes: number of classes.
      paired: whether model m was made from dense model m.
      rng: generator or seed of the draws.
      draws: largest number of draws.

    >>> labels = np.repeat(np.arange(10), 40)
    >>> dense, after = np.ones((1, 400), bool), (np.arange(400) % 40 >= np.repeat([0, 9], 200))[None]
    >>> evenness_test(labels, dense, after, 10).p_value
    0.001
    """
    support = np.bincount(classes_of, minlength=classes)
    present = np.flatnonzero(support)
    if len(present) < 2:
        return EvennessTest(float("nan"), float("nan"), 0, "fewer than two classes with examples")
    codes, n = np.searchsorted(present, classes_of), support[present].astype(np.float64)
    losses = dense_correct.mean(0) - correct.mean(0)
    before = dense_correct.astype(np.int8)
    sets = [before - correct] if paired else [before, correct.astype(np.int8)]
    between = [_between_models(codes, values, n) for values in sets if len(values) > 1]
    added = np.sum([(rows**2).sum(0) for rows in between], axis=0) if between else np.zeros(len(n))
    shared = _shared(dense_correct, correct, losses, paired=paired)
    changed = losses[losses != 0]
    slots = np.sort(codes)  # of the examples, by class

    def statistic(where: Int[np.ndarray, " changed"], shift: _Floats | float = 0.0) -> float:
        """The statistic where the changed examples belong to these classes."""
        total = np.bincount(where, changed, len(n))
        squares = np.bincount(where, changed**2, len(n))
        own = ((squares + 2 * shared) / (n + 2) - (total / (n + 2)) ** 2) / (n + 2)
        excess = total / n - losses.mean() + shift
        return float((excess**2 / ((1 - n / n.sum()) * np.maximum(own, losses.var() / n) + added)).sum())

    seen = statistic(codes[losses != 0])
    if not len(changed):
        return EvennessTest(0.0, 1.0, 0, "")
    generator = np.random.default_rng(rng)
    drawn: list[float] = []
    while len(drawn) < draws:
        for _ in range(min(_BLOCK, draws - len(drawn))):
            where = slots[generator.choice(len(slots), len(changed), replace=False)]
            drawn.append(statistic(where, _of_models(between, generator)))
        beyond = int((np.array(drawn) >= seen * (1 - 1e-12)).sum())
        if beyond >= _ENOUGH:
            return EvennessTest(seen, (1 + beyond) / (1 + len(drawn)), len(drawn), "")
        apart, spread = seen - np.mean(drawn), np.std(drawn, ddof=1) if len(drawn) > 1 else np.inf
        if apart > 0 and spread**2 < (spread**2 + apart**2) / (draws + 1):
            return EvennessTest(seen, 1 / (draws + 1), len(drawn), "")
    return EvennessTest(seen, (1 + beyond) / (1 + draws), draws, "")


def _shared(
    dense_correct: Bool[np.ndarray, "dense_models examples"],
    correct: Bool[np.ndarray, "models examples"],
    losses: _Floats,
    *,
    paired: bool,
) -> float:
    """The share of models that lose an example that one of them loses; 1 over the models where it is only one."""
    before, after = dense_correct.mean(0), correct.mean(0)
    changed = (dense_correct != correct).mean() if paired else (before * (1 - after) + after * (1 - before)).mean()
    return max(1 / len(correct), min(1.0, float((losses**2).mean() / changed))) if changed > 0 else 1.0


def _between_models(codes: Int[np.ndarray, " examples"], values: npt.NDArray[np.int8], n: _Floats) -> _Floats:
    """Every model's part in the variance of the mean excesses that differences between examples do not explain.

    The squares of the rows, summed over models, are that variance, for every class; (models, classes).
    """
    models, w = len(values), n / n.sum()
    means = np.stack([np.bincount(codes, row, len(n)) for row in values]) / n
    excess = means - (means * w).sum(1, keepdims=True)
    rows = (excess - excess.mean(0)) / np.sqrt(models * (models - 1))
    noise = (1 - w) * own_noise(codes, values, n) / models  # which is in the variance over examples already
    raw = (rows**2).sum(0)
    share = max(0.0, float((n * (raw - noise)).sum())) / max(float((n * raw).sum()), np.finfo(np.float64).tiny)
    return np.asarray(rows * np.sqrt(share))


def _of_models(between: list[_Floats], generator: np.random.Generator) -> _Floats | float:
    """A random combination of the models' parts, with tails as heavy as few models make them."""
    found: _Floats | float = 0.0
    for rows in between:
        freedom = len(rows) - 1
        scale = np.sqrt(generator.chisquare(freedom) / freedom)
        found = found + generator.standard_normal(len(rows)) @ rows / scale
    return found
