"""Depth and width against width alone: ``python -m benchmarks.depth``."""
