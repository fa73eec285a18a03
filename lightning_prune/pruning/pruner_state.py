"""The saved state of a Pruner: checks, and the sizes that it asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from lightning_prune.serialization.carried_record import carried_record, dense_again_
from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.serialization.saving import shrink_

__all__ = ["VERSION", "check_state", "resize_"]

VERSION = 1
KEYS = {"version", "record", "dense", "history", "ended", "session"}


def check_state(state: Any) -> None:
    """Raise ValueError unless ``state`` is what ``Pruner.state_dict`` returns.

    Example:
        >>> check_state({})
        Traceback (most recent call last):
        ValueError: this is no state of a Pruner: 'dense' is missing
    """
    missing = sorted(KEYS - state.keys()) if isinstance(state, Mapping) else ["everything"]
    if missing:
        raise ValueError(f"this is no state of a Pruner: {missing[0]!r} is missing")
    if state["version"] != VERSION:
        raise ValueError(
            f"the state of the Pruner has version {state['version']}, and this package reads version {VERSION}: "
            "install the version that wrote it, or a newer one"
        )


def resize_(networks: Sequence[nn.Module], record: PruningRecord) -> None:
    """Give a network, and its copies, the sizes of ``record``, whatever sizes they have; weights are loaded next.

    Raises:
        ValueError: the record is not one of this network; nothing was changed.
    """
    present = [carried_record(network) for network in networks]
    if all(each.kept == record.kept for each in present):
        return
    try:
        if any(present):
            with dense_again_([(network, ()) for network in networks]):
                for network in networks:
                    record.check(network)
                for network in networks:
                    record.apply_(network, verify=False)
            return
        for network in networks:
            shrink_(network, record)
    except RecordError as error:
        raise ValueError(f"the state is that of another network: {error}") from error
