"""Alpha corrected for test-set noise, and alpha between training seeds without compression.

Recalls are measured on a finite test set. Their noise inflates the spread of the dense recall balances, so the plain
slope is too small: with 100 classes of 20 images it is near 0 for an unchanged model. The corrected slope subtracts the
noise from both sums. For class c with n_c of N examples, w_c = n_c / N, dense and compressed recall r_c and s_c,
accuracies A and B, and b_c the share of class c that both models classify correctly::

    v_c = r_c (1 - r_c) / (n_c - 1)         c_c = (b_c - r_c s_c) / (n_c - 1)
    noise(q) = sum_c (1 - 2 w_c) q_c + K sum_c w_c^2 q_c
    D = [sum_c (r_c - A)^2 - noise(v)] / A^2
    N = [sum_c (r_c - A) (s_c - B) - noise(c)] / (A B)
    alpha_corrected = sum over models of N / sum over models of D
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.stats
from jaxtyping import Bool, Float, Int, Num

from jprune.recall.inference.evenness import permutation_p
from jprune.recall.inputs.arguments import check_level

_LEAST = 10  # examples of a class; with fewer, recall is often 0 or 1, and its noise cannot be estimated
_BLOCK = 2**16  # numbers of one model in a block
_ROUNDING = 1e-13  # of D for each class and model
_MOST_PAIRS = 64  # classes; beyond it the products between classes add less than 2% to the variance

WITHIN_NOISE = "no class differences beyond sampling noise"
TOO_FEW_EXAMPLES = "too few test examples to measure how much the dense recalls of the classes differ"
TOO_FEW_MODELS = "too few models or classes for an interval"


class CorrectedAlpha(NamedTuple):
    """Alpha corrected for test-set noise, with its interval.

    Attributes:
      alpha: the corrected slope; NaN with a reason.
      low: lower end of the interval.
      high: upper end.
      standard_error: standard error of the slope, by the delta method; NaN with a reason.
      error_at_one: standard error of the difference from 1, as the interval takes it; NaN with a reason.
      degrees: degrees of freedom of the interval; infinite if only test examples vary, NaN with a reason.
      classes: number of classes used, which are those with at least 10 examples.
      reason: why the slope is NaN; otherwise empty.
    """

    alpha: float
    low: float
    high: float
    standard_error: float
    error_at_one: float
    degrees: float
    classes: int
    reason: str


class SpreadRatio(NamedTuple):
    """How much the recalls of classes differ after compression, relative to the dense model.

    Attributes:
      ratio: standard deviation over classes after compression divided by that before; NaN if the dense differences are
        within sampling noise or there are too few examples to measure them.
      low: lower end of its interval.
      high: upper end.
    """

    ratio: float
    low: float
    high: float


class SeedNull(NamedTuple):
    """Alpha of one dense model regressed on another, over all ordered pairs.

    Attributes:
      alpha: mean over the pairs; NaN with fewer than two models.
      low: lower end of the jackknife interval over models; NaN with fewer than three.
      high: upper end.
    """

    alpha: float
    low: float
    high: float


def corrected_intensification(
    labels: Int[np.ndarray, " examples"],
    dense_correct: Bool[np.ndarray, "dense_models examples"],
    correct: Bool[np.ndarray, "models examples"],
    *,
    paired: bool = True,
    level: float = 0.99,
) -> CorrectedAlpha:
    """Intensification ratio with the noise of the test set removed, and Fieller's interval.

    The variance of both sums is a jackknife estimate over test examples within classes, with each example left out of
    all models at once. The sums are quadratic, so the jackknife counts the second-order part of their variance twice;
    the surplus is subtracted. With two or more models, the variance between models beyond test noise is added, so the
    interval covers other test examples and other training seeds. A few models may look alike by chance, so their number
    times that of the classes limits the degrees of freedom; in simulations with 2 to 10 models and 10 classes,
    intervals at a nominal 99% cover 94 to 100%.

    Args:
      labels: true classes, (examples,).
      dense_correct: whether each dense model classifies each example correctly, (models, examples).
      correct: the same for the compressed models, (models, examples).
      paired: whether compressed model m was made from dense model m. Otherwise every compressed model is compared with
        the mean of the dense models, whose number may differ; a single dense model is then taken as given.
      level: confidence level of the interval.

    Raises:
      ValueError: ``level`` is not strictly between 0 and 1.

    >>> rng = np.random.default_rng(0)
    >>> labels = np.repeat(np.arange(10), 200)
    >>> easy = np.linspace(0.98, 0.75, 10)[labels]
    >>> dense, other = rng.random((2, 1, 2000)) < easy
    >>> found = corrected_intensification(labels, dense, other, level=0.95)
    >>> found.low < 1 < found.high
    True
    """
    check_level(level)
    order, sizes = _by_class(labels)
    dense, p = (np.asarray(rows)[:, order] for rows in (dense_correct, correct))
    nan = float("nan")
    out = CorrectedAlpha(nan, nan, nan, nan, nan, nan, len(sizes), _not_measured(dense, p, sizes))
    if out.reason:
        return out
    d = dense if paired else np.broadcast_to(dense.mean(0), p.shape)
    each, jackknifed, of_models = _sums(d, p, sizes)
    total = _total(each, sizes)
    examples = jackknifed - _second_order(d, p, sizes, jackknifed)
    models = len(each)
    alpha = total[0] / total[1] if total[1] > 0 else nan
    variance, df = examples, np.inf
    if np.isfinite(alpha):
        parts = []  # the variance between models, what test noise explains of it, and its degrees of freedom
        if models > 1:
            parts.append((models * np.cov(each.T), of_models, models - 1))
        if not paired and len(dense) > 1:
            parts.append((*_between_dense(dense, p, sizes), len(dense) - 1))
        variance, df = _with_models(alpha, examples, parts, len(sizes))
    ends = _fieller(total, variance, _quantile(level, df))
    if ends is None:
        if _fieller(total, examples, _quantile(level, np.inf)) is not None:
            return out._replace(reason=TOO_FEW_MODELS)
        return out._replace(reason=TOO_FEW_EXAMPLES if _classes_differ(dense, sizes, level) else WITHIN_NOISE)
    error, at_one = (float(np.sqrt(max(_at(slope, variance), 0.0)) / total[1]) for slope in (alpha, 1.0))
    return CorrectedAlpha(float(alpha), *ends, error, at_one, float(df), len(sizes), "")


def spread_ratio(
    labels: Int[np.ndarray, " examples"],
    dense_correct: Bool[np.ndarray, " examples"],
    correct: Bool[np.ndarray, "models examples"],
    level: float = 0.99,
) -> SpreadRatio:
    """How much the recalls of classes differ after compression, divided by how much those of one dense model do.

    Recalls are divided by the accuracy and the noise of the test set is removed, as in corrected alpha. Between two
    training runs without compression other classes are weak, so alpha is below 1, and this ratio is not. Its interval
    is wider than needed, because the jackknife counts the second-order part of the variance twice.

    Args:
      labels: true classes, (examples,).
      dense_correct: whether the dense model classifies each example correctly, (examples,).
      correct: the same for the compressed models, (models, examples).
      level: confidence level of the interval.

    >>> labels, place = np.repeat([0, 1], 400), np.tile(np.arange(400), 2)
    >>> dense, after = (place < np.repeat(recalls, 400) * 400 for recalls in ([0.9, 0.5], [0.8, 0.6]))
    >>> round(spread_ratio(labels, dense, after[None]).ratio, 3)
    0.495
    """
    check_level(level)
    order, sizes = _by_class(labels)
    d, p = np.asarray(dense_correct)[None, order], np.asarray(correct)[:, order]
    nan = float("nan")
    if _not_measured(d, p, sizes):
        return SpreadRatio(nan, nan, nan)
    each, examples, of_models = _sums(np.broadcast_to(d, p.shape), p, sizes, spread=True)
    total, variance, df = _total(each, sizes), examples, np.inf
    if len(p) > 1 and total[1] > 0:
        part = (len(p) * np.cov(each.T), of_models, len(p) - 1)
        variance, df = _with_models(total[0] / total[1], examples, [part], len(sizes))
    ends = _fieller(total, variance, _quantile(level, df))
    if ends is None:
        return SpreadRatio(nan, nan, nan)
    return SpreadRatio(*(float(np.sqrt(max(value, 0.0))) for value in (total[0] / total[1], *ends)))


def _by_class(labels: Int[np.ndarray, " examples"]) -> tuple[Int[np.ndarray, " used"], Int[np.ndarray, " classes"]]:
    """The order of the examples by class, without small classes, and the numbers of examples of the others."""
    support = np.bincount(labels)
    order = np.argsort(labels, kind="stable")
    return order[support[labels[order]] >= _LEAST], support[support >= _LEAST]


def _not_measured(
    dense: Bool[np.ndarray, "dense_models examples"],
    p: Bool[np.ndarray, "models examples"],
    sizes: Int[np.ndarray, " classes"],
) -> str:
    """Why there are no sums; empty if there are."""
    if len(sizes) < 2:
        return f"fewer than two classes have {_LEAST} test examples"
    if (dense.sum(1) == 0).any() or (p.sum(1) == 0).any():
        return "an accuracy is 0"
    if (dense.sum(1) == 1).any() or (p.sum(1) == 1).any():
        return "a model is right about one example only"
    return ""


def _classes_differ(
    dense: Bool[np.ndarray, "dense_models examples"], sizes: Int[np.ndarray, " classes"], level: float
) -> bool:
    """Whether the dense recalls are shown to differ between classes, by a permutation of the examples.

    That needs fewer examples than an interval of their spread, in which all classes have one weight: with two classes
    of 200 examples, recalls of 95% and 80% clearly differ, and their spread has an interval that includes 0.
    """
    right, n = dense.mean(0), sizes.astype(np.float64)
    means = np.add.reduceat(right, np.cumsum(sizes) - sizes) / n
    between = float((n * (means - right.mean()) ** 2).sum())
    return permutation_p(between, right, n) < 1 - level


def _total(each: Float[np.ndarray, "models 2"], sizes: Int[np.ndarray, " classes"]) -> Float[np.ndarray, " 2"]:
    """The sums over models; D is exactly 0 if dense models are wrong about one example."""
    total = each.sum(0)
    if abs(total[1]) <= _ROUNDING * len(each) * len(sizes):
        total[1] = 0.0
    return np.asarray(total)


def _quantile(level: float, degrees: float) -> float:
    return float(scipy.stats.t.isf((1 - level) / 2, degrees))  # the normal one for infinite degrees


def seed_null(
    recall: Float[np.ndarray, "models classes"], accuracy: Float[np.ndarray, " models"], level: float = 0.99
) -> SeedNull:
    """Alpha between dense models that differ only in the training seed.

    Regression to the mean makes it smaller than 1 without any compression, so alpha is compared with it as well as with
    1. It is a mean over ordered pairs, with a jackknife interval over models.

    Args:
      recall: recall of the dense models, fractions, NaN for a class without examples.
      accuracy: accuracy of the dense models.
      level: confidence level of the interval.

    >>> seed_null(np.array([[0.9, 0.7], [0.8, 0.6]]), np.array([0.8, 0.7])).alpha.__round__(4)
    1.0089
    """
    nan = float("nan")
    usable = ~np.isnan(recall).any(0)
    x = (recall[:, usable] - accuracy[:, None])[accuracy > 0] / accuracy[accuracy > 0, None]
    x = x[(x**2).sum(1) > 1e-20]
    models = len(x)
    if models < 2:
        return SeedNull(nan, nan, nan)
    products = x @ x.T
    slopes = products / np.diag(products)[:, None]
    np.fill_diagonal(slopes, 0.0)
    whole = slopes.sum()
    mean = whole / (models * (models - 1))
    if models < 3:
        return SeedNull(float(mean), nan, nan)
    without = (whole - slopes.sum(0) - slopes.sum(1)) / ((models - 1) * (models - 2))
    error = np.sqrt((models - 1) / models * ((without - without.mean()) ** 2).sum())
    half = scipy.stats.t.isf((1 - level) / 2, models - 1) * error
    return SeedNull(float(mean), float(mean - half), float(mean + half))


def _with_models(
    alpha: float,
    examples: Float[np.ndarray, "2 2"],
    parts: Sequence[tuple[Float[np.ndarray, "2 2"], Float[np.ndarray, "2 2"], int]],
    classes: int,
) -> tuple[Float[np.ndarray, "2 2"], float]:
    """The variance over examples and between models, and Satterthwaite's degrees of freedom."""
    variance, spread, most = examples, 0.0, np.inf
    for between, explained, degrees in parts:
        found = _at(alpha, between)
        share = max(0.0, 1 - _at(alpha, explained) / found) if found > 0 else 0.0
        variance = variance + share * between
        spread += (share * found) ** 2 / degrees
        most = min(most, float(degrees * (classes - 1)))
    df = _at(alpha, variance) ** 2 / spread if spread > 0 else np.inf
    return variance, min(df, most)


def _between_dense(
    dense: Num[np.ndarray, "dense_models examples"] | Bool[np.ndarray, "dense_models examples"],
    p: Num[np.ndarray, "models examples"] | Bool[np.ndarray, "models examples"],
    sizes: Int[np.ndarray, " classes"],
) -> tuple[Float[np.ndarray, "2 2"], Float[np.ndarray, "2 2"]]:
    """The variance of the sums over other dense models, by a jackknife, and what test noise explains of it.

    The mean of the compressed models stands for each of them; the sums are nearly linear in it.
    """
    models, of_class = len(dense), np.repeat(np.arange(len(sizes)), sizes)
    once = np.ones(len(of_class), np.int64)
    kinds = _Kinds(of_class, once, once, once, np.cumsum(sizes) - sizes)._replace(y=p.mean(0))
    total = dense.sum(0, dtype=np.float64)
    pairs = []
    for row in dense:
        part = kinds._replace(x=(total - row) / (models - 1))
        pairs.append([_leave_one_out(part, sizes), _leave_one_out(part._replace(y=part.x), sizes)])
    without = len(p) * np.array(pairs)  # (dense models, N and D, without each example and with all)
    apart = without - without.mean(0)
    scale = (models - 1) / models
    between = scale * apart[:, :, -1].T @ apart[:, :, -1]
    return between, scale * np.sum([_spread(rows[:, :-1], kinds, sizes) for rows in apart], axis=0)


class _Kinds(NamedTuple):
    """Kinds of examples, grouped by class: examples of a kind have the same class, x and y.

    Attributes:
      of_class: (kinds,).
      x: whether the dense models are correct, or their mean, (kinds,).
      y: the same of compressed models.
      times: number of examples of each kind.
      starts: index of the first kind of each class, (classes,).
    """

    of_class: Int[np.ndarray, " kinds"]
    x: Num[np.ndarray, " kinds"] | Bool[np.ndarray, " kinds"]
    y: Num[np.ndarray, " kinds"] | Bool[np.ndarray, " kinds"]
    times: Int[np.ndarray, " kinds"]
    starts: Int[np.ndarray, " classes"]


def _sums(
    d: Num[np.ndarray, "models examples"] | Bool[np.ndarray, "models examples"],
    p: Num[np.ndarray, "models examples"] | Bool[np.ndarray, "models examples"],
    sizes: Int[np.ndarray, " classes"],
    *,
    spread: bool = False,
) -> tuple[Float[np.ndarray, "models 2"], Float[np.ndarray, "2 2"], Float[np.ndarray, "2 2"]]:
    """(N, D) of every model; their jackknife covariance summed over models; and the sum of each model's own.

    With ``spread`` the first is D of the compressed model.
    """
    of_class = np.repeat(np.arange(len(sizes)), sizes)
    once = np.ones(len(of_class), np.int64)
    examples = _Kinds(of_class, once, once, once, np.cumsum(sizes) - sizes)
    each, without, own = [], np.zeros((2, len(of_class))), np.zeros((2, 2))
    for x, y in zip(d, p, strict=True):
        if x.dtype == y.dtype == bool:
            kinds, place = _four_kinds(x, y, of_class, len(sizes))
        else:
            kinds, place = examples._replace(x=x, y=y), np.arange(len(x))
        first = kinds._replace(x=kinds.y) if spread else kinds
        pair = np.stack([_leave_one_out(first, sizes), _leave_one_out(kinds._replace(y=kinds.x), sizes)])
        each.append(pair[:, -1])
        without += pair[:, :-1][:, place]
        own += _spread(pair[:, :-1], kinds, sizes)
    return np.array(each), _spread(without, examples, sizes), own


def _four_kinds(
    x: Bool[np.ndarray, " examples"],
    y: Bool[np.ndarray, " examples"],
    of_class: Int[np.ndarray, " examples"],
    classes: int,
) -> tuple[_Kinds, Int[np.ndarray, " examples"]]:
    """Both models wrong, one of them right, or both right, in each class; and the kind of every example."""
    kind = np.arange(4 * classes)
    place = 4 * of_class + 2 * x + y
    times = np.bincount(place, minlength=4 * classes)
    return _Kinds(kind // 4, kind // 2 % 2, kind % 2, times, 4 * np.arange(classes)), place


def _spread(
    values: Float[np.ndarray, "2 kinds"], kinds: _Kinds, sizes: Int[np.ndarray, " classes"]
) -> Float[np.ndarray, "2 2"]:
    """The stratified jackknife's covariance of two statistics, (2, kinds) without one example of each kind."""
    means = np.add.reduceat(values * kinds.times, kinds.starts, axis=1) / sizes
    deviations = values - means[:, kinds.of_class]
    return np.asarray((deviations * (kinds.times * ((sizes - 1) / sizes)[kinds.of_class])) @ deviations.T)


def _leave_one_out(kinds: _Kinds, sizes: Int[np.ndarray, " classes"]) -> Float[np.ndarray, " kinds_and_one"]:
    """The corrected sum over classes without one example of each kind, and, last, with all examples."""
    k, every, at = len(sizes), int(sizes.sum()), kinds.of_class
    x, y = kinds.x, kinds.y
    sx, sy, sxy = (np.add.reduceat(values * kinds.times, kinds.starts) for values in (x, y, x * y))
    n, r, s = sizes.astype(np.float64), sx / sizes, sy / sizes
    q = (sxy / n - r * s) / (n - 1)
    n1 = n[at] - 1
    r1, s1 = (sx[at] - x) / n1, (sy[at] - y) / n1
    q1 = ((sxy[at] - x * y) / n1 - r1 * s1) / (n1 - 1)

    def swap(whole: npt.NDArray[np.float64], part: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """A sum over classes with one class's term replaced, and the sum itself last."""
        return np.append(whole.sum() - whole[at] + part, whole.sum())

    count = np.append(np.full(len(at), every - 1.0), float(every))
    a, b = (np.append(total.sum() - values, total.sum()) / count for total, values in ((sx, x), (sy, y)))
    products = swap(r * s, r1 * s1) - b * swap(r, r1) - a * swap(s, s1) + k * a * b
    noise = swap(q, q1) - 2 * swap(n * q, n1 * q1) / count + k * swap(n**2 * q, n1**2 * q1) / count**2
    return np.asarray((products - noise) / (a * b))


def _second_order(
    d: Num[np.ndarray, "models examples"] | Bool[np.ndarray, "models examples"],
    p: Num[np.ndarray, "models examples"] | Bool[np.ndarray, "models examples"],
    sizes: Int[np.ndarray, " classes"],
    jackknifed: Float[np.ndarray, "2 2"],
) -> Float[np.ndarray, "2 2"]:
    """The variance that the jackknife counts twice: that of products of the deviations of two examples.

    At most half of the jackknife's variance is surplus, which also bounds the estimate. With few classes the sums are
    skewed and the surplus is poorly known: the share 1 - 1.75 / sqrt(classes) of it is subtracted, which in simulations
    covers 92 to 98% at a nominal 95% with 10 classes and with 100.
    """
    k, every = len(sizes), int(sizes.sum())
    x, y = d / d.mean(1, keepdims=True), p / p.mean(1, keepdims=True)
    w = sizes / every
    own = 1 - 2 * w + k * w**2
    surplus, scaled = np.zeros((2, 2)), [np.empty((k, len(d) ** 2)) for _ in range(4 if k <= _MOST_PAIRS else 0)]
    starts = np.cumsum(sizes) - sizes
    for n in np.unique(sizes):
        same = np.flatnonzero(sizes == n)
        for block in np.array_split(same, min(len(same), -(-len(same) * max(int(n), len(d)) // _BLOCK))):
            where = starts[block, None] + np.arange(n)
            u, v = (np.swapaxes(rows[:, where], 0, 1) for rows in (x, y))  # (classes, models, examples)
            u, v = (rows - rows.mean(2, keepdims=True) for rows in (u, v))
            ut, vt = (np.swapaxes(rows, 1, 2) for rows in (u, v))
            xx, xy, yy = u @ ut, u @ vt, v @ vt
            gx, gxy = (u * u).sum(1), (u * v).sum(1)
            dd = (xx**2).sum((1, 2)) - (gx**2).sum(1)
            nd = (xx * xy).sum((1, 2)) - (gx * gxy).sum(1)
            nn = ((xx * yy).sum((1, 2)) + (xy * np.swapaxes(xy, 1, 2)).sum((1, 2)) - 2 * (gxy**2).sum(1)) / 2
            weight = own[block] ** 2 * 2 / ((n - 1.0) * (n - 2)) ** 2
            surplus += np.array([[weight @ nn, weight @ nd], [weight @ nd, weight @ dd]])
            if scaled:
                for kept, part in zip(scaled, (xx, xy, np.swapaxes(xy, 1, 2), yy), strict=True):
                    kept[block] = part.reshape(len(block), -1) / ((n - 1.0) * n)
    if k <= _MOST_PAIRS:
        xx, xy, yx, yy = scaled
        cross = (-w[:, None] - w + k * w[:, None] * w) ** 2
        np.fill_diagonal(cross, 0.0)
        dd = 2 * (cross * (xx @ xx.T)).sum()
        nd = 2 * (cross * (xx @ xy.T)).sum()
        nn = (cross * (xx @ yy.T + xy @ yx.T)).sum()
        surplus += np.array([[nn, nd], [nd, dd]])
    largest = float(np.linalg.eigvals(np.linalg.pinv(jackknifed) @ surplus).real.max())
    share = max(0.0, 1 - 1.75 / np.sqrt(k))
    return share * min(1.0, 0.5 / largest) * surplus if largest > 0 else np.zeros((2, 2))


def _at(alpha: float, variance: Float[np.ndarray, "2 2"]) -> float:
    """The variance of N - alpha D."""
    return float(variance[0, 0] - 2 * alpha * variance[0, 1] + alpha**2 * variance[1, 1])


def _fieller(
    total: Float[np.ndarray, " 2"], variance: Float[np.ndarray, "2 2"], q: float
) -> tuple[float, float] | None:
    """Fieller's interval of the ratio of two totals; None where the denominator may be 0."""
    n, d = total
    a = d**2 - q**2 * variance[1, 1]
    if d <= 0 or a <= 1e-12 * d**2:
        return None
    b, c = n * d - q**2 * variance[0, 1], n**2 - q**2 * variance[0, 0]
    root = np.sqrt(max(b**2 - a * c, 0.0))
    return float((b - root) / a), float((b + root) / a)
