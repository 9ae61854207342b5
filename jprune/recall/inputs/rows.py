"""Match rows to examples: join by id, compare indices, leave out examples."""

from collections.abc import Hashable, Sequence

import numpy as np

from jprune.recall.inputs.raw import WHOLE_NUMBER, InputError, Raw
from jprune.recall.inputs.text import some

ID_NAMES = frozenset(
    {"id", "ids", "idx", "index", "example", "example_id", "image_id", "row", "filename", "file", "path"}
)
"""What columns of ids are usually called, in lower case."""


def align(raw: Raw, labels: Raw) -> Raw:
    """Sort rows into the order of the labels by their ids, or check that two indices agree.

    Raises:
      InputError: an id is missing or occurs twice, or the index of a table differs from that of the labels.

    >>> labels = Raw("y.csv", np.array([0, 1]), ids=np.array(["a", "b"], object), named_ids=True)
    >>> align(Raw("p.csv", np.array([5, 6]), ids=np.array(["b", "a"], object), named_ids=True), labels).values
    array([6, 5])
    """
    if raw.ids is None or labels.ids is None:
        if raw.ids is not None and not raw.named_ids and _permuted(raw.ids):
            raise InputError(
                f"{raw.name} has its row indices in another order ({', '.join(raw.ids[:3])}, ...) and {labels.name} "
                f"has no index: sort the rows, or drop the index if they are in the order of the labels"
            )
        return raw
    if not raw.named_ids:
        if len(raw.ids) == len(labels.ids) and (raw.ids != labels.ids).any():
            row = int((raw.ids != labels.ids).argmax())
            raise InputError(
                f"{raw.name} and {labels.name} have different row indices: {raw.ids[row]} and {labels.ids[row]} in row "
                f"{row}; sort the rows into the same order (predictions.loc[labels.index]), or drop the index if they "
                f"already are; on the command line --id joins them by a column"
            )
        return raw
    check_ids(raw)
    wanted, own, notes = labels.ids.tolist(), raw.ids.tolist(), raw.notes
    place = {identity: row for row, identity in enumerate(own)}
    missing = [identity for identity in wanted if identity not in place]
    if missing:
        numbers = _as_numbers(wanted, own)
        if numbers is None or not set(numbers[0]) <= set(numbers[1]):
            raise InputError(f"{raw.name} has no row for {_some(missing)} of {labels.name}")
        wanted, own = numbers
        place = {identity: row for row, identity in enumerate(own)}
        notes = (*notes, f"{raw.name}: ids were matched with those of {labels.name} as numbers, as 007 with 7")
    order = np.array([place[identity] for identity in wanted])
    values = np.take(raw.values, order, axis=_axis_of_examples(raw, len(own)))
    if len(own) > len(order):
        known = set(wanted)
        named = _some([identity for identity in own if identity not in known])
        notes = (*notes, f"{raw.name} has rows that {labels.name} does not have ({named}); they are left out")
    return raw._replace(values=values, ids=labels.ids, notes=notes)


def check_ids(raw: Raw) -> None:
    """Check that every example has an id, and every id occurs once.

    Raises:
      InputError: there are more or fewer ids than examples, or one occurs twice.
    """
    ids = [] if raw.ids is None else raw.ids.tolist()
    if raw.ids is not None and _axis_of_examples(raw, len(ids)) is None:
        raise InputError(f"{raw.name} has shape {raw.values.shape} and {len(ids)} ids: pass one id per example")
    first: dict[Hashable, int] = {}
    for row, identity in enumerate(ids):
        if identity in first:
            raise InputError(f"{raw.name} has the id {identity!r} twice, in rows {first[identity]} and {row}")
        first[identity] = row


def refuse_other_keys(raws: Sequence[Raw]) -> None:
    """Refuse files whose columns of ids have the same name but different values in some row: their rows do not match.

    A column with another name counts if all its values are different and at least half of them are in the other file
    too.

    Raises:
      InputError: it names both files, the column, the row and the values.

    >>> one = Raw("y.csv", np.zeros(2), keys={"id": np.array(["a", "b"])})
    >>> refuse_other_keys([one, Raw("p.csv", np.zeros(2), keys={"id": np.array(["b", "a"])})])
    Traceback (most recent call last):
      ...
    jprune.recall.inputs.raw.InputError: p.csv and y.csv have a column 'id' with different ids: b and a in row 0; join
    the files with --id id, sort their rows into the same order, or leave this column out if they already are
    """
    first: dict[str, tuple[Raw, str]] = {}
    for raw in raws:
        for key, ids in raw.keys.items():
            plain = key.strip().lower()
            known, spelled = first.setdefault(plain, (raw, key))
            wanted = known.keys[spelled]
            if len(ids) != len(wanted) or (ids == wanted).all():  # other lengths are an error elsewhere
                continue
            if plain not in ID_NAMES and 2 * len({*ids.tolist()} & {*wanted.tolist()}) < len(ids):
                continue
            row = int((ids != wanted).argmax())
            called = "" if key == spelled else f"call the column {spelled!r} in both, "
            raise InputError(
                f"{raw.name} and {known.name} have a column {spelled!r} with different ids: {ids[row]} and "
                f"{wanted[row]} in row {row}; {called}join the files with --id {spelled}, sort their rows into the "
                "same order, or leave this column out if they already are"
            )


def kept_examples(labels: Raw, ignore: int | None) -> np.ndarray | None:
    """Return where labels, as given, differ from the label to leave out, (examples,); None if all are kept.

    Raises:
      InputError: no example is left, or the label is not a whole number.

    >>> kept_examples(Raw("labels", np.array([0, -1, 1])), -1)
    array([ True, False,  True])
    """
    if ignore is None:
        return None
    if not isinstance(ignore, int | np.integer) or isinstance(ignore, bool):
        raise InputError(
            f"ignore_label must be a whole number, got {ignore!r}; to leave out a class by name, leave its examples "
            "out of all arguments"
        )
    given = labels.values.ravel()
    if given.dtype == object:
        numbers = {text: int(float(text)) for text in set(given.tolist()) if WHOLE_NUMBER.fullmatch(text)}
        kept = np.array([numbers.get(text) != ignore for text in given.tolist()])
    else:
        kept = np.asarray(given != ignore)
    if not kept.any():
        raise InputError(f"{labels.name} contains only the label {ignore}, which is left out")
    return None if kept.all() else kept


def take(raw: Raw, kept: np.ndarray | None) -> Raw:
    """Take the kept examples of labels or predictions of all examples."""
    if kept is None:
        return raw
    axis = _axis_of_examples(raw, kept.size)
    if axis is None:
        return raw  # its shape is an error later
    return raw._replace(values=np.compress(kept, raw.values, axis=axis), ids=None)


def _axis_of_examples(raw: Raw, examples: int) -> int | None:
    """The axis of the examples: of a table the rows; of an array the second, or the first of one model's logits.

    >>> _axis_of_examples(Raw("d.npy", np.zeros((3, 2))), 3), _axis_of_examples(Raw("d.npy", np.zeros((3, 3), int)), 3)
    (0, 1)
    """
    axes = [0] if raw.by_row or raw.values.ndim == 1 else [1, 0]
    if raw.values.ndim == 2 and raw.values.dtype.kind == "f":
        axes.sort()
    return next((axis for axis in axes if raw.values.shape[axis] == examples), None)


def _as_numbers(wanted: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]] | None:
    """Strip leading zeros of the ids of two tables; return None if an id is not a number or becomes ambiguous."""
    if not all(WHOLE_NUMBER.fullmatch(identity) for identity in (*wanted, *own)):
        return None
    numbers = [[str(int(identity.split(".")[0])) for identity in ids] for ids in (wanted, own)]
    return (numbers[0], numbers[1]) if all(len(set(ids)) == len(ids) for ids in numbers) else None


def _permuted(ids: np.ndarray) -> bool:
    """Whether ids are the numbers of the rows, from 0 or from 1, in another order.

    >>> _permuted(np.array(["2", "0", "1"], object)), _permuted(np.array(["0", "1", "5"], object))
    (True, False)
    """
    found, n = set(ids.tolist()), len(ids)
    return any(found == {str(row + start) for row in range(n)} for start in (0, 1))


def _some(names: Sequence[object]) -> str:
    return f"the id{'s' * (len(names) > 1)} {some(list(map(repr, names)), 5)}"
