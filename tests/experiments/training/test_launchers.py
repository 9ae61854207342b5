"""What launchers say in the environment: number of processes, GPUs of a process, parts of a study."""

import pytest

from experiments.training import launchers

INDEXED = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "1"}
SLURM = {"SLURM_STEP_NUM_TASKS": "16"}


def variables(text):
    """Return environment variables from a text of NAME=value."""
    return dict(one.split("=", 1) for one in text.split())


# As these launchers set them for process 2 of 4 on two nodes, in a job of Slurm 22.05 with four tasks.
JOB = "SLURM_JOB_ID=3 SLURM_NODELIST=n[1-2] SLURM_LOCALID=0 SLURM_NODEID=0 SLURM_PROCID=0 "
DAEMON = "SLURM_STEP_ID=2 SLURM_STEP_NODELIST=n[1-2] SLURM_STEP_NUM_TASKS=2 SLURM_STEP_TASKS_PER_NODE=1(x2) "
OMPI = (
    "OMPI_COMM_WORLD_SIZE=4 OMPI_COMM_WORLD_RANK=2 OMPI_COMM_WORLD_LOCAL_SIZE=3 OMPI_COMM_WORLD_LOCAL_RANK=1 "
    "SLURM_NTASKS=4 SLURM_TASKS_PER_NODE=3,1 PMIX_RANK=2 "
)
RECORDED = {
    "Slurm 22.05": JOB.replace("PROCID=0", "PROCID=2").replace("LOCALID=0", "LOCALID=2")
    + "SLURM_NTASKS=4 SLURM_STEP_ID=4 SLURM_STEP_NODELIST=n[1-2] SLURM_STEP_NUM_TASKS=4 SLURM_STEP_TASKS_PER_NODE=3,1 "
    "PMI_FD=15 PMI_JOBID=3.4 PMI_RANK=2 PMI_SIZE=4",  # with --mpi=pmi2
    "Open MPI 4.1": JOB + OMPI + "OMPI_MCA_orte_hnp_uri=623968256.0;tcp://10.77.0.1:57395",
    "Open MPI 5.0": JOB + OMPI + "PMIX_NAMESPACE=prterun-n1-15457@1 PRTE_LAUNCHED=1",
    "MPICH 4.0": JOB.replace("PROCID=0", "PROCID=1").replace("NODEID=0", "NODEID=1")
    + DAEMON
    + "SLURM_NTASKS=4 MPI_LOCALNRANKS=2 MPI_LOCALRANKID=0 PMI_FD=5 PMI_RANK=2 PMI_SIZE=4",
    "torchrun 2.13": "GROUP_RANK=0 GROUP_WORLD_SIZE=1 LOCAL_RANK=2 LOCAL_WORLD_SIZE=4 MASTER_ADDR=localhost "
    "MASTER_PORT=43999 RANK=2 ROLE_RANK=2 ROLE_WORLD_SIZE=4 TORCHELASTIC_RUN_ID=2e2a3be0-4125 WORLD_SIZE=4",
}


@pytest.mark.parametrize(
    ("recorded", "name", "local"),
    [
        ("Slurm 22.05", "Slurm", (3, 2)),
        ("Open MPI 4.1", "Open MPI 4", (3, 1)),
        ("Open MPI 5.0", "Open MPI", (3, 1)),
        ("MPICH 4.0", "mpiexec", (2, 0)),
        ("torchrun 2.13", "torchrun", (4, 2)),
    ],
)
def test_every_launcher_tells_the_number_of_a_process(recorded, name, local):
    environment = variables(RECORDED[recorded])
    assert launchers.launcher_of(environment) == (name, 4, 2, *local)
    assert launchers.shard_of(None, environment, one_program=False)[0] == (2, 4)
    with pytest.raises(ValueError, match=r"shard='0/2' cannot be combined with 4 processes from one launcher"):
        launchers.shard_of("0/2", environment)


def test_the_script_of_a_job_and_a_process_that_was_started_alone_have_no_launcher():
    job = variables(JOB + "SLURM_NTASKS=4 SLURM_TASKS_PER_NODE=3,1")
    assert launchers.launcher_of(job) is None
    assert launchers.launcher_of({**job, **variables(DAEMON), "OMPI_COMM_WORLD_SIZE": "1"}) is None
    assert launchers.launcher_of({"WORLD_SIZE": "4"}) is None


def test_another_mpiexec_is_known_by_two_variables():
    assert launchers.launcher_of({"PMI_RANK": "3", "PMI_SIZE": "4"}) == ("mpiexec", 4, 3, 1, 0)


def test_other_launchers_of_pytorch_are_known_by_two_variables():
    assert launchers.launcher_of({"RANK": "3", "WORLD_SIZE": "4"}) == ("torchrun", 4, 3, 1, 0)


EIGHT = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("environment", "node", "expected"),
    [
        ({}, 0, None),
        ({}, 8, list(range(8))),
        ({"CUDA_VISIBLE_DEVICES": ""}, 8, None),
        # One task a node with eight GPUs uses eight.
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "1(x4)", "SLURM_NODEID": "2", "SLURM_LOCALID": "0"}, 8, list(range(8))),
        # Eight tasks on a node that all see eight GPUs use one each.
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8(x2)", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": EIGHT}, 8, [5]),
        # Four tasks of two GPUs each.
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "4", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": EIGHT}, 8, [2, 3]),
        # Two of a node's eight GPUs are the step's (--gpus-per-node=2); both tasks see both.
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1",
             "SLURM_GPUS_ON_NODE": "2"},
            8,
            [1],
        ),
        # Slurm gave every task its own GPUs (--gpus-per-task): all that it sees are its own.
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "2,3",
             "SLURM_GPUS_ON_NODE": "4"},
            8,
            [0, 1],
        ),
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_LOCALID": "1", "CUDA_VISIBLE_DEVICES": "0,1,2,3",
             "SLURM_GPUS_ON_NODE": "8"},
            4,
            [0, 1, 2, 3],
        ),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "8", "SLURM_LOCALID": "5", "CUDA_VISIBLE_DEVICES": "5"}, 8, [0]),
        # Several processes on one GPU.
        ({"MPI_LOCALNRANKS": "4", "MPI_LOCALRANKID": "3", "PMI_SIZE": "4"}, 1, [0]),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            8,
            [4, 5, 6, 7],
        ),
        ({**SLURM, "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"}, 4, [0, 1, 2, 3]),
    ],
)  # fmt: skip
def test_a_process_uses_its_own_gpus(environment, node, expected):
    assert launchers.local_gpus(environment, node) == expected


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
    assert launchers.shard_of(given, environment, one_program=one_program)[0] == part


@pytest.mark.parametrize("one_program", [True, False])
def test_a_shard_given_to_several_processes_of_a_launcher_is_refused(one_program):
    with pytest.raises(ValueError, match=r"shard='0/2' cannot be combined with 2 processes from one launcher"):
        launchers.shard_of("0/2", {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, one_program=one_program)


@pytest.mark.parametrize("numbers", [(3, 3, 7, 1, 2), (7, 3, 7, 1, 2), (4, 0, 4, 1, 3)])
def test_tasks_of_a_list_name_no_part(numbers):
    """For --array=3,7 and --array=0,2,4 Slurm reports a step of 1."""
    with pytest.raises(
        ValueError, match=rf"SLURM_ARRAY_TASK_ID={numbers[0]} of \d tasks .* names no part.*give the part"
    ):
        launchers.shard_of(None, array(*numbers))
    assert launchers.shard_of("3/10", array(*numbers)) == ((3, 10), "part 3/10 from --shard")


@pytest.mark.parametrize("shard", ["2/2", "half", "-1/2", "1/2/3", "/", "1/"])
def test_a_shard_that_does_not_exist_is_refused(shard):
    assert launchers.parse_shard("3/4") == (3, 4)
    with pytest.raises(ValueError, match=f"shard='{shard}' must be i/n with 0 <= i < n"):
        launchers.parse_shard(shard)
