"""How a study's command line ends."""

import subprocess
import sys

import pytest

from experiments.commands import exit_status


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


def test_a_reader_who_has_left_ends_it_quietly():
    program = "import sys; from experiments.commands import exit_status; sys.exit(exit_status(lambda: print('x')))"
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1
