"""Collect values that are tagged inside a traced function, through transformations.

``tag(y, weight, name)`` is the identity. ``collect(f)`` traces f once and evaluates the jaxpr, collecting the tagged
values in call order: through jit and remat, one for each step of a scan, and out of vmap with the mapped axis in front.
The functions in between need no changes. Nothing is written to shared objects, so no tracer leaks, and threads do not
interfere.
"""

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Primitive, Var, jaxprs_in_params, primitives
from jax.interpreters import ad, batching
from jaxtyping import Array, PyTree

from jprune import jaxprs

# How to call a model: the name of a method, a function of the model, or None for `__call__`.
Method: TypeAlias = str | Callable[..., PyTree] | None

_tag_p = Primitive("jprune_tag")
_tag_p.def_abstract_eval(lambda y, weight, **_: y)  # type: ignore[no-untyped-call]


def tag(y: Array, weight: Array, name: str, hidden: bool = False, units: tuple[int, ...] = (-1,)) -> Array:
    """Tag y, the output of a layer with this name and weight, for the enclosing ``collect``.

    Args:
      y: the output.
      weight: the weight, mapped by ``vmap`` if the layer is a stack of layers.
      name: the name of the layer.
      hidden: a flag that is returned with the value.
      units: the axes of y at whose indices the layer has separate weights, ascending and counted from the end; in the
        collected value they are one axis, the last.
    """
    params = {"name": name, "hidden": hidden, "units": units, "mapped": ()}
    tagged: Array = _tag_p.bind(y, weight, **params)  # type: ignore[no-untyped-call]
    return tagged


def _batch_tag(
    args: tuple[Array, Array], dims: tuple[int | None, int | None], *, mapped: tuple[bool, ...], **params: object
) -> tuple[Array, int | None]:
    """Batch a tag: mapped weights are a stack of layers, shared weights one layer with more data."""
    (y, weight), (y_dim, weight_dim) = args, dims
    if y_dim is None:
        return _tag_p.bind(y, weight, mapped=mapped, **params), None  # type: ignore[no-untyped-call]
    y = jnp.moveaxis(y, y_dim, 0)
    return _tag_p.bind(y, weight, mapped=(weight_dim is not None, *mapped), **params), 0  # type: ignore[no-untyped-call]


def _differentiate_tag(
    primals: tuple[Array, Array], tangents: tuple[PyTree, PyTree], **params: object
) -> tuple[Array, PyTree]:
    return _tag_p.bind(*primals, **params), tangents[0]  # type: ignore[no-untyped-call]


batching.primitive_batchers[_tag_p] = _batch_tag
ad.primitive_jvps[_tag_p] = _differentiate_tag


class Tagged(NamedTuple):
    """One tagged call, or one tag of a scanned body.

    Attributes:
      name: the name given to the tag.
      hidden: the flag given to the tag.
      value: the value; the axes of scan steps and stacked layers come first, outermost first, and the axis of units
        last.
      steps: for each such axis (scan identity or None, length, whether the scan runs backwards).
        Tags with the same scan identity were called in turn, step by step.
    """

    name: str
    hidden: bool
    value: Array
    steps: tuple[tuple[object, int, bool], ...]

    @property
    def together(self) -> int:
        """The number of layers that are called at once: those of stacks, which follow the scans among the steps."""
        return math.prod(length for scan, length, _ in self.steps if scan is None)


def collect(f: Callable[[], PyTree]) -> tuple[PyTree, list[Tagged]]:
    """Call f once; return its result and every value tagged during the call.

    Args:
      f: a function of no arguments; it is traced, so it may close over arrays and tracers of
        transformations outside, but not branch on their values.

    Returns:
      The outputs of f, with leaves that are not arrays unchanged, and the tagged values in call order; the tags of one
      scanned body are consecutive.

    Raises:
      NotImplementedError: a value is tagged inside a branch, a while loop, a custom derivative or another construct
        from which it cannot be returned.
    """
    returned: list[PyTree] = []

    def arrays() -> list[Array]:
        leaves, treedef = jax.tree.flatten(f())
        returned[:] = [leaves, treedef]
        return [leaf for leaf in leaves if isinstance(leaf, jax.Array)]

    evaluated, found = _evaluate(jax.make_jaxpr(arrays)(), ())
    leaves, treedef = returned
    values = iter(evaluated)
    return jax.tree.unflatten(treedef, [next(values) if isinstance(x, jax.Array) else x for x in leaves]), found


class Call(NamedTuple):
    """One call of a layer: its name, the step of each scan or stack around it, and its value."""

    name: str
    hidden: bool
    place: tuple[int, ...]
    value: Array


def in_call_order(found: list[Tagged]) -> list[Call]:
    """Split scans and stacks into single calls, in the order in which they ran.

    The tags of one scanned body alternate: all tags of step 0, then all tags of step 1, ...
    """
    return _taken_apart([(tagged, ()) for tagged in found])


def _taken_apart(found: list[tuple[Tagged, tuple[int, ...]]]) -> list[Call]:
    calls = []
    while found:
        tagged, index = found[0]
        if not tagged.steps:
            calls.append(Call(tagged.name, tagged.hidden, index, tagged.value))
            found = found[1:]
            continue
        scan, length, backwards = tagged.steps[0]
        together = 1
        while scan is not None and together < len(found) and _scan_of(found[together][0]) is scan:
            together += 1
        for step in reversed(range(length)) if backwards else range(length):
            calls += _taken_apart(
                [(t._replace(value=t.value[step], steps=t.steps[1:]), (*i, step)) for t, i in found[:together]]
            )
        found = found[together:]
    return calls


def _scan_of(tagged: Tagged) -> object:
    return tagged.steps[0][0] if tagged.steps else None


def _evaluate(closed: jaxprs.Program, args: Iterable[jaxprs.Value]) -> tuple[list[jaxprs.Value], list[Tagged]]:
    """Evaluate a jaxpr, closed or not; return its outputs and its tagged values."""
    jaxpr = jaxprs.opened(closed)
    values = jaxprs.known(closed, args)
    found: list[Tagged] = []

    def read(atom: Literal | Var) -> jaxprs.Value:
        return atom.val if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        inputs = [read(atom) for atom in equation.invars]
        if equation.primitive is _tag_p:
            outputs = inputs[:1]
            found.append(_tagged(inputs[0], **equation.params))
        elif any(_names(inner) for inner in jaxprs_in_params(equation.params)):
            with equation.ctx.manager:
                outputs, tagged = _rule(equation)(equation, inputs)
            found += tagged
        else:
            outputs = jaxprs.bound(equation, inputs)
        values.update(zip(equation.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars], found


def _names(jaxpr: Jaxpr) -> list[str]:
    """Return the names tagged in a jaxpr, at any depth."""
    names = []
    for equation in jaxpr.eqns:
        if equation.primitive is _tag_p:
            names.append(equation.params["name"])
        for inner in jaxprs_in_params(equation.params):
            names += _names(inner)
    return names


def _rule(equation: JaxprEqn) -> Callable[[JaxprEqn, list[jaxprs.Value]], tuple[list[jaxprs.Value], list[Tagged]]]:
    if equation.primitive not in _RULES:
        names = [name for inner in jaxprs_in_params(equation.params) for name in _names(inner)]
        raise NotImplementedError(
            f"layer '{names[0]}' is called inside '{equation.primitive}', from which its preactivations"
            " cannot be returned; call layers only under jit, remat, scan and vmap"
        )
    return _RULES[equation.primitive]


def _through_call(equation: JaxprEqn, inputs: list[jaxprs.Value]) -> tuple[list[jaxprs.Value], list[Tagged]]:
    (program,) = jaxprs.subjaxprs(equation)
    return _evaluate(program, inputs)


def _through_remat(equation: JaxprEqn, inputs: list[jaxprs.Value]) -> tuple[list[jaxprs.Value], list[Tagged]]:
    body = _Split(equation.params["jaxpr"])
    options = {name: equation.params[name] for name in ("prevent_cse", "policy")}
    outputs, values = jax.checkpoint(body, **options)(*inputs)
    return outputs, body.tagged(values)


def _through_scan(equation: JaxprEqn, inputs: list[jaxprs.Value]) -> tuple[list[jaxprs.Value], list[Tagged]]:
    fixed, carried = jaxprs.scan_parts(equation)
    consts, carry, xs = inputs[:fixed], inputs[fixed : fixed + carried], inputs[fixed + carried :]
    step = _Split(equation.params["jaxpr"])

    def body(carry: list[Array], xs: list[Array]) -> tuple[list[Array], PyTree]:
        outputs, values = step(*consts, *carry, *xs)
        return outputs[:carried], (outputs[carried:], values)

    options = {name: equation.params[name] for name in ("length", "reverse", "unroll")}
    carry, (ys, values) = jax.lax.scan(body, carry, xs, **options)
    steps = (object(), options["length"], options["reverse"])
    return [*carry, *ys], [t._replace(steps=(steps, *t.steps)) for t in step.tagged(values)]


_RULES: dict[Primitive, Callable[[JaxprEqn, list[jaxprs.Value]], tuple[list[jaxprs.Value], list[Tagged]]]] = {
    primitives.jit_p: _through_call,
    primitives.closed_call_p: _through_call,
    primitives.remat_p: _through_remat,
    primitives.scan_p: _through_scan,
}


class _Split:
    """A jaxpr as a traceable function that returns outputs and tagged values as arrays."""

    def __init__(self, jaxpr: jaxprs.Program):
        self._jaxpr = jaxpr
        self._found: list[Tagged] = []

    def __call__(self, *args: jaxprs.Value) -> tuple[list[jaxprs.Value], list[Array]]:
        outputs, self._found = _evaluate(self._jaxpr, args)
        return outputs, [tagged.value for tagged in self._found]

    def tagged(self, values: list[Array]) -> list[Tagged]:
        """Attach names to the values that the transformed function returned."""
        return [t._replace(value=value) for t, value in zip(self._found, values, strict=True)]


def _tagged(y: Array, *, name: str, hidden: bool, units: tuple[int, ...], mapped: tuple[bool, ...]) -> Tagged:
    """Move the axes of stacked layers to the front, before additional axes of data, and join those of units."""
    stacked = [axis for axis, is_stack in enumerate(mapped) if is_stack]
    value = jnp.moveaxis(y, stacked, range(len(stacked)))
    if len(units) == y.ndim - len(stacked) > 1:
        units = units[1:]  # the first axis is the batch
    if units != (-1,):
        value = jnp.moveaxis(value, units, range(-len(units), 0))
        value = value.reshape(*value.shape[: -len(units)], -1)
    return Tagged(name, hidden, value, tuple((None, y.shape[axis], False) for axis in stacked))
