import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jprune
from experiments.models import networks
from jprune import trees

try:
    import torch
except ImportError:
    torch = None

needs_torch = pytest.mark.skipif(torch is None, reason="compares with PyTorch, which only the extra bench installs")

MNIST, CIFAR = (28, 28, 1), (32, 32, 3)


def create(name, shape=CIFAR, classes=10, **options):
    return networks.create(name, num_classes=classes, input_shape=shape, rngs=nnx.Rngs(0), **options)


def count(state):
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def sizes(model):
    """The number of all parameters and of the prunable ones."""
    params = nnx.state(model, nnx.Param)
    return count(params), count(trees.only(params, jprune.by_path(exclude=r"^head/")))


@pytest.mark.parametrize(("name", "shape", "total", "prunable"), [
    ("lenet", MNIST, 60_074, 58_998),
    ("lenet-300-100", MNIST, 266_610, 265_200),
    ("mlp", (8, 8, 1), 50_610, 49_200),
    ("resnet20", CIFAR, 269_722, 267_696),
    ("resnet32", CIFAR, 464_154, 461_232),
    pytest.param("resnet44", CIFAR, 658_586, 654_768, marks=pytest.mark.slow),
    ("resnet56", CIFAR, 853_018, 848_304),
    pytest.param("resnet110", CIFAR, 1_727_962, 1_719_216, marks=pytest.mark.slow),
    ("vgg11", CIFAR, 9_231_114, 9_217_728),
])  # fmt: skip
def test_parameter_counts_are_the_published_ones(name, shape, total, prunable):
    """He et al. 2016 print .27, .46, .66, .85 and 1.7 million; the rest is counted by hand."""
    abstract = nnx.eval_shape(lambda: create(name, shape))
    assert sizes(abstract) == (total, prunable)


@pytest.mark.parametrize(("depth", "width", "classes"), [(1, 2, 10), (10, 8, 10), (20, 16, 100), (3, 192, 10)])
def test_the_rectangular_conv_net_has_the_formulas_parameters(depth, width, classes):
    d, w, k = depth, width, classes
    model = nnx.eval_shape(lambda: create("conv", classes=k, depth=d, width=w))
    assert sizes(model)[0] == 28 * w + (d - 1) * w * (9 * w + 1) + 2 * w * k + k


def test_the_flat_conv_net_reads_every_position():
    model = nnx.eval_shape(lambda: create("conv", MNIST, depth=3, width=2, readout="flatten"))
    assert sizes(model)[0] == 20 + 2 * 38 + 784 * 2 * 10 + 10


def test_the_dense_net_of_50_layers_of_4():
    model = create("dense", (13,), classes=3, depth=50, width=4)
    assert sizes(model)[0] == 14 * 4 + 49 * 20 + 15
    assert model(jnp.ones((2, 13))).shape == (2, 3)


# Against torch --------------------------------------------------------------------------------------


def weights(module):
    """A torch module's weights in the layout of Flax."""
    kernel = module.weight.detach().numpy()
    kernel = kernel.transpose(2, 3, 1, 0) if kernel.ndim == 4 else kernel.T
    return kernel, None if module.bias is None else module.bias.detach().numpy()


def copy(layer, module):
    kernel, bias = weights(module)
    layer.kernel[...] = jnp.asarray(kernel)
    if bias is not None:
        layer.bias[...] = jnp.asarray(bias)


def images(shape, batch=4):
    return np.random.default_rng(0).standard_normal((batch, *shape), dtype=np.float32)


@needs_torch
def test_lenet_computes_what_torch_does():
    torch.manual_seed(0)
    net = torch.nn.ModuleDict(
        {
            "conv1": torch.nn.Conv2d(1, 6, 3),
            "conv2": torch.nn.Conv2d(6, 16, 3),
            "dense1": torch.nn.Linear(400, 120),
            "dense2": torch.nn.Linear(120, 84),
            "head": torch.nn.Linear(84, 10),
        }
    )
    model = create("lenet", MNIST)
    for name, module in net.items():
        copy(getattr(model, name), module)
    x = images(MNIST)
    y = torch.tensor(x.transpose(0, 3, 1, 2))
    for name in ("conv1", "conv2"):
        y = torch.nn.functional.max_pool2d(torch.relu(net[name](y)), 2)
    y = y.permute(0, 2, 3, 1).flatten(1)  # positions before channels, as here
    y = net["head"](torch.relu(net["dense2"](torch.relu(net["dense1"](y)))))
    np.testing.assert_allclose(jax.jit(model)(jnp.asarray(x)), y.detach().numpy(), atol=1e-5)


def torch_block(block, x):
    """A residual block by torch, in train mode, with the weights of ours."""

    def conv(layer, x):
        kernel = torch.tensor(np.asarray(layer.kernel[...]).transpose(3, 2, 0, 1))
        return torch.nn.functional.conv2d(x, kernel, stride=layer.strides, padding=1)

    def norm(x):
        return torch.nn.functional.batch_norm(x, None, None, training=True)

    y = norm(conv(block.conv2, torch.relu(norm(conv(block.conv1, x)))))
    if block.stride == 2:
        more = (y.shape[1] - x.shape[1]) // 2
        x = torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))
    return torch.relu(x + y)


@needs_torch
@pytest.mark.parametrize(("inputs", "outputs", "stride"), [(4, 4, 1), (4, 8, 2)])
def test_a_residual_block_computes_what_torch_does_gradients_too(inputs, outputs, stride):
    block = networks.Block(inputs, outputs, stride, rngs=nnx.Rngs(0))
    x = images((8, 8, inputs))
    tx = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    ty = torch_block(block, tx)
    graphdef, state = nnx.split(block)

    @jax.jit
    def forward(x):
        return nnx.merge(graphdef, state, copy=True)(x)

    y, pull = jax.vjp(forward, jnp.asarray(x))
    np.testing.assert_allclose(y, ty.detach().numpy().transpose(0, 2, 3, 1), atol=2e-5)
    dy = images(y.shape[1:])
    ty.backward(torch.tensor(dy.transpose(0, 3, 1, 2)))
    np.testing.assert_allclose(pull(jnp.asarray(dy))[0], tx.grad.numpy().transpose(0, 2, 3, 1), atol=2e-5)


@pytest.mark.parametrize("narrow", [False, True])
def test_batch_norm_is_flaxs_and_its_statistics_move_by_a_tenth(narrow):
    x = jnp.asarray(3 * images((5, 5, 6)) + 1)
    ours, flax = (
        networks.BatchNorm(6, narrow=narrow, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(6, momentum=0.9, rngs=nnx.Rngs(0)),
    )
    np.testing.assert_allclose(ours(x), flax(x), atol=1e-5)
    mean, variance = np.asarray(x).mean((0, 1, 2)), np.asarray(x).var((0, 1, 2))
    np.testing.assert_allclose(ours.mean[...], 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(ours.var[...], 0.9 + 0.1 * variance, rtol=1e-5)
    for module in (ours, flax):
        module.eval()
    np.testing.assert_allclose(ours(x), flax(x), atol=1e-5)


def test_batch_statistics_are_a_state_of_their_own_for_each_replicate():
    """Two replicates under vmap: same weights, different data, different statistics; no parameter moves."""
    model = networks.ResNet(8, (8, 8, 3), 10, rngs=nnx.Rngs(0))
    graphdef, params, stats = nnx.split(model, nnx.Param, nnx.BatchStat)
    stacked = jax.tree.map(lambda x: jnp.stack([x, x]), stats)
    x = jnp.asarray(np.stack([images((8, 8, 3)), images((8, 8, 3)) + 1]))

    def run(stats, x):
        model = nnx.merge(graphdef, params, stats, copy=True)
        logits = model(x)
        return logits, *nnx.split(model, nnx.Param, nnx.BatchStat)[1:]

    logits, params_after, stats_after = jax.jit(jax.vmap(run, out_axes=(0, None, 0)))(stacked, x)
    run = jax.jit(run)
    assert all((a == b).all() for a, b in zip(*map(jax.tree.leaves, (params, params_after)), strict=True))
    assert set(trees.flatten(stats)[0]) == set(trees.flatten(stats_after)[0])
    moved = stats_after["norm"]["mean"][...]
    assert (np.abs(moved[0] - moved[1]) > 1e-3).any()
    for i in range(2):
        alone = run(stats, x[i])
        np.testing.assert_allclose(logits[i], alone[0], atol=1e-4)
        np.testing.assert_allclose(moved[i], alone[2]["norm"]["mean"][...], atol=1e-5)


# Initial weights ------------------------------------------------------------------------------------


def test_resnets_start_he_normal():
    kernel = np.asarray(create("resnet20").blocks[8].conv2.kernel[...])
    sd = np.sqrt(2 / (9 * 64))
    np.testing.assert_allclose(kernel.std(), sd, rtol=0.02)
    assert np.abs(kernel).max() > 3 * sd  # not truncated at two deviations


@needs_torch
def test_torchs_initial_weights_fill_their_range_biases_too():
    model = create("conv", depth=2, width=64)
    for layer, fan_in in ((model.convs[0], 27), (model.convs[1], 576), (model.head, 128)):
        for leaf in (layer.kernel[...], layer.bias[...]):
            largest = float(jnp.abs(leaf).max()) * np.sqrt(fan_in)
            assert 0.8 < largest <= 1
    torch.manual_seed(0)
    theirs = torch.nn.Conv2d(64, 64, 3)
    ours = np.asarray(model.convs[1].kernel[...])
    np.testing.assert_allclose(ours.std(), theirs.weight.std().item(), rtol=0.02)


def test_glorot_uniform_fills_its_range_with_zero_biases():
    model = create("dense", (100,), depth=1, width=200)
    bound = np.sqrt(6 / 300)
    largest = float(jnp.abs(model.hidden[0].kernel[...]).max())
    assert 0.99 * bound < largest <= bound
    assert not model.hidden[0].bias[...].any()


# Use ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "shape", "paths"), [
    ("lenet", MNIST, ["conv1", "conv2", "dense1", "dense2"]),
    ("mlp", (8, 8, 1), ["hidden/0", "hidden/1"]),
    ("conv", (8, 8, 3), ["convs/0", "convs/1"]),
])  # fmt: skip
def test_preactivations_come_in_call_order_channels_last(name, shape, paths):
    model = create(name, shape, **({"depth": 2, "width": 3} if name == "conv" else {}))
    x = jnp.asarray(images(shape))
    found = jax.jit(jprune.preactivations)(model, x)
    assert list(found) == paths
    group, _, index = paths[0].partition("/")
    layer = getattr(model, group)[int(index)] if index else getattr(model, group)
    np.testing.assert_allclose(found[paths[0]], layer(x.reshape(4, -1) if name == "mlp" else x), atol=1e-6)


# Convolutions: each layer forward, its input's gradient but for the first layer, and its kernel's but on a CPU.
@pytest.mark.parametrize(
    ("name", "shape", "convolutions"),
    [
        pytest.param("resnet20", CIFAR, {"cpu": 37, "cuda": 56, "tpu": 56}, marks=pytest.mark.slow),
        ("lenet", MNIST, {"cpu": 0, "cuda": 0, "tpu": 5}),
    ],
)
@pytest.mark.optax_promotes
def test_gradients_lower_for_every_platform_each_in_its_own_form(name, shape, convolutions):
    graphdef, params, stats = nnx.split(nnx.eval_shape(lambda: create(name, shape)), nnx.Param, ...)

    def loss(params, stats, x, labels):
        model = nnx.merge(graphdef, params, stats, copy=True)
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    x, labels = jax.ShapeDtypeStruct((8, *shape), jnp.float32), jax.ShapeDtypeStruct((8,), jnp.int32)
    for platform, expected in convolutions.items():
        exported = jax.export.export(jax.jit(jax.grad(loss)), platforms=[platform])(params, stats, x, labels)
        assert exported.mlir_module().count("stablehlo.convolution") == expected


@pytest.mark.parametrize(("name", "shape", "options"), [
    ("vgg11", CIFAR, {}),
    ("resnet20", CIFAR, {}),
    ("conv", (9, 8, 3), {"depth": 2, "width": 4}),
    ("conv", (9, 8, 3), {"depth": 2, "width": 16, "readout": "flatten"}),
])  # fmt: skip
def test_logits_have_a_column_for_each_class(name, shape, options):
    def logits(x):
        model = create(name, shape, classes=7, **options)
        model.eval()
        return model(x)

    assert jax.eval_shape(logits, jax.ShapeDtypeStruct((2, *shape), jnp.float32)).shape == (2, 7)


@pytest.mark.parametrize(("name", "arguments", "message"), [
    ("alexnet", {}, "model='alexnet' is not a model; there are mlp, .*vgg11"),
    ("lenet", {"shape": (784,)}, r"input_shape=\(784,\) must be \(height, width, channels\) for 'lenet'"),
    ("lenet", {"shape": (9, 28, 1)}, r"input_shape=\(9, 28, 1\) is too small; LeNet needs at least 10 x 10"),
    ("vgg11", {"shape": MNIST}, "VGG-11 needs at least 32 x 32 pixels"),
    ("conv", {"depth": 0, "width": 2}, "depth=0 must be a whole number of at least 1"),
    ("dense", {"depth": 2, "width": 0}, "width=0 must be a whole number of at least 1"),
    ("dense", {"depth": 1.5, "width": 3}, r"depth=1\.5 must be a whole number"),
    ("dense", {"depth": 1, "width": "x"}, "width='x' must be a whole number"),
    ("mlp", {"features": "x"}, "features='x' must be a tuple of whole numbers of at least 1, such as"),
    ("mlp", {"features": (3, 0)}, r"features=\(3, 0\) must be a tuple of whole numbers"),
    ("mlp", {"features": 3}, "features=3 must be a tuple"),
    ("conv", {"depth": 1, "width": 2, "readout": "mean"}, "readout='mean' must be 'average_max' or 'flatten'"),
    ("mlp", {"init": "zeros"}, "init='zeros' must be one of"),
])  # fmt: skip
def test_invalid_models_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        create(name, **arguments)


def test_a_resnet_of_another_depth_is_refused():
    with pytest.raises(ValueError, match="depth=18 must be 6 n \\+ 2"):
        networks.ResNet(18, CIFAR, 10, rngs=nnx.Rngs(0))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        # Inside the blocks 3 x 16, 32, 64; in the stream 16, and 16 and 32 where shortcuts pad zeros.
        ("resnet20", [16] * 5 + [32] * 4 + [64] * 3),
        ("vgg11", [64, 128, 256, 256, 512, 512, 512, 512]),
    ],
)
def test_wide_networks_can_lose_channels(name, sizes):
    """ReLU ends in a product with an identity matrix, which loses the channels of its operand."""
    graphdef, params, state = nnx.split(nnx.eval_shape(lambda: create(name)), nnx.Param, ...)
    apply = lambda p, x, *, state: nnx.merge(graphdef, p, state)(x)
    graph = jprune.trace_model(apply, params, jax.ShapeDtypeStruct((1, *CIFAR), jnp.float32), state=state)
    assert sorted(group.size for group in graph.channels) == sizes
    assert all(group.exact for group in graph.channels)
