"""Small audits that the tests of figures, pages and words share."""

import functools

import numpy as np

from jprune import recall

NAMES = ("<script>alert(1)</script>", "_hidden", "$x^2$", "a & b", "</svg>", "ünï")
EXAMPLES = 240
MODELS = 6


def predictions(seed, labels, rate, models=MODELS):
    """Models with error rate ``rate``, 1.5 times as high on each further class."""
    rng = np.random.default_rng(seed)
    wrong = rng.random((models, labels.size)) < rate * 1.5**labels
    return np.where(wrong, (labels + rng.integers(1, len(NAMES), wrong.shape)) % len(NAMES), labels)


LABELS = np.repeat(np.arange(len(NAMES)), EXAMPLES // len(NAMES))
DENSE = predictions(0, LABELS, 0.02)
MAGNITUDE = {1.0: predictions(1, LABELS, 0.02), 2.0: predictions(2, LABELS, 0.03), 10.0: predictions(3, LABELS, 0.1)}
RANDOM = {2.0: predictions(4, LABELS, 0.05), 10.0: predictions(5, LABELS, 0.12)}
IMAGES = np.random.default_rng(6).random((EXAMPLES, 8, 8))


@functools.cache
def one_score():
    """Six models at three ratios, one of them the control."""
    return recall.audit(LABELS, DENSE, MAGNITUDE, class_names=list(NAMES))


@functools.cache
def two_scores():
    """Two scores with hostile names, resampled, with subgroups."""
    groups = {"<b>sex</b>": np.where(np.arange(EXAMPLES) % 2, "f", "m")}
    scores = {"magnitude": MAGNITUDE, "<i>random": RANDOM}
    return recall.audit(LABELS, DENSE, scores, class_names=list(NAMES), groups=groups, rng=0, resamples=50)


@functools.cache
def one_model():
    """One model, so there are no intervals."""
    return recall.audit(LABELS, DENSE[0], {10.0: MAGNITUDE[10.0][0]})


@functools.cache
def undefined():
    """Perfect dense models, so alpha is undefined."""
    return recall.audit(LABELS, np.stack([LABELS] * 3), {10.0: MAGNITUDE[10.0][:3]})


@functools.cache
def all_wrong():
    """Dense models that are always wrong, so the normalized balance is undefined."""
    return recall.audit(LABELS, np.stack([(LABELS + 1) % len(NAMES)] * 3), {10.0: MAGNITUDE[10.0][:3]})
