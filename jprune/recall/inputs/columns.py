"""Refuse columns of predictions that are not models: the labels, whether a model is right, a model's second choice."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jprune.recall.inputs.predictions import Predictions
from jprune.recall.inputs.raw import InputError, Raw

_FEWEST = 20  # examples, with fewer of which two columns agree by chance
_UNLIKELY = 0.01  # probability that the best other model is right about every example, below which labels are assumed
_EXPECTED = 10  # examples on which two models agree by chance; none at all has a probability of e^-10 at most


def refuse_other_columns(true: Int[np.ndarray, " examples"], tables: Sequence[Raw]) -> None:
    """Refuse tables with a column of labels, or one that says whether another column is right.

    A column that equals the labels may be a model that is always right, and gives a warning, if it does so in one table
    alone or if other models are so accurate that one of them could be right about every example.

    Args:
      true: the labels, as indices.
      tables: the predictions; only tables with several columns of class indices are checked.

    Raises:
      InputError: it names the table, its column and what to do.

    >>> true = np.arange(60) % 3
    >>> refuse_other_columns(true, [Raw("p.csv", np.stack([true, np.roll(true, 1)], 1), True, ("gold", "pred"))])
    Traceback (most recent call last):
      ...
    jprune.recall.inputs.raw.InputError: p.csv, column 'gold' equals the labels in every row, in every table: ...
    """
    tables = [raw for raw in tables if raw.by_row and raw.values.ndim == 2 and raw.values.shape[1] > 1]
    tables = [raw for raw in tables if raw.values.dtype.kind in "iu" and len(raw.values) == len(true)]
    tables = [raw for raw in tables if raw.values.max() > 1 or (raw.values.sum(1) != 1).any()]  # not one-hot
    if len(true) < _FEWEST or len(np.unique(true)) < 2 or not tables:
        return
    rights = [raw.values == true[:, None] for raw in tables]
    perfect = [
        {_name(raw, int(c)) for c in np.flatnonzero(right.all(0))} for raw, right in zip(tables, rights, strict=True)
    ]
    of_all = sorted(set.intersection(*perfect))
    accuracies = np.concatenate([right.mean(0) for right in rights])
    best = accuracies[accuracies < 1].max(initial=0)
    if of_all and (accuracies < 1).any() and best ** len(true) < _UNLIKELY:
        raise InputError(
            f"{tables[0].name}, column {of_all[0]!r} equals the labels in every row, in every table: keep only the "
            f"columns of predictions, or pick them one by one ({_picked(tables[0])})"
        )
    for raw, right in zip(tables, rights, strict=True):
        hits = right.sum(0)
        for c in np.flatnonzero((raw.values.max(0) == 1) & (hits < len(true))):
            says = raw.values[:, c]
            same = np.flatnonzero((hits == says.sum()) & (hits > 0) & (hits < len(true)))
            other = next((int(m) for m in same if (right[:, m] == says).all()), None)
            if other is not None:
                raise InputError(
                    f"{raw.name}, column {_name(raw, int(c))!r} is 1 where column {_name(raw, other)!r} is right and 0 "
                    f"elsewhere: keep only the columns of predictions, or pick them one by one ({_picked(raw)})"
                )


def refuse_second_choices(stack: Predictions) -> None:
    """Refuse models of which one never agrees with the next, although they predict the same classes.

    Raises:
      InputError: it names the models.

    >>> first = np.arange(60) % 3
    >>> refuse_second_choices(Predictions("top.npy", np.stack([first, (first + 1) % 3]), None))
    Traceback (most recent call last):
      ...
    jprune.recall.inputs.raw.InputError: top.npy: models 0 and 1 agree on no example, as the first and second choice ...
    """
    classes = int(stack.predicted.max()) + 1
    shares = [np.bincount(each, minlength=classes) / each.size for each in stack.predicted]
    for m in range(len(stack.predicted) - 1):
        by_chance = float(shares[m] @ shares[m + 1]) * stack.predicted.shape[1]
        if by_chance >= _EXPECTED and not (stack.predicted[m] == stack.predicted[m + 1]).any():
            raise InputError(
                f"{stack.name}: models {m} and {m + 1} agree on no example, as the first and second choice of one "
                f"model do, or models that number the classes differently: pass one prediction per model and example"
            )


def _name(raw: Raw, column: int) -> str:
    return raw.columns[column] if raw.columns else str(column)


def _picked(raw: Raw) -> str:
    """How to pick the columns of a file one by one, on the command line."""
    return f"in a file PATH:{_name(raw, 0)}, then PATH:{_name(raw, 1)}"
