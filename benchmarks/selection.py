"""Time the exact global selection, from scores to masks, against sorting and numpy's partition."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

import jprune
from benchmarks.timing import ROUNDS, Row, Side, compare


def rows() -> Iterator[Row]:
    """Time selections of half of 1e6, 1e7 and 1e8 float32 scores."""
    for n in (10**6, 10**7, 10**8):
        yield from in_memory(n)
    yield from sharded()


def in_memory(n: int, *, leaves: bool = True) -> Iterator[Row]:
    """Compare with NumPy, and for 1e7 scores also with sorting; with ``leaves`` also for eight leaves."""
    scores = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
    on_device, keep = jnp.asarray(scores), n // 2
    ours = jax.jit(lambda x: jprune.global_masks({"kernel": x}, keep=keep)["kernel"])

    def partition() -> np.ndarray:
        return scores >= np.partition(scores, len(scores) - keep)[len(scores) - keep]

    _same(np.asarray(ours(on_device)), partition(), keep)
    wait = lambda: ours(on_device).block_until_ready()
    what, pairs = f"global selection, {n:.0e} scores", None if n < 10**8 else ROUNDS
    yield compare(what, "numpy.partition and comparison", wait, partition, must=0.5, pairs=pairs)
    if n == 10**7:
        yield _against_sorting(on_device, wait, partition())
        if leaves:
            yield _in_leaves(on_device)


def _against_sorting(scores: jax.Array, wait: Side, wanted: np.ndarray) -> Row:
    keep = scores.size // 2
    sort = jax.jit(lambda x: x >= jnp.sort(x)[x.size - keep])
    _same(np.asarray(sort(scores)), wanted, keep)
    what = f"global selection, {scores.size:.0e} scores"
    return compare(what, "jnp.sort and comparison", wait, lambda: sort(scores).block_until_ready(), must=1 / 30)


def _in_leaves(scores: jax.Array) -> Row:
    keep = scores.size // 2
    leaves = [scores[i::8].reshape(1000, -1) for i in range(8)]
    argsort = jax.jit(partial(argsort_masks, keep=keep))
    tree = jax.jit(lambda xs: jprune.global_masks(xs, keep=keep))
    for a, b in zip(argsort(leaves), tree(leaves), strict=True):
        _same(np.asarray(a), np.asarray(b), int(np.asarray(b).sum()))
    return compare(
        f"global selection, {scores.size:.0e} scores in 8 leaves",
        "argsort of the concatenated leaves",
        lambda: jax.block_until_ready(tree(leaves)),
        lambda: jax.block_until_ready(argsort(leaves)),
        must=1 / 30,
    )


def sharded(devices: int = 8, n: int = 10**7) -> list[Row]:
    """The same over forced CPU devices, against gathering and sorting and against one device.

    Runs in a new process, because jax fixes the number of devices when it starts.
    """
    environment = {**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}"}
    command = [sys.executable, "-m", "benchmarks.selection", str(n)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return [Row(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def _sharded(n: int) -> list[Row]:
    devices, cores = jax.device_count(), os.cpu_count() or 1
    mesh, placed, spread = _spread(n, devices)
    keep = n // 2
    ours = jax.jit(lambda x: jprune.global_masks({"kernel": x}, keep=keep)["kernel"])
    compiled = ours.lower(spread).compile().as_text()
    for moved in ("all-gather", "all-to-all", "collective-permute"):
        if moved in compiled:
            raise AssertionError(f"the compiled selection holds an {moved}")

    replicated = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    @partial(jax.jit, out_shardings=placed)
    def gather_and_sort(x):
        whole = jax.lax.with_sharding_constraint(x, replicated)
        return x >= jnp.sort(whole)[n - keep]

    wanted = np.asarray(gather_and_sort(spread))
    few, alone = (_spread(n, count)[2] for count in (min(devices, cores), 1))
    for scores in (spread, few, alone):
        _same(np.asarray(ours(scores)), wanted, keep)
    what = f"global selection, {n:.0e} scores sharded over"
    return [
        compare(
            f"{what} {devices} forced devices",
            "gather and sort",
            lambda: ours(spread).block_until_ready(),
            lambda: gather_and_sort(spread).block_until_ready(),
            must=1 / 30,
            note="the compiled selection has no all-gather, all-to-all or collective-permute",
        ),
        compare(
            f"{what} as many forced devices as cores, {min(devices, cores)}",
            "one of them on one core",
            lambda: (_run_on(cores), ours(few).block_until_ready()),
            lambda: (_run_on(1), ours(alone).block_until_ready()),
            must=1.0,
            note="a forced device takes all the cores it finds, so one alone is limited to one",
        ),
    ]


def _run_on(cores: int) -> None:
    """Restrict every thread of this process to ``cores`` cores."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setaffinity(int(thread), range(cores))


def _spread(n: int, devices: int) -> tuple[jax.sharding.Mesh, jax.sharding.NamedSharding, jax.Array]:
    """Return the mesh of the first devices, the sharding, and scores sharded over it."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:devices]), ("shard",))
    placed = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("shard"))
    scores = np.random.default_rng(0).standard_normal(n, dtype=np.float32)
    return mesh, placed, jax.device_put(scores, placed)


def argsort_masks(leaves, keep):
    """Select as in JaxPruner: rank the concatenation of all leaves."""
    flat = jnp.concatenate([leaf.reshape(-1) for leaf in leaves])
    mask = jnp.zeros(flat.shape, bool).at[jnp.argsort(flat)[flat.size - keep :]].set(True)
    ends = np.cumsum([leaf.size for leaf in leaves])
    return [part.reshape(leaf.shape) for part, leaf in zip(jnp.split(mask, ends[:-1]), leaves, strict=True)]


def _same(ours: np.ndarray, theirs: np.ndarray, keep: int) -> None:
    if not (ours == theirs).all() or int(ours.sum()) != keep:
        raise AssertionError("the two sides chose different weights")


if __name__ == "__main__":
    print(json.dumps([vars(row) for row in _sharded(int(sys.argv[1]))]))
