"""The command line: ``jprune audit``, for the predictions of any framework.

Options are parsed here, files are read in ``jprune.recall.inputs.files``, and the audit is ``jprune.recall.audit``.
jax, pandas and matplotlib are imported after the options are parsed, so that help and usage errors are immediate.
"""

import argparse
import contextlib
import io
import itertools
import os
import re
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from jprune._extras import missing
from jprune._version import __version__

if TYPE_CHECKING:
    from jprune.recall.audit import Audit
    from jprune.recall.inputs.prepare import Prepared

_DESCRIPTION = """\
Measure how compression changes the recall of each class, from the predictions of any framework.

Give the labels of a test set, the predictions of dense models, and the predictions of the same models after pruning at
one or more compression ratios:

  jprune audit --labels labels.csv --dense dense.npz \\
      --pruned 2=p2.npz --pruned 10=p10.npz --out report.html

or, for models that were quantized, distilled or changed in another way, by name:

  jprune audit --labels labels.csv --dense dense.npz \\
      --compare int8=int8.npz --out report.html
"""
_EPILOG = """\
FILES are .npy, .npz, .csv, .tsv, .json, .jsonl (also compressed, as in .csv.gz) or .parquet; PATH:NAME picks one array
of an .npz, one column of a table or one key of JSON. Classes are whole numbers: an array (models, examples) or
(examples,), or a table with a row per example and a column per model. Logits are floats: an array (models, examples,
classes) or (examples, classes), or a table with a row per example and a column per class; the largest is the
prediction. Text is a class name; without --class-names the names in the data are sorted. Tables may be separated by
commas, semicolons, tabs or vertical bars. Pickles are never loaded.

ROWS must be in the order of the labels, unless --id names a column that identifies the examples.

MODELS are paired by index: model 3 of a --pruned file was pruned from model 3 of --dense. Columns of the same names
are paired by name. If a ratio is given twice, the models of both files are used. Ratio 1 is the control, fine-tuned for
as long but not pruned; with it the audit separates pruning from fine-tuning. To compare pruning scores, name them:
--pruned magnitude:2=m2.npz --pruned random:2=r2.npz.

Without --out, --csv and --json a summary is printed and nothing is written. Exit status 2 means that an input cannot be
used and nothing was written.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      arguments: the arguments after ``jprune``; by default those of the process.

    Returns:
      0; 1 if the reader of standard output closed it; 2 if the arguments or a file cannot be used or standard output
      cannot be written, with the reason on standard error.

    >>> main(["--version"])
    jprune ...
    0
    """
    try:
        status = _status(list(sys.argv[1:] if arguments is None else arguments))
        if sys.stdout is not None:  # it is None where the caller closed it (>&-)
            sys.stdout.flush()
    except BrokenPipeError:
        return end_quietly()
    except OSError as error:  # the disk under standard output is full
        end_quietly()
        return _fail(f"standard output could not be written: {error}")
    return status


def end_quietly() -> int:
    """Discard pending output after the reader closed the pipe (``| head``); return the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def wrapped(text: str, columns: int | None = None) -> str:
    r"""Wrap the paragraphs of a help text; indented lines stay as they are.

    Args:
      text: paragraphs, separated by empty or indented lines.
      columns: the length of a line; by default that of the terminal, at most 100.

    >>> print(wrapped("One option\nis needed.\n\n  jprune audit --labels y.npy", columns=18))
    One option is
    needed.
    <BLANKLINE>
      jprune audit --labels y.npy
    """
    width = columns or min(max(shutil.get_terminal_size().columns - 2, 1), 100)
    lines: list[str] = []
    for prose, block in itertools.groupby(text.splitlines(), key=lambda line: line[:1].strip() != ""):
        part = list(block)
        lines += textwrap.wrap(" ".join(part), width, break_on_hyphens=False) if prose else part
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the options of ``jprune``."""
    whole = argparse.ArgumentParser(
        prog="jprune", description="Per-class audits of compressed models. Examples: jprune audit --help."
    )
    whole.add_argument("--version", action="store_true", help="print the version")
    commands = whole.add_subparsers(dest="command", metavar="COMMAND")
    audit = commands.add_parser(
        "audit",
        help="measure how compression changes the recall of each class",
        description=wrapped(_DESCRIPTION),
        epilog=wrapped(_EPILOG),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = audit.add_argument
    add("--labels", metavar="FILE", required=True, help="true classes, one per example")
    add(
        "--dense", metavar="[SCORE=]FILE", action="append", default=[],
        help="predictions of the dense models (required); repeat it to add models. SCORE=: only for this score",
    )  # fmt: skip
    add(
        "--pruned", metavar="[SCORE:]RATIO=FILE", action="append", default=[],
        help="predictions of models pruned at a compression ratio (parameters before / after); repeat for each ratio",
    )  # fmt: skip
    add(
        "--compare", metavar="NAME=FILE", action="append", default=[],
        help="predictions of models changed in any way, by name instead of by ratio; repeat for each name",
    )  # fmt: skip
    add("--out", metavar="FILE.html", type=Path, help="write the report, one self-contained HTML page")
    add("--csv", metavar="FOLDER", type=Path, help="write every table into this folder, as CSV")
    add("--json", action="store_true", help="print everything as JSON, and nothing else, on standard output")
    add(
        "--class-names", metavar="A,B,...|FILE.txt",
        help="names of the classes, in order: separated by commas, or a text file with one per line",
    )  # fmt: skip
    add(
        "--num-classes",
        metavar="INT",
        type=int,
        help="number of classes, if names, logits and labels do not determine it",
    )
    add("--id", metavar="COLUMN", help="join labels, predictions and groups by this column (of .npz files, this array)")
    add("--ignore-label", metavar="INT", type=int, help="leave out examples with this label, for example -1")
    add(
        "--threshold",
        metavar="P",
        type=float,
        help="for one sigmoid output per example: the smallest probability that means class 1",
    )
    add(
        "--groups", metavar="FILE", action="append", default=[],
        help="attributes of the examples, for recalls within groups: columns of a table or arrays of an .npz",
    )  # fmt: skip
    add("--images", metavar="FILE", help="the test images (.npy, .npz), to show examples that changed in the report")
    add("--unpaired", action="store_true", help="models are not paired; the numbers of models may differ")
    add(
        "--level",
        type=float,
        default=0.99,
        help="confidence level of each interval (default 0.99: five intervals jointly have 0.95)",
    )
    add(
        "--margin", type=float, default=0.1,
        help="corrected alpha counts as 1 only if its interval lies between 1/(1+margin) and 1+margin (default 0.1)",
    )  # fmt: skip
    add("--top-k", metavar="K", type=int, help="k of the top-k recall, with logits (default 5, or classes minus one)")
    add(
        "--resamples",
        type=int,
        default=1000,
        help="number of random pairings in the test of whether models are paired (default 1000); 0: no test",
    )
    add("--seed", type=int, default=0, help="seed of the random pairings (default 0)")
    add("--title", default="Recall audit", help="heading of the report (default: Recall audit)")
    add(
        "--date",
        metavar="TEXT",
        help="date in the report's footer; by default none, so that the same input gives the same file",
    )
    return whole


def _status(given: list[str]) -> int:
    """Run a command and return its exit status; print errors on standard error."""
    options = parser()
    try:
        parsed, surplus = options.parse_known_args(given)
        if surplus:
            options.error(f"unrecognized arguments: {' '.join(surplus)}{_repeated(surplus)}")
    except SystemExit as stop:
        return int(stop.code or 0)
    if parsed.version:
        print(f"jprune {__version__}")
        return 0
    if parsed.command is None:
        options.print_help(sys.stderr)
        return 2
    try:
        from jprune.recall.inputs.raw import InputError  # noqa: PLC0415
    except ImportError as error:
        return _fail(f"{missing('the command line needs an extra', 'report')} ({error})")
    try:
        _run(parsed)
    except BrokenPipeError:
        raise
    except (InputError, OSError, ImportError) as error:
        return _fail(str(error))
    return 0


def _repeated(surplus: Sequence[str]) -> str:
    """Return advice for further files after an option that takes one."""
    files = [text for text in surplus if not text.startswith("-")]
    return "; an option takes one value, repeat it for each: --dense a.npy --dense b.npy" if files else ""


def _run(options: argparse.Namespace) -> None:
    """Read all files, audit, and only then write."""
    from jprune.files import write_text  # noqa: PLC0415
    from jprune.recall.inputs.arguments import EmptyClassWarning  # noqa: PLC0415
    from jprune.recall.inputs.files import read_images  # noqa: PLC0415

    _check(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmptyClassWarning)  # the audit reports it among its own warnings
        audit, prepared = _audit(options)
    html = ""
    if options.out is not None:
        from jprune.recall.report.page import page  # noqa: PLC0415

        with _reading("--images"):
            images = None if options.images is None else read_images(options.images)
        if images is not None and prepared.kept is not None and len(images) == len(prepared.kept):
            images = images[prepared.kept]
        html = page(audit, images=images, title=options.title, date=options.date)
    if options.out is not None:
        write_text(options.out, html)
    if options.csv is not None:
        audit.to_csv(options.csv)
    if options.json:
        _printable("utf-8")
        sys.stdout.write(audit.to_json())
    else:
        _printable()
        from jprune.recall.report.terminal import print_summary  # noqa: PLC0415

        print_summary(audit, options.out)


def _printable(encoding: str | None = None) -> None:
    """Let standard output take every character of a name, whatever the encoding of the terminal."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(encoding=encoding, errors="backslashreplace")


def _check(options: argparse.Namespace) -> None:
    """Validate options before reading files."""
    from jprune.recall.inputs.raw import InputError  # noqa: PLC0415

    if not options.dense:
        raise InputError("--dense is needed; jprune audit --help shows an example")
    if not options.pruned and not options.compare:
        raise InputError("--pruned or --compare is needed; jprune audit --help shows an example")
    if options.pruned and options.compare:
        raise InputError("give --pruned (with ratios) or --compare (with names), not both")
    if options.images is not None and options.out is None:
        raise InputError("--images are shown only in the report; add --out FILE.html")
    for name, target in (("--out", options.out), ("--csv", options.csv)):
        if target is None:
            continue
        if not target.parent.is_dir():
            raise InputError(f"{name} {target}: the folder {target.parent} does not exist; create it or name another")
        folder = target if target.is_dir() else target.parent
        if not os.access(folder, os.W_OK):
            raise InputError(f"{name} {target}: no permission to write into the folder {folder}; name another")
    if options.out is not None and options.out.is_dir():
        raise InputError(f"--out {options.out} is a folder; give the report a file name")
    if options.csv is not None and options.csv.exists() and not options.csv.is_dir():
        raise InputError(f"--csv {options.csv} is not a folder; name a folder for the tables")
    _check_numbers(options)


def _check_numbers(options: argparse.Namespace) -> None:
    from jprune.recall.inputs import arguments  # noqa: PLC0415
    from jprune.recall.inputs.raw import InputError  # noqa: PLC0415

    if options.seed < 0:
        raise InputError(f"--seed must be 0 or more, got {options.seed}")
    try:
        arguments.check_threshold(options.threshold)
        arguments.check_level(options.level)
        arguments.check_margin(options.margin)
        arguments.check_top_k(options.top_k)
        if options.resamples != 0:
            arguments.check_resamples(options.resamples)
    except ValueError as error:
        raise InputError(f"--{error}".replace("top_k", "top-k")) from error


def _audit(options: argparse.Namespace) -> "tuple[Audit, Prepared]":
    """Read the files and audit them; return the audit and the inputs."""
    from jprune.recall.audit import Options, audit_prepared  # noqa: PLC0415
    from jprune.recall.inputs import files, predictions  # noqa: PLC0415
    from jprune.recall.inputs.prepare import prepare  # noqa: PLC0415

    names = None
    if options.class_names is not None:
        with _reading("--class-names"):
            names = files.read_class_names(options.class_names)
            predictions.names_of_classes(names, len(names))
    with _reading("--labels"):
        labels = files.read_labels(options.labels, names, options.id)
    compressed = _by_score(options.pruned) if options.pruned else _by_name(options.compare)
    dense = _dense(options.dense, list(compressed))
    sets = {", ".join(given): given for given in dense.values()}
    sets |= {", ".join(given): given for ratios in compressed.values() for given in ratios.values()}
    examples = max(labels.values.shape, default=0)
    read = {}
    for name, given in sets.items():
        for file in given:
            with _reading(_option_of(name, dense, options)):
                read[file] = files.read_predictions(file, examples, names, options.id)
    prepared = prepare(
        labels,
        {name: [read[file] for file in given] for name, given in sets.items()},
        _groups(options),
        class_names=names,
        ignore_label=options.ignore_label,
        threshold=options.threshold,
    )
    audit = audit_prepared(
        prepared,
        {score: ", ".join(given) for score, given in dense.items()},
        {s: {ratio: ", ".join(given) for ratio, given in ratios.items()} for s, ratios in compressed.items()},
        Options(
            num_classes=options.num_classes,
            paired=not options.unpaired,
            level=options.level,
            margin=options.margin,
            rng=options.seed if options.resamples else None,
            resamples=options.resamples,
            top_k=options.top_k,
            named=bool(options.compare),
        ),
        labels_name=options.labels,
    )
    return audit, prepared


def _groups(options: argparse.Namespace) -> dict[str, object]:
    """Read the attributes of all group files, by name."""
    from jprune.recall.inputs.files import read_groups  # noqa: PLC0415
    from jprune.recall.inputs.raw import InputError  # noqa: PLC0415

    groups: dict[str, object] = {}
    for file in options.groups:
        with _reading("--groups"):
            found = read_groups(file, options.id)
        repeated = sorted(groups.keys() & found.keys())
        if repeated:
            raise InputError(
                f"--groups {file} has the attribute {repeated[0]!r}, which an earlier file has too; rename one of them"
            )
        groups |= found
    return groups


@contextlib.contextmanager
def _reading(option: str) -> Iterator[None]:
    """Add the option to errors about its file."""
    from jprune.recall.inputs.raw import InputError  # noqa: PLC0415

    try:
        yield
    except InputError as error:
        raise InputError(f"{option}: {error}") from error


def _option_of(name: str, dense: Mapping[str, Sequence[str]], options: argparse.Namespace) -> str:
    """Return the option that gave a set of models."""
    if name in {", ".join(given) for given in dense.values()}:
        return "--dense"
    return "--pruned" if options.pruned else "--compare"


def _by_score(given: Sequence[str]) -> dict[str, dict[float, list[str]]]:
    """Sort ``[SCORE:]RATIO=FILE`` by score and ratio; naming a ratio again adds a file to it."""
    from jprune.recall.inputs.predictions import by_score  # noqa: PLC0415
    from jprune.recall.inputs.raw import InputError  # noqa: PLC0415

    found: dict[str | None, dict[float, list[str]]] = {}
    for text in given:
        key, _, file = text.partition("=")
        score, colon, ratio = key.rpartition(":")
        if not file or not re.fullmatch(r"\s*[\d.]+(e\d+)?\s*", ratio):
            raise InputError(
                f"--pruned must be [SCORE:]RATIO=FILE, for example 10=p10.npz, got {text!r}; for models without a "
                "ratio use --compare NAME=FILE"
            )
        try:
            number = float(ratio)
        except ValueError as error:
            raise InputError(f"--pruned {text}: the ratio {ratio!r} is not a number") from error
        found.setdefault(score if colon else None, {}).setdefault(number, []).append(file)
    if None in found and len(found) > 1:
        raise InputError(
            "--pruned: name a score for every file (SCORE:RATIO=FILE) or leave it out everywhere (RATIO=FILE)"
        )
    nested = found.get(None, found)
    return {
        score: {ratio: cast(list[str], files) for ratio, (_, files) in ratios.items()}
        for score, ratios in by_score(nested, "--pruned").items()
    }


def _by_name(given: Sequence[str]) -> dict[str, dict[float, list[str]]]:
    """Sort ``NAME=FILE`` by name; naming a name again adds a file to it."""
    from jprune.recall.inputs.raw import InputError  # noqa: PLC0415
    from jprune.recall.tables.frames import UNSTATED  # noqa: PLC0415

    found: dict[str, dict[float, list[str]]] = {}
    for text in given:
        name, _, file = text.partition("=")
        if not file or not name.strip() or not name.isprintable():
            raise InputError(f"--compare must be NAME=FILE, for example int8=int8.npz, got {text!r}")
        found.setdefault(name.strip(), {}).setdefault(UNSTATED, []).append(file)
    return found


def _dense(given: Sequence[str], scores: Sequence[str]) -> dict[str, list[str]]:
    """Sort ``[SCORE=]FILE`` by score; files without one are the dense models of every score."""
    from jprune.recall.inputs.raw import InputError  # noqa: PLC0415

    by_score: dict[str, list[str]] = {}
    for text in given:
        score, _, file = text.partition("=")
        if score in scores and file:
            by_score.setdefault(score, []).append(file)
    if not by_score:
        return {score: list(given) for score in scores}
    without = [score for score in scores if score not in by_score]
    if without or sum(map(len, by_score.values())) < len(given):
        raise InputError(
            f"--dense: give SCORE=FILE for every score ({', '.join(scores)}), or files without a score for all of them"
        )
    return by_score


def _fail(message: str) -> int:
    """Print an error on standard error, in printable characters; return exit status 2."""
    counted = " (models and examples are counted from 0)"
    if "counted from 0" in message or not re.search(r"(?<!for )\b(model|example) \d", message):
        counted = ""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message + counted)
    print(f"jprune audit: {text}", file=sys.stderr)
    return 2
