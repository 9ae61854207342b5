"""Re-estimate the running statistics of batch normalization after pruning."""

from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jprune.pruning.scores.elementwise import number_of_examples, working_dtype
from jprune.trees import Subset, is_float, match, refuse_one_batch


def recalibrate_batch_norm(
    update: Callable[[PyTree, PyTree], PyTree], statistics: PyTree, batches: Iterable[PyTree]
) -> PyTree:
    """Re-estimate the running statistics of batch normalization as plain averages over batches.

    Pruning changes the mean and the variance of every preactivation, but the running averages still describe the dense
    network. Re-estimating them recovers much of the lost accuracy, before any fine-tuning.

    Means are averaged over all examples. A variance ``var`` with a sibling ``mean`` becomes the variance over all
    examples: the mean of the batch variances plus the variance of the batch means. Other statistics are averaged.
    The momentum of each layer is measured and divided out, so it does not affect the result.

    With Flax NNX:

    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(1)))
    >>> graphdef, statistics, rest = nnx.split(model, nnx.BatchStat, ...)
    >>> def update(statistics, x):
    ...     model = nnx.merge(graphdef, statistics, rest, copy=True)
    ...     model(x)  # in train mode
    ...     return nnx.state(model, nnx.BatchStat)
    >>> x = jnp.array([[0.0, 1.0], [2.0, 1.0], [4.0, 1.0], [6.0, 5.0]])
    >>> nnx.update(model, recalibrate_batch_norm(update, statistics, [x[:2], x[2:]]))
    >>> bool(jnp.allclose(model.layers[1].mean[...], model.layers[0](x).mean(0), atol=1e-5))
    True

    With Linen, ``variables`` being ``{"params": ..., "batch_stats": ...}``:

    >>> def linen_update(model, params):
    ...     def update(statistics, x):
    ...         variables = {"params": params, "batch_stats": statistics}
    ...         return model.apply(variables, x, train=True, mutable=["batch_stats"])[1]["batch_stats"]
    ...     return update

    Args:
      update: pure function ``update(statistics, batch)`` that runs the pruned model in train mode on one batch and
        returns its updated running statistics.
      statistics: tree of running statistics; ``update`` gets half-precision statistics as float32.
      batches: trees of arrays (examples, ...); each batch is weighted by its number of examples.

    Returns:
      A tree like ``statistics``. Leaves that are not float arrays are unchanged.

    Raises:
      TypeError: ``batches`` is one batch.
      ValueError: ``batches`` is empty; ``update`` leaves a statistic unchanged, as in evaluation mode, or does not
        average it exponentially.

    Source: Ioffe & Szegedy, "Batch Normalization", 2015, arXiv 1502.03167, algorithm 2; after pruning: Li et al.,
    "EagleEye", ECCV 2020, arXiv 2007.02491, section 3.2 (adaptive batch normalization).
    """
    refuse_one_batch(batches)
    subset = Subset.of(statistics, is_float)
    # Half precision is too coarse to measure the momentum or to sum over batches.
    dtypes = [working_dtype(leaf) for leaf in subset.leaves]

    @jax.jit
    def run(values: list[Array], batch: PyTree) -> list[Array]:
        given = update(subset.whole(values), batch)
        found = match(statistics, given, reference_name="statistics", name="what update returned")
        return [found[slot].astype(dtype) for slot, dtype in zip(subset.slots, dtypes, strict=True)]

    zeros = [jnp.zeros(leaf.shape, dtype) for leaf, dtype in zip(subset.leaves, dtypes, strict=True)]
    momenta: list[float] = []
    found: dict[str, Array] = dict(zip(subset.paths, zeros, strict=True))
    examples = 0
    for batch in batches:
        updated = run(zeros, batch)  # (1 - momentum) times the statistic of this batch
        if not momenta:
            starts = [jnp.full_like(a, max(1.0, float(jnp.max(jnp.abs(a))))) for a in updated]
            others = run(starts, batch)
            momenta = [_momentum(*each) for each in zip(subset.paths, updated, starts, others, strict=True)]
        batch_statistics = {
            path: value / jnp.asarray(1 - momentum, value.dtype)
            for path, value, momentum in zip(subset.paths, updated, momenta, strict=True)
        }
        size = number_of_examples(batch)
        examples += size
        found = _merged(found, batch_statistics, size / examples)
    if not examples:
        raise ValueError("batches has no example; pass at least one batch")
    return subset.whole(
        [
            found[path].astype(jax.dtypes.canonicalize_dtype(leaf.dtype))
            for path, leaf in zip(subset.paths, subset.leaves, strict=True)
        ]
    )


def _momentum(path: str, from_zero: Array, start: Array, from_start: Array) -> float:
    """Return the momentum of an exponential average: the fraction of the initial value left after one update."""
    difference = jnp.ravel((from_start - from_zero) / start)
    # Momenta are short decimals; rounding removes the error of the subtraction.
    momentum = round(float(jnp.mean(difference)), 6)
    if momentum == 1.0:
        raise ValueError(
            f"update leaves the statistic '{path}' unchanged; run the model in train mode "
            "(use_running_average=False) and return its updated statistics"
        )
    if not 0.0 <= momentum < 1.0 or float(jnp.max(jnp.abs(difference - momentum))) > 1e-3:
        raise ValueError(f"update does not average the statistic '{path}' exponentially; leave it out of statistics")
    return momentum


def _merged(before: dict[str, Array], batch: dict[str, Array], share: float) -> dict[str, Array]:
    """Average statistics with those of a batch that has a share of all examples.

    Second moments would lose the variance of a channel whose mean is much larger than its standard deviation.
    """

    def average(old: Array, new: Array) -> Array:
        return old + jnp.asarray(share, old.dtype) * (new - old)

    merged = {path: average(before[path], value) for path, value in batch.items()}
    for path in merged:
        mean = _mean_of(path)
        if mean is not None and mean in batch:
            between = jnp.square(batch[mean] - before[mean])
            merged[path] += jnp.asarray(share * (1 - share), between.dtype) * between
    return merged


def _mean_of(path: str) -> str | None:
    """Return the path of the mean that belongs to a variance; None for any other statistic."""
    parent, _, name = path.rpartition("/")
    return None if name != "var" else f"{parent}/mean" if parent else "mean"
