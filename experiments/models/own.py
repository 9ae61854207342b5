"""Load user-defined models: a Flax NNX or Linen class in any importable module, from images to logits."""

import hashlib
import importlib
import inspect
import sys
import traceback
from collections.abc import Callable

import flax.linen
from flax import nnx

from experiments.models.options import arguments_of

_LIBRARIES = ("abc", "builtins", "flax", "typing")  # their base classes are not part of the source of a model


def load(name: str) -> Callable[..., object]:
    """Import the class ``package.module:Class``.

    Raises:
      ValueError: the module cannot be found, or has no class of this name.

    >>> load("flax.nnx:Linear").__name__
    'Linear'
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"model={name!r} must be package.module:Class")
    try:
        found = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"model={name!r}: {error}; start the command in the folder that has the module, or add that folder to "
            "PYTHONPATH"
        ) from error
    except AttributeError as error:
        raise ValueError(f"model={name!r} must be package.module:Class; {error}") from error
    if not callable(found):
        raise ValueError(f"model={name!r} has the type {type(found).__name__}; it must be a class or a function")
    return found


def spec(model: object) -> str:
    """Return the name under which a class is stored, ``package.module:Class``.

    Raises:
      ValueError: the model has no name, such as a ``functools.partial``.

    >>> import flax.nnx
    >>> spec(flax.nnx.Linear)
    'flax.nnx.nn.linear:Linear'
    """
    if not hasattr(model, "__qualname__"):
        raise ValueError(f"model={model!r} has no name, by which results are stored; give a class and model_options")
    return f"{model.__module__}:{model.__qualname__}"


def create(
    cls: Callable[..., object], *, num_classes: int, input_shape: tuple[int, ...], rngs: nnx.Rngs, **given: object
) -> object:
    """Instantiate a model class with its options and those of our arguments that are in its signature.

    Args:
      cls: a Linen module class, or an NNX module class or function that takes ``rngs``.
      num_classes: passed if the class has an argument ``num_classes`` that no option sets.
      input_shape: shape of one example; passed only if it is in the signature.
      rngs: random keys of the initializers, for NNX.
      **given: the model's options.

    Raises:
      ValueError: the class does not take an option, needs one that is missing, or is not one of Flax modules.
    """
    arguments = {"num_classes": num_classes, "input_shape": input_shape, "rngs": rngs}
    accepted = arguments_of(cls)
    linen = is_linen(cls)
    passed = {name: value for name, value in arguments.items() if name in accepted and name not in given}
    passed.pop("rngs" if linen else "", None)
    try:
        made = cls(**passed, **given)
    except Exception as error:  # the class is the user's, and may raise anything
        takes = ", ".join(name for name in accepted if name not in ("self", "rngs", "parent", "name"))
        raise ValueError(
            f"the model {spec(cls)} cannot be made with model_options={given}: {described(error, cls)}; its arguments "
            f"are {takes}"
        ) from error
    if not isinstance(made, nnx.Module | flax.linen.Module):
        raise ValueError(f"the model {spec(cls)} makes a {type(made).__name__}; it must make an NNX or a Linen module")
    return made


def described(error: Exception, cls: Callable[..., object]) -> str:
    """Return an error of a user's class in one line, with the last place in its own file.

    >>> described(ValueError("width must be positive"), nnx.Linear)
    'width must be positive'
    """
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    text = str(error) if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: {error}"
    return f"{text} ({file}, line {lines[-1]})" if lines else text


def is_linen(cls: object) -> bool:
    """Whether a class is a Flax Linen module."""
    return isinstance(cls, type) and issubclass(cls, flax.linen.Module)


def source_digest(cls: object) -> str | None:
    """Return a hash of the source code of a model, 16 hexadecimal digits; None if the source is not available.

    It covers the class or function, the module that defines it, with the helpers in it, and the modules of its base
    classes, except those of Flax. In a notebook, which has no file, it covers the class and its base classes.
    """
    bases = inspect.getmro(cls) if isinstance(cls, type) else (cls,)
    own = [one for one in bases if one is cls or one.__module__.partition(".")[0] not in _LIBRARIES]
    modules = [sys.modules.get(one.__module__) for one in own]
    try:
        sources = list(map(inspect.getsource, [*own, *(one for one in modules if hasattr(one, "__file__"))]))
    except (OSError, TypeError):
        return None
    return hashlib.sha256("".join(dict.fromkeys(sources)).encode()).hexdigest()[:16]
