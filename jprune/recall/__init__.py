"""The recall wing: what pruning did to each class, and how sure that is.

Confusion counts come from ``counts``; rates per class from them (``recall``, ``accuracy``, ...);
``intensification`` and its neighbours compare pruned with dense models; ``t_interval`` and the tests
say what a handful of training seeds can show.
"""

from jprune.recall.arguments import EmptyClassWarning
from jprune.recall.counts import (
    accuracy,
    counts,
    f1,
    false_negative_rate,
    false_positive_rate,
    precision,
    recall,
    support,
)
from jprune.recall.inference import (
    Interval,
    TTest,
    bonferroni,
    consecutive_tests,
    holm,
    independent_test,
    mark,
    paired_test,
    t_interval,
)
from jprune.recall.intensification import (
    Line,
    Pooled,
    affine_intensification,
    balance,
    class_intensification,
    intensification,
    normalized_balance,
    null_intensification,
    pooled_intensification,
    relative_intensification,
    reverse_intensification,
    rma_intensification,
    undefined,
)

__all__ = [
    "EmptyClassWarning",
    "Interval",
    "Line",
    "Pooled",
    "TTest",
    "accuracy",
    "affine_intensification",
    "balance",
    "bonferroni",
    "class_intensification",
    "consecutive_tests",
    "counts",
    "f1",
    "false_negative_rate",
    "false_positive_rate",
    "holm",
    "independent_test",
    "intensification",
    "mark",
    "normalized_balance",
    "null_intensification",
    "paired_test",
    "pooled_intensification",
    "precision",
    "recall",
    "relative_intensification",
    "reverse_intensification",
    "rma_intensification",
    "support",
    "t_interval",
    "undefined",
]
