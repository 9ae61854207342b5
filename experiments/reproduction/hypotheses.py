"""The planned questions on recall distortion, each with its test and its verdict (see ``verdicts``)."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

import jprune
from experiments.reproduction import references
from experiments.reproduction.ledger import DENSE, Recalls
from experiments.reproduction.verdicts import (
    LEVEL,
    Verdict,
    detectable,
    detectable_from,
    least_split,
    not_run,
    shown_p,
    sign_test,
    smallest,
    wilson,
)
from jprune.recall import independent_test, paired_test, t_interval

PUBLISHED_COUNTS = {
    "fashion-published-paper": "Fashion-MNIST, paper's setting",
    "fashion-published-script": "Fashion-MNIST, script's setting",
    "mnist-published-paper": "MNIST, paper's setting",
    "mnist-published-script": "MNIST, script's setting",
}
CIFAR = "cifar10-resnet20-short"
ENOUGH_ON_CIFAR = 3  # networks that an answer on CIFAR-10 needs
ELSEWHERE = "does not carry over"  # a verdict
REFERENCES = {
    "fashion-lenet": "Fashion-MNIST, LeNet",
    "mnist-lenet": "MNIST, LeNet",
    CIFAR: "CIFAR-10, ResNet-20",
    "cifar10-published": "CIFAR-10, ResNet-56, published networks",
}
SAME_DENSE = "fashion-published-paper"  # its dense networks are those of the rounding and channel arms
_PRUNED = (2.0, 4.0, 10.0, 20.0, 50.0)
_MOST_COLLAPSED = 0.15  # margin of R10


def of_recalls(studies: Mapping[str, Recalls], published: pd.DataFrame) -> list[Verdict]:
    """Return the verdicts on recall distortion.

    Args:
      studies: from the name of the committed table to its study, for those that have run.
      published: quartiles of the published alphas, a row per data set, score and ratio.
    """
    main = studies.get("fashion-lenet")
    return [
        _planned_margin(_control(main)),
        _rising(main),
        undecayed(main),
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
        collapse(main),
        _devices(main),
        *([_channels(main, studies)] if "fashion-channels" in studies else []),
        *(_on_cifar(studies[CIFAR]) if CIFAR in studies else []),
    ]


def _on_cifar(study: Recalls) -> list[Verdict]:
    """Answer R1 to R4 and R6 on CIFAR-10, the data set of the published comparison."""
    found = [_control(study), _rising(study), undecayed(study), _equal_accuracy(study), _random(study)]
    networks = len(study.complete(["magnitude"]))
    few = f"; an answer needs {ENOUGH_ON_CIFAR} networks" if networks < ENOUGH_ON_CIFAR else ""
    accuracy = f"; dense accuracy {dense_accuracy(study):.3f}" if networks else ""

    def on_cifar(verdict: Verdict) -> Verdict:
        named = verdict._replace(name=f"{verdict.name}, CIFAR-10", question=f"{verdict.question} (ResNet-20)")
        if verdict.verdict == "not run":
            return named
        answer = "contradicted" if verdict.verdict == ELSEWHERE else verdict.verdict  # a claim about these networks
        return named._replace(found=f"{verdict.found}{accuracy}{few}", verdict="open" if few else answer)

    return [on_cifar(each) for each in found]


def dense_accuracy(study: Recalls) -> float:
    """Return the mean test accuracy of the dense networks that were pruned by magnitude at every ratio."""
    correct = study.correct(DENSE, 1.0, study.complete(["magnitude"]))
    return float(correct.sum(1).mean() / study.support.sum())


def alphas_by_ratio(study: Recalls | None, scores: Sequence[str]) -> pd.DataFrame | None:
    """Return alpha by model (rows) and (score, ratio); None if fewer than two networks have every ratio."""
    if study is None or not all(set(_PRUNED) <= set(study.ratios(score)) for score in scores):
        return None
    replicates = study.complete(scores)
    if len(replicates) < 2:
        return None
    audit = study.audit(scores, replicates)
    return audit.alphas.pivot_table(index="model", columns=["score", "ratio"], values="alpha")


def _control(study: Recalls | None) -> Verdict:
    question = "Is alpha below 1 at t = 2 because of pruning?"
    alphas = alphas_by_ratio(study, ["magnitude"])
    if alphas is None:
        return not_run("R1", question)
    difference = alphas["magnitude", 2.0] - alphas["magnitude", 1.0]
    change = t_interval(difference)
    found = (
        f"control {_mean(alphas['magnitude', 1.0])}, t = 2 {_mean(alphas['magnitude', 2.0])}; difference "
        f"{_interval(change)}, {len(alphas)} networks"
    )
    verdict = "supported" if change.high < 0 else "contradicted" if change.low > 0 else "open"
    if verdict == "open":
        found += f"; {smallest(detectable(difference))}"
    return Verdict("R1", question, found, verdict)


def _planned_margin(verdict: Verdict) -> Verdict:
    """Add why an open R1 is not called contradicted."""
    if verdict.verdict != "open":
        return verdict
    margin = ". The margin of .05 that was planned for 'contradicted' exceeds the effect and is not used (2026-11-28)"
    return verdict._replace(found=verdict.found + margin)


def _rising(study: Recalls | None) -> Verdict:
    question = "Does alpha rise with t?"
    alphas = alphas_by_ratio(study, ["magnitude"])
    if alphas is None or study is None:
        return not_run("R2", question)
    steps = [
        paired_test(alphas["magnitude", b], alphas["magnitude", a], "greater") for a, b in itertools.pairwise(_PRUNED)
    ]
    p = [min(1.0, len(steps) * step.p_value) for step in steps]
    means = ", ".join(f"{alphas['magnitude', ratio].mean():.2f}" for ratio in _PRUNED)
    named = ", ".join(f"{ratio:g}" for ratio in _PRUNED)
    found = f"mean alpha {means} at t = {named}; p {', '.join(map(shown_p, p))}, {len(alphas)} networks"
    found += _collapsed_words(study, ["magnitude"])
    falling = any(len(steps) * (1 - step.p_value) < LEVEL for step in steps)
    verdict = "supported" if max(p) < LEVEL else "contradicted" if falling else "open"
    if verdict == "open":
        gaps = [alphas["magnitude", b] - alphas["magnitude", a] for a, b in itertools.pairwise(_PRUNED)]
        least = [detectable(gap, tests=len(steps), sides=1) for gap in gaps]
        found += f"; {smallest(*least)} (steps in this order)"
    return Verdict("R2", question, found, verdict)


def _collapsed_words(study: Recalls, scores: Sequence[str]) -> str:
    """Say how many networks collapsed, by score and ratio; their alphas are part of the planned tests."""
    replicates = study.complete(scores)
    counts = [(score, r, int(study.collapsed(score, r, replicates).sum())) for score in scores for r in _PRUNED]
    found = ", ".join(f"{count} ({score}, t = {r:g})" for score, r, count in counts if count)
    return f"; with collapsed networks, as planned: {found}" if found else ""


def undecayed(study: Recalls | None) -> Verdict:
    """Return verdict R3."""
    question = "Does undecayed have a lower alpha than magnitude at equal achieved ratio?"
    scores = ["magnitude", "undecayed"]
    alphas = alphas_by_ratio(study, scores)
    if alphas is None or study is None:
        return not_run("R3", question)
    tests = {r: paired_test(alphas["undecayed", r], alphas["magnitude", r]) for r in _PRUNED}
    p = {ratio: min(1.0, len(tests) * test.p_value) for ratio, test in tests.items()}
    change = {ratio: (alphas["undecayed", ratio] - alphas["magnitude", ratio]).mean() for ratio in tests}
    found = "; ".join(f"t = {r:g}: {change[r]:+.3f} (p {shown_p(p[r])})" for r in tests) + f"; {len(alphas)} networks"
    found += _collapsed_words(study, scores)
    lower = any(p[r] < LEVEL and change[r] < 0 for r in tests)
    higher = any(p[r] < LEVEL and change[r] > 0 for r in tests)
    verdict = ELSEWHERE if higher else "supported" if lower else "open"
    if verdict == "open":
        gaps = [alphas["undecayed", r] - alphas["magnitude", r] for r in tests]
        found += f"; {smallest(*(detectable(gap, tests=len(tests)) for gap in gaps))}"
    return Verdict("R3", question, found, verdict)


def _equal_accuracy(study: Recalls | None) -> Verdict:
    question = "Does undecayed have a lower alpha than magnitude at equal accuracy?"
    scores = ["magnitude", "undecayed"]
    if alphas_by_ratio(study, scores) is None or study is None:
        return not_run("R4", question)
    table = study.audit(scores, study.complete(scores)).alphas
    table = table[table["ratio"] != 1]
    working = study.working(table)
    positive = working[working["alpha"] > 0]  # the others have no logarithm
    result = jprune.recall.compare_at_equal_accuracy(positive, *scores)
    if not np.isfinite(result.low):
        return Verdict("R4", question, result.reason, "open")
    found = f"log alpha at equal alpha_null: {_change(result)}, {result.models} networks"
    verdict = "supported" if result.high < 0 else ELSEWHERE if result.low > 0 else "open"
    found += f"; {len(table) - len(working)} of {len(table)} alphas, of collapsed networks, left out (2026-11-26)"
    found += f", and {len(working) - len(positive)} below 0" if len(positive) < len(working) else ""
    found += f"; {smallest(detectable_change(result))}" if verdict == "open" else ""
    low = positive[positive["ratio"] <= 20]
    if len(low) < len(positive):
        few = jprune.recall.compare_at_equal_accuracy(low, *scores)
        if np.isfinite(few.low):
            bound = 100 * np.expm1(max(abs(few.low), abs(few.high)))
            found += f"; t <= 20 alone (2026-11-28): {_change(few)}, equivalent within {bound:.1f}%"
    return Verdict("R4", question, found, verdict)


def detectable_change(result: jprune.recall.EqualAccuracy, level: float = 0.99) -> float:
    """Return the smallest difference at equal accuracy that is detected with a power of 80%, from its interval."""
    return detectable_from(result.low, result.high, result.models, level)


def _change(result: jprune.recall.EqualAccuracy) -> str:
    return f"{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]"


def _signed(study: Recalls | None) -> Verdict:
    question = "Does the signed-quantile variant keep more weights than asked?"
    if study is None or not study.ratios("undecayed-signed"):
        return not_run("R5", question)
    rows = study.networks[study.networks["score"] == "undecayed-signed"]
    achieved = rows["parameters"] / (rows["parameters"] - rows["prunable"] + rows["nonzero"])
    by_ratio = achieved.groupby(rows["ratio"]).mean()
    found = ", ".join(f"asked {ratio:g}, achieved {value:.2f}" for ratio, value in by_ratio.items())
    fewer = (by_ratio < 0.95 * by_ratio.index).to_numpy()
    verdict = "supported" if fewer.all() else "open" if fewer.any() else "contradicted"
    return Verdict("R5", question, f"{found}; {rows['replicate'].nunique()} networks", verdict)


def _random(study: Recalls | None) -> Verdict:
    question = "Does random pruning of healthy networks intensify from t = 4?"
    alphas = alphas_by_ratio(study, ["random"])
    if alphas is None or study is None:
        return not_run("R6", question)
    intervals = {ratio: t_interval(alphas["random", ratio]) for ratio in _PRUNED if ratio >= 4}
    found = "; ".join(f"t = {r:g}: {_spread(i)}" for r, i in intervals.items())
    above = all(interval.low > 1 for interval in intervals.values())
    below = intervals[4.0].high < 1
    verdict = "supported" if above else "contradicted" if below else "open"
    least = smallest(*(detectable(alphas["random", ratio]) for ratio in intervals), digits=2)
    table = study.audit(["random"], study.complete(["random"])).alphas
    working = study.working(table).groupby("ratio")["alpha"]
    few = {r: alpha for r, alpha in working if r in intervals and 2 <= len(alpha) < len(alphas)}
    rest = "; ".join(f"t = {r:g}: {_spread(t_interval(alpha))}, {len(alpha)} networks" for r, alpha in few.items())
    apart = f"; without collapsed networks (2026-11-26, not judged): {rest}" if few else ""
    found += f"; {len(alphas)} networks" + (f"; {least}" if verdict == "open" else "") + apart
    return Verdict("R6", question, found, verdict)


def _other(name: str, question: str, main: Recalls | None, variant: Recalls | None) -> Verdict:
    """Test whether alpha differs between two studies: Welch's t per ratio, Bonferroni over the ratios."""
    ours, theirs = alphas_by_ratio(main, ["magnitude"]), alphas_by_ratio(variant, ["magnitude"])
    if ours is None or theirs is None:
        return not_run(name, question)
    tests = {r: independent_test(theirs["magnitude", r], ours["magnitude", r]) for r in _PRUNED}
    p = {ratio: min(1.0, len(tests) * test.p_value) for ratio, test in tests.items()}
    change = {r: theirs["magnitude", r].mean() - ours["magnitude", r].mean() for r in tests}
    found = "; ".join(f"t = {r:g}: {change[r]:+.3f} (p {shown_p(p[r])})" for r in tests)
    found += f"; {len(theirs)} and {len(ours)} networks"
    if min(p.values()) < LEVEL:
        return Verdict(name, question, found, "supported")
    least = {r: detectable(theirs["magnitude", r], ours["magnitude", r], len(tests)) for r in _PRUNED}
    found += f"; {smallest(*least.values(), digits=2)}"
    return Verdict(name, question, found, "open")


def _units(main: Recalls | None, variant: Recalls | None) -> Verdict:
    question = "Does it change the share of dead units, or accuracy, after pruning at t = 50?"
    if alphas_by_ratio(main, ["magnitude"]) is None or alphas_by_ratio(variant, ["magnitude"]) is None:
        return not_run("R8", question)
    found, least, effects = [], 1.0, []
    for column, words in (("dead_units", "dead units"), ("accuracy", "accuracy")):
        without, with_penalty = (_values(study, column, 50.0) for study in (main, variant) if study is not None)
        if min(len(without), len(with_penalty)) < 2:
            found.append(f"{words}: too few networks")
            continue
        p = min(1.0, 2 * independent_test(with_penalty, without).p_value)
        least = min(least, p)
        effects.append(detectable(pd.Series(with_penalty), pd.Series(without), 2))
        found.append(f"{words} {without.mean():.3f} without, {with_penalty.mean():.3f} with it (p {shown_p(p)})")
    if effects and least >= LEVEL:
        found.append(smallest(*effects))
    lower = []
    for ratio in (4.0, 10.0, 20.0):
        without, with_penalty = (_values(study, "dead_units", ratio) for study in (main, variant) if study is not None)
        if min(len(without), len(with_penalty)) >= 2:
            lower.append(f"t = {ratio:g}: {without.mean():.3f} without, {with_penalty.mean():.4f} with it")
            counts = f"{len(without)} and {len(with_penalty)} networks whose units were counted"
    if lower:
        found.append(f"dead units at lower ratios (2026-11-28, not judged): {', '.join(lower)} ({counts})")
    return Verdict("R8", question, "; ".join(found), "supported" if least < LEVEL else "open")


def _values(study: Recalls, column: str, ratio: float) -> np.ndarray:
    replicates = study.complete(["magnitude"])
    if column == "accuracy":
        return study.correct("magnitude", ratio, replicates).sum(1) / study.support.sum()
    values = study.column(column, "magnitude", ratio, replicates)
    return values[np.isfinite(values)]


def collapse(study: Recalls | None) -> Verdict:
    """Return verdict R16."""
    question = "Do fewer networks collapse after undecayed than after magnitude pruning to 125 weights?"
    scores = ["magnitude", "undecayed"]
    if study is None or alphas_by_ratio(study, scores) is None:
        return not_run("R16", question)
    replicates = study.complete(scores)
    magnitude, undecayed = (study.collapsed(score, 50.0, replicates) for score in scores)
    fewer, more = int((magnitude & ~undecayed).sum()), int((undecayed & ~magnitude).sum())
    p = sign_test(fewer, more)
    found = f"{undecayed.sum()} and {magnitude.sum()} of {len(replicates)} collapsed; "
    found += f"{fewer} with magnitude alone, {more} with undecayed alone (p {shown_p(p)}; asked on 2026-11-28)"
    verdict = "open" if p >= LEVEL else "supported" if fewer > more else "contradicted"
    found += f"; {least_split(fewer + more, LEVEL)}" if verdict == "open" else ""
    return Verdict("R16", question, found, verdict)


def _devices(study: Recalls | None) -> Verdict:
    """Compare devices: replicates 0 to 9 ran on CPUs, most stages of 10 to 29 on a GPU."""
    question = "Do the replicates trained on CPUs (0 to 9) differ from those trained on a GPU (10 to 29)?"
    alphas = alphas_by_ratio(study, ["magnitude"])
    if alphas is None or study is None or len(alphas) < 20:
        return not_run("R17", question)
    replicates = np.array(study.complete(["magnitude"]))
    cpu, gpu = replicates < 10, replicates >= 10
    ratios = [ratio for ratio in _PRUNED if ratio <= 20]
    tests = {r: independent_test(alphas["magnitude", r][gpu], alphas["magnitude", r][cpu]) for r in ratios}
    p = {ratio: min(1.0, len(tests) * test.p_value) for ratio, test in tests.items()}
    found = "; ".join(f"t = {r:g}: {tests[r].difference:+.3f} (p {shown_p(p[r])})" for r in ratios)
    found = f"mean alpha on the GPU minus on CPUs: {found}"
    least = max(detectable(alphas["magnitude", r][gpu], alphas["magnitude", r][cpu], len(tests)) for r in ratios)
    found += f"; {gpu.sum()} and {cpu.sum()} networks; smallest effect found with a chance of 80%: at most {least:.2f}"
    return Verdict(
        "R17", question, f"{found} (asked on 2026-11-28)", "supported" if min(p.values()) < LEVEL else "open"
    )


def _channels(main: Recalls | None, studies: Mapping[str, Recalls]) -> Verdict:
    question = "Does removing channels distort recalls more than removing weights, at equal accuracy?"
    channels = studies["fashion-channels"]
    if main is None:
        return not_run("R15", question)
    weights = studies.get(SAME_DENSE, main)
    result, below = channels_against(weights, channels)
    if not np.isfinite(result.low):
        return Verdict("R15", question, result.reason, "open")
    found = f"log alpha at equal alpha_null: {_change(result)}, {result.models} networks"
    found += f", {below} alphas below 0 left out" if below else ""
    if weights is not main:
        first, _ = channels_against(main, channels)
        found += (
            f"; weights removed from the same dense networks, at the published counts, since 2026-11-29; before, from "
            f"those of the first round, of which 20 are others: {_change(first)}"
        )
    verdict = channels_answer(result)
    found += f"; {smallest(detectable_change(result))}" if verdict == "open" else ""
    return Verdict("R15", question, found, verdict)


def channels_answer(result: jprune.recall.EqualAccuracy) -> str:
    """Return the answer to R15 by the planned rule."""
    small = max(abs(result.low), abs(result.high)) <= 0.05
    return "yes" if result.low > 0 else "no larger than 5%" if small else "open"


def channels_against(weights: Recalls, channels: Recalls) -> tuple[jprune.recall.EqualAccuracy, int]:
    """Compare removing channels with removing weights, t = 2 to 20; also count the alphas that are not positive."""
    replicates = sorted({*weights.complete(["magnitude"])} & {*channels.complete(["magnitude"])})
    parts = []
    for score, study, most in (("magnitude", weights, 20), ("channels", channels, np.inf)):
        table = study.audit(["magnitude"], replicates).alphas
        parts.append(study.working(table[(table["ratio"] > 1) & (table["ratio"] <= most)]).assign(score=score))
    table = pd.concat(parts)
    positive = table[table["alpha"] > 0]  # the others have no logarithm
    return jprune.recall.compare_at_equal_accuracy(positive, "magnitude", "channels"), len(table) - len(positive)


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
        verdicts.append(_collapse_answer(collapsed, len(replicates)))
        needed = f" ({_counts_needed(len(replicates))})" if verdicts[-1] == "open" else ""
        found.append(f"{words}: {collapsed} of {len(replicates)} [{low:.2f}, {high:.2f}]: **{verdicts[-1]}**{needed}")
    if not found:
        return not_run("R10", question)
    counts = {answer: verdicts.count(answer) for answer in ("no", "yes", "open") if answer in verdicts}
    by_arm = ", ".join(f"{answer} in {count}" for answer, count in counts.items()) + f" of {len(verdicts)} arms"
    return Verdict("R10", question, "; ".join(found), verdicts[0] if len(counts) == 1 else by_arm)


def _collapse_answer(collapsed: int, networks: int) -> str:
    low, high = wilson(collapsed, networks)
    return "no" if high < _MOST_COLLAPSED else "yes" if low > _MOST_COLLAPSED else "open"


def _counts_needed(networks: int) -> str:
    """Say which numbers of collapsed networks would have answered R10.

    >>> _counts_needed(10), _counts_needed(30)
    ('yes needs 4 of 10; no needs 22 networks or more', 'yes needs 9 of 30; no needs at most 0')
    """
    answers = [_collapse_answer(collapsed, networks) for collapsed in range(networks + 1)]
    yes = f"yes needs {answers.index('yes')} of {networks}" if "yes" in answers else "yes needs more networks"
    if "no" in answers:
        return f"{yes}; no needs at most {answers.count('no') - 1}"
    enough = next(more for more in itertools.count(networks) if _collapse_answer(0, more) == "no")
    return f"{yes}; no needs {enough} networks or more"


def _quartiles(studies: Mapping[str, Recalls], published: pd.DataFrame) -> Verdict:
    question = "Which setting, the paper's or the script's, matches the published quartiles of alpha?"
    found, counts = [], {}
    for name, words in PUBLISHED_COUNTS.items():
        matches = matching_ratios(name, studies.get(name), published)
        if matches is None:
            continue
        ratios, least, networks = matches
        listed = ", ".join(f"{ratio:g}" for ratio in ratios) or "none"
        found.append(f"{words}: {len(ratios)} of 5 (t = {listed}; smallest p {least:.2g}; {networks} networks)")
        counts.setdefault(words.split(",")[0], {})[name.rpartition("-")[2]] = len(ratios)
    if not found:
        return not_run("R11", question)
    return Verdict("R11", question, "; ".join(found), "; ".join(_matches(*each) for each in counts.items()))


def matching_ratios(name: str, study: Recalls | None, published: pd.DataFrame) -> tuple[list[float], float, int] | None:
    """Return the ratios at which an arm of R11 matches the published quartiles.

    Args:
      name: name of the arm in ``PUBLISHED_COUNTS``.
      study: the arm, or None if it has not run.
      published: quartiles of the published alphas, a row per data set, score and ratio.

    Returns:
      the ratios, the smallest p of the five tests after Bonferroni's correction, and the number of networks; None if
      fewer than two networks have every ratio.
    """
    alphas = alphas_by_ratio(study, ["magnitude"])
    if alphas is None:
        return None
    dataset = "fashion_mnist" if name.startswith("fashion") else "mnist"
    rows = published[(published["dataset"] == dataset) & (published["score"] == "magnitude")].set_index("ratio")
    matches, least = [], 1.0
    for nominal in _PRUNED:
        values, row = alphas["magnitude", nominal], rows.loc[nominal]
        below = int((values < row["median"]).sum())
        p = min(1.0, len(_PRUNED) * sign_test(below, len(values) - below))
        if row["q1"] <= values.median() <= row["q3"] and p >= LEVEL:
            matches.append(nominal)
        least = min(least, p)
    return matches, least, len(alphas)


def _matches(dataset: str, counts: Mapping[str, int]) -> str:
    """Say at how many of the five ratios each setting matches.

    >>> _matches("MNIST", {"paper": 5, "script": 3})
    "MNIST: paper's 5 of 5, script's 3 of 5"
    """
    return f"{dataset}: " + ", ".join(f"{setting}'s {count} of {len(_PRUNED)}" for setting, count in counts.items())


def _seed_null(studies: Mapping[str, Recalls]) -> Verdict:
    question = "Does pruning at t = 2 and 4 lower alpha below the seed null?"
    found, verdicts = [], []
    for name, words in REFERENCES.items():
        study = studies.get(name)
        if study is None or alphas_by_ratio(study, ["magnitude"]) is None:
            continue
        replicates = study.complete(["magnitude"])
        if len(replicates) < 3:
            continue
        dense = study.correct(DENSE, 1.0, replicates)
        null = references.seed_null(dense, study.support)
        parts, answers, changes = [], {}, []
        for ratio in (2.0, 4.0):
            pruned = study.correct("magnitude", ratio, replicates)
            change = references.above_seed_null(dense, pruned, study.support)
            changes.append(change)
            parts.append(f"t = {ratio:g}: {_estimate(change)}")
            answers[ratio] = _below_null(change)
        verdicts.append(
            answers[2.0]
            if len(set(answers.values())) == 1
            else ", ".join(f"{answer} at t = {ratio:g}" for ratio, answer in answers.items())
        )
        undecided = [change for change in changes if _below_null(change) == "open"]
        least = [detectable_from(change.low, change.high, len(replicates)) for change in undecided]
        found.append(
            f"{words}, {len(replicates)} networks: seed null {null.value:.3f} [{null.low:.3f}, {null.high:.3f}]; "
            f"{', '.join(parts)}: **{verdicts[-1]}**" + (f" ({smallest(*least)})" if least else "")
        )
    if not found:
        return not_run("R12", question)
    verdict = verdicts[0] if len(set(verdicts)) == 1 else "differs by data set"
    return Verdict("R12", question, "; ".join(found), verdict)


def _below_null(change: references.Estimate) -> str:
    within = max(abs(change.low), abs(change.high)) <= 0.05
    return "yes" if change.high < 0 else "no larger than .05" if within else "open"


def _estimate(estimate: references.Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def _mean(values: pd.Series) -> str:
    return f"{values.mean():.3f}"


def _interval(interval: jprune.recall.Interval) -> str:
    return f"{float(interval.mean):+.3f} [{float(interval.low):+.3f}, {float(interval.high):+.3f}]"


def _spread(interval: jprune.recall.Interval) -> str:
    return f"{float(interval.mean):.2f} [{float(interval.low):.2f}, {float(interval.high):.2f}]"
