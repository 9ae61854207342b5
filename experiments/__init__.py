"""The studies, run as `python -m experiments.NAME`. jprune does not import this package."""
