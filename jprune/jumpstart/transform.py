"""Train with the jumpstart penalty: as a transformation in an optax chain, or fused into the loss.

Both give the same updates. They differ in the additional cost of a step:

``jumpstart_loss`` adds the reductions over the preactivations and their gradient to the forward and backward pass of
the loss.

``add_jumpstart`` adds the same and another forward and backward pass up to the last penalized layer, so a step takes
about twice as long. In return the loss function does not change, so the transformation works in any training loop, and
it can use another batch or another mode of the model than the loss.
"""

import inspect
import math
import warnings
from collections.abc import Callable, Hashable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, ArrayLike, PyTree

from jprune.jumpstart.layers import Preactivations
from jprune.jumpstart.penalty import Option, Options, jumpstart_penalty, number_of
from jprune.trees import INJECT_CHAIN, Subset, explain_left_out, flatten, is_float, match

Coefficient: TypeAlias = ArrayLike | Callable[[ArrayLike], ArrayLike]  # a number, a scalar array or a schedule


class JumpstartState(NamedTuple):
    """State of ``add_jumpstart``.

    Attributes:
      count: int32, the number of updates; the schedule's step.
      penalty: the penalty at the last update without the coefficient, float32; 0 initially, and always 0 if the
        coefficient is the number 0.
      key: the PRNG key of random ties, folded with ``count`` at each update; or None.
    """

    count: Array  # type: ignore[assignment]
    penalty: Array
    key: Array | None


class FusedAux(NamedTuple):
    """The second output of ``jumpstart_loss`` with ``has_aux``.

    Attributes:
      loss: the loss without the penalty.
      penalty: the penalty without the coefficient.
      aux: the ``aux`` of the loss function.
    """

    loss: ArrayLike
    penalty: Array
    aux: PyTree


def add_jumpstart(
    preactivations: Callable[[PyTree, PyTree], Preactivations], coefficient: Coefficient, **options: Option
) -> optax.GradientTransformationExtraArgs:
    """Add coefficient(step) * gradient of the jumpstart penalty to the updates.

    Put it first in a chain, where updates are gradients. After the optimizer, whose updates are added to the
    parameters, it would increase the penalty. Outside jit, ``update`` warns if it is also given ``grad``, the gradient
    of the loss, and the updates point against it.

    ``update`` also takes ``batch``, the second argument of ``preactivations``, and optionally ``key``, which replaces
    the one given here. It needs another forward and backward pass; ``jumpstart_loss`` does not. Inside
    ``optax.MultiSteps`` the penalty is that of the last ``batch`` alone; ``jumpstart_loss`` averages it over all. To
    change the coefficient from outside, put the whole chain into ``optax.inject_hyperparams``, which calls a function
    given to it with the step: ``inject_hyperparams(lambda rate: chain(add_jumpstart(preactivations, rate), ...))``.
    ``optax.apply_if_finite`` checks only the gradients that it is given, so put it after the penalty, around the rest
    of the chain: ``chain(add_jumpstart(...), apply_if_finite(chain(adam(1e-3), ...), 10))``. Before ``optax.lookahead``
    the preactivations are those of the fast weights.

    Args:
      preactivations: a function (params, batch) -> preactivations.
      coefficient: a number, a scalar array or an optax schedule, called with the number of earlier
        updates. If it is the number 0, nothing is computed.
      **options: options of ``jumpstart_penalty``. ``examples`` may be a function from batch to mask. With
        ``axis_name``, inside shard_map, parameters must be replicated and ``batch`` is the device's slice; the gradient
        over the global batch is added on every device.

    Returns:
      An optax transformation with a ``JumpstartState``. The gradient is added to
      float leaves in their update's dtype; ``None`` and other leaves are unchanged.

    Raises:
      ValueError: as ``jumpstart_penalty``; the coefficient is negative or infinite. While tracing: ``params`` or
        ``batch`` is missing, or updates do not match ``params``; the message names the leaf.

    >>> fn = lambda params, x: [x @ params["kernel"]]
    >>> tx = optax.chain(add_jumpstart(fn, coefficient=1.0, mode="unit", balance=0.75), optax.sgd(1.0))
    >>> params = {"kernel": jnp.zeros((1, 1))}
    >>> updates, state = tx.update(params, tx.init(params), params, batch=jnp.array([[3.0], [1.0]]))
    >>> float(state[0].penalty), updates["kernel"].tolist()  # a pull of .75 up and .25 down, at the mean input
    (1.0, [[1.0]])
    """
    _check(coefficient, options)
    off = not callable(coefficient) and not isinstance(coefficient, Array) and coefficient == 0
    seed = options.pop("key", None)

    def init(params: PyTree) -> JumpstartState:
        del params
        return JumpstartState(jnp.zeros([], jnp.int32), jnp.zeros([], jnp.float32), jax.tree.map(jnp.copy, seed))

    def update(
        updates: PyTree,
        state: JumpstartState,
        params: PyTree = None,
        *,
        batch: PyTree = None,
        key: Array | None = None,
        grad: PyTree = None,
        **_: object,
    ) -> tuple[PyTree, JumpstartState]:
        if params is None:
            raise ValueError("add_jumpstart needs params: call update(updates, state, params, batch=batch)")
        if batch is None:
            raise ValueError("add_jumpstart needs batch: call update(updates, state, params, batch=batch)")
        if isinstance(params, optax.LookaheadParams):
            params = params.fast  # before optax.lookahead, updates are the gradient of these alone
        _warn_after_optimizer(updates, grad)
        count = optax.safe_increment(state.count)
        if off:
            return updates, JumpstartState(count, state.penalty, state.key)
        chosen = _at(options, batch) | _folded(state.key if key is None else key, state.count)

        def penalty(params: PyTree) -> Array:
            with explain_left_out(params, "add_jumpstart"):
                preacts = preactivations(params, batch)
            return jumpstart_penalty(preacts, **chosen)

        value, gradient = _value_and_gradient(penalty, params, options.get("axis_name"))
        added = _add(updates, params, gradient, _value(coefficient, state.count))
        return added, JumpstartState(count, value.astype(jnp.float32), state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def _warn_after_optimizer(updates: PyTree, grad: PyTree) -> None:
    """Warn, outside jit, if updates point against the gradient, as those of an optimizer do."""
    (paths, given, _), (other_paths, others, _) = flatten(updates), flatten(grad)
    if paths != other_paths:
        return
    pairs = [
        (update, slope) for update, slope in zip(given, others, strict=True) if is_float(update) and is_float(slope)
    ]
    if any(isinstance(x, jax.core.Tracer) for pair in pairs for x in pair):
        return
    along = [jnp.sum(update.astype(jnp.float32) * slope.astype(jnp.float32)) for update, slope in pairs]
    if sum(map(float, along)) < 0:
        warnings.warn(
            "add_jumpstart was given updates that point against grad, as after an optimizer: the penalty would be "
            "increased; put it before the optimizer: optax.chain(jprune.add_jumpstart(...), optax.adam(...))",
            stacklevel=3,
        )


def jumpstart_loss(
    loss_fn: Callable[..., PyTree], coefficient: Coefficient, has_aux: bool = False, **options: Option
) -> Callable[..., PyTree]:
    """Add the jumpstart penalty to a loss function that returns its preactivations, in the same pass.

    ``call_with_preactivations`` returns the outputs and preactivations of a Flax model in one pass. The result is an
    ordinary loss function, for ``jax.value_and_grad``, ``nnx.value_and_grad`` or any other transformation.

    Args:
      loss_fn: returns (loss, preactivations), or with ``has_aux`` (loss, (preactivations, aux)).
      coefficient: a number, a scalar array or an optax schedule.
      has_aux: whether the result returns (total, FusedAux(loss, penalty, aux)), for
        ``value_and_grad(..., has_aux=True)``; otherwise it returns only the total.
      **options: options of ``jumpstart_penalty``. ``examples`` may be a function from the arguments of the loss to the
        mask.

    Returns:
      A function of the arguments of ``loss_fn``, returning loss + coefficient * penalty. If the
      coefficient is a schedule or ties are random, it takes the keyword ``step``, the number of earlier updates,
      which is not passed to ``loss_fn``.

    Raises:
      ValueError: as ``jumpstart_penalty``; the coefficient is negative or infinite; while tracing, ``step`` is missing
        where it is needed.
      TypeError: while tracing, ``loss_fn`` returns something else.

    >>> def loss_fn(params, x):
    ...     z = x @ params["kernel"]
    ...     return jnp.mean(z**2), [z]
    >>> fused = jumpstart_loss(loss_fn, coefficient=0.5, mode="unit")
    >>> float(fused({"kernel": jnp.zeros((1, 1))}, jnp.ones((2, 1))))
    0.5
    """
    _check(coefficient, options)
    seed = options.pop("key", None)
    needs_step = callable(coefficient) or seed is not None

    def fused(*args: PyTree, **kwargs: PyTree) -> PyTree:
        step = kwargs.pop("step", None) if needs_step else 0
        if step is None:
            raise ValueError("a coefficient schedule and random ties need the step: call the loss with step=step")
        loss, preacts, aux = _unpacked(loss_fn(*args, **kwargs), has_aux)
        chosen = _at(options, *args, **kwargs) | _folded(seed, step)
        penalty = jumpstart_penalty(preacts, **chosen)
        added = _value(coefficient, step).astype(penalty.dtype) * penalty
        total = loss + (added.astype(jnp.asarray(loss).dtype) if is_float(jnp.asarray(loss)) else added)
        return (total, FusedAux(loss, penalty, aux)) if has_aux else total

    return fused


def _check(coefficient: Coefficient, options: dict[str, Option]) -> None:
    _, *allowed = inspect.signature(jumpstart_penalty).parameters
    if "options" in options:  # optax.inject_hyperparams passes **options as one argument
        raise TypeError(f"options= is not an option of jumpstart_penalty; {INJECT_CHAIN}")
    for name in options:
        if name not in allowed:
            raise TypeError(f"{name}= is not an option of jumpstart_penalty; options: {', '.join(allowed)}")
    if not callable(coefficient) and not 0 <= number_of(coefficient) < math.inf:
        raise ValueError(f"coefficient={coefficient} must be a finite number, 0 or more, such as 1e-3, or a schedule")
    Options.make(**{name: value for name, value in options.items() if name not in ("units", "examples")})


def _at(options: dict[str, Option], *args: PyTree, **kwargs: PyTree) -> dict[str, Option]:
    """Return the options for one batch."""
    examples = options.get("examples")
    return options | {"examples": examples(*args, **kwargs) if callable(examples) else examples}


def _folded(key: Array | None, step: ArrayLike) -> dict[str, Array | None]:
    return {"key": None if key is None else jax.random.fold_in(key, step)}


def _value(coefficient: Coefficient, step: ArrayLike) -> Array:
    return jnp.asarray(coefficient(step) if callable(coefficient) else coefficient)


def _unpacked(returned: PyTree, has_aux: bool) -> tuple[ArrayLike, Preactivations, PyTree]:
    wanted = "(loss, (preactivations, aux))" if has_aux else "(loss, preactivations)"
    pair = isinstance(returned, tuple) and len(returned) == 2
    if pair and not has_aux:
        return *returned, None
    if pair and isinstance(returned[1], tuple) and len(returned[1]) == 2:
        return returned[0], *returned[1]
    raise TypeError(f"loss_fn must return {wanted} with has_aux={has_aux}; it returned {jax.tree.structure(returned)}")


def _value_and_gradient(
    penalty: Callable[[PyTree], Array], params: PyTree, axis_name: Hashable
) -> tuple[Array, dict[str, Array]]:
    """Return the penalty and its gradient of each real float leaf of ``params``, by path."""
    subset = Subset.of(params, is_float)
    trained = subset.leaves
    if axis_name is not None:
        # Each device differentiates its own copy of the parameters, and the parts are summed below. With replicated
        # parameters, check_vma would determine whether shard_map sums them.
        trained = lax.pcast(trained, axis_name, to="varying")
    value, gradient = jax.value_and_grad(lambda trained: penalty(subset.whole(trained)))(trained)
    if axis_name is not None:
        gradient = lax.psum(gradient, axis_name)  # type: ignore[no-untyped-call]
    return value, dict(zip(subset.paths, gradient, strict=True))


def _add(updates: PyTree, params: PyTree, gradient: dict[str, Array], coefficient: Array) -> PyTree:
    """Add to the updates leaf by leaf, matched by path, each in its own dtype."""
    match(params, updates, reference_name="params", name="updates")
    paths, leaves, treedef = flatten(updates)

    def added(update: PyTree, gradient: Array | None) -> PyTree:
        if update is None or gradient is None:
            return update
        dtype = jnp.dtype(jnp.float64) if update.dtype == jnp.float64 else jnp.dtype(jnp.float32)
        return (update.astype(dtype) + coefficient.astype(dtype) * gradient.astype(dtype)).astype(update.dtype)

    return jax.tree.unflatten(treedef, [added(u, gradient.get(path)) for path, u in zip(paths, leaves, strict=True)])
