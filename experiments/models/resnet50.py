"""ResNet-50 for ImageNet, with or without batch normalization and shortcuts."""

from collections.abc import Sequence

import jax
from flax import nnx

from experiments.models.networks import initializers


class Bottleneck(nnx.Module):
    """1 x 1, 3 x 3 and 1 x 1 convolutions; the last has four times the channels (He et al. 2016, figure 5)."""

    def __init__(self, inputs: int, width: int, stride: int, *, normalized: bool, shortcut: bool, rngs: nnx.Rngs):
        outputs = 4 * width
        shapes = [(inputs, width, 1, 1), (width, width, 3, stride), (width, outputs, 1, 1)]
        self.convs = nnx.List([_conv(*shape, normalized=normalized, rngs=rngs) for shape in shapes])
        self.norms = nnx.List([nnx.BatchNorm(shape[1], rngs=rngs) for shape in shapes] if normalized else [])
        projected = shortcut and (stride > 1 or inputs != outputs)
        self.projection = _conv(inputs, outputs, 1, stride, normalized=normalized, rngs=rngs) if projected else None
        self.projection_norm = nnx.BatchNorm(outputs, rngs=rngs) if projected and normalized else None
        self.shortcut = shortcut

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, inputs) -> (batch, height / stride, width / stride, 4 width)."""
        y = x
        for number, conv in enumerate(self.convs):
            y = conv(y)
            y = self.norms[number](y) if len(self.norms) else y
            y = nnx.relu(y) if number < 2 else y
        if self.shortcut:
            x = x if self.projection is None else self.projection(x)
            y = y + (x if self.projection_norm is None else self.projection_norm(x))
        return nnx.relu(y)


class ResNet50(nnx.Module):
    """He et al. 2016 for ImageNet: 25,557,032 parameters with 64 channels, normalization and shortcuts.

    Args:
      num_classes: units of the output layer.
      channels: channels of the first stage; 64 in the paper.
      blocks: numbers of blocks in the four stages; (3, 4, 6, 3) is ResNet-50.
      normalized: whether each convolution is followed by batch normalization; without it, it has a bias.
      shortcut: whether each block adds its input.
      rngs: random keys of the initializers.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        *,
        channels: int = 64,
        blocks: Sequence[int] = (3, 4, 6, 3),
        normalized: bool = True,
        shortcut: bool = True,
        rngs: nnx.Rngs,
    ):
        self.stem = _conv(3, channels, 7, 2, normalized=normalized, rngs=rngs)
        self.norm = nnx.BatchNorm(channels, rngs=rngs) if normalized else None
        made, inputs = [], channels
        for stage, count in enumerate(blocks):
            width = channels * 2**stage
            for number in range(count):
                stride = 2 if stage and not number else 1
                options = {"normalized": normalized, "shortcut": shortcut}
                made.append(Bottleneck(inputs, width, stride, **options, rngs=rngs))
                inputs = 4 * width
        self.blocks = nnx.List(made)
        self.head = nnx.Linear(inputs, num_classes, **initializers("he", inputs), rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, height, width, 3) -> logits (batch, num_classes)."""
        x = self.stem(x)
        x = nnx.relu(x if self.norm is None else self.norm(x))
        x = nnx.max_pool(x, (3, 3), (2, 2), padding=((1, 1), (1, 1)))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((1, 2)))


def _conv(inputs: int, outputs: int, size: int, stride: int, *, normalized: bool, rngs: nnx.Rngs) -> nnx.Conv:
    initial = initializers("he", size * size * inputs)
    padding = size // 2
    return nnx.Conv(
        inputs, outputs, (size, size), strides=stride, padding=padding, use_bias=not normalized, **initial, rngs=rngs
    )
