"""Studies with known alphas."""

import numpy as np
import pandas as pd

from experiments.reproduction import __main__ as reproduction
from experiments.reproduction.ledger import Recalls

PUBLISHED = pd.read_csv(reproduction.PUBLISHED / "recall_alpha_boxplots.csv")
RATIOS = (2.0, 4.0, 10.0, 20.0, 50.0)
BALANCE = np.array([100, 50, -50, -100])  # of 1,000 examples a class, around 750 right ones
SPREAD = 0.02 * np.array([-1, 1, 0, 0, -1, 1])  # over replicates; its mean is 0


def study(alphas, *, control=1.0, nonzero=lambda ratio: 1000 / ratio):
    """Six networks whose mean alpha is as given for each score and ratio."""
    rows = []

    def add(score, ratio, alpha, keep):
        order = np.random.default_rng(sum(map(ord, score)) + int(ratio))
        for replicate, apart in enumerate(order.permutation(SPREAD)):
            own = alpha + apart
            right = np.round(750 + (BALANCE if score == "dense" else own * BALANCE)).astype(int)
            sizes = {"parameters": 1100, "prunable": 1000, "nonzero": round(keep), "dead_units": 0.1 + 0.01 * replicate}
            counts = {f"correct_{c}": count for c, count in enumerate(right)}
            rows.append({"score": score, "ratio": ratio, "replicate": replicate, **sizes, **counts})

    add("dense", 1.0, 1.0, 1000)
    add("control", 1.0, control, 1000)
    for score, by_ratio in alphas.items():
        for ratio, alpha in zip(RATIOS, by_ratio, strict=True):
            add(score, ratio, alpha, nonzero(ratio))
    return Recalls(pd.DataFrame(rows), np.full(4, 1000), tuple("abcd"))
