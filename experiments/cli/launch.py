"""Submit a study as jobs: one for each equal part, through submitit (extra ``cluster``)."""

import contextlib
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from experiments.cli.commands import Action, ClusterOptions
from experiments.storage.files import PARTIAL
from experiments.training import launchers
from jprune._extras import missing

_TIMEOUTS = 100  # how often a job may reach its time limit and be requeued; submitit's own limit is 3
_WARNING_SECONDS = 240  # a time-out is announced 90 to 150 seconds earlier; more for the start of the job
_RESULTS = ("config.json", "studies", "store")  # one of them is in every folder in which a study has run
_OWN = ("--launch", "--jobs", "--partition", "--gpus", "--cpus", "--hours")


class StudyCommand(Protocol):
    """The options that the commands of both studies have."""

    action: Action
    preset: str
    list: bool
    cluster: ClusterOptions

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        ...


def works_here(
    command: StudyCommand,
    listing: Callable[[], str],
    module: str,
    arguments: Sequence[str] | None,
    *,
    tables: bool = False,
) -> bool:
    """Whether this process does the work of a command; if not, print the presets or submit the jobs that do it.

    Args:
      command: the options of a study.
      listing: returns the table of the presets.
      module: the study as it is run with ``python -m``.
      arguments: of the command line; None for those of this process.
      tables: whether report reads a table that is given instead of the folder.

    Raises:
      ValueError: status or report of a folder in which no study has run.
    """
    if command.list:
        print(listing())
        return False
    needs_results = command.action == "status" or (command.action == "report" and not tables)
    if needs_results and not any((command.folder / name).exists() for name in _RESULTS):
        run = ["python", "-m", module, "--preset", command.preset]
        run += ["--out", str(command.folder)] if command.folder != Path("runs") / command.preset else []
        raise ValueError(
            f"nothing has run in {command.folder}; give the folder of an earlier run with --out, or run the study "
            f"first: {shlex.join(run)}"
        )
    if command.action == "run" and command.cluster.launch:
        launch(module, arguments, command.cluster, command.folder)
        return False
    if command.action == "run":
        print(f"results go to {command.folder}; loading JAX and the data", flush=True)
    return True


class Part:
    """A job that computes one part of a study; after a time-out it is submitted again and resumes.

    Attributes:
      command: computes the part.
      folder: of the results.
      hours: time limit.
      gpus: value of CUDA_VISIBLE_DEVICES for the command; None to leave it as it is.
      began: when this job started, and the stages and checkpoints that were complete then.
    """

    def __init__(self, command: Sequence[str], folder: Path, hours: float, gpus: str | None = None):
        self.command = list(command)
        self.folder = folder.absolute()
        self.hours = hours
        self.gpus = gpus
        self.began: tuple[float, frozenset[Path]] = (0.0, frozenset())

    def __call__(self) -> int:
        """Run the command; an exit status other than 0 fails the job."""
        self.began = (time.time(), self._complete())
        environment = os.environ if self.gpus is None else {**os.environ, "CUDA_VISIBLE_DEVICES": self.gpus}
        with _deaf_to_warnings():
            process = subprocess.Popen(self.command, env=environment)
        with process:
            try:
                status = process.wait()
            except BaseException:
                process.kill()
                raise
        if status:
            raise subprocess.CalledProcessError(status, self.command)
        return status

    def checkpoint(self) -> "Part":
        """The job that submitit submits after a preemption or a time-out.

        Raises:
          RuntimeError: the job reached its time limit before a stage or a checkpoint was stored, and so would the next.
        """
        import submitit  # noqa: PLC0415 an extra

        start, complete = self.began
        timed_out = time.time() - start > 3600 * self.hours - _WARNING_SECONDS
        if timed_out and self._complete() == complete:
            raise RuntimeError(
                f"no stage and no checkpoint was stored within the time limit of {self.hours:g} hours, so the job is "
                "not requeued; use more --hours, or make an epoch shorter with a smaller --chunk, and rerun the same "
                "command"
            )
        return submitit.helpers.DelayedSubmission(self)

    def _complete(self) -> frozenset[Path]:
        """The complete stages and checkpoints of the folder, of this part and of others."""
        return frozenset(path for path in self.folder.glob("store/*/*-*") if path.is_dir() and PARTIAL not in path.name)


@contextlib.contextmanager
def _deaf_to_warnings() -> Iterator[None]:
    """Block the signals that announce a time-out or a preemption; processes started meanwhile never receive them.

    Slurm sends them to every process of a job. If the command ended by itself, the job would fail, and Slurm
    requeues no job that has ended before the end of its grace time. At a time-out the process that runs ``Part``
    requeues the job and ends the command; a preempted job computes until Slurm kills it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2, signal.SIGTERM])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def launch(module: str, arguments: Sequence[str] | None, cluster: ClusterOptions, folder: Path) -> None:
    """Submit the parts of a study, wait for local ones, and print where the logs are.

    Args:
      module: of the command line, run with ``python -m``.
      arguments: of the command line; None for those of this process.
      cluster: how many jobs, where, and with what resources.
      folder: of the results, which every job must be able to write to.

    Raises:
      ValueError: this process is one of several that would all submit the study, or local jobs need more GPUs than
        there are.
      ImportError: submitit is not installed.
      RuntimeError: jobs failed (``local``); the message names their logs.
    """
    (_, times), _ = launchers.shard_of(None, os.environ, one_program=False)
    if times > 1:
        raise ValueError(
            f"launch={cluster.launch!r} in {times} processes of a launcher or tasks of an array would submit the study "
            f"{times} times; give the command once, outside of them"
        )
    gpus = gpus_of_jobs(cluster)
    try:
        import submitit  # noqa: PLC0415 an extra
    except ImportError as error:
        raise ImportError(missing("--launch needs submitit", "cluster")) from error
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
    shards = [f"{i}/{cluster.jobs}" for i in range(cluster.jobs)]
    parts = [
        Part([*command, "--shard", shard], folder, cluster.hours, own) for shard, own in zip(shards, gpus, strict=True)
    ]
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


def gpus_of_jobs(cluster: ClusterOptions) -> list[str | None]:
    """CUDA_VISIBLE_DEVICES of each local job, as submitit gives the first GPUs to all; None under Slurm, which assigns.

    Raises:
      ValueError: the jobs need more GPUs than there are.
    """
    if cluster.launch != "local" or not cluster.gpus:
        return [None] * cluster.jobs
    visible, needed = os.environ.get("CUDA_VISIBLE_DEVICES"), cluster.jobs * cluster.gpus
    listed = map(str, range(launchers.gpus_of_node())) if visible is None else visible.split(",")
    names = [name.strip() for name in listed if name.strip()]
    if needed > len(names):
        raise ValueError(
            f"jobs={cluster.jobs} with gpus={cluster.gpus} each need {needed} NVIDIA GPUs, and this process sees "
            f"{len(names)}; use fewer --jobs or --gpus"
        )
    return [",".join(names[i : i + cluster.gpus]) for i in range(0, needed, cluster.gpus)]


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
