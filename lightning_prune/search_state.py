"""The state of a search, in memory and on disk after each round (level 3).

In its folder: ``state.pt`` (weights and record, which :func:`~lightning_prune.load_pruned` reads, optimizer state and
all that it takes to go on) and ``history.json``, the facts of the rounds for people. Both are written beside and
then put in place, so that a process may die at any moment.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.record import PruningRecord
from lightning_prune.rounds import ALIGNED
from lightning_prune.teacher import checksum

__all__ = ["Progress"]

STATE, HISTORY = "state.pt", "history.json"


@dataclass
class Progress:
    """How far a search has come.

    Attributes:
        folder: where it is kept; None: nowhere.
        start: checksum of the network that it began with.
        settings: of the search, as plain values.
        record: what was removed.
        optimizer: state of the optimizer, on the CPU.
        rounds: the facts of each.
    """

    folder: Path | None
    start: str
    settings: dict[str, Any]
    record: PruningRecord = field(default_factory=PruningRecord)
    optimizer: dict[str, Any] | None = None
    rounds: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        folder: Path | None,
        model: nn.Module,
        settings: dict[str, Any],
        optimizer: dict[str, Any] | None,
    ) -> Progress:
        """A search of ``model`` that has not begun yet."""
        plain = json.loads(json.dumps(settings))
        return cls(folder, checksum(model), plain, optimizer=optimizer)

    def restore_(self, model: nn.Module) -> bool:
        """Go on from what the folder holds, if it holds anything: ``model`` becomes that of the last round.

        Raises:
            ValueError: it holds another search; ``model`` is as it was.
        """
        if self.folder is None or not (self.folder / STATE).is_file():
            return False
        held = torch.load(self.folder / STATE, map_location="cpu", weights_only=True)
        differ = [k for k in ("start", "settings") if held["search"][k] != getattr(self, k)]
        if differ:
            what = "the weights" if differ == ["start"] else "the settings"
            raise ValueError(
                f"{self.folder} holds another search ({what} differ): give another folder, or remove it to begin anew"
            )
        self.record = PruningRecord.from_dict(held["record"])
        self.optimizer, self.rounds = held["search"]["optimizer"], held["search"]["rounds"]
        self.record.apply_(model)
        model.load_state_dict(held["state_dict"])
        return True

    @property
    def is_over(self) -> bool:
        """Whether the widths have been aligned, which is the last that a search does."""
        return bool(self.rounds) and self.rounds[-1]["block"] == ALIGNED

    def take(self, record: PruningRecord, optimizer: dict[str, Any]) -> None:
        """A candidate's cut stays, and its optimizer."""
        self.record = self.record.then(record) if self.record else record
        self.optimizer = optimizer

    def add(self, facts: dict[str, Any]) -> None:
        """Another round is over."""
        self.rounds.append(facts)

    def save(self, model: nn.Module) -> None:
        """Write everything down, if there is a folder."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        search = {k: getattr(self, k) for k in ("start", "settings", "optimizer", "rounds")}
        state = {"state_dict": model.state_dict(), "record": self.record.to_dict(), "search": search}
        beside = self.folder / f"{STATE}.part"
        torch.save(state, beside)
        beside.replace(self.folder / STATE)
        beside = self.folder / f"{HISTORY}.part"
        beside.write_text(json.dumps(self.rounds, indent=1) + "\n")
        beside.replace(self.folder / HISTORY)
