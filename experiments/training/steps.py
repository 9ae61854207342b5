"""Train one replicate: a recipe, its optimizer, a step and an epoch.

These are pure functions of one replicate; ``phases`` converts them to programs over many.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import PyTree

import jprune
from experiments.data import datasets
from experiments.storage.files import JSON
from experiments.training.tasks import Context, Task, evaluate_slice
from jprune.trees import Where

Schedule = Literal["constant", "one-cycle"]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """The optimizer and learning rates of one phase.

    Attributes:
      epochs: length of each piece of the learning-rate schedule.
      learning_rates: constant value or peak of each piece.
      batch: examples per step; the last partial batch of an epoch is dropped.
      momentum: momentum of SGD; 0 for plain SGD.
      nesterov: whether to use Nesterov momentum.
      weight_decay: coefficient; weight_decay times the parameter is added to the gradient.
      jumpstart: coefficient of the jumpstart penalty.
      optimizer: ``sgd`` or ``adam``, which ignores ``momentum`` and ``nesterov``.
      schedule: learning-rate schedule within a piece. ``constant``, or ``one-cycle``: from 1/25 of the peak up to
        the peak in 30% of the steps and down to 1/250,000 of it, along cosines (Smith and Topin 2017, with the
        defaults of ``optax.cosine_onecycle_schedule``).
    """

    epochs: tuple[int, ...]
    learning_rates: tuple[float, ...]
    batch: int = 128
    momentum: float = 0.9
    nesterov: bool = True
    weight_decay: float = 5e-4
    jumpstart: float = 0.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    schedule: Schedule = "constant"

    def __post_init__(self):
        """Validate the settings."""
        if len(self.epochs) != len(self.learning_rates):
            raise ValueError(
                f"epochs={self.epochs} and learning_rates={self.learning_rates} must have the same length, one entry "
                "for each piece of the schedule"
            )
        if self.batch < 1 or min(self.epochs, default=0) < 0:
            raise ValueError(
                f"batch={self.batch} must be at least 1, and every entry of epochs={self.epochs} at least 0"
            )

    @property
    def total_epochs(self) -> int:
        """Sum of the lengths of all pieces."""
        return sum(self.epochs)

    def settings(self) -> dict[str, JSON]:
        """Return the fields as JSON, for the hash of a stage; later fields are left out at their defaults."""
        values = dataclasses.asdict(self)
        for name, default in (("optimizer", "sgd"), ("schedule", "constant")):
            if values[name] == default:
                del values[name]
        return values

    def learning_rate(self, steps: int) -> optax.Schedule:
        """Return the learning rate by step, for epochs of ``steps`` steps.

        >>> round(float(Recipe((1, 2), (0.1, 0.01)).learning_rate(10)(15)), 6)
        0.01
        """
        lengths = [epochs * steps for epochs in self.epochs]
        one = {
            "constant": lambda length, rate: optax.constant_schedule(rate),
            "one-cycle": lambda length, rate: optax.cosine_onecycle_schedule(max(length, 1), rate),
        }[self.schedule]
        pieces = [one(length, rate) for length, rate in zip(lengths, self.learning_rates, strict=True)]
        return optax.join_schedules(pieces, np.cumsum(lengths)[:-1].tolist())


class TrainState(NamedTuple):
    """One replicate in training.

    Attributes:
      params: the current parameters.
      stats: the model's other current state, such as running means.
      opt_state: state of the optax chain.
      key: key of this phase; orders and augmentations derive from it.
      step: int32, steps taken.
      stopped: int32, the first step with a loss that is not finite, after which the state no longer changes;
        -1 if every loss is finite.
      best_params: parameters of the epoch with the lowest validation loss so far; before the first epoch ends, the
        initial parameters of the phase.
      best_stats: the other state of that epoch.
      best_loss: its validation loss; infinity before the first epoch ends.
      best_epoch: int32, its number counted from 1; 0 before the first epoch ends.
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
      order: order of the training examples, (examples,) int32.
      train_loss: sum over the steps so far.
      validation_loss: sum over the validation examples so far.
      correct: number of validation examples classified correctly so far.
    """

    train: TrainState
    order: jax.Array
    train_loss: jax.Array
    validation_loss: jax.Array
    correct: jax.Array


class EpochMetrics(NamedTuple):
    """Metrics of one epoch of one replicate, float32 scalars.

    Attributes:
      train_loss: mean over the steps, without penalty and weight decay.
      validation_loss: mean cross-entropy over the validation split after the epoch.
      validation_accuracy: fraction of the validation split classified correctly.
    """

    train_loss: jax.Array
    validation_loss: jax.Array
    validation_accuracy: jax.Array


def steps_per_epoch(recipe: Recipe, examples: int) -> int:
    """Return the number of full batches in the training split.

    Raises:
      ValueError: the split has fewer examples than one batch.

    >>> steps_per_epoch(Recipe((1,), (0.1,), batch=100), 350)
    3
    """
    if examples < recipe.batch:
        raise ValueError(
            f"batch={recipe.batch} is more than the {examples} examples of the training split; use a smaller batch"
        )
    return examples // recipe.batch


def optimizer(task: Task, recipe: Recipe, steps: int, where: Where) -> optax.GradientTransformationExtraArgs:
    """Return the optimizer of a phase: jumpstart penalty, weight decay, SGD or Adam, and ``keep_zeros``.

    Args:
      task: task that computes the preactivations for the penalty.
      recipe: coefficients and learning rates.
      steps: number of steps in an epoch.
      where: predicate of the leaves that have a mask; ``begin`` sets the masks.
    """
    schedule = recipe.learning_rate(steps)
    if recipe.optimizer == "adam":
        rule = optax.adam(schedule)
    else:
        rule = optax.sgd(schedule, recipe.momentum or None, recipe.nesterov)
    return optax.chain(
        jprune.add_jumpstart(task.preactivations, coefficient=recipe.jumpstart),  # a coefficient of 0 has no cost
        optax.add_decayed_weights(recipe.weight_decay),
        rule,
        jprune.keep_zeros(where=where),
    )


def begin(
    tx: optax.GradientTransformation, params: PyTree, stats: PyTree, key: jax.Array, masks: PyTree = None
) -> TrainState:
    """Return the state before the first step. Its arrays are copies, because each epoch donates the state.

    Args:
      tx: result of ``optimizer``.
      params: parameters of one replicate.
      stats: its other state.
      key: key of the phase.
      masks: bool arrays for the leaves that ``tx`` selects: False where a weight was pruned and stays 0. None to train
        every weight, also those that are 0 at the start, such as kernels that are initialized with zeros.
    """
    params, stats, best_params, best_stats = jax.tree.map(jnp.copy, (params, stats, params, stats))
    opt_state = tx.init(params)
    masks = jax.tree.map(jnp.ones_like, jprune.masks_of(opt_state)) if masks is None else masks
    return TrainState(
        params=params,
        stats=stats,
        opt_state=jprune.with_masks(opt_state, masks),
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
    """Take one step on one batch; after a loss that is not finite, the state no longer changes.

    Returns:
      The next state and the loss, a float32 scalar.
    """
    context = Context(state.stats, batch, jax.random.fold_in(jax.random.fold_in(state.key, 1), state.step))
    (loss, stats), grads = jax.value_and_grad(task.loss, has_aux=True)(state.params, context, "train")
    updates, opt_state = tx.update(grads, state.opt_state, state.params, grad=grads, batch=context)
    params = optax.apply_updates(state.params, updates)
    stopped = jnp.where(jnp.isfinite(loss) | (state.stopped >= 0), state.stopped, state.step)
    params, stats, opt_state = _select(
        stopped < 0, (params, stats, opt_state), (state.params, state.stats, state.opt_state)
    )
    state = state._replace(params=params, stats=stats, opt_state=opt_state, step=state.step + 1, stopped=stopped)
    return state, loss


def open_epoch(state: TrainState, epoch: jax.Array, examples: int) -> EpochState:
    """Draw the order of the examples for an epoch, counted from 0."""
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
    """Take the step at this position of the epoch, on the next ``batch`` examples of its order."""
    chosen = jax.lax.dynamic_slice_in_dim(state.order, position * batch, batch)
    train, loss = train_step(task, tx, state.train, datasets.Split(split.images[chosen], split.labels[chosen]))
    return state._replace(train=train, train_loss=state.train_loss + loss)


def validate(task: Task, state: EpochState, position: jax.Array, split: datasets.Split, *, size: int) -> EpochState:
    """Evaluate the slice of the validation split at this position, of ``size`` examples."""
    loss, correct = evaluate_slice(task, (state.train.params, state.train.stats), split, position, size)
    return state._replace(validation_loss=state.validation_loss + loss, correct=state.correct + correct)


def close_epoch(state: EpochState, epoch: jax.Array, steps: int, validation: int) -> tuple[TrainState, EpochMetrics]:
    """Store the weights as the best if the validation loss is below that of every earlier epoch of the phase.

    Args:
      state: after all steps and the whole validation split.
      epoch: counted from 0.
      steps: number of steps in the epoch.
      validation: number of validation examples.
    """
    train = state.train
    loss = state.validation_loss / validation
    best_params, best_stats, best_loss, best_epoch = _select(
        (loss < train.best_loss) & (train.stopped < 0),
        (train.params, train.stats, loss, epoch + 1),
        (train.best_params, train.best_stats, train.best_loss, train.best_epoch),
    )
    train = train._replace(best_params=best_params, best_stats=best_stats, best_loss=best_loss, best_epoch=best_epoch)
    return train, EpochMetrics(state.train_loss / steps, loss, state.correct / validation)


def _select(condition: jax.Array, new: PyTree, old: PyTree) -> PyTree:
    """Return ``new`` if the scalar condition is true, else ``old``, leaf by leaf."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)
