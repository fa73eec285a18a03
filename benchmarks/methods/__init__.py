"""Which way of pruning gives the best network for the same training? Gradual, one shot, NetAdapt or slimming.

Commands:

    python -m benchmarks.methods             train, prune and test; writes docs/results/methods.md
    python -m benchmarks.methods --report    only write the table and the picture again
    python -m benchmarks.methods.netadapt    the same NetAdapt search with one worker and with two; prints
"""
