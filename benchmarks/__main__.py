"""Run every benchmark, or those named, and write results.json and results.md beside this file.

`python -m benchmarks` runs all; `python -m benchmarks selection imports` only those; `--out DIR`
writes elsewhere.
"""

import argparse
import dataclasses
import datetime
import importlib
import importlib.metadata
import json
import os
import pathlib
import platform
import sys
import time

import jax

from benchmarks import timing

NAMES = ("imports", "selection", "prune_step", "jumpstart", "networks", "replicates", "moons", "audit")


def machine() -> dict[str, str]:
    """What the numbers were measured on."""
    packages = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy", "torch")}
    processor = f"{platform.machine()}, {os.cpu_count()} cores"
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "device": f"{jax.devices()[0].device_kind} ({processor})",
        "Python": platform.python_version(),
        **packages,
    }


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", choices=[[], *NAMES], help="which benchmarks to run (default: all)")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path(__file__).parent, help="folder to write to")
    options = parser.parse_args()
    rows, start = [], time.perf_counter()
    for name in options.names or NAMES:
        began = time.perf_counter()
        for row in importlib.import_module(f"benchmarks.{name}").rows():
            rows.append(row)
            print(
                f"{row.what}: {row.ratio:.3g} of {row.against} (at most {row.must:.3g}), "
                f"{'reached' if row.passed else 'short'}",
                flush=True,
            )
        print(f"[{name}: {time.perf_counter() - began:.0f} s]", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    told = machine()
    record = {"machine": told, "seconds": time.perf_counter() - start, "rows": [dataclasses.asdict(r) for r in rows]}
    (options.out / "results.json").write_text(json.dumps(record, indent=1) + "\n")
    (options.out / "results.md").write_text(timing.markdown(rows, told))
    print(timing.markdown(rows, told))
    return 0


if __name__ == "__main__":
    sys.exit(main())
