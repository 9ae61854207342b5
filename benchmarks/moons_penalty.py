"""Compare the moons study's own gradient of the jumpstart penalty with jprune's, in CPU time.

``python -m benchmarks.moons_penalty`` prints the time of the value and gradient over all layers of padded groups and of
one narrow network, without the rest of the step. Examples are on the last axis of the study's arrays. jprune expects
them first, so one form transposes ("jprune") and the other exchanges the roles of units and points, whose slacks have
the same formula ("exchanged"). Both store the extremes and compute the rest again in the backward pass.
"""

import resource
import statistics
from collections.abc import Callable
from functools import partial

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np

from experiments.jumpstart_grid import thin_stack
from experiments.jumpstart_grid.thin_stack import Architecture
from jprune.jumpstart.layers import Stack
from jprune.jumpstart.penalty import jumpstart_penalty


def penalty_times(width: int, widths: tuple[int, ...], depth: int, repeats: int = 11) -> dict[str, float]:
    """Return milliseconds of CPU time of the penalty's value and gradient over all layers: in each form.

    Args:
      width: width of the program.
      widths: width of each run, padded to that of the program.
      depth: number of layers.
      repeats: number of interleaved measurements, whose median is returned.
    """
    arch = Architecture(depth, width, 85, penalized=("unit", "point"))
    real = jnp.asarray(np.tile(np.arange(width) < np.array(widths)[:, None], (1, 2)))
    shape = (depth, len(widths), arch.units, arch.train)
    z = jnp.where(real[None, :, :, None], np.random.default_rng(0).normal(size=shape).astype(np.float32), 0.0)
    rules: dict[str, Callable[[jax.Array], tuple[jax.Array, jax.Array]]] = {
        "study": jax.jit(partial(_by_study, arch, real)),
        "jprune": jax.jit(jax.value_and_grad(partial(_by_jprune, arch, real, _transposed))),
        "exchanged": jax.jit(jax.value_and_grad(partial(_by_jprune, arch, real, _exchanged))),
    }
    values = [jax.block_until_ready(rule(z)) for rule in rules.values()]  # type: ignore[no-untyped-call]
    for value in values[1:]:
        for mine, theirs in zip(values[0], value, strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    times: dict[str, list[float]] = {name: [] for name in rules}
    for _ in range(repeats):
        for name, rule in rules.items():
            began = resource.getrusage(resource.RUSAGE_SELF).ru_utime
            for _ in range(30):
                jax.block_until_ready(rule(z))  # type: ignore[no-untyped-call]
            times[name].append((resource.getrusage(resource.RUSAGE_SELF).ru_utime - began) / 30 * 1e3)
    return {name: statistics.median(found) for name, found in times.items()}


def _by_study(arch: Architecture, real: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
    def layer(total: jax.Array, z: jax.Array) -> tuple[jax.Array, jax.Array]:
        found = thin_stack._extremes(arch, z, real)  # type: ignore[no-untyped-call]
        gradient = thin_stack._penalty_gradient(arch, z, real, found, jnp.ones(len(z)))  # type: ignore[no-untyped-call]
        return total + thin_stack._squared_slacks(arch, real, found).sum(), gradient  # type: ignore[no-untyped-call]

    return jax.lax.scan(layer, jnp.zeros(()), z)


def _by_jprune(
    arch: Architecture, real: jax.Array, penalty: Callable[[jax.Array, jax.Array], jax.Array], z: jax.Array
) -> jax.Array:
    def layer(total: jax.Array, z: jax.Array) -> tuple[jax.Array, None]:
        places = z.reshape(len(z), arch.positions, arch.width, arch.train)
        return total + jax.vmap(penalty)(places, real[:, : arch.width]).sum(), None

    storing = jax.checkpoint(layer, policy=_is_extreme, prevent_cse=False)
    return jax.lax.scan(storing, jnp.zeros(()), z)[0]


def _transposed(places: jax.Array, units: jax.Array) -> jax.Array:
    return jumpstart_penalty(jnp.moveaxis(places, 2, 0), "cpaior_keras", units=units)


def _exchanged(places: jax.Array, units: jax.Array) -> jax.Array:
    return jumpstart_penalty(Stack(places), "cpaior_keras", examples=units)


def _is_extreme(primitive: jax.extend.core.Primitive, *_: object, **__: object) -> bool:
    return primitive.name in ("reduce_max", "reduce_min")


if __name__ == "__main__":
    for widths, depth in (((5, 10, 15), 44), ((20, 25), 60), ((4,), 60)):
        found = penalty_times(max(widths), widths * 2, depth)
        print(f"widths {widths}, depth {depth}:", ", ".join(f"{name} {ms:.2f} ms" for name, ms in found.items()))
