"""Convert class names and booleans to class indices, in the same way for the labels and all predictions."""

import re
import unicodedata
from collections.abc import Collection, Sequence
from typing import NamedTuple

import numpy as np

from jprune.recall.inputs.raw import (
    SCOPE,
    USUAL_MISSING,
    WHOLE_NUMBER,
    InputError,
    Raw,
    cleaned,
    option,
    refuse_two_spellings,
)
from jprune.recall.inputs.text import some

_MARKS = (99, 127, 254, 255, 999, 9999, 32767)  # often used for examples without a class
_NUMBERS = re.compile(r"[\s\d.,;:+\-]*")


class Numbered(NamedTuple):
    """Labels and predictions as class indices.

    Attributes:
      labels: the labels.
      stacks: the predictions, in the order given.
      class_names: given or inferred names; None if classes have only numbers.
      notes: notes on what was inferred.
    """

    labels: Raw
    stacks: tuple[Raw, ...]
    class_names: tuple[str, ...] | None
    notes: tuple[str, ...]


def number(labels: Raw, stacks: Sequence[Raw], class_names: Sequence[str] | None) -> Numbered:
    """Convert class names to integer indices. Without ``class_names`` the names in the data are sorted.

    Raises:
      InputError: a name is unknown, names and numbers are mixed, or the order of the classes is ambiguous.

    >>> numbered = number(Raw("labels", np.array(["b", "a"], object)), [Raw("dense", np.array(["a"], object))], None)
    >>> numbered.labels.values, numbered.class_names
    (array([1, 0]), ('a', 'b'))
    """
    # Beside integer labels, numbers in text are integers too, so that one rule holds for both.
    if class_names is None or (labels.values.dtype.kind in "iu" and _values(class_names) is not None):
        labels, *stacks = (_whole_numbers(raw) for raw in (labels, *stacks))
    stacks = _models_in_order([_in_order(raw, class_names) for raw in stacks])
    every = [labels, *stacks]
    texts = [raw for raw in every if raw.values.dtype == object]
    if any(raw.values.dtype == bool for raw in every) and not texts:
        return _booleans(labels, stacks, class_names)
    if class_names is not None and _values(class_names) is None:
        whole = [raw for raw in every if raw.values.dtype.kind in "iu"]
        for raws in [[raw] for raw in whole] if labels.values.dtype == object else [whole]:
            _refuse_either(raws, [cleaned(name) for name in class_names])
    if not texts and class_names is not None:
        return _integer_names(labels, stacks, tuple(class_names))
    if not texts:
        _refuse_other_order(stacks)
        return Numbered(labels, tuple(stacks), None, ())
    notes: tuple[str, ...] = ()
    if class_names is None:
        class_names, notes = _inferred(labels, stacks, texts)
        stacks = [_in_order(raw, class_names) for raw in stacks]
    index = {cleaned(name): c for c, name in enumerate(class_names)}
    by_value = _values(class_names)
    if by_value is not None:
        index |= {
            text: by_value[int(float(text))] for raw in texts for text in _distinct(raw) if _known(text, by_value)
        }
    if by_value is not None:
        notes += tuple(_about_indices(raw, by_value) for raw in stacks if _of_two_kinds(raw, by_value))
    return Numbered(_numbers(labels, index), tuple(_numbers(raw, index) for raw in stacks), tuple(class_names), notes)


def _of_two_kinds(raw: Raw, by_value: dict[int, int]) -> bool:
    """Whether integers may be indices of class names or the class names themselves, which differ."""
    if raw.values.dtype.kind not in "iu" or not raw.values.size:
        return False
    found = set(np.unique(raw.values).tolist())
    return found <= by_value.keys() and max(found) < len(by_value) and any(by_value[v] != v for v in found)


def _refuse_either(raws: Sequence[Raw], names: Sequence[str]) -> None:
    """Refuse whole numbers that may be names of classes or indices of others, where only some names are numbers."""
    found = sorted({int(value) for raw in raws for value in np.unique(raw.values)})
    other = [value for value in found if str(value) in names and names.index(str(value)) != value]
    if other and all(str(value) in names for value in found):
        raise InputError(
            f"{raws[0].name} contains only numbers, and {other[0]} is the name of one class and the index of another: "
            "save names as text (.npy, .parquet), or indices in all files"
        )


def _about_indices(raw: Raw, by_value: dict[int, int]) -> str:
    names = ", ".join(str(name) for name in list(by_value)[:5])
    return f"{raw.name} was read as indices of the class names {names}{' ...' * (len(by_value) > 5)}, not as the names"


def _whole_numbers(raw: Raw) -> Raw:
    """Convert text to integers where all of it is whole numbers, as in a table."""
    if raw.values.dtype != object or not all(WHOLE_NUMBER.fullmatch(text) for text in _distinct(raw)):
        return raw
    refuse_two_spellings(_distinct(raw), raw.name)
    return raw._replace(values=raw.values.astype(float).astype(np.int64))


def _in_order(raw: Raw, class_names: Sequence[str] | None) -> Raw:
    """Sort the columns of logits by class if they are named after the classes."""
    wanted = (
        [str(n) for n in range(len(raw.columns))] if class_names is None else [cleaned(name) for name in class_names]
    )
    given = _without_affixes([cleaned(column) for column in raw.columns], wanted)
    numbers = _numbers_in(given)
    if numbers and sorted(given) != sorted(wanted):
        given, wanted = [str(n) for n in numbers], [str(n) for n in sorted(numbers)]
    if raw.values.dtype.kind != "f" or len(given) < 2 or given == wanted or sorted(given) != sorted(wanted):
        return raw
    note = f"{raw.name}: the columns were put in the order of the classes that they are named after"
    values = raw.values[:, [given.index(name) for name in wanted]]
    return raw._replace(values=values, columns=tuple(wanted), notes=(*raw.notes, note))


def _without_affixes(columns: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Take the class names out of columns that add the same text before and after each of them.

    >>> _without_affixes(["prob_b", "prob_a"], ["a", "b"]), _without_affixes(["prob_b", "logit_a"], ["a", "b"])
    (['b', 'a'], ['prob_b', 'logit_a'])
    """
    for name in classes if columns else ():
        for place in re.finditer(f"(?={re.escape(name)})", columns[0]):
            before, after = columns[0][: place.start()], columns[0][place.start() + len(name) :]
            of_class = {f"{before}{one}{after}": one for one in classes}
            if sorted(of_class) == sorted(columns):
                return [of_class[column] for column in columns]
    return list(columns)


def _models_in_order(stacks: Sequence[Raw]) -> list[Raw]:
    """Put columns of predicted classes in one order: by their numbers, or as in the first table with the same names.

    Models are paired by index, so columns of the same name must have the same index.
    """
    first: dict[tuple[str, ...], tuple[str, ...]] = {}
    ordered = []
    for raw in stacks:
        given = raw.columns
        if raw.values.dtype.kind == "f" or len(set(given)) < max(len(given), 2):
            ordered.append(raw)
            continue
        numbers = _numbers_in(given)
        by_number = tuple(name for _, name in sorted(zip(numbers, given, strict=True))) if numbers else given
        wanted = first.setdefault(tuple(sorted(given)), by_number)
        if given != wanted:
            why = "of their numbers" if numbers else f"{', '.join(wanted[:5])}{' ...' * (len(wanted) > 5)}"
            note = f"{raw.name}: the columns were put in the order {why}, because models are paired by their names"
            values = raw.values[:, [given.index(name) for name in wanted]]
            raw = raw._replace(values=values, columns=wanted, notes=(*raw.notes, note))  # noqa: PLW2901
        other = sorted(set(given) - set(stacks[0].columns))
        if other and len(other) < len(given) == len(stacks[0].columns):
            note = (
                f"{raw.name} has a column {other[0]!r}, {stacks[0].name} has none: models are paired by index, so give "
                "the columns of the same models"
            )
            raw = raw._replace(notes=(*raw.notes, note))  # noqa: PLW2901
        ordered.append(raw)
    return ordered


def _refuse_other_order(stacks: Sequence[Raw]) -> None:
    """Refuse tables of logits whose columns have the same names in different orders, where labels are numbers."""
    logits = [raw for raw in stacks if raw.values.dtype.kind == "f" and len(raw.columns) > 1]
    for raw in logits[1:]:
        one = next(one for one in logits if sorted(one.columns) == sorted(raw.columns))
        if one.columns != raw.columns:
            raise InputError(
                f"the columns of {one.name} are {', '.join(one.columns[:5])} and those of {raw.name} are "
                f"{', '.join(raw.columns[:5])}: which class has which number? Give {option('class_names')} in the "
                "order of the numbers in the labels"
            )


def _numbers_in(columns: Sequence[str]) -> list[int]:
    """Read the numbers in columns that differ in a number alone and count from 0 or 1; otherwise nothing.

    >>> _numbers_in(["p(2)", "p(0)", "p(1)"]), _numbers_in(["p1", "q0"]), _numbers_in(["p1", "p5"])
    ([2, 0, 1], [], [])
    """
    found = [re.fullmatch(r"(\D*)(\d{1,9})(\D*)", column) for column in columns]
    matches = [match for match in found if match is not None]
    if len(matches) < len(columns) or len({(match[1], match[3]) for match in matches}) != 1:
        return []
    numbers = [int(match[2]) for match in matches]
    return numbers if sorted(numbers) in ([*range(len(numbers))], [*range(1, len(numbers) + 1)]) else []


def _inferred(labels: Raw, stacks: Sequence[Raw], texts: Sequence[Raw]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Infer the class names: the names in the data, sorted, or in the order of the columns of a table of logits."""
    for raw in texts:
        for text in _distinct(raw):
            if not text or _NUMBERS.fullmatch(text):
                where = first_text(raw, text)
                raise InputError(f"{where}; expected a number or a class name (see {option('class_names')})")
    if labels.values.dtype != object:
        where = first_text(texts[0], _distinct(texts[0])[0])
        raise InputError(
            f"{where}; expected a number, as {labels.name} contains numbers, or a name from {option('class_names')}"
        )
    names = sorted({text for raw in texts for text in _distinct(raw)})
    ordered: list[str] = []
    for raw in stacks:
        if raw.values.dtype != object:
            if set(raw.columns) != set(names):
                raise InputError(
                    f"{labels.name} contains class names, {raw.name} contains numbers: pass {option('class_names')} in "
                    f"the order of the numbers or of the logits' columns"
                )
            ordered = ordered or list(raw.columns)
    unknown = sorted({text for raw in texts[1:] for text in _distinct(raw)} - set(_distinct(labels)))
    _refuse_variants(labels, texts[1:], unknown)
    _refuse_missing(texts[1:], unknown)
    notes = [f"class names inferred from the data, in {'the order of the columns' if ordered else 'sorted order'}"]
    if unknown:
        notes.append(f"predicted names that no label has: {', '.join(unknown[:8])}; is one misspelled?")
    notes += _about_names(_distinct(labels), {text for raw in texts[1:] for text in _distinct(raw)})
    several = [n for n in names if re.search(r"\w[|;]\w", n) or ("," in n and {*re.split(r", ?", n)} & {*names})]
    if several:
        notes.append(
            f"the label {several[0]!r} looks like several labels of one example, and was read as a class of its own; "
            f"{SCOPE}"
        )
    return tuple(ordered or names), tuple(notes)


def _refuse_variants(labels: Raw, texts: Sequence[Raw], unknown: Sequence[str]) -> None:
    """Refuse predicted names that no label has and that differ from one only in case, quotes or spaces."""
    of_labels = _distinct(labels)
    plain = {_plain(text): text for text in of_labels}
    if len(plain) < len(of_labels):  # classes may differ in case, as letters do
        return
    for text in unknown:
        if _plain(text) in plain:
            raw = next(raw for raw in texts if text in _distinct(raw))
            raise InputError(
                f"{first_text(raw, text)}, and {labels.name} contains {plain[_plain(text)]!r}: write every class in "
                f"one way, or pass {option('class_names')} if these are two classes"
            )


def _refuse_missing(texts: Sequence[Raw], unknown: Sequence[str]) -> None:
    """Refuse predictions such as NA that no label has: they are missing."""
    for raw in texts:
        for text in _distinct(raw):
            if text in unknown and text.lower() in USUAL_MISSING:
                raise InputError(f"{first_text(raw, text)}: every example needs a prediction")


def _about_names(of_labels: Sequence[str], predicted: Collection[str]) -> list[str]:
    """Warn about names of labels that mark missing labels, or that may be another spelling of a class."""
    notes = [
        f"the label {text!r} was read as a class: if it marks a missing label, leave the example out of all files"
        for text in of_labels
        if text.lower() in USUAL_MISSING
    ]
    spellings: dict[str, str] = {}
    for text in sorted(of_labels, key=lambda name: name not in predicted):
        other = spellings.setdefault(_plain(text), text)
        if other != text and text not in predicted and other in predicted:
            notes.append(f"the labels {other!r} and {text!r} were read as two classes, and {text!r} is never predicted")
    return notes


def _plain(text: str) -> str:
    """Reduce a name to its letters and digits without case, as far as it has any."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return re.sub(r"[\W_]+", " ", folded).strip() or folded


def _booleans(labels: Raw, stacks: Sequence[Raw], class_names: Sequence[str] | None) -> Numbered:
    if labels.values.dtype.kind in "iu" and labels.values.size and labels.values.max() > 1:
        odd = next(raw for raw in stacks if raw.values.dtype == bool)
        raise InputError(
            f"{odd.name} contains booleans and {labels.name} contains {labels.values.max()}: pass the predicted "
            f"classes, not whether they are right"
        )
    converted = [
        raw._replace(values=raw.values.astype(np.int64)) if raw.values.dtype == bool else raw
        for raw in (labels, *stacks)
    ]
    names = tuple(class_names) if class_names is not None else ("False", "True")
    whole = [raw.values for raw in converted if raw.values.dtype.kind in "iu"]
    if class_names is None and any(values.size and values.max() > 1 for values in whole):
        return Numbered(converted[0], tuple(converted[1:]), None, ("True was read as class 1, False as class 0",))
    return Numbered(converted[0], tuple(converted[1:]), names, ("True was read as class 1, False as class 0",))


def _integer_names(labels: Raw, stacks: Sequence[Raw], names: tuple[str, ...]) -> Numbered:
    """Match whole numbers with class names that are whole numbers, unless they are indices."""
    by_value = _values(names)
    examples = labels.values.size
    whole = [raw for raw in (labels, *stacks) if _holds_classes(raw, examples)]
    found = {int(v) for raw in whole for v in np.unique(raw.values)}
    if by_value is None or all(by_value.get(v) == v for v in found):
        return Numbered(labels, tuple(stacks), names, ())
    if not found <= by_value.keys():
        return Numbered(labels, tuple(stacks), names, ())  # indices into names that are numbers, or an error later

    def matched(raw: Raw) -> Raw:
        if not _holds_classes(raw, examples):
            return raw
        distinct, place = np.unique(raw.values, return_inverse=True)
        codes = np.array([by_value[int(v)] for v in distinct])
        return raw._replace(values=codes[place.reshape(raw.values.shape)])

    note = f"classes were matched with the class names {', '.join(names[:5])}{' ...' * (len(names) > 5)} by value"
    return Numbered(matched(labels), tuple(map(matched, stacks)), names, (note,))


def _holds_classes(raw: Raw, examples: int) -> bool:
    """Whether an array has classes and not logits: integers that are not one-hot, or whole numbers in their shape."""
    values = raw.values
    if values.ndim == 2 and values.shape[1] > 1 and np.isin(values, (0, 1)).all() and (values.sum(1) == 1).all():
        return False  # columns are in the order of the class names
    of_models = not raw.by_row and values.ndim == 2 and values.shape[1] == examples
    shaped = values.ndim == 1 or values.shape == (examples, 1) or of_models
    return values.dtype.kind in "iu" or (shaped and bool((values == np.floor(values)).all()))


def _values(names: Sequence[str]) -> dict[int, int] | None:
    """Map each value to its class if all names are whole numbers."""
    if not all(WHOLE_NUMBER.fullmatch(str(name).strip()) for name in names):
        return None
    return {int(float(name)): c for c, name in enumerate(names)}


def _known(text: str, by_value: dict[int, int]) -> bool:
    return bool(WHOLE_NUMBER.fullmatch(text)) and int(float(text)) in by_value


def _distinct(raw: Raw) -> list[str]:
    return list(dict.fromkeys(raw.values.ravel().tolist()))


def first_text(raw: Raw, text: str) -> str:
    """Describe where a text first occurs: ``FILE, column NAME contains TEXT at example N``."""
    place = [int(i) for i in np.unravel_index(int((raw.values == text).argmax()), raw.values.shape)]
    if raw.by_row:
        named = f", column {raw.columns[place[1]]!r}" if raw.columns else ""
        return f"{raw.name}{named} contains {text!r} at example {place[0]}"
    model = f"model {place[0]}, " if len(place) > 1 else ""
    return f"{raw.name} contains {text!r} at {model}example {place[-1]}"


def _numbers(raw: Raw, index: dict[str, int]) -> Raw:
    if raw.values.dtype != object:
        return raw
    unknown = [text for text in _distinct(raw) if text not in index]
    if unknown:
        kind = (
            "a number among class names"
            if WHOLE_NUMBER.fullmatch(unknown[0])
            else f"expected one of the class names {some(index)}"
        )
        raise InputError(f"{first_text(raw, unknown[0])}, {kind}")
    codes = np.array([index[text] for text in raw.values.ravel().tolist()], np.int64)
    return raw._replace(values=codes.reshape(raw.values.shape))


def about_labels(labels: np.ndarray, name: str) -> list[str]:
    """Warn about labels that look like a marker for missing classes, a quantity or an id instead of a class.

    >>> about_labels(np.arange(100), "ages.csv")[0][:49]
    'ages.csv has 100 distinct labels in 100 examples:'
    """
    found = np.unique(labels)
    distinct = len(found)
    if distinct > 2 and found[-1] in _MARKS and found[-2] < found[-1] // 2:
        return [
            f"{name} contains {found[-1]}, and otherwise 0 to {found[-2]}: if it marks examples without a class, leave "
            f"them out with {option('ignore_label', found[-1])}"
        ]
    if distinct <= 20 or distinct * 4 <= labels.size:
        return []
    return [
        f"{name} has {distinct} distinct labels in {labels.size} examples: if they are quantities, ranks or ids, the "
        f"results below are meaningless; {SCOPE}"
    ]
