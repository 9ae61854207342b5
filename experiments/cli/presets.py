"""Presets: named settings. Each is made by a function whose docstring has the command, cost and expected results."""

import functools
import inspect
import re
import shutil
import textwrap
from collections.abc import Callable
from typing import Generic, TypeVar

_Settings = TypeVar("_Settings")
_LABEL = r"[A-Z][^.:\n]{0,30}: "  # as in "Cost: 90 networks."


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

    def listing(self, columns: int | None = None) -> str:
        """List every preset with its description.

        Args:
          columns: the length of a line; by default that of the terminal, at most 100.
        """
        width = columns or min(shutil.get_terminal_size().columns - 2, 100)
        return "\n\n".join(f"{name}\n{_wrapped(self.describe(name), width)}" for name in self._makers)


def _wrapped(description: str, width: int) -> str:
    r"""Wrap a description to lines of this length; each label, such as ``Cost:``, starts a line.

    >>> print(_wrapped("Small\nnetworks.\n\nCost: an hour\nor two.\nCommand: make a demo", 16))
      Small
      networks.
    <BLANKLINE>
      Cost: an hour
        or two.
      Command: \
        make a \
        demo
    """
    title, *paragraphs = description.split("\n\n")
    wrapped = [_filled(title, width, "  ")]
    for paragraph in paragraphs:
        parts = re.split(rf"\n(?={_LABEL})", paragraph)
        wrapped.append("\n".join(_filled(part, width, "    " if re.match(_LABEL, part) else "  ") for part in parts))
    return "\n\n".join(wrapped)


def _filled(text: str, width: int, indent: str) -> str:
    """Wrap a paragraph; the lines of a command end in a backslash, and an option stays with its value."""
    text = " ".join(text.split())
    wrap = functools.partial(
        textwrap.wrap, initial_indent="  ", subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
    )
    if not text.startswith("Command:"):
        return "\n".join(wrap(text, width))
    unbroken = re.sub(r"(?<= )(-\S+) (?=[^-])", "\\1\N{NO-BREAK SPACE}", text)
    return " \\\n".join(wrap(unbroken, width - 2)).replace("\N{NO-BREAK SPACE}", " ")
