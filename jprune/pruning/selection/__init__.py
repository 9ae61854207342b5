"""Selections: functions from scores to masks."""
