"""Checkpoints within a stage, from which a killed run continues with the same numbers.

A checkpoint is a stage of the store under another name, ``dense_after_12-3f2a.../00000-00030/``, so it is complete or
absent, and its checksums are verified. The latest one is kept until its stage is stored.
"""

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from experiments.storage import files, store
from experiments.storage.files import JSON, StoreError

Arrays = dict[str, np.ndarray]


class Checkpoints:
    """The checkpoints of one stage.

    Attributes:
      done: epochs of the latest checkpoint; 0 if there is none.
    """

    def __init__(
        self,
        target: store.Stage,
        settings: Mapping[str, JSON],
        minutes: float,
        *,
        agree: Callable[[PyTree], PyTree] = lambda value: value,
        writes: bool = True,
    ):
        """Find the latest checkpoint.

        Args:
          target: stage that is being computed.
          settings: its settings.
          minutes: least time between two checkpoints; 0 to write one after every epoch.
          agree: returns the first process's value in every process of a program.
          writes: whether this process writes them.
        """
        self._target, self._settings, self._agree, self._writes = target, settings, agree, writes
        self._seconds, self._last = 60 * minutes, time.monotonic()
        self.done: int = agree(max(self._all(), default=0))

    def load(self) -> Arrays:
        """Read the arrays of the latest checkpoint.

        Raises:
          StoreError: a file of it is missing or altered; the message names it.
        """
        return store.read_weights(self._at(self.done))

    def due(self) -> bool:
        """Whether enough time has passed since the last checkpoint or the start; the same in every process."""
        return bool(self._agree(time.monotonic() - self._last >= self._seconds))

    def save(self, done: int, arrays: Arrays) -> None:
        """Store a checkpoint after this number of epochs, then delete the earlier one.

        Raises:
          StoreError: it cannot be written; the message names the file.
        """
        if self._writes:
            with store.writing(self._at(done), self._settings) as folder:
                files.write_weights(folder / "weights", arrays)
            self._delete(earlier_than=done)
        self.done, self._last = done, time.monotonic()

    def clear(self) -> None:
        """Delete all checkpoints; call it when the stage is stored."""
        if self._writes:
            self._delete()

    def _at(self, done: int) -> store.Stage:
        target = self._target
        return store.Stage(target.root, f"{target.kind}_after_{done}", target.digest, target.replicates)

    def _all(self) -> list[int]:
        """Return the numbers of epochs of the checkpoints that exist."""
        pattern = re.compile(rf"{re.escape(self._target.kind)}_after_(\d+)-{self._target.digest}")
        found = [pattern.fullmatch(path.name) for path in self._target.root.glob(f"{self._target.kind}_after_*")]
        numbers = [int(match[1]) for match in found if match]
        return [number for number in numbers if self._at(number).done]

    def _delete(self, earlier_than: float = float("inf")) -> None:
        for number in sorted(self._all()):
            if number < earlier_than:
                path = self._at(number).path
                shutil.rmtree(path, ignore_errors=True)
                with contextlib.suppress(OSError):  # it has the checkpoint of another run, or another run removed it
                    path.parent.rmdir()


def restored(kept: Checkpoints | None, state: PyTree) -> tuple[int, PyTree]:
    """Return the epochs and the state of the latest checkpoint; 0 and the given state if there is none.

    Args:
      kept: checkpoints of a stage that one process computes, or None.
      state: state at the start of the stage, with the same structure as the stored ones. Where it has a numpy array,
        so has the result, with the stored dtype; jax would turn float64 into float32.

    Raises:
      StoreError: as ``unpack``.
    """
    if kept is None or not kept.done:
        return 0, state
    stored = unpack(kept.load(), state)
    arrays = jax.tree.map(lambda x, to: x if isinstance(to, np.ndarray) else jnp.asarray(x), stored, state)
    return kept.done, with_keys(arrays, state)


def keep(kept: Checkpoints | None, done: int, state: PyTree) -> None:
    """Store the state after this number of epochs if a checkpoint is due."""
    if kept is not None and kept.due():
        kept.save(done, pack(state))


def pack(tree: PyTree) -> Arrays:
    """Name the leaves of a tree of arrays by their number, so that they can be stored; random keys become numbers."""
    return {f"{number:06d}": np.asarray(_plain(leaf)) for number, leaf in enumerate(jax.tree.leaves(tree))}


def unpack(arrays: Mapping[str, np.ndarray], like: PyTree) -> PyTree:
    """Put packed arrays back into a tree like the one that was packed; random keys stay numbers (see ``with_keys``).

    Raises:
      StoreError: the tree has other leaves or shapes, as after an update of a library or on another kind of device. The
        first axis, of replicates or epochs, may have another length.
    """
    leaves, treedef = jax.tree.flatten(like)
    if len(arrays) != len(leaves):
        raise StoreError(
            f"the checkpoint has {len(arrays)} arrays and the state of this version {len(leaves)}; delete the folder "
            "whose name contains _after_, and rerun the same command"
        )
    found = [arrays[name] for name in sorted(arrays)]
    for number, (array, leaf) in enumerate(zip(found, leaves, strict=True)):
        if not hasattr(leaf, "dtype"):
            continue
        shape, wanted = array.shape, _plain(leaf).shape
        if len(shape) != len(wanted) or shape[1:] != wanted[1:]:
            raise StoreError(
                f"array {number} of the checkpoint has the shape {shape} and that of this run {wanted}: it is from "
                "another version or another kind of device; continue it there, or delete the folder whose name "
                "contains _after_, and rerun the same command"
            )
    return jax.tree.unflatten(treedef, found)


def plain(tree: PyTree) -> PyTree:
    """Replace random keys by their numbers, which can be copied to the host."""
    return jax.tree.map(_plain, tree)


def with_keys(tree: PyTree, like: PyTree) -> PyTree:
    """Turn numbers back into random keys wherever ``like`` has them."""
    return jax.tree.map(
        lambda x, to: jax.random.wrap_key_data(x, impl=jax.random.key_impl(to)) if _is_key(to) else x, tree, like
    )


def _plain(leaf: jax.Array) -> jax.Array:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _is_key(leaf: jax.Array) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))
