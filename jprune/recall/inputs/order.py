"""Warn if predictions do not fit the labels: order of rows or classes, copied labels, quantities."""

from collections.abc import Sequence

import numpy as np
import scipy.optimize
import scipy.special
import scipy.stats
from jaxtyping import Bool, Float, Int

from jprune.recall.inputs.predictions import Predictions
from jprune.recall.inputs.raw import SCOPE

_RARE = 1e-3  # probability with which independent predictions are taken for related ones
_ROUNDING = 1e-12  # relative tolerance of the statistic of a permutation test
_MOST_SHUFFLED = 5_000  # examples in a permutation test
_GOOD = 0.9  # a chance accuracy is suspicious only if the test set could distinguish this accuracy from chance
_FEW_LABELS = 20  # with so few examples a model may get all of them right
_MOST_CLASSES = 1_000  # for which another order of the classes is tried
_FEWEST_VALUES, _FEWEST_WRONG, _CLOSE = 8, 20, 0.9  # distinct labels, wrong predictions, and their correlation
_RATINGS = range(5, 11)  # numbers of grades of a rating from 1 up; with fewer, classes are adjacent by chance
_WRONG_OF_GRADE, _ADJACENT, _ADJACENT_OF_GRADE = 5, 0.8, 0.5  # minimum wrong predictions, and fractions one grade off


def perfect_models(true: Int[np.ndarray, " examples"], stack: Predictions, *, all_perfect: bool = False) -> list[str]:
    """Warn about models that are right about every example: their predictions may be the labels.

    Args:
      true: the labels.
      stack: one set of models.
      all_perfect: whether every model of every set is right about every example, which is not suspicious.

    >>> perfect_models(np.arange(40) % 4, Predictions("dense", np.stack([np.arange(40) % 4, np.zeros(40, int)]), None))
    ['dense: model 0 is right about every example and others are not: are these the labels?']
    """
    right = (stack.predicted == true).all(1)
    if len(true) < _FEW_LABELS or all_perfect or not right.any() or (true == true[0]).all():
        return []
    if right.all():
        return [f"{stack.name}: every prediction equals the label: is it the labels file?"]
    model = right.argmax()
    return [f"{stack.name}: model {model} is right about every example and others are not: are these the labels?"]


def about_correctness(true: Int[np.ndarray, " examples"], stack: Predictions) -> list[str]:
    """Warn if predictions may say whether a model is right instead of what it predicts.

    >>> about_correctness(np.arange(8) % 4, Predictions("dense", np.array([[0, 1, 1, 1, 1, 0, 1, 1]]), None))[0][:48]
    'dense contains only 0 and 1, and the labels have'
    """
    classes = len(np.unique(true))
    if classes < 3 or stack.width is not None or np.unique(stack.predicted).tolist() != [0, 1]:
        return []
    return [
        f"{stack.name} contains only 0 and 1, and the labels have {classes} classes: if 1 means that a prediction is "
        "right, pass the predicted classes instead"
    ]


def about_quantities(true: Int[np.ndarray, " examples"], stack: Predictions) -> list[str]:
    """Warn if wrong predictions are numerically close to the label, like predicted ages or ratings.

    >>> ages = np.arange(200) % 50
    >>> about_quantities(ages, Predictions("dense", (ages + np.arange(200) % 3)[None], None))[0][:60]
    'dense: wrong predictions are close to the label (correlation'
    """
    wrong = stack.predicted[0] != true
    label, predicted = true[wrong], stack.predicted[0][wrong]
    if len(label) < _FEWEST_WRONG or len(np.unique(label)) < _FEWEST_VALUES or len(np.unique(predicted)) < 2:
        return []
    correlation = float(np.corrcoef(label, predicted)[0, 1])
    if correlation < _CLOSE:
        return []
    return [
        f"{stack.name}: wrong predictions are close to the label (correlation {correlation:.2f}). If the labels are "
        f"quantities or ratings, the audit counts a near miss as an error like any other: {SCOPE}"
    ]


def about_ratings(true: Int[np.ndarray, " examples"], stack: Predictions, names: Sequence[str]) -> list[str]:
    """Warn about labels that look like ratings: grades 1 to k (5 to 10), confused with neighboring grades.

    Class ids from 1 have no order, so errors rarely fall on the neighboring id in every class. The warning requires 5
    wrong predictions of each class, more than half of them one grade off, and 80% of all wrong predictions one grade
    off.

    Args:
      true: the labels.
      stack: one set of models; only the first is used.
      names: the name of every class.

    >>> stars = np.arange(200) % 5
    >>> predicted = np.clip(stars + np.arange(200) % 3 - 1, 0, 4)
    >>> about_ratings(stars, Predictions("dense", predicted[None], None), "12345")[0][:56]
    'dense: the labels 1 to 5 look like ratings, because 100%'
    """
    present = np.unique(true)
    grades = len(present)
    if grades not in _RATINGS or [names[c].strip() for c in present] != [str(i + 1) for i in range(grades)]:
        return []
    place = np.full(len(names), 2 * len(names))  # a class that is not a grade has no neighbors
    place[present] = np.arange(grades)
    wrong = stack.predicted[0] != true
    label, off = place[true[wrong]], np.abs(place[stack.predicted[0][wrong]] - place[true[wrong]])
    each = np.bincount(label, minlength=grades)
    adjacent = np.bincount(label, off == 1, grades)
    share = float(adjacent.sum() / max(1, each.sum()))
    if each.min() < _WRONG_OF_GRADE or share < _ADJACENT or (adjacent <= _ADJACENT_OF_GRADE * each).any():
        return []
    return [
        f"{stack.name}: the labels 1 to {grades} look like ratings, because {100 * share:.0f}% of the wrong "
        f"predictions are one grade off. The audit ignores the order of classes: one grade off counts as wrong, like "
        f"any other error"
    ]


def about_order(
    true: Int[np.ndarray, " examples"], stack: Predictions, names: Sequence[str], *, dense: bool = True
) -> list[str]:
    """Warn about predictions that agree with the labels only by chance, and name the shift or order that corrects them.

    A compressed model at chance may have collapsed onto a few classes. It gets a warning only if a shift or order
    raises its accuracy, or if it still predicts all classes about equally often.

    Args:
      true: the labels.
      stack: one set of models.
      names: the name of every class.
      dense: whether the models are dense models.

    >>> true = np.arange(100) % 4
    >>> about_order(true, Predictions("dense", (true[None] + 1) % 4, None), "abcd")[0][:52]
    'dense: accuracy 0.0% is no more than chance (25.0%).'
    """
    n, classes = len(true), len(names)
    truth = np.bincount(true, minlength=classes) / n
    shares = np.bincount(stack.predicted.ravel(), minlength=classes) / stack.predicted.size
    chance, accuracy = float(truth @ shares), float((stack.predicted == true).mean())
    if n < 5 or (truth > 0).sum() < 2:
        return []
    if _beyond_chance(accuracy, chance, n):
        return _swapped_classes(true, stack, names, accuracy)
    how = "not clearly above" if accuracy > chance else "no more than"  # a small test set shows little
    text = f"{stack.name}: accuracy {100 * accuracy:.1f}% is {how} chance ({100 * chance:.1f}%)"
    best, right = max(_corrections(true, stack, names).items(), key=lambda item: item[1].mean())
    share, error = float(right.mean()), np.sqrt(chance * (1 - chance) / n)
    if share > max(chance + 5 * error, 2 * accuracy, 0.3) and n >= _FEW_LABELS:
        return [f"{text}. It would be {100 * share:.1f}% if {best}"]
    if (shares > 0).sum() < 2 and dense:
        return [f"{text}: one class is predicted for every example"]
    if not dense and _entropy(shares) < 0.8 * _entropy(truth):
        return []
    return [text + _question(true, stack, classes, dense=dense)]


def _question(true: Int[np.ndarray, " examples"], stack: Predictions, classes: int, *, dense: bool) -> str:
    """Return the question to ask if no simple correction explains an accuracy at chance."""
    if _independent(true, stack.predicted[0], classes):
        other = "" if dense else ", or are the models at chance"
        return f": predictions are not shown to depend on the labels. Are the rows in another order{other}?"
    return ", although predictions depend on the labels. Are the classes in the order of the labels?"


def _beyond_chance(accuracy: float, chance: float, n: int) -> bool:
    """Whether an accuracy is higher than predictions that are independent of the labels would reach."""
    if chance == 1:
        return True
    least = float(scipy.stats.binom.isf(_RARE, n, chance))
    return accuracy * n > least if least < _GOOD * n else accuracy >= chance


def _corrections(
    true: Int[np.ndarray, " examples"], stack: Predictions, names: Sequence[str]
) -> dict[str, Bool[np.ndarray, " examples"]]:
    """Return possible mistakes, and the examples that the first model gets right if they are corrected."""
    first, classes = stack.predicted[0], len(names)
    tried = {
        "the predictions are numbered one too low: add 1 to them": first + 1 == true,
        "the predictions are numbered one too high (from 1?): subtract 1 from them": first - 1 == true,
        "the rows are in the opposite order: reverse them": first[::-1] == true,
        "the predictions are of the examples sorted by label: sort the labels": first == np.sort(true),
    }
    if classes <= _MOST_CLASSES:
        half = np.random.default_rng(0).random(len(true)) < 0.5
        tested = _best_numbers(true[half], first[half], classes)[first] == true
        confusion, renumber = _confusion(true, first, classes), _best_numbers(true, first, classes)
        moved = {p: c for p, c in enumerate(renumber.tolist()) if p != c and confusion[c, p]}
        # With many classes some order always fits, so count only the half of the examples that was not used to fit it.
        fits = renumber[first] == true if tested[~half].mean() > 0.5 * tested[half].mean() else tested & ~half
        tried[f"the classes are numbered in another order ({_moves(moved, names)})"] = fits
    if stack.logits is not None:
        tried["the smallest number marks the class (distances?): change the signs"] = stack.logits[0].argmin(1) == true
    return tried


def _best_numbers(
    true: Int[np.ndarray, " examples"], predicted: Int[np.ndarray, " examples"], classes: int
) -> Int[np.ndarray, " classes"]:
    """Return the class that each predicted number means, chosen to maximize the number of correct predictions."""
    of_class, numbers = scipy.optimize.linear_sum_assignment(-_confusion(true, predicted, classes))
    renumber = np.empty(classes, int)
    renumber[numbers] = of_class
    return renumber


def _swapped_classes(
    true: Int[np.ndarray, " examples"], stack: Predictions, names: Sequence[str], accuracy: float
) -> list[str]:
    """Warn about cycles of classes, each mostly predicted as the next."""
    classes = len(names)
    if classes > _MOST_CLASSES:
        return []
    confusion = _confusion(true, stack.predicted[0], classes)
    most, support = confusion.argmax(1), confusion.sum(1)
    moved = np.flatnonzero((most != np.arange(classes)) & (confusion.max(1) > support / 2) & (support >= 5))
    if len(moved) < 2 or set(most[moved]) != set(moved):
        return []
    renumber = np.arange(classes)
    renumber[most[moved]] = moved
    share = float((renumber[stack.predicted[0]] == true).mean())
    return [
        f"{stack.name}: accuracy {100 * accuracy:.1f}% would be {100 * share:.1f}% if the classes are numbered in "
        f"another order ({_moves({int(most[c]): int(c) for c in moved}, names)})"
    ]


def _independent(true: Int[np.ndarray, " examples"], predicted: Int[np.ndarray, " examples"], classes: int) -> bool:
    """Whether labels and predictions are independent, by a permutation test of Pearson's chi-squared statistic.

    They are "not independent" if the statistic exceeds those of all 999 random orders of the rows. So rows in random
    order
    are taken for related with a probability of at most 1/1000, for any numbers of classes and examples.

    In simulations with 2 to 1,000 classes and 50 to 5,000 examples, 2 of 3,300 shuffled sets were taken for related.
    With renumbered classes and 60% of the predictions not random, every set of 200 examples or more was found to be
    related, most sets of 50 examples, and no set of 50 examples of 1,000 classes.
    """
    if len(true) > _MOST_SHUFFLED:
        some = np.random.default_rng(1).choice(len(true), _MOST_SHUFFLED, replace=False)
        true, predicted = true[some], predicted[some]
    rows, columns = np.bincount(true, minlength=classes), np.bincount(predicted, minlength=classes)

    def statistic(order: Int[np.ndarray, " examples"]) -> float:
        place, cells = np.unique(true * classes + order, return_counts=True)
        return float((cells**2 / (rows[place // classes] * columns[place % classes])).sum())

    rng = np.random.default_rng(0)
    least = statistic(predicted) * (1 - _ROUNDING)
    return any(statistic(rng.permutation(predicted)) >= least for _ in range(round(1 / _RARE) - 1))


def _confusion(
    true: Int[np.ndarray, " examples"], predicted: Int[np.ndarray, " examples"], classes: int
) -> Int[np.ndarray, "classes classes"]:
    return np.bincount(true * classes + predicted, minlength=classes**2).reshape(classes, classes)


def _moves(moved: dict[int, int], names: Sequence[str]) -> str:
    named = [f"{names[p]} for {names[c]}" for p, c in sorted(moved.items())]
    return f"predicted {', '.join(named[:5])}{' ...' * (len(named) > 5)}"


def _entropy(shares: Float[np.ndarray, " classes"]) -> float:
    return float(scipy.special.entr(shares).sum())
