"""Find lottery tickets by iterative pruning with rewinding, with the caller's training function."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import PRNGKeyArray, PyTree

from jprune.graph.axes import Axes, known_shapes, shapes_of
from jprune.pruning.amounts import Keep, PerLayer, as_keywords, checked, integer, renamed_arguments
from jprune.pruning.schedules import budget_of, keep_counts
from jprune.pruning.scores.elementwise import (
    Score,
    magnitude,
    refuse_missing_inputs,
    refuse_no_score,
    score_selected,
)
from jprune.pruning.selection.unstructured import apply_masks, global_masks
from jprune.pruning.state import masked_weights, masks_of, with_masks
from jprune.pruning.transform import refuse_no_selection
from jprune.trees import flatten, map_leaves, with_article

Train = Callable[[PyTree, PyTree, int, int], tuple[PyTree, PyTree]]


class Ticket(NamedTuple):
    """One level of iterative pruning: the start and the end of its training.

    Attributes:
      level: 0 for the dense network, then 1, 2, ...
      masks: bool arrays like the parameters, None where nothing is prunable.
      start: (params, optimizer state) at the rewinding step, with pruned params.
      end: (params, optimizer state) after training from there.
    """

    level: int
    masks: PyTree
    start: tuple[PyTree, PyTree]
    end: tuple[PyTree, PyTree]


@renamed_arguments(select="selection=")
def lottery_ticket(
    train: Train,
    tx: optax.GradientTransformation,
    params: PyTree,
    sparsities: Iterable[float | Keep | PerLayer],
    *,
    steps: int,
    rewind: int = 0,
    score: Score | Callable[..., PyTree] | None = None,
    selection: Callable[..., PyTree] = global_masks,
    axes: Axes = None,
    min_keep: int = 0,
    grad: Callable[[PyTree], PyTree] | None = None,
    batch: PyTree = None,
    key: PRNGKeyArray | None = None,
) -> Iterator[Ticket]:
    """Train, prune and rewind, once for every sparsity.

    First the dense network is trained. Then, for each sparsity, the trained weights are scored, the masks shrink, and
    the weights and the whole optimizer state are reset to their values after ``rewind`` updates, with pruned weights at
    0; training resumes from there. Levels are computed lazily, one for each ``next``. To resume a killed run, let
    ``train`` save its results and load those that exist; its calls are the same in every run.

    Sources: Frankle & Carbin, "The Lottery Ticket Hypothesis", 2019, arXiv 1803.03635 (rewind=0);
    Frankle et al., "Linear Mode Connectivity and the Lottery Ticket Hypothesis", 2020, arXiv
    1912.05671 (rewinding to step k).

    Args:
      train: ``train(params, opt_state, begin, end)`` runs the updates numbered begin, ..., end - 1 with
        ``tx`` and returns (params, opt_state). It may donate its arguments.
      tx: an optax chain that ends with ``keep_zeros``, which has the masks; its ``where``
        determines the prunable leaves.
      params: the initial weights.
      sparsities: for each level the total fraction of the prunable weights removed, or the number kept as a ``Keep``;
        for example ``geometric(0.2, every=1, times=10).values()``.
      steps: the number of updates from the initial to the trained weights.
      rewind: the number of updates after which the state is saved, to be restored at every level.
      score: score of the trained weights; None is ``magnitude()``.
      selection: function from scores to masks; see ``prune``.
      axes: roles of the axes of the parameters; see ``prune``.
      min_keep: minimum number of weights that every layer keeps.
      grad: function that returns the gradient at the trained weights, for scores that need it.
      batch: data for scores that need it.
      key: PRNG key for scores that need one; folded with the level.

    Returns:
      An iterator of ``Ticket``, one for the dense network (level 0) and one for each sparsity.

    Raises:
      TypeError: ``score`` is not a valid score, ``selection`` cannot be called as a selection, ``sparsities`` is not
        a list of amounts, or a number of steps is not an integer.
      ValueError: ``rewind`` is not in 0..steps - 1; a sparsity is out of range or smaller than the one before;
        ``grad``, ``batch`` or ``key`` is missing for a score that needs it; ``tx`` has no prune transformation, one
        that is not last in its chain, or no mask for a leaf that loses channels.

    >>> import jprune
    >>> tx = optax.chain(optax.sgd(0.1), jprune.keep_zeros())
    >>> def train(params, state, begin, end):
    ...     for _ in range(begin, end):
    ...         updates, state = tx.update(params, state, params)  # the gradient of |params|^2 / 2
    ...         params = optax.apply_updates(params, updates)
    ...     return params, state
    >>> tickets = lottery_ticket(train, tx, {"kernel": jnp.array([[3.0, -1.0]])}, [0.5], steps=2)
    >>> [ticket.start[0]["kernel"].tolist() for ticket in tickets]
    [[[3.0, -1.0]], [[3.0, 0.0]]]
    """
    score = magnitude() if score is None else score
    refuse_no_score(score)
    refuse_missing_inputs(score, {"grad": grad, "batch": batch, "key": key, "whole": params})
    schedule = _schedule_of(sparsities)
    refuse_no_selection(selection, schedule, {"axes": axes, "min_keep": min_keep or None})
    integer("rewind", rewind, least=0, most=integer("steps", steps, least=1) - 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "keep_zeros has no zero")  # the first level is dense
        state = tx.init(params)
    # keep_zeros would treat weights that happen to be 0 as pruned; the dense network has no pruned weights.
    masks = map_leaves(jnp.ones_like, masks_of(state))
    _refuse_unmasked_channels(selection, masks)
    state = with_masks(state, masks)
    shapes = shapes_of(params)
    with known_shapes(shapes):
        keep_counts(schedule, budget_of(selection, masks, axes, min_keep))
    options: dict[str, object] = ({"min_keep": min_keep} if min_keep else {}) | ({} if axes is None else {"axes": axes})

    def scores(level: int, trained: PyTree) -> PyTree:
        return score_selected(
            score,
            masked_weights(trained, masks),
            None if grad is None else grad(trained),
            batch,
            None if key is None else jax.random.fold_in(key, level),
            whole=trained,
        )

    def levels(params: PyTree, state: PyTree, masks: PyTree) -> Iterator[Ticket]:
        rewound = _run(train, params, state, 0, rewind) if rewind else (params, state)
        end = _run(train, *rewound, rewind, steps)
        yield Ticket(0, masks, rewound, end)
        for level, amount in schedule.items():
            with known_shapes(shapes):
                masks = selection(scores(level, end[0]), **as_keywords(amount), among=masks, **options)
            start = apply_masks(rewound[0], masks), with_masks(rewound[1], masks)
            end = _run(train, *start, rewind, steps)
            yield Ticket(level, masks, start, end)

    return levels(params, state, masks)


def _schedule_of(sparsities: object) -> dict[int, float | Keep | PerLayer]:
    """Check the amounts and return them by level; level 0 is the dense network."""
    if isinstance(sparsities, Mapping) or not isinstance(sparsities, Iterable):
        raise TypeError(
            f"sparsities={sparsities!r} is {with_article(sparsities)}; it must be a list with one sparsity for each "
            "level, such as jprune.geometric(0.2, every=1, times=10).values()"
        )
    amounts = [checked(f"sparsities[{i}]", amount) for i, amount in enumerate(sparsities)]
    if not amounts:
        raise ValueError("sparsities is empty; pass one sparsity for each level")
    return dict(enumerate(amounts, start=1))


def _refuse_unmasked_channels(selection: Callable[..., PyTree], masks: PyTree) -> None:
    """Raise if channels would be masked in leaves for which the optimizer state has no mask, such as biases."""
    loses: Callable[[str], bool] = getattr(selection, "loses_channels", lambda path: False)
    for path, mask in zip(*flatten(masks)[:2], strict=True):
        if mask is None and loses(path):
            raise ValueError(
                f"selection masks the channels of '{path}' too, for which tx has no mask; use "
                "keep_zeros(where=lambda path, leaf: selection.loses_channels(path))"
            )


def _run(train: Train, params: PyTree, state: PyTree, begin: int, end: int) -> tuple[PyTree, PyTree]:
    """Train copies, so that a training step that donates its arguments does not delete the originals."""
    params, state = jax.tree.map(jnp.copy, (params, state))
    return train(params, state, begin, end)
