"""Reading and writing by index."""

import dataclasses

from jax.extend import core

from jprune.graph.rules.registry import combined_kind, pick, rule, union
from jprune.graph.values import Axis, Kind, Record, Value
from jprune.jaxprs import shape_of

_COORDINATES = "its entries are the coordinates of an index"


@rule("gather")
def _gather(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, indices = inputs[:2]
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape = shape_of(equation.outvars[0])
    keeps_zero = not equation.params.get("fill_value")  # else indices that are out of bounds give another number
    axes = [Axis(record.channels.frozen(size, "it is indexed")) for size in shape]
    batch = [place for place in range(len(shape)) if place not in numbers.offset_dims]
    for k, place in enumerate(batch):
        axes[place] = Axis(indices.axes[k].ids)
    for operand, index in zip(numbers.operand_batching_dims, numbers.start_indices_batching_dims, strict=True):
        own = value.axes[operand]
        record.channels.tie(own.ids, indices.axes[index].ids)
        if value.kind.of_parameters and indices.kind > Kind.CONSTANT:  # each row indexes a table of its own
            record.role(own.sources, "stacked")
            own = Axis(own.ids, zero=own.zero)
        axes[batch[index]] = dataclasses.replace(own, zero=own.zero and keeps_zero)
    inside = [
        p
        for p in range(len(value.axes))
        if p not in numbers.collapsed_slice_dims and p not in numbers.operand_batching_dims
    ]
    for place, operand in zip(numbers.offset_dims, inside, strict=True):
        if sizes[operand] == value.axes[operand].size:
            axes[place] = dataclasses.replace(value.axes[operand], zero=value.axes[operand].zero and keeps_zero)
        else:
            axes[place] = Axis(axes[place].ids, value.axes[operand].sources)
    indexed = [p for p, axis in enumerate(value.axes) if p in numbers.collapsed_slice_dims or sizes[p] != axis.size]
    indexed = [p for p in indexed if p not in numbers.operand_batching_dims]
    for operand in indexed:
        record.channels.freeze(value.axes[operand].ids, "it is indexed")
    record.channels.freeze(indices.axes[-1].ids, _COORDINATES)
    return [_looked_up(record, value, indices, axes, indexed=indexed, batch=batch)]


def _looked_up(
    record: Record, value: Value, indices: Value, axes: list[Axis], *, indexed: list[int], batch: list[int]
) -> Value:
    """Return the result of indexing: parameters indexed by activations are looked up, by constants stay parameters."""
    if not value.kind.of_parameters:
        return Value(tuple(axes), max(value.kind, indices.kind))
    sources = union(*(value.axes[operand].sources for operand in indexed))
    if indices.kind > Kind.CONSTANT:
        return Value(tuple(axes), Kind.LOOKED_UP, union(value.chosen, sources))
    many = [place for place in batch if axes[place].size > 1]
    if not many:  # one layer of a stack
        record.role(sources, "stacked")
        return value.with_axes(axes)
    for place in many:  # rows in a constant order, a table of positions, a kernel of few numbers
        axes[place] = dataclasses.replace(axes[place], sources=sources)
    return dataclasses.replace(value, axes=tuple(axes), chosen=union(value.chosen, sources), literal=None)


@rule("dynamic_slice")
def _dynamic_slice(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, starts, axes, cut = inputs[0], inputs[1:], list(inputs[0].axes), []
    for place, size in enumerate(equation.params["slice_sizes"]):
        if size != axes[place].size:
            record.channels.freeze(axes[place].ids, "it is indexed")
            axes[place] = axes[place].with_ids(record.channels.frozen(size, "it is indexed"))
            cut.append(place)
    kind = max((starts[place].kind for place in cut), default=Kind.CONSTANT)
    if value.kind.of_parameters and kind > Kind.CONSTANT:
        single = [place for place in cut if axes[place].size == 1]  # a window of several indices keeps its axis
        sources = union(*(value.axes[place].sources for place in single))
        axes = [dataclasses.replace(axis, sources=() if p in single else axis.sources) for p, axis in enumerate(axes)]
        return [Value(tuple(axes), Kind.LOOKED_UP, union(value.chosen, sources))]
    return [dataclasses.replace(value, axes=tuple(axes), kind=max(value.kind, kind), literal=None)]


@rule("dynamic_update_slice")
def _dynamic_update_slice(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, update = inputs[:2]
    kind = combined_kind(record, [value, update])
    axes = []
    for old, new in zip(value.axes, update.axes, strict=True):
        if old.size == new.size:
            ids, zero = pick(record, [old, new]), old.zero and new.zero
        else:
            record.channels.freeze(old.ids, "it is indexed")
            record.channels.freeze(new.ids, "it is indexed")
            ids, zero = record.channels.frozen(old.size, "it is indexed"), False
        axes.append(Axis(ids, union(old.sources, new.sources) if kind.of_parameters else (), zero))
    return [Value(tuple(axes), kind, union(value.chosen, update.chosen) if kind.of_parameters else ())]


@rule(
    "scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max", "scatter_add", "scatter_mul"
)
def _scatter(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Write slices of the updates into the operand: whole axes correspond, indexed axes are frozen."""
    value, indices, updates = inputs
    numbers = equation.params["dimension_numbers"]
    kind = combined_kind(record, [value, updates])
    update = equation.params["update_jaxpr"]
    keeps_zero = equation.primitive.name != "scatter" or not getattr(update, "eqns", ())  # else a function is applied
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    index_batching = tuple(getattr(numbers, "scatter_indices_batching_dims", ()))
    window = [p for p in range(len(value.axes)) if p not in numbers.inserted_window_dims and p not in batching]
    outside = [p for p in range(len(updates.axes)) if p not in numbers.update_window_dims]
    partner = dict(zip(window, numbers.update_window_dims, strict=True))
    partner |= {p: outside[index] for p, index in zip(batching, index_batching, strict=True)}
    scattered = [p for p in outside if p not in partner.values()]
    for k, place in enumerate(outside):
        if k < len(indices.axes):
            record.channels.tie(updates.axes[place].ids, indices.axes[k].ids)
    record.channels.freeze(indices.axes[-1].ids, _COORDINATES)
    axes = []
    for place, axis in enumerate(value.axes):
        new = updates.axes[partner[place]] if place in partner else None
        if new is not None and new.size == axis.size:
            zero = keeps_zero and axis.zero and new.zero
            axes.append(Axis(pick(record, [axis, new]), union(axis.sources, new.sources), zero))
        else:
            written = [updates.axes[p] for p in scattered] if new is None else [new]
            for one in (axis, *written):
                record.channels.freeze(one.ids, "it is indexed")
            sources = union(axis.sources, *(one.sources for one in written))
            axes.append(Axis(record.channels.frozen(axis.size, "it is indexed"), sources))
    if not kind.of_parameters:
        axes = [Axis(axis.ids, zero=axis.zero) for axis in axes]
    return [Value(tuple(axes), kind, union(value.chosen, updates.chosen) if kind.of_parameters else ())]
