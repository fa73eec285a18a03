"""The state of a search, in memory and on disk after each round.

The folder of a search has two files: ``state.pt`` with weights and record, which :func:`~lightning_prune.load_pruned`
reads, and all that is needed to continue the search; and ``history.json`` with the results of the rounds, for people.
Both are replaced in one step, so that the process may be killed at any moment.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map

from lightning_prune.netadapt.rounds import ALIGNED, Round
from lightning_prune.serialization.integrity import CHECKSUM, INSIST
from lightning_prune.serialization.record import PruningRecord, RecordError
from lightning_prune.serialization.saved_network import SavedNetwork, write_torch
from lightning_prune.serialization.saving import load_network_
from lightning_prune.serialization.torch_file import load_torch_file
from lightning_prune.utils.atomic import write_text
from lightning_prune.utils.hashing import network_digest, value_digest

__all__ = ["SearchState", "stable_repr"]

STATE, HISTORY = "state.pt", "history.json"


@dataclass
class SearchState:
    """State of a search after its last complete round.

    Attributes:
        folder: where the state is saved; None: nowhere.
        start: digest of the network that the search began with.
        settings: of the search, as plain values.
        record: what was removed.
        optimizer: state of the optimizer, on the CPU.
        rounds: result of each round.
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
        """Return the state of a search of ``model`` before its first round."""
        plain = json.loads(json.dumps(settings))
        return cls(folder, network_digest(model), plain, optimizer=optimizer)

    def restore_(self, model: nn.Module, evaluate: Callable[[], float], verify: bool = True) -> bool:
        """Load the state in the folder, if there is one, and turn ``model`` into the network of its last round.

        Args:
            model: the network that the search begins with.
            evaluate: returns the metric of ``model``, to be compared with the metric that was saved.
            verify: whether the checksums of the file must be right, if it has any.

        Returns:
            Whether there was a state.

        Raises:
            ValueError: the folder holds another search, or its file is damaged; ``model`` is unchanged.
        """
        if self.folder is None or not (self.folder / STATE).is_file():
            return False
        saved, search, rounds = _read_state(self.folder / STATE, verify)
        difference = self._difference(search) or _metric_difference(rounds[0].before, evaluate())
        if difference:
            raise ValueError(
                f"{self.folder} holds another search ({difference}): use another folder, or delete it to start again"
            )
        load_network_(model, saved, verify)
        self.record = saved.record or PruningRecord()
        self.optimizer, self.rounds = search["optimizer"], rounds
        return True

    def _difference(self, saved: dict[str, Any]) -> str:
        """Return the names of the settings in which a saved search differs from this one, as text."""
        saved_settings = {"weights": saved["start"], **saved["settings"]}
        settings = {"weights": self.start, **self.settings}
        names = [name for name in settings if saved_settings.get(name) != settings[name]]
        return f"its {', '.join(names)} differ" if names else ""

    @property
    def is_aligned(self) -> bool:
        """Whether the widths have been aligned, which is the last step of a search."""
        return bool(self.rounds) and self.rounds[-1].block == ALIGNED

    def take(self, record: PruningRecord, optimizer: dict[str, Any]) -> None:
        """Add the cut of a candidate that is kept, and replace the state of the optimizer."""
        self.record = self.record.then(record) if self.record else record
        self.optimizer = optimizer

    def save(self, model: nn.Module) -> None:
        """Write the state and the history, if there is a folder."""
        if self.folder is None:
            return
        rounds = [asdict(item) for item in self.rounds]
        search = {k: getattr(self, k) for k in ("start", "settings", "optimizer")} | {"rounds": rounds}
        saved = SavedNetwork(dict(model.state_dict()), self.record)
        write_torch(saved, self.folder / STATE, search={**search, CHECKSUM: value_digest(search)})
        write_text(self.folder / HISTORY, json.dumps(_without_nan(rounds), indent=1, allow_nan=False) + "\n")


def _read_state(path: Path, verify: bool) -> tuple[SavedNetwork, dict[str, Any], list[Round]]:
    """Return network, search and rounds of a file; raise RecordError if one of them is damaged."""
    content = load_torch_file(path, verify)
    try:
        saved = SavedNetwork.of(content["state_dict"], content, verify)
        search = dict(content["search"])
        checksum = search.pop(CHECKSUM, None)
        if verify and checksum is not None and checksum != value_digest(search):
            raise RecordError(f"the checksum of the search does not match; {INSIST}")
        if not isinstance(search["start"], str) or not isinstance(search["settings"], dict):
            raise RecordError("the settings of the search are missing")
        rounds = [Round(**item) for item in search["rounds"]]
        if not (rounds and "optimizer" in search and math.isfinite(rounds[0].before)):
            raise RecordError("its rounds are missing")
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise RecordError(f"{path} is not the state of a search, or damaged: {error!r}") from error
    return saved, search, rounds


def _metric_difference(saved: float, now: float) -> str:
    """Return a text if two metrics of the same network differ: it was evaluated on other data, or otherwise."""
    same = math.isclose(saved, now, rel_tol=1e-3, abs_tol=1e-6)
    return "" if same else f"the metric of its first network is {saved:.4g}, but here it is {now:.4g}"


def stable_repr(value: Any) -> str:
    """Return ``repr(value)`` without addresses in memory, so that it is the same in every process.

    Example:
        >>> stable_repr(lambda: 0)
        '<function <lambda>>'
    """
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


def _without_nan(value: Any) -> Any:
    """Replace NaN and infinity by None: JSON has no numbers for them."""
    return tree_map(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x, value)
