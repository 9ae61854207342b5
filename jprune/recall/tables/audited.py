"""The models under audit: which belong together, and what lies between them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jprune.recall.inference.intervals import Interval, defined_mean, t_interval, welch_interval
from jprune.recall.measures.rates import Rates


class AuditedModels(NamedTuple):
    """The rates of every set of models, and how they belong together.

    Attributes:
      dense: the dense models of each score; the same for all where ``shared``.
      pruned: the pruned models of each score and ratio, ratios ascending.
      shared: whether all scores start from the same dense models.
      paired: whether model m of a pruned set was pruned from model m of its dense set.
      class_names: (classes,) names.
      level: confidence of every interval.
    """

    dense: dict[str, Rates]
    pruned: dict[str, dict[float, Rates]]
    shared: bool
    paired: bool
    class_names: tuple[str, ...]
    level: float

    def stacks(self) -> Iterator[tuple[str, float, Rates, Rates]]:
        """Yield score, ratio, a baseline for every pruned model, and the pruned models.

        Unpaired models all have the mean dense model for their baseline.
        """
        for score, ratios in self.pruned.items():
            for ratio, pruned in ratios.items():
                dense = self.dense[score]
                yield score, ratio, dense if self.paired else mean_model(dense, len(pruned.accuracy)), pruned


def mean_model(rates: Rates, times: int) -> Rates:
    """The mean of a set of models, a given number of times; what unpaired models are set against.

    >>> two = Rates(np.array([9, 1]), *[np.array([[0.8, np.nan], [0.6, np.nan]])] * 4, np.array([0.8, 0.6]))
    >>> mean_model(two, 3).accuracy, mean_model(two, 1).recall
    (array([0.7, 0.7, 0.7]), array([[0.7, nan]]))
    """
    means = [np.repeat(defined_mean(field.T)[None], times, axis=0) for field in rates[1:]]
    return Rates(rates.support, *means)


def difference(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], study: AuditedModels) -> Interval:
    """Mean of after - before with its interval, models on the first axis: paired, or of independent samples.

    One model on either side of independent samples leaves no interval.
    """
    if study.paired:
        return t_interval((after - before).T, study.level)
    return welch_interval(t_interval(before.T), t_interval(after.T), study.level)
