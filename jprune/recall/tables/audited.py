"""The models under audit, their pairing, and differences between them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from jaxtyping import Bool, Int

from jprune.recall.inference.intervals import Interval, defined_mean, t_interval, welch_interval
from jprune.recall.inputs.predictions import Predictions
from jprune.recall.measures.rates import Rates

_ROUNDING = 1e-13  # of a mean of differences of fractions


class Examples(NamedTuple):
    """Labels and predictions of single examples, if predictions and not only counts were given.

    Attributes:
      true: the labels, (examples,).
      dense: predictions of each score's dense models.
      compressed: predictions of each score and ratio.
    """

    true: Int[np.ndarray, " examples"]
    dense: dict[str, Predictions]
    compressed: dict[str, dict[float, Predictions]]

    def right(self, score: str, ratio: float | None = None) -> Bool[np.ndarray, "models examples"]:
        """Whether each model of a score is right: compressed at a ratio, or dense."""
        stack = self.dense[score] if ratio is None else self.compressed[score][ratio]
        return np.asarray(stack.predicted == self.true)


class AuditedModels(NamedTuple):
    """The rates of every set of models, and their pairing.

    Attributes:
      dense: the dense models of each score; the same for all if ``shared``.
      pruned: the compressed models of each score and ratio, ratios ascending.
      shared: whether all scores start from the same dense models.
      paired: whether model m of a compressed set was made from model m of its dense set.
      class_names: (classes,) names.
      level: confidence level of every interval.
      margin: distance of alpha from 1 within which it is called equal to 1.
      named: whether sets were given by name, without a ratio.
      examples: labels and predictions of single examples; None if only counts were given.
    """

    dense: dict[str, Rates]
    pruned: dict[str, dict[float, Rates]]
    shared: bool
    paired: bool
    class_names: tuple[str, ...]
    level: float
    margin: float = 0.1
    named: bool = False
    examples: Examples | None = None

    def stacks(self) -> Iterator[tuple[str, float, Rates, Rates]]:
        """Yield score, ratio, a baseline for every compressed model, and the compressed models.

        Unpaired models all have the mean dense model as their baseline.
        """
        for score, ratios in self.pruned.items():
            for ratio, pruned in ratios.items():
                dense = self.dense[score]
                yield score, ratio, dense if self.paired else mean_model(dense, len(pruned.accuracy)), pruned


def collapsed(rates: Rates) -> Bool[np.ndarray, " models"]:
    """Return which models are at chance: the mean recall of their classes is at most 1.1 / classes.

    A network that predicts one class for every example, or guesses, has a mean recall of 1 / classes.

    >>> recall = np.array([[1.0, 0.0, 0.0], [0.9, 0.8, 0.4]])
    >>> collapsed(Rates(np.array([9, 9, 9]), *[recall] * 4, np.array([0.33, 0.7])))
    array([ True, False])
    """
    present = int((rates.support > 0).sum())
    if present < 2:
        return np.zeros(len(rates.accuracy), bool)
    return np.asarray(defined_mean(rates.recall) <= 1.1 / present)


def mean_model(rates: Rates, times: int) -> Rates:
    """Repeat the mean of a set of models a given number of times; the baseline of unpaired models.

    >>> two = Rates(np.array([9, 1]), *[np.array([[0.8, np.nan], [0.6, np.nan]])] * 4, np.array([0.8, 0.6]))
    >>> mean_model(two, 3).accuracy, mean_model(two, 1).recall
    (array([0.7, 0.7, 0.7]), array([[0.7, nan]]))
    """
    means = [np.repeat(defined_mean(field.T)[None], times, axis=0) for field in rates[1:]]
    return Rates(rates.support, *means)


def difference(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], study: AuditedModels) -> Interval:
    """Return the mean of after - before with its interval, models on the first axis: paired, or of independent samples.

    There is no interval if an independent sample has one model. A mean that is 0 but for rounding is exactly 0, so that
    it is neither a loss nor a gain.
    """
    if study.paired:
        found = t_interval((after - before).T, study.level)
    else:
        found = welch_interval(t_interval(before.T), t_interval(after.T), study.level)
    return found._replace(mean=np.where(np.abs(found.mean) <= _ROUNDING, 0.0, found.mean))
