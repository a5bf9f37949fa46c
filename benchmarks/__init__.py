"""Measurements at real size. `python -m benchmarks` lists them; records are kept in `benchmarks/results`."""
