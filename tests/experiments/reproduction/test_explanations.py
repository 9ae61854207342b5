"""Questions R13 and R14 on made-up networks with known answers."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from experiments.recall_distortion import presets
from experiments.reproduction import explanations
from experiments.reproduction.ledger import Recalls

BALANCE = np.array([100, 50, -50, -100])  # of 1,000 examples a class, around 750 right ones
REPLICATES = 30
COUNTS = (1200, 600, 350, 250, 125, 60)


def _row(score, ratio, replicate, right, nonzero=1000):
    sizes = {"parameters": 1100, "prunable": 1000, "nonzero": nonzero}
    counts = {f"correct_{c}": count for c, count in enumerate(right)}
    return {"score": score, "ratio": ratio, "replicate": replicate, **sizes, **counts}


def _recalls(rows):
    return Recalls(pd.DataFrame(rows), np.full(4, 1000), tuple("abcd"))


def _few(collapsed):
    """Thirty networks; ``collapsed`` says how many of the first collapse, by score and number of weights."""
    fine, chance = 750 + BALANCE, [1000, 0, 0, 0]
    rows = [_row(score, 1.0, i, fine) for score in ("dense", "control") for i in range(REPLICATES)]
    ratios = [float(f"{ratio:.6g}") for ratio in presets.get("fashion-few-weights").ratios[1:]]
    for score in ("magnitude", "undecayed"):
        for ratio, keep in [*zip(ratios, COUNTS, strict=True), (50.0, 125)]:  # t = 50 is of another study
            hits = collapsed.get((score, keep), 0) if ratio != 50 else REPLICATES
            rows += [_row(score, ratio, i, chance if i < hits else fine, keep) for i in range(REPLICATES)]
    return _recalls(rows)


def _verdict(**studies):
    return explanations.of_explanations({name.replace("_", "-"): study for name, study in studies.items()})


def test_collapse_is_compared_at_each_planned_count_by_an_exact_mcnemar_test_with_holm():
    table = explanations.collapse_table(_few({("magnitude", 125): 24, ("undecayed", 125): 11, ("magnitude", 60): 30}))
    assert table["keep"].tolist() == list(COUNTS)
    assert table["magnitude"].tolist() == [0, 0, 0, 0, 24, 30]
    assert table["undecayed"].tolist() == [0, 0, 0, 0, 11, 0]
    assert table["magnitude_alone"].tolist() == [0, 0, 0, 0, 13, 30]
    p = [2 * 0.5**13, 2 * 0.5**30]  # all discordant networks on one side
    np.testing.assert_allclose(table["p"], [1, 1, 1, 1, 5 * p[0], 6 * p[1]])
    # Bonett and Price: shares (0 + 1) / 32 and (13 + 1) / 32.
    a, b = 1 / 32, 14 / 32
    margin = stats.norm.ppf(0.975) * np.sqrt((a + b - (a - b) ** 2) / 32)
    np.testing.assert_allclose(table.loc[4, ["low", "high"]].astype(float), [a - b - margin, a - b + margin])


@pytest.mark.parametrize(
    ("floor", "verdict"),
    [({}, "yes"), ({("magnitude", 60): 20}, "no"), ({("magnitude", 60): 5}, "open")],
)
def test_undecayed_helps_only_by_avoiding_collapse_if_a_floor_removes_the_difference(floor, verdict):
    found = _verdict(fashion_few_weights=_few({("magnitude", 125): 24}), fashion_few_weights_floor=_few(floor))
    assert [(each.name, each.verdict) for each in found] == [("R14", verdict)]
    assert "125: 0 and 24 of 30 (p 7.2e-07" in found[0].found


@pytest.mark.parametrize(("with_floor", "verdict"), [(0, "yes, at 125 weights"), (16, "no"), (3, "open")])
def test_the_first_round_stands_for_the_arm_without_a_floor_until_that_has_run(with_floor, verdict):
    ratio = next(r for r in presets.get("fashion-few-weights-floor").ratios if 50 < r < 51)
    fine, chance = 750 + BALANCE, [1000, 0, 0, 0]

    def collapsed(ratio, magnitude, undecayed):
        """Networks at one ratio, of which the first collapse."""
        counts = {"magnitude": magnitude, "undecayed": undecayed}
        pruned = [
            _row(score, ratio, i, chance if i < count else fine, 125)
            for score, count in counts.items()
            for i in range(REPLICATES)
        ]
        return _recalls(
            [_row(score, 1.0, i, fine) for score in ("dense", "control") for i in range(REPLICATES)] + pruned
        )

    [found] = _verdict(fashion_lenet=collapsed(50.0, 24, 11), fashion_few_weights_floor=collapsed(ratio, with_floor, 0))
    assert (found.name, found.verdict) == ("R14", verdict)
    assert "125: 11 and 24 of 30" in found.found
    assert "networks with 125 weights and no floor are those of the first round" in found.found


def test_counts_without_a_floor_that_have_run_stand_beside_those_of_the_first_round():
    whole = _few({("magnitude", 60): 30, ("undecayed", 60): 12})
    part = whole._replace(networks=whole.networks[whole.networks["nonzero"].isin([60, 1000])])
    rows = whole.networks.assign(ratio=whole.networks["ratio"].replace(50.0, 49.0))
    rows.loc[rows["nonzero"] == 125, "ratio"] = 50.0
    first = whole._replace(networks=rows.drop_duplicates(["score", "ratio", "replicate"]))
    [found] = _verdict(fashion_lenet=first, fashion_few_weights=part, fashion_few_weights_floor=_few({}))
    assert "125: 0 and 0 of 30" in found.found
    assert "60: 12 and 30 of 30 (p 1.5e-05" in found.found  # 18 networks on one side, two counts: 2 x 2 x .5^18
    assert found.verdict == "yes"


def test_studies_that_have_not_run_are_left_out():
    assert _verdict() == _verdict(fashion_few_weights=_few({})) == []


def _changed(score, alpha, seed):
    """Networks whose class balance is multiplied by alpha, and accuracy lowered with it, with a little noise."""
    rng = np.random.default_rng(seed)
    return [_row(score, 1.0, i, _right(alpha, rng)) for i in range(REPLICATES)]


def _right(alpha, rng):
    return np.round(750 + alpha * BALANCE + rng.normal(0, 1, 4)).astype(int)


@pytest.mark.parametrize(
    ("noisy", "other", "verdict"),
    [(1.0, 1.0, "no larger than 5%"), (0.97, 1.0, "no larger than 5%"), (0.8, 0.8, "yes")],
)
def test_pruning_is_compared_with_other_changes_at_equal_accuracy(noisy, other, verdict):
    """Pruning multiplies the class balance by 1, label noise by ``noisy`` and the other changes by ``other``.

    Every change loses the same accuracy. With .97 one interval excludes 0, and all are within the margin.
    """
    rng = np.random.default_rng(0)
    dense = [_row("dense", 1.0, i, 750 + BALANCE) for i in range(REPLICATES)]
    main = dense + [_row("control", 1.0, i, 750 + BALANCE) for i in range(REPLICATES)]
    main += [_row("magnitude", t, i, _right(1, rng) - int(t)) for t in (2.0, 20.0) for i in range(REPLICATES)]
    tables = {}
    for seed, (name, (score, _)) in enumerate(explanations.CHANGES.items()):
        rows = _changed(score, noisy if "noise" in name else other, seed)
        for row in rows:
            row.update({f"correct_{c}": row[f"correct_{c}"] - (2 if seed % 2 else 20) for c in range(4)})
        tables[name] = _recalls(rows)
    (found,) = explanations.of_explanations({"fashion-lenet": _recalls(main), **tables})
    assert (found.name, found.verdict) == ("R13", verdict)
