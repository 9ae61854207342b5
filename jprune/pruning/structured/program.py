"""Run the traced program of a model with fewer channels.

Only equation parameters that contain sizes change: those of ``reshape``, ``broadcast_in_dim``, ``iota``, ``split`` and
``pad``, the bounds of ``slice``, ``dynamic_slice`` and ``gather``, and the groups of a convolution. Literals of the
program, such as the n of a mean, do not change.
"""

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend import core
from jaxtyping import Array, ArrayLike, Bool, PyTree

from jprune import jaxprs
from jprune.graph.loops import run as trace
from jprune.graph.values import Axis, Program, Record, Step, Value
from jprune.trees import is_inexact

Kept: TypeAlias = Bool[np.ndarray, " _"]
Arrays: TypeAlias = Sequence[ArrayLike]


def sizes_of(value: Value, kept: Kept) -> tuple[int, ...]:
    """Return the shape of an array after channels are removed.

    Args:
      value: an array of a traced program.
      kept: for every channel id whether its indices are kept.
    """
    return tuple(int(np.count_nonzero(kept[ids])) for ids in value.ids)


def run(program: Program, kept: Kept, inputs: Arrays) -> list[ArrayLike]:
    """Run a program with the kept channels.

    Args:
      program: the traced program, at its full sizes.
      kept: for every channel id whether its indices are kept.
      inputs: the program's inputs, at the smaller sizes.

    Returns:
      The program's outputs.
    """
    env: dict[core.Var, jaxprs.Value] = dict(zip(program.jaxpr.constvars, program.consts, strict=True))
    env.update(zip(program.jaxpr.invars, inputs, strict=True))

    def read(atom: core.Var | core.Literal) -> jaxprs.Value:
        return atom.val if isinstance(atom, core.Literal) else env[atom]

    for step in program.steps:
        results = _carry_out(step, kept, [read(atom) for atom in step.equation.invars])
        env.update(zip(step.equation.outvars, results, strict=True))
    return [read(atom) for atom in program.jaxpr.outvars]


def _carry_out(step: Step, kept: Kept, inputs: list[jaxprs.Value]) -> Arrays:
    name = step.equation.primitive.name
    if name in _CONTROL_FLOW:
        return _CONTROL_FLOW[name](step, kept, inputs)
    if step.inside:
        return _call(step, kept, inputs)
    if name == "slice":
        return [_slice(step, kept, inputs[0])]
    if name == "conv_general_dilated" and not all(size for array in inputs for size in np.shape(array)):
        # Convolutions with groups take no arrays without channels.
        return [jnp.zeros(sizes_of(step.outputs[0], kept), getattr(step.equation.outvars[0].aval, "dtype", None))]
    return jaxprs.bound(step.equation, inputs, **resized(step, kept))


def resized(step: Step, kept: Kept) -> dict[str, object]:
    """Return the parameters of an equation that contain sizes, at the smaller sizes."""
    name, params = step.equation.primitive.name, step.equation.params
    sizes = [sizes_of(output, kept) for output in step.outputs]
    changed: dict[str, object] = {}
    match name:
        case "reshape":
            changed = {"new_sizes": sizes[0]}
        case "broadcast_in_dim" | "iota" | "empty":
            changed = {"shape": sizes[0]}
        case "tile":
            before = sizes_of(step.inputs[0], kept)
            changed = {"reps": tuple(after // max(1, size) for after, size in zip(sizes[0], before, strict=True))}
        case "dynamic_slice":
            changed = {"slice_sizes": sizes[0]}
        case "pad":
            added = zip(params["padding_config"], step.outputs[0].ids, strict=True)
            changed = {"padding_config": tuple(_padding(tuple(map(int, config)), kept[ids]) for config, ids in added)}
        case "sharding_constraint":
            changed = {"sharding": _divisible(params["sharding"], sizes[0])}
        case "split":
            changed = {"sizes": tuple(size[params["axis"]] for size in sizes)}
        case "gather":
            before, after = step.inputs[0].shape, sizes_of(step.inputs[0], kept)
            taken = zip(params["slice_sizes"], before, after, strict=True)
            changed = {"slice_sizes": tuple(now if size == full else size for size, full, now in taken)}
        case "conv_general_dilated" if params["feature_group_count"] > 1:
            numbers = params["dimension_numbers"]
            image, kernel = (sizes_of(value, kept) for value in step.inputs)
            changed = {"feature_group_count": image[numbers.lhs_spec[1]] // max(1, kernel[numbers.rhs_spec[1]])}
    return changed


def _padding(config: tuple[int, ...], stays: Kept) -> tuple[int, int, int]:
    """Return the padding at the ends of an axis after indices are removed; there is none between indices."""
    low, high, inside = config
    if stays.all():
        return low, high, inside
    return int(np.count_nonzero(stays[:low])), int(np.count_nonzero(stays[len(stays) - high :])), inside


def _divisible(sharding: object, shape: Sequence[int]) -> object:
    """Return a sharding without the axes that its mesh can no longer divide; a constraint does not change results."""
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return sharding
    sizes, names = dict(sharding.mesh.shape), []
    for place, size in enumerate(shape):
        name = sharding.spec[place] if place < len(sharding.spec) else None
        over = name if isinstance(name, tuple) else (name,)
        parts = math.prod(sizes.get(one, 1) for one in over)
        names.append(name if size % parts == 0 else None)
    spec: Callable[..., jax.sharding.PartitionSpec] = jax.sharding.PartitionSpec
    return sharding.update(spec=spec(*names)) if tuple(names) != tuple(sharding.spec) else sharding


def sliced(step: Step, kept: Kept) -> list[np.ndarray]:
    """Return the indices of each operand axis that a slice takes after channels are removed."""
    params = step.equation.params
    strides = params["strides"] or (1,) * len(params["start_indices"])
    taken = []
    for ids, *bounds in zip(step.inputs[0].ids, params["start_indices"], params["limit_indices"], strides, strict=True):
        stays = kept[ids]
        wanted = np.arange(*bounds)
        taken.append((np.cumsum(stays) - 1)[wanted[stays[wanted]]])
    return taken


def _slice(step: Step, kept: Kept, x: Array) -> Array:
    """Take the remaining indices of a slice: by a slice if they are evenly spaced, otherwise one by one."""
    for axis, wanted in enumerate(sliced(step, kept)):
        if len(wanted) == x.shape[axis]:
            continue
        between = np.unique(np.diff(wanted))
        if len(between) <= 1:
            stride = int(between[0]) if len(between) else 1
            first, last = (int(wanted[0]), int(wanted[-1])) if len(wanted) else (0, -1)
            x = lax.slice_in_dim(x, first, last + 1, stride, axis)
        else:
            x = jnp.take(x, jnp.asarray(wanted), axis=axis)
    return x


def _call(step: Step, kept: Kept, inputs: list[jaxprs.Value]) -> Arrays:
    """Run the program that an equation calls, with its derivative rule."""
    name, params, inside = step.equation.primitive.name, step.equation.params, step.inside[0]

    def body(*args: ArrayLike) -> list[ArrayLike]:
        return run(inside, kept, args)

    if name in ("remat", "remat2", "checkpoint"):
        options = {option: params[option] for option in ("policy", "prevent_cse") if option in params}
        results: Arrays = jax.checkpoint(body, **options)(*inputs)
        return results
    if name.startswith("custom_jvp"):
        return _with_jvp(step, kept, body)(*inputs)
    if name.startswith("custom_vjp"):
        return _with_vjp(step, kept, body)(*inputs)
    return body(*inputs)


def _with_jvp(step: Step, kept: Kept, body: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """Return a function with the derivative rule of a custom_jvp call, traced at the full sizes."""
    function = jax.custom_jvp(body)
    floats = [place for place, var in enumerate(step.equation.invars) if is_inexact(var.aval)]

    @function.defjvp
    def jvp(primals: Arrays, tangents: Arrays) -> tuple[Arrays, Arrays]:
        def rule(primals: Arrays, tangents: Arrays) -> tuple[Arrays, Arrays]:
            function = _of_floats(step.equation, floats, primals)
            outputs, moved = jax.jvp(function, [primals[k] for k in floats], tangents)
            return outputs, [tangent for tangent in moved if tangent.dtype != jax.dtypes.float0]

        moved = [step.inputs[k] for k in floats]
        results = _rerun(rule, kept, (step.inputs, moved), (primals, [tangents[k] for k in floats]))
        outputs, found = results[: len(step.outputs)], iter(results[len(step.outputs) :])
        of_integers = [np.zeros(np.shape(y), jax.dtypes.float0) for y in outputs]
        pairs = zip(step.equation.outvars, of_integers, strict=True)
        return outputs, [next(found) if is_inexact(var.aval) else zero for var, zero in pairs]

    return function


def _with_vjp(step: Step, kept: Kept, body: Callable[..., Arrays]) -> Callable[..., Arrays]:
    """Return a function with the derivative rule of a custom_vjp call."""
    function = jax.custom_vjp(body)
    floats = [place for place, var in enumerate(step.equation.invars) if is_inexact(var.aval)]

    def backward(primals: Arrays, cotangents: Arrays) -> tuple[PyTree, ...]:
        def rule(primals: Arrays, cotangents: Arrays) -> Arrays:
            _, pull = jax.vjp(_of_floats(step.equation, floats, primals), *(primals[k] for k in floats))
            pulled: Arrays = pull(list(cotangents))
            return pulled

        found = iter(_rerun(rule, kept, (step.inputs, step.outputs), (primals, cotangents)))
        return tuple(next(found) if k in floats else None for k in range(len(primals)))

    function.defvjp(lambda *args: (body(*args), args), backward)
    return function


def _of_floats(equation: core.JaxprEqn, floats: Sequence[int], inputs: Arrays) -> Callable[..., list[ArrayLike]]:
    """Return an equation as a function of its float inputs."""

    def function(*given: ArrayLike) -> list[ArrayLike]:
        filled = list(inputs)
        for place, array in zip(floats, given, strict=True):
            filled[place] = array
        return jaxprs.bound(equation, filled)

    return function


def _rerun(
    function: Callable[..., PyTree], kept: Kept, values: tuple[Sequence[Value], ...], arrays: tuple[Arrays, ...]
) -> list[ArrayLike]:
    """Trace a function at the full sizes of values, and run it on arrays of the smaller sizes."""
    flat = [value for part in values for value in part]
    shapes = [
        [
            jax.typeof(array).update(
                shape=value.shape, weak_type=False
            )  # inside shard_map, with the axes it varies over
            for value, array in zip(part, given, strict=True)
        ]
        for part, given in zip(values, arrays, strict=True)
    ]
    record = Record()
    known, gone, left = [], [], []
    for value in flat:
        axes = []
        for ids in value.ids:
            stays = kept[ids]
            new = record.channels.frozen(len(ids), "kept") if stays.all() else record.channels.fresh(len(ids))
            gone.append(new[~stays])
            left.append(new[stays])
            axes.append(Axis(new))
        known.append(Value(tuple(axes)))
    program = trace(record, jax.make_jaxpr(function)(*shapes), known)
    solution = record.channels.solve()
    removed = np.zeros(len(solution.roots), bool)
    removed[solution.roots[np.concatenate([*gone, np.zeros(0, np.int32)])]] = True
    if removed[0] or removed[solution.roots[np.concatenate([*left, np.zeros(0, np.int32)])]].any():
        raise ValueError(
            "a derivative rule (custom_jvp or custom_vjp) combines channels that its function keeps apart, so "
            "it cannot be run with fewer channels; leave its channels whole"
        )
    return run(program, ~removed[solution.roots], [array for part in arrays for array in part])


def _scan(step: Step, kept: Kept, inputs: list[jaxprs.Value]) -> Arrays:
    params, (fixed, carried) = step.equation.params, jaxprs.scan_parts(step.equation)

    def body(carry: list[jaxprs.Value], now: list[jaxprs.Value]) -> tuple[list[jaxprs.Value], list[jaxprs.Value]]:
        results = run(step.inside[0], kept, [*inputs[:fixed], *carry, *now])
        return results[:carried], results[carried:]

    options = {option: params[option] for option in ("length", "reverse", "unroll")}
    carry, outputs = lax.scan(body, inputs[fixed : fixed + carried], inputs[fixed + carried :], **options)
    return [*carry, *outputs]


def _while(step: Step, kept: Kept, inputs: list[jaxprs.Value]) -> Arrays:
    params = step.equation.params
    one, two = params["cond_nconsts"], params["body_nconsts"]
    condition, body = step.inside

    def going(carry: Arrays) -> Array:
        return jnp.asarray(run(condition, kept, [*inputs[:one], *carry])[0])

    def goes_on(carry: Arrays) -> Array:  # under vmap, the condition has the axes that were mapped
        return jnp.any(going(carry))

    def once(carry: Arrays) -> Arrays:
        results = run(body, kept, [*inputs[one : one + two], *carry])
        if not condition.outputs[0].axes:
            return results
        rows = going(carry)
        return [_where_rows(rows, new, old) for new, old in zip(results, carry, strict=True)]

    results: Arrays = lax.while_loop(goes_on, once, inputs[one + two :])
    return results


def _where_rows(rows: Bool[Array, " *rows"], new: ArrayLike, old: ArrayLike) -> Array:
    """Select from two arrays by a predicate over their first axes."""
    return lax.select(lax.broadcast_in_dim(rows, np.shape(new), range(rows.ndim)), new, old)


def _cond(step: Step, kept: Kept, inputs: list[jaxprs.Value]) -> Arrays:
    def branch(program: Program) -> Callable[..., Arrays]:
        return lambda *args: run(program, kept, args)

    results: Arrays = lax.switch(inputs[0], [branch(program) for program in step.inside], *inputs[1:])
    return results


def _shard_map(step: Step, kept: Kept, inputs: list[jaxprs.Value]) -> Arrays:
    def body(*args: ArrayLike) -> list[ArrayLike]:
        return run(step.inside[0], kept, args)

    return jaxprs.over_devices(step.equation, body, inputs)


_CONTROL_FLOW: dict[str, Callable[[Step, Kept, list[jaxprs.Value]], Arrays]] = {
    "scan": _scan,
    "while": _while,
    "cond": _cond,
    "shard_map": _shard_map,
}
