"""Programs are compiled here to be read, and to see how long that takes: none comes from a cache."""

import jax
import pytest


@pytest.fixture(autouse=True)
def _no_cache():
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    yield
    jax.config.update("jax_enable_compilation_cache", before)
