"""Read groups: a second label per example, for recalls within each group."""

import math
from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Int

from jprune.recall.inputs.raw import USUAL_MISSING, InputError, Raw, in_pandas

Groups = dict[str, tuple[Int[np.ndarray, " examples"], tuple[str, ...]]]
"""The code of each example and the names of the codes, by attribute."""

MISSING = "(missing)"
_FEWEST = 10  # with fewer examples, each may have its own group
_MANY_SUBJECTS, _FEW_EACH = 20, 10  # so many groups of so few examples may be subjects


def given_groups(values: object) -> dict[str, object]:
    """Return the attributes by name: the columns of a mapping or table, or one attribute called ``group``."""
    values = in_pandas(values)
    if values is None:
        return {}
    if isinstance(values, pd.DataFrame):
        return {str(column): values[column] for column in values.columns}
    return {str(key): each for key, each in values.items()} if isinstance(values, Mapping) else {"group": values}


def as_cells(values: object) -> np.ndarray:
    """Convert to a numpy array; a list may mix text with missing values, which numpy would convert to text."""
    return np.array(values, object) if isinstance(values, list | tuple) else np.asarray(values)


def groups(values: object, examples: int) -> tuple[Groups, list[str]]:
    """Convert a second label per example, or several by name, to codes and the names of the codes.

    Missing values (None, NaN, NA, NaT, an empty cell) form a group called ``(missing)``.

    Args:
      values: (examples,) text, whole numbers or booleans; a mapping or DataFrame of them by attribute; or None.
      examples: number of labels.

    Returns:
      The groups, and notes on missing values.

    Raises:
      InputError: the shape is wrong, an entry is neither text nor a whole number, or there are as many groups as
        examples.

    >>> groups(["old", "young", "old"], 3)[0]
    {'group': (array([0, 1, 0]), ('old', 'young'))}
    """
    found, notes = {}, []
    for attribute, given in given_groups(values).items():
        codes, kinds = _group(given, attribute, examples)
        if kinds and kinds[-1] == MISSING:
            absent = int((codes == len(kinds) - 1).sum())
            have, they_are = ("has", "it is") if absent == 1 else ("have", "they are")
            notes.append(
                f"groups: {absent} of {examples} examples {have} no {attribute}; {they_are} the group {MISSING}"
            )
        named = [kind for kind in kinds if kind.lower() in USUAL_MISSING]
        if named:
            notes.append(
                f"groups: the {attribute} {named[0]!r} is read as the name of a group; leave the cell empty where the "
                f"{attribute} is missing"
            )
        if len(kinds) >= _MANY_SUBJECTS and examples <= _FEW_EACH * len(kinds):
            notes.append(
                f"groups: {attribute} has {len(kinds)} groups for {examples} examples: if a group has the images of "
                "one subject, they are not independent, so intervals are too narrow and p-values too small; audit one "
                "example of each"
            )
        found[attribute] = codes, kinds
    return found, notes


def _group(values: object, attribute: str, examples: int) -> tuple[Int[np.ndarray, " examples"], tuple[str, ...]]:
    name = f"groups[{attribute!r}]"
    given = as_cells(values.values if isinstance(values, Raw) else values)
    if given.shape != (examples,):
        raise InputError(f"{name} must have shape ({examples},), one entry per label, got {given.shape}")
    cells = [cell.item() if isinstance(cell, np.generic) else cell for cell in given.tolist()]
    missing = np.array([_is_missing(cell) for cell in cells])
    for example, cell in enumerate(cells):
        whole = isinstance(cell, bool | int | str) or (isinstance(cell, float) and cell.is_integer())
        if not whole and not missing[example]:
            raise InputError(f"{name} must contain text or whole numbers, got {cell!r} at example {example}")
    present = [cell for cell, absent in zip(cells, missing, strict=True) if not absent]
    numbers = all(isinstance(cell, int | float) and not isinstance(cell, bool) for cell in present)
    texts = [str(int(cell)) if numbers else str(cell).strip() for cell in present]
    kinds = sorted(set(texts), key=(lambda text: (int(text), text)) if numbers else None)
    if len(kinds) == examples >= _FEWEST:
        raise InputError(
            f"{name} has {examples} groups for {examples} examples: it identifies examples instead of grouping them; "
            f"give a column whose values several examples share"
        )
    index = {kind: code for code, kind in enumerate(kinds)}
    codes = np.full(examples, len(kinds), np.int64)
    codes[~missing] = [index[text] for text in texts]
    return codes, (*kinds, MISSING) if missing.any() else tuple(kinds)


def _is_missing(cell: object) -> bool:
    return (
        cell is None
        or cell is pd.NA
        or cell is pd.NaT
        or (isinstance(cell, float) and math.isnan(cell))
        or (isinstance(cell, str) and not cell.strip())
    )
