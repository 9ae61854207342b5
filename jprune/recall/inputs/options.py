"""The options of ``jprune audit``. Imported by the command line only, since it needs tyro."""

import dataclasses
from pathlib import Path
from typing import Annotated

import tyro
from tyro.conf import UseAppendAction, arg

_File = Annotated[str, arg(metavar="FILE")]
_Dense = Annotated[tuple[str, ...], UseAppendAction, arg(metavar="[SCORE=]FILE")]
_Pruned = Annotated[tuple[str, ...], UseAppendAction, arg(metavar="[SCORE:]RATIO=FILE")]
_Groups = Annotated[tuple[str, ...], UseAppendAction, arg(metavar="FILE")]


@dataclasses.dataclass(frozen=True)
class AuditOptions:
    """Audit what pruning did to each class, from predictions that any framework made.

    Give the labels of a test set, the predictions of dense models and those of the same models after
    pruning, at one or more compression ratios:

      jprune audit --labels labels.csv --dense dense.npz --pruned 2=p2.npz --pruned 10=p10.npz --out report.html

    FILES are .npy, .npz, .csv or .parquet; PATH:NAME picks one array of an .npz or one column of a table. Classes
    are whole numbers: an array (models, examples) or (examples,), or a table with a row per example and a column
    per model. Logits are floats: an array (models, examples, classes) or (examples, classes), or a table with a row
    per example and a column per class; the largest counts. Text in a table is a class name of --class-names.
    Pickles are never loaded.

    MODELS are paired by index: model 3 of a --pruned file was pruned from model 3 of --dense. Naming a ratio twice
    adds models to it. Ratio 1 is the control, fine-tuned as long but not pruned; with it the audit tells pruning
    from fine-tuning. To compare what the weights were pruned by, name it: --pruned magnitude:2=m2.npz --pruned
    random:2=r2.npz.

    Without --out, --csv and --json a summary is printed and nothing written. Exit status 2: something given cannot
    be used, and nothing was written.
    """

    labels: _File
    """True classes, one per example."""
    dense: _Dense
    """Predictions of the dense models; more models by repeating it. With SCORE= for one score's own dense models."""
    pruned: _Pruned
    """Predictions of the models pruned at a compression ratio (parameters before / after); repeat for each."""
    out: Annotated[Path | None, arg(metavar="FILE.html")] = None
    """Write the report, one self-contained HTML page."""
    csv: Annotated[Path | None, arg(metavar="FOLDER")] = None
    """Write every table into this folder, as CSV."""
    json: bool = False
    """Print everything as JSON, and nothing else, on standard output."""
    class_names: Annotated[str | None, arg(metavar="A,B,...|FILE.txt")] = None
    """Names of the classes, in order: separated by commas, or a text file with one per line."""
    num_classes: Annotated[int | None, arg(metavar="INT")] = None
    """How many classes there are, where neither names, logits nor labels show it."""
    groups: _Groups = ()
    """A second label per example, for recalls within groups: a table's columns, or an .npz file's arrays."""
    images: Annotated[str | None, arg(metavar="FILE")] = None
    """The test images (.npy, .npz), to show examples that pruning changes in the report."""
    unpaired: bool = False
    """Models are not paired by index; their numbers may differ."""
    level: float = 0.99
    """Confidence of each interval, between 0 and 1; 0.99 for five ratios is 0.95 for all."""
    resamples: int = 1000
    """How often the test examples are resampled, for alpha's interval over test sets; 0 for not at all."""
    seed: int = 0
    """Of the resampling."""
    title: str = "Recall audit"
    """Heading of the report."""
    date: Annotated[str | None, arg(metavar="TEXT")] = None
    """Put into the report's footer as it is; without it the same input gives the same bytes."""


def parse(arguments: list[str]) -> AuditOptions:
    """Read the arguments behind ``jprune``; tyro prints help and usage errors and raises ``SystemExit``."""
    options: AuditOptions = tyro.extras.subcommand_cli_from_dict(
        {"audit": AuditOptions}, prog="jprune", args=arguments, config=(tyro.conf.FlagCreatePairsOff,)
    )
    return options
