"""Pruning: scores, selections, schedules and the optax transformations that apply them.

The public names are in ``jprune``, ``jprune.scores``, ``jprune.selection``, ``jprune.schedules`` and ``jprune.io``.
"""
