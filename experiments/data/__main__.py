"""Download and prepare data sets with TensorFlow Datasets: ``python -m experiments.data prepare NAME``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli.commands import exit_status
from experiments.data import image_sets


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``python -m experiments.data``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.data",
        description="Download and prepare data sets with TensorFlow Datasets. This needs TensorFlow; reading does not.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="download a data set and write it as ArrayRecord")
    prepare.add_argument("name", help="data set, such as cifar100; package.module:NAME for your own builder")
    prepare.add_argument(
        "--data-dir", type=Path, help="folder of prepared TensorFlow Datasets (default: ~/tensorflow_datasets)"
    )

    def work() -> None:
        given = parser.parse_args(arguments)
        where = image_sets.prepare(given.name.removeprefix("tfds:"), given.data_dir)
        print(f"{given.name} is in {where}")

    return exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
