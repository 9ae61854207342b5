"""Join the processes of one program: JAX's distributed runtime under Slurm, Open MPI, Kubernetes and TPU pods."""

import atexit
import contextlib
import importlib.util
import json
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

_RANKS = ("OMPI_COMM_WORLD_RANK", "SLURM_PROCID")  # mpirun in a Slurm job: both, Slurm's is the node's
_MEETING_SECONDS = 60.0  # for the processes of a program to connect to the first one


def start(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    *,
    separate: bool = False,
) -> None:
    """Join the processes of one program; call it before anything uses a device.

    Without arguments, joins the processes that a launcher started, if ``launched`` counts several, and
    otherwise does nothing. Every process uses the GPUs of its node that belong to it (``local_gpus``).

    Args:
      coordinator: HOST:PORT of process 0.
      process_id: of this process, counted from 0.
      num_processes: in total.
      separate: leave the processes of a launcher separate programs.

    Raises:
      ValueError: only some of the arguments are given, or a number is out of range.
      RuntimeError: JAX does not find the other processes of the launcher.
    """
    given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"{', '.join(missing)} must be given too: coordinator, process_id and num_processes go together"
        )
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes={num_processes} must be at least 1")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process_id={process_id} must be in 0..{num_processes - 1}")
    # The preemption service of JAX catches SIGTERM and leaves it to the program to end, which would run on.
    jax.config.update("jax_enable_preemption_service", False)
    count = launched(os.environ)
    if missing and (separate or count <= 1):
        if not separate and _may_be_in_a_tpu_pod(os.environ):
            with contextlib.suppress(ValueError, OSError):  # outside of Google's cloud, without metadata
                jax.distributed.initialize()
        return
    devices = local_gpus(os.environ, gpus_of_node())
    if not missing:
        jax.distributed.initialize(coordinator, num_processes, process_id, local_device_ids=devices)
        return
    if port := _port_of_step(os.environ):
        os.environ.setdefault("JAX_COORDINATOR_PORT", port)
    try:
        jax.distributed.initialize(local_device_ids=devices)
    except (ValueError, RuntimeError) as error:
        package = "install jax[k8s], or " if in_indexed_job(os.environ) else ""
        raise RuntimeError(
            f"a launcher started {count} or more processes, but JAX cannot join them ({error}); {package}name them "
            "with --coordinator, --num-processes and --process-id"
        ) from error


def launched(environment: Mapping[str, str]) -> int:
    """How many processes a launcher has started for this program; 1 without a launcher.

    Kubernetes does not say how many in the environment: an indexed job counts as 2 or more.

    >>> launched({"SLURM_STEP_NUM_TASKS": "4"}), launched({"OMPI_COMM_WORLD_SIZE": "2"}), launched({})
    (4, 2, 1)
    >>> launched({"TPU_WORKER_HOSTNAMES": "a,b", "MEGASCALE_NUM_SLICES": "2"})  # two slices of two hosts
    4
    """
    if "OMPI_COMM_WORLD_SIZE" in environment:  # in a Slurm job, mpirun starts its daemons as a step: one task a node
        return int(environment["OMPI_COMM_WORLD_SIZE"])
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    hosts, _ = _tpu_hosts(environment)
    return max(tasks, hosts, 2 if in_indexed_job(environment) else 1)


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


def _may_be_in_a_tpu_pod(environment: Mapping[str, str]) -> bool:
    """Whether this is a virtual machine with TPUs, which may be one of several; JAX asks the metadata server.

    JAX sets the second variable when it is imported on a machine without TPUs.
    """
    known = {"TPU_WORKER_HOSTNAMES", "TPU_SKIP_MDS_QUERY"} & set(environment)
    return not known and importlib.util.find_spec("libtpu") is not None


def _port_of_step(environment: Mapping[str, str]) -> str | None:
    """A port for the processes of a Slurm step; JAX's own choice is the same for all steps of a job.

    >>> [_port_of_step({"SLURM_JOB_ID": "7", "SLURM_STEP_ID": step}) for step in ("0", "1")]
    ['61447', '62064']
    """
    if "OMPI_COMM_WORLD_SIZE" in environment or "SLURM_STEP_ID" not in environment:
        return None
    number = int(environment["SLURM_JOB_ID"]) + 617 * int(environment["SLURM_STEP_ID"])
    return str(65536 - 2**12 + number % 2**12)


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
    of_step = int(environment.get("SLURM_GPUS_ON_NODE") or 0)  # those of the node that are the step's
    if seen < (of_step or node) or tasks > seen:
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
                "themselves; remove --shard, or start one process a shard, such as an array job"
            )
        return parse_shard(given), f"part {given} from --shard"
    index, parts, source = 0, 1, ""
    if "SLURM_ARRAY_TASK_COUNT" in environment:
        index, parts = _part_of_array(environment)
        source = f"part {index}/{parts} from SLURM_ARRAY_TASK_ID"
    if count > 1 and not one_program:
        rank = int(next((environment[name] for name in _RANKS if name in environment), _tpu_hosts(environment)[1]))
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


def check_shard(given: str | None) -> None:
    """Refuse a part of a study in a program of several processes, as the hosts of a TPU pod always form.

    Raises:
      ValueError: a part is given, and the program has several processes.
    """
    if given is not None and (count := jax.process_count()) > 1:
        raise ValueError(
            f"shard={given!r} cannot be combined with the {count} processes of this program, which divide the work "
            "themselves; remove --shard"
        )


def watch_peers(coordinator: str | None = None) -> None:
    """End this process with a sentence as soon as another process of the program ends early.

    Process 0 accepts a connection of every other process. The system closes the connection when a
    process ends, however it ends. A process that has finished its work calls ``leave`` first; one that
    has failed calls ``give_up``.

    Args:
      coordinator: HOST:PORT of process 0, if it was named.
    """
    others = jax.process_count() - 1
    if not others:
        return
    listening = _listen() if is_first() else None
    names = [coordinator.rpartition(":")[0]] if coordinator else []
    port = 0 if listening is None else listening.getsockname()[1]
    hosts, port, token = agree([[*names, *_names_of_this_host()], port, secrets.token_hex(16)])
    if listening is None:
        connected = _connect(hosts, port, token.encode())
    else:
        with listening:
            connected = _accept(listening, others, token.encode())
    if not connected:
        print(
            "warning: not all processes could connect to the first one; if one is killed, the others end only when "
            "JAX misses its heartbeat, after some two minutes",
            file=sys.stderr,
            flush=True,
        )


_CONNECTIONS: list[socket.socket] = []


def leave() -> None:
    """Tell the other processes that this one has finished, so that its end does not stop them."""
    for connection in _CONNECTIONS:
        with contextlib.suppress(OSError):
            connection.sendall(b"done")


def give_up() -> None:
    """Stop the other processes at once, because this one has failed.

    This process then ends without waiting for the others at the exit of JAX, which takes five minutes.
    """
    for connection in _CONNECTIONS:
        with contextlib.suppress(OSError):
            connection.sendall(b"fail")
    if jax.process_count() > 1:
        atexit.register(_end_now)


def _end_now() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))


def _names_of_this_host() -> list[str]:
    """Names and addresses under which other hosts may reach this one, the likeliest first.

    A host name alone is not enough: it may be unknown to other hosts, or mean 127.0.1.1.
    """
    names = [os.environ.get("SLURMD_NODENAME", ""), socket.gethostname(), socket.getfqdn()]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # sends nothing; the system chooses the address that leads outside
        names.append(probe.getsockname()[0])
    return list(dict.fromkeys(filter(None, names)))


def _accept(listening: socket.socket, others: int, token: bytes) -> bool:
    """Watch the connections of the other processes; others that connect to the port are turned away."""
    deadline, met = time.monotonic() + _MEETING_SECONDS, 0
    while met < others and (left := deadline - time.monotonic()) > 0:
        listening.settimeout(left)
        with contextlib.suppress(OSError):
            connection, _ = listening.accept()
            connection.settimeout(5)
            if connection.recv(len(token), socket.MSG_WAITALL) == token:
                connection.sendall(token)
                _watch(connection)
                met += 1
            else:
                connection.close()
    return met == others


def _connect(hosts: Sequence[str], port: int, token: bytes) -> bool:
    """Connect to the first process, under the first of its names that works."""
    deadline = time.monotonic() + _MEETING_SECONDS
    for host in hosts:
        with contextlib.suppress(OSError):
            left = max(1.0, deadline - time.monotonic())
            connection = socket.create_connection((host, port), timeout=min(10.0, left))
            connection.sendall(token)
            connection.settimeout(left)
            if connection.recv(len(token), socket.MSG_WAITALL) == token:
                _watch(connection)
                return True
            connection.close()
    return False


def _watch(connection: socket.socket) -> None:
    connection.settimeout(None)
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
