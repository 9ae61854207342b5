"""Report the dead, linear and nonlinear units and points of a model on a whole data set, in one pass."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, ArrayLike, PyTree

from jprune._extras import missing
from jprune.jumpstart import layers, tagging, units
from jprune.jumpstart.capture import preactivations
from jprune.trees import refuse_one_batch, with_article

if TYPE_CHECKING:
    import pandas as pd


def activity_report(
    model: object,
    batches: Iterable[PyTree],
    *,
    variables: PyTree = None,
    inputs: Callable[[PyTree], PyTree] | None = None,
    examples: Callable[[PyTree], ArrayLike] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    skip_last: bool = True,
    method: tagging.Method = None,
    **kwargs: PyTree,
) -> "pd.DataFrame":
    """Compute the fraction of dead, linear and nonlinear units and points of every layer over a data set.

    This takes one forward pass over the data, compiled once: shorter batches are padded to the longest before them, and
    the padding is masked. Memory does not grow with the data set. The model runs in its current mode, so call
    ``model.eval()`` first (in training mode, batch statistics would include the padding); it is not modified.
    Preactivations are counted before any normalization: if one lies between a layer and its ReLU, a unit that is dead
    here may not be dead after it.

    Args:
      model: an ``nnx.Module``, or a Linen module with ``variables``.
      batches: the data set in batches: arrays (batch, ...), or tuples or lists that start with one,
        or anything that ``inputs`` accepts.
      variables: the variables of a Linen module.
      inputs: a function from a batch to the model's input, a pytree of arrays (batch, ...).
      examples: a function from a batch to the mask of its real examples or positions, as for ``jumpstart_penalty``:
        bool (batch,), or (batch, time) for padded sequences.
      include: a regular expression for the layers to report; see ``preactivations``.
      exclude: a regular expression for the layers to leave out.
      skip_last: leave out the layer that is called last.
      method: what to call instead of ``__call__``.
      **kwargs: passed to the model.

    Returns:
      A frame with one row per layer, in call order, indexed by the layer's path: ``units``, their fractions
      ``unit_dead``, ``unit_linear``, ``unit_nonlinear``; ``points`` and their fractions ``point_dead``,
      ``point_linear``, ``point_nonlinear`` in that layer. ``frame.attrs["activity"]`` is the
      ``Activity`` of the whole network, in Python floats.

    Raises:
      ImportError: flax or pandas is not installed.
      TypeError: ``batches`` is one batch, a batch or the model has another type, or a Linen module is given without
        ``variables``.
      ValueError: there is no batch, a layer does not keep the batch axis, a mask does not match, or as
        ``preactivations``.

    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    >>> frame = activity_report(model, [jnp.ones((4, 2)), jnp.zeros((3, 2))])
    >>> frame.loc["layers/0", ["units", "points"]].tolist()
    [3, 7]
    """
    try:
        import pandas as pd  # noqa: PLC0415 - slow to import, and the penalty itself does not need it
    except ImportError as error:
        raise ImportError(missing("activity_report needs the extra 'recall'", "recall")) from error

    refuse_one_batch(batches)
    call, state = _functional(model, variables)
    options = {"include": include, "exclude": exclude, "skip_last": skip_last, "method": method, **kwargs}

    @jax.jit
    def statuses(state: PyTree, x: PyTree, real: Array) -> tuple[layers.Statuses, units.PointCounts]:
        preacts = preactivations(*call(state), x, **options)
        points = units.point_status(preacts, examples=real)
        return units.unit_status(preacts, real), units.count_points(points, real.reshape((len(real), -1)).any(axis=1))

    status, counts = None, None
    for x, real in _padded(batches, inputs or _first, examples):
        next_status, next_counts = statuses(state, x, real)
        status = next_status if status is None else units.merge_unit_status(status, next_status)
        next_counts = jax.tree.map(lambda n: np.asarray(n, np.int64), next_counts)
        counts = next_counts if counts is None else jax.tree.map(np.add, counts, next_counts)
    if status is None or counts is None:
        raise ValueError("batches has no examples; pass at least one batch with one or more")
    columns, index = _columns(status, counts), pd.Index(status, name="layer")
    frame = pd.DataFrame(columns, index=index)
    unit = units.count_units(status).sum(axis=1)
    frame.attrs["activity"] = units.Activity(*map(float, units.ratios(unit, counts)))
    return frame


def _functional(model: object, variables: PyTree) -> tuple[Callable[[PyTree], tuple[PyTree, ...]], PyTree]:
    """Split a model into state for jit and a function from the state to the first arguments of a capture."""
    if variables is not None:
        return lambda state: (model, state), variables
    try:
        from flax import linen, nnx  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(missing("activity_report needs flax", "flax")) from error
    if isinstance(model, linen.Module):
        raise TypeError("a Linen module needs its variables: activity_report(module, batches, variables=variables)")
    if not isinstance(model, nnx.Module):
        preactivations(model)  # raises the error for a model of another kind
    graphdef, state = nnx.split(model)
    return lambda state: (nnx.merge(graphdef, state, copy=True),), state


def _first(batch: PyTree) -> Array | np.ndarray:
    if isinstance(batch, tuple | list):
        batch = batch[0]
    if not isinstance(batch, jax.Array | np.ndarray):
        raise TypeError(f"a batch is {with_article(batch)}; pass inputs=, a function from it to the model's input")
    return batch


def _padded(
    batches: Iterable[PyTree],
    inputs: Callable[[PyTree], PyTree],
    examples: Callable[[PyTree], ArrayLike] | None,
) -> Iterator[tuple[PyTree, Array]]:
    """Pad each batch to the longest so far by repeating its first example; yield it with the mask of real examples.

    Batches without a real example are left out.
    """
    longest = 0
    for batch in batches:
        x = inputs(batch)
        size = len(jax.tree.leaves(x)[0])
        mask = np.ones(size, bool) if examples is None else np.asarray(examples(batch))
        layers.check_mask("examples(batch)", mask, [(size, *mask.shape[1:])])
        if not mask.any():
            continue
        longest = max(longest, size)
        rows = np.where(np.arange(longest) < size, np.arange(longest), 0)
        if size < longest:
            x = jax.tree.map(lambda leaf, rows=rows: leaf[rows], x)
        real = (np.arange(longest) < size).reshape((longest, *(1,) * (mask.ndim - 1)))
        yield x, jnp.asarray(mask[rows] & real)


def _columns(status: layers.Statuses, counts: units.PointCounts) -> dict[str, np.ndarray]:
    """Return the columns of the report."""
    unit = np.asarray(units.count_units(status), np.float64)
    point = np.stack([counts.dead_cells, counts.linear_cells, counts.nonlinear_cells]).astype(np.float64)
    columns: dict[str, np.ndarray] = {"units": unit.sum(axis=0).astype(np.int64)}
    names = ("dead", "linear", "nonlinear")
    columns |= {f"unit_{name}": row / unit.sum(axis=0) for name, row in zip(names, unit, strict=True)}
    columns["points"] = np.full(unit.shape[1], int(counts.points))
    columns |= {f"point_{name}": row / int(counts.points) for name, row in zip(names, point, strict=True)}
    return columns
