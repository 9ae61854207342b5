"""Every example runs with the documented command and prints the documented last line."""

import pathlib
import subprocess
import sys

import pytest

EXAMPLES = pathlib.Path(__file__).parent.parent / "examples"
ENDS = {
    "nnx_digits": "95.00% of the hidden weights are exactly 0",
    "linen_fine_tuning": "compression 10.00",
    "equinox_mlp": "sparsity 0.875",
    "linen_channels": "50% of the multiply-adds are left; the module can use the smaller parameters: True",
    "equinox_channels": "2 of 4 heads and 33 of 64 hidden units, 0.51 of the multiply-adds",
    "transformer_two_four": "two of every four weights are nonzero",
    "sharded": "sparsity 0.9000; the same masks as on one device: True",
    "calibrated": "with new statistics",
    "resume": "26 weights are left; the same bits as an uninterrupted run: True",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ENDS)
def test_an_example_ends_as_it_says(name, tmp_path):
    command = [sys.executable, str(EXAMPLES / f"{name}.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=1800, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().endswith(ENDS[name]), done.stdout


@pytest.mark.slow
@pytest.mark.optax_promotes
def test_calibration_data_pays_off_in_short_runs_of_the_example():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import calibrated
    finally:
        sys.path.remove(str(EXAMPLES))
    table = calibrated.reconstruction(steps=60)
    for pattern in ("50% of every output", "2:4"):
        for ours, wanda, magnitude in zip(*(table[pattern, name] for name in calibrated.METHODS), strict=True):
            assert ours < 0.75 * min(wanda, magnitude)
    dense, pruned, again = calibrated.recalibration(steps=30)
    assert dense > again > pruned + 0.1
