"""The tests of an audit, one row each, and the tests between audits."""

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from jprune.recall.inference.evenness import evenness_test
from jprune.recall.inference.intervals import Alternative, bonferroni, holm, independent_test, paired_test
from jprune.recall.inference.losses import mcnemar
from jprune.recall.inference.pairing import PairingTest
from jprune.recall.tables.audited import AuditedModels
from jprune.recall.tables.frames import AuditTables, Row

_Stack = tuple[str, float, npt.NDArray[np.float64]]
COLUMNS = (
    "question", "score", "ratio", "other_score", "other_ratio", "test", "alternative", "difference", "statistic",
    "df", "p", "p_bonferroni", "p_holm", "models", "left_out", "reason", "class", "examples", "lost", "won",
)  # fmt: skip


def within(per_model: pd.DataFrame, *, paired: bool, shared: bool) -> pd.DataFrame:
    """Test the alphas of one audit, in the directions of Good et al. 2022, section 4.

    * ``ratio``: does alpha grow from each ratio to the next? One-sided.
    * ``control``: does alpha differ from that of the control, fine-tuned and not pruned? Two-sided.
    * ``score``: do two scores differ at the same ratio? Two-sided.

    Models at chance are left out. p-values are corrected over the rows of one question about one score, or one pair of
    scores.

    Args:
      per_model: the audit's ``alphas``.
      paired: whether the models of a score are paired by index.
      shared: whether the scores start from the same dense models; their models are then paired too.
    """
    alphas = by_stack(per_model)
    families = []
    for score, ratios in alphas.items():
        compared = [ratio for ratio in ratios if ratio != 1]
        steps = itertools.pairwise(ratios)
        one = {ratio: (score, ratio, values) for ratio, values in ratios.items()}
        families.append([_row("ratio", one[b], one[a], "greater", paired=paired) for a, b in steps])
        if 1.0 in ratios:
            families.append([_row("control", one[r], one[1.0], "two-sided", paired=paired) for r in compared])
    for first, second in itertools.combinations(alphas, 2):
        families.append(
            [
                _row("score", (first, r, a), (second, r, alphas[second][r]), "two-sided", paired=paired and shared)
                for r, a in alphas[first].items()
                if r in alphas[second]
            ]
        )
    return _frame(families)


def compare(
    audits: Mapping[str, AuditTables],
    pairs: Sequence[tuple[str, str]] | None = None,
    *,
    alternative: Alternative = "greater",
) -> pd.DataFrame:
    """Test whether alpha differs between audits of different architectures or data sets.

    Welch's t test for every score and ratio that both audits have; p-values are corrected over the
    rows of one pair and score. One-sided by default, as in Good et al. 2022, section 4: there the
    first of a pair is the smaller network, or the harder data set.

    Args:
      audits: audits by name.
      pairs: which to compare, (first, second) for E[alpha] of the first being greater; by default
        every pair in the order of ``audits``.
      alternative: "greater", "less" or "two-sided".

    Returns:
      A frame like ``Audit.tests``, with columns ``audit`` and ``other_audit`` before the rest.

    Raises:
      ValueError: a pair names an audit that is not there.

    Four models of each network; after pruning, class 2 loses far more in the small network:

    >>> from jprune import recall
    >>> def models(seed, error_rates):
    ...     generator = np.random.default_rng(seed)
    ...     wrong = generator.random((4, 120)) < np.repeat(error_rates, 40)
    ...     return (labels + wrong) % 3
    >>> labels = np.repeat([0, 1, 2], 40)
    >>> small = recall.audit(labels, models(0, [0.1, 0.1, 0.3]), {2.0: models(1, [0.1, 0.1, 0.5])})
    >>> large = recall.audit(labels, models(2, [0.1, 0.1, 0.3]), {2.0: models(3, [0.1, 0.1, 0.3])})
    >>> recall.compare({"small": small, "large": large})[["audit", "other_audit", "ratio", "test", "alternative"]]
       audit other_audit  ratio     test alternative
    0  small       large    2.0  Welch t     greater
    """
    wanted = list(itertools.combinations(audits, 2)) if pairs is None else list(pairs)
    frames = []
    for first, second in wanted:
        for name in (first, second):
            if name not in audits:
                raise ValueError(f"pairs name the audit {name!r}; there are {', '.join(map(repr, audits))}")
        values, others = by_stack(audits[first].alphas), by_stack(audits[second].alphas)
        families = [
            [
                _row("audit", (score, ratio, values[score][ratio]), (score, ratio, others[score][ratio]), alternative)
                for ratio in values[score]
                if ratio in others.get(score, {})
            ]
            for score in values
        ]
        frame = _frame(families)
        frame.insert(0, "audit", first)
        frame.insert(1, "other_audit", second)
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["audit", "other_audit", *COLUMNS])


def mcnemar_rows(study: AuditedModels) -> list[Row]:
    """McNemar tests of one model before and one after compression: of all examples, and of every class.

    ``difference`` is recall after minus before; p-values of the classes are corrected over the classes. With several
    models the test would treat models that share test examples as independent, so there are no rows.
    """
    rows = []
    for score, ratio, _, _ in study.stacks():
        if study.examples is None:
            continue
        before, after = study.examples.right(score), study.examples.right(score, ratio)
        if len(before) != 1 or len(after) != 1:
            continue
        true, classes = study.examples.true, len(study.class_names)
        lost = np.bincount(true[before[0] & ~after[0]], minlength=classes)
        won = np.bincount(true[~before[0] & after[0]], minlength=classes)
        support = np.bincount(true, minlength=classes)
        p = np.array([mcnemar(int(b), int(c)) if n else np.nan for b, c, n in zip(lost, won, support, strict=True)])
        every = mcnemar(int(lost.sum()), int(won.sum()))
        counts = [("accuracy", None, len(true), int(lost.sum()), int(won.sum()), every, every, every)]
        counts += [
            ("class", *each)
            for each in zip(study.class_names, support, lost, won, p, bonferroni(p), holm(p), strict=True)
            if each[1]
        ]
        for question, name, n, b, c, single, corrected, stepped in counts:
            row: Row = dict.fromkeys(COLUMNS)
            rows.append(
                row
                | {
                    "question": question,
                    "score": score,
                    "ratio": ratio,
                    "other_score": "dense",
                    "test": "mcnemar",
                    "alternative": "two-sided",
                    "difference": float((c - b) / n),
                    "p": float(single),
                    "p_bonferroni": float(corrected),
                    "p_holm": float(stepped),
                    "models": 1,
                    "left_out": 0,
                    "reason": "",
                    "class": name,
                    "examples": int(n),
                    "lost": int(b),
                    "won": int(c),
                }
            )
    return rows


def evenness_rows(study: AuditedModels) -> list[Row]:
    """A test for every score and ratio: is the loss even over the classes?"""
    if study.examples is None:
        return []
    rows = []
    for score, ratio, _, _ in study.stacks():
        before, after = study.examples.right(score), study.examples.right(score, ratio)
        found = evenness_test(study.examples.true, before, after, len(study.class_names), paired=study.paired)
        row: Row = dict.fromkeys(COLUMNS)
        rows.append(
            row
            | {
                "question": "evenness",
                "score": score,
                "ratio": ratio,
                "other_score": "dense",
                "test": "anova",
                "alternative": "greater",
                "statistic": found.statistic,
                "p": found.p_value,
                "models": len(after),
                "left_out": 0,
                "reason": found.reason,
                "examples": len(study.examples.true),
            }
        )
    return rows


def pairing_row(score: str, ratio: float, found: PairingTest) -> Row:
    """A row that says whether the models of a score and ratio belong to their dense models.

    ``difference`` is the correlation of their recalls over models.
    """
    row: Row = dict.fromkeys(COLUMNS)
    return row | {
        "question": "pairing",
        "score": score,
        "ratio": ratio,
        "other_score": "dense",
        "test": "permutation",
        "alternative": "greater",
        "difference": found.correlation,
        "p": found.p_value,
        "models": found.models,
        "left_out": found.left_out,
        "reason": found.reason,
    }


def with_rows(table: pd.DataFrame, rows: Sequence[Row]) -> pd.DataFrame:
    """A table of tests with more rows."""
    if not rows:
        return table
    return pd.DataFrame([*table.to_dict("records"), *rows], columns=list(COLUMNS))


def by_stack(per_model: pd.DataFrame) -> dict[str, dict[float, npt.NDArray[np.float64]]]:
    """The alphas of every score and ratio, (models,), from an audit's ``alphas``; NaN for models at chance."""
    per_model = per_model.assign(alpha=per_model["alpha"].mask(per_model["collapsed"].astype(bool)))
    found: dict[str, dict[float, npt.NDArray[np.float64]]] = {}
    for score in per_model["score"].unique():
        of_score = per_model[per_model["score"] == score]
        ratios = of_score["ratio"].unique()
        found[str(score)] = {float(r): of_score["alpha"][of_score["ratio"] == r].to_numpy() for r in ratios}
    return found


def _row(question: str, one: _Stack, other: _Stack, alternative: Alternative, *, paired: bool = False) -> Row:
    test = paired_test if paired else independent_test
    fields = test(one[2], other[2], alternative)._asdict()
    return {
        "question": question,
        "score": one[0],
        "ratio": one[1],
        "other_score": other[0],
        "other_ratio": other[1],
        "test": "paired t" if paired else "Welch t",
        "alternative": alternative,
        "p": fields.pop("p_value"),
        **fields,
    }


def _frame(families: list[list[Row]]) -> pd.DataFrame:
    """One frame of all rows, p-values corrected within each family."""
    rows = []
    for family in families:
        p = np.array([row["p"] for row in family])
        for row, corrected, stepped in zip(family, bonferroni(p), holm(p), strict=True):
            rows.append(row | {"p_bonferroni": float(corrected), "p_holm": float(stepped)})
    return pd.DataFrame(rows, columns=list(COLUMNS))
