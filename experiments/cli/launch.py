"""Submit a study as jobs: one for each equal part, through submitit (extra ``cluster``)."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli.commands import ClusterOptions

_TIMEOUTS = 100  # how often a job may reach its time limit and be requeued; submitit's own limit is 3
_OWN = ("--launch", "--jobs", "--partition", "--gpus", "--cpus", "--hours")


class Part:
    """A job that computes one part of a study; after a time-out it is submitted again and resumes."""

    def __init__(self, command: Sequence[str]):
        self.command = list(command)

    def __call__(self) -> int:
        """Run the command; an exit status other than 0 fails the job."""
        return subprocess.run(self.command, check=True).returncode

    def checkpoint(self) -> "Part":
        """The job that submitit submits after a preemption or a time-out."""
        import submitit  # noqa: PLC0415 an extra

        return submitit.helpers.DelayedSubmission(self)


def launch(module: str, arguments: Sequence[str] | None, cluster: ClusterOptions, folder: Path) -> None:
    """Submit the parts of a study, wait for local ones, and print where the logs are.

    Args:
      module: of the command line, run with ``python -m``.
      arguments: of the command line; None for those of this process.
      cluster: how many jobs, where, and with what resources.
      folder: of the results, which every job must be able to write to.

    Raises:
      ImportError: submitit is not installed.
      RuntimeError: jobs failed (``local``); the message names their logs.
    """
    try:
        import submitit  # noqa: PLC0415 an extra
    except ImportError as error:
        raise ImportError("--launch needs submitit: pip install 'jprune[cluster]'") from error
    given = without(sys.argv[1:] if arguments is None else arguments, _OWN)
    logs = folder / "jobs"
    limits = {f"{cluster.launch}_max_num_timeout": _TIMEOUTS}
    executor = submitit.AutoExecutor(folder=logs, cluster=cluster.launch, **limits)
    executor.update_parameters(timeout_min=round(60 * cluster.hours), cpus_per_task=cluster.cpus, name=folder.name)
    if cluster.gpus:
        executor.update_parameters(gpus_per_node=cluster.gpus)
    if cluster.launch == "slurm" and cluster.partition:
        executor.update_parameters(slurm_partition=cluster.partition)
    command = [sys.executable, "-m", module, *given]
    parts = [Part([*command, "--shard", f"{i}/{cluster.jobs}"]) for i in range(cluster.jobs)]
    jobs = executor.submit_array(parts)
    print(f"{len(jobs)} jobs, {', '.join(job.job_id for job in jobs)}; logs in {logs}", flush=True)
    if cluster.launch == "slurm":
        print(f"when they are done: python -m {module} report --out {folder}")
        return
    failed = [job for job in jobs if job.exception() is not None]
    if failed:
        raise RuntimeError(
            f"{len(failed)} of {len(jobs)} jobs failed; the first error is in {failed[0].paths.stderr}. Rerun the same "
            "command to compute the missing stages"
        )
    subprocess.run([sys.executable, "-m", module, "report", "--out", str(folder)], check=True)


def without(arguments: Sequence[str], names: Sequence[str]) -> list[str]:
    """Arguments without these options, each of which has one value.

    >>> without(["--seed", "1", "--launch", "local", "--jobs=2"], ["--launch", "--jobs"])
    ['--seed', '1']
    """
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif name in names:
            skip = not equals
        else:
            kept.append(argument)
    return kept
