"""Whether predictions and labels are in one order: warnings, with the shift or order that makes them agree."""

import numpy as np
import scipy.optimize
import scipy.special
from jaxtyping import Float, Int

from jprune.recall.inputs.predictions import Predictions

_FEW = 50  # examples, with fewer of which chance may well exceed its expectation
_FEW_LABELS = 20  # examples, all of which a model may well get right
_MOST_CLASSES = 1_000  # for which an order of the classes is looked for


def perfect_models(true: Int[np.ndarray, " examples"], stack: Predictions) -> list[str]:
    """Warn of a set of several models of which one is right about every example and the others are not.

    >>> perfect_models(np.arange(40) % 4, Predictions("dense", np.stack([np.arange(40) % 4, np.zeros(40, int)]), None))
    ['dense: model 0 is right about every example and others are not: is it the labels?']
    """
    right = (stack.predicted == true).all(1)
    if len(true) < _FEW_LABELS or right.all() or not right.any():
        return []
    return [f"{stack.name}: model {right.argmax()} is right about every example and others are not: is it the labels?"]


def about_order(
    true: Int[np.ndarray, " examples"], stack: Predictions, classes: int, *, dense: bool = True
) -> list[str]:
    """Warn of predictions that agree with the labels no more than chance, with the shift or order that mends it.

    A compressed model that is at chance may have collapsed onto a few classes. It is warned of where a shift or order
    mends it, or where it still predicts all classes about equally often.

    >>> true = np.arange(100) % 4
    >>> about_order(true, Predictions("dense", (true[None] + 1) % 4, None), 4)[0][:61]
    'dense: their accuracy is 0.0 %, no more than chance (25.0 %).'
    """
    n = len(true)
    truth = np.bincount(true, minlength=classes) / n
    said = np.bincount(stack.predicted.ravel(), minlength=classes) / stack.predicted.size
    chance, accuracy = float(truth @ said), float((stack.predicted == true).mean())
    error = np.sqrt(chance * (1 - chance) / n)
    if classes < 2 or n < 5 or accuracy >= chance + (2 * error if n >= _FEW else 0) or chance == 1:
        return []
    text = f"{stack.name}: their accuracy is {100 * accuracy:.1f} %, no more than chance ({100 * chance:.1f} %)"
    first = stack.predicted[0]
    tried = {
        "the predictions are numbered one too low: add 1 to them": first + 1 == true,
        "the predictions are numbered one too high (from 1?): subtract 1 from them": first - 1 == true,
        "the rows are in the opposite order: reverse them": first[::-1] == true,
        "the predictions are of the examples sorted by label: sort the labels": first == np.sort(true),
    }
    if classes <= _MOST_CLASSES:
        confusion = np.bincount(true * classes + first, minlength=classes**2).reshape(classes, classes)
        of_class, numbers = scipy.optimize.linear_sum_assignment(-confusion)
        renumber = np.empty(classes, int)
        renumber[numbers] = of_class
        moved = [f"{p} for {c}" for p, c in enumerate(renumber) if p != c and confusion[c, p]]
        tried[f"the classes are numbered in another order (predicted {', '.join(moved[:5])})"] = renumber[first] == true
    if stack.logits is not None:
        tried["the smallest number marks the class (distances?): change the signs"] = stack.logits[0].argmin(1) == true
    best, right = max(tried.items(), key=lambda item: item[1].mean())
    share = float(right.mean())
    if share > max(chance + 5 * error, 2 * accuracy, 0.3) and n >= 20:
        return [f"{text}. It would be {100 * share:.1f} % if {best}"]
    if not dense and _entropy(said) < 0.8 * _entropy(truth):
        return []
    return [f"{text}. Are rows and classes in the order of the labels?"]


def _entropy(shares: Float[np.ndarray, " classes"]) -> float:
    return float(scipy.special.entr(shares).sum())
