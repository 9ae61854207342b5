"""Trace a model to find the role of every axis of every parameter, and the channels that are removed together."""

import inspect
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.extend import core
from jaxtyping import Array, PyTree

from jprune import jaxprs
from jprune.graph.axes import KernelAxes
from jprune.graph.channels import FIRST_CHANNEL, LeafAxis, Solution, channel_groups
from jprune.graph.graph import Graph, Model
from jprune.graph.loops import run
from jprune.graph.rules import without_numbers
from jprune.graph.values import Axis, Kind, Program, Record, Source, Value
from jprune.trees import Leaf, Subset, is_array, refuse_one_path_twice, with_article

_ROLES = ("stacked", "inputs", "outputs", "spatial")


def trace_model(apply: Callable[..., PyTree], params: PyTree, *inputs: PyTree, state: PyTree | None = None) -> Graph:
    """Find the role of every axis of every parameter, and the channels that can be removed, from the program.

    The model is traced with shapes only; nothing is computed or allocated. Parameters are followed through the program
    to the matrix products and convolutions that read them. A warning names each primitive that is not supported; the
    axes of the leaves it reads are unknown. Another warning names parameters whose product is read as one kernel, where
    one of them may be data.

    An axis over experts is stacked, including where gates weight the experts' outputs and sum them in one product. An
    axis after the inputs of a kernel, as in (inputs, experts, units), cannot be distinguished from heads, and is read
    as an axis of outputs.

    Args:
      apply: any JAX function ``apply(params, *inputs)``. With ``state`` it is called as
        ``apply(params, *inputs, state=state)`` if it takes such a keyword, else as ``apply(params, state, *inputs)``.
      params: parameters as arrays or ``jax.ShapeDtypeStruct``; leaves that are neither are constants.
      *inputs: arrays or ``jax.ShapeDtypeStruct``.
      state: batch statistics, caches or masks. They are cut with their channels but never masked, and do not count as
        data. A second output of the same structure is taken to be the new state.

    Returns:
      A graph; ``print`` shows it as a table.

    Raises:
      TypeError: ``apply`` is not a function, or is a model instead of a function of its parameters.
      ValueError: ``params`` has no array.

    >>> import jax, jax.numpy as jnp
    >>> def apply(params, x):
    ...     return jax.nn.relu(x @ params["hidden"]["kernel"]) @ params["head"]["kernel"]
    >>> params = {"hidden": {"kernel": jnp.ones((3, 8))}, "head": {"kernel": jnp.ones((8, 2))}}
    >>> graph = trace_model(apply, params, jnp.ones((1, 3)))
    >>> graph.axes["hidden/kernel"]
    KernelAxes(stacked=(), inputs=(0,), outputs=(1,), spatial=(), groups=1)
    >>> [(member.path, member.axis) for member in graph.channels[0].members]
    [('head/kernel', 0), ('hidden/kernel', 1)]
    """
    if not callable(apply):
        swapped = "; the model comes first" if callable(params) else ""
        raise TypeError(
            f"apply is {with_article(apply)}; it must be a function apply(params, *inputs){swapped}: "
            "jprune.trace_model(apply, params, *inputs)"
        )
    if all(hasattr(apply, name) for name in ("init", "apply", "bind")):
        raise TypeError(
            f"apply is the Linen module {type(apply).__name__}; pass a function that calls it with its parameters: "
            "jprune.trace_model(lambda p, x: module.apply({'params': p}, x), variables['params'], x)"
        )
    owner = getattr(apply, "__self__", apply)  # of a bound method
    if any(map(is_array, jax.tree.leaves(owner))) and not hasattr(apply, "func"):  # a partial may have arrays
        raise TypeError(
            f"apply is the model {type(owner).__name__}, whose own arrays would be constants; pass a function of its "
            "parameters. NNX: graphdef, params, rest = nnx.split(model, nnx.Param, ...), then jprune.trace_model("
            "lambda p, x: nnx.merge(graphdef, p, rest)(x), params, x). Equinox: eqx.partition and eqx.combine"
        )
    by_keyword = state is not None and _takes_state(apply, params, inputs, state)
    model = Model(apply, _shapes(params), tuple(map(_shapes, inputs)), _shapes(state), by_keyword)
    traced = model_jaxpr(model)
    record = Record()
    if not any(map(is_array, jax.tree.leaves(inputs))):
        record.constants = Kind.ACTIVATION  # a model without inputs computes from its constants
    for name, tree in (("params", params), ("state", state)):
        refuse_one_path_twice(name, [path for path, _ in _arrays(tree)])
    parameters = {path: _parameter(record, path, leaf) for path, leaf in _arrays(params)}
    if not parameters:
        raise ValueError("params has no array; pass the tree of parameters that apply takes")
    states = {path: _state(record, leaf) for path, leaf in _arrays(state)}
    arrays = [leaf for leaf in jax.tree.leaves(inputs) if is_array(leaf)]
    given = [_input(record, leaf) for leaf in arrays]
    program = run(record, traced.jaxpr, [*parameters.values(), *states.values(), *given])
    _finish_outputs(record, program, traced, list(states.values()), state)
    return _graph(record, program, parameters, states, model=model, traced=traced)


class Traced(NamedTuple):
    """A model's jaxpr as a function of arrays alone, and the tree of its outputs."""

    jaxpr: core.ClosedJaxpr
    outputs: PyTree


def _arrays(tree: PyTree) -> list[tuple[str, Leaf]]:
    arrays = Subset.of(tree, is_array)
    return list(zip(arrays.paths, arrays.leaves, strict=True))


def model_jaxpr(model: Model) -> Traced:
    """Trace a model with its shapes, as a function of its arrays: parameters, state and inputs."""
    arrays = Subset.of((model.params, model.state, model.inputs), is_array)

    def flat(*given: Array) -> PyTree:
        params, state, inputs = arrays.whole(given)
        return model(params, inputs, state)

    jaxpr, outputs = jax.make_jaxpr(flat, return_shape=True)(*arrays.leaves)
    return Traced(jaxpr, outputs)


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jaxprs.described(leaf) if is_array(leaf) else leaf, tree)


def _takes_state(apply: Callable[..., PyTree], params: PyTree, inputs: Sequence[PyTree], state: PyTree) -> bool:
    try:
        inspect.signature(apply).bind(params, *inputs, state=state)
    except (TypeError, ValueError):
        return False
    return True


def _parameter(record: Record, path: str, leaf: Leaf) -> Value:
    axes = []
    record.leaf_sizes[path] = math.prod(leaf.shape)
    for axis, size in enumerate(leaf.shape):
        axes.append(Axis(record.channels.fresh(size), (Source(path, axis),), zero=True))
    return Value(tuple(axes), Kind.PARAMETER)


def _state(record: Record, leaf: Leaf) -> Value:
    return Value(tuple(Axis(record.channels.fresh(size)) for size in leaf.shape), Kind.STATE)


def _input(record: Record, leaf: Leaf) -> Value:
    return Value(tuple(Axis(record.channels.frozen(size, "an axis of the model's inputs")) for size in leaf.shape))


def _finish_outputs(record: Record, program: Program, traced: Traced, states: list[Value], state: PyTree) -> None:
    """Freeze the outputs, and tie the channels of the new state to those of the old one."""
    new_state: list[Value] = []
    outputs = [without_numbers(record, value) for value in program.outputs]
    pair = traced.outputs if isinstance(traced.outputs, tuple) and len(traced.outputs) == 2 else None
    structures: list[object] = [jax.tree.structure(tree) for tree in (state, pair[1] if pair is not None else None)]
    if states and pair is not None and structures[0] == structures[1]:
        new_state = outputs[len(outputs) - len(jax.tree.leaves(pair[1])) :]
        if [value.shape for value in new_state] != [value.shape for value in states]:
            new_state = []
    for value in outputs[: len(outputs) - len(new_state)]:
        for axis in value.axes:
            record.channels.freeze(axis.ids, "an axis of the model's outputs")
    for old, new in zip(states, new_state, strict=bool(new_state)):
        for a, b in zip(old.axes, new.axes, strict=True):
            record.channels.tie(a.ids, b.ids)


def _graph(
    record: Record,
    program: Program,
    parameters: Mapping[str, Value],
    states: Mapping[str, Value],
    *,
    model: Model,
    traced: Traced,
) -> Graph:
    solution = record.channels.solve()
    roles = _roles(record, program)
    _separate_experts(roles, parameters, solution)
    groups = dict(record.groups)
    made = _of_made_kernels(record, parameters, solution)
    axes: dict[str, KernelAxes | None] = {}
    unknown: dict[str, str] = {}
    for path, value in parameters.items():
        found = [roles.get(Source(path, axis), set()) for axis in range(len(value.axes))]
        missing = [axis for axis, what in enumerate(found) if not what and value.axes[axis].size > 1]
        named = sorted({name for leaf, name in record.unknown if leaf == path})
        if named:
            unknown[path] = f"'{named[0]}' reads it and is not supported"
        elif path in made:
            unknown[path] = "data multiply it, and the result is the kernel of a convolution"
        elif missing:
            mixed = dict(record.mixed).get(Source(path, missing[0]))
            what = "it" if len(missing) == len(found) and not mixed else f"its axis {missing[0]}"
            unknown[path] = f"nothing reads {what}" + (f" but '{mixed}'" if mixed else "")
        axes[path] = None if path in unknown else _kernel_axes(found, groups.get(path, 1))
    for name in sorted({name for _, name in record.unknown}):
        leaves = ", ".join(f"'{leaf}'" for leaf in dict.fromkeys(leaf for leaf, n in record.unknown if n == name))
        warnings.warn(
            f"the primitive '{name}' is not supported; the axes of the leaves it reads are unknown, and products that "
            f"read its result are not counted for them: {leaves}; "
            "pass axes={'<path>': jprune.KernelAxes(...)} for them where they are needed",
            stacklevel=3,
        )
    for left, right in dict.fromkeys(record.products):
        warnings.warn(
            f"the product of '{left}' and '{right}' is read as one kernel; if one of the two is data, such as learned "
            "queries, the roles of the axes of the other are wrong: repeat the data over the batch before the product, "
            "or pass axes={'<path>': jprune.KernelAxes(...)}",
            stacklevel=3,
        )
    leaf_axes = [
        LeafAxis(path, axis, ids, tree is states)
        for tree in (parameters, states)
        for path, value in tree.items()
        for axis, ids in enumerate(value.ids)
    ]
    stacked = {
        path: tuple(axis for axis in found.stacked if parameters[path].axes[axis].size > 1)
        for path, found in axes.items()
        if found is not None
    }
    counted = dict.fromkeys(parameters, 0)
    for leaf, count in record.multiply_adds:
        if leaf is not None:
            counted[leaf] += count
    return Graph(
        axes=axes,
        shapes={path: value.shape for path, value in parameters.items()},
        kernels=tuple(path for path in parameters if _is_kernel(roles, path, len(parameters[path].axes))),
        channels=channel_groups(leaf_axes, solution, stacked),
        frozen=_frozen(leaf_axes, solution),
        unknown=unknown,
        multiply_adds=counted,
        in_while_loops=tuple(sorted(set(record.uncounted))),
        other_multiply_adds=sum(count for leaf, count in record.multiply_adds if leaf is None),
        program=program,
        roots=solution.roots,
        outputs=jax.tree.structure(traced.outputs),
        model=model,
    )


def _roles(record: Record, program: Program) -> dict[Source, set[str]]:
    """Collect the roles; the role of the rank axis of a low-rank product follows from its other axes."""
    roles: dict[Source, set[str]] = {}
    for source, what in record.roles:
        roles.setdefault(source, set()).add(what)
    for contracted, free, _ in reversed(record.factors):
        if all(source in roles for source in contracted):
            continue
        others = set().union(*(roles.get(source, set()) for source in free)) & {"inputs", "outputs"}
        for source in contracted:
            roles.setdefault(source, set()).update({"inputs": "outputs", "outputs": "inputs"}[what] for what in others)
    for value in program.outputs:  # a parameter that is returned unchanged
        for axis in value.axes:
            for source in axis.sources:
                if not any(Source(source.path, k) in roles for k in range(len(value.axes))):
                    roles[source] = {"outputs"}
    return roles


def _of_made_kernels(record: Record, parameters: Mapping[str, Value], solution: Solution) -> set[str]:
    """Return the parameters that data turn into the kernel of a convolution: a weighted sum of kernels, or one scaled.

    They share two axes or more with it. A kernel of features, as in a correlation, has only the channels of a layer.
    """
    windows = {int(solution.labels[axis.ids[0]]) for kernel in record.made_kernels for axis in kernel.axes[2:]}
    channels = {int(part.ids[0]) for kernel in record.made_kernels for axis in kernel.axes[:2] for part in axis.merged}

    def shared(axis: Axis) -> bool:
        return axis.size > 1 and (int(axis.ids[0]) in channels or int(solution.labels[axis.ids[0]]) in windows)

    return {path for path, value in parameters.items() if sum(map(shared, value.axes)) > 1}


def _separate_experts(roles: dict[Source, set[str]], parameters: Mapping[str, Value], solution: Solution) -> None:
    """Settle which axes are over experts, and turn output axes into stacked axes where each index feeds its own expert.

    An axis of a kernel after its inputs is over heads of one layer, and so is the axis of the next kernel that reads
    these heads and units. Axes before the inputs are over experts, if one kernel makes the units of all of them; what
    is gated may also be channels or positions. So are axes that are the last of both kernels, as under ``vmap``. This
    applies to leaves that have other outputs too; a router, which has none, keeps its outputs.
    """

    def label(source: Source) -> int:
        labels = solution.labels[parameters[source.path].axes[source.axis].ids]
        return int(labels[0]) if len(labels) > 1 and labels[0] >= FIRST_CHANNEL else 0

    def all_of(path: str, what: str) -> list[Source]:
        sources = [Source(path, axis) for axis in range(len(parameters[path].axes))]
        return [source for source in sources if roles.get(source) == {what} and parameters[path].shape[source.axis] > 1]

    outputs = {path: all_of(path, "outputs") for path in parameters}
    first = {
        path: min((s.axis for s in all_of(path, "inputs")), default=len(parameters[path].axes)) for path in parameters
    }
    heads = {
        (label(s), label(u))
        for path in parameters
        for s in outputs[path]
        for u in outputs[path]
        if s.axis > first[path]
    }
    for source in [source for source, what in roles.items() if "experts" in what]:
        units = {label(unit) for unit in all_of(source.path, "inputs")} - {0}
        of_heads = any((label(source), unit) in heads for unit in units)
        makers = [path for path in parameters if not units.isdisjoint(map(label, outputs[path]))]
        together = any(label(source) in map(label, outputs[path] + all_of(path, "stacked")) for path in makers)
        is_expert = not of_heads and (together or not makers)
        roles[source] = roles[source] - {"experts"} | {"stacked" if is_expert else "inputs"}

    def is_last(source: Source) -> bool:
        return source.axis == len(parameters[source.path].axes) - 1

    stacked = [source for path in parameters for source in all_of(path, "stacked") if label(source)]
    stacks, last = {label(source) for source in stacked}, {label(source) for source in stacked if is_last(source)}
    for path in parameters if stacks else ():
        experts = [
            s for s in outputs[path] if label(s) in (stacks if s.axis < first[path] else last if is_last(s) else ())
        ]
        if len(experts) < len(outputs[path]):
            roles.update({source: {"stacked"} for source in experts})


def _kernel_axes(found: Sequence[set[str]], groups: int) -> KernelAxes:
    named: dict[str, tuple[int, ...]] = {}
    for role in _ROLES:
        also = {"inputs": "indexed"}.get(role, role)
        named[role] = tuple(axis for axis, what in enumerate(found) if role in what or also in what)
    named["spatial"] = tuple(axis for axis in named["spatial"] if axis not in named["inputs"])  # a flattened window
    unread = tuple(axis for axis, what in enumerate(found) if not what)  # of size one
    named["stacked"] = tuple(sorted({*named["stacked"], *unread}))
    return KernelAxes(**named, groups=groups)


def _is_kernel(roles: Mapping[Source, set[str]], path: str, rank: int) -> bool:
    return any({"inputs", "spatial"} & roles.get(Source(path, axis), set()) for axis in range(rank))


def _frozen(axes: Sequence[LeafAxis], solution: Solution) -> dict[tuple[str, int], str]:
    found = {}
    for axis in axes:
        why = solution.why[axis.ids]
        if not axis.is_state and why.any() and len(axis.ids) > 1:
            reasons = "; ".join(solution.reasons[reason] for reason in np.unique(why[why > 0]))
            part = "" if why.all() else f"{np.count_nonzero(why)} of {len(why)}: "
            found[axis.path, axis.axis] = part + reasons
    return found
