"""The published CIFAR-10 ResNet-56 magnitude runs: 30 models, 10 classes of 1,000 test images each."""

import csv
from pathlib import Path

import numpy as np

FIXTURE = Path(__file__).parent / "fixtures" / "recall_cifar10_resnet56_magnitude_counts.csv"
RATIOS = (2, 4, 10, 20, 50)


def correct_counts() -> dict[int, np.ndarray]:
    """Correct predictions (models, classes) by ratio; 1 is the dense model."""
    with FIXTURE.open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = {}
    for ratio in (1, *RATIOS):
        of_ratio = sorted((row for row in rows if int(row["ratio"]) == ratio), key=lambda row: int(row["model_index"]))
        table[ratio] = np.array([[int(row[f"correct_{c}"]) for c in range(10)] for row in of_ratio])
    return table


def recalls() -> dict[int, np.ndarray]:
    return {ratio: correct / 1000 for ratio, correct in correct_counts().items()}


def accuracies() -> dict[int, np.ndarray]:
    return {ratio: correct.sum(-1) / 10_000 for ratio, correct in correct_counts().items()}
