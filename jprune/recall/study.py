"""The models under audit: which belong together, and what lies between them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from jprune.recall.inference import Interval, t_interval, welch_interval
from jprune.recall.rates import Rates, mean, repeat


class Study(NamedTuple):
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
                yield score, ratio, dense if self.paired else repeat(mean(dense), len(pruned.accuracy)), pruned


def difference(before: npt.NDArray[np.float64], after: npt.NDArray[np.float64], study: Study) -> Interval:
    """Mean of after - before with its interval, models on the first axis: paired, or of independent samples.

    One model on either side of independent samples leaves no interval.
    """
    if study.paired:
        return t_interval((after - before).T, study.level)
    return welch_interval(t_interval(before.T), t_interval(after.T), study.level)
