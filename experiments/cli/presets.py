"""Presets: named settings. Each is made by a function whose docstring has the command, cost and expected results."""

import inspect
import textwrap
from collections.abc import Callable
from typing import Generic, TypeVar

_Settings = TypeVar("_Settings")


class Presets(Generic[_Settings]):
    """Functions that return settings, each registered under its name with hyphens."""

    def __init__(self) -> None:
        self._makers: dict[str, Callable[[], _Settings]] = {}
        self._descriptions: dict[str, str] = {}

    def preset(self, make: Callable[[], _Settings]) -> Callable[[], _Settings]:
        """Register a preset under the name of its function, as a decorator.

        Raises:
          ValueError: the name is taken.
        """
        self.add(make.__name__.replace("_", "-"), make, inspect.getdoc(make) or "")
        return make

    def add(self, name: str, make: Callable[[], _Settings], description: str) -> None:
        """Register a preset under a name.

        Raises:
          ValueError: the name is taken.
        """
        if name in self._makers:
            raise ValueError(f"preset {name!r} is already registered")
        self._makers[name], self._descriptions[name] = make, description

    def names(self) -> list[str]:
        """The names of the presets."""
        return list(self._makers)

    def get(self, name: str) -> _Settings:
        """Return the settings of a preset.

        Raises:
          ValueError: no preset has this name.
        """
        if name not in self._makers:
            raise ValueError(f"preset={name!r} is unknown; known: {', '.join(self._makers)}")
        return self._makers[name]()

    def describe(self, name: str) -> str:
        """Return the description of a preset: its command, cost and expected results.

        Raises:
          KeyError: no preset has this name.
        """
        return self._descriptions[name]

    def listing(self) -> str:
        """List every preset with its description."""
        return "\n\n".join(f"{name}\n{textwrap.indent(self.describe(name), '  ')}" for name in self._makers)
