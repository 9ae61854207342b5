"""The planned questions on the jumpstart grids, each with its test and its verdict (see ``verdicts``)."""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.jumpstart_grid import report
from experiments.reproduction.verdicts import LEVEL, Verdict, least_split, not_run, paired_shares, shown_p, sign_test

_SEEDS_OF_J5 = 5
_FEWEST_PAIRS, _LEVEL_FURTHER = 10, 0.05  # of J5 and J6
_READ_FROM = {"mnist-pruned": 10}  # table: number of networks from which the plan allows it to be read


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
        return not_run("J4", question)
    score = cells.pivot_table(index=["dataset", "replicate"], columns="method", values="val_acc")
    margin = (score["jumpstart"] - score["baseline"]).dropna()  # networks that both have
    wins, losses = int((margin > 0).sum()), int((margin < 0).sum())
    by_dataset = margin.groupby("dataset").mean()
    won, lost = int((by_dataset > 0).sum()), int((by_dataset < 0).sum())
    p = sign_test(won, lost)
    found = f"{wins} wins, {len(margin) - wins - losses} draws, {losses} losses over data sets and seeds; "
    found += f"the unit is the data set (since 2026-11-28): {won} of {won + lost} won (p {shown_p(p)})"
    if "skip" in score:
        skip = (score["jumpstart"] - score["skip"]).groupby("dataset").mean()
        better = ", ".join(f"{name} by {100 * -value:.0f} points" for name, value in skip[skip < 0].items())
        found += f"; skip connections beat jumpstart on {better}" if better else ""
    decided = "supported" if won > lost else "contradicted"
    found += "" if p < 0.05 else f"; {least_split(won + lost)}"
    return Verdict("J4", question, found, decided if p < 0.05 else "open")


def of_pruned(tables: Sequence[pd.DataFrame], more_seeds: pd.DataFrame | None = None) -> list[Verdict]:
    """Return verdicts J5 and J6.

    Args:
      tables: tables ``pruned`` of the grids of J5 that have run, a row per network and ratio.
      more_seeds: the table of J6, with the seeds of J5.
    """
    question = "Can thin, deep networks that were trained with jumpstart be pruned further?"
    again = "J5 on moons with 30 new seeds: can they be pruned further?"
    return [
        _further("J5", question, pd.concat(tables)) if tables else not_run("J5", question),
        not_run("J6", again) if more_seeds is None else _further("J6", again, new_seeds(more_seeds)),
    ]


def planned_to_be_read(pruned: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Leave out tables that the plan allows to be read only when more networks are complete.

    >>> sorted(planned_to_be_read({name: pd.DataFrame({"ratio": [1.0]}) for name in ("moons-pruned", "mnist-pruned")}))
    ['moons-pruned']
    """
    return {name: after for name, after in pruned.items() if (after["ratio"] == 1).sum() >= _READ_FROM.get(name, 0)}


def new_seeds(after: pd.DataFrame) -> pd.DataFrame:
    """Leave out the seeds that J5 had."""
    return after[after["replicate"] >= _SEEDS_OF_J5]


class PrunedPairs(NamedTuple):
    """Pairs of networks of UP and of another method that both trained to .9 before pruning.

    Attributes:
      largest: the largest ratio at which each network still reaches .9, columns UP and the other method.
      further: number of pairs in which this ratio is larger for UP.
      less: number of pairs in which it is smaller for UP.
      p: of a sign test, multiplied by two, the number of other methods.
      answer: ``supported`` (further), ``contradicted`` (less far) or ``open``.
    """

    largest: pd.DataFrame
    further: int
    less: int
    p: float
    answer: str


def pruned_pairs(after: pd.DataFrame) -> dict[str, PrunedPairs]:
    """Compare UP with each other method, by the name of that method."""
    largest = report.largest_ratio(after).unstack("method")
    found = {}
    for other in ("relu-bn", "relu"):
        pairs = largest.reindex(columns=["UP", other]).dropna()
        further, less = (int(count.sum()) for count in (pairs["UP"] > pairs[other], pairs["UP"] < pairs[other]))
        p = min(1.0, 2 * sign_test(further, less))
        decided = len(pairs) >= _FEWEST_PAIRS and p < _LEVEL_FURTHER
        answer = ("supported" if further > less else "contradicted") if decided else "open"
        found[other] = PrunedPairs(pairs, further, less, p, answer)
    return found


def _further(name: str, question: str, after: pd.DataFrame) -> Verdict:
    found, needed = [], ""
    compared = pruned_pairs(after)
    for other, (pairs, further, less, p, answer) in compared.items():
        words = f"UP against {other}: further in {further}, less far in {less} of {len(pairs)} pairs (p {shown_p(p)})"
        if len(pairs):
            words += f", median of the largest t {pairs['UP'].median():g} and {pairs[other].median():g}"
        if len(pairs) < _FEWEST_PAIRS:
            needed = f"; at least {_FEWEST_PAIRS} pairs are needed for another word than open"
        elif answer == "open":
            words += f"; {least_split(further + less, _LEVEL_FURTHER, tests=2)}"
        found.append(words)
    answers = {other: pairs.answer for other, pairs in compared.items()}
    verdict = (
        answers["relu"]
        if len(set(answers.values())) == 1
        else ", ".join(f"{answer} against {other}" for other, answer in answers.items())
    )
    datasets = ", ".join(dict.fromkeys(after["dataset"].sort_values()))
    return Verdict(name, question, f"{'; '.join(found)}; {datasets}{needed}", verdict)


def _more_train(cells: pd.DataFrame | None) -> Verdict:
    question = "Does UP train more cells of the moons grid than relu (training accuracy >= .9)?"
    if cells is None:
        return not_run("J1", question)
    trained = cells[cells["replicate"] == 0].pivot_table(index=["width", "depth"], columns="method", values="train_acc")
    up, relu = (trained[method] >= 0.9 for method in ("UP", "relu"))
    both = trained[["UP", "relu"]].notna().all(axis=1)
    gained, lost = int((up & ~relu & both).sum()), int((relu & ~up & both).sum())
    p = sign_test(gained, lost)
    found = f"{up[both].sum()} and {relu[both].sum()} of {both.sum()}; {gained} with UP alone, {lost} with relu alone"
    verdict = "open" if p >= LEVEL else "supported" if gained > lost else "contradicted"
    found += f" (p {shown_p(p)})" + (f"; {least_split(gained + lost, LEVEL)}" if verdict == "open" else "")
    return Verdict("J1", question, found, verdict)


def _agree(cells: pd.DataFrame | None, published: pd.DataFrame, more_seeds: pd.DataFrame | None) -> Verdict:
    question = "Is our share of trained moons cells equivalent to the published one, per method?"
    if cells is None:
        return not_run("J2", question)
    both = cells[cells["replicate"] == 0].merge(published, on=["method", "width", "depth"], suffixes=("", "_published"))
    found, widest = [], {}
    for method, rows in both.groupby("method", sort=False):
        ours, theirs = (rows[column] >= 0.9 for column in ("train_acc", "train_acc_published"))
        low, high = paired_shares(int((ours & ~theirs).sum()), int((theirs & ~ours).sum()), len(rows))
        widest[method] = max(abs(low), abs(high))
        agreement = f"kappa {kappa(ours, theirs):.2f}"
        found.append(
            f"{method} {ours.sum()} / {theirs.sum()} of {len(rows)} [{100 * low:+.0f}, {100 * high:+.0f}], {agreement}"
        )
    words = f"ours / published, 90% interval of the difference in points: {'; '.join(found)}"
    if more_seeds is not None:
        words += f". Two of our own seeds disagree in {_own_disagreement(more_seeds)} of the cells"
    words += ". The test planned first, Fisher's exact, found no difference; equivalence since 2026-11-28"
    closer = ", ".join(str(method) for method, width in widest.items() if width <= 0.1)
    verdict = "equivalent within 15 points" + (f", within 10 for {closer}" if closer else "")
    return Verdict("J2", question, words, verdict if max(widest.values()) <= 0.15 else "open")


def _form(layers: pd.DataFrame | None, published: pd.DataFrame) -> Verdict:
    question = "Does the convolution form, not the dense one, match the published cells?"
    if layers is None:
        return not_run("J3", question)
    both = layers.merge(published, on=["method", "width", "depth"], suffixes=("", "_published"))
    agrees = (both["train_acc"] >= 0.9) == (both["train_acc_published"] >= 0.9)
    table = both.assign(agrees=agrees).pivot_table(
        index=["method", "width", "depth", "replicate"], columns="layer", values="agrees", aggfunc="first"
    )
    table = table.dropna()  # networks of both forms
    conv, dense = (table[form].astype(bool) for form in ("conv", "dense"))
    p = sign_test(int((conv & ~dense).sum()), int((dense & ~conv).sum()))
    found = f"conv agrees in {conv.sum()}, dense in {dense.sum()} of {len(table)} networks (p {shown_p(p)})"
    found += "" if p < 0.05 else f"; the forms differ in {(conv != dense).sum()}: {least_split((conv != dense).sum())}"
    verdict = "open" if p >= 0.05 else "supported" if conv.sum() > dense.sum() else "contradicted"
    return Verdict("J3", question, found, verdict)


def _own_disagreement(cells: pd.DataFrame) -> str:
    """Describe how often two seeds disagree about a cell, and their kappa, by method."""
    return ", ".join(
        f"{100 * share:.0f}% ({method}, kappa {value:.2f})" for method, (share, value) in between_seeds(cells).items()
    )


def between_seeds(cells: pd.DataFrame) -> dict[str, tuple[float, float]]:
    """Compare our own seeds on whether a cell reaches a training accuracy of .9.

    Returns:
      from method to the share of cells in which two seeds disagree and their kappa, means over all pairs of seeds.
    """
    found = {}
    for method, rows in cells.assign(trained=cells["train_acc"] >= 0.9).groupby("method", sort=False):
        table = rows.pivot_table(index=["width", "depth"], columns="replicate", values="trained", aggfunc="first")
        table = table.dropna().astype(bool)
        pairs = [(table[a], table[b]) for a, b in itertools.combinations(table.columns, 2)]
        if pairs:
            share, agreement = np.mean([((a != b).mean(), kappa(a, b)) for a, b in pairs], axis=0)
            found[str(method)] = (float(share), float(agreement))
    return found


def kappa(a: pd.Series, b: pd.Series) -> float:
    """Return Cohen's kappa of two boolean series; NaN if both are constant and equal."""
    chance = a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean())
    return float(((a == b).mean() - chance) / (1 - chance)) if chance < 1 else float("nan")
