"""Joining the processes of one program: detection of launchers, devices of a process, parts of a study."""

import os
import subprocess
import sys
import textwrap

import jax
import pytest

from experiments.training import processes

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
        # Slurm gave every task its own GPUs (--gpus-per-task): all that it sees are its own.
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
def test_a_process_uses_the_gpus_that_are_its_own(environment, node, expected):
    assert processes.local_gpus(environment, node) == expected


@pytest.mark.parametrize(
    ("given", "environment", "one_program", "part"),
    [
        (None, {}, True, (0, 1)),
        ("2/4", {}, True, (2, 4)),
        (None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "8"}, True, (3, 8)),
        (
            None,
            {"SLURM_ARRAY_TASK_ID": "5", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4",
             "SLURM_ARRAY_TASK_STEP": "2"},
            True,
            (2, 4),
        ),
        # The processes of one program share a part; independent ones divide it.
        (None, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, True, (0, 1)),
        (None, {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, False, (1, 2)),
        (None, {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "3"}, False, (3, 4)),
    ],
)  # fmt: skip
def test_the_part_of_a_run(given, environment, one_program, part):
    assert processes.shard_of(given, environment, one_program=one_program)[0] == part


@pytest.mark.parametrize("one_program", [True, False])
def test_a_shard_given_to_several_processes_of_a_launcher_is_refused(one_program):
    with pytest.raises(ValueError, match=r"shard='0/2' cannot be combined with 2 processes from one launcher"):
        processes.shard_of("0/2", {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, one_program=one_program)


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
    threading.Event().wait(30)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("end", "status"), [("other.close()", 1), ("other.sendall(b'done'); sys.exit(0)", 0)])
def test_a_process_ends_with_a_sentence_when_another_one_is_killed(end, status):
    script = textwrap.dedent(PEER).format(end=end)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False, env=dict(os.environ)
    )
    assert done.returncode == status
    assert ("another process of this program has ended" in done.stderr) == bool(status)
