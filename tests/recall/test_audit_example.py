"""The worked example of docs/audit.md runs and gives the results on the page."""

import importlib.util
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "audit_predictions_of_another_framework.py"

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")]


@pytest.fixture(scope="module")
def printed(tmp_path_factory):
    """The printed output of the example with three seeds, and its output folder."""
    spec = importlib.util.spec_from_file_location("audit_example", SCRIPT)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    folder = tmp_path_factory.mktemp("example")
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.chdir(folder)
        patch.setattr("builtins.print", lambda *words, end="\n", **_: lines.append(" ".join(map(str, words)) + end))
        example.main(seeds=3)
    return "".join(lines), folder


def halves(text, name):
    """Change of recall of both halves by ratio, from the second table of a data set."""
    part = text.split(f"{name}: ")[1].split("written:")[0]
    rows = re.findall(r"^ *(common|rare) half +([\d.]+) +[\d.]+ +[\d.]+ +(-?[\d.]+)", part, re.MULTILINE)
    return {(half, float(ratio)): float(change) for half, ratio, change in rows[:10]}


@pytest.mark.parametrize("name", ["zero-commonest", "zero-rarest"])
def test_rare_classes_pay_for_pruning_whichever_digits_are_rare(printed, name):
    change = halves(printed[0], name)
    assert len(change) == 10
    assert change["rare", 1.0] > 0
    for ratio in (4.0, 8.0):
        assert change["rare", ratio] < change["common", ratio] - 0.05
    assert change["common", 4.0] > -0.03


def test_pages_and_figures_are_written(printed):
    names = {
        f"{name}{suffix}" for name in ("balanced", "zero-commonest", "zero-rarest") for suffix in (".html", ".png")
    }
    assert {path.name for path in printed[1].iterdir()} == names


def test_the_page_shows_what_the_script_prints():
    """The numbers on the page come from ten seeds, in the format that the script prints."""
    page = (ROOT / "docs" / "audit.md").read_text(encoding="utf-8")
    for name in ("balanced", "zero-commonest", "zero-rarest"):
        assert f"\n{name}: Class " in page
    assert f"python examples/{SCRIPT.name}" in page
