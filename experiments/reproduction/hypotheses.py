"""The questions planned before the runs, each with its test and its verdict.

A verdict is ``supported``, ``contradicted`` (the interval or test excludes the claim), ``does not carry over`` (the
claim was published for other networks and is not found on these), ``open`` (the data are inconclusive; the smallest
effect detectable with a power of 80% is given) or ``not run`` (fewer than two networks have every ratio). Verdicts use
the networks that have run, even if more were planned. Decisions made after the results were seen are labelled with
their date.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

import jprune
from experiments.jumpstart_grid import report
from experiments.reproduction import references
from experiments.reproduction.ledger import DENSE, Recalls
from jprune.recall import independent_test, paired_test, t_interval

PUBLISHED_COUNTS = {
    "fashion-published-paper": "Fashion-MNIST, paper's setting",
    "fashion-published-script": "Fashion-MNIST, script's setting",
    "mnist-published-paper": "MNIST, paper's setting",
    "mnist-published-script": "MNIST, script's setting",
}
REFERENCES = {
    "fashion-lenet": "Fashion-MNIST, LeNet",
    "mnist-lenet": "MNIST, LeNet",
    "cifar10-published": "CIFAR-10, ResNet-56, published networks",
}
_PRUNED = (2.0, 4.0, 10.0, 20.0, 50.0)
_P = 0.01


class Verdict(NamedTuple):
    """The answer to one question.

    Attributes:
      name: name of the hypothesis, such as R1.
      question: the question.
      found: the measurement, in words.
      verdict: the verdict, in one or a few words.
    """

    name: str
    question: str
    found: str
    verdict: str


def of_recalls(studies: Mapping[str, Recalls], published: pd.DataFrame) -> list[Verdict]:
    """Return the verdicts on recall distortion.

    Args:
      studies: from the name of the committed table to its study, for those that have run.
      published: quartiles of the published alphas, a row per data set, score and ratio.
    """
    main = studies.get("fashion-lenet")
    plain = _alphas(main, ["magnitude"])
    return [
        _control(plain),
        _rising(plain),
        _undecayed(_alphas(main, ["magnitude", "undecayed"])),
        _equal_accuracy(main),
        _signed(main),
        _random(main),
        _other(
            "R7", "Does the jumpstart penalty in dense training change alpha?", main, studies.get("fashion-jumpstart")
        ),
        _units(main, studies.get("fashion-jumpstart")),
        _other("R9", "Does weight decay 0 instead of 5e-4 change alpha?", main, studies.get("fashion-no-decay")),
        _published_counts(studies),
        _quartiles(studies, published),
        _seed_null(studies),
        _collapse(main),
        _devices(main),
        *([_channels(main, studies["fashion-channels"])] if "fashion-channels" in studies else []),
    ]


def _alphas(study: Recalls | None, scores: Sequence[str]) -> pd.DataFrame | None:
    """Return alpha by model (rows) and (score, ratio); None if fewer than two networks have every ratio."""
    if study is None or not all(set(_PRUNED) <= set(study.ratios(score)) for score in scores):
        return None
    replicates = study.complete(scores)
    if len(replicates) < 2:
        return None
    audit = study.audit(scores, replicates)
    return audit.alphas.pivot_table(index="model", columns=["score", "ratio"], values="alpha")


def _control(alphas: pd.DataFrame | None) -> Verdict:
    question = "Is alpha below 1 at t = 2 because of pruning?"
    if alphas is None:
        return _not_run("R1", question)
    difference = alphas["magnitude", 2.0] - alphas["magnitude", 1.0]
    change = t_interval(difference)
    found = (
        f"control {_mean(alphas['magnitude', 1.0])}, t = 2 {_mean(alphas['magnitude', 2.0])}; difference "
        f"{_interval(change)}, {len(alphas)} networks"
    )
    verdict = "supported" if change.high < 0 else "contradicted" if change.low > 0 else "open"
    if verdict == "open":
        found += f"; smallest effect found with a chance of 80%: {_detectable(difference):.3f}"
        found += (
            ". The margin of .05 that was planned for 'contradicted' exceeds the effect and is not used (2026-11-28)"
        )
    return Verdict("R1", question, found, verdict)


def _rising(alphas: pd.DataFrame | None) -> Verdict:
    question = "Does alpha rise with t?"
    if alphas is None:
        return _not_run("R2", question)
    steps = [
        paired_test(alphas["magnitude", b], alphas["magnitude", a], "greater") for a, b in itertools.pairwise(_PRUNED)
    ]
    p = [min(1.0, len(steps) * step.p_value) for step in steps]
    means = ", ".join(f"{alphas['magnitude', ratio].mean():.2f}" for ratio in _PRUNED)
    named = ", ".join(f"{ratio:g}" for ratio in _PRUNED)
    found = f"mean alpha {means} at t = {named}; p {', '.join(map(_p, p))}, {len(alphas)} networks"
    falling = any(len(steps) * (1 - step.p_value) < _P for step in steps)
    return Verdict("R2", question, found, "supported" if max(p) < _P else "contradicted" if falling else "open")


def _undecayed(alphas: pd.DataFrame | None) -> Verdict:
    question = "Does undecayed have a lower alpha than magnitude at equal achieved ratio?"
    if alphas is None:
        return _not_run("R3", question)
    tests = {r: paired_test(alphas["undecayed", r], alphas["magnitude", r]) for r in _PRUNED}
    p = {ratio: min(1.0, len(tests) * test.p_value) for ratio, test in tests.items()}
    change = {ratio: (alphas["undecayed", ratio] - alphas["magnitude", ratio]).mean() for ratio in tests}
    found = "; ".join(f"t = {r:g}: {change[r]:+.3f} (p {_p(p[r])})" for r in tests) + f"; {len(alphas)} networks"
    lower = any(p[r] < _P and change[r] < 0 for r in tests)
    higher = any(p[r] < _P and change[r] > 0 for r in tests)
    return Verdict("R3", question, found, "does not carry over" if higher else "supported" if lower else "open")


def _equal_accuracy(study: Recalls | None) -> Verdict:
    question = "Does undecayed have a lower alpha than magnitude at equal accuracy?"
    scores = ["magnitude", "undecayed"]
    if _alphas(study, scores) is None or study is None:
        return _not_run("R4", question)
    table = study.audit(scores, study.complete(scores)).alphas
    table = table[table["ratio"] != 1]
    working = study.working(table)
    positive = working[working["alpha"] > 0]  # the others have no logarithm
    result = jprune.recall.compare_at_equal_accuracy(positive, *scores)
    if not np.isfinite(result.low):
        return Verdict("R4", question, result.reason, "open")
    found = f"log alpha at equal alpha_null: {_change(result)}, {result.models} networks"
    verdict = "supported" if result.high < 0 else "contradicted" if result.low > 0 else "open"
    found += f"; {len(table) - len(working)} of {len(table)} alphas, of collapsed networks, left out (2026-11-26)"
    found += f", and {len(working) - len(positive)} below 0" if len(positive) < len(working) else ""
    low = positive[positive["ratio"] <= 20]
    if len(low) < len(positive):
        few = jprune.recall.compare_at_equal_accuracy(low, *scores)
        if np.isfinite(few.low):
            bound = 100 * np.expm1(max(abs(few.low), abs(few.high)))
            found += f"; t <= 20 alone (2026-11-28): {_change(few)}, equivalent within {bound:.1f}%"
    return Verdict("R4", question, found, verdict)


def _change(result: jprune.recall.EqualAccuracy) -> str:
    return f"{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]"


def _signed(study: Recalls | None) -> Verdict:
    question = "Does the signed-quantile variant keep more weights than asked?"
    if study is None or not study.ratios("undecayed-signed"):
        return _not_run("R5", question)
    rows = study.networks[study.networks["score"] == "undecayed-signed"]
    achieved = rows["parameters"] / (rows["parameters"] - rows["prunable"] + rows["nonzero"])
    by_ratio = achieved.groupby(rows["ratio"]).mean()
    found = ", ".join(f"asked {ratio:g}, achieved {value:.2f}" for ratio, value in by_ratio.items())
    fewer = (by_ratio < 0.95 * by_ratio.index).to_numpy()
    verdict = "supported" if fewer.all() else "open" if fewer.any() else "contradicted"
    return Verdict("R5", question, f"{found}; {rows['replicate'].nunique()} networks", verdict)


def _random(study: Recalls | None) -> Verdict:
    question = "Does random pruning of healthy networks intensify from t = 4?"
    alphas = _alphas(study, ["random"])
    if alphas is None or study is None:
        return _not_run("R6", question)
    intervals = {ratio: t_interval(alphas["random", ratio]) for ratio in _PRUNED if ratio >= 4}
    found = "; ".join(f"t = {r:g}: {_spread(i)}" for r, i in intervals.items())
    above = all(interval.low > 1 for interval in intervals.values())
    below = intervals[4.0].high < 1
    verdict = "supported" if above else "contradicted" if below else "open"
    table = study.audit(["random"], study.complete(["random"])).alphas
    working = study.working(table).groupby("ratio")["alpha"]
    few = {r: alpha for r, alpha in working if r in intervals and 2 <= len(alpha) < len(alphas)}
    rest = "; ".join(f"t = {r:g}: {_spread(t_interval(alpha))}, {len(alpha)} networks" for r, alpha in few.items())
    apart = f"; without collapsed networks (2026-11-26, not judged): {rest}" if few else ""
    return Verdict("R6", question, f"{found}; {len(alphas)} networks{apart}", verdict)


def _other(name: str, question: str, main: Recalls | None, variant: Recalls | None) -> Verdict:
    """Test whether alpha differs between two studies: Welch's t per ratio, Bonferroni over the ratios."""
    ours, theirs = _alphas(main, ["magnitude"]), _alphas(variant, ["magnitude"])
    if ours is None or theirs is None:
        return _not_run(name, question)
    tests = {r: independent_test(theirs["magnitude", r], ours["magnitude", r]) for r in _PRUNED}
    p = {ratio: min(1.0, len(tests) * test.p_value) for ratio, test in tests.items()}
    change = {r: theirs["magnitude", r].mean() - ours["magnitude", r].mean() for r in tests}
    found = "; ".join(f"t = {r:g}: {change[r]:+.3f} (p {_p(p[r])})" for r in tests)
    found += f"; {len(theirs)} and {len(ours)} networks"
    if min(p.values()) < _P:
        return Verdict(name, question, found, "supported")
    least = {r: _detectable(theirs["magnitude", r], ours["magnitude", r], len(tests)) for r in _PRUNED}
    found += "; smallest effects found with a chance of 80%: " + ", ".join(f"{d:.2f}" for d in least.values())
    return Verdict(name, question, found, "open")


def _units(main: Recalls | None, variant: Recalls | None) -> Verdict:
    question = "Does it change the share of dead units, or accuracy, after pruning at t = 50?"
    if _alphas(main, ["magnitude"]) is None or _alphas(variant, ["magnitude"]) is None:
        return _not_run("R8", question)
    found, least = [], 1.0
    for column, words in (("dead_units", "dead units"), ("accuracy", "accuracy")):
        without, with_penalty = (_values(study, column, 50.0) for study in (main, variant) if study is not None)
        if min(len(without), len(with_penalty)) < 2:
            found.append(f"{words}: too few networks")
            continue
        p = min(1.0, 2 * independent_test(with_penalty, without).p_value)
        least = min(least, p)
        found.append(f"{words} {without.mean():.3f} without, {with_penalty.mean():.3f} with it (p {_p(p)})")
    lower = []
    for ratio in (4.0, 10.0, 20.0):
        without, with_penalty = (_values(study, "dead_units", ratio) for study in (main, variant) if study is not None)
        if min(len(without), len(with_penalty)) >= 2:
            lower.append(f"t = {ratio:g}: {without.mean():.3f} without, {with_penalty.mean():.4f} with it")
    if lower:
        found.append(f"dead units at lower ratios (2026-11-28, not judged): {', '.join(lower)}")
    return Verdict("R8", question, "; ".join(found), "supported" if least < _P else "open")


def _values(study: Recalls, column: str, ratio: float) -> np.ndarray:
    replicates = study.complete(["magnitude"])
    if column == "accuracy":
        return study.correct("magnitude", ratio, replicates).sum(1) / study.support.sum()
    values = study.column(column, "magnitude", ratio, replicates)
    return values[np.isfinite(values)]


def _collapse(study: Recalls | None) -> Verdict:
    question = "Do fewer networks collapse after undecayed than after magnitude pruning to 125 weights?"
    scores = ["magnitude", "undecayed"]
    if study is None or _alphas(study, scores) is None:
        return _not_run("R16", question)
    replicates = study.complete(scores)
    magnitude, undecayed = (study.collapsed(score, 50.0, replicates) for score in scores)
    fewer, more = int((magnitude & ~undecayed).sum()), int((undecayed & ~magnitude).sum())
    p = _sign_test(fewer, more)
    found = f"{undecayed.sum()} and {magnitude.sum()} of {len(replicates)} collapsed; "
    found += f"{fewer} with magnitude alone, {more} with undecayed alone (p {_p(p)}; asked on 2026-11-28)"
    verdict = "open" if p >= _P else "supported" if fewer > more else "contradicted"
    return Verdict("R16", question, found, verdict)


def _devices(study: Recalls | None) -> Verdict:
    """Compare devices: replicates 0 to 9 ran on CPUs, most stages of 10 to 29 on a GPU."""
    question = "Do the replicates trained on CPUs (0 to 9) differ from those trained on a GPU (10 to 29)?"
    alphas = _alphas(study, ["magnitude"])
    if alphas is None or study is None or len(alphas) < 20:
        return _not_run("R17", question)
    replicates = np.array(study.complete(["magnitude"]))
    cpu, gpu = replicates < 10, replicates >= 10
    ratios = [ratio for ratio in _PRUNED if ratio <= 20]
    tests = {r: independent_test(alphas["magnitude", r][gpu], alphas["magnitude", r][cpu]) for r in ratios}
    p = {ratio: min(1.0, len(tests) * test.p_value) for ratio, test in tests.items()}
    found = "; ".join(f"t = {r:g}: {tests[r].difference:+.3f} (p {_p(p[r])})" for r in ratios)
    least = max(_detectable(alphas["magnitude", r][gpu], alphas["magnitude", r][cpu], len(tests)) for r in ratios)
    found += f"; {gpu.sum()} and {cpu.sum()} networks; smallest effect found with a chance of 80%: at most {least:.2f}"
    return Verdict("R17", question, f"{found} (asked on 2026-11-28)", "supported" if min(p.values()) < _P else "open")


def _channels(main: Recalls | None, channels: Recalls) -> Verdict:
    question = "Does removing channels distort recalls more than removing weights, at equal accuracy?"
    if main is None:
        return _not_run("R15", question)
    replicates = sorted({*main.complete(["magnitude"])} & {*channels.complete(["magnitude"])})
    parts = []
    for score, study, most in (("magnitude", main, 20), ("channels", channels, np.inf)):
        table = study.audit(["magnitude"], replicates).alphas
        parts.append(study.working(table[(table["ratio"] > 1) & (table["ratio"] <= most)]).assign(score=score))
    table = pd.concat(parts)
    positive = table[table["alpha"] > 0]  # the others have no logarithm
    result = jprune.recall.compare_at_equal_accuracy(positive, "magnitude", "channels")
    if not np.isfinite(result.low):
        return Verdict("R15", question, result.reason, "open")
    found = f"log alpha at equal alpha_null: {_change(result)}, {result.models} networks"
    found += f", {len(table) - len(positive)} alphas below 0 left out" if len(positive) < len(table) else ""
    small = max(abs(result.low), abs(result.high)) <= 0.05
    return Verdict("R15", question, found, "no larger than 5%" if small else "yes" if result.low > 0 else "open")


def _published_counts(studies: Mapping[str, Recalls]) -> Verdict:
    question = "Do LeNets that keep 350 weights, as the published code counts, collapse?"
    found, verdicts = [], []
    for name, words in PUBLISHED_COUNTS.items():
        study = studies.get(name)
        if study is None or _PRUNED[-1] not in study.ratios("magnitude"):
            continue
        replicates = study.complete(["magnitude"])
        if len(replicates) < 2:
            continue
        collapsed = int(study.collapsed("magnitude", _PRUNED[-1], replicates).sum())
        low, high = wilson(collapsed, len(replicates))
        found.append(f"{words}: {collapsed} of {len(replicates)} [{low:.2f}, {high:.2f}]")
        verdicts.append("no" if high < 0.15 else "yes" if low > 0.15 else "open")
    if not found:
        return _not_run("R10", question)
    return Verdict("R10", question, "; ".join(found), verdicts[0] if len(set(verdicts)) == 1 else "open")


def _quartiles(studies: Mapping[str, Recalls], published: pd.DataFrame) -> Verdict:
    question = "Which setting, the paper's or the script's, matches the published quartiles of alpha?"
    found = []
    for name, words in PUBLISHED_COUNTS.items():
        study = studies.get(name)
        alphas = _alphas(study, ["magnitude"])
        if study is None or alphas is None:
            continue
        dataset = "fashion_mnist" if name.startswith("fashion") else "mnist"
        rows = published[(published["dataset"] == dataset) & (published["score"] == "magnitude")].set_index("ratio")
        matches = []
        for nominal in _PRUNED:
            values, row = alphas["magnitude", nominal], rows.loc[nominal]
            below = int((values < row["median"]).sum())
            p = min(1.0, len(_PRUNED) * float(stats.binomtest(below, len(values)).pvalue))
            if row["q1"] <= values.median() <= row["q3"] and p >= _P:
                matches.append(f"{nominal:g}")
        found.append(f"{words}: {len(matches)} of 5 (t = {', '.join(matches) or 'none'}; {len(alphas)} networks)")
    if not found:
        return _not_run("R11", question)
    return Verdict("R11", question, "; ".join(found), "see the counts")


def _seed_null(studies: Mapping[str, Recalls]) -> Verdict:
    question = "Does pruning at t = 2 and 4 lower alpha below the seed null?"
    found = []
    for name, words in REFERENCES.items():
        study = studies.get(name)
        if study is None or _alphas(study, ["magnitude"]) is None:
            continue
        replicates = study.complete(["magnitude"])
        if len(replicates) < 3:
            continue
        dense = study.correct(DENSE, 1.0, replicates)
        null = references.seed_null(dense, study.support)
        parts, answers = [], set()
        for ratio in (2.0, 4.0):
            pruned = study.correct("magnitude", ratio, replicates)
            change = references.above_seed_null(dense, pruned, study.support)
            parts.append(f"t = {ratio:g}: {change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]")
            within = max(abs(change.low), abs(change.high)) <= 0.05
            answers.add("lower" if change.high < 0 else "no larger than .05" if within else "open")
        answer = answers.pop() if len(answers) == 1 else "lower at one of the two"
        found.append(
            f"{words}: seed null {null.value:.3f} [{null.low:.3f}, {null.high:.3f}]; {', '.join(parts)}: **{answer}**"
        )
    if not found:
        return _not_run("R12", question)
    return Verdict("R12", question, "; ".join(found), "differs by data set")


def of_moons(
    cells: pd.DataFrame | None,
    layers: pd.DataFrame | None,
    published: pd.DataFrame,
    more_seeds: pd.DataFrame | None = None,
) -> list[Verdict]:
    """Return verdicts J1 to J3."""
    return [_more_train(cells), _agree(cells, published, more_seeds), _form(layers, published)]


def of_tables(cells: pd.DataFrame | None) -> Verdict:
    """Verdict J4."""
    question = "Does jumpstart win over the baseline on dense 50 x 4 networks?"
    if cells is None:
        return _not_run("J4", question)
    score = cells.pivot_table(index=["dataset", "replicate"], columns="method", values="val_acc")
    margin = (score["jumpstart"] - score["baseline"]).dropna()  # networks that both have
    wins, losses = int((margin > 0).sum()), int((margin < 0).sum())
    by_dataset = margin.groupby("dataset").mean()
    won, lost = int((by_dataset > 0).sum()), int((by_dataset < 0).sum())
    p = _sign_test(won, lost)
    found = f"{wins} wins, {len(margin) - wins - losses} draws, {losses} losses over data sets and seeds; "
    found += f"the unit is the data set: {won} of {won + lost} won (p {_p(p)})"
    if "skip" in score:
        skip = (score["jumpstart"] - score["skip"]).groupby("dataset").mean()
        better = ", ".join(f"{name} by {100 * -value:.0f} points" for name, value in skip[skip < 0].items())
        found += f"; skip connections beat jumpstart on {better}" if better else ""
    decided = "supported" if won > lost else "contradicted"
    return Verdict("J4", question, found, decided if p < 0.05 else "open")


def of_pruned(tables: Sequence[pd.DataFrame]) -> Verdict:
    """Return verdict J5.

    Args:
      tables: tables ``pruned`` of the grids that have run, a row per network and ratio.
    """
    question = "Can thin, deep networks that were trained with jumpstart be pruned further?"
    if not tables:
        return _not_run("J5", question)
    largest = report.largest_ratio(pd.concat(tables)).unstack("method")
    found, answers = [], {}
    for other in ("relu-bn", "relu"):
        pairs = largest.reindex(columns=["UP", other]).dropna()  # both trained to .9 before pruning
        further, less = (int(count.sum()) for count in (pairs["UP"] > pairs[other], pairs["UP"] < pairs[other]))
        p = min(1.0, 2 * _sign_test(further, less))
        words = f"UP against {other}: further in {further}, less far in {less} of {len(pairs)} pairs (p {_p(p)})"
        if len(pairs):
            words += f", median of the largest t {pairs['UP'].median():g} and {pairs[other].median():g}"
        found.append(words)
        decided = len(pairs) >= 10 and p < 0.05
        answers[other] = ("supported" if further > less else "contradicted") if decided else "open"
    datasets = ", ".join(largest.index.unique("dataset"))
    verdict = (
        answers["relu"]
        if len(set(answers.values())) == 1
        else ", ".join(f"{answer} against {other}" for other, answer in answers.items())
    )
    return Verdict("J5", question, f"{'; '.join(found)}; {datasets}", verdict)


def _more_train(cells: pd.DataFrame | None) -> Verdict:
    question = "Does UP train more cells of the moons grid than relu (training accuracy >= .9)?"
    if cells is None:
        return _not_run("J1", question)
    trained = cells[cells["replicate"] == 0].pivot_table(index=["width", "depth"], columns="method", values="train_acc")
    up, relu = (trained[method] >= 0.9 for method in ("UP", "relu"))
    both = trained[["UP", "relu"]].notna().all(axis=1)
    gained, lost = int((up & ~relu & both).sum()), int((relu & ~up & both).sum())
    p = _sign_test(gained, lost)
    found = f"{up[both].sum()} and {relu[both].sum()} of {both.sum()}; {gained} with UP alone, {lost} with relu alone"
    verdict = "open" if p >= _P else "supported" if gained > lost else "contradicted"
    return Verdict("J1", question, f"{found} (p {_p(p)})", verdict)


def _agree(cells: pd.DataFrame | None, published: pd.DataFrame, more_seeds: pd.DataFrame | None) -> Verdict:
    question = "Is our share of trained moons cells equivalent to the published one, per method?"
    if cells is None:
        return _not_run("J2", question)
    both = cells[cells["replicate"] == 0].merge(published, on=["method", "width", "depth"], suffixes=("", "_published"))
    found, widest = [], 0.0
    for method, rows in both.groupby("method", sort=False):
        ours, theirs = (rows[column] >= 0.9 for column in ("train_acc", "train_acc_published"))
        low, high = paired_shares(int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(rows))
        widest = max(widest, abs(low), abs(high))
        agreement = f"kappa {_kappa(ours, theirs):.2f}"
        found.append(
            f"{method} {ours.sum()} / {theirs.sum()} of {len(rows)} [{100 * low:+.0f}, {100 * high:+.0f}], {agreement}"
        )
    words = f"ours / published, 90% interval of the difference in points: {'; '.join(found)}"
    if more_seeds is not None:
        words += f". Two of our own seeds disagree in {_own_disagreement(more_seeds)} of the cells"
    words += ". The test planned first, Fisher's exact, found no difference; equivalence since 2026-11-28"
    return Verdict("J2", question, words, "equivalent within 15 points" if widest <= 0.15 else "open")


def _own_disagreement(cells: pd.DataFrame) -> str:
    """Describe how often two seeds disagree about a cell, and their kappa, by method: means over all pairs of seeds."""
    found = []
    for method, rows in cells.assign(trained=cells["train_acc"] >= 0.9).groupby("method", sort=False):
        table = rows.pivot_table(index=["width", "depth"], columns="replicate", values="trained", aggfunc="first")
        table = table.dropna().astype(bool)
        pairs = [(table[a], table[b]) for a, b in itertools.combinations(table.columns, 2)]
        if pairs:
            share, kappa = np.mean([(a != b).mean() for a, b in pairs]), np.mean([_kappa(a, b) for a, b in pairs])
            found.append(f"{100 * share:.0f}% ({method}, kappa {kappa:.2f})")
    return ", ".join(found)


def _kappa(a: pd.Series, b: pd.Series) -> float:
    """Return Cohen's kappa of two boolean series; NaN if both are constant and equal."""
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float(((a == b).mean() - chance) / (1 - chance)) if chance < 1 else float("nan")


def paired_shares(only_a: int, only_b: int, pairs: int, confidence: float = 0.9) -> tuple[float, float]:
    """Return the interval of a difference of paired shares (Bonett and Price 2012, adjusted Wald).

    Args:
      only_a: number of pairs in which only the first is true.
      only_b: number of pairs in which only the second is true.
      pairs: number of pairs.
      confidence: .9 gives the two one-sided tests at 5%.

    >>> low, high = paired_shares(12, 20, 117)
    >>> round(low, 3), round(high, 3)
    (-0.147, 0.013)
    """
    a, b = (only_a + 1) / (pairs + 2), (only_b + 1) / (pairs + 2)
    margin = stats.norm.ppf((1 + confidence) / 2) * np.sqrt((a + b - (a - b) ** 2) / (pairs + 2))
    return float(a - b - margin), float(a - b + margin)


def wilson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return Wilson's interval of a share.

    >>> low, high = wilson(0, 30)
    >>> round(low, 3), round(high, 3)
    (0.0, 0.114)
    """
    interval = stats.binomtest(hits, trials).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def _form(layers: pd.DataFrame | None, published: pd.DataFrame) -> Verdict:
    question = "Does the convolution form, not the dense one, match the published cells?"
    if layers is None:
        return _not_run("J3", question)
    both = layers.merge(published, on=["method", "width", "depth"], suffixes=("", "_published"))
    agrees = (both["train_acc"] >= 0.9) == (both["train_acc_published"] >= 0.9)
    table = both.assign(agrees=agrees).pivot_table(
        index=["method", "width", "depth", "replicate"], columns="layer", values="agrees", aggfunc="first"
    )
    table = table.dropna()  # networks of both forms
    conv, dense = (table[form].astype(bool) for form in ("conv", "dense"))
    p = _sign_test(int((conv & ~dense).sum()), int((dense & ~conv).sum()))
    found = f"conv agrees in {conv.sum()}, dense in {dense.sum()} of {len(table)} networks (p {_p(p)})"
    verdict = "open" if p >= 0.05 else "supported" if conv.sum() > dense.sum() else "contradicted"
    return Verdict("J3", question, found, verdict)


def _sign_test(wins: int, losses: int) -> float:
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def _detectable(a: pd.Series, b: pd.Series | None = None, tests: int = 1) -> float:
    """Return the smallest true difference that a two-sided t test at 1% detects with a power of 80%.

    Args:
      a: differences of pairs; or one of two independent samples.
      b: the other sample.
      tests: Bonferroni's divisor.
    """
    if b is None:
        df, error = len(a) - 1, a.std(ddof=1) / np.sqrt(len(a))
    else:
        df, error = len(a) + len(b) - 2, np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return float((stats.t.isf(_P / tests / 2, df) + stats.t.isf(0.2, df)) * error)


def _not_run(name: str, question: str) -> Verdict:
    return Verdict(name, question, "", "not run")


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3f}"


def _interval(interval: jprune.recall.Interval) -> str:
    return f"{float(interval.mean):+.3f} [{float(interval.low):+.3f}, {float(interval.high):+.3f}]"


def _spread(interval: jprune.recall.Interval) -> str:
    return f"{float(interval.mean):.2f} [{float(interval.low):.2f}, {float(interval.high):.2f}]"


def _p(value: float) -> str:
    return f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"
