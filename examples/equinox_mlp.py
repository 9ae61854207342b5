"""Prune an Equinox network, whose leaves are not all arrays, with a geometric schedule.

python examples/equinox_mlp.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import jprune


@eqx.filter_jit
def step(model, state, batch, tx):
    def loss(model):
        logits = jax.vmap(model)(batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    grads = eqx.filter_grad(loss)(model)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_inexact_array), grad=grads)
    return eqx.apply_updates(model, updates), state


def main() -> float:
    model = eqx.nn.MLP(in_size=16, out_size=4, width_size=64, depth=2, key=jax.random.key(0))
    batch = {"image": jax.random.normal(jax.random.key(1), (128, 16)), "label": jnp.arange(128) % 4}
    # Three times, every 20 steps, remove half of the remaining weights.
    tx = optax.chain(optax.adam(1e-3), jprune.prune(jprune.gradient(), jprune.geometric(0.5, every=20, times=3)))
    state = tx.init(eqx.filter(model, eqx.is_inexact_array))
    for _ in range(80):
        model, state = step(model, state, batch, tx)
    masks = jprune.masks_of(state)
    jprune.check_pruned(eqx.filter(model, eqx.is_inexact_array), state)
    print(f"sparsity {jprune.sparsity(masks):.3f}")
    return jprune.sparsity(masks)


if __name__ == "__main__":
    main()
