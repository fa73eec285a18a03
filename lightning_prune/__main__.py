"""``python -m lightning_prune`` is ``lightning-prune``."""

from lightning_prune.cli import main

main()
