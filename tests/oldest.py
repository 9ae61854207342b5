"""Print pip constraints that pin the dependencies in pyproject.toml to their lower bounds.

``make test-oldest`` installs with these constraints. They cover the packages that the library and its tests import:
the dependencies and the extras flax, recall, report, export, experiments and test. The tools in dev and docs are not
pinned.
"""

import re
import tomllib
from pathlib import Path

EXTRAS = ("flax", "recall", "report", "export", "experiments", "test")


def constraints(pyproject: str) -> list[str]:
    """``name==bound`` for every requirement; a requirement without a lower bound is an error."""
    project = tomllib.loads(pyproject)["project"]
    asked = [*project["dependencies"], *(line for extra in EXTRAS for line in project["optional-dependencies"][extra])]
    pins = []
    for requirement in asked:
        if requirement.startswith(project["name"] + "["):
            continue
        found = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)", requirement)
        if found is None:
            raise ValueError(f"{requirement!r} must be written name>=version, so that its lower bound can be tested")
        pins.append(f"{found[1]}=={found[2]}")
    return pins


if __name__ == "__main__":
    print("\n".join(constraints((Path(__file__).parents[1] / "pyproject.toml").read_text())))
