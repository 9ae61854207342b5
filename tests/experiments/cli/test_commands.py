"""How a study's command line ends."""

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli import commands, launch, progress, refusals
from experiments.cli.commands import ClusterOptions, exit_status
from experiments.recall_distortion import __main__ as recall_distortion

ROOT = Path(__file__).parents[3]


def raising(error):
    def work():
        print("begun")
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "printed"),
    [
        (ValueError("preset='nix' is unknown"), 1, "error: preset='nix' is unknown\n"),
        (OSError("no space"), 1, "error: no space\n"),
        (ImportError("pip install 'jprune[experiments]'"), 1, "error: pip install 'jprune[experiments]'\n"),
        (KeyboardInterrupt(), 130, "interrupted; rerun the same command to resume\n"),
    ],
)
def test_an_error_is_one_line(capsys, error, status, printed):
    assert exit_status(raising(error)) == status
    assert capsys.readouterr().err == printed


def test_an_internal_error_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(raising(ZeroDivisionError()))


def test_a_command_that_works_ends_with_0(capsys):
    assert exit_status(lambda: print("done")) == 0
    assert capsys.readouterr() == ("done\n", "")


def assert_ends_quietly(*arguments):
    """Run Python with a standard output that nobody reads; printed lines stay in its buffer until the end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen([sys.executable, *arguments], env=environment, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("work", [pytest.param("print('x')", marks=pytest.mark.slow), "(print('help'), sys.exit(0))"])
def test_a_closed_pipe_ends_it_quietly(work):
    program = f"import sys; from experiments.cli.commands import exit_status; sys.exit(exit_status(lambda: {work}))"
    assert_ends_quietly("-c", program)


COMMANDS = [f"experiments.{name}" for name in ("reproduction", "recall_distortion", "jumpstart_grid")]


@pytest.mark.parametrize(
    "module", ["experiments.data", *(pytest.param(name, marks=pytest.mark.slow) for name in [*COMMANDS, "benchmarks"])]
)
def test_help_is_quiet_if_the_reader_closed_the_pipe(module):
    assert_ends_quietly("-m", module, "--help")


def test_help_has_no_line_break_of_the_source_and_says_only_what_a_reader_needs(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        commands.parse(ClusterOptions, ClusterOptions(), ["--help"], "demo")
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "--shard STR i/n: compute" in text
    assert "the part of this task. (optional)" in text
    assert "--launch {slurm,local} Submit" in text
    assert "an equal part. (default: 1)" in text
    assert "None" not in text
    assert commands.parse(ClusterOptions, ClusterOptions(shard="0/2"), ["--shard", "None"], "demo").shard is None
    for field in dataclasses.fields(ClusterOptions):
        assert "\n" not in field.metadata["help"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--epochs 3 abc", "--epochs 3 abc: 'abc' is not a whole number; give whole numbers, separated by spaces"),
        ("--batch 1.5", "--batch 1.5: '1.5' is not a whole number; give one"),
        ("--limit", "--limit: no value; give a whole number"),
        ("--image-size 3", "--image-size 3: 1 value; give 2 whole numbers, separated by spaces"),
        ("--form blah", "--form blah: 'blah' must be vmap, map or unroll"),
        ("--epohcs 3", "--epohcs is not an option; did you mean --epochs? --help lists the options"),
        ("--augment yes", "'yes' is not an action, which is run, status or report; --augment takes no value"),
        ("--lr .1 status", "--lr .1 status: 'status' is not a number; give numbers, separated by spaces. Put status "
         "before the options"),
        ("--preset", "--preset: no value; give a string"),
        ("--jobs 0", "jobs=0 must be at least 1"),
        ("--out=", "--out '': '' is not a path; give one"),
        ("--compare=", "--compare '': '' is not a path; give paths, separated by spaces"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_in_one_line(capsys, given, message):
    assert recall_distortion.main(given.split()) == 2
    assert capsys.readouterr() == ("", f"error: {message}\n")


def test_the_explanation_reads_arguments_as_the_command_does():
    """No argument of an accepted command line is explained as wrong."""
    given = "status --lr -1 1e-3 --image-size 3 4 --no-augment --limit None --beside a b --batch=3 --data_dir x"
    command = recall_distortion.parse(given.split())
    assert (command.training.lr, command.data.image_size, command.data.limit) == ((-1.0, 1e-3), (3, 4), None)
    assert refusals.explain(type(command), given.split()) is None


def test_launching_and_a_shard_exclude_each_other():
    with pytest.raises(ValueError, match=r"launch='local' divides the study into --jobs parts itself"):
        ClusterOptions(launch="local", shard="0/2")
    with pytest.raises(ValueError, match=r"shard='0/2' cannot be combined with coordinator='a:1'"):
        ClusterOptions(shard="0/2", coordinator="a:1", process_id=0, num_processes=2)
    with pytest.raises(ValueError, match="jobs=0 must be at least 1"):
        ClusterOptions(jobs=0)
    for name, value in {"jobs": 4, "partition": "gpu", "gpus": 1, "cpus": 8, "hours": 2.0}.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} has no effect without --launch; add --launch slurm or"):
            ClusterOptions(**{name: value})
    for name, value in {"partition": "gpu", "cpus": 8}.items():
        with pytest.raises(ValueError, match=f"{name}={value!r} has no effect with --launch local; remove it"):
            ClusterOptions(launch="local", **{name: value})


def test_every_local_job_has_gpus_of_its_own(tmp_path, monkeypatch):
    """submitit would give the first GPUs of the machine to every job."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(launch.launchers, "gpus_of_node", lambda: 4)
    assert launch.gpus_of_jobs(ClusterOptions(launch="local", jobs=2, gpus=2)) == ["0,1", "2,3"]
    assert launch.gpus_of_jobs(ClusterOptions(launch="slurm", jobs=2, gpus=8)) == [None, None]
    assert launch.gpus_of_jobs(ClusterOptions(launch="local", jobs=2)) == [None, None]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, 7")
    assert launch.gpus_of_jobs(ClusterOptions(launch="local", jobs=2, gpus=1)) == ["5", "7"]
    with pytest.raises(ValueError, match=r"jobs=3 with gpus=1 each need 3 NVIDIA GPUs, and this process sees 2; use"):
        launch.launch("experiments.nothing", [], ClusterOptions(launch="local", jobs=3, gpus=1), tmp_path)
    script = f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(os.environ['CUDA_VISIBLE_DEVICES'])"
    launch.Part([sys.executable, "-c", script], tmp_path, hours=1, gpus="7")()
    assert (tmp_path / "seen").read_text() == "7"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"launch": "slurm", "hours": 0.01}, r"hours=0\.01 must be at least 0\.05 with --launch slurm"),
        ({"launch": "local", "hours": 0.0}, r"hours=0\.0 must be positive"),
        ({"hours": float("nan")}, r"hours=nan must be positive"),
    ],
)
def test_a_time_limit_that_no_job_can_keep_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        ClusterOptions(**given)


def test_a_job_of_a_job_does_not_inherit_its_limits(monkeypatch):
    """Variables that the user sets for sbatch, and those of the cluster, are kept."""
    kept = {"SBATCH_ACCOUNT": "me", "SLURM_CONF": "/etc/slurm.conf", "HOME": "/home/me"}
    for name, value in {"SLURM_JOB_ID": "1", "SLURM_CPUS_PER_TASK": "2", "SRUN_CPUS_PER_TASK": "2", **kept}.items():
        monkeypatch.setenv(name, value)
    before = dict(os.environ)
    with launch._outside_of_a_job():
        assert not [name for name in os.environ if name.startswith(("SLURM_J", "SLURM_CP", "SRUN_"))]
        assert {name: os.environ[name] for name in kept} == kept
    assert dict(os.environ) == before


@pytest.mark.slow
def test_jobs_of_the_local_launcher_compute_every_part_once(tmp_path):
    """Two jobs of one seed each; the report that follows has both, and no stage is computed twice."""
    pytest.importorskip("submitit", reason="needs the extra cluster")
    out = tmp_path / "grid"
    options = ["--epochs", "6", "--depths", "2", "--widths", "2", "3", "--groups", "2-3", "--out", str(out)]
    command = [sys.executable, "-m", "experiments.jumpstart_grid", "run", *options, "--launch", "local", "--jobs", "2"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "2 jobs" in done.stdout
    assert (out / "cells.csv").read_text().count("moons,") == 4
    assert len(list(out.glob("store/*/00000-00001"))) == 2


def test_a_failed_job_is_an_error_that_names_its_log(tmp_path):
    pytest.importorskip("submitit", reason="needs the extra cluster")
    with pytest.raises(RuntimeError, match=r"1 of 1 jobs failed; the first error is in .*\.err"):
        launch.launch("experiments.nothing", [], ClusterOptions(launch="local"), tmp_path)


@pytest.mark.parametrize(
    "environment",
    [
        {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        {f"SLURM_ARRAY_TASK_{name}": n for name, n in zip(("ID", "MIN", "MAX", "STEP", "COUNT"), "10112", strict=True)},
    ],
)
def test_several_processes_do_not_submit_a_study_several_times(tmp_path, monkeypatch, environment):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"launch='slurm' in 2 processes .* would submit the study 2 times; give"):
        launch.launch("experiments.nothing", [], ClusterOptions(launch="slurm"), tmp_path)


@pytest.mark.slow
def test_a_job_that_reaches_its_time_limit_is_requeued_and_its_program_ends(tmp_path, monkeypatch):
    """The program completes a stage and waits on its first run, and ends at once on the second and for the report."""
    pytest.importorskip("submitit", reason="needs the extra cluster")
    (tmp_path / "waiting.py").write_text(
        "import os, pathlib, sys, time\n"
        "here = pathlib.Path(__file__).parent\n"
        "(here / 'out/store/dense/00000-00001').mkdir(parents=True, exist_ok=True)\n"
        "with open(here / 'calls', 'a') as file: print(os.getpid(), *sys.argv[1:], file=file)\n"
        "while len((here / 'calls').read_text().splitlines()) == 1: time.sleep(0.1)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    launch.launch("waiting", [], ClusterOptions(launch="local", hours=1 / 60), tmp_path / "out")
    first, second, report = (line.split() for line in (tmp_path / "calls").read_text().splitlines())
    assert first[1:] == second[1:] == ["--shard", "0/1"]
    assert report[1] == "report"
    with pytest.raises(ProcessLookupError):
        os.kill(int(first[0]), 0)


@pytest.mark.parametrize("name", ["SIGUSR2", "SIGTERM"])
def test_the_command_of_a_job_does_not_end_at_the_signal_of_a_time_out_or_a_preemption(tmp_path, name):
    """Slurm sends the signal to all processes of a job, and the command may be the first to get it."""
    script = f"import os, signal; os.kill(os.getpid(), signal.{name}); open({str(tmp_path / 'log')!r}, 'w').close()"
    assert launch.Part([sys.executable, "-c", script], tmp_path, hours=1)() == 0
    assert (tmp_path / "log").exists()
    with pytest.raises(subprocess.CalledProcessError, match="exit status 3"):
        launch.Part([sys.executable, "-c", "raise SystemExit(3)"], tmp_path, hours=1)()


def test_a_job_that_completes_no_stage_within_its_time_limit_is_not_requeued(tmp_path, monkeypatch):
    """After a preemption, which comes earlier, or a completed stage it is requeued; a claim is no stage."""
    submitit = pytest.importorskip("submitit", reason="needs the extra cluster")
    now = 1000.0
    monkeypatch.setattr(launch.time, "time", lambda: now)
    part = launch.Part([sys.executable, "-c", "pass"], tmp_path, hours=1)
    (tmp_path / "store" / "dense-0" / "00000-00001").mkdir(parents=True)
    (tmp_path / "store" / "dense-0" / "00001-00002.partial-1").mkdir()
    part()
    (tmp_path / "store" / "dense-0" / "00001-00002.claim").touch()
    now += 600
    assert isinstance(part.checkpoint(), submitit.helpers.DelayedSubmission)
    now += 2900
    with pytest.raises(
        RuntimeError, match=r"no stage and no checkpoint was stored within the time limit of 1 hours.*more --hours, or"
    ):
        part.checkpoint()
    (tmp_path / "store" / "dense-0" / "00001-00002").mkdir()
    assert isinstance(part.checkpoint(), submitit.helpers.DelayedSubmission)


def test_a_job_may_reach_its_time_limit_often(tmp_path, monkeypatch):
    submitit = pytest.importorskip("submitit", reason="needs the extra cluster")
    made = []

    class Unsubmitted(submitit.AutoExecutor):
        def submit_array(self, parts):
            made.append(self._executor.max_num_timeout)
            raise RuntimeError(f"{len(parts)} parts are not submitted")

    monkeypatch.setattr(submitit, "AutoExecutor", Unsubmitted)
    with pytest.raises(RuntimeError, match="2 parts"):
        launch.launch("experiments.nothing", [], ClusterOptions(launch="local", jobs=2), tmp_path)
    assert made == [100]


@pytest.mark.parametrize(("environment", "terminal"), [({}, True), ({"OMPI_COMM_WORLD_RANK": "0"}, False)])
def test_under_mpirun_progress_is_plain_lines_although_the_output_looks_like_a_terminal(
    monkeypatch, environment, terminal
):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    for name in ("OMPI_COMM_WORLD_RANK", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert progress.standard_output(120).is_terminal == terminal
    with progress.progress(4, "epochs") as shown:
        shown.stage("dense training")
        shown.advance(2)
    printed = sys.stdout.getvalue()
    assert ("\x1b" in printed) == terminal
    assert "dense training" in printed
    if not terminal:
        assert progress.standard_output(120).width == 120
