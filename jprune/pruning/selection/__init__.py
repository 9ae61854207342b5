"""Selections: scores to masks."""
