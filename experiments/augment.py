"""Normalisation and augmentation of image batches, inside jit, reproducible from the key."""

import jax
import jax.numpy as jnp


def normalise(images: jax.Array, mean: jax.Array, std: jax.Array) -> jax.Array:
    """Bring images to zero mean and unit standard deviation a channel.

    Args:
      images: (..., channels), any real dtype.
      mean: (channels,), in the units of the images.
      std: (channels,), likewise.

    Returns:
      (..., channels) float32.

    >>> normalise(jnp.array([[0], [2]], jnp.uint8), jnp.ones(1), jnp.ones(1)).tolist()
    [[-1.0], [1.0]]
    """
    shape = (1,) * (images.ndim - 1) + (images.shape[-1],)
    mean, std = (jnp.asarray(x, jnp.float32).reshape(shape) for x in (mean, std))
    return (images.astype(jnp.float32) - mean) / std
