"""Every python block of the README and of the docs pages runs, in order, in an empty folder."""

import doctest
import importlib
import inspect
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
PRINTED = re.compile(r"^```\n\n```text\n(.*?)^```", re.MULTILINE | re.DOTALL)  # what the block before it prints
# A page's blocks run in a process of their own, as its reader runs them: with jax's own defaults.
RUNNER = "import sys; exec(compile(sys.stdin.read(), sys.argv[1], 'exec'), {'__name__': '__main__'})"


def program(page: pathlib.Path) -> str:
    """One program of all blocks of a page; what a `>>>` line should print is asserted."""
    parts = []
    for block in BLOCK.findall(page.read_text()):
        examples = doctest.DocTestParser().get_examples(block)
        parts.append(f"import doctest; _check({block!r})\n" if examples else block)
    header = (
        "import doctest\n"
        "def _check(text):\n"
        "    test = doctest.DocTestParser().get_doctest(text, globals(), 'page', None, 0)\n"
        "    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE\n"
        "    result = doctest.DocTestRunner(optionflags=flags).run(test, clear_globs=False)\n"
        "    globals().update(test.globs)\n"
        "    assert result.failed == 0\n"
    )
    return header + "\n".join(parts)


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page.stem, marks=[] if page.name == "README.md" else [pytest.mark.slow])
        for page in PAGES
        if BLOCK.search(page.read_text())
    ],
)
def test_the_python_blocks_of_a_page_run(page, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", RUNNER, page.name],
        input=program(page),
        text=True,
        capture_output=True,
        cwd=tmp_path,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for printed in PRINTED.findall(page.read_text()):
        assert printed in done.stdout


def shown_in_the_reference():
    """The contents of the reference pages: for each module the names listed, or None where all are shown."""
    text = "\n".join(page.read_text() + "\n" for page in (ROOT / "docs/reference").glob("*.md"))
    shown = {}
    for module, options in re.findall(r"^::: ([\w.]+)\n((?:    .*\n)*)", text, re.MULTILINE):
        listed = re.search(r"members: \[(.*?)\]", options, re.DOTALL)
        shown[module] = listed and set(re.findall(r"\w+", listed[1]))
    return shown


PUBLIC = ("", ".scores", ".selection", ".schedules", ".io", ".jumpstart", ".recall")


@pytest.mark.parametrize("package", [f"jprune{part}" for part in PUBLIC])
def test_every_public_name_is_on_a_reference_page_with_a_docstring(package):
    module, shown = importlib.import_module(package), shown_in_the_reference()
    for name in module.__all__:
        public = getattr(module, name)
        assert public.__module__ in shown, (
            f"{public.__module__}, which defines {package}.{name}, is on no reference page"
        )
        listed = shown[public.__module__]
        assert listed is None or name in listed, f"{package}.{name} is not among the members of {public.__module__}"
        assert public.__doc__, f"{package}.{name} has no docstring"


@pytest.mark.parametrize("package", [f"jprune{part}" for part in PUBLIC])
def test_every_public_function_has_an_example_that_runs(package):
    module = importlib.import_module(package)
    functions = {name: getattr(module, name) for name in module.__all__ if inspect.isfunction(getattr(module, name))}
    assert [name for name, function in functions.items() if ">>>" not in function.__doc__] == []


def test_the_architecture_page_names_every_folder_and_no_other():
    named = set(re.findall(r"`((?:jprune|experiments)/[\w/]+/)`", (ROOT / "docs/architecture.md").read_text()))
    packages = [path.parent for top in ("jprune", "experiments") for path in (ROOT / top).rglob("__init__.py")]
    assert named == {f"{path.relative_to(ROOT)}/" for path in packages if path.parent != ROOT}


def test_every_local_link_of_the_readme_and_the_docs_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if not re.match(r"[a-z]+:", target):
                assert (page.parent / target).exists(), f"{page.name} links to {target}"


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors of a page's headings, as mkdocs and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return {
        re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip())
        for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


def test_every_anchor_of_a_local_link_is_a_heading():
    for page in PAGES:
        for target, anchor in re.findall(r"\]\(([^):#]*)#([^)]+)\)", page.read_text()):
            assert anchor in anchors(page.parent / target if target else page), (
                f"{page.name} links to {target}#{anchor}"
            )
