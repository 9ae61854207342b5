"""The study that the tests of the audit share: four classes, five models, two scores, one of them with a control."""

import functools

import numpy as np

CLASSES, EXAMPLES, MODELS = 4, 200, 5


def predictions(rng, labels, rate, models=MODELS):
    """Models with error rate ``rate``, twice as high on each further class."""
    wrong = rng.random((models, labels.size)) < rate * 2.0 ** (labels - 1)
    return np.where(wrong, (labels + rng.integers(1, CLASSES, (models, labels.size))) % CLASSES, labels)


@functools.cache
def data():
    """Labels, dense predictions, and pruned ones by score and ratio."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(CLASSES), EXAMPLES // CLASSES)
    dense = predictions(rng, labels, 0.04)
    pruned = {
        "magnitude": {2.0: predictions(rng, labels, 0.05), 10.0: predictions(rng, labels, 0.1)},
        "random": {1.0: predictions(rng, labels, 0.04), 10.0: predictions(rng, labels, 0.12)},
    }
    return labels, dense, pruned


def row(frame, **key):
    """The only row of a frame whose columns have these values."""
    for name, value in key.items():
        frame = frame[frame[name] == value]
    assert len(frame) == 1
    return frame.iloc[0]
