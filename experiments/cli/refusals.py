"""Explain in one sentence why the arguments of a command line were refused."""

import dataclasses
import difflib
import re
import shlex
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import tyro

_WORDS = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), Path: ("a path", "paths")}


class UsageError(ValueError):
    """Arguments that cannot be read: an unknown option, or a value of the wrong type."""


class _Values(NamedTuple):
    """The values that an option accepts.

    Attributes:
      kind: type of each value.
      count: number of values, 0 for a flag; None for any number.
      nullable: whether the option may be None.
    """

    kind: object
    count: int | None
    nullable: bool = False

    def reads(self, value: str) -> bool:
        """Whether a text is a value of this type."""
        if value == "None" and self.nullable:
            return True
        if typing.get_origin(self.kind) is Literal:
            return value in typing.get_args(self.kind)
        if self.kind is Path:
            return value != ""
        try:
            if self.kind in (int, float):
                self.kind(value)
        except ValueError:
            return False
        return True

    def words(self) -> str:
        """The values in words.

        >>> _Values(Literal["scan", "steps"], 1).words(), _Values(float, None).words(), _Values(int, 2).words()
        ('scan or steps', 'numbers, separated by spaces', '2 whole numbers, separated by spaces')
        """
        if typing.get_origin(self.kind) is Literal:
            *most, last = typing.get_args(self.kind)
            return f"{'' if self.count == 1 else 'one or more of '}{', '.join(most)} or {last}"
        singular, plural = _WORDS.get(self.kind, ("a string", "strings"))
        if self.count == 1:
            return singular
        return f"{'' if self.count is None else f'{self.count} '}{plural}, separated by spaces"


def explain(command: type, arguments: Sequence[str]) -> str | None:
    """Return what is wrong with the first argument that a command does not accept; None if nothing is found.

    Args:
      command: a dataclass of options; a field that is a dataclass is a group of them.
      arguments: of the command line.

    >>> Options = dataclasses.make_dataclass("Options", [("epochs", tuple[int, ...]), ("quiet", bool)])
    >>> explain(Options, ["--epochs", "2", "abc"])
    "--epochs 2 abc: 'abc' is not a whole number; give whole numbers, separated by spaces"
    >>> explain(Options, ["--epohcs", "2"])
    '--epohcs is not an option; did you mean --epochs? --help lists the options'
    """
    options = dict(_options(command))
    action, actions = options.pop("", None), 0
    for name, values in _grouped(arguments):
        if name not in options and name:
            close = difflib.get_close_matches(name, options, n=1, cutoff=0.7)
            return (
                f"{name} is not an option;{''.join(f' did you mean {one}?' for one in close)} --help lists the options"
            )
        count = options[name].count if name else 0
        own = values[:count]
        if name and (wrong := _wrong(options[name], own)):
            misplaced = [value for value in own if action and action.reads(value)]
            advice = f". Put {misplaced[0]} before the options" if misplaced else ""
            return f"{shlex.join([name, *own])}: {wrong}{advice}"
        for value in values[len(own) :]:
            takes = f"; {name} takes {count or 'no'} value{'s' * (count > 1)}" if name else ""
            if action is None:
                return f"{value!r} is not an option{takes}; --help lists the options"
            if not action.reads(value):
                return f"{value!r} is not an action, which is {action.words()}{takes}"
            actions += 1
            if actions > 1:
                return f"{value!r} is a second action; give one"
    return None


def cause(refused: BaseException) -> str | None:
    """Return the message of the ValueError that led to an exception, as from the options of a group; None without one.

    >>> try:
    ...     try:
    ...         raise ValueError("chunk=0 must be at least 1")
    ...     except ValueError:
    ...         raise SystemExit(2)
    ... except SystemExit as refused:
    ...     cause(refused)
    'chunk=0 must be at least 1'
    """
    before: BaseException | None = refused
    while before is not None and not isinstance(before, ValueError):
        before = before.__cause__ or before.__context__
    return None if before is None else str(before)


def _grouped(arguments: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Each option with the values that follow it; the first group has an empty name."""
    groups: list[tuple[str, list[str]]] = [("", [])]
    for argument in arguments:
        if re.match(r"--?[a-zA-Z]", argument):
            name, equals, value = argument.partition("=")
            groups.append((name.replace("_", "-"), [value] if equals else []))
        else:
            groups[-1][1].append(argument)
    return groups


def _options(command: type) -> Iterator[tuple[str, _Values]]:
    """The name of every option and what it accepts; the positional argument has an empty name."""
    hints = typing.get_type_hints(command, include_extras=True)
    for field in dataclasses.fields(command):
        kind, settings = hints[field.name], ()
        if typing.get_origin(kind) is Annotated:
            kind, *settings = typing.get_args(kind)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            yield from _options(kind)
            continue
        values = _values(kind)
        name = f"--{field.name.replace('_', '-')}"
        yield "" if tyro.conf.Positional in settings else name, values
        for one in settings:
            yield from ((alias, values) for alias in getattr(one, "aliases", None) or ())
        if values.count == 0 and tyro.conf.FlagCreatePairsOff not in settings:
            yield f"--no-{name[2:]}", values


def _values(kind: object) -> _Values:
    """What an option of this type accepts."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        some = next(part for part in typing.get_args(kind) if part is not type(None))
        return _values(some)._replace(nullable=True)
    if typing.get_origin(kind) is tuple:
        parts = typing.get_args(kind)
        return _Values(parts[0], None if parts[-1] is ... else len(parts))
    return _Values(kind, 0 if kind is bool else 1)


def _wrong(values: _Values, given: Sequence[str]) -> str:
    """What is wrong with the values of an option; empty if nothing is."""
    for value in given:
        if not values.reads(value) and values.kind in _WORDS:
            return f"{value!r} is not {_WORDS[values.kind][0]}; give {'one' if values.count == 1 else values.words()}"
        if not values.reads(value):
            return f"{value!r} must be {values._replace(count=1).words()}"
    if (given == ["None"] and values.nullable) or values.count is None or len(given) == values.count:
        return ""
    return f"{len(given) or 'no'} value; give {values.words()}"
