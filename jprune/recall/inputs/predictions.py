"""What the audit accepts: labels, predictions or logits of one or many models, groups, names.

Predictions come from any framework, so nothing is assumed beyond "convertible to a numpy array".
Every refusal names the argument or file, the model, the example and the value, counted from 0.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jprune.recall.inputs.arguments import first_true

MOST_CLASSES = 46_340  # the square still fits int32, which is how ``jprune.recall.measures.counts`` addresses its cells
_CLASSES = f"class indices, whole numbers in 0..{MOST_CLASSES - 1}"


Groups = dict[str, tuple[Int[np.ndarray, " examples"], tuple[str, ...]]]
"""For every attribute of the examples, each example's code and the names of the codes."""


class InputError(ValueError):
    """An argument or a file cannot be audited; the message says which, where in it, and why."""


class Predictions(NamedTuple):
    """The predictions of one or more models for the same examples.

    Attributes:
      name: what the caller calls it (an argument, a file), for errors.
      predicted: predicted classes, int64 (models, examples).
      width: how many logits there were per example; None where classes were given.
    """

    name: str
    predicted: Int[np.ndarray, "models examples"]
    width: int | None


def array(values: Any, name: str) -> np.ndarray:
    """Convert to a numpy array of integers or floats.

    Raises:
      InputError: it does not convert, is ragged, or holds anything but numbers.

    >>> array([True, False], "labels")
    Traceback (most recent call last):
      ...
    jprune.recall.inputs.predictions.InputError: labels must hold numbers, got dtype bool
    """
    try:
        converted = np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{name} does not convert to a numpy array: {error}") from error
    if converted.dtype.kind not in "iuf" and converted.dtype.name not in ("bfloat16", "float8_e4m3fn", "float8_e5m2"):
        hint = "; of names give their numbers among class_names (a table may hold names)"
        text = hint if converted.dtype.kind in "US" else ""
        raise InputError(f"{name} must hold numbers, got dtype {converted.dtype}{text}")
    return converted


def labels(values: Any, name: str = "labels") -> Int[np.ndarray, " examples"]:
    """Read the true classes: (examples,) or (examples, 1) whole numbers from 0 up.

    Raises:
      InputError: another shape, no example, or an entry that is negative, fractional or beyond the
        largest number of classes; the message has its index.

    >>> labels([2, 0, 1.0])
    array([2, 0, 1])
    """
    given = array(values, name)
    if given.ndim == 2 and given.shape[1] == 1:
        given = given[:, 0]
    if given.ndim != 1:
        raise InputError(f"{name} must have shape (examples,), got {given.shape}")
    if given.size == 0:
        raise InputError(f"{name} holds no example")
    return _whole(given, name, _CLASSES)


def stack(values: Any, name: str, examples: int) -> Predictions:
    """Read the predictions of one or more models.

    Args:
      values: classes as integers, (examples,) or (models, examples); or logits as floats, (examples,
        classes) or (models, examples, classes), of which the largest counts (the first of equals).
        Whole numbers stored as floats are taken for classes where the shape is that of classes alone.
      name: what the caller calls it, for errors.
      examples: how many labels there are.

    Raises:
      InputError: a shape that does not fit, a NaN logit, an entry that is no class, or floats that
        may be either.

    >>> stack([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]], "dense", 3)
    Predictions(name='dense', predicted=array([[1, 0, 1]]), width=2)
    """
    given = array(values, name)
    as_logits = given.dtype.kind not in "iu" and given.ndim >= 2 and given.shape[-2] == examples
    if given.ndim not in ((2, 3) if as_logits else (1, 2)) or (not as_logits and given.shape[-1] != examples):
        raise InputError(f"{name} has shape {given.shape}{_shape_advice(given, examples)}")
    if given.size == 0:
        raise InputError(f"{name} has shape {given.shape}: it holds no prediction")
    if as_logits and given.shape == (examples, examples) and (given == np.floor(given)).all() and examples > 2:
        raise InputError(
            f"{name} holds whole numbers as floats, of shape {given.shape} for {examples} labels: make them integers "
            f"if they are classes of {examples} models; give logits an axis of models, (1, {examples}, {examples})"
        )
    if not as_logits:
        whole = _whole(given, name, f"{_CLASSES} (logits need an axis of classes at the end)")
        return Predictions(name, np.atleast_2d(whole), None)
    models = given if given.ndim == 3 else given[None]
    undefined = np.isnan(models)
    if undefined.any():
        model, example, column = first_true(undefined)
        raise InputError(f"{name} holds NaN among the logits of model {model}, example {example}, class {column}")
    return Predictions(name, models.argmax(axis=-1).astype(np.int64), models.shape[-1])


def join(stacks: Sequence[Predictions]) -> Predictions:
    """Make one stack of several, models in the order given.

    Raises:
      InputError: they hold logits of different widths.

    >>> one = Predictions("a.npy", np.zeros((1, 3), int), None)
    >>> join([one, one]).predicted.shape
    (2, 3)
    """
    widths = {stack.width for stack in stacks if stack.width is not None}
    if len(widths) > 1:
        told = ", ".join(f"{stack.name} has {stack.width}" for stack in stacks if stack.width is not None)
        raise InputError(f"logits of one set of models must cover the same classes: {told}")
    name = ", ".join(stack.name for stack in stacks)
    return Predictions(name, np.concatenate([stack.predicted for stack in stacks]), widths.pop() if widths else None)


def class_count(
    true: Int[np.ndarray, " examples"],
    stacks: Sequence[Predictions],
    *,
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    name: str = "labels",
) -> int:
    """Decide how many classes there are, and refuse labels and predictions outside them.

    What is said decides (``num_classes``, ``class_names``), then the width of the logits, then the
    largest label: a prediction beyond it is more often a mistake than a class without examples.

    Args:
      true: the true classes.
      stacks: the predictions of every set of models.
      class_names: a name per class, or None.
      num_classes: how many there are, or None.
      name: what the caller calls the labels, for errors.

    Returns:
      The number of classes, C; every label and prediction lies in 0..C-1.

    Raises:
      InputError: the sources disagree, or an entry is outside 0..C-1.

    >>> class_count(np.array([0, 1, 2]), [Predictions("dense", np.array([[0, 2, 2]]), None)])
    3
    """
    widest = max((stack for stack in stacks if stack.width is not None), key=lambda s: s.width or 0, default=None)
    largest = int(true.max())
    if num_classes is not None:
        classes, source = num_classes, f"num_classes is {num_classes}"
    elif class_names is not None:
        classes, source = len(class_names), f"{len(class_names)} class names were given"
    elif widest is not None and widest.width is not None:
        classes, source = widest.width, f"{widest.name} has {widest.width} logits per example"
    else:
        classes, source = largest + 1, f"{name} run to {largest}"
    if not 1 <= classes <= MOST_CLASSES:
        raise InputError(f"{source}, but the number of classes must lie in 1..{MOST_CLASSES}")
    if class_names is not None and len(class_names) != classes:
        raise InputError(f"{len(class_names)} class names were given, but {source}")
    if largest >= classes:
        raise InputError(f"{name} holds {largest} at example {int(true.argmax())}; {source}: allowed 0..{classes - 1}")
    for each in stacks:
        if each.width not in (None, classes):
            raise InputError(f"{each.name} has {each.width} logits per example, but {source}")
        beyond = each.predicted >= classes
        if beyond.any():
            model, example = first_true(beyond)
            more = "; give num_classes (--num-classes) if some have no examples" * (num_classes is None)
            raise InputError(
                f"{each.name} holds {each.predicted[model, example]} at model {model}, example {example}; "
                f"{source}: allowed 0..{classes - 1}{more}"
            )
    return classes


def names_of_classes(class_names: Sequence[str] | None, classes: int) -> tuple[str, ...]:
    """Give every class a name: those given, or its index.

    Raises:
      InputError: a name is no text, or two are equal.

    >>> names_of_classes(None, 3)
    ('0', '1', '2')
    """
    if class_names is None:
        return tuple(str(c) for c in range(classes))
    if isinstance(class_names, str):
        raise InputError(f"class_names must be a list of names, got the text {class_names!r}")
    if len(class_names) != classes:
        raise InputError(f"{len(class_names)} class names were given for {classes} classes")
    for index, name in enumerate(class_names):
        if not isinstance(name, str) or not name.strip() or not name.isprintable():
            raise InputError(f"class_names[{index}] must be printable text, got {name!r}")
    names = tuple(class_names)
    _refuse_repeats(names, "class_names")
    return names


def by_score(pruned: Any, name: str = "pruned") -> dict[str, dict[float, tuple[str, Any]]]:
    """Sort {ratio: array} or {score: {ratio: array}} into the latter, ratios ascending, each array with a name.

    Models pruned by a score without a name are under ``"pruned"``.

    Raises:
      InputError: no mapping, nothing in it, scores and ratios mixed, or a ratio that is no finite
        number from 1 up.

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
            raise InputError(f"{name}[{score!r}] must be {{ratio: predictions}}, got {type(ratios).__name__}")
    return {score: _by_ratio(ratios, f"{name}[{score!r}]") for score, ratios in pruned.items()}


def baselines(dense: Any, scores: Sequence[str]) -> dict[str, tuple[str, Any]]:
    """Give every score its dense models, each with a name: one array for all, or {score: array}.

    Raises:
      InputError: a mapping without one of the scores, or with one more.

    >>> baselines("a", ["magnitude", "random"])
    {'magnitude': ('dense', 'a'), 'random': ('dense', 'a')}
    """
    if not isinstance(dense, Mapping):
        return dict.fromkeys(scores, ("dense", dense))
    if set(dense) != set(scores):
        raise InputError(f"dense has the scores {list(dense)!r}, the pruned models have {list(scores)!r}")
    return {score: (f"dense[{score!r}]", dense[score]) for score in scores}


def groups(values: Any, examples: int) -> Groups:
    """Read a second label per example, or several by name, as codes and the names of the codes.

    Args:
      values: (examples,) whole numbers or text, or {attribute: such}; None for none.
      examples: how many labels there are.

    Raises:
      InputError: another shape, or an entry that is missing.

    >>> groups(["old", "young", "old"], 3)
    {'group': (array([0, 1, 0]), ('old', 'young'))}
    """
    if values is None:
        return {}
    attributes = values if isinstance(values, Mapping) else {"group": values}
    return {str(attribute): _group(given, str(attribute), examples) for attribute, given in attributes.items()}


def _group(values: Any, attribute: str, examples: int) -> tuple[Int[np.ndarray, " examples"], tuple[str, ...]]:
    name = f"groups[{attribute!r}]"
    given = np.asarray(values)
    if given.shape != (examples,):
        raise InputError(f"{name} must have shape ({examples},), one entry per label, got {given.shape}")
    cells = given.tolist()
    for example, cell in enumerate(cells):
        if not isinstance(cell, bool | int | str) and not (isinstance(cell, float) and cell.is_integer()):
            raise InputError(f"{name} must hold text or whole numbers, got {cell!r} at example {example}")
    kinds, codes = np.unique(given if given.dtype != object else given.astype(str), return_inverse=True)
    return codes.astype(np.int64), tuple(str(kind) for kind in kinds.tolist())


def _by_ratio(ratios: Mapping[Any, Any], name: str) -> dict[float, tuple[str, Any]]:
    found: dict[float, tuple[str, Any]] = {}
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


def _whole(given: np.ndarray, name: str, wanted: str) -> np.ndarray:
    """Return whole numbers in 0..MOST_CLASSES-1 as int64, or refuse the first entry that is none."""
    bad = ~((given >= 0) & (given < MOST_CLASSES))
    if given.dtype.kind not in "iu":
        bad |= given != np.floor(given)
    if bad.any():
        index = first_true(bad)
        where = f"example {index[0]}" if given.ndim == 1 else f"model {index[0]}, example {index[1]}"
        raise InputError(f"{name} holds {given[index]} at {where}; wanted {wanted}")
    return given.astype(np.int64)


def _shape_advice(given: np.ndarray, examples: int) -> str:
    if given.dtype.kind in "iu" and given.ndim == 2 and given.shape[0] == examples:
        return f"; classes are (models, {examples}): transpose it, or if it holds logits, make it float"
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
