"""The audit's tables that need the examples themselves."""

import numpy as np
import numpy.typing as npt
import pandas as pd
from jaxtyping import Bool, Float, Int

from jprune.recall.inference.intervals import holm
from jprune.recall.inference.losses import class_losses, lost_and_won
from jprune.recall.inference.pairing import pairing_test
from jprune.recall.inputs.arguments import Rng
from jprune.recall.inputs.groups import Groups
from jprune.recall.inputs.predictions import Predictions
from jprune.recall.measures.exemplars import modal_label, taxicab_distance
from jprune.recall.measures.probabilities import (
    Outlook,
    area_under_curve,
    divergence,
    margins,
    outlook,
)
from jprune.recall.tables.audited import AuditedModels, Examples
from jprune.recall.tables.comparisons import pairing_row
from jprune.recall.tables.frames import Row

PIE_COLUMNS = ("score", "ratio", "example", "label", "dense", "pruned", "distance")
GROUP_COLUMNS = (
    "score", "ratio", "attribute", "group", "class", "support", "recall_dense", "recall", "lost", "won", "change",
    "change_low", "change_high", "excess", "excess_low", "excess_high", "p", "p_holm",
)  # fmt: skip
PROBABILITY_COLUMNS = (
    "score", "ratio", "class", "support", "confidence_dense", "confidence", "confidence_change", "ece_dense", "ece",
    "ece_change", "kl", "k", "top_k_dense", "top_k", "top_k_change",
)  # fmt: skip
DRIFT_COLUMNS = ("score", "ratio", "class", "predicted", "lost", "share", "before", "after")
RISK_COLUMNS = ("score", "example", "label", "risk", "lost")
_MOST_AT_RISK = 100
_ROUNDING = 1e-9  # of a share of models
_MOST_CELLS = 2**24  # of a confusion matrix that is counted whole


def pies(known: Examples) -> pd.DataFrame:
    """One row per score, ratio and example whose modal label changed, the furthest apart first."""
    frames = []
    for score, ratios in known.compressed.items():
        dense = known.dense[score].predicted
        before = modal_label(dense)
        for ratio, stack in ratios.items():
            after = modal_label(stack.predicted)
            examples = np.flatnonzero(before != after)
            # The distance ranks these few; of all examples it would take half the time of the whole audit.
            distance = taxicab_distance(dense[:, examples], stack.predicted[:, examples])
            order = np.argsort(-distance, kind="stable")
            examples = examples[order]
            frames.append(
                pd.DataFrame(
                    {
                        "score": score,
                        "ratio": ratio,
                        "example": examples,
                        "label": known.true[examples],
                        "dense": before[examples],
                        "pruned": after[examples],
                        "distance": distance[order],
                    }
                )
            )
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(PIE_COLUMNS))


def subgroups(study: AuditedModels, known: Examples, groups: Groups) -> pd.DataFrame:
    """Recall before and after within every group, of all its examples (class None) and of each class.

    ``excess`` is what the group lost beyond what all examples lost, with its interval and p-value over examples and
    models; p-values are corrected over the groups of all attributes.
    """
    frames = []
    for score, ratios in known.compressed.items():
        for ratio in ratios:
            before, after = known.right(score), known.right(score, ratio)
            lost = float(before.mean() - after.mean())
            losses = {
                attribute: class_losses(codes, before, after, len(kinds), paired=study.paired, level=study.level)
                for attribute, (codes, kinds) in groups.items()
            }
            corrected = iter(holm(np.concatenate([whole.p for whole in losses.values()]))) if losses else iter(())
            for attribute, (codes, kinds) in groups.items():
                for code, kind in enumerate(kinds):
                    member = codes == code
                    frame = _subgroup(study, known.true[member], before[:, member], after[:, member], lost)
                    for name in ("lost", "won", "change_low", "change_high", "excess_low", "excess_high", "p"):
                        frame.loc[0, name] = getattr(losses[attribute], name)[code]
                    frame.loc[0, "p_holm"] = next(corrected)
                    frames.append(frame.assign(score=score, ratio=ratio, attribute=attribute, group=kind))
    columns = list(GROUP_COLUMNS)
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def _subgroup(
    study: AuditedModels,
    true: npt.NDArray[np.int64],
    before: npt.NDArray[np.bool_],
    after: npt.NDArray[np.bool_],
    lost: float,
) -> pd.DataFrame:
    present = np.unique(true)
    codes = np.searchsorted(present, true)
    within = class_losses(codes, before, after, len(present), paired=study.paired, level=study.level)

    def mean(right: Bool[np.ndarray, "models examples"]) -> Float[np.ndarray, " classes"]:
        return np.asarray(np.bincount(codes, right.mean(0)) / within.support)

    nothing = np.array([np.nan])
    return pd.DataFrame(
        {
            "class": [None, *(study.class_names[c] for c in present)],
            "support": [len(true), *within.support.tolist()],
            "recall_dense": np.append(before.mean(), mean(before)),
            "recall": np.append(after.mean(), mean(after)),
            "lost": np.concatenate([nothing, within.lost]),
            "won": np.concatenate([nothing, within.won]),
            "change": np.append(after.mean() - before.mean(), within.change),
            "change_low": np.concatenate([nothing, within.change_low]),
            "change_high": np.concatenate([nothing, within.change_high]),
            "excess": np.append(before.mean() - after.mean() - lost, -within.change - lost),
            "excess_low": np.nan,
            "excess_high": np.nan,
            "p": np.nan,
            "p_holm": np.nan,
        }
    )


def pairing(study: AuditedModels, *, rng: Rng, resamples: int) -> list[Row]:
    """A permutation test of the pairing for every score and ratio, as rows of ``tests``."""
    return [
        pairing_row(score, ratio, pairing_test(study.dense[score].recall, rates.recall, rng=rng, resamples=resamples))
        for score, ratios in study.pruned.items()
        for ratio, rates in ratios.items()
    ]


def probabilities(study: AuditedModels, known: Examples, k: int) -> pd.DataFrame:
    """Confidence, calibration error, KL divergence and top-k recall, per class and (class None) of all examples.

    Means over models; only where dense and compressed models have logits.
    """
    frames = []
    classes = len(study.class_names)
    support = np.bincount(known.true, minlength=classes)
    for score, ratios in known.compressed.items():
        dense = known.dense[score]
        if dense.logits is None:
            continue
        before = [outlook(known.true, rows, k) for rows in dense.logits]
        for ratio, stack in ratios.items():
            if stack.logits is None:
                continue
            after, apart = [], []
            for model, rows in enumerate(stack.logits):
                after.append(outlook(known.true, rows, k))
                if study.paired:
                    apart.append(divergence(known.true, dense.logits[model], rows))
            frame = {
                "score": score,
                "ratio": ratio,
                "class": [*study.class_names, None],
                "support": np.append(support, len(known.true)),
            }
            for name, field in (("confidence", "confidence"), ("ece", "calibration_error"), ("top_k", "top_k")):
                one, two = _means(before, field), _means(after, field)
                frame |= {f"{name}_dense": one, name: two, f"{name}_change": two - one}
            frame |= {"kl": np.mean(apart, axis=0) if apart else np.nan, "k": k}
            frames.append(pd.DataFrame(frame))
    columns = list(PROBABILITY_COLUMNS)
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def drift(study: AuditedModels, known: Examples) -> pd.DataFrame:
    """Where the lost examples of each class went: a row per class and class predicted instead.

    ``lost`` counts examples that the dense model got right, mean over models; ``share`` is their share of the class's
    lost examples; ``before`` and ``after`` count all examples of the class predicted so.
    """
    frames = []
    classes = len(study.class_names)
    names = np.asarray(study.class_names, object)
    for score, ratios in known.compressed.items():
        dense = known.dense[score].predicted
        right = known.right(score)
        for ratio, stack in ratios.items():
            models = len(stack.predicted)
            if study.paired:
                model, example = np.nonzero(right & (stack.predicted != known.true))
                weight = np.ones(len(model))
            else:
                model, example = np.nonzero(stack.predicted != known.true)
                weight = right.mean(0)[example]
            cells, lost = _sums_of_cells(
                known.true[example] * classes + stack.predicted[model, example], weight, classes
            )
            lost = lost / models
            origin, target = np.divmod(cells, classes)
            of_class = np.bincount(origin, lost, classes)
            frames.append(
                pd.DataFrame(
                    {
                        "score": score,
                        "ratio": ratio,
                        "class": names[origin],
                        "predicted": names[target],
                        "lost": lost,
                        "share": lost / of_class[origin],
                        "before": _cells(known.true, dense, cells, classes),
                        "after": _cells(known.true, stack.predicted, cells, classes),
                    }
                ).sort_values("lost", ascending=False, kind="stable")
            )
    columns = list(DRIFT_COLUMNS)
    return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)


def _sums_of_cells(
    cells: npt.NDArray[np.int64], weight: npt.NDArray[np.float64] | None, classes: int
) -> tuple[Int[np.ndarray, " cells"], Float[np.ndarray, " cells"]]:
    """The cells of a confusion matrix that something falls into, and the sum of the weights in each."""
    if classes**2 <= _MOST_CELLS:
        sums = np.bincount(cells, weight, classes**2).astype(np.float64)
        found = np.flatnonzero(sums)
        return found, sums[found]
    found, place = np.unique(cells, return_inverse=True)
    sums = np.bincount(place, weight, len(found)).astype(np.float64)
    return found[sums > 0], sums[sums > 0]


def _cells(
    true: npt.NDArray[np.int64], predicted: npt.NDArray[np.int64], cells: npt.NDArray[np.int64], classes: int
) -> Float[np.ndarray, " cells"]:
    """How many examples fall into some cells of the confusion matrix, mean over models."""
    found, times = _sums_of_cells((true * classes + predicted).ravel(), None, classes)
    if not len(found):
        return np.zeros(len(cells))
    at = np.minimum(np.searchsorted(found, cells), len(found) - 1)
    return np.asarray(np.where(found[at] == cells, times[at], 0) / len(predicted))


def risk(stack: Predictions) -> Float[np.ndarray, " examples"]:
    """How uncertain dense models are of every example, from them alone.

    With logits one minus the distance between the two largest probabilities, mean over models; otherwise the share
    of models that disagree with the most frequent prediction, which a single model leaves at 0.

    >>> risk(Predictions("dense", np.array([[0, 1], [0, 0], [0, 2]]), None)).round(2).tolist()
    [0.0, 0.67]
    """
    if stack.logits is None or stack.logits.shape[-1] < 2:
        return np.asarray((stack.predicted != modal_label(stack.predicted)).mean(0))
    return np.asarray(np.mean([1 - margins(rows) for rows in stack.logits], axis=0))


def _in_riskiest_tenth(of_examples: Float[np.ndarray, " examples"], gone: Bool[np.ndarray, " examples"]) -> float:
    """The number of lost examples in the riskiest tenth; examples tied at its limit count by the share that is in it.

    >>> risk, lost = np.arange(20.0), np.arange(20) > 17
    >>> _in_riskiest_tenth(risk, lost), _in_riskiest_tenth(np.zeros(20), np.arange(20) < 5)
    (2.0, 0.5)
    """
    size = -(-len(of_examples) // 10)
    if not size:
        return 0.0
    limit = np.partition(of_examples, -size)[-size]
    above, tied = of_examples > limit, of_examples == limit
    return float(gone[above].sum() + gone[tied].mean() * (size - above.sum()))


def at_risk(known: Examples, *, paired: bool) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The examples on which dense models are least certain, and how well that predicts the lost ones.

    Returns:
      ``at_risk``, up to 100 examples a score, the riskiest first, with the share of models that lost them at the last
      ratio; and a row per score and ratio with ``risk_auc``, the area under the ROC curve among the examples that
      dense models get right; ``risk_lost``, the number of those that at least half of the models lose; and
      ``risk_found`` and ``risk_top``, how many of these are in the riskiest tenth, and their share.
    """
    frames, rows = [], []
    for score, ratios in known.compressed.items():
        of_score = risk(known.dense[score])
        before = known.right(score)
        right, lost = before.mean(0) > 0.5, np.zeros(len(of_score))
        for ratio in ratios:
            lost, _ = lost_and_won(before, known.right(score, ratio), paired=paired)
            gone = lost[right] >= 0.5 - _ROUNDING
            unknown, found = not of_score.any(), _in_riskiest_tenth(of_score[right], gone)
            rows.append(
                {
                    "score": score,
                    "ratio": ratio,
                    "risk_auc": float("nan") if unknown else area_under_curve(of_score[right], gone),
                    "risk_top": found / gone.sum() if gone.any() and not unknown else float("nan"),
                    "risk_found": float("nan") if unknown else found,
                    "risk_lost": int(gone.sum()),
                }
            )
        order = np.argsort(-of_score, kind="stable")[:_MOST_AT_RISK]
        order = order[of_score[order] > 0]
        frames.append(
            pd.DataFrame(
                {
                    "score": score,
                    "example": order,
                    "label": known.true[order],
                    "risk": of_score[order],
                    "lost": lost[order],
                }
            )
        )
    table = pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=list(RISK_COLUMNS))
    return table, pd.DataFrame(rows)


def _means(found: list[Outlook], field: str) -> npt.NDArray[np.float64]:
    return np.asarray(np.mean([getattr(each, field) for each in found], axis=0))
