"""Measure how compression changes each class: predictions of dense and compressed models in, an ``Audit`` out."""

import dataclasses
import json
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from jprune.files import write_text
from jprune.recall.inputs import predictions
from jprune.recall.inputs.arguments import (
    EmptyClassWarning,
    Rng,
    check_level,
    check_margin,
    check_resamples,
    check_threshold,
    check_top_k,
)
from jprune.recall.inputs.order import about_correctness, about_order, about_quantities, about_ratings, perfect_models
from jprune.recall.inputs.prepare import Prepared, prepare
from jprune.recall.inputs.raw import InputError, of_object, option
from jprune.recall.measures.rates import from_counts, from_predictions, refuse_other_examples
from jprune.recall.report.findings import findings
from jprune.recall.report.headline import headline
from jprune.recall.tables import caveats, comparisons, examples, models
from jprune.recall.tables.audited import AuditedModels, Examples
from jprune.recall.tables.frames import UNSTATED, AuditTables, records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Given = object
"""Arrays, lists, batches, tables, Hugging Face objects, or dicts of them; what is wrong is refused by name."""

SetNames = dict[tuple[str, float | None], str]
"""What the caller calls the models of a score and ratio; the ratio None is for the dense models."""


@dataclasses.dataclass(frozen=True)
class Options:
    """How to audit, for ``audit`` and the command line.

    Attributes:
      num_classes: number of classes, if names, logits and labels do not determine it; or None.
      paired: whether models are paired by index.
      level: confidence level of every interval.
      margin: distance of alpha from 1 that counts as equal.
      rng: generator or seed of the test of the pairing; None for no test.
      resamples: number of random pairings.
      top_k: k of the top-k recall; None for 5, or fewer with few classes.
      named: whether models were given by name, without a ratio.
    """

    num_classes: int | None = None
    paired: bool = True
    level: float = 0.99
    margin: float = 0.1
    rng: Rng | None = None
    resamples: int = 1_000
    top_k: int | None = None
    named: bool = False


class Audit(AuditTables):
    """The effect of compression on each class, as tidy tables; returned by ``audit`` and ``audit_counts``."""

    @property
    def headline(self) -> str:
        """The headline of the report: which classes lost most, whether weak classes fell behind, and what is open."""
        return headline(self)

    def figures(self) -> "dict[str, Figure]":
        """Draw the figures, by name; needs the extra ``report``."""
        from jprune.recall.report.figures import figures  # noqa: PLC0415 (matplotlib is an extra)

        return figures(self)

    def to_html(
        self,
        path: str | Path,
        *,
        images: npt.ArrayLike | None = None,
        title: str = "Recall audit",
        date: str | None = None,
    ) -> None:
        """Write one self-contained page; needs the extra ``report``. See ``jprune.recall.report.page``."""
        from jprune.recall.report.page import write_html  # noqa: PLC0415 (jinja2 and matplotlib are extras)

        write_html(self, path, images=images, title=title, date=date)

    def to_csv(self, folder: str | Path) -> None:
        """Write one CSV file per table into a folder, which is created if needed."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, table in self.tables().items():
            written = _by_name(table) if self.named else table
            write_text(Path(folder) / f"{name}.csv", written.to_csv(index=False, lineterminator="\n"))

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the tables and settings as JSON, and write them if a path is given; NaN becomes null."""
        found = {
            "headline": self.headline,
            "findings": [finding._asdict() for finding in findings(self)],
            "warnings": list(self.warnings),
            "class_names": list(self.class_names),
            "examples": self.examples,
            "level": float(self.level),
            "margin": float(self.margin),
            "paired": bool(self.paired),
            "shared": self.shared,
            "tables": {name: records(_stated(table)) for name, table in self.tables().items()},
        }
        text = json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text


def audit(
    labels: Given,
    dense: Given,
    pruned: Given = None,
    *,
    class_names: Collection[str] | None = None,
    groups: Given = None,
    scores: Given = None,
    compare: Given = None,
    num_classes: int | None = None,
    ignore_label: int | None = None,
    threshold: float | None = None,
    paired: bool = True,
    level: float = 0.99,
    margin: float = 0.1,
    rng: Rng | None = None,
    resamples: int = 1_000,
    top_k: int | None = None,
) -> Audit:
    """Measure how compression changes the recall of each class, from predictions of dense and compressed models.

    Arrays may be numpy, jax or torch arrays, lists, lists of batches, tables of pandas, polars or pyarrow (rows are
    examples) or what a Hugging Face trainer returns. Rows of pandas objects with an index must have the index of the
    labels.

    Args:
      labels: true classes, (examples,): whole numbers in 0..classes-1, names, booleans, or one-hot rows.
      dense: predictions of the dense models: classes, (models, examples) or (examples,), or logits as floats,
        (models, examples, classes) or (examples, classes). Or a dict from score name to predictions of these shapes,
        where each score started from its own dense models.
      pruned: a dict from compression ratio (parameters before / after; 1 is the control that was fine-tuned but not
        pruned) to predictions like ``dense``, or a dict from score name to {ratio: predictions}.
      class_names: the name of every class; by default names in the data, sorted, or the index.
      groups: an attribute of each example, (examples,) text or whole numbers; or several, as a dict or DataFrame.
      scores: an alias of ``pruned``; pass one of ``pruned``, ``scores`` and ``compare``.
      compare: a dict from name to predictions, for models that were quantized, distilled or otherwise changed and
        have no ratio.
      num_classes: number of classes, if labels, names and logits do not determine it.
      ignore_label: examples with this label are left out.
      threshold: for models with one sigmoid output: the smallest probability that means class 1.
      paired: whether model m of each compressed set was made from dense model m. Otherwise numbers of models may
        differ and every compressed model is compared with the mean dense model.
      level: confidence level of each interval; 0.99 for each of five ratios is jointly 0.95 (Bonferroni).
      margin: corrected alpha counts as 1 only if its interval lies between 1 / (1 + margin) and 1 + margin.
      rng: generator or seed for a permutation test of the pairing; None for no test.
      resamples: number of random pairings in that test.
      top_k: k of the top-k recall, with logits; by default 5, or the number of classes minus one.

    Returns:
      An ``Audit``.

    Raises:
      InputError: an argument is not valid; the message names the argument, the position and the value. It is a
        ``ValueError``.

    >>> labels = [0, 0, 0, 0, 1, 1, 1, 1]
    >>> report = audit(labels, [0, 0, 0, 0, 1, 1, 1, 0], {2.0: [0, 0, 0, 0, 1, 1, 0, 0]})
    >>> float(report.alphas["alpha"].iloc[0].round(4))
    2.3333
    """
    given = [pruned, scores, compare]
    if sum(value is not None for value in given) != 1:
        raise InputError(
            "pass the compressed models once: as pruned={ratio: predictions} (scores= is another name for it) or as "
            "compare={name: predictions}"
        )
    try:
        check_threshold(threshold)
    except ValueError as error:
        raise InputError(str(error)) from error
    if compare is not None:
        of_score = {name: {UNSTATED: models} for name, models in predictions.by_name(compare).items()}
    elif scores is None:
        of_score = predictions.by_score(pruned, "pruned")
    else:
        of_score = predictions.by_score(scores, "scores")
    named = predictions.baselines(dense, list(of_score))
    sets = {name: [of_object(value, name)] for name, value in dict(named.values()).items()}
    sets |= {name: [of_object(value, name)] for ratios in of_score.values() for name, value in ratios.values()}
    prepared = prepare(
        of_object(labels, "labels"),
        sets,
        groups,
        class_names=class_names,
        ignore_label=ignore_label,
        threshold=threshold,
    )
    return audit_prepared(
        prepared,
        {score: name for score, (name, _) in named.items()},
        {score: {ratio: name for ratio, (name, _) in ratios.items()} for score, ratios in of_score.items()},
        Options(num_classes, paired, level, margin, rng, resamples, top_k, compare is not None),
    )


def audit_counts(
    dense: Given,
    pruned: Given,
    *,
    support: Given = None,
    class_names: Collection[str] | None = None,
    paired: bool = True,
    level: float = 0.99,
    margin: float = 0.1,
) -> Audit:
    """Audit from counts per class, for models whose predictions were not kept.

    Counts do not identify single examples: intervals are over training seeds alone, and corrected alpha, lost and won
    examples and groups are missing. Correct counts alone leave out precision, F1, CEV and SDE too. Missing columns are
    NaN and missing tables are empty.

    Args:
      dense: confusion counts (models, classes, classes), the true class on the rows, as
        ``jprune.recall.counts`` gives; with ``support``, correct counts (models, classes). Or a dict from score name
        to counts of this shape.
      pruned: a dict from ratio to counts like ``dense``, or a dict from score name to a dict of this kind.
      support: examples per class, (classes,), if the counts are of correct predictions only.
      class_names: the name of every class; by default its index.
      paired: as in ``audit``.
      level: as in ``audit``.
      margin: as in ``audit``.

    Raises:
      InputError: as ``audit``.

    >>> report = audit_counts([9, 7], {2.0: [7, 5]}, support=[10, 10])
    >>> float(report.alphas["alpha"].iloc[0].round(4))
    1.3333
    """
    _check(Options(level=level, margin=margin))
    of_score = predictions.by_score(pruned)
    named = predictions.baselines(dense, list(of_score))
    once = {name: from_counts(value, support, name) for name, value in dict(named.values()).items()}
    rates = {
        score: {ratio: from_counts(value, support, name) for ratio, (name, value) in ratios.items()}
        for score, ratios in of_score.items()
    }
    first_name, first = next(iter(once.items()))
    given = [*once.items(), *((of_score[s][r][0], rates[s][r]) for s in of_score for r in of_score[s])]
    for name, stack in given:
        refuse_other_examples(name, stack.support, first_name, first.support)
    names = predictions.names_of_classes(class_names, len(first.support))
    baseline = {score: once[name] for score, (name, _) in named.items()}
    study = AuditedModels(baseline, rates, len(once) == 1, paired, names, level, margin)
    names_of: SetNames = {(s, r): name for s, ratios in of_score.items() for r, (name, _) in ratios.items()}
    return _assemble(study, {**names_of, **{(score, None): name for score, (name, _) in named.items()}})


def audit_prepared(
    prepared: Prepared,
    dense: Mapping[str, str],
    compressed: Mapping[str, Mapping[float, str]],
    options: Options,
    labels_name: str = "labels",
) -> Audit:
    """Audit inputs that have been read; the command line calls it.

    Args:
      prepared: labels, predictions and groups.
      dense: the name of every score's set of dense models; scores that name one set share it.
      compressed: the name of the set of every score and ratio.
      options: how to audit.
      labels_name: what the caller calls the labels, for errors.

    Raises:
      InputError: predictions and labels do not fit together, or an option is out of range.
    """
    _check(options)
    true, sets = prepared.true, prepared.sets
    classes = predictions.class_count(
        true,
        list(sets.values()),
        class_names=prepared.class_names,
        num_classes=options.num_classes,
        name=labels_name,
    )
    rates = {name: from_predictions(true, stack.predicted, classes) for name, stack in sets.items()}
    known = Examples(
        true,
        {score: sets[name] for score, name in dense.items()},
        {score: {ratio: sets[name] for ratio, name in ratios.items()} for score, ratios in compressed.items()},
    )
    study = AuditedModels(
        dense={score: rates[name] for score, name in dense.items()},
        pruned={score: {ratio: rates[name] for ratio, name in of.items()} for score, of in compressed.items()},
        shared=len(set(dense.values())) == 1,
        paired=options.paired,
        class_names=predictions.names_of_classes(prepared.class_names, classes),
        level=options.level,
        margin=options.margin,
        named=options.named,
        examples=known,
    )
    named: SetNames = {(score, ratio): name for score, ratios in compressed.items() for ratio, name in ratios.items()}
    named |= {(score, None): name for score, name in dense.items()}
    report = _assemble(study, named, _notes(prepared, study.class_names, set(dense.values())))
    risky, shown = examples.at_risk(known, paired=study.paired)
    groups = examples.subgroups(study, known, prepared.groups)
    k = options.top_k if options.top_k is not None else min(5, max(1, classes - 1))
    if k > classes:
        raise InputError(f"top_k is {k}, but there are only {classes} classes; use a smaller one")
    probabilities = examples.probabilities(study, known, k)
    unused = (f"{option('top_k', k)} has no effect without logits",) if options.top_k and probabilities.empty else ()
    report = dataclasses.replace(
        report,
        summary=report.summary.merge(shown, on=["score", "ratio"]),
        pies=examples.pies(known),
        groups=groups,
        probabilities=probabilities,
        drift=examples.drift(study, known),
        at_risk=risky,
        warnings=(*report.warnings, *caveats.of_groups(groups), *unused),
    )
    if options.rng is None or not options.paired:
        return report
    tests = examples.pairing(study, rng=options.rng, resamples=options.resamples)
    return dataclasses.replace(
        report,
        tests=comparisons.with_rows(report.tests, tests),
        warnings=(*report.warnings, *caveats.of_pairing(tests)),
    )


def _notes(prepared: Prepared, class_names: Sequence[str], dense: Collection[str]) -> list[str]:
    """Notes on how labels and predictions were read, and warnings of what looks wrong in them."""
    true, sets = prepared.true, prepared.sets
    notes = [*prepared.notes, *(note for stack in sets.values() for note in stack.notes)]
    all_perfect = all((stack.predicted == true).all() for stack in sets.values())
    for name, stack in sets.items():
        wrong = about_correctness(true, stack)
        notes += wrong or about_order(true, stack, class_names, dense=name in dense)
        notes += perfect_models(true, stack, all_perfect=all_perfect)
        rated = about_ratings(true, stack, class_names)
        notes += rated or (about_quantities(true, stack) if prepared.class_names is None else [])
    notes += [note for stack in sets.values() for note in (*caveats.of_scores(stack), *caveats.of_copies(stack))]
    return notes


def _check(options: Options) -> None:
    try:
        check_level(options.level)
        check_margin(options.margin)
        check_top_k(options.top_k)
        if options.rng is not None:
            check_resamples(options.resamples)
    except ValueError as error:
        raise InputError(str(error)) from error
    try:
        np.random.default_rng(options.rng)
    except (TypeError, ValueError) as error:
        raise InputError(f"rng must be a generator, a seed of 0 or more, or None, got {options.rng!r}") from error


def _assemble(study: AuditedModels, named: SetNames, notes: Sequence[str] = ()) -> Audit:
    """Build the tables that need rates alone, and collect the warnings."""
    _refuse_unpaired(study, named)
    dense, alphas = models.dense_models(study), models.alphas(study)
    summary = models.summary(study, alphas, dense)
    support = next(iter(study.dense.values())).support
    empty = caveats.of_empty_classes(support, study.class_names)
    if empty:
        warnings.warn(empty, EmptyClassWarning, stacklevel=4)
    tests = comparisons.within(alphas, paired=study.paired, shared=study.shared)
    return Audit(
        summary=summary,
        alphas=alphas,
        classes=models.classes(study),
        tests=comparisons.with_rows(tests, [*comparisons.evenness_rows(study), *comparisons.mcnemar_rows(study)]),
        recalls=models.recalls(study),
        dense=dense,
        pies=pd.DataFrame(columns=list(examples.PIE_COLUMNS)),
        groups=pd.DataFrame(columns=list(examples.GROUP_COLUMNS)),
        probabilities=pd.DataFrame(columns=list(examples.PROBABILITY_COLUMNS)),
        drift=pd.DataFrame(columns=list(examples.DRIFT_COLUMNS)),
        at_risk=pd.DataFrame(columns=list(examples.RISK_COLUMNS)),
        warnings=(*filter(None, [empty]), *dict.fromkeys(notes), *caveats.of_study(study, summary, alphas)),
        class_names=study.class_names,
        examples=int(support.sum()),
        level=study.level,
        margin=study.margin,
        paired=study.paired,
        shared=study.shared,
        named=study.named,
    )


def _refuse_unpaired(study: AuditedModels, named: SetNames) -> None:
    """Refuse sets of different sizes where models are paired by index."""
    for score, ratios in study.pruned.items():
        wanted = len(study.dense[score].accuracy)
        for ratio, stack in ratios.items():
            if study.paired and len(stack.accuracy) != wanted:
                count = len(stack.accuracy)
                models = "1 model" if count == 1 else f"{count} models"
                raise InputError(
                    f"{named[score, ratio]} has {models}, {named[score, None]} has {wanted}; they are paired by index: "
                    f"give as many, or say that they are unpaired (paired=False, --unpaired)"
                )


def _stated(table: pd.DataFrame) -> pd.DataFrame:
    """A table with a missing ratio where models were given by name."""
    ratios = [name for name in ("ratio", "other_ratio") if name in table]
    return table.assign(**{name: table[name].where(table[name] != UNSTATED) for name in ratios})


def _by_name(table: pd.DataFrame) -> pd.DataFrame:
    """A table of models that were given by name: their name in the place of the score, and no ratio."""
    columns = {"score": "name", "other_score": "other_name"}
    return table.drop(columns=["ratio", "other_ratio"], errors="ignore").rename(columns=columns)
