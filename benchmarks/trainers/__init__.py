"""Pruning in trainers that are not Lightning's."""
