"""Leaves of a pytree by path: names, predicates, and matching of two trees.

A leaf is named by its path, joined with '/'. The name is the same for every library: the ``value`` that a Flax NNX
``State`` adds at the end and the ``params`` that a Linen variable dict adds at the start are dropped. None counts as a
leaf, because trees of scores and masks have None where nothing is prunable.
"""

import contextlib
import dataclasses
import inspect
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

Leaf: TypeAlias = Any  # an array, a tracer, a shape, None, or anything else in a tree
Where = Callable[[str, Leaf], bool]


def _is_none(x: object) -> bool:
    return x is None


def path_string(key_path: tuple[jax.tree_util.KeyEntry, ...]) -> str:
    """Return the path of a leaf as a string, without a trailing ``value`` or a leading ``params``.

    >>> from jax.tree_util import DictKey, GetAttrKey
    >>> path_string((DictKey("params"), DictKey("head"), DictKey("kernel")))
    'head/kernel'
    >>> path_string((DictKey("head"), DictKey("kernel"), GetAttrKey("value")))
    'head/kernel'
    """
    keys = key_path
    if len(keys) > 1 and isinstance(keys[-1], jax.tree_util.GetAttrKey) and keys[-1].name == "value":
        keys = keys[:-1]
    if len(keys) > 1 and isinstance(keys[0], jax.tree_util.DictKey) and keys[0].key == "params":
        keys = keys[1:]
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def flatten(tree: PyTree) -> tuple[list[str], list[Leaf], jax.tree_util.PyTreeDef]:
    """Flatten a tree into paths, leaves (including None) and a treedef.

    >>> flatten({"b": None, "a": (1, 2)})[:2]
    (['a/0', 'a/1', 'b'], [1, 2, None])
    """
    entries, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_none)
    return [path_string(key_path) for key_path, _ in entries], [leaf for _, leaf in entries], treedef


class Subset(NamedTuple):
    """Some leaves of a tree, which may be replaced by others.

    Attributes:
      paths: their paths.
      leaves: these leaves.
      slots: their indices among all leaves.
      every: all leaves of the tree.
      treedef: structure of the tree.

    >>> subset = Subset.of({"a": 1.0, "b": None, "c": 2.0}, lambda leaf: leaf == 2.0)
    >>> subset.whole([3.0]), subset.alone([3.0])
    ({'a': 1.0, 'b': None, 'c': 3.0}, {'a': None, 'b': None, 'c': 3.0})
    """

    paths: list[str]
    leaves: list[Leaf]
    slots: list[int]
    every: list[Leaf]
    treedef: jax.tree_util.PyTreeDef

    @classmethod
    def of(cls, tree: PyTree, wanted: Callable[[Leaf], bool]) -> "Subset":
        """Return the leaves for which a predicate is true."""
        paths, every, treedef = flatten(tree)
        slots = [i for i, leaf in enumerate(every) if wanted(leaf)]
        return cls([paths[i] for i in slots], [every[i] for i in slots], slots, every, treedef)

    def whole(self, leaves: Sequence[Leaf]) -> PyTree:
        """Return the tree with others in place of these leaves."""
        return self._put(leaves, list(self.every))

    def alone(self, leaves: Sequence[Leaf]) -> PyTree:
        """Return the tree with others in place of these leaves, and None in place of all the rest."""
        return self._put(leaves, [None] * len(self.every))

    def _put(self, leaves: Sequence[Leaf], into: list[Leaf]) -> PyTree:
        for slot, leaf in zip(self.slots, leaves, strict=True):
            into[slot] = leaf
        return jax.tree.unflatten(self.treedef, into)


def refuse_one_path_twice(name: str, paths: Sequence[str]) -> None:
    """Raise a ``ValueError`` if two leaves have the same path, as ``{"a/b": x, "a": {"b": y}}`` has.

    Args:
      name: the caller's name for the tree.
      paths: the paths of its leaves.
    """
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise ValueError(f"{name} has two leaves with the path '{twice}'; rename one of them or a key above it")


def is_float(leaf: object) -> bool:
    """Whether a leaf is an array (or a tracer, or a shape) of a real floating dtype."""
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.floating))


def is_array(leaf: object) -> bool:
    """Whether a leaf is an array (or a tracer, or a shape) of any dtype."""
    return hasattr(leaf, "shape") and hasattr(leaf, "dtype")


def is_complex(leaf: object) -> bool:
    """Whether a leaf is an array (or a tracer, or a shape) of a complex dtype."""
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jnp.complexfloating))


def is_inexact(leaf: object) -> bool:
    """Whether a leaf is an array (or a tracer, or a shape) of a real or complex floating dtype."""
    return is_float(leaf) or is_complex(leaf)


def refuse_sum(path: str, param: np.dtype, update: np.dtype) -> None:
    """Raise if ``optax.apply_updates`` cannot add an update to a parameter, because JAX does not promote 8-bit floats.

    Args:
      path: path of the parameter.
      param: dtype of the parameter.
      update: dtype of its update.

    Raises:
      TypeError: the dtypes differ, and at least one has 8 bits or fewer.
    """
    if param != update and 1 in (param.itemsize, update.itemsize):
        raise TypeError(
            f"the parameter '{path}' is {param} and its update is {update}, which JAX does not add; keep the "
            "parameters in float32 and cast them in the loss"
        )


def is_placeholder(tree: object) -> bool:
    """Whether a tree is the placeholder that ``optax.tree.map_params`` passes to ``init``."""
    return type(tree).__name__ == "_ParamsPlaceholder"


INJECT_CHAIN = (
    "optax.inject_hyperparams calls every function that it is given with the step and makes arrays of numbers; pass it "
    "a function that makes the whole chain: optax.inject_hyperparams(lambda rate: optax.chain(optax.adam(rate), "
    "jprune.prune(...)))(rate=1e-3)"
)


def hint_of_injecting(value: object) -> str:
    """Return a hint if a value is an integer scalar array, as ``optax.inject_hyperparams`` passes; else ''."""
    is_integer = isinstance(value, jax.Array) and not value.ndim and jnp.issubdtype(value.dtype, jnp.integer)
    return f"; {INJECT_CHAIN}" if is_integer else ""


def with_article(value: object) -> str:
    """Return the name of a value's type with its article, for an error.

    >>> with_article(3), with_article({}), with_article(np.ones(1))
    ('an int', 'a dict', 'an ndarray')
    """
    name = type(value).__name__
    return f"{'an' if name.startswith((*'aeioAEIO', 'nd')) else 'a'} {name}"


def refuse_arguments(function: Callable[..., object], label: str, wanted: str, *args: object, **kwargs: object) -> None:
    """Raise a ``TypeError`` if a function does not take these arguments; ``label`` and ``wanted`` are its text."""
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise TypeError(f"{label}: {error}; {wanted}") from error
    except ValueError:  # a callable without a signature
        pass


@contextlib.contextmanager
def explain_left_out(params: PyTree, name: str) -> Iterator[None]:
    """Add what to do to an error of the caller's model if ``optax.masked`` or ``partition`` left out parameters.

    Args:
      params: the parameters that the model is run with.
      name: what runs the model, for the note.
    """
    try:
        yield
    except Exception as error:
        is_left_out: Callable[[object], bool] = lambda node: type(node).__name__ == "MaskedNode"
        if any(map(is_left_out, jax.tree.leaves(params, is_leaf=is_left_out))):
            error.add_note(
                f"{name} runs the model, but inside optax.masked, partition or multi_transform it gets only the "
                f"parameters of one group, and optax.MaskedNode() in place of the others; apply {name} to all "
                "parameters: optax.chain(..., optax.partition(...), ...)"
            )
        raise


def map_leaves(f: Callable[..., PyTree], tree: PyTree, *rest: PyTree) -> PyTree:
    """``jax.tree.map`` that skips leaves that are None, and accepts None at any leaf of the other trees.

    The other trees must have the structure of the first; ``f`` is not called where the first has None.

    >>> map_leaves(lambda x, y: (x, y), {"a": 1, "b": None}, {"a": None, "b": 2})
    {'a': (1, None), 'b': None}
    """
    return jax.tree.map(lambda x, *y: None if x is None else f(x, *y), tree, *rest, is_leaf=_is_none)


def match(reference: PyTree, other: PyTree, *, reference_name: str, name: str, surplus: bool = False) -> list[Leaf]:
    """Return the leaves of ``other`` in the order of ``reference``, matched by path.

    Trees of different classes match (an NNX ``State`` and a dict of the same paths): only paths and shapes are
    compared.

    Args:
      reference: the tree whose leaves are looked up.
      other: the tree to match; it may have None in place of any leaf or subtree.
      reference_name: what the caller calls ``reference``, for the error.
      name: what the caller calls ``other``, for the error.
      surplus: whether ``other`` may have leaves that ``reference`` lacks or has as None.

    Raises:
      ValueError: one tree has a path that the other lacks, or the shapes of a leaf differ; the message names the leaf.

    >>> match({"a": 1, "b": 2}, {"b": 4, "a": 3}, reference_name="params", name="grad")
    [3, 4]
    """
    paths, leaves, _ = flatten(reference)
    other_paths, other_leaves, _ = flatten(other)
    refuse_one_path_twice(reference_name, paths)
    found = dict(zip(other_paths, other_leaves, strict=True))
    for path, leaf in zip(paths, leaves, strict=True):
        if path not in found:
            if leaf is None or _none_above(found, path):
                found[path] = None
                continue
            raise ValueError(
                f"{name} has no leaf '{path}', which {reference_name} has; {name} has {_some(other_paths)}"
                f"{only_parameters(reference, reference_name)}"
            )
        given = getattr(found[path], "shape", None)
        wanted = getattr(leaf, "shape", None)
        if given is not None and wanted is not None and given != wanted:
            raise ValueError(
                f"{name} has shape {given} at '{path}', where {reference_name} has shape {wanted}; they must be equal"
            )
    wanted_paths = set(paths)
    more = [path for path in other_paths if path not in wanted_paths and found[path] is not None]
    if more and not surplus:
        raise ValueError(
            f"{name} has a leaf '{more[0]}', which {reference_name} lacks: {_some(paths)}{only_parameters(other, name)}"
        )
    return [found[path] for path in paths]


def only_parameters(tree: PyTree, name: str) -> str:
    """Return what to pass instead of an NNX module or a state with variables that are not parameters; else ''.

    >>> from flax import nnx
    >>> only_parameters(nnx.BatchNorm(1, rngs=nnx.Rngs(0)), "params")
    '; params is an nnx module: pass nnx.state(model, nnx.Param)'
    >>> only_parameters(nnx.state(nnx.BatchNorm(1, rngs=nnx.Rngs(0))), "params")
    '; params has variables that are not parameters (BatchStat): pass nnx.state(model, nnx.Param)'
    """
    nnx = sys.modules.get("flax.nnx")  # a tree of its classes exists only after it was imported
    if nnx is not None and isinstance(tree, nnx.Module):
        return f"; {name} is an nnx module: pass nnx.state(model, nnx.Param)"
    kinds = ", ".join(sorted({type(one).__name__ for one in _other_variables(tree)}))
    return kinds and f"; {name} has variables that are not parameters ({kinds}): pass nnx.state(model, nnx.Param)"


def refuse_statistics(params: PyTree) -> None:
    """Raise if a tree of Flax has float arrays that would be counted as parameters but are not.

    Raises:
      ValueError: an NNX tree has other variables than parameters, or a dict of Linen variables other collections.

    >>> refuse_statistics({"params": {"kernel": jnp.ones(2)}, "batch_stats": {"mean": jnp.ones(2)}})
    Traceback (most recent call last):
    ...
    ValueError: params has 'batch_stats', whose arrays are not parameters: pass variables['params']
    """
    floats: Callable[[PyTree], bool] = lambda tree: any(map(is_float, jax.tree.leaves(tree)))
    kinds = ", ".join(sorted({type(one).__name__ for one in _other_variables(params) if floats(one)}))
    if kinds:
        raise ValueError(
            f"params has variables whose arrays are not parameters ({kinds}): pass nnx.state(model, nnx.Param)"
        )
    nnx = sys.modules.get("flax.nnx")
    if isinstance(params, Mapping) and "params" in params and not (nnx and isinstance(params, nnx.State)):
        for name, collection in params.items():
            if name != "params" and floats(collection):
                raise ValueError(f"params has '{name}', whose arrays are not parameters: pass variables['params']")


def _other_variables(tree: PyTree) -> list[Leaf]:
    """Return the variables of an NNX tree that are not parameters."""
    nnx = sys.modules.get("flax.nnx")  # a tree of its classes exists only after it was imported
    if nnx is None:
        return []
    variables = jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return [one for one in variables if isinstance(one, nnx.Variable) and not isinstance(one, nnx.Param)]


def _none_above(found: dict[str, Leaf], path: str) -> bool:
    """Whether None replaces a subtree that would contain the path."""
    parts = path.split("/")
    above = ("/".join(parts[:i]) for i in range(1, len(parts)))
    return any(parent in found and found[parent] is None for parent in above)


def kernels(path: str, leaf: Leaf) -> bool:
    """The default predicate: float leaves named ``kernel`` or ``weight`` with two or more axes.

    It uses only names and shapes. The output layer is selected, and so are the weights of Equinox embeddings and of
    layer normalization in stacked layers or over several axes. Biases and normalization parameters with one axis are
    not selected, nor are ``weight_ih`` and ``weight_hh`` of Equinox cells, ``lora_a``, ``lora_b`` and ``embedding``.
    ``print(prunable(params))`` shows which leaves are selected and which are not. Choose leaves with ``by_path``, or
    pass ``prune`` a graph as ``axes``, which knows which leaves the matrix products read.

    >>> kernels("dense/kernel", jnp.ones((2, 3))), kernels("norm/scale", jnp.ones(3))
    (True, False)
    """
    return path.rsplit("/", 1)[-1] in ("kernel", "weight") and is_float(leaf) and leaf.ndim >= 2


@dataclasses.dataclass(frozen=True)
class ByPath:
    """A predicate on (path, leaf) by regular expressions; made by ``by_path``.

    Attributes:
      include: pattern of the leaves to select, or None.
      exclude: pattern of the leaves to leave out, or None.
      default: predicate of the leaves to select where ``include`` is None.
    """

    include: str | None
    exclude: str | None
    default: Where = dataclasses.field(default=kernels, repr=False)

    def __call__(self, path: str, leaf: Leaf) -> bool:
        """Whether the leaf is included and not excluded."""
        wanted = self.default(path, leaf) if self.include is None else bool(re.search(self.include, path))
        return wanted and not (self.exclude is not None and re.search(self.exclude, path))


def by_path(include: str | None = None, exclude: str | None = None) -> ByPath:
    """Select leaves by regular expressions searched for in their paths.

    Args:
      include: pattern of the leaves to select; None selects the leaves that ``kernels`` selects, or with a graph or a
        convention as ``axes`` its kernels.
      exclude: pattern of the leaves to leave out.

    Returns:
      A predicate on (path, leaf). When it is applied to a tree, a pattern that matches no path is an error.

    Raises:
      TypeError: a pattern is not a string.
      ValueError: a pattern is not a regular expression.

    >>> by_path(include=r"kernel$", exclude=r"^head/")("head/kernel", jnp.ones((2, 2)))
    False
    """
    for name, pattern in (("include", include), ("exclude", exclude)):
        if pattern is not None:
            check_pattern(f"{name}={pattern!r}", pattern)
    return ByPath(include, exclude)


def only(tree: PyTree, where: Where) -> PyTree:
    """Keep the float leaves that ``where`` selects and replace every other leaf by None.

    Raises:
      TypeError: ``where`` is not a function of (path, leaf).
      ValueError: ``where`` selects nothing or a complex leaf, or one of its patterns matches no path.

    >>> only({"kernel": jnp.ones((1, 1)), "bias": jnp.ones(1)}, kernels)["bias"] is None
    True
    """
    wanted = "a predicate on (path, leaf), for example jprune.by_path(include=..., exclude=...)"
    if not callable(where):
        raise TypeError(f"where={where!r} is {with_article(where)}; it must be {wanted}")
    refuse_arguments(where, f"where={where!r}", f"it must be {wanted}", "", None)
    paths, leaves, treedef = flatten(tree)
    if isinstance(where, ByPath):
        for name, pattern in (("include", where.include), ("exclude", where.exclude)):
            if pattern is not None and not any(re.search(pattern, path) for path in paths):
                raise ValueError(f"{name}={pattern!r} matches no leaf; the tree has {_some(paths)}")
    for path, leaf in zip(paths, leaves, strict=True):
        if is_complex(leaf) and where(path, np.broadcast_to(np.float32(0), leaf.shape)):
            raise ValueError(
                f"where selects '{path}', which is {leaf.dtype}; only real weights have scores and masks; leave it out "
                f"with where=jprune.by_path(exclude='^{re.escape(path)}$')"
            )
    kept = [leaf if is_float(leaf) and where(path, leaf) else None for path, leaf in zip(paths, leaves, strict=True)]
    if all(leaf is None for leaf in kept):
        raise ValueError(_nothing_selected(where, paths, leaves))
    return jax.tree.unflatten(treedef, kept)


def _nothing_selected(where: Where, paths: list[str], leaves: list[Leaf]) -> str:
    """Return the error message for a predicate that selects no float leaf."""
    default = where is kernels or (isinstance(where, ByPath) and where.include is None and where.default is kernels)
    for path, leaf in zip(paths, leaves, strict=True):
        as_float = np.broadcast_to(np.float32(0), getattr(leaf, "shape", ()))
        if hasattr(leaf, "dtype") and not is_float(leaf) and where(path, as_float):
            return (
                f"where selects '{path}', which is {leaf.dtype}; only float arrays can be pruned; convert it to float32"
            )
    if default and paths == [""]:
        return (
            "where=kernels selects leaves by name, and the parameters are one array without a name; pass where=lambda "
            "path, leaf: True, or inside optax.flatten apply prune after it: optax.chain(optax.flatten(...), "
            "jprune.prune(...))"
        )
    if not default:
        name = getattr(where, "__name__", None) or (_call(where) if isinstance(where, ByPath) else type(where).__name__)
        remedy = "select by path with where=jprune.by_path(include=...)"
        return f"where={name} selects no float leaf; the tree has {_some(paths)}; {remedy}"
    named, left_out = ("kernels", "") if where is kernels else (_call(where), " and not excluded")
    return (
        f"where={named} selects no float leaf, because none is called kernel or weight with two or more axes"
        f"{left_out}; the tree has {_some(paths)}; select by path with where=jprune.by_path(include=...), or select "
        "the kernels of the model with where=jprune.trace_model(apply, params, *inputs)"
    )


def refuse_one_batch(batches: object) -> None:
    """Raise if ``batches`` is one batch instead of several: iterating over it would take its examples or its keys.

    Raises:
      TypeError: ``batches`` is an array or a dict.
    """
    if hasattr(batches, "shape") or isinstance(batches, Mapping):
        given = f"an array of shape {batches.shape}" if hasattr(batches, "shape") else "a dict"
        raise TypeError(f"batches is {given}, which is one batch; pass a list or a generator of batches: [batch]")


def _call(where: Where) -> str:
    """Return the call of ``by_path`` that makes a predicate."""
    patterns = {name: getattr(where, name) for name in ("include", "exclude")}
    given = (f"{name}={pattern!r}" for name, pattern in patterns.items() if pattern is not None)
    return f"by_path({', '.join(given)})"


def first_matches(
    patterns: Sequence[str], layers: Mapping[str, Iterable[str]], *, name: str, of: str = "leaf"
) -> dict[str, str | None]:
    """Return for every layer the first of the regular expressions that is found in one of its names.

    Every ``{regex: value}`` argument follows this rule. An expression that decides for no layer is an error, because
    its value would be ignored; only '', for all other layers, may be left with none.

    Args:
      patterns: the regular expressions, in the order of the dict.
      layers: the names of each layer, by its path.
      name: what the caller calls the dict, for the error.
      of: what the caller calls a layer, for the error.

    Returns:
      A dict from the path to an expression, or to None if none matches.

    Raises:
      TypeError: an expression is not a string.
      ValueError: an expression is not a regular expression, matches no layer, or matches only layers that earlier
        expressions match.

    >>> first_matches(["^conv", ""], {"conv1/kernel": ["conv1/kernel"], "head": ["head"]}, name="sparsity")
    {'conv1/kernel': '^conv', 'head': ''}
    """
    first: dict[str, str | None] = dict.fromkeys(layers)
    for pattern in patterns:
        check_pattern(f"{name} has the key {pattern!r}, which", pattern)
        matched = [path for path, names in layers.items() if any(re.search(pattern, each) for each in names)]
        if not matched:
            hint = literally(pattern, [each for names in layers.values() for each in names])
            raise ValueError(
                f"{name} has the key {pattern!r}, which matches no {of}; there are {_some(list(layers))}{hint}"
            )
        decided = [path for path in matched if first[path] is None]
        if not decided and pattern:  # '' for all others may be left with none
            raise ValueError(
                f"{name} has the key {pattern!r}, which decides for no {of}: '{matched[0]}' also matches "
                f"{first[matched[0]]!r}, and the first key that matches is used; put the more specific key first"
            )
        first.update(dict.fromkeys(decided, pattern))
    return first


def check_pattern(label: str, pattern: object) -> None:
    """Raise if a pattern is not a regular expression; ``label`` is the subject of the message.

    Raises:
      TypeError: it is not a string.
      ValueError: its syntax is wrong.
    """
    if not isinstance(pattern, str | re.Pattern):
        raise TypeError(f"{label} is {with_article(pattern)}; it must be a regular expression, such as r'kernel$'")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{label} is not a regular expression: {error}") from error


def literally(pattern: str, names: Iterable[str]) -> str:
    r"""Return a hint for a pattern that is part of a name but does not match it, because of special characters.

    >>> literally("kernel[1]", ["dense/kernel[1]"])
    "; to match the text 'kernel[1]', write 'kernel\\\\[1\\\\]'"
    """
    found = isinstance(pattern, str) and any(pattern in name for name in names)
    return f"; to match the text '{pattern}', write {re.escape(pattern)!r}" if found else ""


def _some(paths: list[str], most: int = 8) -> str:
    """Format the first paths for an error message."""
    shown = ", ".join(f"'{path}'" for path in paths[:most]) or "no leaf at all"
    return shown + (f" and {len(paths) - most} more" if len(paths) > most else "")
