"""Predictions of dense and pruned models in, one ``Audit`` of tidy tables out."""

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Int

from jprune.files import write_text
from jprune.recall.inputs import predictions
from jprune.recall.inputs.arguments import EmptyClassWarning, Rng, check_level, check_resamples
from jprune.recall.inputs.files import records
from jprune.recall.inputs.predictions import Groups, InputError, Predictions
from jprune.recall.measures.rates import from_counts, from_predictions, refuse_other_examples
from jprune.recall.report.headline import findings, headline
from jprune.recall.tables import caveats, comparisons, examples, models
from jprune.recall.tables.audited import AuditedModels
from jprune.recall.tables.examples import resampling
from jprune.recall.tables.frames import AuditTables

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Named = dict[tuple[str, float | None], str]
"""What the caller calls the models of a score and ratio; those of a score's dense models are under None."""


class Audit(AuditTables):
    """What compression did to each class, as tidy tables; returned by ``audit`` and ``audit_counts``."""

    def figures(self) -> "dict[str, Figure]":
        """Draw the figures, by name; needs the extra ``report``."""
        from jprune.recall.report.figures import figures  # noqa: PLC0415 (matplotlib is an extra)

        return figures(self)

    def to_html(
        self, path: str | Path, *, images: Any = None, title: str = "Recall audit", date: str | None = None
    ) -> None:
        """Write one self-contained page; needs the extra ``report``. See ``jprune.recall.report.page``."""
        from jprune.recall.report.page import write_html  # noqa: PLC0415 (jinja2 and matplotlib are extras)

        write_html(self, path, images=images, title=title, date=date)

    def to_csv(self, folder: str | Path) -> None:
        """Write one CSV file per table into a folder, which is made where it is not there."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, table in self.tables().items():
            write_text(Path(folder) / f"{name}.csv", table.to_csv(index=False, lineterminator="\n"))

    def to_json(self, path: str | Path | None = None) -> str:
        """Return (and write, where a path is given) the tables and settings as JSON; NaN becomes null."""
        found = {
            "headline": headline(self),
            "findings": [finding._asdict() for finding in findings(self)],
            "warnings": list(self.warnings),
            "class_names": list(self.class_names),
            "examples": self.examples,
            "level": self.level,
            "paired": self.paired,
            "shared": self.shared,
            "tables": {name: records(table) for name, table in self.tables().items()},
        }
        text = json.dumps(found, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
        if path is not None:
            write_text(path, text)
        return text


def audit(
    labels: Any,
    dense: Any,
    pruned: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    groups: Any = None,
    scores: Any = None,
    num_classes: int | None = None,
    paired: bool = True,
    level: float = 0.99,
    rng: Rng | None = None,
    resamples: int = 1_000,
) -> Audit:
    """Audit what pruning did to each class, from the predictions of dense and pruned models.

    Args:
      labels: true classes, whole numbers in 0..classes-1, (examples,).
      dense: predictions of the dense models: classes as integers, (models, examples) or (examples,),
        or logits as floats, (models, examples, classes) or (examples, classes). Or {score: such}
        where the scores started from dense models of their own.
      pruned: {ratio: predictions} or {score: {ratio: predictions}}, each like ``dense``. A ratio is
        parameters before / after; 1 is the control that was fine-tuned but not pruned.
      class_names: the name of every class; by default its index.
      groups: a second label per example, (examples,) text or whole numbers, or {attribute: such}.
      scores: ``pruned`` by another name; give one of the two.
      num_classes: how many classes there are, where labels and logits do not show it.
      paired: whether model m of each pruned stack was pruned from dense model m. Otherwise numbers
        of models may differ and every pruned model is set against the mean dense model.
      level: confidence of each interval; 0.99 for five ratios is 0.95 for all (Bonferroni).
      rng: generator or seed for what is resampled: an interval of the mean alpha over test examples
        and, where paired, a test of the pairing. Nothing is resampled where it is None.
      resamples: how often the test examples are drawn anew.

    Returns:
      An ``Audit``.

    Raises:
      InputError: an argument cannot be audited; the message says which, where, and the value. It is
        a ``ValueError``.

    >>> labels = [0, 0, 0, 0, 1, 1, 1, 1]
    >>> report = audit(labels, [0, 0, 0, 0, 1, 1, 1, 0], {2.0: [0, 0, 0, 0, 1, 1, 0, 0]})
    >>> float(report.alphas["alpha"].iloc[0].round(4))
    2.3333
    """
    true = predictions.labels(labels)
    if (pruned is None) == (scores is None):
        raise InputError("give the pruned models by one of pruned= and scores=, not by both or neither")
    of_score = predictions.by_score(pruned, "pruned") if scores is None else predictions.by_score(scores, "scores")
    stacks = {
        score: {ratio: predictions.stack(value, name, true.size) for ratio, (name, value) in ratios.items()}
        for score, ratios in of_score.items()
    }
    named = predictions.baselines(dense, list(stacks))
    once = {name: predictions.stack(value, name, true.size) for name, value in dict(named.values()).items()}
    return audit_stacks(
        true,
        {score: once[name] for score, (name, _) in named.items()},
        stacks,
        class_names=class_names,
        groups=predictions.groups(groups, true.size),
        num_classes=num_classes,
        paired=paired,
        level=level,
        rng=rng,
        resamples=resamples,
    )


def audit_counts(
    dense: Any,
    pruned: Any,
    *,
    support: Any = None,
    class_names: Sequence[str] | None = None,
    paired: bool = True,
    level: float = 0.99,
) -> Audit:
    """Audit from counts per class, where the predictions themselves are not kept.

    Without predictions there are no PIEs, no subgroups and no resampling of test examples; from
    correct counts alone no precision, F1, CEV or SDE either. Those columns are NaN, those tables
    empty.

    Args:
      dense: confusion counts (models, classes, classes), the true class on the rows, as
        ``jprune.recall.measures.counts`` gives; with ``support``, correct counts (models, classes). Or
        {score: such}.
      pruned: {ratio: counts} or {score: {ratio: counts}}, each like ``dense``.
      support: examples per class, (classes,), where the counts are of correct predictions only.
      class_names: the name of every class; by default its index.
      paired: as in ``audit``.
      level: as in ``audit``.

    Raises:
      InputError: as ``audit``.

    >>> report = audit_counts([9, 7], {2.0: [7, 5]}, support=[10, 10])
    >>> float(report.alphas["alpha"].iloc[0].round(4))
    1.3333
    """
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
    check_level(level)
    study = AuditedModels(baseline, rates, len(once) == 1, paired, names, level)
    names_of: Named = {(s, r): name for s, ratios in of_score.items() for r, (name, _) in ratios.items()}
    return _assemble(study, {**names_of, **{(score, None): name for score, (name, _) in named.items()}})


def audit_stacks(
    true: Int[np.ndarray, " examples"],
    dense: Mapping[str, Predictions],
    pruned: Mapping[str, Mapping[float, Predictions]],
    *,
    groups: Groups,
    labels_name: str = "labels",
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    paired: bool = True,
    level: float = 0.99,
    rng: Rng | None = None,
    resamples: int = 1_000,
) -> Audit:
    """``audit`` of labels, predictions and groups that are read already; what the command line calls.

    Scores whose stacks of dense models have one name share them. ``labels_name`` is what the caller
    calls the labels, for errors. Other arguments and errors as ``audit``.
    """
    check_level(level)
    if rng is not None:
        check_resamples(resamples)
    distinct = {stack.name: stack for stack in dense.values()}
    every = [*distinct.values(), *(stack for ratios in pruned.values() for stack in ratios.values())]
    classes = predictions.class_count(true, every, class_names=class_names, num_classes=num_classes, name=labels_name)
    once = {name: from_predictions(true, stack.predicted, classes) for name, stack in distinct.items()}
    study = AuditedModels(
        dense={score: once[stack.name] for score, stack in dense.items()},
        pruned={
            score: {ratio: from_predictions(true, stack.predicted, classes) for ratio, stack in ratios.items()}
            for score, ratios in pruned.items()
        },
        shared=len(distinct) == 1,
        paired=paired,
        class_names=predictions.names_of_classes(class_names, classes),
        level=level,
    )
    named: Named = {(score, ratio): stack.name for score, ratios in pruned.items() for ratio, stack in ratios.items()}
    named |= {(score, None): stack.name for score, stack in dense.items()}
    before = {score: stack.predicted for score, stack in dense.items()}
    after = {score: {ratio: stack.predicted for ratio, stack in ratios.items()} for score, ratios in pruned.items()}
    notes = [note for stack in every for note in caveats.of_copies(stack)]
    report = _assemble(study, named, notes)
    report = dataclasses.replace(
        report,
        pies=examples.pies(before, after, true),
        groups=examples.subgroups(study, groups, before, after, true),
    )
    if rng is None or not paired:
        return report
    intervals, tests = resampling(study, true, before, after, rng=rng, resamples=resamples)
    return dataclasses.replace(
        report,
        summary=pd.concat([report.summary, intervals], axis=1),
        tests=pd.concat([report.tests, pd.DataFrame(tests)], ignore_index=True),
        warnings=(*report.warnings, *caveats.of_pairing(tests)),
    )


def _assemble(study: AuditedModels, named: Named, notes: Sequence[str] = ()) -> Audit:
    """Build what needs rates alone, and say what a reader must know."""
    _refuse_unpaired(study, named)
    dense, alphas = models.dense_models(study), models.alphas(study)
    summary = models.summary(study, alphas, dense)
    support = next(iter(study.dense.values())).support
    empty = caveats.of_empty_classes(support, study.class_names)
    if empty:
        warnings.warn(empty, EmptyClassWarning, stacklevel=4)
    return Audit(
        summary=summary,
        alphas=alphas,
        classes=models.classes(study),
        tests=comparisons.within(alphas, paired=study.paired, shared=study.shared),
        recalls=models.recalls(study),
        dense=dense,
        pies=examples.pies({}, {}, np.zeros(0, np.int64)),
        groups=pd.DataFrame(columns=list(examples.GROUP_COLUMNS)),
        probabilities=pd.DataFrame(),
        drift=pd.DataFrame(),
        at_risk=pd.DataFrame(),
        warnings=(*filter(None, [empty]), *notes, *caveats.of_study(study, summary, alphas)),
        class_names=study.class_names,
        examples=int(support.sum()),
        level=study.level,
        margin=0.1,
        paired=study.paired,
        shared=study.shared,
        named=False,
    )


def _refuse_unpaired(study: AuditedModels, named: Named) -> None:
    """Refuse stacks of different lengths where models are paired by index."""
    for score, ratios in study.pruned.items():
        wanted = len(study.dense[score].accuracy)
        for ratio, stack in ratios.items():
            if study.paired and len(stack.accuracy) != wanted:
                raise InputError(
                    f"{named[score, ratio]} has {len(stack.accuracy)} models, {named[score, None]} has {wanted}; they "
                    f"are paired by index: give as many, or say that they are unpaired (paired=False, --unpaired)"
                )
