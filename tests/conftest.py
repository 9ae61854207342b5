"""Strict numerics for every test: eight CPU devices, no silent promotion, shapes checked at run time."""

import collections
import gc
import os
from pathlib import Path

# Read when jax is first imported, so these lines come before that import. The processes that tests start inherit them.
# Most of the time is compiling, which takes half as long without optimization and without the newer kernel emitters,
# and a quarter less again where a program is not split into modules that are compiled side by side.
QUICK = (
    "--xla_cpu_use_fusion_emitters=false --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true "
    "--xla_cpu_parallel_codegen_split_count=1"
)
FLAGS = os.environ.get("XLA_FLAGS", QUICK)  # `XLA_FLAGS= make test` compiles as users do
os.environ["XLA_FLAGS"] = f"{FLAGS} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
for name in ("COLUMNS", "LINES", "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
    os.environ.pop(name, None)  # what is printed must not depend on the terminal of whoever runs the tests
os.environ["TERM"] = "xterm"
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".cache" / "jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")  # reading is faster than any compilation
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

import jaxtyping

import tests.typechecked  # noqa: F401 - the hook below looks it up as an attribute of the package

jaxtyping.install_import_hook("jprune", "tests.typechecked.check")

import hypothesis
import jax
import pytest

from tests import mlir_contexts

# No test that decides about a change depends on the speed of the machine or on chance. The slow tests draw new examples
# at every run: they ask for it with `derandomize=False`.
hypothesis.settings.register_profile(
    "reproducible", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("reproducible")
jax.config.update("jax_numpy_rank_promotion", "raise")


mlir_contexts.share()

# The garbage collector would look through every imported module again and again.
gc.set_threshold(20_000, 20, 20)


@pytest.fixture(autouse=True)
def _strict_promotion(request):
    """Forbid implicit dtype promotion, except where a test says that optax's own code promotes."""
    if request.node.get_closest_marker("optax_promotes"):
        yield
    else:
        with jax.numpy_dtype_promotion("strict"):
            yield


@pytest.fixture
def usual_promotion():
    """Models as users write them: they add biases without reshaping them."""
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        yield


def pytest_collection_finish():
    gc.collect()
    gc.freeze()  # nothing that was imported or collected is garbage later


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    seen = collections.Counter()
    for item in items:
        if quick := item.get_closest_marker("quick"):
            name = item.nodeid.partition("[")[0]
            seen[name] += 1
            if seen[name] > quick.args[0]:
                item.add_marker(pytest.mark.slow)
    if jax.default_backend() == "cpu":
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an accelerator; jax finds none on this machine"))
