"""Operations that move data: transposing, slicing, joining, padding, reshaping, gathering from devices."""

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from jax.extend import core

from jprune.graph.channels import is_frozen
from jprune.graph.rules.registry import combined_kind, is_zero, pick, rule, union
from jprune.graph.values import Axis, Record, Value
from jprune.jaxprs import shape_of


@rule("transpose")
def _transpose(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    order = equation.params["permutation"]
    value = inputs[0].with_axes([inputs[0].axes[axis] for axis in order])
    if inputs[0].identity is not None:
        one, other = inputs[0].identity
        value = dataclasses.replace(value, identity=(order.index(one), order.index(other)))
    return [value]


@rule("rev")
def _rev(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    axes = list(inputs[0].axes)
    for axis in equation.params["dimensions"]:
        axes[axis] = axes[axis].with_ids(axes[axis].ids[::-1])
    return [inputs[0].with_axes(axes)]


@rule("squeeze")
def _squeeze(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    dropped = [axis % len(inputs[0].axes) for axis in equation.params["dimensions"]]
    return [_drop(record, inputs[0], dropped)]


def _drop(record: Record, value: Value, dropped: Sequence[int]) -> Value:
    """Drop axes of size one; a parameter's axis from which one index was taken is an axis of stacked layers."""
    for place in dropped:
        record.channels.freeze(value.axes[place].ids, "single indices of it are taken")
        record.role([source for source in value.axes[place].sources if source not in value.chosen], "stacked")
    return value.with_axes([axis for place, axis in enumerate(value.axes) if place not in dropped])


@rule("broadcast_in_dim")
def _broadcast_in_dim(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    shape, places = equation.params["shape"], list(map(int, equation.params["broadcast_dimensions"]))
    axes = []
    for place, size in enumerate(shape):
        old = inputs[0].axes[places.index(place)] if place in places else None
        if old is not None and old.size == size:
            axes.append(old)
            continue
        if old is not None:
            record.channels.freeze(old.ids, "a single index of it is broadcast")
        axes.append(Axis(record.channels.fresh(size), zero=is_zero(inputs[0]), repeated=True))
    value = dataclasses.replace(inputs[0].with_axes(axes), literal=inputs[0].literal)
    if inputs[0].numbers is not None:
        value = dataclasses.replace(value, numbers=places[inputs[0].numbers])
    return [value]


@rule("slice")
def _slice(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    axes = [
        axis.with_ids(axis.ids[start:limit:stride])
        for axis, start, limit, stride in zip(inputs[0].axes, starts, limits, strides, strict=True)
    ]
    return [inputs[0].with_axes(axes)]


@rule("split")
def _split(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    place, outputs, start = equation.params["axis"], [], 0
    for size in equation.params["sizes"]:
        axes = list(inputs[0].axes)
        axes[place] = axes[place].with_ids(axes[place].ids[start : start + size])
        outputs.append(inputs[0].with_axes(axes))
        start += size
    return outputs


@rule("unstack")
def _unstack(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    return [_drop(record, inputs[0], [equation.params["axis"]]) for _ in equation.outvars]


@rule("concatenate")
def _concatenate(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    return [_joined(record, inputs, int(equation.params["dimension"]))]  # jnp.roll gives one of numpy's integers


@rule("stack")
def _stack(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    place = equation.params["axis"]
    new = Axis(record.channels.frozen(1, "its size is one"))
    return [_joined(record, [v.with_axes([*v.axes[:place], new, *v.axes[place:]]) for v in inputs], place)]


def _joined(record: Record, values: list[Value], along: int) -> Value:
    """Concatenate arrays along an axis; parameters concatenated with data count as read."""
    kind = combined_kind(record, values)
    axes = []
    for place in range(len(values[0].axes)):
        parts = [value.axes[place] for value in values]
        sources = union(*(part.sources for part in parts)) if kind.of_parameters else ()
        ids = np.concatenate([part.ids for part in parts]) if place == along else pick(record, parts)
        if place == along and all(is_frozen(part.ids) for part in parts):
            ids = np.broadcast_to(ids[:1], ids.shape)
        zero, scored = all(part.zero for part in parts), any(part.scored for part in parts)
        axes.append(Axis(ids, sources, zero, scored=scored))
    chosen = union(*(value.chosen for value in values)) if kind.of_parameters else ()
    same = kind.of_parameters and all(value.factors is values[0].factors for value in values)
    return Value(tuple(axes), kind, chosen, factors=values[0].factors if same else None)


@rule("tile")
def _tile(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    axes = []
    for axis, times in zip(inputs[0].axes, equation.params["reps"], strict=True):
        if axis.size == 1 < times:
            record.channels.freeze(axis.ids, "a single index of it is broadcast")
            axes.append(Axis(record.channels.fresh(times), repeated=True))
        else:
            axes.append(axis.with_ids(np.tile(axis.ids, times)))
    return [inputs[0].with_axes(axes)]


@rule("pad")
def _pad(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Pad an axis; zeros at its ends are new channels, which may be tied to others later."""
    axes, literal = list(inputs[0].axes), inputs[1].literal
    zeros = literal is not None and bool(np.all(np.asarray(literal) == 0))
    configs = [tuple(map(int, config)) for config in equation.params["padding_config"]]
    added = [max(config) > 0 for config in configs]
    for place, (low, high, inside) in enumerate(configs):
        if not zeros and any(added[:place] + added[place + 1 :]):  # what is added along another axis is not zero here
            axes[place] = dataclasses.replace(axes[place], zero=False)
        axis, size = axes[place], shape_of(equation.outvars[0])[place]
        if (low, high, inside) == (0, 0, 0):
            continue
        if low >= 0 and high >= 0 and inside == 0 and not is_frozen(axis.ids):
            if zeros:
                before, after = record.channels.fresh(low), record.channels.fresh(high)
            else:
                why = "padded with a number that is not zero"
                before, after = record.channels.frozen(low, why), record.channels.frozen(high, why)
            ids = np.concatenate([before, axis.ids, after])
        else:
            record.channels.freeze(axis.ids, "it is padded between its indices or cropped")
            ids = record.channels.frozen(size, "it is padded")
        axes[place] = axis.with_ids(ids)
    return [inputs[0].with_axes(axes)]


@rule("reshape")
def _reshape(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, new = inputs[0], shape_of(equation.outvars[0])
    if equation.params.get("dimensions") is not None:  # it transposes first
        value = value.with_axes([value.axes[axis] for axis in equation.params["dimensions"]])
    if 0 in new:  # without entries, nothing couples its axes to those before
        return [Value(tuple(Axis(record.channels.fresh(size), zero=True) for size in new), value.kind)]
    kept = [place for place, axis in enumerate(value.axes) if axis.size != 1]
    units = [axis for axis in value.axes if axis.size == 1]
    surplus = max(0, len(units) - list(new).count(1))
    dropped = [place for place in range(len(value.axes)) if place not in kept][len(units) - surplus :]
    axes = [Axis(record.channels.frozen(1, "its size is one")) for _ in new]
    for place, unit in zip((p for p, size in enumerate(new) if size == 1), units, strict=False):
        axes[place] = unit
    for old, places in _blocks([value.axes[p].size for p in kept], new):
        end = next((p for p in kept if p > kept[old[-1]]), len(value.axes))
        parts = [p for p in range(kept[old[0]], end) if p in kept or p in dropped]  # and those of size one behind
        for place, axis in zip(places, _regroup(record, [value.axes[kept[p]] for p in old], places, new), strict=True):
            axes[place] = axis
        if len(places) == 1 < len(parts):
            axes[places[0]] = dataclasses.replace(axes[places[0]], parts=tuple(value.axes[p] for p in parts))
            for unit in (value.axes[p] for p in parts if p in dropped):  # may be one of several channels
                record.channels.freeze(unit.ids, "single indices of it are taken")
            dropped = [p for p in dropped if p not in parts]
    _drop(record, value, dropped)
    return [value.with_axes(axes)]


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the smallest runs of old and new axes with equal products of sizes; new axes of size one are left out."""
    places = [place for place, size in enumerate(new) if size != 1]
    blocks, i, j = [], 0, 0
    while i < len(old):
        left, right, p, q = [i], [places[j]], old[i], new[places[j]]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                left.append(i)
                p, i = p * old[i], i + 1
            else:
                right.append(places[j])
                q, j = q * new[places[j]], j + 1
        blocks.append((left, right))
    return blocks


def _regroup(record: Record, old: list[Axis], places: list[int], new: Sequence[int]) -> list[Axis]:
    """Merge axes into one and split it into others; either may be a single axis."""
    channels = record.channels
    if len(old) == len(places) == 1:
        return old
    sources = union(*(axis.sources for axis in old))
    live = [axis for axis in old if not is_frozen(axis.ids)]
    zero = bool(live) and all(axis.zero for axis in live)
    if len(old) == 1 and [part.size for part in old[0].parts] == [new[place] for place in places]:
        return [dataclasses.replace(part, sources=part.sources if sources else (), zero=zero) for part in old[0].parts]
    if not live:
        return [Axis(np.broadcast_to(old[0].ids[:1], (new[place],)), sources, zero) for place in places]
    size = math.prod(axis.size for axis in old)
    flat = old[0].ids if len(old) == 1 else channels.fresh(size)
    if len(old) > 1:
        channels.product(flat, [axis.ids for axis in old])
    if len(places) == 1:
        return [Axis(flat, sources, zero)]
    parts = [channels.fresh(new[place]) for place in places]
    channels.product(flat, parts)
    return [Axis(ids, sources, zero) for ids in parts]


@rule("psum", "psum_invariant", "pmax", "pmin")
def _over_devices(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Apply a collective: shapes per device do not change; a named axis of ``vmap`` is an axis of the array."""
    dropped = [axis for axis in equation.params.get("axes", ()) if isinstance(axis, int)]
    for value in inputs if dropped else ():
        for place in dropped:
            record.channels.freeze(value.axes[place].ids, f"'{equation.primitive.name}' runs over it")
    return [
        value.with_axes([axis for place, axis in enumerate(value.axes) if place not in dropped]) for value in inputs
    ]


@rule("all_gather", "all_gather_invariant")
def _all_gather(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Join the parts of an axis that are on different devices."""
    place, why = equation.params["all_gather_dimension"], "it is gathered from devices"
    outputs = []
    for value, var in zip(inputs, equation.outvars, strict=True):
        axes, whole = list(value.axes), record.channels.frozen(shape_of(var)[place], why)
        if equation.params["tiled"]:
            record.channels.freeze(axes[place].ids, why)
            axes[place] = axes[place].with_ids(whole)
        else:
            axes.insert(place, Axis(whole))
        outputs.append(value.with_axes(axes))
    return outputs
