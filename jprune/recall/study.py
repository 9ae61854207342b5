"""The models under audit: which belong together, and what lies between them."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats

from jprune.recall.inference import Interval, t_interval
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

    Welch's interval for independent samples is scipy's; one model on either side leaves none.
    """
    if study.paired:
        return t_interval((after - before).T, study.level)
    first, second = t_interval(before.T), t_interval(after.T)
    low = high = np.full(np.shape(first.mean), np.nan)
    if min(len(before), len(after)) > 1:
        with np.errstate(invalid="ignore", divide="ignore"):  # a class without spread or without examples
            ends = scipy.stats.ttest_ind(after, before, equal_var=False).confidence_interval(study.level)
        low, high = np.asarray(ends.low), np.asarray(ends.high)
    models = np.minimum(first.models, second.models)
    left_out = np.maximum(first.left_out, second.left_out)
    return Interval(second.mean - first.mean, np.full(low.shape, np.nan), low, high, models, left_out)
