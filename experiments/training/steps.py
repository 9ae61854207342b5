"""Train one replicate: a recipe, its optax chain, a step, and an epoch.

Pure functions of one replicate; ``phases`` makes programs over many of them.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jprune
from experiments.data import datasets
from experiments.training.tasks import Context, PyTree, Task, evaluate_slice

Where = Callable[[str, Any], bool]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one phase trains: SGD with a learning rate that is constant by pieces.

    Attributes:
      epochs: length of each piece.
      learning_rates: one per piece.
      batch: examples a step; those that fill no batch at the end of an epoch sit that epoch out.
      momentum: of SGD; 0 for none.
      nesterov: whether the momentum is Nesterov's.
      weight_decay: times every parameter is added to the gradient.
      jumpstart: coefficient of the jumpstart penalty.
    """

    epochs: tuple[int, ...]
    learning_rates: tuple[float, ...]
    batch: int = 128
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    jumpstart: float = 0.0

    def __post_init__(self):
        """Refuse what cannot be trained."""
        if len(self.epochs) != len(self.learning_rates):
            raise ValueError(
                f"epochs={self.epochs} and learning_rates={self.learning_rates} must be of one length: a piece each"
            )
        if self.batch < 1 or min(self.epochs, default=0) < 0:
            raise ValueError(f"batch={self.batch} must be at least 1, and none of epochs={self.epochs} negative")

    @property
    def total_epochs(self) -> int:
        """Epochs of all pieces."""
        return sum(self.epochs)


class TrainState(NamedTuple):
    """One replicate in training.

    Attributes:
      params: the parameters now.
      stats: the model's other state now.
      opt_state: of the optax chain.
      key: of this phase; orders and augmentations derive from it.
      step: int32, steps taken.
      stopped: int32, the first step whose loss was not finite, from which on nothing moves; -1 while
        there is none.
      best_params: of the epoch with the lowest validation loss so far; likewise ``best_stats``. Before
        an epoch has ended, those that entered the phase.
      best_loss: that validation loss; infinite before the first epoch.
      best_epoch: int32, counted from 1; 0 before the first.
    """

    params: PyTree
    stats: PyTree
    opt_state: optax.OptState
    key: jax.Array
    step: jax.Array
    stopped: jax.Array
    best_params: PyTree
    best_stats: PyTree
    best_loss: jax.Array
    best_epoch: jax.Array


class EpochState(NamedTuple):
    """One replicate within an epoch.

    Attributes:
      train: its training state.
      order: of the training examples, (examples,) int32.
      train_loss: sum over the steps so far; likewise ``validation_loss`` and ``right`` (answers) over
        the validation examples so far.
    """

    train: TrainState
    order: jax.Array
    train_loss: jax.Array
    validation_loss: jax.Array
    right: jax.Array


class EpochMetrics(NamedTuple):
    """What one epoch of one replicate leaves behind, float32.

    Attributes:
      train_loss: mean over the steps, without penalty and decay.
      validation_loss: mean cross-entropy over the validation split after the epoch.
      validation_accuracy: share of the validation split classified rightly.
    """

    train_loss: jax.Array
    validation_loss: jax.Array
    validation_accuracy: jax.Array


def steps_per_epoch(recipe: Recipe, examples: int) -> int:
    """How many full batches the training split fills.

    Raises:
      ValueError: not even one.

    >>> steps_per_epoch(Recipe((1,), (0.1,), batch=100), 350)
    3
    """
    if examples < recipe.batch:
        raise ValueError(f"batch={recipe.batch} is more than the {examples} examples of the training split")
    return examples // recipe.batch


def optimizer(task: Task, recipe: Recipe, steps: int, where: Where) -> optax.GradientTransformationExtraArgs:
    """The chain of every phase: jumpstart penalty, weight decay, SGD, and zeros that stay zero.

    Args:
      task: gives the preactivations for the penalty.
      recipe: coefficients and learning rates.
      steps: of one epoch.
      where: predicate of the prunable leaves, whose zeros at init stay zero.
    """
    boundaries = np.cumsum([epochs * steps for epochs in recipe.epochs])[:-1].tolist()
    schedule = optax.join_schedules([optax.constant_schedule(rate) for rate in recipe.learning_rates], boundaries)
    return optax.chain(
        jprune.add_jumpstart(task.preactivations, coefficient=recipe.jumpstart),  # for 0 it computes nothing
        optax.add_decayed_weights(recipe.weight_decay),
        optax.sgd(schedule, recipe.momentum or None, recipe.nesterov),
        jprune.keep_zeros(where=where),
    )


def begin(tx: optax.GradientTransformation, params: PyTree, stats: PyTree, key: jax.Array) -> TrainState:
    """The state before the first step; its arrays are copies, because each epoch consumes the state."""
    params, stats, best_params, best_stats = jax.tree.map(jnp.copy, (params, stats, params, stats))
    return TrainState(
        params=params,
        stats=stats,
        opt_state=tx.init(params),
        key=key,
        step=jnp.int32(0),
        stopped=jnp.int32(-1),
        best_params=best_params,
        best_stats=best_stats,
        best_loss=jnp.float32(jnp.inf),
        best_epoch=jnp.int32(0),
    )


def train_step(
    task: Task, tx: optax.GradientTransformationExtraArgs, state: TrainState, batch: datasets.Split
) -> tuple[TrainState, jax.Array]:
    """One step on one batch; from a loss that is not finite on, nothing moves.

    Returns:
      the next state and the loss, a float32 scalar.
    """
    context = Context(state.stats, batch, jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step))
    (loss, stats), grads = jax.value_and_grad(task.loss, has_aux=True)(state.params, context, "train")
    updates, opt_state = tx.update(grads, state.opt_state, state.params, grad=grads, batch=context)
    params = optax.apply_updates(state.params, updates)
    stopped = jnp.where(jnp.isfinite(loss) | (state.stopped >= 0), state.stopped, state.step)
    params, stats, opt_state = _choose(
        stopped < 0, (params, stats, opt_state), (state.params, state.stats, state.opt_state)
    )
    moved = state._replace(params=params, stats=stats, opt_state=opt_state, step=state.step + 1, stopped=stopped)
    return moved, loss


def open_epoch(state: TrainState, epoch: jax.Array, examples: int) -> EpochState:
    """Draw the order of the examples for this epoch, counted from 0."""
    key = jax.random.fold_in(jax.random.fold_in(state.key, 0), epoch)
    zero = jnp.float32(0)
    return EpochState(state, jax.random.permutation(key, examples), zero, zero, zero)


def learn(
    task: Task,
    tx: optax.GradientTransformationExtraArgs,
    state: EpochState,
    position: jax.Array,
    split: datasets.Split,
    *,
    batch: int,
) -> EpochState:
    """Take the step at this position of the epoch, on ``batch`` examples."""
    chosen = jax.lax.dynamic_slice_in_dim(state.order, position * batch, batch)
    train, loss = train_step(task, tx, state.train, datasets.Split(split.images[chosen], split.labels[chosen]))
    return state._replace(train=train, train_loss=state.train_loss + loss)


def validate(task: Task, state: EpochState, position: jax.Array, split: datasets.Split, *, size: int) -> EpochState:
    """Evaluate the slice of the validation split at this position, of ``size`` examples."""
    loss, right = evaluate_slice(task, (state.train.params, state.train.stats), split, position, size)
    return state._replace(validation_loss=state.validation_loss + loss, right=state.right + right)


def close_epoch(state: EpochState, epoch: jax.Array, steps: int, validation: int) -> tuple[TrainState, EpochMetrics]:
    """Keep the weights if no earlier epoch of the phase had as low a validation loss.

    Args:
      state: after all steps and all of the validation split.
      epoch: counted from 0.
      steps: of the epoch.
      validation: examples of that split.
    """
    train = state.train
    loss = state.validation_loss / validation
    best_params, best_stats, best_loss, best_epoch = _choose(
        (loss < train.best_loss) & (train.stopped < 0),
        (train.params, train.stats, loss, epoch + 1),
        (train.best_params, train.best_stats, train.best_loss, train.best_epoch),
    )
    train = train._replace(best_params=best_params, best_stats=best_stats, best_loss=best_loss, best_epoch=best_epoch)
    return train, EpochMetrics(state.train_loss / steps, loss, state.right / validation)


def _choose(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """``new`` where the scalar condition holds, else ``old``, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
