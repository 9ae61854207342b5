"""Roles that the program is read for equal those measured by derivatives, on programs drawn at random."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jprune
from tests.graph.models import roles
from tests.graph.probe import measured_roles

SIZES = {"s": 2, "t": 2, "i": 3, "j": 2, "o": 2, "p": 2}


def _drawn(seed):
    """A product of data and a kernel, with axes in random order and the kernel rearranged at random first."""
    draw = np.random.default_rng(seed)
    pick = lambda names: [name for name in names if draw.random() < 0.6]
    stacked, inputs, outputs = pick("st"), pick("ij") or ["i"], pick("op") or ["o"]
    kernel = "".join(draw.permutation([*stacked, *inputs, *outputs]))
    data = "".join(draw.permutation([*stacked, *inputs, "b"]))
    result = "".join(draw.permutation([*stacked, *outputs, "b"]))
    sizes = {**SIZES, "b": 2}
    order = draw.permutation(len(kernel))
    stored = [sizes[kernel[place]] for place in order]
    arrange = [_transposed, _flat, _in_pieces, _in_a_call, _chosen_by_cond][draw.integers(5)]

    def apply(params, x):
        w = arrange(params["w"]).transpose(np.argsort(order))
        return jnp.einsum(f"{data},{kernel}->{result}", x, w)

    shape = [sizes[name] for name in data]
    expected = ["s" if kernel[p] in "st" else "i" if kernel[p] in "ij" else "o" for p in order]
    params = {"w": jnp.asarray(draw.normal(size=stored), jnp.float32)}
    return apply, params, jnp.asarray(draw.normal(size=shape), jnp.float32), " ".join(expected)


def _transposed(w):
    return jnp.swapaxes(w, 0, -1)[::-1].swapaxes(0, -1)


def _flat(w):
    return w.reshape(-1).reshape(w.shape) if w.ndim < 2 else w.reshape(1, *w.shape, 1)[0, ..., 0]


def _in_pieces(w):
    return jnp.concatenate([2 * w[:1], w[1:]])


def _in_a_call(w):
    return jax.checkpoint(jax.jit(lambda w: w * jnp.arange(1.0, 1 + w.shape[0]).reshape(-1, *[1] * (w.ndim - 1))))(w)


def _chosen_by_cond(w):
    return jax.lax.cond(w.sum() > -100, lambda: w, lambda: 2 * w)


@pytest.mark.parametrize("seed", range(24))
@pytest.mark.quick(10)
def test_products_drawn_at_random(seed):
    apply, params, x, expected = _drawn(seed)
    assert measured_roles(apply, params, x) == {"w": expected}
    assert roles(jprune.trace_model(apply, params, x)) == {"w": expected}


def _convolution(layout, kernel_layout, **options):
    def apply(params, x):
        numbers = (layout, kernel_layout, layout)
        return jax.lax.conv_general_dilated(x, params["w"], (1,), "VALID", dimension_numbers=numbers, **options)

    return apply


@pytest.mark.parametrize(("layout", "kernel_layout"), [("NWC", "WIO"), ("NCW", "OIW"), ("CWN", "IWO"), ("WNC", "OWI")])
def test_convolutions_of_any_layout(layout, kernel_layout):
    draw = np.random.default_rng(0)
    sizes = {"N": 2, "W": 3, "C": 2, "I": 2, "O": 3}
    # A window as wide as the data: every weight then multiplies one position of it, so spatial axes are summed over.
    x = jnp.asarray(draw.normal(size=[sizes[name] for name in layout]), jnp.float32)
    params = {"w": jnp.asarray(draw.normal(size=[sizes[name] for name in kernel_layout]), jnp.float32)}
    apply = _convolution(layout, kernel_layout)
    assert measured_roles(apply, params, x)["w"].split() == ["o" if name == "O" else "i" for name in kernel_layout]
    read = " ".join({"O": "o", "I": "i", "W": "w"}[name] for name in kernel_layout)
    assert roles(jprune.trace_model(apply, params, x)) == {"w": read}
