"""Does pruning stay correct in unusual networks, combinations of settings, and interrupted runs?

Commands:

    python -m benchmarks.robustness.kill            kill and resume training runs; docs/results/kill.md
    python -m benchmarks.robustness.interruptions   errors in the middle of runs; docs/results/interruptions.md
    python -m benchmarks.robustness.distributed     several processes; docs/results/distributed.md
    python -m benchmarks.robustness.combinations    optimizers, precisions, ...; docs/results/combinations.md
    python -m benchmarks.robustness.fuzz            damaged files by the thousand; docs/results/fuzz.md
    python -m benchmarks.robustness.random_nets     cut random networks; docs/results/data/random_nets.json
"""
