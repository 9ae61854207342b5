"""Remove half of the multiply-adds of a Flax Linen network, and fine-tune it with the same optimizer state.

python examples/linen_channels.py
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state
from sklearn.datasets import load_digits

import jprune
from jprune.pruning.structured.linen import smaller_apply


class TrainState(train_state.TrainState):
    batch_stats: dict


class Net(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        for features in (16, 32):
            x = nn.Conv(features, (3, 3), use_bias=False)(x)
            x = nn.relu(nn.BatchNorm(use_running_average=not train, momentum=0.9)(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


@jax.jit
def step(state, batch):
    def loss(params):
        variables = {"params": params, "batch_stats": state.batch_stats}
        logits, new = state.apply_fn(variables, batch["image"], train=True, mutable=["batch_stats"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"]).mean(), new["batch_stats"]

    grads, batch_stats = jax.grad(loss, has_aux=True)(state.params)
    return state.apply_gradients(grads=grads, batch_stats=batch_stats)


def train(state, images, labels, steps):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        rows = rng.integers(0, 1200, 128)
        state = step(state, {"image": jnp.asarray(images[rows]), "label": jnp.asarray(labels[rows])})
    return state


def accuracy(state, images, labels):
    guess = state.apply_fn({"params": state.params, "batch_stats": state.batch_stats}, images).argmax(-1)
    return float((guess == labels).mean())


def main() -> float:
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 8, 8, 1)
    net = Net()
    variables = net.init(jax.random.key(0), images[:1])
    dense = TrainState.create(
        apply_fn=net.apply, params=variables["params"], batch_stats=variables["batch_stats"], tx=optax.adam(2e-3)
    )
    dense = train(dense, images, labels, 100)

    apply = lambda params, x, *, state: net.apply({"params": params, "batch_stats": state}, x)
    graph = jprune.trace_model(apply, dense.params, images[:1], state=dense.batch_stats)
    scores = jax.tree.map(jnp.abs, dense.params)
    masks = jprune.channel_group_masks(graph, scores, multiply_adds=0.5)
    small = jprune.remove_channels(
        graph, dense.params, masks, state=dense.batch_stats, also=(dense.opt_state,), check=images[:100]
    )

    # The module's layers declare their features; smaller_apply takes them from the parameters instead.
    pruned = dense.replace(
        apply_fn=smaller_apply(net, small.kept), params=small.params, batch_stats=small.state, opt_state=small.also[0]
    )
    tuned = train(pruned, images, labels, 100)
    for name, state in (("dense", dense), ("pruned", pruned), ("fine-tuned", tuned)):
        print(f"{name}: accuracy {accuracy(state, images[1200:], labels[1200:]):.3f}")
    before, after = small.table.multiply_adds
    fits = not small.differences(fitted(net, small.kept))
    print(f"{after / before:.0%} of the multiply-adds are left; the module can use the smaller parameters: {fits}")
    return after / before


def fitted(net, kept):
    apply = smaller_apply(net, kept)
    return lambda params, x, *, state: apply({"params": params, "batch_stats": state}, x)


if __name__ == "__main__":
    main()
