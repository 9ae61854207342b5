"""Read jaxprs equation by equation, with any supported version of jax.

Versions of jax differ in the names of the parts of a scan and of the axes of a shard_map, and in whether a program is
closed over its constants. All code that depends on the version is in this module.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
from jax.extend import core

Atom: TypeAlias = core.Var | core.Literal
Program: TypeAlias = core.Jaxpr | core.ClosedJaxpr
Parameters: TypeAlias = Mapping[str, Any]  # of an equation, by name: numbers, tuples, dtypes, programs
Value: TypeAlias = Any  # the value of a variable of a program: an array, a tracer, a key or a number


def opened(program: Program) -> core.Jaxpr:
    """Return the jaxpr of a program that may be closed over its constants."""
    return program.jaxpr if isinstance(program, core.ClosedJaxpr) else program


def shape_of(var: Atom) -> tuple[int, ...]:
    """Return the shape of a variable or literal of a program."""
    shape: tuple[int, ...] = var.aval.shape  # type: ignore[attr-defined]
    return shape


def subjaxprs(equation: core.JaxprEqn) -> list[Program]:
    """Return the programs among the parameters of an equation, closed over their constants or not."""
    return [x for x in equation.params.values() if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]


def known(program: Program, inputs: Iterable[Value]) -> dict[core.Var, Value]:
    """Return the values of a program's constants and inputs, by variable."""
    jaxpr = opened(program)
    values = [*getattr(program, "consts", ()), *inputs]
    return dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))


def bound(equation: core.JaxprEqn, inputs: Sequence[Value], **changed: object) -> list[Value]:
    """Evaluate an equation on other inputs, with some parameters changed; return the list of its outputs."""
    params = equation.primitive.get_bind_params({**equation.params, **changed})  # type: ignore[no-untyped-call]
    with equation.ctx.manager:
        results = equation.primitive.bind(*inputs, **params)  # type: ignore[no-untyped-call]
    return list(results) if equation.primitive.multiple_results else [results]


def described(array: Value, shape: Sequence[int] | None = None) -> jax.ShapeDtypeStruct:
    """Return the shape, dtype and weak type of an array, and its sharding if its mesh has explicit axes.

    Args:
      array: an array, a tracer or a ``jax.ShapeDtypeStruct``.
      shape: a shape to describe in place of the array's own.
    """
    typed = array if isinstance(array, jax.ShapeDtypeStruct) else jax.typeof(array)
    mesh = getattr(typed.sharding, "mesh", None)
    explicit = mesh is not None and jax.sharding.AxisType.Explicit in mesh.axis_types
    struct: Callable[..., jax.ShapeDtypeStruct] = jax.ShapeDtypeStruct
    shape = typed.shape if shape is None else tuple(shape)
    return struct(shape, typed.dtype, sharding=typed.sharding if explicit else None, weak_type=typed.weak_type)


def over_devices(equation: core.JaxprEqn, body: Callable[..., list[Value]], inputs: Sequence[Value]) -> list[Value]:
    """Run a function on each device, as the ``shard_map`` of an equation does with its program."""
    params = equation.params
    with equation.ctx.manager:
        mapped: Callable[..., tuple[Value, ...]] = jax.shard_map(
            lambda *arrays: tuple(body(*arrays)),
            mesh=params["mesh"],
            in_specs=tuple(params["in_specs"]),
            out_specs=tuple(params["out_specs"]),
            axis_names=set(_manual_axes(equation)),
            check_vma=params["check_vma"],
        )
        return list(mapped(*inputs))


def ragged_axes(equation: core.JaxprEqn) -> tuple[Sequence[int], Sequence[int]]:
    """Return the axes of the output and of the left operand of a ragged product whose sizes give its multiply-adds.

    Every row is multiplied by the matrix of one expert. A sum over ragged rows has an output for each expert, its first
    axis, but reads each row for one of them.
    """
    numbers = equation.params.get("ragged_dot_dimension_numbers")
    outputs = range(len(shape_of(equation.outvars[0])))
    if numbers is None:
        return outputs, (1,)
    contracted: Sequence[int] = tuple(numbers.dot_dimension_numbers[0][0])
    by_expert = set(numbers.lhs_ragged_dimensions) <= set(contracted)
    return outputs[int(by_expert) :], contracted


def devices_of(equation: core.JaxprEqn) -> int:
    """Return into how many parts a ``shard_map`` splits its program."""
    sizes = dict(equation.params["mesh"].shape)
    return math.prod(sizes[axis] for axis in _manual_axes(equation))


def _manual_axes(equation: core.JaxprEqn) -> Iterable[str]:
    params = equation.params
    names: Iterable[str] = params["newly_manual_axes" if "newly_manual_axes" in params else "manual_axes"]
    return names


def scan_parts(equation: core.JaxprEqn) -> tuple[int, int]:
    """Return the numbers of constants and of carried values of a scan.

    They follow from the ranks: an array that a scan reads or returns step by step has one more axis outside the body.

    >>> import jax, jax.numpy as jnp
    >>> step = lambda carry, x: (carry + x * jnp.arange(2.0), carry)
    >>> scan = jax.make_jaxpr(lambda x: jax.lax.scan(step, x[:2], x))(jnp.ones(4)).eqns[-1]
    >>> scan_parts(scan)[1]
    1
    """
    body = opened(equation.params["jaxpr"])
    carried = _handed_whole(equation.outvars, body.outvars)
    return _handed_whole(equation.invars, body.invars) - carried, carried


def _handed_whole(outer: Sequence[Atom], inner: Sequence[Atom]) -> int:
    return sum(len(shape_of(a)) == len(shape_of(b)) for a, b in zip(outer, inner, strict=True))
