"""The effect of pruning on the recall of each class: Good et al., NeurIPS 2022, with controls.

``python -m experiments.recall_distortion --preset demo`` trains dense replicates, prunes each by every
score to every ratio, fine-tunes, and audits the recall of each class; ``--help`` has the options.
"""

import dataclasses
import sys
from collections.abc import Sequence

from experiments.cli import commands, launch
from experiments.recall_distortion import presets
from experiments.recall_distortion.config import Command, command_of

PROG = "python -m experiments.recall_distortion"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return commands.exit_status(lambda: _work(arguments))


def parse(arguments: Sequence[str] | None = None) -> Command:
    """Read the options; those not given have the values of the preset.

    For ``status`` and ``report`` those not given have the values of the last run in the folder.

    Raises:
      ValueError: an unknown preset, or settings that are not valid.
      UsageError: an unknown option, or a value of the wrong type.
    """
    name, out, actions = commands.first_look(arguments, "demo")
    default = command_of(presets.get(name), dataclasses.replace(presets.running(name), out=out), preset=name)
    if actions & {"status", "report"}:
        from experiments.recall_distortion import results  # noqa: PLC0415

        if recorded := results.recorded(default.folder):
            study, running = recorded
            default = command_of(study, dataclasses.replace(running, out=out), preset=name)
    return commands.parse(Command, default, arguments, PROG)


def _work(arguments: Sequence[str] | None) -> None:
    command = parse(arguments)
    study = command.study  # validates the options
    if not launch.works_here(command, presets.listing, "experiments.recall_distortion", arguments):
        return
    from experiments.recall_distortion import results  # noqa: PLC0415 the line above appears before these load
    from experiments.recall_distortion import study as studies  # noqa: PLC0415

    if command.action == "run":
        studies.compute(command.folder, study, command.running, command.cluster)
    elif command.action == "report":
        studies.report(command.folder, study, command.running)
    else:
        recorded = (results.all_recorded(command.folder) if command.all else []) or [study]
        for number, (one, different) in enumerate(zip(recorded, commands.differences(recorded), strict=True)):
            if command.all:
                print(f"study {number}: {one.model} on {one.dataset}{different}")
            studies.status(command.folder, one)


if __name__ == "__main__":
    sys.exit(main())
