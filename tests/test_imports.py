"""Importing the library prints nothing, opens no connection and loads only the dependencies that are used."""

import ast
import importlib
import inspect
import subprocess
import sys

import numpy as np
import pytest

import jprune

SCRIPT = """
import importlib, pkgutil, sys

def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        raise RuntimeError(f"{event} while importing: {args}")

sys.addaudithook(refuse)
import jprune

names = [module.name for module in pkgutil.walk_packages(jprune.__path__, "jprune.")]
for name in names:
    importlib.import_module(name)
print(len(names))

import socket
try:
    socket.getaddrinfo("localhost", 80)
except RuntimeError:
    print("guarded")
"""


def test_every_module_imports_without_a_warning_and_without_the_network():
    done = subprocess.run([sys.executable, "-W", "error", "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    count, guarded = done.stdout.split()
    assert int(count) > 50
    assert guarded == "guarded"
    assert done.stderr == ""


def loaded_by(script, *names, cwd=None):
    """Which of these packages a new process has imported after a script, whose output is discarded."""
    after = f"\nimport sys\nprint([n for n in {names!r} if n in sys.modules], file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", script + after], capture_output=True, text=True, check=False, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return ast.literal_eval(done.stderr.splitlines()[-1])


HEAVY = ("jax", "optax", "numpy", "scipy", "pandas", "matplotlib", "jaxtyping")


@pytest.mark.parametrize("options", [["--help"], ["--version"], ["audit", "--help"], ["audit"], ["audit", "--labels"]])
def test_help_and_usage_errors_import_no_heavy_package(options):
    assert loaded_by(f"from jprune.cli import main\nmain({options!r})", *HEAVY) == []
    assert loaded_by("import jprune\ndir(jprune)", *HEAVY) == []


@pytest.mark.slow
def test_the_audit_of_files_and_of_numpy_arrays_does_not_import_jax(tmp_path):
    np.save(tmp_path / "labels.npy", np.arange(40) % 4)
    np.save(tmp_path / "logits.npy", np.random.default_rng(0).normal(size=(40, 4)))
    given = ["audit", "--labels", "labels.npy", "--dense", "logits.npy", "--compare", "int8=logits.npy", "--json"]
    assert loaded_by(f"from jprune.cli import main\nassert main({given}) == 0", "jax", "optax", cwd=tmp_path) == []
    script = "import numpy as np, jprune\njprune.recall.audit([0, 1, 1], np.array([0, 1, 0]), {2: [0, 0, 1]})"
    assert loaded_by(script, "jax", "optax", "matplotlib", "jinja2", "rich", "statsmodels", "pyarrow.parquet") == []


@pytest.mark.slow
def test_pruning_does_not_import_the_audit_nor_the_audit_its_extras():
    assert loaded_by("from jprune import prune, magnitude", "jprune.recall", "scipy", "pandas", "flax") == []
    assert loaded_by("import jprune\njprune.recall.recall([[1]])", "jax", "matplotlib", "jinja2", "rich") == []


def imported_for_type_checkers(package):
    """The names that a package imports under TYPE_CHECKING, and the module of each."""
    tree = ast.parse(inspect.getsource(package))
    (block,) = (
        node.body for node in tree.body if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    )
    return {alias.name: node.module for node in block for alias in node.names}


def test_type_checkers_and_the_running_package_see_the_same_names():
    seen = imported_for_type_checkers(jprune)
    assert sorted(name for name, module in seen.items() if module != "jprune") == jprune.__all__
    for name, module in seen.items():
        if module == "jprune":
            assert getattr(jprune, name) is importlib.import_module(f"jprune.{name}")
        else:
            assert getattr(jprune, name) is getattr(importlib.import_module(module), name)
    assert imported_for_type_checkers(jprune.recall) == {"counts": jprune.recall.counts.__module__}


def test_every_public_name_is_imported_by_each_form_of_import():
    found = {}
    exec("from jprune import *", found)  # the only form that reads __all__
    assert set(jprune.__all__) <= set(found)
    exec("from jprune.recall import *", found)
    assert set(jprune.recall.__all__) <= set(found)
    assert {*jprune.__all__, "recall", "scores", "__version__"} <= set(dir(jprune))
    assert set(jprune.recall.__all__) <= set(dir(jprune.recall))


def test_a_mistyped_name_is_answered_with_a_similar_one():
    typed = [sys.executable, "-c", "import jprune; jprune.global_mask"]
    shown = subprocess.run(typed, capture_output=True, text=True, check=False).stderr
    assert "Did you mean: 'global_masks'?" in shown


def test_a_name_that_does_not_exist_is_an_attribute_error_that_says_where_it_moved():
    with pytest.raises(AttributeError, match="module 'jprune' has no attribute 'prun'"):
        jprune.prun  # noqa: B018
    with pytest.raises(AttributeError, match=r"jprune\.snip is now jprune\.scores\.snip"):
        jprune.snip  # noqa: B018
    with pytest.raises(AttributeError, match=r"module 'jprune\.recall' has no attribute 'count'"):
        jprune.recall.count  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'prun'"):
        from jprune import prun  # noqa: F401
