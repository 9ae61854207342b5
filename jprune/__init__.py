"""jprune: pruning, jumpstart regularization and per-class recall audits for JAX.

Only the public names live here; each wing has a folder of its own. ``jprune.recall`` needs scipy and
pandas and is loaded when it is first used.
"""

import importlib
from typing import Any

from jprune.pruning.masks import (
    apply_masks,
    compression,
    erk_masks,
    global_masks,
    keep_count,
    layer_masks,
    sparsity,
    uniform_masks,
)
from jprune.pruning.scores import Score, gradient, magnitude, movement, random, undecayed
from jprune.trees import kernels, select

__version__ = "0.1.0.dev0"


def __getattr__(name: str) -> Any:
    if name == "recall":
        return importlib.import_module("jprune.recall")
    raise AttributeError(f"module 'jprune' has no attribute {name!r}")


__all__ = [
    "Score",
    "apply_masks",
    "compression",
    "erk_masks",
    "global_masks",
    "gradient",
    "keep_count",
    "kernels",
    "layer_masks",
    "magnitude",
    "movement",
    "random",
    "select",
    "sparsity",
    "undecayed",
    "uniform_masks",
]
