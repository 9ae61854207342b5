"""The tables kept of finished runs, the verdicts drawn from them, and the page rebuilt from both."""

import dataclasses
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import Rectangle
from scipy import stats

import jprune.recall
from experiments.recall_distortion import __main__ as recall_distortion
from experiments.recall_distortion import results
from experiments.reproduction import __main__ as reproduction
from experiments.reproduction import hypotheses, jumpstart, ledger, references, verdicts
from experiments.reproduction.ledger import Recalls
from experiments.storage import files, provenance
from tests.experiments.reproduction.made_up import PUBLISHED, RATIOS
from tests.experiments.reproduction.made_up import study as _study


@pytest.fixture(autouse=True)
def _audits_once(monkeypatch):
    """Every hypothesis audits the study again; most with the same scores and networks."""
    audits, audit = {}, Recalls.audit

    def once(study, scores, replicates):
        key = (id(study.networks), tuple(scores), tuple(replicates))
        if key not in audits:
            audits[key] = (study, audit(study, scores, replicates))  # the study, so that its id stays its own
        return audits[key][1]

    monkeypatch.setattr(Recalls, "audit", once)


def _verdict(name, **studies):
    return {each.name: each for each in hypotheses.of_recalls(studies, PUBLISHED)}[name]


def test_a_kept_network_gives_back_its_alpha():
    study = _study({"magnitude": (0.9, 1.0, 1.1, 1.2, 1.5)})
    audit = study.audit(["magnitude"], study.complete(["magnitude"]))
    by_ratio = audit.alphas.groupby("ratio")["alpha"].mean()
    np.testing.assert_allclose(by_ratio, [1.0, 0.9, 1.0, 1.1, 1.2, 1.5], atol=1e-9)


def test_a_replicate_that_lacks_a_stage_is_left_out():
    study = _study({"magnitude": (1, 1, 1, 1, 1)})
    networks = study.networks
    lost = (networks["ratio"] == 50) & (networks["replicate"] == 2)
    assert study._replace(networks=networks[~lost]).complete(["magnitude"]) == [0, 1, 3, 4, 5]


@pytest.mark.parametrize(
    ("alphas", "control", "r1", "r2"),
    [
        ((0.7, 0.9, 1.1, 1.4, 2.0), 1.0, "supported", "supported"),
        ((0.9, 0.9, 0.9, 0.9, 0.9), 0.9, "open", "open"),  # a difference of exactly 0, no rise
        ((1.4, 1.2, 1.0, 0.9, 0.8), 1.0, "contradicted", "contradicted"),
    ],
)
def test_the_control_and_the_rise_are_judged(alphas, control, r1, r2):
    study = _study({"magnitude": alphas}, control=control)
    assert _verdict("R1", **{"fashion-lenet": study}).verdict == r1
    assert _verdict("R2", **{"fashion-lenet": study}).verdict == r2


def test_alphas_below_0_have_no_logarithm_and_are_counted():
    rising = (0.9, 1.0, 1.1, 1.2, 1.5)
    study = _study({"magnitude": (*rising[:4], -0.5), "undecayed": rising})
    networks, right = study.networks.copy(), [f"correct_{c}" for c in range(4)]
    networks[right] = networks[right].sub((3 * networks["ratio"]).round().astype(int), axis=0)  # accuracy falls
    found = _verdict("R4", **{"fashion-lenet": study._replace(networks=networks)}).found
    assert "0 of 60 alphas, of collapsed networks, left out (2026-11-26), and 6 below 0" in found


@pytest.mark.parametrize(("shift", "verdict"), [(-0.2, "supported"), (0.2, "does not carry over"), (0.0, "open")])
@pytest.mark.quick(1)
def test_undecayed_is_judged_by_where_it_differs(shift, verdict):
    magnitude = np.array([0.9, 1.0, 1.1, 1.2, 1.5])
    found = _verdict("R3", **{"fashion-lenet": _study({"magnitude": magnitude, "undecayed": magnitude + shift})})
    assert found.verdict == verdict
    assert f"t = 2: {shift:+.3f}" in found.found


def test_the_signed_variant_is_judged_by_the_ratio_achieved():
    flat = (1.0,) * 5
    for keep, verdict, words in ((2.0, "supported", "asked 2, achieved"), (0.95, "contradicted", "asked 50")):
        study = _study({"undecayed-signed": flat}, nonzero=lambda ratio, keep=keep: keep * (1100 / ratio - 100))
        study = study._replace(networks=study.networks[study.networks["ratio"] <= 10])
        found = _verdict("R5", **{"fashion-lenet": study})
        assert (found.verdict, words in found.found) == (verdict, words == "asked 2, achieved")


def test_random_pruning_is_judged_by_the_interval_from_t_4_on():
    assert _verdict("R6", **{"fashion-lenet": _study({"random": (0.9, 1.1, 1.2, 1.3, 1.4)})}).verdict == "supported"
    assert _verdict("R6", **{"fashion-lenet": _study({"random": (0.9, 0.8, 1.2, 1.3, 1.4)})}).verdict == "contradicted"
    assert _verdict("R6", **{"fashion-lenet": _study({"random": (0.9, 1.1, 1.0, 1.3, 1.4)})}).verdict == "open"


def test_random_pruning_is_reported_without_collapsed_networks_too():
    study = _study({"random": (0.9, 1.1, 1.2, 1.3, 1.4)})
    networks, right = study.networks.copy(), [f"correct_{c}" for c in range(4)]
    collapsed = (networks["score"] == "random") & (networks["ratio"] == 10) & (networks["replicate"] == 0)
    networks.loc[collapsed, right] = [1000, 0, 0, 0]
    found = _verdict("R6", **{"fashion-lenet": study._replace(networks=networks)}).found
    words = found.partition("; without collapsed networks (2026-11-26, not judged): ")[2]
    assert words.startswith("t = 10: 1.")
    assert words.endswith(", 5 networks")
    assert "without" not in _verdict("R6", **{"fashion-lenet": study}).found


def test_two_studies_are_compared_by_welch():
    first, second = (_study({"magnitude": (0.9, 1.0, 1.1, 1.2, last)}) for last in (1.5, 2.0))
    found = _verdict("R9", **{"fashion-lenet": first, "fashion-no-decay": second})
    assert found.verdict == "supported"
    assert "t = 50: +0.500" in found.found
    assert _verdict("R8", **{"fashion-lenet": first, "fashion-jumpstart": second}).verdict == "open"


def test_a_study_without_one_of_the_ratios_has_no_verdict_yet():
    study = _study({"magnitude": (0.7, 0.9, 1.1, 1.4, 2.0)})
    study = study._replace(networks=study.networks[study.networks["ratio"] != 50])
    assert {each.verdict for each in hypotheses.of_recalls({"fashion-lenet": study}, PUBLISHED)} == {"not run"}


def test_studies_that_have_not_run_are_reported_as_not_run():
    assert {each.verdict for each in hypotheses.of_recalls({}, PUBLISHED)} == {"not run"}
    assert {each.verdict for each in jumpstart.of_moons(None, None, pd.DataFrame())} == {"not run"}
    assert jumpstart.of_tables(None).verdict == "not run"


def _cells(up, relu, **columns):
    sizes = [(width, depth) for width in range(1, 5) for depth in (1, 10, 20, 30)]
    return pd.DataFrame(
        {"method": method, "width": w, "depth": d, "replicate": 0, "train_acc": accuracy, **columns}
        for method, accuracies in (("UP", up), ("relu", relu))
        for (w, d), accuracy in zip(sizes, accuracies, strict=True)
    )


def test_the_moons_grid_is_judged_by_an_exact_mcnemar_and_by_fisher():
    ours = _cells([0.95] * 16, [0.95] * 4 + [0.5] * 12)
    published = _cells([0.95] * 16, [0.5] * 16)
    more, agree, form = jumpstart.of_moons(ours, None, published)
    assert more.verdict == "supported"
    assert f"{stats.binomtest(12, 12).pvalue:.1e}" in more.found
    assert "12 with UP alone, 0 with relu alone" in more.found
    a, b = 5 / 18, 1 / 18  # 4 and 0 discordant cells of 16, one added to each and two to their number
    margin = stats.norm.ppf(0.95) * np.sqrt((a + b - (a - b) ** 2) / 18)
    assert f"relu 4 / 0 of 16 [{100 * (a - b - margin):+.0f}, {100 * (a - b + margin):+.0f}]" in agree.found
    assert agree.verdict == "open"
    assert form.verdict == "not run"


def test_the_form_of_the_layer_is_judged_by_which_agrees_more_often():
    published = _cells([0.95] * 16, [0.5] * 16)
    layers = pd.concat([_cells([0.95] * 16, [0.5] * 16, layer="conv"), _cells([0.5] * 16, [0.5] * 16, layer="dense")])
    form = jumpstart.of_moons(None, layers, published)[2]
    assert form.verdict == "supported"
    assert "conv agrees in 32, dense in 16 of 32" in form.found
    partial = jumpstart.of_moons(None, layers[(layers["layer"] == "conv") | (layers["method"] == "UP")], published)[2]
    assert "conv agrees in 16, dense in 0 of 16" in partial.found, "what one form alone has run does not count"


def test_wins_and_losses_are_judged_by_a_sign_test():
    rows = [
        {"dataset": d, "replicate": r, "method": m, "val_acc": 0.9 if m == "jumpstart" else 0.5}
        for d in ("iris", "wine")
        for r in range(5)
        for m in ("jumpstart", "baseline")
    ]
    found = jumpstart.of_tables(pd.DataFrame(rows))
    assert (found.verdict, found.found.startswith("10 wins, 0 draws, 0 losses")) == ("open", True)
    assert "2 of 2 won (p 0.500)" in found.found, "two data sets are two units, whatever the number of seeds"
    without = jumpstart.of_tables(pd.DataFrame(rows[:-1]))
    assert without.found.startswith("9 wins, 0 draws, 0 losses"), "a pair that is not there is no draw"


def _pruned(method, seeds, largest, width=2):
    """Networks that reach .95 up to these ratios and .6 above; ratio 0 means .6 also before pruning."""
    return pd.DataFrame(
        {"dataset": "moons", "method": method, "depth": 20, "width": width, "replicate": seed, "ratio": ratio,
         "train_acc": 0.95 if ratio <= most else 0.6}
        for seed, most in zip(seeds, largest, strict=True)
        for ratio in (1.0, 1.5, 2.0, 4.0, 10.0)
    )  # fmt: skip


def test_pruning_further_is_judged_over_pairs_that_both_trained():
    up = _pruned("UP", range(12), [4.0] * 10 + [1.0, 0.0])
    batch_norm = _pruned("relu-bn", range(12), [2.0] * 8 + [4.0, 10.0, 1.0, 4.0])
    relu = _pruned("relu", range(5), [1.5] * 5)
    found = jumpstart.of_pruned([up, pd.concat([batch_norm, relu])])[0]
    p = 2 * stats.binomtest(8, 9).pvalue  # a tie, and a tie at t = 1; network 11 of UP did not train
    assert (
        f"UP against relu-bn: further in 8, less far in 1 of 11 pairs (p {p:.3f}), median of the largest t 4 and 2"
        in (found.found)
    )
    assert "UP against relu: further in 5, less far in 0 of 5 pairs" in found.found
    assert found.verdict == "open", "p = .039 x 2 against relu-bn, and five pairs against relu are too few"
    more = jumpstart.of_pruned([up, batch_norm, _pruned("relu", range(12), [1.5] * 12)])[0]
    assert more.verdict == "open against relu-bn, supported against relu"
    with_widths = [pd.concat([t, t.assign(width=8)]) for t in (up, batch_norm, _pruned("relu", range(12), [1.5] * 12))]
    assert jumpstart.of_pruned(with_widths)[0].verdict == "supported"
    assert jumpstart.of_pruned([])[0].verdict == "not run"
    assert jumpstart.of_pruned([up])[0].verdict == "open", "no pair"


def test_new_seeds_are_judged_without_the_old_ones():
    further, less = [4.0] * 15, [2.0] * 15
    old, new = range(5), range(5, 20)
    tables = [_pruned("UP", old, less[:5]), _pruned("relu", old, further[:5]), _pruned("relu-bn", old, further[:5])]
    tables += [_pruned("UP", new, further), _pruned("relu", new, less), _pruned("relu-bn", new, further)]
    first, again = jumpstart.of_pruned([], pd.concat(tables))
    assert (first.name, first.verdict, again.name) == ("J5", "not run", "J6")
    assert "UP against relu: further in 15, less far in 0 of 15 pairs" in again.found
    assert again.verdict == "open against relu-bn, supported against relu"
    assert "0 of 15 pairs (p 1.000), median of the largest t 4 and 4; with 0 units p is never below .05" in again.found


def test_equal_shares_of_trained_cells_are_equivalent_and_own_seeds_are_compared():
    ours = pd.concat(
        [_cells([0.95] * 16, [0.5] * 16).assign(replicate=seed, width=w) for seed in (0, 1) for w in range(9)]
    )
    ours.loc[(ours["replicate"] == 1) & (ours["depth"] == 1) & (ours["method"] == "relu"), "train_acc"] = 0.95
    published = ours[ours["replicate"] == 0]
    agree = jumpstart.of_moons(ours, None, published.drop(columns="replicate").drop_duplicates(), ours)[1]
    assert agree.verdict == "equivalent within 15 points, within 10 for UP, relu"
    assert "disagree in 0% (UP, kappa nan), 25% (relu, kappa 0.00) of the cells" in agree.found


def test_collapse_is_counted_and_compared_by_an_exact_test():
    study = _study({"magnitude": (0.9, 1.0, 1.1, 1.2, 1.5), "undecayed": (0.9, 1.0, 1.1, 1.2, 1.5)})
    networks, right = study.networks.copy(), [f"correct_{c}" for c in range(4)]
    networks.loc[(networks["score"] == "magnitude") & (networks["ratio"] == 50), right] = [1000, 0, 0, 0]
    found = _verdict("R16", **{"fashion-lenet": study._replace(networks=networks)})
    assert found.found.startswith("0 and 6 of 6 collapsed; 6 with magnitude alone, 0 with undecayed alone (p 0.031")
    assert found.verdict == "open"


@pytest.mark.parametrize(("factor", "verdict"), [(1.2, "yes"), (1.0, "no larger than 5%"), (0.8, "open")])
def test_channels_are_compared_with_weights_at_equal_accuracy(factor, verdict, monkeypatch):
    """The comparison is tested with the library; this tests the rows that it gets and the verdict drawn from it."""
    frames = []

    def compare(frame, a, b):
        frames.append(frame)
        assert (a, b) == ("magnitude", "channels")
        shift = float(np.log(factor))
        low, high = shift - 0.02, shift + 0.02
        return jprune.recall.EqualAccuracy(shift, low, high, 0.5, 1.0, 0.5, 0.9, len(frame), 6, 0, "")

    monkeypatch.setattr(jprune.recall, "compare_at_equal_accuracy", compare)
    main = _study({"magnitude": (1.0, 1.1, 1.2, 1.3, 1.9)})
    channels = main.at_nominal((1, 2, 4, 10))
    networks = channels.networks.drop_duplicates(["score", "ratio", "replicate"])
    found = hypotheses._channels(main, {"fashion-channels": channels._replace(networks=networks)})
    assert found.verdict == verdict
    assert sorted(frames[0].groupby("score")["ratio"].unique()["magnitude"]) == [2, 4, 10, 20]
    assert sorted(frames[0].groupby("score")["ratio"].unique()["channels"]) == [2, 4, 10]


def test_published_counts_are_judged_by_wilson_and_by_quartiles():
    study = _study({"magnitude": (0.9, 1.0, 1.1, 1.2, 1.5)})
    rows = [
        {"dataset": "fashion_mnist", "score": "magnitude", "ratio": ratio, "q1": a - 0.05, "median": a, "q3": a + 0.05}
        for ratio, a in zip(RATIOS, (0.9, 1.0, 1.1, 1.2, 3.0), strict=True)
    ]
    answers = {
        each.name: each for each in hypotheses.of_recalls({"fashion-published-paper": study}, pd.DataFrame(rows))
    }
    assert "0 of 6 [0.00, 0.39]" in answers["R10"].found
    assert answers["R10"].verdict == "open", "six networks do not show that fewer than 15% collapse"
    assert "4 of 5 (t = 2, 4, 10, 20; smallest p 0.16; 6 networks)" in answers["R11"].found


def test_the_seed_null_is_the_mean_slope_between_dense_networks():
    support = np.full(4, 1000)
    correct = np.random.default_rng(0).integers(500, 900, size=(5, 4))
    dense = references.balances(correct, support)
    slopes = [
        np.linalg.lstsq(dense[i][:, None], dense[j], rcond=None)[0][0] for i in range(5) for j in range(5) if i != j
    ]
    assert references.seed_null(correct, support).value == pytest.approx(np.mean(slopes), rel=1e-12)
    change = references.above_seed_null(correct, correct, support)
    assert change.value == pytest.approx(1 - np.mean(slopes), rel=1e-12)


def test_the_published_networks_have_the_published_seed_null_and_slopes():
    study = ledger.published_counts(reproduction.PUBLISHED / "recall_cifar10_resnet56_counts.csv")
    replicates = study.complete(["magnitude"])
    dense = study.correct("dense", 1.0, replicates)
    null = references.seed_null(dense, study.support)
    np.testing.assert_allclose(null, (0.994, 0.986, 1.003), atol=6e-4)
    for ratio, mean in zip(RATIOS, (0.933, 0.959, 1.065, 1.247, 1.802), strict=True):
        change = references.above_seed_null(dense, study.correct("magnitude", ratio, replicates), study.support)
        assert change.value + null.value == pytest.approx(mean, abs=6e-4)


PROGRAM = Path(provenance.__file__).parents[1] / "recall_distortion" / "__main__.py"


def test_the_same_command_is_noted_once(tmp_path, monkeypatch):
    options = ["--prunable", "^(one|two)/", "--data-dir", "/my data/tfds", "--seed", "3"]
    monkeypatch.setattr("sys.argv", [str(PROGRAM), *options])
    provenance.note(tmp_path, "recall_distortion")
    provenance.note(tmp_path, "recall_distortion")
    (noted,) = provenance.notes(tmp_path)
    assert noted["command"] == (
        "python -m experiments.recall_distortion --prunable '^(one|two)/' --data-dir DIR --seed 3"
    )


def test_a_run_from_python_is_not_noted_as_a_command(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/home/me/my_study.py", "--fast"])
    provenance.note(tmp_path, "recall_distortion")
    (noted,) = provenance.notes(tmp_path)
    assert noted["command"] == "experiments.recall_distortion, called from Python with the settings in studies/"


def test_runs_that_begin_together_lose_no_note(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(PROGRAM)])
    modules = [f"study_{i}" for i in range(8)]
    with ThreadPoolExecutor(len(modules)) as pool:
        list(pool.map(partial(provenance.note, tmp_path), modules))
    assert {note["command"].split()[2].removeprefix("experiments.") for note in provenance.notes(tmp_path)} == set(
        modules
    )


def test_a_note_says_where_the_tree_had_changes(tmp_path, monkeypatch):
    repository = tmp_path / "repository"
    repository.mkdir()
    (repository / "provenance.py").write_text("committed")
    monkeypatch.setattr(provenance, "__file__", str(repository / "provenance.py"))
    git = ["git", "-C", str(repository), "-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "x"]):
        subprocess.run([*git, *command], check=True)
    provenance.note(tmp_path, "recall_distortion")
    (repository / "provenance.py").write_text("changed")
    provenance.note(tmp_path, "recall_distortion")
    clean, changed = (each["commit"] for each in provenance.notes(tmp_path))
    assert (len(clean), changed) == (40, f"{clean} with changes")


def test_a_page_without_its_marker_is_refused():
    with pytest.raises(ValueError, match="begin verdicts"):
        reproduction.filled("nothing", {"verdicts": "x"})


@pytest.mark.slow
def test_the_committed_page_is_what_the_committed_tables_give(tmp_path, monkeypatch):
    page = reproduction.PAGE.read_text()
    (tmp_path / "reproduction.md").write_text(page)
    monkeypatch.setattr(reproduction, "PAGE", tmp_path / "reproduction.md")
    readme = reproduction.README.read_text()
    (tmp_path / "README.md").write_text(readme)
    monkeypatch.setattr(reproduction, "README", tmp_path / "README.md")
    assert reproduction.main([]) == 0
    assert (tmp_path / "reproduction.md").read_text() == page
    assert (tmp_path / "README.md").read_text() == readme


def test_a_smaller_grid_does_not_replace_a_larger_one(tmp_path, monkeypatch):
    kept, trial = tmp_path / "kept", tmp_path / "trial"
    kept.mkdir(), trial.mkdir()
    monkeypatch.setattr(reproduction, "FOLDER", kept)
    cells = pd.read_csv(ledger.FOLDER / "moons.csv")
    cells.to_csv(kept / "moons.csv", index=False)
    cells[cells["depth"] < 120].to_csv(trial / "cells.csv", index=False)
    with pytest.raises(
        ValueError, match=r"lacks 54 of the 702 networks that moons.csv keeps, such as moons P conv 120"
    ):
        reproduction.keep(trial, "moons")
    assert len(pd.read_csv(kept / "moons.csv")) == 702
    cells.assign(val_acc=0.5).to_csv(trial / "cells.csv", index=False)
    reproduction.keep(trial, "moons")
    assert set(pd.read_csv(kept / "moons.csv")["val_acc"]) == {0.5}


def test_pruned_networks_are_kept_from_their_own_table(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction, "FOLDER", tmp_path / "kept")
    table = _pruned("UP", range(2), [2.0, 4.0])
    with pytest.raises(ValueError, match=r"pruned.csv is missing: run the study"):
        reproduction.keep(tmp_path, "moons-pruned")
    table.to_csv(tmp_path / "pruned.csv", index=False)
    reproduction.keep(tmp_path, "moons-pruned")
    assert len(pd.read_csv(tmp_path / "kept" / "moons-pruned.csv")) == 10
    table[table["replicate"] < 1].to_csv(tmp_path / "pruned.csv", index=False)
    with pytest.raises(ValueError, match="lacks 5 of the 10"):
        reproduction.keep(tmp_path, "moons-pruned")


def test_networks_of_another_run_are_added_to_a_grid_with_their_origin(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    monkeypatch.setattr(reproduction, "FOLDER", kept)
    for seed in range(2):
        run = tmp_path / f"run-{seed}"
        run.mkdir()
        table = _pruned("UP", range(2), [2.0, 4.0])
        table[table["replicate"] == seed].to_csv(run / "pruned.csv", index=False)
        entry = {"command": f"python -m experiments.jumpstart_grid --shard {seed}/2", "commit": "x"}
        files.write_json(run / "made" / "1.json", entry)
        reproduction.keep(run, "moons-pruned")
    assert list(pd.read_csv(kept / "moons-pruned.csv")["replicate"]) == [0] * 5 + [1] * 5
    made = json.loads((kept / "moons-pruned.json").read_text())["made"]
    assert [entry["command"][-3:] for entry in made] == ["0/2", "1/2"]


@pytest.mark.slow
@pytest.mark.optax_promotes
def test_stored_results_are_kept_once_and_can_be_extended(tmp_path, capsys):
    tiny = (
        "--epochs",
        "1",
        "--finetune-epochs",
        "1",
        "--ratios",
        "1",
        "3.9548387096774196",
        "--scores",
        "magnitude",
        "--limit",
        "128",
    )
    options = (*tiny, "--jumpstart", "0", "--chunk", "1", "--out", str(tmp_path / "study"))
    for count in (1, 2):
        assert recall_distortion.main(["--replicates", str(count), *options]) == 0
        study, _ = results.recorded(tmp_path / "study")
        assert ledger.keep(tmp_path / "study", study, "tiny", tmp_path / "kept") == 3 * count
    narrower = dataclasses.replace(study, ratios=(1, 2), scores=("random",))
    added = ledger.keep(tmp_path / "study", narrower, "tiny", tmp_path / "fresh")
    assert added == 6, "what the last command left out is kept too"
    kept = ledger.recalls("tiny", tmp_path / "kept")
    written = pd.read_csv(tmp_path / "study" / "counts.csv")
    (of_one,) = {tuple(g.sort_values("class")["correct"]) for _, g in written[
        (written["ratio"] > 3) & (written["replicate"] == 1)
    ].groupby("score")}  # fmt: skip
    np.testing.assert_array_equal(kept.correct("magnitude", 3.95484, [1])[0], of_one)
    assert kept.support.sum() == 128
    networks = pd.read_csv(tmp_path / "kept" / "tiny.csv")
    second = networks["replicate"] == 1
    networks.loc[second & (networks["score"] == "dense"), "correct_0"] += 1  # another processor
    networks.to_csv(tmp_path / "kept" / "tiny.csv", index=False)
    assert ledger.keep(tmp_path / "study", study, "tiny", tmp_path / "kept") == 6, "nothing new is added"
    networks[~second | (networks["score"] != "magnitude")].to_csv(tmp_path / "kept" / "tiny.csv", index=False)
    with pytest.raises(ValueError, match=r"replicates 1, whose dense networks are not those of tiny\.csv"):
        ledger.keep(tmp_path / "study", study, "tiny", tmp_path / "kept")
    for option, other in (("lr", "recipe"), ("finetune_lr", "pruning")):
        with pytest.raises(ValueError, match=rf"other settings \({other}\); use another name"):
            ledger.keep(tmp_path / "study", dataclasses.replace(study, **{option: (0.5,)}), "tiny", tmp_path / "kept")
    with pytest.raises(files.StoreError, match="has no network of this study: run it first"):
        ledger.keep(tmp_path / "study", dataclasses.replace(study, lr=(0.5,)), "other", tmp_path / "kept")
    capsys.readouterr()


def test_repeated_commands_of_a_table_are_one_row_with_their_commits_and_dates(tmp_path, monkeypatch):
    def entry(command, commit, minute, **device):
        return {
            "command": f"python -m x {command}",
            "commit": commit,
            "began": f"2026-11-26 14:{minute} +0000",
        } | device

    made = [
        entry("--preset p --shard 1/2 --replicates 10", "a" * 40, "37", jax="0.10.2"),
        entry("--replicates 10 --preset p --shard 0/2", "b" * 40 + " with changes", "05", jax="0.10.2"),
        entry("--preset p --replicates 30", "a" * 40, "50", jax="0.10.2"),
        entry("--preset p --replicates 10", "a" * 40, "55", jax="0.11.2", device="GPU"),
    ]
    (tmp_path / "t.json").write_text(json.dumps({"made": made}))
    monkeypatch.setattr(reproduction, "FOLDER", tmp_path)
    assert reproduction._made(["t"]).splitlines()[2:] == [
        "| `t.csv` | `python -m x --preset p --replicates 10` | 0/2, 1/2 | `aaaaaaa`, `bbbbbbb with changes` | cpu | "
        "0.10.2 | 2026-11-26 14:05 to 2026-11-26 14:37 |",
        "| `t.csv` | `python -m x --preset p --replicates 30` |  | `aaaaaaa` | cpu | 0.10.2 | 2026-11-26 14:50 |",
        "| `t.csv` | `python -m x --preset p --replicates 10` |  | `aaaaaaa` | GPU | 0.11.2 | 2026-11-26 14:55 |",
    ]


def test_the_box_plots_show_the_seed_null_and_a_table_of_alphas_gives_it():
    study = _study({"magnitude": (0.9, 1.0, 1.1, 1.2, 1.5)})
    networks = study.networks.copy()
    dense = networks["score"] == "dense"
    networks.loc[dense, "correct_0"] += 10 * networks["replicate"]
    study = study._replace(networks=networks)
    null = references.seed_null(study.correct("dense", 1.0, range(6)), study.support)
    (axes,) = reproduction.alpha_figure({"fashion-lenet": study}).axes
    (band,) = [patch for patch in axes.patches if isinstance(patch, Rectangle)]
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((null.low, null.high))
    table = reproduction.reporting.pruning(pd.read_csv(ledger.FOLDER / "prune-and-jumpstart.csv"))[0]
    assert table.title.endswith("; seed null of alpha 0.894 [0.669, 1.118]")  # computed once by numpy alone


def test_a_study_without_magnitude_or_control_has_a_table_of_the_networks_with_every_ratio():
    study = _study({"gradient": (0.9, 1.0, 1.1, 1.2, 1.5)})
    networks = study.networks[study.networks["score"] != "control"]
    lost = (networks["ratio"] == 50) & (networks["replicate"] == 2)
    text = reproduction._recall("cifar10-resnet20-short", study._replace(networks=networks[~lost]))
    assert "Dense accuracy 0.7500, standard deviation 0.0000, 5 networks." in text
    rows = [row.split(" | ")[:4] for row in text.splitlines() if row.startswith("| gradient")]
    assert [(row[1], row[3]) for row in rows] == [("2", "5"), ("4", "5"), ("10", "5"), ("20", "5"), ("50", "5")]


def test_the_verdicts_are_in_the_order_of_their_numbers():
    names = ["R12", "R2", "R2, CIFAR-10", "J1", "R10"]
    rows = reproduction._verdicts(verdicts.Verdict(name, "", "", "") for name in names).splitlines()[2:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == ["J1", "R2", "R2, CIFAR-10", "R10", "R12"]
