"""From a masked network to a smaller dense one: units that carry nothing are taken out.

For plain chains of dense and convolutional layers, where taking a unit out is exact. What a graph
with branches needs is not here.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import PyTree
from numpy.typing import NDArray

from jprune.trees import flatten, match

Layer = dict[str, NDArray[Any]]


class Compacted(NamedTuple):
    """A smaller dense network.

    Attributes:
      params: a tree like the one given, with smaller kernels and biases.
      units: for every layer in order, a bool array (units,): which of its units are left.
    """

    params: PyTree
    units: dict[str, NDArray[np.bool_]]


def remove_dead(
    params: PyTree,
    masks: PyTree | None = None,
    *,
    layers: Sequence[str],
    activation: Callable[[Any], Any] = jax.nn.relu,
    dead: Mapping[str, Any] | None = None,
    padding: str = "SAME",
) -> Compacted:
    """Take the units that carry nothing out of a plain chain of dense and convolutional layers.

    A unit goes where every weight out of it is zero, or every weight into it is zero, or it is named
    in ``dead``. One without weights into it is the constant ``activation(bias)``, which moves into
    the next layer's bias; before a convolution with zero padding that is exact only where the
    constant is 0, and otherwise the unit stays. This is repeated until nothing more goes. One unit
    of a layer always stays, and so do all units of the last layer.

    Between the layers there may be the activation, pooling without padding, and a flattening of
    channels-last images; nothing else (no normalization, no skip connection).

    Args:
      params: a tree in which every layer of the chain has a float ``kernel`` (in, out) or
        (*window, in, out), and perhaps a ``bias`` (out,). Other leaves pass through.
      masks: bool arrays like ``params``; applied first where given.
      layers: the paths of the layers in forward order, such as ``["conv1", "conv2", "head"]``.
      activation: the function between the layers, elementwise.
      dead: units whose activation is known to be 0 on the data that matter, a bool array (units,)
        a layer, such as ``{"conv1": jprune.unit_status(preacts)["conv1"] == -1}`` of a ReLU network.
      padding: ``SAME`` (zeros around the image) or ``VALID``, for the convolutions.

    Returns:
      The smaller parameters and which units are left. The outputs are those of the masked network up
      to float rounding; with ``dead``, on the data on which those units are dead.

    Raises:
      ValueError: a layer has no kernel, the sizes of two consecutive layers do not chain, an entry of
        ``dead`` names no layer of the chain or has another length, or ``padding`` is another word.

    >>> import jax.numpy as jnp
    >>> params = {"a": {"kernel": jnp.array([[1.0, 0.0]]), "bias": jnp.array([0.0, 2.0])},
    ...           "b": {"kernel": jnp.array([[3.0], [5.0]]), "bias": jnp.array([1.0])}}
    >>> small = remove_dead(params, layers=["a", "b"])
    >>> small.units["a"].tolist(), small.params["b"]["bias"].tolist()
    ([True, False], [11.0])
    """
    if padding not in ("SAME", "VALID"):
        raise ValueError(f"padding={padding!r}; it is 'SAME' or 'VALID'")
    paths, leaves, treedef = flatten(params)
    given = [None] * len(leaves) if masks is None else match(params, masks, reference_name="params", name="masks")
    arrays = {
        path: np.asarray(leaf) if mask is None else np.where(np.asarray(mask), leaf, np.zeros_like(leaf))
        for path, leaf, mask in zip(paths, leaves, given, strict=True)
        if leaf is not None
    }
    chain = [_layer(arrays, name) for name in layers]
    units = {name: np.ones(layer["kernel"].shape[-1], bool) for name, layer in zip(layers, chain, strict=True)}
    for name, which in (dead or {}).items():
        if name not in units or np.shape(which) != units[name].shape:
            allowed = {layer: len(kept) for layer, kept in units.items()}
            raise ValueError(f"dead names '{name}' with shape {np.shape(which)}; the layers have {allowed} units")
    for name, before, after in zip(layers, chain, chain[1:], strict=False):
        if after["kernel"].shape[-2] % before["kernel"].shape[-1]:
            width, inputs = before["kernel"].shape[-1], after["kernel"].shape[-2]
            raise ValueError(f"'{name}' has {width} units and the next layer {inputs} inputs, no multiple of that")
    silent = {name: np.asarray(which, bool) for name, which in (dead or {}).items()}
    while _sweep(chain, list(layers), units=units, silent=silent, activation=activation, padding=padding):
        pass
    for name, layer in zip(layers, chain, strict=True):
        arrays.update({f"{name}/{kind}": array for kind, array in layer.items()})
    small = [
        None if leaf is None else jax.numpy.asarray(arrays[path]) for path, leaf in zip(paths, leaves, strict=True)
    ]
    return Compacted(jax.tree.unflatten(treedef, small), units)


def _layer(arrays: dict[str, NDArray[Any]], name: str) -> Layer:
    layer = {kind: arrays[f"{name}/{kind}"] for kind in ("kernel", "bias") if f"{name}/{kind}" in arrays}
    if "kernel" not in layer or layer["kernel"].ndim < 2:
        raise ValueError(f"layers names '{name}', which has no kernel of two or more axes; params has {sorted(arrays)}")
    return layer


def _sweep(
    chain: list[Layer],
    names: list[str],
    *,
    units: dict[str, NDArray[np.bool_]],
    silent: dict[str, NDArray[np.bool_]],
    activation: Callable[[Any], Any],
    padding: str,
) -> bool:
    """Take out, layer by layer, what carries nothing now; return whether anything went."""
    went = False
    for name, layer, following in zip(names, chain, chain[1:], strict=False):
        width = layer["kernel"].shape[-1]
        outgoing = _by_unit(following["kernel"], width)
        unheard = ~np.any(outgoing != 0, axis=(0, 1, 3))
        unfed = ~np.any(layer["kernel"].reshape(-1, width) != 0, axis=0)
        known = silent[name][units[name]] if name in silent else np.zeros(width, bool)
        constant = np.asarray(activation(layer.get("bias", np.zeros(width, layer["kernel"].dtype))))
        constant = np.where(known, np.zeros_like(constant), constant)
        padded = following["kernel"].ndim > 2 and padding == "SAME" and following["kernel"].shape[:-2] != (1, 1)
        folds = (constant == 0) | (("bias" in following) and not padded)
        gone = unheard | ((unfed | known) & folds)
        if gone.all():
            gone[0] = False
        if not gone.any():
            continue
        if "bias" in following:
            moved = np.where(gone & ~unheard, constant, np.zeros_like(constant))
            shift = np.einsum("whio,i->o", outgoing.astype(np.float64), moved.astype(np.float64))
            following["bias"] = following["bias"] + shift.astype(following["bias"].dtype)
        layer["kernel"] = layer["kernel"][..., ~gone]
        if "bias" in layer:
            layer["bias"] = layer["bias"][~gone]
        kernel = following["kernel"]
        left = outgoing[:, :, ~gone]
        following["kernel"] = left.reshape(*kernel.shape[:-2], -1, kernel.shape[-1])
        units[name][np.flatnonzero(units[name])[gone]] = False
        went = True
    return went


def _by_unit(kernel: NDArray[Any], width: int) -> NDArray[Any]:
    """See a kernel as (window, positions, units in, units out): a flattened image has many positions."""
    return kernel.reshape(int(np.prod(kernel.shape[:-2])), -1, width, kernel.shape[-1])
