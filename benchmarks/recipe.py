"""The optimizer settings of every timed training step, for both sides."""

LEARNING_RATE, MOMENTUM, WEIGHT_DECAY = 1e-3, 0.9, 5e-4
