"""Products that sum over axes: matrix products and convolutions, where parameters get their roles."""

import dataclasses
import itertools
import math
from collections.abc import Sequence

from jax.extend import core

from jprune.graph.channels import GroupedConvolution, is_frozen
from jprune.graph.rules.registry import not_understood, pick, rule, union
from jprune.graph.values import Axis, Factor, Kind, Record, Source, Value
from jprune.jaxprs import ragged_axes, shape_of


@rule("dot_general")
def _dot_general(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    (contracted, batch), (left, right) = equation.params["dimension_numbers"], inputs[:2]
    for kernel, other, summed in ((left, right, contracted), (right, left, contracted[::-1])):
        if kernel.identity is not None and len(kernel.axes) == 2 and len(summed[0]) == 1 and not batch[0]:
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
    of_activations = left.kind is right.kind is Kind.ACTIVATION
    scored = of_activations and not all(is_frozen(left.axes[a].ids) for a in contracted[0])
    axes = []
    for a, b in zip(*batch, strict=True):
        pair = [left.axes[a], right.axes[b]]
        separate = left.kind.of_parameters or right.kind.of_parameters or pair[0].separate or pair[1].separate
        heads = pair[0].scored or pair[1].scored
        gated = of_activations and not heads and (separate or not contracted[0])
        zero = pair[0].zero or pair[1].zero
        sources = union(pair[0].sources, pair[1].sources)
        axes.append(Axis(pick(record, pair), sources, zero, scored=scored or heads, separate=separate, gated=gated))
    axes += [side.value.axes[place] for side in sides for place in side.free]
    if factors is not None:
        return [Value(tuple(axes), max(left.kind, right.kind), union(left.chosen, right.chosen), factors=factors)]
    kind = max(left.kind, right.kind)
    kind = Kind.ACTIVATION if kind.of_parameters else kind
    free = [Axis(axis.ids, zero=axis.zero, scored=scored or axis.scored) for axis in axes[len(batch[0]) :]]
    return [Value((*(dataclasses.replace(axis, sources=()) for axis in axes[: len(batch[0])]), *free), kind)]


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
    data = [
        _is_made_of_data(record, side) or side.is_data(other)
        for side, other in zip(sides, reversed(sides), strict=True)
    ]
    for side, is_data in zip(sides, data, strict=True):
        if is_data:
            record.settle(side.value)
    kernels = [side for side, is_data in zip(sides, data, strict=True) if not is_data]
    for side in kernels:
        if side.value.factors is not None:
            _note_product(record, side.value, side.value.factors)
    if len(kernels) == 2:
        record.count(kernels[0].value, count)
        counted = record.multiply_adds[-1]
        factors = [Factor(side.sources(side.contracted), side.sources(side.free), counted) for side in kernels]
        record.factors.extend(factors)
        return factors[0], factors[1]
    for side in kernels:
        in_axes = union(*(axis.sources for axis in side.value.axes))
        record.role([source for source in side.value.chosen if source not in in_axes], "stacked")
        other = sides[1] if side is sides[0] else sides[0]
        experts = _experts(record, side, other)
        inputs = [source for source in side.sources(side.contracted) if source not in experts]
        record.role(inputs, "inputs")
        record.role(experts, "experts")
        record.role(side.sources(side.batch), "stacked" if side.contracted or side.free else "outputs")
        record.role(side.sources(side.free), "outputs")
    record.count(kernels[0].value if kernels else None, count)
    return None


def _is_made_of_data(record: Record, side: _Side) -> bool:
    """Whether an operand is the product of a kernel and of data that are parameters: learned queries, with heads.

    The batch dimensions of the product that reads them are heads, which only the kernel has, next to units; the data
    have positions, which are all summed over or all kept. A product of two kernels for each head, or of two without
    heads, has the batch dimensions in both or in none, and a sum of kernels has nothing else in one of the two.
    """
    heads, summed, kept = (set(side.sources(places)) for places in (side.batch, side.contracted, side.free))
    for data, kernel in itertools.permutations(side.value.factors or (), 2):
        units = [axis for axis in side.value.axes if not set(kernel.free).isdisjoint(axis.sources)]
        alike = summed.issuperset(data.free) or kept.issuperset(data.free)
        if heads and heads.issubset(kernel.free) and len(units) > 1 and alike:
            record.settle_product(data, kernel)
            return True
    return False


def _note_product(record: Record, value: Value, factors: tuple[Factor, Factor]) -> None:
    """Note the two parameters whose product is read as a kernel, unless each head has a product of its own."""
    free = {source for factor in factors for source in factor.free}
    if free.issuperset(union(*(axis.sources for axis in value.axes))):
        left, right = (next(source.path for source in (*factor.contracted, *factor.free)) for factor in factors)
        if left != right:
            record.products.append((left, right))


def _experts(record: Record, kernel: _Side, data: _Side) -> tuple[Source, ...]:
    """Return the axes of a kernel over experts whose outputs are weighted and summed by this product.

    ``jnp.einsum("ebf,efd,be->bd")`` may multiply the hidden units by the gates first, and then sum over experts and
    hidden units at once. Where it multiplies by the gates last, the experts are a batch dimension of the product.
    """
    pairs: list[tuple[Axis, Axis]] = []
    for place, own in zip(kernel.contracted, data.contracted, strict=True):
        parts, units = kernel.value.axes[place].merged, data.value.axes[own].merged
        if [part.size for part in parts] != [unit.size for unit in units]:
            parts, units = (kernel.value.axes[place],), (data.value.axes[own],)
        pairs += zip(parts, units, strict=True)
    for part, unit in pairs:
        record.channels.tie(part.ids, unit.ids)
    gated = [part for part, unit in pairs if unit.gated]
    return union(*(part.sources for part in gated)) if len(gated) < len(pairs) else ()


@rule("conv_general_dilated")
def _convolution(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    params, (data, kernel), channels = equation.params, inputs, record.channels
    lhs, rhs, out = (getattr(params["dimension_numbers"], f"{name}_spec") for name in ("lhs", "rhs", "out"))
    groups, shape = params["feature_group_count"], shape_of(equation.outvars[0])
    count = math.prod(shape) * math.prod(kernel.shape) // max(1, shape[out[1]])
    if data.kind in (Kind.PARAMETER, Kind.SCALED) and not kernel.kind.of_parameters:
        record.count(None, count)
        return not_understood(record, equation, inputs)  # the kernel is the left operand
    record.settle(data)
    if kernel.kind.of_parameters:
        split = data.axes[lhs[1] if params["batch_group_count"] == 1 else lhs[0]]
        _read_by_convolution(record, kernel, rhs, split, groups * params["batch_group_count"])
    elif 0 not in kernel.shape:
        record.made_kernels.append(kernel.with_axes([kernel.axes[place] for place in rhs]))
    record.count(kernel if kernel.kind.of_parameters else None, count)
    for axis in [*(data.axes[p] for p in lhs[2:]), *(kernel.axes[p] for p in rhs[2:])]:
        channels.freeze(axis.ids, "a convolution's window moves over it")
    axes = [Axis(channels.frozen(size, "a convolution's window moves over it")) for size in shape]
    if params["batch_group_count"] == 1:
        axes[out[0]] = Axis(data.axes[lhs[0]].ids, zero=data.axes[lhs[0]].zero)
    features, inside, made = data.axes[lhs[1]], kernel.axes[rhs[1]], kernel.axes[rhs[0]]
    axes[out[1]] = Axis(made.ids, zero=made.zero, parts=made.parts)
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
    """Keep the groups of a grouped convolution equally large."""
    record.channels.consume(features.ids)
    record.channels.grouped(
        GroupedConvolution(
            features.ids,
            inside.ids,
            made.ids,
            groups,
            whole_is_exact=features.zero or made.zero,
            positions_are_exact=features.zero or inside.zero,
        )
    )


def _read_by_convolution(record: Record, kernel: Value, spec: Sequence[int], split: Axis, groups: int) -> None:
    """Record how a convolution reads a kernel, whose groups divide the axis ``split`` of the data.

    A convolution under ``vmap`` is one grouped convolution, where the mapped axis is merged with the outputs of the
    kernel and with the channels of the data. If it is merged with the outputs only, it is an axis of channels, as that
    of a depthwise kernel with several outputs for each channel.
    """
    made = kernel.axes[spec[0]]
    record.role(union(*(kernel.axes[place].sources for place in spec[2:])), "spatial")
    record.role(kernel.axes[spec[1]].sources, "inputs")
    record.role([source for source in kernel.chosen if source not in made.sources], "stacked")
    outer = 0
    for part, channels in zip(made.merged[:-1], split.merged[:-1], strict=False):
        if part.size != channels.size or groups % part.size:
            break
        record.channels.tie(part.ids, channels.ids)
        record.role(part.sources, "stacked")
        groups, outer = groups // part.size, outer + 1
    for part in made.merged[outer:]:
        record.role(part.sources, "outputs")
    record.groups.extend((path, groups) for path in dict.fromkeys(source.path for source in made.sources))


@rule("ragged_dot", "ragged_dot_general")
def _ragged_dot(record: Record, equation: core.JaxprEqn, inputs: list[Value]) -> list[Value]:
    """Multiply rows of the left operand, sorted by expert, by one matrix per expert."""
    (left, right, sizes), shape = inputs[:3], shape_of(equation.outvars[0])
    outputs, contracted = ragged_axes(equation)
    count = math.prod(shape[place] for place in outputs) * math.prod(left.shape[place] for place in contracted)
    record.count(right if right.kind.of_parameters else None, count)
    numbers = equation.params.get("ragged_dot_dimension_numbers")
    plain = len(left.axes) == 2 and len(right.axes) == 3 and shape == (left.shape[0], right.shape[2])
    if numbers is not None:
        plain = plain and tuple(map(tuple, numbers.dot_dimension_numbers[0])) == ((1,), (1,))
    if not plain or not right.kind.of_parameters:
        return not_understood(record, equation, inputs)
    record.settle(left)
    for place, what in enumerate(("stacked", "inputs", "outputs")):
        record.role(right.axes[place].sources, what)
    for axis in (right.axes[0], sizes.axes[0]):
        record.channels.freeze(axis.ids, "experts are chosen by number")
    record.channels.freeze(left.axes[0].ids, "its indices are assigned to experts by their number")
    record.channels.tie(left.axes[1].ids, right.axes[1].ids)
    record.channels.consume(left.axes[1].ids)
    if not (left.axes[1].zero or right.axes[1].zero):
        record.channels.note(left.axes[1].ids, "a product with experts sums over it and neither operand is zero there")
    return [Value((Axis(left.axes[0].ids), Axis(right.axes[2].ids, zero=right.axes[2].zero)))]
