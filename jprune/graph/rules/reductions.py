"""Reductions, and other operations along an axis."""

import dataclasses

from jax.extend import core

from jprune.graph.channels import is_frozen
from jprune.graph.rules.registry import combined_kind, pick, rule, union
from jprune.graph.values import Axis, Kind, Record, Value
from jprune.jaxprs import shape_of


def _of_masked(name: str) -> str:
    return f"'{name}' over these channels (a normalization or a mean) counts masked ones, not zero there"


@rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor")
def _reduce(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    name, value, dropped = equation.primitive.name, inputs[0], {int(axis) for axis in equation.params["axes"]}
    for place in dropped:
        record.channels.consume(value.axes[place].ids)
        if not (name in ("reduce_sum", "reduce_or", "reduce_xor") and value.axes[place].zero):
            record.channels.note(value.axes[place].ids, _of_masked(name))
    keeps_zero = name != "reduce_and"
    scored = value.kind is Kind.ACTIVATION and not all(is_frozen(value.axes[place].ids) for place in dropped)
    axes = [
        dataclasses.replace(axis, zero=axis.zero and keeps_zero, scored=axis.scored or scored)
        for place, axis in enumerate(value.axes)
        if place not in dropped
    ]
    return [value.with_axes(axes)]


@rule("argmax", "argmin")
def _argument(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, dropped = inputs[0], {int(axis) for axis in equation.params["axes"]}
    for place in dropped:
        record.channels.freeze(value.axes[place].ids, f"'{equation.primitive.name}' numbers its indices")
    return [Value(tuple(Axis(axis.ids) for place, axis in enumerate(value.axes) if place not in dropped))]


@rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, along = inputs[0], equation.params["axis"]
    record.channels.freeze(value.axes[along].ids, f"'{equation.primitive.name}' runs along it")
    keeps_zero = equation.primitive.name != "cumlogsumexp"
    return [
        value.with_axes(
            [Axis(a.ids, a.sources, a.zero and place != along and keeps_zero) for place, a in enumerate(value.axes)]
        )
    ]


@rule("sort", "top_k", "approx_top_k", "fft")
def _along_axis(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Apply an operation that mixes indices along some axes; the other axes of operands and results correspond.

    A result computed from parameters still counts as parameters, but its mixed axes are no longer theirs: a threshold
    found by ``sort`` does not determine a kernel's axes, and after a transform the role of the mixed axes is unknown.
    """
    name, params, shape = equation.primitive.name, equation.params, inputs[0].shape
    first = len(shape) - len(params.get("fft_lengths", (0,)))
    axis = params.get("dimension", params.get("axis", params.get("reduction_dimension", len(shape) - 1))) % len(shape)
    mixed = set(range(first, len(shape))) if name == "fft" else {axis}
    kind = combined_kind(record, inputs)
    for value in inputs:
        for place in mixed:
            record.channels.freeze(value.axes[place].ids, f"'{name}' runs along it")
            record.mixed.extend((source, name) for source in value.axes[place].sources)
    picked = [pick(record, [value.axes[place] for value in inputs]) for place in range(len(shape))]
    # Zeros stay zeros, but the second result of top_k has the indices of the largest.
    zeros = [[axis.zero for axis in value.axes] for value in inputs] if name != "approx_top_k" else []
    sources = [
        union(*(value.axes[place].sources for value in inputs)) if kind.of_parameters and place not in mixed else ()
        for place in range(len(shape))
    ]
    chosen = union(*(value.chosen for value in inputs)) if kind.of_parameters else ()
    return [
        Value(
            tuple(
                Axis(
                    record.channels.frozen(size, f"'{name}' runs along it") if place in mixed else picked[place],
                    sources[place],
                    zero=place not in mixed and result < len(zeros) and zeros[result][place],
                )
                for place, size in enumerate(shape_of(var))
            ),
            kind,
            chosen,
        )
        for result, var in enumerate(equation.outvars)
    ]


@rule("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _reduce_window(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    operands = inputs[: len(equation.outvars)]  # the others are initial values
    kind, keeps_zero = combined_kind(record, inputs), _windows_keep_zero(equation)
    axes = []
    for place, size in enumerate(shape_of(equation.outvars[0])):
        own = [value.axes[place] for value in operands]
        if equation.params["window_dimensions"][place] == 1 and own[0].size == size:
            sources = union(*(axis.sources for axis in own)) if kind.of_parameters else ()
            axes.append(Axis(pick(record, own), sources, keeps_zero and all(axis.zero for axis in own)))
        else:
            for axis in own:
                record.channels.freeze(axis.ids, "a window moves over it")
            axes.append(Axis(record.channels.frozen(size, "a window moves over it")))
    chosen = union(*(value.chosen for value in operands)) if kind.of_parameters else ()
    return [Value(tuple(axes), kind, chosen) for _ in equation.outvars]


def _windows_keep_zero(equation: core.JaxprEqn) -> bool:
    """Whether a window over zeros gives zero.

    It does not if it has its own function, and a maximum is -inf where the window has only padding.
    """
    if equation.primitive.name == "reduce_window":
        return False
    params = equation.params
    sizes, padding = params["window_dimensions"], params["padding"]
    dense = all(n == 1 for n in (*(params.get("base_dilation") or ()), *(params.get("window_dilation") or ())))
    padded = any(max(ends) > 0 for ends in padding)
    covered = all(max(ends) < max(size, 1) for size, ends in zip(sizes, padding, strict=True))
    return equation.primitive.name == "reduce_window_sum" or (covered and dense) or (dense and not padded)
