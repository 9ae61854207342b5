"""Speed, memory and scale, each against what people would use instead; `python -m benchmarks`."""
