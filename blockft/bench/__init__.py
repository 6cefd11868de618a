"""Benchmarks, one module each; `measurement` and `benchmark_model` hold their shared code."""
