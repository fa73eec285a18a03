"""Benchmarks of this question."""
