"""Comparison of scores, selections, penalties and sparse training on one small network."""
