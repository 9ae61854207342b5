"""Check whether a model's own code at the smaller shapes is equivalent to the traced program without the channels.

Code may contain sizes that do not follow the parameters: a number of heads, declared features, the n of a mean. Nothing
is computed: the code is traced at the smaller shapes and its equations are compared with those expected.
"""

import linecache
import math
import os
import sysconfig
import traceback
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jprune import jaxprs
from jprune.graph.values import Program, Step
from jprune.pruning.structured.program import Kept, resized, sizes_of, sliced
from jprune.trees import is_inexact

_JAX = os.path.dirname(os.path.abspath(jax.__file__))
_PACKAGES = os.path.abspath(sysconfig.get_paths()["purelib"])
_SIMPLE = (int, float, str, bool, np.integer, type(None))
_UNKNOWN = "an unknown line"
_EVALUATED: dict[str, Callable[..., jaxprs.Value]] = {
    "lt": lambda left, right: left < right,
    "add": lambda left, right: left + right,
    "select_n": lambda which, *cases: cases[int(which)],
}


def code_differences(trace: Callable[[], core.ClosedJaxpr], program: Program, kept: Kept) -> tuple[str, ...]:
    """Compare a model's code at the smaller shapes with its traced program.

    Args:
      trace: returns the jaxpr of the code at the smaller shapes.
      program: the program, traced at the full shapes.
      kept: for every channel id whether its indices are kept.

    Returns:
      The differences, with the line of code; empty if the code and the program are equivalent.
    """
    try:
        traced = trace()
    except Exception as error:  # a model's code may raise anything at other shapes
        message = (str(error).strip().splitlines() or [""])[0]
        return (f"{_line_of_error(error)}: {type(error).__name__}: {message}",)
    return tuple(dict.fromkeys(_differences(program, traced, kept)))


def _differences(
    program: Program, traced: core.Jaxpr | core.ClosedJaxpr, kept: Kept, caller: str = _UNKNOWN
) -> Iterator[str]:
    """Compare equation by equation; ``caller`` is the line that calls the program, for equations without a line."""
    equations, numbers = jaxprs.opened(traced).eqns, _Numbers(program.jaxpr, jaxprs.opened(traced))
    read = _read(program.jaxpr) | _read(jaxprs.opened(traced))
    for constant, other in zip(program.consts, getattr(traced, "consts", ()), strict=False):
        if not _are_same_arrays(constant, other):
            yield f"an array in the program, of shape {np.shape(constant)}, is different at the smaller shapes"
    for step, equation in zip(program.steps, equations, strict=False):
        line = _line(equation)
        line = caller if line == _UNKNOWN else line
        if step.equation.primitive is not equation.primitive:
            yield f"{line}: expected '{step.equation.primitive}', the code gives '{equation.primitive}'"
            return
        for what in ("invars", "outvars"):
            counts = [len(getattr(one, what)) for one in (step.equation, equation)]
            if counts[0] != counts[1]:
                arrays = {"invars": "inputs", "outvars": "outputs"}[what]
                yield f"{line}: {equation.primitive}: expected {counts[0]} {arrays}, the code gives {counts[1]}"
                return
        is_read = not read.isdisjoint([*step.equation.outvars, *equation.outvars])  # else nothing determines its sizes
        if is_read and not numbers.evaluate(step.equation, equation):
            for what in _in_equation(step, equation, kept):
                yield f"{line}: {what}"
            if not numbers.same(step.equation.invars, equation.invars):
                yield f"{line}: {equation.primitive} reads other arrays than at the full shapes"
        numbers.add(step.equation.outvars, equation.outvars)
        for inside, inner in zip(step.inside, _called(equation), strict=False):
            yield from _differences(inside, inner, kept, line)
    if len(program.steps) != len(equations):
        yield f"the code has {len(equations)} operations at the smaller shapes, {len(program.steps)} at the full ones"
    elif not numbers.same(program.jaxpr.outvars, jaxprs.opened(traced).outvars):
        yield f"{caller}: the code returns other arrays than at the full shapes"


def _read(jaxpr: core.Jaxpr) -> set[core.Var]:
    """Return the variables that equations of a program read, or that it returns."""
    atoms = [*(atom for equation in jaxpr.eqns for atom in equation.invars), *jaxpr.outvars]
    return {atom for atom in atoms if not isinstance(atom, core.Literal)}


class _Numbers:
    """Numbers the arrays of two programs in the order in which they are computed, to compare what reads what."""

    def __init__(self, before: core.Jaxpr, now: core.Jaxpr):
        self._numbers: tuple[dict[core.Var, int], dict[core.Var, int]] = ({}, {})
        # Scalars computed from literals.
        self._values: tuple[dict[core.Var, jaxprs.Value], dict[core.Var, jaxprs.Value]] = ({}, {})
        for part in ("constvars", "invars"):
            self.add(getattr(before, part), getattr(now, part))

    def add(self, before: Sequence[core.Var], now: Sequence[core.Var]) -> None:
        """Number the arrays that two equations compute."""
        for numbers, variables in zip(self._numbers, (before, now), strict=True):
            numbers.update({var: len(numbers) + place for place, var in enumerate(variables)})

    def evaluate(self, before: core.JaxprEqn, now: core.JaxprEqn) -> bool:
        """Evaluate two equations of scalar literals; False if they are not, so that they must be compared.

        An example is indexing with a traced number: jax adds the size of every other axis to the index 0 if that is
        negative, which it is not.
        """
        evaluated = []
        for equation, known in zip((before, now), self._values, strict=True):
            read = [atom.val if isinstance(atom, core.Literal) else known.get(atom) for atom in equation.invars]
            if equation.primitive.name not in _EVALUATED or any(value is None or np.ndim(value) for value in read):
                return False
            evaluated.append(_EVALUATED[equation.primitive.name](*read))
        for equation, known, value in zip((before, now), self._values, evaluated, strict=True):
            known[equation.outvars[0]] = value
        return True

    def same(self, before: Sequence[jaxprs.Atom], now: Sequence[jaxprs.Atom]) -> bool:
        """Whether two equations read the same arrays; literals are compared by value elsewhere."""
        read = [
            [None if isinstance(atom, core.Literal) else known.get(atom, f"array {numbers[atom]}") for atom in atoms]
            for known, numbers, atoms in zip(self._values, self._numbers, (before, now), strict=True)
        ]
        return read[0] == read[1]


def _in_equation(step: Step, equation: core.JaxprEqn, kept: Kept) -> Iterator[str]:
    name = equation.primitive.name
    for value, full, var in zip(step.outputs, step.equation.outvars, equation.outvars, strict=True):
        expected, given = sizes_of(value, kept), tuple(getattr(var.aval, "shape", ()))
        if expected != given:
            yield f"{name}: expected shape {expected}, the code gives {given}"
        types = [getattr(one.aval, "dtype", None) for one in (full, var)]
        if types[0] != types[1]:
            yield f"{name}: expected dtype {types[0]}, the code gives {types[1]}"
    for before, now in zip(step.equation.invars, equation.invars, strict=True):
        scalars = [atom.val for atom in (before, now) if isinstance(atom, core.Literal) and np.ndim(atom.val) == 0]
        if len(scalars) == 2 and not np.array_equal(scalars[0], scalars[1], equal_nan=True):
            yield f"{name}: the number {scalars[0]} becomes {scalars[1]}"
    expected_params = resized(step, kept)
    for key, before in step.equation.params.items():
        if key in ("start_indices", "limit_indices", "strides") and name == "slice":
            continue
        wanted, found = expected_params.get(key, before), equation.params.get(key)
        if _is_simple(wanted) and _is_simple(found) and not _equal(wanted, found) and key != "name":
            yield f"{name}: expected {key}={_plain(wanted)}, the code gives {key}={_plain(found)}"
    if name == "sharding_constraint" and expected_params["sharding"] is not step.equation.params["sharding"]:
        yield f"{name}: the mesh does not divide the shape {sizes_of(step.outputs[0], kept)}"
    if name == "slice":
        params = equation.params
        strides = params["strides"] or (1,) * len(params["start_indices"])
        bounds = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
        for axis, (wanted_indices, bound) in enumerate(zip(sliced(step, kept), bounds, strict=False)):
            if not np.array_equal(wanted_indices, np.arange(*bound)):
                part = ":".join(map(str, bound))
                yield f"slice: along axis {axis} the code takes [{part}], which are not the expected channels"


def _are_same_arrays(one: jaxprs.Value, other: jaxprs.Value) -> bool:
    """Whether two constants have the same shape, dtype and entries; NaN equals itself."""
    if jnp.result_type(one) != jnp.result_type(other):
        return False
    if jnp.issubdtype(jnp.result_type(one), jax.dtypes.prng_key):
        one, other = jax.random.key_data(one), jax.random.key_data(other)
    return np.array_equal(one, other, equal_nan=is_inexact(one))


def _is_simple(value: object) -> bool:
    """Whether a parameter is a number, a text or a tuple of these; programs are compared by their equations."""
    return all(map(_is_simple, value)) if isinstance(value, tuple) else isinstance(value, _SIMPLE)


def _equal(one: object, other: object) -> bool:
    """Whether two parameters are the same; NaN, with which a gather fills what is out of bounds, equals itself."""
    return one == other or all(isinstance(value, float) and math.isnan(value) for value in (one, other))


def _plain(value: object) -> object:
    """Convert numpy integers to Python integers, which print as digits."""
    if isinstance(value, tuple):
        return tuple(map(_plain, value))
    return int(value) if isinstance(value, np.integer) else value


def _called(equation: core.JaxprEqn) -> Sequence[jaxprs.Program]:
    """Return the programs that an equation calls, in the order of ``Step.inside``."""
    params = equation.params
    if equation.primitive.name == "while":
        return [params["cond_jaxpr"], params["body_jaxpr"]]
    if equation.primitive.name == "cond":
        return list(params["branches"])
    return jaxprs.subjaxprs(equation)[:1]


def _line(equation: core.JaxprEqn) -> str:
    """Return the line of code of an equation: in a library's layer, and in the code that calls it."""
    found = getattr(equation.source_info, "traceback", None)
    frames = [(frame.file_name, frame.line_num) for frame in getattr(found, "frames", ())]
    return _named(frames)


def _line_of_error(error: BaseException) -> str:
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    return _named(frames[::-1])


def _named(frames: Sequence[tuple[str, int]]) -> str:
    """Name the innermost frame outside of jax and of this package, and the innermost outside of any library."""
    outside = [frame for frame in frames if not frame[0].startswith((_JAX, os.path.dirname(__file__), "<"))]
    if not outside:
        return _UNKNOWN
    own = next((frame for frame in outside if not frame[0].startswith(_PACKAGES)), outside[0])
    lines = dict.fromkeys((outside[0], own))
    return ", called by ".join(_shown(file, line) for file, line in lines)


def _shown(file: str, line: int) -> str:
    text = linecache.getline(file, line).strip()
    return f"{os.path.basename(file)}:{line}" + (f" `{text}`" if text else "")
