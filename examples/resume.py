"""Stop a training run with pruning, resume it from a checkpoint, and get bit-for-bit the same weights.

python examples/resume.py
"""

import pathlib
import tempfile

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp

import jprune


def make():
    params = {"kernel": jax.random.normal(jax.random.key(0), (32, 8)), "bias": jnp.zeros(8)}
    tx = optax.chain(optax.adamw(1e-2), jprune.prune(jprune.gradient(), jprune.cubic(0.9, begin=0, end=30, every=5)))
    return params, tx


def train(params, state, tx, steps):
    @jax.jit
    def step(params, state, key):
        x = jax.random.normal(key, (16, 32))
        grads = jax.grad(lambda p: jnp.mean((x @ p["kernel"] + p["bias"]) ** 2))(params)
        updates, state = tx.update(grads, state, params, grad=grads)
        return optax.apply_updates(params, updates), state

    for i in steps:
        params, state = step(params, state, jax.random.key(i))
    return params, state


def main() -> bool:
    params, tx = make()
    through, _ = train(params, tx.init(params), tx, range(40))

    half = train(params, tx.init(params), tx, range(17))
    folder = pathlib.Path(tempfile.mkdtemp()) / "checkpoint"
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder, half)
        checkpointer.wait_until_finished()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, half)
        restored = checkpointer.restore(folder, abstract)
    resumed, _ = train(*restored, tx, range(17, 40))

    same = all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(through), jax.tree.leaves(resumed), strict=True))
    print(f"{int((resumed['kernel'] != 0).sum())} weights are left; the same bits as an uninterrupted run: {same}")
    return same


if __name__ == "__main__":
    main()
