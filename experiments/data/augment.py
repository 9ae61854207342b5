"""Normalize and augment batches of images: pure functions, for use inside jit."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def normalise(images: jax.Array, mean: jax.Array | np.ndarray, std: jax.Array | np.ndarray) -> jax.Array:
    """Scale images to zero mean and unit standard deviation in each channel.

    Args:
      images: (..., channels), any real dtype.
      mean: (channels,), in the units of the images.
      std: standard deviation of each channel, (channels,).

    Returns:
      (..., channels) float32.

    >>> normalise(jnp.array([[0], [2]], jnp.uint8), jnp.ones(1), jnp.ones(1)).tolist()
    [[-1.0], [1.0]]
    """
    shape = (1,) * (images.ndim - 1) + (images.shape[-1],)
    mean, std = (jnp.asarray(moment, jnp.float32).reshape(shape) for moment in (mean, std))
    return (images.astype(jnp.float32) - mean) / std


def augment(key: jax.Array, images: jax.Array, *, pad: int = 4) -> jax.Array:
    """Flip every image left to right with probability 1/2, pad it with zeros, and crop it at a random position.

    This is the augmentation of He et al. 2016 for CIFAR. The padding is black, so call it before ``normalise``. The
    same key gives bit-for-bit the same images on every platform.

    Args:
      key: jax.random key.
      images: (batch, height, width, channels), any dtype.
      pad: pixels of padding on each side; offsets are uniform in 0..2 pad.

    Returns:
      Images of the same shape and dtype.

    Raises:
      ValueError: the examples are not images.
    """
    if images.ndim != 4:
        raise ValueError(
            f"examples of shape {images.shape[1:]} are not images (height, width, channels) and cannot be augmented"
        )
    flip_key, offset_key = jax.random.split(key)
    flip = jax.random.bernoulli(flip_key, shape=(images.shape[0], 1, 1, 1))
    images = jnp.where(flip, images[:, :, ::-1], images)
    offsets = jax.random.randint(offset_key, (images.shape[0], 2), 0, 2 * pad + 1)
    padded = jnp.pad(images, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    cut = lambda image, offset: lax.dynamic_slice(image, (offset[0], offset[1], 0), images.shape[1:])
    return jax.vmap(cut)(padded, offsets)
