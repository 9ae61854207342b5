"""The studies of recall distortion, by name: a frozen dataclass of settings, and what to expect.

Settings follow Good et al., "Recall Distortion in Neural Network Pruning and the Undecayed Pruning
Algorithm", NeurIPS 2022 (arXiv 2206.02976), and the code that made its 30-replicate runs. They were
fixed before any result was seen.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from experiments.cli.commands import parse_shard
from experiments.cli.registry import Registry
from experiments.data.datasets import Selection

Score = Literal["magnitude", "gradient", "undecayed", "random", "undecayed-signed"]
Action = Literal["run", "status", "report"]


@dataclasses.dataclass(frozen=True)
class Study:
    """Train dense networks, prune and fine-tune each, and measure what that does to each class's recall.

    Every (score, ratio) starts from the same dense checkpoints: one-shot global pruning to the exact
    compression ratio of the whole model, the output layer left dense, then fine-tuning with the mask
    held. A killed run continues where it was when given the same command.

    After -m experiments.recall_distortion, for example:
      --list                                   what studies there are, their cost, what to expect
      --preset mnist-lenet --limit 1000 --epochs 2 --finetune-epochs 1 --replicates 3     a trial
      --preset mnist-lenet --shard 0/4         a quarter of the replicates, into the same folder
      status --preset mnist-lenet              how far that is
      report --out runs/mnist-lenet --beside runs/fashion-lenet          two studies side by side
    """

    action: Annotated[Action, tyro.conf.Positional] = "run"
    """run: do what is not done yet, then report. status: say what is done. report: rebuild tables and
    figures from what is stored."""
    preset: str = "demo"
    """Settings that are the defaults of all the other options; --list names them."""
    dataset: str = "digits"
    """Data set: digits, iris, wine, breast_cancer, mnist, fashion_mnist, cifar10, cifar100, tfds:NAME, or
    folder:PATH, a folder with train/CLASS/IMAGE and, if it has a test set, test/CLASS/IMAGE."""
    data_dir: Path | None = None
    """Folder of prepared TensorFlow Datasets; by default its own."""
    classes: tuple[str, ...] = ()
    """Names of the classes to keep; none for all."""
    imbalance: float | None = None
    """Examples of the first class / examples of the last in a training split thinned out exponentially."""
    selection: Selection = "validation"
    """Split on which the epoch is chosen. test: the test split itself, as in the published runs."""
    image_size: tuple[int, int] | None = None
    """Height and width that images of tfds: and folder: are resized to, whatever their shape (cut or pad them
    first to keep it); needed where they differ, and where they are large: memory and time grow with the pixels."""
    limit: int | None = None
    """Examples of each split to use, drawn by the seed; all by default. For trials."""
    model: str = "mlp"
    """Network: mlp, lenet, resnet20, resnet32, resnet44, resnet56, resnet110 or vgg11. The parameters of mlp,
    lenet and vgg11 grow with the image, those of a resnet do not."""
    replicates: int = 30
    """Networks trained from different seeds."""
    ratios: tuple[float, ...] = (1, 2, 4, 10, 20)
    """Compression ratios, parameters before / after, of the whole model. 1: fine-tuned, not pruned."""
    scores: tuple[Score, ...] = ("magnitude", "gradient", "undecayed", "random")
    """What a weight is worth. undecayed-signed: as the published runs coded it, keeps more than asked."""
    jumpstart: tuple[float, ...] = (0.0,)
    """Coefficients of the jumpstart penalty in dense training: a study each."""
    epochs: tuple[int, ...] = (30,)
    """Epochs of dense training, one number for each learning rate."""
    lr: tuple[float, ...] = (0.01,)
    """Learning rates of dense training, in turn."""
    finetune_epochs: tuple[int, ...] = (15,)
    """Epochs of fine-tuning, one number for each of its learning rates."""
    finetune_lr: tuple[float, ...] = (0.01,)
    """Learning rates of fine-tuning, in turn."""
    batch: int = 128
    """Examples a step."""
    momentum: float = 0.9
    """Momentum of SGD, at least 0 and below 1."""
    nesterov: bool = True
    """Whether the momentum is Nesterov's."""
    weight_decay: float = 5e-4
    """Times every parameter is added to its gradient, in both phases."""
    augment: bool = False
    """Whether training images are flipped at random and cropped from a border of 4 pixels."""
    gradient_batches: int = 1
    """Training batches that the gradient of a score is the mean of."""
    gradient_mode: Literal["train", "eval"] = "train"
    """Whether that gradient sees batches as in training (augmented, batch statistics) or as in use."""
    gradient_includes_decay: bool = False
    """Whether that gradient is of the loss with weight decay rather than of the cross-entropy alone."""
    undecayed_epsilon: float = 5e-4
    """The decay that the undecayed score gives back: |eps w^2 - w g|."""
    seed: int = 0
    """Seed of the study; replicate i has the key of this seed folded with i."""
    out: Path | None = None
    """Folder of the results; runs/PRESET by default."""
    keep_pruned: bool = False
    """Whether the weights of pruned networks are stored too; those of dense ones always are."""
    beside: tuple[Path, ...] = ()
    """Folders of other studies to set this one beside in its report: box plots, and tests of whether alpha
    is greater in the earlier of two, this one first, then these in their order."""
    shard: str = "0/1"
    """i/n: this run takes the i-th (from 0) of n equal parts of the replicates."""
    chunk: int | None = None
    """Replicates in one program; by default as many as fit the memory."""
    memory: float | None = None
    """GiB of memory for one program on one device; by default 4 on a CPU, 70 % of what an accelerator has."""
    form: Literal["auto", "vmap", "map", "unroll"] = "auto"
    """How replicates share a device: batched, in a loop, in a loop written out. auto: measured once."""
    loop: Literal["auto", "scan", "steps"] = "auto"
    """Whether an epoch is one program or one call a step. auto: measured once."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where several processes run the study; under Slurm they find each other."""
    process_id: int | None = None
    """Number of this process, from 0."""
    num_processes: int | None = None
    """How many processes there are."""
    list: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """List the presets and end."""

    def __post_init__(self):
        """Refuse settings that no study can have."""
        for name, least in (("replicates", 1), ("batch", 1), ("gradient_batches", 1), ("chunk", 1), ("limit", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if self.image_size is not None and min(self.image_size) < 1:
            raise ValueError(f"image_size={self.image_size} must be a height and a width of at least 1 pixel")
        for name in ("ratios", "scores", "jumpstart", "epochs", "finetune_epochs"):
            value = getattr(self, name)
            if not value or (len(set(value)) < len(value) and not name.endswith("epochs")):
                raise ValueError(f"{name}={value} must be one or more values, none twice")
        for epochs, rates in (("epochs", "lr"), ("finetune_epochs", "finetune_lr")):
            lengths, values = getattr(self, epochs), getattr(self, rates)
            if len(lengths) != len(values):
                raise ValueError(f"{epochs}={lengths} and {rates}={values} must be equally many: a rate has its epochs")
        if min(self.ratios) < 1:
            raise ValueError(f"ratios={self.ratios} must be 1 or more: parameters before / parameters after")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} must be at least 0 and below 1")
        if min(self.jumpstart) < 0:
            raise ValueError(f"jumpstart={self.jumpstart} must not be negative")
        parse_shard(self.shard)

    @property
    def folder(self) -> Path:
        """Where the results go."""
        return self.out or Path("runs") / self.preset

    def to_json(self) -> dict[str, Any]:
        """The settings as JSON."""
        values = {**dataclasses.asdict(self), "beside": [str(path) for path in self.beside]}
        return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def from_json(values: Mapping[str, Any]) -> Study:
    """The settings that ``Study.to_json`` wrote.

    Raises:
      TypeError: a setting that there is not.

    >>> from_json(json.loads(json.dumps(Study().to_json()))) == Study()
    True
    """
    typed = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    paths = {name: Path(typed[name]) for name in ("data_dir", "out") if typed.get(name)}
    return Study(**{**typed, **paths, "beside": tuple(map(Path, typed.get("beside", ())))})


_LENET = Study(
    model="lenet",
    ratios=(1, 2, 4, 10, 20, 50),
    scores=("magnitude", "undecayed", "random", "gradient", "undecayed-signed"),
    epochs=(30,),
    lr=(0.01,),
    finetune_epochs=(15,),
    finetune_lr=(0.01,),
)
_RESNET = dataclasses.replace(
    _LENET,
    epochs=(10, 20, 10, 10, 10),
    lr=(0.01, 0.1, 0.01, 0.001, 0.0001),
    finetune_epochs=(10, 5, 5, 5),
    finetune_lr=(0.1, 0.01, 0.001, 0.0001),
    augment=True,
)

_PRESETS: Registry[Study] = Registry()
preset, names, get = _PRESETS.preset, _PRESETS.names, _PRESETS.get
describe, listing = _PRESETS.describe, _PRESETS.listing


@preset
def demo() -> Study:
    """Thirty small networks on scikit-learn's digits, with and without the jumpstart penalty.

    Command: make demo
    Cost: under two minutes on 2 CPU cores; no download.
    Expect: dense accuracy near .973; 450 test images are too few to tell most alphas from 1.

    The learning rate is the best of .03, .1 and .3 by the validation loss of dense training; fine-tuning
    takes half the epochs, as in the paper. The coefficient is the least power of ten that leaves under
    .1 % of the hidden units dead. No alpha was looked at.
    """
    return Study(
        jumpstart=(0.0, 0.1),
        epochs=(12,),
        lr=(0.1,),
        finetune_epochs=(6,),
        finetune_lr=(0.1,),
        batch=64,
        chunk=30,
        form="vmap",
        loop="scan",
    )


@preset
def fashion_lenet() -> Study:
    """LeNet (60,074 parameters) on Fashion-MNIST.

    Command: python -m experiments.recall_distortion --preset fashion-lenet
    Cost: 177,000 steps a replicate (30 epochs, then 26 times 15).
    Expect, for magnitude: median alpha .95, .96, .98, 1.05, 1.89 at t = 2, 4, 10, 20, 50.
    """
    return dataclasses.replace(_LENET, dataset="fashion_mnist")


@preset
def mnist_lenet() -> Study:
    """LeNet (60,074 parameters) on MNIST.

    Command: python -m experiments.recall_distortion --preset mnist-lenet
    Cost: 177,000 steps a replicate (30 epochs, then 26 times 15).
    Expect, for magnitude: median alpha .47, .50, .60, .80, 5.29 at t = 2, 4, 10, 20, 50.
    """
    return dataclasses.replace(_LENET, dataset="mnist")


@preset
def cifar10_resnet20() -> Study:
    """ResNet-20 (269,722 parameters) on CIFAR-10.

    Command: python -m experiments.recall_distortion --preset cifar10-resnet20
    Cost: 249,000 steps a replicate (60 epochs, then 26 times 25); for an accelerator.
    Expect, for magnitude: median alpha .95, 1.02, 1.22, 1.57, 2.56; for undecayed
    .93, .97, 1.16, 1.44, 2.27, at t = 2, 4, 10, 20, 50.
    """
    return dataclasses.replace(_RESNET, dataset="cifar10", model="resnet20")


@preset
def cifar10_resnet32() -> Study:
    """ResNet-32 on CIFAR-10.

    Command: python -m experiments.recall_distortion --preset cifar10-resnet32
    Cost: 249,000 steps a replicate (60 epochs, then 26 times 25); for an accelerator.
    Expect, for magnitude: median alpha .97, 1.00, 1.16, 1.44, 2.11; for undecayed
    .94, .98, 1.11, 1.31, 1.95, at t = 2, 4, 10, 20, 50.
    """
    return dataclasses.replace(_RESNET, dataset="cifar10", model="resnet32")


@preset
def cifar10_resnet44() -> Study:
    """ResNet-44 on CIFAR-10.

    Command: python -m experiments.recall_distortion --preset cifar10-resnet44
    Cost: 249,000 steps a replicate (60 epochs, then 26 times 25); for an accelerator.
    Expect, for magnitude: median alpha .98, .99, 1.12, 1.34, 1.95; for undecayed
    .92, .96, 1.07, 1.25, 1.77, at t = 2, 4, 10, 20, 50.
    """
    return dataclasses.replace(_RESNET, dataset="cifar10", model="resnet44")


@preset
def cifar10_resnet56() -> Study:
    """ResNet-56 (853,018 parameters) on CIFAR-10; dense accuracy .8925, standard deviation .0095.

    Command: python -m experiments.recall_distortion --preset cifar10-resnet56
    Cost: 249,000 steps a replicate (60 epochs, then 26 times 25); for an accelerator.
    Expect, for magnitude: median alpha .93, .96, 1.06, 1.25, 1.85; for undecayed
    .93, .93, 1.00, 1.16, 1.56, at t = 2, 4, 10, 20, 50.
    """
    return dataclasses.replace(_RESNET, dataset="cifar10", model="resnet56")


@preset
def cifar10_resnet110() -> Study:
    """ResNet-110 on CIFAR-10.

    Command: python -m experiments.recall_distortion --preset cifar10-resnet110
    Cost: 249,000 steps a replicate (60 epochs, then 26 times 25); for an accelerator.
    Expect, for magnitude: median alpha .94, .95, 1.03, 1.22, 1.66; for undecayed
    .88, .90, .98, 1.08, 1.33, at t = 2, 4, 10, 20, 50.
    """
    return dataclasses.replace(_RESNET, dataset="cifar10", model="resnet110")


@preset
def cifar100_resnet56() -> Study:
    """ResNet-56 on CIFAR-100.

    Command: python -m experiments.recall_distortion --preset cifar100-resnet56
    Cost: 249,000 steps a replicate (60 epochs, then 26 times 25); for an accelerator.
    Expect, for magnitude: median alpha .95, .99, 1.11, 1.30, 1.91 at t = 2, 4, 10, 20, 50.
    """
    return dataclasses.replace(_RESNET, dataset="cifar100", model="resnet56")
