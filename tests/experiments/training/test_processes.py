"""Joining the processes of one program: detection of launchers, devices of a process, parts of a study."""

import os
import socket
import subprocess
import sys
import textwrap
from concurrent import futures

import jax
import pytest

from experiments.training import processes

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
        ({"OMPI_COMM_WORLD_SIZE": "2"}, (), [()]),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, (), [()]),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, (), [()]),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, (), []),
        ({"SLURM_STEP_NUM_TASKS": "4"}, ("host:9", 1, 2), [("host:9", 2, 1)]),
        ({"OMPI_COMM_WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2"}, (), []),
        ({}, ("host:9", 0, 1), [("host:9", 1, 0)]),
    ],
)
def test_processes_join_when_they_are_named_or_a_launcher_started_several(monkeypatch, environment, arguments, joined):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *given, local_device_ids: calls.append(given))
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


EIGHT = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("environment", "node", "expected"),
    [
        ({}, 0, None),
        ({}, 8, list(range(8))),
        ({"CUDA_VISIBLE_DEVICES": ""}, 8, None),
        # One task a node with eight GPUs uses eight.
        ({"SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}, 8, list(range(8))),
        # Eight tasks on a node that all see eight GPUs use one each.
        ({"SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": EIGHT}, 8, [5]),
        # Four tasks of two GPUs each.
        ({"SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": EIGHT}, 8, [2, 3]),
        # Two of a node's eight GPUs are the step's (--gpus-per-node=2); both tasks see both.
        (
            {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1",
             "SLURM_GPUS_ON_NODE": "2"},
            8,
            [1],
        ),
        # Slurm gave every task its own GPUs (--gpus-per-task): all that it sees are its own.
        (
            {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "2,3",
             "SLURM_GPUS_ON_NODE": "4"},
            8,
            [0, 1],
        ),
        (
            {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3",
             "SLURM_GPUS_ON_NODE": "8"},
            4,
            [0, 1, 2, 3],
        ),
        ({"SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "5"}, 8, [0]),
        # Several processes on one GPU.
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "3"}, 1, [0]),
        ({"OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"}, 8, [4, 5, 6, 7]),
        ({"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}, 4, [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_a_process_uses_its_own_gpus(environment, node, expected):
    assert processes.local_gpus(environment, node) == expected


def array(task, low, high, step, count):
    """The variables of a task of a Slurm array, as Slurm 22.05 sets them."""
    numbers = {"ID": task, "MIN": low, "MAX": high, "STEP": step, "COUNT": count}
    return {f"SLURM_ARRAY_TASK_{name}": str(number) for name, number in numbers.items()}


@pytest.mark.parametrize(
    ("given", "environment", "one_program", "part"),
    [
        (None, {}, True, (0, 1)),
        ("2/4", {}, True, (2, 4)),
        (None, array(3, 0, 7, 1, 8), True, (3, 8)),
        (None, array(5, 1, 7, 2, 4), True, (2, 4)),
        (None, array(3, 3, 3, 1, 1), True, (0, 1)),
        # The processes of one program share a part; independent ones divide it.
        (None, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, True, (0, 1)),
        (None, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, False, (1, 2)),
        (None, {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, False, (3, 4)),
        # mpirun in a Slurm job: the Slurm variables are those of the daemon that mpirun started on the node.
        (
            None,
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3", "SLURM_PROCID": "1",
             "SLURM_STEP_NUM_TASKS": "2"},
            False,
            (3, 4),
        ),
        (None, {**array(1, 0, 1, 1, 2), "SLURM_STEP_NUM_TASKS": "3", "SLURM_PROCID": "2"}, False, (5, 6)),
        (None, {"TPU_WORKER_HOSTNAMES": "a,b,c,d", "TPU_WORKER_ID": "2"}, False, (2, 4)),
        # An indexed job does not say how many processes it has: all compute everything, and claims divide the stages.
        (None, INDEXED, False, (0, 1)),
        ("1/4", INDEXED, True, (1, 4)),
        ("1/4", INDEXED, False, (1, 4)),
    ],
)  # fmt: skip
def test_the_part_of_a_run(given, environment, one_program, part):
    assert processes.shard_of(given, environment, one_program=one_program)[0] == part


@pytest.mark.parametrize("one_program", [True, False])
def test_a_shard_given_to_several_processes_of_a_launcher_is_refused(one_program):
    with pytest.raises(ValueError, match=r"shard='0/2' cannot be combined with 2 processes from one launcher"):
        processes.shard_of("0/2", {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, one_program=one_program)


@pytest.mark.parametrize("numbers", [(3, 3, 7, 1, 2), (7, 3, 7, 1, 2), (4, 0, 4, 1, 3)])
def test_tasks_of_a_list_name_no_part(numbers):
    """For --array=3,7 and --array=0,2,4 Slurm reports a step of 1."""
    with pytest.raises(
        ValueError, match=rf"SLURM_ARRAY_TASK_ID={numbers[0]} of \d tasks .* names no part.*give the part"
    ):
        processes.shard_of(None, array(*numbers))
    assert processes.shard_of("3/10", array(*numbers)) == ((3, 10), "part 3/10 from --shard")


@pytest.mark.parametrize("shard", ["2/2", "half", "-1/2", "1/2/3", "/", "1/"])
def test_a_shard_that_does_not_exist_is_refused(shard):
    assert processes.parse_shard("3/4") == (3, 4)
    with pytest.raises(ValueError, match=f"shard='{shard}' must be i/n with 0 <= i < n"):
        processes.parse_shard(shard)


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


@pytest.mark.slow
@pytest.mark.parametrize(("end", "status"), [("other.close()", 1), ("other.sendall(b'done'); sys.exit(0)", 0)])
def test_a_process_ends_with_a_sentence_when_another_one_is_killed(end, status):
    script = textwrap.dedent(PEER).format(end=end)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=600, check=False, env=dict(os.environ)
    )
    assert done.returncode == status
    assert ("another process of this program has ended" in done.stderr) == bool(status)
