"""The command line: ``jprune audit``, for the predictions of any framework.

What can be given is in ``jprune.recall.inputs.options``, reading files in ``jprune.recall.inputs.files``, the audit in
``jprune.recall.audit``; here they are put together, and errors are told.
"""

import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jprune.recall.audit import Audit
    from jprune.recall.inputs.options import AuditOptions
    from jprune.recall.inputs.predictions import Predictions

# The imports inside functions keep `jprune --version` and usage errors from waiting for jax, pandas and matplotlib.


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
      arguments: what stands behind ``jprune``; by default what the shell gave.

    Returns:
      0, or 2 where the arguments or a file cannot be used; the reason is then on standard error.

    >>> main(["--version"])
    jprune ...
    0
    """
    try:
        status = _told(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
    except BrokenPipeError:
        return end_quietly()
    return status


def end_quietly() -> int:
    """Give up what is not printed yet, once nobody reads it any more (``| head``); the exit status."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def _told(given: list[str]) -> int:
    """Do what is asked, or say on standard error why not; the exit status."""
    if given == ["--version"]:
        import jprune  # noqa: PLC0415

        print(f"jprune {jprune.__version__}")
        return 0
    try:
        from jprune.recall.inputs.options import parse  # noqa: PLC0415
    except ImportError as error:
        return _fail(f"the command line needs an extra: pip install 'jprune[report]' ({error})")
    try:
        options = parse(given)
    except SystemExit as stop:
        return int(stop.code or 0)
    from jprune.recall.inputs.predictions import InputError  # noqa: PLC0415

    try:
        _run(options)
    except BrokenPipeError:
        raise
    except (InputError, OSError, ImportError) as error:
        return _fail(str(error))
    return 0


def _run(options: "AuditOptions") -> None:
    """Read everything, audit, and only then write."""
    from jprune.files import write_text  # noqa: PLC0415
    from jprune.recall.inputs.arguments import EmptyClassWarning  # noqa: PLC0415
    from jprune.recall.inputs.files import read_images  # noqa: PLC0415

    _check(options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", EmptyClassWarning)  # told among the audit's own warnings
        audit = _audit(options)
    html = ""
    if options.out is not None:
        from jprune.recall.report.page import page  # noqa: PLC0415

        images = None if options.images is None else read_images(options.images)
        html = page(audit, images=images, title=options.title, date=options.date)
    if options.csv is not None:
        audit.to_csv(options.csv)
    if options.out is not None:
        write_text(options.out, html)
    if options.json:
        sys.stdout.write(audit.to_json())
    else:
        from jprune.recall.report.terminal import print_summary  # noqa: PLC0415

        print_summary(audit, options.out)


def _check(options: "AuditOptions") -> None:
    """Refuse options that no file can mend, before anything is read."""
    from jprune.recall.inputs.arguments import check_level, check_resamples  # noqa: PLC0415
    from jprune.recall.inputs.predictions import InputError  # noqa: PLC0415

    for name, given in (("--dense", options.dense), ("--pruned", options.pruned)):
        if not given:
            raise InputError(f"{name} is needed; jprune audit --help shows an example")
    if options.images is not None and options.out is None:
        raise InputError("--images are shown in the report: say where to write it with --out")
    for name, target in (("--out", options.out), ("--csv", options.csv)):
        if target is not None and not target.parent.is_dir():
            raise InputError(f"{name} {target}: the folder {target.parent} is not there")
    if options.out is not None and options.out.is_dir():
        raise InputError(f"--out {options.out} is a folder; give the report a file name")
    if options.csv is not None and options.csv.exists() and not options.csv.is_dir():
        raise InputError(f"--csv {options.csv} is not a folder")
    if options.seed < 0:
        raise InputError(f"--seed must be 0 or more, got {options.seed}")
    try:
        check_level(options.level)
        if options.resamples != 0:
            check_resamples(options.resamples)
    except ValueError as error:
        raise InputError(f"--{error}") from error


def _audit(options: "AuditOptions") -> "Audit":
    """Read the files and audit them."""
    from jprune.recall.audit import audit_stacks  # noqa: PLC0415
    from jprune.recall.inputs import files, predictions  # noqa: PLC0415

    names = None if options.class_names is None else files.read_class_names(options.class_names)
    if names is not None:
        predictions.names_of_classes(names, len(names))
    true = predictions.labels(files.read_labels(options.labels, names), options.labels)

    def read(file: str) -> "Predictions":
        return predictions.stack(files.read_predictions(file, true.size, names), file, true.size)

    pruned = _by_score(options.pruned)
    dense = _dense(options.dense, list(pruned))
    once = {file: read(file) for score in dense for file in dense[score]}
    groups: dict[str, object] = {}
    for file in options.groups:
        found = files.read_groups(file)
        twice = sorted(groups.keys() & found.keys())
        if twice:
            raise predictions.InputError(
                f"--groups {file} has the attribute {twice[0]!r}, which a file before it has too"
            )
        groups |= found
    return audit_stacks(
        true,
        {score: predictions.join([once[file] for file in given]) for score, given in dense.items()},
        {
            score: {ratio: predictions.join([read(file) for file in given]) for ratio, given in ratios.items()}
            for score, ratios in pruned.items()
        },
        groups=predictions.groups(groups, true.size),
        labels_name=options.labels,
        class_names=names,
        num_classes=options.num_classes,
        paired=not options.unpaired,
        level=options.level,
        rng=options.seed if options.resamples else None,
        resamples=options.resamples,
    )


def _by_score(given: Sequence[str]) -> dict[str, dict[float, list[str]]]:
    """Sort ``[SCORE:]RATIO=FILE`` by score and ratio; naming a ratio again adds a file to it."""
    from jprune.recall.inputs.predictions import InputError, by_score  # noqa: PLC0415

    found: dict[str | None, dict[float, list[str]]] = {}
    for text in given:
        key, _, file = text.partition("=")
        score, colon, ratio = key.rpartition(":")
        if not file or not re.fullmatch(r"\s*[\d.]+(e\d+)?\s*", ratio):
            raise InputError(f"--pruned must be [SCORE:]RATIO=FILE, such as 10=p10.npz, got {text!r}")
        try:
            number = float(ratio)
        except ValueError as error:
            raise InputError(f"--pruned {text}: the ratio {ratio!r} is no number") from error
        found.setdefault(score if colon else None, {}).setdefault(number, []).append(file)
    if None in found and len(found) > 1:
        raise InputError("--pruned: name a score for every file (SCORE:RATIO=FILE) or for none (RATIO=FILE)")
    nested = found.get(None, found)
    return {
        score: {ratio: files for ratio, (_, files) in ratios.items()}
        for score, ratios in by_score(nested, "--pruned").items()
    }


def _dense(given: Sequence[str], scores: Sequence[str]) -> dict[str, list[str]]:
    """Sort ``[SCORE=]FILE`` by score; files without one are the dense models of every score."""
    from jprune.recall.inputs.predictions import InputError  # noqa: PLC0415

    own: dict[str, list[str]] = {}
    for text in given:
        score, _, file = text.partition("=")
        if score in scores and file:
            own.setdefault(score, []).append(file)
    if not own:
        return {score: list(given) for score in scores}
    missing = [score for score in scores if score not in own]
    if missing or sum(map(len, own.values())) < len(given):
        raise InputError(
            f"--dense: give SCORE=FILE for every score ({', '.join(scores)}), or files without a score for all of them"
        )
    return own


def _fail(message: str) -> int:
    """Say on standard error, in printable characters, why nothing was done."""
    counted = " (models and examples are counted from 0)" if re.search(r"\b(model|example) \d", message) else ""
    text = "".join(c if c.isprintable() else repr(c)[1:-1] for c in message + counted)
    print(f"jprune audit: {text}", file=sys.stderr)
    return 2
