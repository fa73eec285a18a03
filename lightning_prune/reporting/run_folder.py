"""A run's folder: what is written into it, and how to get it back (level 4).

::

    config.yaml         every key, resolved
    summary.json        every fact: sizes, scores, curves, widths, cuts
    record.json         what pruning removed
    net.pt              weights and record; torch.load(..., weights_only=True)
    report.png          channels per layer, mIoU and MACs over the epochs
    csv/metrics.csv     what was logged, and the same under tensorboard/
    error.txt           the traceback, where the run failed
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_prune.reporting.model_size import Sizes
from lightning_prune.serialization.record import PruningRecord

__all__ = ["Summary", "find_runs", "save_net"]

CONFIG, SUMMARY, RECORD, NET, REPORT, ERROR = (
    "config.yaml",
    "summary.json",
    "record.json",
    "net.pt",
    "report.png",
    "error.txt",
)


@dataclass(frozen=True)
class Summary:
    """Everything worth knowing about a run, as plain values.

    Attributes:
        status: ``"completed"``, ``"failed"`` or ``"unfinished"``.
        overrides: key -> value, as given on the command line.
        choices: configuration group -> option.
        seed: of weights and augmentation.
        epochs: trained.
        steps: of the optimizers, in training.
        seconds: of training.
        threads: that torch used on the CPU.
        device: where it was trained and measured.
        dense: sizes before pruning.
        final: sizes after training.
        test: metric -> value on the test set.
        curves: for each epoch, metric -> value. MACs are those after the epoch's cut, scores those before it.
        widths: layer -> filters before and after, in the order of the forward.
        cuts: the facts of every cut.
        candidate_steps: optimizer steps of a search's candidates, beside those of the training.
        error: what went wrong, in one line.
    """

    status: str = "unfinished"
    overrides: dict[str, str] = field(default_factory=dict)
    choices: dict[str, str] = field(default_factory=dict)
    seed: int | None = None
    epochs: int = 0
    steps: int = 0
    seconds: float = 0.0
    threads: int = 0
    device: str = ""
    dense: Sizes | None = None
    final: Sizes | None = None
    test: dict[str, float] = field(default_factory=dict)
    curves: list[dict[str, float]] = field(default_factory=list)
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    cuts: list[dict[str, Any]] = field(default_factory=list)
    candidate_steps: int = 0
    error: str = ""

    @property
    def pruned(self) -> bool:
        """Whether anything was removed."""
        return bool(self.cuts)

    def with_latency(self, dense_ms: float, final_ms: float, threads: int) -> Summary:
        """The same with measured latencies.

        Raises:
            ValueError: the run did not come to its end.
        """
        if self.dense is None or self.final is None:
            raise ValueError(f"a run that is {self.status} has no sizes")
        dense, final = replace(self.dense, latency_ms=dense_ms), replace(self.final, latency_ms=final_ms)
        return replace(self, dense=dense, final=final, threads=threads)

    def save(self, folder: Path) -> None:
        """Write ``summary.json``; NaN becomes null, so that every reader of JSON can read it."""
        text = json.dumps(_plain(asdict(self)), indent=1, allow_nan=False)
        (folder / SUMMARY).write_text(text + "\n")

    @classmethod
    def load(cls, folder: str | Path) -> Summary:
        """Read ``summary.json`` of a run's folder.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is not what :meth:`save` writes.
        """
        path = Path(folder) / SUMMARY
        try:
            return _summary(json.loads(path.read_text()))
        except (TypeError, KeyError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged, or of another version: {error}") from error


def _summary(found: dict[str, Any]) -> Summary:
    for name in ("dense", "final"):
        found[name] = Sizes(**found[name]) if found.get(name) else None
    found["test"] = _numbers(found["test"])
    found["curves"] = [_numbers(row) for row in found["curves"]]
    found["widths"] = {name: (before, after) for name, (before, after) in found["widths"].items()}
    return Summary(**found)


def _numbers(row: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float("nan") if value is None else value for name, value in row.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, Mapping):
        return {key: _plain(held) for key, held in value.items()}
    return [_plain(held) for held in value] if isinstance(value, (list, tuple)) else value


def save_net(path: Path, net: nn.Module, record: PruningRecord) -> None:
    """Write weights and record into one file of plain tensors, numbers and strings.

    Example:
        >>> import tempfile
        >>> from lightning_prune import load_pruned
        >>> record = PruningRecord({"weight": {0: [2]}, "bias": {0: [2]}}, {"weight": [3, 2], "bias": [3]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_net(Path(folder) / NET, nn.Linear(2, 1), record)
        ...     load_pruned(nn.Linear(2, 3), Path(folder) / NET).weight.shape
        torch.Size([1, 2])
    """
    torch.save({"state_dict": net.state_dict(), "record": record.to_dict()}, path)


def find_runs(folders: Iterable[str | Path]) -> dict[Path, Summary]:
    """The runs in or directly below the folders, in the order of their numbers.

    Raises:
        FileNotFoundError: a folder does not exist, or holds no run.
    """
    found: dict[Path, Summary] = {}
    for folder in map(Path, folders):
        inside = [folder] if _is_run(folder) else sorted(filter(_is_run, folder.glob("*")), key=_number)
        if not inside:
            raise FileNotFoundError(f"{folder} holds no run: give the folder of a run or of a sweep")
        found |= {run: _load_or_unfinished(run) for run in inside}
    return found


def _is_run(folder: Path) -> bool:
    return (folder / SUMMARY).is_file() or (folder / ".hydra").is_dir()


def _number(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdecimal() else -1, folder.name)


def _load_or_unfinished(folder: Path) -> Summary:
    return (
        Summary.load(folder) if (folder / SUMMARY).is_file() else Summary(error=f"no {SUMMARY} in {folder}")
    )
