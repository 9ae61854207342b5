"""The planned settings of every table, so that the results of another study are not kept under its name."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.jumpstart_grid import presets as grids
from experiments.jumpstart_grid.config import Grid
from experiments.recall_distortion import presets
from experiments.recall_distortion.config import Study

_PARAMETERS, _PRUNABLE = 60_074, 58_998  # of LeNet
_PUBLISHED_COUNTS = (29_076, 14_114, 5_138, 2_145, 350)  # weights kept at a nominal t = 2, 4, 10, 20, 50
_FREE = ("replicates", "scores", "ratios")  # grow while a study runs; the ratios are compared in the table
_SAME_RATIO = 1e-5  # relative; tables have six digits

_fashion, _mnist, _changed = (presets.get(name) for name in ("fashion-lenet", "mnist-lenet", "fashion-changed"))
_PAPER = {"ratios": (1, *(_PARAMETERS / (_PARAMETERS - _PRUNABLE + keep) for keep in _PUBLISHED_COUNTS))}
_few, _floor = (presets.get(name) for name in ("fashion-few-weights", "fashion-few-weights-floor"))
_AT_125 = _PARAMETERS / (_PARAMETERS - _PRUNABLE + 125)  # the count of R14 that was run first
_SCRIPT = {**_PAPER, "weight_decay": 0.0, "selection": "test"}

STUDIES: Mapping[str, Study] = {
    "fashion-lenet": _fashion,
    "mnist-lenet": _mnist,
    "fashion-jumpstart": dataclasses.replace(_fashion, jumpstart=(0.1,)),
    "fashion-no-decay": dataclasses.replace(_fashion, weight_decay=0.0),
    "fashion-by-weights": dataclasses.replace(_fashion, ratios=(1, 14.922, 26.629)),
    "fashion-published-paper": dataclasses.replace(_fashion, **_PAPER),
    "fashion-published-script": dataclasses.replace(_fashion, **_SCRIPT),
    "mnist-published-paper": dataclasses.replace(_mnist, **_PAPER),
    "mnist-published-script": dataclasses.replace(_mnist, **_SCRIPT),
    "fashion-channels": dataclasses.replace(
        _fashion, structure="channels", scores=("magnitude",), ratios=(1, 1 / 0.7, 2, 1 / 0.3)
    ),
    "cifar10-resnet20": dataclasses.replace(
        presets.get("cifar10-resnet20"),
        ratios=(1, 2, 10),
        epochs=(1,),
        lr=(0.1,),
        finetune_epochs=(1,),
        finetune_lr=(0.01,),
    ),
    "cifar10-resnet20-short": presets.get("cifar10-resnet20-short"),
    "cifar10-resnet20-gradient": dataclasses.replace(
        presets.get("cifar10-resnet20-short"), scores=("gradient",), ratios=(2, 4, 10, 20, 50)
    ),
    "fashion-few-weights": dataclasses.replace(_few, ratios=_few.ratios[1:]),
    "fashion-few-weights-floor": dataclasses.replace(_floor, ratios=(_AT_125,)),
    "fashion-few-weights-floor-others": dataclasses.replace(
        _floor, ratios=tuple(ratio for ratio in _floor.ratios[1:] if ratio != _AT_125)
    ),
    "fashion-few-weights-gradient": dataclasses.replace(_few, scores=("gradient",), ratios=_few.ratios[1:]),
    "fashion-few-weights-gradient-floor": dataclasses.replace(_floor, scores=("gradient",), ratios=_floor.ratios[1:]),
    "fashion-round-8": dataclasses.replace(_changed, rounding=8),
    "fashion-round-4": dataclasses.replace(_changed, rounding=4),
    "fashion-fewer-epochs-10": dataclasses.replace(_changed, epochs=(23,)),
    "fashion-fewer-epochs-20": dataclasses.replace(_changed, epochs=(11,)),
    "fashion-label-noise-10": dataclasses.replace(_changed, label_noise=0.019),
    "fashion-label-noise-20": dataclasses.replace(_changed, label_noise=0.203),
}  # table: its study; the levels of R13 are those that the page fixed

_width_2 = dataclasses.replace(grids.get("mnist"), widths=(2,))
GRIDS: Mapping[str, Grid] = {
    "moons": grids.get("moons"),
    "moons-seeds": grids.get("moons-seeds"),
    "moons-seeds-u": dataclasses.replace(grids.get("moons-seeds"), methods=("U",)),
    "moons-layers": grids.get("moons-layers"),
    "uci": grids.get("uci"),
    "mnist-grid": dataclasses.replace(_width_2, epochs=10),
    "mnist-grid-50": grids.get("mnist"),
    "moons-pruned": grids.get("moons-pruned"),
    "moons-pruned-seeds": dataclasses.replace(grids.get("moons-pruned"), seeds=35),
    "mnist-pruned": grids.get("mnist-pruned"),
}  # table: its grid, of which a part may have run


def check_study(name: str, study: Study, folder: Path) -> None:
    """Refuse the study in a folder if its settings are not those of the table.

    Raises:
      ValueError: a setting differs; the message has every such setting.
    """
    planned = STUDIES.get(name)
    if planned is None:
        return
    if name == "cifar10-resnet20-short" and study.epochs > planned.epochs:
        planned = dataclasses.replace(planned, epochs=study.epochs)  # the plan allows more epochs
    fields = [field.name for field in dataclasses.fields(Study) if field.name not in _FREE]
    _refuse(name, folder, ((key, getattr(study, key), getattr(planned, key)) for key in fields))


def check_ratios(name: str, networks: pd.DataFrame, folder: Path) -> None:
    """Refuse a table of networks that has none at one of the planned ratios.

    Raises:
      ValueError: a ratio is missing.
    """
    planned = STUDIES.get(name)
    if planned is None:
        return
    first = ["magnitude"] if "magnitude" in planned.scores else planned.scores
    found = networks.loc[networks["score"].isin(["control", *first]), "ratio"].to_numpy()
    lost = [ratio for ratio in planned.ratios if not np.isclose(found, ratio, rtol=_SAME_RATIO).any()]
    if lost:
        raise ValueError(
            f"{folder} has no network at t = {', '.join(f'{ratio:g}' for ratio in lost)}, which {name}.csv needs: run "
            "the whole study first"
        )


def check_grid(name: str, cells: pd.DataFrame, grid: Grid | None, folder: Path) -> None:
    """Refuse a grid whose networks are not among those of the table, or whose training differs.

    Args:
      name: name of the table.
      cells: a row for each network, or for each network and ratio if they were pruned.
      grid: the settings recorded in the folder, if there are any.
      folder: the folder, for the message.

    Raises:
      ValueError: networks or settings differ; the message has what differs.
    """
    planned = GRIDS.get(name)
    if planned is None:
        return
    allowed: dict[str, Sequence[object]] = {
        "dataset": planned.datasets,
        "method": planned.methods,
        "layer": planned.layer,
        "width": planned.widths,
        "depth": planned.depths,
        "epochs": (planned.epochs,),
        "lr": planned.lr,
        "replicate": range(planned.seeds),
    }
    others = {key: sorted(set(cells[key].tolist()) - set(values)) for key, values in allowed.items() if key in cells}
    differing = [(key, values, list(allowed[key])) for key, values in others.items() if values]
    if planned.prune and set(cells["ratio"]) != {1.0, *planned.prune}:
        differing.append(("ratio", sorted(set(cells["ratio"].tolist())), [1.0, *planned.prune]))
    if grid is not None:
        same = ("kind", "epochs", "lr", "batch", "coefficient")
        differing += [(key, getattr(grid, key), getattr(planned, key)) for key in same]
    _refuse(name, folder, differing)


def _refuse(name: str, folder: Path, values: Iterable[tuple[str, object, object]]) -> None:
    """Raise if a value that was found is not the planned one."""
    words = [f"{key} is {found!r}, planned is {planned!r}" for key, found, planned in values if found != planned]
    if words:
        raise ValueError(f"{folder} is not the study of {name}.csv: {'; '.join(words)}")
