"""Both forms of the convolution against XLA's own, everywhere a study runs them."""

import itertools
from functools import partial

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from experiments.models import convolution

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="compares with PyTorch, which only the extra bench installs")

FORMS = {"batch_last": convolution.batch_last, "channels_last": convolution.channels_last}
# (kernel size, strides, padding) of every layer there is, and some with unequal sides.
SHAPES = [
    ((3, 3), (1, 1), "VALID"),
    ((3, 3), (1, 1), "SAME"),
    ((3, 3), (1, 1), ((1, 1), (1, 1))),
    ((3, 3), (2, 2), ((1, 1), (1, 1))),
    ((2, 3), (1, 2), ((0, 1), (2, 0))),
    ((1, 1), (2, 2), "VALID"),
    ((2, 3), (1, 1), ((0, 1), (2, 0))),
    ((2, 3), (1, 1), ((0, 2), (4, 0))),
]


def plain(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def arguments(size, channels=3, outputs=4, image=(9, 8), batch=5):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((batch, *image, channels), dtype=np.float32)
    return jnp.asarray(x), jnp.asarray(rng.standard_normal((*size, channels, outputs), dtype=np.float32))


def value_and_gradients(conv, x, kernel, strides, padding):
    y, pull = jax.vjp(lambda x, w: conv(x, w, strides, padding), x, kernel)
    dy = jnp.asarray(np.random.default_rng(1).standard_normal(y.shape, dtype=np.float32))
    return y, *pull(dy)


@pytest.mark.parametrize(("size", "strides", "padding"), SHAPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outputs", [2, 8])
@pytest.mark.quick(8)
def test_value_and_gradients_are_those_of_xla(form, outputs, size, strides, padding):
    x, kernel = arguments(size, outputs=outputs)
    found = jax.jit(lambda *a: value_and_gradients(FORMS[form], *a, strides, padding))(x, kernel)
    expected = value_and_gradients(plain, x, kernel, strides, padding)
    for name, a, b in zip(("y", "dx", "dw"), found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


@needs_torch
@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_torch(form):
    x, kernel = arguments((3, 3))
    y, dx, dw = value_and_gradients(FORMS[form], x, kernel, (2, 2), ((1, 1), (1, 1)))
    tx = torch.tensor(np.asarray(x).transpose(0, 3, 1, 2), dtype=torch.float64, requires_grad=True)
    tw = torch.tensor(np.asarray(kernel).transpose(3, 2, 0, 1), dtype=torch.float64, requires_grad=True)
    ty = torch.nn.functional.conv2d(tx, tw, stride=2, padding=1)
    dy = np.random.default_rng(1).standard_normal(y.shape, dtype=np.float32)
    ty.backward(torch.tensor(dy.transpose(0, 3, 1, 2), dtype=torch.float64))
    np.testing.assert_allclose(y, ty.detach().numpy().transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(dx, tx.grad.numpy().transpose(0, 2, 3, 1), atol=1e-5)
    np.testing.assert_allclose(dw, tw.grad.numpy().transpose(2, 3, 1, 0), atol=1e-5)


@pytest.mark.parametrize(("size", "strides", "padding"), SHAPES)
@pytest.mark.parametrize("numbers", [1, 900, 1 << 20])
@pytest.mark.quick(8)
def test_kernel_gradient_is_that_of_numpy_for_groups_of_any_size(monkeypatch, numbers, size, strides, padding):
    """One image at a time, groups with some images left over, and the whole batch."""
    monkeypatch.setattr(convolution, "_CACHED", numbers)
    x, kernel = arguments(size)
    y, _, dw = value_and_gradients(convolution.channels_last, x, kernel, strides, padding)
    dy = np.random.default_rng(1).standard_normal(y.shape, dtype=np.float32)
    pads = lax.padtype_to_pads(x.shape[1:3], size, strides, padding) if isinstance(padding, str) else padding
    wide = np.pad(np.asarray(x, np.float64), ((0, 0), *pads, (0, 0)))
    reach = [s * (n - 1) + 1 for s, n in zip(strides, y.shape[1:3], strict=True)]
    for i, j in itertools.product(*map(range, size)):
        read = wide[:, i : i + reach[0] : strides[0], j : j + reach[1] : strides[1]]
        np.testing.assert_allclose(dw[i, j], np.einsum("nhwi,nhwo->io", read, dy), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("outputs", [2, 8])
def test_replicates_and_steps_do_not_change_the_numbers(form, outputs):
    """Under vmap over kernels (and, once, over inputs) inside a scan, as replicates are trained."""
    x, kernel = arguments((3, 3), outputs=outputs)
    kernels = jnp.stack([kernel, 2 * kernel, kernel[::-1]])

    def step(conv, x, w):
        loss = lambda w: (conv(x, w, (1, 1), "SAME") ** 2).sum()
        return w - 1e-4 * jax.grad(loss)(w)

    for in_axes, inputs in ((None, x), (0, jnp.stack([x, x + 1, -x]))):
        many = jax.vmap(lambda x, w: step(FORMS[form], x, w), in_axes=(in_axes, 0))
        found, _ = jax.jit(lambda w: lax.scan(lambda w, _: (many(inputs, w), None), w, None, length=2))(kernels)  # noqa: B023
        for i in range(3):
            each = inputs if in_axes is None else inputs[i]
            expected = step(plain, each, step(plain, each, kernels[i]))
            np.testing.assert_allclose(found[i], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("size", "strides", "padding"), SHAPES)
@pytest.mark.parametrize("shared", [None, "x", "kernel"])
@pytest.mark.quick(3)
def test_gradients_of_replicates_as_on_cuda_are_those_of_numpy(shared, size, strides, padding):
    """In float64; three replicates have their own arrays or share the input or the kernel."""
    x, kernel = (np.asarray(array, np.float64) for array in arguments(size))
    pads = padding if isinstance(padding, tuple) else tuple(lax.padtype_to_pads(x.shape[1:3], size, strides, padding))
    with jax.enable_x64(True):
        y = plain(x, kernel, strides, pads)
        dy = np.random.default_rng(1).standard_normal((3, *y.shape))
        axes = (None if shared == "x" else 0, None if shared == "kernel" else 0, 0)
        x, kernel = (
            a if axis is None else np.stack([a, a + 1, -2 * a]) for a, axis in ((x, axes[0]), (kernel, axes[1]))
        )
        found = jax.vmap(lambda *a: convolution._grouped_gradients(*a, strides, pads), axes)(x, kernel, dy)
    for i in range(3):
        own = (a if axis is None else a[i] for a, axis in zip((x, kernel, dy), axes, strict=True))
        for name, a, b in zip(("dx", "dw"), found, gradients_by_numpy(*own, strides, pads), strict=True):
            np.testing.assert_allclose(a[i], b, rtol=1e-12, atol=1e-12, err_msg=name)


def gradients_by_numpy(x, kernel, dy, strides, pads):
    """Every tap reads one slice of the padded input."""
    padded = np.pad(x, ((0, 0), *pads, (0, 0)))
    dx, dw = np.zeros_like(padded), np.zeros_like(kernel)
    for i, j in np.ndindex(kernel.shape[:2]):
        rows, columns = (
            slice(start, start + s * (n - 1) + 1, s) for start, s, n in zip((i, j), strides, dy.shape[1:3], strict=True)
        )
        dw[i, j] = np.einsum("bhwc,bhwo->co", padded[:, rows, columns], dy)
        dx[:, rows, columns] += dy @ kernel[i, j].T
    (top, _), (left, _) = pads
    return dx[:, top : top + x.shape[1], left : left + x.shape[2]], dw


def test_replicates_on_cuda_take_the_gradient_of_a_grouped_convolution():
    """XLA calls CUDA's library for it without a copy; it is the convolution that groups the batch."""
    x, kernel = (jnp.stack([array] * 3) for array in arguments((3, 3)))
    loss = lambda x, w: (convolution.channels_last(x, w, (1, 1), "SAME") ** 2).sum()
    run = jax.jit(jax.vmap(jax.grad(loss, (0, 1))))
    text = {
        platform: jax.export.export(run, platforms=[platform])(x, kernel).mlir_module() for platform in ("cpu", "cuda")
    }
    groups = {platform: module.count("batch_group_count = 3") for platform, module in text.items()}
    assert groups == {"cpu": 0, "cuda": 1}


@pytest.mark.parametrize("platform", ["cpu", "cuda"])
@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_are_those_of_xla(monkeypatch, form, platform):
    """Of one network and of replicates, in the form of each platform."""
    monkeypatch.setattr(lax, "platform_dependent", lambda *a, default, **forms: forms.get(platform, default)(*a))
    x, kernel = arguments((3, 3))

    def curvature(conv, x, w):
        loss = lambda x, w: (conv(x, w, (2, 2), ((1, 1), (1, 1))) ** 4).sum()
        return jax.grad(lambda x, w: sum((g**2).sum() for g in jax.grad(loss, (0, 1))(x, w)), (0, 1))(x, w)

    many = jnp.stack([kernel, 2 * kernel])
    for axes, w in ((None, kernel), ((None, 0), many), ((0, 0), many)):
        images = jnp.stack([x, x + 1]) if axes == (0, 0) else x
        found, expected = (
            (jax.vmap(partial(curvature, conv), axes) if axes else partial(curvature, conv))(images, w)
            for conv in (FORMS[form], plain)
        )
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4 * abs(np.asarray(b)).max())


@pytest.mark.parametrize(("form", "rest", "message"), [
    ("batch_last", {"rhs_dilation": (2, 2)}, r"rhs_dilation=\(2, 2\) must be \(1, 1\)"),
    ("channels_last", {"feature_group_count": 3}, "feature_group_count=3 must be 1"),
])  # fmt: skip
def test_other_convolutions_are_refused(form, rest, message):
    with pytest.raises(ValueError, match=message):
        FORMS[form](*arguments((3, 3)), (1, 1), "SAME", **rest)


def test_one_dimension_is_refused():
    with pytest.raises(ValueError, match=r"shape \(2, 5, 3\).*must have 4 axes"):
        convolution.batch_last(jnp.ones((2, 5, 3)), jnp.ones((3, 3, 4)), (1,), "SAME")


@pytest.mark.parametrize(("form", "outputs", "on_cpu", "on_cuda"), [
    ("batch_last", 8, 0, 0),
    ("batch_last", 2, 0, 0),
    ("channels_last", 8, 2, 3),
])  # fmt: skip
def test_each_platform_gets_its_own_form(form, outputs, on_cpu, on_cuda):
    """On a CPU no gradient uses XLA's slow loop nests; where no form is faster the plain convolution is kept."""
    x, kernel = arguments((3, 3), outputs=outputs)
    run = jax.jit(lambda x, w: value_and_gradients(FORMS[form], x, w, (1, 1), ((1, 1), (1, 1))))
    text = {
        platform: jax.export.export(run, platforms=[platform])(x, kernel).mlir_module()
        for platform in ("cpu", "cuda", "tpu")
    }
    convolutions = {platform: module.count("stablehlo.convolution") for platform, module in text.items()}
    assert convolutions == {"cpu": on_cpu, "cuda": on_cuda, "tpu": 3}
    canonical = {platform: module.count("[b, 0, 1, f]x[0, 1, i, o]->[b, 0, 1, f]") for platform, module in text.items()}
    assert canonical == {"cpu": on_cpu, "cuda": on_cuda // 3, "tpu": 1}


def test_nnx_conv_takes_both_forms():
    x, _ = arguments((3, 3))
    expected = nnx.Conv(3, 4, (3, 3), padding=1, rngs=nnx.Rngs(0))(x)
    for form in FORMS.values():
        conv = nnx.Conv(3, 4, (3, 3), padding=1, conv_general_dilated=form, rngs=nnx.Rngs(0))
        np.testing.assert_allclose(conv(x), expected, atol=1e-6)


@needs_torch
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("image", [(6, 8), (7, 9)])
def test_max_pool_is_that_of_torch_ties_included(narrow, image):
    x = np.random.default_rng(0).integers(0, 3, (4, *image, 2)).astype(np.float32)
    y, pull = jax.vjp(lambda x: convolution.max_pool(x, narrow), jnp.asarray(x))
    dy = np.random.default_rng(1).standard_normal(y.shape, dtype=np.float32)
    tx = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    ty = torch.nn.functional.max_pool2d(tx, 2)
    ty.backward(torch.tensor(dy.transpose(0, 3, 1, 2)))
    np.testing.assert_array_equal(y, ty.detach().numpy().transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(pull(jnp.asarray(dy))[0], tx.grad.numpy().transpose(0, 2, 3, 1))


@pytest.mark.parametrize("narrow", [False, True])
def test_relu_has_gradient_0_at_0(narrow):
    x = jnp.array([-1.0, 0.0, 2.0]).reshape(1, 3, 1, 1)
    y, pull = jax.vjp(lambda x: convolution.relu(x, narrow), x)
    assert y.ravel().tolist() == [0, 0, 2]
    assert pull(jnp.ones_like(x))[0].ravel().tolist() == [0, 0, 1]


def test_column_sums_are_numpys():
    x = np.random.default_rng(0).standard_normal((6, 5, 4, 3), dtype=np.float32)
    found, gradient = jax.value_and_grad(lambda x: (convolution.column_sums(x) ** 2).sum())(jnp.asarray(x))
    sums = x.sum((0, 1, 2), dtype=np.float64)
    np.testing.assert_allclose(convolution.column_sums(jnp.asarray(x)), sums, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(found, (sums**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(gradient, np.broadcast_to(2 * sums, x.shape), rtol=1e-5, atol=1e-5)


def test_relu_of_a_wide_layer_ends_a_chain_of_elementwise_operations():
    """Without it XLA repeats the preceding computation for each of the two uses."""

    def computed(relu):
        def run(x):
            y = relu(3 * x + 1)
            return y.transpose(3, 1, 2, 0), y * 5

        text = jax.jit(run).lower(jnp.ones((8, 4, 4, 16))).compile().as_text()
        return sum("constant(3)" in line for line in text.splitlines())

    assert (computed(jax.nn.relu), computed(convolution.relu)) == (2, 1)


def test_bfloat16_stays_bfloat16():
    x, kernel = (a.astype(jnp.bfloat16) for a in arguments((3, 3)))
    for form, narrow in itertools.product(FORMS.values(), (False, True)):
        y, dx, dw = value_and_gradients_in_bfloat16(form, narrow, x, kernel)
        assert y.dtype == dx.dtype == dw.dtype == jnp.bfloat16


def value_and_gradients_in_bfloat16(form, narrow, x, kernel):
    y, pull = jax.vjp(lambda x, w: convolution.max_pool(form(x, w, (1, 1), "SAME"), narrow), x, kernel)
    return y, *pull(jnp.ones_like(y))


def test_a_kernel_gradient_in_bfloat16_is_summed_in_float32(monkeypatch):
    monkeypatch.setattr(convolution, "_CACHED", 1)  # one image at a time
    x = jnp.full((300, 3, 3, 1), 1 + 2**-7, jnp.bfloat16)
    kernel = jnp.zeros((3, 3, 1, 16), jnp.bfloat16)
    _, pull = jax.vjp(lambda w: convolution.channels_last(x, w, (1, 1), "VALID"), kernel)
    (dw,) = pull(jnp.ones((300, 1, 1, 16), jnp.bfloat16))
    assert (dw == jnp.bfloat16(300 * (1 + 2**-7))).all()
