"""The commands of ``lightning-prune``, and the help that lists them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from lightning_prune.cli.config import UsageError
from lightning_prune.cli.early_checks import check_arguments
from lightning_prune.cli.parsers import read
from lightning_prune.utils.hints import did_you_mean

__all__ = ["COMMANDS", "OVERVIEW", "run_command"]

#: command -> its module in this package, and whether the module's ``main`` takes the command's name
COMMANDS = {
    "plan": ("plan", False),
    "prune": ("prune", True),
    "oneshot": ("prune", True),
    "netadapt": ("prune", True),
    "sensitivity": ("sensitivity", False),
    "latency": ("latency", False),
    "export": ("export", False),
    "report": ("report", False),
    "compare": ("compare", False),
}
OVERVIEW = """\
usage: lightning-prune [COMMAND] ...

Train a network, make it smaller while it trains, and test it.

  lightning-prune                     slices of a brain, U-Net, half of the MACs
  lightning-prune data=folder data.root=DIR task.num_classes=5      your images
  lightning-prune -m seed=1,2,3       a sweep; one table at its end

commands; each has --help
  train         train, prune, test; may be left out. Lists all settings
  plan          what would be cut, layer by layer, before anything is trained
  prune         shrink the trained network of a run in one cut, or in rounds
  sensitivity   score against the share removed, layer by layer
  latency       measure a network for budgets in time
  export        write the network of a run as ONNX, INT8 or folder for a hub
  report        the page of a run or of a sweep, also against another run
  compare       one table and one page of several runs

own networks, data, experiments: lightning-prune --config-dir DIR net=mine
tab completion in bash: eval "$(lightning-prune -sc install=bash)"
"""


def run_command(name: str, arguments: Sequence[str]) -> None:
    """Run a command other than ``train``, whose arguments are read before anything slow is imported."""
    options = read(name, arguments)
    try:
        check_arguments(name, options)
    except UsageError as error:
        raise SystemExit(f"lightning-prune {name}: {error}") from None
    module, takes_name = COMMANDS[name]
    main = import_module(f"lightning_prune.cli.{module}").main
    if takes_name:
        main(name, arguments)
    else:
        main(arguments)


def unknown_command(word: str) -> str:
    """Return the message for a first word that is neither a command nor a setting."""
    hint = did_you_mean(word, ["train", *COMMANDS], "lightning-prune {}")
    return "\n".join(
        filter(None, [f"there is no command {word!r}, and settings have the form KEY=VALUE", hint])
    )
