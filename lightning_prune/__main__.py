"""``python -m lightning_prune`` is ``lightning-prune``."""

from lightning_prune.cli.main import main

main()
