import numpy as np
import pytest
from statsmodels.stats.power import TTestIndPower, TTestPower

from jprune import recall

ALTERNATIVES = {"two-sided": "two-sided", "greater": "larger", "less": "smaller"}


@pytest.mark.parametrize("alternative", ALTERNATIVES)
@pytest.mark.parametrize("difference", [-0.4, 0.05, 0.5])
@pytest.mark.parametrize("models", [2, 5, 30])
def test_power_is_that_of_statsmodels(models, difference, alternative):
    args = {"alpha": 0.05, "alternative": ALTERNATIVES[alternative]}
    paired = recall.power(models, 2 * difference, 2.0, alpha=0.05, alternative=alternative)
    assert paired == pytest.approx(TTestPower().power(difference, models, **args), abs=1e-9)
    independent = recall.power(models, difference, 1.0, alpha=0.05, design="independent", alternative=alternative)
    assert independent == pytest.approx(TTestIndPower().power(difference, models, **args), abs=1e-9)


def test_power_is_how_often_the_paired_test_rejects():
    rng = np.random.default_rng(0)
    draws = 0.05 + 0.09 * rng.normal(size=(3_000, 12))
    statistic = draws.mean(-1) / (draws.std(-1, ddof=1) / 12**0.5)
    rejected = (statistic > 1.795885).mean()  # t(0.95, 11)
    expected = recall.power(12, 0.05, 0.09, alpha=0.05, alternative="greater")
    assert rejected == pytest.approx(expected, abs=0.027)  # three standard errors


def test_without_a_difference_power_is_the_level():
    assert recall.power(10, 0.0, 1.0, alpha=0.03) == pytest.approx(0.03)


@pytest.mark.parametrize("design", ["paired", "independent"])
@pytest.mark.parametrize(("difference", "sd", "chance"), [(0.05, 0.09, 0.9), (1.0, 0.1, 0.99), (0.01, 0.2, 0.8)])
def test_one_replicate_fewer_than_needed_is_too_few(design, difference, sd, chance):
    needed = recall.replicates_needed(difference, sd, chance=chance, design=design)
    assert recall.power(needed, difference, sd, design=design) >= chance
    assert needed == 2 or recall.power(needed - 1, difference, sd, design=design) < chance


def test_replicates_needed_round_up_what_statsmodels_solves():
    solved = TTestPower().solve_power(0.05 / 0.09, alpha=0.01, power=0.9)
    assert recall.replicates_needed(0.05, 0.09) == np.ceil(solved) == 52


def test_the_sign_of_a_difference_only_matters_one_sided():
    assert recall.replicates_needed(-0.05, 0.09) == recall.replicates_needed(0.05, 0.09)
    one_sided = recall.replicates_needed(-0.05, 0.09, alternative="less")
    assert one_sided == recall.replicates_needed(0.05, 0.09, alternative="greater") < 52


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: recall.power(1, 0.1, 1.0), "models must be at least 2, got 1"),
        (lambda: recall.power(5, 0.1, 0.0), "sd must be positive, got 0.0"),
        (lambda: recall.power(5, 0.1, np.nan), "sd must be positive, got nan"),
        (lambda: recall.power(5, 0.1, 1.0, alpha=0.0), "alpha must lie strictly between 0 and 1, got 0.0"),
        (lambda: recall.replicates_needed(0.0, 1.0), "no number of replicates can show a difference of 0.0"),
        (lambda: recall.replicates_needed(-0.1, 1.0, alternative="greater"), "no number of replicates"),
        (lambda: recall.replicates_needed(0.1, 1.0, chance=0.01), "chance must lie strictly between alpha=0.01 and 1"),
        (lambda: recall.replicates_needed(1e-3, 1.0, most=1000), "more than most=1000"),
    ],
)
def test_invalid_power_arguments_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
