"""Convolution and pooling in the form that is fastest on each platform.

Every function takes and returns channels-last arrays, (batch, height, width, channels), with the same result on every
platform. The form is chosen when the program is lowered, so ``jax.export`` for another platform chooses that platform's
form. The default is ``lax.conv_general_dilated`` and its gradient. There are three other forms:

* A convolution of few channels spends its time on packing, and many replicates with their own kernels form
  a grouped convolution, which is slow in CUDA's library. ``batch_last`` works on (channels, height, width, batch),
  where a tap of the kernel reads contiguous memory of the length of the batch: it cuts patches by slices and multiplies
  them in one matrix product. The transpositions of neighboring layers cancel. On a CPU the patches, their gradient and
  the pooled channels are written in loops: otherwise XLA would compute a sum or a maximum again for each reader, and
  copy each slice twice. With very few channels, writing the patches takes longer on a CPU than the products, so
  they are summed tap by tap. On an H200, a step of twenty LeNets in one program takes .42 ms, instead of 2.16 ms with
  grouped convolutions.
* On a CPU inside a loop (``lax.scan``), a convolution is fast only if its dimensions are in canonical
  order. Those of its gradients are not, and they compile to a loop nest that is a hundred times slower.
  ``channels_last`` writes the gradient of the input as a canonical convolution, and that of the kernel as matrix
  products.
* Under ``vmap`` on CUDA, ``channels_last`` takes both gradients of one grouped convolution, not a grouped convolution
  for each gradient: XLA would copy the input and the gradient of each layer into another order to sum over the batch.
"""

import itertools
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

Pads = tuple[tuple[int, int], tuple[int, int]]
Strides = tuple[int, int]
Gradients = tuple[jax.Array, jax.Array]  # of the input and of the kernel

_CANONICAL = ("NHWC", "HWIO", "NHWC")
_HANDFUL = 4  # up to this number of channels, taps are summed one by one
_CACHED = 3 << 18  # numbers from which a part of a kernel's gradient is computed at a time: 3 MiB of float32


def batch_last(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]], **rest: object
) -> jax.Array:
    """Convolve in 2-D with few channels; pass it to ``nnx.Conv(conv_general_dilated=...)``.

    Args:
      x: (batch, height, width, in_channels).
      kernel: (kernel_height, kernel_width, in_channels, out_channels), of the dtype of ``x``.
      strides: along height and width.
      padding: ``SAME``, ``VALID`` or ((top, bottom), (left, right)).
      **rest: the other arguments of ``nnx.Conv``; only their defaults are supported.

    Returns:
      (batch, out_height, out_width, out_channels).

    Raises:
      ValueError: there is a dilation, there are groups, or the number of dimensions is not 2.
    """
    return _convolve(x, kernel, *_plain(x, kernel, strides, padding, rest), True)


def channels_last(
    x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: str | Sequence[tuple[int, int]], **rest: object
) -> jax.Array:
    """Convolve in 2-D with 16 channels or more; arguments, result and errors are those of ``batch_last``."""
    return _convolve(x, kernel, *_plain(x, kernel, strides, padding, rest), False)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(x: jax.Array, narrow: bool = False) -> jax.Array:
    """Take the maximum over 2 x 2 windows with stride 2; a last odd row or column is left out.

    The gradient goes to the first maximum of a window, in row-major order, as in torch.

    Args:
      x: (batch, height, width, channels).
      narrow: whether the neighboring convolutions are ``batch_last``, which determines the form.

    Returns:
      (batch, height // 2, width // 2, channels).

    >>> max_pool(jnp.arange(9.0).reshape(1, 3, 3, 1)).tolist()
    [[[[4.0]]]]
    """
    return _in_memory_order(_pool, narrow, on_cpu=_pool_in_turn)(x)


def _max_pool_forward(x: jax.Array, narrow: bool) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    y = max_pool(x, narrow)
    return y, (x, y)


def _max_pool_backward(narrow: bool, residuals: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array]:
    return (_in_memory_order(_pool_gradient, narrow)(*residuals, dy),)


max_pool.defvjp(_max_pool_forward, _max_pool_backward)


def relu(x: jax.Array, narrow: bool = False) -> jax.Array:
    """Apply ReLU, with gradient 0 at 0, before a convolution.

    XLA's CPU backend copies a chain of elementwise operations into each of its consumers: block n of a residual stage
    would sum the n blocks before it, once for every use, and the transposition in the kernel's gradient would read all
    of them out of order. For wide layers a matrix product with the identity ends the chain, at a ninth of the cost of
    the convolution.

    Args:
      x: (batch, height, width, channels).
      narrow: whether the neighboring convolutions are ``batch_last``, which determines the form.

    Returns:
      An array of the same shape.
    """
    y = _in_memory_order(jax.nn.relu, narrow)(x)
    return y if narrow else _materialized(y)


def column_sums(x: jax.Array, narrow: bool = False) -> jax.Array:
    """Sum over all axes but the last, (..., channels) -> (channels,).

    On a CPU it is a product with ones, because XLA's reduction over leading axes takes several times as long, and that
    of ``batch_last`` arrays (``narrow``) would first write them channels last.
    """

    def on_cpu(x: jax.Array) -> jax.Array:
        if narrow:
            return _to_batch_last(x).reshape(x.shape[-1], -1) @ jnp.ones(x.size // x.shape[-1], x.dtype)
        return (jnp.ones((1, x.size // x.shape[-1]), x.dtype) @ x.reshape(-1, x.shape[-1]))[0]

    return lax.platform_dependent(x, cpu=on_cpu, default=lambda x: x.sum(tuple(range(x.ndim - 1))))


def affine(x: jax.Array, slope: jax.Array, shift: jax.Array, narrow: bool = False) -> jax.Array:
    """Multiply x, (..., channels), by a slope and add a shift, (channels,) each."""
    last = (1,) * (x.ndim - 1) + (-1,)
    by_channel = slope.reshape(last), shift.reshape(last)
    return _in_memory_order(lambda x, slope, shift: x * slope + shift, narrow)(x, *by_channel)


@jax.custom_vjp
def gradient_in_memory_order(x: jax.Array) -> jax.Array:
    """Return x, the output of a ``batch_last`` convolution that several operations read.

    On a CPU its gradient, the sum of theirs, is written once, in the order of ``batch_last``. XLA would compute it a
    second time, channels last, to sum the gradient of the bias, which takes longer than the convolution.
    """
    return x


def _written_in_memory_order(_: None, dy: jax.Array) -> tuple[jax.Array]:
    on_cpu = lambda dy: _from_batch_last(lax.optimization_barrier(_to_batch_last(dy)))
    return (lax.platform_dependent(dy, cpu=on_cpu, default=lambda dy: dy),)


gradient_in_memory_order.defvjp(lambda x: (x, None), _written_in_memory_order)


# The convolution and its two gradients ------------------------------------------------------------


def _plain(
    x: jax.Array,
    kernel: jax.Array,
    strides: Sequence[int],
    padding: str | Sequence[tuple[int, int]],
    rest: dict[str, object],
) -> tuple[Strides, Pads]:
    """Return the strides and explicit pads of a convolution; raise if other arguments are not the defaults."""
    if x.ndim != 4 or kernel.ndim != 4:
        raise ValueError(f"the input has shape {x.shape} and the kernel {kernel.shape}; both must have 4 axes")
    for name in ("lhs_dilation", "rhs_dilation"):
        if tuple(rest.get(name) or (1, 1)) != (1, 1):
            raise ValueError(f"{name}={rest[name]} must be (1, 1)")
    if rest.get("feature_group_count", 1) != 1:
        raise ValueError(f"feature_group_count={rest['feature_group_count']} must be 1")
    if isinstance(padding, str):
        padding = lax.padtype_to_pads(x.shape[1:3], kernel.shape[:2], strides, padding)
    (top, bottom), (left, right) = padding
    return (strides[0], strides[1]), ((top, bottom), (left, right))


def _handful(kernel: jax.Array, strides: Strides, pads: Pads) -> bool:
    """Whether ``_tap_sums`` can be used: few channels, and a gradient that needs no negative padding."""
    within = all(max(pad) < k for k, pad in zip(kernel.shape[:2], pads, strict=True))
    return max(kernel.shape[2:]) <= _HANDFUL and strides == (1, 1) and within


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _convolve(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads, narrow: bool) -> jax.Array:
    def form(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda x, w: f(x, w, strides, pads)

    if not narrow:
        return _direct(x, kernel, strides, pads)
    on_cpu = _tap_sums if _handful(kernel, strides, pads) else partial(_patch_product, cut=_patches_in_turn)
    return lax.platform_dependent(x, kernel, cpu=form(on_cpu), cuda=form(_patch_product), default=form(_direct))


def _convolve_forward(
    x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads, narrow: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _convolve(x, kernel, strides, pads, narrow), (x, kernel)


def _convolve_backward(
    strides: Strides, pads: Pads, narrow: bool, residuals: tuple[jax.Array, jax.Array], dy: jax.Array
) -> tuple[jax.Array, jax.Array]:
    def form(f: Callable[..., Gradients]) -> Callable[..., Gradients]:
        return lambda x, w, dy: f(x, w, dy, strides, pads)

    if not narrow:
        forms = {"cpu": form(_canonical_gradients), "cuda": form(_grouped_gradients)}
    else:
        in_turn = partial(_patch_product_gradients, cut=_patches_in_turn, join=_joined_in_turn)
        on_cpu = _tap_sums_gradients if _handful(residuals[1], strides, pads) else in_turn
        forms = {"cpu": form(on_cpu), "cuda": form(_patch_product_gradients)}
    return lax.platform_dependent(*residuals, dy, **forms, default=form(_direct_gradients))


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _direct(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    return lax.conv_general_dilated(x, kernel, strides, pads, dimension_numbers=_CANONICAL)


def _direct_gradients(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Strides, pads: Pads) -> Gradients:
    return jax.vjp(lambda x, w: _direct(x, w, strides, pads), x, kernel)[1](dy)


def _grouped_gradients(x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Strides, pads: Pads) -> Gradients:
    """Compute both gradients, under ``vmap`` as those of one grouped convolution."""
    alone = partial(_direct_gradients, strides=strides, pads=pads)
    gradients = jax.custom_batching.custom_vmap(alone)

    @gradients.def_vmap
    def _(
        size: int, batched: Sequence[bool], x: jax.Array, kernel: jax.Array, dy: jax.Array
    ) -> tuple[Gradients, tuple[bool, bool]]:
        if not all(batched):  # such as one kernel for all, with a gradient for each example
            axes = [0 if each else None for each in batched]
            return jax.vmap(alone, axes, axis_size=size)(x, kernel, dy), (True, True)
        grouped = jax.vmap(partial(_direct, strides=strides, pads=pads))
        return jax.vjp(grouped, x, kernel)[1](dy), (True, True)

    differentiable = jax.custom_vjp(gradients)  # custom_vmap has no reverse derivative
    differentiable.defvjp(lambda *a: (gradients(*a), a), lambda a, bars: jax.vjp(alone, *a)[1](bars))
    return differentiable(x, kernel, dy)


def _canonical_gradients(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Strides, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """Compute the input's gradient as a convolution in canonical order, and the kernel's by ``_kernel_gradient``.

    The gradient of the input is the convolution of ``dy``, dilated by the strides, with the flipped kernel.
    """
    spread = [s * (n - 1) + 1 for s, n in zip(strides, dy.shape[1:3], strict=True)]
    sizes = zip(x.shape[1:3], kernel.shape[:2], spread, pads, strict=True)
    around = [(k - 1 - low, n - length + low) for n, k, length, (low, _) in sizes]
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    if strides != (1, 1):
        # Insert explicit zeros, because XLA's dilation of the input is slower.
        zeros = [(0, 0, 0), *((low, high, s - 1) for (low, high), s in zip(around, strides, strict=True)), (0, 0, 0)]
        dy_spread, around = lax.pad(dy, jnp.zeros((), dy.dtype), zeros), [(0, 0), (0, 0)]
    else:
        dy_spread = dy
    dx = lax.conv_general_dilated(dy_spread, turned, (1, 1), around, dimension_numbers=_CANONICAL)
    return dx, _kernel_gradient(x, dy, kernel.shape[:2], strides, pads)


def _kernel_gradient(x: jax.Array, dy: jax.Array, size: tuple[int, int], strides: Strides, pads: Pads) -> jax.Array:
    """Sum the kernel's gradient over groups of images that fit into a core's caches, a matrix product for each group.

    A convolution with the channels as the batch takes two to five times as long, because XLA's CPU backend packs
    patches that span the whole batch.
    """
    numbers = x.shape[1] * dy.shape[2] * (size[1] * x.shape[3] + size[0] * dy.shape[3])  # of one image
    group = min(max(1, _CACHED // numbers), len(x))
    grouped = len(x) - len(x) % group

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        some = (lax.dynamic_slice_in_dim(a, i * group, group) for a in (x, dy))
        return total + _tap_products(*some, size, strides, pads)

    dw = jnp.zeros((*size, x.shape[3], dy.shape[3]), _sum_dtype(x))
    dw = lax.fori_loop(0, grouped // group, add, dw)
    if grouped < len(x):
        dw = dw + _tap_products(x[grouped:], dy[grouped:], size, strides, pads)
    return dw.astype(x.dtype)


def _tap_products(x: jax.Array, dy: jax.Array, size: tuple[int, int], strides: Strides, pads: Pads) -> jax.Array:
    """Compute the kernel's gradient as one matrix product over images, rows of the input and columns of the output.

    One factor has the columns of ``x`` that each column of the kernel reads, the other the rows of ``dy`` to which each
    row of the kernel contributes. Together they have kernel_height + kernel_width copies; patches have one per tap.
    """
    height, (rows, columns) = x.shape[1], dy.shape[1:3]
    (top, _), sides = pads
    wide = jnp.pad(x, ((0, 0), (0, 0), sides, (0, 0)))
    reach = strides[1] * (columns - 1) + 1
    read = [wide[:, :, j : j + reach : strides[1]] for j in range(size[1])]
    reached = []
    for i in range(size[0]):
        first = i - top  # the row of x that tap i reads for the first row of dy
        beyond = height - 1 - (first + strides[0] * (rows - 1))
        places = [(0, 0, 0), (first, beyond, strides[0] - 1), (0, 0, 0), (0, 0, 0)]
        reached.append(lax.pad(dy, jnp.zeros((), dy.dtype), places))
    factors = (jnp.concatenate(taps, -1).reshape(-1, len(taps) * taps[0].shape[-1]) for taps in (read, reached))
    dw = lax.dot_general(*factors, (((0,), (0,)), ((), ())), preferred_element_type=_sum_dtype(x))
    return dw.reshape(size[1], x.shape[3], size[0], dy.shape[3]).transpose(2, 0, 1, 3)


def _sum_dtype(x: jax.Array) -> DTypeLike:
    return x.dtype if jnp.finfo(x.dtype).bits > 32 else jnp.float32


def _patches(x: jax.Array, size: tuple[int, int], out: tuple[int, int], strides: Strides, pads: Pads) -> jax.Array:
    """Cut patches: (channels, height, width, batch) -> (taps * channels, out_height, out_width, batch)."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    reach = [s * (n - 1) + 1 for s, n in zip(strides, out, strict=True)]
    taps = [
        x[:, i : i + reach[0] : strides[0], j : j + reach[1] : strides[1]]
        for i in range(size[0])
        for j in range(size[1])
    ]
    return jnp.concatenate(taps, 0)


def _patches_in_turn(
    x: jax.Array, size: tuple[int, int], out: tuple[int, int], strides: Strides, pads: Pads
) -> jax.Array:
    """Cut the same patches in a loop over taps, because XLA's CPU backend would write every slice twice."""
    x = jnp.pad(x, ((0, 0), *pads, (0, 0)))
    reach = [s * (n - 1) + 1 for s, n in zip(strides, out, strict=True)]

    def cut(tap: jax.Array) -> jax.Array:
        read = lax.dynamic_slice(x, (0, tap // size[1], tap % size[1], 0), (x.shape[0], *reach, x.shape[3]))
        return read[:, :: strides[0], :: strides[1]]

    return lax.map(cut, jnp.arange(size[0] * size[1])).reshape(-1, *out, x.shape[3])


def _patch_product(
    x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads, cut: Callable[..., jax.Array] = _patches
) -> jax.Array:
    sizes = zip(x.shape[1:3], kernel.shape[:2], strides, pads, strict=True)
    height, width = ((n + sum(pad) - k) // s + 1 for n, k, s, pad in sizes)
    patches = cut(_to_batch_last(x), kernel.shape[:2], (height, width), strides, pads)
    y = _product(kernel.reshape(-1, kernel.shape[-1]), patches.reshape(patches.shape[0], -1))
    return _from_batch_last(y.reshape(-1, height, width, x.shape[0]))


@jax.custom_batching.custom_vmap
def _product(kernel: jax.Array, patches: jax.Array) -> jax.Array:
    return kernel.T @ patches


@_product.def_vmap
def _(size: int, batched: Sequence[bool], kernel: jax.Array, patches: jax.Array) -> tuple[jax.Array, bool]:
    """Join the kernels of replicates before their product with the patches of shared images.

    XLA's GPU compiler would join them within a Triton kernel, which then has no tile sizes if the number of output
    channels is not a power of 2: without autotuning, which would replace it, the program does not compile.
    """
    if tuple(batched) != (True, False):
        axes = [0 if each else None for each in batched]
        return jax.vmap(lambda kernel, patches: kernel.T @ patches, axes)(kernel, patches), True
    rows = lax.optimization_barrier(kernel.swapaxes(1, 2).reshape(-1, kernel.shape[1]))
    return (rows @ patches).reshape(size, -1, patches.shape[1]), True


def _joined(d_patches: jax.Array, shape: Sequence[int], width: int, strides: Strides, pads: Pads) -> jax.Array:
    """Sum the gradients of patches, (taps, channels, rows, columns, batch), to that of an input of this shape.

    Args:
      d_patches: gradient of the patches, one entry for each tap.
      shape: (channels, height, width, batch).
      width: columns of the kernel, which number the taps.
      strides: along height and width.
      pads: those of the convolution.
    """
    dx = jnp.zeros(shape, d_patches.dtype)
    for tap, more in enumerate(d_patches):
        places = []
        for offset, n, length, s, (low, _) in zip(
            divmod(tap, width), shape[1:3], more.shape[1:3], strides, pads, strict=True
        ):
            places.append((offset - low, n - (offset - low) - (s * (length - 1) + 1), s - 1))
        dx = dx + lax.pad(more, jnp.zeros((), more.dtype), [(0, 0, 0), *places, (0, 0, 0)])
    return dx


def _joined_in_turn(d_patches: jax.Array, shape: Sequence[int], width: int, strides: Strides, pads: Pads) -> jax.Array:
    """Compute the same sum in a loop over taps, because XLA's CPU backend would compute it again for each reader."""
    between = [(0, 0, 0), (0, 0, strides[0] - 1), (0, 0, strides[1] - 1), (0, 0, 0)]
    around = [(0, 0), *pads, (0, 0)]

    def add(tap: jax.Array, dx: jax.Array) -> jax.Array:
        more = lax.pad(d_patches[tap], jnp.zeros((), dx.dtype), between)
        place = (0, tap // width, tap % width, 0)
        return lax.dynamic_update_slice(dx, lax.dynamic_slice(dx, place, more.shape) + more, place)

    padded = jnp.zeros([n + low + high for n, (low, high) in zip(shape, around, strict=True)], d_patches.dtype)
    dx = lax.fori_loop(0, len(d_patches), add, padded)
    return dx[tuple(slice(low, low + n) for n, (low, _) in zip(shape, around, strict=True))]


def _patch_product_gradients(
    x: jax.Array,
    kernel: jax.Array,
    dy: jax.Array,
    strides: Strides,
    pads: Pads,
    *,
    cut: Callable[..., jax.Array] = _patches,
    join: Callable[..., jax.Array] = _joined,
) -> tuple[jax.Array, jax.Array]:
    rows, columns, out_channels = dy.shape[1:]
    x = _to_batch_last(x)
    patches = cut(x, kernel.shape[:2], (rows, columns), strides, pads)
    dy = _to_batch_last(dy).reshape(out_channels, -1)
    dw = (patches.reshape(patches.shape[0], -1) @ dy.T).reshape(kernel.shape)
    d_patches = (kernel.reshape(-1, out_channels) @ dy).reshape(-1, x.shape[0], rows, columns, x.shape[3])
    dx = join(d_patches, x.shape, kernel.shape[1], strides, pads)
    return _from_batch_last(dx), dw


def _tap_sums(x: jax.Array, kernel: jax.Array, strides: Strides, pads: Pads) -> jax.Array:
    """Convolve with one fused loop per output channel, which reads the input and writes only the output."""
    size, taps = kernel.shape[:2], kernel.reshape(-1, *kernel.shape[2:])
    rows, columns = (n + sum(pad) - k + 1 for n, k, pad in zip(x.shape[1:3], size, pads, strict=True))
    padded = jnp.pad(_to_batch_last(x), ((0, 0), *pads, (0, 0)))
    out = []
    for o in range(kernel.shape[3]):
        total = jnp.zeros((rows, columns, x.shape[0]), x.dtype)
        for tap, (c, channel) in itertools.product(range(len(taps)), enumerate(padded)):
            i, j = divmod(tap, size[1])
            total = total + channel[i : i + rows, j : j + columns] * taps[tap, c, o]
        out.append(total)
    return _from_batch_last(jnp.stack(out))


def _tap_sums_gradients(
    x: jax.Array, kernel: jax.Array, dy: jax.Array, strides: Strides, pads: Pads
) -> tuple[jax.Array, jax.Array]:
    """Compute the input's gradient by tap sums, and the kernel's by small matrix products, a row of ``dy`` at a time.

    A convolution with the channels as the batch takes four times as long.
    """
    (top, bottom), (left, right) = (
        tuple(k - 1 - n for n in pad) for k, pad in zip(kernel.shape[:2], pads, strict=True)
    )
    dx = _tap_sums(dy, kernel[::-1, ::-1].swapaxes(2, 3), strides, ((top, bottom), (left, right)))
    (height, width, channels, outs), columns = kernel.shape, dy.shape[2]
    x, dy = jnp.pad(_to_batch_last(x), ((0, 0), *pads, (0, 0))), _to_batch_last(dy)

    def add(row: jax.Array, total: jax.Array) -> jax.Array:
        reached = lax.dynamic_index_in_dim(dy, row, 1, keepdims=False).reshape(outs, -1)
        read = lax.dynamic_slice_in_dim(x, row, height, 1)
        taps = (read[:, :, j : j + columns].reshape(channels * height, -1) for j in range(width))
        return total + jnp.stack([jnp.matmul(tap, reached.T, preferred_element_type=total.dtype) for tap in taps])

    dw = lax.fori_loop(0, dy.shape[1], add, jnp.zeros((width, channels * height, outs), _sum_dtype(x)))
    return dx, dw.reshape(width, channels, height, outs).transpose(2, 0, 1, 3).astype(x.dtype)


# Pooling, and the order of the axes in memory -------------------------------------------------------


def _windows(x: jax.Array) -> jax.Array:
    """Reshape (a, height, width, b) to (a, height // 2, 2, width // 2, 2, b)."""
    height, width = x.shape[1] // 2, x.shape[2] // 2
    return x[:, : 2 * height, : 2 * width].reshape(x.shape[0], height, 2, width, 2, x.shape[3])


def _pool(x: jax.Array) -> jax.Array:
    x = _windows(x)
    x = jnp.maximum(x[:, :, 0], x[:, :, 1])
    return jnp.maximum(x[:, :, :, 0], x[:, :, :, 1])


def _pool_in_turn(x: jax.Array) -> jax.Array:
    """Pool (channels, height, width, batch) in a loop over channels; what reads the result is not fused with it."""
    return lax.map(lambda channel: _pool(channel[None])[0], x)


def _pool_gradient(x: jax.Array, y: jax.Array, dy: jax.Array) -> jax.Array:
    windows = _windows(x)
    found = [windows[:, :, i, :, j] == y for i, j in ((0, 0), (0, 1), (1, 0))]
    first = jnp.where(found[0], 0, jnp.where(found[1], 1, jnp.where(found[2], 2, 3)))
    place = jnp.arange(4, dtype=first.dtype).reshape(1, 1, 2, 1, 2, 1)
    first, dy = (jnp.expand_dims(a, (2, 4)) for a in (first, dy))
    dx = jnp.where(first == place, dy, jnp.zeros((), dy.dtype))
    dx = dx.reshape(x.shape[0], 2 * y.shape[1], 2 * y.shape[2], x.shape[3])
    return jnp.pad(dx, [(0, n - m) for n, m in zip(x.shape, dx.shape, strict=True)])


def _to_batch_last(x: jax.Array) -> jax.Array:
    return x.transpose(3, 1, 2, 0)


_from_batch_last = _to_batch_last  # swapping the first and the last axis is its own inverse


def _in_memory_order(
    f: Callable[..., jax.Array], narrow: bool, on_cpu: Callable[..., jax.Array] | None = None
) -> Callable[..., jax.Array]:
    """Apply ``f``, which treats the first and the last axis alike, to batch-last arrays where that is faster.

    On a CPU, ``on_cpu`` is applied to these arrays instead if it is given.
    """
    if not narrow:
        return f

    def batch_last(f: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
        return lambda *x: _from_batch_last(f(*map(_to_batch_last, x)))

    plain = batch_last(f)
    cpu = plain if on_cpu is None else batch_last(on_cpu)
    return lambda *x: lax.platform_dependent(*x, cpu=cpu, cuda=plain, default=f)


@jax.custom_vjp
def _materialized(x: jax.Array) -> jax.Array:
    return lax.platform_dependent(
        x,
        cpu=lambda x: (x.reshape(-1, x.shape[-1]) @ jnp.eye(x.shape[-1], dtype=x.dtype)).reshape(x.shape),
        default=lambda x: x,
    )


_materialized.defvjp(lambda x: (_materialized(x), None), lambda _, dy: (dy,))
