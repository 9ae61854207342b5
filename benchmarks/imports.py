"""Time `import jprune` in addition to `import jax, optax`."""

import statistics
import subprocess
import sys

from benchmarks.timing import ROUNDS, Row, seconds

ALLOWED = 0.3  # seconds


def rows() -> list[Row]:
    """Time whole processes, alternating."""
    sides = {code: [] for code in ("import jax, optax, jprune", "import jax, optax")}
    for i in range(ROUNDS + 1):
        for code, taken in sides.items():
            spent = seconds(lambda code=code: subprocess.run([sys.executable, "-c", code], check=True))
            if i:
                taken.append(spent)
    ours, peer = (statistics.median(taken) for taken in sides.values())
    return [
        Row(
            "import jprune, after jax and optax",
            f"{ALLOWED} s",
            max(0.0, ours - peer),
            ALLOWED,
            max(0.0, ours - peer) / ALLOWED,
            1.0,
            passed=ours - peer <= ALLOWED,
            note="the difference of two medians of whole processes",
        )
    ]
