"""Trace programs inside programs: calls, scans, conditionals and loops."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jax.extend import core

from jprune import jaxprs
from jprune.graph.rules import RULES, freeze, not_understood, opaque, passes_numbers, union, without_numbers
from jprune.graph.values import Axis, Kind, Program, Record, Step, Value
from jprune.jaxprs import shape_of


def run(record: Record, program: jaxprs.Program, inputs: Sequence[Value]) -> Program:
    """Apply the rules to every equation of a jaxpr, closed or not, given the values of its inputs."""
    jaxpr = jaxprs.opened(program)
    consts = tuple(getattr(program, "consts", ()))
    known = [_constant(record, value.shape) for value in consts] or [
        _constant(record, shape_of(var)) for var in jaxpr.constvars
    ]
    values: dict[core.Var, Value] = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*known, *inputs], strict=True))

    def read(atom: core.Var | core.Literal) -> Value:
        return _literal(record, atom) if isinstance(atom, core.Literal) else values[atom]

    steps = []
    for equation in jaxpr.eqns:
        step = _step(record, equation, [read(atom) for atom in equation.invars])
        values.update(zip(equation.outvars, step.outputs, strict=True))
        steps.append(step)
    return Program(jaxpr, consts, tuple(inputs), tuple(map(read, jaxpr.outvars)), tuple(steps))


def _constant(record: Record, shape: Sequence[int]) -> Value:
    why = "an array of the code; to remove its channels, pass it in params or as state="
    return opaque(record, shape, why, record.constants)


def _literal(record: Record, atom: core.Literal) -> Value:
    value = _constant(record, shape_of(atom))
    return dataclasses.replace(value, literal=atom.val) if np.ndim(atom.val) == 0 else value


def _step(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> Step:
    name = equation.primitive.name
    inside: tuple[Program, ...] = ()
    if name in _CONTROL or (name in RULES and not passes_numbers(equation, inputs)):
        inputs = [without_numbers(record, value) for value in inputs]
    if name in RULES:
        outputs = RULES[name](record, equation, inputs)
    elif name in _CONTROL:
        outputs, inside = _CONTROL[name](record, equation, inputs)
    else:
        called = _called(equation)
        if called is None:
            outputs = not_understood(record, equation, inputs)
        else:
            inside = (run(record, called, inputs),)
            outputs = list(inside[0].outputs)
    for var, value in zip(equation.outvars, outputs, strict=True):
        if value.shape != shape_of(var):
            raise AssertionError(f"the rule of '{name}' gives shape {value.shape}, the program has {shape_of(var)}")
    return Step(equation, tuple(inputs), tuple(outputs), inside)


def _called(equation: core.JaxprEqn) -> jaxprs.Program | None:
    """Return the program that an equation calls on its operands (jit, remat, custom derivatives), or None."""

    def alike(outer: Sequence[jaxprs.Atom], inner: Sequence[jaxprs.Atom]) -> bool:
        return list(map(shape_of, outer)) == list(map(shape_of, inner))

    for program in jaxprs.subjaxprs(equation):
        inner = jaxprs.opened(program)
        if alike(equation.invars, inner.invars) and alike(equation.outvars, inner.outvars):
            return program
    return None


Control = tuple[list[Value], tuple[Program, ...]]


def _run_inside(record: Record, program: jaxprs.Program, inputs: Sequence[Value]) -> Program:
    """Trace a program whose outputs become other arrays, which do not say that their indices are numbered."""
    inside = run(record, program, inputs)
    return inside._replace(outputs=tuple(without_numbers(record, value) for value in inside.outputs))


def _scan(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> Control:
    """Trace the body once: the carry keeps its channels, scanned inputs lose their first axis."""
    fixed, carried = jaxprs.scan_parts(equation)
    length, body = equation.params["length"], equation.params["jaxpr"]
    consts, carry, scanned = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
    for value in scanned:
        record.channels.freeze(value.axes[0].ids, "it is scanned over")
        record.role(value.axes[0].sources, "stacked")
    times, record.times = record.times, record.times * length
    program = _iterated(record, body, consts, carry, [value.with_axes(value.axes[1:]) for value in scanned])
    record.times = times
    steps = Axis(record.channels.frozen(length, "it is scanned over"))
    # What a scan computes may be summed over steps, as in a recurrence, so its axes are not taken for those of experts.
    results = list(program.outputs)
    if length == 0:
        results[:carried] = _zero_where_both_are(results[:carried], program.inputs[fixed : fixed + carried])
    outputs = [
        dataclasses.replace(value, axes=tuple(dataclasses.replace(axis, scored=True) for axis in value.axes))
        for value in results
    ]
    return [*outputs[:carried], *(value.with_axes([steps, *value.axes]) for value in outputs[carried:])], (program,)


def _while(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> Control:
    """Trace one iteration; its multiply-adds are counted once, since the number of iterations is unknown."""
    params = equation.params
    first, second = params["cond_nconsts"], params["cond_nconsts"] + params["body_nconsts"]
    body = _iterated(record, params["body_jaxpr"], inputs[first:second], inputs[second:], [], rounds=None)
    carry = body.inputs[second - first :]
    condition = run(record, params["cond_jaxpr"], [*inputs[:first], *carry])
    for value in carry:  # under vmap, the condition has the axes that were mapped, which come first
        for a, b in zip(condition.outputs[0].axes, value.axes, strict=False):
            record.channels.tie(a.ids, b.ids)
    return _zero_where_both_are(body.outputs, carry), (condition, body)


def _zero_where_both_are(results: Sequence[Value], carry: Sequence[Value]) -> list[Value]:
    """Return the results of a loop that may have no iteration, and so return its initial carry."""
    return [
        dataclasses.replace(
            result,
            axes=tuple(
                dataclasses.replace(a, zero=a.zero and b.zero) for a, b in zip(result.axes, start.axes, strict=True)
            ),
        )
        for result, start in zip(results, carry, strict=True)
    ]


def _iterated(
    record: Record,
    body: jaxprs.Program,
    consts: Sequence[Value],
    carry: Sequence[Value],
    scanned: Sequence[Value],
    *,
    rounds: int | None = 1,
) -> Program:
    """Trace a loop's body until the carry describes both the initial carry and the body's result."""
    # A carry that starts as an identity matrix or a product of parameters need not stay one.
    current = [dataclasses.replace(value, identity=None, factors=None) for value in carry]
    while True:
        mark = record.mark()
        program = _run_inside(record, body, [*consts, *current, *scanned])
        results = program.outputs[: len(carry)]
        joined = [_joined(start, result) for start, result in zip(current, results, strict=True)]
        if all(map(_same, current, joined)):
            break
        record.rewind(mark)
        for start, result in zip(current, joined, strict=True):
            if start.kind.of_parameters and not result.kind.of_parameters:
                record.settle(start)
        current = joined
    if rounds is None:
        record.uncounted.extend(path for path, _ in record.multiply_adds[mark[1][3] :] if path is not None)
    for start, result in zip(current, results, strict=True):
        for a, b in zip(start.axes, result.axes, strict=True):
            record.channels.tie(a.ids, b.ids)
    return program


def _joined(one: Value, other: Value) -> Value:
    """Return what is known of an array that may be either of two."""
    kind = max(one.kind, other.kind)
    if kind is Kind.LOOKED_UP and min(one.kind, other.kind) is not kind:
        kind = Kind.ACTIVATION
    axes = [
        Axis(
            a.ids,
            union(a.sources, b.sources) if kind.of_parameters else (),
            a.zero and b.zero,
            scored=a.scored or b.scored,
        )
        for a, b in zip(one.axes, other.axes, strict=True)
    ]
    literal = one.literal if one.literal is not None and one.literal is other.literal else None
    return Value(tuple(axes), kind, union(one.chosen, other.chosen) if kind.of_parameters else (), literal)


def _same(one: Value, other: Value) -> bool:
    known = [(v.kind, v.literal is None, v.chosen, [(a.zero, a.sources) for a in v.axes]) for v in (one, other)]
    return known[0] == known[1]


def _cond(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> Control:
    """Trace all branches on the same operands; count the multiply-adds of the costliest branch."""
    programs, costs = [], []
    for branch in equation.params["branches"]:
        start = len(record.multiply_adds)
        programs.append(_run_inside(record, branch, inputs[1:]))
        costs.append(record.multiply_adds[start:])
        del record.multiply_adds[start:]
    record.multiply_adds.extend(max(costs, key=lambda cost: sum(count for _, count in cost)))
    outputs = list(programs[0].outputs)
    for program in programs[1:]:
        for place, value in enumerate(program.outputs):
            for a, b in zip(outputs[place].axes, value.axes, strict=True):
                record.channels.tie(a.ids, b.ids)
            joined = _joined(outputs[place], value)
            for one in (outputs[place], value):
                if one.kind.of_parameters and not joined.kind.of_parameters:
                    record.settle(one)
            outputs[place] = joined
    return [dataclasses.replace(value, literal=None) for value in outputs], tuple(programs)


def _shard_map(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> Control:
    """Trace the program of one device; axes that are split over devices lose no channels."""
    program = equation.params["jaxpr"]
    jaxpr = jaxprs.opened(program)
    why = "it is split over devices inside shard_map"
    local = [_part(record, value, shape_of(var), why) for value, var in zip(inputs, jaxpr.invars, strict=True)]
    devices = jaxprs.devices_of(equation)
    record.times *= devices
    inside = _run_inside(record, program, local)
    record.times //= devices
    outputs = []
    for value, var in zip(inside.outputs, equation.outvars, strict=True):
        axes = [
            axis if axis.size == size else dataclasses.replace(axis, ids=record.channels.frozen(size, why))
            for axis, size in zip(value.axes, shape_of(var), strict=True)
        ]
        freeze(record, value.with_axes([a for a, b in zip(value.axes, axes, strict=True) if a is not b]), why)
        outputs.append(value.with_axes(axes))
    return outputs, (inside,)


def _part(record: Record, value: Value, shape: Sequence[int], why: str) -> Value:
    axes = []
    for axis, size in zip(value.axes, shape, strict=True):
        if axis.size != size:
            record.channels.freeze(axis.ids, why)
        axes.append(axis if axis.size == size else dataclasses.replace(axis, ids=record.channels.frozen(size, why)))
    return value.with_axes(axes)


_CONTROL = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}
