"""How close is the latency predicted by a table to the measured one?

Commands:

    python -m benchmarks.latency             measure; writes docs/results/latency.md
    python -m benchmarks.latency --report    only write the page again
"""
