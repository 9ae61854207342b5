"""The studies, run as `python -m experiments.NAME`; jprune never imports this package."""
