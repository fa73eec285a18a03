"""Measure and predict latency: tables per operator, eager, compiled or in ONNX Runtime."""
