"""The first screen, the verdicts and the page with made-up tables of the studies that have not run yet."""

import json
import re

import numpy as np
import pandas as pd
import pytest

import jprune.recall
from experiments.recall_distortion import presets
from experiments.reproduction import __main__ as reproduction
from experiments.reproduction import explanations, hypotheses, jumpstart, ledger, references, summary
from experiments.reproduction.ledger import Recalls
from tests.experiments.reproduction.made_up import PUBLISHED, study

BOTH = (explanations.FEW_WEIGHTS, explanations.WITH_FLOOR[0])  # without and with a floor


def _tables(recalls=None, grids=None, pruned=None):
    moons = pd.read_csv(reproduction.PUBLISHED / "jumpstart_moons.csv")
    return summary.Tables(recalls or {}, grids or {}, pruned or {}, moons, PUBLISHED)


FLAT = (0.9, 1.0, 1.1, 1.2, 1.5)


@pytest.mark.parametrize(
    ("shift", "title"),
    [
        (-0.2, "Undecayed pruning lowers alpha on our CIFAR-10 ResNet-20s."),
        (0.2, "Undecayed pruning raises alpha on our CIFAR-10 ResNet-20s."),
        (0.0, "On our CIFAR-10 ResNet-20s, the effect of undecayed pruning on alpha is open."),
    ],
)
@pytest.mark.quick(1)
def test_the_bullet_on_cifar_has_a_title_for_each_verdict(shift, title):
    both = study({"magnitude": FLAT, "undecayed": np.array(FLAT) + shift})
    text = summary._own_cifar(_tables({hypotheses.CIFAR: both}))
    assert text.startswith(
        f"**{title}** Over 6 networks (dense accuracy .750 on JPEG copies of the images; published ResNet-56: .893), "
        "alpha at t = 2 "
    )
    assert re.search(r"is -\.100 \[-.*\], and undecayed minus magnitude at t = 20 is ", text)
    assert text.endswith("].")


def test_three_networks_on_cifar_have_intervals_with_two_degrees_of_freedom():
    three = study({"magnitude": FLAT})
    three = three._replace(networks=three.networks[three.networks["replicate"] < 3])
    text = summary._own_cifar(_tables({hypotheses.CIFAR: three}))
    assert text.startswith("**Our CIFAR-10 ResNet-20s have been pruned by magnitude only.** Over 3 networks (")
    alphas = three.audit(["magnitude"], [0, 1, 2]).alphas.set_index(["ratio", "model"])["alpha"]
    change = alphas[2.0] - alphas[1.0]
    half = 9.924843 * change.std(ddof=1) / np.sqrt(3)  # quantile of t with two degrees of freedom
    numbers = [
        f"{value:+.3f}".replace("0.", ".") for value in (change.mean(), change.mean() - half, change.mean() + half)
    ]
    assert text.endswith("of the control is {} [{}, {}].".format(*numbers))
    missing = summary._missing(_tables({hypotheses.CIFAR: three}))
    assert "**Run in part**: CIFAR-10 with ResNet-20 (3 of 10 networks)." in missing
    found = {each.name: each for each in hypotheses.of_recalls({hypotheses.CIFAR: three}, PUBLISHED)}
    assert "3 networks" in found["R1, CIFAR-10"].found
    assert found["R3, CIFAR-10"].verdict == "not run"


def test_the_images_that_the_summary_calls_jpeg_copies_are_those_of_the_table():
    """The originals have another fingerprint; the sentence has to change with the table."""
    made = json.loads((ledger.FOLDER / f"{hypotheses.CIFAR}.json").read_text())
    assert made["settings"]["data"]["fingerprint"] == "ad14943ab094348e"


def test_two_networks_on_cifar_answer_nothing():
    two = study({"magnitude": FLAT, "undecayed": np.array(FLAT) + 0.2})
    two = two._replace(networks=two.networks[two.networks["replicate"] < 2])
    means = two.audit(["magnitude"], [0, 1]).alphas.groupby("ratio")["alpha"].mean()
    assert summary._own_cifar(_tables({hypotheses.CIFAR: two})) == (
        "**On CIFAR-10, 2 ResNet-20s of our own have been pruned; an answer needs 3.** Mean alpha after magnitude "
        f"pruning is {', '.join(f'{means[t]:.2f} at t = {t}'.replace('0.', '.') for t in (2, 4))}, "
        f"{', '.join(f'{means[t]:.2f} at t = {t}' for t in (10, 20, 50))} (dense accuracy .750 on JPEG copies of "
        "the images; published ResNet-56: .893)."
    )
    found = {each.name: each for each in hypotheses._on_cifar(two)}
    assert {found[f"R{n}, CIFAR-10"].verdict for n in (1, 2, 3, 4)} == {"open"}
    assert found["R6, CIFAR-10"].verdict == "not run"
    assert found["R1, CIFAR-10"].found.endswith("; dense accuracy 0.750; an answer needs 3 networks")


def test_a_claim_about_the_published_networks_is_contradicted_on_cifar_and_does_not_carry_over_to_lenet():
    higher = study({"magnitude": FLAT, "undecayed": np.array(FLAT) + 0.2})
    assert hypotheses.undecayed(higher).verdict == "does not carry over"
    assert {e.name: e.verdict for e in hypotheses._on_cifar(higher)}["R3, CIFAR-10"] == "contradicted"


@pytest.mark.parametrize(
    ("shift", "words"),
    [(-0.2, "lowers"), (0.2, "does not lower"), (0.0, "is not shown to lower")],
)
@pytest.mark.quick(1)
def test_undecayed_pruning_is_described_by_its_verdict(shift, words):
    both = study({"magnitude": FLAT, "undecayed": np.array(FLAT) + shift})
    text = summary._undecayed(_tables({"fashion-lenet": both}))
    assert text.startswith(f"**Undecayed pruning {words} alpha on LeNet.** On Fashion-MNIST its alpha minus that of ")


def _kept_350(collapsed):
    arm = study({"magnitude": FLAT})
    networks = arm.networks.copy()
    hit = (networks["score"] == "magnitude") & (networks["ratio"] == 50) & (networks["replicate"] < collapsed)
    networks.loc[hit, [f"correct_{c}" for c in range(4)]] = [1000, 0, 0, 0]
    return arm._replace(networks=networks)


def test_the_published_counts_are_described_by_data_set_and_setting():
    arms = {
        "fashion-published-paper": _kept_350(0),
        "mnist-published-paper": _kept_350(0),
        "mnist-published-script": _kept_350(0),
    }
    matches = {name: len(hypotheses.matching_ratios(name, arm, PUBLISHED)[0]) for name, arm in arms.items()}
    fashion, mnist, script = matches.values()
    assert summary._counts(_tables(arms)) == (
        "**The published code keeps 350 weights at t = 50, not 125.** With 350, 0 of 18 LeNets [.00, .18] are at "
        f"chance. Of 5 ratios, alpha matches the published quartiles on Fashion-MNIST at {fashion} (paper's setting); "
        f"on MNIST at {mnist} (paper's setting) and {script} (script's setting)."
    )
    some = summary._counts(_tables({"mnist-published-script": _kept_350(2)}))
    assert (
        "With 350, 2 of 6 LeNets [.10, .70] are at chance. Of 5 ratios, alpha matches the published quartiles on "
        in some
    )


def test_alpha_at_t_2_is_compared_with_another_dense_seed_on_every_data_set(monkeypatch):
    null = {name: references.Estimate(value, 0.0, 1.0) for name, value in (("fashion", 0.966), ("cifar", 0.994))}
    lower, open_ = references.Estimate(-0.062, -0.088, -0.035), references.Estimate(-0.004, -0.035, 0.027)
    found = {
        "fashion-lenet": (null["fashion"], open_),
        "mnist-lenet": (null["fashion"], open_),
        "cifar10-published": (null["cifar"], lower),
    }
    monkeypatch.setattr(summary, "_null_and_change", lambda tables, name: found[name])
    text = summary._at_low_ratios(_tables())
    assert text == (
        "**At t = 2, pruning lowers alpha on the published CIFAR-10 networks, and is not shown to on LeNets.** Alpha "
        "minus that of another dense seed (in parentheses) is -.062 [-.088, -.035] on the ResNet-56s (.994), -.004 "
        "[-.035, +.027] on Fashion-MNIST LeNets (.966) and -.004 [-.035, +.027] on MNIST LeNets (.966)."
    )
    found["mnist-lenet"] = (null["fashion"], lower)
    assert summary._at_low_ratios(_tables()).startswith(
        "**Alpha at t = 2 has to be compared with that of another dense"
    )
    found["mnist-lenet"] = None
    assert summary._at_low_ratios(_tables()) == ""


def test_the_answer_to_r10_is_given_by_arm_with_what_an_open_one_would_have_needed():
    arms = {"mnist-published-paper": _kept_350(0), "mnist-published-script": _kept_350(6)}
    found = {each.name: each for each in hypotheses.of_recalls(arms, PUBLISHED)}
    assert found["R10"].verdict == "yes in 1, open in 1 of 2 arms"
    assert "MNIST, paper's setting: 0 of 6 [0.00, 0.39]: **open** (yes needs 3 of 6; no needs 22 networks or more)" in (
        found["R10"].found
    )
    assert re.fullmatch(r"MNIST: paper's \d of 5, script's \d of 5", found["R11"].verdict)


@pytest.mark.parametrize(
    ("kappas", "words"),
    [
        ((1.0, 0.3), "Our U differs from the published one."),
        ((0.4, 0.3), "Single cells with U depend on the seed."),
        ((None, 0.3), "For the method U more seeds are needed."),
    ],
)
def test_the_bullet_on_seeds_has_an_ending_for_each_answer(kappas, words, monkeypatch):
    own, published = kappas
    known = {"relu": (0.03, 0.89)} | ({"U": (0.1, own)} if own is not None else {})
    monkeypatch.setattr(jumpstart, "between_seeds", lambda cells: known)
    monkeypatch.setattr(summary, "_published_kappas", lambda tables: {"relu": 0.9, "U": published})
    text = summary.of_seeds(_tables(grids={"moons": pd.DataFrame(), "moons-seeds": pd.DataFrame({"a": [1]})}))
    assert " ".join(text.split()).endswith(f"published grid: relu .90, U .30. {words}")


def _equal(low, high, reason=""):
    middle = (low + high) / 2
    return jprune.recall.EqualAccuracy(middle, low, high, 0.5, 1.0, 0.5, 0.9, 180, 30, 0, reason)


@pytest.mark.parametrize(
    ("low", "high", "answer", "title"),
    [
        (
            0.01,
            0.20,
            "yes",
            "Removing channels raises alpha more than removing single weights does, at equal accuracy.",
        ),
        (
            0.01,
            0.04,
            "yes",
            "Removing channels raises alpha more than removing single weights does, at equal accuracy.",
        ),
        (
            -0.01,
            0.04,
            "no larger than 5%",
            "At equal accuracy, removing channels and removing single weights give the same al",
        ),
        (-0.10, 0.04, "open", "Whether removing channels raises alpha more than removing single weights, at equal "),
    ],
)
def test_channels_are_described_by_their_answer(low, high, answer, title, monkeypatch):
    result = _equal(low, high)
    assert hypotheses.channels_answer(result) == answer
    monkeypatch.setattr(hypotheses, "channels_against", lambda weights, channels: (result, 0))
    arm = study({"magnitude": FLAT})
    text = summary._channels(_tables({"fashion-channels": arm, "fashion-lenet": arm}))
    assert text.startswith(f"**{title}")
    assert text.endswith("over 30 Fashion-MNIST LeNets; the planned margin is .05.")


@pytest.mark.parametrize(
    ("low", "high", "title", "verdict"),
    [
        (0.01, 0.10, "changes recalls more than other changes do.", "yes"),
        (
            -0.10,
            -0.01,
            "is not shown to change recalls more than other changes do.",
            "yes, but less after pruning than after",
        ),
        (-0.04, 0.04, "is not shown to change recalls more than other changes do.", "no larger than 5%"),
        (-0.10, 0.04, "is not shown to change recalls more than other changes do.", "open"),
    ],
)
def test_other_changes_are_described_by_their_answer(low, high, title, verdict, monkeypatch):
    kinds = list(dict.fromkeys(kind for _, kind in explanations.CHANGES.values()))
    monkeypatch.setattr(explanations, "compare_changes", lambda *_: (dict.fromkeys(kinds, _equal(low, high)), 0))
    arm = study({"magnitude": FLAT})
    recalls = dict.fromkeys(("fashion-lenet", *explanations.CHANGES), arm)
    assert summary._other_changes(_tables(recalls)).startswith(f"**At equal accuracy, pruning {title}**")
    (found,) = explanations.of_explanations(recalls)
    assert found.verdict.startswith(verdict)
    assert ("smallest effects found with a chance of 80%" in found.found) == (verdict == "open")


def _few(magnitude, undecayed):
    """Thirty networks with 60 to 1,200 weights, of which the first ones are at chance with 125."""
    rows = []
    ratios = [float(f"{ratio:.6g}") for ratio in presets.get("fashion-few-weights").ratios[1:]]
    hits = {"magnitude": magnitude, "undecayed": undecayed}
    places = [(score, 1.0, 1000) for score in ("dense", "control")]
    places += [(score, t, n) for score in hits for t, n in zip(ratios, (1200, 600, 350, 250, 125, 60), strict=True)]
    for score, ratio, keep in places:
        for i in range(30):
            right = [1000, 0, 0, 0] if keep == 125 and i < hits[score] else [850, 800, 700, 650]
            sizes = {"parameters": 1100, "prunable": 1000, "nonzero": keep}
            counts = {f"correct_{c}": count for c, count in enumerate(right)}
            rows.append({"score": score, "ratio": ratio, "replicate": i, **sizes, **counts})
    return Recalls(pd.DataFrame(rows), np.full(4, 1000), tuple("abcd"))


@pytest.mark.parametrize(
    ("magnitude", "undecayed", "words"),
    [
        (20, 5, "With 125 weights left, fewer networks collapse after undecayed pruning."),
        (5, 20, "With 125 weights left, more networks collapse after undecayed pruning."),
        (5, 4, "Whether fewer networks with 125 weights collapse after undecayed pruning is open."),
    ],
)
@pytest.mark.quick(1)
def test_collapse_is_described_by_its_verdict(magnitude, undecayed, words):
    six = study({"magnitude": FLAT, "undecayed": FLAT})
    networks = pd.concat([six.networks.assign(replicate=six.networks["replicate"] + 6 * i) for i in range(5)])
    for score, hits in (("magnitude", magnitude), ("undecayed", undecayed)):
        hit = (networks["score"] == score) & (networks["ratio"] == 50) & (networks["replicate"] < hits)
        networks.loc[hit, [f"correct_{c}" for c in range(4)]] = [1000, 0, 0, 0]
    text = summary._collapse(_tables({"fashion-lenet": six._replace(networks=networks)}))
    assert text.startswith(f"**{words}** Of Fashion-MNIST LeNets, {undecayed} of 30 [")


def test_a_floor_adds_a_sentence_on_collapse_and_an_open_r14_says_what_it_needed():
    both = study({"magnitude": FLAT, "undecayed": FLAT})
    names = dict(zip(BOTH, (_few(24, 11), _few(1, 0)), strict=True))
    text = summary._collapse(_tables({"fashion-lenet": both} | names))
    assert text.endswith(
        " after magnitude pruning (11 and 24 on another processor). With at least 10 weights in every layer, 0 and 1 "
        "are (difference of the shares [-.14, +.07]), and the scores are not shown to differ at any of 6 counts "
        "from 60 to 1,200 weights."
    )
    (found,) = explanations.of_explanations(names)
    assert found.verdict == "yes"
    networks = names["fashion-few-weights-floor"].networks
    hit = (networks["score"] == "magnitude") & (networks["nonzero"] == 60) & (networks["replicate"] < 20)
    networks.loc[hit, [f"correct_{c}" for c in range(4)]] = [1000, 0, 0, 0]
    text = summary._collapse(_tables({"fashion-lenet": both} | names))
    assert text.endswith("), and the scores differ with 60 weights, of 6 counts from 60 to 1,200.")
    (found,) = explanations.of_explanations(dict(zip(BOTH, (_few(8, 0), _few(0, 0)), strict=True)))
    assert found.verdict == "open"
    assert found.found.endswith("a count can differ only if 11 networks or more collapse after one score alone")


def _after(method, largest):
    """Networks of new seeds that reach .95 up to these ratios, and .6 above; 0 means that they do not train."""
    return pd.DataFrame(
        {"dataset": "moons", "method": method, "depth": 20, "width": 2, "replicate": 5 + i, "ratio": ratio,
         "train_acc": 0.95 if ratio <= most else 0.6}
        for i, most in enumerate(largest)
        for ratio in (1.0, 1.5, 2.0)
    )  # fmt: skip


@pytest.mark.parametrize(("relu", "title"), [
    ([2.0] * 12, "cannot be pruned as far as those with relu alone."),
    ([1.5] * 10 + [0.0, 0.0], "are not shown to differ from those with relu alone."),
])  # fmt: skip
def test_the_bullet_on_pruned_thin_networks_has_words_for_each_answer(relu, title):
    after = pd.concat([_after("UP", [1.5] * 12), _after("relu-bn", [1.0] * 12), _after("relu", relu)])
    old = after.assign(replicate=0, train_acc=0.0)
    text = summary._pruned_further(_tables(pruned={summary.NEW_SEEDS: pd.concat([after, old])}))
    assert text.startswith(
        "**On moons, thin, deep networks trained with jumpstart can be pruned further than those with batch "
        f"normalization, and {title}** "
    )
    assert "larger in 12 [.76, 1.00] and smaller in 0 [.00, .24] of 12 pairs with batch normalization" in text
    others = f"12 with batch normalization and {sum(most > 0 for most in relu)} with relu alone"
    assert text.endswith(f"; 12 of 12 networks train with jumpstart, {others}.")
    mnist = after.assign(dataset="mnist")
    with_mnist = summary._pruned_further(_tables(pruned={summary.NEW_SEEDS: after, "mnist-pruned": mnist}))
    trained, keep = sum(most > 0 for most in relu) + 24, sum(most > 1 for most in relu) + 12
    assert with_mnist == f"{text} On MNIST, {keep} of {trained} networks that train keep it at t = 1.5."
    few = {"mnist-pruned": mnist[mnist["method"] == "relu-bn"]}
    text = summary._pruned_further(_tables(pruned={summary.NEW_SEEDS: after} | few))
    assert text.endswith(" On MNIST, none of 12 networks that train keep it at t = 1.5.")
    assert summary._pruned_further(_tables()) == ""


def test_open_answers_give_the_smallest_effect():
    rng = np.random.default_rng(0)
    wide = study({"magnitude": FLAT, "random": (0.9, 1.0, 1.0, 1.2, 1.3)})
    dense = wide.networks["score"] == "dense"
    networks = wide.networks.copy()
    right = [f"correct_{c}" for c in range(4)]
    networks.loc[dense, right] += rng.integers(-60, 60, size=(int(dense.sum()), 4))
    found = {e.name: e for e in hypotheses.of_recalls({"fashion-lenet": wide._replace(networks=networks)}, PUBLISHED)}
    for name in ("R6", "R12"):
        assert "open" in found[name].verdict
        assert re.search(r"smallest effects? found with a chance of 80%: \d", found[name].found), name


def test_what_is_missing_is_listed_and_nothing_is_when_all_has_run():
    text = summary._missing(_tables())
    assert text.startswith("**Not run**: published counts on Fashion-MNIST in the paper's setting; ")
    assert "**Run in part**" not in text
    cells = {name: pd.DataFrame({"a": range(count)}) for name, (_, count) in summary._PLANNED.items()}
    pruned = {"mnist-pruned": pd.DataFrame({"ratio": [1.0] * 60 + [2.0] * 60})}
    studies = {name: cells.pop(name) for name in list(cells) if not name.startswith(("moons", "mnist-grid"))}
    full = study({"magnitude": FLAT})
    more = pd.concat([full.networks.assign(replicate=full.networks["replicate"] + 6 * i) for i in range(5)])
    recalls = {name: full._replace(networks=more) for name in studies if name != "mnist-pruned"}
    recalls |= dict.fromkeys(BOTH, _few(24, 11))
    assert summary._missing(_tables(recalls, cells, pruned)) == ""
    few = {"mnist-pruned": pd.DataFrame({"ratio": [1.0] * 7})}
    assert summary._missing(_tables(recalls, cells, few)) == (
        "**Run in part**: pruning of thin networks on MNIST (J5, 7 of 60 networks)."
    )


def _copied(folder, name, source, table, **settings):
    """Write a made-up table with the settings of a committed one."""
    known = json.loads((ledger.FOLDER / f"{source}.json").read_text())
    table.to_csv(folder / f"{name}.csv", index=False)
    (folder / f"{name}.json").write_text(json.dumps(known | settings))


@pytest.mark.slow
def test_the_page_is_complete_when_every_study_has_run(tmp_path, monkeypatch):
    results, read = tmp_path / "results", lambda name: pd.read_csv(ledger.FOLDER / f"{name}.csv")
    results.mkdir()
    for path in ledger.FOLDER.iterdir():
        (results / path.name).write_bytes(path.read_bytes())
    paper, lenet, mnist = read("fashion-published-paper"), read("fashion-lenet"), read("mnist-lenet")
    nominal = dict(zip((2.0, 4.0, 10.0, 20.0, 50.0), sorted(paper["ratio"].unique())[1:], strict=True))
    ten = mnist[mnist["replicate"] < 10].assign(ratio=mnist["ratio"].replace(nominal))
    ten.loc[ten["ratio"] > 42, [f"correct_{c}" for c in range(10)]] = 850
    ten.loc[ten["ratio"] > 42, "correct_3"] = 700 + 10 * ten["replicate"]
    for name in ("mnist-published-paper", "mnist-published-script"):
        _copied(results, name, "mnist-lenet", ten)
    three = lenet[(lenet["replicate"] < 3) & lenet["score"].isin(["dense", "control", "magnitude", "undecayed"])]
    _copied(results, hypotheses.CIFAR, "cifar10-resnet20", three, support=[1000] * 10)
    to_few = [float(f"{ratio:.6g}") for ratio in presets.get("fashion-few-weights").ratios[:1:-1]]
    ratios = dict(zip((50.0, 20.0, 10.0, 4.0, 2.0), to_few, strict=True))
    few = lenet[lenet["score"].isin(["dense", "control", "magnitude", "undecayed", "gradient"])]
    few = few.assign(ratio=few["ratio"].replace(ratios))
    for name in BOTH:
        _copied(results, name, "fashion-lenet", few)
    seeds, pruned = read("moons-seeds"), read("moons-pruned")
    _copied(results, "moons-seeds-u", "moons-seeds", seeds[seeds["method"] == "UP"].assign(method="U"))
    _copied(results, "mnist-pruned", "moons-pruned", pruned.assign(dataset="mnist"))
    monkeypatch.setattr(reproduction, "FOLDER", results)
    read_study = ledger.recalls
    monkeypatch.setattr(ledger, "recalls", lambda name: read_study(name, results))
    for variable in ("PAGE", "README"):
        before = getattr(reproduction, variable)
        (tmp_path / before.name).write_bytes(before.read_bytes())
        monkeypatch.setattr(reproduction, variable, tmp_path / before.name)
    assert reproduction.main([]) == 0
    page = " ".join((tmp_path / "reproduction.md").read_text().split())
    assert "**Not run**" not in page
    assert "CIFAR-10 with ResNet-20 (3 of 10 networks)" in page
    for title in (
        "MNIST, LeNet, published counts, script's setting",
        "CIFAR-10, ResNet-20, short schedule",
        "moons-seeds-u",
        "mnist-pruned",
    ):
        assert f"### {title} " in page
    assert "With 350, 0 of 80 LeNets [.00, .05] are at chance" in page
    assert "R3, CIFAR-10" in page
    assert "learning rate 0.1, 1 epoch, batch 128" in page
    assert "| R14 | Does undecayed pruning help only by avoiding layer collapse?" in page
    assert re.search(r"\| J5 \|[^|]*\|[^|]*; mnist, moons", page)
    assert "For the method U more seeds are needed" not in page
    assert "nan" not in page.partition("<!-- begin summary -->")[2].partition("<!-- end summary -->")[0]
