r"""Compare scores, selections, penalties and sparse training at equal sparsity, on one small network.

  python -m experiments.score_comparison --dataset fashion_mnist \
      --data-dir FOLDER --out FILE.csv

The network has two hidden layers of 256 and 128 units with batch normalization. Every seed trains one dense network;
each method prunes the same checkpoint to the same number of weights, or of hidden units, and fine-tunes it for as many
steps as the others. Methods that train sparse from the start take the steps of training and fine-tuning together.
Differences from magnitude are paired by seed, with a 95% interval over seeds (t distribution). Five seeds on
Fashion-MNIST take about five minutes on one CPU core. Expected with 1 weight in 16: magnitude .84, random .79.
"""

import argparse
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pandas as pd
import scipy.stats
from jaxtyping import Array, PyTree

import jprune
from experiments.cli.commands import exit_status
from experiments.data import datasets
from experiments.storage import files
from experiments.training import processes
from jprune.cli import wrapped
from jprune.pruning.scores.filters import is_norm_scale

BATCH, CALIBRATION, RATE = 128, 2000, 1e-3
WIDTHS = (256, 128)
# Thresholds per step of training with a penalty, with Adam at RATE. A threshold above RATE empties layers, because no
# step of Adam is larger.
SOFT = {1 / 16: 8e-4, 1 / 64: 1e-3}
GROUP, SCALE = 2e-4, 1e-3
UNIT_FRACTIONS = (1 / 8, 1 / 16)
FRACTIONS = tuple(SOFT)
FAMILIES = ("weights", "trained sparse", "1:16", "units")


class Outcome(NamedTuple):
    """One network after pruning.

    Attributes:
      family: "weights", "trained sparse", "1:16" or "units"; methods of a family keep the same number.
      method: name of the method.
      kept: the fraction of the weights, or of the hidden units, that is kept.
      weights: the number of kernel weights that are not 0.
      before: test accuracy before fine-tuning, NaN if there is none.
      after: test accuracy at the end.
    """

    family: str
    method: str
    kept: float
    weights: int
    before: float
    after: float


def initial(key: Array, inputs: int, classes: int) -> PyTree:
    """Return the parameters of a network at initialization."""
    sizes = (inputs, *WIDTHS, classes)
    params = {}
    keys = jax.random.split(key, 3)
    for name, own_key, (fan_in, fan_out) in zip(("one", "two", "head"), keys, itertools.pairwise(sizes), strict=True):
        kernel = jax.random.normal(own_key, (fan_in, fan_out)) * np.sqrt(2 / fan_in)
        params[name] = {"kernel": kernel, "bias": jnp.zeros(fan_out)}
        if name != "head":
            params[name]["scale"] = jnp.ones(fan_out)
    return params


def apply(params: PyTree, x: Array, statistics: PyTree = None) -> tuple[Array, PyTree]:
    """Return the logits, and the mean and variance of each hidden unit: those given, or those of the batch."""
    used = {}
    for name in ("one", "two"):
        layer = params[name]
        x = x @ layer["kernel"]
        mean, variance = (x.mean(0), x.var(0)) if statistics is None else statistics[name]
        used[name] = mean, variance
        x = jax.nn.relu((x - mean) * jax.lax.rsqrt(variance + 1e-5) * layer["scale"] + layer["bias"])
    return x @ params["head"]["kernel"] + params["head"]["bias"], used


def cross_entropy(params: PyTree, batch: tuple[Array, Array]) -> Array:
    """Return the mean loss over a batch, normalized by the statistics of the batch."""
    return optax.softmax_cross_entropy_with_integer_labels(apply(params, batch[0])[0], batch[1]).mean()


class Task(NamedTuple):
    """The data and the lengths of training.

    Attributes:
      train, test: images (examples, pixels) and labels.
      classes: number of classes.
      steps, fine_tuning: numbers of updates before and after pruning.
    """

    train: tuple[Array, Array]
    test: tuple[Array, Array]
    classes: int
    steps: int
    fine_tuning: int

    @property
    def calibration(self) -> tuple[Array, Array]:
        """The first examples of the training set, for scores that need data and for the statistics."""
        return self.train[0][:CALIBRATION], self.train[1][:CALIBRATION]


def trained(
    train: tuple[Array, Array],
    tx: optax.GradientTransformationExtraArgs,
    params: PyTree,
    key: Array,
    *,
    steps: int,
    loss: Callable[[PyTree, PyTree, tuple[Array, Array]], Array] | None = None,
) -> tuple[PyTree, PyTree]:
    """Return trained parameters and optimizer state; ``loss(state, params, batch)`` may read masks in the state."""

    def step(carry: tuple[PyTree, PyTree], key: Array) -> tuple[tuple[PyTree, PyTree], None]:
        params, state = carry
        rows = jax.random.randint(key, (BATCH,), 0, len(train[1]))
        batch = train[0][rows], train[1][rows]
        grads = jax.grad(cross_entropy if loss is None else functools.partial(loss, state))(params, batch)
        updates, state = tx.update(grads, state, params, grad=grads)
        return (optax.apply_updates(params, updates), state), None

    return jax.lax.scan(step, (params, tx.init(params)), jax.random.split(key, steps))[0]


def adam(steps: int) -> optax.GradientTransformation:
    """Return Adam with a learning rate that decays to 0 along a cosine."""
    return optax.adam(optax.cosine_decay_schedule(RATE, steps))


def unstructured(params: PyTree, batch: tuple[Array, Array], key: Array, sparsity: float) -> dict[str, PyTree]:
    """Return the masks of every one-shot method."""
    grads = jax.grad(cross_entropy)(params, batch)
    magnitude = jprune.magnitude()(params)
    wanda = jprune.wanda(lambda params, batch: apply(params, batch[0])[0])(params, batch=batch)
    # The published spread of .08 is for half of the weights; at these sparsities it would empty a layer.
    owl = jprune.selection.owl_sparsities(wanda, sparsity, spread=(1 - sparsity) / 2)
    return {
        "magnitude, global": jprune.global_masks(magnitude, sparsity=sparsity),
        "magnitude, same sparsity in each layer": jprune.layer_masks(magnitude, sparsity=sparsity),
        "magnitude, ERK": jprune.erk_masks(magnitude, sparsity=sparsity),
        "LAMP": jprune.global_masks(jprune.scores.lamp(axes="flax")(params), sparsity=sparsity),
        "gradient": jprune.global_masks(jprune.gradient()(params, grads), sparsity=sparsity),
        "Wanda, same sparsity in each layer": jprune.layer_masks(wanda, sparsity=sparsity),
        "Wanda, OWL": jprune.layer_masks(wanda, sparsity=owl),
        "random": jprune.layer_masks(jprune.random()(params, key=key), sparsity=sparsity),
        "magnitude, shrinkbench count": jprune.global_masks(
            magnitude, keep=jprune.keep_count(params, ratio=1 / (1 - sparsity), counting="shrinkbench")
        ),
    }


def of_units(
    params: PyTree, graph: jprune.graph.Graph, batch: tuple[Array, Array], key: Array, sparsity: float
) -> dict[str, PyTree]:
    """Return the masks of every score of hidden units; each layer loses the same fraction."""
    grads = jax.grad(cross_entropy)(params, batch)
    scores = {
        "magnitude (L2)": jprune.magnitude()(params),
        "normalization scale": jprune.scores.norm_scale()(params),
        "geometric median": jprune.scores.geometric_median(axes="flax")(params),
        "Taylor": jprune.scores.filter_taylor(axes="flax")(params, grads),
        "random": jprune.random()(params, key=key),
    }
    return {name: unit_masks(graph, score, sparsity) for name, score in scores.items()}


def unit_masks(graph: jprune.graph.Graph, scores: PyTree, sparsity: float) -> PyTree:
    """Select the units with the largest root of the sum of squared scores."""
    return jprune.channel_group_masks(graph, scores, sparsity=sparsity, reduce="l2", per_group=True)


class Programs:
    """The compiled programs of a task; the data is an argument, so that it is in memory once."""

    def __init__(self, task: Task):
        steps, fine_tuning = task.steps, task.fine_tuning
        total, half = steps + fine_tuning, fine_tuning // 2
        every, end = max(total // 20, 1), 3 * total // 4
        zeros = jprune.keep_zeros(where=lambda path, leaf: True)

        def program(train: Callable[..., PyTree], static: tuple[str, ...] = ()) -> Callable[..., PyTree]:
            return functools.partial(jax.jit(train, static_argnames=static), task.train)

        def penalized(link: Callable[[Array], optax.GradientTransformation]) -> Callable[..., PyTree]:
            def train(data: tuple[Array, Array], params: PyTree, key: Array, limit: Array) -> PyTree:
                return trained(data, optax.chain(optax.adam(RATE), link(limit)), params, key, steps=fine_tuning - half)[
                    0
                ]

            return program(train)

        def rising(limit: Array) -> Callable[[Array], Array]:
            return lambda step: limit * jnp.minimum(1.0, (step + 1) / (fine_tuning - half))

        def gradual(data: tuple[Array, Array], params: PyTree, key: Array, sparsity: float) -> PyTree:
            schedule = jprune.cubic(sparsity, begin=0, end=half, every=max(half // 10, 1))
            tx = optax.chain(adam(fine_tuning), jprune.prune(jprune.magnitude(), schedule))
            return trained(data, tx, params, key, steps=fine_tuning)[0]

        def sparse(data: tuple[Array, Array], params: PyTree, key: Array, sparsity: float) -> dict[str, PyTree]:
            fixed = jprune.prune(jprune.random(), {0: sparsity}, selection=jprune.erk_masks, key=key)
            links = {
                "RigL": jprune.rigl(adam(total), sparsity, end=end, every=every),
                "SET": jprune.sparse_evolution(adam(total), sparsity, key=key, end=end, every=every),
                "fixed random masks": optax.chain(adam(total), fixed),
            }
            return {name: trained(data, tx, params, key, steps=total)[0] for name, tx in links.items()}

        def sr_ste(data: tuple[Array, Array], params: PyTree, key: Array) -> PyTree:
            tx = jprune.sr_ste(adam(total), n=1, m=16, axes="flax")
            loss = lambda state, params, batch: cross_entropy(jprune.straight_through(params, state.masks), batch)
            params, state = trained(data, tx, params, key, steps=total, loss=loss)
            return jprune.apply_masks(params, state.masks)

        @jax.jit
        def accuracy(params: PyTree, calibration: Array, test: tuple[Array, Array]) -> Array:
            _, statistics = apply(params, calibration)
            return jnp.mean(jnp.argmax(apply(params, test[0], statistics)[0], -1) == test[1])

        def tuned(steps: int) -> Callable[..., PyTree]:
            return program(lambda data, *a: trained(data, optax.chain(adam(steps), zeros), *a, steps=steps)[0])

        self.dense = program(lambda data, params, key: trained(data, adam(steps), params, key, steps=steps)[0])
        self.fine_tune, self.fine_tune_half = tuned(fine_tuning), tuned(half)
        self.soft = penalized(jprune.soft_threshold)
        self.hard = penalized(lambda limit: jprune.hard_threshold(rising(limit)))
        shapes = jax.eval_shape(lambda: initial(jax.random.key(0), task.train[0].shape[1], task.classes))
        self.graph = jprune.trace_model(lambda params, x: apply(params, x)[0], shapes, task.train[0][:BATCH])
        self.grouped = penalized(lambda limit: jprune.group_soft_threshold(limit, groups=self.graph.channels))
        self.scales = penalized(lambda limit: jprune.soft_threshold(limit, where=is_norm_scale))
        self.gradual, self.sparse = program(gradual, ("sparsity",)), program(sparse, ("sparsity",))
        self.sr_ste = program(sr_ste)
        self.accuracy = lambda params: accuracy(params, task.calibration[0], task.test)


class Network:
    """One dense network, which every method prunes."""

    def __init__(self, task: Task, programs: Programs, seed: int):
        start_key, dense_key, self.tune_key, self.score_key, self.sparse_key = jax.random.split(jax.random.key(seed), 5)
        self.task, self.programs = task, programs
        self.start = initial(start_key, task.train[0].shape[1], task.classes)
        self.params = programs.dense(self.start, dense_key)

    def outcomes(self, families: Sequence[str]) -> Iterator[Outcome]:
        """Yield the outcome of the dense network, then those of the methods of these families."""
        yield self._outcome("dense", "dense", 1.0, self.params)
        yield self._outcome("dense", "dense, fine-tuned", 1.0, self.programs.fine_tune(self.params, self.tune_key))
        if "weights" in families:
            for kept in FRACTIONS:
                yield from self._weights(kept)
        if "trained sparse" in families:
            for kept in FRACTIONS:
                for method, params in self.programs.sparse(self.start, self.sparse_key, 1 - kept).items():
                    yield self._outcome("trained sparse", method, kept, params)
        if "1:16" in families:
            yield from self._patterns()
        if "units" in families:
            for kept in UNIT_FRACTIONS:
                yield from self._units(kept)

    def _weights(self, kept: float) -> Iterator[Outcome]:
        programs, sparsity, score = self.programs, 1 - kept, jprune.magnitude()
        for method, masks in unstructured(self.params, self.task.calibration, self.score_key, sparsity).items():
            yield self._pruned("weights", method, kept, masks)
        yield self._outcome(
            "weights", "magnitude, gradual", kept, programs.gradual(self.params, self.tune_key, sparsity)
        )
        magnitudes = np.sort(np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(score(self.params))]))
        penalties = {
            "soft threshold, then magnitude": (programs.soft, SOFT[kept]),
            "hard threshold, then magnitude": (programs.hard, magnitudes[int(sparsity * magnitudes.size)]),
        }
        for method, (penalized, limit) in penalties.items():
            weights = penalized(self.params, self.tune_key, jnp.float32(limit))
            zeros = jprune.sparsity(jax.tree.map(lambda leaf: leaf != 0, only_kernels(weights)))
            print(f"  {method}: sparsity {zeros:.4f} by itself", file=sys.stderr)
            yield self._finished(
                "weights", method, kept, weights, jprune.global_masks(score(weights), sparsity=sparsity)
            )

    def _patterns(self) -> Iterator[Outcome]:
        scores = {
            "magnitude": jprune.magnitude()(self.params),
            "random": jprune.random()(self.params, key=self.score_key),
        }
        for method, score in scores.items():
            yield self._pruned("1:16", method, 1 / 16, jprune.nm_masks(score, n=1, m=16, axes="flax"))
        yield self._outcome("1:16", "SR-STE", 1 / 16, self.programs.sr_ste(self.start, self.sparse_key))

    def _units(self, kept: float) -> Iterator[Outcome]:
        programs, graph = self.programs, self.programs.graph
        for method, masks in of_units(self.params, graph, self.task.calibration, self.score_key, 1 - kept).items():
            yield self._pruned("units", method, kept, masks)
        penalties = {
            "group lasso, then magnitude (L2)": (programs.grouped, GROUP, jprune.magnitude()),
            "soft threshold of the scales, then normalization scale": (
                programs.scales,
                SCALE,
                jprune.scores.norm_scale(),
            ),
        }
        for method, (penalized, limit, score) in penalties.items():
            weights = penalized(self.params, self.tune_key, jnp.float32(limit))
            yield self._finished("units", method, kept, weights, unit_masks(graph, score(weights), 1 - kept))

    def _outcome(self, family: str, method: str, kept: float, after: PyTree, *, before: PyTree = None) -> Outcome:
        weights = sum(int(jnp.count_nonzero(layer["kernel"])) for layer in after.values())
        accuracies = [np.nan if each is None else float(self.programs.accuracy(each)) for each in (before, after)]
        return Outcome(family, method, kept, weights, *accuracies)

    def _pruned(self, family: str, method: str, kept: float, masks: PyTree) -> Outcome:
        before = jprune.apply_masks(self.params, masks)
        return self._outcome(family, method, kept, self.programs.fine_tune(before, self.tune_key), before=before)

    def _finished(self, family: str, method: str, kept: float, weights: PyTree, masks: PyTree) -> Outcome:
        before = jprune.apply_masks(weights, masks)
        after = self.programs.fine_tune_half(before, self.sparse_key)
        return self._outcome(family, method, kept, after, before=before)


def only_kernels(params: PyTree) -> PyTree:
    """Return the kernels, and None for other leaves."""
    return {name: {"kernel": layer["kernel"]} for name, layer in params.items()}


REFERENCE = {
    "weights": "magnitude, global",
    "trained sparse": "magnitude, gradual",
    "1:16": "magnitude",
    "units": "magnitude (L2)",
}


def table(runs: Sequence[Sequence[Outcome]]) -> list[dict[str, str]]:
    """Return means over seeds, and paired differences from the reference of each family with 95% intervals."""
    rows = []
    by_name = {(o.method, o.kept): [run[i] for run in runs] for i, o in enumerate(runs[0])}
    for own in zip(*runs, strict=True):
        first = own[0]
        after, before = (np.array([getattr(o, name) for o in own]) for name in ("after", "before"))
        row = {
            "family": first.family,
            "method": first.method,
            "kept": f"1/{round(1 / first.kept)}",
            "weights": f"{np.mean([o.weights for o in own]):.0f}",
            "before": "" if np.isnan(before).any() else f"{before.mean():.4f}",
            "after": f"{after.mean():.4f}",
            "sd": f"{after.std(ddof=1):.4f}" if len(own) > 1 else "",
            "difference": "",
            "low": "",
            "high": "",
        }
        reference = by_name.get((REFERENCE.get(first.family, ""), first.kept))
        if reference is not None and reference[0] is not first and len(own) > 1:
            differences = after - np.array([o.after for o in reference])
            half = scipy.stats.t.ppf(0.975, len(own) - 1) * differences.std(ddof=1) / np.sqrt(len(own))
            mean = differences.mean()
            row |= {"difference": f"{mean:+.4f}", "low": f"{mean - half:+.4f}", "high": f"{mean + half:+.4f}"}
        rows.append(row)
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the comparison and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.score_comparison",
        description=wrapped(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = "digits, mnist, fashion_mnist, npz:FILE; recall_distortion --help lists the others"
    parser.add_argument("--dataset", default="digits", help=f"{names} (default: digits)")
    parser.add_argument("--data-dir", help="folder of prepared TensorFlow Datasets")
    parser.add_argument("--seeds", type=int, default=5, help="number of dense networks (default: 5)")
    parser.add_argument("--steps", type=int, default=600, help="updates of the dense network (default: 600)")
    parser.add_argument("--fine-tuning", type=int, default=300, help="updates after pruning (default: 300)")
    parser.add_argument(
        "--families", nargs="+", default=FAMILIES, choices=FAMILIES, metavar="FAMILY",
        help=f"{', '.join(FAMILIES)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--out", help="CSV file for the table; by default it is only printed")
    given = parser.parse_args(arguments)
    for name, least in (("seeds", 1), ("steps", 1), ("fine_tuning", 2)):
        if (value := getattr(given, name)) < least:
            parser.error(f"--{name.replace('_', '-')} {value} must be at least {least}")
    try:
        processes.check_alone("score_comparison")
    except ValueError as error:
        parser.error(str(error))
    if "trained sparse" in given.families and "weights" not in given.families:
        print("no differences for 'trained sparse': their reference is in the family 'weights'", file=sys.stderr)
    return exit_status(lambda: compare(given))


def compare(given: argparse.Namespace) -> None:
    """Train and prune every network; print the table, and write it if a file is given."""
    data = datasets.load(given.dataset, data_dir=given.data_dir, selection="test")
    splits = [
        (jnp.asarray(split.images, jnp.float32).reshape(len(split.labels), -1), jnp.asarray(split.labels))
        for split in (data.train, data.test)
    ]
    scale = splits[0][0].max()
    (train_x, train_y), (test_x, test_y) = splits
    task = Task((train_x / scale, train_y), (test_x / scale, test_y), data.num_classes, given.steps, given.fine_tuning)
    programs = Programs(task)
    runs = []
    for seed in range(given.seeds):
        print(f"seed {seed}", file=sys.stderr)
        runs.append(list(Network(task, programs, seed).outcomes(given.families)))
    text = pd.DataFrame(table(runs)).to_csv(index=False, lineterminator="\n")
    print(text, end="")
    if given.out:
        files.write_bytes(Path(given.out), text.encode())


if __name__ == "__main__":
    raise SystemExit(main())
