"""Which of 418 public networks can be pruned, and is the result correct? Compared with torch-pruning.

Commands:

    python -m benchmarks.zoo              run all networks; writes docs/results/zoo.md
    python -m benchmarks.zoo --report     only write the page again
    python -m benchmarks.zoo.more         some 200 networks of other packages; writes docs/results/zoo_more.md
"""
