"""Structured pruning: selection and removal of channels."""
