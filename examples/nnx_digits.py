"""Prune a Flax NNX network during training on digits, and print the class with the lowest recall.

python examples/nnx_digits.py
"""

import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jprune


class Net(nnx.Module):
    def __init__(self, rngs):
        self.one, self.two = nnx.Linear(64, 128, rngs=rngs), nnx.Linear(128, 64, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.relu(self.two(nnx.relu(self.one(x)))))


def main() -> float:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32)
    test = slice(1200, None)
    model = Net(nnx.Rngs(0))
    where = jprune.by_path(exclude="^head/")
    tx = optax.chain(
        optax.adamw(2e-3),
        jprune.prune(jprune.undecayed(5e-4), jprune.cubic(0.95, begin=100, end=300, every=20), where=where),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, batch):
        def loss(model):
            logits = model(batch["image"])
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean()

        grads = nnx.grad(loss)(model)
        optimizer.update(model, grads, grad=grads)

    rng = np.random.default_rng(0)
    for i in range(600):
        if i == 99:
            dense = np.asarray(model(jnp.asarray(images[test])).argmax(-1))
        rows = rng.integers(0, 1200, 128)
        step(model, optimizer, {"image": jnp.asarray(images[rows]), "label": jnp.asarray(labels[rows])})

    pruned = np.asarray(model(jnp.asarray(images[test])).argmax(-1))
    layers = [layer.kernel.get_value() for layer in (model.one, model.two)]
    share = sum(int((kernel == 0).sum()) for kernel in layers) / sum(kernel.size for kernel in layers)
    for name, predictions in (("dense, after 99 steps", dense), ("pruned, after 600 steps", pruned)):
        recall = jprune.recall.recall(jprune.recall.counts(labels[test], predictions, 10))
        print(f"{name}: lowest recall {recall.min():.2f} (class {recall.argmin()}), mean recall {recall.mean():.3f}")
    print(f"{share:.2%} of the hidden weights are exactly 0")
    return share


if __name__ == "__main__":
    main()
