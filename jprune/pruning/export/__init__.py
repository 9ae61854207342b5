"""Masks and weights as files, sparse arrays and cost tables."""
