"""The studies under a real Slurm, MPI and torchrun, where they answer on this machine."""

import functools
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[2]
RECALL = [sys.executable, "-m", "experiments.recall_distortion"]
TINY = [
    *("--replicates", "2", "--ratios", "1", "4", "--scores", "magnitude", "random", "--jumpstart", "0"),
    *("--epochs", "2", "--finetune-epochs", "1"),
]
GRID = [sys.executable, "-m", "experiments.jumpstart_grid", "--epochs", "6", "--depths", "2", "--widths", "2", "3"]
GRID = [*GRID, "--groups", "2-3"]
MPIRUN = ["mpirun", "--oversubscribe", "-n", "2"]
STAGES = 4  # dense, control, magnitude and random at 4


@functools.cache
def answers(*command):
    """Whether a command of a launcher ends with status 0 within 30 seconds."""
    if shutil.which(command[0]) is None:
        return False
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    except subprocess.TimeoutExpired:
        return False


@pytest.fixture
def slurm():
    """Skip where no Slurm runs two tasks of a job."""
    if not answers("srun", "--immediate=20", "-n", "2", "true"):
        pytest.skip("no Slurm that answers: srun -n 2 true does not end with status 0")


@pytest.fixture
def mpi():
    """Skip where no Open MPI runs two processes."""
    if not answers(*MPIRUN, "true"):
        pytest.skip(f"no Open MPI that answers: {' '.join(MPIRUN)} true does not end with status 0")


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Run a command in the repository until it ends; all commands share a compilation cache."""
    cache = {
        "JAX_COMPILATION_CACHE_DIR": os.environ.get(
            "JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("programs"))
        ),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
        "PYTHONPATH": str(ROOT),
    }
    environment = {**os.environ, **cache}

    def to_the_end(*command, status=0):
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        printed = done.stdout + done.stderr
        assert (done.returncode == 0) == (status == 0), printed
        return printed

    to_the_end.environment = environment
    return to_the_end


@pytest.fixture(scope="module")
def single(run, tmp_path_factory):
    """The study in one process."""
    out = tmp_path_factory.mktemp("single") / "run"
    run(*RECALL, *TINY, "--out", str(out))
    return out


def assert_same_study(found, expected):
    """The tables of two studies are equal, bit for bit."""
    for name in ("alphas", "counts", "summary", "tests"):
        assert (found / f"{name}.csv").read_bytes() == (expected / f"{name}.csv").read_bytes(), name


def stages_begun(printed):
    return re.findall(r"%\] jumpstart 0: (.+), replicates", printed)


def test_the_tasks_of_one_srun_are_one_program_with_the_numbers_of_one_process(slurm, run, single, tmp_path):
    printed = run("srun", "-n", "2", *RECALL, *TINY, "--out", str(tmp_path / "run"))
    assert len(stages_begun(printed)) == STAGES, "each stage is computed once"
    assert_same_study(tmp_path / "run", single)


def test_the_processes_of_one_mpirun_are_one_program_with_the_numbers_of_one_process(mpi, run, single, tmp_path):
    printed = run(*MPIRUN, *RECALL, *TINY, "--out", str(tmp_path / "run"))
    assert len(stages_begun(printed)) == STAGES
    assert_same_study(tmp_path / "run", single)


# Open MPI 5 does not set the variable from which JAX learns the address of the first process.
OPEN_MPI_5 = [*MPIRUN, "env", "-u", "OMPI_MCA_orte_hnp_uri"]
HYDRA = ["mpiexec.hydra", "-n", "2"]
TORCHRUN = ["torchrun", "--nproc-per-node", "2", "--no-python"]


@pytest.fixture(params=[OPEN_MPI_5, HYDRA, TORCHRUN], ids=["Open MPI", "MPICH", "torchrun"])
def launcher(request, run, tmp_path):
    """A launcher that JAX does not know, and its name; an mpi4py that cannot be imported shadows others."""
    if not answers(*request.param, "true"):
        pytest.skip(f"{' '.join(request.param)} true does not end with status 0")
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").touch()
    name = {MPIRUN[0]: "Open MPI", HYDRA[0]: "mpiexec"}.get(request.param[0], "torchrun")
    shadowed = f"PYTHONPATH={tmp_path}:{ROOT}"
    return name, [*request.param, *([] if "env" in request.param else ["env"]), shadowed]


def test_processes_that_jax_cannot_join_say_how_to_join_them(run, launcher, tmp_path):
    name, command = launcher
    printed = run(*command, *RECALL, *TINY, "--out", str(tmp_path / "run"), status=1)
    assert printed.count(f"error: {name} started 2 processes, but JAX cannot join them") == 2
    assert "add --coordinator HOST:PORT with a free port on the host of process 0" in printed
    assert not (tmp_path / "run").exists()


def test_processes_of_every_launcher_join_the_first_one_that_is_named(run, launcher, single, tmp_path):
    _, command = launcher
    named = ["--coordinator", f"localhost:{free_port()}"]
    printed = run(*command, *RECALL, *TINY, "--out", str(tmp_path / "run"), *named)
    assert len(stages_begun(printed)) == STAGES
    assert_same_study(tmp_path / "run", single)


def test_processes_of_every_launcher_divide_a_grid(run, launcher, single_grid, tmp_path):
    _, command = launcher
    printed = run(*command, *GRID, "--out", str(tmp_path / "run"))
    assert "part 0/2 from the process number" in printed  # launchers may join the lines of two processes
    assert "part 1/2 from the process number" in printed
    pd.testing.assert_frame_equal(cells(tmp_path / "run"), single_grid)


def test_a_shard_for_each_task_of_one_srun_is_refused(slurm, run, tmp_path):
    command = " ".join([*RECALL, *TINY, "--out", str(tmp_path / "run"), "--shard", "$SLURM_PROCID/2"])
    printed = run("srun", "-n", "2", "bash", "-c", command, status=1)
    assert printed.count("cannot be combined with 2 processes from one launcher") == 2
    assert not (tmp_path / "run").exists()


def cells(out):
    return pd.read_csv(out / "cells.csv").drop(columns="seconds")


@pytest.fixture(scope="module")
def single_grid(run, tmp_path_factory):
    out = tmp_path_factory.mktemp("grid") / "run"
    run(*GRID, "--out", str(out))
    return cells(out)


def test_the_tasks_of_one_srun_divide_a_grid(slurm, run, single_grid, tmp_path):
    printed = run("srun", "-n", "2", *GRID, "--out", str(tmp_path / "run"))
    assert {"part 0/2 from the process number", "part 1/2 from the process number"} <= set(printed.splitlines())
    pd.testing.assert_frame_equal(cells(tmp_path / "run"), single_grid)


def test_the_processes_of_mpirun_in_a_slurm_job_divide_a_grid(slurm, mpi, run, single_grid, tmp_path):
    """With this launcher all processes of a node have the Slurm variables of its first task."""
    wrapped = " ".join(["mpirun", "-n", "2", *GRID, "--out", str(tmp_path / "run")])
    run("sbatch", "--wait", "-N1", "-n2", "-o", str(tmp_path / "log"), "--wrap", wrapped)
    assert "part 1/2 from the process number" in (tmp_path / "log").read_text()
    pd.testing.assert_frame_equal(cells(tmp_path / "run"), single_grid)


def test_the_tasks_of_an_array_compute_their_parts(slurm, run, single, tmp_path):
    """Three tasks, two replicates: one part is empty, and its task ends with status 0."""
    wrapped = " ".join([*RECALL, *TINY, "--out", str(tmp_path / "run")])
    run("sbatch", "--wait", "--array=1-5:2", "-o", str(tmp_path / "log-%a"), "--wrap", wrapped)
    logs = [(tmp_path / f"log-{task}").read_text() for task in (1, 3, 5)]
    assert "part 0/3 of 2 replicates is empty: nothing to compute" in logs[0]
    assert len(stages_begun(logs[1])) == len(stages_begun(logs[2])) == STAGES
    found, expected = (pd.read_csv(out / "counts.csv") for out in (tmp_path / "run", single))
    pd.testing.assert_frame_equal(found, expected)


@pytest.mark.parametrize("command", [RECALL, GRID], ids=["recall", "grid"])
def test_a_list_of_tasks_that_names_no_parts_is_refused(slurm, run, command, tmp_path):
    wrapped = " ".join([*command, "--out", str(tmp_path / "run")])
    run("sbatch", "--wait", "--array=3,7", "-o", str(tmp_path / "log-%a"), "--wrap", wrapped, status=1)
    for task in (3, 7):
        assert (
            f"SLURM_ARRAY_TASK_ID={task} of 2 tasks between 3 and 7 names no part"
            in (tmp_path / f"log-{task}").read_text()
        )


def test_launched_jobs_compute_every_part_once(slurm, run, single, tmp_path):
    """The jobs are submitted from inside a job, whose limits they must not inherit."""
    pytest.importorskip("submitit", reason="needs the extra cluster")
    out = tmp_path / "launched"
    options = ["--launch", "slurm", "--jobs", "2", "--cpus", "1"]
    run("srun", "-n", "1", "--mem-per-cpu=100", *RECALL, *TINY, "--out", str(out), *options)
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and len(list(out.glob("jobs/*_result.pkl"))) < 2:
        time.sleep(1)
    logs = "".join(path.read_text() for path in out.glob("jobs/*.out"))
    assert len(stages_begun(logs)) == 2 * STAGES, "\n".join(path.read_text() for path in out.glob("jobs/*.err"))
    run(*RECALL, "report", "--out", str(out))
    found, expected = (pd.read_csv(folder / "counts.csv") for folder in (out, single))
    pd.testing.assert_frame_equal(found, expected)


def task_of(out, rank):
    """Return the id of the process of this rank that writes into a folder, or None."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            arguments, environment = ((entry / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
        except OSError:
            continue
        if str(out).encode() in arguments and arguments[1] == b"-m" and f"SLURM_PROCID={rank}".encode() in environment:
            return int(entry.name)
    raise AssertionError(f"no task {rank}")


def test_two_programs_of_one_slurm_job_do_not_meet(slurm, run, single, tmp_path):
    step = "srun --overlap -n 2 " + " ".join([*RECALL, *TINY, "--out"])
    script = f"{step} {tmp_path}/a & first=$!; {step} {tmp_path}/b && wait $first"
    run("sbatch", "--wait", "-N1", "-n2", "-o", str(tmp_path / "log"), "--wrap", script)
    for name in "ab":
        assert_same_study(tmp_path / name, single)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_task_ends_the_others_within_seconds(slurm, run, rank, tmp_path):
    out = tmp_path / "run"
    command = ["srun", "--no-kill", "-n", "2", *RECALL, *TINY, "--epochs", "100000", "--out", str(out)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=run.environment, **pipes) as process:
        while "dense training" not in process.stdout.readline():
            assert process.poll() is None
        os.kill(task_of(out, rank), signal.SIGKILL)
        killed = time.monotonic()
        printed, _ = process.communicate(timeout=600)
    assert time.monotonic() - killed < 60  # a second on an idle machine; by JAX's heartbeat alone it takes 100
    assert process.returncode != 0
    assert "error: another process of this program has ended" in printed


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_in_one_task_ends_the_others_within_seconds(slurm, run, rank, tmp_path):
    """The data of one task are missing; unless it tells the others, they wait five minutes for it."""
    data = tmp_path / f"data-{1 - rank}.npz"
    make = f"""
import numpy as np
x = np.random.default_rng(0).random((200, 8), np.float32)
np.savez({str(data)!r}, x_train=x, y_train=np.arange(200) % 3)
"""
    run(sys.executable, "-c", make)
    command = " ".join(
        [
            *RECALL,
            *TINY,
            "--batch",
            "32",
            "--dataset",
            f"npz:{tmp_path}/data-$SLURM_PROCID.npz",
            "--out",
            str(tmp_path / "run"),
        ]
    )
    began = time.monotonic()
    printed = run("srun", "-n", "2", "bash", "-c", command, status=1)
    assert time.monotonic() - began < 120
    assert f"data-{rank}.npz" in printed
    assert "error: another process of this program has ended" in printed
