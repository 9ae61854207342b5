"""Per-class recall of compressed models: measures, statistics and the audit report.

``audit`` takes the predictions of dense and compressed models from any framework and returns their tables, tests and
report. ``counts`` computes confusion counts; ``recall``, ``accuracy`` and others compute rates from them.
``intensification`` and related measures compare pruned with dense models. ``t_interval`` and the tests quantify the
evidence from a few training seeds.

Only ``counts`` needs jax, which is imported when ``counts`` is first used, so an audit of files does not load it.
"""

import importlib
from typing import TYPE_CHECKING

from jprune.recall.audit import Audit, audit, audit_counts
from jprune.recall.inference.bootstrap import (
    BootstrapInterval,
    ExampleBootstrap,
    bootstrap_examples,
    bootstrap_models,
)
from jprune.recall.inference.intervals import (
    Interval,
    TTest,
    bonferroni,
    holm,
    independent_test,
    mark,
    paired_test,
    t_interval,
)
from jprune.recall.inference.pairing import PairingTest, pairing_test
from jprune.recall.inference.power import power, replicates_needed
from jprune.recall.inference.regression import EqualAccuracy, MixedModel, compare_at_equal_accuracy, mixed_model
from jprune.recall.inputs.arguments import EmptyClassWarning
from jprune.recall.inputs.raw import InputError
from jprune.recall.measures.counts import (
    accuracy,
    f1,
    false_negative_rate,
    false_positive_rate,
    precision,
    recall,
    support,
)
from jprune.recall.measures.disparity import (
    ClassTests,
    Disparity,
    ErrorChange,
    ExcessGap,
    class_tests,
    disparity,
    error_rate_change,
    excess_accuracy_gap,
    normalized_difference,
)
from jprune.recall.measures.exemplars import Exemplars, exemplars, modal_label, taxicab_distance
from jprune.recall.measures.intensification import (
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
from jprune.recall.tables.comparisons import compare

if TYPE_CHECKING:  # for type checkers and editors; at run time __getattr__ imports it
    from jprune.recall.measures.confusion import counts
else:

    def __getattr__(name: str) -> object:
        if name != "counts":
            raise AttributeError(f"module 'jprune.recall' has no attribute {name!r}")
        counts = globals()["counts"] = importlib.import_module("jprune.recall.measures.confusion").counts
        return counts


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Audit",
    "BootstrapInterval",
    "ClassTests",
    "Disparity",
    "EmptyClassWarning",
    "EqualAccuracy",
    "ErrorChange",
    "ExampleBootstrap",
    "ExcessGap",
    "Exemplars",
    "InputError",
    "Interval",
    "Line",
    "MixedModel",
    "PairingTest",
    "Pooled",
    "TTest",
    "accuracy",
    "affine_intensification",
    "audit",
    "audit_counts",
    "balance",
    "bonferroni",
    "bootstrap_examples",
    "bootstrap_models",
    "class_intensification",
    "class_tests",
    "compare",
    "compare_at_equal_accuracy",
    "counts",
    "disparity",
    "error_rate_change",
    "excess_accuracy_gap",
    "exemplars",
    "f1",
    "false_negative_rate",
    "false_positive_rate",
    "holm",
    "independent_test",
    "intensification",
    "mark",
    "mixed_model",
    "modal_label",
    "normalized_balance",
    "normalized_difference",
    "null_intensification",
    "paired_test",
    "pairing_test",
    "pooled_intensification",
    "power",
    "precision",
    "recall",
    "relative_intensification",
    "replicates_needed",
    "reverse_intensification",
    "rma_intensification",
    "support",
    "t_interval",
    "taxicab_distance",
    "undefined",
]
