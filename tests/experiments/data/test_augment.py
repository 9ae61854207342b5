import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.data.augment import augment, normalise


def images(batch=64, dtype=np.uint8):
    return jnp.asarray(np.random.default_rng(0).integers(1, 256, (batch, 10, 8, 3)), dtype)


def test_every_image_is_a_cut_of_itself_or_of_its_mirror_image():
    x = np.asarray(images())
    found = np.asarray(jax.jit(augment)(jax.random.key(0), x))
    padded = np.pad(x, ((0, 0), (4, 4), (4, 4), (0, 0)))
    mirrored = np.pad(x[:, :, ::-1], ((0, 0), (4, 4), (4, 4), (0, 0)))
    seen = set()
    for n, image in enumerate(found):
        cuts = [
            (flip, i, j)
            for flip, source in enumerate((padded, mirrored))
            for i in range(9)
            for j in range(9)
            if (source[n, i : i + 10, j : j + 8] == image).all()
        ]
        assert len(cuts) == 1
        seen.add(cuts[0])
    assert {flip for flip, _, _ in seen} == {0, 1}
    assert {i for _, i, _ in seen} == {j for _, _, j in seen} == set(range(9))


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_the_key_decides_to_the_last_bit(dtype):
    x = images(dtype=dtype)
    eager = augment(jax.random.key(1), x)
    assert eager.dtype == dtype
    np.testing.assert_array_equal(eager, jax.jit(augment)(jax.random.key(1), x))
    scanned = jax.lax.scan(lambda _, key: (None, augment(key, x)), None, jax.random.split(jax.random.key(2), 3))[1]
    batched = jax.vmap(augment, in_axes=(0, None))(jax.random.split(jax.random.key(2), 3), x)
    np.testing.assert_array_equal(scanned, batched)
    assert (eager != augment(jax.random.key(3), x)).any()


def test_augmentation_equals_the_recorded_result():
    """Golden values: the numbers of a study must not change with the version of jax or of this file."""
    x = jnp.arange(4 * 6 * 6, dtype=jnp.int32).reshape(4, 6, 6, 1)
    found = augment(jax.random.key(42), x, pad=1)
    assert found.sum((1, 2, 3)).tolist() == [525, 1590, 2670, 4518]


def test_normalise_is_numpys():
    x = images()
    mean, std = np.array([120.0, 100.0, 90.0], np.float32), np.array([60.0, 50.0, 40.0], np.float32)
    found = jax.jit(normalise)(x, mean, std)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, (np.asarray(x, np.float64) - mean) / std, rtol=1e-6, atol=1e-6)


def test_examples_that_are_not_images_are_refused():
    with pytest.raises(ValueError, match=r"examples of shape \(4,\) are not images"):
        augment(jax.random.key(0), jnp.zeros((3, 4)))
