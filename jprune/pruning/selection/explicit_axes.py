"""Selections on a mesh with explicit axes, where a reshape or an index of a sharded axis is an error.

Inside ``jax.sharding.auto_axes`` the compiler chooses the shardings, as on a mesh with automatic axes; the masks then
get the shardings of the scores.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import ParamSpec

import jax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from jprune.pruning.amounts import Scheduled

P = ParamSpec("P")
_REPLICATED: PartitionSpec = PartitionSpec()  # type: ignore[no-untyped-call]


def with_automatic_axes(function: Callable[[PyTree], PyTree], operands: PyTree, *, like: PyTree) -> PyTree:
    """Return ``function(operands)``, computed with automatic axes if an operand is on a mesh with explicit axes.

    Args:
      function: returns a tree of arrays.
      operands: tree of arrays, all on the same mesh.
      like: tree of arrays like the result; the result has their shardings.
    """
    mesh = _explicit_mesh(operands)
    if mesh is None:
        return function(operands)

    def sharding(leaf: jax.Array) -> NamedSharding:
        given = jax.typeof(leaf).sharding
        return NamedSharding(mesh, _REPLICATED if given.mesh.empty else given.spec)

    return jax.sharding.auto_axes(function, out_sharding=jax.tree.map(sharding, like))(operands)


def automatic_axes(select: Callable[P, PyTree]) -> Callable[P, PyTree]:
    """Make a selection compute its masks with automatic axes; see ``with_automatic_axes``."""

    @functools.wraps(select)
    def call(*args: P.args, **kwargs: P.kwargs) -> PyTree:
        scores = args[0] if args else kwargs.get("scores")
        if _explicit_mesh(scores) is None:
            return select(*args, **kwargs)
        scheduled = {name: value for name, value in kwargs.items() if isinstance(value, Scheduled)}
        traced = {"among": kwargs.get("among"), "index": {name: value.index for name, value in scheduled.items()}}

        def run(operands: tuple[PyTree, PyTree]) -> PyTree:
            scores, traced = operands
            amounts = {name: dataclasses.replace(scheduled[name], index=i) for name, i in traced["index"].items()}
            rest = {name: value for name, value in kwargs.items() if name != "scores"}
            return select(scores, *args[1:], **(rest | amounts | {"among": traced["among"]}))  # type: ignore[arg-type]

        return with_automatic_axes(run, (scores, traced), like=scores)

    return call


def _explicit_mesh(tree: PyTree) -> AbstractMesh | None:
    """Return the mesh of the arrays if one of its axes is explicit."""
    for leaf in jax.tree.leaves(tree):
        if isinstance(leaf, jax.Array):
            mesh: AbstractMesh = jax.typeof(leaf).sharding.mesh.abstract_mesh
            if AxisType.Explicit in mesh.axis_types:
                return mesh
    return None
