"""Shared command-line code: shards, exit statuses, progress."""
