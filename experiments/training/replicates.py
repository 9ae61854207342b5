"""Run a pure function of one replicate on many: in one program, on every device, on every host.

A replicate is known by its index alone: its key is the study's seed folded with the index, so it is
the same replicate whatever number of others it runs with, in whichever chunk, on whichever device of
whichever process. Programs never communicate between replicates.
"""

import dataclasses
import itertools
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from experiments.storage import files

PyTree = Any
AXIS = "replicate"
_LONG_ENOUGH = 20.0  # seconds of timing one candidate


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where and how replicates run.

    Attributes:
      mesh: one axis, over every device of every process.
      form: how the replicates of one device share it: ``vmap`` batches them, ``map`` runs one after
        the other in a loop of the program, ``unroll`` writes that loop out.
      epoch: whether an epoch is one program that scans its steps (``scan``), or the host calls a
        program for each step (``steps``).
    """

    mesh: Mesh
    form: Literal["vmap", "map", "unroll"] = "vmap"
    epoch: Literal["scan", "steps"] = "scan"


def start(coordinator: str | None = None, process_id: int | None = None, num_processes: int | None = None) -> None:
    """Join the processes of one study; call it before anything touches a device.

    Without arguments it joins what Slurm started, if a Slurm step has more than one task, and else
    does nothing.

    Args:
      coordinator: HOST:PORT of process 0.
      process_id: of this process, from 0.
      num_processes: in all.

    Raises:
      ValueError: some of the three arguments are given and some are not, or the id is out of range.
    """
    given = {"coordinator": coordinator, "process_id": process_id, "num_processes": num_processes}
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ValueError(
            f"{', '.join(missing)} must be given too: coordinator, process_id and num_processes go together"
        )
    if process_id is not None and num_processes is not None and not 0 <= process_id < num_processes:
        raise ValueError(f"process_id={process_id} must be in 0..{num_processes - 1}")
    if not missing:
        jax.distributed.initialize(coordinator, num_processes, process_id)
    elif int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        jax.distributed.initialize()


def all_devices() -> Mesh:
    """One axis of replicates over every device of every process."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def is_first_process() -> bool:
    """Whether this process is the one that writes."""
    return jax.process_index() == 0


def agree(value: Any) -> Any:
    """The first process's value, in every process; JSON."""
    if jax.process_count() == 1:
        return value
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    length = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    padded = np.resize(text, length)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(padded)))


def key(seed: jax.Array | int, index: jax.Array, purpose: int) -> jax.Array:
    """The key of one replicate for one purpose.

    >>> a, b = key(0, jnp.int32(7), 1), jax.vmap(lambda i: key(0, i, 1))(jnp.arange(9))[7]
    >>> bool(jax.random.key_data(a)[0] == jax.random.key_data(b)[0])
    True
    """
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), index), purpose)


@dataclasses.dataclass(frozen=True)
class Spread:
    """A program over many replicates, made by ``spread``.

    Attributes:
      program: the jitted function of (replicates, tuple of shared arguments).
    """

    program: Any

    def __call__(self, stacked: PyTree, *shared: PyTree) -> PyTree:
        """Run it: trees with the replicate axis first, then what all replicates share."""
        return self.program(stacked, shared)


def spread(fn: Callable[..., PyTree], layout: Layout, *, donate: bool = False) -> Spread:
    """Make a function of one replicate a program over many.

    Args:
      fn: (replicate, *shared) -> tree; pure.
      layout: devices, and how the replicates of one share it.
      donate: whether the program consumes the memory of its first argument.

    Returns:
      (replicates, *shared) -> trees, where ``replicates`` and the result have the replicate axis first,
      its length a multiple of the devices (``place`` sees to that).
    """

    def here(stacked: PyTree, shared: tuple[PyTree, ...]) -> PyTree:
        if layout.form == "vmap":
            return jax.vmap(lambda one: fn(one, *shared))(stacked)
        if layout.form == "map":
            return jax.lax.map(lambda one: fn(one, *shared), stacked)
        count = jax.tree.leaves(stacked)[0].shape[0]
        each = [fn(jax.tree.map(lambda x, i=i: x[i], stacked), *shared) for i in range(count)]
        return jax.tree.map(lambda *x: jnp.stack(x), *each)

    split, same = PartitionSpec(AXIS), PartitionSpec()
    many = here
    if layout.mesh.size > 1:
        many = jax.shard_map(here, mesh=layout.mesh, in_specs=(split, same), out_specs=split, check_vma=False)
    return Spread(jax.jit(many, donate_argnums=(0,) if donate else ()))


def place(stacked: PyTree, mesh: Mesh) -> PyTree:
    """Put host arrays with the replicate axis first on the devices, the last repeated to fill them.

    Every process passes the same arrays.
    """

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        padded = np.concatenate([x, np.repeat(x[-1:], -len(x) % mesh.size, axis=0)])
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        return jax.make_array_from_callback(padded.shape, sharding, lambda index: padded[index])

    return jax.tree.map(put, stacked)


def share(tree: PyTree, mesh: Mesh) -> PyTree:
    """Put host arrays that all replicates read on every device."""

    def put(x: Any) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec()), lambda index: x[index])

    return jax.tree.map(put, tree)


def fetch(stacked: PyTree, count: int) -> PyTree:
    """Bring the first ``count`` replicates to the host, in every process."""
    if jax.process_count() > 1:
        stacked = multihost_utils.process_allgather(stacked, tiled=True)
    return jax.tree.map(lambda x: np.asarray(x)[:count], stacked)


def of_shard(count: int, shard: tuple[int, int]) -> range:
    """The replicates of shard (i, n): contiguous, and as many as of any other shard or one more.

    Raises:
      ValueError: no such shard.

    >>> [of_shard(10, (i, 4)) for i in range(4)]
    [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]
    """
    i, n = shard
    if not 0 <= i < n:
        raise ValueError(f"shard={i}/{n} must be i/n with 0 <= i < n")
    return range(count * i // n, count * (i + 1) // n)


def chunks(replicates: range, size: int) -> list[range]:
    """Cut replicates at the multiples of a size, so that a chunk does not depend on where the range ends.

    Raises:
      ValueError: a size below 1.

    >>> chunks(range(2, 10), 4)
    [range(2, 4), range(4, 8), range(8, 10)]
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    if not replicates:
        return []
    cuts = [replicates.start, *range((replicates.start // size + 1) * size, replicates.stop, size), replicates.stop]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def bytes_of(fn: Callable[..., PyTree], *args: Any) -> int:
    """An upper estimate of the memory that a program takes, from shapes alone.

    Counts the arguments and every intermediate value once, as if none were fused or freed. Nothing is
    compiled, and the estimate is the same on every machine.

    Args:
      fn: the program, of one replicate.
      *args: its arguments, or their shapes.

    >>> bytes_of(lambda x: x + 1, jnp.zeros(10, jnp.float32))
    80
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return sum(map(_bytes, jaxpr.invars)) + _intermediates(jaxpr)


def fastest(candidates: Mapping[str, Callable[[], Any]], cache: Path, identity: str, *, repeats: int = 3) -> str:
    """The name of the candidate that takes the least time, measured once and remembered.

    Args:
      candidates: name -> what to time; its result is waited for. The first call compiles and does not
        count; of the others the least does. One that fails, as for want of memory, is out.
      cache: JSON file of earlier choices; the first process reads and writes it.
      identity: what is measured; the kind and number of devices are added.
      repeats: calls that count.

    Raises:
      RuntimeError: every candidate fails; the message has each error.
    """
    device, names = jax.devices()[0], list(candidates)
    machine = f"{jax.device_count()} x {device.device_kind}, {os.cpu_count()} cores, {jax.process_count()} processes"
    entry = f"{identity}; {machine}"
    known = _measured(cache) if is_first_process() else {}
    choice = known.get(entry, {}).get("choice")
    remembered = agree(names.index(choice) if choice in names else -1)
    if remembered >= 0:
        return names[remembered]
    seconds, failures = {}, []
    for name, run in candidates.items():
        try:
            seconds[name] = _least_seconds(run, repeats)
        except jax.errors.JaxRuntimeError as error:
            failures.append(f"{name}: {error}")
    if not seconds:
        raise RuntimeError(f"no way to run {identity} works: {'; '.join(failures)}")
    best = names[agree(names.index(min(seconds, key=lambda name: seconds[name])))]
    if is_first_process():
        files.write_json(cache, {**known, entry: {"choice": best, "seconds": seconds}})
    return best


def _measured(cache: Path) -> dict[str, dict[str, Any]]:
    """The choices of a cache; none where it is absent or is not what was written: they are measured anew."""
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        return {}
    sound = isinstance(known, dict) and all(isinstance(entry, dict) for entry in known.values())
    return known if sound else {}


def _least_seconds(run: Callable[[], Any], repeats: int) -> float:
    """The least time of some calls, after one that compiles; slow ones are not called as often."""
    jax.block_until_ready(run())
    times: list[float] = []
    while len(times) < repeats and sum(times) < _LONG_ENOUGH:
        before = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - before)
    return min(times)


def _bytes(variable: Any) -> int:
    shape, dtype = getattr(variable.aval, "shape", ()), getattr(variable.aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def _intermediates(jaxpr: Any) -> int:
    """Bytes of what every equation makes; of one with a program inside, of that program instead."""
    total = 0
    for equation in jaxpr.eqns:
        inner = list(jax.extend.core.jaxprs_in_params(equation.params))
        total += max(map(_intermediates, inner)) if inner else 0
        total += 0 if inner else sum(map(_bytes, equation.outvars))
    return total
