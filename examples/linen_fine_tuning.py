"""Prune a Flax Linen network once, then fine-tune it in a TrainState with ``keep_zeros``.

python examples/linen_fine_tuning.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from sklearn.datasets import load_digits

import jprune


class TrainState(train_state.TrainState):
    """Forwards extra arguments to optax, which Flax's own class drops."""

    def apply_gradients(self, *, grads, **extra):
        updates, opt_state = self.tx.update(grads, self.opt_state, self.params, grad=grads, **extra)
        return self.replace(step=self.step + 1, params=optax.apply_updates(self.params, updates), opt_state=opt_state)


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3), name="conv")(x))
        x = nn.relu(nn.Dense(64, name="body")(x.reshape(x.shape[0], -1)))
        return nn.Dense(10, name="head")(x)


@jax.jit
def step(state, batch):
    def loss(params):
        logits = state.apply_fn({"params": params}, batch["image"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

    return state.apply_gradients(grads=jax.grad(loss)(state.params))


def train(state, images, labels, steps):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, 1200, 128)
        state = step(state, {"image": jnp.asarray(images[rows]), "label": jnp.asarray(labels[rows])})
    return state


def main() -> float:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    net, where = Net(), jprune.by_path(exclude="^head/")
    params = net.init(jax.random.key(0), images[:1])["params"]
    dense = train(TrainState.create(apply_fn=net.apply, params=params, tx=optax.adam(2e-3)), images, labels, 200)

    keep = jprune.keep_count(dense.params, ratio=10.0, where=where)
    scores = jprune.magnitude(where=where)(dense.params)
    masks = jprune.global_masks(scores, keep=keep)
    tx = optax.chain(optax.adam(1e-3), jprune.keep_zeros(where=where))
    start = jprune.apply_masks(dense.params, masks)
    tuned = train(TrainState.create(apply_fn=net.apply, params=start, tx=tx), images, labels, 200)

    jprune.check_pruned(tuned.params, tuned.opt_state)
    compression = jprune.selection.compression(tuned.params, masks)
    for name, at in (("dense", dense.params), ("pruned", start), ("fine-tuned", tuned.params)):
        guess = net.apply({"params": at}, images[1200:]).argmax(-1)
        print(f"{name}: accuracy {float((guess == labels[1200:]).mean()):.3f}")
    print(f"compression {compression:.2f}")
    return compression


if __name__ == "__main__":
    main()
