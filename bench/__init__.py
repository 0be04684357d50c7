"""Benchmarks: what gating costs. `python -m bench.overhead --help`."""
