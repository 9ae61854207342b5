"""Read jaxprs equation by equation, with any supported version of jax.

Versions of jax differ in the names of the parts of a scan, in whether a program is closed over its constants, and in
how an equation is bound again. All code that depends on the version is in this module.
"""

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

from jax.extend import core

Program: TypeAlias = core.Jaxpr | core.ClosedJaxpr
Value: TypeAlias = Any  # the value of a variable of a program: an array, a tracer, a key or a number


def opened(program: Program) -> core.Jaxpr:
    """Return the jaxpr of a program that may be closed over its constants."""
    return program.jaxpr if isinstance(program, core.ClosedJaxpr) else program


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
    found = equation.primitive.get_bind_params({**equation.params, **changed})  # type: ignore[no-untyped-call]
    functions, params = found if isinstance(found, tuple) else ((), found)  # older versions of jax give a pair
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *inputs, **params)  # type: ignore[no-untyped-call]
    return list(results) if equation.primitive.multiple_results else [results]


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


def _handed_whole(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outer, inner, strict=True))
