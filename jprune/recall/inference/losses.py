"""Lost and won examples of each class, and tests of whether a class lost more than all examples did.

Test examples and training seeds are two sources of variation. An example that one model loses is often lost by all, so
a test over models alone finds differences between classes where there are none. Here both variances are added; the part
of the variance between models that test noise explains is subtracted, so it is not counted twice. The variance between
models of a class's excess loss is at least the mean over the classes, weighted by their precision, and at least in
proportion to the square of r (1 - r) for a recall r: what a seed adds to the logits of a class moves a recall of 60%
eight times as far as one of 97%. In networks that differ in the seed alone, whose recalls are in
``experiments/results``, the variance grows with a power of r (1 - r) of 1.5 to 1.9. The interval of the change of a
class is the narrower of two: one has the class's own variance between models; the other has that of the overall loss,
and for the class's distance from it the larger of the class's own variance and the test noise times the mean over the
classes of how much more the models differ. In simulations with equal and unequal classes, one of which may vary alone,
99% intervals miss in 1 to 3% of cases with 2 to 10 models.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import scipy.optimize
import scipy.special
import scipy.stats
from jaxtyping import Bool, Float, Int

from jprune.recall.inference.intervals import holm

_POWER = 0.9
_MOST_CELLS = 4_000_000  # of the joint distribution of lost and won examples

_Floats = npt.NDArray[np.float64]


class ClassLosses(NamedTuple):
    """Losses of every class, or of every group of examples; every field has the shape (classes,).

    Attributes:
      support: number of examples.
      lost: examples right before and wrong after compression, mean over models.
      won: examples wrong before and right after.
      change: recall after minus recall before.
      change_low: lower end of its interval over examples and models, at least -1; NaN with fewer than two examples.
      change_high: upper end, at most 1.
      excess: recall lost beyond what all examples lost together; positive is worse.
      excess_low: lower end of its interval.
      excess_high: upper end.
      p: two-sided, of no excess.
      p_holm: corrected over the classes by Holm's method.
      detectable: the smallest excess that would have been shown nine times in ten; NaN where not even the loss of
        every example that was right would have been shown, as with two models that differ much.
    """

    support: Int[np.ndarray, " classes"]
    lost: Float[np.ndarray, " classes"]
    won: Float[np.ndarray, " classes"]
    change: Float[np.ndarray, " classes"]
    change_low: Float[np.ndarray, " classes"]
    change_high: Float[np.ndarray, " classes"]
    excess: Float[np.ndarray, " classes"]
    excess_low: Float[np.ndarray, " classes"]
    excess_high: Float[np.ndarray, " classes"]
    p: Float[np.ndarray, " classes"]
    p_holm: Float[np.ndarray, " classes"]
    detectable: Float[np.ndarray, " classes"]


def class_losses(
    classes_of: Int[np.ndarray, " examples"],
    dense_correct: Bool[np.ndarray, "dense_models examples"],
    correct: Bool[np.ndarray, "models examples"],
    classes: int,
    *,
    paired: bool = True,
    level: float = 0.99,
) -> ClassLosses:
    """Compare the examples lost in each class with those lost overall.

    With one model before and one after compression the p-value is exact: given how many examples were lost and won
    in all, those of a class are a draw without replacement. It is never smaller than that of a z test with the
    class's own variance, which holds where classes differ in how much changes without a net loss. With several
    models it is that of a t statistic whose variance is over examples and models.

    Args:
      classes_of: the class or group of every example, 0..classes-1.
      dense_correct: whether each dense model is right about each example.
      correct: the same after compression.
      classes: number of classes.
      paired: whether model m was made from dense model m.
      level: confidence level of the intervals.

    >>> labels = np.repeat([0, 1], 50)
    >>> dense, after = np.ones((1, 100), bool), (np.arange(100) < 80)[None]
    >>> found = class_losses(labels, dense, after, 2)
    >>> found.lost.tolist(), found.excess.round(2).tolist(), bool(found.p_holm[1] < 0.01)
    ([0.0, 20.0], [-0.2, 0.2], True)
    """
    support = np.bincount(classes_of, minlength=classes)
    n = np.where(support > 0, support, np.nan)

    def of_class(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        return np.bincount(classes_of, values, classes).astype(np.float64)

    lost, won = map(of_class, lost_and_won(dense_correct, correct, paired=paired))
    # In whole numbers, so that a class that lost as much as it won has a change of exactly 0.
    before, after = len(dense_correct), len(correct)
    net = (dense_correct.sum(0) * after - correct.sum(0) * before).astype(np.float64)
    losses = net / (before * after)
    mean, w = of_class(net) / (before * after) / n, support / support.sum()
    shared = _shared(dense_correct, correct, losses, paired=paired)
    # Two pseudo-examples, one lost and one won by as many models as share a lost example, keep a class in which
    # nothing changed from having a variance of 0.
    of_change = ((of_class(losses**2) + 2 * shared) / (n + 2) - (of_class(losses) / (n + 2)) ** 2) / (n + 2)
    # Without a difference between classes all have one variance; a class with less of it by chance must not stand out.
    of_excess = _of_excess(np.maximum(of_change, float(losses.var()) / n), w)
    models = between_models(classes_of, dense_correct, correct, n, paired=paired)
    # Few models may look alike by chance, and then their number limits the degrees of freedom all the same.
    pooled = models.degrees * max(1, int((support > 0).sum()) - 1)
    # The variance between models of one class alone has only the degrees of the models.
    alone = np.where(models.dispersion > models.common, models.degrees, pooled)
    change, excess = (
        _Variance(variance + added, np.minimum(_degrees(variance, added, n, degrees, least), pooled))
        for variance, added, degrees, least in (
            (of_change, np.maximum(models.dispersion, models.common), alone, 0.0),
            (of_excess, models.excess, pooled, models.uncertainty),
        )
    )
    in_common = _Variance(np.maximum(of_change - models.noise, 0), np.maximum(n - 1, 1))
    of_classes = _half((1 - level) / 2, in_common, *models.change_with_noise)
    half = np.minimum(of_classes, _half((1 - level) / 2, change, *models.overall))
    gap = mean - float(losses.mean())
    with np.errstate(invalid="ignore", divide="ignore"):
        statistic = np.abs(gap) / np.sqrt(excess.total)
        if len(correct) == len(dense_correct) == 1:
            p = np.maximum(2 * scipy.stats.norm.sf(statistic), _exact(support, lost, won))
        else:
            p = 2 * np.asarray(scipy.stats.t.sf(statistic, excess.degrees))
    p = np.where(np.isfinite(gap) & (n > 1), np.minimum(p, 1), np.nan)
    if (support > 0).sum() < 2:
        p = np.full(classes, np.nan)
    tests = max(1, int(np.isfinite(p).sum()))
    critical = np.asarray(scipy.stats.t.isf((1 - level) / 2 / tests, excess.degrees))
    quantiles = critical + scipy.stats.norm.ppf(_POWER)
    detectable = _detectable(quantiles, excess.total, float(losses.mean()), (1 - w) ** 2 / n)
    # A class loses at most its recall, and what it loses counts in the overall loss too.
    recall = of_class(dense_correct.mean(0)) / n
    possible = recall - (float(losses.mean()) + w * (recall - mean))
    return ClassLosses(
        support,
        np.where(support > 0, lost, np.nan),
        np.where(support > 0, won, np.nan),
        -mean,
        *_interval(-mean, half, bound=1),  # recalls lie in 0..1
        gap,
        *_interval(gap, _half((1 - level) / 2, excess), bound=2),
        p,
        holm(p),
        np.where(detectable <= possible, detectable, np.nan),
    )


class _Variance(NamedTuple):
    """The variance of an estimate for each class, over examples and models, and its degrees of freedom."""

    total: _Floats
    degrees: _Floats


def change_of_all(
    dense_correct: Bool[np.ndarray, "dense_models examples"],
    correct: Bool[np.ndarray, "models examples"],
    *,
    paired: bool = True,
) -> float:
    """Two-sided p-value of no change of accuracy, over test examples and models; NaN with fewer than two examples.

    With one model before and one after compression it is McNemar's. Otherwise 1 - p is the confidence of the interval
    that ends at 0. The square of its half-width is the sum of those over examples and between models, each with its own
    quantile (Graybill and Wang, "Confidence Intervals on Nonnegative Linear Combinations of Variances", Journal of the
    American Statistical Association 1980).

    >>> dense, after = np.ones((1, 20), bool), (np.arange(20) >= 8)[None]
    >>> round(change_of_all(dense, after), 4) == round(mcnemar(8, 0), 4)
    True
    """
    if len(dense_correct) == len(correct) == 1:
        return mcnemar(int((dense_correct & ~correct).sum()), int((~dense_correct & correct).sum()))
    losses = dense_correct.mean(0) - correct.mean(0)
    n = np.array([float(len(losses))])
    if n < 2:
        return float("nan")
    if losses.mean() == 0:
        return 1.0
    models = between_models(np.zeros(len(losses), np.int64), dense_correct, correct, n, paired=paired)
    shared = _Variance(np.maximum(losses.var(ddof=1) / n - models.noise, 0), n - 1)
    change = abs(float(losses.mean()))

    def beyond(log_p: float) -> float:
        """How far 0 is inside the interval at the confidence 1 - p."""
        return float(_half(np.exp(log_p) / 2, shared, *models.overall)[0]) - change

    least = np.log(1e-300)
    if beyond(least) <= 0:  # all examples lost by as many models: no variance
        return 0.0
    return float(np.exp(scipy.optimize.brentq(beyond, least, 0.0)))


def lost_and_won(
    before: Bool[np.ndarray, "dense_models examples"], after: Bool[np.ndarray, "models examples"], *, paired: bool
) -> tuple[_Floats, _Floats]:
    """The share of models that lost each example, and of those that won it; of all pairs of models unless paired.

    >>> lost, won = lost_and_won(np.array([[True], [True], [False]]), np.array([[False], [False], [True]]), paired=True)
    >>> lost.round(2), won.round(2)
    (array([0.67]), array([0.33]))
    """
    if paired:
        return (before & ~after).mean(0), (~before & after).mean(0)
    return before.mean(0) * (1 - after.mean(0)), (1 - before.mean(0)) * after.mean(0)


def mcnemar(lost: int, won: int) -> float:
    """Two-sided McNemar test with the mid-p correction: are as many examples lost as won?

    Fagerland, Lydersen and Laake, "The McNemar test for binary matched-pairs data: mid-p and asymptotic are better
    than exact conditional" (BMC Medical Research Methodology 2013).

    Args:
      lost: examples right before and wrong after.
      won: examples wrong before and right after.

    >>> round(mcnemar(8, 1), 4)
    0.0215
    """
    total = lost + won
    if total == 0:
        return 1.0
    fewer = min(lost, won)
    return float(min(1.0, 2 * scipy.stats.binom.cdf(fewer, total, 0.5) - scipy.stats.binom.pmf(fewer, total, 0.5)))


def wilson(successes: int, trials: int, level: float = 0.99) -> tuple[float, float]:
    """Wilson's score interval for a share (Wilson 1927); NaN without a trial.

    >>> [round(end, 4) for end in wilson(3, 10, 0.95)]
    [0.1078, 0.6032]
    """
    if trials == 0:
        return float("nan"), float("nan")
    z = scipy.stats.norm.isf((1 - level) / 2)
    share, extra = successes / trials, z**2 / trials
    centre = (share + extra / 2) / (1 + extra)
    half = z / (1 + extra) * np.sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    return max(0.0, float(centre - half)), min(1.0, float(centre + half))


def _shared(
    before: Bool[np.ndarray, "dense_models examples"],
    after: Bool[np.ndarray, "models examples"],
    losses: _Floats,
    *,
    paired: bool,
) -> float:
    """The share of the models that lose an example which one of them loses; at least one model."""
    if paired:
        changed = float((before != after).mean())
    else:
        lost, won = lost_and_won(before, after, paired=False)
        changed = float((lost + won).mean())
    return max(1 / len(after), min(1.0, float((losses**2).mean()) / changed)) if changed > 0 else 1.0


def _half(tail: float, *parts: _Variance) -> _Floats:
    """Half of the width of an interval whose variance is a sum; each part has its own quantile, of this upper tail."""
    halves = [
        np.sqrt(part.total) * np.where(part.total > 0, scipy.stats.t.isf(tail, part.degrees), 0) for part in parts
    ]
    return np.asarray(np.hypot.reduce(np.broadcast_arrays(*halves)))


def _interval(estimate: _Floats, half: _Floats, bound: float) -> tuple[_Floats, _Floats]:
    """The interval of an estimate that lies between -bound and bound."""
    return np.maximum(estimate - half, -bound), np.minimum(estimate + half, bound)


def _detectable(quantiles: _Floats, variance: _Floats, loss: float, per_loss: _Floats) -> _Floats:
    """The excess loss e that is ``quantiles`` standard deviations from 0.

    A class that loses e more than the overall ``loss`` has another variance than ``variance``: the mean of its losses
    and that of their squares grow by e, if all models lose the same examples, which is the worst case. So e solves
    e^2 = quantiles^2 (variance + per_loss (e (1 - 2 loss) - e^2)).

    >>> e = _detectable(np.array([4.0]), np.array([0.0003]), 0.0, np.array([0.01]))
    >>> e.round(4).tolist(), (4 * np.sqrt(0.0003 + 0.01 * e * (1 - e))).round(4).tolist()
    ([0.1633], [0.1633])
    """
    with np.errstate(invalid="ignore"):
        a, b = 1 + quantiles**2 * per_loss, quantiles**2 * per_loss * (1 - 2 * loss)
        return np.asarray((b + np.sqrt(b**2 + 4 * a * quantiles**2 * variance)) / (2 * a))


def _of_excess(of_class: _Floats, w: _Floats) -> _Floats:
    """The variance of a class's mean minus the overall mean, from the variances of the class means."""
    known = np.where(np.isnan(of_class), 0, of_class)
    whole = (known * w**2).sum(-1, keepdims=True)
    return np.asarray(of_class * (1 - w) ** 2 + whole - known * w**2)


class BetweenModels(NamedTuple):
    """The variance between models of the mean of a set, or of the difference of two means.

    Attributes:
      change: of the change of every class, beyond test noise.
      excess: of the excess of every class, beyond test noise, and at least what all classes say of it, if it is the
        same in all and if it is in proportion to the square of r (1 - r) for recalls r. Both are fitted with the
        weights of least variance: small classes, whose test noise is large, count little.
      dispersion: of the excess of every class, beyond test noise, from this class alone; 0 or more.
      common: the same if all classes have it in the same proportion to their test noise.
      noise: what test noise explains of the variance of the change of every class.
      change_with_noise: of the change of every class with test noise, for each set of two models or more.
      overall: of the overall loss with test noise, for each of these sets.
      degrees: one less than the number of models in the smallest of these sets; infinite if there is none.
      uncertainty: half of the variance of what is fitted; it matters for large classes, where it is not small next to
        the test noise.
    """

    change: _Floats
    excess: _Floats
    dispersion: _Floats
    common: _Floats
    noise: _Floats
    change_with_noise: tuple[_Variance, ...]
    overall: tuple[_Variance, ...]
    degrees: float
    uncertainty: _Floats


def between_models(
    classes_of: Int[np.ndarray, " examples"],
    dense: Bool[np.ndarray, "dense_models examples"],
    after: Bool[np.ndarray, "models examples"],
    n: _Floats,
    *,
    paired: bool,
) -> BetweenModels:
    """Estimate how much the changes and excesses of classes vary between models; a single unpaired model is fixed.

    A few models give a poor estimate for a single class, and with many classes one of them looks far too certain. So
    no excess is taken to vary less between models than those of all classes suggest, whose degrees are those of all.
    """
    w = np.nan_to_num(n) / np.nansum(n)
    excess, noise_change, noise_excess = np.zeros((3, len(n)))
    sets = [dense.astype(np.int8) - after] if paired else [dense.astype(np.int8), after.astype(np.int8)]
    sets = [values for values in sets if len(values) > 1]
    changes, overall = [], []
    for values in sets:
        models, degrees = len(values), np.array(len(values) - 1.0)
        means = np.stack([np.bincount(classes_of, row, len(n)) for row in values]) / n
        of_all = (np.where(np.isnan(means), 0, means) * w).sum(1, keepdims=True)
        # Two models often lose exactly as many examples, by chance: a count is known up to rounding, of variance 1/12.
        of_overall = np.maximum(of_all.var(0, ddof=1), 1 / 12 / np.nansum(n) ** 2)
        overall.append(_Variance(of_overall / models, degrees))
        changes.append(_Variance(means.var(0, ddof=1) / models, degrees))
        excess = excess + (means - of_all).var(0, ddof=1) / models
        noise = _own_noise(classes_of, values, n) / models
        noise_change, noise_excess = noise_change + noise, noise_excess + _of_excess(noise, w)
    own = excess - noise_excess
    fewest = min((float(part.degrees) for part in overall), default=np.inf)
    varied = [dense, after] if paired else [values for values in (dense, after) if len(values) > 1]
    binomial = [_binomial(classes_of, values, n) for values in varied] or [np.ones(len(n))]
    # The test noise expected of every class, which is not small by chance as that of a class itself may be.
    share = np.mean(binomial, axis=0) / n
    each = float(np.nansum(noise_change * n**2)) / (float(np.nansum(share * n**2)) or 1.0)
    expected = _of_excess(share * each, w)
    least, uncertainty = np.zeros((2, len(n)))
    if np.nanmax(expected) > 0:
        for shape in (n / n, _of_excess(np.mean(np.square(binomial), axis=0), w)):
            proportional, of_shape = _in_proportion(own, shape, expected, fewest)
            uncertainty = np.where(proportional >= least, of_shape, uncertainty)
            least = np.maximum(least, proportional)
    most = max(0.0, float(np.nansum(own) / np.nansum(noise_excess))) if np.nansum(noise_excess) > 0 else 0.0
    return BetweenModels(
        np.maximum(sum(part.total for part in changes) - noise_change, 0),
        np.maximum(own, least),
        np.maximum(own, 0),
        most * noise_excess,
        noise_change,
        tuple(changes),
        tuple(overall),
        fewest,
        uncertainty,
    )


def _binomial(
    classes_of: Int[np.ndarray, " examples"], right: Bool[np.ndarray, "models examples"], n: _Floats
) -> _Floats:
    """The recall r of every class times 1 - r, with one more example of the accuracy, so that it is not 0."""
    of_example = right.mean(0)
    recall = (np.bincount(classes_of, of_example, len(n)) + of_example.mean()) / (n + 1)
    return np.asarray(recall * (1 - recall))


def _in_proportion(own: _Floats, shape: _Floats, noise: _Floats, degrees: float) -> tuple[_Floats, _Floats]:
    """Fit estimates ``own`` of variances by a multiple of ``shape``; return it, and half of its variance.

    The weights are those of least variance: an estimate has that of a variance, the multiple and its test noise
    together, which is known with ``degrees`` of freedom.

    >>> fitted, _ = _in_proportion(np.array([1.0, 3.0]), np.ones(2), np.ones(2), 2.0)
    >>> fitted.tolist()
    [2.0, 2.0]
    """
    multiple, weight = 0.0, shape
    for _ in range(3):
        weight = (shape / (multiple * shape + noise)) ** 2
        multiple = max(0.0, float(np.nansum(weight * own / shape) / np.nansum(weight)))
    alike = float(np.nansum(weight) ** 2 / np.nansum(weight**2))  # that many classes of one weight
    lost = alike / max(alike - 1, alike / 2)  # the mean over the classes is estimated too
    return multiple * shape, lost * shape**2 / (np.nansum(weight) * degrees)


def _own_noise(
    classes_of: Int[np.ndarray, " examples"], values: Int[np.ndarray, "models examples"], n: _Floats
) -> _Floats:
    """The variance of a model's class means that comes from examples on which it differs from the other models.

    An example that all models lose adds nothing to the variance between models, so it is not counted.

    >>> _own_noise(np.array([0, 0, 1]), np.array([[1, 0, 1], [1, 0, 0]]), np.array([2.0, 1.0])).tolist()
    [0.0, 0.5]
    """
    models = len(values)
    total, squares = values.sum(0, dtype=np.float64), (values * values).sum(0, dtype=np.float64)
    return np.asarray(np.bincount(classes_of, (squares - total**2 / models) / (models - 1), len(n)) / n**2)


def _degrees(
    of_examples: _Floats, added: _Floats, n: _Floats, degrees: float | _Floats, least: float | _Floats
) -> _Floats:
    """Satterthwaite's degrees of freedom of the sum of both variances; the second is known to ``least`` at best."""
    with np.errstate(invalid="ignore", divide="ignore"):
        spread = of_examples**2 / np.where(n > 1, n - 1, np.nan) + np.maximum(added**2 / degrees, least)
        return np.asarray((of_examples + added) ** 2 / spread)


def _exact(support: Int[np.ndarray, " classes"], lost: _Floats, won: _Floats) -> _Floats:
    """Two-sided p of each class's net loss, given the lost and won examples of all classes together."""
    every, all_lost, all_won = int(support.sum()), round(lost.sum()), round(won.sum())
    found = np.full(len(support), np.nan)
    for size in np.unique(support[support > 0]):  # classes of one size have one distribution
        of_size = support == size
        i, j = (_likely(int(size), every, number) for number in (all_lost, all_won))
        if len(i) * len(j) > _MOST_CELLS:
            found[of_size] = 0.0  # the z test decides
            continue
        joint = _joint(int(size), (all_lost, all_won, every - all_lost - all_won), i, j)
        of_net = np.bincount((i[:, None] - j + j[-1] - i[0]).ravel(), joint.ravel())
        at_most, at_least = np.cumsum(of_net), np.cumsum(of_net[::-1])[::-1]
        place = (np.round(lost[of_size]) - np.round(won[of_size])).astype(np.int64) + j[-1] - i[0]
        p = 2 * np.minimum(at_most, at_least)[np.clip(place, 0, len(of_net) - 1)]
        found[of_size] = np.where((place >= 0) & (place < len(of_net)), np.minimum(1.0, p), 0.0)
    return found


def _likely(size: int, every: int, number: int) -> Int[np.ndarray, " counts"]:
    """How many of ``number`` examples a class of a size may have, without counts of a probability below 1e-25."""
    mean = size * number / every
    half = 30 + 12 * np.sqrt(mean * (1 - number / every))
    least, most = max(0, size + number - every), min(size, number)
    return np.arange(max(least, int(mean - half)), min(most, int(mean + half)) + 1)


def _joint(
    size: int, numbers: tuple[int, int, int], i: Int[np.ndarray, " a"], j: Int[np.ndarray, " b"]
) -> Float[np.ndarray, "a b"]:
    """The probabilities that a class of a size has i of the lost and j of the won examples, which sum to 1.

    They are those of the multivariate hypergeometric distribution, from one table of log binomial coefficients for
    each kind of example; ``scipy.stats.hypergeom`` takes a thousand times as long for every cell.

    Args:
      size: examples of the class.
      numbers: lost, won and other examples of all classes.
      i: numbers of lost examples.
      j: numbers of won examples.
    """
    lost, won, others = numbers
    rest = size - i[:, None] - j
    possible = (rest >= 0) & (rest <= others)
    of_rest = _log_choose(others, np.arange(min(size, others) + 1))
    log_p = _log_choose(lost, i)[:, None] + _log_choose(won, j) + of_rest[np.where(possible, rest, 0)]
    weights = np.exp(np.where(possible, log_p - log_p[possible].max(), -np.inf))
    return np.asarray(weights / weights.sum())


def _log_choose(n: int, k: Int[np.ndarray, " numbers"]) -> _Floats:
    """The logarithms of the binomial coefficients n over k."""
    return np.asarray(scipy.special.gammaln(n + 1) - scipy.special.gammaln(k + 1) - scipy.special.gammaln(n - k + 1))
