"""Capture the preactivations of a Flax model, in the order in which its layers are called."""

import re
from collections import Counter, OrderedDict
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jprune._extras import missing
from jprune.jumpstart import tagging
from jprune.jumpstart.layers import Stack
from jprune.trees import check_pattern, with_article

Captured = OrderedDict[str, PyTree]
_Layer: TypeAlias = Array | Stack
_NamedCall: TypeAlias = tuple[str, bool, _Layer | None]  # (name, hidden, value; None for a skipped layer)


def preactivations(
    model: object,
    *args: PyTree,
    include: str | None = None,
    exclude: str | None = None,
    skip_last: bool = True,
    stacked: bool = False,
    method: tagging.Method = None,
    **kwargs: PyTree,
) -> Captured:
    """Call a model and return the outputs of its linear and convolutional layers, before any normalization.

    The layers are the Linear, LinearGeneral, Einsum, Conv and ConvTranspose of an NNX model, the
    Dense, DenseGeneral, Einsum, Conv, ConvLocal and ConvTranspose of a Linen module, and their subclasses. The model
    needs no changes and is not modified: batch statistics, counts of random streams and caches do not change. It runs
    in its current mode. This works under jit, grad and vmap, and in threads. Outside jit the model is traced at each
    call, so use jit for repeated calls.

    A layer that is called several times is returned as ``path#0``, ``path#1``, ... Layers under scan, and layers whose
    weights vmap maps over, are separate layers: ``path[0]``, ``path[1]``, ...; the layers of a scanned block are in the
    order in which they run. vmap over shared weights adds a leading axis of data; the penalty takes the first axis as
    the batch, so of several such vmaps the one over examples must be outermost.

    Args:
      model: an ``nnx.Module``; or a Linen module, followed by its variables.
      *args: arguments of the model, x first.
      include: a regular expression searched for in the names, which selects the layers to return.
      exclude: a regular expression for the layers to leave out.
      skip_last: leave out the layer that is called last, the network's output layer; if ``vmap`` maps over its weights,
        each of its layers.
      stacked: return scanned and stacked layers as one ``Stack`` each, under the path without index, at the
        position of the first step, with the layers in the order in which they ran. The penalty of a ``Stack`` is
        much cheaper than that of its slices. If a scanned block has several layers, each has its own ``Stack``, so the
        result is not in call order, which ``point_efficiency`` of ``activity`` needs.
      method: what to call instead of ``__call__``: a name, or a function of the model.
      **kwargs: passed to the model, or with Linen to ``apply``, such as ``rngs`` and ``mutable``.

    Returns:
      An ``OrderedDict`` from the '/'-joined paths of the layers' parameters to arrays (batch, ..., units), in call
      order. If a layer has several axes of output features, such as the (heads, dim) of an attention projection, they
      are flattened into one axis of units. So are other axes at whose indices a LinearGeneral, DenseGeneral or Einsum
      has separate weights, such as a first axis of experts. The first of the other axes is the batch; if there is none,
      it is the first axis.

    Raises:
      ImportError: flax is not installed.
      TypeError: ``model`` is neither an NNX nor a Linen model, or a pattern is not a string.
      ValueError: a pattern is not a regular expression or matches no layer, no layer is left, or a Linen layer is
        inside a lifted transformation that does not lift 'intermediates'.
      NotImplementedError: a layer is called inside a branch, a while loop or a custom derivative.

    >>> import jax
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    >>> x = jax.numpy.ones((4, 2))
    >>> {path: z.shape for path, z in preactivations(model, x, skip_last=False).items()}
    {'layers/0': (4, 3), 'layers/2': (4, 1)}
    """
    choice = _Choice(include, exclude, skip_last, stacked)
    found = _capture(model, args, kwargs, method, update=False)[1]
    return choice.of(found, model)


def call_with_preactivations(
    model: object,
    *args: PyTree,
    include: str | None = None,
    exclude: str | None = None,
    skip_last: bool = True,
    stacked: bool = False,
    method: tagging.Method = None,
    **kwargs: PyTree,
) -> tuple[PyTree, Captured]:
    """Call a model once and return its outputs and its preactivations.

    An NNX model is updated as by ``model(x)``: batch statistics and counts of random streams change, including those of
    ``nnx.Rngs`` among the arguments. For a Linen module the outputs are those of ``apply``: with
    ``mutable=["batch_stats"]``, the outputs and the updated collections.

    Arguments and errors are those of ``preactivations``.

    Returns:
      (outputs, preactivations).

    >>> import jax
    >>> from flax import nnx
    >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
    >>> y, preacts = call_with_preactivations(model, jax.numpy.ones((4, 2)))
    >>> y.shape, list(preacts)
    ((4, 1), ['layers/0'])
    """
    choice = _Choice(include, exclude, skip_last, stacked)
    outputs, found = _capture(model, args, kwargs, method, update=True)
    return outputs, choice.of(found, model)


class _Choice:
    """The checked options of a capture: which layers to return, and how."""

    def __init__(self, include: str | None, exclude: str | None, skip_last: bool, stacked: bool):
        self._patterns = {"include": _compiled("include", include), "exclude": _compiled("exclude", exclude)}
        self._skip_last = skip_last
        self._stacked = stacked

    def of(self, found: list[tagging.Tagged], model: object) -> Captured:
        """Select from the tagged values, in call order."""
        if not found:
            raise ValueError(
                f"{type(model).__name__} called no layer that has preactivations; it needs a linear or convolutional "
                "layer of Flax"
            )
        if self._stacked:
            calls = _stacks(found, self._skip_last)
        else:
            calls = _singles(tagging.in_call_order(found), found[-1].together if self._skip_last else 0)
        names = [name for name, _, _ in calls]
        for argument, pattern in self._patterns.items():
            if pattern is not None and not any(pattern.search(name) for name in names):
                raise ValueError(
                    f"{argument}={pattern.pattern!r} matches no layer; the model called {', '.join(names)}"
                )
        kept = OrderedDict((name, value) for name, hidden, value in calls if self._keeps(name, hidden, value))
        if not kept:
            raise ValueError(f"include, exclude and skip_last={self._skip_last} leave no layer of {', '.join(names)}")
        return kept

    def _keeps(self, name: str, hidden: bool, value: _Layer | None) -> bool:
        include, exclude = self._patterns["include"], self._patterns["exclude"]
        wanted = include is None or include.search(name)
        if value is None or not wanted or (exclude is not None and exclude.search(name)):
            return False
        if hidden:
            raise ValueError(
                f"layer '{name}' runs inside a lifted transformation (nn.scan, nn.vmap, ...) that does not lift the"
                " collection 'intermediates'; add it: variable_axes={..., 'intermediates': 0}. nn.WeightNorm cannot"
                f" lift it: leave its layer out with exclude='^{re.escape(name)}$'"
            )
        return True


def _compiled(argument: str, pattern: str | None) -> re.Pattern[str] | None:
    if pattern is None:
        return None
    check_pattern(f"{argument}={pattern!r}", pattern)
    return re.compile(pattern)


def _capture(
    model: object, args: tuple[PyTree, ...], kwargs: dict[str, PyTree], method: tagging.Method, update: bool
) -> tuple[PyTree, list[tagging.Tagged]]:
    """Call a model of either kind; flax is imported here because the rest of jumpstart does not need it."""
    try:
        import flax.linen  # noqa: PLC0415
        import flax.nnx  # noqa: PLC0415

        from jprune.jumpstart import linen, nnx  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(missing("preactivations needs flax", "flax")) from error
    if isinstance(model, flax.linen.Module):
        if not args:
            raise TypeError("a Linen module must be followed by its variables and its inputs: (module, variables, x)")
        return linen.capture(model, args[0], args[1:], kwargs, method)
    if isinstance(model, flax.nnx.Module):
        return nnx.capture(model, args, kwargs, method, update)
    raise TypeError(
        f"model is {with_article(model)}; it must be an nnx.Module or a Linen module. For any other model, collect the "
        "preactivations in its own code, as a list of one array (batch, ..., units) per layer, for jumpstart_penalty, "
        "add_jumpstart, unit_status and point_status"
    )


def _singles(calls: list[tagging.Call], skipped: int) -> list[_NamedCall]:
    """Name single calls: path[step] under scans and stacks, #call if a name recurs; skip the last ones."""
    names = _numbered([call.name + "".join(f"[{step}]" for step in call.place) for call in calls])
    last = len(calls) - skipped
    values: list[_Layer | None] = [call.value if i < last else None for i, call in enumerate(calls)]
    return list(zip(names, (call.hidden for call in calls), values, strict=True))


def _stacks(found: list[tagging.Tagged], skip_last: bool) -> list[_NamedCall]:
    """Name tags by path; a scanned or stacked tag becomes one ``Stack`` of its layers in call order."""
    values: list[_Layer | None] = [_stack(t) if t.steps else t.value for t in found]
    if skip_last:
        last, skipped = values[-1], found[-1].together
        if isinstance(last, Stack) and last.values.shape[0] > skipped:
            values[-1] = Stack(last.values[:-skipped])
        else:
            values[-1] = None
    return list(zip(_numbered([t.name for t in found]), (t.hidden for t in found), values, strict=True))


def _stack(tagged: tagging.Tagged) -> Stack:
    backwards = [axis for axis, (_, _, reverse) in enumerate(tagged.steps) if reverse]
    value = jnp.flip(tagged.value, tuple(backwards)) if backwards else tagged.value
    return Stack(value.reshape(-1, *value.shape[len(tagged.steps) :]))


def _numbered(names: list[str]) -> list[str]:
    """Append #0, #1, ... to names that occur more than once.

    >>> _numbered(["a", "b", "a"])
    ['a#0', 'b', 'a#1']
    """
    total, seen = Counter(names), Counter[str]()
    numbered = []
    for name in names:
        numbered.append(f"{name}#{seen[name]}" if total[name] > 1 else name)
        seen[name] += 1
    return numbered
