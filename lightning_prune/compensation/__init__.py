"""Repair after a cut: fit the layers that remain to the outputs of the dense network, without labels."""
