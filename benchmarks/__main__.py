"""Time all benchmarks, or those named, against the usual alternatives.

`python -m benchmarks` runs all, writes results.json and results.md next to this file, and five rows of the table into
the README; `--out DIR` writes elsewhere. `python -m benchmarks selection imports` runs only those, and writes only with
`--out`, after each row. Four names are not among "all": `python -m benchmarks readme` measures only the five rows of
the README, in about two minutes on two quiet cores, prints them, and writes them into the README. `python -m benchmarks
growth` plots how cost grows, into docs/images/growth/. `python -m benchmarks accelerator --out DIR` measures a GPU or
TPU in under four minutes, and saves a profile of the worst row in DIR/profile. `python -m benchmarks compiled`, in
`.venv-compilers` (`make test-compilers`), compiles for described devices and puts the table into docs/performance.md.
Rows that need PyTorch say "not run" if it is not installed.
"""

import argparse
import datetime
import importlib
import importlib.metadata
import json
import math
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator

import jax

from benchmarks import timing
from experiments.cli.commands import quietly
from experiments.reproduction.__main__ import filled

# glibc may return large freed blocks to the system, depending on their neighbors; a step of 2.5 ms then spends up to 4
# ms more on page faults. With these settings both sides keep their memory.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**32), "MALLOC_TRIM_THRESHOLD_": str(2**33)}
HERE = pathlib.Path(__file__).parent
README = HERE.parent / "README.md"
# The five rows of the README: (what, against).
IN_README = [
    ("global selection, 1e+07 scores", "jnp.sort and comparison"),
    ("global selection, 1e+07 scores", "numpy.partition and comparison"),
    ("optimizer update, 1e+08 parameters, prune with no selection due", "the same chain without prune"),
    ("LeNet step with the penalty, batch 128", "torch eager with the same penalty"),
    (
        "audit, 30 models x 5 ratios x 50,000 examples x 1,000 classes",
        "alpha by numpy and scikit-learn, a model at a time",
    ),
]
NAMES = (
    *("imports", "selection", "prune_step", "sparsegpt", "structured"),
    *("jumpstart", "networks", "replicates", "moons", "audit", "tracing"),
)


def machine() -> dict[str, str]:
    """Describe the machine and the versions of the measurement."""
    names = ("jax", "flax", "optax", "numpy", "scikit-learn", "torch")
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} cores)",
        "Python": platform.python_version(),
        **{name: _version(name) for name in names},
    }


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    """Run the command line; return the exit status."""
    return quietly(_run_command_line)


def _run_command_line() -> None:
    """Parse the command line and run the benchmarks."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = [*NAMES, "accelerator", "growth", "compiled", "readme"]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which benchmarks to run: {', '.join(known)}")
    parser.add_argument("--out", type=pathlib.Path, help="folder to write to")
    parser.add_argument("--data-dir", help="TFDS folder, also JPRUNE_DATA_DIR; by default TFDS's own")
    parser.add_argument("--largest", type=int, default=10**8, help="growth: the most scores to select from")
    parser.add_argument(
        "--curve", action="append", default=[], metavar="NAME", help="growth: draw only this; repeatable"
    )
    options = parser.parse_args()
    unknown = sorted(set(options.names) - set(known))
    if unknown:
        parser.error(f"{', '.join(unknown)}: not a benchmark; use one of {', '.join(known)}")
    if options.data_dir is not None:
        os.environ["JPRUNE_DATA_DIR"] = options.data_dir
    if "compiled" in options.names:
        importlib.import_module("benchmarks.compiled.table").write()
    if "growth" in options.names:
        growth = importlib.import_module("benchmarks.growth")
        if strange := sorted(set(options.curve) - set(growth.CURVES)):
            parser.error(f"--curve {strange[0]}: not a curve; use one of {', '.join(growth.CURVES)}")
        growth.draw(options.out or HERE.parent / "docs" / "images" / "growth", options.largest, options.curve)
    if "readme" in options.names:
        run(["readme"], options.out)
    names = [name for name in (*NAMES, "accelerator") if name in (options.names or NAMES)]
    if names:
        run(names, options.out if options.names else options.out or HERE)


def run(names: list[str], out: pathlib.Path | None) -> None:
    """Run benchmarks one after another, print each row when it is measured, and write the table to ``out``."""
    rows, start = [], time.perf_counter()
    measured_on = {**machine(), "total seconds": "0"}
    for name in names:
        began = time.perf_counter()
        for row in _rows(name, out):
            rows.append(row)
            print(f"{row.what}: {row.ratio:.3g} of {row.against} (at most {row.must:.3g}), {row.verdict}", flush=True)
            measured_on["total seconds"] = f"{time.perf_counter() - start:.0f}"
            if out is not None:  # after each row, so that measured rows are kept if a later one fails
                write(rows, measured_on, out)
        print(f"[{name}: {time.perf_counter() - began:.0f} s]", flush=True)
    print(timing.markdown(rows, measured_on))
    if out == HERE or names == ["readme"]:
        shown = [row for row in rows if (row.what, row.against) in IN_README]
        README.write_text(filled(README.read_text(), {"benchmarks": timing.markdown(shown, measured_on, notes=False)}))


def _rows(name: str, out: pathlib.Path | None) -> Iterator[timing.Row]:
    """Yield the rows of a benchmark, or a row "not run" if it needs PyTorch and PyTorch is not installed."""
    try:
        if name == "readme":
            yield from _readme_rows()
            return
        module = importlib.import_module(f"benchmarks.{name}")
        profile = {"profile": out / "profile"} if name == "accelerator" and out is not None else {}
        yield from module.rows(**profile)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        yield timing.not_run(f"{name}, all rows", "PyTorch", must=math.nan, why="PyTorch is not installed")


def _readme_rows() -> Iterator[timing.Row]:
    """Yield only the rows of the README."""
    of = lambda name: importlib.import_module(f"benchmarks.{name}")
    yield from of("selection").in_memory(10**7, leaves=False)
    yield of("prune_step").update(10**8)
    yield from of("jumpstart").of(of("steps").lenet(), without=1.25, torch=1.0)
    yield of("audit").tables(of("audit").made_up(1_000, models=30, examples=50_000))


def write(rows: list[timing.Row], measured_on: dict[str, str], out: pathlib.Path) -> None:
    """Write results.json and results.md; values that were not measured are null in the JSON."""
    table = [
        {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in vars(row).items()}
        for row in rows
    ]
    out.mkdir(parents=True, exist_ok=True)
    record = {"machine": measured_on, "rows": table}
    (out / "results.json").write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
    (out / "results.md").write_text(timing.markdown(rows, measured_on))


if __name__ == "__main__":
    if not KEEP_MEMORY.keys() <= os.environ.keys():  # read when a process starts
        os.execve(sys.executable, [sys.executable, "-m", "benchmarks", *sys.argv[1:]], {**os.environ, **KEEP_MEMORY})
    sys.exit(main())
