"""The state of a model's units and points on a whole data set, in one streaming pass."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from jprune.jumpstart import units
from jprune.jumpstart.preactivations import preactivations

if TYPE_CHECKING:
    import pandas as pd


def activity_report(
    model: Any,
    batches: Iterable[Any],
    *,
    variables: Any = None,
    inputs: Callable[[Any], Any] | None = None,
    include: str | None = None,
    exclude: str | None = None,
    skip_last: bool = True,
    method: str | Callable[..., Any] | None = None,
    **kwargs: Any,
) -> "pd.DataFrame":
    """Say of every layer which share of its units and points is dead, linear or nonlinear.

    Costs one forward pass, compiled once: a shorter batch is padded to the longest before it, and
    the padding is masked. Memory does not grow with the data set. The model runs in the mode it is
    set to, so call ``model.eval()`` first; it is not altered.

    Args:
      model: an ``nnx.Module``, or a Linen module with ``variables``.
      batches: the data set in batches: arrays (batch, ...), or tuples or lists that start with one,
        or whatever ``inputs`` understands.
      variables: the variables of a Linen module.
      inputs: a function batch -> what the model is called with, a pytree of arrays (batch, ...).
      include: a regular expression: the layers to judge; see ``preactivations``.
      exclude: a regular expression: the layers to leave out of those.
      skip_last: leave out the layer that is called last.
      method: call this instead of ``__call__``.
      **kwargs: passed on to the model.

    Returns:
      A frame with a row a layer, in call order, indexed by the layer's path: ``units``, their shares
      ``unit_dead``, ``unit_linear``, ``unit_nonlinear``; ``points`` and their shares ``point_dead``,
      ``point_linear``, ``point_nonlinear`` in that layer. ``frame.attrs["activity"]`` is the
      ``Activity`` of the whole network, in Python floats.

    Raises:
      ImportError: flax is not installed.
      TypeError: a batch that is none of these, or a Linen module without ``variables``.
      ValueError: no batch at all, a layer that does not keep the batch axis, or what
        ``preactivations`` refuses.

    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    >>> frame = activity_report(model, [jnp.ones((4, 2)), jnp.zeros((3, 2))])
    >>> frame.loc["layers/0", ["units", "points"]].tolist()
    [3, 7]
    """
    call, state = _functional(model, variables)
    options = {"include": include, "exclude": exclude, "skip_last": skip_last, "method": method, **kwargs}

    @jax.jit
    def judge(state: Any, x: Any, examples: Any) -> tuple[Any, units.PointCounts]:
        preacts = preactivations(*call(state), x, **options)
        return units.unit_status(preacts, examples), units.count_points(units.point_status(preacts), examples)

    status, counts = None, None
    for x, examples in _padded(batches, inputs or _first):
        next_status, next_counts = judge(state, x, examples)
        status = next_status if status is None else units.merge_unit_status(status, next_status)
        next_counts = jax.tree.map(lambda n: np.asarray(n, np.int64), next_counts)
        counts = next_counts if counts is None else jax.tree.map(np.add, counts, next_counts)
    if status is None or counts is None:
        raise ValueError("batches is empty: there is nothing to judge the model on")
    return _frame(status, counts)


def _functional(model: Any, variables: Any) -> tuple[Callable[[Any], tuple[Any, ...]], Any]:
    """Split a model into state for jit and a function from it to the first arguments of a capture."""
    if variables is not None:
        return lambda state: (model, state), variables
    try:
        from flax import linen, nnx  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("activity_report needs flax: pip install 'jprune[flax]'") from error
    if isinstance(model, linen.Module):
        raise TypeError("a Linen module needs its variables: activity_report(module, batches, variables=variables)")
    graphdef, state = nnx.split(model)
    return lambda state: (nnx.merge(graphdef, state, copy=True),), state


def _first(batch: Any) -> Any:
    if isinstance(batch, tuple | list):
        batch = batch[0]
    if not isinstance(batch, jax.Array | np.ndarray):
        raise TypeError(f"a batch is a {type(batch).__name__}; pass inputs=, a function from it to the model's input")
    return batch


def _padded(batches: Iterable[Any], inputs: Callable[[Any], Any]) -> Iterator[tuple[Any, Any]]:
    """Pad each batch to the longest so far by repeating its first example; with the mask of real ones.

    Batches without examples are left out.
    """
    longest = 0
    for batch in batches:
        x = inputs(batch)
        size = len(jax.tree.leaves(x)[0])
        if size == 0:
            continue
        longest = max(longest, size)
        rows = np.where(np.arange(longest) < size, np.arange(longest), 0)
        if size < longest:
            x = jax.tree.map(lambda leaf, rows=rows: leaf[rows], x)
        yield x, jnp.arange(longest) < size


def _frame(status: Any, counts: units.PointCounts) -> "pd.DataFrame":
    try:
        import pandas as pd  # noqa: PLC0415 - slow to import, and the penalty itself does not need it
    except ImportError as error:
        raise ImportError("activity_report needs the extra 'recall': pip install 'jprune[recall]'") from error

    unit = np.asarray(units.count_units(status), np.float64)
    point = np.stack([counts.dead_cells, counts.linear_cells, counts.nonlinear_cells]).astype(np.float64)
    columns: dict[str, Any] = {"units": unit.sum(axis=0).astype(np.int64)}
    names = ("dead", "linear", "nonlinear")
    columns |= {f"unit_{name}": row / unit.sum(axis=0) for name, row in zip(names, unit, strict=True)}
    columns["points"] = np.full(unit.shape[1], int(counts.points))
    columns |= {f"point_{name}": row / int(counts.points) for name, row in zip(names, point, strict=True)}
    frame = pd.DataFrame(columns, index=pd.Index(status, name="layer"))
    frame.attrs["activity"] = units.Activity(*map(float, units.ratios(unit.sum(axis=1), counts)))
    return frame
