"""Recall of each class at every level of iterative pruning with rewinding (lottery tickets).

``python -m experiments.recall_distortion.tickets --dataset mnist --data-dir DIR`` trains LeNet-300-100, prunes a fifth
of the remaining weights by magnitude, rewinds, and repeats, with the settings of OpenLTH's mnist_lenet_300_100: SGD
with a learning rate of .1, batch 128, 40 epochs. It audits every level against the dense networks.

Cost: 16 levels of 40 epochs are 270,000 steps per network, about six minutes on 2 CPU cores according to the step
time in benchmarks/results.md. The full run has not been made.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

import jprune
import jprune.recall
from experiments.cli import commands
from experiments.data import datasets
from experiments.models.options import read_options
from experiments.recall_distortion.oneshot import prunable
from experiments.storage import files
from experiments.storage import settings as recorded
from experiments.training import phases, processes, replicates, tasks
from experiments.training.tasks import Context
from jprune.pruning.selection import allocation
from jprune.recall import Audit

_INIT, _TRAIN = range(2)  # purposes of a replicate's keys


@dataclasses.dataclass(frozen=True)
class Tickets:
    """Iterative magnitude pruning with rewinding, audited at every level."""

    dataset: str = "digits"
    """Data set, as for the study: digits, mnist, npz:FILE, ..."""
    data_dir: Path | None = None
    """Folder of prepared TensorFlow Datasets; ~/tensorflow_datasets by default."""
    model: str = "lenet-300-100"
    """A built-in model, or package.module:Class."""
    model_options: tuple[str, ...] = ()
    """NAME=VALUE arguments of the model."""
    prunable: str | None = None
    """Regular expression for the kernels to prune; by default all except those of a layer named head."""
    replicates: int = 5
    """Number of networks, trained from different seeds."""
    levels: int = 15
    """Number of pruning rounds."""
    fraction: float = 0.2
    """Fraction of the remaining weights that each level removes."""
    rewind: int = 0
    """Step to which the weights are rewound."""
    epochs: int = 40
    """Epochs of each level."""
    lr: float = 0.1
    """Learning rate of SGD."""
    batch: int = 128
    """Examples per step."""
    seed: int = 0
    """Seed of the study."""
    out: Path = Path("runs/tickets")
    """Folder of the results."""

    def __post_init__(self):
        """Validate the options."""
        commands.check_at_least(self, replicates=1, levels=1, rewind=0, epochs=1, lr=0, batch=1, seed=0)
        if not 0 < self.fraction < 1:
            raise ValueError(f"fraction={self.fraction} must lie between 0 and 1")


def predictions(settings: Tickets, dataset: datasets.Dataset) -> Iterator[list[tuple[float, np.ndarray]]]:
    """Compute the tickets of each replicate.

    Yields:
      For each replicate a list by level of the compression ratio of the whole model and the predictions on the test
      split, (examples,) int32.

    Raises:
      ValueError: the model, the batch or ``rewind`` does not fit, or a level would remove no weight.
    """
    if settings.batch > len(dataset.train.labels):
        raise ValueError(
            f"batch={settings.batch} is more than the {len(dataset.train.labels)} training examples; use a smaller one"
        )
    task = tasks.classification(dataset, settings.model, options=read_options(settings.model_options))
    where = prunable(settings.prunable)
    tx = optax.chain(optax.sgd(settings.lr), jprune.keep_zeros(where=where))
    steps = settings.epochs * (len(dataset.train.labels) // settings.batch)
    schedule = [1 - (1 - settings.fraction) ** level for level in range(1, settings.levels + 1)]
    prunable_weights = jax.tree.leaves(jprune.trees.only(jax.eval_shape(task.init, jax.random.key(0))[0], where))
    kept = [allocation.kept(sparsity, sum(leaf.size for leaf in prunable_weights)) for sparsity in (0.0, *schedule)]
    for level, (before, after) in enumerate(itertools.pairwise(kept), 1):
        if after == before:
            raise ValueError(
                f"levels={settings.levels}: level {level} would remove none of the {before} weights left; give "
                f"{'' if level == 1 else f'at most {level - 1} levels, or '}a larger fraction than {settings.fraction}"
            )
    placement = replicates.Placement(jax.sharding.Mesh(np.array(jax.devices()[:1]), (replicates.AXIS,)))
    predict = phases.compile_predict(task, placement, len(dataset.test.labels))
    train = _compiled(task, tx, dataset.train, settings.batch)
    for index in range(settings.replicates):
        init_key, key = (replicates.key(settings.seed, jnp.int32(index), purpose) for purpose in (_INIT, _TRAIN))
        params, stats = task.init(init_key)
        if jax.tree.leaves(stats):
            raise ValueError(f"model={settings.model!r} has statistics, which this study does not rewind")
        total = sum(leaf.size for leaf in jax.tree.leaves(params))
        run = functools.partial(train, (key, stats))
        found = []
        for ticket in jprune.lottery_ticket(run, tx, params, schedule, steps=steps, rewind=settings.rewind):
            removed = sum(int((~mask).sum()) for mask in jax.tree.leaves(ticket.masks))
            stacked = jax.tree.map(lambda leaf: leaf[None], (ticket.end[0], stats))
            found.append((total / (total - removed), np.asarray(predict(stacked, dataset.test.images)[0])))
        yield found


def _compiled(
    task: tasks.Task, tx: optax.GradientTransformation, split: datasets.Split, batch: int
) -> Callable[..., tuple[PyTree, PyTree]]:
    """Return the program ((key, stats), params, opt_state, begin, end) -> (params, opt_state) for all levels."""
    images, labels = jnp.asarray(split.images), jnp.asarray(split.labels)
    each = len(labels) // batch

    def order_of(key: jax.Array, epoch: jax.Array) -> jax.Array:
        return jax.random.permutation(jax.random.fold_in(jax.random.fold_in(key, 0), epoch), len(labels))

    @jax.jit
    def train(
        fixed: tuple[jax.Array, PyTree], params: PyTree, state: PyTree, begin: jax.Array, end: jax.Array
    ) -> PyTree:
        key, stats = fixed

        def step(number: jax.Array, carry: tuple[PyTree, PyTree, jax.Array]) -> tuple[PyTree, PyTree, jax.Array]:
            params, state, order = carry
            # Once per epoch, because a permutation takes many times as long as a step.
            order = jax.lax.cond(number % each == 0, lambda: order_of(key, number // each), lambda: order)
            chosen = jax.lax.dynamic_slice_in_dim(order, number % each * batch, batch)
            step_key = jax.random.fold_in(jax.random.fold_in(key, 1), number)
            context = Context(stats, datasets.Split(images[chosen], labels[chosen]), step_key)
            grads, _ = jax.grad(task.loss, has_aux=True)(params, context, "train")
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, order

        return jax.lax.fori_loop(begin, end, step, (params, state, order_of(key, begin // each)))[:2]

    return train


def audit(settings: Tickets, dataset: datasets.Dataset) -> Audit:
    """Train, prune and rewind every replicate, and audit each level against the dense networks."""
    found = list(predictions(settings, dataset))
    stacked = [np.stack([one[level][1] for one in found]) for level in range(settings.levels + 1)]
    ratios = [found[0][level][0] for level in range(settings.levels + 1)]
    pruned = {"magnitude, rewound": dict(zip(ratios[1:], stacked[1:], strict=True))}
    return jprune.recall.audit(dataset.test.labels, stacked[0], pruned, class_names=dataset.class_names)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""

    def work() -> None:
        settings = commands.parse(Tickets, Tickets(), arguments, "python -m experiments.recall_distortion.tickets")
        processes.check_alone("recall_distortion.tickets")
        print(f"results go to {settings.out}; {settings.replicates} replicates, {settings.levels} levels", flush=True)
        dataset = datasets.load(settings.dataset, data_dir=settings.data_dir, seed=settings.seed)
        options = commands.to_json(settings)
        running = {name: options.pop(name) for name in ("out", "data_dir")}
        recorded.record(settings.out, "recall_distortion.tickets", options, running)
        made = audit(settings, dataset)
        for name in ("summary", "alphas", "recalls"):
            table = getattr(made, name)
            files.write_bytes(settings.out / f"{name}.csv", table.to_csv(index=False).encode())
        with files.naming(settings.out):
            made.to_html(settings.out / "report.html", title=f"Lottery tickets: {settings.model} on {settings.dataset}")
        print(made.summary[["ratio", "accuracy", "alpha"]].to_string(index=False))
        print(f"The report is {settings.out / 'report.html'}")

    return commands.exit_status(work)


if __name__ == "__main__":
    sys.exit(main())
