"""The pruning wing."""
