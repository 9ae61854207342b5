"""The recall wing."""
