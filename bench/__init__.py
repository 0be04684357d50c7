"""Benchmarks: what gating costs. `python -m bench.overhead --help`."""

import os

os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before torch is loaded: its allocator warns in every profile
os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # likewise the profiler, at begin and end
