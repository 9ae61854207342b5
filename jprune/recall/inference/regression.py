"""Models of alpha over ratios and scores: a mixed model, and a comparison at equal accuracy.

statsmodels does the fitting and is imported here only when one of them is called; it comes with the
extra `report`.
"""

import warnings
from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from jprune._extras import missing
from jprune.recall.inputs.arguments import check_level


class MixedModel(NamedTuple):
    """A fit of alpha ~ ratio * score + (1 | model).

    Attributes:
      coefficients: one row per fixed effect: term, estimate, standard_error, z, p_value, low, high.
        Without an answer it has no rows.
      model_variance: variance of the random intercepts; NaN without an answer.
      residual_variance: variance of the residuals; NaN without an answer.
      models: number of models.
      observations: number of alphas in the fit.
      left_out: number of alphas left out because they are NaN.
      note: warnings of the optimizer (a variance at 0, no convergence); empty if there are none.
      reason: why there is no answer; empty if there is one.
    """

    coefficients: pd.DataFrame
    model_variance: float
    residual_variance: float
    models: int
    observations: int
    left_out: int
    note: str
    reason: str


class EqualAccuracy(NamedTuple):
    """Two scores compared at equal alpha_null, that is at equal loss of accuracy.

    Attributes:
      difference: log alpha (alpha, without ``logarithm``) of score ``b`` minus that of score ``a`` at
        equal alpha_null.
      low: lower end of its interval.
      high: upper end.
      p_value: of no difference, two-sided.
      slope: of log alpha on log alpha_null, common to both scores.
      parallel_p_value: of equal slopes; when it is small, one difference does not describe the two.
      r2: share of the variance that both explain.
      observations: number of alphas in the fit.
      models: number of models (clusters) that they come from.
      left_out: number of rows left out because alpha or alpha_null is NaN.
      reason: why there is no answer (NaN); empty if there is one.
    """

    difference: float
    low: float
    high: float
    p_value: float
    slope: float
    parallel_p_value: float
    r2: float
    observations: int
    models: int
    left_out: int
    reason: str


def mixed_model(frame: pd.DataFrame, *, level: float = 0.99, reference: str | None = None) -> MixedModel:
    """Fit alpha ~ ratio * score + (1 | model) by restricted maximum likelihood.

    The random intercept models what the alphas of one dense checkpoint share. The ratio is a
    number; if alpha is not linear in it, pass a transformed ratio (such as its logarithm) in that column.
    With a single score the fixed effects are the ratio alone.

    Args:
      frame: columns alpha, ratio (numbers), score and model; the same value of model marks the same
        dense checkpoint, across scores too. Rows with a NaN alpha or ratio are left out and counted.
      level: confidence level of the intervals of the coefficients.
      reference: the score that the others are compared with; the alphabetically first by default.

    Raises:
      ImportError: statsmodels is not installed.
      ValueError: a column is missing, a ratio or alpha is infinite, a score or model is missing, or
        ``reference`` is not a score of the frame.

    >>> rng = np.random.default_rng(0)
    >>> model, ratio = np.repeat(np.arange(20), 3), np.tile([2.0, 4.0, 10.0], 20)
    >>> alpha = 0.9 + 0.02 * ratio + 0.01 * rng.normal(size=20)[model] + 0.002 * rng.normal(size=60)
    >>> fit = mixed_model(pd.DataFrame({"alpha": alpha, "ratio": ratio, "score": "magnitude", "model": model}))
    >>> fit.coefficients.term.tolist(), fit.coefficients.estimate.round(2).tolist()
    (['Intercept', 'ratio'], [0.9, 0.02])
    """
    formulas = _statsmodels_formulas()
    check_level(level)
    table, left_out = _table(frame, ("alpha", "ratio"), ("score", "model"))
    scores = sorted(table["score"].astype(str).unique())
    if reference is not None and reference not in scores:
        raise ValueError(f"reference must be one of the scores {scores}, got {reference!r}")
    counted = {"models": int(table["model"].nunique()), "observations": len(table), "left_out": left_out}
    reason = ""
    if counted["models"] < 2:
        reason = "fewer than two models"
    elif len(table) == counted["models"]:
        reason = "no model has more than one alpha"
    elif table.groupby("score")["ratio"].nunique().min() < 2:
        reason = "a score has fewer than two ratios"
    elif len(table) <= 2 * len(scores) + 1:
        reason = "no more alphas than coefficients"
    empty = pd.DataFrame({column: pd.Series(dtype=float) for column in _COEFFICIENTS}).astype({"term": str})
    out = MixedModel(empty, float("nan"), float("nan"), **counted, note="", reason=reason)
    if reason:
        return out
    table["score"] = pd.Categorical(
        table["score"].astype(str), categories=sorted(scores, key=lambda score: (score != reference, score))
    )
    formula = "alpha ~ ratio * score" if len(scores) > 1 else "alpha ~ ratio"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit = formulas.mixedlm(formula, table, groups=table["model"]).fit(reml=True)
        except np.linalg.LinAlgError as error:
            return out._replace(reason=f"the fit is singular: {error}")
    note = "; ".join(dict.fromkeys(str(warning.message).strip() for warning in caught))
    if not np.isfinite(fit.bse_fe).all():
        return out._replace(
            note=note, reason="the standard errors are undefined, the alphas having no residual variance"
        )
    low, high = fit.conf_int(alpha=1 - level).loc[fit.fe_params.index].to_numpy().T
    columns = (fit.fe_params.index, fit.fe_params, fit.bse_fe, fit.tvalues, fit.pvalues, low, high)
    coefficients = pd.DataFrame(
        {name: np.asarray(column)[: len(low)] for name, column in zip(_COEFFICIENTS, columns, strict=True)}
    )
    return out._replace(
        coefficients=coefficients,
        model_variance=float(fit.cov_re.iloc[0, 0]),
        residual_variance=float(fit.scale),
        note=note,
    )


def compare_at_equal_accuracy(
    frame: pd.DataFrame, a: str, b: str, *, level: float = 0.99, logarithm: bool = True
) -> EqualAccuracy:
    """Compare the alphas of two scores at equal loss of accuracy, by analysis of covariance on alpha_null.

    Least squares of log alpha on log alpha_null and the score, with standard errors clustered by
    model and t quantiles on (models - 1) degrees of freedom, since the alphas of one dense
    checkpoint at several ratios are not independent.

    Args:
      frame: columns alpha, alpha_null, score and model; the same value of model marks the same dense
        checkpoint, across scores too. Rows with a NaN are left out and counted.
      a: the reference score.
      b: the score that is compared with it.
      level: confidence level of the interval.
      logarithm: work on logarithms, on which alpha follows alpha_null closely in the published runs;
        False uses the numbers themselves, which is needed if an alpha is not positive.

    Raises:
      ImportError: statsmodels is not installed.
      ValueError: a column or score is missing, a value is infinite, or an alpha is not positive
        with ``logarithm``.

    >>> rng = np.random.default_rng(0)
    >>> null = np.tile([1.1, 1.3, 2.0], 40)
    >>> frame = pd.DataFrame({
    ...     "alpha": null**0.8 * np.repeat([1.0, 0.95], 60) * np.exp(0.001 * rng.normal(size=120)),
    ...     "alpha_null": null,
    ...     "score": np.repeat(["magnitude", "undecayed"], 60),
    ...     "model": np.tile(np.arange(20).repeat(3), 2),
    ... })
    >>> result = compare_at_equal_accuracy(frame, "magnitude", "undecayed")
    >>> round(result.difference, 2), round(result.slope, 2), result.p_value < 0.01
    (-0.05, 0.8, True)
    """
    formulas = _statsmodels_formulas()
    check_level(level)
    table, left_out = _table(frame, ("alpha", "alpha_null"), ("score", "model"), of_scores=(a, b))
    table["second"] = (table["score"].astype(str) == b).astype(float)
    if logarithm:
        for column in ("alpha", "alpha_null"):
            if (table[column] <= 0).any():
                value = table.loc[table[column] <= 0, column].iloc[0]
                raise ValueError(f"{column} must be positive for logarithms, got {value}; use logarithm=False")
            table[column] = np.log(table[column])
    models = int(table["model"].nunique())
    nan = float("nan")
    out = EqualAccuracy(nan, nan, nan, nan, nan, nan, nan, len(table), models, left_out, "")
    reason = ""
    if models < 3:
        reason = "fewer than three models"
    elif table["second"].nunique() < 2:
        reason = "a score has no alphas"
    elif table.groupby("second")["alpha_null"].agg(np.ptp).min() <= 1e-12:
        reason = "alpha_null does not vary within a score"
    if reason:
        return out._replace(reason=reason)
    clusters, _ = pd.factorize(table["model"])
    common, separate = (
        formulas.ols(formula, table).fit(cov_type="cluster", cov_kwds={"groups": clusters}, use_t=True)
        for formula in ("alpha ~ alpha_null + second", "alpha ~ alpha_null * second")
    )
    low, high = common.conf_int(alpha=1 - level).loc["second"]
    return out._replace(
        difference=float(common.params["second"]),
        low=float(low),
        high=float(high),
        p_value=float(common.pvalues["second"]),
        slope=float(common.params["alpha_null"]),
        parallel_p_value=float(separate.pvalues["alpha_null:second"]),
        r2=float(common.rsquared),
    )


_COEFFICIENTS = ("term", "estimate", "standard_error", "z", "p_value", "low", "high")


def _statsmodels_formulas() -> ModuleType:
    try:
        import statsmodels.formula.api as formulas  # noqa: PLC0415  # seconds to import, and an extra
    except ImportError as error:
        raise ImportError(missing("regression needs statsmodels", "report")) from error
    found: ModuleType = formulas
    return found


def _table(
    frame: pd.DataFrame, numbers: tuple[str, ...], names: tuple[str, ...], of_scores: tuple[str, ...] = ()
) -> tuple[pd.DataFrame, int]:
    """Check the columns, take the rows of the wanted scores, and leave out those with NaN numbers."""
    missing = [column for column in (*numbers, *names) if column not in frame.columns]
    if missing:
        raise ValueError(f"frame lacks the column '{missing[0]}'; it has {list(frame.columns)}")
    table = frame[[*numbers, *names]].copy()
    if of_scores:
        present = set(table["score"].astype(str))
        absent = [score for score in of_scores if score not in present]
        if absent or len(set(of_scores)) < len(of_scores):
            raise ValueError(f"a and b must be two scores of the frame, {sorted(present)}; got {of_scores}")
        table = table[table["score"].astype(str).isin(of_scores)]
    for name in names:
        if table[name].isna().any():
            raise ValueError(
                f"column '{name}' must have no missing value, got one in row {table[name].isna().argmax()}"
            )
    values = table[list(numbers)].to_numpy(np.float64)
    _refuse_infinite(values, numbers)
    table[list(numbers)] = values
    whole = ~np.isnan(values).any(-1)
    return table[whole].reset_index(drop=True), int((~whole).sum())


def _refuse_infinite(values: npt.NDArray[np.float64], names: tuple[str, ...]) -> None:
    if np.isinf(values).any():
        row, column = np.argwhere(np.isinf(values))[0]
        raise ValueError(f"{names[column]} must be finite or NaN, got {values[row, column]} in row {row}")
