"""Rules that say how each primitive affects channels and the roles of axes.

A rule takes the record, the equation and the values of its inputs, and returns the values of its outputs. ``RULES``
maps the primitive's name to its rule; calls and loops are in ``loops``, since they run programs. A primitive without a
rule freezes every channel it touches, and the axes of the parameters it reads are unknown.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.extend import core

from jprune.graph.channels import is_frozen
from jprune.graph.values import Axis, Factor, Kind, Record, Source, Value

Rule = Callable[[Record, core.JaxprEqn, list[Value]], list[Value]]
RULES: dict[str, Rule] = {}


def _rule(*names: str) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, rule))
        return rule

    return register


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


def shape_of(var: Any) -> tuple[int, ...]:
    """The shape of a variable of a jaxpr."""
    return tuple(var.aval.shape)


def opaque(record: Record, aval: Any, why: str, kind: Kind = Kind.ACTIVATION) -> Value:
    """Return an array whose channels are never removed, for the given reason."""
    return Value(tuple(Axis(record.channels.frozen(size, why)) for size in aval.shape), kind)


def freeze(record: Record, value: Value, why: str) -> None:
    """Freeze all channels of the array."""
    for axis in value.axes:
        record.channels.freeze(axis.ids, why)


def not_understood(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Freeze everything that a primitive without a rule touches; the axes of parameters it reads are unknown."""
    name = equation.primitive.name
    for value in inputs:
        freeze(record, value, f"'{name}' is not supported")
        sources = [*value.chosen, *(source for axis in value.axes for source in axis.sources)]
        record.unknown.extend((path, name) for path in dict.fromkeys(source.path for source in sources))
    kind = max((value.kind for value in inputs), default=Kind.CONSTANT)
    kind = Kind.ACTIVATION if kind.of_parameters else kind
    return [opaque(record, var.aval, f"'{name}' is not supported", kind) for var in equation.outvars]


def union(*sources: Sequence[Source]) -> tuple[Source, ...]:
    """Return the sources in order, without duplicates."""
    return tuple(dict.fromkeys(source for group in sources for source in group))


def _pick(record: Record, axes: Sequence[Axis]) -> np.ndarray:
    """Tie axes of one size, and return the ids of one that can lose channels if there is one."""
    for axis in axes[1:]:
        record.channels.tie(axes[0].ids, axis.ids)
    return next((axis.ids for axis in axes if not is_frozen(axis.ids)), axes[0].ids)


def _is_zero(value: Value) -> bool:
    return value.literal is not None and bool(np.all(value.literal == 0))


# Elementwise operations.

_ZERO_AT_ZERO = _names(
    "neg tanh sin tan asin atan sinh asinh atanh sqrt cbrt abs sign erf erf_inv expm1 log1p square real imag conj copy "
    "copy_p floor ceil round convert_element_type reduce_precision integer_pow bessel_i1e population_count "
    "stop_gradient"
)
_NOT_ZERO_AT_ZERO = _names(
    "exp exp2 logistic cos cosh acos acosh erfc bessel_i0e is_finite not clz log rsqrt reciprocal lgamma digamma"
)
_ZERO_WHERE_ALL_ARE = _names("add sub max min or xor add_any atan2 complex")
_ZERO_WHERE_ANY_IS = _names("mul and mulhi")
_ZERO_WHERE_FIRST_IS = _names("div rem pow nextafter shift_left shift_right_logical shift_right_arithmetic")
_OTHER_ELEMENTWISE = _names(
    "eq ne lt le gt ge eq_to lt_to le_to igamma igammac igamma_grad_a random_gamma_grad regularized_incomplete_beta "
    "polygamma zeta"
)
_LARGEST_IDENTITY = 1 << 16  # longer iotas are not treated as part of an identity matrix
_INFINITE_AT_ZERO = _names("log rsqrt reciprocal lgamma digamma")


@_rule(
    *_ZERO_AT_ZERO,
    *_NOT_ZERO_AT_ZERO,
    *_ZERO_WHERE_ALL_ARE,
    *_ZERO_WHERE_ANY_IS,
    *_ZERO_WHERE_FIRST_IS,
    *_OTHER_ELEMENTWISE,
    "select_n",
    "clamp",
)
def _elementwise(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    name, shape = equation.primitive.name, shape_of(equation.outvars[0])
    parts = inputs[1:] if name == "select_n" else inputs  # without the predicate, which is not part of the result
    if name == "add":
        parts = inputs = _biased(record, inputs)
    kind = _combined_kind(record, parts)
    axes = []
    for place, size in enumerate(shape):
        full = [value for value in inputs if value.axes and value.axes[place].size == size]
        ids = _pick(record, [value.axes[place] for value in full])
        sources = union(*(value.axes[place].sources for value in full if value in parts)) if kind.of_parameters else ()
        for value in inputs:  # an axis of size one is broadcast by the operation itself
            if value.axes and value.axes[place].size != size:
                record.channels.freeze(value.axes[place].ids, "a single index of it is broadcast")
        zeros = [value.axes[place].zero and value in full if value.axes else _is_zero(value) for value in inputs]
        if _is_infinite(equation, zeros, inputs):
            record.channels.note(ids, f"'{name}' of a masked channel is not finite")
        zero = _zero_after(name, zeros, [value.literal for value in inputs]) and equation.params.get("y") != 0
        axes.append(Axis(ids, sources, zero))
    chosen = union(*(value.chosen for value in parts)) if kind.of_parameters else ()
    literal = inputs[0].literal if name == "convert_element_type" else None
    same = inputs[0] if name != "eq" and passes_numbers(equation, inputs) else Value(())
    identity = _identity_axes(inputs) if name == "eq" else same.identity
    if name == "eq" and identity is not None:
        record.channels.tie(axes[identity[0]].ids, axes[identity[1]].ids)
    return [
        Value(tuple(axes), kind, chosen, literal, numbers=same.numbers, identity=identity) for _ in equation.outvars
    ]


def passes_numbers(equation: core.JaxprEqn, inputs: list[Value]) -> bool:
    """Whether an array of consecutive numbers (an iota) remains one after an equation, or becomes an identity matrix.

    Channels numbered by an iota cannot be removed, because the later ones would get other numbers. An identity matrix
    is an exception: with channels removed it is again an identity matrix.
    """
    match equation.primitive.name:
        case "convert_element_type" | "broadcast_in_dim":
            place, shape = inputs[0].numbers, inputs[0].shape
            return place is None or (shape[place] > 1 and _counts(equation, shape[place]))
        case "add":
            return _is_zero(inputs[1])
        case "eq":
            return _identity_axes(inputs) is not None
    return False


def _counts(equation: core.JaxprEqn, size: int) -> bool:
    """Whether the dtype of an equation's output can represent the integers below ``size``."""
    dtype = getattr(equation.outvars[0].aval, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.number):
        return False
    numbers = np.arange(size)
    return bool((numbers.astype(dtype).astype(np.int64) == numbers).all())


def _identity_axes(inputs: list[Value]) -> tuple[int, int] | None:
    """Return the axes along which the two operands are iotas, if these are different axes of one size."""
    left, right = inputs
    if left.numbers is None or right.numbers is None or left.numbers == right.numbers:
        return None
    same_size = left.axes[left.numbers].size == right.axes[right.numbers].size
    return (left.numbers, right.numbers) if same_size else None


def without_numbers(record: Record, value: Value) -> Value:
    """Freeze an iota whose numbers are used as numbers."""
    if value.numbers is None:
        return value
    axes, why = list(value.axes), "its indices are numbered"
    record.channels.freeze(axes[value.numbers].ids, why)
    axes[value.numbers] = Axis(record.channels.frozen(axes[value.numbers].size, why))
    return value.with_axes(axes)


def _biased(record: Record, inputs: list[Value]) -> list[Value]:
    """Assign the roles of two parameters whose product gets a bias: one is data (learned queries), the other a kernel.

    The bias has only the axes of the kernel's outputs; the other axes come from the data.
    """
    found = []
    for value, other in zip(inputs, reversed(inputs), strict=True):
        if value.factors is not None and other.axes and other.kind.of_parameters:
            repeated = [
                axis.sources
                for axis, one in zip(value.axes, other.axes, strict=True)
                if axis.size > 1 and axis.sources and not one.sources
            ]
            left, right = (set(factor.free) for factor in value.factors)
            missing = set(union(*repeated))
            if missing and missing in (left, right):
                data, kernel = value.factors if missing == left else value.factors[::-1]
                record.role([*data.free, *data.contracted], "outputs")
                record.role(kernel.contracted, "inputs")
                record.role(kernel.free, "outputs")
                found.append(Value(tuple(Axis(axis.ids, zero=axis.zero) for axis in value.axes)))
                continue
        found.append(value)
    return found


def _is_infinite(equation: core.JaxprEqn, zeros: list[bool], inputs: list[Value]) -> bool:
    """Whether the operation divides by a masked channel, or raises it to a power that may not be positive."""
    name = equation.primitive.name
    other_power = (name == "integer_pow" and equation.params["y"] < 0) or (
        name == "pow" and not _is_positive(inputs[1].literal)
    )
    return (zeros[0] and (name in _INFINITE_AT_ZERO or other_power)) or (name in ("div", "rem") and zeros[1])


def _is_positive(literal: Any) -> bool:
    return literal is not None and bool(np.all(literal > 0))


def _zero_after(name: str, zeros: list[bool], literals: list[Any]) -> bool:
    """Whether the result is zero where the operands in ``zeros`` are."""
    if name in _ZERO_AT_ZERO or name in _ZERO_WHERE_FIRST_IS:
        return zeros[0] and (name != "pow" or _is_positive(literals[1]))
    if name in _ZERO_WHERE_ALL_ARE or name == "clamp":
        known = [0 if zero else literal for zero, literal in zip(zeros, literals, strict=True)]
        if name in ("min", "max", "clamp") and None not in known:  # relu6 is min(max(x, 0), 6)
            low, high = (known[0], known[2]) if name == "clamp" else (min(known), max(known))
            return bool(low == 0 if name == "min" else high == 0 if name == "max" else low <= 0 <= high)
        return all(zeros)
    if name in _ZERO_WHERE_ANY_IS:
        return any(zeros)
    return name == "select_n" and all(zeros[1:])


def _combined_kind(record: Record, values: list[Value]) -> Kind:
    """Return the kind of an elementwise result; parameters combined with data count as read here."""
    kinds = {value.kind for value in values if math.prod(value.shape) > 1} or {value.kind for value in values}
    scalars = {value.kind for value in values}
    kind = max(kinds)
    if kind is Kind.LOOKED_UP and kinds & {Kind.PARAMETER, Kind.SCALED}:
        kind = Kind.ACTIVATION
    elif kind is Kind.PARAMETER and max(scalars) > kind:
        kind = Kind.SCALED
    elif not kind.of_parameters:
        kind = max(scalars)
    if not kind.of_parameters:
        for value in values:
            if value.kind.of_parameters:
                record.settle(value)
    return kind


@_rule("bitcast_convert_type")
def _bitcast(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    if inputs[0].shape != shape_of(equation.outvars[0]):
        return not_understood(record, equation, inputs)
    return [dataclasses.replace(inputs[0], literal=None)]


@_rule("optimization_barrier", "sharding_constraint", "mesh_cast", "reshard", "layout_constraint", "name", "device_put")
def _identity(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    return [dataclasses.replace(value, literal=None) for value in inputs]


RULES.update(dict.fromkeys(_names("pvary ppermute pbroadcast pin unpin"), _identity))


@_rule("psum", "psum_invariant", "pmax", "pmin")
def _over_devices(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Apply a collective: shapes per device do not change; a named axis of ``vmap`` is an axis of the array."""
    dropped = [axis for axis in equation.params.get("axes", ()) if isinstance(axis, int)]
    for value in inputs if dropped else ():
        for place in dropped:
            record.channels.freeze(value.axes[place].ids, f"'{equation.primitive.name}' runs over it")
    return [
        value.with_axes([axis for place, axis in enumerate(value.axes) if place not in dropped]) for value in inputs
    ]


@_rule("all_gather", "all_gather_invariant")
def _all_gather(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Join the parts of an axis that are on different devices."""
    place, why = equation.params["all_gather_dimension"], "it is gathered from devices"
    outputs = []
    for value, var in zip(inputs, equation.outvars, strict=True):
        axes, whole = list(value.axes), record.channels.frozen(shape_of(var)[place], why)
        if equation.params["tiled"]:
            record.channels.freeze(axes[place].ids, why)
            axes[place] = dataclasses.replace(axes[place], ids=whole)
        else:
            axes.insert(place, Axis(whole))
        outputs.append(value.with_axes(axes))
    return outputs


@_rule("iota", "empty", "axis_index", "random_seed", "random_wrap", "random_unwrap", "random_fold_in", "random_split")
def _constant(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    axes, numbers = [], None
    for place, size in enumerate(shape_of(equation.outvars[0])):
        counted = equation.primitive.name != "empty" and place == equation.params.get("dimension", place)
        if counted and equation.primitive.name == "iota" and size <= _LARGEST_IDENTITY and _counts(equation, size):
            counted, numbers = False, place
        ids = record.channels.frozen(size, "its indices are numbered") if counted else record.channels.fresh(size)
        axes.append(Axis(ids))
    return [Value(tuple(axes), Kind.CONSTANT, numbers=numbers)]


@_rule("random_bits", "random_gamma", "rng_uniform", "rng_bit_generator", "threefry2x32", "random_clone")
def _random(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    return [opaque(record, var.aval, "random numbers are drawn for it", Kind.CONSTANT) for var in equation.outvars]


@_rule("debug_callback", "debug_print", "check", "inspect_sharding", "dce_sink")
def _no_output(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    return [opaque(record, var.aval, "constant", Kind.CONSTANT) for var in equation.outvars]


# Moving data.


@_rule("transpose")
def _transpose(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    order = equation.params["permutation"]
    value = inputs[0].with_axes([inputs[0].axes[axis] for axis in order])
    if inputs[0].identity is not None:
        one, other = inputs[0].identity
        value = dataclasses.replace(value, identity=(order.index(one), order.index(other)))
    return [value]


@_rule("rev")
def _rev(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    axes = list(inputs[0].axes)
    for axis in equation.params["dimensions"]:
        axes[axis] = dataclasses.replace(axes[axis], ids=axes[axis].ids[::-1])
    return [inputs[0].with_axes(axes)]


@_rule("squeeze")
def _squeeze(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    dropped = [axis % len(inputs[0].axes) for axis in equation.params["dimensions"]]
    return [_drop(record, inputs[0], dropped)]


def _drop(record: Record, value: Value, dropped: Sequence[int]) -> Value:
    """Drop axes of size one; a parameter's axis from which one index was taken is an axis of stacked layers."""
    for place in dropped:
        record.channels.freeze(value.axes[place].ids, "single indices of it are taken")
        record.role([source for source in value.axes[place].sources if source not in value.chosen], "stacked")
    return value.with_axes([axis for place, axis in enumerate(value.axes) if place not in dropped])


@_rule("broadcast_in_dim")
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
        axes.append(Axis(record.channels.fresh(size), zero=_is_zero(inputs[0])))
    value = inputs[0].with_axes(axes)
    if inputs[0].numbers is not None:
        value = dataclasses.replace(value, numbers=places[inputs[0].numbers])
    return [value]


@_rule("slice")
def _slice(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    starts, limits = equation.params["start_indices"], equation.params["limit_indices"]
    strides = equation.params["strides"] or (1,) * len(starts)
    axes = [
        dataclasses.replace(axis, ids=axis.ids[start:limit:stride])
        for axis, start, limit, stride in zip(inputs[0].axes, starts, limits, strides, strict=True)
    ]
    return [inputs[0].with_axes(axes)]


@_rule("split")
def _split(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    place, outputs, start = equation.params["axis"], [], 0
    for size in equation.params["sizes"]:
        axes = list(inputs[0].axes)
        axes[place] = dataclasses.replace(axes[place], ids=axes[place].ids[start : start + size])
        outputs.append(inputs[0].with_axes(axes))
        start += size
    return outputs


@_rule("unstack")
def _unstack(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    return [_drop(record, inputs[0], [equation.params["axis"]]) for _ in equation.outvars]


@_rule("concatenate")
def _concatenate(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    return [_joined(record, inputs, equation.params["dimension"])]


@_rule("stack")
def _stack(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    place = equation.params["axis"]
    new = Axis(record.channels.frozen(1, "its size is one"))
    return [_joined(record, [v.with_axes([*v.axes[:place], new, *v.axes[place:]]) for v in inputs], place)]


def _joined(record: Record, values: list[Value], along: int) -> Value:
    """Concatenate arrays along an axis; parameters concatenated with data count as read."""
    kind = _combined_kind(record, values)
    axes = []
    for place in range(len(values[0].axes)):
        parts = [value.axes[place] for value in values]
        sources = union(*(part.sources for part in parts)) if kind.of_parameters else ()
        ids = np.concatenate([part.ids for part in parts]) if place == along else _pick(record, parts)
        if place == along and all(is_frozen(part.ids) for part in parts):
            ids = np.broadcast_to(parts[0].ids[:1], ids.shape)
        axes.append(Axis(ids, sources, all(part.zero for part in parts)))
    return Value(tuple(axes), kind, union(*(value.chosen for value in values)) if kind.of_parameters else ())


@_rule("tile")
def _tile(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    axes = [
        axis if times == 1 else dataclasses.replace(axis, ids=np.tile(axis.ids, times))
        for axis, times in zip(inputs[0].axes, equation.params["reps"], strict=True)
    ]
    return [inputs[0].with_axes(axes)]


@_rule("pad")
def _pad(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Pad an axis; zeros at its ends are new channels, which may be tied to others later."""
    axes, literal = list(inputs[0].axes), inputs[1].literal
    zeros = literal is not None and bool(np.all(np.asarray(literal) == 0))
    for place, config in enumerate(equation.params["padding_config"]):
        low, high, inside = map(int, config)
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
        axes[place] = dataclasses.replace(axis, ids=ids)
    return [inputs[0].with_axes(axes)]


@_rule("reshape")
def _reshape(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, new = inputs[0], shape_of(equation.outvars[0])
    if equation.params.get("dimensions") is not None:  # it transposes first
        value = value.with_axes([value.axes[axis] for axis in equation.params["dimensions"]])
    if 0 in new:
        return [opaque(record, equation.outvars[0].aval, "its array is empty", value.kind)]
    kept = [place for place, axis in enumerate(value.axes) if axis.size != 1]
    units = [axis for axis in value.axes if axis.size == 1]
    surplus = max(0, len(units) - list(new).count(1))
    _drop(record, value, [place for place in range(len(value.axes)) if place not in kept][len(units) - surplus :])
    axes = [Axis(record.channels.frozen(1, "its size is one")) for _ in new]
    for place, unit in zip((p for p, size in enumerate(new) if size == 1), units, strict=False):
        axes[place] = unit
    for old, places in _blocks([value.axes[p].size for p in kept], new):
        for place, axis in zip(places, _regroup(record, [value.axes[kept[p]] for p in old], places, new), strict=True):
            axes[place] = axis
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


# Reductions, and operations along an axis.


@_rule("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or", "reduce_xor")
def _reduce(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    name, value, dropped = equation.primitive.name, inputs[0], {int(axis) for axis in equation.params["axes"]}
    for place in dropped:
        record.channels.consume(value.axes[place].ids)
        if not (name in ("reduce_sum", "reduce_or", "reduce_xor") and value.axes[place].zero):
            record.channels.note(value.axes[place].ids, f"'{name}' runs over masked channels that are not zero for it")
    keeps_zero = name != "reduce_and"
    axes = [
        dataclasses.replace(axis, zero=axis.zero and keeps_zero)
        for place, axis in enumerate(value.axes)
        if place not in dropped
    ]
    return [value.with_axes(axes)]


@_rule("argmax", "argmin")
def _argument(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, dropped = inputs[0], {int(axis) for axis in equation.params["axes"]}
    for place in dropped:
        record.channels.freeze(value.axes[place].ids, f"'{equation.primitive.name}' numbers its indices")
    return [Value(tuple(Axis(axis.ids) for place, axis in enumerate(value.axes) if place not in dropped))]


@_rule("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
def _cumulative(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, along = inputs[0], equation.params["axis"]
    record.channels.freeze(value.axes[along].ids, f"'{equation.primitive.name}' runs along it")
    keeps_zero = equation.primitive.name != "cumlogsumexp"
    return [
        value.with_axes(
            [Axis(a.ids, a.sources, a.zero and place != along and keeps_zero) for place, a in enumerate(value.axes)]
        )
    ]


@_rule("sort", "top_k", "approx_top_k", "fft")
def _along_axis(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Apply an operation that mixes indices along some axes; the other axes of operands and results correspond.

    A result computed from parameters still counts as parameters, but its mixed axes are no longer theirs: a threshold
    found by ``sort`` does not determine a kernel's axes, and after a transform the role of the mixed axes is unknown.
    """
    name, params, shape = equation.primitive.name, equation.params, inputs[0].shape
    first = len(shape) - len(params.get("fft_lengths", (0,)))
    axis = params.get("dimension", params.get("axis", params.get("reduction_dimension", len(shape) - 1))) % len(shape)
    mixed = set(range(first, len(shape))) if name == "fft" else {axis}
    kind = _combined_kind(record, inputs)
    for value in inputs:
        for place in mixed:
            record.channels.freeze(value.axes[place].ids, f"'{name}' runs along it")
            record.mixed.update(dict.fromkeys(value.axes[place].sources, name))
    picked = [_pick(record, [value.axes[place] for value in inputs]) for place in range(len(shape))]
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
                )
                for place, size in enumerate(shape_of(var))
            ),
            kind,
            chosen,
        )
        for var in equation.outvars
    ]


@_rule("reduce_window", "reduce_window_sum", "reduce_window_max", "reduce_window_min")
def _reduce_window(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    params, value = equation.params, inputs[0]
    kind = _combined_kind(record, inputs)
    axes = []
    for place, (axis, size) in enumerate(zip(value.axes, shape_of(equation.outvars[0]), strict=True)):
        if params["window_dimensions"][place] == 1 and axis.size == size:
            axes.append(Axis(axis.ids, axis.sources if kind.of_parameters else (), axis.zero))
        else:
            record.channels.freeze(axis.ids, "a window moves over it")
            axes.append(Axis(record.channels.frozen(size, "a window moves over it")))
    return [Value(tuple(axes), kind, value.chosen if kind.of_parameters else ()) for _ in equation.outvars]


# Reading and writing by index.


@_rule("gather")
def _gather(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, indices = inputs[:2]
    numbers, sizes = equation.params["dimension_numbers"], equation.params["slice_sizes"]
    shape = shape_of(equation.outvars[0])
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
        axes[batch[index]] = own
    inside = [
        p
        for p in range(len(value.axes))
        if p not in numbers.collapsed_slice_dims and p not in numbers.operand_batching_dims
    ]
    for place, operand in zip(numbers.offset_dims, inside, strict=True):
        if sizes[operand] == value.axes[operand].size:
            axes[place] = value.axes[operand]
        else:
            axes[place] = Axis(axes[place].ids, value.axes[operand].sources)
    indexed = [p for p, axis in enumerate(value.axes) if p in numbers.collapsed_slice_dims or sizes[p] != axis.size]
    indexed = [p for p in indexed if p not in numbers.operand_batching_dims]
    for operand in indexed:
        record.channels.freeze(value.axes[operand].ids, "it is indexed")
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


@_rule("dynamic_slice")
def _dynamic_slice(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, starts, axes, cut = inputs[0], inputs[1:], list(inputs[0].axes), []
    for place, size in enumerate(equation.params["slice_sizes"]):
        if size != axes[place].size:
            record.channels.freeze(axes[place].ids, "it is indexed")
            axes[place] = dataclasses.replace(axes[place], ids=record.channels.frozen(size, "it is indexed"))
            cut.append(place)
    kind = max((starts[place].kind for place in cut), default=Kind.CONSTANT)
    if value.kind.of_parameters and kind > Kind.CONSTANT:
        single = [place for place in cut if axes[place].size == 1]  # a window of several indices keeps its axis
        sources = union(*(value.axes[place].sources for place in single))
        axes = [dataclasses.replace(axis, sources=() if p in single else axis.sources) for p, axis in enumerate(axes)]
        return [Value(tuple(axes), Kind.LOOKED_UP, union(value.chosen, sources))]
    return [dataclasses.replace(value, axes=tuple(axes), kind=max(value.kind, kind), literal=None)]


@_rule("dynamic_update_slice")
def _dynamic_update_slice(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    value, update = inputs[:2]
    kind = _combined_kind(record, [value, update])
    axes = []
    for old, new in zip(value.axes, update.axes, strict=True):
        if old.size == new.size:
            ids, zero = _pick(record, [old, new]), old.zero and new.zero
        else:
            record.channels.freeze(old.ids, "it is indexed")
            record.channels.freeze(new.ids, "it is indexed")
            ids, zero = record.channels.frozen(old.size, "it is indexed"), False
        axes.append(Axis(ids, union(old.sources, new.sources) if kind.of_parameters else (), zero))
    return [Value(tuple(axes), kind)]


@_rule(
    "scatter", "scatter-add", "scatter-sub", "scatter-mul", "scatter-min", "scatter-max", "scatter_add", "scatter_mul"
)
def _scatter(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Write slices of the updates into the operand: whole axes correspond, indexed axes are frozen."""
    value, indices, updates = inputs
    numbers = equation.params["dimension_numbers"]
    kind = _combined_kind(record, [value, updates])
    batching = tuple(getattr(numbers, "operand_batching_dims", ()))
    index_batching = tuple(getattr(numbers, "scatter_indices_batching_dims", ()))
    window = [p for p in range(len(value.axes)) if p not in numbers.inserted_window_dims and p not in batching]
    outside = [p for p in range(len(updates.axes)) if p not in numbers.update_window_dims]
    partner = dict(zip(window, numbers.update_window_dims, strict=True))
    partner |= {p: outside[index] for p, index in zip(batching, index_batching, strict=True)}
    for k, place in enumerate(outside):
        if k < len(indices.axes):
            record.channels.tie(updates.axes[place].ids, indices.axes[k].ids)
    axes = []
    for place, axis in enumerate(value.axes):
        new = updates.axes[partner[place]] if place in partner else None
        if new is not None and new.size == axis.size:
            axes.append(Axis(_pick(record, [axis, new]), union(axis.sources, new.sources), axis.zero and new.zero))
        else:
            record.channels.freeze(axis.ids, "it is indexed")
            axes.append(Axis(record.channels.frozen(axis.size, "it is indexed"), axis.sources))
    if not kind.of_parameters:
        axes = [Axis(axis.ids, zero=axis.zero) for axis in axes]
    return [Value(tuple(axes), kind)]


# Contractions.


@_rule("dot_general")
def _dot_general(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    (contracted, batch), (left, right) = equation.params["dimension_numbers"], inputs[:2]
    for kernel, other, summed in ((left, right, contracted), (right, left, contracted[::-1])):
        if kernel.identity is not None and len(kernel.axes) == 2 and len(summed[0]) == 1:
            return [_times_identity(record, kernel, other, summed[1][0], other is left)]
    sides = [_Side(value, contracted[k], batch[k]) for k, value in enumerate((left, right))]
    for a, b in [*zip(*contracted, strict=True), *zip(*batch, strict=True)]:
        record.channels.tie(left.axes[a].ids, right.axes[b].ids)
    for a, b in zip(*contracted, strict=True):
        record.channels.consume(left.axes[a].ids)
        record.channels.consume(right.axes[b].ids)
        if not (left.axes[a].zero or right.axes[b].zero):
            record.channels.note(
                left.axes[a].ids, "a product of two activations sums over it and neither is zero there"
            )
    count = math.prod(shape_of(equation.outvars[0])) * math.prod(left.axes[a].size for a in contracted[0])
    factors = _read_by_product(record, sides, count)
    axes = []
    for a, b in zip(*batch, strict=True):
        pair = [left.axes[a], right.axes[b]]
        axes.append(Axis(_pick(record, pair), union(pair[0].sources, pair[1].sources), pair[0].zero or pair[1].zero))
    axes += [side.value.axes[place] for side in sides for place in side.free]
    if factors is not None:
        return [Value(tuple(axes), max(left.kind, right.kind), union(left.chosen, right.chosen), factors=factors)]
    kind = max(left.kind, right.kind)
    kind = Kind.ACTIVATION if kind.of_parameters else kind
    return [Value(tuple(Axis(axis.ids, zero=axis.zero) for axis in axes), kind)]


def _times_identity(record: Record, kernel: Value, other: Value, place: int, is_left: bool) -> Value:
    """Return the product with an identity matrix: the other operand, with the contracted axis moved."""
    record.channels.tie(kernel.axes[0].ids, other.axes[place].ids)
    record.count(None, math.prod(other.shape) * other.axes[place].size)
    rest = [axis for p, axis in enumerate(other.axes) if p != place]
    return other.with_axes([*rest, other.axes[place]] if is_left else [other.axes[place], *rest])


class _Side:
    """One operand of a contraction."""

    def __init__(self, value: Value, contracted: Sequence[int], batch: Sequence[int]):
        self.value, self.contracted, self.batch = value, list(contracted), list(batch)
        self.free = [p for p in range(len(value.axes)) if p not in self.contracted and p not in self.batch]

    def sources(self, places: Sequence[int]) -> tuple[Source, ...]:
        return union(*(self.value.axes[place].sources for place in places))

    def is_data(self, other: "_Side") -> bool:
        """Whether this operand is the data and the other its kernel.

        Parameters are data if they were looked up, scaled by an activation or repeated over an axis of the data, and
        the other operand is plain parameters: token embeddings, learned queries repeated over the batch.
        """
        kind = self.value.kind
        if not kind.of_parameters:
            return True
        repeated = any(
            self.value.axes[p].size > 1 and not self.value.axes[p].sources for p in [*self.free, *self.batch]
        )
        if other.value.kind.of_parameters:
            return kind is not Kind.PARAMETER or repeated
        return kind is Kind.LOOKED_UP and not self.sources(self.free)


def _read_by_product(record: Record, sides: list[_Side], count: int) -> tuple[Factor, Factor] | None:
    """Record how a matrix product reads parameters; return its factors if both are kernels (a low-rank product)."""
    data = [side.is_data(other) for side, other in zip(sides, reversed(sides), strict=True)]
    for side, is_data in zip(sides, data, strict=True):
        if is_data:
            record.settle(side.value)
    kernels = [side for side, is_data in zip(sides, data, strict=True) if not is_data]
    if len(kernels) == 2:
        factors = [Factor(side.sources(side.contracted), side.sources(side.free)) for side in kernels]
        record.factors.extend(factors)
        record.count(kernels[0].value, count)
        return factors[0], factors[1]
    for side in kernels:
        in_axes = union(*(axis.sources for axis in side.value.axes))
        record.role([source for source in side.value.chosen if source not in in_axes], "stacked")
        record.role(side.sources(side.contracted), "inputs")
        record.role(side.sources(side.batch), "stacked" if side.contracted or side.free else "outputs")
        record.role(side.sources(side.free), "outputs")
    record.count(kernels[0].value if kernels else None, count)
    return None


@_rule("conv_general_dilated")
def _convolution(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    params, (data, kernel), channels = equation.params, inputs, record.channels
    lhs, rhs, out = (getattr(params["dimension_numbers"], f"{name}_spec") for name in ("lhs", "rhs", "out"))
    groups, shape = params["feature_group_count"], shape_of(equation.outvars[0])
    if data.kind in (Kind.PARAMETER, Kind.SCALED) and not kernel.kind.of_parameters:
        return not_understood(record, equation, inputs)  # the kernel is the left operand
    record.settle(data)
    if kernel.kind.of_parameters:
        _read_by_convolution(record, kernel, rhs, groups * params["batch_group_count"])
    record.count(
        kernel if kernel.kind.of_parameters else None, math.prod(shape) * math.prod(kernel.shape) // shape[out[1]]
    )
    for axis in [*(data.axes[p] for p in lhs[2:]), *(kernel.axes[p] for p in rhs[2:])]:
        channels.freeze(axis.ids, "a convolution's window moves over it")
    axes = [Axis(channels.frozen(size, "a convolution's window moves over it")) for size in shape]
    if params["batch_group_count"] == 1:
        axes[out[0]] = Axis(data.axes[lhs[0]].ids)
    features, inside, made = data.axes[lhs[1]], kernel.axes[rhs[1]], kernel.axes[rhs[0]]
    axes[out[1]] = Axis(made.ids, zero=made.zero)
    if params["batch_group_count"] != 1:
        for axis in (data.axes[lhs[0]], features, inside, made):
            channels.freeze(axis.ids, "a convolution with groups in its batch")
    elif groups == 1:
        channels.tie(features.ids, inside.ids)
        channels.consume(features.ids)
        if not (features.zero or inside.zero):
            channels.note(features.ids, "a convolution sums over it and neither operand is zero there")
    else:
        _tie_groups(record, features, inside, made, groups)
    kind = max(data.kind, kernel.kind)
    return [Value(tuple(axes), Kind.ACTIVATION if kind.of_parameters else kind)]


def _tie_groups(record: Record, features: Axis, inside: Axis, made: Axis, groups: int) -> None:
    """Tie the inputs and outputs of each group: a grouped convolution loses whole groups."""
    record.channels.freeze(inside.ids, "inputs of a group are removed with the whole group")
    record.channels.consume(features.ids)
    first = features.ids.reshape(groups, -1)[:, 0]
    for ids in (features.ids.reshape(groups, -1), made.ids.reshape(groups, -1)):
        for column in range(ids.shape[1]):
            record.channels.tie(first, ids[:, column])
    if not (features.zero or made.zero):
        record.channels.note(features.ids, "a grouped convolution of a channel that is not zero when masked")


def _read_by_convolution(record: Record, kernel: Value, spec: Sequence[int], groups: int) -> None:
    record.role(union(*(kernel.axes[place].sources for place in spec[2:])), "spatial")
    record.role(kernel.axes[spec[1]].sources, "inputs")
    record.role([source for source in kernel.chosen if source not in kernel.axes[spec[0]].sources], "stacked")
    by_path: dict[str, list[Source]] = {}
    for source in kernel.axes[spec[0]].sources:
        by_path.setdefault(source.path, []).append(source)
    for path, sources in by_path.items():
        # A convolution under vmap is one grouped convolution, with the mapped axis merged into its outputs.
        outer = record.outer_axes(sources, groups) if len(sources) > 1 else 0
        record.role(sources[:outer], "stacked")
        record.role(sources[outer:], "outputs")
        record.groups.append((path, groups // math.prod(record.sizes[source] for source in sources[:outer])))


@_rule("ragged_dot", "ragged_dot_general")
def _ragged_dot(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Multiply rows of the left operand, sorted by expert, by one matrix per expert."""
    (left, right), shape = inputs[:2], shape_of(equation.outvars[0])
    numbers = equation.params.get("ragged_dot_dimension_numbers")
    plain = len(left.axes) == 2 and len(right.axes) == 3 and shape == (left.shape[0], right.shape[2])
    if numbers is not None:
        plain = plain and tuple(map(tuple, numbers.dot_dimension_numbers[0])) == ((1,), (1,))
    if not plain or not right.kind.of_parameters:
        return not_understood(record, equation, inputs)
    record.settle(left)
    for place, what in enumerate(("stacked", "inputs", "outputs")):
        record.role(right.axes[place].sources, what)
    record.channels.freeze(right.axes[0].ids, "experts are chosen by number")
    record.channels.tie(left.axes[1].ids, right.axes[1].ids)
    record.channels.consume(left.axes[1].ids)
    record.count(right, math.prod(shape) * left.shape[1])
    return [Value((Axis(left.axes[0].ids), Axis(right.axes[2].ids, zero=right.axes[2].zero)))]
