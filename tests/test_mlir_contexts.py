"""Sharing MLIR contexts: renewed after some programs, and left alone with a warning in an unknown version of jax."""

import itertools
import sys
import threading
import types

import pytest

from tests import mlir_contexts


@pytest.fixture
def fake(monkeypatch):
    """A module whose function makes 0, 1, 2, ..."""
    module, made = types.ModuleType("fake_mlir"), itertools.count()
    module.make_ir_context = lambda: next(made)
    monkeypatch.setitem(sys.modules, "fake_mlir", module)
    return module


def test_a_context_has_this_many_programs_and_belongs_to_one_thread(fake):
    mlir_contexts.share("fake_mlir", programs=2)
    assert [fake.make_ir_context() for _ in range(5)] == [0, 0, 1, 1, 2]
    other = []
    thread = threading.Thread(target=lambda: other.append(fake.make_ir_context()))
    thread.start()
    thread.join()
    assert other == [3]
    assert fake.make_ir_context() == 2


def test_a_function_that_is_missing_or_takes_arguments_is_left_alone_with_a_warning(fake):
    with pytest.warns(UserWarning, match="no attribute 'another'.*the tests take longer and check the same"):
        mlir_contexts.share("fake_mlir", "another")
    with pytest.warns(UserWarning, match="No module named 'jax.nowhere'"):
        mlir_contexts.share("jax.nowhere")
    fake.make_ir_context = changed = lambda threads=None: threads
    with pytest.warns(UserWarning, match=r"fake_mlir\.make_ir_context is not .* \(it takes threads\)"):
        mlir_contexts.share("fake_mlir")
    assert fake.make_ir_context is changed
