"""Parse names and options of models. This module does not load Flax, so that a command line starts quickly."""

import ast
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence


def is_own(model: str) -> bool:
    """Whether a model has a name ``package.module:Class``."""
    return ":" in model


def read_options(given: Sequence[str] | Mapping[str, object]) -> dict[str, object]:
    """Parse model options: numbers, tuples, booleans and strings in Python's notation.

    Args:
      given: strings ``NAME=VALUE``; or a mapping, which is returned as a dict.

    Raises:
      ValueError: an option has no ``=``, or is given twice.

    >>> read_options(["depth=4", "features=(300, 100)", "init=he"])
    {'depth': 4, 'features': (300, 100), 'init': 'he'}
    """
    if isinstance(given, Mapping):
        return dict(given)
    found: dict[str, object] = {}
    for option in given:
        name, equals, value = option.partition("=")
        if not equals or not name.isidentifier() or name in found:
            raise ValueError(f"model_options={tuple(given)}: {option!r} must be NAME=VALUE, each name once")
        try:
            found[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            found[name] = value
    return found


def written_options(given: Mapping[str, object]) -> tuple[str, ...]:
    """Return options as the strings ``NAME=VALUE`` that ``read_options`` reads.

    Raises:
      ValueError: a value would not come back as it is, such as a function or a numpy scalar.

    >>> written_options({"depth": 4, "init": "he"})
    ('depth=4', "init='he'")
    """
    written = tuple(f"{name}={value!r}" for name, value in given.items())
    for name, value in read_options(written).items():
        if type(value) is not type(given[name]) or value != given[name]:
            raise ValueError(
                f"model_options: {name}={given[name]!r} has the type {type(given[name]).__name__}; give finite Python "
                "numbers, strings, booleans, None, or tuples, lists and dicts of them, and make other values in the "
                "model"
            )
    return written


def arguments_of(model: Callable[..., object]) -> Mapping[str, inspect.Parameter]:
    """Return the arguments of a model class or function; NNX's metaclass hides those of a class from ``inspect``."""
    if isinstance(model, functools.partial):
        return arguments_of(model.func)
    return inspect.signature(model.__init__ if isinstance(model, type) else model).parameters
