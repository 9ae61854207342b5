"""Speed, memory and scale, each compared with the usual alternative; `python -m benchmarks`."""
