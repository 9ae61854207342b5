"""From what was given to labels, predictions and groups of the same examples in the same order."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import scipy.optimize
from jaxtyping import Bool, Int

from jprune.recall.inputs import classes, rows
from jprune.recall.inputs.groups import Groups, given_groups, groups
from jprune.recall.inputs.predictions import Predictions, join, labels, names_of_classes, predictions
from jprune.recall.inputs.raw import Raw, of_object

_FEW = 50  # examples, with fewer of which chance may well exceed its expectation
_MOST_CLASSES = 1_000  # for which an order of the classes is looked for


class Prepared(NamedTuple):
    """Everything of an audit, read.

    Attributes:
      true: the labels, int64 (examples,).
      sets: predictions by the name of their set of models.
      groups: codes of every attribute.
      class_names: given or inferred, or None.
      notes: how things were read, where a reader should know.
      kept: which of the examples given are audited; None for all.
    """

    true: Int[np.ndarray, " examples"]
    sets: dict[str, Predictions]
    groups: Groups
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]
    kept: Bool[np.ndarray, " given"] | None


def prepare(
    given_labels: Raw,
    sets: Mapping[str, Sequence[Raw]],
    given_attributes: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    ignore_label: int | None = None,
    threshold: float | None = None,
) -> Prepared:
    """Align, number and read labels, predictions and groups.

    Args:
      given_labels: the labels as given.
      sets: for every set of models what holds them, one or more arrays or files.
      given_attributes: a second label per example, or several by name, or None.
      class_names: the name of every class; None to infer names from the data where it has any.
      ignore_label: examples of this label are left out; None for none.
      threshold: probability from which a single sigmoid output means class 1.

    Raises:
      InputError: something cannot be read, or does not belong together.
    """
    if class_names is not None:
        names_of_classes(class_names, len(class_names))
    if given_labels.named_ids:
        rows.refuse_doubled(given_labels)
    flat = [rows.align(raw, given_labels) for raws in sets.values() for raw in raws]
    numbered = classes.number(given_labels, flat, class_names)
    kept = rows.kept_examples(numbered.labels, ignore_label)
    true = labels(rows.take(numbered.labels, kept))
    stacks = iter(numbered.stacks)
    read = {
        name: join([predictions(rows.take(next(stacks), kept), "", true.size, threshold) for _ in raws])
        for name, raws in sets.items()
    }
    found, missing = groups(_attributes(given_attributes, given_labels, kept), true.size)
    left_out = () if kept is None else (f"{int((~kept).sum())} examples with the label {ignore_label} are left out",)
    notes = (*given_labels.notes, *numbered.notes, *left_out, *missing)
    notes += tuple(classes.about_many_values(true, given_labels.name))
    return Prepared(true, read, found, numbered.class_names, tuple(dict.fromkeys(notes)), kept)


def about_order(true: Int[np.ndarray, " examples"], stack: Predictions, classes: int) -> list[str]:
    """Warn of predictions that agree with the labels no more than chance, with the shift or order that mends it.

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
    best, right = max(tried.items(), key=lambda item: item[1].mean())
    share = float(right.mean())
    if share > max(chance + 5 * error, 2 * accuracy, 0.3) and n >= 20:
        return [f"{text}. It would be {100 * share:.1f} % if {best}"]
    return [f"{text}. Are rows and classes in the order of the labels?"]


def _attributes(given: Any, given_labels: Raw, kept: np.ndarray | None) -> dict[str, Any]:
    found = {}
    for attribute, values in given_groups(given).items():
        raw = values if isinstance(values, Raw) else None
        if raw is None and hasattr(values, "index") and hasattr(values, "isna"):
            index = of_object(values.isna(), f"groups[{attribute!r}]")
            raw = Raw(index.name, values.to_numpy(dtype=object), by_row=True, ids=index.ids)
        if raw is None:
            raw = Raw(f"groups[{attribute!r}]", np.asarray(values))
        found[attribute] = rows.take(rows.align(raw._replace(by_row=True), given_labels), kept)
    return found
