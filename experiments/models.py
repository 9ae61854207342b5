"""The networks of the studies, in Flax NNX, by name.

The output layer of every model is called ``head``, so that a study leaves it dense with
``jprune.select(exclude=r"^head/")``. Statistics of batch normalization are ``nnx.BatchStat``
variables, a state apart from the parameters.
"""

import math
from collections.abc import Callable, Sequence

import jax
from flax import nnx


class MLP(nnx.Module):
    """Dense layers with ReLU between them; inputs of any shape are flattened.

    Args:
      in_features: entries of one example.
      features: units of each hidden layer.
      num_classes: units of the output layer.
      rngs: the initializers' keys.
    """

    def __init__(self, in_features: int, features: Sequence[int], num_classes: int, *, rngs: nnx.Rngs):
        sizes = (in_features, *features)
        self.hidden = nnx.List(nnx.Linear(i, o, rngs=rngs) for i, o in zip(sizes[:-1], sizes[1:], strict=True))
        self.head = nnx.Linear(sizes[-1], num_classes, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """(batch, ...) -> logits (batch, num_classes)."""
        x = x.reshape(x.shape[0], -1)
        for layer in self.hidden:
            x = nnx.relu(layer(x))
        return self.head(x)


def _mlp(num_classes: int, input_shape: tuple[int, ...], rngs: nnx.Rngs, features: Sequence[int] = (300, 100)) -> MLP:
    return MLP(math.prod(input_shape), features, num_classes, rngs=rngs)


_MODELS: dict[str, Callable[..., nnx.Module]] = {"mlp": _mlp, "lenet-300-100": _mlp}


def create(name: str, *, num_classes: int, input_shape: tuple[int, ...], rngs: nnx.Rngs, **options) -> nnx.Module:
    """Make a model by name.

    Args:
      name: one of the registered names.
      num_classes: units of the output layer.
      input_shape: shape of one example, without the batch axis.
      rngs: the initializers' keys.
      **options: what the model takes besides, such as ``features=(300, 100)`` for ``mlp``.

    Raises:
      ValueError: an unknown name.
    """
    if name not in _MODELS:
        raise ValueError(f"name={name!r} is unknown; known: {', '.join(sorted(_MODELS))}")
    return _MODELS[name](num_classes, input_shape, rngs, **options)
