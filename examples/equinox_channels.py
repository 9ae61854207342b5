"""Prune heads and hidden units of an Equinox network during training, remove them, and continue training.

python examples/equinox_channels.py
"""

import equinox as eqx
import jax
import jax.numpy as jnp
import optax

import jprune
from jprune.pruning.structured.equinox import smaller_module


class Block(eqx.Module):
    attention: eqx.nn.MultiheadAttention
    up: eqx.nn.Linear
    down: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        keys = jax.random.split(key, 4)
        self.attention = eqx.nn.MultiheadAttention(num_heads=4, query_size=16, key=keys[0])
        self.up, self.down = eqx.nn.Linear(16, 64, key=keys[1]), eqx.nn.Linear(64, 16, key=keys[2])
        self.head = eqx.nn.Linear(16, 4, key=keys[3])

    def __call__(self, x):
        x = x + self.attention(x, x, x)
        x = x + jax.vmap(self.down)(jax.nn.gelu(jax.vmap(self.up)(x)))
        return self.head(x.mean(axis=0))


@eqx.filter_jit
def step(model, state, batch, tx):
    def loss(model):
        logits = jax.vmap(model)(batch["tokens"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    grads = eqx.filter_grad(loss)(model)
    updates, state = tx.update(grads, state, eqx.filter(model, eqx.is_array))
    return eqx.apply_updates(model, updates), state


def main() -> int:
    model = Block(jax.random.key(0))
    batch = {"tokens": jax.random.normal(jax.random.key(1), (64, 6, 16)), "label": jnp.arange(64) % 4}
    params, static = eqx.partition(model, eqx.is_array)
    apply = lambda params, tokens: jax.vmap(eqx.combine(params, static))(tokens)

    graph = jprune.trace_model(apply, params, batch["tokens"])
    selection = jprune.structured(graph, budget="multiply_adds", groups="query_proj|^up/", per_group=True)
    adam = optax.adam(1e-3)
    tx = optax.chain(adam, jprune.prune(jprune.magnitude(), {10: 0.2, 20: 0.4}, selection=selection))
    state = tx.init(params)
    for _ in range(30):
        model, state = step(model, state, batch, tx)

    params = eqx.filter(model, eqx.is_array)
    small = jprune.remove_channels(graph, params, jprune.masks_of(state), also=(state,), check=batch["tokens"])
    smaller = smaller_module(model, small.params)
    adam_state = smaller_module(small.also[0][0])  # state of the optimizer; that of prune belongs to the larger network
    for _ in range(10):
        smaller, adam_state = step(smaller, adam_state, batch, adam)
    heads, units = smaller.attention.num_heads, smaller.up.out_features
    before, after = small.table.multiply_adds
    print(f"{heads} of 4 heads and {units} of 64 hidden units, {after / before:.2f} of the multiply-adds")
    return units


if __name__ == "__main__":
    main()
