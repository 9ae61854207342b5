"""Join the processes of one program: JAX's distributed runtime under Slurm, Open MPI, Kubernetes and TPU pods."""

import json
import os
import re
import socket
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

_SHARD_ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_STEP")


def start(coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None) -> None:
    """Join the processes of one program; call it before anything uses a device.

    Without arguments, joins the processes that a launcher started, if ``launched`` counts several, and
    otherwise does nothing. Every process uses the GPUs of its node that belong to it (``local_gpus``). If a
    process ends early, the others end within seconds.

    Args:
      coordinator: HOST:PORT of process 0.
      process_id: of this process, counted from 0.
      num_processes: in total.

    Raises:
      ValueError: only some of the arguments are given, or ``process_id`` is out of range.
    """
    given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"{', '.join(missing)} must be given too: coordinator, process_id and num_processes go together"
        )
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process_id={process_id} must be in 0..{num_processes - 1}")
    if missing and launched(os.environ) <= 1:
        return
    devices = local_gpus(os.environ, gpus_of_node())
    if missing:
        jax.distributed.initialize(local_device_ids=devices)
    else:
        jax.distributed.initialize(coordinator, num_processes, process_id, local_device_ids=devices)


def launched(environment: Mapping[str, str]) -> int:
    """How many processes a launcher has started for this program; 1 without a launcher.

    Kubernetes does not say how many in the environment: an indexed job counts as 2 or more.

    >>> launched({"SLURM_STEP_NUM_TASKS": "4"}), launched({"OMPI_COMM_WORLD_SIZE": "2"}), launched({})
    (4, 2, 1)
    >>> launched({"TPU_WORKER_HOSTNAMES": "a,b,c,d"})
    4
    """
    counts = [int(environment.get(name, "1")) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE")]
    counts.append(len(environment.get("TPU_WORKER_HOSTNAMES", "localhost").split(",")))
    if "KUBERNETES_SERVICE_HOST" in environment and "JOB_COMPLETION_INDEX" in environment:
        counts.append(2)
    return max(counts)


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
    >>> local_gpus({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "3"}, 8)
    [3]
    >>> local_gpus({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "3", "CUDA_VISIBLE_DEVICES": "3"}, 8)
    [0]
    """
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    seen = node if visible is None else len([name for name in visible.split(",") if name.strip()])
    if not seen:
        return None
    tasks, local = _tasks_of_node(environment)
    node = max(node, int(environment.get("SLURM_GPUS_ON_NODE") or 0), seen)
    if seen < node or tasks > seen:
        return list(range(seen))
    return list(range(local * seen // tasks, (local + 1) * seen // tasks))


def _tasks_of_node(environment: Mapping[str, str]) -> tuple[int, int]:
    """Number of processes on this node, and the index of this one among them."""
    if "OMPI_COMM_WORLD_LOCAL_SIZE" in environment:
        return int(environment["OMPI_COMM_WORLD_LOCAL_SIZE"]), int(environment.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"))
    nodes: list[int] = []
    for part in environment.get("SLURM_STEP_TASKS_PER_NODE", "1").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        nodes += [int(found[1])] * int(found[2] or 1) if found else []
    node = int(environment.get("SLURM_NODEID", "0"))
    return nodes[node] if node < len(nodes) else 1, int(environment.get("SLURM_LOCALID", "0"))


def gpus_of_node() -> int:
    """Number of NVIDIA GPUs of this machine, without starting a device."""
    return len([path for path in Path("/dev").glob("nvidia*") if re.fullmatch(r"nvidia\d+", path.name)])


def is_first() -> bool:
    """Whether this process is the one that writes files and prints."""
    return jax.process_index() == 0


def agree(value: PyTree) -> PyTree:
    """Return the first process's value in every process; the value must be JSON."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.resize(text, length)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))


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

    >>> shard_of("1/4", {})
    ((1, 4), 'part 1/4 from --shard')
    >>> shard_of(None, {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "4", "SLURM_ARRAY_TASK_COUNT": "8"})
    ((3, 8), 'part 3/8 from SLURM_ARRAY_TASK_ID')
    >>> shard_of(None, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, one_program=False)
    ((1, 2), 'part 1/2 from the process number')
    """
    count = launched(environment)
    if given is not None:
        if count > 1:
            raise ValueError(
                f"shard={given!r} cannot be combined with {count} processes from one launcher, which divide the work "
                "themselves; remove --shard, or start one process a shard, such as an array job"
            )
        return parse_shard(given), f"part {given} from --shard"
    index, parts, source = 0, 1, ""
    identifier, low, size, step = (environment.get(name) for name in _SHARD_ARRAY)
    if identifier is not None and size is not None:
        index, parts = (int(identifier) - int(low or 0)) // int(step or 1), int(size)
        source = f"part {index}/{parts} from SLURM_ARRAY_TASK_ID"
    if count > 1 and not one_program:
        rank = int(environment.get("SLURM_PROCID") or environment.get("OMPI_COMM_WORLD_RANK") or "0")
        index, parts = index * count + rank, parts * count
        source = f"part {index}/{parts} from the process number"
    return (index, parts), source


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


def watch_peers() -> None:
    """End this process with a sentence as soon as another process of the program ends early.

    Process 0 accepts a connection of every other process. The system closes the connection when a
    process ends, however it ends. A process that has finished its work calls ``leave`` first.
    """
    if jax.process_count() == 1:
        return
    listening = socket.create_server(("", 0)) if is_first() else None
    host, port = agree([socket.gethostname(), listening.getsockname()[1] if listening else 0])
    if listening is not None:
        for _ in range(jax.process_count() - 1):
            connection, _ = listening.accept()
            _watch(connection)
    else:
        connection = socket.create_connection((host, port), timeout=60)
        connection.settimeout(None)
        _watch(connection)


_CONNECTIONS: list[socket.socket] = []


def leave() -> None:
    """Tell the other processes that this one has finished, so that its end does not stop them."""
    for connection in _CONNECTIONS:
        try:
            connection.sendall(b"done")
        except OSError:
            continue


def _watch(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    _CONNECTIONS.append(connection)

    def wait() -> None:
        try:
            finished = connection.recv(4) == b"done"
        except OSError:
            finished = False
        if not finished:
            print(
                "error: another process of this program has ended; this one stops too. Rerun the same command to "
                "resume: finished stages are stored",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
