"""The questions that were written down before the runs, each with its test and its verdict.

A verdict is ``supported``, ``contradicted`` (the interval or test excludes the claim), ``open`` (it does not
decide) or ``not run`` (fewer than two networks went through every ratio). Where fewer have run than were planned,
the verdict is that of those there are.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

import jprune
from experiments.reproduction.ledger import Recalls
from jprune.recall import independent_test, paired_test, t_interval

_PRUNED = (2.0, 4.0, 10.0, 20.0, 50.0)
_P = 0.01


class Verdict(NamedTuple):
    """The answer to one question.

    Attributes:
      name: of the hypothesis, such as R1.
      question: in words.
      found: what was measured, in words.
      verdict: one word.
    """

    name: str
    question: str
    found: str
    verdict: str


def of_recalls(studies: Mapping[str, Recalls]) -> list[Verdict]:
    """The verdicts R1 to R9, from the studies that there are: fashion-lenet and its variants."""
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
    ]


def _alphas(study: Recalls | None, scores: Sequence[str]) -> pd.DataFrame | None:
    """Alpha by model (rows) and (score, ratio); None where fewer than two networks went through every ratio."""
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
    change = t_interval(alphas["magnitude", 2.0] - alphas["magnitude", 1.0])
    found = (
        f"control {_mean(alphas['magnitude', 1.0])}, t = 2 {_mean(alphas['magnitude', 2.0])}; difference "
        f"{_interval(change)}, {len(alphas)} networks"
    )
    narrow = change.low >= -0.05 and change.high <= 0.05
    verdict = "supported" if change.high < 0 else "contradicted" if change.low > 0 or narrow else "open"
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
    question = "Has undecayed a lower alpha than magnitude at equal achieved ratio?"
    if alphas is None:
        return _not_run("R3", question)
    tests = {r: paired_test(alphas["undecayed", r], alphas["magnitude", r]) for r in _PRUNED}
    p = {ratio: min(1.0, len(tests) * test.p_value) for ratio, test in tests.items()}
    change = {ratio: (alphas["undecayed", ratio] - alphas["magnitude", ratio]).mean() for ratio in tests}
    found = "; ".join(f"t = {r:g}: {change[r]:+.3f} (p {_p(p[r])})" for r in tests) + f"; {len(alphas)} networks"
    lower = any(p[r] < _P and change[r] < 0 for r in tests)
    higher = any(p[r] < _P and change[r] > 0 for r in tests)
    return Verdict("R3", question, found, "contradicted" if higher else "supported" if lower else "open")


def _equal_accuracy(study: Recalls | None) -> Verdict:
    question = "And at equal accuracy?"
    scores = ["magnitude", "undecayed"]
    if _alphas(study, scores) is None or study is None:
        return _not_run("R4", question)
    table = study.audit(scores, study.complete(scores)).alphas
    table = table[table["ratio"] != 1]
    standing = study.standing(table)
    whole = standing[standing["alpha"] > 0]  # the others have no logarithm
    result = jprune.recall.compare_at_equal_accuracy(whole, *scores)
    if not np.isfinite(result.low):
        return Verdict("R4", question, result.reason, "open")
    found = f"log alpha at equal alpha_null: {result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]"
    verdict = "supported" if result.high < 0 else "contradicted" if result.low > 0 else "open"
    lost = f"; {len(table) - len(standing)} of {len(table)} alphas, of collapsed networks, left out"
    lost += f", and {len(standing) - len(whole)} below 0" if len(whole) < len(standing) else ""
    return Verdict("R4", question, f"{found}, {result.models} networks{lost}", verdict)


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
    standing = study.standing(table).groupby("ratio")["alpha"]
    few = {r: alpha for r, alpha in standing if r in intervals and 2 <= len(alpha) < len(alphas)}
    told = "; ".join(f"t = {r:g}: {_spread(t_interval(alpha))}, {len(alpha)} networks" for r, alpha in few.items())
    apart = f"; without collapsed networks, decided afterwards and not judged: {told}" if few else ""
    return Verdict("R6", question, f"{found}; {len(alphas)} networks{apart}", verdict)


def _other(name: str, question: str, main: Recalls | None, variant: Recalls | None) -> Verdict:
    """Whether alpha differs between two studies: Welch's t a ratio, Bonferroni over the ratios."""
    ours, theirs = _alphas(main, ["magnitude"]), _alphas(variant, ["magnitude"])
    if ours is None or theirs is None:
        return _not_run(name, question)
    tests = {r: independent_test(theirs["magnitude", r], ours["magnitude", r]) for r in _PRUNED}
    p = {ratio: min(1.0, len(tests) * test.p_value) for ratio, test in tests.items()}
    change = {r: theirs["magnitude", r].mean() - ours["magnitude", r].mean() for r in tests}
    found = "; ".join(f"t = {r:g}: {change[r]:+.3f} (p {_p(p[r])})" for r in tests)
    found += f"; {len(theirs)} and {len(ours)} networks"
    return Verdict(name, question, found, "supported" if min(p.values()) < _P else "open")


def _units(main: Recalls | None, variant: Recalls | None) -> Verdict:
    question = "Does it change the share of dead units, or accuracy, after pruning at t = 50?"
    if _alphas(main, ["magnitude"]) is None or _alphas(variant, ["magnitude"]) is None:
        return _not_run("R8", question)
    told, least = [], 1.0
    for column, words in (("dead_units", "dead units"), ("accuracy", "accuracy")):
        values = [_at_fifty(study, column) for study in (main, variant) if study is not None]
        if min(map(len, values)) < 2:
            told.append(f"{words}: too few networks")
            continue
        p = min(1.0, 2 * independent_test(values[1], values[0]).p_value)
        least = min(least, p)
        told.append(f"{words} {values[0].mean():.3f} without, {values[1].mean():.3f} with it (p {_p(p)})")
    return Verdict("R8", question, "; ".join(told), "supported" if least < _P else "open")


def _at_fifty(study: Recalls, column: str) -> np.ndarray:
    replicates = study.complete(["magnitude"])
    if column == "accuracy":
        return study.correct("magnitude", 50.0, replicates).sum(1) / study.support.sum()
    values = study.column(column, "magnitude", 50.0, replicates)
    return values[np.isfinite(values)]


def of_moons(cells: pd.DataFrame | None, layers: pd.DataFrame | None, published: pd.DataFrame) -> list[Verdict]:
    """The verdicts J1 to J3."""
    return [_more_train(cells), _agree(cells, published), _form(layers, published)]


def of_tables(cells: pd.DataFrame | None) -> Verdict:
    """The verdict J4."""
    question = "Does jumpstart win over the baseline on dense 50 x 4 networks?"
    if cells is None:
        return _not_run("J4", question)
    score = cells.pivot_table(index=["dataset", "replicate"], columns="method", values="val_acc")
    margin = (score["jumpstart"] - score["baseline"]).dropna()  # networks that both have
    wins, losses = int((margin > 0).sum()), int((margin < 0).sum())
    p = _sign_test(wins, losses)
    found = f"{wins} wins, {len(margin) - wins - losses} draws, {losses} losses (p {_p(p)})"
    decided = "supported" if wins > losses else "contradicted"
    return Verdict("J4", question, found, decided if p < 0.05 else "open")


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


def _agree(cells: pd.DataFrame | None, published: pd.DataFrame) -> Verdict:
    question = "Does our share of trained cells agree with the published one, per method?"
    if cells is None:
        return _not_run("J2", question)
    both = cells[cells["replicate"] == 0].merge(published, on=["method", "width", "depth"], suffixes=("", "_published"))
    told, p = [], []
    for method, rows in both.groupby("method", sort=False):
        ours, theirs = ((rows[column] >= 0.9).sum() for column in ("train_acc", "train_acc_published"))
        told.append(f"{method} {ours} / {theirs} of {len(rows)}")
        p.append(stats.fisher_exact([[ours, len(rows) - ours], [theirs, len(rows) - theirs]]).pvalue)
    corrected = jprune.recall.holm(np.array(p))
    found = "; ".join(f"{words} (p {_p(q)})" for words, q in zip(told, corrected, strict=True))
    return Verdict(
        "J2", question, f"ours / published: {found}", "supported" if min(corrected) >= 0.05 else "contradicted"
    )


def _form(layers: pd.DataFrame | None, published: pd.DataFrame) -> Verdict:
    question = "Does the convolution form, not the dense one, match the published cells?"
    if layers is None:
        return _not_run("J3", question)
    both = layers.merge(published, on=["method", "width", "depth"], suffixes=("", "_published"))
    agrees = (both["train_acc"] >= 0.9) == (both["train_acc_published"] >= 0.9)
    table = both.assign(agrees=agrees).pivot_table(
        index=["method", "width", "depth", "replicate"], columns="layer", values="agrees", aggfunc="first"
    )
    table = table.dropna()  # networks that both forms have
    conv, dense = (table[form].astype(bool) for form in ("conv", "dense"))
    p = _sign_test(int((conv & ~dense).sum()), int((dense & ~conv).sum()))
    found = f"conv agrees in {conv.sum()}, dense in {dense.sum()} of {len(table)} networks (p {_p(p)})"
    verdict = "open" if p >= 0.05 else "supported" if conv.sum() > dense.sum() else "contradicted"
    return Verdict("J3", question, found, verdict)


def _sign_test(wins: int, losses: int) -> float:
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


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
