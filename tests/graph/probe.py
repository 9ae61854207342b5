"""Roles of a kernel's axes measured from numbers, by derivatives, without reading the program.

For a function that is linear in a kernel and in its data, the mixed derivative says which output every weight
contributes to and which number of the data it multiplies. Two weights that differ in one index then share their
outputs (the axis is summed over), or their data (the axis is one of outputs), or neither (separate layers).
"""

import jax
import numpy as np


def measured_roles(apply, params, x):
    """By path of a dict of kernels, a letter for every axis, as ``tests.graph.models.roles`` writes them.

    Args:
      apply: ``apply(params, x)``, linear in each kernel and in ``x``; each kernel is read once.
      params: dict of arrays of random numbers.
      x: array of random numbers.

    Returns:
      For each kernel, for each of its axes: "i" where changing the index changes the data that is read and not the
      outputs, "o" the other way round, "s" where it changes both entirely, "?" where it does neither.
    """
    return {name: _roles_of(lambda w, x, name=name: apply({**params, name: w}, x), params[name], x) for name in params}


def _roles_of(f, kernel, x):
    mixed = jax.jit(jax.jacobian(jax.jacobian(f, argnums=0), argnums=1))(kernel, x)  # (*y, *kernel, *x)
    outputs = mixed.ndim - kernel.ndim - x.ndim
    used = np.abs(mixed) > 1e-6
    of_output = used.any(axis=tuple(range(outputs + kernel.ndim, used.ndim)))  # (*y, *kernel)
    of_data = used.any(axis=tuple(range(outputs)))  # (*kernel, *x)
    of_output = np.moveaxis(of_output.reshape(-1, *kernel.shape), 0, -1)
    of_data = of_data.reshape(*kernel.shape, -1)
    return " ".join(_letter(of_output, of_data, axis) for axis in range(kernel.ndim))


def _letter(of_output, of_data, axis):
    if of_output.shape[axis] == 1:
        return "-"
    other_output, other_data = (_changes(array, axis) for array in (of_output, of_data))
    return {(True, False): "o", (False, True): "i", (True, True): "s", (False, False): "?"}[other_output, other_data]


def _changes(used, axis):
    """Whether two weights that differ in their index along the axis never use the same entries."""
    first, rest = np.split(np.moveaxis(used, axis, 0), [1])
    return bool((~(first & rest).any(axis=-1)).all())
