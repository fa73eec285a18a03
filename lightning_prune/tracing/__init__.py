"""Trace the forward of a network: follow the identity of every channel through every ATen operator."""
