"""List or run the parts of ``benchmarks.robustness``."""

from benchmarks.common.parts import run_part

PARTS = ("kill", "interruptions", "distributed", "combinations", "random_nets", "fuzz")

if __name__ == "__main__":
    run_part("robustness", PARTS)
