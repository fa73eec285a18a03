"""How much time and memory does pruning itself take?

Commands:

    python -m benchmarks.speed              the engine beside torch-pruning; docs/results/speed.md
    python -m benchmarks.speed.digests      digests of plans and records, to compare two versions; prints
    python -m benchmarks.speed.cuts         seconds of 20 cuts in one training; added to docs/results/speed.md
    python -m benchmarks.speed.tracing      seconds of tracing, and of a cut with its proof, by network; prints
    python -m benchmarks.speed.selection    seconds of one selection among 20,000 units; prints
    python -m benchmarks.speed.scaling      time by depth, memory of large networks; docs/results/scaling.md
    python -m benchmarks.speed.overhead     cost of pruning during a training; docs/results/overhead.md
    python -m benchmarks.speed.training     cost of a whole training that shrinks; docs/results/training_cost.md
"""
