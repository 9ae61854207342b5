"""Weight importance scores: functions ``score(params, grad=None, batch=None, key=None)``; larger scores are kept."""

from jprune.pruning.dynamics import dense_gradient
from jprune.pruning.scores.activations import wanda
from jprune.pruning.scores.calibration import Gram, Reconstructed, input_grams, sparsegpt
from jprune.pruning.scores.elementwise import Score, gradient, magnitude, movement, random, score_selected, undecayed
from jprune.pruning.scores.filters import filter_taylor, geometric_median, norm_scale
from jprune.pruning.scores.layer_adaptive import lamp
from jprune.pruning.scores.model_based import average_gradients, fisher, snip, synflow

__all__ = [
    "Gram",
    "Reconstructed",
    "Score",
    "average_gradients",
    "dense_gradient",
    "filter_taylor",
    "fisher",
    "geometric_median",
    "gradient",
    "input_grams",
    "lamp",
    "magnitude",
    "movement",
    "norm_scale",
    "random",
    "score_selected",
    "snip",
    "sparsegpt",
    "synflow",
    "undecayed",
    "wanda",
]
