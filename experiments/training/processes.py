"""Join the processes of one program: JAX's distributed runtime under Slurm, MPI, Kubernetes and TPU pods."""

import atexit
import contextlib
import importlib.util
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import PyTree

from experiments.training import launchers

_METHODS = {"Open MPI 4": "ompi", "Slurm": "slurm"}  # JAX's detection of a launcher by its environment variables
# A host that fails closes no connection: miss it after a minute, before JAX does, after some 95 seconds.
_KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 3}
_MEETING_SECONDS = 60.0  # for the processes of a program to connect to the first one


def start(
    coordinator: str | None = None,
    process_id: int | None = None,
    num_processes: int | None = None,
    *,
    separate: bool = False,
) -> None:
    """Join the processes of one program; call it before anything uses a device.

    Without arguments, joins the processes that a launcher started, if ``launchers.launched`` counts several, and
    otherwise does nothing. Every process uses the GPUs of its node that belong to it (``launchers.local_gpus``).

    Args:
      coordinator: HOST:PORT of process 0.
      process_id: of this process, counted from 0; by default the launcher's.
      num_processes: in total; by default the launcher's.
      separate: leave the processes of a launcher separate programs.

    Raises:
      ValueError: only some of the arguments are given, or a number is out of range.
      RuntimeError: JAX does not find the other processes of the launcher.
    """
    launcher = launchers.launcher_of(os.environ)
    if coordinator and launcher and process_id is None and num_processes is None:
        process_id, num_processes = launcher.process, launcher.processes
    _check_numbers(coordinator, process_id, num_processes, launcher)
    # The preemption service of JAX catches SIGTERM and leaves it to the program to end, which would run on.
    jax.config.update("jax_enable_preemption_service", False)
    count = launchers.launched(os.environ)
    if coordinator is None and (separate or count <= 1):
        if not separate and _may_be_in_a_tpu_pod(os.environ):
            with contextlib.suppress(ValueError, OSError):  # outside of Google's cloud, without metadata
                jax.distributed.initialize()
        return
    devices = launchers.local_gpus(os.environ, launchers.gpus_of_node())
    if coordinator is not None:
        if process_id == 0:
            _check_first(coordinator)
        jax.distributed.initialize(coordinator, num_processes, process_id, local_device_ids=devices)
        return
    if launcher and launcher.name == "Slurm" and (port := _port_of_step(os.environ)):
        os.environ.setdefault("JAX_COORDINATOR_PORT", port)
    try:
        method = _detection(launcher) if launcher else None
        jax.distributed.initialize(local_device_ids=devices, cluster_detection_method=method)
    except (ValueError, RuntimeError) as error:
        raise RuntimeError(_cannot_join(launcher, count, error)) from error


def _check_numbers(
    coordinator: str | None, process_id: int | None, num_processes: int | None, launcher: launchers.Launcher | None
) -> None:
    """Check that a process is named completely, and as its launcher numbers it."""
    given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(f"{', '.join(missing)} must be given too, unless a launcher numbers the processes")
    if num_processes is not None and num_processes < 1:
        raise ValueError(f"num_processes={num_processes} must be at least 1")
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process_id={process_id} must be in 0..{num_processes - 1}")
    if launcher and num_processes == launcher.processes and process_id != launcher.process:
        raise ValueError(
            f"process_id={process_id} is given to process {launcher.process} of {launcher.name}; remove --process-id "
            "and --num-processes, which the launcher gives"
        )


def _check_first(coordinator: str) -> None:
    """Check in process 0 that it can be reached at its address; otherwise JAX ends all processes after five minutes.

    Raises:
      ValueError: the address is not HOST:PORT, or the port is in use.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"coordinator={coordinator!r} must be HOST:PORT")
    try:
        socket.create_server(("", int(port))).close()
    except (OSError, OverflowError) as error:
        raise ValueError(
            f"coordinator={coordinator!r}: process 0 cannot use this port ({error}); use another"
        ) from error
    if not _is_here(host.strip("[]")):
        print(
            f"warning: process 0 runs on {socket.gethostname()}, and {host} is not an address of it; if the others "
            "cannot connect, all end after five minutes",
            file=sys.stderr,
            flush=True,
        )


def _is_here(host: str) -> bool:
    """Whether a name or an address is this host's."""
    try:
        found = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
    except OSError:
        return False
    for family, *_, address in found:
        with contextlib.suppress(OSError), socket.socket(family) as probe:
            probe.bind(address)
            return True
    return False


def _cannot_join(launcher: launchers.Launcher | None, count: int, error: Exception) -> str:
    """What failed when processes should have been joined, and what to do."""
    if launcher is None:
        package = "install jax[k8s], or " if launchers.in_indexed_job(os.environ) else ""
        return (
            f"a launcher started {count} or more processes, but JAX cannot join them ({error}); {package}name them "
            "with --coordinator, --num-processes and --process-id"
        )
    package = "install mpi4py for this MPI, or " if launcher.name in ("Open MPI", "mpiexec") else ""
    return (
        f"{launcher.name} started {count} processes, but JAX cannot join them ({error}); {package}add --coordinator "
        "HOST:PORT with a free port on the host of process 0"
    )


def _on_host_of_mpirun(environment: Mapping[str, str]) -> bool:
    """Whether this process runs on the host of Open MPI's mpirun, where JAX expects process 0.

    Without this check, all processes end after five minutes.
    """
    mpirun, daemon = (environment.get(f"OMPI_MCA_orte_{name}_uri") for name in ("hnp", "local_daemon"))
    return daemon is None or daemon == mpirun


def _detection(launcher: launchers.Launcher) -> str:
    """The name of JAX's detection of a launcher.

    Raises:
      RuntimeError: JAX cannot learn from this launcher where the first process runs.
    """
    if launcher.name == "Open MPI 4" and launcher.process == 0 and not _on_host_of_mpirun(os.environ):
        raise RuntimeError("mpirun does not run on the host of process 0")
    if launcher.name in _METHODS:
        return _METHODS[launcher.name]
    if launcher.name == "torchrun":
        raise RuntimeError("it does not know this launcher")
    try:
        size = importlib.import_module("mpi4py.MPI").COMM_WORLD.Get_size()
    except (ImportError, RuntimeError) as error:
        raise RuntimeError(str(error)) from error
    if size != launcher.processes:
        raise RuntimeError(f"mpi4py counts {size}; it was built for another MPI")
    return "mpi4py"


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
    if "SLURM_STEP_ID" not in environment:
        return None
    number = int(environment["SLURM_JOB_ID"]) + 617 * int(environment["SLURM_STEP_ID"])
    return str(65536 - 2**12 + number % 2**12)


def check_alone(program: str) -> None:
    """Refuse several processes of a program that runs in one.

    Args:
      program: its name, such as ``score_comparison``.

    Raises:
      ValueError: a launcher has started several processes.
    """
    if (count := launchers.launched(os.environ)) > 1:
        raise ValueError(
            f"a launcher started {count} or more processes, but {program} runs in one; start one process, because each "
            "would compute the same"
        )


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
    process ends, however it ends, or a minute after its host has failed. A process that has finished its
    work calls ``leave`` first; one that has failed calls ``give_up``.

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
    for name, value in _KEEPALIVE.items():
        with contextlib.suppress(OSError, AttributeError):  # not on every system
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    _CONNECTIONS.append(connection)

    def wait() -> None:
        try:
            finished = connection.recv(4) == b"done"
        except OSError:
            finished = False
        if not finished:
            print(
                "error: another process of this program has ended or cannot be reached; this one stops too. Rerun the "
                "same command to resume: finished stages are stored",
                file=sys.stderr,
                flush=True,
            )
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()
