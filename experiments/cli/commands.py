"""Run a study's command line: errors as one line, exit statuses, options in groups, recorded settings."""

import argparse
import contextlib
import dataclasses
import functools
import inspect
import io
import math
import sys
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal, TypeVar

import tyro

from experiments.cli.refusals import UsageError, cause, explain
from experiments.storage.files import JSON
from jprune.cli import end_quietly, wrapped

_Settings = TypeVar("_Settings")
Action = Literal["run", "status", "report"]
_LEAST_HOURS = 0.05


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """Folders of the results and the data, which do not change the numbers."""

    out: Path | None = None
    """Folder of the results; runs/PRESET by default."""
    data_dir: Path | None = None
    """Folder of prepared TensorFlow Datasets; ~/tensorflow_datasets by default."""
    checkpoint_minutes: float = 5.0
    """Minutes between checkpoints within a stage, from which a killed run resumes; 0: a checkpoint after every
    epoch."""

    def __post_init__(self):
        """Validate the options."""
        if not self.checkpoint_minutes >= 0:
            raise ValueError(f"checkpoint_minutes={self.checkpoint_minutes} must be at least 0")


@dataclasses.dataclass(frozen=True)
class ClusterOptions:
    """Several processes, machines or jobs; docs/how-to/run-on-a-cluster.md has a command for each case."""

    shard: str | None = None
    """i/n: compute the i-th (from 0) of n equal parts. By default everything, or, in a Slurm array, the part
    of this task."""
    coordinator: str | None = None
    """HOST:PORT of process 0, if several processes form one program. JAX detects it under Slurm, Open MPI 4 and
    Kubernetes and on TPU pods, and with mpi4py under every MPI."""
    process_id: int | None = None
    """Number of this process, counted from 0. By default the launcher's: Slurm, MPI, torchrun."""
    num_processes: int | None = None
    """Number of processes. By default the launcher's."""
    launch: Literal["slurm", "local"] | None = None
    """Submit one job for each part instead of computing here: slurm as a job array, local as processes of this
    machine. Needs the extra 'cluster'."""
    jobs: int = 1
    """With --launch: number of jobs, each of which computes an equal part."""
    partition: str | None = None
    """With --launch slurm: the Slurm partition."""
    gpus: int = 0
    """With --launch: GPUs per job; different ones for each local job."""
    cpus: int = 4
    """With --launch slurm: CPU cores per job."""
    hours: float = 24
    """With --launch: time limit per job. A job that reaches it is requeued and resumes."""

    def __post_init__(self):
        """Validate the options."""
        check_at_least(self, jobs=1)
        if not self.hours > 0:
            raise ValueError(f"hours={self.hours} must be positive")
        if self.launch == "slurm" and self.hours < _LEAST_HOURS:
            raise ValueError(
                f"hours={self.hours} must be at least {_LEAST_HOURS} with --launch slurm: Slurm announces the end up "
                "to 150 seconds earlier, and a job must have started by then"
            )
        for name in () if self.launch else ("jobs", "partition", "gpus", "cpus", "hours"):
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(
                    f"{name}={getattr(self, name)!r} has no effect without --launch; add --launch slurm or local"
                )
        for name in ("partition", "cpus") if self.launch == "local" else ():
            if getattr(self, name) != getattr(type(self), name):
                raise ValueError(f"{name}={getattr(self, name)!r} has no effect with --launch local; remove it")
        if self.shard and self.coordinator:
            raise ValueError(
                f"shard={self.shard!r} cannot be combined with coordinator={self.coordinator!r}: the processes of one "
                "program divide the work themselves; remove one of the two"
            )
        if self.launch and (self.shard or self.coordinator):
            raise ValueError(
                f"launch={self.launch!r} divides the study into --jobs parts itself; remove --shard and --coordinator"
            )


def check_at_least(settings: object, **least: float) -> None:
    """Raise if an option is smaller than its least value, infinite or NaN; None is allowed.

    Raises:
      ValueError: the message has the option, its value and the least one.

    >>> check_at_least(argparse.Namespace(jobs=0), jobs=1)
    Traceback (most recent call last):
    ...
    ValueError: jobs=0 must be at least 1
    """
    for name, smallest in least.items():
        value = getattr(settings, name)
        if value is None:
            continue
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite")
        if value < smallest:
            raise ValueError(f"{name}={value} must be at least {smallest}")
        if name == "seed" and value >= 2**32:  # jax ignores higher bits
            raise ValueError(f"seed={value} must be below 2^32")


def check_kinds(settings: object) -> None:
    """Raise if a field of several values has one alone, or a value is not among those of a Literal type.

    A command line is checked by tyro; settings made in Python are not.

    Raises:
      ValueError: the message has the field, its value and what is allowed.

    >>> check_kinds(ClusterOptions(launch="pbs"))
    Traceback (most recent call last):
    ...
    ValueError: launch='pbs' must be one of 'slurm', 'local'
    """
    for name, kind in typing.get_type_hints(type(settings)).items():
        value, several = getattr(settings, name), typing.get_origin(kind) is tuple
        if several and not isinstance(value, tuple | list):
            raise ValueError(f"{name}={value!r} must be a tuple, such as ({value!r},)")
        for part in (kind, *typing.get_args(kind)):
            allowed = typing.get_args(part)
            unknown = [one for one in (value if several else (value,)) if one is not None and one not in allowed]
            if typing.get_origin(part) is Literal and unknown:
                raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, allowed))}")


def exit_status(work: Callable[[], None]) -> int:
    """Do the work of a command. Returns 0, 1 after an error, 2 after wrong arguments, or 130 after an interrupt.

    An error is printed as one line.
    """
    try:
        return quietly(work)
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; rerun the same command to resume", file=sys.stderr)
        return 130


def quietly(work: Callable[[], None]) -> int:
    """Do the work of a command and flush its output. Returns 0, or 1 if the reader is gone (``| head``)."""
    try:
        try:
            work()
        except SystemExit:  # from --help or a wrong option; its output may still be buffered
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except BrokenPipeError:
        return end_quietly()
    return 0


def first_look(arguments: Sequence[str] | None, preset: str) -> tuple[str, Path | None, set[str]]:
    """Read --preset and --out, which decide the defaults of all other options; also the actions that are given."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default=preset, nargs="?", const=preset)
    first.add_argument("--out", type=Path, nargs="?")  # tyro refuses an option without its value
    known, rest = first.parse_known_args(arguments)
    return known.preset, known.out, {"run", "status", "report"} & set(rest)


def parse(command: type[_Settings], default: _Settings, arguments: Sequence[str] | None, prog: str) -> _Settings:
    """Read the options of a command whose fields are groups of options.

    Args:
      command: a dataclass; a field that is a dataclass becomes a group in ``--help``.
      default: the values of the options that are not given.
      arguments: of the command line; None for those of this process.
      prog: the command's name.

    Raises:
      UsageError: an unknown option, a value of the wrong type, or options that contradict each other.
      SystemExit: after ``--help``.
    """
    given = sys.argv[1:] if arguments is None else arguments
    read = functools.partial(tyro.cli, command, args=arguments, default=default, prog=prog)
    if {"-h", "--help"} & set(given):
        _simplify_help(command)
        _print_help(functools.partial(read, config=(tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)))
    if any(one == "" or one.endswith("=") for one in given) and (
        shown := explain(command, given)
    ):  # an empty path would be the current folder
        raise UsageError(shown)
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            return read(config=(tyro.conf.OmitArgPrefixes,))
    except SystemExit as refused:
        shown = explain(command, given) or cause(refused) or " ".join(printed.getvalue().split())
        raise UsageError(shown) from refused


def _print_help(read: Callable[[], object]) -> None:
    """Wrap the usage and the description, which tyro prints with a line for each paragraph."""
    printed = io.TextIOWrapper(io.BytesIO(), encoding=sys.stdout.encoding, write_through=True)
    try:
        with contextlib.redirect_stdout(printed):
            read()
    finally:
        printed.seek(0)
        usage, blank, rest = printed.read().partition("\n\n")
        description, box, options = rest.partition("╭")
        indented = wrapped(usage).replace("\n", f"\n{'':7}")
        print(indented + blank + "\n".join([wrapped(description), box + options]) if blank else usage, end="")


def _simplify_help(command: type) -> None:
    """Remove the line breaks of the source, and defaults that say nothing, from the help of every option.

    tyro keeps both. It reads the description from a field's metadata and the rest from the annotations.
    """
    import docstring_parser  # noqa: PLC0415 a requirement of tyro, which loads it for --help alone

    documented: dict[str, str] = {}
    for cls in reversed(command.__mro__[:-1]):
        parameters = docstring_parser.parse_from_object(cls).params
        documented |= {one.arg_name: one.description for one in parameters if one.description}
        for name, annotation in inspect.get_annotations(cls).items():
            settings = getattr(annotation, "__metadata__", ())  # later ones replace earlier ones
            if not dataclasses.is_dataclass(annotation) and _DEFAULT not in settings:
                plain = typing.get_args(annotation)[0] if settings else annotation
                cls.__annotations__[name] = Annotated[(plain, _DEFAULT, *settings)]
    for field in dataclasses.fields(command):
        if field.name in documented:
            field.metadata = MappingProxyType({**field.metadata, "help": " ".join(documented[field.name].split())})
        elif isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            _simplify_help(field.type)


def _default_in_words(default: str) -> str:
    """The end of an option's help.

    >>> [_default_in_words(default) for default in ("30", "None", "")]
    ['(default: 30)', '(optional)', '(optional)']
    """
    return "(optional)" if default in ("None", "") else f"(default: {default})"


_DEFAULT = tyro.conf.arg(help_behavior_hint=_default_in_words)


def group(cls: type[_Settings], settings: object) -> _Settings:
    """The fields of a group, taken from settings that have all of them.

    >>> group(RunOptions, argparse.Namespace(out=None, data_dir=None, checkpoint_minutes=5.0, shard="0/1"))
    RunOptions(out=None, data_dir=None, checkpoint_minutes=5.0)
    """
    return cls(**{field.name: getattr(settings, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def joined(cls: type[_Settings], *groups: object) -> _Settings:
    """Settings made of the fields of several groups."""
    values = {field.name: getattr(part, field.name) for part in groups for field in dataclasses.fields(part)}
    return cls(**values)


def to_json(settings: object) -> dict[str, JSON]:
    """A dataclass as JSON; paths become strings and tuples lists."""

    def plain(value: object) -> JSON:
        if isinstance(value, Path):
            return str(value)
        return [plain(one) for one in value] if isinstance(value, tuple) else value

    return {field.name: plain(getattr(settings, field.name)) for field in dataclasses.fields(settings)}


def from_json(cls: type[_Settings], values: Mapping[str, JSON], paths: Sequence[str] = ()) -> _Settings:
    """Undo ``to_json``. Fields that the dataclass no longer has are ignored.

    Args:
      cls: the dataclass.
      values: its fields.
      paths: names of the fields that are paths.

    >>> from_json(RunOptions, {"out": "runs/demo", "action": "run"}, ("out",)).out.name
    'demo'
    """

    def restored(name: str, value: object) -> JSON:
        if isinstance(value, list):
            return tuple(Path(one) if name in paths else one for one in value)
        return Path(value) if name in paths and value is not None else value

    known = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    return cls(**{name: restored(name, value) for name, value in values.items() if name in known})


def differences(settings: Sequence[object]) -> list[str]:
    """For each of several settings, the options in which they differ: ``, NAME VALUE`` for each.

    >>> differences([RunOptions(checkpoint_minutes=1), RunOptions(checkpoint_minutes=2)])
    [', checkpoint_minutes 1', ', checkpoint_minutes 2']
    """
    names = [field.name for field in dataclasses.fields(settings[0])]
    differing = [name for name in names if any(getattr(one, name) != getattr(settings[0], name) for one in settings)]
    return ["".join(f", {name} {getattr(one, name)}" for name in differing) for one in settings]


Positional = Annotated[Action, tyro.conf.Positional]
Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff, tyro.conf.arg(help_behavior_hint="(optional)")]
