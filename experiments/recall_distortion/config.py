"""Settings of a recall-distortion study. Settings that affect the results are hashed; those of the run are not."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import tyro

from experiments.cli import commands
from experiments.cli.commands import ClusterOptions, Flag, Positional, RunOptions
from experiments.models.options import read_options
from experiments.storage.files import JSON

Score = Literal["magnitude", "gradient", "undecayed", "random", "undecayed-signed"]
Structure = Literal["weights", "channels"]
_NOT_NEGATIVE = (
    "epochs",
    "finetune_epochs",
    "lr",
    "finetune_lr",
    "weight_decay",
    "jumpstart",
    "finetune_jumpstart",
    "seed",
)


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The data set and its split."""

    dataset: str = "digits"
    """digits, iris, wine, breast_cancer, mnist, fashion_mnist, cifar10, cifar100; npz:FILE with x_train, y_train
    and, if there is a test set, x_test, y_test; table:FILE, a CSV or parquet file; folder:PATH with
    train/CLASS/IMAGE and, if there is a test set, test/CLASS/IMAGE; tfds:NAME."""
    classes: tuple[str, ...] = ()
    """Names of the classes to keep; all by default."""
    imbalance: float | None = None
    """Ratio of the largest to the smallest training class; class sizes decrease exponentially from the first class to
    the last. By default all examples are used."""
    selection: Literal["validation", "test"] = "validation"
    """Split on which the best epoch is chosen. test: the test split, as in the published runs."""
    image_size: tuple[int, int] | None = None
    """Height and width to which images of tfds: and folder: are resized; needed if their sizes differ."""
    label_noise: float = 0.0
    """Fraction of the training labels that are replaced by another class, drawn uniformly."""
    limit: int | None = None
    """Number of examples of each split to use, drawn with the seed, for a trial run; all by default."""


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The network, and which of its weights are pruned."""

    model: str = "mlp"
    """mlp, lenet, resnet20, resnet32, resnet44, resnet56, resnet110, vgg11, dense, conv; or package.module:Class,
    your own Flax module (NNX or Linen) from inputs to logits."""
    model_options: tuple[str, ...] = ()
    """NAME=VALUE arguments of the model, such as depth=4. dense and conv need depth and width."""
    prunable: str | None = None
    """Regular expression for the paths of the kernels to prune; by default all except those of a layer named head."""


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """Dense training and fine-tuning."""

    replicates: int = 30
    """Number of networks, trained from different seeds."""
    epochs: tuple[int, ...] = (30,)
    """Epochs of dense training, one number per learning rate."""
    lr: tuple[float, ...] = (0.01,)
    """Learning rates of dense training, in order."""
    finetune_epochs: tuple[int, ...] = (15,)
    """Epochs of fine-tuning, one number for each learning rate of fine-tuning."""
    finetune_lr: tuple[float, ...] = (0.01,)
    """Learning rates of fine-tuning, in order."""
    schedule: Literal["constant", "one-cycle"] = "constant"
    """Schedule within the epochs of each learning rate. one-cycle: rises to the rate over the first 30% of the
    steps, then falls to almost 0."""
    jumpstart: tuple[float, ...] = (0.0,)
    """Coefficients of the jumpstart penalty in dense training; each is a separate study."""
    finetune_jumpstart: tuple[float, ...] = (0.0,)
    """Coefficients of the jumpstart penalty in fine-tuning; each is a separate study of the same dense networks."""
    optimizer: Literal["sgd", "adam"] = "sgd"
    """Optimizer of both phases."""
    batch: int = 128
    """Examples per step."""
    momentum: float = 0.9
    """Momentum of SGD, at least 0 and below 1."""
    nesterov: bool = True
    """Whether to use Nesterov momentum."""
    weight_decay: float = 5e-4
    """Coefficient of weight decay in both phases; weight_decay times the parameter is added to its gradient."""
    augment: bool = False
    """Whether training images are flipped at random, padded by 4 pixels and cropped at random."""
    seed: int = 0
    """Seed of the study; i is folded into its key to obtain the key of replicate i."""


@dataclasses.dataclass(frozen=True)
class PruningOptions:
    """One-shot global pruning of the trained networks."""

    ratios: tuple[float, ...] = (1, 2, 4, 10, 20)
    """Compression ratios of the whole model, parameters before / after. 1: the control, fine-tuned without pruning."""
    structure: Structure = "weights"
    """What is removed: weights, or channels (the units and features with the lowest mean scores). For channels,
    the ratios are multiply-adds before / after, but the achieved ratio is reported in parameters. It ignores the
    biases and normalization parameters of removed channels, so it is slightly too low."""
    counting: Literal["exact", "shrinkbench"] = "exact"
    """How a ratio is converted to a number of weights. shrinkbench: as in the published code, which keeps more
    weights than the ratio implies."""
    rounding: int | None = None
    """Bits, 2 to 16, to which the prunable weights are rounded after pruning, on a symmetric grid for each leaf."""
    min_keep: int = 0
    """Minimum number of weights kept in each prunable layer; the total stays the same."""
    scores: tuple[Score, ...] = ("magnitude", "gradient", "undecayed", "random")
    """Weight importance scores. undecayed-signed: the score of the published runs, which keeps more weights than
    requested."""
    gradient_batches: int = 1
    """Number of training batches over which the gradient of a score is averaged."""
    gradient_mode: Literal["train", "eval"] = "train"
    """Whether the gradient of a score is computed in training mode (augmentation, batch statistics) or in
    evaluation mode."""
    gradient_includes_decay: bool = False
    """Whether the gradient of a score includes weight decay in addition to the cross-entropy."""
    undecayed_epsilon: float = 5e-4
    """Epsilon of the undecayed score |eps w^2 - w g|."""

    def __post_init__(self):
        """Validate the settings."""
        if self.rounding is not None and not 2 <= self.rounding <= 16:
            raise ValueError(f"rounding={self.rounding} must be 2 to 16 bits")
        if self.structure == "channels" and "undecayed-signed" in self.scores:
            raise ValueError(
                "scores has undecayed-signed, which selects single weights; with structure=channels use undecayed"
            )
        if self.structure == "channels" and (self.min_keep or self.counting != "exact"):
            raise ValueError(
                f"min_keep={self.min_keep} and counting={self.counting!r} are about numbers of weights; leave them out "
                "with structure=channels"
            )
        if self.min_keep < 0:
            raise ValueError(f"min_keep={self.min_keep} must not be negative")
        if self.min_keep and "undecayed-signed" in self.scores:
            raise ValueError(
                f"min_keep={self.min_keep} does not apply to the score undecayed-signed, which keeps more weights than "
                "requested; remove it from scores"
            )


@dataclasses.dataclass(frozen=True)
class Study(PruningOptions, TrainingOptions, ModelOptions, DataOptions):
    """Everything that determines the results of a study, and its number of replicates."""

    def __post_init__(self):
        """Validate the settings."""
        commands.check_kinds(self)
        super().__post_init__()
        commands.check_at_least(self, replicates=1, batch=1, gradient_batches=1, limit=1)
        _check_numbers(self)
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"image_size={self.image_size} must be a height and a width of at least 1 pixel")
        for name in ("ratios", "scores", "jumpstart", "finetune_jumpstart", "epochs", "finetune_epochs"):
            value = getattr(self, name)
            if not value or (len(set(value)) < len(value) and not name.endswith("epochs")):
                raise ValueError(f"{name}={value} must be one or more values, each given once")
        for epochs, rates in (("epochs", "lr"), ("finetune_epochs", "finetune_lr")):
            lengths, values = getattr(self, epochs), getattr(self, rates)
            if len(lengths) != len(values):
                raise ValueError(f"{epochs}={lengths} and {rates}={values} must have the same length")
        if min(self.ratios) < 1:
            raise ValueError(f"ratios={self.ratios} must be 1 or more: parameters before / parameters after")
        if not 0 <= self.label_noise <= 1:
            raise ValueError(f"label_noise={self.label_noise} must lie between 0 and 1")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be at least 0 and below 1")
        read_options(self.model_options)


def _check_numbers(study: Study) -> None:
    """Raise if a number is not finite, or negative where it must not be."""
    for field in dataclasses.fields(study):
        value = getattr(study, field.name)
        values = value if isinstance(value, tuple | list) else (value,)
        numbers = [one for one in values if isinstance(one, int | float)]
        if not all(map(math.isfinite, numbers)):
            raise ValueError(f"{field.name}={value} must be finite")
        if field.name == "seed" and value >= 2**32:  # jax ignores higher bits
            raise ValueError(f"seed={value} must be below 2^32")
        if field.name in _NOT_NEGATIVE and min(numbers, default=0) < 0:
            raise ValueError(f"{field.name}={value} must not be negative")


@dataclasses.dataclass(frozen=True)
class Running(RunOptions):
    """Options that control the run. They change the results at most by rounding."""

    chunk: int | None = None
    """Replicates in one program; unless the preset sets it, as many as fit in memory."""
    memory: float | None = None
    """GiB of memory for one program on one device; by default 4 on a CPU and 70% of the memory of an
    accelerator."""
    form: Literal["vmap", "map", "unroll"] | None = None
    """How the replicates of a device are computed: batched (vmap), one after another in a loop (map), or in an
    unrolled loop (unroll). Unless the preset sets it, map on a CPU and vmap on an accelerator."""
    loop: Literal["scan", "steps"] | None = None
    """scan: an epoch is one program. steps: one call per step. Unless the preset sets it, scan."""
    keep_pruned: bool = False
    """Store the weights of the pruned networks that this run computes; those of dense networks are always stored."""
    compare: Annotated[tuple[Path, ...], tyro.conf.arg(aliases=("--beside",))] = ()
    """Folders of other studies to compare with in the report: box plots, and tests of whether alpha is greater in
    the first of two studies, in the order of this study and then these folders. --beside is the old name of this
    option."""

    def __post_init__(self):
        """Validate the settings."""
        commands.check_kinds(self)
        super().__post_init__()
        commands.check_at_least(self, chunk=1)
        if self.memory is not None and not self.memory > 0:
            raise ValueError(f"memory={self.memory} must be positive")


@dataclasses.dataclass(frozen=True)
class Command:
    """Train dense networks, prune and fine-tune each, and measure the effect on the recall of each class.

    Every score and ratio starts from the same dense networks: one-shot global pruning to the exact compression
    ratio of the whole model, then fine-tuning with fixed masks. To resume a killed run, rerun its command.

    Examples, after python -m experiments.recall_distortion:
      --list                              presets, their cost and expected results
      --preset mnist-lenet --limit 1000 --epochs 2 --replicates 3         a trial
      --model my_models:Net --prunable '^blocks/' --dataset npz:my_data.npz
      --preset mnist-lenet --shard 0/4    a quarter of the replicates, same folder
      status --out runs/mnist-lenet       completed replicates
      report --out runs/mnist-lenet --compare runs/fashion-lenet      two studies
    """

    action: Positional = "run"
    """run: compute the missing stages, then report. status: list the completed stages. report: rebuild tables and
    figures from the stored results."""
    preset: str = "demo"
    """Preset that sets the defaults of all other options; --list shows the presets."""
    list: Flag = False
    """Print the presets and exit."""
    all: Flag = False
    """With status: list every study that was run in the folder, not only the last."""
    data: DataOptions = dataclasses.field(default_factory=DataOptions)
    model: ModelOptions = dataclasses.field(default_factory=ModelOptions)
    training: TrainingOptions = dataclasses.field(default_factory=TrainingOptions)
    pruning: PruningOptions = dataclasses.field(default_factory=PruningOptions)
    running: Running = dataclasses.field(default_factory=Running)
    cluster: ClusterOptions = dataclasses.field(default_factory=ClusterOptions)

    @property
    def study(self) -> Study:
        """The settings that determine the results."""
        return commands.joined(Study, self.data, self.model, self.training, self.pruning)

    @property
    def folder(self) -> Path:
        """Folder of the results."""
        return self.running.out or Path("runs") / self.preset


def command_of(study: Study, running: Running, **others: object) -> Command:
    """Return a command line with these settings as defaults."""
    groups = {
        "data": commands.group(DataOptions, study),
        "model": commands.group(ModelOptions, study),
        "training": commands.group(TrainingOptions, study),
        "pruning": commands.group(PruningOptions, study),
    }
    return Command(**groups, running=running, **others)


def study_from_json(values: Mapping[str, JSON]) -> Study:
    """Read a study that ``commands.to_json`` wrote.

    >>> study_from_json(commands.to_json(Study(ratios=(1, 3)))).ratios
    (1, 3)
    """
    return commands.from_json(Study, values)


def running_from_json(values: Mapping[str, JSON]) -> Running:
    """Read run options that ``commands.to_json`` wrote.

    Files of earlier versions are read too: ``auto`` becomes None, and ``beside`` is ``compare``.
    """
    names = {"beside": "compare"}
    known = {names.get(name, name): None if value == "auto" else value for name, value in values.items()}
    return commands.from_json(Running, known, ("out", "data_dir", "compare"))
