"""The state of a search, in memory and on disk after each round (level 3).

In its folder: ``state.pt`` (weights and record, which :func:`~lightning_prune.load_pruned` reads, optimizer state and
all that it takes to go on) and ``history.json``, the facts of the rounds for people. Both are written beside and
then put in place, so that a process may die at any moment.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map

from lightning_prune.netadapt.rounds import ALIGNED, Round
from lightning_prune.serialization.atomic import atomic_write
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.serialization.saving import load_torch_file
from lightning_prune.utils.hashing import network_digest

__all__ = ["SearchState", "plainly"]

STATE, HISTORY = "state.pt", "history.json"


@dataclass
class SearchState:
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
    rounds: list[Round] = field(default_factory=list)

    @classmethod
    def begin(
        cls,
        folder: Path | None,
        model: nn.Module,
        settings: dict[str, Any],
        optimizer: dict[str, Any] | None,
    ) -> SearchState:
        """A search of ``model`` that has not begun yet."""
        plain = json.loads(json.dumps(settings))
        return cls(folder, network_digest(model), plain, optimizer=optimizer)

    def restore_(self, model: nn.Module, judge: Callable[[], float]) -> bool:
        """Go on from what the folder holds, if it holds anything: ``model`` becomes that of the last round.

        Raises:
            ValueError: it holds another search; ``model`` is as it was.
        """
        if self.folder is None or not (self.folder / STATE).is_file():
            return False
        held = load_torch_file(self.folder / STATE)
        rounds = [Round(**each) for each in held["search"]["rounds"]]
        differ = self._other(held["search"]) or _judged_otherwise(rounds[0].before, judge())
        if differ:
            raise ValueError(
                f"{self.folder} holds another search ({differ}): give another folder, or remove it to begin anew"
            )
        self.record = PruningRecord.from_dict(held["record"])
        self.optimizer, self.rounds = held["search"]["optimizer"], rounds
        self.record.apply_(model)
        model.load_state_dict(held["state_dict"])
        return True

    def _other(self, held: dict[str, Any]) -> str:
        """In what a search that was written down differs from this one."""
        theirs = {"weights": held["start"], **held["settings"]}
        ours = {"weights": self.start, **self.settings}
        differ = [name for name in ours if theirs.get(name) != ours[name]]
        return f"its {', '.join(differ)} differ" if differ else ""

    @property
    def is_over(self) -> bool:
        """Whether the widths have been aligned, which is the last that a search does."""
        return bool(self.rounds) and self.rounds[-1].block == ALIGNED

    def take(self, record: PruningRecord, optimizer: dict[str, Any]) -> None:
        """A candidate's cut stays, and its optimizer."""
        self.record = self.record.then(record) if self.record else record
        self.optimizer = optimizer

    def add(self, facts: Round) -> None:
        """Another round is over."""
        self.rounds.append(facts)

    def save(self, model: nn.Module) -> None:
        """Write everything down, if there is a folder."""
        if self.folder is None:
            return
        rounds = [asdict(each) for each in self.rounds]
        search = {k: getattr(self, k) for k in ("start", "settings", "optimizer")} | {"rounds": rounds}
        state = {"state_dict": model.state_dict(), "record": self.record.to_dict(), "search": search}
        with atomic_write(self.folder / STATE) as temporary, temporary.open("wb") as file:
            torch.save(state, file)
        with atomic_write(self.folder / HISTORY) as temporary:
            temporary.write_text(json.dumps(_finite(rounds), indent=1, allow_nan=False) + "\n")


def _judged_otherwise(before: float, now: float) -> str:
    """Whether the network that it began with was judged on other data, or by another metric."""
    same = math.isclose(before, now, rel_tol=1e-3, abs_tol=1e-6)
    return "" if same else f"whose network was judged {before:.4g}, while this one is judged {now:.4g}"


def plainly(held: Any) -> str:
    """What an object says of itself, but for where it lies in memory: the same in the next process.

    Example:
        >>> plainly(lambda: 0)
        '<function <lambda>>'
    """
    return re.sub(r" at 0x[0-9a-f]+", "", repr(held))


def _finite(held: Any) -> Any:
    """The same with None in place of NaN and infinity, which JSON does not know."""
    return tree_map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, held)
