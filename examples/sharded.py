"""Train and prune over a mesh of eight devices: the masks equal those of one device, bit for bit.

python examples/sharded.py            # simulates eight devices on a CPU
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jprune


def train(params, batch):
    tx = optax.chain(optax.sgd(0.1), jprune.prune(jprune.magnitude(), jprune.cubic(0.9, begin=0, end=8, every=2)))

    def loss(params):
        h = jax.nn.relu(batch["image"] @ params["one"]["kernel"])
        logits = h @ params["two"]["kernel"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(10):
        params, state = step(params, state)
    return params, jprune.masks_of(state)


def main() -> float:
    one, two = jax.random.split(jax.random.key(0))
    params = {
        "one": {"kernel": jax.random.normal(one, (64, 256)) / 8},
        "two": {"kernel": jax.random.normal(two, (256, 16)) / 16},
    }
    batch = {"image": jax.random.normal(jax.random.key(1), (64, 64)), "label": jnp.arange(64) % 16}
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto, AxisType.Auto))
    place = lambda tree, spec: jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh, spec)), tree)
    sharded, masks = train(place(params, P("data", "model")), place(batch, P("data")))
    print("kernel is sharded as", sharded["one"]["kernel"].sharding.spec, "on", len(jax.devices()), "devices")
    scores = jprune.magnitude()(sharded)
    alone = jprune.global_masks(jax.tree.map(np.asarray, scores), sparsity=0.9)
    again = jprune.global_masks(scores, sparsity=0.9)
    same = all(bool((a == b).all()) for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(alone), strict=True))
    assert same
    print(f"sparsity {jprune.sparsity(masks):.4f}; the same masks as on one device: {same}")
    return jprune.sparsity(masks)


if __name__ == "__main__":
    main()
