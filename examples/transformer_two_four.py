"""Prune a transformer block to 2:4 along the input axis of each kernel, then fine-tune it.

python examples/transformer_two_four.py
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jprune


class Block(nnx.Module):
    def __init__(self, width, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x):
        h = self.norm(x)
        heads = [layer(h).reshape(*h.shape[:-1], 4, -1) for layer in (self.query, self.key, self.value)]
        x = x + self.out(jax.nn.dot_product_attention(*heads).reshape(h.shape))
        return x + self.down(nnx.gelu(self.up(self.norm_mlp(x))))


def main() -> float:
    graph, params = nnx.split(Block(64, nnx.Rngs(0)))
    tokens = jax.random.normal(jax.random.key(1), (8, 32, 64))
    wanted = jnp.roll(tokens, 1, axis=1)

    def loss(params):
        return jnp.mean((nnx.merge(graph, params)(tokens) - wanted) ** 2)

    masks = jprune.nm_masks(jprune.magnitude()(params), n=2, m=4)
    params = jprune.apply_masks(params, masks)
    tx = optax.chain(optax.adamw(1e-3), jprune.keep_zeros())
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in range(50):
        params, state, value = step(params, state)
        losses.append(float(value))
    for name in ("query", "key", "value", "out", "up", "down"):
        groups = np.asarray(params[name]["kernel"].get_value() != 0)
        groups = groups.reshape(groups.shape[0] // 4, 4, -1).sum(1)
        assert (groups == 2).all(), name
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; two of every four weights are nonzero")
    return losses[-1] / losses[0]


if __name__ == "__main__":
    main()
