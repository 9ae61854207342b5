"""The import graph of the sources: no cycle, no forbidden edge, no crowded folder. Imports inside functions count."""

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES_PER_FOLDER = 15
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for package in ("jprune", "experiments")
    for path in sorted((ROOT / package).rglob("*.py"))
}


def imported(module: str) -> Iterator[str]:
    """Every module of the project that the source of a module imports, wherever the statement is.

    ``from package import name`` imports the submodule ``name`` if there is one, and the package otherwise.
    """
    for node in ast.walk(ast.parse(SOURCES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in SOURCES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import in line {node.lineno}; use the absolute one"
            for alias in node.names:
                submodule = f"{node.module}.{alias.name}"
                if submodule in SOURCES or node.module in SOURCES:
                    yield submodule if submodule in SOURCES else node.module
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module":
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and a.value in SOURCES)


@functools.cache
def imports() -> dict[str, list[str]]:
    """The import graph; a function, as parsing all sources takes too long for the collection of the tests."""
    return {module: sorted(set(imported(module)) - {module}) for module in SOURCES}


def cycle(graph: dict[str, list[str]]) -> list[str]:
    """Some cycle of the import graph, as the modules along it, or an empty list."""
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module not in done:
            for target in graph[module]:
                if found := visit(target, [*path, module]):
                    return found
            done.add(module)
        return []

    return next((found for module in graph if (found := visit(module, []))), [])


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_a_cycle_is_found():
    assert cycle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert cycle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_imports_in_functions_and_under_type_checking_are_found(monkeypatch, tmp_path):
    source = tmp_path / "one.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    from jprune.recall import audit\n"
        "def f():\n    import jprune.trees\n    from jprune.files import write\n"
    )
    for name in ("one", "jprune.files", "jprune.recall.audit", "jprune.trees"):
        monkeypatch.setitem(SOURCES, name, source)
    assert set(imported("one")) == {"jprune.recall.audit", "jprune.trees", "jprune.files"}


def test_no_module_imports_itself_through_others():
    assert not cycle(imports()), "import cycle: " + " -> ".join(cycle(imports()))


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("jprune", ["jprune"]),
        ("jprune.graph", ["jprune.graph", "jprune.trees", "jprune.jaxprs"]),
    ],
)
def test_a_package_imports_only(package, allowed):
    for module in filter(lambda name: within(name, package), imports()):
        wrong = [target for target in imports()[module] if not any(within(target, name) for name in allowed)]
        assert not wrong, f"{module} imports {wrong}; {package} may import only {allowed}"


@pytest.mark.parametrize("package", ["jprune.pruning", "jprune.jumpstart", "jprune.recall"])
def test_pruning_jumpstart_and_recall_do_not_import_one_another_or_what_imports_them(package):
    others = {"jprune", "jprune.pruning", "jprune.jumpstart", "jprune.recall", "jprune.cli"} - {package}
    for module in filter(lambda name: within(name, package), imports()):
        wrong = [t for t in imports()[module] if t in others or any(within(t, o) for o in others - {"jprune"})]
        assert not wrong, f"{module} imports {wrong}"


def test_no_folder_has_too_many_modules():
    folders = [path.parent for path in SOURCES.values() if path.name != "__init__.py"]
    crowded = {
        str(f.relative_to(ROOT)): folders.count(f) for f in set(folders) if folders.count(f) > MODULES_PER_FOLDER
    }
    assert not crowded, f"folders with more than {MODULES_PER_FOLDER} modules: {crowded}"


def test_the_version_is_the_same_everywhere():
    (version,) = set(re.findall(r'^__version__ = "(.*?)"', (ROOT / "jprune/_version.py").read_text(), re.MULTILINE))
    assert f'\nversion = "{version}"\n' in (ROOT / "pyproject.toml").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
