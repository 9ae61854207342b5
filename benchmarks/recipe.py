"""The optimizer of every training step that is timed, on both sides."""

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 5e-4
