"""The study as processes of the system: killed and resumed, several on one folder, and as one over loopback."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from tests.ports import free_port

ROOT = Path(__file__).parents[3]
TINY = [
    *("--replicates", "2", "--ratios", "1", "4", "--scores", "magnitude", "random", "--jumpstart", "0"),
    *("--epochs", "2", "--finetune-epochs", "1", "--chunk", "2"),
]
STAGES = 4  # dense, control, magnitude and random at 4
MINIMAL = ["--ratios", "4", "--scores", "magnitude", "--epochs", "40", "--checkpoint-minutes", "0"]
KILLS, MIDWAY = 8, 3  # at least; as many more as it takes to hit the study midway

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Start the command line in another process; all processes share a compilation cache."""
    programs = tmp_path_factory.mktemp("programs")
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(programs),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }

    started = []

    def begin(out, *arguments, devices=1):
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
        command = [sys.executable, "-m", "experiments.recall_distortion", *TINY, "--out", str(out), *arguments]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        started.append(subprocess.Popen(command, cwd=ROOT, env={**os.environ, **cache, **flags}, **pipes))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()  # a test may have read it to its end, which closes it too


def finish(process):
    """Wait for success and return the printed text."""
    printed, _ = process.communicate(timeout=1800)
    assert process.returncode == 0, printed
    return printed


def stages_run(printed):
    return re.findall(r"%\] jumpstart 0: (.+), replicates", printed)


def tables(out):
    return {name: pd.read_csv(out / f"{name}.csv") for name in ("alphas", "counts", "summary", "tests")}


def assert_same(found, expected):
    for name, table in expected.items():
        pd.testing.assert_frame_equal(found[name], table, check_exact=True)


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """The tables of a study that nothing disturbs, and the seconds before its first stage and of each stage.

    The first run compiles; the second is the one that is timed.
    """
    finish(start(tmp_path_factory.mktemp("first") / "run"))
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    began = time.monotonic()
    printed = finish(start(out))
    seconds = time.monotonic() - began
    begun = [float(stamp) for stamp in re.findall(r"\[ *([\d.]+) s, .+%\] jumpstart", printed)]
    assert len(begun) == STAGES
    return tables(out), (seconds - begun[-1], (begun[-1] - begun[0]) / (STAGES - 1))


def kill_at_random(process, moments, before, each):
    """Kill it at a random moment after it has begun a random number of stages, none among them.

    The moment counts from what the process prints, so that it falls into the study on a loaded machine too.
    """
    begun = moments.randrange(STAGES + 1)
    wait = moments.uniform(0, 2 * each if begun else before)
    while begun > 0 and (line := process.stdout.readline()):
        begun -= len(stages_run(line))
    time.sleep(wait)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def test_killed_at_any_moment_it_finishes_with_the_same_numbers_and_redoes_no_stage(start, undisturbed, tmp_path):
    expected, seconds = undisturbed
    moments = random.Random(0)
    stopped_midway = 0
    trial = 0
    while trial < KILLS or stopped_midway < MIDWAY:
        assert trial < 5 * KILLS, f"only {stopped_midway} kills hit the study, not its start or end"
        out, trial = tmp_path / str(trial), trial + 1
        kill_at_random(start(out), moments, *seconds)
        done = {path: path.stat().st_mtime_ns for path in out.glob("store/*/?????-?????")}
        pruned_or_dense = [path for path in done if not path.parent.name.startswith("data-")]
        printed = finish(start(out))
        assert len(stages_run(printed)) == STAGES - len(pruned_or_dense), "what was done is not done again"
        assert {path: path.stat().st_mtime_ns for path in done} == done
        assert_same(tables(out), expected)
        stopped_midway += 0 < len(pruned_or_dense) < STAGES


def test_killed_within_a_stage_it_continues_from_the_checkpoint_with_the_same_numbers(start, tmp_path):
    options = ("--epochs", "40", "--checkpoint-minutes", "0")
    finish(start(tmp_path / "whole", *options))
    store = tmp_path / "parts" / "store"
    kill_after_a_checkpoint([start(tmp_path / "parts", *options)], tmp_path / "parts")
    printed = finish(start(tmp_path / "parts", *options))
    (after,) = re.findall(r"dense training, replicates 0 to 1, after epoch (\d+) of a killed run", printed)
    assert 1 <= int(after) < 40
    assert_same(tables(tmp_path / "parts"), tables(tmp_path / "whole"))
    assert not list(store.glob("*_after_*")), "it is deleted when its stage is stored"


def kill_after_a_checkpoint(processes, out):
    """Kill the processes of a program within dense training, once a checkpoint is stored."""
    store = out / "store"
    while not list(store.glob("dense_after_*/00000-00002")):
        assert all(process.poll() is None for process in processes), "it ended before it could be killed"
        time.sleep(0.005)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    assert list(store.glob("dense_after_*/00000-00002"))
    assert not list(store.glob("dense-*/00000-00002")), "killed after the stage, not within it"


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The tables of a study of one short stage more than dense training, by one process that nothing interrupts."""
    out = tmp_path_factory.mktemp("whole") / "run"
    finish(start(out, *MINIMAL))
    return tables(out)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1)])
def test_the_checkpoint_of_one_process_is_continued_by_two_and_that_of_two_by_one(
    start, whole, tmp_path, before, after
):
    out = tmp_path / "run"

    def program(processes):
        address = f"127.0.0.1:{free_port()}"
        together = ["--coordinator", address, "--num-processes", "2", "--process-id"]
        own = [[*together, str(i)] for i in range(2)] if processes == 2 else [[]]
        return [start(out, *MINIMAL, *each) for each in own]

    kill_after_a_checkpoint(program(before), out)
    printed, *_ = [finish(process) for process in program(after)]
    (epoch,) = re.findall(r"dense training, replicates 0 to 1, after epoch (\d+) of a killed run", printed)
    assert 1 <= int(epoch) < 40
    found = tables(out)
    # One process computes both replicates in a program, each of two processes one: equal to float tolerance.
    pd.testing.assert_frame_equal(found["counts"], whole["counts"])
    pd.testing.assert_frame_equal(found["alphas"], whole["alphas"], rtol=1e-6)


def test_two_processes_on_one_store_do_not_harm_each_other(start, undisturbed, tmp_path):
    both = [start(tmp_path / "run"), start(tmp_path / "run")]
    for process in both:
        finish(process)
    assert_same(tables(tmp_path / "run"), undisturbed[0])


def test_shards_make_one_study_in_one_folder(start, undisturbed, tmp_path):
    shards = [start(tmp_path / "run", "--shard", f"{i}/2") for i in range(2)]
    first, second = map(finish, shards)
    assert first.count("replicates 0 to 0\n") == second.count("replicates 1 to 1\n") == STAGES
    finish(start(tmp_path / "run", "report"))
    found, expected = tables(tmp_path / "run"), undisturbed[0]
    # Blocks of one and of two replicates are different programs: equal to float tolerance.
    pd.testing.assert_frame_equal(found["counts"], expected["counts"])
    pd.testing.assert_frame_equal(found["alphas"], expected["alphas"], rtol=1e-6)


def test_two_processes_over_loopback_give_the_numbers_of_one(start, undisturbed, tmp_path):
    together = ["--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    both = [start(tmp_path / "run", *together, str(i), devices=2) for i in range(2)]
    first, second = map(finish, both)
    assert stages_run(first) == ["dense training", "no pruning (control)", "magnitude, t = 4", "random, t = 4"]
    assert stages_run(second) == [], "one process tells what happens"
    assert_same({"counts": tables(tmp_path / "run")["counts"]}, {"counts": undisturbed[0]["counts"]})
    pd.testing.assert_frame_equal(tables(tmp_path / "run")["alphas"], undisturbed[0]["alphas"], rtol=1e-6)


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_killed_process_ends_the_other_one_within_seconds(start, tmp_path, name):
    """Two processes run one program; the second is killed while the first trains."""
    together = ["--epochs", "300", "--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", "2", "--process-id"]
    first, second = (start(tmp_path / "run", *together, str(i)) for i in range(2))
    while "dense training" not in first.stdout.readline():
        assert first.poll() is None
    second.send_signal(getattr(signal, name))
    killed = time.monotonic()
    printed, _ = first.communicate(timeout=600)
    assert time.monotonic() - killed < 60  # a second on an idle machine; by JAX's heartbeat alone it takes 100
    assert first.returncode == 1
    assert "error: another process of this program has ended" in printed
    assert second.wait() == -getattr(signal, name)
