"""Submit a study as jobs: one for each equal part, through submitit (extra ``cluster``)."""

import contextlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
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
        return subprocess.run(self.command, check=True, preexec_fn=_ignore_time_out).returncode

    def checkpoint(self) -> "Part":
        """The job that submitit submits after a preemption or a time-out."""
        import submitit  # noqa: PLC0415 an extra

        return submitit.helpers.DelayedSubmission(self)


def _ignore_time_out() -> None:
    """Ignore the signal that announces a time-out, which Slurm sends to every process of a job.

    The process that runs ``Part`` answers it: it requeues the job, and then ends its command.
    """
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)


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
    minutes = math.ceil(60 * cluster.hours)
    executor.update_parameters(timeout_min=minutes, cpus_per_task=cluster.cpus, name=folder.name)
    if cluster.gpus:
        executor.update_parameters(gpus_per_node=cluster.gpus)
    if cluster.launch == "slurm":
        executor.update_parameters(slurm_additional_parameters={"requeue": True})  # some clusters default to not
        if cluster.partition:
            executor.update_parameters(slurm_partition=cluster.partition)
    command = [sys.executable, "-m", module, *given]
    parts = [Part([*command, "--shard", f"{i}/{cluster.jobs}"]) for i in range(cluster.jobs)]
    with _outside_of_a_job():
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


@contextlib.contextmanager
def _outside_of_a_job() -> Iterator[None]:
    """Hide the variables of the Slurm job that this process runs in, whose limits new jobs would inherit."""
    inherited = {}
    if "SLURM_JOB_ID" in os.environ:
        inherited = {name: os.environ.pop(name) for name in list(os.environ) if _of_a_job(name)}
    try:
        yield
    finally:
        os.environ.update(inherited)


def _of_a_job(name: str) -> bool:
    """Whether Slurm sets an environment variable in a job; users set SBATCH_ variables and SLURM_CONF.

    >>> [_of_a_job(name) for name in ("SLURM_CPUS_PER_TASK", "SRUN_CPUS_PER_TASK", "SLURM_CONF", "SBATCH_ACCOUNT")]
    [True, True, False, False]
    """
    return name.startswith(("SLURM_", "SLURMD_", "SRUN_")) and name not in ("SLURM_CONF", "SLURM_CLUSTERS")


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
