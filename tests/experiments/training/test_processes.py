"""Joining the processes of one program: detection of launchers, devices of a process, parts of a study."""

import os
import socket
import subprocess
import sys
import textwrap
import types
from concurrent import futures

import jax
import pytest

from experiments.training import processes
from tests.ports import free_port

INDEXED = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
LAUNCHERS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "KUBERNETES_SERVICE_HOST")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", None, None), "process_id, num_processes must be given too"),
        ((None, 0, 2), "coordinator must be given too"),
        (("localhost:1", 2, 2), r"process_id=2 must be in 0\.\.1"),
    ],
)
def test_processes_are_named_completely(arguments, message):
    with pytest.raises(ValueError, match=message):
        processes.start(*arguments)


@pytest.mark.parametrize(
    ("environment", "arguments", "joined"),
    [
        ({}, (), []),
        ({"SLURM_STEP_NUM_TASKS": "1"}, (), []),
        ({"SLURM_STEP_NUM_TASKS": "4"}, (), [()]),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:9"}, (), [()]),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (), [()]),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, (), [()]),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, (), []),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ("host:9", 1, 2), [("host:9", 2, 1)]),
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, (), []),
        ({}, ("host:9", 0, 1), [("host:9", 1, 0)]),
        # Where the launcher counts the processes, the first one is enough.
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, ("host:9",), [("host:9", 4, 3)]),
        ({"WORLD_SIZE": "4", "RANK": "3"}, ("host:9",), [("host:9", 4, 3)]),
    ],
)
def test_processes_join_when_they_are_named_or_a_launcher_started_several(monkeypatch, environment, arguments, joined):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, **_: calls.append(given))
    monkeypatch.setattr(processes, "_check_first", lambda coordinator: None)
    for name in (*LAUNCHERS, "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    processes.start(*arguments)
    assert calls == joined


def test_processes_that_launcher_and_jax_do_not_both_know_say_how_to_name_them(monkeypatch):
    def unknown(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", unknown)
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in INDEXED.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(RuntimeError, match=r"coordinator_address should be defined.*install jax\[k8s\], or name them"):
        processes.start()
    processes.start(separate=True)  # a part was given: separate programs


def test_a_process_number_that_is_not_the_launchers_is_refused(monkeypatch):
    """In one command line for all processes, each would be process 0."""
    for name, value in {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"process_id=0 is given to process 1 of Open MPI; remove --process-id"):
        processes.start("localhost:1", 0, 2)


@pytest.mark.parametrize("coordinator", ["localhost", "localhost:", ":1", "localhost:http"])
def test_an_address_without_a_port_is_refused(coordinator):
    with pytest.raises(ValueError, match=f"coordinator='{coordinator}' must be HOST:PORT"):
        processes.start(coordinator, 0, 2)


def test_a_port_in_use_is_refused_by_the_first_process():
    """JAX would wait for five minutes, or join the processes of another program."""
    with processes._listen() as other:
        port = other.getsockname()[1]
        with pytest.raises(ValueError, match=rf"coordinator='localhost:{port}': process 0 cannot use this port"):
            processes.start(f"localhost:{port}", 0, 2)


@pytest.mark.parametrize(("host", "warned"), [("localhost", False), ("192.0.2.99", True)])
def test_the_address_of_another_host_is_warned_about(monkeypatch, capsys, host, warned):
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    processes.start(f"{host}:{free_port()}", 0, 2)
    assert (f"and {host} is not an address of it" in capsys.readouterr().err) == warned


@pytest.fixture
def mpi4py(monkeypatch):
    """Install an mpi4py that counts this many processes, or none."""

    def install(count):
        module = None if count is None else types.ModuleType("mpi4py.MPI")
        if module:
            module.COMM_WORLD = types.SimpleNamespace(Get_size=lambda: count)
        monkeypatch.setitem(sys.modules, "mpi4py.MPI", module)

    return install


MPICH = {"PMI_SIZE": "2", "PMI_RANK": "1", "MPI_LOCALNRANKS": "2", "MPI_LOCALRANKID": "1"}
OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1"}


@pytest.mark.parametrize("environment", [MPICH, OPEN_MPI])
def test_processes_of_mpi_join_through_mpi4py(monkeypatch, mpi4py, environment):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **given: calls.append(given["cluster_detection_method"]))
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mpi4py(2)
    processes.start()
    assert calls == ["mpi4py"]


@pytest.mark.parametrize(
    ("environment", "count", "message"),
    [
        (
            MPICH,
            None,
            r"mpiexec started 2 processes, but JAX cannot join them \(.*mpi4py.*\); install mpi4py .*, or add",
        ),
        (OPEN_MPI, 1, r"Open MPI started 2 processes.*mpi4py counts 1.*install mpi4py"),
        # mpirun with a list of hosts that its own is not in.
        (
            {**OPEN_MPI, "OMPI_COMM_WORLD_RANK": "0", "OMPI_MCA_orte_local_daemon_uri": "18.1;tcp://10.77.0.3:5016",
             "OMPI_MCA_orte_hnp_uri": "18.0;tcp://192.0.2.2,10.77.0.254:5576"},
            2,
            r"Open MPI 4 started 2 processes.*\(mpirun does not run on the host of process 0\); add --coordinator",
        ),
        ({"RANK": "1", "WORLD_SIZE": "2"}, None, r"torchrun started 2 processes.*add --coordinator HOST:PORT"),
    ],
)  # fmt: skip
def test_processes_that_jax_cannot_join_do_not_run_alone(monkeypatch, mpi4py, environment, count, message):
    """Each would compute the whole study."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda **_: pytest.fail("joined"))
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    mpi4py(count)
    with pytest.raises(RuntimeError, match=message):
        processes.start()


PEER = """
    import socket, sys, threading
    from experiments.training import processes
    mine, other = socket.socketpair()
    processes._watch(mine)
    {end}
    threading.Event().wait(300)
"""


@pytest.fixture
def meeting(monkeypatch):
    """Watch no process; yield the list of the connections that would be watched."""
    monkeypatch.setattr(processes, "_CONNECTIONS", [])
    monkeypatch.setattr(processes, "_watch", processes._CONNECTIONS.append)
    yield processes._CONNECTIONS
    for connection in processes._CONNECTIONS:
        connection.close()


def test_processes_meet_under_the_first_name_that_works_and_turn_strangers_away(meeting, monkeypatch):
    """A port scanner connects and sends nothing useful; the name of the first process is unknown."""
    connect = socket.create_connection

    def without_name_service(address, **options):
        if address[0] == "nowhere.invalid":
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return connect(address, **options)

    monkeypatch.setattr(socket, "create_connection", without_name_service)
    with processes._listen() as listening, socket.create_connection(("127.0.0.1", listening.getsockname()[1])) as other:
        other.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with futures.ThreadPoolExecutor() as pool:
            accepted = pool.submit(processes._accept, listening, 1, b"the right token!")
            port = listening.getsockname()[1]
            assert processes._connect(["nowhere.invalid", "127.0.0.1"], port, b"the right token!")
            assert accepted.result()
        assert len(meeting) == 2  # both ends


def test_a_process_that_never_connects_is_waited_for_no_longer_than_the_limit(meeting, monkeypatch):
    monkeypatch.setattr(processes, "_MEETING_SECONDS", 0.2)
    with processes._listen() as listening:
        assert not processes._accept(listening, 1, b"token")
    assert not meeting


@pytest.mark.skipif(not hasattr(socket, "TCP_KEEPIDLE"), reason="the system has no such option")
def test_a_host_that_fails_is_missed_before_jax_ends_the_processes(monkeypatch):
    """JAX takes some 95 seconds, and ends with a stack trace."""
    monkeypatch.setattr(processes, "_CONNECTIONS", [])
    monkeypatch.setattr(processes.threading, "Thread", lambda **_: types.SimpleNamespace(start=lambda: None))
    with socket.socket() as connection:
        processes._watch(connection)
        assert connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        idle, interval, count = (
            connection.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
    assert idle + interval * count == 60


@pytest.mark.slow
@pytest.mark.parametrize(("end", "status"), [("other.close()", 1), ("other.sendall(b'done'); sys.exit(0)", 0)])
def test_a_process_ends_with_a_sentence_when_another_one_is_killed(end, status):
    script = textwrap.dedent(PEER).format(end=end)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False, env=dict(os.environ)
    )
    assert done.returncode == status
    assert ("another process of this program has ended" in done.stderr) == bool(status)
