"""Trace a forward: follow the identity of every channel through every ATen operator."""
