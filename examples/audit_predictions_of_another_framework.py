"""Audit scikit-learn networks that numpy pruned: what does pruning do to rare classes?

python examples/audit_predictions_of_another_framework.py

Trains MLPClassifiers on digits, continues training while the weights that were the smallest are set to 0 after every
epoch, and audits the predictions; nothing is trained with jprune. It does so once on balanced classes, and twice on a
long tail of 10:1 in which digit 0 is the most common or the rarest class, to separate rare from hard classes. Writes
balanced.html, zero-commonest.html, zero-rarest.html and a figure of each into the current folder. Takes a few minutes
on two cores.
"""

import copy
import sys
import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import jprune
from jprune.recall.report.headline import headline

RATIOS = (1, 2, 4, 8, 12)  # parameters before / after; 1 is the control, trained equally long but not pruned
EPOCHS = 15  # epochs of continued training


def long_tail(labels, order, rng):
    """Choose examples so that class sizes decrease geometrically along ``order``, the last a tenth of the first."""
    sizes = np.round(min(np.bincount(labels)) * 10.0 ** -np.linspace(0, 1, len(order))).astype(int)
    of_class = [rng.choice(np.flatnonzero(labels == c), n, replace=False) for c, n in zip(order, sizes, strict=True)]
    return np.concatenate(of_class)


def masks_at(model, ratio):
    """Keep the largest weights of the hidden layers so that 1 / ratio of all parameters are left."""
    parameters = sum(array.size for array in (*model.coefs_, *model.intercepts_))
    hidden = model.coefs_[:-1]  # the output layer and the biases are not pruned
    sizes = np.concatenate([np.abs(weights).ravel() for weights in hidden])
    kept = round(parameters / ratio) - (parameters - sizes.size)
    threshold = np.partition(sizes, -kept)[-kept]
    return [np.abs(weights) >= threshold for weights in hidden]


def pruned(model, ratio, images, labels):
    """Return a pruned copy of a model after continued training."""
    copied, masks = copy.deepcopy(model), masks_at(model, ratio)
    for _ in range(EPOCHS):
        copied.partial_fit(images, labels)
        for weights, mask in zip(copied.coefs_[:-1], masks, strict=True):
            weights[~mask] = 0
    return copied


def audited(split, seeds, order=None):
    """Train, prune and audit: on a long tail along ``order``, or on all examples."""
    images, test_images, labels, test_labels = split
    dense, by_ratio = [], {ratio: [] for ratio in RATIOS}
    for seed in range(seeds):
        chosen = slice(None) if order is None else long_tail(labels, order, np.random.default_rng(seed))
        model = MLPClassifier((128, 64), max_iter=40, random_state=seed).fit(images[chosen], labels[chosen])
        dense.append(model.predict(test_images))
        for ratio in RATIOS:
            by_ratio[ratio].append(pruned(model, ratio, images[chosen], labels[chosen]).predict(test_images))
    rare = None if order is None else np.where(np.isin(test_labels, order[5:]), "rare half", "common half")
    return jprune.recall.audit(test_labels, dense, by_ratio, groups=rare, rng=0)


def main(seeds=10):
    warnings.simplefilter("ignore", ConvergenceWarning)  # 40 epochs are enough
    images, labels = load_digits(return_X_y=True)
    split = train_test_split(images / 16, labels, test_size=0.4, stratify=labels, random_state=0)
    tails = {"balanced": None, "zero-commonest": np.arange(10), "zero-rarest": np.arange(10)[::-1]}
    for name, order in tails.items():
        audit = audited(split, seeds, order)
        audit.to_html(f"{name}.html", images=split[1].reshape(-1, 8, 8), title=f"Digits, {name}")
        audit.figures()["recall"].savefig(f"{name}.png", dpi=100, facecolor="white")
        print(f"{name}: {headline(audit)}\n")
        corrected = [f"alpha_corrected{end}" for end in ("", "_low", "_high")]
        columns = ["ratio", "accuracy", "alpha", *corrected, "alpha_seed", "alpha_null"]
        print(audit.summary[columns].round(2).to_string(index=False), end="\n\n")
        if order is not None:
            halves = audit.groups[audit.groups["class"].isna()]
            columns = ["group", "ratio", "recall_dense", "recall", "change", "change_low", "change_high", "excess"]
            print(halves.sort_values(["group", "ratio"])[columns].round(3).to_string(index=False), end="\n\n")
    print("written:", ", ".join(f"{name}.html and .png" for name in tails))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
