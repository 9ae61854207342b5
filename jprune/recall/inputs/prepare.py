"""Convert the inputs to labels, predictions and groups of the same examples in the same order."""

import contextlib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from jprune.recall.inputs import classes, rows
from jprune.recall.inputs.columns import refuse_other_columns, refuse_second_choices
from jprune.recall.inputs.groups import Groups, as_cells, given_groups, groups
from jprune.recall.inputs.predictions import (
    Predictions,
    join,
    join_batches,
    labels,
    names_of_classes,
    one_hot_labels,
    predictions,
)
from jprune.recall.inputs.raw import InputError, Raw, of_object, option


class Prepared(NamedTuple):
    """The inputs of an audit.

    Attributes:
      true: the labels, int64 (examples,).
      sets: predictions by the name of their set of models.
      groups: codes of every attribute.
      class_names: given or inferred names, or None.
      notes: notes for the reader on how inputs were read.
      kept: mask of the audited examples; None for all.
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
    given_attributes: object = None,
    *,
    class_names: Collection[str] | None = None,
    ignore_label: int | None = None,
    threshold: float | None = None,
) -> Prepared:
    """Align, number and read labels, predictions and groups.

    Args:
      given_labels: the labels as given.
      sets: for every set of models one or more arrays or files.
      given_attributes: a second label per example, or several by name, or None.
      class_names: the name of every class; None to infer names from the data where it has any.
      ignore_label: examples of this label, as given, are left out; or None.
      threshold: the least probability for which a single sigmoid output means class 1.

    Raises:
      InputError: an input cannot be read, or inputs do not match.
    """
    names = None if class_names is None else names_of_classes(class_names, len(class_names))
    if given_labels.named_ids:
        rows.check_ids(given_labels)
    given_labels = one_hot_labels(given_labels, names)
    kept = rows.kept_examples(given_labels, ignore_label)
    joined = [join_batches(raw, given_labels.values.size) for raws in sets.values() for raw in raws]
    of_groups = [raw for raw in given_groups(given_attributes).values() if isinstance(raw, Raw)]
    rows.refuse_other_keys([given_labels, *joined, *of_groups])
    flat = [rows.take(rows.align(raw, given_labels), kept) for raw in joined]
    attributes = _attributes(given_attributes, given_labels, kept)
    with _named_as_kept(kept, ignore_label):
        numbered = classes.number(rows.take(given_labels, kept), flat, names)
        true = labels(numbered.labels)
        refuse_other_columns(true, numbered.stacks)
        read = _of_sets(numbered.stacks, sets, true.size, threshold)
        found, missing = groups(attributes, true.size)
    left_out = () if ignore_label is None else (_left_out(kept, ignore_label),)
    notes = (*given_labels.notes, *numbered.notes, *left_out, *missing, *_about_headers([given_labels, *joined]))
    notes += tuple(classes.about_labels(true, given_labels.name))
    if threshold is not None and all(stack.width != 2 for stack in read.values()):
        notes += (f"{option('threshold', threshold)} has no effect, because no model has one probability per example",)
    return Prepared(true, read, found, numbered.class_names, tuple(dict.fromkeys(notes)), kept)


def _about_headers(raws: Sequence[Raw]) -> list[str]:
    """Ask whether the first rows are headers of column numbers, which pandas writes for a Series, if all are 0, 1, ...

    A test set more often has a round number of examples than one more.
    """
    rows = len(raws[0].values)
    numbered = all(
        raw.by_row
        and raw.values.ndim == 2
        and raw.columns == tuple(map(str, range(raw.values.shape[1])))
        and raw.values[0].tolist() == list(range(raw.values.shape[1]))
        for raw in raws
    )
    if not numbered or rows < 11 or rows % 10 != 1:
        return []
    return [
        f"every file begins with 0, like a header of column numbers, and has {rows:,} rows: if this row is a header, "
        "save the files without it"
    ]


@contextlib.contextmanager
def _named_as_kept(kept: Bool[np.ndarray, " given"] | None, label: int | None) -> Iterator[None]:
    """Say in errors about an example that the examples left out are not counted."""
    try:
        yield
    except InputError as error:
        if kept is None or not re.search(r"example \d", str(error)):
            raise
        number = int((~kept).sum())
        left_out = f"the {number} that {option('ignore_label', label)} leaves out"
        raise type(error)(f"{error} (examples are counted from 0 without {left_out})") from error


def _of_sets(
    stacks: Sequence[Raw], sets: Mapping[str, Sequence[Raw]], examples: int, threshold: float | None
) -> dict[str, Predictions]:
    """Read the predictions of every set of models, of which ``stacks`` are the arrays one after the other."""
    following = iter(stacks)
    read: dict[str, Predictions] = {}
    first: dict[tuple[str, ...], tuple[str, ...]] = {}
    for name, raws in sets.items():
        of_set = [next(following) for _ in raws]
        stack = join([predictions(raw, "", examples, threshold) for raw in of_set])
        refuse_second_choices(stack)
        read[name] = _by_name(stack, tuple(column for raw in of_set for column in raw.columns), first)
    return read


def _by_name(
    stack: Predictions, columns: tuple[str, ...], first: dict[tuple[str, ...], tuple[str, ...]]
) -> Predictions:
    """Put the models of several tables in the order of the first set whose tables have the same columns together."""
    if stack.width is not None or len(set(columns)) < len(stack.predicted) or len(columns) != len(stack.predicted):
        return stack
    wanted = first.setdefault(tuple(sorted(columns)), columns)
    if columns == wanted:
        return stack
    note = f"{stack.name}: the models were put in the order {', '.join(wanted[:5])}{' ...' * (len(wanted) > 5)}, "
    note += "because models are paired by the names of their columns"
    order = [columns.index(column) for column in wanted]
    return stack._replace(predicted=stack.predicted[order], notes=(*stack.notes, note))


def _left_out(kept: Bool[np.ndarray, " given"] | None, label: int) -> str:
    examples = 0 if kept is None else int((~kept).sum())
    if not examples:
        return f"no example has the label {label}, so none is left out"
    which = "1 example with the label {} is" if examples == 1 else f"{examples} examples with the label {{}} are"
    return f"{which.format(label)} left out; the indices of examples do not count {'it' if examples == 1 else 'them'}"


def _attributes(given: object, given_labels: Raw, kept: np.ndarray | None) -> dict[str, Raw]:
    found = {}
    for attribute, values in given_groups(given).items():
        raw = values if isinstance(values, Raw) else None
        if raw is None and hasattr(values, "index") and hasattr(values, "isna") and hasattr(values, "to_numpy"):
            index = of_object(values.isna(), f"groups[{attribute!r}]")
            raw = Raw(index.name, values.to_numpy(dtype=object), by_row=True, ids=index.ids)
        if raw is None:
            raw = Raw(f"groups[{attribute!r}]", as_cells(values))
        found[attribute] = rows.take(rows.align(raw._replace(by_row=True), given_labels), kept)
    return found
