"""The parts of benchmarks/gpu.py, one topic each."""
