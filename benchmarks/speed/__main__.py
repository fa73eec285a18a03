"""List or run the parts of ``benchmarks.speed``."""

from benchmarks.common.parts import run_part

PARTS = ("tracing", "selection", "scaling", "overhead", "training")

if __name__ == "__main__":
    run_part("speed", PARTS)
