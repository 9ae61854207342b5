"""What a verdict is, and the tests and intervals that the verdicts on both papers share.

A verdict is ``supported``, ``contradicted`` (the interval or test excludes the claim), ``does not carry over`` (the
claim was published for other networks and is not found on these), ``open`` (the data are inconclusive; the smallest
effect detectable with a power of 80% is given) or ``not run`` (fewer than two networks have every ratio). Verdicts use
the networks that have run, even if more were planned. Decisions made after the results were seen are labelled with
their date.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

LEVEL = 0.01  # of the tests, unless the plan names another


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


def not_run(name: str, question: str) -> Verdict:
    """Return the verdict on a question whose networks have not run."""
    return Verdict(name, question, "", "not run")


def smallest(*effects: float, digits: int = 3) -> str:
    """Say which effects the tests could have found.

    Where all differences are equal, as between networks that all collapsed, it cannot be known.

    >>> smallest(0.0391)
    'smallest effect found with a chance of 80%: 0.039'
    >>> smallest(0.2, 0.0, digits=1)
    'smallest effects found with a chance of 80%: 0.2, unknown for want of spread'
    """
    named = ", ".join(f"{effect:.{digits}f}" if effect > 0 else "unknown for want of spread" for effect in effects)
    return f"smallest effect{'s' if len(effects) > 1 else ''} found with a chance of 80%: {named}"


def detectable(a: pd.Series, b: pd.Series | None = None, tests: int = 1, sides: int = 2) -> float:
    """Return the smallest true difference that a t test at 1% detects with a power of 80%.

    Args:
      a: differences of pairs; or one of two independent samples.
      b: the other sample.
      tests: Bonferroni's divisor.
      sides: sides of the test, 1 or 2.
    """
    if b is None:
        df, error = len(a) - 1, a.std(ddof=1) / np.sqrt(len(a))
    else:
        df, error = len(a) + len(b) - 2, np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
    return float((stats.t.isf(LEVEL / tests / sides, df) + stats.t.isf(0.2, df)) * error)


def detectable_from(low: float, high: float, networks: int, level: float = 0.99) -> float:
    """Return the smallest true mean that a t interval of this width excludes 0 for, with a power of 80%."""
    df = networks - 1
    quantile = stats.t.isf((1 - level) / 2, df)
    return float((1 + stats.t.isf(0.2, df) / quantile) * (high - low) / 2)


def sign_test(wins: int, losses: int) -> float:
    """Return the two-sided p-value of the sign test, 1 if there is nothing to test."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def least_split(units: int, level: float = 0.05, tests: int = 1) -> str:
    """Say what a sign test needs, with p multiplied by the number of tests.

    >>> least_split(4), least_split(6), least_split(9)
    ('with 4 units p is never below .05', 'p below .05 needs 6 of 6 units', 'p below .05 needs 8 of 9 units')
    """
    least = f"{level:.2f}".removeprefix("0")
    enough = [wins for wins in range(units // 2 + 1, units + 1) if tests * sign_test(wins, units - wins) < level]
    if enough:
        return f"p below {least} needs {enough[0]} of {units} units"
    return f"with {units} unit{'s' if units != 1 else ''} p is never below {least}"


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


def shown_p(value: float) -> str:
    """Format a p-value."""
    return f"{value:.1e}" if value < 1e-3 else f"{value:.3f}"
