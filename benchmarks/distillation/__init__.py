"""Does a teacher recover accuracy that pruning lost, and what does it cost?

Commands:

    python -m benchmarks.distillation             train, prune and test; writes docs/results/distillation.md
    python -m benchmarks.distillation --report    only write the table and the picture again
    python -m benchmarks.distillation.cost        time of a training step with a teacher, and memory; prints
"""
