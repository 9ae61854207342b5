"""Warnings about what limits the conclusions of an audit."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from jprune.recall.inputs.predictions import Predictions
from jprune.recall.inputs.text import some
from jprune.recall.measures.probabilities import are_probabilities
from jprune.recall.tables.audited import AuditedModels, collapsed
from jprune.recall.tables.frames import UNSTATED, FrameRow, Row

_FEWEST_PAIRS = 4  # three pairs have six orders, so no p-value is below 1/6
_FEW_EXAMPLES = 30  # in a group
_UNEQUAL = 1.5  # ratio of largest to smallest class from which on alpha is also reported with an intercept


def of_empty_classes(support: npt.NDArray[np.int64], class_names: Sequence[str]) -> str:
    """Name the classes without test examples; empty if all have some.

    >>> of_empty_classes(np.array([3, 0]), ["cat", "dog"])
    'class without test examples: dog; its recall is undefined and it is left out of every sum'
    """
    empty = [name for name, examples in zip(class_names, support, strict=True) if examples == 0]
    if not empty:
        return ""
    if len(empty) == 1:
        return f"class without test examples: {empty[0]}; its recall is undefined and it is left out of every sum"
    named = some(empty, 20)
    return f"classes without test examples: {named}; their recall is undefined and they are left out of every sum"


def of_copies(stack: Predictions) -> list[str]:
    """Warn about models of a stack with identical predictions, which are not independent replicates.

    >>> of_copies(Predictions("dense", np.array([[0, 1], [1, 1], [0, 1]]), None))
    ['dense: models 0 and 2 made identical predictions; copies of one model are not replicates']
    """
    first: dict[bytes, int] = {}
    for model, row in enumerate(stack.predicted):
        earlier = first.setdefault(row.tobytes(), model)
        if earlier != model:
            return [
                f"{stack.name}: models {earlier} and {model} made identical predictions; copies of one model are not "
                f"replicates"
            ]
    return []


def of_scores(stack: Predictions) -> list[str]:
    """Warn that numbers in [0, 1] are read as logits if their rows do not sum to 1.

    >>> sigmoids = np.array([[[0.9, 0.8], [0.2, 0.1]]])
    >>> of_scores(Predictions("dense", sigmoids.argmax(-1), 2, sigmoids))[0][:68]
    'dense contains numbers from 0 to 1 whose rows do not sum to 1; the l'
    """
    if stack.logits is None:
        return []
    if all(rows.min() < 0 or rows.max() > 1 or are_probabilities(rows) for rows in stack.logits):
        return []
    two = "; for one sigmoid output per model pass threshold (--threshold)" if stack.width == 2 else ""
    return [
        f"{stack.name} contains numbers from 0 to 1 whose rows do not sum to 1; the largest in a row is the "
        f"prediction, and confidence and calibration treat them as logits{two}"
    ]


def of_study(study: AuditedModels, summary: pd.DataFrame, alphas: pd.DataFrame) -> list[str]:
    """Warn about limits: few models, unequal classes, no control, undefined alphas."""
    notes = []
    support = next(iter(study.dense.values())).support
    present = support[support > 0]
    if present.max() > _UNEQUAL * present.min():
        notes.append(
            f"the classes have between {present.min()} and {present.max()} test examples; alpha assumes equal sizes, "
            f"so read alpha_intercept too"
        )
    if (summary["models"] == 1).all():
        single = all(len(dense.accuracy) == 1 for dense in study.dense.values())
        which = "one model only" if single else "one compressed model only"
        notes.append(f"{which}: other training runs may differ, and this audit does not measure by how much")
    elif (summary["models"] < 5).any():
        notes.append("fewer than five models: the intervals are based on very few training seeds")
    if not (summary["ratio"] == 1).any() and not study.named:
        notes.append(
            "no control: without models that were fine-tuned but not pruned (ratio 1), the effect of fine-tuning is "
            "part of what is reported for pruning"
        )
    if not study.paired:
        one = all(len(dense.accuracy) == 1 for dense in study.dense.values())
        notes.append(
            "models are not paired: each compressed model is compared with the "
            + ("dense model, and nothing here covers other dense training runs" if one else "mean dense model")
        )
    notes += _dense_at_chance(study)
    for _, rows in alphas.groupby(["score", "ratio"], sort=False):
        score, ratio = str(rows["score"].iloc[0]), float(rows["ratio"].iloc[0])
        reasons = rows["reason"][rows["reason"] != ""].value_counts(sort=False)
        for reason, times in reasons.items():
            which = "" if len(rows) == 1 else f" for {times} of {len(rows)} models"
            notes.append(f"{_where(score, ratio)}: alpha is undefined{which}: {reason}")
    for score, ratio, _, pruned in study.stacks():
        # With correct counts only, the false positives are NaN: the wrong predictions are unknown.
        whole = (pruned.recall == 1) & ~(pruned.false_positive < 1)
        only = whole.any(1) & ((pruned.recall == 0).sum(1) == len(present) - 1)
        if only.any() and len(present) > 1:
            known = not np.isnan(pruned.false_positive).all()
            one = bool(only.sum() == 1)
            what = (
                f"predict{'s' * one} {_named(study.class_names, whole[only].argmax(1), one=one)} for every example"
                if known
                else f"{'is' if one else 'are'} right about one class and no other"
            )
            which = "the model" if len(only) == 1 else f"{only.sum()} of {len(only)} models"
            notes.append(f"{_where(score, ratio)}: {which} {what}")
    for row in summary.to_dict("records"):
        if row["collapsed"]:
            notes.append(f"{_where(row['score'], row['ratio'])}: {_at_chance(row, study.level)}")
    if study.examples is None:
        notes.append(
            "counts alone: intervals and tests are over training seeds and do not include the sampling of test examples"
        )
    return notes


def _dense_at_chance(study: AuditedModels) -> list[str]:
    """Which dense models are at chance, unless all are, as where labels and predictions do not belong together."""
    notes = []
    for score, dense in list(study.dense.items())[: 1 if study.shared else None]:
        gone, models = int(collapsed(dense).sum()), len(dense.accuracy)
        if 0 < gone < models:
            of_score = "" if study.shared else f" of {score}"
            are, them = ("is", "it") if gone == 1 else ("are", "them")
            notes.append(
                f"{gone} of {models} dense models{of_score} {are} at chance: accuracy, classes and alpha include "
                f"{them}, alpha between dense training runs does not"
            )
    return notes


def _named(class_names: Sequence[str], predicted: npt.NDArray[np.int64], *, one: bool) -> str:
    """The class that one model predicts, or one class and those that several models predict."""
    names = [class_names[c] for c in np.unique(predicted)]
    if one or len(names) == 1:
        return f"class {names[0]}"
    return f"one class ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})"


def _at_chance(row: FrameRow, level: float) -> str:
    gone, models = row["collapsed"], row["models"]
    if gone == models:
        return f"{'the model is' if models == 1 else f'all {models} models are'} at chance, so there is no alpha"
    return (
        f"{gone} of {models} models {'is' if gone == 1 else 'are'} at chance ({100 * level:g}% interval of the share "
        f"{100 * row['collapsed_low']:.0f} to {100 * row['collapsed_high']:.0f}%); alpha is computed from the others"
    )


def of_groups(groups: pd.DataFrame) -> list[str]:
    """Warn about groups with few examples.

    >>> of_groups(pd.DataFrame({"attribute": ["sex"], "group": ["f"], "class": [None], "support": [3]}))
    ['small groups, about which little can be shown: sex f (3 examples)']
    """
    whole = groups[groups["class"].isna() & (groups["support"] < _FEW_EXAMPLES)]
    small = whole.drop_duplicates(["attribute", "group"])
    if not len(small):
        return []
    listed = [
        f"{row['attribute']} {row['group']} ({row['support']} example{'s' * (row['support'] != 1)})"
        for row in small.to_dict("records")
    ]
    return [f"small groups, about which little can be shown: {some(listed, 5)}"]


def _where(score: str, ratio: float) -> str:
    return score if ratio == UNSTATED else f"{score} at {ratio:g}"


def of_pairing(rows: Sequence[Row]) -> list[str]:
    """Warn about scores for which there is no evidence of pairing; heavy pruning may hide it at a single ratio.

    Args:
      rows: the rows on pairing of the audit's tests.

    >>> found = ("magnitude", 0.6), ("random", 0.01), ("random", 0.5)
    >>> of_pairing([{"score": score, "p": p, "models": 5} for score, p in found])
    ['magnitude: models may not be paired (recalls of models with the same index are not significantly correlated);
    check that both files list the models in the same order']
    """
    smallest: dict[str, float] = {}
    for row in rows:
        if row["models"] >= _FEWEST_PAIRS and row["p"] is not None and not np.isnan(row["p"]):
            smallest[row["score"]] = min(row["p"], smallest.get(row["score"], 1.0))
    return [
        f"{score}: models may not be paired (recalls of models with the same index are not significantly correlated); "
        "check that both files list the models in the same order"
        for score, p in smallest.items()
        if p > 0.05
    ]
