"""Tests that a resumed run ends with the bits of an uninterrupted one, for checkpoints from every hook."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, Subset

from benchmarks.common.pages import ReportFiles
from benchmarks.robustness import kill, kill_run
from benchmarks.robustness.kill_run import Classifier, Stripes, same, shuffled
from lightning_prune.criteria import L2
from lightning_prune.trainer.checkpoint_io import AtomicCheckpointIO, last_checkpoint
from lightning_prune.utils.example_inputs import example_of_shapes, shapes_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(many workers|GPU available|resuming from a checkpoint that ended)"),
    pytest.mark.filterwarnings("ignore:.*(not met|exists and is not empty)"),
]
EPOCHS = 4


class Save(L.Callback):
    """Saves a checkpoint in every hook in which Lightning's own callbacks save."""

    def __init__(self, folder: Path, epoch_end: str = "end") -> None:
        self.folder, self.epoch_end = folder, epoch_end

    def save(self, trainer: L.Trainer, hook: str) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-{batches}-{hook}.ckpt")

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.save(trainer, "batch")

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.save(trainer, "validation")

    def on_train_epoch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.save(trainer, self.epoch_end)


class SaveBeforeCut(Save):
    """Is called before the pruning callback: at the end of an epoch the cut is still to be made."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        return

    def on_validation_end(self, trainer: L.Trainer, *_: Any) -> None:
        return


class Stream(IterableDataset):
    """Has no length. Lightning fetches one batch ahead, so that its samples must not draw random numbers."""

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        images = torch.randn(20, 1, 12, 12)
        for index in torch.randperm(20).tolist():
            yield images[index], index % 4


def with_generators() -> tuple[DataLoader, DataLoader]:
    """Return loaders with generators of their own, whose states change from epoch to epoch."""
    return shuffled(generator=torch.Generator().manual_seed(1))


class Averaging(Classifier):
    """Is trained by SGD, with a scheduler that steps with every batch."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        return [optimizer], [{"scheduler": scheduler, "interval": "step"}]


RUNS: dict[str, dict[str, Any]] = {
    "carry": {},
    "reset": {"pruning": {"optimizer": "reset"}},
    "statistics in a pass": {"pruning": {"statistics": "pass", "every_n_epochs": 2}},
    "by weights": {"pruning": {"criterion": L2()}},
    "own generators": {"loaders": with_generators},
    "workers": {"loaders": lambda: shuffled(num_workers=1)},
    "no length": {"loaders": lambda: (DataLoader(Stream(), 4), DataLoader(Stripes(), 4))},
    "no validation": {"module": Averaging, "trainer": {"limit_val_batches": 0}},
    "validation within the epoch": {"module": Averaging, "trainer": {"val_check_interval": 2}},
    "validation now and then": {"module": Averaging, "trainer": {"check_val_every_n_epoch": 3}},
    "accumulation": {"module": Averaging, "trainer": {"accumulate_grad_batches": 2}},
    "limited by steps": {"module": Averaging, "trainer": {"max_steps": 5 * EPOCHS, "max_epochs": -1}},
    "early stopping": {"more": lambda: [EarlyStopping("val_loss", patience=2)]},
    "moving average": {"more": lambda: [EMAWeightAveraging(decay=0.8)]},
}
ALL_PLACES = [f"{epoch}-{batch}-" for epoch in (0, 1, 3) for batch in (2, 5)]
#: a few suffice for the others; gradients in the middle of an accumulation are not in a checkpoint
PLACES = {
    "carry": ALL_PLACES,
    "own generators": ["0-2-", "1-5-"],
    "workers": ["1-3-batch", "2-5-validation"],
    "accumulation": ["1-4-batch", "1-5-validation", "2-5-end"],
}


def run(
    name: str, resume: Path | None, *first: L.Callback, last: tuple[L.Callback, ...] = ()
) -> dict[str, Any]:
    """Train with the settings of ``RUNS``; return the final state."""
    settings = RUNS[name]
    kind, loaders = settings.get("module", Classifier), settings.get("loaders", shuffled)
    more = settings.get("more", list)()
    arguments = {"max_epochs": EPOCHS, **settings.get("trainer", {})}
    callbacks = [*first, kill_run.pruning(**settings.get("pruning", {})), *more, *last]
    return kill_run.fit(kind(), loaders(), callbacks, resume, **arguments)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("ERROR", "lightning.pytorch")


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumed_from_any_hook_ends_with_the_same_bits(name: str, tmp_path: Path) -> None:
    whole = run(name, None, SaveBeforeCut(tmp_path, "early"), last=(Save(tmp_path),))
    assert same(run(name, None), whole)
    assert len(whole["cuts"]) >= (1 if "every_n_epochs" in RUNS[name].get("pruning", {}) else 2)
    places = tuple(PLACES.get(name, ["1-2-", "1-5-"]))
    for path in sorted(tmp_path.glob("*.ckpt")):
        if path.name.startswith(places) and path.name != f"{EPOCHS - 1}-5-early.ckpt":  # nothing follows it
            resumed = run(name, path)
            assert [key for key in whole if not same(resumed[key], whole[key])] == [], path.name


def test_a_checkpoint_holds_no_sample_and_loads_as_weights_only(tmp_path: Path) -> None:
    run("carry", None, last=(Save(tmp_path),))
    saved = torch.load(tmp_path / "1-3-batch.ckpt", weights_only=True)["lightning_prune"]
    (state,) = saved["runs"]
    assert state["example"] == [[{"shape": [1, 1, 12, 12], "dtype": "float32"}], {}]
    assert state["statistics"]["net.0.weight"]["updates"] == 3
    assert saved["record"] is None


def test_examples_are_restored_by_their_shapes() -> None:
    example = (torch.randn(1, 3, 4), [torch.zeros(1, 2, dtype=torch.int64), None]), {"scale": 2.5}
    args, kwargs = example_of_shapes(shapes_of(example))
    assert (args[0].shape, args[0].dtype, kwargs) == (example[0][0].shape, torch.float32, {"scale": 2.5})
    assert torch.equal(args[1][0], example[0][1][0])
    assert args[1][1] is None


def written_by_two(path: Path) -> Path:
    """Have a checkpoint look as if two processes had written it."""
    checkpoint = torch.load(path, weights_only=True)
    saved = checkpoint["lightning_prune"]
    saved["runs"], saved["resume"]["ranks"] = saved["runs"] * 2, saved["resume"]["ranks"] * 2
    torch.save(checkpoint, path)
    return path


@pytest.mark.parametrize(
    ("place", "epochs"),
    [("1-3-batch", [1, 2, 3]), ("1-5-early", [2, 3]), ("1-5-batch", [2, 3]), ("1-5-end", [1, 2, 3])],
)
def test_no_cut_is_lost_with_another_number_of_processes(
    place: str, epochs: list[int], tmp_path: Path
) -> None:
    """If the statistics of a cut are those of other processes, it comes an epoch later."""
    run("carry", None, SaveBeforeCut(tmp_path, "early"), last=(Save(tmp_path),))
    path = written_by_two(tmp_path / f"{place}.ckpt")
    with pytest.warns(UserWarning, match="2 processes, now there are 1|no batch was") as caught:
        resumed = run("carry", path)
    assert [cut[0] for cut in resumed["cuts"]] == epochs
    postponed = [each for each in caught if "no batch was observed" in str(each.message)]
    assert len(postponed) == (0 if 1 in epochs else 1)


@pytest.mark.parametrize("place", ["1-3-batch", "1-4-batch", "1-5-batch", "1-5-end"])
def test_resumed_after_more_batches_than_an_epoch_now_has(place: str, tmp_path: Path) -> None:
    """As on twice as many processes. Nothing is left of the epoch, and the next one has all of its batches."""
    run("by weights", None, last=(Save(tmp_path),))
    seen: list[tuple[int, int]] = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, module: Any, batch: Any, index: int) -> None:
            seen.append((trainer.current_epoch, index))

    loaders = (DataLoader(Subset(Stripes(), range(12)), 4), DataLoader(Stripes(), 4))
    path, callbacks = written_by_two(tmp_path / f"{place}.ckpt"), [kill_run.pruning(criterion=L2()), Watch()]
    with pytest.warns(UserWarning, match="written by 2 processes"):
        resumed = kill_run.fit(Classifier(), loaders, callbacks, path, max_epochs=EPOCHS)
    assert seen == [(epoch, index) for epoch in (2, 3) for index in range(3)]
    assert [cut[0] for cut in resumed["cuts"]] == [1, 2, 3]


# -- files -----------------------------------------------------------------------------------------------------


def test_an_interrupted_write_leaves_the_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, path = AtomicCheckpointIO(), tmp_path / "new" / "a.ckpt"
    writer.save_checkpoint({"epoch": 1}, path)

    def write_half(checkpoint: Any, file: Any) -> None:
        file.write(path.read_bytes()[:99])
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", write_half)
    with pytest.raises(KeyboardInterrupt):
        writer.save_checkpoint({"epoch": 2, "weights": torch.zeros(999)}, path)
    assert torch.load(path, weights_only=True) == {"epoch": 1}
    assert last_checkpoint(tmp_path) == path


def test_half_a_checkpoint_is_skipped(tmp_path: Path) -> None:
    torch.save({"epoch": 1}, tmp_path / "b.ckpt")
    whole = (tmp_path / "b.ckpt").read_bytes()
    (tmp_path / "c.ckpt").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "d.ckpt").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"[cd]\.ckpt cannot be read and is skipped"):
        assert last_checkpoint(tmp_path) == tmp_path / "b.ckpt"
    assert last_checkpoint(tmp_path / "nowhere") is None


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """Return a function that gives the final state of a run that is not killed, trained once for each method."""
    return functools.cache(lambda prune: kill.undisturbed(tmp_path_factory.mktemp(prune), prune))


@pytest.mark.parametrize(
    "made",
    [
        kill.Kill(1, "filters", "SIGKILL", "AtomicCheckpointIO", "surgery", 0.6),
        kill.Kill(2, "compensation", "SIGKILL", "Lightning's", "writing", 0.8),
        kill.Kill(3, "averaged", "SIGTERM", "Lightning's", "surgery", 0.7),
        kill.Kill(4, "rounds", "SIGINT", "AtomicCheckpointIO", "surgery", 0.5),
        kill.Kill(5, "slimming", "SIGTERM", "AtomicCheckpointIO", "validation", 0.4),
        kill.Kill(6, "filters", "SIGINT", "AtomicCheckpointIO", "writing", 0.6),
    ],
    ids=lambda made: f"{made.prune} {made.signal} {made.point}",
)
def test_a_killed_run_resumed_in_another_process_ends_with_the_same_bits(
    made: kill.Kill, tmp_path: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    """A few of the kills of `python -m benchmarks.robustness.kill`."""
    where, source = kill.killed(tmp_path / "run", made)
    assert "ended" not in where
    assert source != "the beginning"
    resumed = kill.checkpointed(tmp_path / "run", made.prune, made.plugin)
    assert same(resumed, uninterrupted(made.prune))
    assert resumed["cuts"]


def test_a_run_that_ended_resumed_from_its_last_epoch_has_the_averaged_weights(
    tmp_path: Path, uninterrupted: Callable[[str], dict[str, Any]]
) -> None:
    """A process may die between the checkpoint of the last epoch and the end of training."""
    kill.checkpointed(tmp_path, "averaged")
    assert "epochs" in str(last_checkpoint(tmp_path))
    assert same(kill.checkpointed(tmp_path, "averaged"), uninterrupted("averaged"))


@pytest.mark.slow
def test_many_kills(tmp_path: Path) -> None:
    rows = kill.study(kill.plan(40), ReportFiles("kill", tmp_path))
    assert [row["number"] for row in rows if not row["same"]] == []


def test_the_table_of_kills_counts_what_was_made() -> None:
    rows = [
        {**asdict(made), "where": "validation, call 3", "source": "epochs/a.ckpt", "same": made.number != 2}
        for made in kill.plan(5)
    ]
    lines = kill.section({"versions": {"torch": "2.14.1"}, "runs": rows}).splitlines()
    assert "5 of 100 kills were made, and 4 of the 5 runs ended with the same bits" in lines[0]
    assert lines[-4].startswith("| 2 | ")
    assert lines[-4].endswith("| validation, call 3 | epochs/a.ckpt | NO |")
