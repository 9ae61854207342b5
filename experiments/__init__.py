"""The laboratory: the studies, run as `python -m experiments.NAME`; the library never imports it."""
