"""Files, sparse arrays and cost tables of arrays that are spread over two processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from tests.ports import free_port
from tests.pruning.export.two_processes import KERNEL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("two")


@pytest.fixture(scope="module")
def found(folder):
    """The printed output of the two processes."""
    command, port = [sys.executable, "-m", "tests.pruning.export.two_processes"], str(free_port())
    devices = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    options = {"cwd": Path(__file__).parents[3], "env": os.environ | devices, "text": True}
    options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([*command, str(i), port, str(folder)], **options) for i in range(2)]
    try:
        printed = [process.communicate(timeout=1800) for process in started]
    finally:
        for process in started:
            process.kill()
    for process, (out, err) in zip(started, printed, strict=True):
        assert process.returncode == 0, out + err[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in printed]


def kept():
    """The 100 largest weights, where every value occurs twice; the first leaf keeps its half of the last pair."""
    pairs = np.argsort(-np.abs(KERNEL), axis=None)[:50]
    mask = np.zeros(KERNEL.size, bool)
    mask[pairs] = True
    return mask.reshape(KERNEL.shape)


def test_spread_leaves_are_refused_by_name_and_the_message_says_gather(found):
    for refused, argument in zip(found[0]["refused"], ("masks", "params", "masks"), strict=True):
        assert refused == (
            f"ValueError: {argument} is spread over several processes at 'one/kernel'; call this function in every "
            "process with gather=True"
        )


def test_the_gathered_file_has_every_kept_weight(found, folder):
    stored = safetensors.numpy.load_file(folder / "pruned.safetensors")
    np.testing.assert_array_equal(stored["one/kernel#values"], KERNEL[kept()])
    np.testing.assert_array_equal(np.unpackbits(stored["two/kernel#bits"]).astype(bool), kept().T.reshape(-1))
    assert set(stored) == {"one/kernel#bits", "one/kernel#values", "one/bias", "two/kernel#bits", "two/kernel#values"}
    assert [path.name for path in folder.iterdir()] == ["pruned.safetensors"]
    assert found[0]["same"]  # read back onto both processes


def test_sparse_arrays_and_cost_tables_are_exact(found):
    assert found[0]["nse"] == [50, 50]
    np.testing.assert_allclose(found[0]["product"], (KERNEL * kept()).sum(1), rtol=1e-5, atol=1e-6)
    assert found[0]["table"] == {"one/bias": 8, "one/kernel": 50, "two/kernel": 50, "total": 108}


def test_the_layers_of_spread_masks_are_counted(found):
    counts = {f"one/kernel[{i}]": int(number) for i, number in enumerate(kept().sum(0))}
    name, number = next((name, number) for name, number in counts.items() if number > 1)
    assert f"{number} of 16 prunable weights of '{name}' are kept" in found[0]["too many"]


def test_where_the_file_cannot_be_written_both_processes_raise(found):
    assert "its folder does not exist; create it first" in found[0]["no folder"]
    assert "process 0 could not write" in found[1]["no folder"]
