"""Do thin, deep networks train? Riera et al., CPAIOR 2022 and IEEE Access 2025.

``python -m experiments.jumpstart_grid --preset moons-subset`` trains a grid of widths, depths and methods
and compares it with the published one; ``--list`` shows the other presets, ``--help`` has the options.
"""

import dataclasses
import sys
from collections.abc import Sequence

from experiments.cli import commands, launch
from experiments.jumpstart_grid import presets
from experiments.jumpstart_grid.config import (
    GridCommand,
    GridRunning,
    command_of,
    grid_from_json,
    grid_running_from_json,
)

PROG = "python -m experiments.jumpstart_grid"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return commands.exit_status(lambda: _work(arguments))


def parse(arguments: Sequence[str] | None = None) -> GridCommand:
    """Read the options; those not given have the values of the preset.

    For ``status`` and ``report`` those not given have the values of the last run in the folder.

    Raises:
      ValueError: an unknown preset, or settings that are not valid.
      UsageError: an unknown option, or a value of the wrong type.
    """
    name, out, actions = commands.first_look(arguments, "moons-subset")
    default = command_of(presets.get(name), GridRunning(out=out), preset=name)
    if actions & {"status", "report"}:
        from experiments.storage import files, settings  # noqa: PLC0415

        if recorded := settings.recorded(default.folder):
            try:
                grid, running = grid_from_json(recorded["study"]), grid_running_from_json(recorded["running"])
            except (ValueError, TypeError) as error:
                raise files.StoreError(
                    f"{default.folder / 'config.json'} has no settings of a jumpstart grid ({error}): for another "
                    "study use its own command; otherwise delete the file and pass all options again"
                ) from error
            default = command_of(grid, dataclasses.replace(running, out=out, table=None), preset=name)
    return commands.parse(GridCommand, default, arguments, PROG)


def _work(arguments: Sequence[str] | None) -> None:
    command = parse(arguments)
    grid = command.grid  # validates the options
    given = command.running.table is not None
    if given and command.action != "report":
        raise ValueError(f"table={command.running.table} is for the action report; put report before the options")
    if not launch.works_here(command, presets.listing, "experiments.jumpstart_grid", arguments, tables=given):
        return
    from experiments.jumpstart_grid import runner  # noqa: PLC0415 the line above appears before it loads

    if command.action == "run":
        runner.run(command.folder, grid, command.running, command.cluster)
    elif command.action == "report":
        runner.report(command.folder, grid, command.running)
    else:
        runner.status(command.folder, grid, every=command.all)


if __name__ == "__main__":
    sys.exit(main())
