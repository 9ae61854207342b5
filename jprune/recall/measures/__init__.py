"""Counts, rates and per-class measures."""
