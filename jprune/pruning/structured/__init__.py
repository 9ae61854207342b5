"""Removal of channels."""
