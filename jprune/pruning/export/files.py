"""Save masks and pruned weights as safetensors files, and convert them to sparse arrays.

Nothing is loaded with pickle. A file is written under a temporary name in its folder and renamed, so it is never
incomplete. An optimizer state with masks is a plain pytree, which any checkpoint library can save.

Files contain only arrays. PRNG keys and leaves that are not arrays (functions and Python numbers in Equinox modules)
are not stored.
"""

import importlib
import json
import math
import os
from collections import Counter
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, NamedSharding
from jaxtyping import PyTree

from jprune._extras import missing
from jprune.files import replacing
from jprune.trees import Leaf, flatten, match, only_parameters

_FORMAT = "jprune-1"
_BITS = "#bits"
_VALUES = "#values"
# The dtypes that safetensors can write and its numpy reader can read.
_DTYPES = frozenset(
    ["bool", "float16", "bfloat16", "float32", "float64", "complex64"]
    + [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
)


def save_masks(path: str | os.PathLike[str], masks: PyTree, *, gather: bool = False) -> None:
    """Write masks to a safetensors file, one bit per weight.

    Args:
      path: the file to write; its folder must exist.
      masks: bool arrays of any shapes; leaves that are None or PRNG keys are not stored.
      gather: see ``save_pruned``.

    Raises:
      ImportError: the extra ``export`` is not installed.
      OSError: the file cannot be written.
      ValueError: there is no mask, a leaf is not boolean, two leaves have the same path, a path ends with ``#bits`` or
        ``#values``, or a leaf is spread over several processes and ``gather`` is False.

    >>> import tempfile, pathlib
    >>> masks = {"kernel": jnp.array([[True, False, True]]), "bias": None}
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "masks.safetensors"
    >>> save_masks(file, masks)
    >>> load_masks(file, {"kernel": jnp.ones((1, 3)), "bias": jnp.ones(3)})
    {'bias': None, 'kernel': Array([[ True, False,  True]], dtype=bool)}
    """
    paths, leaves, _ = flatten(masks)
    _refuse_bad_paths(paths, leaves, "masks")
    tensors, shapes = {}, {}
    for name, leaf in zip(paths, leaves, strict=True):
        if _is_stored(leaf):
            tensors[name + _BITS], shapes[name] = _pack(name, leaf, gather)
    if not tensors:
        raise ValueError("masks has no array, so there is nothing to save")
    _write(path, tensors, shapes, gather)


def load_masks(path: str | os.PathLike[str], params: PyTree) -> PyTree:
    """Read masks written by ``save_masks`` or ``save_pruned``, as a tree like ``params``.

    Args:
      path: the file to read.
      params: arrays; the masks must have their structure and shapes.

    Returns:
      Bool arrays shaped and sharded like the leaves of ``params``, None where the file has no mask.

    Raises:
      ImportError: the extra ``export`` is not installed.
      ValueError: the file was not written by jprune or has no masks, or a mask in it fits no leaf of ``params``; the
        message names the leaf.

    >>> import tempfile, pathlib
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "masks.safetensors"
    >>> save_masks(file, {"kernel": jnp.array([True, False])})
    >>> load_masks(file, {"kernel": jnp.ones(2)})
    {'kernel': Array([ True, False], dtype=bool)}
    """
    tensors, shapes = _read(path)
    if not shapes:
        raise ValueError(
            f"{os.fspath(path)} has no masks, because it was saved without masks=; read its weights with "
            "jprune.io.load_pruned, or save again with masks=jprune.masks_of(state)"
        )
    paths, leaves, treedef = flatten(params)
    masks = {name: _unpack(path, tensors, name, shape) for name, shape in shapes.items()}
    _refuse_misfits(path, dict(zip(paths, leaves, strict=True)), shapes)
    return jax.tree.unflatten(
        treedef,
        [_placed(masks[name], leaf) if name in masks else None for name, leaf in zip(paths, leaves, strict=True)],
    )


def save_pruned(
    path: str | os.PathLike[str], params: PyTree, masks: PyTree | None = None, *, gather: bool = False
) -> None:
    """Write weights to a safetensors file: dense, or only those that the masks keep.

    Without masks every array is stored unchanged under its path, for any reader of safetensors. With masks, a masked
    leaf is stored as its mask, one bit per weight, and its kept values in row-major order, for ``load_pruned``.

    Args:
      path: the file to write; its folder must exist.
      params: bool, integer, float or complex64 arrays, ``bfloat16`` included. PRNG keys and leaves that are not arrays
        are not stored.
      masks: bool arrays like ``params``, None where a leaf is stored whole.
      gather: for arrays that are spread over several processes: call the function in every process with
        ``gather=True``. Leaves are collected one at a time, and each must fit on a device. Process 0 writes the file;
        the others return when it exists.

    Raises:
      ImportError: the extra ``export`` is not installed.
      OSError: the file cannot be written.
      ValueError: a mask is not boolean or fits no leaf of ``params``; a dtype cannot be stored; two leaves have one
        path, or a path ends with ``#bits`` or ``#values``; a leaf is traced, or it is spread over several processes and
        ``gather`` is False. The message names the leaf.

    >>> import tempfile, pathlib
    >>> params = {"kernel": jnp.array([[1.0, 5.0, 2.0]]), "bias": jnp.zeros(3)}
    >>> masks = {"kernel": jnp.array([[True, False, True]]), "bias": None}
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "pruned.safetensors"
    >>> save_pruned(file, params, masks)
    >>> load_pruned(file, params)["kernel"]
    Array([[1., 0., 2.]], dtype=float32)
    """
    paths, leaves, _ = flatten(params)
    given = [None] * len(paths) if masks is None else match(params, masks, reference_name="params", name="masks")
    _refuse_bad_paths(paths, leaves, "params")
    tensors: dict[str, np.ndarray] = {}
    shapes: dict[str, list[int]] = {}
    for name, leaf, mask in zip(paths, leaves, given, strict=True):
        if not _is_stored(leaf):
            continue
        array = _on_host("params", name, leaf, gather)
        if array.dtype.name not in _DTYPES:
            raise ValueError(
                f"params has dtype {array.dtype} at '{name}', which a safetensors file cannot store; cast it, or save "
                "with a checkpoint library"
            )
        if mask is None:
            tensors[name] = np.asarray(array, order="C")
        else:
            tensors[name + _BITS], shapes[name] = _pack(name, mask, gather)
            tensors[name + _VALUES] = array[_unpack(path, tensors, name, shapes[name])]
    _write(path, tensors, shapes, gather)


def load_pruned(path: str | os.PathLike[str], params: PyTree) -> PyTree:
    """Read weights written by ``save_pruned``, as a tree like ``params``; pruned weights are 0.

    Args:
      path: the file to read.
      params: arrays or ``jax.ShapeDtypeStruct``; the file must have their structure, shapes and dtypes, and the result
        has their shardings.

    Returns:
      A tree like ``params``. PRNG keys and leaves that are not arrays are those of ``params``.

    Raises:
      ImportError: the extra ``export`` is not installed.
      ValueError: the file was not written by jprune, lacks a leaf of ``params`` or has one that ``params`` lacks,
        or a shape or dtype differs; the message names the leaf.

    >>> import tempfile, pathlib
    >>> params, masks = {"kernel": jnp.array([3.0, 5.0])}, {"kernel": jnp.array([True, False])}
    >>> file = pathlib.Path(tempfile.mkdtemp()) / "pruned.safetensors"
    >>> save_pruned(file, params, masks)
    >>> load_pruned(file, jax.eval_shape(lambda: params))
    {'kernel': Array([3., 0.], dtype=float32)}
    """
    tensors, shapes = _read(path)
    if shapes and all(name.endswith(_BITS) for name in tensors):
        raise ValueError(f"{os.fspath(path)} has only masks; read them with jprune.io.load_masks")
    paths, leaves, treedef = flatten(params)
    found: dict[str, np.ndarray] = {
        name: array for name, array in tensors.items() if not name.endswith((_BITS, _VALUES))
    }
    for name, shape in shapes.items():
        mask, values = _unpack(path, tensors, name, shape), tensors.get(name + _VALUES)
        if values is None or values.shape != (int(mask.sum()),):
            kept = "no values" if values is None else f"values of shape {values.shape}"
            raise ValueError(f"{os.fspath(path)}: '{name}' has {kept} for {int(mask.sum())} kept weights")
        found[name] = np.zeros(mask.shape, values.dtype)
        found[name][mask] = values
    wanted = {name: leaf for name, leaf in zip(paths, leaves, strict=True) if _is_stored(leaf)}
    _refuse_misfits(path, wanted, {name: array.shape for name, array in found.items()})
    for name, leaf in wanted.items():
        if name not in found:
            raise ValueError(
                f"{os.fspath(path)} has no leaf '{name}', which params has{only_parameters(params, 'params')}"
            )
        if found[name].dtype != leaf.dtype:
            raise ValueError(f"{os.fspath(path)}: '{name}' is {found[name].dtype}, where params has {leaf.dtype}")
    return jax.tree.unflatten(
        treedef,
        [_placed(found[name], leaf) if name in wanted else leaf for name, leaf in zip(paths, leaves, strict=True)],
    )


def to_bcoo(params: PyTree, masks: PyTree, *, gather: bool = False) -> PyTree:
    """Convert masked leaves to ``jax.experimental.sparse.BCOO`` arrays of their kept weights.

    Call it outside jit, because the shapes depend on the number of weights kept. Kept weights are stored even if they
    are 0, so ``nse`` is the number kept.

    Args:
      params: arrays.
      masks: bool arrays like ``params``, None where a leaf stays dense.
      gather: for masked leaves that are spread over several processes: collect them, so that every process has the
        whole sparse array; call the function in every process with ``gather=True``.

    Returns:
      A tree like ``params`` with a BCOO array, indices sorted and unique, in place of each masked leaf.

    Raises:
      ValueError: a mask is not boolean, traced, or fits no leaf of ``params``; or a masked leaf is spread over several
        processes and ``gather`` is False.

    >>> sparse = to_bcoo({"w": jnp.array([[1.0, 5.0, 2.0]])}, {"w": jnp.array([[True, False, True]])})
    >>> sparse["w"].nse, sparse["w"].todense()
    (2, Array([[1., 0., 2.]], dtype=float32))
    """
    from jax.experimental.sparse import BCOO  # noqa: PLC0415 - slow to import and rarely needed

    paths, leaves, treedef = flatten(params)
    matched = match(params, masks, reference_name="params", name="masks")

    def sparse(name: str, leaf: Leaf, mask: Leaf) -> PyTree:
        if mask is None:
            return leaf
        kept = _bool_on_host(name, mask, gather)
        indices = np.argwhere(kept).astype(np.int32)
        whole = _on_host("params", name, leaf, gather) if _is_spread(leaf) else leaf
        values = jnp.atleast_1d(whole)[np.nonzero(np.atleast_1d(kept))]  # a scalar has no index
        return BCOO((values, jax.device_put(indices)), shape=leaf.shape, indices_sorted=True, unique_indices=True)

    return jax.tree.unflatten(treedef, [sparse(*each) for each in zip(paths, leaves, matched, strict=True)])


def _is_stored(leaf: Leaf) -> bool:
    """Whether a file has the leaf: an array (or a shape) that is not a PRNG key."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)


def _refuse_bad_paths(paths: list[str], leaves: list[Leaf], argument: str) -> None:
    """Raise if two leaves have the same path, or a leaf has the path of a part of another leaf in the file."""
    times = Counter(path for path, leaf in zip(paths, leaves, strict=True) if _is_stored(leaf))
    if repeated := [path for path, number in times.items() if number > 1]:
        raise ValueError(f"{argument} has more than one leaf with the path '{repeated[0]}'; rename one")
    if reserved := [path for path in times if path.endswith((_BITS, _VALUES))]:
        raise ValueError(
            f"{argument} has a leaf with the path '{reserved[0]}'; rename it, because a file stores masked leaves "
            f"under names that end with {_BITS} and {_VALUES}"
        )


def _is_spread(leaf: Leaf) -> bool:
    """Whether no process has the whole array."""
    concrete = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
    return concrete and not leaf.is_fully_addressable and not leaf.is_fully_replicated


def _on_host(argument: str, name: str, leaf: Leaf, gather: bool) -> np.ndarray:
    """Return the whole leaf as a numpy array."""
    if isinstance(leaf, jax.core.Tracer):
        raise ValueError(f"{argument} is traced at '{name}'; call this function outside jit")
    if _is_spread(leaf):
        if not gather:
            raise ValueError(
                f"{argument} is spread over several processes at '{name}'; call this function in every process with "
                "gather=True"
            )
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def _bool_on_host(name: str, mask: Leaf, gather: bool) -> np.ndarray:
    array = _on_host("masks", name, mask, gather)
    if array.dtype != np.bool_:
        raise ValueError(f"masks has dtype {array.dtype} at '{name}'; masks must be boolean")
    return array


def _placed(array: np.ndarray, leaf: Leaf) -> jax.Array:
    """Place an array on the devices of a leaf; a leaf that is uncommitted on the default device has no influence."""
    sharding = getattr(leaf, "sharding", None)
    abstract = isinstance(sharding, NamedSharding) and isinstance(sharding.mesh, AbstractMesh)
    if sharding is None or abstract or (isinstance(leaf, jax.Array) and not leaf.committed):
        moved: jax.Array = jax.device_put(array)
        return moved
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def _pack(name: str, mask: Leaf, gather: bool) -> tuple[np.ndarray, list[int]]:
    """Pack a mask to bits, row-major, the first weight in the highest bit of the first byte."""
    array = _bool_on_host(name, mask, gather)
    return np.packbits(array.reshape(-1)), list(array.shape)


def _unpack(path: str | os.PathLike[str], tensors: dict[str, np.ndarray], name: str, shape: list[int]) -> np.ndarray:
    """Undo ``_pack``; raise if the number of bytes does not fit the shape."""
    bits, count = tensors.get(name + _BITS), math.prod(shape)
    if bits is None or bits.dtype != np.uint8 or bits.shape != (-(-count // 8),):
        raise ValueError(f"{os.fspath(path)}: the mask of '{name}' does not have the {count} bits of shape {shape}")
    return np.unpackbits(bits, count=count).astype(bool).reshape(shape)


def _shapes(path: str | os.PathLike[str], text: str) -> dict[str, list[int]]:
    """Parse and check the shapes of the masks in a file's metadata."""
    shapes = json.loads(text)
    lists = shapes.values() if isinstance(shapes, dict) else [None]
    if not all(isinstance(shape, list) and all(type(size) is int and size >= 0 for size in shape) for shape in lists):
        raise ValueError(f"{os.fspath(path)}: the shapes of its masks are not lists of sizes: {text[:80]}")
    return dict(shapes)


def _refuse_misfits(
    path: str | os.PathLike[str], wanted: dict[str, Leaf], shapes: dict[str, tuple[int, ...]] | dict[str, list[int]]
) -> None:
    """Raise if the file has a leaf that the tree lacks or has in another shape."""
    absent = [name for name in shapes if wanted.get(name) is None]
    if absent:
        raise ValueError(f"{os.fspath(path)} has {absent}, which params lacks; params has {sorted(wanted)}")
    for name, shape in shapes.items():
        given, allowed = tuple(shape), tuple(wanted[name].shape)
        if given != allowed:
            raise ValueError(f"{os.fspath(path)} has shape {given} at '{name}', where params has {allowed}")


def _safetensors() -> tuple[ModuleType, ModuleType]:
    try:
        importlib.import_module("ml_dtypes")
        return importlib.import_module("safetensors.numpy"), importlib.import_module("safetensors")
    except ImportError as error:
        raise ImportError(missing("the safetensors format needs the extra 'export'", "export")) from error


def _write(
    path: str | os.PathLike[str], tensors: dict[str, np.ndarray], shapes: dict[str, list[int]], gather: bool
) -> None:
    """Write a file; with ``gather`` and several processes, process 0 writes and the others wait for it."""
    several = gather and jax.process_count() > 1
    fault: Exception | None = None
    if not several or jax.process_index() == 0:
        try:
            _write_here(path, tensors, shapes)
        except Exception as error:
            fault = error
    if several and not multihost_utils.broadcast_one_to_all(np.bool_(fault is None)) and fault is None:
        fault = OSError(f"process 0 could not write {os.fspath(path)}; its own error says why")
    if fault is not None:
        raise fault


def _write_here(path: str | os.PathLike[str], tensors: dict[str, np.ndarray], shapes: dict[str, list[int]]) -> None:
    numpy_format, _ = _safetensors()
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(f"{os.fspath(path)}: its folder does not exist; create it first")
    with replacing(path) as temporary:
        numpy_format.save_file(tensors, str(temporary), metadata={"format": _FORMAT, "shapes": json.dumps(shapes)})


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
    numpy_format, safetensors = _safetensors()
    if Path(path).is_dir():
        raise IsADirectoryError(f"{os.fspath(path)} is a folder; pass the path of a file in it")
    try:
        with safetensors.safe_open(os.fspath(path), framework="np") as file:
            metadata = file.metadata() or {}
        if metadata.get("format") != _FORMAT:
            raise ValueError(f"{os.fspath(path)} was not written by jprune: format is {metadata.get('format')!r}")
        return numpy_format.load_file(os.fspath(path)), _shapes(path, metadata["shapes"])
    except (safetensors.SafetensorError, KeyError, RecursionError, json.JSONDecodeError) as error:
        raise ValueError(f"{os.fspath(path)} is not a whole safetensors file: {error}") from error
