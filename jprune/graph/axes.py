r"""The role of each axis of a kernel, and the ``axes=`` argument that every selection, score and table takes.

Selections that depend on layers, inputs or outputs resolve their ``axes=`` argument with one call::

    found = kernel_axes(axes, tree)       # {path: KernelAxes, or None where the axes are unknown}
    if found[path] is None:
        raise ValueError(unknown_axes(path, leaf.shape, "n:m groups run along the inputs", axes))

``axes`` is one of

* a graph made by ``jprune.trace_model``: exact, for any model that can be traced;
* ``{regex: KernelAxes(...)}``: patterns searched for in the paths; the first that matches decides, and leaves that
  match no pattern follow the rule for None;
* ``"flax"`` or ``"equinox"``: every leaf follows the convention of that library's layers, by its name;
* None: the convention is inferred from the leaf's name and shape if they are unambiguous.

=============  ===============================  ==============================  ===========================
convention     1-D                              2-D                             3-D and more
=============  ===============================  ==============================  ===========================
``"flax"``     ``bias``, ``scale``: outputs     ``kernel``, ``lora_a``,         ``kernel``: (\*spatial, in,
                                                ``lora_b``: (in, out);          out); attention's
                                                ``embedding``: (rows, out)      ``query``, ``key``,
                                                                                ``value``: (in, heads, dim);
                                                                                its ``out``: (heads, dim,
                                                                                out)
``"equinox"``  ``bias``, ``weight``: outputs    ``weight``, ``weight_ih``,      ``weight``: (out, in,
                                                ``weight_hh``: (out, in)        \*spatial)
None           outputs                          ``weight``, ``weight_ih``,      4-D ``kernel`` of a square
                                                ``weight_hh``: (out, in);       or 1 x k window: (h, w, in,
                                                ``bias``, ``scale``: unknown;   out); 4-D ``weight``, same
                                                any other name: (in, out)       windows: (out, in, h, w);
                                                                                others: unknown
=============  ===============================  ==============================  ===========================

A 3-D ``kernel`` can be a 1-D convolution, stacked dense layers or an attention projection, so without
``axes`` its axes are unknown. So are the axes of any leaf that no row covers, of one with a window of k x 1 and no bias
(which may be k layers), of a ``kernel`` or ``weight`` whose bias does not have one number for each output, and of
attention kernels with more than 2 axes. Libraries store some kernels in different orders, so the axes are also unknown
if the layer's name contains "transpose" or "deconv", "einsum" (unless the bias distinguishes outputs from inputs) or
"depthwise" (with several inputs). Such layers with other names and without a bias are read as the table says, without a
warning.

Attention kernels with more axes are stacked along the first ones if the kernels of ``query``, ``key``, ``value`` and
``out`` agree on the sizes of these axes, of heads and of dim; otherwise they are unknown. If the tree has the layer's
bias, and it does not have one number for each output, the axes are unknown. Without a bias, a kernel with 3 axes is
a convolution only if its layer's name contains "conv", and one with more only if its window has the same size along
all axes, apart from sizes of 1; the axes of the rest are unknown, and so are those of a layer called einsum. Names and
shapes distinguish no further: pass a graph or a dict for scanned or mapped convolutions, and in Flax for LinearGeneral
and DenseGeneral over several axes (read as convolutions), and for Einsum, ConvLocal and
``ConvTranspose(transpose_kernel=True)`` without a bias.

The bias and the other kernels of attention are looked for among all parameters, also by a score and in ``prune``, which
select some of them. A selection that is called directly sees the scores alone: pass it
``axes=jprune.prunable(params, axes="flax")``, which has resolved the convention on the parameters.
"""

import contextlib
import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Protocol, runtime_checkable

from jaxtyping import PyTree

from jprune.trees import (
    ByPath,
    Leaf,
    Where,
    first_matches,
    flatten,
    is_float,
    kernels,
    refuse_one_path_twice,
    with_article,
)

_ROLES = ("stacked", "inputs", "outputs", "spatial")
_PROJECTIONS = ("query", "key", "value", "out")  # the layers of Flax's attention
_EQUINOX_KERNELS = ("weight", "weight_ih", "weight_hh")
KERNEL_NAMES = {"flax": ("kernel", "lora_a", "lora_b"), "equinox": _EQUINOX_KERNELS}  # names of kernels by convention


@dataclasses.dataclass(frozen=True)
class KernelAxes:
    """The role of every axis of one parameter.

    A tied weight is read in two ways, so one axis can have two roles: an embedding (vocabulary, features)
    that is also the output layer has inputs=(0, 1) and outputs=(0, 1).

    Attributes:
      stacked: axes over separate layers (``scan`` or ``vmap`` over layers) or experts.
      inputs: axes that the layer sums over, or indexes (embeddings).
      outputs: axes that the layer's output has.
      spatial: window axes of a convolution; these are summed over too.
      groups: number of feature groups of a grouped convolution; its inputs axis has the inputs of one group.

    >>> KernelAxes(stacked=(0,), inputs=(1,), outputs=(2, 3))  # attention queries of scanned blocks
    KernelAxes(stacked=(0,), inputs=(1,), outputs=(2, 3), spatial=(), groups=1)
    """

    stacked: tuple[int, ...] = ()
    inputs: tuple[int, ...] = ()
    outputs: tuple[int, ...] = ()
    spatial: tuple[int, ...] = ()
    groups: int = 1

    @property
    def tied(self) -> bool:
        """Whether an axis has more than one role, because the leaf is read in more than one way."""
        named = [axis for role in _ROLES for axis in getattr(self, role)]
        return len(named) != len(set(named))


@runtime_checkable
class HasAxes(Protocol):
    """The part of a graph that ``kernel_axes`` reads; ``jprune.trace_model`` returns a graph."""

    @property
    def axes(self) -> Mapping[str, KernelAxes | None]:
        """The axes of each leaf, by path."""
        ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The shape of each leaf, by path."""
        ...

    @property
    def unknown(self) -> Mapping[str, str]:
        """Why the axes of a leaf are unknown, by path."""
        ...


Axes = HasAxes | Mapping[str, KernelAxes] | str | None
Shapes = tuple[tuple[str, tuple[int, ...]], ...]  # of leaves, by path

_known_shapes: ContextVar[Shapes] = ContextVar("known_shapes", default=())


def shapes_of(params: PyTree) -> Shapes:
    """Return the shape of every array of a tree, hashable."""
    paths, leaves, _ = flatten(params)
    return tuple((path, tuple(leaf.shape)) for path, leaf in zip(paths, leaves, strict=True) if hasattr(leaf, "shape"))


@contextlib.contextmanager
def known_shapes(shapes: Shapes) -> Iterator[None]:
    """Let conventions use the shapes of all parameters where ``kernel_axes`` gets some of them, such as scores."""
    token = _known_shapes.set(shapes)
    try:
        yield
    finally:
        _known_shapes.reset(token)


def kernel_axes(axes: Axes, tree: PyTree) -> dict[str, KernelAxes | None]:
    """Resolve an ``axes=`` argument to the axes of every leaf of a tree.

    Args:
      axes: a graph, ``{regex: KernelAxes(...)}``, ``"flax"``, ``"equinox"`` or None; see the module's
        description for the conventions.
      tree: parameters, scores or masks; leaves that are not arrays (None, functions) are left out.

    Returns:
      A dict from the leaf's path to its axes, or to None where these are unknown.

    Raises:
      TypeError: ``axes`` is something else, or a value of the dict is not a ``KernelAxes``.
      ValueError: a pattern matches no leaf, or only leaves that an earlier one matches; an axis is out of range,
        named twice or not at all; the graph has no leaf of that path and shape; two leaves have the same path.

    >>> import jax.numpy as jnp
    >>> stacked = KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,))
    >>> kernel_axes({"^blocks/": stacked}, {"blocks": {"kernel": jnp.ones((4, 16, 16))}})
    {'blocks/kernel': KernelAxes(stacked=(0,), inputs=(1,), outputs=(2,), spatial=(), groups=1)}
    """
    paths, leaves, _ = flatten(tree)
    refuse_one_path_twice("the tree", [path for path, leaf in zip(paths, leaves, strict=True) if leaf is not None])
    shapes = {path: tuple(leaf.shape) for path, leaf in zip(paths, leaves, strict=True) if hasattr(leaf, "shape")}
    if axes is None or isinstance(axes, str):
        known = {**dict(_known_shapes.get()), **shapes}
        attention = _attention_modules([*known, *paths])
        if axes is None:
            return {path: _guess(path, known, attention) for path in shapes}
        left_out = set(paths) - set(known)  # such as the biases of scores
        if axes == "flax":
            return {path: _flax(path, known, attention, left_out) for path in shapes}
        if axes == "equinox":
            return {path: _equinox(path, known, left_out) for path in shapes}
        raise ValueError(f"axes={axes!r} is not a convention; use 'flax', 'equinox', a graph or a dict of KernelAxes")
    if isinstance(axes, Mapping):
        return _by_pattern(axes, paths, shapes)
    if isinstance(axes, HasAxes):
        return {path: _of_graph(axes, path, shape) for path, shape in shapes.items()}
    raise TypeError(
        f"axes={axes!r} is {with_article(axes)}; it must be a graph (jprune.trace_model), "
        "{regex: jprune.KernelAxes(...)}, 'flax', 'equinox' or None"
    )


def where_of(where: Where | None, axes: Axes) -> Where:
    """Return ``where``, or if it is None the default: ``kernels``, or the kernels of a graph or of a convention.

    A ``by_path`` without ``include`` selects from the same default.

    >>> where_of(None, None) is kernels
    True
    """
    if where is not None and not (isinstance(where, ByPath) and where.include is None):
        return where
    contracted = getattr(axes, "kernels", None)  # of a graph
    if isinstance(axes, str) and axes in KERNEL_NAMES:
        default: Where = _IsCalled(KERNEL_NAMES[axes])
    else:
        default = kernels if contracted is None else _is_among(frozenset(contracted))
    return default if where is None else dataclasses.replace(where, default=default)


def _is_among(paths: frozenset[str]) -> Where:
    return lambda path, leaf: path in paths


@dataclasses.dataclass(frozen=True)
class _IsCalled:
    """The default predicate of a convention: float leaves of these names with two or more axes."""

    names: tuple[str, ...]

    def __call__(self, path: str, leaf: Leaf) -> bool:
        return path.rsplit("/", 1)[-1] in self.names and is_float(leaf) and leaf.ndim >= 2

    @property
    def __name__(self) -> str:
        """How an error names the predicate."""
        return f"(leaves called {', '.join(self.names)}, of two or more axes)"


def unknown_axes(path: str, shape: tuple[int, ...], why: str, axes: Axes = None) -> str:
    """Return the error message for a leaf whose axes are needed but unknown.

    Args:
      path: path of the leaf.
      shape: shape of the leaf.
      why: what the axes are needed for.
      axes: the ``axes=`` argument; if it is a graph, its reason is quoted.

    >>> unknown_axes("blocks/kernel", (4, 16, 16), "n:m groups run along the inputs")
    "leaf 'blocks/kernel' of shape (4, 16, 16): n:m groups run along the inputs, and its name and shape do not say
    which axes these are; pass axes=jprune.trace_model(apply, params, *inputs) or
    axes={'^blocks/kernel$': jprune.KernelAxes(...)}"
    """
    by_hand = f"axes={{{'^' + path + '$'!r}: jprune.KernelAxes(...)}}"
    if isinstance(axes, HasAxes):
        reason = axes.unknown.get(path, "no reason is recorded")
        return (
            f"leaf '{path}' of shape {shape}: {why}, and the graph does not say which axes these are ({reason}); "
            f"leave the leaf out, or pass {by_hand} in place of the graph, with patterns for the other leaves"
        )
    alone = isinstance(axes, str) and not _known_shapes.get()  # called on scores, not by prune
    on_all = f", or axes=jprune.prunable(params, axes={axes!r}), which also reads the biases" if alone else ""
    return (
        f"leaf '{path}' of shape {shape}: {why}, and its name and shape do not say which axes these are; "
        f"pass axes=jprune.trace_model(apply, params, *inputs) or {by_hand}{on_all}"
    )


def _of_graph(graph: HasAxes, path: str, shape: tuple[int, ...]) -> KernelAxes | None:
    if path not in graph.axes:
        raise ValueError(
            f"axes is the graph of another model: it has no leaf '{path}'; trace this model with jprune.trace_model"
        )
    if graph.shapes[path] != shape:
        raise ValueError(
            f"axes is the graph of another model: its leaf '{path}' has shape {graph.shapes[path]}, this one has "
            f"{shape}; trace this model with jprune.trace_model"
        )
    return graph.axes[path]


def _by_pattern(
    given: Mapping[str, KernelAxes], paths: list[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, KernelAxes | None]:
    for pattern, value in given.items():
        if not isinstance(value, KernelAxes):
            raise TypeError(f"axes[{pattern!r}]={value!r} is {with_article(value)}; it must be a jprune.KernelAxes")
    first = first_matches(list(given), {path: [path] for path in paths}, name="axes")
    known = {**dict(_known_shapes.get()), **shapes}
    attention = _attention_modules([*known, *paths])
    found: dict[str, KernelAxes | None] = {}
    for path, shape in shapes.items():
        key = first[path]
        found[path] = _guess(path, known, attention) if key is None else _checked(given[key], key, path, shape)
    return found


def _checked(axes: KernelAxes, pattern: str, path: str, shape: tuple[int, ...]) -> KernelAxes:
    """Normalize negative axes, and raise if the axes do not describe a leaf of this shape."""
    where = f"axes[{pattern!r}]={axes} does not describe leaf '{path}' of shape {shape}"
    rank = len(shape)
    roles = {role: getattr(axes, role) for role in _ROLES}
    for role, named in roles.items():
        wrong = [axis for axis in named if not -rank <= axis < rank]
        if wrong:
            raise ValueError(f"{where}: {role} has axis {wrong[0]}; allowed are {-rank} to {rank - 1}")
        roles[role] = tuple(axis % rank for axis in named)
        if len(set(roles[role])) != len(named):
            raise ValueError(f"{where}: {role} names an axis twice; name each axis once")
    missing = set(range(rank)).difference(*roles.values())
    if missing:
        raise ValueError(f"{where}: axis {min(missing)} has no role; add it to stacked, inputs, outputs or spatial")
    outputs = math.prod(shape[axis] for axis in roles["outputs"])
    if axes.groups < 1 or outputs % axes.groups:
        raise ValueError(f"{where}: groups={axes.groups} must be positive and divide the {outputs} outputs")
    return KernelAxes(**roles, groups=axes.groups)


def _guess(path: str, shapes: Mapping[str, tuple[int, ...]], attention: set[str]) -> KernelAxes | None:
    """Infer the axes from name and shape; None if these are ambiguous."""
    module, _, name = path.rpartition("/")
    shape = shapes[path]
    rank = len(shape)
    if rank == 1:
        return KernelAxes(outputs=(0,))
    if (rank > 2 and module in attention) or _has_another_order(path, shapes):
        return None
    bias = _bias(path, shapes) if name in ("kernel", "weight") else None
    found = None
    if rank == 2 and name not in ("bias", "scale"):
        found = _outputs_first(2) if name in _EQUINOX_KERNELS else _outputs_last(2)
    elif rank == 4 and name in ("kernel", "weight"):
        window = shape[:2] if name == "kernel" else shape[2:]
        if _is_window(window) and not (bias is None and _may_be_a_stack(window)):
            found = _outputs_last(4) if name == "kernel" else _outputs_first(4)
    if found is None or bias is None:
        return found
    outputs = shape[found.outputs[0]]
    return found if [size for size in bias if size > 1] == [outputs] * (outputs > 1) else None


def _has_another_order(path: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether, by its name, another library or equation may store a layer's kernel with its axes in another order."""
    layer, shape = _layer(path), shapes[path]
    if len(shape) == 4 and "depthwise" in layer and path.endswith("/kernel"):
        return shape[2] != 1
    transposed = "transpose" in layer or "deconv" in layer
    return (len(shape) == 4 and transposed) or _may_be_swapped(path, shapes)


def _may_be_swapped(path: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether a layer is an einsum, by its name, and no bias tells its inputs from its outputs."""
    shape = shapes[path]
    return "einsum" in _layer(path) and (_bias(path, shapes) is None or shape[0] == shape[-1])


def _is_window(sizes: tuple[int, ...]) -> bool:
    """Whether sizes look like those of a convolution window: the same along all axes, apart from sizes of 1."""
    return len(set(sizes) - {1}) <= 1


def _may_be_a_stack(window: tuple[int, ...]) -> bool:
    """Whether a window of k x 1 may be a stack of 1-D convolutions with windows of 1."""
    return len(window) == 2 and window[0] > window[1] == 1


def _flax(
    path: str, shapes: Mapping[str, tuple[int, ...]], attention: set[str], left_out: set[str]
) -> KernelAxes | None:
    module, _, name = path.rpartition("/")
    shape = shapes[path]
    rank = len(shape)
    if module in attention and name in ("kernel", "bias"):
        return _attention(path, shapes)
    if name == "kernel" and rank >= 2:
        bias = _bias(path, shapes)
        known = _reads_as_convolution(path, shape[:-2], left_out) if bias is None else bias == shape[-1:]
        return _outputs_last(rank) if known and not _may_be_swapped(path, shapes) else None
    if name in ("embedding", "lora_a", "lora_b") and rank == 2:
        return _outputs_last(2)
    return KernelAxes(outputs=(0,)) if name in ("bias", "scale") and rank == 1 else None


def _attention(path: str, shapes: Mapping[str, tuple[int, ...]]) -> KernelAxes | None:
    """Return the axes of a leaf of Flax's attention; None if axes of stacked layers may be anywhere."""
    module, _, name = path.rpartition("/")
    parent, _, projection = module.rpartition("/")
    inputs, outputs = (2, 1) if projection == "out" else (1, 2)
    inputs = inputs if name == "kernel" else 0
    stacked = len(shapes[path]) - inputs - outputs
    if stacked < 0 or (stacked and not _are_stacked(parent, shapes, stacked)):
        return None
    places = iter(range(len(shapes[path])))
    parts = [tuple(itertools.islice(places, number)) for number in (stacked, inputs, outputs)]
    return KernelAxes(stacked=parts[0], inputs=parts[1], outputs=parts[2])


def _are_stacked(attention: str, shapes: Mapping[str, tuple[int, ...]], stacked: int) -> bool:
    """Whether all kernels of an attention layer have these first axes, before the same heads and dim."""
    prefix = f"{attention}/" if attention else ""
    ends = []
    for projection in _PROJECTIONS:
        kernel = shapes.get(f"{prefix}{projection}/kernel", ())
        heads = kernel[stacked:-1] if projection == "out" else kernel[stacked + 1 :]
        ends.append((len(kernel), kernel[:stacked], heads))
    return len(set(ends)) == 1 and ends[0][0] == stacked + 3


def _reads_as_convolution(path: str, window: tuple[int, ...], left_out: set[str]) -> bool:
    """Whether a kernel whose bias is not known is one of a dense layer (no window) or a convolution's.

    Its name or window tells. Stacked dense layers and those of several features have as many axes.

    Args:
      path: path of the kernel.
      window: its sizes along the axes that are spatial if it is a convolution's.
      left_out: paths of leaves whose shapes are not known.
    """
    if len(window) == 1:
        return "conv" in _layer(path)
    return _is_window(window) and not (_bias_of(path) in left_out and _may_be_a_stack(window))


def _layer(path: str) -> str:
    """Return the name of the layer of a leaf, in lower case; "" for a leaf without one."""
    names = [name for name in path.split("/")[:-1] if not name.isdigit()]  # convs/0/kernel
    return "".join(names[-1:]).lower()


def _bias(path: str, shapes: Mapping[str, tuple[int, ...]]) -> tuple[int, ...] | None:
    """Return the shape of the bias of the layer of a kernel; None if it has none or the shape is not known."""
    return shapes.get(_bias_of(path))


def _bias_of(path: str) -> str:
    module = path.rpartition("/")[0]
    return f"{module}/bias" if module else "bias"


def _attention_modules(paths: list[str]) -> set[str]:
    """Return the paths of the query, key, value and out modules of Flax's attention layers."""
    modules = {path.rpartition("/")[0] for path in paths}
    found = set()
    for module in modules:
        parent, _, name = module.rpartition("/")
        projections = [f"{parent}/{p}" if parent else p for p in _PROJECTIONS]
        if name == "query" and modules.issuperset(projections):
            found.update(projections)
    return found


def _equinox(path: str, shapes: Mapping[str, tuple[int, ...]], left_out: set[str]) -> KernelAxes | None:
    name, shape = path.rsplit("/", 1)[-1], shapes[path]
    rank = len(shape)
    if name in _EQUINOX_KERNELS and rank >= 2:
        if name != "weight":  # of a recurrent cell
            return _outputs_first(2) if rank == 2 else None
        bias = _bias(path, shapes)
        of_outputs = shape[:1] + (1,) * (rank - 2)  # a convolution's bias has an axis for each spatial one
        known = _reads_as_convolution(path, shape[2:], left_out) if bias is None else bias == of_outputs
        return _outputs_first(rank) if known else None
    if name == "bias" and rank > 1 and all(size == 1 for size in shape[1:]):  # of a convolution
        return KernelAxes(outputs=tuple(range(rank)))
    return KernelAxes(outputs=(0,)) if name in ("bias", "weight") and rank == 1 else None


def _outputs_last(rank: int) -> KernelAxes:
    return KernelAxes(inputs=(rank - 2,), outputs=(rank - 1,), spatial=tuple(range(rank - 2)))


def _outputs_first(rank: int) -> KernelAxes:
    return KernelAxes(outputs=(0,), inputs=(1,), spatial=tuple(range(2, rank)))
