"""Pruning methods: the strategies that the pruning callbacks carry out."""
