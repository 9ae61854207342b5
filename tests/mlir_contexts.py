"""One MLIR context for many programs, where this version of jax allows it: the tests compile in less time."""

import importlib
import inspect
import threading
import warnings
from collections.abc import Callable
from typing import Any


class _Contexts(threading.local):
    """An MLIR context for each thread, renewed after some programs, which frees their constants.

    jax makes a context for each program that it lowers, and registering all dialects in it takes a quarter of the time
    that a small operation takes to compile. The tests compile thousands of small operations.
    """

    left = 0

    def __init__(self, make: Callable[[], Any], programs: int):
        self.make, self.programs = make, programs

    def context(self):
        if not self.left:
            self.shared, self.left = self.make(), self.programs
        self.left -= 1
        return self.shared


def share(module: str = "jax._src.interpreters.mlir", name: str = "make_ir_context", programs: int = 500) -> None:
    """Replace the private function of jax that makes a context; warn if this version has another one.

    Args:
      module: module of the function.
      name: name of the function, which takes no argument.
      programs: number of programs in one context.
    """
    try:
        make = getattr(importlib.import_module(module), name)
        parameters = inspect.signature(make).parameters
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        changed = str(error)
    else:
        if not parameters:
            setattr(importlib.import_module(module), name, _Contexts(make, programs).context)
            return
        changed = f"it takes {', '.join(parameters)}"
    warnings.warn(
        f"{module}.{name} is not the function that tests/mlir_contexts.py replaces ({changed}), so every program has a "
        "context of its own; the tests take longer and check the same",
        stacklevel=2,
    )
