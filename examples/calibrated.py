"""Prune with calibration data: SparseGPT against Wanda and magnitude, and batch normalization before fine-tuning.

python examples/calibrated.py

Two networks on scikit-learn's digits. The first table is the mean squared error of the outputs of each layer on test
images when its weights are pruned (inputs from the dense network). The second is the test accuracy, without any
fine-tuning, of a network with batch normalization whose hidden layers are pruned globally by magnitude.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import jprune

METHODS = ("SparseGPT", "Wanda", "magnitude")


def digits():
    x, y = load_digits(return_X_y=True)
    return jnp.asarray(x / 16, jnp.float32), jnp.asarray(y)


def dense_layers(params, x):
    """Return the inputs of each layer, and the logits."""
    inputs = [x]
    for i in range(len(params) - 1):
        inputs.append(jax.nn.relu(inputs[-1] @ params[f"layer{i}"]["kernel"]))
    return inputs, inputs[-1] @ params[f"layer{len(params) - 1}"]["kernel"]


def logits(params, x):
    return dense_layers(params, x)[1]


def trained(x, y, steps=300):
    """Train a network of three layers by gradient descent."""
    random = np.random.default_rng(0)
    params = {
        f"layer{i}": {"kernel": jnp.asarray(random.normal(size=size) * np.sqrt(2 / size[0]), jnp.float32)}
        for i, size in enumerate(itertools.pairwise([64, 64, 32, 10]))
    }

    def loss(params):
        return optax.softmax_cross_entropy_with_integer_labels(logits(params, x), y).mean()

    def step(params, _):
        return jax.tree.map(lambda w, g: w - 0.5 * g, params, jax.grad(loss)(params)), None

    return jax.jit(lambda params: jax.lax.scan(step, params, length=steps)[0])(params)


def reconstruction(steps=300):
    """Return the mean squared error of each layer's outputs, by pattern and method."""
    x, y = digits()
    calibration, test = x[:900], x[900:]
    params = trained(x, y, steps)
    grams = jprune.scores.input_grams(logits, params, [calibration])
    scores = {"Wanda": jprune.wanda(logits)(params, batch=calibration), "magnitude": jprune.magnitude()(params)}
    inputs, _ = dense_layers(params, test)
    table = {}
    for pattern in ("50% of every output", "2:4"):
        nm = pattern == "2:4"
        # As in the papers, Wanda and magnitude compare the weights into one output, SparseGPT whole blocks.
        amount = {"n": 2, "m": 4} if nm else {"sparsity": 0.5}
        pruned = {"SparseGPT": jprune.sparsegpt(params, grams, **amount).params}
        for name, score in scores.items():
            masks = (jprune.nm_masks if nm else jprune.output_masks)(score, **amount)
            pruned[name] = jprune.apply_masks(params, masks)
        for name, weights in pruned.items():
            table[pattern, name] = [
                float(jnp.mean(jnp.square(own @ (weights[layer]["kernel"] - params[layer]["kernel"]))))
                for own, layer in zip(inputs, params, strict=True)
            ]
    return table


class Normalized(nnx.Module):
    """Two hidden layers with batch normalization."""

    def __init__(self, rngs):
        self.one, self.norm_one = nnx.Linear(64, 64, rngs=rngs), nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.two, self.norm_two = nnx.Linear(64, 64, rngs=rngs), nnx.BatchNorm(64, momentum=0.9, rngs=rngs)
        self.head = nnx.Linear(64, 10, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norm_one(self.one(x)))
        return self.head(nnx.relu(self.norm_two(self.two(x))))


def recalibration(steps=60, sparsity=0.9):
    """Return test accuracies of the dense network, pruned, and pruned with new statistics."""
    x, y = digits()
    train, test = slice(0, 1200), slice(1200, None)
    graphdef, params, statistics = nnx.split(Normalized(nnx.Rngs(0)), nnx.Param, nnx.BatchStat)
    tx = optax.adam(3e-3)

    def run(params, statistics, x):
        model = nnx.merge(graphdef, params, statistics, copy=True)
        return model(x), nnx.state(model, nnx.BatchStat)

    def loss(params, statistics):
        outputs, statistics = run(params, statistics, x[train])
        return optax.softmax_cross_entropy_with_integer_labels(outputs, y[train]).mean(), statistics

    def step(carry, _):
        params, statistics, state = carry
        gradients, statistics = jax.grad(loss, has_aux=True)(params, statistics)
        updates, state = tx.update(gradients, state, params)
        return (optax.apply_updates(params, updates), statistics, state), None

    start = (params, statistics, tx.init(params))
    (params, statistics, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps))(start)

    @jax.jit
    def accuracy(params, statistics):
        model = nnx.view(nnx.merge(graphdef, params, statistics, copy=True), use_running_average=True)
        return jnp.mean(jnp.argmax(model(x[test]), -1) == y[test])

    scores = jprune.magnitude(where=jprune.by_path(exclude="^head/"))(params)
    pruned = jprune.apply_masks(params, jprune.global_masks(scores, sparsity=sparsity))
    batches = jnp.split(x[train], 3)
    again = jprune.recalibrate_batch_norm(lambda own, x: run(pruned, own, x)[1], statistics, batches)
    return [float(accuracy(*each)) for each in ((params, statistics), (pruned, statistics), (pruned, again))]


def main():
    print(f"{'pattern':21}{'method':11}layer 1  layer 2  layer 3")
    for (pattern, method), errors in reconstruction().items():
        print(f"{pattern:21}{method:11}" + "  ".join(f"{error:7.4f}" for error in errors))
    dense, pruned, again = recalibration()
    print(f"accuracy {dense:.3f} dense, {pruned:.3f} with 10% of the hidden weights, {again:.3f} with new statistics")


if __name__ == "__main__":
    main()
