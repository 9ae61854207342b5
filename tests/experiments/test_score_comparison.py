"""The comparison of methods at equal sparsity: its table, and a short run."""

import csv

import jax
import pytest

from experiments.score_comparison import __main__ as comparison


def test_differences_are_paired_by_seed_with_an_interval_over_seeds():
    def run(reference, other):
        return [
            comparison.Outcome("weights", "magnitude, global", 1 / 16, 10, 0.5, reference),
            comparison.Outcome("weights", "LAMP", 1 / 16, 10, float("nan"), other),
        ]

    first, second = comparison.table([run(0.80, 0.70), run(0.90, 0.85)])
    assert (first["kept"], first["before"], first["after"], first["difference"]) == ("1/16", "0.5000", "0.8500", "")
    assert (second["before"], second["after"], second["sd"]) == ("", "0.7750", "0.1061")
    # The differences -.1 and -.05 have mean -.075 and standard error .025; t is 12.706 with one degree of freedom.
    assert (second["difference"], second["low"], second["high"]) == ("-0.0750", "-0.3927", "+0.2427")


def test_no_seed_and_several_processes_are_refused_and_a_missing_reference_is_named(monkeypatch, capsys):
    for option, least in (("--seeds", 1), ("--steps", 1), ("--fine-tuning", 2)):
        with pytest.raises(SystemExit):
            comparison.main([option, str(least - 1)])
        assert capsys.readouterr().err.endswith(f"error: {option} {least - 1} must be at least {least}\n")
    assert comparison.main(["--dataset", "nothing"]) == 1
    assert capsys.readouterr().err.startswith("error: dataset='nothing' is not a data set; there are digits, iris")
    monkeypatch.setattr(comparison.datasets, "load", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        comparison.main(["--families", "trained sparse"])
    assert "no differences for 'trained sparse': their reference is in the family 'weights'" in capsys.readouterr().err
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    with pytest.raises(SystemExit):
        comparison.main([])
    assert "a launcher started 4 or more processes, but score_comparison runs in one" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.optax_promotes
def test_a_short_run_writes_what_every_method_keeps(tmp_path):
    arguments = ["--seeds", "2", "--steps", "6", "--fine-tuning", "4", "--families", "1:16", "units"]
    with jax.numpy_rank_promotion("allow"):
        assert comparison.main([*arguments, "--out", str(tmp_path / "table.csv")]) == 0
    rows = list(csv.DictReader((tmp_path / "table.csv").read_text().splitlines()))
    kept = {(row["family"], row["method"], row["kept"]): int(row["weights"]) for row in rows}
    total = 64 * 256 + 256 * 128 + 128 * 10
    assert kept["dense", "dense", "1/1"] == total
    assert kept["1:16", "SR-STE", "1/16"] == total // 16
    # 32 and 16 of the hidden units.
    assert kept["units", "Taylor", "1/8"] == 64 * 32 + 32 * 16 + 16 * 10
