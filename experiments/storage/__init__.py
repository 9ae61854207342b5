"""Stages of a study on disk, and their files."""
