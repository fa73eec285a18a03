"""The folder of a run: its files, and how they are written and read.

::

    config.yaml         every key of the configuration, resolved
    summary.json        sizes, scores, curves, widths and cuts
    record.json         the pruning record
    net.pt              weights and record; torch.load(..., weights_only=True)
    report.html         the page of the run, and report.png, a picture of it
    layers.json         the layers before and after, for the page
    examples.npz        images with outputs of the dense and the pruned network, for the page
    csv/metrics.csv     the logged metrics, also under tensorboard/
    error.txt           the traceback of a run that failed
    same_run.txt        in a sweep: the folder that holds the results of this configuration instead
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lightning_prune.reporting.model_size import Sizes
from lightning_prune.serialization.integrity import sealed, unsealed
from lightning_prune.serialization.json_file import read_json
from lightning_prune.serialization.record import PruningRecord
from lightning_prune.serialization.saved_network import SavedNetwork, read_network, write_torch
from lightning_prune.serialization.saving import load_network_
from lightning_prune.utils.atomic import write_text
from lightning_prune.utils.modules import floating_dtype

__all__ = ["Summary", "find_runs", "is_run", "load_net", "save_net"]

CONFIG, SUMMARY, RECORD = "config.yaml", "summary.json", "record.json"
NET, PAGE, REPORT, ERROR = "net.pt", "report.html", "report.png", "error.txt"
SAME_RUN = "same_run.txt"


@dataclass(frozen=True)
class Summary:
    """Results of a run as plain values.

    Attributes:
        status: ``"completed"``, ``"interrupted"`` (by Ctrl-C or SIGTERM), ``"failed"`` or ``"unfinished"``.
        overrides: key -> value, from the command line.
        choices: configuration group -> option.
        seed: seed of weights and augmentation.
        epochs: number of trained epochs.
        steps: number of optimizer steps in training.
        seconds: duration of training.
        threads: number of CPU threads of torch.
        device: device of training and measurement.
        dense: sizes before pruning.
        final: sizes after training.
        test: metric -> value on the test set.
        val: metric -> value of the final network on the validation set.
        objective: name -> value of what the run returns to a sweeper; see :mod:`lightning_prune.reporting.objective`.
        configuration: digest of the configuration, by which a sweep recognises a run that it has made before.
        curves: for each epoch, metric -> value: scores before the cut of the epoch, MACs after it.
        widths: layer -> filters before and after pruning, in the order of the forward.
        cuts: one dictionary per cut, of a :class:`~lightning_prune.pruning.cut_summary.CutSummary`.
        candidate_steps: optimizer steps of the candidates of a search, not included in ``steps``.
        error: the error of a failed run, in one line.
        class_names: names of the classes.
        confusion: pixels or images of each class (row) in the test that were taken for each class (column).
        val_confusion: ``"dense"``, right before the first cut, and ``"final"`` -> the same in the validation; without
            a dense network only the latter, and with more than 256 classes neither.
        dense_epoch: number of trained epochs of that dense network.
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
    val: dict[str, float] = field(default_factory=dict)
    objective: dict[str, float] = field(default_factory=dict)
    configuration: str = ""
    curves: list[dict[str, float]] = field(default_factory=list)
    widths: dict[str, tuple[int, int]] = field(default_factory=dict)
    cuts: list[dict[str, Any]] = field(default_factory=list)
    candidate_steps: int = 0
    error: str = ""
    class_names: list[str] = field(default_factory=list)
    confusion: list[list[int]] = field(default_factory=list)
    val_confusion: dict[str, list[list[int]]] = field(default_factory=dict)
    dense_epoch: int | None = None

    @property
    def scores(self) -> tuple[str, dict[str, float]]:
        """The set on which the final network was scored, and the scores: ``"val"`` where there is no test set."""
        return ("val", self.val) if self.val and not self.test else ("test", self.test)

    @property
    def pruned(self) -> bool:
        """Whether the run made a cut."""
        return bool(self.cuts)

    def with_latency(self, dense_ms: float, final_ms: float, threads: int) -> Summary:
        """Return a copy with measured latencies.

        Raises:
            ValueError: the run is not completed.
        """
        if self.dense is None or self.final is None:
            raise ValueError(f"a run that is {self.status} has no sizes")
        dense, final = replace(self.dense, latency_ms=dense_ms), replace(self.final, latency_ms=final_ms)
        return replace(self, dense=dense, final=final, threads=threads)

    def save(self, folder: Path) -> None:
        """Write ``summary.json``, with its checksum. NaN, which JSON does not have, becomes null."""
        text = json.dumps(sealed(_nan_to_null(asdict(self))), indent=1, allow_nan=False)
        write_text(folder / SUMMARY, text + "\n")

    @classmethod
    def load(cls, folder: str | Path, verify: bool = True) -> Summary:
        """Read ``summary.json`` in the folder of a run.

        Args:
            folder: the folder.
            verify: whether the checksum must be right; files from before there were checksums have none.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is damaged, was changed, or was written by another version.
        """
        path = Path(folder) / SUMMARY
        try:
            return _summary_from(unsealed(read_json(path), "it", verify))
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged, or of another version: {error}") from error


def _summary_from(values: dict[str, Any]) -> Summary:
    """Return the summary with the values of a JSON file."""
    for name in ("dense", "final"):
        values[name] = Sizes(**values[name]) if values.get(name) else None
    for name in ("test", "val", "objective"):
        values[name] = _null_to_nan(values.get(name, {}))
    values["curves"] = [_null_to_nan(row) for row in values["curves"]]
    values["widths"] = {name: (before, after) for name, (before, after) in values["widths"].items()}
    return Summary(**values)


def _null_to_nan(row: Mapping[str, float | None]) -> dict[str, float]:
    return {name: float("nan") if value is None else value for name, value in row.items()}


def _nan_to_null(value: Any) -> Any:
    if isinstance(value, float) and value != value:
        return None
    if isinstance(value, Mapping):
        return {key: _nan_to_null(entry) for key, entry in value.items()}
    return [_nan_to_null(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def save_net(path: Path, net: nn.Module, record: PruningRecord) -> None:
    """Write the weights and the record to one file, as tensors, numbers and strings.

    Example:
        >>> import tempfile
        >>> from lightning_prune import load_pruned
        >>> record = PruningRecord({"weight": {0: [2]}, "bias": {0: [2]}}, {"weight": [3, 2], "bias": [3]})
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_net(Path(folder) / NET, nn.Linear(2, 1), record)
        ...     load_pruned(nn.Linear(2, 3), Path(folder) / NET).weight.shape
        torch.Size([1, 2])
    """
    write_torch(SavedNetwork(dict(net.state_dict()), record), path)


def load_net(net: nn.Module, path: Path) -> nn.Module:
    """Load what :func:`save_net` wrote into a newly built network, which keeps its dtype.

    A run with ``precision="bf16-true"`` has weights of another dtype than the network that is built for it.

    Raises:
        RecordError: as :func:`~lightning_prune.load_pruned`.
    """
    saved = read_network(path)
    here = floating_dtype(net.parameters())
    stored = floating_dtype(x for x in saved.weights.values() if isinstance(x, Tensor))
    if here is None or stored is None or here == stored:
        return load_network_(net, saved)
    return load_network_(net.to(stored), saved).to(here)


def find_runs(folders: Iterable[str | Path]) -> dict[Path, Summary]:
    """Return folder -> summary of the runs, in the order of the numbers in their names.

    Args:
        folders: folders of runs, or of sweeps with the folders of their runs.

    Raises:
        FileNotFoundError: a folder does not exist, or contains no run.
    """
    runs: dict[Path, Summary] = {}
    for folder in map(Path, folders):
        run_folders = [folder] if is_run(folder) else sorted(filter(is_run, folder.glob("*")), key=_number)
        if not run_folders:
            raise FileNotFoundError(f"{folder} holds no run: give the folder of a run or of a sweep")
        runs |= {run: _load_or_unfinished(run) for run in run_folders}
    return runs


def is_run(folder: Path) -> bool:
    """Return whether a folder holds the results of a run, which is not the case if another one holds them."""
    has_files = (folder / SUMMARY).is_file() or (folder / ".hydra").is_dir()
    return has_files and not (folder / SAME_RUN).is_file()


def _number(folder: Path) -> tuple[int, str]:
    return (int(folder.name) if folder.name.isdecimal() else -1, folder.name)


def _load_or_unfinished(folder: Path) -> Summary:
    return (
        Summary.load(folder) if (folder / SUMMARY).is_file() else Summary(error=f"no {SUMMARY} in {folder}")
    )
