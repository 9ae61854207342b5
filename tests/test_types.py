"""The shapes in signatures are checked while the tests run, in every package: a wrong one is an error."""

import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import TypeCheckError

from jprune.jumpstart.units import convergence
from jprune.pruning.conditional import where_due
from jprune.pruning.selection.kth_largest import keys
from jprune.recall.measures.rates import from_predictions


@pytest.mark.parametrize(
    "call",
    [
        lambda: where_due(jnp.array([False, True]), lambda x: -x, jnp.array([1, 2])),
        lambda: keys(jnp.ones((2, 3)), jnp.ones((3, 2), bool)),
        lambda: convergence(np.array([0.5, 0.25])),
        lambda: from_predictions(np.array([0, 0, 1]), np.array([[0, 1]]), 2),
        lambda: from_predictions(np.array([0, 0, 1]), np.array([[0.0, 1.0, 1.0]]), 2),
    ],
    ids=["a stack of predicates", "another shape", "one axis for two", "another length", "floats for integers"],
)
def test_an_array_of_the_wrong_shape_or_dtype_is_refused_in_every_wing(call):
    with pytest.raises(TypeCheckError, match="Type-check error"):
        call()


def test_what_fits_passes():
    np.testing.assert_array_equal(where_due(jnp.array(True), lambda x: -x, jnp.array([1, 2])), [-1, -2])
    np.testing.assert_array_equal(convergence(np.array([[0.5], [0.25]])), [0.0, -0.25])
