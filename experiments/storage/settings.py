"""Record the settings of the studies in a folder: those of the last run, and of every study that was run there."""

import json
from importlib import metadata
from pathlib import Path

from experiments.storage import files, provenance, store
from experiments.storage.files import JSON

_LAST = "config.json"
_ALL = "studies"
_PACKAGES = ("jprune", "jax", "jaxlib", "flax", "optax", "numpy")


def record(
    folder: Path,
    module: str,
    study: dict[str, JSON],
    running: dict[str, JSON],
    *,
    model: dict[str, JSON] | None = None,
    note: bool = True,
) -> list[str]:
    """Write the settings and the versions of the packages into a folder, and note the command.

    Args:
      folder: folder of the results.
      module: name of the study's package.
      study: the settings that determine the results, as JSON.
      running: the settings that do not, as JSON.
      model: shapes of the parameters and other properties that identify the model, as JSON.
      note: whether to note the command; False if every stage was already stored.

    Returns:
      The options in which the last study of this folder differed, each as ``name: before -> now``; or, if they are the
      same, a note if the model differs.

    Raises:
      StoreError: a file cannot be written, or the earlier settings cannot be read.
    """
    before = recorded(folder) or {}
    known = {**before.get("running", {}), **before.get("study", {})} if before else {}
    changed = [f"{name}: {known[name]} -> {value}" for name, value in study.items() if known.get(name, value) != value]
    if not changed and before.get("model") and model and before["model"] != json.loads(json.dumps(model)):
        changed.append("the model's code or the shapes of its parameters")
    versions = {name: metadata.version(name) for name in _PACKAGES}
    content = {"study": study, "running": running, "model": model or {}, "versions": versions}
    files.write_json(folder / _LAST, content)
    files.write_json(folder / _ALL / f"{store.digest(study)}.json", content)
    if note:
        provenance.note(folder, module)
    return changed


def recorded(folder: Path) -> dict[str, dict[str, JSON]] | None:
    """Return the settings of the last run in a folder, as ``record`` wrote them, or None.

    Files of earlier layouts, which had all settings in one dict, are read too.

    Raises:
      StoreError: the file cannot be read; the message names it.
    """
    path = folder / _LAST
    return _read(path) if path.exists() else None


def of_study(folder: Path, study: dict[str, JSON]) -> dict[str, dict[str, JSON]] | None:
    """Return the recorded settings of a study in a folder; those of the last run if it was not recorded separately.

    Options that were added after the study was recorded are ignored.
    """
    same = lambda one: all(study[name] == value for name, value in one["study"].items() if name in study)
    return next(filter(same, all_recorded(folder)), None) or recorded(folder)


def all_recorded(folder: Path) -> list[dict[str, dict[str, JSON]]]:
    """Return the settings of every study that was run in a folder."""
    return [_read(path) for path in sorted((folder / _ALL).glob("*.json"))] or [
        one for one in [recorded(folder)] if one is not None
    ]


def _read(path: Path) -> dict[str, dict[str, JSON]]:
    try:
        content = json.loads(path.read_text())
        study = content.get("study", content)
        running = {**study, **content.get("running", {})}
        return {"study": dict(study), "running": running, "model": dict(content.get("model", {}))}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise files.StoreError(f"{path} cannot be read ({error}); delete it and pass all options again") from error
