"""Run a pure function of one replicate over many replicates: one program, all devices, all processes.

A replicate is identified by its index. Its random key is the study's seed folded with the index, so a
replicate does not depend on the number of replicates, the chunk, the device or the process that runs
it. Programs never communicate between replicates.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import ArrayLike, PyTree

AXIS = "replicate"
Form = Literal["vmap", "map", "unroll"]
Loop = Literal["scan", "steps"]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where replicates run, and how the replicates of one device share it.

    Attributes:
      mesh: one axis, over all devices of all processes.
      form: ``vmap`` batches the replicates of a device, ``map`` runs one after the other in a loop of
        the program, ``unroll`` writes that loop out.
      epoch: ``scan`` makes an epoch one program, ``steps`` calls a program for each step.
    """

    mesh: Mesh
    form: Form = "vmap"
    epoch: Loop = "scan"


def all_devices() -> Mesh:
    """Return a mesh with one axis of replicates over all devices of all processes."""
    return Mesh(np.array(jax.devices()), (AXIS,))


def key(seed: jax.Array | int, index: jax.Array, purpose: int) -> jax.Array:
    """Return the random key of one replicate for one purpose.

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

    program: Callable[..., PyTree]

    def __call__(self, stacked: PyTree, *shared: PyTree) -> PyTree:
        """Run the program on trees with a leading replicate axis and on arguments that all replicates share."""
        return self.program(stacked, shared)


def spread(fn: Callable[..., PyTree], placement: Placement, *, donate: bool = False) -> Spread:
    """Convert a function of one replicate to a program over many.

    Args:
      fn: pure function (replicate, *shared) -> tree.
      placement: the devices, and how the replicates of one device share it.
      donate: whether the program may reuse the memory of its first argument.

    Returns:
      (replicates, *shared) -> trees. ``replicates`` and the result have a leading replicate axis whose
      length is a multiple of the number of devices; ``place`` pads to it.
    """

    def local(stacked: PyTree, shared: tuple[PyTree, ...]) -> PyTree:
        if placement.form == "vmap":
            return jax.vmap(lambda one: fn(one, *shared))(stacked)
        if placement.form == "map":
            return jax.lax.map(lambda one: fn(one, *shared), stacked)
        count = jax.tree.leaves(stacked)[0].shape[0]
        each = [fn(jax.tree.map(lambda x, i=i: x[i], stacked), *shared) for i in range(count)]
        return jax.tree.map(lambda *x: jnp.stack(x), *each)

    split, same = PartitionSpec(AXIS), PartitionSpec()
    program = local
    if placement.mesh.size > 1:
        program = jax.shard_map(local, mesh=placement.mesh, in_specs=(split, same), out_specs=split, check_vma=False)
    return Spread(jax.jit(program, donate_argnums=(0,) if donate else ()))


def place(stacked: PyTree, mesh: Mesh) -> PyTree:
    """Put host arrays with a leading replicate axis on the devices, padded with copies of the last replicate.

    Every process passes the same arrays.
    """

    def put(x: ArrayLike) -> jax.Array:
        x = np.asarray(x)
        padded = np.concatenate([x, np.repeat(x[-1:], -len(x) % mesh.size, axis=0)])
        sharding = NamedSharding(mesh, PartitionSpec(AXIS))
        return jax.make_array_from_callback(padded.shape, sharding, lambda index: padded[index])

    return jax.tree.map(put, stacked)


def share(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copy host arrays that all replicates read to every device."""

    def put(x: ArrayLike) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, NamedSharding(mesh, PartitionSpec()), lambda index: x[index])

    return jax.tree.map(put, tree)


def fetch(stacked: PyTree, count: int) -> PyTree:
    """Copy the first ``count`` replicates to the host, in every process."""
    if jax.process_count() > 1:
        stacked = multihost_utils.process_allgather(stacked, tiled=True)
    return jax.tree.map(lambda x: np.asarray(x)[:count], stacked)


def of_shard(count: int, shard: tuple[int, int]) -> range:
    """Return the replicates of shard (i, n): a contiguous range; sizes differ by at most one between shards.

    Raises:
      ValueError: i is not in 0..n-1.

    >>> [of_shard(10, (i, 4)) for i in range(4)]
    [range(0, 2), range(2, 5), range(5, 7), range(7, 10)]
    """
    i, n = shard
    if not 0 <= i < n:
        raise ValueError(f"shard={i}/{n} must be i/n with 0 <= i < n")
    return range(count * i // n, count * (i + 1) // n)


def chunks(replicates: range, size: int) -> list[range]:
    """Split a range of replicates at multiples of ``size``, so that adding replicates does not move boundaries.

    Raises:
      ValueError: ``size`` is below 1.

    >>> chunks(range(2, 10), 4)
    [range(2, 4), range(4, 8), range(8, 10)]
    """
    if size < 1:
        raise ValueError(f"size={size} must be at least 1")
    if not replicates:
        return []
    cuts = [replicates.start, *range((replicates.start // size + 1) * size, replicates.stop, size), replicates.stop]
    return [range(a, b) for a, b in itertools.pairwise(cuts)]


def bytes_of(fn: Callable[..., PyTree], *args: PyTree) -> int:
    """Return an upper estimate of the memory of a program, from shapes alone.

    It counts the arguments and every intermediate value once, as if none were fused or freed. Nothing is compiled, and
    the estimate is the same on every machine.

    Args:
      fn: the program of one replicate.
      *args: its arguments, or their shapes.

    >>> bytes_of(lambda x: x + 1, jnp.zeros(10, jnp.float32))
    80
    """
    jaxpr = jax.make_jaxpr(fn)(*args).jaxpr
    return sum(map(_bytes, jaxpr.invars)) + _intermediates(jaxpr)


def _bytes(variable: jax.extend.core.Var) -> int:
    shape, dtype = getattr(variable.aval, "shape", ()), getattr(variable.aval, "dtype", None)
    return math.prod(shape) * getattr(dtype, "itemsize", 0)


def _intermediates(jaxpr: jax.extend.core.Jaxpr) -> int:
    """Return the bytes of the outputs of all equations; an inner program counts instead of its equation."""
    total = 0
    for equation in jaxpr.eqns:
        inner = list(jax.extend.core.jaxprs_in_params(equation.params))
        total += max(map(_intermediates, inner)) if inner else 0
        total += 0 if inner else sum(map(_bytes, equation.outvars))
    return total
