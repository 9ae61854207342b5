"""Read labels, predictions and logits of one or several models, from any framework.

An input (``raw.Raw``) is converted to classes and, if it has them, logits. Every error names the argument or file, the
model, the example and the value, counted from 0.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jprune.recall.inputs.arguments import first_true
from jprune.recall.inputs.raw import SCOPE, InputError, Raw, as_array, cleaned, of_object, option

MOST_CLASSES = 46_340  # its square fits int32, with which ``jprune.recall.counts`` indexes cells
_CLASSES = f"class indices, whole numbers in 0..{MOST_CLASSES - 1}"

__all__ = ["MOST_CLASSES", "InputError", "Predictions", "as_array", "baselines", "by_name", "by_score"]
__all__ += ["class_count", "join", "join_batches", "labels", "names_of_classes", "one_hot_labels", "predictions"]


class Predictions(NamedTuple):
    """The predictions of one or more models for the same examples.

    Attributes:
      name: the caller's name (an argument, a file), for errors.
      predicted: predicted classes, int64 (models, examples).
      width: number of logits per example; None if classes were given.
      logits: the logits as given, (models, examples, classes); None if classes were given.
      notes: notes for the reader of the audit.
    """

    name: str
    predicted: Int[np.ndarray, "models examples"]
    width: int | None
    logits: Float[np.ndarray, "models examples classes"] | None = None
    notes: tuple[str, ...] = ()


def labels(given: object) -> Int[np.ndarray, " examples"]:
    """Read the true classes: (examples,) or (examples, 1) whole numbers from 0 up, or one-hot rows.

    Raises:
      InputError: the shape is wrong, there is no example, or an entry is negative, fractional or beyond the largest
        number of classes; the message has its index.

    >>> labels([2, 0, 1.0])
    array([2, 0, 1])
    """
    raw = of_object(given, "labels")
    values, name = raw.values, raw.name
    if values.ndim == 2 and 1 in values.shape:
        values = values.ravel()
    if values.ndim == 2 and _one_hot(values) and values.shape[1] > 1:
        return np.asarray(values.argmax(1))
    if values.ndim == 2 and np.isin(values, (0, 1)).all() and values.shape[0] > 2:
        raise InputError(f"{name} has shape {values.shape} and rows without exactly one 1: multi-label; {SCOPE}")
    if values.ndim != 1:
        masks = "; pixels of masks may be examples, after ravel(), but the intervals take them as independent"
        more = masks if values.ndim > 2 else ""
        raise InputError(f"{name} must have shape (examples,), got {values.shape}; {SCOPE}{more}")
    if values.size == 0:
        raise InputError(f"{name} contains no example")
    if values.dtype.kind == "f":
        bad = ~np.isfinite(values) | (values != np.floor(values))
        if bad.any():
            (example,) = first_true(bad)
            hint = "" if np.isnan(values[example]) else f"; {SCOPE}, not for regression"
            raise InputError(f"{name} contains {values[example]} at example {example}; expected {_CLASSES}{hint}")
    if (values < 0).any() and values.min() >= -128 and (values >= 0).any():
        (example,) = first_true(values < 0)
        value = int(values[example])
        way = f"{option('ignore_label', value)} leaves these examples out"
        if set(np.unique(values)) == {-1, 1}:
            way = "name the two classes with class_names=['-1', '1'] (--class-names=-1,1)"
        raise InputError(f"{name} contains {value} at example {example}; expected {_CLASSES}; {way}")
    return _whole(values, name, _CLASSES)


def predictions(given: object, name: str, examples: int, threshold: float | None = None) -> Predictions:
    """Read the predictions of one or more models.

    Args:
      given: classes as integers, (examples,) or (models, examples); or logits as floats, (examples, classes) or
        (models, examples, classes), of which the largest is the prediction (ties: the first). A table has a row per
        example instead. Floats that are whole numbers are classes if only classes have that shape, and an error if
        logits could have it.
      name: the caller's name for it, for errors.
      examples: number of labels.
      threshold: the least probability for which a single sigmoid output means class 1; or None.

    Raises:
      InputError: the shape does not fit, a logit is NaN, an entry is not a class, or the numbers may be either classes
        or logits.

    >>> predictions([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]], "dense", 3).predicted
    array([[1, 0, 1]])
    """
    raw = of_object(given, name)
    values, name = join_batches(raw, examples).values, raw.name
    values = values.astype(np.int64) if values.dtype == bool else values
    if raw.by_row and values.ndim == 1:
        values = values[:, None]
    if raw.by_row or (values.ndim == 2 and values.shape == (examples, 1)):
        return _of_rows(values, raw, examples, threshold)
    whole = values.dtype.kind in "iu"
    if values.ndim == 3 and values.shape[1:] == (examples, 1) and not whole:
        values = values[:, :, 0]
    if whole and values.ndim == 2 and values.shape[0] == examples != values.shape[1] and _one_hot(values):
        return _logits(values[None], raw)
    as_logits = not whole and values.ndim >= 2 and values.shape[-2] == examples
    if as_logits and values.ndim == 2 and values.shape[0] != 1 and _integral(values) and examples > 2:
        if _one_hot(values):
            return _logits(values[None], raw)
        raise InputError(
            f"{name} contains whole numbers as floats, of shape {values.shape} for {examples} labels: make them "
            f"integers of shape (models, {examples}) if they are classes; give logits an axis of models, "
            f"(1, {', '.join(map(str, values.shape))})"
        )
    if values.ndim not in ((2, 3) if as_logits else (1, 2)) or (not as_logits and values.shape[-1] != examples):
        raise InputError(f"{name} has shape {values.shape}{_shape_advice(values, examples)}")
    if as_logits:
        _check_one_output(values.shape[-1], name, threshold)
        return _logits(values if values.ndim == 3 else values[None], raw)
    if not whole and not _integral(values):
        return _sigmoid(np.atleast_2d(values), raw, threshold)
    if values.ndim == 2 and len(values) > 2 and examples > 2 and _one_hot(values.T):
        raise InputError(
            f"{name} has shape {values.shape} and one 1 for each example: one-hot predictions have shape ({examples}, "
            f"classes); transpose them"
        )
    found = _whole(values, name, f"{_CLASSES} (logits need an axis of classes at the end)")
    return Predictions(name, np.atleast_2d(found), None, None, raw.notes)


def one_hot_labels(raw: Raw, class_names: Sequence[str] | None) -> Raw:
    """Convert one-hot rows of labels to class indices; other labels stay as they are.

    >>> one_hot_labels(Raw("labels", np.array([[False, True], [True, False]])), None).values
    array([1, 0])
    """
    values = raw.values
    if values.ndim != 2 or 1 in values.shape or values.dtype == object or not _one_hot(values):
        return raw
    columns = [cleaned(column) for column in raw.columns]
    wanted, order = [cleaned(name) for name in class_names or ()], "columns"
    if columns and sorted(columns) == sorted(wanted):
        values, order = values[:, [columns.index(name) for name in wanted]], "class names"
    note = f"{raw.name} has one 1 in every row and was read as one-hot labels; classes are in the order of the {order}"
    return raw._replace(values=values.argmax(1), columns=(), notes=(*raw.notes, *[note] * raw.by_row))


def join_batches(raw: Raw, examples: int) -> Raw:
    """Join batches of one size to one array, and convert boolean one-hot rows to integers.

    Args:
      raw: predictions as given.
      examples: number of labels.

    Raises:
      InputError: the array is empty, or a single value.

    >>> join_batches(Raw("dense", np.zeros((3, 4, 2)), listed=True), 12).values.shape
    (12, 2)
    """
    values = raw.values
    if values.ndim == 0:
        raise InputError(f"{raw.name} is a single value, {values}; an entry per example is needed")
    if values.size == 0:
        raise InputError(f"{raw.name} has shape {values.shape}: it is empty")
    if raw.listed and values.ndim > 1 and values.shape[1] != examples == values.shape[0] * values.shape[1]:
        values = values.reshape(examples, *values.shape[2:])
    if values.dtype == bool and values.ndim == 2 and values.shape[0] == examples and _one_hot(values):
        values = values.astype(np.int64)
    return raw._replace(values=values, listed=raw.listed and values is raw.values)


def _of_rows(values: np.ndarray, raw: Raw, examples: int, threshold: float | None) -> Predictions:
    """Read a table: a row per example, a column per model, or per class of one model's logits."""
    name = raw.name
    if len(values) != examples:
        more = "; is its first row a header of numbers?" if len(values) == examples + 1 else ""
        more = "; was its first row read as a header? Name the columns" if len(values) == examples - 1 else more
        rows = "1 row" if len(values) == 1 else f"{len(values)} rows"
        raise InputError(f"{name} has {rows} for {examples} labels: one row per example is needed{more}")
    several = values.shape[1] > 1
    if several and _one_hot(values):
        return _logits(values[None], raw)
    if values.dtype.kind in "iu" or (not several and _integral(values)):
        found = _whole(values.T, name, f"{_CLASSES} (logits need decimals)")
        return Predictions(name, found, None, None, raw.notes)
    if not several:
        return _sigmoid(values.T, raw, threshold)
    if _integral(values):
        raise InputError(
            f"{name} contains whole numbers as decimals (such as {values[0, 0]}): save classes as integers, one column "
            f"per model; of logits save the largest one's index"
        )
    if threshold is not None and ((values >= 0) & (values <= 1)).all() and not np.allclose(values.sum(1), 1, atol=1e-3):
        return _sigmoid(values.T, raw, threshold)
    _check_one_output(values.shape[1], name, threshold)
    return _logits(values[None], raw)


def _check_one_output(width: int, name: str, threshold: float | None) -> None:
    """Refuse a threshold for several numbers per example, of which the largest would count instead."""
    if threshold is not None:
        raise InputError(
            f"{name} contains {width} numbers per example; {option('threshold', threshold)} is for one, the "
            f"probability of class 1: pass only that column (arrays have shape (models, examples)), or leave the "
            "threshold out"
        )


def _logits(models: np.ndarray, raw: Raw) -> Predictions:
    """Read logits, probabilities, percentages or one-hot rows, (models, examples, classes)."""
    undefined = np.isnan(models)
    if undefined.any():
        model, example, column = first_true(undefined)
        raise InputError(
            f"{raw.name} contains NaN among the logits of model {model}, example {example}, class {column}"
        )
    predicted = models.argmax(axis=-1).astype(np.int64)
    notes = [*raw.notes]
    if models.shape[-1] > 1 and _one_hot(models[:, :1]) and _one_hot(models):  # says nothing about confidence
        notes.append(f"{raw.name} has one 1 for every example and was read as one-hot predictions")
        return Predictions(raw.name, predicted, models.shape[-1], None, tuple(notes))
    if _percentages(models):
        models = models / 100
        notes.append(f"{raw.name} contains percentages, because its rows sum to 100; they were divided by 100")
    ties = empty = 0
    for rows in models:
        best = rows.max(axis=-1)
        tied = (rows == best[:, None]).sum(axis=-1) > 1 if models.shape[-1] > 1 else np.zeros(len(rows), bool)
        level = (rows == rows[:, :1]).all(axis=-1) & tied
        empty += int(level.sum())
        ties += int((tied & ~level).sum())
    every = predicted.size
    for number, what in (
        (ties, "several largest logits; the first class is taken"),
        (empty, "equal logits (or -inf) for every class; class 0 is taken"),
    ):
        if number:
            notes.append(f"{raw.name}: {number} of {every} predictions {'has' if number == 1 else 'have'} {what}")
    return Predictions(raw.name, predicted, models.shape[-1], models, tuple(notes))


def _sigmoid(scores: np.ndarray, raw: Raw, threshold: float | None) -> Predictions:
    """Read one probability per example as class 1 from the threshold on, else class 0."""
    if np.isnan(scores).any():
        model, example = first_true(np.isnan(scores))
        raise InputError(
            f"{raw.name} contains NaN at model {model}, example {example}; every example needs a prediction"
        )
    outside = ~((scores >= 0) & (scores <= 1))
    models, examples = scores.shape
    if models > 1 and not raw.by_row and (outside.any() or np.allclose(scores.sum(0), 1, atol=1e-3)):
        raise InputError(
            f"{raw.name} has shape {scores.shape} for {examples} labels: logits or probabilities of {models} classes "
            f"have shape ({examples}, {models}); transpose them"
        )
    if outside.any():
        model, example = first_true(outside)
        raise InputError(
            f"{raw.name} contains {scores[model, example]} at model {model}, example {example}; expected {_CLASSES}, "
            f"or probabilities of class 1 with {option('threshold')}; for scores whose sign decides, pass the classes, "
            f"scores > 0; {SCOPE}"
        )
    if threshold is None:
        model, example = first_true(scores != np.floor(scores))
        raise InputError(
            f"{raw.name} contains {scores[model, example]} at model {model}, example {example}, one number per "
            f"example: if it is the probability of class 1, pass the smallest one that means class 1, "
            f"{option('threshold', 0.5)}"
        )
    predicted = (scores >= threshold).astype(np.int64)
    below = np.minimum(1 - scores, np.where(predicted, 0.5 - np.finfo(scores.dtype).eps, 1))  # 0.5 means class 1
    models = np.stack([below, scores], axis=-1) if threshold == 0.5 else None
    return Predictions(raw.name, predicted, 2, models, raw.notes)


def join(stacks: Sequence[Predictions]) -> Predictions:
    """Join several sets of models to one, in the order given.

    Raises:
      InputError: they have logits of different widths.

    >>> one = Predictions("a.npy", np.zeros((1, 3), int), None)
    >>> join([one, one]).predicted.shape
    (2, 3)
    """
    if len(stacks) == 1:
        return stacks[0]
    widths = {stack.width for stack in stacks if stack.width is not None}
    if len(widths) > 1:
        listed = ", ".join(f"{stack.name} has {stack.width}" for stack in stacks if stack.width is not None)
        raise InputError(f"logits of one set of models must cover the same classes: {listed}")
    name = ", ".join(stack.name for stack in stacks)
    given = [stack.logits for stack in stacks if stack.logits is not None]
    logits = np.concatenate(given) if len(given) == len(stacks) else None
    notes = tuple(note for stack in stacks for note in stack.notes)
    predicted = np.concatenate([stack.predicted for stack in stacks])
    return Predictions(name, predicted, widths.pop() if widths else None, logits, notes)


def class_count(
    true: Int[np.ndarray, " examples"],
    stacks: Sequence[Predictions],
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    name: str = "labels",
) -> int:
    """Return the number of classes; raise for labels and predictions outside them.

    It is the first that is available of the explicit arguments (``num_classes``, ``class_names``), the width of the
    logits, and the largest label: a larger prediction is more often a mistake than a class without examples.

    Args:
      true: the true classes.
      stacks: the predictions of every set of models.
      class_names: a name per class, or None.
      num_classes: number of classes, or None.
      name: the caller's name for the labels, for errors.

    Returns:
      The number of classes, C; every label and prediction is in 0..C-1.

    Raises:
      InputError: the sources disagree, or an entry is outside 0..C-1.

    >>> class_count(np.array([0, 1, 2]), [Predictions("dense", np.array([[0, 2, 2]]), None)])
    3
    """
    widest = max((stack for stack in stacks if stack.width is not None), key=lambda s: s.width or 0, default=None)
    largest = int(true.max())
    if num_classes is not None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, int | np.integer):
            raise InputError(f"num_classes must be a whole number, got {num_classes!r}")
        classes, source = num_classes, f"num_classes is {num_classes}"
    elif class_names is not None:
        classes, source = len(class_names), f"{len(class_names)} class names were given"
    elif widest is not None and widest.width is not None:
        classes, source = widest.width, f"{widest.name} has {widest.width} logits per example"
    else:
        classes, source = largest + 1, f"the largest label in {name} is {largest}"
    if not 1 <= classes <= MOST_CLASSES:
        raise InputError(f"{source}, but the number of classes must lie in 1..{MOST_CLASSES}")
    if class_names is not None and len(class_names) != classes:
        raise InputError(f"{len(class_names)} class names were given, but {source}")
    if largest >= classes:
        more = "; are the labels numbered from 1?" if largest == classes and true.min() > 0 else ""
        raise InputError(
            f"{name} contains {largest} at example {int(true.argmax())}; {source}: allowed 0..{classes - 1}{more}"
        )
    for each in stacks:
        if each.width not in (None, classes):
            raise InputError(f"{each.name} has {each.width} logits per example, but {source}")
        beyond = each.predicted >= classes
        if beyond.any():
            model, example = first_true(beyond)
            more = f"; pass {option('num_classes')} if some classes have no examples" * (num_classes is None)
            if each.predicted.max() == classes and each.predicted.min() > 0:
                more += "; are the predictions numbered from 1?"
            raise InputError(
                f"{each.name} contains {each.predicted[model, example]} at model {model}, example {example}; "
                f"{source}: allowed 0..{classes - 1}{more}"
            )
    return classes


def names_of_classes(class_names: Collection[str] | None, classes: int) -> tuple[str, ...]:
    """Return the names of the classes without blanks around them: those given, or the indices.

    Raises:
      InputError: a name is not text, two are equal, or they are in no order.

    >>> names_of_classes(None, 3)
    ('0', '1', '2')
    """
    if class_names is None:
        return tuple(str(c) for c in range(classes))
    if isinstance(class_names, str):
        raise InputError(f"class_names must be a list of names, got the text {class_names!r}")
    if isinstance(class_names, set | frozenset):
        raise InputError(f"class_names must be a list of names in the order of the classes, got {class_names!r}")
    if len(class_names) != classes:
        raise InputError(f"{len(class_names)} class names were given for {classes} classes")
    for index, name in enumerate(class_names):
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError(f"class_names[{index}] must be printable text, got {name!r}")
    names = tuple(cleaned(name) for name in class_names)
    _refuse_repeats(names, "class_names")
    return names


def by_score(pruned: object, name: str = "pruned") -> dict[str, dict[float, tuple[str, object]]]:
    """Convert {ratio: array} or {score: {ratio: array}} to the latter, with ratios ascending and a name for each array.

    Models pruned by a score without a name have the key ``"pruned"``.

    Raises:
      InputError: ``pruned`` is not a mapping or empty, scores and ratios are mixed, or a ratio is not a finite number
        of at least 1.

    >>> by_score({10: "b", 2.0: "a"})
    {'pruned': {2.0: ('pruned[2.0]', 'a'), 10.0: ('pruned[10]', 'b')}}
    """
    if not isinstance(pruned, Mapping):
        raise InputError(
            f"{name} must be {{ratio: predictions}} or {{score: {{ratio: predictions}}}}, got {type(pruned).__name__}"
        )
    if not pruned:
        raise InputError(f"{name} is empty: there is nothing to compare with the dense models")
    texts = [isinstance(key, str) for key in pruned]
    if any(texts) and not all(texts):
        raise InputError(f"{name} mixes scores (text) and ratios (numbers) among its keys: {list(pruned)!r}")
    if not all(texts):
        return {"pruned": _by_ratio(pruned, name)}
    for score, ratios in pruned.items():
        if not score.strip() or not score.isprintable():
            raise InputError(f"{name} must have printable text or ratios for keys, got {score!r}")
        if not isinstance(ratios, Mapping) or not ratios:
            raise InputError(
                f"{name}[{score!r}] must be {{ratio: predictions}}, got {type(ratios).__name__}; text is the name of a "
                "score, a ratio is a number"
            )
    return {score: _by_ratio(ratios, f"{name}[{score!r}]") for score, ratios in pruned.items()}


def by_name(compare: object) -> dict[str, tuple[str, object]]:
    """Check {name: array} of models without a ratio, and return a name for errors and the array by name.

    Raises:
      InputError: it is not a mapping or empty, or a name is not printable text, or occurs twice, as 1 and "1" do.

    >>> by_name({"int8": "a"})
    {'int8': ("compare['int8']", 'a')}
    """
    if not isinstance(compare, Mapping) or not compare:
        raise InputError(f"compare must be {{name: predictions}} with one name or more, got {type(compare).__name__}")
    found: dict[str, tuple[str, object]] = {}
    for key, value in compare.items():
        name = str(key).strip()
        if not name or not name.isprintable():
            raise InputError(f"compare must have printable text for names, got {key!r}")
        if name in found:
            raise InputError(f"compare has the name {name!r} twice")
        found[name] = (f"compare[{key!r}]", value)
    return found


def baselines(dense: object, scores: Sequence[str]) -> dict[str, tuple[str, object]]:
    """Return the dense models of every score, each with a name: one array for all, or {score: array}.

    Raises:
      InputError: a mapping lacks a score or has an additional one.

    >>> baselines("a", ["magnitude", "random"])
    {'magnitude': ('dense', 'a'), 'random': ('dense', 'a')}
    """
    if not isinstance(dense, Mapping):
        return dict.fromkeys(scores, ("dense", dense))
    keys = {key if key in scores else str(key).strip(): key for key in dense}  # as the names in compare are read
    if set(keys) != set(scores) or len(keys) < len(dense):
        raise InputError(
            f"dense has the keys {list(dense)!r}; the names or scores of the compressed models are {list(scores)!r}"
        )
    return {score: (f"dense[{keys[score]!r}]", dense[keys[score]]) for score in scores}


def _by_ratio(ratios: Mapping[object, object], name: str) -> dict[float, tuple[str, object]]:
    found: dict[float, tuple[str, object]] = {}
    for key, value in ratios.items():
        if isinstance(key, bool | np.bool_) or not isinstance(key, int | float | np.integer | np.floating):
            raise InputError(f"{name} must have compression ratios (numbers) for keys, got {key!r}")
        ratio = float(key)
        if not 1 <= ratio < np.inf:
            raise InputError(
                f"{name} has the ratio {key!r}; a compression ratio (parameters before / after) is finite and at "
                f"least 1, where 1 is the control that was fine-tuned but not pruned"
            )
        if ratio in found:
            raise InputError(f"{name} has the ratio {ratio:g} twice")
        found[ratio] = (f"{name}[{key}]", value)
    return dict(sorted(found.items()))


def _one_hot(values: np.ndarray) -> bool:
    """Whether every row has one 1 and zeros elsewhere."""
    return bool(np.isin(values, (0, 1)).all() and (values.sum(axis=-1) == 1).all())


def _percentages(models: np.ndarray) -> bool:
    """Whether every row is from 0 to 100 and sums to 100 up to rounding."""

    def hundred(rows: np.ndarray) -> bool:
        return bool((rows >= 0).all() and (np.abs(rows.sum(axis=-1) - 100) <= 1).all())

    return models.shape[-1] > 1 and hundred(models[:, :1]) and hundred(models)


def _integral(values: np.ndarray) -> bool:
    first = values[(slice(1),) * (values.ndim - 1)]  # enough for most logits, which may be large
    return bool((first == np.floor(first)).all() and (values == np.floor(values)).all())


def _whole(given: np.ndarray, name: str, wanted: str) -> np.ndarray:
    """Return whole numbers in 0..MOST_CLASSES-1 as int64; raise for the first entry that is not one."""
    bad = ~((given >= 0) & (given < MOST_CLASSES))
    if given.dtype.kind not in "iu":
        bad |= given != np.floor(given)
    if bad.any():
        index = first_true(bad)
        where = f"example {index[0]}" if given.ndim == 1 else f"model {index[0]}, example {index[1]}"
        hint = (
            f"; for abstentions add a class after the others, with {option('num_classes')}" if given[index] < 0 else ""
        )
        raise InputError(f"{name} contains {given[index]} at {where}; expected {wanted}{hint}")
    return given.astype(np.int64)


def _shape_advice(given: np.ndarray, examples: int) -> str:
    if given.dtype.kind in "iu" and given.ndim == 2 and given.shape[0] == examples:
        return (
            f"; classes are (models, {examples}): transpose it; if it contains top-k predictions, pass the first "
            "column; if it contains logits, make it float"
        )
    if given.dtype.kind in "iu" and given.ndim == 3:
        return "; three axes are logits (models, examples, classes), which must be floats"
    return (
        f"; for {examples} labels, classes are integers of shape ({examples},) or (models, {examples}) and logits "
        f"floats of shape ({examples}, classes) or (models, {examples}, classes)"
    )


def _refuse_repeats(names: tuple[str, ...], name: str) -> None:
    seen: dict[str, int] = {}
    for index, each in enumerate(names):
        if each in seen:
            raise InputError(f"{name}[{index}] repeats {each!r}, which is {name}[{seen[each]}] too")
        seen[each] = index
