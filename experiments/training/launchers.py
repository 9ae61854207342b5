"""Launchers of several processes: what Slurm, MPI, torchrun, Kubernetes and TPU pods say in the environment."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Launcher(NamedTuple):
    """What the program that started this process and others of its kind says in the environment.

    Attributes:
      name: of the launcher.
      processes: number of processes that it started.
      process: number of this one, counted from 0.
      local_processes: number of processes on this node.
      local_process: number of this one among them.
    """

    name: str
    processes: int
    process: int
    local_processes: int
    local_process: int


def launcher_of(environment: Mapping[str, str]) -> Launcher | None:
    """The launcher that started this process and others; None without others, in Kubernetes and in TPU pods.

    In a Slurm job, launchers of MPI start daemons as a step, and the variables of Slurm are those of the daemon.

    >>> launcher_of({"PMI_SIZE": "4", "PMI_RANK": "3", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"})
    Launcher(name='mpiexec', processes=4, process=3, local_processes=2, local_process=1)
    """
    torch = ("torchrun", "WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE", "LOCAL_RANK")
    if "TORCHELASTIC_RUN_ID" in environment:
        found = torch
    elif "OMPI_COMM_WORLD_SIZE" in environment:
        name = "Open MPI 4" if "OMPI_MCA_orte_hnp_uri" in environment else "Open MPI"
        found = (name, *(f"OMPI_COMM_WORLD_{one}" for one in ("SIZE", "RANK", "LOCAL_SIZE", "LOCAL_RANK")))
    elif "MPI_LOCALNRANKS" in environment or ("PMI_SIZE" in environment and "SLURM_STEP_ID" not in environment):
        found = ("mpiexec", "PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS", "MPI_LOCALRANKID")
    elif "SLURM_STEP_NUM_TASKS" in environment:
        found = ("Slurm", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "", "SLURM_LOCALID")
    elif {"WORLD_SIZE", "RANK"} <= set(environment):
        found = torch
    else:
        return None
    name, *variables = found
    size, rank, local_size, local_rank = (int(environment.get(variable) or 0) for variable in variables)
    if name == "Slurm":
        local_size = _slurm_tasks_of_node(environment)
    return Launcher(name, size, rank, local_size or 1, local_rank) if size > 1 else None


def launched(environment: Mapping[str, str]) -> int:
    """How many processes a launcher has started for this program; 1 without a launcher.

    Kubernetes does not say how many in the environment: an indexed job counts as 2 or more.

    >>> launched({"SLURM_STEP_NUM_TASKS": "4"}), launched({"OMPI_COMM_WORLD_SIZE": "2"}), launched({})
    (4, 2, 1)
    >>> launched({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"})  # two slices of two hosts
    4
    """
    launcher = launcher_of(environment)
    hosts, _ = _tpu_hosts(environment)
    return max(launcher.processes if launcher else 1, hosts, 2 if in_indexed_job(environment) else 1)


def _tpu_hosts(environment: Mapping[str, str]) -> tuple[int, int]:
    """Number of hosts of a TPU pod, of all its slices together, and the index of this one.

    The variables are those of Kubernetes; virtual machines have them only in their metadata, which JAX reads.

    >>> _tpu_hosts({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1", "MEGASCALE_SLICE_ID": "0"})
    (2, 1)
    """
    names = environment.get("TPU_PROCESS_ADDRESSES") or environment.get("TPU_WORKER_HOSTNAMES", "localhost")
    numbers = ("MEGASCALE_NUM_SLICES", "MEGASCALE_SLICE_ID", "TPU_WORKER_ID")
    slices, place, worker = (
        int(environment.get(name) or default) for name, default in zip(numbers, (1, 0, 0), strict=True)
    )
    hosts = len(names.split(","))
    return hosts * slices, hosts * place + worker


def _slurm_tasks_of_node(environment: Mapping[str, str]) -> int:
    """Number of tasks of a Slurm step on this node.

    >>> _slurm_tasks_of_node({"SLURM_STEP_TASKS_PER_NODE": "4(x2),1", "SLURM_NODEID": "2"})
    1
    """
    nodes: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        nodes += [int(found[1])] * int(found[2] or 1) if found else []
    node = int(environment.get("SLURM_NODEID", "0"))
    return nodes[node] if node < len(nodes) else 1


def in_indexed_job(environment: Mapping[str, str]) -> bool:
    """Whether this process belongs to an indexed job of Kubernetes."""
    return "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment


def local_gpus(environment: Mapping[str, str], node: int) -> list[int] | None:
    """The indices of the GPUs that this process uses, among those that it sees.

    A process that sees fewer GPUs than the node has was given its own by the launcher and uses all of
    them. Processes that see every GPU of the node divide them evenly. One process on a node uses all.

    Args:
      environment: of the process.
      node: number of GPUs of the node, or 0.

    Returns:
      Indices for ``jax.distributed.initialize``, or None, which leaves the choice to JAX.

    >>> local_gpus({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "1(x4)"}, 8)
    [0, 1, 2, 3, 4, 5, 6, 7]
    >>> local_gpus({"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}, 8)
    [3]
    >>> local_gpus({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "CUDA_VISIBLE_DEVICES": "3"}, 8)
    [0]
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    seen = node if visible is None else len([name for name in visible.split(",") if name.strip()])
    if not seen:
        return None
    launcher = launcher_of(environment)
    tasks, local = (launcher.local_processes, launcher.local_process) if launcher else (1, 0)
    of_step = int(environment.get("SLURM_GPUS_ON_NODE") or 0)  # those of the node that are the step's
    if seen < (of_step or node) or tasks > seen:
        return list(range(seen))
    return list(range(local * seen // tasks, (local + 1) * seen // tasks))


def gpus_of_node() -> int:
    """Number of NVIDIA GPUs of this machine, without starting a device."""
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def shard_of(
    given: str | None, environment: Mapping[str, str], *, one_program: bool = True
) -> tuple[tuple[int, int], str]:
    """The part of a study that this run computes, and where it comes from.

    Args:
      given: ``i/n`` from the command line, or None. Then a Slurm array task takes the part of its index.
      environment: of the process.
      one_program: whether several processes form one program. If not, each computes a separate part.

    Returns:
      ((i, n), a phrase to print, empty for the whole study).

    Raises:
      ValueError: ``given`` is not i/n, or it is given to several processes of one launcher: the shell
        that wrote the command has usually replaced a variable in it, so all would compute the same part.
        Or the task numbers of an array are not evenly spaced, so that they name no equal parts.

    >>> shard_of("1/4", {})
    ((1, 4), 'part 1/4 from --shard')
    >>> numbers = {"ID": "7", "MIN": "4", "MAX": "11", "STEP": "1", "COUNT": "8"}  # --array=4-11
    >>> shard_of(None, {f"SLURM_ARRAY_TASK_{name}": number for name, number in numbers.items()})
    ((3, 8), 'part 3/8 from SLURM_ARRAY_TASK_ID')
    >>> shard_of(None, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, one_program=False)
    ((1, 2), 'part 1/2 from the process number')
    """
    # An indexed job does not say how many processes it has, and each has its own shell or its own $(VARIABLE). But the
    # TPUs of a pod work only as one program.
    count = _tpu_hosts(environment)[0] if in_indexed_job(environment) else launched(environment)
    if given is not None:
        if count > 1:
            raise ValueError(
                f"shard={given!r} cannot be combined with {count} processes from one launcher, which divide the work "
                "themselves; remove --shard, or start one process per shard, for example as an array job"
            )
        return parse_shard(given), f"part {given} from --shard"
    index, parts, source = 0, 1, ""
    if "SLURM_ARRAY_TASK_COUNT" in environment:
        index, parts = _part_of_array(environment)
        source = f"part {index}/{parts} from SLURM_ARRAY_TASK_ID"
    if count > 1 and not one_program:
        launcher = launcher_of(environment)
        rank = launcher.process if launcher else _tpu_hosts(environment)[1]
        index, parts = index * count + rank, parts * count
        source = f"part {index}/{parts} from the process number"
    return (index, parts), source


def _part_of_array(environment: Mapping[str, str]) -> tuple[int, int]:
    """The part (i, n) that a task of a Slurm array computes."""
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_STEP")
    task, low, high, step = (int(environment[name]) for name in names)
    count = int(environment["SLURM_ARRAY_TASK_COUNT"])
    if (high - low) // step + 1 != count:  # of --array=3,7 Slurm says that the step is 1
        raise ValueError(
            f"SLURM_ARRAY_TASK_ID={task} of {count} tasks between {low} and {high} names no part, because the tasks "
            f"are not evenly spaced; give the part, such as --shard $SLURM_ARRAY_TASK_ID/{high + 1}, or resubmit the "
            "whole array: completed stages are not computed again"
        )
    return (task - low) // step, count


def parse_shard(shard: str) -> tuple[int, int]:
    """Read a part i/n of a study.

    Raises:
      ValueError: it is not i/n with 0 <= i < n.

    >>> parse_shard("1/4")
    (1, 4)
    """
    i, _, n = shard.partition("/")
    if not (i.isdecimal() and n.isdecimal() and int(i) < int(n)):
        raise ValueError(f"shard={shard!r} must be i/n with 0 <= i < n")
    return int(i), int(n)
