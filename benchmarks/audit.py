"""Time the recall audit and its bootstraps, against plain numpy and scikit-learn.

The plain side computes the formulas one model at a time: scikit-learn's recall of each class, the least-squares slope
of the normalized balances, and loops over resamples, of which twenty are run and their time is scaled.
"""

from typing import NamedTuple

import numpy as np
import sklearn.metrics

from benchmarks.timing import Row, compare, judge, same, seconds
from jprune import recall
from jprune.recall.measures import rates

RATIOS = (2.0, 4.0, 10.0, 20.0, 40.0)
LIMIT = 10.0  # seconds, for everything together
TIMED = 20  # resamples of the plain side
PLAIN = "alpha by numpy and scikit-learn, a model at a time"


class Predictions(NamedTuple):
    """Simulated models whose recall differs by class, and more so when pruned.

    Attributes:
      labels: (examples,).
      dense: (models, examples).
      pruned: by ratio, (models, examples).
      classes: number of classes.
    """

    labels: np.ndarray
    dense: np.ndarray
    pruned: dict[float, np.ndarray]
    classes: int


def rows() -> list[Row]:
    """30 models, 5 ratios and 50,000 examples; 1,000 classes, and 10 for the bootstrap over examples."""
    many, few = (made_up(classes, models=30, examples=50_000) for classes in (1_000, 10))
    table = against_plain(many, few, over_models=10_000, over_examples=1_000)
    total = sum(row.ours for row in table[1:])  # the audit includes the work of the first row
    plain = sum(row.peer for row in table[1:])
    return [
        *table,
        judge("audit and both bootstraps", "numpy and scikit-learn, scaled", [total], [plain], must=1 / 10),
        judge("audit and both bootstraps", f"{LIMIT:.0f} s", [total], [LIMIT], must=1.0),
    ]


def made_up(classes: int, *, models: int, examples: int, ratios: tuple[float, ...] = RATIOS) -> Predictions:
    """Simulate predictions that are right with a probability that depends on the class, and otherwise random."""
    rng = np.random.default_rng(0)
    labels = np.arange(examples) % classes
    easy = rng.uniform(0.6, 0.95, classes)

    def predict(spread: float) -> np.ndarray:
        chance = np.clip(easy.mean() + spread * (easy - easy.mean()), 0, 1)
        right = rng.random((models, examples)) < chance[labels]
        return np.where(right, labels, rng.integers(0, classes, (models, examples)))

    return Predictions(labels, predict(1.0), {ratio: predict(1 + ratio / 40) for ratio in ratios}, classes)


def against_plain(many: Predictions, few: Predictions, *, over_models: int, over_examples: int) -> list[Row]:
    """Time alphas, the whole audit, the interval over models, and alphas of resamples; check each."""
    wanted = plain_alphas(many)
    same("alpha of every model", alphas(many), wanted, rtol=1e-9)
    what, plain = f"rates and alpha, {_size(many)} x {many.classes:,} classes", lambda: plain_alphas(many)
    return [
        compare(what, PLAIN, lambda: alphas(many), plain, must=1 / 10),
        tables(many),
        _over_models(wanted, over_models),
        _over_examples(few, over_examples, _size(many)),
    ]


def tables(of: Predictions) -> Row:
    """Time the whole audit, against alpha alone."""
    audited = lambda: recall.audit(of.labels, of.dense, of.pruned, num_classes=of.classes)
    wanted = plain_alphas(of)
    found = audited().alphas.sort_values(["ratio", "model"])["alpha"].to_numpy().reshape(wanted.shape)
    same("alpha of every model in the audit", found, wanted, rtol=1e-9)
    return compare(
        f"audit, {_size(of)} x {of.classes:,} classes",
        PLAIN,
        audited,
        lambda: plain_alphas(of),
        must=1 / 10,
        note="the audit makes every table of the report, intervals and tests too",
    )


def _size(of: Predictions) -> str:
    return f"{len(of.dense)} models x {len(of.pruned)} ratios x {of.dense.shape[1]:,} examples"


def alphas(of: Predictions) -> np.ndarray:
    """Return alpha of every ratio and model as computed by the audit, (ratios, models)."""
    tally = lambda stack: rates.from_predictions(of.labels, stack, of.classes)
    dense, pruned = tally(of.dense), [tally(stack) for _, stack in sorted(of.pruned.items())]
    return np.array(
        [recall.intensification(dense.recall, each.recall, dense.accuracy, each.accuracy) for each in pruned]
    )


def plain_alpha(labels: np.ndarray, dense: np.ndarray, pruned: np.ndarray, classes: int) -> float:
    """Return alpha of one model by the formula."""
    balances = []
    for predicted in (dense, pruned):
        each = sklearn.metrics.recall_score(
            labels, predicted, labels=np.arange(classes), average=None, zero_division=np.nan
        )
        accuracy = np.mean(predicted == labels)
        balances.append((each - accuracy) / accuracy)
    x, y = balances
    both = ~np.isnan(x)
    return float((x[both] * y[both]).sum() / (x[both] ** 2).sum())


def plain_alphas(of: Predictions, chosen: np.ndarray | slice = slice(None)) -> np.ndarray:
    """Return alpha of every ratio and model on some of the examples, (ratios, models)."""
    labels = of.labels[chosen]
    return np.array(
        [
            [plain_alpha(labels, d[chosen], p[chosen], of.classes) for d, p in zip(of.dense, stack, strict=True)]
            for _, stack in sorted(of.pruned.items())
        ]
    )


def _over_models(alphas: np.ndarray, resamples: int) -> Row:
    """Time means of resampled models; the percentiles of the plain side are close to the ends of the BCa interval."""
    found, means = [], []
    ours = seconds(lambda: found.append(recall.bootstrap_models(alphas, rng=0, resamples=resamples)))

    def plain() -> None:
        rng = np.random.default_rng(0)
        for values in alphas:
            drawn = [np.mean(values[rng.integers(0, len(values), len(values))]) for _ in range(resamples)]
            means.append(np.quantile(drawn, [0.005, 0.995]))

    peer = seconds(plain)
    spread = float(found[0].standard_error.max())
    same("low ends", found[0].low, [low for low, _ in means], rtol=0, atol=spread)
    same("high ends", found[0].high, [high for _, high in means], rtol=0, atol=spread)
    return judge(
        f"bootstrap over {alphas.shape[1]} models, {resamples:,} resamples, {len(alphas)} ratios",
        "a numpy loop over resamples",
        [ours],
        [peer],
        must=1 / 10,
        note="ours are BCa intervals, which the other side's percentiles are not",
    )


def _over_examples(of: Predictions, resamples: int, size: str) -> Row:
    """Time alphas on resampled test sets; their standard errors agree within the precision of twenty resamples."""
    found, drawn = [], []
    stack = np.stack([stack for _, stack in sorted(of.pruned.items())])

    def bootstrap() -> None:
        found.append(recall.bootstrap_examples(of.labels, of.dense, stack, of.classes, rng=0, resamples=resamples))

    timed = min(TIMED, resamples)

    def plain() -> None:
        rng = np.random.default_rng(0)
        for _ in range(timed):
            drawn.append(plain_alphas(of, rng.integers(0, len(of.labels), len(of.labels))))

    ours, peer = seconds(bootstrap), seconds(plain) * resamples / timed
    same("alpha on the test set", found[0].estimate, plain_alphas(of).mean(-1), rtol=1e-9)
    means = np.mean(drawn, axis=-1)
    beyond = np.abs(means.mean(0) - found[0].alphas.mean((0, -1))) / found[0].standard_error
    same("resampled alphas, in standard errors", beyond, 0, rtol=0, atol=5 / np.sqrt(timed))
    return judge(
        f"bootstrap over the examples, {resamples:,} resamples, {size} x {of.classes} classes",
        "numpy and scikit-learn, a resample at a time",
        [ours],
        [peer],
        must=1 / 10,
        note=f"the other side ran {timed} resamples, scaled to {resamples:,}",
    )
