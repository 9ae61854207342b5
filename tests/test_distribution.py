"""The source archive holds every tracked file, the wheel holds only the library, and the wheel imports by itself."""

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
# Left out of the archive: what only the repository itself needs.
REPOSITORY = (".ci/", ".github/")

BARE = """
import importlib.resources, subprocess, sys
import jax.numpy as jnp, optax, jprune

def named(extra, call):
    try:
        call()
    except ImportError as error:
        assert f"'jprune[{extra}]'" in str(error), error
    else:
        raise AssertionError(f"{extra} was not missed")

params = {"kernel": jnp.array([[3.0, -1.0]])}
tx = optax.chain(optax.sgd(0.1), jprune.prune(jprune.magnitude(), {0: 0.5}))
updates, state = tx.update({"kernel": jnp.zeros((1, 2))}, tx.init(params), params)
assert optax.apply_updates(params, updates)["kernel"].tolist() == [[3.0, 0.0]]
assert float(jprune.jumpstart_penalty([jnp.array([[2.0], [-2.0]])], mode="unit")) == 0.0

named("recall", lambda: jprune.recall)
named("recall", lambda: jprune.cost_table(params))
named("flax", lambda: jprune.preactivations(None, None))
named("export", lambda: jprune.io.save_masks("masks.safetensors", {"kernel": jnp.ones((1, 2), bool)}))
command = sys.executable[: -len("python")] + "jprune"
files = ["--labels", "y.npy", "--dense", "d.npy", "--pruned", "2=p.npy"]
done = subprocess.run([command, "audit", *files], capture_output=True, text=True)
assert done.returncode and "'jprune[report]'" in done.stderr and "Traceback" not in done.stderr, done.stderr
installed = {path.name for path in importlib.resources.files("jprune").joinpath("recall/report").iterdir()}
assert {"page.html.j2", "page.css", "page.js"} <= installed
assert importlib.resources.files("jprune").joinpath("py.typed").is_file()
print(jprune.__file__)
"""

WITH_RECALL = """
import numpy as np, jprune

labels, dense = np.array([0, 0, 1, 1]), np.array([[0, 0, 1, 0], [0, 0, 0, 1]])
audit = jprune.recall.audit(labels, dense, {2.0: dense})
assert np.allclose(audit.alphas["alpha"], 1.0)
try:
    audit.to_html("report.html")
except ImportError as error:
    assert "'jprune[report]'" in str(error), error
else:
    raise AssertionError("report was not missed")
"""


def run(*command, **options):
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, env=bare, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """The source archive and the wheel built from it."""
    pytest.importorskip("build", reason="building needs the extra dev")
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    (source,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return source, wheel


@pytest.fixture
def tracked():
    if not (ROOT / ".git").exists():
        pytest.skip("which files are tracked is asked of git")
    names = set(run("git", "ls-files", cwd=ROOT).splitlines())
    return {name for name in names if (ROOT / name).exists()}


def test_the_source_archive_holds_every_tracked_file(archives, tracked):
    with tarfile.open(archives[0]) as archive:
        packed = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {name for name in tracked - packed if not name.startswith(REPOSITORY)} == set()
    assert {"jprune/py.typed", "jprune/recall/report/page.html.j2", "tests/conftest.py", "PKG-INFO"} <= packed


def test_the_wheel_holds_the_library_and_nothing_else(archives, tracked):
    packed = set(zipfile.ZipFile(archives[1]).namelist())
    library = {name for name in tracked if name.startswith("jprune/")}
    assert library - packed == set()
    assert {name.split("/")[0].split("-")[0] for name in packed} == {"jprune"}
    assert any(name.endswith("licenses/LICENSE") for name in packed)


def test_the_wheel_works_in_an_empty_environment_and_names_the_extras_it_lacks(archives, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", archives[1])
    printed = run(python, "-W", "error", "-c", BARE, cwd=tmp_path)
    assert Path(printed.strip()).is_relative_to(tmp_path / "env")
    run(python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", f"{archives[1]}[recall]")
    run(python, "-W", "error", "-c", WITH_RECALL, cwd=tmp_path)
