"""Benchmarks, one module each; `measurement` and `benchmark_model` hold what they share."""
