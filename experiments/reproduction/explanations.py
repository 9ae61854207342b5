"""Questions R13 and R14 on explanations of the effects of pruning, planned before their runs.

They are answered only from studies that have run; the others are left out.
"""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

import jprune
from experiments.recall_distortion import presets
from experiments.recall_distortion.plan import CONTROL
from experiments.reproduction.hypotheses import SAME_DENSE, detectable_change
from experiments.reproduction.ledger import DENSE, Recalls
from experiments.reproduction.verdicts import Verdict, paired_shares, sign_test, smallest
from jprune.recall import holm

FEW_WEIGHTS = "fashion-few-weights"
WITH_FLOOR = ("fashion-few-weights-floor", "fashion-few-weights-floor-others")  # 125 weights, the other counts
CHANGES = {
    "fashion-round-8": (CONTROL, "rounding to 8 bits"),
    "fashion-round-4": (CONTROL, "rounding to 4 bits"),
    "fashion-fewer-epochs-10": (DENSE, "fewer epochs"),
    "fashion-fewer-epochs-20": (DENSE, "fewer epochs"),
    "fashion-label-noise-10": (DENSE, "label noise"),
    "fashion-label-noise-20": (DENSE, "label noise"),
}  # table: score of the changed networks, kind of change
P, _MARGIN = 0.01, 0.05
_PLANNED = presets.get(FEW_WEIGHTS).ratios[1:]
COUNTS = len(_PLANNED)  # numbers of weights planned for R14
_FIRST_ROUND, _IN_FIRST_ROUND = (50.0,), 125  # the ratio at which LeNets of the first round keep 125 weights


def of_explanations(studies: Mapping[str, Recalls]) -> list[Verdict]:
    """Return the verdicts on R13 and R14 if their studies have run.

    Args:
      studies: from the name of the committed table to its study.
    """
    verdicts = [_other_changes(studies), _layer_collapse(studies)]
    return [verdict for verdict in verdicts if verdict is not None]


def collapse_table(study: Recalls) -> pd.DataFrame:
    """Count networks at chance after magnitude and undecayed pruning, a row per number of weights.

    Args:
      study: dense networks, pruned to few weights; other ratios than those planned for R14 are left out.

    Returns:
      Columns ``keep`` (weights kept), ``networks``, ``magnitude`` and ``undecayed`` (collapsed networks),
      ``magnitude_alone`` and ``undecayed_alone`` (collapsed after only one of the two), ``p`` (exact McNemar test,
      Holm over rows), ``low`` and ``high`` (95% interval of share(undecayed) - share(magnitude)).
    """
    return _adjusted(_collapse_rows(study, _PLANNED))


def with_floor(studies: Mapping[str, Recalls]) -> pd.DataFrame | None:
    """Return the table of ``collapse_table`` over all counts that were run with a floor; None if there are none."""
    rows = [row for name in WITH_FLOOR if name in studies for row in _collapse_rows(studies[name], _PLANNED)]
    return _adjusted(rows) if rows else None


def _adjusted(rows: list[dict[str, float]]) -> pd.DataFrame:
    table = pd.DataFrame(rows).sort_values("keep", ascending=False, ignore_index=True)
    return table.assign(p=holm(table["p"].to_numpy()))


def _collapse_rows(study: Recalls, planned: Sequence[float]) -> list[dict[str, float]]:
    scores = ["magnitude", "undecayed"]
    replicates = study.complete(scores)
    rows = []
    for ratio in study.ratios("magnitude"):
        if not np.isclose(ratio, planned, rtol=2e-5).any():
            continue  # belongs to another study in the same folder
        magnitude, undecayed = (study.collapsed(score, ratio, replicates) for score in scores)
        fewer, more = int((magnitude & ~undecayed).sum()), int((undecayed & ~magnitude).sum())
        low, high = paired_shares(more, fewer, len(replicates), confidence=0.95)
        p = sign_test(fewer, more)
        keep = int(study.column("nonzero", "magnitude", ratio, replicates).max())
        counts = {"magnitude": int(magnitude.sum()), "undecayed": int(undecayed.sum())}
        alone = {"magnitude_alone": fewer, "undecayed_alone": more}
        rows.append({"keep": keep, "networks": len(replicates), **counts, **alone, "p": p, "low": low, "high": high})
    return rows


def _layer_collapse(studies: Mapping[str, Recalls]) -> Verdict | None:
    question = "Does undecayed pruning help only by avoiding layer collapse?"
    free, first, floor = studies.get(FEW_WEIGHTS), studies.get("fashion-lenet"), with_floor(studies)
    if floor is None:
        return None
    without = [] if free is None else _collapse_rows(free, _PLANNED)
    added = first is not None and all(row["keep"] != _IN_FIRST_ROUND for row in without)
    if added:
        without += _collapse_rows(first, _FIRST_ROUND)
    if not without:
        return None
    tables = [_adjusted(without), floor]
    parts = []
    for table, words in zip(tables, ("without a floor", "with at least 10 weights a layer"), strict=True):
        shown = [
            f"{row.keep:,}: {row.undecayed} and {row.magnitude} of {row.networks} (p {row.p:.2g}, difference "
            f"[{row.low:+.2f}, {row.high:+.2f}])"
            for row in table.itertuples()
        ]
        parts.append(f"collapsed after undecayed and magnitude {words}, by weights kept: {', '.join(shown)}")
    differs, remains = (bool((table["p"] < P).any()) for table in tables)
    within = bool((tables[1][["low", "high"]].abs() <= 0.2).all(axis=None))
    verdict = "no" if remains else "yes" if differs and within else "open"
    if verdict == "open":
        least = next(n for n in itertools.count(1) if len(tables[1]) * sign_test(n, 0) < P)
        parts.append(f"a count can differ only if {least} networks or more collapse after one score alone")
    if added:
        parts.append(f"networks with {_IN_FIRST_ROUND} weights and no floor are those of the first round (2026-11-29)")
    counts = [f"{keep:,}" for keep in tables[1]["keep"]]
    if verdict == "yes" and len(counts) < COUNTS:
        verdict = f"yes, at {', '.join(counts)} weights"
    return Verdict("R14", question, "; ".join(parts), verdict)


def _other_changes(studies: Mapping[str, Recalls]) -> Verdict | None:
    question = "Is recall distortion more than accuracy loss and seed noise?"
    main = studies.get("fashion-lenet")
    changed = {name: studies[name] for name in CHANGES if name in studies}
    if main is None or {CHANGES[name][1] for name in changed} != {kind for _, kind in CHANGES.values()}:
        return None
    pruned = studies.get(SAME_DENSE, main)
    results, left_out = compare_changes(pruned, changed)
    answers = {answer(result) for result in results.values()}
    small = all(_is_small(result) for result in results.values())
    verdict = "yes" if answers == {"yes"} else "no larger than 5%" if small else "open"
    if verdict == "yes":
        less = [kind for kind, result in results.items() if result.high < 0]
        verdict += f", but less after pruning than after {' and '.join(less)}" if less else ""
    text = "log alpha of magnitude pruning at equal alpha_null minus that of each other change, Bonferroni x 4: "
    text += _intervals(results)
    text += f"; {left_out} alphas of 0 or less have no logarithm and are left out" if left_out else ""
    if verdict == "open":
        effects = [detectable_change(each, 1 - P / len(results)) for each in results.values() if not each.reason]
        text += f"; {smallest(*effects)}"
    if pruned is not main:
        first, _ = compare_changes(main, changed)
        text += (
            "; magnitude pruning of the same dense networks, at the published counts, since 2026-11-29; before, with "
            f"the dense networks of the first round, of which 20 are others: {_intervals(first)}"
        )
    return Verdict("R13", question, text, verdict)


def compare_changes(
    pruned: Recalls, changed: Mapping[str, Recalls]
) -> tuple[dict[str, jprune.recall.EqualAccuracy], int]:
    """Compare magnitude pruning with each kind of other change at equal accuracy.

    Args:
      pruned: the dense networks, and the same after magnitude pruning.
      changed: from the name of the table to the changed networks.

    Returns:
      from the kind of change to log alpha of pruning minus that of the change, 99% intervals after Bonferroni's
      correction; and the number of alphas left out.
    """
    alphas, left_out = _alphas_of_changes(pruned, changed)
    kinds = list(dict.fromkeys(kind for _, kind in CHANGES.values()))
    level = 1 - P / len(kinds)
    return {
        kind: jprune.recall.compare_at_equal_accuracy(alphas, kind, "magnitude", level=level) for kind in kinds
    }, left_out


def answer(result: jprune.recall.EqualAccuracy) -> str:
    """Return ``yes`` if an interval excludes 0, ``small`` if it is within the margin, else ``open``."""
    if not np.isfinite(result.low):
        return "open"
    apart = result.low > 0 or result.high < 0
    return "yes" if apart else "small" if _is_small(result) else "open"


def _is_small(result: jprune.recall.EqualAccuracy) -> bool:
    """Whether an interval is within the margin; False without an interval."""
    return max(-result.low, result.high) <= _MARGIN


def _intervals(results: Mapping[str, jprune.recall.EqualAccuracy]) -> str:
    return "; ".join(
        f"{kind}: {result.reason or f'{result.difference:+.3f} [{result.low:+.3f}, {result.high:+.3f}]'}"
        for kind, result in results.items()
    )


def _alphas_of_changes(main: Recalls, changed: Mapping[str, Recalls]) -> tuple[pd.DataFrame, int]:
    """Return alphas of networks above chance: pruned by magnitude, t = 2 to 20, and with the other changes.

    Returns:
      the positive alphas, and the number of those of 0 or less, which have no logarithm.
    """
    wanted = [set(main.complete(["magnitude"]))]
    for name, study in changed.items():
        rows = study.networks[study.networks["score"] == CHANGES[name][0]]
        wanted.append(set(rows["replicate"]))
    replicates = sorted(set.intersection(*wanted))
    counts = {"magnitude": {t: main.correct("magnitude", t, replicates) for t in main.ratios("magnitude") if t <= 20}}
    for level, (name, study) in enumerate(changed.items()):
        score, kind = CHANGES[name]
        counts.setdefault(kind, {})[2.0 + level] = study.correct(score, 1.0, replicates)
    dense = main.correct(DENSE, 1.0, replicates)
    audit = jprune.recall.audit_counts(dense, counts, support=main.support, class_names=main.class_names)
    working = main.working(audit.alphas)
    return working[working["alpha"] > 0], int((working["alpha"] <= 0).sum())
