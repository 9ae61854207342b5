"""What does pruning do to the recall of each class? Good et al., NeurIPS 2022, with controls.

``python -m experiments.recall_distortion --preset demo`` trains dense replicates, prunes each by every
score to every ratio, fine-tunes, and audits what became of each class; ``--help`` has the options.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from experiments.cli import boards
from experiments.cli.commands import exit_status, parse_shard
from experiments.cli.progress import progress
from experiments.recall_distortion import plan, presets, runner
from experiments.recall_distortion import report as reporting
from experiments.recall_distortion.plan import Planned
from experiments.recall_distortion.presets import Study
from experiments.recall_distortion.runner import Laboratory, Weights
from experiments.storage import results, store
from experiments.training import replicates


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit status."""

    def work() -> None:
        study = parse(arguments)
        if study.list:
            print(presets.listing())
        else:
            {"run": run, "status": status, "report": report}[study.action](study)

    return exit_status(work)


def parse(arguments: Sequence[str] | None = None) -> Study:
    """Read the options; those not given have the preset's values.

    For ``status`` and ``report`` those not given have the values of the run whose results lie there.

    Raises:
      ValueError: an unknown preset, or settings that no study can have.
      SystemExit: an unknown option, or a value of the wrong type.
    """
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset", default="demo")
    first.add_argument("--out", type=Path)
    known, rest = first.parse_known_args(arguments)
    default = dataclasses.replace(presets.get(known.preset), out=known.out)
    if {"status", "report"} & set(rest) and (recorded := results.recorded(default.folder)):
        default = dataclasses.replace(recorded, out=default.out)
    return tyro.cli(Study, args=arguments, default=default, prog="python -m experiments.recall_distortion")


def run(study: Study) -> None:
    """Do what is not done yet, then report."""
    replicates.start(study.coordinator, study.process_id, study.num_processes)
    dataset = plan.load(study)
    lab = runner.equip(study, dataset)
    if replicates.is_first_process():
        results.record(study)
        results.settle(study, dataset)
    carry_out(lab, todo(study, plan.fingerprint(dataset), lab.chunk))
    if replicates.is_first_process():
        report(study)


def todo(study: Study, fingerprint: str, chunk: int) -> list[tuple[Planned, range]]:
    """What of this shard is not done: stages and the replicates they lack, each before what starts from it."""
    mine = replicates.of_shard(study.replicates, parse_shard(study.shard))
    planned = [
        (stage, one_chunk)
        for jumpstart in map(float, study.jumpstart)
        for one_chunk in replicates.chunks(mine, chunk)
        for stage in plan.stages(study, fingerprint, jumpstart)
    ]
    root = plan.root(study)
    gaps = [
        [number, gap.start, gap.stop]
        for number, (stage, one_chunk) in enumerate(planned)
        for gap in store.missing(root, stage.kind, stage.settings, one_chunk)
    ]
    return [(planned[number][0], range(start, stop)) for number, start, stop in replicates.agree(gaps)]


def carry_out(lab: Laboratory, work: Sequence[tuple[Planned, range]]) -> None:
    """Carry out stages, and store each as it ends."""
    study = lab.study
    epochs = {"dense": sum(study.epochs), "pruned": sum(study.finetune_epochs)}
    total = sum(epochs[stage.kind] * len(mine) for stage, mine in work)
    held: tuple[dict[str, Any], range, Weights] | None = None
    with progress(total, "epochs", quiet=not replicates.is_first_process()) as shown:
        for stage, mine in work:
            shown.stage(f"{stage.title}, replicates {mine.start} to {mine.stop - 1}")
            on_epoch = functools.partial(shown.advance, len(mine))
            if stage.cell is None:
                outcome = runner.train_dense(lab, stage.jumpstart, mine, on_epoch)
                held = (stage.settings, mine, outcome.weights)
            else:
                start = stage.settings["dense"]
                if held is None or held[:2] != (start, mine):
                    replicates.agree(None)  # the first process may still be writing what the others read here
                    held = (start, mine, results.dense_weights(study, start, mine))
                outcome = runner.prune_and_finetune(lab, stage.cell, mine, held[2], on_epoch)
            if replicates.is_first_process():
                results.save(study, stage, mine, outcome)
                curves = study.folder / "tensorboard" / f"{stage.title}, {mine.start}-{mine.stop - 1}"
                boards.write(curves, outcome.metrics)


def status(study: Study) -> None:
    """Say how many replicates of each stage are done."""
    held = results.truth(study)
    everyone = range(study.replicates)
    for jumpstart in map(float, study.jumpstart):
        for stage in plan.stages(study, held.fingerprint, jumpstart):
            absent = store.missing(plan.root(study), stage.kind, stage.settings, everyone)
            done = study.replicates - sum(map(len, absent))
            print(f"{done:4d} of {study.replicates}  {stage.title}")


def report(study: Study) -> None:
    """Rebuild tables and figures from what is stored, and say in the last lines what was found."""
    reporting.write(study, Console(width=None if sys.stdout.isatty() else 120))


if __name__ == "__main__":
    sys.exit(main())
