"""Settings by name. What the names are and what they stand for is in the two modules of presets."""

import dataclasses
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, Generic, TypeVar

_Settings = TypeVar("_Settings")


class Registry(Generic[_Settings]):
    """Functions that make settings, each under its own name, with hyphens; the settings have a field ``preset``."""

    def __init__(self) -> None:
        self._makers: dict[str, Callable[[], Any]] = {}

    def preset(self, make: Callable[[], _Settings]) -> Callable[[], _Settings]:
        """Register a preset under the name of its function; a decorator.

        Raises:
          ValueError: the name is taken.
        """
        name = make.__name__.replace("_", "-")
        if name in self._makers:
            raise ValueError(f"preset {name!r} is already registered")
        self._makers[name] = make
        return make

    def names(self) -> list[str]:
        """The names of the presets."""
        return list(self._makers)

    def get(self, name: str) -> _Settings:
        """The settings of a preset.

        Raises:
          ValueError: no preset has this name.
        """
        if name not in self._makers:
            raise ValueError(f"preset={name!r} is unknown; known: {', '.join(self._makers)}")
        settings: _Settings = dataclasses.replace(self._makers[name](), preset=name)
        return settings

    def describe(self, name: str) -> str:
        """What a preset is, its command, its cost, and the numbers to expect: its docstring.

        Raises:
          KeyError: no preset has this name.
        """
        return inspect.getdoc(self._makers[name]) or ""

    def listing(self) -> str:
        """Every preset with its description."""
        return "\n\n".join(f"{name}\n{textwrap.indent(self.describe(name), '  ')}" for name in self._makers)
