"""Reading a jax program equation by equation, whatever version of jax wrote it.

The form of a program is jax's own affair: it changes what it calls the parts of a scan, whether a program
comes closed over its constants, and how an equation is bound again. What depends on that is here.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from jax.extend import core


def opened(program: Any) -> core.Jaxpr:
    """The equations of a program, closed over its constants or not."""
    inner: core.Jaxpr = getattr(program, "jaxpr", program)
    return inner


def held(equation: Any) -> list[Any]:
    """The programs that a call holds, closed or not."""
    return [x for x in equation.params.values() if isinstance(x, core.Jaxpr | core.ClosedJaxpr)]


def known(program: Any, inputs: Iterable[Any]) -> dict[Any, Any]:
    """The values of a program's variables before its first equation: its constants and its inputs."""
    jaxpr = opened(program)
    values = [*getattr(program, "consts", ()), *inputs]
    return dict(zip([*jaxpr.constvars, *jaxpr.invars], values, strict=True))


def bound(equation: Any, inputs: Sequence[Any], **changed: Any) -> list[Any]:
    """Carry out an equation on other inputs, in its context, with some of its parameters changed; a list of outputs."""
    found = equation.primitive.get_bind_params({**equation.params, **changed})
    functions, params = found if isinstance(found, tuple) else ((), found)  # older versions of jax give a pair
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *inputs, **params)
    return list(results) if equation.primitive.multiple_results else [results]


def scan_parts(equation: Any) -> tuple[int, int]:
    """How many of a scan's inputs come first and stay the same, and how many behind them are carried.

    Read off the ranks: what a scan takes or gives step by step has an axis more outside than inside.

    >>> import jax, jax.numpy as jnp
    >>> step = lambda carry, x: (carry + x * jnp.arange(2.0), carry)
    >>> scan = jax.make_jaxpr(lambda x: jax.lax.scan(step, x[:2], x))(jnp.ones(4)).eqns[-1]
    >>> scan_parts(scan)[1]
    1
    """
    body = opened(equation.params["jaxpr"])
    carried = _handed_whole(equation.outvars, body.outvars)
    return _handed_whole(equation.invars, body.invars) - carried, carried


def _handed_whole(outer: list[Any], inner: list[Any]) -> int:
    return sum(len(a.aval.shape) == len(b.aval.shape) for a, b in zip(outer, inner, strict=True))
