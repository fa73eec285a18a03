"""Which criterion loses the least accuracy? Those of this package, random, and those of torch-pruning.

Commands:

    python -m benchmarks.criteria             train, prune and test; writes docs/results/criteria.md
    python -m benchmarks.criteria --report    only write the tables and the picture again
    python -m benchmarks.criteria.layers      the layers that a criterion cuts in one step; into the same page
"""
