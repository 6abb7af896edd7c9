"""Benchmarks: op families (`bench_*.py`, by pytest-benchmark), and whole steps beside their peers (train, infer)."""
