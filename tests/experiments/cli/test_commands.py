"""How a study's command line ends."""

import os
import subprocess
import sys

import pytest

from experiments.cli.commands import exit_status, parse_shard


def raising(error):
    def work():
        print("begun")
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "status", "told"),
    [
        (ValueError("preset='nix' is unknown"), 1, "error: preset='nix' is unknown\n"),
        (OSError("no space"), 1, "error: no space\n"),
        (ImportError("pip install 'jprune[experiments]'"), 1, "error: pip install 'jprune[experiments]'\n"),
        (KeyboardInterrupt(), 130, "stopped; give the same command again to go on\n"),
    ],
)
def test_an_error_is_told_in_a_line(capsys, error, status, told):
    assert exit_status(raising(error)) == status
    assert capsys.readouterr().err == told


def test_what_is_no_error_of_the_caller_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        exit_status(raising(ZeroDivisionError()))


def test_a_command_that_works_ends_with_0(capsys):
    assert exit_status(lambda: print("done")) == 0
    assert capsys.readouterr() == ("done\n", "")


def assert_ends_quietly(*arguments):
    """Run Python with a standard output that nobody reads; what is printed waits in its buffer until the end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "PYTHONUNBUFFERED": ""}
    with subprocess.Popen([sys.executable, *arguments], env=environment, **pipes) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


@pytest.mark.parametrize("work", ["print('x')", "(print('help'), sys.exit(0))"])
def test_a_reader_who_has_left_ends_it_quietly(work):
    program = f"import sys; from experiments.cli.commands import exit_status; sys.exit(exit_status(lambda: {work}))"
    assert_ends_quietly("-c", program)


COMMANDS = [f"experiments.{name}" for name in ("data", "reproduction", "recall_distortion", "jumpstart_grid")]


@pytest.mark.parametrize("module", [*COMMANDS, "benchmarks"])
def test_help_says_nothing_to_a_reader_who_has_left(module):
    assert_ends_quietly("-m", module, "--help")


@pytest.mark.parametrize("shard", ["2/2", "half", "-1/2", "1/2/3", "/", "1/"])
def test_a_shard_that_does_not_exist_is_refused(shard):
    assert parse_shard("3/4") == (3, 4)
    with pytest.raises(ValueError, match=f"shard='{shard}' must be i/n with 0 <= i < n"):
        parse_shard(shard)
