"""Built-in networks of the studies, in Flax NNX.

The output layer of every model is called ``head``, so that a study can leave it dense with
``jprune.by_path(exclude=r"^head/")``. Statistics of batch normalization are ``nnx.BatchStat`` variables,
which are separate from the parameters; ``model.train()`` and ``model.eval()`` choose whether they are
updated or used. Images are channels-last; dense models flatten their inputs.
"""

import functools
import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import PaddingLike
from jax import lax
from jax.typing import DTypeLike

from experiments.models import convolution
from experiments.models.options import arguments_of

Init = Literal["lecun", "glorot", "he", "torch"]
Initializer = Callable[[jax.Array, Sequence[int], DTypeLike], jax.Array]


def initializers(init: Init, fan_in: int) -> dict[str, Initializer]:
    """Return the initializers of a layer, as keyword arguments of ``nnx.Linear`` and ``nnx.Conv``.

    ``lecun``: truncated normal of variance 1 / fan_in. ``glorot``: uniform, Glorot and Bengio 2010.
    ``he``: normal of variance 2 / fan_in, He et al. 2015. These have biases of 0. ``torch``: kernels
    and biases uniform in +-1 / sqrt(fan_in), the default of torch.

    Args:
      init: one of the names above.
      fan_in: number of inputs of one unit.

    Raises:
      ValueError: an unknown name.

    >>> sorted(initializers("torch", 9))
    ['bias_init', 'kernel_init']
    """
    if init == "torch":
        bound = 1 / math.sqrt(fan_in)
        uniform = lambda key, shape, dtype, **_: jax.random.uniform(key, shape, dtype, -bound, bound)
        return {"kernel_init": uniform, "bias_init": uniform}
    kernels = {
        "lecun": nnx.initializers.lecun_normal(),
        "glorot": nnx.initializers.glorot_uniform(),
        "he": nnx.initializers.variance_scaling(2.0, "fan_in", "normal"),
    }
    if init not in kernels:
        raise ValueError(f"init={init!r} must be one of 'lecun', 'glorot', 'he', 'torch'")
    return {"kernel_init": kernels[init], "bias_init": nnx.initializers.zeros_init()}


def _linear(inputs: int, outputs: int, init: Init, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(inputs, outputs, **initializers(init, inputs), rngs=rngs)


def _conv(
    inputs: int, outputs: int, init: Init, rngs: nnx.Rngs, *, narrow: bool, padding: PaddingLike = 1, **options: object
) -> nnx.Conv:
    """Create a 3 x 3 convolution in the form of ``experiments.models.convolution`` for this number of channels."""
    form = convolution.batch_last if narrow else convolution.channels_last
    initial = initializers(init, 9 * inputs)
    return nnx.Conv(
        inputs, outputs, (3, 3), padding=padding, conv_general_dilated=form, **initial, **options, rngs=rngs
    )


class BatchNorm(nnx.BatchNorm):
    """``nnx.BatchNorm`` with moments by ``convolution.column_sums`` and torch's momentum, .9.

    The running variance is the biased one, as in Flax. ``narrow`` is as for the neighboring convolutions.
    """

    def __init__(self, features: int, *, narrow: bool = False, rngs: nnx.Rngs):
        super().__init__(features, momentum=0.9, epsilon=1e-5, rngs=rngs)
        self.narrow = narrow

    def __call__(self, x: jax.Array) -> jax.Array:
        """(..., channels) -> (..., channels)."""
        if self.narrow:
            x = convolution.gradient_in_memory_order(x)
        if self.use_running_average:
            mean, variance = self.mean[...], self.var[...]
        else:
            count = x.size // x.shape[-1]
            mean = convolution.column_sums(x, self.narrow) / count
            variance = jnp.maximum(convolution.column_sums(x * x, self.narrow) / count - mean * mean, 0)
            self.mean[...] = self.momentum * self.mean[...] + (1 - self.momentum) * lax.stop_gradient(mean)
            self.var[...] = self.momentum * self.var[...] + (1 - self.momentum) * lax.stop_gradient(variance)
        slope = self.scale[...] * lax.rsqrt(variance + self.epsilon)
        shift = self.bias[...] - mean * slope
        return convolution.affine(x, slope, shift, self.narrow)


class MLP(nnx.Module):
    """Dense layers with ReLU between them; an input of any shape is flattened.

    Args:
      inputs: number of entries of one example.
      num_classes: units of the output layer.
      features: units of each hidden layer.
      init: as in ``initializers``.
      rngs: random keys of the initializers.
    """

    def __init__(
        self,
        inputs: int,
        num_classes: int,
        *,
        features: Sequence[int] = (300, 100),
        init: Init = "lecun",
        rngs: nnx.Rngs,
    ):
        sizes = itertools.pairwise((inputs, *features))
        self.hidden = nnx.List(_linear(i, o, init, rngs) for i, o in sizes)
        self.head = _linear((inputs, *features)[-1], num_classes, init, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, ...) -> logits (batch, num_classes)."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.head(x)


class LeNet(nnx.Module):
    """Two 3 x 3 convolutions without padding, each followed by pooling, and three dense layers.

    60,074 parameters for 28 x 28 x 1 and 10 classes: the LeNet of the recall-distortion study.
    """

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, *, init: Init = "torch", rngs: nnx.Rngs):
        height, width = (((n - 2) // 2 - 2) // 2 for n in input_shape[:2])
        if min(height, width) < 1:
            raise ValueError(f"input_shape={input_shape} is too small; LeNet needs at least 10 x 10 pixels")
        self.conv1 = _conv(input_shape[2], 6, init, rngs, narrow=True, padding="VALID")
        self.conv2 = _conv(6, 16, init, rngs, narrow=True, padding="VALID")
        self.dense1 = _linear(height * width * 16, 120, init, rngs)
        self.dense2 = _linear(120, 84, init, rngs)
        self.head = _linear(84, num_classes, init, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) -> logits (batch, num_classes)."""
        for conv in (self.conv1, self.conv2):
            x = convolution.max_pool(convolution.relu(conv(x), narrow=True), narrow=True)
        x = x.reshape(x.shape[0], -1)
        for dense in (self.dense1, self.dense2):
            x = nnx.relu(dense(x))
        return self.head(x)


class Block(nnx.Module):
    """Two 3 x 3 convolutions with batch normalization, and a shortcut without parameters.

    If the block halves the image, the shortcut takes every second pixel and pads the channels with
    zeros, half of them on each side (option A of He et al. 2016).
    """

    def __init__(self, inputs: int, outputs: int, stride: int, *, rngs: nnx.Rngs):
        conv = functools.partial(_conv, init="he", rngs=rngs, narrow=False, use_bias=False)
        self.conv1 = conv(inputs, outputs, strides=stride)
        self.norm1 = BatchNorm(outputs, rngs=rngs)
        self.conv2 = conv(outputs, outputs)
        self.norm2 = BatchNorm(outputs, rngs=rngs)
        self.stride = stride

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, inputs) -> (batch, height / stride, width / stride, outputs)."""
        y = convolution.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        more = y.shape[-1] - x.shape[-1]
        x = jnp.pad(x[:, :: self.stride, :: self.stride], ((0, 0), (0, 0), (0, 0), (more // 2, more - more // 2)))
        return convolution.relu(x + y)


class ResNet(nnx.Module):
    """Residual network for CIFAR of depth 6 n + 2: three stages of n blocks, 16, 32, 64 channels.

    He et al. 2016, section 4.2, shortcuts of option A; He normal kernels. For 10 classes ResNet-20
    has 269,722 parameters and ResNet-56 853,018.
    """

    def __init__(self, depth: int, input_shape: tuple[int, int, int], num_classes: int, *, rngs: nnx.Rngs):
        if depth < 8 or depth % 6 != 2:
            raise ValueError(f"depth={depth} must be 6 n + 2, such as 20, 32, 44, 56 or 110")
        self.stem = _conv(input_shape[2], 16, "he", rngs, narrow=False, use_bias=False)
        self.norm = BatchNorm(16, rngs=rngs)
        blocks, inputs = [], 16
        for outputs in (16, 32, 64):
            for _ in range(depth // 6):
                blocks.append(Block(inputs, outputs, outputs // inputs, rngs=rngs))
                inputs = outputs
        self.blocks = nnx.List(blocks)
        self.head = _linear(64, num_classes, "he", rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) -> logits (batch, num_classes)."""
        x = convolution.relu(self.norm(self.stem(x)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


class VGG(nnx.Module):
    """VGG-11 for CIFAR: eight 3 x 3 convolutions with batch normalization and five poolings.

    Simonyan and Zisserman 2015, configuration A, with one dense layer instead of three. 9,231,114 parameters
    for 32 x 32 x 3 and 10 classes.
    """

    _WIDTHS = ((64,), (128,), (256, 256), (512, 512), (512, 512))

    def __init__(self, input_shape: tuple[int, int, int], num_classes: int, *, init: Init = "he", rngs: nnx.Rngs):
        height, width = (n // 32 for n in input_shape[:2])
        if min(height, width) < 1:
            raise ValueError(f"input_shape={input_shape} is too small; VGG-11 needs at least 32 x 32 pixels")
        widths = [input_shape[2], *itertools.chain(*self._WIDTHS)]
        self.convs = nnx.List(_conv(i, o, init, rngs, narrow=False) for i, o in itertools.pairwise(widths))
        self.norms = nnx.List(BatchNorm(o, rngs=rngs) for o in widths[1:])
        self.head = _linear(height * width * 512, num_classes, init, rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) -> logits (batch, num_classes)."""
        layers = zip(self.convs, self.norms, strict=True)
        for stage in self._WIDTHS:
            for conv, norm in itertools.islice(layers, len(stage)):
                x = convolution.relu(norm(conv(x)))
            x = convolution.max_pool(x)
        return self.head(x.reshape(x.shape[0], -1))


class RectangularConv(nnx.Module):
    """``depth`` 3 x 3 convolutions of ``width`` channels with ReLU, and one dense layer.

    With ``readout="average_max"`` the inputs of the dense layer are the global average and the global
    maximum of every channel, as in the CIFAR grids of the jumpstart study: 28 w + (d-1) w (9w+1) + 2wK + K
    parameters for 3 input channels and K classes. With ``"flatten"`` they are all positions, as in its MNIST
    grid.
    """

    def __init__(
        self,
        input_shape: tuple[int, int, int],
        num_classes: int,
        *,
        depth: int,
        width: int,
        readout: Literal["average_max", "flatten"] = "average_max",
        init: Init = "torch",
        rngs: nnx.Rngs,
    ):
        _positive(depth=depth, width=width)
        if readout not in ("average_max", "flatten"):
            raise ValueError(f"readout={readout!r} must be 'average_max' or 'flatten'")
        self.narrow = width < 16
        widths = itertools.pairwise((input_shape[2], *[width] * depth))
        self.convs = nnx.List(_conv(i, o, init, rngs, narrow=self.narrow) for i, o in widths)
        read = 2 if readout == "average_max" else math.prod(input_shape[:2])
        self.head = _linear(read * width, num_classes, init, rngs)
        self.readout = readout

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, channels) -> logits (batch, num_classes)."""
        for conv in self.convs:
            x = convolution.relu(conv(x), self.narrow)
        if self.readout == "flatten":
            return self.head(x.reshape(x.shape[0], -1))
        return self.head(jnp.concatenate([x.mean((1, 2)), x.max((1, 2))], -1))


def create(
    name: str, *, num_classes: int, input_shape: tuple[int, ...], rngs: nnx.Rngs, **options: object
) -> nnx.Module:
    """Create a built-in model.

    | name | options, with their defaults |
    |---|---|
    | ``mlp`` (``lenet-300-100`` is another name) | ``features=(300, 100)``, ``init="lecun"`` |
    | ``lenet`` | ``init="torch"`` |
    | ``resnet20``, ``resnet32``, ``resnet44``, ``resnet56``, ``resnet110`` | |
    | ``vgg11`` | ``init="he"`` |
    | ``dense`` | ``depth``, ``width``, ``init="glorot"`` |
    | ``conv`` | ``depth``, ``width``, ``readout="average_max"``, ``init="torch"`` |

    Args:
      name: one of the above.
      num_classes: units of the output layer.
      input_shape: shape of one example; the convolutional models need (height, width, channels).
      rngs: random keys of the initializers.
      **options: as in the table; ``init`` as in ``initializers``.

    Raises:
      ValueError: a name or option is unknown, a required option is missing, or the shape is unsuitable.

    >>> model = create("dense", num_classes=2, input_shape=(3,), rngs=nnx.Rngs(0), depth=2, width=4)
    >>> model(jnp.ones((5, 3))).shape
    (5, 2)
    """
    if name not in _MODELS:
        raise ValueError(
            f"model={name!r} is not a model; there are {', '.join(_MODELS)}, and package.module:Class for your own"
        )
    if name not in _FLAT and len(input_shape) != 3:
        raise ValueError(f"input_shape={input_shape} must be (height, width, channels) for {name!r}")
    arguments = arguments_of(_OPTIONS.get(name, _MODELS[name]))
    accepted = {key: value for key, value in arguments.items() if value.kind is inspect.Parameter.KEYWORD_ONLY}
    accepted.pop("rngs", None)
    if lacking := [key for key, value in accepted.items() if value.default is value.empty and key not in options]:
        raise ValueError(f"model={name!r} needs the model_options {', '.join(lacking)}, such as {lacking[0]}=4")
    if surplus := [key for key in options if key not in accepted]:
        raise ValueError(
            f"model={name!r} has no option {surplus[0]!r}; its options are {', '.join(accepted) or 'none'}"
        )
    return _MODELS[name](tuple(input_shape), num_classes, rngs=rngs, **options)


def _mlp(input_shape: tuple[int, ...], num_classes: int, *, rngs: nnx.Rngs, **options: object) -> MLP:
    features = options.get("features", ())
    if not isinstance(features, tuple | list) or any(not _is_size(size) for size in features):
        raise ValueError(f"features={features!r} must be a tuple of whole numbers of at least 1, such as (300, 100)")
    return MLP(math.prod(input_shape), num_classes, rngs=rngs, **options)


def _dense(
    input_shape: tuple[int, ...], num_classes: int, *, depth: int, width: int, init: Init = "glorot", rngs: nnx.Rngs
) -> MLP:
    _positive(depth=depth, width=width)
    return MLP(math.prod(input_shape), num_classes, features=(width,) * depth, init=init, rngs=rngs)


def _positive(**sizes: object) -> None:
    for name, size in sizes.items():
        if not _is_size(size):
            raise ValueError(f"{name}={size!r} must be a whole number of at least 1")


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 1


_MODELS: Mapping[str, Callable[..., nnx.Module]] = {
    "mlp": _mlp,
    "lenet-300-100": _mlp,
    "lenet": LeNet,
    **{f"resnet{depth}": functools.partial(ResNet, depth) for depth in (20, 32, 44, 56, 110)},
    "vgg11": VGG,
    "dense": _dense,
    "conv": RectangularConv,
}
_FLAT = ("mlp", "lenet-300-100", "dense")
_OPTIONS: Mapping[str, Callable[..., nnx.Module]] = {"mlp": MLP, "lenet-300-100": MLP}  # if options are forwarded
